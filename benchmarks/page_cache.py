# SPDX-License-Identifier: Apache-2.0
"""What the page cache holds of a file, and having the kernel forget it.

Of one file alone, and without being root: nobody else's files get colder.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

_PAGE: Final = 4096
_mincore: Final = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def evict(path: Path) -> None:
    """Have the kernel forget a file's pages, those excepted that somebody maps or has not written yet."""
    with open(path, "rb", buffering=0) as file:
        with suppress(OSError):  # read-only file systems refuse, and have nothing to write
            os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    """How much of a file the page cache holds: 0.0 to 1.0.

    Asked without reading, which would start read-ahead. Of files that are neither the caller's nor writable
    for it the kernel says 1.0, whatever is true.
    """
    view = np.memmap(path, np.uint8, "r")
    pages = np.empty(-(-len(view) // _PAGE), np.uint8)
    if _mincore(view.ctypes.data, len(view), pages.ctypes.data) != 0:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return float(np.mean(pages & 1))
