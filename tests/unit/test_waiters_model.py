# SPDX-License-Identifier: Apache-2.0
"""Every order of events between a client, a pager's threads and the engine's (`waiters_model.py`); and each
part of how it is done is needed."""

from __future__ import annotations

import pytest

from .exploring import Wrong
from .waiters_model import LOADING, World, explore

SCENARIOS = {
    "touches": World(touchers=("runs", "runs"), threads=("idle",) * 3),
    "a touch of what is being prefetched": World(chunk=LOADING, threads=("idle",) * 3),
    "a page is given back": World(touchers=("runs", "runs"), remover="will", threads=("idle",) * 3),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_order_of_events_is_wrong(scenario: str) -> None:
    assert explore(SCENARIOS[scenario]) > 100


#: What is left out, where it shows, as what.
MISTAKES = {
    "settled since is not looked at": ("a touch of what is being prefetched", "waits for ever"),
    "nobody sees that it is dirty": ("a page is given back", "waits for ever"),
    "an event wakes nobody": ("a page is given back", "waits for ever"),
    "the kernel puts in place what is changing": ("a page is given back", "reads"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(mistake: str) -> None:
    scenario, words = MISTAKES[mistake]
    with pytest.raises(Wrong, match=words):
        explore(SCENARIOS[scenario], frozenset([mistake]))
