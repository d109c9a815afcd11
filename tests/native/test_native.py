# SPDX-License-Identifier: Apache-2.0
"""Compiles the C tests with the core's own sources, under sanitizers, and runs them."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import lazymem._native

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


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The core, compiled once for each sanitizer."""
    build = load_build()

    @functools.cache
    def compiled(sanitizer: str) -> list[Path]:
        folder = tmp_path_factory.mktemp(sanitizer)
        flags = [*build.FLAGS, "-g", "-O1", "-Werror", *SANITIZERS[sanitizer], f"-I{NATIVE}"]

        def compile_one(name: str) -> Path:
            target = folder / f"{name}.o"
            subprocess.run(["cc", *flags, "-c", str(NATIVE / name), "-o", str(target)], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, build.SOURCES))

    return compiled


def wrapped() -> set[str]:
    """What faults.h can make fail."""
    text = (HERE / "faults.h").read_text("utf-8")
    return set(re.findall(r"^\w+ \*?__wrap_(\w+)\(.*;$", text, re.M)) | set(
        re.findall(r"^WRAP\(\w+, (\w+)", text, re.M)
    )


def link(program: str, sanitizer: str, objects: list[Path], folder: Path) -> Path:
    target = folder / program
    flags = [*load_build().FLAGS, "-g", "-O1", "-Werror", *SANITIZERS[sanitizer], f"-I{NATIVE}", f"-I{HERE}"]
    if program == "test_failures":
        flags += [f"-Wl,--wrap={name}" for name in sorted(wrapped())]
    sources = [str(HERE / f"{program}.c"), *map(str, objects)]
    subprocess.run(["cc", *flags, *sources, "-o", str(target), "-ldl", "-lm"], check=True)
    return target


PROGRAMS = (
    "test_uffd", "test_leaves", "test_trap", "test_engine", "test_engine sigsegv", "test_places",
    "test_fetch", "test_failures",
)  # fmt: skip
# Failures one by one are of one thread; what they leave to other threads is test_engine's and test_fetch's.
CASES = [pair for pair in itertools.product(PROGRAMS, SANITIZERS) if pair != ("test_failures", "thread")]


@pytest.mark.parametrize(("program", "sanitizer"), CASES)
def test_native_program_passes(
    program: str, sanitizer: str, objects: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    program, *arguments = program.split()
    target = link(program, sanitizer, objects(sanitizer), tmp_path)
    # The child of a fork may find a lock of the sanitizers' own allocator held by a thread that it does not
    # have (seen with GCC 12's ASan under load: the child hangs in pthread_create, inside libasan).
    arguments += ["fork"] if sanitizer == "plain" else []
    # die_after_fork: the fetcher is started by clone(CLONE_VM), which TSan takes for a fork.
    # log_path: some tests silence stderr while the core says what they know.
    tsan = "halt_on_error=1:die_after_fork=0:log_path=stdout"
    env = {**os.environ, "TSAN_OPTIONS": tsan, "ASAN_OPTIONS": "detect_leaks=1:log_path=stdout"}
    done = subprocess.run(
        [str(target), *arguments], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"


# What the core calls of the C library beside: it cannot fail, or fails only if it is used wrongly; of close,
# shutdown and munlock nobody could make anything; msync only looks. dlopen and dlsym are asked at import,
# by Python.
HARMLESS = re.compile(
    r"_|mem|str|snprintf$|pthread_(mutex|cond|condattr|attr|rwlock|rwlockattr)_|pthread_(sigmask|atfork)$|ldexpf$"
    r"|sig(fillset|emptyset|addset|delset|action)$"
    r"|(close|shutdown|munlock|msync|setsid|kill|abort|getpid|sigprocmask|sysconf|clock_gettime|sched_yield|usleep)$"
    r"|dl(open|sym)$"
)


def test_every_call_into_the_system_can_be_made_to_fail(objects: Callable[[str], list[Path]]) -> None:
    """And comes from sys.c, or from spawn.c, whose steps run on a stack of their own."""
    callers: dict[str, set[str]] = {}
    for compiled in objects("plain"):
        listed = subprocess.run(["nm", "-u", compiled], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r"U (\w+)", listed):
            if not name.startswith("lm_") and not HARMLESS.match(name):
                callers.setdefault(name, set()).add(compiled.name)
    assert "mmap" in callers
    assert callers.keys() <= wrapped()
    assert callers.pop("pthread_join") == {"engine.c.o"}  # wrapped to be counted
    assert set().union(*callers.values()) == {"sys.c.o", "spawn.c.o"}


def test_fetcher_that_cannot_be_started_is_an_error(
    objects: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    target = link("test_fetch", "plain", objects("plain"), tmp_path)
    done = subprocess.run([str(target), "nowhere"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
