# SPDX-License-Identifier: Apache-2.0
"""The pickle in a file of torch.save, read without torch and without pickle: nothing in it is ever run.

A pickle is a program (CPython's Lib/pickletools.py describes each opcode). This reader carries out those
that build plain values, and calls only what torch_globals.py has. Any other name, and any opcode that
could reach one, ends in `UnsupportedFormat`.

Size, number of opcodes and numbers are bounded. No tuple becomes a key: CPython hashes nested ones by
recursion without a limit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from ..errors import FormatError
from .base import damaged, unsupported
from .torch_globals import (
    REMEDY,
    Function,
    NumpyDtype,
    Refused,
    Storage,
    StorageType,
    Tensor,
    Unsupported,
    check_arguments,
    resolve,
    set_item,
)

MAX_PICKLE: Final = 64 << 20
_MAX_OPCODES: Final = 8_000_000
_MAX_LINE: Final = 1024
_MAX_INT: Final = 1024  # bytes
_FIELD: Final = "data.pkl"


def read_pickle(url: str, data: bytes) -> Any:
    """The object: dict, list, tuple, scalars, `Tensor`, `Text`. Sets are lists.

    Raises `FormatError`, and `UnsupportedFormat` for what state dicts do not hold.
    """
    if len(data) > MAX_PICKLE:
        raise damaged(url, _FIELD, f"has {len(data)} bytes (the limit is {MAX_PICKLE})")
    machine = _Machine(data)
    try:
        return machine.run()
    except Unsupported as error:
        found, advice = error.args
        raise unsupported(url, _FIELD, found, advice) from None
    except Refused as error:
        raise _damaged(url, machine, str(error)) from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        # An opcode found another number or kind of things than it takes.
        raise _damaged(url, machine, f"{type(error).__name__}: {str(error)[:200]}") from None


def _damaged(url: str, machine: _Machine, what: str) -> FormatError:
    return damaged(url, _FIELD, f"is no pickle of a state dict at byte {machine.position} ({what})")


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, handlers = self._data, _HANDLERS
        for _ in range(_MAX_OPCODES):
            if self.position >= len(data):
                raise Refused("it ends before its STOP")
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                (value,) = self._stack
                return value
            handler = handlers.get(code)
            if handler is None:
                known = _REFUSED.get(code)
                if known is not None:
                    raise Unsupported(f"uses {known}, which state dicts do not need", REMEDY)
                raise Refused(f"opcode {code:#04x}")
            handler(self)
        raise Refused(f"more than {_MAX_OPCODES} opcodes")

    def _take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._data):
            raise Refused(f"{length} bytes are to follow, which it has not")
        data = self._data[self.position : end]
        self.position = end
        return data

    def _byte(self) -> int:
        value = self._data[self.position]  # half of all opcodes take one, so no slice is made of it
        self.position += 1
        return value

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _signed(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little", signed=True)

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise Refused("a line without end")
        line = self._data[self.position : end].decode("utf-8")
        self.position = end + 1
        return line

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    # Opcodes, by pickletools' names.

    def proto(self) -> None:
        version = self._byte()
        if version > 5:
            raise Unsupported(f"is of pickle protocol {version}", "save it with pickle_protocol=2")

    def frame(self) -> None:
        self._take(8)

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def int_line(self) -> None:
        line = self._line()
        self._push({"00": False, "01": True}.get(line, int(line)))

    def long_line(self) -> None:
        self._push(int(self._line().removesuffix("L")))

    def float_line(self) -> None:
        self._push(float(self._line()))

    def long1(self) -> None:
        self._push(self._signed(self._byte()))

    def long4(self) -> None:
        length = self._signed(4)
        if not 0 <= length <= _MAX_INT:
            raise Refused(f"a number of {length} bytes")
        self._push(self._signed(length))

    def binfloat(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def unicode_line(self) -> None:
        text = self._line().encode("ascii").decode("raw_unicode_escape")
        text.encode("utf-8")  # an escape can say what no name may hold
        self._push(text)

    def tuple_mark(self) -> None:
        items = self._pop_mark()
        self._push(tuple(items))

    def tuple_last(self, count: int) -> None:
        if len(self._stack) < count:
            raise Refused("a tuple of more than there is")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def list_mark(self) -> None:
        self._push(self._pop_mark())

    def dict_mark(self) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise Refused("items for something else than a list")
        self._stack[-1].extend(items)

    def setitem(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        set_item(self._stack[-1], key, value)

    def setitems(self) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise Refused("a key without a value")
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(target, key, value)

    def get(self, number: int) -> None:
        self._push(self._memo[number])

    def put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def global_line(self) -> None:
        module = self._line()
        self._push(resolve(module, self._line()))

    def stack_global(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        self._push(resolve(module, name))

    def inst(self) -> None:
        module = self._line()
        resolve(module, self._line())
        raise Unsupported("uses INST, which state dicts do not need", REMEDY)

    def reduce(self) -> None:
        arguments = check_arguments(self._stack.pop())
        function = self._stack.pop()
        if not isinstance(function, Function):
            raise Refused("something is called that is no function")
        self._push(function.call(*arguments))

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, NumpyDtype):
            target.build(state)
        elif type(target) is not dict and not isinstance(target, Tensor):  # theirs are attributes
            raise Refused("attributes of something that has none")

    def binpersid(self) -> None:
        identity = self._stack.pop()
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise Refused("a reference to something else than a storage")
        _, kind, key, _, numel = identity
        if (
            not isinstance(kind, StorageType)
            or not isinstance(key, str)
            or type(numel) is not int
            or numel < 0
        ):
            raise Refused("a storage of an impossible type, key or size")
        self._push(Storage(key, kind.dtype, numel))


def _text(width: int) -> Callable[[_Machine], None]:
    return lambda m: m._push(m._take(m._unsigned(width)).decode("utf-8"))


def _bytes(width: int) -> Callable[[_Machine], None]:
    return lambda m: m._push(m._take(m._unsigned(width)))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m._push(value)


_HANDLERS: Final[dict[int, Callable[[_Machine], None]]] = {
    ord(code): handler
    for code, handler in {
        "\x80": _Machine.proto,
        "\x95": _Machine.frame,
        "(": _Machine.mark,
        "0": _Machine.pop,
        "1": lambda m: (m._pop_mark(), None)[1],
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        "I": _Machine.int_line,
        "L": _Machine.long_line,
        "F": _Machine.float_line,
        "J": lambda m: m._push(m._signed(4)),
        "K": lambda m: m._push(m._byte()),
        "M": lambda m: m._push(m._unsigned(2)),
        "\x8a": _Machine.long1,
        "\x8b": _Machine.long4,
        "G": _Machine.binfloat,
        "V": _Machine.unicode_line,
        "X": _text(4),
        "\x8c": _text(1),
        "\x8d": _text(8),
        "B": _bytes(4),
        "C": _bytes(1),
        "\x8e": _bytes(8),
        "\x96": _bytes(8),
        ")": _constant(()),
        "t": _Machine.tuple_mark,
        "\x85": lambda m: m.tuple_last(1),
        "\x86": lambda m: m.tuple_last(2),
        "\x87": lambda m: m.tuple_last(3),
        "]": lambda m: m._push([]),
        "\x8f": lambda m: m._push([]),  # a set
        "l": _Machine.list_mark,
        "\x91": _Machine.list_mark,  # a frozenset
        "}": lambda m: m._push({}),
        "d": _Machine.dict_mark,
        "a": _Machine.append,
        "e": _Machine.appends,
        "\x90": _Machine.appends,  # to a set
        "s": _Machine.setitem,
        "u": _Machine.setitems,
        "g": lambda m: m.get(int(m._line())),
        "h": lambda m: m.get(m._byte()),
        "j": lambda m: m.get(m._unsigned(4)),
        "p": lambda m: m.put(int(m._line())),
        "q": lambda m: m.put(m._byte()),
        "r": lambda m: m.put(m._unsigned(4)),
        "\x94": _Machine.memoize,
        "c": _Machine.global_line,
        "\x93": _Machine.stack_global,
        "i": _Machine.inst,
        "R": _Machine.reduce,
        "\x81": _Machine.reduce,  # NEWOBJ: of what is known here it means the same
        "b": _Machine.build,
        "Q": _Machine.binpersid,
    }.items()
}
_REFUSED: Final = {
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    0x82: "EXT1, the extension registry",
    0x83: "EXT2, the extension registry",
    0x84: "EXT4, the extension registry",
    0x92: "NEWOBJ_EX",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
