"""
bookkeeping.py - processes, resuming, history, log, and profiler for train_all.py

Nothing in this file is about transformers.

    processes      rank, number of processes, and printing under torchrun
    TrainingState  everything that the next step depends on, saved to runs/unfinished.pt
    history        runs/history.csv with a row per epoch, runs/steps.csv with a row per step
    log            runs/log.jsonl with a line per run, to compare runs with different constants
    profiler       runs/trace_*.json and the most expensive operations
"""
import contextlib
import csv
import functools
import io
import json
import math
import os
import time
import types

import torch
import torch.distributed as dist

from housekeeping import (ROOT, check_finite, code_hash, tensors_from_bytes, tensors_to_bytes,
                          write_atomically)

RUNS = ROOT / "runs"
UNFINISHED = RUNS / "unfinished.pt"


# --- Processes ------------------------------------------------------------------------
def rank():
    """Return the rank of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print `words` in the first process only."""
    if rank() == 0:
        print(*words, flush=True)


@contextlib.contextmanager
def processes(device):
    """Connect the processes that torchrun started, if any. Yields the device of this one."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # set by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        if dist.is_initialized():
            # If one process leaves early and fails while it ends, torchrun stops the others.
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- Saving and resuming --------------------------------------------------------------
class TrainingState:
    """Everything that the next step depends on, and the record of the steps so far.

    epoch, group  the position in training: `group` steps of epoch number `epoch` are done
    record        history (a dict per epoch), steps (a list per step), the best score and its
                  weights, and the training time: only plain values and tensors, so that the file
                  can be loaded safely
    """

    def __init__(self, name, model, optimizer, scheduler, scaler):
        self.name, self.epoch, self.group = name, 0, 0
        self.parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler,
                      "scaler": scaler}
        self.record = {"history": [], "steps": [], "best": None, "best_weights": None,
                       "seconds": 0.0}
        self.clock = time.perf_counter()

    def update_seconds(self):
        """Add to the record the time since the last call."""
        now = time.perf_counter()
        self.record["seconds"] += now - self.clock
        self.clock = now

    def state_dict(self):
        """Return everything as a dict for `load_state_dict`."""
        self.update_seconds()
        return {"architecture": self.name, "epoch": self.epoch, "group": self.group,
                "record": self.record, **{k: part.state_dict() for k, part in self.parts.items()}}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned."""
        self.epoch, self.group, self.record = state["epoch"], state["group"], state["record"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def add_epoch(self, row, num_steps, weights):
        """Record an epoch of `num_steps` steps. If it is the best, keep `weights`, return True."""
        check_finite(row["validation_loss"], row["step"], "validation loss")
        steps = self.record["steps"][-num_steps:]
        norms = [norm for _, _, _, norm, _ in steps if math.isfinite(norm)]
        row["learning_rate"] = steps[-1][1]
        row["train_loss"] = sum(s[2] * s[4] for s in steps) / sum(s[4] for s in steps)
        row["gradient_norm"] = sum(norms) / max(1, len(norms))
        self.update_seconds()
        self.record["history"].append({**row, "seconds": self.record["seconds"]})
        score = [row["exact_match"], -row["validation_loss"]]  # lists compare from left to right
        better = self.record["best"] is None or score > self.record["best"]
        if better:
            self.record["best"] = score
            self.record["best_weights"] = {k: v.detach().clone() for k, v in weights.items()}
        return better


def settings_of_run(script, constants, free):
    """Return the settings that decide a run's result: its constants, except `free`, and CODE.

    CODE is a hash of all scripts, without the lines that set these constants.
    """
    names = [name for name, value in constants.items()
             if name.isupper() and isinstance(value, (bool, int, float, str))]
    settings = {name: constants[name] for name in names if name not in free}
    return {**settings, "CODE": code_hash(script, names)}


def differences(before, now):
    """Return a string with `NAME before -> now` for each setting that differs."""
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}"
                     for name in sorted(before.keys() | now.keys())
                     if before.get(name) != now.get(name))


def save_unfinished(settings, done, state=None):
    """Save the records of finished architectures and the state of the current one, if any."""
    progress = None if state is None else state.state_dict()
    if rank() == 0:
        try_to_write(UNFINISHED, tensors_to_bytes({"settings": settings, "done": done,
                                                   "progress": progress}))


def load_unfinished(settings, device):
    """Return (done, progress) of an interrupted run, or ({}, None) to start from scratch.

    A run is not resumed if its file is damaged, or if its constants or code have changed. Prints
    what it decides.
    """
    content = None
    if rank() == 0:
        for folder in (RUNS, ROOT / "checkpoints"):  # remove what a killed run was writing
            for leftover in folder.glob("*.tmp"):
                with contextlib.suppress(OSError):
                    leftover.unlink()
        try:
            content = UNFINISHED.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            content = error.strerror  # reported below, in all processes
    if world_size() > 1:  # each machine has its own runs/; only the first machine's file is used
        box = [content]
        dist.broadcast_object_list(box, src=0, device=device if device.type == "cuda" else None)
        content = box[0]
    if content is None:
        say("no unfinished run: starting from scratch")
        return {}, None
    try:
        saved = tensors_from_bytes(content, device)
        before, done, progress = dict(saved["settings"]), dict(saved["done"]), saved["progress"]
        changed = differences(before, settings)
        place = f"{len(done)} of 3 architectures trained" if progress is None else (
            f"{progress['architecture']}, epoch {progress['epoch'] + 1}, "
            f"after {progress['group']} steps")
        reason = f"the unfinished run had different settings ({changed})" if changed else None
    except Exception as error:  # a damaged file can raise anything
        why = content if isinstance(content, str) else type(error).__name__
        reason = f"runs/unfinished.pt cannot be read ({why})"
    if reason is not None:
        kept = ""
        if rank() == 0:
            with contextlib.suppress(OSError):
                UNFINISHED.replace(RUNS / "unfinished.old.pt")
                kept = "; it is kept as runs/unfinished.old.pt"
        say(f"{reason}: starting from scratch{kept}")
        return {}, None
    say(f"resuming the unfinished run: {place}")
    return done, progress


