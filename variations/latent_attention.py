"""
latent_attention.py - cache one small vector per token instead of keys and values

THE IDEA.  Compress each token into a small vector, its latent, and compute the keys and values of
all heads from it (DeepSeek-V2, 2024, section 2.1.2, multi-head latent attention). Only the latents
are cached: R numbers per token per layer instead of 2 D.

    token's vector (D) -> latent (R) -> keys   (H heads of K)        cached: the latent
                                     -> values (H heads of K)        expanded again at every step

Each step would expand all cached latents again. But expanding a latent c to a key U c is linear, so
U can move to the query: q . (U c) = (U^T q) . c. (The query is said to *absorb* U.) The expansion
of values can move after the weighted average. Then attention runs on the latents alone, with the
same result.

Run it:     python variations/latent_attention.py        (about 25 seconds on one CPU core)
"""
from measure import (cache_bytes, count_parameters, largest_difference, new_model, prepare, expect,
                     check_cache, replace_attention, train)
import torch
from torch import nn

from decoder_only import MultiHeadAttention
from housekeeping import run_script
from training import median_milliseconds

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: three seeds and more sizes
NUM_EPOCHS = 4           # passes over the training data, for each model
SEED = 0
# =====================================================================================


# --- The part -------------------------------------------------------------------------
class LatentCache:
    """Stores the latents of all tokens so far in one layer."""

    def __init__(self, batch_size, attention, max_len):
        weight = attention.compress.weight
        self.latents = torch.empty(batch_size, max_len, attention.latent_dim, dtype=weight.dtype,
                                   device=weight.device)
        self.length = 0

    def append(self, latents):
        """Append latents (B, T, R). Returns all so far, (B, S, R)."""
        start, self.length = self.length, self.length + latents.size(1)
        self.latents[:, start:self.length] = latents
        return self.latents[:, :self.length]


