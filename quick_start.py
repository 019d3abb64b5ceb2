"""
quick_start.py - three transformers, trained in front of you, on one task

Digits in, words out:   4 0 7  ->  four zero seven

All three learn from the same sequences and are measured on the same others, which none of them has seen: the share that
comes out right from first to last word, written freely, the stop included.

Run it:     python quick_start.py        (about 15 seconds on one CPU core)

The last lines should be close to:

    Result on 599 unseen sequences. Passes: through a stack of layers, to translate 5 digits
    architecture        parameters   seconds  passes  exact match
    encoder-only           101,786       3.8       1       100.0%
    decoder-only           101,760       3.6       6       100.0%
    encoder-decoder        235,392       5.2       7        99.8%
    The encoder-only model is told how many words to write, one blank a digit; the other two decide to stop.

WHAT TO READ NEXT   toy_dataset.py (the task), then encoder_only.py, decoder_only.py or encoder_decoder.py: each stands
alone, from attention to the trained model.
"""
import time

import torch

import decoder_only
import encoder_decoder
import encoder_only
from toy_dataset import (CHECKPOINTS, VOCABULARY, check_constants, choose_device, create_dataloaders, print_examples,
                         report_saved, run_script)

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
D_MODEL = 64             # width of a token's vector, in all three. Try 32: smaller and faster; still right?
NUM_HEADS = 4            # must divide D_MODEL
NUM_LAYERS = 2           # the encoder-decoder has as many in each of its two stacks
D_FF = 256               # inner width of the feed-forward
DROPOUT = 0.0            # share of activations set to 0 in training. Try 0.1: who still learns in so few steps?
NUM_SAMPLES = 6000       # distinct sequences; one in ten is held out. Try 600: who gets by with little data?
MAX_DIGITS = 5           # longest sequence
BATCH_SIZE = 32          # rows per step. Small batches make many steps of little data
LEARNING_RATE = 3e-3     # peak, after a short warm-up
NUM_EPOCHS = 3           # passes over the data, 169 steps each. Try 1: here they differ.
SEED = 0                 # Try 1.
NUM_EXAMPLES = 4         # shown for each architecture, the mistakes first
DEVICE = "cpu"           # or "cuda", "mps"
NUM_THREADS = 1          # CPU threads
# =====================================================================================

ARCHITECTURES = {
    "encoder-only": (encoder_only, encoder_only.EncoderOnlyTransformer, "encoder_only.pt"),
    "decoder-only": (decoder_only, decoder_only.DecoderOnlyTransformer, "decoder_only.pt"),
    "encoder-decoder": (encoder_decoder, encoder_decoder.EncoderDecoderTransformer, "encoder_decoder.pt"),
}


def count_passes(model, script, sequences):
    """How often `script.translate` runs `model`'s layers for these sequences: measured, by counting the calls."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    # The last norm of a stack runs once in every pass through that stack. The encoder-decoder has two stacks.
    norms = [model.final_norm] + ([model.encoder_norm] if hasattr(model, "encoder_norm") else [])
    handles = [norm.register_forward_hook(count) for norm in norms]
    script.translate(model, sequences)
    for handle in handles:
        handle.remove()
    return calls


def main():
    check_constants(globals())
    torch.set_num_threads(NUM_THREADS)
    device = choose_device(DEVICE)
    rows, examples = [], {}
    for name, (script, model_class, file) in ARCHITECTURES.items():
        torch.manual_seed(SEED)
        # Built anew for each from the same seed: the same sequences, and the batches in the same order.
        train_loader, val_loader = create_dataloaders(NUM_SAMPLES, MAX_DIGITS, BATCH_SIZE, SEED)
        model = model_class(len(VOCABULARY), D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF, DROPOUT,
                            max_len=max(64, 2 * MAX_DIGITS + 3)).to(device)
        print(f"\n{name}: {len(train_loader.dataset)} sequences to train on, {len(val_loader.dataset)} unseen ones")
        optimizer, scheduler = script.create_optimizer(model, LEARNING_RATE, NUM_EPOCHS * len(train_loader))
        start = time.perf_counter()
        for epoch in range(1, NUM_EPOCHS + 1):
            loss = script.train_epoch(model, train_loader, optimizer, scheduler)
            result = script.evaluate(model, val_loader)
            print(f"  epoch {epoch}   train loss {loss:.4f}   validation loss {result['loss']:.4f}   "
                  f"exact match {result['exact_match']:6.1%}")
        seconds = time.perf_counter() - start
        longest = max((digits for digits, _, _ in result["examples"]), key=len)
        rows.append((name, sum(p.numel() for p in model.parameters()), seconds,
                     count_passes(model, script, [longest]), result["exact_match"]))
        examples[name] = result["examples"]
        report_saved(model, CHECKPOINTS / file)

    print("\nExamples that none of them has seen in training, mistakes first")
    for name, shown in examples.items():
        print(f" {name}")
        print_examples(shown, NUM_EXAMPLES)

    print(f"\nResult on {len(examples[name])} unseen sequences. Passes: through a stack of layers, to translate "
          f"{len(longest)} digits")
    print(f"{'architecture':18s}{'parameters':>12s}{'seconds':>10s}{'passes':>8s}{'exact match':>13s}")
    for name, parameters, seconds, passes, exact_match in rows:
        print(f"{name:18s}{parameters:12,d}{seconds:10.1f}{passes:8d}{exact_match:13.1%}")
    print("The encoder-only model is told how many words to write, one blank a digit; the other two decide to stop.")


if __name__ == "__main__":
    run_script(main)
