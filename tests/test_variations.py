"""The variations: each reduces to the base, and equals a well-kept implementation."""
import copy
import math
import re
from types import SimpleNamespace

from conftest import close, random_weights, refused
from hugging_face import as_llama, cut  # first: it keeps transformers offline
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.wav2vec2_bert.configuration_wav2vec2_bert import Wav2Vec2BertConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

import alibi
import decoder_only
import flash_attention
import grouped_queries
import latent_attention
import longer_than_trained as longer
import measure
import modern_decoder
import rotary_positions
import run_all
import sliding_window
from decoder_only import DecoderOnlyTransformer, attention, causal_mask
from encoder_decoder import EncoderDecoderTransformer
from housekeeping import InputError
from toy_dataset import DIGITS, EOS, PAD, SEP, WORD_OF

VARIATIONS = [rotary_positions, alibi, longer, grouped_queries, latent_attention, sliding_window,
              flash_attention, modern_decoder]
PROMPTS = [[10, 6, 13, 4, 20, 16, 23], [9, 4, 19], [7, 8, 15, 4, 17]]
IDS = torch.tensor([[PAD] * (7 - len(row)) + row for row in PROMPTS])  # (3, 7), padded on the left
REAL = IDS != PAD
D, H, K = 24, 4, 6  # pairwise different from rows (3) and lengths (7)
CHANGES = {"rotary": rotary_positions.use_rotary_positions, "ALiBi": alibi.use_alibi,
           "grouped": lambda model: grouped_queries.use_grouped_queries(model, 2),
           "latent": lambda model: latent_attention.use_latents(model, 5),
           "window": lambda model: sliding_window.use_sliding_window(model, 3),
           "modern": lambda _: modern_decoder.build(6, 0, 20, d_model=D, num_heads=H, max_len=40)}
each_module = pytest.mark.parametrize("module", VARIATIONS, ids=lambda module: module.__name__)


def random_model(change, seed=0):
    model = change(DecoderOnlyTransformer(26, D, H, 2, 20, max_len=40))
    torch.manual_seed(seed)
    random_weights(model)
    with torch.no_grad():
        model.output.weight = nn.Parameter(torch.randn_like(model.embedding.weight))
        model.output.weight[EOS] *= 2  # so that some rows end early
    return model


def logits_of(model):
    return model.output(model.run_decoder(IDS, REAL[:, None, None], model.positions_of(IDS))[0])


def in_pieces(model, ids, real=None, positions=None, memory=None):
    """The output of run_decoder with caches: for three tokens, then one, then three."""
    parts = []
    caches = [layer.self_attention.new_cache(len(ids), 7) for layer in model.layers] \
        if memory is None else model.new_caches(len(ids), 7, memory.size(1))
    for start, end in ((0, 3), (3, 4), (4, 7)):
        mask = [None if real is None else real[:, None, None, :end]]
        parts.append(model.run_decoder(
            ids[:, start:end], *(mask if memory is None else [memory, None]),
            None if positions is None else positions[:, start:end], caches)[0])
    return torch.cat(parts, 1)


# --- Properties of all ----------------------------------------------------------------
@each_module
def test_the_printed_checks_hold(module, capsys):
    module.run_checks()
    assert len(re.findall(r" \d\.\de[+-]\d\d$", capsys.readouterr().out, re.MULTILINE)) > 2


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_cache_and_batch_change_nothing(name):
    """Neither tokens nor vectors, also without given positions and beyond a window of 3."""
    distinct, full = set(), torch.randint(6, 26, (3, 7))
    for seed, absorbed in ((0, False), (1, True), (2, False), (3, True)):
        model = random_model(CHANGES[name], seed)
        latent_attention.absorb(model, absorbed)
        rows = model.generate(PROMPTS, 15)
        assert rows == model.generate(PROMPTS, 15, use_cache=False)
        assert rows == [model.generate([prompt], 15)[0] for prompt in PROMPTS]
        distinct |= {tuple(row) for row in rows}
        found = model.output(in_pieces(model, IDS, REAL, model.positions_of(IDS)))
        close(found[REAL], logits_of(model)[REAL])
        close(in_pieces(model, full), model.run_decoder(full)[0])
    assert len(distinct) > 5
    per_layer = {"grouped": 2 * 2 * K * 9, "modern": 2 * 2 * K * 9, "latent": 5 * 9,
                 "window": 2 * D * 3}.get(name, 2 * D * 9)  # numbers for 9 tokens, 8 bytes each
    assert measure.cache_bytes(model, 9) == 2 * per_layer * 8


