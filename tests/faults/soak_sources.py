# SPDX-License-Identifier: Apache-2.0
"""What the soak opens, and what must be seen there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import lazymem

Arrays = dict[str, NDArray[Any]]
Put = Callable[[str, bytes], object]  # an object under its URL


@dataclass
class Source:
    """Something to open, and what must be seen. keywords: for `lazymem.open`."""

    name: str
    location: str
    expected: Arrays
    chunk_sizes: tuple[int | None, ...] = (None,)
    keywords: dict[str, Any] = field(default_factory=dict)
    faulting: bool = False  # never shown by a plain mapping
    movable: bool = False  # its chunks are huge pages

    @property
    def is_remote(self) -> bool:
        return self.location.startswith("s3://")

    @property
    def is_local_snapshot(self) -> bool:
        return not self.is_remote and self.location.endswith(".lzm")


def weights(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "big": (rng.standard_normal((300, 1000)) * 0.02).astype(np.float32),
        "brain": (rng.standard_normal(200_001) * 0.02).astype(np.float32).astype(ml_dtypes.bfloat16),
        "half": rng.standard_normal((77, 999)).astype(np.float16),
        "ids": np.arange(70_000, dtype=np.int64),
        "zeros": np.zeros(300_000, np.uint8),
        "noise": rng.integers(0, 256, 333_333, dtype=np.uint8),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }


def widened(arrays: Arrays) -> Arrays:
    def is_float(array: NDArray[Any]) -> bool:
        return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16

    return {name: a.astype(np.float32) if is_float(a) else a for name, a in arrays.items()}


def make_sources(
    folder: Path, prefix: str | None, put: Callable[[str, bytes], object] | None
) -> list[Source]:
    """Local ones in `folder`; with `put` the same under the URL `prefix`."""
    from safetensors.numpy import save_file

    arrays, kib = weights(1), 1024
    kinds = [("zstd", True, 64), ("zstd", False, 128), ("lz4", None, 64), ("none", None, 64)]
    for codec, planes, size in [*kinds, ("lz4", True, 2048)]:
        target = folder / f"{codec}-{planes}-{size}.lzm"
        lazymem.build(arrays, target, codec=codec, planes=planes, chunk_size=size * kib)
    plain = {name: array for name, array in arrays.items() if array.dtype.kind != "V"}
    save_file(plain, folder / "a.safetensors")
    np.save(folder / "a.npy", arrays["big"])
    sizes = (None, 64 * kib, 256 * kib)
    found = [
        Source(f.name, str(f), arrays, faulting="none" not in f.name, movable="2048" in f.name)
        for f in sorted(folder.glob("*.lzm"))
    ]
    found += [
        Source("a.safetensors", str(folder / "a.safetensors"), plain, sizes),
        Source("a.npy", str(folder / "a.npy"), {"data": arrays["big"]}, sizes),
    ]
    if put is not None:
        for name in ("zstd-True-64.lzm", "none-None-64.lzm", "lz4-True-2048.lzm", "a.safetensors", "a.npy"):
            put(prefix + name, (folder / name).read_bytes())
            like = next(source for source in found if source.name == name)
            found.append(Source(f"s3:{name}", prefix + name, like.expected, like.chunk_sizes, faulting=True))
    composed = [source for source in found if source.name != "a.npy"]
    found += [
        replace(
            source,
            name=f"float32:{source.name}",
            expected=widened(source.expected),
            keywords={"dtype": "float32"},
            faulting=True,
        )
        for source in composed
    ]
    return found
