"""The figures: each shows what its title and its labels say, of the model that it names."""
import math
import re

from conftest import (MODELS, ROOT, SCRIPTS, finished, random_model, random_models, refused, run_of,
                      steps_of)
import matplotlib.image
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text

import decoder_only
import train_all
import visualizations as visual
from encoder_decoder import cross_attention, record_beam_search
from housekeeping import save_model
from quick_start import ARCHITECTURES
from toy_dataset import EOS, MASK, SEP, VOCABULARY, WORD_OF, create_dataloaders
from training import lr_factor, parameters_by_component

ORIGINS = {name: f"{name} from somewhere" for name in ARCHITECTURES}


@pytest.fixture
def models():
    """Random models. Their numbers of layers and heads and of the digits in a figure differ."""
    return {name: random_model(name.replace("-", "_"), d_model=12, num_layers=4).float()
            for name in ARCHITECTURES}


@pytest.fixture
def figures(monkeypatch):
    """{name: (figure, title)} of the figures drawn in a test."""
    saved = {}
    monkeypatch.setattr(visual, "save",
                        lambda figure, name, title: saved.update({name: (figure, title)}))
    yield saved
    visual.plt.close("all")


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text)}


def names(ticks):
    return [tick.get_text() for tick in ticks]


def image(axis):
    return torch.tensor(axis.images[0].get_array().data)


def lines_of(axis):
    """{label: line} of the lines that have one."""
    return {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}


# --- A run ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["visualizations"], ids=run_of)
def test_a_run_makes_every_committed_figure_and_none_is_blank(script):
    place, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    named = re.findall(r"^  figures/(\w+\.png)   \S", done.stdout, flags=re.MULTILINE)
    made = list((place.folder / "figures").iterdir())
    assert sorted(named) == sorted(path.name for path in made)
    assert {path.name for path in (ROOT / "figures").glob("*.png")} <= set(named)
    for path in made:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[1] <= 1500  # fits the width of a README
        assert pixels.std() > 0.02 and (pixels.min(-1) < 0.9).mean() > 0.01
        assert path.stat().st_size < 200_000


@pytest.mark.parametrize("module, name, value", [
    *((visual, "SENTENCE", value) for value in ("", "four", "4 x", 407, "7 " * 21)),
    (visual, "NUM_HEADS", 3), (visual, "DEVICE", "tpu"), (train_all, "LEARNING_RATE", "a")])
def test_constants_that_cannot_be_drawn_are_rejected_at_once(
        module, name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, name, value)
    error = refused(visual, monkeypatch, capsys, FIGURES=tmp_path)
    assert f"{name}={value!r}" in error and not list(tmp_path.iterdir())


def test_figures_that_cannot_be_written_are_reported_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "figures").write_text("a file where the folder should be")
    error = refused(visual, monkeypatch, capsys, FIGURES=tmp_path / "figures")
    assert re.search(r"figures/\w+\.png \(.*\): make it writable", error)


