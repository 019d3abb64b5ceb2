r"""
rotary_positions.py - encode positions by rotating queries and keys

THE IDEA.  The base adds a vector to each token that encodes its position. Rotary positions (Su et
al. 2021, RoFormer, section 3.2) leave the token alone. Instead, in every layer, each query and key
is rotated by an angle that grows with its position. Then the positions enter their product only
through the difference of the two angles, that is, through the distance between the tokens:

    a pair of dimensions     ->        /        ^        \        from 0 to 2 and from 1 to 3:
    at position              0        1        2        3        the same angle, the same product

Each pair of dimensions turns at its own speed: fast in the first pair, slowly in the last. The
formula is that of the base's sinusoids, with K instead of D. LLaMA, Mistral, and Qwen use rotary
positions.

Run it:     python variations/rotary_positions.py        (about 10 seconds on one CPU core)
"""
from measure import (largest_difference, new_model, prove, prove_cache, replace_attention, score,
                     train)
import torch
from torch import nn

from decoder_only import MultiHeadAttention
from housekeeping import check_constants, check_sizes, run_script

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: three seeds instead of one
NUM_EPOCHS = 4           # passes over the training data, for each model
SEED = 0
# =====================================================================================


# --- The part -------------------------------------------------------------------------
def rotate(x, angles):
    """Rotate each pair of dimensions (2i, 2i+1) of x (B, H, T, K) by angles (B, 1, T, K/2)."""
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, T, K/2) each
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


class RotaryPositions(nn.Module):
    """Takes the place of PositionalEncoding: adds nothing and keeps the angles for the layers.

    interpolation  divides all positions (Chen et al. 2023). With 2, a row that is twice as long as
                   those in training gets angles from the range seen in training
    """

    def __init__(self, head_dim, interpolation=1.0):
        super().__init__()
        self.interpolation = interpolation
        check_sizes(head_dim, 1, ("the size of a head", ""))  # pairs need an even one
        # subtle: always float64. In bfloat16, angles of distant positions would be rounded away.
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
        self.frequency = 10000.0 ** (-pairs / head_dim)  # (K/2,)

    def forward(self, x, positions):
        """x (B, T, D), positions (B, T) -> x"""
        positions = positions[:, None, :, None] / self.interpolation  # (B, 1, T, 1)
        self.angles = positions * self.frequency  # (B, 1, T, K/2)
        return x


class RotaryAttention(MultiHeadAttention):
    """Self-attention with rotated queries and keys. Values are not rotated."""

    def forward(self, x, memory, mask=None, cache=None):
        """Does what MultiHeadAttention does, and rotates queries and keys."""
        queries = rotate(self.split_heads(self.w_q(x)), self.rotary.angles)  # (B, H, T, K)
        keys = rotate(self.split_heads(self.w_k(memory)), self.rotary.angles)
        values = self.split_heads(self.w_v(memory))
        if cache is not None:
            # subtle: the cache holds rotated keys. So each key is rotated once, by its own angle.
            keys, values = cache.append(keys, values)
        dropout = self.dropout if self.training else 0.0
        result, weights = self.formula(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights


def use_rotary_positions(model, interpolation=1.0):
    """Give a model of decoder_only.py rotary positions. Its weights stay. Returns the model."""
    heads, d_model = model.arguments["num_heads"], model.arguments["d_model"]
    model.positional_encoding = RotaryPositions(d_model // heads, interpolation)

    def make(_, old):
        new = RotaryAttention(d_model, heads, old.dropout)
        new.load_state_dict(old.state_dict())
        new.rotary = model.positional_encoding
        return new

    return replace_attention(model, make)


# --- The proof ------------------------------------------------------------------------
@torch.no_grad()
def prove_it():
    print("The proof: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    positions = torch.arange(7).expand(2, 7)
    base = new_model(0).double()
    model = use_rotary_positions(new_model(0)).double()
    model.positional_encoding.frequency.zero_()
    base.positional_encoding.table.zero_()
    prove("angles of 0: equal to the base without positions",
          largest_difference(model(tokens), base(tokens)))
    model = use_rotary_positions(new_model(0)).double()
    here, moved = (model.decode(tokens, positions=positions + shift)[0] for shift in (0, 9))
    prove("all positions moved by 9: nothing changes", largest_difference(here, moved))
    spread = model.decode(tokens, positions=2 * positions)[0]
    print(f"  {'all distances doubled: the outputs change':66s} "
          f"{largest_difference(here, spread):8.1e}")
    prove_cache(use_rotary_positions(new_model(1)).double())


# --- The measurement ------------------------------------------------------------------
def main():
    check_constants(globals())
    torch.set_num_threads(1)
    prove_it()
    print(f"\nThe measurement: exact match after {NUM_EPOCHS} epochs on rows of up to 5 digits")
    print(f"  {'':34s}{'held out':>10s}" + "".join(f"{f'{n} digits':>11s}" for n in (6, 7, 8)))
    scores = {}
    for seed in range(SEED, SEED + (3 if FULL else 1)):
        for name, change in (("sinusoids (the base)", lambda model: model),
                             ("rotary", use_rotary_positions)):
            model = change(new_model(seed))
            held_out = train(model, NUM_EPOCHS, seed)
            scores.setdefault(name, held_out)  # of the first seed
            longer = [score(model, length) for length in (6, 7, 8)]
            print(f"  {f'{name}, seed {seed}':34s}{held_out:10.1%}"
                  + "".join(f"{one:11.1%}" for one in longer), flush=True)
        interpolated = []
        for length in (6, 7, 8):  # the last token read has position 2n, which was 10 in training
            model.positional_encoding.interpolation = length / 5
            interpolated.append(score(model, length))
        print(f"  {f'rotary, interpolated, seed {seed}':34s}{'':10s}"
              + "".join(f"{one:11.1%}" for one in interpolated), flush=True)
    print("\nWhat this size cannot show: models that interpolate to longer texts are trained a "
          "little more\non long texts, and their rows are thousands of tokens long.")
    return {"base": f"{scores['sinusoids (the base)']:.1%}", "variation": f"{scores['rotary']:.1%}"}


if __name__ == "__main__":
    run_script(main)
