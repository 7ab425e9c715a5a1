"""A month of UTC, written like "2026-11"."""

from datetime import UTC, datetime


def seconds_left(month: str) -> float:
    """Until the next month begins; 0 or less when `month` is over."""
    year, number = map(int, month.split("-"))
    end = datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)
    return (end - datetime.now(UTC)).total_seconds()
