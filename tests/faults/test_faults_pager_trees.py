# SPDX-License-Identifier: Apache-2.0
"""Clients that do not cooperate: forks by raw system calls, nested, mremap, munmap, MADV_DONTNEED, writes and
threads, by random schedules, each page compared with an oracle (tests/native/pager_tree.c)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest

import lazymem

from .. import pagers
from ..native.programs import HERE as NATIVE_TESTS
from ..native.programs import NATIVE
from ..once import made_once
from .network import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="EVENT_FORK is for the privileged")
#: Of 4096 bytes; some of zeros, so that chunks are elided.
PAGES = 2048
KILLS = int(os.environ.get("LAZYMEM_TEST_KILLS", "6"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(target: Path) -> None:
        subprocess.run(
            ["cc", "-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}",
             NATIVE_TESTS / "pager_tree.c", "-o", target],
            check=True,
        )  # fmt: skip

    return made_once(tmp_path_factory, "pager_tree", make)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A raw file, and the snapshot made of it."""
    folder = tmp_path_factory.mktemp("guest")
    data = np.random.default_rng(1).integers(0, 256, (PAGES, 4096), np.uint8)
    data[256:352] = 0
    (folder / "guest.raw").write_bytes(data.tobytes())
    lazymem.build(folder / "guest.raw", folder / "guest.lzm", chunk_size=64 << 10)
    return folder / "guest.raw", folder / "guest.lzm"


@pytest.fixture(scope="module")
def pager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pagers.Pager]:
    with pagers.running(tmp_path_factory.mktemp("pager") / "socket") as running:
        yield running


@pytest.mark.parametrize("seed", [1, 4, 11])
@pytest.mark.parametrize("how", ["shared", "copy", "zero"])
def test_every_page_is_right_whatever_a_tree_does(
    pager: pagers.Pager, client: Path, guest: tuple[Path, Path], how: str, seed: int
) -> None:
    raw, snapshot = guest
    done = subprocess.run(
        [client, pager.path, snapshot, raw, str(seed), "1200", how, "2" if seed % 2 == 0 else "0", "stay"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("pages were right\n")


def test_trees_at_once_share_a_pager(pager: pagers.Pager, client: Path, guest: tuple[Path, Path]) -> None:
    raw, snapshot = guest
    running = [
        subprocess.Popen(
            [client, pager.path, snapshot, raw, str(20 + number), "800", how, "1", "stay"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, how in enumerate(("shared", "copy", "zero", "shared"))
    ]  # fmt: skip
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "pages were right" in out


@pytest.mark.parametrize(
    ("how", "seed", "end"),
    [("shared", 31, "leave"), ("copy", 32, "return"), ("zero", 33, "leave"), ("zero", 34, "return")],
)
def test_every_page_is_right_while_pagers_are_killed(
    tmp_path: Path, client: Path, guest: tuple[Path, Path], how: str, seed: int, end: str
) -> None:
    """Children have no part in it: each pager takes over what the one before has left."""
    raw, snapshot = guest
    random = Random(seed)
    with ExitStack() as stack:
        pager = pagers.Pager(tmp_path / "socket")
        tree = subprocess.Popen(
            [client, pager.path, snapshot, raw, str(seed), str(KILLS * 200), how, "2", end],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(tree.kill)
        kills = 0
        while tree.poll() is None and kills < KILLS:
            wait_until(partial(is_served, pager, tree))
            time.sleep(random.random() / 20)
            pager.kill()
            kills += 1
            pager = pagers.Pager(tmp_path / "socket")
        stack.callback(pager.kill)
        out, err = tree.communicate(timeout=60)
        assert tree.returncode == 0, err
        assert out.endswith("pages were right\n")
        assert kills > 1
        wait_until(lambda: not pager.status()["spaces"])


def is_served(pager: pagers.Pager, tree: subprocess.Popen[str]) -> bool:
    return tree.poll() is not None or bool(pager.status()["spaces"])


def test_nothing_is_left_of_trees_that_ended(pager: pagers.Pager) -> None:
    wait_until(lambda: not pager.status()["spaces"])
    assert pager.status()["waiting"] == 0
