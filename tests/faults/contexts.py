# SPDX-License-Identifier: Apache-2.0
"""What is done with lazy memory that nothing has touched yet, by the kernel or by other code than numpy: one
function for each. Runs in a child process and prints a JSON object: name -> [outcome on unpopulated memory,
outcome where the first chunk is populated, outcome after lazymem.populate].

An outcome is "right", the name of an errno, "short" where less was done than was asked for and the count says
so, or "wrong: ..." with what was found. A count that is too high is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import mmap
import os
import pickle
import re
import socket
import struct
import sys
import threading
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import xxhash

import lazymem

from .uring import Ring

Array = np.ndarray[Any, np.dtype[np.uint8]]

#: Bytes that a check hands over: six chunks and a half, from the middle of a chunk of 64 KiB on.
LENGTH = 6 * 65536 + 32768
PAGE = mmap.PAGESIZE

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def iovec(array: Array) -> Any:
    return ctypes.byref(Iovec(address(array), array.nbytes))


def same(got: Any, wanted: Any) -> None:
    got, wanted = bytes(got), bytes(wanted)
    if got != wanted:
        raise AssertionError(f"{len(got)} bytes for {len(wanted)}, a prefix: {wanted.startswith(got)}")


class Short(Exception):
    pass


class Checks:
    """The public methods are the checks. They get lazy memory and what it holds; those called into_, writable
    memory and what to put there. "touched": by code in user mode."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def _file(self, flags: int = 0, content: bytes = b"") -> Iterator[int]:
        path = self.folder / "file"
        path.write_bytes(content)
        fd = os.open(path, os.O_RDWR | flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _content(self) -> bytes:
        return (self.folder / "file").read_bytes()

    def _honest(self, done: int, got: bytes, wanted: bytes) -> None:
        """What a call says that it did is what arrived."""
        same(got, wanted[:done])
        if done < len(wanted):
            raise Short

    # ---- the kernel reads it ----

    def write(self, a: Array, wanted: bytes) -> None:
        with self._file() as fd:
            self._honest(os.write(fd, a), self._content(), wanted)

    def write_file_object(self, a: Array, wanted: bytes) -> None:
        try:
            with open(self.folder / "file", "wb") as file:
                file.write(a)
        finally:
            same(self._content(), wanted[: len(self._content())])
        same(self._content(), wanted)

    def writev_of_several_arrays(self, a: Array, wanted: bytes) -> None:
        with self._file() as fd:
            self._honest(os.writev(fd, [a[:100], a[100:PAGE], a[PAGE:]]), self._content(), wanted)

    def pwrite_direct(self, a: Array, wanted: bytes) -> None:
        with self._file(os.O_DIRECT) as fd:
            self._honest(os.pwrite(fd, a, 0), self._content(), wanted)

    def write_to_a_pipe(self, a: Array, wanted: bytes) -> None:
        self._through_pipe(lambda fd: os.write(fd, a), wanted)

    def vmsplice_and_splice_to_a_file(self, a: Array, wanted: bytes) -> None:
        piece = a[: 4 * PAGE]
        reader, writer = os.pipe()
        try:
            with self._file() as fd:
                done = checked(libc.vmsplice(writer, iovec(piece), 1, 0))
                assert os.splice(reader, fd, done) == done
                self._honest(done, self._content(), wanted[: 4 * PAGE])
        finally:
            os.close(reader)
            os.close(writer)

    def _through_pipe(self, write: Callable[[int], int], wanted: bytes) -> None:
        reader, writer = os.pipe()
        got = bytearray()

        def drain() -> None:
            while piece := os.read(reader, 1 << 20):
                got.extend(piece)

        thread = threading.Thread(target=drain)
        thread.start()
        try:
            done = write(writer)
        finally:
            os.close(writer)
            thread.join()
            os.close(reader)
            same(got, wanted[: len(got)])
        self._honest(done, bytes(got), wanted)

    def _through_socket(self, send: Callable[[socket.socket], int | None], wanted: bytes, kind: int) -> None:
        if kind == socket.AF_UNIX:
            ours, theirs = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as server:
                ours = socket.create_connection(server.getsockname())
                theirs, _ = server.accept()
        got = bytearray()

        def drain() -> None:
            while piece := theirs.recv(1 << 20):
                got.extend(piece)

        with ours, theirs:
            thread = threading.Thread(target=drain)
            thread.start()
            try:
                done = send(ours)
            finally:
                ours.shutdown(socket.SHUT_WR)
                thread.join()
                same(got, wanted[: len(got)])
            self._honest(len(wanted) if done is None else done, bytes(got), wanted)

    def send(self, a: Array, wanted: bytes) -> None:
        self._through_socket(lambda s: s.send(a), wanted, socket.AF_UNIX)

    def sendall_by_tcp(self, a: Array, wanted: bytes) -> None:
        self._through_socket(lambda s: s.sendall(a), wanted, socket.AF_INET)

    def sendmsg(self, a: Array, wanted: bytes) -> None:
        self._through_socket(lambda s: s.sendmsg([a[:PAGE], a[PAGE:]]), wanted, socket.AF_UNIX)

    def send_without_copy_by_tcp(self, a: Array, wanted: bytes) -> None:
        def send(s: socket.socket) -> int:
            s.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
            return s.send(a[:PAGE], 0x4000000)  # MSG_ZEROCOPY

        self._through_socket(send, wanted[:PAGE], socket.AF_INET)

    def process_vm_readv_by_another_process(self, a: Array, wanted: bytes) -> None:
        def read(parent: int) -> bytes:
            own = np.zeros(a.nbytes, np.uint8)
            done = checked(libc.process_vm_readv(parent, iovec(own), 1, iovec(a), 1, 0))
            return own[:done].tobytes()

        got = elsewhere(read)
        self._honest(len(got), got, wanted)

    def proc_mem_read_by_another_process(self, a: Array, wanted: bytes) -> None:
        """As gdb does. The kernel gives up at once where it would have to wait for a userfaultfd."""

        def read(parent: int) -> bytes:
            with open(f"/proc/{parent}/mem", "rb", buffering=0) as memory:
                return os.pread(memory.fileno(), a.nbytes, address(a))

        got = elsewhere(read)
        self._honest(len(got), got, wanted)

    def io_uring_write(self, a: Array, wanted: bytes) -> None:
        with self._file() as fd, Ring() as ring:
            self._honest(ring.write(fd, address(a), a.nbytes), self._content(), wanted)

    def path_name(self, a: Array, wanted: bytes) -> None:
        checked(libc.access(ctypes.c_void_p(address(a)), 0))  # see `content`

    def futex_word(self, a: Array, wanted: bytes) -> None:
        word = address(a) + 64
        other = (int.from_bytes(wanted[64:68], "little") + 1) & 0xFFFFFFFF
        timeout = (ctypes.c_long * 2)(10, 0)
        try:  # FUTEX_WAIT_PRIVATE
            checked(libc.syscall(202, ctypes.c_void_p(word), 128, ctypes.c_uint(other), timeout, None, 0))
        except BlockingIOError:
            return  # the word was read, and differs
        raise AssertionError("the futex waited for a word that differs")

    def tofile(self, a: Array, wanted: bytes) -> None:
        self._by_stdio(lambda: a.tofile(self.folder / "file"), wanted)

    def np_save(self, a: Array, wanted: bytes) -> None:
        path = self.folder / "array.npy"
        self._by_stdio(lambda: np.save(path, a), wanted)
        same(np.load(path).tobytes(), wanted)

    def _by_stdio(self, write: Callable[[], None], wanted: bytes) -> None:
        try:
            write()
        except OSError as error:  # numpy's own, without an errno
            if not re.fullmatch(r"\d+ requested and \d+ written", str(error)):
                raise
            raise OSError(errno.EFAULT, str(error)) from error

    def pickle_to_a_file(self, a: Array, wanted: bytes) -> None:
        with open(self.folder / "file", "wb") as file:
            pickle.dump(a, file, protocol=5)
        same(pickle.loads(self._content()), wanted)

    # ---- the kernel writes into it ----

    def into_read(self, a: Array, news: bytes) -> None:
        with self._file(content=news) as fd:
            done = os.readv(fd, [a])
        self._honest(done, a[:done].tobytes(), news)

    def into_read_direct(self, a: Array, news: bytes) -> None:
        with self._file(os.O_DIRECT, content=news) as fd:
            done = os.preadv(fd, [a], 0)
        self._honest(done, a[:done].tobytes(), news)

    def into_readinto(self, a: Array, news: bytes) -> None:
        with self._file(content=news) as fd, io.FileIO(fd, closefd=False) as file:
            done = file.readinto(a)
        self._honest(done, a[:done].tobytes(), news)

    def into_recv(self, a: Array, news: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(news[:PAGE])
            self._honest(ours.recv_into(a[:PAGE]), a[:PAGE].tobytes(), news[:PAGE])

    def into_recvmsg(self, a: Array, news: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(news[:PAGE])
            self._honest(ours.recvmsg_into([a[:10], a[10:PAGE]])[0], a[:PAGE].tobytes(), news[:PAGE])

    def into_process_vm_writev_by_another_process(self, a: Array, news: bytes) -> None:
        def write(parent: int) -> bytes:
            own = np.frombuffer(news, np.uint8)
            return checked(libc.process_vm_writev(parent, iovec(own), 1, iovec(a), 1, 0)).to_bytes(
                8, "little"
            )

        done = int.from_bytes(elsewhere(write), "little")
        self._honest(done, a[:done].tobytes(), news)

    def into_io_uring_read(self, a: Array, news: bytes) -> None:
        with self._file(content=news) as fd, Ring() as ring:
            done = ring.read(fd, address(a), a.nbytes)
        self._honest(done, a[:done].tobytes(), news)

    def into_io_uring_fixed_buffer(self, a: Array, news: bytes) -> None:
        """Pinned for writing, so memory of mode "r" is refused, as any read-only memory is."""
        with self._file(content=news) as fd, Ring() as ring:
            ring.register(address(a), a.nbytes)
            done = ring.read_fixed(fd, address(a), a.nbytes)
        self._honest(done, a[:done].tobytes(), news)

    # ---- user code touches it: right on every backend ----

    def touched_by_hashlib_zlib_xxhash(self, a: Array, wanted: bytes) -> None:
        half = len(wanted) // 3
        same(hashlib.sha256(a[:half]).digest(), hashlib.sha256(wanted[:half]).digest())
        assert zlib.crc32(a[half : 2 * half]) == zlib.crc32(wanted[half : 2 * half])
        same(xxhash.xxh3_64(a[2 * half :]).digest(), xxhash.xxh3_64(wanted[2 * half :]).digest())

    def touched_by_zlib_compress(self, a: Array, wanted: bytes) -> None:
        same(zlib.decompress(zlib.compress(a, 1)), wanted)

    def touched_by_np_savez(self, a: Array, wanted: bytes) -> None:
        path = self.folder / "arrays.npz"
        np.savez(path, a=a)
        same(np.load(path)["a"].tobytes(), wanted)

    def touched_by_zipfile(self, a: Array, wanted: bytes) -> None:
        path = self.folder / "archive.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", a.data)
        with zipfile.ZipFile(path) as archive:
            same(archive.read("a"), wanted)

    def touched_by_older_pickle_protocols(self, a: Array, wanted: bytes) -> None:
        with open(self.folder / "file", "wb") as file:
            pickle.dump(a, file, protocol=4)
        same(pickle.loads(self._content()), wanted)

    def touched_by_ctypes_memmove(self, a: Array, wanted: bytes) -> None:
        own = ctypes.create_string_buffer(a.nbytes)
        ctypes.memmove(own, address(a), a.nbytes)
        same(own.raw, wanted)

    def touched_by_ctypes_string_at(self, a: Array, wanted: bytes) -> None:
        same(ctypes.string_at(address(a), a.nbytes), wanted)

    def touched_by_a_c_extension(self, a: Array, wanted: bytes) -> None:
        ffi = cffi.FFI()
        own = ffi.new("char[]", a.nbytes)
        ffi.memmove(own, ffi.from_buffer(a), a.nbytes)
        same(ffi.buffer(own), wanted)

    def touched_by_struct(self, a: Array, wanted: bytes) -> None:
        for at in range(0, a.nbytes - 8, PAGE):
            assert struct.unpack_from("<Q", a, at) == struct.unpack_from("<Q", wanted, at)

    def touched_by_int_from_bytes(self, a: Array, wanted: bytes) -> None:
        assert int.from_bytes(a, "little") == int.from_bytes(wanted, "little")

    def touched_by_bytes_of_a_memoryview(self, a: Array, wanted: bytes) -> None:
        same(bytes(memoryview(a)), wanted)

    def touched_by_a_regular_expression(self, a: Array, wanted: bytes) -> None:
        assert len(re.findall(rb"\x00\x01", a.data)) == len(re.findall(rb"\x00\x01", wanted))

    def touched_by_copying_to_a_mapped_file(self, a: Array, wanted: bytes) -> None:
        with self._file(content=bytes(len(wanted))) as fd, mmap.mmap(fd, len(wanted)) as out:
            out[:] = a.data
            out.flush()
            same(self._content(), wanted)

    def into_memory_from_a_mapped_file_is_touched(self, a: Array, news: bytes) -> None:
        with self._file(content=news) as fd, mmap.mmap(fd, len(news)) as source:
            a[:] = np.frombuffer(source, np.uint8).copy()
        same(a, news)


def elsewhere(work: Callable[[int], bytes]) -> bytes:
    """What `work`, given this process's id, gives in another process, or its OSError."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            result = b"\0\0\0\0" + work(parent)
        except OSError as error:
            result = (error.errno or 0).to_bytes(4, "little")
        with open(writer, "wb") as file:
            file.write(result)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        result = file.read()
    os.waitpid(pid, 0)
    code = int.from_bytes(result[:4], "little")
    if code:
        raise OSError(code, os.strerror(code))
    return result[4:]


NAMES = [name for name in vars(Checks) if not name.startswith("_")]


def content() -> bytes:
    data = np.random.default_rng(5).integers(0, 256, 12 * 65536, np.uint8)
    data[32768 : 32768 + 10] = np.frombuffer(b"/dev/null\0", np.uint8)
    return data.tobytes()


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except Short:
        return "short"
    except Exception:
        return "wrong: " + traceback.format_exc()
    return "right"


def main(backend: str, path: str, folder: str) -> None:
    libc.prctl(0x59616D61, ctypes.c_ulong(-1 & (1 << 64) - 1), 0, 0, 0)  # PR_SET_PTRACER_ANY
    wanted, news = content(), content()[::-1]
    checks = Checks(Path(folder))
    try:
        lazymem.open(path, backend=backend).close()
    except lazymem.BackendUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    snaps = {mode: lazymem.open(path, backend=backend, mode=mode, readahead=0) for mode in "rc"}
    shown = {mode: snap["data"] for mode, snap in snaps.items()}
    part = slice(32768, 32768 + LENGTH)
    results: dict[str, list[str]] = {}

    def run(name: str, prepare: Callable[[Array], object]) -> str:
        into = name.startswith("into_")
        mode = "c" if into else "r"
        snaps[mode].evict()
        array = shown[mode]
        if into and backend == "eager":
            array[:] = np.frombuffer(wanted, np.uint8)
        prepare(array[part])
        given = news[part] if into else wanted[part]
        found = outcome(lambda: getattr(checks, name)(array[part], given))
        # Whatever was said, what lies in memory is old or new, and old around it.
        after = array.tobytes()
        around = after[: part.start] + after[part.stop :] == wanted[: part.start] + wanted[part.stop :]
        inside = after[part]
        mixed = np.frombuffer(inside, np.uint8)
        old, new = np.frombuffer(wanted[part], np.uint8), np.frombuffer(given, np.uint8)
        if not around or not np.all((mixed == old) | (mixed == new)):
            return f"wrong memory after {found}"
        return found

    for name in sys.argv[4:] or NAMES:
        results[name] = [
            run(name, lambda array: None),
            run(name, lambda array: array[: PAGE + 1].tobytes()),  # the first chunks only
            run(name, lazymem.populate),
        ]
    print(json.dumps(results))
