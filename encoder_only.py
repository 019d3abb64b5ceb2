"""
encoder_only.py - the BERT family: read everything at once, fill in the blanks

THE IDEA.  Hide some tokens of a sentence and let a model guess them from what stands on *both* sides. To guess well
it must understand the rest; what it has understood can then be used for other things, by putting a small head on top
(Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding").

    4   0   7 <SEP> four <MASK> seven          tokens, one hidden
    |   |   |   |    |     |      |
    [   embedding + position         ]         each token becomes a vector of D numbers
    [   EncoderLayer: every position ]
    [   looks at every other         ]  x 2    no direction, no order of writing
    |   |   |   |    |     |      |
                         "zero"                a guess for the hidden one: softmax over all 26 tokens

It learns here:  to fill blanks in `digits <SEP> words` (masked language modelling), which makes it translate digits
to words by filling all the words at once, and with the same weights words to digits, for which a model that reads
from left to right would need a training of its own; then, by fine-tuning, to say which digit of a row is the largest.

What it cannot do: write freely. It fills the blanks it is given, so it must be told how many words to write: one
blank a digit. Keep that in mind wherever its score stands beside those of the other two.

Run it:     python encoder_only.py        (about 16 seconds on one CPU core)

The last lines should be close to:

    Result on 599 unseen sequences
      digits to words, all blanks in one pass (told how many)   exact match 100.0%
      words to digits, the same weights                         exact match 100.0%
      which is the largest number?                              right       100.0%
    saved checkpoints/encoder_only.pt

READING ORDER   positions -> attention -> feed-forward -> layer -> model -> masking (what is new here) -> translating
                -> training -> classifier -> main
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toy_dataset import (CHECKPOINTS, FIRST_ORDINARY, IGNORE_INDEX, MASK, SEP, VOCABULARY, InputError, check_constants,
                         check_loss, check_tokens, choose_device, create_dataloaders, load_checkpoint, pad_rows, PAD,
                         padding_mask, print_examples, report_saved, run_script, save_checkpoint, to_device)

# =====================================================================================
# LEGEND   B  batch                      D  d_model: width of a token's vector
#          S  length of a row (pair)     H  heads
#          T  positions that ask; here   K  D / H: width of one head
#             always the same S          V  vocabulary size (26)
# =====================================================================================

# =====================================================================================
# CONSTANTS - change one, run again. What a "Try" gives is the exact match at the end, measured with SEED 0 and 1.
# =====================================================================================
# The model
D_MODEL = 64             # width of a token's vector. Try 16: 99.8 to 100 %, in twice the epochs.
NUM_HEADS = 4            # must divide D_MODEL. Try 1: 100 %, a little later.
NUM_LAYERS = 2           # Try 1: 13 to 17 %, see `alignment` for the reason.
D_FF = 256               # inner width of the feed-forward; 4 * D_MODEL since 2017. Try 64: 100 %.
DROPOUT = 0.0            # share of activations set to 0 in training. Try 0.1: 100 %, later; 0.3: 46 to 82 %.
# The task
NUM_SAMPLES = 6000       # distinct sequences, training and validation together. Try 1000: 4 to 41 %, too few steps.
MAX_DIGITS = 5           # longest sequence. Try 8: 100 %.
MASK_SHARE = 0.8         # of the selected tokens: become <MASK>. Try 1.0, and RANDOM_SHARE 0.0: 99.7 to 100 %, slowly.
RANDOM_SHARE = 0.1       # of the selected tokens: become a random one; the rest, 0.1, stays as it is.
MIN_MASKING_RATE = 0.15  # a row's share of selected tokens is drawn between this and 1 (BERT: 0.15, fixed). Try 1.0: 100 %.
# The training
BATCH_SIZE = 64          # rows per step. Try 256: a quarter of the steps, 99.3 to 100 %.
LEARNING_RATE = 3e-3     # at its peak. Try 1e-4, usual for far larger models: 2.5 %. Try 3e-2: 0.7 %.
WARMUP_STEPS = 40        # steps in which the rate climbs to its peak. Try 0: 100 %; pre-norm does not need it here.
CLIP_NORM = 1.0          # longest gradient that a step may follow. Try 100.0, no clipping: 100 %.
NUM_EPOCHS = 8           # passes over the training data, 85 steps each. Try 2: 95 to 96 %; 1: 1 to 3 %.
FINETUNE_EPOCHS = 4      # the same for the classifier. Try 1: 99.2 to 99.3 % right.
FINETUNE_LEARNING_RATE = 1e-3
# The run
SEED = 0                 # weights, data and blanks. Try 1: every claim should survive it.
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


# -------------------------------------------------------------------------------------
# 2. The model
# -------------------------------------------------------------------------------------
class EncoderOnlyTransformer(nn.Module):
    """Embedding, layers, and a guess at every position.

    Departs from Devlin et al. 2019: pre-norm for post-norm; sinusoidal positions for learned ones (nothing to learn
    for lengths that training has shown rarely); no segment embedding, since <SEP> already tells the two sides apart; no
    next-sentence prediction, which later work found useless (Liu et al. 2019, RoBERTa, section 4.2); no extra dense
    layer before the output.
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
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        # A pre-norm stack adds and adds and never norms its sum; without this last norm the logits grow with depth.
        self.final_norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size)
        # Tied (Press and Wolf 2017): one table says what a token means on the way in and on the way out. A logit is then
        # how well the vector at a position matches a token's own embedding.
        self.output.weight = self.embedding.weight
        # Small, so that the first guesses are near uniform and the first loss near ln V = 3.26.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def encode(self, tokens, mask=None, need_weights=False):
        """tokens (B, S), mask (B, 1, 1, S) or None to hide just <PAD> -> vectors (B, S, D) that know their context,
        and a list with each layer's attention weights (B, H, S, S), or None in their place.

        Raises InputError for ids outside the vocabulary, rows too long, and rows of nothing but padding.
        """
        check_tokens(tokens, self.vocab_size, self.max_len)
        if mask is None:
            mask = padding_mask(tokens)                                                  # (B, 1, 1, S)
        # sqrt(D) as in Vaswani et al. 2017, section 3.4. Embeddings start at a size of 0.02, positions have 0.7: unscaled,
        # a token drowns in where it stands. Try removing the factor: 8 epochs then end at 0.0 to 0.2 % exact match.
        x = self.positional_encoding(self.embedding(tokens) * self.embedding_scale)      # (B, S, D)
        x = self.dropout(x)                                                              # (B, S, D)
        all_weights = []
        for layer in self.layers:
            # No causal mask: as a network, that is the whole difference to decoder_only.py.
            x, weights = layer(x, mask, need_weights)                                    # (B, S, D), (B, H, S, S)
            all_weights.append(weights)
        return self.final_norm(x), all_weights if need_weights else None

    def forward(self, tokens, mask=None):
        """tokens (B, S) -> logits (B, S, V): at every position, also the unmasked, a guess at the token there."""
        return self.output(self.encode(tokens, mask)[0])                                 # (B, S, V)

    def save(self, path):
        """Write arguments and weights to `path`, all or nothing. Raises OSError."""
        save_checkpoint(path, self)

    @classmethod
    def load(cls, path, device="cpu"):
        """The model that was saved at `path`. Raises InputError if there is none that fits."""
        return load_checkpoint(path, cls, device)


