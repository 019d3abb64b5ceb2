"""The comparison and the figures: measured on the models, and faithful to their data."""

import functools
import math
import re

import matplotlib.image
import pytest
import torch

import compare_architectures as compare
import decoder_only
import train_all
import visualizations as visual
from conftest import MODELS, ROOT, SCRIPTS, Workplace, finished, random_model, refused, run_of
from quick_start import ARCHITECTURES, count_passes
from toy_dataset import (
    DIGITS,
    SOS,
    VOCABULARY,
    WORDS,
    collate_fn,
    create_dataloaders,
    make_item,
)
from train_all import parameters_by_component, train_for


def by_architecture(**arguments):
    return {name: random_model(name.replace("-", "_"), **arguments) for name in ARCHITECTURES}


# --- compare_architectures ------------------------------------------------------------
def test_measured_influence_equals_the_mask():
    models = by_architecture()
    pair, target = torch.tensor([[10, 6, 13, 4, 20, 16]]), torch.tensor([[SOS, 20, 16]])
    causal = decoder_only.causal_mask(6, 6)[0, 0]
    assert compare.influence(models["encoder-only"], [pair], 0).all()
    assert torch.equal(compare.influence(models["decoder-only"], [pair], 0), causal)
    assert torch.equal(
        compare.influence(models["encoder-decoder"], [pair, target], 1), causal[:3, :3]
    )
    on_source = compare.influence(models["encoder-decoder"], [pair, target], 0)
    assert on_source.shape == (3, 6) and on_source.all()


def test_every_choice_cites_the_section_that_measures_it(capsys):
    sections = {
        title: number for number, title in re.findall(r"^    (\d) (.*?)  ", compare.__doc__, re.M)
    }
    compare.show_choices()
    reasons = re.findall(r"([a-zA-Z<> ,;]+) \(([\d, ]+)\)", capsys.readouterr().out)
    assert len(reasons) > 8  # a row may have two; the closing sentence has one
    for words, cited in reasons:
        title = "What each costs"
        if re.search("both (directions|sides)|span|bidirectional", words):
            title = "Which token attends to which"
        elif re.search("EOS|filling in", words):
            title = "What each can and cannot do"
        assert sections[title] in cited.split(", "), words


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_by_component_match_the_formulas_and_the_total(name):
    d, f, layers, v = 16, 32, 2, 26
    # random_model would untie the output. A trained model counts the shared table once.
    model = ARCHITECTURES[name][1](d_model=d, num_heads=2, num_layers=layers, d_ff=f)
    counts = parameters_by_component(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    stacks = 2 if name == "encoder-decoder" else 1
    assert counts["self-attention"] == stacks * layers * 4 * (d * d + d)
    assert counts.get("cross-attention", 0) == (
        layers * 4 * (d * d + d) if name == "encoder-decoder" else 0
    )
    assert counts["feed-forward"] == stacks * layers * (2 * d * f + f + d)
    norms = {
        "encoder-only": 2 * layers + 1,
        "decoder-only": 2 * layers + 1,
        "encoder-decoder": 5 * layers + 2,
    }[name]
    assert counts["layer norms"] == norms * 2 * d
    assert counts["embedding (tied with output)"] == v * d


@torch.no_grad()
def test_multiply_adds_are_those_of_the_matrix_products():
    d, f, layers, v, t = 16, 32, 2, 26, 7
    model, tokens = random_model("decoder_only"), torch.tensor([[10, 6, 13, 4, 20, 16, 23]])
    expected = (
        layers * (4 * t * d * d + 2 * t * d * f + 2 * t * t * d) + t * d * v
    )  # projections, feed-forward, q k and w v
    assert compare.multiply_adds(lambda: model(tokens)) == expected


def test_passes_count_one_per_token_plus_the_encoder():
    digits = [["4", "0", "7"]]
    for name, model in by_architecture().items():
        script = ARCHITECTURES[name][0]
        passes = count_passes(model, functools.partial(script.translate, model, digits))
        if name == "encoder-only":
            assert passes == 1
        else:  # at most 5 tokens are allowed for 3 digits
            assert passes == len(script.translate(model, digits)[0]) + (
                name == "encoder-decoder"
            ) + (0 if len(script.translate(model, digits)[0]) == 5 else 1)


def test_cache_bytes_match_the_formula():
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=3)
    assert compare.cache_bytes("decoder-only", model, 4, 10) == 2 * 3 * 16 * 14 * 4
    model = MODELS["encoder_decoder"](d_model=16, num_heads=2, num_layers=3)
    assert compare.cache_bytes("encoder-decoder", model, 4, 10) == 2 * 3 * 16 * (4 + 10) * 4


