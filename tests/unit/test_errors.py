# SPDX-License-Identifier: Apache-2.0
"""The exception tree: every class crosses a process boundary, and is a public name."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import lazymem
from lazymem import _native, errors
from lazymem.errors import LazymemError
from lazymem.fetcher import messages
from lazymem.fetcher.client import store_error

ROOT = Path(lazymem.__file__).parent
README = Path(__file__).parents[2] / "README.md"

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


def test_every_error_is_explained_once_in_the_module_and_the_readme() -> None:
    explained = [explanation.kind for explanation in errors.EXPLANATIONS]
    assert sorted(explained, key=str) == sorted(
        (kind for kind in CLASSES if kind is not LazymemError), key=str
    )
    assert errors.__doc__ is not None
    assert errors.table() in errors.__doc__
    assert errors.table() in README.read_text("utf-8")


def test_every_error_is_raised_somewhere() -> None:
    text = "".join(path.read_text("utf-8") for path in ROOT.rglob("*.py") if path.name != "errors.py")
    for kind in CLASSES:
        if kind is not LazymemError:
            assert re.search(rf"\b{kind.__name__}\(", text), kind


def test_every_failure_of_the_core_ends_in_an_error_of_the_table() -> None:
    header = (ROOT / "_native" / "lazymem.h").read_text("utf-8")
    codes = set(re.findall(r"^#define LM_E_(\w+)", header, re.M))
    assert set(_native.CODES.values()) == codes
    assert set(errors.OF_CODE) == codes - {"FULL"}  # that is waited for
    report = (ROOT / "_native" / "report.c").read_text("utf-8")
    for number, name in _native.CODES.items():
        assert str(_native.NativeError(number)) != os.strerror(-number), name  # has a sentence of its own
        # A touch can fail of what is raised for a chunk: others come before any chunk, MOVED is of a read.
        assert f"LM_E_{name}:" in report or name in {"CLOSED", "FEATURE", "FULL", "MOVED", "OPTION"}, name


def test_what_the_fetcher_says_is_raised_as_the_table_has_it() -> None:
    for number, name in _native.CODES.items():
        if name in {"STORE", "GONE", "DENIED", "CHANGED", "OPTION", "FETCHER"}:
            raised = store_error("s3://b/k", number, "said")
            assert type(raised) is errors.OF_CODE[name], name
            expected = name if name != "FETCHER" else "STORE"
            assert messages.code_of(raised) == getattr(_native, f"E_{expected}")
