# SPDX-License-Identifier: Apache-2.0
"""Which clients of a pager share memory: those, and only those, to whom a snapshot is the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem.options import OpenOptions
from lazymem.pager.stock import Stock, Stocks, Wanted
from lazymem.paging.client import Client
from lazymem.store.local import LocalBlob
from tests.children import check_child
from tests.pagers import running

CHUNK = 2 << 20


@pytest.fixture
def stocks() -> Iterator[Stocks]:
    stocks = Stocks()
    used: list[Stock] = []
    get = stocks.get

    def remember(wanted: Wanted) -> Stock:
        used.append(get(wanted))
        return used[-1]

    stocks.get = remember  # type: ignore[method-assign]
    yield stocks
    for stock in used:
        stocks.leave(stock)
    stocks.sweep()
    assert stocks.by_serial() == {}


def test_a_snapshot_is_not_its_file_where_both_have_one_size(stocks: Stocks, tmp_path: Path) -> None:
    path = tmp_path / "both.lzm"
    content = np.random.default_rng(1).integers(0, 256, CHUNK, np.uint8)
    more = 8192  # zeros: the file does not grow by them, and is bigger by its index
    while True:
        whole = np.concatenate([content, np.zeros(more, np.uint8)])
        lazymem.build({"data": whole}, path, codec="none", chunk_size=CHUNK, overwrite=True)
        if path.stat().st_size == len(whole):
            break
        more += path.stat().st_size - len(whole)
        assert 0 < more < CHUNK
    raw = stocks.get(Wanted(str(path), as_format="raw"))
    snapshot = stocks.get(Wanted(str(path)))
    assert raw.content_size == snapshot.content_size
    assert raw is not snapshot
    assert stocks.get(Wanted(str(path), as_format="raw")) is raw
    assert stocks.get(Wanted(str(path))) is snapshot


def test_without_versions_only_checksums_make_two_the_same(
    stocks: Stocks, tmp_path: Path, snapshot_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an HTTP server that tells neither ETag nor Last-Modified: what it has may be another by now."""
    monkeypatch.setattr(LocalBlob, "identity", property(lambda _: ""))
    plain = tmp_path / "plain.npy"
    np.save(plain, np.zeros(1000))
    assert stocks.get(Wanted(str(plain))) is not stocks.get(Wanted(str(plain)))
    assert stocks.get(Wanted(str(snapshot_path))) is stocks.get(Wanted(str(snapshot_path)))


def test_without_versions_a_pager_takes_over_only_what_a_digest_tells(
    stocks: Stocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalBlob, "identity", property(lambda _: ""))
    plain, snapshot = tmp_path / "plain.npy", tmp_path / "snapshot.lzm"
    np.save(plain, np.zeros(1000))
    lazymem.build({"data": np.zeros(1000)}, snapshot)
    served = [Wanted.told(asdict(stocks.get(Wanted(str(path))).wanted)) for path in (plain, snapshot)]
    assert stocks.get(served[1]) is stocks.get(Wanted(str(snapshot)))
    lazymem.build({"data": np.ones(1000)}, snapshot, overwrite=True)
    for wanted in served:
        with pytest.raises(lazymem.SnapshotChanged, match="was it replaced"):
            Stocks().get(wanted)


def test_what_has_no_bytes_is_refused_in_a_sentence(stocks: Stocks, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(lazymem.OptionError, match=r"empty: has no bytes"):
        stocks.get(Wanted(str(tmp_path / "empty")))


@pytest.mark.needs_userfaultfd
def test_a_model_of_many_files_is_served(tmp_path: Path) -> None:
    """Each has a version that the question names, at open and of the next pager."""
    count = 600
    for number in range(count):
        head = json.dumps({str(number): {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        shard = len(head).to_bytes(8, "little") + head + bytes([number % 256])
        (tmp_path / f"{number}.safetensors").write_bytes(shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(count)}}))
    with running(tmp_path / "socket"):
        check_child(
            """
            import sys
            import lazymem
            snapshot = lazymem.open(sys.argv[1], pager=sys.argv[2])
            assert [int(snapshot[name][0]) for name in snapshot] == [int(name) % 256 for name in snapshot]
            """,
            index,
            tmp_path / "socket",
        )


def test_what_no_question_holds_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(lazymem.OptionError, match=r"model: a pager cannot be asked for so many files"):
        Client(str(tmp_path / "socket"), "model", {"identities": ["x" * 65536]}, OpenOptions())
