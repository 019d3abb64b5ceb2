"""
visualizations.py - transformers, seen: every figure made from the collection's own code and models, in this run

Run it:     python visualizations.py        (about 20 seconds on one CPU core)

It writes PNG files to figures/, one message each, the message as the title, and never opens a window. Attention is that of
the models in checkpoints/ where there are any, and their sizes stand in the figure; where there is none, a small one is
trained, which takes about five seconds a model, and the script says so. Learning curves come from runs/history.csv if
train_all.py has written one, else from that small training.

READING ORDER   style -> models -> one function a figure, named after its file -> main
"""
import copy
import csv
import functools
import math
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
from toy_dataset import (CHECKPOINTS, DIGITS, EOS, MASK, SOS, VOCABULARY, WORDS, InputError, check_constants,
                         choose_device, collate_fn, create_dataloaders, run_script)
from train_all import (ARCHITECTURES, LEARNING_RATE, MIN_LEARNING_RATE, NUM_EPOCHS, RUNS, WARMUP_STEPS, epoch_groups,
                       parameters_by_component, warmup_cosine)

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
SENTENCE = "4 0 7"       # the digits that the attention figures show. Try 7 7 7: where do equal digits look?
D_MODEL = 64             # of the small models, trained where there is no checkpoint
NUM_HEADS = 4
NUM_LAYERS = 2
D_FF = 256
TRAIN_EPOCHS = 3         # of the small models
SEED = 0
DEVICE = "cpu"
NUM_THREADS = 1
# =====================================================================================

# Style: one for all. The colours are those of Okabe and Ito (2008), told apart by colour-blind readers; lines differ in
# dashes as well, so that they survive a black-and-white printer. Heat maps are viridis: its lightness rises evenly.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
LINES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":")]
ALLOWED, HIDDEN = "#0072B2", "#F2F2F2"  # a mask: dark may attend, light may not; never anything else
OF = dict(zip(ARCHITECTURES, LINES))
plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 100, "font.size": 10, "axes.titlesize": 11, "figure.titlesize": 12,
                     "axes.spines.top": False, "axes.spines.right": False, "image.cmap": "viridis",
                     "figure.constrained_layout.use": True})
FIGURES = Path(__file__).resolve().parent / "figures"


def save(figure, name, title):
    """Write figures/NAME.png with `title`, the message, on top. Raises InputError if that cannot be written."""
    figure.suptitle(title)
    try:
        FIGURES.mkdir(exist_ok=True)
        # No software version in the file: the same picture is then the same bytes.
        figure.savefig(FIGURES / f"{name}.png", metadata={"Software": None})
    except OSError as error:
        raise InputError(f"figures/{name}.png cannot be written ({error.strerror}): make figures/ writable") from error
    finally:
        plt.close(figure)
    print(f"  figures/{name}.png   {title}", flush=True)


# -------------------------------------------------------------------------------------
# The models
# -------------------------------------------------------------------------------------
def train_small(name):
    """A small model of architecture `name`, trained here, and its learning curve [(step, exact match), ...]."""
    script, model_class, _ = ARCHITECTURES[name]
    torch.manual_seed(SEED)
    train_loader, val_loader = create_dataloaders(batch_size=32, seed=SEED)
    model = model_class(d_model=D_MODEL, num_heads=NUM_HEADS, num_layers=NUM_LAYERS, d_ff=D_FF)
    model = model.to(choose_device(DEVICE))
    optimizer, scheduler = script.create_optimizer(model, 3e-3, TRAIN_EPOCHS * len(train_loader))
    curve = [(0, script.evaluate(model, val_loader)["exact_match"])]
    for epoch in tqdm(range(TRAIN_EPOCHS), ascii=True, leave=False, disable=None, desc=name):
        script.train_epoch(model, train_loader, optimizer, scheduler)
        curve.append(((epoch + 1) * len(train_loader), script.evaluate(model, val_loader)["exact_match"]))
        if epoch == 0:
            young = copy.deepcopy(model).eval()
    return model.eval(), curve, young


