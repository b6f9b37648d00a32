"""README and docs/: figures are those of committed results, names exist, links lead somewhere, lines stay short."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import typer

import fastreduce
from bench.tables import TABLES
from fastreduce.arguments import counted, fixed
from fastreduce.cli.app import app
from fastreduce.cli.study import study
from fastreduce.reducers import REDUCERS, _options

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]


def _heading_ids(text):
    """Return anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    for table in TABLES[page]:
        assert "\n".join(table) + "\n" in text, f"{page} lacks a table: python -m bench.tables\n" + "\n".join(table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_and_name_no_machine(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 120, f"{page.name}:{number} has {len(line)} characters"
        assert not re.search(r"(?<![\w./:-])/(?!data/)\w+/", line), f"{page.name}:{number} names a machine's path"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        goal = page.parent / path if path else page
        assert goal.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _heading_ids(goal.read_text()), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"fastreduce\.([A-Za-z_]+)\(", text):
        assert hasattr(fastreduce, name), f"{page.name} names fastreduce.{name}"
    for path in re.findall(r"`((?:bench|tests|examples|fastreduce|kernels)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m (bench\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name} names {module}"


def _known_options():
    """Return the options of every command of ``fastreduce``, by its words."""
    found = {}
    for words, commands in (("", typer.main.get_command(app)), ("study ", typer.main.get_command(study))):
        for name, command in commands.commands.items():
            found[words + name] = {word for one in command.params for word in (*one.opts, *one.secondary_opts)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_named(page):
    text, known = page.read_text(), _known_options()
    for name, rest in re.findall(r"(?:^|`|-m )fastreduce ((?:study )?[a-z]+)\b([^`|\n]*)", text, re.MULTILINE):
        named = re.findall(r"(?<!\S)--[a-z0-9-]+", rest)
        assert name in known or not named, f"{page.name} names fastreduce {name}"
        assert set(named) <= {*known.get(name, ()), "--help"}, f"{page.name}: fastreduce {name}{rest}"
    for module, rest in re.findall(r"python -m (bench\.\w+)\b([^`|\n]*)", text):
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        for option in re.findall(r"(?<!\S)--[a-z0-9-]+", rest):
            keys = (f'"{option}"', f'"{option[2:]}": (')  # bench.models has a table of them
            assert any(key in source for key in keys), f"{page.name}: {module} {option}"


def test_each_method_and_option_is_described():
    page, readme = (ROOT / "docs" / "methods.md").read_text(), (ROOT / "README.md").read_text()
    for name, reducer in REDUCERS.items():
        assert f"`{name}`" in readme
        for option in _options(reducer):
            assert f"`{option}" in page, f"methods.md lacks {option} of {name}"


def test_navigation_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)) == {page.name for page in DOCS}


_THINGS = "calls|classes|decisions|epochs|failures|images|kernels|models|passes|patches|rounds|rows|runs|stages|tokens"
_PLURAL = re.compile(rf" (?:(?:patch|training|validation) )?(?:{_THINGS})\b")
_LISTS = {"made_for", "reached", "list(self.clusters)"}  # several counts, not one


def _bare_counts(path):
    """Yield what an f-string puts before a plural as it is, though it may be one."""
    strings = [node.values for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)]
    for value, text in (pair for values in strings for pair in itertools.pairwise(values)):
        if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and _PLURAL.match(text.value):
            words = ast.unparse(value.value)
            if not words.isupper() and words not in _LISTS:
                yield f"{path.relative_to(ROOT)}: {{{words}}}{text.value}"


def test_one_round_is_no_plural():
    """Counts in messages come from ``arguments.counted``, which says ``1 round``: none stands bare before a plural."""
    assert [counted(number, "round") for number in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
    assert [counted(2, thing) for thing in ("patch", "class", "pass")] == ["2 patches", "2 classes", "2 passes"]
    assert (counted(1.0, "point", "g"), counted(0.5, "point", "g")) == ("1 point", "0.5 points")
    assert counted(1200, "image", ",") == "1,200 images"
    assert [fixed(number, 1) for number in (-0.04, -0.0, 0.04, -0.06, 1.25)] == ["0.0", "0.0", "0.0", "-0.1", "1.2"]
    files = [path for room in ("fastreduce", "bench") for path in (ROOT / room).glob("**/*.py")]
    files = [path for path in files if not {"ops", "kernels"} & set(path.relative_to(ROOT).parts)]
    assert len(files) > 150
    assert not [found for path in files for found in _bare_counts(path)]


def test_docstrings_name_their_thing_first():
    """Functions' begin with a verb, classes' and modules' with a noun: none with a pronoun or a question."""
    odd = re.compile(r'^ *"""(What|Which|Whether|How|Of|That|Those|Likewise) .*', re.MULTILINE)
    files = [
        path
        for room in ("fastreduce", "kernels", "bench", "examples", "tests")
        for path in ROOT.glob(f"{room}/**/*.py")
    ]
    assert len(files) > 400
    found = [f"{path.relative_to(ROOT)}: {hit[0].strip()}" for path in files for hit in odd.finditer(path.read_text())]
    assert not found
