"""
decoder_only.py - the GPT family: predict the next token from the tokens before it

THE IDEA.  Train a model on a single task: predict the next token. Any task that you can write
as a prompt and its answer becomes this task (Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners", GPT-2). To generate, append the prediction to the input and predict again.

    input     4      0      7    <SEP>   four   zero   seven

    [   embedding + position                                  ]
    [   2 layers: each position attends to itself and to the  ]
    [   positions before it (causal)                          ]

    label     .      .      .    four    zero   seven  <EOS>     . = not scored: digits are random

What it learns here: to continue `4 0 7 <SEP>` with `four zero seven`, and to stop with <EOS>.

New here: the causal mask, the key/value cache, and generation with many prompts at once and several
ways to choose a token. (tiny_gpt.py has the plain loop, in four lines.)

Run it:     python decoder_only.py        (about 25 seconds on one CPU core)
Try it:     python decoder_only.py 4 0 7                 (after the run)
Practice:   python exercises/practice.py start 7      (7 to 9, 11 to 13, 15 to 18, 23 to 26)

The last lines should be close to:

    Result on 601 held-out sequences
      next token, with teacher forcing          accuracy    100.0%
      digits to words, generated until <EOS>    exact match 100.0%
"""
import math

from housekeeping import BaseModel, load_model, prepare, run_script, save_model
import torch
import torch.nn.functional as F
from torch import nn

from toy_dataset import (EOS, IGNORE_INDEX, PAD, VOCABULARY, check_tokens, create_dataloaders,
                         print_attention, print_examples)
from training import batches, check_finite, create_optimizer, score

# =====================================================================================
# LEGEND   B  batch                              D  d_model: the size of a token's vector
#          T  queries: the new tokens            H  heads   K  D / H: the size of a head's vectors
#          S  keys: new and cached tokens        V  vocabulary size (26)
# =====================================================================================
# CONSTANTS - change one and run again. "Try" gives the final exact match over SEED 0 to 4.
# =====================================================================================
# The model
D_MODEL = 64             # size of a token's vector
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # number of layers
D_FF = 256               # hidden size of the feed-forward network
DROPOUT = 0.0            # share of numbers set to 0 against memorizing. Try 0.3: 55.9-75.2%.
# The task
NUM_SAMPLES = 6000       # distinct sequences, training plus validation
MAX_DIGITS = 5           # longest sequence
# The training
BATCH_SIZE = 64          # sequences per step
LEARNING_RATE = 3e-3     # at its peak. Try 1e-4: 99.8-100%.
WARMUP_STEPS = 40        # steps over which the learning rate rises to its peak
CLIP_NORM = 1.0          # a longer gradient is shortened to this length
NUM_EPOCHS = 8           # passes over the training data, 85 steps each. Try 1: 0.7-100%.
# The run
SEED = 0                 # weights, data, and sampling
DEVICE = "cpu"           # or "cuda", "mps"; the numbers in this file were measured on a CPU
# =====================================================================================


# --- 1. Building blocks ---------------------------------------------------------------
# The other two architecture scripts have copies of them. What is marked NEW is missing in
# encoder_only.py, which never generates token by token.
def attention(queries, keys, values, mask=None, dropout=0.0):
    """Return softmax(q k^T / sqrt(K)) v and the weights (Vaswani et al. 2017, section 3.2).

    queries (B, H, T, K), keys and values (B, H, S, K); mask broadcasts to (B, H, T, S), True = may
    attend. Each query is compared with each key, and the softmax turns a query's scores into
    weights that sum to 1. The result is the weighted average of the values:

        one query, three keys          scores  2.0  0.0  2.0   ->   weights  0.47  0.06  0.47
        with the third key masked                                   weights  0.88  0.12  0.00

    Why divide by sqrt(K)? q.k is a sum of K products. If the entries are independent with mean 0
    and variance 1, the sum has variance K, so a typical size of sqrt(K). The softmax of such large
    scores puts almost all weight on one key, and its gradient is almost 0 (attention_by_hand.py).
    """
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.size(-1))  # (B, H, T, S)
    if mask is not None:
        # subtle: not -inf. A query that may attend to nothing (padding on the left) would
        # become 0/0 = NaN. With the lowest finite number it gets an average that nothing uses.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return F.dropout(weights, dropout) @ values, weights  # (B, H, T, K), (B, H, T, S)


