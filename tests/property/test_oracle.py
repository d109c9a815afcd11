# SPDX-License-Identifier: Apache-2.0
"""Lazy arrays against plain numpy arrays that are assumed perfect: any dtype, shape, order, chunk size,
codec, way of installing, number of threads; any slices and strides; writes in mode "c"."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

import lazymem

MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(),
    hnp.boolean_dtypes(),
    hnp.byte_string_dtypes(min_len=1, max_len=9),
    hnp.datetime64_dtypes(max_period="s", min_period="ns"),
)


@st.composite
def big_arrays(draw: st.DrawFn) -> NDArray[Any]:
    """Up to about 1 MiB, so that it spans chunks; content from a seed, or runs of zeros."""
    dtype = draw(DTYPES)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40))
    scale = draw(st.sampled_from([1, 1, 7, 60]))
    if shape:
        shape = (shape[0] * scale, *shape[1:])
    size = int(np.prod(shape)) * dtype.itemsize
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    raw = rng.integers(0, draw(st.sampled_from([1, 2, 256])), size, dtype=np.uint8)
    array = raw.view(dtype) if size else np.zeros(0, dtype)
    order: Any = draw(st.sampled_from("CF"))
    return array.reshape(shape, order=order)


def same(shown: NDArray[Any], expected: NDArray[Any]) -> bool:
    return (shown.dtype, shown.shape, shown.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@MANY
@given(
    arrays=st.dictionaries(st.text(min_size=1, max_size=20), big_arrays(), min_size=1, max_size=6),
    codec=st.sampled_from(["none", "lz4", "zstd"]),
    planes=st.sampled_from([None, True, False]),
    chunk_size=st.sampled_from([1 << 16, 1 << 17, 1 << 21]),
    opened=st.fixed_dictionaries(
        {
            "backend": st.sampled_from(["uffd", "uffd-user", "sigsegv", "eager", "auto"]),
            "install": st.sampled_from(["auto", "copy"]),
            "readahead": st.sampled_from([0, 1, 8]),
            "mode": st.sampled_from("rc"),
        }
    ),
    data=st.data(),
)
def test_any_access_reads_what_numpy_reads(
    tmp_path_factory: pytest.TempPathFactory,
    arrays: dict[str, NDArray[Any]],
    codec: str,
    planes: bool | None,
    chunk_size: int,
    opened: dict[str, Any],
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("oracle") / "a.lzm"
    lazymem.build(arrays, path, codec=codec, planes=planes, chunk_size=chunk_size)
    with lazymem.open(path, **opened) as snap:
        assert list(snap) == list(arrays)
        for _ in range(data.draw(st.integers(0, 6))):
            name = data.draw(st.sampled_from(sorted(arrays)))
            index = data.draw(hnp.basic_indices(arrays[name].shape, allow_ellipsis=True))
            assert same(np.asarray(snap[name][index]), np.asarray(arrays[name][index]))
        for name in data.draw(st.permutations(sorted(arrays))):
            assert same(snap[name], arrays[name])
    path.unlink()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("install", ["copy", pytest.param("move", marks=pytest.mark.needs_userfaultfd)])
def test_threads_in_any_order_read_right_bytes(
    huge_path: Path, arrays: dict[str, NDArray[Any]], threads: int, install: str
) -> None:
    for seed in range(4):
        with lazymem.open(huge_path, threads=threads, install=install) as snap:
            wrong: list[str] = []

            def touch(number: int, seed: int = seed, snap: Any = snap, wrong: list[str] = wrong) -> None:
                rng = np.random.default_rng((seed, number))
                for name in rng.permutation(sorted(arrays)):
                    flat, expected = snap[name].reshape(-1, order="A"), arrays[name].reshape(-1, order="A")
                    if flat.size:
                        at = rng.integers(0, flat.size, 20)
                        if not np.array_equal(flat[at], expected[at]):
                            wrong.append(name)

            running = [threading.Thread(target=touch, args=(n,)) for n in range(threads)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            assert not wrong


#: The suite may have been told to open without userfaultfd, which alone can move.
INSTALLS = ["copy"] if os.environ.get("LAZYMEM_BACKEND") == "sigsegv" else ["copy", "move"]


class CopyOnWrite(RuleBasedStateMachine):
    """Reads, writes, prefetches, reopening: mode "c" is a numpy array that forgets on close."""

    path: Path
    original: dict[str, NDArray[Any]]

    @initialize(install=st.sampled_from(INSTALLS))
    def start(self, install: str) -> None:
        self.install = install
        self.reopen()

    def reopen(self) -> None:
        self.snap = lazymem.open(self.path, mode="c", install=self.install)
        self.model = {name: array.copy(order="K") for name, array in self.original.items()}

    names = st.sampled_from(["layer.0.weight", "layer.1.weight", "ids", "zeros", "fortran"])

    @rule(name=names, at=st.integers(0, 1 << 20), count=st.integers(1, 70_000))
    def read(self, name: str, at: int, count: int) -> None:
        shown, expected = self.snap[name].reshape(-1, order="A"), self.model[name].reshape(-1, order="A")
        assert np.array_equal(shown[at : at + count], expected[at : at + count])

    @rule(name=names, at=st.integers(0, 1 << 20), count=st.integers(1, 70_000), step=st.integers(1, 5000))
    def write(self, name: str, at: int, count: int, step: int) -> None:
        for array in (self.snap[name], self.model[name]):
            array.reshape(-1, order="A")[at : at + count : step] = 77

    @rule(name=names, wait=st.booleans())
    def prefetch(self, name: str, wait: bool) -> None:
        self.snap.prefetch(name, wait=wait)

    @rule()
    def close_and_open(self) -> None:
        self.snap.close()
        self.reopen()

    @invariant()
    def untouched_arrays_stay(self) -> None:
        if hasattr(self, "snap"):
            assert self.snap["scalar"] == self.original["scalar"]

    def teardown(self) -> None:
        if hasattr(self, "snap"):
            for name, expected in self.model.items():
                assert same(self.snap[name], expected), name
            self.snap.close()


def test_copy_on_write_is_a_private_numpy_array(huge_path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (CopyOnWrite,), {"path": huge_path, "original": arrays})
    run_state_machine_as_test(machine, settings=settings(MANY, max_examples=25, stateful_step_count=20))
