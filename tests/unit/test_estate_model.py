# SPDX-License-Identifier: Apache-2.0
"""Pagers killed at every moment (`estate_model.py`): no touch reads what is wrong, none waits for ever; and
each part of how it is done is needed."""

from __future__ import annotations

import pytest

from .estate_model import FIRST, Space, World, explore
from .exploring import Wrong


def world(program: str, child: str = "", kills: int = 2, touches: int = 1) -> World:
    spaces = (
        Space(runs=True, program=tuple(program.split()), touches=touches),
        Space(program=tuple(child.split())),
    )
    return World(spaces, kills)


SCENARIOS = {
    "a page is given back": world("remove touch remove touch", kills=3),
    "a child": world("fork touch", "touch"),
    "a child of what is given back": world("remove fork touch", "touch", kills=3),
    "a child that gives back": world("fork remove touch", "touch remove touch"),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pagers_may_die_at_any_moment(scenario: str) -> None:
    assert explore(SCENARIOS[scenario]) > 100


#: What is left out, where it shows, as what.
MISTAKES = {
    "reads elsewhere than into the ledger": ("a page is given back", "reads snapshot"),
    "what is not counted is not looked at": ("a page is given back", "reads snapshot"),
    "applied before it is done": ("a child", "waits for ever"),
    "children without a ledger are lost": ("a child", "waits for ever"),
    "lets go before it records": ("a child", "waits for ever"),
    FIRST: ("a child that gives back", "reads snapshot"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(mistake: str) -> None:
    scenario, words = MISTAKES[mistake]
    with pytest.raises(Wrong, match=words):
        explore(SCENARIOS[scenario], frozenset([mistake]))
