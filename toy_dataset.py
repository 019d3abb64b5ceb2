"""
toy_dataset.py - the small task that all three transformers learn

THE TASK.  Read digits, write words:   4 0 7  ->  four zero seven

The task is easy on purpose, so that if something goes wrong, the fault is in the model or its
input. Still, the model must attend to the correct digit (attention, positions), ignore the padding
of shorter rows (masks), and, unless the output length is given, learn when to stop (<EOS>).

Each architecture gets the same sequence in its own format:

    encoder-only (BERT)      4 0 7 <SEP> four <MASK> seven             predict the masked token
    decoder-only (GPT)       4 0 7 <SEP> four zero seven               continue until <EOS>
    encoder-decoder (T5)     4 0 7  ->  <SOS> four zero seven <EOS>    read all, then write

Run it:     python toy_dataset.py        (about 3 seconds, nearly all of it importing torch)
Practice:   python exercises/practice.py start 1      (exercises 1 to 5)

It prints the vocabulary, some sequences, and which positions of a row count toward the loss.
The last lines should be:

    disjoint: 0 of 601 validation sequences occur in training
    <EOS> directly follows the last word in 4 of 4 rows

READING ORDER   vocabulary -> sequences -> dataset -> collate_fn (the heart of this file) -> loaders
"""
import math
import random
import zlib

from housekeeping import InputError, check, prepare, run_script
import torch
from torch.utils.data import DataLoader, Dataset, Subset

# =====================================================================================
# LEGEND - the letters of all scripts; each script says what S and T mean there
#   B  batch: rows that are processed together    D  d_model: the size of a token's vector
#   S  source length: the tokens read             H  heads
#   T  target length: the tokens written          K  D / H: the size of a head's vectors
#   V  vocabulary size (26 here)
# =====================================================================================
# CONSTANTS - they change only what this script prints; each training script has its own
# =====================================================================================
NUM_SAMPLES = 6000       # distinct sequences, training and validation together
MAX_DIGITS = 5           # longest sequence; the shortest has one digit
BATCH_SIZE = 64          # sequences per batch
VALIDATION_SHARE = 0.1   # fraction of the sequences that is held out
SEED = 0                 # selects the sequences and the order of the batches
# =====================================================================================


# --- The vocabulary: from text to numbers ---------------------------------------------
SPECIAL_TOKENS = ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "<SEP>", "<MASK>"]
DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORD_OF = dict(zip(DIGITS, WORDS))

PAD, SOS, EOS, UNK, SEP, MASK = range(6)
#   PAD   fills short rows up to the length of the longest one; no real token attends to it
#   SOS   start of sequence: the first decoder input of the encoder-decoder
#   EOS   end of sequence: a decoder must learn to predict it, or it never stops
#   UNK   replaces every token that is not in the vocabulary
#   SEP   separates digits from words in the same row
#   MASK  marks a token that BERT must predict
FIRST_ORDINARY = len(SPECIAL_TOKENS)  # the first id of a digit or word; BERT masks only these

# F.cross_entropy ignores labels with this value, the default of its ignore_index. Labels padded
# with <PAD> (0) would be risky: if you forget `ignore_index=PAD` once, the model learns to predict
# padding, and nothing warns you.
IGNORE_INDEX = -100


