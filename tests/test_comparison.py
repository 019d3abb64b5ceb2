"""The comparison: its numbers are measured, on the models and the data that its rows name."""
import functools
import itertools
import math
import re
import time
from types import SimpleNamespace

from conftest import (MODELS, SCRIPTS, finished, random_model, random_models, refused, run_of,
                      steps_of)
import pytest
import torch

import compare_architectures as compare
import decoder_only
import encoder_decoder
import encoder_only
from housekeeping import save_model
from quick_start import ARCHITECTURES
from toy_dataset import (DIGITS, EOS, SEP, SOS, VOCABULARY, WORD_OF, WORDS, collate_fn, exact_match,
                         make_item)
from training import count_passes

WRITERS = ["decoder-only", "encoder-decoder"]
SIZES = {"d_model": 24, "num_heads": 4, "num_layers": 3, "d_ff": 20}  # K = 6
OTHER = {**WORD_OF, **dict(zip(WORDS, DIGITS))}


def three_models():
    return {name: random_model(name.replace("-", "_"), **SIZES) for name in ARCHITECTURES}


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(compare, name, value)


def cells(printed, label):
    """The words in the only line that begins with this label and two spaces."""
    (rest,) = re.findall(rf"^ *{re.escape(label)}  +(.*)$", printed, re.MULTILINE)
    return rest.split()


def is_right(row, share):
    """Whether a fake translation of `row` is correct: a fixed choice of about `share` percent."""
    return int("".join(token if token in DIGITS else OTHER[token] for token in row)) % 97 < share


def percent(rows, share):
    return f"{sum(is_right(row, share) for row in rows) / len(rows):.1%}"


# --- 1 to 3. Influence, labels, and one budget ----------------------------------------
@pytest.mark.parametrize("leaks", [False, True])
def test_influence_is_measured_and_compared_with_the_mask(leaks, monkeypatch, capsys):
    if leaks:  # then the decoder-only model sees the future, and the table must say so
        monkeypatch.setattr(decoder_only, "causal_mask",
                            lambda t, s, device: torch.ones(1, 1, t, s, dtype=torch.bool))
    compare.show_influence(three_models())
    blocks = capsys.readouterr().out.split("Measurement and mask ")[1:]
    full, causal = torch.ones(7, 7), torch.ones(7, 7).tril()
    for block, verdict, measured, mask in zip(
            blocks, ("agree", "DIFFER" if leaks else "agree", "agree", "agree"),
            (full, full if leaks else causal, causal[:4, :4], full[:4, :3]),
            (full, causal, causal[:4, :4], full[:4, :3])):
        grids = [[" ".join("#" if seen else "." for seen in row) for row in grid.tolist()]
                 for grid in (measured, mask)]
        assert block.startswith(verdict) and len(blocks) == 4
        rows = re.findall(r"^    \S+ +([#.] .*)$", block, re.MULTILINE)
        assert rows == [f"{one}    {other}" for one, other in zip(*grids)]


