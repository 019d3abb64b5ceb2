"""The figures: each shows what its title and its labels say, of the model that it names."""
import re

from conftest import (MODELS, ROOT, SCRIPTS, finished, random_model, random_models, random_trio,
                      refused, run_of, steps_of)
import matplotlib.image
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text

import decoder_only
import train_all
import visualizations as visual
from encoder_decoder import cross_attention, record_beam_search
import housekeeping
from housekeeping import save_model
from toy_dataset import EOS, MASK, SEP, VOCABULARY, WORD_OF, create_dataloaders
from training import lr_factor, parameters_by_component

ORIGINS = {name: f"{name} from somewhere" for name in visual.OF}


@pytest.fixture
def models():
    """Random models. Their numbers of layers and heads and of the digits in a figure differ."""
    return {name: model.float() for name, model in random_trio(d_model=12, num_layers=4).items()}


@pytest.fixture
def draw(monkeypatch):
    """draw(file, *arguments, function=file) returns (figure, title) and writes nothing."""
    def draw(file, *arguments, function=None):
        getattr(visual, function or file)(*arguments)
        return saved[file]

    saved = {}
    monkeypatch.setattr(visual, "save", lambda *saving: saved.update({saving[1]: saving[::2]}))
    yield draw
    visual.plt.close("all")


def names(found):
    return [text.get_text() for text in found]


def image(axis):
    return torch.tensor(axis.images[0].get_array().data)


def lines_of(axis):
    return {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}


# --- A run ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["visualizations"], ids=run_of)
def test_a_run_makes_every_committed_figure_and_none_is_blank(script):
    place, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    named = re.findall(r"^  figures/(\w+\.png)   \S", done.stdout, flags=re.MULTILINE)
    made = sorted((place.folder / "figures").iterdir())
    assert sorted(named) == [path.name for path in made]
    assert {path.name for path in (ROOT / "figures").glob("*.png")} <= set(named)
    for path in made:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[1] <= 1500 and path.stat().st_size < 200_000  # fits a README
        assert pixels.std() > 0.02 and (pixels.min(-1) < 0.9).mean() > 0.01


@pytest.mark.parametrize("module, name, value", [
    *((visual, "SENTENCE", value) for value in ("", "four", "4 x", 407, "7 " * 21)),
    (visual, "NUM_HEADS", 3), (train_all, "LEARNING_RATE", "a"), (train_all, "WARMUP_STEPS", 9999),
    (visual, "FIGURES", ROOT / "LICENSE" / "figures")])
def test_what_cannot_be_drawn_or_written_is_rejected_at_once(
        module, name, value, monkeypatch, capsys):
    monkeypatch.setattr(visual, "FIGURES", ROOT / "LICENSE")  # a file cannot be a folder
    monkeypatch.setattr(module, name, value)
    expected = "make it writable" if name == "FIGURES" else f"{name}={value!r}"
    assert expected in refused(visual, monkeypatch, capsys)


# --- Masks, and diagrams --------------------------------------------------------------
def test_the_drawn_masks_are_those_of_their_titles(draw):
    row, pair = ["<SOS>", "nine", "<PAD>", "<PAD>"], "4 0 7 <SEP> four zero seven".split()
    target, dark, light = ["<SOS>", *pair[4:]], to_hex(visual.ALLOWED), to_hex(visual.MASKED)
    rules = [("padding", row, row, lambda t, s: s < 2), ("causal:", row, row, lambda t, s: s <= t),
             ("both:", row, row, lambda t, s: s < 2 and s <= t),
             ("encoder-only", pair, pair, lambda t, s: True),
             ("decoder-only", pair, pair, lambda t, s: s <= t),
             ("decoder of", target, pair[:3] + target, lambda t, s: s - 3 <= t)]
    figures = [draw(name)[0] for name in ("masks", "who_sees_whom")]
    for axis, (title, rows, columns, rule) in zip(figures[0].axes + figures[1].axes, rules):
        shown = axis.images[0]
        colors = [[to_hex(color) for color in row] for row in shown.cmap(shown.norm(image(axis)))]
        assert colors == [[dark if rule(t, s) else light for s in range(len(columns))]
                          for t in range(len(rows))] and axis.get_title().startswith(title)
        assert [names(axis.get_yticklabels()), names(axis.get_xticklabels())] == [rows, columns]
    for (legend,) in (figure.legends for figure in figures):
        colors = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
        assert dict(zip(names(legend.get_texts()), colors)) == {"may attend": dark, "masked": light}


BOXES = {"embedding * sqrt(D) + position": "positional_encoding", "layer norm": "norm",
         "self-attention": "self_attention", "cross-attention": "cross_attention",
         "feed-forward": "feed_forward", "output = embedding, transposed": "output"}


