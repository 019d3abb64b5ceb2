"""
compare_architectures.py - which architecture for which task, and why: measured

Everything below is measured in this run, on models that learned the same task from the same sequences. Nothing is printed
from memory except section 8, which draws the conclusions and names the figures that they rest on.

    1 Who can see whom            change one token, see which outputs change
    2 What each is trained to do  one row each: input, label, loss
    3 One task, one budget        steps and seconds to 90 % and 99 %
    4 What each costs             parameters, passes, multiply-adds, milliseconds, bytes of cache
    5 What each can and cannot do tried, not claimed
    6 How to generate             greedy to beam search on a model that is still unsure
    7 Does it matter?             take one thing away at a time; the prediction first, then the figure
    8 Choosing                    real tasks, and which figure above decides

Run it:     python compare_architectures.py        (about 50 seconds on one CPU core)

The models are those in checkpoints/ where there are any (made by quick_start.py, train_all.py or the three scripts), shown
with the sizes they were trained with; where there is none, the one that section 3 trains is used, and the script says so.

READING ORDER   any: each section is one function, and `main` calls them in order
"""
import contextlib
import copy
import functools
import math
import statistics
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
from toy_dataset import (CHECKPOINTS, IGNORE_INDEX, SOS, VOCABULARY, InputError, check_constants, choose_device, collate_fn,
                         create_dataloaders, run_script, to_device)
from train_all import ARCHITECTURES, parameters_by_component

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
D_MODEL = 64             # size of the models that section 3 trains
NUM_HEADS = 4
NUM_LAYERS = 2
D_FF = 256
DROPOUT = 0.0
NUM_SAMPLES = 6000
MAX_DIGITS = 5
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
NUM_STEPS = 500          # of section 3, for each architecture
EVALUATE_EVERY = 25      # steps, in section 3. Exact match on all unseen sequences each time.
UNSURE_STEPS = 60        # of section 6: the encoder-decoder after so many steps still hesitates. Try 500: nothing to choose.
ABLATION_STEPS = 250     # of section 7, for each variant
SEED = 0
DEVICE = "cpu"           # or "cuda", "mps"
NUM_THREADS = 1
# =====================================================================================


# -------------------------------------------------------------------------------------
# Shared by the sections
# -------------------------------------------------------------------------------------
def data():
    """(training loader, validation loader), the same for everything in this file."""
    return create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)


def fresh(name, **changes):
    """An untrained model of architecture `name`, from the same seed each time."""
    torch.manual_seed(SEED)
    arguments = {"d_model": D_MODEL, "num_heads": NUM_HEADS, "num_layers": NUM_LAYERS, "d_ff": D_FF, "dropout": DROPOUT,
                 "max_len": max(64, 2 * MAX_DIGITS + 3), **changes}
    return ARCHITECTURES[name][1](**arguments).to(choose_device(DEVICE))


def train_for(name, model, num_steps, watch=None):
    """`num_steps` steps of architecture `name`'s own recipe. watch(step, seconds so far) is called after each step.

    Seconds count training only, not what `watch` does.
    """
    script = ARCHITECTURES[name][0]
    optimizer, scheduler = script.create_optimizer(model, LEARNING_RATE, num_steps)
    train_loader, _ = data()
    step, seconds = 0, 0.0
    with tqdm(total=num_steps, ascii=True, leave=False, disable=None, desc=name) as bar:
        while step < num_steps:
            for batch in train_loader:
                start = time.perf_counter()
                model.train()
                loss = script.compute_loss(model, to_device(batch, choose_device(DEVICE)))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), script.CLIP_NORM)
                optimizer.step()
                scheduler.step()
                step, seconds = step + 1, seconds + time.perf_counter() - start
                bar.update()
                if watch is not None:
                    watch(step, seconds)
                if step == num_steps:
                    break
    return model.eval()


