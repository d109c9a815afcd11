# SPDX-License-Identifier: Apache-2.0
"""Finds the C functions of the codecs and hands them to the core.

They come from the wheels that are dependencies anyway (zstandard's cffi backend, the lz4 and xxhash
extension modules), else from the system's libraries. The core keeps plain function pointers: from here
on no Python is involved. Modules are never unloaded, so the pointers stay good.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ._core import ffi, lib

Finder = Callable[[Sequence[tuple[int, str]]], bool]


@dataclass(frozen=True, slots=True)
class _Codec:
    functions: tuple[tuple[int, str], ...]  # LM_FN_*, symbol
    module: str  # extension module of the wheel
    soname: str


_CODECS: Mapping[str, _Codec] = MappingProxyType(
    {
        "zstd": _Codec(
            (
                (lib.LM_FN_ZSTD_CREATE, "ZSTD_createDCtx"),
                (lib.LM_FN_ZSTD_FREE, "ZSTD_freeDCtx"),
                (lib.LM_FN_ZSTD_DECOMPRESS, "ZSTD_decompressDCtx"),
                (lib.LM_FN_ZSTD_IS_ERROR, "ZSTD_isError"),
            ),
            "zstandard._cffi",
            "libzstd.so.1",
        ),
        "lz4": _Codec(
            ((lib.LM_FN_LZ4_DECOMPRESS, "LZ4_decompress_safe"),), "lz4.block._block", "liblz4.so.1"
        ),
        "xxh3": _Codec(((lib.LM_FN_XXH3_64, "XXH3_64bits"),), "xxhash._xxhash", "libxxhash.so.0"),
    }
)


def _from_cffi_module(codec: _Codec) -> bool:
    """A wheel built by cffi hands out addresses itself, exported or not."""
    module = importlib.import_module(codec.module)
    try:
        addresses = [(which, module.ffi.addressof(module.lib, symbol)) for which, symbol in codec.functions]
    except (AttributeError, TypeError):
        return False
    for which, address in addresses:
        lib.lm_codec_set(which, ffi.cast("void *", int(module.ffi.cast("uintptr_t", address))))
    return True


def _from_library(codec: _Codec, path: str) -> bool:
    name = path.encode()
    # All of a codec's functions from one library, or none: two versions must not be mixed.
    return all(lib.lm_codec_find(which, name, symbol.encode()) == 0 for which, symbol in codec.functions)


def _from_module_file(codec: _Codec) -> bool:
    """The extension module's file exports the library's own symbols."""
    path: Any = importlib.import_module(codec.module).__file__
    return _from_library(codec, path)


def _find(codec: _Codec) -> str:
    ways: tuple[tuple[Callable[[_Codec], bool], str], ...] = (
        (_from_cffi_module, codec.module),
        (_from_module_file, codec.module),
        (lambda wanted: _from_library(wanted, wanted.soname), codec.soname),
    )
    for way, name in ways:
        try:
            if way(codec):
                return name
        except ImportError:
            continue
    return ""


#: Where each codec's functions came from: a module of a wheel, a soname, or "" (not found).
SOURCES: Mapping[str, str] = MappingProxyType({name: _find(codec) for name, codec in _CODECS.items()})
