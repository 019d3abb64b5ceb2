"""
measure.py - what the variations share: replacing a part, training, checks, and scores

A variation builds a model of the base scripts, replaces one part, checks what must hold, and trains
the base and the variation in the same run, with the data and the recipe of decoder_only.py. Import
this file first: it makes the base scripts importable.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base scripts
import housekeeping
from housekeeping import InputError
import torch
from torch import nn
from torch.utils.data import DataLoader

import decoder_only
from decoder_only import BATCH_SIZE, CLIP_NORM, LEARNING_RATE, WARMUP_STEPS
from training import count_parameters  # noqa: F401 (for the variations)
from toy_dataset import DIGITS, WORD_OF, NumberTranslationDataset, collate_fn, exact_match

LONGER = (6, 7, 8)  # digits; the training rows have up to five


def new_model(seed, model_class=decoder_only.DecoderOnlyTransformer, **arguments):
    """Return an untrained base model. The same seed gives the same weights."""
    torch.manual_seed(seed)
    return model_class(**arguments)


def prepare(constants):
    """Check the constants of a variation (its `globals()`) and those of decoder_only.py it uses."""
    return housekeeping.prepare({**vars(decoder_only), **constants})


def replace_attention(model, make, replaces=("MultiHeadAttention",)):
    """Replace each attention module in `model` with `make(name, old)`. Returns the model.

    The new module keeps the attention function. Two variations cannot be combined in this way,
    because each replaces the whole module. replaces: the names of classes that may be replaced.
    """
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if name in ("self_attention", "cross_attention"):
                if type(old).__name__ not in replaces:
                    raise InputError(f"the model already has {type(old).__name__}: to combine two "
                                     "variations of attention, write one class with both")
                new = make(name, old).to(old.w_q.weight)  # the same dtype
                new.attention_function = old.attention_function
                setattr(parent, name, new)
    return model


def loaders(seed, change=None, num_samples=6000, max_digits=5):
    """Return (training, validation) loaders. `change`, if given, replaces each item."""
    dataset = NumberTranslationDataset(num_samples, max_digits, seed)
    items = [change(item) if change else item for item in dataset.items]
    training, validation = ([items[i] for i in part] for part in dataset.split(0.1))
    generator = torch.Generator().manual_seed(seed)
    return (DataLoader(training, BATCH_SIZE, shuffle=True, collate_fn=collate_fn,
                       generator=generator),
            DataLoader(validation, 4 * BATCH_SIZE, collate_fn=collate_fn))


def train(model, num_epochs, seed, script=decoder_only, change=None,
          learning_rate=LEARNING_RATE):
    """Train `model` and return its exact match on held-out sequences."""
    train_loader, val_loader = loaders(seed, change)
    torch.manual_seed(seed)
    optimizer, scheduler = script.create_optimizer(model, learning_rate,
                                                   num_epochs * len(train_loader), WARMUP_STEPS)
    for _ in range(num_epochs):
        script.train_epoch(model, train_loader, optimizer, scheduler, CLIP_NORM)
    return script.evaluate(model, val_loader)["exact_match"]


def evaluate_held_out(model, seed, script=decoder_only, change=None):
    """Return the exact match of `model` on the sequences held out with this seed."""
    return script.evaluate(model, loaders(seed, change)[1])["exact_match"]


def by_length(model, seed, lengths=(2, 3, 4, 5)):
    """Return the exact match of `model` on held-out sequences of each length."""
    examples = decoder_only.evaluate(model, loaders(seed)[1])["examples"]
    right = [[words == answer for digits, words, answer in examples if len(digits) == n]
             for n in lengths]
    return [sum(some) / len(some) for some in right]


def random_sequences(length, count=100, seed=1):
    """Return `count` random sequences of `length` digits and their words."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 10, (count, length), generator=generator).tolist()
    digits = [[DIGITS[i] for i in row] for row in drawn]
    return digits, [[WORD_OF[digit] for digit in row] for row in digits]


def train_and_score(model, num_epochs, seed):
    """Train `model`. Returns its exact match on held-out sequences and on 6, 7, and 8 digits."""
    return [train(model, num_epochs, seed), *scores(model)]


def scores(model, lengths=LONGER):
    """Return the exact match on random sequences of each length."""
    pairs = [random_sequences(length) for length in lengths]
    return [exact_match(decoder_only.translate(model, digits), words) for digits, words in pairs]


def print_row(title, cells):
    """Print a row of a table: percentages, or strings."""
    print(f"  {title:34s}" + "".join(
        f"{cell:>11s}" if isinstance(cell, str) else f"{cell:11.1%}" for cell in cells), flush=True)


def expect(what, difference, limit=1e-10):
    """Print the difference of two results. Raises InputError if it is above `limit`."""
    print(f"  {what:66s} {difference:8.1e}")
    if not difference <= limit:  # NaN fails too
        raise InputError(f"the check failed: {what} (difference {difference:.1e}, limit {limit}). "
                         "Look for a mistake in the part that you changed")


def largest_difference(one, other):
    """Return the largest absolute difference between two tensors."""
    return (one - other).abs().max().item()


@torch.no_grad()
def check_cache(model, what="with and without cache, left padding: rows that differ"):
    """Prove that the cache does not change generated rows. Changes the embedding of `model`."""
    model.embedding.weight.normal_()  # an untrained model would repeat one token
    prompts = [[10, 6, 13, 4], [9, 4], [7, 7, 8, 15, 4]]
    rows = [model.generate(prompts, 12, use_cache=use_cache, stop_at=None)
            for use_cache in (True, False)]
    expect(what, float(sum(one != other for one, other in zip(*rows))), 0.0)


def cache_bytes(model, tokens):
    """Return the bytes of the caches that `generate` makes for one row of `tokens` tokens."""
    caches = [layer.self_attention.new_cache(1, tokens) for layer in model.layers]
    return sum(tensor.numel() * tensor.element_size() for cache in caches
               for tensor in vars(cache).values() if torch.is_tensor(tensor))


class Positions(nn.Module):
    """Takes the place of PositionalEncoding: adds nothing, keeps the positions for the layers."""

    def forward(self, x, positions):
        """x (B, T, D), positions (B, T) -> x"""
        self.positions = positions
        return x
