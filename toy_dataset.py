"""
toy_dataset.py - the one small task that all three transformers learn

THE TASK.  Read digits, write words:   4 0 7  ->  four zero seven

A child solves it, and that is the point: whatever goes wrong comes from the model or from
the way it is fed, not from a hard task. It still needs everything that a real translation
needs. The model has to know *where* it is in the sequence (positions), look
at the right digit (attention), ignore the padding of its neighbours in the batch (masks)
and know when to stop (<EOS>).

The same sequence, dressed three ways, one for each architecture:

    encoder-only (BERT)      4 0 7 <SEP> four <MASK> seven         fill the blank
    decoder-only (GPT)       4 0 7 <SEP> four zero seven <EOS>     continue after <SEP>
    encoder-decoder (T5)     4 0 7  ->  <SOS> four zero seven <EOS>    read, then write

Run it:     python toy_dataset.py        (about 3 seconds, nearly all of it importing torch)

It prints the vocabulary, a few samples, and one ragged batch as a table that shows which
positions count in the loss. The last lines should be:

    disjoint: 0 of 599 validation sequences occur in training
    <EOS> directly follows the last word in 4 of 4 rows

READING ORDER   vocabulary -> sequences -> dataset -> collate_fn (the heart of this file)
                -> data loaders -> housekeeping (checks, checkpoints; skip it at first)

FOUR WORDS that you will meet before you have read a model:
  attention        how a position gathers information from others. A *query* (the position
                   that asks) is compared with the *key* of each position that is asked
  head             one of several such comparisons, made side by side
  causal           no position may look at a later one: whoever learns to say what comes
                   next must not see it
  teacher forcing  in training a decoder reads the right answer so far, not what it would
                   have written itself; so all its positions are trained at once
"""
import io
import math
import os
import pickle
import random
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset

# =====================================================================================
# LEGEND - one set of letters for the whole collection
#   B  batch: rows that are processed together        D  d_model: width of a token's vector
#   S  source length (what is read)                   H  heads
#   T  target length (what is written)                K  D / H: width of one head
#   V  vocabulary size (26 here)
# =====================================================================================

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
NUM_SAMPLES = 6000       # distinct sequences, training and validation together. Try 300: enough to memorise, not to learn.
MAX_DIGITS = 5           # sequences hold 1 to this many digits. Try 8: the models need more steps.
BATCH_SIZE = 64          # rows per step. Try 8: noisier steps, eight times as many of them.
VALIDATION_SHARE = 0.1   # of the sequences, held out and never trained on. Try 0.5.
SEED = 0                 # picks the sequences, their split and the order of the batches. Try 1.
# =====================================================================================


class InputError(ValueError):
    """Something the user can put right: a constant, an argument, a file. The message is one line that says what was
    wrong and what would work; `run_script` prints it without a traceback. It is a ValueError to anyone who calls us."""


# -------------------------------------------------------------------------------------
# The vocabulary: text in, numbers out
# -------------------------------------------------------------------------------------
SPECIAL_TOKENS = ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "<SEP>", "<MASK>"]
DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORD_OF = dict(zip(DIGITS, WORDS))

PAD, SOS, EOS, UNK, SEP, MASK = range(6)
#   PAD   fills a short row up to the width of its batch; nothing may look at it or be scored on it
#   SOS   start of sequence: what a decoder sees before it has written anything
#   EOS   end of sequence: what a decoder must learn to write, or it never stops
#   UNK   stands in for every token that the vocabulary does not hold
#   SEP   separates digits from words where both share one row
#   MASK  the blank that BERT learns to fill
FIRST_ORDINARY = len(SPECIAL_TOKENS)  # ids from here on are digits and words: content, not punctuation

# F.cross_entropy skips every label with this value; -100 is its default. Filling labels up with PAD (0) instead would
# make "does not count" and "the answer is <PAD>" the same number. Forget `ignore_index=PAD` just once then, and the model
# is trained to write padding, and its accuracy looks splendid, because padding is easy.
IGNORE_INDEX = -100


