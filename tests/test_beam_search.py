"""Beam search: from greedy to exhaustive, and equal to a beam search in plain Python."""

import itertools
import math

import pytest
import torch

import encoder_decoder
from conftest import close, random_model, random_models
from encoder_decoder import (EncoderDecoderTransformer, best_candidates, record_beam_search,
                             translate)
from housekeeping import InputError
from toy_dataset import EOS, SOS, VOCABULARY

SOURCES = [[10, 6, 13, 4], [9, 4], [7, 7, 7, 7, 8, 15, 4], [6, 4], [22, 16, 4]]
SEQUENCES = [["7"], ["4", "0", "7"], ["1", "2", "3", "4", "5"]]  # the first is the shortest


def models(count=8, **arguments):
    return random_models("encoder_decoder", count, **arguments)


@torch.no_grad()
def log_probabilities(model, source, rows):
    """The log-probability of each of `rows`, from one pass over each length, without a cache."""
    sums = {}
    for length in {len(row) for row in rows}:
        answers = torch.tensor([row for row in rows if len(row) == length])
        inputs = torch.cat([torch.full((len(answers), 1), SOS), answers[:, :-1]], 1)
        log_p = model(torch.tensor([source] * len(answers)), inputs).log_softmax(-1)
        totals = log_p.gather(2, answers[..., None]).sum((1, 2)).tolist()
        sums.update(zip(map(tuple, answers.tolist()), totals))
    return sums


@torch.no_grad()
def plain_beam_search(model, source, width, limit):
    """Return the shown candidates (ids, sum, ended) of each step, best first. It never stops early.

    Of the best 2W candidates, those that end are finished, and the best W of the others stay.
    """
    hypotheses, steps = [(0.0, [])], []
    for length in range(1, limit + 1):
        candidates = []
        for total, ids in hypotheses:
            logits = model(torch.tensor([source]), torch.tensor([[SOS, *ids]]))[0, -1]
            log_p = logits.log_softmax(0).tolist()
            candidates += [(total + p, ids + [t]) for t, p in enumerate(log_p)]
        candidates = sorted(candidates, reverse=True)[:2 * width]
        hypotheses = [c for c in candidates if c[1][-1] != EOS and length < limit][:width]
        steps.append([(ids, total, ids[-1] == EOS or length == limit) for total, ids in candidates
                      if ids[-1] == EOS or length == limit or (total, ids) in hypotheses])
    return steps


@pytest.mark.parametrize("width, penalty", [(2, 1.0), (3, 0.0), (4, 0.7), (27, 1.5)])
def test_beam_search_equals_a_plain_python_beam_search(width, penalty):
    """Its recorded steps, its answers, and that it stops only when the best answer is known."""
    stopped = 0
    for model, digits in itertools.product(models(4), SEQUENCES[:2]):
        source, limit = VOCABULARY.encode(digits), len(digits) + 2
        steps, found = record_beam_search(model, digits, width, penalty)
        plain = plain_beam_search(model, source, width, limit)
        assert [[(ids, ended) for ids, _, ended in step] for step in steps] == [
            [(ids, ended) for ids, _, ended in step] for step in plain[:len(steps)]]
        for step, expected in zip(steps, plain):
            assert [s for _, s, _ in step] == pytest.approx([s for _, s, _ in expected], abs=1e-9)
        finished = [sorted(((total / len(ids) ** penalty, total, ids) for step in some
                            for ids, total, ended in step if ended), reverse=True)
                    for some in (plain[:len(steps)], plain)]
        assert [h.tokens for h in found] == [ids for *_, ids in finished[0]][:width]
        for hypothesis, (score, total, _) in zip(found, finished[0]):
            assert hypothesis[:2] == pytest.approx((score, total), abs=1e-9)
        assert finished[0][0] == finished[1][0]  # going on would not find a better answer
        assert model.beam_search([source], width, penalty, limit) == [found]
        stopped += len(steps) < limit
    assert stopped > 0


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_equals_exhaustive_search(penalty):
    limit, lengths = 4, set()
    others = [t for t in range(5) if t != EOS]
    rows = [[*row, EOS] for n in range(limit) for row in itertools.product(others, repeat=n)]
    rows += [list(row) for row in itertools.product(others, repeat=limit)]  # cut off at the limit
    for model in models(6, vocab_size=5, d_model=16):
        sources = [[3, 4, 1], [4]]
        for source, found in zip(sources, model.beam_search(sources, 4 ** limit, penalty, limit)):
            totals = log_probabilities(model, source, rows)
            scores = {ids: total / len(ids) ** penalty for ids, total in totals.items()}
            assert tuple(found[0].tokens) == max(scores, key=scores.get)
            assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
            assert len({tuple(h.tokens) for h in found}) == len(found)  # each answer once
            for h in found:  # each hypothesis has its own numbers
                expected = scores[tuple(h.tokens)], totals[tuple(h.tokens)]
                assert h[:2] == pytest.approx(expected, abs=1e-9)
            lengths.add(len(found[0].tokens))
    assert len(lengths) > 1


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_beam_width_one_equals_greedy(penalty):
    torch.manual_seed(0)
    uncertain = [EncoderDecoderTransformer(d_model=24, num_layers=1).eval().to(dtype)
                 for dtype in (torch.float32, torch.bfloat16) for _ in range(10)]
    for model in (*models(), *uncertain):  # where rounding makes ties of different sums
        found = model.beam_search(SOURCES, 1, penalty, 15)
        assert [[h.tokens for h in hypotheses] for hypotheses in found] == [
            [row] for row in model.generate(SOURCES, 15)]


