"""Whole models: sizes, weights, gradients, modes, and what they fill in, classify, and show."""
import math
import re
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import decoder_only
import encoder_decoder
import encoder_only
from conftest import MODELS, SCRIPTS, close, logits_of, random_model, random_models
from toy_dataset import (IGNORE_INDEX, MASK, PAD, SEP, SOS, VOCABULARY, NumberTranslationDataset,
                         collate_fn, create_dataloaders, make_item, pad_rows)
from training import use_fused_attention

B, S, T, V, D, H, LAYERS, D_FF = 4, 7, 5, 26, 12, 2, 3, 20
SOURCES = pad_rows([[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17], [11]], PAD)
TARGETS = pad_rows([[SOS, 20], [SOS, 16, 23, 25, 2], [SOS], [SOS, 21, 18]], PAD)
for_every_model = pytest.mark.parametrize("name", MODELS)


# --- Sizes, weights, gradients --------------------------------------------------------
@for_every_model
def test_every_constructor_argument_sets_the_size_it_names(name):
    stacks = 2 if name == "encoder_decoder" else 1
    sizes = {"vocab_size": 31, "d_model": 18, "num_heads": 3, "num_layers": 5, "d_ff": 7}
    model = MODELS[name](**sizes, dropout=0.25, max_len=9)
    attention, norm = 4 * (18 * 18 + 18), 2 * 18
    layer = attention + 2 * norm + 18 * 7 + 7 + 7 * 18 + 18
    total = 31 * 18 + stacks * (5 * layer + norm) + (stacks - 1) * 5 * (attention + norm)
    total += 31 if name == "encoder_only" else 0  # its output has a bias
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.positional_encoding.table.shape == (9, 18)
    assert model.arguments == {**sizes, "dropout": 0.25, "max_len": 9}
    modules = list(model.modules())
    attentions = [m for m in modules if hasattr(m, "attention_function")]
    assert {m.num_heads for m in attentions} == {3}
    rates = {m.dropout for m in attentions} | {m.p for m in modules if isinstance(m, nn.Dropout)}
    assert rates == {0.25}
    for impossible in ({"d_model": 65, "num_heads": 5}, {"num_heads": 3}, {"num_heads": 0}):
        with pytest.raises(ValueError, match="cannot work|does not divide"):
            MODELS[name](**impossible)


@for_every_model
def test_weights_are_tied_and_the_first_loss_is_a_guess(name):
    model = MODELS[name]()
    assert model.output.weight is model.embedding.weight
    _, loader = create_dataloaders(2000, 5, 64, 0)
    assert SCRIPTS[name].evaluate(model, loader)["loss"] == pytest.approx(math.log(26), abs=0.15)


@for_every_model
def test_every_parameter_gets_a_gradient(name):
    model = MODELS[name]()
    batch = next(iter(create_dataloaders(500, 5, 64, 0)[0]))
    SCRIPTS[name].compute_loss(model, batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or (p.grad == 0).all()]
    # The bias of the keys adds the same to all scores of a query. The softmax ignores it, so its
    # gradient is rounding noise.
    assert all(n.endswith("w_k.bias") for n in without)


@for_every_model
def test_order_matters_only_because_of_positions(name):
    # One layer only. With more, a causal model can infer the order even without positions,
    # because the first layer shows each token only the tokens before it.
    model = random_model(name, num_layers=1)

    def last(*tokens):
        return logits_of(model, torch.tensor([tokens]), torch.tensor([[SOS]]))[0, -1]

    assert (last(10, 6, 13, 9) - last(6, 10, 13, 9)).abs().max() > 1e-3
    model.positional_encoding.table.zero_()
    close(last(10, 6, 13, 9), last(6, 10, 13, 9))


@for_every_model
def test_each_layer_returns_weights_and_matches_the_fused_kernel(name):
    model = random_model(name, num_layers=LAYERS)

    def run():
        if name == "encoder_decoder":
            memory, _ = model.run_encoder(SOURCES)
            return model.run_decoder(TARGETS, memory, (SOURCES != PAD)[:, None, None])
        return (model.run_encoder if name == "encoder_only" else model.run_decoder)(SOURCES)

    shape = (B, H, T if name == "encoder_decoder" else S, S)
    (out, weights), (expected, none) = run(), (use_fused_attention(model), run())[1]
    assert none == [None] * LAYERS and len(weights) == LAYERS
    close(out, expected)
    for layer in weights:
        assert layer.shape == shape
        close(layer.sum(-1), torch.ones(shape[:3]).double())


