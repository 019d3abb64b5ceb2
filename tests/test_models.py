"""The models: which tokens change which outputs, padding changes nothing, checkpoints are safe."""

import math
import os
import time

import pytest
import torch

import decoder_only
import encoder_only
from conftest import MODELS, SCRIPTS, random_model
from housekeeping import load_checkpoint
from toy_dataset import (
    IGNORE_INDEX,
    MASK,
    PAD,
    SEP,
    SOS,
    VOCABULARY,
    collate_fn,
    create_dataloaders,
    pad_rows,
)
from train_all import use_fused_attention

PROMPT = VOCABULARY.encode("4 0 7 <SEP> four zero seven")


def logits_of(name, model, source, target=None):
    """Logits for source ids (B, S); the encoder-decoder also gets `target` as decoder input."""
    return model(source, target) if name == "encoder_decoder" else model(source)


@torch.no_grad()
def test_a_future_token_cannot_change_the_past_in_a_gpt():
    model = random_model("decoder_only")
    before = model(torch.tensor([PROMPT]))
    for changed in range(len(PROMPT)):
        tokens = torch.tensor([PROMPT])
        tokens[0, changed] = 9
        difference = (model(tokens) - before).abs().sum(-1)[0]
        assert (difference[:changed] == 0).all()
        assert (difference[changed:] > 1e-6).all()  # but earlier tokens change later outputs


@torch.no_grad()
def test_a_future_token_cannot_change_the_past_in_a_decoder():
    model = random_model("encoder_decoder")
    source, target = torch.tensor([PROMPT[:3]]), torch.tensor([[SOS, 20, 16, 23]])
    before = model(source, target)
    for changed in range(4):
        other = target.clone()
        other[0, changed] = 9
        difference = (model(source, other) - before).abs().sum(-1)[0]
        assert (difference[:changed] == 0).all() and (difference[changed:] > 1e-6).all()
    for changed in range(3):  # every target position sees every source position
        other = source.clone()
        other[0, changed] = 15
        assert ((model(other, target) - before).abs().sum(-1)[0] > 1e-6).all()


