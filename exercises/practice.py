"""
practice.py - write the parts, find the bugs, predict the numbers

    python exercises/practice.py                list the exercises, and what comes next
    python exercises/practice.py start N        prepare exercise N, and say what to do
    python exercises/practice.py check N        is it right? (without N: the current exercise)
    python exercises/practice.py watch N        check again whenever you save the file
    python exercises/practice.py hint N         three hints, one at a time
    python exercises/practice.py solution N     show the difference from the original
    python exercises/practice.py reset N        begin again; your file is kept under another name
    python exercises/practice.py interview      four bugs in one file, and a clock

N is a number or a name. Your files are in exercises/work/. `check N --verbose` shows tracebacks.
"""
import ast
import contextlib
import difflib
import io
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
import tokenize
import traceback
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bugs import BUGS, INTERVIEW
from fill_in import BLANKS
from planted_mistakes import MISTAKES
from predict import QUESTIONS

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("PRACTICE_WORK", ROOT / "exercises" / "work"))
SECONDS = float(os.environ.get("PRACTICE_SECONDS", "30"))  # then a check is stopped
SLOW = {"tiny_gpt": 300, "interview": 120}
REPLACEMENTS = {name: (old, new) for name, old, new in MISTAKES}
SOFTMAX = '''def softmax(scores):
    """Return the weights of `scores` (..., S): exp(scores) / sum(exp(scores)) in each row.

        softmax([[2.0, 0.0, 2.0]])   ->   [[0.47, 0.06, 0.47]]
    """
    return scores.softmax(-1)
'''


class Exercise(NamedTuple):
    number: int
    name: str
    kind: str  # "fill in", "find the bug", or "predict"
    group: str
    minutes: int
    script: str
    entry: tuple

    @property
    def file(self):
        return WORK / f"{self.number:02}_{self.name}.py"

    @property
    def label(self):
        """What follows a command: the number. The interview has none."""
        return str(self.number or self.name)

    @property
    def path(self):
        """How the file is called from the current folder."""
        return Path(os.path.relpath(self.file)).as_posix()


def exercises():
    """Return all exercises in order."""
    rows = [(blank.name, "fill in", blank.group, blank.minutes, blank.script, blank)
            for blank in BLANKS]
    rows += [(f"bug_{i:02}", "find the bug", group, minutes, script, (mistake,))
             for i, (group, minutes, script, mistake) in enumerate(BUGS, 1)]
    rows += [(question.name, "predict", question.group, question.minutes, "", question)
             for question in QUESTIONS]
    return [Exercise(number, *row) for number, row in enumerate(rows, 1)]


def find(word):
    """Return the exercise with this number or name, or the interview. Stops if there is none."""
    if word == "interview":
        return Exercise(0, "interview", "find the bug", "", 45, "decoder_only.py", ())
    for exercise in exercises():
        if word in (str(exercise.number), f"{exercise.number:02}", exercise.name):
            return exercise
    stop(f"there is no exercise {word!r}: use 1 to {len(exercises())}, or a name of the list")