def load_models():
    """{name: model} from checkpoints/, or trained here; {name: where it is from}; {name: curve} of those trained here; and
    a decoder-only and an encoder-decoder model after one epoch, still unsure, for the figures on choosing tokens."""
    models, origins, curves, young = {}, {}, {}, {}
    for name, (_, model_class, file) in ARCHITECTURES.items():
        try:
            model = model_class.load(CHECKPOINTS / file, DEVICE).eval()
            origin = f"checkpoints/{file}"
        except InputError as error:
            print(f"{name}: {error}. A small one is trained instead, about five seconds", flush=True)
            model, curves[name], young[name] = train_small(name)
            origin = "trained in this run"
        models[name] = model
        size = model.arguments
        origins[name] = (f"{name}, {origin}: d_model {size['d_model']}, {size['num_layers']} layers, "
                         f"{size['num_heads']} heads")
        print(origins[name])
    for name in ("decoder-only", "encoder-decoder"):
        if name not in young:
            print(f"{name}: one that is still unsure is trained for the figures on choosing tokens", flush=True)
            _, _, young[name] = train_small(name)
    return models, origins, curves, young


# -------------------------------------------------------------------------------------
# Positions
# -------------------------------------------------------------------------------------
def positional_encoding_heatmap():
    table = encoder_only.PositionalEncoding(64, 64).table                                # (64, D)
    figure, axis = plt.subplots(figsize=(8, 4.2))
    image = axis.imshow(table, aspect="auto", vmin=-1, vmax=1)
    axis.set(xlabel="dimension (even: sine, odd: cosine)", ylabel="position")
    figure.colorbar(image, label="value")
    save(figure, "positional_encoding_heatmap", "Low dimensions turn fast, high ones slowly: every position has its own row")


def positional_encoding_curves():
    table = encoder_only.PositionalEncoding(64, 64).table
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for dimension, (colour, dashes) in zip((0, 8, 16, 32), LINES):
        wave = 2 * math.pi * 10000 ** (dimension / 64)
        label = f"dimension {dimension}: wave length {wave:,.0f}"
        axis.plot(table[:, dimension], color=colour, linestyle=dashes, label=label)
    axis.set(xlabel="position", ylabel="value")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save(figure, "positional_encoding_curves", "Each dimension is a clock hand with a speed of its own")


def positional_distance():
    table = encoder_only.PositionalEncoding(64, 64).table                                # (64, D)
    products = table @ table.T / 32                                                      # (64, 64), 1 on the diagonal
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.8))
    image = left.imshow(products, vmin=0, vmax=1)
    left.set(xlabel="position", ylabel="position", title="similarity of two positions")
    figure.colorbar(image, ax=left, shrink=0.8)
    for start, (colour, _), width in zip((10, 25, 40), LINES, (7, 4, 1.5)):  # thick to thin, or the last hides the others
        distances = range(-10, 24)
        right.plot(distances, [products[start, start + d] for d in distances], color=colour, linewidth=width,
                   label=f"seen from position {start}")
    right.set(xlabel="distance", ylabel="similarity", title="the three curves are one curve")
    right.legend(frameon=False)
    save(figure, "positional_distance", "How alike two positions are depends on their distance alone")


# -------------------------------------------------------------------------------------
# Masks
# -------------------------------------------------------------------------------------
def draw_mask(axis, mask, rows, columns):
    """A boolean mask (rows, columns) as squares: dark = may attend. Rows ask, columns are asked."""
    axis.imshow((~mask).numpy(), cmap=matplotlib.colors.ListedColormap([ALLOWED, HIDDEN]), vmin=0, vmax=1)
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def mask_legend(figure):
    patches = [Patch(color=ALLOWED, label="may attend"), Patch(facecolor=HIDDEN, edgecolor=GREY, label="hidden")]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)


def item_for(digits):
    words = [WORDS[int(digit)] for digit in digits]
    return {"digits": digits, "words": words, "source": VOCABULARY.encode(digits), "target": VOCABULARY.encode(words)}


