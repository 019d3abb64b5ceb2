"""Every script as a user runs it: its documented results, and its messages about mistakes."""

import importlib
import math
import os
import random
import re
import signal
import stat
import subprocess
import sys

import pytest
import torch

from conftest import MODELS, ROOT, finished, last_lines_as_promised, refused, run_of
from toy_dataset import WORD_OF

SMALL = {
    "NUM_EPOCHS": 1,
    "NUM_SAMPLES": 300,
    "D_MODEL": 16,
    "NUM_HEADS": 2,
    "NUM_LAYERS": 1,
    "D_FF": 32,
}
ARCHITECTURES = ["encoder_only", "decoder_only", "encoder_decoder"]


def percentages(text, pattern):
    return [float(found) for found in re.findall(pattern + r".*?(\d+\.\d)%", text)]


@pytest.mark.parametrize("script", ["toy_dataset", *ARCHITECTURES, "quick_start"], ids=run_of)
def test_each_script_prints_its_documented_results(script):
    workplace, done = finished(script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, and no progress bar without a terminal
    lines = done.stdout.splitlines()
    assert last_lines_as_promised(script, done.stdout)

    if script == "toy_dataset":
        assert last_lines_as_promised(
            script, done.stdout, to_the_letter=True
        )  # nothing here is measured
    elif script == "quick_start":
        for name in ("encoder-only", "decoder-only", "encoder-decoder"):
            rows = [line for line in lines if line.startswith(name + " ")]
            assert len(rows) == 1
            assert re.fullmatch(name + r" +[\d,]+ +\d+\.\d +\d+ +\d+\.\d%", rows[0]), rows[0]
            assert percentages(rows[0], name)[0] >= 99.0
            model = MODELS[name.replace("-", "_")].load(
                workplace.folder / "checkpoints" / (name.replace("-", "_") + ".pt")
            )
            assert f"{sum(p.numel() for p in model.parameters()):,}" in rows[0]
        assert int(re.search(r"on (\d+) held-out", done.stdout)[1]) >= 500
    else:
        assert percentages(done.stdout, "digits to words")[0] >= 99.5
        assert done.stdout.index("saved checkpoints/") < done.stdout.index(
            "\n2. "
        )  # saved before the demonstrations
        MODELS[script].load(workplace.folder / "checkpoints" / f"{script}.pt")
        if script == "encoder_only":
            assert percentages(done.stdout, "words to digits")[0] >= 95.0
            assert percentages(done.stdout, "do the words match\\? pretrained")[0] >= 75.0
            assert percentages(done.stdout, "from scratch, the same")[0] <= 75.0


def test_users_see_one_line_for_an_invalid_constant(workplace):
    workplace.set("quick_start", NUM_HEADS=3)
    done = workplace.run("quick_start")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: NUM_HEADS=3 does not divide D_MODEL=64: use 1, 2, 4, 8, ...\n"


@pytest.mark.parametrize("script", [*ARCHITECTURES, "quick_start"])
@pytest.mark.parametrize(
    "constants, words",
    [
        ({"NUM_HEADS": 3}, "NUM_HEADS=3 does not divide D_MODEL=64: use 1, 2, 4, 8, ..."),
        ({"BATCH_SIZE": 5402}, "BATCH_SIZE=5402 is larger than the 5399 training sequences"),
        ({"NUM_SAMPLES": 111111}, "only 111110 distinct sequences"),
        ({"LEARNING_RATE": float("nan")}, "LEARNING_RATE=nan"),
    ],
)
def test_an_invalid_constant_gives_one_line_and_exit_code_2(
    script, constants, words, monkeypatch, capsys
):
    assert words in refused(importlib.import_module(script), monkeypatch, capsys, **constants)


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_an_exploding_loss_gives_one_line_and_exit_code_2(script, workplace):
    workplace.set(script, **SMALL)
    workplace.set(script, LEARNING_RATE=1e30, CLIP_NORM=1e30, WARMUP_STEPS=0)
    done = workplace.run(script)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(r"the loss became (nan|inf) at step \d+: try", done.stderr)
    assert not (workplace.folder / "checkpoints").exists()


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_a_failed_checkpoint_write_does_not_cost_the_result(script, workplace):
    workplace.set(script, **SMALL)
    (workplace.folder / "checkpoints").write_text("a file where the folder should be")
    done = workplace.run(script)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout and "warning: could not save checkpoints/" in done.stdout


needs_permissions = pytest.mark.skipif(
    sys.platform != "linux" and getattr(os, "geteuid", lambda: 0)() == 0,
    reason="an administrator can write to a read-only folder",
)


@needs_permissions
def test_a_read_only_folder_does_not_cost_the_result(workplace):
    workplace.set("decoder_only", **SMALL)
    folder = workplace.folder / "checkpoints"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = workplace.run("decoder_only")
    assert done.returncode == 0 and "warning: could not save" in done.stdout


@needs_permissions
def test_a_checkpoint_that_may_not_be_read_gives_one_line(workplace):
    checkpoint = workplace.folder / "checkpoints" / "decoder_only.pt"
    MODELS["decoder_only"](d_model=16, num_heads=2).save(checkpoint)
    for path in (checkpoint, checkpoint.parent):
        path.chmod(0)
        done = workplace.run("decoder_only", "4")
        path.chmod(stat.S_IRWXU)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "decoder_only.pt cannot be read (Permission denied)" in done.stderr


@needs_permissions
def test_files_of_a_run_that_may_not_be_read_cost_nothing(workplace):
    workplace.set("train_all", **SMALL, WARMUP_STEPS=1)
    runs = workplace.folder / "runs"
    runs.mkdir()
    for name in ("unfinished.pt", "log.jsonl", "history.csv"):
        (runs / name).write_text("{}")
        (runs / name).chmod(0)
    done = workplace.run("train_all")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "runs/unfinished.pt cannot be read" in done.stdout
    assert "could not write runs/log.jsonl (Permission denied)" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("script", ["toy_dataset", "decoder_only"])
def test_a_full_disk_for_the_output_gives_one_line(script, workplace):
    if script == "decoder_only":
        workplace.set(script, **SMALL)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, f"{script}.py"],
            cwd=workplace.folder,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the disk was full")
    saved = workplace.folder / "checkpoints" / "decoder_only.pt"
    assert saved.exists() == (script == "decoder_only")  # the trained model is not lost


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("module", ["torch", "toy_dataset", "tqdm"])
def test_ctrl_c_while_libraries_are_imported_prints_one_line(module, workplace):
    """The signal is sent from inside the import of `module`, so the time does not matter."""
    hook = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Hook:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Hook())
