# SPDX-License-Identifier: Apache-2.0
"""io_uring by its three system calls, one request at a time: the machine may have no liburing."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Any

SETUP, ENTER, REGISTER = 425, 426, 427
READ_FIXED, WRITE_FIXED, READ, WRITE = 4, 5, 22, 23
REGISTER_BUFFERS = 0
ENTER_GETEVENTS = 1

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Ring:
    """A queue of one request. Calls raise OSError with what the kernel answers."""

    def __init__(self) -> None:
        params = (ctypes.c_uint32 * 30)()
        self._fd = _checked(libc.syscall(SETUP, 1, params))
        # struct io_uring_params: ten words, then the offsets of the fields of both queues
        self._sq, self._cq = params[10:20], params[20:30]
        entries = params[1]
        size = max(self._sq[6] + params[0] * 4, self._cq[5] + entries * 16)
        self._ring = mmap.mmap(self._fd, size, offset=0)  # both queues: IORING_FEAT_SINGLE_MMAP
        self._entries = mmap.mmap(self._fd, params[0] * 64, offset=0x10000000)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *exc: object) -> None:
        self._entries.close()
        self._ring.close()
        os.close(self._fd)

    def register(self, address: int, length: int) -> None:
        """Make this memory the fixed buffer 0."""
        vector = (ctypes.c_uint64 * 2)(address, length)
        _checked(libc.syscall(REGISTER, self._fd, REGISTER_BUFFERS, vector, 1))

    def write(self, fd: int, address: int, length: int) -> int:
        return self._do(WRITE, fd, address, length)

    def read(self, fd: int, address: int, length: int) -> int:
        return self._do(READ, fd, address, length)

    def read_fixed(self, fd: int, address: int, length: int) -> int:
        return self._do(READ_FIXED, fd, address, length)

    def _do(self, operation: int, fd: int, address: int, length: int) -> int:
        self._entries[:64] = struct.pack("<BBHiQQIIQHHIQQ", operation, 0, 0, fd, 0, address, length, *[0] * 7)
        tail = self._word(self._sq[1])
        self._put(self._sq[6], 0)  # the array's one slot names entry 0
        self._put(self._sq[1], tail + 1)
        _checked(libc.syscall(ENTER, self._fd, 1, 1, ENTER_GETEVENTS, None, 0))
        head = self._word(self._cq[0])
        at = self._cq[5] + (head & self._word(self._cq[2])) * 16
        result: int = struct.unpack_from("<i", self._ring, at + 8)[0]
        self._put(self._cq[0], head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def _word(self, at: int) -> int:
        found: Any = struct.unpack_from("<I", self._ring, at)[0]
        return int(found)

    def _put(self, at: int, value: int) -> None:
        struct.pack_into("<I", self._ring, at, value)