def masks():
    batch = collate_fn([item_for(["4", "0", "7"]), item_for(["9"])])
    padding = batch["decoder_mask"][1, 0]                                                # (1, T), the short row
    length = padding.size(1)
    causal = encoder_decoder.causal_mask(length, length)[0, 0]                           # (T, T)
    names = VOCABULARY.decode(batch["decoder_input"][1])
    figure, axes = plt.subplots(1, 3, figsize=(8.5, 3.6))
    for axis, mask, title in zip(axes, (padding.expand(length, length), causal, padding & causal),
                                 ("padding: hides keys", "causal: hides the future", "both: padding & causal")):
        draw_mask(axis, mask, names, names)
        axis.set_title(title)
    axes[0].set_ylabel("asks (query)")
    axes[1].set_xlabel("is asked (key)")
    mask_legend(figure)
    save(figure, "masks", "A padded row of a real batch: masks are combined with &, and hide columns")


def who_sees_whom():
    pair, target = "4 0 7 <SEP> four zero seven".split(), "<SOS> four zero seven".split()
    causal = decoder_only.causal_mask(7, 7)[0, 0]
    both = torch.cat([torch.ones(4, 3, dtype=torch.bool), encoder_decoder.causal_mask(4, 4)[0, 0]], 1)
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 4), width_ratios=[7, 7, 7])
    draw_mask(axes[0], torch.ones(7, 7, dtype=torch.bool), pair, pair)
    draw_mask(axes[1], causal, pair, pair)
    draw_mask(axes[2], both, target, ["4", "0", "7", *target])
    axes[2].axvline(2.5, color=RED, linewidth=2)
    for axis, title in zip(axes, ("encoder-only: all see all", "decoder-only: no future",
                                  "encoder-decoder's decoder:\nsource | target so far")):
        axis.set_title(title)
        axis.set_xlabel("is asked")
    axes[0].set_ylabel("asks")
    mask_legend(figure)
    save(figure, "who_sees_whom", "The three architectures differ in who may attend to whom")


# -------------------------------------------------------------------------------------
# Diagrams
# -------------------------------------------------------------------------------------
def box(axis, x, y, text, colour="white", width=2.6, height=0.5):
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.04",
                                  facecolor=colour, edgecolor="black", linewidth=1))
    axis.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(axis, start, end, text="", bend=0.0, side=0.08):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, connectionstyle=f"arc3,rad={bend}",
                                   shrinkA=0, shrinkB=0, linewidth=1))
    if text:
        axis.text((start[0] + end[0]) / 2 + side, (start[1] + end[1]) / 2, text, fontsize=7, va="center", color="#333333")


SOFT = {"norm": "#F2F2F2", "attention": "#CFE5F5", "cross": "#FBE3B8", "ff": "#CDEBDF"}


def draw_stack(axis, x, bottom, sublayers, shape):
    """A pre-norm layer: for each sublayer a norm, the sublayer, and a residual that goes round both. Returns its top."""
    y = bottom
    for text, colour in sublayers:
        box(axis, x, y + 0.55, "layer norm", SOFT["norm"])
        box(axis, x, y + 1.25, text, colour)
        axis.add_patch(plt.Circle((x, y + 1.9), 0.14, facecolor="white", edgecolor="black"))
        axis.text(x, y + 1.89, "+", ha="center", va="center", fontsize=9)
        arrow(axis, (x, y), (x, y + 0.28))
        arrow(axis, (x, y + 0.82), (x, y + 0.98))
        arrow(axis, (x, y + 1.52), (x, y + 1.76))
        # The residual leaves before the norm and joins behind the sublayer.
        axis.plot([x, x - 1.6, x - 1.6], [y + 0.08, y + 0.08, y + 1.9], color="black", linewidth=1)
        arrow(axis, (x - 1.6, y + 1.9), (x - 0.14, y + 1.9))
        y += 2.04
    arrow(axis, (x, y), (x, y + 0.35), shape)
    axis.add_patch(FancyBboxPatch((x - 1.85, bottom - 0.02), 3.45, y - bottom + 0.06, boxstyle="round,pad=0.05",
                                  fill=False, edgecolor=GREY, linestyle="--"))
    axis.text(x + 1.5, bottom + 0.12, "x N", fontsize=9, ha="right")
    return y + 0.35


def diagram_axis(width, height, figsize):
    figure, axis = plt.subplots(figsize=figsize)
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    axis.set_aspect("equal")
    return figure, axis


