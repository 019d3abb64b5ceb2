"""The training pipeline: each technique works as documented, and a killed run resumes."""

import copy
import csv
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kill_and_resume import kill_and_resume, run_until, same_bits, weights

import bookkeeping
import train_all
from conftest import MODELS, SCRIPTS, Workplace, finished, last_lines_as_promised, refused, run_of
from quick_start import ARCHITECTURES
from toy_dataset import IGNORE_INDEX, NumberTranslationDataset, collate_fn, create_dataloaders

SMALL = {
    "D_MODEL": 16,
    "NUM_HEADS": 2,
    "NUM_LAYERS": 1,
    "D_FF": 32,
    "NUM_SAMPLES": 600,
    "NUM_EPOCHS": 2,
    "RESUME_EVERY": 2,
    "WARMUP_STEPS": 4,
}
ITEMS = NumberTranslationDataset(300, 5, 0).items
WRITERS = [
    "decoder_only",
    "encoder_decoder",
]  # no random masks, so a batch always has the same loss


@pytest.fixture
def small(workplace):
    workplace.set("train_all", **SMALL)
    return workplace


# --- learning rate and optimizer ------------------------------------------------------
def test_only_matrices_decay_and_rates_follow_lr_factor():
    model = MODELS["decoder_only"](d_model=16, num_heads=2)
    optimizer, scheduler = train_all.create_optimizer(model, 300)
    decayed, left_alone = optimizer.param_groups
    assert decayed["weight_decay"] == train_all.WEIGHT_DECAY and left_alone["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(
        p.dim() < 2 for p in left_alone["params"]
    )
    assert len(decayed["params"]) + len(left_alone["params"]) == len(list(model.parameters()))
    minimum = train_all.MIN_LEARNING_RATE / train_all.LEARNING_RATE
    for step in range(5):
        expected = train_all.LEARNING_RATE * train_all.lr_factor(
            step, 300, train_all.WARMUP_STEPS, minimum
        )
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


def test_weight_decay_shrinks_weights_and_leaves_biases(monkeypatch):
    monkeypatch.setattr(train_all, "WEIGHT_DECAY", 0.5)
    model = MODELS["decoder_only"](d_model=16, num_heads=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = train_all.create_optimizer(model, 300)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    factor = 1 - optimizer.param_groups[0]["lr"] * 0.5
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (factor if p.dim() >= 2 else 1.0))