class Vocabulary:
    """Maps tokens (strings) to ids and back. All models share one vocabulary for digits and words.

    A digit and its word have different ids. The model has to learn how they are related.

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
        """Return the ids of `tokens`: a list of tokens, or one string with spaces between them."""
        tokens = tokens.split() if isinstance(tokens, str) else tokens
        if not isinstance(tokens, (list, tuple)) or not all(isinstance(t, str) for t in tokens):
            raise InputError(f"{tokens!r} cannot be encoded: use strings, such as ['4', '0', '7']")
        return [self.ids.get(token, UNK) for token in tokens]

    def decode(self, ids):
        """Return the tokens of `ids`, a list or 1-D tensor."""
        return [self.tokens[i] for i in (ids.tolist() if torch.is_tensor(ids) else ids)]


VOCABULARY = Vocabulary()


# --- The sequences: distinct, balanced, reproducible ----------------------------------
def make_sequences(num_samples, max_digits, seed):
    """Return `num_samples` distinct sequences of 1 to `max_digits` digits in random order.

    Lengths are balanced as far as possible: 6000 samples of up to 5 digits use all 10 of one digit,
    all 100 of two, all 1000 of three, and 2445 each of four and five. In a uniform draw, nine in
    ten sequences would have five digits. Raises InputError if fewer distinct sequences exist.
    """
    distinct = sum(10 ** n for n in range(1, max_digits + 1))  # 0 7 and 7 are different
    if num_samples > distinct:
        raise InputError(f"NUM_SAMPLES={num_samples}: only {distinct} distinct sequences of 1 to "
                         f"{max_digits} digits exist: use at most that many, or raise "
                         f"MAX_DIGITS={max_digits}")
    # subtle: use a separate generator. random.seed() would reseed Python's global generator.
    rng = random.Random(seed)
    sequences = []
    for length in range(1, max_digits + 1):
        # Start with the shortest, so that the longer lengths can supply what a short one cannot.
        lengths_left = max_digits - length + 1
        wanted = math.ceil((num_samples - len(sequences)) / lengths_left)  # an equal share
        count = min(wanted, 10 ** length)
        for number in rng.sample(range(10 ** length), count):  # without replacement
            sequences.append(list(f"{number:0{length}d}"))  # 7 -> ['0', '0', '7']
    rng.shuffle(sequences)
    return sequences


def check_tokens(tokens, known=DIGITS):
    """Raise InputError if one of `tokens` is not among the `known` ones."""
    for token in tokens:
        if token not in known:
            raise InputError(f"{ascii(token)} is unknown: use {' '.join(known)}, with spaces "
                             f"between them, for example: {' '.join(known[:3])}")


def make_item(digits):
    """Return the dataset's item for a list of digits:

        digits ['4', '0', '7']             source [10, 6, 13]
        words  ['four', 'zero', 'seven']   target [20, 16, 23]

    `collate_fn` adds <SOS>, <EOS>, and <PAD>, which depend on the architecture and the batch.
    """
    check_tokens(digits)
    words = [WORD_OF[digit] for digit in digits]
    return {"digits": digits, "source": VOCABULARY.encode(list(digits)),
            "words": words, "target": VOCABULARY.encode(words)}


def is_held_out(digits, validation_share):
    """Return True if this sequence is held out for validation. A checksum of its digits decides.

    So scripts with the same share never train on each other's held-out sequences, whatever their
    seeds and numbers of samples.
    """
    return zlib.crc32("".join(digits).encode()) < validation_share * 2 ** 32


class NumberTranslationDataset(Dataset):
    """Digit sequences and their words, tokenized once, when the dataset is built."""

    def __init__(self, num_samples=6000, max_digits=5, seed=0):
        self.items = [make_item(digits) for digits in make_sequences(num_samples, max_digits, seed)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def split(self, validation_share):
        """Return two disjoint lists of indices, (training, validation), both ordered by length.

        So a batch for validation, which is not shuffled, has sequences of similar length.
        """
        order = sorted(range(len(self)), key=lambda i: len(self.items[i]["digits"]))
        held_out = [is_held_out(self.items[i]["digits"], validation_share) for i in order]
        return ([i for i, out in zip(order, held_out) if not out],
                [i for i, out in zip(order, held_out) if out])


# --- The batch: padding, masks, and labels --------------------------------------------
def pad_rows(rows, value):
    """Return lists of ids as one tensor (B, longest), padded with `value` on the right.

        pad_rows([[10, 6, 13], [15]], PAD)   ->   [[10,  6, 13],
                                                   [15,  0,  0]]
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row] + [value] * (longest - len(row)) for row in rows])  # (B, longest)


def padding_mask(tokens):
    """Return the mask (B, 1, 1, S) of ids (B, S): True = may be attended to, False = padding.

        [[10, 6, 13],          [[[[True, True,  True ]]],
         [15, 0,  0]]    ->     [[[True, False, False]]]]

    The dimensions of size 1 are for heads and queries (S is any length): a key is masked for all of
    them or for none. Queries are never masked, because outputs at padded positions are never used.

    CONVENTION. Here and in F.scaled_dot_product_attention, True means "may attend". In
    nn.MultiheadAttention and nn.Transformer, True means "masked". Convert with `~`.
    """
    return (tokens != PAD)[:, None, None, :]  # (B, 1, 1, S)


