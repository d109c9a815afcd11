# SPDX-License-Identifier: Apache-2.0
"""`lazymem doctor` where more and less is allowed, and that opening then does what doctor says."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import lazymem
from lazymem import doctor
from lazymem._native import WayReport
from lazymem.cli import run

from ..children import check_child

# Before lazymem is imported: from now on this process gets EPERM from userfaultfd(2) and from the
# device's ioctl. A classic BPF program over struct seccomp_data: nr at 0, args[1] at 24.
REFUSE = """
import ctypes, platform, struct
def op(code, jt, jf, k):
    return struct.pack("<HBBI", code, jt, jf, k)
number, ioctl = {"x86_64": (323, 16), "aarch64": (282, 29)}[platform.machine()]
program = b"".join([
    op(0x20, 0, 0, 0),            # A = nr
    op(0x15, 3, 0, number),       # userfaultfd: refuse
    op(0x15, 0, 3, ioctl),        # not ioctl: allow
    op(0x20, 0, 0, 24),           # A = its request
    op(0x15, 0, 1, 0xAA00),       # not USERFAULTFD_IOC_NEW: allow
    op(0x06, 0, 0, 0x00050001),   # EPERM
    op(0x06, 0, 0, 0x7FFF0000),   # allow
])
held = ctypes.create_string_buffer(program, len(program))
class Prog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
prog = Prog(len(program) // 8, ctypes.addressof(held))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0        # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(prog), 0, 0) == 0  # PR_SET_SECCOMP, filter
"""

# After all imports: the interpreter itself may lie where nobody may not look.
BECOME_NOBODY = """
import os, lazymem, lazymem.cli, lazymem.doctor
lazymem.doctor.examine()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""

REPORT = """
import json, dataclasses, lazymem, lazymem.doctor, numpy as np
snap = lazymem.open(SNAPSHOT)
report = dataclasses.asdict(lazymem.doctor.examine())
opened = {"backend": snap.backend, "right": bool((snap["x"] == np.arange(300_000)).all())}
print(json.dumps({"report": report, "opened": opened}))
"""


@pytest.fixture
def snapshot() -> Iterator[str]:
    # Not tmp_path: that lies in a folder which only its owner may enter.
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    path = os.path.join(folder, "x.lzm")
    lazymem.build({"x": np.arange(300_000)}, path)
    yield path
    shutil.rmtree(folder)


def child(*parts: str, snapshot: str) -> str:
    return check_child(f"SNAPSHOT = {snapshot!r}\n" + "".join(parts))


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
needs_bpf = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the filter knows these two machines' numbers"
)


def test_doctor_names_the_backend_that_open_takes(snapshot: str) -> None:
    result = json.loads(child(REPORT, snapshot=snapshot))
    assert result["opened"] == {"backend": result["report"]["backend"], "right": True}


@needs_bpf
def test_doctor_under_a_seccomp_filter_says_eager_and_open_is_eager_with_right_bytes(snapshot: str) -> None:
    result = json.loads(child(REFUSE, REPORT, snapshot=snapshot))
    report = result["report"]
    assert result["opened"] == {"backend": "eager", "right": True}
    assert report["backend"] == "eager"
    assert report["way"] is None
    assert not any(way["usable"] for way in report["ways"])
    assert {way["errno"] for way in report["ways"]} <= {"EPERM", "EACCES", "ENOENT"}
    assert "docker" in report["change"]["command"] or "userfaultfd" in report["change"]["command"]
    assert any("reads all" in text for text in report["cannot"])
    assert {"name": "seccomp filter", "value": "yes", "remark": "may hide system calls"} in report["machine"]


