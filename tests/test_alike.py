"""The scripts as texts: copies agree, marks are correct, imports only go down."""

import ast
import re
import sys

import pytest
from conftest import ROOT

ARCHITECTURES = ["encoder_only", "decoder_only", "encoder_decoder"]
OWN = {
    "logits_and_labels",
    "translate",
    "main",
    "answer",
    "show_attention",
}  # each script has its own version
TOP_LEVEL = sorted(path.stem for path in ROOT.glob("*.py"))


def source(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def without_docstrings(node):
    for inner in ast.walk(node):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(inner):
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


def as_in(text, earlier):
    """`text` as in the script `earlier`, without what later scripts mark as new."""
    later = ARCHITECTURES[ARCHITECTURES.index(earlier) + 1 :]
    for script in later:
        block = rf"^ *# --- NEW in {script}\.py: .*\n(?:.*\n)*?^ *# --- end of what is new ---\n"
        text = re.sub(block, "", text, flags=re.MULTILINE)
    return text


def without_new_parameters(function, lines, earlier):
    """Remove the parameters that the signature of `function` marks as new since `earlier`."""
    later = ARCHITECTURES[ARCHITECTURES.index(earlier) + 1 :]
    new = set()
    for line in lines[function.lineno - 1 : function.body[0].lineno]:
        mark = re.search(r"# NEW in (\w+)\.py: (.*)", line)
        if mark and mark[1] in later:
            new |= set(mark[2].split(", "))
    given = function.args
    first_default = len(given.args) - len(given.defaults)
    kept = [
        (arg, given.defaults[i - first_default] if i >= first_default else None)
        for i, arg in enumerate(given.args)
        if arg.arg not in new
    ]
    given.args = [arg for arg, _ in kept]
    given.defaults = [default for _, default in kept if default is not None]


def definitions(script, earlier=None):
    """{name: syntax tree} for the functions and classes of `script`, as they are in `earlier`."""
    text = as_in(source(script), earlier) if earlier else source(script)
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            for inner in ast.walk(node):
                if earlier and isinstance(inner, ast.FunctionDef):
                    without_new_parameters(inner, text.splitlines(), earlier)
            found[node.name] = ast.dump(without_docstrings(node))
    return found


@pytest.mark.parametrize(
    "earlier, later",
    [
        ("encoder_only", "decoder_only"),
        ("encoder_only", "encoder_decoder"),
        ("decoder_only", "encoder_decoder"),
    ],
)
def test_code_with_one_name_differs_only_where_marked_new(earlier, later):
    before, after = definitions(earlier), definitions(later, earlier)
    shared = before.keys() & after.keys() - OWN
    assert {
        "PositionalEncoding",
        "attention",
        "MultiHeadAttention",
        "FeedForward",
        "evaluate",
        "train_epoch",
    } <= shared
    assert (earlier, later) != ("decoder_only", "encoder_decoder") or "DecoderLayer" in shared
    assert not [name for name in shared if before[name] != after[name]]


def test_a_copy_that_drifts_is_detected():
    text = source("decoder_only").replace("scores, dim=-1", "scores, dim=-2")
    assert text != source("decoder_only")
    tree = {
        n.name: ast.dump(without_docstrings(n))
        for n in ast.parse(as_in(text, "encoder_only")).body
        if hasattr(n, "name")
    }
    assert tree["attention"] != definitions("encoder_only")["attention"]


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_new_marks_name_valid_scripts_and_blocks_are_closed(script):
    allowed = ARCHITECTURES[1 : ARCHITECTURES.index(script) + 1]
    text = source(script)
    assert set(re.findall(r"NEW in (\w+)\.py", text)) == set(allowed)
    begins = len(re.findall(r"# --- NEW in ", text))
    assert begins == text.count("# --- end of what is new ---")


@pytest.mark.parametrize("script", ARCHITECTURES[1:])
def test_stretches_marked_known_are_the_same_word_for_word(script):
    """From `KNOWN from X.py ... Continue reading at Y` to Y, the lines are in X, except marks."""
    text, found = source(script), 0
    for match in re.finditer(
        r"# KNOWN from (\w+)\.py(, except for what is marked NEW)?[^`]*"
        r"ontinue reading at `(\w+)`\.\n",
        text,
    ):
        earlier, _, target = match.groups()
        end = re.search(rf"^(?:@.*\n)?(?:class|def) {target}\b", text, flags=re.MULTILINE).start()
        assert end > match.end()
        stretch = as_in(text[match.end() : end], earlier)
        before = as_in(source(earlier), earlier)
        for line in stretch.splitlines():
            if line.strip() and not line.startswith("#") and "# NEW in" not in line:
                assert line in before.splitlines(), line
                found += 1
        if match[2] is None:
            assert "NEW in" not in re.sub(rf"NEW in {earlier}", "", text[match.end() : end])
    assert found > 100


@pytest.mark.parametrize("script", TOP_LEVEL)
def test_imports_only_go_down_and_stay_within_the_requirements(script):
    ground = {"tiny_gpt", "attention_by_hand"}
    floor = {
        "housekeeping": 0,
        "toy_dataset": 1,
        **dict.fromkeys(ARCHITECTURES, 2),
        "quick_start": 3,
        "bookkeeping": 3,
        "train_all": 3,
        "compare_architectures": 4,
        "visualizations": 4,
    }
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm", "matplotlib"}
    imported = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = imported & set(TOP_LEVEL)
    assert imported - set(TOP_LEVEL) <= allowed
    if script in ground:
        assert not ours
    else:
        below = {name for name in floor if floor[name] < floor[script]}
        assert ours <= below | ({"quick_start", "bookkeeping"} if script == "train_all" else set())


@pytest.mark.parametrize("script", TOP_LEVEL)
def test_every_script_is_ascii(script):
    assert source(script).isascii()


@pytest.mark.parametrize("script", [*ARCHITECTURES, "toy_dataset", "housekeeping", "bookkeeping"])
def test_every_public_function_has_a_docstring(script):
    silent = [
        node.name
        for node in ast.walk(ast.parse(source(script)))
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not set(silent) - {"main", "rand", "pretraining_loss", "report", "Off"}


@pytest.mark.parametrize("script", [*ARCHITECTURES, "toy_dataset", "quick_start"])
def test_only_main_and_answer_read_the_constants(script):
    """Other functions take what they depend on as arguments, so no script acts on another."""
    tree = ast.parse(source(script))
    constants = {
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    block = source(script).split("# CONSTANTS - ")[1].split("# ====", 2)[1]
    constants &= set(re.findall(r"^([A-Z_]+) = ", block, flags=re.MULTILINE))
    assert len(constants) >= 5
    readers = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and constants & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    }
    assert readers <= {"main", "answer"}