def draw_single(name, title, tokens, attention, says, length):
    """A model with one stack; `length` is the letter of its row length, S or T."""
    figure, axis = diagram_axis(6.6, 8.6, (5.6, 7.4))
    axis.text(3.3, 0.15, tokens, ha="center", fontsize=9, family="monospace")
    arrow(axis, (3.3, 0.38), (3.3, 0.68), f"(B, {length}) ids")
    box(axis, 3.3, 0.98, "embedding * sqrt(D) + position", width=3.6)
    arrow(axis, (3.3, 1.28), (3.3, 1.72), f"(B, {length}, D)")
    top = draw_stack(axis, 3.3, 1.75, [(attention, SOFT["attention"]), ("feed-forward", SOFT["ff"])], f"(B, {length}, D)")
    box(axis, 3.3, top + 0.3, "layer norm", SOFT["norm"])
    arrow(axis, (3.3, top + 0.6), (3.3, top + 0.9))
    box(axis, 3.3, top + 1.2, "output = embedding, transposed", width=3.6)
    arrow(axis, (3.3, top + 1.5), (3.3, top + 1.85), f"(B, {length}, V) logits")
    axis.text(3.3, top + 2.0, says, ha="center", fontsize=9, family="monospace")
    save(figure, name, title)


def architecture_encoder_only():
    draw_single("architecture_encoder_only", "Encoder-only: every position sees every other",
                "4 0 7 <SEP> four <MASK> seven", "self-attention, padding mask", "a guess at each <MASK>: zero", "S")


def architecture_decoder_only():
    draw_single("architecture_decoder_only", "Decoder-only: the same layer, read through a causal mask",
                "4 0 7 <SEP> four zero", "self-attention, causal mask", "the next token: seven", "T")


def architecture_encoder_decoder():
    figure, axis = diagram_axis(10.8, 10.6, (8, 8.2))
    for x, text in ((2.6, "4 0 7"), (8.2, "<SOS> four zero")):
        axis.text(x, 0.15, text, ha="center", fontsize=9, family="monospace")
        box(axis, x, 0.98, "embedding * sqrt(D) + position", width=3.6)
    arrow(axis, (2.6, 0.38), (2.6, 0.68), "(B, S) ids")
    arrow(axis, (8.2, 0.38), (8.2, 0.68), "(B, T) ids")
    arrow(axis, (2.6, 1.28), (2.6, 1.72), "(B, S, D)")
    arrow(axis, (8.2, 1.28), (8.2, 1.72), "(B, T, D)")
    top = draw_stack(axis, 2.6, 1.75, [("self-attention, padding mask", SOFT["attention"]), ("feed-forward", SOFT["ff"])],
                     "(B, S, D)")
    box(axis, 2.6, top + 0.3, "layer norm", SOFT["norm"])
    memory = top + 0.95
    arrow(axis, (2.6, top + 0.6), (2.6, memory - 0.12))
    axis.text(2.6, memory + 0.02, "memory (B, S, D)", ha="center", fontsize=9)
    sublayers = [("causal self-attention", SOFT["attention"]), ("cross-attention", SOFT["cross"]),
                 ("feed-forward", SOFT["ff"])]
    right_top = draw_stack(axis, 8.2, 1.75, sublayers, "(B, T, D)")
    # From the end of the encoder, to the cross-attention of every decoder layer.
    axis.plot([3.7, 5.4, 5.4], [memory + 0.1, memory + 0.1, 1.75 + 2.04 + 1.25], color=RED, linewidth=1.6)
    axis.add_patch(FancyArrowPatch((5.4, 1.75 + 2.04 + 1.25), (6.86, 1.75 + 2.04 + 1.25), arrowstyle="-|>",
                                   mutation_scale=11, color=RED, linewidth=1.6, shrinkA=0, shrinkB=0))
    axis.text(4.4, memory + 0.3, "keys and values, for\nevery decoder layer", fontsize=8, ha="center", va="bottom",
              color=RED)
    box(axis, 8.2, right_top + 0.3, "layer norm", SOFT["norm"])
    arrow(axis, (8.2, right_top + 0.6), (8.2, right_top + 0.9))
    box(axis, 8.2, right_top + 1.2, "output = embedding, transposed", width=3.6)
    arrow(axis, (8.2, right_top + 1.5), (8.2, right_top + 1.85), "(B, T, V) logits")
    axis.text(8.2, right_top + 2.0, "the next token: seven", ha="center", fontsize=9, family="monospace")
    save(figure, "architecture_encoder_decoder", "Encoder-decoder: every decoder layer reads the encoder's last output")