def collate_fn(items):
    """Collate dataset items into one batch with everything that the three architectures need.

    Here are two rows, `4 0 7` and `9`, as tokens. A dot is <PAD>, or IGNORE_INDEX in labels:

      encoder-decoder (S = 3, T = 4; the decoder also sees the whole source)
        source          4    0    7             9    .    .

        decoder_input   SOS  four zero seven    SOS  nine .    .
        labels          four zero seven EOS     nine EOS  .    .

      decoder-only (one row: digits, <SEP>, words; S + T = 7 tokens, <EOS> is only a label)
        pair            4   0   7   SEP   four  zero   seven          9   SEP   nine  .   .   .   .
        pair_labels     .   .   .   four  zero  seven  EOS            .   nine  EOS   .   .   .   .

      encoder-only: also `pair`, but it masks tokens and makes its own labels at every step

    Read down each column: from this input and those before it, predict the label below.

    subtle: the labels are the input shifted by one position, and they are shifted only *here*.
    Hugging Face's causal models shift inside the loss. If you pass them shifted labels, the model
    learns to predict the token after next.

    subtle: <EOS> follows the last word of *its own* row. A common bug is to pad first and then
    append <EOS>, which then follows a word only in the longest rows.

    The digits in `pair` are not scored: they are random, so each would add a loss of ln 10 = 2.30
    that no model can reduce. The label at <SEP> is the first word.

    Returns a dict:  int64 tensors    source, decoder_input, labels, pair, pair_labels
                     boolean masks    source_mask, decoder_mask, pair_mask; see `padding_mask`
                     lists of lists   digits, words
    """
    sources = [item["source"] for item in items]
    targets = [item["target"] for item in items]
    source = pad_rows(sources, PAD)  # (B, S)
    decoder_input = pad_rows([[SOS] + target for target in targets], PAD)  # (B, T)
    labels = pad_rows([target + [EOS] for target in targets], IGNORE_INDEX)  # (B, T)
    pair = pad_rows([s + [SEP] + t for s, t in zip(sources, targets)], PAD)  # (B, S+T)
    pair_labels = pad_rows([[IGNORE_INDEX] * len(s) + t + [EOS] for s, t in zip(sources, targets)],
                           IGNORE_INDEX)  # (B, S+T)
    return {
        "source": source, "source_mask": padding_mask(source),
        "decoder_input": decoder_input, "decoder_mask": padding_mask(decoder_input),
        "labels": labels,
        "pair": pair, "pair_mask": padding_mask(pair), "pair_labels": pair_labels,
        "digits": [item["digits"] for item in items], "words": [item["words"] for item in items],
    }


