"""Training: masks as in BERT, the schedule, a plain loop, honest scores, and what measures them."""
import functools
import math
import time
from types import SimpleNamespace

from conftest import MODELS, SCRIPTS, random_model
import pytest
import torch

import decoder_only
import encoder_only
import training
from housekeeping import InputError
from toy_dataset import (EOS, FIRST_ORDINARY, IGNORE_INDEX, MASK, PAD, SEP, VOCABULARY, WORDS,
                         WORD_OF, collate_fn, create_dataloaders, make_item, pad_rows)

PAIRS = pad_rows([VOCABULARY.encode("4 0 7 2 9 <SEP> four zero seven two nine"),
                  VOCABULARY.encode("3 <SEP> three")] * 3000, PAD)  # (6000, 11)
RIGHT = (PAIRS == SEP).cumsum(1) > 0


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def small_loaders(batch_size=32):
    return create_dataloaders(300, 4, batch_size, 0)


def new_model(name, **arguments):
    torch.manual_seed(3)
    return MODELS[name](**{"d_model": 12, "num_heads": 3, "num_layers": 1, "d_ff": 20, **arguments})


# --- Masked language modeling ---------------------------------------------------------
@pytest.fixture(scope="module")
def masked():
    """What mask_tokens makes of PAIRS: corrupted tokens, labels, and which are selected."""
    corrupted, labels = encoder_only.mask_tokens(PAIRS, generator=seeded())
    return corrupted, labels, labels != IGNORE_INDEX


def test_selected_tokens_follow_the_80_10_10_split(masked):
    corrupted, _, selected = masked
    shares = [(corrupted == MASK)[selected].double().mean().item(),
              ((corrupted != MASK) & (corrupted != PAIRS))[selected].double().mean().item()]
    # One in twenty random tokens happens to be the original, so 10% * 19/20.
    assert shares == pytest.approx([0.8, 0.095], abs=0.012)


def test_special_tokens_are_never_selected_and_never_a_replacement(masked):
    corrupted, labels, selected = masked
    assert torch.equal(labels[selected], PAIRS[selected])
    assert torch.equal(corrupted[~selected], PAIRS[~selected])
    assert not selected[PAIRS < FIRST_ORDINARY].any()
    changed = corrupted[corrupted != PAIRS]  # every digit and every word occurs
    assert set(changed.tolist()) == {MASK, *range(FIRST_ORDINARY, 26)}


def test_each_row_masks_some_or_all_of_one_side(masked):
    selected = masked[2]
    on_left, on_right = (selected & ~RIGHT).sum(1), (selected & RIGHT).sum(1)
    assert ((on_left > 0) ^ (on_right > 0)).all()  # exactly one side
    assert (on_right > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
    counts = (on_left + on_right)[::2].double()  # in rows of five digits
    assert (counts == 5).double().mean() > 0.1  # a fixed rate of 15% would give 0.00008
    assert 0.5 < counts.mean() / 5 < 0.65  # rates between 0.15 and 1, and at least one token


def test_masking_rates_change_what_they_name():
    def counts(**rates):
        corrupted, labels = encoder_only.mask_tokens(PAIRS, generator=seeded(), **rates)
        masked, changed = corrupted == MASK, corrupted != PAIRS
        return [mask.sum().item() for mask in (labels != IGNORE_INDEX, masked, changed & ~masked)]

    selected = counts()[0]
    assert counts(mask_share=1.0)[1:] == [selected, 0]
    assert counts(mask_share=0.0, random_share=0.0) == [selected, 0, 0]
    assert counts(mask_share=0.2, random_share=0.8)[1:] == pytest.approx(
        [0.2 * selected, 0.8 * 0.95 * selected], rel=0.1)
    assert counts(min_rate=1.0)[0] == 3000 * (5 + 1) > 1.3 * selected > 1.3 * counts(min_rate=0)[0]


# --- Schedule and optimizer -----------------------------------------------------------
@pytest.mark.parametrize("total, warmup", [(100, 10), (1000, 40), (3, 0), (1, 0), (5, 4)])
def test_the_learning_rate_starts_above_zero_peaks_and_decays(total, warmup):
    factors = [training.lr_factor(step, total, warmup) for step in range(total)]
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1.0
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert training.lr_factor(10 * total + warmup, total, warmup) == pytest.approx(0.05)
    decay = [training.lr_factor(step, 15, 4, 0.2) for step in range(4, 18)]  # half a cosine
    assert decay == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * min(n, 10) / 10))
                                   for n in range(14)])


