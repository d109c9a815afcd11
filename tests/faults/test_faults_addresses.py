# SPDX-License-Identifier: Apache-2.0
"""What an application does to the addresses of an array: move, unmap, replace, protect, lock, advise.

`tests/native/test_places.c` has the core's side of it: parts of chunks, races, forks, full tables.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ..children import check_child

CODE = """
import ctypes, errno, mmap, os, sys
import numpy as np
import lazymem
from lazymem.errors import ReadError
from tests.conftest import make_arrays

path, backend, mode = sys.argv[1:]
expected = make_arrays()["layer.3.weight"].reshape(-1)
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = libc.mmap.restype = ctypes.c_void_p
PAGE = 4096

def call(name, *arguments):
    return getattr(libc, name)(*(ctypes.c_void_p(x) for x in arguments))

def fresh():
    snap = lazymem.open(path, backend=backend, mode=mode, readahead=0)
    array = snap["layer.3.weight"].reshape(-1)
    start = -(-array.ctypes.data // PAGE) * PAGE
    return snap, array, start, (start - array.ctypes.data) // 4

def shows(address, first, count):
    shown = np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
    return np.array_equal(shown, expected[first : first + count])

# advice and locks: whatever they return, the bytes are right afterwards
snap, array, start, first = fresh()
length = 64 * PAGE
# WILLNEED, DONTNEED, FREE, REMOVE, HUGEPAGE, COLD, PAGEOUT, POPULATE_READ, COLLAPSE, DONTFORK, ...
for advice in (3, 4, 8, 9, 14, 15, 12, 13, 20, 21, 22, 23, 25, 10, 11, 18, 19):
    call("madvise", start, length, advice)
    assert shows(start, first, length // 4), advice
locked = call("mlock", start + 100 * PAGE, 10 * PAGE)
assert locked == 0 or backend == "uffd-user", ctypes.get_errno()
assert call("munlock", start + 100 * PAGE, 10 * PAGE) == 0
pages = (ctypes.c_ubyte * 4)()
assert call("mincore", start + 300 * PAGE, 4 * PAGE, ctypes.addressof(pages)) == 0 and not any(pages)
assert call("mprotect", start + 301 * PAGE, PAGE, 0) == 0
assert call("mprotect", start + 301 * PAGE, PAGE, 1) == 0
assert np.array_equal(array, expected)
assert call("mincore", start + 300 * PAGE, 4 * PAGE, ctypes.addressof(pages)) == 0 and all(pages)

# moved before it was touched; the snapshot says so where it is asked for what is no longer there
place = libc.mmap(*map(ctypes.c_void_p, (0, 32 * PAGE, 0, 0x22, -1, 0)))
window = libc.mremap(*map(ctypes.c_void_p, (start + 128 * PAGE, 32 * PAGE, 32 * PAGE, 1 | 2, place)))
assert call("madvise", window, 32 * PAGE, 4) == 0
assert shows(window, first + 128 * 1024, 32 * 1024)
try:
    snap.read("layer.3.weight")
except ReadError as error:
    assert "moved by this process" in str(error)
else:
    raise AssertionError
assert call("munmap", window, 32 * PAGE) == 0

# a part is the application's own now; evicting and closing leave it alone
own = start + 200 * PAGE
assert libc.mmap(*map(ctypes.c_void_p, (own, PAGE, 3, 0x32, -1, 0))) == own
ctypes.memset(own, 0xA5, PAGE)
snap.evict("layer.3.weight")
snap.prefetch("layer.3.weight", wait=True)
snap.evict("layer.3.weight")
del array
snap.close()
assert ctypes.string_at(own, PAGE) == bytes([0xA5]) * PAGE
assert call("munmap", own, PAGE) == 0
print("right")
"""


@pytest.mark.parametrize(("backend", "mode"), [("uffd", "r"), ("uffd-user", "c")])
def test_array_stays_right_under_changes_of_its_addresses(
    snapshot_path: Path, backend: str, mode: str
) -> None:
    assert check_child(CODE, snapshot_path, backend, mode) == "right\n"
