"""What a pickle says, as plain data: nothing that it names is imported, constructed or called.

The opcodes are taken one by one (`pickletools` reads them) and executed on a stack of this module's own. A name stays a
`Named`, a call or an instance a `Made` with its arguments and state. `array` makes a numpy array of what numpy pickled, from
the bytes in it. That is enough for arrays in dicts and in attributes of objects.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.errors import UserError, first_line

MAX_OPCODES = 1 << 16
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_VALUES |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MODULES = ("numpy.core", "numpy._core")  # before and since numpy 2
_FLOATS = ("f2", "f4", "f8")
_MAX_AXES = 4


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(eq=False)
class Made:
    """What calling `what` with `arguments` would have given, and the state it would have been given then."""

    what: Named
    arguments: tuple[Any, ...]
    state: Any = None


class _Refused(ValueError):
    pass


def read_pickle(data: bytes) -> Any:
    """The value of a pickle, of None, bool, int, float, str, bytes, list, tuple, dict (its keys str or int), `Named` and `Made`.

    Work and memory are bounded by the length of `data`. Raises `UserError` for damage, for opcodes that are none of these,
    and for more than `MAX_OPCODES`.
    """
    try:
        return _Machine().run(data)
    # What pickletools and this machine raise for bytes that are no pickle, or one that does what none does.
    except (_Refused, ValueError, LookupError, OverflowError) as error:
        raise UserError(
            f"this is not a pickle that can be read as data: {first_line(error) or type(error).__name__}"
        ) from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise _Refused(f"it has more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                return self.pop()
            self.step(opcode.name, argument)
        raise _Refused("it has no end")

    def pop(self) -> Any:
        # Never below a mark: what is above it belongs together.
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("its stack is empty")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "LIST":
            stack.append(self.since_mark())
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "DICT":
            items = self.since_mark()
            stack.append({})
            self.set_items(items)
        elif name == "APPEND":
            self.append([self.pop()])
        elif name == "APPENDS":
            self.append(self.since_mark())
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.since_mark())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "POP_MARK":
            self.since_mark()
        elif name == "POP":
            self.pop()
        elif name == "DUP":
            value = self.pop()
            stack += [value, value]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            value = self.pop()
            stack.append(value)
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = value
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name == "GLOBAL":
            module, _, function = argument.partition(" ")
            stack.append(Named(module, function))
        elif name == "STACK_GLOBAL":
            function, module = self.pop(), self.pop()
            if not (isinstance(module, str) and isinstance(function, str)):
                raise _Refused("it names something by what is no text")
            stack.append(Named(module, function))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, what = self.pop(), self.pop()
            if not (isinstance(what, Named) and isinstance(arguments, tuple)):
                raise _Refused("it calls something that it does not name")
            stack.append(Made(what, arguments))
        elif name == "BUILD":
            state, value = self.pop(), self.pop()
            if not isinstance(value, Made) or value.state is not None:
                raise _Refused("it changes what is no new object")
            value.state = state
            stack.append(value)
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"it uses the opcode {name}")

    def append(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list):
            raise _Refused("it appends to what is no list")
        target += values
        self.stack.append(target)

    def set_items(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise _Refused("it fills what is no dict")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str | int):
                raise _Refused("it has a dict with keys that are no text")
            target[key] = value
        self.stack.append(target)


def array(value: Any, what: str) -> np.ndarray:
    """A numpy array of floats from what `read_pickle` made of one, float64. `what` it is, for the error.

    Raises `UserError` for anything else: other types, objects, or another number of bytes than the shape says.
    """
    try:
        return _array(value)
    except (_Refused, TypeError, ValueError, LookupError) as error:
        raise UserError(f"{what} is not an array of floats that can be read: {first_line(error)}") from error


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, Made):
        raise _Refused(f"it is a {type(value).__name__}")
    if value.what in [Named(f"{module}.multiarray", "_reconstruct") for module in _MODULES]:
        _, shape, dtype, by_columns, data = value.state
        order = "F" if by_columns else "C"
    elif value.what in [Named(f"{module}.numeric", "_frombuffer") for module in _MODULES]:
        data, dtype, shape, order = value.arguments
    else:
        raise _Refused(f"it is a {value.what.module}.{value.what.name}"[:120])
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_AXES
        or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
    ):
        raise _Refused("its shape is none")
    kind, content = _dtype(dtype), _bytes(data)
    if order not in ("C", "F") or math.prod(shape) * kind.itemsize != len(content):
        raise _Refused(f"it has {len(content)} bytes")
    values: np.ndarray = np.frombuffer(content, kind).astype(np.float64)
    found: np.ndarray = values.reshape(shape) if order == "C" else values.reshape(shape[::-1]).T
    return np.ascontiguousarray(found).reshape(shape)


def _dtype(value: Any) -> np.dtype:
    named = isinstance(value, Made) and value.what == Named("numpy", "dtype") and value.arguments[0] in _FLOATS
    if not named or value.state[1] not in ("<", ">"):
        raise _Refused("its numbers are not of float16, float32 or float64")
    kind: np.dtype = np.dtype(value.state[1] + value.arguments[0])
    return kind


def _bytes(value: Any) -> bytes | bytearray:
    # Before protocol 3 there were no bytes: they are text, to be encoded.
    if isinstance(value, Made) and value.what == Named("_codecs", "encode"):
        text, encoding = value.arguments
        if isinstance(text, str) and encoding == "latin1":
            return text.encode("latin1")
    if not isinstance(value, bytes | bytearray):
        raise _Refused("its numbers are not given as bytes")
    return value
