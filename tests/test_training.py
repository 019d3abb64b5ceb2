"""Training: masks as in BERT, warmup from the first step, and runs that stop at a NaN loss."""

import math
import re

import pytest
import torch

import encoder_only
from conftest import MODELS, ROOT, SCRIPTS, random_model
from housekeeping import RULES, check_constants
from toy_dataset import (
    FIRST_ORDINARY,
    IGNORE_INDEX,
    MASK,
    PAD,
    SEP,
    VOCABULARY,
    WORD_OF,
    collate_fn,
    create_dataloaders,
    pad_rows,
)

PAIRS = pad_rows(
    [
        VOCABULARY.encode("4 0 7 2 9 <SEP> four zero seven two nine"),
        VOCABULARY.encode("3 <SEP> three"),
    ]
    * 3000,
    PAD,
)


@pytest.fixture(scope="module")
def masked():
    return encoder_only.mask_tokens(PAIRS, generator=torch.Generator().manual_seed(0))


def test_selected_tokens_follow_the_80_10_10_split(masked):
    corrupted, labels = masked
    selected = labels != IGNORE_INDEX
    shares = torch.tensor(
        [
            (corrupted[selected] == MASK).double().mean(),
            ((corrupted != MASK) & (corrupted != PAIRS))[selected].double().mean(),
            (corrupted == PAIRS)[selected].double().mean(),
        ]
    )
    # One in twenty random tokens happens to be the original: 10% * 19/20, and the rest goes to
    # "stay".
    torch.testing.assert_close(
        shares, torch.tensor([0.8, 0.095, 0.105]).double(), atol=0.012, rtol=0
    )


def test_only_selected_positions_change_and_only_they_have_labels(masked):
    corrupted, labels = masked
    selected = labels != IGNORE_INDEX
    assert torch.equal(corrupted[~selected], PAIRS[~selected])
    assert torch.equal(labels[selected], PAIRS[selected])


def test_special_tokens_are_never_selected_and_never_a_replacement(masked):
    corrupted, labels = masked
    special = PAIRS < FIRST_ORDINARY
    assert (labels[special] == IGNORE_INDEX).all()
    changed = corrupted[corrupted != PAIRS]
    assert ((changed == MASK) | (changed >= FIRST_ORDINARY)).all()
    others = changed[changed != MASK]
    assert set(others.tolist()) == set(
        range(FIRST_ORDINARY, 26)
    )  # every digit and every word occurs


