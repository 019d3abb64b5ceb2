"""train_all.py: each technique does what it promises, and the best epoch is kept."""
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_all
from conftest import finished, last_lines_as_promised, refused, run_of, table, train_here
from housekeeping import InputError
from toy_dataset import IGNORE_INDEX, NumberTranslationDataset, collate_fn
from training import activation_bytes, checkpoint_layers

ITEMS = NumberTranslationDataset(300, 5, 0).items
CPU = torch.device("cpu")
NAMES = list(train_all.ARCHITECTURES)  # "encoder-only", ...
WRITERS = NAMES[1:]  # no random masks, so a batch always has the same loss
SCRIPTS, CLASSES = ({name: row[i] for name, row in train_all.ARCHITECTURES.items()} for i in (0, 1))
DECODER_ONLY = SCRIPTS["decoder-only"]


def new_model(name="decoder-only"):
    return CLASSES[name](26, d_model=12, num_heads=3, num_layers=2, d_ff=20)


def set_constants(patch, **constants):
    for name, value in constants.items():
        patch.setattr(train_all, name, value)


def recorded(patch, owner, name):
    """Return a list that gets (arguments, result) of each call of a function."""
    calls, original = [], getattr(owner, name)

    def call(*args, **options):
        calls.append((args, original(*args, **options)))
        return calls[-1][1]

    patch.setattr(owner, name, call)
    return calls


def step_of(name="decoder-only", items=ITEMS, model=None, draws=0, scale=None, **constants):
    """Return the gradients that train_step gives to the optimizer, its loss, norm, and labels.

    It does not clip by default. draws: random numbers drawn before it. scale: of a scaler.
    """
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, **{"D_MODEL": 12, "NUM_HEADS": 3, "NUM_LAYERS": 2, "D_FF": 20,
                                "BATCH_SIZE": 8, "CLIP_NORM": 1e9, **constants})
        built, _, scaler = train_all.build(name, CPU)
        model = model or built
        torch.rand(draws)
        loss, norm, labels = train_all.train_step(
            SCRIPTS[name], model.train(), items, 0, torch.optim.SGD(model.parameters(), lr=0.0),
            torch.amp.GradScaler("cpu", init_scale=scale) if scale else scaler)
    return {key: p.grad.clone() for key, p in model.named_parameters()}, loss, norm, labels


def assert_close(one, other, **tolerance):
    for key in one:
        torch.testing.assert_close(one[key], other[key], **tolerance, msg=key)


def assert_equal(one, other):
    assert one[1:] == other[1:] and all(one[0][key].equal(other[0][key]) for key in one[0])


def length(gradients):
    return math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients.values()))


# --- the data of a step ---------------------------------------------------------------
@pytest.mark.parametrize("number, batch_size, accumulation, world", [
    (100, 8, 3, 1), (65, 32, 2, 2), (64, 16, 2, 1), (53, 5, 4, 2), (61, 3, 6, 3), (7, 1, 4, 4)])
def test_an_epoch_uses_no_sequence_twice(number, batch_size, accumulation, world, monkeypatch):
    """Only the left-overs are dropped, and every process has the same number of micro-batches."""
    set_constants(monkeypatch, BATCH_SIZE=batch_size, ACCUMULATION_STEPS=accumulation, WORLD=world)
    per_epoch, orders = number // (batch_size * accumulation), []
    for epoch in range(3):
        used = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            numbers = []
            for rank in range(world):
                set_constants(monkeypatch, RANK=rank)
                mine = train_all.micro_batches(step, number)
                assert len(mine) == accumulation // world
                assert {len(rows) for rows in mine.values()} == {batch_size}
                numbers += mine
                used += sum(mine.values(), [])
            assert sorted(numbers) == list(range(accumulation))
        assert set(used) <= set(range(number)) and len(set(used)) == len(used)
        assert number - len(used) == number % (batch_size * accumulation)
        orders.append(used)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_every_micro_batch_and_epoch_has_its_own_seed(monkeypatch):
    seeds, orders, model = [], set(), torch.nn.Linear(1, 1)
    script = SimpleNamespace(logits_and_labels=lambda model, batch: seeds.append(
        torch.initial_seed()) or (model(torch.ones(2, 1, 1)), torch.zeros(2, 1).long()))
    set_constants(monkeypatch, BATCH_SIZE=5, ACCUMULATION_STEPS=3)
    for seed in (0, 1, 7, 2 ** 63 - 1):
        set_constants(monkeypatch, SEED=seed)
        for step in range(20):  # 2 per epoch
            train_all.train_step(script, model, ITEMS[:40], step,
                                 torch.optim.SGD(model.parameters(), lr=0.0),
                                 torch.amp.GradScaler("cpu", enabled=False))
            orders.add(str(train_all.micro_batches(step - step % 2, 40)))
    assert len(set(seeds)) == len(seeds) == 4 * 20 * 3 and len(orders) == 4 * 10


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_does_not_depend_on_earlier_draws(name):
    assert_equal(*(step_of(name, DROPOUT=0.2, draws=draws) for draws in (0, 77)))


