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
QUESTIONS = (
    "first_element", "full_scan", "random_touch", "sparse", "opening", "memory", "fault_profile", "pager",
    "weights",
)  # fmt: skip

has_peers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("blosc2", "matplotlib", "zarr")),
    reason="the peers are in the extra: pip install lazymem[bench]",
)


def run_tiny(out: Path) -> dict[str, Any]:
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
        deadline=540,
    )
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def check_machine(results: dict[str, Any]) -> None:
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


def summaries(results: dict[str, Any], question: str) -> dict[str, Any]:
    return {case["name"]: case["summary"] for case in results["questions"][question]}


def check_remote_counts_its_requests(results: dict[str, Any]) -> None:
    cases = summaries(results, "remote")
    for task, requests in (("restore", 8), ("first", 8), ("sparse", 10)):
        assert cases[f"{task}, sockets"]["requests"]["median"] == requests
        assert cases[f"{task} +20 ms, sockets"]["requests"]["median"] == requests
    assert cases["first, lazymem zstd, warm disk cache"]["requests"]["median"] == 1


def check_full_scan_against_the_bounds(results: dict[str, Any]) -> None:
    cases = {case["name"]: case for case in results["questions"]["full_scan"]}
    assert {case["kind"] for case in cases.values()} == {"lazymem", "peer", "bound"}
    for case in cases.values():
        for column, other in case["against"].items():
            assert other in cases
            assert case["summary"][column]["median"] > 0


# Without read-ahead each chunk that is touched is read once, and nothing else: by the engine's own count and
# by the kernel's, which has the reads of /proc too.
def check_sparse_reads_what_is_touched(results: dict[str, Any]) -> None:
    cases = summaries(results, "sparse")
    exact = [summary for name, summary in cases.items() if name.endswith(", off")]
    assert len(exact) == len(cases) / 2
    for summary in exact:
        assert summary["of_bound"]["median"] == 1.0
        assert 0 <= summary["process_read_mib"]["median"] - summary["read_mib"]["median"] < 0.1


# The index is all there is to an opening: a tebibyte has no larger one than a mebibyte.
def check_opening_of_a_tebibyte(results: dict[str, Any]) -> None:
    cases = summaries(results, "opening")
    small, large = (cases[f"lazymem, {size}"]["index_kib"]["median"] for size in ("1 MiB", "1 TiB"))
    assert 0 < large < 2 * small
    assert cases["lazymem, 10,000 arrays"]["index_kib"]["median"] > 10 * small


# Mounts need root, tools and a kernel: where they are left out, a line says why.
def check_mounts_are_measured_or_named(results: dict[str, Any]) -> None:
    for question in ("full_scan", "random_touch"):
        said = [line for line in results["skipped"] if line.startswith(f"{question}: ")]
        for system in ("squashfs", "erofs"):
            measured = [name for name in summaries(results, question) if name.startswith(system)]
            assert measured or any(system in line.lower() for line in said)


# Eight processes of 8 MiB each; what a process takes beside the array is most of it.
def check_pager_shares_memory(results: dict[str, Any]) -> None:
    cases = summaries(results, "pager")
    alone, shared = (cases[f"{way}, memory of 8 processes"] for way in ("in-process", "pager"))
    assert 0 < shared["pss_mib"]["median"] < alone["pss_mib"]["median"] / 2


# Everybody's tokens are held against those of transformers by the program itself.
def check_first_token_of_disk_and_s3(results: dict[str, Any]) -> None:
    cases = summaries(results, "first_token")
    for way in ("warm", "S3", "S3 +20 ms"):
        summary = cases[f"{way}, lazymem .lzm, background"]
        ready, first, last = (
            summary[name]["median"] for name in ("open_seconds", "first_token_seconds", "seconds")
        )
        assert 0 < ready < first < last
    assert cases["S3 +20 ms, lazymem .lzm, background"]["requests"]["median"] > 0
    assert cases["warm, lazymem .lzm, background"]["first_of_best"]["median"] > 0


def check_page(page: str, results: dict[str, Any]) -> None:
    for cases in results["questions"].values():
        for case in cases:
            assert f"| {case['name']} |" in page or f"| **{case['name']}** |" in page


# One test, because one run is enough for all checks, and takes a minute. The server: the benchmark starts its
# own, but this one sees to it that it is installed, or skips.
@has_peers
@pytest.mark.needs_userfaultfd  # one of the candidates moves its chunks in
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("s3_server")
def test_every_benchmark_measures_every_candidate(tmp_path: Path) -> None:
    results = run_tiny(tmp_path)
    check_machine(results)
    questions = [*QUESTIONS, "remote"]
    if all(importlib.util.find_spec(name) for name in ("safetensors", "torch", "transformers")):
        questions.append("first_token")
        check_first_token_of_disk_and_s3(results)
    for question in questions:
        check_question(results, question)
        assert (tmp_path / f"{question}.png").read_bytes().startswith(b"\x89PNG")
    check_remote_counts_its_requests(results)
    check_full_scan_against_the_bounds(results)
    check_mounts_are_measured_or_named(results)
    check_sparse_reads_what_is_touched(results)
    check_opening_of_a_tebibyte(results)
    check_pager_shares_memory(results)
    check_page((tmp_path / "RESULTS.md").read_text(), results)


@has_peers
def test_program_fails_when_a_candidate_gives_wrong_bytes() -> None:
    def wrong(meter: Any) -> Any:
        with meter:
            pass
        return np.zeros(8, np.uint8)

    (outcome,) = run_cases([Case("wrong", "peer", wrong, digest=1)], 1, 30.0, lambda text: None)
    assert outcome.error is not None
    assert "wrong bytes" in outcome.error
