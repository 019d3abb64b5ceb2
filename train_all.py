"""
train_all.py - train all three architectures with the techniques of larger models

THE IDEA.  quick_start.py shows that the three architectures learn. This script trains them the way
larger models are trained. One loop serves all three, and each technique has a constant.

    for each epoch:
      for each group of micro-batches:           gradient accumulation (ACCUMULATION_STEPS)
        predict, loss, backward                  PRECISION, GRADIENT_CHECKPOINTING, COMPILE, ...
        divide by the number of labels           summed over all processes (torchrun)
        clip, step                               CLIP_NORM, AdamW with WEIGHT_DECAY on matrices
        sometimes: save everything               a killed run resumes from the last save
      evaluate, keep the best weights            by exact match on held-out sequences, then by loss

Run it:     python train_all.py                                  (about 75 seconds on one CPU core)
            torchrun --nproc_per_node=2 train_all.py             two processes on this machine
            torchrun --nnodes=2 --node_rank=0 --nproc_per_node=1 \\
                     --master_addr=FIRST --master_port=29500 train_all.py
                                                  two machines; --node_rank=1 on the second

You can stop it at any time. The next run resumes from the last save and repeats at most
RESUME_EVERY steps. Start only one run at a time, because two would overwrite each other's files.

The last lines should be close to:

    architecture        parameters   seconds   exact match, best epoch
    encoder-only           598,426      20.7                    100.0%
    decoder-only           598,400      21.1                    100.0%
    encoder-decoder      1,392,384      28.3                    100.0%

READING ORDER   optimizer -> micro-batches -> train_step -> train (the loop, the heart of this file)
                -> fused attention, checkpointing -> main. The learning-rate schedule is `lr_factor`
                in decoder_only.py. Files and processes are handled in bookkeeping.py.
"""
import contextlib
import functools
import os
import sys
import time

from housekeeping import (CHECKPOINTS, InputError, check_constants, check_finite, choose_device,
                          run_script, save_model)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from bookkeeping import (TrainingState, append_to_log, load_unfinished, processes, profiler, rank,
                         remove_unfinished, save_unfinished, say, settings_of_run, world_size,
                         write_history)
from decoder_only import lr_factor, show_strategies
from quick_start import ARCHITECTURES
from toy_dataset import IGNORE_INDEX, VOCABULARY, collate_fn, create_dataloaders, to_device

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
BATCH_SIZE = 32          # rows per micro-batch, limited by memory
ACCUMULATION_STEPS = 2   # micro-batches per step over all processes, so a step sees 64 rows
# The optimizer
NUM_EPOCHS = 4           # 109 steps each
LEARNING_RATE = 1e-3     # its peak
MIN_LEARNING_RATE = 5e-5  # in the last step
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01      # on matrices, not on norms and biases
CLIP_NORM = 1.0          # maximum norm of the gradient; runs/steps.csv has it before clipping
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


# --- 1. Optimizer ---------------------------------------------------------------------
def create_optimizer(model, total_steps):
    """Return (AdamW, LambdaLR) for `total_steps` steps.

    Weight decay pulls matrices toward 0. It is not applied to the gains of norms, which should stay
    near 1, or to biases, which have no preferred size. AdamW applies the decay directly to the
    weights. In plain Adam it is added to the gradient, and the adaptive scaling distorts it
    (Loshchilov and Hutter 2019).
    """
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    fused = parameters[0].device.type != "mps"
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=fused)
    schedule = functools.partial(lr_factor, total_steps=total_steps, warmup_steps=WARMUP_STEPS,
                                 final_factor=MIN_LEARNING_RATE / LEARNING_RATE)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


# --- 2. Micro-batches: the order of the rows, and the random numbers ------------------
def epoch_groups(num_rows, epoch):
    """Return the row numbers of one epoch, grouped by step and then by micro-batch.

    The order depends only on SEED and epoch, so epoch and group are enough to find the next rows.
    No generator's state has to be saved.
    """
    generator = torch.Generator().manual_seed((SEED * 100_003 + epoch) % 2 ** 63)
    order = torch.randperm(num_rows, generator=generator).tolist()
    batches = [order[i:i + BATCH_SIZE] for i in range(0, num_rows, BATCH_SIZE)]
    return [batches[i:i + ACCUMULATION_STEPS] for i in range(0, len(batches), ACCUMULATION_STEPS)]


def seed_micro_batch(step, number):
    """Seed dropout and masking for one micro-batch, independently of the process."""
    torch.manual_seed(((SEED * 1_000_003 + step) * 1_009 + number) % 2 ** 63)