# --- one step -------------------------------------------------------------------------
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("batch_size, accumulation", [(32, 1), (16, 2), (8, 4), (2, 16)])
def test_micro_batches_give_the_gradient_of_one_large_batch(name, batch_size, accumulation,
                                                            monkeypatch):
    # Short sequences come first in the step, so that the micro-batches differ much in labels.
    set_constants(monkeypatch, BATCH_SIZE=32, ACCUMULATION_STEPS=1)
    order, items = train_all.micro_batches(0, 32)[0], [None] * 32
    for place, item in zip(order, sorted(ITEMS[:32], key=lambda item: len(item["digits"]))):
        items[place] = item
    model = new_model(name)
    expected = SCRIPTS[name].compute_loss(model, collate_fn(items))
    expected.backward()  # a step must start from gradients of zero
    whole = {key: p.grad.clone() for key, p in model.named_parameters()}
    gradients, loss, norm, labels = step_of(name, items, model, BATCH_SIZE=batch_size,
                                            ACCUMULATION_STEPS=accumulation)
    assert labels == sum(len(item["words"]) + 1 for item in items)
    assert [loss, norm] == pytest.approx([expected.item(), length(whole)], rel=1e-5)
    assert_close(gradients, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_clipping_shortens_the_unscaled_gradient_and_keeps_its_direction(scale):
    """With a scaler, gradients are a thousand times too large until they are unscaled."""
    free, _, norm, _ = step_of()
    clipped, _, recorded, _ = step_of(CLIP_NORM=norm / 10, scale=scale)
    assert recorded == pytest.approx(norm, rel=1e-5)  # before clipping
    assert [length(free), length(clipped)] == pytest.approx([norm, norm / 10], rel=1e-5)
    assert_close({key: 10 * g for key, g in clipped.items()}, free, atol=1e-6, rtol=1e-4)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    model = new_model()
    logits, labels = DECODER_ONLY.logits_and_labels(model, collate_fn(ITEMS[:6]))
    log_p = logits[labels != IGNORE_INDEX].log_softmax(-1)
    expected = 0.9 * F.nll_loss(log_p, labels[labels != IGNORE_INDEX]) - 0.1 * log_p.mean()
    loss = step_of(items=ITEMS[:6], model=model, BATCH_SIZE=3, LABEL_SMOOTHING=0.1)[1]
    assert loss == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_the_same_step_within_its_precision(name, precision):
    exact, loss, norm, _ = step_of(name)
    rough, rough_loss, rough_norm, _ = step_of(name, PRECISION=precision)
    assert rough_loss == pytest.approx(loss, rel=6e-5) and rough_loss != loss  # a float32 sum
    assert rough_norm == pytest.approx(norm, rel=0.01)
    cosine = sum((exact[key] * rough[key]).sum().item() for key in exact) / norm / rough_norm
    assert cosine > 0.999 and {g.dtype for g in rough.values()} == {torch.float32}


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    model, scaler = new_model(), torch.amp.GradScaler("cpu", init_scale=64.0)
    model.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    train_all.train_step(DECODER_ONLY, model, ITEMS, 3,
                         torch.optim.SGD(model.parameters(), lr=1.0), scaler)
    assert all(map(torch.equal, before, model.parameters())) and scaler.get_scale() == 32.0


@pytest.mark.parametrize("what, where", [
    ("loss", "at step 4"), ("gradient norm", "at step 4"), ("loss", "on held-out sequences")])
def test_nan_stops_training_before_anything_is_overwritten(what, where, tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "decoder-only", RESUME_EVERY=1, ACCUMULATION_STEPS=1,
               BATCH_SIZE=40)
    files = [tmp_path / "checkpoints" / "decoder_only.pt", tmp_path / "runs" / "unfinished.pt"]
    new_model().save(files[0])
    original, in_training, before = DECODER_ONLY.logits_and_labels, [], []

    def broken(model, batch):
        logits, labels = original(model, batch)
        assert model.training == logits.requires_grad
        in_training.append(model.training)
        wanted = (5, True) if where == "at step 4" else (6, False)
        if (sum(in_training), model.training) == wanted:
            before[:] = [file.read_bytes() for file in files]
            if what != "gradient norm":
                return logits * math.nan, labels
            logits.register_hook(lambda gradient: gradient * math.nan)
        return logits, labels

    monkeypatch.setattr(DECODER_ONLY, "logits_and_labels", broken)
    with pytest.raises(InputError, match=f"the {what} became nan {where}: "):
        train_all.main()
    assert [file.read_bytes() for file in files] == before


# --- model and optimizer --------------------------------------------------------------
def test_only_matrices_decay_by_weight_decay(monkeypatch):
    set_constants(monkeypatch, WEIGHT_DECAY=0.5, LEARNING_RATE=0.04)
    model, optimizer, _ = train_all.build("decoder-only", CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p)
        p.grad = torch.zeros_like(p)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.999)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p, before[key] * (1 - 0.04 * 0.5 if p.dim() > 1 else 1))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients_for_less_memory(name):
    assert_equal(*(step_of(name, GRADIENT_CHECKPOINTING=on, DROPOUT=0.1, NUM_LAYERS=4, D_FF=64)
                   for on in (False, True)))
    script, model_class, _ = train_all.ARCHITECTURES[name]
    model, batch = model_class(d_model=24, num_heads=3, num_layers=4, d_ff=64), collate_fn(ITEMS)
    before = activation_bytes(script, model, batch)
    assert 0 < activation_bytes(script, checkpoint_layers(model), batch) < before / 2


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_gives_the_same_step_and_runs_if_chosen(name, monkeypatch):
    calls = recorded(monkeypatch, F, "scaled_dot_product_attention")
    written_out = step_of(name, FUSED_ATTENTION=False)
    assert not calls
    fused = step_of(name, FUSED_ATTENTION=True)
    assert len(calls) == train_all.ACCUMULATION_STEPS * (6 if name == "encoder-decoder" else 2)
    assert_close(fused[0], written_out[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_gives_the_same_step(name, monkeypatch):
    set_constants(monkeypatch, COMPILE=True)
    try:
        train_all.check_run()
    except InputError as error:
        assert "COMPILE=True does not work here" in str(error)
        pytest.skip("this machine has no compiler")
    assert train_all.build(name, CPU)[0]._compiled_call_impl is not None
    compiled, plain = (step_of(name, COMPILE=on, NUM_LAYERS=1) for on in (True, False))
    assert compiled[1:] == pytest.approx(plain[1:], rel=1e-4)
    assert_close(compiled[0], plain[0], atol=1e-6, rtol=1e-3)


# --- epochs and files -----------------------------------------------------------------
def test_the_saved_model_is_that_of_the_best_epoch(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "decoder-only", NUM_EPOCHS=4)
    scores, weights = iter([0.5, 0.9, 0.9, 0.2]), []  # the second 0.9 has the lower loss

    def evaluate(model, loader):
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"loss": 1 - len(weights) / 10, "accuracy": 0.5, "exact_match": next(scores)}

    monkeypatch.setattr(DECODER_ONLY, "evaluate", evaluate)
    train_all.main()
    kept = CLASSES["decoder-only"].load(tmp_path / "checkpoints" / "decoder_only.pt").state_dict()
    same = [all(kept[key].equal(one[key]) for key in kept) for one in weights]
    assert same == [False, False, True, False]


def test_only_held_out_sequences_choose_the_best_epoch(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "decoder-only", SEED=3)
    batches = recorded(monkeypatch, train_all, "collate_fn")
    evaluations = recorded(monkeypatch, DECODER_ONLY, "evaluate")
    train_all.main()
    dataset = NumberTranslationDataset(150, 3, 3)
    training, held_out = ([dataset.items[i] for i in part] for part in dataset.split(0.2))
    assert [list(loader.dataset) for (_, loader), _ in evaluations] == [held_out, held_out]
    trained = [item for (items,), _ in batches for item in items]
    assert all(item in training and item not in held_out for item in trained)
    assert len(trained) == 2 * 3 * 40


def test_the_files_of_a_run_hold_what_happened(tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path, *WRITERS, LEARNING_RATE=0.04, MIN_LEARNING_RATE=0.01)
    results = [recorded(monkeypatch, SCRIPTS[name], "evaluate") for name in WRITERS]
    taken = recorded(monkeypatch, train_all, "train_step")
    train_all.main()
    taken = [result for _, result in taken]
    steps, epochs = (table(tmp_path / "runs" / f"{file}.csv") for file in ("steps", "history"))
    cosine = [0.01 + 0.03 * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(4)]
    assert [float(s["learning_rate"]) for s in steps] == pytest.approx([0.02, 0.04, *cosine] * 2)
    assert [(s["architecture"], s["step"]) for s in steps] == [
        (name, str(step)) for name in WRITERS for step in range(6)]
    assert [(float(s["loss"]), float(s["gradient_norm"]), int(s["labels"])) for s in steps] == taken
    assert [(e["architecture"], e["epoch"], e["step"]) for e in epochs] == [
        (name, str(epoch), str(3 * epoch)) for name in WRITERS for epoch in (1, 2)]
    for number, (row, (_, result)) in enumerate(zip(epochs, sum(results, []))):
        losses, norms, labels = zip(*taken[3 * number:3 * number + 3])
        mean = sum(loss * n for loss, n in zip(losses, labels)) / sum(labels)  # not over steps
        assert [float(value) for value in list(row.values())[3:]] == pytest.approx(
            [mean, sum(norms) / 3, result["loss"], result["accuracy"], result["exact_match"]])
    printed = re.findall(r"epoch +(\d).*validation loss ([\d.]+)", capsys.readouterr().out)
    assert printed == [(row["epoch"], f"{float(row['validation_loss']):.4f}") for row in epochs]


def test_the_log_shows_the_last_runs_and_what_changed(tmp_path, monkeypatch, capsys):
    for rate in (0.001, 0.001, 0.004):
        train_here(monkeypatch, tmp_path, "decoder-only", LEARNING_RATE=rate)
        train_all.main()
    shown = capsys.readouterr().out.split("of the last runs")[-1].split("\n\n")[0]
    changes = [row.split(maxsplit=2)[2] for row in shown.splitlines()[2:]]
    assert changes[:2] == ["LEARNING_RATE 0.004 was 0.001"] * 2 and "RATE" not in changes[2]
    log = [json.loads(line) for line in (tmp_path / "runs" / "log.jsonl").read_text().splitlines()]
    assert [run["settings"]["LEARNING_RATE"] for run in log] == [0.001, 0.001, 0.004]
    epochs = table(tmp_path / "runs" / "history.csv")
    assert log[-1]["exact_match"] == {"decoder-only": max(float(e["exact_match"]) for e in epochs)}


@pytest.mark.parametrize("content", ['{"torn', "\x00\x01 noise", '{"settings": {}}', "5", None])
def test_a_damaged_log_costs_one_warning(content, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path, "decoder-only")
    log = tmp_path / "runs" / "log.jsonl"
    (log if content is None else log.parent).mkdir(parents=True)
    if content:
        log.write_text(content)
    train_all.main()
    printed = capsys.readouterr().out
    assert printed.count("warning: runs/log.jsonl cannot be read") == 1
    assert content is None or log.read_text() == content
    assert "exact match, best epoch" in printed and not (tmp_path / "runs/unfinished.pt").exists()


def test_the_profiler_shows_the_chosen_number_of_steps(tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path, "decoder-only", PROFILE_STEPS=3, GRADIENT_CHECKPOINTING=True)
    seen = recorded(monkeypatch, torch.profiler.profile, "key_averages")
    train_all.main()
    shown, = re.findall(r"# of Calls *\n-[- ]+\n(.*?)\n-[- ]+\n", capsys.readouterr().out, re.S)
    assert len(shown.splitlines()) == 5
    assert [row.count for row in seen[0][1] if "Optimizer.step" in row.key] == [3]


# --- mistakes, processes, and devices -------------------------------------------------
@pytest.mark.parametrize("constants, words", [
    ({"PRECISION": "float8"}, "PRECISION='float8'"), ({"SEED": -1}, "SEED=-1"),
    ({"GRADIENT_CHECKPOINTING": 1}, "GRADIENT_CHECKPOINTING=1"), ({"DEVICE": "x"}, "DEVICE='x'"),
    ({"NUM_THREADS": "two"}, "NUM_THREADS='two'"), ({"NUM_HEADS": 5}, "NUM_HEADS=5"),
    ({"LEARNING_RATE": 0.1, "MIN_LEARNING_RATE": 0.2}, "MIN_LEARNING_RATE=0.2 is above"),
    ({"ACCUMULATION_STEPS": 0}, "ACCUMULATION_STEPS=0"), ({"RESUME_EVERY": 0}, "RESUME_EVERY=0"),
    ({"LABEL_SMOOTHING": 1.0}, "LABEL_SMOOTHING=1.0"), ({"WEIGHT_DECAY": -1}, "WEIGHT_DECAY=-1"),
    ({"ACCUMULATION_STEPS": 3, "WORLD": 2}, "=3 micro-batches cannot be shared evenly among 2")])
def test_train_all_rejects_invalid_constants_in_one_line(constants, words, tmp_path, monkeypatch,
                                                         capsys):
    train_here(monkeypatch, tmp_path)
    monkeypatch.setattr(torch, "compile", None)  # as good as no compiler
    assert refused(train_all, monkeypatch, capsys, **constants).count(words) == 1
    set_constants(monkeypatch, RANK=1)
    with pytest.raises(SystemExit):
        train_all.main()
    assert capsys.readouterr() == ("", "")  # only the first process prints the message


@pytest.mark.parametrize("constants, words", [
    ({"WARMUP_STEPS": 6}, "WARMUP_STEPS=6 takes all of the 6 steps"),
    ({"BATCH_SIZE": 40}, "takes all of the 0 steps"),  # too large for a single step
    ({"NUM_SAMPLES": 10 ** 7}, "NUM_SAMPLES=10000000")])
def test_constants_that_leave_no_training_are_rejected(constants, words, tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, **constants)
    with pytest.raises(InputError, match=words):
        train_all.main()


def test_each_process_uses_the_gpu_of_its_local_rank(monkeypatch):
    """Without a GPU: process 5 of 6 is the second one on its machine."""
    chosen = []
    set_constants(monkeypatch, RANK=5, WORLD=6, ACCUMULATION_STEPS=6)
    monkeypatch.setattr(train_all, "prepare", lambda constants: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [train_all.check_run()] == chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize("script", ["train_all"], ids=run_of)
def test_a_full_run_reaches_its_documented_results(script):
    workplace, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in NAMES:
        rows = re.findall(rf"(?m)^{name} +[\d,]+ +[\d.]+ +([\d.]+)%$", done.stdout)
        assert len(rows) == 1 and float(rows[0]) >= 99.9
    assert last_lines_as_promised("train_all", done.stdout)
    assert len(table(workplace.folder / "runs" / "history.csv")) == 3 * train_all.NUM_EPOCHS
