"""The guide: its commands exist, its snippets print what stands below them, its links and names
lead somewhere, and its tables agree with the output of the commands that they name."""

import ast
import functools
import inspect
import json
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import toy_dataset
import train_all
from conftest import MODELS, ROOT, SCRIPTS, finished, run_of
from planted_mistakes import MISTAKES, MISTAKES_IN_THE_GUIDE

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = TEXT.splitlines()
NUMBER = r"-?\d[\d,]*\.?\d*(?:e-?\d+)?"


# --- the parts of the page ---------------------------------------------------------
def blocks():
    """Every fenced block: (number of its first line, language, content)."""
    found, start = [], None
    for i, line in enumerate(LINES):
        if line.startswith("```"):
            if start is None:
                start = i
            else:
                found.append((start + 1, LINES[start][3:], "\n".join(LINES[start + 1 : i])))
                start = None
    assert start is None, "a fenced block is not closed"
    return found


def without_blocks():
    """The lines of the page, with those of fenced blocks empty, so that line numbers stay."""
    lines, inside = [], False
    for line in LINES:
        lines.append("" if inside or line.startswith("```") else line)
        inside ^= line.startswith("```")
    return lines


PROSE = without_blocks()


def number(text):
    return float(text.replace(",", "").rstrip("."))


def anchor(heading):
    """The anchor that GitHub makes for a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


HEADINGS = [(i, line) for i, line in enumerate(PROSE) if re.match(r"#+ ", line)]


def section(title):
    """The lines of the section whose heading starts with `title`, fenced blocks left out."""
    begin, level = next(
        (i, len(h.split()[0])) for i, h in HEADINGS if h.lstrip("# ").startswith(title)
    )
    end = next((i for i, h in HEADINGS if i > begin and len(h.split()[0]) <= level), len(PROSE))
    return PROSE[begin:end]


class Table(NamedTuple):
    first: int  # number of its first line
    header: list
    rows: list
    caption: str  # the paragraph that follows

    @property
    def script(self):
        return re.search(r"^Printed by `python (\w+)\.py`", self.caption)[1]


def tables():
    found, i = [], 0
    while i < len(PROSE):
        if not PROSE[i].startswith("|"):
            i += 1
            continue
        first = i
        while i < len(PROSE) and PROSE[i].startswith("|"):
            i += 1
        cells = [
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in PROSE[first:i]
        ]
        rest = "\n".join(PROSE[i:]).strip()
        found.append(Table(first + 1, cells[0], cells[2:], " ".join(rest.split("\n\n")[0].split())))
    return found


def table_under(title):
    return next(
        t
        for t in tables()
        if any(
            h.lstrip("# ").startswith(title)
            for i, h in HEADINGS
            if i == max(j for j, _ in HEADINGS if j < t.first)
        )
    )


TABLES = tables()
MEASURED = [t for t in TABLES if t.caption.startswith("Printed by")]
SPANS = [(i + 1, span) for i, line in enumerate(PROSE) for span in re.findall(r"`([^`]+)`", line)]
COMMANDS = [
    (i + 1, line.strip())
    for i, line in enumerate(PROSE)
    if re.match(r"    \S", line) and re.match(r"(python|torchrun) ", line.strip())
]
COMMANDS += [(i, span) for i, span in SPANS if re.match(r"(python|torchrun|ruff) \S", span)]


# --- where things are -----------------------------------------------------------------
def test_the_first_command_is_within_ten_lines():
    assert any(line.startswith("    python ") for line in LINES[:10])


def test_every_topic_is_one_click_from_the_contents():
    linked = set(re.findall(r"\]\(#([^)]+)\)", "\n".join(section("Contents"))))
    topics = {anchor(h.lstrip("# ")) for _, h in HEADINGS if re.match(r"##? \d+\.|### \d+\.\d", h)}
    assert topics <= linked
    numbers = [int(h.split()[1].rstrip(".")) for _, h in HEADINGS if re.match(r"## \d+\.", h)]
    assert numbers == list(range(2, 18))  # section 1 is what stands above the contents


def test_every_link_has_a_target():
    anchors = {anchor(h.lstrip("# ")) for _, h in HEADINGS}
    assert len(anchors) == len(HEADINGS), "two headings have one anchor"
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(PROSE)):
        if target.startswith("#"):
            dead += [target] if target[1:] not in anchors else []
        elif target.startswith("https://"):
            dead += [target] if not re.fullmatch(r"https://[\w.-]+\.[a-z]+/[^\s]*", target) else []
        elif not (ROOT / target).exists():
            dead.append(target)
    assert not dead
    # A link whose text is the number of a section leads to that section.
    astray = [
        (number, target)
        for number, target in re.findall(r"\[(\d+(?:\.\d)?)\]\(#([^)]+)\)", TEXT)
        if not re.match(number.replace(".", "") + r"-", target)
    ]
    assert not astray


def test_every_figure_appears_once_with_alt_text():
    shown = re.findall(r"!\[([^\]]*)\]\(figures/(\w+\.png)\)", TEXT)
    assert sorted(name for _, name in shown) == sorted(
        path.name for path in (ROOT / "figures").glob("*.png")
    )
    assert all(len(text.split()) >= 3 for text, _ in shown)


def test_years_of_papers_match_their_addresses_and_citations_are_listed():
    reading = " ".join(" ".join(section("16. Further reading")).split())
    for year, month in re.findall(
        r"(\d{4}), \[[^\]]+\]\(https://arxiv\.org/abs/(\d\d)\d\d\.\d{4,5}\)", reading
    ):
        assert 0 <= int(year) - (2000 + int(month)) <= 2
    assert (
        len(re.findall(r"arxiv\.org/abs/\d{4}\.\d{4,5}\)", reading))
        == reading.count("arxiv.org")
        >= 50
    )
    # "Vaswani et al. 2017", "Zhang and Sennrich 2019", "Dao 2023"; the rest of an author list may
    # stand in between.
    cited = r"([A-Z][a-z]+)(?:,? et al\.|(?:, [A-Z][a-z]+)*,? and [A-Z][a-z]+)? ((?:19|20)\d\d)\b"
    listed = set(re.findall(cited, reading))
    elsewhere = " ".join(line for line in PROSE if line not in section("16. Further reading"))
    elsewhere += " ".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert set(re.findall(cited, " ".join(elsewhere.split()))) <= listed


# --- names and numbers from the code -----------------------------------------------------
@functools.cache
def known_names():
    """Every name that the code defines or uses, and {class: its methods and attributes}."""
    names, members = set(), {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for field in ("id", "attr", "name", "arg"):
                if isinstance(getattr(node, field, None), str):
                    names.add(getattr(node, field))
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and path.parent == ROOT
            ):
                names.add(node.value)  # columns of the logs, tokens
            if isinstance(node, ast.ClassDef):
                inside = members.setdefault(node.name, set())
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        inside.add(inner.name)
                    if (
                        isinstance(inner, ast.Attribute)
                        and getattr(inner.value, "id", "") == "self"
                    ):
                        inside.add(inner.attr)
    return names, members


def is_known(span):
    """Is the identifier `span` a file, or a name in the scripts, or one that PyTorch has?"""
    names, members = known_names()
    parts = span.removesuffix("()").split(".")
    homes = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    if (ROOT / span).exists() or any(
        (ROOT / folder / span).exists() for folder in ("tests", "benchmarks")
    ):
        return True
    if parts[0] in homes:
        value = homes[parts[0]]
        for part in parts[1:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    if len(parts) == 2 and parts[0] in members:
        return parts[1] in members[parts[0]]
    if span in ("attn_mask", "is_causal"):
        return span in inspect.getdoc(torch.nn.functional.scaled_dot_product_attention)
    if span == "key_padding_mask":
        return span in inspect.signature(torch.nn.MultiheadAttention.forward).parameters
    return all(part in names for part in parts)


ELSEWHERE = {
    "attention_mask",
    "python",
    "torchrun",
    "passed",
    "scratch.py",
}  # Hugging Face's, shell's, pytest's, reader's


def test_every_name_in_the_text_exists():
    unknown = [
        (line, span)
        for line, span in SPANS
        if re.fullmatch(r"[A-Za-z_][\w.]*\w(\(\))?", span)
        and not is_known(span)
        and span not in ELSEWHERE
    ]
    assert not unknown


def test_every_name_attributed_to_a_file_is_defined_there():
    text, astray, seen = " ".join(" ".join(PROSE).split()), [], 0
    pairs = [
        (file, names)
        for names, file in re.findall(r"((?:`[^`]+`(?:, | and )?)+) in \[`(\w+\.py)`\]", text)
    ]
    pairs += re.findall(r"\[`(\w+\.py)`\]\(\w+\.py\), ((?:`[^`]+`(?:, )?)+)", text)
    for file, names in pairs:
        defined = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
        for name in re.findall(r"`([^`]+)`", names):
            seen += 1
            astray += [(file, name)] if not set(name.split(" = ")[0].split(".")) <= defined else []
    assert seen > 30 and not astray


def test_every_constant_assigned_in_the_text_exists():
    constants = set()
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants.add(node.targets[0].id)
    given = [(line, span) for line, span in SPANS if re.match(r"[A-Z][A-Z_]+ = ", span)]
    assert len(given) > 5
    assert not [item for item in given if item[1].split()[0] not in constants]


def test_every_test_named_in_the_text_exists():
    names, _ = known_names()
    assert not [span for _, span in SPANS if span.startswith("test_") and span not in names]


def test_the_file_table_matches_line_counts_and_reading_times():
    table = table_under("4. Structure")
    tolerance = number(re.search(r"±([\d.]+)", table.header[1])[1])
    listed = set()
    for file, lines, minutes, _ in table.rows:
        name = re.match(r"\[`(\w+\.py)`\]", file)[1]
        listed.add(name)
        real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(real - number(lines)) <= tolerance, name
        assert number(minutes) == -(-number(lines) // 150) * 5, (
            name
        )  # thirty lines a minute, up to the next five
    assert listed == {path.name for path in ROOT.glob("*.py") if path.name != "scratch.py"}
    drawing = next(content for line, language, content in blocks() if "floor 3" in content)
    assert set(re.findall(r"\w+\.py", drawing)) == listed


@pytest.mark.parametrize("title", ["5.1", "5.2", "5.3"])
def test_the_minutes_of_a_path_add_up(title):
    total = 0
    for step, _, minutes in table_under(title).rows:
        if step.startswith("**total"):
            assert total == number(minutes)
        else:
            total += number(minutes)
    hours = [
        int(h) * 60
        for h in re.findall(r"\d+", next(h for _, h in HEADINGS if f" {title} " in h).split("(")[1])
    ]
    assert total == hours[-1]


def test_the_reference_tables_match_the_defaults_of_the_scripts():
    adam, _ = SCRIPTS["decoder_only"].create_optimizer(torch.nn.Linear(2, 2), 1.0, 10, 2)
    lowest = SCRIPTS["decoder_only"].lr_factor(1000, 1000, 40)
    sizes = [sum(p.numel() for p in model().parameters()) for model in MODELS.values()]
    epochs = [script.NUM_EPOCHS for script in SCRIPTS.values()]
    steps = len(toy_dataset.create_dataloaders(batch_size=SCRIPTS["decoder_only"].BATCH_SIZE)[0])
    listed = {row[0]: row[1] for title in ("10.1", "10.2") for row in table_under(title).rows}
    reference = {
        name: listed[name]
        for name in (
            "vocabulary",
            "longest input",
            "parameters, reported",
            "decay",
            "length of training",
            "betas",
            "weight decay (`WEIGHT_DECAY`)",
        )
    }
    for title, columns in (
        ("10.1", {1: SCRIPTS.values()}),
        ("10.2", {1: SCRIPTS.values(), 2: [train_all]}),
        ("10.3", {1: [SCRIPTS["encoder_decoder"]]}),
    ):
        checked = 0
        for row in table_under(title).rows:
            name = re.search(r"`([A-Z][A-Z_]+)`", row[0])
            for column, modules in columns.items():
                if name and re.match(NUMBER, row[column]):
                    value = number(re.search(NUMBER + r"(?= rows|$)", row[column])[0])
                    for module in modules:
                        if hasattr(module, name[1]):
                            assert getattr(module, name[1]) == value, (row, module.__name__)
                            checked += 1
        assert checked >= 2
    assert reference == {
        "vocabulary": f"{len(toy_dataset.VOCABULARY)}",
        "longest input": f"{SCRIPTS['encoder_only'].EncoderOnlyTransformer().max_len}",
        "parameters, reported": f"{min(sizes):,} to {max(sizes):,}",
        "decay": f"cosine to {lowest:.0%}".replace("%", " %"),
        "length of training": f"{min(epochs)} to {max(epochs)} epochs of {steps} steps",
        "betas": ", ".join(map(str, adam.defaults["betas"])),
        "weight decay (`WEIGHT_DECAY`)": f"{adam.defaults['weight_decay']}",
    }
    groups = len(train_all.epoch_groups(6950, 0))
    trained = {row[0]: row[2] for row in table_under("10.2").rows}
    assert trained["length of training"] == f"{train_all.NUM_EPOCHS} epochs of {groups} steps"
    assert trained[
        "decay"
    ] == f"cosine to {train_all.MIN_LEARNING_RATE / train_all.LEARNING_RATE:.0%}".replace("%", " %")
    assert (
        trained["batch (`BATCH_SIZE`)"]
        == f"{train_all.ACCUMULATION_STEPS} * {train_all.BATCH_SIZE} rows"
    )


# --- every number has a source ---------------------------------------------------------
def test_every_numeric_table_names_its_source():
    for table in TABLES:
        numeric = [
            c
            for c in range(len(table.header))
            if any(re.fullmatch(NUMBER, row[c]) for row in table.rows)
        ]
        if not numeric or "minutes" in table.header[-1]:
            continue  # the minutes of a path are a plan; that they add up is tested above
        assert re.match(
            r"Printed by `python |Sources: |Lines are counted|Measured by|Times are those",
            table.caption,
        ), (table.first, table.caption)
        if table in MEASURED:
            for column in numeric:
                assert re.search(r"\((±[\d.]+|~)\)$", table.header[column]), (
                    table.first,
                    table.header[column],
                )


def paragraphs():
    """Every paragraph of the prose as one line; a command belongs to the paragraph before it."""
    found = []
    for part in re.split(r"\n\s*\n(?! {4}python )", "\n".join(PROSE)):
        if part.strip() and not re.match(r"\s*[|#]", part):
            found.append(" ".join(part.split()))
    return found


def test_every_percentage_and_time_in_the_text_names_its_source():
    """The paragraph of a percentage or a time names a command, file, constant, paper, or test."""
    source = (
        r"python \w+\.py|python -m|\.py`|\]\(#|(?:19|20)\d\d|`test_|`[A-Z_]+`|`[A-Z_]+ = "
        r"|table|snippet|[Pp]rinted"
    )
    bare = [
        text
        for text in paragraphs()
        if re.search(r"\d ?%|\d (?:seconds|ms|minutes)\b", text) and not re.search(source, text)
    ]
    assert not bare


def test_numbers_in_the_text_match_the_code():
    training, validation = (len(loader.dataset) for loader in toy_dataset.create_dataloaders())
    text = " ".join(" ".join(PROSE).split())
    words = {5: "five", 19: "nineteen", len(MISTAKES): "fifty-seven", 64: "sixty-four"}
    assert len(MISTAKES) == 57
    figures = len(list((ROOT / "figures").glob("*.png")))
    ablations = {
        row[0]: row[1] for row in next(t for t in MEASURED if "8. Ablations" in t.caption).rows
    }
    scripts = "".join((ROOT / f"{script}.py").read_text(encoding="utf-8") for script in SCRIPTS)
    unscaled = re.findall(
        r"training ends at ([\d.]+)(?:-([\d.]+))?%", re.sub(r"[\s#]+", " ", scripts)
    )
    highest = max(float(figure) for pair in unscaled for figure in pair if figure)
    for expected in (
        f"saw {training} digit sequences",
        f"given {validation} sequences",
        f"the {words[figures]} figures",
        f"{toy_dataset.count_distinct(5):,} sequences",
        f"plants {words[len(MISTAKES)]} mistakes",
        f"sequences of up to {words[toy_dataset.MAX_DIGITS]} digits",
        f"ends at 0 to {highest:.0f} % exact match",
        f"still reaches {float(ablations['without positions']):.0f} % without positions",
        f"learn {words[SCRIPTS['decoder_only'].BATCH_SIZE]} rows by heart",
    ):
        assert expected in text, expected
    questions = re.findall(r"<summary><b>(\d+)\. ", "\n".join(section("14. Interview")))
    assert questions == [str(n) for n in range(1, 26)] and "The twenty-five most asked" in text
    milestones = re.findall(r"<summary><b>(\d+)\.</b>", "\n".join(section("13. Milestones")))
    assert milestones == [str(n) for n in range(1, len(milestones) + 1)] and len(milestones) >= 16


def test_every_planted_mistake_still_has_text_to_replace():
    scripts = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    assert not [name for name, old, _ in MISTAKES if not any(old in text for text in scripts)]
    assert not [name for name, old, _ in MISTAKES_IN_THE_GUIDE if old not in TEXT]


# --- commands ---------------------------------------------------------------------------
@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS}))
def test_every_command_in_the_text_exists(command):
    for part in command.split(" && "):
        words = shlex.split(part)
        assert words[0] in ("python", "torchrun", "ruff")
        if words[1:3] == ["-m", "pip"]:
            assert words[3] == "install"
            if words[4] == "-r":
                assert (ROOT / words[5]).is_file()
        elif words[1:3] == ["-m", "pytest"]:
            files = [word for word in words[3:] if word.startswith("tests/")]
            assert all((ROOT / file).is_file() for file in files)
            if "-k" in words:
                wanted = words[words.index("-k") + 1].split(" or ")
                source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
                names = re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)
                assert all(any(word in name for name in names) for word in wanted)
        elif words[1] == "-c":
            ast.parse(words[2])
        elif words[0] == "torchrun":
            assert (ROOT / words[-1]).is_file()
        elif words[0] == "python" and words[1] != "scratch.py":  # the reader's own file
            assert (ROOT / words[1]).is_file()


def test_ci_runs_the_two_setup_commands_of_the_readme():
    words = set(
        re.findall(r"readme_command (\w+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    )
    first = {
        word: next(line.strip() for line in LINES if re.match(rf"    python .*{word}", line))
        for word in words
    }
    assert first == {
        "quick_start": "python -m pip install -r requirements.txt && python quick_start.py",
        "pytest": "python -m pip install -r requirements-dev.txt && python -m pytest -n auto",
    }


@pytest.mark.parametrize(
    "command", sorted({command for _, command in COMMANDS if " -c " in command})
)
def test_a_short_command_runs(command, workplace):
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# --- what is printed --------------------------------------------------------------------
def same(promised, printed, tolerance):
    """Return True if two lines are equal, except that numbers may differ by tolerance(text)."""
    if re.sub(NUMBER, "#", promised).split() != re.sub(NUMBER, "#", printed).split():
        return False
    pairs = zip(re.findall(NUMBER, promised), re.findall(NUMBER, printed))
    return all(abs(number(a) - number(b)) <= tolerance(a) for a, b in pairs)


SNIPPETS = [
    (line, content, following[2])
    for (line, language, content), following in zip(blocks(), blocks()[1:])
    if language == "python"
]

RUNNER = """
import contextlib, io, json, sys, torch
torch.set_num_threads(1)
printed = []
for code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@functools.cache
def printed_by_snippets():
    """The output of each snippet in a folder where quick_start.py has run."""
    place, _ = finished("quick_start")
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=300,
        input=json.dumps([code for _, code, _ in SNIPPETS]),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_snippet_is_followed_by_its_output():
    every = blocks()
    for (_, language, content), (_, after, _) in zip(every, [*every[1:], (0, "", "")]):
        assert language in ("python", "text"), language
        if language == "python":
            assert after == "text" and "print(" in content
    assert len(SNIPPETS) > 20


