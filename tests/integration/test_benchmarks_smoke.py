# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run from end to end and give right bytes. Never asserts a time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import Case, run_cases

from ..children import check_child

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("first_element", "full_scan", "random_touch", "memory", "fault_profile", "weights")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("blosc2", "matplotlib", "zarr")),
        reason="the peers are in the extra: pip install lazymem[bench]",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks")
    # The program checks every candidate's bytes itself and ends with 1 if one differs.
    check_child(
        """
        import os, runpy, sys
        root, out = sys.argv[1:]
        os.chdir(root)
        sys.path.insert(0, root)
        sys.argv = ["benchmarks", "--tiny", "--out", out]
        runpy.run_module("benchmarks", run_name="__main__")
        """,
        ROOT,
        out,
        deadline=240,
    )
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return loaded


def test_results_say_where_they_were_measured(results: dict[str, Any]) -> None:
    machine = results["machine"]
    assert machine["cpus"] >= 1
    assert machine["kernel"]
    assert len(machine["load_at_start"]) == 3
    assert results["data"]["seed"]
    assert results["options"]["tiny"] is True


def check_question(results: dict[str, Any], question: str) -> None:
    cases = results["questions"][question]
    assert cases
    for case in cases:
        assert case["error"] is None
        assert len(case["runs"]) == results["options"]["repeats"]
        summary = case["summary"]["seconds"]
        assert 0 < summary["min"] <= summary["median"] <= summary["max"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_measures_every_candidate(results: dict[str, Any], question: str) -> None:
    check_question(results, question)


# The server: the benchmark starts its own, but this one sees to it that it is installed, or skips.
@pytest.mark.usefixtures("s3_server")
def test_remote_measures_every_candidate_and_counts_its_requests(
    folder: Path, results: dict[str, Any]
) -> None:
    check_question(results, "remote")
    assert (folder / "remote.png").read_bytes().startswith(b"\x89PNG")
    cases = {case["name"]: case["summary"] for case in results["questions"]["remote"]}
    for task, requests in (("restore", 8), ("first", 8), ("sparse", 10)):
        assert cases[f"{task}, sockets"]["requests"]["median"] == requests
        assert cases[f"{task} +20 ms, sockets"]["requests"]["median"] == requests
    assert cases["first, lazymem zstd, warm disk cache"]["requests"]["median"] == 1


def test_full_scan_holds_everyone_against_the_bounds(results: dict[str, Any]) -> None:
    cases = {case["name"]: case for case in results["questions"]["full_scan"]}
    kinds = {case["kind"] for case in cases.values()}
    assert kinds == {"lazymem", "peer", "bound"}
    for case in cases.values():
        for column, other in case["against"].items():
            assert other in cases
            assert case["summary"][column]["median"] > 0


# Everybody's tokens are held against those of transformers by the program itself.
@pytest.mark.usefixtures("s3_server")
def test_first_token_measures_every_candidate_from_disk_and_from_s3(
    folder: Path, results: dict[str, Any]
) -> None:
    pytest.importorskip("safetensors")
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        pytest.skip("the model is transformers': pip install lazymem[test]")
    check_question(results, "first_token")
    assert (folder / "first_token.png").read_bytes().startswith(b"\x89PNG")
    cases = {case["name"]: case["summary"] for case in results["questions"]["first_token"]}
    for way in ("warm", "S3", "S3 +20 ms"):
        summary = cases[f"{way}, lazymem .lzm, background"]
        ready, first, last = (
            summary[name]["median"] for name in ("open_seconds", "first_token_seconds", "seconds")
        )
        assert 0 < ready < first < last
    assert cases["S3 +20 ms, lazymem .lzm, background"]["requests"]["median"] > 0
    assert cases["warm, lazymem .lzm, background"]["first_of_best"]["median"] > 0


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_has_a_plot(folder: Path, question: str) -> None:
    assert (folder / f"{question}.png").read_bytes().startswith(b"\x89PNG")


def test_page_of_results_has_every_candidate(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "RESULTS.md").read_text()
    for cases in results["questions"].values():
        for case in cases:
            assert f"| {case['name']} |" in page or f"| **{case['name']}** |" in page


def test_program_fails_when_a_candidate_gives_wrong_bytes() -> None:
    def wrong(meter: Any) -> Any:
        with meter:
            pass
        return np.zeros(8, np.uint8)

    (outcome,) = run_cases([Case("wrong", "peer", wrong, digest=1)], 1, 30.0, lambda text: None)
    assert outcome.error is not None
    assert "wrong bytes" in outcome.error
