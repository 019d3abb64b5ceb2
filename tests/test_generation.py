"""Generation: cache and batch change no result; filters and beam search are correct."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MODELS, SCRIPTS, random_model
from encoder_decoder import best_candidates
from toy_dataset import EOS, PAD, SOS

WRITERS = ["decoder_only", "encoder_decoder"]
PROMPTS = [[10, 6, 13, 4], [9, 4], [7, 7, 7, 7, 8, 15, 4], [6, 4]]
logit_rows = st.lists(
    st.lists(st.floats(-12, 12, width=32), min_size=5, max_size=5), min_size=1, max_size=4
)


# --- generate -------------------------------------------------------------------------
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.7}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}]
)
@pytest.mark.parametrize("stop_at", [EOS, None])
def test_cached_equals_uncached_for_prompts_of_unequal_length(name, options, stop_at):
    distinct = set()
    for seed in range(5):
        torch.manual_seed(seed)
        model = random_model(name)
        written = [
            model.generate(
                PROMPTS,
                20,
                use_cache=use_cache,
                stop_at=stop_at,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            for use_cache in (True, False)
        ]
        assert written[0] == written[1]
        distinct |= {tuple(row) for row in written[0]}
    assert len(distinct) > 10  # the output depends on the prompts


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_decoding_in_pieces_with_a_cache_gives_the_same_vectors(name):
    """This is stricter than equal tokens, which can hide slightly wrong vectors."""
    model, tokens = random_model(name), torch.tensor([[10, 6, 13, 4, 20, 16], [9, 9, 4, 25, 2, 7]])
    positions = torch.arange(6)[None]
    if name == "decoder_only":
        caches = [layer.self_attention.new_cache(2, 6) for layer in model.layers]

        def run(start, end, caches=None):
            return model.decode(tokens[:, start:end], None, positions[:, start:end], caches)[0]
    else:
        caches = model.new_caches(2, 6, 6)
        memory, _ = model.encode(tokens)
        mask = (tokens != PAD)[:, None, None]

        def run(start, end, caches=None):
            return model.decode(
                tokens[:, start:end], memory, mask, positions[:, start:end], caches
            )[0]

    pieces = [run(start, end, caches) for start, end in ((0, 2), (2, 3), (3, 6))]
    torch.testing.assert_close(torch.cat(pieces, 1), run(0, 6), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_positions_continue_after_the_cached_tokens(name):
    """The caller passes no positions here."""
    model, tokens = random_model(name), torch.tensor([[10, 6, 13, 4, 20]])
    if name == "decoder_only":
        caches = [layer.self_attention.new_cache(1, 5) for layer in model.layers]
        parts = [model.decode(part, caches=caches)[0] for part in tokens.split([3, 1, 1], 1)]
        expected, _ = model.decode(tokens)
    else:
        memory, caches = model.encode(tokens)[0], model.new_caches(1, 5, 5)
        parts = [
            model.decode(part, memory, None, caches=caches)[0]
            for part in tokens.split([3, 1, 1], 1)
        ]
        expected, _ = model.decode(tokens, memory, None)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_may_use_every_position_of_the_model(name):
    model = random_model(name, max_len=9)
    prompt, count = ([6, 7, 4], 7) if name == "decoder_only" else ([6] * 9, 9)
    assert len(model.generate([prompt], count, stop_at=None)[0]) == count
    with pytest.raises(ValueError, match="max_len=9"):
        model.generate([prompt], count + 1, stop_at=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beam_width_one_equals_greedy_even_where_rounding_makes_ties(dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        model = MODELS["encoder_decoder"](d_model=16, num_heads=2, num_layers=1).to(dtype).eval()
        found = model.beam_search(PROMPTS, 1, 1.0, 12)
        assert [hypotheses[0].tokens for hypotheses in found] == model.generate(PROMPTS, 12)


def test_a_large_integer_length_penalty_does_not_overflow():
    model = random_model("encoder_decoder", max_len=200)
    assert len(model.beam_search([[6, 7]], 2, 10, 150)[0]) == 2


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_a_batch_equals_generating_each_row_alone(name, use_cache):
    for seed in range(5):
        torch.manual_seed(seed)
        model = random_model(name)
        together = model.generate(PROMPTS, 20, use_cache=use_cache)
        assert together == [
            model.generate([prompt], 20, use_cache=use_cache)[0] for prompt in PROMPTS
        ]


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_greedy_takes_the_most_likely_token_at_each_step(name):
    """Compared with a plain loop that runs the whole model on the whole row for each token."""
    model = random_model(name)
    for prompt in PROMPTS:
        row = [SOS] if name == "encoder_decoder" else list(prompt)
        start = len(row)
        while len(row) - start < 12 and row[-1] != EOS:
            tokens = torch.tensor([row])
            logits = (
                model(torch.tensor([prompt]), tokens)
                if name == "encoder_decoder"
                else model(tokens)
            )
            row.append(logits[0, -1].argmax().item())
        assert model.generate([prompt], 12)[0] == row[start:]


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_ends_at_its_first_eos_or_the_limit(name):
    stopped = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model = random_model(name)
        for row in model.generate(
            PROMPTS, 30, temperature=1.5, generator=torch.Generator().manual_seed(seed)
        ):
            assert 1 <= len(row) <= 30 and EOS not in row[:-1]
            assert row[-1] == EOS or len(row) == 30
            stopped += row[-1] == EOS
    assert stopped > 5


@pytest.mark.parametrize("name", WRITERS)
def test_generation_uses_no_dropout_and_restores_the_mode(name):
    model = random_model(name, dropout=0.5).train()
    assert model.generate(PROMPTS, 9) == model.generate(PROMPTS, 9)
    assert model.training
    with pytest.raises(ValueError):
        model.generate(PROMPTS, 0)
    model.output.forward = None  # as if a reader had broken it
    with pytest.raises(TypeError):
        model.generate(PROMPTS, 2)
    del model.output.forward
    assert model.training
    model.eval().generate(PROMPTS, 2)
    assert not model.training


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 3}, "no effect at temperature=0"),
        ({"top_p": 0.9}, "no effect at temperature=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 100}, "max_len=64"),
        ({"prompts": []}, "at least one"),
        ({"prompts": [[6], []]}, "at least one"),
        ({"prompts": [[6.0]]}, "6.0 is outside"),
        ({"prompts": torch.tensor([[6]])}, "list of lists"),
        ({"prompts": [[True]]}, "True is outside"),
        ({"temperature": None}, "temperature=None"),
        ({"prompts": [[6, 26]]}, "outside the vocabulary"),
        ({"prompts": [[6, -2]]}, "outside the vocabulary"),
        ({"prompts": [[PAD, PAD]]}, "only <PAD>"),
        ({"prompts": [[6] * 65]}, "max_len=64"),
    ],
)
def test_invalid_generation_settings_are_rejected_in_one_line(name, options, words):
    arguments = {"max_new_tokens": 4, **options}
    prompts = arguments.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=words) as error:
        random_model(name).generate(prompts, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_top_k_beyond_the_vocabulary_keeps_every_token(name):
    model = random_model(name)
    rows = [
        model.generate(
            PROMPTS, 9, temperature=1.0, top_k=top_k, generator=torch.Generator().manual_seed(0)
        )
        for top_k in (None, 26, 1000)
    ]
    assert rows[0] == rows[1] == rows[2]
    assert model.generate(PROMPTS, 9, temperature=3.0, top_k=1) == model.generate(PROMPTS, 9)


# --- the filters ----------------------------------------------------------------------
@pytest.mark.parametrize("name", WRITERS)
@given(rows=logit_rows, top_k=st.integers(1, 8))
@settings(deadline=None)
def test_top_k_keeps_exactly_the_k_most_likely_tokens(name, rows, top_k):
    logits = torch.tensor(rows)
    kept = SCRIPTS[name].filter_logits(logits, top_k=top_k) > -math.inf
    assert (kept.sum(-1) == min(top_k, 5)).all()
    for row, keep in zip(logits, kept):
        if not keep.all():
            assert row[keep].min() >= row[~keep].max() - 1e-5  # tied up to rounding


@pytest.mark.parametrize("name", WRITERS)
@given(rows=logit_rows, top_p=st.floats(0.01, 1.0))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(name, rows, top_p):
    logits = torch.tensor(rows).double()
    kept = SCRIPTS[name].filter_logits(logits, top_p=top_p) > -math.inf
    for row, keep in zip(logits.softmax(-1), kept):
        assert keep.any()
        assert row[keep].sum() >= top_p - 1e-9  # the tokens kept reach p,
        if top_p < 1 and keep.sum() > 1:
            assert (
                row[keep].sum() - row[keep].min() < top_p + 1e-9
            )  # but not without the last of them
        if not keep.all():
            assert row[keep].min() >= row[~keep].max() - 1e-5  # tied up to rounding


@pytest.mark.parametrize("name", WRITERS)
def test_the_token_that_crosses_p_stays(name):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double().log()
    kept = {
        p: (SCRIPTS[name].filter_logits(logits, top_p=p) > -math.inf).sum().item()
        for p in (0.4, 0.7, 0.9, 1.0)
    }
    assert kept == {0.4: 1, 0.7: 2, 0.9: 3, 1.0: 4}


@pytest.mark.parametrize("name", WRITERS)
@given(rows=logit_rows, temperature=st.floats(0.05, 20))
@settings(deadline=None)
def test_temperature_divides_the_logits(name, rows, temperature):
    logits = torch.tensor(rows).double()
    out = SCRIPTS[name].filter_logits(logits, temperature)
    torch.testing.assert_close(out.softmax(-1), (logits / temperature).softmax(-1))


@pytest.mark.parametrize("name", WRITERS)
@given(
    rows=logit_rows,
    temperature=st.floats(1e-30, 1e30),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(1e-6, 1.0),
)
@settings(deadline=None)
def test_filtered_logits_are_always_a_valid_distribution(name, rows, temperature, top_k, top_p):
    probabilities = (
        SCRIPTS[name].filter_logits(torch.tensor(rows), temperature, top_k, top_p).softmax(-1)
    )
    assert torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(rows)))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("temperature", [0, 0.0, 1e-320, -1.0])
def test_a_temperature_that_leaves_no_distribution_is_rejected(name, temperature):
    with pytest.raises(ValueError, match="temperature="):
        SCRIPTS[name].filter_logits(torch.randn(2, 5), temperature)


@pytest.mark.parametrize("name", WRITERS)
def test_sampling_follows_the_filtered_distribution(name):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    drawn = SCRIPTS[name].choose_next_token(
        logits,
        torch.empty(4000, 0, dtype=torch.long),
        temperature=1.0,
        top_k=2,
        generator=torch.Generator().manual_seed(0),
    )
    counts = torch.bincount(drawn, minlength=4) / 4000
    assert counts[2:].sum() == 0
    assert counts[0].item() == pytest.approx(0.625, abs=0.03)


@pytest.mark.parametrize("name", WRITERS)
@given(rows=logit_rows, penalty=st.floats(1.01, 5.0))
@settings(deadline=None)
def test_a_repetition_penalty_lowers_only_tokens_already_written(name, rows, penalty):
    written = torch.tensor([[1, 3, 3]] * len(rows))
    choose = SCRIPTS[name].choose_next_token
    for logits in (
        torch.tensor(rows),
        torch.tensor(rows) - 15,
        torch.tensor(rows) + 15,
    ):  # mixed signs, all negative, all positive
        expected = logits.clone()
        for t in (1, 3):
            column = logits[:, t]
            expected[:, t] = torch.where(column > 0, column / penalty, column * penalty)
            assert (expected[:, t] <= column).all()
        assert torch.equal(choose(logits, written, repetition_penalty=penalty), expected.argmax(-1))
        assert torch.equal(choose(logits, written), logits.argmax(-1))


# --- beam search ----------------------------------------------------------------------
def beam_model(seed, vocab_size=5):
    torch.manual_seed(seed)
    model = (
        MODELS["encoder_decoder"](
            vocab_size=vocab_size, d_model=8, num_heads=2, num_layers=1, d_ff=16
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        model.embedding.weight.normal_(std=0.9)
        model.output.weight = torch.nn.Parameter(torch.randn_like(model.embedding.weight))
    return model


@torch.no_grad()
def log_probability(model, source, tokens):
    logits = model(torch.tensor([source]), torch.tensor([[SOS] + tokens[:-1]]))[0]
    return logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item()


def all_answers(vocab_size, limit):
    """Every sequence that ends with <EOS>, and every sequence that is cut off at the limit."""
    others = [t for t in range(vocab_size) if t != EOS]
    for length in range(1, limit + 1):
        for beginning in itertools.product(others, repeat=length - 1):
            yield list(beginning) + [EOS]
    for whole in itertools.product(others, repeat=limit):
        yield list(whole)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_equals_exhaustive_search(length_penalty):
    limit, sources, lengths = 4, [[3, 4, 1], [4]], set()
    for seed in range(6):
        model = beam_model(seed)
        found = model.beam_search(sources, 5**limit, length_penalty, limit)
        for source, hypotheses in zip(sources, found):
            scored = {tuple(a): log_probability(model, source, a) for a in all_answers(5, limit)}
            best = max(scored, key=lambda a: scored[a] / len(a) ** length_penalty)
            assert tuple(hypotheses[0].tokens) == best
            assert hypotheses[0].score == pytest.approx(
                scored[best] / len(best) ** length_penalty, abs=1e-9
            )
            lengths.add(len(best))
            assert [h.score for h in hypotheses] == sorted(
                (h.score for h in hypotheses), reverse=True
            )
            for h in hypotheses:  # each hypothesis has its own numbers
                assert h.log_probability == pytest.approx(scored[tuple(h.tokens)], abs=1e-9)
                assert h.score == pytest.approx(
                    h.log_probability / len(h.tokens) ** length_penalty, abs=1e-9
                )
    assert len(lengths) > 1 or length_penalty == 2.0  # the answers are not all of one length


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_beam_width_one_equals_greedy(length_penalty):
    for seed in range(10):
        torch.manual_seed(seed)
        model = random_model("encoder_decoder")
        found = model.beam_search(PROMPTS, 1, length_penalty, 15)
        assert [f[0].tokens for f in found] == model.generate(PROMPTS, 15)
        assert [len(f) for f in found] == [1] * len(PROMPTS)


def test_beam_search_uses_no_dropout_and_restores_the_mode():
    model = random_model("encoder_decoder", dropout=0.5).train()
    found = model.beam_search(PROMPTS, 3, max_new_tokens=6)
    assert model.training
    assert found == model.eval().beam_search(PROMPTS, 3, max_new_tokens=6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_repetition_penalty_ignores_the_prompt(name, monkeypatch):
    script, seen = SCRIPTS[name], []
    choose = script.choose_next_token

    def record(logits, written, *rest):
        seen.append(written.size(1))
        return choose(logits, written, *rest)

    monkeypatch.setattr(script, "choose_next_token", record)
    random_model(name).generate([[10, 6, 13, 5], [9, 5]], 4, repetition_penalty=1.5, stop_at=None)
    assert seen == [0, 1, 2, 3]


def test_beam_search_on_a_batch_equals_its_rows():
    for seed in range(6):
        torch.manual_seed(seed)
        model = random_model("encoder_decoder")
        together = model.beam_search(PROMPTS, 4, 0.8, 12)
        for prompt, hypotheses in zip(PROMPTS, together):
            alone = model.beam_search([prompt], 4, 0.8, 12)[0]
            assert [h.tokens for h in hypotheses] == [h.tokens for h in alone]
            assert [h.score for h in hypotheses] == pytest.approx(
                [h.score for h in alone], abs=1e-9
            )


def test_beam_search_scores_are_those_without_a_cache():
    model = random_model("encoder_decoder")
    for source, hypotheses in zip(PROMPTS, model.beam_search(PROMPTS, 5, 1.0, 10)):
        for h in hypotheses:
            assert h.log_probability == pytest.approx(
                log_probability(model, source, h.tokens), abs=1e-9
            )


def test_a_wider_beam_sometimes_finds_better_answers():
    better = 0
    for seed in range(10):
        torch.manual_seed(seed)
        model = random_model("encoder_decoder")
        narrow, wide = (model.beam_search(PROMPTS, width, 0.0, 10) for width in (1, 8))
        better += sum(w[0].score > n[0].score + 1e-9 for n, w in zip(narrow, wide))
    assert better > 5


@torch.no_grad()
def plain_beam_search(model, source, width, penalty, limit):
    """Beam search in plain Python, without a cache. Returns the best score that it finds.

    Of the best 2W candidates, those that end are finished, and the best W of the others stay.
    """
    hypotheses, finished = [(0.0, [SOS])], []
    for length in range(1, limit + 1):
        candidates = []
        for total, tokens in hypotheses:
            log_p = model(torch.tensor([source]), torch.tensor([tokens]))[0, -1].log_softmax(-1)
            candidates += [(total + p, tokens + [t]) for t, p in enumerate(log_p.tolist())]
        candidates = sorted(candidates, reverse=True)[: 2 * width]
        finished += [
            total / length**penalty
            for total, tokens in candidates
            if tokens[-1] == EOS or length == limit
        ]
        hypotheses = [c for c in candidates if c[1][-1] != EOS][:width]
    return max(finished)


@pytest.mark.parametrize("width, penalty", [(2, 1.0), (3, 0.0), (4, 0.7), (5, 1.5)])
def test_beam_search_matches_a_plain_python_beam_search(width, penalty):
    for seed in range(4):
        model = beam_model(seed, vocab_size=8)
        sources = [[3, 4, 6, 5], [7, 7], [6]]
        found = model.beam_search(sources, width, penalty, 7)
        for source, hypotheses in zip(sources, found):
            assert hypotheses[0].score == pytest.approx(
                plain_beam_search(model, source, width, penalty, 7), abs=1e-9
            )


def test_best_candidates_reproduce_the_example_in_the_comment():
    """Step 2 of the example before `beam_search`, with a = 0, b = 1, and <EOS> = 2."""
    log_p = torch.tensor([[-1.1, -1.2, -1.0], [-0.1, -2.9, -3.2]])
    sums, parent, token = best_candidates(torch.tensor([[-0.5, -1.2]]), log_p, 2)
    expected = torch.tensor([[-1.3, -1.5, -1.6, -1.7]])
    torch.testing.assert_close(sums, expected, atol=0.01, rtol=0)
    assert parent.tolist() == [[1, 0, 0, 0]] and token.tolist() == [[0, 2, 0, 1]]


def test_beam_search_stops_when_no_live_beam_can_win():
    """A model that is almost certain of <EOS> needs one step, although 30 are allowed."""
    model = random_model("encoder_decoder")
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(50 * model.output.weight[EOS])
    trace = []
    found = model.beam_search([[6, 7]], 3, 0.0, 30, trace)[0]
    assert found[0].tokens == [EOS] and len(trace) == 1


def test_a_very_wide_beam_finds_every_answer_once():
    found = beam_model(0).beam_search([[3, 4]], 1000, 1.0, 2)[0]
    assert (
        len(found) <= 21
    )  # <EOS> alone, and 4 * 5 answers of length two: all that exist, each once
    assert len({tuple(h.tokens) for h in found}) == len(found)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"beam_width": 0}, "beam_width=0"),
        ({"length_penalty": -1.0}, "length_penalty=-1"),
        ({"length_penalty": math.nan}, "length_penalty=nan"),
        ({"beam_width": 10**7}, "beam_width=10000000"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 65}, "max_len=64"),
        ({"sources": []}, "at least one"),
        ({"sources": [[]]}, "at least one"),
        ({"sources": [[99]]}, "outside the vocabulary"),
    ],
)
def test_invalid_beam_settings_are_rejected(options, words):
    sources = options.pop("sources", PROMPTS) if "sources" in options else PROMPTS
    with pytest.raises(ValueError, match=words):
        random_model("encoder_decoder").beam_search(sources, **options)


@pytest.mark.parametrize("name", MODELS)
def test_translate_rejects_empty_and_malformed_input(name):
    model = random_model(name)
    for nothing in ([], [[]], [["4"], []], ["4 0 7"], [[4, 0, 7]], None, "4 0 7"):
        with pytest.raises(ValueError, match="cannot be translated: give a list of lists"):
            SCRIPTS[name].translate(model, nothing)
    assert (
        len(SCRIPTS[name].translate(model, [["4", "x"], ["7"]])) == 2
    )  # an unknown token is read as <UNK>


@pytest.mark.parametrize("name", WRITERS)
def test_generation_ends_as_soon_as_every_row_has_ended(name):
    for seed in range(8):
        torch.manual_seed(seed)
        model, steps = random_model(name), []
        with torch.no_grad():
            model.output.weight[EOS] *= 2
        rows = model.generate(PROMPTS, 25)
        layers = getattr(model, "layers", None) or model.decoder_layers
        layers[0].register_forward_pre_hook(lambda *_, steps=steps: steps.append(1))
        assert model.generate(PROMPTS, 25) == rows
        assert len(steps) == max(map(len, rows))