# --- 3. One step ----------------------------------------------------------------------
def train_step(script, model, items, group, step, optimizer, scheduler, scaler):
    """Take one optimizer step on `group`: micro-batches, each a list of row numbers in `items`.

    Returns (mean loss over the group's labels, gradient norm before clipping, number of labels).
    `train_epoch` in decoder_only.py is the plain version: one batch per step, and one process.

    ACCUMULATION. backward() adds to .grad until zero_grad(), so several micro-batches can replace
    one batch that is too large for memory. The result must be the gradient of the mean loss over
    *all labels in the group*. A common bug is to average within each micro-batch and then average
    the averages. A micro-batch of short rows then counts as much as one with twice as many labels.
    Instead, sum the losses and divide the gradient once by the number of labels.

    PROCESSES. Process r handles micro-batches r, r + world, and so on. DistributedDataParallel
    averages the gradients over the processes in the last backward pass. They are then multiplied
    by world / num_labels, where num_labels counts the labels of all processes.
    """
    device, world = next(model.parameters()).device, world_size()
    autocast = torch.autocast(device.type, dtype=getattr(torch, PRECISION),
                              enabled=PRECISION != "float32")
    # In a short last group, a process may have no micro-batch. The others still wait for its
    # gradients, so it runs micro-batch 0 with a loss of 0.
    mine = list(range(rank(), len(group), world))
    idle = not mine
    loss_sum, num_labels = 0.0, 0
    optimizer.zero_grad()
    for number in mine or [0]:
        seed_micro_batch(step, number)
        batch = to_device(collate_fn([items[row] for row in group[number]]), device)
        # Average the gradients over the processes once per step, in the last backward pass.
        last = idle or number == mine[-1]
        with contextlib.nullcontext() if last or world == 1 else model.no_sync():
            with autocast:
                logits, labels = script.predict(model, batch)  # (B, T, V), (B, T)
            # The loss is a sum of many terms, so it is always computed in float32.
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum",
                                   ignore_index=IGNORE_INDEX, label_smoothing=LABEL_SMOOTHING)
            # The smallest positive float16 is 6e-8, so small gradients would become 0. The scaler
            # multiplies the loss by a large factor and later divides the gradients by it.
            scaler.scale(loss * 0 if idle else loss).backward()
        if not idle:
            loss_sum += loss.item()
            num_labels += (labels != IGNORE_INDEX).sum().item()
    if world > 1:
        precise = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.tensor([loss_sum, num_labels], dtype=precise, device=device)
        dist.all_reduce(totals)
        loss_sum, num_labels = totals.tolist()
    check_finite(loss_sum / num_labels, step)

    scaler.unscale_(optimizer)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(world / num_labels)
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()
    if not scaler.is_enabled():
        check_finite(norm, step, "gradient norm")  # NaN would reach every weight in this step
    scale = scaler.get_scale()
    scaler.step(optimizer)  # skips the step if a gradient overflowed
    scaler.update()  # halves the scale after a skipped step
    if scaler.get_scale() >= scale:
        scheduler.step()
    return loss_sum / num_labels, norm, num_labels


# --- 4. The loop: the heart of this file ----------------------------------------------
def train(script, model, state, items, val_loader, save):
    """Train `model` from `state` to the last epoch. The best weights are kept in `state.record`.

    With several processes, `model` is wrapped in DistributedDataParallel; state.parts["model"] is
    the plain model. save() saves everything that a killed run needs to resume.
    """
    plain_model, optimizer, scheduler, scaler = (
        state.parts[name] for name in ("model", "optimizer", "scheduler", "scaler"))
    with profiler(state.name, PROFILE_STEPS, next(model.parameters()).device) as profile:
        for epoch in range(state.epoch, NUM_EPOCHS):
            model.train()
            groups = epoch_groups(len(items), epoch)
            bar = tqdm(range(state.group, len(groups)), ascii=True, leave=False,
                       disable=None if rank() == 0 else True)  # None: no bar without a terminal
            for number in bar:
                step = epoch * len(groups) + number
                rate = scheduler.get_last_lr()[0]
                loss, norm, num_labels = train_step(script, model, items, groups[number], step,
                                                    optimizer, scheduler, scaler)
                profile.step()
                state.record["steps"].append([step, rate, loss, norm, num_labels])
                bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}")
                state.epoch, state.group = epoch, number + 1
                if (step + 1) % RESUME_EVERY == 0 and number + 1 < len(groups):
                    save()

            state.epoch, state.group = epoch + 1, 0
            if rank() == 0:  # the others wait for its gradients in the next step
                result = script.evaluate(plain_model, val_loader)
                better = state.add_epoch(
                    {"architecture": state.name, "epoch": epoch + 1, "step": step + 1,
                     "validation_loss": result["loss"], "accuracy": result["accuracy"],
                     "exact_match": result["exact_match"]},
                    len(groups), plain_model.state_dict())
                row = state.record["history"][-1]
                say(f"  epoch {epoch + 1:2d}   train loss {row['train_loss']:.4f}   gradient norm "
                    f"{row['gradient_norm']:.2f}   validation loss {row['validation_loss']:.4f}   "
                    f"exact match {row['exact_match']:6.1%}{'   best so far' if better else ''}")
            if epoch + 1 < NUM_EPOCHS:
                save()


