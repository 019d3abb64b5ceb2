"""
train_all.py - train all three architectures with the techniques of larger models

THE IDEA.  quick_start.py shows that the three architectures learn. This script trains them the way
larger models are trained. One loop serves all three, and each technique has a constant.

    for each step:
      for each micro-batch:                      gradient accumulation (ACCUMULATION_STEPS)
        predict, loss, backward                  PRECISION, GRADIENT_CHECKPOINTING, COMPILE, ...
      divide by the number of labels             summed over all processes (torchrun)
      clip, step                                 CLIP_NORM, AdamW with WEIGHT_DECAY on matrices
      at the end of an epoch: evaluate           keep the best weights on held-out sequences
      sometimes: save everything                 a killed run resumes from the last save

Run it:     python train_all.py                            (about 70 seconds on one CPU core)
            torchrun --nproc_per_node=2 train_all.py       two processes (torchrun --help: machines)

You can stop it at any time. The next run resumes from the last save and repeats at most
RESUME_EVERY steps. Start only one run at a time, because two would overwrite each other's files.

The last lines should be close to:

    architecture        parameters   seconds   exact match, best epoch
    encoder-only           598,426      20.7                    100.0%
    decoder-only           598,400      21.1                    100.0%
    encoder-decoder      1,392,384      28.3                    100.0%

READING ORDER   micro_batches -> train_step -> train (the loop, the heart of this file) -> main. The
schedule is `lr_factor` in training.py. `train_epoch` in decoder_only.py is the plain version.
"""
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
import time

from housekeeping import (CHECKPOINTS, ROOT, InputError, check, choose_device, load_tensors,
                          prepare, run_script, save_model, to_bytes, write_atomically)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from quick_start import ARCHITECTURES
from toy_dataset import IGNORE_INDEX, VOCABULARY, collate_fn, create_dataloaders, to_device
from training import check_finite, count_parameters, lr_factor

# =====================================================================================
# CONSTANTS - change one, run again; the log at the end compares the runs
# =====================================================================================
# The models (the same for all three)
D_MODEL = 128
NUM_HEADS = 4
NUM_LAYERS = 3           # per stack; the encoder-decoder has two stacks
D_FF = 512
DROPOUT = 0.0
# The task
NUM_SAMPLES = 8000       # distinct sequences
MAX_DIGITS = 5
VALIDATION_SHARE = 0.125  # 1050 held-out sequences, so one mistake costs 0.1%
# Batches
BATCH_SIZE = 32          # sequences per micro-batch, limited by memory
ACCUMULATION_STEPS = 2   # micro-batches per step over all processes, so a step has 64 sequences
# The optimizer
NUM_EPOCHS = 4           # 108 steps each
LEARNING_RATE = 1e-3     # its peak
MIN_LEARNING_RATE = 5e-5  # in the last step
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01      # on matrices, not on norms and biases
CLIP_NORM = 1.0          # maximum norm of the gradient; runs/steps.csv records it before clipping
LABEL_SMOOTHING = 0.0    # 0.1 spreads 10% of each target over all tokens (Szegedy et al. 2016)
# Speed and memory
PRECISION = "float32"    # or "bfloat16", or "float16" (with gradient scaling; only on CUDA)
FUSED_ATTENTION = True   # PyTorch's kernel instead of the formula; equal up to rounding
COMPILE = False          # True: torch.compile, which makes the first steps much slower
GRADIENT_CHECKPOINTING = False  # True: keep only each layer's input and recompute the rest
PROFILE_STEPS = 0        # 5: profile five steps and print the most expensive operations
# The run
RESUME_EVERY = 50        # steps between two saves of the whole state
SEED = 0
DEVICE = "cpu"           # or "cuda", "mps"
NUM_THREADS = 1          # CPU threads per process
# =====================================================================================

# These constants affect only how a run is carried out, so they may change before it is resumed.
FREE_TO_CHANGE = {"RESUME_EVERY", "PROFILE_STEPS", "DEVICE", "NUM_THREADS"}
RUNS = ROOT / "runs"
UNFINISHED = RUNS / "unfinished.pt"
RANK, WORLD = (int(os.environ.get(name, default))  # torchrun sets them: which of how many processes
               for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def say(*words):
    """Print `words` in the first process only."""
    if RANK == 0:
        print(*words, flush=True)


# --- 1. The data of a step ------------------------------------------------------------
@functools.cache
def order_of(epoch, num_sequences):
    """Return the order of the training sequences in `epoch`. It depends on SEED, so can be redone."""
    generator = torch.Generator().manual_seed((SEED * 100_003 + epoch) % 2 ** 63)
    return torch.randperm(num_sequences, generator=generator).tolist()


def steps_per_epoch(num_sequences):
    """Return how many full steps one epoch has. The few sequences left over change every epoch."""
    return num_sequences // (BATCH_SIZE * ACCUMULATION_STEPS)


def micro_batches(step, num_sequences):
    """Return {number: indices of sequences} for the micro-batches of this process in `step`.

    The step alone says which they are. So one integer is enough to resume, and no generator's state
    has to be saved. Process r of WORLD gets numbers r, r + WORLD, and so on.
    """
    epoch, place = divmod(step, steps_per_epoch(num_sequences))
    order, first = order_of(epoch, num_sequences), place * ACCUMULATION_STEPS
    return {number: order[(first + number) * BATCH_SIZE:(first + number + 1) * BATCH_SIZE]
            for number in range(RANK, ACCUMULATION_STEPS, WORLD)}


# --- 2. One step ----------------------------------------------------------------------
def train_step(script, model, items, step, optimizer, scaler):
    """Take one optimizer step. Returns its mean loss, gradient norm before clipping, and labels.

    ACCUMULATION. backward() adds to .grad until zero_grad(), so several micro-batches can replace
    one batch that is too large for memory. The result must be the gradient of the mean loss over
    *all labels of the step*. A common bug is to average within each micro-batch and then average
    the averages: a micro-batch of short sequences then counts as much as one with twice as many
    labels. Instead, sum the losses and divide the gradient once by the number of labels.

    PROCESSES. DistributedDataParallel averages the gradients over the processes in the last
    backward pass. Multiplied by WORLD, they are the sum again.
    """
    device, loss_sum, num_labels = next(model.parameters()).device, 0.0, 0
    mine = micro_batches(step, len(items))
    optimizer.zero_grad()
    for number, indices in mine.items():
        # Dropout and masking depend on the step and number, not on the process.
        torch.manual_seed(((SEED * 1_000_003 + step) * 1_009 + number) % 2 ** 63)
        batch = to_device(collate_fn([items[i] for i in indices]), device)
        wait = WORLD > 1 and number != max(mine)  # exchange gradients once per step, at its end
        with model.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(device.type, getattr(torch, PRECISION), PRECISION != "float32"):
                logits, labels = script.logits_and_labels(model, batch)  # (B, T, V), (B, T)
            # The loss is a sum of many terms, so it is always computed in float32.
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum",
                                   ignore_index=IGNORE_INDEX, label_smoothing=LABEL_SMOOTHING)
            # The smallest positive float16 is 6e-8, so small gradients would become 0. The scaler
            # multiplies the loss by a large factor and later divides the gradients by it.
            scaler.scale(loss).backward()
        loss_sum += loss.item()
        num_labels += (labels != IGNORE_INDEX).sum().item()
    if WORLD > 1:
        totals = torch.tensor([loss_sum, num_labels], device=device)
        dist.all_reduce(totals)
        loss_sum, num_labels = totals.tolist()
    check_finite(loss_sum, step)

    scaler.unscale_(optimizer)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(WORLD / num_labels)
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()
    if not scaler.is_enabled():
        check_finite(norm, step, "gradient norm")  # NaN would reach every weight in this step
    scaler.step(optimizer)  # skips the step if a gradient overflowed
    scaler.update()  # halves the scale after a skipped step
    return loss_sum / num_labels, norm, int(num_labels)


# --- 3. The loop: the heart of this file ----------------------------------------------
def train(name, device, settings, done, state):
    """Train one architecture, from scratch or from `state`, and return its record.

    record: per-step and per-epoch numbers, the best score and its weights, and the seconds; only
    plain values and tensors, so that the file can be loaded safely. state: record, step, and the
    states of model, optimizer, and scaler. done: the records of finished architectures.
    """
    script = ARCHITECTURES[name][0]
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                                  VALIDATION_SHARE)
    items = list(train_loader.dataset)
    per_epoch = steps_per_epoch(len(items))
    total_steps = NUM_EPOCHS * per_epoch
    plain_model, optimizer, scaler = build(name, device, items)
    parts = {"model": plain_model, "optimizer": optimizer, "scaler": scaler}
    record = {"history": [], "steps": [], "best": None, "weights": None, "seconds": 0.0}
    first, start = 0, time.perf_counter()
    if state is not None:
        first, record = state["step"], state["record"]
        start -= record["seconds"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
    say(f"\n{name}: {count_parameters(plain_model):,} parameters, {NUM_EPOCHS} epochs of "
        f"{per_epoch} steps, {len(items)} training and {len(val_loader.dataset)} held-out "
        "sequences")
    model = plain_model  # with several processes, it is wrapped
    if WORLD > 1:
        model = DistributedDataParallel(
            plain_model, device_ids=[device.index] if device.type == "cuda" else None)

    profile = torch.profiler.profile() if PROFILE_STEPS and RANK == 0 else None
    bar = tqdm(range(first, total_steps), initial=first, total=total_steps, ascii=True, leave=False,
               disable=None if RANK == 0 else True)  # None: no bar without a terminal
    for step in bar:
        if profile and step == first + 1:  # the first step is slower than the others
            profile.start()
        rate = LEARNING_RATE * lr_factor(step, total_steps, WARMUP_STEPS,
                                         MIN_LEARNING_RATE / LEARNING_RATE)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss, norm, num_labels = train_step(script, model, items, step, optimizer, scaler)
        record["steps"].append([step, rate, loss, norm, num_labels])
        bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}")
        if profile and step == first + PROFILE_STEPS:
            profile.stop()
            say(profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=5))
        epoch_ends = (step + 1) % per_epoch == 0
        if epoch_ends and RANK == 0:  # the others wait for its gradients in the next step
            evaluate(script, name, plain_model, val_loader, record, step, per_epoch)
        record["seconds"] = time.perf_counter() - start
        if (epoch_ends or (step + 1) % RESUME_EVERY == 0) and RANK == 0:
            state = {"architecture": name, "step": step + 1, "record": record,
                     **{key: part.state_dict() for key, part in parts.items()}}
            save_unfinished(settings, done, None if step + 1 == total_steps else state)
            write_csv([*done.items(), (name, record)])
    return {**record, "parameters": count_parameters(plain_model)}


def evaluate(script, name, model, val_loader, record, step, per_epoch):
    """Evaluate at the end of an epoch, print its line, and keep the weights if they are best."""
    result = script.evaluate(model, val_loader)
    check_finite(result["loss"], step, "validation loss")
    steps = record["steps"][-per_epoch:]
    row = {"architecture": name, "epoch": (step + 1) // per_epoch, "step": step + 1,
           "train_loss": sum(s[2] * s[4] for s in steps) / sum(s[4] for s in steps),
           "gradient_norm": sum(s[3] for s in steps) / len(steps),
           "validation_loss": result["loss"], "accuracy": result["accuracy"],
           "exact_match": result["exact_match"]}
    record["history"].append(row)
    score = [row["exact_match"], -row["validation_loss"]]  # lists compare from left to right
    better = record["best"] is None or score > record["best"]
    if better:
        record["best"] = score
        record["weights"] = {key: w.detach().clone() for key, w in model.state_dict().items()}
    say(f"  epoch {row['epoch']:2d}   train loss {row['train_loss']:.4f}   gradient norm "
        f"{row['gradient_norm']:.2f}   validation loss {row['validation_loss']:.4f}   "
        f"exact match {row['exact_match']:6.1%}{'   best so far' if better else ''}")


# --- 4. Model and optimizer -----------------------------------------------------------
def build(name, device, items):
    """Return a new model, with the constants under "Speed and memory" applied, AdamW, and scaler.

    Weight decay pulls matrices toward 0. It is not applied to the gains of norms, which should stay
    near 1, or to biases, which have no preferred size. AdamW applies the decay directly to the
    weights. In plain Adam it is added to the gradient, and the adaptive scaling distorts it
    (Loshchilov and Hutter 2019).
    """
    script, model_class, _ = ARCHITECTURES[name]
    torch.manual_seed(SEED)
    model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT).to(device)
    if FUSED_ATTENTION:
        use_fused_attention(model)
    if GRADIENT_CHECKPOINTING:
        batch = to_device(collate_fn(items[:BATCH_SIZE]), device)
        before = activation_bytes(script, model, batch)
        after = activation_bytes(script, checkpoint_layers(model), batch)
        say(f"\n{name}: activations kept for the backward pass: {before / 2 ** 20:.2f} MiB without "
            f"checkpointing, {after / 2 ** 20:.2f} MiB with it")
    if COMPILE:
        model.compile(dynamic=True)  # the lengths differ between batches
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=device.type != "mps")
    # The loss is a sum over about 170 labels, so the scale starts below the default of 65536.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 8, enabled=PRECISION == "float16")
    return model, optimizer, scaler


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
    def run(forward, *inputs):
        if torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return forward(*inputs)

    for layer in model.modules():
        if type(layer).__name__ in ("EncoderLayer", "DecoderLayer"):
            layer.forward = functools.partial(run, layer.forward)
    return model


