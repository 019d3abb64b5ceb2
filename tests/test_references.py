"""Whole models equal those of torch.nn and Hugging Face, with copied random weights, in float64.

Every size differs from every other, and norms and biases are random too, so a swapped axis, a norm
in another place, or a memory of another layer shows.
"""
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hugging_face import as_gpt2, as_pegasus, as_pegasus_encoder, cut
from torch import nn

from conftest import MODELS, close, logits_of, random_weights
from test_attention import copy_layer, torch_layer
from toy_dataset import EOS, PAD, SOS, pad_rows

V, D, H, LAYERS, D_FF, MAX_LEN = 26, 12, 2, 3, 20, 33
SOURCES = [[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17], [11]]
SOURCE = pad_rows(SOURCES, PAD)  # (4, 7)
PADDED = {"right": SOURCE,
          "left": torch.tensor([[PAD] * (7 - len(row)) + row for row in SOURCES])}
TARGET = pad_rows([[SOS, 20], [SOS, 16, 23, 25, 2], [SOS], [SOS, 21, 18]], PAD)  # (4, 5)


# --- torch.nn -------------------------------------------------------------------------
def sinusoids():
    """(MAX_LEN, D) in float64 (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(MAX_LEN)[:, None] / 10000 ** (torch.arange(0, D, 2).double() / D)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def embed(model, tokens):
    """The documented input: embedding times sqrt(D), plus positions."""
    return model.embedding.weight[tokens] * math.sqrt(D) + sinusoids()[:tokens.size(1)]


def stack(kind, layers, norm):
    """A torch.nn stack with these layers and this last norm."""
    more = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    theirs = getattr(nn, f"Transformer{kind}")(torch_layer(kind, D, H, D_FF), LAYERS,
                                               nn.LayerNorm(D), **more).double().train()
    for mine, other in zip(layers, theirs.layers):
        copy_layer(mine, other)
    theirs.norm.load_state_dict(norm.state_dict())
    return theirs


def torch_logits(name, model):
    x, padding = embed(model, SOURCE), SOURCE == PAD
    length = 5 if name == "encoder_decoder" else 7
    future = torch.ones(length, length, dtype=torch.bool).triu(1)  # True = masked, as in torch.nn
    if name == "encoder_decoder":
        memory = stack("Encoder", model.encoder_layers, model.encoder_norm)(
            x, src_key_padding_mask=padding)
        hidden = stack("Decoder", model.decoder_layers, model.final_norm)(
            embed(model, TARGET), memory, future, memory_key_padding_mask=padding)
    else:
        hidden = stack("Encoder", model.layers, model.final_norm)(
            x, future if name == "decoder_only" else None, padding)
    return F.linear(hidden, model.embedding.weight, model.output.bias)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_equals_one_built_from_torch_nn(name):
    model = random_weights(MODELS[name](V, D, H, LAYERS, D_FF, max_len=MAX_LEN))
    close(model.positional_encoding.table, sinusoids(), 1e-6)
    model.positional_encoding.table = sinusoids()  # the same table without float32 rounding
    real = (TARGET if name == "encoder_decoder" else SOURCE) != PAD
    close(logits_of(model, SOURCE, TARGET)[real], torch_logits(name, model)[real])


# --- Hugging Face ---------------------------------------------------------------------
@functools.cache
def twins(name, seed=0):
    """(our model, Hugging Face's with the same weights), random, in float64."""
    torch.manual_seed(seed)
    ours = random_weights(MODELS[name](V, D, H, LAYERS, D_FF, max_len=MAX_LEN))
    with torch.no_grad():  # untied, so that the next token is not simply the input token
        ours.output.weight = nn.Parameter(torch.randn_like(ours.embedding.weight))
        ours.output.weight[EOS] *= 3  # so that some rows end early
    copy = {"encoder_only": as_pegasus_encoder, "decoder_only": as_gpt2}.get(name, as_pegasus)
    return ours, copy(ours)


def both_logits(name, side):
    """Logits of our model and of Hugging Face's at the real positions."""
    ours, theirs = twins(name)
    ids = PADDED[side]
    real, mask = ids != PAD, (ids != PAD).long()
    if name == "encoder_decoder":
        other = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=TARGET).logits
        return ours(ids, TARGET)[TARGET != PAD], other[TARGET != PAD]
    if name == "encoder_only":
        hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        return ours(ids)[real], F.linear(hidden, ours.output.weight, ours.output.bias)[real]
    other = theirs(input_ids=ids, attention_mask=mask, position_ids=ours.positions_of(ids)).logits
    return ours(ids, real[:, None, None] if side == "left" else None)[real], other[real]


def first_norm(model):
    """The weights of its first layer norm. Their gradient depends on all that follows."""
    names = "norm1.weight", "ln_1.weight", "self_attn_layer_norm.weight"
    return next(p for name, p in model.named_parameters() if name.endswith(names))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_those_of_hugging_face(name, side):
    ours, theirs = twins(name)
    mine, other = both_logits(name, side)
    close(mine, other, 1e-9)
    mine, other = (torch.autograd.grad(logits.square().mean(), first_norm(model))[0]
                   for logits, model in ((mine, ours), (other, theirs)))
    assert mine.abs().max() > 1e-6
    torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["decoder_only", "encoder_decoder"])
def test_greedy_generation_equals_that_of_hugging_face(name):
    distinct = set()
    for seed in range(10):
        ours, theirs = twins(name, seed)
        ids = PADDED["left" if name == "decoder_only" else "right"]
        rows = theirs.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=20,
                               do_sample=False).tolist()
        start = ids.size(1) - 1 if name == "decoder_only" else 0
        expected = [cut(row[start:]) for row in rows]
        assert ours.generate(SOURCES, 20) == expected
        distinct |= {tuple(row) for row in expected}
    assert len(distinct) > 8 and len({len(row) for row in distinct}) > 2


@pytest.mark.parametrize("width, penalty", [(2, 1.0), (3, 0.0), (5, 0.7)])
def test_beam_search_is_never_worse_than_hugging_faces(width, penalty):
    """Equal in nearly all searches. Ours also records what ends among the second best W."""
    same, searches, ended = 0, 0, 0
    for seed in range(8):
        ours, theirs = twins("encoder_decoder", seed)
        rows = theirs.generate(
            SOURCE, attention_mask=(SOURCE != PAD).long(), num_beams=width, do_sample=False,
            length_penalty=penalty, early_stopping="never", max_new_tokens=9)
        found = ours.beam_search(SOURCES, width, penalty, 9)
        for source, row, hypotheses in zip(SOURCES, rows.tolist(), found):
            tokens = cut(row)
            with torch.no_grad():
                logits = ours(torch.tensor([source]), torch.tensor([[SOS] + tokens[:-1]]))[0]
            log_p = logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item()
            assert hypotheses[0].score >= log_p / len(tokens) ** penalty - 1e-9
            same += hypotheses[0].tokens == tokens
            searches += 1
            ended += len(tokens) < 9
    assert same >= 0.8 * searches and ended > 3
