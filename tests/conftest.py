# SPDX-License-Identifier: Apache-2.0
"""Snapshots that many tests share, made once; and what says which ways in this machine has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem

CHUNK = 64 * 1024


def make_arrays(seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Weights-like arrays of all kinds of sizes; 24 MiB in all."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.generic]] = {
        f"layer.{i}.weight": (rng.standard_normal((1024, 512)) * 0.02).astype(np.float32) for i in range(10)
    }
    arrays["ids"] = np.arange(300_000, dtype=np.int64)
    arrays["zeros"] = np.zeros(600_000, np.uint8)
    arrays["fortran"] = np.asfortranarray(rng.standard_normal((100, 70)))
    arrays["empty"] = np.zeros((0, 5), np.float32)
    arrays["scalar"] = np.array(2.5)
    for i in range(50):
        arrays[f"small.{i}"] = rng.integers(0, 255, 100 + i, dtype=np.uint8)
    return arrays


@pytest.fixture(scope="session")
def arrays() -> dict[str, NDArray[np.generic]]:
    return make_arrays()


@pytest.fixture(scope="session")
def snapshot_path(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, NDArray[np.generic]]) -> Path:
    """zstd, chunks of 64 KiB: many chunks, many faults."""
    path = tmp_path_factory.mktemp("snapshots") / "small-chunks.lzm"
    lazymem.build(arrays, path, codec="zstd", chunk_size=CHUNK)
    return path


@pytest.fixture(scope="session")
def huge_path(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, NDArray[np.generic]]) -> Path:
    """lz4, chunks of 2 MiB: whole huge pages, which can be moved."""
    path = tmp_path_factory.mktemp("snapshots") / "huge-chunks.lzm"
    lazymem.build(arrays, path, codec="lz4")
    return path


@pytest.fixture(scope="session")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand chunks, which take a while to populate; the last element of "big" is 7."""
    path = tmp_path_factory.mktemp("snapshots") / "long.lzm"
    big = np.random.default_rng(4).standard_normal(16_000_000).astype(np.float32)
    big[-1] = 7
    lazymem.build({"big": big, "small": np.arange(9)}, path, chunk_size=CHUNK)
    return path
