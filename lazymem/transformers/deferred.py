# SPDX-License-Identifier: Apache-2.0
"""Tensors that do not exist yet, so that transformers can rename, cast and fuse weights without reading them.

from_pretrained takes checkpoint tensors through operations before they become parameters: views, casts, and
for mixtures of experts `torch.stack` and `torch.cat` of hundreds of them. A `Deferred` answers the
operations that only move bytes about with another `Deferred`, a recipe. Anything else gets the real tensor,
lazy or not, and what comes out is real. In the end `realize` makes tensors of all recipes in one region.

Relies on `__torch_dispatch__` of a wrapper subclass: every operation arrives there, whoever calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.utils._pytree import tree_map

from ..composition import Part, Recipe, can_cast
from ..snapshot import Snapshot
from ..torch.tensors import numpy_dtype, tensor_of, torch_dtype

#: A recipe of more parts than these is not worth its table; the tensor is made at once.
_PARTS_MOST: Final = 100_000


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Parts of a snapshot's arrays, one after another: the bytes of a contiguous tensor before any cast."""

    snapshot: Snapshot
    dtype: np.dtype[Any]
    parts: tuple[Part, ...]

    def cut(self, offset: int, length: int) -> list[Part]:
        """The parts of [offset, offset + length)."""
        found = []
        for part in self.parts:
            begin, end = max(offset, 0), min(offset + length, part.length)
            if begin < end:
                found.append(Part(part.array, part.offset + begin, end - begin))
            offset -= part.length
        return found