@torch.no_grad()
def test_the_printed_losses_are_those_of_the_printed_labels(capsys):
    models, whole = three_models(), "4 0 7 <SEP> four zero seven".split()
    compare.show_training_rows(models, whole[:3])
    blocks = re.split(r"^  \w+-\w+.*\n", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    for name, block in zip(ARCHITECTURES, blocks):
        inputs, labels, losses = (line.split()[1:] for line in block.splitlines())
        if name == "encoder-only":
            assert all(label in (token, "-") and (label == token or read == token)
                       for read, label, token in zip(inputs, labels, whole))
        else:
            assert inputs == (whole if name == "decoder-only" else ["<SOS>", *whole[4:]])
            assert labels == ["-"] * (len(inputs) - 4) + [*whole[4:], "<EOS>"]
        rows = [whole[:3]] * (name == "encoder-decoder") + [inputs]
        logits = models[name](*(torch.tensor([VOCABULARY.encode(row)]) for row in rows))[0]
        assert losses == [f"{-row[VOCABULARY.ids[label]]:.3f}" if label != "-" else "-"
                          for row, label in zip(logits.log_softmax(-1), labels)]
        assert set(labels) != {"-"}


def test_section_3_scores_held_out_rows_and_copies_early_models(monkeypatch):
    """All three get the same batches. A copy has the weights after UNDERTRAINED_STEPS steps."""
    set_all(monkeypatch, NUM_SAMPLES=400, NUM_STEPS=7, EVALUATE_EVERY=3, UNDERTRAINED_STEPS=4,
            BATCH_SIZE=50, train=functools.partial(compare.train, warmup_steps=2))
    steps, scored = {}, {name: [] for name in ARCHITECTURES}

    def evaluate(name, model, loader):
        scored[name].append({tuple(item["digits"]) for item in loader.dataset})
        return {"exact_match": len(scored[name]) / 10, "loss": len(scored[name])}

    for name, (script, *_) in ARCHITECTURES.items():
        steps[name] = steps_of(script, monkeypatch)
        monkeypatch.setattr(script, "evaluate", functools.partial(evaluate, name))
    models, curves, undertrained = compare.train_on_one_budget()
    held_out = {tuple(item["digits"]) for item in compare.loaders()[1].dataset}
    for name in ARCHITECTURES:
        digits, weights, _ = zip(*steps[name])
        assert len(digits) == 7 and list(digits) == [step[0] for step in steps["decoder-only"]]
        assert not held_out & {tuple(row) for batch in digits for row in batch}
        assert scored[name] == [held_out] * 3
        assert [(step, *last) for step, _, *last in curves[name]] == [(3, .1, 1), (6, .2, 2),
                                                                      (7, .3, 3)]
        assert undertrained[name].output.weight.equal(weights[4])
        assert not models[name].output.weight.equal(weights[6])
        assert not undertrained[name].training and not models[name].training


def test_learning_curves_are_printed_as_measured(capsys):
    compare.show_learning_curves({
        "encoder-only": [(25, 0.5, 0.04, 2.0), (50, 1.0, 0.39, 1.0), (75, 1.8, 0.904, 0.3)],
        "decoder-only": [(25, 2.0, 0.99, 0.1), (50, 4.0, 0.85, 0.25)]})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if re.match("..coder-only ", line)] == [
        "encoder-only 75 steps 1.8 s not reached 90.4% 0.3000 24.0",
        "decoder-only 25 steps 2.0 s 25 steps 2.0 s 85.0% 0.2500 80.0",
        "encoder-only |039|", "decoder-only |#8|"]


# --- What is trained, and what it is tested on ----------------------------------------
def test_held_out_sequences_keep_the_mix_of_lengths():
    everything, _ = compare.held_out_sequences(10 ** 6)
    for count in (40, 200):
        digits, words = compare.held_out_sequences(count)
        assert len(set(map(tuple, digits))) == count  # distinct
        assert words == [[WORD_OF[digit] for digit in row] for row in digits]
        for length in range(1, 6):
            share = sum(len(row) == length for row in everything) / len(everything)
            assert sum(len(row) == length for row in digits) == pytest.approx(share * count, abs=1)


def test_few_sequences_are_few_and_none_is_held_out(monkeypatch):
    seen = []
    set_all(monkeypatch, NUM_SAMPLES=600, BATCH_SIZE=10, train_for=lambda _, model, loader, *__: (
        seen.append([tuple(row) for batch in loader for row in batch["digits"]])))
    for name, count in itertools.product(ARCHITECTURES, (5, 40, None)):
        compare.train(name, None, 10, num_sequences=count)
    held_out = set(map(tuple, compare.held_out_sequences(10 ** 6)[0]))
    everything = len(compare.loaders()[0].dataset)
    assert [len(set(rows)) for rows in seen] == [5, 40, everything] * 3 and len(held_out) > 40
    assert seen[:3] == seen[3:6] == seen[6:]  # all three get the same rows in the same order
    assert not held_out & set(sum(seen, []))


