# SPDX-License-Identifier: Apache-2.0
"""`look_around`: where this process runs, as far as it decides which advice helps.

Relies on proc(5) and on marks that containers bear; what it cannot read it leaves open, and tries nothing.
"""

from __future__ import annotations

import contextlib
import grp
import os
import platform
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEVICE: Final = "/dev/userfaultfd"
SYSCTL: Final = "vm.unprivileged_userfaultfd"
KUBERNETES: Final = "kubernetes"
_NOBODY: Final = 65534
_EVERYBODY: Final = 2**32 - 1  # users of the first user namespace
#: Files in containers, and who leaves them there. Of a pod's container both kinds may be true.
_CONTAINER_MARKS: Final = (
    ("/run/secrets/kubernetes.io", KUBERNETES),
    ("/run/.containerenv", "podman"),
    ("/.dockerenv", "docker"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What `look_around` found."""

    kernel: tuple[int, int]
    container: str  # which program keeps it, "" if none
    service: bool  # systemd started it
    filtered: bool  # a seccomp filter is installed
    device: bool  # the device node exists
    opens: bool  # and its file mode lets this user open it
    sysctl: str | None
    user: str
    group: str  # its primary one
    root: bool  # of the first user namespace
    nobody: bool  # the user that stands for many: daemons, and whoever a user namespace does not map
    outside: str  # in a user namespace: this user's number outside of it, else ""


def read(path: str) -> str | None:
    """A file of the kernel's without the last line's end, or None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def look_around() -> Place:
    """The facts of this process and this machine. Takes less than a millisecond, raises nothing."""
    parts = (platform.release().replace("-", ".") + ".0.0").split(".")
    number = [int("".join(c for c in part if c.isdigit()) or 0) for part in parts[:2]]
    status = read("/proc/self/status") or ""
    modes = [line.split()[1] for line in status.splitlines() if line.startswith("Seccomp:")]
    uid, gid = os.geteuid(), os.getegid()
    outside = _outside(uid)
    user, group = str(uid), str(gid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    return Place(
        kernel=(number[0], number[1]),
        container=next((name for mark, name in _CONTAINER_MARKS if os.path.exists(mark)), ""),
        service=(read("/proc/self/cgroup") or "").endswith(".service"),
        filtered=modes == ["2"],
        device=os.path.exists(DEVICE),
        opens=os.access(DEVICE, os.R_OK | os.W_OK, effective_ids=True),
        sysctl=read("/proc/sys/" + SYSCTL.replace(".", "/")),
        user=user,
        group=group,
        root=uid == 0 and not outside,
        nobody=uid == _NOBODY,
        outside=outside,
    )


def _outside(uid: int) -> str:
    for line in (read("/proc/self/uid_map") or "").splitlines():
        inside, outer, count = map(int, line.split())
        if count < _EVERYBODY and inside <= uid < inside + count:
            return str(outer + uid - inside)
    return ""
