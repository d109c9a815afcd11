# SPDX-License-Identifier: Apache-2.0
"""Compiles the C tests with the core's own sources, under sanitizers, and runs them."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

from .programs import SANITIZERS, core_objects, program, wrapped

PROGRAMS = (
    "test_uffd", "test_leaves", "test_trap", "test_engine", "test_engine sigsegv", "test_places",
    "test_fetch", "test_failures", "test_pager", "test_pager_failures",
    "test_pager_moments", "test_attachment_failures", "test_twin_failures",
)  # fmt: skip
# Failures one by one are of one thread; what they leave to other threads is test_engine's, test_fetch's and
# test_pager's.
CASES = [
    (call, sanitizer)
    for call, sanitizer in itertools.product(PROGRAMS, SANITIZERS)
    if not (call.endswith("failures") and sanitizer == "thread")
]


@pytest.mark.timeout(300)  # longer than the program may take: the worker's own end would tell less
@pytest.mark.parametrize(("call", "sanitizer"), CASES)
def test_native_program_passes(call: str, sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    name, *arguments = call.split()
    target = program(tmp_path_factory, name, sanitizer)
    # The child of a fork may find a lock of the sanitizers' own allocator held by a thread that it does not
    # have (seen with GCC 12's ASan under load: the child hangs in pthread_create, inside libasan).
    arguments += ["fork"] if sanitizer == "plain" else []
    # die_after_fork: the fetcher is started by clone(CLONE_VM), which TSan takes for a fork.
    # log_path: some tests silence stderr while the core says what they know.
    known = Path(__file__).with_name("tsan.supp")
    tsan = f"halt_on_error=1:die_after_fork=0:log_path=stdout:suppressions={known}"
    env = {**os.environ, "TSAN_OPTIONS": tsan, "ASAN_OPTIONS": "detect_leaks=1:log_path=stdout"}
    done = subprocess.run(
        [str(target), *arguments], capture_output=True, text=True, timeout=200, env=env, check=False
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"


# What the core calls of the C library beside: it cannot fail, or fails only if it is used wrongly; of close,
# shutdown, munlock, unlink and prctl (a name) nobody could make anything; msync only looks. dlopen and dlsym
# are asked at import, by Python.
HARMLESS = re.compile(
    r"_|mem|str|snprintf$|pthread_(mutex|cond|condattr|attr|rwlock|rwlockattr)_|pthread_(sigmask|atfork)$|ldexpf$"
    r"|sig(fillset|emptyset|addset|delset|action)$"
    r"|(close|shutdown|munlock|msync|setsid|kill|abort|getpid|sigprocmask|sysconf|clock_gettime|sched_yield|usleep|sleep)$"
    r"|(free|readdir|closedir|dirfd|unlink|geteuid|signal|prctl)$"
    r"|dl(open|sym)$"
)


# Only a pager has any, for what it knows of others' memory.
ALLOCATIONS = {
    "malloc": {"pager.c.o", "space.c.o"},
    "calloc": {"pager.c.o"},
    "realloc": {"pager.c.o", "space.c.o"},
}


def test_every_call_into_the_system_can_be_made_to_fail(tmp_path_factory: pytest.TempPathFactory) -> None:
    """And comes from sys.c or sys_pager.c, or from spawn.c, whose steps run on a stack of their own."""
    callers: dict[str, set[str]] = {}
    for compiled in core_objects(tmp_path_factory, "plain"):
        listed = subprocess.run(["nm", "-u", compiled], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r"U (\w+)", listed):
            if not name.startswith("lm_") and not HARMLESS.match(name):
                callers.setdefault(name, set()).add(compiled.name)
    assert "mmap" in callers
    assert callers.keys() <= wrapped("faults.h")
    # Wrapped to be counted.
    assert callers.pop("pthread_join") == {"engine.c.o", "attachment.c.o", "pager.c.o"}
    assert {name: callers.pop(name) for name in ALLOCATIONS} == ALLOCATIONS
    assert set().union(*callers.values()) == {"sys.c.o", "sys_pager.c.o", "spawn.c.o"}


def test_fetcher_that_cannot_be_started_is_an_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    target = program(tmp_path_factory, "test_fetch", "plain")
    done = subprocess.run([str(target), "nowhere"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
