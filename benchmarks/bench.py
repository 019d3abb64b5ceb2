"""
bench.py - compare the speed of these scripts with torch.nn and Hugging Face's transformers

    python -m pip install -r requirements-dev.txt
    python benchmarks/bench.py            (about 4 minutes on two idle CPU cores)

Everything is measured in this one run, the rivals in turn (A B C, A B C, ...), so that a slow
moment of the machine slows all of them. The numbers are medians; trust the ratios. All rivals have
the same sizes, data, optimizer, and number of threads, and no dropout.

"This collection" computes with PyTorch's fused attention, as train_all.py does. The written-out
formula of the lessons has an entry of its own. That the answers are as good as those of the other
libraries is tested in tests/test_references.py.
"""
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import encoder_decoder
from decoder_only import DecoderOnlyTransformer
from encoder_decoder import EncoderDecoderTransformer
from hugging_face import as_pegasus, cut
from toy_dataset import EOS, PAD, SOS, VOCABULARY, create_dataloaders
from training import create_optimizer, use_fused_attention

V = len(VOCABULARY)
OURS, FORMULA = "this collection", "written-out formula"


def in_turn(rounds, **rivals):
    """Run each rival once to warm up, then `rounds` times in turn. Returns median seconds."""
    seconds = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def report(title, seconds):
    print(f"\n{title}")
    for name, median in seconds.items():
        print(f"    {name:32s}{1000 * median:10.2f} ms   {median / seconds[OURS]:6.2f} times ours")


class TorchModel(nn.Module):
    """The decoder-only model in torch.nn: TransformerEncoder under a causal mask, tied output."""

    def __init__(self, d_model, num_heads, num_layers, max_len):
        super().__init__()
        self.embedding = nn.Embedding(V, d_model)
        self.positions = nn.Embedding(max_len, d_model)
        layer = nn.TransformerEncoderLayer(d_model, num_heads, 4 * d_model, dropout=0.0,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(d_model),
                                            enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(max_len))

    def forward(self, tokens):
        length = tokens.size(1)
        x = self.embedding(tokens) + self.positions.weight[:length]
        x = self.layers(x, mask=self.mask[:length, :length], is_causal=True)
        return x @ self.embedding.weight.T


def gpt2(d_model, num_heads, num_layers, max_len):
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=max_len, n_embd=d_model, n_layer=num_layers, n_head=num_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=SOS, eos_token_id=EOS,
        pad_token_id=PAD))


def training_step(model, forward, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        loss = F.cross_entropy(forward(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def training(d_model, num_heads, num_layers, batch, length, rounds):
    tokens = torch.randint(6, V, (batch, length))
    formula = DecoderOnlyTransformer(V, d_model, num_heads, num_layers, 4 * d_model, max_len=length)
    ours = use_fused_attention(copy.deepcopy(formula))
    theirs = TorchModel(d_model, num_heads, num_layers, length)
    hugging_face = gpt2(d_model, num_heads, num_layers, length)
    report(f"Training step, d {d_model}, {num_layers} layers, {batch} x {length} tokens, "
           "AdamW and clipping included",
           in_turn(rounds, **{
               OURS: training_step(ours, ours, tokens),
               FORMULA: training_step(formula, formula, tokens),
               "torch.nn.TransformerEncoder": training_step(theirs, theirs, tokens),
               "Hugging Face GPT-2": training_step(
                   hugging_face, lambda t: hugging_face(t).logits, tokens)}))


def generation(d_model, num_heads, num_layers, lengths, rounds):
    max_len = max(lengths) + 4
    formula = DecoderOnlyTransformer(V, d_model, num_heads, num_layers, 4 * d_model,
                                     max_len=max_len).eval()
    ours = use_fused_attention(copy.deepcopy(formula))
    hugging_face = gpt2(d_model, num_heads, num_layers, max_len).eval()
    hugging_face.generation_config.eos_token_id = None  # all generate the full length
    prompt = VOCABULARY.encode("4 0 7 <SEP>")
    ids, ones = torch.tensor([prompt]), torch.ones(1, 4, dtype=torch.long)
    for n in lengths:
        def run(model, n=n):
            return model.generate([prompt], n, stop_at=None)

        def run_theirs(n=n):
            return hugging_face.generate(ids, attention_mask=ones, max_new_tokens=n,
                                         do_sample=False)
        report(f"Greedy generation with cache, d {d_model}, {num_layers} layers, {n} tokens",
               in_turn(rounds, **{
                   OURS: lambda run=run: run(ours), FORMULA: lambda run=run: run(formula),
                   "Hugging Face GPT-2": run_theirs}))


def beam_search(steps, rounds, width=5, batch=16, max_digits=10, max_new_tokens=16):
    """On an undertrained model: with a trained one, every search finds the same at once."""
    torch.manual_seed(0)
    train_loader, val_loader = create_dataloaders(16000, max_digits, 64, 0)
    ours = use_fused_attention(EncoderDecoderTransformer(V, 128, 4, 3, 512))
    optimizer, scheduler = create_optimizer(ours, 1e-3, 200, 40)
    batches = iter(train_loader)
    for _ in range(steps):
        loss = encoder_decoder.compute_loss(ours, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    ours.eval()
    theirs = as_pegasus(ours)
    rows = next(iter(val_loader))
    source, mask = rows["source"][:batch], rows["source_mask"][:batch, 0, 0]
    sources = [[i for i in ids if i != PAD] for ids in source.tolist()]
    found = {}

    def hugging_face():
        found["theirs"] = theirs.generate(
            source, attention_mask=mask.long(), num_beams=width, length_penalty=1.0,
            early_stopping="never", max_new_tokens=max_new_tokens, do_sample=False)

    def this_collection():
        found["ours"] = ours.beam_search(sources, width, 1.0, max_new_tokens)

    report(f"Beam search, width {width}, batch of {batch}, d 128, 3 layers, after {steps} training "
           "steps",
           in_turn(rounds, **{OURS: this_collection, "Hugging Face Pegasus": hugging_face}))
    best = [cut(row) for row in found["theirs"].tolist()]
    same = sum(a[0].tokens == b for a, b in zip(found["ours"], best))
    greedy = ours.generate(sources, max_new_tokens)
    print(f"    same best sequence in {same} of {batch}; greedy finds it in "
          f"{sum(a[0].tokens == b for a, b in zip(found['ours'], greedy))}")


def main():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads")
    training(128, 4, 3, 64, 12, rounds=80)
    training(384, 6, 6, 8, 256, rounds=7)
    generation(128, 4, 3, (64, 256, 512), rounds=7)
    generation(384, 6, 6, (64, 256, 512), rounds=3)
    for steps in (60, 120):
        beam_search(steps, rounds=9)


if __name__ == "__main__":
    main()
