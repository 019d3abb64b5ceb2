"""
checks.py - what "right" means for each exercise, as an example and a few properties

A check compares the learner's module `mine` with the original module `real`. It stops at the first
thing that is wrong, and says what went in, what should come out, and what came out. A solution is
judged by what it does, never by its text. All sizes differ, so swapped axes are caught.
"""
import math
from types import SimpleNamespace

import torch
from torch import nn

import toy_dataset
from toy_dataset import EOS, IGNORE_INDEX, MASK, PAD, SEP, make_item

B, T, S, H, K, D = 2, 5, 7, 4, 6, 24  # rows, queries, keys, heads, sizes: pairwise different


class Wrong(Exception):
    """What is wrong, in several lines, with a question at the end."""


def shown(value):
    """Return a short text for a value: its shape and its first numbers."""
    if torch.is_tensor(value):
        numbers = value.tolist() if value.numel() <= 16 else "..."
        if value.is_floating_point() and value.numel() <= 16:
            numbers = torch.round(value * 1000).div(1000).tolist()
        return f"shape {tuple(value.shape)}  {numbers}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value) if len(repr(value)) < 200 else repr(value)[:200] + " ..."


def first_difference(found, expected):
    """Return where two tensors differ first, as a text."""
    gap = (found.double() - expected.double()).abs()
    differs = (gap > 1e-6) | (found.isnan() ^ expected.isnan())
    place = tuple(differs.nonzero()[0].tolist())
    return f"first difference at {list(place)}: {expected[place].item():.4g} expected, " \
           f"{found[place].item():.4g} found"


def same(title, found, expected, question, given=None):
    """Raise Wrong unless `found` is like `expected`. Prints the title if it is."""
    lines = [] if given is None else [f"given     {given}"]
    lines += [f"expected  {shown(expected)}", f"yours     {shown(found)}"]
    if torch.is_tensor(expected):
        if not torch.is_tensor(found):
            raise Wrong("\n".join([f"{title}: not a tensor", *lines, question]))
        if found.shape != expected.shape:
            raise Wrong("\n".join([f"{title}: another shape", *lines,
                                   "Which shape does the docstring promise?"]))
        if found.dtype != expected.dtype and not (found.is_floating_point()
                                                  and expected.is_floating_point()):
            raise Wrong("\n".join([f"{title}: another type, {found.dtype}", *lines,
                                   f"The original returns {expected.dtype}."]))
        if not torch.allclose(found.double(), expected.double(), atol=1e-6, equal_nan=True):
            lines.append(first_difference(found.detach(), expected.detach()))
            raise Wrong("\n".join([f"{title}: other numbers", *lines, question]))
    elif isinstance(expected, float):
        if not isinstance(found, (int, float)) or not math.isclose(found, expected, abs_tol=1e-6):
            raise Wrong("\n".join([title, *lines, question]))
    elif found != expected:
        raise Wrong("\n".join([title, *lines, question]))
    print(f"  ok     {title}")


def holds(sentence, truth, question):
    """Raise Wrong with `question` unless `truth`. Prints the sentence if it holds."""
    if not truth:
        raise Wrong(f"{sentence}: not so\n{question}")
    print(f"  ok     {sentence}")


def twins(make, mine, real, std=0.5):
    """Return the learner's and the original module, made by `make`, with the same large weights."""
    torch.manual_seed(0)
    original = make(real).double().eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=std)
    torch.manual_seed(0)
    theirs = make(mine).double().eval()
    theirs.load_state_dict(original.state_dict())
    return theirs, original


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# --- The data -------------------------------------------------------------------------
def encode(mine, real):
    text = "4 0 7 <SEP> nine"
    same("a string becomes ids", mine.Vocabulary().encode(text), real.Vocabulary().encode(text),
         "Does the order of the ids follow the order of the tokens?", text)
    same("a list gives the same", mine.Vocabulary().encode(text.split()), [10, 6, 13, 4, 25],
         "A list needs no splitting. Does yours treat it like a string?", text.split())
    same("an unknown token becomes <UNK>", mine.Vocabulary().encode(["4", "x"]), [10, 3],
         "Is the token dropped, or replaced?", ["4", "x"])


