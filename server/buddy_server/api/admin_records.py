"""GET /admin/usage and GET /admin/audit."""

import csv
import io
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from buddy_server.api.admin_schemas import AuditQuery, AuditView, Listed, UsageQuery, UsageView, shown_time
from buddy_server.tenancy.administration import Administration
from buddy_server.tenancy.ledger.ledger import Ledger
from buddy_server.tenancy.store.ledger_store import Group, LedgerStore, UsageRow

_SUMS = ("requests", "prompt_tokens", "completion_tokens", "layer_tokens")


def add_usage(router: APIRouter, ledger: Ledger, rows: LedgerStore) -> None:
    @router.get(
        "/usage",
        response_model=Listed[UsageView],
        response_model_exclude_unset=True,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
    )
    async def usage(request: Request, query: Annotated[UsageQuery, Query()]) -> object:
        """What was used, summed for each tenant, day or key, as JSON or CSV."""
        groups = query.groups
        # What this server has told its clients is in the sums.
        await ledger.flush()
        sums = await rows.usage(groups, tenant=query.tenant, first_day=query.first_day, last_day=query.last_day)
        if query.format == "csv" or (query.format is None and "text/csv" in request.headers.get("accept", "")):
            return Response(_csv(groups, sums), media_type="text/csv")
        return {"data": [dict(zip((*groups, *_SUMS), _values(row), strict=True)) for row in sums]}


def add_audit(router: APIRouter, administration: Administration) -> None:
    @router.get("/audit")
    async def audit(query: Annotated[AuditQuery, Query()]) -> Listed[AuditView]:
        """Every change to tenants, tiers and keys, the newest first."""
        return Listed(
            data=[
                AuditView(
                    id=row.id,
                    at=shown_time(row.at_ms),
                    actor=row.actor,
                    action=row.action,
                    subject=row.subject,
                    details=row.details,
                )
                for row in await administration.audit(query.limit, query.before)
            ]
        )


def _values(row: UsageRow) -> tuple[object, ...]:
    return (*row.group, row.requests, row.prompt_tokens, row.completion_tokens, row.layer_tokens)


def _csv(groups: Sequence[Group], rows: Sequence[UsageRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((*groups, *_SUMS))
    writer.writerows(map(_values, rows))
    return text.getvalue()
