"""Mutations: of bytes, of JSON and TOML, of ZIP archives and of pickles."""

from __future__ import annotations

import io
import json
import pickletools
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

from tests.fuzz.sandbox import DECOY

Mutation = Callable[[bytes, random.Random], bytes]

INTEGERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)

STRINGS = (
    "",
    ".",
    "..",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "a/b\\c",
    ".".join("a" * 4000),
    "x" * 70_000,
    "\x1b[2J\x1b]52;c;aGk=\x07\x1b[31m",
    "\x00",
    "\r\nesdtool: error: forged",
    "\u202egnp.exe",
    "\ud800",
    "[red]markup[/red] {0.__class__} %s %(x)n",
    "(a+)+$",
    "(((((((((((((((((((((((((((((",
    f"{DECOY}.run",
    "os.system",
    "__import__('os').system('true')",
    "F64",
    "Q4_K",
    "layers.0.mlp.up_proj.weight",
    "layers.99999999999999999999.mlp.up_proj.weight",
    "9" * 5000,
    "NaN",
)


def nasty(source: random.Random) -> Any:
    """Draw a JSON value that a careless reader trips over."""
    return source.choice(
        (
            *STRINGS,
            None,
            True,
            False,
            0,
            -1,
            1.5,
            2**31,
            2**63,
            2**64,
            10**30,
            1e308,
            float("nan"),
            float("inf"),
            [],
            {},
            [[]],
            [0] * 3000,
            {"": {}},
            {"a": {"b": {"c": [1]}}},
        )
    )


def flip(data: bytes, source: random.Random) -> bytes:
    """Flip some bits."""
    found = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 8, 40))):
        if found:
            found[source.randrange(len(found))] ^= 1 << source.randrange(8)
    return bytes(found)


def cut(data: bytes, source: random.Random) -> bytes:
    """Truncate."""
    return data[: source.randrange(len(data) + 1)]


def grow(data: bytes, source: random.Random) -> bytes:
    """Insert a copy of a part, or zeros."""
    start = source.randrange(len(data) + 1)
    piece = data[start : start + source.choice((1, 8, 100))] or b"\0"
    where = source.randrange(len(data) + 1)
    return data[:where] + (piece if source.random() < 0.7 else bytes(source.choice((1, 7, 4096)))) + data[where:]


def drop(data: bytes, source: random.Random) -> bytes:
    """Remove a part."""
    start = source.randrange(len(data) + 1)
    return data[:start] + data[start + source.choice((1, 4, 8, 64)) :]


def field(data: bytes, source: random.Random) -> bytes:
    """Overwrite what may be an integer field, more often near the front, where the headers are."""
    form = source.choice(["<B", "<H", "<I", "<Q", "<q", ">I", ">Q"])
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    last = len(data) - size
    where = source.randint(0, min(last, source.choice((16, 200, 2000, last))))
    value = source.choice(INTEGERS) % 2 ** (8 * size)
    if form.endswith("q"):
        value -= 2**63
    return data[:where] + struct.pack(form, value) + data[where + size :]


RAW: tuple[Mutation, ...] = (flip, flip, cut, grow, drop, field, field, field)


def any_of(*mutations: Mutation, rounds: int = 3) -> Mutation:
    """Make a mutation that applies one to `rounds` of several."""

    def mutate(data: bytes, source: random.Random) -> bytes:
        for _ in range(source.randint(1, rounds)):
            data = source.choice(mutations)(data, source)
        return data

    return mutate


raw = any_of(*RAW)


def json_text(data: bytes, source: random.Random) -> bytes:
    """Mutate JSON as a tree, and at times as text."""
    if source.random() < 0.15:
        return raw(data, source)
    tree = json.loads(data)
    for _ in range(source.randint(1, 3)):
        tree = _change(tree, source)
    text = json.dumps(tree)
    shape = source.random()
    if shape < 0.06:
        text = _spliced(text, "[" * 100_000 + "]" * 100_000, source)
    elif shape < 0.1:
        text = _spliced(text, '{"a":' * 30_000 + "1" + "}" * 30_000, source)
    elif shape < 0.14:
        text = _spliced(text, "1" * source.choice((400, 5000)), source)
    elif shape < 0.17:
        text = "\ufeff" + text
    elif shape < 0.2:
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1).replace('"twice": 2, }', '"twice": 2}', 1)
    return text.encode("utf-8", errors="surrogatepass")


def _spliced(text: str, value: str, source: random.Random) -> str:
    """Put a value in the place of a number."""
    numbers = list(re.finditer(r"(?<=[:\[ ])\d+(?:\.\d+)?(?=[,\]}])", text))
    if not numbers:
        return value
    number = source.choice(numbers)
    return text[: number.start()] + value + text[number.end() :]


