# SPDX-License-Identifier: Apache-2.0
"""Compiles smallest_handler.c, and shows bytes through it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from .bounds import Bytes


def build(folder: Path) -> Path | None:
    """The shared library, made anew; None where there is no compiler or no userfaultfd."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    target = folder / "smallest_handler.so"
    source = Path(__file__).with_name("smallest_handler.c")
    command = [compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-pthread", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def show(library: Path, source: Bytes, chunk: int) -> Bytes:
    """Memory that is copied from `source` chunk by chunk as it is touched. One a process; it has no end."""
    start = ctypes.CDLL(str(library), use_errno=True).smallest_handler_start
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], ctypes.c_void_p
    size = len(source) // chunk * chunk
    address = start(source.ctypes.data, size, chunk)
    if address is None:
        raise OSError(ctypes.get_errno(), f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
