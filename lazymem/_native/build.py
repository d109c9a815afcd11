# SPDX-License-Identifier: Apache-2.0
"""Builds `lazymem._native._core` with cffi in API mode.

setuptools loads this file by its path (pyproject.toml, cmdclass), before lazymem can be imported, so it
imports nothing of lazymem. The declarations are the slices of headers between their CFFI markers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
SOURCES = (
    "sys.c",
    "sys_pager.c",
    "uffd.c",
    "space.c",
    "ledger.c",
    "codec.c",
    "planes.c",
    "cast.c",
    "table.c",
    "index.c",
    "pieces.c",
    "queue.c",
    "arena.c",
    "source.c",
    "spawn.c",
    "trap.c",
    "pages.c",
    "pages_trap.c",
    "pages_stock.c",
    "compose.c",
    "places.c",
    "populate.c",
    "report.c",
    "engine.c",
    "fetch.c",
    "region.c",
    "pager.c",
    "attachment.c",
)
HEADERS = ("lazymem.h", "pager_protocol.h", "pager.h", "ledger.h", "attachment.h")  # of what Python calls
# setuptools brings Python's own flags, -DNDEBUG among them; nothing here depends on assert().
FLAGS = ("-std=gnu11", "-O2", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wshadow")
# cffi's generated wrapper is not ours to keep clean of these.
WRAPPER_FLAGS = ("-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-shadow")


# cffi's wrapper keeps to what Python 3.10 promised to later ones (pyproject.toml, bdist_wheel).
LIMITED_API = ("Py_LIMITED_API", "0x030A0000")


def declarations() -> str:
    """The parts of the headers that cffi reads."""
    texts = [(HERE / name).read_text(encoding="utf-8") for name in HEADERS]
    return "\n".join(text.split("/* CFFI-BEGIN */", 1)[1].split("/* CFFI-END */", 1)[0] for text in texts)


def emit(target: Path) -> None:
    """Write the C source of the extension module to `target`."""
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source("lazymem._native._core", "\n".join(f'#include "{name}"' for name in HEADERS))
    ffi.emit_c_code(str(target))


class BuildExt(build_ext):
    """build_ext that first writes cffi's wrapper, and compiles it beside the core's C files."""

    def build_extension(self, ext: Any) -> None:
        # Of older builds: Python would go on loading a file named for its version before one for all.
        for leftover in HERE.glob("_core.cpython-*.so"):
            leftover.unlink()
        wrapper = HERE / "_core.c"
        emit(wrapper)
        ext.sources = [os.path.relpath(HERE / name) for name in (*SOURCES, wrapper.name)]
        ext.depends = [os.path.relpath(path) for path in HERE.glob("*.h")]
        ext.include_dirs = [os.path.relpath(HERE)]
        ext.define_macros = [LIMITED_API]
        ext.extra_compile_args = [*FLAGS, *WRAPPER_FLAGS]
        if os.environ.get("LAZYMEM_WERROR") == "1":
            ext.extra_compile_args.append("-Werror")
        ext.extra_link_args = ["-pthread"]
        ext.libraries = ["dl", "m"]
        super().build_extension(ext)
