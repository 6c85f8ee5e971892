"""What Prometheus is told: how each camera's frames fare, what engines do, what is recorded."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from decoder.cameras import Cameras
from decoder.catalogue import Reconstructor
from decoder.pictures import Picture
from decoder.states import STATES
from decoder.stream import FATES

if TYPE_CHECKING:
    from decoder.recordings.track import Recorded

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The service's own measurements; ``registry`` is what a scrape reads.

    Args:
        cameras: their counts are read at each scrape. A camera that is forgotten is no longer told of.
        recorded: how each camera's recording fares.
        until: when the service's certificate expires, if it has one.
    """

    def __init__(
        self,
        cameras: Cameras,
        recorded: "Callable[[], Mapping[str, Recorded]]",
        until: Callable[[], datetime] | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(_Frames(cameras, recorded))
        if until is not None:
            expires = Gauge(
                "veilcam_certificate_expires_seconds",
                "When the service's certificate expires, since 1970.",
                registry=self.registry,
            )
            expires.set_function(lambda: until().timestamp())
        each = ["reconstructor"]
        self._batch = Histogram(
            "veilcam_batch_frames", "Frames of a batch.", each, buckets=_BATCHES, registry=self.registry
        )
        self._engine = Histogram(
            "veilcam_engine_seconds", "Time of a batch in its engine.", each, buckets=_SECONDS, registry=self.registry
        )
        self._queue = Histogram(
            "veilcam_queue_seconds", "Wait of a frame for its engine.", each, buckets=_SECONDS, registry=self.registry
        )
        self._failures = Counter("veilcam_engine_failures", "Batches that failed.", each, registry=self.registry)
        self._latency = Histogram(
            "veilcam_latency_seconds",
            "Time from capture, by the camera's clock, until a picture is ready for viewers.",
            ["camera"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        cameras.forgotten.append(self._forget)

    def batch(self, reconstructor: Reconstructor, frames: int, took_ms: float) -> None:
        """An engine has done a batch."""
        self._batch.labels(reconstructor.name).observe(frames)
        self._engine.labels(reconstructor.name).observe(took_ms / 1e3)

    def failed(self, reconstructor: Reconstructor) -> None:
        """An engine has failed on a batch."""
        self._failures.labels(reconstructor.name).inc()

    def shown(self, reconstructor: Reconstructor, picture: Picture) -> None:
        """A picture is ready for its viewers."""
        self._queue.labels(reconstructor.name).observe(max(0.0, picture.times.queue) / 1e3)
        self._latency.labels(picture.camera).observe(max(0, picture.shown_time_ns - picture.capture_time_ns) / 1e9)

    def _forget(self, camera: str) -> None:
        with contextlib.suppress(KeyError):
            self._latency.remove(camera)


class _Frames(Collector):
    """Counts that cameras and the recorder keep anyway."""

    def __init__(self, cameras: Cameras, recorded: "Callable[[], Mapping[str, Recorded]]") -> None:
        self._cameras, self._recorded = cameras, recorded

    def collect(self) -> Iterator[Metric]:
        received = CounterMetricFamily("veilcam_frames_received", "Frames that came.", labels=["camera"])
        size = CounterMetricFamily("veilcam_received_bytes", "Bytes of frames that came.", labels=["camera"])
        frames_shown = CounterMetricFamily("veilcam_frames_shown", "Frames shown in any rendition.", labels=["camera"])
        shown = CounterMetricFamily("veilcam_pictures_shown", "Pictures made.", labels=["camera", "rendition"])
        told = "Frames that came and were not shown, by reason."
        dropped = CounterMetricFamily("veilcam_frames_dropped", told, labels=["camera", "reason"])
        viewers = GaugeMetricFamily("veilcam_viewers", "Viewers now.", labels=["camera", "rendition"])
        state = GaugeMetricFamily("veilcam_camera_state", "1 for the state a camera is in.", labels=["camera", "state"])
        since = GaugeMetricFamily(
            "veilcam_camera_state_since_seconds", "When that state began, since 1970.", labels=["camera"]
        )
        clock = GaugeMetricFamily(
            "veilcam_clock_offset_seconds",
            "This server's clock minus the camera's, plus the quickest way of a frame in the last minute.",
            labels=["camera"],
        )
        slowed = CounterMetricFamily(
            "veilcam_slowed_seconds", "For which a camera above its limits was made to wait.", labels=["camera"]
        )
        for camera in self._cameras.all():
            camera.look()
            since.add_metric([camera.name], camera.since_ns / 1e9)
            slowed.add_metric([camera.name], camera.pace.slowed_s + camera.late_pace.slowed_s)
            if (offset_ns := camera.clock_offset_ns) is not None:
                clock.add_metric([camera.name], offset_ns / 1e9)
            tally, name = camera.tally, camera.name
            received.add_metric([name], tally.received)
            size.add_metric([name], tally.bytes)
            for rendition, relay in camera.relays.items():
                shown.add_metric([name, rendition], tally.shown.get(rendition, 0))
                viewers.add_metric([name, rendition], relay.viewers)
            for fate in FATES:
                if fate == "shown":
                    frames_shown.add_metric([name], tally.fates[fate])
                else:
                    dropped.add_metric([name, fate], tally.fates[fate])
            for each in STATES:
                state.add_metric([name, each], camera.state == each)
        yield from (received, size, frames_shown, shown, dropped, viewers, state, since, clock, slowed)
        frames = CounterMetricFamily("veilcam_recorded_frames", "Frames recorded.", labels=["camera"])
        written = CounterMetricFamily("veilcam_recorded_bytes", "Bytes recorded.", labels=["camera"])
        lost = CounterMetricFamily(
            "veilcam_unrecorded_frames", "Frames that the disk had no time or room for.", labels=["camera"]
        )
        late = CounterMetricFamily(
            "veilcam_backlog_frames", "Of the frames recorded, those that came in a backlog.", labels=["camera"]
        )
        repeated = CounterMetricFamily(
            "veilcam_repeated_frames", "Frames that came when they were recorded already.", labels=["camera"]
        )
        for name, each_recorded in self._recorded().items():
            frames.add_metric([name], each_recorded.frames)
            written.add_metric([name], each_recorded.bytes)
            lost.add_metric([name], each_recorded.dropped)
            late.add_metric([name], each_recorded.late)
            repeated.add_metric([name], each_recorded.repeated)
        yield from (frames, written, lost, late, repeated)
