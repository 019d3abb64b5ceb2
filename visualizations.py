"""
visualizations.py - draw figures that explain transformers, with the collection's own models

Run it:     python visualizations.py        (about 20 seconds on one CPU core)

It writes PNG files to figures/. Each title states the main point of its figure. The models come
from checkpoints/, the learning curves from runs/. Where a file is missing, and for the figures on
generation, the script trains small models (about five seconds each).

READING ORDER   style -> models -> one function per figure, named after its file -> main
"""
import copy
import csv
import io
import math

from housekeeping import (ROOT, InputError, choose_device, load_model, prepare, run_script,
                          write_atomically)
import matplotlib

matplotlib.use("Agg")  # draws into files, without a display
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

import decoder_only
import encoder_decoder
import encoder_only
import train_all
from quick_start import ARCHITECTURES
from toy_dataset import (DIGITS, EOS, MASK, VOCABULARY, WORDS, collate_fn, create_dataloaders,
                         exact_match, make_item)
from train_all import RUNS
from training import lr_factor, parameters_by_component, time_generation, train_for

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
SENTENCE = "4 0 7"       # the digits that the attention figures show. Try 7 7 7.
D_MODEL = 64             # this and the next four: the small models
NUM_HEADS = 4
NUM_LAYERS = 2
D_FF = 256
TRAIN_EPOCHS = 3
EVALUATE_EVERY = 20      # steps between two points of a learning curve
UNDERTRAINED_STEPS = 60  # steps of the models in the figures on generation
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
CLIP_NORM = 1.0
SEED = 0
DEVICE = "cpu"
# =====================================================================================

# One style for all figures. Color-blind readers can tell the colors of Okabe and Ito (2008) apart.
# Lines differ in dashes or width, for black-and-white prints. Viridis rises evenly in lightness.
BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
LINES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":")]
ALLOWED, MASKED = "#0072B2", "#F2F2F2"  # in masks: dark = may attend, light = masked
OF = dict(zip(ARCHITECTURES, LINES))
plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 100, "font.size": 10, "axes.titlesize": 11,
                     "figure.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
                     "image.cmap": "viridis", "figure.constrained_layout.use": True})
FIGURES = ROOT / "figures"


def save(figure, name, title):
    """Write figures/NAME.png with `title` at the top. Raises InputError if that fails."""
    figure.suptitle(title)
    content = io.BytesIO()
    figure.savefig(content, metadata={"Software": None})  # so that equal figures are equal files
    plt.close(figure)
    try:
        write_atomically(FIGURES / f"{name}.png", content.getvalue())
    except OSError as error:
        raise InputError(f"figures/{name}.png ({error.strerror}): make it writable") from error
    print(f"  figures/{name}.png   {title}", flush=True)


# --- The models -----------------------------------------------------------------------
def train_small(name):
    """Train a small model. Returns it, its curves {"loss": [(step, loss), ...], "exact match":
    [(step, score), ...]}, and a copy of it after UNDERTRAINED_STEPS.
    """
    script, model_class, _ = ARCHITECTURES[name]
    torch.manual_seed(SEED)
    train_loader, val_loader = create_dataloaders(batch_size=BATCH_SIZE, seed=SEED)
    held_out = list(val_loader.dataset)[::3]
    digits, words = [item["digits"] for item in held_out], [item["words"] for item in held_out]
    model = model_class(d_model=D_MODEL, num_heads=NUM_HEADS, num_layers=NUM_LAYERS, d_ff=D_FF)
    model = model.to(choose_device(DEVICE))
    curves, undertrained = {"loss": [], "exact match": []}, []

    def watch(step, loss, _):
        curves["loss"].append((step, loss))
        if step % EVALUATE_EVERY == 0 or step == num_steps:
            score = exact_match(script.translate(model.eval(), digits), words)
            curves["exact match"].append((step, score))
        if step == min(UNDERTRAINED_STEPS, num_steps):
            undertrained.append(copy.deepcopy(model).eval())

    num_steps = TRAIN_EPOCHS * len(train_loader)
    train_for(script.compute_loss, model, train_loader, num_steps, LEARNING_RATE, WARMUP_STEPS,
              CLIP_NORM, watch)
    return model, curves, undertrained[0]


