"""The task: the vocabulary, the sequences, what is held out, and the batch of every model."""
import random
import zlib

from conftest import finished
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy_dataset
from toy_dataset import (DIGITS, EOS, FIRST_ORDINARY, IGNORE_INDEX, MASK, PAD, SEP, SOS,
                         SPECIAL_TOKENS, UNK, VOCABULARY, WORD_OF, WORDS, NumberTranslationDataset,
                         collate_fn, create_dataloaders, exact_match, is_held_out,
                         make_item, make_sequences, to_device)

digit_rows = st.lists(st.text("0123456789", min_size=1, max_size=8), min_size=1, max_size=6)


def batch_of(*numbers):
    return collate_fn([make_item(list(number)) for number in numbers])


def rows_of(loader):
    return [tuple(digits) for batch in loader for digits in batch["digits"]]


# --- Vocabulary -----------------------------------------------------------------------
def test_the_vocabulary_has_26_tokens_with_special_ids_first():
    assert VOCABULARY.tokens == SPECIAL_TOKENS + DIGITS + WORDS and len(VOCABULARY) == 26
    assert VOCABULARY.encode(SPECIAL_TOKENS) == [PAD, SOS, EOS, UNK, SEP, MASK] == [*range(6)]
    assert FIRST_ORDINARY == 6 and VOCABULARY.encode("4 four <sep>") == [10, 20, UNK]
    assert WORDS == "zero one two three four five six seven eight nine".split()
    assert WORD_OF == dict(zip("0123456789", WORDS))
    assert VOCABULARY.decode(torch.arange(26)) == VOCABULARY.decode(range(26)) == VOCABULARY.tokens


@pytest.mark.parametrize("tokens", [[4, 0, 7], [None], ["4", 0], 4, None])
def test_tokens_that_are_no_strings_are_rejected(tokens):
    with pytest.raises(ValueError, match="cannot be encoded: use strings"):
        VOCABULARY.encode(tokens)


