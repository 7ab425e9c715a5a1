"""Rows of the ledger."""

from typing import Any

from buddy_server.tenancy.ledger.entry import LedgerEntry


def entry(name: str = "r0", **fields: Any) -> LedgerEntry:
    """A small row, with `fields` over its own."""
    values: dict[str, Any] = {
        "id": name,
        "tenant": "acme",
        "key_id": None,
        "model": "tiny",
        "layers": 8,
        "day": "2026-11-26",
        "started_ms": 1,
        "ended_ms": 2,
        "budget_requested": 0.5,
        "budget_granted": 0.5,
        "decided_by": "request",
        "prompt_tokens": 3,
    }
    return LedgerEntry(**values | fields)