def test_each_ablation_removes_the_component_it_names():
    torch.manual_seed(0)
    tokens = torch.tensor([[10, 6, 13, 4, 20]])
    plain = MODELS["decoder_only"](d_model=16, num_heads=2).eval()
    with torch.no_grad():
        before = plain(tokens)
        for change in (
            compare.without_scaling,
            compare.without_residuals,
            compare.post_norm,
            compare.without_positions,
        ):
            model = MODELS["decoder_only"](d_model=16, num_heads=2).eval()
            model.load_state_dict(plain.state_dict())
            change(model)
            assert not torch.allclose(model(tokens), before)
            prompt = [[10, 6, 4]]  # the changed model generates the same with and without a cache
            assert model.generate(prompt, 5) == model.generate(prompt, 5, use_cache=False)
        scores = []
        model = MODELS["decoder_only"](d_model=16, num_heads=2).eval()
        attention = model.layers[0].self_attention
        x = torch.randn(1, 4, 16)
        for scaled in (True, False):
            if not scaled:
                compare.without_scaling(model)
            scores.append(attention(x, x)[1].log())
        gaps = [
            s - s[..., :1] for s in scores
        ]  # differences of log-weights are differences of scores
        torch.testing.assert_close(gaps[1], gaps[0] * math.sqrt(8), atol=1e-4, rtol=1e-3)
    assert decoder_only.lr_factor(0, 100, 0) == 1.0
    assert [row[4] for row in compare.ABLATIONS if row[0] == "without warmup"] == [0]


def test_padding_changes_the_answer_without_the_cross_padding_mask():
    model = random_model("encoder_decoder")
    rows = [[10, 6, 13, 9, 9, 9], [10]]
    source = torch.tensor([rows[0], rows[1] + [0] * 5])
    target = torch.tensor([[SOS], [SOS]])
    with torch.no_grad():
        compare.without_cross_padding_mask(model)
        assert not torch.allclose(model(source, target)[1], model(source[1:, :1], target[1:])[0])


@pytest.mark.parametrize("script", ["compare_architectures"], ids=run_of)
def test_the_comparison_runs_from_a_clean_checkout(script):
    _, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("no checkpoint at") == 3
    headings = re.findall(r"^(\d)[. ]", done.stdout, flags=re.MULTILINE)
    assert headings == [str(n) for n in range(1, 10)]
    assert done.stdout.count("Measurement and mask agree") == 4 and "DIFFER" not in done.stdout


def test_the_comparison_survives_odd_checkpoints_and_small_budgets(
    workplace,
):
    workplace.set(
        "compare_architectures",
        NUM_STEPS=50,
        EVALUATE_EVERY=20,
        ABLATION_STEPS=5,
        FEW_STEPS=5,
        NUM_SAMPLES=600,
    )
    (workplace.folder / "checkpoints").mkdir()
    (workplace.folder / "checkpoints" / "encoder_only.pt").write_bytes(b"broken" * 100)
    MODELS["decoder_only"](d_model=32, num_heads=4, num_layers=3).save(
        workplace.folder / "checkpoints" / "decoder_only.pt"
    )
    done = workplace.run("compare_architectures")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first = done.stdout.splitlines()[:3]
    assert "encoder_only.pt is damaged" in first[0]
    assert first[1] == "decoder-only: from checkpoints/decoder_only.pt, d_model 32, 3 layers"
    total = sum(
        p.numel()
        for p in MODELS["decoder_only"](d_model=32, num_heads=4, num_layers=3).parameters()
    )
    assert re.search(rf"decoder-only +{total:,} parameters", done.stdout)
    assert "after 50 steps" in done.stdout


@pytest.mark.parametrize("script", ["compare_architectures", "visualizations"])
def test_the_comparison_and_the_figures_check_their_constants(script, monkeypatch, capsys):
    module = {"compare_architectures": compare, "visualizations": visual}[script]
    assert "NUM_HEADS=3" in refused(module, monkeypatch, capsys, NUM_HEADS=3)