def relative(model):
    positions = model.positional_encoding = measure.Positions()
    return measure.replace_attention(model, lambda _, old: longer.PositionedAttention(
        old, "relative", positions, False))


BUILT = {**CHANGES, "relative": relative, "modern": lambda model: (
    modern_decoder.use_rotary(model) or model)}


@pytest.mark.parametrize("name", BUILT)
def test_a_variation_runs_in_bfloat16_and_uses_dropout(name):
    model, tokens = BUILT[name](measure.new_model(0, dropout=0.5)).eval(), torch.tensor([[6, 7, 4]])
    assert model(tokens).equal(model(tokens))
    branch, x = model.layers[0].self_attention.train(), torch.randn(1, 3, 64)
    assert not branch(x, x)[0].equal(branch(x, x)[0])
    assert name == "relative" or model.bfloat16()(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["rotary", "ALiBi", "grouped", "window"])
def test_a_new_part_keeps_weights_to_the_last_bit(name):
    model = random_weights(DecoderOnlyTransformer(26, D, H, 2, 20))  # in float64
    before = copy.deepcopy(model.state_dict())
    after = (grouped_queries.use_grouped_queries(model, H) if name == "grouped"
             else CHANGES[name](model)).state_dict()
    assert before.keys() == after.keys()
    assert all(weight.equal(after[key]) for key, weight in before.items())


@pytest.mark.parametrize("first", BUILT)
@pytest.mark.parametrize("second", BUILT)
def test_two_variations_are_not_combined_by_accident(first, second):
    """Only the attention function of ALiBi stays. Otherwise, nothing is even built."""
    model = BUILT[first](measure.new_model(0))
    if first == "ALiBi" and second in ("grouped", "window"):
        kept = BUILT[second](model).layers[0].self_attention.attention_function
        assert kept.func is alibi.alibi_attention
    elif "ALiBi" not in (first, second) and first != second:
        state, parts = torch.get_rng_state(), list(model.layers.modules())
        with pytest.raises(InputError, match="write one class with both"):
            BUILT[second](model)
        assert list(model.layers.modules()) == parts and state.equal(torch.get_rng_state())


# --- Llama and Mistral ----------------------------------------------------------------
def their_output(theirs, model, new=slice(0, 7), **options):
    """For our embeddings, with positions from the first real token."""
    positions = model.positions_of(IDS)[:, new]
    x = model.positional_encoding(model.embedding(IDS[:, new]) * model.embedding_scale, positions)
    return theirs(inputs_embeds=x, attention_mask=REAL[:, :new.stop].long(), position_ids=positions,
                  **options)


