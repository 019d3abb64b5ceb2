"""
housekeeping.py - checks, checkpoints, and running a script

Nothing in this file is about transformers. Skip it on a first reading.

    prepare       checks a script's constants, sets the seed, and returns the device
    BaseModel     an nn.Module that checks its arguments and can save and load itself
    run_script    prints one line for a mistake in the input, a traceback for other errors
"""
import contextlib
import io
import os
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent
CHECKPOINTS = ROOT / "checkpoints"


class InputError(ValueError):
    """A mistake in the input. The message is one line that says what is wrong and what works."""


# --- Constants and arguments ----------------------------------------------------------
def whole(low):
    """Return a test for plain whole numbers of at least `low` (True and 64.0 are none)."""
    return lambda value: type(value) is int and low <= value < 2 ** 60


def number(low, high):
    """Return a test for plain numbers from `low` to `high`; NaN is none."""
    return lambda value: type(value) in (int, float) and low <= value <= high


RULES = [  # (pattern of the name, what is allowed, test); the first pattern that fits counts
    ("SEED|WARMUP_STEPS|PROFILE_STEPS", "a whole number, 0 or more", whole(0)),
    ("FEW_SEQUENCES|ABLATION_LAYERS", "a tuple of positive whole numbers",
     lambda value: isinstance(value, tuple) and all(map(whole(1), value)) and value),
    (r"(D|MAX|NUM)_\w+|\w+_(EPOCHS|EVERY|SIZE|STEPS|WIDTH)|CLIP|TILE|TOP_K",
     "a positive whole number", whole(1)),
    ("MIN_LEARNING_RATE|WEIGHT_DECAY|LENGTH_PENALTY", "a number from 0 to 10", number(0, 10)),
    ("TEMPERATURE", "0 (greedy), or a number from 0.01 to 1000",
     lambda value: number(0, 0)(value) or number(0.01, 1000)(value)),
    (r"\w*(LEARNING|UPTRAINING)_RATE|CLIP_NORM|REPETITION_PENALTY", "a number above 0",
     number(1e-12, 1e9)),
    ("DROPOUT|LABEL_SMOOTHING", "a number from 0 to 0.99", number(0, 0.99)),
    ("TOP_P|VALIDATION_SHARE", "a number above 0, at most 1", number(1e-12, 1)),
    (r"\w+_SHARE|MIN_MASKING_RATE", "a number from 0 to 1", number(0, 1)),
    ("PRECISION", "'float32', 'bfloat16', or 'float16'",
     lambda value: value in ("float32", "bfloat16", "float16")),
    ("COMPILE|FULL|GUESS|FUSED_ATTENTION|GRADIENT_CHECKPOINTING", "True or False",
     lambda value: type(value) is bool),
]


def check(**values):
    """Raise InputError for the first of these constants or arguments that cannot work.

    d_model and D_MODEL share a rule. Names without one are ignored. top_k and top_p may be None.
    """
    for name, value in values.items():
        rule = next((rule for rule in RULES if re.fullmatch(rule[0], name.upper())), None)
        if rule and not rule[2](value) and not (value is None and name in ("top_k", "top_p")):
            raise InputError(f"{name}={value!r} cannot work: use {rule[1]}")
    heads = values.get("num_heads", values.get("NUM_HEADS", 1))
    size = values.get("d_model", values.get("D_MODEL", 2 * heads))
    if size % 2 or size % heads:
        raise InputError(f"D_MODEL={size} with NUM_HEADS={heads} cannot work: use an even size "
                         "that the number of heads divides, such as 64 and 4")
    if values.get("temperature") == 0 and (values["top_k"] or values["top_p"]):
        raise InputError("top_k and top_p do nothing at temperature=0 (greedy): use 1.0, say")


def choose_device(name):
    """Return the torch.device `name`, such as "cpu". Raises InputError if it is not available."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"DEVICE={name!r} is not available here: use 'cpu'") from error


def prepare(constants):
    """Check a script's constants (its `globals()`), set seed and threads, and return the device."""
    check(**{name: value for name, value in constants.items() if name.isupper()})
    torch.manual_seed(constants.get("SEED", 0))
    torch.set_num_threads(constants.get("NUM_THREADS", 1))  # at this size, more gain little
    return choose_device(constants.get("DEVICE", "cpu"))


# --- Models and files -----------------------------------------------------------------
def write_atomically(path, content):
    """Write bytes, or what torch.save makes of another value, or raise OSError.

    The old file stays intact until the new one is complete.
    """
    buffer = io.BytesIO()
    if not isinstance(content, bytes):
        torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue() or content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path, device="cpu"):
    """Return the tensors and plain values in a file. A damaged file can raise anything.

    torch.load ignores the checksums of the zip format, so a flipped bit would load as a wrong
    weight. weights_only=True prevents the code execution that pickle allows.
    """
    if zipfile.ZipFile(path).testzip() is not None:
        raise ValueError("checksum error")
    return torch.load(path, map_location=device, weights_only=True)


