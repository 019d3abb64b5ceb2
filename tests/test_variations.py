"""The variations: each reduces to the base, and equals a well-kept implementation."""

import copy
import math

import hugging_face  # noqa: F401  (keeps transformers offline)
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig, MistralModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.wav2vec2_bert.configuration_wav2vec2_bert import Wav2Vec2BertConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

import alibi
import flash_attention
import grouped_queries
import latent_attention
import longer_than_trained
import measure
import modern_decoder
import rotary_positions
import sliding_window
from decoder_only import DecoderOnlyTransformer, attention, causal_mask
from encoder_decoder import EncoderDecoderTransformer
from conftest import random_weights
from toy_dataset import EOS, PAD, SEP

VARIATIONS = [
    longer_than_trained, rotary_positions, alibi, grouped_queries, latent_attention,
    sliding_window, flash_attention, modern_decoder,
]  # fmt: skip
PROMPTS = [[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17]]
D, H, K = 24, 4, 6  # pairwise different from rows (3) and lengths (7)


def left_padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return ids, ids != PAD


def random_model(change=None, seed=0, **arguments):
    torch.manual_seed(seed)
    model = DecoderOnlyTransformer(26, D, H, 2, 20, max_len=40, **arguments)
    model = random_weights(change(model) if change else model)
    with torch.no_grad():
        model.output.weight = nn.Parameter(torch.randn_like(model.embedding.weight))
        model.output.weight[EOS] *= 2  # so that some rows end early
    return model


def logits(model, ids, real):
    """Logits of a batch that is padded on the left."""
    return model.output(model.decode(ids, real[:, None, None], model.positions_of(ids))[0])


@pytest.mark.parametrize("module", VARIATIONS, ids=lambda module: module.__name__)
def test_the_printed_proofs_hold(module, capsys):
    module.prove_it()
    printed = capsys.readouterr().out
    assert printed.startswith("The proof: largest differences, in float64") and "e" in printed


