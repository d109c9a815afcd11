# SPDX-License-Identifier: Apache-2.0
"""Machines that Firecracker restores, without Firecracker: tests/native/firecracker_client.c makes its
handshake to the letter, touches the guest's memory by several threads, and gives pages back by a balloon."""

from __future__ import annotations

import array
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lazymem
from lazymem._native import pager as native
from lazymem.errors import OptionError
from lazymem.pager.access import Access
from lazymem.pager.firecracker import Firecracker
from lazymem.pager.server import Limits, Server
from lazymem.pager.stock import Wanted
from lazymem.paging import client as paging_client

from .. import pagers
from ..once import made_once
from .network import wait_until
from .pager_host import PagerHost, hear_the_end

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

pytestmark = pytest.mark.needs_userfaultfd

SOURCE = Path(__file__).parents[1] / "native" / "firecracker_client.c"
HUGE = Path("/proc/sys/vm/nr_hugepages")
SIZE = 16 << 20
TEXT = slice(6 << 20, 8 << 20)
UFFDIO_API = 0xC018AA3F


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(target: Path) -> None:
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run(["cc", *flags, SOURCE, "-o", target], check=True)

    return made_once(tmp_path_factory, "firecracker_client", make)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine's memory file: noise, zeros, text, zeros, and something in its last page."""
    memory = np.zeros(SIZE, np.uint8)
    memory[: 3 << 20] = np.random.default_rng(7).integers(0, 256, 3 << 20, np.uint8)
    memory[TEXT] = np.resize(np.frombuffer(b"guest ", np.uint8), 2 << 20)
    memory[-4096:] = 1
    path = tmp_path_factory.mktemp("guest") / "guest.mem"
    memory.tofile(path)
    return path


@pytest.fixture(scope="module")
def snapshots(guest: Path) -> dict[str, object]:
    """By the name of the socket where machines of each are restored."""
    made = {"chunks-64k": 64 << 10, "chunks-2m": 2 << 20, "chunks-8m": 8 << 20}
    for name, size in made.items():
        lazymem.build(guest, guest.with_name(f"{name}.lzm"), chunk_size=size)
    damaged = guest.with_name("damaged.lzm")
    shutil.copy(guest.with_name("chunks-64k.lzm"), damaged)
    with open(damaged, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"damaged" * 100)
    return {"raw": guest, "damaged": damaged} | {name: guest.with_name(f"{name}.lzm") for name in made}