@pytest.mark.parametrize(
    "index", range(len(SNIPPETS)), ids=[run_of("quick_start", line) for line, _, _ in SNIPPETS]
)
def test_a_snippet_prints_the_output_shown_below_it(index):
    def tolerance(text):  # 1 in the last decimal place; whole numbers must match
        return (
            1.01 * 10.0 ** -len(text.split(".")[1])
            if "." in text.rstrip(".") and "e" not in text
            else 0
        )

    _, _, promised = SNIPPETS[index]
    printed = printed_by_snippets()[index].rstrip("\n")
    assert len(promised.splitlines()) == len(printed.splitlines()), printed
    for a, b in zip(promised.splitlines(), printed.splitlines()):
        assert same(a, b, tolerance), (a, b)
        assert re.findall(r"\{.*?\}", a) == re.findall(
            r"\{.*?\}", b
        )  # text in braces must match exactly


@pytest.mark.parametrize("script", ["quick_start", "toy_dataset"], ids=run_of)
def test_the_output_shown_is_what_the_script_prints(script):
    command = (
        next(i for i, line in enumerate(PROSE) if re.match(rf"    python .*{script}\.py", line)) + 1
    )
    shown = next(content for line, language, content in blocks() if line > command).splitlines()
    printed = finished(script)[1].stdout.splitlines()
    begin = next(i for i, line in enumerate(printed) if same(shown[0], line, lambda _: 0))

    def tolerance(text):
        if script == "toy_dataset" or "," in text or "." not in text:
            return 0
        return 1.0 if number(text) > 90 else float("inf")  # percentages; the others are seconds

    assert len(printed) - begin >= len(shown)
    for a, b in zip(shown, printed[begin:]):
        assert same(a, b, tolerance), (a, b)


