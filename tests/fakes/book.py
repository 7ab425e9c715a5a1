"""The tenants and tiers of a configuration file, as administration sees them."""

from dataclasses import dataclass, field

from buddy_server.tenancy.policy import Tenant, Tier


@dataclass
class FakeBook:
    """Has one tenant, "filed", in one tier, "free", unless told otherwise; counts how often it was refreshed."""

    file_tiers: dict[str, Tier] = field(default_factory=lambda: {"free": Tier("free", max_budget=0.5)})
    file_tenants: dict[str, Tenant] = field(
        default_factory=lambda: {"filed": Tenant("filed", Tier("free", max_budget=0.5))}
    )
    num_refreshes: int = 0

    async def refresh(self) -> None:
        self.num_refreshes += 1