class MultiHeadAttention(nn.Module):
    """Attention in H heads in parallel, each with its own K = D / H dimensions.

    Queries are computed from x; keys and values are computed from memory, which is x itself in
    self-attention and another sequence in cross-attention (encoder_decoder.py). A query describes
    what a position looks for, a key what it offers, and a value the content that it passes on.

    Why heads? The weights of one softmax sum to 1, so one head that attends to two tokens gets a
    blend of both. Two heads can fetch each one separately, and w_o mixes what they found. Heads
    cost nothing: H matrices of D x K have as many weights as one of D x D.
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
        self.attention_function = attention  # train_all.py puts PyTorch's faster version here

    def split_heads(self, x):
        """(B, S, D) -> (B, H, S, K): split the D numbers of each token among H heads.

            token 0   0 1 2 3      view, transpose    head 0  [0 1] [4 5]    head 1  [2 3] [6 7]
            token 1   4 5 6 7      view(B, H, S, K)   head 0  [0 1] [2 3]    head 1  [4 5] [6 7]

        subtle: the second way has the same shape, but its heads mix up the tokens: head 0 gets all
        of token 0 and nothing of token 1.
        """
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
    """Adds to each token's vector a fixed vector that encodes the token's position.

    Why? Attention is a sum over keys, and a sum ignores order: without positions, an encoder gives
    `4 0 7` and `7 0 4` the same vectors in another order.

        PE[pos, 2i]   = sin(pos / 10000^(2i/D))
        PE[pos, 2i+1] = cos(pos / 10000^(2i/D))            Vaswani et al. 2017, section 3.5

    Why waves? Read each pair (sine, cosine) as the hand of a clock. The first hand turns by one
    radian per position, the last by about 1/7500 of that. Together they tell all positions apart,
    no number exceeds 1, and "n positions further" is the same rotation everywhere.
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


