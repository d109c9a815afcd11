# SPDX-License-Identifier: Apache-2.0
"""The bytes that are measured, and the files that hold them, each made once a run.

Everything is made in child processes, so that the parent stays small: it forks once per measurement.
Values come from a fixed seed. Weights of trained models look like normal noise of a small scale: high
entropy in the mantissa, little in sign and exponent. The smooth field stands for data that compresses
well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from .harness import in_child

SEED: Final = 20_240_229
#: Name of the one array in every snapshot.
NAME: Final = "w"
_PIECE: Final = 1 << 22  # elements made at once

#: zstd level 3 and lz4 level 1, lazymem's defaults, in blosc's scale of levels (blosc2.c, blosc.c).
_BLOSC_LEVEL: Final = {"zstd": 2, "lz4": 9}


def _normal(rng: np.random.Generator, count: int, start: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)


def _smooth(rng: np.random.Generator, count: int, start: int) -> np.ndarray[Any, Any]:
    x = np.arange(start, start + count, dtype=np.float64)
    values = 15 + 10 * np.sin(x / 40_000) + 3 * np.sin(x / 700) + rng.normal(0, 0.01, count)
    return np.asarray(np.round(values, 2), np.float32)


def _bfloat16() -> np.dtype[Any]:
    import ml_dtypes  # gives numpy the dtype

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


@dataclass(frozen=True)
class Kind:
    """A sort of bytes: what it is, its dtype, and the function that makes elements of it."""

    text: str
    dtype: Callable[[], np.dtype[Any]]
    make: Callable[[np.random.Generator, int, int], np.ndarray[Any, Any]]


KINDS: Final = {
    "bf16": Kind("normal weights, scale 0.02, bfloat16", _bfloat16, _normal),
    "fp32": Kind("normal weights, scale 0.02, float32", lambda: np.dtype("<f4"), _normal),
    "smooth": Kind("smooth field with noise, two decimals, float32", lambda: np.dtype("<f4"), _smooth),
}


def tree_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _evict(file: Path) -> None:
    """Have the page cache read it anew: how it was written decides how large the cache's pieces are, and
    mapping a file in small ones takes twice as long as in large ones.
    """
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Data:
    """The folder of prepared files; methods return paths and make what is missing."""

    folder: Path
    nbytes: int
    say: Callable[[str], None] = lambda text: None
    _digests: dict[tuple[str, int, int | None], int] = field(default_factory=dict)

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The file or folder of that name; `make` writes it, in a child, if it is not there."""
        path = self.folder / name
        if not path.exists():
            self.say(f"making {name}")
            unfinished = self.folder / f"unfinished-{os.getpid()}-{name}"
            in_child(lambda: make(unfinished), deadline=600)
            for file in files_of(unfinished):
                _evict(file)
            unfinished.rename(path)
        return path

    def raw(self, kind: str) -> Path:
        """The array's bytes and nothing else."""
        return self.made(f"{kind}.raw", lambda target: self._write_raw(kind, target))

    def digest_of(self, kind: str, start: int = 0, stop: int | None = None) -> int:
        """Digest of the array's bytes from start to stop."""
        raw, key = self.raw(kind), (kind, start, stop)
        if key not in self._digests:
            self._digests[key] = in_child(
                lambda: digest(np.memmap(raw, np.uint8, "r")[start:stop]), deadline=60
            )
        return self._digests[key]

    def _write_raw(self, kind: str, target: Path) -> None:
        rng, dtype = np.random.default_rng(SEED), KINDS[kind].dtype()
        count = self.nbytes // dtype.itemsize
        with open(target, "wb") as file:
            for start in range(0, count, _PIECE):
                values = KINDS[kind].make(rng, min(_PIECE, count - start), start)
                values.astype(dtype).tofile(file)

    def _array(self, kind: str) -> np.ndarray[Any, Any]:
        return np.memmap(self.raw(kind), np.uint8, "r").view(KINDS[kind].dtype())

    def snapshot(self, kind: str, codec: str, planes: bool, chunk_size: int) -> Path:
        """A lazymem snapshot of the array."""
        self.raw(kind)
        name = f"{kind}-{codec}{'-planes' if planes else ''}-{chunk_size >> 10}k.lzm"
        return self.made(
            name,
            lambda target: lazymem.build(
                {NAME: self._array(kind)}, target, codec=codec, planes=planes, chunk_size=chunk_size
            ),
        )

    def many(self, kind: str, count: int, codec: str, chunk_size: int) -> Path:
        """A snapshot of the same bytes as `count` arrays."""
        self.raw(kind)

        def make(target: Path) -> None:
            parts = np.array_split(self._array(kind), count)
            arrays = {f"{NAME}{i}": part for i, part in enumerate(parts)}
            lazymem.build(arrays, target, codec=codec, chunk_size=chunk_size)

        return self.made(f"{kind}-{codec}-{count}-arrays-{chunk_size >> 10}k.lzm", make)

    def zarr(self, kind: str, codec: Any, shuffle: bool, chunk_size: int) -> Path:
        """A zarr v3 array; bfloat16, which zarr does not have, as uint16."""
        self.raw(kind)

        def make(target: Path) -> None:
            import zarr
            from zarr.codecs import BloscCodec, ZstdCodec

            array = _portable(self._array(kind))
            blosc = BloscCodec(
                cname=codec, clevel=_BLOSC_LEVEL[codec], shuffle="shuffle" if shuffle else "noshuffle"
            )
            plain = codec == "zstd" and not shuffle
            zarr.create_array(
                store=target,
                data=array,
                chunks=(chunk_size // array.itemsize,),
                compressors=ZstdCodec(level=3) if plain else blosc,
            )

        return self.made(f"{kind}-{codec}{'-shuffle' if shuffle else ''}-{chunk_size >> 10}k.zarr", make)

    def zarr_group(self, kind: str, count: int, chunk_size: int) -> Path:
        """The same bytes as `count` arrays of a zarr v3 group, with its metadata in one place."""
        self.raw(kind)

        def make(target: Path) -> None:
            import zarr
            from zarr.codecs import BloscCodec

            group = zarr.create_group(store=target)
            for number, part in enumerate(np.array_split(_portable(self._array(kind)), count)):
                group.create_array(
                    name=f"{NAME}{number}",
                    data=part,
                    chunks=(chunk_size // part.itemsize,),
                    compressors=BloscCodec(cname="zstd", clevel=_BLOSC_LEVEL["zstd"], shuffle="shuffle"),
                )
            zarr.consolidate_metadata(target)

        return self.made(f"{kind}-zstd-shuffle-{count}-arrays-{chunk_size >> 10}k.zarr", make)

    def blosc2(self, kind: str, codec: str, shuffle: bool, chunk_size: int) -> Path:
        """A blosc2 NDArray in one file; bfloat16 as uint16. Block sizes are blosc2's own choice."""
        self.raw(kind)

        def make(target: Path) -> None:
            import blosc2

            array = _portable(self._array(kind))
            parameters = {
                "codec": blosc2.Codec[codec.upper()],
                "clevel": _BLOSC_LEVEL[codec],
                "filters": [blosc2.Filter.SHUFFLE if shuffle else blosc2.Filter.NOFILTER],
            }
            blosc2.asarray(
                array,
                chunks=(chunk_size // array.itemsize,),
                cparams=parameters,
                urlpath=str(target),
                mode="w",
            )

        return self.made(f"{kind}-{codec}{'-shuffle' if shuffle else ''}-{chunk_size >> 10}k.b2nd", make)


def _portable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.view(np.uint16) if array.dtype == _bfloat16() else array


def digest(arrays: np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]) -> int:
    """XXH3-64 of an array's bytes, or of several arrays' one after the other."""
    import xxhash

    state = xxhash.xxh3_64()
    for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
        view: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        state.update(view)
    return int(state.intdigest())
