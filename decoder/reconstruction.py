"""The worker between cameras and viewers: runs reconstructors on each camera's newest measurement in turn."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc

from decoder.admission import Refusal
from decoder.cameras import Camera, Cameras, Measurement, Stream
from decoder.catalogue import Catalogue, Reconstructor, fit_rows
from decoder.pictures import Picture, Times

log = logging.getLogger("veilcam.decode")


class Worker:
    """Runs reconstructors, one measurement at a time, fair between cameras.

    Args:
        renditions: what may be shown, the one that everyone gets first. The others are computed for their viewers
            only.
    """

    def __init__(self, cameras: Cameras, catalogue: Catalogue, renditions: tuple[str, ...]) -> None:
        self._cameras = cameras
        self._catalogue = catalogue
        self._renditions = renditions
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._last = ""

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            camera = self._next()
            if camera is None:
                self._cameras.pending.clear()
                if self._next() is None:
                    await self._cameras.pending.wait()
                continue
            self._last = camera.name
            stream = camera.stream
            assert stream is not None
            shown = None
            try:
                shown = await self._show(camera, stream, stream.take())
            finally:
                stream.done(shown)

    def rendition_for(self, operator_id: str) -> str | None:
        """The rendition that this server shows of an operator's measurements when nobody asks for another."""
        for rendition in self._renditions:
            if self._catalogue.choose(operator_id, rendition, 1):
                return rendition
        return None

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> Camera | None:
        waiting = [c for c in self._cameras.all() if c.stream is not None and c.stream.pending is not None]
        after = [camera for camera in waiting if camera.name > self._last]
        return next(iter(after or waiting), None)

    async def _show(self, camera: Camera, stream: Stream, measurement: Measurement) -> Picture | None:
        """Reconstruct what is wanted of a measurement; returns the picture of the stream's own rendition."""
        operator_id, main = stream.hello.operator_id, None
        queue_ns = time.time_ns() - measurement.times.received_ns
        times = replace(measurement.times, queue=queue_ns / 1e6 - measurement.times.unpack)
        for rendition in self._renditions:
            if rendition != stream.rendition and not camera.relays[rendition].viewers:
                continue
            reconstructor = self._catalogue.choose(operator_id, rendition, len(measurement.levels))
            if reconstructor is None:
                continue
            try:
                picture = await self._reconstruct(stream, measurement, replace(times), rendition, reconstructor)
            except Exception as error:
                log.exception("camera %s: reconstructor %s failed", camera.name, reconstructor.name)
                kind = type(error).__name__
                stream.end(
                    Refusal(grpc.StatusCode.INTERNAL, "frame", f"the reconstructor failed ({kind}), see the log")
                )
                return None
            camera.relays[rendition].publish(picture)
            if rendition == stream.rendition:
                camera.note_shown(picture)
                main = picture
            self._cameras.published()
        return main

    async def _reconstruct(
        self, stream: Stream, measurement: Measurement, times: Times, rendition: str, reconstructor: Reconstructor
    ) -> Picture:
        levels = fit_rows(measurement.levels, reconstructor.engine.rows)
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._pool, reconstructor.engine.reconstruct, levels[None])
        times.reconstruct = (time.perf_counter() - began) * 1e3
        return Picture(
            stream.hello.camera,
            measurement.sequence,
            measurement.capture_time_ns,
            time.time_ns(),
            pixels[0, : stream.hello.height, : stream.hello.width],
            rendition,
            reconstructor.id,
            times,
        )