# --- Positions, masks, and diagrams ---------------------------------------------------
def test_positions_are_drawn_from_the_formula(figures):
    for draw in (visual.positional_encoding_heatmap, visual.positional_encoding_curves,
                 visual.positional_distance):
        draw()
    heat, waves, distance = (figure.axes for figure, _ in figures.values())
    angles = torch.arange(64.0)[:, None] * 10000 ** (-torch.arange(0, 64, 2) / 64)
    table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    torch.testing.assert_close(image(heat[0]), table)
    torch.testing.assert_close(image(distance[0]), table @ table.T / 32)
    for label, line in lines_of(waves[0]).items():
        dimension, wavelength = map(int, re.findall(r"\d+", label.replace(",", "")))
        assert 2 * math.pi / angles[1, dimension // 2] == pytest.approx(wavelength, abs=0.5)
        assert line.get_ydata() == pytest.approx(table[:, dimension].tolist())
    for label, line in lines_of(distance[1]).items():
        start = int(label.split()[-1])
        assert line.get_ydata() == pytest.approx(
            [(table[start] @ table[start + d] / 32).item() for d in line.get_xdata()], abs=1e-5)


def test_the_drawn_masks_are_those_of_their_titles(figures):
    visual.masks()
    visual.who_sees_whom()
    row, pair = ["<SOS>", "nine", "<PAD>", "<PAD>"], "4 0 7 <SEP> four zero seven".split()
    target, dark, light = ["<SOS>", *pair[4:]], to_hex(visual.ALLOWED), to_hex(visual.MASKED)
    rules = [("padding", row, row, lambda t, s: s < 2), ("causal:", row, row, lambda t, s: s <= t),
             ("both:", row, row, lambda t, s: s < 2 and s <= t),
             ("encoder-only", pair, pair, lambda t, s: True),
             ("decoder-only", pair, pair, lambda t, s: s <= t),
             ("decoder of", target, pair[:3] + target, lambda t, s: s - 3 <= t)]
    axes = [axis for figure, _ in figures.values() for axis in figure.axes]
    for axis, (title, rows, columns, rule) in zip(axes, rules):
        drawn = axis.images[0]
        assert [[to_hex(color) for color in row] for row in drawn.cmap(drawn.norm(
            drawn.get_array()))] == [[dark if rule(t, s) else light for s in range(len(columns))]
                                     for t in range(len(rows))]
        assert axis.get_title().startswith(title) and names(axis.get_yticklabels()) == rows
        assert names(axis.get_xticklabels()) == columns
    for figure, _ in figures.values():
        (legend,) = figure.legends
        colors = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
        assert list(zip(names(legend.get_texts()), colors)) == [("may attend", dark),
                                                                ("masked", light)]


BOXES = {"embedding * sqrt(D) + position": "positional_encoding", "layer norm": "norm",
         "self-attention": "self_attention", "cross-attention": "cross_attention",
         "feed-forward": "feed_forward", "output = embedding, transposed": "output"}


@pytest.mark.parametrize("name", MODELS)
def test_a_diagram_shows_the_modules_in_the_order_in_which_they_run(name, figures):
    visual.architecture_single()
    visual.architecture_encoder_decoder()
    model, ran = random_model(name, num_layers=1), []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path.split(".")[-1]))
    model(*[torch.tensor([[10, 6]])] * (1 + (name == "encoder_decoder")))
    ran = [re.sub(r"^(encoder_|final_)?norm.*", "norm", step) for step in ran]
    axis = figures[f"architecture_{name}"][0].axes[0]
    drawn = sorted((text.get_position(), text.get_text()) for text in axis.texts)
    boxes = [(box, place) for place, text in drawn for words, box in BOXES.items() if words in text]
    assert [box for box, _ in boxes] == [step for step in ran if step in BOXES.values()]
    padding, causal = "self-attention, padding mask", "causal self-attention"
    assert [text for _, text in drawn if "self-attention" in text] == {
        "encoder_only": [padding], "decoder_only": [causal]}.get(name, [padding, causal])
    size = "S" if name == "encoder_only" else "T"
    assert {f"(B, {size}) ids", f"(B, {size}, D)", f"(B, {size}, V) logits"} <= texts(axis)
    if name == "encoder_decoder":  # the arrow from memory ends at cross-attention
        (arrow,) = [patch for patch in axis.patches
                    if to_hex(patch.get_edgecolor()) == visual.RED.lower()]
        x, y = dict(boxes)["cross_attention"]
        assert arrow._posA_posB[1] == (pytest.approx(x - 1.34), y)


