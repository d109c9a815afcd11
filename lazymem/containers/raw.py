# SPDX-License-Identifier: Apache-2.0
"""Any file as it is: one array "data" of bytes."""

from __future__ import annotations

from typing import Final

import numpy as np

from ..store import locations
from ..store.base import Blob
from .base import ArrayEntry, Directory

ARRAY_NAME: Final = "data"


def read_raw(blob: Blob) -> Directory:
    """The directory of a file of unknown format."""
    entry = ArrayEntry(
        name=ARRAY_NAME,
        dtype=np.dtype(np.uint8),
        shape=(blob.size,),
        order="C",
        file=0,
        offset=0,
        nbytes=blob.size,
        stored_length=blob.size,
    )
    return Directory("raw", (blob,), (locations.name_of(blob.url) or ARRAY_NAME,), (entry,))
