"""What Prometheus reads. Each replica counts for itself and reports to the directory, so that any replica can
answer for all."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass
class Metrics:
    """One replica's."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"self_forcing_{name}", text, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"self_forcing_{name}", text, buckets=SECONDS, registry=self.registry)

        self.streams = gauge("streams", "Streams that hold a slot or are paused")
        self.queue = gauge("queue", "Viewers who wait for a slot")
        self.slots = gauge("slots", "Streams that can run at once")
        self.cache = gauge("cache_bytes", "Memory of the key-value cache, of all slots")
        self.first = histogram("first_chunk_seconds", "From a request to its first chunk, the queue included")
        self.between = histogram(
            "between_chunks_seconds", "Between two chunks of a stream that was not held up by its viewer"
        )
        on_time = "Chunks sent, by whether they were on time for the frame rate"
        self.chunks = Counter("self_forcing_chunks", on_time, ["on_time"], registry=self.registry)
        self.frames = Counter("self_forcing_frames", "Frames sent", registry=self.registry)

    def collect(self) -> list[Metric]:
        """As they are now."""
        return list(self.registry.collect())


def exposition(replicas: Mapping[str, Iterable[Metric]]) -> bytes:
    """The text that Prometheus reads, of every replica by its name."""

    class Merged(Collector):
        def collect(self) -> Iterator[Metric]:
            families: dict[str, Metric] = {}
            for replica, metrics in replicas.items():
                for metric in metrics:
                    family = families.setdefault(
                        metric.name, Metric(metric.name, metric.documentation, metric.type)
                    )
                    for sample in metric.samples:
                        family.add_sample(
                            sample.name, {**sample.labels, "replica": replica}, sample.value, sample.timestamp
                        )
            yield from families.values()

    registry = CollectorRegistry()
    registry.register(Merged())
    return generate_latest(registry)


class Pace:
    """When a stream's chunks are due, and what is told of them."""

    def __init__(self, metrics: Metrics, fps: int, *, lead: float = 0.0):
        """`lead`: seconds that a chunk is sent before it is due, as a buffer of the viewer's."""
        self._metrics = metrics
        self._fps = fps
        self._lead = lead
        self._asked = time.monotonic()
        self._first = True
        self.restart()

    def restart(self) -> None:
        """The viewer paused: the next chunk is due when it comes."""
        self._due: float | None = None
        self._ready: float | None = None

    def wait_s(self, frames: int, ready: float) -> float:
        """Seconds until a chunk of so many frames is to be sent, `ready` at this `time.monotonic`."""
        now, length = time.monotonic(), frames / self._fps
        if self._first:
            self._metrics.first.observe(ready - self._asked)
            self._first = False
        if self._ready is not None:
            self._metrics.between.observe(ready - self._ready)
        late = self._due is not None and ready > self._due
        self._metrics.chunks.labels("false" if late else "true").inc()
        self._metrics.frames.inc(frames)
        due = now if self._due is None or now > self._due else self._due
        self._ready, self._due = ready, due + length
        return max(0.0, due - self._lead - now)
