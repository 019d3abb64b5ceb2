"""
training.py - what every training run shares: schedule, optimizer, evaluation, and measuring

The architecture scripts contain the training loop itself (`train_epoch`). The parts around the loop
are the same for every architecture, so they are in this file:

    lr_factor, create_optimizer    warmup and decay of the learning rate; AdamW
    batches, check_finite          the small parts of a loop
    score                          loss, accuracy, and exact match on held-out sequences
    use_fused_attention, checkpoint_layers      the same results, faster or in less memory
    train_for, show_strategies, time_generation, ...       measuring, for tables and figures

READING ORDER   read `create_optimizer` and `score`. The rest serves only the comparisons.
"""
import functools
import itertools
import math
import statistics
import time

from housekeeping import InputError
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from toy_dataset import IGNORE_INDEX, exact_match, to_device


# --- 1. Schedule and optimizer --------------------------------------------------------
def lr_factor(step, total_steps, warmup_steps, final_factor=0.05):
    """Return the factor for the learning rate at `step`: linear warmup, then cosine decay.

    Warmup (Vaswani et al. 2017, section 5.3) keeps the first steps small. Why? Adam's averages then
    rest on only a few gradients (Liu et al. 2020, RAdam). But better averages alone do not replace
    it here (guide/training.md): it lets a higher rate be used (Kalra and Barkeshli 2024). Decay
    (Loshchilov and Hutter 2017) lets the model get closer to a minimum.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # never 0, which would waste the first step
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))  # 0 to 1
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def check_warmup(warmup_steps, total_steps):
    """Raise InputError if warmup takes all steps: the rate would never reach its peak and decay."""
    if warmup_steps >= total_steps:
        raise InputError(f"WARMUP_STEPS={warmup_steps} takes all of the {total_steps} steps: use "
                         f"{total_steps // 10}, or train for longer")


def create_optimizer(model, learning_rate, total_steps, warmup_steps, weight_decay=0.01):
    """Return (AdamW, scheduler) for `total_steps` steps. Call scheduler.step() after each step."""
    check_warmup(warmup_steps, total_steps)
    fused = next(model.parameters()).device.type != "mps"  # faster; older MPS builds lack it
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay,
                                  fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, total_steps, warmup_steps))
    return optimizer, scheduler


# --- 2. Parts of a loop ---------------------------------------------------------------
def batches(loader, device):
    """Yield the batches of `loader` on `device`, with a progress bar if there is a terminal."""
    for batch in tqdm(loader, ascii=True, leave=False, disable=None):
        yield to_device(batch, device)


def check_finite(value, where, what="loss"):
    """Raise InputError if `value` is infinite or NaN: one NaN reaches every weight in one step."""
    if not math.isfinite(value):
        raise InputError(f"the {what} became {value} {where}: try a tenth of the learning rate, or "
                         "look in your changes for a division by zero or a log of zero")


# --- 3. Evaluation --------------------------------------------------------------------
@torch.no_grad()
def score(model, loader, logits_and_labels, translate):
    """Evaluate `model` on `loader` with two functions of its script. Returns a dict with:

    loss         mean cross-entropy over the labels
    accuracy     fraction of labels that the model ranks first
    exact_match  fraction of sequences that `translate` gets entirely correct
    examples     (digits, expected words, generated words) of each sequence, mistakes first
    """
    model.eval()
    device = next(model.parameters()).device
    loss_sum, num_correct, num_labels, examples = 0.0, 0, 0, []
    for batch in loader:
        logits, labels = logits_and_labels(model, to_device(batch, device))
        counts = labels != IGNORE_INDEX
        # subtle: sum and divide once. A mean of means gives a small last batch too much weight.
        loss_sum += F.cross_entropy(logits[counts], labels[counts], reduction="sum").item()
        num_correct += (logits.argmax(-1) == labels)[counts].sum().item()
        num_labels += counts.sum().item()
        check_finite(loss_sum, "on held-out sequences")
        examples += zip(batch["digits"], batch["words"], translate(model, batch["digits"]))
    examples.sort(key=lambda example: example[1] == example[2])  # False sorts before True
    num_exact = sum(expected == answer for _, expected, answer in examples)
    return {"loss": loss_sum / num_labels, "accuracy": num_correct / num_labels,
            "exact_match": num_exact / len(examples), "examples": examples}


# --- 4. Speed and memory, for train_all.py and the benchmarks --------------------------
def fused_attention(queries, keys, values, mask=None, dropout=0.0):
    """Compute `attention` in one kernel. Returns (result, None), because it stores no weights.

    It computes the softmax in tiles (Dao et al. 2022, FlashAttention) and divides by sqrt(K)
    itself. Since PyTorch 2.5, it returns zeros for a query that may attend to nothing.
    """
    return F.scaled_dot_product_attention(queries, keys, values, mask, dropout), None


def use_fused_attention(model):
    """Make every attention module in `model` use PyTorch's fused kernel. Returns the model."""
    for module in model.modules():
        if hasattr(module, "attention_function"):
            module.attention_function = fused_attention
    return model


