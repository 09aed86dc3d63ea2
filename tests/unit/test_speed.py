"""How times of several bouts become one."""

from __future__ import annotations

import pytest

from qvdit.speed import over_bouts


def test_a_bout_beside_other_work_widens_the_spread_and_leaves_the_median() -> None:
    quiet, disturbed = [200.0, 160.0], [210.0, 240.0]
    (full, full_spread), (low, low_spread) = over_bouts([quiet, disturbed, quiet])
    assert (full, low) == (200.0, 160.0)
    assert (full_spread, low_spread) == (pytest.approx(0.05), pytest.approx(0.5))
