# SPDX-License-Identifier: Apache-2.0
"""`populate` and `explain`: what an application does before, and after, a system call on lazy memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lazymem

from ..children import check_child

COMMON = """
import gc, mmap, os, sys
import numpy as np
import lazymem
from tests.arrays import make_arrays

path, backend = sys.argv[1:3]
expected = make_arrays()
out = os.open(os.devnull if len(sys.argv) < 4 else sys.argv[3], os.O_RDWR | os.O_CREAT)

def opened(**options):
    return lazymem.open(path, backend=backend, readahead=0, **options)

def states(snap, name):
    info = snap.info(name)
    first, last = info.offset // snap.chunk_size, (info.offset + info.nbytes - 1) // snap.chunk_size
    return snap.chunk_states()[first : last + 1]
"""


@pytest.mark.parametrize("backend", ["uffd", "uffd-user", "sigsegv", "eager"])
def test_populate_takes_whatever_shows_lazy_memory(snapshot_path: Path, tmp_path: Path, backend: str) -> None:
    code = (
        COMMON
        + """
snap = opened()
lazy = backend != "eager"
weight = snap["layer.1.weight"]
assert lazymem.populate(weight) is weight
assert set(states(snap, "layer.1.weight")) == {2}
assert not lazy or 0 in states(snap, "layer.2.weight")
assert os.pwrite(out, weight, 0) == weight.nbytes
assert os.pread(out, weight.nbytes, 0) == expected["layer.1.weight"].tobytes()

before = snap.stats().chunks_populated
column = lazymem.populate(snap["layer.3.weight"][::256, 7:9])  # every eighth of 32 chunks
assert not lazy or snap.stats().chunks_populated - before == 4
assert np.array_equal(column, expected["layer.3.weight"][::256, 7:9])
assert not lazy or set(states(snap, "layer.3.weight")[1:8]) == {0}

both = {"a": [snap["layer.4.weight"], (memoryview(snap["layer.5.weight"])[:3],)], "b": 3, "c": "text"}
assert lazymem.populate(both) is both
assert set(states(snap, "layer.4.weight")) == {2}
assert not lazy or states(snap, "layer.5.weight")[:8].count(2) in (1, 2)
assert lazymem.populate(snap) is snap
assert set(states(snap, "layer.7.weight")) == {2}

own = np.arange(5)
assert lazymem.populate(own) is own
assert lazymem.populate(b"bytes") == b"bytes"
objects = np.empty(1, object)
objects[0] = snap["layer.6.weight"]
for wrong in (3, "text", None, object(), objects):
    try:
        lazymem.populate(wrong)
    except TypeError as error:
        assert "shows no memory" in str(error) or "array of objects" in str(error)
    else:
        raise AssertionError(wrong)
"""
    )
    check_child(code, snapshot_path, backend, tmp_path / "out")


def test_populate_takes_what_holds_itself_and_what_is_nested_deeply(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
snap = opened()
itself = {"array": snap["layer.1.weight"]}
itself["itself"] = [itself, (itself,)]
assert lazymem.populate(itself) is itself
assert set(states(snap, "layer.1.weight")) == {2}
assert 0 in states(snap, "layer.2.weight")
deep = snap["layer.2.weight"]
for _ in range(20_000):
    deep = [deep]
lazymem.populate(deep)
assert set(states(snap, "layer.2.weight")) == {2}
while isinstance(deep, list):  # what Python would take apart by recursion
    deep = deep.pop()
"""
    )
    check_child(code, snapshot_path, "uffd-user")


@pytest.mark.parametrize("backend", ["uffd", "uffd-user", "sigsegv"])
def test_populate_works_without_the_snapshot_and_after_pages_were_given_back(
    snapshot_path: Path, tmp_path: Path, backend: str
) -> None:
    code = (
        COMMON
        + """
import ctypes
array = lazymem.open_array(path, "ids", backend=backend, readahead=0)
gc.collect()
assert os.pwrite(out, lazymem.populate(array), 0) == array.nbytes
libc = ctypes.CDLL(None)
page = mmap.PAGESIZE
begin = -(-array.ctypes.data // page) * page
for _ in range(2):
    assert libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(20 * page), mmap.MADV_DONTNEED) == 0
    assert os.pwrite(out, lazymem.populate(array), 0) == array.nbytes
assert os.pread(out, array.nbytes, 0) == expected["ids"].tobytes()

# What lies where a closed snapshot lay is nobody's business.
snap = opened()
address = snap["ids"].ctypes.data
assert "'ids'" in lazymem.explain(address)
snap.close()
assert "nothing lazy" in lazymem.explain(address)
assert "is closed" in lazymem.explain(snap)
del array
gc.collect()
assert "No snapshot is open" in lazymem.explain()
"""
    )
    check_child(code, snapshot_path, backend, tmp_path / "out")


