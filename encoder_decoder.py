"""
encoder_decoder.py - the T5 family: read the whole source, then generate the target

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
Practice:   python exercises/practice.py start 27     (27, 28)

The last lines should be close to:

    Result on 601 held-out sequences
      next word, with teacher forcing          accuracy    100.0%
      digits to words, greedy, until <EOS>     exact match 100.0%
      the same with beam search, width 3       exact match 100.0%
"""
import itertools
import math
from typing import NamedTuple

from housekeeping import BaseModel, load_model, prepare, run_script, save_model
import torch
import torch.nn.functional as F
from torch import nn

from toy_dataset import (EOS, IGNORE_INDEX, PAD, SOS, VOCABULARY, check_tokens, create_dataloaders,
                         exact_match, pad_rows, padding_mask, print_attention, print_examples)
from training import batches, check_finite, create_optimizer, score

# =====================================================================================
# LEGEND   B  batch                              D  d_model: the size of a token's vector
#          S  source length, in general keys     H  heads   K  D / H: the size of a head's vectors
#          T  target length, in general queries  V  vocabulary size (26)   W  beam width
# =====================================================================================
# CONSTANTS - change one and run again. "Try" gives the final exact match over SEED 0 to 4.
# =====================================================================================
# The model
D_MODEL = 64             # size of a token's vector
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # number of layers in each stack. Try 1: 100%.
D_FF = 256               # hidden size of the feed-forward network
DROPOUT = 0.0            # fraction of activations set to 0 in training
# The task
NUM_SAMPLES = 6000       # distinct sequences, training plus validation
MAX_DIGITS = 5           # longest sequence
# The training
BATCH_SIZE = 64          # sequences per step
LEARNING_RATE = 3e-3     # at its peak. Try 3e-2: 0-6.8%.
WARMUP_STEPS = 40        # steps over which the learning rate rises to its peak
CLIP_NORM = 1.0          # a longer gradient is shortened to this length
NUM_EPOCHS = 6           # passes over the training data, 85 steps each. Try 1: 99.8-100%.
# Beam search
UNDERTRAINED_STEPS = 50  # the trained model leaves nothing to search for, so train another briefly
BEAM_WIDTH = 3           # partial answers that beam search keeps; 1 is greedy
LENGTH_PENALTY = 1.0     # 1.0 ranks by mean log-probability; 0.0 by sum, which favors short answers
# The run
SEED = 0                 # weights and data
DEVICE = "cpu"           # or "cuda", "mps"; the numbers in this file were measured on a CPU
# =====================================================================================


