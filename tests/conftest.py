"""Shared by the tests: random models, and a way to run a script as a user does."""

import atexit
import csv
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import decoder_only
import encoder_decoder
import encoder_only
import housekeeping
import train_all
from housekeeping import run_script
from toy_dataset import EOS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"encoder_only": encoder_only, "decoder_only": decoder_only,
           "encoder_decoder": encoder_decoder}
MODELS = {"encoder_only": encoder_only.EncoderOnlyTransformer,
          "decoder_only": decoder_only.DecoderOnlyTransformer,
          "encoder_decoder": encoder_decoder.EncoderDecoderTransformer}


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)  # more threads slow down tests that run in parallel
    torch.manual_seed(0)


def random_model(name, **arguments):
    """An untrained model in float64 and evaluation mode, with predictions far from uniform.

    With the small embeddings that training starts from, all tokens are about equally likely. With
    tied weights, the token just read is the most likely. In both cases, a test could not tell a
    correct choice from a wrong one.
    """
    options = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 32, "max_len": 64}
    model = MODELS[name](**{**options, **arguments}).double().eval()
    with torch.no_grad():
        model.embedding.weight.normal_(std=0.6)
        model.output.weight = torch.nn.Parameter(torch.randn_like(model.embedding.weight))
    return model


def random_weights(module):
    """Return `module` in float64 and evaluation mode with large random weights, norms and biases
    too: they start as 1 and 0, so a swap of two of them would not show.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double().eval()


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def logits_of(model, source, target=None):
    """Logits for ids (B, S). Only the encoder-decoder uses `target`, its decoder input."""
    return model(source, target) if hasattr(model, "encoder_layers") else model(source)


def random_models(name, count=8, ends=1.5, **arguments):
    """Yield random models whose answers depend much on the input. Many answers end early."""
    for seed in range(count):
        torch.manual_seed(seed)
        model = random_model(name, **{"d_model": 24, "num_heads": 4, **arguments})
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and module is not model.output:
                    module.weight *= 4
            model.output.weight[EOS] *= ends
        yield model


def obey_permissions():
    """Drop the right of root, as which tests often run, to read and write any file (Linux).

    Passed to subprocess as preexec_fn. It has no effect for other users and on other systems.
    """
    if sys.platform == "linux":
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # 24: PR_CAPBSET_DROP


class Workplace:
    """A copy of the scripts in which a test can change constants."""

    def __init__(self, folder):
        self.folder = folder
        for script in [*ROOT.glob("*.py"), *ROOT.glob("variations/*.py")]:
            copy = folder / script.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(script.read_text(encoding="utf-8"), encoding="utf-8")

    def set(self, script, **constants):
        path = self.folder / f"{script}.py"
        source = path.read_text(encoding="utf-8")
        for name, value in constants.items():
            source, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", source)
            assert found == 1, f"{script}.py has no constant {name}"
        path.write_text(source, encoding="utf-8")

    def run(self, script, *words, timeout=3600, **environment):
        """Run a script as a user does, but with an ASCII-only console and no display."""
        env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        env.update(PYTHONIOENCODING="ascii", **environment)
        return subprocess.run(
            [sys.executable, f"{script}.py", *words], cwd=self.folder, env=env, timeout=timeout,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
            preexec_fn=None if os.name == "nt" else obey_permissions)


@functools.cache
def finished(script):
    """(Workplace, CompletedProcess) of `script`, run once for all tests in this process."""
    folder = Path(tempfile.mkdtemp(prefix=f"{script}_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    place = Workplace(folder)
    return place, place.run(script)


def run_of(script, *more):
    """A test id for tests that use `finished(script)`. Tests with this id share a process."""
    return "-".join([f"run_of_{script}", *map(str, more)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Put the tests that use one run of a script into one process, so that the script runs once.

    (The mark xdist_group is made for this, but pytest-xdist 3.8 ignores it under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class BySharedRun(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            shared = re.search(r"\[(run_of_\w+)", nodeid)
            return shared[1] if shared else nodeid

    return BySharedRun(config, log)


def last_lines_as_promised(script, printed, to_the_letter=False):
    """Return True if `printed` ends as the script's docstring says, except for numbers."""
    docstring = (ROOT / f"{script}.py").read_text(encoding="utf-8").split('"""')[1]
    block = re.search(r"last lines should be[^\n]*:\n\n((?:    .*\n)+)", docstring)[1]
    promised = [line[4:] for line in block.splitlines()]
    last = printed.splitlines()[-len(promised) :]
    if to_the_letter:
        return last == promised

    def without_numbers(line):
        return re.sub(r"[\d.,]+", "#", re.sub(r"\s+", " ", line.strip()))

    return [without_numbers(line) for line in last] == [without_numbers(line) for line in promised]


def refused(script, monkeypatch, capsys, **constants):
    """Run main() of the module `script` with these constants and return its one-line error.

    It must exit with code 2 before it prints anything else.
    """
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    for name, value in constants.items():
        assert hasattr(script, name)
        monkeypatch.setattr(script, name, value)
    with pytest.raises(SystemExit) as exit_code:
        run_script(script.main)
    printed = capsys.readouterr()
    assert exit_code.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.fixture
def workplace(tmp_path):
    return Workplace(tmp_path)


def random_trio(**arguments):
    """{"encoder-only": a random model, ...}, as the comparisons name them."""
    return {name.replace("_", "-"): random_model(name, **arguments) for name in MODELS}


def steps_of(script, monkeypatch):
    """A list that receives (digits, output weights before it, loss) of each training step."""
    steps, compute_loss = [], script.compute_loss

    def watch(model, batch):
        loss = compute_loss(model, batch)
        steps.append((batch["digits"], model.output.weight.detach().clone(), loss.item()))
        return loss

    monkeypatch.setattr(script, "compute_loss", watch)
    return steps


TINY = {"D_MODEL": 12, "NUM_HEADS": 3, "NUM_LAYERS": 1, "D_FF": 20, "DROPOUT": 0.1,
        "NUM_SAMPLES": 150, "MAX_DIGITS": 3, "VALIDATION_SHARE": 0.2, "BATCH_SIZE": 10,
        "ACCUMULATION_STEPS": 4, "NUM_EPOCHS": 2, "WARMUP_STEPS": 2, "RESUME_EVERY": 2}  # fmt: skip


def train_here(monkeypatch, folder, *names, **constants):
    """Let train_all.main() train `names` (default: all) with small constants, and use `folder`.

    It has 3 steps per epoch then, and takes a tenth of a second per architecture.
    """
    for name, value in {**TINY, **constants}.items():
        assert hasattr(train_all, name), name
        monkeypatch.setattr(train_all, name, value)
    chosen = {name: train_all.ARCHITECTURES[name] for name in names or train_all.ARCHITECTURES}
    monkeypatch.setattr(housekeeping, "CHECKPOINTS", folder / "checkpoints")
    for name, value in {"ARCHITECTURES": chosen, "RUNS": folder / "runs",
                        "UNFINISHED": folder / "runs" / "unfinished.pt"}.items():
        monkeypatch.setattr(train_all, name, value)


def table(path):
    """The rows of a CSV file, as dictionaries."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
