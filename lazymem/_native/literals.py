# SPDX-License-Identifier: Apache-2.0
"""zstd frames of Huffman-coded literals and no matches, for numbers whose bytes repeat by chance only.

Matches that zstd finds in the planes of trained weights are accidents: each costs more bits than the
literals it replaces, and decoding slows to a third. So the search is made to step over nearly everything.
zstd then takes literals for incompressible, unless it is told otherwise by ZSTD_c_literalCompressionMode,
which the wheel's cffi module has and its Python API lacks; without the module the smallest possible search
does nearly as well. What comes out are ordinary frames.

zstd's blocks are at most as long as its window, and each has a Huffman table of its own. So the window is
made to fit the planes: where one block held parts of two, the table would fit neither.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

#: A table takes some 50 bytes, too much of blocks below 4 KiB; and it fits 64 KiB better than 128.
_WINDOW_LOGS: Final = (12, 16)
_HASH_LOG: Final = 6  # the least
_MIN_MATCH: Final = 7  # the most
_FAST: Final = 1
_STEP: Final = 1 << 17  # bytes between two looks for a match; the most


#: (data, length of each plane in it) -> frame.
Compress = Callable[[Any, int], bytes]


def literal_compressor() -> Compress:
    """A function that makes frames. For one thread at a time; releases the GIL."""
    try:
        module: Any = importlib.import_module("zstandard._cffi")
        return _by_library(module.ffi, module.lib)
    except (ImportError, AttributeError):
        return by_parameters()


def by_parameters() -> Compress:
    """The same by zstandard's own API: a little larger, a little slower to decode."""
    import zstandard  # only a build needs it

    compressors: dict[int, zstandard.ZstdCompressor] = {}

    def compress(data: Any, plane: int) -> bytes:
        window_log = _window_log(plane)
        if window_log not in compressors:
            parameters = zstandard.ZstdCompressionParameters(
                strategy=_FAST,
                window_log=window_log,
                hash_log=_HASH_LOG,
                chain_log=_HASH_LOG,
                search_log=1,
                min_match=_MIN_MATCH,
                target_length=0,
                write_content_size=True,
                write_checksum=False,
                write_dict_id=False,
            )
            compressors[window_log] = zstandard.ZstdCompressor(compression_params=parameters)
        return compressors[window_log].compress(data)

    return compress


def _window_log(plane: int) -> int:
    low, high = _WINDOW_LOGS
    return min(max(plane.bit_length() - 1, low), high)


def _by_library(ffi: Any, lib: Any) -> Compress:
    context = ffi.gc(lib.ZSTD_createCCtx(), lib.ZSTD_freeCCtx)
    if context == ffi.NULL:
        raise MemoryError
    for parameter, value in (
        (lib.ZSTD_c_strategy, _FAST),
        (lib.ZSTD_c_hashLog, _HASH_LOG),
        (lib.ZSTD_c_chainLog, _HASH_LOG),
        (lib.ZSTD_c_searchLog, 1),
        (lib.ZSTD_c_minMatch, _MIN_MATCH),
        (lib.ZSTD_c_targetLength, _STEP),
        (lib.ZSTD_c_literalCompressionMode, lib.ZSTD_lcm_huffman),
    ):
        if lib.ZSTD_isError(lib.ZSTD_CCtx_setParameter(context, parameter, value)):
            raise AttributeError("this zstd lacks a parameter")
    out = bytearray()

    def compress(data: Any, plane: int) -> bytes:
        lib.ZSTD_CCtx_setParameter(context, lib.ZSTD_c_windowLog, _window_log(plane))
        with ffi.from_buffer(data) as given:
            bound = lib.ZSTD_compressBound(len(given))
            if len(out) < bound:
                out.extend(bytes(bound - len(out)))
            with ffi.from_buffer(out, require_writable=True) as target:
                length = lib.ZSTD_compress2(context, target, bound, given, len(given))
                if lib.ZSTD_isError(length):
                    raise MemoryError(ffi.string(lib.ZSTD_getErrorName(length)).decode())
                return bytes(ffi.buffer(target, length))

    return compress
