"""
bench.py - how fast are these scripts, beside torch.nn and Hugging Face's transformers?

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/bench.py            (about 2 minutes on two idle CPU cores)

Everything is measured in this one run, the rivals in turn (A B C, A B C, ...), so that a machine that slows down slows
all of them. Quoted are medians; what to trust are the ratios. Same sizes, same weights where weights matter, same data,
same optimiser, same number of threads, no dropout.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PegasusConfig, PegasusForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import encoder_decoder
from decoder_only import DecoderOnlyTransformer, causal_mask
from encoder_decoder import EncoderDecoderTransformer
from toy_dataset import EOS, PAD, SOS, VOCABULARY, create_dataloaders

V = len(VOCABULARY)


def in_turn(rounds, **rivals):
    """Run each of `rivals` (functions without arguments) once to warm up, then `rounds` times in turn: median seconds."""
    seconds = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def report(title, seconds, ours="this collection"):
    print(f"{title}")
    for name, median in seconds.items():
        print(f"    {name:34s}{1000 * median:10.2f} ms   {seconds[ours] / median:6.2f}  (this collection's time / its time)")


class TorchModel(nn.Module):
    """The decoder-only model as one would write it with torch.nn: TransformerEncoder under a causal mask, tied output."""

    def __init__(self, d_model, num_heads, num_layers, max_len):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(V, d_model), nn.Embedding(max_len, d_model)
        layer = nn.TransformerEncoderLayer(d_model, num_heads, 4 * d_model, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(max_len))

    def forward(self, tokens):
        length = tokens.size(1)
        x = self.embedding(tokens) + self.positions.weight[:length]
        return self.layers(x, mask=self.mask[:length, :length], is_causal=True) @ self.embedding.weight.T


def gpt2(d_model, num_heads, num_layers, max_len):
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=max_len, n_embd=d_model, n_layer=num_layers, n_head=num_heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=SOS, eos_token_id=EOS, pad_token_id=PAD))


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
    ours = DecoderOnlyTransformer(V, d_model, num_heads, num_layers, 4 * d_model, max_len=length)
    theirs = TorchModel(d_model, num_heads, num_layers, length)
    hugging_face = gpt2(d_model, num_heads, num_layers, length)
    report(f"\nTraining step, d {d_model}, {num_layers} layers, {batch} x {length} tokens, AdamW and clipping included",
           in_turn(rounds, **{"this collection": training_step(ours, ours, tokens),
                              "torch.nn.TransformerEncoder": training_step(theirs, theirs, tokens),
                              "Hugging Face GPT-2": training_step(hugging_face, lambda t: hugging_face(t).logits, tokens)}))


def generation(d_model, num_heads, num_layers, lengths, rounds):
    ours = DecoderOnlyTransformer(V, d_model, num_heads, num_layers, 4 * d_model, max_len=max(lengths) + 4).eval()
    hugging_face = gpt2(d_model, num_heads, num_layers, max(lengths) + 4).eval()
    hugging_face.generation_config.eos_token_id = None  # both write the full length
    prompt = VOCABULARY.encode("4 0 7 <SEP>")
    ids, ones = torch.tensor([prompt]), torch.ones(1, 4, dtype=torch.long)
    medians = {}
    for length in lengths:
        medians[length] = in_turn(rounds, **{
            "this collection": lambda n=length: ours.generate([prompt], n, stop_at=None),
            "Hugging Face GPT-2": lambda n=length: hugging_face.generate(ids, attention_mask=ones, max_new_tokens=n,
                                                                         do_sample=False)})
        report(f"\nGreedy generation with cache, d {d_model}, {num_layers} layers, {length} tokens", medians[length])
        print(f"    speed against Hugging Face: "
              f"{medians[length]['Hugging Face GPT-2'] / medians[length]['this collection']:.2f} times")
    return {length: median["this collection"] for length, median in medians.items()}


def growth(cached, d_model, num_heads, num_layers):
    """cached: {length: seconds with cache}; the same without, and how both grow."""
    ours = DecoderOnlyTransformer(V, d_model, num_heads, num_layers, 4 * d_model, max_len=max(cached) + 4).eval()
    prompt = VOCABULARY.encode("4 0 7 <SEP>")
    print(f"\nHow the time grows, d {d_model}, {num_layers} layers (seconds, and times the shortest)")
    print("    tokens   with cache            without cache")
    shortest = min(cached)
    plain = {}
    for length, seconds in cached.items():
        plain[length] = in_turn(1, it=lambda n=length: ours.generate([prompt], n, use_cache=False, stop_at=None))["it"]
        print(f"    {length:6d}   {seconds:8.3f}   {seconds / cached[shortest]:6.1f}   "
              f"{plain[length]:10.3f}   {plain[length] / plain[shortest]:6.1f}")


def as_pegasus(model):
    """Hugging Face's Pegasus is built like encoder_decoder.py (pre-norm, sinusoids, tied): with our weights in it, the
    same function."""
    a = model.arguments
    theirs = PegasusForConditionalGeneration(PegasusConfig(
        vocab_size=V, d_model=a["d_model"], max_position_embeddings=a["max_len"], encoder_layers=a["num_layers"],
        decoder_layers=a["num_layers"], encoder_attention_heads=a["num_heads"], decoder_attention_heads=a["num_heads"],
        encoder_ffn_dim=a["d_ff"], decoder_ffn_dim=a["d_ff"], activation_function="gelu", dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, scale_embedding=True, pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=SOS, bos_token_id=SOS, forced_eos_token_id=None, tie_word_embeddings=True)).eval()

    def attention(mine, other):
        for name, layer in (("q_proj", mine.w_q), ("k_proj", mine.w_k), ("v_proj", mine.w_v), ("out_proj", mine.w_o)):
            getattr(other, name).load_state_dict(layer.state_dict())

    with torch.no_grad():
        theirs.model.shared.weight.copy_(model.embedding.weight)
        theirs.lm_head.weight.copy_(model.embedding.weight)
        for stack, layers, norm in ((theirs.model.encoder, model.encoder_layers, model.encoder_norm),
                                    (theirs.model.decoder, model.decoder_layers, model.final_norm)):
            stack.embed_positions.weight.copy_(model.positional_encoding.table)
            stack.layer_norm.load_state_dict(norm.state_dict())
            for mine, other in zip(layers, stack.layers):
                attention(mine.attention if stack is theirs.model.encoder else mine.self_attention, other.self_attn)
                other.self_attn_layer_norm.load_state_dict(mine.norm1.state_dict())
                other.fc1.load_state_dict(mine.feed_forward.widen.state_dict())
                other.fc2.load_state_dict(mine.feed_forward.narrow.state_dict())
                other.final_layer_norm.load_state_dict(mine.norm2.state_dict())
                if stack is theirs.model.decoder:
                    attention(mine.cross_attention, other.encoder_attn)
                    other.encoder_attn_layer_norm.load_state_dict(mine.norm_cross.state_dict())
    return theirs


def beam_search(steps, rounds, width=5, batch=16, max_digits=10, max_new_tokens=16):
    """On a half-trained model: a trained one is so sure that every search finds the same at once."""
    torch.manual_seed(0)
    train_loader, val_loader = create_dataloaders(16000, max_digits, 64, 0)
    ours = EncoderDecoderTransformer(V, 128, 4, 3, 512)
    optimizer, scheduler = encoder_decoder.create_optimizer(ours, 1e-3, 200)
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
    source, mask, sources = rows["source"][:batch], rows["source_mask"][:batch, 0, 0], []
    for ids in source.tolist():
        sources.append([i for i in ids if i != PAD])
    with torch.no_grad():
        mine = ours(source, rows["decoder_input"][:batch])
        other = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=rows["decoder_input"][:batch]).logits
    print(f"\nBeam search, width {width}, batch of {batch}, d 128, 3 layers, after {steps} training steps; "
          f"largest difference of logits with the same weights {(mine - other).abs().max():.1e}")
    found = {}

    def hugging_face():
        found["theirs"] = theirs.generate(source, attention_mask=mask.long(), num_beams=width, length_penalty=1.0,
                                          early_stopping="never", max_new_tokens=max_new_tokens, do_sample=False)

    def this_collection():
        found["ours"] = ours.beam_search(sources, width, 1.0, max_new_tokens)

    report("", in_turn(rounds, **{"this collection": this_collection, "Hugging Face (Pegasus, our weights)": hugging_face}))
    # Hugging Face starts rows with <SOS> and fills them up behind their <EOS>.
    best = [row[1:row.index(EOS) + 1] if EOS in row else row[1:] for row in found["theirs"].tolist()]
    greedy = ours.generate(sources, max_new_tokens)
    print(f"    same best sequence in {sum(a[0].tokens == b for a, b in zip(found['ours'], best))} of {batch}; "
          f"greedy finds it in {sum(a[0].tokens == b for a, b in zip(found['ours'], greedy))}")


def main():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    assert causal_mask(2, 2).tolist() == [[[[True, False], [True, True]]]]  # ours is causal too: the rivals do equal work
    training(128, 4, 3, 64, 12, rounds=80)
    training(384, 6, 6, 8, 256, rounds=7)
    cached = generation(128, 4, 3, (64, 256, 512), rounds=7)
    generation(384, 6, 6, (64, 256, 512), rounds=3)
    growth(cached, 128, 4, 3)
    for steps in (60, 120):
        beam_search(steps, rounds=9)


if __name__ == "__main__":
    main()