@pytest.mark.parametrize("backend", ["uffd", "uffd-user", "sigsegv"])
def test_populate_raises_what_prefetch_raises(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "damaged.lzm"
    data = np.random.default_rng(3).integers(0, 256, 500_000, np.uint8)
    lazymem.build({"first": data, "second": data[::-1].copy()}, path, chunk_size=1 << 16, codec="none")
    stored = bytearray(path.read_bytes())
    at = stored.find(data[200_000:200_016].tobytes())
    stored[at] ^= 1
    path.write_bytes(stored)
    code = (
        COMMON
        + """
snap = opened()
lazymem.populate(snap["first"][:100])
try:
    lazymem.populate(snap["first"][100:])
except lazymem.ChunkCorrupt as error:
    assert error.array == "first"
    said = lazymem.explain(error)
    assert said.startswith("It says itself"), said
else:
    raise AssertionError
said = lazymem.explain(snap["first"])
assert "could not be had when last asked for" in said, said
part = snap["first"][200_000:]
try:
    os.write(out, part)
except OSError as error:  # poisoned on uffd, unpopulated on the others
    said = lazymem.explain(error)
    assert "'first'" in said, said
    assert "SIGBUS" in said, said
else:
    raise AssertionError
"""
    )
    check_child(code, path, backend, tmp_path / "out")


@pytest.mark.parametrize(
    ("backend", "why"), [("uffd-user", "user mode only"), ("sigsegv", "not sent for the kernel's own")]
)
def test_explain_says_why_a_system_call_failed_and_what_to_do(
    snapshot_path: Path, tmp_path: Path, backend: str, why: str
) -> None:
    code = (
        COMMON
        + """
snap = opened()
weight = snap["layer.1.weight"]

def send(given):
    os.pwrite(out, given, 0)

def failure(call):
    try:
        call()
    except OSError as error:
        assert lazymem.explain() == lazymem.explain(error)
        return lazymem.explain(error)
    raise AssertionError

said = failure(lambda: send(snap["ids"][1000:2000]))
assert "Variable 'given'" in said, said
assert "array 'ids'" in said, said
assert f"of {path!r}" in said, said
assert "0 are populated" in said or "0 is populated" in said, said
assert WHY in said, said
assert "lazymem.populate(array)" in said, said
assert "lazymem doctor" in said, said

said = failure(lambda: weight.tofile(sys.argv[3]))
assert "Variable 'weight'" in said, said
assert "array 'layer.1.weight'" in said, said

from safetensors import SafetensorError
from safetensors.numpy import save_file
tensors, saved = {"x": snap["layer.2.weight"]}, sys.argv[3] + ".safetensors"
try:
    save_file(tensors, saved)  # what is larger than its buffer of a MiB it hands to the kernel as it is
except SafetensorError as error:
    said = lazymem.explain(error)
    assert "array 'layer.2.weight'" in said, said
    assert "lazymem.populate(array)" in said, said
else:
    raise AssertionError
save_file(lazymem.populate(tensors), saved)
assert lazymem.open_array(saved, "x").tobytes() == expected["layer.2.weight"].tobytes()

said = failure(lambda: os.pwrite(out, snap["small.3"], 0))  # no variable shows it
assert "Open in this process: 1" in said, said
assert "lazymem.populate(array)" in said, said

lazymem.populate(weight)
said = lazymem.explain(weight[::2])
assert "All of it is populated" in said, said
assert "arrays" in lazymem.explain(snap), lazymem.explain(snap)
assert "ordinary memory" in lazymem.explain(np.zeros(3))
assert "ordinary memory" in lazymem.explain(id(snap))
assert "no bytes" in lazymem.explain(snap["empty"])
assert "shows no memory" in lazymem.explain("text")
assert "not how a system call fails" in lazymem.explain(KeyError("other"))
assert "not how a system call fails" in lazymem.explain(FileNotFoundError(2, "other"))

for served in ("uffd", "eager"):
    other = lazymem.open(path, backend=served)
    assert "system calls work" in lazymem.explain(other["ids"])
"""
    ).replace("WHY", repr(why))
    check_child(code, snapshot_path, backend, tmp_path / "out")


@pytest.mark.needs_mapping
def test_plain_mapping_is_populated_and_explained(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.arange(100_000))
    with lazymem.open(path) as snap:
        assert snap.backend == "map"
        assert lazymem.populate(snap["data"])[-1] == 99_999
        assert "plain mapping" in lazymem.explain(snap["data"])
