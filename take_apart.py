"""
take_apart.py - replace parts of trained models with rules in words, and watch the score

THE IDEA.  A picture of attention weights shows where a model looks, but not whether that matters.
This script runs a stronger test. It takes a module out of a trained model, puts a rule in words in
its place, and translates again. If the score doesn't change, the rule does all that the module did
for this task. If the score falls, the rule misses something.

    column             0   1   2     3      4    5     6
    tokens             4   0   7   <SEP>  four zero seven              three digits: n = 3
    decoder-only       the query in column 3 predicts word 0, so it reads column 0, and so on:
                       column q reads column q - n. Column 6 reads <SEP> and predicts <EOS>
    encoder-only       column 4 has mask 0 and reads column 0: column q reads column q - n - 1
    encoder-decoder    target column q reads source column q

The rules come from outside the model, and all weights stay as trained. A rule knows the columns and
the number of digits, but never which digits they are. A table holds the mean of what a module adds
to a token's vector, measured on training sequences: for example, one mean for each column. Scores
are the exact match on held-out sequences, without teacher forcing.

Run it:     python take_apart.py        (about 65 seconds on one CPU core)

The last lines should be close to:

      encoder-decoder               as learned                                 100.0
        decoder 1 cross-attention   word t reads digit t                       100.0
        decoder 0 cross-attention   word t reads digit t                       100.0
        encoder 1 self-attention    switched off                               100.0
        encoder 0 self-attention    switched off                               100.0
        decoder 1 self-attention    switched off                                97.6
        decoder 0 self-attention    table by column                             96.6
        encoder 1 feed-forward      switched off                                96.1
        encoder 0 feed-forward      table by own token and column               96.1
        decoder 1 feed-forward      table by token read and role               100.0
        decoder 0 feed-forward      table by own token, token read, role       100.0
        a check                     word t reads digit t + 1 (wrong)             0.4
"""
import math

from housekeeping import choose_device, prepare, run_script
import torch

from quick_start import ARCHITECTURES
from toy_dataset import (DIGITS, EOS, PAD, SEP, SOS, VOCABULARY, collate_fn, create_dataloaders,
                         exact_match, make_item, to_device)
from training import train_for

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
NUM_SEEDS = 1            # models per architecture. With several, scores are lowest-highest.
D_MODEL = 64
NUM_HEADS = 4
D_FF = 256
NUM_SAMPLES = 6000
MAX_DIGITS = 5
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
CLIP_NORM = 1.0
NUM_STEPS = 680          # training steps of each model
NUM_MEASURED = 2500      # training sequences from which the tables are measured
NUM_TRIED = 200          # held-out sequences in sections 1 and 2; section 4 uses all
DEVICE = "cpu"           # or "cuda", "mps"
# =====================================================================================