# -------------------------------------------------------------------------------------
# Numbers about the models
# -------------------------------------------------------------------------------------
def parameters(models):
    components = ["self-attention", "cross-attention", "feed-forward", "embedding (tied with output)", "layer norms",
                  "output bias"]
    colours = [BLUE, ORANGE, GREEN, RED, GREY, "black"]
    hatches = ["", "//", "\\\\", "xx", "..", ""]
    figure, axis = plt.subplots(figsize=(8.5, 3.2))
    left = dict.fromkeys(models, 0)
    for component, colour, hatch in zip(components, colours, hatches):
        counts = [parameters_by_component(model).get(component, 0) for model in models.values()]
        axis.barh(list(models), counts, left=list(left.values()), color=colour, hatch=hatch, edgecolor="white",
                  label=component)
        left = {name: left[name] + count for name, count in zip(models, counts)}
    for row, (name, model) in enumerate(models.items()):
        total = sum(p.numel() for p in model.parameters())
        assert total == left[name], f"components of {name} add up to {left[name]}, not {total}"
        axis.text(total, row, f" {total:,}", va="center")
    axis.set(xlabel="parameters", xlim=(0, 1.15 * max(left.values())))
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    shares = [parameters_by_component(model)["feed-forward"] / left[name] for name, model in models.items()]
    save(figure, "parameters", f"The feed-forward layers hold {min(shares):.0%} to {max(shares):.0%} of the weights")


def softmax_scaling():
    generator = torch.Generator().manual_seed(SEED)
    widths = [4, 16, 64, 256, 1024]
    largest = {True: [], False: []}
    for width in widths:
        queries, keys = (torch.randn(1000, n, width, generator=generator) for n in (1, 16))  # variance 1
        scores = (queries @ keys.transpose(1, 2))[:, 0]                                  # (1000, 16)
        for scaled in (True, False):
            weights = torch.softmax(scores / math.sqrt(width) if scaled else scores, -1)  # (1000, 16)
            largest[scaled].append(weights.amax(-1).mean().item())
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.plot(widths, largest[False], color=ORANGE, linestyle="--", marker="o", label="softmax(q k)")
    axis.plot(widths, largest[True], color=BLUE, marker="s", label="softmax(q k / sqrt(K))")
    axis.axhline(1 / 16, color=GREY, linestyle=":", label="uniform over 16 keys")
    axis.set(xscale="log", xlabel="K, width of a head", ylabel="largest weight, mean of 1000", ylim=(0, 1.03))
    axis.set_xticks(widths, widths)
    axis.minorticks_off()
    axis.legend(frameon=False)
    save(figure, "softmax_scaling", "Without 1/sqrt(K), softmax over random scores becomes a hard choice in wide heads")


# -------------------------------------------------------------------------------------
# Choosing tokens
# -------------------------------------------------------------------------------------
@torch.inference_mode()
def sampling_strategies(young):
    model = young["decoder-only"]
    prompt = decoder_only.least_sure(model, create_dataloaders(seed=SEED)[1])
    logits = model(torch.tensor([VOCABULARY.encode(prompt)]))[:, -1]                     # (1, V)
    shown = logits[0].topk(10).indices
    names = [VOCABULARY.tokens[i] for i in shown]
    filters = {"as it comes": {}, "temperature 0.5": {"temperature": 0.5}, "temperature 2": {"temperature": 2.0},
               "greedy: the first": {"top_k": 1}, "top_k = 3": {"top_k": 3}, "top_p = 0.8": {"top_p": 0.8}}
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey=True)
    for axis, (title, options) in zip(axes.flat, filters.items()):
        probabilities = torch.softmax(decoder_only.filter_logits(logits, **options), -1)[0]  # (V,)
        axis.bar(names, probabilities[shown], color=BLUE)
        axis.set_title(f"{title}: {(probabilities > 0).sum().item()} of {len(VOCABULARY)} left")
        axis.tick_params(axis="x", rotation=90)
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    save(figure, "sampling_strategies", f"Six ways to look at one distribution: what comes after \"{' '.join(prompt)}\"?")


