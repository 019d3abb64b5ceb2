"""
encoder_only.py - the BERT family: predict masked tokens from the tokens before and after them

THE IDEA.  Replace some tokens of a text with <MASK> and train a model to predict them from the
tokens before *and* after them. To do this well, the model must use the rest of the text. It can
then be fine-tuned (trained further) for other tasks, with a small layer on top (Devlin et al. 2019,
"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding").

    4   0   7 <SEP> four <MASK> seven          tokens, one of them masked
    |   |   |   |    |     |      |
    [   embedding + position         ]         each token becomes a vector of D numbers
    [   2 layers: every position     ]
    [   attends to all positions     ]         in both directions
    |   |   |   |    |     |      |
                         "zero"                its prediction: a softmax over all 26 tokens

What it learns here: masked language modeling on `digits <SEP> words`. With all words masked, the
model translates digits to words in one pass. With all digits masked, the same weights translate
words to digits. The model is then fine-tuned to decide whether the words match the digits.

What it cannot do: choose the length of its output. It fills the masks that it is given, one per
digit. Keep this in mind when you compare its score with decoder_only.py and encoder_decoder.py.

Run it:     python encoder_only.py        (about 25 seconds on one CPU core)
Try it:     python encoder_only.py 4 0 7           (after the run; digits to words)
            python encoder_only.py four zero seven                 (words to digits)
Practice:   python exercises/practice.py start 10     (10, 14, 21, 22)

The last lines should be close to:

    Result on 601 held-out sequences
      digits to words, length given        exact match 100.0%
      words to digits, the same weights    exact match 100.0%
      do the words match? pretrained       correct      93.7%
      from scratch, the same total steps   correct      51.9%
"""
import copy
import functools
import math

from housekeeping import BaseModel, load_model, prepare, run_script, save_model
import torch
import torch.nn.functional as F
from torch import nn

from toy_dataset import (DIGITS, FIRST_ORDINARY, IGNORE_INDEX, MASK, PAD, SEP, VOCABULARY, WORDS,
                         check_tokens, create_dataloaders, exact_match, pad_rows, padding_mask,
                         print_attention, print_examples)
from training import batches, check_finite, check_warmup, create_optimizer, score

# =====================================================================================
# LEGEND   B  batch                              D  d_model: the size of a token's vector
#          S  keys: all positions of a row       H  heads   K  D / H: the size of a head's vectors
#          T  queries (here, T = S)              V  vocabulary size (26)
# =====================================================================================
# CONSTANTS - change one and run again. "Try" gives the final exact match over SEED 0 to 4.
# =====================================================================================
# The model
D_MODEL = 64             # size of a token's vector
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # number of layers. Try 1: 9.3-48.4%.
D_FF = 256               # hidden size of the feed-forward network
DROPOUT = 0.0            # share of numbers set to 0 against memorizing. Try 0.3: 24-91.3%.
# The task
NUM_SAMPLES = 6000       # distinct sequences, training plus validation
MAX_DIGITS = 5           # longest sequence
MIN_MASKING_RATE = 0.15  # lowest fraction of a row's digits, or words, that is selected
MASK_SHARE = 0.8         # fraction of the selected tokens that become <MASK>
RANDOM_SHARE = 0.1       # fraction that become a random token; the rest are unchanged
# The training
BATCH_SIZE = 64          # sequences per step
LEARNING_RATE = 3e-3     # at its peak. Try 1e-4: 0.7-22.8%.
WARMUP_STEPS = 40        # steps over which the learning rate rises to its peak
CLIP_NORM = 1.0          # a longer gradient is shortened to this length
NUM_EPOCHS = 8           # passes over the training data, 85 steps each. Try 2: 90.3-100%.
FINETUNE_EPOCHS = 4      # passes in fine-tuning
FINETUNE_LEARNING_RATE = 1e-3
# The run
SEED = 0                 # weights, data, and masks
DEVICE = "cpu"           # or "cuda", "mps"; the numbers in this file were measured on a CPU
# =====================================================================================


