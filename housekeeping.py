"""
housekeeping.py - checks, checkpoints, and running a script

Nothing in this file is about transformers. Skip it on a first reading.

    prepare             checks a script's constants, sets the seed, and returns the device
    BaseModel           an nn.Module that checks its arguments and can save and load itself
    save_model          saves a model, or warns if that is impossible
    run_script          prints one line for a mistake in the input, a traceback for other errors
"""
import io
import math
import os
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
def is_number(value, low, high):
    """Return True for a plain int or float from `low` to `high`: no bool, no NaN."""
    return type(value) in (int, float) and low <= value <= high


def is_count(value, low=1):
    """Return True for a plain int of at least `low`."""
    return type(value) is int and value >= low


TINY = sys.float_info.min  # the smallest normal float: "above 0"
RULES = [  # (names, what they allow, test); d_model and D_MODEL share a rule
    ("D_MODEL D_FF NUM_HEADS NUM_LAYERS VOCAB_SIZE MAX_LEN NUM_SAMPLES MAX_DIGITS BATCH_SIZE "
     "ACCUMULATION_STEPS NUM_EPOCHS FINETUNE_EPOCHS TRAIN_EPOCHS UPTRAINING_EPOCHS NUM_STEPS "
     "ABLATION_STEPS UNDERTRAINED_STEPS FEW_STEPS EVALUATE_EVERY RESUME_EVERY NUM_EXAMPLES "
     "NUM_THREADS BEAM_WIDTH MAX_NEW_TOKENS TOP_K CLIP", "a positive whole number", is_count),
    ("SEED WARMUP_STEPS PROFILE_STEPS", "a whole number, 0 or more", lambda v: is_count(v, 0)),
    ("TILE", "a whole number, 8 or more", lambda v: is_count(v, 8)),
    ("LEARNING_RATE FINETUNE_LEARNING_RATE UPTRAINING_RATE CLIP_NORM REPETITION_PENALTY",
     "a number above 0", lambda v: is_number(v, TINY, 1e9)),
    ("MIN_LEARNING_RATE WEIGHT_DECAY LENGTH_PENALTY", "a number, 0 or more",
     lambda v: is_number(v, 0, 1e9)),
    ("TEMPERATURE", "0 for greedy generation, or a number from 0.01 up",
     lambda v: is_number(v, 0.01, 1e9) or is_number(v, 0, 0)),
    ("DROPOUT LABEL_SMOOTHING", "a number from 0 to 0.99", lambda v: is_number(v, 0, 0.99)),
    ("MASK_SHARE RANDOM_SHARE MIN_MASKING_RATE", "a number from 0 to 1",
     lambda v: is_number(v, 0, 1)),
    ("TOP_P VALIDATION_SHARE", "a number above 0, at most 1", lambda v: is_number(v, TINY, 1)),
    ("FEW_SEQUENCES ABLATION_LAYERS", "a tuple of positive whole numbers",
     lambda v: isinstance(v, tuple) and v != () and all(map(is_count, v))),
    ("PRECISION", "'float32', 'bfloat16', or 'float16'",
     lambda v: v in ("float32", "bfloat16", "float16")),
    ("GRADIENT_CHECKPOINTING COMPILE FUSED_ATTENTION FULL", "True or False",
     lambda v: type(v) is bool),
]
RULE_OF = {name: (allowed, test) for names, allowed, test in RULES for name in names.split()}


def check(**values):
    """Raise InputError for the first of these constants or arguments that cannot work.

    Names without a rule are ignored. top_k and top_p may be None.
    """
    for name, value in values.items():
        allowed, test = RULE_OF.get(name.upper(), ("", lambda _: True))
        if not test(value) and not (value is None and name in ("top_k", "top_p")):
            raise InputError(f"{name}={value!r} cannot work: use {allowed}")
    d_model, heads = ([n for n in values if n.upper() == name] for name in ("D_MODEL", "NUM_HEADS"))
    if d_model and values[d_model[0]] % 2:
        raise InputError(f"{d_model[0]}={values[d_model[0]]} cannot work: use an even number")
    if d_model and heads and values[d_model[0]] % values[heads[0]]:
        raise InputError(f"{heads[0]}={values[heads[0]]} does not divide {d_model[0]}="
                         f"{values[d_model[0]]}: use 1, 2, or another divisor")
    if values.get("MASK_SHARE", 0) + values.get("RANDOM_SHARE", 0) > 1:
        raise InputError(f"MASK_SHARE={values['MASK_SHARE']} and RANDOM_SHARE="
                         f"{values['RANDOM_SHARE']} sum to more than 1: use 0.8 and 0.1")
    if values.get("temperature") == 0 and (values.get("top_k") or values.get("top_p")):
        raise InputError("top_k and top_p have no effect at temperature=0 (greedy): use a "
                         "temperature such as 1.0")


