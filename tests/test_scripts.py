"""The scripts as a user runs them: results, messages, checkpoints, constants, and their texts."""
import ast
import atexit
import contextlib
import functools
import importlib
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

from conftest import MODELS, ROOT, SCRIPTS, finished, last_lines_as_promised, run_of
import pytest
import torch
from torch import nn

from housekeeping import InputError, prepare, run_script
from toy_dataset import (DIGITS, VOCABULARY, WORD_OF, WORDS, NumberTranslationDataset,
                         create_dataloaders, exact_match)
from training import lr_factor

ARCHITECTURES = list(SCRIPTS)
TOP_LEVEL = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "scratch")
VARIATIONS = sorted(path.stem for path in ROOT.glob("variations/*.py"))
SMALL = {"NUM_EPOCHS": 1, "NUM_SAMPLES": 300, "D_MODEL": 16, "NUM_HEADS": 2, "NUM_LAYERS": 1,
         "D_FF": 32}
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and limits")


def source(script):
    folder = "variations/" if script in VARIATIONS else ""
    return (ROOT / f"{folder}{script}.py").read_text(encoding="utf-8")


def percentages(text, pattern):
    return [float(found) for found in re.findall(pattern + r".*?(\d+\.\d)%", text)]


# --- Results --------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["toy_dataset", "attention_by_hand", *ARCHITECTURES,
                                    "quick_start"], ids=run_of)
def test_each_script_prints_its_documented_results(script):
    _, done = finished(script)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # no warnings, no progress bars
    measured = script not in ("toy_dataset", "attention_by_hand")
    assert last_lines_as_promised(script, done.stdout, to_the_letter=not measured)
    last = done.stdout.split("\nResult on ")[-1]
    if script == "quick_start":
        assert min(percentages(last, r"\n\w+-\w+ ")) >= 99.0
    elif measured:
        assert percentages(last, "digits to words")[0] >= 99.5
        # Saved before the demonstrations, which take longer
        assert done.stdout.index("saved checkpoints/") < done.stdout.index("\n2. ")
    if script == "encoder_only":
        assert percentages(last, "words to digits")[0] >= 95.0
        assert percentages(last, "pretrained")[0] >= 75.0 >= percentages(last, "scratch")[0]


def test_each_stage_of_attention_by_hand_matches_the_previous_one():
    printed = finished("attention_by_hand")[1].stdout
    assert printed.count(": True") == 5 and "False" not in printed
    largest = [[float(x) for x in re.findall(r"largest weight ([\d.]+)", line)]
               for line in printed.splitlines() if line.startswith("  K = ")]
    assert largest[0][0] < largest[1][0] < largest[2][0] and largest[2][0] > 0.9
    assert max(scaled for _, scaled in largest) < 0.3


@pytest.mark.parametrize("script", ARCHITECTURES, ids=run_of)
def test_after_a_run_a_script_translates_its_arguments(script):
    place, _ = finished(script)
    done = place.run(script, "4", "0", "7")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[0] == "4 0 7  ->  four zero seven"
    assert re.search(r"^ +4 +0 +7", done.stdout, flags=re.MULTILINE)  # one attention table
    weights = re.findall(r"^  (?:->|<MASK>) \S+ +((?:\d\.\d\d *)+)$", done.stdout, re.MULTILINE)
    assert len(weights) == (3 if script == "encoder_only" else 4)
    for row in weights:
        assert sum(map(float, row.split())) == pytest.approx(1, abs=0.06)
    if script == "encoder_only":
        back = place.run(script, "four", "zero", "seven").stdout
        assert back.startswith("four zero seven  ->  4 0 7\n")
        assert "length was given" in back and "length was given" in done.stdout


def test_a_script_runs_from_any_folder(workplace, tmp_path_factory):
    done = subprocess.run([sys.executable, str(workplace.folder / "toy_dataset.py")],
                          cwd=tmp_path_factory.mktemp("else"), capture_output=True, timeout=60)
    assert done.returncode == 0


