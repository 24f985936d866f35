"""Docstrings are sentences: they end as one, they stand alone, and they use plain words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import esdtool

PACKAGE = Path(esdtool.__file__).parent

# A docstring that begins so continues the name of what it describes, instead of saying what that is or does.
FRAGMENTS = ("Of", "Those", "That", "As", "See", "Its", "Their")
# Clauses that describe a value: fine under an attribute, but a module, a class or a function needs a sentence.
CLAUSES = ("What", "Which", "Where", "When", "How", "Why", "Whether", "If")
QUAINT = re.compile(
    r"\b(anew|lest|dearest|thereof|whereof|wherein|hitherto|henceforth|albeit|amongst|whilst|of old)\b", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """A text of the source, and what it describes."""

    where: str
    kind: str
    text: str

    @property
    def opening(self) -> str:
        return " ".join(self.text.strip().split("\n\n")[0].split())


def docstrings(path: Path) -> Iterator[Docstring]:
    """The docstrings of a file, and the texts under its attributes and constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            line = 1 if isinstance(node, ast.Module) else node.lineno
            if text:
                yield Docstring(where=f"{name}:{line}", kind=kind_of(node), text=text)
            for field, below in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.Assign | ast.AnnAssign)
                    and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                    and isinstance(below.value.value, str)
                ):
                    yield Docstring(where=f"{name}:{below.lineno}", kind="attribute", text=below.value.value)


def kind_of(node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return type(node).__name__
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    return "attribute" if decorators & {"property", "cached_property", "functools.cached_property"} else "function"


def faults(docstring: Docstring) -> list[str]:
    opening = docstring.opening
    first = opening.split()[0]
    found = []
    if not opening.endswith((".", ":", "?")):
        found.append("does not end as a sentence")
    if first in FRAGMENTS or (first in CLAUSES and docstring.kind != "attribute"):
        found.append(f"begins as a fragment: {first!r}")
    if first[0].islower() and docstring.kind != "attribute":  # there it may be a formula
        found.append("begins with a small letter")
    found += [f"quaint: {word!r}" for word in QUAINT.findall(docstring.text)]
    return found


def test_the_rules_see_what_they_should() -> None:
    def found(text: str, kind: str = "function") -> list[str]:
        return faults(Docstring(where="", kind=kind, text=text))

    assert found("Return the spectrum of a matrix.\n\nArgs: ...") == []
    assert found("Whether the matrix is square.", "attribute") == []
    assert found("What the matrix is.", "Module") == ["begins as a fragment: 'What'"]
    assert found("Whether the matrix is square.") == ["begins as a fragment: 'Whether'"]
    assert found("Of the module.") == ["begins as a fragment: 'Of'"]
    assert found("Those that are known.", "attribute") == ["begins as a fragment: 'Those'"]
    assert found("See `Policy`.") == ["begins as a fragment: 'See'"]
    assert found("Return the spectrum") == ["does not end as a sentence"]
    assert found("Compute the list anew.") == ["quaint: 'anew'"]


ROOMS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_are_sentences(room: str) -> None:
    top = PACKAGE / room
    paths = [top] if top.is_file() else sorted(top.rglob("*.py"))
    assert paths
    wrong = [
        f"{docstring.where}: {docstring.opening!r} {fault}"
        for path in paths
        for docstring in docstrings(path)
        for fault in faults(docstring)
    ]
    assert wrong == []