def load_models():
    """Return four dicts: models, their origins, learning curves, and undertrained models."""
    models, origins, curves, undertrained = {}, {}, {}, {}
    for name, (_, model_class, file) in ARCHITECTURES.items():
        try:
            model = load_model(model_class, file, DEVICE, at_least=0.9)
            origin = f"checkpoints/{file}"
        except InputError as error:
            print(f"{name}: {error}. Training a small model instead", flush=True)
            model, curves[name], undertrained[name] = train_small(name)
            origin = "trained in this run"
        models[name] = model
        size = model.arguments
        origins[name] = (f"{name}, {origin}: d_model {size['d_model']}, "
                         f"{size['num_layers']} layers, {size['num_heads']} heads")
        print(origins[name])
    for name in ("decoder-only", "encoder-decoder"):
        if name not in undertrained:
            print(f"{name}: training a small model for the figures on generation", flush=True)
            _, _, undertrained[name] = train_small(name)
    return models, origins, curves, undertrained


# --- Positions ------------------------------------------------------------------------
def positional_encoding_heatmap():
    """Look at one row: it is the vector of one position. No two rows are equal."""
    table = encoder_only.PositionalEncoding(64, 64).table  # (64, D)
    figure, axis = plt.subplots(figsize=(8, 4.2))
    image = axis.imshow(table, aspect="auto", vmin=-1, vmax=1)
    axis.set(xlabel="dimension (even: sine, odd: cosine)", ylabel="position")
    figure.colorbar(image, label="value")
    save(figure, "positional_encoding_heatmap",
         "Low dimensions rotate fast and high ones slowly, so every position has its own row")


def positional_distance():
    """The surprise: from every position, the curve of similarity is the same."""
    table = encoder_only.PositionalEncoding(64, 64).table  # (64, D)
    products = table @ table.T / 32  # (64, 64), 1 on the diagonal
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.8))
    image = left.imshow(products, vmin=0, vmax=1)
    left.set(xlabel="position", ylabel="position", title="similarity of two positions")
    figure.colorbar(image, ax=left, shrink=0.8)
    # From thick to thin, because the three curves coincide.
    for start, (color, _), width in zip((10, 25, 40), LINES, (7, 4, 1.5)):
        distances = range(-10, 24)
        right.plot(distances, [products[start, start + d] for d in distances], color=color,
                   linewidth=width, label=f"from position {start}")
    right.set(xlabel="distance", ylabel="similarity", title="the three curves coincide")
    right.legend(frameon=False)
    save(figure, "positional_distance", "Similarity of positions depends on their distance alone")


# --- Masks ----------------------------------------------------------------------------
def draw_mask(axis, mask, rows, columns):
    """Draw a boolean mask (queries, keys) as squares: dark = may attend."""
    colors = matplotlib.colors.ListedColormap([ALLOWED, MASKED])
    axis.imshow((~mask).numpy(), cmap=colors, vmin=0, vmax=1)
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def mask_legend(figure):
    patches = [Patch(color=ALLOWED, label="may attend"),
               Patch(facecolor=MASKED, edgecolor=GRAY, label="masked")]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)


def masks():
    """Look at the light columns: padding is masked as a key, for every query."""
    batch = collate_fn([make_item(["4", "0", "7"]), make_item(["9"])])
    padding = batch["decoder_mask"][1, 0]  # (1, T), the short row
    length = padding.size(1)
    causal = encoder_decoder.causal_mask(length, length)[0, 0]  # (T, T)
    names = VOCABULARY.decode(batch["decoder_input"][1])
    figure, axes = plt.subplots(1, 3, figsize=(8.5, 3.6))
    for axis, mask, title in zip(
            axes, (padding.expand(length, length), causal, padding & causal),
            ("padding: masks keys", "causal: masks later tokens", "both: padding & causal")):
        draw_mask(axis, mask, names, names)
        axis.set_title(title)
    axes[0].set_ylabel("query")
    axes[1].set_xlabel("key")
    mask_legend(figure)
    save(figure, "masks", "The masks of a padded row of a real batch are combined with &")


