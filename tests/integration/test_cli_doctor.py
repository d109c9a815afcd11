# SPDX-License-Identifier: Apache-2.0
"""`lazymem doctor` where more and less is allowed, and that opening then does what doctor says."""

from __future__ import annotations

import errno
import json
import os
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
from lazymem.ways.place import Place

from .. import users
from ..children import check_child

# Before lazymem is imported.
REFUSE = """
from tests.users import refuse_userfaultfd
refuse_userfaultfd()
"""

# After all imports: the interpreter itself may lie where nobody may not look.
BECOME_NOBODY = """
import lazymem.cli, lazymem.doctor
from tests.users import become
lazymem.doctor.examine()
become()
"""

REPORT = """
import json, dataclasses, lazymem, lazymem.doctor, numpy as np
snap = lazymem.open(SNAPSHOT)
report = dataclasses.asdict(lazymem.doctor.examine())
opened = {"backend": snap.backend, "right": bool((snap["x"] == np.arange(300_000)).all())}
print(json.dumps({"report": report, "opened": opened}))
"""


@pytest.fixture(autouse=True)
def taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor is about the way that "auto" takes, whichever the suite is told to take."""
    monkeypatch.setenv("LAZYMEM_BACKEND", "auto")


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
    not users.KNOWN_MACHINE, reason="the filter knows two machines' system calls by number"
)


def test_doctor_names_the_backend_that_open_takes(snapshot: str) -> None:
    result = json.loads(child(REPORT, snapshot=snapshot))
    assert result["opened"] == {"backend": result["report"]["backend"], "right": True}


@needs_bpf
def test_doctor_under_a_seccomp_filter_says_sigsegv_and_so_opens_with_right_bytes(snapshot: str) -> None:
    result = json.loads(child(REFUSE, REPORT, snapshot=snapshot))
    report = result["report"]
    assert result["opened"] == {"backend": "sigsegv", "right": True}
    assert report["backend"] == "sigsegv"
    assert [way["name"] for way in report["ways"] if way["usable"]] == ["sigsegv"]
    assert {way["errno"] for way in report["ways"][:3]} <= {"EPERM", "EACCES", "ENOENT"}
    assert "seccomp" in report["change"]["command"] or "userfaultfd" in report["change"]["command"]
    assert any("EFAULT" in text for text in report["cannot"])
    assert any("faulthandler" in text and "before open()" in text for text in report["cannot"])
    assert {"name": "seccomp filter", "value": "yes", "remark": "may hide system calls"} in report["machine"]


@needs_bpf
def test_doctor_prints_the_whole_story_under_a_seccomp_filter(snapshot: str) -> None:
    text = child(REFUSE, "from lazymem.cli import run\nassert run(['doctor']) == 0\n", snapshot=snapshot)
    for part in ("sigsegv", "EPERM", "What would change it", "vm.max_map_count", "zstd"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text


@needs_bpf
def test_auto_reads_at_open_where_the_way_by_signals_lacks_room_for_its_file(snapshot: str) -> None:
    """`ulimit -f` counts memory of memfd_create(2), which only that way needs."""
    code = """
import resource, lazymem, lazymem.doctor, numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
snap = lazymem.open(SNAPSHOT)
print(snap.backend, bool((snap["x"] == np.arange(300_000)).all()))
try:
    lazymem.open(SNAPSHOT, backend="sigsegv")
except lazymem.BackendUnavailable as error:
    print("ulimit -f" in str(error), "File too large" in str(error), SNAPSHOT in str(error))