sys.argv = ["decoder_only.py"]
runpy.run_path("decoder_only.py", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", hook],
        cwd=workplace.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130 and done.stderr.strip() == "stopped by Ctrl-C"
    assert done.stdout == ""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_prints_one_line_and_keeps_saved_checkpoints(workplace):
    checkpoint = workplace.folder / "checkpoints" / "decoder_only.pt"
    MODELS["decoder_only"](d_model=16, num_heads=2).save(checkpoint)
    before = checkpoint.read_bytes()
    # Tests that are started in the background inherit an ignored SIGINT. A script that a
    # user starts at a terminal does not.
    run = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_path('decoder_only.py', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", run],
        cwd=workplace.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "  epoch  1" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().startswith("stopped by Ctrl-C") and "Traceback" not in errors
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("script", ARCHITECTURES)
@pytest.mark.parametrize(
    "constants",
    [
        {"MAX_DIGITS": 2, "NUM_SAMPLES": 110, "BATCH_SIZE": 2},
        {"MAX_DIGITS": 9},
        {"DROPOUT": 0.3, "NUM_HEADS": 1},
        {"WARMUP_STEPS": 0, "BATCH_SIZE": 270},
    ],
)
def test_scripts_finish_with_extreme_constants(script, constants, workplace):
    workplace.set(script, **{**SMALL, **constants})
    done = workplace.run(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "saved checkpoints/" in done.stdout


def test_a_script_runs_from_any_folder(workplace, tmp_path_factory):
    done = subprocess.run(
        [sys.executable, str(workplace.folder / "toy_dataset.py")],
        cwd=tmp_path_factory.mktemp("else"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0


# --- the two scripts that import no other script ----------------------------------------
def test_tiny_gpt_fits_90_lines_and_reaches_98_percent(workplace):
    assert len((workplace.folder / "tiny_gpt.py").read_text(encoding="utf-8").splitlines()) <= 90
    done = workplace.run("tiny_gpt")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert 98.0 <= percentages(done.stdout, "exact match on 511 held-out numbers")[0] <= 100.0
    steps = re.findall(r"^step (\d+)   loss \d\.\d{4}$", done.stdout, flags=re.MULTILINE)
    assert steps == ["100", "200", "300", "400", "500", "600", "700"]
    examples = re.findall(r"^([\d ]+) = ([a-z ]+) \.$", done.stdout, flags=re.MULTILINE)
    assert [len(digits.split()) for digits, _ in examples] == [1, 2, 3, 4, 5]
    assert [[WORD_OF[d] for d in digits.split()] for digits, _ in examples] == [
        words.split() for _, words in examples
    ]


def test_tiny_gpt_equals_the_decoder_only_transformer(capsys, monkeypatch):
    """After two steps. It also shows that nothing held out is trained on, and no score is faked."""
    drawn, choices = [], random.choices
    monkeypatch.setattr(
        random, "choices", lambda rows, k: drawn.extend(rows) or choices(rows, k=k)
    )
    source = (ROOT / "tiny_gpt.py").read_text(encoding="utf-8").replace("= 0, 700, ", "= 3, 2, ")
    tiny = {}
    exec(compile(source, "tiny_gpt.py", "exec"), tiny)
    held_out = {number for rows in tiny["NUMBERS"] for number in rows[: len(rows) // 10]}
    assert len(drawn) > 0 and not held_out & set(drawn)
    assert len(tiny["TOKENS"]) == 22 == len(set(tiny["TOKENS"]))
    assert sum(tiny["correct"]) < 0.1 * len(tiny["correct"]) == 51.1  # two steps teach little
    assert tiny["optimizer"].param_groups[0]["lr"] == 0  # the last step of the schedule
    assert tiny["loss"].item() == pytest.approx(math.log(22), abs=0.3)  # a guess at first
    ours = MODELS["decoder_only"](
        vocab_size=len(tiny["TOKENS"]),
        d_model=tiny["D"],
        d_ff=4 * tiny["D"],
        num_heads=tiny["HEADS"],
        num_layers=tiny["LAYERS"],
    )
    names = {
        "embedding": "embedding.weight",
        "blocks.": "layers.",
        ".q.": ".self_attention.w_q.",
        ".k.": ".self_attention.w_k.",
        ".v.": ".self_attention.w_v.",
        ".o.": ".self_attention.w_o.",
        ".mlp.0.": ".feed_forward.up.",
        ".mlp.2.": ".feed_forward.down.",
    }
    weights = {}
    for name, value in tiny["model"].state_dict().items():
        ours_name = f"final_{name}" if name.startswith("norm.") else name
        for theirs, mine in names.items():
            ours_name = ours_name.replace(theirs, mine)
        weights[ours_name] = value
    ours.load_state_dict({**weights, "output.weight": weights["embedding.weight"]})
    rows = torch.tensor([tiny["encode"]("40725"), tiny["encode"]("13133")])
    with torch.no_grad():
        torch.testing.assert_close(ours(rows), tiny["model"](rows), atol=1e-5, rtol=0)


def test_each_stage_of_attention_by_hand_matches_the_previous_one():
    done = finished("attention_by_hand")[1]
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count(": True") == 5 and "False" not in done.stdout
    assert last_lines_as_promised("attention_by_hand", done.stdout, to_the_letter=False)
    largest = [
        [float(x) for x in re.findall(r"largest weight ([\d.]+)", line)]
        for line in done.stdout.splitlines()
        if line.startswith("  K = ")
    ]
    assert largest[0][0] < largest[1][0] < largest[2][0] and largest[2][0] > 0.9
    assert max(scaled for _, scaled in largest) < 0.3


# --- try it -----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ARCHITECTURES, ids=run_of)
def test_after_a_run_a_script_translates_its_arguments(script):
    place, _ = finished(script)
    done = place.run(script, "4", "0", "7")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[0] == "4 0 7  ->  four zero seven"
    assert re.search(r"^ +4 +0 +7", done.stdout, flags=re.MULTILINE)  # one attention table
    weights = re.findall(
        r"^  (?:->|<MASK>) \S+ +((?:\d\.\d\d *)+)$", done.stdout, flags=re.MULTILINE
    )
    assert len(weights) == (3 if script == "encoder_only" else 4)
    for row in weights:
        assert sum(map(float, row.split())) == pytest.approx(1, abs=0.06)
    if script == "encoder_only":
        back = place.run(script, "four", "zero", "seven")
        assert back.stdout.splitlines()[0] == "four zero seven  ->  4 0 7"
        assert "length was given" in back.stdout and "length was given" in done.stdout


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("decoder_only", ["4", "x"], "'x' is unknown: use 0 1 2"),
        ("encoder_decoder", ["407"], "'407' is unknown"),
        ("encoder_only", ["four", "0"], "'0' is unknown: use zero one"),
        ("decoder_only", ["\u0664"], "'\\u0664' is unknown"),
        ("decoder_only", ["4"], "no checkpoint at checkpoints/decoder_only.pt"),
        ("toy_dataset", ["--help"], "toy_dataset.py takes no arguments"),
        ("train_all", ["4"], "takes no arguments"),
    ],
)
def test_invalid_arguments_give_one_line(script, words, message, workplace):
    done = workplace.run(script, *words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_broken_code_keeps_its_traceback(workplace):
    path = workplace.folder / "decoder_only.py"
    path.write_text(path.read_text().replace("queries @ keys.transpose(-2, -1)", "queries @ keys"))
    done = workplace.run("decoder_only")
    assert done.returncode == 1 and "Traceback" in done.stderr and "in attention" in done.stderr


# --- what you read is what runs -----------------------------------------------------------
@pytest.mark.parametrize("script", [*ARCHITECTURES, "tiny_gpt"])
def test_editing_the_formula_changes_the_training(script, workplace):
    """If the scores in the formula's text are multiplied by 3, the first losses must change."""
    path = workplace.folder / f"{script}.py"
    source = path.read_text(encoding="utf-8")
    assert source.count("queries @ keys") + source.count("q @ k") == 1
    if script == "tiny_gpt":
        source = source.replace(
            "STEPS, ROWS, D, HEADS, LAYERS = 0, 700", "STEPS, ROWS, D, HEADS, LAYERS = 0, 100"
        )
    else:
        path.write_text(source, encoding="utf-8")
        workplace.set(script, **SMALL)
        source = path.read_text(encoding="utf-8").replace("NUM_SAMPLES = 300", "NUM_SAMPLES = 1000")
    printed = []
    for edited in (
        source,
        source.replace("queries @ keys", "3 * queries @ keys").replace("q @ k", "3 * q @ k"),
    ):
        path.write_text(edited, encoding="utf-8")
        done = workplace.run(script)
        assert done.returncode == 0, done.stderr
        printed.append(re.findall(r"(?:train )?loss \d+\.\d+", done.stdout))
    assert printed[0] and printed[0] != printed[1]