def median_milliseconds(run, rounds=5):
    """Median time of `run()` in ms, after one call to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def some_unseen(count=200):
    """(digits, words) of `count` unseen sequences. Taken evenly: they lie ordered by length, the longest first."""
    unseen = data()[1].dataset
    items = [unseen[i * len(unseen) // count] for i in range(count)] if len(unseen) > count else list(unseen)
    return [item["digits"] for item in items], [item["words"] for item in items]


# -------------------------------------------------------------------------------------
# 1. Who can see whom
# -------------------------------------------------------------------------------------
@torch.no_grad()
def influence(model, inputs, changed):
    """Which output positions notice a change of each position of one input?

    model(*inputs) gives logits (1, T, V); `changed` says which of `inputs` (tensors (1, S)) is changed. Returns
    booleans (T, S): does output row notice input column? Measured in float64, where an influence that is there is far
    above rounding, and one that is not is exactly 0.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    before = model(*inputs)                                                              # (1, T, V)
    columns = []
    for position in range(inputs[changed].size(1)):
        other = [tokens.clone() for tokens in inputs]
        # Any other ordinary token will do; <SEP> and the like too, for nothing here depends on sense.
        other[changed][0, position] = 6 if other[changed][0, position] != 6 else 7
        columns.append((model(*other) - before).abs().sum(-1)[0] > 0)                    # (T,)
    return torch.stack(columns, dim=1)                                                   # (T, S)


def section_1(models):
    """Print the measured influence beside the mask that explains it."""
    print("\n1. Who can see whom. Rows: outputs. Columns: the input token that was changed. # output changed, . it did not")
    pair = torch.tensor([VOCABULARY.encode("4 0 7 <SEP> four zero seven")])              # (1, 7)
    source, target = pair[:, :3], torch.tensor([[SOS] + pair[0, 4:].tolist()])           # (1, 3), (1, 4)
    full, causal = torch.ones(7, 7, dtype=torch.bool), torch.ones(7, 7, dtype=torch.bool).tril()
    cases = [("encoder-only", "no mask but padding: all see all", [pair], 0, full),
             ("decoder-only", "causal mask: nobody sees the future", [pair], 0, causal),
             ("encoder-decoder", "target on target: causal mask", [source, target], 1, causal[:4, :4]),
             ("encoder-decoder", "target on source: cross-attention, all of it", [source, target], 0, full[:4, :3])]
    for name, why, inputs, changed, mask in cases:
        measured = influence(models[name], inputs, changed)                              # (T, S)
        rows = VOCABULARY.decode(inputs[-1][0])
        print(f"  {name}: {why}. Measured and mask {'agree' if torch.equal(measured, mask) else 'DIFFER'}")
        print(f"    {'':8s}{'measured':{2 * mask.size(1) + 4}s}mask")
        for row, name_of_row in enumerate(rows):
            grids = [" ".join("#" if seen else "." for seen in grid[row].tolist()) for grid in (measured, mask)]
            print(f"    {name_of_row:8s}{grids[0]}    {grids[1]}")


# -------------------------------------------------------------------------------------
# 2. What each is trained to do
# -------------------------------------------------------------------------------------
@torch.no_grad()
def section_2(models, digits):
    """Print one row as each model gets it in training: input, label, loss per position."""
    print(f"\n2. What each is trained to do: the row {' '.join(digits)}, its labels, and the loss of each position in nats")
    words = [VOCABULARY.tokens[VOCABULARY.ids[digit] + 10] for digit in digits]
    item = {"digits": digits, "words": words, "source": VOCABULARY.encode(digits), "target": VOCABULARY.encode(words)}
    for name, model in models.items():
        script = ARCHITECTURES[name][0]
        batch = to_device(collate_fn([item]), choose_device(DEVICE))
        if name == "encoder-only":
            inputs, labels = encoder_only.mask_tokens(batch["pair"], torch.Generator(DEVICE).manual_seed(SEED))
            logits = model.eval()(inputs, batch["pair_mask"])
        else:
            inputs = batch["decoder_input" if name == "encoder-decoder" else "pair"]
            logits, labels = script.predict(model.eval(), batch)
        losses = -logits.log_softmax(-1)[0]                                              # (T, V)
        columns = []
        for position, (token, label) in enumerate(zip(inputs[0].tolist(), labels[0].tolist())):
            counts = label != IGNORE_INDEX
            columns.append((VOCABULARY.tokens[token], VOCABULARY.tokens[label] if counts else "-",
                            f"{losses[position, label].item():.3f}" if counts else "-"))
        print(f"  {name}" + (f", source {' '.join(digits)}" if name == "encoder-decoder" else ""))
        for title, cells in zip(("input", "label", "loss"), zip(*columns)):
            print(f"    {title:6s}" + "".join(f"{cell:>8s}" for cell in cells))