def beam_search_tree(young):
    model = young["encoder-decoder"]
    val_loader = create_dataloaders(seed=SEED)[1]
    examples = encoder_decoder.evaluate(model, val_loader)["examples"]
    digits, words = encoder_decoder.where_beams_help(model, examples)
    trace = []
    found = model.beam_search([VOCABULARY.encode(digits)], 3, 1.0, len(digits) + 2, trace)[0]
    best = found[0].tokens
    figure, axis = plt.subplots(figsize=(9.5, 4))
    places = {(): (0, 0.0)}  # what a beam has written -> where it stands
    axis.text(0, 0, "<SOS>", ha="center", va="center", fontsize=8.5, bbox={"boxstyle": "round", "facecolor": "white"})
    for step, beams in enumerate(trace, 1):
        for rank, (before, token, total) in enumerate(beams):
            y = -rank + 1.0
            written = (*before, token)
            places[written] = (step, y)
            on_best = list(written) == best[:len(written)]
            x0, y0 = places[tuple(before)]
            axis.plot([x0 + 0.33, step - 0.33], [y0, y], color=RED if on_best else GREY, linewidth=2 if on_best else 1,
                      zorder=0)
            frame = {"boxstyle": "round", "facecolor": "#CDEBDF" if token == EOS else "white",
                     "edgecolor": RED if on_best else "black", "linewidth": 1.8 if on_best else 0.8}
            axis.text(step, y, f"{VOCABULARY.tokens[token]}\n{total:.2f}", ha="center", va="center", fontsize=8, bbox=frame)
    axis.set(xlim=(-0.5, len(trace) + 0.5), ylim=(-1.6, 1.6), xlabel="step", yticks=[])
    axis.set_ylabel("rank in the beam, best on top")
    axis.spines["left"].set_visible(False)
    right = "right" if best == VOCABULARY.encode(words) + [EOS] else "wrong"
    save(figure, "beam_search_tree",
         f"Beam search, width 3, for {' '.join(digits)}: sums of log-probabilities, the best answer thick ({right})")


# -------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------
def learning_rate():
    steps_per_epoch = len(epoch_groups(7000, 0))
    total = NUM_EPOCHS * steps_per_epoch
    minimum = MIN_LEARNING_RATE / LEARNING_RATE
    rates = [LEARNING_RATE * warmup_cosine(step, total, WARMUP_STEPS, minimum) for step in range(total + 60)]
    figure, axis = plt.subplots(figsize=(8, 3.2))
    axis.plot(rates, color=BLUE)
    points = [(0, f"first step: {rates[0]:.0e}, not 0", 15, 0),
              (WARMUP_STEPS - 1, "peak, at the end of warm-up", 15, 0.05 * LEARNING_RATE),
              (total - 1, f"last step: {MIN_LEARNING_RATE:.0e}, and after it", -50, 0.15 * LEARNING_RATE)]
    for step, text, dx, dy in points:
        axis.plot(step, rates[step], "o", color=RED)
        axis.text(step + dx, rates[step] + dy, text, va="center", fontsize=9)
    axis.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.12 * LEARNING_RATE))
    save(figure, "learning_rate", "train_all.py: up in a line, down half a cosine")


def learning_curves(curves):
    """From runs/history.csv where there is one; else those of the small models that were trained here."""
    path, source = RUNS / "history.csv", "three small models, trained for this figure"
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        read = {name: [(int(row["step"]), float(row["exact_match"])) for row in rows if row["architecture"] == name]
                for name in ARCHITECTURES}
        if all(read.values()):
            curves, source = read, "the last run of train_all.py"
    for name in ARCHITECTURES:
        if name not in curves:
            _, curves[name], _ = train_small(name)
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for name, curve in curves.items():
        steps, exact = zip(*curve)
        axis.plot(steps, [100 * e for e in exact], color=OF[name][0], linestyle=OF[name][1], marker="o", markersize=4,
                  label=f"{name}, ends at {exact[-1]:.1%}")
    axis.set(xlabel="step", ylabel="exact match, %", ylim=(-3, 103))
    axis.legend(frameon=False, loc="lower right")
    axis.set_title(source, fontsize=9)
    save(figure, "learning_curves", "One task, three architectures: exact match on sequences never seen in training")


