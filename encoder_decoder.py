"""
encoder_decoder.py - the T5 family: read the whole source, then write the target

THE IDEA.  The model has two stacks. The encoder reads the whole source in both directions, like
BERT. The decoder writes the target from left to right, like GPT. In every layer, the decoder also
attends to the encoder's output. This is called cross-attention (Vaswani et al. 2017, "Attention Is
All You Need"; Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", T5).

      4   0   7                       <SOS>  four  zero  seven        decoder input
      |   |   |                         |     |     |     |
    [ 2 encoder layers: ]             [ 2 decoder layers:          ]
    [ self-attention,   ]             [ causal self-attention,     ]
    [ feed-forward      ]             [ cross-attention,           ]
              |                       [ feed-forward               ]
              + memory: goes to         |     |     |     |
                cross-attention       four  zero seven <EOS>          predictions

    memory: the encoder's output. Every decoder layer attends to it by cross-attention, with queries
    from the target, and keys and values from the memory.

What it learns here: to read `4 0 7` and write `four zero seven <EOS>`. New here: cross-attention
and beam search. Positions start at 0 in both source and target.

Run it:     python encoder_decoder.py        (about 13 seconds on one CPU core)
Try it:     python encoder_decoder.py 4 0 7              (after the run)

The last lines should be close to:

    Result on 601 held-out sequences
      next word, with teacher forcing          accuracy    100.0%
      digits to words, greedy, until <EOS>     exact match 100.0%
      the same with beam search, width 3       exact match 100.0%
"""
import copy
import math
from typing import NamedTuple

from housekeeping import (CHECKPOINTS, check_arguments, check_constants, check_filters,
                          check_finite, check_known, check_model, check_rows, check_sequences,
                          choose_device, evaluation_mode, load_checkpoint, run_script,
                          save_checkpoint, save_model)
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_dataset import (DIGITS, EOS, IGNORE_INDEX, PAD, SOS, VOCABULARY, create_dataloaders,
                         exact_match, pad_rows, padding_mask, print_attention, print_examples,
                         to_device)

# =====================================================================================
# LEGEND   B  batch                              D  d_model: the size of a token's vector
#          S  source length, in general keys     H  heads   K  D / H: the size of a head's vectors
#          T  target length, in general queries  V  vocabulary size (26)   W  beam width
# =====================================================================================
# CONSTANTS - change one, run again. Each "Try" gives the final exact match with SEED 0 to 4.
# =====================================================================================
# The model
D_MODEL = 64             # size of a token's vector
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # in the encoder and also in the decoder. Try 1: 100%.
D_FF = 256               # hidden size of the feed-forward network
DROPOUT = 0.0            # fraction of activations set to 0 in training
# The task
NUM_SAMPLES = 6000       # distinct sequences, training plus validation
MAX_DIGITS = 5           # longest sequence
# The training
BATCH_SIZE = 64          # rows per step
LEARNING_RATE = 3e-3     # its peak. Try 3e-2: 0-6.8%.
WARMUP_STEPS = 40        # steps in which the learning rate rises to its peak
CLIP_NORM = 1.0          # maximum norm of the gradient
NUM_EPOCHS = 6           # passes over the training data, 85 steps each. Try 1: 99.8-100%.
# Generation
BEAM_WIDTH = 3           # partial answers that beam search keeps; 1 is greedy
LENGTH_PENALTY = 1.0     # 1.0 compares mean log-probabilities; 0.0 sums, which favor short answers
# The run
SEED = 0                 # weights and data
DEVICE = "cpu"           # or "cuda", "mps"; the numbers in this file were measured on a CPU
NUM_THREADS = 1          # CPU threads
# =====================================================================================


# --- 1. Building blocks ---------------------------------------------------------------
# KNOWN from decoder_only.py, except for what is marked NEW in this file: KeyValueCache.reorder.
# Read it, then continue reading at `EncoderLayer`.
def causal_mask(queries, keys, device=None):
    """Return (1, 1, queries, keys) booleans: each query may attend to keys up to its own position.

    The last query has the position of the last key. With a cache, there are more keys than queries:

        3 queries, 3 keys    # . .        2 queries, 5 keys    # # # # .
        (# True, . False)    # # .        (3 are cached)       # # # # #
                             # # #
    """
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask[None, None]  # (1, 1, queries, keys)


