"""
train_all.py - how models are really trained

THE IDEA.  quick_start.py shows *that* the three architectures learn. This is the chapter on how training is done where
it takes days and not seconds: one loop for all three, with every technique that is in daily use, each switched by a
constant, each showing what it did.

    for epoch:                                        warm-up and cosine decay     LEARNING_RATE, WARMUP_STEPS
      for group of micro-batches:                     gradient accumulation        ACCUMULATION_STEPS
        for micro-batch: predict, loss, backward      mixed precision, checkpointing, label smoothing
        average over the group's labels               ... across processes, too: torchrun
        clip, step                                    CLIP_NORM, AdamW with WEIGHT_DECAY on matrices only
        now and then: save everything                 resume: killed at any moment, it continues where it was
      evaluate; keep the best                         by exact match on unseen sequences, then by loss

Run it:     python train_all.py                                     (about 75 seconds on one CPU core)
            torchrun --nproc_per_node=2 train_all.py                two processes on this machine
            torchrun --nnodes=2 --node_rank=0 --nproc_per_node=1 --master_addr=FIRST --master_port=29500 train_all.py
                                                                    two machines; on the second, --node_rank=1
Stop it with Ctrl-C, or pull the plug; run it again, and it goes on from its last save, at most RESUME_EVERY steps back.
One run at a time: two in one folder would write over each other.

The last lines should be close to:

    architecture        parameters   seconds   exact match, best epoch
    encoder-only           598,426      20.7                    100.0%
    decoder-only           598,400      21.1                    100.0%
    encoder-decoder      1,392,384      28.3                    100.0%

READING ORDER   learning rate -> optimiser -> micro-batches -> one step (the heart of this file) -> checkpointing and
                profiling -> resuming -> the loop -> inference -> the log -> main
"""
import ast
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import (CHECKPOINTS, IGNORE_INDEX, VOCABULARY, InputError, NumberTranslationDataset, check_constants,
                         check_loss, choose_device, collate_fn, create_dataloaders, report_saved, run_script,
                         tensors_to_bytes, to_device, write_atomically)

# =====================================================================================
# CONSTANTS - change one, run again; the log at the end of a run shows what changed
# =====================================================================================
# The models, all three alike
D_MODEL = 128
NUM_HEADS = 4
NUM_LAYERS = 3           # the encoder-decoder has as many in each of its two stacks
D_FF = 512
DROPOUT = 0.0
# The task
NUM_SAMPLES = 8000       # distinct sequences
MAX_DIGITS = 5
VALIDATION_SHARE = 0.125  # 1000 unseen sequences: one mistake is 0.1 %
# Batches
BATCH_SIZE = 32          # rows of a micro-batch: what has to fit into memory at once
ACCUMULATION_STEPS = 2   # micro-batches per step, over all processes. 2 * 32 rows give the gradient of one batch of 64;
#                          blanks and dropout are drawn for each micro-batch, so these two change with how it is cut.
# The optimiser
NUM_EPOCHS = 4           # 110 steps each
LEARNING_RATE = 1e-3     # at its peak
MIN_LEARNING_RATE = 5e-5  # at the last step, and after it
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01      # on matrices; norms and biases are left alone
CLIP_NORM = 1.0          # the log of steps shows the norm before clipping
LABEL_SMOOTHING = 0.0    # 0.1 spreads a tenth of each label over all tokens (Szegedy et al. 2016, section 7). The train
#                          loss then no longer compares with the validation loss, which is measured without.
# Speed and memory
PRECISION = "float32"    # or "bfloat16" (autocast), or "float16" (autocast and gradient scaling; on CUDA only)
GRADIENT_CHECKPOINTING = False  # True: keep a layer's input only, compute the rest again when the gradient needs it
PROFILE_STEPS = 0        # 5: write a trace of so many steps to runs/, and print the five dearest operations
# The run
RESUME_EVERY = 50        # steps between two savings of everything
SEED = 0
DEVICE = "cpu"           # or "cuda", "mps"
NUM_THREADS = 1          # CPU threads per process
# =====================================================================================

