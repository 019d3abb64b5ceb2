"""The task: the inputs and labels of every model."""

import inspect
import math
import random
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MODELS, SCRIPTS
from toy_dataset import (
    EOS,
    FIRST_ORDINARY,
    IGNORE_INDEX,
    MASK,
    PAD,
    SEP,
    SOS,
    SPECIAL_TOKENS,
    UNK,
    VOCABULARY,
    WORD_OF,
    NumberTranslationDataset,
    collate_fn,
    count_distinct,
    create_dataloaders,
    exact_match,
    is_held_out,
    make_item,
    make_sequences,
    to_device,
)

digit_rows = st.lists(
    st.lists(st.sampled_from("0123456789"), min_size=1, max_size=8), min_size=1, max_size=6
)


def items_for(rows):
    items = []
    for digits in rows:
        words = [WORD_OF[digit] for digit in digits]
        items.append(
            {
                "digits": digits,
                "words": words,
                "source": VOCABULARY.encode(digits),
                "target": VOCABULARY.encode(words),
            }
        )
    return items


def test_the_vocabulary_has_26_tokens_with_special_ids_first():
    assert len(VOCABULARY) == 26 == len(set(VOCABULARY.tokens))
    assert (
        [VOCABULARY.ids[token] for token in SPECIAL_TOKENS]
        == [PAD, SOS, EOS, UNK, SEP, MASK]
        == list(range(6))
    )
    assert FIRST_ORDINARY == 6


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=("Z", "C")), min_size=1)))
def test_any_text_encodes_with_unknown_tokens_as_unk(tokens):
    ids = VOCABULARY.encode(tokens)
    assert all(
        (i == VOCABULARY.ids[t]) if t in VOCABULARY.ids else (i == UNK) for i, t in zip(ids, tokens)
    )
    assert VOCABULARY.encode(" ".join(tokens)) == ids


@given(st.lists(st.integers(0, 25)))
def test_decoding_inverts_encoding(ids):
    assert VOCABULARY.encode(VOCABULARY.decode(ids)) == ids
    assert VOCABULARY.decode(torch.tensor(ids, dtype=torch.long)) == VOCABULARY.decode(ids)


@given(st.integers().filter(lambda i: not 0 <= i < 26) | st.sampled_from([-1, 26]))
def test_an_id_outside_the_vocabulary_is_rejected(i):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        VOCABULARY.decode([i])


