# SPDX-License-Identifier: Apache-2.0
"""One piece of an object as a file: its name, the 64 bytes before its data, reading and checking it.

    bytes  0..8    "LMPIECE1"
    bytes  8..28   the object's key
    bytes 28..32   zeros
    bytes 32..40   offset of the piece in the object (little-endian, as all numbers here)
    bytes 40..48   length of the piece
    bytes 48..56   XXH3-64 of the data
    bytes 56..64   XXH3-64 of bytes 0..56
    bytes 64..     the data

Everything in such a file may be wrong: it is published without fsync, so that after a power cut it may
lack data or hold zeros, and somebody may have put anything under its name. Key, offset and length are in
it so that a file which strayed under another's name is not taken for it.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from typing import Final

import xxhash

KEY_SIZE: Final = 20
HEADER_SIZE: Final = 64

_MAGIC: Final = b"LMPIECE1"
_FIELDS: Final = struct.Struct(f"<8s{KEY_SIZE}s4xQQQ")
_CHECK: Final = struct.Struct("<Q")
_BLOCK: Final = 4096

_KEY: Final = re.compile(f"[0-9a-f]{{{2 * KEY_SIZE}}}")
_PIECE: Final = re.compile(r"[0-9a-f]{1,16}-[0-9a-f]{1,16}")
_TEMPORARY: Final = re.compile(rf"{_PIECE.pattern}\.[0-9a-f]{{12}}\.tmp")

# O_NONBLOCK: the open of a planted named pipe would wait for a writer. O_NOFOLLOW: no planted links.
SAFE: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def name_of(offset: int, length: int) -> str:
    """A piece's name in its object's directory."""
    return f"{offset:x}-{length:x}"


def temporary_of(name: str) -> str:
    """A name that nobody else has, to write under until the piece is whole."""
    return f"{name}.{os.urandom(6).hex()}.tmp"


def is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def is_piece(name: str) -> bool:
    return _PIECE.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def disk_usage(size: int) -> int:
    """What a file of `size` bytes takes, near enough: whole blocks, so that tiny pieces count too."""
    return -(-size // _BLOCK) * _BLOCK


def digest_of(data: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def make_header(key: str, offset: int, length: int, digest: int) -> bytes:
    fields = _FIELDS.pack(_MAGIC, bytes.fromhex(key), offset, length, digest)
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))


def _digest_in(header: bytes | bytearray, key: str, offset: int, length: int) -> int | None:
    """The digest that the header promises for just this piece, or None if it is not that piece's."""
    digest: int = _FIELDS.unpack_from(header)[-1]
    return digest if bytes(header) == make_header(key, offset, length, digest) else None


def is_whole_file(info: os.stat_result, length: int) -> bool:
    return stat.S_ISREG(info.st_mode) and info.st_size == HEADER_SIZE + length


def read(fd: int, key: str, offset: int, out: memoryview) -> bool:
    """Fill `out` from the file; True only if what is in it now is the piece, checked."""
    header = bytearray(HEADER_SIZE)
    view = memoryview(header)
    done, size = 0, HEADER_SIZE + len(out)
    while done < size:
        if done < HEADER_SIZE:
            count = os.preadv(fd, [view[done:], out], done)
        else:
            count = os.preadv(fd, [out[done - HEADER_SIZE :]], done)
        if count == 0:
            return False
        done += count
    digest = _digest_in(header, key, offset, len(out))
    return digest is not None and digest == digest_of(out)


def read_digest(fd: int, key: str, offset: int, length: int) -> int | None:
    """The digest in the file's header, if the file seems to be this piece; the data is not looked at."""
    if not is_whole_file(os.fstat(fd), length):
        return None
    header = os.pread(fd, HEADER_SIZE, 0)
    return _digest_in(header, key, offset, length) if len(header) == HEADER_SIZE else None


def write(fd: int, header: bytes, data: memoryview) -> None:
    """All of it, or OSError."""
    head = memoryview(header)
    done, size = 0, HEADER_SIZE + len(data)
    while done < size:
        parts = [head[done:], data] if done < HEADER_SIZE else [data[done - HEADER_SIZE :]]
        done += os.writev(fd, parts)
