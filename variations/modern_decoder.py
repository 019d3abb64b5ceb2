"""
modern_decoder.py - from the GPT-2 block to that of today's open models, in six steps

THE IDEA.  The base is built like GPT-2 (2019). Llama 3 and Mistral 7B still have attention and a
feed-forward network, in the same order, but six things have changed since. (Others differ in
details: Qwen2 keeps some biases, and small models often tie the output.) Each step changes one
thing in the model before it:

    1  RMSNorm          no mean, no shift: x / sqrt(mean(x^2)) * gain       Zhang and Sennrich 2019
    2  no biases        in any linear layer                                  T5, PaLM
    3  SwiGLU           down(silu(gate(x)) * up(x)): three matrices        Shazeer 2020
    4  rotary           rotate queries and keys, add no positions           Su et al. 2021
    5  grouped queries  two query heads share one key head                  Ainslie et al. 2023
    6  untied           a separate output matrix                            LLaMA, 2023

The hidden size of the feed-forward network is chosen so that all models have the same number of
parameters, within 1%. The last model computes the same as LlamaForCausalLM in transformers, except
that the rows of w_q and w_k are in a different order and that the embedding is scaled by sqrt(D). A
test copies the weights and compares logits and generated tokens.

Run it:     python variations/modern_decoder.py        (about 20 seconds on one CPU core)
"""
from measure import (cache_bytes, count_parameters, largest_difference, new_model, prepare, expect,
                     check_cache, replace_attention, train)
import torch
import torch.nn.functional as F
from torch import nn

from grouped_queries import GroupedQueryAttention
from housekeeping import run_script
from rotary_positions import RotaryPositions, rotate

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: three seeds instead of one
NUM_EPOCHS = 3           # passes over the training data, for each model
SEED = 0
# =====================================================================================


# --- The parts ------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """Divide each vector by its root mean square (Zhang and Sennrich 2019), then apply a gain."""

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps

    def forward(self, x):
        # subtle: eps is added inside the root.
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    """A feed-forward network that multiplies two hidden vectors, silu(gate(x)) and up(x).

    silu(x) = x sigmoid(x) is a smooth ReLU (Shazeer 2020, section 2). No dropout, as in Llama.
    """

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def remove_biases(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None


class ModernAttention(GroupedQueryAttention):
    """Grouped queries, with rotated queries and keys and without biases."""

    def __init__(self, d_model, num_heads, key_heads, rotary, dropout=0.0):
        super().__init__(d_model, num_heads, key_heads, dropout)
        self.rotary = rotary
        remove_biases(self)

    def forward(self, x, memory, mask=None, cache=None):
        queries = rotate(self.split_heads(self.w_q(x)), self.rotary.angles)  # (B, H, T, K)
        keys = rotate(self.split_keys(self.w_k(memory)), self.rotary.angles)  # (B, G, S, K)
        values = self.split_keys(self.w_v(memory))
        if cache is not None:
            keys, values = cache.append(keys, values)
        group = self.num_heads // self.key_heads
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
        dropout = self.dropout if self.training else 0.0
        result, weights = self.attention_function(queries, keys, values, mask, dropout)
        return self.w_o(self.merge_heads(result)), weights


# --- The steps: each changes a model of decoder_only.py in place ----------------------
def use_rms_norms(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, RMSNorm(child.normalized_shape[0]))


def use_swiglu(model):
    for layer in model.layers:
        layer.feed_forward = SwiGLU(model.arguments["d_model"], model.arguments["d_ff"])


def use_modern_attention(model, key_heads):
    heads, d_model = model.arguments["num_heads"], model.arguments["d_model"]
    rotary = model.positional_encoding = RotaryPositions(d_model // heads)
    replace_attention(model, lambda _, old: ModernAttention(
        d_model, heads, key_heads, rotary, old.dropout), ("MultiHeadAttention", "ModernAttention"))


def use_rotary(model):
    use_modern_attention(model, model.arguments["num_heads"])


def share_key_heads(model):
    use_modern_attention(model, model.arguments["num_heads"] // 2)


def untie_output(model):
    model.output.weight = nn.Parameter(0.02 * torch.randn_like(model.embedding.weight))


STEPS = {"RMSNorm": use_rms_norms, "no biases": remove_biases, "SwiGLU": use_swiglu,
         "rotary": use_rotary, "grouped queries": share_key_heads, "untied": untie_output}


def build(number, seed, d_ff=256, **arguments):
    """Return the model after the first `number` steps."""
    model = new_model(seed, d_ff=d_ff, **arguments)
    for step in list(STEPS.values())[:number]:
        step(model)
    return model


def matching_d_ff(number, parameters):
    """Return the d_ff with which build(number, ...) has about this number of parameters."""
    one, two = (count_parameters(build(number, 0, d_ff)) for d_ff in (1, 2))  # linear in d_ff
    return 1 + round((parameters - one) / (two - one))


# --- The check ------------------------------------------------------------------------
@torch.no_grad()
def run_checks():
    print("The check: largest differences, in float64")
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16, 23], [9, 15, 4, 19, 25, 8, 7]])
    target = count_parameters(new_model(0))
    expect("no step: equal to the base",
          largest_difference(build(0, 0, matching_d_ff(0, target)).double()(tokens),
                             new_model(0).double()(tokens)))
    x = torch.randn(5, 64).double()
    x = x - x.mean(-1, keepdim=True)
    expect("RMSNorm of vectors with mean 0: equal to LayerNorm",
          largest_difference(RMSNorm(64).double()(x), nn.LayerNorm(64).double()(x)))
    model = build(5, 0, num_layers=1).double()  # with two, the causal mask itself encodes order
    swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6]]

    def effect():
        return largest_difference(model(tokens)[:, -1], model(swapped)[:, -1])

    print(f"  {'rotary, two earlier tokens swapped: the output changes':66s} {effect():8.1e}")
    model.positional_encoding.frequency.zero_()
    expect("angles of 0, one layer: the order does not matter", effect())
    check_cache(build(6, 0).double())


# --- The measurement ------------------------------------------------------------------
def main():
    prepare(globals())
    run_checks()
    print(f"\nThe measurement: exact match on held-out sequences after {NUM_EPOCHS} epochs")
    seeds = range(SEED, SEED + (3 if FULL else 1))
    print(f"  {'':22s}{'parameters':>12s}{'d_ff':>6s}{'cache, bytes per token':>25s}"
          + "".join(f"{f'seed {seed}':>10s}" for seed in seeds))
    target, results = count_parameters(new_model(0)), []
    for number, name in enumerate(["the base", *STEPS]):
        scores = []
        for seed in seeds:
            model = build(number, seed, matching_d_ff(number, target))
            scores.append(train(model, NUM_EPOCHS, seed))
        widen = model.layers[0].feed_forward.up
        print(f"  {f'{number}  {name}':22s}{count_parameters(model):12,d}{widen.out_features:6d}"
              f"{cache_bytes(model, 1):25,d}" + "".join(f"{s:10.1%}" for s in scores), flush=True)
        results.append(f"{scores[0]:.1%}, {cache_bytes(model, 1)} bytes")
    print("\nWhat this size cannot show: the reasons for most steps. They were chosen for speed, "
          "memory, the\nloss at equal cost, and long texts, in models ten thousand times as large.")
    return {"base": results[0], "variation": results[-1]}


if __name__ == "__main__":
    run_script(main)