def test_the_optimizer_uses_the_arguments_it_is_given():
    model = new_model("decoder_only")
    optimizer, scheduler = training.create_optimizer(model, 0.02, 50, 4, weight_decay=0.3)
    (group,), default = optimizer.param_groups, training.create_optimizer(model, 0.02, 50, 4)[0]
    assert isinstance(optimizer, torch.optim.AdamW) and default.defaults["weight_decay"] == 0.01
    assert [group[key] for key in ("weight_decay", "betas", "eps")] == [0.3, (0.9, 0.999), 1e-8]
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    for step in range(50):
        assert group["lr"] == pytest.approx(0.02 * training.lr_factor(step, 50, 4))
        optimizer.step()
        scheduler.step()
    with pytest.raises(InputError, match="WARMUP_STEPS=4 takes all of the 4 steps"):
        training.create_optimizer(model, 0.02, 4, 4)


# --- Loss and loop --------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_batch_can_be_memorized(name):
    """The loss goes to 0 unless a residual is broken, a shift is wrong, or a weight is frozen."""
    script, model = SCRIPTS[name], new_model(name, d_model=32, num_heads=2, num_layers=2, d_ff=64)
    batch = next(iter(create_dataloaders(200, 4, 8, 0)[0]))
    first, steps = script.compute_loss(model, batch).item(), 800 if name == "encoder_only" else 250
    optimizer, scheduler = training.create_optimizer(model, 3e-3, steps, 5)
    script.train_epoch(model, [batch] * steps, optimizer, scheduler, 1.0)
    assert script.compute_loss(model.eval(), batch).item() < 0.1 < first
    assert script.translate(model, batch["digits"]) == batch["words"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_epoch_equals_a_plain_training_loop(name):
    """Each step uses the clipped gradient of its own batch, at the scheduled learning rate."""
    script, models = SCRIPTS[name], [new_model(name, dropout=0.1) for _ in range(2)]
    # SGD, because Adam divides by the gradient's size and makes a full step of rounding noise.
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: training.lr_factor(step, 30, 5))
    torch.manual_seed(4)
    mean = script.train_epoch(models[0].eval(), small_loaders()[0], optimizer, scheduler, 0.5)
    torch.manual_seed(4)
    losses, parameters = [], list(models[1].parameters())
    for step, batch in enumerate(small_loaders()[0]):
        losses.append(script.compute_loss(models[1].train(), batch))
        gradients = torch.autograd.grad(losses[-1], parameters)
        length = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                factor = training.lr_factor(step, 30, 5) * min(1.0, 0.5 / length)
                parameter.sub_(0.1 * factor * gradient)
    assert mean == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert scheduler.last_epoch == len(losses) == 9
    for a, b in zip(models[0].parameters(), parameters):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_nan_loss_stops_training_with_step_and_hint(name):
    model, (loader, _) = new_model(name), small_loaders()
    optimizer, scheduler = training.create_optimizer(model, 1e-3, 100, 40)
    train = functools.partial(SCRIPTS[name].train_epoch, model, loader, optimizer, scheduler, 1.0)
    train()
    model.embedding.weight.data[7] = math.nan
    before = model.final_norm.weight.clone()
    with pytest.raises(InputError, match=rf"nan at step {len(loader)}: try .*learning rate"):
        train()
    assert model.final_norm.weight.equal(before)
    with pytest.raises(InputError, match="norm became inf"):
        training.check_finite(math.inf, 3, "norm")


# --- Scores ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
@torch.no_grad()
def test_loss_and_accuracy_are_those_computed_label_by_label(name):
    """Words count, and <EOS> if it must be predicted. Digits and padding do not."""
    script, model, losses, correct = SCRIPTS[name], random_model(name), [], 0
    if name == "encoder_only":
        model.output.bias[20] += 20  # it answers "four", which is sometimes correct
    loader = create_dataloaders(150, 3, 5, 0)[1]
    for item in loader.dataset:
        logits, labels = script.logits_and_labels(model, collate_fn([item]))
        counted = [(position, label) for position, label in zip(logits[0], labels[0].tolist())
                   if label != IGNORE_INDEX]
        assert len(counted) == len(item["words"]) + (name != "encoder_only")
        losses += [-position.log_softmax(-1)[label].item() for position, label in counted]
        correct += sum(position.argmax().item() == label for position, label in counted)
    result, batch = script.evaluate(model, loader), collate_fn([*loader.dataset])
    for loss in (result["loss"], script.compute_loss(model, batch).item()):
        assert loss == pytest.approx(sum(losses) / len(losses))
    assert 0 < correct < len(losses) and result["accuracy"] == correct / len(losses)