# --- Training -------------------------------------------------------------------------
def test_small_models_are_scored_on_held_out_rows_and_copied_early(monkeypatch):
    for name, value in {"BATCH_SIZE": 500, "WARMUP_STEPS": 2, "TRAIN_EPOCHS": 1,
                        "EVALUATE_EVERY": 5, "UNDERTRAINED_STEPS": 4}.items():
        monkeypatch.setattr(visual, name, value)
    scored = []

    def translate(model, digits):
        assert not model.training
        scored.append(digits)
        return [[WORD_OF[d] for d in row] if int(row[-1]) < len(scored) else [] for row in digits]

    monkeypatch.setattr(decoder_only, "translate", translate)
    steps = steps_of(decoder_only, monkeypatch)
    model, curves, undertrained = visual.train_small("decoder-only")
    digits, weights, losses = zip(*steps)
    held_out = {tuple(item["digits"]) for item in create_dataloaders(seed=0)[1].dataset}
    assert {tuple(row) for rows in scored for row in rows} <= held_out and len(scored[0]) > 150
    assert not held_out & {tuple(row) for rows in digits for row in rows}
    assert curves["loss"] == list(enumerate(losses, 1)) and len(losses) == 11
    shares = [sum(int(row[-1]) < n for row in rows) / len(rows) for n, rows in enumerate(scored, 1)]
    assert curves["exact match"] == list(zip((5, 10, 11), shares))
    assert undertrained.output.weight.equal(weights[4])
    assert not model.output.weight.equal(weights[10])