@torch.no_grad()
def test_every_encoder_output_depends_on_every_input_token():
    model = random_model("encoder_only")
    before = model(torch.tensor([PROMPT]))
    for changed in range(len(PROMPT)):
        tokens = torch.tensor([PROMPT])
        tokens[0, changed] = 9
        assert ((model(tokens) - before).abs().sum(-1)[0] > 1e-6).all()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_cannot_change_a_real_position(name):
    model = random_model(name)
    alone = torch.tensor([PROMPT])
    padded = torch.cat([alone, torch.full((1, 6), PAD)], dim=1)
    target = torch.tensor([[SOS, 20, 16]])
    expected = logits_of(name, model, alone, target)
    out = logits_of(name, model, padded, target)
    torch.testing.assert_close(out[:, : expected.size(1)], expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_padding_in_the_target_cannot_change_a_real_position():
    model = random_model("encoder_decoder")
    source, target = torch.tensor([PROMPT[:3]]), torch.tensor([[SOS, 20, 16]])
    padded = torch.cat([target, torch.full((1, 4), PAD)], dim=1)
    out = model(source, padded)
    torch.testing.assert_close(out[:, :3], model(source, target), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_batch_equals_its_rows(name):
    model = random_model(name)
    rows = [PROMPT, PROMPT[:1], PROMPT[:4]]
    batch = pad_rows(rows, PAD)
    target = torch.tensor([[SOS, 20, 16]] * 3)
    out = logits_of(name, model, batch, target)
    for i, row in enumerate(rows):
        alone = logits_of(name, model, torch.tensor([row]), target[:1])
        torch.testing.assert_close(out[i, : alone.size(1)], alone[0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_classifier_averages_real_tokens_only():
    classifier = encoder_only.MatchClassifier(random_model("encoder_only")).double().eval()
    alone = torch.tensor([PROMPT])
    padded = torch.cat([alone, torch.full((1, 5), PAD)], dim=1)
    torch.testing.assert_close(classifier(padded), classifier(alone), atol=1e-10, rtol=0)
    hidden, _ = classifier.encoder.encode(alone)
    torch.testing.assert_close(
        classifier(alone), classifier.head(hidden.mean(1)), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_order_matters_only_because_of_positions(name):
    # One layer only. With more, a causal model can infer the order even without positions,
    # because the first layer shows each token only the tokens before it.
    model = random_model(name, num_layers=1)
    tokens, swapped = torch.tensor([[10, 6, 13, 9]]), torch.tensor([[6, 10, 13, 9]])
    target = torch.tensor([[SOS]])

    def last(t):
        return logits_of(name, model, t, target)[0, -1]

    assert (last(tokens) - last(swapped)).abs().max() > 1e-3
    model.positional_encoding.table.zero_()
    torch.testing.assert_close(last(tokens), last(swapped), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_tied_and_the_first_loss_is_a_guess(name):
    model = MODELS[name]()
    assert model.output.weight is model.embedding.weight
    _, loader = create_dataloaders(2000, 5, 64, 0)
    assert SCRIPTS[name].evaluate(model, loader)["loss"] == pytest.approx(math.log(26), abs=0.15)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = MODELS[name]()
    batch = next(iter(create_dataloaders(500, 5, 64, 0)[0]))
    SCRIPTS[name].compute_loss(model, batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or (p.grad == 0).all()]
    # The bias of the keys adds the same to all scores of a query. The softmax ignores it, so its
    # gradient is rounding noise.
    assert not [n for n in without if not n.endswith("w_k.bias")]


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_returns_weights_and_matches_the_fused_kernel(name):
    model = random_model(name)
    tokens = torch.tensor([PROMPT, PROMPT[:3] + [PAD] * 4])

    def run():
        if name == "encoder_only":
            return model.encode(tokens)
        if name == "decoder_only":
            return model.decode(tokens)
        memory, _ = model.encode(tokens)
        return model.decode(tokens[:, :3], memory, (tokens != PAD)[:, None, None])

    shape = (2, 2, 3 if name == "encoder_decoder" else 7, 7)
    with torch.no_grad():
        out, weights = run()
        use_fused_attention(model)
        expected, none = run()
    assert none == [None, None] and len(weights) == 2
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    for layer in weights:
        assert layer.shape == shape
        torch.testing.assert_close(layer.sum(-1), torch.ones(shape[:3]).double())


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_compiles_as_one_graph(name):
    model = random_model(name)
    tokens, target = (
        torch.tensor([PROMPT, PROMPT[:3] + [PAD] * 4]),
        torch.tensor([[SOS, 20, 16]] * 2),
    )
    expected = logits_of(name, model, tokens, target)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        logits_of(name, compiled, tokens, target), expected, atol=1e-10, rtol=0
    )


# --- checkpoints ----------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_unchanged(name, tmp_path):
    model = MODELS[name](d_model=16, num_heads=2, num_layers=1, d_ff=32)
    model.save(tmp_path / "new folder" / "model.pt")
    loaded = MODELS[name].load(tmp_path / "new folder" / "model.pt")
    assert loaded.arguments == model.arguments
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert loaded.output.weight is loaded.embedding.weight and not loaded.training
    assert os.listdir(tmp_path / "new folder") == ["model.pt"]  # the temporary file is gone


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "damage, words",
    [
        ("missing", "no checkpoint"),
        ("truncated", "damaged"),
        ("garbage", "damaged"),
        ("flipped bit", "damaged"),
        ("empty", "damaged"),
        ("code", "damaged or not"),
        ("a bare tensor", "not a checkpoint"),
        ("not numbers", "not numbers, or huge"),
        ("other architecture", "DecoderOnlyTransformer"),
        ("other size", "does not fit"),
        ("many layers", "does not fit"),
        ("huge", "does not fit"),
        ("d_model 0", "does not fit"),
        ("missing weight", "does not fit"),
        ("another weight", "does not fit"),
        ("whole numbers", "not numbers, or huge"),
        ("other arguments", "does not fit"),
        ("a folder", "no checkpoint"),
    ],
)
def test_an_invalid_checkpoint_is_rejected_in_one_line(damage, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    model = MODELS["encoder_only"](d_model=16, num_heads=2, num_layers=1, d_ff=32)
    good = {
        "architecture": "EncoderOnlyTransformer",
        "arguments": model.arguments,
        "weights": model.state_dict(),
    }
    if damage == "truncated":
        model.save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "flipped bit":
        model.save(path)
        content = path.read_bytes()
        weights = model.layers[0].attention.w_q.weight.detach().numpy().tobytes()
        position = content.index(weights) + 77
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint at all" * 99)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "code":
        torch.save({**good, "weights": Attack()}, path)
    elif damage == "not numbers":
        weights = {key: value * math.nan for key, value in model.state_dict().items()}
        torch.save({**good, "weights": weights}, path)
    elif damage == "a bare tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "other architecture":
        MODELS["decoder_only"](d_model=16, num_heads=2).save(path)
    elif damage == "other size":
        torch.save({**good, "arguments": {**model.arguments, "d_model": 32}}, path)
    elif damage in ("many layers", "huge", "d_model 0"):
        declared = {
            "many layers": {"num_layers": 1000},
            "huge": {"d_model": 16384, "d_ff": 65536, "max_len": 10**6},
            "d_model 0": {"d_model": 0},
        }[damage]
        torch.save({**good, "arguments": {**model.arguments, **declared}}, path)
    elif damage in ("missing weight", "another weight", "whole numbers"):
        weights = model.state_dict()
        if damage == "missing weight":
            del weights["final_norm.bias"]
        elif damage == "another weight":
            weights["more"] = torch.zeros(1)
        else:
            weights = {key: value.int() for key, value in weights.items()}
        torch.save({**good, "weights": weights}, path)
    elif damage == "other arguments":
        torch.save({**good, "arguments": {"width": 16}}, path)
    elif damage == "a folder":
        path.mkdir()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words) as error:
        MODELS["encoder_only"].load(path)
    assert time.perf_counter() - start < 5  # a declared size costs neither time nor memory
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_a_failed_save_leaves_the_old_checkpoint_intact(tmp_path, monkeypatch):
    model = MODELS["encoder_only"](d_model=16, num_heads=2)
    model.save(tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        MODELS["encoder_only"](d_model=32, num_heads=2).save(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pt"]
    load_checkpoint(tmp_path / "model.pt", MODELS["encoder_only"])


@torch.no_grad()
def test_fill_masks_changes_only_the_masks():
    model = random_model("encoder_only")
    rows = ["4 0 <MASK> <SEP> four zero seven".split(), "<MASK>".split(), "9 <SEP> nine".split()]
    filled = encoder_only.fill_masks(model, rows)
    assert filled[2] == rows[2] and len(filled[1]) == 1
    assert filled[0][:2] + filled[0][3:] == rows[0][:2] + rows[0][3:]
    logits = model(torch.tensor([VOCABULARY.encode(rows[0])]))[0]
    assert VOCABULARY.ids[filled[0][2]] == logits[2].argmax()


def test_fill_masks_uses_no_dropout_and_restores_the_mode():
    model = random_model("encoder_only", dropout=0.5).train()
    rows = [[*"40712", "<SEP>", *["<MASK>"] * 5]] * 9
    filled = encoder_only.fill_masks(model, rows)
    assert model.training
    assert filled == encoder_only.fill_masks(model.eval(), rows)


@torch.no_grad()
def test_evaluation_masks_all_words_and_nothing_else():
    model = random_model("encoder_only")
    items = [
        {"digits": ["4", "0"], "words": ["four", "zero"], "source": [10, 6], "target": [20, 16]},
        {"digits": ["7"], "words": ["seven"], "source": [13], "target": [23]},
    ]
    batch = collate_fn(items)
    logits, labels = encoder_only.logits_and_labels(model, batch)
    assert labels.tolist() == [
        [IGNORE_INDEX] * 3 + [20, 16],
        [IGNORE_INDEX] * 2 + [23] + [IGNORE_INDEX] * 2,
    ]
    seen = torch.tensor([[10, 6, SEP, MASK, MASK], [13, SEP, MASK, PAD, PAD]])
    torch.testing.assert_close(logits, model(seen))


def test_the_most_uncertain_position_always_has_a_label():
    _, loader = create_dataloaders(300, 4, 32, 0)
    model = MODELS["decoder_only"](d_model=16, num_heads=2, num_layers=1).eval()
    with torch.no_grad():
        model.final_norm.bias.copy_(40_000 * model.embedding.weight[7])  # certain of one token
        model.final_norm.weight.mul_(0.01)
    for confident in (True, False):
        prefix = decoder_only.most_uncertain(model, loader)
        assert "<SEP>" in prefix, confident
        with torch.no_grad():
            model.final_norm.bias.zero_()
            model.final_norm.weight.fill_(1.0)