# --- tiny_gpt.py ----------------------------------------------------------------------
@functools.cache
def tiny_gpt(steps, *edit, seed=3):
    """The names that tiny_gpt.py defines when it runs for `steps` steps, and what it prints."""
    text = source("tiny_gpt")
    for old, new in ((" = 0, 700, ", f" = {seed}, {steps}, "), *edit):
        assert text.count(old) == 1
        text = text.replace(old, new)
    drawn, choices, printed, names = set(), random.choices, io.StringIO(), {}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(random, "choices",
                      lambda rows, k: (drawn.update(rows), choices(rows, k=k))[1])
        exec(compile(text, "tiny_gpt.py", "exec"), names)
    return SimpleNamespace(**names, drawn=drawn, printed=printed.getvalue().splitlines())


def test_tiny_gpt_reaches_98_percent_and_prints_an_example_per_length():
    printed = finished("tiny_gpt")[1].stdout
    promised = source("tiny_gpt").split("It ends with `")[1].split(":")[0]
    assert promised == "exact match on 511 held-out numbers"
    assert 98.0 <= percentages(printed.splitlines()[-1], f"^{promised}: ")[0] <= 100.0
    assert re.findall(r"^step (\d+)   loss \d\.\d{4}$", printed, re.MULTILINE) == [
        f"{n}00" for n in range(1, 8)]
    examples = re.findall(r"^([\d ]+) = ([a-z ]+) \.$", printed, re.MULTILINE)
    assert [len(digits.split()) for digits, _ in examples] == [1, 2, 3, 4, 5]
    assert all([WORD_OF[d] for d in digits.split()] == words.split() for digits, words in examples)