@pytest.mark.parametrize("width, penalty", [(2, 0.0), (4, 0.8)])
def test_beam_search_on_a_batch_equals_its_rows(width, penalty):
    distinct = set()
    for model in models(6):
        for source, found in zip(SOURCES, model.beam_search(SOURCES, width, penalty, 12)):
            alone = model.beam_search([source], width, penalty, 12)[0]
            assert [h.tokens for h in found] == [h.tokens for h in alone] and len(found) <= width
            assert [h.score for h in found] == pytest.approx([h.score for h in alone], abs=1e-9)
            distinct.add(tuple(found[0].tokens))
    assert len(distinct) > 12 and len(set(map(len, distinct))) > 3


def test_best_candidates_reproduce_the_example_in_the_comment():
    """Step 2 of the example before `beam_steps`, with a = 0, b = 1, and <EOS> = 2."""
    log_p = torch.tensor([[-1.1, -1.2, -1.0], [-0.1, -2.9, -3.2]])
    sums, parent, token = best_candidates(torch.tensor([[-0.5, -1.2]]), log_p, 2)
    close(sums, torch.tensor([[-1.3, -1.5, -1.6, -1.7]]), 0.01)
    assert parent.tolist() == [[1, 0, 0, 0]] and token.tolist() == [[0, 2, 0, 1]]


def test_a_search_stops_as_soon_as_nothing_unfinished_can_win():
    """A model that is almost certain of <EOS> needs one step, although 30 are allowed."""
    model = random_model("encoder_decoder")
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(50 * model.output.weight[EOS])
    assert len(list(model.beam_steps([[6, 7], [9]], 3, 0.0, 30))) == 1
    for found in model.beam_search([[6, 7], [9]], 3, 0.0, 30):
        assert found[0].tokens == [EOS]


def test_beam_search_uses_no_dropout_and_restores_the_mode():
    model = next(models(dropout=0.5)).train()
    found = model.beam_search(SOURCES, 3, max_new_tokens=6)
    assert model.training
    assert found == model.eval().beam_search(SOURCES, 3, max_new_tokens=6) and not model.training


def test_beam_search_may_use_every_position_but_no_more():
    model = random_model("encoder_decoder", max_len=9)
    assert max(len(h.tokens) for h in model.beam_search([[6] * 9], 3, 1.0, 9)[0]) == 9
    with pytest.raises(InputError, match="max_len=9"):
        model.beam_search([[6]], 3, 1.0, 10)


@pytest.mark.parametrize("width, options", [
    (1, {}), (1, {"length_penalty": 0.0}), (3, {}), (3, {"length_penalty": 0.0}),
    (4, {"length_penalty": 2.0})])
def test_translate_equals_beam_search_called_by_hand(width, options):
    for model in models(4):
        found = model.beam_search([VOCABULARY.encode(row) for row in SEQUENCES], width,
                                  max_new_tokens=5 + 2, **options)
        best = [hypotheses[0].tokens for hypotheses in found]
        assert translate(model, SEQUENCES, width, **options) == [
            VOCABULARY.decode(row[:-1] if row[-1] == EOS else row) for row in best]


@pytest.mark.parametrize("options, words", [
    ({"beam_width": 0}, "beam_width=0"), ({"beam_width": 2.0}, "beam_width=2.0"),
    ({"length_penalty": -1.0}, "length_penalty=-1"),
    ({"length_penalty": math.nan}, "length_penalty=nan"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"max_new_tokens": 65}, "max_len=64"),
    ({"sources": []}, "list of lists"), ({"sources": [[6], []]}, "list of lists"),
    ({"sources": [[99]]}, "99 is outside"), ({"sources": [[6] * 65]}, "max_len=64")])
def test_invalid_beam_settings_are_rejected_in_one_line(options, words):
    with pytest.raises(InputError, match=words) as error:
        random_model("encoder_decoder").beam_search(**{"sources": SOURCES, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, error", [
    ({"beam_width": 0}, InputError), ({"beam_width": 2, "length_penalty": -1.0}, InputError),
    ({"beam_width": 2, "use_cache": False}, TypeError), ({"warmth": 1.0}, TypeError)])
def test_translate_refuses_options_that_beam_search_lacks(options, error):
    with pytest.raises(error, match=list(options)[-1]):
        translate(random_model("encoder_decoder"), SEQUENCES, **options)


def test_the_example_shown_is_one_that_beams_get_right_and_greedy_gets_wrong(monkeypatch):
    answers = {1: [["a"], ["x"], ["x"], ["x"]], 3: [["a"], ["y"], ["c"], ["d"]]}  # by beam width
    monkeypatch.setattr(encoder_decoder, "translate", lambda _, rows, width, __: answers[width])
    examples = [([digit], [word], ["?"]) for digit, word in zip("1234", "abcd")]
    assert encoder_decoder.where_beams_help(None, examples, 3, 1.0) == (["3"], ["c"])
    answers[3] = answers[1]
    assert encoder_decoder.where_beams_help(None, examples, 3, 1.0) == (["1"], ["a"])