class Vocabulary:
    """Maps tokens (strings) to ids and back. One vocabulary serves source and target of all three models.

    A digit and its word have different ids ("4" is 10, "four" is 20): to a model they are unrelated symbols, and their
    connection is what it has to learn.

        >>> vocabulary = Vocabulary()
        >>> vocabulary.encode("4 0 7 <SEP>")
        [10, 6, 13, 4]
        >>> vocabulary.decode([20, 16, 23, 2])
        ['four', 'zero', 'seven', '<EOS>']
    """

    def __init__(self):
        self.tokens = SPECIAL_TOKENS + DIGITS + WORDS
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self):
        return len(self.tokens)

    def encode(self, tokens):
        """A list of tokens, or one string with spaces between them -> list of ids; what is unknown becomes <UNK>."""
        if isinstance(tokens, str):
            tokens = tokens.split()
        return [self.ids.get(token, UNK) for token in tokens]

    def decode(self, ids):
        """Ids (a list or a 1-D tensor) -> list of tokens. Raises InputError for an id that is no token's."""
        decoded = []
        for i in map(int, ids):
            # A negative id would count from the end of the list and quietly give a wrong word.
            if not 0 <= i < len(self.tokens):
                raise InputError(f"id {i} is outside the vocabulary: use 0 to {len(self.tokens) - 1}")
            decoded.append(self.tokens[i])
        return decoded


# One instance for all: were each script to make its own, a changed token list would not be noticed until a checkpoint that
# was trained with one met a batch that was made with the other.
VOCABULARY = Vocabulary()


# -------------------------------------------------------------------------------------
# The sequences: distinct, balanced, reproducible
# -------------------------------------------------------------------------------------
def count_distinct(max_digits):
    """How many sequences of 1 to `max_digits` digits exist: 10 + 100 + ... (leading zeros count: 07 is not 7).

    111110 for 5 digits, of which training shows 5401: one in twenty. Memorising the rest is not an option.
    """
    return sum(10 ** n for n in range(1, max_digits + 1))