CHANGES = {
    "rotary": rotary_positions.use_rotary_positions,
    "ALiBi": alibi.use_alibi,
    "grouped": lambda model: grouped_queries.use_grouped_queries(model, 2),
    "latent": lambda model: latent_attention.use_latents(model, 5),
    "window": lambda model: sliding_window.use_sliding_window(model, 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_cache_and_batch_change_nothing(name):
    distinct = set()
    for seed in range(4):
        model = random_model(CHANGES[name], seed)
        rows = model.generate(PROMPTS, 15)
        assert rows == model.generate(PROMPTS, 15, use_cache=False)
        assert rows == [model.generate([prompt], 15)[0] for prompt in PROMPTS]
        if name == "latent":
            latent_attention.absorb(model)
            assert rows == model.generate(PROMPTS, 15)
        distinct |= {tuple(row) for row in rows}
    assert len(distinct) > 5


# --- Llama and Mistral, with our norms and feed-forward networks ------------------------
def as_hugging_face(model, config_class, model_class, rotate, **options):
    """Their model with our weights. It also gets our norms and feed-forward networks as they are.

    Their attention has no biases or one for all projections, so ours are copied or must be zero.
    """
    attention = model.layers[0].self_attention
    config = config_class(
        vocab_size=26, hidden_size=D, num_attention_heads=H, num_hidden_layers=2,
        num_key_value_heads=getattr(attention, "key_heads", H), intermediate_size=20,
        max_position_embeddings=40, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
        attn_implementation="sdpa", **options,
    )  # fmt: skip
    theirs = model_class(config).double().eval()
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
            torch.testing.assert_close(self.frequency, theirs.inv_freq.double(), atol=1e-6, rtol=0)

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * self.frequency
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def copy_projections(mine, other, rotate):
    for name, layer in (("q_proj", mine.w_q), ("k_proj", mine.w_k), ("v_proj", mine.w_v),
                        ("o_proj", mine.w_o)):  # fmt: skip
        weight, bias = layer.weight, layer.bias
        if rotate and name in ("q_proj", "k_proj"):
            # Ours rotates dimensions (0, 1), (2, 3), ... of a head; theirs (0, K/2), (1, K/2 + 1).
            order = torch.cat([torch.arange(0, K, 2), torch.arange(1, K, 2)])
            order = (torch.arange(0, len(weight), K)[:, None] + order).flatten()
            weight, bias = weight[order], None if bias is None else bias[order]
        theirs = getattr(other, name)
        theirs.weight.copy_(weight)
        if theirs.bias is not None:
            theirs.bias.copy_(bias)


def hidden_of(theirs, model, ids, real, **options):
    """Their vectors for our embeddings, with positions from the first real token."""
    positions = model.positions_of(ids)
    x = model.embedding(ids) * model.embedding_scale
    x = model.positional_encoding(x, positions)
    return theirs(inputs_embeds=x, attention_mask=real.long(), position_ids=positions, **options)


@torch.no_grad()
def test_rotary_attention_equals_llama():
    model = random_model(rotary_positions.use_rotary_positions)
    theirs = as_hugging_face(model, LlamaConfig, LlamaModel, True, attention_bias=True)
    ids, real = left_padded(PROMPTS)
    ours = model.decode(ids, real[:, None, None], model.positions_of(ids))[0]
    other = hidden_of(theirs, model, ids, real).last_hidden_state
    torch.testing.assert_close(ours[real], other[real], atol=1e-10, rtol=0)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@torch.no_grad()
def test_grouped_queries_equal_llama_and_pytorch(key_heads):
    model = random_model(lambda m: grouped_queries.use_grouped_queries(m, key_heads))
    theirs = as_hugging_face(model, LlamaConfig, LlamaModel, False, attention_bias=True)
    ids, real = left_padded(PROMPTS)
    ours = model.decode(ids, real[:, None, None], model.positions_of(ids))[0]
    other = hidden_of(theirs, model, ids, real).last_hidden_state
    torch.testing.assert_close(ours[real], other[real], atol=1e-10, rtol=0)

    layer = model.layers[0].self_attention
    x = torch.randn(3, 7, D).double()
    heads = [linear(x).view(3, 7, -1, K).transpose(1, 2) for linear in (layer.w_q, layer.w_k,
                                                                       layer.w_v)]  # fmt: skip
    expected = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    expected = layer.w_o(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, x, causal_mask(7, 7))[0], expected, atol=1e-10, rtol=0)
    cache = layer.new_cache(5, 9)
    assert cache.keys.shape == (5, key_heads, 9, K)  # only the shared heads are stored


@pytest.mark.parametrize("window", [1, 2, 3, 6])
@torch.no_grad()
def test_a_sliding_window_equals_mistral_with_and_without_cache(window):
    model = random_model(lambda m: sliding_window.use_sliding_window(m, window))
    for layer in model.layers:  # Mistral's attention has no biases
        for linear in (layer.self_attention.w_q, layer.self_attention.w_k,
                       layer.self_attention.w_v, layer.self_attention.w_o):  # fmt: skip
            linear.bias.zero_()
    theirs = as_hugging_face(model, MistralConfig, MistralModel, False, sliding_window=window)
    ids, real = left_padded(PROMPTS)
    ours = model.decode(ids, real[:, None, None], model.positions_of(ids))[0]
    other = hidden_of(theirs, model, ids, real).last_hidden_state
    torch.testing.assert_close(ours[real], other[real], atol=1e-10, rtol=0)

    if window == 1:  # their cache keeps the last w - 1 entries, written as [-0:], which is all
        return
    caches, past = [layer.self_attention.new_cache(3, 7) for layer in model.layers], None
    positions = model.positions_of(ids)
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        ours = model.decode(
            ids[:, start:end], real[:, None, None, :end], positions[:, start:end], caches
        )[0]
        x = model.embedding(ids[:, start:end]) * model.embedding_scale
        x = model.positional_encoding(x, positions[:, start:end])
        out = theirs(
            inputs_embeds=x, attention_mask=real[:, :end].long(), past_key_values=past,
            position_ids=positions[:, start:end], use_cache=True,
        )  # fmt: skip
        past, here = out.past_key_values, real[:, start:end]
        torch.testing.assert_close(ours[here], out.last_hidden_state[here], atol=1e-10, rtol=0)
    assert all(cache.keys.size(2) == window for cache in caches)


@torch.no_grad()
def test_the_reach_of_a_window_is_layers_times_w_minus_1():
    for layers, window in ((1, 4), (2, 2), (3, 3)):
        torch.manual_seed(layers)
        model = DecoderOnlyTransformer(26, D, H, layers, 20, max_len=40).double().eval()
        model = sliding_window.use_sliding_window(model, window)
        assert sliding_window.reach(model) == layers * (window - 1)


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12])
@torch.no_grad()
def test_alibi_equals_bloom(heads):
    """Bloom adds slope * position of the key; the softmax cannot tell that from the distance."""
    torch.manual_seed(heads)
    ids, real = left_padded(PROMPTS)
    queries, keys, values = (torch.randn(3, heads, 7, 5).double() for _ in range(3))
    mask = causal_mask(7, 7) & real[:, None, None]
    ours, _ = alibi.alibi_attention(queries, keys, values, mask)
    bias = build_alibi_tensor(real.long(), heads, torch.float64).view(3, heads, 1, 7)
    bias = bias.masked_fill(~mask, -math.inf)
    expected = F.scaled_dot_product_attention(queries, keys, values, bias)
    for row in range(3):
        torch.testing.assert_close(ours[row][:, real[row]], expected[row][:, real[row]],
                                   atol=1e-6, rtol=0)  # fmt: skip
    last, _ = alibi.alibi_attention(queries[:, :, -1:], keys, values, real[:, None, None])
    torch.testing.assert_close(last, ours[:, :, -1:])  # a single query, as with a cache


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi.slopes_of(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert alibi.slopes_of(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_alone_and_change_with_it():
    query, key = torch.randn(2, 1, 1, 1, K).double()
    rotary = rotary_positions.RotaryPositions(K)

    def score(m, n):
        angles = [position * rotary.frequency[None] for position in (m, n)]
        return (rotary_positions.rotate(query, angles[0])
                * rotary_positions.rotate(key, angles[1])).sum().item()  # fmt: skip

    assert score(3, 1) == pytest.approx(score(20, 18), abs=1e-6)
    assert score(0, 0) == pytest.approx((query * key).sum().item())
    assert len({round(score(n, 0), 4) for n in range(6)}) == 6
    assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-3)


def test_interpolated_positions_are_divided():
    rotary = rotary_positions.RotaryPositions(K, interpolation=2.0)
    rotary(torch.zeros(1, 4, D), torch.arange(4)[None])
    plain = rotary_positions.RotaryPositions(K)
    plain(torch.zeros(1, 4, D), torch.arange(4)[None])
    torch.testing.assert_close(rotary.angles, plain.angles / 2)


# --- latents, tiles, and the modern block -----------------------------------------------
@torch.no_grad()
def test_both_ways_to_use_latents_are_equal_also_with_a_cache():
    model = random_model(lambda m: latent_attention.use_latents(m, 5))
    ids, real = left_padded(PROMPTS)
    results = []
    for absorbed in (False, True):
        latent_attention.absorb(model, absorbed)
        results.append(logits(model, ids, real))
        caches = [layer.self_attention.new_cache(3, 7) for layer in model.layers]
        positions = model.positions_of(ids)
        steps = [
            model.decode(ids[:, :t][:, start:], real[:, None, None, :t], positions[:, start:t],
                         caches)[0]
            for start, t in ((0, 4), (4, 5), (5, 7))
        ]  # fmt: skip
        results.append(model.output(torch.cat(steps, 1)))
        assert all(cache.latents.shape == (3, 7, 5) for cache in caches)
    for other in results[1:]:
        torch.testing.assert_close(other[real], results[0][real], atol=1e-10, rtol=0)


@torch.no_grad()
def test_latent_attention_equals_pytorch_on_expanded_keys_and_values():
    layer = random_model(lambda m: latent_attention.use_latents(m, 5)).layers[0].self_attention
    x = torch.randn(3, 7, D).double()
    latents = x @ layer.compress.weight.T
    heads = [layer.w_q(x), latents @ layer.w_k.weight.T, latents @ layer.w_v.weight.T]
    heads = [each.view(3, 7, H, K).transpose(1, 2) for each in heads]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True)
    expected = layer.w_o(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, x, causal_mask(7, 7))[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("tile", [1, 3, 8, 64])
@pytest.mark.parametrize("case", ["none", "padding", "causal", "left padding", "blocks"])
def test_tiles_equal_pytorch_and_the_formula_with_gradients(tile, case, monkeypatch):
    monkeypatch.setattr(flash_attention, "TILE", tile)
    torch.manual_seed(0)
    rows, columns = 11, 13
    mask = {
        "none": None,
        "padding": (torch.arange(columns) < torch.tensor([13, 4])[:, None])[:, None, None],
        "causal": causal_mask(rows, columns),
        "left padding": causal_mask(rows, columns)
        & (torch.arange(columns) > torch.tensor([6, -1])[:, None])[:, None, None],
        "blocks": (torch.arange(rows)[:, None] // 4 == torch.arange(columns) // 4)[None, None],
    }[case]
    outs, gradients = [], []
    for function in (flash_attention.flash_attention, attention, F.scaled_dot_product_attention):
        torch.manual_seed(1)
        inputs = [
            torch.randn(2, 3, length, 5, dtype=torch.float64, requires_grad=True)
            for length in (rows, columns, columns)
        ]
        out = function(*inputs, mask)
        out = out[0] if isinstance(out, tuple) else out
        outs.append(out)
        gradients.append(torch.autograd.grad((out**3).sum(), inputs))
    assert torch.isfinite(outs[0]).all()
    for other in (1, 2):
        torch.testing.assert_close(outs[0], outs[other], atol=1e-10, rtol=0)
        for mine, theirs in zip(gradients[0], gradients[other]):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


def test_tiles_pass_pytorchs_check_of_gradients(monkeypatch):
    monkeypatch.setattr(flash_attention, "TILE", 2)
    inputs = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5)]
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention.flash_attention(*x, causal_mask(4, 5))[0], inputs
    )