def remove_unfinished():
    """Remove the saved state of a run that has finished."""
    with contextlib.suppress(OSError):
        UNFINISHED.unlink(missing_ok=True)


@functools.cache
def warn_once(message):
    """Print a warning the first time it is given."""
    print(f"warning: {message}", flush=True)


def try_to_write(path, content):
    """Write `content` to `path`. If that fails, print one warning and continue."""
    try:
        write_atomically(path, content)
    except OSError as error:
        warn_once(f"could not write runs/{path.name} ({error.strerror}): training continues "
                  "without it")


# --- History and log ------------------------------------------------------------------
def write_history(records):
    """Write runs/history.csv and runs/steps.csv from the records of all architectures so far."""
    epochs, steps = io.StringIO(), io.StringIO()
    writer = csv.DictWriter(epochs, records[0]["history"][0].keys())
    writer.writeheader()
    step_writer = csv.writer(steps)
    step_writer.writerow(["architecture", "step", "learning_rate", "loss", "gradient_norm",
                          "labels"])
    for record in records:
        writer.writerows(record["history"])
        name = record["history"][0]["architecture"]
        step_writer.writerows([name, *step] for step in record["steps"])
    try_to_write(RUNS / "history.csv", epochs.getvalue().encode())
    try_to_write(RUNS / "steps.csv", steps.getvalue().encode())


def append_to_log(settings, scores, seconds):
    """Add this run to runs/log.jsonl and print the last runs with the settings that differed.

    scores: {architecture: exact match}
    """
    path, runs, text, skipped = RUNS / "log.jsonl", [], "", 0
    with contextlib.suppress(OSError):
        if path.is_file():
            text = path.read_text(encoding="ascii", errors="replace")
    for line in text.splitlines():
        try:
            run = json.loads(line)
            exact = {name: float(value) for name, value in run["exact_match"].items()}
            runs.append((dict(run["settings"].items()), exact, float(run["seconds"])))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            skipped += 1
    if skipped:
        print(f"warning: {skipped} lines of runs/log.jsonl cannot be read and are skipped")
    try:
        RUNS.mkdir(exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(0, "not a file")
        with open(path, "a", encoding="utf-8") as file:
            if text and not text.endswith("\n"):  # a run was killed while it wrote its line
                file.write("\n")
            file.write(json.dumps({"settings": settings, "exact_match": scores,
                                   "seconds": round(seconds, 1)}) + "\n")
    except OSError as error:
        print(f"warning: could not write runs/log.jsonl ({error.strerror})")
    print("\nExact match of the last runs, and how their settings differed from this run's")
    print("  " + "  ".join(f"{name:>15s}" for name in scores) + "   seconds   settings")
    for before, exact, took in runs[-4:] + [(settings, scores, seconds)]:
        difference = differences(settings, before).replace(" -> ", " was ") or "the same settings"
        difference = ascii(difference)[1:-1]  # a file may contain anything
        print("  " + "  ".join(f"{exact.get(name, math.nan):15.1%}" for name in scores)
              + f"   {took:7.1f}   {'this run' if before is settings else difference}")


# --- Profiler -------------------------------------------------------------------------
@contextlib.contextmanager
def profiler(name, steps, device):
    """Profile `steps` steps after the first. Yields an object; call its step() after each step.

    Writes a trace to runs/ (open it at https://ui.perfetto.dev) and prints the five most expensive
    operations.
    """
    if steps == 0 or rank() > 0:
        yield types.SimpleNamespace(step=lambda: None)
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    cost = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"

    def report(profile):
        trace = RUNS / f"trace_{name.replace('-', '_')}.json"
        try:
            RUNS.mkdir(exist_ok=True)
            temporary = trace.with_suffix(".tmp")
            profile.export_chrome_trace(str(temporary))  # which reports no full disk
            if not temporary.read_bytes().rstrip().endswith(b"}"):
                raise OSError("incomplete")
            temporary.replace(trace)
            written = f"trace in runs/{trace.name}"
        except (OSError, RuntimeError):
            written = f"warning: could not write runs/{trace.name}"
        operations = sorted(profile.key_averages(), key=lambda op: getattr(op, cost), reverse=True)
        total = sum(getattr(operation, cost) for operation in operations)
        say(f"  the most expensive operations of {steps} steps ({device.type.upper()} time); "
            f"{written}")
        for operation in operations[:5]:
            say(f"    {getattr(operation, cost) / total:6.1%}   {operation.key[:50]:50s}"
                f"   {operation.count:6d} calls")

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule,
                                on_trace_ready=report) as profile:
        yield profile
