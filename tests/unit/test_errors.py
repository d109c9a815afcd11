# SPDX-License-Identifier: Apache-2.0
"""The exception tree: every class crosses a process boundary, and is a public name."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import lazymem
from lazymem import errors
from lazymem.errors import LazymemError

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, LazymemError) and found.__module__ == errors.__name__
]


def make(kind: type[LazymemError]) -> LazymemError:
    values: dict[str, Any] = {"url": "x.lzm", "field": "magic", "chunk": 7, "array": "w", "name": "w"}
    own = kind.__init__
    taken = inspect.getfullargspec(own).kwonlyargs if inspect.isfunction(own) else []
    return kind("one sentence", **{name: values[name] for name in taken})


@pytest.mark.parametrize("kind", CLASSES)
def test_error_survives_pickle_and_copy(kind: type[LazymemError]) -> None:
    error = make(kind)
    error.more = "a note"  # type: ignore[attr-defined]
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == "one sentence"
        assert again.args == error.args
        assert vars(again) == vars(error)
        assert "more" in vars(again)


def test_error_classes_are_public_names() -> None:
    assert len(CLASSES) >= 15
    for kind in CLASSES:
        assert getattr(lazymem, kind.__name__) is kind
        assert kind.__name__ in lazymem.__all__