class KeyValueCache:
    """Stores the keys and values of all tokens so far in one layer, so that each is computed once.

    Under a causal mask, later tokens do not change a token's key or value. So each step after the
    prompt sends only the newest token through the layers. The result is the same up to rounding.
    The price is memory, 2 * D numbers per token and layer. Per token, two layers take 1 KiB here,
    and 32 take 512 KiB in LLaMA 7B (D = 4096, 16 bits). The cache is allocated up front, because
    growing it with torch.cat would copy everything in every step.
    """

    def __init__(self, batch_size, attention, max_len):
        weight = attention.w_k.weight  # attention: its MultiHeadAttention
        shape = (batch_size, attention.num_heads, max_len, attention.head_dim)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys, values):
        """Append keys and values (B, H, T, K). Returns all so far, (B, H, length, K) each."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length:end] = keys
        self.values[:, :, self.length:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    # --- NEW in encoder_decoder.py: beam search ---
    def reorder(self, rows):
        """Replace each row i with a copy of row rows[i]. (Why: see BEAM SEARCH in section 3.)"""
        self.keys[:, :, :self.length] = self.keys[rows, :, :self.length]
        self.values[:, :, :self.length] = self.values[rows, :, :self.length]
    # --- end of what is new ---


class PositionalEncoding(nn.Module):
    """Adds to each token's vector a fixed vector that encodes the token's position.

    Without positions, an encoder cannot tell `4 0 7` from `7 0 4`, because attention ignores order.
    Each pair (sine, cosine) is a point on a circle. From one position `pos` to the next, it turns
    by a fixed angle, large in the first pair (i = 0) and small in the last.

        PE[pos, 2i]   = sin(pos / 10000^(2i/D))
        PE[pos, 2i+1] = cos(pos / 10000^(2i/D))            Vaswani et al. 2017, section 3.5
    """

    def __init__(self, d_model, max_len):
        super().__init__()
        position = torch.arange(max_len).unsqueeze(1)  # (max_len, 1)
        frequency = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)  # (D/2,)
        table = torch.zeros(max_len, d_model)
        table[:, 0::2] = torch.sin(position * frequency)  # (max_len, D/2)
        table[:, 1::2] = torch.cos(position * frequency)
        # A buffer moves to the GPU with the model. It is not trained, and here it is not saved.
        self.register_buffer("table", table, persistent=False)

    def forward(self, x, positions=None):  # NEW in decoder_only.py: positions
        """x (B, S, D) -> (B, S, D)"""
        # --- NEW in decoder_only.py: positions (B, S), needed with left padding or a cache ---
        if positions is not None:
            return x + self.table[positions]
        # --- end of what is new ---
        return x + self.table[:x.size(1)]


def attention(queries, keys, values, mask=None, dropout=0.0):
    """Return softmax(q k^T / sqrt(K)) v and the weights (Vaswani et al. 2017, section 3.2).

    queries (B, H, T, K), keys and values (B, H, S, K); mask broadcasts to (B, H, T, S), True = may
    attend. Each query is compared with each key, and the softmax turns a row of scores into weights
    that sum to 1. The result is the weighted average of the values. With one query and three keys:

        scores  2.0  0.0  2.0    ->   weights  0.47  0.06  0.47
        with the third key masked:    weights  0.88  0.12  0.00

    Why divide by sqrt(K)? q.k is a sum of K products. If the entries are independent with mean 0
    and variance 1, the sum has variance K, so a typical size of sqrt(K). The softmax of such large
    scores puts almost all weight on one key, and its gradient is almost 0 (attention_by_hand.py).
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.size(-1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        # subtle: if all keys of a query are masked, its softmax is 0/0 = NaN. Use weights of 0.
        # (Only decoder_only.py has such queries: it pads on the left.)
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return F.dropout(weights, dropout) @ values, weights  # (B, H, T, K), (B, H, T, S)


class MultiHeadAttention(nn.Module):
    """Attention in H heads in parallel, each with its own K = D / H dimensions.

    Queries are computed from x; keys and values are computed from memory, which is x itself in
    self-attention and another sequence in cross-attention (encoder_decoder.py). A query describes
    what a position looks for, a key what it offers, and a value the content that it passes on.
    H heads have as many parameters as one head of D dimensions. w_o mixes their results.
    """

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.dropout = dropout
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_o = nn.Linear(d_model, d_model)
        self.formula = attention  # train_all.py can replace it with PyTorch's fused kernel

    def split_heads(self, x):
        """(B, S, D) -> (B, H, S, K): split the D dimensions of each token into H heads."""
        # subtle: view as (B, S, H, K) first, then transpose. view(B, H, S, K) has the same shape,
        # but it mixes the dimensions of different tokens.
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)

    def merge_heads(self, x):
        """(B, H, T, K) -> (B, T, D): the inverse of split_heads."""
        return x.transpose(1, 2).flatten(2)

    # --- NEW in decoder_only.py: the cache ---
    def new_cache(self, batch_size, max_len):
        """Return an empty cache for `batch_size` rows of at most `max_len` tokens."""
        return KeyValueCache(batch_size, self, max_len)
    # --- end of what is new ---

    def forward(self, x, memory, mask=None, cache=None):  # NEW in decoder_only.py: cache
        """x (B, T, D), memory (B, S, D), mask as in `attention` -> (B, T, D) and (B, H, T, S)"""
        queries = self.split_heads(self.w_q(x))  # (B, H, T, K)
        keys = self.split_heads(self.w_k(memory))  # (B, H, S, K)
        values = self.split_heads(self.w_v(memory))
        # --- NEW in decoder_only.py: the cache ---
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, H, S, K): cached and new
        # --- end of what is new ---
        dropout = self.dropout if self.training else 0.0
        result, weights = self.formula(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights  # (B, T, D), (B, H, T, S)


class FeedForward(nn.Module):
    """Two linear layers, applied to each position separately (Vaswani et al. 2017, section 3.3).

    Without the nonlinearity, the two layers would be equivalent to one. GELU (Hendrycks and Gimpel
    2016) is a smooth variant of ReLU. BERT and GPT-2 use it; the 2017 paper and T5 use ReLU.
    """

    def __init__(self, d_model, d_ff, dropout=0.0):
        super().__init__()
        self.widen = nn.Linear(d_model, d_ff)
        self.narrow = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)"""
        return self.narrow(self.dropout(F.gelu(self.widen(x))))


# KNOWN from encoder_only.py. Continue reading at `DecoderLayer`.
class EncoderLayer(nn.Module):
    """One encoder layer: self-attention, then a feed-forward network, each added to its input.

        x = x + attention(norm(x))
        x = x + feed_forward(norm(x))

    LayerNorm gives each token's vector mean 0 and variance 1, then applies a learned gain and
    shift. The residual `x +` gives gradients a direct path: the derivative of x + f(x) is
    1 + f'(x). Vaswani et al. 2017 and BERT normalize after the addition (post-norm). GPT-2, T5,
    and this file normalize the input of both parts (pre-norm, Xiong et al. 2020).
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        """x (B, S, D), mask as in `attention` -> (B, S, D) and the weights (B, H, S, S)"""
        normalized = self.norm1(x)
        attended, weights = self.attention(normalized, normalized, mask)
        x = x + self.dropout(attended)  # subtle: add to x, not to `normalized`
        x = x + self.dropout(self.feed_forward(self.norm2(x)))
        return x, weights