# --- NEW HERE: masked language modelling ---------------------------------------------
# -------------------------------------------------------------------------------------
# 3. What it is trained on: making the blanks
# -------------------------------------------------------------------------------------
def mask_tokens(tokens, generator=None):
    """Hide tokens for the model to guess. tokens (B, S) -> corrupted (B, S), labels (B, S).

    Labels hold the original token where one was selected and IGNORE_INDEX elsewhere: the loss asks about nothing else.
    Of the selected tokens 80 % become <MASK>, 10 % a random digit or word, 10 % stay (Devlin et al. 2019, section 3.1):

        4 0 7 <SEP> four  zero  seven      original
                    x     x     x          selected
        4 0 7 <SEP> <MASK> three seven     corrupted: blank, random, kept
        . . .   .   four  zero  seven      labels

    Why not <MASK> always: a fine-tuned model reads text without any, and one trained to answer at <MASK> alone has no
    reason to know anything at the other positions; so now and then a token is wrong, or right, and still asked for.
    Random tokens are digits and words, never special ones: those would be wrong at a glance. (Filling blanks, as here,
    it matters less: with <MASK> always, 8 epochs end at 99.7 to 100 %, only more slowly.)

    Departs from BERT in what is selected. Digits and words say the same thing twice, so one side is picked by a coin
    for each row and blanks are made there only; with a digit *and* its word hidden, nobody could know either. And
    each row draws its own rate up to 1: at BERT's fixed 15 % the model would hardly ever meet a row with all words blank,
    which is exactly what translating asks of it. (Measured at 15 %: 93 % exact match instead of 100, 81 % backwards.)
    """
    device = tokens.device

    def rand(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    batch, length = tokens.shape
    on_the_right = (tokens == SEP).cumsum(1) > 0                                         # (B, S) <SEP> and after
    side = rand(batch, 1) < 0.5                                                          # (B, 1) True: hide words
    candidates = (tokens >= FIRST_ORDINARY) & (on_the_right == side)                     # (B, S) no special tokens
    rate = MIN_MASKING_RATE + (1 - MIN_MASKING_RATE) * rand(batch, 1)                    # (B, 1)
    # The candidate with the lowest number is always selected: a row without blanks teaches nothing, and a batch
    # without any has a loss of 0/0 = NaN.
    draw = rand(batch, length).masked_fill(~candidates, 2.0)                             # (B, S)
    selected = candidates & (draw <= torch.maximum(rate, draw.amin(1, keepdim=True)))    # (B, S)

    # One draw decides among the three, so that the shares add up to 1. The mistake to avoid: a first draw for <MASK>
    # at 0.8, then a second for random at 0.1 among all selected; that overwrites blanks and keeps too few.
    action = rand(batch, length)                                                         # (B, S)
    blank = selected & (action < MASK_SHARE)                                             # (B, S)
    swap = selected & (action >= MASK_SHARE) & (action < MASK_SHARE + RANDOM_SHARE)      # (B, S)
    random_tokens = torch.randint(FIRST_ORDINARY, len(VOCABULARY), tokens.shape, generator=generator,
                                  device=device)                                         # (B, S)
    corrupted = torch.where(swap, random_tokens, tokens.masked_fill(blank, MASK))        # (B, S)
    labels = tokens.masked_fill(~selected, IGNORE_INDEX)                                 # (B, S)
    return corrupted, labels


def predict(model, batch):
    """One batch through the model -> logits (B, S, V) and labels (B, S).

    In training the blanks are drawn anew each time, so a row is a new exercise in every epoch. In evaluation
    (model.eval()) all words are blank, as when translating: no chance in it, and the loss is comparable with the other
    two architectures': nats per word.
    """
    tokens = batch["pair"]                                                               # (B, S)
    if model.training:
        corrupted, labels = mask_tokens(tokens)                                          # 2 x (B, S)
    else:
        words = (tokens >= FIRST_ORDINARY) & ((tokens == SEP).cumsum(1) > 0)             # (B, S)
        corrupted, labels = tokens.masked_fill(words, MASK), tokens.masked_fill(~words, IGNORE_INDEX)
    return model(corrupted, batch["pair_mask"]), labels                                  # (B, S, V), (B, S)


# -------------------------------------------------------------------------------------
# 4. Using it: fill the blanks
# -------------------------------------------------------------------------------------
@torch.inference_mode()
def fill_blanks(model, rows):
    """rows: lists of tokens, some of them "<MASK>" -> the same rows with each blank replaced by the likeliest token.

    All blanks of a row are filled in one pass, independently: no blank knows what was put into its neighbour. That is
    why it is fast, and why such models are poor at free text, where word two depends on the choice of word one.
    Raises InputError for no rows or an empty one.
    """
    if not rows or not all(rows):
        raise InputError("there is nothing to fill: give at least one row, with at least one token in each")
    model.eval()
    device = next(model.parameters()).device
    tokens = pad_rows([VOCABULARY.encode(row) for row in rows], PAD).to(device)          # (B, S)
    filled = torch.where(tokens == MASK, model(tokens).argmax(-1), tokens).tolist()      # (B, S)
    return [VOCABULARY.decode(ids[:len(row)]) for ids, row in zip(filled, rows)]


def translate(model, sequences):
    """Lists of digits -> lists of words: `4 0 7 <SEP> <MASK> <MASK> <MASK>`, one pass for all words of all rows.

    The number of words is given away by the number of blanks. The other two models have to find out themselves.
    """
    if not sequences or not all(sequences):
        raise InputError("there is nothing to translate: give at least one sequence, with at least one digit in each")
    filled = fill_blanks(model, [[*digits, "<SEP>"] + ["<MASK>"] * len(digits) for digits in sequences])
    return [row[len(digits) + 1:] for row, digits in zip(filled, sequences)]


def translate_back(model, sequences):
    """Lists of words -> lists of digits: `<MASK> <MASK> <MASK> <SEP> four zero seven`. The same weights, the other way.

    A causal model trained on digits, then words, cannot be asked this: where a digit stands it has not yet seen the words.
    """
    filled = fill_blanks(model, [["<MASK>"] * len(words) + ["<SEP>", *words] for words in sequences])
    return [row[:len(words)] for row, words in zip(filled, sequences)]
# --- end of what is new --------------------------------------------------------------


# -------------------------------------------------------------------------------------
# 5. Training
# -------------------------------------------------------------------------------------
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


# --- NEW HERE: fine-tuning a classifier ----------------------------------------------
# -------------------------------------------------------------------------------------
# 6. What BERT is used for: a small head on a pretrained model
# -------------------------------------------------------------------------------------
# Pretraining pays where text is plentiful and labels are rare. Here labels are plentiful too, so `main` trains the same
# classifier on an untrained encoder beside it: look at both columns before you believe that it helped.
class LargestDigitClassifier(nn.Module):
    """`4 0 7` -> 7. A pretrained encoder, one vector for the whole row, one linear layer: 650 new weights at D = 64.

        4   0   7  <PAD>          tokens
        v4  v0  v7   -            what the encoder makes of them, a vector each
        (v4 + v0 + v7) / 3        one vector: the mean over real tokens
        logits for 0 ... 9        the head

    Departs from Devlin et al. 2019, who read the vector of an extra [CLS] token: here the vectors of all real tokens
    are averaged, which needs no extra token and shows a mistake worth knowing (see `forward`).
    """

    def __init__(self, encoder, num_classes=10):
        super().__init__()
        # A copy: fine-tuning changes the encoder too, and the original should still be able to fill blanks.
        self.encoder = copy.deepcopy(encoder)
        self.head = nn.Linear(encoder.arguments["d_model"], num_classes)

    def forward(self, tokens, mask=None):
        """tokens (B, S) -> logits (B, 10)."""
        if mask is None:
            mask = padding_mask(tokens)                                                  # (B, 1, 1, S)
        hidden, _ = self.encoder.encode(tokens, mask)                                    # (B, S, D)
        real = mask[:, 0, 0, :, None]                                                    # (B, S, 1)
        # subtle: hidden.mean(1) would average the padding too. Then what a row is answered depends on how long its
        # neighbours in the batch happen to be. Nothing crashes, and the score stays at 100 %: only a test finds it.
        pooled = (hidden * real).sum(1) / real.sum(1)                                    # (B, D)
        return self.head(pooled)                                                         # (B, 10)


def classifier_loss(classifier, batch):
    """Mean cross-entropy in nats of the largest digit. Of five digits the largest is a 9 in four rows of ten."""
    return F.cross_entropy(classifier(batch["source"], batch["source_mask"]), batch["largest"])


@torch.no_grad()
def evaluate_classifier(classifier, loader):
    """Share of `loader`'s sequences whose largest digit is named."""
    classifier.eval()
    device = next(classifier.parameters()).device
    right = 0
    for batch in loader:
        on_device = to_device(batch, device)
        guesses = classifier(on_device["source"], on_device["source_mask"]).argmax(-1)   # (B,)
        right += (guesses == on_device["largest"]).sum().item()
    return right / len(loader.dataset)
# --- end of what is new --------------------------------------------------------------


# -------------------------------------------------------------------------------------
# 7. Looking inside
# -------------------------------------------------------------------------------------
@torch.inference_mode()
def show_blank(model, text):
    """Print the model's five best guesses for the first <MASK> in `text`; there must be one.

    The guesses are a softmax over all 26 tokens: nothing tells the model that on this side only digits make sense. That
    it gives special tokens and the other side's words next to no probability, it has learned.
    """
    model.eval()
    tokens = torch.tensor([VOCABULARY.encode(text)], device=next(model.parameters()).device)  # (1, S)
    position = tokens[0].tolist().index(MASK)
    probabilities = torch.softmax(model(tokens)[0, position], -1)                        # (V,)
    best = probabilities.topk(5)
    guesses = [f"{VOCABULARY.tokens[i]} {p:.1%}" for p, i in zip(best.values.tolist(), best.indices.tolist())]
    print(f"  {text:34s} {'   '.join(guesses)}")


@torch.inference_mode()
def alignment(model, loader):
    """For each layer and head: how often a blank word looks most at the digit it stands for. (layers, heads), 0..1.

    Over all words of `loader`, all words blank. Expect the last layer to do the looking: where a blank has to look depends
    on how many digits there are, and that it must find out first. One layer is therefore not enough (NUM_LAYERS = 1).
    """
    model.eval()
    device = next(model.parameters()).device
    hits, total = 0, 0
    for batch in loader:
        tokens = batch["pair"].to(device)                                                # (B, S)
        is_word = (tokens >= FIRST_ORDINARY) & ((tokens == SEP).cumsum(1) > 0)           # (B, S)
        _, all_weights = model.encode(tokens.masked_fill(is_word, MASK), need_weights=True)
        looked_at = torch.stack(all_weights).argmax(-1)                                  # (layers, B, H, S)
        # In a row of n digits, word number i stands n + 1 places behind digit number i:  4 0 7 <SEP> four: 0 and 4.
        digits = (tokens == SEP).int().argmax(1, keepdim=True)                           # (B, 1) = n
        expected = torch.arange(tokens.size(1), device=device) - digits - 1              # (B, S)
        hit = (looked_at == expected[:, None]) & is_word[:, None]                        # (layers, B, H, S)
        hits = hits + hit.sum((1, 3))                                                    # (layers, H)
        total += is_word.sum().item()
    return hits / total                                                                  # (layers, H)


@torch.inference_mode()
def show_attention(model, loader, digits):
    """Print which digit each blank word of `digits` looks at, in the head where words follow their digits most.

    That head was picked because it shows the pattern; the table of all heads is printed first, so that you see what was
    picked from. Attention weights say where a layer has looked, not what it has understood (Jain and Wallace 2019).
    """
    shares = alignment(model, loader)                                                    # (layers, H)
    layer, head = divmod(shares.argmax().item(), shares.size(1))
    print("  share of unseen words whose blank looks most at its own digit, for each layer and head:")
    for number, row in enumerate(shares.tolist()):
        print(f"    layer {number}   " + "   ".join(f"head {h}: {share:6.1%}" for h, share in enumerate(row)))
    row = [*digits, "<SEP>"] + ["<MASK>"] * len(digits)
    tokens = torch.tensor([VOCABULARY.encode(row)], device=next(model.parameters()).device)  # (1, S)
    weights = model.encode(tokens, need_weights=True)[1][layer][0, head]                 # (S, S)
    print(f"  layer {layer}, head {head}; rows ask, columns are asked, each row sums to 1:")
    print(" " * 14 + "".join(f"{token:>8s}" for token in row))
    for i in range(len(digits) + 1, len(row)):
        print(f"  {'blank ' + str(i - len(digits)):12s}" + "".join(f"{weight:8.2f}" for weight in weights[i].tolist()))


# -------------------------------------------------------------------------------------
# 8. The run
# -------------------------------------------------------------------------------------
def main():
    check_constants(globals())
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
    model = EncoderOnlyTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT,
                                   max_len=max(64, 2 * MAX_DIGITS + 1)).to(device)
    print(f"encoder-only: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_loader.dataset)} "
          f"sequences to train on, {len(val_loader.dataset)} unseen ones to be measured on")

    print("\n1. Pretraining: fill the blanks (validation: all words blank)")
    optimizer, scheduler = create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader))
    for epoch in range(1, NUM_EPOCHS + 1):
        train_loss = train_epoch(model, train_loader, optimizer, scheduler)
        result = evaluate(model, val_loader)
        print(f"  epoch {epoch:2d}   train loss {train_loss:.4f}   validation loss {result['loss']:.4f}   "
              f"exact match {result['exact_match']:6.1%}")
    digits = [list(sequence) for sequence, _, _ in result["examples"]]
    words = [expected for _, expected, _ in result["examples"]]
    backwards = translate_back(model, words)
    back_score = sum(a == b for a, b in zip(backwards, digits)) / len(digits)

    print("\n2. Fine-tuning: which is the largest number? Beside it, the same from an untrained encoder")
    untrained = EncoderOnlyTransformer(**model.arguments).to(device)
    classifiers = [LargestDigitClassifier(encoder).to(device) for encoder in (model, untrained)]
    optimizers = [create_optimizer(c, FINETUNE_LEARNING_RATE, FINETUNE_EPOCHS * len(train_loader)) for c in classifiers]
    for epoch in range(1, FINETUNE_EPOCHS + 1):
        losses, scores = [], []
        for classifier, (optimizer, scheduler) in zip(classifiers, optimizers):
            losses.append(train_epoch(classifier, train_loader, optimizer, scheduler, classifier_loss))
            scores.append(evaluate_classifier(classifier, val_loader))
        print(f"  epoch {epoch:2d}   pretrained: train loss {losses[0]:.4f}, right {scores[0]:6.1%}   "
              f"untrained: train loss {losses[1]:.4f}, right {scores[1]:6.1%}")

    print("\n3. One blank, five best guesses")
    example = max(digits, key=len)
    pair = example + ["<SEP>"] + translate(model, [example])[0]
    for hidden in (1, len(example) + 2):
        if hidden < len(pair):
            show_blank(model, " ".join(pair[:hidden] + ["<MASK>"] + pair[hidden + 1:]))

    print("\n4. Who looks at whom")
    show_attention(model, val_loader, example)

    print("\n5. Examples, none of them seen in training, mistakes first")
    print_examples(result["examples"])
    print("  and backwards")
    print_examples(sorted(zip(words, digits, backwards), key=lambda e: e[1] == e[2]), 2)

    print(f"\nResult on {len(digits)} unseen sequences")
    print(f"  digits to words, all blanks in one pass (told how many)   exact match {result['exact_match']:6.1%}")
    print(f"  words to digits, the same weights                         exact match {back_score:6.1%}")
    print(f"  which is the largest number?                              right       {scores[0]:6.1%}")
    report_saved(model, CHECKPOINTS / "encoder_only.pt")


if __name__ == "__main__":
    run_script(main)
