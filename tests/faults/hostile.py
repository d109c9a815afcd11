# SPDX-License-Identifier: Apache-2.0
"""A client that means a pager no good. Runs in a process of its own, whose memory is what is played with.

Each case is a function that gives what the pager said to it, "" for nothing; `main` runs all of them, and
looks after each whether the pager still serves others.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

from lazymem._native import pager as native
from lazymem.paging import wire
from lazymem.paging.wire import Answer, Ask

from .pager_host import hear_the_end

UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
MAP_HUGETLB: Final = 0x40000
SIZE: Final = 1 << 20
HUGE: Final = 2 << 20

Case = Callable[["Pager"], str]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[name] = function
        return function

    return add


class Pager:
    """What is attacked. url: of a snapshot of SIZE bytes or more."""

    def __init__(self, path: str, url: str, pid: int, seed: int) -> None:
        self.path, self.url, self.pid = path, url, pid
        self.random = random.Random(seed)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(
            self.path
        )  # without a time-out, which would have it fail where others wait before it
        connection.settimeout(20)
        return connection

    @contextmanager
    def opened(self) -> Iterator[socket.socket]:
        with self.connect() as connection:
            assert ask(connection, Ask(wire.HELLO)).code == 0
            answer = ask(connection, Ask(wire.OPEN, payload=json.dumps({"url": self.url}).encode()))
            assert answer.code == 0, answer.text
            yield connection


def ask(connection: socket.socket, question: Ask, descriptor: int | None = None) -> Answer:
    wire.send(connection, question.pack(), descriptor)
    return hear(connection)


def hear(connection: socket.socket) -> Answer:
    packet, fd = wire.receive(connection)
    if fd is not None:
        os.close(fd)
    return wire.unpack_answer(packet) if packet else Answer()


def sentence(answer: Answer) -> str:
    return answer.text if answer.code < 0 else "done"


# ---- memory: never given back, so that no address comes twice ----

_kept: list[mmap.mmap] = []


def memory(length: int = SIZE, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1) -> int:
    """The address, a multiple of 2 MiB."""
    huge = flags & MAP_HUGETLB
    mapped = mmap.mmap(fd, length if huge else length + HUGE, flags=flags)
    _kept.append(mapped)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    return address if huge else -(-address // HUGE) * HUGE


def agree(uffd: int, features: int = 0) -> None:
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("QQQ", 0xAA, features, 0))


# ---- packets ----


def raw(name: str, packet: bytes, fds: int = 0) -> None:
    def send(pager: Pager) -> str:
        with pager.connect() as connection, ExitStack() as stack:
            held = []
            for _ in range(fds):
                held.append(os.open(os.devnull, os.O_RDONLY))
                stack.callback(os.close, held[-1])
            rights: Any = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", held))] if held else []
            connection.sendmsg([packet], rights)
            said = sentence(hear(connection))
            assert hear_the_end(connection) == b""  # whoever speaks like that is not listened to any more
            return said

    CASES[name] = send


HELLO: Final = Ask(wire.HELLO).pack()
raw("noise", bytes(range(256)))
raw("truncated", HELLO[:-1])
raw("one byte", b"L")
raw("wrong magic", b"X" + HELLO[1:])
raw("wrong version", HELLO[:4] + struct.pack("H", 99) + HELLO[6:])
raw("wrong kind", Ask(99).pack())
raw("reserved", HELLO[:-4] + b"\1\0\0\0")
raw("length beyond", HELLO[:-8] + struct.pack("II", 1 << 31, 0))
raw("length short", HELLO + b"payload")
raw("long", Ask(wire.OPEN, payload=b" " * 70000).pack())
raw("nothing, with a descriptor", b"", fds=1)
raw("two descriptors", HELLO, fds=2)
raw("ten descriptors", HELLO, fds=10)
raw("map before open", Ask(wire.MAP).pack(), fds=1)
raw("prefetch before open", Ask(wire.PREFETCH, length=1).pack())
raw("why before open", Ask(wire.WHY).pack())
raw("no json", Ask(wire.OPEN, payload=b"\xff\xfe").pack())
raw("deep json", Ask(wire.OPEN, payload=b'{"url":' + b"[" * 60000).pack())
raw("json list", Ask(wire.OPEN, payload=b"[]").pack())


def question(name: str, payload: Any) -> None:
    def send(pager: Pager) -> str:
        with pager.connect() as connection:
            asked = {key: value.replace("URL", pager.url) if isinstance(value, str) else value
                     for key, value in payload.items()}  # fmt: skip
            return sentence(ask(connection, Ask(wire.OPEN, payload=json.dumps(asked).encode())))

    CASES[name] = send


question("no url", {})
question("url is a number", {"url": 5})
question("url has a zero", {"url": "/a\0b"})
question("relative", {"url": "model.lzm"})
question("a surrogate", {"url": "/tmp/\ud800"})
question("a folder", {"url": "/proc/self"})
question("a device", {"url": "/dev/zero"})
question("long url", {"url": "/" + "a" * 5000})
question("unknown scheme", {"url": "gopher://a/b"})
question("chunk size", {"url": "URL", "chunk_size": -3})
question("format", {"url": "URL", "as_format": "no such"})
question("options", {"url": "URL", "storage_options": []})
question("option", {"url": "URL", "storage_options": {"timeout": "long"}})
question("options of a kind", {"url": "URL", "storage_options": {"endpoint_url": 5, "headers": 7}})
question("identities", {"url": "URL", "identities": ["of another"]})
question("identities of a kind", {"url": "URL", "identities": [1]})


@case("a pipe")
def a_pipe(pager: Pager) -> str:
    """Whose opening waits for a writer."""
    path = f"{pager.url}.pipe"
    os.mkfifo(path)
    with pager.connect() as connection:
        return sentence(ask(connection, Ask(wire.OPEN, payload=json.dumps({"url": path}).encode())))


@case("populate of nobody")
def populate_of_nobody(pager: Pager) -> str:
    with pager.connect() as connection:
        return sentence(ask(connection, Ask(wire.POPULATE, payload=b'{"space": 4000000000}')))


@case("open twice")
def open_twice(pager: Pager) -> str:
    with pager.opened() as connection:
        return sentence(ask(connection, Ask(wire.OPEN, payload=json.dumps({"url": pager.url}).encode())))


@case("far prefetch")
def far_prefetch(pager: Pager) -> str:
    with pager.opened() as connection:
        top = (1 << 64) - 1
        for flags in (0, native.WAIT):
            assert ask(connection, Ask(wire.PREFETCH, offset=top, length=top, flags=flags)).code == 0
        assert ask(connection, Ask(wire.WHY, offset=top)).text == ""
        return sentence(ask(connection, Ask(wire.PREFETCH, offset=0, length=top, flags=native.WAIT)))


# ---- MAP ----


def mapping(name: str, flags: int = 0, **fields: int) -> None:
    """MAP of anonymous memory of SIZE bytes, but for some fields."""

    def send(pager: Pager) -> str:
        with pager.opened() as connection, native.userfaultfd() as (uffd, _):
            asked = {"address": memory(), "length": SIZE, **fields}
            return sentence(ask(connection, Ask(wire.MAP, flags=flags, **asked), uffd))

    CASES[name] = send


mapping("address near the end", address=(1 << 64) - 4096)
mapping("length near the end", length=(1 << 64) - 4096)
mapping("kernel's address", address=1 << 55)
mapping("odd address", address=4097)
mapping("odd length", length=4097)
mapping("odd offset", offset=1)
mapping("no length", length=0)
mapping("beyond the snapshot", offset=1 << 40)
mapping("offset near the end", offset=(1 << 64) - 4096)
mapping("odd page", page=8192)
mapping("huge page of half its size", page=HUGE)
mapping("nothing there", address=1 << 30)
mapping("shared, and is anonymous", flags=native.SHARED)
mapping("adopted without a handshake", flags=native.ADOPT)


def with_descriptor(name: str, make: Callable[[], int], flags: int = 0) -> None:
    def send(pager: Pager) -> str:
        fd = make()
        try:
            with pager.opened() as connection:
                return sentence(
                    ask(connection, Ask(wire.MAP, address=memory(), length=SIZE, flags=flags), fd)
                )
        finally:
            os.close(fd)

    CASES[name] = send


def agreed() -> int:
    with native.userfaultfd() as (uffd, _):
        agree(uffd)
        return os.dup(uffd)


for _flags, _way in ((0, ""), (native.ADOPT, ", adopted")):
    with_descriptor(f"null device{_way}", lambda: os.open(os.devnull, os.O_RDWR), _flags)
    with_descriptor(f"memfd{_way}", lambda: os.memfd_create("no"), _flags)
    with_descriptor(f"socket{_way}", lambda: socket.socket(socket.AF_UNIX).detach(), _flags)
    with_descriptor(f"userfaultfd device{_way}", lambda: os.open("/dev/userfaultfd", os.O_RDWR), _flags)
with_descriptor("handshake made already", agreed)
with_descriptor("no memory of ours adopted", agreed, native.ADOPT)


@case("first map without a descriptor")
def first_map_without(pager: Pager) -> str:
    with pager.opened() as connection:
        return sentence(ask(connection, Ask(wire.MAP, address=memory(), length=SIZE)))


@case("second map with a descriptor")
def second_map_with(pager: Pager) -> str:
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        assert ask(connection, Ask(wire.MAP, address=memory(), length=SIZE), uffd).code == 0
        return sentence(ask(connection, Ask(wire.MAP, address=memory(), length=SIZE), uffd))


@case("map twice")
def map_twice(pager: Pager) -> str:
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        asked = Ask(wire.MAP, address=memory(), length=SIZE)
        assert ask(connection, asked, uffd).code == 0
        return sentence(ask(connection, asked))


@case("map overlapping")
def map_overlapping(pager: Pager) -> str:
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        address = memory(2 * SIZE)
        assert ask(connection, Ask(wire.MAP, address=address, length=SIZE), uffd).code == 0
        return sentence(ask(connection, Ask(wire.MAP, address=address + SIZE - 4096, length=SIZE)))


@case("many maps")
def many_maps(pager: Pager) -> str:
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        address = memory(5 << 20)
        said = ask(connection, Ask(wire.MAP, address=address, length=4096), uffd)
        for number in range(1, 1030):
            if said.code < 0:
                break
            said = ask(connection, Ask(wire.MAP, address=address + number * 4096, length=4096))
        return sentence(said)


@case("a file's memory")
def a_files_memory(pager: Pager) -> str:
    with pager.opened() as connection, native.userfaultfd() as (uffd, _), open(pager.url, "rb") as file:
        asked = mmap.PROT_READ | mmap.PROT_WRITE
        _kept.append(mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=asked))
        address = ctypes.addressof(ctypes.c_char.from_buffer(_kept[-1]))
        return sentence(ask(connection, Ask(wire.MAP, address=address, length=SIZE), uffd))


@case("the pager's memory")
def the_pagers_memory(pager: Pager) -> str:
    with open(f"/proc/{pager.pid}/maps") as maps, open("/proc/self/maps") as own:
        ours = {line.split("-")[0] for line in own}
        there = next(
            int(line.split("-")[0], 16)
            for line in maps
            if line.split("-")[0] not in ours and line.split()[1] == "rw-p" and line.split()[-1] == "0"
        )
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        return sentence(ask(connection, Ask(wire.MAP, address=there, length=4096), uffd))


@case("small pages, and are huge")
def small_and_huge(pager: Pager) -> str:
    try:
        address = memory(HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    except OSError as error:
        return f"no huge pages: {error}"
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        return sentence(ask(connection, Ask(wire.MAP, address=address, length=HUGE, page=4096), uffd))


@case("a descriptor that blocks")
def a_descriptor_that_blocks(pager: Pager) -> str:
    """Is made one that does not, and serves as any other."""
    with pager.opened() as connection, native.userfaultfd() as (uffd, _):
        os.set_blocking(uffd, True)
        address = memory()
        assert ask(connection, Ask(wire.MAP, address=address, length=SIZE), uffd).code == 0
        assert not os.get_blocking(uffd)
        with open(pager.url.removesuffix(".lzm"), "rb") as file:
            assert ctypes.string_at(address, SIZE) == file.read(SIZE)
    return "right"


@case("another file of the client's for the pager's")
def another_file(pager: Pager) -> str:
    """What it put there is what it sees, and where it put nothing it gets a signal, alone."""
    fd = os.memfd_create("mine")
    os.ftruncate(fd, SIZE + HUGE)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with pager.opened() as connection, native.userfaultfd() as (uffd, _):
            address = memory(SIZE, mmap.MAP_PRIVATE, fd)
            asked = Ask(wire.MAP, address=address, length=SIZE, flags=native.SHARED)
            if ask(connection, asked, uffd).code == 0:
                ctypes.string_at(address, 1)
        os._exit(0)
    os.close(fd)
    return str(-os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


# ---- ends ----


@case("hang-ups")
def hang_ups(pager: Pager) -> str:
    for steps in range(4):
        for _ in range(5):
            with native.userfaultfd() as (uffd, _), pager.connect() as connection:
                if steps >= 1:
                    wire.send(connection, HELLO)
                if steps >= 2:
                    wire.send(
                        connection, Ask(wire.OPEN, payload=json.dumps({"url": pager.url}).encode()).pack()
                    )
                if steps >= 3:
                    wire.send(connection, Ask(wire.MAP, address=memory(), length=SIZE).pack(), uffd)
    return ""


@case("silence")
def silence(pager: Pager) -> str:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(pager.connect())
        good_client(pager)
    return ""


@case("answers that nobody takes")
def answers_that_nobody_takes(pager: Pager) -> str:
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(pager.connect())
            connection.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    wire.send(connection, HELLO)
        good_client(pager)
    return ""


@case("killed while it maps")
def killed_while_it_maps(pager: Pager) -> str:
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            with pager.opened() as connection, native.userfaultfd() as (uffd, _):
                address = memory()
                wire.send(connection, Ask(wire.MAP, address=address, length=SIZE).pack(), uffd)
                for _ in range(pager.random.randrange(3000)):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
        pager.random.random()
        os.waitpid(pid, 0)
    return ""


@case("random")
def random_packets(pager: Pager) -> str:
    """Mostly in the right form, with numbers that are at some edge."""
    draw = pager.random
    edges = [
        0,
        1,
        4095,
        4096,
        SIZE - 4096,
        SIZE,
        HUGE,
        1 << 32,
        1 << 47,
        1 << 56,
        (1 << 63) - 1,
        (1 << 64) - 4096,
        (1 << 64) - 1,
    ]
    url = json.dumps({"url": pager.url}).encode()
    for _ in range(60):
        with pager.connect() as connection, ExitStack() as stack:
            uffd, _ = stack.enter_context(native.userfaultfd())
            connection.settimeout(20)
            with suppress(OSError):
                if draw.random() < 0.7:
                    ask(connection, Ask(wire.OPEN, payload=url))
                for _ in range(draw.randrange(1, 12)):
                    asked = Ask(
                        draw.choice(
                            [
                                wire.HELLO,
                                wire.OPEN,
                                wire.MAP,
                                wire.MAP,
                                wire.MAP,
                                wire.PREFETCH,
                                wire.WHY,
                                wire.POPULATE,
                            ]
                        ),
                        id=draw.getrandbits(64),
                        address=draw.choice([memory(), *edges]),
                        length=draw.choice(edges),
                        offset=draw.choice(edges),
                        page=draw.choice([0, 4096, HUGE, draw.getrandbits(32)]),
                        flags=draw.choice([0, draw.getrandbits(5), draw.getrandbits(32)]),
                        payload=draw.choice([b"", url, b'{"space": 1}', draw.randbytes(draw.randrange(200))]),
                    )
                    packet = bytearray(asked.pack())
                    if draw.random() < 0.2:
                        packet[draw.randrange(len(packet))] ^= 1 << draw.randrange(8)
                    if draw.random() < 0.1:
                        del packet[draw.randrange(len(packet)) :]
                    wire.send(connection, bytes(packet), uffd if draw.random() < 0.5 else None)
                    if packet and not hear(connection):
                        break
    return ""


def good_client(pager: Pager) -> None:
    """Somebody else, who is served as if nothing had been: examples/pager_client.c."""
    command = [*sys.argv[4:5], pager.path, pager.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == sys.argv[5], done.stdout + done.stderr


def main() -> None:
    """Arguments: the pager's socket, its process, a snapshot, the good client and what that says, a seed.

    Prints, in JSON, what was said in each case, or what went wrong.
    """
    path, pid, url = sys.argv[1:4]
    pager = Pager(path, url, int(pid), int(sys.argv[6]))
    said = {}
    for name, attack in CASES.items():
        try:
            said[name] = attack(pager)
            good_client(pager)
        except Exception as error:
            said[name] = f"WRONG {type(error).__name__}: {error}"
    print(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)  # the memory is the kernel's to take back


if __name__ == "__main__":
    main()
