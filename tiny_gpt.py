"""
tiny_gpt.py - a GPT in 90 lines: data, attention, model, training, generation, and evaluation. It
learns to continue `4 0 7 =` with `four zero seven .`   Run it: python tiny_gpt.py  (10 seconds)
It ends with `exact match on 511 held-out numbers: 100.0%`. Read attention_by_hand.py first.
"""
import random
import torch
import torch.nn.functional as F
from torch import nn

SEED, STEPS, ROWS, D, HEADS, LAYERS = 0, 700, 64, 64, 4, 2  # each token is a vector of D numbers
random.seed(SEED)
torch.manual_seed(SEED)
torch.set_num_threads(1)  # at this size, more threads gain little

# The data: all rows of 1 to 5 digits, shuffled. The first tenth of each length is held out.
WORDS = "zero one two three four five six seven eight nine".split()
TOKENS = [".", "=", *"0123456789", *WORDS]
NUMBERS = [random.sample([f"{i:0{n}d}" for i in range(10 ** n)], 10 ** n) for n in range(1, 6)]

def encode(number):  # "407" -> the token ids of 4 0 7 = four zero seven .
    return [TOKENS.index(t) for t in [*number, "=", *(WORDS[int(digit)] for digit in number), "."]]

# The model, for B rows of T tokens. HEADS heads run in parallel, on vectors of K = D / HEADS.
def attention(q, k, v):  # (B, HEADS, T, K) each: compare queries with keys, average values
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, HEADS, T, T): q . k / sqrt(K)
    causal = torch.ones_like(scores, dtype=torch.bool).tril()  # no attention to later tokens
    weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)  # each row sums to 1
    return weights @ v  # (B, HEADS, T, K): weighted averages of the values

class Block(nn.Module):  # attention fetches from other tokens, the MLP computes with what it got
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)  # per token: mean 0, variance 1
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def self_attention(self, x):
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))  # (B, T, HEADS, K) -> (B, HEADS, T, K)
        return self.o(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, T, D)

    def forward(self, x):
        x = x + self.self_attention(self.norm1(x))  # adding (a residual) keeps what was there
        return x + self.mlp(self.norm2(x))  # each token on its own; GELU is a smooth max(0, x)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(len(TOKENS), D))  # input and output table
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(D)

    def forward(self, tokens):  # (B, T) -> (B, T, 22): a score for each possible next token
        # Attention ignores order, so each position adds a vector of its own: clock hands of many
        # speeds. Without the factor D ** 0.5, tokens of size 0.02 would hardly count next to it.
        speeds = 10000.0 ** (-torch.arange(0, D, 2) / D)  # (D / 2,): how fast each angle turns
        angles = torch.arange(tokens.size(1))[:, None] * speeds  # (T, D / 2): one clock hand each
        positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (T, D)
        x = self.blocks(self.embedding[tokens] * D ** 0.5 + positions)  # (B, T, D)
        return self.norm(x) @ self.embedding.T  # (B, T, 22): scores; the 0.02 makes them small

@torch.no_grad()
def generate(model, tokens, count):  # append the most likely next token, `count` times
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens

model = GPT()
optimizer = torch.optim.AdamW(model.parameters())  # gradient descent, with a step size per weight
for step in range(1, STEPS + 1):
    optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 40) * (1 - step / STEPS)  # warmup, decay
    numbers = random.choice(NUMBERS)  # one length per step, so that no row needs padding
    batch = random.choices(numbers[len(numbers) // 10:], k=ROWS)
    rows, n = torch.tensor([encode(number) for number in batch]), len(batch[0])
    logits = model(rows[:, :-1])[:, n:]  # its scores at `= four zero seven`
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, n + 1:].flatten())  # four zero seven .
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}   loss {loss.item():.4f}")

correct = []
for n, numbers in enumerate(NUMBERS, 1):
    rows = torch.tensor([encode(number) for number in numbers[:len(numbers) // 10][:200]])
    answers = generate(model, rows[:, :n + 1], n + 1)  # given `4 0 7 =`, write n words and `.`
    correct += (answers == rows).all(1).tolist()
    print(" ".join(TOKENS[i] for i in answers[0].tolist()))
print(f"exact match on {len(correct)} held-out numbers: {sum(correct) / len(correct):.1%}")
