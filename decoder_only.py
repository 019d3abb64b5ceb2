"""
decoder_only.py - the GPT family: read what came before, say what comes next

THE IDEA.  One stream of tokens, one task: guess the next. Whatever can be written as "prompt, then answer" becomes
that task (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", GPT-2). To write, take a guess,
append it, guess again.

    sees      4      0      7    <SEP>   four   zero   seven
    says      .      .      .    four    zero   seven  <EOS>        . = not scored: digits are random

    [   embedding + position                                 ]
    [   DecoderOnlyLayer: a position looks at itself and     ]  x 2     causal: nobody sees the future, so all
    [   at what came before                                  ]          positions can be trained in one pass

It learns here:  to continue `4 0 7 <SEP>` with `four zero seven <EOS>`. Nothing tells it how many words to write; it
stops by writing <EOS>, or not at all.

Also here:  how to choose a token (greedy, temperature, top-k, top-p, repetition penalty), each shown at work on what a
trained model says, and the key/value cache that makes writing affordable.

Run it:     python decoder_only.py        (about 14 seconds on one CPU core)

The last lines should be close to:

    Result on 599 unseen sequences
      next token, given the right ones before it (teacher forcing)   accuracy    100.0%
      digits to words, written freely until <EOS>                    exact match 100.0%
    saved checkpoints/decoder_only.pt

READING ORDER   positions -> attention -> feed-forward -> causal mask -> cache -> layer -> choosing a token
                -> model and `generate` (the heart of this file) -> training -> main
"""
import copy
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_dataset import (CHECKPOINTS, EOS, IGNORE_INDEX, PAD, VOCABULARY, InputError, check_constants, check_loss,
                         check_tokens, choose_device, create_dataloaders, load_checkpoint, print_examples, report_saved,
                         run_script, save_checkpoint, to_device)

# =====================================================================================
# LEGEND   B  batch                                D  d_model: width of a token's vector
#          T  positions that ask (queries)         H  heads
#          S  positions that can be looked at:     K  D / H: width of one head
#             T, plus those in the cache           V  vocabulary size (26)
# =====================================================================================

# =====================================================================================
# CONSTANTS - change one, run again. What a "Try" gives is the exact match at the end, measured with SEED 0 and 1.
# =====================================================================================
# The model
D_MODEL = 64             # width of a token's vector. Try 16: 1.5 % with one seed, 100 % with the other.
NUM_HEADS = 4            # must divide D_MODEL. Try 1: 100 %.
NUM_LAYERS = 2           # Try 1: 99.7 to 99.8 %; its mistakes are doubled digits. Why? (Which 4 did it write last?)
D_FF = 256               # inner width of the feed-forward; 4 * D_MODEL since 2017. Try 64: 100 %.
DROPOUT = 0.0            # share of activations set to 0 in training. Try 0.1: 100 %, later; 0.3: 50 to 73 %.
# The task
NUM_SAMPLES = 6000       # distinct sequences, training and validation together. Try 1000: 100 %; 300: 0 to 3 %.
MAX_DIGITS = 5           # longest sequence. Try 8: 99.3 to 99.8 %, and then more epochs.
# The training
BATCH_SIZE = 64          # rows per step. Try 256: a quarter of the steps, still 100 %.
LEARNING_RATE = 3e-3     # at its peak. Try 1e-4, usual for far larger models: 99.8 %, later. Try 3e-2: 58 to 93 %.
WARMUP_STEPS = 40        # steps in which the rate climbs to its peak. Try 0: 99.8 to 100 %; pre-norm hardly needs it.
CLIP_NORM = 1.0          # longest gradient that a step may follow. Try 100.0, no clipping: 99.8 to 100 %.
NUM_EPOCHS = 8           # passes over the training data, 85 steps each. Try 2: 99.7 to 100 %; 1: 95 to 98 %.
# The run
SEED = 0                 # weights, data and dice. Try 1: every claim should survive it.
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


# --- NEW HERE: nobody sees the future, so nothing is computed twice -------------------
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
# --- end of what is new --------------------------------------------------------------


