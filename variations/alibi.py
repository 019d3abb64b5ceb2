"""
alibi.py - encode positions with a penalty for distance (ALiBi)

THE IDEA.  Add nothing to the tokens. Instead, subtract from each score an amount that grows with
the distance between query and key: near keys get more weight, unless a distant one matches much
better (Press et al. 2022, "Train Short, Test Long", section 3). Each head has its own slope, so
that some heads attend mostly to nearby tokens, while others look far back. Nothing is learned.

    distance                   3       2       1     0
    head 0, slope 1/4       -0.75   -0.5    -0.25    0       added to the scores q.k / sqrt(K)
    head 3, slope 1/256     -0.012  -0.008  -0.004   0

Bloom and MPT use it. Press et al. report good results on sequences longer than those in training.

Run it:     python variations/alibi.py        (about 10 seconds on one CPU core)
"""
from measure import (LONGER, Positions, largest_difference, new_model, prepare, print_row, expect,
                     check_cache, train_and_score)
import functools
import math

import torch
import torch.nn.functional as F

from housekeeping import run_script

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: three seeds instead of one
NUM_EPOCHS = 4           # passes over the training data, for each model
SEED = 0
# =====================================================================================


# --- The part -------------------------------------------------------------------------
def slopes_of(num_heads):
    """Return the slopes of n = num_heads heads, (H,): 2^(-8/n), 2^(-16/n), ..., 2^-8.

    This rule works if n is a power of two. For any other n, the authors' code takes the slopes for
    the next smaller power p, then fills in with every other slope for 2p: with 3 heads, 1/16,
    1/256, and 1/4.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return torch.tensor(slopes + between[:num_heads - power], dtype=torch.float64)


def distances(queries, keys):
    """Return (queries, keys): how far each key lies before each query; negative for later keys.

    subtle: count from the keys, not the queries. With a cache, there is one query but a key for
    every token. Left padding shifts queries and keys by the same amount, so distances stay correct.
    (An error in a query's position would cancel in the softmax anyway, which is why Bloom can add
    slope * position of the key.)
    """
    return torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)  # (T, S)


def alibi_attention(queries, keys, values, mask=None, dropout=0.0, slopes=None):
    """`attention` of decoder_only.py, with a penalty on distance. The mask must be causal."""
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.size(-1))  # (B, H, T, S)
    slopes = slopes_of(queries.size(1)) if slopes is None else slopes
    penalty = slopes[:, None, None] * distances(queries.size(2), keys.size(2))  # (H, T, S)
    scores = scores - penalty.to(scores)  # NEW; the rest is as in decoder_only.py
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return F.dropout(weights, dropout) @ values, weights


def use_alibi(model, slopes=None):
    """Give a model of decoder_only.py ALiBi instead of sinusoids. Returns the model."""
    model.positional_encoding = Positions()
    for layer in model.layers:
        layer.self_attention.attention_function = functools.partial(alibi_attention, slopes=slopes)
    return model


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    base, model = new_model(0).double(), use_alibi(new_model(0)).double()
    base.positional_encoding = Positions()
    expect("slopes of 0: equal to the base without positions",
          largest_difference(use_alibi(new_model(0), torch.zeros(4)).double()(tokens),
                             base(tokens)))
    print(f"  {'the slopes of 4 heads: the outputs change':66s} "
          f"{largest_difference(model(tokens), base(tokens)):8.1e}")
    for layer in model.layers:  # all keys equal: only the penalty is left
        layer.self_attention.w_k.weight.zero_()
        layer.self_attention.w_k.bias.zero_()
    _, weights = model.run_decoder(tokens)
    expected = torch.softmax(-slopes_of(4)[:, None] * torch.arange(7).flip(0), -1)
    expect("equal keys: the last query's weights are softmax(-slope * distance)",
          largest_difference(weights[0][0, :, -1], expected))
    check_cache(use_alibi(new_model(1)).double())


# --- The measurement ------------------------------------------------------------------
def main():
    prepare(globals())
    print("Slopes for 4 heads: " + "  ".join(f"{s:.4g}" for s in slopes_of(4).tolist()))
    print("Slopes for 3 heads: " + "  ".join(f"{s:.4g}" for s in slopes_of(3).tolist()))
    run_checks()
    print(f"\nThe measurement: exact match after {NUM_EPOCHS} epochs on rows of up to 5 digits")
    print_row("", ["held out", *(f"{n} digits" for n in LONGER)])
    results = []
    for seed in range(SEED, SEED + (3 if FULL else 1)):
        rows = {"sinusoids (the base)": train_and_score(new_model(seed), NUM_EPOCHS, seed),
                "ALiBi": train_and_score(use_alibi(new_model(seed)), NUM_EPOCHS, seed)}
        for name, cells in rows.items():
            print_row(f"{name}, seed {seed}", cells)
        results.append([f"{cells[1]:.1%}" for cells in rows.values()])
    print("\nWhat this size cannot show: ALiBi was made for language modeling, where most of what "
          "matters\nis close. Here, the longer the input, the farther a word is from its digit.")
    base, variation = results[0]  # on 6 digits, first seed
    return {"base": base, "variation": variation}


if __name__ == "__main__":
    run_script(main)