def pad_rows(mine, real):
    rows = [[10, 6, 13], [15], [7, 8]]
    same("the docstring's example", mine.pad_rows(rows[:2], 0), real.pad_rows(rows[:2], 0),
         "To which length must the second row grow, and on which side?", rows[:2])
    same("another value, three rows", mine.pad_rows(rows, -100), real.pad_rows(rows, -100),
         "Do you pad with the value that was given?")
    holds("the lists that came in are unchanged", rows == [[10, 6, 13], [15], [7, 8]],
          "Does `row += ...` or `append` change the caller's list?")


def padding_mask(mine, real):
    tokens = torch.tensor([[10, 6, 13], [15, 0, 0]])
    same("the docstring's example", mine.padding_mask(tokens), real.padding_mask(tokens),
         "Which dimension of the mask belongs to keys: the last, or the one before it?", tokens)


def collate_fn(mine, real):
    items = [make_item(list(digits)) for digits in ("407", "9", "15")]
    found, expected = mine.collate_fn(items), real.collate_fn(items)
    questions = {"labels": "<EOS> follows the last word of which row: its own, or the longest?",
                 "decoder_input": "What does the decoder see before it predicts the first word?",
                 "pair": "Is <EOS> an input of the decoder-only model, or only a label?",
                 "pair_labels": "Which positions must not count? What is their label?"}
    for name in expected:
        if name not in found:
            raise Wrong(f"the batch has no {name!r}\nThe docstring lists what a batch contains.")
    for name in ("source", "decoder_input", "labels", "pair", "pair_labels", "source_mask",
                 "decoder_mask", "pair_mask", "digits", "words"):
        same(name, found[name], expected[name],
             questions.get(name, "Which of the tensors above does it belong to?"), "4 0 7, 9, 1 5")


def exact_match(mine, real):
    expected = [["four", "zero"], ["nine"], ["one", "two"], ["six"]]
    written = [["four", "zero"], ["nine", "nine"], ["one"], ["six"]]
    same("two of four", mine.exact_match(written, expected), 0.5,
         "Is a right beginning with an extra word correct? And one word too few?", written)


# --- Attention ------------------------------------------------------------------------
def softmax(mine, real):
    scores = torch.tensor([[2.0, 0.0, 2.0]])
    same("softmax of 2, 0, 2", mine.softmax(scores), scores.softmax(-1),
         "Is each exp divided by the sum of all exps in its row?", scores.tolist())
    scores = torch.randn(B, H, T, S)
    same("the last dimension of four", mine.softmax(scores), scores.softmax(-1),
         "Over which dimension do you sum, and does the sum keep it?")
    scores = torch.tensor([[1000.0, 999.0], [0.0, 1.0]])
    same("scores of 1000, and a row far below,", mine.softmax(scores), scores.softmax(-1),
         "exp(1000) is infinite. Which number can you subtract from a row without changing it?")


