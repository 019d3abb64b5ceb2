"""Set every constant of every script to bad values: is each rejected in one line, before any work?

    python tests/bad_constants.py            (about 40 minutes; prints a row for each script)
    python tests/bad_constants.py decoder_only variations/alibi

Not collected by pytest. A case is

    clean      one line on stderr that names the constant, exit code 2, nothing printed before it
    accepted   the value works: a run with it ends with exit code 0
    late       rejected, but after the script had started to work
    traceback  the message is not one line
    hang       no end within the time limit

Each case first runs in a process that has already imported the script. As soon as the script starts
to work (its first line of output), that run is given up, and the case runs again as a user would
run it, from its own copy, with small values for all other constants.
"""

import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

BAD = [
    "None", "True", "'64'", "''", "[]", "(2.5,)", "{}", "object", "-1", "0", "3", "1.5", "2 ** 70",
    "10 ** 9", "10 ** 400", "1e308", "float('nan')", "float('inf')", "-float('inf')", "1e-300",
    "1 + 2j", "b'4'",
]  # fmt: skip
# Small values, so that a run whose bad value is accepted ends soon.
SMALL = {
    "D_MODEL": 16, "NUM_HEADS": 2, "NUM_LAYERS": 1, "D_FF": 16, "NUM_SAMPLES": 300,
    "NUM_EPOCHS": 1, "FINETUNE_EPOCHS": 1, "TRAIN_EPOCHS": 1, "NUM_STEPS": 2, "ABLATION_STEPS": 1,
    "FEW_STEPS": 1, "UNDERTRAINED_STEPS": 1, "FEW_SEQUENCES": (2,), "ABLATION_LAYERS": (1,),
    "WARMUP_STEPS": 1, "EVALUATE_EVERY": 9, "BATCH_SIZE": 32,
}  # fmt: skip
FULL = ("FULL", "True")
LIMIT = 300  # seconds; the longest case that works took 90


def constants_of(script):
    """The names in the blocks of constants of a script, with their values."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    blocks = re.findall(r"# CONSTANTS - .*\n# =+\n((?:.*\n)*?)# =+\n", text)
    return re.findall(r"^([A-Z_]+) = (.*?)(?:  #.*)?$", "".join(blocks), flags=re.MULTILINE)


WORKER = """
import contextlib, importlib, io, math, pathlib, sys
sys.path[:0] = ["variations", "."]
script = importlib.import_module(pathlib.Path(sys.argv[1]).name)
from housekeeping import run_script

class Started(BaseException):
    pass

class Output(io.StringIO):
    def write(self, text):
        raise Started

for line in sys.stdin:
    name, value = line.rstrip("\\n").split("=", 1)
    before, errors = getattr(script, name), io.StringIO()
    setattr(script, name, eval(value))
    sys.argv = ["x.py"]
    outcome = "returned"
    try:
        with contextlib.redirect_stdout(Output()), contextlib.redirect_stderr(errors):
            run_script(script.main)
    except Started:
        outcome = "started"
    except SystemExit as error:
        line = errors.getvalue()
        one_line = error.code == 2 and line.startswith("error: ") and line.count("\\n") == 1
        outcome = "clean" if one_line and name in line else "traceback"
    except BaseException as error:
        outcome = "traceback"
    setattr(script, name, before)
    print(outcome, flush=True)
"""


def quick(script, cases):
    """The outcome of each case in a process that has imported the script; None = not decided."""
    outcomes = []
    while len(outcomes) < len(cases):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, script], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        for name, value in cases[len(outcomes) :]:
            watchdog = threading.Timer(LIMIT, process.kill)
            watchdog.start()
            try:
                process.stdin.write(f"{name}={value}\n")
                process.stdin.flush()
                answer = process.stdout.readline().strip()
            except OSError:
                answer = ""
            watchdog.cancel()
            outcomes.append(answer if answer in ("clean", "traceback") else None)
            if not answer:  # it hung or died: decide it below, and start another process
                break
        process.kill()
        process.communicate()
    return outcomes


def slow(script, name, value):
    """The outcome of a whole run, as a user runs it."""
    from conftest import Workplace

    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        known = {constant for constant, _ in constants_of(script)}
        place.set(script, **{k: v for k, v in SMALL.items() if k in known and k != name})
        place.set(script, **{name: value.replace("\\", "\\\\")})
        try:
            done = place.run(script, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "hang"
    if done.returncode == 0:
        return "accepted"
    if done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "):
        if not done.stdout:
            return "clean"
        # A loss that explodes can only be found while training.
        return "accepted" if "became" in done.stderr else "late"
    return "traceback"


def main():
    files = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("variations/*.py"))]
    names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in files]
    scripts = sys.argv[1:] or [name for name in names if constants_of(name)]
    kinds = ("clean", "accepted", "late", "traceback", "hang")
    totals = dict.fromkeys(kinds, 0)
    print(f"{'script':34s}{'constants':>10s}{'cases':>7s}" + "".join(f"{k:>11s}" for k in kinds))
    for script in scripts:
        names = [name for name, _ in constants_of(script)]
        # FULL = True is a good value, but it takes many minutes.
        cases = [(name, value) for name in names for value in BAD if (name, value) != FULL]
        outcomes = quick(script, cases)
        with ThreadPoolExecutor(2) as pool:
            undecided = [case for case, outcome in zip(cases, outcomes) if outcome is None]
            decided = iter(list(pool.map(lambda case, s=script: slow(s, *case), undecided)))
        outcomes = [outcome or next(decided) for outcome in outcomes]
        counts = {kind: outcomes.count(kind) for kind in kinds}
        print(
            f"{script:34s}{len(names):10d}{len(cases):7d}"
            + "".join(f"{counts[kind]:11d}" for kind in kinds),
            flush=True,
        )
        for (name, value), outcome in zip(cases, outcomes):
            totals[outcome] += 1
            if outcome in kinds[2:]:
                print(f"    {outcome}: {name} = {value}", flush=True)
    print(f"{'all':34s}{'':17s}" + "".join(f"{totals[kind]:11d}" for kind in kinds))
    sys.exit(any(totals[kind] for kind in kinds[2:]))


if __name__ == "__main__":
    main()
