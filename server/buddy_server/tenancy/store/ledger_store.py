"""The ledger in the store: one row for each request that has ended."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Literal

import msgspec
from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from buddy_server.tenancy.ledger.entry import LedgerEntry
from buddy_server.tenancy.store.database import Database
from buddy_server.tenancy.store.tables import ledger

Group = Literal["tenant", "day", "key"]
_COLUMNS = {"tenant": ledger.c.tenant, "day": ledger.c.day, "key": ledger.c.key_id}
_ROWS_A_DELETION = 5000
"""Few enough that responses do not wait long for a deletion to end."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over the requests of one group. `group` has the values of the columns that were asked for, in their order;
    a key is None for requests without one."""

    group: tuple[str | None, ...]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    layer_tokens: float


class LedgerStore:
    """The ledger's table in `database`. All methods raise StoreUnreachable. Days are like "2026-11-26", in UTC."""

    def __init__(self, database: Database) -> None:
        self._database = database
        dialect = postgresql if database.sqlite_file is None else sqlite
        self._insert = dialect.insert(ledger).on_conflict_do_nothing(index_elements=[ledger.c.id])

    async def write(self, entries: Sequence[LedgerEntry]) -> int:
        """Add the entries whose id is new, all or none of them, and return how many those were."""
        if not entries:
            return 0
        return await self._database.insert(self._insert, [msgspec.structs.asdict(entry) for entry in entries])

    async def usage(
        self,
        group_by: Sequence[Group],
        *,
        tenant: str | None = None,
        first_day: str | None = None,
        last_day: str | None = None,
    ) -> list[UsageRow]:
        """What was used, of one tenant or all, from `first_day` to `last_day` inclusive, in the order of the groups."""
        columns = [_COLUMNS[group] for group in group_by]
        counts = [
            func.count(), func.sum(ledger.c.prompt_tokens), func.sum(ledger.c.completion_tokens),
            func.sum(ledger.c.milli_layers),
        ]  # fmt: skip
        query = select(*columns, ledger.c.layers, *counts).group_by(*columns, ledger.c.layers)
        if tenant is not None:
            query = query.where(ledger.c.tenant == tenant)
        if first_day is not None:
            query = query.where(ledger.c.day >= first_day)
        if last_day is not None:
            query = query.where(ledger.c.day <= last_day)
        parts: defaultdict[tuple[str | None, ...], list[tuple[int, ...]]] = defaultdict(list)
        async with self._database.reporting() as connection:
            for row in await connection.execute(query):
                parts[tuple(row[: len(columns)])].append(tuple(map(int, row[len(columns) :])))
        return [
            _usage_row(group, parts[group])
            for group in sorted(parts, key=lambda group: [value or "" for value in group])
        ]

    async def month_cost(self, month: str, layers: int) -> dict[str, int]:
        """What each tenant used in a month like "2026-11", in milli-layers of a model with `layers` layers."""
        cost = func.sum(ledger.c.milli_layers)
        query = (
            select(ledger.c.tenant, ledger.c.layers, cost)
            .where(ledger.c.day >= f"{month}-01", ledger.c.day <= f"{month}-31")
            .group_by(ledger.c.tenant, ledger.c.layers)
        )
        costs: defaultdict[str, int] = defaultdict(int)
        async with self._database.reporting() as connection:
            for tenant, row_layers, milli_layers in await connection.execute(query):
                # A model with twice the layers spends twice the milli-layers on the same layer-tokens.
                costs[tenant] += int(milli_layers) * layers // row_layers
        return dict(costs)

    async def keep_days(self, num_days: int) -> int:
        """Delete what is older than `num_days` days, and return the number of rows."""
        return await self.delete_before((datetime.now(UTC).date() - timedelta(days=num_days)).isoformat())

    async def delete_before(self, day: str) -> int:
        """Delete the rows of the days before `day`, and return their number."""
        some = select(ledger.c.id).where(ledger.c.day < day).limit(_ROWS_A_DELETION)
        num_deleted = 0
        while True:
            async with self._database.writing() as connection:
                num = (await connection.execute(delete(ledger).where(ledger.c.id.in_(some)))).rowcount
            num_deleted += num
            if num < _ROWS_A_DELETION:
                return num_deleted


def _usage_row(group: tuple[str | None, ...], parts: Sequence[tuple[int, ...]]) -> UsageRow:
    """The sum of `parts`, one for each number of layers that a model has had."""
    layers, requests, prompt_tokens, completion_tokens, milli_layers = zip(*parts, strict=True)
    layer_tokens = sum(Fraction(cost, 1000 * num) for cost, num in zip(milli_layers, layers, strict=True))
    return UsageRow(
        group, sum(requests), sum(prompt_tokens), sum(completion_tokens), layer_tokens=round(float(layer_tokens), 3)
    )