def attention(mine, real):
    queries = torch.tensor([[[[1.0, 0.0]]]])
    keys = torch.tensor([[[[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]]])
    found, expected = mine.attention(queries, keys, keys), real.attention(queries, keys, keys)
    question = "What is each score divided by? K is the size of a head's vectors, here 2."
    same("one query, three keys: the weights", found[1], expected[1], question, keys[0, 0].tolist())
    same("one query, three keys: the result", found[0], expected[0],
         "Which of the three is averaged with the weights?")
    queries, keys, values = rand(B, H, T, K), rand(B, H, S, K), rand(B, H, S, K)
    mask = torch.ones(T, S, dtype=torch.bool).tril(1)[None, None]
    for title, hidden in (("four heads", None), ("a mask, True = may attend", mask)):
        for part, found, expected in zip(
                ("the result", "the weights"), mine.attention(queries, keys, values, hidden),
                real.attention(queries, keys, values, hidden)):
            same(f"{title}: {part}", found, expected,
                 "Softmax over which dimension? And which entries does the mask hide?")
    hidden = mine.attention(queries, keys, values, mask)[1][:, :, ~mask[0, 0]]
    holds("a masked weight is exactly 0", hidden.eq(0).all(),
          "exp of which number is exactly 0? It must be far below all scores.")
    empty = torch.zeros(1, 1, T, S, dtype=torch.bool)
    holds("a query without keys gets finite numbers",
          mine.attention(queries, keys, values, empty)[0].isfinite().all(),
          "What is the softmax of a row of minus infinities?")
    weights = mine.attention(queries, keys, values, None, 0.5)[1]
    same("the weights that are returned have no dropout", weights,
         real.attention(queries, keys, values)[1], "Is dropout applied before you return them?")


def module(mine):
    return mine.MultiHeadAttention(D, H)


def split_heads(mine, real):
    x = torch.arange(8.0).view(1, 2, 4)
    same("two tokens, two heads", mine.MultiHeadAttention(4, 2).split_heads(x),
         real.MultiHeadAttention(4, 2).split_heads(x),
         "Do the first numbers of *each* token end up in head 0? What does view do alone?",
         x[0].tolist())
    x = rand(B, S, D)
    same("(B, S, D) -> (B, H, S, K)", module(mine).split_heads(x), module(real).split_heads(x),
         "Which two dimensions change places?")


def merge_heads(mine, real):
    x = torch.arange(8.0).view(1, 2, 2, 2)
    same("two heads, two tokens", mine.MultiHeadAttention(4, 2).merge_heads(x),
         real.MultiHeadAttention(4, 2).merge_heads(x),
         "Do both heads' numbers of one token stand next to each other?", x[0].tolist())
    x = rand(B, S, D)
    same("it undoes split_heads", module(mine).merge_heads(module(real).split_heads(x)), x,
         "What did split_heads do last?")


def multi_head(mine, real):
    theirs, original = twins(module, mine, real)
    x, memory = rand(B, T, D), rand(B, S, D)
    mask = (torch.rand(B, 1, 1, S) < 0.7) | (torch.arange(S) == 0)
    for title, arguments in (("self-attention", (x, x)), ("cross-attention", (x, memory)),
                             ("with a mask", (x, memory, mask))):
        for part, found, expected in zip(("result", "weights"), theirs(*arguments),
                                         original(*arguments)):
            same(f"{title}: {part}", found, expected,
                 "Which matrices see x, and which ones see memory? Does w_o come last?")
    theirs.dropout = 0.5
    same("no dropout in evaluation", theirs(x, x)[0], original(x, x)[0],
         "Where does the module say whether it is in training?")
    holds("dropout in training", not theirs.train()(x, x)[0].equal(original(x, x)[0]),
          "Which of the two dropout rates reaches `attention` in training?")


def causal_mask(mine, real):
    for queries, keys in ((3, 3), (2, 5), (1, 4)):
        same(f"{queries} queries, {keys} keys", mine.causal_mask(queries, keys),
             real.causal_mask(queries, keys),
             "The last query stands at the position of the last key. Which keys are before it?")


# --- The block ------------------------------------------------------------------------
def positions(mine, real):
    theirs, original = mine.PositionalEncoding(D, 9), real.PositionalEncoding(D, 9)
    same("the table", theirs.table, original.table,
         "Even dimensions are sines. Which frequency does dimension 3 share with dimension 2?")
    holds("the table is a buffer that is not saved",
          "table" in dict(theirs.named_buffers()) and not theirs.state_dict(),
          "register_buffer has an argument for that.")
    x = rand(B, 6, D)
    same("it is added to the tokens", theirs(x), original(x), "Is each token at its own position?")


def feed_forward(mine, real):
    theirs, original = twins(lambda m: m.FeedForward(D, 20), mine, real)
    x = rand(B, T, D)
    same("up, GELU, down", theirs(x), original(x),
         "Which nonlinearity is between the two layers, and in which form?")
    theirs.dropout.p = original.dropout.p = 0.5
    torch.manual_seed(0)
    found = theirs.train()(x)
    torch.manual_seed(0)
    same("dropout in training", found, original.train()(x),
         "self.dropout is a module. Is it called after the nonlinearity?")


def encoder_layer(mine, real):
    theirs, original = twins(lambda m: m.EncoderLayer(D, H, 20), mine, real)
    x, mask = rand(B, S, D), torch.arange(S)[None] < torch.tensor([[S], [3]])
    for part, found, expected in zip(("result", "weights"), theirs(x, mask[:, None, None]),
                                     original(x, mask[:, None, None])):
        same(part, found, expected, "To what do you add: x, or the normalized x? Is each norm used "
                                    "once, and does attention get the mask?")
    theirs.dropout.p = 0.5
    holds("dropout in training", not theirs.train()(x)[0].equal(original(x)[0]),
          "Each part passes through self.dropout before it is added.")


def decoder_layer(mine, real):
    theirs, original = twins(lambda m: m.DecoderLayer(D, H, 20), mine, real)
    x, mask = rand(B, T, D), real.causal_mask(T, T)
    for part, found, expected in zip(("result", "weights"), theirs(x, mask), original(x, mask)):
        same(part, found, expected, "To what do you add: x, or the normalized x? Is each norm used "
                                    "once, and does attention get the mask?")
    cache = original.self_attention.new_cache(B, T)
    theirs(x[:, :3], real.causal_mask(3, 3), cache)
    same("in two pieces with a cache", theirs(x[:, 3:], real.causal_mask(2, 5), cache)[0],
         original(x, mask)[0][:, 3:], "Is the cache handed on to attention?")
    theirs.dropout.p = 0.5
    holds("dropout in training", not theirs.train()(x, mask)[0].equal(original(x, mask)[0]),
          "Each part passes through self.dropout before it is added.")


def positions_of(mine, real):
    tokens = torch.tensor([[PAD, PAD, 9, SEP, 25], [4, 6, 13, SEP, 10]])
    model = real.DecoderOnlyTransformer
    same("left padding", mine.DecoderOnlyTransformer.positions_of(model(), tokens),
         model().positions_of(tokens), "In which column does the first row begin to count?",
         tokens.tolist())
    tokens = torch.tensor([[PAD, 9, SEP, PAD, PAD], [4, 6, SEP, PAD, PAD]])
    same("room for the answer on the right, as in `generate`",
         mine.DecoderOnlyTransformer.positions_of(model(), tokens), model().positions_of(tokens),
         "Positions go on counting behind the last real token.", tokens.tolist())


# --- Training -------------------------------------------------------------------------
def decoder(m, **options):
    sizes = {"d_model": D, "num_heads": H, "num_layers": 2, "d_ff": 20, "max_len": 40}
    return m.DecoderOnlyTransformer(**{**sizes, **options})


def batch_of(*numbers):
    return toy_dataset.collate_fn([make_item(list(number)) for number in numbers])


def compute_loss(mine, real):
    theirs, original = twins(decoder, mine, real)
    for title, batch in (("one row", batch_of("407")), ("two lengths", batch_of("40", "7"))):
        same(title, mine.compute_loss(theirs, batch).item(),
             real.compute_loss(original, batch).item(),
             "Do ignored labels count in the mean? Are labels shifted once, by collate_fn?")


class Descent:
    """Gradient descent. (Using torch.optim for the first time takes a second.)"""

    def __init__(self, model, rate):
        self.parameters, self.rate = list(model.parameters()), rate
        self.param_groups = [{"params": self.parameters, "lr": rate}]

    def zero_grad(self, set_to_none=True):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        for parameter in self.parameters:
            parameter.data -= self.rate * parameter.grad


class Slower:
    """A scheduler that makes `optimizer` slower at every step."""

    def __init__(self, optimizer):
        self.optimizer, self.last_epoch = optimizer, 0

    def step(self):
        self.last_epoch += 1
        self.optimizer.rate *= 0.8


def train_epoch(mine, real):
    loader = torch.utils.data.DataLoader(
        [make_item(list(f"{i:03d}")) for i in range(12)], 4, collate_fn=toy_dataset.collate_fn)
    results = []
    for m, model in zip((mine, real), twins(decoder, mine, real, std=0.2)):
        optimizer = Descent(model, 0.3)
        means = [m.train_epoch(model, loader, optimizer, Slower(optimizer), 0.5) for _ in range(2)]
        results.append((means, model.layers[0].feed_forward.up.weight.detach()))
    same("the mean losses of two epochs", torch.tensor(results[0][0]), torch.tensor(results[1][0]),
         "When is .grad emptied? When is it clipped? Does the scheduler make a step per batch?")
    same("the weights after two epochs", results[0][1], results[1][1],
         "Does the scheduler make a step after each batch?")
    modes = []

    def record(model, batch):
        modes.append(model.training)
        return mine.compute_loss(model, batch)

    model = decoder(mine).eval()
    optimizer = Descent(model, 0.1)
    mine.train_epoch(model, loader, optimizer, Slower(optimizer), 0.5, record)
    holds("it calls loss_function, once per batch", len(modes) == 3,
          "Fine-tuning hands in another loss. Which function do you call?")
    holds("the model is in training mode", all(modes), "Dropout must be on. Who switches it on?")


def lr_factor(mine, real):
    for step, question in ((0, "A rate of 0 wastes the first step."),
                           (19, "Warmup must end at 1."), (20, "The cosine must begin at 1."),
                           (60, "Steps count from 0. Which number does the last one have?"),
                           (99, "The last step has final_factor."),
                           (140, "Beyond the last step, it stays there.")):
        same(f"lr_factor({step}, 100, 20, 0.1)", float(mine.lr_factor(step, 100, 20, 0.1)),
             float(real.lr_factor(step, 100, 20, 0.1)), question)
    same("no warmup", float(mine.lr_factor(0, 100, 0, 0.1)), 1.0, "Is there a division by 0?")


def train_step(mine, real):
    items = [make_item(list(digits)) for digits in ("4", "40712", "99", "123", "5", "66666")]

    def step(m, precision="float32", scale=None, world=1, dropout=0.0):
        m.BATCH_SIZE, m.ACCUMULATION_STEPS, m.SEED = 3, 2, 0
        m.CLIP_NORM, m.PRECISION = 0.5, precision
        m.WORLD, m.dist = world, SimpleNamespace(all_reduce=lambda totals: totals.mul_(2))
        script = m.ARCHITECTURES["decoder-only"][0]
        torch.manual_seed(0)
        model = decoder(script, dropout=dropout)
        torch.manual_seed(torch.initial_seed() + m.disturbed)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        loss, norm, labels = m.train_step(script, model.train(), items, 0, optimizer, scaler)
        return float(loss), float(norm), int(labels), model.embedding.weight.detach()

    mine.disturbed, real.disturbed = 1, 0
    for title, question, options in (
            ("one process", "Sum the losses of all micro-batches, and divide the gradient once by "
             "all labels.", {}),
            ("a scaler", "The scaler multiplied the gradients. When are they divided again?",
             {"scale": 64.0}),
            ("bfloat16", "Which part is computed in 16 bits, and which one must not be?",
             {"precision": "bfloat16"}),
            ("two processes", "Labels are summed over the processes, and gradients are averaged.",
             {"world": 2})):
        for part, found, expected in zip(("loss", "norm before clipping", "labels", "new weights"),
                                         step(mine, **options), step(real, **options)):
            same(f"{title}: {part}", found, expected, question)
    before = step(mine, dropout=0.3)
    mine.disturbed = 2
    same("dropout does not depend on earlier random numbers", step(mine, dropout=0.3)[3], before[3],
         "Each micro-batch sets its own seed, so that a resumed run repeats it.")


# --- BERT -----------------------------------------------------------------------------
def mask_tokens(mine, real):
    batch = batch_of("40712", "9", "15", "663")["pair"].repeat(300, 1)
    torch.manual_seed(0)
    corrupted, labels = mine.mask_tokens(batch)
    counts = labels != IGNORE_INDEX
    holds("both have the shape of the tokens", corrupted.shape == labels.shape == batch.shape,
          "What are the two results?")
    holds("a label is the original token", labels[counts].equal(batch[counts]),
          "What must the model predict where a token was replaced?")
    holds("only selected tokens change", corrupted[~counts].equal(batch[~counts]),
          "Does something change without having a label?")
    special = (batch == SEP) | (batch == PAD)
    holds("<SEP> and <PAD> are never selected", not (counts & special).any(),
          "Which tokens are candidates?")
    holds("each row has a label", counts.any(1).all(), "What is the mean of no labels?")
    words = real.word_positions(batch)
    both = (counts & words).any(1) & (counts & ~words).any(1)
    holds("one side of each row", not both.any() and (counts & words).any() and
          (counts & ~words).any(), "If a digit and its word are hidden, who can recover them?")
    shares = [(corrupted == MASK)[counts].double().mean().item(),
              ((corrupted != MASK) & (corrupted != batch))[counts].double().mean().item()]
    holds("of the selected tokens, about 80% are masked", abs(shares[0] - 0.8) < 0.04,
          f"Yours: {shares[0]:.0%}. Does one draw decide among the three actions?")
    holds("about 10% are replaced by others", abs(shares[1] - 0.095) < 0.03,
          f"Yours: {shares[1]:.0%}. One draw has three outcomes; two draws overlap.")
    holds("replacements are digits or words",
          (corrupted[counts & (corrupted != MASK)] > MASK).all(), "From which ids do you draw?")
    sides = torch.where((counts & words).any(1, keepdim=True), words, ~words & ~special)
    rates = (counts.sum(1) / sides.sum(1))[batch.ne(PAD).sum(1) == 11]
    holds("the rate differs from row to row, up to all", rates.unique().numel() == 5,
          "Each row draws its own rate, from min_rate to 1.")
    everything = mine.mask_tokens(batch, mask_share=1.0, random_share=0.0, min_rate=1.0)
    one, two = (mine.mask_tokens(batch, generator=torch.Generator().manual_seed(5))
                for _ in range(2))
    holds("the same generator gives the same masks", one[0].equal(two[0]) and one[1].equal(two[1]),
          "Who draws the random numbers: the generator that was given?")
    holds("the arguments are used", (everything[0][everything[1] != IGNORE_INDEX] == MASK).all(),
          "Is 0.8 written in the code where mask_share should be?")


def pooling(mine, real):
    def make(m):
        sizes = {"d_model": D, "num_heads": H, "num_layers": 1, "d_ff": 20}
        return m.MatchClassifier(m.EncoderOnlyTransformer(**sizes))

    theirs, original = twins(make, mine, real)
    batch = batch_of("40712", "9")["pair"]
    same("two rows, one of them padded", theirs(batch), original(batch),
         "How many tokens of the short row are real? Divide by that number.")
    same("the short row alone", theirs(batch[1:, :3]), original(batch)[1:],
         "Does its prediction change if the padding is cut off?")


# --- Generation -----------------------------------------------------------------------
def append(mine, real):
    layer = real.MultiHeadAttention(D, H)
    keys, values = torch.randn(B, H, S, K), torch.randn(B, H, S, K)
    cache = mine.KeyValueCache(B, layer, S + 3)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        found = cache.append(keys[:, :, start:end], values[:, :, start:end])
        same(f"keys, {end} columns so far", found[0], keys[:, :, :end],
             "Where does the next free column begin? What part of the cache is valid?")
        same(f"values, {end} columns so far", found[1], values[:, :, :end],
             "Are keys and values exchanged?")


def filter_logits(mine, real):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.5, 0.15, 0.3]]).log()
    question = {"top_k": "How many tokens are left in each row?",
                "top_p": "Does the token stay that crosses p? Sum the probabilities *before* it.",
                "temperature": "Which operation sharpens: dividing by 0.5, or multiplying?"}
    for options in ({"top_k": 2}, {"top_k": 1}, {"top_p": 0.7}, {"top_p": 0.5}, {"top_p": 1.0},
                    {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3, "top_p": 0.6},
                    {"top_k": 2, "top_p": 0.6}):
        found, expected = (m.filter_logits(logits.clone(), **options).softmax(-1)
                           for m in (mine, real))
        same(f"{options}, as probabilities", found, expected, question[list(options)[-1]],
             "0.5, 0.3, 0.15, 0.05, and the same in another order")
    before = logits.clone()
    mine.filter_logits(logits, top_k=1)
    holds("the logits that came in are unchanged", logits.equal(before), "Do you write into them?")


