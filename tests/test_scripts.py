"""The scripts as a user runs them: results, messages, checkpoints, constants, and their texts."""
import ast
import contextlib
import functools
import importlib
import io
import math
import os
import random
import re
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

from conftest import MODELS, ROOT, SCRIPTS, finished, last_lines_as_promised, run_of
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import housekeeping
from housekeeping import InputError, run_script
from toy_dataset import DIGITS, PAD, VOCABULARY, WORDS, create_dataloaders
from training import lr_factor

ARCHITECTURES = list(SCRIPTS)
TOP_LEVEL = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "scratch")
VARIATIONS = sorted(path.stem for path in ROOT.glob("variations/*.py"))
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and limits")


def source(script):
    folder = "variations/" if script in VARIATIONS else ""
    return (ROOT / f"{folder}{script}.py").read_text(encoding="utf-8")


def percentages(text, pattern):
    return [float(found) for found in re.findall(pattern + r".*?(\d+\.\d)%", text)]


# --- Results --------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["toy_dataset", "attention_by_hand", "tiny_gpt", *ARCHITECTURES,
                                    "quick_start"], ids=run_of)
def test_each_script_prints_its_documented_results(script):
    _, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # no warnings, no progress bars
    last = done.stdout.split("\nResult on ")[-1]
    if script == "tiny_gpt":
        promised = re.search("It ends with `(.*: )100.0%`", source(script))[1]
        assert percentages(last, f"\n{promised}")[0] >= 98.0 and "\n6 = six .\n" in last
        return
    assert last_lines_as_promised(script, done.stdout, to_the_letter=script == "toy_dataset")
    if script == "attention_by_hand":  # each stage equals the previous one; scores need sqrt(K)
        assert done.stdout.count(": True") == 5 and "False" not in done.stdout
        largest = [float(weight) for weight in re.findall(r"largest weight (\S+),", done.stdout)]
        assert largest[0] < largest[2] < largest[4] > 0.9 and max(largest[1::2]) < 0.3
    elif script == "quick_start":
        assert min(percentages(last, r"\n\w+-\w+ ")) >= 99.0
    elif script in SCRIPTS:
        assert percentages(last, "digits to words")[0] >= 99.5
        assert done.stdout.index("saved checkpoints/") < done.stdout.index("\n2. ")  # at once
    if script == "encoder_only":
        assert percentages(last, "words to digits")[0] >= 95.0
        assert percentages(last, "pretrained")[0] >= 75.0 >= percentages(last, "scratch")[0]


@pytest.mark.parametrize("script", ARCHITECTURES, ids=run_of)
def test_after_a_run_a_script_translates_its_arguments(script):
    place, _ = finished(script)
    printed = place.run(script, "4", "0", "7").stdout
    assert "4 0 7  ->  four zero seven\n" in printed
    assert re.search(r"^ +4 +0 +7", printed, re.MULTILINE)  # one attention table
    rows = re.findall(r"^  (?:->|<MASK>) \S+ +(?:\d\.\d\d *)+$", printed, re.MULTILINE)
    assert len(rows) == (3 if script == "encoder_only" else 4)
    if script == "encoder_only":
        back = place.run(script, "four", "zero", "seven").stdout
        assert "four zero seven  ->  4 0 7\n" in back
        assert "length was given" in back and "length was given" in printed


# --- tiny_gpt.py ----------------------------------------------------------------------
@functools.cache
def tiny_gpt(steps, formula="scores = q @ k"):
    """The names that tiny_gpt.py defines when it runs for `steps` steps, and what it prints."""
    text, drawn, choices, names = source("tiny_gpt"), set(), random.choices, {}
    for old, new in ((" = 0, 700, ", f" = 3, {steps}, "), ("scores = q @ k", formula)):
        assert text.count(old) == 1
        text = text.replace(old, new)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(random, "choices", lambda rows, k: drawn.update(rows) or choices(rows, k=k))
        exec(compile(text, "tiny_gpt.py", "exec"), names)
    return SimpleNamespace(**names, drawn=drawn, printed=out.getvalue().splitlines())


