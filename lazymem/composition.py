# SPDX-License-Identifier: Apache-2.0
"""Arrays made of parts of other arrays, or cast to another dtype, that stay lazy.

A *recipe* says which parts of a catalog's arrays, one after another and cast on the way, make an array.
`ComposedCatalog` lays recipes out as the arrays of a region of their own; the engine populates its chunks
from the chunks that the parts lie in (lazymem.h, lm_strip). Reads no array bytes, maps nothing.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ._native import CAST_NONE, FLOATS
from .catalog import ArrayInfo, ArrayTables, Catalog, Layout
from .dtypes import EXTENSION_DTYPES
from .errors import OptionError, UnsupportedDtype
from .format import structs
from .format.layout import SMALL_ALIGNMENT, align_up, place

_MAX_CHUNK: Final = 64 << 20
#: Numbers that were converted begin at a multiple of this, as those in fresh memory would (see layout.py).
_ALIGNED: Final = 16

#: lm_strip of lazymem.h.
_STRIP: Final = np.dtype(
    [("to", "<u8"), ("from", "<u8"), ("length", "<u8"), ("cast", "<u4"), ("reserved", "<u4")]
)

_FORMATS: Final = {EXTENSION_DTYPES.get(name) or np.dtype(name): number for name, number in FLOATS.items()}
#: What numbers can be cast to.
TARGETS: Final = {
    name: EXTENSION_DTYPES.get(name) or np.dtype(name)
    for name in ("float16", "bfloat16", "float32", "float64")
}


@dataclass(frozen=True, slots=True)
class Part:
    """`length` bytes of an array of the catalog below (None: of all its content), from byte `offset` on."""

    array: str | None
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """One array: its parts one after another, numbers of `source` cast to `dtype` (equal: bytes as they are).

    strides: in bytes of what is shown, where the parts hold it in neither C nor Fortran order.
    """

    name: str
    source: np.dtype[Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    order: str = "C"
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the region that it takes."""
        return sum(part.length for part in self.parts) // self.source.itemsize * self.dtype.itemsize


def float_dtype(value: Any) -> np.dtype[Any]:
    """What `dtype=` names: float16, bfloat16, float32 or float64. Raises `OptionError`."""
    try:
        dtype = TARGETS.get(value) if isinstance(value, str) else None
        dtype = np.dtype(value) if dtype is None else dtype
    except TypeError:
        dtype = None
    if dtype is None or dtype not in TARGETS.values():  # numpy takes None for float64
        raise OptionError(
            f"dtype is {str(value)[:100]!r}; numbers can be converted while they are read to "
            f"{', '.join(TARGETS)}; convert to others after reading"
        )
    return dtype


def _cast_code(source: np.dtype[Any], dtype: np.dtype[Any]) -> int | None:
    """LM_CAST_NONE, or the number of the cast in lazymem.h; None if there is none."""
    if source == dtype:
        return CAST_NONE
    if source not in _FORMATS or dtype not in TARGETS.values():
        return None
    return _FORMATS[source] << 8 | _FORMATS[dtype]


def can_cast(dtype: np.dtype[Any], to: np.dtype[Any]) -> bool:
    """Whether the engine can show numbers of `dtype` as those of `to`."""
    return _cast_code(dtype, to) is not None


def cast_recipes(catalog: Catalog, to: np.dtype[Any]) -> list[Recipe]:
    """A recipe for each array: floating-point numbers as `to`, everything else as it is."""
    return [as_recipe(catalog.info(name), to) for name in catalog.names]


