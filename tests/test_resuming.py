"""A run of train_all.py that is interrupted in any way ends as if it had not been."""
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from kill_and_resume import kill_and_resume, run_until, same_bits, start, weights

import train_all
from conftest import MODELS, SCRIPTS, TINY, Workplace, table, train_here

NAMES = ["encoder-only", "decoder-only"]  # the encoder-only model also draws random masks


class Stopped(BaseException):
    """Raised where a run is stopped."""


def train_until(moment, folder, *names, **constants):
    """Run main() until `moment`, or to its end if it is 0. Returns the moments and steps passed.

    A moment is just before a step, an evaluation, a rename, the removal of a file, or the log.
    """
    moments, steps = [], []

    def watch(patch, owner, function):
        def call(*args, **kwargs):
            moments.append(function)
            if len(moments) == moment:
                raise Stopped
            if function == "train_step":
                steps.append(args[3])
            return original(*args, **kwargs)

        original = getattr(owner, function)
        patch.setattr(owner, function, call)

    with pytest.MonkeyPatch.context() as patch:
        train_here(patch, folder, *names or NAMES, **constants)
        for owner, function in ((train_all, "train_step"), (os, "replace"), (Path, "unlink"),
                                (train_all, "append_to_log"), (SCRIPTS["encoder_only"], "evaluate"),
                                (SCRIPTS["decoder_only"], "evaluate")):
            watch(patch, owner, function)
        try:
            train_all.main()
        except Stopped:
            pass
    return moments, steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, moments, steps) of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train_until(0, folder)


def same_results(one, other):
    """Compare the weights, runs/steps.csv, and runs/history.csv of two folders."""
    return same_bits(weights(one), weights(other)) and all(
        (one / "runs" / file).read_bytes() == (other / "runs" / file).read_bytes()
        for file in ("steps.csv", "history.csv"))


def assert_close(one, other):
    """Compare the losses and gradient norms, which show a wrong factor, of all steps."""
    one, other = (table(folder / "runs" / "steps.csv") for folder in (one, other))
    assert [(row["architecture"], row["step"], row["labels"]) for row in one] == [
        (row["architecture"], row["step"], row["labels"]) for row in other]
    for column in ("loss", "gradient_norm"):
        assert [float(row[column]) for row in one] == pytest.approx(
            [float(row[column]) for row in other], rel=1e-4)


@pytest.fixture
def stopped(tmp_path, whole, capsys):
    """(folder, bytes of runs/unfinished.pt) of a run that stopped in its second architecture."""
    train_until(len(whole[1]) - 12, tmp_path)
    capsys.readouterr()
    return tmp_path, (tmp_path / "runs" / "unfinished.pt").read_bytes()


# --- the same bits --------------------------------------------------------------------
def test_a_run_stopped_at_any_moment_ends_with_the_same_bits(whole, tmp_path):
    reference, moments, steps = whole
    assert {"train_step", "evaluate", "replace", "unlink", "append_to_log"} == set(moments)
    for moment in range(1, len(moments) + 1):
        folder = tmp_path / str(moment)
        taken = [train_until(until, folder)[1] for until in (moment, 0)]
        assert same_results(folder, reference), moment
        assert len(sum(taken, [])) - len(steps) <= TINY["RESUME_EVERY"], moment  # as promised
        assert [path.name for path in (folder / "runs").iterdir() if "unfinished" in path.name] == []


def test_a_run_killed_repeatedly_ends_with_the_same_bits(tmp_path_factory):
    places = [Workplace(tmp_path_factory.mktemp("killed")) for _ in range(2)]
    for place in places:
        place.set("train_all", **TINY)
    assert kill_and_resume(*(place.folder for place in places), [
        ("in an epoch", 4, 0), ("while writing", 4, 0), ("after a rename", 7, 0),
        ("between architectures", 1, 0), ("after training", 1, 0)])


def test_same_bits_detects_different_weights(tmp_path):
    for number, folder in enumerate("abc"):
        for name in MODELS:
            torch.manual_seed(number == 2)
            MODELS[name](26, 12, 3).save(tmp_path / folder / "checkpoints" / f"{name}.pt")
    one, two, three = (weights(tmp_path / folder) for folder in "abc")
    assert same_bits(one, two) and not same_bits(one, three)


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
        printed, kept = capsys.readouterr().out, tmp_path / "runs" / "unfinished.old.pt"
        assert state is None and printed.count("\n") == 1
        if name in ("RESUME_EVERY", "PROFILE_STEPS", "DEVICE", "NUM_THREADS"):
            assert len(done) == 1 and "resuming the unfinished run: 1 of 3" in printed, name
        else:
            assert done == {} and "starting from scratch" in printed and kept.exists(), name
            assert f"different settings ({name} {old} -> {new})" in printed
            kept.unlink()


def test_changed_code_starts_from_scratch(workplace, monkeypatch):
    monkeypatch.setattr(train_all, "ROOT", workplace.folder)
    monkeypatch.setattr(train_all, "__file__", str(workplace.folder.resolve() / "train_all.py"))
    before = train_all.settings_of_run()
    (workplace.folder / "scratch.py").write_text("print(1)")  # the reader's own
    workplace.set("train_all", NUM_THREADS=2, LEARNING_RATE=0.5)  # compared by their values
    assert train_all.settings_of_run() == before
    for path in sorted(set(workplace.folder.glob("*.py")) - {workplace.folder / "scratch.py"}):
        path.write_text(path.read_text(encoding="utf-8") + "\nX = 1\n", encoding="utf-8")
        after = train_all.settings_of_run()
        assert re.fullmatch(r"CODE \w{8} -> \w{8}", train_all.differences(before, after)), path
        before = after


