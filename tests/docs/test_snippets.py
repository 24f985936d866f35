"""Python that the pages show can be pasted: every block compiles as it stands."""

from __future__ import annotations

import ast
import doctest
import textwrap
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, fenced


def source(block: str) -> str:
    """The Python of a block: that of its examples if it is a doctest, and a definition if it is a signature."""
    if block.lstrip().startswith(">>>"):
        return "".join(example.source for example in doctest.DocTestParser().get_examples(block))
    try:
        ast.parse(block)
    except SyntaxError:
        # The reference shows a call as its definition has it, without the word.
        return f"def {block.strip()}: ..."
    return block


def test_lost_indentation_is_found() -> None:
    snippet = "def f():\n    return 1\n\nf()\n"
    compile(source(snippet), "snippet", "exec")
    compile(source("f(a: int, *, b: str = 'c') -> None"), "snippet", "exec")
    compile(source(">>> 1 + 1\n2\n"), "snippet", "exec")
    with pytest.raises(SyntaxError):
        compile(source(snippet.replace("    ", "")), "snippet", "exec")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_compiles(path: Path) -> None:
    for block in fenced(path):
        if block.language == "python":
            compile(source(textwrap.dedent(block.text)), path.name, "exec")
