"""The exercises: no blank or bug passes its check, right solutions do, and no hint tells."""
import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import tokenize

import pytest

import practice
from conftest import ROOT
from other_solutions import OTHERS, WRONG
from planted_mistakes import MISTAKES

BLANKS = [e for e in practice.exercises() if e.kind == "fill in"]
BUGS = [e for e in practice.exercises() if e.kind == "find the bug"]
QUESTIONS = [e for e in practice.exercises() if e.kind == "predict"]
QUICK = [e for e in BLANKS if e.name != "tiny_gpt"]


def name_of(exercise):
    return exercise.name


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(practice, "WORK", tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "work"


def verdict(exercise, text):
    """What the check prints about a file with this text, and whether it passes."""
    practice.WORK.mkdir(exist_ok=True)
    here = repr(str(ROOT))
    exercise.file.write_text(text.replace("str(_Path(__file__).resolve().parents[2])", here),
                             encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            practice.run_check(exercise)
        except SystemExit as end:
            return out.getvalue(), not end.code
    return out.getvalue(), True


def function_of(exercise):
    """The part of the script's text that is cut out, with its signature."""
    text = practice.original(exercise)
    node = ast.parse(text)
    for name in exercise.entry.place.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1:node.end_lineno]) + "\n"


# --- Fill in ----------------------------------------------------------------------------
@pytest.mark.parametrize("exercise", QUICK, ids=name_of)
def test_a_blank_fails_and_right_solutions_pass(exercise, work):
    fresh = practice.fresh_text(exercise)
    printed, passed = verdict(exercise, fresh)
    assert not passed and "nothing is written yet" in printed
    for later in BLANKS[BLANKS.index(exercise) + 1:]:  # their solutions are not in sight
        if later.script == exercise.script and later.entry.place:
            assert function_of(later) not in fresh
    assert verdict(exercise, practice.solved_text(exercise))[1]
    text, function = practice.solved_text(exercise), function_of(exercise)
    assert text.count(function) == 1
    printed, passed = verdict(exercise, text.replace(function, OTHERS[exercise.name].lstrip("\n")))
    assert passed, printed


@pytest.mark.parametrize("exercise", QUICK, ids=name_of)
def test_each_planted_mistake_in_a_blank_fails(exercise, work):
    text, function = practice.solved_text(exercise), function_of(exercise)
    for name, old, new in MISTAKES:
        if old in function:
            broken = text.replace(function, function.replace(old, new))
            printed, passed = verdict(exercise, broken)
            assert not passed, name
            assert "wrong" in printed and printed.isascii()


@pytest.mark.parametrize("name, old, new", WRONG)
def test_a_plausible_wrong_solution_fails(name, old, new, work):
    exercise = practice.find(name)
    text, function = practice.solved_text(exercise), function_of(exercise)
    assert old in function
    printed, passed = verdict(exercise, text.replace(function, function.replace(old, new)))
    assert not passed and "wrong" in printed


def test_no_hint_contains_a_line_of_the_solution():
    for exercise in BLANKS:
        hints = " ".join([*exercise.entry.hints, exercise.entry.task, exercise.entry.right])
        lines = [line.strip() for line in practice.original(exercise).splitlines()] \
            if not exercise.entry.place else function_of(exercise).splitlines()[1:]
        assert len(exercise.entry.hints) == 3
        for line in map(str.strip, lines):
            assert len(line) < 12 or line.split("  #")[0] not in hints, (exercise.name, line)


def test_tiny_gpt_is_judged_by_what_it_learns(work):
    exercise = practice.find("tiny_gpt")
    assert "defines no encode" in verdict(exercise, practice.fresh_text(exercise))[0]
    whole = practice.solved_text(exercise)
    assert "not so" in verdict(exercise, whole.replace("STEPS, ROWS, D", "_, STEPS, ROWS, D")
                               .replace("0, 700, 64, 64", "0, 0, 5, 64, 64"))[0]
    printed, passed = verdict(exercise, whole)
    assert passed, printed


# --- Find the bug -----------------------------------------------------------------------
@pytest.mark.parametrize("exercise", BUGS, ids=name_of)
def test_a_bug_fails_its_repair_passes_and_a_wrong_repair_fails(exercise, work):
    broken = practice.fresh_text(exercise)
    assert not verdict(exercise, broken)[1]
    assert verdict(exercise, practice.solved_text(exercise))[1]
    other = BUGS[(BUGS.index(exercise) + 1) % len(BUGS)]
    while other.script != exercise.script:
        other = BUGS[(BUGS.index(other) + 1) % len(BUGS)]
    wrong = practice.plant(practice.original(exercise), other.entry)
    assert not verdict(exercise, practice.with_header(wrong, exercise))[1]


