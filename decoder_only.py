"""
decoder_only.py - the GPT family: predict the next token from the tokens before it

THE IDEA.  Train a model on a single task: predict the next token. Every task that can be written as
a prompt and its answer becomes this task (Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners", GPT-2). To generate, append the prediction to the input and predict again.

    input     4      0      7    <SEP>   four   zero   seven

    [   embedding + position                                  ]
    [   2 layers: each position attends to itself and to the  ]
    [   positions before it (causal)                          ]

    label     .      .      .    four    zero   seven  <EOS>     . = not scored: digits are random

What it learns here: to continue `4 0 7 <SEP>` with `four zero seven`, and to stop with <EOS>.

New here: the causal mask, the key/value cache, and generation with many prompts at once and several
ways to choose a token. (tiny_gpt.py has the plain loop, in four lines.)

Run it:     python decoder_only.py        (about 14 seconds on one CPU core)
Try it:     python decoder_only.py 4 0 7                 (after the run)

The last lines should be close to:

    Result on 601 held-out sequences
      next token, with teacher forcing          accuracy    100.0%
      digits to words, generated until <EOS>    exact match 100.0%
"""
import copy
import math
import statistics
import time

from housekeeping import (CHECKPOINTS, check_arguments, check_constants, check_filters,
                          check_finite, check_known, check_model, check_rows, check_sequences,
                          choose_device, evaluation_mode, load_checkpoint, run_script,
                          save_checkpoint, save_model)
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_dataset import (DIGITS, EOS, IGNORE_INDEX, PAD, VOCABULARY, create_dataloaders,
                         exact_match, print_attention, print_examples, to_device)

# =====================================================================================
# LEGEND   B  batch                              D  d_model: the size of a token's vector
#          T  queries: the new tokens            H  heads   K  D / H: the size of a head's vectors
#          S  keys: new and cached tokens        V  vocabulary size (26)
# =====================================================================================
# CONSTANTS - change one, run again. Each "Try" gives the final exact match with SEED 0 to 4.
# =====================================================================================
# The model
D_MODEL = 64             # size of a token's vector
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # number of layers
D_FF = 256               # hidden size of the feed-forward network
DROPOUT = 0.0            # fraction of activations set to 0 in training. Try 0.3: 55.9-75.2%.
# The task
NUM_SAMPLES = 6000       # distinct sequences, training plus validation
MAX_DIGITS = 5           # longest sequence
# The training
BATCH_SIZE = 64          # rows per step
LEARNING_RATE = 3e-3     # its peak. Try 1e-4: 99.8-100%.
WARMUP_STEPS = 40        # steps in which the learning rate rises to its peak
CLIP_NORM = 1.0          # maximum norm of the gradient
NUM_EPOCHS = 8           # passes over the training data, 85 steps each. Try 1: 0.7-100%.
# The run
SEED = 0                 # weights, data, and sampling
DEVICE = "cpu"           # or "cuda", "mps"; the numbers in this file were measured on a CPU
NUM_THREADS = 1          # CPU threads
# =====================================================================================


# --- 1. New here: the causal mask and the cache ---------------------------------------
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


# --- 2. Building blocks ---------------------------------------------------------------
# KNOWN from encoder_only.py, except for what is marked NEW: positions in PositionalEncoding, and
# the cache in MultiHeadAttention. Read these, then continue reading at `DecoderLayer`.
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


