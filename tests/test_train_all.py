"""train_all.py: each technique does what it promises, and the best epoch is kept."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

import train_all
from conftest import (MODELS, SCRIPTS, finished, last_lines_as_promised, refused, run_of, table,
                      train_here)
from housekeeping import InputError
from toy_dataset import IGNORE_INDEX, NumberTranslationDataset, collate_fn

ITEMS = NumberTranslationDataset(300, 5, 0).items
CPU = torch.device("cpu")
NAMES = list(train_all.ARCHITECTURES)  # "encoder-only", ...
WRITERS = NAMES[1:]  # no random masks, so a batch always has the same loss


def script_of(name):
    return SCRIPTS[name.replace("-", "_")]


def step_of(name, items=ITEMS, step=0, draws=0, scale=None, model=None, **constants):
    """The gradients that one train_step gives to the optimizer, its loss, norm, and labels.

    Without clipping, if CLIP_NORM is not given. draws: how many random numbers are drawn before the
    step. scale: use a gradient scaler.
    """
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"D_MODEL": 12, "NUM_HEADS": 3, "NUM_LAYERS": 2, "D_FF": 20,
                           "BATCH_SIZE": 8, "CLIP_NORM": 1e9, **constants}.items():
            assert hasattr(train_all, key)
            patch.setattr(train_all, key, value)
        built, _, scaler = train_all.build(name, CPU, items)
        model = model or built
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.rand(draws)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss, norm, labels = train_all.train_step(script_of(name), model.train(), items, step,
                                                  optimizer, scaler)
    return {key: p.grad.clone() for key, p in model.named_parameters()}, loss, norm, labels


def assert_close(one, other, **tolerance):
    for key in one:
        torch.testing.assert_close(one[key], other[key], **tolerance, msg=key)


def length(gradients):
    return math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients.values()))


# --- the data of a step ---------------------------------------------------------------
@pytest.mark.parametrize("number, batch_size, accumulation, world", [
    (100, 8, 3, 1), (65, 32, 2, 2), (64, 16, 2, 1), (53, 5, 4, 2), (61, 3, 6, 3), (7, 1, 4, 4)])
def test_an_epoch_uses_no_sequence_twice(number, batch_size, accumulation, world, monkeypatch):
    """Only the left-overs are dropped, and every process has the same number of micro-batches."""
    for key, value in (("BATCH_SIZE", batch_size), ("ACCUMULATION_STEPS", accumulation),
                       ("WORLD", world)):
        monkeypatch.setattr(train_all, key, value)
    per_epoch, orders = train_all.steps_per_epoch(number), []
    assert per_epoch == number // (batch_size * accumulation) > 0
    for epoch in range(3):
        used = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            micro_batches = {}
            for rank in range(world):
                monkeypatch.setattr(train_all, "RANK", rank)
                mine = train_all.micro_batches(step, number)
                assert len(mine) == accumulation // world and not micro_batches.keys() & mine.keys()
                assert mine == train_all.micro_batches(step, number)
                micro_batches.update(mine)
            assert sorted(micro_batches) == list(range(accumulation))
            assert all(len(rows) == batch_size for rows in micro_batches.values())
            used += sum((micro_batches[key] for key in sorted(micro_batches)), [])
        assert len(set(used)) == len(used) == number - number % (batch_size * accumulation)
        assert set(used) <= set(range(number))
        orders.append(used)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_every_micro_batch_and_epoch_has_its_own_seed(monkeypatch):
    seeds, orders, weight = set(), set(), torch.nn.Linear(1, 1)
    monkeypatch.setattr(train_all, "BATCH_SIZE", 5)
    monkeypatch.setattr(train_all, "ACCUMULATION_STEPS", 3)

    class Script:
        @staticmethod
        def logits_and_labels(model, batch):
            seeds.add(torch.initial_seed())
            return model(torch.ones(2, 1, 1)), torch.zeros(2, 1, dtype=torch.long)

    optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
    for seed in (0, 1, 7, 2 ** 63 - 1):
        monkeypatch.setattr(train_all, "SEED", seed)
        for step in range(30):  # 2 per epoch
            train_all.train_step(Script, weight, ITEMS[:40], step, optimizer,
                                 torch.amp.GradScaler("cpu", enabled=False))
            orders.add(str(train_all.micro_batches(step - step % 2, 40)))
    assert len(seeds) == 4 * 30 * 3 and len(orders) == 4 * 15


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_does_not_depend_on_earlier_draws(name):
    one, other = (step_of(name, DROPOUT=0.2, draws=draws) for draws in (0, 77))
    assert one[1:] == other[1:] and all(one[0][key].equal(other[0][key]) for key in one[0])


# --- one step -------------------------------------------------------------------------
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("batch_size, accumulation", [(32, 1), (16, 2), (8, 4), (2, 16)])
def test_micro_batches_give_the_gradient_of_one_large_batch(name, batch_size, accumulation):
    # Short sequences first, so that the micro-batches differ as much as possible
    chosen = sorted(ITEMS[:32], key=lambda item: len(item["digits"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_all, "BATCH_SIZE", 32)
        patch.setattr(train_all, "ACCUMULATION_STEPS", 1)
        order = train_all.micro_batches(0, 32)[0]
    items = [item for _, item in sorted(zip(order, chosen), key=lambda pair: pair[0])]
    model = MODELS[name.replace("-", "_")](26, 12, 3, 2, 20)
    expected = script_of(name).compute_loss(model, collate_fn(items))
    expected.backward()
    whole = {key: p.grad.clone() for key, p in model.named_parameters()}
    gradients, loss, norm, labels = step_of(
        name, items, model=model, BATCH_SIZE=batch_size, ACCUMULATION_STEPS=accumulation)
    assert labels == sum(len(item["words"]) + 1 for item in items)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert norm == pytest.approx(length(whole), rel=1e-5)
    assert_close(gradients, whole, atol=1e-6, rtol=0)


def test_a_step_starts_from_gradients_of_zero():
    model = MODELS["decoder_only"](26, 12, 3, 2, 20)
    (one, _, norm, _), (other, _, again, _) = (step_of("decoder-only", model=model)
                                               for _ in range(2))
    assert norm == pytest.approx(again) and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_clipping_shortens_the_unscaled_gradient_and_keeps_its_direction(scale):
    """With a scaler, gradients are a thousand times too large until they are unscaled."""
    free, _, norm, _ = step_of("decoder-only")
    clipped, _, recorded, _ = step_of("decoder-only", CLIP_NORM=norm / 10, scale=scale)
    assert recorded == pytest.approx(norm, rel=1e-5)  # before clipping
    assert [length(free), length(clipped)] == pytest.approx([norm, norm / 10], rel=1e-5)
    assert_close({key: 10 * g for key, g in clipped.items()}, free, atol=1e-6, rtol=1e-4)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    model = MODELS["decoder_only"](26, 12, 3, 2, 20)
    logits, labels = SCRIPTS["decoder_only"].logits_and_labels(model, collate_fn(ITEMS[:6]))
    log_p = logits[labels != IGNORE_INDEX].log_softmax(-1)
    expected = 0.9 * F.nll_loss(log_p, labels[labels != IGNORE_INDEX]) - 0.1 * log_p.mean()
    loss = step_of("decoder-only", ITEMS[:6], model=model, BATCH_SIZE=3, LABEL_SMOOTHING=0.1)[1]
    assert loss == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_the_same_step_within_its_precision(name, precision):
    exact, loss, norm, _ = step_of(name)
    rough, rough_loss, rough_norm, _ = step_of(name, PRECISION=precision)
    assert rough_loss == pytest.approx(loss, rel=0.02) and rough_loss != loss
    assert rough_norm == pytest.approx(norm, rel=0.1)
    cosine = sum((exact[key] * rough[key]).sum().item() for key in exact) / norm / rough_norm
    assert cosine > 0.99 and {g.dtype for g in rough.values()} == {torch.float32}


def test_the_loss_of_bfloat16_logits_is_summed_in_float32():
    model = MODELS["decoder_only"](26, 12, 3, 2, 20)
    loss = step_of("decoder-only", ITEMS[:40], model=model, BATCH_SIZE=20, PRECISION="bfloat16")[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits, labels = SCRIPTS["decoder_only"].logits_and_labels(model, collate_fn(ITEMS[:40]))
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-4)  # bfloat16 has 3 digits


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    """On a CPU; PRECISION = "float16" uses the same scaler."""
    model = MODELS["decoder_only"](26, 12, 3, 2, 20)
    model.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = [p.detach().clone() for p in model.parameters()]
    train_all.train_step(SCRIPTS["decoder_only"], model, ITEMS, 3, optimizer, scaler)
    assert all(map(torch.equal, before, model.parameters())) and scaler.get_scale() == 32.0


@pytest.mark.parametrize("where", ["loss", "gradient norm", "validation loss"])
def test_nan_stops_training_before_anything_is_overwritten(where, tmp_path, monkeypatch):
    """The loss or gradient of step 4 (of 6), or the loss at the end of the first epoch (step 2)."""
    script, checkpoint = SCRIPTS["decoder_only"], tmp_path / "checkpoints" / "decoder_only.pt"
    train_here(monkeypatch, tmp_path, "decoder-only", RESUME_EVERY=1, ACCUMULATION_STEPS=2,
               BATCH_SIZE=20)
    model = MODELS["decoder_only"](26, 12, 3)
    model.save(checkpoint)
    files = [checkpoint, tmp_path / "runs" / "unfinished.pt"]
    original, calls, before = script.logits_and_labels, [], []

    def broken(model, batch):
        logits, labels = original(model, batch)
        assert model.training == logits.requires_grad
        calls.append(1)
        if (where == "validation loss" and not model.training) or (
                where != "validation loss" and sum(calls) == 2 * 4 + 2):  # one is an evaluation
            before[:] = [file.read_bytes() for file in files]
            if where == "gradient norm":
                logits.register_hook(lambda gradient: gradient * math.nan)
            else:
                logits = logits * math.nan
        return logits, labels

    monkeypatch.setattr(script, "logits_and_labels", broken)
    step = 2 if where == "validation loss" else 4
    with pytest.raises(InputError, match=f"the {where} became nan at step {step}: "):
        train_all.main()
    assert [file.read_bytes() for file in files] == before


# --- model and optimizer --------------------------------------------------------------
def test_only_matrices_decay_by_weight_decay(monkeypatch):
    monkeypatch.setattr(train_all, "WEIGHT_DECAY", 0.5)
    monkeypatch.setattr(train_all, "LEARNING_RATE", 0.04)
    model, optimizer, _ = train_all.build("decoder-only", CPU, ITEMS)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
            p.grad = torch.zeros_like(p)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.999)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p, before[key] * (1 - 0.04 * 0.5 if p.dim() > 1 else 1))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients_for_less_memory(name, capsys):
    one, other = (step_of(name, GRADIENT_CHECKPOINTING=on, DROPOUT=0.1, NUM_LAYERS=4, D_FF=64)
                  for on in (False, True))
    assert one[1:] == other[1:] and all(one[0][key].equal(other[0][key]) for key in one[0])
    printed = capsys.readouterr().out
    before, after = map(float, re.search(
        r"([\d.]+) MiB without checkpointing, ([\d.]+) MiB with it", printed).groups())
    assert printed.count("MiB without") == 1 and 0 < after < before / 2


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_gives_the_same_step_and_runs_if_chosen(name, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    written_out = step_of(name, FUSED_ATTENTION=False, DROPOUT=0.0)
    assert not calls
    fused = step_of(name, FUSED_ATTENTION=True, DROPOUT=0.0)
    assert len(calls) == train_all.ACCUMULATION_STEPS * (6 if name == "encoder-decoder" else 2)
    assert_close(fused[0], written_out[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_gives_the_same_step(name, monkeypatch):
    steps = []
    for compiled in (False, True):
        monkeypatch.setattr(train_all, "COMPILE", compiled)
        try:
            train_all.check_run()
        except InputError as error:
            assert "COMPILE=True does not work here" in str(error)
            pytest.skip("this machine has no compiler")
        steps.append(step_of(name, COMPILE=compiled))
        model = train_all.build(name, CPU, ITEMS)[0]
        assert (model._compiled_call_impl is not None) == compiled
    assert steps[0][1:] == pytest.approx(steps[1][1:], rel=1e-4)
    assert_close(*(gradients for gradients, *_ in steps), atol=1e-6, rtol=1e-3)


# --- epochs and files -----------------------------------------------------------------
def test_the_saved_model_is_that_of_the_best_epoch(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "decoder-only", NUM_EPOCHS=4)
    scores, weights = iter([0.5, 0.9, 0.9, 0.2]), []  # the second 0.9 has the lower loss

    def evaluate(model, loader):
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"loss": 1 - len(weights) / 10, "accuracy": 0.5, "exact_match": next(scores)}

    monkeypatch.setattr(SCRIPTS["decoder_only"], "evaluate", evaluate)
    train_all.main()
    kept = MODELS["decoder_only"].load(tmp_path / "checkpoints" / "decoder_only.pt").state_dict()
    same = [all(kept[key].equal(one[key]) for key in kept) for one in weights]
    assert same == [False, False, True, False]


def test_only_held_out_sequences_choose_the_best_epoch(tmp_path, monkeypatch):
    train_here(monkeypatch, tmp_path, "decoder-only", SEED=3)
    trained, scored, script = [], [], SCRIPTS["decoder_only"]
    monkeypatch.setattr(train_all, "collate_fn", lambda items: trained.extend(
        " ".join(item["digits"]) for item in items) or collate_fn(items))
    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda model, loader: scored.append(
        [" ".join(item["digits"]) for item in loader.dataset]) or evaluate(model, loader))
    train_all.main()
    dataset = NumberTranslationDataset(150, 3, 3)
    training, held_out = ({" ".join(dataset.items[i]["digits"]) for i in part}
                          for part in dataset.split(0.2))
    assert len(scored) == 2 and all(set(digits) == held_out for digits in scored)
    assert set(trained) <= training and len(trained) == 2 * 3 * 40 and not training & held_out


def test_the_files_of_a_run_hold_what_happened(tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path, *WRITERS, LEARNING_RATE=0.04, MIN_LEARNING_RATE=0.01)
    taken, results = [], []
    train_step = train_all.train_step
    monkeypatch.setattr(train_all, "train_step", lambda *args: taken.append(train_step(*args))
                        or taken[-1])
    for name in WRITERS:
        monkeypatch.setattr(script_of(name), "evaluate", lambda *args, evaluate=script_of(
            name).evaluate: results.append(evaluate(*args)) or results[-1])
    train_all.main()
    steps, epochs = (table(tmp_path / "runs" / f"{file}.csv") for file in ("steps", "history"))
    cosine = [0.01 + 0.03 * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(4)]
    assert [float(s["learning_rate"]) for s in steps] == pytest.approx([0.02, 0.04, *cosine] * 2)
    assert [(s["architecture"], int(s["step"])) for s in steps] == [
        (name, step) for name in WRITERS for step in range(6)]
    columns = ("loss", "gradient_norm", "labels")
    assert [tuple(float(s[column]) for column in columns) for s in steps] == taken
    assert [(e["architecture"], int(e["epoch"]), int(e["step"])) for e in epochs] == [
        (name, epoch, 3 * epoch) for name in WRITERS for epoch in (1, 2)]
    for number, (row, result) in enumerate(zip(epochs, results)):
        assert [float(row[key]) for key in ("validation_loss", "accuracy", "exact_match")] == [
            result[key] for key in ("loss", "accuracy", "exact_match")]
        three = taken[3 * number:3 * number + 3]  # the loss is a mean over labels, not over steps
        mean = sum(loss * labels for loss, _, labels in three) / sum(s[2] for s in three)
        assert float(row["train_loss"]) == pytest.approx(mean)
        assert float(row["gradient_norm"]) == pytest.approx(sum(s[1] for s in three) / 3)
    printed = re.findall(r"epoch +(\d).*validation loss ([\d.]+)", capsys.readouterr().out)
    assert printed == [(row["epoch"], f"{float(row['validation_loss']):.4f}") for row in epochs]


def test_the_log_shows_the_last_runs_and_what_changed(tmp_path, monkeypatch, capsys):
    for rate in (0.001, 0.001, 0.004):
        train_here(monkeypatch, tmp_path, "decoder-only", LEARNING_RATE=rate)
        train_all.main()
    rows = capsys.readouterr().out.split("of the last runs")[-1].split("\n\n")[0].splitlines()[2:]
    assert [row.split(maxsplit=2)[2] for row in rows] == [
        "LEARNING_RATE 0.004 was 0.001"] * 2 + [rows[2].split(maxsplit=2)[2]]
    assert "LEARNING_RATE" not in rows[2]
    log = [json.loads(line) for line in (tmp_path / "runs" / "log.jsonl").read_text().splitlines()]
    assert [run["settings"]["LEARNING_RATE"] for run in log] == [0.001, 0.001, 0.004]
    epochs = table(tmp_path / "runs" / "history.csv")
    assert log[-1]["exact_match"] == {"decoder-only": max(float(e["exact_match"]) for e in epochs)}


@pytest.mark.parametrize("content", ['{"torn', "\x00\x01 noise", '{"settings": {}}', "5", None])
def test_a_damaged_log_costs_one_warning(content, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path, "decoder-only")
    log = tmp_path / "runs" / "log.jsonl"
    log.parent.mkdir()
    log.mkdir() if content is None else log.write_text(content)
    train_all.main()
    printed = capsys.readouterr().out
    assert printed.count("warning: runs/log.jsonl cannot be read") == 1
    assert content is None or log.read_text() == content
    assert "exact match, best epoch" in printed and not (tmp_path / "runs/unfinished.pt").exists()


def test_the_profiler_shows_the_chosen_number_of_steps(tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path, *WRITERS, PROFILE_STEPS=3, GRADIENT_CHECKPOINTING=True,
               PRECISION="bfloat16")  # together, because they change the same functions
    profile, seen = torch.profiler.profile, []
    averages = profile.key_averages
    monkeypatch.setattr(profile, "key_averages", lambda *args: seen.append(averages(*args))
                        or seen[-1])
    train_all.main()
    tables = re.findall(r"# of Calls *\n-[- ]+\n(.*?)\n-[- ]+\n", capsys.readouterr().out, re.S)
    assert [len(rows.splitlines()) for rows in tables] == [5, 5]
    assert [row.count for rows in seen for row in rows if "Optimizer.step" in row.key] == [3, 3]


# --- mistakes, processes, and devices -------------------------------------------------
@pytest.mark.parametrize("constants, words", [
    ({"PRECISION": "float8"}, "PRECISION='float8'"),
    ({"GRADIENT_CHECKPOINTING": 1}, "GRADIENT_CHECKPOINTING=1"),
    ({"NUM_THREADS": "two"}, "NUM_THREADS='two'"),
    ({"LEARNING_RATE": 0.1, "MIN_LEARNING_RATE": 0.2}, "MIN_LEARNING_RATE=0.2 is above"),
    ({"ACCUMULATION_STEPS": 0}, "ACCUMULATION_STEPS=0"), ({"RESUME_EVERY": 0}, "RESUME_EVERY=0"),
    ({"ACCUMULATION_STEPS": 3, "WORLD": 2}, "=3 micro-batches cannot be shared evenly among 2"),
    ({"LABEL_SMOOTHING": 1.0}, "LABEL_SMOOTHING=1.0"), ({"WEIGHT_DECAY": -1}, "WEIGHT_DECAY=-1"),
    ({"NUM_HEADS": 5}, "NUM_HEADS=5"), ({"DEVICE": "x"}, "DEVICE='x'"),
    ({"WARMUP_STEPS": 6}, "WARMUP_STEPS=6 takes all of the 6 steps"),
    ({"BATCH_SIZE": 40}, "takes all of the 0 steps"),  # not enough for one step
    ({"NUM_SAMPLES": 10 ** 7}, "NUM_SAMPLES=10000000")])
def test_train_all_rejects_invalid_constants_before_any_training(
        constants, words, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path)
    assert refused(train_all, monkeypatch, capsys, **constants).count(words) == 1
    monkeypatch.setattr(train_all, "RANK", 1)
    with pytest.raises(SystemExit):
        train_all.main()
    assert capsys.readouterr() == ("", "")  # only the first process prints the message


def test_a_missing_compiler_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long traceback")

    train_here(monkeypatch, tmp_path)
    monkeypatch.setattr(torch, "compile", no_compiler)
    line = refused(train_all, monkeypatch, capsys, COMPILE=True)
    assert line.startswith("error: COMPILE=True does not work here (RuntimeError)")


def test_each_process_uses_the_gpu_of_its_local_rank(monkeypatch):
    """Without a GPU: process 5 of 6 is the second one on its machine."""
    chosen = []
    monkeypatch.setattr(train_all, "prepare", lambda constants: torch.device("cuda", 0))
    monkeypatch.setattr(train_all, "RANK", 5)
    monkeypatch.setattr(train_all, "WORLD", 6)
    monkeypatch.setattr(train_all, "ACCUMULATION_STEPS", 6)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_all.check_run() == torch.device("cuda", 1) and chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize("script", ["train_all"], ids=run_of)
def test_a_full_run_reaches_its_documented_results(script):
    workplace, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in NAMES:
        rows = re.findall(rf"(?m)^{name} +[\d,]+ +[\d.]+ +([\d.]+)%$", done.stdout)
        assert len(rows) == 1 and float(rows[0]) >= 99.9
    assert last_lines_as_promised("train_all", done.stdout)
    assert len(table(workplace.folder / "runs" / "history.csv")) == 3 * train_all.NUM_EPOCHS
    assert not (workplace.folder / "runs" / "unfinished.pt").exists()
