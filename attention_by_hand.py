"""
attention_by_hand.py - from one query and three keys to the multi-head attention of encoder_only.py

THE IDEA.  Attention is a weighted lookup among tokens, the symbols of a sequence, stored as
vectors. A query describes what a token looks for, a key what a token offers, and a value what it
passes on. The result is an average of the values, weighted by how well each key matches the query:

    query . key 1  ->  score 1              weight 1 * value 1
    query . key 2  ->  score 2  softmax ->  weight 2 * value 2   add up:  result
    query . key 3  ->  score 3              weight 3 * value 3

Each stage adds one idea, and five of the seven check themselves against an earlier stage. Stage 6
shows where queries, keys, and values come from.

Run it:     python attention_by_hand.py        (about 2 seconds). The last lines should be:

      result (B, T, D) = (5, 4, 8), weights (B, H, T, S) = (5, 2, 4, 3)
      the batch equals its rows one by one: True
"""
import math

import torch

torch.manual_seed(0)
torch.set_printoptions(precision=2, sci_mode=False)

print("1. One query and three keys, in plain Python")
query = [2.0, 1.0]
keys = [[1.5, 1.0], [0.0, -1.0], [0.5, 0.5]]
values = [[10.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 10.0]]

# The dot product of two vectors is large if they are long and point in the same direction. Stage 4
# explains why it is divided by sqrt(K), where K = 2 is the size of the vectors.
scores = [sum(q * k for q, k in zip(query, key)) / math.sqrt(len(query)) for key in keys]
# The softmax turns scores into positive weights that sum to 1. Adding 1 to a score multiplies its
# weight, relative to the others, by e (about 2.7).
exponentials = [math.exp(score) for score in scores]
weights = [e / sum(exponentials) for e in exponentials]
by_hand = [sum(w * value[i] for w, value in zip(weights, values)) for i in range(3)]
print("  scores ", [round(s, 2) for s in scores])
print("  weights", [round(w, 2) for w in weights])
print("  result ", [round(r, 2) for r in by_hand], "is mostly the value of the best match")

print("\n2. T queries at once: one matrix product compares every query with all S keys")
queries = torch.tensor([query, [0.0, -2.0], [0.0, 0.0]])  # (T, K) = (3, 2)
keys, values = torch.tensor(keys), torch.tensor(values)  # (S, K) = (3, 2) and (3, 3)
scores = queries @ keys.T / math.sqrt(2)  # (T, S)
weights = torch.softmax(scores, dim=-1)  # each row sums to 1
results = weights @ values  # (T, 3)
print(f"  weights, one row per query; the zero query attends to all keys equally\n{weights}")
print(f"  the first row equals stage 1: {torch.allclose(results[0], torch.tensor(by_hand))}")

print("\n3. The mask. A model that predicts the next token must not see it, so token t\n"
      "   attends to tokens 0 to t. This mask is called causal.")


def attention(queries, keys, values, mask=None):
    """queries (..., T, K), keys (..., S, K), values (..., S, any); mask (T, S), True = attend"""
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.size(-1))  # (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # exp(-inf) is 0
    weights = torch.softmax(scores, dim=-1)
    return weights @ values, weights


mask = torch.ones(3, 3, dtype=torch.bool).tril()
masked_results, weights = attention(queries, keys, values, mask)
print(f"  a masked weight is exactly 0, and each row still sums to 1\n{weights}")
same = masked_results[2].equal(results[2])
print(f"  the last row, where nothing is masked, equals stage 2: {same}")

print("\n4. Why divide by sqrt(K)? q.k is a sum of K products. If the entries are independent,\n"
      "   with mean 0 and variance 1, the sum has variance K and a typical size of sqrt(K).")