@pytest.fixture(scope="module")
def pager(tmp_path_factory: pytest.TempPathFactory, snapshots: dict[str, object]) -> Iterator[PagerHost]:
    with PagerHost(tmp_path_factory.mktemp("pager"), snapshots) as host:
        yield host


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[None]:
    """Some, where the kernel gives them; as many as before, afterwards."""
    before = HUGE.read_text()
    try:
        HUGE.write_text(str(int(before) + 2 * SIZE // (2 << 20)))
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    try:
        yield
    finally:
        HUGE.write_text(before)


def restore(
    client: Path, path: object, guest: Path, kind: str, fields: str, operations: int = 1500, seed: int = 1
) -> subprocess.CompletedProcess[str]:
    command = [client, str(path), guest, kind, fields, str(operations), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    return done


def check_restored(done: subprocess.CompletedProcess[str], pager: PagerHost) -> None:
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr + pager.log()


def at(pager: PagerHost, name: str) -> Path:
    return Path(pager.socket).with_name(name)


@pytest.mark.parametrize("fields", ["both", "kib", "real-kib", "none"])
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_restored_machine_sees_its_memory(
    client: Path, guest: Path, pager: PagerHost, kind: str, fields: str
) -> None:
    """By every version's handshake: page_size, page_size_kib in bytes and in KiB, neither."""
    check_restored(restore(client, at(pager, "chunks-64k"), guest, kind, fields), pager)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_restored_machine_outlives_its_pagers(
    client: Path, guest: Path, snapshots: dict[str, object], tmp_path: Path, kind: str
) -> None:
    """It never looks at the socket again, and knows nothing of other pagers."""
    options = ("--protocol", "firecracker", "--snapshot", snapshots["chunks-64k"])
    control = str(tmp_path / "s.control")
    pager = pagers.Pager(tmp_path / "s", *options)
    machine = subprocess.Popen(
        [client, pager.path, guest, kind, "both", "60000", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(3):
            wait_until(lambda: paging_client.status(control)["faults"] > 20 or machine.poll() is not None)
            pager.kill()
            pager = pagers.Pager(tmp_path / "s", *options)
        out, err = machine.communicate(timeout=60)
        if machine.returncode == 77:
            pytest.skip(err)
        assert (machine.returncode, out) == (0, "ok\n"), err
    finally:
        machine.kill()
        pager.kill()


@pytest.mark.parametrize("name", ["raw", "chunks-2m", "chunks-8m"])
def test_restored_machine_sees_its_memory_whatever_the_chunks(
    client: Path, guest: Path, pager: PagerHost, name: str
) -> None:
    check_restored(restore(client, at(pager, name), guest, "private", "both"), pager)


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("name", ["chunks-64k", "chunks-2m", "chunks-8m"])
@pytest.mark.parametrize("kind", ["huge", "huge-shared"])
def test_machine_with_huge_pages_sees_its_memory(
    client: Path, guest: Path, pager: PagerHost, kind: str, name: str
) -> None:
    """A page of 2 MiB is put in place at once, of however many chunks."""
    check_restored(restore(client, at(pager, name), guest, kind, "both", 60), pager)


def test_restored_machine_sees_its_memory_from_s3(
    client: Path, guest: Path, tmp_path: Path, s3: Bucket
) -> None:
    url = s3.url("guest.mem.lzm")
    lazymem.build(guest, url, chunk_size=256 << 10)
    with PagerHost(tmp_path, {"machines": url}) as host:
        check_restored(restore(client, tmp_path / "machines", guest, "private", "both"), host)


def test_snapshot_of_memory_leaves_zeros_out_and_is_the_file(
    guest: Path, snapshots: dict[str, object]
) -> None:
    built = Path(str(snapshots["chunks-64k"]))
    assert built.stat().st_size < (3 << 20) + (256 << 10)  # the noise, and little else
    with lazymem.open(built) as snap:
        assert list(snap) == ["data"]
        assert snap.info("data").offset == 0
        assert bytes(snap.read("data")) == guest.read_bytes()


def test_damaged_chunk_is_a_signal_in_the_machine_and_a_line_of_the_pager(
    client: Path, guest: Path, pager: PagerHost
) -> None:
    done = restore(client, at(pager, "damaged"), guest, "private", "both")
    assert done.returncode == -signal.SIGBUS
    assert "damaged.lzm: chunk" in pager.log()
    check_restored(restore(client, at(pager, "raw"), guest, "private", "both", 100), pager)


def test_machine_that_is_killed_costs_nothing(client: Path, guest: Path, pager: PagerHost) -> None:
    pager.wait_without_clients()
    before = pager.descriptors()
    command = [client, str(at(pager, "chunks-64k")), guest, "private", "both", str(1 << 40), "1"]
    running = [subprocess.Popen(command) for _ in range(3)]
    try:
        pager.wait_until(lambda: len(pager.status()["spaces"]) == 3, "machines do not come")
        shown = pager.status()["spaces"]
        assert {space["client"]["pid"] for space in shown} == {one.pid for one in running}
        assert {space["client"]["protocol"] for space in shown} == {"firecracker"}
        assert {space["mapped"] for space in shown} == {SIZE}
    finally:
        for one in running:
            one.kill()
            one.wait()
    pager.wait_without_clients()
    pager.wait_until(
        lambda: pager.descriptors() <= before, f"{pager.descriptors()} descriptors, not {before}"
    )


def test_machine_whose_pager_dies_waits_and_sees_no_zeros(
    client: Path, guest: Path, snapshots: dict[str, object], tmp_path: Path
) -> None:
    """It has its userfaultfd itself. vCPUs that wait for a page wait in no system call."""
    with PagerHost(tmp_path, {"machines": snapshots["chunks-64k"]}) as host:
        command = [client, str(tmp_path / "machines"), guest, "private", "both", str(1 << 40), "1"]
        machine = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            host.wait_until(lambda: host.status()["faults"] > 100, "the machine does not run")
        except BaseException:
            machine.kill()
            raise
    try:
        tasks = Path(f"/proc/{machine.pid}/task")

        def threads_that_wait_for_a_page() -> int:
            return sum(task.joinpath("syscall").read_text().startswith("-1 ") for task in tasks.iterdir())

        host.wait_until(lambda: machine.poll() is not None or threads_that_wait_for_a_page() >= 3, "no end")
        assert machine.poll() is None, machine.communicate()
    finally:
        machine.kill()
        machine.communicate()


def test_machines_are_taken_over_and_restored_by_the_command(
    client: Path, guest: Path, snapshots: dict[str, object], tmp_path: Path
) -> None:
    """`lazymem pager serve --protocol firecracker`, twice: a machine of the first is served by the second."""
    path = tmp_path / "machines"
    options = ("--protocol", "firecracker", "--snapshot", snapshots["chunks-64k"])
    control = str(path) + ".control"
    command = [client, str(path), guest, "private", "both", str(1 << 40), "1"]
    with pagers.running(path, *options) as first:
        assert first.out.startswith(f"listening at {path} for machines, and at {control}, process ")
        with pytest.raises(
            lazymem.PagerUnavailable, match=r"where machines are restored, ask at .*\.control"
        ):
            paging_client.status(str(path))
        machine = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while paging_client.status(control)["faults"] < 100:
                assert machine.poll() is None, machine.communicate()
            with pagers.running(path, *options, "--take-over"):
                assert first.wait()[0] == 0
                (space,) = paging_client.status(control)["spaces"]
                assert (space["client"]["pid"], space["client"]["protocol"]) == (machine.pid, "firecracker")
                done = restore(client, path, guest, "private", "both", 100)
                assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
                while paging_client.status(control)["faults"] < space["faults"] + 500:
                    assert machine.poll() is None, machine.communicate()  # a wrong byte ends it
        finally:
            machine.kill()
            machine.communicate()
    assert pagers.refusal(path, "--protocol", "firecracker")[0] == 2


def test_snapshot_that_is_not_of_one_file_is_refused(tmp_path: Path) -> None:
    lazymem.build({"a": np.ones(5000), "b": np.ones(5000)}, tmp_path / "two.lzm")
    server = Server(str(tmp_path / "control"), Access(), Limits())
    with pytest.raises(OptionError, match="is not the snapshot of one file"):
        Firecracker(server, str(tmp_path / "machines"), Wanted(str(tmp_path / "two.lzm")))


# ---- handshakes that cannot be served ----

REGION = {"base_host_virt_addr": 1 << 40, "size": 1 << 20, "offset": 0, "page_size": 4096}


def with_changes(**changes: object) -> bytes:
    return json.dumps([{**REGION, **changes}]).encode()


#: What is sent, with how many descriptors or what userfaultfd, and what the line says.
BAD: dict[str, tuple[bytes, int | str, str]] = {
    "no JSON": (b"hello", 1, "ended after 5 bytes, which are no JSON"),
    "half of it": (with_changes()[:-9], 1, "no JSON array of regions"),
    "an object": (b'{"base_host_virt_addr": 1}', 1, "no JSON array of regions"),
    "no region": (b"[]", 1, "names no regions"),
    "numbers": (b"[1, 2]", 1, "regions[0] is not a JSON object"),
    "deep": (b"[" * 30000 + b"]" * 30000, 1, "no JSON array of regions"),
    "long": (b"[" + b" " * (70 << 10) + b"]", 1, "has more than 65536 bytes"),
    "no descriptor": (with_changes(), 0, "no userfaultfd with them"),
    "several descriptors": (with_changes(), 3, "several descriptors"),
    "another descriptor": (with_changes(), 1, "is no userfaultfd whose handshake was made"),
    "no handshake made": (with_changes(), "raw", "is no userfaultfd whose handshake was made"),
    "not registered": (with_changes(), "agreed", "are not registered with the userfaultfd"),
    "beyond the end": (with_changes(offset=SIZE), 1, f"up to {SIZE + (1 << 20)}, and the snapshot"),
    "odd size": (with_changes(size=4097), 1, "size is 4097, not a multiple of its pages' 4096 bytes"),
    "odd address": (with_changes(base_host_virt_addr=5), 1, "base_host_virt_addr is 5, not a multiple"),
    "odd offset": (with_changes(offset=512), 1, "offset is 512, not a multiple"),
    "odd for huge pages": (with_changes(offset=4096, size=2 << 20, page_size=2 << 20), 1, "offset is 4096"),
    "odd pages": (with_changes(page_size=8192), 1, "pages of 8192; they have 4096 bytes, or 2097152"),
    "no bytes": (with_changes(size=0), 1, "has no bytes"),
    "a negative size": (with_changes(size=-4096), 1, "size is -4096, not a number of bytes"),
    "a huge size": (with_changes(size=1 << 70), 1, "not a number of bytes"),
    "a text": (with_changes(offset="0"), 1, "offset is 0, not a number of bytes"),
    "true": (with_changes(offset=True), 1, "offset is True, not a number of bytes"),
    "overlap": (json.dumps([REGION, REGION]).encode(), 1, "overlap"),
    "the kernel's": (with_changes(base_host_virt_addr=(1 << 64) - (1 << 20)), "agreed", "are not registered"),
}  # fmt: skip


def test_bad_handshakes_are_a_line_each_and_the_end_of_the_connection(
    client: Path, guest: Path, pager: PagerHost
) -> None:
    """And leave nothing behind: no descriptors, no threads; other machines are restored as ever."""
    pager.wait_without_clients()
    descriptors, threads = pager.descriptors(), pager.threads()
    said = {name: shake(pager, *BAD[name][:2]) for name in BAD}
    wrong = {
        name: lines for name, lines in said.items() if BAD[name][2] not in lines or lines.count("\n") != 1
    }
    assert wrong == {}
    assert all(f"process {os.getpid()}: " in lines for lines in said.values())
    pager.wait_until(
        lambda: (
            pager.status()["spaces"] == []
            and pager.descriptors() <= descriptors
            and pager.threads() <= threads
        ),
        f"{pager.descriptors()} descriptors, not {descriptors}, {pager.threads()} threads, not {threads}",
    )
    check_restored(restore(client, at(pager, "raw"), guest, "private", "both", 100), pager)


def shake(pager: PagerHost, text: bytes, what: int | str) -> str:
    """What the pager logs of a handshake. what: comes with it: so many descriptors, or a userfaultfd."""
    before = pager.log()
    fds: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        connection.connect(str(at(pager, "chunks-64k")))
        if isinstance(what, int):
            fds += [os.open(os.devnull, os.O_RDONLY) for _ in range(what)]
        else:
            with native.userfaultfd() as (fd, _):
                if what == "agreed":
                    fcntl.ioctl(fd, UFFDIO_API, struct.pack("QQQ", 0xAA, 1 << 3, 0))
                fds.append(os.dup(fd))
        try:
            send(connection, text, fds)
        finally:
            for fd in fds:
                os.close(fd)
        assert hear_the_end(connection) == b""
    pager.wait_until(lambda: len(pager.log()) > len(before), "no line")
    return pager.log().removeprefix(before)


def send(connection: socket.socket, text: bytes, fds: list[int]) -> None:
    rights: Any = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = connection.sendmsg([text], rights)
    try:
        connection.sendall(text[sent:])
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has hung up: that is the answer