# -------------------------------------------------------------------------------------
# Attention of the trained models
# -------------------------------------------------------------------------------------
def draw_attention(name, title, origin, weights, rows, columns, asked):
    """weights (layers, H, T, S) as a grid of heat maps, layers downwards and heads across."""
    layers, heads = weights.shape[:2]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))  # rows of a softmax
    figure, axes = plt.subplots(layers, heads, figsize=(2.3 * heads + 0.6, 2.5 * layers + 0.7), squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer][head]
            image = axis.imshow(weights[layer, head], vmin=0, vmax=1)
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
            axis.set_yticks(range(len(rows)), rows if head == 0 else [], fontsize=7)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes[layer][0].set_ylabel("asks")
    figure.supxlabel(f"{asked}.   {origin}", fontsize=8)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.7)
    save(figure, name, title)


@torch.inference_mode()
def attention_weights(models, digits):
    """Real weights of the trained models for `digits`: {name: (weights (layers, H, T, S), row names, column names)}."""
    n = len(digits)
    blanks = VOCABULARY.encode([*digits, "<SEP>"]) + [MASK] * n
    _, weights = models["encoder-only"].encode(torch.tensor([blanks]), need_weights=True)
    names = VOCABULARY.decode(blanks)
    result = {"encoder-only": (torch.stack(weights)[:, 0], names, names)}
    prompt = VOCABULARY.encode([*digits, "<SEP>"])
    stream = prompt + models["decoder-only"].generate([prompt], n + 2)[0][:-1]  # the last token is read by nobody
    _, weights = models["decoder-only"].hidden_states(torch.tensor([stream]), need_weights=True)
    names = VOCABULARY.decode(stream)
    result["decoder-only"] = (torch.stack(weights)[:, 0], names, names)
    written, weights = encoder_decoder.cross_attention(models["encoder-decoder"], digits)
    result["encoder-decoder"] = (weights, VOCABULARY.decode([SOS] + written[:-1]), digits)
    return result


def attention_figures(models, origins):
    digits = SENTENCE.split()
    weights = attention_weights(models, digits)
    n = len(digits)
    # How much of its weight a blank, or a word about to be written, puts on its own digit, in the head that does so most.
    blank = weights["encoder-only"][0][:, :, n + 1:, :n].diagonal(dim1=-2, dim2=-1).mean(-1).max().item()
    word = weights["encoder-decoder"][0][:, :, :n].diagonal(dim1=-2, dim2=-1).mean(-1).max().item()
    messages = {
        "encoder-only": ("attention_encoder_only", f"Encoder-only: a blank puts up to {blank:.0%} of a head on its digit"),
        "decoder-only": ("attention_decoder_only", "Decoder-only: each position looks back, never ahead"),
        "encoder-decoder": ("cross_attention", f"Cross-attention: a word puts up to {word:.0%} of a head on its digit")}
    for name, (file, title) in messages.items():
        draw_attention(file, title, origins[name], *weights[name], "is asked")


@torch.inference_mode()
def cross_attention_alignment(models, origins):
    digits = SENTENCE.split()
    written, weights = encoder_decoder.cross_attention(models["encoder-decoder"], digits)
    diagonal = weights[:, :, :len(digits)].diagonal(dim1=-2, dim2=-1).mean(-1)           # (layers, H)
    layer, head = divmod(diagonal.argmax().item(), weights.size(1))
    figure, axis = plt.subplots(figsize=(6, 4))
    image = axis.imshow(weights[layer, head], vmin=0, vmax=1)
    for row, values in enumerate(weights[layer, head].tolist()):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axis.set_xticks(range(len(digits)), digits)
    axis.set_yticks(range(len(written)), VOCABULARY.decode(written))
    axis.set(xlabel=f"source digit\n{origins['encoder-decoder']}", ylabel="word being written")
    axis.xaxis.label.set_fontsize(8)
    figure.colorbar(image, label="weight")
    save(figure, "cross_attention_alignment",
         f"Words line up with their digits (layer {layer}, head {head})")


