"""The building blocks: equal to those of PyTorch, and correctly masked."""

import math

import pytest
import torch
from torch import nn

import decoder_only
import encoder_decoder
import encoder_only
from attention_by_hand import multi_head_attention
from conftest import MODELS, SCRIPTS
from train_all import use_fused_attention

B, S, T, D, H = 3, 5, 4, 16, 4


def random_weights(module):
    """Norms and biases too. They start as 1 and 0, so a swap of two of them would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double().eval()


def copy_attention(ours, theirs):
    theirs.in_proj_weight.copy_(torch.cat([ours.w_q.weight, ours.w_k.weight, ours.w_v.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.w_q.bias, ours.w_k.bias, ours.w_v.bias]))
    theirs.out_proj.load_state_dict(ours.w_o.state_dict())


def key_padding():
    """(B, S) True = real, in this collection's convention."""
    return torch.arange(S) < torch.tensor([[S], [2], [3]])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_attention_equals_torch_multihead_attention(script, fused):
    ours = random_weights(SCRIPTS[script].MultiHeadAttention(D, H))
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double().eval()
    copy_attention(ours, theirs)
    x, memory = torch.randn(B, T, D).double(), torch.randn(B, S, D).double()
    real = key_padding()
    if fused:
        use_fused_attention(ours)
    out, weights = ours(x, memory, real[:, None, None, :])
    # In PyTorch's class, True means padding, hence the ~.
    expected, expected_weights = theirs(
        x, memory, memory, key_padding_mask=~real, average_attn_weights=False
    )
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    if fused:
        assert weights is None
    else:
        torch.testing.assert_close(weights, expected_weights, atol=1e-10, rtol=0)


@torch.no_grad()
def test_attention_by_hand_ends_in_the_multi_head_attention():
    ours = random_weights(encoder_only.MultiHeadAttention(D, H))
    x, memory = torch.randn(B, T, D).double(), torch.randn(B, S, D).double()
    mask = torch.rand(T, S) < 0.6
    mask[:, 0] = True
    projections = [ours.w_q, ours.w_k, ours.w_v, ours.w_o]
    by_hand = multi_head_attention(x, memory, projections, H, mask)
    for one, other in zip(by_hand, ours(x, memory, mask)):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("script", ["encoder_only", "encoder_decoder"])
