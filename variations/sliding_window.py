"""
sliding_window.py - attend only to the last w tokens, with a cache that stops growing

THE IDEA.  Each position attends to itself and the w - 1 positions before it (Beltagy et al. 2020,
Longformer, for language models; Jiang et al. 2023, Mistral 7B, section 2). Older keys are never
used again, so the cache can drop them: its memory is constant, however long the text.

    w = 3     # . . . . .
              # # . . . .     rows: queries; columns: keys
              # # # . . .
              . # # # . .
              . . # # # .
              . . . # # #

After L layers, a vector can depend on tokens up to L (w - 1) positions back, because each layer
adds w - 1. The first Mistral 7B used a window in every layer, Gemma 2 uses one in every other
layer, and Gemma 3 in five of six.

Run it:     python variations/sliding_window.py        (about 15 seconds on one CPU core)
"""
from measure import (by_length, cache_bytes, largest_difference, new_model, prepare, expect,
                     check_cache, replace_attention, train)
import torch

from decoder_only import KeyValueCache, MultiHeadAttention
from housekeeping import run_script

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: three seeds instead of one
NUM_EPOCHS = 4           # passes over the training data, for each model
SEED = 0
# =====================================================================================


# --- The part -------------------------------------------------------------------------
class RollingCache(KeyValueCache):
    """Keeps the keys and values of the last `window` tokens. `length` counts all tokens.

    Each step shifts the entries to the left, so they stay in the order of their positions and end
    with the last token. (Mistral's ring buffer overwrites the oldest entry instead.)
    """

    def __init__(self, batch_size, attention, max_len):
        super().__init__(batch_size, attention, min(attention.window, max_len))

    def append(self, keys, values):
        """Append (B, H, T, K) each. Returns all that the T new tokens may need, cached and new."""
        window = self.keys.size(2)
        used = min(window, self.length)
        self.length += keys.size(2)
        keys = torch.cat([self.keys[:, :, window - used:], keys], dim=2)  # (B, H, used + T, K)
        values = torch.cat([self.values[:, :, window - used:], values], dim=2)
        used = min(window, self.length)
        self.keys[:, :, window - used:] = keys[:, :, -used:]
        self.values[:, :, window - used:] = values[:, :, -used:]
        return keys, values


class SlidingWindowAttention(MultiHeadAttention):
    """Self-attention in which each query attends to at most `window` keys, its own included."""

    def __init__(self, d_model, num_heads, window, dropout=0.0):
        super().__init__(d_model, num_heads, dropout)
        self.window = window

    def new_cache(self, batch_size, max_len):
        return RollingCache(batch_size, self, max_len)

    def forward(self, x, memory, mask=None, cache=None):
        queries = self.split_heads(self.w_q(x))  # (B, H, T, K)
        keys = self.split_heads(self.w_k(memory))  # (B, H, S, K)
        values = self.split_heads(self.w_v(memory))
        if cache is not None:
            keys, values = cache.append(keys, values)
        # The keys are the last S tokens, and the queries the last T of them.
        new, total = queries.size(2), keys.size(2)
        distance = torch.arange(total - new, total)[:, None] - torch.arange(total)  # (T, S)
        near = (distance < self.window)[None, None].to(x.device)
        # subtle: a single new token comes without a causal mask. It needs the window, too, because
        # there are w + 1 keys: w from the cache and its own. A mask of padding still has columns
        # for the tokens that the cache has dropped.
        mask = near if mask is None else near & mask[..., -total:]
        dropout = self.dropout if self.training else 0.0
        result, weights = self.attention_function(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights


def use_sliding_window(model, window):
    """Give a model of decoder_only.py a sliding window. It keeps its weights. Returns the model."""
    def make(_, old):
        new = SlidingWindowAttention(model.arguments["d_model"], old.num_heads, window, old.dropout)
        new.to(old.w_q.weight)  # its dtype first: weights that pass through float32 are rounded
        new.load_state_dict(old.state_dict())
        return new

    return replace_attention(model, make)


@torch.no_grad()
def reach(model, length=24):
    """Return how many positions back a changed token still changes the last output."""
    tokens = torch.full((1, length), 7)
    before = model(tokens)[0, -1]
    for position in range(length):
        other = tokens.clone()
        other[0, position] = 9
        if (model(other)[0, -1] - before).abs().max() > 0:
            return length - 1 - position


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    base = new_model(0).double()
    model = use_sliding_window(new_model(0).double(), 7)
    expect("a window as long as the row: equal to full attention",
          largest_difference(model(tokens), base(tokens)))
    for window in (1, 2, 3, 5):
        model = use_sliding_window(new_model(0).double(), window)
        whole = model.run_decoder(tokens)[0]
        caches = [layer.self_attention.new_cache(2, 7) for layer in model.layers]
        steps = [model.run_decoder(tokens[:, t:t + 1], positions=torch.full((2, 1), t),
                              caches=caches)[0] for t in range(7)]
        expect(f"window {window}: the rolling cache gives what the mask gives",
              largest_difference(torch.cat(steps, 1), whole))
    for layers, window in ((1, 3), (2, 3), (3, 3), (2, 5)):
        model = use_sliding_window(new_model(0, num_layers=layers).double(), window)
        expect(f"L = {layers}, w = {window}: the reach is L (w - 1) = {layers * (window - 1)}",
              abs(reach(model) - layers * (window - 1)))
    check_cache(use_sliding_window(new_model(1).double(), 3))


# --- The measurement ------------------------------------------------------------------
def main():
    prepare(globals())
    run_checks()
    print(f"\nThe measurement: exact match on held-out sequences after {NUM_EPOCHS} epochs (window "
          f"3: {3 * NUM_EPOCHS}).\nWith n digits, a word is predicted n positions after its digit. "
          "Two layers reach 2 (w - 1).")
    print(f"  {'':24s}{'reach':>6s}" + "".join(f"{f'{n} digits':>10s}" for n in range(2, 6))
          + f"{'all':>8s}{'cache, 1024 tokens':>20s}")
    results = []
    for seed in range(SEED, SEED + (3 if FULL else 1)):
        for window in (None, 7, 4, 3):
            model, name = new_model(seed), "full (the base)"
            if window:
                model, name = use_sliding_window(model, window), f"window {window}"
            exact = train(model, (3 if window == 3 else 1) * NUM_EPOCHS, seed)
            back = f"{2 * (window - 1)}" if window else "all"
            print(f"  {f'{name}, seed {seed}':24s}{back:>6s}" + "".join(
                f"{one:10.1%}" for one in by_length(model, seed))
                + f"{exact:8.1%}{cache_bytes(model, 1024):14,d} bytes", flush=True)
            results.append(f"{exact:.1%}, {cache_bytes(model, 1024):,} bytes")
    print("\nWhat this size cannot show: whether a reach of L (w - 1) is enough for long texts. "
          "Here the answer\nis always within a few tokens.")
    return {"base": results[0], "variation": results[1]}


if __name__ == "__main__":
    run_script(main)
