"""
encoder_decoder.py - the T5 family: read it all, then write, looking back while writing

THE IDEA.  Two stacks. The encoder reads the whole source in both directions, like BERT. The decoder writes the target
from left to right, like GPT, and in every layer it also looks at what the encoder has made of the source: that is
cross-attention, and it is the one new idea here (Vaswani et al. 2017, "Attention Is All You Need"; Raffel et al. 2020,
"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", T5).

      4   0   7                       <SOS>  four  zero  seven        decoder input
      |   |   |                         |     |     |     |
    [ EncoderLayer ] x 2              [ DecoderLayer             ] x 2
    [ all look at  ]                  [ 1 looks at what it wrote ]    causal self-attention
    [ all          ] --- memory --->  [ 2 looks at the source    ]    cross-attention: queries from
      |   |   |       (last layer's   [ 3 feed-forward           ]    here, keys and values from there
                       output, for      |     |     |     |
                       every layer)    four  zero seven <EOS>         says

It learns here:  to read `4 0 7` and write `four zero seven <EOS>`. Source and target have their own positions, so word
2 looks for digit 2: no counting across a <SEP>. It has twice the weights of the other two, for two stacks.

Also here:  beam search, step by step as a table, and the cross-attention that lines words up with digits.

Run it:     python encoder_decoder.py        (about 13 seconds on one CPU core)

The last lines should be close to:

    Result on 599 unseen sequences
      next word, given the right ones before it (teacher forcing)   accuracy    100.0%
      digits to words, written freely until <EOS>, greedy           exact match 100.0%
      the same with beam search, width 3                            exact match 100.0%
    saved checkpoints/encoder_decoder.pt

READING ORDER   positions -> attention -> feed-forward -> encoder layer -> causal mask and cache -> decoder layer (what
                is new) -> choosing a token -> model, `generate`, `beam_search` -> training -> main
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_dataset import (CHECKPOINTS, EOS, IGNORE_INDEX, PAD, SOS, VOCABULARY, InputError, check_constants, check_loss,
                         check_tokens, choose_device, create_dataloaders, load_checkpoint, pad_rows, padding_mask,
                         print_examples, report_saved, run_script, save_checkpoint, to_device)

# =====================================================================================
# LEGEND   B  batch                                D  d_model: width of a token's vector
#          S  source length, or in general         H  heads
#             positions that can be looked at      K  D / H: width of one head
#          T  target length, or in general         V  vocabulary size (26)
#             positions that ask                   W  beam width
# =====================================================================================

# =====================================================================================
# CONSTANTS - change one, run again. What a "Try" gives is the exact match at the end, measured with SEED 0 and 1.
# =====================================================================================
# The model
D_MODEL = 64             # width of a token's vector. Try 16: 0.2 % with one seed, 100 % with the other.
NUM_HEADS = 4            # must divide D_MODEL. Try 1: 99.8 to 100 %.
NUM_LAYERS = 2           # in the encoder, and as many in the decoder. Try 1: 100 %; cross-attention needs no more.
D_FF = 256               # inner width of the feed-forward; 4 * D_MODEL since 2017. Try 64: 99.8 to 100 %.
DROPOUT = 0.0            # share of activations set to 0 in training. Try 0.1: 99.8 %; 0.3: 99 %.
# The task
NUM_SAMPLES = 6000       # distinct sequences, training and validation together. Try 1000: 99 to 100 %; 300: 0 to 3 %.
MAX_DIGITS = 5           # longest sequence. Try 8: 99.8 %.
# The training
BATCH_SIZE = 64          # rows per step. Try 256: a quarter of the steps, 99.7 to 99.8 %.
LEARNING_RATE = 3e-3     # at its peak. Try 1e-4, usual for far larger models: 99.8 %, later. Try 3e-2: 0 to 1 %.
WARMUP_STEPS = 40        # steps in which the rate climbs to its peak. Try 0: 100 %; pre-norm does not need it here.
CLIP_NORM = 1.0          # longest gradient that a step may follow. Try 100.0, no clipping: 100 %.
NUM_EPOCHS = 6           # passes over the training data, 85 steps each. Try 2: 99.8 to 100 %; 1: 99.8 %.
# Writing
BEAM_WIDTH = 3           # hypotheses that beam search follows side by side. Try 1: greedy.
LENGTH_PENALTY = 1.0     # 0.0 compares plain log-probabilities, which favours short answers.
# The run
SEED = 0                 # weights and data. Try 1: every claim should survive it.
DEVICE = "cpu"           # or "cuda", "mps"; the figures in this file were all measured on a CPU.
NUM_THREADS = 1          # CPU threads. Two are faster on an idle machine, and much slower on a busy one.
# =====================================================================================


# -------------------------------------------------------------------------------------
# 1. Building blocks, in the order in which the data meets them
# -------------------------------------------------------------------------------------
class PositionalEncoding(nn.Module):
    """Adds to each token's vector a fixed pattern that says where in the sequence it stands.

    Without it a transformer reads a bag of tokens: attention compares vectors, and nothing in a vector says "I am
    third". Each pair of dimensions is a clock hand that turns with the position, the first pair fast, the last slowly:

        PE[pos, 2i]   = sin(pos / 10000^(2i/D))
        PE[pos, 2i+1] = cos(pos / 10000^(2i/D))

    Source: Vaswani et al. 2017, section 3.5. For a fixed distance k, PE[pos+k] is the same rotation of PE[pos]
    wherever pos is, so "one to the left" is something that a single matrix can learn.
    """

    def __init__(self, d_model, max_len):
        super().__init__()
        if d_model % 2:
            raise InputError(f"d_model={d_model} must be even: positions come as pairs of sine and cosine")
        position = torch.arange(max_len).unsqueeze(1)                                    # (max_len, 1)
        # 10000^(-2i/D), through the logarithm: one multiplication and one exp instead of a power.
        frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))  # (D/2,)
        table = torch.zeros(max_len, d_model)                                            # (max_len, D)
        table[:, 0::2] = torch.sin(position * frequency)                                 # (max_len, D/2)
        table[:, 1::2] = torch.cos(position * frequency)                                 # (max_len, D/2)
        # A buffer moves with the model to a GPU but is not trained; not persistent: a checkpoint need not hold what a
        # formula gives.
        self.register_buffer("table", table, persistent=False)

    def forward(self, x, positions=None):
        """x (B, T, D); positions (T,) or (B, T), by default 0 .. T-1. Returns (B, T, D).

        Positions are given where the first column is not position 0: after a cache, or behind padding on the left.
        """
        if positions is None:
            return x + self.table[:x.size(1)]                                            # (B, T, D)
        return x + self.table[positions]                                                 # (B, T, D)


class MultiHeadAttention(nn.Module):
    """Every position asks the positions it may see, itself included, and takes home a mixture of their answers.

        attention(q, k, v) = softmax(q k^T / sqrt(K)) v        Vaswani et al. 2017, section 3.2; K = D / H

    A query q says what a position looks for, a key k what a position has to offer, a value v what it hands over. The
    scores q k^T compare each query with each key; softmax turns a row of scores into weights that sum to 1. All three
    are learned projections of the same vectors: what a token asks need not be what it answers.

    Several heads do this side by side, each in its own slice of K = D / H dimensions: one softmax can point at one
    place well, four can point at four. They cost no more than one head of full width.

    Worked example, one head, one query, three keys: scores [2.0, 0.0, 2.0] -> weights [0.47, 0.06, 0.47]: the mean
    of values 1 and 3, with a little of value 2. With key 3 masked: [2.0, 0.0, -inf] -> [0.88, 0.12, 0.00], exactly 0.
    """

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise InputError(f"num_heads={num_heads} does not divide d_model={d_model}: use a divisor, such as 1 or 2")
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.dropout = dropout
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_o = nn.Linear(d_model, d_model)

    def split_heads(self, x):
        """(B, S, D) -> (B, H, S, K): the D dimensions of each token are cut into H slices of K."""
        # subtle: view to (B, S, H, K) first, then swap. view(B, H, S, K) has the right shape too and runs, but it
        # mixes the dimensions of one token with those of the next.
        heads = x.view(x.size(0), x.size(1), self.num_heads, self.head_dim)              # (B, S, H, K)
        return heads.transpose(1, 2)                                                     # (B, H, S, K)

    def keys_values(self, x):
        """x (B, S, D), the positions that can be looked at -> their keys and values, each (B, H, S, K).

        Apart from `forward`, so that generation can compute them once and keep them.
        """
        return self.split_heads(self.w_k(x)), self.split_heads(self.w_v(x))              # 2 x (B, H, S, K)

    def forward(self, x, keys, values, mask=None, need_weights=False):
        """x (B, T, D) asks; keys and values (B, H, S, K) answer; mask broadcasts to (B, H, T, S), True = may attend.

        Returns (B, T, D) and the weights (B, H, T, S), taken before dropout, or None in place of them.
        A row of the mask that allows nothing gathers zeros, of which w_o makes its bias; never NaN.
        """
        queries = self.split_heads(self.w_q(x))                                          # (B, H, T, K)
        if need_weights:
            # Why divide: q.k is a sum of K products. If q and k have independent entries of variance 1, the sum has
            # variance K; softmax of scores that large is nearly one-hot, and its gradient nearly zero.
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(self.head_dim)         # (B, H, T, S)
            if mask is not None:
                # exp(-inf) is exactly 0. A large negative number instead, such as -1e9, comes to 0 too in a row that has
                # something to attend to, but to a uniform mixture of forbidden places in a row that has not.
                scores = scores.masked_fill(~mask, -math.inf)                            # (B, H, T, S)
            weights = torch.softmax(scores, dim=-1)                                      # (B, H, T, S)
            if mask is not None:
                # A row of nothing but -inf is 0/0 = NaN in softmax, and one NaN soon is everywhere.
                weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)          # (B, H, T, S)
            context = F.dropout(weights, self.dropout, self.training) @ values           # (B, H, T, K)
        else:
            # The same formula in one fused kernel that never stores the (T, S) weights: lighter, and the faster the
            # longer the sequence (Dao et al. 2022, FlashAttention). It divides by sqrt(K) itself, and since PyTorch 2.5
            # gives zeros for empty rows.
            weights = None
            context = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask,
                                                     dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, K)
        # Back from heads to one vector a token, in the order in which split_heads cut it.
        context = context.transpose(1, 2).reshape(x.shape)                               # (B, T, D)
        return self.w_o(context), weights                                                # (B, T, D)


class FeedForward(nn.Module):
    """What each position does with what it has gathered: widen, bend, narrow. The same for all, none sees another.

        feed_forward(x) = narrow(GELU(widen(x)))               Vaswani et al. 2017, section 3.3

    Without the bend in between, two matrices in a row are one matrix. GELU (Hendrycks and Gimpel 2016) as in BERT and
    GPT-2, where the 2017 paper and T5 have ReLU. Two thirds of a layer's weights sit here: 8 D^2 of 12 D^2.
    """

    def __init__(self, d_model, d_ff, dropout=0.0):
        super().__init__()
        self.widen = nn.Linear(d_model, d_ff)
        self.narrow = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)"""
        return self.narrow(self.dropout(F.gelu(self.widen(x))))                          # (B, T, D)