def printed_rows(table):
    """For each row of a measured table, (the row, the line that the command printed for it)."""
    lines = [" ".join(line.split()) for line in finished(table.script)[1].stdout.splitlines()]
    heading = re.search(r" under `([^`]+)`", table.caption)
    label = re.search(r", line `([^`]+)`", table.caption)
    if heading:
        begin = next(i for i, line in enumerate(lines) if line.startswith(heading[1]))
        lines = lines[begin:]
    position = 0
    for row in table.rows:
        name = row[0].strip("`")
        if label:  # a line of this name in the part of the output that this row's name begins
            position = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
            name = " ".join(label[1].split())
        place = next(
            (i for i in range(position, len(lines)) if f"{lines[i]} ".startswith(f"{name} ")), None
        )
        assert place is not None, f"the command printed nothing for {row[0]!r}"
        position = place + 1
        yield row, lines[place][len(name) :]


@pytest.mark.parametrize("table", MEASURED, ids=[run_of(t.script, t.first) for t in MEASURED])
def test_a_measured_table_matches_the_output_of_its_command(table):
    compare_with_what_is_printed(table)


def compare_with_what_is_printed(table):
    compared = 0
    for row, line in printed_rows(table):
        numbers = re.findall(NUMBER, line)
        for column in range(1, len(row)):
            if not row[column]:
                continue
            kind = table.header[column]
            name = kind.split(",")[0].split(" (")[0]
            # The columns are in the order of the line, or the line names them: `exact match 12.3%`.
            named = re.search(re.escape(name) + r":? +(" + NUMBER + ")", line)
            printed = number(named[1] if named else numbers[column - 1])
            within = re.search(r"±([\d.]+)", kind)
            if within:
                assert number(within[1]) <= (20 if "%" in kind and "steps" not in kind else 125), (
                    "the tolerance is too wide to hold anything"
                )
                assert abs(printed - number(row[column])) <= number(within[1]), (row, line)
                compared += 1
            else:  # times and similar: a busy machine may be slow, but not 50 times as slow
                assert 1 / 50 < printed / number(row[column]) < 50, (row, line)
    assert compared >= 2


