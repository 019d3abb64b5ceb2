"""Kill train_all.py at chosen points and resume it: does it end with the same weights?

    python tests/kill_and_resume.py          (about 9 minutes; prints one row per kill)

A kill does not depend on timing: a process kills itself during or after a certain call of a
function, such as the third call of `train_step`. scratch.py does that, because a run is only
resumed if the code of the other files is the same. Not collected by pytest.
"""
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from conftest import Workplace  # noqa: E402  (the line above makes this import possible)

POINTS = {  # name: (owner of the function, function, when to kill)
    "in an epoch": ("train_all", "train_step", "after"),
    "while writing": ("pathlib.Path", "write_bytes", "during"),  # the file is cut
    "after a rename": ("os", "replace", "after"),
    "between architectures": ("train_all", "train", "after"),
    "after training": ("train_all", "append_to_log", "after"),
}
SCRATCH = """
import os, pydoc, signal, sys
import train_all
owner, name, when, count, rank = sys.argv[1:]
sys.argv, calls, owner = ["train_all.py"], [], pydoc.locate(owner)
function = getattr(owner, name)
def call(*args, **kwargs):
    calls.append(1)
    now = len(calls) == int(count) and os.environ.get("RANK", "0") == rank
    args = (args[0], args[1][:99]) if now and when == "during" else args  # not the whole content
    result = function(*args, **kwargs)
    if now:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return result
setattr(owner, name, call)
train_all.run_script(train_all.main)
"""


def start(folder, processes, script, *words):
    """Run a script in one process, or in several with torchrun. Returns a CompletedProcess."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([sys.executable, "-u", *torchrun * (processes > 1), script, *words],
                          cwd=folder, capture_output=True, text=True, timeout=900)


def run_until(folder, point, count=1, processes=1, rank=0):
    """Run train_all.py until process `rank` is killed at call number `count` of POINTS[point]."""
    (folder / "scratch.py").write_text(SCRATCH)
    done = start(folder, processes, "scratch.py", *POINTS[point], str(count), str(rank))
    killed = "Signal 9" in done.stderr if processes > 1 else not done.stderr  # no other error
    assert done.returncode != 0 and killed, (point, count, done.stderr)
    return done.stdout


def weights(folder):
    return {path.name: torch.load(path, weights_only=True)["weights"]
            for path in (folder / "checkpoints").glob("*.pt")}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        a.keys() == other[file].keys() and all(torch.equal(a[k], other[file][k]) for k in a)
        for file, a in one.items())


def kill_and_resume(reference, victim, kills, processes=1):
    """Run `reference` once and `victim` with `kills`: [(point, count, rank)]. Same bits?"""
    for number, (point, count, rank) in enumerate(kills, 1):
        first = run_until(victim, point, count, processes, rank).splitlines()[0]
        print(f"kill {number:2d}  {point}, call {count}, process {rank}: {first}", flush=True)
    ends = [start(folder, processes, "train_all.py") for folder in (victim, reference)]
    assert not any(done.returncode for done in ends), [done.stderr for done in ends]
    print(f"last run: {ends[0].stdout.splitlines()[0]}", flush=True)
    assert len(weights(victim)) == 3 and not (victim / "runs" / "unfinished.pt").exists()
    return same_bits(weights(reference), weights(victim))


def main():
    rng, results = random.Random(0), []
    for processes in (1, 2):  # a run without kills has 1296 steps; 20 kills let it get to its end
        kills = [("in an epoch", rng.randint(1, 130), n // 2 % processes) if n % 2 else (
            rng.choice(list(POINTS)[1:3]), rng.randint(1, 7), 0) for n in range(18)]
        kills += [("between architectures", 1, processes - 1), ("after training", 1, 0)]
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            places = [Workplace(Path(folder)).folder for folder in (one, other)]
            results.append(kill_and_resume(*places, kills, processes))
        print(f"{processes} process(es), {len(kills)} kills: the weights are "
              f"{'the same to the last bit' if results[-1] else 'DIFFERENT'}\n", flush=True)
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
