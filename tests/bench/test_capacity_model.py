"""The calculation of how far replicas go, with round numbers."""

from dataclasses import replace

import pytest

from bench.capacity_model import Fleet, ServiceTimes, Traffic, bottleneck, fewest_ingresses, loads

TIMES = ServiceTimes(
    ingress_request=1000,
    ingress_piece=100,
    proxy_request=500,
    proxy_piece=50,
    replica_request=200,
    replica_piece=20,
    redis_request=100,
    redis_renewal=10,
    redis_report=10,
    redis_report_entry=1,
    reader_report=100,
    reader_report_entry=10,
    postgres_transaction=1000,
    postgres_row=10,
    ledger_transaction=2000,
    ledger_row=20,
)
TRAFFIC = Traffic(requests_per_s=10, tokens_per_s=500, streams=50)


def used(times: ServiceTimes, traffic: Traffic, fleet: Fleet) -> dict[str, float]:
    return {load.resource: load.utilisation for load in loads(times, traffic, fleet)}


def test_utilisation_is_rate_times_service_time() -> None:
    # 10 replicas: 100 requests and 2,000 pieces a second; 12 members report 4 times a second.
    reports = 4 * (100 + 12 * 10) / 1e6
    assert used(TIMES, TRAFFIC, Fleet(10, ingresses=2, proxies=4, postgres_cores=2)) == pytest.approx(
        {
            "ingress": (100 * 1000 + 2000 * 100) / 1e6 / 2 + reports,
            "Ray's proxy": (100 * 500 + 2000 * 50) / 1e6 / 4,
            "replica's actor": (10 * 200 + 200 * 20) / 1e6 + reports,
            "Redis": (100 * 100 + 10 * 50 * 0.2 * 10 + 12 * 4 * (10 + 12 * 1)) / 1e6,
            "PostgreSQL": (40 * 1000 + 100 * 10) / 1e6 / 2,
            "ledger's writer": (40 * 2000 + 100 * 20) / 1e6 / 2,
        }
    )


def test_a_stream_has_no_more_pieces_than_tokens_and_no_more_than_are_sent() -> None:
    assert Traffic(1, tokens_per_s=60, streams=20).pieces_per_s == 60
    assert [Traffic(1, 3000, streams).pieces_per_s for streams in (2, 20, 50)] == [40, 100, 200]


def test_at_its_room_the_first_to_be_full_is_full_and_nothing_else_is() -> None:
    fleet = Fleet(30, ingresses=8, proxies=8)
    full = bottleneck(loads(TIMES, TRAFFIC, fleet))
    more = Traffic(TRAFFIC.requests_per_s * full.room, TRAFFIC.tokens_per_s * full.room, TRAFFIC.streams * full.room)
    after = used(TIMES, more, fleet)
    assert after.pop(full.resource) == pytest.approx(1)
    assert max(after.values()) < 1


def test_more_ingresses_move_the_bottleneck_elsewhere() -> None:
    few = bottleneck(loads(TIMES, TRAFFIC, Fleet(100, ingresses=1, proxies=100)))
    many = bottleneck(loads(TIMES, TRAFFIC, Fleet(100, ingresses=100, proxies=100)))
    assert few.resource == "ingress"
    assert many.resource != "ingress"
    assert many.room > few.room


def test_reports_of_very_many_members_leave_no_room() -> None:
    slow = replace(TIMES, redis_report_entry=10_000)
    full = bottleneck(loads(slow, TRAFFIC, Fleet(100, ingresses=100, proxies=100)))
    assert (full.resource, full.room) == ("Redis", 0.0)


def test_the_fewest_ingresses_are_enough_and_one_less_is_not() -> None:
    fewest = fewest_ingresses(TIMES, TRAFFIC, 30, 0.7)
    assert fewest is not None
    assert used(TIMES, TRAFFIC, Fleet(30, fewest))["ingress"] <= 0.7
    assert used(TIMES, TRAFFIC, Fleet(30, fewest - 1))["ingress"] > 0.7
    assert fewest_ingresses(replace(TIMES, reader_report=10**6), TRAFFIC, 30, 0.7) is None
