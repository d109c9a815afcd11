# SPDX-License-Identifier: Apache-2.0
"""Open a snapshot that lives in a file and use it at once as ordinary memory.

>>> import lazymem
>>> snap = lazymem.open("model.lzm")          # reads the index, no array
>>> snap["encoder.weight"][:10]               # populates the chunks behind these ten rows
"""

from .builder import BuildReport, build
from .catalog import ArrayInfo
from .errors import (
    AccessDenied,
    ArrayNotFound,
    BackendUnavailable,
    BuildError,
    ChunkCorrupt,
    FormatError,
    LazymemError,
    OptionError,
    OutOfMemory,
    ReadError,
    SnapshotChanged,
    SnapshotClosed,
    SnapshotNotFound,
    UnsupportedDtype,
    UnsupportedFormat,
)
from .extractor import extract
from .region import Stats
from .snapshot import Snapshot, open, open_array
from .verifier import VerifyReport, verify

__all__ = [
    "AccessDenied",
    "ArrayInfo",
    "ArrayNotFound",
    "BackendUnavailable",
    "BuildError",
    "BuildReport",
    "ChunkCorrupt",
    "FormatError",
    "LazymemError",
    "OptionError",
    "OutOfMemory",
    "ReadError",
    "Snapshot",
    "SnapshotChanged",
    "SnapshotClosed",
    "SnapshotNotFound",
    "Stats",
    "UnsupportedDtype",
    "UnsupportedFormat",
    "VerifyReport",
    "build",
    "extract",
    "open",
    "open_array",
    "verify",
]
__version__ = "0.1.0"