class Deferred(torch.Tensor):
    """A contiguous tensor of the CPU without memory. Made by `defer`."""

    held: _Bytes

    @staticmethod
    def __new__(cls, held: _Bytes, shape: Sequence[int], dtype: torch.dtype) -> Deferred:
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Deferred = make(cls, tuple(shape), dtype=dtype, device="cpu")
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype}, {len(self.held.parts)} parts)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable and isinstance(args[0] if args else None, cls):
            raise RuntimeError(
                f"{func} would write to a tensor that does not exist yet, and the change would be lost; "
                "clone it first, or load the model with transformers' own from_pretrained"
            )
        args, kwargs = tree_map(_real, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def defer(snapshot: Snapshot, name: str) -> torch.Tensor:
    """Array `name` as a `Deferred`; as a tensor in place where its elements do not lie in C order."""
    info = snapshot.info(name)
    if info.strides is not None or (info.order == "F" and len(info.shape) > 1) or info.metadata.get("dtype"):
        return tensor_of(snapshot[name], info.metadata)
    parts = (Part(name, 0, info.nbytes),) if info.nbytes else ()
    return Deferred(_Bytes(snapshot, info.dtype, parts), info.shape, torch_dtype(info.dtype))


def _real(value: Any) -> Any:
    if not isinstance(value, Deferred):
        return value
    plain = _in_place(value)
    if plain is not None:
        return plain
    recipe = _recipe("tensor", value)
    composed = value.held.snapshot.compose([recipe], mode="c")
    return tensor_of(composed["tensor"])


def _in_place(value: Deferred) -> torch.Tensor | None:
    """The tensor, where it is one array as the snapshot shows it."""
    held = value.held
    if len(held.parts) != 1 or held.dtype != numpy_dtype(value.dtype):
        return None
    (part,) = held.parts
    assert part.array is not None
    info = held.snapshot.info(part.array)
    if part.offset or part.length != info.nbytes:
        return None
    return tensor_of(held.snapshot[part.array]).view(value.shape)


def _recipe(name: str, value: Deferred) -> Recipe:
    held = value.held
    return Recipe(name, held.dtype, numpy_dtype(value.dtype), tuple(value.shape), held.parts)


@dataclass(frozen=True, slots=True)
class Composed:
    """The snapshot that shows what is no array as it lies; used: the arrays that it is made of."""

    snapshot: Snapshot
    used: frozenset[str]


def realize(values: Sequence[Deferred], names: Sequence[str]) -> tuple[list[torch.Tensor], Composed | None]:
    """Real tensors of all, lazy; `names`: of those that have to be composed, in the snapshot of these."""
    made = [_in_place(value) for value in values]
    recipes = [
        _recipe(name, value)
        for value, name, tensor in zip(values, names, made, strict=True)
        if tensor is None
    ]
    if not recipes:
        return [tensor for tensor in made if tensor is not None], None
    snapshot = values[0].held.snapshot.compose(recipes, mode="c")
    tensors = [
        tensor_of(snapshot[name]) if tensor is None else tensor
        for name, tensor in zip(names, made, strict=True)
    ]
    used = {part.array for recipe in recipes for part in recipe.parts if part.array is not None}
    return tensors, Composed(snapshot, frozenset(used))


# ---- operations that only move bytes about ----


def _itemsize(value: Deferred) -> int:
    return value.held.dtype.itemsize


def _same(value: Deferred) -> Deferred:
    return Deferred(value.held, value.shape, value.dtype)


def _reshape(value: Deferred, shape: Sequence[int]) -> Any:
    wanted = list(shape)
    if -1 in wanted:
        rest = -math.prod(wanted)
        if rest == 0 or value.numel() % rest:
            return NotImplemented
        wanted[wanted.index(-1)] = value.numel() // rest
    return Deferred(value.held, wanted, value.dtype) if math.prod(wanted) == value.numel() else NotImplemented


def _unsqueeze(value: Deferred, dim: int) -> Deferred:
    shape = list(value.shape)
    shape.insert(dim if dim >= 0 else dim + value.ndim + 1, 1)
    return Deferred(value.held, shape, value.dtype)


def _rows(value: Deferred, first: int, count: int, shape: Sequence[int]) -> Deferred:
    """`count` rows of the first dimension."""
    row = math.prod(value.shape[1:]) * _itemsize(value)
    parts = tuple(value.held.cut(first * row, count * row))
    return Deferred(_Bytes(value.held.snapshot, value.held.dtype, parts), shape, value.dtype)


def _slice(value: Deferred, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if step != 1 or value.ndim == 0 or dim % value.ndim != 0:
        full = value.ndim and range(value.shape[dim])[slice(start, end, step)] == range(value.shape[dim])
        return _same(value) if full else NotImplemented
    chosen = range(value.shape[0])[slice(start, end)]
    return _rows(value, chosen.start, len(chosen), (len(chosen), *value.shape[1:]))


def _select(value: Deferred, dim: int, index: int) -> Any:
    if dim % value.ndim != 0 or not -value.shape[0] <= index < value.shape[0]:
        return NotImplemented
    return _rows(value, index % value.shape[0], 1, value.shape[1:])


def _split(value: Deferred, size: int, dim: int = 0) -> Any:
    if dim % value.ndim != 0 or size <= 0:
        return NotImplemented
    length = value.shape[0]
    return [_slice(value, 0, begin, min(begin + size, length)) for begin in range(0, max(length, 1), size)]


def _unbind(value: Deferred, dim: int = 0) -> Any:
    if dim % value.ndim != 0:
        return NotImplemented
    return [_rows(value, index, 1, value.shape[1:]) for index in range(value.shape[0])]


def _to_copy(value: Deferred, *, dtype: torch.dtype | None = None, device: Any = None, **others: Any) -> Any:
    if (device is not None and torch.device(device).type != "cpu") or others.get("pin_memory"):
        return NotImplemented
    if dtype is None or dtype == value.dtype:
        return _same(value)
    # A cast of what is cast already would round once instead of twice.
    if value.held.dtype != numpy_dtype(value.dtype) or not can_cast(value.held.dtype, numpy_dtype(dtype)):
        return NotImplemented
    return Deferred(value.held, value.shape, dtype)


def _stack(values: Sequence[torch.Tensor], dim: int = 0) -> Any:
    if not all(isinstance(value, Deferred) for value in values):
        return NotImplemented
    return _cat([_unsqueeze(value, dim) for value in values if isinstance(value, Deferred)], dim)


def _cat(values: Sequence[torch.Tensor], dim: int = 0) -> Any:
    pieces = [value for value in values if isinstance(value, Deferred)]
    first = pieces[0]
    dim = dim % first.ndim if first.ndim else 0
    held, sizes = first.held, [value.shape[dim] for value in pieces if value.ndim]
    if (
        len(pieces) != len(values)
        or len(sizes) != len(pieces)
        or any(
            value.held.snapshot is not held.snapshot
            or (value.held.dtype, value.dtype) != (held.dtype, first.dtype)
            or (*value.shape[:dim], *value.shape[dim + 1 :]) != (*first.shape[:dim], *first.shape[dim + 1 :])
            for value in pieces
        )
    ):
        return NotImplemented
    outer, inner = math.prod(first.shape[:dim]), math.prod(first.shape[dim + 1 :]) * _itemsize(first)
    if outer * len(pieces) > _PARTS_MOST:
        return NotImplemented
    parts = [
        part
        for index in range(outer)
        for value, size in zip(pieces, sizes, strict=True)
        for part in value.held.cut(index * size * inner, size * inner)
    ]
    shape = (*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :])
    return Deferred(_Bytes(held.snapshot, held.dtype, _joined(parts)), shape, first.dtype)


def _joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbours that follow one another in one array as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last is not None and last.array == part.array and last.offset + last.length == part.offset:
            found[-1] = Part(last.array, last.offset, last.length + part.length)
        else:
            found.append(part)
    return tuple(found)


_aten: Final = torch.ops.aten
_HANDLERS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.alias.default: _same,
    _aten.detach.default: _same,
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.split.Tensor: _split,
    _aten.unbind.int: _unbind,
    _aten._to_copy.default: _to_copy,
    _aten.stack.default: _stack,
    _aten.cat.default: _cat,
}
