"""The comparison: its numbers are measured, on the models and the data that its rows name."""
import functools
import itertools
import math
import re
import time
from types import SimpleNamespace

from conftest import (MODELS, SCRIPTS, finished, random_model, random_models, random_trio, refused,
                      run_of, steps_of)
import pytest
import torch

import compare_architectures as compare
import decoder_only
import encoder_decoder
import take_apart
import toy_dataset
import housekeeping
from housekeeping import save_model
from quick_start import ARCHITECTURES
from toy_dataset import DIGITS, WORD_OF, exact_match
from training import count_passes

WRITERS = ["decoder-only", "encoder-decoder"]
SIZES = {"d_model": 24, "num_heads": 4, "num_layers": 3, "d_ff": 20}  # K = 6


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(compare, name, value)


def cells(printed, label):
    """The words in the only line that begins with this label and two spaces."""
    (rest,) = re.findall(rf"^ *{re.escape(label)}  +(.*)$", printed, re.MULTILINE)
    return rest.split()


def answers(model, rows, **_):
    """Right translations of about model.share percent of `rows`, and no answers for the others."""
    return [[WORD_OF[digit] for digit in row] if int("".join(row)) % 97 < model.share else []
            for row in rows]


def percent(rows, model):
    return f"{sum(map(bool, answers(model, rows))) / len(rows):.1%}"


