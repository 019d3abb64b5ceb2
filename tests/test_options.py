"""Every option does something, in the right direction, and is passed on unchanged."""

import inspect
import sys
from unittest.mock import patch

import pytest
import torch

import bookkeeping
import encoder_only
import housekeeping
import quick_start
import train_all
from conftest import MODELS, SCRIPTS, random_model
from toy_dataset import (
    IGNORE_INDEX,
    MASK,
    VOCABULARY,
    NumberTranslationDataset,
    collate_fn,
    create_dataloaders,
    make_item,
)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


# --- training --------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_optimizer_uses_the_arguments_it_is_given(name):
    script, model = SCRIPTS[name], MODELS[name](d_model=16, num_heads=2, num_layers=1)
    optimizer, scheduler = script.create_optimizer(model, 0.02, 50, 4, weight_decay=0.3)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["initial_lr"], group["weight_decay"]) == (0.02, 0.3)
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    rates = []
    for _ in range(50):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.02 * script.lr_factor(step, 50, 4) for step in range(50)])
    assert script.create_optimizer(model, 0.02, 50, 4)[0].param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_epoch_uses_the_loss_function_it_is_given(name):
    model = MODELS[name](d_model=16, num_heads=2, num_layers=1)
    optimizer, scheduler = SCRIPTS[name].create_optimizer(model, 1e-3, 9, 2)
    loader = create_dataloaders(300, 4, 32, 0)[0]
    values = iter(range(1, 100))

    def loss(model, batch):
        assert model.training
        return next(values) + 0 * model.output.weight.sum()

    mean = SCRIPTS[name].train_epoch(model, loader, optimizer, scheduler, 1.0, loss)
    assert mean == pytest.approx((len(loader) + 1) / 2)
    assert scheduler.last_epoch == len(loader)


def test_masking_rates_change_what_they_name():
    tokens = collate_fn(NumberTranslationDataset(3000, 5, 0).items)["pair"]

    def counts(**rates):
        corrupted, labels = encoder_only.mask_tokens(tokens, generator=seeded(), **rates)
        selected = labels != IGNORE_INDEX
        masked = ((corrupted == MASK) & selected).sum().item()
        other = ((corrupted != MASK) & (corrupted != tokens)).sum().item()
        return selected.sum().item(), masked, other

    selected, masked, other = counts()
    assert counts(mask_share=1.0)[1:] == (selected, 0)
    assert counts(mask_share=0.0, random_share=0.0) == (selected, 0, 0)
    share = counts(mask_share=0.0, random_share=1.0)[2] / selected
    assert share == pytest.approx(0.95, abs=0.02)  # one random token in twenty is the original
    assert counts(mask_share=0.2)[1] / selected == pytest.approx(0.2, abs=0.03)
    assert counts(min_rate=1.0)[0] > 1.3 * selected > 1.3 * counts(min_rate=0.0)[0]


def test_predict_passes_the_masking_rates_on():
    model = MODELS["encoder_only"](d_model=16, num_heads=2, num_layers=1).train()
    batch = collate_fn(NumberTranslationDataset(50, 4, 0).items)
    with patch.object(encoder_only, "mask_tokens", wraps=encoder_only.mask_tokens) as masking:
        encoder_only.logits_and_labels(model, batch, 0.5, 0.25, 0.4)
    assert masking.call_args.args[1:] == (0.5, 0.25, 0.4)


def test_each_shuffled_epoch_has_another_order_of_the_same_rows():
    train_loader, val_loader = create_dataloaders(400, 4, 32, 3)

    def epoch(loader):
        return [tuple(digits) for batch in loader for digits in batch["digits"]]

    first, second = epoch(train_loader), epoch(train_loader)
    assert first != second and sorted(first) == sorted(second)
    assert len(set(first)) == len(first) == len(train_loader.dataset)
    held_out = [tuple(item["digits"]) for item in val_loader.dataset]
    assert epoch(val_loader) == epoch(val_loader) == held_out  # in order, each row once
    assert len(set(held_out)) == len(held_out)


