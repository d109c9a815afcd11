# SPDX-License-Identifier: Apache-2.0
"""Whom a pager serves, with what, and how much of it: it reads with rights that others have not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem._native import CODES
from lazymem.paging import wire
from lazymem.paging.wire import Ask
from tests import users
from tests.children import check_child
from tests.pagers import Raw, refusal, running

#: Of a snapshot; of the pager itself: -EACCES.
DENIED = next(code for code, name in CODES.items() if name == "DENIED")
pytestmark = pytest.mark.needs_userfaultfd


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may go into; pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="lazymem-access-") as folder:
        Path(folder).chmod(0o755)
        yield Path(os.path.realpath(folder))


@pytest.fixture
def allowed(place: Path, snapshot_path: Path) -> Path:
    copy = place / "allowed.lzm"
    shutil.copy(snapshot_path, copy)
    copy.chmod(0o644)
    return copy


def opened(url: object, **more: object) -> Ask:
    return Ask(wire.OPEN, id=7, payload=json.dumps({"url": str(url), **more}).encode())


def test_socket_is_open_to_those_who_may_connect(place: Path) -> None:
    for options, mode in (((), 0o600), (("--allow-uid", 5), 0o666), (("--any-user",), 0o666)):
        with running(place / "pager", *options):
            assert stat.S_IMODE((place / "pager").stat().st_mode) == mode
    with running(place / "pager", "--any-user"), running(place / "pager", "--take-over"):
        assert stat.S_IMODE((place / "pager").stat().st_mode) == 0o600


def test_listed_snapshots_are_all_that_anybody_gets(allowed: Path, place: Path, snapshot_path: Path) -> None:
    (place / "link").symlink_to(allowed)
    with running(place / "pager", "--snapshot", allowed) as pager, contextlib.ExitStack() as stack:
        for url, code in (
            (allowed, 0),
            (place / "link", 0),
            (f"file://{allowed}", 0),
            (snapshot_path, DENIED),
        ):
            answer = stack.enter_context(Raw(place / "pager")).ask(opened(url))
            assert answer.code == code, (url, answer)
            assert code == 0 or f"start it with --snapshot {url}" in answer.text
        # What a link led to when it was looked at is what was opened: whose link it is may change it.
        assert [one["url"] for one in pager.status()["snapshots"]] == [str(allowed)]


def test_more_clients_and_memory_than_may_be_are_refused(allowed: Path, place: Path) -> None:
    other = place / "other.lzm"
    shutil.copy(allowed, other)
    limits = ("--max-clients", 2, "--memory", "32M")
    with running(place / "pager", *limits) as pager, Raw(place / "pager") as first:
        assert first.ask(opened(allowed)).code == 0
        with Raw(place / "pager") as second:
            refused = second.ask(opened(other))
            assert refused.code == -12
            assert "takes 24117248 bytes, and the pager may have 33554432" in refused.text
            with Raw(place / "pager") as third:
                answer = third.ask(Ask(wire.HELLO))
                assert answer.code < 0
                assert "2 clients already; raise its --max-clients" in answer.text
                assert third.is_over()
            assert pager.status()["pid"] == pager.process.pid  # who looks is no client
            check_child(
                """
                import sys
                import lazymem
                try:
                    lazymem.open(sys.argv[1], pager=sys.argv[2])
                except lazymem.PagerUnavailable as error:
                    assert "raise its --max-clients" in str(error), error
                else:
                    raise AssertionError
                """,
                allowed,
                place / "pager",
            )
        check_child(
            """
            import sys
            import lazymem
            try:
                lazymem.open(sys.argv[1], pager=sys.argv[2])
            except lazymem.OutOfMemory as error:
                assert "raise its --memory" in str(error), error
            else:
                raise AssertionError
            """,
            other,
            place / "pager",
        )


#: As another user: what is refused, in what words.
STRANGER = """
import json, sys
import lazymem
from lazymem.paging import client, wire
from lazymem.paging.wire import Ask
pager, url, other, plain = sys.argv[1:5]

def asked(*questions):
    try:
        connection = client.connect(pager)
        for kind, payload in questions:
            answer, _ = client.ask(connection, pager, Ask(kind, id=1, payload=json.dumps(payload).encode()))
        return answer.code, answer.text
    except lazymem.PagerUnavailable as error:
        return "unavailable", str(error)

