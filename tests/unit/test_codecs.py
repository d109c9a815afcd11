# SPDX-License-Identifier: Apache-2.0
"""Where the decoders come from. In child processes: the choice is made once for each process."""

from __future__ import annotations

from pathlib import Path

from lazymem._native import CODEC_SOURCES

from ..children import check_child


def test_decoders_come_from_the_wheels() -> None:
    assert CODEC_SOURCES == {"zstd": "zstandard._cffi", "lz4": "lz4.block._block", "xxh3": "xxhash._xxhash"}


HIDE = """
import sys
for name in ("zstandard._cffi", "lz4.block._block", "xxhash._xxhash"):
    sys.modules[name] = None  # importing it raises ImportError
"""


def test_system_libraries_are_the_fallback(snapshot_path: Path) -> None:
    code = (
        HIDE
        + """
import types
for name in ("lz4", "lz4.block"):  # what compresses is not needed here
    sys.modules[name] = types.ModuleType(name)
import lazymem
from lazymem._native import CODEC_SOURCES
print(sorted(CODEC_SOURCES.values()))
from tests.arrays import make_arrays
with lazymem.open(sys.argv[1]) as snap:
    print(all(snap[name].tobytes() == array.tobytes() for name, array in make_arrays().items()))
"""
    )
    assert check_child(code, snapshot_path) == "['liblz4.so.1', 'libxxhash.so.0', 'libzstd.so.1']\nTrue\n"


def test_codec_found_nowhere_is_said_to_be_missing() -> None:
    code = """
    from lazymem._native import _core, codecs
    # As on a machine with no zstd at all: nothing has been found for it.
    functions = ((_core.lib.LM_FN_ZSTD_CREATE, "none"),)
    found = codecs._find(codecs._Codec(functions, "no.such.module", "no-such.so"))
    print(repr(found))
    """
    assert check_child(code) == "''\n"
