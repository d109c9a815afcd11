# SPDX-License-Identifier: Apache-2.0
"""Opening costs what the index costs, whatever lies behind it. Counted, not timed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import lazymem

from ..children import check_child

TIB = 1 << 40


def test_one_tebibyte_of_zeros_and_a_few_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "sparse.bin", tmp_path / "sparse.lzm"
    places = {0: b"first", TIB // 2 + 12345: b"middle", TIB - 4: b"last"}
    with open(source, "wb") as file:
        file.truncate(TIB)
        for at, data in places.items():
            file.seek(at)
            file.write(data)
    report = lazymem.build(source, target)
    assert report.content_bytes == TIB
    assert report.chunks - report.zero_chunks <= 4
    assert target.stat().st_size < 100_000
    code = """
    import sys
    import lazymem
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    before = resident()
    snap = lazymem.open(sys.argv[1])
    data = snap["data"]
    opened = resident() - before - snap.stats().bytes_populated
    for at, expected in eval(sys.argv[2]).items():
        assert bytes(data[at : at + len(expected)]) == expected, at
    for at in range(7 << 20, 1 << 40, 5 << 33):
        assert data[at] == 0
    stats = snap.stats()
    assert stats.bytes_read < 1 << 20 and stats.requests <= 4, stats
    assert opened < 8 << 20, opened
    print(resident() - before < 48 << 20, resident() - before, file=sys.stderr)
    assert resident() - before < 48 << 20
    snap.prefetch(wait=True)
    print("right")
    """
    assert check_child(code, target, repr(places)) == "right\n"


def test_a_hundred_thousand_arrays(tmp_path: Path) -> None:
    path = tmp_path / "many.lzm"
    values = np.arange(100_000, dtype=np.int32)
    lazymem.build({f"block.{i}.weight": values[i : i + 1] for i in range(100_000)}, path)
    with lazymem.open(path) as snap:
        assert len(snap) == 100_000
        assert snap.backend == "eager" or snap.stats().requests == 0
        for i in (0, 1, 77_777, 99_999):
            assert snap[f"block.{i}.weight"].tolist() == [i]
    # The index, and with it what opening reads, grows with the number of arrays only.
    assert path.stat().st_size < 100_000 * 64 + 100_000


def test_descriptors_and_reads_of_an_open(snapshot_path: Path, monkeypatch: object) -> None:
    """One read to see what it is, one of the tail, whatever the size."""
    reads = []
    real = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        reads.append((offset, length))
        return real(fd, length, offset)

    os.pread = counted
    try:
        lazymem.open(snapshot_path).close()
    finally:
        os.pread = real
    assert len(reads) == 2
    assert sum(length for _, length in reads) <= 65536 + 128