def test_a_broken_script_has_no_comments_that_tell():
    for exercise in BUGS:
        text = io.StringIO(practice.fresh_text(exercise))
        comments = [token.string for token in tokenize.generate_tokens(text.readline)
                    if token.type == tokenize.COMMENT]
        assert len(comments) == 1 and comments[0].startswith("# Exercise")


def test_the_interview_plants_four_bugs_and_reports(work, capsys):
    practice.interview()
    exercise = practice.find("interview")
    text = exercise.file.read_text(encoding="utf-8")
    assert "bugs" not in practice.load_progress()["interview"]
    with pytest.raises(SystemExit):  # the first one is not lost
        practice.interview()
    printed, passed = verdict(exercise, text)
    holding, of = map(int, re.search(r"(\d+) of (\d+) properties", printed).groups())
    assert not passed and 3 <= of - holding < of  # four bugs, of which two may be in one function
    printed, passed = verdict(exercise, practice.solved_text(exercise))
    assert passed and f"{of} of {of} properties hold, after 0 minutes" in printed


# --- Predict ----------------------------------------------------------------------------
@pytest.mark.parametrize("exercise", QUESTIONS, ids=name_of)
def test_the_truth_of_a_question_is_computed_and_explained(exercise, work, monkeypatch, capsys):
    def run(command, **_):  # in this process, because importing torch takes a second
        with contextlib.redirect_stdout(io.StringIO()) as out:
            practice.run_truth(practice.find(command[-1]))
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", run)
    truth = exercise.entry.truth()
    text = ",".join(map(str, truth)) if isinstance(truth, tuple) else str(truth)
    wrong = ",".join(str(2 * n + 1) for n in (truth if isinstance(truth, tuple) else (truth,)))
    assert not practice.check(exercise, wrong)
    assert practice.load_progress()["answers"][exercise.name] == wrong  # committed before the truth
    assert practice.check(exercise, text)
    assert exercise.entry.truth.__doc__ in capsys.readouterr().out
    assert exercise.name not in practice.load_progress()["done"]  # the first answer counts
    practice.save_progress({**practice.load_progress(), "answers": {}})
    assert practice.check(exercise, text) and exercise.name in practice.load_progress()["done"]


# --- The program ------------------------------------------------------------------------
def test_the_program_starts_without_torch():
    code = "import sys; sys.argv = ['practice.py']; import practice; practice.main(); " \
           "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "exercises", text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f"0 of {len(BLANKS)} done" in done.stdout or "done" in done.stdout


def test_every_exercise_can_be_started_hinted_and_reset(work, capsys, monkeypatch):
    for exercise in practice.exercises():
        practice.start(exercise)
        assert f"check {exercise.number}" in capsys.readouterr().out
        for number in range(1, 5):
            practice.hint(exercise)
            assert f"{min(number, 3)} of 3" in capsys.readouterr().out or exercise.kind == "predict"
        if exercise.kind == "predict":
            continue
        first = exercise.file.read_text(encoding="utf-8")
        exercise.file.write_text(first + "# mine\n", encoding="utf-8")
        practice.start(exercise)  # does not overwrite
        assert exercise.file.read_text(encoding="utf-8").endswith("# mine\n")
        monkeypatch.setattr("builtins.input", lambda _: "yes")
        practice.solution(exercise)
        shown = capsys.readouterr().out
        assert "\n-# mine" in shown and shown.count("\n+") >= 1
        practice.reset(exercise)
        assert exercise.file.read_text(encoding="utf-8") == first
        assert exercise.file.with_suffix(".1.py").read_text(encoding="utf-8").endswith("# mine\n")
    practice.show_list()
    assert capsys.readouterr().out.isascii()


def run(work, *words):
    """The program as a learner runs it, from another folder."""
    return subprocess.run([sys.executable, str(ROOT / "exercises" / "practice.py"), *words],
                          cwd=work.parent, capture_output=True, text=True,
                          env={**os.environ, "PRACTICE_WORK": str(work), "PRACTICE_SECONDS": "9"})


