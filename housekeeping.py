"""
housekeeping.py - checks, checkpoints, and running a script

Nothing in this file is about transformers. Skip it on a first reading. Most scripts use it:

    check_constants, check_arguments    compare values with one table of rules
    save_model, load_checkpoint         write files that a crash cannot corrupt, and load them
    run_script                          print one line for an input error, a traceback for others

Scripts import this file first: Ctrl-C while they import torch then prints one line too.
"""
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CHECKPOINTS = ROOT / "checkpoints"


def stop_at_once(*_):
    """End the program. An exception could be lost in the middle of an import."""
    os.write(2, b"\nstopped by Ctrl-C\n")
    os._exit(130)


# Not for tests or other programs that import the scripts.
IS_SCRIPT = Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "variations")
if IS_SCRIPT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)  # until run_script starts

import contextlib
import errno
import hashlib
import io
import math
import re
import statistics
import time
import zipfile

import torch


class InputError(ValueError):
    """A mistake in the input. The message is one line that says what is wrong and what works."""


# --- Constants and arguments ----------------------------------------------------------
# name: (type, lowest, highest, an example). D_MODEL and d_model share a rule.
RULES = {
    # the model
    "D_MODEL": (int, 2, 16384, 64), "D_FF": (int, 1, 65536, 256), "NUM_HEADS": (int, 1, 1024, 4),
    "NUM_LAYERS": (int, 1, 1000, 2), "DROPOUT": (float, 0, 0.99, 0.1),
    "VOCAB_SIZE": (int, 1, 10 ** 6, 26), "MAX_LEN": (int, 1, 10 ** 6, 64),
    # the task
    "NUM_SAMPLES": (int, 1, 10 ** 7, 6000), "MAX_DIGITS": (int, 1, 18, 5),
    "VALIDATION_SHARE": (float, 0.001, 0.99, 0.1), "MASK_SHARE": (float, 0, 1, 0.8),
    "RANDOM_SHARE": (float, 0, 1, 0.1), "MIN_MASKING_RATE": (float, 0, 1, 0.15),
    # training
    "BATCH_SIZE": (int, 1, 10 ** 6, 64), "ACCUMULATION_STEPS": (int, 1, 10 ** 6, 2),
    "NUM_EPOCHS": (int, 1, 10 ** 6, 4), "FINETUNE_EPOCHS": (int, 1, 10 ** 6, 4),
    "TRAIN_EPOCHS": (int, 1, 10 ** 6, 3), "NUM_STEPS": (int, 1, 10 ** 6, 500),
    "ABLATION_STEPS": (int, 1, 10 ** 6, 250), "UNDERTRAINED_STEPS": (int, 1, 10 ** 6, 60),
    "FEW_STEPS": (int, 1, 10 ** 6, 300), "FEW_SEQUENCES": (tuple, 1, 10 ** 6, (50, 200)),
    "ABLATION_LAYERS": (tuple, 1, 1000, (2, 8)),
    "LEARNING_RATE": (float, 1e-9, 1e30, 0.003), "MIN_LEARNING_RATE": (float, 0, 1e30, 5e-5),
    "FINETUNE_LEARNING_RATE": (float, 1e-9, 1e30, 0.001), "WARMUP_STEPS": (int, 0, 10 ** 6, 40),
    "CLIP_NORM": (float, 1e-9, 1e30, 1.0), "WEIGHT_DECAY": (float, 0, 1, 0.01),
    "LABEL_SMOOTHING": (float, 0, 0.99, 0.1), "PRECISION": (("float32", "bfloat16", "float16"),),
    "GRADIENT_CHECKPOINTING": (bool,), "COMPILE": (bool,), "FUSED_ATTENTION": (bool,),
    # variations
    "FULL": (bool,), "UPTRAINING_EPOCHS": (int, 1, 10 ** 6, 1), "TILE": (int, 8, 10 ** 6, 64),
    "CLIP": (int, 1, 1000, 2), "UPTRAINING_RATE": (float, 1e-9, 1e30, 0.001),
    # the run
    "SEED": (int, 0, 2 ** 63 - 1, 0), "NUM_THREADS": (int, 1, 1024, 1),
    "NUM_EXAMPLES": (int, 1, 10 ** 6, 4), "RESUME_EVERY": (int, 1, 10 ** 9, 50),
    "PROFILE_STEPS": (int, 0, 1000, 5), "EVALUATE_EVERY": (int, 1, 10 ** 6, 25),
    # generation
    "max_new_tokens": (int, 1, 10 ** 6, 8), "temperature": (float, 0, 1e30, 0.7),
    "top_k": (int, 1, 10 ** 6, 5), "top_p": (float, 1e-6, 1, 0.9),
    "repetition_penalty": (float, 0.01, 100, 1.2), "BEAM_WIDTH": (int, 1, 1000, 4),
    "LENGTH_PENALTY": (float, 0, 10, 1.0),
}
KIND = {int: "a whole number", float: "a number"}


