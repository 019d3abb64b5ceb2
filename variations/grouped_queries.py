r"""
grouped_queries.py - several heads share their keys and values (grouped-query attention)

THE IDEA.  With long texts or large batches, most of the memory in generation goes to the cached
keys and values of all heads. So keep H query heads, but only G key heads, and let H / G query heads
share each of them (Ainslie et al. 2023, GQA). The cache shrinks by H / G. G = H is multi-head
attention; G = 1 is multi-query attention (Shazeer 2019).

    query heads   0   1   2   3        0   1   2   3        0   1   2   3
                  |   |   |   |         \ /     \ /          \  |   |  /
    key heads     0   1   2   3          0       1               0
                    multi-head         grouped, G = 2      multi-query, G = 1

Llama 2 70B, Llama 3, and Mistral use 8 key heads.

Run it:     python variations/grouped_queries.py        (about 15 seconds on one CPU core)
"""
from measure import (cache_bytes, count_parameters, evaluate_held_out, largest_difference,
                     new_model, prepare, expect, check_cache, replace_attention, train)
import copy
from types import SimpleNamespace

import torch
from torch import nn

from decoder_only import KeyValueCache, MultiHeadAttention
from housekeeping import check, run_script

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: three seeds instead of one
NUM_EPOCHS = 4           # passes over the training data, for each model
UPTRAINING_EPOCHS = 1    # passes after converting a trained model
UPTRAINING_RATE = 1e-3   # for those passes; lower, because the model is already trained
NUM_HEADS = 4
SEED = 0
# =====================================================================================


# --- The part -------------------------------------------------------------------------
class GroupedQueryAttention(MultiHeadAttention):
    """Attention with `num_heads` query heads and `key_heads` heads for keys and values."""

    def __init__(self, d_model, num_heads, key_heads, dropout=0.0):
        super().__init__(d_model, num_heads, dropout)
        self.key_heads = key_heads
        self.w_k = nn.Linear(d_model, key_heads * self.head_dim)
        self.w_v = nn.Linear(d_model, key_heads * self.head_dim)

    def new_cache(self, batch_size, max_len):
        """Return an empty cache for `key_heads` heads."""
        return KeyValueCache(batch_size, SimpleNamespace(  # the three attributes that it reads
            w_k=self.w_k, num_heads=self.key_heads, head_dim=self.head_dim), max_len)

    def split_keys(self, x):
        """(B, S, G * K) -> (B, G, S, K): split_heads for keys and values."""
        return x.view(*x.shape[:2], self.key_heads, self.head_dim).transpose(1, 2)

    def forward(self, x, memory, mask=None, cache=None):
        queries = self.split_heads(self.w_q(x))  # (B, H, T, K)
        keys = self.split_keys(self.w_k(memory))  # (B, G, S, K)
        values = self.split_keys(self.w_v(memory))
        if cache is not None:
            keys, values = cache.append(keys, values)
        # subtle: repeat_interleave gives heads 0 0 1 1. `repeat` would give 0 1 0 1.
        group = self.num_heads // self.key_heads
        keys = keys.repeat_interleave(group, dim=1)  # (B, H, S, K)
        values = values.repeat_interleave(group, dim=1)
        dropout = self.dropout if self.training else 0.0
        result, weights = self.attention_function(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights


def use_grouped_queries(model, key_heads, shared="mean"):
    """Give a model of decoder_only.py grouped queries. Returns the model.

    shared  what a shared head is: the "mean" of the heads that it replaces (Ainslie et al. 2023,
            section 2.1), the "first" of them, or a new "random" one. With key_heads = num_heads,
            mean and first change nothing
    """
    heads, d_model = model.arguments["num_heads"], model.arguments["d_model"]

    def make(_, old):
        new = GroupedQueryAttention(d_model, heads, key_heads, old.dropout)
        if shared == "random":
            return new
        state = old.state_dict()
        for name in ("w_k", "w_v"):
            for part in ("weight", "bias"):
                value = state[f"{name}.{part}"]  # (D, ...): the rows of H heads
                value = value.view(key_heads, heads // key_heads, -1, *value.shape[1:])
                value = value.mean(1) if shared == "mean" else value[:, 0]  # (G, K, ...)
                state[f"{name}.{part}"] = value.flatten(0, 1)
        new.to(old.w_q.weight).load_state_dict(state)
        return new

    return replace_attention(model, make, ("MultiHeadAttention", "GroupedQueryAttention"))


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    base = new_model(0, num_heads=NUM_HEADS).double()
    model = use_grouped_queries(new_model(0, num_heads=NUM_HEADS), NUM_HEADS).double()
    expect(f"{NUM_HEADS} key heads: equal to multi-head attention",
          largest_difference(model(tokens), base(tokens)))
    base = new_model(0, num_heads=4).double()
    for layer in base.layers:
        for linear in (layer.self_attention.w_k, layer.self_attention.w_v):
            for value in (linear.weight, linear.bias):
                heads = value.view(4, 16, -1)
                heads.copy_(heads[[0, 0, 2, 2]])  # equal within each group
    model = use_grouped_queries(copy.deepcopy(base), 2)
    expect("2 key heads: equal to 4 heads that are equal in pairs",
          largest_difference(model(tokens), base(tokens)))
    check_cache(use_grouped_queries(new_model(1), 2).double())


# --- The measurement ------------------------------------------------------------------
def main():
    prepare(globals())
    check(d_model=64, NUM_HEADS=NUM_HEADS)
    run_checks()
    key_heads = [g for g in range(NUM_HEADS, 0, -1) if NUM_HEADS % g == 0]
    print(f"\nThe measurement: exact match on held-out sequences, {NUM_HEADS} query heads. Then, "
          f"after {UPTRAINING_EPOCHS} epoch(s),\na trained multi-head model with shared heads (the "
          "mean, the first, or random ones), and a new model")
    print(f"  {'key heads':12s}{'parameters':>11s}{'bytes per token':>17s}{'from scratch':>14s}"
          f"{'mean, at once':>15s}{'mean':>8s}{'first':>8s}{'random':>8s}{'new':>8s}")
    results = []
    for seed in range(SEED, SEED + (3 if FULL else 1)):
        trained = None
        for count in key_heads:
            def new(count=count, seed=seed):
                return use_grouped_queries(new_model(seed, num_heads=NUM_HEADS), count, "random")

            model = new()
            scratch = train(model, NUM_EPOCHS, seed)
            cells = f"{scratch:14.1%}"
            if trained is None:
                trained = model
            else:
                starts = [use_grouped_queries(copy.deepcopy(trained), count, shared)
                          for shared in ("mean", "first", "random")] + [new()]
                cells += f"{evaluate_held_out(starts[0], seed):15.1%}" + "".join(
                    f"{train(start, UPTRAINING_EPOCHS, seed, learning_rate=UPTRAINING_RATE):8.1%}"
                    for start in starts)
            print(f"  {f'{count}, seed {seed}':12s}{count_parameters(model):11,d}"
                  f"{cache_bytes(model, 1):17,d}{cells}", flush=True)
            results.append(f"{scratch:.1%}, {cache_bytes(model, 1)} bytes")
    print("\nWhat this size cannot show: how much time a smaller cache saves. With one short"
          "\nrow, even the full cache is tiny next to the weights, and this task needs few heads.")
    # Of the first seed: all heads, and one key head
    return {"base": results[0], "variation": results[len(key_heads) - 1]}


if __name__ == "__main__":
    run_script(main)
