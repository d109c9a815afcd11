# SPDX-License-Identifier: Apache-2.0
"""What the workers of a run share is made by one of them, whole, and by the next one if that fails."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .once import FOLDER, made_once


def test_made_once_makes_one_thing_for_all(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "run"))
    start, made = threading.Barrier(8), list[Path]()

    def make(path: Path) -> None:
        path.write_text("half ")
        made.append(path)
        if len(made) == 1:
            raise OSError("no space, say")
        path.write_text("whole")

    def ask() -> str:
        start.wait()
        return made_once(tmp_path_factory, "thing.txt", make).read_text()

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        errors = [future.exception() for future in asked if future.exception() is not None]
    assert [str(error) for error in errors] == ["no space, say"]
    assert [future.result() for future in asked if future.exception() is None] == ["whole"] * 7
    assert len(made) == 2
