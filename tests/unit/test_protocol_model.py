# SPDX-License-Identifier: Apache-2.0
"""Every order of events of the protocol that DESIGN.md has as a table, in `protocol_model.py`; and that the
model is no friendlier than the code: each part left out is found, and `table.c` does what it says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import lazymem._native

from .exploring import Wrong
from .protocol_model import OPERATIONS, STATES, TRANSITIONS, World, explore

NATIVE = Path(lazymem._native.__file__).parent
SOURCES = Path(__file__).parents[1] / "native"

R, H = "resolver idle", "helper idle"
SCENARIOS = {
    "touches, a prefetch, pages given back": World(
        touchers=("runs", "runs"), workers=(R, R, H), span=True, application=1
    ),
    "bad bytes and touches": World(touchers=("runs", "runs"), workers=(R, R), application=1, mischief=2),
    "bad bytes and a prefetch": World(
        touchers=("runs",), workers=(R, H), asker="call", application=1, mischief=2
    ),
    "eviction and a prefetch": World(touchers=("runs",), workers=(R, H), asker="call", evictor="call"),
    "eviction and pages given back": World(touchers=("runs",), workers=(R, R), evictor="call", application=1),
    "close": World(touchers=("runs", "call"), workers=(R, R, H), asker="call", closer="call"),
    "close and eviction": World(touchers=("runs", "call"), workers=(R, H), evictor="call", closer="call"),
    "fork": World(touchers=("runs",), workers=(R, H), span=True, forker="call", mischief=1, application=1),
    "fork and eviction": World(touchers=("runs",), workers=(R,), evictor="call", forker="call"),
    "fork and close": World(touchers=("runs",), workers=(R, H), forker="call", closer="call"),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_order_of_events_is_wrong(scenario: str) -> None:
    assert explore(SCENARIOS[scenario]) > 100


#: What is left out, where it shows, as what.
MISTAKES = {
    "no wake": ("touches, a prefetch, pages given back", "waits for ever"),
    "want is forgotten": ("bad bytes and a prefetch", "waits for ever"),
    "failure of a wanted chunk is silent": ("bad bytes and touches", "waits for ever"),
    "poisoned is never tried again": ("bad bytes and touches", "round for ever"),
    "recheck owns nothing": ("bad bytes and a prefetch", "present raises a signal"),
    "present before install": ("bad bytes and a prefetch", "two own the chunk"),
    "evicted while waited for": ("eviction and a prefetch", "waits for ever"),
    "evict does not wake": ("eviction and a prefetch", "waits for ever"),
    "absent before the page is given back": ("eviction and a prefetch", "two own the chunk"),
    "close does not wait": ("close", "after it was freed"),
    "close forgets calls that touch": ("close and eviction", "waits for ever"),
    "idle is not asked again": ("close", "after it was freed"),
    "run ahead while closing": ("close and eviction", "after it was freed"),
    "child keeps loading": ("fork", "waits for ever"),
    "child is not registered": ("fork", "met zeros"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(mistake: str) -> None:
    scenario, words = MISTAKES[mistake]
    with pytest.raises(Wrong, match=words):
        explore(SCENARIOS[scenario], frozenset([mistake]))


def test_table_in_c_changes_states_as_the_model_does(tmp_path: Path) -> None:
    program = tmp_path / "print_table"
    sources = [str(SOURCES / "print_table.c"), *(str(NATIVE / name) for name in ("table.c", "sys.c"))]
    command = ["cc", "-std=gnu11", "-pthread", f"-I{NATIVE}", f"-I{SOURCES}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=60).stdout
    found = {(operation, state): after for operation, state, after in map(str.split, said.splitlines())}
    every = {(operation, state): "refused" for operation in OPERATIONS for state in STATES}
    assert found == {**every, **TRANSITIONS}