def who_sees_whom():
    """The whole difference between the three, apart from what they are trained to predict."""
    pair, target = "4 0 7 <SEP> four zero seven".split(), "<SOS> four zero seven".split()
    causal = decoder_only.causal_mask(7, 7)[0, 0]
    both = torch.cat([torch.ones(4, 3, dtype=torch.bool),
                      encoder_decoder.causal_mask(4, 4)[0, 0]], 1)
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 4))
    draw_mask(axes[0], torch.ones(7, 7, dtype=torch.bool), pair, pair)
    draw_mask(axes[1], causal, pair, pair)
    draw_mask(axes[2], both, target, ["4", "0", "7", *target])
    axes[2].axvline(2.5, color=RED, linewidth=2)
    for axis, title in zip(axes, ("encoder-only: both directions", "decoder-only: causal",
                                  "decoder of the encoder-decoder:\nsource | target so far")):
        axis.set_title(title)
        axis.set_xlabel("key")
    axes[0].set_ylabel("query")
    mask_legend(figure)
    save(figure, "who_sees_whom", "The architectures differ in which token may attend to which")


# --- Diagrams -------------------------------------------------------------------------
def box(axis, x, y, text, color="white", width=2.6, height=0.5):
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height,
                                  boxstyle="round,pad=0.04", facecolor=color, edgecolor="black",
                                  linewidth=1))
    axis.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(axis, start, end, text="", side=0.08):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, linewidth=1,
                                   shrinkA=0, shrinkB=0))
    if text:
        axis.text((start[0] + end[0]) / 2 + side, (start[1] + end[1]) / 2, text, fontsize=7,
                  va="center", color="#333333")


SOFT = {"norm": "#F2F2F2", "attention": "#CFE5F5", "cross": "#FBE3B8", "ff": "#CDEBDF"}


def draw_stack(axis, x, bottom, sublayers, shape):
    """Draw a pre-norm layer, with a residual around each norm and sublayer. Returns the next y."""
    y = bottom
    for text, color in sublayers:
        box(axis, x, y + 0.55, "layer norm", SOFT["norm"])
        box(axis, x, y + 1.25, text, color)
        axis.add_patch(plt.Circle((x, y + 1.9), 0.14, facecolor="white", edgecolor="black"))
        axis.text(x, y + 1.89, "+", ha="center", va="center", fontsize=9)
        arrow(axis, (x, y), (x, y + 0.28))
        arrow(axis, (x, y + 0.82), (x, y + 0.98))
        arrow(axis, (x, y + 1.52), (x, y + 1.76))
        # The residual branches off before the norm and is added after the sublayer.
        axis.plot([x, x - 1.6, x - 1.6], [y + 0.08, y + 0.08, y + 1.9], color="black", linewidth=1)
        arrow(axis, (x - 1.6, y + 1.9), (x - 0.14, y + 1.9))
        y += 2.04
    arrow(axis, (x, y), (x, y + 0.35), shape)
    axis.add_patch(FancyBboxPatch((x - 1.85, bottom - 0.02), 3.45, y - bottom + 0.06,
                                  boxstyle="round,pad=0.05", fill=False, edgecolor=GRAY,
                                  linestyle="--"))
    axis.text(x + 1.5, bottom + 0.12, "x N", fontsize=9, ha="right")
    return y + 0.35


def draw_tower(axis, x, tokens, sublayers, length):
    """Draw one stack, from tokens to its last norm. Returns the next y. length: "S" or "T"."""
    axis.text(x, 0.15, tokens, ha="center", fontsize=9, family="monospace")
    arrow(axis, (x, 0.38), (x, 0.68), f"(B, {length}) ids")
    box(axis, x, 0.98, "embedding * sqrt(D) + position", width=3.6)
    arrow(axis, (x, 1.28), (x, 1.72), f"(B, {length}, D)")
    top = draw_stack(axis, x, 1.75, sublayers, f"(B, {length}, D)")
    box(axis, x, top + 0.3, "layer norm", SOFT["norm"])
    arrow(axis, (x, top + 0.6), (x, top + 0.9))
    return top + 0.9


def draw_output(axis, x, y, predicts, length):
    box(axis, x, y + 0.3, "output = embedding, transposed", width=3.6)
    arrow(axis, (x, y + 0.6), (x, y + 0.95), f"(B, {length}, V) logits")
    axis.text(x, y + 1.1, predicts, ha="center", fontsize=9, family="monospace")


def diagram(width, height, figsize):
    figure, axis = plt.subplots(figsize=figsize)
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.axis("off")
    return figure, axis