# --- The model under test -------------------------------------------------------------
class Subject:
    """A trained model, its sequences, and where the tokens of the current pass stand."""

    def __init__(self, name, model, measured, held_out):
        self.name, self.model, self.script = name, model.eval(), ARCHITECTURES[name][0]
        self.measured, self.held_out = measured, held_out
        self.modules = {part: module for part, module in model.named_modules()
                        if part.endswith(("attention", "feed_forward"))}
        self.learned = {part: module.attention_function for part, module in self.modules.items()
                        if part.endswith("attention")}
        self.hooks = {}
        model.embedding.register_forward_pre_hook(lambda _, inputs: self.look_at(inputs[0]))

    def look_at(self, tokens):
        """Note the tokens (B, S) that the model is about to embed, and where they stand."""
        left = torch.zeros_like(tokens[:, :1])  # (B, 1): padding on the left
        if self.name != "encoder-decoder":
            left = (tokens != PAD).int().argmax(1, keepdim=True)
            self.n = (tokens == SEP).int().argmax(1, keepdim=True) - left  # (B, 1): digits
        elif tokens[0, 0] != SOS:  # the source; the target follows
            self.source, self.n = tokens, (tokens != PAD).sum(1, keepdim=True)
        self.tokens, self.left = tokens, left

    def columns(self, length):
        """Return the columns (B, length), counted from the first real token of each row."""
        return torch.arange(length, device=self.left.device)[None] - self.left

    def features(self):
        """Return what a table may depend on, for each token of the current pass, (B, S) each."""
        column, n = self.columns(self.tokens.size(1)), self.n
        if self.name != "encoder-decoder":  # digit, <SEP>, word or mask, last word or mask
            role = (column >= n).long() + (column > n) + (column == 2 * n)
        else:  # digit; <SOS>, word, last word
            role = (self.tokens[:, :1] == SOS) * (1 + (column > 0).long() + (column == n))
        return {"column": column.clamp(min=0), "n": n, "role": role, "own token": self.tokens}

    def token_read(self):
        """Return the token (B, T) that cross-attention has just read, <PAD> if it read several."""
        one = self.chosen.sum(-1) == 1  # (B, T)
        return self.source.gather(1, self.chosen.int().argmax(-1)).masked_fill(~one, PAD)

    def score(self, count=None):
        """Return the exact match on the held-out sequences, or on about `count` of them."""
        items = self.held_out[::max(1, len(self.held_out) // count) if count else 1]
        options = {} if self.name == "encoder-only" else {"use_cache": False}
        written = self.script.translate(self.model, [item["digits"] for item in items], **options)
        return exact_match(written, [item["words"] for item in items])


def new_subject(name, seed):
    """Train a model of architecture `name`."""
    script, model_class, _ = ARCHITECTURES[name]
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, seed)
    torch.manual_seed(seed)
    device = choose_device(DEVICE)
    model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, 2, D_FF).to(device)
    train_for(script.compute_loss, model, train_loader, NUM_STEPS, LEARNING_RATE, WARMUP_STEPS,
              CLIP_NORM)
    items = list(train_loader.dataset)
    items = items[::max(1, len(items) // NUM_MEASURED)]
    measured = [to_device(collate_fn(items[i:i + 250]), device) for i in range(0, len(items), 250)]
    return Subject(name, model, measured, list(val_loader.dataset))


# --- The rules ------------------------------------------------------------------------
# A rule says whether the query in column q attends to the key in column k; n is the number of
# digits. A query attends to several such keys equally. One without any gets zeros.
OFF, READ, READ_NEXT = "switched off", "word t reads digit t", "word t reads digit t + 1 (wrong)"
RULES = {
    OFF: lambda q, k, n: k < 0,
    "attend to yourself": lambda q, k, n: k == q,
    "attend to the first token": lambda q, k, n: k == 0,
    "attend to the previous token": lambda q, k, n: k == q - 1,
    "attend to all equally": lambda q, k, n: k >= 0,
}
READING_RULES = {  # only for modules that could read the digits for a word
    "encoder-only": {
        "attend to <SEP>": lambda q, k, n: k == n,
        READ: lambda q, k, n: abs(q - k) == n + 1,  # and digit t reads word t
        READ_NEXT: lambda q, k, n: k == q - n},
    "decoder-only": {
        "attend to <SEP>": lambda q, k, n: k == n,
        READ: lambda q, k, n: k == q - n,  # after the last digit, this is <SEP>
        READ_NEXT: lambda q, k, n: k == q - n + 1},
    "encoder-decoder": {
        READ: lambda q, k, n: (k == q) | (q >= n),  # after the last digit, all digits equally
        READ_NEXT: lambda q, k, n: (k == q + 1) | (q + 1 >= n)},
}
TABLES = {  # what the mean depends on
    "one fixed vector": (),
    "table by role": ("role",),
    "table by column": ("column",),
    "table by column and n": ("column", "n"),
    "table by own token": ("own token",),
    "table by own token and role": ("own token", "role"),
    "table by own token and column": ("own token", "column"),
    "table by token read and role": ("token read", "role"),
    "table by own token, token read, role": ("own token", "token read", "role"),
}


def attention_by(rule, subject):
    """Return a function with the signature of `attention` that attends by `rule`."""
    def attention_function(queries, keys, values, mask=None, dropout=0.0):
        q = subject.columns(queries.size(2))[:, :, None]  # (B, T, 1)
        k = subject.columns(keys.size(2))[:, None]  # (B, 1, S)
        chosen = (rule(q, k, subject.n[:, :, None]) & (k >= 0))[:, None]  # (B, 1, T, S)
        chosen = chosen if mask is None else chosen & mask
        subject.chosen = chosen[:, 0]
        weights = (chosen / chosen.sum(-1, keepdim=True).clamp(min=1)).to(values)
        weights = weights.expand(-1, queries.size(1), -1, -1)  # the same in all heads
        return weights @ values, weights
    return attention_function


def codes(subject, keys):
    """Return one number for each combination of the features `keys`, (B, S)."""
    features, code = subject.features(), torch.zeros_like(subject.tokens)
    for key in keys:
        code = code * 64 + (subject.token_read() if key == "token read" else features[key])
    return code


@torch.no_grad()
def measure(subject, part, keys):
    """Return the codes (N,) and, for each, the mean (N, D) of what the module `part` adds.

    The model reads training sequences, with everything replaced that has been replaced so far.
    """
    found, added = [], []

    def record(_, inputs, output):
        real = subject.tokens != PAD
        found.append(codes(subject, keys)[real])
        added.append((output[0] if isinstance(output, tuple) else output)[real])

    handle = subject.modules[part].register_forward_hook(record)
    for batch in subject.measured:
        subject.script.logits_and_labels(subject.model, batch)
    handle.remove()
    known, row = torch.cat(found).unique(return_inverse=True)
    added = torch.cat(added)
    sums = added.new_zeros(len(known), added.size(1)).index_add_(0, row, added)
    return known, sums / row.bincount()[:, None]


def replace(subject, part, change):
    """Replace the module `part` by `change`: a key of RULES, READING_RULES, or TABLES."""
    module, rules = subject.modules[part], {**RULES, **READING_RULES[subject.name]}
    if change in TABLES:
        known, means = measure(subject, part, TABLES[change])

        def look_up(_, inputs, output):
            code = codes(subject, TABLES[change])  # (B, S)
            row = torch.searchsorted(known, code).clamp(max=len(known) - 1)
            added = means[row] * (known[row] == code)[..., None]  # 0 for a code never measured
            return (added, output[1]) if isinstance(output, tuple) else added

        subject.hooks[part] = module.register_forward_hook(look_up)
    elif part in subject.learned:
        module.attention_function = attention_by(rules[change], subject)
    else:  # a feed-forward network that is switched off
        subject.hooks[part] = module.register_forward_hook(lambda _, __, output: output * 0)


def restore(subject, parts):
    """Put the learned modules `parts` back."""
    for part in parts:
        if part in subject.learned:
            subject.modules[part].attention_function = subject.learned[part]
        if part in subject.hooks:
            subject.hooks.pop(part).remove()


# --- What is replaced by what ---------------------------------------------------------
PLANS = {  # the rules that stand at the end, in the order of replacing
    "encoder-only": {
        "layers.1.self_attention": READ, "layers.0.self_attention": OFF,
        "layers.1.feed_forward": OFF, "layers.0.feed_forward": OFF},
    "decoder-only": {
        "layers.1.self_attention": READ, "layers.0.self_attention": "table by column and n",
        "layers.1.feed_forward": "table by role",
        "layers.0.feed_forward": "table by own token and role"},
    "encoder-decoder": {
        "decoder_layers.1.cross_attention": READ, "decoder_layers.0.cross_attention": READ,
        "encoder_layers.1.self_attention": OFF, "encoder_layers.0.self_attention": OFF,
        "decoder_layers.1.self_attention": OFF,
        "decoder_layers.0.self_attention": "table by column",
        "encoder_layers.1.feed_forward": OFF,
        "encoder_layers.0.feed_forward": "table by own token and column",
        "decoder_layers.1.feed_forward": "table by token read and role",
        "decoder_layers.0.feed_forward": "table by own token, token read, role"},
}


def fits(part, change):
    """Return whether it makes sense to replace the module `part` by `change`."""
    if change == READ or change == READ_NEXT or change == "attend to <SEP>":
        return "self" not in part or part.startswith("layers")
    return "token read" not in change or part.startswith("decoder")


def span(scores, places):
    """Return one score in percent, or the lowest-highest, rounded down: 100 means all correct."""
    cells = [f"{math.floor(score * 10 ** (places + 2) + 1e-6) / 10 ** places:.{places}f}"
             for score in (min(scores), max(scores))]
    return cells[0] if cells[0] == cells[1] else "-".join(cells)


def show_menu(subjects, parts, menu):
    """Print the score with each of the modules `parts` replaced by each entry of `menu`."""
    titles = [part.split(".") for part in parts]
    print(" " * 42 + "".join(f"{stack.removesuffix('_layers'):>9s}" for stack, _, _ in titles))
    print(" " * 42 + "".join(f"{layer + ' ' + kind.split('_')[0]:>9s}"
                             for _, layer, kind in titles))
    for change in menu:
        cells = ""
        for part in parts:
            scores = []
            for subject in subjects if fits(part, change) else []:
                replace(subject, part, change)
                scores.append(subject.score(NUM_TRIED))
                restore(subject, [part])
            cells += f"{span(scores, 0) if scores else '-':>9s}"
        print(f"    {change:38s}{cells}", flush=True)


# --- Beginning and stopping -----------------------------------------------------------
def rows_of(subject, n):
    """Return the measured sequences of n digits as one batch."""
    rows = [digits for batch in subject.measured for digits in batch["digits"] if len(digits) == n]
    return to_device(collate_fn([make_item(digits) for digits in rows]), choose_device(DEVICE))


@torch.no_grad()
def first_words(subject, n=5):
    """Exchange the positions of the first and the last digit of n, which stay in their columns.

    Returns how often <SEP> of the decoder-only model then predicts the word of the digit that has
    position 0, and of the digit in column 0, where the two digits differ.
    """
    tokens = rows_of(subject, n)["pair"][:, :n + 1]  # (B, n + 1)
    tokens = tokens[tokens[:, 0] != tokens[:, n - 1]]
    positions = torch.arange(n + 1, device=tokens.device).expand(len(tokens), -1).clone()
    positions[:, [0, n - 1]] = positions[:, [n - 1, 0]]
    hidden, _ = subject.model.run_decoder(tokens, positions=positions)
    predicted = subject.model.output(hidden[:, -1]).argmax(-1)  # (B,)
    words = tokens + len(DIGITS)  # the ids of the digits' words
    return [(predicted == words[:, column]).float().mean().item() for column in (n - 1, 0)]


@torch.no_grad()
def stops_of_gpt(subject, says_last, rule, n=5):
    """Return how often the decoder-only model predicts <EOS> in the column of word n - 2.

    That is not the last word. If `says_last`, the attention of layer 0 adds there what it adds at
    the last word of n - 1 digits, its mean over such sequences. Layer 1 attends by `rule`.
    """
    column, part = 2 * n - 2, subject.modules["layers.0.self_attention"]
    added = []
    handle = part.register_forward_hook(lambda *x: added.append(x[2][0][:, column].mean(0)))
    subject.model(rows_of(subject, n - 1)["pair"])
    handle.remove()

    def say_last(_, __, output):
        output[0][:, column] = added[0]

    handle = part.register_forward_hook(say_last) if says_last else None
    replace(subject, "layers.1.self_attention", rule)
    logits = subject.model(rows_of(subject, n)["pair"])
    restore(subject, ["layers.1.self_attention"])
    if handle:
        handle.remove()
    return (logits[:, column].argmax(-1) == EOS).float().mean().item()


@torch.no_grad()
def stops_of_t5(subject, j, n=5):
    """Return how often the encoder-decoder predicts <EOS> after t words, t = 1 to n - 1, (n - 1,).

    Both cross-attentions read digit j everywhere.
    """
    parts = ["decoder_layers.0.cross_attention", "decoder_layers.1.cross_attention"]
    for part in parts:
        rule = attention_by(lambda q, k, _: (k == j) & (q >= 0), subject)
        subject.modules[part].attention_function = rule
    batch = rows_of(subject, n)
    logits = subject.model(batch["source"], batch["decoder_input"], batch["source_mask"])
    restore(subject, parts)
    return (logits[:, 1:n].argmax(-1) == EOS).float().mean(0).tolist()


def show_first_and_last(subjects):
    """Print which digit GPT reads first, and what makes GPT and T5 stop."""
    swapped = [first_words(subject) for subject in subjects["decoder-only"]]
    print("  GPT's first word, if the positions of digits 0 and 4 are exchanged, is the digit that")
    for title, scores in zip(("has position 0", "stands in column 0"), zip(*swapped)):
        print(f"    {title:36s}{span(scores, 0):>9s}")
    print(f"  {'GPT stops before the last word, if it':38s}{'reads <SEP>':>14s}{'a digit':>12s}"
          f"{'nothing':>12s}")
    for title, says_last in (("layer 0 says that the last is reached", True),
                             ("layer 0 does not say so", False)):
        cells = [span([stops_of_gpt(s, says_last, rule) for s in subjects["decoder-only"]], 0)
                 for rule in ("attend to <SEP>", READ, OFF)]
        print(f"    {title:38s}{cells[0]:>12s}{cells[1]:>12s}{cells[2]:>12s}")
    print("  T5 stops before the last word, if the digit that it reads stands")
    tables = [[stops_of_t5(subject, j) for j in range(5)]
              for subject in subjects["encoder-decoder"]]
    for title, wanted in (("before the column of the query", int.__lt__),
                          ("in that column, or after it", int.__ge__)):
        cells = [[table[j][t - 1] for j in range(5) for t in range(1, 5) if wanted(j, t)]
                 for table in tables]
        print(f"    {title:36s}{span([sum(each) / len(each) for each in cells], 0):>9s}")


def main():
    prepare(globals())
    subjects = {}
    for name in ARCHITECTURES:
        subjects[name] = [new_subject(name, seed) for seed in range(NUM_SEEDS)]
        print(f"trained {name}", flush=True)

    print("\n1. One attention module replaced: exact match in percent")
    for name, group in subjects.items():
        print(f"  {name}")
        show_menu(group, list(group[0].learned), [
            *RULES, *READING_RULES[name], *list(TABLES)[:4]])

    print("\n2. All attention replaced as in section 4, and one feed-forward network")
    for name, group in subjects.items():
        print(f"  {name}")
        attention = [part for part in PLANS[name] if part in group[0].learned]
        for subject in group:
            for part in attention:
                replace(subject, part, PLANS[name][part])
        tables = [change for change in TABLES if name == "encoder-decoder" or "read" not in change]
        show_menu(group, [part for part in group[0].modules if part not in attention],
                  [OFF, *tables])
        for subject in group:
            restore(subject, attention)

    print("\n3. The first word, and <EOS>: how often, in percent, in sequences of five digits")
    show_first_and_last(subjects)

    print("\n4. One module after another: exact match with all replaced so far")
    for name, group in subjects.items():
        print(f"  {name:30s}{'as learned':36s}{span([s.score() for s in group], 1):>12s}")
        for part, change in PLANS[name].items():
            for subject in group:
                replace(subject, part, change)
            title = part.replace("_layers.", " ").replace("layers.", "layer ").replace(".", " ")
            print(f"    {title.replace('_', '-'):28s}{change:36s}"
                  f"{span([s.score() for s in group], 1):>12s}", flush=True)
        for subject in group:
            for part in (part for part, change in PLANS[name].items() if change == READ):
                replace(subject, part, READ_NEXT)
        print(f"    {'a check':28s}{READ_NEXT:36s}{span([s.score() for s in group], 1):>12s}")


if __name__ == "__main__":
    run_script(main)
