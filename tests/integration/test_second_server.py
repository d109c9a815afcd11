# SPDX-License-Identifier: Apache-2.0
"""The same, against an S3 server by other people (moto): what is right must not hang on one server's ways.

Deselected by default; run it with `-m moto`. Small objects only: moto takes a copy of the object for
every range of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lazymem

from ..children import check_child, run_child
from ..servers.s3 import Bucket

pytestmark = [
    pytest.mark.moto,
    pytest.mark.skipif(
        importlib.util.find_spec("moto") is None, reason="the server is in the extra: lazymem[test]"
    ),
]

READ = """
import sys
import numpy as np
import lazymem

snap = lazymem.open(sys.argv[1], storage_options={"timeout": 20})
assert np.array_equal(snap["ids"], np.arange(300_000))
"""


@pytest.fixture(scope="module")
def moto_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ..servers.moto import Moto

    with Moto(tmp_path_factory.mktemp("moto")) as server:
        yield server.endpoint


@pytest.fixture
def bucket(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    from ..servers.moto import Moto

    bucket = Bucket(moto_endpoint, Moto.credentials, monkeypatch)
    yield bucket
    bucket.close()


@pytest.mark.parametrize("client", ["http", "boto3", "obstore"])
def test_ranges_through_every_client(bucket: Bucket, tmp_path: Path, client: str) -> None:
    path = tmp_path / "small.lzm"
    lazymem.build({"ids": np.arange(300_000)}, path, chunk_size=1 << 16)
    bucket.put("small.lzm", path.read_bytes())
    code = READ.replace('"timeout": 20', f'"timeout": 20, "client": "{client}"') + 'print("right")'
    assert check_child(code, bucket.url("small.lzm")) == "right\n"


def test_an_object_that_was_replaced_is_noticed(bucket: Bucket, tmp_path: Path) -> None:
    first, second = tmp_path / "first.lzm", tmp_path / "second.lzm"
    lazymem.build({"a": np.arange(300_000)}, first, chunk_size=1 << 16)
    lazymem.build({"a": np.arange(300_000)[::-1].copy()}, second, chunk_size=1 << 16)
    bucket.put("snap.lzm", first.read_bytes())
    code = """
    import os, sys
    import numpy as np
    import boto3
    import lazymem
    url, bucket, second = sys.argv[1:]
    snap = lazymem.open(url, readahead=0)
    assert snap["a"][0] == 0
    boto3.client("s3").put_object(Bucket=bucket, Key="snap.lzm", Body=open(second, "rb").read())
    try:
        snap.prefetch(wait=True)
    except lazymem.SnapshotChanged as error:
        print(url in str(error))
    """
    assert check_child(code, bucket.url("snap.lzm"), bucket.bucket, second) == "True\n"


def test_a_multipart_upload_appears_when_it_is_complete(bucket: Bucket) -> None:
    data = np.random.default_rng(5).standard_normal(3_000_000)  # 24 MB: several parts
    code = """
    import sys
    import numpy as np
    import lazymem
    data = np.random.default_rng(5).standard_normal(3_000_000)
    lazymem.build({"data": data}, sys.argv[1], codec="none")
    with lazymem.open(sys.argv[1]) as snap:
        print(np.array_equal(snap.read("data"), data))
    """
    assert check_child(code, bucket.url("big.lzm")) == "True\n"
    assert bucket.keys() == ["big.lzm"]
    assert bucket.uploads() == []
    assert bucket.client.head_object(Bucket=bucket.bucket, Key="big.lzm")["ContentLength"] > data.nbytes


def test_what_is_not_there_is_named(bucket: Bucket) -> None:
    code = """
    import sys, lazymem
    try:
        lazymem.open(sys.argv[1])
    except lazymem.SnapshotNotFound as error:
        print(error)
    """
    for url in (bucket.url("no-such-key.lzm"), "s3://no-such-bucket-at-all/key.lzm"):
        done = run_child(code, url)
        assert url in done.stdout, done.stderr
