"""Whole models, built from torch.nn parts in the documented way, with copied random weights.

Every size differs from every other, and norms and biases are random too, so a swapped axis, a norm
in another place, or a memory of another layer shows. Logits are compared in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import encoder_only
from conftest import MODELS, SCRIPTS, random_model
from test_blocks import copy_attention, random_weights
from toy_dataset import PAD, SOS, VOCABULARY, create_dataloaders, pad_rows

D, H, LAYERS, D_FF, MAX_LEN, V = 12, 3, 2, 20, 11, 26
SOURCES = pad_rows([[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17]], PAD)  # (3, 7)
TARGETS = pad_rows([[SOS, 20], [SOS, 16, 23, 25, 2], [SOS]], PAD)  # (3, 5)
OPTIONS = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}


def sinusoids():
    """(MAX_LEN, D) in float64 (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(MAX_LEN)[:, None] / 10000 ** (torch.arange(0, D, 2).double() / D)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def model_with_random_weights(name):
    sizes = {"num_layers": LAYERS, "d_ff": D_FF, "max_len": MAX_LEN}
    model = random_weights(MODELS[name](V, D, H, **sizes))
    torch.testing.assert_close(model.positional_encoding.table, sinusoids(), atol=1e-6, rtol=0)
    model.positional_encoding.table = sinusoids()  # the same table without float32 rounding
    return model


def embed(model, tokens):
    """The documented input: embedding times sqrt(D), plus positions."""
    vectors = F.embedding(tokens, model.embedding.weight)
    return vectors * math.sqrt(D) + sinusoids()[: tokens.size(1)]


def copy_layer(ours, theirs):
    """Copy a layer of this collection into a torch.nn layer."""
    copy_attention(getattr(ours, "attention", None) or ours.self_attention, theirs.self_attn)
    theirs.norm1.load_state_dict(ours.norm1.state_dict())
    last = theirs.norm2
    if hasattr(ours, "cross_attention"):
        copy_attention(ours.cross_attention, theirs.multihead_attn)
        theirs.norm2.load_state_dict(ours.norm_cross.state_dict())
        last = theirs.norm3
    last.load_state_dict(ours.norm2.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.down.state_dict())


@torch.no_grad()
def stack(kind, layers, norm):
    """A torch.nn stack with its last norm. In training mode, PyTorch uses no fused path."""
    layer = getattr(nn, f"Transformer{kind}Layer")(D, H, D_FF, **OPTIONS)
    more = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    theirs = getattr(nn, f"Transformer{kind}")(layer, LAYERS, nn.LayerNorm(D), **more)
    theirs = theirs.double().train()
    for mine, other in zip(layers, theirs.layers):
        copy_layer(mine, other)
    theirs.norm.load_state_dict(norm.state_dict())
    return theirs


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)  # True = masked, as in torch.nn


def expected_logits(name, model):
    padding = SOURCES == PAD
    x = embed(model, SOURCES)
    if name == "encoder_decoder":
        memory = stack("Encoder", model.encoder_layers, model.encoder_norm)(
            x, src_key_padding_mask=padding
        )
        hidden = stack("Decoder", model.decoder_layers, model.final_norm)(
            embed(model, TARGETS),
            memory,
            tgt_mask=causal(TARGETS.size(1)),
            memory_key_padding_mask=padding,
        )
    else:
        mask = causal(SOURCES.size(1)) if name == "decoder_only" else None
        hidden = stack("Encoder", model.layers, model.final_norm)(
            x, mask=mask, src_key_padding_mask=padding
        )
    return F.linear(hidden, model.embedding.weight, getattr(model.output, "bias", None))