class DecoderLayer(nn.Module):
    """One decoder layer: the GPT layer of decoder_only.py, with cross-attention in the middle.

        x = x + attention(norm(x))                  under a causal mask
        x = x + cross_attention(norm(x), memory)
        x = x + feed_forward(norm(x))

    It follows Vaswani et al. 2017, section 3.1, but with pre-norm, as in T5.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout)
        # --- NEW in encoder_decoder.py: cross-attention ---
        self.norm_cross = nn.LayerNorm(d_model)
        self.cross_attention = MultiHeadAttention(d_model, num_heads, dropout)
        # --- end of what is new ---
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, cache=None,
                memory=None, memory_mask=None,  # NEW in encoder_decoder.py: memory, memory_mask
                memory_cache=None):  # NEW in encoder_decoder.py: memory_cache
        """x (B, T, D), memory (B, S, D), masks as in `attention` -> (B, T, D) and (B, H, T, S)

        The weights are those of cross-attention. With caches, x holds only the new tokens. After
        the first step, memory is empty: its keys and values are in memory_cache.
        """
        normalized = self.norm1(x)
        attended, weights = self.self_attention(normalized, normalized, mask, cache)
        x = x + self.dropout(attended)  # subtle: add to x, not to `normalized`
        # --- NEW in encoder_decoder.py: cross-attention ---
        # Queries come from the target, keys and values from the encoder's output, which is already
        # normalized. subtle: there is no causal mask, because the whole source is known.
        attended, weights = self.cross_attention(self.norm_cross(x), memory, memory_mask,
                                                 memory_cache)
        x = x + self.dropout(attended)
        # --- end of what is new ---
        x = x + self.dropout(self.feed_forward(self.norm2(x)))
        return x, weights


# --- 2. Choosing a token --------------------------------------------------------------
# KNOWN from decoder_only.py. Section 3 begins after it: continue reading at `Hypothesis`.
def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    """Return logits (B, V) with -inf for every excluded token.

    temperature  divides the logits: below 1 it sharpens the distribution, above 1 it flattens it
    top_k        keeps the k most likely tokens (Fan et al. 2018, section 5)
    top_p        keeps the smallest set of most likely tokens whose probabilities sum to at least p
                 (Holtzman et al. 2020, section 3.1): a large set where the model is uncertain

    With probabilities 0.5, 0.3, 0.15, and 0.05, top_k=2 keeps two tokens. top_p=0.7 also keeps two,
    because the token that crosses p stays. top_p=0.5 keeps one.
    """
    check_filters(temperature, top_k, top_p)
    # Shifting the largest logit to 0 does not change the softmax. It avoids overflow.
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    if top_k is not None:
        # Select by index: masking `logits < k-th largest` would keep more than k tokens in a tie.
        best = logits.topk(min(top_k, logits.size(-1))).indices  # (B, k)
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)  # (B, V)
        logits = logits.masked_fill(~keep, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)  # (B, V) each
        probabilities = torch.softmax(ordered, -1)
        # subtle: a token stays if those *before* it sum to less than p. So the first always stays.
        before = probabilities.cumsum(-1) - probabilities
        # Back in vocabulary order:
        keep = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < top_p)
        logits = logits.masked_fill(~keep, -math.inf)
    return logits


def choose_next_token(logits, written, temperature=0.0, top_k=None, top_p=None,
                      repetition_penalty=1.0, generator=None):
    """Return the next ids (B,), given their logits (B, V) and the ids generated so far (B, n).

    Temperature 0 is greedy: it takes the most likely token; top_k and top_p need one above 0. A
    repetition_penalty above 1 lowers the probability of already generated tokens (Keskar et al.
    2019, CTRL, section 4.1).
    """
    if repetition_penalty != 1.0 and written.size(1) > 0:
        scores = logits.gather(1, written)  # (B, n)
        # subtle: multiply negative logits. The paper divides them too, which rewards repetition.
        scores = torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
        logits = logits.scatter(1, written, scores)  # (B, V)
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probabilities = torch.softmax(filter_logits(logits, temperature, top_k, top_p), -1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (B,)


def cut_after(ids, stop_at):
    """Return `ids` up to and including the first `stop_at`, or all of them if there is none."""
    return ids[:ids.index(stop_at) + 1] if stop_at in ids else ids


# --- 3. The model, and beam search (the heart of this file) ---------------------------
# BEAM SEARCH. Greedy generation cannot revise a token. Beam search keeps the W best unfinished
# answers (hypotheses), so it can find one whose first token was not the most likely. In this
# example, W = 2 and the tokens are a, b, and <EOS>. The numbers are sums of log-probabilities:
#
#     step 1    a -0.5     b -1.2     <EOS> -2.4
#     step 2    from a:    a a -1.6   a b -1.7   a <EOS> -1.5
#               from b:    b a -1.3   b b -4.1   b <EOS> -4.4
#     step 3    from b a:  b a <EOS> -1.4, ...
#
# Step 1 keeps a and b, and <EOS> is finished. Step 2 ranks all 2 * 3 candidates together. The best
# 2W = 4 are b a, a <EOS>, a a, a b. Of these, a <EOS> is finished, and the best W = 2 of the others
# stay: b a and a a. Step 3 finishes b a <EOS>, which wins with -1.4. Greedy generation would have
# begun with `a` and ended with `a <EOS>` at -1.5.
#
# Finished hypotheses are compared by score = log-probability / length ** length_penalty. The length
# includes <EOS>. Penalty 0 favors short answers, because each further token lowers the sum. Penalty
# 1 takes the mean: -1.4 / 3 against -1.5 / 2. (Wu et al. 2016, section 7, divide by
# ((5 + length) / 6) ** penalty.)
#
# Why the best 2W? At most W of them end, one per hypothesis, so at least W are unfinished. With
# W = 1, `best_candidates` takes only the best one, so the search is greedy. If the beam can hold
# every hypothesis, the search is exhaustive.
class Hypothesis(NamedTuple):
    """A finished answer. `tokens` has no <SOS>; it ends in <EOS> if that was predicted."""
    score: float
    log_probability: float  # in nats
    tokens: list


def best_candidates(sums, logits, width):
    """Extend each hypothesis by each token and return the best 2W candidates of each source.

    sums (B, W) of log-probabilities, logits (B*W, V) of the next token. Returns three tensors
    (B, 2W): the new sums, best first; the parents, 0 to W - 1; and the new tokens. For W = 1, it
    returns only the candidate that greedy generation takes, (B, 1).
    """
    log_p = torch.log_softmax(logits, -1)  # (B*W, V)
    if width == 1:  # greedy: with a second candidate, the search would go on with it after <EOS>
        token = logits.argmax(-1, keepdim=True)  # (B, 1)
        return sums + log_p.gather(1, token), torch.zeros_like(token), token
    totals = (sums[:, :, None] + log_p.view(*sums.shape, -1)).flatten(1)  # (B, W*V)
    totals, index = totals.topk(2 * width)
    # In the example above, `b a` has index 3: parent 3 // 3 = 1, token 3 % 3 = 0.
    return totals, index // log_p.size(-1), index % log_p.size(-1)


class EncoderDecoderTransformer(nn.Module):
    """An encoder and a decoder that predicts the next token at every target position.

    Differs from T5 (Raffel et al. 2020): sinusoidal positions, added once, instead of learned
    relative ones in self-attention; norms and linear layers in the stacks have a bias; scores are
    divided by sqrt(K), which T5 builds into its initial weights; embeddings are scaled at the
    input, not at the output; GELU instead of ReLU; <SOS> starts, not <PAD>; no <EOS> on the source.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256,
                 dropout=0.0, max_len=64):
        super().__init__()
        self.arguments = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads,
                          "num_layers": num_layers, "d_ff": d_ff, "dropout": dropout,
                          "max_len": max_len}
        check_model(self.arguments)
        self.vocab_size, self.max_len = vocab_size, max_len
        # One table for source, target, and output (Vaswani et al. 2017, section 3.4).
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.encoder_layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout)
                                            for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(d_model)
        self.decoder_layers = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout)
                                            for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size, bias=False)
        # Tied weights, small for the output and scaled for the input, as in encoder_only.py.
        # (Without the factor sqrt(D), training ends at 0.0-0.2% exact match, SEED 0-2.)
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.embedding_scale = math.sqrt(d_model)

    def positions_of(self, tokens):
        """tokens (B, T) -> positions (1, T). All rows start at position 0."""
        return torch.arange(tokens.size(1), device=tokens.device)[None]

    def embed(self, tokens, positions=None):
        """tokens (B, T) -> (B, T, D), with `positions` or those of `positions_of`."""
        if positions is None:
            positions = self.positions_of(tokens)
        x = self.embedding(tokens) * self.embedding_scale  # (B, T, D)
        return self.dropout(self.positional_encoding(x, positions))

    def encode(self, tokens, mask=None):
        """tokens (B, S) -> memory (B, S, D) and a list of each layer's weights (B, H, S, S)"""
        if mask is None:
            mask = padding_mask(tokens)  # (B, 1, 1, S)
        x = self.embed(tokens)  # (B, S, D)
        all_weights = []
        for layer in self.encoder_layers:
            x, weights = layer(x, mask)
            all_weights.append(weights)
        return self.encoder_norm(x), all_weights

    def decode(self, tokens, memory, memory_mask, positions=None, caches=None):
        """tokens (B, T), memory (B, S, D) -> (B, T, D) and a list of each layer's cross-attention
        weights (B, H, T, S)

        memory_mask  (B, 1, 1, S); masks the source's padding, in training and in generation
        positions    (1, T); None: those of `positions_of`, plus the number of cached tokens
        caches       a pair per layer, from `new_caches`; `tokens` then has only the new tokens
        """
        past = caches[0][0].length if caches else 0
        new = tokens.size(1)
        mask = None  # a single new token may attend to everything so far
        if new > 1:
            mask = causal_mask(new, past + new, tokens.device)  # (1, 1, T, past + T)
        if positions is None:
            positions = past + self.positions_of(tokens)
        if past > 0:
            # subtle: the first step has filled the caches of cross-attention. With an empty memory,
            # nothing is appended, and the cached keys and values are used.
            memory = memory[:, :0]  # (B, 0, D)
        x = self.embed(tokens, positions)  # (B, T, D)
        all_weights = []
        for i, layer in enumerate(self.decoder_layers):
            cache, memory_cache = caches[i] if caches else (None, None)
            x, weights = layer(x, mask, cache, memory, memory_mask, memory_cache)
            all_weights.append(weights)
        return self.final_norm(x), all_weights

    def forward(self, source, decoder_input, source_mask=None):
        """source (B, S), decoder_input (B, T) -> logits (B, T, V); those at t predict token t + 1

        The target's padding needs no mask, because the causal mask already hides it. Teacher
        forcing: decoder_input is the ground-truth prefix, not the model's own predictions, so one
        pass trains all positions. The price is that the model never trains on its own mistakes
        ("exposure bias", Ranzato et al. 2016).
        """
        if source_mask is None:
            source_mask = padding_mask(source)  # (B, 1, 1, S)
        memory, _ = self.encode(source, source_mask)
        return self.output(self.decode(decoder_input, memory, source_mask)[0])  # (B, T, V)

    def read(self, sources):
        """Encode lists of ids. Returns memory (B, S, D) and memory_mask (B, 1, 1, S)."""
        source = pad_rows(sources, PAD).to(self.embedding.weight.device)  # (B, S)
        mask = padding_mask(source)
        return self.encode(source, mask)[0], mask

    def new_caches(self, batch_size, max_new_tokens, source_length):
        """Return two empty caches per decoder layer, for self-attention and cross-attention."""
        return [(layer.self_attention.new_cache(batch_size, max_new_tokens),
                 layer.cross_attention.new_cache(batch_size, source_length))
                for layer in self.decoder_layers]

    @torch.inference_mode()
    def generate(self, sources, max_new_tokens, temperature=0.0, top_k=None, top_p=None,
                 repetition_penalty=1.0, use_cache=True, stop_at=EOS, generator=None):
        """Write at most `max_new_tokens` for each source (a list of ids). Returns lists of ids.

        The options are those of decoder_only.py. All targets start with <SOS> in the same column,
        so they need no padding on the left.
        """
        check_arguments(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, repetition_penalty=repetition_penalty)
        check_rows(sources, self.vocab_size, self.max_len)
        check_rows([[SOS]], self.vocab_size, self.max_len, max_new_tokens - 1)
        device = self.embedding.weight.device
        tokens = torch.full((len(sources), max_new_tokens + 1), PAD, device=device)
        tokens[:, 0] = SOS  # (B, max + 1)
        positions = self.positions_of(tokens)  # (1, max + 1)
        finished = torch.zeros(len(sources), dtype=torch.bool, device=device)  # (B,)
        with evaluation_mode(self):
            memory, memory_mask = self.read(sources)
            caches = None
            if use_cache:
                caches = self.new_caches(len(sources), max_new_tokens, memory.size(1))
            for end in range(1, max_new_tokens + 1):
                start = end - 1 if use_cache else 0
                hidden, _ = self.decode(tokens[:, start:end], memory, memory_mask,
                                        positions[:, start:end], caches)  # (B, end - start, D)
                logits = self.output(hidden[:, -1])  # (B, V); only the last position is needed
                tokens[:, end] = choose_next_token(logits, tokens[:, 1:end], temperature,
                                                   top_k, top_p, repetition_penalty, generator)
                if stop_at is not None:
                    finished |= tokens[:, end] == stop_at
                    if finished.all():
                        break
        # Finished rows keep generating until all rows are finished. Cut the extra tokens off.
        return [cut_after(row, stop_at) for row in tokens[:, 1:end + 1].tolist()]

    @torch.inference_mode()
    def beam_search(self, sources, beam_width=4, length_penalty=1.0, max_new_tokens=32, trace=None):
        """For each source (a list of ids), return at most `beam_width` hypotheses, best first.

        The search stops as soon as no unfinished hypothesis can beat the best finished one, so the
        answers after the first may not be the best possible. What is unfinished after
        `max_new_tokens` counts as finished. trace: a list that receives, for each step of the first
        source's search, the finished and kept candidates as (tokens, new token, sum, finished).
        """
        check_arguments(beam_width=beam_width, length_penalty=length_penalty,
                        max_new_tokens=max_new_tokens)
        check_rows(sources, self.vocab_size, self.max_len)
        check_rows([[SOS]], self.vocab_size, self.max_len, max_new_tokens - 1)
        batch, width, device = len(sources), beam_width, self.embedding.weight.device
        length_penalty = float(length_penalty)  # tensors cannot be divided by integers over 64 bits
        # The W hypotheses of source b are rows b*W to b*W + W - 1.
        first_row = torch.arange(0, batch * width, width, device=device)[:, None]  # (B, 1)
        tokens = torch.full((batch * width, max_new_tokens + 1), PAD, device=device)
        tokens[:, 0] = SOS  # (B*W, max + 1)
        positions = self.positions_of(tokens)  # (1, max + 1)
        # All hypotheses start with the same <SOS>, so only the first of each source counts.
        sums = torch.full((batch, width), -math.inf, device=device)  # (B, W)
        sums[:, 0] = 0.0
        best_score = torch.full((batch, 1), -math.inf, device=device)
        finished = [[] for _ in sources]
        with evaluation_mode(self):
            memory, memory_mask = self.read(sources)
            memory = memory.repeat_interleave(width, 0)  # (B*W, S, D)
            memory_mask = memory_mask.repeat_interleave(width, 0)  # (B*W, 1, 1, S)
            caches = self.new_caches(batch * width, max_new_tokens, memory.size(1))
            for length in range(1, max_new_tokens + 1):
                # 1. Take the best 2W candidates: b a, a <EOS>, a a, a b.
                hidden, _ = self.decode(tokens[:, length - 1:length], memory, memory_mask,
                                        positions[:, length - 1:length], caches)  # (B*W, 1, D)
                logits = self.output(hidden[:, -1])  # (B*W, V)
                sums, parent, token = best_candidates(sums, logits, width)  # (B, 2W) each

                # 2. Move those that end to the finished list: a <EOS>, with score -1.5 / 2.
                ends = (token == EOS) | (length == max_new_tokens)  # (B, 2W)
                scores = (sums / length ** length_penalty).masked_fill(~ends, -math.inf)
                best_score = torch.maximum(best_score, scores.amax(1, keepdim=True))  # (B, 1)
                for b, c in (scores > -math.inf).nonzero().tolist():
                    ids = tokens[b * width + parent[b, c], 1:length].tolist() + [token[b, c].item()]
                    finished[b].append(Hypothesis(scores[b, c].item(), sums[b, c].item(), ids))

                # 3. Keep the best W of the others, with their parents' tokens and caches: b a, a a.
                #    The cross-attention caches need no change: parent and child share the source.
                kept_sums, kept = sums.masked_fill(ends, -math.inf).topk(width)  # (B, W)
                if trace is not None:  # only for show_beam_search
                    trace.append([(tokens[parent[0, c], 1:length].tolist(), token[0, c].item(),
                                   sums[0, c].item(), ends[0, c].item())
                                  for c in range(sums.size(1)) if sums[0, c] > -math.inf
                                  and (ends[0, c] or c in kept[0].tolist())])
                rows = (first_row + parent.gather(1, kept)).flatten()  # (B*W,)
                tokens = tokens[rows]
                tokens[:, length] = token.gather(1, kept).flatten()
                for self_cache, _ in caches:
                    self_cache.reorder(rows)

                # 4. Stop if no unfinished hypothesis can win. A negative sum never rises, and its
                #    divisor is largest at the limit: sum / max_new_tokens ** length_penalty.
                possible = kept_sums / max_new_tokens ** length_penalty  # (B, W)
                done = (possible <= best_score).all(1, keepdim=True)  # (B, 1)
                sums = kept_sums.masked_fill(done, -math.inf)  # finished sources add no answers
                if done.all():
                    break
        return [sorted(answers, key=lambda answer: answer.score, reverse=True)[:width]
                for answers in finished]

    def save(self, path):
        """Write arguments and weights to `path`, or raise OSError."""
        save_checkpoint(path, self)

    @classmethod
    def load(cls, path, device="cpu"):
        """Return the model that was saved at `path`, or raise InputError."""
        return load_checkpoint(path, cls, device)