# --- 1. Building blocks ---------------------------------------------------------------
# KNOWN from decoder_only.py, which explains them, except for what is marked NEW here:
# KeyValueCache.reorder. Continue reading at `EncoderLayer`.
def attention(queries, keys, values, mask=None, dropout=0.0):
    """Return softmax(q k^T / sqrt(K)) v and the weights (Vaswani et al. 2017, section 3.2).

    queries (B, H, T, K), keys and values (B, H, S, K); mask broadcasts to (B, H, T, S), True = may
    attend.
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.size(-1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return F.dropout(weights, dropout) @ values, weights  # (B, H, T, K), (B, H, T, S)


class MultiHeadAttention(nn.Module):
    """Attention in H heads in parallel, each with its own K = D / H dimensions."""

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.dropout = dropout
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_o = nn.Linear(d_model, d_model)
        self.attention_function = attention  # train_all.py puts PyTorch's faster version here

    def split_heads(self, x):
        """(B, S, D) -> (B, H, S, K): split the D numbers of each token among H heads."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)

    def merge_heads(self, x):
        """(B, H, T, K) -> (B, T, D): the inverse of split_heads."""
        return x.transpose(1, 2).flatten(2)

    # --- NEW in decoder_only.py: the cache ---
    def new_cache(self, batch_size, max_len):
        """Return an empty cache for `batch_size` sequences of at most `max_len` tokens."""
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
        result, weights = self.attention_function(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights  # (B, T, D), (B, H, T, S)


class PositionalEncoding(nn.Module):
    """Adds to each token's vector a fixed vector that encodes the token's position."""

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


class FeedForward(nn.Module):
    """Two linear layers, applied to each position separately (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, d_model, d_ff, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)"""
        return self.down(self.dropout(F.gelu(self.up(x))))


class KeyValueCache:
    """Stores the keys and values of all tokens so far in one layer."""

    def __init__(self, batch_size, attention, max_len):
        weight = attention.w_k.weight  # `attention` is the module that it belongs to
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
        """Replace each batch row by the row with the number in `rows` (B,). Used by beam search."""
        self.keys[:, :, :self.length] = self.keys[rows, :, :self.length]
        self.values[:, :, :self.length] = self.values[rows, :, :self.length]
    # --- end of what is new ---


def causal_mask(queries, keys, device=None):
    """Return (1, 1, queries, keys): each query may attend to keys up to its own position."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask[None, None]  # (1, 1, queries, keys)


# KNOWN from encoder_only.py. Continue reading at `DecoderLayer`.
class EncoderLayer(nn.Module):
    """One encoder layer: self-attention, then a feed-forward network, each added to its input."""

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        """x (B, S, D), mask as in `attention` -> (B, S, D) and the weights (B, H, S, S)"""
        normalized = self.norm1(x)
        attended, weights = self.self_attention(normalized, normalized, mask)
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


# --- 2. The model ---------------------------------------------------------------------
class Hypothesis(NamedTuple):
    """A finished answer. `tokens` has no <SOS>; it ends in <EOS> if that was predicted."""
    score: float
    log_probability: float  # in nats
    tokens: list


def best_candidates(sums, logits, width):
    """Extend each hypothesis by each token and return the best 2W candidates for each source.

    sums (B, W) of log-probabilities, logits (B*W, V) of the next token. Returns three tensors
    (B, 2W): the new sums, best first; the parents, 0 to W - 1; and the new tokens. For W = 1, it
    returns only the candidate that greedy generation takes, (B, 1).
    """
    log_p = torch.log_softmax(logits, -1).view(*sums.shape, -1)  # (B, W, V)
    if width == 1:  # subtle: not by the sums, because rounding makes ties of different logits
        token = logits.argmax(-1, keepdim=True)  # (B, 1)
        return sums + log_p[:, 0].gather(1, token), torch.zeros_like(token), token
    totals, index = (sums[:, :, None] + log_p).flatten(1).topk(2 * width)  # (B, 2W) each
    # In the example below, `b a` has index 3: parent 3 // 3 = 1, token 3 % 3 = 0.
    return totals, index // log_p.size(-1), index % log_p.size(-1)


class EncoderDecoderTransformer(BaseModel):
    """An encoder and a decoder that predicts the next token at every target position.

    BaseModel is an nn.Module that can save and load itself. guide/paper_and_code.md lists where
    this model differs from T5 (Raffel et al. 2020), and why.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256,
                 dropout=0.0, max_len=64):
        super().__init__(vocab_size=vocab_size, d_model=d_model, num_heads=num_heads,
                         num_layers=num_layers, d_ff=d_ff, dropout=dropout, max_len=max_len)
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
        # Tied weights, small for the output and scaled for the input, as in decoder_only.py.
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

    def run_encoder(self, tokens, mask=None):
        """tokens (B, S) -> memory (B, S, D) and a list of each layer's weights (B, H, S, S)"""
        if mask is None:
            mask = padding_mask(tokens)  # (B, 1, 1, S)
        x = self.embed(tokens)  # (B, S, D)
        all_weights = []
        for layer in self.encoder_layers:
            x, weights = layer(x, mask)
            all_weights.append(weights)
        return self.encoder_norm(x), all_weights

    def run_decoder(self, tokens, memory, memory_mask, positions=None, caches=None):
        """tokens (B, T), memory (B, S, D) -> (B, T, D) and a list of each layer's cross-attention
        weights (B, H, T, S)

        memory_mask  (B, 1, 1, S); masks the source's padding, in training and in generation
        positions    (1, T); if None, those of `positions_of` plus the number of cached tokens
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
            # subtle: the first step has filled the caches of cross-attention. An empty memory adds
            # nothing to them, so their keys and values are used again.
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
        memory, _ = self.run_encoder(source, source_mask)
        return self.output(self.run_decoder(decoder_input, memory, source_mask)[0])  # (B, T, V)

    def read(self, sources):
        """Encode lists of ids. Returns memory (B, S, D) and memory_mask (B, 1, 1, S)."""
        source = pad_rows(sources, PAD).to(self.embedding.weight.device)  # (B, S)
        mask = padding_mask(source)
        return self.run_encoder(source, mask)[0], mask

    def new_caches(self, batch_size, max_new_tokens, source_length):
        """Return two empty caches per decoder layer, for self-attention and cross-attention."""
        return [(layer.self_attention.new_cache(batch_size, max_new_tokens),
                 layer.cross_attention.new_cache(batch_size, source_length))
                for layer in self.decoder_layers]

    @torch.inference_mode()
    def generate(self, sources, max_new_tokens, use_cache=True, stop_at=EOS):
        """Generate at most `max_new_tokens` for each source (a list of ids), greedily.

        Returns lists of ids. It is the loop of decoder_only.py, but all answers start with <SOS>
        in column 0, so nothing is padded on the left. (The ways to choose a token that are shown
        there work here too. This file has beam search instead.)
        """
        self.check_input(sources, max_new_tokens=max_new_tokens)
        self.check_input([[SOS]], max_new_tokens - 1)
        tokens = torch.full((len(sources), max_new_tokens + 1), SOS,
                            device=self.embedding.weight.device)  # (B, 1 + max_new_tokens)
        with self.evaluation_mode():
            memory, memory_mask = self.read(sources)
            caches = self.new_caches(len(sources), max_new_tokens, memory.size(1)) \
                if use_cache else None
            for end in range(1, max_new_tokens + 1):
                past = caches[0][0].length if use_cache else 0  # send only what is not cached yet
                hidden, _ = self.run_decoder(tokens[:, past:end], memory, memory_mask,
                                             caches=caches)  # (B, end - past, D)
                tokens[:, end] = self.output(hidden[:, -1]).argmax(-1)
                if stop_at is not None and (tokens[:, 1:end + 1] == stop_at).any(1).all():
                    break
        # Short answers keep growing until all have ended. Cut off what follows the first stop_at.
        answers = tokens[:, 1:end + 1].tolist()
        return [ids[:ids.index(stop_at) + 1] if stop_at in ids else ids for ids in answers]

    # BEAM SEARCH. Greedy generation cannot revise a token. Beam search keeps the W best unfinished
    # answers (hypotheses), so it can find one whose first token was not the most likely. In this
    # example, W = 2, and the tokens are a, b, and <EOS>. It is chosen so that greedy fails. The
    # numbers are sums of log-probabilities:
    #
    #     step 1    a -0.5     b -1.2     <EOS> -2.4
    #     step 2    from a:    a a -1.6   a b -1.7   a <EOS> -1.5
    #               from b:    b a -1.3   b b -4.1   b <EOS> -4.4
    #     step 3    from b a:  b a <EOS> -1.4, ...
    #
    # Step 1 keeps a and b, and <EOS> is finished. Step 2 ranks all 2 * 3 candidates together. The
    # best 2W = 4 are b a, a <EOS>, a a, a b. Of these, a <EOS> is finished, and the best W = 2 of
    # the others stay: b a and a a. Step 3 finishes b a <EOS>, which wins with -1.4. Greedy
    # generation would have begun with `a` and ended with `a <EOS>` at -1.5.
    #
    # Finished hypotheses are compared by score = sum / length ** length_penalty, <EOS> included in
    # the length. Penalty 0 favors short answers, because each further token lowers the sum. Penalty
    # 1 takes the mean: -1.4 / 3 against -1.5 / 2.
    #
    # Why the best 2W? At most W of them end, one per hypothesis, so at least W are unfinished. If
    # the beam can hold every hypothesis, the search is exhaustive. With W = 1, only the best
    # candidate is taken, so the search is greedy.
    @torch.inference_mode()
    def beam_steps(self, sources, width, length_penalty, max_new_tokens):
        """Search step by step. Yields after each step what `beam_search` and the figures need:

        candidates (B, 2W, 1 + length) of ids, sums and ends (B, 2W), kept (B, W), and the list of
        finished hypotheses of each source. The W hypotheses of source b are rows b*W to b*W + W-1.
        """
        with self.evaluation_mode():
            memory, memory_mask = (m.repeat_interleave(width, 0) for m in self.read(sources))
            caches = self.new_caches(len(memory), max_new_tokens, memory.size(1))
            first_row = torch.arange(0, len(memory), width, device=memory.device)[:, None]  # (B, 1)
            tokens = torch.full((len(memory), 1), SOS, device=memory.device)  # (B*W, 1), grows
            # All hypotheses start with the same <SOS>, so only the first of each source counts.
            sums = torch.full((len(sources), width), -math.inf, device=memory.device)
            sums[:, 0] = 0.0
            finished = [[] for _ in sources]
            for length in range(1, max_new_tokens + 1):
                # 1. Extend. The best 2W candidates in step 2 above: b a, a <EOS>, a a, a b.
                hidden, _ = self.run_decoder(tokens[:, -1:], memory, memory_mask, caches=caches)
                sums, parent, token = best_candidates(sums, self.output(hidden[:, -1]), width)
                rows = first_row + parent  # (B, 2W)
                candidates = torch.cat([tokens[rows], token[..., None]], -1)  # (B, 2W, 1 + length)

                # 2. Finish those that end: a <EOS>, with score -1.5 / 2.
                ends = (token == EOS) | (length == max_new_tokens)  # (B, 2W)
                for b, c in (ends & (sums > -math.inf)).nonzero().tolist():
                    total = sums[b, c].item()
                    finished[b].append(Hypothesis(total / length ** length_penalty, total,
                                                  candidates[b, c, 1:].tolist()))

                # 3. Keep the best W of the others, with their caches: b a, a a.
                kept_sums, kept = sums.masked_fill(ends, -math.inf).topk(width)  # (B, W)
                yield candidates, sums, ends, kept, finished
                tokens = candidates.take_along_dim(kept[..., None], 1).flatten(0, 1)
                for cache, _ in caches:  # cross-attention's stay: a child has its parent's source
                    cache.reorder(rows.gather(1, kept).flatten())

                # 4. Stop if none of these can win. A negative sum never rises, and its divisor is
                #    largest at the limit.
                best = sums.new_tensor([[max((h.score for h in answers), default=-math.inf)]
                                        for answers in finished])  # (B, 1)
                limit = float(max_new_tokens) ** length_penalty
                done = (kept_sums / limit <= best).all(1, keepdim=True)  # (B, 1)
                sums = kept_sums.masked_fill(done, -math.inf)  # finished sources add no answers
                if done.all():
                    break

    def beam_search(self, sources, beam_width=4, length_penalty=1.0, max_new_tokens=32):
        """For each source (a list of ids), return at most `beam_width` hypotheses, best first.

        The search stops as soon as no unfinished hypothesis can beat the best finished one, so the
        answers after the first may not be the best possible. An answer that is
        unfinished after `max_new_tokens` counts as finished.
        """
        self.check_input(sources, beam_width=beam_width, length_penalty=length_penalty,
                         max_new_tokens=max_new_tokens)
        self.check_input([[SOS]], max_new_tokens - 1)
        *_, (*_, finished) = self.beam_steps(sources, beam_width, length_penalty, max_new_tokens)
        return [sorted(answers, key=lambda answer: answer.score, reverse=True)[:beam_width]
                for answers in finished]


def translate(model, sequences, beam_width=1, length_penalty=1.0, **options):
    """Translate lists of digits into lists of words: greedily, or with beams if there are several.

    options: see `generate`. The limit allows the longest answer, <EOS>, and one spare token.
    """
    sources = [VOCABULARY.encode(digits) for digits in sequences]
    limit = max(map(len, sources), default=0) + 2
    if beam_width == 1:
        answers = model.generate(sources, limit, **options)
    else:
        found = model.beam_search(sources, beam_width, length_penalty, limit, **options)
        answers = [hypotheses[0].tokens for hypotheses in found]
    return [VOCABULARY.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in answers]


# --- 3. Training ----------------------------------------------------------------------
def logits_and_labels(model, batch):
    """Predict the target tokens of one batch. Returns logits (B, T, V) and labels (B, T).

        source           4     0     7                  short sources end in <PAD>
        decoder_input   <SOS>  four  zero   seven
        labels          four   zero  seven  <EOS>       short targets end in IGNORE_INDEX

    `collate_fn` has already shifted the labels by one position. Do not shift them again here.
    """
    return model(batch["source"], batch["decoder_input"], batch["source_mask"]), batch["labels"]


# KNOWN from decoder_only.py. Continue reading at `record_beam_search`.
def compute_loss(model, batch, **options):
    """Return the mean of -log(probability of the label) in nats. A uniform guess: ln 26 = 3.26.

    options: see `logits_and_labels`.
    """
    logits, labels = logits_and_labels(model, batch, **options)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


def train_epoch(model, loader, optimizer, scheduler, clip_norm, loss_function=compute_loss):
    """Train for one epoch on `loader`. Returns the mean loss of its batches."""
    model.train()
    total = 0.0
    for batch in batches(loader, next(model.parameters()).device):
        loss = loss_function(model, batch)
        check_finite(loss.item(), f"at step {scheduler.last_epoch}")  # the step, despite its name
        optimizer.zero_grad()  # otherwise backward() adds to the gradients of the previous step
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)  # one odd batch cannot do much harm
        optimizer.step()
        scheduler.step()  # the learning rate of the next step
        total += loss.item()
    return total / len(loader)


def evaluate(model, loader):
    """Return loss, accuracy, exact match, and examples: see `score` in training.py."""
    return score(model, loader, logits_and_labels, translate)


# --- 4. Looking inside ----------------------------------------------------------------
def record_beam_search(model, digits, width, penalty):
    """Return the steps of one search and its answers, best first.

    A step is a list of (ids so far, sum, ended) of its finished and kept candidates.
    """
    steps = []
    search = model.beam_steps([VOCABULARY.encode(digits)], width, penalty, len(digits) + 2)
    for candidates, sums, ends, kept, finished in search:  # noqa: B007 (the last one is used)
        shown = ends[0].scatter(0, kept[0], True) & (sums[0] > -math.inf)  # (2W,)
        steps.append([(candidates[0, c, 1:].tolist(), sums[0, c].item(), ends[0, c].item())
                      for c in shown.nonzero().flatten().tolist()])
    return steps, sorted(finished[0], key=lambda answer: answer.score, reverse=True)[:width]


def show_beam_search(model, digits, expected, width, penalty):
    """Print one beam search step by step: the tokens so far, the new token, and the sum."""
    steps, found = record_beam_search(model, digits, width, penalty)
    print(f"  source: {' '.join(digits)}   width {width}   length penalty {penalty}")
    print("  step   log-probability   tokens so far + new token")
    for step, candidates in enumerate(steps, 1):
        for n, (ids, total, ended) in enumerate(candidates):
            *before, token = VOCABULARY.decode(ids)
            text = " ".join([*before, "+", token]) + ("   (finished)" if ended else "")
            print(f"  {step if n == 0 else '':>4}   {total:15.3f}   {text}")
    print(f"  stopped after {len(steps)} steps, at most {len(digits) + 2}; "
          "score = sum / length ^ penalty")
    for hypothesis in found:
        correct = hypothesis.tokens == VOCABULARY.encode(expected) + [EOS]
        print(f"    {hypothesis.score:8.3f} = {hypothesis.log_probability:7.3f} / "
              f"{len(hypothesis.tokens)} ^ {penalty}   "
              f"{' '.join(VOCABULARY.decode(hypothesis.tokens))}   "
              f"({'correct' if correct else 'wrong'})")
    print(f"    greedy generates:  {' '.join(translate(model, [digits])[0])}")


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
    _, all_weights = model.run_decoder(decoder_input, memory, memory_mask)
    return written, torch.stack(all_weights)[:, 0]


def show_cross_attention(model, digits):
    """Print the cross-attention of the head in which word i attends most to digit i."""
    written, weights = cross_attention(model, digits)
    n = min(len(digits), len(written))
    own = weights[:, :, :n].diagonal(dim1=-2, dim2=-1).mean(-1)  # (layers, H)
    layer, head = divmod(own.argmax().item(), own.size(1))
    print(f"  layer {layer}, head {head}, counted from 0. A row is a query (-> what it predicts), "
          "a column a key:")
    print_attention(weights[layer, head], [f"-> {word}" for word in VOCABULARY.decode(written)],
                    digits)


def where_beams_help(model, examples, width, penalty):
    """Return (digits, words) of an example that beam search gets right and greedy gets wrong.

    If there is none, return the first one.
    """
    sequences = [digits for digits, _, _ in examples]
    greedy, beams = (translate(model, sequences, beam_width, penalty) for beam_width in (1, width))
    for (digits, words, _), one, other in zip(examples, greedy, beams):
        if one != words == other:
            return digits, words
    return examples[0][:2]


# --- 5. The run -----------------------------------------------------------------------
def main():
    device = prepare(globals())
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
    save_model(model, "encoder_decoder.pt", result["exact_match"], globals())
    examples = result["examples"]

    print(f"\n2. Beam search, with a new model after only {UNDERTRAINED_STEPS} steps: a likelier "
          "answer need not be correct")
    undertrained = EncoderDecoderTransformer(**model.arguments).to(device)
    optimizer, scheduler = create_optimizer(undertrained, LEARNING_RATE,
                                            NUM_EPOCHS * len(train_loader), WARMUP_STEPS)
    first_batches = list(itertools.islice(train_loader, UNDERTRAINED_STEPS))
    train_epoch(undertrained, first_batches, optimizer, scheduler, CLIP_NORM)
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
    check_tokens(tokens)
    model = load_model(EncoderDecoderTransformer, "encoder_decoder.pt", DEVICE)
    print(f"{' '.join(tokens)}  ->  {' '.join(translate(model, [tokens])[0])}")
    show_cross_attention(model, tokens)


if __name__ == "__main__":
    run_script(main, answer)
