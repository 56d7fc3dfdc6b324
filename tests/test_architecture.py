"""The house rules of docs/architecture.md, read off the sources with the stdlib's `ast`."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STOREYS = {"errors": -2, "files": -1, "ops": 0, "model": 1, "text": 1, "inference": 2, "hf": 3}
STOREYS |= dict.fromkeys(("training", "evaluation", "analysis", "serving"), 4) | {"cli": 5}


def read_sources() -> dict[str, str]:
    """Module name → source, `hymba.model` standing for hymba/model/__init__.py."""
    files = (ROOT / "src/hymba").rglob("*.py")
    names = {file: ".".join(file.relative_to(ROOT / "src").with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file.read_text() for file, name in names.items()}


def imports(node: ast.AST, known: dict[str, str], everywhere: bool) -> Iterator[str]:
    """Modules of this package that `node` imports; bodies of functions too if `everywhere`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "hymba")
        elif isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "hymba":
            full = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in known else str(child.module) for name in full)
        elif everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, known, everywhere)


def storey_violations(sources: dict[str, str]) -> Iterator[str]:
    """Imports that go up or sideways, relative imports, unknown rooms, and import rings."""
    graph = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        graph[name] = set(imports(tree, sources, everywhere=False))
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):
            yield f"{name}: relative import"
        for target in imports(tree, sources, everywhere=True) if "." in name else ():
            here, there = name.split(".")[1], [*target.split("."), ""][1]
            if here not in STOREYS or there not in STOREYS:
                yield f"{name}: {here} → {there or 'hymba'} is on no storey"
            elif here != there and STOREYS[there] >= STOREYS[here]:
                yield f"{name}: {here} imports {there}"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as ring:
        yield "ring: " + " → ".join(ring.args[1])


def size_violations(sources: dict[str, str]) -> Iterator[str]:
    """Files over 400 lines (600 for kernels), functions over 40 lines beside their docstring."""
    for name, source in sources.items():
        if len(source.splitlines()) > (600 if name.startswith("hymba.ops") else 400):
            yield f"{name}: {len(source.splitlines())} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                skip = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
                if (node.end_lineno or 0) - (skip or 0) > 40:
                    yield f"{name}.{node.name}: over 40 lines"


def test_imports_only_go_down() -> None:
    assert list(storey_violations(read_sources())) == []


def test_files_and_functions_stay_short() -> None:
    assert list(size_violations(read_sources())) == []


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"hymba.ops.scan": "from hymba.model import Hymba"}, "hymba.ops.scan: ops imports model"),
        (
            {"hymba.text.chat": "def f():\n    import hymba.model.cache"},
            "hymba.text.chat: text imports model",
        ),
        ({"hymba.cli": "from hymba import load"}, "hymba.cli: cli → hymba is on no storey"),
        ({"hymba.model.cache": "from . import config"}, "hymba.model.cache: relative import"),
        ({"hymba.ops": "from hymba.ops.a import f", "hymba.ops.a": "import hymba.ops"}, "ring: "),
        ({"hymba.shed": "import hymba.ops"}, "hymba.shed: shed → ops is on no storey"),
    ],
)
def test_the_rules_catch_a_violation(sources: dict[str, str], complaint: str) -> None:
    assert any(line.startswith(complaint) for line in storey_violations(sources))


def test_the_rules_allow_going_down_and_catch_length() -> None:
    lazy = {"hymba.model.a": "import hymba.model.b", "hymba.model.b": "def f():\n    import hymba.model.a"}
    assert list(storey_violations(lazy | {"hymba.hf": "from hymba.inference import generate"})) == []
    assert list(size_violations({"hymba.cli": "def f():\n" + "    x = 1\n" * 41})) == ["hymba.cli.f: over 40 lines"]
    assert list(size_violations({"hymba.cli": "x = 1\n" * 401, "hymba.ops.a": "x = 1\n" * 600})) == [
        "hymba.cli: 401 lines"
    ]
