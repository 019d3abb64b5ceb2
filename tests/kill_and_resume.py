"""Kill train_all.py at random moments and resume it: does it end with the same weights?

    python tests/kill_and_resume.py 20            (about 4 minutes; prints one row per kill)

Not collected by pytest; test_train_all.py has a shorter version.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from conftest import Workplace  # noqa: E402  (the line above makes this import possible)

FILES = ["encoder_only.pt", "decoder_only.pt", "encoder_decoder.pt"]


def weights(folder):
    return [
        torch.load(folder / "checkpoints" / file, weights_only=True)["weights"] for file in FILES
    ]


def same_bits(one, other):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other)
    )


def kill_and_resume(reference, victim, kills, longest, seed=0):
    """Run `reference` once and `victim` with `kills` kills. Return True if the bits agree."""
    whole = reference.run("train_all", timeout=900)
    assert whole.returncode == 0, whole.stderr
    rng = random.Random(seed)
    for number in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-u", "train_all.py"],
            cwd=victim.folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = (
            process.stdout.readline().strip()
        )  # printed once it knows where to start
        delay = rng.uniform(0, longest)
        time.sleep(delay)
        finished = process.poll() is not None
        process.kill()
        process.communicate()
        print(
            f"kill {number + 1:2d}   after {delay:5.2f} s   {'finished' if finished else first}",
            flush=True,
        )
        if finished:
            break
    last = victim.run("train_all", timeout=900)
    assert last.returncode == 0, last.stderr
    print(f"last run      {last.stdout.splitlines()[0]}")
    assert (
        not list((victim.folder / "runs").glob("*.tmp"))
        and not (victim.folder / "runs" / "unfinished.pt").exists()
    )
    return same_bits(weights(reference.folder), weights(victim.folder))


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        # From before the first save to well after it. Twenty kills are spread over all three
        # trainings.
        same = kill_and_resume(Workplace(Path(one)), Workplace(Path(other)), kills, longest=9.0)
    print(f"{kills} kills: the weights are {'the same to the last bit' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
