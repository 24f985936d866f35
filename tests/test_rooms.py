"""The rooms of the package: imports lead down only, no circle ties modules, and nothing lies loose at the top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import esdtool

PACKAGE = Path(esdtool.__file__).parent

# From the ground up; rooms on one floor do not import each other.
FLOORS = (
    {"errors", "_version"},
    {"names", "support"},
    {"checkpoint", "spectra"},
    {"modules"},
    {"analysis"},
    {"assignment", "findings"},
    {"optim"},
    {"train", "integrations"},
    {"comparison"},
    {"report"},
    {"schemas", "cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACADE = "esdtool"
"""The public names, imported on first use: the only place that reaches into rooms above it."""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """The modules of the package that one imports anywhere: at the top, in a function, or for its types."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            # A name that is a module is one; any other comes from the module that is named.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in MODULES else str(node.module) for target in inside]
        else:
            continue
        yield from (target for target in targets if target in MODULES)


IMPORTS = {name: sorted(set(imports(name)) - {name}) for name in MODULES}


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    assert {room(name) for name in MODULES if name != FACADE} == set(FLOOR)


def test_rooms_import_downwards_only() -> None:
    upward = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        if name != FACADE
        for target in targets
        if target != FACADE and room(target) != room(name) and FLOOR[room(target)] >= FLOOR[room(name)]
    ]
    assert upward == []


def test_no_module_but_the_facade_is_imported_through_it() -> None:
    # `from esdtool import X` inside the package would tie every room to every other.
    assert [name for name, targets in IMPORTS.items() if FACADE in targets] == []


def test_no_circle_inside_a_room() -> None:
    # The face of a package hands on names of its modules, which do not need it.
    graph = {
        name: [target for target in targets if not name.startswith(f"{target}.") and target != FACADE]
        for name, targets in IMPORTS.items()
        if name != FACADE
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError("a circle of imports: " + " -> ".join(error.args[1])) from None


def test_nothing_lies_loose_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "_version", "errors", "names"}
