# SPDX-License-Identifier: Apache-2.0
"""Two minutes of random operations. `python -m tests.faults.soak` runs longer, and says more."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from .soak import soak

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

SECONDS = float(os.environ.get("LAZYMEM_SOAK_SECONDS", "75"))
SEED = int(os.environ.get("LAZYMEM_SOAK_SEED", "1"))


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 300)
def test_soak_of_random_operations_agrees_with_the_oracle(s3: Bucket) -> None:
    counts = soak(SEED, SECONDS, prefix=s3.url(""))
    print(counts)
    assert sum(counts.values()) > 20  # on a machine that has other things to do, too
