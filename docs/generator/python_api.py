"""Make the reference of the Python API from signatures and docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import esdtool
from generator.attributes import attribute_docs
from generator.markdown import NOTICE, cell, code, table

INTRODUCTION = """# Python

```python
import esdtool
```

The import is quick, because each name is loaded on first use. Every error that a user can cause is an
`esdtool.EsdtoolError`.
"""

_SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)
_WORDS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises"}


def page() -> str:
    """Return the whole page."""
    text = [NOTICE, INTRODUCTION]
    for name in esdtool.__all__:
        if name != "__version__":
            text.append(_entry(f"esdtool.{name}", getattr(esdtool, name)))
    text.append("\n# Integrations\n\nHooks into trainers; each imports the trainer's library.\n")
    text += [_integration(*each) for each in INTEGRATIONS]
    return "".join(text).rstrip("\n") + "\n"


INTEGRATIONS = (
    ("transformers", "use_alpha_decay"),
    ("transformers", "use_layerwise_lr"),
    ("transformers", "use_assignment"),
    ("lightning", "AlphaDecayCallback"),
    ("lightning", "LayerwiseLRCallback"),
)


def _integration(module: str, name: str) -> str:
    """Describe a hook from its source, because importing a trainer takes seconds and it may not be installed."""
    source = Path(esdtool.__file__).parent / "integrations" / f"{module}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if getattr(node, "name", None) == name)
    assert isinstance(found, ast.FunctionDef | ast.ClassDef)
    call = ""
    if isinstance(found, ast.FunctionDef):
        result = f" -> {ast.unparse(found.returns)}" if found.returns and ast.unparse(found.returns) != "None" else ""
        call = f"```python\n{name}({ast.unparse(found.args)}){result}\n```\n\n"
    return f"\n## esdtool.integrations.{module}.{name}\n\n{call}{_prose(ast.get_docstring(found) or '')}\n"


def _entry(name: str, thing: Any) -> str:
    short = name.rpartition(".")[2]
    if not inspect.isclass(thing):
        return f"\n## {name}\n\n```python\n{_signature(short, thing)}\n```\n\n{_prose(inspect.getdoc(thing) or '')}\n"
    has_fields = issubclass(thing, BaseModel) or hasattr(thing, "__dataclass_fields__")
    text = f"\n## {name}\n\n"
    if not has_fields and not issubclass(thing, Exception):
        text += f"```python\n{_signature(short, thing)}\n```\n\n"
    text += _prose(inspect.getdoc(thing) or "") + "\n"
    if has_fields:
        text += "\n" + table(["field", ""], [[code(field), cell(words)] for field, words in _fields(thing).items()])
    for method, value in _members(thing).items():
        if method.startswith(("_", "model_")) or not (value_doc := _documented(value)):
            continue
        if isinstance(value, property):
            text += f"\n### {short}.{method}\n\n{value_doc}\n"
        else:
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            text += f"\n### {short}.{method}\n\n```python\n{_signature(method, function)}\n```\n\n{_prose(value_doc)}\n"
    return text


def _members(thing: type) -> dict[str, Any]:
    """Return what a class of esdtool defines, its own before what it inherits from others of esdtool."""
    found: dict[str, Any] = {}
    for kind in thing.__mro__:
        if kind.__module__.partition(".")[0] == "esdtool":
            found = {**found, **{name: value for name, value in vars(kind).items() if name not in found}}
    return found


def _fields(thing: Any) -> dict[str, str]:
    if issubclass(thing, BaseModel):
        return {name: field.description or "" for name, field in thing.model_fields.items()}
    return attribute_docs(thing)


def _documented(value: Any) -> str:
    if isinstance(value, property):
        return inspect.getdoc(value.fget) or ""
    if isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
        return inspect.getdoc(value) or ""
    return ""


def _signature(name: str, thing: Any) -> str:
    """Format a call as in the source, with one parameter per line if it is long."""
    signature = inspect.signature(thing)
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    shown = []
    star = False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not star:
            shown.append("*")
        star = star or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        shown.append(_parameter(each))
    result = signature.return_annotation
    arrow = "" if result in (inspect.Signature.empty, "None", None) or inspect.isclass(thing) else f" -> {result}"
    one_line = f"{name}({', '.join(shown)}){arrow}"
    return one_line if len(one_line) <= 100 else f"{name}(\n    " + ",\n    ".join(shown) + f",\n){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    """Format a parameter as in the source. Annotations are strings here, which `str` would quote."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}"
    empty = inspect.Parameter.empty
    if parameter.annotation is not empty:
        text += f": {parameter.annotation}"
    return text if parameter.default is empty else f"{text} = {parameter.default!r}"


def _prose(doc: str) -> str:
    """Render a docstring as Markdown: its sections as lists, its examples as code."""
    parts = _SECTION.split(doc)
    text = [_body(parts[0])]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        text.append(f"**{_WORDS[title]}**\n\n{_items(inspect.cleandoc(body), plain=title == 'Returns')}")
    return "\n\n".join(part.strip("\n") for part in text)


def _body(text: str) -> str:
    """Render paragraphs; indented ones and doctests are code, and consecutive ones are one example."""
    shown: list[tuple[bool, str]] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        is_code = block.startswith(">>>") or all(line.startswith("    ") for line in block.splitlines())
        words = textwrap.dedent(block) if is_code else _plain(block)
        if is_code and shown and shown[-1][0]:
            before = shown.pop()[1]
            # As ruff formats it: two empty lines after a definition.
            gap = "\n\n\n" if before.splitlines()[-1].startswith(" ") else "\n\n"
            words = f"{before}{gap}{words}"
        shown.append((is_code, words))
    return "\n\n".join(f"```python\n{words}\n```" if is_code else words for is_code, words in shown)


def _items(text: str, *, plain: bool) -> str:
    if plain:
        return _plain(text)
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line.strip())
    found = [re.fullmatch(r"(\S+): (.*)", item, flags=re.DOTALL) for item in items]
    return "\n".join(
        f"- `{match[1]}`: {_plain(match[2])}" if match else f"- {_plain(item)}"
        for item, match in zip(items, found, strict=True)
    )


def _plain(text: str) -> str:
    """Escape the underscores and angle brackets outside code, which Markdown would interpret."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([_<])", r"\\\1", piece) for piece in pieces)
