# SPDX-License-Identifier: Apache-2.0
"""A pager that dies costs its clients no byte, and a client that dies costs the pager nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lazymem

from .. import pagers
from ..children import run_child
from .network import wait_until

KILLS = int(os.environ.get("LAZYMEM_TEST_KILLS", "6"))
PAGES = 1024

#: Says "ready" once it has opened, then does what it is told by the rest of its code.
OPENED = """
import os, signal, sys, threading, time
import numpy as np, lazymem
snapshot = lazymem.open(sys.argv[2], pager=sys.argv[1])
array = snapshot["data"]
raw = np.fromfile(sys.argv[3], np.uint8)
def same(page):
    return np.array_equal(array[page * 4096 : (page + 1) * 4096], raw[page * 4096 : (page + 1) * 4096])
assert same(0)
print("ready", flush=True)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A snapshot, and the raw bytes that it shows."""
    folder = tmp_path_factory.mktemp("files")
    np.random.default_rng(2).integers(0, 256, PAGES * 4096, np.uint8).tofile(folder / "data.raw")
    lazymem.build(folder / "data.raw", folder / "data.lzm", chunk_size=64 << 10)
    return folder / "data.lzm", folder / "data.raw"


def start(
    pager: pagers.Pager, files: tuple[Path, Path], code: str, timeout: float = 60.0
) -> subprocess.Popen[str]:
    """A client that has opened the snapshot and goes on with `code`."""
    client = subprocess.Popen(
        [sys.executable, "-c", OPENED + textwrap.dedent(code), str(pager.path), *map(str, files)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        env={**os.environ, "LAZYMEM_PAGER_TIMEOUT": str(timeout)},
    )  # fmt: skip
    assert pagers.line_of(client) == "ready"
    return client


def is_served(pager: pagers.Pager, client: subprocess.Popen[str]) -> bool:
    return client.poll() is not None or bool(pager.status()["spaces"])


def test_pagers_killed_during_a_scan_cost_no_byte(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """Several threads read every page, each once, while pagers come and go."""
    pager = pagers.Pager(tmp_path / "socket")
    code = """
        wrong, pause = [], %(pause)s
        def scan(pages):
            for page in pages:
                if not same(page):
                    wrong.append(page)
                go.wait()
                time.sleep(pause)
        go = threading.Event()
        order = np.random.default_rng(3).permutation(len(raw) // 4096)
        threads = [threading.Thread(target=scan, args=(order[k::4],)) for k in range(4)]
        for thread in threads: thread.start()
        sys.stdin.readline()
        go.set()
        for thread in threads: thread.join()
        print(wrong, snapshot._region._native.attachment.adoptions > 0, flush=True)
    """
    client = start(pager, files, code % {"pause": KILLS / 1000})
    assert client.stdin is not None
    for kill in range(KILLS):
        pager.kill()
        pager = pagers.Pager(tmp_path / "socket")
        if kill == 0:
            client.stdin.write("\n")
            client.stdin.flush()
        wait_until(partial(is_served, pager, client))
    try:
        out, err = client.communicate(timeout=60)
        assert (client.returncode, out) == (0, "[] True\n"), err
    finally:
        pager.kill()


def test_without_another_pager_what_is_missing_is_a_signal(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pagers.running(tmp_path / "socket") as pager:
        client = start(
            pager, files, "sys.stdin.readline(); assert same(1); print('there', flush=True); same(500)", 0.5
        )
        pager.kill()
        out, err = client.communicate("\n", timeout=60)
    assert out == "there\n"  # what was read stays
    assert client.returncode == -signal.SIGBUS
    assert f"no pager answers at {tmp_path / 'socket'}" in err


def test_closing_does_not_wait_for_a_pager(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pagers.running(tmp_path / "socket") as pager:
        client = start(
            pager, files, "sys.stdin.readline(); del array; snapshot.close(); print('closed')", 600
        )
        pager.kill()
        out, err = client.communicate("\n", timeout=60)
    assert (client.returncode, out) == (0, "closed\n"), err


def test_children_wait_for_the_next_pager(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """Nobody but the pager has a child's userfaultfd: its twin keeps it, and gives it to the next one. Its
    parent has ended by then, and one pager has come that could not read the snapshot."""
    if os.geteuid() != 0:
        pytest.skip("EVENT_FORK is for the privileged")
    snapshot = files[0].rename(tmp_path / "data.lzm")
    code = """
        if os.fork() == 0:
            sys.stdin.readline()
            print(f"reads {os.getpid()}", flush=True)
            print("has read", same(500), same(0), all(map(same, range(1024))), flush=True)
            os._exit(0)
        os._exit(0)
    """
    pager = pagers.Pager(tmp_path / "socket")
    client = start(pager, (snapshot, files[1]), code)
    try:
        wait_until(lambda: [one["parent"] is not None for one in pager.status()["spaces"]] == [True])
        twin = Path(f"/proc/{pager.process.pid}/task/{pager.process.pid}/children").read_text()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # of somebody who means the pager
            os.kill(int(twin), number)
        pager.kill()
        assert client.stdin is not None
        client.stdin.write("\n")
        client.stdin.flush()
        child = pagers.line_of(client).split()[1]
        wait_until(lambda: "handle_userfault" in Path(f"/proc/{child}/wchan").read_text())
        snapshot.rename(files[0])
        pager = pagers.Pager(tmp_path / "socket")
        assert pager.status()["spaces"] == []
        assert "data.lzm: there is no such file" in pager.end()[1]
        files[0].rename(snapshot)
        pager = pagers.Pager(tmp_path / "socket")
        out, err = client.communicate(timeout=60)
        assert out == "has read True True True\n", err
        wait_until(lambda: not pager.status()["spaces"])
        assert pager.end() == (0, "")
        wait_until(lambda: sorted(one.name for one in tmp_path.iterdir()) == ["data.lzm"])
    finally:
        client.kill()
        pager.kill()
        snapshot.rename(files[0])


def serves_both(pager: pagers.Pager) -> bool:
    return len(pager.status()["spaces"]) == 2


def test_children_of_a_client_that_is_there_wait_as_well(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """Client and child come to the next pager in different ways, and to the one after that."""
    if os.geteuid() != 0:
        pytest.skip("EVENT_FORK is for the privileged")
    code = """
        pid = os.fork()
        for block in range(4):
            if pid: sys.stdin.readline(); os.write(write, b"x")
            else: os.read(read, 1)
            pages = range(block * 256, block * 256 + 256)
            if not all(map(same, pages if pid else reversed(pages))): os._exit(1)
            if pid == 0: os.write(back, b"x")
            else: os.read(forth, 1); print("block", flush=True)
        if pid == 0: os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """
    pager = pagers.Pager(tmp_path / "socket")
    client = start(pager, files, "read, write = os.pipe(); forth, back = os.pipe()" + textwrap.dedent(code))
    try:
        assert client.stdin is not None
        for _ in range(4):
            wait_until(partial(serves_both, pager))
            pager.kill()
            client.stdin.write("\n")
            client.stdin.flush()
            pager = pagers.Pager(tmp_path / "socket")
            assert pagers.line_of(client) == "block"
        _, err = client.communicate(timeout=60)
        assert client.returncode == 0, err
    finally:
        client.kill()
        pager.kill()


def test_clients_killed_at_any_moment_leave_nothing(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pagers.running(tmp_path / "socket") as pager:

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{pager.process.pid}/fd"))

        before = descriptors()
        code = "threading.Thread(target=lambda: array.copy(), daemon=True).start(); array[::4096].sum()"
        for delay in range(4):
            client = start(pager, files, f"time.sleep({delay} / 500); {code}")
            client.kill()
            client.communicate()
        wait_until(lambda: not pager.status()["spaces"] and not pager.status()["snapshots"])
        client = start(pager, files, "sys.stdin.readline()")
        client.kill()
        client.communicate()
        wait_until(lambda: not pager.status()["spaces"] and not pager.status()["snapshots"])
        wait_until(lambda: descriptors() <= before)
        done = run_child(OPENED, pager.path, *files)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("prefix", ["", "snapshot._region._native.user_only = True"])
def test_prefetch_says_that_memory_was_lost_though_another_pager_is_there(
    tmp_path: Path, files: tuple[Path, Path], prefix: str
) -> None:
    code = f"""
    {prefix}
    sys.stdin.readline()
    try:
        snapshot.prefetch(wait=True)
    except lazymem.ReadError as error:
        print(error, flush=True)
    """
    with pagers.running(tmp_path / "socket") as pager:
        client = start(pager, files, code, timeout=0)
    assert client.stderr is not None
    assert "no pager answers" in client.stderr.readline()
    with pagers.running(tmp_path / "socket"):
        out, err = client.communicate("\n", timeout=60)
    assert (client.returncode, err) == (0, "")
    assert "a line on stderr has said why; open it again" in out, out


def test_who_has_too_few_descriptors_is_told_so(tmp_path: Path, files: tuple[Path, Path]) -> None:
    code = """
    import resource
    used = max(map(int, os.listdir("/proc/self/fd")))
    said = []
    for limit in range(used, used + 12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            lazymem.open(sys.argv[2], pager=sys.argv[1]).close()
            said.append("")
        except lazymem.ReadError as error:
            said.append(str(error))
    assert said[-1] == "" and "" not in said[:3], said
    assert all("Too many open files" in words or not words for words in said), said
    print("told", flush=True)
    """
    with pagers.running(tmp_path / "socket") as pager:
        client = start(pager, files, code)
        out, err = client.communicate(timeout=60)
        assert (out, err) == ("told\n", "")


def test_what_is_closed_leaves_nothing_with_client_or_pager(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pagers.running(tmp_path / "socket") as pager:
        client = start(
            pager,
            files,
            """
            def descriptors():
                return len(os.listdir("/proc/self/fd"))
            before = descriptors()
            for _ in range(8):
                with lazymem.open(sys.argv[2], pager=sys.argv[1]) as again:
                    again["data"][:1].copy()
            print(descriptors() - before, flush=True)
            sys.stdin.readline()
            """,
        )
        assert pagers.line_of(client) == "0"
        wait_until(lambda: pager.status()["clients"] == 1)
        client.communicate("\n", timeout=60)


def test_a_stopped_pager_is_waited_for(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pagers.running(tmp_path / "socket") as pager:
        client = start(pager, files, "sys.stdin.readline(); print(same(600), flush=True)")
        os.kill(pager.process.pid, signal.SIGSTOP)
        assert client.stdin is not None
        client.stdin.write("\n")
        client.stdin.flush()
        wait_until(lambda: "handle_userfault" in Path(f"/proc/{client.pid}/wchan").read_text())
        os.kill(pager.process.pid, signal.SIGCONT)
        out, err = client.communicate(timeout=60)
    assert (client.returncode, out) == (0, "True\n"), err