@pytest.fixture
def graded(monkeypatch):
    """What is trained. Of the n-th model's answers, about 5 + 6 n percent are right."""
    calls = []

    def train(name, model, steps, warmup=compare.WARMUP_STEPS, num_sequences=None):
        start = {key: weight.clone() for key, weight in model.state_dict().items()}
        model.share = 5 + 6 * len(calls)
        calls.append(SimpleNamespace(name=name, model=model, steps=steps, warmup=warmup,
                                     count=num_sequences, start=start))
        return model

    def translate(model, rows):
        apart = getattr(model, "apart", 0) if len({len(row) for row in rows}) == 1 else 0
        model.asked = [*getattr(model, "asked", []), rows]
        return [[OTHER.get(token, "?") for token in row] if "x" in row
                or is_right(row, model.share + apart) else [] for row in rows]

    monkeypatch.setattr(compare, "train", train)
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "translate", translate)
    monkeypatch.setattr(encoder_only, "translate_back", translate)
    return calls


def equal_start(one, other):
    return all(value.equal(other.start[key]) for key, value in one.start.items())


def test_the_table_of_few_sequences_shows_each_training(graded, monkeypatch, capsys):
    set_all(monkeypatch, FEW_SEQUENCES=(30, 7), FEW_STEPS=9, exact_match_given_length=lambda *row: (
        float(percent(row[2], row[1].share + 50)[:-1]) / 100))
    compare.show_few_sequences()
    assert [(call.name, call.steps, call.count) for call in graded] == [
        (name, 9, count) for name in ARCHITECTURES for count in (30, 7)]
    digits, printed = compare.held_out_sequences()[0], capsys.readouterr().out
    for pair in zip(graded[::2], graded[1::2]):
        assert equal_start(*pair)
        for label, more in {"": 0, ", length given": 50}.items():
            if more == 0 or pair[0].name in WRITERS:
                assert cells(printed, pair[0].name + label) == [
                    percent(digits, call.model.share + more) for call in pair]


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_answers_of_given_length_equal_a_plain_loop_without_eos(name):
    script, model = ARCHITECTURES[name][0], next(random_models(name.replace("-", "_"), ends=2))
    rows, words = [["4"], ["7", "0"], ["1", "2", "3"], ["9", "8", "8", "8"]], []
    plain = script.translate(model, rows)
    for row in rows:
        read, written = VOCABULARY.encode(row), [SEP if name == "decoder-only" else SOS]
        for _ in row:
            parts = [read + written] if name == "decoder-only" else [read, written]
            logits = model(*(torch.tensor([ids]) for ids in parts))
            logits[0, -1, EOS] = -math.inf
            written.append(logits[0, -1].argmax().item())
        words.append(VOCABULARY.decode(written[1:]))
    assert any(len(row) < len(digits) for row, digits in zip(plain, rows))  # with <EOS>
    assert compare.exact_match_given_length(name, model, rows, words) == 1.0
    assert compare.exact_match_given_length(name, model, rows, [*words[:3], ["one"]]) == 0.75
    assert script.translate(model, rows) == plain  # the change was undone


# --- 5 and 6. Costs and limits --------------------------------------------------------
@torch.no_grad()
def test_multiply_adds_and_cache_bytes_match_the_formulas():
    d, f, layers, v, t = 24, 20, 3, 26, 7
    models, tokens = three_models(), torch.tensor([[10, 6, 13, 4, 20, 16, 23]])
    expected = layers * (4 * t * d * d + 2 * t * d * f + 2 * t * t * d) + t * d * v
    assert compare.multiply_adds(lambda: models["decoder-only"](tokens)) == expected
    for name in WRITERS:  # keys and values of source and target tokens, 8 bytes each
        assert compare.cache_bytes(name, models[name], 5, 11) == 2 * layers * d * (5 + 11) * 8