def test_no_matrix_of_all_scores_is_ever_made():
    peaks = {}
    for length in (256, 512):
        with flash_attention.Memory() as memory:
            flash_attention.step(flash_attention.flash_attention, length)
        peaks[length] = memory.peak
    with flash_attention.Memory() as memory:
        flash_attention.step(attention, 512)
    assert memory.peak > 3 * 2 * 512 * 512 * 4 * 0.9  # scores, weights, and their gradient
    assert peaks[512] < 2 * 512 * 512 * 4 and peaks[512] < 2.2 * peaks[256]


def rms_norm_64(ours, theirs):
    """PyTorch's RMSNorm with our gain: theirs computes in float32, whatever its input is."""
    norm = nn.RMSNorm(D, eps=theirs.variance_epsilon).double()
    norm.weight.copy_(ours.weight)
    theirs.weight.copy_(ours.weight)
    x = torch.randn(3, D).double()
    torch.testing.assert_close(theirs(x), norm(x), atol=1e-5, rtol=0)
    return norm


def as_llama(model):
    """LlamaForCausalLM with the weights of a model after the last step of modern_decoder.py."""
    attention = model.layers[0].self_attention
    a = model.arguments
    config = LlamaConfig(
        vocab_size=26, hidden_size=a["d_model"], num_attention_heads=a["num_heads"],
        num_hidden_layers=a["num_layers"], num_key_value_heads=attention.key_heads,
        intermediate_size=a["d_ff"], max_position_embeddings=a["max_len"], rms_norm_eps=1e-5,
        hidden_act="silu", tie_word_embeddings=False, attention_bias=False, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).double().eval()
    theirs.model.rotary_emb = Rotary64(theirs.model.rotary_emb, model)
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.embedding.weight * model.embedding_scale)
        theirs.lm_head.weight.copy_(model.output.weight)
        theirs.model.norm = rms_norm_64(model.final_norm, theirs.model.norm)
        for mine, other in zip(model.layers, theirs.model.layers):
            other.input_layernorm = rms_norm_64(mine.norm1, other.input_layernorm)
            other.post_attention_layernorm = rms_norm_64(mine.norm2, other.post_attention_layernorm)
            for name, layer in (("gate_proj", "gate"), ("up_proj", "widen"),
                                ("down_proj", "narrow")):  # fmt: skip
                getattr(other.mlp, name).weight.copy_(getattr(mine.feed_forward, layer).weight)
            copy_projections(mine.self_attention, other.self_attn, True)
    return theirs