def choose_next_token(mine, real):
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -0.5, -0.6]])
    generated = torch.tensor([[0], [1]])
    same("greedy", mine.choose_next_token(logits, generated), torch.tensor([0, 1]),
         "What is the most likely token?", logits.tolist())
    same("greedy, penalty 2", mine.choose_next_token(logits, generated, repetition_penalty=2.0),
         real.choose_next_token(logits, generated, repetition_penalty=2.0),
         "Dividing a negative logit makes it larger. Which operation lowers it?",
         "ids 0 and 1 were generated before")
    logits, generated = torch.tensor([[4.0, 2.5, -9.0]]), torch.tensor([[0]])
    same("a large logit, penalty 2", mine.choose_next_token(logits, generated,
                                                            repetition_penalty=2.0),
         torch.tensor([1]), "4 becomes 2. Do you divide by the penalty?", logits.tolist())
    rows, logits = 4000, rand(1, 5).float()
    nothing = torch.zeros(rows, 1, dtype=torch.long)
    for title, some in (("temperature 1", {}), ("top_k 2", {"top_k": 2}),
                        ("temperature 0.5, top_p 0.8", {"temperature": 0.5, "top_p": 0.8})):
        options = {"temperature": 1.0, **some}
        found, again = (mine.choose_next_token(
            logits.expand(rows, -1), nothing, **options,
            generator=torch.Generator().manual_seed(1)) for _ in range(2))
        holds(f"one token per row, {title}", found.shape == (rows,), "Which dimension has size 1?")
        holds("the same generator gives the same tokens", found.equal(again),
              "Who draws the random numbers: the generator that was given?")
        expected = real.filter_logits(logits, **options).softmax(-1)[0]
        holds(f"sampling follows the distribution, {title}",
              ((found.bincount(minlength=5) / rows) - expected).abs().max() < 0.03,
              "Are temperature and filters applied, and once?")


