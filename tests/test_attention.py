"""Attention, heads, positions, feed-forward networks, and layers: equal to those of PyTorch."""
import math

import pytest
import torch
from torch import nn

import encoder_only
from attention_by_hand import multi_head_attention
from conftest import SCRIPTS, close, random_weights
from training import fused_attention, use_fused_attention

B, S, T, H, K, D, D_FF = 4, 5, 3, 2, 7, 14, 9
LAYERS = [("encoder_only", "EncoderLayer"), ("decoder_only", "DecoderLayer"),
          ("encoder_decoder", "EncoderLayer"), ("encoder_decoder", "DecoderLayer")]
in_every_script = pytest.mark.parametrize("script", SCRIPTS)
either_kernel = pytest.mark.parametrize("fused", [False, True])


def vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def random_mask(*shape):
    """Booleans in which every query may attend to the first key, and to about half of the rest."""
    mask = torch.rand(*shape) < 0.5
    mask[..., 0] = True
    return mask


@torch.no_grad()
def copy_attention(ours, theirs):
    """Copy weights into an nn.MultiheadAttention."""
    for kind in ("weight", "bias"):
        joined = torch.cat([getattr(w, kind) for w in (ours.w_q, ours.w_k, ours.w_v)])
        getattr(theirs, f"in_proj_{kind}").copy_(joined)
    theirs.out_proj.load_state_dict(ours.w_o.state_dict())


def copy_layer(ours, theirs):
    """Copy weights into a layer of nn.Transformer."""
    pairs = [(ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2),
             (ours.feed_forward.up, theirs.linear1), (ours.feed_forward.down, theirs.linear2)]
    copy_attention(ours.self_attention, theirs.self_attn)
    if hasattr(ours, "cross_attention"):
        copy_attention(ours.cross_attention, theirs.multihead_attn)
        pairs[1:2] = [(ours.norm_cross, theirs.norm2), (ours.norm2, theirs.norm3)]
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())


def torch_layer(kind, d_model, num_heads, d_ff):
    """A layer of torch.nn as ours. In evaluation mode, PyTorch would use a fused path."""
    layer = getattr(nn, f"Transformer{kind}Layer")(
        d_model, num_heads, d_ff, 0.0, "gelu", batch_first=True, norm_first=True)
    return layer.double().train()


# --- Attention ------------------------------------------------------------------------
@in_every_script
@either_kernel
def test_attention_equals_torch_multihead_attention(script, fused):
    ours = random_weights(SCRIPTS[script].MultiHeadAttention(D, H))
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double().eval()
    copy_attention(ours, theirs)
    x, memory, mask = vectors(B, T, D), vectors(B, S, D), random_mask(B, H, T, S)
    if fused:
        use_fused_attention(ours)
    out, weights = ours(x, memory, mask)
    # In PyTorch's class, True means masked, hence the ~.
    expected, expected_weights = theirs(x, memory, memory, attn_mask=~mask.flatten(0, 1),
                                        average_attn_weights=False)
    close(out, expected)
    if fused:
        assert weights is None
    else:
        close(weights, expected_weights)


def test_attention_by_hand_ends_in_the_multi_head_attention():
    ours = random_weights(encoder_only.MultiHeadAttention(D, H))
    x, memory, mask = vectors(B, T, D), vectors(B, S, D), random_mask(T, S)
    by_hand = multi_head_attention(x, memory, [ours.w_q, ours.w_k, ours.w_v, ours.w_o], H, mask)
    for one, other in zip(by_hand, ours(x, memory, mask)):
        close(one, other)


@in_every_script
def test_the_formula_equals_the_fused_kernel_and_its_gradients(script):
    attention = random_weights(SCRIPTS[script].MultiHeadAttention(D, H))
    mask = random_mask(B, 1, T, S)
    mask[1, 0, 2] = False  # a query that may attend to nothing: the only one that may differ
    used = mask.any(-1)[:, 0]  # (B, T)
    inputs, found = [vectors(B, T, D), vectors(B, S, D)], []
    for fused in (False, True):
        if fused:
            use_fused_attention(attention)
        x, memory = (i.clone().requires_grad_() for i in inputs)
        out = attention(x, memory, mask)[0][used]
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, memory))])
    for one, other in zip(*found):
        close(one, other)