def to_device(batch, device):
    """Return the batch with its tensors on `device`. The lists of strings stay as they are."""
    return {name: value.to(device) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def create_dataloaders(num_samples=6000, max_digits=5, batch_size=64, seed=0, validation_share=0.1):
    """Return (training, validation) loaders over disjoint sequences. Only the first shuffles."""
    check(**locals())  # one clear line for an argument that cannot work
    dataset = NumberTranslationDataset(num_samples, max_digits, seed)
    training, validation = dataset.split(validation_share)
    if not validation or not training:
        raise InputError(f"NUM_SAMPLES={num_samples} with VALIDATION_SHARE={validation_share} "
                         f"leaves {len(training)} sequences for training and {len(validation)} for "
                         "validation: use 100 samples or more and a share of 0.1")
    # subtle: the validation loader needs a generator, too. Every pass over a DataLoader draws a
    # seed for worker processes, even where nothing is shuffled and no workers exist. Without a
    # generator of its own, it would draw from torch's global one, and evaluation would change
    # training.
    train_loader = DataLoader(Subset(dataset, training), batch_size, shuffle=True,
                              collate_fn=collate_fn, generator=torch.Generator().manual_seed(seed))
    # Without gradients, larger batches fit in memory.
    val_loader = DataLoader(Subset(dataset, validation), 4 * batch_size, collate_fn=collate_fn,
                            generator=torch.Generator().manual_seed(seed))
    return train_loader, val_loader


# --- Scoring and printing -------------------------------------------------------------
def exact_match(written, expected):
    """Return the fraction of rows (lists of tokens) that are equal to the expected ones."""
    return sum(a == b for a, b in zip(written, expected)) / len(expected)


def print_examples(examples, count=5):
    """Print the first `count` examples: (source, expected, written), each a list of tokens."""
    for source, expected, written in examples[:count]:
        verdict = "correct" if written == expected else f"WRONG: expected {' '.join(expected)}"
        print(f"  {' '.join(source)}  ->  {' '.join(written)}   {verdict}")


def print_attention(weights, queries, keys):
    """Print attention weights (T, S) as a table with a row per query and a column per key."""
    print(" " * 12 + "".join(f"{key:>8s}" for key in keys))
    for query, row in zip(queries, weights.tolist()):
        print(f"  {query:10s}" + "".join(f"{weight:8.2f}" for weight in row))


def print_label_table(inputs, labels):
    """Print input ids and label ids (1-D tensors of equal size) as a table, one position per line.

    Print this table for the first batch of every new project. It shows what is hard to see in a
    loss: labels shifted twice, a misplaced <EOS>, a prompt that is scored.
    """
    print("  position  input    label    counts toward the loss?")
    for position, (i, label) in enumerate(zip(inputs.tolist(), labels.tolist())):
        counts = label != IGNORE_INDEX
        shown = VOCABULARY.tokens[label] if counts else str(IGNORE_INDEX)
        print(f"  {position:8d}  {VOCABULARY.tokens[i]:8s} {shown:8s} {'yes' if counts else 'no'}")


def print_masks(batch, row):
    """Print what each position of decoder_input may attend to under three masks, side by side."""
    length = batch["decoder_input"].size(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()  # (T, T)
    padding = batch["decoder_mask"][row, 0]                       # (1, T)
    columns = [("padding", padding.expand(length, length)), ("causal", causal),
               ("both (&)", causal & padding)]
    print(" " * 10 + "".join(f"{title:{2 * length + 4}s}" for title, _ in columns))
    for position, name in enumerate(VOCABULARY.decode(batch["decoder_input"][row])):
        marks = [" ".join("#" if allowed else "." for allowed in mask[position].tolist())
                 for _, mask in columns]
        print(f"  {name:8s}" + "".join(f"{line:{2 * length + 4}s}" for line in marks))


def main():
    """Print the vocabulary, the data, and one batch.

    In both tables of labels, <EOS> teaches the model to stop. The prompt is read but not scored.
    """
    prepare(globals())
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                                  VALIDATION_SHARE)
    training, validation = list(train_loader.dataset), list(val_loader.dataset)

    print(f"The vocabulary: {len(VOCABULARY)} tokens")
    for name, tokens in (("special", SPECIAL_TOKENS), ("digits", DIGITS), ("words", WORDS)):
        print(f"  {name:8s}" + "  ".join(f"{VOCABULARY.ids[token]}={token}" for token in tokens))

    print(f"\nThe data: {len(training)} sequences for training, {len(validation)} for validation")
    print("  digits   training   validation")
    for length in range(1, MAX_DIGITS + 1):
        counts = [sum(len(item["digits"]) == length for item in items)
                  for items in (training, validation)]
        print(f"  {length:6d}   {counts[0]:8d}   {counts[1]:10d}")
    print("  samples:")
    for item in training[::len(training) // 3][:3]:
        print(f"    {' '.join(item['digits']):10s} -> {' '.join(item['words'])}")

    rows = {len(item["digits"]): item for item in training}  # the last item of each length
    items = [rows[length] for length in sorted(rows)[:4]][::-1]  # one row of each of four lengths
    batch = collate_fn(items)
    print(f"\nA batch of {len(items)} rows: source {tuple(batch['source'].shape)}, "
          f"decoder_input {tuple(batch['decoder_input'].shape)}, pair {tuple(batch['pair'].shape)}")
    row = len(items) // 2  # a row with padding, unless the batch has only one row
    source = " ".join(VOCABULARY.decode(batch["source"][row]))
    print(f"\nRow {row} as the encoder-decoder gets it, with the source {source}")
    print_label_table(batch["decoder_input"][row], batch["labels"][row])
    print("\nThe same row as the decoder-only model gets it: only the answer counts")
    print_label_table(batch["pair"][row], batch["pair_labels"][row])
    print("\nWhat each position of decoder_input may attend to (# yes, . no). "
          "Rows are queries; columns are keys.")
    print_masks(batch, row)
    print("  <PAD> is masked as a key, never as a query: its own outputs are computed and ignored.")

    seen = {tuple(item["digits"]) for item in training}
    leaked = sum(tuple(item["digits"]) in seen for item in validation)
    ended = sum(batch["labels"][i, len(item["words"])] == EOS for i, item in enumerate(items))
    print(f"\ndisjoint: {leaked} of {len(validation)} validation sequences occur in training")
    print(f"<EOS> directly follows the last word in {ended} of {len(items)} rows")


if __name__ == "__main__":
    run_script(main)