def checkpoint_layers(model):
    """Make every layer keep only its input and recompute the rest in the backward pass.

    This saves memory and costs one more forward pass, about a third more work (Chen et al. 2016).
    The gradients are the same. Returns the model.
    """
    for layer in model.modules():
        if type(layer).__name__ in ("EncoderLayer", "DecoderLayer"):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def activation_bytes(script, model, batch):
    """Return how many bytes a forward pass keeps for the backward pass, excluding the weights."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, _ = script.logits_and_labels(model.train(), batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del logits  # until here, it keeps what was packed alive
    return sum(size for pointer, size in kept.items() if pointer not in weights)


# --- 5. Measuring, for tables and figures ---------------------------------------------
def train_for(compute_loss, model, train_loader, num_steps, learning_rate, warmup_steps, clip_norm,
              watch=None):
    """Train for `num_steps` plain steps and return the model.

    watch(step, loss, seconds) is called after each step. Its own time does not count.
    """
    optimizer, scheduler = create_optimizer(model, learning_rate, num_steps, warmup_steps)
    device, seconds = next(model.parameters()).device, 0.0
    steps = tqdm(range(1, num_steps + 1), ascii=True, leave=False, disable=None)
    endless = (batch for _ in itertools.count() for batch in train_loader)  # epoch after epoch
    for step, batch in zip(steps, endless):
        start = time.perf_counter()
        model.train()
        loss = compute_loss(model, to_device(batch, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        check_finite(loss.item(), f"at step {step}")  # item() waits for a GPU: correct seconds
        seconds += time.perf_counter() - start
        if watch is not None:
            watch(step, loss.item(), seconds)
    return model.eval()


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
        answers = translate(model, digits, **options)
        milliseconds = 1000 * (time.perf_counter() - start) / len(digits)
        counts = [len({" ".join(answer) for answer in translate(model, [one] * 20, **options)})
                  for one in some]
        print(f"  {name:34s}{exact_match(answers, words):12.1%}{statistics.mean(counts):16.1f}"
              f"{milliseconds:17.3f}")


def median_milliseconds(run, rounds=5):
    """Return the median time of `run()` in milliseconds, after one call to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def time_generation(model, lengths):
    """Return {True: with cache, False: without}: lists of median seconds, one per length."""
    def seconds(length, use_cache):
        return median_milliseconds(lambda: model.generate(
            [[7, 4]], length, use_cache=use_cache, stop_at=None), rounds=3) / 1000
    # In turn, so that a slow moment of the machine slows both.
    pairs = [(seconds(length, True), seconds(length, False)) for length in lengths]
    return dict(zip((True, False), zip(*pairs)))


def count_passes(model, run):
    """Return how many times `run()` runs a stack of `model`: the calls to the stack's last norm."""
    calls = []
    names = ("final_norm", "encoder_norm")
    norms = [getattr(model, name) for name in names if hasattr(model, name)]
    handles = [norm.register_forward_hook(lambda *_: calls.append(1)) for norm in norms]
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def count_parameters(model):
    """Return the number of parameters. Tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_by_component(model):
    """Return {component: number of parameters}. Tied parameters count once, as embedding."""
    counts = {}
    for name, parameter in model.named_parameters():
        component = next(component for part, component in (
            ("embedding", "embedding (tied with output)"), ("output", "output bias"),
            ("cross_attention", "cross-attention"), ("attention", "self-attention"),
            ("feed_forward", "feed-forward"), ("norm", "layer norms")) if part in name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts
