"""
train_all.py - train all three architectures with the techniques of larger models

THE IDEA.  quick_start.py shows that the three architectures learn. This script trains them the way
larger models are trained. One loop serves all three, and a constant turns each technique on.

    for each step:
      for each micro-batch:                      gradient accumulation (ACCUMULATION_STEPS)
        predict, loss, backward                  PRECISION, GRADIENT_CHECKPOINTING, COMPILE, ...
      divide by the number of labels             summed over all processes (torchrun)
      clip, step                                 CLIP_NORM, AdamW with WEIGHT_DECAY on matrices
      at the end of an epoch: evaluate           keep the best weights on held-out sequences
      sometimes: save everything                 a killed run resumes from the last save

Run it:     python train_all.py                            (about 70 seconds on one CPU core)
            torchrun --nproc_per_node=2 train_all.py       in two processes

You can stop it at any time: the next run resumes, and repeats at most RESUME_EVERY steps. Start one
run at a time, because two would overwrite each other's files.

The last lines should be close to:

    architecture        parameters   seconds   exact match, best epoch
    encoder-only           598,426      20.7                    100.0%
    decoder-only           598,400      21.1                    100.0%
    encoder-decoder      1,392,384      28.3                    100.0%

READING ORDER   micro_batches -> train_step -> train (the loop, the heart of this file) -> main. The
schedule is `lr_factor` in training.py; `train_epoch` in decoder_only.py is the plain version.
"""
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

from housekeeping import (ROOT, InputError, load_tensors, prepare, run_script, save_model,
                          write_atomically)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from quick_start import ARCHITECTURES
from toy_dataset import IGNORE_INDEX, VOCABULARY, collate_fn, create_dataloaders, to_device
from training import (check_finite, check_warmup, checkpoint_layers, count_parameters, lr_factor,
                      use_fused_attention)

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
LEARNING_RATE = 1e-3     # at its peak
MIN_LEARNING_RATE = 5e-5  # in the last step
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01      # on matrices, not on norms and biases
CLIP_NORM = 1.0          # maximum norm of the gradient; runs/steps.csv records it before clipping
LABEL_SMOOTHING = 0.0    # 0.1 spreads 10% of each target over all tokens (Szegedy et al. 2016)
# Speed and memory
PRECISION = "float32"    # or "bfloat16", or "float16" (with gradient scaling)
FUSED_ATTENTION = True   # PyTorch's kernel instead of the formula; equal up to rounding
COMPILE = False          # True: torch.compile (needs a compiler; the first steps are slow)
GRADIENT_CHECKPOINTING = False  # True: keep only each layer's input and recompute the rest
PROFILE_STEPS = 0        # 5: profile five steps and print the most expensive operations
# The run
RESUME_EVERY = 50        # steps between two saves of the whole state
SEED = 0
DEVICE = "cpu"           # or "cuda", "mps"
NUM_THREADS = 1          # CPU threads per process
# =====================================================================================

# These constants affect only how a run is carried out, so you may change them before you resume it.
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
def steps_per_epoch(num_sequences):
    """Return how many full steps one epoch has. The sequences left over differ in every epoch."""
    return num_sequences // (BATCH_SIZE * ACCUMULATION_STEPS)


def micro_batches(step, num_sequences):
    """Return {number: indices of sequences} for the micro-batches of this process in `step`.

    SEED and step alone say which they are. So one integer is enough to resume, and there is no
    generator's state to save. Process r of WORLD gets numbers r, r + WORLD, and so on.
    """
    epoch, place = divmod(step, steps_per_epoch(num_sequences))
    generator = torch.Generator().manual_seed((SEED * 100_003 + epoch) % 2 ** 63)
    order = torch.randperm(num_sequences, generator=generator).tolist()  # the same in all steps
    first = place * ACCUMULATION_STEPS
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
    check_finite(loss_sum, f"at step {step}")

    scaler.unscale_(optimizer)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(WORLD / num_labels)
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()
    if not scaler.is_enabled():
        check_finite(norm, f"at step {step}", "gradient norm")  # NaN would reach every weight
    scaler.step(optimizer)  # skips the step if a gradient overflowed
    scaler.update()  # halves the scale after a skipped step
    return loss_sum / num_labels, norm, int(num_labels)


