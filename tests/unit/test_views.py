# SPDX-License-Identifier: Apache-2.0
"""Views through the whole house: the arithmetic, the snapshot file, build, memory, extract, cat, ls."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import lazymem
from lazymem.cli import run
from lazymem.errors import BuildError, FormatError, OutOfMemory
from lazymem.extractor import cat, extract
from lazymem.format.writer import SnapshotWriter
from lazymem.options import BuildOptions
from lazymem.summary import list_arrays, summarize
from lazymem.verifier import verify
from lazymem.views import View, gather, order_of, problem_of, span_of

from ..children import check_child
from .format_tools import parse, raw_sections, with_sections, write_snapshot

F4 = np.dtype("<f4")
RNG = np.random.default_rng(3)
BASE = RNG.standard_normal((60, 70, 8)).astype(np.float32)
VIEWS = {
    "tied": BASE,
    "row": BASE[3],
    "part": BASE[2:9, 5:60:3, ::2],
    "transposed": BASE.T,
    "moved": BASE.transpose(2, 0, 1),
    "scalar": BASE[1, 2, 3:4].reshape(()),
    "ints": BASE.view(np.int32),
    "expanded": np.broadcast_to(BASE[0, 0], (5, 8)),
}


def build_views(path: Path, **options: Any) -> Path:
    lazymem.build({"base": BASE, **VIEWS}, path, chunk_size=1 << 16, **options)
    return path


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("array", VIEWS.values(), ids=VIEWS)
def test_span_and_order_are_numpys(array: np.ndarray[Any, Any]) -> None:
    array = np.asarray(array)
    low, high = np.lib.array_utils.byte_bounds(array)
    assert span_of(array.shape, array.strides, array.itemsize) == high - low
    order = order_of(array.shape, array.strides, array.itemsize)
    expected = "C" if array.flags.c_contiguous else "F" if array.flags.f_contiguous else None
    assert order == expected


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (10,), (4,)),
        (0, (11,), (4,)),
        (0, (10, 2), (4, 4)),
        (-4, (10,), (4,)),
        (0, (10,), (-4,)),
        (0, (10,), ()),
        (0, (True,), (4,)),
        (0, (1.0,), (4,)),
        (0, (2,), (1 << 63,)),
        (0, (1 << 61,), (0,)),
        (0, (0, 1 << 61), (4, 0)),
        (41, (0,), (4,)),
        (0, (1,) * 65, (4,) * 65),
    ],
)
def test_problem_of_finds_what_does_not_lie_in_the_array(offset: Any, shape: Any, strides: Any) -> None:
    assert problem_of(View("v", "a", offset, F4, shape, strides), 40)


def test_gather_takes_elements_from_memory_and_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    data = BASE.tobytes()
    pieces = [data[begin : begin + 1000] for begin in range(0, len(data), 1000)]
    for limit in (1 << 30, 10):
        monkeypatch.setattr("lazymem.views._IN_MEMORY", limit)
        view = BASE.T
        found = gather(iter(pieces), len(data), F4, view.shape, view.strides, "C")
        assert b"".join(map(bytes, found)) == view.tobytes("C")


def test_build_writes_shared_memory_once(tmp_path: Path) -> None:
    path = build_views(tmp_path / "a.lzm", codec="none")
    assert path.stat().st_size < 1.5 * BASE.nbytes
    assert verify(path).ok
    with lazymem.open(path) as snap:
        assert list(snap) == ["base", *VIEWS]
        for name, array in VIEWS.items():
            assert snap[name].strides == np.asarray(array).strides or array.ndim == 0
            assert snap[name].dtype == array.dtype
            assert bits(snap[name]) == bits(snap.read(name)) == bits(array)
            assert snap.read(name).flags.writeable
            assert bits(snap.handle(name)[...]) == bits(array)
        assert np.shares_memory(snap["tied"], snap["base"])
        info = snap.info("part")
        assert info.strides == VIEWS["part"].strides
        assert info.nbytes == span_of(info.shape, info.strides, 4)
        assert snap.info("tied").strides is None
        assert snap.info("transposed").order == "F"


def test_build_makes_no_view_of_memory_that_is_not_all_there(tmp_path: Path) -> None:
    whole = np.arange(100)
    arrays = {"part": whole[10:50], "whole": whole, "reversed": whole[::-1], "other": np.arange(100)}
    report = lazymem.build(arrays, tmp_path / "a.lzm")
    assert report.arrays == 4
    assert [array.view_of for array in list_arrays(tmp_path / "a.lzm")] == [None] * 4
    with lazymem.open(tmp_path / "a.lzm") as snap:
        assert all(bits(snap[name]) == bits(array) for name, array in arrays.items())


def test_views_are_populated_on_touch(tmp_path: Path) -> None:
    code = """
        import sys, numpy as np, lazymem
        with lazymem.open(sys.argv[1]) as snap:
            assert snap.backend in ("uffd", "uffd-user", "eager"), snap.backend
            snap.prefetch("part", wait=True)
            populated = snap.stats().chunks_populated
            assert snap.backend == "eager" or 0 < populated < snap.chunk_count
            base = snap.read("base")
            assert np.array_equal(snap["part"], base[2:9, 5:60:3, ::2])
            assert np.array_equal(snap["moved"], base.transpose(2, 0, 1))
            assert np.array_equal(snap["expanded"], np.broadcast_to(base[0, 0], (5, 8)))
    """
    check_child(code, build_views(tmp_path / "a.lzm"))


def test_views_of_mode_c_share_what_is_written(tmp_path: Path) -> None:
    path = build_views(tmp_path / "a.lzm", codec="none")
    with lazymem.open(path, mode="c") as snap:
        snap["tied"][0, 0, 0] = 7
        assert snap["base"][0, 0, 0] == snap["transposed"][0, 0, 0] == 7


def test_build_of_a_snapshot_keeps_its_views(tmp_path: Path) -> None:
    first = build_views(tmp_path / "a.lzm", array_metadata={"part": {"k": 1}})
    lazymem.build(first, tmp_path / "b.lzm", codec="lz4", chunk_size=1 << 17)
    assert [a.view_of for a in list_arrays(tmp_path / "b.lzm")] == [a.view_of for a in list_arrays(first)]
    with lazymem.open(tmp_path / "b.lzm", backend="eager") as snap:
        assert snap.info("part").metadata == {"k": 1}
        assert all(bits(snap[name]) == bits(array) for name, array in VIEWS.items())


@pytest.mark.parametrize("format", ["npz", "npy", "safetensors"])
def test_extract_writes_the_elements_of_views(tmp_path: Path, format: str) -> None:
    path = build_views(tmp_path / "a.lzm")
    written = extract(path, tmp_path / "out", format=format)
    expected = {"base": BASE, **VIEWS}
    if format == "npy":
        found = {file.stem: np.load(file) for file in written}
    else:
        found = dict(np.load(written[0])) if format == "npz" else load_file(written[0])
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert bits(found[name]) == bits(array)
    names = ["part"]
    extract(path, tmp_path / "raw", format="raw", names=names)
    assert (tmp_path / "raw").read_bytes() == VIEWS["part"].tobytes()


def test_cat_writes_a_view(tmp_path: Path) -> None:
    path = build_views(tmp_path / "a.lzm")
    for name in ("part", "moved", "tied", "expanded"):
        out = io.BytesIO()
        assert cat(path, name, out) == VIEWS[name].nbytes
        assert out.getvalue() == VIEWS[name].tobytes()


def test_ls_and_info_say_what_is_a_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = build_views(tmp_path / "a.lzm")
    assert run(["ls", "--long", str(path)]) == run(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "tied  (view of base)" in out
    assert "9 arrays" in out
    assert "8 views among them" in out
    summary = summarize(path)
    assert (summary.arrays, summary.views, summary.array_bytes) == (9, 8, BASE.nbytes)


def write_with_view(view: View) -> bytes:
    file = io.BytesIO()
    with SnapshotWriter(file, BuildOptions(chunk_size=1 << 16)) as writer:
        writer.add_array("a", F4, (10,), hidden=True)
        writer.write(bytes(range(40)))
        writer.add_view(view)
        writer.finish()
    return file.getvalue()


GOOD = View("v", "a", 4, F4, (3, 3), (12, 4))


def test_snapshot_file_keeps_a_view_of_a_hidden_array() -> None:
    data = write_with_view(GOOD)
    index = parse(data)
    assert list(index.rows) == []
    assert index.visible == ["v"]
    assert index.views["v"] == GOOD
    assert json.loads(raw_sections(data)["VIEW"])[0]["strides"] == [12, 4]
    assert index.summary().hidden_arrays == 0
    assert index.digest != parse(write_with_view(GOOD._replace(offset=0))).digest
    assert "VIEW" not in raw_sections(write_snapshot({"a": np.arange(3)}))


@pytest.mark.parametrize(
    "view", [GOOD._replace(array="b"), GOOD._replace(name="a"), GOOD._replace(offset=8)], ids=str
)
def test_writer_refuses_a_view_that_cannot_be(view: View) -> None:
    with pytest.raises(BuildError):
        write_with_view(view)


def entry(**fields: Any) -> dict[str, Any]:
    good = {"name": "v", "array": "a", "offset": 4, "dtype": "<f4", "shape": [3, 3], "strides": [12, 4]}
    return {**good, **fields}


@pytest.mark.parametrize(
    "value",
    [
        [entry(offset=8)],
        [entry(offset=-1)],
        [entry(offset=True)],
        [entry(offset=4.0)],
        [entry(offset=1 << 70)],
        [entry(shape=[1 << 61, 1], strides=[0, 0])],
        [entry(shape=[3])],
        [entry(shape="33")],
        [entry(shape=[[3], 3])],
        [entry(strides=[12, -4])],
        [entry(strides=None)],
        [entry(dtype="<f3")],
        [entry(dtype=None)],
        [entry(dtype="O")],
        [entry(name="a")],
        [entry(name=7)],
        [entry(name="v" * 65_536)],
        [entry(name="\ud800")],
        [entry(), entry()],
        [entry(), entry(name="w", array="v")],
        [entry(array="b")],
        [entry(array=["a"])],
        [{**entry(), "extra": 1}],
        [{"name": "v"}],
        ["v"],
        [[]],
        {},
        7,
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_parse_refuses_hostile_views(value: Any) -> None:
    raw = json.dumps(value).encode()

    def change(sections: dict[str, bytes]) -> None:
        sections["VIEW"] = raw

    with pytest.raises(FormatError, match="VIEW"):
        parse(with_sections(write_with_view(GOOD), change))


def test_parse_refuses_views_that_are_no_json() -> None:
    change: Callable[[dict[str, bytes]], None] = lambda s: s.update(VIEW=b"[" * 100_000)  # noqa: E731
    with pytest.raises(FormatError, match="VIEW"):
        parse(with_sections(write_with_view(GOOD), change))


def test_read_of_a_view_that_repeats_beyond_memory_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    path.write_bytes(write_with_view(GOOD._replace(shape=(1 << 58,), strides=(0,), offset=0)))
    with lazymem.open(path, backend="eager") as snap:
        assert snap["v"].shape == (1 << 58,)
        with pytest.raises(OutOfMemory, match="many times over"):
            snap.read("v")


def test_an_empty_view_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    path.write_bytes(write_with_view(GOOD._replace(shape=(0, 5), strides=(0, 4), offset=40)))
    with lazymem.open(path, backend="eager") as snap:
        assert snap["v"].shape == snap.read("v").shape == (0, 5)
