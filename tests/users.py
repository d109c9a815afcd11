# SPDX-License-Identifier: Apache-2.0
"""Less than root: what a process gives up, or finds missing, before it opens a snapshot.

Functions for child processes that root has forked; they cannot be undone, and nobody else sees what they do:
mounts are made in a namespace of the process's own. `prefix` is for children that start an interpreter, which
may lie where only root can go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534
DEVICE = "/dev/userfaultfd"

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
#: userfaultfd(2) and ioctl(2) by machine.
_NUMBERS = {"x86_64": (323, 16), "aarch64": (282, 29)}

KNOWN_MACHINE = platform.machine() in _NUMBERS


def demand() -> None:
    """Skip the test where nothing can be given up, or taken away."""
    if os.geteuid() != 0:
        pytest.skip("only root can give something up; run the tests as root")
    if not KNOWN_MACHINE or not os.path.exists(DEVICE):
        pytest.skip("made for x86-64 and arm64 with Linux 6.1, whose /dev/userfaultfd is there")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("mounts of one's own need CAP_SYS_ADMIN, which this container has not got")


@contextlib.contextmanager
def sysctl_held(*, alone: bool = False) -> Iterator[Path]:
    """vm.unprivileged_userfaultfd, which no other test changes meanwhile; alone: nor relies on."""
    with open(Path(tempfile.gettempdir()) / f"lazymem-tests-sysctl-{os.geteuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield Path("/proc/sys/vm/unprivileged_userfaultfd")


def _done(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _done(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


# ---- who ----


def become(user: int = NOBODY, group: int = NOBODY) -> None:
    """An ordinary user, for good."""
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def root_of_a_user_namespace() -> None:
    """User 0 with all capabilities, which count for nothing outside."""
    user, group = os.geteuid(), os.getegid()
    # The files of a process that has changed its user belong to root, until it is dumpable again.
    _done(_libc.prctl(4, 1, 0, 0, 0))
    _done(_libc.unshare(_CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def user_whom_no_namespace_knows() -> None:
    """A new user namespace that maps nobody."""
    _done(_libc.unshare(_CLONE_NEWUSER))


# ---- what is forbidden ----


def no_new_privileges() -> None:
    _done(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def refuse_userfaultfd(number: int = errno.EPERM, *, device: bool = True) -> None:
    """A seccomp filter, as container runtimes install one: userfaultfd(2) fails with `number`.

    device: the ioctl that makes one of an open device fails, too. (No runtime's filter does that: they do not
    hand the device in.)
    """
    call, ioctl = _NUMBERS[platform.machine()]

    def instruction(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("<HBBI", code, yes, no, value)

    # Classic BPF over struct seccomp_data: the system call's number at 0, its second argument at 24.
    refused = 0x00050000 | number
    program = b"".join(
        [
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 3, 0, call),
            instruction(0x15, 0, 3, ioctl if device else 0xFFFFFFFF),
            instruction(0x20, 0, 0, 24),
            instruction(0x15, 0, 1, 0xAA00),  # USERFAULTFD_IOC_NEW
            instruction(0x06, 0, 0, refused),
            instruction(0x06, 0, 0, 0x7FFF0000),  # allow
        ]
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    no_new_privileges()
    _done(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0))


# ---- what is missing ----


def own_mounts() -> None:
    """From here on nobody else sees this process's mounts."""
    _done(_libc.unshare(_CLONE_NEWNS))
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def own_device(mode: int, group: int = 0) -> None:
    """/dev/userfaultfd with that mode and group, for this process only."""
    folder = tempfile.mkdtemp()
    _mount("none", folder, "tmpfs", 0)
    node = os.path.join(folder, "userfaultfd")
    os.mknod(node, 0o020000 | mode, os.stat(DEVICE).st_rdev)
    os.chmod(node, mode)
    os.chown(node, 0, group)
    _mount(node, DEVICE, None, _MS_BIND)
    _done(_libc.umount2(folder.encode(), 2))
    os.rmdir(folder)


def without(path: str) -> None:
    """An empty folder, which cannot be written to, in place of this one."""
    _mount("none", path, "tmpfs", _MS_RDONLY)


def no_device() -> None:
    """/dev as containers have it, as far as we need it."""
    _mount("none", "/dev", "tmpfs", 0)
    os.mknod("/dev/null", 0o020666, os.makedev(1, 3))
    os.chmod("/dev/null", 0o666)


def read_only(path: str = "/") -> None:
    """Nothing can be written below `path`, mounts below it included."""
    for mounted in {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}:
        if Path(mounted).is_relative_to(path) and not mounted.startswith(("/proc", "/sys", "/dev")):
            _mount("none", mounted, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)


# ---- an interpreter for everybody ----


def prefix(user: int = NOBODY) -> tuple[str, ...]:
    """What to put before a command of this interpreter, so that an ordinary user runs it, or (0) root does.

    Where a folder above the interpreter or a module is closed to others, it is covered by one that holds just
    what is needed, under the very same path, in a mount namespace of the command's own.
    """
    lines = ["set -e"]
    covered: set[Path] = set()
    needed = {Path(sys.base_prefix), Path(sys.prefix), Path.cwd(), *(Path(p) for p in sys.path if p)}
    for path in sorted({path.resolve() for path in needed if path.exists()}):
        closed = next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)
        if closed is None or any(path.is_relative_to(other) for other in covered):
            continue
        number = 3 + len(covered)  # sh knows those of one digit
        covered.add(path)
        lines.insert(1, f"exec {number}<{shlex.quote(str(path))}")
        if f"cover {closed}" not in lines:
            lines.append(f"cover {closed}")
        lines += [
            f"mkdir -p {shlex.quote(str(path))}",
            f"mount -c --bind /proc/self/fd/{number} {shlex.quote(str(path))}",
            f"exec {number}<&-",
        ]
    script = 'cover() { mount -t tmpfs -o mode=755 none "$1"; }\n' + "\n".join(lines)
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups") if user else ()
    return (
        "unshare", "--mount", "--propagation", "private", "sh", "-c",
        script + '\ncd "$0" && exec "$@"', str(Path.cwd()), *become,
    )  # fmt: skip