class BaseModel(nn.Module):
    """What the models share that is not about transformers: arguments, checks, and checkpoints."""

    def __init__(self, **arguments):
        super().__init__()
        check(**arguments)
        self.arguments, self.notes = arguments, {}  # notes: how it was trained, with which score

    @contextlib.contextmanager
    def evaluation_mode(self):
        """Switch off dropout inside the `with` block, and restore the mode afterward."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def check_input(self, rows, new_tokens=0, **options):
        """Raise InputError unless these lists of ids fit, with room for `new_tokens` more each."""
        check(**options)
        if not isinstance(rows, list) or not all(isinstance(a, list) and a for a in [rows, *rows]):
            raise InputError("the input must be a list of lists, none of them empty: use one such "
                             "as [['4', '0', '7'], ['9']], or ids such as [[10, 6, 13], [15]]")
        size, max_len = self.arguments["vocab_size"], self.arguments["max_len"]
        for i in sum(rows, []):
            if not whole(0)(i) or i >= size:
                raise InputError(f"token id {i!r} is outside the vocabulary: use 0 to {size - 1}")
        longest = max(map(len, rows)) + new_tokens
        if longest > max_len:
            raise InputError(f"{longest} positions are needed, but max_len={max_len}: use a "
                             "shorter input, or build the model with a larger max_len")

    def save(self, path):
        """Write class name, arguments, notes, and weights to `path`, or raise OSError."""
        write_atomically(Path(path), {
            "architecture": type(self).__name__, "arguments": self.arguments, "notes": self.notes,
            "weights": self.state_dict()})

    @classmethod
    def load(cls, path, device="cpu"):
        """Return the model saved at `path`, in evaluation mode, or raise InputError."""
        path, device = Path(path), choose_device(str(device))
        try:
            saved = load_tensors(path, device)
            if saved["architecture"] != cls.__name__:
                raise ValueError(f"it contains a {saved['architecture']}")
            model = cls(**saved["arguments"]).to(device).eval()
            model.load_state_dict(saved["weights"])
            model.notes = saved["notes"]
            if not all(w.equal(saved["weights"][k]) for k, w in model.state_dict().items()):
                raise ValueError("it contains NaN, or tied weights that differ")
        except FileNotFoundError:
            raise InputError(f"no {path.name} in {path.parent.name}/: run the script of that name "
                             "first") from None
        except Exception as error:  # a damaged or foreign file can raise anything
            reason = ascii(str(error).partition("\n")[0][:80] or type(error).__name__)
            raise InputError(f"{path.name} cannot be used as {cls.__name__} ({reason}): delete it "
                             "and train again") from error
        return model


def save_model(model, file, exact_match, constants):
    """Save `model` in checkpoints/ with its score and its script's constants (`globals()`).

    Returns True, or prints a warning and returns False.
    """
    model.notes = {"exact_match": exact_match, "constants": {
        name: value for name, value in constants.items()
        if name.isupper() and any(re.fullmatch(pattern, name) for pattern, _, _ in RULES)}}
    try:
        model.save(CHECKPOINTS / file)
    except OSError as error:
        print(f"warning: could not save checkpoints/{file} ({error.strerror})")
        return False
    print(f"saved checkpoints/{file}")
    return True


def load_model(model_class, file, device="cpu", at_least=0.0):
    """Load a model from checkpoints/ and print its score, and its constants if that is poor.

    Raises InputError for a score below `at_least`, so that a failed run spoils no other script.
    """
    model = model_class.load(CHECKPOINTS / file, device)
    score = model.notes.get("exact_match", 0.0)  # a model without notes was saved by hand
    text = f"checkpoints/{file}: exact match {score:.1%}"
    if score < max(at_least, 0.9):
        text += ", trained with " + ", ".join(
            f"{name}={value}" for name, value in model.notes.get("constants", {}).items())
    if score < at_least:
        raise InputError(text)
    print(text)
    return model


# --- Running --------------------------------------------------------------------------
def run_script(main, answer=None):
    """Call `main()`, or `answer(words)` if words follow the script's name on the command line.

    InputError prints one line and exits with 2, Ctrl-C with 130. Other errors keep their traceback.
    """
    words = sys.argv[1:]
    try:
        if words and answer is None:
            raise InputError(f"{Path(sys.argv[0]).name} takes no arguments: change the constants "
                             "at the top of the file instead")
        answer(words) if words else main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; files that were already saved are intact", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that reads the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