# --- 5. Fused attention, gradient checkpointing, and counting -------------------------
def fused_attention(queries, keys, values, mask=None, dropout=0.0):
    """Compute `attention` in one kernel. Returns (result, None), because it stores no weights.

    It computes the softmax in tiles (Dao et al. 2022, FlashAttention) and divides by sqrt(K)
    itself. Since PyTorch 2.5, it returns zeros for a query whose keys are all masked.
    """
    return F.scaled_dot_product_attention(queries, keys, values, mask, dropout), None


def use_fused_attention(model):
    """Make every attention module in `model` use PyTorch's fused kernel. Returns the model."""
    for module in model.modules():
        if hasattr(module, "formula"):
            module.formula = fused_attention
    return model


def checkpoint_layers(model):
    """Make every layer keep only its input and recompute the rest in the backward pass.

    This saves memory and costs one more forward pass, about a third more work (Chen et al. 2016).
    The gradients are the same.
    """
    def run(forward, *inputs):
        if torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return forward(*inputs)

    for stack in ("layers", "encoder_layers", "decoder_layers"):
        for layer in getattr(model, stack, []):
            layer.forward = functools.partial(run, layer.forward)


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
        logits, _ = script.predict(model, batch)
    del logits
    return sum(kept.values())


def parameters_by_component(model):
    """Return {component: number of parameters}. Tied parameters count once, as embedding."""
    counts = {}
    for name, parameter in model.named_parameters():
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


# --- 6. From the constants to a trained model -----------------------------------------
def train_architecture(name, device, settings, done, progress):
    """Train one architecture, from scratch or from `progress`, and return its record.

    done: the records of the architectures that are already trained.
    """
    script, model_class, file = ARCHITECTURES[name]
    train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                                  VALIDATION_SHARE)
    items = list(train_loader.dataset)
    steps_per_epoch = len(epoch_groups(len(items), 0))

    torch.manual_seed(SEED)
    plain_model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                              DROPOUT).to(device)
    num_parameters = sum(p.numel() for p in plain_model.parameters())
    say(f"\n{name}: {num_parameters:,} parameters, {NUM_EPOCHS} epochs of {steps_per_epoch} steps, "
        f"{len(items)} training and {len(val_loader.dataset)} held-out sequences")
    if FUSED_ATTENTION:
        use_fused_attention(plain_model)
    if GRADIENT_CHECKPOINTING:
        batch = to_device(collate_fn(items[:BATCH_SIZE]), device)
        before = activation_bytes(script, plain_model, batch)
        checkpoint_layers(plain_model)
        after = activation_bytes(script, plain_model, batch)
        say(f"  activations kept for the backward pass: {before / 2 ** 20:.2f} MiB without "
            f"checkpointing, {after / 2 ** 20:.2f} MiB with it")
    if COMPILE:
        plain_model.compile(dynamic=True)  # the length of the rows differs between batches

    optimizer, scheduler = create_optimizer(plain_model, NUM_EPOCHS * steps_per_epoch)
    # The loss is a sum over about 170 labels, so the scale starts below the default of 65536.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 8, enabled=PRECISION == "float16")
    state = TrainingState(name, plain_model, optimizer, scheduler, scaler)
    if progress is not None:
        state.load_state_dict(progress)
    model = plain_model
    if world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(plain_model, device_ids=ids)

    def save():
        save_unfinished(settings, done, state)
        if rank() == 0 and state.record["history"]:
            write_history([*done.values(), state.record])

    train(script, model, state, items, val_loader, save)
    record = {**state.record, "parameters": num_parameters, "saved": False}
    if rank() == 0:
        plain_model.load_state_dict(state.record["best_weights"])
        record["saved"] = save_model(plain_model, CHECKPOINTS / file)
        write_history([*done.values(), record])
    save_unfinished(settings, {**done, name: record})
    return record