# --- 3. The loop: the heart of this file ----------------------------------------------
def train(name, device, settings, done, state):
    """Train one architecture, from scratch or from `state`, and return its record.

    A record has a dict per epoch, a list per step, the best score and its weights, and the seconds:
    only plain values and tensors, so that a file of records can be loaded safely. A state has the
    number of steps done, the record, and what model, optimizer, and scaler need to resume.
    """
    script = ARCHITECTURES[name][0]
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                                  VALIDATION_SHARE)
    items = list(train_loader.dataset)
    per_epoch = steps_per_epoch(len(items))
    total_steps = NUM_EPOCHS * per_epoch
    plain_model, optimizer, scaler = build(name, device)
    parts = {"model": plain_model, "optimizer": optimizer, "scaler": scaler}
    record = {"history": [], "steps": [], "best": [-1.0], "weights": None, "seconds": 0.0,
              "parameters": count_parameters(plain_model)}
    first = 0
    if state is not None:
        first, record = state["step"], state["record"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
    say(f"\n{name}: {record['parameters']:,} parameters, {NUM_EPOCHS} epochs of {per_epoch} steps, "
        f"{len(items)} training and {len(val_loader.dataset)} held-out sequences")
    model = plain_model
    if WORLD > 1:
        model = DistributedDataParallel(
            plain_model, device_ids=[device.index] if device.type == "cuda" else None)
    profile = torch.profiler.profile() if PROFILE_STEPS and RANK == 0 else None
    bar = tqdm(range(first, total_steps), initial=first, total=total_steps, ascii=True, leave=False,
               disable=None if RANK == 0 else True)  # None: no bar without a terminal
    start = time.perf_counter() - record["seconds"]

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
        if epoch_ends and RANK == 0:  # the others wait for rank 0's gradients in the next step
            evaluate(script, name, plain_model, val_loader, record, per_epoch)
        record["seconds"] = time.perf_counter() - start
        if (epoch_ends or (step + 1) % RESUME_EVERY == 0) and RANK == 0:
            save_unfinished(settings, done, {
                "architecture": name, "step": step + 1, "record": record,
                **{key: part.state_dict() for key, part in parts.items()}})
    return record


def evaluate(script, name, model, val_loader, record, per_epoch):
    """Evaluate at the end of an epoch, print a line, and keep the weights if they are the best."""
    result, steps = script.evaluate(model, val_loader), record["steps"][-per_epoch:]
    row = {"architecture": name, "epoch": len(record["history"]) + 1, "step": steps[-1][0] + 1,
           "train_loss": sum(s[2] * s[4] for s in steps) / sum(s[4] for s in steps),
           "gradient_norm": sum(s[3] for s in steps) / len(steps),
           "validation_loss": result["loss"], "accuracy": result["accuracy"],
           "exact_match": result["exact_match"]}
    record["history"].append(row)
    score = [row["exact_match"], -row["validation_loss"]]  # lists compare from left to right
    better = score > record["best"]
    if better:
        weights = {key: w.detach().clone() for key, w in model.state_dict().items()}
        record["best"], record["weights"] = score, weights
    say(f"  epoch {row['epoch']:2d}   train loss {row['train_loss']:.4f}   gradient norm "
        f"{row['gradient_norm']:.2f}   validation loss {row['validation_loss']:.4f}   "
        f"exact match {row['exact_match']:6.1%}{'   best so far' if better else ''}")


# --- 4. Model and optimizer -----------------------------------------------------------
def build(name, device):
    """Return a new model, with the constants under "Speed and memory" applied, AdamW, and scaler.

    Weight decay pulls matrices toward 0, the embedding included. It is not applied to the gains of
    norms, which should stay near 1, or to biases, which have no preferred size. AdamW applies the
    decay directly to the weights. In plain Adam it is added to the gradient, and the adaptive
    scaling distorts it (Loshchilov and Hutter 2019).
    """
    torch.manual_seed(SEED)
    model = ARCHITECTURES[name][1](len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT)
    model = model.to(device)
    if FUSED_ATTENTION:
        use_fused_attention(model)
    if GRADIENT_CHECKPOINTING:
        checkpoint_layers(model)
    if COMPILE:
        model.compile(dynamic=True)  # the lengths differ between batches
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=device.type != "mps")
    # The loss is a sum over about 170 labels, so the scale starts below the default of 65536.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 8, enabled=PRECISION == "float16")
    return model, optimizer, scaler


