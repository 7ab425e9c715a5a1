"""How far replicas go: the load of everything that they share, from service times and traffic.

Load is utilisation: the rate of each kind of work times its service time, over the units that do it. What grows with
the requests and what does not, such as reports of the engines, are kept apart, so that the traffic at which something
is full follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from buddy_server.replicas.gather import LONGEST_PAUSE_S, MOST_PER_S, pause_s

FEWEST_STREAMS = MOST_PER_S * LONGEST_PAUSE_S
REPORTS_PER_S = 4.0
"""Of each engine, and of what each ingress reads of all."""
RENEWALS_PER_S = 0.2
"""Of each open request's lease: three times in limiter.LEASE_S."""
TRANSACTIONS_PER_S = 20.0
"""At most of each ingress's ledger: ledger.GATHER_S."""


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Microseconds of CPU time. A request's admission and end count apart from its pieces, which are the messages of an
    answer. `report` is for an engine or ingress that writes its report and reads all, `report_entry` for each that it
    reads. `ledger` are those of an ingress's own writer, elapsed, not CPU time."""

    ingress_request: float
    ingress_piece: float
    proxy_request: float
    proxy_piece: float
    replica_request: float
    replica_piece: float
    redis_request: float
    redis_renewal: float
    redis_report: float
    redis_report_entry: float
    reader_report: float
    reader_report_entry: float
    postgres_transaction: float
    postgres_row: float
    ledger_transaction: float
    ledger_row: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one replica, on average. With FEWEST_STREAMS or more, pieces are in proportion to them."""

    requests_per_s: float
    tokens_per_s: float
    streams: float

    @property
    def pieces_per_s(self) -> float:
        """A message has at least a token."""
        return min(self.tokens_per_s, self.streams / pause_s(self.streams))


@dataclass(frozen=True, slots=True)
class Fleet:
    """`postgres_cores` are what PostgreSQL may use; all others are processes that use one core each."""

    replicas: int
    ingresses: int = 1
    proxies: int = 1
    postgres_cores: int = 2


@dataclass(frozen=True, slots=True)
class Load:
    """Shares of the time of one unit of `resource`: `fixed` whatever the traffic, `varying` in proportion to it."""

    resource: str
    fixed: float
    varying: float

    @property
    def utilisation(self) -> float:
        return self.fixed + self.varying

    @property
    def room(self) -> float:
        """How many times the traffic would fill it; 0 if it is full without any, infinite if it has nothing to do."""
        if self.fixed >= 1:
            return 0.0
        return (1 - self.fixed) / self.varying if self.varying else float("inf")


def loads(times: ServiceTimes, traffic: Traffic, fleet: Fleet) -> list[Load]:
    """Every resource, with all replicas at `traffic` and spread evenly over ingresses and proxies."""
    requests, pieces = fleet.replicas * traffic.requests_per_s, fleet.replicas * traffic.pieces_per_s
    members = fleet.replicas + fleet.ingresses
    reading_us = REPORTS_PER_S * (times.reader_report + members * times.reader_report_entry)
    redis_report_us = times.redis_report + members * times.redis_report_entry
    transactions = min(requests, fleet.ingresses * TRANSACTIONS_PER_S)
    ledger_us = transactions * times.ledger_transaction + requests * times.ledger_row
    return [
        _load("ingress", reading_us, requests * times.ingress_request + pieces * times.ingress_piece, fleet.ingresses),
        _load("Ray's proxy", 0, requests * times.proxy_request + pieces * times.proxy_piece, fleet.proxies),
        _load(
            "replica's actor",
            reading_us,
            traffic.requests_per_s * times.replica_request + traffic.pieces_per_s * times.replica_piece,
        ),
        _load(
            "Redis",
            members * REPORTS_PER_S * redis_report_us,
            requests * times.redis_request + fleet.replicas * traffic.streams * RENEWALS_PER_S * times.redis_renewal,
        ),
        _load(
            "PostgreSQL",
            0,
            transactions * times.postgres_transaction + requests * times.postgres_row,
            fleet.postgres_cores,
        ),
        _load("ledger's writer", 0, ledger_us, fleet.ingresses),
    ]


def _load(resource: str, fixed_us: float, varying_us: float, units: int = 1) -> Load:
    # What is fixed, every unit does for itself.
    return Load(resource, fixed_us / 1e6, varying_us / 1e6 / units)


def bottleneck(loads: Sequence[Load]) -> Load:
    """What is full first when the traffic of all replicas grows."""
    return min(loads, key=lambda load: load.room)


def fewest_ingresses(times: ServiceTimes, traffic: Traffic, replicas: int, most: float) -> int | None:
    """With how many ingresses none is used more than `most`; None if reading the reports alone uses so much."""
    for ingresses in range(1, 100 * replicas + 1):
        ingress = loads(times, traffic, Fleet(replicas, ingresses))[0]
        if ingress.utilisation <= most:
            return ingresses
        if ingress.fixed > most:
            return None
    return None
