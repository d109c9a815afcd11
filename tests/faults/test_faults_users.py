# SPDX-License-Identifier: Apache-2.0
"""Whoever runs it, and whatever a sandbox refuses: the best way that is left is taken by itself, doctor names
it and why, and the bytes are right, before and after a fork.

One process imports everything as root and forks a child for each case, which gives up what the case is about.
So a case costs milliseconds. What has to start an interpreter as somebody else does so by `users.prefix`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lazymem

from .. import users
from ..children import check_child

#: What is taken where there is no userfaultfd at all.
NEXT = "sigsegv"
DEVICE, SYSCALL, USER_ONLY = "device", "syscall", "user-only"
EPERM, ENOSYS, EACCES, ENOENT = "EPERM", "ENOSYS", "EACCES", "ENOENT"
#: By case: what the child does, the backend that is taken then, and which ways are refused with which errno.
CASES: dict[str, tuple[str, str, dict[str, str]]] = {
    "root": ("", "uffd", {}),
    "ordinary user": ("become()", "uffd-user", {DEVICE: EACCES, SYSCALL: EPERM}),
    "ordinary user of a group that has the device": (
        "own_mounts(); own_device(0o660, 4321); become(4321, 4321)", "uffd", {SYSCALL: EPERM},
    ),
    "ordinary user where everybody has the device": (
        "own_mounts(); own_device(0o666); become()", "uffd", {SYSCALL: EPERM},
    ),
    "root of a user namespace": (
        "become(4321, 4321); root_of_a_user_namespace()", "uffd-user", {DEVICE: EACCES, SYSCALL: EPERM},
    ),
    "user whom the namespace does not map": (
        "become(4321, 4321); user_whom_no_namespace_knows()", "uffd-user", {DEVICE: EACCES, SYSCALL: EPERM},
    ),
    "root, filter with EPERM": (
        "refuse_userfaultfd()", NEXT, {DEVICE: EPERM, SYSCALL: EPERM, USER_ONLY: EPERM},
    ),
    "root, filter with ENOSYS": (
        "refuse_userfaultfd(errno.ENOSYS)", NEXT, {DEVICE: ENOSYS, SYSCALL: ENOSYS, USER_ONLY: ENOSYS},
    ),
    "ordinary user, filter with EPERM": (
        "become(); refuse_userfaultfd(device=False)", NEXT,
        {DEVICE: EACCES, SYSCALL: EPERM, USER_ONLY: EPERM},
    ),
    "ordinary user, filter with ENOSYS": (
        "become(); refuse_userfaultfd(errno.ENOSYS, device=False)", NEXT,
        {DEVICE: EACCES, SYSCALL: ENOSYS, USER_ONLY: ENOSYS},
    ),
    "container with the device": (
        "refuse_userfaultfd(device=False)", "uffd", {SYSCALL: EPERM, USER_ONLY: EPERM},
    ),
    "no new privileges": (
        "become(); no_new_privileges()", "uffd-user", {DEVICE: EACCES, SYSCALL: EPERM},
    ),
    "no locked memory": (
        "become(); resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))", "uffd-user",
        {DEVICE: EACCES, SYSCALL: EPERM},
    ),
    "no /proc": (
        "own_mounts(); without('/proc'); become()", "uffd-user", {DEVICE: EACCES, SYSCALL: EPERM},
    ),
    "no /proc and no device": (
        "own_mounts(); without('/proc'); no_device(); become()", "uffd-user",
        {DEVICE: ENOENT, SYSCALL: EPERM},
    ),
    "nothing can be written, no home": (
        "own_mounts(); read_only(); become(); os.environ.pop('HOME')", "uffd-user",
        {DEVICE: EACCES, SYSCALL: EPERM},
    ),
    "container as they come": (
        "own_mounts(); no_device(); read_only(); become();"
        "os.environ.pop('HOME'); resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)); refuse_userfaultfd()",
        NEXT, {DEVICE: ENOENT, SYSCALL: EPERM, USER_ONLY: EPERM},
    ),
}  # fmt: skip

#: Those in which the fetcher is started, too: it is a process of its own, and takes its time.
FETCHING = (
    "ordinary user", "root of a user namespace", "no /proc", "nothing can be written, no home",
    "container as they come",
)  # fmt: skip

#: What a system call does with a page that nothing has touched.
KERNEL_TOUCH = {"uffd": "written", "uffd-user": "EFAULT", "sigsegv": "EFAULT", "eager": "written"}

SCRIPT = """
import errno, json, os, resource, signal, sys
import numpy as np
import lazymem
from lazymem.ways import survey
from lazymem.fetcher.client import fetcher_status
from tests.users import *

path, cases, fetching = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
expected = np.arange(300_000)

def forced(backend):
    try:
        with lazymem.open(path, backend=backend) as snap:
            return snap.backend
    except lazymem.BackendUnavailable as error:
        return str(error)

def look(fetch):
    there = survey()
    snap = lazymem.open(path)
    array = snap["x"]
    found = {"backend": snap.backend, "doctor": there.backend, "better": there.better()}
    found["refused"] = {way.name: way.errno for way in there.ways if not way.usable}
    found["forced"] = {backend: forced(backend) for backend in ("uffd", "uffd-user")}
    for backend in found["forced"]:
        change = there.change(backend)
        found["to have " + backend] = change and [there.reason(backend), change.command]
    if fetch:
        fetcher_status()
    reader, writer = os.pipe()
    try:
        os.write(writer, array[200_000:200_001].data.cast("B"))
        found["kernel touch"] = "written"
    except OSError as error:
        found["kernel touch"] = errno.errorcode[error.errno]
    found["first"] = int(array[123])
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(array, expected) else 1)
    found["parent"] = bool(np.array_equal(array, expected))
    found["child"] = os.waitpid(child, 0)[1]
    snap.prefetch("x", wait=True)
    found["read"] = bool(np.array_equal(snap.read("x"), expected))
    return found