def stop(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- What the learner has done ----------------------------------------------------------
def load_progress():
    """Return the stored progress, or a new one if there is none or it cannot be read."""
    fresh = {"done": [], "current": None, "hints": {}, "answers": {}, "interview": None}
    try:
        return {**fresh, **json.loads((WORK / "progress.json").read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return fresh
    except (ValueError, TypeError):
        print("progress.json cannot be read, so all exercises count as open; your files are intact")
        return fresh


def save_progress(progress):
    WORK.mkdir(exist_ok=True)
    temporary = WORK / "progress.tmp"
    temporary.write_text(json.dumps(progress, indent=1), encoding="utf-8")
    os.replace(temporary, WORK / "progress.json")


def mark_done(exercise):
    progress = load_progress()
    progress["done"] = sorted({*progress["done"], exercise.name})
    save_progress(progress)


# --- The files that the learner works on ------------------------------------------------
def original(exercise):
    """Return the text of the script of an exercise, as it is without blanks and bugs."""
    if exercise.name == "softmax":
        return '"""softmax, by hand."""\nimport torch\n\n\n' + SOFTMAX
    return (ROOT / exercise.script).read_text(encoding="utf-8")


def find_node(text, place):
    """Return the syntax tree of the function `place`, such as "Class.method"."""
    node = ast.parse(text)
    for name in place.split("."):
        node = next(child for child in node.body if getattr(child, "name", "") == name)
    return node


def cut_out(text, place, turn="your turn"):
    """Return `text` without the body of the function `place`, such as "Class.method".

    The signature and the docstring stay. A whole file (place "") keeps only its docstring.
    """
    lines = text.splitlines()
    if not place:
        return "\n".join(lines[:ast.parse(text).body[0].end_lineno]) + "\n\n# Your turn.\n"
    node = find_node(text, place)
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    begin = first.end_lineno if documented else first.lineno - 1
    indent = " " * first.col_offset
    blank = [f"{indent}raise NotImplementedError  # {turn}"]
    return "\n".join(lines[:begin] + blank + lines[node.end_lineno:]) + "\n"


def docstring(exercise):
    """Return the docstring of the function to write: its shapes, and often an example."""
    node = find_node(original(exercise), exercise.entry.place)
    return ast.get_docstring(node) or "(it has no docstring)"


def without_comments(text):
    """Return `text` without its comments, which would tell where a bug is."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() or "\0"
    return "\n".join(line for line in lines if line != "\0") + "\n"


def plant(text, mistakes):
    """Return `text` with the planted mistakes of these names, and without comments."""
    for mistake in mistakes:
        old, new = REPLACEMENTS[mistake]
        assert old in text, mistake
        text = text.replace(old, new)
    # A lone `pass` would show where a line was.
    return re.sub(r"(?m)^( *)pass\n(?=\1\S)", "", without_comments(text))


def with_header(text, exercise):
    """Insert lines after the docstring, so that the file runs from exercises/work/."""
    end = ast.parse(text).body[0].end_lineno
    lines = text.splitlines()
    header = [f"# Exercise {exercise.number}, {exercise.name}. These lines let it run from here.",
              "import sys as _sys", "from pathlib import Path as _Path",
              "_sys.path.insert(0, str(_Path(__file__).resolve().parents[2]))",
              "import housekeeping as _housekeeping",
              "_housekeeping.CHECKPOINTS = _Path(__file__).resolve().parent / 'checkpoints'", ""]
    if exercise.name in ("softmax", "tiny_gpt"):
        header = header[:1]
    return "\n".join(lines[:end] + header + lines[end:]) + "\n"


def fresh_text(exercise, mistakes=()):
    """Return what `start` writes."""
    text = original(exercise)
    if exercise.kind == "fill in":
        for later in BLANKS:  # their solutions would be in sight
            if later.script == exercise.script and later.place and exercise.entry.place \
                    and BLANKS.index(later) > BLANKS.index(exercise.entry):
                text = cut_out(text, later.place, f"the exercise {later.name} comes later")
        return with_header(cut_out(text, exercise.entry.place), exercise)
    return with_header(plant(text, mistakes or exercise.entry), exercise)


def solved_text(exercise):
    """Return the file of an exercise with the original code."""
    text = original(exercise)
    return with_header(text if exercise.kind == "fill in" else without_comments(text), exercise)


# --- Commands ---------------------------------------------------------------------------
def show_list():
    progress, kind, group = load_progress(), None, None
    finished = {*progress["done"], *progress["answers"]}
    following = next((e for e in exercises() if e.name not in finished), None)
    for e in exercises():
        if e.kind != kind:
            kind, some = e.kind, [x for x in exercises() if x.kind == e.kind]
            done = sum(x.name in progress["done"] for x in some)
            print(f"\n{kind}   {done} of {len(some)} done, {sum(x.minutes for x in some)} minutes")
        if e.group != group:
            group = e.group
            print(f"  {group}")
        mark = "x" if e.name in progress["done"] else ">" if e == following else \
            "-" if e.name in progress["answers"] else " "
        print(f"   [{mark}] {e.number:2}  {e.name:20s}{e.minutes:3} min   {e.script}")
    if following is None:
        print("\nAll done. The interview is left: python exercises/practice.py interview")
    else:
        print(f"\nnext: python exercises/practice.py start {following.number}")


def start(exercise):
    progress = load_progress()
    progress["current"] = exercise.name
    save_progress(progress)
    print(f"{exercise.number}  {exercise.name}   ({exercise.kind}, about {exercise.minutes} min)\n")
    if exercise.kind == "predict":
        print(exercise.entry.text)
        print(f"\nThen: python exercises/practice.py check {exercise.number} YOUR_ANSWER")
        return
    if exercise.file.exists():
        print(f"You have begun it: {exercise.path}")
        print(f"(To begin again: reset {exercise.number}. Your file is then kept.)")
    else:
        WORK.mkdir(exist_ok=True)
        exercise.file.write_text(fresh_text(exercise), encoding="utf-8")
    print(f"open   {exercise.path}{line_of(exercise)}")
    if exercise.kind == "fill in":
        print(textwrap.fill(f"task   {exercise.entry.task}", 88, subsequent_indent=7 * " "))
        print(textwrap.fill(f"right  {exercise.entry.right}", 88, subsequent_indent=7 * " "))
        if exercise.entry.place:
            print("\n" + textwrap.indent(docstring(exercise), 7 * " "))
    else:
        print("task   This script has one bug, and its comments are gone. Run it, and see what is\n"
              "       wrong. If nothing is, read it. Then repair the bug.")
        print(f"run    python {exercise.path}")
    print(f"\nThen: python exercises/practice.py check {exercise.number}")


def line_of(exercise):
    """Return ", line N" of the function to write, if the learner's file still has it."""
    try:
        text = exercise.file.read_text(encoding="utf-8")
        return f", line {find_node(text, exercise.entry.place).lineno}"
    except (AttributeError, StopIteration, SyntaxError):
        return ""


def check(exercise, *words):
    """Run the check of an exercise in a process of its own. Returns True if it is right."""
    if exercise.kind == "predict":
        return check_answer(exercise, words)
    if not exercise.file.exists():
        stop(f"there is no {exercise.file.name}: run `start {exercise.label}`")
    found = re.search(r"(?m)^# Exercise \d+, (\w+)\.", exercise.file.read_text(encoding="utf-8"))
    if found and found[1] != exercise.name:
        stop(f"{exercise.file.name} is the file of exercise {found[1]}: run `reset "
             f"{exercise.number}` to get the right one; yours is kept")
    print(f"{exercise.number} of {len(exercises())}, {exercise.name}" if exercise.number
          else exercise.name, flush=True)
    if exercise.kind == "find the bug" and exercise.number \
            and exercise.file.read_text(encoding="utf-8") == fresh_text(exercise):
        print("  nothing is repaired yet: run the file, and compare what it prints with what it "
              "should")
        return False
    limit = SLOW.get(exercise.name, SECONDS)
    try:
        code = subprocess.run([sys.executable, __file__, "run-check", exercise.name, *words],
                              timeout=limit).returncode
    except subprocess.TimeoutExpired:
        print(f"  stopped after {limit:.0f} seconds: is there a loop that never ends?")
        return False
    if code == 0:
        mark_done(exercise)
        print("  right")
        if exercise.number and exercise.number < len(exercises()):
            print(f"  next: start {exercise.number + 1}")
    else:
        print(f"  (hint {exercise.label} helps)")
    return code == 0


def check_answer(exercise, words):
    """Store the learner's answer first, and then compute the truth."""
    try:
        text = " ".join(words) or input("your answer: ")
    except EOFError:
        stop(f"write the answer after the number: check {exercise.number} 3.2")
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text) if exercise.group == "sizes" else text
    if not re.fullmatch(r"[\s(\[]*-?\d+\.?\d*(e-?\d+)?%?([\s,x]+\d+)*[\s)\]]*", plain):
        stop(f"{ascii(text)} is not a number or a shape: write one such as 3.2 or 2,4,5,6")
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", plain)]
    numbers = [number / 100 for number in numbers] if "%" in plain else numbers
    progress = load_progress()
    first = exercise.name not in progress["answers"]
    progress["answers"].setdefault(exercise.name, text)
    save_progress(progress)
    run = subprocess.run([sys.executable, __file__, "run-truth", exercise.name],
                         capture_output=True, text=True, timeout=300)
    if run.returncode:
        print(run.stderr, file=sys.stderr)
        stop("the scripts cannot compute the answer: did you change one of them?")
    truth = json.loads(run.stdout)
    expected = truth if isinstance(truth, list) else [truth]
    right = len(numbers) == len(expected) and all(
        abs(a - b) <= exercise.entry.within * abs(b) + 1e-9 for a, b in zip(numbers, expected))
    shown = tuple(truth) if isinstance(truth, list) else float(f"{truth:.4g}") \
        if isinstance(truth, float) else truth
    print(f"  yours  {text}\n  truth  {shown}\n  why    {exercise.entry.truth.__doc__}")
    print("  right" if right else "  not this time")
    if not first:
        print(f"  (your first answer counts: {progress['answers'][exercise.name]})")
    if right and first:
        mark_done(exercise)
    return right


def watch(exercise):
    if exercise.kind == "predict":
        stop("there is no file to watch: use `check`")
    print("watching; Ctrl-C ends", flush=True)
    seen = None
    while True:
        changed = exercise.file.stat().st_mtime if exercise.file.exists() else None
        if changed != seen:
            seen = changed
            if check(exercise):
                return
        time.sleep(0.3)


def hint(exercise):
    if exercise.kind == "predict":
        print("The check tells you why. Commit to a number first: a wrong one teaches more.")
        return
    if exercise.kind == "find the bug":
        stage = {"loud": "Which stage is wrong first: the data, the loss, or the answers?",
                 "quiet": "Compare a batch with its rows, and a run with and without the cache.",
                 "silent": "Which property does each function promise? Test it with two numbers."}
        hints = (stage.get(exercise.group.split(":")[0], stage["silent"]),
                 f"Look at {place_of(exercise)}." if exercise.number else "Test the functions one "
                 "by one.",
                 f"`check {exercise.label} --verbose` names the first property "
                 "that does not hold.")
    else:
        hints = exercise.entry.hints
    progress = load_progress()
    shown = progress["hints"].get(exercise.name, 0)
    progress["hints"][exercise.name] = min(shown + 1, len(hints))
    save_progress(progress)
    for number, text in enumerate(hints[:shown + 1], 1):
        print(f"{number} of {len(hints)}  {text}")


def place_of(exercise):
    """Return the name of the function in which a bug is planted."""
    text = original(exercise)
    line = text[:text.index(REPLACEMENTS[exercise.entry[0]][0])].count("\n") + 1
    nodes = [node for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno]
    return max(nodes, key=lambda node: node.lineno).name


def solution(exercise):
    if exercise.kind == "predict":
        stop("the check tells you the answer: use `check`")
    if not exercise.file.exists():
        stop(f"there is no {exercise.file.name}: run `start {exercise.label}`")
    if input("Show the solution? Type yes: ").strip().lower() != "yes":
        return
    mine = exercise.file.read_text(encoding="utf-8")
    print("\n".join(difflib.unified_diff(mine.splitlines(), solved_text(exercise).splitlines(),
                                         "yours", "the original", lineterm="", n=2)))


def reset(exercise):
    if exercise.kind == "predict":
        stop("there is no file to reset")
    if exercise.file.exists():
        number = 1
        while (kept := exercise.file.with_suffix(f".{number}.py")).exists():
            number += 1
        exercise.file.rename(kept)
        print(f"your file is kept as {kept.name}")
    if exercise.name == "interview":
        interview()
    else:
        start(exercise)


def interview():
    """Plant four bugs in one file, and start the clock."""
    exercise, progress = find("interview"), load_progress()
    if exercise.file.exists():
        stop(f"you have begun one: {exercise.file.name}. Use `check interview` or "
             "`reset interview`")
    text, chosen = original(exercise), []
    for mistake in random.sample(INTERVIEW, len(INTERVIEW)):
        old, new = REPLACEMENTS[mistake]
        if old in text and len(chosen) < 4:  # an earlier one may have changed its place
            text = text.replace(old, new)
            chosen.append(mistake)
    WORK.mkdir(exist_ok=True)
    exercise.file.write_text(fresh_text(exercise, chosen), encoding="utf-8")
    progress["interview"] = {"began": time.time()}  # not the bugs: a learner may look
    save_progress(progress)
    print(f"open   {exercise.path}\n"
          "task   A colleague sends you this GPT: \"It doesn't work, and I don't know why.\"\n"
          "       There are four bugs. Aim at 45 minutes.\n\n"
          "Then: python exercises/practice.py check interview")


# --- In a process of its own ------------------------------------------------------------
def load(path, name):
    """Return the file as a module. `name` must not be __main__, or it would train."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_check(exercise, verbose=False):
    """Check the learner's file and exit with 0 if it is right."""
    import checks
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    wanted = [getattr(checks, exercise.name, None)] if exercise.kind == "fill in" \
        else checks.FOR_SCRIPT[exercise.script]
    failed = 0
    try:
        mine = load(exercise.file, "mine")
        if exercise.name == "softmax":
            real = None
        elif exercise.name == "tiny_gpt":
            real = checks.SimpleTiny()
        else:
            real = load(ROOT / exercise.script, "real")
        for one in wanted:
            if exercise.kind == "fill in" or verbose:
                one(mine, real)
                continue
            try:  # where the bug is must not be told
                with contextlib.redirect_stdout(io.StringIO()):
                    one(mine, real)
            except Exception:
                failed += 1
                if exercise.name != "interview":
                    break
        if failed and exercise.name != "interview":
            print("  wrong  the bug is still there, or there is a new one")
            sys.exit(1)
    except checks.Wrong as error:
        first, *rest = str(error).splitlines()
        print("\n".join([f"  wrong  {first}", *(f"         {line}" for line in rest)]))
        sys.exit(1)
    except NotImplementedError:
        print("  wrong  nothing is written yet: look for \"your turn\" (or your code calls a part\n"
              "         of a later exercise, which is cut out, too)")
        sys.exit(1)
    except SyntaxError as error:
        print(f"  wrong  line {error.lineno} is not Python: {error.msg}\n         {error.text}")
        sys.exit(1)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)
                  if Path(frame.filename) == exercise.file]
        mine = getattr(exercise.entry, "place", "").split(".")[-1]
        frames = [frame for frame in frames if frame.name == mine] or frames
        if frames:
            print(f"  wrong  your line {frames[-1].lineno}: {frames[-1].line}")
        print(f"  {'      ' if frames else 'wrong '} {type(error).__name__}: "
              f"{str(error).splitlines()[0] if str(error) else ''}")
        if exercise.kind == "fill in":
            print(f"         right means: {exercise.entry.right}")
        sys.exit(1)
    if exercise.name == "interview":
        began = load_progress()["interview"]
        print(f"  {len(wanted) - failed} of {len(wanted)} properties hold, after "
              f"{(time.time() - began['began']) / 60:.0f} minutes")
        sys.exit(failed > 0)


def run_truth(exercise):
    print(json.dumps(exercise.entry.truth()))


COMMANDS = {"start": start, "check": check, "watch": watch, "hint": hint, "solution": solution,
            "reset": reset}


def main():
    command, *words = sys.argv[1:] or ["list"]
    if command in ("help", "--help", "-h"):
        return print(__doc__.strip())
    if command == "list" and not words:
        return show_list()
    if command == "interview" and not words:
        return interview()
    if command == "run-check":
        return run_check(find(words[0]), "--verbose" in words)
    if command == "run-truth":
        return run_truth(find(words[0]))
    if command not in COMMANDS:
        stop(f"{command!r} is no command: use start, check, watch, hint, solution, reset, or "
             "interview")
    name = words[0] if words else load_progress()["current"]
    if name is None:
        stop(f"which exercise? Use `{command} 1`, for example")
    if command == "check":
        sys.exit(0 if check(find(name), *words[1:]) else 1)
    COMMANDS[command](find(name))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; your files are intact", file=sys.stderr)
        sys.exit(130)
