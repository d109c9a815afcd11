# SPDX-License-Identifier: Apache-2.0
"""Open a snapshot that lives in a file and use it at once as ordinary memory.

>>> import lazymem
>>> snap = lazymem.open("model.lzm")          # reads the index, no array
>>> snap["encoder.weight"][:10]               # populates the chunks behind these ten rows
"""

from .builder import BuildReport, build
from .carried import CarriedFile
from .catalog import ArrayInfo
from .composition import Part, Recipe
from .copier import CopyReport, copy
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
from .explainer import explain
from .extractor import extract
from .memory import Stats
from .populator import populate
from .snapshot import ArrayHandle, Snapshot, open, open_array
from .verifier import VerifyReport, verify

__all__ = [
    "AccessDenied",
    "ArrayHandle",
    "ArrayInfo",
    "ArrayNotFound",
    "BackendUnavailable",
    "BuildError",
    "BuildReport",
    "CarriedFile",
    "ChunkCorrupt",
    "CopyReport",
    "FormatError",
    "LazymemError",
    "OptionError",
    "OutOfMemory",
    "Part",
    "ReadError",
    "Recipe",
    "Snapshot",
    "SnapshotChanged",
    "SnapshotClosed",
    "SnapshotNotFound",
    "Stats",
    "UnsupportedDtype",
    "UnsupportedFormat",
    "VerifyReport",
    "build",
    "copy",
    "explain",
    "extract",
    "open",
    "open_array",
    "populate",
    "verify",
]
__version__ = "0.1.0"