def translate(model, sequences, beam_width=None, **options):
    """Translate lists of digits into lists of words. With a beam_width, it uses `beam_search`.

    options: see `generate` or `beam_search`. The limit allows the longest answer, <EOS>, and one
    spare token.
    """
    check_sequences(sequences)
    sources = [VOCABULARY.encode(digits) for digits in sequences]
    limit = max(map(len, sequences)) + 2
    if beam_width is None:
        written = model.generate(sources, limit, **options)
    else:
        answers = model.beam_search(sources, beam_width, max_new_tokens=limit, **options)
        written = [hypotheses[0].tokens for hypotheses in answers]
    return [VOCABULARY.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in written]


# --- 4. Training ----------------------------------------------------------------------
def predict(model, batch):
    """Run the model on one batch. Returns logits (B, T, V) and labels (B, T).

        source           4     0     7                  short rows end in <PAD>
        decoder_input   <SOS>  four  zero   seven
        labels          four   zero  seven  <EOS>       short rows end in IGNORE_INDEX

    `collate_fn` has already shifted the labels by one position. Do not shift them again here.
    """
    return model(batch["source"], batch["decoder_input"], batch["source_mask"]), batch["labels"]


# KNOWN from encoder_only.py. Continue reading at `show_beam_search`.
def lr_factor(step, total_steps, warmup_steps, final_factor=0.05):
    """Return the factor for the learning rate at `step`: linear warmup, then cosine decay.

    Adam divides an average of the gradients by an average of their size. Warmup (Vaswani et al.
    2017, section 5.3) keeps the steps small while these averages are based on few gradients (Liu
    et al. 2020, RAdam). Decay (Loshchilov and Hutter 2017) lets the model get closer to a minimum.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # never 0, which would waste the first step
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))  # 0 to 1
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def create_optimizer(model, learning_rate, total_steps, warmup_steps, weight_decay=0.01):
    """Return (AdamW, scheduler) for `total_steps` steps. Call scheduler.step() after each step."""
    fused = next(model.parameters()).device.type != "mps"  # faster; older MPS builds lack it
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay,
                                  fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, total_steps, warmup_steps))
    return optimizer, scheduler


def cross_entropy(logits, labels):
    """Return the mean of -log(probability of the label) in nats. A uniform guess: ln 26 = 3.26."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