@needs_bpf
def test_doctor_prints_the_whole_story_under_a_seccomp_filter(snapshot: str) -> None:
    text = child(REFUSE, "from lazymem.cli import run\nassert run(['doctor']) == 0\n", snapshot=snapshot)
    for part in ("eager", "EPERM", "What would change it", "vm.max_map_count", "zstd"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text


@needs_root
def test_doctor_of_an_ordinary_user_names_the_one_command(snapshot: str) -> None:
    result = json.loads(child(BECOME_NOBODY, REPORT, snapshot=snapshot))
    report = result["report"]
    assert result["opened"] == {"backend": report["backend"], "right": True}
    if report["backend"] == "uffd":
        pytest.skip("this machine lets every user have a full userfaultfd")
    assert report["backend"] == "uffd-user"
    assert report["change"]["command"]
    assert any("EFAULT" in text for text in report["cannot"])
    # nobody stands for many users: what is given to it, each of them has.
    assert "nobody" not in report["change"]["command"]


TOUCH_FROM_THE_KERNEL = """
import errno, os, lazymem
snap = lazymem.open(SNAPSHOT, backend="uffd-user")
reader, writer = os.pipe()
try:
    os.write(writer, snap.buffer[:4096])
    first = "written"
except OSError as error:
    first = errno.errorcode[error.errno]
snap.prefetch(wait=True)
print(first, os.write(writer, snap.buffer[:4096]))
"""


def test_user_only_touch_from_the_kernel_is_efault_until_prefetched_as_doctor_says(snapshot: str) -> None:
    if not doctor.examine().ways[2].usable:
        pytest.skip("no userfaultfd in user mode here")
    assert child(TOUCH_FROM_THE_KERNEL, snapshot=snapshot) == "EFAULT 4096\n"


# ---- advice, machine by machine ----

ALL = ("copy", "zeropage", "wake", "poison", "move")


def examine_on(monkeypatch: pytest.MonkeyPatch, ways: tuple[WayReport, ...], **place: Any) -> doctor.Report:
    facts: dict[str, Any] = {
        "kernel": (6, 12),
        "container": False,
        "filtered": False,
        "service": False,
        "device": True,
        "sysctl": "0",
        "user": "ann",
        "group": "staff",
        "nobody": False,
        **place,
    }
    monkeypatch.setattr("lazymem._native.probe", lambda: ways)
    monkeypatch.setattr(doctor, "_look_around", lambda: doctor._Place(**facts))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return doctor.examine()


def ways(device: int, syscall: int, user: int, operations: tuple[str, ...] = ALL) -> tuple[WayReport, ...]:
    return tuple(
        WayReport(name, number, 0, () if number else operations)
        for name, number in (("device", device), ("syscall", syscall), ("user-only", user))
    )


def test_advice_for_a_device_that_the_user_may_not_open_is_one_setfacl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = examine_on(monkeypatch, ways(errno.EACCES, errno.EPERM, 0), user="ann b")
    assert report.backend == "uffd-user"
    assert report.change is not None
    assert report.change.command == "sudo setfacl -m u:'ann b':rw /dev/userfaultfd"
    assert "/dev/userfaultfd: Permission denied" in report.reason


def test_advice_without_setfacl_is_the_users_group(monkeypatch: pytest.MonkeyPatch) -> None:
    examine_on(monkeypatch, ways(errno.EACCES, errno.EPERM, 0))
    monkeypatch.setattr("shutil.which", lambda name: None)
    change = doctor.examine().change
    assert change is not None
    assert change.command == "sudo chgrp staff /dev/userfaultfd && sudo chmod 0660 /dev/userfaultfd"


def test_advice_for_nobody_gives_nobody_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(errno.EACCES, errno.EPERM, 0), user="nobody", nobody=True)
    assert report.change is not None
    assert report.change.command == "sudo sysctl -w vm.unprivileged_userfaultfd=1"


def test_advice_without_a_device_is_the_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(errno.ENOENT, errno.EPERM, 0), device=False, kernel=(5, 15))
    assert report.change is not None
    assert report.change.command == "sudo sysctl -w vm.unprivileged_userfaultfd=1"


def test_advice_in_a_container_is_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ways(errno.ENOENT, errno.EPERM, errno.EPERM)
    report = examine_on(monkeypatch, refused, device=False, container=True, filtered=True)
    assert report.backend == "eager"
    assert report.change is not None
    assert report.change.command == "docker run --device /dev/userfaultfd ..."


def test_advice_is_absent_where_nothing_is_to_be_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(errno.ENOENT, 0, 0))
    assert (report.backend, report.way, report.install) == ("uffd", "userfaultfd(2)", "copy")
    assert report.change is None
    assert report.cannot == ()


def test_way_that_opens_but_lacks_an_operation_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(0, 0, 0, operations=("copy", "wake")))
    assert report.backend == "eager"
    assert "does not zeropage" in report.ways[0].refusal


def test_old_kernel_without_move_and_poison_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(0, 0, 0, operations=("copy", "zeropage", "wake")))
    assert (report.backend, report.install) == ("uffd", "copy")
    assert len(report.cannot) == 2


def test_doctor_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == set(doctor.Report.__dataclass_fields__)
    assert {"lazymem", "python", "numpy", "zstandard"} <= {name for name, _ in report["versions"]}


def test_doctor_reports_a_wrong_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYMEM_BACKEND", "magic")
    assert any("'magic'" in note and "must be one of" in note for note in doctor.examine().notes)


def test_doctor_says_when_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYMEM_BACKEND", "eager")
    assert any("LAZYMEM_BACKEND" in note and "'eager'" in note for note in doctor.examine().notes)