@pytest.mark.parametrize(
    "constants, words",
    [
        ({"MAX_DIGITS": 2, "NUM_SAMPLES": 110}, "MAX_DIGITS=2: section 6"),
        ({"FEW_SEQUENCES": (5000,), "NUM_SAMPLES": 600}, "FEW_SEQUENCES=(5000,): there are only"),
        ({"ABLATION_LAYERS": (2, 1001)}, "ABLATION_LAYERS=(2, 1001)"),
    ],
)
def test_the_comparison_rejects_what_a_late_section_cannot_use(
    constants, words, monkeypatch, capsys
):
    assert words in refused(compare, monkeypatch, capsys, **constants)


@pytest.mark.parametrize(
    "name, value", [("LEARNING_RATE", "a"), ("LEARNING_RATE", 0), ("WARMUP_STEPS", 10**6)]
)
def test_the_figures_check_the_constants_that_they_show(name, value, monkeypatch, capsys):
    monkeypatch.setattr(train_all, name, value)
    assert name in refused(visual, monkeypatch, capsys)


def test_a_sentence_that_is_not_digits_is_rejected(monkeypatch, capsys):
    assert "SENTENCE='four'" in refused(visual, monkeypatch, capsys, SENTENCE="four")
    assert "SENTENCE=407" in refused(visual, monkeypatch, capsys, SENTENCE=407)


