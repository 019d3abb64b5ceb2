"""With copied weights, Hugging Face's models give the same logits, gradients, and tokens."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hugging_face import as_gpt2, as_pegasus, as_pegasus_encoder, cut

from conftest import MODELS
from test_blocks import random_weights
from toy_dataset import EOS, PAD, SOS, pad_rows

SOURCES = [[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17]]
TARGETS = pad_rows([[SOS, 20], [SOS, 16, 23, 25, 2], [SOS]], PAD)


@functools.cache
def twins(name, seed=0):
    """(our model, Hugging Face's with the same weights), random, in float64."""
    torch.manual_seed(seed)
    ours = random_weights(MODELS[name](26, 12, 3, num_layers=2, d_ff=20, max_len=33))
    with torch.no_grad():  # untied, so that the next token is not simply the input token
        ours.output.weight = torch.nn.Parameter(torch.randn_like(ours.embedding.weight))
        ours.output.weight[EOS] *= 3  # so that some rows end early
    copy = {"encoder_only": as_pegasus_encoder, "decoder_only": as_gpt2}.get(name, as_pegasus)
    return ours, copy(ours)


def padded(rows, side):
    """(ids, mask of the real tokens) of rows padded on one side."""
    longest = max(map(len, rows))
    pads = [[PAD] * (longest - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, pads)]
    return torch.tensor(ids), torch.tensor(ids) != PAD


def both_logits(name, side):
    """Logits of our model and of Hugging Face's, and the mask of the positions that count."""
    ours, theirs = twins(name)
    ids, real = padded(SOURCES, side)
    if name == "encoder_decoder":
        other = theirs(input_ids=ids, attention_mask=real.long(), decoder_input_ids=TARGETS)
        return ours(ids, TARGETS), other.logits, TARGETS != PAD
    if name == "encoder_only":
        hidden = theirs(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return ours(ids), F.linear(hidden, ours.output.weight, ours.output.bias), real
    positions = ours.positions_of(ids)
    other = theirs(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    mask = real[:, None, None, :] if side == "left" else None
    return ours(ids, mask), other, real


CASES = [(name, side) for name in MODELS for side in ("right", "left")]


@pytest.mark.parametrize("name, side", CASES)
def test_logits_equal_those_of_hugging_face(name, side):
    with torch.no_grad():
        ours, theirs, real = both_logits(name, side)
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name, side", CASES)
def test_gradients_equal_those_of_hugging_face(name, side):
    """The gradient of the first layer's queries depends on all that follows."""
    ours, theirs = twins(name)
    mine, other, real = both_logits(name, side)
    layer = getattr(ours, "layers", None) or ours.encoder_layers
    query = {
        "encoder_only": lambda: theirs.layers[0].self_attn.q_proj.weight,
        "decoder_only": lambda: theirs.transformer.h[0].attn.c_attn.weight,
        "encoder_decoder": lambda: theirs.model.encoder.layers[0].self_attn.q_proj.weight,
    }[name]()
    attention = getattr(layer[0], "attention", None) or layer[0].self_attention
    (mine,) = torch.autograd.grad(mine[real].square().mean(), attention.w_q.weight)
    (other,) = torch.autograd.grad(other[real].square().mean(), query)
    other = other[:, :12].T if name == "decoder_only" else other
    assert mine.abs().max() > 1e-6
    torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["decoder_only", "encoder_decoder"])
def test_greedy_generation_equals_that_of_hugging_face(name):
    distinct = set()
    for seed in range(10):
        ours, theirs = twins(name, seed)
        ids, real = padded(SOURCES, "left" if name == "decoder_only" else "right")
        rows = theirs.generate(
            ids, attention_mask=real.long(), max_new_tokens=20, do_sample=False
        ).tolist()
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
        ids, real = padded(SOURCES, "right")
        rows = theirs.generate(
            ids,
            attention_mask=real.long(),
            num_beams=width,
            length_penalty=penalty,
            early_stopping="never",
            max_new_tokens=9,
            do_sample=False,
        )
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
