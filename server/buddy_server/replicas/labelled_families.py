"""The metrics of several processes as one exposition."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


class LabelledFamilies(Collector):
    """The families of several processes, each family once, with the samples of each process under its name as `label`.
    Where a tenant's name is the label of a sample, `labels_of` gives the labels (tenant, tier) in place of it; samples
    that then have equal labels are added up."""

    def __init__(
        self,
        label: str,
        processes: Sequence[tuple[str, Sequence[Metric]]],
        labels_of: Callable[[str], tuple[str, str]] | None = None,
    ) -> None:
        self._label = label
        self._processes = processes
        self._labels_of = labels_of

    def collect(self) -> Iterator[Metric]:
        by_name: dict[str, list[tuple[str, Metric]]] = {}
        for process, families in self._processes:
            for family in families:
                by_name.setdefault(family.name, []).append((process, family))
        for group in by_name.values():
            yield self._merged(group)

    def _merged(self, group: list[tuple[str, Metric]]) -> Metric:
        _, first = group[0]
        merged = Metric(first.name, first.documentation, first.type, first.unit)
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for process, family in group:
            for sample in family.samples:
                labels = self._labels(sample) | {self._label: process}
                key = (sample.name, tuple(labels.items()))
                values[key] = values.get(key, 0.0) + sample.value
        for (name, labels_of_key), value in values.items():
            merged.add_sample(name, dict(labels_of_key), value)
        return merged

    def _labels(self, sample: Sample) -> dict[str, str]:
        if self._labels_of is None or "tenant" not in sample.labels:
            return dict(sample.labels)
        tenant, tier = self._labels_of(sample.labels["tenant"])
        return sample.labels | {"tenant": tenant, "tier": tier}