# -------------------------------------------------------------------------------------
# Cost and meaning
# -------------------------------------------------------------------------------------
def key_value_cache():
    lengths = [16, 32, 64, 128, 192, 256]
    torch.manual_seed(SEED)
    model = decoder_only.DecoderOnlyTransformer(d_model=D_MODEL, num_heads=NUM_HEADS, num_layers=NUM_LAYERS, d_ff=D_FF,
                                                max_len=max(lengths) + 4).eval()
    prompt = [VOCABULARY.encode("4 0 7 <SEP>")]
    model.generate(prompt, 8)
    times = {True: [], False: []}
    for length in lengths:
        for use_cache in (True, False):
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                model.generate(prompt, length, use_cache=use_cache, stop_at=None)
                seconds.append(time.perf_counter() - start)
            times[use_cache].append(1000 * statistics.median(seconds))
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.plot(lengths, times[False], color=ORANGE, linestyle="--", marker="o",
              label="without: every token runs the whole row again")
    axis.plot(lengths, times[True], color=BLUE, marker="s", label="with key/value cache: one token runs")
    axis.set(xlabel="tokens written", ylabel="milliseconds (median of 3)", ylim=(0, None))
    axis.legend(frameon=False)
    saved = 1 - times[True][-1] / times[False][-1]
    save(figure, "key_value_cache", f"At {lengths[-1]} tokens the cache saves {saved:.0%} of the time")


@torch.no_grad()
def embedding_similarity(models, origins):
    trained = models["encoder-decoder"]
    torch.manual_seed(SEED)
    untrained = type(trained)(**trained.arguments)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    tokens, own = DIGITS + WORDS, []
    for axis, model, title in zip(axes, (untrained, trained), ("before training", "after training")):
        vectors = F.normalize(model.embedding.weight[VOCABULARY.encode(tokens)], dim=-1)  # (20, D)
        image = axis.imshow(vectors @ vectors.T, vmin=-1, vmax=1)
        axis.set_xticks(range(20), tokens, rotation=90, fontsize=7)
        axis.set_yticks(range(20), tokens, fontsize=7)
        own.append((vectors[:10] * vectors[10:]).sum(-1).mean().item())                  # a digit with its own word
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)
    figure.supxlabel(origins["encoder-decoder"], fontsize=8)
    save(figure, "embedding_similarity",
         f"How alike are a digit and its word? {own[0]:+.2f} in the mean before training, {own[1]:+.2f} after")


def main():
    check_constants(globals())
    if not SENTENCE.split() or not set(SENTENCE.split()) <= set(DIGITS):
        raise InputError(f"SENTENCE={SENTENCE!r} must be digits with spaces between them: use '4 0 7'")
    if isinstance(TRAIN_EPOCHS, bool) or not isinstance(TRAIN_EPOCHS, int) or TRAIN_EPOCHS < 1:
        raise InputError(f"TRAIN_EPOCHS={TRAIN_EPOCHS!r} cannot work: use a whole number of 1 or more")
    torch.set_num_threads(NUM_THREADS)
    # Before any training: a folder that cannot be written is better found out now.
    try:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / ".writable").touch()
        (FIGURES / ".writable").unlink()
    except OSError as error:
        raise InputError(f"figures/ cannot be written ({error.strerror}): make the folder writable, or remove what is in "
                         "its way") from error
    models, origins, curves, young = load_models()
    for draw in (positional_encoding_heatmap, positional_encoding_curves, positional_distance, masks, who_sees_whom,
                 architecture_encoder_only, architecture_decoder_only, architecture_encoder_decoder,
                 functools.partial(parameters, models), softmax_scaling, functools.partial(sampling_strategies, young),
                 functools.partial(beam_search_tree, young), learning_rate, functools.partial(learning_curves, curves),
                 functools.partial(attention_figures, models, origins),
                 functools.partial(cross_attention_alignment, models, origins), key_value_cache,
                 functools.partial(embedding_similarity, models, origins)):
        draw()
    print(f"{len(list(FIGURES.glob('*.png')))} figures in figures/")


if __name__ == "__main__":
    run_script(main)
