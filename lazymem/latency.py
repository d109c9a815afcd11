# SPDX-License-Identifier: Apache-2.0
"""The core's histograms of latency: bucket b counts what took 2^b to 2^(b+1) nanoseconds."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(histogram: Sequence[int], percent: float) -> float:
    """Upper bound, in seconds, of the bucket that holds this percentile; 0.0 where nothing was counted."""
    total = sum(histogram)
    seen = 0
    for bucket, count in enumerate(histogram):
        seen += count
        if total and seen >= total * percent / 100:
            return float(2 ** (bucket + 1)) / 1e9
    return 0.0
