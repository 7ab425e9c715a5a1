import time

import pytest

from buddy_server.tenancy.limits.month import seconds_left


@pytest.mark.parametrize(
    ("month", "end_s"), [("2026-02", 1772323200), ("2024-02", 1709251200), ("2026-12", 1798761600)]
)
def test_month_ends_at_midnight_utc(month: str, end_s: int) -> None:
    assert seconds_left(month) == pytest.approx(end_s - time.time(), abs=5)
