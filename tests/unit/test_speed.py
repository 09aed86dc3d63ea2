"""How times of several bouts become one."""

from __future__ import annotations

import pytest

from qvdit.speed import interleaved, over_bouts


def test_calls_take_turns_and_the_first_round_warms_up() -> None:
    order: list[str] = []
    times = interleaved([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 4
    assert all(median >= 0 and spread >= 0 for median, spread in times)


def test_a_bout_beside_other_work_widens_the_spread_and_leaves_the_median() -> None:
    quiet, disturbed = [(200.0, 0.01), (160.0, 0.01)], [(210.0, 0.01), (240.0, 0.01)]
    (full, full_spread), (low, low_spread) = over_bouts([quiet, disturbed, quiet])
    assert (full, low) == (200.0, 160.0)
    assert (full_spread, low_spread) == (pytest.approx(0.05), pytest.approx(0.5))