def test_an_item_with_an_unknown_digit_is_rejected():
    with pytest.raises(ValueError, match="'x'"):
        make_item(["4", "x"])


# --- constants: each reaches its place -------------------------------------------------
VALUES = {
    "D_MODEL": 12, "NUM_HEADS": 3, "NUM_LAYERS": 1, "D_FF": 20, "DROPOUT": 0.25,
    "NUM_SAMPLES": 330, "MAX_DIGITS": 3, "BATCH_SIZE": 17, "LEARNING_RATE": 0.0123,
    "WARMUP_STEPS": 3, "CLIP_NORM": 0.77, "NUM_EPOCHS": 2, "SEED": 5, "NUM_THREADS": 2,
    "DEVICE": "cpu", "MASK_SHARE": 0.7, "RANDOM_SHARE": 0.2, "MIN_MASKING_RATE": 0.4,
    "FINETUNE_EPOCHS": 1, "FINETUNE_LEARNING_RATE": 0.0045, "BEAM_WIDTH": 3,
    "LENGTH_PENALTY": 0.6, "NUM_EXAMPLES": 2, "VALIDATION_SHARE": 0.2, "ACCUMULATION_STEPS": 3,
    "MIN_LEARNING_RATE": 0.0011, "WEIGHT_DECAY": 0.03, "LABEL_SMOOTHING": 0.2,
    "PRECISION": "bfloat16", "FUSED_ATTENTION": False, "GRADIENT_CHECKPOINTING": True,
    "PROFILE_STEPS": 2, "RESUME_EVERY": 4,
}  # fmt: skip
MODEL = {"d_model": 12, "num_heads": 3, "num_layers": 1, "d_ff": 20, "dropout": 0.25}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Files go to a temporary folder. Returns it."""
    for module in (*SCRIPTS.values(), quick_start, train_all, housekeeping):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(bookkeeping, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(bookkeeping, "UNFINISHED", tmp_path / "runs" / "unfinished.pt")
    monkeypatch.setattr(sys, "argv", ["test"])
    return tmp_path


def set_constants(script, monkeypatch):
    used = {name: value for name, value in VALUES.items() if hasattr(script, name)}
    for name, value in used.items():
        monkeypatch.setattr(script, name, value)
    return used


class Recorder:
    """Records the calls of some functions of a module, and lets them run."""

    def __init__(self, monkeypatch, module, *names):
        self.calls = {name: [] for name in names}
        for name in names:
            monkeypatch.setattr(module, name, self.recording(name, getattr(module, name)))

    def recording(self, name, function):
        signature = inspect.signature(function)

        def record(*args, **kwargs):
            self.calls[name].append(signature.bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        return record

    def all(self, name, argument):
        return [call.get(argument) for call in self.calls[name]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_constant_of_an_architecture_reaches_its_place(name, places, monkeypatch, capsys):
    script = SCRIPTS[name]
    used = set_constants(script, monkeypatch)
    watch = Recorder(monkeypatch, script, "create_dataloaders", "create_optimizer", "train_epoch",
                     "choose_device", "translate")  # fmt: skip
    seeds = Recorder(monkeypatch, torch, "manual_seed")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    if name == "encoder_only":
        masks = Recorder(monkeypatch, script, "mask_tokens", "fine_tune")
    script.main()
    data = [list(call.values()) for call in watch.calls["create_dataloaders"]]
    assert data == [[330, 3, 17, 5]]
    arguments = MODELS[name].load(places / "checkpoints" / f"{name}.pt").arguments
    assert {key: arguments[key] for key in MODEL} == MODEL
    assert seeds.all("manual_seed", "seed")[0] == 5 and threads == [2]
    assert watch.all("choose_device", "name") == ["cpu"]
    rates, steps = (
        watch.all("create_optimizer", "learning_rate"),
        len(watch.calls["train_epoch"][0]["loader"]),
    )
    assert rates[0] == 0.0123 and set(watch.all("create_optimizer", "warmup_steps")) == {3}
    assert watch.all("create_optimizer", "total_steps")[0] == 2 * steps
    assert set(watch.all("train_epoch", "clip_norm")) == {0.77}
    assert len(watch.calls["train_epoch"]) == {"encoder_only": 2 + 1 + 3}.get(name, 2)
    if name == "encoder_only":
        rates_used = {tuple(list(call.values())[1:4]) for call in masks.calls["mask_tokens"]}
        assert rates_used == {(0.7, 0.2, 0.4)}
        assert masks.all("fine_tune", "num_epochs") == [1, 3]
        totals = watch.all("create_optimizer", "total_steps")
        assert totals == [2 * steps, 1 * steps, 3 * steps]
        assert masks.all("fine_tune", "learning_rate") == [0.0045] * 2
        assert watch.all("create_optimizer", "learning_rate") == [0.0123, 0.0045, 0.0045]
        del used["FINETUNE_EPOCHS"], used["FINETUNE_LEARNING_RATE"], used["MASK_SHARE"]
        del used["RANDOM_SHARE"], used["MIN_MASKING_RATE"]
    if name == "encoder_decoder":
        last = watch.calls["translate"][-1]
        assert last["beam_width"] == 3 and last["options"] == {"length_penalty": 0.6}
        assert f"width 3   length penalty {0.6}" in capsys.readouterr().out
        del used["BEAM_WIDTH"], used["LENGTH_PENALTY"]
    assert len(used) == 15  # every other constant is checked above


def test_every_constant_of_quick_start_reaches_its_place(places, monkeypatch, capsys):
    assert len(set_constants(quick_start, monkeypatch)) == 16
    watch = Recorder(monkeypatch, quick_start, "create_dataloaders", "choose_device")
    seeds = Recorder(monkeypatch, torch, "manual_seed")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: seeds.calls.update(threads=number))
    steps = {name: Recorder(monkeypatch, script, "create_optimizer", "train_epoch")
             for name, script in SCRIPTS.items()}  # fmt: skip
    quick_start.main()
    data = [list(call.values()) for call in watch.calls["create_dataloaders"]]
    assert data == [[330, 3, 17, 5]] * 3
    assert seeds.all("manual_seed", "seed").count(5) >= 3 and seeds.calls["threads"] == 2
    for name, watched in steps.items():
        (optimizer,) = watched.calls["create_optimizer"]
        epochs = watched.calls["train_epoch"]
        assert (optimizer["learning_rate"], optimizer["warmup_steps"]) == (0.0123, 3)
        assert optimizer["total_steps"] == 2 * len(epochs[0]["loader"]) and len(epochs) == 2
        assert {call["clip_norm"] for call in epochs} == {0.77}
        arguments = MODELS[name].load(places / "checkpoints" / f"{name}.pt").arguments
        assert {key: arguments[key] for key in MODEL} == MODEL
    examples = capsys.readouterr().out.split("mistakes first")[1].split("Result on")[0]
    assert examples.count(" -> ") == 3 * 2


def test_every_constant_of_train_all_reaches_its_place(places, monkeypatch, capsys):
    assert len(set_constants(train_all, monkeypatch)) == 25
    monkeypatch.setattr(train_all, "COMPILE", False)
    watch = Recorder(monkeypatch, train_all, "create_dataloaders", "train_step", "lr_factor",
                     "save_unfinished", "checkpoint_layers", "profiler")  # fmt: skip
    norms = Recorder(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    fused = []
    monkeypatch.setattr(train_all, "use_fused_attention", fused.append)
    losses = Recorder(monkeypatch, torch.nn.functional, "cross_entropy")
    orders = Recorder(monkeypatch, train_all, "epoch_groups")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    train_all.main()
    data = {tuple(call.values()) for call in watch.calls["create_dataloaders"]}
    assert data == {(330, 3, 17, 5, 0.2)}
    optimizers = {id(o): o for o in watch.all("train_step", "optimizer")}.values()
    assert [[g["weight_decay"] for g in o.param_groups] for o in optimizers] == [[0.03, 0.0]] * 3
    assert {g["initial_lr"] for o in optimizers for g in o.param_groups} == {0.0123}
    assert {call["warmup_steps"] for call in watch.calls["lr_factor"]} == {3}
    assert watch.all("lr_factor", "final_factor")[0] == pytest.approx(0.0011 / 0.0123)
    groups = watch.all("train_step", "group")
    assert max(map(len, groups)) == 3 and {len(rows) for group in groups for rows in group} >= {17}
    assert set(norms.all("clip_grad_norm_", "max_norm")) == {0.77} and threads == [2]
    assert set(watch.all("profiler", "steps")) == {2} and fused == []
    assert len(watch.calls["checkpoint_layers"]) == 3
    smoothed = [c for c in losses.calls["cross_entropy"] if c.get("label_smoothing") == 0.2]
    assert len(smoothed) == sum(map(len, groups))
    assert {c["input"].dtype for c in smoothed} == {torch.float32}  # although it runs in bfloat16
    for file in ("encoder_only", "decoder_only", "encoder_decoder"):
        arguments = MODELS[file].load(places / "checkpoints" / f"{file}.pt").arguments
        assert {key: arguments[key] for key in MODEL} == MODEL
    steps_per_epoch = len(groups) // 6
    saves = sum(
        (step + 1) % 4 == 0 and (step + 1) % steps_per_epoch != 0
        for step in range(2 * steps_per_epoch)
    )
    # Every four steps, except at the end of an epoch; after the first epoch; and at the end.
    assert len(watch.calls["save_unfinished"]) == 3 * (saves + 1 + 1)
    one = train_all.epoch_groups(99, 0)
    monkeypatch.setattr(train_all, "SEED", 6)
    assert train_all.epoch_groups(99, 0) != one and orders.calls["epoch_groups"]


# --- small numbers that decide ---------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_holds_the_trained_weights_and_nothing_else(name):
    model = MODELS[name](d_model=16, num_heads=2, num_layers=1)
    trained = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert set(model.state_dict()) == trained
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    if name == "encoder_only":
        assert not model.output.bias.any()


def test_masking_uses_its_generator_and_no_other():
    tokens = collate_fn(NumberTranslationDataset(60, 4, 0).items)["pair"]
    state = torch.get_rng_state()
    first, again = (encoder_only.mask_tokens(tokens, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(encoder_only.mask_tokens(tokens, generator=seeded(4))[0], first[0])
    words, labels = encoder_only.corrupt_one_word(tokens, seeded(3))
    assert torch.equal(words, encoder_only.corrupt_one_word(tokens, seeded(3))[0])
    assert torch.equal(torch.get_rng_state(), state) and 0 < labels.sum() < 60


def test_a_wrong_word_is_any_of_the_other_nine():
    row = VOCABULARY.encode("7 <SEP> seven")
    corrupted, labels = encoder_only.corrupt_one_word(torch.tensor([row] * 600), seeded())
    wrong = VOCABULARY.decode(sorted(set(corrupted[labels == 0][:, 2].tolist())))
    assert wrong == "zero one two three four five six eight nine".split()


@torch.no_grad()
def test_the_classifier_is_scored_on_the_rows_that_its_seed_corrupts():
    classifier = encoder_only.MatchClassifier(random_model("encoder_only")).float().eval()
    loader = create_dataloaders(400, 4, 7, 0)[1]
    for seed in (0, 5):
        generator, correct, rows = seeded(seed), 0, 0
        for batch in loader:
            tokens, labels = encoder_only.corrupt_one_word(batch["pair"], generator)
            for row, label in zip(tokens, labels.tolist()):
                correct += classifier(row[None])[0].argmax().item() == label
                rows += 1
        score = encoder_only.evaluate_classifier(classifier, loader, seed)
        assert 0 < score < 1 and score == pytest.approx(correct / rows)
    assert encoder_only.evaluate_classifier(classifier, loader) == pytest.approx(
        encoder_only.evaluate_classifier(classifier, loader, 0)
    )