class DecoderLayer(nn.Module):
    """One GPT layer: causal self-attention, then a feed-forward network, each added to its input.

    Only the causal mask (made in `decode`) and the cache distinguish it from EncoderLayer in
    encoder_only.py. It is pre-norm, as in Radford et al. 2019, section 2.3.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, cache=None):
        """x (B, T, D), mask as in `attention` -> (B, T, D) and the weights (B, H, T, S)

        With a cache, x holds only the new tokens.
        """
        normalized = self.norm1(x)
        attended, weights = self.self_attention(normalized, normalized, mask, cache)
        x = x + self.dropout(attended)  # subtle: add to x, not to `normalized`
        x = x + self.dropout(self.feed_forward(self.norm2(x)))
        return x, weights


# --- 3. Choosing a token --------------------------------------------------------------
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


# --- 4. The model and `generate` (the heart of this file) -----------------------------
class DecoderOnlyTransformer(nn.Module):
    """A causal transformer that predicts the next token at every position.

    Differs from GPT-2 (Radford et al. 2019): sinusoidal positions instead of learned ones; the
    embedding is scaled by sqrt(D); exact GELU instead of its tanh approximation; PyTorch's default
    initialization of the linear layers.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256,
                 dropout=0.0, max_len=64):
        super().__init__()
        self.arguments = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": num_heads,
                          "num_layers": num_layers, "d_ff": d_ff, "dropout": dropout,
                          "max_len": max_len}
        check_model(self.arguments)
        self.vocab_size, self.max_len = vocab_size, max_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout)
                                    for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)  # pre-norm leaves the last sum unnormalized
        self.output = nn.Linear(d_model, vocab_size, bias=False)
        # Tied weights, small for the output and scaled for the input, as in encoder_only.py.
        # (Without the factor sqrt(D), training ends at 4-13% exact match, SEED 0-2.) A logit sums D
        # products of a normalized vector with these weights, so its standard deviation is
        # sqrt(64) * 0.02 = 0.16, and the first loss is close to ln V = 3.26. With nn.Embedding's
        # default std of 1.0, the logit of the input token is about D = 64: its vector, kept by the
        # residuals, times itself. So the model predicts that it repeats, at a loss close to 60.
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.embedding_scale = math.sqrt(d_model)

    def positions_of(self, tokens):
        """tokens (B, T) -> positions (B, T), counted from the first real token of each row.

        Padding before it gets position 0. This is harmless, because nothing attends to padding.
        """
        first = (tokens != PAD).int().argmax(1, keepdim=True)  # (B, 1): argmax finds the first 1
        return (torch.arange(tokens.size(1), device=tokens.device) - first).clamp(min=0)  # (B, T)

    def decode(self, tokens, mask=None, positions=None, caches=None):
        """tokens (B, T) -> (B, T, D) and a list of each layer's attention weights (B, H, T, S)

        mask       (B, 1, 1, S), True = real token; None if there is no padding on the left
        positions  (B, T); None: those of `positions_of`, plus the number of cached tokens
        caches     one KeyValueCache per layer; `tokens` then has only the new tokens
        """
        past = caches[0].length if caches else 0
        new = tokens.size(1)
        if new > 1:  # a single new token may attend to everything so far
            causal = causal_mask(new, past + new, tokens.device)  # (1, 1, T, S)
            mask = causal if mask is None else causal & mask  # (B, 1, T, S)
        if positions is None:
            positions = past + self.positions_of(tokens)
        x = self.positional_encoding(self.embedding(tokens) * self.embedding_scale, positions)
        x = self.dropout(x)  # (B, T, D)
        all_weights = []
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, mask, caches[i] if caches else None)
            all_weights.append(weights)
        return self.final_norm(x), all_weights

    def forward(self, tokens, mask=None):
        """tokens (B, T) -> logits (B, T, V); the logits at position t predict token t + 1

        subtle: rows padded on the *right* need no padding mask. The padding comes after all real
        tokens, so the causal mask already hides it.
        """
        return self.output(self.decode(tokens, mask)[0])  # (B, T, V)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None,
                 repetition_penalty=1.0, use_cache=True, stop_at=EOS, generator=None):
        """Continue each prompt (a list of ids) by at most `max_new_tokens`. Returns the new ids.

        See `choose_next_token` for the options. Each row ends with its first `stop_at`, if any.
        Prompts are padded on the *left*, so that all rows continue in the same column, directly
        after their prompts. Positions are counted from the first real token of each row:

            column       0     1     2     3      4      5      6
            tokens     <PAD> <PAD>   9   <SEP>  nine   <EOS>    ?       (? is cut off at the end)
                         4     0     7   <SEP>  four   zero   seven
            positions    0     0     0     1      2      3      4
                         0     1     2     3      4      5      6
        """
        check_arguments(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, repetition_penalty=repetition_penalty)
        check_rows(prompts, self.vocab_size, self.max_len, max_new_tokens - 1)
        device = self.embedding.weight.device
        longest = max(len(prompt) for prompt in prompts)
        total = longest + max_new_tokens
        tokens = torch.full((len(prompts), total), PAD)
        for row, prompt in zip(tokens, prompts):
            row[longest - len(prompt):longest] = torch.tensor(prompt)
        tokens = tokens.to(device)  # (B, total)
        real = tokens != PAD
        real[:, longest:] = True  # still to be generated
        mask = None if real.all() else real[:, None, None, :]  # (B, 1, 1, total)
        positions = self.positions_of(tokens)  # (B, total)
        caches = None
        if use_cache:
            caches = [layer.self_attention.new_cache(len(prompts), total) for layer in self.layers]
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # (B,)
        with evaluation_mode(self):
            for end in range(longest, total):
                # The first step reads the whole prompt. With a cache, the others read one token.
                start = end - 1 if use_cache and end > longest else 0
                hidden, _ = self.decode(tokens[:, start:end],
                                        None if mask is None else mask[..., :end],
                                        positions[:, start:end], caches)  # (B, end - start, D)
                logits = self.output(hidden[:, -1])  # (B, V); only the last position is needed
                tokens[:, end] = choose_next_token(logits, tokens[:, longest:end], temperature,
                                                   top_k, top_p, repetition_penalty, generator)
                if stop_at is not None:
                    finished |= tokens[:, end] == stop_at
                    if finished.all():
                        break
        # Finished rows keep generating until all rows are finished. Cut the extra tokens off.
        return [cut_after(row, stop_at) for row in tokens[:, longest:end + 1].tolist()]

    def save(self, path):
        """Write arguments and weights to `path`, or raise OSError."""
        save_checkpoint(path, self)

    @classmethod
    def load(cls, path, device="cpu"):
        """Return the model that was saved at `path`, or raise InputError."""
        return load_checkpoint(path, cls, device)


