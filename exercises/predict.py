"""
predict.py - the exercises in which you write down a number or a shape before you see it

Each question has a function that finds the answer by running the scripts. No answer is stored.
The functions import torch themselves, so that practice.py starts at once.
"""
from typing import NamedTuple


class Question(NamedTuple):
    name: str
    group: str
    minutes: int
    text: str
    truth: object  # a function without arguments; its docstring explains the answer
    within: float  # how far a number may be off, as a fraction


def first_loss():
    """A uniform guess costs -log(1 / V) = ln V. Small embeddings make the first guess uniform."""
    import torch
    import decoder_only
    from toy_dataset import create_dataloaders

    torch.manual_seed(0)
    model = decoder_only.DecoderOnlyTransformer()
    return decoder_only.evaluate(model, create_dataloaders()[1])["loss"]


def first_loss_with_std_1():
    """A token's own vector comes up the residuals, and times itself it gives a logit of about D."""
    import torch
    import decoder_only
    from toy_dataset import create_dataloaders

    torch.manual_seed(0)
    model = decoder_only.DecoderOnlyTransformer()
    torch.nn.init.normal_(model.embedding.weight)
    return decoder_only.evaluate(model, create_dataloaders()[1])["loss"]


def parameters_of_attention():
    """Four matrices of D x D and four biases of D. The number of heads does not matter."""
    from decoder_only import MultiHeadAttention
    from training import count_parameters

    return count_parameters(MultiHeadAttention(64, 4))


def parameters_of_a_layer():
    """4 D^2 in attention and 8 D^2 in the feed-forward network, biases, and two norms."""
    from decoder_only import DecoderLayer
    from training import count_parameters

    return count_parameters(DecoderLayer(64, 4, 256))


def bytes_of_the_cache():
    """Keys and values, D numbers each, of 4 bytes, per token and layer."""
    from decoder_only import DecoderOnlyTransformer

    model = DecoderOnlyTransformer(num_layers=2)
    caches = [layer.self_attention.new_cache(1, 10) for layer in model.layers]
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)


def shape_of_scores():
    """Each head compares each query with each key: (B, H, T, S)."""
    import torch
    from encoder_decoder import MultiHeadAttention

    _, weights = MultiHeadAttention(24, 4)(torch.randn(2, 5, 24), torch.randn(2, 7, 24))
    return tuple(weights.shape)


def shape_of_a_head():
    """D = 24 is divided among 4 heads."""
    import torch
    from encoder_decoder import MultiHeadAttention

    attention = MultiHeadAttention(24, 4)
    return tuple(attention.split_heads(torch.randn(2, 5, 24)).shape)


def weight_of_two_keys():
    """softmax([2, 0, 2]) = (e^2, 1, e^2) / (2 e^2 + 1)."""
    import torch
    from decoder_only import attention

    queries, keys = torch.tensor([[[[1.0]]]]), torch.tensor([[[[2.0], [0.0], [2.0]]]])
    return attention(queries, keys, keys)[1][0, 0, 0, 0].item()


def weight_after_masking():
    """The mask removes one of the two equal keys: e^2 / (e^2 + 1)."""
    import torch
    from decoder_only import attention

    queries, keys = torch.tensor([[[[1.0]]]]), torch.tensor([[[[2.0], [0.0], [2.0]]]])
    mask = torch.tensor([[[[True, True, False]]]])
    return attention(queries, keys, keys, mask)[1][0, 0, 0, 0].item()


def allowed_cells():
    """1 + 2 + 3 cells without a cache; with two cached keys, each query may see two more."""
    from decoder_only import causal_mask

    return causal_mask(3, 5).sum().item()


def passes_of_gpt():
    """One pass per word, and one for <EOS>."""
    import torch
    from decoder_only import DecoderOnlyTransformer
    from training import count_passes

    torch.manual_seed(0)
    model = DecoderOnlyTransformer().eval()
    return count_passes(model, lambda: model.generate([[6, 7, 8, 9, 10, 4]], 6, stop_at=None))


def labels_that_count():
    """Two words and <EOS>, one word and <EOS>, three words and <EOS>: 3 + 2 + 4."""
    from toy_dataset import IGNORE_INDEX, collate_fn, make_item

    batch = collate_fn([make_item(["4", "0"]), make_item(["7"]), make_item(["1", "2", "3"])])
    return (batch["pair_labels"] != IGNORE_INDEX).sum().item()