class EncoderLayer(nn.Module):
    """Attention gathers, feed-forward digests; each *adds* to what comes in, and each reads it through a layer norm.

        x = x + attention(norm(x))
        x = x + feed_forward(norm(x))

    The residual `x +` leaves a straight road from the loss to every layer: the gradient of x + f(x) always holds a 1.
    The norm gives each vector mean 0 and variance 1, so that scores and activations stay where softmax and GELU work.

    Departs from Vaswani et al. 2017, who norm after adding (post-norm). Norm before (pre-norm) keeps the road clear of
    norms and trains without careful warm-up (Xiong et al. 2020); GPT-2 and T5 do so, BERT still normed after.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, need_weights=False):
        """x (B, S, D), mask broadcastable to (B, H, S, S) -> (B, S, D) and the attention weights or None."""
        normed = self.norm1(x)                                                           # (B, S, D)
        # *Self*-attention: queries, keys and values all come from the same positions.
        attended, weights = self.attention(normed, *self.attention.keys_values(normed), mask, need_weights)
        # subtle: add to x, not to `normed`. With that mistake the straight road is normed away at every layer; two layers
        # still learn this task, so no curve gives it away. A test against PyTorch's own layer does.
        x = x + self.dropout(attended)                                                   # (B, S, D)
        x = x + self.dropout(self.feed_forward(self.norm2(x)))                           # (B, S, D)
        return x, weights


def causal_mask(queries, keys, device=None):
    """(1, 1, queries, keys) booleans, True = may attend: each query sees the keys up to its own position.

    The last query stands at the last key. With a cache there are more keys than queries: 1 query against 5 keys may
    see all 5. For 3 and 3:
        #..
        ##.
        ###
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