def translate(model, sequences, **options):
    """Translate lists of digits into lists of words by continuing `4 0 7 <SEP>`.

    options: see `generate`. The limit allows the longest answer, <EOS>, and one spare token.
    """
    check_sequences(sequences)
    prompts = [VOCABULARY.encode([*digits, "<SEP>"]) for digits in sequences]
    written = model.generate(prompts, max(map(len, sequences)) + 2, **options)
    return [VOCABULARY.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in written]


# --- 5. Training ----------------------------------------------------------------------
def predict(model, batch):
    """Run the model on one batch. Returns logits (B, T, V) and labels (B, T).

        pair           4   0   7   <SEP>   four   zero    seven
        pair_labels    .   .   .   four    zero   seven   <EOS>      . = IGNORE_INDEX

    The inputs are the correct tokens, whatever the model predicts (teacher forcing). The causal
    mask hides later inputs, and with them the labels, so one pass trains all labeled columns.
    `collate_fn` in toy_dataset.py has already shifted the labels. Do not shift them again here.
    """
    return model(batch["pair"]), batch["pair_labels"]  # (B, T, V), (B, T)


# KNOWN from encoder_only.py. Continue reading at `most_uncertain`.
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


# --- 6. Looking inside ----------------------------------------------------------------
@torch.inference_mode()
def most_uncertain(model, loader):
    """Return the prefix in `loader` after which the next token has the highest entropy.

    Entropy measures uncertainty in nats: 0 if one token has probability 1, and ln V = 3.26 if all
    tokens are equally likely. Positions without a label are ignored.
    """
    model.eval()
    highest, prefix = -1.0, None
    for batch in loader:
        logits, labels = predict(model, to_device(batch, model.embedding.weight.device))
        log_p = torch.log_softmax(logits, -1)  # (B, T, V)
        entropy = -(log_p.exp() * log_p).sum(-1)  # (B, T)
        entropy = entropy.masked_fill(labels == IGNORE_INDEX, -1.0)
        if entropy.max().item() > highest:
            highest = entropy.max().item()
            row, position = divmod(entropy.argmax().item(), entropy.size(1))
            prefix = VOCABULARY.decode(batch["pair"][row, :position + 1])
    return prefix