def test_a_learner_starts_checks_solves_and_goes_on(work):
    practice.start(practice.find("causal_mask"))
    path = practice.find("causal_mask").file
    for text, expected in (
            ("raise NotImplementedError  # your turn", "nothing is written yet"),
            ("return torch.ones(queries, keys).tril()", "another shape"),
            ("return torch.ones(queries, keys).tril()[None, None] > 0", "first difference at"),
            ("return undefined", "your line"), ("return (", "is not Python")):
        whole = practice.fresh_text(practice.find("causal_mask"))
        path.write_text(whole.replace("raise NotImplementedError  # your turn", text),
                        encoding="utf-8")
        printed, passed = verdict(practice.find("causal_mask"), path.read_text(encoding="utf-8"))
        assert not passed and expected in printed and "Traceback" not in printed
    path.write_text(practice.solved_text(practice.find("causal_mask")), encoding="utf-8")
    done = run(work, "check")  # the current one
    assert done.returncode == 0 and "  right\n  next: start 12" in done.stdout, done.stdout
    assert "[x] 11  causal_mask" in run(work).stdout
    assert "  right\n" in run(work, "watch", "11").stdout


@pytest.mark.parametrize("words, code, expected", [
    (("start", "99"), 2, "no exercise '99'"), (("dance",), 2, "'dance' is no command"),
    (("check",), 2, "which exercise?"), (("check", "2"), 2, "there is no 02_pad_rows.py"),
    (("check", "first_loss", "many"), 2, "'many' is not a number"),
    (("check", "first_loss", "ln26"), 2, "'ln26' is not a number")])
def test_a_wrong_command_gets_one_line(work, words, code, expected, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["practice.py", *words])
    with pytest.raises(SystemExit) as end:
        practice.main()
    printed = capsys.readouterr()
    assert end.value.code == code and expected in printed.err and printed.err.count("\n") == 1


def test_a_file_of_another_exercise_is_refused(work, capsys):
    one, two = practice.find("1"), practice.find("2")
    practice.start(one)
    two.file.write_text(one.file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit):
        practice.check(two)
    assert "is the file of exercise encode" in capsys.readouterr().err


def test_an_endless_loop_is_stopped(work, monkeypatch, capsys):
    exercise = practice.find("pad_rows")
    practice.start(exercise)
    text = exercise.file.read_text(encoding="utf-8")
    exercise.file.write_text(text.replace("raise NotImplementedError  # your turn",
                                          "while True: pass"), encoding="utf-8")
    began, done = time.time(), run(work, "check", "pad_rows")
    assert "is there a loop that never ends?" in done.stdout and time.time() - began < 60
    assert done.returncode == 1 and exercise.file.exists()


def test_unreadable_progress_loses_no_file(work, capsys):
    practice.start(practice.find("1"))
    (work / "progress.json").write_text("{", encoding="utf-8")
    practice.start(practice.find("2"))
    assert "cannot be read" in capsys.readouterr().out
    assert json.loads((work / "progress.json").read_text(encoding="utf-8"))["current"] == "pad_rows"
    assert practice.find("1").file.exists()


def test_an_exercise_needs_only_what_came_before():
    names = [e.name for e in BLANKS]
    for earlier, later in (("pad_rows", "collate_fn"), ("attention", "multi_head"),
                           ("split_heads", "multi_head"), ("append", "generate"),
                           ("filter_logits", "choose_next_token"), ("encoder_layer", "pooling")):
        assert names.index(earlier) < names.index(later)
    assert len(BLANKS) >= 25 and len(BUGS) >= 20 and len(QUESTIONS) >= 15


def test_pages_and_docstrings_name_the_right_exercises():
    page = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    for exercise in BLANKS + QUESTIONS:
        assert f"| {exercise.number} {exercise.name} | {exercise.minutes} |" in page
    for group in {exercise.group for exercise in BUGS}:
        numbers = [exercise.number for exercise in BUGS if exercise.group == group]
        title, seen = group.split(": ")
        assert f"| {title} | {min(numbers)} to {max(numbers)} | {seen} |" in page
    assert f"lists {len(practice.exercises())} exercises" in page
    for script in ("toy_dataset", "encoder_only", "decoder_only", "encoder_decoder"):
        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        first, listed = re.search(r"practice.py start (\d+) +\((.*)\)", text).groups()
        spans = [list(map(int, re.findall(r"\d+", part))) for part in listed.split(",")]
        named = [n for span in spans for n in range(span[0], span[-1] + 1)]
        assert int(first) == named[0]
        assert named == [e.number for e in BLANKS if e.script == f"{script}.py"]