def train_for(script, model, train_loader, num_steps, learning_rate, warmup_steps, clip_norm,
              watch=None):
    """Train for `num_steps` plain steps and return the model. Used for comparisons and figures.

    watch(step, loss, seconds) is called after each step. Its own time does not count.
    """
    optimizer, scheduler = script.create_optimizer(model, learning_rate, num_steps, warmup_steps)
    device, batches, seconds = next(model.parameters()).device, iter(()), 0.0
    for step in tqdm(range(1, num_steps + 1), ascii=True, leave=False, disable=None):
        batch = next(batches, None)
        if batch is None:  # the next epoch
            batches = iter(train_loader)
            batch = next(batches)
        start = time.perf_counter()
        model.train()
        loss = script.compute_loss(model, to_device(batch, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        check_finite(loss.item(), step)  # item() waits for a GPU, so the seconds are correct
        seconds += time.perf_counter() - start
        if watch is not None:
            watch(step, loss.item(), seconds)
    return model.eval()


STRATEGIES = {"greedy": {}, "temperature 0.7": {"temperature": 0.7},
              "top_k 5": {"temperature": 1.0, "top_k": 5},
              "top_p 0.9": {"temperature": 1.0, "top_p": 0.9}}
STRATEGIES_OF = {"encoder-only": {"fill all masks": {}}, "decoder-only": STRATEGIES,
                 "encoder-decoder": {**STRATEGIES, "beam search 4": {"beam_width": 4}}}


def show_inference(device, done, num_examples=200):
    """Print the results of each model with each strategy, with the weights of its best epoch.

    The models were not trained on these sequences, but the best epoch was selected on them. So the
    comparison of strategies is fair, but the scores are slightly too high. For unbiased scores,
    use a third set.
    """
    _, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED, VALIDATION_SHARE)
    held_out = list(val_loader.dataset)
    items = held_out[::max(1, len(held_out) // num_examples)]  # they are ordered by length
    digits, words = [item["digits"] for item in items], [item["words"] for item in items]
    print(f"\nEvery strategy on {len(items)} held-out sequences, with the best weights")
    for name, strategies in STRATEGIES_OF.items():
        script, model_class, file = ARCHITECTURES[name]
        model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF).to(device).eval()
        model.load_state_dict(done[name]["best_weights"])
        print(f" {name}")
        done[name]["saved"] = done[name]["saved"] or save_model(model, CHECKPOINTS / file)
        show_strategies(script.translate, model, digits, words, strategies, SEED)


def check():
    """Raise InputError for constants that cannot work, alone or together."""
    check_constants(globals())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if ACCUMULATION_STEPS % world:
        raise InputError(f"ACCUMULATION_STEPS={ACCUMULATION_STEPS} micro-batches cannot be shared "
                         f"evenly among {world} processes: use {world}, {2 * world}, ...")
    train_loader, _ = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED,
                                         VALIDATION_SHARE)
    total_steps = NUM_EPOCHS * len(epoch_groups(len(train_loader.dataset), 0))
    if WARMUP_STEPS > max(0, total_steps - 2):
        raise InputError(f"WARMUP_STEPS={WARMUP_STEPS} leaves none of the {total_steps} steps for "
                         f"the decay: use {total_steps // 10}, or raise NUM_EPOCHS={NUM_EPOCHS}")


def main():
    try:
        check()
    except InputError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)  # only the first process prints the message
        raise
    torch.set_num_threads(NUM_THREADS)
    settings = settings_of_run(__file__, globals(), FREE_TO_CHANGE)
    with processes(choose_device(DEVICE)) as device:
        done, progress = load_unfinished(settings, device)
        for name in ARCHITECTURES:
            if name not in done:
                here = progress if progress and progress["architecture"] == name else None
                done[name] = train_architecture(name, device, settings, done, here)
        if rank() == 0:
            show_inference(device, done)
            append_to_log(settings, {name: record["best"][0] for name, record in done.items()},
                          sum(record["seconds"] for record in done.values()))
            remove_unfinished()
            print(f"\n{'architecture':18s}{'parameters':>12s}{'seconds':>10s}"
                  f"{'exact match, best epoch':>26s}")
            for name, record in done.items():
                print(f"{name:18s}{record['parameters']:12,d}{record['seconds']:10.1f}"
                      f"{record['best'][0]:26.1%}")


if __name__ == "__main__":
    run_script(main)