def architecture_single():
    """Compare the two: the boxes are the same, and only the mask and the prediction differ."""
    for name, title, tokens, attention, predicts, length in (
            ("encoder_only", "Encoder-only: all positions attend to all positions",
             "4 0 7 <SEP> four <MASK> seven", "self-attention, padding mask",
             "a prediction at each <MASK>: zero", "S"),
            ("decoder_only", "Decoder-only: the same layer, under a causal mask",
             "4 0 7 <SEP> four zero", "causal self-attention", "the next token: seven", "T")):
        figure, axis = diagram(6.6, 8.6, (5.6, 7.4))
        sublayers = [(attention, SOFT["attention"]), ("feed-forward", SOFT["ff"])]
        top = draw_tower(axis, 3.3, tokens, sublayers, length)
        draw_output(axis, 3.3, top, predicts, length)
        save(figure, f"architecture_{name}", title)


def architecture_encoder_decoder():
    """Follow the red line: all decoder layers read the encoder's last output."""
    figure, axis = diagram(10.8, 10.6, (8, 8.2))
    memory = draw_tower(axis, 2.6, "4 0 7", [
        ("self-attention, padding mask", SOFT["attention"]), ("feed-forward", SOFT["ff"])], "S")
    axis.text(2.6, memory + 0.07, "memory (B, S, D)", ha="center", fontsize=9)
    top = draw_tower(axis, 8.2, "<SOS> four zero", [
        ("causal self-attention", SOFT["attention"]), ("cross-attention", SOFT["cross"]),
        ("feed-forward", SOFT["ff"])], "T")
    draw_output(axis, 8.2, top, "the next token: seven", "T")
    cross = 1.75 + 2.04 + 1.25  # the y of cross-attention
    axis.plot([3.7, 5.4, 5.4], [memory + 0.15, memory + 0.15, cross], color=RED, linewidth=1.6)
    axis.add_patch(FancyArrowPatch((5.4, cross), (6.86, cross), arrowstyle="-|>", color=RED,
                                   mutation_scale=11, linewidth=1.6, shrinkA=0, shrinkB=0))
    axis.text(4.4, memory + 0.35, "keys and values, for\nevery decoder layer", fontsize=8,
              ha="center", va="bottom", color=RED)
    save(figure, "architecture_encoder_decoder",
         "Encoder-decoder: every decoder layer attends to the encoder's output")


# --- Numbers about the models ---------------------------------------------------------
def parameters(models):
    """The surprise: attention has fewer than half of the weights."""
    components = ["self-attention", "cross-attention", "feed-forward",
                  "embedding (tied with output)", "layer norms", "output bias"]
    colors = [BLUE, ORANGE, GREEN, RED, GRAY, "black"]
    hatches = ["", "//", "\\\\", "xx", "..", ""]
    figure, axis = plt.subplots(figsize=(8.5, 3.2))
    left = dict.fromkeys(models, 0)
    for component, color, hatch in zip(components, colors, hatches):
        counts = [parameters_by_component(model).get(component, 0) for model in models.values()]
        axis.barh(list(models), counts, left=list(left.values()), color=color, hatch=hatch,
                  edgecolor="white", label=component)
        left = {name: left[name] + count for name, count in zip(models, counts)}
    for row, name in enumerate(models):
        axis.text(left[name], row, f" {left[name]:,}", va="center")
    axis.set(xlabel="parameters", xlim=(0, 1.15 * max(left.values())))
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    shares = [parameters_by_component(model)["feed-forward"] / left[name]
              for name, model in models.items()]
    save(figure, "parameters", f"Feed-forward networks have {min(shares):.0%} to {max(shares):.0%} "
                               "of the parameters")


def softmax_scaling():
    """Look at K = 1024: without the division, a softmax over 16 keys is nearly one-hot."""
    generator = torch.Generator().manual_seed(SEED)
    widths = [4, 16, 64, 256, 1024]
    largest = {True: [], False: []}
    for width in widths:
        queries, keys = (torch.randn(1000, n, width, generator=generator) for n in (1, 16))
        scores = (queries @ keys.transpose(1, 2))[:, 0]  # (1000, 16)
        for scaled in (True, False):
            weights = torch.softmax(scores / math.sqrt(width) if scaled else scores, -1)
            largest[scaled].append(weights.amax(-1).mean().item())
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.plot(widths, largest[False], color=ORANGE, linestyle="--", marker="o", label="softmax(qk)")
    axis.plot(widths, largest[True], color=BLUE, marker="s", label="softmax(qk / sqrt(K))")
    axis.axhline(1 / 16, color=GRAY, linestyle=":", label="uniform over 16 keys")
    axis.set(xscale="log", xlabel="K, size of a head's vectors",
             ylabel="largest weight, mean of 1000", ylim=(0, 1.03))
    axis.set_xticks(widths, widths)
    axis.minorticks_off()
    axis.legend(frameon=False)
    save(figure, "softmax_scaling", "Without 1/sqrt(K), wide heads attend almost only to one key")