def test_tiny_gpt_is_scored_on_whole_answers_that_it_never_saw():
    """Half trained, it gets many tokens right, but fewer answers. Both are recomputed here."""
    tiny, exact, tokens = tiny_gpt(150), [], []
    held_out = [rows[:len(rows) // 10] for rows in tiny.NUMBERS]
    assert tiny.drawn and not tiny.drawn & {number for rows in held_out for number in rows}
    for n, numbers in enumerate(held_out, 1):
        expected = torch.tensor([tiny.encode(number) for number in numbers[:200]])
        rows = expected[:, :n + 1]
        while rows.size(1) < expected.size(1):
            rows = torch.cat([rows, tiny.model(rows)[:, -1:].argmax(-1)], 1)
        right = (rows == expected)[:, n + 1:]
        exact, tokens = exact + right.all(1).tolist(), tokens + right.flatten().tolist()
    shares = [sum(right) / len(right) for right in (exact, tokens)]
    assert 0.1 < shares[0] < shares[1] - 0.1 < 0.9
    assert tiny.printed[-1] == f"exact match on 511 held-out numbers: {shares[0]:.1%}"


def test_tiny_gpt_equals_the_decoder_only_transformer():
    tiny = tiny_gpt(2)
    assert len(tiny.TOKENS) == 22 == len(set(tiny.TOKENS))
    assert tiny.optimizer.param_groups[0]["lr"] == 0  # the last step of the schedule
    assert tiny.loss.item() == pytest.approx(math.log(22), abs=0.3)  # a guess at first
    ours = MODELS["decoder_only"](vocab_size=22, d_model=tiny.D, d_ff=4 * tiny.D,
                                  num_heads=tiny.HEADS, num_layers=tiny.LAYERS)
    names = {r"^embedding$": "embedding.weight", "^norm": "final_norm", "^blocks": "layers",
             r"\.([qkvo])\.": r".self_attention.w_\1.", "mlp.0": "feed_forward.up",
             "mlp.2": "feed_forward.down"}
    weights = {functools.reduce(lambda key, pair: re.sub(*pair, key), names.items(), name): value
               for name, value in tiny.model.state_dict().items()}
    ours.load_state_dict({**weights, "output.weight": weights["embedding.weight"]})
    rows = torch.tensor([tiny.encode("40725"), tiny.encode("13133")])
    torch.testing.assert_close(ours(rows), tiny.model(rows), atol=1e-5, rtol=0)


# --- What a small run trains on, scores, and saves --------------------------------------
class Witness:
    """Watches a run from outside: the rows that every model reads, and every optimizer step."""

    def __enter__(self):
        self.embeddings, self.learned, self.steps, self.threads = {}, [], [], []
        self.hooks = [nn.modules.module.register_module_forward_pre_hook(self.read),
                      register_optimizer_step_pre_hook(self.step)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def read(self, module, inputs):
        learns = module.training and torch.is_grad_enabled()
        if not isinstance(module, nn.Embedding) or inputs[0].size(1) == 1 \
                or not learns and len(inputs[0]) == 1:
            return  # newly generated tokens, or a single row, which only demonstrates something
        if not hasattr(module, "seen"):  # a copy of the model remembers what the original saw
            module.seen, module.first = {True: set(), False: set()}, module.weight.detach().clone()
        self.embeddings[id(module)] = module
        names = [*VOCABULARY.tokens, "zero"]  # decoder_only.py adds another word for 0
        rows = [[names[i] for i in row if i != PAD] for row in inputs[0].tolist()]
        module.seen[learns] |= set(map(digits_of, rows)) - {None}
        if learns and rows[0][0] != "<SOS>":
            self.learned.append(rows)

    def step(self, optimizer, *_):
        norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]
                 if p.grad is not None]
        self.steps.append((optimizer.param_groups[0]["lr"], torch.stack(norms).norm().item()))

    def scored_and_trained_on(self):
        """Two sets of sequences, after checking that no model, copies included, mixes them."""
        models = [embedding.seen for embedding in self.embeddings.values()]
        assert all(not seen[True] & seen[False] for seen in models)
        return [set().union(*(seen[learned] for seen in models)) for learned in (False, True)]


def digits_of(row):
    """The sequence that a row spells, in digits, words, or both; None if its two sides differ."""
    middle = row.index("<SEP>") if "<SEP>" in row else len(row)
    sides = {tuple(row[:middle]), tuple(str(WORDS.index(token)) if token in WORDS else token
                                        for token in row[middle + 1:])}
    sides = {side for side in sides if side and set(side) <= set(DIGITS)}
    return sides.pop() if len(sides) == 1 else None


VALUES = {  # every constant differs from its default
    "D_MODEL": 24, "NUM_HEADS": 3, "NUM_LAYERS": 1, "D_FF": 40, "DROPOUT": 0.05,
    "NUM_SAMPLES": 700, "MAX_DIGITS": 3, "BATCH_SIZE": 17, "LEARNING_RATE": 0.0123,
    "WARMUP_STEPS": 3, "CLIP_NORM": 0.05, "NUM_EPOCHS": 3, "SEED": 5, "NUM_THREADS": 2,
    "MASK_SHARE": 0.4, "RANDOM_SHARE": 0.0, "MIN_MASKING_RATE": 1.0, "FINETUNE_EPOCHS": 1,
    "FINETUNE_LEARNING_RATE": 0.0045, "BEAM_WIDTH": 5, "LENGTH_PENALTY": 0.6,
    "VALIDATION_SHARE": 0.2, "ACCUMULATION_STEPS": 3, "MIN_LEARNING_RATE": 0.0011,
    "UNDERTRAINED_STEPS": 7}


def run_main(script, threads=None, **constants):
    """What main() of a script prints with these constants."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        for name, value in constants.items():
            patch.setattr(housekeeping if name == "CHECKPOINTS" else module, name, value)
        if threads is not None:  # record their number; two would be slow here
            patch.setattr(torch, "set_num_threads", threads.append)
        module.main()
    return out.getvalue()


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "quick_start", "train_all"])
def run(request, tmp_path_factory):
    """A Witness of main() with VALUES for its constants; also what it printed and saved."""
    folder, module = tmp_path_factory.mktemp("run"), vars(importlib.import_module(request.param))
    values = {**VALUES, "RUNS": folder, "UNFINISHED": folder / "unfinished"}
    torch.set_num_threads(1)
    with Witness() as run:
        run.printed = run_main(request.param, run.threads, **{
            name: values[name] for name in values.keys() & module.keys()}, CHECKPOINTS=folder)
    run.script, share = request.param, 0.2 if request.param == "train_all" else 0.1
    run.loaders = create_dataloaders(700, 3, 17, 5, share)
    run.models = {name: model_class.load(folder / f"{name}.pt")
                  for name, model_class in MODELS.items() if (folder / f"{name}.pt").exists()}
    return run


def test_what_is_scored_is_held_out(run):
    training, held_out = ({tuple(item["digits"]) for item in loader.dataset}
                          for loader in run.loaders)
    scored, trained = run.scored_and_trained_on()
    assert scored == held_out
    assert trained <= training and len(trained) > 0.95 * len(training)
    counts = re.findall(r"(\d+) training and (\d+) held-out", run.printed)
    assert set(counts) == {(str(len(training)), str(len(held_out)))}


def test_variations_are_scored_on_what_is_held_out(monkeypatch):
    measure = importlib.import_module("measure")
    loaders = functools.partial(measure.loaders, num_samples=300, max_digits=3)
    monkeypatch.setattr(measure, "loaders", loaders)
    monkeypatch.setattr(measure, "WARMUP_STEPS", 2)
    with Witness() as witness:
        model = measure.new_model(0, d_model=12, num_heads=3, num_layers=1, d_ff=20)
        measure.train_and_score(model, 1, 0)
        measure.evaluate_held_out(model, 0)
    scored, trained = witness.scored_and_trained_on()
    assert {row for row in scored if len(row) < 6} == {
        tuple(item["digits"]) for item in create_dataloaders(300, 3, 32, 0)[1].dataset}
    assert len(trained) == len(create_dataloaders(300, 3, 32, 0)[0].dataset)


def test_constants_reach_their_place(run):
    per_epoch, last = len(run.loaders[0]), 0.05
    if run.script == "train_all":  # three micro-batches per step
        per_epoch, last = len(run.loaders[0].dataset) // (3 * 17), 0.0011 / 0.0123
        assert len(run.learned) == 3 * len(run.steps)
    assert run.script == "train_all" or {*constants_of(run.script)} <= {"DEVICE", *VALUES}
    names = ("D_MODEL", "NUM_HEADS", "NUM_LAYERS", "D_FF", "DROPOUT")
    for name, model in run.models.items():
        assert [model.arguments[n.lower()] for n in names] == [VALUES[n] for n in names]
        torch.manual_seed(5)  # SEED: the weights; the sequences also depend on it
        start = MODELS[name](**model.arguments).embedding.weight
        assert any(embedding.first.equal(start) for embedding in run.embeddings.values())
    schedule = [0.0123 * lr_factor(step, 3 * per_epoch, 3, last) for step in range(3 * per_epoch)]
    rates = schedule * len(run.models)
    if run.script == "decoder_only":
        rates += schedule  # another model, with two words for 0
    if run.script == "encoder_decoder":
        rates += schedule[:7]  # UNDERTRAINED_STEPS
        assert "width 5   length penalty 0.6" in run.printed
    if run.script == "encoder_only":  # fine-tuning, and from scratch for as many epochs in total
        rates += [0.0045 * lr_factor(step, epochs * per_epoch, 3)
                  for epochs in (1, 3 + 1) for step in range(epochs * per_epoch)]
        rows = sum(run.learned[:3 * per_epoch], [])
        masks = [row.count("<MASK>") / (len(row) // 2) for row in rows]
        assert sum(masks) / len(rows) == pytest.approx(0.4, abs=0.04)  # and MIN_MASKING_RATE
        assert None not in map(digits_of, rows)  # RANDOM_SHARE
    if run.script == "quick_start":
        assert run.printed.split("mistakes first")[1].split("Result on")[0].count(" -> ") == 3 * 5
    assert [rate for rate, _ in run.steps] == pytest.approx(rates)
    assert [norm for _, norm in run.steps] == pytest.approx([0.05] * len(rates), rel=1e-3)
    assert max(map(len, run.learned)) == 17
    assert run.threads == [2 if run.script == "train_all" else 1]  # NUM_THREADS


def test_the_saved_model_is_the_one_whose_score_is_printed(run):
    """In train_all.py, that of the best epoch; otherwise, that of the last."""
    epochs = re.findall("  epoch +[123] .*validation loss.*", run.printed)
    for i, (name, model) in enumerate(run.models.items()):
        shown = [line for line in epochs[3 * i:3 * i + 3]
                 if run.script != "train_all" or "best so far" in line]
        loss, _, exact, _ = SCRIPTS[name].evaluate(model, run.loaders[1]).values()
        assert f"validation loss {loss:.4f}   exact match {exact:6.1%}" in shown[-1]
        assert model.notes["exact_match"] == exact
        assert f"{exact:.1%}" in run.printed.rstrip("\n").rsplit("\n\n", 1)[1]  # the last table
        assert model.notes["constants"].items() >= {"LEARNING_RATE": 0.0123, "SEED": 5}.items()


# --- Constants: checked before any work -------------------------------------------------
def constants_of(script):
    """The names in the block of constants of a script."""
    blocks = re.findall(r"# CONSTANTS - .*\n# =+\n((?:.*\n)*?)# =+\n", source(script))
    return re.findall(r"^([A-Z_]+) = ", "".join(blocks), re.MULTILINE)


def verdict(script, *words, **constants):
    """The line about a mistake in constants or `words`; that of Ctrl-C if the script starts."""
    def write(_):
        raise KeyboardInterrupt  # instead of its first line of output

    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        for name, value in constants.items():
            patch.setattr(housekeeping if name == "CHECKPOINTS" else module, name, value)
        patch.setattr(sys, "argv", [f"folder/{script}.py", *words])
        patch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
        with pytest.raises(SystemExit) as end:
            run_script(module.main, getattr(module, "answer", None))
    assert end.value.code == 130 or re.fullmatch("error: .*: .*\n", errors.getvalue())
    return errors.getvalue()


WRONG = {int: [0, 1.5, True, "64", 2.0], float: ["0.1", True, 10 ** 400], bool: [0, 1, "True"],
         str: ["float8", 0], tuple: [(), (0, -1), (2.5,), [2], 2]}
GOOD = {"DEVICE None", "SEED 0", "WARMUP_STEPS 0", "PROFILE_STEPS 0"}


@pytest.mark.parametrize("script", [s for s in TOP_LEVEL + VARIATIONS if constants_of(s)])
def test_every_constant_rejects_wrong_values_by_name(script):
    """Of the wrong type, sign, or size. So no constant is without a rule."""
    module, missed = importlib.import_module(script), []
    for name in constants_of(script):
        wrong = [None, "x", [], -1, math.nan, math.inf, 1j, *WRONG[type(getattr(module, name))]]
        for value in (value for value in wrong if f"{name} {value}" not in GOOD):
            line = verdict(script, **{name: value})
            if not re.search(rf"\b{name}=.*use ", line):
                missed.append((name, value, line))
    assert not missed


@pytest.mark.parametrize("script, words, constants, message", [
    ("quick_start", "", {"NUM_HEADS": 3}, "NUM_HEADS=3"),
    ("decoder_only", "", {"D_MODEL": 65, "NUM_HEADS": 5}, "D_MODEL=65"),
    ("encoder_only", "", {"BATCH_SIZE": 5402}, "WARMUP_STEPS=40 takes all of the 4 steps"),
    ("encoder_decoder", "", {"NUM_SAMPLES": 111111}, "only 111110 distinct sequences"),
    ("quick_start", "", {"LEARNING_RATE": 0}, "=0 "), ("encoder_only", "", {"DROPOUT": 1}, "=1 "),
    ("quick_start", "", {"DEVICE": "tpu"}, "DEVICE='tpu' is not available here: use 'cpu'"),
    ("train_all", "", {"MIN_LEARNING_RATE": 0.01}, "MIN_LEARNING_RATE=0.01 is above LEARNING_RATE"),
    ("train_all", "4", {}, "train_all.py takes no arg"), ("encoder_decoder", "407", {}, "'407'"),
    ("decoder_only", "4 x", {}, "'x' is unknown: use 0 1 2"),
    ("decoder_only", "\u0664", {}, "'\\u0664' is unknown"),
    ("encoder_only", "four 0", {}, "'0' is unknown: use zero one"),
    ("encoder_only", "4", {"CHECKPOINTS": ROOT / "none"}, "no encoder_only.pt in none/")])
def test_a_plausible_mistake_gives_one_line(script, words, constants, message):
    line = verdict(script, *words.split(), **constants)
    assert message in line and line.isascii()


SMALL = {"NUM_EPOCHS": 1, "NUM_SAMPLES": 300, "D_MODEL": 12, "NUM_HEADS": 3, "WARMUP_STEPS": 1}


@pytest.mark.parametrize("script", ARCHITECTURES)
@pytest.mark.parametrize("constants", [
    {"MAX_DIGITS": 2, "NUM_SAMPLES": 110, "BATCH_SIZE": 2}, {"MAX_DIGITS": 9},
    {"DROPOUT": 0.3, "NUM_HEADS": 1}, {"WARMUP_STEPS": 0, "BATCH_SIZE": 270}])
def test_scripts_finish_with_extreme_constants(script, constants, tmp_path):
    printed = run_main(script, **{**SMALL, "CHECKPOINTS": tmp_path, **constants})
    assert re.search(r"\nsaved .*\.pt\n(.*\n)*\nResult on ", printed)


# --- What goes wrong, in one line -------------------------------------------------------
@pytest.mark.parametrize("error, code, line", [
    (InputError("A=1: use 2"), 2, "error: A=1: use 2"), (KeyboardInterrupt(), 130, "stopped by"),
    (ValueError("a"), None, ""), (KeyError("a"), None, ""), (OSError(28, "full"), None, "")])
def test_an_error_in_changed_code_keeps_its_traceback(error, code, line, monkeypatch, capsys):
    """Only a mistake in the input and Ctrl-C become one line."""
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit if code else type(error)) as found:
        run_script(main)
    assert found.value is error if code is None else found.value.code == code
    assert capsys.readouterr().err.strip().startswith(line)


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_a_failed_write_does_not_cost_the_result(script, tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    printed = run_main(script, **SMALL, CHECKPOINTS=tmp_path / "file")
    assert re.search(r"\nwarning: could not save (.*\n)*\nResult on ", printed)


@needs_signals
def test_ctrl_c_prints_one_line_and_keeps_saved_checkpoints(workplace):
    checkpoint = workplace.folder / "checkpoints" / "decoder_only.pt"
    MODELS["decoder_only"](d_model=16, num_heads=2).save(checkpoint)
    before = checkpoint.read_bytes()
    # Tests that are started in the background inherit an ignored SIGINT, unlike a user's script.
    run = ("import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
           "runpy.run_path('decoder_only.py', run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-u", "-c", run], cwd=workplace.folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    next(line for line in process.stdout if "  epoch  1" in line)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and checkpoint.read_bytes() == before
    assert errors.strip().startswith("stopped by Ctrl-C") and errors.strip().count("\n") == 0


@needs_signals
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_reader_that_closes_early_such_as_head_is_no_error(options, workplace, tmp_path_factory):
    process = subprocess.Popen([sys.executable, *options, workplace.folder / "toy_dataset.py"],
                               cwd=tmp_path_factory.mktemp("other"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


# --- Checkpoints ------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_unchanged(name, tmp_path):
    model = MODELS[name](d_model=12, num_heads=3, num_layers=1, d_ff=20)
    model.notes = {"exact_match": 0.25}
    model.save(tmp_path / "new" / "model.pt")
    loaded = MODELS[name].load(tmp_path / "new" / "model.pt")
    weights = loaded.state_dict()
    assert loaded.arguments == model.arguments and loaded.notes == model.notes
    assert set(weights) == {key for key, _ in model.named_parameters(remove_duplicate=False)}
    assert all(weights[key].equal(value) for key, value in model.state_dict().items())
    assert loaded.output.weight is loaded.embedding.weight and not loaded.training
    assert os.listdir(tmp_path / "new") == ["model.pt"]  # the temporary file is gone


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def inside(change):
    def damage(path):
        content = torch.load(path)
        change(content, content["weights"])
        torch.save(content, path)
    return damage


DAMAGE = {
    "garbage": lambda path: path.write_bytes(b"not a checkpoint at all" * 99),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "a flipped bit": lambda path: path.write_bytes(
        bytes(byte ^ 4 * (i == 5000) for i, byte in enumerate(path.read_bytes()))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "code": inside(lambda saved, weights: weights.update(more=Attack())),
    "another class": inside(lambda saved, _: saved.update(architecture="DecoderOnlyTransformer")),
    "another size": inside(lambda saved, _: saved["arguments"].update(d_model=24)),
    "a missing weight": inside(lambda saved, weights: weights.pop("final_norm.bias")),
    "another weight": inside(lambda saved, weights: weights.update(more=torch.zeros(1))),
    "NaN": inside(lambda saved, weights: weights["final_norm.bias"].fill_(math.nan)),
    "untied": inside(lambda _, weights: weights.update({"output.weight": torch.ones(26, 12)}))}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A small model and the path at which it is saved."""
    model = MODELS["encoder_only"](d_model=12, num_heads=3, num_layers=1, d_ff=20)
    model.save(tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return model, tmp_path / "model.pt"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_gives_one_line(damage, saved):
    DAMAGE[damage](saved[1])
    with pytest.raises(InputError, match="^model.pt cannot be used .*: delete it[^\n]*$"):
        MODELS["encoder_only"].load(saved[1])
    assert os.listdir() == ["model.pt"]  # and no "pwned"


@needs_signals
def test_a_full_disk_leaves_the_old_checkpoint_intact(saved):
    import resource
    model, path = saved
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # bytes
    try:
        with pytest.raises(OSError):
            model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir() == ["model.pt"]


def test_a_loaded_model_shows_its_score_and_a_poor_one_its_constants(saved, capsys):
    (model, path), load = saved, functools.partial(housekeeping.load_model, MODELS["encoder_only"])
    for score, constants in ((0.957, ""), (0.25, ", trained with SEED=3, NUM_EPOCHS=1")):
        housekeeping.save_model(model, path, score, {"SEED": 3, "NUM_EPOCHS": 1, "OTHER": 4})
        load(path)
        assert f"model.pt: exact match {score:.1%}{constants}\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="exact match 25.0%, trained with SEED=3"):
        load(path, at_least=0.5)


# --- What you read is what runs ---------------------------------------------------------
@pytest.mark.parametrize("script", ARCHITECTURES)
def test_editing_the_formula_changes_training_and_answers(script):
    """If the scores in the text of the formula are multiplied by 3, losses and answers change."""
    batch, results, formula = next(iter(create_dataloaders(200, 5, 40, 0)[0])), [], "queries @ keys"
    assert source(script).count(formula) == 1
    for new in (formula, "3 * queries @ keys"):
        module = ModuleType(script)
        exec(compile(source(script).replace(formula, new), script, "exec"), vars(module))
        torch.manual_seed(1)
        model = getattr(module, MODELS[script].__name__)(d_model=12, num_heads=3).eval()
        for parameter in model.parameters():
            parameter.data *= 5
        loss = module.compute_loss(model, batch).item()
        results.append((loss, module.translate(model, batch["digits"])))
    assert results[0][0] != results[1][0] and results[0][1] != results[1][1]
    assert tiny_gpt(40).loss != tiny_gpt(40, "scores = 3 * q @ k").loss


# --- The texts: copies agree, marks are correct, imports only go down --------------------
OWN = {"logits_and_labels", "translate", "main", "answer", "show_attention"}  # one per script


def definitions(script, other):
    """{name: syntax tree}, without docstrings and what is marked NEW since the earlier script."""
    first = min(ARCHITECTURES.index(script), ARCHITECTURES.index(other))
    new = rf"NEW in (?:{'|'.join(ARCHITECTURES[first + 1:])})\.py: "
    text = re.sub(rf"(?m)^ *# --- {new}(?:.*\n)*?^ *# --- end of what is new ---\n", "",
                  source(script))
    text = re.sub(rf"(?m)^(.*)# {new}(.*)$", lambda line: re.sub(
        rf"\b(?:{line[2].replace(', ', '|')})\b(=\w+)?,? *", "", line[1]), text)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return {node.name: ast.dump(node) for node in tree.body if hasattr(node, "name")}


@pytest.mark.parametrize("one, other", [ARCHITECTURES[:2], ARCHITECTURES[1:], ARCHITECTURES[::2]])
def test_code_with_one_name_differs_only_where_marked_new(one, other):
    here, there = definitions(one, other), definitions(other, one)
    shared = here.keys() & there.keys() - OWN
    assert {"attention", "MultiHeadAttention", "PositionalEncoding", "train_epoch"} <= shared
    assert one == "encoder_only" or {"DecoderLayer", "KeyValueCache"} <= shared
    assert [name for name in shared if here[name] != there[name]] == []


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_marks_name_what_exists_and_blocks_are_closed(script):
    """A mark KNOWN says where reading continues. Up to there, everything is in the other script."""
    text, later = source(script), ARCHITECTURES[1:ARCHITECTURES.index(script) + 1]
    assert set(re.findall(r"NEW in (\w+)\.py", text)) == set(later)
    assert text.count("# --- NEW in ") == text.count("# --- end of what is new ---")
    marks = list(re.finditer(r"# KNOWN from (\w+)\.py([^`]*) at\s(?:# )?`(\w+)`\.\n", text))
    assert len(marks) == text.count("# KNOWN") and (marks or script == "decoder_only")
    for mark in marks:
        end = re.search(rf"(?m)^(?:@.*\n)?(?:class|def) {mark[3]}\b", text).start()
        names = set(re.findall(r"(?m)^(?:class|def) (\w+)", text[mark.end():end]))
        assert names and names <= definitions(mark[1], script).keys() - OWN
        assert "here" in mark[2] or "NEW in" not in text[mark.end():end]


FLOORS = {"housekeeping": 0, "toy_dataset": 1, "training": 1, **dict.fromkeys(ARCHITECTURES, 2),
          **dict.fromkeys(["quick_start", "train_all", *VARIATIONS], 3),
          **dict.fromkeys(["compare_architectures", "take_apart", "visualizations"], 4)}
BESIDE = {"training": {"toy_dataset"}, "train_all": {"quick_start"},
          **dict.fromkeys(VARIATIONS, set(VARIATIONS))}


@pytest.mark.parametrize("script", TOP_LEVEL + VARIATIONS)
def test_imports_only_go_down_and_stay_within_the_requirements(script):
    """The two scripts on the ground (floor -1) import nothing of ours, and nothing imports them."""
    nodes = list(ast.walk(ast.parse(source(script))))
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.split(".")[0] for name in names}
    ours, floor = imported & {*TOP_LEVEL, *VARIATIONS}, FLOORS.get(script, -1)
    assert imported - ours <= {*sys.stdlib_module_names, "torch", "numpy", "tqdm", "matplotlib"}
    assert ours <= {name for name in FLOORS if FLOORS[name] < floor} | BESIDE.get(script, set())
    assert floor >= 0 or script in ("tiny_gpt", "attention_by_hand")
    assert source(script).isascii()


@pytest.mark.parametrize("script", [*ARCHITECTURES, "toy_dataset", "training", "housekeeping",
                                    "quick_start"])
def test_functions_have_docstrings_and_only_main_reads_constants(script):
    """Other functions take what they depend on as arguments, so no script acts on another."""
    for node in ast.parse(source(script)).body:
        if hasattr(node, "name") and node.name not in ("main", "answer"):
            read = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            assert ast.get_docstring(node) and not read & set(constants_of(script)), node.name
