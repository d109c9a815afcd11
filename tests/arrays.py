# SPDX-License-Identifier: Apache-2.0
"""The arrays of the snapshots that many tests share. Child processes make them again to compare with, so this
module imports little."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