@pytest.mark.parametrize("name", SCRIPTS)
def test_exact_match_scores_the_output_of_translate(name, monkeypatch):
    """A right beginning, a word too many, and no answer are mistakes. Mistakes come first."""
    def translate(model, sequences):
        rows = [[WORD_OF[digit] for digit in digits] for digits in sequences]
        return [{"four": row[:-1], "seven": [*row, "<EOS>"], "two": [], "nine": row[::-1]}.get(
            row[-1], row) for row in rows]

    monkeypatch.setattr(SCRIPTS[name], "translate", translate)
    loader = create_dataloaders(1000, 5, 10, 0)[1]
    result = SCRIPTS[name].evaluate(new_model(name), loader)
    rows = [(item["digits"], item["words"], translate(None, [item["digits"]])[0])
            for item in loader.dataset]
    verdicts = [expected == written for _, expected, written in result["examples"]]
    assert sorted(result["examples"]) == sorted(rows) and verdicts == sorted(verdicts)
    assert 0.5 < sum(verdicts) / len(rows) == result["exact_match"] < 0.8


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation_ignores_the_batch_size_and_changes_nothing(name):
    model, results = random_model(name, dropout=0.5), []
    before = torch.get_rng_state()
    for batch_size in (3, 32):
        loader = create_dataloaders(400, 5, batch_size, 0)[1]
        results.append(SCRIPTS[name].evaluate(model.train(), loader))
        assert len(results[-1].pop("examples")) == len(loader.dataset)
    assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == pytest.approx(results[1])


# --- Fine-tuning ----------------------------------------------------------------------
def test_half_the_rows_get_one_wrong_word_and_label_0():
    corrupted, labels = encoder_only.corrupt_one_word(PAIRS, seeded())
    changed = corrupted != PAIRS
    assert torch.equal(changed.sum(1), 1 - labels)
    assert labels.double().mean().item() == pytest.approx(0.5, abs=0.03)
    words = set(VOCABULARY.encode(WORDS))
    assert set(PAIRS[changed].tolist()) <= words == set(corrupted[changed].tolist())
    counts = changed[::2].sum(0)[6:].double()  # every word position, equally often
    assert (counts / counts.sum()).tolist() == pytest.approx([0.2] * 5, abs=0.04)
    wrong = corrupted[1::2][labels[1::2] == 0][:, 2]  # instead of "three": any of the other nine
    assert set(wrong.tolist()) == words - set(VOCABULARY.encode("three"))


@torch.no_grad()
def test_the_classifier_is_scored_on_the_rows_that_its_seed_corrupts():
    classifier = encoder_only.MatchClassifier(random_model("encoder_only")).double().eval()
    loader, evaluate = create_dataloaders(400, 4, 7, 0)[1], encoder_only.evaluate_classifier
    for seed in (0, 5):
        generator, correct = seeded(seed), 0
        for batch in loader:
            tokens, labels = encoder_only.corrupt_one_word(batch["pair"], generator)
            correct += (classifier(tokens).argmax(-1) == labels).sum().item()
        score = evaluate(classifier, loader, seed)
        assert 0 < score < 1 and score == correct / len(loader.dataset)
        assert seed or score == evaluate(classifier, loader)


def test_fine_tuning_trains_a_copy_and_returns_a_score_per_epoch():
    encoder, loss = new_model("encoder_only"), encoder_only.classifier_loss
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    torch.manual_seed(2)
    scores = encoder_only.fine_tune(encoder, *small_loaders(), 3, 1e-2, 5, 0.5)
    assert all(before[key].equal(value) for key, value in encoder.state_dict().items())
    torch.manual_seed(2)
    classifier, (loader, held_out) = encoder_only.MatchClassifier(encoder), small_loaders()
    optimizer, scheduler = training.create_optimizer(classifier, 1e-2, 3 * len(loader), 5)
    for score in scores:
        encoder_only.train_epoch(classifier, loader, optimizer, scheduler, 0.5, loss)
        assert score == encoder_only.evaluate_classifier(classifier, held_out)
    assert len(scores) == 3
    assert not before["embedding.weight"].equal(classifier.encoder.embedding.weight)


