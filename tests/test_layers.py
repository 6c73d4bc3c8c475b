"""Rules about the source itself: imports run one way, nothing trusts remote code by default."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "retort"
FILES = sorted(SOURCE.rglob("*.py"))

# A package may import from a lower rank or from itself.
RANKS = {
    "ops": 1,
    "cache": 2,
    "models": 3,
    "decode": 4,
    "train": 4,
    "distill": 5,
    "pretrain": 5,
    "serve": 5,
    "evaluate": 6,
    "report": 7,
    "batch": 7,
    "bench": 8,
    "cli": 9,
}
BASE = 0  # errors, provenance, manifest, config: importable by all
TOP = 10  # retort/__init__ and __main__, which only name the others


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


def rank(package: str) -> int:
    return TOP if package in ("__init__", "__main__") else RANKS.get(package, BASE)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and package of every import from retort, those inside functions too."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names = [node.module]
            if node.module == "retort":
                names = [f"retort.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("retort."):
                yield node.lineno, name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    own = package_of(path)
    for line, other in imported(ast.parse(path.read_text(encoding="utf-8"))):
        fine = own == other or rank(other) < rank(own) or rank(own) == BASE == rank(other)
        assert fine, f"{path.relative_to(ROOT)}:{line}: {own} must not import {other}"


def test_every_package_has_a_rank_and_stands_in_the_document_of_the_structure():
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(RANKS)
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert all(f"| `retort.{package}` |" in document for package in packages)


def test_the_rule_can_fail():
    tree = ast.parse("def f():\n    from retort.decode.engine import Engine\n")
    assert list(imported(tree)) == [(2, "decode")]
    assert rank("decode") > rank("cache")


@pytest.mark.parametrize("folder", ["src", "bench", "examples", "experiments"])
def test_trust_remote_code_is_never_literally_true(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                literal = isinstance(node.value, ast.Constant) and bool(node.value.value)
                assert not literal, f"{path}:{node.value.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_pickle(path):
    """Our own files are safetensors and JSON."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {"pickle", "dill", "cloudpickle"} & {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("pickle", "dill", "cloudpickle")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_shape_of_the_source(path):
    """No function above 80 lines, no file above 500, a docstring on every public name."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{node.name}: {length} lines"
    for node in public_definitions(tree):
        assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def public_definitions(tree: ast.Module) -> Iterator[ast.AST]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not is_protocol(node):
                yield from (
                    inner
                    for inner in node.body
                    if isinstance(inner, kinds)
                    and not inner.name.startswith("_")
                    and not inner.decorator_list
                    and inner.name != "forward"
                )


def is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
