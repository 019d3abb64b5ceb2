"""The variations: each reduces to the base, and equals a well-kept implementation."""
import copy
import math
import re
from types import SimpleNamespace

import hugging_face  # noqa: F401  (keeps transformers offline)
from conftest import close, random_weights, refused
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig, MistralModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.wav2vec2_bert.configuration_wav2vec2_bert import Wav2Vec2BertConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

import alibi
import decoder_only
import encoder_decoder
import flash_attention
import grouped_queries
import latent_attention
import longer_than_trained
import measure
import modern_decoder
import rotary_positions
import run_all
import sliding_window
from decoder_only import DecoderOnlyTransformer, attention, causal_mask
from encoder_decoder import EncoderDecoderTransformer
from housekeeping import InputError
from longer_than_trained import RestartingDecoder
from toy_dataset import EOS, PAD, SEP

VARIATIONS = [rotary_positions, alibi, longer_than_trained, grouped_queries, latent_attention,
              sliding_window, flash_attention, modern_decoder]
PROMPTS = [[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17]]
IDS = torch.tensor([[PAD] * (7 - len(row)) + row for row in PROMPTS])  # (3, 7), left padding
REAL = IDS != PAD
D, H, K = 24, 4, 6  # pairwise different from rows (3) and lengths (7)
CHANGES = {
    "rotary": rotary_positions.use_rotary_positions, "ALiBi": alibi.use_alibi,
    "grouped": lambda model: grouped_queries.use_grouped_queries(model, 2),
    "latent": lambda model: latent_attention.use_latents(model, 5),
    "window": lambda model: sliding_window.use_sliding_window(model, 3)}


def random_model(change=None, seed=0, **arguments):
    torch.manual_seed(seed)
    model = DecoderOnlyTransformer(26, D, H, 2, 20, max_len=40, **arguments)
    model = random_weights(change(model) if change else model)
    with torch.no_grad():
        model.output.weight = nn.Parameter(torch.randn_like(model.embedding.weight))
        model.output.weight[EOS] *= 2  # so that some rows end early
    return model


def modern_model(seed):
    model = random_weights(modern_decoder.build(6, seed, d_model=D, num_heads=H, d_ff=20,
                                                max_len=40))
    with torch.no_grad():
        model.output.weight[EOS] *= 2
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(1.0)  # gains around 1
    return model


def hidden_of(model):
    return model.run_decoder(IDS, REAL[:, None, None], model.positions_of(IDS))[0]


def in_pieces(run, cuts=(0, 3, 4, 7)):
    return torch.cat([run(slice(*cut)) for cut in zip(cuts, cuts[1:])], 1)


def caches_of(model, *size):
    return [layer.self_attention.new_cache(*size) for layer in model.layers]


# --- Properties of all ----------------------------------------------------------------
@pytest.mark.parametrize("module", VARIATIONS, ids=lambda module: module.__name__)
def test_the_printed_proofs_hold(module, capsys):
    module.prove_it()
    assert len(re.findall(r" \d\.\de[+-]\d\d$", capsys.readouterr().out, re.MULTILINE)) > 2


@pytest.mark.parametrize("name", [*CHANGES, "modern"])
def test_cache_and_batch_change_nothing(name):
    distinct = set()
    for seed in range(4):
        model = modern_model(seed) if name == "modern" else random_model(CHANGES[name], seed)
        rows = model.generate(PROMPTS, 15)
        assert rows == model.generate(PROMPTS, 15, use_cache=False)
        assert rows == [model.generate([prompt], 15)[0] for prompt in PROMPTS]
        if name == "latent":
            latent_attention.absorb(model)
            assert rows == model.generate(PROMPTS, 15)
        distinct |= {tuple(row) for row in rows}
    assert len(distinct) > 5


