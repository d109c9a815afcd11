# SPDX-License-Identifier: Apache-2.0
"""A soak: random operations on lazy memory against an oracle, for as long as one likes.

    python -m tests.faults.soak --seed 7 --seconds 600 --backend uffd

This process starts the S3 server and a child, which does the operations (`soak_operations.py`) and writes
down each before it begins. If the child ends badly, or its log does not grow for a minute, this one prints
seed, the last operations and, of a hang, the threads' stacks (where gdb is there), and kills the child's
whole group. At the end the child's descriptors, threads, mappings and memory are level with what they were
after a first round of everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE = 90.0  # seconds without a line in the log
TAIL = 25  # lines of it
ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """The report: what happened, the seed, the last operations."""


def stacks(pid: int) -> str:
    """Of a process and its children, as gdb sees them."""
    if shutil.which("gdb") is None:
        return "(no gdb here)"
    found = ""
    for one in [pid, *children(pid)]:
        command = ["gdb", "-p", str(one), "-batch", "-ex", "thread apply all bt 12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found += f"-- process {one}\n{done.stdout[-6000:]}\n"
    return found


def children(pid: int) -> list[int]:
    try:
        text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [below for child in map(int, text.split()) for below in (child, *children(child))]


def soak(
    seed: int, seconds: float, *, backend: str | None = None, prefix: str = "", keep: str | None = None,
    deadline: float = DEADLINE,
) -> dict[str, int]:  # fmt: skip
    """Run one; how many operations there were of each. Raises `Failed`.

    prefix: an s3:// URL that ends with a slash, for objects; the environment leads there. "": local only.
    keep: where to leave the log of all operations.
    """
    with tempfile.TemporaryDirectory(prefix="lazymem-soak-") as folder:
        log, out = Path(folder) / "log", Path(folder) / "out"
        options = [str(seed), str(seconds), backend or "", prefix, folder]
        command = [sys.executable, "-m", "tests.faults.soak", "--child", *options]
        with open(out, "w+b") as output:
            child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                problem = watch(child, log, deadline)
            finally:
                end(child)
        if keep:
            shutil.copy(log, keep)
        said = out.read_text(errors="replace")
        if problem:
            tail = "\n".join(log.read_text().splitlines()[-TAIL:]) if log.exists() else ""
            raise Failed(f"{problem}\nseed {seed}, backend {backend}\n{tail}\n{said[-6000:]}")
    counts: dict[str, int] = json.loads(said.splitlines()[-1])
    return counts


def watch(child: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    """Wait for its end. What went wrong, or ""."""
    seen, since = -1, time.monotonic()
    while child.poll() is None:
        size = log.stat().st_size if log.exists() else 0
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > deadline:
            return f"hang: nothing for {deadline} s\n{stacks(child.pid)}"
        time.sleep(0.1)
    return f"the soak ended with {child.returncode}" if child.returncode != 0 else ""


def end(child: subprocess.Popen[bytes]) -> None:
    """The group, forks of forks included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run_child(seed: int, seconds: float, backend: str | None, prefix: str, folder: Path) -> None:
    from .soak_damage import DamagingSoak
    from .soak_levels import await_level, levels, mappings, resident

    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    start = time.monotonic()

    def note(line: str) -> None:
        os.write(log, f"{time.monotonic() - start:7.2f} {line}\n".encode())

    soaking = DamagingSoak(folder, seed, backend, prefix, upload if prefix else None, note)
    soaking.everything()
    level = levels()
    memory, maps = resident(), mappings()
    while time.monotonic() < start + seconds:
        soaking.step()
    soaking.finish()
    await_level(level)
    assert resident() < memory + (150 << 20), f"memory grew from {memory} to {resident()} bytes"
    assert mappings() < maps + 200, f"mappings grew from {maps} to {mappings()}"
    print(json.dumps(dict(sorted(soaking.counts.items()))))


def upload(url: str, data: bytes) -> None:
    import boto3
    from botocore.config import Config

    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", config=Config(request_checksum_calculation="when_required"))
    client.put_object(Bucket=bucket, Key=key, Body=data)
    client.close()


def soak_with_server(seed: int, seconds: float, *, backend: str | None, keep: str | None) -> dict[str, int]:
    """With the tests' S3 server, where it is installed."""
    import pytest

    from ..servers import install
    from ..servers.radosgw import RadosGateway
    from ..servers.s3 import Bucket

    if install.RADOSGW.missing():
        return soak(seed, seconds, backend=backend, keep=keep)
    with (
        tempfile.TemporaryDirectory() as folder,
        RadosGateway(Path(folder)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        bucket = Bucket(server.endpoint, server.credentials, patch)
        return soak(seed, seconds, backend=backend, prefix=bucket.url(""), keep=keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--backend", help="auto, uffd, ...; left out, another one at each open")
    parser.add_argument("--local", action="store_true", help="nothing remote")
    parser.add_argument("--log", help="a file for the log of all operations")
    given = parser.parse_args()
    if given.child:
        seed, seconds, backend, prefix, folder = given.child
        run_child(int(seed), float(seconds), backend or None, prefix, Path(folder))
        return
    run = soak if given.local else soak_with_server
    try:
        counts = run(given.seed, given.seconds, backend=given.backend, keep=given.log)
    except Failed as failure:
        sys.exit(str(failure))
    print(f"seed {given.seed}, {given.seconds:g} s, {sum(counts.values())} operations:", json.dumps(counts))


if __name__ == "__main__":
    main()