# --- visualizations -------------------------------------------------------------------
@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run from a clean checkout, as a user does it, and its folder."""
    place = Workplace(tmp_path_factory.mktemp("figures"))
    place.set("visualizations", TRAIN_EPOCHS=1)
    return place, place.run("visualizations")


@pytest.mark.parametrize("_", ["figures"], ids=run_of)
def test_every_figure_is_made_and_none_is_blank(drawn, _):
    place, done = drawn
    assert done.returncode == 0 and done.stderr == "", done.stderr
    named = re.findall(r"^  figures/(\w+\.png)   \S", done.stdout, flags=re.MULTILINE)
    made = sorted(path.name for path in (place.folder / "figures").iterdir())
    assert sorted(named) == made and len(made) >= 16
    for name in made:
        pixels = matplotlib.image.imread(place.folder / "figures" / name)[..., :3]
        assert pixels.shape[1] <= 1500  # fits the width of a README
        assert pixels.std() > 0.02 and (pixels.min(-1) < 0.9).mean() > 0.01
        assert (place.folder / "figures" / name).stat().st_size < 200_000


@pytest.mark.parametrize("_", ["figures"], ids=run_of)
def test_a_run_makes_every_committed_figure(drawn, _):
    place, _ = drawn
    made = {path.name for path in (place.folder / "figures").iterdir()}
    assert {path.name for path in (ROOT / "figures").glob("*.png")} <= made


def test_drawn_attention_sums_to_one_and_is_the_models_own():
    models = by_architecture()
    digits = ["4", "0", "7"]
    for name, (weights, rows, columns) in visual.attention_weights(models, digits).items():
        assert weights.shape == (2, 2, len(rows), len(columns))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]).double())
        if name == "encoder-only":
            tokens = torch.tensor([VOCABULARY.encode(rows)])
            expected = models[name].encode(tokens)[1]
            torch.testing.assert_close(weights, torch.stack(expected)[:, 0])
        if name == "decoder-only":
            assert (
                weights * ~decoder_only.causal_mask(len(rows), len(rows))[0, 0]
            ).abs().max() == 0
        with torch.no_grad():  # another model has other weights
            models[name].embedding.weight.normal_()
        other = visual.attention_weights(models, digits)[name][0]
        assert other.shape != weights.shape or not torch.allclose(other, weights)


def test_masked_and_allowed_cells_have_different_colors():
    figure, axis = visual.plt.subplots()
    mask = torch.tensor([[True, False], [True, True]])
    visual.draw_mask(axis, mask, ["a", "b"], ["a", "b"])
    image = axis.images[0]
    colors = image.cmap(image.norm(image.get_array()))[..., :3]
    dark, light = matplotlib.colors.to_rgb(visual.ALLOWED), matplotlib.colors.to_rgb(visual.MASKED)
    for row in range(2):
        for column in range(2):
            assert colors[row][column] == pytest.approx(dark if mask[row, column] else light)
    gray = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (dark, light)]
    assert abs(gray[0] - gray[1]) > 0.4  # also different in black and white
    visual.plt.close(figure)


def test_a_checkpoint_is_shown_with_its_own_constants(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visual, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(
        visual, "train_small", lambda name: (random_model(name.replace("-", "_")), {}, None)
    )
    MODELS["encoder_only"](d_model=24, num_heads=3, num_layers=5).save(tmp_path / "encoder_only.pt")
    (tmp_path / "decoder_only.pt").write_bytes(b"broken")
    models, origins, _, _ = visual.load_models()
    assert origins["encoder-only"].endswith(
        "checkpoints/encoder_only.pt: d_model 24, 5 layers, 3 heads"
    )
    assert models["encoder-only"].arguments["d_model"] == 24
    printed = capsys.readouterr().out
    assert "decoder_only.pt is damaged" in printed and "Training a small model instead" in printed
    assert "trained in this run" in origins["decoder-only"]


def test_figures_that_cannot_be_written_are_reported_in_one_line(workplace):
    (workplace.folder / "figures").write_text("a file where the folder should be")
    done = workplace.run("visualizations")
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "cannot write to figures/" in done.stderr
    )


def test_words_and_digits_are_paired_in_the_similarity_figure():
    assert [VOCABULARY.ids[w] - VOCABULARY.ids[d] for d, w in zip(DIGITS, WORDS)] == [10] * 10
    assert set(SCRIPTS) == {"encoder_only", "decoder_only", "encoder_decoder"}


# --- few sequences, candidates, and curves ----------------------------------------------------
@pytest.mark.parametrize("name", ["decoder-only", "encoder-decoder"])
def test_an_answer_of_given_length_has_exactly_that_length(name):
    model = random_model(name.replace("-", "_"))
    digits = [["4"], ["7", "0"], ["1", "2", "3"]]
    script = ARCHITECTURES[name][0]
    seen = []
    monkey = compare.exact_match
    try:
        compare.exact_match = lambda written, expected: seen.extend(written) or 0.0
        compare.exact_match_given_length(name, model, digits, digits)
    finally:
        compare.exact_match = monkey
    assert [len(row) for row in seen] == [1, 2, 3]
    assert all("<EOS>" not in row for row in seen)
    before = script.translate(model, digits)
    assert before == script.translate(model, digits)  # the hook was removed


@pytest.mark.parametrize("name", ["decoder-only", "encoder-decoder"])
def test_scoring_picks_the_digit_with_the_most_likely_words(name):
    model = random_model(name.replace("-", "_")).float()
    script = ARCHITECTURES[name][0]
    digits, words = ["4", "?", "7"], ["four", "zero", "seven"]
    scores = {}
    for digit in DIGITS:
        item = {**make_item(["4", digit, "7"]), "words": words, "target": VOCABULARY.encode(words)}
        with torch.no_grad():
            scores[digit] = -script.compute_loss(model, collate_fn([item])).item()
    best = max(scores, key=scores.get)
    assert compare.digit_by_scoring(name, model, digits, 1, words) == best


@pytest.mark.parametrize("damage", ["missing", "truncated", "noise", "other columns", "huge"])
def test_an_unreadable_history_gives_no_curves(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(visual, "RUNS", tmp_path)
    good = "architecture,step,loss,exact_match\n" + "".join(
        f"{name},1,0.5,0.5\n" for name in ARCHITECTURES
    )
    for file in ("steps.csv", "history.csv"):
        (tmp_path / file).write_text(good)
    assert visual.curves_of_last_run()["decoder-only"] == {
        "loss": [(1, 0.5)],
        "exact match": [(1, 0.5)],
    }
    content = {
        "truncated": good[: len(good) // 2],
        "noise": "\x00\x01 noise\n" * 9,
        "other columns": good.replace("exact_match", "score"),
        "huge": good.replace(",1,0.5", f",{10**400},0.5"),
    }
    if damage == "missing":
        (tmp_path / "history.csv").unlink()
    else:
        (tmp_path / "history.csv").write_text(content[damage])
    assert visual.curves_of_last_run() is None


# --- what the comparison really trains and measures -------------------------------------------
@pytest.fixture
def trained(monkeypatch):
    """A list that receives (architecture, model, steps, warmup steps) instead of training."""
    calls = []

    def record(name, model, num_steps, warmup_steps=compare.WARMUP_STEPS, **_):
        calls.append((name, model, num_steps, warmup_steps))
        return model.eval()

    monkeypatch.setattr(compare, "train", record)
    monkeypatch.setattr(compare, "NUM_SAMPLES", 600)
    return calls


def test_every_row_of_the_ablations_trains_what_it_names(trained, monkeypatch):
    monkeypatch.setattr(compare, "ABLATION_LAYERS", (1, 3))
    monkeypatch.setattr(compare, "ABLATION_STEPS", 7)
    measured = []
    monkeypatch.setattr(
        decoder_only, "translate", lambda model, digits: measured.append(model) or digits
    )
    compare.show_ablations()
    assert [call[1] for call in trained] == measured  # the model trained is the model measured
    rows = [trained[i : i + 2] for i in range(0, len(trained), 2)]
    assert [row[0] for row in compare.ABLATIONS] == [
        "baseline", "without positions", "without 1/sqrt(K)", "without residuals", "post-norm",
        "one head", "without warmup",
    ]  # fmt: skip
    for (title, *_), pair in zip(compare.ABLATIONS, rows):
        for (name, model, steps, warmup), layers in zip(pair, (1, 3)):
            attention = model.layers[0].self_attention
            found = {
                "without positions": not model.positional_encoding.table.any(),
                "without 1/sqrt(K)": len(attention.w_q._forward_hooks) == 1,
                "without residuals": is_changed(model, without_residuals=True),
                "post-norm": is_changed(model, without_residuals=False),
                "one head": attention.num_heads == 1,
                "without warmup": warmup == 0,
            }
            assert [change for change, is_on in found.items() if is_on] == (
                [] if title == "baseline" else [title]
            )
            assert (name, steps, len(model.layers)) == ("decoder-only", 7, layers)


@torch.no_grad()
def is_changed(model, without_residuals):
    """True if a layer has no residuals (or, if False, if its output is normalized)."""
    layer, x = model.layers[0], torch.randn(1, 3, compare.D_MODEL)
    out = layer(x)[0]
    if without_residuals:
        normalized = layer.norm1(x)
        attended, _ = layer.self_attention(normalized, normalized)
        return torch.allclose(out, layer.feed_forward(layer.norm2(attended)), atol=1e-5)
    return out.mean(-1).abs().max().item() < 1e-5


def test_the_padding_ablation_unmasks_cross_attention_and_nothing_else():
    seen = {"encoder": [], "cross": []}
    model = random_model("encoder_decoder")
    for layer in model.encoder_layers:
        layer.register_forward_pre_hook(lambda _, x: seen["encoder"].append(x[1]))
    for layer in model.decoder_layers:
        layer.register_forward_pre_hook(lambda _, x: seen["cross"].append(x[4]))
    compare.without_cross_padding_mask(model)
    SCRIPTS["encoder_decoder"].translate(model, [["4", "0", "7"], ["9"]])
    assert seen["cross"] and all(mask is None for mask in seen["cross"])
    assert all((~mask).sum() == 2 for mask in seen["encoder"])


def test_few_sequences_are_few_and_none_is_held_out(monkeypatch):
    monkeypatch.setattr(compare, "NUM_SAMPLES", 600)
    monkeypatch.setattr(compare, "BATCH_SIZE", 10)
    seen = []

    def record(script, model, train_loader, *_):
        seen.append({tuple(d) for batch in train_loader for d in batch["digits"]})
        return model

    monkeypatch.setattr(compare, "train_for", record)
    for name in ARCHITECTURES:
        for count in (5, 40, None):
            compare.train(name, None, 10, num_sequences=count)
    held_out = {tuple(digits) for digits in compare.held_out_sequences(10**6)[0]}
    everything = len(compare.loaders()[0].dataset)
    assert [len(rows) for rows in seen] == [5, 40, everything] * 3 and len(held_out) > 40
    assert seen[0] == seen[3] == seen[6] and seen[1] == seen[4]  # all three get the same rows
    assert not held_out & set().union(*seen)
    some = {tuple(digits) for digits in compare.held_out_sequences(20)[0]}
    assert some < held_out and len(some) == 20


def test_section_3_evaluates_held_out_rows_and_keeps_an_early_copy(monkeypatch):
    for name, value in {
        "NUM_SAMPLES": 400, "NUM_STEPS": 7, "EVALUATE_EVERY": 3, "UNDERTRAINED_STEPS": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(compare, name, value)
    sizes = []
    for script in SCRIPTS.values():
        monkeypatch.setattr(
            script, "evaluate", lambda model, loader: sizes.append(len(loader.dataset))
            or {"exact_match": 0.5, "loss": 1.0},
        )  # fmt: skip
    models, curves, undertrained = compare.train_on_one_budget()
    assert [step for step, *_ in curves["decoder-only"]] == [3, 6, 7]
    assert set(sizes) == {len(compare.loaders()[1].dataset)}
    final = models["encoder-decoder"]
    assert type(undertrained) is type(final)
    assert not torch.equal(undertrained.embedding.weight, final.embedding.weight)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_for_comparisons_equals_plain_steps(name):
    """Clipped steps at the scheduled rate, in training mode, over several epochs."""
    script, model_class, _ = ARCHITECTURES[name]
    models, watched = [], []
    for by_hand in (False, True):
        torch.manual_seed(2)
        model = model_class(d_model=16, num_heads=2, num_layers=1, d_ff=32, dropout=0.1)
        loader = create_dataloaders(300, 4, 100, 0)[0]
        torch.manual_seed(3)
        if not by_hand:

            def watch(step, loss, seconds, model=model):
                watched.append((step, loss))
                model.eval()  # as after an evaluation

            model = train_for(script, model, loader, 7, 0.01, 3, 0.3, watch)
            assert not model.training
        else:
            optimizer, scheduler = script.create_optimizer(model, 0.01, 7, 3)
            batches = [batch for _ in range(3) for batch in loader][:7]
            for step, batch in enumerate(batches):
                loss = script.compute_loss(model.train(), batch)
                assert watched[step] == (step + 1, pytest.approx(loss.item(), abs=1e-4))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                scheduler.step()
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# --- each figure shows the model that its title names -----------------------------------------
@pytest.fixture
def figures(monkeypatch):
    """{name: (figure, title)} of the figures drawn in a test."""
    saved = {}
    monkeypatch.setattr(
        visual, "save", lambda figure, name, title: saved.update({name: (figure, title)})
    )
    yield saved
    visual.plt.close("all")


def texts(figure):
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def images(figure):
    return [torch.tensor(image.get_array().data) for axis in figure.axes for image in axis.images]


def test_attention_figures_show_the_weights_and_origin_of_their_model(figures):
    models = {name: model.float() for name, model in by_architecture().items()}
    origins = {name: f"{name} from somewhere" for name in models}
    visual.attention_figures(models, origins)
    weights = visual.attention_weights(models, visual.SENTENCE.split())
    for name in ("encoder-only", "decoder-only"):
        figure, title = figures[f"attention_{name.replace('-', '_')}"]
        assert title.lower().startswith(name)
        assert f"key.   {name} from somewhere" in texts(figure)
        for image, expected in zip(images(figure), weights[name][0].flatten(0, 1)):
            torch.testing.assert_close(image, expected)
        assert set(weights[name][1]) <= texts(figure)


def test_the_alignment_figure_shows_the_head_that_its_title_names(figures):
    models = {name: model.float() for name, model in by_architecture().items()}
    visual.cross_attention_alignment(models, {"encoder-decoder": "from somewhere"})
    figure, title = figures["cross_attention_alignment"]
    layer, head = map(int, re.search(r"layer (\d+), head (\d+)", title).groups())
    written, weights = SCRIPTS["encoder_decoder"].cross_attention(
        models["encoder-decoder"], visual.SENTENCE.split()
    )
    torch.testing.assert_close(images(figure)[0], weights[layer, head])
    own = weights[:, :, :3].diagonal(dim1=-2, dim2=-1).mean(-1)
    assert own[layer, head] == own.max()
    assert "from somewhere" in texts(figure) and set(VOCABULARY.decode(written)) <= texts(figure)


def test_the_similarity_figure_shows_the_trained_model_and_an_untrained_one(figures):
    models = {name: model.float() for name, model in by_architecture().items()}
    visual.embedding_similarity(models, {"encoder-decoder": "from somewhere"})
    figure, title = figures["embedding_similarity"]
    torch.manual_seed(visual.SEED)
    trained = models["encoder-decoder"]
    untrained = type(trained)(**trained.arguments)
    own = []
    for image, model in zip(images(figure), (untrained, trained)):
        vectors = torch.nn.functional.normalize(model.embedding.weight[6:26].detach(), dim=-1)
        torch.testing.assert_close(image, vectors @ vectors.T)
        own.append(image[:10, 10:].diagonal().mean().item())
    assert title.endswith(f"{own[0]:+.2f} before, {own[1]:+.2f} after")
    assert "from somewhere" in texts(figure)


@pytest.mark.parametrize("seed", range(4))
def test_the_front_page_figure_survives_models_that_write_anything(seed, figures):
    torch.manual_seed(seed)
    models = {name: model.float() for name, model in by_architecture().items()}
    visual.three_models(models)
    shown = texts(figures["three_models"][0])
    written = models["decoder-only"].generate([[10, 6, 13, 4]], 5)[0]
    assert set(VOCABULARY.decode(written)) <= shown


def test_the_parameter_figure_counts_the_given_models(figures):
    models = by_architecture(num_layers=3)
    visual.parameters(models)
    figure, title = figures["parameters"]
    shown = {text.strip() for text in texts(figure)}
    shares = []
    for model in models.values():
        counts = parameters_by_component(model)
        assert f"{sum(counts.values()):,}" in shown
        shares.append(counts["feed-forward"] / sum(counts.values()))
    assert f"{min(shares):.0%} to {max(shares):.0%}" in title


def test_the_generation_figures_use_the_undertrained_models(figures, monkeypatch):
    models = {name: model.float() for name, model in by_architecture().items()}
    prefixes = []
    monkeypatch.setattr(
        decoder_only, "most_uncertain", lambda model, _: prefixes.append(model) or ["4", "<SEP>"]
    )
    visual.sampling_strategies(models)
    assert prefixes == [models["decoder-only"]]
    figure, title = figures["sampling_strategies"]
    assert title.endswith('the token after "4 <SEP>"')
    with torch.no_grad():
        logits = models["decoder-only"](torch.tensor([[10, 4]]))[0, -1]
    for axis, options in zip(
        figure.axes, ({}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 1}, {"top_k": 3})
    ):
        filtered = decoder_only.filter_logits(logits[None], **options)[0].softmax(-1)
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == pytest.approx(filtered[logits.topk(10).indices].tolist(), abs=1e-6)

    examples = [(["4", "0"], ["four", "zero"], ["four"])]
    monkeypatch.setattr(SCRIPTS["encoder_decoder"], "evaluate", lambda *_: {"examples": examples})
    visual.beam_search_tree(models)
    figure, title = figures["beam_search_tree"]
    trace = []
    found = models["encoder-decoder"].beam_search([[10, 6]], 3, 1.0, 4, trace)[0]
    nodes = [text for text in texts(figure) if re.search(r"\n-", text)]
    sums = {f"{VOCABULARY.tokens[t]}\n{s:.2f}" for step in trace for _, t, s, _ in step}
    assert {node.split(" /")[0] for node in nodes} == sums
    assert "for 4 0:" in title and ("correct" in title) == (found[0].tokens == [20, 16, 2])


def test_the_learning_rate_figure_shows_the_rates_of_train_all(figures):
    visual.learning_rate()
    (line,) = [line for line in figures["learning_rate"][0].axes[0].lines if len(line.get_xdata())
               > 9]  # fmt: skip
    model = MODELS["decoder_only"](d_model=16, num_heads=2)
    total = train_all.NUM_EPOCHS * 109
    optimizer, scheduler = train_all.create_optimizer(model, total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert list(line.get_ydata())[:total] == pytest.approx(rates)


def test_learning_curves_name_the_run_they_come_from(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(visual, "RUNS", tmp_path)
    curves = {name: {"loss": [(1, 2.0), (2, 1.0)], "exact match": [(2, 0.25)]}
              for name in ARCHITECTURES}  # fmt: skip
    visual.learning_curves(curves)
    figure, _ = figures["learning_curves"]
    assert "small models, trained here" in texts(figure)
    for name in ARCHITECTURES:
        assert f"{name}, ends at 25.0%" in texts(figure)
