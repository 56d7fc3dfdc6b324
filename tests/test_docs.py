"""The documents keep up with the code: names, links, and nothing left unfinished."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from hymba.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ["", "ops", "model", "text", "inference", "hf", "training", "evaluation", "serving"]
# Letters in brackets keep these patterns from finding themselves.
UNFINISHED = (
    r"TO[D]O|FIX[M]E|XX[X]|raise NotImplemente[d]Error|"
    r"pytest\.mark\.(?:ski[p]|xfai[l])|for no[w]\b|placeholde[r]"
)
ONE_MACHINE = r"/wor[k]/|/tm[p]/[a-z]|/roo[t]/|/op[t]/wheels"


def public_names(room: str) -> list[str]:
    """The literal `__all__` of a package, read without importing it."""
    for node in ast.parse((ROOT / "src/hymba" / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_documented(room: str) -> None:
    names, text = public_names(room), "\n".join(document.read_text() for document in DOCUMENTS)
    assert names, f"hymba.{room} has no __all__"
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == []


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    for name, command in get_command(app).commands.items():
        assert f"## `hymba {name}" in page
        options = [option for parameter in command.params for option in parameter.opts if option[:2] == "--"]
        assert [option for option in options if option not in page] == []


EXAMPLES = [
    pytest.param(code, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str) -> None:
    """Each on its own, the bundled model standing where a path is asked for."""
    exec(re.sub(r'"path/to/\w+"', repr(str(ROOT / "src/hymba/assets/tiny")), code), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_nothing_unfinished_and_no_paths_of_one_machine() -> None:
    folders = ("src", "tests", "docs", "recipes", "examples", "benchmarks", "experiments", ".ci")
    files = [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        *(file for name in folders for file in (ROOT / name).rglob("*")),
    ]
    kinds = {".py", ".cpp", ".md", ".toml", ".yaml", ".sh", ".txt", ""}
    texts = {file: file.read_text() for file in files if file.is_file() and file.suffix in kinds}
    found = {str(file): re.findall(f"{UNFINISHED}|{ONE_MACHINE}", text) for file, text in texts.items()}
    assert {file: marks for file, marks in found.items() if marks} == {}