# --- 1 to 3. Influence, labels, and one budget ----------------------------------------
@pytest.mark.parametrize("leaks", [False, True])
def test_influence_is_measured_and_compared_with_the_mask(leaks, monkeypatch, capsys):
    if leaks:  # then the decoder-only model sees the future, and the table must say so
        monkeypatch.setattr(decoder_only, "causal_mask",
                            lambda t, s, device: torch.ones(1, 1, t, s, dtype=torch.bool))
    compare.show_influence(random_trio(**SIZES))
    blocks = capsys.readouterr().out.split("Measurement and mask ")[1:]
    assert [block.split()[0] for block in blocks] == [
        "agree", "DIFFER" if leaks else "agree", "agree", "agree"]
    for block, counts in zip(blocks, ([7] * 7, [7] * 7 if leaks else range(1, 8), range(1, 5),
                                      [3] * 4)):  # how many of the first tokens are seen
        rows = re.findall(r"^    \S+ +([#.] .*?)    ", block, re.MULTILINE)
        assert rows == [" ".join("#" * n + "." * (len(rows[0]) // 2 + 1 - n)) for n in counts]


def test_section_3_scores_held_out_rows_and_copies_early_models(monkeypatch):
    """All three get the same batches. A copy has the weights of an early step."""
    set_all(monkeypatch, NUM_SAMPLES=400, NUM_STEPS=7, EVALUATE_EVERY=3, UNDERTRAINED_STEPS=5,
            BATCH_SIZE=50, train=functools.partial(compare.train, warmup_steps=2))
    steps, scored = {}, {name: [] for name in ARCHITECTURES}

    def evaluate(name, model, loader):
        scored[name].append({tuple(item["digits"]) for item in loader.dataset})
        return {"exact_match": len(scored[name]) / 10, "loss": len(scored[name])}

    for name, (script, *_) in ARCHITECTURES.items():
        steps[name] = steps_of(script, monkeypatch)
        monkeypatch.setattr(script, "evaluate", functools.partial(evaluate, name))
    models, curves, early = compare.train_on_one_budget()
    held_out = {tuple(item["digits"]) for item in compare.loaders()[1].dataset}
    for name in ARCHITECTURES:
        digits, weights, _ = zip(*steps[name])
        assert len(digits) == 7 and list(digits) == [step[0] for step in steps["decoder-only"]]
        assert not held_out & {tuple(row) for batch in digits for row in batch}
        assert scored[name] == [held_out] * 3
        assert [(step, *scores) for step, _, *scores in curves[name]] == [
            (3, 0.1, 1), (6, 0.2, 2), (7, 0.3, 3)]
        copied = weights[4 if name == "encoder-decoder" else 5]
        assert early[name].output.weight.equal(copied)
        assert not models[name].output.weight.equal(weights[6])


def test_learning_curves_are_printed_as_measured(capsys):
    compare.show_learning_curves({
        "encoder-only": [(25, 0.5, 0.04, 2.0), (50, 1.0, 0.92, 1.0), (75, 1.8, 0.904, 0.3)],
        "decoder-only": [(25, 2.0, 0.99, 0.1), (50, 4.0, 0.85, 0.25)]})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if re.match("..coder-only ", line)] == [
        "encoder-only 50 steps 1.0 s not reached 90.4% 0.3000 24.0",
        "decoder-only 25 steps 2.0 s 25 steps 2.0 s 85.0% 0.2500 80.0",
        "encoder-only |099|", "decoder-only |#8|"]


# --- What is trained, and what it is tested on ----------------------------------------
def test_held_out_sequences_keep_the_mix_of_lengths():
    everything, _ = compare.held_out_sequences(10 ** 6)
    for count in (40, 200):
        digits, words = compare.held_out_sequences(count)
        assert words == [[WORD_OF[digit] for digit in row] for row in digits]
        assert len(set(map(tuple, digits))) == count  # distinct
        for n in range(1, 6):
            share = sum(len(row) == n for row in everything) / len(everything)
            assert sum(len(row) == n for row in digits) == pytest.approx(share * count, abs=1)


def test_few_sequences_are_few_and_none_is_held_out(monkeypatch):
    seen = []
    set_all(monkeypatch, NUM_SAMPLES=600, BATCH_SIZE=10, train_for=lambda _, model, loader, *__: (
        seen.append([tuple(row) for batch in loader for row in batch["digits"]])))
    for name, count in itertools.product(ARCHITECTURES, (5, 40, None)):
        compare.train(name, None, 10, num_sequences=count)
    held_out = set(map(tuple, compare.held_out_sequences(10 ** 6)[0]))
    assert [len(set(rows)) for rows in seen] == [5, 40, 600 - len(held_out)] * 3
    assert seen[:3] == seen[3:6] == seen[6:]  # all three get the same rows in the same order
    assert len(held_out) > 40 and not held_out & set(sum(seen, []))


@pytest.mark.parametrize("name", WRITERS)
def test_answers_of_given_length_begin_as_others_and_lack_eos(name, monkeypatch):
    script, seen, rows = ARCHITECTURES[name][0], [], [["4"], ["7", "0"], ["1", "2", "3"], ["9"] * 5]
    model = next(random_models(name.replace("-", "_"), ends=4))
    plain = script.translate(model, rows)
    set_all(monkeypatch, exact_match=lambda written, _: seen.extend(written))
    compare.exact_match_given_length(name, model, rows, None)
    assert [len(row) for row in seen] == [1, 2, 3, 5] and all("<EOS>" not in row for row in seen)
    assert all(one[:len(other)] == other[:len(one)] for one, other in zip(seen, plain))
    assert script.translate(model, rows) == plain  # the change was undone


# --- 5 and 6. Costs and limits --------------------------------------------------------
@torch.no_grad()
def test_multiply_adds_and_cache_bytes_match_the_formulas():
    d, f, layers, v, t = 24, 20, 3, 26, 7
    models, tokens = random_trio(**SIZES), torch.tensor([[10, 6, 13, 4, 20, 16, 23]])
    expected = layers * (4 * t * d * d + 2 * t * d * f + 2 * t * t * d) + t * d * v
    assert compare.multiply_adds(lambda: models["decoder-only"](tokens)) == expected
    for name in WRITERS:  # keys and values of source and target tokens, 8 bytes each
        assert compare.cache_bytes(name, models[name], 5, 11) == 2 * layers * d * (5 + 11) * 8


def test_costs_are_printed_per_sequence_and_for_their_row(monkeypatch, capsys):
    """A call takes 64 ms, and each sequence 3 ms with a cache and 5 ms without."""
    models = {name: model.float() for name, model in random_trio(**SIZES).items()}
    digits, clock, expected = ["4", "0", "7"], SimpleNamespace(now=0.0), {}
    for name, (script, *_) in ARCHITECTURES.items():
        for label, cache in ((", cache", True), (", no cache", False)):
            options = {} if name == "encoder-only" else {"use_cache": cache}
            run = functools.partial(script.translate, models[name], [digits], **options)
            each = 3 if options.get("use_cache") else 5
            expected[name + label * len(options)] = [
                str(count_passes(models[name], run)), f"{compare.multiply_adds(run):,}",
                f"{64 + each:.2f}", f"{1 + each:.3f}"]

        def translate(model, rows, original=script.translate, **options):
            clock.now += (64 + len(rows) * (3 if options.get("use_cache") else 5)) / 1000
            return original(model, rows, **options)

        monkeypatch.setattr(script, "translate", translate)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    set_all(monkeypatch, time_generation=lambda model, lengths: {True: [0.016], False: [0.032]})
    compare.show_costs(models, digits)
    _, first, second = re.split("\n  To .*", capsys.readouterr().out)
    assert {label: cells(first, label) for label in expected} == expected
    for name in WRITERS:
        kept = compare.cache_bytes(name, compare.new_model(name), 3, 256) / 1024
        assert cells(second, f"{name}, cache") == ["16.0", f"{kept:.1f}"]
        assert cells(second, f"{name}, no cache") == ["32.0", "-"]


def test_longer_inputs_hold_all_digits_and_are_scored_per_length(monkeypatch, capsys):
    models, asked = {name: SimpleNamespace(share=5 * len(name)) for name in ARCHITECTURES}, []
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "translate", lambda model, rows: (
            asked.append(rows) or answers(model, rows)))
    compare.show_longer_inputs(models)
    printed = capsys.readouterr().out
    assert [{len(row) for row in rows} for rows in asked] == [{5}, {6}, {7}, {8}] * 3
    assert all({digit for row in rows for digit in row} == {*DIGITS} for rows in asked)
    for i, (name, model) in enumerate(models.items()):
        table = " ".join(percent(rows, model) for rows in asked[4 * i:4 * i + 4])
        assert re.search(rf"^ +{name} +{table}$".replace(" ", " +"), printed, re.MULTILINE)


# --- 7. How to generate ---------------------------------------------------------------
def test_each_strategy_has_the_options_and_scores_of_its_title(monkeypatch, capsys):
    """The expected words come from the answers of several strategies, so their scores differ."""
    digits = compare.held_out_sequences(60)[0]
    for name, strategies in compare.STRATEGIES.items():
        model = next(random_models(name.replace("-", "_"), 1, ends=1))
        for title, options in strategies.items():
            found = {"temperature": "1"} if "top" in title else {}
            found |= re.findall(r"(temperature|top_\w|\w+ penalty|beam search) ([\d.]+)", title)
            assert options == {key.replace("beam search", "beam_width").replace(" ", "_"): float(n)
                               for key, n in found.items()}
        written = {title: ARCHITECTURES[name][0].translate(model, digits, **options)
                   for title, options in strategies.items() if "temperature" not in options}
        rows = list(written.values())
        words = [rows[len(rows) * i * i // 3600][i] for i in range(60)]
        scores = {title: f"{exact_match(rows, words):.1%}" for title, rows in written.items()}
        set_all(monkeypatch, STRATEGIES={name: strategies},
                held_out_sequences=lambda words=words: (digits, words))
        compare.show_generation({**random_trio(**SIZES), name: model})
        printed = capsys.readouterr().out
        assert {title: cells(printed, title)[0] for title in scores} == scores
        assert len(set(scores.values())) == len(scores)


# --- 8. Ablations ---------------------------------------------------------------------
@torch.no_grad()
def test_each_ablation_removes_the_component_it_names():
    def changed(change):
        torch.manual_seed(0)
        model = random_model("decoder_only", **SIZES)
        change(model)
        assert not torch.allclose(model(tokens), plain(tokens))
        assert model.generate([[10, 6, 4]], 5) == model.generate([[10, 6, 4]], 5, use_cache=False)
        return model

    plain, tokens = random_model("decoder_only", **SIZES), torch.tensor([[10, 6, 13, 4]])
    x, layer = torch.randn(1, 5, 24).double(), plain.layers[0]
    normalized, attended = layer.norm1(x), layer.norm1(x + layer.self_attention(x, x)[0])
    attended_only = layer.self_attention(normalized, normalized)[0]
    torch.testing.assert_close(changed(compare.without_residuals).layers[0](x)[0],
                               layer.feed_forward(layer.norm2(attended_only)))
    torch.testing.assert_close(changed(compare.post_norm).layers[0](x)[0],
                               layer.norm2(attended + layer.feed_forward(attended)))
    # The logarithms of weights differ from scores by a constant per query.
    before, after = (log - log[..., :1] for log in (
        model.layers[0].self_attention(x, x)[1].log()
        for model in (plain, changed(compare.without_scaling))))
    torch.testing.assert_close(after, math.sqrt(6) * before)
    unordered = changed(compare.without_positions)
    plain.positional_encoding.forward = lambda x, positions: x
    assert torch.equal(unordered(tokens), plain(tokens))


def test_every_row_of_the_ablations_trains_what_it_names(monkeypatch, capsys):
    """From the same weights. A change is only noted, and nothing is trained."""
    changed, trained = [], []

    def train(name, model, steps, warmup):
        model.share = 6 * len(trained) + 9
        trained.append((model, name, steps, warmup, changed[:]))
        changed.clear()

    monkeypatch.setattr(decoder_only, "translate", answers)
    set_all(monkeypatch, ABLATION_LAYERS=(3, 1), ABLATION_STEPS=7, train=train, ABLATIONS=[
        (*row[:2], row[2] and (lambda model, change=row[2]: changed.append(change.__name__)),
         *row[3:]) for row in compare.ABLATIONS])
    compare.show_ablations({("one head", 3): True, ("one head", 1): False, ("post-norm", 1): False})
    digits, printed = compare.held_out_sequences()[0], capsys.readouterr().out
    assert "You guessed 2 of 3 right." in printed  # the models answer 6% more correctly each time
    changes = {"baseline": [], "without positions": ["without_positions"],
               "without 1/sqrt(K)": ["without_scaling"], "without residuals": ["without_residuals"],
               "post-norm": ["post_norm"], "one head": [], "without warmup": []}
    assert [row[0] for row in compare.ABLATIONS] == [*changes] and len(trained) == 14
    for i, (model, *options) in enumerate(trained):
        title, base = [*changes][i // 2], trained[i % 2][0]
        assert cells(printed, title)[i % 2] == percent(digits, model)
        assert options == ["decoder-only", 7, 0 if title == "without warmup" else 40,
                           changes[title]] and len(model.layers) == (3, 1)[i % 2]
        assert model.arguments["num_heads"] == (1 if title == "one head" else 4)
        assert all(w.equal(base.state_dict()[key]) for key, w in model.state_dict().items())


def test_the_padding_ablation_unmasks_cross_attention_and_nothing_else():
    seen, model = [], random_trio(**SIZES)["encoder-decoder"]
    for layer in [*model.encoder_layers, *model.decoder_layers]:
        layer.register_forward_pre_hook(lambda _, x: seen.append(
            (len(x) == 2, x[1] if len(x) == 2 else x[4])))
    compare.without_cross_padding_mask(model)
    encoder_decoder.translate(model, [["4", "0", "7"], ["9"]])
    assert len(seen) > 2 * 3  # (in the encoder?, the mask of the source)
    assert all((mask is not None and (~mask).sum() == 2) == encodes for encodes, mask in seen)


# --- The run --------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["compare_architectures"], ids=run_of)
def test_a_run_from_a_clean_checkout_supports_what_it_says(script):
    _, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    printed, last = done.stdout, done.stdout.split("7. Ablations")[1]
    assert printed.count("Using the small model trained in section 2 instead\n") == 3
    titles = re.findall(r"^    (\d) (.*?)  ", compare.__doc__, flags=re.MULTILINE)
    assert re.findall(r"^(\d)\. ([\w, ]+)", printed, flags=re.MULTILINE) == titles
    assert printed.count("Measurement and mask agree") == 4 and "DIFFER" not in printed
    scores = re.findall(r"([\d.]+)%   (?:by scoring|trained on both)", printed)
    assert len(scores) == 3 and min(map(float, scores)) > 95
    exact = {label: [float(cell[:-1]) for cell in cells(last, label)[:2]] for label in (
        "baseline", "post-norm", "one head", "masked", "without residuals", "without warmup",
        "missing in generation", "missing in training and generation")}
    assert min(sum([exact[name] for name in list(exact)[:4]], [])) > 95
    assert exact["without residuals"][1] < 10 and exact["without warmup"][1] < 10
    assert exact["missing in generation"][0] < 90 < exact["missing in generation"][1]


def test_the_sections_get_the_checkpoints_that_are_good_enough(tmp_path, monkeypatch, capsys):
    trained, shown = random_trio(), {}
    for name in [name for name in dir(compare) if name.startswith("show_")]:
        monkeypatch.setattr(compare, name, lambda *args, name=name: shown.update({name: args[:1]}))
    monkeypatch.setattr(housekeeping, "CHECKPOINTS", tmp_path)
    set_all(monkeypatch, train_on_one_budget=lambda: (trained, 3, 7))
    (tmp_path / "encoder_only.pt").write_bytes(b"broken" * 100)
    good = MODELS["decoder_only"](d_model=32, num_layers=3)
    save_model(good, tmp_path / "decoder_only.pt", 0.91, {})
    save_model(MODELS["encoder_decoder"](), tmp_path / "encoder_decoder.pt", 0.89, {})
    compare.main()
    printed = capsys.readouterr().out
    assert "checkpoints/decoder_only.pt: exact match 91.0%" in printed
    assert printed.count("Using the small model trained in section 2 instead\n") == 2
    assert shown["show_learning_curves"] == (3,) and shown["show_generation"] == (7,)
    for section in ("influence", "costs", "limits"):
        (models,) = shown[f"show_{section}"]
        assert models["decoder-only"].embedding.weight.equal(good.embedding.weight)
        assert [models[name] is trained[name] for name in ARCHITECTURES] == [True, False, True]


@pytest.mark.parametrize("name, value", [("NUM_HEADS", 3), ("FEW_SEQUENCES", (50, 0)),
                                         ("ABLATION_LAYERS", ()), ("EVALUATE_EVERY", 0)])
def test_constants_that_cannot_work_are_rejected_at_once(name, value, monkeypatch, capsys):
    assert f"{name}={value}" in refused(compare, monkeypatch, capsys, **{name: value})


# --- take_apart.py --------------------------------------------------------------------
def test_a_rule_replaces_attention_and_a_wrong_rule_does_not(monkeypatch):
    monkeypatch.setattr(take_apart, "NUM_STEPS", 350)
    subject, part = take_apart.new_subject("encoder-only", 0), "layers.1.self_attention"
    assert all(toy_dataset.is_held_out(item["digits"], 0.1) for item in subject.held_out)
    learned = subject.score(200)
    take_apart.replace(subject, part, take_apart.READ)
    assert learned > 0.9 and subject.score(200) > learned - 0.02
    take_apart.replace(subject, part, take_apart.READ_NEXT)
    assert subject.score(200) < 0.05
    take_apart.restore(subject, [part])
    assert subject.score(200) == learned
    take_apart.replace(subject, "layers.0.feed_forward", "table by own token and role")
    assert subject.hooks
    take_apart.restore(subject, ["layers.0.feed_forward"])
    assert subject.score(200) == learned and not subject.hooks


def test_gpt_stops_only_if_both_layers_agree(monkeypatch):
    monkeypatch.setattr(take_apart, "NUM_STEPS", 400)
    subject = take_apart.new_subject("decoder-only", 0)
    assert take_apart.first_words(subject) == pytest.approx([1, 0], abs=0.05)
    stops, read = take_apart.stops_of_gpt, take_apart.READ
    assert stops(subject, True, "attend to <SEP>") > 0.5 > 0.1 > stops(subject, True, read)
    assert stops(subject, False, read) == 0 and subject.score(200) > 0.9  # and all is restored


def test_t5_stops_if_it_reads_a_digit_before_its_column():
    model = random_model("encoder_decoder")
    items = [toy_dataset.make_item(list(digits)) for digits in ("40712", "99381", "123")]
    subject = take_apart.Subject("encoder-decoder", model, [toy_dataset.collate_fn(items)], items)
    seen = []
    for layer in model.decoder_layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    assert len(take_apart.stops_of_t5(subject, 3)) == 4 and len(seen) == 2
    assert all(weights[..., 3].eq(1).all() and len(weights) == 2 for weights in seen)


def test_a_table_holds_the_mean_of_what_a_module_adds():
    model = random_model("decoder_only")
    items = [toy_dataset.make_item(digits) for digits in (["4", "0"], ["7"], ["1", "2"])]
    subject = take_apart.Subject("decoder-only", model, [toy_dataset.collate_fn(items)], items)
    known, means = take_apart.measure(subject, "layers.1.feed_forward", ())
    outputs = []
    hook = model.layers[1].feed_forward.register_forward_hook(lambda _, __, y: outputs.append(y))
    pair = subject.measured[0]["pair"]
    model(pair)
    hook.remove()
    assert known.tolist() == [0] and torch.allclose(means[0], outputs[0][pair != 0].mean(0))