@torch.inference_mode()
def show_filters(model, prefix):
    """Print the distribution of the token after `prefix`, before and after each filter.

    The last column shows how many tokens are left: temperature keeps all, top_k keeps k, and top_p
    keeps more tokens of a flatter distribution.
    """
    model.eval()
    tokens = torch.tensor([VOCABULARY.encode(prefix)], device=model.embedding.weight.device)
    logits = model(tokens)[:, -1]  # (1, V)
    shown = logits[0].topk(6).indices.tolist()
    print(f"  the next token after: {' '.join(prefix)}")
    print(" " * 22 + "".join(f"{VOCABULARY.tokens[i]:>8s}" for i in shown)
          + "  others   tokens left")
    filters = {"unfiltered": {}, "temperature=0.5": {"temperature": 0.5},
               "temperature=2.0": {"temperature": 2.0}, "top_k=1": {"top_k": 1},
               "top_k=3": {"top_k": 3}, "top_p=0.5": {"top_p": 0.5}, "top_p=0.9": {"top_p": 0.9},
               "top_p=0.9 at t=2.0": {"temperature": 2.0, "top_p": 0.9}}
    for name, options in filters.items():
        probabilities = torch.softmax(filter_logits(logits, **options), -1)[0]  # (V,)
        row = "".join(f"{probabilities[i].item():8.1%}" if probabilities[i] > 0 else "       -"
                      for i in shown)
        others = max(0.0, 1 - probabilities[shown].sum().item())
        print(f"  {name:20s}{row}{others:8.1%}{(probabilities > 0).sum().item():10d}")


