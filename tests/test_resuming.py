"""A run of train_all.py that is interrupted in any way ends as if it had not been."""
import contextlib
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from kill_and_resume import kill_and_resume, run_until, same_bits, start, weights

import train_all
from conftest import MODELS, SCRIPTS, TINY, Workplace, table, train_here


class Stopped(BaseException):
    """Raised where a run is stopped."""


def train_until(moment, folder, *names, **constants):
    """Run main() until `moment`, or to its end if it is 0. Returns the moments and steps passed.

    A moment is just before a step, an evaluation, a rename, or the log.
    """
    moments, steps = [], []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        # The encoder-only model also draws random masks.
        train_here(patch, folder, *names or ("encoder-only", "decoder-only"), **constants)
        for owner, function in ((train_all, "train_step"), (train_all, "append_to_log"),
                                (os, "replace"), *((s, "evaluate") for s in SCRIPTS.values())):
            def call(*args, function=function, original=getattr(owner, function), **options):
                moments.append(function)
                if len(moments) == moment:
                    raise Stopped
                steps.extend(args[3:4] if function == "train_step" else [])
                return original(*args, **options)

            patch.setattr(owner, function, call)
        train_all.main()
    return moments, steps


def same_results(one, other):
    """Compare the weights, runs/steps.csv, and runs/history.csv of two folders."""
    return same_bits(weights(one), weights(other)) and all(
        (one / "runs" / file).read_bytes() == (other / "runs" / file).read_bytes()
        for file in ("steps.csv", "history.csv"))


def assert_close(*folders):
    """Compare the losses and gradient norms, which show a wrong factor, of all steps."""
    def read(folder):
        rows = table(folder / "runs" / "steps.csv")
        return ([(row["architecture"], row["step"], row["labels"]) for row in rows],
                [float(row[column]) for row in rows for column in ("loss", "gradient_norm")])

    (steps, values), (expected_steps, expected) = map(read, folders)
    assert steps == expected_steps and values == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, moments, steps) of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train_until(0, folder)


@pytest.fixture
def stopped(tmp_path, whole, capsys):
    """The folder of a run that stopped in its second architecture, before the last step."""
    train_until(len(whole[1]) - whole[1][::-1].index("train_step"), tmp_path)
    capsys.readouterr()
    return tmp_path


# --- the same bits --------------------------------------------------------------------
def test_a_run_stopped_at_any_moment_ends_with_the_same_bits(whole, tmp_path):
    """And it repeats few steps, also if it is stopped again soon after it has resumed."""
    reference, moments, steps = whole
    assert set(moments) == {"train_step", "evaluate", "replace", "append_to_log"}
    for moment in range(1, len(moments) + 1):
        folder = tmp_path / str(moment)
        taken = sum((train_until(until, folder)[1] for until in (moment, 3, 0)), [])
        assert same_results(folder, reference), moment
        assert len(taken) - len(steps) <= 2 * TINY["RESUME_EVERY"], moment
        assert not list(folder.rglob("unfinished*")), moment


def test_a_run_killed_repeatedly_ends_with_the_same_bits(tmp_path_factory):
    places = [Workplace(tmp_path_factory.mktemp("killed")) for _ in range(2)]
    for place in places:
        place.set("train_all", **TINY)
    assert kill_and_resume(*(place.folder for place in places), [
        ("in an epoch", 4, 0), ("while writing", 4, 0), ("after a rename", 7, 0),
        ("between architectures", 1, 0), ("after training", 1, 0)])


def test_same_bits_detects_different_weights(tmp_path):
    for seed, folder in zip((0, 0, 1), "abc"):
        torch.manual_seed(seed)
        MODELS["decoder_only"](26, 12, 3).save(tmp_path / folder / "checkpoints" / "a.pt")
    one, two, three = (weights(tmp_path / folder) for folder in "abc")
    assert same_bits(one, two) and not same_bits(one, three) and not same_bits(one, {})


def test_other_models_in_checkpoints_do_not_disturb_a_resumed_run(whole, tmp_path, capsys):
    train_until(whole[1].index("append_to_log") + 1, tmp_path)
    MODELS["encoder_only"](26, 24, 4).save(tmp_path / "checkpoints" / "encoder_only.pt")
    (tmp_path / "checkpoints" / "decoder_only.pt").unlink()
    capsys.readouterr()
    assert train_until(0, tmp_path)[1] == [] and same_results(tmp_path, whole[0])
    assert "resuming the unfinished run: 2 of 3 architectures" in capsys.readouterr().out


# --- what may change, and what may not ------------------------------------------------
def test_a_changed_constant_that_matters_starts_from_scratch(tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path)
    block = re.search(r"# CONSTANTS - .*\n# =+\n((?:.*\n)*?)# =+\n",
                      Path(train_all.__file__).read_text(encoding="utf-8"))[1]
    names = re.findall(r"(?m)^([A-Z_]+) = ", block)
    assert len(names) == 26
    for name in names:
        old = getattr(train_all, name)
        new = not old if isinstance(old, bool) else old + ("x" if isinstance(old, str) else 1)
        train_all.save_unfinished(train_all.settings_of_run(), {"x": {"history": [], "steps": []}})
        monkeypatch.setattr(train_all, name, new)
        done, state = train_all.load_unfinished(train_all.settings_of_run())
        printed = capsys.readouterr().out
        if name in ("RESUME_EVERY", "PROFILE_STEPS", "DEVICE", "NUM_THREADS"):
            assert done.keys() == {"x"} and printed.startswith("resuming the unfinished run"), name
        else:
            assert (done, state) == ({}, None) and "starting from scratch" in printed, name
            assert f"different settings ({name} {old} -> {new})" in printed
            (tmp_path / "runs" / "unfinished.old.pt").unlink()


