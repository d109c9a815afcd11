# SPDX-License-Identifier: Apache-2.0
"""`change_for`: the one command, flag or setting that gives a better way to lazy memory, and what it gains.

Some facts that the advice rests on:
- The device needs its file's permissions and nothing else. It came with Linux 6.1; containers are given it
  one by one, with the mode that it has outside.
- The system call needs vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE of the first user namespace, which
  root of another one has not got. For user mode only it needs neither: who is refused even that meets a
  seccomp filter, and who is refused only the rest does not.
- Seccomp filters of containers refuse the system call and know nothing of the device.
- Capabilities that a pod or `docker run` adds are root's.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from .place import DEVICE, KUBERNETES, SYSCTL, Place

#: What a seccomp filter answers.
_FORBIDDEN: Final = ("EPERM", "ENOSYS")
#: What a backend gives that can be had by a change.
GAINS: Final = {
    "uffd": "every touch is lazy, those of the kernel too",
    "uffd-user": "touches by your code are lazy",
}


@dataclass(frozen=True, slots=True)
class Change:
    """The one thing to change. command: for a shell, or flags or settings of what starts this process."""

    gain: str
    command: str
    remark: str


class Tried(Protocol):
    """What the advice wants to know of a way: its name, and which errno it ended with."""

    @property
    def usable(self) -> bool: ...
    @property
    def errno(self) -> str | None: ...


Ways = Mapping[str, Tried]


def change_for(backend: str, place: Place, ways: Ways) -> Change:
    """The narrowest single change that gives `backend`, which is "uffd" or "uffd-user", and is refused.

    It may gain less where nothing else lies in the hands of whoever started this process.
    """
    gained = backend
    if backend == "uffd-user":
        command, remark = _for_user_mode(place, ways)
    elif place.container == KUBERNETES and not place.root and _is_filtered(place, ways):
        gained, (command, remark) = "uffd-user", _security_context()
    else:
        command, remark = _for_all_faults(place, ways)
    return Change(GAINS[gained], command, remark)


def _for_all_faults(place: Place, ways: Ways) -> tuple[str, str]:
    if ways["device"].errno == "EACCES" and (place.container or not place.nobody):
        return _device_for_user(place)
    if place.container == KUBERNETES:
        return _security_context("SYS_PTRACE") if place.root else _sysctl("on the node")
    if place.container:
        return _container(place, ways)
    if _is_filtered(place, ways):
        return _filter(place)
    if ways["syscall"].errno == "EPERM" and (place.sysctl != "1" or ways["user-only"].usable):
        return _sysctl("for all users")
    return _kernel(ways["syscall"])


def _for_user_mode(place: Place, ways: Ways) -> tuple[str, str]:
    if ways["user-only"].errno in _FORBIDDEN:
        if place.container == KUBERNETES:
            return _security_context()
        if place.container:
            return (
                f"{place.container} run --security-opt seccomp=unconfined ...",
                "or seccomp=PROFILE.json with a profile that allows userfaultfd",
            )
        if place.filtered:
            return _filter(place)
    return _kernel(ways["user-only"])


def _is_filtered(place: Place, ways: Ways) -> bool:
    return place.filtered and ways["user-only"].errno in _FORBIDDEN


# ---- the changes: each a command, and a remark ----


def _device_for_user(place: Place) -> tuple[str, str]:
    lasts = "until the next boot; a udev rule makes it last"
    if place.outside:
        return f"sudo chown {place.outside} {DEVICE}", f"outside of this user namespace; {lasts}"
    if place.container == KUBERNETES:
        return f"sudo chmod 0666 {DEVICE}", f"on the node, before the pod starts; {lasts}"
    if place.container:
        return (
            f"{place.container} exec --user root CONTAINER chmod 0666 {DEVICE}",
            "for as long as the container is there",
        )
    if shutil.which("setfacl"):
        return f"sudo setfacl -m u:{shlex.quote(place.user)}:rw {DEVICE}", f"for this user, {lasts}"
    group = shlex.quote(place.group)
    return (
        f"sudo chgrp {group} {DEVICE} && sudo chmod 0660 {DEVICE}",
        f"for all of the group {place.group}, {lasts}",
    )


def _container(place: Place, ways: Ways) -> tuple[str, str]:
    program, with_device = place.container, f"--device {DEVICE} ..."
    both = _is_filtered(place, ways) and place.opens and ways["device"].errno in _FORBIDDEN
    if place.kernel < (6, 1) or both:  # the filter knows the device, too
        return (
            f"{program} run{'' if place.root else ' --user root'} --security-opt seccomp=unconfined "
            "--cap-add SYS_PTRACE ...",
            "or seccomp=PROFILE.json with a profile that allows userfaultfd",
        )
    if place.root:
        return f"{program} run {with_device}", "needs no other right"
    return (
        f"sudo chmod 0666 {DEVICE} && {program} run {with_device}",
        "the container's device gets the mode of this machine's",
    )


def _security_context(*capabilities: str) -> tuple[str, str]:
    add = f", capabilities: {{add: [{', '.join(capabilities)}]}}" if capabilities else ""
    return (
        f"securityContext: {{seccompProfile: {{type: Unconfined}}{add}}}",
        "in the container's part of the pod; or a profile of type Localhost that allows userfaultfd",
    )


def _filter(place: Place) -> tuple[str, str]:
    if place.service:
        return "SystemCallFilter=userfaultfd", "in the [Service] section of the unit; then restart it"
    return (
        "allow userfaultfd in the seccomp filter of what starts this process",
        "a filter cannot be taken off from within",
    )


def _sysctl(whom: str) -> tuple[str, str]:
    return (
        f"sudo sysctl -w {SYSCTL}=1",
        f"{whom}, until the next boot; a line in /etc/sysctl.d makes it last",
    )


def _kernel(way: Tried) -> tuple[str, str]:
    if way.errno == "EPERM":
        return "allow userfaultfd in the policy of the security module", "the audit log names it"
    return "a kernel built with CONFIG_USERFAULTFD=y", "Linux 5.11 or later, 6.8 or later is best"
