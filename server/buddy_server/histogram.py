"""A Prometheus histogram that records many equal observations in one call."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class CountedHistogram(Collector):
    """prometheus_client's histogram with a `count` argument: the original takes a microsecond per observation, and
    tokens and steps come in groups with equal values. Methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labelnames = labelnames
        self._bounds = buckets
        self._lock = Lock()
        self._series: dict[tuple[str, ...], CountedSeries] = {}
        registry.register(self)

    def labels(self, *labels: str) -> "CountedSeries":
        """The series with these labels. From this call on it is exported, even without observations."""
        if len(labels) != len(self._labelnames):
            raise ValueError(f"labels are {labels}, allowed is one for each of {tuple(self._labelnames)}")
        with self._lock:
            return self._series.setdefault(labels, CountedSeries(self._bounds))

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Returns the name, so that the registry can check that it is unique."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """One metric family, as the registry requests it at every scrape."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)
        with self._lock:
            all_series = list(self._series.items())
        for labels, series in all_series:
            family.add_metric(labels, *series.buckets_and_sum())
        yield family


class CountedSeries:
    """The observations with one set of labels."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._lock = Lock()
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Record `value` `count` times."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += count
            self._sum += value * count

    def buckets_and_sum(self) -> tuple[list[tuple[str, float]], float]:
        """The format of HistogramMetricFamily: cumulative counts up to each bound, and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        names = map(floatToGoString, (*self._bounds, float("inf")))
        return list(zip(names, accumulate(counts), strict=True)), total