def test_a_run_resumes_with_another_number_of_threads(stopped, whole, capsys):
    assert train_until(0, stopped[0], NUM_THREADS=2)[1][0] > 0  # not from scratch
    assert_close(stopped[0], whole[0])


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


def said_once(printed):
    lines = [line for line in printed.splitlines() if line.strip()]
    return len(lines) == len(set(lines)) > 15


def test_two_processes_give_the_steps_of_one(small, alone):
    done = start(small, 2, "train_all.py")
    assert done.returncode == 0 and said_once(done.stdout), done.stderr
    assert_close(small, alone)


def test_a_run_killed_in_two_processes_resumes_in_one(small, alone):
    run_until(small, "in an epoch", 10, processes=2, rank=1)
    done = start(small, 1, "train_all.py")
    assert done.returncode == 0 and "resuming the unfinished run: 1 of 3" in done.stdout
    assert_close(small, alone)


def test_a_run_resumes_in_two_processes_that_wait_at_the_end(small, alone):
    """Process 1 aborts when its main() returns; process 0 works for two seconds more."""
    run_until(small, "in an epoch", 10)
    (small / "scratch.py").write_text(
        "import atexit, os, time, train_all\nlog = train_all.append_to_log\n"
        "train_all.append_to_log = lambda *args: time.sleep(2) or log(*args)\n"
        "if train_all.RANK == 1:\n    atexit.register(os.abort)\ntrain_all.main()\n")
    done = start(small, 2, "scratch.py")
    assert done.returncode != 0 and "exact match, best epoch" in done.stdout, done.stderr
    assert "resuming the unfinished run: 1 of 3" in done.stdout and said_once(done.stdout)
    assert_close(small, alone)


# --- files that cannot be read or written ---------------------------------------------
@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "flipped bit", "a folder"])
def test_a_damaged_resume_file_costs_no_model(damage, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, tmp_path)
    path = train_all.UNFINISHED
    train_all.save_unfinished(train_all.settings_of_run(), {"x": {
        "history": [], "steps": [], "weights": torch.zeros(1000)}})
    content, checkpoint = path.read_bytes(), tmp_path / "checkpoints" / "decoder_only.pt"
    position = content.index(bytes(400)) + 99
    path.unlink()
    path.mkdir() if damage == "a folder" else path.write_bytes({
        "empty": b"", "noise": b"garbage" * 50, "cut": content[:2000],
        "flipped bit": content[:position] + b"\1" + content[position + 1:]}[damage])
    MODELS["decoder_only"](26, 12, 3).save(checkpoint)
    good = checkpoint.read_bytes()

    def train(name, device, settings, done, state):
        assert (done, state) == ({}, None)
        raise Stopped

    monkeypatch.setattr(train_all, "train", train)
    with pytest.raises(Stopped):
        train_all.main()
    assert re.fullmatch(r"runs/unfinished.pt cannot be read \(\w+\): starting from scratch; it is "
                        r"kept as (runs/)?unfinished.old.pt\n", capsys.readouterr().out)
    assert checkpoint.read_bytes() == good and (path.parent / "unfinished.old.pt").exists()


def finish_with_warnings(folder, capsys):
    """Run main() to its end. Returns what it printed and warned of."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        train_until(0, folder)
    printed = capsys.readouterr().out + "".join(f"\n{warning.message}" for warning in caught)
    assert "exact match, best epoch" in printed
    return printed


def test_a_full_disk_loses_nothing(stopped, whole, capsys):
    """A limit on the size of files has the effect of a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        printed = finish_with_warnings(stopped[0], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert printed.count("could not write runs/unfinished.pt") == 1  # once, not at every save
    assert printed.count("could not save checkpoints/") == 2
    assert (stopped[0] / "runs" / "unfinished.pt").read_bytes() == stopped[1]
    assert not list(stopped[0].rglob("*.tmp"))
    train_until(0, stopped[0])  # with space again
    assert same_results(stopped[0], whole[0])


def test_folders_that_cannot_be_written_cost_only_warnings(tmp_path, capsys):
    for folder in ("runs", "checkpoints"):
        (tmp_path / folder).write_text("a file where the folder should be")
    printed = finish_with_warnings(tmp_path, capsys)
    assert printed.count("could not write runs/") == 4
    assert printed.count("could not save checkpoints/") == 2


def test_the_next_run_saves_a_model_that_could_not_be_saved(whole, tmp_path, capsys):
    obstacle = tmp_path / "checkpoints" / "encoder_only.pt"
    obstacle.mkdir(parents=True)
    assert "could not save checkpoints/encoder_only.pt" in finish_with_warnings(tmp_path, capsys)
    assert (tmp_path / "runs" / "unfinished.pt").exists()
    obstacle.rmdir()
    assert train_until(0, tmp_path)[1] == []  # nothing is trained again
    assert same_results(tmp_path, whole[0])
    assert not (tmp_path / "runs" / "unfinished.pt").exists()