def check_value(name, value):
    """Raise InputError unless the rule for `name` allows `value`."""
    kind, *limits = RULES.get(name) or RULES[name.upper()]
    if kind is tuple:
        lowest, highest, example = limits
        if not isinstance(value, tuple) or not value or not all(
                type(one) is int and lowest <= one <= highest for one in value):
            raise InputError(f"{name}={value!r} is not a tuple of whole numbers from {lowest} to "
                             f"{highest}: use one such as {example}")
        return
    if kind is bool or isinstance(kind, tuple):
        allowed = (True, False) if kind is bool else kind
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise InputError(f"{name}={value!r} is invalid: use {' or '.join(map(repr, allowed))}")
        return
    lowest, highest, example = limits
    # subtle: isinstance would accept True, a subclass of int, and numpy's float64, which a file of
    # plain values cannot hold.
    if type(value) not in (int, kind):
        raise InputError(f"{name}={value!r} is not {KIND[kind]}: use one such as {example}")
    if not lowest <= value <= highest:  # NaN fails this test too
        shown = value if isinstance(value, float) or abs(value) < 10 ** 20 else "(a huge number)"
        raise InputError(f"{name}={shown} is out of range: use {lowest} to {highest}, "
                         f"such as {example}")


def check_arguments(**arguments):
    """Raise InputError unless the rules allow every argument. top_k and top_p may be None."""
    for name, value in arguments.items():
        if value is not None or name not in ("top_k", "top_p"):
            check_value(name, value)
    if arguments.get("temperature") == 0 and (arguments.get("top_k") or arguments.get("top_p")):
        raise InputError("top_k and top_p have no effect at temperature=0 (greedy): "
                         "use a temperature such as 1.0")