def test_changed_code_starts_from_scratch(workplace, monkeypatch):
    monkeypatch.setattr(train_all, "ROOT", workplace.folder)
    monkeypatch.setattr(train_all, "__file__", str(workplace.folder.resolve() / "train_all.py"))
    before = train_all.settings_of_run()
    workplace.set("train_all", NUM_THREADS=2, LEARNING_RATE=0.5)  # compared by their values
    (workplace.folder / "scratch.py").write_text("print(1)")  # the reader's own
    assert train_all.settings_of_run() == before
    for path in workplace.folder.glob("*.py"):
        path.write_text(path.read_text(encoding="utf-8") + "\nX = 1\n", encoding="utf-8")
        after = train_all.settings_of_run()
        assert (after["CODE"] == before["CODE"]) == (path.name == "scratch.py"), path
        before = after


def test_a_run_resumes_with_another_number_of_threads(stopped, whole):
    assert train_until(0, stopped, NUM_THREADS=2)[1] == [4, 5]  # not from scratch
    assert_close(stopped, whole[0])


# --- several processes ----------------------------------------------------------------
@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of all three architectures in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_until(0, folder, *train_all.ARCHITECTURES)
    return folder


@pytest.fixture
def small(workplace):
    workplace.set("train_all", **TINY)
    return workplace.folder


def test_two_processes_give_the_steps_of_one(small, alone):
    """And process 0 gets to its end, although process 1 aborts as soon as its main() returns."""
    (small / "scratch.py").write_text(
        "import atexit, os, time, train_all\nlog = train_all.append_to_log\n"
        "train_all.append_to_log = lambda *args: time.sleep(2) or log(*args)\n"
        "if train_all.RANK == 1:\n    atexit.register(os.abort)\ntrain_all.main()\n")
    done = start(small, 2, "scratch.py")
    assert done.returncode != 0 and "exact match, best epoch" in done.stdout, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == len(set(lines))  # only process 0 prints
    assert_close(small, alone)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_processes(before, after, small, alone):
    run_until(small, "in an epoch", 10, before, rank=before - 1)
    done = start(small, after, "train_all.py")
    assert done.returncode == 0 and "resuming the unfinished run: 1 of 3" in done.stdout
    assert_close(small, alone)


# --- files that cannot be read or written ---------------------------------------------
@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "flipped bit", "a folder"])
def test_a_damaged_resume_file_costs_no_model(damage, stopped, capsys):
    path, checkpoint = stopped / "runs" / "unfinished.pt", stopped / "checkpoints/encoder_only.pt"
    content, good = path.read_bytes(), checkpoint.read_bytes()
    weight = weights(stopped)["encoder_only.pt"]["embedding.weight"]
    place = content.index(weight.numpy().tobytes()) + 99
    path.unlink()
    path.mkdir() if damage == "a folder" else path.write_bytes({
        "empty": b"", "noise": b"garbage" * 50, "cut": content[:2000],
        "flipped bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]}[damage])
    assert train_until(2, stopped)[1] == []  # before the first step
    assert re.match(r"runs/unfinished.pt cannot be read \(\w+\): starting from scratch; it is kept "
                    r"as (runs/)?unfinished.old.pt\n", capsys.readouterr().out)
    assert checkpoint.read_bytes() == good and path.with_name("unfinished.old.pt").exists()


def run_with_warnings(folder, capsys):
    """Run main() to its end. Returns what it printed and warned of."""
    with warnings.catch_warnings(record=True) as caught:
        train_until(0, folder)
    printed = capsys.readouterr().out + "".join(f"\n{warning.message}" for warning in caught)
    assert "exact match, best epoch" in printed
    return printed


def test_a_full_disk_loses_nothing(stopped, whole, capsys):
    """A limit on the size of files has the effect of a full disk."""
    resource = pytest.importorskip("resource")
    unfinished = stopped / "runs" / "unfinished.pt"
    before, (soft, hard) = unfinished.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        printed = run_with_warnings(stopped, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert printed.count("could not write runs/unfinished.pt") == 1  # once, not at every save
    assert printed.count("could not save") == 2 and not list(stopped.rglob("*.tmp"))
    assert unfinished.read_bytes() == before
    train_until(0, stopped)  # with space again
    assert same_results(stopped, whole[0])


@pytest.mark.parametrize("blocked", ["runs", "checkpoints"])
def test_a_folder_that_cannot_be_written_costs_only_warnings(blocked, tmp_path, capsys):
    (tmp_path / blocked).write_text("a file where the folder should be")
    printed = run_with_warnings(tmp_path, capsys)
    assert printed.count("could not write runs/") == (4 if blocked == "runs" else 0)
    assert printed.count("could not save") == (2 if blocked == "checkpoints" else 0)


def test_the_next_run_saves_a_model_that_could_not_be_saved(whole, tmp_path, capsys):
    obstacle = tmp_path / "checkpoints" / "encoder_only.pt"
    obstacle.mkdir(parents=True)
    assert run_with_warnings(tmp_path, capsys).count("could not save") == 1
    assert (tmp_path / "runs" / "unfinished.pt").exists()
    obstacle.rmdir()
    assert train_until(0, tmp_path)[1] == []  # nothing is trained again
    assert same_results(tmp_path, whole[0]) and not list(tmp_path.rglob("unfinished*"))
