"""
quick_start.py - train three transformers on one task and compare them

Digits in, words out:   4 0 7  ->  four zero seven

All three models learn from the same sequences. They are scored by exact match: the fraction of
held-out sequences in which every word is correct. The two decoders must also predict <EOS> in the
right place. The models are saved to checkpoints/, where they replace those of earlier runs.

Run it:     python quick_start.py        (about 15 seconds on one CPU core)

The last lines should be close to:

    Result on 601 held-out sequences (passes: how many times a stack of layers runs for 5 digits)
    architecture        parameters   seconds  passes  exact match
    encoder-only           101,786       3.8       1       100.0%
    decoder-only           101,760       3.6       6       100.0%
    encoder-decoder        235,392       5.2       7       100.0%
    The encoder-only model is given the output length, one <MASK> per digit.

The decoder-only model makes 6 passes: one per word and one for <EOS>. The encoder-decoder makes one
more, through its encoder.

WHAT TO READ NEXT   attention_by_hand.py (one query and three keys), tiny_gpt.py (a whole GPT on one
screen), toy_dataset.py (the task), decoder_only.py, encoder_only.py, encoder_decoder.py.
"""
import functools
import time

from housekeeping import prepare, run_script, save_model
import torch

import decoder_only
import encoder_decoder
import encoder_only
from toy_dataset import VOCABULARY, create_dataloaders, print_examples
from training import count_parameters, count_passes

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
D_MODEL = 64             # size of a token's vector, in all three models
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # per stack; the encoder-decoder has two stacks
D_FF = 256               # hidden size of the feed-forward network
DROPOUT = 0.0            # fraction of activations set to 0 in training
NUM_SAMPLES = 6000       # distinct sequences; one in ten is held out
MAX_DIGITS = 5           # longest sequence
BATCH_SIZE = 32          # rows per step
LEARNING_RATE = 3e-3     # its peak
WARMUP_STEPS = 40        # steps in which the learning rate rises to its peak
CLIP_NORM = 1.0          # maximum norm of the gradient
NUM_EPOCHS = 3           # passes over the data, 169 steps each. Try 1: the models differ.
SEED = 0                 # weights and data
DEVICE = "cpu"           # or "cuda", "mps"
# =====================================================================================

ARCHITECTURES = {
    "encoder-only": (encoder_only, encoder_only.EncoderOnlyTransformer, "encoder_only.pt"),
    "decoder-only": (decoder_only, decoder_only.DecoderOnlyTransformer, "decoder_only.pt"),
    "encoder-decoder": (encoder_decoder, encoder_decoder.EncoderDecoderTransformer,
                        "encoder_decoder.pt"),
}


def main():
    device = prepare(globals())
    rows, examples = [], {}
    for name, (script, model_class, file) in ARCHITECTURES.items():
        torch.manual_seed(SEED)
        # With the same seed, every model sees the same sequences in the same order.
        train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
        model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF,
                            DROPOUT).to(device)
        print(f"\n{name}: {len(train_loader.dataset)} training and {len(val_loader.dataset)} "
              "held-out sequences")
        optimizer, scheduler = script.create_optimizer(
            model, LEARNING_RATE, NUM_EPOCHS * len(train_loader), WARMUP_STEPS)
        start = time.perf_counter()
        for epoch in range(1, NUM_EPOCHS + 1):
            loss = script.train_epoch(model, train_loader, optimizer, scheduler, CLIP_NORM)
            result = script.evaluate(model, val_loader)
            print(f"  epoch {epoch}   train loss {loss:.4f}   validation loss {result['loss']:.4f}"
                  f"   exact match {result['exact_match']:6.1%}")
        seconds = time.perf_counter() - start
        save_model(model, file, result["exact_match"], globals())
        examples[name] = result["examples"]
        longest = max((digits for digits, _, _ in result["examples"]), key=len)
        passes = count_passes(model, functools.partial(script.translate, model, [longest]))
        rows.append((name, count_parameters(model), seconds, passes, result["exact_match"]))

    print("\nHeld-out examples, mistakes first")
    for name, shown in examples.items():
        print(f" {name}")
        print_examples(shown)

    print(f"\nResult on {len(examples[name])} held-out sequences (passes: how many times a stack "
          f"of layers runs for {len(longest)} digits)")
    print(f"{'architecture':18s}{'parameters':>12s}{'seconds':>10s}{'passes':>8s}"
          f"{'exact match':>13s}")
    for name, parameters, seconds, passes, exact_match in rows:
        print(f"{name:18s}{parameters:12,d}{seconds:10.1f}{passes:8d}{exact_match:13.1%}")
    print("The encoder-only model is given the output length, one <MASK> per digit.")


if __name__ == "__main__":
    run_script(main)