def modern_model(seed):
    model = modern_decoder.build(6, seed, d_model=D, num_heads=H, d_ff=20, max_len=40)
    model = random_weights(model)
    with torch.no_grad():
        model.output.weight[EOS] *= 2
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(1.0)  # gains around 1
    return model


@torch.no_grad()
def test_the_last_step_is_llama_logit_by_logit_and_token_by_token():
    distinct = set()
    for seed in range(6):
        model = modern_model(seed)
        theirs = as_llama(model)
        ids, real = left_padded(PROMPTS)
        other = theirs(
            input_ids=ids, attention_mask=real.long(), position_ids=model.positions_of(ids)
        ).logits
        torch.testing.assert_close(logits(model, ids, real)[real], other[real], atol=1e-10, rtol=0)
        rows = theirs.generate(
            ids, attention_mask=real.long(), max_new_tokens=15, do_sample=False
        ).tolist()
        expected = [hugging_face.cut(row[ids.size(1) - 1 :]) for row in rows]
        assert model.generate(PROMPTS, 15) == expected
        assert model.generate(PROMPTS, 15, use_cache=False) == expected
        distinct |= {tuple(row) for row in expected}
    assert len(distinct) > 6


def test_rms_norm_equals_pytorch():
    x = 1e-3 * torch.randn(5, 7, dtype=torch.float64)  # so small that epsilon matters
    ours, theirs = modern_decoder.RMSNorm(7).double(), nn.RMSNorm(7, eps=1e-5).double()
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)