for width in (4, 64, 1024):
    queries, keys = torch.randn(500, 1, width), torch.randn(500, 16, width)  # 16 keys per query
    print(f"  K = {width:4d}", end="")
    for name, scale in (("q.k", 1.0), ("q.k / sqrt(K)", math.sqrt(width))):
        scores = (queries @ keys.transpose(-2, -1) / scale).requires_grad_()  # (500, 1, 16)
        weights = torch.softmax(scores, dim=-1)
        # PyTorch notes what is computed from `scores`. backward() then fills scores.grad with
        # derivatives: how much the first weight of a query changes with each of its scores.
        weights[..., 0].sum().backward()
        largest = weights.max(-1).values.mean().item()
        gradient = scores.grad.abs().mean().item()
        print(f"   {name}: largest weight {largest:.2f}, gradient {gradient:.4f}", end="")
    print()
print("  With a large K and no division, nearly all the weight is on one key, and the "
      "gradient vanishes.")

print("\n5. Two heads: each uses half of a vector, so that a token can look for two things at once")


def split_heads(x, num_heads):
    """Split (..., T, D) into H heads of K = D / H numbers each: (..., H, T, K)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x):
    """Merge the heads (..., H, T, K) into (..., T, D), the inverse of split_heads."""
    return x.transpose(-3, -2).flatten(-2)


q, k, v = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)  # T = 4 tokens, D = 8 numbers
heads, _ = attention(split_heads(q, 2), split_heads(k, 2), split_heads(v, 2))  # (H, T, K)
first, _ = attention(q[:, :4], k[:, :4], v[:, :4])
second, _ = attention(q[:, 4:], k[:, 4:], v[:, 4:])
same = torch.allclose(merge_heads(heads), torch.cat([first, second], dim=-1))
print(f"  equal to attention computed separately on each half: {same}")

print("\n6. Learned projections: three matrices make a query, key, and value from each vector")


def multi_head_attention(x, memory, projections, num_heads, mask=None):
    """x (..., T, D), memory (..., S, D): x itself, or another sequence (cross-attention)"""
    to_queries, to_keys, to_values, to_output = projections
    queries = split_heads(to_queries(x), num_heads)  # (..., H, T, K)
    keys = split_heads(to_keys(memory), num_heads)  # (..., H, S, K)
    values = split_heads(to_values(memory), num_heads)
    heads, weights = attention(queries, keys, values, mask)  # (..., H, T, K), (..., H, T, S)
    return to_output(merge_heads(heads)), weights  # the last projection mixes the heads


tokens = torch.randn(4, 8)  # (T, D)
nothing = [torch.nn.Identity()] * 4
plain, plain_weights = multi_head_attention(tokens, tokens, nothing, 2)
heads = split_heads(tokens, 2)
expected = merge_heads(attention(heads, heads, heads)[0])
print(f"  without projections, equal to stage 5 on the same tokens: {plain.equal(expected)}")
projections = [torch.nn.Linear(8, 8) for _ in range(4)]  # random here; learned in training
_, weights = multi_head_attention(tokens, tokens, projections, 2)
itself = [w.diagonal(dim1=-2, dim2=-1).mean().item() for w in (plain_weights, weights)]
print(f"  mean weight of a token on itself: {itself[0]:.2f} without projections, because a vector "
      f"usually\n  matches itself best, and {itself[1]:.2f} with random projections")

print("\n7. The batch: the same code with one extra leading dimension")
x, memory = torch.randn(5, 4, 8), torch.randn(5, 3, 8)  # (B, T, D), (B, S, D)
result, weights = multi_head_attention(x, memory, projections, 2)
print(f"  x (B, T, D) = {tuple(x.shape)}, memory (B, S, D) = {tuple(memory.shape)}")
print(f"  result (B, T, D) = {tuple(result.shape)}, weights (B, H, T, S) = {tuple(weights.shape)}")
rows = [multi_head_attention(x[b], memory[b], projections, 2)[0] for b in range(5)]
print("  the batch equals its rows one by one: "
      f"{torch.allclose(result, torch.stack(rows), atol=1e-6)}")