@pytest.mark.parametrize("name", MODELS)
def test_a_diagram_shows_the_modules_in_the_order_in_which_they_run(name, draw):
    function = "architecture_single" if name[7:] == "_only" else f"architecture_{name}"
    axis = draw(f"architecture_{name}", function=function)[0].axes[0]
    drawn = [text for _, text in sorted((text.get_position(), text.get_text())
                                        for text in axis.texts)]  # column by column, from below
    model, ran = random_model(name, num_layers=1), []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path.split(".")[-1]))
    model(*[torch.tensor([[10, 6]])] * (2 if name == "encoder_decoder" else 1))
    ran = [re.sub(r"^(encoder_|final_)?norm.*", "norm", step) for step in ran]
    boxes = [box for text in drawn for words, box in BOXES.items() if words in text]
    assert boxes == [step for step in ran if step in BOXES.values()]
    assert ("self-attention, padding mask" in drawn) == (name != "decoder_only")
    assert ("causal self-attention" in drawn) == (name != "encoder_only")


# --- Training -------------------------------------------------------------------------
def test_small_models_are_scored_on_held_out_rows_and_copied_early(monkeypatch):
    for name, value in {"BATCH_SIZE": 500, "WARMUP_STEPS": 2, "TRAIN_EPOCHS": 1,
                        "EVALUATE_EVERY": 5, "UNDERTRAINED_STEPS": 4}.items():
        monkeypatch.setattr(visual, name, value)
    scored, steps = [], steps_of(decoder_only, monkeypatch)
    monkeypatch.setattr(decoder_only, "translate", lambda model, rows: scored.append(rows) or [
        [WORD_OF[d] for d in row] if int(row[-1]) < len(scored) else []
        for row in rows])
    model, curves, undertrained = visual.train_small("decoder-only")
    digits, weights, losses = zip(*steps)
    held_out = {tuple(item["digits"]) for item in create_dataloaders(seed=0)[1].dataset}
    assert {tuple(row) for rows in scored for row in rows} <= held_out and len(scored[0]) > 150
    assert not held_out & {tuple(row) for rows in digits for row in rows}
    shares = [sum(int(row[-1]) < n for row in rows) / len(rows) for n, rows in enumerate(scored, 1)]
    assert curves == {"loss": list(enumerate(losses, 1)),
                      "exact match": list(zip((5, 10, 11), shares))}
    assert undertrained.output.weight.equal(weights[4])
    assert not model.output.weight.equal(weights[10])