def test_costs_are_printed_per_sequence_and_for_their_row(monkeypatch, capsys):
    """A call takes 64 ms, and each sequence 3 ms with a cache and 5 ms without."""
    models = {name: model.float() for name, model in three_models().items()}
    digits, clock, expected = ["4", "0", "7"], SimpleNamespace(now=0.0), {}
    for name, (script, *_) in ARCHITECTURES.items():
        variants = {", cache": {"use_cache": True}, ", no cache": {"use_cache": False}}
        for label, options in ({"": {}} if name == "encoder-only" else variants).items():
            run = functools.partial(script.translate, models[name], [digits], **options)
            each = 3 if options.get("use_cache") else 5
            expected[name + label] = [str(count_passes(models[name], run)), f"{1 + each:.3f}",
                                      f"{compare.multiply_adds(run):,}", f"{64 + each:.2f}"]

        def translate(model, rows, original=script.translate, **options):
            clock.now += (64 + len(rows) * (3 if options.get("use_cache") else 5)) / 1000
            return original(model, rows, **options)

        monkeypatch.setattr(script, "translate", translate)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    set_all(monkeypatch, time_generation=lambda model, lengths: {
        True: [n / 1000 for n in lengths], False: [n / 100 for n in lengths]})
    compare.show_costs(models, digits)
    _, first, second = re.split("\n  To .*", capsys.readouterr().out)
    for label, (passes, each, adds, alone) in expected.items():
        assert cells(first, label) == [passes, adds, alone, each]
    for name in WRITERS:
        kept = f"{compare.cache_bytes(name, compare.new_model(name), 3, 256) / 1024:.1f}"
        assert cells(second, f"{name}, cache") == ["16.0", "64.0", "256.0", kept]
        assert cells(second, f"{name}, no cache") == ["160.0", "640.0", "2560.0", "-"]


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_scoring_picks_the_digit_with_the_most_likely_words(name):
    model, losses = random_model(name.replace("-", "_"), **SIZES), {}
    digits, words = ["4", "?", "7"], ["four", "zero", "seven"]
    for digit in DIGITS:
        item = {**make_item(["4", digit, "7"]), "words": words, "target": VOCABULARY.encode(words)}
        losses[digit] = ARCHITECTURES[name][0].compute_loss(model, collate_fn([item])).item()
    assert compare.digit_by_scoring(name, model, digits, 1, words) == min(losses, key=losses.get)


def test_the_tables_of_limits_show_the_answers_they_name(graded, monkeypatch, capsys):
    models = {name: SimpleNamespace(share=20 * n) for n, name in enumerate(ARCHITECTURES, 1)}
    monkeypatch.setattr(encoder_only, "fill_masks", lambda model, rows: rows)
    set_all(monkeypatch, digit_by_scoring=lambda name, model, digits, n, words: (
        digits[n] if is_right(words, model.share + 7) else "-"))
    compare.show_limits(models)
    printed, digits = capsys.readouterr().out, compare.held_out_sequences()[0]
    back, mask, longer, _, _, stopping = re.split(r"\n  (?=\w)", printed)[1:]
    for name, model in models.items():
        drawn = [rows for rows in model.asked if len(rows) == 100]
        assert [{len(row) for row in rows} for rows in drawn] == [{5}, {6}, {7}, {8}]
        for rows in drawn:
            assert {digit for row in rows for digit in row} == set(DIGITS)
        table, _ = re.findall(rf"^    {name} +(.*)$", longer, re.MULTILINE)
        assert table.split() == [percent(rows, model.share) for rows in drawn]
        assert cells(back, name)[0] == cells(stopping, name)[0] == percent(digits, model.share)
        assert cells(mask, name)[0] == (percent(digits, model.share + 7) if name in WRITERS
                                        else "0.0%")


# --- 7. How to generate ---------------------------------------------------------------
def options_in(title):
    """The options that a row's title promises."""
    found = {"temperature": 1.0} if "top" in title else {}
    found |= {name.replace(" ", "_"): float(value) for name, value in re.findall(
        r"(temperature|top_p|repetition penalty|length penalty) ([\d.]+)", title)}
    return found | {{"beam search": "beam_width"}.get(name, name): int(value)
                    for name, value in re.findall(r"(top_k|beam search) (\d)", title)}


