# SPDX-License-Identifier: Apache-2.0
"""Open a snapshot that lives in a file and use it at once as ordinary memory.

>>> import lazymem
>>> snap = lazymem.open("model.lzm")          # reads the index, no array
>>> snap["encoder.weight"][:10]               # populates the chunks behind these ten rows
"""

from .builder import BuildReport, build
from .catalog import ArrayInfo
from .errors import LazymemError
from .extractor import extract
from .region import Stats
from .snapshot import Snapshot, open, open_array
from .verifier import VerifyReport, verify

__all__ = [
    "ArrayInfo",
    "BuildReport",
    "LazymemError",
    "Snapshot",
    "Stats",
    "VerifyReport",
    "build",
    "extract",
    "open",
    "open_array",
    "verify",
]
__version__ = "0.1.0"
