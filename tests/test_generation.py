"""Generation: cache, batch, and padding change no result, and every option does what it says."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MODELS, SCRIPTS, close, logits_of, random_model, random_models
from decoder_only import choose_next_token, filter_logits
from housekeeping import InputError
from toy_dataset import EOS, PAD, SEP, SOS, VOCABULARY, collate_fn, exact_match, make_item
from training import count_passes

WRITERS = ["decoder_only", "encoder_decoder"]
PROMPTS = [[10, 6, 13, 4], [9, 4], [7, 7, 7, 7, 8, 15, 4], [6, 4], [22, 16, 4]]
SEQUENCES = [["7"], ["4", "0", "7"], ["1", "2", "3", "4", "5"]]  # the first is the shortest
GREEDY = [("decoder_only", {}), ("decoder_only", {"repetition_penalty": 1.7}),
          ("encoder_decoder", {})]
CHOICES = [*GREEDY, ("decoder_only", {"temperature": 0.8, "top_k": 9, "top_p": 0.9})]


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def write(model, prompts, limit=20, **options):
    """What the model generates. If it samples, then with the same random numbers in each call."""
    sampling = {"generator": seeded()} if "temperature" in options else {}
    return model.generate(prompts, limit, **sampling, **options)


def decoder_layers(model):
    return getattr(model, "layers", None) or model.decoder_layers


def fixed_model(name, logits):
    """A model that predicts these logits (V,) at every position, whatever its input."""
    model = random_model(name, vocab_size=len(logits), d_model=2, num_heads=1, num_layers=1)
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.tensor([1.0, 0.0]))
        model.output.weight[:, 0] = logits
    return model


# --- cache, batch, and padding change nothing -----------------------------------------
@pytest.mark.parametrize("name, options", CHOICES)
def test_generation_with_a_cache_equals_generation_without(name, options):
    distinct = set()
    for model in random_models(name):
        cached = write(model, PROMPTS, **options)
        assert cached == write(model, PROMPTS, use_cache=False, **options)
        distinct |= {tuple(row[:3]) for row in cached}
    assert len(distinct) >= 12  # the answers depend on the prompts


@pytest.mark.parametrize("name, options", GREEDY)
def test_generating_a_batch_equals_generating_its_rows(name, options):
    for model in random_models(name):
        alone = [write(model, [prompt], **options)[0] for prompt in PROMPTS]
        assert write(model, PROMPTS, **options) == alone


@pytest.mark.parametrize("name, options", GREEDY)
@torch.no_grad()
def test_generation_equals_a_plain_loop_over_whole_rows(name, options):
    """Each step takes the most likely token, after the penalty for the tokens written so far."""
    penalty = options.get("repetition_penalty", 1.0)
    for model in random_models(name, 3):
        for prompt, written in zip(PROMPTS, write(model, PROMPTS, 12, **options)):
            row = []
            while len(row) < 12 and EOS not in row:
                source = prompt + row if name == "decoder_only" else prompt
                inputs = torch.tensor([source]), torch.tensor([[SOS, *row]])
                logits = logits_of(model, *inputs)[0, -1]
                for t in set(row):
                    logits[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
                row.append(logits.argmax().item())
            assert written == row


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("positions", [torch.arange(6)[None], None])
@torch.no_grad()
def test_decoding_in_pieces_with_a_cache_gives_the_same_vectors(name, positions):
    """This is stricter than equal tokens, which can hide slightly wrong vectors."""
    tokens = torch.tensor([[10, 6, 13, 4, 20, 16], [9, 9, 4, 25, 2, 7], [4, 22, 8, 2, 5, 11]])
    for model in random_models(name, 2):
        if name == "decoder_only":
            run = model.run_decoder
            caches = [layer.self_attention.new_cache(3, 6) for layer in model.layers]
        else:
            memory, mask = model.read([[10, 6, 13, 15, 8], [9], [7, 8]])
            run = functools.partial(model.run_decoder, memory=memory, memory_mask=mask)
            caches = model.new_caches(3, 6, 5)
        pieces = [run(tokens[:, a:b], caches=caches,
                      positions=positions if positions is None else positions[:, a:b])[0]
                  for a, b in ((0, 2), (2, 3), (3, 6))]
        close(torch.cat(pieces, 1), run(tokens)[0])


def test_positions_are_counted_from_the_first_real_token():
    tokens = torch.tensor([[PAD, PAD, 9, 4, 25], [10, 6, 13, 4, PAD], [PAD, 7, PAD, 4, 2]])
    assert random_model("decoder_only").positions_of(tokens).tolist() == [
        [0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert random_model("encoder_decoder").positions_of(tokens).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", WRITERS)
def test_the_cache_saves_work(name):
    """Counts the tokens whose keys are computed in each step."""
    for use_cache in (True, False):
        model, keys, memory_keys = random_model(name), [], []

        def count(attention, sizes):
            attention.w_k.register_forward_pre_hook(lambda _, x: sizes.append(x[0].size(1)))

        count(decoder_layers(model)[-1].self_attention, keys)
        if name == "encoder_decoder":
            count(model.decoder_layers[-1].cross_attention, memory_keys)
        model.generate([[6, 7, 4]], 5, use_cache=use_cache, stop_at=None)
        first = 3 if name == "decoder_only" else 1
        assert keys == ([first, 1, 1, 1, 1] if use_cache else [*range(first, first + 5)])
        if name == "encoder_decoder":  # the source is read once
            assert memory_keys == ([3, 0, 0, 0, 0] if use_cache else [3] * 5)


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_may_use_every_position_but_no_more(name):
    model = random_model(name, max_len=9)
    prompt, count = ([6, 7, 4], 7) if name == "decoder_only" else ([6] * 9, 9)
    assert len(model.generate([prompt], count, stop_at=None)[0]) == count
    with pytest.raises(InputError, match="max_len=9"):
        model.generate([prompt], count + 1, stop_at=None)


# --- where answers end ----------------------------------------------------------------
@pytest.mark.parametrize("name, options", CHOICES)
def test_every_sequence_stops_at_its_own_stop_token(name, options):
    lengths = set()
    for model in random_models(name):
        whole = write(model, PROMPTS, stop_at=None, **options)
        assert {len(row) for row in whole} == {20}  # without a stop token, exactly the limit
        for stop in (EOS, SEP):  # all prompts contain <SEP>, but only new tokens count
            rows = write(model, PROMPTS, stop_at=stop, **options)
            assert rows == [row[:row.index(stop) + 1] if stop in row else row for row in whole]
            lengths |= {len(row) for row in rows}
    assert len(lengths) > 5


@pytest.mark.parametrize("name", WRITERS)
def test_generation_ends_as_soon_as_all_have_ended(name):
    lengths = set()
    for model in random_models(name, 12, ends=3.0):
        rows = model.generate(PROMPTS[:2], 25)
        steps = count_passes(model, lambda model=model: model.generate(PROMPTS[:2], 25))
        assert steps == max(map(len, rows)) + (name == "encoder_decoder")  # and the encoder's pass
        lengths.add(max(map(len, rows)))
    assert len(lengths) > 2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_answer_that_goes_on_after_a_right_beginning_is_wrong(name, monkeypatch):
    script, four = SCRIPTS[name], VOCABULARY.ids["four"]
    model = fixed_model(name, 9.0 * torch.eye(26)[four]).float()  # it says `four` without end
    items = [make_item(["4"]), make_item(["4", "4"])]
    expected = [item["words"] for item in items]
    if name in WRITERS:
        assert script.translate(model, [["4"], ["4", "4"]]) == [["four"] * 4] * 2
    else:  # it cannot go on, because its length is given
        assert script.translate(model, [["4"], ["4", "4"]]) == expected
    assert script.evaluate(model, [collate_fn(items)])["exact_match"] == (name not in WRITERS)
    for written, share in ((expected, 1.0), ([row + ["four"] for row in expected], 0.0),
                           ([row[:-1] for row in expected], 0.0),
                           ([["four"], ["four"] * 3], 0.5)):
        monkeypatch.setattr(script, "translate", lambda model, rows, written=written: written)
        assert script.evaluate(model, [collate_fn(items)])["exact_match"] == share
        assert exact_match(written, expected) == share


# --- choosing a token -----------------------------------------------------------------
@pytest.mark.parametrize("probabilities, options, kept", [
    ([0.15, 0.5, 0.05, 0.3], {"top_k": 2}, {1, 3}),
    ([0.15, 0.5, 0.05, 0.3], {"top_k": 9}, {0, 1, 2, 3}),
    ([0.25, 0.25, 0.25, 0.25], {"top_k": 3, "temperature": 2.0}, 3),  # tied: exactly three
    ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.4}, {1}),
    ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.7}, {1, 3}),  # the token that crosses p stays
    ([0.15, 0.5, 0.05, 0.3], {"top_p": 0.9}, {0, 1, 3}),
    ([0.15, 0.5, 0.05, 0.3], {"top_p": 1.0}, {0, 1, 2, 3}),
    ([0.25, 0.5, 0.25], {"top_p": 0.5}, {1}),  # exactly reached
    # Temperature acts before top_p: a flatter distribution needs more tokens to reach p.
    ([0.25, 0.05, 0.6, 0.1], {"top_p": 0.8, "temperature": 0.3}, {2}),
    ([0.25, 0.05, 0.6, 0.1], {"top_p": 0.8, "temperature": 1.0}, {0, 2}),
    ([0.25, 0.05, 0.6, 0.1], {"top_p": 0.8, "temperature": 4.0}, {0, 2, 3}),
    # top_p counts only what top_k keeps: 0.4 of 0.7 is more than a half.
    ([0.1, 0.3, 0.4, 0.2], {"top_p": 0.5}, {1, 2}),
    ([0.1, 0.3, 0.4, 0.2], {"top_p": 0.5, "top_k": 2}, {2}),
])
def test_filters_keep_the_most_likely_tokens(probabilities, options, kept):
    logits = torch.tensor([probabilities]).double().log2() * math.log(2)  # exact for halves
    filtered = filter_logits(logits, **options)[0]
    found = {i for i, logit in enumerate(filtered.tolist()) if logit > -math.inf}
    assert len(found) == kept if isinstance(kept, int) else found == kept
    expected = torch.tensor(probabilities)[sorted(found)].double().log() / options.get(
        "temperature", 1.0)
    torch.testing.assert_close(filtered[sorted(found)].softmax(0), expected.softmax(0))


rows_of_logits = st.lists(st.lists(st.floats(-12, 12, width=32), min_size=5, max_size=5),
                          min_size=1, max_size=4)


@given(rows=rows_of_logits, temperature=st.floats(1e-30, 1e30),
       top_k=st.none() | st.integers(1, 9), top_p=st.none() | st.floats(1e-6, 1.0))
@settings(deadline=None)
def test_filtered_logits_are_always_a_valid_distribution(rows, temperature, top_k, top_p):
    logits = torch.tensor(rows)
    filtered = filter_logits(logits, temperature, top_k, top_p)
    probabilities = filtered.softmax(-1)
    assert torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(rows)))
    for row, keep in zip(logits, filtered > -math.inf):
        assert 1 <= keep.sum() <= (top_k or 5)
        assert keep.all() or row[keep].min() >= row[~keep].max() - 1e-5  # tied by rounding


@given(rows=rows_of_logits, top_p=st.floats(0.01, 0.99), temperature=st.floats(0.05, 20))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(rows, top_p, temperature):
    logits = torch.tensor(rows).double()
    kept = filter_logits(logits, temperature, top_p=top_p) > -math.inf
    for row, keep in zip((logits / temperature).softmax(-1), kept):
        assert row[keep].sum() >= top_p - 1e-9  # the tokens kept reach p,
        assert row[keep].sum() - row[keep].min() < top_p + 1e-9  # but not without the last of them


def test_large_logits_do_not_overflow_at_a_low_temperature():
    filtered = filter_logits(torch.tensor([[3e38, 2e38, -3e38]]), 0.01, top_k=2, top_p=0.9)
    assert filtered.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


LOGITS = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1]).double().log()  # most likely: 1, then 2, 3, 4


@pytest.mark.parametrize("options, kept", [
    ({"temperature": 1.0}, [0, 1, 2, 3, 4]), ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
    ({"temperature": 0.5}, [0, 1, 2, 3, 4]), ({"temperature": 2.0, "top_k": 2}, [1, 2]),
    ({"temperature": 2.0, "top_p": 0.6}, [1, 2, 3]),  # 0.30 + 0.26 + 0.18
    ({"temperature": 2.0, "top_p": 0.7, "top_k": 3}, [1, 2]),
    ({"temperature": 3.0, "top_k": 1}, [1]),
])
def test_sampling_follows_the_softmax_of_logits_over_temperature(options, kept):
    """Through generate, on a model that always predicts the same distribution."""
    rows = fixed_model("decoder_only", LOGITS).generate(
        [[1, 3]] * 500, 8, stop_at=None, generator=seeded(), **options)
    found = torch.bincount(torch.tensor(rows).flatten(), minlength=5) / 4000
    expected = torch.zeros(5).double()
    expected[kept] = (LOGITS[kept] / options["temperature"]).softmax(0)
    close(found.double(), expected, 0.025)  # more than 3 standard deviations
    assert not found[expected == 0].any()


def test_sampling_uses_the_generator_it_is_given():
    model, state = next(random_models("decoder_only")), torch.get_rng_state()
    first, again, other = (model.generate(PROMPTS, 9, temperature=1.0, generator=seeded(n))
                           for n in (0, 0, 1))
    assert first == again != other and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)  # without one, the global generator decides
    assert model.generate(PROMPTS, 9, temperature=1.0) == first


def test_a_penalty_counts_new_tokens_from_the_first_and_no_prompt():
    model = fixed_model("decoder_only", LOGITS)
    options = {"repetition_penalty": 1e6, "stop_at": None}
    assert model.generate([[1, 2, 3]], 5, **options) == [[1, 2, 3, 4, 0]]
    rows = model.generate([[1]] * 40, 5, temperature=1.0, generator=seeded(), **options)
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in rows) and len(set(map(tuple, rows))) > 9


@pytest.mark.parametrize("row", [[0.5, 0.4, -3.0], [-0.4, -0.5, -3.0], [7.0, 4.0, -3.0]])
@pytest.mark.parametrize("written, penalty, expected", [
    ([], 2.0, 0), ([1], 2.0, 0), ([0], 1.0, 0), ([0], 2.0, 1), ([0, 0, 0], 2.0, 1), ([0], 0.5, 0)])
def test_a_penalty_lowers_written_tokens_whatever_their_sign(row, written, penalty, expected):
    ids = torch.tensor([written]).long()
    assert choose_next_token(torch.tensor([row]), ids, repetition_penalty=penalty) == expected


# --- translate, and mistakes at the door ----------------------------------------------
@pytest.mark.parametrize("name, options", [
    *GREEDY, ("decoder_only", {"temperature": 1.0}),
    ("decoder_only", {"temperature": 1.5, "top_k": 3, "top_p": 0.6}),
    *((name, {"use_cache": False}) for name in WRITERS),
    *((name, {"stop_at": None}) for name in WRITERS),
])
def test_translate_equals_generate_called_by_hand(name, options):
    for model in random_models(name, 3):
        end = [SEP] if name == "decoder_only" else []
        prompts = [VOCABULARY.encode(row) + end for row in SEQUENCES]
        by_hand = write(model, prompts, 5 + 2, **options)
        sampling = {"generator": seeded()} if "temperature" in options else {}
        assert SCRIPTS[name].translate(model, SEQUENCES, **options, **sampling) == [
            VOCABULARY.decode(row[:-1] if row[-1] == EOS else row) for row in by_hand]


def test_filling_the_masks_of_a_batch_equals_filling_its_rows():
    script = SCRIPTS["encoder_only"]
    for model in random_models("encoder_only"):
        for fill in (script.translate, script.translate_back):
            assert fill(model, SEQUENCES) == [fill(model, [row])[0] for row in SEQUENCES]


@pytest.mark.parametrize("name", MODELS)
def test_translation_uses_no_dropout_and_restores_the_mode(name):
    script, model = SCRIPTS[name], next(random_models(name, dropout=0.5))
    expected = script.translate(model, SEQUENCES)
    assert script.translate(model.train(), SEQUENCES) == expected and model.training
    with pytest.raises(InputError):
        script.translate(model, [["4"] * 99])
    model.output.forward = None  # as if a reader had broken it
    with pytest.raises(TypeError):
        script.translate(model, SEQUENCES)
    assert model.training
    del model.output.forward
    assert script.translate(model.eval(), SEQUENCES) == expected and not model.training


@pytest.mark.parametrize("name", MODELS)
def test_translate_rejects_what_it_cannot_read_in_one_line(name):
    script, model = SCRIPTS[name], random_model(name)
    for nothing in ([], [[4, 0, 7]], [["4"] * 99]):
        with pytest.raises(InputError, match=": use ") as error:
            script.translate(model, nothing)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="warmth"):
        script.translate(model, [["4"]], warmth=1.0)
    assert script.translate(model, [["4", "x"]]) == script.translate(model, [["4", "<UNK>"]])


SAMPLING = [  # only decoder_only.py samples
    ({"temperature": -1.0}, "temperature=-1"), ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": None}, "temperature=None"), ({"temperature": 1e-320}, "temperature=1e-320"),
    ({"top_k": 0, "temperature": 1.0}, "top_k=0"), ({"top_k": 3}, "at temperature=0"),
    ({"top_p": 0.9}, "at temperature=0"), ({"top_p": 0.0}, "top_p=0"),
    ({"top_p": 1.1, "temperature": 1.0}, "top_p=1.1"), ({"top_p": math.nan}, "top_p=nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0")]
COMMON = [
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
    ({"max_new_tokens": 100}, "max_len=64"), ({"prompts": [[6] * 65]}, "max_len=64"),
    ({"prompts": []}, "list of lists"), ({"prompts": [[6], []]}, "list of lists"),
    ({"prompts": [6, 7]}, "list of lists"), ({"prompts": [[6.0]]}, "6.0 is outside"),
    ({"prompts": [[True]]}, "True is outside"), ({"prompts": [[6, 26]]}, "26 is outside"),
    ({"prompts": [[6], [6, -2]]}, "-2 is outside")]


@pytest.mark.parametrize("name, options, words", [
    *(("decoder_only", *case) for case in SAMPLING),
    *((name, *case) for name in WRITERS for case in COMMON)])
def test_invalid_options_and_prompts_are_rejected_in_one_line(name, options, words):
    arguments = {"max_new_tokens": 4, **options}
    prompts = arguments.pop("prompts", PROMPTS)
    with pytest.raises(InputError, match=words) as error:
        random_model(name).generate(prompts, **arguments)
    assert "\n" not in str(error.value)