def compute_loss(model, batch):
    """Return the mean cross-entropy of one batch, with the default options of `predict`."""
    return cross_entropy(*predict(model, batch))


def train_epoch(model, loader, optimizer, scheduler, clip_norm, loss_function=compute_loss):
    """Train for one epoch on `loader`. Returns the mean loss of its batches."""
    model.train()
    device = next(model.parameters()).device
    total = 0.0
    for batch in tqdm(loader, ascii=True, leave=False, disable=None):  # no bar without a terminal
        loss = loss_function(model, to_device(batch, device))
        check_finite(loss.item(), scheduler.last_epoch)  # which is the step, despite its name
        optimizer.zero_grad()  # otherwise backward() adds to the gradients of the previous step
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)  # shortens, keeps the direction
        optimizer.step()
        scheduler.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate(model, loader):
    """Evaluate the model on `loader`. Returns a dict with:

    loss         mean cross-entropy over the labels
    accuracy     fraction of labels that are the most likely token
    exact_match  fraction of sequences that `translate` gets entirely correct
    examples     (digits, expected words, written words) of each sequence, mistakes first
    """
    model.eval()
    device = next(model.parameters()).device
    loss_sum, num_correct, num_labels, examples = 0.0, 0, 0, []
    for batch in loader:
        logits, labels = predict(model, to_device(batch, device))
        counts = labels != IGNORE_INDEX  # which labels count
        # subtle: sum and divide once. A mean of means gives a small last batch too much weight.
        loss_sum += F.cross_entropy(logits[counts], labels[counts], reduction="sum").item()
        num_correct += (logits.argmax(-1) == labels)[counts].sum().item()
        num_labels += counts.sum().item()
        examples += zip(batch["digits"], batch["words"], translate(model, batch["digits"]))
    examples.sort(key=lambda example: example[1] == example[2])  # False sorts before True
    num_exact = sum(expected == written for _, expected, written in examples)
    return {"loss": loss_sum / num_labels, "accuracy": num_correct / num_labels,
            "exact_match": num_exact / len(examples), "examples": examples}