# -------------------------------------------------------------------------------------
# 3. One task, one budget
# -------------------------------------------------------------------------------------
def train_on_one_budget():
    """Train all three for NUM_STEPS steps on the same batches.

    Returns {name: model}, {name: [(step, seconds, exact match, loss), ...]}, and for section 6 the encoder-decoder as it
    was after UNSURE_STEPS. (Sixty steps come out nearly alike on every machine. Choosing the model by its score does not:
    rounding differs, the score jumps from step to step, and one more step makes another model.)
    """
    _, val_loader = data()
    trained, curves, unsure = {}, {}, None
    for name, (script, _, _) in ARCHITECTURES.items():
        model, curve, young = fresh(name), [], []

        def watch(step, seconds, model=model, script=script, curve=curve, young=young):
            if step % EVALUATE_EVERY == 0 or step == NUM_STEPS:
                result = script.evaluate(model, val_loader)
                curve.append((step, seconds, result["exact_match"], result["loss"]))
            if step == min(UNSURE_STEPS, NUM_STEPS):
                young.append(copy.deepcopy(model).eval())

        trained[name] = train_for(name, model, NUM_STEPS, watch)
        curves[name] = curve
        if name == "encoder-decoder":
            unsure = young[0]
    return trained, curves, unsure


def section_3(curves):
    """Print when each reached 90 % and 99 % exact match, where it ended, and its learning curve."""
    print(f"\n3. One task, one budget: {NUM_STEPS} steps of {BATCH_SIZE} rows each, same data, d_model {D_MODEL}, "
          f"{NUM_LAYERS} layers")
    print(f"  {'':17s}{'to 90 %':>20s}{'to 99 %':>20s}{'exact match':>13s}{'loss':>9s}{'ms a step':>11s}")
    for name, curve in curves.items():
        cells = []
        for goal in (0.9, 0.99):
            first = next(((step, seconds) for step, seconds, exact, _ in curve if exact >= goal), None)
            cells.append(f"{first[0]:4d} steps {first[1]:5.1f} s" if first else "not reached")
        steps, seconds, exact, loss = curve[-1]
        print(f"  {name:17s}{cells[0]:>20s}{cells[1]:>20s}{exact:13.1%}{loss:9.4f}{1000 * seconds / steps:11.1f}")
    print(f"  exact match over the steps, a sign for every {EVALUATE_EVERY} steps, 0 for under 10 % ... 9 for 90 % to 98 %, "
          "# for 99 % and more")
    for name, curve in curves.items():
        signs = "".join("#" if exact >= 0.99 else str(min(9, int(10 * exact))) for _, _, exact, _ in curve)
        print(f"  {name:17s}|{signs}|")
    print("  The encoder-only model is told how many words to write, and learns two directions in these steps, not one.")


