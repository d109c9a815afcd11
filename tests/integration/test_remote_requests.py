# SPDX-License-Identifier: Apache-2.0
"""What opening and touching cost, counted where the requests arrive."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lazymem

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy, Request
    from ..servers.s3 import Bucket

TIB = 1 << 40
KEY = "object"


def bytes_of(requests: list[Request]) -> int:
    return sum(request.body_bytes for request in requests)


# Each line that the child says is a moment at which the parent counts; the proxy runs in the parent.
STEPS = """
import json, os, sys
import numpy as np
import lazymem
url, proxy, steps = sys.argv[1], sys.argv[2], sys.argv[3:]
os.environ["AWS_ENDPOINT_URL"] = proxy
snap = lazymem.open(url, readahead=0)
results = []
for step in steps:
    results.append(eval(step))
print(json.dumps(results, default=float))
"""


def run_steps(s3: Bucket, proxy: HostileProxy, *steps: str) -> list[Request]:
    """Open the object in another process, and evaluate `steps` there; the requests of all that."""
    before = len(proxy.requests())
    check_child(STEPS, s3.url(KEY), proxy.endpoint, *steps)
    return proxy.requests()[before:]


@pytest.mark.needs_lazy
def test_a_snapshot_opens_in_one_request_and_an_element_takes_one_more(
    s3: Bucket, proxy: HostileProxy, snapshot_path: Path
) -> None:
    s3.put(KEY, snapshot_path.read_bytes())
    opened = run_steps(s3, proxy)
    assert len(opened) == 1
    touched = run_steps(s3, proxy, "snap['layer.3.weight'][700, 3]")
    assert len(touched) == 2
    assert bytes_of(touched) - bytes_of(opened) <= 64 * 1024  # a chunk, compressed
    again = run_steps(s3, proxy, "snap['layer.3.weight'][700, 3]", "snap['layer.3.weight'][700, 4]")
    assert len(again) == 2
    elsewhere = run_steps(s3, proxy, "snap['layer.3.weight'][700, 3]", "snap['layer.8.weight'][0, 0]")
    assert len(elsewhere) == 3


def test_every_request_is_a_range_of_the_version_that_was_opened(
    s3: Bucket, proxy: HostileProxy, snapshot_path: Path
) -> None:
    etag = s3.put(KEY, snapshot_path.read_bytes())
    first, *others = run_steps(s3, proxy, "snap.prefetch(wait=True)")
    assert first.range is not None
    assert first.range.startswith("bytes=-")
    assert others
    assert all(request.if_match == etag for request in others)
    assert all(request.range is not None and request.status == 206 for request in (first, *others))


def test_a_full_scan_asks_for_ranges_of_many_chunks(
    s3: Bucket, proxy: HostileProxy, snapshot_path: Path
) -> None:
    data = snapshot_path.read_bytes()
    s3.put(KEY, data)
    requests = run_steps(s3, proxy, "snap.prefetch(wait=True)", "snap.chunk_count")
    with lazymem.open(snapshot_path) as snap:
        assert len(requests) < snap.chunk_count / 4
    assert bytes_of(requests) < len(data) * 1.1 + 64 * 1024


@pytest.mark.needs_lazy
def test_one_tebibyte_opens_in_two_requests_and_the_size_of_its_index(
    s3: Bucket, proxy: HostileProxy, tmp_path: Path
) -> None:
    source, target = tmp_path / "sparse.bin", tmp_path / "sparse.lzm"
    places = {0: b"first", TIB // 2 + 12345: b"middle", TIB - 4: b"last"}
    with open(source, "wb") as file:
        file.truncate(TIB)
        for at, data in places.items():
            file.seek(at)
            file.write(data)
    lazymem.build(source, target)
    stored = target.read_bytes()
    s3.put(KEY, stored)
    opened = run_steps(s3, proxy)
    assert len(opened) <= 2
    assert bytes_of(opened) <= len(stored)
    zeros = run_steps(s3, proxy, *(f"1 // (snap['data'][{at}] == 0)" for at in range(7 << 20, TIB, 5 << 33)))
    assert len(zeros) == len(opened)
    steps = [
        f"1 // (bytes(snap['data'][{at} : {at + len(data)}]) == {data!r})" for at, data in places.items()
    ]
    assert len(run_steps(s3, proxy, *steps)) <= len(opened) + len(places)


@pytest.mark.needs_lazy
def test_an_index_of_megabytes_takes_a_second_request(
    s3: Bucket, proxy: HostileProxy, tmp_path: Path
) -> None:
    path = tmp_path / "many.lzm"
    values = np.random.default_rng(1).integers(0, 1 << 30, 100_000, dtype=np.int32)
    lazymem.build({f"block.{i}.weight": values[i : i + 1] for i in range(100_000)}, path)
    s3.put(KEY, path.read_bytes())
    opened = run_steps(s3, proxy, "len(snap)")
    assert len(opened) == 2
    assert bytes_of(opened) <= path.stat().st_size + 64 * 1024


@pytest.mark.needs_lazy
@pytest.mark.parametrize("form", ["safetensors", "npy", "raw"])
def test_files_in_place_open_in_two_requests(s3: Bucket, proxy: HostileProxy, form: str) -> None:
    array = np.random.default_rng(2).standard_normal((2000, 500)).astype(np.float32)  # 4 MB
    if form == "safetensors":
        data = pytest.importorskip("safetensors.numpy").save({"x": array, "y": array[::-1].copy()})
    elif form == "npy":
        file = io.BytesIO()
        np.save(file, array)
        data = file.getvalue()
    else:
        data = array.tobytes()
    s3.put(KEY, data)
    opened = run_steps(s3, proxy)
    assert len(opened) <= 2
    assert bytes_of(opened) < 200 * 1024
    touched = run_steps(s3, proxy, "next(iter(snap.values())).reshape(-1)[0]")
    assert len(touched) <= len(opened) + 1