def _change(tree: Any, source: random.Random) -> Any:
    """Replace, delete, rename or double one node at random."""
    places = list(_places(tree))
    if not places:
        return nasty(source)
    holder, key = source.choice(places)
    kind = source.random()
    if kind < 0.55:
        value = holder[key]
        number = isinstance(value, int | float) and not isinstance(value, bool) and source.random() < 0.6
        holder[key] = source.choice((*INTEGERS, -1, -(2**63), value + 1, value * 1000)) if number else nasty(source)
    elif kind < 0.7:
        del holder[key]
    elif isinstance(holder, dict):
        name = source.choice(STRINGS) if source.random() < 0.7 else source.choice([place[1] for place in places])
        holder[str(name)] = holder[key] if kind > 0.8 else holder.pop(key)
    else:
        holder.insert(key, holder[key])
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def toml_text(data: bytes, source: random.Random) -> bytes:
    """Replace values, keys and headings of a TOML file."""
    if source.random() < 0.2:
        return raw(data, source)
    lines = data.decode().splitlines()
    for _ in range(source.randint(1, 3)):
        where = source.randrange(len(lines))
        key, equals, _value = lines[where].partition("=")
        value = nasty(source)
        written = json.dumps(value).replace("null", "inf").replace("NaN", "nan").replace("Infinity", "inf")
        if source.random() < 0.05:
            written = "[" * 20_000 + "]" * 20_000
        if source.random() < 0.05:
            written = source.choice(("1" * 5000, "1e99999", "0x" + "f" * 3000, "1979-05-27T07:32:00Z"))
        if equals and source.random() < 0.8:
            lines[where] = f"{key}= {written}"
        elif equals:
            lines[where] = f"{json.dumps(source.choice(STRINGS))} = {written}"
        else:
            lines[where] = source.choice((lines[where] * 2, "[a.b.c]", f"[{json.dumps(source.choice(STRINGS))}]", ""))
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


def safetensors(data: bytes, source: random.Random) -> bytes:
    """Mutate the header of a safetensors file and keep its length right, or the bytes."""
    if source.random() < 0.3:
        return raw(data, source)
    (length,) = struct.unpack("<Q", data[:8])
    header = json_text(data[8 : 8 + length], source)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def pickled(data: bytes, source: random.Random) -> bytes:
    """Mutate a pickle opcode by opcode."""
    if source.random() < 0.25:
        return raw(data, source)
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except Exception:
        return raw(data, source)
    operations = [data[low:high] for low, high in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(source.randint(1, 3)):
        where = source.randrange(len(operations))
        kind = source.random()
        if kind < 0.3:
            operations[where] = source.choice(_OPERATIONS)
        elif kind < 0.55:
            operations.insert(where, source.choice(_OPERATIONS))
        elif kind < 0.7:
            del operations[where]
        elif kind < 0.85:
            operations.insert(where, source.choice(operations))
        else:
            other = source.randrange(len(operations))
            operations[where], operations[other] = operations[other], operations[where]
        operations = operations or [b"."]
    return b"".join(operations)


def _unicode(text: str) -> bytes:
    encoded = text.encode("utf-8", errors="surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


_OPERATIONS = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n",
    f"c{DECOY}\nrun\n".encode(),
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.serialization\n_get_layout\n",
    b"ctorch\nload\n",
    b"ccollections\nOrderedDict\n",
    b"R",
    b"b",
    b"\x81",
    b"\x92",
    b"\x93",
    b"Q",
    b"i" + b"os\nsystem\n",
    b"(",
    b"t",
    b"l",
    b"d",
    b"0",
    b"2",
    b"\x85",
    b"}",
    b"]",
    b"s",
    b"u",
    b"e",
    b"a",
    b"q\x00",
    b"h\x00",
    b"j\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"\x94",
    b"I99999999999999999999\n",
    b"L" + b"9" * 6000 + b"L\n",
    b"\x8a\xff" + b"\xff" * 255,
    b"\x8b\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"K\x00",
    b"M\xff\xff",
    b"G\x7f\xf8\0\0\0\0\0\0",
    b"N",
    b"\x88",
    b"C\x03abc",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x80\x09",
    b".",
    *map(_unicode, STRINGS),
)


def archive(inner: Mutation, chosen: str) -> Mutation:
    """Make a mutation of a ZIP archive.

    Args:
        inner: mutation of the members that matter.
        chosen: regular expression of their names.
    """

    def mutate(data: bytes, source: random.Random) -> bytes:
        kind = source.random()
        if kind < 0.25:
            return raw(data, source)
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(info.filename, old.read(info)) for info in old.infolist()]
        wanted = [index for index, (name, _) in enumerate(members) if re.search(chosen, name)]
        where = source.choice(wanted) if wanted and kind < 0.8 else source.randrange(len(members))
        name, content = members[where]
        if kind < 0.8:
            members[where] = name, inner(content, source) if where in wanted else raw(content, source)
        elif kind < 0.85:
            del members[where]
        elif kind < 0.9:
            members.append(source.choice(members))
        elif kind < 0.95:
            members[where] = source.choice(STRINGS).replace("\ud800", "")[:60_000] or "x", content
        else:
            members[where] = name, bytes(20_000_000)  # deflates to 20 KB
        made = io.BytesIO()
        method = source.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two members of one name
            with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if kind >= 0.95 else method) as new:
                for name, content in members:
                    new.writestr(name, content)
        return made.getvalue()

    return mutate
