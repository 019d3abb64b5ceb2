"""Which tokens may change which outputs: causal masks, padding masks, masks from the caller."""
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import MODELS, SCRIPTS, close, logits_of, random_model
from toy_dataset import PAD, SOS, VOCABULARY, pad_rows, padding_mask
from training import fused_attention

ROW = VOCABULARY.encode("4 0 7 <SEP> four zero seven")
TARGET = torch.tensor([[SOS, 20, 16, 23, 25]])


@torch.no_grad()
def influence(logits, tokens):
    """(inputs, outputs), True where another input token changes the output.

    The others must not change by even one bit: nothing that is masked may take part.
    """
    before, changes = logits(tokens), []
    for i in range(tokens.size(1)):
        other = tokens.clone()
        other[0, i] = 9
        difference = (logits(other) - before).abs().sum(-1)[0]
        assert ((difference == 0) | (difference > 1e-6)).all()
        changes.append(difference > 0)
    return torch.stack(changes)


# --- The causal mask ------------------------------------------------------------------
@pytest.mark.parametrize("script", ["decoder_only", "encoder_decoder"])
def test_causal_masks_align_the_last_query_with_the_last_key(script):
    def drawn(queries, keys):
        mask = SCRIPTS[script].causal_mask(queries, keys)
        assert mask.shape == (1, 1, queries, keys) and mask.dtype == torch.bool
        return ["".join(".#"[allowed] for allowed in row) for row in mask[0, 0].tolist()]

    assert drawn(3, 3) == ["#..", "##.", "###"]
    assert drawn(2, 5) == ["####.", "#####"]
    assert drawn(1, 4) == ["####"]


def test_a_future_token_cannot_change_the_past_in_a_gpt():
    model = random_model("decoder_only")
    assert influence(model, torch.tensor([ROW])).equal(torch.ones(7, 7).triu().bool())


def test_a_future_token_cannot_change_the_past_in_a_decoder():
    model, source = random_model("encoder_decoder"), torch.tensor([ROW])
    of_target = influence(lambda target: model(source, target), TARGET)
    assert of_target.equal(torch.ones(5, 5).triu().bool())
    of_source = influence(lambda source: model(source, TARGET), source)
    assert of_source.shape == (7, 5) and of_source.all()  # it is all known, so it changes all


def test_every_encoder_output_depends_on_every_input_token():
    assert influence(random_model("encoder_only"), torch.tensor([ROW])).all()


# --- Padding --------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_padding_cannot_change_a_real_position(name):
    model, alone = random_model(name), torch.tensor([ROW])
    padded = F.pad(alone, (0, 6), value=PAD)
    expected = logits_of(model, alone, TARGET)
    close(logits_of(model, padded, TARGET)[:, :expected.size(1)], expected)
    if name == "encoder_decoder":
        close(model(padded, F.pad(TARGET, (0, 4), value=PAD))[:, :5], expected)
    if name == "decoder_only":  # on the left, it needs the mask and positions of its own
        left = F.pad(alone, (6, 0), value=PAD)
        assert model.positions_of(left).tolist() == [[0] * 6 + [0, 1, 2, 3, 4, 5, 6]]
        logits = model(left, padding_mask(left))
        close(logits[:, 6:], expected)
        assert logits.isfinite().all()  # of the padding too, which may attend to nothing


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_rows(name):
    model, rows = random_model(name), [ROW, ROW[:1], ROW[:4], ROW[3:5]]
    targets = [TARGET[0].tolist(), [SOS], [SOS, 16, 23], [SOS, 20, 7, 9]]
    batch = logits_of(model, pad_rows(rows, PAD), pad_rows(targets, PAD))
    for found, row, target in zip(batch, rows, targets):
        alone = logits_of(model, torch.tensor([row]), torch.tensor([target]))[0]
        close(found[:len(alone)], alone)


def test_the_encoder_masks_padding_without_being_told_to():
    for name in ("encoder_only", "encoder_decoder"):
        model = random_model(name, num_layers=3)
        tokens = pad_rows([ROW[:5], ROW[:2], ROW[4:5], ROW[2:6]], PAD)  # (4, 5)
        hidden, weights = model.run_encoder(tokens)
        close(hidden[1:2, :2], model.run_encoder(tokens[1:2, :2])[0])
        close(hidden, model.run_encoder(tokens, padding_mask(tokens))[0])
        assert len(weights) == 3
        for layer in weights:
            assert (layer > 0).equal(padding_mask(tokens).expand(4, 2, 5, 5))


# --- Masks from the caller ------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_mask_that_is_given_is_used(name):
    model, mask = random_model(name), torch.tensor([True, False, True, True])[None, None, None]
    tokens, other = torch.tensor([[10, 6, 13, 4]]), torch.tensor([[10, 9, 13, 4]])

    def logits(tokens, *mask):
        target = [TARGET] if name == "encoder_decoder" else []
        return model(tokens, *target, *mask)[:, 2:]  # without the masked position itself

    close(logits(tokens, mask), logits(other, mask))  # they differ only where nothing may attend
    assert not torch.allclose(logits(tokens, mask), logits(tokens))


def with_infinity(queries, keys, values, mask):
    """`attention`, except that masked scores are -inf."""
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.size(-1))
    weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
    return weights @ values, weights


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fully_masked_query_gets_finite_numbers_never_nan(script, dtype):
    """All other queries get the same bits as with -inf, and all gradients are finite."""
    inputs = [torch.randn(4, 2, length, 7).to(dtype).requires_grad_() for length in (3, 5, 5)]
    mask = torch.rand(4, 1, 3, 5) < 0.7
    mask[1], mask[2, 0, 1], mask[0] = False, False, True
    used = mask.any(-1).expand(4, 2, 3)
    assert 6 < used.sum() < 24
    results = SCRIPTS[script].attention(*inputs, mask)
    for found, expected in zip(results, with_infinity(*inputs, mask)):
        assert found.isfinite().all() and expected[~used].isnan().all()
        assert found[used].equal(expected[used])
    for out in (results[0], fused_attention(*inputs, mask)[0]):
        assert out.isfinite().all()
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        assert all(gradient.isfinite().all() for gradient in gradients)
