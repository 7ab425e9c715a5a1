"""Metrics of several engines in one text."""

from prometheus_client import CollectorRegistry, Metric, generate_latest

from buddy_server.engine.messages import DepthCount, StepStats
from buddy_server.engine_metrics import EngineMetrics
from buddy_server.replicas.labelled_families import LabelledFamilies
from fakes.engine import INFO, FakeEngine


def families(num_running: int, depth: dict[str, DepthCount]) -> list[Metric]:
    registry = CollectorRegistry()
    metrics = EngineMetrics(INFO, registry, lambda tenant: (tenant, ""))
    metrics.observe_step(StepStats(1, 9, 2, 6, 0, 0.0002, depth))
    metrics.show(FakeEngine(num_running=num_running))
    return list(registry.collect())


def test_every_sample_names_its_replica_and_the_labels_of_its_tenant() -> None:
    first = families(2, {"acme": DepthCount(30000, 10000), "x": DepthCount(1000), "y": DepthCount(2000)})
    second = families(3, {"acme": DepthCount(4000)})
    labels = {"acme": ("acme", "pro")}
    merged = CollectorRegistry()
    replicas = [("r1", first), ("r2", second)]
    merged.register(LabelledFamilies("replica", replicas, lambda name: labels.get(name, ("other", "other"))))

    def sample(name: str, **labels: str) -> float | None:
        return merged.get_sample_value(name, labels)

    assert sample("buddy_layers_executed_total", tenant="acme", tier="pro", replica="r1") == 30
    assert sample("buddy_layers_executed_total", tenant="acme", tier="pro", replica="r2") == 4
    assert sample("buddy_layers_executed_total", tenant="other", tier="other", replica="r1") == 3
    assert sample("buddy_num_requests_running", replica="r2") == 3
    assert sample("buddy_batch_size_bucket", replica="r1", le="2.0") == 1
    text = generate_latest(merged).decode()
    assert text.count("# TYPE buddy_layers_executed_total counter") == 1