# --- proof that these tests can fail ------------------------------------------------------------
@pytest.mark.parametrize(
    "promised, printed, alike",
    [
        ("a 1.50 b", "a  1.51 b", True),
        ("a 1.50 b", "a 1.54 b", False),
        ("a 12 b", "a 13 b", False),
        ("a 1 b", "a 1 c", False),
    ],
)
def test_a_line_that_differs_is_detected(promised, printed, alike):
    assert same(promised, printed, lambda text: 0.021 if "." in text else 0) == alike


def test_a_name_that_does_not_exist_is_detected():
    assert (
        is_known("MultiHeadAttention.forward")
        and is_known("nn.RMSNorm")
        and is_known("toy_dataset.py")
    )
    assert (
        not is_known("MultiHeadAttention.backwards")
        and not is_known("nn.Nothing")
        and not is_known("no_such_name")
    )


@pytest.mark.parametrize(
    "table", [t for t in MEASURED if t.script == "quick_start"], ids=[run_of("quick_start")]
)
def test_a_wrong_number_in_a_table_is_detected(table):
    compare_with_what_is_printed(table)
    with pytest.raises(AssertionError):
        compare_with_what_is_printed(
            table._replace(rows=[[row[0], "1,234", *row[2:]] for row in table.rows])
        )