class LatentAttention(MultiHeadAttention):
    """Attention whose keys and values are computed from a latent of `latent_dim` numbers.

    Differs from DeepSeek-V2: queries are not compressed, the latent is not normalized, w_q and w_o
    have biases, and queries and keys have no second, rotary part (the base adds its positions to
    the tokens). DeepSeek-V2 caches a rotary key, too, which all heads share.
    """

    def __init__(self, d_model, num_heads, latent_dim, dropout=0.0):
        super().__init__(d_model, num_heads, dropout)
        self.latent_dim, self.absorbed = latent_dim, False
        self.compress = nn.Linear(d_model, latent_dim, bias=False)
        self.w_k = nn.Linear(latent_dim, d_model, bias=False)  # expands a latent to all keys
        self.w_v = nn.Linear(latent_dim, d_model, bias=False)

    def new_cache(self, batch_size, max_len):
        return LatentCache(batch_size, self, max_len)

    def forward(self, x, memory, mask=None, cache=None):
        queries = self.split_heads(self.w_q(x))  # (B, H, T, K)
        latents = self.compress(memory)  # (B, S, R)
        if cache is not None:
            latents = cache.append(latents)
        dropout = self.dropout if self.training else 0.0
        if self.absorbed:
            result, weights = self.attend_to_latents(queries, latents[:, None], mask, dropout)
        else:
            keys = self.split_heads(self.w_k(latents))  # (B, H, S, K)
            values = self.split_heads(self.w_v(latents))
            result, weights = self.attention_function(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights

    def attend_to_latents(self, queries, latents, mask, dropout):
        """Return what `formula` returns, computed from the latents (B, 1, S, R)."""
        up_k = self.w_k.weight.view(self.num_heads, self.head_dim, -1)  # (H, K, R)
        up_v = self.w_v.weight.view(self.num_heads, self.head_dim, -1)
        # subtle: the formula divides by the root of the last size, now R. It must stay sqrt(K).
        queries = queries @ up_k * (self.latent_dim / self.head_dim) ** 0.5  # (B, H, T, R)
        averages, weights = self.attention_function(queries, latents, latents, mask,
                                                    dropout)  # (B, H, T, R)
        return averages @ up_v.transpose(1, 2), weights  # (B, H, T, K)


def use_latents(model, latent_dim):
    """Give a model of decoder_only.py latent attention, with new weights. Returns the model."""
    heads, d_model = model.arguments["num_heads"], model.arguments["d_model"]
    return replace_attention(model, lambda _, old: LatentAttention(d_model, heads, latent_dim,
                                                                   old.dropout))


def absorb(model, absorbed=True):
    """Choose between the two ways of computing the same result."""
    for layer in model.layers:
        layer.self_attention.absorbed = absorbed


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    base = new_model(0).double()
    model = use_latents(new_model(0), 64).double()
    for one, two in zip(model.layers, base.layers):
        mine, other = one.self_attention, two.self_attention
        mine.compress.weight.copy_(torch.eye(64))
        for name in ("w_q", "w_k", "w_v", "w_o"):
            getattr(mine, name).weight.copy_(getattr(other, name).weight)
        for name in ("w_q", "w_o"):
            getattr(mine, name).bias.copy_(getattr(other, name).bias)
        for name in ("w_k", "w_v"):
            getattr(other, name).bias.zero_()  # latent attention has none
    expect("a latent that is a copy of the token: equal to multi-head attention",
          largest_difference(model(tokens), base(tokens)))
    model = use_latents(new_model(0), 12).double()
    plain = model(tokens)
    absorb(model)
    expect("expansion moved into queries and output: nothing changes",
          largest_difference(model(tokens), plain))
    check_cache(model)


# --- The measurement ------------------------------------------------------------------
def show_times(tokens=800):
    """Print the time per generated token of a larger model with random weights."""
    sizes = {"d_model": 256, "num_heads": 8, "num_layers": 4, "d_ff": 1024, "max_len": tokens + 1}
    base, model = new_model(SEED, **sizes), use_latents(new_model(SEED, **sizes), 32)
    print(f"\n  ms per generated token, {tokens} tokens, D 256, 4 layers, latents of 32 (random "
          "weights)")
    for name, each, absorbed in (("multi-head (the base)", base, None),
                                 ("latents, expanded in every step", model, False),
                                 ("latents, absorbed", model, True)):
        if absorbed is not None:
            absorb(model, absorbed)
        taken = median_milliseconds(lambda each=each: each.generate([[10, 4]], tokens,
                                                                    stop_at=None), rounds=3)
        print(f"    {name:34s}{taken / tokens:6.2f}", flush=True)


def main():
    prepare(globals())
    run_checks()
    print(f"\nThe measurement: exact match on held-out sequences after {NUM_EPOCHS} epochs")
    print(f"  {'':32s}{'parameters':>12s}{'cache, bytes per token':>25s}{'exact match':>13s}")
    results, sizes = {}, (None, 32, 16, 8, 4) if FULL else (None, 16, 4)
    for seed in range(SEED, SEED + (3 if FULL else 1)):
        for latent in sizes:
            model = new_model(seed)
            name = "multi-head (the base)"
            if latent:
                model, name = use_latents(model, latent), f"latent of {latent}"
            exact = train(model, NUM_EPOCHS, seed)
            print(f"  {f'{name}, seed {seed}':32s}{count_parameters(model):12,d}"
                  f"{cache_bytes(model, 1):25,d}{exact:13.1%}", flush=True)
            results.setdefault(latent, f"{exact:.1%}, {cache_bytes(model, 1)} bytes")
    show_times()
    print("\nWhat this size cannot show: how small a latent can be in a language model. "
          "DeepSeek-V2\ncaches 512 numbers, and 64 for the rotary key.")
    return {"base": results[None], "variation": results[4]}


if __name__ == "__main__":
    run_script(main)
