# SPDX-License-Identifier: Apache-2.0
"""The suite on every way to lazy memory, and what each way does with a touch.

Here the files that are about memory run on each way that "auto" does not take on a machine that offers all.
All of the suite on one: see the README.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.ways import survey

from ..children import check_child
from ..once import FOLDER, folder_of_the_run

WAYS = ("uffd", "uffd-user", "sigsegv", "eager")
ABOUT_MEMORY = ("test_open.py", "test_lifetimes.py")
#: Thousands of opens, and what opens on each way by itself: once is enough.
NOT_AGAIN = "not thousands and not every_backend"


def is_there(way: str) -> bool:
    """Whether this machine has it; everybody can read at open."""
    return way == "eager" or any(one.backend == way and one.usable for one in survey().ways)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("way", WAYS[1:])
def test_what_is_about_memory_holds_on_every_way(
    way: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not is_there(way):
        pytest.skip(f"not to be had here: {survey().reason(way)}")
    folder, once = Path(__file__).parent, str(folder_of_the_run(tmp_path_factory))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short",
         f"--basetemp={tmp_path / 'way'}", "-k", NOT_AGAIN, *(str(folder / name) for name in ABOUT_MEMORY)],
        env={**os.environ, "LAZYMEM_BACKEND": way, "PYTEST_ADDOPTS": "", FOLDER: once},
        cwd=folder.parents[1], capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    count = re.search(r"(\d+) passed", done.stdout)
    assert count is not None
    assert int(count[1]) > 35


TOUCHES = """
import errno, json, os, sys
import lazymem
path, ways = sys.argv[1], sys.argv[2:]
found = {}
for way in ways:
    with lazymem.open(path, backend=way, readahead=0) as snap:
        absent = snap.chunk_states().count(0)
        array = snap["layer.4.weight"]
        reader, writer = os.pipe()
        try:
            os.write(writer, array[900:901].data.cast("B"))
            kernel = "written"
        except OSError as error:
            kernel = errno.errorcode[error.errno]
        touched = float(array[0, 0]) != 0
        lazy = absent > 0, 0 < snap.chunk_states().count(0) < absent
        snap.prefetch("layer.4.weight", wait=True)
        os.write(writer, array[900:901].data.cast("B"))
        data = os.read(reader, 1 << 16)
        right = data[-2048:] == array[900].tobytes()
        del array
    with lazymem.open(path, backend=way, mode="c") as snap:
        ids = snap["ids"]
        ids[5] = 77
        snap.evict("ids")
        found[way] = [*lazy, kernel, touched, right, int(ids[5])]
        del ids
print(json.dumps(found))
"""


def test_every_way_does_with_a_touch_what_the_readme_says(snapshot_path: Path) -> None:
    """Chunks left at open, and after a touch; the kernel's touch, code's; the kernel's after prefetch; what
    was written, after evict."""
    lazy = {
        "uffd": [True, True, "written", True, True, 5],
        "uffd-user": [True, True, "EFAULT", True, True, 5],
        "sigsegv": [True, True, "EFAULT", True, True, 5],
        "eager": [False, False, "written", True, True, 77],
    }
    there = [way for way in WAYS if is_there(way)]
    found = json.loads(check_child(TOUCHES, snapshot_path, *there))
    assert found == {way: lazy[way] for way in there}