# --- Sequences, and which of them are held out ----------------------------------------
@given(st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_sequences_are_distinct_balanced_and_reproducible(max_digits, data):
    num_samples = data.draw(st.integers(1, min(500, (10 ** (max_digits + 1) - 10) // 9)))
    seed = data.draw(st.integers(0, 99))
    sequences = make_sequences(num_samples, max_digits, seed)
    assert sequences == make_sequences(num_samples, max_digits, seed)
    assert len(sequences) == num_samples == len(set(map(tuple, sequences)))
    counts = [sum(len(s) == n for s in sequences) for n in range(1, max_digits + 1)]
    for length, count in enumerate(counts, 1):  # balanced, or all that exist
        assert count == 10 ** length or count >= max(counts) - 1


def test_sequences_are_shuffled_and_the_split_is_ordered_by_length():
    sequences = make_sequences(600, 4, 0)
    lengths = [len(sequence) for sequence in sequences]
    assert lengths != sorted(lengths) and sequences != make_sequences(600, 4, 1)
    dataset = NumberTranslationDataset(600, 4, 0)
    assert [item["digits"] for item in dataset] == sequences
    for indices in dataset.split(0.2):
        lengths = [len(dataset[i]["digits"]) for i in indices]
        assert lengths == sorted(lengths) and set(lengths) == {1, 2, 3, 4}


def test_training_and_validation_share_no_sequence():
    training, validation = map(rows_of, create_dataloaders(2000, 4, 64, seed=3))
    assert len(training) + len(validation) == 2000 == len({*training, *validation})
    assert len(validation) == pytest.approx(200, abs=40)


@pytest.mark.parametrize("share", [0.1, 0.125, 0.5])
def test_the_checksum_alone_decides_what_is_held_out(share):
    """So no script trains on what another one holds out, unless that holds out a larger share."""
    for text in (f"{number:0{n}d}" for n in (1, 2, 3) for number in range(10 ** n)):
        assert is_held_out(list(text), share) == (zlib.crc32(text.encode()) / 2 ** 32 < share)


# --- Loaders --------------------------------------------------------------------------
def test_loaders_follow_their_arguments():
    loaders = create_dataloaders(700, 3, 30, 4, 0.25)
    dataset = NumberTranslationDataset(700, 3, 4)
    for loader, indices in zip(loaders, dataset.split(0.25)):
        assert list(loader.dataset) == [dataset[i] for i in indices]
        assert loader.generator.initial_seed() == 4
    assert [len(next(iter(loader))["source"]) for loader in loaders] == [30, 4 * 30]
    training, validation = create_dataloaders()
    assert (len(training), len(training.dataset), len(validation.dataset)) == (85, 5399, 601)
    assert len(create_dataloaders(batch_size=5399)[0]) == 1  # all rows in one batch


def test_each_shuffled_epoch_has_another_order_of_the_same_rows():
    """Without drawing from the generators that training uses."""
    before = torch.get_rng_state(), random.getstate()
    training, validation = create_dataloaders(400, 4, 32, 3)
    first, second = rows_of(training), rows_of(training)
    assert first != second and sorted(first) == sorted(second)
    assert len(set(first)) == len(first) == len(training.dataset)
    in_order = [tuple(item["digits"]) for item in validation.dataset]
    assert rows_of(validation) == rows_of(validation) == in_order
    again, other = (rows_of(create_dataloaders(400, 4, 32, seed)[0]) for seed in (3, 2))
    assert again == first and other != first
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("options, words", [
    ({"num_samples": 10.5}, "num_samples=10.5"), ({"num_samples": -1}, "num_samples=-1"),
    ({"batch_size": None}, "batch_size=None"), ({"validation_share": 0}, "validation_share=0"),
    ({"num_samples": 4}, "NUM_SAMPLES=4"),
    ({"num_samples": 111, "max_digits": 2}, "only 110 distinct"),
    ({"num_samples": 10, "max_digits": 1, "batch_size": 1, "validation_share": 1}, "leaves 0")])
def test_data_that_cannot_be_made_is_rejected_by_name(options, words):
    with pytest.raises(ValueError, match=words) as error:
        create_dataloaders(**options)
    assert "use " in str(error.value)


# --- The batch ------------------------------------------------------------------------
def test_an_item_spells_its_digits_and_rejects_others():
    assert make_item("407") == {"digits": "407", "source": [10, 6, 13],
                                "words": ["four", "zero", "seven"], "target": [20, 16, 23]}
    with pytest.raises(ValueError, match="'x' is unknown"):
        make_item(["4", "x"])


def test_the_batch_is_the_one_drawn_in_the_docstring():
    batch, no = batch_of("407", "9"), IGNORE_INDEX
    four, zero, seven, nine = VOCABULARY.encode("four zero seven nine")
    assert batch["source"].tolist() == [[10, 6, 13], [15, PAD, PAD]]
    assert batch["decoder_input"].tolist() == [[SOS, four, zero, seven], [SOS, nine, PAD, PAD]]
    assert batch["labels"].tolist() == [[four, zero, seven, EOS], [nine, EOS, no, no]]
    assert batch["pair"].tolist() == [[10, 6, 13, SEP, four, zero, seven],
                                      [15, SEP, nine, PAD, PAD, PAD, PAD]]
    assert batch["pair_labels"].tolist() == [[no, no, no, four, zero, seven, EOS],
                                             [no, nine, EOS, no, no, no, no]]
    assert (batch["digits"], batch["words"]) == ([["4", "0", "7"], ["9"]],
                                                 [["four", "zero", "seven"], ["nine"]])


@given(digit_rows)
@settings(deadline=None)
def test_labels_are_the_input_shifted_by_one_and_end_in_eos(rows):
    batch = batch_of(*rows)
    for inputs, labels in (("decoder_input", "labels"), ("pair", "pair_labels")):
        assert batch[inputs].shape == batch[labels].shape
        for row, row_labels in zip(batch[inputs].tolist(), batch[labels].tolist()):
            for following, label in zip([*row[1:], PAD], row_labels):
                assert label in (IGNORE_INDEX, EOS if following == PAD else following)
    assert (batch["decoder_input"][:, 0] == SOS).all()


@given(digit_rows)
@settings(deadline=None)
def test_masks_hide_only_padding_and_labels_are_never_pad(rows):
    batch = batch_of(*rows)
    for name, tokens in (("source", "source"), ("decoder", "decoder_input"), ("pair", "pair")):
        mask, ids = batch[f"{name}_mask"], batch[tokens]
        assert mask.dtype == torch.bool and mask.shape == (len(rows), 1, 1, ids.size(1))
        assert torch.equal(mask[:, 0, 0], ids != PAD)
    for labels in (batch["labels"], batch["pair_labels"]):
        assert (labels != PAD).all()
        assert (labels != IGNORE_INDEX).sum(1).tolist() == [len(row) + 1 for row in rows]


def test_to_device_moves_tensors_and_keeps_strings():
    batch = batch_of("40", "7")
    moved = to_device(batch, torch.device("meta"))
    assert moved.keys() == batch.keys() and moved["words"] is batch["words"]
    assert [v.device.type for v in moved.values() if torch.is_tensor(v)] == ["meta"] * 8


# --- Scoring and printing -------------------------------------------------------------
def test_exact_match_is_the_fraction_of_equal_rows():
    assert exact_match([["a"], ["b"], "ab", "a"], [["a"], ["a"], "a", "ab"]) == 1 / 4
    assert exact_match([["a", "b"]] * 3, [["a", "b"]] * 3) == 1.0


def test_printed_tables_show_what_they_are_given(capsys):
    batch = batch_of("40", "7")
    toy_dataset.print_label_table(batch["pair"][1], batch["pair_labels"][1])
    toy_dataset.print_masks(batch, 1)
    toy_dataset.print_attention(torch.tensor([[0.25, 0.75, 0.0]]), ["-> one"], ["4", "0", "7"])
    toy_dataset.print_examples([("4", ["four"], ["five"]), ("7", ["seven"], ["seven"]), "no"], 2)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "  position  input    label    counts toward the loss?",
        "         0  7        -100     no",
        "         1  <SEP>    seven    yes",
        "         2  seven    <EOS>    yes",
        "         3  <PAD>    -100     no",
        "         4  <PAD>    -100     no",
        "          padding   causal    both (&)",
        "  <SOS>   # # .     # . .     # . .",
        "  seven   # # .     # # .     # # .",
        "  <PAD>   # # .     # # #     # # .",
        "                   4       0       7",
        "  -> one        0.25    0.75    0.00",
        "  4  ->  five   WRONG: expected four",
        "  7  ->  seven   correct"]


def test_the_printed_counts_are_those_of_the_loaders():
    lengths = [[len(row) for row in rows_of(loader)] for loader in create_dataloaders()]
    for n in range(1, 6):
        line = f"\n  {n:6d}   {lengths[0].count(n):8d}   {lengths[1].count(n):10d}\n"
        assert line in finished("toy_dataset")[1].stdout