class KeyValueCache:
    """The keys and values of every token so far, for one attention layer, so that none is computed twice.

    Causal attention makes this exact and not an approximation: a token's key and value depend on it and on earlier
    tokens, so later ones cannot change them. To write token n, one row goes through the layers where n did; only its
    attention still looks at n keys. The price is memory: 2 * layers * D numbers for every token of every row. Here that
    is 2 * 2 * 64 * 4 bytes = 1 KiB a token; for a model of 32 layers and D = 4096 in 16 bits (LLaMA 7B) it is 512 KiB,
    a gibibyte for 2048 tokens.

    That memory is taken at once. Growing it token by token with torch.cat copies everything at every step.
    """

    def __init__(self, batch_size, attention, max_len):
        weight = attention.w_k.weight  # the cache lives on the weights' device, in their precision
        shape = (batch_size, attention.num_heads, max_len, attention.head_dim)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)         # (B, H, max_len, K)
        self.values = torch.empty_like(self.keys)                                        # (B, H, max_len, K)
        self.length = 0

    def append(self, keys, values):
        """Store (B, H, T, K) behind what is there; return all so far, 2 x (B, H, length, K)."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length:end] = keys
        self.values[:, :, self.length:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]                            # 2 x (B, H, length, K)


class DecoderLayer(nn.Module):
    """The encoder's layer with two changes: self-attention is causal, and between it and the feed-forward the layer
    asks the source.

        x = x + causal_attention(norm(x))
        x = x + cross_attention(norm(x), memory)      <- not in decoder_only.py
        x = x + feed_forward(norm(x))

    Source: Vaswani et al. 2017, section 3.1, with the norm before (as in T5) and not after.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout)
        # --- NEW HERE: cross-attention ---
        self.norm_cross = nn.LayerNorm(d_model)
        self.cross_attention = MultiHeadAttention(d_model, num_heads, dropout)
        # --- end of what is new ---
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, memory_keys, memory_values, mask=None, memory_mask=None, cache=None, need_weights=False):
        """x (B, T, D) -> (B, T, D) and the cross-attention weights (B, H, T, S), or None in their place.

        mask broadcasts to (B, H, T, all target positions so far), memory_mask to (B, H, T, S): it hides source padding.

        memory_keys and memory_values (B, H, S, K) are `cross_attention.keys_values(memory)`: they depend on the source
        alone, so they are computed once for a whole translation and handed in. With a cache, x holds only the new tokens.
        """
        normed = self.norm1(x)                                                           # (B, T, D)
        keys, values = self.self_attention.keys_values(normed)                           # 2 x (B, H, T, K)
        if cache is not None:
            keys, values = cache.append(keys, values)                                    # 2 x (B, H, all so far, K)
        attended, _ = self.self_attention(normed, keys, values, mask)
        x = x + self.dropout(attended)                                                   # (B, T, D)
        # --- NEW HERE: cross-attention ---
        # Queries from the target, keys and values from the source: the same class, other company. The norm is for the
        # queries only; the memory was normed when it left the encoder.
        # subtle: no causal mask. The source is known from the start; only the target has a future.
        attended, weights = self.cross_attention(self.norm_cross(x), memory_keys, memory_values, memory_mask,
                                                 need_weights)
        x = x + self.dropout(attended)                                                   # (B, T, D)
        # --- end of what is new ---
        x = x + self.dropout(self.feed_forward(self.norm2(x)))                           # (B, T, D)
        return x, weights


# -------------------------------------------------------------------------------------
# 2. Choosing a token
# -------------------------------------------------------------------------------------
def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    """(B, V) logits -> (B, V) logits in which everything that must not be drawn is -inf.

    temperature  divides the logits: below 1 sharpens the distribution, above 1 flattens it
    top_k        keeps the k most likely tokens (Fan et al. 2018, section 5)
    top_p        keeps the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020, "nucleus",
                 section 3.1). The set grows where the model is unsure and shrinks where it is sure; top_k cannot

    Worked example, probabilities 0.5 0.3 0.15 0.05:  top_k=2 keeps 0.5 0.3;  top_p=0.7 keeps 0.5 0.3 (0.5 alone falls
    short, 0.8 reaches it: the token that crosses p stays);  top_p=0.5 keeps 0.5.
    """
    # Softmax ignores a shift, so put the largest at 0: then a tiny temperature gives -inf, never inf - inf = NaN.
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature                # (B, V)
    if top_k is not None:
        # By index and not by `logits < kth largest`: that keeps more than k tokens where two are level.
        best = logits.topk(min(top_k, logits.size(-1))).indices                          # (B, k)
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)        # (B, V)
        logits = logits.masked_fill(~keep, -math.inf)                                    # (B, V)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)                                # 2 x (B, V)
        probabilities = torch.softmax(ordered, -1)                                       # (B, V)
        # A token stays if those *before* it have not reached p. The first always does: nothing is before it.
        before = probabilities.cumsum(-1) - probabilities                                # (B, V)
        keep = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < top_p)  # (B, V)
        logits = logits.masked_fill(~keep, -math.inf)                                    # (B, V)
    return logits