class FeedForward(nn.Module):
    """Two linear layers, applied to each position separately (Vaswani et al. 2017, section 3.3).

    What for? Attention only moves and averages what is there. This network computes something new
    from what has arrived at a position. It needs the nonlinearity in the middle, because two linear
    layers in a row equal one. GELU (Hendrycks and Gimpel 2016) is a smooth ReLU, max(0, x).
    """

    def __init__(self, d_model, d_ff, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)"""
        return self.down(self.dropout(F.gelu(self.up(x))))


# --- 2. New here: the cache and the causal mask ---------------------------------------
class KeyValueCache:
    """Stores one layer's keys and values of all tokens so far, so that each is computed only once.

    Later tokens never change an earlier key or value. In the first layer, a key depends on its own
    token only. Under the causal mask, the layer's output at a position depends on that position and
    the ones before it, so the same holds for the keys of the second layer, and of every layer after
    it. So each step after the prompt sends only the newest token through the layers.

    The price is memory: 2 * D numbers per token per layer. In LLaMA 7B (D = 4096, 32 layers, 16
    bits) that is 512 KiB per token. The cache is allocated up front, because growing it with
    torch.cat would copy everything at every step.
    """

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


def causal_mask(queries, keys, device=None):
    """Return (1, 1, queries, keys) booleans: each query may attend to keys up to its own position.

    The last query sits at the position of the last key. A cache makes more keys than queries:

        3 queries, 3 keys    # . .        2 queries, 5 keys    # # # # .
        (# True, . False)    # # .        (3 are cached)       # # # # #
                             # # #
    """
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask[None, None]  # (1, 1, queries, keys)


class DecoderLayer(nn.Module):
    """One GPT layer: causal self-attention, then a feed-forward network, each added to its input.

        x = x + attention(norm(x))
        x = x + feed_forward(norm(x))

    The residual connection `x +` lets a layer add to a token's vector instead of replacing it. It
    also gives gradients a direct path: the derivative of x + f(x) is 1 + f'(x). LayerNorm gives
    each token's vector mean 0 and variance 1, then applies a learned gain and shift, so that no
    part depends on how large the sum has become. It comes before each part, as in GPT-2 (pre-norm).
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
                 (Holtzman et al. 2020, section 3.1). It is large where the model is uncertain

    With probabilities 0.5, 0.3, 0.15, and 0.05, top_k=2 keeps two tokens. top_p=0.7 also keeps two,
    because the token that crosses p stays. top_p=0.5 keeps one.
    """
    # Shifting the largest logit to 0 does not change the softmax. It avoids overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    ordered, order = logits.sort(-1, descending=True)  # (B, V) each
    if top_k is not None:
        ordered[:, top_k:] = -math.inf
    if top_p is not None:
        probabilities = torch.softmax(ordered, -1)
        # subtle: a token stays if those *before* it sum to less than p. So the first always stays.
        before = probabilities.cumsum(-1) - probabilities
        ordered[before >= top_p] = -math.inf
    return ordered.scatter(-1, order, ordered)  # undo the sort: ordered[i] goes to token order[i]


def choose_next_token(logits, generated, temperature=0.0, top_k=None, top_p=None,
                      repetition_penalty=1.0, generator=None):
    """Return the next ids (B,), given their logits (B, V) and the ids generated so far (B, n).

    Temperature 0 is greedy: it takes the most likely token. A repetition_penalty above 1 lowers the
    probability of the tokens generated so far (Keskar et al. 2019, CTRL, section 4.1).
    """
    if repetition_penalty != 1.0:
        scores = logits.gather(1, generated)  # (B, n)
        # subtle: multiply negative logits. The paper divides them too, which rewards repetition.
        scores = torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
        logits = logits.scatter(1, generated, scores)  # (B, V)
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probabilities = torch.softmax(filter_logits(logits, temperature, top_k, top_p), -1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (B,)


# --- 4. The model and `generate` (the heart of this file) -----------------------------
class DecoderOnlyTransformer(BaseModel):
    """A causal transformer that predicts the next token at every position.

    BaseModel is an nn.Module that can save and load itself. guide/paper_and_code.md lists where
    this model differs from GPT-2 (Radford et al. 2019), and why.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256,
                 dropout=0.0, max_len=64):
        super().__init__(vocab_size=vocab_size, d_model=d_model, num_heads=num_heads,
                         num_layers=num_layers, d_ff=d_ff, dropout=dropout, max_len=max_len)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout)
                                    for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)  # pre-norm leaves the last sum unnormalized
        self.output = nn.Linear(d_model, vocab_size, bias=False)
        # Tied weights (Press and Wolf 2017): input and output share one matrix. A logit sums D
        # products of a normalized vector with these weights, so with std 0.02 its standard
        # deviation is sqrt(64) * 0.02 = 0.16, and the first loss is close to ln V = 3.26.
        # Try std=1.0: each token's own vector travels up the residuals, and times itself it gives
        # a logit of about D = 64. The model predicts that it repeats, at a loss close to 60.
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        # At the input, entries of 0.02 are tiny next to those of the positions, 0.7. So they are
        # multiplied by sqrt(D) = 8 (Vaswani et al. 2017, section 3.4). Without this factor,
        # training ends at 4-13% (SEED 0-2).
        self.embedding_scale = math.sqrt(d_model)

    def positions_of(self, tokens):
        """tokens (B, T) -> positions (B, T), counted from the first real token of each row.

        The padding in front gets position 0, which is harmless because nothing attends to it.
        """
        first = (tokens != PAD).int().argmax(1, keepdim=True)  # (B, 1): argmax finds the first 1
        return (torch.arange(tokens.size(1), device=tokens.device) - first).clamp(min=0)  # (B, T)

    def run_decoder(self, tokens, mask=None, positions=None, caches=None):
        """tokens (B, T) -> (B, T, D) and a list of each layer's attention weights (B, H, T, S)

        mask       (B, 1, 1, S), True = real token; None if there is no padding on the left
        positions  (B, T); if None, those of `positions_of` plus the number of cached tokens
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
        return self.output(self.run_decoder(tokens, mask)[0])  # (B, T, V)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None,
                 repetition_penalty=1.0, use_cache=True, stop_at=EOS, generator=None):
        """Continue each prompt (a list of ids) by at most `max_new_tokens`. Returns the new ids.

        See `choose_next_token` for the options. Each answer ends with its first `stop_at`, if any.
        Prompts are padded on the *left*, so that all answers start in the same column. Positions
        are counted from the first real token:

            column       0     1     2     3      4      5      6
            tokens     <PAD> <PAD>   9   <SEP>  nine   <EOS>    ?      (? is cut off at the end)
                         4     0     7   <SEP>  four   zero   seven
            positions    0     0     0     1      2      3      4
                         0     1     2     3      4      5      6
        """
        # Refuses wrong ids and prompts that are too long. The last new token is never an input.
        self.check_input(prompts, max_new_tokens - 1, max_new_tokens=max_new_tokens,
                         temperature=temperature, top_k=top_k, top_p=top_p,
                         repetition_penalty=repetition_penalty)
        n = max(map(len, prompts))
        tokens = torch.tensor([[PAD] * (n - len(prompt)) + prompt + [PAD] * max_new_tokens
                               for prompt in prompts], device=self.embedding.weight.device)
        real = tokens != PAD  # (B, n + max_new_tokens), as tokens
        real[:, n:] = True  # where the answers will be
        mask = None if real.all() else real[:, None, None]  # (B, 1, 1, n + max_new_tokens)
        positions = self.positions_of(tokens)
        caches = [layer.self_attention.new_cache(*tokens.shape)
                  for layer in self.layers] if use_cache else None
        with self.evaluation_mode():  # without dropout
            for end in range(n, n + max_new_tokens):
                past = caches[0].length if use_cache else 0  # send only what is not cached yet
                hidden, _ = self.run_decoder(
                    tokens[:, past:end], mask if mask is None else mask[..., :end],
                    positions[:, past:end], caches)  # (B, end - past, D)
                tokens[:, end] = choose_next_token(
                    self.output(hidden[:, -1]), tokens[:, n:end], temperature, top_k, top_p,
                    repetition_penalty, generator)
                if stop_at is not None and (tokens[:, n:end + 1] == stop_at).any(1).all():
                    break
        # Short answers keep growing until all have ended. Cut off what follows the first stop_at.
        answers = tokens[:, n:end + 1].tolist()
        return [ids[:ids.index(stop_at) + 1] if stop_at in ids else ids for ids in answers]


def translate(model, sequences, **options):
    """Translate lists of digits into lists of words by continuing `4 0 7 <SEP>`.

    options: see `generate`. The limit allows the longest answer, <EOS>, and one spare token.
    """
    prompts = [VOCABULARY.encode([*digits, "<SEP>"]) for digits in sequences]
    limit = max(map(len, prompts), default=1) + 1
    answers = model.generate(prompts, limit, **options)
    return [VOCABULARY.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in answers]


# --- 5. Training ----------------------------------------------------------------------
def logits_and_labels(model, batch):
    """Predict the tokens of one batch. Returns logits (B, T, V) and labels (B, T).

        pair           4   0   7   <SEP>   four   zero    seven
        pair_labels    .   .   .   four    zero   seven   <EOS>      . = IGNORE_INDEX

    The inputs are the correct tokens, whatever the model predicts (teacher forcing). The causal
    mask hides later inputs, and with them the labels, so one pass trains all labeled positions.
    `collate_fn` in toy_dataset.py has already shifted the labels. Do not shift them again here.
    """
    return model(batch["pair"]), batch["pair_labels"]  # (B, T, V), (B, T)


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


# --- 6. Sampling: a task with two right answers ---------------------------------------
OH = len(VOCABULARY)  # the id of one more word: "oh", which people also say for 0


def say_oh(batch, share=0.3):
    """Return a copy of `batch` in which a `share` of the zeros, drawn at random, is spoken "oh"."""
    zero = batch["pair_labels"] == VOCABULARY.ids["zero"]  # (B, T)
    said = zero & (torch.rand(zero.shape, device=zero.device) < share)
    pair = batch["pair"].clone()
    pair[:, 1:].masked_fill_(said[:, :-1], OH)  # the label at t is the input at t + 1
    return {**batch, "pair": pair, "pair_labels": batch["pair_labels"].masked_fill(said, OH)}


@torch.inference_mode()
def show_filters(model, prefix):
    """Print the distribution of the token after `prefix`, before and after each filter.

    The last column shows how many tokens are left: temperature keeps all, top_k keeps k, and top_p
    keeps more tokens when the distribution is flatter.
    """
    tokens = torch.tensor([VOCABULARY.encode(prefix)], device=model.embedding.weight.device)
    logits = model.eval()(tokens)[:, -1]  # (1, V)
    shown, names = logits[0].topk(5).indices.tolist(), [*VOCABULARY.tokens, "oh"]
    print(f"  the next token after: {prefix}")
    print(" " * 22 + "".join(f"{names[i]:>8s}" for i in shown) + "  others   tokens left")
    filters = {"unfiltered": {}, "temperature=0.5": {"temperature": 0.5},
               "temperature=2.0": {"temperature": 2.0}, "top_k=1": {"top_k": 1},
               "top_k=3": {"top_k": 3}, "top_p=0.6": {"top_p": 0.6}, "top_p=0.9": {"top_p": 0.9},
               "top_p=0.9 at t=2.0": {"temperature": 2.0, "top_p": 0.9}}
    for name, options in filters.items():
        probabilities = torch.softmax(filter_logits(logits, **options), -1)[0]  # (V,)
        cells = "".join(f"{probabilities[i].item():8.1%}" if probabilities[i] > 0 else "       -"
                        for i in shown)
        others = max(0.0, 1 - probabilities[shown].sum().item())
        print(f"  {name:20s}{cells}{others:8.1%}{(probabilities > 0).sum().item():10d}")


def show_sampling(model, pairs, copies=40):
    """Print how each strategy speaks the only 0 of each of the `pairs` (digits, words).

    A model is calibrated if it says "oh" as often as the data does. Unfiltered sampling is, but it
    also picks some of the many unlikely tokens. top_p removes them, and keeps both right ones.
    """
    zero = VOCABULARY.ids["zero"]
    print(f"  {'':20s}{'zero':>8s}{'oh':>8s}{'wrong':>8s}")
    print(f"  {'the data':20s}{'70.0%':>8s}{'30.0%':>8s}{'0.0%':>8s}")
    for name, options in {
            "greedy": {}, "temperature=0.5": {"temperature": 0.5},
            "temperature=1.0": {"temperature": 1.0}, "temperature=2.0": {"temperature": 2.0},
            "top_k=2": {"temperature": 1.0, "top_k": 2},
            "top_p=0.9": {"temperature": 1.0, "top_p": 0.9},
            "top_p=0.6": {"temperature": 1.0, "top_p": 0.6}}.items():
        prompts = [VOCABULARY.encode([*digits, "<SEP>"]) for digits, _ in pairs] * copies
        answers = model.generate(prompts, max(map(len, prompts)) + 1, **options)
        counts = {zero: 0, OH: 0}
        for (_, words), ids in zip(pairs * copies, answers):
            right = VOCABULARY.encode([*words, "<EOS>"])
            for word in counts:
                counts[word] += ids == [word if i == zero else i for i in right]
        shares = [counts[zero], counts[OH], len(answers) - counts[zero] - counts[OH]]
        print(f"  {name:20s}" + "".join(f"{share / len(answers):8.1%}" for share in shares))


# --- 7. Looking inside ----------------------------------------------------------------
@torch.inference_mode()
def show_attention(model, digits):
    """Print the attention of the head in which the query for word i attends most to digit i."""
    model.eval()
    n, prompt = len(digits), VOCABULARY.encode([*digits, "<SEP>"])
    written = model.generate([prompt], n + 2)[0]
    tokens = torch.tensor([prompt + written[:-1]], device=model.embedding.weight.device)  # (1, T)
    weights = torch.stack(model.run_decoder(tokens)[1])[:, 0]  # (layers, H, T, T)
    # The output at <SEP> predicts word 0, which corresponds to digit 0, and so on.
    own = weights[:, :, n:2 * n, :n].diagonal(dim1=-2, dim2=-1).mean(-1)  # (layers, H)
    layer, head = divmod(own.argmax().item(), own.size(1))
    print(f"  layer {layer}, head {head}, counted from 0. A row is a query (-> what it predicts), "
          "a column a key:")
    print_attention(weights[layer, head, n:], [f"-> {word}" for word in VOCABULARY.decode(written)],
                    VOCABULARY.decode(tokens[0]))


# --- 8. The run -----------------------------------------------------------------------
def main():
    device = prepare(globals())  # checks the constants, sets the seed
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
    save_model(model, "decoder_only.pt", result["exact_match"], globals())  # with the constants
    digits = [digits for digits, _, _ in result["examples"]]
    same = translate(model, digits, use_cache=False) == translate(model, digits)
    print(f"  with and without the cache, it gives the same answers: {same}")

    print("\n2. Sampling, when two answers are right: 0 is spoken \"zero\" (70%) or \"oh\" (30%)")
    speaker = DecoderOnlyTransformer(len(VOCABULARY) + 1, D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                                     DROPOUT).to(device)
    optimizer, scheduler = create_optimizer(speaker, LEARNING_RATE, NUM_EPOCHS * len(train_loader),
                                            WARMUP_STEPS)
    for _ in range(NUM_EPOCHS):
        train_epoch(speaker, train_loader, optimizer, scheduler, CLIP_NORM,
                    lambda model, batch: compute_loss(model, say_oh(batch)))
    show_filters(speaker, "4 0 7 <SEP> four")
    print("  each strategy on held-out sequences with one 0")
    pairs = [(d, words) for d, words, _ in result["examples"] if d.count("0") == 1][:100]
    if pairs:  # with very short sequences, there may be none
        show_sampling(speaker, pairs)

    print("\n3. Held-out examples, mistakes first")
    print_examples(result["examples"])

    print(f"\nResult on {len(result['examples'])} held-out sequences")
    print(f"  next token, with teacher forcing          accuracy    {result['accuracy']:6.1%}")
    print(f"  digits to words, generated until <EOS>    exact match {result['exact_match']:6.1%}")


def answer(tokens):
    """Translate `tokens` from the command line with the saved model."""
    check_tokens(tokens)
    model = load_model(DecoderOnlyTransformer, "decoder_only.pt", DEVICE)
    print(f"{' '.join(tokens)}  ->  {' '.join(translate(model, [tokens])[0])}")
    show_attention(model, tokens)


if __name__ == "__main__":
    run_script(main, answer)