def test_each_row_masks_some_or_all_of_one_side(masked):
    _, labels = masked
    selected = labels != IGNORE_INDEX
    right = (PAIRS == SEP).cumsum(1) > 0
    on_left, on_right = (selected & ~right).sum(1), (selected & right).sum(1)
    assert ((on_left > 0) ^ (on_right > 0)).all()  # exactly one side
    assert (on_right > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    long_rows = torch.arange(len(PAIRS)) % 2 == 0
    share_all = (torch.maximum(on_left, on_right)[long_rows] == 5).double().mean().item()
    assert share_all > 0.1  # a fixed rate of 15% would give 0.00008
    count = (torch.maximum(on_left, on_right)[long_rows]).double().mean().item() / 5
    assert 0.5 < count < 0.65  # rates between 0.15 and 1, and at least one


def test_masks_are_random_in_training_and_fixed_in_evaluation():
    model = MODELS["encoder_only"](d_model=16, num_heads=2, num_layers=1)
    batch = next(iter(create_dataloaders(500, 5, 64, 0)[0]))
    for training in (True, False):
        model.train(training)
        losses = {encoder_only.compute_loss(model, batch).item() for _ in range(3)}
        assert len(losses) == (3 if training else 1)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("total, warmup", [(100, 10), (1000, 40), (5, 40), (3, 0), (1, 0)])
def test_the_learning_rate_starts_above_zero_peaks_and_decays(name, total, warmup):
    factors = [SCRIPTS[name].lr_factor(step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    up = factors[: min(warmup, total)]
    assert up == sorted(up)
    if total > warmup > 0:
        assert factors[warmup - 1] == 1.0 and factors[0] == 1 / warmup
        assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
        assert factors[-1] < 0.1
    for after in (10 * total + warmup, total + warmup + 2):  # and stays there
        assert SCRIPTS[name].lr_factor(after, total, warmup) == pytest.approx(0.05)
    if total > warmup + 1:
        assert SCRIPTS[name].lr_factor(total - 1, total, warmup, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_loss_is_the_mean_over_the_labels_that_count(name):
    model = MODELS[name](d_model=16, num_heads=2, num_layers=1).eval()
    batch = next(iter(create_dataloaders(500, 5, 16, 0)[0]))
    logits, labels = SCRIPTS[name].logits_and_labels(model, batch)
    total, count = 0.0, 0
    for row, row_labels in zip(logits, labels):
        for position, label in zip(row, row_labels.tolist()):
            if label != IGNORE_INDEX:
                total -= position.log_softmax(-1)[label].item()
                count += 1
    assert SCRIPTS[name].compute_loss(model, batch).item() == pytest.approx(total / count, rel=1e-4)
    words = sum(len(row) for row in batch["words"])
    assert count == words + (
        0 if name == "encoder_only" else len(batch["words"])
    )  # <EOS> counts too, but digits do not


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation_ignores_the_batch_size_and_changes_nothing(name):
    model = MODELS[name](d_model=16, num_heads=2, num_layers=1)
    results = []
    for batch_size in (3, 32):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        result = SCRIPTS[name].evaluate(model, create_dataloaders(400, 5, batch_size, 0)[1])
        assert torch.equal(torch.get_rng_state(), before)
        assert len(result["examples"]) == len(create_dataloaders(400, 5, batch_size, 0)[1].dataset)
        results.append({key: result[key] for key in ("loss", "accuracy", "exact_match")})
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_exact_match_scores_the_output_of_translate(name, monkeypatch):
    """If every second row is correct, exact match is one half, and mistakes come first."""
    script = SCRIPTS[name]
    _, loader = create_dataloaders(1000, 5, 10, 0)
    turn = iter(range(10**6))

    def half_right(model, sequences):
        words = [[WORD_OF[d] for d in digits] for digits in sequences]
        return [row if next(turn) % 2 else row[:-1] + ["<EOS>"] for row in words]

    monkeypatch.setattr(script, "translate", half_right)
    result = script.evaluate(MODELS[name](d_model=16, num_heads=2, num_layers=1), loader)
    assert result["exact_match"] == pytest.approx(0.5, abs=0.01)
    verdicts = [expected == written for _, expected, written in result["examples"]]
    assert verdicts == sorted(verdicts)


@pytest.mark.parametrize("name", ["decoder_only", "encoder_decoder"])
def test_stopping_too_early_or_too_late_is_a_mistake(name):
    script, model = SCRIPTS[name], MODELS[name](d_model=16, num_heads=2, num_layers=1)
    written = {
        "early": [20, 2],
        "right": [20, 16, 2],
        "late": [20, 16, 16, 2],
        "never": [20, 16, 16, 16],
    }
    for ids in written.values():
        model.generate = lambda *a, ids=ids, **k: [ids]
        right = script.translate(model, [["4", "0"]]) == [["four", "zero"]]
        assert right == (ids == written["right"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_batch_can_be_memorized(name):
    """The loss goes to 0 unless a residual is broken, a shift is wrong, or a weight is frozen."""
    script = SCRIPTS[name]
    model = MODELS[name](d_model=32, num_heads=2, num_layers=2, d_ff=64)
    batch = next(iter(create_dataloaders(200, 4, 8, 0)[0]))
    optimizer, _ = script.create_optimizer(model, 3e-3, 300, 40)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    first = script.compute_loss(model, batch).item()
    for _ in range(250 if name != "encoder_only" else 800):
        loss = script.compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert script.compute_loss(model, batch).item() < 0.1 < first
    assert script.translate(model, batch["digits"]) == batch["words"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_nan_loss_stops_training_with_step_and_hint(name):
    script, model = SCRIPTS[name], MODELS[name](d_model=16, num_heads=2, num_layers=1)
    train_loader, _ = create_dataloaders(300, 4, 32, 0)
    optimizer, scheduler = script.create_optimizer(model, 1e-3, 100, 40)
    script.train_epoch(model, train_loader, optimizer, scheduler, 1.0)
    steps = len(train_loader)
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    with pytest.raises(ValueError, match=rf"nan at step {steps}.*LEARNING_RATE"):
        script.train_epoch(model, train_loader, optimizer, scheduler, 1.0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_epoch_equals_a_plain_training_loop(name):
    """Each step uses the clipped gradient of its own batch, at the scheduled learning rate."""
    script, models = SCRIPTS[name], []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(MODELS[name](d_model=16, num_heads=2, num_layers=1, d_ff=32))
    # SGD, because Adam divides by the gradient's size and makes a full step of rounding noise.
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: script.lr_factor(step, 30, 5)
    )
    torch.manual_seed(4)
    script.train_epoch(models[0], create_dataloaders(300, 4, 32, 0)[0], optimizer, scheduler, 0.5)

    torch.manual_seed(4)
    for step, batch in enumerate(create_dataloaders(300, 4, 32, 0)[0]):
        gradients = torch.autograd.grad(
            script.compute_loss(models[1], batch), list(models[1].parameters())
        )
        length = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(models[1].parameters(), gradients):
                parameter.sub_(
                    0.1 * script.lr_factor(step, 30, 5) * gradient * min(1.0, 0.5 / length)
                )
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_is_reproducible(name):
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        model = MODELS[name](d_model=16, num_heads=2, num_layers=1, dropout=0.1)
        train_loader, _ = create_dataloaders(300, 4, 32, 0)
        optimizer, scheduler = SCRIPTS[name].create_optimizer(model, 1e-3, 100, 40)
        losses.append(
            [
                SCRIPTS[name].train_epoch(model, train_loader, optimizer, scheduler, 1.0)
                for _ in range(2)
            ]
        )
    assert losses[0] == losses[1]


def test_fine_tuning_leaves_the_original_encoder_unchanged():
    encoder = MODELS["encoder_only"](d_model=16, num_heads=2, num_layers=1)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    classifier = encoder_only.MatchClassifier(encoder)
    loaders = create_dataloaders(300, 4, 32, 0)
    optimizer, scheduler = encoder_only.create_optimizer(classifier, 1e-2, 30, 5)
    encoder_only.train_epoch(
        classifier, loaders[0], optimizer, scheduler, 1.0, encoder_only.classifier_loss
    )
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    assert not torch.equal(before["embedding.weight"], classifier.encoder.embedding.weight)
    scores = [encoder_only.evaluate_classifier(classifier, loaders[1]) for _ in range(2)]
    assert scores[0] == scores[1] and 0 <= scores[0] <= 1
    assert len(encoder_only.fine_tune(encoder, *loaders, 2, 1e-3, 5, 1.0)) == 2


def test_half_the_rows_get_one_wrong_word_and_label_0():
    corrupted, labels = encoder_only.corrupt_one_word(PAIRS, torch.Generator().manual_seed(0))
    changed = corrupted != PAIRS
    assert torch.equal(changed.sum(1), 1 - labels)
    assert labels.double().mean().item() == pytest.approx(0.5, abs=0.03)
    old, new = PAIRS[changed], corrupted[changed]
    words = range(VOCABULARY.ids["zero"], VOCABULARY.ids["nine"] + 1)
    assert set(old.tolist()) <= set(words) and set(new.tolist()) == set(words)
    assert (changed.any(0) == (PAIRS >= words[0]).any(0)).all()  # every word position is chosen


@pytest.mark.parametrize(
    "constants, words",
    [
        (
            {"NUM_HEADS": 3, "D_MODEL": 64},
            "NUM_HEADS=3 does not divide D_MODEL=64: use 1, 2, 4, 8, ...",
        ),
        ({"D_MODEL": 65, "NUM_HEADS": 5}, "D_MODEL=65 must be even"),
        ({"D_MODEL": 0}, "D_MODEL=0 is out of range"),
        ({"NUM_LAYERS": True}, "NUM_LAYERS=True is not a whole number"),
        ({"NUM_EPOCHS": 1.5}, "NUM_EPOCHS=1.5 is not a whole"),
        ({"BATCH_SIZE": "64"}, "BATCH_SIZE='64' is not a whole"),
        ({"SEED": -1}, "SEED=-1"),
        ({"SEED": 10**400}, "SEED=(a huge number)"),
        ({"LEARNING_RATE": 0}, "LEARNING_RATE=0 "),
        ({"LEARNING_RATE": math.nan}, "LEARNING_RATE=nan is out of range"),
        ({"LEARNING_RATE": None}, "LEARNING_RATE=None is not a number"),
        ({"DROPOUT": 1.0}, "DROPOUT=1.0"),
        ({"DROPOUT": -0.1}, "DROPOUT=-0.1"),
        ({"VALIDATION_SHARE": 0}, "VALIDATION_SHARE=0"),
        ({"MASK_SHARE": 0.8, "RANDOM_SHARE": 0.3}, "sum to more than 1"),
        ({"DEVICE": "tpu"}, "DEVICE='tpu'"),
        ({"BEAM_WIDTH": 0}, "BEAM_WIDTH=0"),
        ({"LENGTH_PENALTY": -1}, "LENGTH_PENALTY=-1"),
    ],
)
def test_invalid_constants_are_rejected_with_name_value_and_fix(constants, words):
    with pytest.raises(ValueError) as error:
        check_constants(constants)
    assert words in str(error.value) and "use " in str(error.value) and "\n" not in str(error.value)


def test_valid_constants_are_accepted():
    check_constants(
        {
            "D_MODEL": 64,
            "NUM_HEADS": 4,
            "DROPOUT": 0,
            "LEARNING_RATE": 1,
            "MASK_SHARE": 1.0,
            "RANDOM_SHARE": 0,
            "DEVICE": "cpu",
            "SOMETHING_ELSE": object(),
        }
    )


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("*.py")))
def test_every_constant_in_a_constants_block_has_a_rule(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    blocks = re.findall(r"# CONSTANTS - .*\n# =+\n((?:.*\n)*?)# =+\n", text)
    names = set(re.findall(r"^([A-Z_]+) = ", "".join(blocks), flags=re.MULTILINE))
    assert names <= RULES.keys() | {"DEVICE", "SENTENCE"}  # these two have their own checks
    for name in names:
        kind, *limits = RULES.get(name, (bool,))
        if limits:
            check_constants({name: limits[2]} | ({"D_MODEL": 64} if name == "NUM_HEADS" else {}))


@pytest.mark.parametrize("name", SCRIPTS)
@torch.no_grad()
def test_evaluation_returns_the_numbers_computed_by_hand(name):
    """Row by row, with the loss and accuracy of each label and a comparison of each answer."""
    script, model = SCRIPTS[name], random_model(name).float()
    if name == "encoder_only":
        model.output.bias[VOCABULARY.ids["four"]] += 20  # so that some answers are correct
    loader = create_dataloaders(150, 3, 5, 0)[1]
    loss, correct, labels, exact = 0.0, 0, 0, []
    for item in loader.dataset:
        batch = collate_fn([item])
        logits, targets = script.logits_and_labels(model, batch)
        for position, label in zip(logits[0], targets[0].tolist()):
            if label != IGNORE_INDEX:
                loss -= position.log_softmax(-1)[label].item()
                correct += position.argmax().item() == label
                labels += 1
        exact.append(script.translate(model, [item["digits"]])[0] == item["words"])
    result = script.evaluate(model, loader)
    assert 0 < correct < labels
    assert result["loss"] == pytest.approx(loss / labels, rel=1e-5)
    assert result["accuracy"] == pytest.approx(correct / labels)
    assert result["exact_match"] == pytest.approx(sum(exact) / len(exact))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_learning_rate_follows_the_documented_curve(name):
    """11 steps of decay from 1 to the last factor: half a cosine."""
    factors = [SCRIPTS[name].lr_factor(step, 15, 4, 0.2) for step in range(18)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 15):
        cosine = math.cos(math.pi * (step - 4) / 10)
        assert factors[step] == pytest.approx(0.2 + 0.8 * (1 + cosine) / 2)
    assert factors[9] == pytest.approx(0.6) and factors[14:] == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_epoch_trains_in_training_mode(name):
    model = MODELS[name](d_model=16, num_heads=2, num_layers=1).eval()
    loader = create_dataloaders(100, 3, 32, 0)[0]
    optimizer, scheduler = SCRIPTS[name].create_optimizer(model, 1e-3, 9, 2)
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return SCRIPTS[name].compute_loss(model, batch)

    SCRIPTS[name].train_epoch(model, loader, optimizer, scheduler, 1.0, loss)
    assert modes == [True] * len(loader)
    assert optimizer.defaults["fused"]  # one kernel for all parameters


@torch.no_grad()
def test_the_most_uncertain_prefix_is_found_by_brute_force():
    model = random_model("decoder_only").float()
    loader = create_dataloaders(150, 3, 5, 0)[1]
    entropies = {}
    for item in loader.dataset:
        row = item["source"] + [SEP] + item["target"]
        for end in range(len(item["source"]) + 1, len(row) + 1):
            p = model(torch.tensor([row[:end]]))[0, -1].softmax(-1)
            entropies[tuple(row[:end])] = -(p * p.log()).sum().item()
    best = max(entropies, key=entropies.get)
    found = SCRIPTS["decoder_only"].most_uncertain(model, loader)
    assert found == VOCABULARY.decode(list(best))


def test_timing_generates_with_and_without_the_cache(monkeypatch):
    model, calls = random_model("decoder_only"), []
    generate = model.generate

    def record(prompts, count, use_cache=True, stop_at=2):
        calls.append((count, use_cache, stop_at))
        return generate(prompts, count, use_cache=use_cache, stop_at=stop_at)

    model.generate = record
    seconds = SCRIPTS["decoder_only"].time_generation(model, (3, 9), rounds=2)
    assert calls[1:] == [(n, use_cache, None) for n in (3, 9) for use_cache in (True, False) * 2]
    assert [len(seconds[use_cache]) for use_cache in (True, False)] == [2, 2]
    assert all(0 < s < 60 for both in seconds.values() for s in both)
