# SPDX-License-Identifier: Apache-2.0
"""Every index form on slices: the same parts, or an error of the same kind and, where safetensors reads the
index itself, of the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from .comparing import OURS, THEIRS, both

SHAPES = {"a": (10, 5), "v": (7,), "s": (), "e": (0, 5), "t": (3, 1, 4), "z": (2, 0)}


class Index:
    def __index__(self) -> int:
        return 2


SINGLE = [
    0,
    -1,
    9,
    10,
    -10,
    -11,
    2**31,
    -(2**31) - 1,
    2**70,
    True,
    False,
    np.int64(3),
    np.True_,
    Index(),
    1.5,
    None,
    Ellipsis,
    "a",
    b"ab",
    bytearray(b"\1\1"),
    {0: 1},
    range(2),
    torch.tensor(2),
    torch.tensor([1, 2]),
    torch.tensor([True] * 10),
    np.array([1, 2]),
    np.array(2),
    object(),
]
SLICES = [
    slice(None),
    slice(0, 2),
    slice(2, None),
    slice(None, None, 2),
    slice(None, None, -1),
    slice(-3, None),
    slice(0, -1),
    slice(3, 3),
    slice(0, 0),
    slice(10, None),
    slice(10, 10),
    slice(11, None),
    slice(12, 20),
    slice(0, 20),
    slice(None, 11),
    slice(2, None, 0),
    slice(1, 9, 3),
    slice(9, None, 20),
    slice(0, 11, 2),
    slice("a", None),
    slice(1.5, None),
    slice(True, None),
    slice(Index(), None),
    slice(2**70, None),
    slice(None, None, "x"),
    slice(None, None, 2**62),
    slice(None, None, 2**70),
    slice(2**64 - 1, None),
    slice(0, 2**63),
    slice(None, None, True),
    slice(1, 2, 1),
]
TUPLES = [
    (),
    (0,),
    (0, 1),
    (0, 1, 2),
    (slice(None), 1),
    (slice(None), 1, 2),
    (..., 0),
    (0, ...),
    (0, ..., 0),
    (..., ...),
    (0, 0, ...),
    (0, 0, 0, ...),
    (None, 0),
    (0, None),
    (20, None),
    (-20, None),
    (slice(-1, None), None),
    (20, 20),
    (-20, 20),
    (slice(None, None, 0), 20),
    (slice(None), -6),
    (slice(2, None), 20),
    (slice(None), slice(None, 20)),
    (slice(None, None, 2), slice(None, None, 2)),
    (0, [1]),
    ((0, 1), 1),
    ((),),
    ([],),
    (slice(1, 5, 2), 3),
    (torch.tensor(1), 0),
    (np.int8(1), slice(None)),
    (..., slice(None, 2)),
    (slice(None), ..., 0),
    ("a", 0),
]
LISTS: list[Any] = [[], [0], [0, 1], [[0]], [True] * 10]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "weights.safetensors"
    tensors = {
        name: torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
        for name, shape in SHAPES.items()
    }
    save_file({**tensors, "b": torch.ones(4, 6, dtype=torch.bfloat16)}, path)
    return path


Slices = dict[Any, dict[str, Any]]


@pytest.fixture(scope="module", params=["np-mmap", "np-pread", "pt-mmap", "pt-pread"])
def slices(request: pytest.FixtureRequest, path: Path) -> Slices:
    framework, backend = request.param.split("-")
    opened = {package: package.safe_open(path, framework, backend=backend) for package in (THEIRS, OURS)}
    return {
        package: {name: file.get_slice(name) for name in file.offset_keys()}
        for package, file in opened.items()
    } | {"strict": {"": request.param != "pt-mmap"}}


@pytest.mark.parametrize(
    "index", [*SINGLE, *SLICES, *TUPLES, *LISTS], ids=lambda index: repr(index).split(" at ")[0][:50]
)
def test_index_gives_the_same(slices: Slices, index: Any) -> None:
    for name in (*SHAPES, "b"):
        both(lambda package, name=name: slices[package][name][index], messages=slices["strict"][""])  # type: ignore[misc]


bounds = st.none() | st.integers(-3, 13)
one_slice = st.builds(slice, bounds, bounds, st.none() | st.integers(-1, 12)).filter(
    lambda item: (item.start or 0) <= (99 if item.stop is None else item.stop)  # theirs would panic
)
item = st.integers(-12, 12) | one_slice | st.just(...) | st.none() | st.just(1.5)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(SHAPES)), index=st.lists(item, max_size=4).map(tuple) | item)
def test_any_index_gives_the_same(slices: Slices, name: str, index: Any) -> None:
    # A start beyond the end of the dimension is an error before it can be a slice that ends before it begins.
    both(lambda package: slices[package][name][index], messages=slices["strict"][""])


def test_slice_describes_the_tensor_alike(slices: Slices) -> None:
    for name in (*SHAPES, "b"):
        both(lambda package, name=name: slices[package][name].get_shape())  # type: ignore[misc]
        both(lambda package, name=name: slices[package][name].get_dtype())  # type: ignore[misc]