# --- Choosing tokens ------------------------------------------------------------------
@torch.inference_mode()
def sampling_strategies(undertrained):
    """Compare the number of tokens left: top_k fixes it, top_p does not."""
    model = undertrained["decoder-only"]
    prefix = [*SENTENCE.split(), "<SEP>"]
    logits = model(torch.tensor([VOCABULARY.encode(prefix)]))[:, -1]  # (1, V)
    shown = logits[0].topk(10).indices
    names = [VOCABULARY.tokens[i] for i in shown]
    filters = {"unfiltered": {}, "temperature 0.5": {"temperature": 0.5},
               "temperature 2": {"temperature": 2.0}, "greedy (top_k = 1)": {"top_k": 1},
               "top_k = 3": {"top_k": 3}, "top_p = 0.8": {"top_p": 0.8}}
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey=True)
    for axis, (title, options) in zip(axes.flat, filters.items()):
        filtered = decoder_only.filter_logits(logits, **options)  # (1, V)
        probabilities = torch.softmax(filtered, -1)[0]  # (V,)
        axis.bar(names, probabilities[shown], color=BLUE)
        axis.set_title(f"{title}: {(probabilities > 0).sum().item()} of {len(VOCABULARY)} left")
        axis.tick_params(axis="x", rotation=90)
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    save(figure, "sampling_strategies",
         f"Six settings for one distribution: the token after \"{' '.join(prefix)}\"")


def beam_search_tree(undertrained):
    """Find a step at which the best path is not on top: there, greedy generation fails."""
    model = undertrained["encoder-decoder"]
    val_loader = create_dataloaders(seed=SEED)[1]
    examples = encoder_decoder.evaluate(model, val_loader)["examples"]
    digits, words = encoder_decoder.where_beams_help(model, examples, 3, 1.0)
    steps, found = encoder_decoder.record_beam_search(model, digits, 3, 1.0)
    best = found[0].tokens
    figure, axis = plt.subplots(figsize=(9.5, 5))
    places = {(): (0, 0.0)}  # tokens of a hypothesis -> its x and y in the figure
    axis.text(0, 0, "<SOS>", ha="center", va="center", fontsize=8.5,
              bbox={"boxstyle": "round", "facecolor": "white"})
    for step, candidates in enumerate(steps, 1):
        for rank, (ids, total, ended) in enumerate(candidates):
            y = -rank + 1.0
            text = f"{VOCABULARY.tokens[ids[-1]]}\n{total:.2f}"
            if ended:  # its score is the mean log-probability per token
                text += f" / {step}\n= {total / step:.2f}"
            places[tuple(ids)] = (step, y)
            on_best = ids == best[:len(ids)]
            x0, y0 = places[tuple(ids[:-1])]
            axis.plot([x0, step], [y0, y], color=RED if on_best else GRAY,
                      linewidth=2 if on_best else 1, zorder=0)  # the boxes cover its ends
            frame = {"boxstyle": "round", "facecolor": "#CDEBDF" if ended else "white",
                     "edgecolor": RED if on_best else "black", "linewidth": 1.8 if on_best else 0.8}
            axis.text(step, y, text, ha="center", va="center", fontsize=8, bbox=frame)
    deepest = max(len(candidates) for candidates in steps)
    axis.set(xlim=(-0.5, len(steps) + 0.5), ylim=(1.4 - deepest, 1.6), xlabel="step", yticks=[])
    axis.set_ylabel("candidates, best on top")
    axis.spines["left"].set_visible(False)
    verdict = "correct" if best == VOCABULARY.encode(words) + [EOS] else "wrong"
    save(figure, "beam_search_tree", f"Beam search, width 3, for {' '.join(digits)}: the thick "
                                     f"path has the best score ({verdict} answer)")


