"""Models of Hugging Face's transformers with our weights: each computes the same function.

Used by test_references.py, test_variations.py, and benchmarks/bench.py. Our models are pre-norm,
with sinusoids that are added to scaled embeddings. Pegasus is built the same way, and its encoder
is our encoder-only model without the output layer. GPT-2 gets the sinusoids as its learned
positions. Variations become Llama or Mistral.
"""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: all models are built here
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig,  # noqa: E402
                          LlamaForCausalLM, PegasusConfig, PegasusForConditionalGeneration)

from toy_dataset import EOS, PAD, SOS  # noqa: E402


def pegasus(model):
    """Return Pegasus in the sizes of `model`, with its own random weights."""
    a = model.arguments
    theirs = PegasusForConditionalGeneration(PegasusConfig(
        vocab_size=a["vocab_size"], d_model=a["d_model"], max_position_embeddings=a["max_len"],
        encoder_layers=a["num_layers"], decoder_layers=a["num_layers"],
        encoder_attention_heads=a["num_heads"], decoder_attention_heads=a["num_heads"],
        encoder_ffn_dim=a["d_ff"], decoder_ffn_dim=a["d_ff"], activation_function="gelu",
        scale_embedding=True, pad_token_id=PAD, bos_token_id=SOS, eos_token_id=EOS,
        decoder_start_token_id=SOS, forced_eos_token_id=None, tie_word_embeddings=False))
    return theirs.to(model.embedding.weight).eval()


def copy(*pairs):
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())


def copy_attention(mine, other):
    copy((mine.w_q, other.q_proj), (mine.w_k, other.k_proj), (mine.w_v, other.v_proj),
         (mine.w_o, other.out_proj))


@torch.no_grad()
def copy_stack(model, layers, norm, stack):
    """Copy embeddings, layers, and the last norm into a stack (encoder or decoder) of Pegasus."""
    copy((model.embedding, stack.embed_tokens), (norm, stack.layer_norm))
    stack.embed_positions.weight.copy_(model.positional_encoding.table)
    for mine, other in zip(layers, stack.layers):
        copy_attention(mine.self_attention, other.self_attn)
        copy((mine.norm1, other.self_attn_layer_norm), (mine.norm2, other.final_layer_norm),
             (mine.feed_forward.up, other.fc1), (mine.feed_forward.down, other.fc2))
        if hasattr(mine, "cross_attention"):
            copy_attention(mine.cross_attention, other.encoder_attn)
            copy((mine.norm_cross, other.encoder_attn_layer_norm))


def as_pegasus(model):
    """Return Pegasus with the weights of an EncoderDecoderTransformer."""
    theirs = pegasus(model)
    copy((model.embedding, theirs.model.shared), (model.output, theirs.lm_head))
    copy_stack(model, model.encoder_layers, model.encoder_norm, theirs.model.encoder)
    copy_stack(model, model.decoder_layers, model.final_norm, theirs.model.decoder)
    return theirs


def as_pegasus_encoder(model):
    """Return the encoder of Pegasus with the weights of an EncoderOnlyTransformer."""
    encoder = pegasus(model).model.encoder
    copy_stack(model, model.layers, model.final_norm, encoder)
    return encoder


@torch.no_grad()
def as_gpt2(model):
    """Return GPT-2 with the weights of a DecoderOnlyTransformer."""
    a = model.arguments
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=a["vocab_size"], n_positions=a["max_len"], n_embd=a["d_model"],
        n_layer=a["num_layers"], n_head=a["num_heads"], n_inner=a["d_ff"],
        activation_function="gelu",  # exact, as here; GPT-2 itself uses the tanh approximation
        pad_token_id=PAD, bos_token_id=SOS, eos_token_id=EOS, tie_word_embeddings=False))
    theirs = theirs.to(model.embedding.weight).eval()
    body = theirs.transformer
    body.wte.weight.copy_(model.embedding.weight * model.embedding_scale)
    body.wpe.weight.copy_(model.positional_encoding.table)
    copy((model.final_norm, body.ln_f), (model.output, theirs.lm_head))

    def join(layers, other):  # Conv1D keeps its weight as (in, out)
        other.weight.copy_(torch.cat([layer.weight for layer in layers]).T)
        other.bias.copy_(torch.cat([layer.bias for layer in layers]))

    for mine, other in zip(model.layers, body.h):
        attention = mine.self_attention
        join([attention.w_q, attention.w_k, attention.w_v], other.attn.c_attn)
        join([attention.w_o], other.attn.c_proj)
        join([mine.feed_forward.up], other.mlp.c_fc)
        join([mine.feed_forward.down], other.mlp.c_proj)
        copy((mine.norm1, other.ln_1), (mine.norm2, other.ln_2))
    return theirs