print([fact.value for fact in lazymem.doctor.examine().limits if "ulimit -f" in fact.name])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 200_000))
print("ulimit -f" in lazymem.doctor.examine().reason)
"""
    said = child(REFUSE, code, snapshot=snapshot)
    assert said == "eager True\nTrue True True\n['200,000']\nTrue\n"


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


def examine_on(
    monkeypatch: pytest.MonkeyPatch, ways: tuple[WayReport, ...], signals: int = 0, **given: Any
) -> doctor.Report:
    facts: dict[str, Any] = {
        "kernel": (6, 12),
        "container": "",
        "filtered": False,
        "service": False,
        "device": True,
        "opens": False,
        "sysctl": "0",
        "user": "ann",
        "group": "staff",
        "root": False,
        "nobody": False,
        "outside": "",
        **given,
    }
    monkeypatch.setattr("lazymem._native.probe", lambda: ways)
    monkeypatch.setattr("lazymem._native.probe_sigsegv", lambda: signals)
    monkeypatch.setattr("lazymem.ways.look_around", lambda: Place(**facts))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return doctor.examine()


def ways(device: int, syscall: int, user: int, operations: tuple[str, ...] = ALL) -> tuple[WayReport, ...]:
    return tuple(
        WayReport(name, number, 0, () if number else operations)
        for name, number in (("device", device), ("syscall", syscall), ("user-only", user))
    )


NEW = {"device": False}  # neither made by udev nor handed in
OLD = {"device": False, "kernel": (5, 15)}
POD = {"device": False, "container": "kubernetes", "filtered": True}
DOCKER = {"device": False, "container": "docker", "filtered": True}
EACCES, EPERM, ENOENT, ENOSYS = errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSYS
SYSCTL = "sudo sysctl -w vm.unprivileged_userfaultfd=1"
UNCONFINED = "--security-opt seccomp=unconfined"


@pytest.mark.parametrize(
    ("refused", "place", "command"),
    [
        ((EACCES, EPERM, 0), {"user": "ann b"}, "sudo setfacl -m u:'ann b':rw /dev/userfaultfd"),
        ((EACCES, EPERM, 0), {"outside": "100000"}, "sudo chown 100000 /dev/userfaultfd"),
        ((EACCES, EPERM, 0), {"nobody": True}, SYSCTL),  # what is given to nobody, many have
        ((ENOENT, EPERM, 0), NEW, SYSCTL),
        ((ENOENT, EPERM, 0), OLD, SYSCTL),
        ((ENOENT, EPERM, 0), {**NEW, "filtered": True}, SYSCTL),  # the filter lets it through
        ((ENOENT, EPERM, EPERM), {**NEW, "filtered": True, "service": True}, "SystemCallFilter=userfaultfd"),
        ((ENOENT, EPERM, EPERM), {**NEW, "filtered": True},
         "allow userfaultfd in the seccomp filter of what starts this process"),
        ((ENOENT, EPERM, EPERM), {**DOCKER, "root": True}, "docker run --device /dev/userfaultfd ..."),
        ((ENOENT, ENOSYS, ENOSYS), {**DOCKER, "root": True, "container": "podman"},
         "podman run --device /dev/userfaultfd ..."),
        ((ENOENT, EPERM, EPERM), DOCKER,
         "sudo chmod 0666 /dev/userfaultfd && docker run --device /dev/userfaultfd ..."),
        ((ENOENT, EPERM, EPERM), {**DOCKER, "kernel": (5, 15)},
         f"docker run --user root {UNCONFINED} --cap-add SYS_PTRACE ..."),
        ((EPERM, EPERM, EPERM), {**DOCKER, "device": True, "opens": True},
         f"docker run --user root {UNCONFINED} --cap-add SYS_PTRACE ..."),
        ((EACCES, EPERM, EPERM), {**DOCKER, "device": True},
         "docker exec --user root CONTAINER chmod 0666 /dev/userfaultfd"),
        ((ENOENT, EPERM, EPERM), {**POD, "root": True},
         "securityContext: {seccompProfile: {type: Unconfined}, capabilities: {add: [SYS_PTRACE]}}"),
        ((ENOENT, EPERM, EPERM), POD, "securityContext: {seccompProfile: {type: Unconfined}}"),
        ((ENOENT, EPERM, 0), {**POD, "filtered": False}, SYSCTL),
        ((EACCES, EPERM, 0), {**POD, "device": True}, "sudo chmod 0666 /dev/userfaultfd"),
        ((ENOENT, ENOSYS, ENOSYS), NEW, "a kernel built with CONFIG_USERFAULTFD=y"),
        ((ENOENT, EPERM, EPERM), {**NEW, "sysctl": "1"},
         "allow userfaultfd in the policy of the security module"),
    ],
)  # fmt: skip
def test_advice_is_the_one_change_that_helps_there(
    monkeypatch: pytest.MonkeyPatch, refused: tuple[int, int, int], place: dict[str, Any], command: str
) -> None:
    report = examine_on(monkeypatch, ways(*refused), **place)
    assert report.change is not None
    assert report.change.command == command
    lazy_for_code = report.change.gain == "touches by your code are lazy"
    assert lazy_for_code == (place == POD)  # to a pod's ordinary user nothing gives more
    assert all(os.strerror(number) in report.reason for number in refused if number)


def test_advice_without_setfacl_is_the_users_group(monkeypatch: pytest.MonkeyPatch) -> None:
    examine_on(monkeypatch, ways(errno.EACCES, errno.EPERM, 0))
    monkeypatch.setattr("shutil.which", lambda name: None)
    change = doctor.examine().change
    assert change is not None
    assert change.command == "sudo chgrp staff /dev/userfaultfd && sudo chmod 0660 /dev/userfaultfd"


def test_doctor_survives_an_environment_that_makes_opening_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYMEM_TIMEOUT", "soon")
    assert any("LAZYMEM_TIMEOUT" in fact.remark for fact in doctor.examine().stores)


def test_advice_is_absent_where_nothing_is_to_be_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(errno.ENOENT, 0, 0))
    assert (report.backend, report.way, report.install) == ("uffd", "userfaultfd(2)", "copy")
    assert report.change is None
    assert report.cannot == ()


def test_way_that_opens_but_lacks_an_operation_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(0, 0, 0, operations=("copy", "wake")))
    assert report.backend == "sigsegv"
    assert "does not zeropage" in report.ways[0].refusal


def test_where_no_touch_can_be_lazy_eager_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_on(monkeypatch, ways(errno.ENOENT, errno.ENOSYS, errno.ENOSYS), signals=errno.EPERM)
    assert (report.backend, report.way, report.install) == ("eager", None, "none")
    assert "memfd_create" in report.reason
    assert any("reads all" in text for text in report.cannot)


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
    assert any("LAZYMEM_BACKEND is 'magic'; it must be one of" in note for note in doctor.examine().notes)


def test_doctor_says_when_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYMEM_BACKEND", "eager")
    assert any("LAZYMEM_BACKEND" in note and "'eager'" in note for note in doctor.examine().notes)
