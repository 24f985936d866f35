"""Pickles as plain data: the stream is interpreted here, and nothing that it names is imported, built or called.

A pickle is a program for a small stack machine. `load_plain` runs it over the plain types of Python alone. A global
becomes a `Symbol`, and an object that the pickle asks to be made becomes an `Instance`: the symbol, and the arguments
and the state that are given to it. What these mean is for the caller to decide, by tables of its own.

The standard library and torch interpret such streams too, but trust them: the memo is as long as the stream says,
containers are hashed and printed however much they share, and what is on an allow-list is called with any arguments.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol, cast

MOST_OPERATIONS = 10_000_000
"""Length of a stream in operations. A tensor of a state dict takes about fifty, and each may take a hundred bytes."""

MOST_MARKS = 1000
"""Depth to which tuples, lists and dicts may be nested while they are built."""


LONGEST_NAME = 200
"""Characters of a symbol's name that a message shows."""

MOST_KEY_PARTS = 16


class ByteStream(Protocol):
    """The part of a file that is read."""

    def read(self, count: int, /) -> bytes:
        """Read up to `count` bytes."""
        ...

    def readline(self) -> bytes:
        """Read up to the end of a line."""
        ...


class PickleError(ValueError):
    """A stream that is damaged, or does what plain data do not need. The message names no file."""


class CallsCodeError(PickleError):
    """A stream that names a class or function outside the caller's list, or calls what a call has given."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it calls {what}")
        self.what = what if len(what) <= LONGEST_NAME else f"{what[:LONGEST_NAME]}..."


@dataclass(frozen=True, slots=True)
class Symbol:
    """A class, function or constant that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Instance:
    """An object that a pickle asks to be made, as a record of what it gives for it. Equal to itself alone."""

    symbol: Symbol
    arguments: tuple[Any, ...]
    state: Any = None
    """What `__setstate__` would get, or the attributes by name."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Persistent:
    """A reference to data outside the stream."""

    key: Any


_ORDERED_DICT = Symbol("collections", "OrderedDict")

_VALUES = frozenset(
    {
        "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    }
)  # fmt: skip
"""Operations that push their own argument."""

_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


def load_plain(
    stream: bytes | ByteStream,
    admitted: Collection[Symbol],
    make: Callable[[Symbol, tuple[Any, ...]], Any] = Instance,
    *,
    most_operations: int = MOST_OPERATIONS,
) -> Any:
    """Interpret one pickle; a file is left behind its last byte.

    Args:
        stream: the pickle.
        admitted: what it may name.
        make: what a call of a symbol with arguments becomes; an `Instance` by default.
        most_operations: how long the stream may be.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, `Symbol`, `Instance` and `Persistent`, nested. Members
        may be shared, and lists and dicts may contain themselves. Keys of dicts are scalars, short tuples of scalars,
        `Symbol` or `Instance`. `collections.OrderedDict` is a dict.

    Raises:
        CallsCodeError: if a symbol outside `admitted` is named, or the result of a call is called.
        PickleError: if the stream is damaged, too long, or nested too deeply.
    """
    machine = _Machine(admitted, make)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(cast(Any, stream))):
            if count > most_operations:
                raise PickleError(f"it takes more than {most_operations} operations")
            action = machine.actions.get(operation.name)
            if action is None:
                raise PickleError(f"it uses the operation {operation.name}, which plain data do not need")
            action(argument)
        return machine.result()
    except PickleError:
        raise
    # Arbitrary bytes: a short stack, an unknown operation, text that is no UTF-8, numbers of thousands of digits, ...
    except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError) as error:
        raise PickleError(f"a damaged pickle ({type(error).__name__})") from error


class _Machine:
    """The stack machine."""

    def __init__(self, admitted: Collection[Symbol], make: Callable[[Symbol, tuple[Any, ...]], Any]) -> None:
        self._admitted, self._make_of = admitted, make
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        """The stacks under each open mark."""
        self._memo: dict[int, Any] = {}
        self.actions: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(_VALUES, self._push),
            **dict.fromkeys(_IGNORED, lambda _: None),
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            "MARK": self._mark,
            "POP": self._discard,
            "POP_MARK": self._discard_since_mark,
            "DUP": lambda _: self._stack.append(self._stack[-1]),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "LIST": lambda _: self._push(self._since_mark()),
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._push(tuple(self._since_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "DICT": self._dict,
            "SETITEM": lambda _: self._set_items(self._last(2)),
            "SETITEMS": lambda _: self._set_items(self._since_mark()),
            "PUT": self._remember,
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "MEMOIZE": lambda _: self._remember(len(self._memo)),
            "GET": self._recall,
            "BINGET": self._recall,
            "LONG_BINGET": self._recall,
            "GLOBAL": lambda names: self._symbol(*names.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._symbol(*self._last(2)),
            "REDUCE": self._make,
            "NEWOBJ": self._make,
            "BUILD": self._build,
            "BINPERSID": lambda _: self._push(Persistent(self._stack.pop())),
        }
        """What each operation does with its argument."""

    def result(self) -> Any:
        """The one value that the stream leaves behind."""
        return self._stack.pop()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _discard(self, _: Any) -> None:
        self._stack.pop()

    def _last(self, count: int) -> list[Any]:
        """Take the last values off the stack."""
        values = self._stack[-count:]
        if len(values) < count:
            raise PickleError("a damaged pickle (short stack)")
        del self._stack[-count:]
        return values

    def _mark(self, _: Any) -> None:
        if len(self._below) >= MOST_MARKS:
            raise PickleError(f"nested more than {MOST_MARKS} deep")
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def _discard_since_mark(self, _: Any) -> None:
        self._since_mark()

    def _tuple(self, count: int) -> None:
        self._push(tuple(self._last(count)))

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError("it appends to what is no list")
        target.extend(values)

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self._push({})
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise PickleError("it sets entries of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key):
                raise PickleError(f"a key of type {type(key).__name__}")
            target[key] = value

    def _remember(self, number: int) -> None:
        if not 0 <= number < 2**32:  # larger ones could be chosen such that their hashes collide
            raise PickleError("a memo of more than 2^32 places")
        self._memo[number] = self._stack[-1]

    def _recall(self, number: int) -> None:
        self._push(self._memo[number])

    def _symbol(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError("a name that is no text")
        symbol = Symbol(module, name)
        if symbol not in self._admitted:
            raise CallsCodeError(str(symbol))
        self._push(symbol)

    def _make(self, _: Any) -> None:
        symbol, arguments = self._last(2)
        if type(symbol) is not Symbol or type(arguments) is not tuple:
            raise CallsCodeError("the result of another call")
        if symbol == _ORDERED_DICT:
            if arguments:
                raise PickleError("an OrderedDict with arguments")
            self._push({})
        else:
            self._push(self._make_of(symbol, arguments))

    def _build(self, _: Any) -> None:
        target, state = self._last(2)
        if type(target) is Instance and target.state is None:
            target.state = state
        elif type(target) is not dict:  # a state dict's own attributes are passed over
            raise PickleError("it sets the state of what has none")
        self._push(target)


def _is_key(value: Any) -> bool:
    """Return whether a value's hash takes bounded time: that of a tuple walks its members, even shared ones."""
    if type(value) is tuple:
        return len(value) <= MOST_KEY_PARTS and all(_is_scalar(part) for part in value)
    return type(value) in (Symbol, Instance) or _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**60  # the hashes of larger numbers can be made to collide
    return value is None or type(value) in (str, bytes, bool, float)