# --- Training -------------------------------------------------------------------------
def learning_rate():
    """The first rate is not 0, or the first step would be lost. The last one is not 0 either."""
    peak, low = train_all.LEARNING_RATE, train_all.MIN_LEARNING_RATE
    warmup = train_all.WARMUP_STEPS
    total = train_all.NUM_EPOCHS * train_all.steps_per_epoch(6950)
    rates = [peak * lr_factor(step, total, warmup, low / peak)
             for step in range(total + 60)]
    figure, axis = plt.subplots(figsize=(8, 3.2))
    axis.plot(rates, color=BLUE)
    points = [(0, f"first step: {rates[0]:.0e}, not 0", 30, 0.12),
              (warmup - 1, "peak, at the end of warmup", 15, 0.05),
              (total - 1, f"last step and after: {low:.0e}", -50, 0.15)]
    for step, text, dx, dy in points:
        axis.annotate(text, (step, rates[step]), (step + dx, rates[step] + dy * peak), fontsize=9,
                      arrowprops={"arrowstyle": "-", "color": GRAY})
        axis.plot(step, rates[step], "o", color=RED)
    axis.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.15 * peak))
    save(figure, "learning_rate", "train_all.py: linear warmup, then cosine decay")


def curves_of_last_run():
    """Return the curves that train_all.py has written to runs/, or None if they are incomplete."""
    curves = {name: {"loss": [], "exact match": []} for name in ARCHITECTURES}
    try:
        for file, column in (("steps.csv", "loss"), ("history.csv", "exact match")):
            with open(RUNS / file, newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    point = int(row["step"]), float(row[column.replace(" ", "_")])
                    curves[row["architecture"]][column].append(point)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return curves if all(points for both in curves.values() for points in both.values()) else None


def learning_curves(curves):
    """Compare the two: a small fall of the loss can be a large rise of exact match."""
    read = curves_of_last_run()
    source = "small models, trained here" if read is None else "the last run of train_all.py"
    if read is None:
        read = {name: curves.get(name) or train_small(name)[1] for name in ARCHITECTURES}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for name, both in read.items():
        color, dashes = OF[name]
        steps, losses = zip(*both["loss"])
        means = [sum(losses[max(0, i - 9):i + 1]) / min(i + 1, 10) for i in range(len(losses))]
        left.plot(steps, losses, color=color, linewidth=0.5, alpha=0.3)
        left.plot(steps, means, color=color, linestyle=dashes, linewidth=1.5, label=name)
        steps, exact = zip(*both["exact match"])
        right.plot(steps, [100 * e for e in exact], color=color, linestyle=dashes, marker="o",
                   markersize=3, label=f"{name}, ends at {exact[-1]:.1%}")
    left.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
    right.set(xlabel="step", ylabel="exact match in %", ylim=(-3, 103))
    right.legend(frameon=False, loc="lower right")
    figure.supxlabel(source, fontsize=8)
    save(figure, "learning_curves", "Training loss falls, and held-out exact match rises")


# --- Attention of the trained models --------------------------------------------------
def draw_attention(name, title, origin, weights, rows, columns):
    """Draw weights (layers, H, T, S) as heat maps, one row per layer and one column per head."""
    layers, heads = weights.shape[:2]
    figure, axes = plt.subplots(layers, heads, squeeze=False,
                                figsize=(2.3 * heads + 0.6, 2.5 * layers + 0.7))
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer][head]
            image = axis.imshow(weights[layer, head], vmin=0, vmax=1)
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
            axis.set_yticks(range(len(rows)), rows if head == 0 else [], fontsize=7)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes[layer][0].set_ylabel("query")
    figure.supxlabel(f"key.   {origin}", fontsize=8)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.7)
    save(figure, name, title)


@torch.inference_mode()
def attention_weights(models, digits):
    """Return {name: (weights (layers, H, T, S), query names, key names)} for `digits`."""
    n = len(digits)
    masked = VOCABULARY.encode([*digits, "<SEP>"]) + [MASK] * n
    _, weights = models["encoder-only"].run_encoder(torch.tensor([masked]))
    names = VOCABULARY.decode(masked)
    result = {"encoder-only": (torch.stack(weights)[:, 0], names, names)}
    prompt = VOCABULARY.encode([*digits, "<SEP>"])
    stream = prompt + models["decoder-only"].generate([prompt], n + 2)[0][:-1]
    _, weights = models["decoder-only"].run_decoder(torch.tensor([stream]))
    names = VOCABULARY.decode(stream)
    result["decoder-only"] = (torch.stack(weights)[:, 0], names, names)
    return result