def test_every_step_changes_what_it_names_at_equal_parameters():
    target = measure.count_parameters(measure.new_model(0))
    models = [
        modern_decoder.build(number, 0, modern_decoder.matching_d_ff(number, target))
        for number in range(7)
    ]
    for model in models:
        assert measure.count_parameters(model) == pytest.approx(target, rel=0.01)
        assert model(torch.tensor([[6, 7, 4]])).shape == (1, 3, 26)
    kinds = [
        [type(m).__name__ for m in model.modules()].count
        for model in models
    ]  # fmt: skip
    assert [kind("LayerNorm") for kind in kinds] == [5] + [0] * 6
    assert [kind("RMSNorm") for kind in kinds] == [0] + [5] * 6
    biases = [sum(n.endswith("bias") for n, _ in model.named_parameters()) for model in models]
    assert biases[0] > biases[1] > 0 and biases[2:] == [0] * 5
    assert [kind("SwiGLU") for kind in kinds] == [0] * 3 + [2] * 4
    assert [kind("RotaryPositions") > 0 for kind in kinds] == [False] * 4 + [True] * 3
    caches = [measure.cache_bytes(model, 10) for model in models]
    assert caches[:5] == [caches[0]] * 5 and caches[5:] == [caches[0] // 2] * 2
    tied = [model.output.weight is model.embedding.weight for model in models]
    assert tied == [True] * 6 + [False]


# --- longer than trained ------------------------------------------------------------------
@torch.no_grad()
def test_clipped_relative_keys_equal_wav2vec2_bert():
    """The same scores: clipped distances, one learned vector each (Shaw et al. 2018)."""
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        hidden_size=D, num_attention_heads=H, position_embeddings_type="relative_key",
        left_max_position_embeddings=2, right_max_position_embeddings=2, attention_dropout=0.0,
    )  # fmt: skip
    theirs = random_weights(Wav2Vec2BertSelfAttention(config))
    model = longer_than_trained.build(DecoderOnlyTransformer, "relative", 0)
    old = DecoderOnlyTransformer(26, D, H, 1).layers[0].self_attention
    places = measure.Positions()
    ours = longer_than_trained.PositionedAttention(old, "relative", places, False).double()
    for mine, other in ((ours.w_q, theirs.linear_q), (ours.w_k, theirs.linear_k),
                        (ours.w_v, theirs.linear_v), (ours.w_o, theirs.linear_out)):  # fmt: skip
        mine.load_state_dict(other.state_dict())
    # Theirs counts key minus query, ours query minus key.
    ours.table.copy_(theirs.distance_embedding.weight.flip(0))
    x = torch.randn(3, 7, D).double()
    real = torch.arange(7) < torch.tensor([[7], [3], [5]])
    places(x, torch.arange(7)[None])
    expected = theirs(x, attention_mask=torch.zeros(3, 1, 7, 7).double().masked_fill(
        ~real[:, None, None], -1e9))[0]  # fmt: skip
    result = ours(x, x, real[:, None, None])[0]
    torch.testing.assert_close(result[real], expected[real], atol=1e-10, rtol=0)
    assert model.layers[0].self_attention.table.std().item() == pytest.approx(0.5, rel=0.3)