def run(code, fetch, out):
    signal.alarm(30)
    try:
        exec(code)
        found = look(fetch)
    except BaseException as error:
        found = {"error": repr(error)}
    os.write(out, json.dumps(found).encode())
    os._exit(0)

results = {}
for name, code in cases.items():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        run(code, name in fetching, writer)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    status = os.waitpid(pid, 0)[1]
    results[name] = json.loads(data) if data else {"error": f"ended with status {status}"}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Path]:
    """Where everybody may read it: tmp_path lies in a folder that is its owner's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    lazymem.build({"x": np.arange(300_000)}, folder / "x.lzm", chunk_size=1 << 16)
    yield folder / "x.lzm"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def results(snapshot: Path) -> dict[str, Any]:
    users.demand()
    cases = json.dumps({name: code for name, (code, _, _) in CASES.items()})
    with users.sysctl_held() as sysctl:
        out = check_child(SCRIPT, snapshot, cases, json.dumps(FETCHING), prefix=users.prefix(0))
        found: dict[str, Any] = json.loads(out)
        found["open to all"] = sysctl.read_text() == "1\n"
    return found


def expected(results: dict[str, Any], name: str) -> tuple[str, dict[str, str]]:
    """The backend, and the refused ways; less of them where the machine's setting gives all to everybody."""
    _, backend, refused = CASES[name]
    if results["open to all"] and SYSCALL in refused and USER_ONLY not in refused:
        return "uffd", {way: number for way, number in refused.items() if way != SYSCALL}
    return backend, refused


@pytest.mark.parametrize("name", CASES)
def test_right_bytes_by_the_best_way_that_is_left(results: dict[str, Any], name: str) -> None:
    found = results[name]
    backend, refused = expected(results, name)
    assert "error" not in found, found["error"]
    assert (found["backend"], found["doctor"]) == (backend, backend)
    assert found["refused"] == refused
    assert (found["first"], found["parent"], found["child"], found["read"]) == (123, True, 0, True)
    assert found["kernel touch"] == KERNEL_TOUCH[backend]
    assert bool(found["better"]) == (backend != "uffd")


@pytest.mark.parametrize("name", CASES)
def test_backend_that_is_not_to_be_had_is_refused_with_the_reason_and_the_command(
    results: dict[str, Any], name: str
) -> None:
    ways = {"uffd": {DEVICE, SYSCALL}, "uffd-user": {USER_ONLY}}
    found, refused = results[name], expected(results, name)[1]
    for backend, said in found["forced"].items():
        if not ways[backend] <= refused.keys():
            assert said == backend
            assert found[f"to have {backend}"] is None
            continue
        reason, command = found[f"to have {backend}"]
        assert f"backend '{backend}' is not to be had here: {reason}. To have it: {command}." in said
        assert all(os.strerror(getattr(errno, refused[way])) in reason for way in ways[backend])


#: Who asks, where, and how root of that place follows the advice.
FOLLOWED = {
    "its file mode": ("own_device(0o600)", "", "become(4321, 4321)"),
    "its file mode, in a container": ("own_device(0o600)", "docker", "become(4321, 4321)"),
    "a user namespace": ("own_device(0o600)", "", "become(4321, 4321); root_of_a_user_namespace()"),
    "the setting": ("no_device()", "", "become()"),
}

FOLLOW = """
import json, os, re, subprocess, sys
import lazymem.ways.place
from lazymem.ways import survey
from tests.users import *

machine, container, user = sys.argv[1:]
lazymem.ways.place._CONTAINER_MARKS = (("/", container),) if container else ()
own_mounts()
exec(machine)

def ask():
    reader, writer = os.pipe()
    if os.fork() == 0:
        exec(user)
        found = survey()
        change = found.change("uffd")
        os.write(writer, json.dumps([found.backend, change and change.command]).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return json.load(open(reader))

before, command = ask()
subprocess.run(re.sub(r"sudo |docker exec --user root CONTAINER ", "", command), shell=True, check=True,
               stdout=subprocess.DEVNULL)
print(json.dumps([before, command, *ask()]))
"""


@pytest.mark.parametrize("what", FOLLOWED)
def test_advice_that_is_followed_gives_what_it_says(what: str) -> None:
    users.demand()
    with users.sysctl_held(alone=True) as sysctl:
        value = sysctl.read_text()
        if value != "0\n":
            pytest.skip("this machine lets every user have a full userfaultfd")
        try:
            before, command, after, more = json.loads(
                check_child(FOLLOW, *FOLLOWED[what], env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
            )
        finally:
            sysctl.write_text(value)
    assert (before, after, more) == ("uffd-user", "uffd", None), command


def test_interpreter_started_by_an_ordinary_user(snapshot: Path) -> None:
    """As they do it: everything, the fetcher included, begins with their rights."""
    users.demand()
    code = """
        import os, sys, json
        import numpy as np
        import lazymem
        from lazymem.cli import run
        snap = lazymem.open(sys.argv[1])
        print(os.getuid(), snap.backend, np.array_equal(snap["x"], np.arange(300_000)))
        run(["doctor", "--json"])
        """
    with users.sysctl_held() as sysctl:
        out = check_child(code, snapshot, prefix=users.prefix(), env={"HOME": "/nonexistent"})
        best = "uffd" if sysctl.read_text() == "1\n" else "uffd-user"
    first, report = out.split("\n", 1)
    assert first.split() == [str(users.NOBODY), best, "True"]
    doctor = json.loads(report)
    assert doctor["backend"] == best
    assert doctor["stores"][0]["value"].startswith("starts")
