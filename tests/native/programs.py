# SPDX-License-Identifier: Apache-2.0
"""Compiles the core and the C tests, under sanitizers; each part once for all workers of a run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import lazymem._native

from ..once import made_once

NATIVE = Path(lazymem._native.__file__).parent
HERE = Path(__file__).parent
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lazymem_native_build", NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_of(sanitizer: str) -> list[str]:
    return [*load_build().FLAGS, "-g", "-O1", "-Werror", *SANITIZERS[sanitizer], f"-I{NATIVE}", f"-I{HERE}"]


def core_objects(factory: pytest.TempPathFactory, sanitizer: str) -> list[Path]:
    """The core's object files, fit for programs and for a shared library."""
    sources = load_build().SOURCES

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)

        def compile_one(name: str) -> None:
            command = ["cc", *flags_of(sanitizer), "-fPIC", "-c", NATIVE / name, "-o", folder / f"{name}.o"]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources))

    folder = made_once(factory, f"core-{sanitizer}", make)
    return [folder / f"{name}.o" for name in sources]


def wrapped(*names: str) -> set[str]:
    """What these files put between the core and what it calls, by the linker's --wrap."""
    text = "\n".join((HERE / name).read_text("utf-8") for name in names)
    return set(re.findall(r"^[\w ]+\*?__wrap_(\w+)\(.*;$", text, re.M)) | set(
        re.findall(r"^WRAP(?:_POINTER)?\(\w+, (\w+)", text, re.M)
    )


def program(factory: pytest.TempPathFactory, name: str, sanitizer: str) -> Path:
    """One of the C tests, linked with the core."""
    objects = core_objects(factory, sanitizer)
    flags = flags_of(sanitizer)
    files = [f"{name}.c", *(["faults.h"] if name.endswith("failures") else [])]
    flags += [f"-Wl,--wrap={call}" for call in sorted(wrapped(*files))]

    def make(target: Path) -> None:
        command = ["cc", *flags, HERE / f"{name}.c", *objects, "-o", target, "-ldl", "-lm"]
        subprocess.run(command, check=True)

    return made_once(factory, f"{name}-{sanitizer}", make)