ARCHITECTURES = {
    "encoder-only": (encoder_only, encoder_only.EncoderOnlyTransformer, "encoder_only.pt"),
    "decoder-only": (decoder_only, decoder_only.DecoderOnlyTransformer, "decoder_only.pt"),
    "encoder-decoder": (encoder_decoder, encoder_decoder.EncoderDecoderTransformer, "encoder_decoder.pt"),
}
RUNS = Path(__file__).resolve().parent / "runs"
# How a run is carried out: these may change between being stopped and going on. (Another device or number of threads
# rounds otherwise, and another device draws other blanks; to the last bit the same is only what ran the same way.)
FREE_TO_CHANGE = {"RESUME_EVERY", "PROFILE_STEPS", "DEVICE", "NUM_THREADS"}


def parameters_by_component(model):
    """{component: number of parameters}; each is counted once, tied ones in the embedding. Adds up to the model's total."""
    counts, seen = {}, set()
    for name, parameter in model.named_parameters():
        assert id(parameter) not in seen
        seen.add(id(parameter))
        if name.startswith("embedding"):
            component = "embedding (tied with output)"
        elif name.startswith("output"):
            component = "output bias"
        elif "cross_attention" in name:
            component = "cross-attention"
        elif "attention" in name:
            component = "self-attention"
        elif "feed_forward" in name:
            component = "feed-forward"
        else:
            component = "layer norms"
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts


# -------------------------------------------------------------------------------------
# 1. Learning rate
# -------------------------------------------------------------------------------------
def warmup_cosine(step, total_steps, warmup_steps, minimum):
    """The learning rate in step 0, 1, ... as a share of its peak: up in a line, down half a cosine to `minimum`.

    The first step has 1 / warmup_steps and not 0, which would waste it; step warmup_steps - 1 has the peak; the last,
    total_steps - 1, has the minimum, and so has whatever comes after. (`check` sees to it that the decay has steps.)
    Sources: warm-up, Vaswani et al. 2017, section 5.3 (with another decay); cosine, Loshchilov and Hutter 2017.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# -------------------------------------------------------------------------------------
# 2. Optimiser
# -------------------------------------------------------------------------------------
def create_optimizer(model, total_steps):
    """(AdamW, LambdaLR). Weight decay pulls weights towards 0, which makes sense for the matrices: what no example needs
    fades. A norm's gain belongs near 1 and a bias wherever it is needed: both are left alone. fused: one kernel for all
    parameters.

    AdamW and not Adam: decay is applied to the weights, and not mixed into the gradient, where Adam's division by the
    gradient's size would undo it (Loshchilov and Hutter 2019).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=parameters[0].device.type != "mps")
    schedule = functools.partial(warmup_cosine, total_steps=total_steps, warmup_steps=WARMUP_STEPS,
                                 minimum=min(1.0, MIN_LEARNING_RATE / LEARNING_RATE))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


# -------------------------------------------------------------------------------------
# 3. Micro-batches: which rows, in which order, with which dice
# -------------------------------------------------------------------------------------
def epoch_groups(num_rows, epoch):
    """The rows of an epoch as groups of micro-batches: a list (steps) of lists (micro-batches) of lists of row numbers.

    The order depends on SEED and epoch alone. A run that was killed therefore finds its place again by two numbers,
    epoch and group, and no state of any generator has to be saved. The last group may be short, and its last
    micro-batch too; both are used.
    """
    generator = torch.Generator().manual_seed((SEED * 100_003 + epoch) % 2 ** 63)
    order = torch.randperm(num_rows, generator=generator).tolist()
    micro_batches = [order[i:i + BATCH_SIZE] for i in range(0, num_rows, BATCH_SIZE)]
    return [micro_batches[i:i + ACCUMULATION_STEPS] for i in range(0, len(micro_batches), ACCUMULATION_STEPS)]


def seed_micro_batch(step, number):
    """Dropout and blanks of micro-batch `number` of a step: from SEED and its place alone, whichever process draws."""
    torch.manual_seed(((SEED * 1_000_003 + step) * 1_009 + number) % 2 ** 63)