# --- 1. Building blocks ---------------------------------------------------------------
# KNOWN from decoder_only.py, which explains them; here they have no cache. Continue reading at
# `EncoderLayer`.
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

    def forward(self, x, memory, mask=None):
        """x (B, T, D), memory (B, S, D), mask as in `attention` -> (B, T, D) and (B, H, T, S)"""
        queries = self.split_heads(self.w_q(x))  # (B, H, T, K)
        keys = self.split_heads(self.w_k(memory))  # (B, H, S, K)
        values = self.split_heads(self.w_v(memory))
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

    def forward(self, x):
        """x (B, S, D) -> (B, S, D)"""
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


class EncoderLayer(nn.Module):
    """One encoder layer: self-attention, then a feed-forward network, each added to its input.

    Apart from the cache, it is the layer of decoder_only.py. What makes it an encoder is its mask:
    only padding is masked, so every position may attend to those before and after it.
    """

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


# --- 2. The model ---------------------------------------------------------------------
class EncoderOnlyTransformer(BaseModel):
    """An encoder that predicts a token at every position.

    BaseModel is an nn.Module that can save and load itself. guide/paper_and_code.md lists where
    this model differs from BERT (Devlin et al. 2019), and why.
    """

    def __init__(self, vocab_size=len(VOCABULARY), d_model=64, num_heads=4, num_layers=2, d_ff=256,
                 dropout=0.0, max_len=64):
        super().__init__(vocab_size=vocab_size, d_model=d_model, num_heads=num_heads,
                         num_layers=num_layers, d_ff=d_ff, dropout=dropout, max_len=max_len)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout)
                                    for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)  # pre-norm leaves the last sum unnormalized
        self.output = nn.Linear(d_model, vocab_size)
        # Tied weights, small for the output and scaled for the input, as in decoder_only.py.
        # (Without the factor sqrt(D), training ends at 0.0-0.2% exact match, SEED 0-2.)
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.output.bias)
        self.embedding_scale = math.sqrt(d_model)

    def run_encoder(self, tokens, mask=None):
        """tokens (B, S) -> (B, S, D) and a list of each layer's attention weights (B, H, S, S)"""
        if mask is None:
            mask = padding_mask(tokens)  # (B, 1, 1, S)
        x = self.positional_encoding(self.embedding(tokens) * self.embedding_scale)  # (B, S, D)
        x = self.dropout(x)
        all_weights = []
        for layer in self.layers:
            x, weights = layer(x, mask)
            all_weights.append(weights)
        return self.final_norm(x), all_weights

    def forward(self, tokens, mask=None):
        """tokens (B, S) -> logits (B, S, V): the scores of all tokens, before the softmax"""
        return self.output(self.run_encoder(tokens, mask)[0])  # (B, S, V)


# --- 3. What it is trained for: masked language modeling ------------------------------
def word_positions(tokens):
    """Return booleans (B, S), True for words: the tokens after <SEP>, except padding."""
    return (tokens >= FIRST_ORDINARY) & ((tokens == SEP).cumsum(1) > 0)  # from <SEP> on


def mask_tokens(tokens, mask_share=0.8, random_share=0.1, min_rate=0.15, generator=None):
    """Mask some of the tokens (B, S). Returns the corrupted tokens and the labels, (B, S) each.

    Of the selected tokens, 80% become <MASK>, 10% a random digit or word, and 10% are unchanged
    (Devlin et al. 2019, section 3.1). Here, all three words are selected:

        4 0 7 <SEP> four   zero  seven     original
        4 0 7 <SEP> <MASK> three seven     corrupted: masked, random, unchanged
        . . .   .   four   zero  seven     labels; . is IGNORE_INDEX, which the loss ignores

    Why not always <MASK>? Devlin et al. answer that <MASK> never appears in fine-tuning, so the
    model should not rely on it. Here, the mix does not help: fine-tuning ends at 93.7-97.5% with
    it, and at 96.1-99.5% if all selected tokens become <MASK> (SEED 0-2).

    Unlike BERT, this function selects either digits or words, never both, because if a digit *and*
    its word were masked, neither could be recovered. Each sequence also draws its own masking rate,
    from `min_rate` to 1. At BERT's 15%, the model would almost never see all words masked, as they
    are when it translates.
    """
    rand = functools.partial(torch.rand, generator=generator, device=tokens.device)
    batch, length = tokens.shape
    words = word_positions(tokens)  # (B, S)
    digits = (tokens >= FIRST_ORDINARY) & ~words
    candidates = torch.where(rand(batch, 1) < 0.5, words, digits)  # one side of each row
    rate = min_rate + (1 - min_rate) * rand(batch, 1)  # (B, 1)
    # The lowest draw is always selected, because the loss of a batch without labels is 0/0 = NaN.
    draw = rand(batch, length).masked_fill(~candidates, 2.0)  # (B, S)
    selected = candidates & (draw <= torch.maximum(rate, draw.amin(1, keepdim=True)))

    # subtle: one draw decides among the three actions. A second one would overwrite some masks.
    action = rand(batch, length)  # (B, S)
    masked = selected & (action < mask_share)
    randomized = selected & (action >= mask_share) & (action < mask_share + random_share)
    random_tokens = torch.randint(FIRST_ORDINARY, len(VOCABULARY), tokens.shape,
                                  generator=generator, device=tokens.device)  # (B, S)
    corrupted = torch.where(randomized, random_tokens, tokens.masked_fill(masked, MASK))
    labels = tokens.masked_fill(~selected, IGNORE_INDEX)
    return corrupted, labels


def logits_and_labels(model, batch, mask_share=0.8, random_share=0.1, min_rate=0.15):
    """Mask the tokens of one batch and predict them. Returns logits (B, S, V) and labels (B, S).

    In training, tokens are masked at random, differently in each epoch. In evaluation, all words
    are masked, as in translation, so that the loss is reproducible.
    """
    tokens = batch["pair"]  # (B, S)
    if model.training:
        masked, labels = mask_tokens(tokens, mask_share, random_share, min_rate)
    else:
        words = word_positions(tokens)
        masked = tokens.masked_fill(words, MASK)
        labels = tokens.masked_fill(~words, IGNORE_INDEX)
    return model(masked, batch["pair_mask"]), labels  # (B, S, V), (B, S)


# --- 4. Using it: fill the masks ------------------------------------------------------
@torch.inference_mode()
def fill_masks(model, rows):
    """Return `rows` (lists of tokens) with each "<MASK>" replaced by the most likely token.

    All masks of a row are filled in one pass, independently of each other. This is fast, but it
    works poorly for free text, where one word depends on the choice of another.
    """
    encoded = [VOCABULARY.encode(row) for row in rows]
    model.check_input(encoded)
    tokens = pad_rows(encoded, PAD).to(model.embedding.weight.device)  # (B, S)
    with model.evaluation_mode():
        filled = torch.where(tokens == MASK, model(tokens).argmax(-1), tokens).tolist()
    return [VOCABULARY.decode(ids[:len(row)]) for ids, row in zip(filled, rows)]


def translate(model, sequences):
    """Translate lists of digits into words by filling `4 0 7 <SEP> <MASK> <MASK> <MASK>`."""
    filled = fill_masks(model, [[*digits, "<SEP>"] + ["<MASK>"] * len(digits)
                                for digits in sequences])
    return [row[len(digits) + 1:] for row, digits in zip(filled, sequences)]


def translate_back(model, sequences):
    """Translate words into digits by filling `<MASK> <MASK> <MASK> <SEP> four zero seven`.

    A model that reads from left to right, digits first, cannot do this, because it must predict the
    digits before it has read the words.
    """
    filled = fill_masks(model, [["<MASK>"] * len(words) + ["<SEP>", *words] for words in sequences])
    return [row[:len(words)] for row, words in zip(filled, sequences)]


# --- 5. Training ----------------------------------------------------------------------
# KNOWN from decoder_only.py. Continue reading at `corrupt_one_word`.
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


# --- 6. Fine-tuning: a small layer on top of the pretrained model ---------------------
def corrupt_one_word(tokens, generator=None):
    """Replace a word in about half of the rows. (B, S) -> (B, S), labels (B,): 1 = still correct"""
    rand = functools.partial(torch.rand, generator=generator, device=tokens.device)
    zero = VOCABULARY.ids["zero"]
    draw = rand(*tokens.shape).masked_fill(~word_positions(tokens), -1.0)  # (B, S)
    position = draw.argmax(1, keepdim=True)  # (B, 1): the index of a random word in each row
    word = tokens.gather(1, position)  # (B, 1)
    # The ten words have consecutive ids, so this is one of the other nine:
    other = zero + (word - zero + 1 + (9 * rand(*word.shape)).long()) % 10
    matches = rand(*word.shape) < 0.5
    return tokens.scatter(1, position, torch.where(matches, word, other)), matches[:, 0].long()


class MatchClassifier(nn.Module):
    """An encoder with a linear layer on top, which predicts whether the words match the digits.

        4   0  <SEP> four zero <PAD>       tokens
        v1  v2  v3   v4   v5    -          their vectors after the encoder
        (v1 + v2 + v3 + v4 + v5) / 5       the mean over the real tokens
        logits for 0 and 1                 the new layer, 130 parameters at D = 64

    Devlin et al. 2019 use the vector of an extra [CLS] token instead of the mean.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)  # fine-tuning changes the encoder; keep the original
        self.head = nn.Linear(encoder.arguments["d_model"], 2)

    def forward(self, tokens):
        """tokens (B, S) -> logits (B, 2)"""
        mask = padding_mask(tokens)  # (B, 1, 1, S)
        hidden, _ = self.encoder.run_encoder(tokens, mask)  # (B, S, D)
        real = mask[:, 0, 0, :, None]  # (B, S, 1)
        # subtle: hidden.mean(1) would average over the padding too. The prediction for a row would
        # then depend on the lengths of the other rows in its batch.
        pooled = (hidden * real).sum(1) / real.sum(1)  # (B, D)
        return self.head(pooled)  # (B, 2)


def classifier_loss(classifier, batch):
    """Return the mean cross-entropy of the labels. Each call corrupts different rows and words."""
    tokens, labels = corrupt_one_word(batch["pair"])
    return F.cross_entropy(classifier(tokens), labels)


@torch.no_grad()
def evaluate_classifier(classifier, loader, seed=0):
    """Return the accuracy on `loader`. The same `seed` corrupts the same rows."""
    classifier.eval()
    device = next(classifier.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    num_correct = 0
    for batch in loader:
        tokens, labels = corrupt_one_word(batch["pair"], generator)
        predictions = classifier(tokens.to(device)).argmax(-1).cpu()  # (B,)
        num_correct += (predictions == labels).sum().item()
    return num_correct / len(loader.dataset)


def fine_tune(encoder, train_loader, val_loader, num_epochs, learning_rate, warmup_steps,
              clip_norm):
    """Train a classifier on top of a copy of `encoder`. Returns its accuracy after each epoch."""
    classifier = MatchClassifier(encoder).to(encoder.embedding.weight.device)
    optimizer, scheduler = create_optimizer(classifier, learning_rate,
                                            num_epochs * len(train_loader), warmup_steps)
    scores = []
    for _ in range(num_epochs):
        train_epoch(classifier, train_loader, optimizer, scheduler, clip_norm, classifier_loss)
        scores.append(evaluate_classifier(classifier, val_loader))
    return scores


# --- 7. Looking inside ----------------------------------------------------------------
@torch.inference_mode()
def attention_of_masks(model, row):
    """Return the attention weights (layers, H, M, S) of the M masked tokens of `row`.

    Also returns the positions of the tokens on the other side of <SEP>: mask i belongs to token i.
    """
    model.eval()
    masked = [i for i, token in enumerate(row) if token == "<MASK>"]
    others = [i for i, token in enumerate(row) if token not in ("<MASK>", "<SEP>")]
    tokens = torch.tensor([VOCABULARY.encode(row)], device=model.embedding.weight.device)  # (1, S)
    weights = torch.stack(model.run_encoder(tokens)[1])[:, 0]  # (layers, H, S, S)
    return weights[:, :, masked].cpu(), others


def show_alignment(model, sequences):
    """Print the fraction of masked words that attend most to their own digit, in each head."""
    hits, total = 0, 0
    for digits in sequences:
        weights, others = attention_of_masks(model, [*digits, "<SEP>"] + ["<MASK>"] * len(digits))
        hits = hits + (weights.argmax(-1) == torch.tensor(others)).sum(-1)  # (layers, H)
        total += len(digits)
    print("  fraction of held-out words that attend most to their own digit, per layer and head:")
    for layer, row in enumerate((hits / total).tolist()):
        print(f"    layer {layer}   " + "   ".join(f"head {h}: {share:6.1%}"
                                                  for h, share in enumerate(row)))


def show_attention(model, row):
    """Print what the masked tokens of `row` attend to.

    It picks the layer and head in which mask i attends most to token i on the other side of <SEP>.
    Attention weights do not explain a prediction by themselves (Jain and Wallace 2019).
    """
    weights, others = attention_of_masks(model, row)  # (layers, H, M, S)
    own = weights[..., others].diagonal(dim1=-2, dim2=-1).mean(-1)  # (layers, H): mask i on token i
    layer, head = divmod(own.argmax().item(), own.size(1))
    print(f"  layer {layer}, head {head}; rows are queries, columns are keys; each row sums to 1:")
    print_attention(weights[layer, head], [f"<MASK> {n + 1}" for n in range(len(others))], row)


# --- 8. The run -----------------------------------------------------------------------
def main():
    device = prepare(globals())
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
    check_warmup(WARMUP_STEPS, min(NUM_EPOCHS, FINETUNE_EPOCHS) * len(train_loader))
    model = EncoderOnlyTransformer(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                                   DROPOUT).to(device)
    print(f"encoder-only: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(train_loader.dataset)} training and {len(val_loader.dataset)} held-out sequences")

    pretraining_loss = functools.partial(compute_loss, mask_share=MASK_SHARE,
                                         random_share=RANDOM_SHARE, min_rate=MIN_MASKING_RATE)

    print("\n1. Pretraining: predict the masked tokens (validation: all words masked)")
    optimizer, scheduler = create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader),
                                            WARMUP_STEPS)
    for epoch in range(1, NUM_EPOCHS + 1):
        train_loss = train_epoch(model, train_loader, optimizer, scheduler, CLIP_NORM,
                                 pretraining_loss)
        result = evaluate(model, val_loader)
        print(f"  epoch {epoch:2d}   train loss {train_loss:.4f}   "
              f"validation loss {result['loss']:.4f}   exact match {result['exact_match']:6.1%}")
    save_model(model, "encoder_only.pt", result["exact_match"], globals())

    print("\n2. Fine-tuning: do the words match the digits? (A guess is correct half the time.)\n"
          "   The model from scratch gets the same total: pretraining plus fine-tuning steps")
    untrained = EncoderOnlyTransformer(**model.arguments).to(device)
    settings = (FINETUNE_LEARNING_RATE, WARMUP_STEPS, CLIP_NORM)
    pretrained = fine_tune(model, train_loader, val_loader, FINETUNE_EPOCHS, *settings)
    from_scratch = fine_tune(untrained, train_loader, val_loader, NUM_EPOCHS + FINETUNE_EPOCHS,
                             *settings)
    print("  correct after each epoch:\n    pretrained   "
          + " ".join(f"{accuracy:6.1%}" for accuracy in pretrained))
    print("    from scratch " + " ".join(f"{accuracy:6.1%}" for accuracy in from_scratch))

    digits = [digits for digits, _, _ in result["examples"]]
    words = [words for _, words, _ in result["examples"]]
    example = max(digits, key=len)
    print("\n3. What masked words attend to")
    show_alignment(model, digits)
    show_attention(model, [*example, "<SEP>"] + ["<MASK>"] * len(example))

    print("\n4. Held-out examples, mistakes first")
    print_examples(result["examples"])
    print("  the other way, words to digits")
    back = translate_back(model, words)
    print_examples(sorted(zip(words, digits, back), key=lambda e: e[1] == e[2]), 2)

    print(f"\nResult on {len(digits)} held-out sequences")
    print(f"  digits to words, length given        exact match {result['exact_match']:6.1%}")
    print(f"  words to digits, the same weights    exact match {exact_match(back, digits):6.1%}")
    print(f"  do the words match? pretrained       correct     {pretrained[-1]:6.1%}")
    print(f"  from scratch, the same total steps   correct     {from_scratch[-1]:6.1%}")


def answer(tokens):
    """Translate `tokens` from the command line with the saved model."""
    known = WORDS if tokens[0] in WORDS else DIGITS
    check_tokens(tokens, known)
    model = load_model(EncoderOnlyTransformer, "encoder_only.pt", DEVICE)
    masks = ["<MASK>"] * len(tokens)
    if known is DIGITS:
        row, written = [*tokens, "<SEP>", *masks], translate(model, [tokens])[0]
    else:
        row, written = [*masks, "<SEP>", *tokens], translate_back(model, [tokens])[0]
    print(f"{' '.join(tokens)}  ->  {' '.join(written)}")
    print("The output length was given: one <MASK> per token.")
    show_attention(model, row)


if __name__ == "__main__":
    run_script(main, answer)