def test_the_count_restarts_at_sep_also_with_left_padding():
    model = longer_than_trained.build(longer_than_trained.RestartingDecoder, "relative", 0)
    ids, _ = left_padded([[10, 6, 13, SEP, 20, 16, 23, EOS], [9, SEP, 25, EOS]])
    assert model.positions_of(ids).tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 0, 0, 0, 0, 0, 1, 2],
    ]
    assert model.positions_of(torch.tensor([[0, 0, 0, 9, 7]])).tolist() == [[0, 0, 0, 0, 1]]


@pytest.mark.parametrize("way", ["learned", "none", "rotary", "ALiBi", "relative", "sinusoids"])
@pytest.mark.parametrize(
    "model_class",
    [DecoderOnlyTransformer, longer_than_trained.RestartingDecoder, EncoderDecoderTransformer],
)
def test_every_way_generates_the_same_with_and_without_a_cache(way, model_class):
    model = longer_than_trained.build(model_class, way, 1).double().eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
    prompts = [[10, 6, 13, SEP], [9, SEP], [7, 7, 8, 15, SEP]]
    rows = model.generate(prompts, 12, stop_at=None)
    assert rows == model.generate(prompts, 12, stop_at=None, use_cache=False)
    assert rows == [model.generate([prompt], 12, stop_at=None)[0] for prompt in prompts]