def attention_figures(models, origins):
    """Compare the layers: one head of the last layer is enough to see the rule."""
    digits = SENTENCE.split()
    weights = attention_weights(models, digits)
    n = len(digits)
    # The mean weight of a masked word on its own digit, in the head with the highest mean.
    own = weights["encoder-only"][0][:, :, n + 1:, :n].diagonal(dim1=-2, dim2=-1)
    masked = own.mean(-1).max().item()
    messages = {
        "encoder-only": ("attention_encoder_only", "Encoder-only: in one head, masked words give "
                                                   f"{masked:.0%} of their weight to their digits"),
        "decoder-only": ("attention_decoder_only", "Decoder-only: no token attends to later ones")}
    for name, (file, title) in messages.items():
        draw_attention(file, title, origins[name], *weights[name])


@torch.inference_mode()
def cross_attention_alignment(models, origins):
    """Look at the last row: at <EOS>, there is no digit left to read."""
    digits = SENTENCE.split()
    written, weights = encoder_decoder.cross_attention(models["encoder-decoder"], digits)
    diagonal = weights[:, :, :len(digits)].diagonal(dim1=-2, dim2=-1).mean(-1)  # (layers, H)
    layer, head = divmod(diagonal.argmax().item(), weights.size(1))
    figure, axis = plt.subplots(figsize=(6, 4))
    image = axis.imshow(weights[layer, head], vmin=0, vmax=1)
    for row, values in enumerate(weights[layer, head].tolist()):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center",
                      color="white" if value < 0.6 else "black")
    axis.set_xticks(range(len(digits)), digits)
    axis.set_yticks(range(len(written)), VOCABULARY.decode(written))
    axis.set(xlabel="key: source digit", ylabel="query, labeled with its prediction")
    figure.supxlabel(origins["encoder-decoder"], fontsize=7)
    figure.colorbar(image, label="weight")
    save(figure, "cross_attention_alignment",
         f"Cross-attention: each word attends to its digit (layer {layer}, head {head})")


# --- The cache, and embeddings --------------------------------------------------------
def key_value_cache():
    """Without the cache, the curve bends upward, because every token is computed again."""
    lengths = [16, 32, 64, 128, 192, 256]
    torch.manual_seed(SEED)
    model = decoder_only.DecoderOnlyTransformer(d_model=D_MODEL, num_heads=NUM_HEADS, d_ff=D_FF,
                                                num_layers=NUM_LAYERS, max_len=max(lengths) + 4)
    times = {use_cache: [1000 * s for s in seconds] for use_cache, seconds
             in time_generation(model, lengths).items()}
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.plot(lengths, times[False], color=ORANGE, linestyle="--", marker="o",
              label="without cache: the whole row for each token")
    axis.plot(lengths, times[True], color=BLUE, marker="s", label="with cache: only the new token")
    axis.set(xlabel="tokens generated", ylabel="milliseconds (median of 3)", ylim=(0, None))
    axis.legend(frameon=False)
    saved = 1 - times[True][-1] / times[False][-1]
    save(figure, "key_value_cache",
         f"At {lengths[-1]} tokens, the cache saves {saved:.0%} of the time")


@torch.no_grad()
def embedding_similarity(models, origins):
    """Look for a diagonal: do a digit and its word get similar vectors?"""
    trained = models["encoder-decoder"]
    torch.manual_seed(SEED)
    untrained = type(trained)(**trained.arguments)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    tokens, own = DIGITS + WORDS, []
    titles = ("before training", "after training")
    for axis, model, title in zip(axes, (untrained, trained), titles):
        vectors = model.embedding.weight[VOCABULARY.encode(tokens)]  # (20, D)
        vectors = F.normalize(vectors, dim=-1)
        image = axis.imshow(vectors @ vectors.T, vmin=-1, vmax=1)
        axis.set_xticks(range(20), tokens, rotation=90, fontsize=7)
        axis.set_yticks(range(20), tokens, fontsize=7)
        own.append((vectors[:10] * vectors[10:]).sum(-1).mean().item())  # a digit and its word
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)
    figure.supxlabel(origins["encoder-decoder"], fontsize=8)
    save(figure, "embedding_similarity",
         f"Mean similarity of a digit and its word: {own[0]:+.2f} before, {own[1]:+.2f} after")