@torch.no_grad()
def test_encoder_layer_equals_torch_transformer_encoder_layer(script):
    ours = random_weights(SCRIPTS[script].EncoderLayer(D, H, 32))
    theirs = nn.TransformerEncoderLayer(
        D, H, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = (
        theirs.double().train()
    )  # dropout is 0; in evaluation mode, PyTorch would use a fused path
    copy_attention(ours.attention, theirs.self_attn)
    theirs.norm1.load_state_dict(ours.norm1.state_dict())
    theirs.norm2.load_state_dict(ours.norm2.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.down.state_dict())
    x, real = torch.randn(B, S, D).double(), key_padding()
    out, _ = ours(x, real[:, None, None, :])
    torch.testing.assert_close(out, theirs(x, src_key_padding_mask=~real), atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_gpt_layer_is_the_encoder_layer_with_a_mask():
    ours = random_weights(decoder_only.DecoderLayer(D, H, 32))
    twin = encoder_only.EncoderLayer(D, H, 32).double().eval()
    twin.load_state_dict(
        {
            name.replace("self_attention", "attention"): value
            for name, value in ours.state_dict().items()
        }
    )
    x, mask = torch.randn(B, S, D).double(), decoder_only.causal_mask(S, S)
    torch.testing.assert_close(ours(x, mask)[0], twin(x, mask)[0], atol=1e-10, rtol=0)
    theirs = nn.TransformerEncoderLayer(
        D, H, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = theirs.double().train()
    copy_attention(ours.self_attention, theirs.self_attn)
    for mine, name in (
        (ours.norm1, "norm1"),
        (ours.norm2, "norm2"),
        (ours.feed_forward.up, "linear1"),
        (ours.feed_forward.down, "linear2"),
    ):
        getattr(theirs, name).load_state_dict(mine.state_dict())
    torch.testing.assert_close(
        ours(x, mask)[0], theirs(x, src_mask=~mask[0, 0]), atol=1e-10, rtol=0
    )


@torch.no_grad()
def test_decoder_layer_equals_torch_transformer_decoder_layer():
    ours = random_weights(encoder_decoder.DecoderLayer(D, H, 32))
    theirs = nn.TransformerDecoderLayer(
        D, H, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = theirs.double().train()
    copy_attention(ours.self_attention, theirs.self_attn)
    copy_attention(ours.cross_attention, theirs.multihead_attn)
    for mine, name in (
        (ours.norm1, "norm1"),
        (ours.norm_cross, "norm2"),
        (ours.norm2, "norm3"),
        (ours.feed_forward.up, "linear1"),
        (ours.feed_forward.down, "linear2"),
    ):
        getattr(theirs, name).load_state_dict(mine.state_dict())
    x, memory = torch.randn(B, T, D).double(), torch.randn(B, S, D).double()
    real_memory, real_target = key_padding(), torch.arange(T) < torch.tensor([[T], [2], [1]])
    causal = encoder_decoder.causal_mask(T, T)
    out, _ = ours(
        x, causal & real_target[:, None, None, :], None, memory, real_memory[:, None, None, :]
    )
    expected = theirs(
        x,
        memory,
        tgt_mask=~causal[0, 0],
        tgt_key_padding_mask=~real_target,
        memory_key_padding_mask=~real_memory,
    )
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_formula_equals_the_fused_kernel_and_its_gradients(script):
    attention = random_weights(SCRIPTS[script].MultiHeadAttention(D, H))
    x = torch.randn(B, S, D).double()
    mask = key_padding()[:, None, None, :] & torch.ones(S, S, dtype=torch.bool).tril()
    mask[1, 0, 2] = False  # a query that may attend to nothing
    outputs, gradients = [], []
    for fused in (False, True):
        if fused:
            use_fused_attention(attention)
        leaf = x.clone().requires_grad_()
        out, _ = attention(leaf, leaf, mask)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)
    assert torch.isfinite(gradients[0]).all()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_a_fully_masked_query_gets_zeros_never_nan(script, dtype, fused):
    attention = SCRIPTS[script].MultiHeadAttention(D, H).to(dtype).eval()
    if fused:
        use_fused_attention(attention)
    mask = torch.ones(B, 1, S, S, dtype=torch.bool)
    mask[1] = False
    mask[2, 0, 3] = False
    x = torch.randn(B, S, D).to(dtype)
    out, weights = attention(x, x, mask)
    nothing = attention.w_o.bias.to(dtype)  # the output layer's result for zeros
    torch.testing.assert_close(out[1], nothing.expand(S, D))
    torch.testing.assert_close(out[2, 3], nothing)
    assert torch.isfinite(out).all()
    if not fused:
        assert (weights[1] == 0).all() and (weights[2, :, 3] == 0).all()


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_weights_before_dropout_sum_to_one_and_respect_the_mask(script):
    attention = SCRIPTS[script].MultiHeadAttention(D, H, dropout=0.5).double().train()
    x, mask = torch.randn(B, S, D).double(), key_padding()[:, None, None, :]
    _, weights = attention(x, x, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, S).double())
    assert (weights.masked_select(~mask) == 0).all()  # exactly 0


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_scores_are_divided_by_the_root_of_the_head_size(script, fused):
    attention = SCRIPTS[script].MultiHeadAttention(4, 1).double().eval()
    if fused:
        use_fused_attention(attention)
    for layer in (attention.w_q, attention.w_k, attention.w_v, attention.w_o):
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    x = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0]]]).double()
    out, _ = attention(x, x)
    weight = math.exp(4 / 2) / (math.exp(4 / 2) + 1)  # q.k = 4, sqrt(K) = 2
    torch.testing.assert_close(
        out[0, 0], torch.tensor([2 * weight, 2 * (1 - weight), 0, 0]).double()
    )


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_a_head_reads_its_own_slice_of_each_token(script):
    attention = SCRIPTS[script].MultiHeadAttention(D, H)
    x = torch.randn(B, S, D)
    heads = attention.split_heads(x)
    assert heads.shape == (B, H, S, D // H)
    for head in range(H):
        torch.testing.assert_close(heads[:, head], x[:, :, head * (D // H) : (head + 1) * (D // H)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_positional_encoding_is_the_formula_of_the_paper(script):
    table = SCRIPTS[script].PositionalEncoding(8, 50).table
    for pos in (0, 1, 7, 49):
        for i in range(4):
            angle = pos / 10000 ** (2 * i / 8)
            assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shift_of_positions_is_the_same_rotation_everywhere(script):
    table = SCRIPTS[script].PositionalEncoding(16, 60).table.double()
    pairs = torch.complex(table[:, 1::2], table[:, 0::2])  # cos + i sin = e^(i angle)
    for k in (1, 5):
        rotation = pairs[k:] / pairs[:-k]
        torch.testing.assert_close(rotation, rotation[:1].expand_as(rotation), atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_given_positions_select_their_rows_of_the_table(script):
    encoding = SCRIPTS[script].PositionalEncoding(8, 20)
    x = torch.zeros(2, 3, 8)
    torch.testing.assert_close(encoding(x)[1], encoding.table[:3])
    if script != "encoder_only":
        positions = torch.tensor([[4, 5, 6], [0, 0, 1]])
        torch.testing.assert_close(encoding(x, positions), encoding.table[positions])


@pytest.mark.parametrize("script", ["decoder_only", "encoder_decoder"])
def test_causal_masks_align_the_last_query_with_the_last_key(script):
    causal_mask = SCRIPTS[script].causal_mask
    assert causal_mask(3, 3)[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert causal_mask(1, 5).all()
    assert causal_mask(2, 4)[0, 0].tolist() == [[True, True, True, False], [True] * 4]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("d_model, num_heads", [(65, 5), (64, 3), (64, 0)])
def test_sizes_that_cannot_work_are_rejected(script, d_model, num_heads):
    with pytest.raises(ValueError, match="d_model|num_heads=0"):
        MODELS[script](d_model=d_model, num_heads=num_heads)


# --- where dropout acts ----------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_dropout_acts_inside_attention_and_feed_forward_in_training(script):
    module, x = SCRIPTS[script], torch.randn(2, S, D)
    blocks = [
        lambda block=module.FeedForward(D, 32, 0.5): block(x),
        lambda block=module.MultiHeadAttention(D, H, 0.5): block(x, x)[0],
    ]
    for block in blocks:
        assert not torch.equal(block(), block())


@pytest.mark.parametrize(
    "script, layer",
    [
        ("encoder_only", "EncoderLayer"),
        ("decoder_only", "DecoderLayer"),
        ("encoder_decoder", "EncoderLayer"),
        ("encoder_decoder", "DecoderLayer"),
    ],
)
def test_dropout_acts_on_every_branch_before_the_addition(script, layer):
    block = getattr(SCRIPTS[script], layer)(D, H, 32).train()
    block.dropout.p = 1.0  # every branch becomes 0, so only the residual path is left
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    more = {"memory": memory} if (script, layer) == ("encoder_decoder", "DecoderLayer") else {}
    assert torch.equal(block(x, None, **more)[0], x)


@pytest.mark.parametrize("script", SCRIPTS)
def test_dropout_acts_on_the_embeddings(script):
    model = MODELS[script](d_model=D, num_heads=H, num_layers=1).train()
    model.dropout.p = 1.0
    stacks = ("layers", "encoder_layers", "decoder_layers")
    seen = []
    for stack in stacks:
        for layer in getattr(model, stack, []):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.tensor([[6, 7, 8]])
    model(tokens, tokens) if script == "encoder_decoder" else model(tokens)
    assert seen and all((x == 0).all() for x in seen)
