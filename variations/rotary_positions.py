r"""
rotary_positions.py - encode positions by rotating queries and keys

THE IDEA.  The base adds to each token a vector that encodes its position. Rotary positions (Su et
al. 2021, RoFormer, section 3.2) leave the token alone. Instead, in every layer, each query and key
is rotated by an angle that grows with its position. Then the positions enter their product only
through the difference of the two angles, that is, through the distance between the tokens:

    a pair of dimensions     ->        /        ^        \        from 0 to 2 and from 1 to 3:
    at position              0        1        2        3        the same angle, the same product

Each pair of dimensions turns at its own speed: fast in the first pair, slowly in the last. The
speeds are those of the base's sinusoids, with K in place of D. LLaMA, Mistral, and Qwen use rotary
positions.

Run it:     python variations/rotary_positions.py        (about 10 seconds on one CPU core)
"""
from measure import (LONGER, largest_difference, new_model, prepare, print_row, expect, check_cache,
                     replace_attention, scores, train_and_score)
import torch
from torch import nn

from decoder_only import MultiHeadAttention
from housekeeping import InputError, run_script

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: six seeds instead of one
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
        if head_dim % 2:
            raise InputError(f"heads of size {head_dim} cannot be rotated in pairs: use fewer or "
                             "more heads")
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
        result, weights = self.attention_function(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights


def use_rotary_positions(model, interpolation=1.0):
    """Give a model of decoder_only.py rotary positions. It keeps its weights. Returns the model."""
    heads, d_model = model.arguments["num_heads"], model.arguments["d_model"]
    model.positional_encoding = RotaryPositions(d_model // heads, interpolation)

    def make(_, old):
        new = RotaryAttention(d_model, heads, old.dropout).to(old.w_q.weight)
        new.load_state_dict(old.state_dict())
        new.rotary = model.positional_encoding
        return new

    return replace_attention(model, make)


def interpolate_sinusoids(model, factor):
    """Divide the positions of a base model by `factor`: the control for rotary positions."""
    encoding = model.positional_encoding
    max_len, d_model = encoding.table.shape
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)  # (D/2,)
    angles = torch.arange(max_len)[:, None] / factor * frequency  # (max_len, D/2)
    encoding.table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (max_len, D)


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    positions = torch.arange(7).expand(2, 7)
    base = new_model(0).double()
    model = use_rotary_positions(new_model(0)).double()
    model.positional_encoding.frequency.zero_()
    base.positional_encoding.table.zero_()
    expect("angles of 0: equal to the base without positions",
          largest_difference(model(tokens), base(tokens)))
    model = use_rotary_positions(new_model(0)).double()
    here, moved = (model.run_decoder(tokens, positions=positions + shift)[0] for shift in (0, 9))
    expect("all positions moved by 9: nothing changes", largest_difference(here, moved))
    spread = model.run_decoder(tokens, positions=2 * positions)[0]
    print(f"  {'all distances doubled: the outputs change':66s} "
          f"{largest_difference(here, spread):8.1e}")
    check_cache(use_rotary_positions(new_model(1)).double())


# --- The measurement ------------------------------------------------------------------
def main():
    prepare(globals())
    run_checks()
    print(f"\nThe measurement: exact match after {NUM_EPOCHS} epochs on rows of up to 5 digits")
    print_row("", ["held out", *(f"{n} digits" for n in LONGER)])
    results = []
    for seed in range(SEED, SEED + (6 if FULL else 1)):
        base, model = new_model(seed), use_rotary_positions(new_model(seed))
        rows = {"sinusoids (the base)": train_and_score(base, NUM_EPOCHS, seed),
                "rotary": train_and_score(model, NUM_EPOCHS, seed),
                "sinusoids, interpolated": [""], "rotary, interpolated": [""]}
        # The divisor uses the length of the test. The last token read has position 2n, which was
        # 10 in training, so this brings it back to 10.
        for length in LONGER:
            interpolate_sinusoids(base, length / 5)
            model.positional_encoding.interpolation = length / 5
            rows["sinusoids, interpolated"] += scores(base, [length])
            rows["rotary, interpolated"] += scores(model, [length])
        for name, cells in rows.items():
            print_row(f"{name}, seed {seed}", cells)
        results.append((rows["sinusoids, interpolated"][2], rows["rotary, interpolated"][2]))
    print("\nWhat this size cannot show: models that interpolate to longer texts are trained a "
          "little more\non long texts, and their rows are thousands of tokens long.")
    base, interpolated = results[0]  # on 7 digits, first seed
    return {"base": f"{base:.1%}", "variation": f"{interpolated:.1%}"}


if __name__ == "__main__":
    run_script(main)
