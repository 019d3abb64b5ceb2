"""
longer_than_trained.py - trained on up to five digits, correct on forty

THE IDEA.  Most ways to encode positions fail beyond the length of the training sequences. A likely
reason is that the model has never seen the new positions or distances. So give it only distances
that it has seen. Clipped relative keys (Shaw et al. 2018, section 3.2) add to each key a learned
vector, chosen by its distance from the query. Distances of CLIP or more share one per direction:

    query minus key    ... -4  -3  -2  -1   0   1   2   3   4 ...
    vector               r0  r0  r0  r1  r2  r3  r4  r4  r4             score = q . (k + r)

A clipped distance can point only to a nearby digit, so the query that *predicts* a word must get
the position of that word's digit:

    encoder-decoder    source and target count from 0; cross-attention gets the vectors, too. <EOS>
                       ends the source, so the query that predicts <EOS> finds a token there.
    decoder-only       digits 4 0 7 <SEP> four zero seven      <SEP> predicts four, so the count
                       count  0 1 2   0     1    2    3        restarts there (Cho et al. 2024)
                       Cho et al. also draw the first position at random in training.

This builds in that word i depends on digit i and on nothing far away. Sorting needs more.

Run it:     python variations/longer_than_trained.py        (about 30 seconds on one CPU core)
"""
from measure import (Positions, largest_difference, new_model, prepare, expect, check_cache,
                     random_sequences, replace_attention, train)
import math

import torch
import torch.nn.functional as F
from torch import nn

import decoder_only
import encoder_decoder
from decoder_only import DecoderOnlyTransformer, MultiHeadAttention
from encoder_decoder import EncoderDecoderTransformer, KeyValueCache
from housekeeping import run_script
from rotary_positions import rotate
from toy_dataset import EOS, SEP, exact_match

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: every way with three seeds, about 15 minutes
NUM_EPOCHS = 6           # passes over the training data, which has up to five digits
CLIP = 2                 # distances this large or larger share one vector
SEED = 0
# =====================================================================================
LENGTHS = (6, 8, 12, 20, 40)
# --- The part -------------------------------------------------------------------------
class PositionCache(KeyValueCache):
    """Also stores the position of each key."""

    def __init__(self, batch_size, attention, max_len):
        super().__init__(batch_size, attention, max_len)
        self.positions = torch.zeros(batch_size, max_len, dtype=torch.long)

    def append(self, keys, values, positions):
        start = self.length
        keys, values = super().append(keys, values)
        self.positions[:, start:self.length] = positions
        return keys, values, self.positions[:, :self.length]


class PositionedAttention(MultiHeadAttention):
    """Attention that knows the positions of queries and keys. `way` says how it uses them."""

    def __init__(self, old, way, positions, is_cross):
        super().__init__(old.w_q.in_features, old.num_heads, old.dropout)
        self.way, self.shared, self.is_cross, self.clip = way, positions, is_cross, CLIP
        if way == "relative":
            self.table = nn.Parameter(0.5 * torch.randn(2 * self.clip + 1, self.head_dim))

    def new_cache(self, batch_size, max_len):
        return PositionCache(batch_size, self, max_len)

    def relative(self, queries, distances):
        """queries (B, H, T, K), distances (B, T, S) -> what to add to the scores"""
        per_vector = queries @ self.table.T / math.sqrt(self.head_dim)  # (B, H, T, 2 clip + 1)
        index = (distances.clamp(-self.clip, self.clip) + self.clip)[:, None]  # (B, 1, T, S)
        return per_vector.gather(-1, index.expand(*queries.shape[:3], -1))

    def forward(self, x, memory, mask=None, cache=None):
        here = self.shared.positions  # of the queries; `there`: of the keys
        there = torch.arange(memory.size(1))[None] if self.is_cross else here
        queries, keys, values = (self.split_heads(each) for each in (
            self.w_q(x), self.w_k(memory), self.w_v(memory)))
        if self.way == "rotary":
            speeds = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)  # (K/2,)
            queries = rotate(queries, here[:, None, :, None] * speeds)
            keys = rotate(keys, there[:, None, :, None] * speeds)
        if cache is not None:
            keys, values, there = cache.append(keys, values, there)
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(self.head_dim)  # (B, H, T, S)
        if self.way == "relative":
            scores = scores + self.relative(queries, here[:, :, None] - there[:, None, :])
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        result = F.dropout(weights, self.dropout, self.training) @ values
        return self.w_o(self.merge_heads(result)), weights