# -------------------------------------------------------------------------------------
# 4. What each costs
# -------------------------------------------------------------------------------------
class Decompose(TorchDispatchMode):
    """Replaces each composite operation by those that it is made of, such as a linear layer by its matrix product. Under
    inference_mode older PyTorch versions (2.5) do not, and their counter, which knows only products, counts nothing."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with self:
            result = operation.decompose(*args, **(kwargs or {}))
        return operation(*args, **(kwargs or {})) if result is NotImplemented else result


def multiply_adds(run):
    """Multiply-adds of `run()` in matrix products, counted by torch.utils.flop_counter (which counts each as two)."""
    # The plain path of attention is made of matrix products, which are counted; not every fused kernel is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, Decompose():
        run()
    return counter.get_total_flops() // 2


def stack_passes(model, run):
    """How often `run()` sends something through a stack of layers of `model`: by counting calls of its last norm."""
    calls = []
    norms = [getattr(model, norm) for norm in ("final_norm", "encoder_norm") if hasattr(model, norm)]
    handles = [norm.register_forward_hook(lambda *_: calls.append(1)) for norm in norms]
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def section_4(models, digits):
    """Print parameters, passes, multiply-adds, times and cache sizes."""
    print("\n4. What each costs")
    for name, model in models.items():
        counts = parameters_by_component(model)
        print(f"  {name:16s}{sum(counts.values()):10,d} parameters: "
              + ", ".join(f"{count:,} {component}" for component, count in counts.items()))
    print(f"\n  To translate {len(digits)} digits")
    print(f"  {'':30s}{'passes':>8s}{'multiply-adds':>15s}{'ms alone':>10s}{'ms each in 64':>15s}")
    for name, model in models.items():
        translate = ARCHITECTURES[name][0].translate
        variants = [(", cache", {"use_cache": True}), (", no cache", {"use_cache": False})]
        variants = [("", {})] if name == "encoder-only" else variants
        for label, options in variants:
            def once(options=options, translate=translate, model=model):
                return translate(model, [digits], **options)

            def many(options=options, translate=translate, model=model):
                return translate(model, [digits] * 64, **options)
            print(f"  {name + label:30s}{stack_passes(model, once):8d}{multiply_adds(once):15,d}"
                  f"{median_milliseconds(once):10.2f}{median_milliseconds(many) / 64:15.3f}")
    print("\n  To write n tokens, milliseconds (weights are random here: time does not depend on them)")
    lengths = (16, 64, 256)
    print(f"  {'':30s}" + "".join(f"{'n = ' + str(n):>12s}" for n in lengths) + "     KiB of cache for the longest row")
    for name in ("decoder-only", "encoder-decoder"):
        model = fresh(name, max_len=max(lengths) + 8)
        for use_cache in (True, False):
            times = []
            for n in lengths:
                run = functools.partial(model.generate, [VOCABULARY.encode("4 0 7")], n, use_cache=use_cache, stop_at=None)
                times.append(median_milliseconds(run, 3))
            kept = f"{cache_bytes(name, model, 3, max(lengths)) / 1024:10.1f}" if use_cache else "         -"
            print(f"  {name + (', cache' if use_cache else ', no cache'):30s}" + "".join(f"{t:12.1f}" for t in times) + kept)


@torch.no_grad()
def cache_bytes(name, model, source_length, num_tokens):
    """Bytes that generation keeps for one row: those of the very tensors that it would make."""
    if name == "decoder-only":
        caches = [decoder_only.KeyValueCache(1, layer.self_attention, source_length + num_tokens) for layer in model.layers]
        kept = []
    else:
        caches = [encoder_decoder.KeyValueCache(1, layer.self_attention, num_tokens) for layer in model.decoder_layers]
        # Cross-attention's keys and values of the source, computed once, are kept as well.
        source = torch.full((1, source_length), 6, device=model.embedding.weight.device)  # (1, S)
        kept = [tensor for pair in model.memory_keys_values(model.encode(source)) for tensor in pair]
    return sum(tensor.nbytes for tensor in kept + [t for cache in caches for t in (cache.keys, cache.values)])


# -------------------------------------------------------------------------------------
# 5. What each can and cannot do
# -------------------------------------------------------------------------------------
def section_5(models):
    """Try each model on what it was not made for, and print what comes out."""
    print("\n5. What each can and cannot do, tried")
    digits, words = some_unseen()

    def score(written, expected):
        return f"{sum(a == b for a, b in zip(written, expected)) / len(expected):6.1%}"

    print(f"  words to digits, exact match on {len(digits)} unseen sequences")
    print(f"    encoder-only     {score(encoder_only.translate_back(models['encoder-only'], words), digits)}"
          "   trained on both directions: blanks may be anywhere")
    for name in ("decoder-only", "encoder-decoder"):
        written = ARCHITECTURES[name][0].translate(models[name], words)
        first = " ".join(written[0]) or "(nothing)"
        print(f"    {name:16s} {score(written, digits)}   never trained on it; for the first, it writes: {first}")

    middle = [row for row in zip(digits, words) if len(row[0]) >= 3]
    rows = [d[:1] + ["<MASK>"] + d[2:] + ["<SEP>"] + w for d, w in middle]
    filled = encoder_only.fill_blanks(models["encoder-only"], rows)
    right = score([row[1:2] for row in filled], [d[1:2] for d, _ in middle])
    print("  a blank in the middle: the second digit from all that surrounds it")
    print(f"    encoder-only     {right}")
    print("    decoder-only     cannot be asked: at the blank it has not read what follows")
    print("    encoder-decoder  cannot be asked: it has one task, and was trained on that")

    print("  longer than anything in training, exact match on 100 sequences of each length")
    generator = torch.Generator().manual_seed(SEED)
    lengths = range(MAX_DIGITS, MAX_DIGITS + 4)
    print(f"    {'':16s} " + "".join(f"{str(n) + ' digits':>12s}" for n in lengths))
    failures = {}
    for name, model in models.items():
        cells = []
        for length in lengths:
            drawn = torch.randint(0, 10, (100, length), generator=generator).tolist()
            sequences = [[str(digit) for digit in row] for row in drawn]
            expected = [[VOCABULARY.tokens[VOCABULARY.ids[d] + 10] for d in row] for row in sequences]
            written = ARCHITECTURES[name][0].translate(model, sequences)
            cells.append(score(written, expected))
            wrong = [(s, w) for s, w, e in zip(sequences, written, expected) if w != e]
            if length == MAX_DIGITS + 1 and wrong:
                failures[name] = wrong[0]
        print(f"    {name:16s} " + "".join(f"{cell:>12s}" for cell in cells))
    for name, (sequence, written) in failures.items():
        print(f"    {name:16s} {' '.join(sequence)} -> {' '.join(written)}")
    print("  The sinusoids are defined for these positions; no model was trained to use them.")

    print("  an unknown token: 4 x 7, read as 4 <UNK> 7")
    for name, model in models.items():
        print(f"    {name:16s} {' '.join(ARCHITECTURES[name][0].translate(model, [['4', 'x', '7']])[0])}")

    print("  the stop: share of answers with exactly as many words as digits")
    for name, model in models.items():
        written = ARCHITECTURES[name][0].translate(model, digits)
        share = sum(len(a) == len(b) for a, b in zip(written, digits)) / len(digits)
        print(f"    {name:16s} {share:6.1%}{'   given away by the number of blanks' if name == 'encoder-only' else ''}")


# -------------------------------------------------------------------------------------
# 6. How to generate
# -------------------------------------------------------------------------------------
def section_6(unsure):
    """Print exact match, diversity and time of every strategy on an undertrained encoder-decoder."""
    digits, words = some_unseen()
    print(f"\n6. How to generate: the encoder-decoder of section 3 after {min(UNSURE_STEPS, NUM_STEPS)} steps, still "
          f"unsure, on {len(digits)} unseen sequences")
    print(f"  {'':34s}{'exact match':>12s}{'distinct of 20':>16s}{'ms a sequence':>15s}")
    strategies = {"greedy": {}, "temperature 0.5": {"temperature": 0.5}, "temperature 1": {"temperature": 1.0},
                  "temperature 1.5": {"temperature": 1.5}, "top_k 3": {"temperature": 1.0, "top_k": 3},
                  "top_p 0.9": {"temperature": 1.0, "top_p": 0.9}, "repetition penalty 1.5": {"repetition_penalty": 1.5},
                  "repetition penalty 3": {"repetition_penalty": 3.0}, "beam search 2": {"beam_width": 2},
                  "beam search 5": {"beam_width": 5},
                  "beam search 5, length penalty 0": {"beam_width": 5, "length_penalty": 0.0}}
    for name, options in strategies.items():
        torch.manual_seed(SEED)
        start = time.perf_counter()
        written = encoder_decoder.translate(unsure, digits, **options)
        milliseconds = 1000 * (time.perf_counter() - start) / len(digits)
        right = sum(a == b for a, b in zip(written, words)) / len(words)
        # Diversity: how many different answers 20 tries give, in the mean over ten sequences.
        tries = [encoder_decoder.translate(unsure, [row] * 20, **options) for row in digits[::len(digits) // 10 or 1][:10]]
        distinct = statistics.mean(len({tuple(answer) for answer in answers}) for answers in tries)
        print(f"  {name:34s}{right:12.1%}{distinct:16.1f}{milliseconds:15.3f}")


# -------------------------------------------------------------------------------------
# 7. Does it matter?
# -------------------------------------------------------------------------------------
def without_positions(model):
    """Every token says what it is, none where."""
    model.positional_encoding.table.zero_()


def without_scaling(model):
    """Undo the division of the scores by sqrt(K), by multiplying the queries with it."""
    for module in model.modules():
        if type(module).__name__ == "MultiHeadAttention":
            factor = math.sqrt(module.head_dim)
            module.w_q.register_forward_hook(lambda _, __, queries, factor=factor: queries * factor)


def rewire(model, forward):
    """Give every decoder-only layer another forward(layer, x, mask, cache, need_weights)."""
    for layer in model.layers:
        layer.forward = lambda x, mask=None, cache=None, need_weights=False, layer=layer: forward(layer, x, mask, cache)


def attend(layer, x, mask, cache):
    """Self-attention of a decoder-only layer, as in its own forward."""
    keys, values = layer.self_attention.keys_values(x)
    if cache is not None:
        keys, values = cache.append(keys, values)
    return layer.self_attention(x, keys, values, mask)[0]


def without_residuals(model):
    """x = f(norm(x)): what a layer does not pass on is lost."""
    def forward(layer, x, mask, cache):
        x = attend(layer, layer.norm1(x), mask, cache)
        return layer.feed_forward(layer.norm2(x)), None
    rewire(model, forward)


def post_norm(model):
    """x = norm(x + f(x)), as in Vaswani et al. 2017."""
    def forward(layer, x, mask, cache):
        x = layer.norm1(x + attend(layer, x, mask, cache))
        return layer.norm2(x + layer.feed_forward(x)), None
    rewire(model, forward)


def without_cross_padding_mask(model):
    """The decoder may attend to the source's padding, in training and in writing; the encoder still may not."""
    decode = model.decode
    model.decode = lambda tokens, memory_kv, source_mask, *rest, **more: decode(tokens, memory_kv, None, *rest, **more)