def check_filters(temperature, top_k, top_p):
    """Raise InputError unless these values can filter logits."""
    check_arguments(temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature < 1e-30:  # dividing logits by it could overflow
        raise InputError(f"temperature={temperature} is too small for sampling: use 0.01 or more, "
                         "or greedy generation")


def check_sizes(d_model, num_heads, names=("d_model", "num_heads")):
    """Raise InputError unless d_model is even (sine and cosine) and num_heads divides it."""
    if d_model % 2:
        raise InputError(f"{names[0]}={d_model} must be even: use {d_model - 1} or {d_model + 1}")
    if num_heads < 1 or d_model % num_heads:
        divisors = [str(n) for n in range(1, d_model + 1) if d_model % n == 0]
        raise InputError(f"{names[1]}={num_heads} does not divide {names[0]}={d_model}: "
                         f"use {', '.join(divisors[:4])}" + (", ..." if len(divisors) > 4 else ""))


def check_model(arguments):
    """Raise InputError unless a model can be built from `arguments` (a dict)."""
    check_arguments(**arguments)
    check_sizes(arguments["d_model"], arguments["num_heads"])


def check_constants(constants):
    """Raise InputError for the first constant that cannot work, before any work is done.

    constants: a script's `globals()`. Names without a rule are ignored, except DEVICE.
    """
    get = constants.get
    for name in RULES:
        if name in constants:
            check_value(name, constants[name])
    if "D_MODEL" in constants:
        check_sizes(constants["D_MODEL"], get("NUM_HEADS", 1), ("D_MODEL", "NUM_HEADS"))
    if get("MASK_SHARE", 0) + get("RANDOM_SHARE", 0) > 1:
        raise InputError(f"MASK_SHARE={get('MASK_SHARE')} and RANDOM_SHARE={get('RANDOM_SHARE')} "
                         "sum to more than 1: use 0.8 and 0.1")
    if get("MIN_LEARNING_RATE", 0) > get("LEARNING_RATE", math.inf):
        raise InputError(f"MIN_LEARNING_RATE={get('MIN_LEARNING_RATE')} is above "
                         f"LEARNING_RATE={get('LEARNING_RATE')}: use less")
    device = choose_device(get("DEVICE", "cpu"))
    if get("PRECISION") == "float16" and device.type != "cuda":
        raise InputError("PRECISION='float16' needs a CUDA device, but DEVICE is "
                         f"{get('DEVICE')!r}: use 'bfloat16'")
    if get("COMPILE"):
        check_compiler(device)


def check_comparison(constants, num_training):
    """Raise InputError unless compare_architectures.py can run all its sections."""
    if constants["MAX_DIGITS"] < 3:
        raise InputError(f"MAX_DIGITS={constants['MAX_DIGITS']}: section 6 masks the second of "
                         "three digits: use 3 or more")
    if max(constants["FEW_SEQUENCES"]) > num_training:
        raise InputError(f"FEW_SEQUENCES={constants['FEW_SEQUENCES']}: there are only "
                         f"{num_training} training sequences: use fewer, or raise NUM_SAMPLES")


def choose_device(name):
    """Return the torch.device `name`, such as "cpu". Raises InputError if it is not available."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name not in available:
        raise InputError(f"DEVICE={name!r} is not available here: "
                         f"use {' or '.join(map(repr, available))}")
    return torch.device(name)


def check_compiler(device):
    """Raise InputError unless torch.compile works here. It needs a C++ compiler or Triton."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # the compiler can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise InputError(f"COMPILE=True does not work here ({reason}): use False") from error


# --- Sequences ------------------------------------------------------------------------
def is_list(value):
    """Return True if `value` is a list or tuple that is not empty."""
    return isinstance(value, (list, tuple)) and len(value) > 0


def check_rows(rows, vocab_size, max_len, new_tokens=0):
    """Raise InputError unless `rows` is a list of lists of token ids that fit a model of this size.

    new_tokens: how many more tokens each row must have room for. Forward passes check nothing,
    because reading the values of a tensor would make the CPU wait for a GPU in every step.
    """
    if not is_list(rows) or not all(is_list(row) for row in rows):
        raise InputError("rows must be a list of lists with at least one token id each: use one "
                         "such as [[10, 6, 13], [15]]")
    for row in rows:
        for token in row:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise InputError(f"token id {token!r} is outside the vocabulary: use whole numbers "
                                 f"from 0 to {vocab_size - 1}")
        if not any(row):  # <PAD> is 0
            raise InputError("a row contains only <PAD>: add at least one other token")
    longest = max(map(len, rows)) + new_tokens
    if longest > max_len:
        raise InputError(f"a row needs {longest} positions, but the model has max_len={max_len}: "
                         "shorten the row, or build the model with a larger max_len")


def check_sequences(sequences):
    """Raise InputError unless `sequences` is a list of lists of strings."""
    for row in sequences if is_list(sequences) else [sequences]:
        if not is_list(row) or not all(isinstance(token, str) for token in row):
            raise InputError(f"{row!r} cannot be translated: give a list of lists of strings such "
                             'as [["4", "0", "7"], ["9"]]')


def check_strings(tokens):
    """Raise InputError unless all `tokens` are strings: 4 would be read as an unknown token."""
    for token in tokens:
        if not isinstance(token, str):
            raise InputError(f"{token!r} is not a token: use a string such as '4'")


def check_known(tokens, known, example):
    """Raise InputError if one of `tokens` is not in `known`."""
    for token in tokens:
        if token not in known:
            raise InputError(f"{ascii(token)} is unknown: use {' '.join(known)}, with spaces "
                             f"between them, for example: {example}")


def check_finite(value, step, what="loss"):
    """Raise InputError if `value` is infinite or NaN: one NaN reaches every weight in one step."""
    if not math.isfinite(value):
        raise InputError(f"the {what} became {value} at step {step}: try a tenth of LEARNING_RATE, "
                         "or look in your changes for a division by zero or a log of zero")


# --- Files ----------------------------------------------------------------------------
def write_atomically(path, content):
    """Write bytes to `path` completely, or raise OSError and leave the old file intact."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two runs from writing to the same temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # the rename is atomic
    finally:
        temporary.unlink(missing_ok=True)


def tensors_to_bytes(value):
    """Return what torch.save would write. Writing these bytes to a full disk raises OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensors_from_bytes(content, device="cpu"):
    """Return the tensors and plain values in `content`. Damaged content can raise any exception.

    torch.load ignores the checksums of the zip format, so a flipped bit would load as a wrong
    weight. They are verified here. weights_only=True prevents the code execution that pickle
    allows.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if archive.testzip() is not None:
            raise ValueError("checksum error")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def usable(weights):
    """Return True if a model can compute with `weights`. 1e10 is far above what training makes."""
    return all(w.is_floating_point() and w.abs().max() < 1e10 for w in weights.values())


def save_checkpoint(path, model):
    """Write the class name, arguments, and weights of `model` to `path`, or raise OSError.

    Raises InputError for weights that are NaN or huge. The last step of a training can make them,
    and the old file may be better.
    """
    if not usable(model.state_dict()):
        raise InputError("training has ended with weights that are NaN or huge, which are not "
                         "saved: try a tenth of LEARNING_RATE")
    write_atomically(path, tensors_to_bytes({
        "architecture": type(model).__name__, "arguments": model.arguments,
        "weights": model.state_dict()}))


def load_checkpoint(path, model_class, device="cpu"):
    """Return the model that `save_checkpoint` wrote, in evaluation mode, or raise InputError."""
    path, device, name = Path(path), choose_device(str(device)), model_class.__name__
    shown = f"{path.parent.name}/{path.name}"
    try:
        if not path.is_file():
            raise InputError(f"no checkpoint at {shown}: run the script with that name first")
        checkpoint = dict(tensors_from_bytes(path.read_bytes(), device))
        architecture = checkpoint["architecture"]
        arguments, weights = dict(checkpoint["arguments"]), dict(checkpoint["weights"])
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}): check its permissions") \
            from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{shown} is damaged or not a checkpoint ({type(error).__name__}): "
                         "delete it and train again") from error
    if architecture != name:
        raise InputError(f"{shown} contains a model of class {architecture!a}, not {name}: "
                         "load it with the script that wrote it")
    try:
        # A file can declare a model that would not fit into memory. So first compare the weights
        # with an outline of it, on a device that stores no numbers.
        layers = {key.split(".")[1] for key in weights if "layers." in key}
        if len(layers) != arguments["num_layers"]:
            raise ValueError(f"{len(layers)} layers")
        with torch.device("meta"):
            outline = model_class(**arguments).state_dict()
        if {k: v.shape for k, v in outline.items()} != {k: v.shape for k, v in weights.items()}:
            raise ValueError("other names or shapes")
        is_usable = usable(weights)
        model = model_class(**arguments).to(device).eval()
        model.load_state_dict(weights)
    except Exception as error:  # what a file declares can raise anything
        raise InputError(f"{shown} does not fit this version of {name}: "
                         "delete it and train again") from error
    if not is_usable:
        raise InputError(f"{shown} contains weights that are not numbers, or huge: delete it and "
                         "train again")
    return model


def save_model(model, path):
    """Save `model` and return True. If that fails, print a warning and return False."""
    try:
        model.save(path)
    except OSError as error:
        print(f"warning: could not save {path.parent.name}/{path.name} ({error.strerror}): "
              "the model is not on disk")
        return False
    print(f"saved {path.parent.name}/{path.name}")
    return True


def code_hash(script, constants):
    """Return 8 hex digits that change with any top-level script.

    The lines of `script` that set `constants` are left out, because a run compares their values.
    scratch.py is the reader's own.
    """
    digest = hashlib.sha256()
    for path in sorted(set(ROOT.glob("*.py")) - {ROOT / "scratch.py"}):
        content = path.read_bytes()
        if path.name == Path(script).name:
            names = b"|".join(name.encode() for name in constants)
            content = re.sub(rb"(?m)^(?:%s) = [^;\n]*$" % names, b"", content)
        digest.update(path.name.encode() + content)
    return digest.hexdigest()[:8]


# --- Running --------------------------------------------------------------------------
def median_milliseconds(run, rounds=5):
    """Return the median time of `run()` in milliseconds, after one call to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


@contextlib.contextmanager
def evaluation_mode(model):
    """Set `model` to evaluation mode inside the `with` block, and restore its mode afterward."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Output:
    """Passes text on to `stream`. Drops what a full disk cannot take, so that the run goes on."""

    def __init__(self, stream):
        self.stream, self.is_full = stream, False

    def attempt(self, function, *arguments):
        """Call `function`, and note if the disk is full."""
        try:
            function(*arguments)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.is_full = True

    def write(self, text):
        """Write `text`, or drop it."""
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        """Write what is buffered, or drop it."""
        self.attempt(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_script(main, answer=None):
    """Call `main()`, or `answer(words)` if words follow the script's name on the command line.

    InputError prints one line and exits with code 2; Ctrl-C prints one line and exits with 130.
    Other errors keep their traceback: they come from code that a reader has changed.
    """
    words = sys.argv[1:]
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr is None:  # a shell has closed it, but progress bars need it
        sys.stderr = open(os.devnull, "w")
    output = Output(sys.stdout) if sys.stdout is not None else None  # None: a shell has closed it
    try:
        with contextlib.redirect_stdout(output):
            if not words:
                main()
            elif answer is not None:
                answer(words)
            else:
                raise InputError(f"{Path(sys.argv[0]).name} takes no arguments: change the "
                                 "constants at the top of the file instead")
            if output is not None:
                output.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; files that were already saved are intact", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that reads the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if output is not None and output.is_full:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: the disk was full, so output is missing: make room, or print to a terminal",
              file=sys.stderr)
        sys.exit(2)
