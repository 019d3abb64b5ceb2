"""Kill train_all.py at chosen points and resume it: does it end with the same weights?

    python tests/kill_and_resume.py 20            (about 4 minutes; prints one row per kill)

A kill does not depend on timing: the process kills itself just before or after a certain call of a
function, such as the third call of `train_step`. The scripts are not changed for this, because a
run is only resumed if the code is the same. Not collected by pytest; test_train_all.py uses it.
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from conftest import Workplace  # noqa: E402  (the line above makes this import possible)

FILES = ["encoder_only.pt", "decoder_only.pt", "encoder_decoder.pt"]
POINTS = {  # name: (module, function, whether to kill before or after the call)
    "in an epoch": ("train_all", "train_step", "after"),
    "after a save": ("train_all", "save_unfinished", "after"),
    "while writing": ("os", "fsync", "before"),  # the temporary file is not renamed yet
    "after a rename": ("os", "replace", "after"),
    "between architectures": ("train_all", "train_architecture", "after"),
    "after training": ("train_all", "show_inference", "before"),
}
DRIVER = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
module, name, when, count, sys.argv = *sys.argv[1:4], int(sys.argv[4]), ["train_all.py"]
import train_all
module, calls = sys.modules[module], []
function = getattr(module, name)

def kill():
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

def call(*args, **kwargs):
    calls.append(1)
    if when == "before" and len(calls) == count:
        kill()
    result = function(*args, **kwargs)
    if when == "after" and len(calls) == count:
        kill()
    return result

setattr(module, name, call)
train_all.run_script(train_all.main)
"""


def run_until(workplace, point, count=1):
    """Run train_all.py and kill it at call number `count` of POINTS[point]. Return its output."""
    done = subprocess.run(
        [sys.executable, "-u", "-c", DRIVER, *POINTS[point], str(count)],
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and not done.stderr, (point, count, done.stderr)
    return done.stdout


def weights(folder):
    return [
        torch.load(folder / "checkpoints" / file, weights_only=True)["weights"] for file in FILES
    ]


def same_bits(one, other):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other)
    )


def kill_and_resume(reference, victim, kills):
    """Run `reference` once and `victim` with `kills`: [(point, count), ...]. Are the bits equal?"""
    whole = reference.run("train_all", timeout=900)
    assert whole.returncode == 0, whole.stderr
    for number, (point, count) in enumerate(kills, 1):
        first = run_until(victim, point, count).splitlines()[0]
        print(f"kill {number:2d}   {point + ', call ' + str(count):32s}{first}", flush=True)
    last = victim.run("train_all", timeout=900)
    assert last.returncode == 0, last.stderr
    print(f"last run      {last.stdout.splitlines()[0]}")
    assert (
        not list((victim.folder / "runs").glob("*.tmp"))
        and not list((victim.folder / "checkpoints").glob("*.tmp"))
        and not (victim.folder / "runs" / "unfinished.pt").exists()
    )
    return same_bits(weights(reference.folder), weights(victim.folder))


def main():
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rng = random.Random(0)
    # A run without kills has 1308 steps. These kills leave time for the run to get to its end.
    kills = [("in an epoch", rng.randint(1, 130)) if n % 2 else rng.choice(
        [("after a save", rng.randint(1, 2)), ("while writing", rng.randint(1, 3)),
         ("after a rename", rng.randint(1, 3))]) for n in range(number - 2)]  # fmt: skip
    kills += [("between architectures", 1), ("after training", 1)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        same = kill_and_resume(Workplace(Path(one)), Workplace(Path(other)), kills)
    print(f"{number} kills: the weights are {'the same to the last bit' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