# --- For the variations ---------------------------------------------------------------
@torch.no_grad()
def as_llama(model, model_class=LlamaForCausalLM, config_class=LlamaConfig, **options):
    """Return Llama with the weights of a variation of DecoderOnlyTransformer.

    LayerNorms and feed-forward networks with GELU are taken from our model. Llama computes RMSNorm
    in float32, so it gets PyTorch's, with our gain.
    """
    a, layer = model.arguments, model.layers[0].self_attention
    options = {"attention_bias": layer.w_q.bias is not None, **options}
    theirs = model_class(config_class(
        vocab_size=a["vocab_size"], hidden_size=a["d_model"], num_attention_heads=a["num_heads"],
        num_hidden_layers=a["num_layers"], intermediate_size=a["d_ff"], pad_token_id=PAD,
        num_key_value_heads=getattr(layer, "key_heads", a["num_heads"]), bos_token_id=SOS,
        max_position_embeddings=a["max_len"], eos_token_id=EOS, tie_word_embeddings=False,
        attn_implementation="sdpa", **options)).to(model.embedding.weight).eval()
    body, rotary = theirs.model, getattr(model.positional_encoding, "frequency", None)
    body.rotary_emb = Rotary64(body.rotary_emb.inv_freq, rotary)
    body.embed_tokens.weight.copy_(model.embedding.weight * model.embedding_scale)
    body.norm = norm_64(model.final_norm)
    copy((model.output, theirs.lm_head))
    for mine, other in zip(model.layers, body.layers):
        other.input_layernorm = norm_64(mine.norm1)
        other.post_attention_layernorm = norm_64(mine.norm2)
        copy_projections(mine.self_attention, other.self_attn, rotary is not None)
        if hasattr(mine.feed_forward, "gate"):
            ours, mlp = mine.feed_forward, other.mlp
            copy((ours.gate, mlp.gate_proj), (ours.up, mlp.up_proj), (ours.down, mlp.down_proj))
        else:
            other.mlp = mine.feed_forward
    return theirs


def norm_64(mine):
    if isinstance(mine, nn.LayerNorm):
        return mine
    norm = nn.RMSNorm(len(mine.weight), eps=1e-5).to(mine.weight)
    norm.weight.copy_(mine.weight)
    return norm


class Rotary64(nn.Module):
    """Their cosines and sines in float64: they compute them in float32, whatever the weights are.

    It uses our frequencies, which must equal theirs up to float32 rounding, or zeros.
    """

    def __init__(self, theirs, ours):
        super().__init__()
        self.frequency = torch.zeros_like(theirs).double() if ours is None else ours
        assert ours is None or torch.allclose(ours, theirs.double(), atol=1e-6, rtol=0)

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.frequency).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def copy_projections(mine, other, rotary):
    # Ours rotates dimensions (0, 1), (2, 3), ... of a head; theirs (0, K/2), (1, K/2 + 1), ...
    size = mine.head_dim
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    for name in "qkvo":
        layer, theirs = getattr(mine, f"w_{name}"), getattr(other, f"{name}_proj")
        rows = torch.arange(layer.out_features)
        if rotary and name in "qk":
            rows = rows.view(-1, size)[:, order].flatten()
        theirs.weight.copy_(layer.weight[rows])
        if theirs.bias is not None:
            theirs.bias.copy_(layer.bias[rows])


def cut(row):
    """Return a row of Hugging Face's output without <SOS> and without what follows <EOS>."""
    return row[1:row.index(EOS) + 1] if EOS in row else row[1:]
