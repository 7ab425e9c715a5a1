"""The metrics of several replicas as one exposition."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


class ReplicaFamilies(Collector):
    """The families of several replicas, each once, with a sample for each replica. Where a tenant's name is a label,
    `labels_of` gives the labels (tenant, tier) in place of it; samples that then have equal labels are added up."""

    def __init__(
        self, replicas: Sequence[tuple[str, Sequence[Metric]]], labels_of: Callable[[str], tuple[str, str]]
    ) -> None:
        self._replicas = replicas
        self._labels_of = labels_of

    def collect(self) -> Iterator[Metric]:
        by_name: dict[str, list[tuple[str, Metric]]] = {}
        for replica, families in self._replicas:
            for family in families:
                by_name.setdefault(family.name, []).append((replica, family))
        for group in by_name.values():
            yield self._merged(group)

    def _merged(self, group: list[tuple[str, Metric]]) -> Metric:
        _, first = group[0]
        merged = Metric(first.name, first.documentation, first.type, first.unit)
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for replica, family in group:
            for sample in family.samples:
                labels = self._labels(sample) | {"replica": replica}
                key = (sample.name, tuple(labels.items()))
                values[key] = values.get(key, 0.0) + sample.value
        for (name, labels_of_key), value in values.items():
            merged.add_sample(name, dict(labels_of_key), value)
        return merged

    def _labels(self, sample: Sample) -> dict[str, str]:
        if "tenant" not in sample.labels:
            return dict(sample.labels)
        tenant, tier = self._labels_of(sample.labels["tenant"])
        return sample.labels | {"tenant": tenant, "tier": tier}
