"""Every script as a user runs it: the results it promises, and what it says when something cannot work."""
import importlib
import os
import re
import signal
import stat
import subprocess
import sys
import time

import pytest

from conftest import MODELS, finished, last_lines_as_promised, refused, run_of

SMALL = {"NUM_EPOCHS": 1, "NUM_SAMPLES": 300, "D_MODEL": 16, "NUM_HEADS": 2, "NUM_LAYERS": 1, "D_FF": 32}
ARCHITECTURES = ["encoder_only", "decoder_only", "encoder_decoder"]


def percentages(text, pattern):
    return [float(found) for found in re.findall(pattern + r".*?(\d+\.\d)%", text)]


@pytest.mark.parametrize("script", ["toy_dataset", *ARCHITECTURES, "quick_start"], ids=run_of)
def test_a_script_does_what_its_first_lines_promise(script):
    workplace, done = finished(script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning, no progress bar where there is no terminal
    lines = done.stdout.splitlines()
    assert last_lines_as_promised(script, done.stdout)

    if script == "toy_dataset":
        assert last_lines_as_promised(script, done.stdout, to_the_letter=True)  # nothing here is measured
    elif script == "quick_start":
        for name in ("encoder-only", "decoder-only", "encoder-decoder"):
            rows = [line for line in lines if line.startswith(name + " ")]
            assert len(rows) == 1
            assert re.fullmatch(name + r" +[\d,]+ +\d+\.\d +\d+ +\d+\.\d%", rows[0]), rows[0]
            assert percentages(rows[0], name)[0] >= 99.0
            model = MODELS[name.replace("-", "_")].load(workplace.folder / "checkpoints" / (name.replace("-", "_") + ".pt"))
            assert f"{sum(p.numel() for p in model.parameters()):,}" in rows[0]
        assert int(re.search(r"on (\d+) unseen", done.stdout)[1]) >= 500
    else:
        assert percentages(done.stdout, "digits to words")[0] >= 99.5
        MODELS[script].load(workplace.folder / "checkpoints" / f"{script}.pt")
        if script == "encoder_only":
            assert percentages(done.stdout, "words to digits")[0] >= 95.0
            assert percentages(done.stdout, "which is the largest number\\?  ")[0] >= 99.0


def test_a_constant_that_cannot_work_is_one_line_and_exit_code_2_for_a_user_too(workplace):
    workplace.set("quick_start", NUM_HEADS=3)
    done = workplace.run("quick_start")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: NUM_HEADS=3 does not divide D_MODEL=64: use 1, 2, 4, 8, ...\n"


@pytest.mark.parametrize("script", [*ARCHITECTURES, "quick_start"])
@pytest.mark.parametrize("constants, words", [
    ({"NUM_HEADS": 3}, "NUM_HEADS=3 does not divide D_MODEL=64: use 1, 2, 4, 8, ..."),
    ({"BATCH_SIZE": 5402}, "BATCH_SIZE=5402 is larger than the 5401 training sequences"),
    ({"NUM_SAMPLES": 111111}, "only 111110 distinct sequences"), ({"LEARNING_RATE": float("nan")}, "LEARNING_RATE=nan")])
def test_a_constant_that_cannot_work_is_one_line_and_exit_code_2(script, constants, words, monkeypatch, capsys):
    assert words in refused(importlib.import_module(script), monkeypatch, capsys, **constants)


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_a_loss_that_explodes_is_one_line_and_exit_code_2(script, workplace):
    workplace.set(script, **SMALL)
    workplace.set(script, LEARNING_RATE=1e30, CLIP_NORM=1e30, WARMUP_STEPS=0)
    done = workplace.run(script)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(r"the loss became (nan|inf) at step \d+: try", done.stderr)
    assert not (workplace.folder / "checkpoints").exists()


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_result(script, workplace):
    workplace.set(script, **SMALL)
    (workplace.folder / "checkpoints").write_text("in the way: a file where the folder should be")
    done = workplace.run(script)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout and "warning: could not save checkpoints/" in done.stdout


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0),
                    reason="only a user without administrator rights can be kept out of a folder")
def test_a_read_only_folder_does_not_cost_the_result(workplace):
    workplace.set("decoder_only", **SMALL)
    folder = workplace.folder / "checkpoints"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = workplace.run("decoder_only")
    assert done.returncode == 0 and "warning: could not save" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_a_script_in_one_line_and_leaves_what_was_saved(workplace):
    checkpoint = workplace.folder / "checkpoints" / "decoder_only.pt"
    MODELS["decoder_only"](d_model=16, num_heads=2).save(checkpoint)
    before = checkpoint.read_bytes()
    # Whoever starts the tests in the background hands down that SIGINT is ignored; a user at a terminal does not.
    run = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); " \
          "runpy.run_path('decoder_only.py', run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-u", "-c", run], cwd=workplace.folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "1. Training" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().startswith("stopped by Ctrl-C") and "Traceback" not in errors
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("script", ARCHITECTURES)
@pytest.mark.parametrize("constants", [{"MAX_DIGITS": 1, "NUM_SAMPLES": 10, "BATCH_SIZE": 2}, {"MAX_DIGITS": 9},
                                       {"DROPOUT": 0.3, "NUM_HEADS": 1}, {"WARMUP_STEPS": 0, "BATCH_SIZE": 270}])
def test_constants_at_the_edge_still_run_to_the_end(script, constants, workplace):
    workplace.set(script, **{**SMALL, **constants})
    done = workplace.run(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "saved checkpoints/" in done.stdout


def test_a_script_runs_from_any_folder(workplace, tmp_path_factory):
    done = subprocess.run([sys.executable, str(workplace.folder / "toy_dataset.py")], cwd=tmp_path_factory.mktemp("else"),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