def test_a_checkpoint_is_shown_with_its_own_constants(tmp_path, monkeypatch, capsys, models):
    monkeypatch.setattr(housekeeping, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(visual, "train_small", lambda name: (models[name], [], f"early {name}"))
    good = MODELS["encoder_only"](d_model=24, num_heads=3, num_layers=5)
    save_model(good, tmp_path / "encoder_only.pt", 0.95, {})
    save_model(MODELS["decoder_only"](), tmp_path / "decoder_only.pt", 0.85, {"DROPOUT": 0.7})
    found, origins, curves, early = visual.load_models()
    small = ["decoder-only", "encoder-decoder"]
    assert list(origins.values()) == [
        "encoder-only, checkpoints/encoder_only.pt: d_model 24, 5 layers, 3 heads",
        *(f"{name}, trained in this run: d_model 12, 4 layers, 2 heads" for name in small)]
    assert found["encoder-only"].embedding.weight.equal(good.embedding.weight)
    assert [*curves] == small and early == {name: f"early {name}" for name in small}
    assert all(found[name] is models[name] for name in small)
    assert re.search("85.0%, trained with DROPOUT=0.7. Training a small model.*\n(?s:.*)"
                     "no encoder_decoder.pt .* Training a small", capsys.readouterr().out)


@pytest.mark.parametrize("damage", [None, "missing", "cut", "noise", "other columns"])
def test_curves_come_from_a_whole_history_or_from_small_models(damage, tmp_path, monkeypatch, draw):
    monkeypatch.setattr(visual, "RUNS", tmp_path)
    good = "architecture,step,loss,exact_match\n" + "".join(
        f"{name},{step},{step + n}.5,0.{n}{step:02}\n" for n, name in enumerate(visual.OF)
        for step in range(1, 16))
    (tmp_path / "steps.csv").write_text(good)
    if damage != "missing":
        (tmp_path / "history.csv").write_text({
            "cut": good[:len(good) // 2], "noise": "\x00\x01 noise\n" * 9, None: good,
            "other columns": good.replace("exact_match", "score")}[damage])
    figure, _ = draw("learning_curves", {
        name: {"loss": [(1, 2.0 + n), (2, 1.0)], "exact match": [(2, 0.25)]}
        for n, name in enumerate(visual.OF)})
    source = "small models, trained here" if damage else "the last run of train_all.py"
    means, exact = map(lines_of, figure.axes)
    assert names(figure.axes[1].get_legend().get_texts()) == [*exact]  # one for both sides
    for n, (name, label) in enumerate(zip(visual.OF, exact)):
        assert label == f"{name}, ends at {25.0 if damage else 10 * n + 1.5}%"
        for line, values in ((exact[label], [25] if damage else [
                10 * n + step / 10 for step in range(1, 16)]), (means[name], [2 + n, 1.5 + n / 2]
                if damage else [(max(1, step - 9) + step) / 2 + n + 0.5 for step in range(1, 16)])):
            assert (line.get_color(), line.get_linestyle()) == visual.OF[name]
            assert list(line.get_ydata()) == pytest.approx(values)  # means of up to 10 losses
    assert source in names(figure.findobj(Text))


def test_the_learning_rate_figure_shows_the_rates_of_train_all(draw, monkeypatch):
    monkeypatch.setattr(train_all, "MIN_LEARNING_RATE", 2e-4)
    rates, *marked = draw("learning_rate")[0].axes[0].lines
    training, _ = create_dataloaders(train_all.NUM_SAMPLES, train_all.MAX_DIGITS, 32, 0,
                                     train_all.VALIDATION_SHARE)
    total = train_all.NUM_EPOCHS * train_all.steps_per_epoch(len(training.dataset))
    warmup, peak = train_all.WARMUP_STEPS, train_all.LEARNING_RATE
    assert list(rates.get_ydata()) == pytest.approx([peak * lr_factor(
        step, total, warmup, train_all.MIN_LEARNING_RATE / peak) for step in range(total + 60)])
    assert [line.get_xdata()[0] for line in marked] == [0, warmup - 1, total - 1]


# --- Numbers about the models ---------------------------------------------------------
def test_the_parameter_figure_counts_the_given_models(models, draw):
    figure, title = draw("parameters", models)
    shares, bars = [], {bar.get_label(): bar for bar in figure.axes[0].containers}
    for row, model in enumerate(models.values()):
        counts, end = parameters_by_component(model), 0
        for component, bar in bars.items():
            assert (bar[row].get_x(), bar[row].get_width()) == (end, counts.get(component, 0))
            end += counts.get(component, 0)
        assert end == sum(counts.values()) and f" {end:,}" in names(figure.axes[0].texts)
        shares.append(counts["feed-forward"] / end)
    assert f"{min(shares):.0%} to {max(shares):.0%}" in title


def test_each_legend_names_its_curve(draw, monkeypatch):
    monkeypatch.setattr(visual, "time_generation", lambda model, lengths: {
        True: [n / 1000 for n in lengths], False: [n * n / 25600 for n in lengths]})
    figure, title = draw("key_value_cache")
    times = {label.split()[0]: line for label, line in lines_of(figure.axes[0]).items()}
    assert list(times["with"].get_ydata()[::5]) == [16, 256]
    assert list(times["without"].get_ydata()[::5]) == [10, 2560]
    assert title == "At 256 tokens, the cache saves 90% of the time"
    lines = lines_of(draw("softmax_scaling")[0].axes[0])
    scaled, plain = (list(lines[f"softmax({name})"].get_ydata()) for name in ("qk / sqrt(K)", "qk"))
    assert plain == sorted(plain) and plain[-1] > 0.9 and max(scaled) - min(scaled) < 0.05


def test_the_strategies_filter_the_distribution_of_their_prefix(models, draw, monkeypatch):
    monkeypatch.setattr(visual, "SENTENCE", "4 7")
    figure, title = draw("sampling_strategies", models)
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
def test_the_tree_shows_the_beam_search_and_its_best_answer(verdict, draw, monkeypatch):
    digits = ["4", "0", "7"]
    for model in random_models("encoder_decoder"):
        steps, found = record_beam_search(model, digits, 3, 1.0)
        if len(best := found[0].tokens) > 1 and best[-1] == EOS:
            break
    words = VOCABULARY.decode(best[:-1]) + ["one"] * (verdict == "wrong")
    monkeypatch.setattr(SCRIPTS["encoder_decoder"], "evaluate",
                        lambda *_: {"examples": [(digits, words, [])]})
    figure, title = draw("beam_search_tree", {"encoder-decoder": model})
    assert "for 4 0 7:" in title and f"({verdict} answer)" in title
    places, nodes, edges, red = {(): (0, 0)}, set(), set(), to_hex(visual.RED)
    for step, candidates in enumerate(steps, 1):
        for rank, (ids, total, ended) in enumerate(candidates):
            places[tuple(ids)] = place = (step, 1 - rank)
            score, on_best = f" / {step}\n= {total / step:.2f}" * ended, ids == best[:len(ids)]
            nodes.add((place, f"{VOCABULARY.tokens[ids[-1]]}\n{total:.2f}{score}", on_best))
            edges.add((places[tuple(ids[:-1])], place, on_best))
    assert nodes == {(text.get_position(), text.get_text(), to_hex(
        text.get_bbox_patch().get_edgecolor()) == red) for text in figure.axes[0].texts[1:]}
    assert edges == {(*zip(*line.get_data()), to_hex(line.get_color()) == red)
                     for line in figure.axes[0].lines}


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
    own = weights[:, :, :n, :n].diagonal(dim1=2, dim2=3).mean(-1)
    layer, head = (own == own.max()).nonzero()[0].tolist()
    return layer, head, own.max().item()


@pytest.mark.parametrize("digits", ["4 0 7", " ".join("40725819361094837265")])  # 20: the limit
def test_attention_figures_show_the_weights_and_origin_of_their_model(
        digits, models, draw, monkeypatch):
    monkeypatch.setattr(visual, "SENTENCE", digits)
    digits = digits.split()
    for name, (weights, ids, first, outputs) in attention_of(models, digits).items():
        cross, keys = name == "encoder-decoder", VOCABULARY.decode(ids)
        figure, title = draw("cross_attention_alignment", models, ORIGINS) if cross else draw(
            f"attention_{name.replace('-', '_')}", models, ORIGINS, function="attention_figures")
        assert any(text.endswith(ORIGINS[name]) for text in names(figure.findobj(Text)))
        best = best_head(weights[:, :, first:], len(digits))
        assert name == "decoder-only" or (f"(layer {best[0]}, head {best[1]})" if cross
                                          else f" {best[2]:.0%} of ") in title
        shown = figure.axes[:1 if cross else 4 * 2]
        for axis in shown:
            layer, head = best[:2] if cross else map(int, re.findall(r"\d+", axis.get_title()))
            torch.testing.assert_close(image(axis), weights[layer, head])
            assert names(axis.get_xticklabels()) == keys
        assert names(shown[0].get_yticklabels()) == (outputs if cross else keys)


def test_the_similarity_figure_shows_the_trained_model_and_an_untrained_one(models, draw):
    figure, title = draw("embedding_similarity", models, ORIGINS)
    trained, own = models["encoder-decoder"], []
    torch.manual_seed(visual.SEED)
    for axis, model in zip(figure.axes, (type(trained)(**trained.arguments), trained)):
        vectors = torch.nn.functional.normalize(model.embedding.weight[6:26].detach(), dim=-1)
        torch.testing.assert_close(image(axis), vectors @ vectors.T)
        own.append((vectors @ vectors.T)[:10, 10:].diagonal().mean())  # digits and their words
    assert title.endswith(f"{own[0]:+.2f} before, {own[1]:+.2f} after")
    assert ORIGINS["encoder-decoder"] in names(figure.findobj(Text))


@pytest.mark.parametrize("seed", range(4))
def test_the_front_page_figure_links_what_the_models_attend_to(seed, draw):
    torch.manual_seed(seed)
    models = {name: model.float() for name, model in random_trio(num_layers=4).items()}
    rules = [lambda s, t: True, lambda s, t: s <= t + 3, lambda s, t: s - 3 <= t]
    for axis, rule, (name, (weights, keys, first, outputs)) in zip(
            draw("three_models", models)[0].axes, rules,
            attention_of(models, ["4", "0", "7"]).items()):
        inputs, links = VOCABULARY.decode(keys), {}
        if name == "encoder-decoder":
            inputs += ["<SOS>", *outputs[:-1]]
        shift = len(inputs) - len(outputs)
        for line in axis.lines:
            thick = to_hex(line.get_color()) != visual.GRAY
            links[(thick, *line.get_xdata())] = line.get_linewidth() if thick else 0
        layer, head, _ = best_head(weights[:, :, first:], 3)
        expected = {(False, s, t + shift): 0 for t in range(len(outputs))
                    for s in range(len(inputs)) if rule(s, t)}
        expected |= {(True, s, t + shift): 6 * weight for t, row in enumerate(
            weights[layer, head, first:].tolist()) for s, weight in enumerate(row) if weight > 0.05}
        assert links == pytest.approx(expected) and axis.get_title().startswith(name)
        shown = sorted((text.get_position()[::-1], text.get_text()) for text in axis.texts)
        assert [text for _, text in shown] == inputs + outputs
