"""Modules import each other in one direction, inside a package too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imported(tree):
    """Names of our modules that a module needs while it is imported: not what functions or type checkers import."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            yield from ({f"{node.module}.{name.name}" for name in node.names} & FILES.keys()) or {node.module}


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_needs_itself_to_be_imported():
    graph = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for name, path in FILES.items()}
    assert len(graph) > 100
    assert circle(graph) is None


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