def width_of_a_pair():
    """The longest row has three digits, <SEP>, and three words; <EOS> is only a label."""
    from toy_dataset import collate_fn, make_item

    batch = collate_fn([make_item(["4", "0"]), make_item(["7"]), make_item(["1", "2", "3"])])
    return tuple(batch["pair"].shape)


def tokens_left_by_top_p():
    """0.5 + 0.3 = 0.8 crosses 0.7, and the token that crosses p stays."""
    import torch
    from decoder_only import filter_logits

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    return filter_logits(logits, top_p=0.7).isfinite().sum().item()


def rate_of_the_first_step():
    """Warmup begins at 1 / warmup_steps, not at 0: a rate of 0 would waste a step."""
    from training import lr_factor

    return 3e-3 * lr_factor(0, 680, 40)


def norm_after_clipping():
    """(30, 40) has length 50, and clipping keeps the direction: (0.6, 0.8)."""
    import torch

    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([30.0, 40.0])
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    return w.grad[0].item()


QUESTIONS = [
    Question("first_loss", "losses", 3, "A GPT with 26 tokens has just been built, with small "
             "embeddings. What is its loss, in nats, before the first step?", first_loss, 0.05),
    Question("large_embeddings", "losses", 5, "A GPT with 26 tokens and D = 64 has tied "
             "embeddings that start with standard deviation 1. What is its first loss, roughly, "
             "in nats?", first_loss_with_std_1, 0.3),
    Question("attention_weights", "sizes", 5, "How many parameters does attention have with D = 64 "
             "and 4 heads, biases included?", parameters_of_attention, 0),
    Question("layer_weights", "sizes", 10, "How many parameters does a whole layer have, with "
             "D = 64, d_ff = 256, biases, and two norms with a gain and a shift?",
             parameters_of_a_layer, 0),
    Question("cache_bytes", "sizes", 5, "Two layers, D = 64, 32-bit numbers, one sequence of 10 "
             "tokens. How many bytes does the key/value cache take?", bytes_of_the_cache, 0),
    Question("score_shape", "shapes", 5, "Cross-attention: 2 targets of 5 tokens, 2 sources of 7, "
             "D = 24, 4 heads. What is the shape of the weights? Write 1,2,3,4",
             shape_of_scores, 0),
    Question("head_shape", "shapes", 3, "2 rows of 5 tokens, D = 24, 4 heads. What is the shape of "
             "the queries after split_heads?", shape_of_a_head, 0),
    Question("pair_shape", "shapes", 5, "A batch of 4 0, 7, and 1 2 3. What is the shape of `pair` "
             "(digits, <SEP>, words)?", width_of_a_pair, 0),
    Question("two_keys", "numbers", 5, "One query has the scores 2, 0, and 2. What weight does the "
             "first key get?", weight_of_two_keys, 0.02),
    Question("masked_key", "numbers", 5, "One query has the scores 2, 0, and 2, and the third key "
             "is masked. What weight does the first key get?", weight_after_masking, 0.02),
    Question("mask_cells", "numbers", 5, "causal_mask(3, 5): three new queries, five keys, two of "
             "them cached. How many of the 15 cells are True?", allowed_cells, 0),
    Question("counted_labels", "numbers", 5, "A batch of 4 0, 7, and 1 2 3, for the decoder-only "
             "model. How many labels count toward the loss?", labels_that_count, 0),
    Question("passes", "numbers", 5, "A GPT translates five digits and stops at <EOS>. How many "
             "passes does it make?", passes_of_gpt, 0),
    Question("nucleus", "numbers", 3, "Probabilities 0.5, 0.3, 0.15, and 0.05. How many tokens "
             "does top_p = 0.7 keep?", tokens_left_by_top_p, 0),
    Question("first_rate", "numbers", 3, "A peak of 3e-3 and 40 steps of warmup. What is the "
             "learning rate of the very first step?", rate_of_the_first_step, 0.02),
    Question("clipping", "numbers", 3, "A gradient of (30, 40) is clipped to length 1. What is its "
             "first number then?", norm_after_clipping, 0.02),
]