@pytest.mark.parametrize("way", ["rotary", "ALiBi", "relative"])
@torch.no_grad()
def test_decoding_in_pieces_gives_the_same_vectors(way):
    """This is stricter than equal tokens, which can hide slightly wrong vectors."""
    tokens = torch.tensor([[10, 6, SEP, 20, 16, 23], [9, 9, SEP, 25, 22, 7]])
    model = longer_than_trained.build(longer_than_trained.RestartingDecoder, way, 0).double()
    positions = model.positions_of(tokens)
    caches = [layer.self_attention.new_cache(2, 6) for layer in model.layers]
    parts = [
        model.decode(tokens[:, a:b], None, positions[:, a:b], caches)[0]
        for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model.decode(tokens)[0], atol=1e-10, rtol=0)

    model = longer_than_trained.build(EncoderDecoderTransformer, way, 0).double()
    memory, _ = model.encode(tokens)
    caches = model.new_caches(2, 6, 6)
    positions = torch.arange(6)[None]
    parts = [
        model.decode(tokens[:, a:b], memory, None, positions[:, a:b], caches)[0]
        for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    whole, _ = model.decode(tokens, memory, None)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


@torch.no_grad()
def test_cross_attention_counts_source_and_target_from_zero():
    """With equal keys and a large vector for distance 0, word i attends to source token i."""
    model = longer_than_trained.build(EncoderDecoderTransformer, "relative", 0).double()
    layer = model.decoder_layers[0].cross_attention
    layer.w_k.weight.zero_()
    layer.w_k.bias.zero_()
    layer.w_q.weight.zero_()
    layer.w_q.bias.fill_(10.0)
    layer.table.zero_()
    layer.table[longer_than_trained.CLIP] = 10.0
    memory, _ = model.encode(torch.tensor([[10, 6, 13, 9, EOS]]))
    _, weights = model.decode(torch.tensor([[1, 20, 16, 23, 19]]), memory, None)
    assert weights[0][0].argmax(-1).tolist() == [[0, 1, 2, 3, 4]] * 4


def test_a_source_that_ends_with_eos_reaches_the_model():
    item = longer_than_trained.end_source(
        {"digits": ["4"], "source": [10], "words": ["four"], "target": [20]}
    )
    assert item["source"] == [10, EOS] and item["digits"] == ["4", "<EOS>"]
    loader, _ = measure.loaders(0, longer_than_trained.end_source, 300, 3)
    batch = next(iter(loader))
    for row, digits in zip(batch["source"].tolist(), batch["digits"]):
        assert row[len(digits) - 1] == EOS and digits[-1] == "<EOS>"
    assert "<EOS>" not in {token for words in batch["words"] for token in words}


def test_the_variations_train_on_at_most_five_digits():
    for part in measure.loaders(0):
        assert max(len(item["digits"]) for item in part.dataset) == 5
    digits, words = measure.random_sequences(12, 30)
    assert {len(row) for row in digits} == {len(row) for row in words} == {12}


# --- several variations, and numbers of other sizes ---------------------------------------
def test_two_variations_are_not_combined_by_accident():
    model = rotary_positions.use_rotary_positions(measure.new_model(0))
    with pytest.raises(ValueError, match="write one class with both"):
        sliding_window.use_sliding_window(model, 3)
    model = grouped_queries.use_grouped_queries(alibi.use_alibi(measure.new_model(0)), 2)
    formulas = {layer.self_attention.attention_function.func for layer in model.layers}
    assert formulas == {alibi.alibi_attention}  # a formula is kept


@pytest.mark.parametrize("name", CHANGES)
def test_a_variation_runs_in_bfloat16_and_uses_dropout(name):
    model = CHANGES[name](measure.new_model(0, dropout=0.5)).bfloat16()
    tokens = torch.tensor([[6, 7, 4, 20]])
    assert model(tokens).dtype == torch.bfloat16
    assert torch.equal(model.eval()(tokens), model(tokens))
    branch, x = model.train().layers[0].self_attention, torch.randn(1, 4, 64).bfloat16()
    if name == "rotary":
        model.positional_encoding(x, torch.arange(4)[None])
    assert not torch.equal(branch(x, x)[0], branch(x, x)[0])


def test_dropout_acts_in_the_other_two_attention_classes():
    x = torch.randn(1, 4, 64)
    for model in (
        modern_decoder.build(5, 0, dropout=0.5),
        longer_than_trained.build(DecoderOnlyTransformer, "relative", 0, dropout=0.5),
    ):
        model.positional_encoding(x, torch.arange(4)[None])
        branch = model.train().layers[0].self_attention
        assert not torch.equal(branch(x, x)[0], branch(x, x)[0])


def test_beam_search_works_with_relative_keys():
    model = longer_than_trained.build(EncoderDecoderTransformer, "relative", 1).double().eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.output.weight = nn.Parameter(torch.randn_like(model.embedding.weight))
    sources = [[10, 6, 13], [9], [7, 7, 8, 15]]
    narrow = model.beam_search(sources, 1, max_new_tokens=6)
    assert [found[0].tokens for found in narrow] == model.generate(sources, 6)
    for source, found in zip(sources, model.beam_search(sources, 3, max_new_tokens=6)):
        alone = model.beam_search([source], 3, max_new_tokens=6)[0]
        assert found[0].tokens == alone[0].tokens
        assert found[0].score > narrow[sources.index(source)][0].score - 1e-9


def test_an_odd_head_size_cannot_be_rotated():
    with pytest.raises(ValueError, match="must be even"):
        rotary_positions.use_rotary_positions(measure.new_model(0, d_model=20, num_heads=4))


def test_second_derivatives_of_tiles_are_refused():
    inputs = [torch.randn(1, 1, 4, 3, requires_grad=True) for _ in range(3)]
    out = flash_attention.flash_attention(*inputs)[0].sum()
    (first,) = torch.autograd.grad(out, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable|require grad"):
        torch.autograd.grad(first.sum(), inputs[:1])