@given(st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_sequences_are_distinct_balanced_and_reproducible(max_digits, data):
    num_samples = data.draw(st.integers(1, min(500, count_distinct(max_digits))))
    seed = data.draw(st.integers(0, 99))
    sequences = make_sequences(num_samples, max_digits, seed)
    assert sequences == make_sequences(num_samples, max_digits, seed)
    assert len(sequences) == num_samples == len({tuple(s) for s in sequences})
    counts = [sum(len(s) == n for s in sequences) for n in range(1, max_digits + 1)]
    for length, count in enumerate(counts, 1):  # balanced, or all that exist
        assert count == 10**length or count >= max(counts) - 1


def test_every_distinct_sequence_can_be_requested_but_no_more():
    assert len(make_sequences(110, 2, 0)) == 110
    with pytest.raises(ValueError, match="110"):
        make_sequences(111, 2, 0)


def test_training_and_validation_share_no_sequence():
    train_loader, val_loader = create_dataloaders(2000, 4, 64, seed=3)
    rows = [
        [tuple(digits) for batch in loader for digits in batch["digits"]]
        for loader in (train_loader, val_loader)
    ]
    assert len(rows[0]) + len(rows[1]) == 2000
    assert not set(rows[0]) & set(rows[1])
    assert len(rows[1]) == pytest.approx(200, abs=40)


@given(digit_rows, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
@settings(deadline=None)
def test_held_out_sets_depend_on_the_digits_and_are_nested(rows, one, other):
    for digits in rows:
        held_out = is_held_out(digits, min(one, other))
        assert held_out == is_held_out(list(digits), min(one, other))
        assert is_held_out(digits, max(one, other)) or not held_out


def test_the_checksum_alone_decides_what_is_held_out():
    for length in (1, 2, 3):
        for number in range(10**length):
            text = f"{number:0{length}d}"
            for share in (0.1, 0.125, 0.5):
                expected = zlib.crc32(text.encode()) / 2**32 < share
                assert is_held_out(list(text), share) == expected


def test_no_script_trains_on_what_another_one_holds_out():
    small, large = (
        create_dataloaders(2000, 4, 64, 3, 0.1),
        create_dataloaders(5000, 5, 32, 7, 0.125),
    )
    held_out = {tuple(item["digits"]) for item in small[1].dataset}
    assert held_out and not held_out & {tuple(item["digits"]) for item in large[0].dataset}


def test_loading_data_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    for loader in create_dataloaders(500, 3, 32, seed=1):
        for _ in loader:
            pass
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_batches_are_reproducible_and_depend_on_the_seed():
    first, again, other = (
        next(iter(create_dataloaders(500, 3, 32, seed)[0]))["pair"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_items_are_tokenized_only_once():
    dataset = NumberTranslationDataset(50, 3, 0)
    assert dataset[7] is dataset[7]


@given(digit_rows)
@settings(deadline=None)
def test_eos_follows_the_last_word_and_padding_follows_eos(rows):
    batch = collate_fn(items_for(rows))
    for i, digits in enumerate(rows):
        n = len(digits)
        words = VOCABULARY.encode([WORD_OF[d] for d in digits])
        assert batch["labels"][i].tolist() == words + [EOS] + [IGNORE_INDEX] * (
            batch["labels"].size(1) - n - 1
        )
        expected = [IGNORE_INDEX] * n + words + [EOS]
        assert batch["pair_labels"][i].tolist() == expected + [IGNORE_INDEX] * (
            batch["pair"].size(1) - 2 * n - 1
        )


@given(digit_rows)
@settings(deadline=None)
def test_labels_are_the_input_shifted_by_exactly_one(rows):
    batch = collate_fn(items_for(rows))
    for inputs, labels in (
        (batch["decoder_input"], batch["labels"]),
        (batch["pair"], batch["pair_labels"]),
    ):
        assert inputs.shape == labels.shape
        for row_in, row_out in zip(inputs.tolist(), labels.tolist()):
            for following, label in zip(row_in[1:], row_out):
                if label != IGNORE_INDEX:
                    assert label == (following if following != PAD else EOS)
    assert (batch["decoder_input"][:, 0] == SOS).all()


@given(digit_rows)
@settings(deadline=None)
def test_masks_hide_only_padding_and_labels_are_never_pad(rows):
    batch = collate_fn(items_for(rows))
    for name in ("source", "decoder", "pair"):
        tokens = batch["decoder_input" if name == "decoder" else name]
        mask = batch[f"{name}_mask"]
        assert mask.dtype == torch.bool and mask.shape == (len(rows), 1, 1, tokens.size(1))
        assert torch.equal(mask[:, 0, 0], tokens != PAD)
        for row in tokens.tolist():  # padding on the right only
            assert PAD not in row[: sum(token != PAD for token in row)]
    for labels in (batch["labels"], batch["pair_labels"]):
        assert not (labels == PAD).any()
        assert (labels != IGNORE_INDEX).sum() == sum(len(row) + 1 for row in rows)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(batch_size=5000, num_samples=500), "BATCH_SIZE=5000"),
        (dict(num_samples=4), "NUM_SAMPLES=4"),
        (dict(num_samples=10**6, max_digits=3), "NUM_SAMPLES=1000000"),
    ],
)
def test_data_that_cannot_be_made_is_rejected_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        create_dataloaders(**options)


def test_sequences_are_shuffled_and_the_split_is_ordered_by_length():
    sequences = make_sequences(600, 4, 0)
    lengths = [len(sequence) for sequence in sequences]
    assert lengths != sorted(lengths)
    dataset = NumberTranslationDataset(600, 4, 0)
    assert [item["digits"] for item in dataset.items] == sequences
    for indices in dataset.split(0.2):
        lengths = [len(dataset.items[i]["digits"]) for i in indices]
        assert lengths == sorted(lengths) and set(lengths) == {1, 2, 3, 4}


def test_to_device_moves_tensors_and_keeps_strings():
    batch = collate_fn(NumberTranslationDataset(5, 2, 0).items)
    moved = to_device(batch, torch.device("meta"))
    assert moved.keys() == batch.keys() and moved["words"] is batch["words"]
    assert all(v.device.type == "meta" for v in moved.values() if torch.is_tensor(v))
    assert sum(torch.is_tensor(v) for v in moved.values()) == 8


def test_loaders_follow_their_arguments():
    train_loader, val_loader = create_dataloaders(700, 3, 30, 4, 0.25)
    dataset = NumberTranslationDataset(700, 3, 4)
    training, validation = dataset.split(0.25)
    assert list(train_loader.dataset) == [dataset[i] for i in training]
    assert list(val_loader.dataset) == [dataset[i] for i in validation]
    assert len(next(iter(train_loader))["source"]) == 30
    assert len(next(iter(val_loader))["source"]) == 4 * 30  # no gradients, so it fits into memory
    again, other = (create_dataloaders(700, 3, 30, seed, 0.25) for seed in (4, 5))
    for loader, same in ((train_loader, again[0]), (val_loader, again[1])):
        assert loader.generator.initial_seed() == same.generator.initial_seed() == 4
    assert other[0].generator.initial_seed() == 5
    assert [item["digits"] for item in other[0].dataset] != [
        item["digits"] for item in train_loader.dataset
    ]


def test_a_batch_may_hold_all_training_rows_but_no_more():
    size = len(create_dataloaders(200, 3, 1, 0)[0].dataset)
    assert len(create_dataloaders(200, 3, size, 0)[0]) == 1
    with pytest.raises(ValueError, match=f"BATCH_SIZE={size + 1}"):
        create_dataloaders(200, 3, size + 1, 0)


@pytest.mark.parametrize("share", [0.001, 0.99])
def test_a_split_with_an_empty_side_is_rejected(share):
    with pytest.raises(ValueError, match="leaves"):
        create_dataloaders(10, 1, 1, 0, share)


def test_exact_match_is_the_fraction_of_equal_rows():
    assert exact_match([["a"], ["b"], ["a", "b"]], [["a"], ["a"], ["a"]]) == pytest.approx(1 / 3)
    assert exact_match([["a"]], [["a"]]) == 1.0


def test_defaults_are_the_documented_ones():
    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    data = {"num_samples": 6000, "max_digits": 5, "seed": 0}
    assert defaults(NumberTranslationDataset.__init__) == data
    assert defaults(create_dataloaders) == {**data, "batch_size": 64, "validation_share": 0.1}
    sizes = {"vocab_size": 26, "d_model": 64, "num_heads": 4, "num_layers": 2, "d_ff": 256,
             "dropout": 0.0, "max_len": 64}  # fmt: skip
    choices = {"temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
    for name, script in SCRIPTS.items():
        assert defaults(MODELS[name].__init__) == sizes
        assert defaults(MODELS[name].load) == {"device": "cpu"}
        assert defaults(script.attention) == {"mask": None, "dropout": 0.0}
        assert defaults(script.lr_factor) == {"final_factor": 0.05}
        assert defaults(script.create_optimizer) == {"weight_decay": 0.01}
        if name != "encoder_only":
            assert defaults(MODELS[name].generate) == {
                **choices, "use_cache": True, "stop_at": EOS, "generator": None
            }  # fmt: skip
            assert defaults(script.choose_next_token) == {**choices, "generator": None}
            assert defaults(script.filter_logits) == {
                "temperature": 1.0, "top_k": None, "top_p": None
            }  # fmt: skip
    rates = {"mask_share": 0.8, "random_share": 0.1, "min_rate": 0.15}
    assert defaults(SCRIPTS["encoder_only"].mask_tokens) == {**rates, "generator": None}
    assert defaults(SCRIPTS["encoder_only"].predict) == rates
    assert defaults(MODELS["encoder_decoder"].beam_search) == {
        "beam_width": 4, "length_penalty": 1.0, "max_new_tokens": 32, "trace": None
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [[4, 0, 7], [None], [4.0], ["4", 0]])
def test_tokens_that_are_no_strings_are_rejected(tokens):
    with pytest.raises(ValueError, match="is not a token: use a string"):
        VOCABULARY.encode(tokens)


@pytest.mark.parametrize("ids", [[1.9], [None], ["4"], torch.tensor([3.7])])
def test_ids_that_are_no_whole_numbers_are_rejected(ids):
    with pytest.raises((TypeError, ValueError)):
        VOCABULARY.decode(ids)


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 10.5},
        {"num_samples": -1},
        {"max_digits": 19},
        {"batch_size": None},
        {"seed": "a"},
        {"validation_share": math.nan},
    ],
)
def test_arguments_of_the_loaders_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create_dataloaders(**options)


def test_a_string_of_digits_is_a_list_of_digits():
    item = make_item("407")
    assert item["source"] == [10, 6, 13] and item["words"] == ["four", "zero", "seven"]