def activation_bytes(script, model, batch):
    """Return how many bytes a forward pass keeps for the backward pass, excluding the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, _ = script.logits_and_labels(model, batch)
    del logits
    return sum(kept.values())


# --- 5. Files: the unfinished run, the history, and the log ---------------------------
def settings_of_run():
    """Return what decides the result: the constants, except FREE_TO_CHANGE, and a hash of the code.

    The hash covers all scripts without the lines that set these constants.
    """
    settings = {name: value for name, value in globals().items() if name.isupper()
                and name not in ("RANK", "WORLD") and isinstance(value, (bool, int, float, str))}
    code = hashlib.sha256()
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "train_all.py":
            text = re.sub(rf"(?m)^({'|'.join(settings)}) = .*$", "", text)
        if path.name != "scratch.py":  # the reader's own
            code.update(text.encode())
    kept = {name: value for name, value in settings.items() if name not in FREE_TO_CHANGE}
    return {**kept, "CODE": code.hexdigest()[:8]}


def differences(before, now):
    """Return a string with `NAME before -> now` for each setting that differs."""
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}"
                     for name in sorted(before.keys() | now.keys())
                     if before.get(name) != now.get(name))


@functools.cache
def warn_once(message):
    """Print a warning the first time it is given."""
    print(f"warning: {message}", flush=True)


def try_to_write(path, content):
    """Write bytes to `path`. If that fails, print one warning and continue."""
    try:
        write_atomically(path, content)
    except OSError as error:
        warn_once(f"could not write runs/{path.name} ({error.strerror}): training continues "
                  "without it")


def save_unfinished(settings, done, state=None):
    """Save the records of finished architectures and the state of the current one, if any."""
    if RANK == 0:
        try_to_write(UNFINISHED, to_bytes({"settings": settings, "done": done, "state": state}))


def load_unfinished(settings):
    """Return (done, state) of an interrupted run, or ({}, None) to start from scratch; say which.

    A run is not resumed if its file is damaged, or if its constants or code have changed. Then the
    file is kept under another name.
    """
    reason = None
    try:
        saved = load_tensors(UNFINISHED)
        done, state, changed = saved["done"], saved["state"], differences(saved["settings"],
                                                                          settings)
        if changed:
            reason = f"the unfinished run had different settings ({changed})"
    except FileNotFoundError:
        print("no unfinished run: starting from scratch")
        return {}, None
    except Exception as error:  # a damaged file can raise anything
        reason = f"runs/unfinished.pt cannot be read ({type(error).__name__})"
    if reason:
        with contextlib.suppress(OSError):
            UNFINISHED.replace(RUNS / "unfinished.old.pt")
        print(f"{reason}: starting from scratch; it is kept as runs/unfinished.old.pt")
        return {}, None
    where = f", step {state['step']} of the {state['architecture']} model" if state else ""
    print(f"resuming the unfinished run: {len(done)} of 3 architectures trained{where}")
    return done, state


def write_csv(records):
    """Write runs/history.csv (a line per epoch) and runs/steps.csv (a line per step)."""
    epochs, steps = io.StringIO(), io.StringIO()
    history = [row for _, record in records for row in record["history"]]
    writer = csv.DictWriter(epochs, history[0].keys() if history else ["architecture"])
    writer.writeheader()
    writer.writerows(history)
    writer = csv.writer(steps)
    writer.writerow(["architecture", "step", "learning_rate", "loss", "gradient_norm", "labels"])
    writer.writerows([name, *step] for name, record in records for step in record["steps"])
    try_to_write(RUNS / "history.csv", epochs.getvalue().encode())
    try_to_write(RUNS / "steps.csv", steps.getvalue().encode())


def append_to_log(settings, done):
    """Add this run to runs/log.jsonl and print the last runs, with the settings that differed."""
    path = RUNS / "log.jsonl"
    run = {"settings": settings, "seconds": round(sum(r["seconds"] for r in done.values()), 1),
           "exact_match": {name: record["best"][0] for name, record in done.items()}}
    print("\nExact match of the last runs, and how their settings differed from this run's")
    print("  " + "  ".join(f"{name:>15s}" for name in done) + "   seconds   settings")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines[-4:] + [json.dumps(run)]:
            old = json.loads(line)
            difference = differences(settings, old["settings"]).replace(" -> ", " was ")
            print("  " + "  ".join(f"{old['exact_match'][name]:15.1%}" for name in done)
                  + f"   {old['seconds']:7.1f}   {ascii(difference)[1:-1] or 'the same settings'}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: runs/log.jsonl cannot be read ({type(error).__name__}): delete it")
        return
    try_to_write(path, "\n".join([*lines, json.dumps(run), ""]).encode())


# --- 6. The run -----------------------------------------------------------------------
def check_run():
    """Check the constants, alone and together, and return the device, or raise InputError."""
    device = prepare(globals())
    if MIN_LEARNING_RATE > LEARNING_RATE:
        raise InputError(f"MIN_LEARNING_RATE={MIN_LEARNING_RATE} is above LEARNING_RATE="
                         f"{LEARNING_RATE}: use less")
    if PRECISION == "float16" and device.type != "cuda":
        raise InputError(f"PRECISION='float16' needs a CUDA device, but DEVICE is {DEVICE!r}: use "
                         "'bfloat16'")
    if ACCUMULATION_STEPS % WORLD:
        raise InputError(f"ACCUMULATION_STEPS={ACCUMULATION_STEPS} micro-batches cannot be shared "
                         f"evenly among {WORLD} processes: use {WORLD}, {2 * WORLD}, ...")
    train_loader, _ = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                         VALIDATION_SHARE)
    total_steps = NUM_EPOCHS * steps_per_epoch(len(train_loader.dataset))
    if WARMUP_STEPS >= total_steps:
        raise InputError(f"WARMUP_STEPS={WARMUP_STEPS} takes all of the {total_steps} steps: use "
                         f"{total_steps // 10}, more epochs, or smaller batches")
    if COMPILE:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as error:  # the compiler can raise anything
            raise InputError(f"COMPILE=True does not work here ({type(error).__name__}): it needs "
                             "a C++ compiler or Triton. Use False") from error
    return device


def main():
    try:
        device = check_run()
    except InputError:
        if RANK > 0:
            sys.exit(2)  # only the first process prints the message
        raise
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    settings = settings_of_run()
    resumed = [load_unfinished(settings) if RANK == 0 else None]
    if WORLD > 1:  # each machine has its own runs/; the first one's file counts
        dist.broadcast_object_list(resumed, src=0, device=device)
    done, state = resumed[0]
    all_saved = True
    for name, (_, model_class, file) in ARCHITECTURES.items():
        if name not in done:
            here = state if state and state["architecture"] == name else None
            done[name] = train(name, device, settings, done, here)
            save_unfinished(settings, done)
        if RANK == 0:
            model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT)
            model.load_state_dict(done[name]["weights"])
            all_saved &= save_model(model, CHECKPOINTS / file)
    if RANK == 0:
        append_to_log(settings, done)
        if all_saved:
            UNFINISHED.unlink(missing_ok=True)
        print(f"\n{'architecture':18s}{'parameters':>12s}{'seconds':>10s}"
              f"{'exact match, best epoch':>26s}")
        for name, record in done.items():
            print(f"{name:18s}{record['parameters']:12,d}{record['seconds']:10.1f}"
                  f"{record['best'][0]:26.1%}")
    if WORLD > 1:
        dist.barrier()  # if one process leaves early and fails while it ends, torchrun stops all
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