# --- 5. Files: the unfinished run, the history, and the log ---------------------------
def settings_of_run():
    """Return what decides the result: the constants, except FREE_TO_CHANGE, and a hash of the code.

    The hash covers all scripts without the lines that set these constants.
    """
    settings = {name: value for name, value in globals().items() if name.isupper()
                and name not in ("RANK", "WORLD") and isinstance(value, (bool, int, float, str))}
    code = hashlib.sha256()
    for path in sorted(set(ROOT.glob("*.py")) - {ROOT / "scratch.py"}):  # the reader's own
        text = path.read_text(encoding="utf-8")
        if path == Path(__file__).resolve():
            text = re.sub(rf"(?m)^({'|'.join(settings)}) = .*$", "", text)
        code.update(text.encode())
    return {**{name: value for name, value in settings.items() if name not in FREE_TO_CHANGE},
            "CODE": code.hexdigest()[:8]}


def differences(before, now):
    """Return a string with `NAME before -> now` for each setting that differs."""
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}"
                     for name in sorted(before.keys() | now.keys())
                     if before.get(name) != now.get(name))


def try_to_write(path, content):
    """Write bytes or a value to `path`. If that fails, print a warning and continue."""
    try:
        write_atomically(path, content)
    except OSError as error:
        warnings.warn(f"could not write runs/{path.name} ({error.strerror})", stacklevel=2)


def save_unfinished(settings, done, state=None):
    """Save the records of finished architectures and the state of the current one, if any.

    Also writes runs/history.csv (a line per epoch) and runs/steps.csv (a line per step).
    """
    records = {**done, **({state["architecture"]: state["record"]} if state else {})}
    epochs = [row for record in records.values() for row in record["history"]]
    steps = [[name, *step] for name, record in records.items() for step in record["steps"]]
    header = ["architecture", "step", "learning_rate", "loss", "gradient_norm", "labels"]
    for file, rows in (("steps.csv", [header, *steps]),
                       ("history.csv", [*epochs[:1], *(row.values() for row in epochs)])):
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        try_to_write(RUNS / file, text.getvalue().encode())
    try_to_write(UNFINISHED, {"settings": settings, "done": done, "state": state})


def load_unfinished(settings):
    """Return (done, state) of an interrupted run, or ({}, None) to start from scratch; say which.

    A run is not resumed if its file is damaged, or if its constants or code have changed. Then the
    file is kept under another name.
    """
    if not UNFINISHED.exists():
        print("no unfinished run: starting from scratch")
        return {}, None
    try:
        saved = load_tensors(UNFINISHED)
        done, state = saved["done"], saved["state"]
        changed = differences(saved["settings"], settings)
        if not changed:
            where = f", step {state['step']} of the {state['architecture']} model" if state else ""
            print(f"resuming the unfinished run: {len(done)} of 3 architectures trained{where}")
            return done, state
        reason = f"has different settings ({changed})"
    except Exception as error:  # a damaged file can raise anything
        reason = f"cannot be read ({type(error).__name__})"
    with contextlib.suppress(OSError):
        UNFINISHED.replace(RUNS / "unfinished.old.pt")
    print(f"runs/unfinished.pt {reason}: starting from scratch; it is kept as unfinished.old.pt")
    return {}, None


def append_to_log(settings, done):
    """Add this run to runs/log.jsonl and print the last runs, with the settings that differed."""
    path = RUNS / "log.jsonl"
    run = json.dumps({"settings": settings, "seconds": sum(r["seconds"] for r in done.values()),
                      "exact_match": {name: record["best"][0] for name, record in done.items()}})
    print("\nExact match of the last runs, and how their settings differed from this run's")
    print("  " + "  ".join(f"{name:>15s}" for name in done) + "   seconds   settings")
    try:
        lines = [*(path.read_text(encoding="utf-8").splitlines() if path.exists() else []), run]
        for old in map(json.loads, lines[-5:]):
            difference = differences(settings, old["settings"]).replace(" -> ", " was ")
            print("  " + "  ".join(f"{old['exact_match'][name]:15.1%}" for name in done)
                  + f"   {old['seconds']:7.1f}   {ascii(difference)[1:-1] or 'as in this run'}")
        try_to_write(path, "\n".join([*lines, ""]).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: runs/log.jsonl cannot be read ({type(error).__name__}): delete it")


# --- 6. The run -----------------------------------------------------------------------
def check_run():
    """Check the constants, alone and together, and return the device, or raise InputError."""
    device = prepare(globals())
    if MIN_LEARNING_RATE > LEARNING_RATE:
        raise InputError(f"MIN_LEARNING_RATE={MIN_LEARNING_RATE} is above LEARNING_RATE="
                         f"{LEARNING_RATE}: use less")
    if ACCUMULATION_STEPS % WORLD:
        raise InputError(f"ACCUMULATION_STEPS={ACCUMULATION_STEPS} micro-batches cannot be shared "
                         f"evenly among {WORLD} processes: use {WORLD}, {2 * WORLD}, ...")
    train_loader, _ = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                         VALIDATION_SHARE)
    check_warmup(WARMUP_STEPS, NUM_EPOCHS * steps_per_epoch(len(train_loader.dataset)))
    if device.type == "cuda" and WORLD > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def run():
    """Train what is not done yet, save it, and print the results."""
    device = check_run()
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    settings = settings_of_run()
    resumed = [load_unfinished(settings) if RANK == 0 else None]
    if WORLD > 1:  # with several machines, each has its own runs/; the first one's file counts
        dist.broadcast_object_list(resumed, src=0, device=device)
    done, state = resumed[0]
    all_saved = True
    for name, (_, model_class, file) in ARCHITECTURES.items():
        if name not in done:
            here = state if state and state["architecture"] == name else None
            done[name] = train(name, device, settings, done, here)
            if RANK == 0:
                save_unfinished(settings, done)
        if RANK == 0:
            model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT)
            model.load_state_dict(done[name]["weights"])
            all_saved &= save_model(model, file, done[name]["best"][0], globals())
    if RANK == 0:
        append_to_log(settings, done)
        if all_saved:  # otherwise the next run tries again
            with contextlib.suppress(OSError):
                UNFINISHED.unlink()
        print(f"\n{'architecture':18s}{'parameters':>12s}{'seconds':>10s}"
              f"{'exact match, best epoch':>26s}")
        for name, record in done.items():
            print(f"{name:18s}{record['parameters']:12,d}{record['seconds']:10.1f}"
                  f"{record['best'][0]:26.1%}")
    if WORLD > 1:
        dist.barrier()  # if one process leaves early and fails while it ends, torchrun stops all
        dist.destroy_process_group()


def main():
    try:
        run()
    except InputError:
        if RANK > 0:
            sys.exit(2)  # only the first process prints the message
        raise


if __name__ == "__main__":
    run_script(main)
