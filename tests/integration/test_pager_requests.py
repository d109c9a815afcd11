# SPDX-License-Identifier: Apache-2.0
"""What a pager asks of a store for what it has open already, counted where the requests arrive; and that it
gives nobody an old version for a new one."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lazymem

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

pytestmark = pytest.mark.needs_userfaultfd

# Two clients of a pager, an object that is replaced under them, and one more who comes after.
CODE = """
import json, os, shutil, sys
import numpy as np
import lazymem
from lazymem.copier import copy
from tests.faults.pager_process import running_pager

url, other = sys.argv[1:]

def said(call):
    try:
        return call()
    except lazymem.LazymemError as error:
        return type(error).__name__

def put():
    if "://" in url:
        copy(other, url, overwrite=True)
    else:
        shutil.copy(other, url + ".new")
        os.rename(url + ".new", url)

with running_pager() as socket:
    first = lazymem.open(url, pager=socket)
    for _ in range(4):
        first.prefetch("a", wait=True)
    first.prefetch("b")
    second = lazymem.open(url, pager=socket)
    second.prefetch("a", wait=True)
    in_memory = [int(snap["a"].sum()) for snap in (first, second)]
    put()
    in_memory += [int(snap["a"].sum()) for snap in (first, second)]
    missing = said(lambda: first.prefetch("c", wait=True))
    third = lazymem.open(url, pager=socket)
    third.prefetch(wait=True)
    old = missing is None and int(first["c"].sum())
    print(json.dumps([in_memory, missing or old, [int(third[name].sum()) for name in "abc"]]))
"""


SIZE = 4 << 20  # of an array: two of what clients of a pager call a chunk


def version(folder: Path, value: int) -> Path:
    arrays = {name: np.full(SIZE, value + i, np.uint8) for i, name in enumerate("abc")}
    path = folder / f"{value}.lzm"
    lazymem.build(arrays, path, codec="none")
    return path


def run(url: str, other: str, **env: str) -> tuple[list[int], str | int, list[int]]:
    in_memory, missing, after = json.loads(check_child(CODE, url, other, env=env))
    return in_memory, missing, after


def right(missing: str | int) -> tuple[list[int], str | int, list[int]]:
    return [SIZE] * 4, missing, [101 * SIZE, 102 * SIZE, 103 * SIZE]


def test_pager_asks_a_store_once_for_what_it_has_and_gives_nobody_an_old_version_for_a_new_one(
    s3: Bucket, proxy: HostileProxy, tmp_path: Path
) -> None:
    for key, value in (("object", 1), ("other", 101)):
        s3.put(key, version(tmp_path, value).read_bytes())
    assert run(s3.url("object"), s3.url("other"), AWS_ENDPOINT_URL=proxy.endpoint) == right("SnapshotChanged")
    before = list(takewhile(lambda request: request.method == "GET", proxy.requests()))
    ranges = [str(request.range) for request in before if request.path.endswith("object")]
    assert len([one for one in ranges if one.startswith("bytes=-")]) == 3  # each client's, and the pager's
    assert len(set(ranges)) == len(ranges) - 2  # and nothing else twice


def test_pager_reads_on_in_a_local_file_that_was_replaced(tmp_path: Path) -> None:
    """For those who have opened it before; others get the new one."""
    assert run(str(version(tmp_path, 1)), str(version(tmp_path, 101))) == right(3 * SIZE)