# -------------------------------------------------------------------------------------
# 4. One step: the heart of this file
# -------------------------------------------------------------------------------------
def train_step(script, model, items, group, step, optimizer, scheduler, scaler):
    """One optimiser step on `group`, a list of micro-batches of row numbers of `items`.

    Returns (mean loss over the group's labels, norm of the gradient before clipping, number of labels).

    ACCUMULATION. Gradients add up until they are zeroed, so several small batches can stand in for a large one that
    would not fit. What must come out is the gradient of the mean over *all labels of the group*. The classic mistake
    takes the mean within each micro-batch and then the mean of those: a micro-batch of short rows then weighs as much
    as one of long rows, though it has half the labels. So: sum, sum, sum, and divide once.

    PROCESSES. Each takes every so-manyth micro-batch of the group; DistributedDataParallel adds their gradients up in
    the last backward pass. The labels have to be counted over all processes, for the same reason.
    """
    rank, world = process()
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=getattr(torch, PRECISION), enabled=PRECISION != "float32")
    mine = list(range(rank, len(group), world))
    # In a short last group a process may have nothing to do. It must take part all the same, or the others wait for its
    # gradients for ever: it runs micro-batch 0 and counts it 0 times.
    idle = not mine
    if idle:
        mine = [0]
    loss_sum, num_labels = 0.0, 0
    optimizer.zero_grad(set_to_none=True)
    for number in mine:
        seed_micro_batch(step, number)
        batch = to_device(collate_fn([items[row] for row in group[number]]), device)
        # Gradients need to travel once a step, not once a micro-batch.
        last = number == mine[-1]
        with contextlib.nullcontext() if last or world == 1 else model.no_sync():
            with autocast:
                logits, labels = script.predict(model, batch)                            # (B, T, V), (B, T)
            # The loss in float32 whatever the precision: the sum inside a softmax, and the sum over labels, would lose in
            # 8 bits of mantissa what the logits still hold.
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX,
                                   label_smoothing=LABEL_SMOOTHING, reduction="sum")
            # float16 has no numbers below 6e-8: small gradients would vanish. The scaler multiplies the loss by a large
            # factor and divides the gradients by it again; it halves the factor when something overflows, and doubles it
            # after a long time in which nothing has.
            scaler.scale(loss * 0 if idle else loss).backward()
        if not idle:
            loss_sum += loss.item()
            num_labels += (labels != IGNORE_INDEX).sum().item()
    totals = torch.tensor([loss_sum, num_labels], dtype=torch.float64)
    if world > 1:
        totals = totals.to(device, torch.float32 if device.type == "mps" else torch.float64)
        dist.all_reduce(totals)
    loss_sum, num_labels = totals.tolist()
    check_loss(loss_sum / num_labels, step)

    scaler.unscale_(optimizer)
    for parameter in model.parameters():
        if parameter.grad is not None:
            # Wanted is the sum of the processes' gradients over the number of labels. DistributedDataParallel has formed
            # their mean, sum / world; times world / labels makes it that.
            parameter.grad.mul_(world / num_labels)
    # One odd group can have a gradient a hundred times as long as the others. Shorten it, keep its direction.
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()
    if not scaler.is_enabled():
        # A finite loss can have an infinite gradient. One step on it, and every weight is NaN, on disk too.
        check_loss(norm, step, what="gradient norm")
    factor = scaler.get_scale()
    scaler.step(optimizer)  # leaves a step out whose gradients overflowed ...
    scaler.update()
    if scaler.get_scale() >= factor:  # ... and then the schedule waits as well
        scheduler.step()
    return loss_sum / num_labels, norm, num_labels


def process():
    """(rank, world): this process's number and how many there are; (0, 1) when not started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(*words):
    """print, but from the first process only."""
    if process()[0] == 0:
        print(*words, flush=True)


# -------------------------------------------------------------------------------------
# 5. Gradient checkpointing and profiling
# -------------------------------------------------------------------------------------
def checkpoint_layers(model):
    """Make every layer of `model` forget what it computed, keep its input, and compute again in the backward pass.

    Memory for activations then grows with the number of layers times one vector a token, not times everything inside
    a layer; the price is a second forward pass, a third more work (Chen et al. 2016). Gradients are the same.
    """
    for stack in ("layers", "encoder_layers", "decoder_layers"):
        for layer in getattr(model, stack, []):
            layer.forward = functools.partial(forward_again, layer.forward)


def forward_again(forward, *arguments):
    """`forward(*arguments)`, through torch.utils.checkpoint where there will be a backward pass."""
    return checkpoint(forward, *arguments, use_reentrant=False) if torch.is_grad_enabled() else forward(*arguments)


def activation_bytes(script, model, batch):
    """How many bytes one forward pass of `batch` in float32 keeps for the backward pass, the weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()  # by storage: two views of one tensor are kept once
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, _ = script.predict(model, batch)
    del logits
    return sum(kept.values())