def make_sequences(num_samples, max_digits, seed):
    """`num_samples` distinct digit sequences of 1 to `max_digits` digits, as lists of strings, in random order.

    Lengths are balanced as far as sequences exist. Drawing all of them alike from 1 to 5 digits would make nine in
    ten 5 digits long, simply because most numbers are long, and the model would hardly ever see a short row.

    6000 samples of up to 5 digits: all 10 of one digit, all 100 of two, all 1000 of three, and 2445 each of four and five.

    Raises InputError if fewer distinct sequences exist than are asked for.
    """
    if num_samples < 1 or not 1 <= max_digits <= 18:  # a sequence is drawn as one number of at most 64 bits
        raise InputError(f"NUM_SAMPLES={num_samples}, MAX_DIGITS={max_digits}: use 1 or more samples of 1 to 18 digits")
    if num_samples > count_distinct(max_digits):
        raise InputError(f"NUM_SAMPLES={num_samples}: only {count_distinct(max_digits)} distinct sequences of 1 to "
                         f"{max_digits} digits exist: use that many or fewer, or raise MAX_DIGITS={max_digits}")
    # A generator of our own. random.seed() here would reset the dice of the whole program, and whatever is drawn after
    # the data is built would come out the same each time, without having been asked to.
    rng = random.Random(seed)
    sequences = []
    for length in range(1, max_digits + 1):
        # Shortest first: what a short length cannot supply is shared out among the longer ones.
        lengths_left = max_digits - length + 1
        wanted = -(-(num_samples - len(sequences)) // lengths_left)  # an equal share of the rest, rounded up
        count = min(wanted, 10 ** length)
        # sample() never repeats a number, so no two sequences are alike: no rejection loop, no set of those seen.
        for number in rng.sample(range(10 ** length), count):
            sequences.append(list(f"{number:0{length}d}"))  # 7 with length 3 -> ['0', '0', '7']
    rng.shuffle(sequences)
    return sequences


class NumberTranslationDataset(Dataset):
    """Digit sequences with their words, tokenised once, here.

    A dataset is indexed anew in every epoch; work done in `__getitem__` is paid again each time.

    An item is a dict:  digits ['4', '0', '7']             source [10, 6, 13]
                        words  ['four', 'zero', 'seven']   target [20, 16, 23]

    No <SOS>, <EOS> or <PAD> in it. Those depend on who reads the row and on its neighbours in the batch, so `collate_fn`
    adds them. Padding everything to the longest row of the *dataset* here would be simpler, and the usual first version;
    every batch would then compute as much padding as the worst one needs.
    """

    def __init__(self, num_samples=NUM_SAMPLES, max_digits=MAX_DIGITS, seed=SEED):
        """Raises InputError if fewer than `num_samples` distinct sequences of up to `max_digits` digits exist."""
        self.items = []
        for digits in make_sequences(num_samples, max_digits, seed):
            words = [WORD_OF[digit] for digit in digits]
            self.items.append({"digits": digits, "source": VOCABULARY.encode(digits),
                               "words": words, "target": VOCABULARY.encode(words)})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def split(self, validation_share):
        """Two disjoint lists of indices, (training, validation), each length in the same proportion in both.

        The sequences are distinct, so disjoint indices are disjoint sequences: a model that scores on the second list
        has not seen the answers. Splitting by length keeps the few short ones from all landing on one side. (Each length
        is rounded for itself: a tenth of 6000 comes out as 599.)
        """
        by_length = {}
        for index, item in enumerate(self.items):
            by_length.setdefault(len(item["digits"]), []).append(index)
        training, validation = [], []
        for indices in by_length.values():
            held_out = round(len(indices) * validation_share)
            validation += indices[:held_out]
            training += indices[held_out:]
        return training, validation


# -------------------------------------------------------------------------------------
# The batch: where most of the mistakes are made
# -------------------------------------------------------------------------------------
def pad_rows(rows, value):
    """Lists of ids of different lengths -> one tensor (B, longest), filled up on the right with `value`.

        pad_rows([[10, 6, 13], [9]], PAD)   ->   [[10,  6, 13],
                                                  [ 9,  0,  0]]

    A tensor is a rectangle and a batch of sentences is not; padding is what that costs.
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])          # (B, longest)


def padding_mask(tokens):
    """(B, S) ids -> (B, 1, 1, S) booleans, True = may be attended to, False = padding.

        [[10, 6, 13],          [[[[True, True,  True ]]],
         [ 9, 0,  0]]    ->     [[[True, False, False]]]]

    The two middle 1s stand for heads and queries: whoever asks, in whichever head, this *key* is hidden or it is not.
    A padding mask never hides queries: a padded position may ask what it likes, its answer is never used.

    CONVENTION. In this collection, as in F.scaled_dot_product_attention, True means "may attend".
    nn.MultiheadAttention and nn.Transformer mean the opposite: True there is "hide it". Hand a mask from one to the other
    without `~`, and a padded row attends to nothing but its padding: no error, only a model that does not learn.
    """
    return (tokens != PAD)[:, None, None, :]                                             # (B, 1, 1, S)


def collate_fn(items):
    """Items of the dataset -> one batch with everything that the three architectures need. B rows, ragged.

    For two rows, `4 0 7` and `9`, with tokens in place of their ids and . for <PAD> or, in labels, IGNORE_INDEX:

      encoder-decoder (S = 3, T = 4)
        source          4    0    7             9    .    .
        decoder_input   SOS  four zero seven    SOS  nine .    .        what the decoder sees
        labels          four zero seven EOS     nine EOS  .    .        what it should say there

      encoder-only and decoder-only (one row of S + T = 7: digits, <SEP>, words)
        pair            4   0   7   SEP   four  zero   seven          9   SEP   nine  .   .   .   .
        pair_labels     .   .   .   four  zero  seven  EOS            .   nine  EOS   .   .   .   .

    Read a column from top to bottom: "having read everything up to and including this token, say that". The labels are
    the input moved by one place, and they are moved *here*, once. Hugging Face's models move them inside the loss: give
    those labels that are moved already, and the model learns to say the token after the next.

    <EOS> sits directly after the last word of *its own* row. The classic mistake pads first and appends <EOS> to the
    padded row: short rows then never show <EOS> after a word, and the model never learns to stop.

    In pair_labels the digits are not scored: they are random, and on sequences that it has not seen no model can do
    better than ln 10 = 2.30 nats per digit. <SEP> is scored on the first word: "the prompt is over, your turn".

    The encoder-only model takes `pair` too, but draws its own blanks and labels from it anew in each step. For its second
    exercise it gets `largest`, the largest digit of each row.

    Returns a dict. Tensors of int64: source (B, S), decoder_input and labels (B, T), pair and pair_labels (B, S + T),
    largest (B,), 0-9. Masks of bool: source_mask (B, 1, 1, S), decoder_mask (B, 1, 1, T),
    pair_mask (B, 1, 1, S + T). Lists of lists of str: digits, words.

    Raises InputError for an empty batch or an empty sequence.
    """
    if not items:
        raise InputError("the batch is empty: give collate_fn at least one item")
    if not all(item["source"] for item in items):
        raise InputError("a sequence is empty: each needs at least one digit")
    sources = [item["source"] for item in items]
    targets = [item["target"] for item in items]

    # No <EOS> after the last word in decoder_input and pair: nothing is predicted from it, so nobody need see it.
    source = pad_rows(sources, PAD)                                                      # (B, S)
    decoder_input = pad_rows([[SOS] + target for target in targets], PAD)                # (B, T)
    labels = pad_rows([target + [EOS] for target in targets], IGNORE_INDEX)              # (B, T)
    pair = pad_rows([s + [SEP] + t for s, t in zip(sources, targets)], PAD)              # (B, S+T)
    pair_labels = pad_rows([[IGNORE_INDEX] * len(s) + t + [EOS] for s, t in zip(sources, targets)],
                           IGNORE_INDEX)                                                 # (B, S+T)
    return {
        "source": source, "source_mask": padding_mask(source),
        "decoder_input": decoder_input, "decoder_mask": padding_mask(decoder_input), "labels": labels,
        "pair": pair, "pair_mask": padding_mask(pair), "pair_labels": pair_labels,
        "largest": torch.tensor([max(int(digit) for digit in item["digits"]) for item in items]),  # (B,)
        "digits": [item["digits"] for item in items], "words": [item["words"] for item in items],
    }


def to_device(batch, device):
    """The same batch with its tensors on `device`; the lists of strings stay as they are.

    A model and its input must be on one device. On a CPU this copies nothing.
    """
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def create_dataloaders(num_samples=NUM_SAMPLES, max_digits=MAX_DIGITS, batch_size=BATCH_SIZE, seed=SEED,
                       validation_share=VALIDATION_SHARE):
    """(training loader, validation loader) over disjoint sequences; batches as `collate_fn` describes them.

    A loader is gone through once an epoch: `for batch in train_loader`. The training loader shuffles anew each time, so
    that no two epochs show the same rows together; the last batch holds what is left over and is smaller.

    Raises InputError if the sequences do not exist, none is left to validate on, or a batch is larger than the data.
    """
    dataset = NumberTranslationDataset(num_samples, max_digits, seed)
    training, validation = dataset.split(validation_share)
    if not validation or not training:
        raise InputError(f"NUM_SAMPLES={num_samples} with VALIDATION_SHARE={validation_share} leaves {len(training)} "
                         f"sequences to train on and {len(validation)} to validate on: use 100 samples and a share of 0.1")
    if batch_size > len(training):
        raise InputError(f"BATCH_SIZE={batch_size} is larger than the {len(training)} training sequences: "
                         f"use {len(training)} or less, or raise NUM_SAMPLES={num_samples}")
    # Both loaders get a generator, also the one that does not shuffle: a DataLoader without one draws a number from
    # torch's global generator at the start of every pass, and evaluating would change the training that follows.
    train_loader = DataLoader(Subset(dataset, training), batch_size, shuffle=True, collate_fn=collate_fn,
                              generator=torch.Generator().manual_seed(seed))
    # Nothing is stored for a backward pass in validation, so larger batches fit: fewer, fuller passes. No figure may
    # depend on that: a mean over validation has to weigh tokens, not batches.
    val_loader = DataLoader(Subset(dataset, validation), 4 * batch_size, collate_fn=collate_fn,
                            generator=torch.Generator().manual_seed(seed))
    return train_loader, val_loader


# -------------------------------------------------------------------------------------
# Housekeeping that every script shares. Nothing here is about transformers.
# -------------------------------------------------------------------------------------
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"

# Constants by the kind of value that works. Each script hands in its globals; names that it does not have are passed over.
WHOLE_NUMBERS = {  # name: (smallest value, a value that works)
    "D_MODEL": (2, 64), "NUM_HEADS": (1, 4), "NUM_LAYERS": (1, 2), "D_FF": (1, 256), "BATCH_SIZE": (1, 64),
    "NUM_EPOCHS": (1, 4), "NUM_SAMPLES": (1, 6000), "MAX_DIGITS": (1, 5), "SEED": (0, 0), "NUM_THREADS": (1, 1),
    "WARMUP_STEPS": (0, 40), "FINETUNE_EPOCHS": (1, 4), "BEAM_WIDTH": (1, 3), "NUM_EXAMPLES": (1, 4),
    "ACCUMULATION_STEPS": (1, 2), "RESUME_EVERY": (1, 50), "PROFILE_STEPS": (0, 5),
}
RANGES = {
    "more than 0": lambda x: x > 0, "0 or more": lambda x: x >= 0, "0 to 1": lambda x: 0 <= x <= 1,
    "0 or more, and less than 1": lambda x: 0 <= x < 1, "more than 0, and less than 1": lambda x: 0 < x < 1,
}
NUMBERS = {  # name: (a range from RANGES, a value that works)
    "LEARNING_RATE": ("more than 0", 0.003), "FINETUNE_LEARNING_RATE": ("more than 0", 0.001),
    "CLIP_NORM": ("more than 0", 1.0), "LENGTH_PENALTY": ("0 or more", 1.0), "MASK_SHARE": ("0 to 1", 0.8),
    "RANDOM_SHARE": ("0 to 1", 0.1), "MIN_MASKING_RATE": ("0 to 1", 0.15), "DROPOUT": ("0 or more, and less than 1", 0.1),
    "VALIDATION_SHARE": ("more than 0, and less than 1", 0.1), "MIN_LEARNING_RATE": ("0 or more", 5e-5),
    "WEIGHT_DECAY": ("0 or more", 0.01), "LABEL_SMOOTHING": ("0 or more, and less than 1", 0.1),
}


def check_constants(constants):
    """Refuse, in one line and before any training, constants that cannot work.

    constants: a dict from name to value, such as a script's `globals()`; names that are not known here are passed over.
    Raises InputError that names the constant, its value and what would work.
    """
    for name, (smallest, example) in WHOLE_NUMBERS.items():
        value = constants.get(name, example)
        # bool is a subclass of int: without the first test, NUM_LAYERS=True would train one layer.
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name}={value!r} is not a whole number: use one such as {example}")
        if not smallest <= value < 2 ** 63:
            raise InputError(f"{name}={value} is too {'small' if value < smallest else 'large'}: use {smallest} or more, "
                             f"such as {example}")
    for name, (allowed, example) in NUMBERS.items():
        value = constants.get(name, example)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"{name}={value!r} is not a number: use one such as {example}")
        if not RANGES[allowed](value):
            raise InputError(f"{name}={value} cannot work: use {allowed}, such as {example}")

    d_model, num_heads = constants.get("D_MODEL", 2), constants.get("NUM_HEADS", 1)
    if d_model % 2:
        raise InputError(f"D_MODEL={d_model} must be even, since positions come as pairs of sine and cosine: "
                         f"use {d_model - 1} or {d_model + 1}")
    if d_model % num_heads:
        divisors = [str(n) for n in range(1, d_model + 1) if d_model % n == 0]
        raise InputError(f"NUM_HEADS={num_heads} does not divide D_MODEL={d_model}: use {', '.join(divisors[:4])}"
                         + (", ..." if len(divisors) > 4 else ""))
    if constants.get("MASK_SHARE", 0) + constants.get("RANDOM_SHARE", 0) > 1:
        raise InputError(f"MASK_SHARE={constants['MASK_SHARE']} and RANDOM_SHARE={constants['RANDOM_SHARE']} add up to "
                         "more than 1: use 0.8 and 0.1; what is left is kept unchanged")
    if "DEVICE" in constants:
        choose_device(constants["DEVICE"])


def choose_device(name):
    """The torch.device called `name`: "cpu", "cuda", "cuda:1" or "mps". Raises InputError if this machine has none."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name not in available:
        raise InputError(f"DEVICE={name!r} is not available here: use {' or '.join(map(repr, available))}")
    return torch.device(name)


def check_tokens(tokens, vocab_size, max_len):
    """Raises InputError unless `tokens` is a (B, S) tensor of ids that a model of this size can read."""
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise InputError(f"tokens of shape {tuple(tokens.shape)}: use (batch, length) with at least one row and one token")
    if tokens.size(1) > max_len:
        raise InputError(f"a row of {tokens.size(1)} tokens is longer than max_len={max_len}, for which the model was "
                         "built: shorten it, or build the model with a larger max_len")
    # One look at the values for all three questions: on a GPU, each look waits until the queue of work is empty.
    empty_row = (tokens == PAD).all(1).any()
    lowest, highest, empty_row = torch.stack([tokens.min(), tokens.max(), empty_row.to(tokens.dtype)]).tolist()
    if lowest < 0 or highest >= vocab_size:
        raise InputError(f"token id {lowest if lowest < 0 else highest} is outside the vocabulary: "
                         f"use 0 to {vocab_size - 1}")
    if empty_row:
        raise InputError("a row holds nothing but <PAD>: leave it out, or give it at least one token")


def check_loss(loss, step, what="loss"):
    """Raises InputError if `loss` (a float; `what` names it) is no longer a number.

    One NaN makes every weight NaN in a single step, and no later step can mend it: better to stop than to train on.
    """
    if not math.isfinite(loss):
        raise InputError(f"the {what} became {loss} at step {step}: try a tenth of LEARNING_RATE, or look for a division "
                         "by zero or a log of zero in what you changed")


def write_atomically(path, content):
    """Write `content` (bytes) to `path` all or nothing, making folders as needed.

    Raises OSError (disk full, directory read-only, ...) with the file that stood there before still whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rename is all or nothing on every file system that matters; overwriting in place is not: killed half-way, it leaves
    # half a file where a whole one was. The process id keeps two runs from writing into one temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # already gone when all went well


def tensors_to_bytes(value):
    """What torch.save would write for `value`. Torch reports a full disk as a RuntimeError from deep inside; bytes in
    memory and a plain write give an honest OSError instead."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def save_checkpoint(path, model):
    """Write {architecture: class name, arguments: dict of numbers, weights: dict of tensors} so that a crash cannot
    tear the file. `model.arguments` are what its constructor was called with. Raises OSError.

    Not torch.save(model): that pickles the object with the path of its class, so a file or a class that is renamed makes
    it unreadable, and reading it runs whatever code the file names. Numbers and tensors have neither problem.
    """
    write_atomically(path, tensors_to_bytes({"architecture": type(model).__name__, "arguments": model.arguments,
                                             "weights": model.state_dict()}))


def load_checkpoint(path, model_class, device="cpu"):
    """A model of `model_class`, rebuilt on `device` from a file that `save_checkpoint` wrote. Raises InputError if it is
    missing, cut short, of another architecture, or holds anything but tensors and plain values.

    weights_only=True refuses to run code. A plain pickle can do *anything* when it is loaded: never load a stranger's
    checkpoint without it.
    """
    path, device = Path(path), choose_device(str(device))
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: run the script of that name first")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path} may not be read by this user: change its permissions") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds more than tensors and plain values, or is damaged, and was not loaded: "
                         "delete it and train again") from error
    except Exception as error:  # a damaged file can break the reader anywhere: EOFError, RuntimeError, KeyError, ...
        raise InputError(f"{path} is cut short or damaged ({type(error).__name__}): delete it and train again") from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != {"architecture", "arguments", "weights"}:
        raise InputError(f"{path} is not a checkpoint of this collection: delete it and train again")
    if checkpoint["architecture"] != model_class.__name__:
        raise InputError(f"{path} holds a model of class {checkpoint['architecture']}, not {model_class.__name__}: "
                         "load it with the script that wrote it")
    try:
        model = model_class(**checkpoint["arguments"]).to(device)
        model.load_state_dict(checkpoint["weights"])
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:  # arguments or weights of another version
        raise InputError(f"{path} does not fit this version of {model_class.__name__}: delete it and train again") from error
    return model


def print_examples(examples, count=5):
    """(source, expected, written) as lists of tokens, a line each, the first `count` of them."""
    for source, expected, written in examples[:count]:
        verdict = "right" if written == expected else f"WRONG: expected {' '.join(expected)}"
        print(f"  {' '.join(source)}  ->  {' '.join(written)}   {verdict}")


def report_saved(model, path):
    """Save `model`, and say so; or say why not, and go on: a full disk must not cost a finished training.

    model: one with `save(path)`; path: where to. Prints one line either way.
    """
    shown = f"{path.parent.name}/{path.name}"
    try:
        model.save(path)
    except OSError as error:
        print(f"warning: could not save {shown} ({error.strerror}): the results above stand, the model is not on disk")
    else:
        print(f"saved {shown}")


def run_script(main):
    """Run a script's main(): one line and exit code 2 for what the user can put right, 130 for Ctrl-C.

    A traceback is for mistakes in this code. Whoever sets NUM_HEADS = 3 should read one sentence about NUM_HEADS.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; checkpoints that were already saved are whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, `| head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -------------------------------------------------------------------------------------
# Look at it
# -------------------------------------------------------------------------------------
def main():
    """Print vocabulary, data, and one ragged batch. What to look for:

    - In the first table, the row where the input is the last word and the label is <EOS>. That one line is what teaches
      a model to stop; below it there is only padding, and it does not count.
    - In the second, that the prompt is read but not scored: a causal model learns nothing *from* these positions and
      everything *through* them, since the answer's positions attend to them.
    - In the masks, that the third grid is the other two laid on top of each other: a position must be allowed by both.
    """
    check_constants(globals())
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED, VALIDATION_SHARE)
    training = [train_loader.dataset[i] for i in range(len(train_loader.dataset))]
    validation = [val_loader.dataset[i] for i in range(len(val_loader.dataset))]

    print(f"The vocabulary: {len(VOCABULARY)} tokens")
    for name, tokens in (("special", SPECIAL_TOKENS), ("digits", DIGITS), ("words", WORDS)):
        print(f"  {name:8s}" + "  ".join(f"{VOCABULARY.ids[token]}={token}" for token in tokens))

    print(f"\nThe data: {len(training)} sequences to train on, {len(validation)} to validate on")
    print("  digits   training   validation")
    for length in range(1, MAX_DIGITS + 1):
        counts = [sum(len(item["digits"]) == length for item in items) for items in (training, validation)]
        print(f"  {length:6d}   {counts[0]:8d}   {counts[1]:10d}")
    print("  samples:")
    for item in training[:3]:
        print(f"    {' '.join(item['digits']):10s} -> {' '.join(item['words'])}")

    # One row of each of four lengths: as ragged as it gets.
    rows = {len(item["digits"]): item for item in training}
    items = [rows[length] for length in sorted(rows)[:4]][::-1]
    batch = collate_fn(items)
    print(f"\nA ragged batch of {len(items)}: source {tuple(batch['source'].shape)}, "
          f"decoder_input {tuple(batch['decoder_input'].shape)}, pair {tuple(batch['pair'].shape)}")

    row = len(items) // 2  # a row with padding in it, unless the batch has only one
    print(f"\nRow {row} as the encoder-decoder gets it: source {' '.join(VOCABULARY.decode(batch['source'][row]))}")
    print_label_table(batch["decoder_input"][row], batch["labels"][row])
    print("\nThe same row as the decoder-only model gets it: one stream, only the answer counts")
    print_label_table(batch["pair"][row], batch["pair_labels"][row])

    # "causal" and "both" differ in the rows of <PAD> alone: padding on the right lies in the future of every real token.
    # An encoder has no causal mask, and there the padding mask does all the work.
    print("\nWhat each position of decoder_input may attend to (# yes, . no); rows ask, columns are asked")
    length = batch["decoder_input"].size(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()          # (T, T)
    padding = batch["decoder_mask"][row, 0]                               # (1, T)
    names = VOCABULARY.decode(batch["decoder_input"][row])
    columns = [("padding", padding.expand(length, length)), ("causal", causal), ("both (&)", causal & padding)]
    print(" " * 10 + "".join(f"{title:{2 * length + 4}s}" for title, _ in columns))
    for position, name in enumerate(names):
        marks = [" ".join("#" if allowed else "." for allowed in mask[position].tolist()) for _, mask in columns]
        print(f"  {name:8s}" + "".join(f"{line:{2 * length + 4}s}" for line in marks))
    print("  <PAD> is hidden as a column, never as a row: its own answers are computed and thrown away.")

    seen = {tuple(item["digits"]) for item in training}
    leaked = sum(tuple(item["digits"]) in seen for item in validation)
    ended = sum(batch["labels"][i, len(item["words"])].item() == EOS for i, item in enumerate(items))
    print(f"\ndisjoint: {leaked} of {len(validation)} validation sequences occur in training")
    print(f"<EOS> directly follows the last word in {ended} of {len(items)} rows")


def print_label_table(inputs, labels):
    """Two 1-D tensors of one length, input ids and label ids, as a table with one line a position.

    Print this for the first batch of every new project. Labels that are shifted twice, an <EOS> in the wrong place, a
    prompt that is scored: each is plain to see here, and invisible in a loss curve.
    """
    print("  position  input    label    counts in the loss?")
    for position, (i, label) in enumerate(zip(inputs.tolist(), labels.tolist())):
        counts = label != IGNORE_INDEX
        shown = VOCABULARY.tokens[label] if counts else str(IGNORE_INDEX)
        print(f"  {position:8d}  {VOCABULARY.tokens[i]:8s} {shown:8s} {'yes' if counts else 'no'}")


if __name__ == "__main__":
    run_script(main)