@pytest.mark.parametrize("name", [*CHANGES, "modern"])
@torch.no_grad()
def test_decoding_in_pieces_gives_the_same_vectors(name):
    """With left padding, and without given positions, also beyond a window of 3."""
    model = modern_model(0) if name == "modern" else random_model(CHANGES[name])
    whole, positions = hidden_of(model), model.positions_of(IDS)
    full = torch.randint(6, 26, (3, 7))
    expected = model.run_decoder(full)[0]
    for absorbed in (False, True) if name == "latent" else (None,):
        latent_attention.absorb(model, absorbed)
        caches = caches_of(model, 3, 7)
        found = in_pieces(lambda cut, caches=caches: model.run_decoder(
            IDS[:, cut], REAL[:, None, None, :cut.stop], positions[:, cut], caches)[0])
        close(found[REAL], whole[REAL])
        caches = caches_of(model, 3, 7)
        close(in_pieces(lambda cut, caches=caches: model.run_decoder(full[:, cut], caches=caches)[0]),
              expected)
    numbers = {"grouped": 2 * 2 * K * 9, "modern": 2 * 2 * K * 9, "latent": 5 * 9,
               "window": 2 * D * 3}.get(name, 2 * D * 9)  # per layer, for 9 tokens
    assert measure.cache_bytes(model, 9) == 2 * numbers * 8


@pytest.mark.parametrize("name", CHANGES)
def test_a_variation_runs_in_bfloat16_and_uses_dropout(name):
    model = CHANGES[name](measure.new_model(0, dropout=0.5)).bfloat16()
    tokens = torch.tensor([[6, 7, 4, 20]])
    assert model(tokens).dtype == torch.bfloat16
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_dropout_acts_in_every_attention_class():
    x, positions = torch.randn(1, 4, 64), torch.arange(4)[None]
    for model in (*(change(measure.new_model(0, dropout=0.5)) for change in CHANGES.values()),
                  modern_decoder.build(5, 0, dropout=0.5),
                  longer_than_trained.build(DecoderOnlyTransformer, "relative", 0, dropout=0.5)):
        model.positional_encoding(x, positions)
        branch = model.train().layers[0].self_attention
        assert not torch.equal(branch(x, x)[0], branch(x, x)[0])
        assert torch.equal(branch.eval()(x, x)[0], branch(x, x)[0])


@pytest.mark.parametrize("name", ["rotary", "ALiBi", "grouped", "window"])
def test_replacing_attention_keeps_every_weight_to_the_last_bit(name):
    model = DecoderOnlyTransformer(26, D, H, 2, 20).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # not representable in float32
    before = copy.deepcopy(model.state_dict())
    after = (grouped_queries.use_grouped_queries(model, H) if name == "grouped"
             else CHANGES[name](model)).state_dict()
    assert before.keys() == after.keys()
    assert all(weight.equal(after[key]) for key, weight in before.items())


ATTENTION = {**CHANGES, "modern": modern_decoder.use_rotary,
             "relative": lambda model: measure.replace_attention(
                 model, lambda name, old: longer_than_trained.PositionedAttention(
                     old, "relative", measure.Positions(), False))}
ATTENTION.pop("ALiBi")  # it only changes the formula


@pytest.mark.parametrize("second", ATTENTION)
@pytest.mark.parametrize("first", ATTENTION)
def test_two_variations_are_not_combined_by_accident(first, second):
    model = measure.new_model(0)
    ATTENTION[first](model)
    if first == second and first in ("grouped", "modern"):
        return
    state, parts = torch.get_rng_state(), list(model.layers.modules())
    with pytest.raises(InputError, match="write one class with both"):
        ATTENTION[second](model)
    assert list(model.layers.modules()) == parts
    assert torch.equal(state, torch.get_rng_state())  # nothing was built


def test_a_variation_keeps_the_attention_function():
    model = grouped_queries.use_grouped_queries(alibi.use_alibi(measure.new_model(0)), 2)
    functions = {layer.self_attention.attention_function.func for layer in model.layers}
    assert functions == {alibi.alibi_attention}


# --- Llama and Mistral, with our norms and feed-forward networks ----------------------
def as_hugging_face(model, config_class, model_class, rotate, **options):
    """Their model with our weights. It also gets our norms and feed-forward networks as they are.

    Their attention has no biases or one for all projections, so ours are copied or must be zero.
    """
    theirs = model_class(config_class(
        vocab_size=26, hidden_size=D, num_attention_heads=H, num_hidden_layers=2,
        num_key_value_heads=getattr(model.layers[0].self_attention, "key_heads", H),
        intermediate_size=20, max_position_embeddings=40, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=EOS, attn_implementation="sdpa", **options)).double().eval()
    theirs.norm = copy.deepcopy(model.final_norm)
    theirs.rotary_emb = Rotary64(theirs.rotary_emb, model if rotate else None)
    with torch.no_grad():
        for mine, other in zip(model.layers, theirs.layers):
            other.input_layernorm = copy.deepcopy(mine.norm1)
            other.post_attention_layernorm = copy.deepcopy(mine.norm2)
            other.mlp = copy.deepcopy(mine.feed_forward)
            copy_projections(mine.self_attention, other.self_attn, rotate)
    return theirs


