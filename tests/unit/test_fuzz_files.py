# SPDX-License-Identifier: Apache-2.0
"""Files changed at random, the same each time: a snapshot's index, under checksums made right again, and the
containers that are read in place. Whatever they say, it is a named error or something that can be shown."""

from __future__ import annotations

import io
import itertools
import os
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem.errors import LazymemError
from lazymem.format.index import SnapshotIndex

from .format_tools import parse, raw_sections, small_snapshot, with_sections, with_tail

#: More by hand: LAZYMEM_FUZZ_SECONDS=60 pytest tests/unit/test_fuzz_files.py
SECONDS = float(os.environ.get("LAZYMEM_FUZZ_SECONDS", "0"))
ROUNDS = 100
TELLING = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)
NUMBERS = (0, 1, 2, 255, 2**16, 2**31, 2**32 - 1, 2**46, 2**63, 2**64 - 1)


def change(data: bytes, rng: random.Random) -> bytes:
    """One to four bytes or numbers set, some cut out, doubled, or the end cut off."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not made:
            break
        at = rng.randrange(len(made))
        kind = rng.randrange(8)
        if kind < 3:
            made[at] = rng.choice([*TELLING, rng.randrange(256), made[at] ^ 1 << rng.randrange(8)])
        elif kind < 6:
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice(NUMBERS) % (1 << 8 * width)
            at -= at % width
            made[at : at + width] = value.to_bytes(width, "little")
        elif kind == 6:
            some = made[at : at + rng.randint(1, 40)]
            made[at:at] = some * rng.randint(0, 2)
        else:
            del made[at : at + rng.choice([1, 8, len(made)])]
    return bytes(made)


def rounds(seed: int) -> Iterator[random.Random]:
    """A generator for each round."""
    until = time.monotonic() + SECONDS
    for number in itertools.count():
        if number >= ROUNDS and time.monotonic() > until:
            break
        yield random.Random(f"{seed} {number}")


def look_at(index: SnapshotIndex) -> None:
    for row, name in enumerate(index.rows):
        begin, length = index.range_of(row)
        assert 0 <= begin <= begin + length <= index.chunk_count * index.chunk_size
        assert index.dtype_of(row).itemsize >= 0
        assert all(side >= 0 for side in index.shape_of(row))
        index.order_of(row)
        if not index.is_hidden(row):
            assert name in index.rows
    for chunk in {0, index.chunk_count - 1} if index.chunk_count else ():
        index.record_of(chunk)
        index.chunk_length(chunk)
    index.summary()


@pytest.fixture(scope="module")
def snapshot() -> bytes:
    return small_snapshot()


@pytest.mark.parametrize("seed", range(2))
def test_changed_index_is_refused_or_can_be_shown(snapshot: bytes, seed: int, tmp_path: Path) -> None:
    names = sorted(raw_sections(snapshot))
    path = tmp_path / "a.lzm"
    shown = 0
    for rng in rounds(seed):
        name = rng.choice(names)

        def spoil(sections: dict[str, bytes], rng: random.Random = rng, name: str = name) -> None:
            sections[name] = change(sections[name], rng)

        made = with_sections(snapshot, spoil)
        if rng.random() < 0.1:
            made = with_tail(made, **{rng.choice(["index_offset", "file_size"]): rng.choice(NUMBERS[:-1])})
        try:
            look_at(parse(made))
        except LazymemError:
            continue
        path.write_bytes(made)
        shown += show(path)
    assert shown > 0


def show(path: Path) -> bool:
    """Open it and read what is small; whether that went well. Raises anything but a named error."""
    try:
        with lazymem.open(path, backend="eager") as snap:
            for name in snap:
                if snap.info(name).nbytes < 1 << 20:
                    np.asarray(snap[name]).tobytes()
    except LazymemError:
        return False
    return True


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(200, dtype=np.int32).reshape(20, 10))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.arange(50), b=np.ones((3, 4)))
    return file.getvalue()


def safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"a": np.arange(50), "b": np.ones((3, 4), np.float16)}, {"format": "np"})


def torch_zip() -> bytes:
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    base = torch.arange(100.0)
    torch.save({"a": base, "b": base[10:50].reshape(5, 8).t(), "n": {"c": torch.ones(3)}}, file)
    with zipfile.ZipFile(file) as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())
    return file.getvalue()


def gguf() -> bytes:
    text = (b"general.name", b"fuzz")
    entry = b"".join(len(part).to_bytes(8, "little") + part for part in text[:1])
    entry += (8).to_bytes(4, "little") + len(text[1]).to_bytes(8, "little") + text[1]
    tensor = (1).to_bytes(8, "little") + b"w" + (1).to_bytes(4, "little") + (64).to_bytes(8, "little")
    tensor += (0).to_bytes(4, "little") + (0).to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
    made = head + entry + tensor
    return made + bytes(-len(made) % 32) + np.arange(64, dtype=np.float32).tobytes()


@pytest.mark.parametrize("make", [npy, npz, safetensors, torch_zip, gguf])
def test_changed_container_is_refused_or_can_be_shown(make: Callable[[], bytes], tmp_path: Path) -> None:
    good = make()
    path = tmp_path / f"a.{make.__name__.removeprefix('torch_').replace('zip', 'pt')}"
    path.write_bytes(good)
    assert show(path)
    for rng in rounds(7):
        # The head and the end say most; the rest are numbers.
        begin = rng.choice([0, 0, max(0, len(good) - 400)])
        path.write_bytes(good[:begin] + change(good[begin : begin + 400], rng) + good[begin + 400 :])
        show(path)
