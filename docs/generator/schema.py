"""Describe JSON Schemas in words, for the references of the configuration and of the files."""

from __future__ import annotations

from typing import Any

from generator.markdown import cell, code, table

Schema = dict[str, Any]


def parts(schema: Schema) -> list[tuple[str, Schema]]:
    """Return the objects of a schema, each after the first that refers to it."""
    found: dict[str, Schema] = {}

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found[name] = schema["$defs"][name]
                visit(found[name])
            for key, value in node.items():
                if key != "$defs":
                    visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(schema)
    return list(found.items())


def definition(schema: Schema, reference: Schema) -> Schema | None:
    """Return the object to which a property refers, directly, in a list or as one of several types, or None."""
    for part in [reference, *reference.get("anyOf", []), *reference.get("allOf", [])]:
        for candidate in (part, part.get("items", {}), part.get("additionalProperties", {})):
            if isinstance(candidate, dict):
                for target in [candidate, *candidate.get("anyOf", [])]:
                    if "$ref" in target:
                        return schema["$defs"][target["$ref"].rsplit("/", 1)[1]]
    return None


def resolve(schema: Schema, reference: Schema) -> Schema:
    """Return the object of a plain reference."""
    found: Schema = schema["$defs"][reference["$ref"].rsplit("/", 1)[1]]
    return found


def type_words(schema: Schema, prop: Schema) -> str:
    """Describe the type of a property in a few words.

    >>> type_words({}, {"anyOf": [{"type": "number"}, {"type": "null"}]})
    'number or null'
    """
    if "$ref" in prop:
        return str(schema["$defs"][prop["$ref"].rsplit("/", 1)[1]].get("title", "object"))
    if "enum" in prop:
        return ", ".join(_value(value) for value in prop["enum"])
    if "const" in prop:
        return _value(prop["const"])
    if "anyOf" in prop:
        words = [type_words(schema, part) for part in prop["anyOf"]]
        return " or ".join(dict.fromkeys(words))
    kind = prop.get("type", "any")
    if kind == "array":
        items = prop.get("prefixItems")
        if items:
            return f"{len(items)} x {type_words(schema, items[0])}"
        return f"list of {type_words(schema, prop.get('items', {}))}"
    if kind == "object" and isinstance(prop.get("additionalProperties"), dict):
        return f"name to {type_words(schema, prop['additionalProperties'])}"
    return str(kind) + _bounds(prop)


def fields(schema: Schema, part: Schema, *, defaults: bool, head: str) -> str:
    """Make a table of the properties of an object."""
    rows = []
    for name, prop in part.get("properties", {}).items():
        row = [code(name), cell(type_words(schema, prop))]
        if defaults:
            default = prop.get("default")
            row.append("" if default is None else code(cell(_value(default).strip("`"))))
        rows.append([*row, cell(prop.get("description", ""))])
    return table([head, "type", *(["default"] if defaults else []), ""], rows)


def _bounds(prop: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    # An exact power of two as bound is the width of an integer, not something that a reader chooses.
    found = [f"{sign} {prop[key]:g}" for key, sign in signs.items() if key in prop and prop[key] < 2**53]
    return f" {', '.join(found)}" if found else ""


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
