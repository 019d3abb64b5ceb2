"""The scripts as texts: blocks kept alike, imports that only go down, nothing a plain console cannot print."""
import ast
import io
import re
import sys
import tokenize

import pytest

from conftest import ROOT

ARCHITECTURES = ["encoder_only", "decoder_only", "encoder_decoder"]
# The verbs that every script has in its own way; everything else with one name must have one body.
OWN = {"predict", "translate", "main"}


def source(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def without_docstrings(node):
    for inner in ast.walk(node):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


def definitions(script):
    return {node.name: ast.dump(without_docstrings(node)) for node in ast.parse(source(script)).body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def test_blocks_with_one_name_have_one_body():
    bodies = {}
    for script in ARCHITECTURES:
        for name, body in definitions(script).items():
            bodies.setdefault(name, {})[script] = body
    shared = {name for name, versions in bodies.items() if len(versions) > 1}
    assert {"PositionalEncoding", "MultiHeadAttention", "FeedForward", "EncoderLayer", "compute_loss", "train_epoch",
            "evaluate", "filter_logits", "choose_next_token", "KeyValueCache", "causal_mask"} <= shared
    different = {name for name in shared - OWN if len(set(bodies[name].values())) > 1}
    assert not different


def test_the_decoder_layer_without_what_is_new_is_the_decoder_only_layer():
    """What the fences of encoder_decoder.py promise: take them out, with what they hold, and a GPT block is left."""
    text = re.sub(r" *# --- NEW HERE: cross-attention ---\n.*?# --- end of what is new ---\n", "",
                  source("encoder_decoder"), flags=re.DOTALL)
    layer = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "DecoderLayer")
    gpt = next(node for node in ast.parse(source("decoder_only")).body if getattr(node, "name", "") == "DecoderOnlyLayer")
    for node in (without_docstrings(layer), without_docstrings(gpt)):
        node.name = "Layer"
        forward = node.body[1]
        forward.args.args = []      # the signature says what is handed in for the new part
        forward.args.defaults = []
        # Which attention's weights are shown differs: self-attention there, cross-attention here.
        call = next(n for n in forward.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple)
                    and n.targets[0].elts[0].id == "attended")
        call.targets[0].elts[1].id = "weights"
        call.value.args = [a for a in call.value.args if getattr(a, "id", "") != "need_weights"]
    assert ast.dump(layer) == ast.dump(gpt)


@pytest.mark.parametrize("script", ["toy_dataset", *ARCHITECTURES])
def test_two_fifths_of_the_lines_explain_and_no_file_is_too_long(script):
    text = source(script)
    lines = text.splitlines()
    explaining = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            explaining.add(token.start[0])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            explaining |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    written = {i for i, line in enumerate(lines, 1) if line.strip()}
    assert len(explaining & written) / len(written) >= 0.4
    assert len(lines) <= 920  # "about 900"


@pytest.mark.parametrize("script", sorted(p.stem for p in ROOT.glob("*.py")))
def test_imports_only_go_down_and_stay_within_the_requirements(script):
    floor = {"toy_dataset": 1, **dict.fromkeys(ARCHITECTURES, 2)}
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm", "matplotlib"}
    imported = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    own = {p.stem for p in ROOT.glob("*.py")}
    assert imported - own <= allowed
    below = {name for name in own if floor.get(name, 3) < floor.get(script, 3)}
    peers_on_top = {"train_all"} if floor.get(script, 3) == 3 else set()
    assert imported & own <= below | peers_on_top


@pytest.mark.parametrize("script", sorted(p.stem for p in ROOT.glob("*.py")))
def test_everything_a_script_can_print_is_ascii(script):
    assert source(script).isascii()


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_every_public_function_says_what_it_does(script):
    silent = [node.name for node in ast.walk(ast.parse(source(script)))
              if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
              and ast.get_docstring(node) is None and node.name not in ("main", "show", "rand", "count")]
    assert not silent
