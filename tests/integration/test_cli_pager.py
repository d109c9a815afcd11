# SPDX-License-Identifier: Apache-2.0
"""`lazymem pager`: how one starts and ends, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket as sockets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import lazymem
from lazymem.cli import run
from lazymem.pager.listening import listen_at
from tests.children import check_child
from tests.pagers import Pager, line_of, refusal, running

pytestmark = pytest.mark.needs_userfaultfd
Capture = pytest.CaptureFixture[str]

#: Opens, reads a part, has a child, says so, and stays until it is told to go.
HOLDER = """
import os, sys
import lazymem
snap = lazymem.open(sys.argv[1], pager=sys.argv[2])
first = next(iter(snap))
snap[first].copy()
child = os.fork()
if not child:
    sys.stdin.read()
    os._exit(0)
print("open", flush=True)
sys.stdin.read()
os.waitpid(child, 0)
snap.close()
"""


@pytest.fixture(scope="module")
def pager(tmp_path_factory: pytest.TempPathFactory, snapshot_path: Path) -> Iterator[Pager]:
    with running(tmp_path_factory.mktemp("pager") / "socket", "--snapshot", snapshot_path) as pager:
        yield pager


@pytest.fixture
def holder(pager: Pager, snapshot_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(snapshot_path), str(pager.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert line_of(process) == "open"
        yield process
    finally:
        process.communicate(timeout=60)


def test_status_shows_clients_children_and_snapshots(
    pager: Pager, holder: subprocess.Popen[str], snapshot_path: Path, capsys: Capture
) -> None:
    assert run(["pager", "status", "--socket", str(pager.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pid"], found["socket"], found["clients"]) == (pager.process.pid, str(pager.path), 1)
    child, own = found["spaces"]
    assert own["client"]["pid"] == holder.pid
    assert own["client"]["uid"] == os.getuid()
    assert own["client"]["url"] == found["snapshots"][0]["url"] == str(snapshot_path)
    assert child["client"] is None
    assert child["parent"] == own["space"]
    assert own["faults"] == found["faults"] > 0
    assert sum(found["latency"]) > 0
    assert 0 < found["snapshots"][0]["resident"] <= found["snapshots"][0]["bytes"]
    assert found["snapshots"][0]["spaces"] == 2

    assert run(["pager", "status", "--socket", str(pager.path)]) == 0
    text = capsys.readouterr().out
    head, latency, *tables = text.splitlines()
    assert head.startswith(f"{pager.path}: process {pager.process.pid}, 1 client, 2 spaces, ")
    assert latency.startswith("  a touch waits ")
    assert latency.endswith(" 99 % of it")
    _, heads, snapshot, _, more_heads, first, second = tables
    assert heads.split()[0] == "SPACES"
    assert more_heads.split()[0] == "SPACE"
    assert snapshot.split()[0] == "2"
    assert snapshot.split()[-1] == str(snapshot_path)
    assert first.split()[-3:] == [str(os.getuid()), str(holder.pid), str(snapshot_path)]
    assert second.split()[-6:] == ["-", "child", "of", "space", str(own["space"]), str(snapshot_path)]


def test_watch_goes_on_until_it_is_interrupted(pager: Pager) -> None:
    shown = subprocess.Popen(
        [sys.executable, "-m", "lazymem", "pager", "status", "--socket", str(pager.path), "--watch"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert str(pager.path) in line_of(shown)
        shown.send_signal(signal.SIGINT)
        _, err = shown.communicate(timeout=60)
        assert (shown.returncode, err) == (130, "lazymem: interrupted\n")
    finally:
        shown.kill()


def test_clients_share_one_copy_and_right_bytes(pager: Pager, snapshot_path: Path) -> None:
    check_child(
        """
        import sys
        import lazymem, numpy as np
        whole = lazymem.open(sys.argv[1], backend="eager")
        one, two = (lazymem.open(sys.argv[1], pager=sys.argv[2]) for _ in range(2))
        for name in whole:
            for snap in (one, two):
                assert snap[name].tobytes() == whole[name].tobytes(), name
        """,
        snapshot_path,
        pager.path,
    )
    assert len(pager.status()["snapshots"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_pager_ends_orderly_and_takes_its_socket_away(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path / "socket") as pager:
        assert pager.out == f"listening at {tmp_path / 'socket'}, process {pager.process.pid}"
        pager.process.send_signal(number)
        assert pager.wait() == (0, "")
        assert os.listdir(tmp_path) == []


def test_pager_leaves_a_socket_that_is_another_ones(tmp_path: Path) -> None:
    with running(tmp_path / "socket") as pager, sockets.socket(sockets.AF_UNIX) as other:
        (tmp_path / "socket").unlink()
        other.bind(str(tmp_path / "socket"))
        assert pager.end() == (0, "")
        assert os.listdir(tmp_path) == ["socket"]


def test_pager_takes_the_place_of_one_that_died(tmp_path: Path) -> None:
    with running(tmp_path / "socket") as pager:
        pager.kill()
        with running(tmp_path / "socket") as next_one:
            assert next_one.status()["pid"] == next_one.process.pid


def test_of_two_that_take_a_dead_ones_place_at_once_one_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "socket")
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    found: list[sockets.socket | lazymem.PagerUnavailable] = []

    def come() -> None:
        try:
            found.append(listen_at(path, sockets.SOCK_SEQPACKET, 0o600))
        except lazymem.PagerUnavailable as error:
            found.append(error)

    second = threading.Thread(target=come)
    unlink = os.unlink

    def unlink_late(name: str) -> None:
        if second.ident is None:
            second.start()
            second.join(0.3)
        unlink(name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink_late)
        come()
        second.join()
    listeners = [one for one in found if isinstance(one, sockets.socket)]
    for one in listeners:
        one.close()
    assert len(listeners) == 1
    assert "a pager listens there already" in str(found)


def test_wrong_paths_are_told_in_one_sentence(pager: Pager, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    stream = tmp_path / "stream"
    with sockets.socket(sockets.AF_UNIX) as other:
        other.bind(str(stream))
        other.listen()
        for path, sentence in {
            pager.path: "a pager listens there already; --take-over takes its clients over",
            file: "is no socket; name another path",
            stream: "is somebody else's socket; name another path",
            tmp_path / "none" / "socket": "cannot listen there: No such file or directory",
            tmp_path / ("x" * 120): "cannot listen there: AF_UNIX path too long",
        }.items():
            with pytest.raises(lazymem.PagerUnavailable, match=re.escape(f"{path}: {sentence}")):
                listen_at(str(path), sockets.SOCK_SEQPACKET, 0o600)
    assert file.read_bytes() == b"precious"


def test_wrong_snapshots_are_errors_at_once(tmp_path: Path, snapshot_path: Path) -> None:
    for options, sentence in (
        (("--snapshot", tmp_path / "none.lzm"), "there is no such file; check the path"),
        (("--snapshot", snapshot_path, "--memory", "1M"), "raise its --memory"),
    ):
        status, err = refusal(tmp_path / "socket", *options)
        assert (status, err.startswith("lazymem: "), err.count("\n")) == (3, True, 1), err
        assert sentence in err
    assert os.listdir(tmp_path) == []


def test_wrong_options_are_usage_errors(capsys: Capture) -> None:
    serve = ["pager", "serve", "--socket", "x"]
    for words in (
        ["pager", "serve"], [*serve, "--allow-uid", "5", "--any-user"], [*serve, "--max-clients", "0"],
        [*serve, "--memory", "much"], ["pager", "status", "--socket", "x", "--json", "--watch"],
    ):  # fmt: skip
        assert run(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_status_without_a_pager_says_how_to_start_one(tmp_path: Path, capsys: Capture) -> None:
    assert run(["pager", "status", "--socket", str(tmp_path / "none")]) == 3
    assert f"`lazymem pager serve --socket {tmp_path / 'none'}`" in capsys.readouterr().err