@for_every_model
def test_a_forward_pass_compiles_as_one_graph(name):
    model = random_model(name, num_layers=LAYERS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(logits_of(compiled, SOURCES, TARGETS), logits_of(model, SOURCES, TARGETS))


# --- Modes: where dropout acts, and where it must not ---------------------------------
@pytest.fixture
def dropped(monkeypatch):
    """A list that receives the rate of every dropout that acts."""
    acting, dropout = [], F.dropout

    def record(x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            acting.append(p)
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", record)
    return acting


@for_every_model
def test_dropout_acts_in_training_in_every_documented_place(name, dropped):
    model = MODELS[name](V, D, H, LAYERS, D_FF, dropout=0.5).train()
    logits_of(model, SOURCES, TARGETS)
    # An encoder or GPT layer: attention weights, two branches, inside the feed-forward network.
    # Cross-attention adds its weights and its branch. Each stack also drops from its embeddings.
    places = 1 + 4 * LAYERS if name != "encoder_decoder" else 2 + (4 + 6) * LAYERS
    assert dropped == [0.5] * places
    logits_of(model.eval(), SOURCES, TARGETS)
    assert len(dropped) == places


@for_every_model
def test_dropout_acts_on_the_embeddings(name):
    """After the positions are added, so with a rate of 1, all tokens are the same."""
    model = MODELS[name](V, D, H, LAYERS, D_FF).train()
    model.dropout.p = 1.0
    logits = logits_of(model, SOURCES, TARGETS).flatten(0, 1)
    close(logits, logits[:1].expand_as(logits), 1e-6)


@for_every_model
def test_no_helper_uses_dropout(name, dropped, capsys):
    script, model = SCRIPTS[name], random_model(name, dropout=0.5)
    _, loader = create_dataloaders(200, 3, 32, 0)
    digits, words = [["4", "0"], ["7"]], [["four", "zero"], ["seven"]]
    examples = [(d, w, w) for d, w in zip(digits, words)]
    row = ["4", "0", "<SEP>", "<MASK>", "<MASK>"]
    helpers = [lambda: script.translate(model, digits), lambda: script.evaluate(model, loader)]
    helpers += {
        "encoder_only": [
            lambda: script.translate_back(model, words),
            lambda: script.evaluate_classifier(script.MatchClassifier(model).double(), loader),
            lambda: script.show_attention(model, row),
            lambda: script.show_alignment(model, digits)],
        "decoder_only": [
            lambda: script.show_filters(model, "4 <SEP>"),
            lambda: script.show_sampling(model, list(zip(digits, words)), copies=1),
            lambda: script.show_attention(model, ["4", "0"])],
        "encoder_decoder": [
            lambda: script.show_beam_search(model, digits[0], words[0], 2, 1.0),
            lambda: script.show_beam_scores(model, examples, 2),
            lambda: script.where_beams_help(model, examples, 2, 1.0),
            lambda: script.show_cross_attention(model, digits[0])]}[name]
    for number, helper in enumerate(helpers):
        model.train()
        helper()
        assert dropped == [], number


# --- The encoder-only model: filling masks, the classifier ----------------------------
def test_fill_masks_changes_only_the_masks():
    model, expected = random_model("encoder_only", dropout=0.5), []
    rows = ["4 0 <MASK> <SEP> four zero seven".split(), "<MASK>".split(), "9 <SEP> nine".split(),
            "<MASK> <MASK> 5 <SEP>".split()]
    for row in rows:
        best = VOCABULARY.decode(model(torch.tensor([VOCABULARY.encode(row)]))[0].argmax(-1))
        expected.append([b if token == "<MASK>" else token for token, b in zip(row, best)])
    model.train()  # it uses no dropout, and restores the mode
    assert encoder_only.fill_masks(model, rows) == expected and model.training


def test_translating_fills_the_masks_on_the_other_side():
    fill, m = encoder_only.fill_masks, "<MASK>"
    digits, words = [["4", "0"], ["9"]], [["four", "zero"], ["nine"]]
    for model in random_models("encoder_only", 4):
        one, two = fill(model, [["4", "0", "<SEP>", m, m], ["9", "<SEP>", m]])
        assert encoder_only.translate(model, digits) == [one[3:], two[2:]]
        one, two = fill(model, [[m, m, "<SEP>", "four", "zero"], [m, "<SEP>", "nine"]])
        assert encoder_only.translate_back(model, words) == [one[:2], two[:1]]


def test_evaluation_masks_all_words_and_nothing_else():
    model, i = random_model("encoder_only"), IGNORE_INDEX
    batch = collate_fn([make_item(["4", "0"]), make_item(["7"])])
    logits, labels = encoder_only.logits_and_labels(model, batch)
    assert labels.tolist() == [[i, i, i, 20, 16], [i, i, 23, i, i]]
    close(logits, model(torch.tensor([[10, 6, SEP, MASK, MASK], [13, SEP, MASK, PAD, PAD]])))


def test_the_classifier_averages_real_tokens_only():
    model = random_model("encoder_only")
    classifier = encoder_only.MatchClassifier(model).double().eval()
    items = NumberTranslationDataset(40, 4, 0).items
    batch = collate_fn(items)["pair"]
    alone = [collate_fn([item])["pair"] for item in items]
    expected = [classifier.head(model.run_encoder(row)[0].mean(1)) for row in alone]
    close(classifier(batch), torch.cat(expected))


# --- Looking inside: with more layers than heads, so that an exchanged index shows -----
@for_every_model
def test_the_attention_shown_is_that_of_the_best_head(name, capsys):
    """It is the head in which word i attends most to digit i, on average."""
    digits, ids, seen = ["4", "0", "7"], [10, 6, 13], set()
    for model in random_models(name, num_heads=H, num_layers=LAYERS):
        if name == "encoder_only":
            first, tokens = 4, torch.tensor([ids + [SEP] + [MASK] * 3])
            _, weights = model.run_encoder(tokens)
            encoder_only.show_attention(model, VOCABULARY.decode(tokens[0]))
        elif name == "decoder_only":
            first, tokens = 3, ids + [SEP] + model.generate([ids + [SEP]], 5)[0][:-1]
            _, weights = model.run_decoder(torch.tensor([tokens]))
            decoder_only.show_attention(model, digits)
        else:
            first, tokens = 0, [SOS] + model.generate([ids], 5)[0][:-1]
            _, weights = model.run_decoder(torch.tensor([tokens]), *model.read([ids]))
            encoder_decoder.show_cross_attention(model, digits)
        weights = torch.stack(weights)[:, 0, :, first:].tolist()
        means = {(layer, head): mean(row[i] for i, row in enumerate(weights[layer][head][:3]))
                 for layer in range(LAYERS) for head in range(H)}
        layer, head = best = max(means, key=means.get)
        printed = capsys.readouterr().out.splitlines()
        title = next(i for i, line in enumerate(printed) if line.startswith("  layer "))
        assert printed[title].startswith(f"  layer {layer}, head {head}")
        rows = [line[12:].split() for line in printed[title + 2:]]  # after the names
        assert rows == [[f"{weight:.2f}" for weight in row] for row in weights[layer][head]]
        seen.add(best)
    assert len(seen) > 2


def test_alignment_counts_the_words_that_attend_most_to_their_digit(capsys):
    model, hits = random_model("encoder_only", num_layers=LAYERS), torch.zeros(LAYERS, H)
    sequences = [["4", "0", "7"], ["9"], ["1", "2"], ["5", "5", "8", "3"]]
    for digits in sequences:
        n = len(digits)
        row = torch.tensor([VOCABULARY.encode([*digits, "<SEP>"] + ["<MASK>"] * n)])
        weights = torch.stack(model.run_encoder(row)[1])[:, 0, :, n + 1:]  # (LAYERS, H, n, S)
        hits += (weights.argmax(-1) == torch.arange(n)).sum(-1)
    encoder_only.show_alignment(model, sequences)
    shown = re.findall(r"head \d: +([\d.]+)%", capsys.readouterr().out)
    assert [float(share) for share in shown] == (10 * hits).flatten().tolist()
    assert hits.unique().numel() > 2