@pytest.mark.parametrize("key_heads", ["rotary", 1, 2, 4])
@torch.no_grad()
def test_rotary_attention_and_grouped_queries_equal_llama_and_pytorch(key_heads):
    model = random_model(CHANGES["rotary"] if key_heads == "rotary" else lambda model: (
        grouped_queries.use_grouped_queries(model, key_heads)))
    theirs = their_output(as_llama(model), model).logits
    close(logits_of(model)[REAL], theirs[REAL])
    if key_heads != "rotary":
        layer, x = model.layers[0].self_attention, torch.randn(3, 7, D).double()
        heads = [w(x).view(3, 7, -1, K).transpose(1, 2) for w in (layer.w_q, layer.w_k, layer.w_v)]
        expected = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        close(layer(x, x, causal_mask(7, 7))[0], layer.w_o(expected.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("window", [1, 2, 3, 6])
@torch.no_grad()
def test_a_sliding_window_equals_mistral_with_and_without_cache(window):
    model = random_model(lambda model: sliding_window.use_sliding_window(model, window))
    for name, parameter in model.named_parameters():  # Mistral's attention has no biases
        if "attention" in name and name.endswith("bias"):
            parameter.zero_()
    theirs = as_llama(model, MistralForCausalLM, MistralConfig, sliding_window=window)
    ours, past = logits_of(model), None
    close(ours[REAL], their_output(theirs, model).logits[REAL])
    for new in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        if window > 1:  # their cache keeps the last w - 1 entries, written as [-0:], which is all
            out = their_output(theirs, model, new, past_key_values=past, use_cache=True)
            past = out.past_key_values
            close(ours[:, new][REAL[:, new]], out.logits[REAL[:, new]])


@torch.no_grad()
def test_the_last_step_is_llama_logit_by_logit_and_token_by_token():
    distinct = set()
    for seed in range(6):
        model = random_model(CHANGES["modern"], seed)
        theirs = as_llama(model)
        other = theirs(IDS, REAL.long(), model.positions_of(IDS)).logits
        close(logits_of(model)[REAL], other[REAL])
        rows = theirs.generate(IDS, attention_mask=REAL.long(), max_new_tokens=15, do_sample=False)
        expected = [cut(row[6:]) for row in rows.tolist()]
        assert model.generate(PROMPTS, 15) == expected
        distinct |= {tuple(row) for row in expected}
    assert len(distinct) > 6


def test_every_modern_step_changes_what_it_names_and_is_measured_at_its_own_size(
        monkeypatch, capsys):
    models = []
    monkeypatch.setattr(modern_decoder, "train", lambda model, *_: (
        models.append(model) or len(models) / 1000))
    results, printed = modern_decoder.main(), capsys.readouterr().out.replace(",", "")
    assert results == {"base": "0.1%, 1024 bytes", "variation": "0.7%, 512 bytes"}
    sizes = [measure.count_parameters(model) for model in models]
    assert sizes == pytest.approx([measure.count_parameters(measure.new_model(0))] * 7, rel=0.01)
    assert [row.split() for row in re.findall(r"^  \d  .{20}(.*)", printed, re.MULTILINE)] == [
        [f"{size}", f"{model.layers[0].feed_forward.up.out_features}",
         f"{1024 if n < 5 else 512}", f"0.{n + 1}%"]
        for n, (size, model) in enumerate(zip(sizes, models))]
    assert [measure.cache_bytes(model, 1) for model in models] == [1024] * 5 + [512] * 2
    counts = {kind: [sum(type(m).__name__ == kind for m in model.modules()) for model in models]
              for kind in ("LayerNorm", "RMSNorm", "SwiGLU", "ModernAttention")}
    assert counts == {"LayerNorm": [5] + [0] * 6, "RMSNorm": [0] + [5] * 6,
                      "SwiGLU": [0] * 3 + [2] * 4, "ModernAttention": [0] * 4 + [2] * 3}
    biases = [any(n.endswith("bias") for n, _ in model.named_parameters()) for model in models]
    tied = [model.output.weight is model.embedding.weight for model in models]
    assert biases == [True] * 2 + [False] * 5 and tied == [True] * 6 + [False]


@pytest.mark.parametrize("shared", ["mean", "first"])
def test_a_shared_key_head_is_the_mean_or_the_first_of_its_group(shared):
    model = DecoderOnlyTransformer(26, D, 6, 1)
    old = copy.deepcopy(model.layers[0].self_attention.state_dict())
    new = grouped_queries.use_grouped_queries(model, 2, shared).layers[0].self_attention
    for name, value in new.state_dict().items():
        heads = old[name].split(4)  # the rows of each of 6 heads, in 2 groups
        if name[:3] in ("w_k", "w_v"):
            heads = [sum(group) / 3 if shared == "mean" else group[0]
                     for group in (heads[:3], heads[3:])]
        close(value, torch.cat(heads), 1e-6)


# --- Positions ------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12])
@torch.no_grad()
def test_alibi_equals_bloom(heads):
    """Bloom adds slope * position of the key; the softmax cannot tell that from the distance."""
    queries, keys, values = (torch.randn(3, heads, 7, 5).double() for _ in range(3))
    mask, real = causal_mask(7, 7) & REAL[:, None, None], REAL[:, None].expand(3, heads, 7)
    ours, _ = alibi.alibi_attention(queries, keys, values, mask)
    bias = build_alibi_tensor(REAL.long(), heads, torch.float64).view(3, heads, 1, 7)
    bias = bias.masked_fill(~mask, -math.inf)
    close(ours[real], F.scaled_dot_product_attention(queries, keys, values, bias)[real], 1e-6)
    last, _ = alibi.alibi_attention(queries[:, :, -1:], keys, values, REAL[:, None, None])
    close(last, ours[:, :, -1:])  # a single query, as with a cache


def test_rotary_angles_keep_float64_in_every_model():
    """Rounded to bfloat16, positions 1000 and 1001 would have the same angles."""
    exact = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    for name in ("rotary", "modern"):
        rotary = BUILT[name](measure.new_model(0)).bfloat16().positional_encoding
        rotary.interpolation = 2.5
        rotary(None, torch.tensor([[1000, 1001]]))
        close(rotary.angles[0, 0], torch.tensor([[400], [400.4]]).double() * exact, 1e-4)
    with pytest.raises(InputError, match="heads of size 5"):  # an odd size
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


@torch.no_grad()
def test_latent_attention_equals_that_of_deepseek_v2_without_its_norm_and_rotary_key():
    """Their two rotary dimensions get queries of 0, which still count in their sqrt(K + 2)."""
    ours = random_model(CHANGES["latent"]).layers[0].self_attention  # latents of 5
    ours.w_q.bias.zero_(), ours.w_o.bias.zero_()  # theirs has no biases
    theirs = DeepseekV2Attention(DeepseekV2Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=None,
        kv_lora_rank=5, qk_nope_head_dim=K, qk_rope_head_dim=2, v_head_dim=K,
        attn_implementation="sdpa"), 0).double()
    theirs.kv_a_layernorm = nn.Identity()
    q, k, v = (layer.weight.view(H, K, -1) for layer in (ours.w_q, ours.w_k, ours.w_v))
    q = torch.cat([q * ((K + 2) / K) ** 0.5, torch.zeros(H, 2, D)], 1)
    theirs.q_proj.weight.copy_(q.flatten(0, 1))
    theirs.kv_a_proj_with_mqa.weight.copy_(torch.cat([ours.compress.weight, torch.randn(2, D)]))
    theirs.kv_b_proj.weight.copy_(torch.cat([k, v], 1).flatten(0, 1))
    theirs.o_proj.weight.copy_(ours.w_o.weight)
    x, mask = torch.randn(3, 7, D).double(), causal_mask(7, 7) & REAL[:, None, None]
    angles = torch.polar(torch.ones(1, 7, 1), torch.arange(7.0)[None, :, None]).to(torch.complex128)
    expected = theirs(x, attention_mask=mask, position_embeddings=angles)[0]
    for ours.absorbed in (False, True):
        close(ours(x, x, mask)[0][REAL], expected[REAL])


COLUMNS = torch.arange(13)
MASKS = {
    "none": None, "padding": (torch.tensor([13, 4])[:, None] > COLUMNS)[:, None, None],
    "causal": causal_mask(11, 13), "negative": causal_mask(11, 13),
    "left padding": causal_mask(11, 13) & (COLUMNS > torch.tensor([6, -1])[:, None])[:, None, None],
    "blocks": (torch.arange(11)[:, None] // 4 == COLUMNS // 4)[None, None]}


@pytest.mark.parametrize("tile", [1, 3, 8, 64])
@pytest.mark.parametrize("case", MASKS)
def test_tiles_equal_pytorch_and_the_formula_with_gradients(tile, case, monkeypatch):
    """The scores of "negative" are about -2000. A query without keys has "left padding"."""
    monkeypatch.setattr(flash_attention, "TILE", tile)
    mask, results, shifts = MASKS[case], [], (-30, 30, 0) if case == "negative" else (0, 0, 0)
    for function in (flash_attention.flash_attention, attention, F.scaled_dot_product_attention):
        torch.manual_seed(1)
        inputs = [(torch.randn(2, 3, length, 5).double() + shift).requires_grad_()
                  for length, shift in zip((11, 13, 13), shifts)]
        out = function(*inputs, mask)
        out = out[0] if isinstance(out, tuple) else out
        if function is attention and mask is not None:
            out = out * mask.any(-1, keepdim=True)
        results.append([out, *torch.autograd.grad((out ** 3).sum(), inputs)])
    for ours, formula, kernel in zip(*results):
        close(ours, formula)
        close(ours, kernel)


def test_no_matrix_of_all_scores_is_ever_made():
    def peak(function, length):
        with flash_attention.Memory() as memory:
            flash_attention.step(function, length)
        return memory.peak

    scores, tiles = 2 * 512 * 512 * 4, peak(flash_attention.flash_attention, 512)  # bytes
    assert peak(attention, 512) > 3 * scores * 0.9  # scores, weights, and their gradient
    assert tiles < scores and tiles < 2.2 * peak(flash_attention.flash_attention, 256)


# --- Longer than trained --------------------------------------------------------------
@torch.no_grad()
def test_clipped_relative_keys_equal_wav2vec2_bert():
    """The same scores: clipped distances, one learned vector each (Shaw et al. 2018)."""
    theirs = random_weights(Wav2Vec2BertSelfAttention(Wav2Vec2BertConfig(
        hidden_size=D, num_attention_heads=H, position_embeddings_type="relative_key",
        left_max_position_embeddings=2, right_max_position_embeddings=2, attention_dropout=0.0)))
    model = relative(DecoderOnlyTransformer(26, D, H, 1).double())
    ours = model.layers[0].self_attention
    for name, other in zip("qkvo", ("linear_q", "linear_k", "linear_v", "linear_out")):
        getattr(ours, f"w_{name}").load_state_dict(getattr(theirs, other).state_dict())
    # Theirs counts key minus query, ours query minus key.
    ours.table.copy_(theirs.distance_embedding.weight.flip(0))
    x, real = torch.randn(3, 7, D).double(), torch.arange(7) < torch.tensor([[7], [3], [5]])
    model.positional_encoding(x, torch.arange(7)[None])
    hidden = torch.zeros(3, 1, 7, 7).double().masked_fill(~real[:, None, None], -1e9)
    close(ours(x, x, real[:, None, None])[0][real], theirs(x, attention_mask=hidden)[0][real])


def test_the_count_restarts_at_sep_also_with_left_padding():
    ids = torch.tensor([[10, 6, 13, SEP, 20, 16, 23, EOS], [0, 0, 0, 0, 9, SEP, 25, EOS],
                        [0, 0, 0, 9, 7, 7, 7, 7]])
    assert longer.RestartingDecoder().positions_of(ids).tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("way", ["learned", "none", "rotary", "relative", "sinusoids"])
@pytest.mark.parametrize("model_class", [DecoderOnlyTransformer, longer.RandomStart,
                                         EncoderDecoderTransformer])
@torch.no_grad()
def test_every_way_gives_the_same_with_and_without_a_cache(way, model_class):
    """Vectors, which is stricter, and tokens, also of a beam search."""
    model = longer.build(model_class, way, 1).double().eval()
    tokens = torch.tensor([[10, 6, SEP, 20, 16, 23, 9], [9, 9, SEP, 25, 22, 7, 8]])
    positions, searches = model.positions_of(tokens), model_class is EncoderDecoderTransformer
    memory = model.run_encoder(tokens[:, :5])[0] if searches else None
    whole = model.run_decoder(tokens, *([memory, None] if searches else [None]), positions)[0]
    close(in_pieces(model, tokens, None, positions, memory), whole)
    model.embedding.weight.normal_()
    prompts = [[10, 6, 13, SEP], [9, SEP], [7, 7, 8, 15, SEP]]
    rows = model.generate(prompts, 12, stop_at=None)
    assert rows == model.generate(prompts, 12, stop_at=None, use_cache=False)
    assert rows == [model.generate([prompt], 12, stop_at=None)[0] for prompt in prompts]
    if searches:
        narrow, wide = (model.beam_search(prompts, width, max_new_tokens=6) for width in (1, 3))
        assert [found[0].tokens for found in narrow] == model.generate(prompts, 6)
        assert [found[0].tokens for found in wide] == [
            model.beam_search([prompt], 3, max_new_tokens=6)[0][0].tokens for prompt in prompts]


def test_sources_of_at_most_five_digits_end_with_eos():
    for batch in measure.loaders(0, longer.end_source)[1]:
        for row, digits, words in zip(batch["source"].tolist(), batch["digits"], batch["words"]):
            assert row[len(digits) - 1] == EOS and digits[-1] == "<EOS>"
            assert len(words) == len(digits) - 1 <= 5 and "<EOS>" not in words


def test_a_random_start_moves_whole_training_sequences_and_only_those():
    ids = torch.tensor([[10, 6, 13, SEP, 20, 16, 23, EOS]] * 50)
    model, plain = longer.RandomStart(), longer.RestartingDecoder().positions_of(ids)
    moved = model.train().positions_of(ids) - plain
    assert moved.unique(dim=1).size(1) == 1 and 20 < len(moved[:, 0].unique()) <= 41
    assert model.eval().positions_of(ids).equal(plain)


@pytest.mark.parametrize("ended", [False, True])
def test_a_longer_sequence_counts_if_every_word_is_correct(ended):
    """In turn, a row is complete, lacks its last word, is empty, and has one word too many."""
    def translate(_, rows):
        assert all((row[-1] == "<EOS>") == ended for row in rows)
        words = [[WORD_OF[digit] for digit in row if digit in DIGITS] for row in rows]
        return [(row, row[:-1], [], [*row, "one"])[i % 4] for i, row in enumerate(words)]

    scores = longer.by_lengths(None, SimpleNamespace(translate=translate), ended)
    assert scores == [0.25] * len(longer.LENGTHS)


# --- measure.py and run_all.py --------------------------------------------------------
def test_a_check_refuses_nan_and_what_is_above_its_limit(monkeypatch):
    measure.expect("equal", 1e-10)
    for difference in (math.nan, math.inf, 1.1e-10):
        with pytest.raises(InputError, match=r"equal \(difference"):
            measure.expect("equal", difference)
    append = decoder_only.KeyValueCache.append
    monkeypatch.setattr(decoder_only.KeyValueCache, "append", lambda *new: (
        part.flip(2) for part in append(*new)))
    model = random_weights(measure.new_model(0))
    with pytest.raises(InputError, match="with and without cache"):
        measure.check_cache(model)


@pytest.mark.parametrize("module", [rotary_positions, alibi, grouped_queries, latent_attention,
                                    sliding_window], ids=lambda module: module.__name__)
def test_every_variant_starts_from_the_same_weights(module, monkeypatch):
    starts = []  # Nothing is trained here. Only weights of attention may differ.
    monkeypatch.setattr(decoder_only, "train_epoch", lambda model, *_: starts.append(
        [weight.clone() for name, weight in model.named_parameters() if "attention" not in name]))
    monkeypatch.setattr(decoder_only, "evaluate", lambda *_: {
        "exact_match": 1, "examples": [(range(n), 1, 1) for n in range(1, 6)]})
    monkeypatch.setattr(decoder_only, "translate", lambda model, rows: rows)
    monkeypatch.setattr(latent_attention, "show_times", lambda: None)
    module.main()
    assert len(starts) >= 2 * module.NUM_EPOCHS
    assert all(a.equal(b) for start in starts for a, b in zip(start, starts[0]))


@each_module
@pytest.mark.parametrize("name", [None, "BATCH_SIZE", "LEARNING_RATE", "CLIP_NORM", "WARMUP_STEPS"])
def test_constants_are_checked_also_those_of_decoder_only(module, name, monkeypatch, capsys):
    own = "TILE" if module is flash_attention else "NUM_EPOCHS"
    monkeypatch.setattr(decoder_only if name else module, name or own, -1)
    assert f"{name or own}=-1" in refused(module, monkeypatch, capsys)


def test_run_all_checks_every_file_first_and_prints_one_table(monkeypatch, capsys):
    assert [*run_all.ORDER] == [module.__name__ for module in VARIATIONS]
    for n, module in enumerate(VARIATIONS):
        monkeypatch.setattr(module, "main", lambda n=n: {"base": f"{n}%", "variation": f"{n}.5%"})
    run_all.main()
    for n, line in enumerate(capsys.readouterr().out.splitlines()[-8:]):
        assert line.startswith(VARIATIONS[n].__name__)
        assert line.split()[-3:] == [f"{n}%", f"{n}.5%", "0.0"]
    monkeypatch.setattr(modern_decoder, "NUM_EPOCHS", 0)
    assert "variations/modern_decoder.py: NUM_EPOCHS=0" in refused(run_all, monkeypatch, capsys)