def generate(mine, real):
    theirs, original = twins(decoder, mine, real, std=0.25)
    prompts = [[10, 6, 13, SEP], [9, SEP], [7, 8, SEP]]
    for seed in range(12):
        ends = 20 if seed % 2 else EOS
        for model in (theirs, original):
            model.output.weight = nn.Parameter(torch.randn(
                26, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
            model.output.weight.data[[EOS, 20]] *= 1.7  # so that answers end early
        expected = [original.generate([prompt], 8, stop_at=ends)[0] for prompt in prompts]
        if seed == 0:
            same("one prompt, without a cache", theirs.generate(prompts[:1], 8, use_cache=False),
                 expected[:1], "Which position's logits choose the next token?")
            same("one prompt, with the cache", theirs.generate(prompts[:1], 8), expected[:1],
                 "Which columns are new to the cache, and which positions do they have?")
        same(f"model {seed}: three prompts of different lengths, stop_at={ends}",
             theirs.generate(prompts, 8, stop_at=ends), expected,
             "Do mask and positions say that short prompts are padded on the left? Does one row "
             "that ends early end the others? Is what follows cut off?", prompts)
    one = [m.generate(prompts, 6, temperature=1.0, top_k=4, stop_at=None,
                      generator=torch.Generator().manual_seed(3)) for m in (theirs, original)]
    same("sampling with a generator", one[0], one[1], "Are all options handed on?")
    one = [m.generate(prompts, 6, repetition_penalty=3.0, stop_at=None) for m in (theirs, original)]
    same("a repetition penalty", one[0], one[1],
         "Does it count the answer so far, or the prompt, too?")
    widths = []
    hook = theirs.embedding.register_forward_hook(lambda _, __, out: widths.append(out.size(1)))
    theirs.dropout.p = 0.5
    answers = theirs.train().generate(prompts, 6, stop_at=None)
    hook.remove()
    holds("with the cache, each column is sent once", sum(widths) == 4 + 5,
          f"Yours sends {widths} columns. Which ones are cached already?")
    same("no dropout, also for a model in training", answers,
         original.generate(prompts, 6, stop_at=None), "Which mode must the model be in?")
    holds("the model is in training mode again", theirs.training, "Who sets it back?")


# --- T5 -------------------------------------------------------------------------------
def cross_attention(mine, real):
    theirs, original = twins(lambda m: m.DecoderLayer(D, H, 20), mine, real)
    x, memory, causal = rand(B, T, D), rand(B, S, D), real.causal_mask(T, T)
    mask = torch.arange(S)[None, None, None] < torch.tensor([S, 3])[:, None, None, None]
    given = {"memory": memory, "memory_mask": mask}
    for part, found, expected in zip(("result", "weights"), theirs(x, causal, **given),
                                     original(x, causal, **given)):
        same(part, found, expected, "Which norm belongs to cross-attention? Where do its keys come "
                                    "from, and which mask do they have?")
    theirs.dropout.p = 0.5
    holds("dropout in training", not theirs.train()(x, causal, **given)[0].equal(
        original(x, causal, **given)[0]), "Each part passes through self.dropout.")
    theirs.eval()
    caches = [(layer.self_attention.new_cache(B, T), layer.cross_attention.new_cache(B, S))
              for layer in (theirs, original)]
    for start, end in ((0, 3), (3, 5)):
        memory = memory if start == 0 else memory[:, :0]
        pieces = [layer(x[:, start:end], real.causal_mask(end - start, end), one, memory, mask, two)
                  for layer, (one, two) in zip((theirs, original), caches)]
        same(f"with caches, columns {start} to {end}", pieces[0][0], pieces[1][0],
             "Are both caches handed on, each to its own attention?")


def best_candidates(mine, real):
    sums = torch.tensor([[-0.5, -1.2], [-0.1, -3.0]])
    logits = torch.randn(4, 5)
    for part, found, expected in zip(("sums", "parents", "tokens"),
                                     mine.best_candidates(sums, logits, 2),
                                     real.best_candidates(sums, logits, 2)):
        same(part, found, expected, "An index counts through W * V candidates. How do you get the "
                                    "parent and the token? Are the numbers log-probabilities?")
    same("width 1 takes the most likely token", mine.best_candidates(sums[:, :1], logits[:2], 1)[2],
         logits[:2].argmax(-1, keepdim=True), "With one hypothesis, there is one candidate.")


# --- All of it ------------------------------------------------------------------------
def tiny_gpt(mine, real):
    """`mine` has been run, and so it has been trained."""
    for name in ("encode", "model", "generate"):
        if not hasattr(mine, name):
            raise Wrong(f"the file defines no {name}\nThe task names three things. See `start`.")
    same("encode", list(mine.encode("407")), real.encode("407"),
         "The ids: `.` is 0, `=` is 1, digits follow, then words.")
    with torch.no_grad():
        tokens = torch.tensor([mine.encode("40712")])
        changed = tokens.clone()
        changed[:, 7:] = tokens[:, 6:7]
        one, two = mine.model(tokens), mine.model(changed)
        same("the shape of the logits", tuple(one.shape), (1, tokens.size(1), 22),
             "One score per token, at each position.")
        holds("a later token changes no earlier prediction",
              torch.allclose(one[:, :7], two[:, :7], atol=1e-5), "Which token may attend to which?")
        right, wrong = 0, ""
        for i in range(100):
            number = f"{(i * 7919) % 10 ** (1 + i % 5):0{1 + i % 5}d}"
            ids, n = mine.encode(number), len(number)
            prompt = torch.tensor([ids[:n + 1]])
            answer = mine.generate(mine.model, prompt, n + 1)[0].tolist()
            right += answer == ids
            wrong = wrong or (f" The first wrong one: {number} gave the ids {answer}."
                              if answer != ids else "")
    holds("95 of 100 numbers are right", right >= 95,
          f"Yours: {right}.{wrong} Is the loss low? Then which token may attend to which?")


# --- For the bugs: parts that no blank covers ------------------------------------------
def new_model(mine, real):
    """A model of decoder_only.py starts as the original does, and computes the same."""
    for m in (mine, real):
        torch.manual_seed(0)
        m.built = decoder(m)
    for name, weight in real.built.state_dict().items():
        holds(f"the first weights of {name}", mine.built.state_dict()[name].equal(weight),
              "How large are the first weights, and which weights are shared?")
    theirs, original = twins(decoder, mine, real)
    tokens = torch.tensor([[10, 6, 13, SEP, 20, 16]])
    same("logits", theirs(tokens), original(tokens),
         "Follow the tokens from the embedding to the output. What is missing, or too much?")
    same("embedding_scale", float(theirs.embedding_scale), float(original.embedding_scale),
         "Tokens and positions are added. How large is each?")


def encoder_loss(mine, real):
    def make(m):
        return m.EncoderOnlyTransformer(d_model=D, num_heads=H, num_layers=1, d_ff=20)

    theirs, original = twins(make, mine, real)
    batch = batch_of("407", "9")
    same("the loss of one batch", mine.compute_loss(theirs, batch).item(),
         real.compute_loss(original, batch).item(), "Which labels count?")


def beams(mine, real):
    def make(m):
        return m.EncoderDecoderTransformer(d_model=D, num_heads=H, d_ff=20, max_len=40)

    theirs, original = twins(make, mine, real)
    sources = [[10, 6, 13], [9], [7, 8]]
    same("greedy", theirs.generate(sources, 7), original.generate(sources, 7),
         "Compare one step with the formula in the docstrings.")
    for width in (2, 4):
        found, expected = (
            [[h.tokens for h in answers] for answers in model.beam_search(sources, width, 1.0, 7)]
            for model in (theirs, original))
        same(f"beam search, width {width}", found, expected,
             "When a hypothesis is dropped, what happens to its row of the cache?")


# Which checks a script must pass after a bug was repaired. Blanks use the one of their own name.
FOR_SCRIPT = {
    "decoder_only.py": (attention, split_heads, merge_heads, causal_mask, positions, feed_forward,
                        decoder_layer, positions_of, append, filter_logits, choose_next_token,
                        new_model, compute_loss, train_epoch, generate),
    "encoder_only.py": (attention, split_heads, merge_heads, multi_head, feed_forward,
                        encoder_layer, mask_tokens, pooling, encoder_loss),
    "encoder_decoder.py": (attention, split_heads, merge_heads, causal_mask, feed_forward,
                           cross_attention, best_candidates, beams),
}


class SimpleTiny:
    """What `encode` of tiny_gpt.py returns, without training a model for it."""

    @staticmethod
    def encode(number):
        words = "zero one two three four five six seven eight nine".split()
        tokens = [".", "=", *"0123456789", *words]
        return [tokens.index(t) for t in [*number, "=", *(words[int(d)] for d in number), "."]]