@contextlib.contextmanager
def without_warmup():
    """The first steps at full rate."""
    before, decoder_only.WARMUP_STEPS = decoder_only.WARMUP_STEPS, 0
    try:
        yield
    finally:
        decoder_only.WARMUP_STEPS = before


ABLATIONS = [  # (name, architecture, arguments, change, prediction)
    ("as it is", "decoder-only", {}, None, "learns the task"),
    ("without positions", "decoder-only", {}, without_positions, "words in the wrong order; the causal mask hints at order"),
    ("without 1/sqrt(K)", "decoder-only", {}, without_scaling, "K = 16 is small: scores four times as large, little harm"),
    ("without residuals", "decoder-only", {}, without_residuals, "two layers may get by; deep stacks do not"),
    ("post-norm", "decoder-only", {}, post_norm, "as good at two layers; a difference shows in deep stacks"),
    ("one head", "decoder-only", {"num_heads": 1}, None, "one place to look at per layer: slower"),
    ("without warm-up", "decoder-only", {}, "warm-up", "pre-norm is forgiving: little harm"),
    ("as it is", "encoder-decoder", {}, None, "learns the task"),
    ("no padding mask in cross-attention", "encoder-decoder", {}, without_cross_padding_mask,
     "could learn to look away from padding; a row alone and in a batch differ"),
]