print(json.dumps({
    "hello": asked((wire.HELLO, {})),
    "open": asked((wire.OPEN, {"url": url})),
    "other": asked((wire.OPEN, {"url": other})),
    "options": asked((wire.OPEN, {"url": url, "storage_options": {"cache": "/tmp/x"}})),
    "usual chunks": asked((wire.OPEN, {"url": plain, "chunk_size": 2 << 20})),
    "other chunks": asked((wire.OPEN, {"url": plain, "chunk_size": 1 << 20})),
    "status": asked((wire.STATUS, {})),
    "take over": asked((wire.TAKE_OVER, {"step": "look", "version": 1})),
}))
"""


def stranger(*arguments: object) -> dict[str, tuple[object, str]]:
    return dict(json.loads(check_child(STRANGER, *arguments, prefix=users.prefix())))


def test_other_users_get_what_they_were_given_and_no_more(allowed: Path, place: Path) -> None:
    users.demand()
    secret = place / "secret.lzm"
    shutil.copy(allowed, secret)
    secret.chmod(0o600)
    plain = place / "plain"
    plain.write_bytes(bytes(5000))
    pager = place / "pager"
    with running(pager):  # the kernel refuses them
        found = stranger(pager, allowed, secret, plain)
        assert all(code == "unavailable" and "Permission denied" in text for code, text in found.values())
        pager.chmod(0o666)  # if it is opened by hand, the pager refuses them
        found = stranger(pager, allowed, secret, plain)
        assert all(code == -13 and "--allow-uid 65534" in text for code, text in found.values())
    with running(pager, "--allow-uid", users.NOBODY):
        found = stranger(pager, allowed, secret, plain)
        assert found["hello"][0] == 0
        assert found["open"][0] == DENIED
        assert f"start it with --snapshot {allowed}" in found["open"][1]
        assert found["other"][0] == DENIED
    for option in (("--allow-uid", users.NOBODY), ("--any-user",)):
        with running(pager, *option, "--snapshot", allowed, "--snapshot", plain):
            found = stranger(pager, allowed, secret, plain)
            assert [found["hello"][0], found["open"][0]] == [0, 0]
            assert found["other"][0] == DENIED
            assert "serves other snapshots" in found["other"][1]
            assert found["options"][0] == DENIED
            assert "leave storage_options out" in found["options"][1]
            assert found["usual chunks"][0] == 0
            assert found["other chunks"][0] == DENIED  # each size is one more copy in the pager's memory
            assert "leave chunk_size out" in found["other chunks"][1]
            assert found["status"][0] == -13
            assert "its own user and root" in found["status"][1]
            assert found["take over"][0] == -13
            assert "its own user only" in found["take over"][1]


def test_not_even_root_takes_over_a_pager_that_would_say_what_to_open(place: Path) -> None:
    users.demand()
    place.chmod(0o777)
    with running(place / "pager", prefix=users.prefix()) as pager:
        status, err = refusal(place / "pager", "--take-over")
        assert (status, err.count("\n")) == (3, 1), err
        assert f"is user {users.NOBODY}'s; only that user can take it over" in err
        assert pager.status()["pid"] == pager.process.pid


#: An ordinary user reads all of it, by touches or by system calls.
READER = """
import os, sys
import lazymem
url, pager, full = sys.argv[1:]
assert os.getuid() == 65534
snap = lazymem.open(url, pager=pager)
null = os.memfd_create("sink")
name = next(iter(snap))
try:
    array = snap[name]
    os.write(null, memoryview(array).cast("B"))
    assert full == "full", "a system call touched what only a full userfaultfd serves"
except OSError as error:
    assert (full, error.errno) == ("user-only", 14), (full, error)
    said = lazymem.explain(error)
    assert "of which its pager knows how many are populated" in said, said
    assert "in user mode only, so a system call that meets an unpopulated page fails" in said, said
    assert "lazymem.populate(array)" in said and "--pass-device" in said, said
    assert f"array {name!r}" in said, said
assert ("system calls work" in lazymem.explain(array)) == (full == "full")
with lazymem.open(url, pager=pager) as other:
    other.prefetch(wait=True)  # what is in memory is anybody's to touch
    os.write(null, other.buffer)
with lazymem.open(url, backend="eager") as whole:
    for name in whole:
        assert snap[name].tobytes() == whole[name].tobytes()
"""


def test_device_gives_ordinary_users_touches_by_system_calls(allowed: Path, place: Path) -> None:
    users.demand()
    with users.sysctl_held() as setting:
        if setting.read_text().strip() != "0":
            pytest.skip("here every user has full userfaultfds")
        for options, what in (((), "user-only"), (("--pass-device",), "full")):
            with running(place / "pager", "--any-user", "--snapshot", allowed, *options):
                check_child(READER, allowed, place / "pager", what, prefix=users.prefix())