class LearnedPositions(nn.Embedding):
    def forward(self, x, positions):
        return x + super().forward(positions)


class RestartingDecoder(DecoderOnlyTransformer):
    """Counts the positions of the answer from <SEP>."""
    def positions_of(self, tokens):
        columns, is_sep = torch.arange(tokens.size(1)), tokens == SEP
        middle = is_sep.int().argmax(1, keepdim=True)  # (B, 1): the column of <SEP>
        return torch.where(is_sep.cumsum(1) > 0, columns - middle, super().positions_of(tokens))


class RandomStart(RestartingDecoder):
    """Restarts, too, and begins each training sequence at a random position."""
    def positions_of(self, tokens):
        start = torch.randint(0, 41, (len(tokens), 1)) if self.training else 0
        return super().positions_of(tokens) + start


def build(model_class, way, seed, **arguments):
    """Return an untrained model with another way to encode positions."""
    model = new_model(seed, model_class, max_len=128, **arguments)
    if way == "learned":
        model.positional_encoding = LearnedPositions(128, 64)
        nn.init.normal_(model.positional_encoding.weight, std=0.5)
    elif way != "sinusoids":
        positions = model.positional_encoding = Positions()
        replace_attention(model, lambda name, old: PositionedAttention(
            old, way, positions, name == "cross_attention"))
    return model


def end_source(item):  # append <EOS> to an item's digits
    return {**item, "digits": item["digits"] + ["<EOS>"], "source": item["source"] + [EOS]}


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    base, model = new_model(0).double(), build(DecoderOnlyTransformer, "relative", 0).double()
    base.positional_encoding.table.zero_()
    model.load_state_dict(base.state_dict(), strict=False)  # the base has no table of vectors
    here, moved = (model.run_decoder(tokens, positions=torch.arange(7)[None] + n)[0]
                   for n in (0, 50))
    expect("all positions moved by 50: nothing changes", largest_difference(here, moved))
    for layer in model.layers:
        layer.self_attention.table.zero_()
    expect("vectors of 0: equal to the base without positions",
          largest_difference(model(tokens), base(tokens)))
    check_cache(build(RestartingDecoder, "relative", 1).double())


# --- The measurement ------------------------------------------------------------------
def by_lengths(model, script, ended):
    """Return the exact match on 100 random sequences of each of LENGTHS."""
    scores = []
    for length in LENGTHS:
        digits, words = random_sequences(length)
        digits = [row + ["<EOS>"] if ended else row for row in digits]
        scores.append(exact_match(script.translate(model, digits), words))
    return scores


def main():
    prepare(globals())
    run_checks()
    kinds = {"encoder-decoder": EncoderDecoderTransformer, "decoder-only": DecoderOnlyTransformer,
             "decoder-only, restart": RestartingDecoder, "decoder-only, random start": RandomStart}
    rows = [("encoder-decoder", "sinusoids", False), ("encoder-decoder", "relative", True),
            ("decoder-only", "sinusoids", False), ("decoder-only, restart", "relative", False)]
    if FULL:
        rows = [(kind, way, ended) for kind in kinds
                for ended in ((False, True) if kind == "encoder-decoder" else (False,))
                for way in ("sinusoids", "learned", "none", "rotary", "relative")]
    print("\nThe measurement: exact match, held out and on 100 random sequences of each length")
    print(f"  {'':50s}{'held out':>9s}" + "".join(f"{f'{n} digits':>12s}" for n in LENGTHS))
    results = {}
    for kind, way, ended in rows:
        script = encoder_decoder if kind == "encoder-decoder" else decoder_only
        name = f"{kind}, {way}" + (", <EOS>" if ended else "")
        for seed in range(SEED, SEED + (3 if FULL else 1)):
            model = build(kinds[kind], way, seed)
            exact = train(model, NUM_EPOCHS, seed, script, end_source if ended else None)
            scores = by_lengths(model, script, ended)
            results.setdefault(name, f"{scores[-1]:.0%} at {LENGTHS[-1]} digits")
            print(f"  {f'{name}, seed {seed}':50s}{exact:9.1%}"
                  + "".join(f"{score:12.1%}" for score in scores), flush=True)
    print("\nWhat this size cannot show: whether it works for language. It builds in this task.")
    return {"base": results["decoder-only, sinusoids"],
            "variation": results["decoder-only, restart, relative"]}


if __name__ == "__main__":
    run_script(main)
