"""The guide: its commands exist, its snippets print the output shown below them, its links and
names lead somewhere, and its tables agree with the output of the commands that they name."""

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
from training import lr_factor
from conftest import MODELS, ROOT, SCRIPTS, finished, run_of
from planted_mistakes import MISTAKES, MISTAKES_IN_THE_GUIDE, MISTAKES_IN_VARIATIONS

NUMBER = r"-?\d[\d,]*\.?\d*(?:e-?\d+)?"


def number(text):
    return float(text.replace(",", "").rstrip("."))


def anchor(heading):
    """The anchor that GitHub makes for a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


# --- the parts of a page ------------------------------------------------------------------
class Table(NamedTuple):
    page: str
    first: int  # number of its first line
    header: list
    rows: list
    caption: str  # the paragraph that follows

    @property
    def script(self):
        return re.search(r"^Printed by `python (\w+)\.py`", self.caption)[1]


class Page:
    """One page: its text, its lines without fenced blocks, its headings, and its tables."""
    def __init__(self, path):
        self.path, self.name = path, path.relative_to(ROOT).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.blocks, self.prose, start = [], [], None  # blocks: (first line, language, content)
        for i, line in enumerate(self.lines):
            fence = line.startswith("```")
            self.prose.append("" if fence or start is not None else line)
            if fence and start is None:
                start = i
            elif fence:
                content = "\n".join(self.lines[start + 1:i])
                self.blocks.append((start + 1, self.lines[start][3:], content))
                start = None
        assert start is None, f"{self.name}: a fenced block is not closed"
        self.headings = [(i, line) for i, line in enumerate(self.prose) if re.match(r"#+ ", line)]
        self.anchors = {anchor(heading.lstrip("# ")) for _, heading in self.headings}
        self.spans = [(f"{self.name}:{i + 1}", span) for i, line in enumerate(self.prose)
                      for span in re.findall(r"`([^`]+)`", line)]

    def tables(self):
        found, i = [], 0
        while i < len(self.prose):
            if not self.prose[i].startswith("|"):
                i += 1
                continue
            first = i
            while i < len(self.prose) and self.prose[i].startswith("|"):
                i += 1
            cells = [[cell.strip() for cell in line.strip().strip("|").split("|")]
                     for line in self.prose[first:i]]
            rest = "\n".join(self.prose[i:]).strip()
            caption = " ".join(rest.split("\n\n")[0].split())
            found.append(Table(self.name, first + 1, cells[0], cells[2:], caption))
        return found

    def table_under(self, title):
        line = next(i for i, h in self.headings if h.lstrip("# ").startswith(title))
        return next(table for table in self.tables() if table.first > line)


FRONT = Page(ROOT / "README.md")
CHAPTERS = [Page(path) for path in sorted((ROOT / "guide").glob("*.md"))]
VARIATIONS = Page(ROOT / "variations" / "README.md")
EXERCISES = Page(ROOT / "exercises" / "README.md")
PAGES = {page.name: page for page in [FRONT, Page(ROOT / "CONTRIBUTING.md"), VARIATIONS, EXERCISES,
                                      *CHAPTERS]}
CODE = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("variations/*.py"))]
TABLES = [table for page in PAGES.values() for table in page.tables()]
MEASURED = [t for t in TABLES if t.caption.startswith("Printed by")]
SPANS = [span for page in PAGES.values() for span in page.spans]
TEXT = "\n".join(page.text for page in PAGES.values())
PROSE = " ".join(" ".join(" ".join(page.prose) for page in PAGES.values()).split())
COMMANDS = {span for _, span in SPANS if re.match(r"(python|torchrun|ruff) \S", span)}
COMMANDS |= {line.strip() for page in PAGES.values() for line in page.prose
             if re.match(r"    (python|torchrun|ruff) ", line)}


# --- navigation ---------------------------------------------------------------------------
def test_the_front_page_is_short_and_shows_picture_and_command_early():
    assert len(FRONT.lines) <= 250
    assert any(line.startswith("![") for line in FRONT.lines[:10])
    assert any(line.startswith("    python ") for line in FRONT.lines[:15])


def test_the_front_page_quotes_tiny_gpt():
    quoted = next(content for _, language, content in FRONT.blocks if language == "python")
    assert quoted in (ROOT / "tiny_gpt.py").read_text(encoding="utf-8")
    assert quoted.startswith("def attention") and "return weights @ v" in quoted


def test_every_topic_is_two_clicks_from_the_front_page():
    linked = re.findall(r"\]\(((?:guide|variations|exercises)/\w+\.md)\)", "\n".join(FRONT.prose))
    assert {page.name for page in [*CHAPTERS, VARIATIONS, EXERCISES]} <= set(linked)
    for page in [*CHAPTERS, VARIATIONS, EXERCISES]:
        assert len(page.lines) <= 600
        contents = page.text.split("\n## ")[0]
        topics = {anchor(h[3:]) for _, h in page.headings if h.startswith("## ")}
        assert topics <= set(re.findall(r"\]\(#([^)]+)\)", contents)), page.name


def test_each_chapter_links_back_and_forward():
    order = re.findall(r"^\| \[[^\]]+\]\(guide/(\w+\.md)\) \|", FRONT.text, flags=re.MULTILINE)
    assert len(order) == len(CHAPTERS) == 15
    assert VARIATIONS.lines[0].startswith("[Front page](../README.md)")
    for before, name, after in zip([None, *order], order, [*order[1:], None]):
        first = PAGES[f"guide/{name}"].lines[0]
        assert first.startswith("[Front page](../README.md)")
        assert before is None or re.search(rf"previous: \[[^\]]+\]\({before}\)", first), name
        assert after is None or re.search(rf"next: \[[^\]]+\]\({after}\)", first), name


def test_every_link_has_a_target():
    dead = []
    for page in PAGES.values():
        assert len(page.anchors) == len(page.headings), f"{page.name}: two headings, one anchor"
        for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(page.prose)):
            if target.startswith("https://"):
                if not re.fullmatch(r"https://[\w.-]+\.[a-z]+/[^\s]*", target):
                    dead.append((page.name, target))
                continue
            file, _, place = target.partition("#")
            path = (page.path.parent / file).resolve() if file else page.path
            known = PAGES.get(path.relative_to(ROOT).as_posix()) if path.exists() else None
            if not path.exists() or (place and (known is None or place not in known.anchors)):
                dead.append((page.name, target))
    assert not dead


def test_every_variation_is_in_each_table_and_of_the_promised_shape():
    files = {path.name for path in ROOT.glob("variations/*.py")} - {"measure.py", "run_all.py"}
    from run_all import ORDER

    assert {f"{name}.py" for name in ORDER} == files
    for table in (*VARIATIONS.tables()[:3], FRONT.table_under("Today's models")):
        listed = {re.search(r"`(\w+\.py)`", row[0])[1] for row in table.rows if row[0]}
        assert listed == files
    for name in files:
        text = (ROOT / "variations" / name).read_text(encoding="utf-8")
        places = [text.index(part) for part in (
            "THE IDEA.", "Run it:", "# CONSTANTS", "# --- The part", "# --- The check",
            "# --- The measurement", "What this size cannot show")]
        assert places == sorted(places) and len(text.splitlines()) <= 200, name


def test_every_figure_appears_once_with_alt_text():
    shown = re.findall(r"!\[([^\]]*)\]\((?:\.\./)?figures/(\w+\.png)\)", TEXT)
    files = [path.name for path in (ROOT / "figures").glob("*.png")]
    assert sorted(name for _, name in shown) == sorted(files)
    assert all(len(text.split()) >= 3 for text, _ in shown)


def test_years_of_papers_match_their_addresses_and_citations_are_listed():
    reading = PAGES["guide/further_reading.md"]
    text = " ".join(" ".join(reading.prose).split())
    for year, month in re.findall(
            r"(\d{4}), \[[^\]]+\]\(https://arxiv\.org/abs/(\d\d)\d\d\.\d{4,5}\)", text):
        assert 0 <= int(year) - (2000 + int(month)) <= 2
    addresses = re.findall(r"arxiv\.org/abs/\d{4}\.\d{4,5}\)", text)
    assert len(addresses) == text.count("arxiv.org") >= 50
    # "Vaswani et al. 2017", "Zhang and Sennrich 2019", "Dao 2023"; other authors may be in between.
    cited = r"([A-Z][a-z]+)(?:,? et al\.|(?:, [A-Z][a-z]+)*,? and [A-Z][a-z]+)? ((?:19|20)\d\d)\b"
    listed = set(re.findall(cited, text))
    elsewhere = " ".join(" ".join(p.prose) for p in PAGES.values() if p is not reading)
    elsewhere += " ".join(path.read_text(encoding="utf-8") for path in CODE)
    assert set(re.findall(cited, " ".join(elsewhere.split()))) <= listed


# --- names and numbers from the code -----------------------------------------------------
@functools.cache
def known_names():
    """Every name that the code defines or uses, and {class: its methods and attributes}."""
    names, members = set(), {}
    for path in [*CODE, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for field in ("id", "attr", "name", "arg"):
                if isinstance(getattr(node, field, None), str):
                    names.add(getattr(node, field))
            if (isinstance(node, ast.Constant) and isinstance(node.value, str)
                    and path.parent == ROOT):
                names.add(node.value)  # columns of the logs, tokens
            if isinstance(node, ast.ClassDef):
                inside = members.setdefault(node.name, set())
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        inside.add(inner.name)
                    if (isinstance(inner, ast.Attribute)
                            and getattr(inner.value, "id", "") == "self"):
                        inside.add(inner.attr)
    return names, members


def is_known(span):
    """Is the identifier `span` a file, or a name in the scripts, or one that PyTorch has?"""
    names, members = known_names()
    parts = span.removesuffix("()").split(".")
    homes = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    if (ROOT / span).exists() or any(
        (ROOT / folder / span).exists()
        for folder in ("tests", "benchmarks", "variations", "exercises")):
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


# Hugging Face's, the shell's, pytest's, and the reader's own names
ELSEWHERE = {"attention_mask", "python", "torchrun", "passed", "scratch.py"}


def test_every_name_in_the_text_exists():
    unknown = [(line, span) for line, span in SPANS
               if re.fullmatch(r"[A-Za-z_][\w.]*\w(\(\))?", span) and not is_known(span)
               and span not in ELSEWHERE]
    assert not unknown


def test_every_name_attributed_to_a_file_is_defined_there():
    astray, seen = [], 0
    before = re.findall(r"((?:`[^`]+`(?:, | and )?)+) in \[`(\w+\.py)`\]", PROSE)
    pairs = [(file, names) for names, file in before]
    pairs += re.findall(r"\[`(\w+\.py)`\]\((?:\.\./)?\w+\.py\), ((?:`[^`]+`(?:, )?)+)", PROSE)
    for file, names in pairs:
        defined = set()
        path = next(path for path in CODE if path.name == file)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    for path in CODE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants.add(node.targets[0].id)
    given = [(line, span) for line, span in SPANS if re.match(r"[A-Z][A-Z_]+ = ", span)]
    assert len(given) > 5
    assert not [item for item in given if item[1].split()[0] not in constants]


def test_every_test_named_in_the_text_exists():
    names, _ = known_names()
    assert not [span for _, span in SPANS if span.startswith("test_") and span not in names]


def test_the_file_table_lists_every_script_and_its_size():
    table = FRONT.table_under("Which file do I read")
    sizes = {re.match(r"\[`(\w+\.py)`\]", row[0])[1]: number(row[2]) for row in table.rows}
    assert set(sizes) == {path.name for path in ROOT.glob("*.py") if path.name != "scratch.py"}
    for name, lines in sizes.items():
        real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(real - lines) <= 0.1 * real, name
    blocks = PAGES["guide/quick_start.md"].blocks
    drawing = next(content for _, _, content in blocks if "floor 3" in content)
    assert set(re.findall(r"\w+\.py", drawing)) == set(sizes)


@pytest.mark.parametrize("title", ["Practical", "Theory first", "Comprehensive"])
def test_the_minutes_of_a_path_add_up(title):
    page, total = PAGES["guide/learning_paths.md"], 0
    for step, _, minutes in page.table_under(title).rows:
        if step.startswith("**total"):
            assert total == number(minutes)
        else:
            total += number(minutes)
    heading = next(h for _, h in page.headings if h.startswith(f"## {title}"))
    assert total == 60 * int(re.findall(r"\d+", heading)[-1])


def test_the_reference_tables_match_the_defaults_of_the_scripts():
    page = PAGES["guide/hyperparameters.md"]
    adam, _ = SCRIPTS["decoder_only"].create_optimizer(torch.nn.Linear(2, 2), 1.0, 10, 2)
    lowest = lr_factor(1000, 1000, 40)
    sizes = [sum(p.numel() for p in model().parameters()) for model in MODELS.values()]
    epochs = [script.NUM_EPOCHS for script in SCRIPTS.values()]
    steps = len(toy_dataset.create_dataloaders(batch_size=SCRIPTS["decoder_only"].BATCH_SIZE)[0])
    for title, columns in (("Model", {1: SCRIPTS.values()}),
                           ("Training", {1: SCRIPTS.values(), 2: [train_all]}),
                           ("Inference", {1: [SCRIPTS["encoder_decoder"]]})):
        checked = 0
        for row in page.table_under(title).rows:
            name = re.search(r"`([A-Z][A-Z_]+)`", row[0])
            for column, modules in columns.items():
                if name and re.match(NUMBER, row[column]):
                    value = number(re.search(NUMBER + r"(?= rows|$)", row[column])[0])
                    for module in modules:
                        if hasattr(module, name[1]):
                            assert getattr(module, name[1]) == value, (row, module.__name__)
                            checked += 1
        assert checked >= 2
    model = {row[0]: row[1] for row in page.table_under("Model").rows}
    training = {row[0]: row[1:3] for row in page.table_under("Training").rows}
    assert model["vocabulary"] == f"{len(toy_dataset.VOCABULARY)}"
    assert model["longest input"] == f"{MODELS['encoder_only']().arguments['max_len']}"
    assert model["parameters, reported"] == f"{min(sizes):,} to {max(sizes):,}"
    groups = train_all.steps_per_epoch(6950)
    other = train_all.MIN_LEARNING_RATE / train_all.LEARNING_RATE
    assert training["decay"] == [f"cosine to {lowest:.0%}", f"cosine to {other:.0%}"]
    assert training["length of training"] == [
        f"{min(epochs)} to {max(epochs)} epochs of {steps} steps",
        f"{train_all.NUM_EPOCHS} epochs of {groups} steps"]
    assert training["betas"][0] == ", ".join(map(str, adam.defaults["betas"]))
    assert training["weight decay (`WEIGHT_DECAY`)"][0] == f"{adam.defaults['weight_decay']}"
    rows = f"{train_all.ACCUMULATION_STEPS} * {train_all.BATCH_SIZE} rows"
    assert training["batch (`BATCH_SIZE`)"][1] == rows


# --- every number has a source ---------------------------------------------------------
def test_every_numeric_table_names_its_source():
    for table in TABLES:
        numeric = [column for column in range(len(table.header))
                   if any(re.fullmatch(NUMBER, row[column]) for row in table.rows)]
        if not numeric or {"minutes", "it answers"} & set(table.header):
            continue  # estimates that add up (above), and tests/measure_tries.py break_it
        assert re.match("Printed by `python |Sources: |Measured by", table.caption), table
        if table in MEASURED:
            for column in numeric:
                assert re.search(r"\((±[\d.]+|~)\)$", table.header[column]), table.header[column]


def paragraphs(page):
    """Every paragraph of the prose as one line; a command is part of the paragraph before it."""
    found = []
    for part in re.split(r"\n\s*\n(?! {4}python )", "\n".join(page.prose)):
        if part.strip() and not re.match(r"\s*[|#]", part):
            found.append(" ".join(part.split()))
    return found


def test_every_percentage_and_time_in_the_text_names_its_source():
    """A paragraph with a percentage or a time names a command, file, link, paper, or test."""
    source = (
        r"python \w+\.py|python -m|\.py`|\]\([\w/.]*#|(?:19|20)\d\d|`test_|`[A-Z_]+`|`[A-Z_]+ = "
        r"|[Ff]igure|[Pp]rinted|[Mm]easured|tables? above")
    assert not [(page.name, text) for page in PAGES.values() for text in paragraphs(page)
                if re.search(r"\d ?%|\d (?:seconds|ms|minutes)\b", text)
                and not re.search(source, text)]


def test_numbers_in_the_text_match_the_code():
    training, validation = (len(loader.dataset) for loader in toy_dataset.create_dataloaders())
    table = next(table for table in MEASURED if "7. Ablations" in table.caption)
    ablations = {row[0]: row[1] for row in table.rows}
    scripts = "".join((ROOT / f"{script}.py").read_text(encoding="utf-8") for script in SCRIPTS)
    unscaled = re.findall(r"training ends at ([\d.]+)(?:-([\d.]+))?%",
                          re.sub(r"[\s#]+", " ", scripts))
    highest = max(float(figure) for pair in unscaled for figure in pair if figure)
    for expected in (
            f"sees {training} sequences", f"translates {validation} that it has never seen",
            f"{sum(10 ** n for n in range(1, 6)):,} sequences of up to five digits",
            f"plants {len(MISTAKES)} mistakes",
            f"`variations`: {len(MISTAKES_IN_VARIATIONS)}, `guide`: {len(MISTAKES_IN_THE_GUIDE)}",
            f"ends at 0 to {highest:.0f}% exact match",
            f"still reaches {float(ablations['without positions']):.0f}% without positions",
            f"can't memorize {SCRIPTS['decoder_only'].BATCH_SIZE} sequences",
    ):
        assert expected in PROSE, expected
    figures = len(list((ROOT / "figures").glob("*.png")))
    assert {19: "nineteen", 20: "twenty"}[figures] + " figures" in PROSE
    questions = re.findall(r"<summary><b>(\d+)\. ", PAGES["guide/interview.md"].text)
    assert questions == [str(n) for n in range(1, 26)] and "these twenty-five questions" in PROSE
    milestones = re.findall(r"<summary><b>(\d+)\.</b>", PAGES["guide/learning_paths.md"].text)
    assert milestones == [str(n) for n in range(1, len(milestones) + 1)] and len(milestones) >= 16


def test_every_planted_mistake_still_has_text_to_replace():
    scripts = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    assert not [name for name, old, _ in MISTAKES if not any(old in text for text in scripts)]
    assert not [name for name, old, _ in MISTAKES_IN_THE_GUIDE if old not in TEXT]
    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    assert not [name for name, old, _ in MISTAKES_IN_VARIATIONS if old not in code]


# --- commands ---------------------------------------------------------------------------
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_in_the_text_exists(command):
    for part in command.split(" && "):
        words = shlex.split(part)
        assert words[0] in ("python", "torchrun", "ruff")
        if words[1:3] == ["-m", "pip"]:
            assert words[3] == "install"
            if words[4] == "-r":
                assert (ROOT / words[5]).is_file()
        elif words[1:3] == ["-m", "venv"]:
            assert len(words) == 4
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
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {word: next(line.strip() for line in FRONT.lines
                       if re.match(rf"    python .*{word}", line))
            for word in re.findall(r"readme_command (\w+)", run)} == {
        "quick_start": "python -m pip install -r requirements.txt && python quick_start.py",
        "pytest": "python -m pip install -r requirements-dev.txt && python -m pytest -n auto"}


@pytest.mark.parametrize("command", sorted(c for c in COMMANDS if " -c " in c))
def test_a_short_command_runs(command, workplace):
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=workplace.folder,
                          capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr


# --- what is printed --------------------------------------------------------------------
def same(promised, printed, tolerance):
    """Return True if two lines are equal, except that numbers may differ by tolerance(text)."""
    if re.sub(NUMBER, "#", promised).split() != re.sub(NUMBER, "#", printed).split():
        return False
    pairs = zip(re.findall(NUMBER, promised), re.findall(NUMBER, printed))
    return all(abs(number(a) - number(b)) <= tolerance(a) for a, b in pairs)


SNIPPETS = [  # (page and line, code, output)
    (f"{page.name}:{line}", content, following[2]) for page in CHAPTERS
    for (line, language, content), following in zip(page.blocks, page.blocks[1:])
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
    done = subprocess.run([sys.executable, "-c", RUNNER], cwd=place.folder, capture_output=True,
                          text=True, timeout=3600,
                          input=json.dumps([code for _, code, _ in SNIPPETS]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_snippet_is_followed_by_its_output():
    for page in CHAPTERS:
        following = [*page.blocks[1:], (0, "", "")]
        for (_, language, content), (_, after, _) in zip(page.blocks, following):
            assert language in ("python", "text", "diff"), (page.name, language)
            if language == "python":
                assert after == "text" and "print(" in content
    assert len(SNIPPETS) > 20


@pytest.mark.parametrize("index", range(len(SNIPPETS)),
                         ids=[run_of("quick_start", place) for place, _, _ in SNIPPETS])
def test_a_snippet_prints_the_output_shown_below_it(index):
    def tolerance(text):  # 1 in the last decimal place; whole numbers must match
        return (1.01 * 10.0**-len(text.split(".")[1])
                if "." in text.rstrip(".") and "e" not in text else 0)

    _, _, promised = SNIPPETS[index]
    printed = printed_by_snippets()[index].rstrip("\n")
    assert len(promised.splitlines()) == len(printed.splitlines()), printed
    for a, b in zip(promised.splitlines(), printed.splitlines()):
        assert same(a, b, tolerance), (a, b)
        assert re.findall(r"\{.*?\}", a) == re.findall(r"\{.*?\}", b)  # braces: exactly


@pytest.mark.parametrize("script", ["quick_start", "toy_dataset"], ids=run_of)
def test_the_output_shown_is_what_the_script_prints(script):
    page = FRONT if script == "quick_start" else PAGES["guide/quick_start.md"]
    command = next(i for i, line in enumerate(page.prose)
                   if re.match(rf"    python .*{script}\.py", line))
    printed = finished(script)[1].stdout.splitlines()
    shown = next(content for line, _, content in page.blocks if line > command
                 and any(same(content.split("\n")[0], one, lambda _: 0) for one in printed))
    shown = shown.splitlines()
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
            (i for i in range(position, len(lines)) if f"{lines[i]} ".startswith(f"{name} ")), None)
        assert place is not None, f"the command printed nothing for {row[0]!r}"
        position = place + 1
        yield row, lines[place][len(name):]


@pytest.mark.parametrize("table", MEASURED,
                         ids=[run_of(t.script, t.page, t.first) for t in MEASURED])
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
                widest = 20 if "%" in kind and "steps" not in kind else 125
                assert number(within[1]) <= widest, "a tolerance too wide to hold anything"
                assert abs(printed - number(row[column])) <= number(within[1]), (row, line)
                compared += 1
            else:  # times and similar: a busy machine may be slow, but not 50 times as slow
                assert 1 / 50 < printed / number(row[column]) < 50, (row, line)
    assert compared >= 2


# --- proof that these tests can fail ------------------------------------------------------------
@pytest.mark.parametrize("promised, printed, alike", [
    ("a 1.50 b", "a  1.51 b", True), ("a 1.50 b", "a 1.54 b", False), ("a 12 b", "a 13 b", False),
    ("a 1 b", "a 1 c", False)])
def test_a_line_that_differs_is_detected(promised, printed, alike):
    assert same(promised, printed, lambda text: 0.021 if "." in text else 0) == alike


def test_a_name_that_does_not_exist_is_detected():
    assert all(map(is_known, ("MultiHeadAttention.forward", "nn.RMSNorm", "toy_dataset.py")))
    assert not any(map(is_known, ("MultiHeadAttention.back", "nn.Nothing", "no_such_name")))


@pytest.mark.parametrize("table", [t for t in MEASURED if t.script == "quick_start"],
                         ids=[run_of("quick_start")])
def test_a_wrong_number_in_a_table_is_detected(table):
    compare_with_what_is_printed(table)
    with pytest.raises(AssertionError):
        compare_with_what_is_printed(
            table._replace(rows=[[row[0], "1,234", *row[2:]] for row in table.rows]))