# --- Measuring ------------------------------------------------------------------------
@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: clock.now, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_for_comparisons_equals_epochs_of_training(name, clock):
    """Over two epochs and one step. What `watch` does takes no time and stops no dropout."""
    script, watched = SCRIPTS[name], []
    trained, plain = (new_model(name, dropout=0.1) for _ in range(2))

    def watch(step, loss, seconds):
        watched.append((step, loss, seconds))
        clock.now += 1
        trained.train(step == 7)  # as after an evaluation, except at the end

    trained.output.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 0.25))
    torch.manual_seed(3)
    train = functools.partial(training.train_for, script.compute_loss, trained,
                              small_loaders(100)[0], 7, 0.01, 3, 0.3)
    assert train(watch) is trained and not trained.training
    assert [(step, seconds) for step, _, seconds in watched] == [(n, n / 4) for n in range(1, 8)]
    torch.manual_seed(3)
    optimizer, scheduler = training.create_optimizer(plain, 0.01, 7, 3)
    loader = small_loaders(100)[0]
    mean = script.train_epoch(plain, [batch for _ in range(3) for batch in loader][:7], optimizer,
                              scheduler, 0.3)
    assert mean == pytest.approx(sum(loss for _, loss, _ in watched) / 7, abs=1e-4)
    for a, b in zip(trained.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    trained.embedding.weight.data[:] = math.nan
    with pytest.raises(InputError, match="nan at step 1:"):
        train()


def test_strategies_are_scored_tried_20_times_and_timed(clock, capsys):
    """One strategy is always right. The other writes four answers in turn, one of them right."""
    digits = [[str(i // 10), str(i % 10)] for i in range(40)]
    words = [[WORD_OF[d] for d in row] for row in digits]
    seeds, turns = [], iter(range(10 ** 6))

    def translate(model, sequences, temperature=0.0):
        clock.now += (0.003 if temperature else 0.002) * len(sequences)
        seeds.append(torch.initial_seed())
        return [[*[WORD_OF[d] for d in row], *["one"] * (next(turns) % 4 if temperature else 0)]
                for row in sequences]

    training.show_strategies(translate, None, digits, words,
                             {"greedy": {}, "sampled": {"temperature": 1.0}}, seed=8)
    assert capsys.readouterr().out.split("per sequence\n")[1].split() == [
        "greedy", "100.0%", "1.0", "2.000", "sampled", "25.0%", "4.0", "3.000"]
    assert len(seeds) == 2 * (1 + 1 + 10) and set(seeds) == {8}


def test_times_are_medians_after_a_warm_up_with_and_without_cache(clock):
    seconds = iter([100, 1, 2, 30, 4, 5])
    assert training.median_milliseconds(
        lambda: setattr(clock, "now", clock.now + next(seconds))) == 4000

    class Model:
        def generate(self, prompts, max_new_tokens, use_cache=True, stop_at=2):
            assert stop_at is None  # so that every row has its full length
            clock.now += max_new_tokens ** (1 if use_cache else 2)

    seconds = training.time_generation(Model(), (3, 9))
    assert {key: list(value) for key, value in seconds.items()} == {True: [3, 9], False: [9, 81]}


@pytest.mark.parametrize("name", MODELS)
def test_passes_count_one_per_token_plus_the_encoder(name):
    model = random_model(name)
    run = functools.partial(SCRIPTS[name].translate, model, [["4", "0", "7"]])
    tokens = min(len(run()[0]) + 1, 5)  # with <EOS>, unless the limit of 5 came first
    passes = {"encoder_only": 1, "decoder_only": tokens, "encoder_decoder": 1 + tokens}[name]
    assert [training.count_passes(model, run) for _ in range(2)] == [passes] * 2


@pytest.mark.parametrize("name", MODELS)
def test_parameters_by_component_match_the_formulas_and_the_total(name):
    d, f, layers = 12, 20, 3
    counts = training.parameters_by_component(new_model(name, num_layers=layers))
    stacks = 2 if name == "encoder_decoder" else 1
    cross, attention = stacks - 1, layers * 4 * (d * d + d)
    assert counts == {"embedding (tied with output)": 26 * d, "self-attention": stacks * attention,
                      "feed-forward": stacks * layers * (2 * d * f + f + d),
                      "layer norms": (stacks * (2 * layers + 1) + cross * layers) * 2 * d,
                      **({"cross-attention": attention} if cross else {}),
                      **({"output bias": 26} if name == "encoder_only" else {})}
    assert sum(counts.values()) == training.count_parameters(new_model(name, num_layers=layers))


def test_oh_replaces_some_zeros_in_the_labels_and_in_the_inputs_alike():
    """The input at t + 1 is the label at t, also where 0 is spoken "oh"."""
    batch = collate_fn([make_item(list(digits)) for digits in ("407", "00000", "9", "10") * 200])
    spoken = decoder_only.say_oh(batch, share=0.3)
    labels, zeros = spoken["pair_labels"], batch["pair_labels"] == VOCABULARY.ids["zero"]
    said = labels == decoder_only.OH
    assert (said & ~zeros).sum() == 0 and 0.25 < said.sum() / zeros.sum() < 0.35
    inputs = labels[:, :-1]
    shifted = (inputs != IGNORE_INDEX) & (inputs != EOS)
    assert spoken["pair"][:, 1:][shifted].equal(inputs[shifted])
    assert spoken["pair"][:, 0].equal(batch["pair"][:, 0])
    assert batch["pair"].max() < decoder_only.OH  # the batch itself is unchanged