class DecoderOnlyLayer(nn.Module):
    """A GPT block: attention gathers, feed-forward digests; each *adds* to what comes in and reads it through a norm.

        x = x + causal_attention(norm(x))
        x = x + feed_forward(norm(x))

    It is the decoder layer of Vaswani et al. 2017 without its cross-attention, for here is no encoder to attend to; or
    the layer of encoder_only.py under a causal mask. The norm comes before, not after (Radford et al. 2019, section
    2.3). The residual `x +` leaves a straight road from the loss to every layer: the gradient of x + f(x) always holds
    a 1. The norm gives each vector mean 0 and variance 1, so that scores and activations stay where softmax and GELU
    work.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, cache=None, need_weights=False):
        """x (B, T, D), mask broadcastable to (B, H, T, S) -> (B, T, D) and the attention weights or None.

        With a cache, x holds only the new tokens; their keys and values join those of the S - T tokens before.
        """
        normed = self.norm1(x)                                                           # (B, T, D)
        keys, values = self.self_attention.keys_values(normed)                           # 2 x (B, H, T, K)
        if cache is not None:
            keys, values = cache.append(keys, values)                                    # 2 x (B, H, S, K)
        attended, weights = self.self_attention(normed, keys, values, mask, need_weights)
        # subtle: add to x, not to `normed`. With that mistake the straight road is normed away at every layer; two layers
        # still learn this task, so no curve gives it away. A test against PyTorch's own layer does.
        x = x + self.dropout(attended)                                                   # (B, T, D)
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
class DecoderOnlyTransformer(nn.Module):
    """Embedding, causal layers, and at every position a guess at the next token.

    Departs from Radford et al. 2019 (GPT-2): sinusoidal positions for learned ones; the embedding scaled by sqrt(D) as
    in Vaswani et al. 2017; PyTorch's default weights in the linear layers, not std 0.02, which at a width of 64 leaves
    every layer nearly silent.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256, dropout=0.0,
                 max_len=64):
        super().__init__()
        self.arguments = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads,
                          "num_layers": num_layers, "d_ff": d_ff, "dropout": dropout, "max_len": max_len}
        self.vocab_size, self.max_len = vocab_size, max_len
        self.embedding_scale = math.sqrt(d_model)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderOnlyLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        # A pre-norm stack adds and adds and never norms its sum; without this last norm the logits grow with depth.
        self.final_norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size, bias=False)
        # Tied (Press and Wolf 2017): one table says what a token means on the way in and on the way out.
        self.output.weight = self.embedding.weight
        # subtle: a logit is a sum of D products of a normed vector (variance 1) with these weights, so its deviation is
        # sqrt(64) * 0.02 = 0.16: near uniform, first loss near ln V = 3.26. With nn.Embedding's own default of 1.0 the
        # first loss is near 60: through the tied table every token recognises itself, and the model starts out certain
        # that the next one is the same again.
        nn.init.normal_(self.embedding.weight, std=0.02)

    def hidden_states(self, tokens, padding_mask=None, positions=None, caches=None, need_weights=False):
        """tokens (B, T) -> (B, T, D), and a list with each layer's attention weights (B, H, T, S) or None.

        padding_mask  (B, 1, 1, S), True = real token; None if there is no padding that a real token could see
        positions     (T,) or (B, T); None for 0 .. T-1
        caches        one KeyValueCache a layer; `tokens` are then only those that are not in it yet, S = cached + T
        """
        past = caches[0].length if caches else 0
        queries, keys = tokens.size(1), past + tokens.size(1)
        # A single token may see all that came before: with nothing to hide, no mask, and the kernel is faster.
        mask = causal_mask(queries, keys, tokens.device) if queries > 1 else None        # (1, 1, T, S)
        if padding_mask is not None:
            mask = padding_mask if mask is None else mask & padding_mask                 # (B, 1, T, S)
        # sqrt(D) as in Vaswani et al. 2017, section 3.4. Embeddings start at a size of 0.02, positions have 0.7: unscaled,
        # a token drowns in where it stands. Try removing the factor: 8 epochs then end at 2 to 15 % exact match.
        x = self.positional_encoding(self.embedding(tokens) * self.embedding_scale, positions)  # (B, T, D)
        x = self.dropout(x)                                                              # (B, T, D)
        all_weights = []
        for number, layer in enumerate(self.layers):
            x, weights = layer(x, mask, caches[number] if caches else None, need_weights)  # (B, T, D), (B, H, T, S)
            all_weights.append(weights)
        return self.final_norm(x), all_weights if need_weights else None

    def forward(self, tokens, padding_mask=None):
        """tokens (B, T) -> logits (B, T, V); those at position t are a guess at token t + 1.

        subtle: rows padded on the *right* need no padding mask. Padding is then in the future of every real token, and
        the causal mask hides it already.
        Raises InputError for ids outside the vocabulary, rows too long, and rows of nothing but padding.
        """
        check_tokens(tokens, self.vocab_size, self.max_len)
        return self.output(self.hidden_states(tokens, padding_mask)[0])                  # (B, T, V)

    # --- NEW HERE: writing -----------------------------------------------------------
    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, repetition_penalty=1.0,
                 use_cache=True, stop_at=EOS, generator=None):
        """Continue each of `prompts`, lists of ids that may differ in length, by at most `max_new_tokens`.

        The choice of each token is `choose_next_token`'s; temperature 0, the default, is greedy. Returns lists of the
        new ids, <EOS> included where a row wrote it; stop_at=None never stops early. The cache changes nothing but the
        time, and greedy rows do not depend on each other. (Sampled ones share the generator's dice.)

        Prompts of different lengths are padded on the *left*, so that all rows write in the same column:

            column       0     1     2     3      4      5      6
            tokens     <PAD> <PAD>   9   <SEP>  nine   <EOS>    ?         written from column 4 on
                         4     0     7   <SEP>  four   zero   seven
            positions    0     0     0     1      2      3      4         each row counts from its first real token
                         0     1     2     3      4      5      6
            real         .     .     #     #      #      #      #         . is hidden from everyone, in every step
                         #     #     #     #      #      #      #

        Padded on the right, the first row would have to continue behind its own padding: the mistake of which Hugging
        Face warns with "right-padding was detected".

        Raises InputError for an empty batch or prompt, settings that cannot work, and rows too long for the model.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        if not prompts or not all(prompts):
            raise InputError("there is nothing to continue: give at least one prompt, with at least one token in each")
        longest = max(len(prompt) for prompt in prompts)
        total = longest + max_new_tokens
        if total > self.max_len:
            raise InputError(f"a prompt of {longest} and max_new_tokens={max_new_tokens} need {total} positions, the "
                             f"model was built for max_len={self.max_len}: write less, or build it larger")
        device = self.embedding.weight.device
        tokens = torch.full((len(prompts), total), PAD)                                  # (B, total)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt):longest] = torch.tensor(prompt)
        check_tokens(tokens[:, :longest], self.vocab_size, self.max_len)
        tokens = tokens.to(device)
        real = tokens != PAD                                                             # (B, total)
        real[:, longest:] = True  # still to be written
        # A row's first real token is at position 0, wherever its column is. The padding before it gets 0 too: any
        # position will do, since nobody looks there.
        positions = (real.cumsum(1) - 1).clamp(min=0)                                    # (B, total)
        # Without padding no mask is needed for a single new token, which lets attention skip it.
        mask = None if real.all() else real[:, None, None, :]                            # (B, 1, 1, total)

        was_training = self.training
        self.eval()
        caches = None
        if use_cache:
            caches = [KeyValueCache(len(prompts), layer.self_attention, total) for layer in self.layers]
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)            # (B,)
        for end in range(longest, total):
            # The prompt goes through once. After that, with a cache, only the newest token does.
            start = end - 1 if use_cache and end > longest else 0
            hidden, _ = self.hidden_states(tokens[:, start:end], None if mask is None else mask[..., :end],
                                           positions[:, start:end], caches)              # (B, end-start, D)
            # Only the last position says something new; the guesses before it are for tokens that stand already.
            logits = self.output(hidden[:, -1])                                          # (B, V)
            chosen = choose_next_token(logits, tokens[:, longest:end], temperature, top_k, top_p, repetition_penalty,
                                       generator)                                        # (B,)
            # A row that has stopped writes on while it waits for the others; what follows its <EOS> is cut off below.
            tokens[:, end] = chosen
            if stop_at is not None:
                finished |= chosen == stop_at                                            # (B,)
                if finished.all():
                    break
        self.train(was_training)
        written = []
        for row in tokens[:, longest:end + 1].tolist():
            written.append(row[:row.index(stop_at) + 1] if stop_at in row else row)
        return written
    # --- end of what is new ----------------------------------------------------------

    def save(self, path):
        """Write arguments and weights to `path`, all or nothing. Raises OSError."""
        save_checkpoint(path, self)

    @classmethod
    def load(cls, path, device="cpu"):
        """The model that was saved at `path`. Raises InputError if there is none that fits."""
        return load_checkpoint(path, cls, device)


def translate(model, sequences, **options):
    """Lists of digits -> lists of words, by continuing `4 0 7 <SEP>` until <EOS>. options: those of `generate`.

    The limit leaves room for <EOS> and one token more than the longest answer: a row that does not stop where it should
    has written too much by then, and counts as wrong.
    """
    if not sequences or not all(sequences):
        raise InputError("there is nothing to translate: give at least one sequence, with at least one digit in each")
    prompts = [VOCABULARY.encode([*digits, "<SEP>"]) for digits in sequences]
    written = model.generate(prompts, max_new_tokens=max(map(len, sequences)) + 2, **options)
    return [VOCABULARY.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in written]


# -------------------------------------------------------------------------------------
# 4. Training
# -------------------------------------------------------------------------------------
def predict(model, batch):
    """One batch through the model -> logits (B, T, V) and labels (B, T).

        pair           4   0   7   <SEP>   four   zero    seven
        pair_labels    .   .   .   four    zero   seven   <EOS>      . = IGNORE_INDEX

    Read a column from top to bottom: "having read everything up to here, say that". Thanks to the causal mask one pass
    trains all columns, each on its own past, and none can peek. The labels were moved by one place when the batch was
    made (`collate_fn`); they are not moved again here.
    """
    return model(batch["pair"]), batch["pair_labels"]                                    # (B, T, V), (B, T)


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
@torch.inference_mode()
def least_sure(model, loader):
    """Where in `loader`'s answers does the model hesitate most? Returns the row's tokens up to that place.

    Hesitation is the entropy of the next token in nats: 0 when it is certain, ln V = 3.26 when it has no idea.
    """
    model.eval()
    device = next(model.parameters()).device
    most, found = -1.0, None
    for batch in loader:
        logits, labels = predict(model, to_device(batch, device))                        # (B, T, V), (B, T)
        log_p = torch.log_softmax(logits, -1)                                            # (B, T, V)
        entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(labels == IGNORE_INDEX, -1.0)  # (B, T)
        if entropy.max().item() > most:
            most = entropy.max().item()
            row, place = divmod(entropy.argmax().item(), entropy.size(1))
            found = VOCABULARY.decode(batch["pair"][row, :place + 1])
    return found


@torch.inference_mode()
def show_filters(model, prompt):
    """Print the distribution of the token after `prompt` (a list of tokens), before and after each filter.

    A dash is a probability of exactly 0. Watch the last column: temperature leaves every token possible, top_k as many
    as it says, top_p as many as it takes. And watch the two rows with top_p=0.9: the flatter the distribution, the more
    tokens the same p lets through.
    """
    model.eval()
    tokens = torch.tensor([VOCABULARY.encode(prompt)], device=next(model.parameters()).device)  # (1, T)
    logits = model(tokens)[:, -1]                                                        # (1, V)
    shown = logits[0].topk(6).indices.tolist()
    print(f"  what comes after: {' '.join(prompt)}")
    print(" " * 22 + "".join(f"{VOCABULARY.tokens[i]:>8s}" for i in shown) + "  others   tokens left")

    def show(name, filtered):
        probabilities = torch.softmax(filtered, -1)[0]                                   # (V,)
        row = "".join(f"{probabilities[i].item():8.1%}" if probabilities[i] > 0 else "       -" for i in shown)
        others = 1 - probabilities[shown].sum().item()
        print(f"  {name:20s}{row}{max(0.0, others):8.1%}{(probabilities > 0).sum().item():10d}")

    show("as it comes", logits)
    for temperature in (0.5, 2.0):
        show(f"temperature={temperature}", filter_logits(logits, temperature))
    for top_k in (1, 3):
        show(f"top_k={top_k}", filter_logits(logits, top_k=top_k))
    for top_p in (0.5, 0.9):
        show(f"top_p={top_p}", filter_logits(logits, top_p=top_p))
    show("top_p=0.9 at t=2.0", filter_logits(logits, 2.0, top_p=0.9))


def show_strategies(model, examples, prompt, generator):
    """Print for each strategy: how many of `examples` it gets right, and how many different answers 50 tries give.

    Here one answer is right and variety is only a way to be wrong. For a story it is the other way round: nothing is
    right, and greedy tells the same one for ever (Holtzman et al. 2020).
    """
    digits = prompt[:prompt.index("<SEP>")]
    print(f"  {len(examples)} unseen sequences, each translated once; then 50 times {' '.join(digits)}")
    for name, options in (("greedy", {}), ("temperature=0.5", {"temperature": 0.5}),
                          ("temperature=1.0", {"temperature": 1.0}), ("temperature=2.0", {"temperature": 2.0}),
                          ("top_k=3", {"temperature": 1.0, "top_k": 3}), ("top_p=0.9", {"temperature": 1.0, "top_p": 0.9})):
        written = translate(model, [digits for digits, _, _ in examples], generator=generator, **options)
        right = sum(words == expected for words, (_, expected, _) in zip(written, examples))
        tries = translate(model, [digits] * 50, generator=generator, **options)
        distinct = len({tuple(words) for words in tries})
        print(f"  {name:18s}{right / len(examples):6.1%} right   {distinct:2d} different of 50, one: {' '.join(tries[-1])}")


def show_repetition_penalty(model, digits):
    """Print what a penalty on repetition does to an answer that has to repeat itself.

    A sure model withstands a mild penalty: its right logit is far above the rest. A strong one makes it write anything
    but what it has written already.
    """
    for penalty in (1.0, 2.0, 5.0, 20.0):
        written = translate(model, [digits], repetition_penalty=penalty)[0]
        print(f"  {' '.join(digits)}   repetition_penalty={penalty:<5}  ->  {' '.join(written)}")


def show_cache(lengths=(32, 64, 128, 256)):
    """Time writing with and without cache, the median of three. Weights are random: time does not depend on them.

    With the cache the time grows in step with the length. Without, each token costs a pass over all before it; so the
    quotient grows, slowly at first: a pass over 64 tokens is hardly slower than one over a single token while calling
    the kernels takes longer than their work.
    """
    model = DecoderOnlyTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, max_len=max(lengths) + 2)
    model.to(choose_device(DEVICE))
    prompt = [VOCABULARY.encode("7 <SEP>")]
    model.generate(prompt, 8)  # the first call warms up: memory and kernels are set up once
    print("  tokens    with cache   without   times as long")
    for length in lengths:
        seconds = {True: [], False: []}
        for use_cache in (True, False) * 3:  # in turn, so that a slower moment of the machine slows both
            start = time.perf_counter()
            model.generate(prompt, length, use_cache=use_cache, stop_at=None)
            seconds[use_cache].append(time.perf_counter() - start)
        cached, plain = (statistics.median(seconds[use_cache]) for use_cache in (True, False))
        print(f"  {length:6d}   {cached:8.3f} s {plain:8.3f} s   {plain / cached:10.1f}")


# -------------------------------------------------------------------------------------
# 6. The run
# -------------------------------------------------------------------------------------
def main():
    check_constants(globals())
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
    model = DecoderOnlyTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT,
                                   max_len=max(64, 2 * MAX_DIGITS + 3)).to(device)  # digits, <SEP>, words, <EOS>, 1 too many
    print(f"decoder-only: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_loader.dataset)} "
          f"sequences to train on, {len(val_loader.dataset)} unseen ones to be measured on")
    print(f"loss before the first step: {evaluate(model, val_loader)['loss']:.3f}; "
          f"guessing blindly among {len(VOCABULARY)} tokens costs ln {len(VOCABULARY)} = {math.log(len(VOCABULARY)):.3f}")

    print("\n1. Training: the next token, of which only the answer counts")
    optimizer, scheduler = create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader))
    for epoch in range(1, NUM_EPOCHS + 1):
        train_loss = train_epoch(model, train_loader, optimizer, scheduler)
        result = evaluate(model, val_loader)
        print(f"  epoch {epoch:2d}   train loss {train_loss:.4f}   validation loss {result['loss']:.4f}   "
              f"exact match {result['exact_match']:6.1%}")
        if epoch == 1:
            young = copy.deepcopy(model)  # still unsure, so that there is something to choose from
    print("\n2. What each filter leaves of a distribution (the model after epoch 1, where it hesitates most)")
    prompt = least_sure(young, val_loader)
    show_filters(young, prompt)

    print("\n3. What the strategies write with it: quality against variety")
    show_strategies(young, result["examples"][::3], prompt, torch.Generator(device).manual_seed(SEED))
    print("  and the trained model, greedy, where the right answer repeats itself: a penalty is no free improvement")
    show_repetition_penalty(model, ["7"] * min(3, MAX_DIGITS))

    print("\n4. What the key/value cache saves")
    show_cache()

    print("\n5. Examples, none of them seen in training, mistakes first")
    print_examples(result["examples"])

    print(f"\nResult on {len(result['examples'])} unseen sequences")
    print(f"  next token, given the right ones before it (teacher forcing)   accuracy    {result['accuracy']:6.1%}")
    print(f"  digits to words, written freely until <EOS>                    exact match {result['exact_match']:6.1%}")
    report_saved(model, CHECKPOINTS / "decoder_only.pt")


if __name__ == "__main__":
    run_script(main)