# --- The front page -------------------------------------------------------------------
def draw_links(axis, title, inputs, outputs, allowed, weights, color):
    """Draw links from inputs (below) to outputs (above): thin = may attend, thick = attends."""
    for t, output in enumerate(outputs):
        for s in range(len(inputs)):
            if allowed[t][s]:
                axis.plot([s, t + len(inputs) - len(outputs)], [0.12, 0.88], color=GRAY,
                          linewidth=0.6, zorder=0)
            if weights[t][s] > 0.05:
                axis.plot([s, t + len(inputs) - len(outputs)], [0.12, 0.88], color=color,
                          linewidth=6 * weights[t][s], alpha=0.8, solid_capstyle="round")
        axis.text(t + len(inputs) - len(outputs), 1, output, ha="center", va="center",
                  fontsize=7.5 if "<" in output else 11)
    for s, token in enumerate(inputs):
        axis.text(s, 0, token, ha="center", va="center", fontsize=7.5 if "<" in token else 11)
    axis.set(xlim=(-0.6, len(inputs) - 0.4), ylim=(-0.1, 1.08))
    axis.set_title(title, fontsize=14)
    axis.axis("off")


@torch.inference_mode()
def three_models(models):
    """The front page: which digit does each word come from?"""
    digits, n = ["4", "0", "7"], 3
    weights = attention_weights(models, digits)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    # For each model, take the head in which the query for word i attends most to digit i.
    for axis, name, first, title, color in (
            (axes[0], "encoder-only", n + 1, "encoder-only (BERT)", BLUE),
            (axes[1], "decoder-only", n, "decoder-only (GPT)", GREEN)):
        heads, _, inputs = weights[name]
        heads = heads.flatten(0, 1)[:, first:]  # (layers * H, queries that predict, S)
        best = heads[heads[:, :n, :n].diagonal(dim1=-2, dim2=-1).mean(-1).argmax()]
        allowed = torch.ones_like(best) if name == "encoder-only" else \
            decoder_only.causal_mask(len(best), len(inputs))[0, 0]
        prompt = [VOCABULARY.encode([*digits, "<SEP>"])]
        outputs = encoder_only.translate(models[name], [digits])[0] if name == "encoder-only" else \
            VOCABULARY.decode(models[name].generate(prompt, n + 2)[0])
        draw_links(axis, title, inputs, outputs, allowed.tolist(), best.tolist(), color)
    written, heads = encoder_decoder.cross_attention(models["encoder-decoder"], digits)
    heads = heads.flatten(0, 1)  # (layers * H, T, S)
    best = heads[heads[:, :n].diagonal(dim1=-2, dim2=-1).mean(-1).argmax()]
    outputs = VOCABULARY.decode(written)
    inputs = [*digits, "<SOS>", *outputs[:-1]]
    allowed = torch.cat([torch.ones_like(best), decoder_only.causal_mask(len(best), len(best))
                         [0, 0].float()], dim=1)
    weights = F.pad(best, (0, len(best)))  # no weights are drawn within the target
    draw_links(axes[2], "encoder-decoder (T5)", inputs, outputs, allowed.tolist(), weights.tolist(),
               RED)
    save(figure, "three_models", "4 0 7 in three trained models. Thin lines: which token may attend"
                                 " to which. Thick lines: what one head attends to")


def main():
    prepare(globals())
    if not isinstance(SENTENCE, str) or not 1 <= len(SENTENCE.split()) <= 20 \
            or not set(SENTENCE.split()) <= set(DIGITS):
        raise InputError(f"SENTENCE={SENTENCE!r} must be 1 to 20 digits separated by spaces: use "
                         "'4 0 7'")
    train_all.check_run()  # a figure shows its learning rate
    for draw in (positional_encoding_heatmap, positional_distance, masks, who_sees_whom,
                 architecture_single, architecture_encoder_decoder, softmax_scaling, learning_rate,
                 key_value_cache):
        draw()
    models, origins, curves, undertrained = load_models()
    parameters(models)
    sampling_strategies(undertrained)
    beam_search_tree(undertrained)
    learning_curves(curves)
    attention_figures(models, origins)
    cross_attention_alignment(models, origins)
    embedding_similarity(models, origins)
    three_models(models)
    print(f"{len(list(FIGURES.glob('*.png')))} figures in figures/")


if __name__ == "__main__":
    run_script(main)