@torch.no_grad()
def test_tiny_gpt_is_scored_on_whole_answers_that_it_never_saw():
    """Half trained, it gets many tokens right, but fewer answers. Both are recomputed here."""
    tiny = tiny_gpt(150)
    held_out = [rows[:len(rows) // 10] for rows in tiny.NUMBERS]
    assert tiny.drawn and not tiny.drawn & {number for rows in held_out for number in rows}
    exact, tokens = [], []
    for number in (number for rows in held_out for number in rows[:200]):
        row = [tiny.TOKENS.index(digit) for digit in number] + [tiny.TOKENS.index("=")]
        for token in [WORD_OF[digit] for digit in number] + ["."]:
            row.append(tiny.model(torch.tensor([row]))[0, -1].argmax().item())
            tokens.append(tiny.TOKENS[row[-1]] == token)
        exact.append(all(tokens[-len(number) - 1:]))
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
    weights = {}
    for name, value in tiny.model.state_dict().items():
        name = re.sub(r"^embedding$", "embedding.weight", re.sub("^norm", "final_norm", name))
        name = re.sub(r"blocks\.(\d+)\.([qkvo])\.", r"layers.\1.self_attention.w_\2.", name)
        name = name.replace("mlp.0", "feed_forward.up").replace("mlp.2", "feed_forward.down")
        weights[name.replace("blocks", "layers")] = value
    ours.load_state_dict({**weights, "output.weight": weights["embedding.weight"]})
    rows = torch.tensor([tiny.encode("40725"), tiny.encode("13133")])
    torch.testing.assert_close(ours(rows), tiny.model(rows), atol=1e-5, rtol=0)


# --- What a small run trains on, scores, and saves -------------------------------------
class Witness:
    """Watches a run from outside: the rows that every model reads, and every optimizer step."""

    def __enter__(self):
        self.embeddings, self.learned, self.steps, self.types = {}, [], [], set()
        self.hooks = [nn.modules.module.register_module_forward_pre_hook(self.read),
                      torch.optim.optimizer.register_optimizer_step_pre_hook(self.step)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def read(self, module, inputs):
        learns = module.training and torch.is_grad_enabled()
        if isinstance(module, nn.Dropout) and learns:
            self.types.add(inputs[0].dtype)
        if not isinstance(module, nn.Embedding) or inputs[0].size(1) == 1:  # 1: generated tokens
            return
        if not hasattr(module, "seen"):  # a copy of the model remembers what the original saw
            module.seen, module.first = {True: set(), False: set()}, module.weight.detach().clone()
        self.embeddings[id(module)] = module
        rows = [VOCABULARY.decode(ids) for ids in inputs[0][:, inputs[0].ne(0).any(0)].tolist()]
        module.seen[learns] |= set(map(digits_of, rows)) - {None}
        if learns and rows[0][0] != "<SOS>":
            self.learned.append(rows)

    def step(self, optimizer, *_):
        norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        self.steps.append((optimizer.param_groups[0]["lr"], torch.stack(norms).norm().item(),
                           [group["weight_decay"] for group in optimizer.param_groups]))


def digits_of(row):
    """The sequence that a row spells, in digits, words, or both; None if its two sides differ."""
    row = [token for token in row if token != "<PAD>"]
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
    "FINETUNE_LEARNING_RATE": 0.0045, "BEAM_WIDTH": 5, "LENGTH_PENALTY": 0.6, "NUM_EXAMPLES": 2,
    "VALIDATION_SHARE": 0.2, "ACCUMULATION_STEPS": 3, "MIN_LEARNING_RATE": 0.0011,
    "WEIGHT_DECAY": 0.03, "LABEL_SMOOTHING": 0.2, "PRECISION": "bfloat16"}
TRAININGS = [*ARCHITECTURES, "quick_start", "train_all"]


@functools.cache
def small_run(script):
    """What a Witness of main() saw with VALUES for its constants, what it printed, and saved."""
    module, printed = importlib.import_module(script), io.StringIO()
    folder = Path(tempfile.mkdtemp(prefix=f"{script}_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), \
            Witness() as witness:
        places = {"CHECKPOINTS": folder, "RUNS": folder, "UNFINISHED": folder / "unfinished.pt"}
        for name, value in {**VALUES, **places}.items():
            if hasattr(module, name):
                patch.setattr(module, name, value)
        module.main()
        witness.threads = torch.get_num_threads()
    torch.set_num_threads(1)
    witness.printed, witness.script = printed.getvalue(), module
    witness.models = {name: model_class.load(folder / f"{name}.pt")
                      for name, model_class in MODELS.items() if (folder / f"{name}.pt").exists()}
    return witness


def split(script):
    """The training and the held-out sequences of small_run(script)."""
    dataset = NumberTranslationDataset(700, 3, 5)
    return [{tuple(dataset[i]["digits"]) for i in part}
            for part in dataset.split(0.2 if script == "train_all" else 0.1)]


def assert_scored_on_held_out_rows(witness):
    """No model, copies included, was ever scored on a sequence that it was trained on."""
    models = [embedding.seen for embedding in witness.embeddings.values()]
    assert sum(bool(seen[True] and seen[False]) for seen in models) > 0
    for seen in models:
        assert not seen[True] & seen[False]
    return [set().union(*(seen[learned] for seen in models)) for learned in (True, False)]


@pytest.mark.parametrize("script", TRAININGS)
def test_what_is_scored_is_held_out(script):
    trained, scored = assert_scored_on_held_out_rows(small_run(script))
    training, held_out = split(script)
    assert trained <= training and len(trained) > 0.95 * len(training) and held_out <= scored
    counts = re.findall(r"(\d+) training and (\d+) held-out", small_run(script).printed)
    assert set(counts) == {(str(len(training)), str(len(held_out)))}


def test_variations_are_scored_on_what_is_held_out(monkeypatch):
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "loaders", functools.partial(measure.loaders, num_samples=300,
                                                              max_digits=3))
    for function in (lambda model: measure.train(model, 2, 0),
                     lambda model: (measure.train(model, 1, 0), measure.evaluate_held_out(model, 0)),
                     lambda model: measure.train_and_score(model, 1, 0)):
        with Witness() as witness:
            function(measure.new_model(0, d_model=12, num_heads=3, num_layers=1, d_ff=20))
        trained, scored = assert_scored_on_held_out_rows(witness)
        dataset = NumberTranslationDataset(300, 3, 0)
        assert [trained, {row for row in scored if len(row) < 6}] == [
            {tuple(dataset[i]["digits"]) for i in part} for part in dataset.split(0.1)]


@pytest.mark.parametrize("script", TRAININGS)
def test_constants_reach_their_place(script):
    run, training = small_run(script), len(split(script)[0])
    sizes = {name.lower(): VALUES[name] for name in ("D_MODEL", "NUM_HEADS", "NUM_LAYERS", "D_FF",
                                                     "DROPOUT")}
    first = {tuple(e.first.flatten().tolist()) for e in run.embeddings.values()}
    for name, model in run.models.items():
        assert sizes.items() <= model.arguments.items()
        torch.manual_seed(5)  # SEED: the weights; the sequences also depend on it
        assert tuple(MODELS[name](**model.arguments).embedding.weight.flatten().tolist()) in first
    assert max(map(len, run.learned)) == 17 and run.threads == 2
    per_epoch = training // 51 if script == "train_all" else math.ceil(training / 17)
    rates = [[0.0123 * lr_factor(step, 3 * per_epoch, 3, 0.0011 / 0.0123 if script == "train_all"
                                 else 0.05) for step in range(3 * per_epoch)]] * len(run.models)
    if script == "encoder_only":  # fine-tuning, and the same total number of epochs from scratch
        rates += [[0.0045 * lr_factor(step, epochs * per_epoch, 3)
                   for step in range(epochs * per_epoch)] for epochs in (1, 3 + 1)]
        rows = sum(run.learned[:3 * per_epoch], [])
        sides = [row[:row.index("<SEP>")] if "<MASK>" in row[0::1][:row.index("<SEP>")]
                 else row[row.index("<SEP>") + 1:] for row in rows]
        masks = sum(side.count("<MASK>") for side in sides)
        words = sum(sum(token != "<PAD>" for token in row) // 2 for row in rows)
        assert masks / words == pytest.approx(0.4, abs=0.04)  # MASK_SHARE and MIN_MASKING_RATE
        assert None not in map(digits_of, rows)  # RANDOM_SHARE
    assert [rate for rate, _, _ in run.steps] == pytest.approx(sum(rates, []))
    assert [norm for _, norm, _ in run.steps] == pytest.approx([0.05] * len(run.steps), rel=1e-3)
    assert all(decay == ([0.03, 0.0] if script == "train_all" else [0.01])
               for _, _, decay in run.steps)
    assert run.types == {torch.bfloat16 if script == "train_all" else torch.float32}
    if script == "quick_start":
        assert run.printed.split("mistakes first")[1].split("Result on")[0].count(" -> ") == 3 * 2
    if script == "train_all":
        assert len(run.learned) == 3 * len(run.steps)  # micro-batches


@pytest.mark.parametrize("script", TRAININGS)
def test_the_saved_model_is_the_one_whose_score_is_printed(script):
    run = small_run(script)
    lines = re.findall(r"validation loss (\S+)   exact match +(\S+)%(   best so far)?", run.printed)
    shown = [lines[3 * i:3 * i + 3] for i in range(len(run.models))]
    if script == "train_all":
        shown = [[line for line in epochs if line[2]] for epochs in shown]
    for (name, model), (*_, (loss, exact, _)) in zip(run.models.items(), shown):
        items = [item for item in NumberTranslationDataset(700, 3, 5).items
                 if tuple(item["digits"]) in split(script)[1]]
        loader = create_dataloaders(700, 3, 17, 5, 0.2 if script == "train_all" else 0.1)[1]
        result = SCRIPTS[name].evaluate(model, loader)
        assert len(items) == len(result["examples"])
        assert (f"{result['loss']:.4f}", f"{100 * result['exact_match']:.1f}") == (loss, exact)