@contextlib.contextmanager
def profiled(name):
    """Profile what runs inside: a trace in runs/ (open it at https://ui.perfetto.dev), and the five dearest operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = DEVICE.startswith("cuda")
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    RUNS.mkdir(exist_ok=True)
    trace = RUNS / f"trace_{name.replace('-', '_')}.json"
    profile.export_chrome_trace(str(trace))
    cost = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = sorted(profile.key_averages(), key=lambda operation: getattr(operation, cost), reverse=True)
    total = sum(getattr(operation, cost) for operation in operations)
    where = "GPU" if on_gpu else "CPU"
    say(f"  the five dearest operations of the first steps ({where} time); trace in runs/{trace.name}")
    for operation in operations[:5]:
        say(f"    {getattr(operation, cost) / total:6.1%}   {operation.key[:50]:50s}   {operation.count:6d} calls")


# -------------------------------------------------------------------------------------
# 6. Resuming: everything that the next step depends on, in one file
# -------------------------------------------------------------------------------------
def constants_of_this_run():
    """The constants that decide what comes out, as a dict."""
    constants = {name: value for name, value in globals().items() if name.isupper() and name not in FREE_TO_CHANGE
                 and isinstance(value, (bool, int, float, str))}
    # The models, the blanks and the data are made elsewhere, with constants of their own. Who edits those files between
    # two runs gets another CODE; comments do not count, since they are not in the syntax tree.
    trees = [ast.dump(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
             for module in (toy_dataset, encoder_only, decoder_only, encoder_decoder)]
    return {**constants, "CODE": hashlib.sha256("".join(trees).encode()).hexdigest()[:8]}


def differences(before, now):
    """Two dicts of constants -> `NAME before -> now` for each that differs, in one string."""
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in sorted(before.keys() | now.keys())
                     if before.get(name) != now.get(name))


def load_unfinished(device):
    """The state of a run that was stopped, or None; says which, and why.

    Never continued silently: a run of other constants or code, and a file that is damaged or not ours. These start afresh.
    """
    path = RUNS / "unfinished.pt"
    # The first process reads and tells the others: on two machines each has a runs/ of its own, and only one is kept.
    content = [path.read_bytes() if process()[0] == 0 and path.exists() else None]
    if process()[1] > 1:
        dist.broadcast_object_list(content, src=0, device=device if device.type == "cuda" else None)
    if content[0] is None:
        say("no unfinished run: starting afresh")
        return None
    try:
        state = torch.load(io.BytesIO(content[0]), map_location=device, weights_only=True)
        before, done, progress = state["constants"], state["done"], state["progress"]
        place = f"{progress['architecture']}, epoch {progress['epoch'] + 1}, step {progress['group']} of the epoch" \
            if progress else f"{len(done)} of {len(ARCHITECTURES)} architectures are trained"
    except Exception as error:  # a damaged file can break the reader anywhere
        say(f"runs/unfinished.pt cannot be read ({type(error).__name__}): starting afresh")
        return None
    if before != constants_of_this_run():
        if process()[0] == 0:
            with contextlib.suppress(OSError):
                path.replace(RUNS / "unfinished.old.pt")
        say(f"the unfinished run had other constants ({differences(before, constants_of_this_run())}): starting afresh; "
            "it is kept as runs/unfinished.old.pt")
        return None
    say(f"going on with the unfinished run: {place}")
    return state


def save_unfinished(done, progress):
    """Save everything that the next step depends on. progress: None between two architectures."""
    try_to_write(RUNS / "unfinished.pt", tensors_to_bytes({
        "constants": constants_of_this_run(), "done": done, "progress": progress}))


@functools.cache
def warn_once(message):
    """Print a warning, but not again after every 50 steps."""
    print(f"warning: {message}", flush=True)


def try_to_write(path, content):
    """Write `content`, from the first process only. A full disk costs the file and one line, not the run."""
    if process()[0] == 0:
        try:
            write_atomically(path, content)
        except OSError as error:
            warn_once(f"could not write {path.parent.name}/{path.name} ({error.strerror}): training goes on without it")


# -------------------------------------------------------------------------------------
# 7. The loop
# -------------------------------------------------------------------------------------
def train(name, device, done, progress=None):
    """Train one architecture from the start, or from `progress`. Saves its best model; returns its record, plain values.

    done: the records of the architectures that are finished, which a saved state takes along.
    """
    script, model_class, file = ARCHITECTURES[name]
    dataset = NumberTranslationDataset(NUM_SAMPLES, MAX_DIGITS, SEED)
    training, _ = dataset.split(VALIDATION_SHARE)
    items = [dataset[i] for i in training]
    _, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED, VALIDATION_SHARE)
    steps_per_epoch = len(epoch_groups(len(items), 0))

    torch.manual_seed(SEED)
    plain_model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT,
                              max_len=max(64, 2 * MAX_DIGITS + 3)).to(device)
    say(f"\n{name}: {sum(p.numel() for p in plain_model.parameters()):,} parameters, {NUM_EPOCHS} epochs of "
        f"{steps_per_epoch} steps, {len(items)} sequences to train on, {len(val_loader.dataset)} unseen ones")
    if GRADIENT_CHECKPOINTING:
        batch = to_device(collate_fn(items[:BATCH_SIZE]), device)
        before = activation_bytes(script, plain_model, batch)
        checkpoint_layers(plain_model)
        after = activation_bytes(script, plain_model, batch)
        say(f"  activations kept for the backward pass: {before / 2 ** 20:.2f} MiB without checkpointing, "
            f"{after / 2 ** 20:.2f} MiB with it")
    optimizer, scheduler = create_optimizer(plain_model, NUM_EPOCHS * steps_per_epoch)
    # A sum over some 300 labels is scaled here, and not a mean: hence a smaller factor to start with than the usual 65536.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 8, enabled=PRECISION == "float16")
    # What is added up from epoch to epoch, all of it plain numbers and tensors so that it can be saved and loaded safely.
    record = {"history": [], "steps": [], "best": None, "best_weights": None, "seconds": 0.0}
    first_epoch, first_group = 0, 0
    if progress is not None:
        plain_model.load_state_dict(progress["model"])
        optimizer.load_state_dict(progress["optimizer"])
        scheduler.load_state_dict(progress["scheduler"])
        scaler.load_state_dict(progress["scaler"])
        record, first_epoch, first_group = progress["record"], progress["epoch"], progress["group"]
    model = plain_model
    if process()[1] > 1:
        model = DistributedDataParallel(plain_model, device_ids=[device.index] if device.type == "cuda" else None)

    def save(epoch, group):
        save_unfinished(done, {
            "architecture": name, "epoch": epoch, "group": group, "record": record,
            "model": plain_model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict()})

    for epoch in range(first_epoch, NUM_EPOCHS):
        model.train()
        groups = epoch_groups(len(items), epoch)
        start = time.perf_counter()
        with contextlib.ExitStack() as profile:
            quiet = None if process()[0] == 0 else True  # None: no bar where there is no terminal
            bar = tqdm(range(first_group, len(groups)), ascii=True, leave=False, disable=quiet)
            for number in bar:
                step = epoch * steps_per_epoch + number
                if PROFILE_STEPS and process()[0] == 0 and epoch == first_epoch and number == first_group:
                    profile.enter_context(profiled(name))
                rate = scheduler.get_last_lr()[0]
                loss, norm, labels = train_step(script, model, items, groups[number], step, optimizer, scheduler, scaler)
                record["steps"].append([step, rate, loss, norm, labels])
                bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}")
                if PROFILE_STEPS and epoch == first_epoch and number == first_group + PROFILE_STEPS - 1:
                    profile.close()
                if (step + 1) % RESUME_EVERY == 0 and number + 1 < len(groups):
                    record["seconds"] += time.perf_counter() - start
                    start = time.perf_counter()
                    save(epoch, number + 1)
        first_group = 0
        if process()[0] == 0:  # the others wait at the next step's gradients, for 30 minutes at most
            result = script.evaluate(plain_model, val_loader)
            of_epoch = record["steps"][-len(groups):]
            record["seconds"] += time.perf_counter() - start
            norms = [s[3] for s in of_epoch if math.isfinite(s[3])]  # a step that float16 left out has none
            row = {"architecture": name, "epoch": epoch + 1, "step": (epoch + 1) * steps_per_epoch,
                   "learning_rate": rate, "train_loss": sum(s[2] * s[4] for s in of_epoch) / sum(s[4] for s in of_epoch),
                   "gradient_norm": sum(norms) / max(1, len(norms)), "validation_loss": result["loss"],
                   "accuracy": result["accuracy"], "exact_match": result["exact_match"], "seconds": record["seconds"]}
            record["history"].append(row)
            score = [result["exact_match"], -result["loss"]]  # lists compare from left to right
            better = record["best"] is None or score > record["best"]
            if better:
                record["best"] = score
                record["best_weights"] = {k: v.detach().clone() for k, v in plain_model.state_dict().items()}
            say(f"  epoch {epoch + 1:2d}   train loss {row['train_loss']:.4f}   gradient norm {row['gradient_norm']:.2f}   "
                f"validation loss {row['validation_loss']:.4f}   next token {row['accuracy']:6.1%}   "
                f"exact match {row['exact_match']:6.1%}{'   best so far' if better else ''}")
            write_history(done, record)
            if epoch + 1 < NUM_EPOCHS:
                save(epoch + 1, 0)
    if process()[0] == 0:
        # Only now: until its training has ended, the file holds the last run's model and not a half-trained one.
        plain_model.load_state_dict(record["best_weights"])
        report_saved(plain_model, CHECKPOINTS / file)
    finished = {**record, "best_weights": None, "parameters": sum(p.numel() for p in plain_model.parameters())}
    save_unfinished({**done, name: finished}, None)
    return finished


def write_history(done, record):
    """runs/history.csv, a row an epoch, and runs/steps.csv, a row a step: written whole each time, never half."""
    records = [*done.values(), record]
    epochs, steps = io.StringIO(), io.StringIO()
    writer = csv.DictWriter(epochs, record["history"][0].keys())
    writer.writeheader()
    step_writer = csv.writer(steps)
    step_writer.writerow(["architecture", "step", "learning_rate", "loss", "gradient_norm", "labels"])
    for one in records:
        writer.writerows(one["history"])
        step_writer.writerows([one["history"][0]["architecture"], *step] for step in one["steps"])
    try_to_write(RUNS / "history.csv", epochs.getvalue().encode())
    try_to_write(RUNS / "steps.csv", steps.getvalue().encode())


# -------------------------------------------------------------------------------------
# 8. Inference, with every strategy, from the saved models
# -------------------------------------------------------------------------------------
STRATEGIES = {
    "encoder-only": {"fill all blanks": {}},
    "decoder-only": {"greedy": {}, "temperature 0.7": {"temperature": 0.7}, "top_k 5": {"temperature": 1.0, "top_k": 5},
                     "top_p 0.9": {"temperature": 1.0, "top_p": 0.9}},
    "encoder-decoder": {"greedy": {}, "temperature 0.7": {"temperature": 0.7}, "top_k 5": {"temperature": 1.0, "top_k": 5},
                        "top_p 0.9": {"temperature": 1.0, "top_p": 0.9}, "beam search 4": {"beam_width": 4}},
}


def show_inference(device, num_examples=200):
    """Print exact match and time per sequence of every strategy on the same sequences, one batch each.

    No model was trained on them, but they chose the best epoch: an honest comparison of strategies, and a slightly
    flattering one of models. Where that matters, keep a third set for the very end.
    """
    _, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED, VALIDATION_SHARE)
    unseen = val_loader.dataset  # ordered by length: taken evenly, or all would have five digits
    items = [unseen[i * len(unseen) // num_examples] for i in range(num_examples)] if len(unseen) > num_examples \
        else list(unseen)
    digits, words = [item["digits"] for item in items], [item["words"] for item in items]
    print(f"\nEvery strategy on the same {len(items)} unseen sequences, in one batch, from the saved models")
    for name, strategies in STRATEGIES.items():
        script, model_class, file = ARCHITECTURES[name]
        if not (CHECKPOINTS / file).exists():
            print(f"  {name:16s} no saved model: nothing to measure")
            continue
        model = model_class.load(CHECKPOINTS / file, device)
        for strategy, options in strategies.items():
            torch.manual_seed(SEED)
            script.translate(model, digits[:2], **options)  # warm up
            start = time.perf_counter()
            written = script.translate(model, digits, **options)
            milliseconds = 1000 * (time.perf_counter() - start) / len(items)
            right = sum(a == b for a, b in zip(written, words)) / len(items)
            print(f"  {name:16s} {strategy:16s} exact match {right:6.1%}   {milliseconds:7.3f} ms per sequence")


# -------------------------------------------------------------------------------------
# 9. The learner's log: what did turning that constant do?
# -------------------------------------------------------------------------------------
def append_to_log(scores, seconds):
    """Add this run to runs/log.jsonl, and print the last few before it, each with the constants that were different."""
    path = RUNS / "log.jsonl"
    runs = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                run = json.loads(line)
                runs.append((run["constants"], run["exact_match"], run["seconds"]))
            except (ValueError, KeyError, TypeError):
                print("warning: a line of runs/log.jsonl cannot be read and is passed over")
    now = constants_of_this_run()
    this = json.dumps({"constants": now, "exact_match": scores, "seconds": round(seconds, 1)})
    try:
        RUNS.mkdir(exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(this + "\n")
    except OSError as error:
        print(f"warning: could not write runs/log.jsonl ({error.strerror})")
    print("\nExact match of the last runs, and what was different from this one")
    print("  " + "  ".join(f"{name:>15s}" for name in ARCHITECTURES) + "   seconds   constants")
    for constants, exact, took in runs[-4:] + [(now, scores, seconds)]:
        changed = differences(now, constants).replace(" -> ", " was ") or "the same constants"
        what = "this run" if constants is now else changed
        print("  " + "  ".join(f"{exact.get(name, float('nan')):15.1%}" for name in ARCHITECTURES)
              + f"   {took:7.1f}   {what}")


# -------------------------------------------------------------------------------------
# 10. The run
# -------------------------------------------------------------------------------------
def check():
    """Raises InputError for constants that cannot work together; see `check_constants` for those that never can."""
    check_constants(globals())
    if PRECISION not in ("float32", "bfloat16", "float16"):
        raise InputError(f"PRECISION={PRECISION!r} is not known: use 'float32', 'bfloat16' or 'float16'")
    if PRECISION == "float16" and not DEVICE.startswith("cuda"):
        raise InputError(f"PRECISION='float16' needs a CUDA device, DEVICE is {DEVICE!r}: use 'bfloat16' or 'float32'")
    if not isinstance(GRADIENT_CHECKPOINTING, bool):
        raise InputError(f"GRADIENT_CHECKPOINTING={GRADIENT_CHECKPOINTING!r} is a switch: use True or False")
    if MIN_LEARNING_RATE > LEARNING_RATE:
        raise InputError(f"MIN_LEARNING_RATE={MIN_LEARNING_RATE} is above LEARNING_RATE={LEARNING_RATE}: use less")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if ACCUMULATION_STEPS % world:
        raise InputError(f"ACCUMULATION_STEPS={ACCUMULATION_STEPS} micro-batches cannot be shared evenly among {world} "
                         f"processes: use {world}, {2 * world}, ...")
    # Makes the sequences once, to find out now and not after the first model whether that works.
    train_loader, _ = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED, VALIDATION_SHARE)
    total_steps = NUM_EPOCHS * len(epoch_groups(len(train_loader.dataset), 0))
    if WARMUP_STEPS > total_steps - 2:
        raise InputError(f"WARMUP_STEPS={WARMUP_STEPS} leaves no step of {total_steps} for the decay: use "
                         f"{max(0, total_steps // 10)}, or raise NUM_EPOCHS={NUM_EPOCHS}")


def main():
    torch.set_num_threads(NUM_THREADS)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # set by torchrun
    try:
        check()
    except InputError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)  # the first process says it for all
        raise
    device = choose_device(DEVICE)
    if distributed:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if process()[0] == 0:
            for folder in (RUNS, CHECKPOINTS):  # what a killed run was writing at that moment
                for leftover in folder.glob("*.tmp"):
                    with contextlib.suppress(OSError):
                        leftover.unlink()
        state = load_unfinished(device)
        done = dict(state["done"]) if state else {}
        progress = state["progress"] if state else None
        for name in ARCHITECTURES:
            if name not in done:
                here = progress if progress is not None and progress["architecture"] == name else None
                done[name] = train(name, device, done, here)
        if process()[0] == 0:
            show_inference(device)
            append_to_log({name: record["best"][0] for name, record in done.items()},
                          sum(record["seconds"] for record in done.values()))
            # Finished, and written down: nothing to go on with. What was learned is in checkpoints/.
            with contextlib.suppress(OSError):
                (RUNS / "unfinished.pt").unlink(missing_ok=True)
            print(f"\n{'architecture':18s}{'parameters':>12s}{'seconds':>10s}{'exact match, best epoch':>26s}")
            for name, record in done.items():
                print(f"{name:18s}{record['parameters']:12,d}{record['seconds']:10.1f}{record['best'][0]:26.1%}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