# --- 5. Looking inside ----------------------------------------------------------------
def show_beam_search(model, digits, expected, width, penalty):
    """Print one beam search step by step: the tokens so far, the new token, and the sum."""
    trace = []
    source, limit = [VOCABULARY.encode(digits)], len(digits) + 2
    found = model.beam_search(source, width, penalty, limit, trace)[0]
    print(f"  source: {' '.join(digits)}   width {width}   length penalty {penalty}")
    print("  step   log-probability   tokens so far + new token")
    for step, candidates in enumerate(trace, 1):
        for n, (before, token, total, ended) in enumerate(candidates):
            text = " ".join(VOCABULARY.decode(before) + ["+", VOCABULARY.tokens[token]])
            print(f"  {step if n == 0 else '':>4}   {total:15.3f}   {text}"
                  + ("   (finished)" if ended else ""))
    print(f"  stopped after {len(trace)} of {limit} steps; score = sum / length ^ penalty")
    for hypothesis in found:
        correct = hypothesis.tokens == VOCABULARY.encode(expected) + [EOS]
        print(f"    {hypothesis.score:8.3f} = {hypothesis.log_probability:7.3f} / "
              f"{len(hypothesis.tokens)} ^ {penalty}   "
              f"{' '.join(VOCABULARY.decode(hypothesis.tokens))}   "
              f"({'correct' if correct else 'wrong'})")
    greedy = VOCABULARY.decode(model.generate(source, limit)[0])
    print(f"    greedy generates:  {' '.join(greedy)}")


def show_beam_scores(model, examples, width):
    """Print the exact match of greedy generation and of beam search under three length penalties.

    A likely answer need not be correct. In machine translation, the most likely output of all is
    often the empty one (Stahlberg and Byrne 2019).
    """
    digits, words = [digits for digits, _, _ in examples], [words for _, words, _ in examples]
    greedy = translate(model, digits)
    print(f"  greedy                       exact match {exact_match(greedy, words):6.1%}")
    for penalty in (0.0, 1.0, 3.0):
        written = translate(model, digits, width, length_penalty=penalty)
        print(f"  beam width {width}, penalty {penalty}    exact match "
              f"{exact_match(written, words):6.1%}")


@torch.inference_mode()
def cross_attention(model, digits):
    """Return the generated ids (T) and their cross-attention weights (layers, H, T, S)."""
    model.eval()
    source = [VOCABULARY.encode(digits)]
    written = model.generate(source, len(digits) + 2)[0]
    memory, memory_mask = model.read(source)
    decoder_input = torch.tensor([[SOS] + written[:-1]], device=memory.device)  # (1, T)
    _, all_weights = model.decode(decoder_input, memory, memory_mask)
    return written, torch.stack(all_weights)[:, 0]


def show_cross_attention(model, digits):
    """Print the cross-attention of the head in which word i attends most to digit i."""
    written, weights = cross_attention(model, digits)
    n = min(len(digits), len(written))
    own = weights[:, :, :n].diagonal(dim1=-2, dim2=-1).mean(-1)  # (layers, H)
    layer, head = divmod(own.argmax().item(), own.size(1))
    print("  mean weight of a word's own digit, per layer and head:")
    for i, row in enumerate(own.tolist()):
        print(f"    layer {i}   " + "   ".join(f"head {h}: {w:.2f}" for h, w in enumerate(row)))
    print(f"  layer {layer}, head {head}; rows are queries (-> the token predicted), columns keys:")
    print_attention(weights[layer, head], [f"-> {word}" for word in VOCABULARY.decode(written)],
                    digits)