@in_every_script
@either_kernel
def test_scores_are_divided_by_the_root_of_the_head_size(script, fused):
    function = fused_attention if fused else SCRIPTS[script].attention
    x = 2 * torch.eye(4).double()[None, None, :2]  # (1, 1, 2, 4): q.k is 4 or 0, and sqrt(K) is 2
    weight = math.exp(4 / 2) / (math.exp(4 / 2) + 1)
    expected = torch.tensor([2 * weight, 2 * (1 - weight), 0, 0]).double()
    torch.testing.assert_close(function(x, x, x)[0][0, 0, 0], expected)


@in_every_script
@either_kernel
def test_attention_dropout_rescales_the_weights_that_it_keeps(script, fused):
    script = SCRIPTS[script]
    queries, keys = vectors(B, H, T, K), vectors(B, H, S, K)
    values = torch.eye(S).double().expand(B, H, S, S)  # so the result is the weights
    weights, rate = script.attention(queries, keys, values)[1], 0.75
    function = fused_attention if fused else script.attention
    dropped, returned = function(queries, keys, values, dropout=rate)
    kept = dropped != 0
    close(dropped[kept], weights[kept] / (1 - rate))
    assert fused or returned.equal(weights)  # those before dropout
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=0.12)  # of 120 weights


# --- Positions ------------------------------------------------------------------------
@in_every_script
def test_positional_encoding_is_the_formula_of_the_paper(script):
    table = SCRIPTS[script].PositionalEncoding(8, 50).table
    for position in (0, 1, 7, 49):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            pair = table[position, 2 * i:2 * i + 2].tolist()
            assert pair == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


@in_every_script
def test_a_shift_of_positions_is_the_same_rotation_everywhere(script):
    table = SCRIPTS[script].PositionalEncoding(16, 60).table.double()
    pairs = torch.complex(table[:, 1::2], table[:, 0::2])  # cos + i sin = e^(i angle)
    for shift in (1, 5):
        rotation = pairs[shift:] / pairs[:-shift]
        close(rotation, rotation[:1].expand_as(rotation), 1e-5)


# --- Layers ---------------------------------------------------------------------------
@pytest.mark.parametrize("script, layer", LAYERS[:3])
def test_encoder_layer_equals_torch_transformer_encoder_layer(script, layer):
    """So does the GPT layer, with any mask."""
    ours = random_weights(getattr(SCRIPTS[script], layer)(D, H, D_FF))
    theirs = torch_layer("Encoder", D, H, D_FF)
    copy_layer(ours, theirs)
    x, mask = vectors(B, S, D), random_mask(B, H, S, S)
    out, weights = ours(x, mask)
    close(out, theirs(x, src_mask=~mask.flatten(0, 1)))
    assert weights.shape == (B, H, S, S)


def test_decoder_layer_equals_torch_transformer_decoder_layer():
    ours = random_weights(SCRIPTS["encoder_decoder"].DecoderLayer(D, H, D_FF))
    theirs = torch_layer("Decoder", D, H, D_FF)
    copy_layer(ours, theirs)
    x, memory = vectors(B, T, D), vectors(B, S, D)
    mask, memory_mask = random_mask(B, H, T, T), random_mask(B, H, T, S)
    out, weights = ours(x, mask, None, memory, memory_mask)
    close(out, theirs(x, memory, ~mask.flatten(0, 1), ~memory_mask.flatten(0, 1)))
    assert weights.shape == (B, H, T, S)  # those of cross-attention


# --- Dropout: with a rate of 1, it leaves only what comes after it ---------------------
@in_every_script
def test_dropout_acts_inside_attention_and_feed_forward_in_training(script):
    attention = SCRIPTS[script].MultiHeadAttention(D, H, dropout=1.0)
    feed_forward = SCRIPTS[script].FeedForward(D, D_FF, dropout=1.0)
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    for block, run, bias in ((attention, lambda: attention(x, memory)[0], attention.w_o.bias),
                             (feed_forward, lambda: feed_forward(x), feed_forward.down.bias)):
        torch.testing.assert_close(run(), bias.expand(B, T, D))
        block.eval()
        assert not torch.allclose(run(), bias.expand(B, T, D))


@pytest.mark.parametrize("script, layer", LAYERS)
def test_dropout_acts_on_every_branch_before_the_addition(script, layer):
    block = getattr(SCRIPTS[script], layer)(D, H, D_FF).train()
    block.dropout.p = 1.0
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    more = {"memory": memory} if hasattr(block, "cross_attention") else {}
    assert torch.equal(block(x, None, **more)[0], x)