def show_strategies(translate, model, digits, words, strategies, seed=0):
    """Print the exact match, diversity, and time of each strategy: {name: options of `translate`}.

    Diversity is the number of distinct answers in 20 tries, averaged over ten sequences. This task
    has one correct answer, so diversity means mistakes. In open-ended text, greedy generation tends
    to repeat itself, and diversity is wanted (Holtzman et al. 2020).
    """
    some = digits[::max(1, len(digits) // 10)][:10]
    print(f"  {'':34s}{'exact match':>12s}{'distinct of 20':>16s}{'ms per sequence':>17s}")
    for name, options in strategies.items():
        torch.manual_seed(seed)
        translate(model, digits[:2], **options)  # warm up
        start = time.perf_counter()
        written = translate(model, digits, **options)
        milliseconds = 1000 * (time.perf_counter() - start) / len(digits)
        counts = []
        for row in some:
            tries = translate(model, [row] * 20, **options)
            counts.append(len({" ".join(answer) for answer in tries}))
        print(f"  {name:34s}{exact_match(written, words):12.1%}{statistics.mean(counts):16.1f}"
              f"{milliseconds:17.3f}")


def show_repetition_penalty(model, digits, words):
    """Print the exact match under repetition penalties, which also suppress correct repetition."""
    repeats = [len(set(row)) < len(row) for row in digits]
    print(f"  {'':34s}{'all digits differ':>18s}{'a digit repeats':>18s}")
    for penalty in (1.0, 1.5, 3.0, 6.0):
        written = translate(model, digits, repetition_penalty=penalty)
        cells = ""
        for wanted in (False, True):
            pairs = [(a, b) for a, b, repeated in zip(written, words, repeats)
                     if repeated == wanted]
            cells += f"{exact_match(*zip(*pairs)):18.1%}" if pairs else f"{'-':>18s}"
        print(f"  repetition_penalty={penalty:<15}{cells}")


def time_generation(model, lengths, rounds=3):
    """Return {True: with cache, False: without}: lists of median seconds, one per length."""
    prompt = [VOCABULARY.encode("7 <SEP>")]
    model.generate(prompt, 8)  # warm up
    medians = {True: [], False: []}
    for length in lengths:
        seconds = {True: [], False: []}
        for use_cache in (True, False) * rounds:  # in turn, so that a slow moment slows both
            start = time.perf_counter()
            model.generate(prompt, length, use_cache=use_cache, stop_at=None)
            seconds[use_cache].append(time.perf_counter() - start)
        for use_cache, runs in seconds.items():
            medians[use_cache].append(statistics.median(runs))
    return medians


def show_cache(model, lengths=(32, 64, 128, 256)):
    """Print the time of generation with and without the cache.

    With the cache, the time grows almost linearly with the length. Without it, each token needs a
    pass over all previous tokens, so the speedup grows with the length.
    """
    seconds = time_generation(model, lengths)
    print("  tokens    with cache   without    speedup")
    for length, cached, uncached in zip(lengths, seconds[True], seconds[False]):
        print(f"  {length:6d}   {cached:8.3f} s {uncached:8.3f} s {uncached / cached:9.1f}")


@torch.inference_mode()
def show_attention(model, digits):
    """Print the attention of the head in which the query for word i attends most to digit i."""
    model.eval()
    n, prompt = len(digits), VOCABULARY.encode([*digits, "<SEP>"])
    written = model.generate([prompt], n + 2)[0]
    tokens = torch.tensor([prompt + written[:-1]], device=model.embedding.weight.device)  # (1, T)
    weights = torch.stack(model.decode(tokens)[1])[:, 0]  # (layers, H, T, T)
    # The output at <SEP> predicts word 0, which corresponds to digit 0, and so on.
    own = weights[:, :, n:2 * n, :n].diagonal(dim1=-2, dim2=-1).mean(-1)  # (layers, H)
    layer, head = divmod(own.argmax().item(), own.size(1))
    print(f"  layer {layer}, head {head}; rows are queries (-> the token predicted), columns keys:")
    print_attention(weights[layer, head, n:], [f"-> {word}" for word in VOCABULARY.decode(written)],
                    VOCABULARY.decode(tokens[0]))


# --- 7. The run -----------------------------------------------------------------------
def main():
    check_constants(globals())
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
    model = DecoderOnlyTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                                   DROPOUT).to(device)
    print(f"decoder-only: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(train_loader.dataset)} training and {len(val_loader.dataset)} held-out sequences")
    print(f"loss before step 1: {evaluate(model, val_loader)['loss']:.3f}; a uniform guess among "
          f"{len(VOCABULARY)} tokens costs ln {len(VOCABULARY)} = {math.log(len(VOCABULARY)):.3f}")

    print("\n1. Training: predict the next token; only the answer counts")
    optimizer, scheduler = create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader),
                                            WARMUP_STEPS)
    for epoch in range(1, NUM_EPOCHS + 1):
        train_loss = train_epoch(model, train_loader, optimizer, scheduler, CLIP_NORM)
        result = evaluate(model, val_loader)
        print(f"  epoch {epoch:2d}   train loss {train_loss:.4f}   "
              f"validation loss {result['loss']:.4f}   exact match {result['exact_match']:6.1%}")
        if epoch == 1:
            undertrained = copy.deepcopy(model)  # still uncertain, with a high learning rate
    save_model(model, CHECKPOINTS / "decoder_only.pt")

    print("\n2. What each filter leaves of a distribution (after epoch 1, most uncertain position)")
    show_filters(undertrained, most_uncertain(undertrained, val_loader))

    print("\n3. The strategies, with the same model: exact match and diversity")
    digits = [digits for digits, _, _ in result["examples"][::3]]  # a third, to save time
    words = [words for _, words, _ in result["examples"][::3]]
    show_strategies(translate, undertrained, digits, words,
                    {"greedy": {}, "temperature 0.5": {"temperature": 0.5},
                     "temperature 1": {"temperature": 1.0}, "temperature 2": {"temperature": 2.0},
                     "top_k 3": {"temperature": 1.0, "top_k": 3},
                     "top_p 0.9": {"temperature": 1.0, "top_p": 0.9}}, SEED)
    print("  greedy, with a repetition penalty")
    show_repetition_penalty(undertrained, digits, words)

    print("\n4. What the key/value cache saves (random weights: the time does not depend on them)")
    show_cache(DecoderOnlyTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                                      max_len=260).to(device))

    print("\n5. Held-out examples, mistakes first")
    print_examples(result["examples"])

    print(f"\nResult on {len(result['examples'])} held-out sequences")
    print(f"  next token, with teacher forcing          accuracy    {result['accuracy']:6.1%}")
    print(f"  digits to words, generated until <EOS>    exact match {result['exact_match']:6.1%}")


def answer(tokens):
    """Translate `tokens` from the command line with the saved model."""
    check_known(tokens, DIGITS, "python decoder_only.py 4 0 7")
    model = DecoderOnlyTransformer.load(CHECKPOINTS / "decoder_only.pt", choose_device(DEVICE))
    print(f"{' '.join(tokens)}  ->  {' '.join(translate(model, [tokens])[0])}")
    show_attention(model, tokens)


if __name__ == "__main__":
    run_script(main, answer)