def where_beams_help(model, examples, width, penalty):
    """Return (digits, words) of an example that beam search gets right and greedy gets wrong.

    If there is none, return one that greedy gets wrong, or else the first.
    """
    sequences = [digits for digits, _, _ in examples]
    greedy = translate(model, sequences)
    beams = translate(model, sequences, width, length_penalty=penalty)
    wrong = [(digits, words, beam) for (digits, words, _), row, beam
             in zip(examples, greedy, beams) if row != words]
    helped = [case for case in wrong if case[1] == case[2]]
    return (helped or wrong or examples)[0][:2]


# --- 6. The run -----------------------------------------------------------------------
def main():
    check_constants(globals())
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
    model = EncoderDecoderTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                                      DROPOUT).to(device)
    print(f"encoder-decoder: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(train_loader.dataset)} training and {len(val_loader.dataset)} held-out sequences")

    print("\n1. Training: predict the next word from the source and the previous words")
    optimizer, scheduler = create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader),
                                            WARMUP_STEPS)
    for epoch in range(1, NUM_EPOCHS + 1):
        train_loss = train_epoch(model, train_loader, optimizer, scheduler, CLIP_NORM)
        result = evaluate(model, val_loader)
        print(f"  epoch {epoch:2d}   train loss {train_loss:.4f}   "
              f"validation loss {result['loss']:.4f}   exact match {result['exact_match']:6.1%}")
        if epoch == 1:
            undertrained = copy.deepcopy(model)  # still uncertain, with a high learning rate
    save_model(model, CHECKPOINTS / "encoder_decoder.pt")
    examples = result["examples"]

    print("\n2. Beam search (the model after epoch 1). A likelier answer need not be correct")
    digits, words = where_beams_help(undertrained, examples, BEAM_WIDTH, LENGTH_PENALTY)
    show_beam_search(undertrained, digits, words, BEAM_WIDTH, LENGTH_PENALTY)
    print(f"  the same model on all {len(examples)} held-out sequences")
    show_beam_scores(undertrained, examples, BEAM_WIDTH)

    print("\n3. Cross-attention of the trained model: which digits do words attend to?")
    show_cross_attention(model, max((digits for digits, _, _ in examples), key=len))

    print("\n4. Held-out examples, mistakes first")
    print_examples(examples)

    beams = translate(model, [digits for digits, _, _ in examples], BEAM_WIDTH,
                      length_penalty=LENGTH_PENALTY)
    beam_score = exact_match(beams, [words for _, words, _ in examples])
    print(f"\nResult on {len(examples)} held-out sequences")
    print(f"  next word, with teacher forcing          accuracy    {result['accuracy']:6.1%}")
    print(f"  digits to words, greedy, until <EOS>     exact match {result['exact_match']:6.1%}")
    print(f"  the same with beam search, width {BEAM_WIDTH:<8d}exact match {beam_score:6.1%}")


def answer(tokens):
    """Translate `tokens` from the command line with the saved model."""
    check_known(tokens, DIGITS, "python encoder_decoder.py 4 0 7")
    model = EncoderDecoderTransformer.load(CHECKPOINTS / "encoder_decoder.pt",
                                           choose_device(DEVICE))
    print(f"{' '.join(tokens)}  ->  {' '.join(translate(model, [tokens])[0])}")
    show_cross_attention(model, tokens)


if __name__ == "__main__":
    run_script(main, answer)