# --- one step -------------------------------------------------------------------------
class KeepGradients(torch.optim.SGD):
    """An optimizer that takes no step, so that a test can look at the gradients."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)


def step_on(name, group, dropout=0.0, draws=0):
    """The gradients of train_step on `group`, with the loss and the norm that it returns.

    draws: how many random numbers are drawn between building the model and the step.
    """
    torch.manual_seed(0)
    model = MODELS[name](d_model=16, num_heads=2, num_layers=2, d_ff=32, dropout=dropout).train()
    optimizer = KeepGradients(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.rand(draws)
    loss, norm, labels = train_all.train_step(
        SCRIPTS[name],
        model,
        ITEMS,
        group,
        3,
        optimizer,
        scheduler,
        torch.amp.GradScaler("cpu", enabled=False),
    )
    assert (
        labels == sum(len(ITEMS[i]["words"]) + 1 for rows in group for i in rows)
        or name == "encoder_only"
    )
    return {n: p.grad.clone() for n, p in model.named_parameters()}, loss, norm


@pytest.fixture
def no_clipping(monkeypatch):
    monkeypatch.setattr(train_all, "CLIP_NORM", 1e9)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8, 8), (30, 2), (5, 1, 26), (31, 1)])
def test_micro_batches_give_the_gradient_of_one_large_batch(name, sizes, no_clipping):
    rows = sorted(
        range(32), key=lambda i: len(ITEMS[i]["digits"])
    )  # short rows first, so that micro-batches differ as much as possible
    group, start = [], 0
    for size in sizes:
        group.append(rows[start : start + size])
        start += size
    parts, loss_parts, _ = step_on(name, group)
    whole, loss_whole, _ = step_on(name, [rows[:start]])
    assert loss_parts == pytest.approx(loss_whole, abs=1e-6)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", WRITERS)
def test_the_loss_of_a_step_averages_all_its_labels(name, no_clipping):
    group = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]]
    torch.manual_seed(0)
    model = MODELS[name](d_model=16, num_heads=2, num_layers=2, d_ff=32).train()
    expected = SCRIPTS[name].compute_loss(model, collate_fn([ITEMS[i] for i in sum(group, [])]))
    assert step_on(name, group)[1] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_micro_batch_does_not_depend_on_earlier_draws(name):
    one = step_on(name, [[0, 1, 2], [3, 4]], dropout=0.2)
    other = step_on(name, [[0, 1, 2], [3, 4]], dropout=0.2, draws=77)
    assert one[1:] == other[1:] and all(torch.equal(one[0][key], other[0][key]) for key in one[0])


def test_clipping_shortens_the_gradient_and_keeps_its_direction(monkeypatch):
    monkeypatch.setattr(train_all, "CLIP_NORM", 1e9)
    free, _, norm = step_on("decoder_only", [[0, 1, 2, 3]])
    monkeypatch.setattr(train_all, "CLIP_NORM", norm / 10)
    clipped, _, norm_before_clipping = step_on("decoder_only", [[0, 1, 2, 3]])
    assert norm_before_clipping == pytest.approx(norm)  # as it is logged, before clipping
    assert math.sqrt(sum((g**2).sum().item() for g in clipped.values())) == pytest.approx(
        norm / 10, rel=1e-4
    )
    for key in free:
        torch.testing.assert_close(clipped[key] * 10, free[key], atol=1e-5, rtol=1e-3)


def test_label_smoothing_mixes_in_the_uniform_distribution(monkeypatch, no_clipping):
    torch.manual_seed(0)
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=2, d_ff=32).train()
    batch = collate_fn([ITEMS[i] for i in range(6)])
    logits, labels = SCRIPTS["decoder_only"].logits_and_labels(model, batch)
    counts = labels != IGNORE_INDEX
    log_p = logits[counts].log_softmax(-1)
    expected = 0.9 * F.nll_loss(log_p, labels[counts]) - 0.1 * log_p.mean()
    monkeypatch.setattr(train_all, "LABEL_SMOOTHING", 0.1)
    assert step_on("decoder_only", [list(range(6))])[1] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bfloat16_gives_the_same_step_within_its_precision(name, monkeypatch, no_clipping):
    exact, loss, norm = step_on(name, [[0, 1, 2, 3], [4, 5, 6, 7]])
    monkeypatch.setattr(train_all, "PRECISION", "bfloat16")
    rough, rough_loss, rough_norm = step_on(name, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert (
        rough_loss == pytest.approx(loss, rel=0.02) and rough_loss != loss
    )  # close, but not identical
    assert rough_norm == pytest.approx(norm, rel=0.1)
    cosine = sum((exact[k] * rough[k]).sum().item() for k in exact) / norm / rough_norm
    assert cosine > 0.99
    assert all(gradient.dtype == torch.float32 for gradient in rough.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(name):
    script, batch = SCRIPTS[name], collate_fn(ITEMS[:16])
    model = MODELS[name](d_model=16, num_heads=2, num_layers=4, d_ff=64, dropout=0.1).train()
    gradients, kept = [], []
    for checkpointing in (False, True):
        if checkpointing:
            train_all.checkpoint_layers(model)
        kept.append(train_all.activation_bytes(script, model, batch))
        model.zero_grad()
        torch.manual_seed(5)
        script.compute_loss(model, batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 2
    model.eval()
    assert len(script.translate(model, [["4", "0"]])) == 1  # the model can still translate


def test_clipping_acts_on_unscaled_gradients(monkeypatch):
    """With a scaler, gradients are a thousand times too large until they are unscaled."""
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(train_all, "CLIP_NORM", 0.05)
        torch.manual_seed(0)
        model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=1, d_ff=32).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        before = [p.detach().clone() for p in model.parameters()]
        _, norm, _ = train_all.train_step(
            SCRIPTS["decoder_only"], model, ITEMS, [[0, 1], [2]], 3, optimizer, scheduler, scaler
        )
        step = [a - b.detach() for a, b in zip(before, model.parameters())]
        assert math.sqrt(sum((s**2).sum().item() for s in step)) == pytest.approx(0.05, rel=1e-3)
        results.append((norm, step))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for one, other in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=1).train()
    model.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = [p.detach().clone() for p in model.parameters()]
    train_all.train_step(
        SCRIPTS["decoder_only"], model, ITEMS, [[0]], 3, optimizer, scheduler, scaler
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert scaler.get_scale() == 32.0 and scheduler.last_epoch == 0


# --- groups ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rows, batch_size, accumulation", [(100, 8, 3), (7, 32, 2), (64, 32, 2), (65, 32, 2), (5, 1, 4)]
)
def test_an_epoch_uses_each_row_once_in_bounded_groups(rows, batch_size, accumulation, monkeypatch):
    monkeypatch.setattr(train_all, "BATCH_SIZE", batch_size)
    monkeypatch.setattr(train_all, "ACCUMULATION_STEPS", accumulation)
    groups = train_all.epoch_groups(rows, 0)
    assert sorted(row for group in groups for micro_batch in group for row in micro_batch) == list(
        range(rows)
    )
    assert all(1 <= len(group) <= accumulation for group in groups)
    assert all(len(group) == accumulation for group in groups[:-1])  # only the last is short
    assert train_all.epoch_groups(rows, 0) == groups
    assert rows == 7 or train_all.epoch_groups(rows, 1) != groups


def test_the_best_weights_stay_when_later_epochs_are_worse():
    layer = torch.nn.Linear(1, 1)
    state = bookkeeping.TrainingState("x", layer, layer, layer, layer)
    for exact, value, better in ((0.5, 1.0, True), (0.9, 2.0, True), (0.4, 3.0, False)):
        torch.nn.init.constant_(layer.weight, value)
        state.record["steps"] += [[0, 0.1, 1.0, 1.0, 10], [1, 0.1, 4.0, 1.0, 30]]
        row = {"exact_match": exact, "validation_loss": 1.0, "step": 2}
        assert state.add_epoch(row, 2, layer.state_dict()) == better
    torch.nn.init.constant_(layer.weight, 9.0)  # the weights kept must be a copy
    assert state.record["best_weights"]["weight"].item() == 2.0
    # The loss of an epoch is a mean over labels, not over steps.
    assert state.record["history"][0]["train_loss"] == pytest.approx((10 + 120) / 40)


def test_a_resumed_run_processes_exactly_the_remaining_groups(monkeypatch):
    monkeypatch.setattr(train_all, "NUM_EPOCHS", 3)
    monkeypatch.setattr(train_all, "BATCH_SIZE", 10)
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=1)
    optimizer, scheduler = train_all.create_optimizer(model, 45)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = bookkeeping.TrainingState("decoder-only", model, optimizer, scheduler, scaler)
    state.epoch, state.group, seen = 1, 4, []

    def record(script, model, items, group, step, *_):
        assert model.training
        seen.append((step, group))
        return 1.0, 1.0, 1

    monkeypatch.setattr(train_all, "train_step", record)
    loader = create_dataloaders(100, 3, 10, 0)[1]
    train_all.train(SCRIPTS["decoder_only"], model, state, ITEMS, loader, lambda: None)
    groups = [train_all.epoch_groups(len(ITEMS), epoch) for epoch in range(3)]
    n = len(groups[0])
    assert seen == [(n + i, group) for i, group in enumerate(groups[1])][4:] + [
        (2 * n + i, group) for i, group in enumerate(groups[2])
    ]


class Killed(Exception):
    pass


def new_training(name="decoder-only"):
    torch.manual_seed(1)
    model = MODELS[name.replace("-", "_")](d_model=16, num_heads=2, num_layers=1, d_ff=32)
    optimizer, scheduler = train_all.create_optimizer(model, 100)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return model, bookkeeping.TrainingState(name, model, optimizer, scheduler, scaler)


@pytest.mark.parametrize("killed_after", [2, 3, 6, 7, 9])
def test_an_interrupted_epoch_sees_every_group_exactly_once(killed_after, monkeypatch):
    """Killed after some steps and resumed from the last save: the steps that count."""
    monkeypatch.setattr(train_all, "NUM_EPOCHS", 2)
    monkeypatch.setattr(train_all, "RESUME_EVERY", 3)
    monkeypatch.setattr(train_all, "BATCH_SIZE", 35)
    loader = create_dataloaders(100, 3, 10, 0)[1]
    step_of, seen, saved = train_all.train_step, [], []

    def record(script, model, items, group, step, *rest):
        if len(seen) == killed_after and not resumed:
            raise Killed
        seen.append((step, group))
        return step_of(script, model, items, group, step, *rest)

    monkeypatch.setattr(train_all, "train_step", record)

    def run(state, model):
        def save():
            saved[:] = [copy.deepcopy(state.state_dict()), list(seen)]

        train_all.train(SCRIPTS["decoder_only"], model, state, ITEMS, loader, save)

    resumed = False
    model, state = new_training()
    with pytest.raises(Killed):
        run(state, model)
    resumed = True
    model, state = new_training()
    seen = []
    if saved:
        state.load_state_dict(saved[0])
        seen = saved[1]
    run(state, model)
    groups = [train_all.epoch_groups(len(ITEMS), epoch) for epoch in range(2)]
    assert seen == list(enumerate(groups[0] + groups[1])) and len(groups[0]) == 5
    assert [step for step, *_ in state.record["steps"]] == list(range(10))
    assert [row["epoch"] for row in state.record["history"]] == [1, 2]


def test_the_saved_model_is_that_of_the_best_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_all, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(bookkeeping, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(bookkeeping, "UNFINISHED", tmp_path / "runs" / "unfinished.pt")
    for constant, value in {**SMALL, "NUM_SAMPLES": 300, "NUM_EPOCHS": 4}.items():
        monkeypatch.setattr(train_all, constant, value)
    script, weights_of = SCRIPTS["decoder_only"], []
    scores = iter([0.5, 0.9, 0.9, 0.2])

    def evaluate(model, loader):
        weights_of.append({k: v.clone() for k, v in model.state_dict().items()})
        exact = next(scores)  # the second 0.9 has the lower loss
        return {"loss": 1 - len(weights_of) / 10, "accuracy": 0.5, "exact_match": exact}

    monkeypatch.setattr(script, "evaluate", evaluate)
    train_all.train_architecture("decoder-only", torch.device("cpu"), {}, {}, None)
    kept = MODELS["decoder_only"].load(tmp_path / "decoder_only.pt").state_dict()
    assert all(torch.equal(kept[k], weights_of[2][k]) for k in kept)
    assert not all(torch.equal(kept[k], weights_of[3][k]) for k in kept)


# --- whole runs -----------------------------------------------------------------------
def run(workplace, processes=1, **environment):
    if processes == 1:
        return workplace.run("train_all", timeout=300, **environment)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "train_all.py",
        ],
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", ["train_all"], ids=run_of)
def test_a_full_run_reaches_its_documented_results(script):
    workplace, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in ARCHITECTURES:
        row = [line for line in done.stdout.splitlines() if re.match(rf"{name} +[\d,]+ +\d", line)]
        assert len(row) == 1 and float(row[0].split()[-1].rstrip("%")) >= 99.9
    history = table(workplace.folder / "runs" / "history.csv")
    assert len(history) == 3 * train_all.NUM_EPOCHS
    assert all(
        0 <= float(row["exact_match"]) <= 1 and float(row["gradient_norm"]) > 0 for row in history
    )
    steps = table(workplace.folder / "runs" / "steps.csv")
    assert float(steps[0]["learning_rate"]) == pytest.approx(
        train_all.LEARNING_RATE / train_all.WARMUP_STEPS
    )
    assert float(steps[-1]["learning_rate"]) == pytest.approx(train_all.MIN_LEARNING_RATE)
    assert last_lines_as_promised("train_all", done.stdout)
    inference = done.stdout.split("Every strategy")[1].split("Exact match of")[0]
    assert len(re.findall(r"^  \w.* [\d.]+% +[\d.]+ +[\d.]+$", inference, flags=re.MULTILINE)) == 10
    assert not (workplace.folder / "runs" / "unfinished.pt").exists()


def test_a_run_killed_repeatedly_ends_with_the_same_bits(tmp_path_factory):
    places = [Workplace(tmp_path_factory.mktemp("train")) for _ in range(2)]
    for place in places:
        place.set("train_all", **SMALL)
    # 9 steps per epoch, 18 per architecture, a save every second step
    kills = [
        ("in an epoch", 5),  # after the save of step 4
        ("while writing", 1),
        ("after a rename", 7),
        ("between architectures", 1),
        ("in an epoch", 13),  # in the second epoch of the next one
        ("after training", 1),
    ]
    assert kill_and_resume(*places, kills)


def test_changed_constants_are_named_and_start_a_run_from_scratch(small):
    small.set("train_all", NUM_EPOCHS=40)
    run_until(small, "after a save", 3)
    assert (small.folder / "runs" / "unfinished.pt").exists()
    small.set("train_all", NUM_EPOCHS=2, LEARNING_RATE=0.002, NUM_THREADS=2)
    first = run(small).stdout.splitlines()[0]
    assert (
        "LEARNING_RATE 0.001 -> 0.002" in first
        and "NUM_EPOCHS 40 -> 2" in first
        and "starting from scratch" in first
    )
    assert (
        "NUM_THREADS" not in first
        and "CODE" not in first
        and (small.folder / "runs" / "unfinished.old.pt").exists()
    )
    assert (
        run(small).stdout.splitlines()[0] == "no unfinished run: starting from scratch"
    )  # the previous run has finished


def test_weights_that_explode_in_the_last_step_replace_no_checkpoint(small):
    small.set("train_all", LEARNING_RATE=1e30, NUM_EPOCHS=1, WARMUP_STEPS=0, BATCH_SIZE=534,
              ACCUMULATION_STEPS=1, CLIP_NORM=1e30, VALIDATION_SHARE=0.1)  # fmt: skip
    small.set("decoder_only", LEARNING_RATE=1e30, NUM_EPOCHS=1, WARMUP_STEPS=0, NUM_SAMPLES=300,
              BATCH_SIZE=270, CLIP_NORM=1e30)  # fmt: skip
    for script, file in (("train_all", "encoder_only"), ("decoder_only", "decoder_only")):
        checkpoint = small.folder / "checkpoints" / f"{file}.pt"
        MODELS[file](d_model=16, num_heads=2).save(checkpoint)
        before = checkpoint.read_bytes()
        done = small.run(script)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "try a tenth of LEARNING_RATE" in done.stderr
        assert checkpoint.read_bytes() == before


def test_changed_code_starts_a_run_from_scratch(small):
    small.set("train_all", NUM_EPOCHS=40)
    model, script = small.folder / "decoder_only.py", small.folder / "train_all.py"

    def start_and_kill():
        return run_until(small, "after a save", 2).splitlines()[0]

    start_and_kill()
    small.set("train_all", NUM_THREADS=2)  # says how a run is carried out, not what it computes
    assert start_and_kill().startswith("resuming the unfinished run: encoder-only")
    for path, old, new in (
        (model, "class DecoderLayer", "SOMETHING = 1\n\n\nclass DecoderLayer"),
        (script, "lr=LEARNING_RATE, fused", "lr=LEARNING_RATE, betas=(0.8, 0.99), fused"),
        (small.folder / "toy_dataset.py", "random.Random(seed)", "random.Random(seed + 1)"),
        (small.folder / "tiny_gpt.py", "import random", "import random  # any top-level script"),
    ):
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))
        first = start_and_kill()
        assert re.search(r"different settings \(CODE \w+ -> \w+\): starting from scratch", first)


def test_a_run_killed_after_training_does_only_the_rest(small):
    run_until(small, "after training")
    done = run(small)
    first = done.stdout.splitlines()[0]
    assert first == "resuming the unfinished run: 3 of 3 architectures trained"
    assert "epoch" not in done.stdout.split("Every strategy")[0].split("\n", 1)[1]
    assert len((small.folder / "runs" / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_nan_gradient_stops_training_before_changing_the_weights(bad):
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=1).train()
    before = [p.detach().clone() for p in model.parameters()]
    model.final_norm.weight.register_hook(lambda gradient: gradient * bad)
    optimizer, scheduler = train_all.create_optimizer(model, 100)
    with pytest.raises(
        ValueError,
        match=f"gradient norm became {'nan' if math.isnan(bad) else '(inf|nan)'} at step 7",
    ):
        train_all.train_step(
            SCRIPTS["decoder_only"],
            model,
            ITEMS,
            [[0, 1]],
            7,
            optimizer,
            scheduler,
            torch.amp.GradScaler("cpu", enabled=False),
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, "cut", "flipped bit", "a folder"])
def test_a_damaged_resume_file_is_reported_and_costs_no_model(small, content):
    (small.folder / "runs").mkdir()
    path = small.folder / "runs" / "unfinished.pt"
    if content == "flipped bit":
        torch.save({"settings": {}, "done": {}, "progress": None, "more": torch.zeros(1000)}, path)
        content = path.read_bytes()
        position = content.index(bytes(400)) + 99
        content = content[:position] + b"\1" + content[position + 1 :]
    elif content == "cut":
        torch.save({"constants": {}, "model": torch.zeros(1000)}, path)
        content = path.read_bytes()[:2000]
    if content == "a folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    checkpoint = small.folder / "checkpoints" / "decoder_only.pt"
    MODELS["decoder_only"](d_model=16, num_heads=2).save(checkpoint)
    good = checkpoint.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-u", "train_all.py"], cwd=small.folder, stdout=subprocess.PIPE, text=True
    )
    assert re.fullmatch(
        r"runs/unfinished.pt cannot be read \([\w ]+\): starting from scratch; it is kept as "
        r"runs/unfinished.old.pt\n",
        process.stdout.readline(),
    )
    for line in process.stdout:
        if line.startswith("decoder-only:"):
            assert checkpoint.read_bytes() == good
            break
    process.communicate()
    assert process.returncode == 0


def test_a_run_completes_with_warnings_if_files_cannot_be_written(small):
    for folder in ("runs", "checkpoints"):
        (small.folder / folder).write_text("a file where the folder should be")
    done = run(small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not write runs/unfinished.pt") == 1  # once, not at every save
    assert done.stdout.count("could not save checkpoints/") == 6  # once more at the end
    assert done.stdout.count("greedy") == 2  # the models are still measured
    assert re.search(r"encoder-decoder +[\d,]+ +[\d.]+ +[\d.]+%", done.stdout)


def test_compiled_training_gives_the_same_losses(tmp_path_factory):
    """The compiled model rounds differently, so the losses agree only to a few digits."""
    curves = []
    for compiled in (False, True):
        place = Workplace(tmp_path_factory.mktemp(f"compile{compiled}"))
        place.set("train_all", **{**SMALL, "NUM_EPOCHS": 1, "COMPILE": compiled})
        done = run(place)
        if "COMPILE=True does not work here" in done.stderr:
            assert done.returncode == 2 and done.stderr.count("\n") == 1
            pytest.skip("this machine has no compiler")
        assert done.returncode == 0, done.stderr
        curves.append([float(row["loss"]) for row in table(place.folder / "runs" / "steps.csv")])
    assert len(curves[0]) == len(curves[1]) and max(abs(a - b) for a, b in zip(*curves)) < 1e-3


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long traceback")

    monkeypatch.setattr(torch, "compile", no_compiler)
    line = refused(train_all, monkeypatch, capsys, COMPILE=True)
    assert line == "error: COMPILE=True does not work here (no C++ compiler): use False\n"


def test_a_model_that_cannot_be_saved_is_measured_from_memory(small):
    """An old checkpoint must not be mistaken for the new model, which is still in memory."""
    checkpoints = small.folder / "checkpoints"
    MODELS["decoder_only"](d_model=16, num_heads=2).save(checkpoints / "decoder_only.pt")
    path = small.folder / "housekeeping.py"
    path.write_text(
        path.read_text().replace(
            "    path = Path(path)\n    path.parent.mkdir",
            "    path = Path(path)\n    if path.name == 'decoder_only.pt':\n"
            "        raise OSError(28, 'No space left on device')\n    path.parent.mkdir",
        )
    )
    done = run(small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not save checkpoints/decoder_only.pt") == 2
    assert done.stdout.count("greedy") == 2
    old = MODELS["decoder_only"].load(checkpoints / "decoder_only.pt")
    assert old.arguments["d_model"] == 16 and old.arguments["num_layers"] == 2  # untouched


def test_two_processes_give_the_losses_of_one(tmp_path_factory):
    curves, places = [], []
    for processes in (1, 2):
        place = Workplace(tmp_path_factory.mktemp(f"processes{processes}"))
        # 540 rows in micro-batches of 36 are 15: the last group is short, and one process has
        # nothing to do in it.
        place.set("train_all", **SMALL)
        place.set("train_all", BATCH_SIZE=36, DROPOUT=0.1, VALIDATION_SHARE=0.1)
        done = run(place, processes)
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.count("Exact match of the last runs") == 1
        )  # only the first process prints and writes
        curves.append([float(row["loss"]) for row in table(place.folder / "runs" / "steps.csv")])
        places.append(place)
    assert len(curves[0]) == len(curves[1]) == 3 * 2 * 8
    assert max(abs(a - b) for a, b in zip(*curves)) < 1e-4


def test_a_run_resumes_with_another_number_of_processes(tmp_path_factory):
    whole, moved = (
        Workplace(tmp_path_factory.mktemp("whole")),
        Workplace(tmp_path_factory.mktemp("moved")),
    )
    for place in (whole, moved):
        place.set("train_all", **SMALL)
        place.set("train_all", NUM_EPOCHS=6)
    assert run(whole).returncode == 0
    run_until(moved, "in an epoch", 31)
    done = run(moved, processes=2)
    assert done.returncode == 0, done.stderr
    assert "resuming the unfinished run: encoder-only" in done.stdout
    curves = [
        [float(row["loss"]) for row in table(place.folder / "runs" / "steps.csv")]
        for place in (whole, moved)
    ]
    assert max(abs(a - b) for a, b in zip(*curves)) < 1e-4


def test_a_process_that_fails_ends_the_job_with_its_error(small):
    path = small.folder / "train_all.py"
    source = path.read_text()
    death = "    if rank() == 1:\n        raise RuntimeError('rank one has died')\n"
    path.write_text(source.replace('    say(f"\\n{name}: ', death + '    say(f"\\n{name}: '))
    assert path.read_text() != source
    done = run(small, processes=2)
    assert done.returncode != 0 and "rank one has died" in done.stderr


def test_a_process_that_aborts_at_its_end_loses_nothing(small):
    path = small.folder / "train_all.py"
    source = path.read_text()
    # Rank 1 aborts as soon as its `main` has returned. Rank 0 still has two seconds of work.
    ending = (
        "            import time; time.sleep(2)\n            show_inference(device, done)\n"
        "        else:\n            import atexit; atexit.register(os.abort)\n"
        "        if rank() == 0:\n"
    )
    path.write_text(source.replace("            show_inference(device, done)\n", ending))
    assert path.read_text() != source
    done = run(small, processes=2)
    assert done.returncode != 0  # rank 1 did abort
    assert "exact match, best epoch" in done.stdout
    assert (small.folder / "runs" / "log.jsonl").read_text().count("\n") == 1


def test_other_models_in_checkpoints_do_not_disturb_a_resumed_run(small):
    """After a kill, one checkpoint is replaced by another model and one is deleted."""
    run_until(small, "after training")
    folder = small.folder / "checkpoints"
    MODELS["encoder_only"](d_model=32, num_heads=4).save(folder / "encoder_only.pt")
    (folder / "decoder_only.pt").unlink()
    best = [row for row in table(small.folder / "runs" / "history.csv")]
    done = run(small)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "3 of 3 architectures trained" in done.stdout
    shown = done.stdout.split("fill all masks")[1].split("\n")[0]
    rows = [row for row in best if row["architecture"] == "encoder-only"]
    assert max(float(row["exact_match"]) for row in rows) == pytest.approx(
        float(shown.split()[0].rstrip("%")) / 100, abs=0.06
    )  # the model of this run, on a part of the held-out sequences


@pytest.mark.parametrize(
    "line",
    [
        '{"constants": 5}',
        '{"settings": [[1, 2]], "exact_match": {}, "seconds": 1}',
        '{"settings": {}, "exact_match": {"a": 1' + "0" * 400 + '}, "seconds": 1}',
        "[" * 100_000,
        '{"settings": {"\\ud800": "\\u00e9"}, "exact_match": {}, "seconds": 1}',
        "\x00\x01 noise",
    ],
    ids=range(6),
)
def test_any_log_costs_at_most_a_warning(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bookkeeping, "RUNS", tmp_path)
    path = tmp_path / "log.jsonl"
    path.write_text(line, encoding="utf-8")  # without an end of line, as a kill leaves it
    for _ in range(2):
        bookkeeping.append_to_log({"SEED": 0}, {"encoder-only": 0.5}, 3.0)
    printed = capsys.readouterr().out
    assert printed.isascii() and printed.count("   this run\n") == 2
    assert "the same settings" in printed.split("   this run\n")[1]  # the first was recorded
    path.unlink()
    path.mkdir()
    bookkeeping.append_to_log({"SEED": 0}, {"encoder-only": 0.5}, 3.0)
    assert "could not write runs/log.jsonl" in capsys.readouterr().out


def test_the_profiler_does_not_name_a_trace_that_it_did_not_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.setattr(bookkeeping, "RUNS", tmp_path / "runs")
    with bookkeeping.profiler("decoder-only", 1, torch.device("cpu")) as profile:
        for _ in range(3):
            torch.ones(3).sum()
            profile.step()
    printed = capsys.readouterr().out
    assert "warning: could not write runs/trace_decoder_only.json" in printed
    assert "trace in runs/" not in printed and "calls" in printed


def test_the_log_shows_only_the_constants_that_changed(small):
    assert run(small).returncode == 0
    with open(small.folder / "runs" / "log.jsonl", "a") as file:
        file.write('{"torn')  # as a kill in the middle of a write leaves it
        file.write("\n")
    small.set("train_all", LEARNING_RATE=0.004)
    done = run(small)
    assert done.returncode == 0 and "1 lines of runs/log.jsonl cannot be read" in done.stdout
    rows = done.stdout.split("Exact match of the last runs")[1].splitlines()
    assert rows[2].endswith("LEARNING_RATE 0.004 was 0.001") and rows[3].endswith("this run")
    runs = [
        line
        for line in (small.folder / "runs" / "log.jsonl").read_text().splitlines()
        if "torn" not in line
    ]
    assert [json.loads(line)["settings"]["LEARNING_RATE"] for line in runs] == [0.001, 0.004]


def test_the_profiler_writes_a_trace_and_names_five_operations(small):
    small.set("train_all", PROFILE_STEPS=2, GRADIENT_CHECKPOINTING=True, PRECISION='"bfloat16"')
    done = run(small)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ +\d+\.\d% .* calls$", done.stdout, flags=re.MULTILINE)) == 15
    for name in ("encoder_only", "decoder_only", "encoder_decoder"):
        assert json.loads((small.folder / "runs" / f"trace_{name}.json").read_text())["traceEvents"]
    memory = re.findall(r"([\d.]+) MiB without checkpointing, ([\d.]+) MiB with it", done.stdout)
    assert len(memory) == 3 and all(float(after) < float(before) for before, after in memory)


@pytest.mark.parametrize(
    "constants, words",
    [
        ({"PRECISION": "float8"}, "PRECISION='float8'"),
        ({"PRECISION": "float16"}, "needs a CUDA device"),
        ({"GRADIENT_CHECKPOINTING": 1}, "GRADIENT_CHECKPOINTING=1 is invalid"),
        ({"NUM_THREADS": "two"}, "NUM_THREADS='two'"),
        ({"MIN_LEARNING_RATE": 1.0}, "MIN_LEARNING_RATE=1.0"),
        ({"ACCUMULATION_STEPS": 0}, "ACCUMULATION_STEPS=0"),
        ({"RESUME_EVERY": 0}, "RESUME_EVERY=0"),
        ({"LABEL_SMOOTHING": 1.0}, "LABEL_SMOOTHING=1.0"),
        ({"WEIGHT_DECAY": -1}, "WEIGHT_DECAY=-1"),
        ({"NUM_EPOCHS": 1, "WARMUP_STEPS": 109}, "WARMUP_STEPS=109 leaves none of the 109 steps"),
        ({"NUM_HEADS": 3}, "NUM_HEADS=3"),
        ({"NUM_SAMPLES": 10**7}, "NUM_SAMPLES=10000000"),
    ],
)
def test_train_all_rejects_invalid_constants_before_any_training(
    monkeypatch, capsys, constants, words
):
    assert refused(train_all, monkeypatch, capsys, **constants).count(words) == 1


def test_micro_batches_that_cannot_be_shared_are_rejected(small):
    small.set("train_all", ACCUMULATION_STEPS=3)
    done = run(small, processes=2)
    assert (
        done.returncode != 0
        and "ACCUMULATION_STEPS=3 micro-batches cannot be shared evenly among 2" in done.stderr
    )


def test_same_bits_detects_different_weights(tmp_path):
    for number, folder in enumerate(("a", "b", "c")):
        for name in MODELS:
            torch.manual_seed(number == 2)
            MODELS[name](d_model=16, num_heads=2).save(
                tmp_path / folder / "checkpoints" / f"{name}.pt"
            )
    one, two, three = (weights(tmp_path / folder) for folder in ("a", "b", "c"))
    assert same_bits(one, two) and not same_bits(one, three)


# --- seeds, and the optimizer's arguments ------------------------------------------------
def test_every_micro_batch_and_epoch_has_its_own_seed(monkeypatch):
    seeds, orders = set(), set()
    for seed in (0, 1, 7, 2**63 - 1):
        monkeypatch.setattr(train_all, "SEED", seed)
        for step in range(60):
            for number in range(9):
                train_all.seed_micro_batch(step, number)
                seeds.add(torch.initial_seed())
        for epoch in range(20):
            orders.add(str(train_all.epoch_groups(40, epoch)))
    assert len(seeds) == 4 * 60 * 9 and len(orders) == 4 * 20


def test_the_optimizer_of_larger_models_uses_the_constants(monkeypatch):
    values = {"LEARNING_RATE": 0.04, "MIN_LEARNING_RATE": 0.01, "WARMUP_STEPS": 4}
    for name, value in {**values, "WEIGHT_DECAY": 0.25}.items():
        monkeypatch.setattr(train_all, name, value)
    model = MODELS["decoder_only"](d_model=16, num_heads=2)
    optimizer, scheduler = train_all.create_optimizer(model, 20)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.999)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [pytest.approx([0.01 * n] * 2) for n in (1, 2, 3, 4)]
    assert rates[-1] == pytest.approx([0.01] * 2)  # the lowest rate, not a product of two


def test_a_step_starts_from_gradients_of_zero():
    torch.manual_seed(0)
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=1).train()
    optimizer = KeepGradients(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms = [
        train_all.train_step(
            SCRIPTS["decoder_only"], model, ITEMS, [[0, 1]], 3, optimizer, scheduler, scaler
        )[1]
        for _ in range(2)
    ]
    assert norms[0] == pytest.approx(norms[1]) and scheduler.last_epoch == 2


def test_training_saves_on_schedule_and_records_each_epoch(monkeypatch, capsys):
    for name, value in {"NUM_EPOCHS": 2, "RESUME_EVERY": 3, "BATCH_SIZE": 35}.items():
        monkeypatch.setattr(train_all, name, value)
    model, state = new_training()
    loader, saves = create_dataloaders(100, 3, 10, 0)[1], []

    def save():
        saves.append((len(state.record["steps"]), state.epoch, state.group))

    train_all.train(SCRIPTS["decoder_only"], model, state, ITEMS, loader, save)
    # Five steps per epoch: a save after every third step, and after each epoch but the last.
    assert saves == [(3, 0, 3), (5, 1, 0), (6, 1, 1), (9, 1, 4)]
    assert (state.epoch, state.group) == (2, 0)
    result = SCRIPTS["decoder_only"].evaluate(model, loader)
    rows = state.record["history"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 5), (2, 10)]
    assert rows[1]["validation_loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert rows[1]["accuracy"] == pytest.approx(result["accuracy"])
    assert rows[1]["exact_match"] == result["exact_match"]
    printed = re.findall(r"epoch +(\d).*validation loss ([\d.]+)", capsys.readouterr().out)
    assert printed == [(str(row["epoch"]), f"{row['validation_loss']:.4f}") for row in rows]
    rates = [rate for _, rate, *_ in state.record["steps"]]
    assert rates == pytest.approx(
        [
            train_all.LEARNING_RATE
            * train_all.lr_factor(
                step,
                100,
                train_all.WARMUP_STEPS,
                train_all.MIN_LEARNING_RATE / train_all.LEARNING_RATE,
            )
            for step in range(10)
        ]
    )


def test_a_nan_loss_in_a_step_names_the_step():
    model, state = new_training()
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    optimizer, scheduler, scaler = (state.parts[n] for n in ("optimizer", "scheduler", "scaler"))
    with pytest.raises(ValueError, match="the loss became nan at step 7"):
        train_all.train_step(
            SCRIPTS["decoder_only"], model, ITEMS, [[0, 1]], 7, optimizer, scheduler, scaler
        )