class Rotary64(nn.Module):
    """Their cosines and sines in float64: they compute them in float32, whatever the weights are.

    It uses our frequencies, which must equal theirs up to float32 rounding, or zeros.
    """

    def __init__(self, theirs, model):
        super().__init__()
        self.frequency = torch.zeros(K // 2).double()
        if model is not None:
            self.frequency = model.positional_encoding.frequency.double()
            close(self.frequency, theirs.inv_freq.double(), 1e-6)

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * self.frequency
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def copy_projections(mine, other, rotate):
    for name in "qkvo":
        layer, theirs = getattr(mine, f"w_{name}"), getattr(other, f"{name}_proj")
        weight, bias = layer.weight, layer.bias
        if rotate and name in "qk":
            # Ours rotates dimensions (0, 1), (2, 3), ... of a head; theirs (0, K/2), (1, K/2 + 1).
            order = torch.cat([torch.arange(0, K, 2), torch.arange(1, K, 2)])
            order = (torch.arange(0, len(weight), K)[:, None] + order).flatten()
            weight, bias = weight[order], None if bias is None else bias[order]
        theirs.weight.copy_(weight)
        if theirs.bias is not None:
            theirs.bias.copy_(bias)


def their_hidden(theirs, model, cut=slice(0, 7), **options):
    """Their output for our embeddings, with positions from the first real token."""
    positions = model.positions_of(IDS)[:, cut]
    x = model.positional_encoding(model.embedding(IDS[:, cut]) * model.embedding_scale, positions)
    return theirs(inputs_embeds=x, attention_mask=REAL[:, :cut.stop].long(), position_ids=positions,
                  **options)


@torch.no_grad()
def test_rotary_attention_equals_llama():
    model = random_model(rotary_positions.use_rotary_positions)
    theirs = as_hugging_face(model, LlamaConfig, LlamaModel, True, attention_bias=True)
    close(hidden_of(model)[REAL], their_hidden(theirs, model).last_hidden_state[REAL])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@torch.no_grad()
def test_grouped_queries_equal_llama_and_pytorch(key_heads):
    model = random_model(lambda m: grouped_queries.use_grouped_queries(m, key_heads))
    theirs = as_hugging_face(model, LlamaConfig, LlamaModel, False, attention_bias=True)
    close(hidden_of(model)[REAL], their_hidden(theirs, model).last_hidden_state[REAL])
    layer, x = model.layers[0].self_attention, torch.randn(3, 7, D).double()
    heads = [w(x).view(3, 7, -1, K).transpose(1, 2) for w in (layer.w_q, layer.w_k, layer.w_v)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    close(layer(x, x, causal_mask(7, 7))[0], layer.w_o(expected.transpose(1, 2).flatten(2)))


def test_a_shared_key_head_is_the_mean_or_the_first_of_its_group():
    """With 6 heads, so that groups of 3 differ from 2 groups."""
    old = DecoderOnlyTransformer(26, D, 6, 1).layers[0].self_attention.state_dict()
    for shared in ("mean", "first"):
        torch.manual_seed(0)
        model = DecoderOnlyTransformer(26, D, 6, 1)
        old = copy.deepcopy(model.layers[0].self_attention.state_dict())
        new = grouped_queries.use_grouped_queries(model, 2, shared).layers[0].self_attention
        for name, value in new.state_dict().items():
            before = old[name]
            if name[:3] in ("w_k", "w_v"):
                groups = before.split(12)  # the rows of 3 heads of 4
                heads = [group.split(4) for group in groups]
                before = torch.cat([sum(group) / 3 if shared == "mean" else group[0]
                                    for group in heads])
            close(value, before, 1e-6)


@pytest.mark.parametrize("window", [1, 2, 3, 6])
@torch.no_grad()
def test_a_sliding_window_equals_mistral_with_and_without_cache(window):
    model = random_model(lambda m: sliding_window.use_sliding_window(m, window))
    for name, parameter in model.named_parameters():  # Mistral's attention has no biases
        if "attention" in name and name.endswith("bias"):
            parameter.zero_()
    theirs = as_hugging_face(model, MistralConfig, MistralModel, False, sliding_window=window)
    ours = hidden_of(model)
    close(ours[REAL], their_hidden(theirs, model).last_hidden_state[REAL])
    past = None
    for cut in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        if window > 1:  # their cache keeps the last w - 1 entries, written as [-0:], which is all
            out = their_hidden(theirs, model, cut, past_key_values=past, use_cache=True)
            past, here = out.past_key_values, REAL[:, cut]
            close(ours[:, cut][here], out.last_hidden_state[here])


@torch.no_grad()
def test_the_reach_of_a_window_is_layers_times_w_minus_1():
    for layers, window in ((1, 4), (2, 2), (3, 3)):
        model = DecoderOnlyTransformer(26, D, H, layers, 20, max_len=40).double().eval()
        model = sliding_window.use_sliding_window(model, window)
        assert sliding_window.reach(model) == layers * (window - 1)


# --- Positions ------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12])
@torch.no_grad()
def test_alibi_equals_bloom(heads):
    """Bloom adds slope * position of the key; the softmax cannot tell that from the distance."""
    queries, keys, values = (torch.randn(3, heads, 7, 5).double() for _ in range(3))
    mask = causal_mask(7, 7) & REAL[:, None, None]
    ours, _ = alibi.alibi_attention(queries, keys, values, mask)
    bias = build_alibi_tensor(REAL.long(), heads, torch.float64).view(3, heads, 1, 7)
    expected = F.scaled_dot_product_attention(queries, keys, values,
                                              bias.masked_fill(~mask, -math.inf))
    for row in range(3):
        close(ours[row][:, REAL[row]], expected[row][:, REAL[row]], 1e-6)
    last, _ = alibi.alibi_attention(queries[:, :, -1:], keys, values, REAL[:, None, None])
    close(last, ours[:, :, -1:])  # a single query, as with a cache


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi.slopes_of(8).tolist() == [2.0 ** -n for n in range(1, 9)]
    assert alibi.slopes_of(3).tolist() == [2.0 ** -4, 2.0 ** -8, 2.0 ** -2]


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_alone_and_change_with_it():
    query, key = torch.randn(2, 1, 1, 1, K).double()
    frequency = rotary_positions.RotaryPositions(K).frequency[None]

    def score(m, n):
        return (rotary_positions.rotate(query, m * frequency)
                * rotary_positions.rotate(key, n * frequency)).sum().item()

    assert score(3, 1) == pytest.approx(score(20, 18), abs=1e-6)
    assert score(0, 0) == pytest.approx((query * key).sum().item())
    assert len({round(score(n, 0), 4) for n in range(6)}) == 6
    assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-3)


def test_interpolated_positions_are_divided():
    x, positions = torch.zeros(1, 4, D), torch.arange(4)[None]
    model, rotary = measure.new_model(0), rotary_positions.RotaryPositions(K, interpolation=2.5)
    rotary(x, positions)
    close(rotary.angles[0, 0], torch.arange(4)[:, None] / 2.5 * rotary.frequency)
    before = model.positional_encoding.table.clone()
    rotary_positions.interpolate_sinusoids(model, 3)
    close(model.positional_encoding.table[::3], before[:22], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotary_angles_keep_float64_in_every_model(dtype):
    """Rounded to bfloat16, positions 1000 and 1001 would have the same angles."""
    for model in (CHANGES["rotary"](measure.new_model(0)), modern_decoder.build(6, 0)):
        rotary, positions = model.to(dtype).positional_encoding, torch.tensor([[1000, 1001]])
        rotary(torch.zeros(1, 2, 64, dtype=dtype), positions)
        exact = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
        close(rotary.angles[0, 0], positions[0, :, None] * exact, 1e-9)


def test_an_odd_head_size_cannot_be_rotated():
    with pytest.raises(InputError, match="heads of size 5"):
        rotary_positions.use_rotary_positions(measure.new_model(0, d_model=20, num_heads=4))


# --- Latents and tiles ----------------------------------------------------------------
@torch.no_grad()
def test_latent_attention_equals_pytorch_on_expanded_keys_and_values():
    layer = random_model(CHANGES["latent"]).layers[0].self_attention
    x = torch.randn(3, 7, D).double()
    latents = x @ layer.compress.weight.T
    heads = [layer.w_q(x), latents @ layer.w_k.weight.T, latents @ layer.w_v.weight.T]
    heads = [each.view(3, 7, H, K).transpose(1, 2) for each in heads]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True)
    for layer.absorbed in (False, True):
        close(layer(x, x, causal_mask(7, 7))[0], layer.w_o(expected.transpose(1, 2).flatten(2)))


COLUMNS = torch.arange(13)
MASKS = {
    "none": None, "padding": (torch.tensor([13, 4])[:, None] > COLUMNS)[:, None, None],
    "causal": causal_mask(11, 13),
    "left padding": causal_mask(11, 13) & (COLUMNS > torch.tensor([6, -1])[:, None])[:, None, None],
    "blocks": (torch.arange(11)[:, None] // 4 == COLUMNS // 4)[None, None]}


@pytest.mark.parametrize("tile", [1, 3, 8, 64])
@pytest.mark.parametrize("case", [*MASKS, "negative"])
def test_tiles_equal_pytorch_and_the_formula_with_gradients(tile, case, monkeypatch):
    """Also for queries without keys ("left padding"), and for scores of about -1000 ("negative").

    For a query without keys, the formula gives an average that nothing uses.
    """
    monkeypatch.setattr(flash_attention, "TILE", tile)
    mask, results = MASKS.get(case, MASKS["causal"]), []
    used = 1.0 if mask is None else mask.any(-1, keepdim=True)
    for function in (flash_attention.flash_attention, attention, F.scaled_dot_product_attention):
        torch.manual_seed(1)
        inputs = [torch.randn(2, 3, length, 5).double() for length in (11, 13, 13)]
        if case == "negative":
            inputs[:2] = [inputs[0] - 30, inputs[1] + 30]
        inputs = [x.requires_grad_() for x in inputs]
        out = function(*inputs, mask)
        out = out[0] if isinstance(out, tuple) else out
        out = out * used if function is attention else out
        results.append([out, *torch.autograd.grad((out ** 3).sum(), inputs)])
    for ours, formula, kernel in zip(*results):
        assert torch.isfinite(ours).all()
        close(ours, formula)
        close(ours, kernel)


def test_tiles_pass_pytorchs_check_of_gradients(monkeypatch):
    monkeypatch.setattr(flash_attention, "TILE", 2)
    inputs = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5)]
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention.flash_attention(*x, causal_mask(4, 5))[0], inputs)
    (first,) = torch.autograd.grad(flash_attention.flash_attention(*inputs)[0].sum(), inputs[:1],
                                   create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable|require grad"):
        torch.autograd.grad(first.sum(), inputs[:1])  # second derivatives are refused


def test_no_matrix_of_all_scores_is_ever_made():
    def peak(function, length):
        with flash_attention.Memory() as memory:
            flash_attention.step(function, length)
        return memory.peak

    tiles = {length: peak(flash_attention.flash_attention, length) for length in (256, 512)}
    scores = 2 * 512 * 512 * 4  # bytes
    assert peak(attention, 512) > 3 * scores * 0.9  # scores, weights, and their gradient
    assert tiles[512] < scores and tiles[512] < 2.2 * tiles[256]


# --- The modern block -----------------------------------------------------------------
def rms_norm_64(ours, theirs):
    """PyTorch's RMSNorm with our gain: theirs computes in float32, whatever its input is."""
    norm = nn.RMSNorm(D, eps=theirs.variance_epsilon).double()
    norm.weight.copy_(ours.weight)
    theirs.weight.copy_(ours.weight)
    x = torch.randn(3, D).double()
    close(theirs(x), norm(x), 1e-5)
    return norm


def as_llama(model):
    """LlamaForCausalLM with the weights of a model after the last step of modern_decoder.py."""
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=26, hidden_size=D, num_attention_heads=H, num_hidden_layers=2,
        num_key_value_heads=2, intermediate_size=20, max_position_embeddings=40, rms_norm_eps=1e-5,
        hidden_act="silu", tie_word_embeddings=False, attention_bias=False, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=EOS)).double().eval()
    theirs.model.rotary_emb = Rotary64(theirs.model.rotary_emb, model)
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.embedding.weight * model.embedding_scale)
        theirs.lm_head.weight.copy_(model.output.weight)
        theirs.model.norm = rms_norm_64(model.final_norm, theirs.model.norm)
        for mine, other in zip(model.layers, theirs.model.layers):
            other.input_layernorm = rms_norm_64(mine.norm1, other.input_layernorm)
            other.post_attention_layernorm = rms_norm_64(mine.norm2, other.post_attention_layernorm)
            for name in ("gate", "up", "down"):
                getattr(other.mlp, f"{name}_proj").weight.copy_(
                    getattr(mine.feed_forward, name).weight)
            copy_projections(mine.self_attention, other.self_attn, True)
    return theirs