def choose_next_token(logits, written, temperature=0.0, top_k=None, top_p=None, repetition_penalty=1.0, generator=None):
    """(B, V) logits of the next token and (B, n) ids written so far -> (B,) the next ids.

    temperature 0 takes the most likely token (greedy). It is a separate case: logits / 0 is no distribution.
    repetition_penalty above 1 makes what was already written less likely (Keskar et al. 2019, CTRL, section 4.1).
    """
    if repetition_penalty != 1.0 and written.size(1) > 0:
        scores = logits.gather(1, written)                                               # (B, n)
        # Divide what is positive, multiply what is negative: both make it smaller. The paper always divides; that would
        # raise a negative logit, and reward repetition.
        scores = torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)  # (B, n)
        logits = logits.scatter(1, written, scores)                                      # (B, V)
    if temperature == 0:
        return logits.argmax(-1)                                                         # (B,)
    probabilities = torch.softmax(filter_logits(logits, temperature, top_k, top_p), -1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)           # (B,)


def check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty):
    """Raises InputError for settings that cannot work. A top_k larger than the vocabulary can: it means all of it."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} writes nothing: use 1 or more")
    if not (temperature == 0 or 1e-6 <= temperature < math.inf):  # below that it is greedy in all but name
        raise InputError(f"temperature={temperature} cannot work: use 0 for greedy, or a value such as 0.7")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k} keeps no token: use 1 or more, or None to keep all")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} is no probability to reach: use more than 0 and at most 1, or None")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise InputError("top_k and top_p change nothing at temperature=0, which is greedy: use a temperature such as 1.0")
    if not 0.01 <= repetition_penalty <= 100:
        raise InputError(f"repetition_penalty={repetition_penalty} cannot work: use 1 for none, or a value such as 1.2")


# -------------------------------------------------------------------------------------
# 3. The model
# -------------------------------------------------------------------------------------
class Hypothesis(NamedTuple):
    """One answer of beam search: tokens without <SOS>, with <EOS> if it wrote one; score and log-probability (nats)."""
    score: float
    log_probability: float
    tokens: list


class EncoderDecoderTransformer(nn.Module):
    """Two stacks with one vocabulary, and at every target position a guess at the next token.

    Departs from Raffel et al. 2020 (T5): sinusoidal positions added once, for learned relative ones inside attention; a
    layer norm with mean and bias, and linear layers with bias, for none of these; scores divided by sqrt(K), which T5
    leaves to its initial weights; GELU for ReLU; <SOS> to start with for <PAD>; no <EOS> on the source. From Vaswani et
    al. 2017: pre-norm, with a last norm on each stack.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256, dropout=0.0,
                 max_len=64):
        super().__init__()
        self.arguments = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads,
                          "num_layers": num_layers, "d_ff": d_ff, "dropout": dropout, "max_len": max_len}
        self.vocab_size, self.max_len = vocab_size, max_len
        self.embedding_scale = math.sqrt(d_model)
        # One table for source, target and output: digits and words share the vocabulary (Vaswani et al. 2017, 3.4).
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.encoder_layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(d_model)
        self.decoder_layers = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        # A pre-norm stack adds and adds and never norms its sum; without this last norm the logits grow with depth.
        self.final_norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size, bias=False)
        self.output.weight = self.embedding.weight
        # Small, so that the first guesses are near uniform and the first loss near ln V = 3.26.
        nn.init.normal_(self.embedding.weight, std=0.02)

    def embed(self, tokens, positions=None):
        """tokens (B, T) -> (B, T, D), positions added."""
        # sqrt(D) as in Vaswani et al. 2017, section 3.4. Embeddings start at a size of 0.02, positions have 0.7: unscaled,
        # a token drowns in where it stands. Try removing the factor: 6 epochs then end at 0.2 % exact match.
        return self.dropout(self.positional_encoding(self.embedding(tokens) * self.embedding_scale, positions))

    def encode(self, source, source_mask=None):
        """source (B, S) -> memory (B, S, D): what the decoder will look at. source_mask None hides just <PAD>.

        Raises InputError for ids outside the vocabulary, rows too long, and rows of nothing but padding.
        """
        check_tokens(source, self.vocab_size, self.max_len)
        if source_mask is None:
            source_mask = padding_mask(source)                                           # (B, 1, 1, S)
        x = self.embed(source)                                                           # (B, S, D)
        for layer in self.encoder_layers:
            x, _ = layer(x, source_mask)                                                 # (B, S, D)
        return self.encoder_norm(x)                                                      # (B, S, D)

    def memory_keys_values(self, memory):
        """memory (B, S, D) -> for each decoder layer, the keys and values (B, H, S, K) of its cross-attention.

        Every layer reads the encoder's *last* output. Layer 1 does not read encoder layer 1; many drawings get it wrong.
        """
        return [layer.cross_attention.keys_values(memory) for layer in self.decoder_layers]

    def decode(self, decoder_input, memory_kv, source_mask, decoder_mask=None, caches=None, need_weights=False):
        """decoder_input (B, T) -> (B, T, D), and a list with each layer's cross-attention weights (B, H, T, S) or None.

        memory_kv     from `memory_keys_values`
        source_mask   (B, 1, 1, S): masks the source in training and in writing alike. Forget it in one of the two, and
                      the model meets in use what it never saw in training: padding
        decoder_mask  (B, 1, 1, T) or None
        caches        one KeyValueCache a layer; decoder_input then holds only the tokens that are not in it yet
        """
        past = caches[0].length if caches else 0
        new = decoder_input.size(1)
        # A single token may see all that came before: with nothing to hide, no mask, and the kernel is faster.
        mask = causal_mask(new, past + new, decoder_input.device) if new > 1 else None   # (1, 1, T, past+T)
        if decoder_mask is not None:
            mask = decoder_mask if mask is None else mask & decoder_mask                 # (B, 1, T, past+T)
        # subtle: the first new token stands at position `past`, not at 0. With the cache and positions that start over,
        # every token would believe it is the first.
        x = self.embed(decoder_input, torch.arange(past, past + new, device=decoder_input.device))  # (B, T, D)
        all_weights = []
        for number, layer in enumerate(self.decoder_layers):
            x, weights = layer(x, *memory_kv[number], mask, source_mask, caches[number] if caches else None,
                               need_weights)                                             # (B, T, D), (B, H, T, S)
            all_weights.append(weights)
        return self.final_norm(x), all_weights if need_weights else None

    def forward(self, source, decoder_input, source_mask=None, decoder_mask=None):
        """source (B, S), decoder_input (B, T) -> logits (B, T, V); those at position t are a guess at token t + 1.

        Teacher forcing: decoder_input is the right answer moved by one, whatever the model would have written itself.
        All positions train in one pass. The price is "exposure bias" (Ranzato et al. 2016): the model never practises on
        its own mistakes, so what it writes after a first wrong word is less sure than teacher forcing makes it look. (Not
        on this task, where each word depends on its digit alone.) Accuracy flatters in another way as well: it counts
        tokens, and one wrong token in six spoils the row. So the figure to trust is exact match, written freely.
        """
        memory = self.encode(source, source_mask)                                        # (B, S, D)
        if source_mask is None:
            source_mask = padding_mask(source)                                           # (B, 1, 1, S)
        check_tokens(decoder_input, self.vocab_size, self.max_len)
        hidden, _ = self.decode(decoder_input, self.memory_keys_values(memory), source_mask, decoder_mask)
        return self.output(hidden)                                                       # (B, T, V)

    def start_writing(self, sources, max_new_tokens):
        """Lists of ids -> what `generate` and `beam_search` start from: memory_kv and source_mask (B, 1, 1, S).

        Checks first, then puts the model into evaluation mode: a refused call leaves it as it was.
        """
        if not sources or not all(sources):
            raise InputError("there is nothing to read: give at least one source, with at least one token in each")
        if max_new_tokens > self.max_len:
            raise InputError(f"max_new_tokens={max_new_tokens} needs as many positions, the model was built for "
                             f"max_len={self.max_len}: write less, or build it larger")
        source = pad_rows(sources, PAD)                                                  # (B, S)
        check_tokens(source, self.vocab_size, self.max_len)
        self.eval()
        source = source.to(self.embedding.weight.device)
        source_mask = padding_mask(source)                                               # (B, 1, 1, S)
        # Once for the whole translation: the source does not change while the target grows.
        return self.memory_keys_values(self.encode(source, source_mask)), source_mask

    @torch.inference_mode()
    def generate(self, sources, max_new_tokens, temperature=0.0, top_k=None, top_p=None, repetition_penalty=1.0,
                 use_cache=True, stop_at=EOS, generator=None):
        """Read each of `sources`, lists of ids that may differ in length; write at most `max_new_tokens` for each.

        The choice of each token is `choose_next_token`'s; temperature 0, the default, is greedy. Returns lists of ids
        without <SOS>, with <EOS> where a row wrote it; stop_at=None never stops early. The cache changes nothing but the
        time, and greedy rows do not depend on each other. (Sampled ones share the generator's dice.)

        Sources are padded on the right, and masked; all targets start with <SOS> in the same column, so nothing needs
        padding on the left, as it does in decoder_only.py.

        Raises InputError for an empty batch or source, settings that cannot work, and rows too long for the model.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        was_training = self.training
        memory_kv, source_mask = self.start_writing(sources, max_new_tokens)
        device = source_mask.device
        tokens = torch.full((len(sources), max_new_tokens + 1), PAD, device=device)      # (B, max + 1)
        tokens[:, 0] = SOS
        caches = None
        if use_cache:
            caches = [KeyValueCache(len(sources), layer.self_attention, max_new_tokens) for layer in self.decoder_layers]
        finished = torch.zeros(len(sources), dtype=torch.bool, device=device)            # (B,)
        for end in range(1, max_new_tokens + 1):
            start = end - 1 if use_cache else 0
            hidden, _ = self.decode(tokens[:, start:end], memory_kv, source_mask, caches=caches)  # (B, end-start, D)
            # Only the last position says something new; the guesses before it are for tokens that stand already.
            chosen = choose_next_token(self.output(hidden[:, -1]), tokens[:, 1:end], temperature, top_k, top_p,
                                       repetition_penalty, generator)                    # (B,)
            # A row that has stopped writes on while it waits for the others; what follows its <EOS> is cut off below.
            tokens[:, end] = chosen
            if stop_at is not None:
                finished |= chosen == stop_at                                            # (B,)
                if finished.all():
                    break
        self.train(was_training)
        written = []
        for row in tokens[:, 1:end + 1].tolist():
            written.append(row[:row.index(stop_at) + 1] if stop_at in row else row)
        return written

    # --- NEW HERE: beam search -------------------------------------------------------
    @torch.inference_mode()
    def beam_search(self, sources, beam_width=4, length_penalty=1.0, max_new_tokens=32, trace=None):
        """For each of `sources` (lists of ids) a list of at most `beam_width` Hypothesis, best first.

        Greedy takes the best *next* token and cannot take it back. Beam search follows the `beam_width` best beginnings
        side by side, and so finds answers whose first token was not the likeliest.

            score = log-probability / length ** length_penalty

        length counts the tokens written, <EOS> included, <SOS> not: those that the log-probability is a sum over. With
        penalty 0 short answers win, since every further token can only lower the sum; 1 compares means per token.
        (Wu et al. 2016, section 7, divide by ((5 + length) / 6) ** penalty: gentler on short answers.)

        Two steps with width 2 and three tokens, a, b and <EOS>; sums of log-probabilities:

            step 1    a -0.5   b -1.2   <EOS> -2.3                              keep a and b
            step 2    a a -2.1   a b -1.0   a <EOS> -2.1      (from a)          one list of 2 * 3, best first:
                      b a -1.6   b b -3.5   b <EOS> -2.8      (from b)          keep a b and b a

        In the order written above `b a` is number 3, counted from 0: beam 3 // 3 = 1, which is b; token 3 % 3 = 0, which
        is a. Greedy would have dropped b for good in step 1.

        A hypothesis that writes <EOS> is set aside, and one fewer lives on; the next step fills the beam again, as far as
        there are continuations. With width 1 none lives on, which makes it exactly greedy; with a beam as wide as the
        tree nothing is ever dropped, which makes it exhaustive search. (Hugging Face looks at the best 2W of the list
        and so keeps W alive at once.) What is alive when `max_new_tokens` is reached is scored as it stands.

        A row is done when no live beam can still win. A sum never rises again, so the best a live beam can hope for is
        to keep its sum and divide it by the greatest length. With penalty 0, `a b <EOS>` at -1.1 ends the example above:
        `b a`, at -1.6 already, cannot overtake it. So stopping never loses the best answer that this width would find;
        the answers behind it are only the best of those that had finished by then.

        trace: a list that receives, step by step, what happened to the first source. For the demonstration.

        Raises InputError for an empty batch or source, a width below 1, a penalty outside 0 to 10, and rows too long.
        """
        check_sampling(max_new_tokens, 0.0, None, None, 1.0)
        if beam_width < 1:
            raise InputError(f"beam_width={beam_width} follows nothing: use 1 (greedy) or more")
        if not 0 <= length_penalty <= 10:
            raise InputError(f"length_penalty={length_penalty} cannot work: use 0 (none) to 10, such as 0.6 or 1")
        was_training = self.training
        batch, width = len(sources), beam_width
        memory_kv, source_mask = self.start_writing(sources, max_new_tokens)
        device = source_mask.device
        # The beams of a source are neighbouring rows: source b has rows b*W to b*W + W-1. All read the same memory.
        memory_kv = [(keys.repeat_interleave(width, 0), values.repeat_interleave(width, 0))
                     for keys, values in memory_kv]                                      # 2 x (B*W, H, S, K) a layer
        source_mask = source_mask.repeat_interleave(width, 0)                            # (B*W, 1, 1, S)
        caches = [KeyValueCache(batch * width, layer.self_attention, max_new_tokens) for layer in self.decoder_layers]
        tokens = torch.full((batch * width, max_new_tokens + 1), PAD, device=device)     # (B*W, max + 1)
        tokens[:, 0] = SOS
        # `live` holds the sum of each live beam; -inf says that its place is empty. All beams start as the same <SOS>, so
        # only the first counts: or the best W continuations would be W times the same one.
        live = torch.full((batch, width), -math.inf, device=device)                      # (B, W)
        live[:, 0] = 0.0
        first_row = torch.arange(0, batch * width, width, device=device)[:, None]        # (B, 1)
        finished = [[] for _ in range(batch)]

        for length in range(1, max_new_tokens + 1):
            hidden, _ = self.decode(tokens[:, length - 1:length], memory_kv, source_mask, caches=caches)  # (B*W, 1, D)
            log_probabilities = torch.log_softmax(self.output(hidden[:, -1]), -1).view(batch, width, -1)  # (B, W, V)
            # All continuations of all beams compete in one list.
            totals = (live[:, :, None] + log_probabilities).flatten(1)                   # (B, W*V)
            kept, index = totals.topk(width)                                             # 2 x (B, W), best first
            parent = index // self.vocab_size                                            # (B, W)
            chosen = index % self.vocab_size                                             # (B, W)
            # Each new beam takes over its parent's tokens, and its keys and values: that copy is the price of beams.
            # memory_kv needs none, for parent and child read the same source.
            rows = (first_row + parent).flatten()                                        # (B*W,)
            tokens = tokens[rows]                                                        # (B*W, max + 1)
            tokens[:, length] = chosen.flatten()
            for cache in caches:
                cache.keys[:, :, :length] = cache.keys[rows, :, :length]
                cache.values[:, :, :length] = cache.values[rows, :, :length]
            if trace is not None:  # the first source's beams are the first W rows
                trace.append([(tokens[place, 1:length].tolist(), chosen[0, place].item(), kept[0, place].item())
                              for place in range(width) if kept[0, place] > -math.inf])
            # Set aside what has just ended. At the limit, everything ends.
            ends = (chosen == EOS) if length < max_new_tokens else torch.ones_like(chosen, dtype=torch.bool)
            ends = ends & (kept > -math.inf)                                             # (B, W)
            for b, place in ends.nonzero().tolist():
                total = kept[b, place].item()
                finished[b].append(Hypothesis(total / length ** length_penalty, total,
                                              tokens[b * width + place, 1:length + 1].tolist()))
            live = kept.masked_fill(ends, -math.inf)                                     # (B, W)
            # Who can still win? A row without an answer has -inf to beat, which every live beam does.
            to_beat = torch.tensor([[max((h.score for h in done), default=-math.inf)] for done in finished],
                                   device=device)                                        # (B, 1)
            hope = live / max_new_tokens ** length_penalty                               # (B, W)
            live = live.masked_fill((hope <= to_beat).all(1, keepdim=True), -math.inf)   # (B, W)
            if (live == -math.inf).all():
                break
        self.train(was_training)
        return [sorted(done, key=lambda hypothesis: hypothesis.score, reverse=True)[:width] for done in finished]
    # --- end of what is new ----------------------------------------------------------

    def save(self, path):
        """Write arguments and weights to `path`, all or nothing. Raises OSError."""
        save_checkpoint(path, self)

    @classmethod
    def load(cls, path, device="cpu"):
        """The model that was saved at `path`. Raises InputError if there is none that fits."""
        return load_checkpoint(path, cls, device)


def translate(model, sequences, beam_width=None, length_penalty=1.0, **options):
    """Lists of digits -> lists of words. Beam search if a beam_width is given, else `generate` with its options.

    The limit leaves room for <EOS> and one token more than the longest answer: a row that does not stop where it should
    has written too much by then, and counts as wrong.
    """
    if not sequences or not all(sequences):
        raise InputError("there is nothing to translate: give at least one sequence, with at least one digit in each")
    sources = [VOCABULARY.encode(digits) for digits in sequences]
    longest = max(map(len, sequences)) + 2
    if beam_width is None:
        written = model.generate(sources, longest, **options)
    else:
        written = [found[0].tokens for found in model.beam_search(sources, beam_width, length_penalty, longest)]
    return [VOCABULARY.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in written]


# -------------------------------------------------------------------------------------
# 4. Training
# -------------------------------------------------------------------------------------
def predict(model, batch):
    """One batch through the model -> logits (B, T, V) and labels (B, T).

        source           4     0     7                  <PAD> where rows are shorter; hidden by source_mask
        decoder_input   <SOS>  four  zero   seven       what the decoder sees
        labels          four   zero  seven  <EOS>       what it should say there; IGNORE_INDEX where rows are shorter

    The labels were moved by one place when the batch was made (`collate_fn`); they are not moved again here.
    """
    logits = model(batch["source"], batch["decoder_input"], batch["source_mask"], batch["decoder_mask"])  # (B, T, V)
    return logits, batch["labels"]


def lr_factor(step, total_steps):
    """What LEARNING_RATE is multiplied with in step 0, 1, ... total_steps - 1: up in a line, then down half a cosine.

    Up: Adam's averages know nothing in the first steps, and full-sized steps on them can wreck fresh weights. Down, to a
    twentieth: a model near a minimum circles it at a distance that shrinks with the rate (Loshchilov and Hutter 2017).
    """
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS  # never 0: that would waste the first step
    progress = (step - WARMUP_STEPS) / max(1, total_steps - WARMUP_STEPS)                # 0 ... 1
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def create_optimizer(model, learning_rate, total_steps):
    """(AdamW, scheduler) for `total_steps` steps; scheduler.step() belongs after every optimizer.step()."""
    # fused: one kernel for all parameters instead of several per parameter. On a CPU this optimiser then takes about a
    # fifth of the time, for the same numbers; not on Apple's MPS, where older PyTorch versions lack it.
    fused = next(model.parameters()).device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=fused)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total_steps))


def compute_loss(model, batch):
    """Mean cross-entropy in nats over the positions that count. Guessing among V tokens costs ln V = 3.26."""
    logits, labels = predict(model, batch)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


def train_epoch(model, loader, optimizer, scheduler, loss_function=compute_loss):
    """Every batch of `loader` once. Returns the mean loss of the batches, each from the model as it was at the time: good
    enough to watch it fall. Raises InputError, with the step, when the loss is no longer a number.
    """
    model.train()
    device = next(model.parameters()).device
    total = 0.0
    for batch in tqdm(loader, ascii=True, leave=False, disable=None):  # None: no bar where there is no terminal
        loss = loss_function(model, to_device(batch, device))
        check_loss(loss.item(), scheduler.last_epoch)
        optimizer.zero_grad()  # gradients add up from call to call; forget this and each step repeats all before it
        loss.backward()
        # One odd batch can have a gradient a hundred times as long as the others. Shorten it, keep its direction.
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate(model, loader):
    """How good is it on `loader`'s sequences? Returns a dict:

    loss         mean cross-entropy over the positions that count
    accuracy     share of those positions where the most likely token is right
    exact_match  share of sequences that `translate` gets right from first to last token. This is the figure to trust: the
                 model is used as it will be used, and one wrong token spoils the row, a missing stop too
    examples     (digits, expected words, words written) for each sequence, the mistakes first
    """
    model.eval()
    device = next(model.parameters()).device
    loss_sum, correct, counted, examples = 0.0, 0, 0, []
    for batch in loader:
        logits, labels = predict(model, to_device(batch, device))
        counts = labels != IGNORE_INDEX                                                  # (B, T)
        # A sum over tokens, divided once at the end. The mean of the batches' means would give the tokens of a short
        # last batch more weight than all others.
        loss_sum += F.cross_entropy(logits[counts], labels[counts], reduction="sum").item()
        correct += (logits.argmax(-1) == labels)[counts].sum().item()
        counted += counts.sum().item()
        examples += zip(batch["digits"], batch["words"], translate(model, batch["digits"]))
    examples.sort(key=lambda example: example[1] == example[2])  # False sorts before True
    right = sum(expected == written for _, expected, written in examples)
    return {"loss": loss_sum / counted, "accuracy": correct / counted, "exact_match": right / len(examples),
            "examples": examples}


# -------------------------------------------------------------------------------------
# 5. Looking inside
# -------------------------------------------------------------------------------------
def show_beam_search(model, digits, expected):
    """Print one beam search step by step: what each live beam had written, what it adds, and its log-probability."""
    trace = []
    source, limit = [VOCABULARY.encode(digits)], len(digits) + 2
    found = model.beam_search(source, BEAM_WIDTH, LENGTH_PENALTY, limit, trace)[0]
    print(f"  source: {' '.join(digits)}   beam_width={BEAM_WIDTH}   length_penalty={LENGTH_PENALTY}")
    print("  step   log-probability   written so far, and + what is added")
    for step, beams in enumerate(trace, 1):
        for number, (before, token, total) in enumerate(beams):
            ended = "   (finished, set aside)" if token == EOS else ""
            print(f"  {step if number == 0 else '':>4}   {total:15.3f}   "
                  f"{' '.join(VOCABULARY.decode(before) + ['+', VOCABULARY.tokens[token]])}{ended}")
    print(f"  done after {len(trace)} of at most {limit} steps. Best first: score = log-probability / length ^ penalty")
    for hypothesis in found:
        verdict = "right" if hypothesis.tokens == VOCABULARY.encode(expected) + [EOS] else "wrong"
        print(f"    {hypothesis.score:8.3f} = {hypothesis.log_probability:7.3f} / {len(hypothesis.tokens)} ^ "
              f"{LENGTH_PENALTY}   {' '.join(VOCABULARY.decode(hypothesis.tokens))}   ({verdict})")
    greedy = model.generate(source, limit)[0]
    print(f"    greedy writes:  {' '.join(VOCABULARY.decode(greedy))}")


def exact_match(model, examples, **options):
    """Share of `examples` that `translate` gets right with these options."""
    written = translate(model, [digits for digits, _, _ in examples], **options)
    return sum(row == expected for row, (_, expected, _) in zip(written, examples)) / len(examples)


def show_beam_scores(model, examples):
    """Print the exact match of greedy and of beam search under three length penalties.

    Beam search finds what the *model* finds likely. Whether that is right is another question, and a wider beam can do
    worse: Stahlberg and Byrne 2019 found that the likeliest translation of all is often the empty one. Here all right
    answers to one source have one length, so a penalty that favours long ones can only mislead.
    """
    print(f"  greedy                       exact match {exact_match(model, examples):6.1%}")
    for penalty in (0.0, 1.0, 3.0):
        right = exact_match(model, examples, beam_width=BEAM_WIDTH, length_penalty=penalty)
        print(f"  beam width {BEAM_WIDTH}, penalty {penalty}    exact match {right:6.1%}")


@torch.inference_mode()
def cross_attention(model, digits):
    """What the decoder writes for `digits` (T ids), and the cross-attention it writes them with (layers, H, T, S)."""
    model.eval()
    written = model.generate([VOCABULARY.encode(digits)], len(digits) + 2)[0]
    device = model.embedding.weight.device
    source = torch.tensor([VOCABULARY.encode(digits)], device=device)                    # (1, S)
    decoder_input = torch.tensor([[SOS] + written[:-1]], device=device)                  # (1, T)
    memory_kv = model.memory_keys_values(model.encode(source))
    _, all_weights = model.decode(decoder_input, memory_kv, padding_mask(source), need_weights=True)
    return written, torch.stack(all_weights)[:, 0]                                       # (layers, H, T, S)


def show_cross_attention(model, digits):
    """Print which digit each word looks at, in the layer and head where the words follow the digits most.

    The row of <EOS> has no digit of its own; what it looks at shows how this model knows that it is done, if it shows
    anything. Attention weights say where a layer has looked, not what it has understood (Jain and Wallace 2019).
    """
    written, weights = cross_attention(model, digits)                                    # (layers, H, T, S)
    # Word number i should look at digit number i: the diagonal, for the rows that write words and not <EOS>.
    diagonal = weights[:, :, :len(digits)].diagonal(dim1=-2, dim2=-1).mean(-1)           # (layers, H)
    layer, head = divmod(diagonal.argmax().item(), weights.size(1))
    print("  mean weight of a word on its own digit, for each layer and head:")
    for number, row in enumerate(diagonal.tolist()):
        print(f"    layer {number}   " + "   ".join(f"head {h}: {mean:.2f}" for h, mean in enumerate(row)))
    print(f"  layer {layer}, head {head}; rows are what is about to be written, columns the source, each row sums to 1:")
    print(" " * 12 + "".join(f"{digit:>8s}" for digit in digits))
    for token, row in zip(VOCABULARY.decode(written), weights[layer, head].tolist()):
        print(f"  {token:10s}" + "".join(f"{weight:8.2f}" for weight in row))


def where_beams_help(model, examples):
    """Digits and words of one of `examples` that greedy gets wrong and beam search right; if there is none, of one that
    greedy gets wrong. Picked to show something: how often it happens, `show_beam_scores` says.
    """
    sequences = [digits for digits, _, _ in examples]
    both = zip(examples, translate(model, sequences), translate(model, sequences, BEAM_WIDTH, LENGTH_PENALTY))
    wrong = [(beams != words, digits, words) for (digits, words, _), greedy, beams in both if greedy != words]
    # False sorts before True, and sorting keeps the order of what is level: helped first, then not helped.
    return sorted(wrong, key=lambda case: case[0])[0][1:] if wrong else examples[0][:2]


# -------------------------------------------------------------------------------------
# 6. The run
# -------------------------------------------------------------------------------------
def main():
    check_constants(globals())
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
    model = EncoderDecoderTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT).to(device)
    print(f"encoder-decoder: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_loader.dataset)} "
          f"sequences to train on, {len(val_loader.dataset)} unseen ones to be measured on")

    print("\n1. Training: the next word, given the source and the right words before it")
    optimizer, scheduler = create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader))
    for epoch in range(1, NUM_EPOCHS + 1):
        train_loss = train_epoch(model, train_loader, optimizer, scheduler)
        result = evaluate(model, val_loader)
        print(f"  epoch {epoch:2d}   train loss {train_loss:.4f}   validation loss {result['loss']:.4f}   "
              f"exact match {result['exact_match']:6.1%}")
        if epoch == 1:
            young = copy.deepcopy(model)  # still unsure, so that there is something to search
    example = max((digits for digits, _, _ in result["examples"]), key=len)

    print("\n2. Beam search, step by step (the model after epoch 1, still unsure)")
    show_beam_search(young, *where_beams_help(young, result["examples"]))
    print(f"  and on all {len(result['examples'])} unseen sequences, the same model")
    show_beam_scores(young, result["examples"])

    print("\n3. Cross-attention of the trained model: which digit a word is written from")
    show_cross_attention(model, example)

    print("\n4. Examples, none of them seen in training, mistakes first")
    print_examples(result["examples"])

    beam_score = exact_match(model, result["examples"], beam_width=BEAM_WIDTH, length_penalty=LENGTH_PENALTY)
    print(f"\nResult on {len(result['examples'])} unseen sequences")
    print(f"  next word, given the right ones before it (teacher forcing)   accuracy    {result['accuracy']:6.1%}")
    print(f"  digits to words, written freely until <EOS>, greedy           exact match {result['exact_match']:6.1%}")
    print(f"  the same with beam search, width {BEAM_WIDTH:<29d}exact match {beam_score:6.1%}")
    report_saved(model, CHECKPOINTS / "encoder_decoder.pt")


if __name__ == "__main__":
    run_script(main)
