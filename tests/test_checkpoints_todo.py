"""Checkpoints: saved and loaded unchanged, rejected in one line when damaged. To be reorganized."""
import math
import os
import time

import pytest
import torch

from conftest import MODELS
from housekeeping import load_checkpoint


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
