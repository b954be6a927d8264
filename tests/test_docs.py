"""The documentation: its Python and its command lines run, its links lead somewhere, its names exist.

Blocks of one file share a namespace and a temporary working directory and run in order. In ``bash`` and
``console`` blocks (there, lines after "$ ") the lines that begin with ``cvxnn`` run through the command line and
must end with status 0, or with N where the comment "# exit status N" says so. Lines that begin with a word of
``NOT_RUN`` are skipped; any other line is an error.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITH_CODE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WITH_CODE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NOT_RUN = ("make", "pip", "python")

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work|Users|mnt|opt|var)/|[A-Z]:\\")


def page_id(path):
    return str(path.relative_to(ROOT))


over_pages = pytest.mark.parametrize("page", PAGES, ids=page_id)


def blocks(page):
    """Language, first line number and text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], text[: m.start(2)].count("\n"), m[2]) for m in BLOCK.finditer(text)]


def command_lines(language, text):
    """The commands of a shell block, without prompts and without their output."""
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run_command(line):
    from cvxnn.cli import main

    command, _, comment = line.partition("#")
    program, *arguments = shlex.split(command)
    if program in NOT_RUN:
        return
    assert program == "cvxnn", f"{line!r} is neither run nor skipped by a rule"
    found = re.search(r"exit status (\d)", comment)
    assert main(arguments) == (int(found[1]) if found else 0), line


@pytest.mark.parametrize("page", [page for page in WITH_CODE if blocks(page)], ids=page_id)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for language, line, text in blocks(page):
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), namespace)
        elif language in ("bash", "console"):
            for command in command_lines(language, text):
                run_command(command)
        else:
            assert language == "text", f"{page}: a block in {language!r} is neither run nor text"


def anchors(text):
    """The anchors that headings make."""
    titles = HEADING.findall(BLOCK.sub("", text))
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@over_pages
def test_links(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.is_file(), f"{page.name} links to {target}, which does not exist"
        if page.parent.name == "docs":
            assert other.is_relative_to(ROOT / "docs"), f"{target} is outside of the site"
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), (
                f"{page.name} links to {target}: no such heading"
            )


@over_pages
def test_rows_of_a_table_have_the_same_cells(page):
    for table in TABLE.findall(page.read_text(encoding="utf-8")):
        rows = table.splitlines()
        assert len({row.count("|") for row in rows}) == 1, rows[0]


@over_pages
def test_no_machine_paths(page):
    assert not MACHINE_PATH.search(page.read_text(encoding="utf-8"))


def test_machine_path_is_found():
    assert MACHINE_PATH.search("see /home/someone/file") and MACHINE_PATH.search("(/tmp/x)")


def test_reference_names_exist():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        owner = importlib.import_module(module)
        assert hasattr(owner, attribute) or importlib.import_module(name)


def test_every_public_name_is_in_the_reference():
    import cvxnn

    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    missing = [name for name in cvxnn.__all__ if not name.startswith("_") and f"::: cvxnn.{name}\n" not in text]
    assert not missing


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    docs = ROOT / "docs"
    assert listed == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}


def test_options_of_solvers_are_documented():
    from dataclasses import fields

    from cvxnn.solvers.api import SOLVERS

    text = (ROOT / "docs/solvers.md").read_text(encoding="utf-8")
    for name, solver in SOLVERS.items():
        assert f"| `{name}` |" in text
        for field in fields(solver.Options):
            assert f"| `{field.name}` |" in text, f"{name} has the option {field.name}, which solvers.md lacks"


def test_solvers_are_named_where_they_are_chosen():
    import cvxnn
    from cvxnn.solvers.api import SOLVERS

    listed = re.search(r"solver : \{(.*?)\}", cvxnn.solve.__doc__, re.DOTALL).group(1)
    assert re.findall(r'"(\w+)"', listed) == ["auto", *SOLVERS]


def test_hooks_of_solvers_and_operators_are_documented():
    """What a subclass may override is in CONTRIBUTING, so that a new solver or architecture does not miss it."""
    from cvxnn.solvers.base import Solver

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    hooks = {name for name in vars(Solver) if not name.startswith("_")} | {"kept", "finished", "hidden_norms"}
    assert not [name for name in sorted(hooks) if f"`{name}`" not in text.replace(" = True`", "`")]


def test_versions_agree():
    import cvxnn

    assert f"version: {cvxnn.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{cvxnn.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_pictures_are_small():
    for picture in (ROOT / "docs/images").glob("*.png"):
        assert picture.stat().st_size < 150_000
