# SPDX-License-Identifier: Apache-2.0
"""The command as a process: pipes, terminals, signals."""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lazymem

COMMAND = [sys.executable, "-m", "lazymem"]
TIMEOUT = 60


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "many.lzm"
    lazymem.build({f"array {i}": np.arange(40_000) for i in range(100)}, path, chunk_size=64 * 1024)
    return path


@contextmanager
def started(*args: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*COMMAND, *map(str, args)], start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_module_and_entry_point_are_the_same(snapshot: Path) -> None:
    done = subprocess.run([*COMMAND, "ls", snapshot], capture_output=True, timeout=TIMEOUT)
    code = "from lazymem.cli import main; main()"
    other = subprocess.run([sys.executable, "-c", code, "ls", snapshot], capture_output=True, timeout=TIMEOUT)
    assert done.returncode == other.returncode == 0
    assert done.stdout == other.stdout != b""


@pytest.mark.parametrize(
    "verb", [["ls"], ["cat"], ["info"], ["doctor"], ["--help"], ["demo", "--size", "16M"]]
)
def test_pipe_without_reader_is_silent(snapshot: Path, tmp_path: Path, verb: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    args: dict[str, list[object]] = {
        "ls": [snapshot],
        "cat": [snapshot, "array 1"],
        "info": [snapshot],
        "demo": ["--dir", tmp_path],
    }
    with started(*verb, *args.get(verb[0], []), stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, err = process.communicate(timeout=TIMEOUT)
        assert err == b""
        assert process.returncode == 141
    assert list(tmp_path.iterdir()) == [snapshot]


def test_full_disk_behind_stdout_is_exit_3(snapshot: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "cat", snapshot, "array 1"], stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT
        )
    assert done.returncode == 3
    assert done.stderr == b"lazymem: standard output: No space left on device\n"


def test_full_disk_behind_a_buffered_stdout_is_told_once(snapshot: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "info", snapshot], stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT
        )
    assert (done.returncode, done.stderr) == (3, b"lazymem: standard output: No space left on device\n")


@pytest.mark.parametrize(
    ("args", "closed", "code", "says"),
    [
        (["ls", "SNAPSHOT"], ">&-", 3, "standard output: is closed"),
        (["cat", "SNAPSHOT", "array 1"], ">&-", 3, "standard output: is closed"),
        (["verify", "SNAPSHOT"], ">&-", 3, "standard output: is closed"),
        (["verify", "SNAPSHOT"], ">&- <&-", 3, "standard output: is closed"),
        (["doctor"], ">&-", 3, "standard output: is closed"),
        (["--help"], ">&-", 3, "standard output: is closed"),
        (["build", "-", "OUT"], "<&-", 3, "standard input is closed; pipe the bytes in, or name a file"),
        (["build", "SNAPSHOT", "OUT"], ">&- <&-", 0, ""),
        (["build", "SNAPSHOT", "OUT"], ">&- 2>&- <&-", 0, ""),
        (["ls", "nosuch"], "2>&-", 3, ""),
    ],
)
def test_closed_standard_streams_are_one_sentence(
    snapshot: Path, tmp_path: Path, args: list[str], closed: str, code: int, says: str
) -> None:
    out = tmp_path / "out.lzm"
    words = {"SNAPSHOT": str(snapshot), "OUT": str(out)}
    command = shlex.join([*COMMAND, *(words.get(arg, arg) for arg in args)])
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == (f"lazymem: {says}\n" if says else "")
    assert out.exists() == (code == 0)
    if code == 0:  # nothing that was meant for a stream got into it
        assert lazymem.verify(out).ok


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_build_ended_by_a_signal_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    with started("build", "-", tmp_path / "x.lzm", stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(1 << 20))  # more than a pipe holds: it is reading when this returns
        process.stdin.flush()
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code
        assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_ended_by_a_signal_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    with started("demo", "--dir", tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"Working in {tmp_path}/lazymem-demo-".encode())
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code
        assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_build_from_standard_input(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3_000_000)
    done = subprocess.run([*COMMAND, "build", "-", tmp_path / "x.lzm"], input=data, timeout=TIMEOUT)
    assert done.returncode == 0
    assert lazymem.open(tmp_path / "x.lzm")["data"].tobytes() == data


def on_terminal(*args: object) -> tuple[int, str]:
    """Run on a terminal of 80 columns: exit code and all that appeared on it."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    with started(*args, stdin=slave, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        shown = b""
        while select.select([master], [], [], TIMEOUT)[0]:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # EIO: the other side is closed
                break
            shown += piece
        os.close(master)
        return process.wait(TIMEOUT), shown.decode()


def test_build_on_a_terminal_shows_progress_and_a_summary(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal(1_000_000))
    code, shown = on_terminal("build", tmp_path / "x.npy", tmp_path / "x.lzm")
    assert code == 0
    assert "building" in shown
    assert "\x1b[2K" in shown  # the bar, drawn and wiped away
    last = shown.splitlines()[-1]
    digest = lazymem.open(tmp_path / "x.lzm").digest
    assert "1 array, 7.6 MiB -> " in last
    assert f"digest {digest}" in last
    code, shown = on_terminal("build", "--quiet", tmp_path / "x.npy", tmp_path / "x.lzm")
    assert (code, shown) == (0, "")


def test_ls_on_a_terminal_has_headings(snapshot: Path) -> None:
    code, shown = on_terminal("ls", snapshot)
    assert code == 0
    assert shown.split("\r\n")[0].split() == ["dtype", "shape", "size", "name"]


def test_ls_on_a_terminal_cuts_long_dtypes_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "wide.lzm"
    fields = [(f"field {i}", "<f8") for i in range(20)]
    lazymem.build({"struct": np.zeros(2, fields), "deep": np.zeros((1,) * 64, "u1")}, path)
    code, shown = on_terminal("ls", path)
    lines = shown.split("\r\n")
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert [line.split()[-1] for line in lines[1:3]] == ["struct", "deep"]
    whole = subprocess.run([*COMMAND, "ls", path], capture_output=True, text=True, timeout=TIMEOUT).stdout
    assert "field 19" in whole
    assert "[" + ",".join("1" * 64) + "]" in whole


def test_cat_and_standard_input_refuse_a_terminal(snapshot: Path, tmp_path: Path) -> None:
    for args in (("cat", snapshot, "array 1"), ("build", "-", tmp_path / "x.lzm")):
        code, shown = on_terminal(*args)
        assert code == 2
        assert "is a terminal" in shown


def test_ascii_terminal_gets_escapes_not_a_traceback(tmp_path: Path) -> None:
    lazymem.build({"größe": np.arange(3)}, tmp_path / "x.lzm")
    done = subprocess.run(
        [*COMMAND, "ls", tmp_path / "x.lzm"],
        capture_output=True,
        timeout=TIMEOUT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert done.stdout.endswith(b"gr\\xf6\\xdfe\n")