def test_each_strategy_has_the_options_and_scores_of_its_title(monkeypatch, capsys):
    """The expected words come from the answers of several strategies, so their scores differ."""
    digits = compare.held_out_sequences(60)[0]
    for name, strategies in compare.STRATEGIES.items():
        assert strategies == {title: options_in(title) for title in strategies}
        model = next(random_models(name.replace("-", "_"), 1, ends=1))
        answers = {title: ARCHITECTURES[name][0].translate(model, digits, **options)
                   for title, options in strategies.items() if "temperature" not in options}
        rows = list(answers.values())
        words = [rows[len(rows) * i * i // len(digits) ** 2][i] for i in range(len(digits))]
        expected = {title: f"{exact_match(rows, words):.1%}" for title, rows in answers.items()}
        assert len(set(expected.values())) == len(answers)
        set_all(monkeypatch, STRATEGIES={name: strategies},
                held_out_sequences=lambda words=words: (digits, words))
        compare.show_generation({name: model})
        printed = capsys.readouterr().out
        assert {title: cells(printed, title)[0] for title in answers} == expected


# --- 8. Ablations ---------------------------------------------------------------------
@torch.no_grad()
def test_each_ablation_removes_the_component_it_names():
    plain, models = random_model("decoder_only", **SIZES), {}
    tokens, x = torch.tensor([[10, 6, 13, 4, 20]]), torch.randn(1, 5, 24).double()
    for change in (compare.without_scaling, compare.without_residuals, compare.post_norm,
                   compare.without_positions):
        torch.manual_seed(0)
        models[change] = model = random_model("decoder_only", **SIZES)
        change(model)
        assert not torch.allclose(model(tokens), plain(tokens))
        assert model.generate([[10, 6, 4]], 5) == model.generate([[10, 6, 4]], 5, use_cache=False)
    layer = plain.layers[0]
    normalized, attended = layer.norm1(x), layer.norm1(x + layer.self_attention(x, x)[0])
    attended_only = layer.self_attention(normalized, normalized)[0]
    for change, expected in (
            (compare.without_residuals, layer.feed_forward(layer.norm2(attended_only))),
            (compare.post_norm, layer.norm2(attended + layer.feed_forward(attended)))):
        torch.testing.assert_close(models[change].layers[0](x)[0], expected)
    # The logarithms of weights differ from scores by a constant per query.
    before, after = (log - log[..., :1] for log in (
        model.layers[0].self_attention(x, x)[1].log()
        for model in (plain, models[compare.without_scaling])))
    torch.testing.assert_close(after, math.sqrt(6) * before)
    plain.positional_encoding.forward = lambda x, positions: x
    assert torch.equal(models[compare.without_positions](tokens), plain(tokens))


def test_every_row_of_the_ablations_trains_what_it_names(graded, monkeypatch, capsys):
    changed = {name: [] for name in ("without_positions", "without_scaling", "without_residuals",
                                     "post_norm")}
    set_all(monkeypatch, ABLATION_LAYERS=(3, 1), ABLATION_STEPS=7, ABLATIONS=[
        (*row[:3], row[3] and changed[row[3].__name__].append, *row[4:])
        for row in compare.ABLATIONS])
    compare.show_ablations()
    digits, printed = compare.held_out_sequences()[0], capsys.readouterr().out
    pairs = {row[0]: pair for row, pair in zip(compare.ABLATIONS, zip(graded[::2], graded[1::2]))}
    assert [*pairs] == ["baseline", "without positions", "without 1/sqrt(K)", "without residuals",
                        "post-norm", "one head", "without warmup"]
    for pair, models in zip(list(pairs.values())[1:5], changed.values()):
        assert [call.model for call in pair] == models
    for title, pair in pairs.items():
        assert cells(printed, title)[:2] == [percent(digits, call.model.share) for call in pair]
        for call, base, layers in zip(pair, pairs["baseline"], (3, 1)):
            assert (call.name, call.steps, len(call.model.layers)) == ("decoder-only", 7, layers)
            assert call.model.arguments["num_heads"] == (1 if title == "one head" else 4)
            assert call.warmup == (0 if title == "without warmup" else compare.WARMUP_STEPS)
            assert equal_start(call, base)


def test_the_padding_ablation_unmasks_cross_attention_and_nothing_else():
    seen, model = {"encoder": [], "cross": []}, three_models()["encoder-decoder"]
    for layer in model.encoder_layers:
        layer.register_forward_pre_hook(lambda _, x: seen["encoder"].append(x[1]))
    for layer in model.decoder_layers:
        layer.register_forward_pre_hook(lambda _, x: seen["cross"].append(x[4]))
    compare.without_cross_padding_mask(model)
    encoder_decoder.translate(model, [["4", "0", "7"], ["9"]])
    assert seen["cross"] and all(mask is None for mask in seen["cross"])
    assert all((~mask).sum() == 2 for mask in seen["encoder"])


def test_the_padding_table_shows_when_the_mask_is_missing(graded, monkeypatch, capsys):
    """Without the mask, other answers are right if each length is alone."""
    set_all(monkeypatch, without_cross_padding_mask=lambda model: setattr(
        model, "apart", 30 if hasattr(model, "share") else 45))
    compare.show_padding_ablation()
    digits, printed = compare.held_out_sequences()[0], capsys.readouterr().out
    assert equal_start(*graded)
    for title, share, apart in (("masked", 5, 5), ("missing in generation", 5, 35),
                                ("missing in training and generation", 11, 56)):
        assert cells(printed, title) == [percent(digits, share), percent(digits, apart)]


# --- The run --------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["compare_architectures"], ids=run_of)
def test_a_run_from_a_clean_checkout_supports_what_it_says(script):
    _, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    printed, last = done.stdout, done.stdout.split("8. Ablations")[1]
    assert printed.count("Using the small model trained in section 3 instead\n") == 3
    titles = re.findall(r"^    (\d) (.*?)  ", compare.__doc__, flags=re.MULTILINE)
    assert re.findall(r"^(\d)\. ([\w ]+)", printed, flags=re.MULTILINE) == titles
    assert printed.count("Measurement and mask agree") == 4 and "DIFFER" not in printed
    for label, first, second in (  # exact match of one and the other column: above or below
            ("baseline", ">95", ">95"), ("without residuals", ">0", "<10"),
            ("post-norm", ">95", ">95"), ("one head", ">95", ">95"),
            ("without warmup", ">0", "<10"), ("masked", ">95", ">95"),
            ("missing in generation", "<90", ">90"),
            ("missing in training and generation", ">90", "<90")):
        for cell, bound in zip(cells(last, label), (first, second)):
            assert (float(cell[:-1]) > float(bound[1:])) == (bound[0] == ">"), (label, cell)


def test_a_small_run_uses_the_checkpoints_that_it_can_read(tmp_path, monkeypatch, capsys):
    set_all(monkeypatch, NUM_STEPS=45, ABLATION_STEPS=41, FEW_STEPS=41, NUM_SAMPLES=110,
            MAX_DIGITS=2, D_MODEL=12, NUM_HEADS=3, D_FF=8, ABLATION_LAYERS=(1,),
            FEW_SEQUENCES=(20,), CHECKPOINTS=tmp_path,
            time_generation=lambda *_: {True: (1,), False: (1,)})
    (tmp_path / "encoder_only.pt").write_bytes(b"broken" * 100)
    model = MODELS["decoder_only"](d_model=32, num_layers=3)
    save_model(model, tmp_path / "decoder_only.pt", 0.91, {})
    save_model(MODELS["encoder_decoder"](d_model=48), tmp_path / "encoder_decoder.pt", 0.89, {})
    compare.main()
    printed = capsys.readouterr().out
    assert re.search("encoder_only.pt cannot be used .* Using the small model", printed)
    assert re.search("encoder_decoder.pt: exact match 89.0%.* Using the small model", printed)
    assert "from checkpoints/decoder_only.pt, d_model 32, 3 layers" in printed
    total = sum(parameter.numel() for parameter in model.parameters())
    assert re.search(rf"decoder-only +{total:,} parameters", printed)
    assert "the models of section 3 after 45 steps" in printed  # UNDERTRAINED_STEPS is larger


@pytest.mark.parametrize("name, value", [("NUM_HEADS", 3), ("FEW_SEQUENCES", (50, 0)),
                                         ("ABLATION_LAYERS", ()), ("EVALUATE_EVERY", 0)])
def test_constants_that_cannot_work_are_rejected_at_once(name, value, monkeypatch, capsys):
    assert f"{name}={value}" in refused(compare, monkeypatch, capsys, **{name: value})