@torch.no_grad()
def test_the_last_step_is_llama_logit_by_logit_and_token_by_token():
    distinct = set()
    for seed in range(6):
        model = modern_model(seed)
        theirs = as_llama(model)
        other = theirs(input_ids=IDS, attention_mask=REAL.long(),
                       position_ids=model.positions_of(IDS)).logits
        close(model.output(hidden_of(model))[REAL], other[REAL])
        rows = theirs.generate(IDS, attention_mask=REAL.long(), max_new_tokens=15,
                               do_sample=False).tolist()
        expected = [hugging_face.cut(row[6:]) for row in rows]
        assert model.generate(PROMPTS, 15) == expected
        distinct |= {tuple(row) for row in expected}
    assert len(distinct) > 6


@torch.no_grad()
def test_rms_norm_equals_pytorch():
    x = 1e-3 * torch.randn(5, 7, dtype=torch.float64)  # so small that epsilon matters
    ours, theirs = modern_decoder.RMSNorm(7).double(), nn.RMSNorm(7, eps=1e-5).double()
    theirs.weight.copy_(ours.weight.normal_())
    close(ours(x), theirs(x), 1e-12)


def test_every_step_changes_what_it_names_at_equal_parameters():
    target = measure.count_parameters(measure.new_model(0))
    models = [modern_decoder.build(number, 0, modern_decoder.matching_d_ff(number, target))
              for number in range(7)]
    for model in models:
        assert measure.count_parameters(model) == pytest.approx(target, rel=0.01)
        assert model(torch.tensor([[6, 7, 4]])).shape == (1, 3, 26)
    counts = {kind: [sum(type(m).__name__ == kind for m in model.modules()) for model in models]
              for kind in ("LayerNorm", "RMSNorm", "SwiGLU", "RotaryPositions")}
    assert counts == {"LayerNorm": [5] + [0] * 6, "RMSNorm": [0] + [5] * 6,
                      "SwiGLU": [0] * 3 + [2] * 4, "RotaryPositions": [0] * 4 + [3] * 3}
    biases = [sum(n.endswith("bias") for n, _ in model.named_parameters()) for model in models]
    assert biases[0] > biases[1] > 0 and biases[2:] == [0] * 5
    caches = [measure.cache_bytes(model, 10) for model in models]
    assert caches[:5] == [caches[0]] * 5 and caches[5:] == [caches[0] // 2] * 2
    tied = [model.output.weight is model.embedding.weight for model in models]
    assert tied == [True] * 6 + [False]


# --- Longer than trained --------------------------------------------------------------
@torch.no_grad()
def test_clipped_relative_keys_equal_wav2vec2_bert():
    """The same scores: clipped distances, one learned vector each (Shaw et al. 2018)."""
    theirs = random_weights(Wav2Vec2BertSelfAttention(Wav2Vec2BertConfig(
        hidden_size=D, num_attention_heads=H, position_embeddings_type="relative_key",
        left_max_position_embeddings=2, right_max_position_embeddings=2, attention_dropout=0.0)))
    old = DecoderOnlyTransformer(26, D, H, 1).layers[0].self_attention
    places = measure.Positions()
    ours = longer_than_trained.PositionedAttention(old, "relative", places, False).double()
    assert ours.table.std().item() == pytest.approx(0.5, rel=0.4)
    for name in ("q", "k", "v"):
        getattr(ours, f"w_{name}").load_state_dict(getattr(theirs, f"linear_{name}").state_dict())
    ours.w_o.load_state_dict(theirs.linear_out.state_dict())
    # Theirs counts key minus query, ours query minus key.
    ours.table.copy_(theirs.distance_embedding.weight.flip(0))
    x, real = torch.randn(3, 7, D).double(), torch.arange(7) < torch.tensor([[7], [3], [5]])
    places(x, torch.arange(7)[None])
    hidden = torch.zeros(3, 1, 7, 7).double().masked_fill(~real[:, None, None], -1e9)
    close(ours(x, x, real[:, None, None])[0][real], theirs(x, attention_mask=hidden)[0][real])


def test_the_count_restarts_at_sep_also_with_left_padding():
    model = longer_than_trained.build(RestartingDecoder, "relative", 0)
    ids = torch.tensor([[10, 6, 13, SEP, 20, 16, 23, EOS], [0, 0, 0, 0, 9, SEP, 25, EOS],
                        [0, 0, 0, 9, 7, 7, 7, 7]])
    assert model.positions_of(ids).tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("way", ["learned", "none", "rotary", "ALiBi", "relative", "sinusoids"])
@pytest.mark.parametrize("model_class", [DecoderOnlyTransformer, RestartingDecoder,
                                         EncoderDecoderTransformer])
@torch.no_grad()
def test_every_way_gives_the_same_with_and_without_a_cache(way, model_class):
    model = longer_than_trained.build(model_class, way, 1).double().eval()
    prompts = [[10, 6, 13, SEP], [9, SEP], [7, 7, 8, 15, SEP]]
    tokens = torch.tensor([[10, 6, SEP, 20, 16, 23, 9], [9, 9, SEP, 25, 22, 7, 8]])
    if model_class is EncoderDecoderTransformer:
        memory, caches = model.run_encoder(tokens[:, :5])[0], model.new_caches(2, 7, 5)
        positions = torch.arange(7)[None]
        whole = model.run_decoder(tokens, memory, None)[0]
        parts = in_pieces(lambda cut: model.run_decoder(
            tokens[:, cut], memory, None, positions[:, cut], caches)[0])
    else:
        positions, caches = model.positions_of(tokens), caches_of(model, 2, 7)
        whole = model.run_decoder(tokens)[0]
        parts = in_pieces(lambda cut: model.run_decoder(
            tokens[:, cut], None, positions[:, cut], caches)[0])
    close(parts, whole)  # stricter than equal tokens, which can hide slightly wrong vectors
    model.embedding.weight.normal_()
    rows = model.generate(prompts, 12, stop_at=None)
    assert rows == model.generate(prompts, 12, stop_at=None, use_cache=False)
    assert rows == [model.generate([prompt], 12, stop_at=None)[0] for prompt in prompts]


@torch.no_grad()
def test_cross_attention_counts_source_and_target_from_zero():
    """With equal keys and a large vector for distance 0, word i attends to source token i."""
    model = longer_than_trained.build(EncoderDecoderTransformer, "relative", 0).double()
    layer = model.decoder_layers[0].cross_attention
    for parameter in (layer.w_k.weight, layer.w_k.bias, layer.w_q.weight, layer.table):
        parameter.zero_()
    layer.w_q.bias.fill_(10.0)
    layer.table[longer_than_trained.CLIP] = 10.0
    memory, _ = model.run_encoder(torch.tensor([[10, 6, 13, 9, EOS]]))
    _, weights = model.run_decoder(torch.tensor([[1, 20, 16, 23, 19]]), memory, None)
    assert weights[0][0].argmax(-1).tolist() == [[0, 1, 2, 3, 4]] * 4


@torch.no_grad()
def test_beam_search_works_with_relative_keys():
    model = longer_than_trained.build(EncoderDecoderTransformer, "relative", 1).double().eval()
    model.output.weight = nn.Parameter(torch.randn_like(model.embedding.weight.normal_()))
    sources = [[10, 6, 13], [9], [7, 7, 8, 15]]
    narrow, wide = (model.beam_search(sources, width, max_new_tokens=6) for width in (1, 3))
    assert [found[0].tokens for found in narrow] == model.generate(sources, 6)
    for source, first, found in zip(sources, narrow, wide):
        alone = model.beam_search([source], 3, max_new_tokens=6)[0]
        assert found[0].tokens == alone[0].tokens and found[0].score > first[0].score - 1e-9


def test_a_source_that_ends_with_eos_reaches_the_model():
    loader, _ = measure.loaders(0, longer_than_trained.end_source, 300, 3)
    batch = next(iter(loader))
    for row, digits, words in zip(batch["source"].tolist(), batch["digits"], batch["words"]):
        assert row[len(digits) - 1] == EOS and digits[-1] == "<EOS>"
        assert len(words) == len(digits) - 1 and "<EOS>" not in words


def test_correct_words_are_divided_by_expected_words():
    """One row in four is complete, one lacks its last word, one is empty, and one has one more."""
    def translate(_, rows):
        words = [[decoder_only.VOCABULARY.decode([16 + int(d)])[0] for d in row if d != "<EOS>"]
                 for row in rows]
        assert all((row[-1] == "<EOS>") == ended for row in rows)
        return [(row, row[:-1], [], [*row, "one"])[i % 4] for i, row in enumerate(words)]

    for ended in (False, True):
        cells = longer_than_trained.measure_lengths(None, SimpleNamespace(translate=translate),
                                                    ended)
        assert cells == [(0.25, pytest.approx((3 * n - 1) / (4 * n)), 0.25)
                         for n in longer_than_trained.LENGTHS]


# --- measure.py, the tables, and run_all.py -------------------------------------------
def test_a_proof_refuses_nan_and_what_is_above_its_limit(capsys, monkeypatch):
    measure.prove("equal", 1e-10)
    for difference in (math.nan, math.inf, 1.1e-10):
        with pytest.raises(InputError, match="not proved: equal"):
            measure.prove("equal", difference)
    assert capsys.readouterr().out.count("equal") == 4
    measure.prove_cache(measure.new_model(0).double())
    positions = DecoderOnlyTransformer.positions_of
    monkeypatch.setattr(DecoderOnlyTransformer, "positions_of", lambda model, tokens: (
        positions(model, tokens) * (tokens.size(1) > 17)))
    with pytest.raises(InputError, match="not proved: with and without cache"):
        measure.prove_cache(measure.new_model(0).double())


def test_longer_rows_are_random_and_trained_rows_have_at_most_five_digits():
    for part in measure.loaders(0):
        assert max(len(item["digits"]) for item in part.dataset) == 5
    digits, words = measure.random_sequences(12, 30)
    assert {len(row) for row in digits} == {len(row) for row in words} == {12}
    assert len({tuple(row) for row in digits}) == 30 and {d for row in digits for d in row} == set(
        "0123456789")
    assert [word for row in words for word in row] == [
        measure.WORD_OF[digit] for row in digits for digit in row]


@pytest.mark.parametrize("module", VARIATIONS, ids=lambda module: module.__name__)
def test_constants_are_checked_also_those_of_decoder_only(module, monkeypatch, capsys):
    own = "TILE" if module is flash_attention else "NUM_EPOCHS"
    assert f"{own}=0" in refused(module, monkeypatch, capsys, **{own: 0})
    monkeypatch.undo()
    for name in ("BATCH_SIZE", "LEARNING_RATE", "CLIP_NORM", "WARMUP_STEPS"):
        with monkeypatch.context() as patch:
            patch.setattr(decoder_only, name, -1)
            assert f"{name}=-1" in refused(module, patch, capsys)


def test_run_all_checks_every_file_first_and_prints_one_table(monkeypatch, capsys):
    assert [*run_all.ORDER] == [module.__name__ for module in VARIATIONS]
    with monkeypatch.context() as patch:
        patch.setattr(modern_decoder, "NUM_EPOCHS", 0)
        assert "variations/modern_decoder.py: NUM_EPOCHS=0" in refused(run_all, patch, capsys)
    for module in VARIATIONS:
        monkeypatch.setattr(module, "main", lambda name=module.__name__: {
            "base": f"base of {name}", "variation": f"new {name}"})
    run_all.main()
    table = capsys.readouterr().out.splitlines()[-8:]
    for line, (name, what) in zip(table, run_all.ORDER.items()):
        assert re.fullmatch(rf"{name} +{re.escape(what)} +base of {name} +new {name} +0\.0", line)