def as_recipe(info: ArrayInfo, to: np.dtype[Any]) -> Recipe:
    """The array, as `to` if its numbers can be cast to it, else as it is."""
    dtype = to if can_cast(info.dtype, to) else info.dtype
    strides = info.strides
    if strides is not None and dtype != info.dtype:
        if any(stride % info.dtype.itemsize for stride in strides):
            raise UnsupportedDtype(
                f"array {info.name!r} has strides {strides}, which are no whole elements; "
                "convert it after reading"
            )
        strides = tuple(stride // info.dtype.itemsize * dtype.itemsize for stride in strides)
    whole = Part(info.name, 0, info.nbytes)
    parts = (whole,) if info.nbytes else ()
    return Recipe(info.name, info.dtype, dtype, info.shape, parts, info.order, strides)


class ComposedCatalog:
    """The arrays that recipes make of those of `stock`. Raises `UnsupportedDtype` for an impossible cast."""

    def __init__(self, stock: Catalog, recipes: Iterable[Recipe]) -> None:
        self.stock = stock
        self._recipes = {recipe.name: recipe for recipe in recipes}
        self._offsets: dict[str, int] = {}
        layout = stock.layout([])
        # A chunk of the region then takes one of the stock, where the arrays are that hold most bytes.
        weights: Counter[int] = Counter()
        for recipe in self._recipes.values():
            weights[max(1, recipe.dtype.itemsize // recipe.source.itemsize)] += recipe.nbytes
        (ratio, _), *_ = weights.most_common(1) or [(1, 0)]
        self._chunk_size = min(layout.chunk_size * ratio, max(_MAX_CHUNK, layout.chunk_size))
        self._ends: list[int] = []  # in the region, of strips
        self._strips = self._lay_out()

    def _lay_out(self) -> NDArray[np.void]:
        rows: list[tuple[int, int, int, int]] = []
        shared: dict[tuple[Any, ...], int] = {}  # tied weights stay one
        cursor = 0
        starts = {name: self.stock.info(name).offset if name is not None else 0 for name in self._sources()}
        # In the order of the stock, so that what is small shares chunks as it does there.
        order = sorted(
            self._recipes.values(),
            key=lambda recipe: starts[recipe.parts[0].array] + recipe.parts[0].offset if recipe.parts else 0,
        )
        for recipe in order:
            code = _cast_code(recipe.source, recipe.dtype)
            if code is None:
                raise UnsupportedDtype(
                    f"array {recipe.name!r} has dtype {recipe.source}, which cannot be converted to "
                    f"{recipe.dtype} while it is read; convert it after reading"
                )
            ranges = tuple((starts[part.array] + part.offset, part.length) for part in recipe.parts)
            key = (ranges, code)
            offset = shared.get(key)
            if offset is None:
                offset = shared[key] = self._place(cursor, recipe, ranges)
                to = offset
                for start, length in ranges:
                    rows.append((to, start, length, code))
                    to += length // recipe.source.itemsize * recipe.dtype.itemsize
                    self._ends.append(to)
                cursor = to
            self._offsets[recipe.name] = offset
        self._content_size = cursor
        strips = np.zeros(len(rows), _STRIP)
        if rows:
            strips["to"], strips["from"], strips["length"], strips["cast"] = zip(*rows, strict=True)
        return strips

    def _place(self, cursor: int, recipe: Recipe, ranges: tuple[tuple[int, int], ...]) -> int:
        """Where the array goes that comes from `ranges` of the stock; at or after `cursor`."""
        before, after = recipe.source.itemsize, recipe.dtype.itemsize
        if len(ranges) != 1:
            return place(cursor, recipe.nbytes, self._chunk_size)
        ((start, _),) = ranges
        # The grid of the region's chunks on that of the stock's, so that each is made of as few as can be.
        grid = start % (self._chunk_size * before // after) * after // before
        fits = before == after or grid % _ALIGNED == 0
        if recipe.nbytes >= self._chunk_size and fits:
            return align_up(max(0, cursor - grid), self._chunk_size) + grid
        return place(
            cursor, recipe.nbytes, self._chunk_size, start % SMALL_ALIGNMENT if before == after else 0
        )

    def _sources(self) -> set[str | None]:
        return {part.array for recipe in self._recipes.values() for part in recipe.parts}

    # ---- Catalog ----

    @property
    def format(self) -> str:
        return self.stock.format

    @property
    def names(self) -> Collection[str]:
        return self._recipes.keys()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.stock.metadata

    def info(self, name: str) -> ArrayInfo:
        recipe = self._recipes[name]
        own: Mapping[str, Any] = {}
        if len(recipe.parts) == 1 and recipe.parts[0].array == name and recipe.source == recipe.dtype:
            own = self.stock.info(name).metadata
        return ArrayInfo(
            name, recipe.dtype, recipe.shape, recipe.order, recipe.nbytes, self._offsets[name], own,
            recipe.strides,
        )  # fmt: skip

    def _sorted(self) -> list[Recipe]:
        """Those with bytes, by offset; of several that share them the first."""
        by_offset: dict[int, Recipe] = {}
        for name, recipe in self._recipes.items():
            if recipe.nbytes:
                by_offset.setdefault(self._offsets[name], recipe)
        return [by_offset[offset] for offset in sorted(by_offset)]

    def name_at(self, begin: int, end: int) -> str | None:
        recipes = self._sorted()
        ends = [self._offsets[recipe.name] + recipe.nbytes for recipe in recipes]
        at = bisect.bisect_right(ends, begin)
        if at < len(recipes) and self._offsets[recipes[at].name] < end:
            return recipes[at].name
        return None

    def tables(self) -> ArrayTables:
        recipes = self._sorted()
        names = [recipe.name.encode() for recipe in recipes]
        return ArrayTables(
            np.array([self._offsets[recipe.name] for recipe in recipes], np.uint64),
            np.array([recipe.nbytes for recipe in recipes], np.uint64),
            np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.uint32),
            b"".join(names),
        )

    def layout(self, fds: Sequence[int]) -> Layout:
        stock = self.stock.layout(fds)
        return Layout(
            self._content_size, self._chunk_size, self._runs(), stock.records, None, self._strips, stock
        )

    def _runs(self) -> NDArray[np.void]:
        """Which chunks hold anything."""
        count = -(-self._content_size // self._chunk_size)
        changes = np.zeros(count + 1, np.int64)
        firsts = self._strips["to"].astype(np.int64) // self._chunk_size
        np.add.at(changes, firsts, 1)
        np.add.at(changes, (np.array(self._ends, np.int64) - 1) // self._chunk_size + 1, -1)
        filled = changes.cumsum()[:count] > 0
        starts = (
            np.concatenate([[0], np.flatnonzero(np.diff(filled)) + 1]) if count else np.zeros(0, np.int64)
        )
        runs = np.zeros(len(starts), structs.RUN.dtype)
        runs["first_chunk"] = starts
        runs["count"] = np.diff(np.append(starts, count))
        runs["first_record"] = np.where(filled[starts], 0, np.uint64(structs.ZERO_RUN)) if count else 0
        return runs