def choose_device(name):
    """Return the torch.device `name`, such as "cpu". Raises InputError if it is not available."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"DEVICE={name!r} is not available here: use 'cpu'") from error


def prepare(constants):
    """Check a script's constants (its `globals()`), set seed and threads, and return the device."""
    check(**{name: value for name, value in constants.items() if name.isupper()})
    device = choose_device(constants.get("DEVICE", "cpu"))
    torch.manual_seed(constants.get("SEED", 0))
    torch.set_num_threads(constants.get("NUM_THREADS", 1))
    return device


# --- Models and files -----------------------------------------------------------------
def write_atomically(path, content):
    """Write bytes to `path` completely, or raise OSError and leave the old file intact."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)  # a crash before this line leaves the old file
    finally:
        temporary.unlink(missing_ok=True)


def to_bytes(value):
    """Return what torch.save would write."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_tensors(path, device="cpu"):
    """Return the tensors and plain values that `to_bytes` made. A damaged file can raise anything.

    torch.load ignores the checksums of the zip format, so a flipped bit would load as a wrong
    weight. weights_only=True prevents the code execution that pickle allows.
    """
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("checksum error")
    return torch.load(path, map_location=device, weights_only=True)


class BaseModel(nn.Module):
    """What the models share that is not about transformers: arguments, checks, and checkpoints."""

    def __init__(self, **arguments):
        super().__init__()
        check(**arguments)
        self.arguments = arguments

    def check_input(self, rows, new_tokens=0, **options):
        """Raise InputError unless these lists of ids fit, with room for `new_tokens` more each."""
        check(**options)
        if not rows or not all(isinstance(row, list) and row for row in rows):
            raise InputError("the input must be a list of lists that are not empty: use one such "
                             "as [[10, 6, 13], [15]] for ids, or [['4', '0', '7']] for digits")
        size, max_len = self.arguments["vocab_size"], self.arguments["max_len"]
        for i in (i for row in rows for i in row):
            if not is_count(i, 0) or i >= size:
                raise InputError(f"token id {i!r} is outside the vocabulary: use 0 to {size - 1}")
        longest = max(map(len, rows)) + new_tokens
        if longest > max_len:
            raise InputError(f"{longest} positions are needed, but the model has max_len={max_len}"
                             ": use a shorter input, or build the model with a larger max_len")

    def save(self, path):
        """Write class name, arguments, and weights to `path`, or raise OSError.

        Raises InputError for weights that are not finite: the old file may be better.
        """
        weights = self.state_dict()
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise InputError("the weights are no longer finite, so they are not saved: try a tenth "
                             "of LEARNING_RATE")
        write_atomically(path, to_bytes({"architecture": type(self).__name__,
                                         "arguments": self.arguments, "weights": weights}))

    @classmethod
    def load(cls, path, device="cpu"):
        """Return the model saved at `path`, in evaluation mode, or raise InputError."""
        path, device = Path(path), choose_device(str(device))
        shown = f"{path.parent.name}/{path.name}"
        try:
            saved = load_tensors(path, device)
            if saved["architecture"] != cls.__name__:
                raise ValueError(f"it contains a {saved['architecture']}")
            model = cls(**saved["arguments"]).to(device).eval()
            model.load_state_dict(saved["weights"])
            if not all(w.equal(saved["weights"][k]) for k, w in model.state_dict().items()):
                raise ValueError("NaN, or tied weights that differ")
        except FileNotFoundError:
            raise InputError(f"no checkpoint at {shown}: run the script of that name first") \
                from None
        except Exception as error:  # a damaged or foreign file can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0][:80]
            raise InputError(f"{shown} cannot be used as {cls.__name__} ({ascii(reason)}): "
                             "delete it and train again") from error
        return model


def save_model(model, path):
    """Save `model` and return True, or print a warning and return False."""
    shown = f"{path.parent.name}/{path.name}"
    try:
        model.save(path)
    except OSError as error:
        print(f"warning: could not save {shown} ({error.strerror}): the model is not on disk")
        return False
    print(f"saved {shown}")
    return True


# --- Running --------------------------------------------------------------------------
def run_script(main, answer=None):
    """Call `main()`, or `answer(words)` if words follow the script's name on the command line.

    InputError prints one line and exits with 2, Ctrl-C with 130. Other errors keep their traceback,
    because they come from code that a reader has changed.
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