def logits_and_real(name, model):
    """Our logits for the ragged batch, and which positions are real tokens."""
    if name == "encoder_decoder":
        return model(SOURCES, TARGETS), TARGETS != PAD
    return model(SOURCES), SOURCES != PAD


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_whole_model_equals_one_built_from_torch_nn(name):
    model = model_with_random_weights(name)
    logits, real = logits_and_real(name, model)
    torch.testing.assert_close(logits[real], expected_logits(name, model)[real], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_constructor_argument_sets_the_size_it_names(name):
    stacks = 2 if name == "encoder_decoder" else 1
    cross = stacks - 1
    arguments = {"vocab_size": 31, "d_model": 18, "num_heads": 3, "num_layers": 5, "d_ff": 7}
    model = MODELS[name](**arguments, dropout=0.25, max_len=9)
    attention, norm = 4 * (18 * 18 + 18), 2 * 18
    layer = attention + 2 * norm + 18 * 7 + 7 + 7 * 18 + 18
    total = 31 * 18 + stacks * (5 * layer + norm) + cross * 5 * (attention + norm)
    total += 31 if name == "encoder_only" else 0  # its output has a bias
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.positional_encoding.table.shape == (9, 18)
    modules = list(model.modules())
    rates = {m.p for m in modules if isinstance(m, nn.Dropout)}
    rates |= {m.dropout for m in modules if type(m).__name__ == "MultiHeadAttention"}
    heads = {m.num_heads for m in modules if type(m).__name__ == "MultiHeadAttention"}
    assert rates == {0.25} and heads == {3}


# --- modes: where dropout acts, and where it must not ----------------------------------
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


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_in_every_documented_place(name, dropped):
    model = MODELS[name](V, D, H, num_layers=LAYERS, d_ff=D_FF, max_len=MAX_LEN, dropout=0.5)
    logits_and_real(name, model.train())
    # An encoder or GPT layer: attention weights, two branches, inside the feed-forward network.
    # Cross-attention adds its weights and its branch. Each stack also drops from its embeddings.
    places = 1 + 4 * LAYERS if name != "encoder_decoder" else 2 + (4 + 6) * LAYERS
    assert dropped == [0.5] * places
    logits_and_real(name, model.eval())
    assert len(dropped) == places


@pytest.mark.parametrize("name", MODELS)
def test_no_helper_uses_dropout(name, dropped, capsys):
    script = SCRIPTS[name]
    model = random_model(name, dropout=0.5, max_len=40)
    _, loader = create_dataloaders(200, 3, 32, 0)
    digits, words = [["4", "0"], ["7"]], [["four", "zero"], ["seven"]]
    examples = [(d, w, w) for d, w in zip(digits, words)]
    row = ["4", "0", "<SEP>", "<MASK>", "<MASK>"]
    helpers = {
        "encoder_only": [
            lambda: script.fill_masks(model, [row]),
            lambda: script.translate_back(model, words),
            lambda: script.evaluate_classifier(
                encoder_only.MatchClassifier(model).double().train(), loader
            ),
            lambda: script.show_predictions(model, " ".join(row)),
            lambda: script.show_attention(model, row),
            lambda: script.show_alignment(model, digits),
        ],
        "decoder_only": [
            lambda: model.generate([[6, 4]], 3),
            lambda: script.most_uncertain(model, loader),
            lambda: script.show_filters(model, ["4", "<SEP>"]),
            lambda: script.show_repetition_penalty(model, digits, words),
            lambda: script.time_generation(model, (2,), rounds=1),
            lambda: script.show_attention(model, ["4", "0"]),
        ],
        "encoder_decoder": [
            lambda: model.generate([[6]], 3),
            lambda: model.beam_search([[6]], 2, max_new_tokens=3),
            lambda: script.show_beam_search(model, digits[0], words[0], 2, 1.0),
            lambda: script.show_beam_scores(model, examples, 2),
            lambda: script.where_beams_help(model, examples, 2, 1.0),
            lambda: script.show_cross_attention(model, digits[0]),
        ],
    }[name]
    helpers += [lambda: script.translate(model, digits), lambda: script.evaluate(model, loader)]
    for number, helper in enumerate(helpers):
        model.train()
        helper()
        assert dropped == [], number
    model.train()
    script.logits_and_labels(model, next(iter(loader)))  # but training does use it
    assert dropped


@pytest.mark.parametrize("name", MODELS)
def test_a_rejected_call_leaves_the_mode_as_it_was(name):
    for training in (True, False):
        model = random_model(name).train(training)
        with pytest.raises(ValueError):
            SCRIPTS[name].translate(model, [["4"] * 99])
        assert model.training == training


def test_the_vocabulary_is_spelled_out():
    assert (
        VOCABULARY.tokens
        == (
            "<PAD> <SOS> <EOS> <UNK> <SEP> <MASK> 0 1 2 3 4 5 6 7 8 9 "
            "zero one two three four five six seven eight nine"
        ).split()
    )