def test_a_checkpoint_is_shown_with_its_own_constants(tmp_path, monkeypatch, capsys, models):
    monkeypatch.setattr(visual, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(visual, "train_small", lambda name: (models[name], "curves", f"early {name}"))
    good = MODELS["encoder_only"](d_model=24, num_heads=3, num_layers=5)
    save_model(good, tmp_path / "encoder_only.pt", 0.95, {})
    save_model(MODELS["decoder_only"](), tmp_path / "decoder_only.pt", 0.85, {"DROPOUT": 0.7})
    (tmp_path / "encoder_decoder.pt").write_bytes(b"broken")
    found, origins, curves, early = visual.load_models()
    assert list(origins.values()) == [
        "encoder-only, checkpoints/encoder_only.pt: d_model 24, 5 layers, 3 heads",
        *(f"{name}, trained in this run: d_model 12, 4 layers, 2 heads" for name in early)]
    assert found["encoder-only"].embedding.weight.equal(good.embedding.weight)
    assert curves.keys() == early.keys() == {"decoder-only", "encoder-decoder"}
    for name in early:
        assert found[name] is models[name] and early[name] == f"early {name}"
    printed = capsys.readouterr().out
    for reason in ("85.0%, trained with DROPOUT=0.7", "encoder_decoder.pt cannot be used"):
        assert re.search(f"{reason}.* Training a small model instead", printed)


@pytest.mark.parametrize("damage", [None, "missing", "cut", "noise", "other columns"])
def test_curves_come_from_a_whole_history_or_from_small_models(
        damage, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(visual, "RUNS", tmp_path)
    good = "architecture,step,loss,exact_match\n" + "".join(
        f"{name},{step},{step + n}.5,0.{n}{step:02}\n" for n, name in enumerate(ARCHITECTURES)
        for step in range(1, 16))
    (tmp_path / "steps.csv").write_text(good)
    if damage != "missing":
        (tmp_path / "history.csv").write_text(
            {"cut": good[:len(good) // 2], "noise": "\x00\x01 noise\n" * 9, None: good,
             "other columns": good.replace("exact_match", "score")}[damage])
    visual.learning_curves({
        name: {"loss": [(step, 2.0 + n) for step in (1, 2)], "exact match": [(2, 0.25)]}
        for n, name in enumerate(ARCHITECTURES)})
    figure, _ = figures["learning_curves"]
    assert ("small models, trained here" if damage else "the last run of train_all.py") in texts(
        figure)
    means, exact = map(lines_of, figure.axes)
    assert names(figure.axes[1].get_legend().get_texts()) == list(exact)  # one for both sides
    for n, (name, label) in enumerate(zip(ARCHITECTURES, exact)):
        assert label == f"{name}, ends at {25.0 if damage else 10 * n + 1.5}%"
        for line in (means[name], exact[label]):
            assert (line.get_color(), line.get_linestyle()) == visual.OF[name]
        assert list(exact[label].get_ydata()) == pytest.approx(
            [25] if damage else [10 * n + step / 10 for step in range(1, 16)])
        assert list(means[name].get_ydata()) == pytest.approx(
            [2.0 + n] * 2 if damage else [  # each is the mean of up to 10 losses
                (max(1, step - 9) + step) / 2 + n + 0.5 for step in range(1, 16)])


def test_the_learning_rate_figure_shows_the_rates_of_train_all(figures):
    visual.learning_rate()
    axis = figures["learning_rate"][0].axes[0]
    training, _ = create_dataloaders(train_all.NUM_SAMPLES, train_all.MAX_DIGITS, 32, 0,
                                     train_all.VALIDATION_SHARE)
    total = train_all.NUM_EPOCHS * train_all.steps_per_epoch(len(training.dataset))
    warmup, peak = train_all.WARMUP_STEPS, train_all.LEARNING_RATE
    rates, *marked = axis.lines
    assert list(rates.get_ydata()) == pytest.approx([peak * lr_factor(
        step, total, warmup, train_all.MIN_LEARNING_RATE / peak) for step in range(total + 60)])
    assert [line.get_xdata()[0] for line in marked] == [0, warmup - 1, total - 1]


# --- Numbers about the models ---------------------------------------------------------
def test_the_parameter_figure_counts_the_given_models(models, figures):
    visual.parameters(models)
    figure, title = figures["parameters"]
    shares, bars = [], {bar.get_label(): bar for bar in figure.axes[0].containers}
    for row, model in enumerate(models.values()):
        counts, end = parameters_by_component(model), 0
        for component, bar in bars.items():
            assert (bar[row].get_x(), bar[row].get_width()) == (end, counts.get(component, 0))
            end += counts.get(component, 0)
        assert end == sum(counts.values()) and f" {end:,}" in texts(figure)
        shares.append(counts["feed-forward"] / end)
    assert f"{min(shares):.0%} to {max(shares):.0%}" in title


def test_only_unscaled_scores_concentrate_on_one_key(figures):
    visual.softmax_scaling()
    lines = lines_of(figures["softmax_scaling"][0].axes[0])
    scaled, plain = (list(lines[f"softmax({name})"].get_ydata()) for name in ("qk / sqrt(K)", "qk"))
    assert plain == sorted(plain) and plain[0] < 0.5 and plain[-1] > 0.9
    assert max(scaled) < 0.3 and max(scaled) - min(scaled) < 0.05


def test_the_cache_figure_states_the_time_that_is_saved(figures, monkeypatch):
    monkeypatch.setattr(visual, "time_generation", lambda model, lengths: {
        True: [n / 1000 for n in lengths], False: [n * n / 25600 for n in lengths]})
    visual.key_value_cache()
    figure, title = figures["key_value_cache"]
    lines = {label.split()[0]: line for label, line in lines_of(figure.axes[0]).items()}
    assert [list(lines[name].get_ydata())[::5] for name in ("with", "without")] == [
        [16, 256], [10, 2560]]
    assert title == "At 256 tokens, the cache saves 90% of the time"


def test_the_strategies_filter_the_distribution_of_their_prefix(models, figures, monkeypatch):
    monkeypatch.setattr(visual, "SENTENCE", "4 7")
    visual.sampling_strategies(models)
    figure, title = figures["sampling_strategies"]
    assert title.endswith('the token after "4 7 <SEP>"')
    with torch.no_grad():
        logits = models["decoder-only"](torch.tensor([[10, 13, SEP]]))[0, -1]
    for axis in figure.axes:
        found = dict(re.findall(r"(temperature|top_k|top_p) =? ?([\d.]+)", axis.get_title()))
        options = {name: int(n) if name == "top_k" else float(n) for name, n in found.items()}
        expected = decoder_only.filter_logits(logits[None], **options)[0].softmax(-1)
        assert axis.get_title().endswith(f": {(expected > 0).sum()} of 26 left")
        assert [bar.get_height() for bar in axis.patches] == pytest.approx(
            expected[logits.topk(10).indices].tolist(), abs=1e-6)


@pytest.mark.parametrize("verdict", ["correct", "wrong"])
def test_the_tree_shows_the_beam_search_and_its_best_answer(verdict, figures, monkeypatch):
    digits = ["4", "0", "7"]
    for model in random_models("encoder_decoder"):
        steps, found = record_beam_search(model, digits, 3, 1.0)
        if len(best := found[0].tokens) > 1 and best[-1] == EOS:
            break
    words = VOCABULARY.decode(best[:-1]) + ["one"] * (verdict == "wrong")
    monkeypatch.setattr(SCRIPTS["encoder_decoder"], "evaluate",
                        lambda *_: {"examples": [(digits, words, [])]})
    visual.beam_search_tree({"encoder-decoder": model})
    figure, title = figures["beam_search_tree"]
    assert "for 4 0 7:" in title and f"({verdict} answer)" in title
    places, nodes, edges = {(): (0, 0)}, {((0, 0), "<SOS>", False)}, set()
    for step, candidates in enumerate(steps, 1):
        for rank, (ids, total, ended) in enumerate(candidates):
            places[tuple(ids)] = place = (step, 1 - rank)
            score, on_best = f" / {step}\n= {total / step:.2f}" * ended, ids == best[:len(ids)]
            nodes.add((place, f"{VOCABULARY.tokens[ids[-1]]}\n{total:.2f}{score}", on_best))
            edges.add((places[tuple(ids[:-1])], place, on_best))
    axis, red = figure.axes[0], to_hex(visual.RED)
    assert nodes == {(text.get_position(), text.get_text(), to_hex(
        text.get_bbox_patch().get_edgecolor()) == red) for text in axis.texts}
    assert edges == {(*zip(*line.get_data()), to_hex(line.get_color()) == red)
                     for line in axis.lines}


# --- Attention and embeddings ---------------------------------------------------------
@torch.no_grad()
def attention_of(models, digits):
    """{name: (weights (layers, H, T, S), keys, first query that predicts, what is predicted)}"""
    bert, gpt, t5 = models.values()
    n, prompt = len(digits), [*VOCABULARY.encode(digits), SEP]
    written, (target, cross) = gpt.generate([prompt], n + 2)[0], cross_attention(t5, digits)
    masked, stream = prompt + [MASK] * n, prompt + written[:-1]
    return {"encoder-only": (torch.stack(bert.run_encoder(torch.tensor([masked]))[1])[:, 0],
                             masked, n + 1, SCRIPTS["encoder_only"].translate(bert, [digits])[0]),
            "decoder-only": (torch.stack(gpt.run_decoder(torch.tensor([stream]))[1])[:, 0],
                             stream, n, VOCABULARY.decode(written)),
            "encoder-decoder": (cross, prompt[:n], 0, VOCABULARY.decode(target))}


def best_head(weights, n):
    """The layer and head in which query i attends most to key i, and this mean weight."""
    count = min(n, weights.size(2))
    own = {(layer, head): sum(weights[layer, head, i, i].item() for i in range(count)) / count
           for layer in range(weights.size(0)) for head in range(weights.size(1))}
    return *max(own, key=own.get), max(own.values())


@pytest.mark.parametrize("digits", ["4 0 7", " ".join("40725819361094837265")])  # 20: the limit
def test_attention_figures_show_the_weights_and_origin_of_their_model(
        digits, models, figures, monkeypatch):
    monkeypatch.setattr(visual, "SENTENCE", digits)
    visual.attention_figures(models, ORIGINS)
    visual.cross_attention_alignment(models, ORIGINS)
    for name, (weights, keys, first, outputs) in attention_of(models, digits.split()).items():
        cross = name == "encoder-decoder"
        figure, title = figures["cross_attention_alignment" if cross
                                else f"attention_{name.replace('-', '_')}"]
        assert any(text.endswith(ORIGINS[name]) for text in texts(figure))
        layer, head, own = best_head(weights[:, :, first:], len(digits.split()))
        if cross:
            assert f"(layer {layer}, head {head})" in title
            assert {(text.get_position(), text.get_text()) for text in figure.axes[0].texts} == {
                ((s, t), f"{weight:.2f}") for t, row in enumerate(weights[layer, head].tolist())
                for s, weight in enumerate(row)}
        shown = figure.axes[:1 if cross else 4 * 2]
        for axis in shown:
            if not cross:
                layer, head = map(int, re.findall(r"\d+", axis.get_title()))
            torch.testing.assert_close(image(axis), weights[layer, head])
            assert names(axis.get_xticklabels()) == VOCABULARY.decode(keys)
        assert names(shown[0].get_yticklabels()) == outputs if cross else VOCABULARY.decode(keys)
        assert name != "encoder-only" or f" {own:.0%} of " in title


def test_the_similarity_figure_shows_the_trained_model_and_an_untrained_one(models, figures):
    visual.embedding_similarity(models, ORIGINS)
    figure, title = figures["embedding_similarity"]
    trained, own = models["encoder-decoder"], []
    torch.manual_seed(visual.SEED)
    for axis, model in zip(figure.axes, (type(trained)(**trained.arguments), trained)):
        vectors = torch.nn.functional.normalize(model.embedding.weight[6:26].detach(), dim=-1)
        torch.testing.assert_close(image(axis), vectors @ vectors.T)
        own.append(sum((vectors[i] @ vectors[i + 10]).item() for i in range(10)) / 10)
        assert names(axis.get_xticklabels()) == [*WORD_OF, *WORD_OF.values()]
    assert title.endswith(f"{own[0]:+.2f} before, {own[1]:+.2f} after")
    assert ORIGINS["encoder-decoder"] in texts(figure)


@pytest.mark.parametrize("seed", range(4))
def test_the_front_page_figure_links_what_the_models_attend_to(seed, figures):
    torch.manual_seed(seed)
    models = {name: random_model(name.replace("-", "_"), num_layers=4).float()
              for name in ARCHITECTURES}
    visual.three_models(models)
    rules = {"encoder-only": lambda s, t: True, "decoder-only": lambda s, t: s <= t + 3,
             "encoder-decoder": lambda s, t: s - 3 <= t}
    for axis, (name, (weights, keys, first, outputs)) in zip(
            figures["three_models"][0].axes, attention_of(models, ["4", "0", "7"]).items()):
        inputs, links = VOCABULARY.decode(keys), {}
        if name == "encoder-decoder":
            inputs += ["<SOS>", *outputs[:-1]]
        shift = len(inputs) - len(outputs)
        for line in axis.lines:
            thick = to_hex(line.get_color()) != visual.GRAY
            links[(thick, *line.get_xdata())] = line.get_linewidth() if thick else 0
        layer, head, _ = best_head(weights[:, :, first:], 3)
        expected = {(False, s, t + shift): 0 for t in range(len(outputs))
                    for s in range(len(inputs)) if rules[name](s, t)}
        expected |= {(True, s, t + shift): 6 * weight for t, row in enumerate(
            weights[layer, head, first:].tolist()) for s, weight in enumerate(row) if weight > 0.05}
        assert links == pytest.approx(expected)
        shown = sorted((text.get_position()[::-1], text.get_text()) for text in axis.texts)
        assert [text for _, text in shown] == inputs + outputs and axis.get_title().startswith(name)