def section_7():
    """Train each variant for ABLATION_STEPS steps; print prediction and exact match."""
    print(f"\n7. Does it matter? One thing taken away at a time, {ABLATION_STEPS} steps each, one seed")
    print(f"  {'variant':36s}{'exact match':>12s}{'loss':>9s}   predicted")
    _, val_loader = data()
    results = {}
    for title, name, arguments, change, prediction in ABLATIONS:
        model = fresh(name, **arguments)
        with without_warmup() if change == "warm-up" else contextlib.nullcontext():
            if callable(change):
                change(model)
            train_for(name, model, ABLATION_STEPS)
        result = ARCHITECTURES[name][0].evaluate(model, val_loader)
        results[title, name] = result["exact_match"]
        print(f"  {title:36s}{result['exact_match']:12.1%}{result['loss']:9.4f}   {prediction}")
    print("  What does not show at this size is not shown to be useless: it does not show at this size.")
    return results


# -------------------------------------------------------------------------------------
# 8. Choosing
# -------------------------------------------------------------------------------------
def section_8():
    """Print the decision guide. The only section that is not measured; each line names the section it rests on."""
    print("\n8. Choosing. Not measured here: known models, and the figure above that speaks for the choice")
    guide = [
        ("classification, sentiment", "encoder-only", "BERT, RoBERTa, DeBERTa", "one pass (4), sees both sides (1)"),
        ("named entities, tagging", "encoder-only", "BERT, RoBERTa", "a label per token from both sides (1)"),
        ("question answering, extractive", "encoder-only", "BERT", "marks a span in a text that is given (1, 4)"),
        ("question answering, generative", "decoder-only", "GPT-3, PaLM", "free length, decides to stop (5)"),
        ("chat", "decoder-only", "GPT-3, LLaMA, Mistral", "prompt and answer are one stream; the cache goes on (4)"),
        ("code", "decoder-only", "Codex, Code Llama", "continues what is there; filling in needs training for it (5)"),
        ("translation", "encoder-decoder", "T5, mBART, NLLB", "reads the whole source before it writes (1)"),
        ("summarisation", "encoder-decoder", "BART, PEGASUS, T5", "long source read once, short answer written (4)"),
        ("search, embeddings", "encoder-only", "Sentence-BERT, E5", "one vector in one pass (4)"),
    ]
    for task, architecture, known, why in guide:
        print(f"  {task:32s}{architecture:17s}{known:26s}{why}")
    print("  Large decoder-only models now do most of these: one stream for every task, one cache for it (4). Where there")
    print("  is one task, a latency budget and labels, an encoder needs one pass where they need one a token (4).")


def main():
    """Load or train the models, then go through the sections."""
    check_constants(globals())
    for name in ("NUM_STEPS", "EVALUATE_EVERY", "UNSURE_STEPS", "ABLATION_STEPS"):
        value = globals()[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value!r} cannot work: use a whole number of 1 or more")
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    models = {}
    for name, (_, model_class, file) in ARCHITECTURES.items():
        try:
            models[name] = model_class.load(CHECKPOINTS / file, device).eval()
            size = models[name].arguments
            print(f"{name}: from checkpoints/{file}, d_model {size['d_model']}, {size['num_layers']} layers")
        except InputError as error:
            print(f"{name}: {error}. The small one of section 3 is used")
    print(f"training the three models of section 3, {NUM_STEPS} steps each, about 20 seconds in all", flush=True)
    trained, curves, unsure = train_on_one_budget()
    models = {name: models.get(name, trained[name]) for name in ARCHITECTURES}
    digits = list("40725819361094837265"[:max(3, MAX_DIGITS)])
    section_1(models)
    section_2(models, digits[:3])
    section_3(curves)
    section_4(models, digits)
    section_5(models)
    section_6(unsure)
    section_7()
    section_8()


if __name__ == "__main__":
    run_script(main)
