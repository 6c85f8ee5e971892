"""The worker between cameras and viewers: what is watched, in batches, through the engines.

Each camera's newest measurement is reconstructed once for each rendition that someone watches. Whoever has waited
longest since it was served is next, and others of the same reconstructor and size go with it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

import grpc
import numpy as np
from numpy.typing import NDArray

from decoder.admission import Policy, Refusal
from decoder.batching import Batching
from decoder.cameras import Camera, Cameras
from decoder.catalogue import Catalogue, Reconstructor, fit_rows
from decoder.engines import Engine, EngineError
from decoder.metrics import Metrics
from decoder.pictures import Picture
from decoder.stream import Measurement
from protos.v1 import veilcam_pb2 as pb

log = logging.getLogger("veilcam.decode")

_T = TypeVar("_T")

_GRIDS = 256
"""Picture sizes whose batching is remembered for an engine."""

Group = tuple[Reconstructor, tuple[int, ...]]
"""Frames that can go through an engine together: the reconstructor, and blocks of a picture down and across."""


@dataclass(frozen=True, eq=False)
class _Job:
    """One rendition of what a camera sees now."""

    camera: Camera
    measurement: Measurement
    rendition: str
    reconstructor: Reconstructor

    @property
    def group(self) -> Group:
        return self.reconstructor, self.measurement.levels.shape[1:]


class Worker:
    """Runs reconstructors, fair between cameras.

    An engine that fails loses its batch and is rebuilt. If it then fails again, its cameras' streams end.

    Args:
        policy: what may be shown, and how many frames at once, however cheap more would be.
    """

    def __init__(self, cameras: Cameras, catalogue: Catalogue, policy: Policy, metrics: Metrics) -> None:
        self._cameras = cameras
        self._catalogue = catalogue
        self._policy = policy
        self._metrics = metrics
        self._batching: WeakKeyDictionary[Engine, dict[tuple[int, ...], Batching]] = WeakKeyDictionary()
        self._rebuilt: WeakSet[Engine] = WeakSet()
        """Engines in the place of one that failed, and that haven't worked yet."""
        self._rebuilding = asyncio.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            self._cameras.work.clear()
            jobs = self._jobs()
            if not jobs:
                await self._cameras.work.wait()
            elif (batch := await self._gathered(jobs)) and await self._do(batch):
                await self._learn(batch[0])

    def admit(self, hello: pb.Hello) -> tuple[str, ...]:
        """What this server can show of a camera's measurements, first what it shows when nobody asks.

        Raises:
            Refusal: there is nothing: of an operator that isn't here, too large for an engine, or not given.
        """
        if hello.operator_id not in self._catalogue.operators():
            known = ", ".join(sorted(self._catalogue.operators()))
            problem = f"{hello.operator_id[:80]!r} isn't among the operators of this server ({known})"
            raise Refusal(grpc.StatusCode.NOT_FOUND, "hello.operator_id", problem)
        self._catalogue.check_sides(hello)
        renditions = self._policy.renditions
        found = tuple(name for name in renditions if self._catalogue.choose(hello.operator_id, name, 1))
        if not found:
            problem = f"{hello.operator_id!r} has only plain reconstructors here, and this server gives only veiled"
            raise Refusal(grpc.StatusCode.NOT_FOUND, "hello.operator_id", f"{problem} pictures")
        return found

    async def reconstruct(self, hello: pb.Hello, levels: NDArray[np.int8], rendition: str) -> NDArray[np.uint8]:
        """A picture (H, W) that isn't live, in turn with those that are.

        Args:
            levels: quantised measurements (rows, H/B, W/B) of the camera that said ``hello``.
            rendition: one of those for which it is admitted.

        Raises:
            EngineError: the engine failed; it was rebuilt if that is possible.
        """
        reconstructor = self._catalogue.choose(hello.operator_id, rendition, len(levels))
        assert reconstructor is not None
        engine = reconstructor.engine
        fitted = fit_rows(levels, engine.rows)[None]
        try:
            pixels = await self._in_engine_thread(lambda: engine.reconstruct(fitted))
        except EngineError as error:
            await self._rebuild(reconstructor, engine, hello.camera, error)
            raise
        self._rebuilt.discard(engine)
        return pixels[0, : hello.height, : hello.width]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _jobs(self) -> list[_Job]:
        """All there is to do, the one that has waited longest since it was served first."""
        found: list[tuple[float, _Job]] = []
        for camera in self._cameras.all():
            for served, rendition in camera.wanted():
                measurement = camera.newest
                if measurement is None or rendition not in self._policy.renditions:
                    continue
                operator_id = measurement.stream.hello.operator_id
                reconstructor = self._catalogue.choose(operator_id, rendition, len(measurement.levels))
                if reconstructor is not None:
                    found.append((served, _Job(camera, measurement, rendition, reconstructor)))
        return [job for _, job in sorted(found, key=lambda item: item[0])]

    async def _gathered(self, jobs: list[_Job]) -> list[_Job]:
        """The jobs that go with the first one. Others that may soon be there are waited for while that pays."""
        group = jobs[0].group
        batching = self._batching_of(jobs[0])
        while True:
            most = batching.fitting(self._most(group[0]))
            batch = [job for job in jobs if job.group == group][:most]
            if len(batch) in (0, most) or len(jobs) > len(batch) or not self._more_may_come(batch):
                return batch[: batching.fitting(len(batch))]
            left = min(job.measurement.ready_s for job in batch) + batching.wait_s - time.monotonic()
            if left <= 0:
                return batch[: batching.fitting(len(batch))]
            self._cameras.work.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cameras.work.wait(), left)
            jobs = self._jobs()

    def _more_may_come(self, batch: list[_Job]) -> bool:
        """Whether another camera that is watched sends frames of this batch's kind."""
        there, (first, *_) = {job.camera for job in batch}, batch
        kind = first.measurement.stream.hello.operator_id, first.measurement.levels.shape
        return any(
            (camera.newest.stream.hello.operator_id, camera.newest.levels.shape) == kind
            for camera in self._cameras.all()
            if camera.newest is not None and camera.watched and camera.state in ("live", "late") and camera not in there
        )

    def _most(self, reconstructor: Reconstructor) -> int:
        return min(self._policy.batch, reconstructor.engine.most_at_once)

    def _batching_of(self, job: _Job) -> Batching:
        """What is known of a job's engine and size. An engine that is replaced takes it along."""
        known, (_, grid) = self._batching.setdefault(job.reconstructor.engine, {}), job.group
        if grid not in known and len(known) >= _GRIDS:
            del known[next(iter(known))]
        return known.setdefault(grid, Batching())

    async def _learn(self, job: _Job) -> None:
        """One run of a batch of a size that isn't measured yet: other cameras wait for no more than that."""
        reconstructor, (height, width) = job.group
        batching, engine, most = self._batching_of(job), reconstructor.engine, self._most(reconstructor)
        if not batching.learning(most):
            return
        await self._in_engine_thread(lambda: batching.step(engine, (height, width)))
        if not batching.learning(most):
            side = engine.block
            log.info("reconstructor %s at %d×%d: %s", reconstructor.name, width * side, height * side, batching)

    async def _do(self, batch: list[_Job]) -> bool:
        """Reconstruct a batch and give its pictures to their viewers. Whether that worked."""
        reconstructor, engine = batch[0].reconstructor, batch[0].reconstructor.engine
        taken = [job.camera.begin(job.rendition) for job in batch]
        pictures: Sequence[Picture | None] = [None] * len(batch)
        try:
            pictures = await self._reconstructed(reconstructor, [work.measurement for work in taken])
            self._rebuilt.discard(engine)
        except Exception as error:  # noqa: BLE001 - an engine's own; whatever it is, this batch is lost
            if not await self._rebuild(reconstructor, engine, ", ".join(job.camera.name for job in batch), error):
                problem = "the reconstructor failed, see the server's log"
                for work in taken:
                    work.measurement.stream.end(Refusal(grpc.StatusCode.INTERNAL, "frame", problem))
        finally:
            for job, work, picture in zip(batch, taken, pictures, strict=True):
                if job.camera.end(work, picture) and picture is not None:
                    self._metrics.shown(reconstructor, picture)
            self._cameras.tell()
        return all(picture is not None for picture in pictures)

    async def _reconstructed(self, reconstructor: Reconstructor, taken: Sequence[Measurement]) -> list[Picture]:
        engine = reconstructor.engine
        levels = np.stack([fit_rows(measurement.levels, engine.rows) for measurement in taken])
        began_ns, began = time.time_ns(), time.perf_counter()
        pixels = await self._in_engine_thread(lambda: engine.reconstruct(levels))
        took = (time.perf_counter() - began) * 1e3
        self._metrics.batch(reconstructor, len(taken), took)
        pictures = []
        for measurement, each in zip(taken, pixels, strict=True):
            hello, times = measurement.stream.hello, measurement.times
            queue = (began_ns - times.received_ns) / 1e6 - times.unpack
            # A copy of its own: a picture must not keep its whole batch in memory.
            whole = each[: hello.height, : hello.width]
            pictures.append(
                Picture(
                    *(hello.camera, measurement.sequence, measurement.capture_time_ns, time.time_ns()),
                    whole if len(taken) == 1 else whole.copy(),
                    *(reconstructor.rendition, reconstructor.id),
                    replace(times, queue=queue, reconstruct=took),
                )
            )
        return pictures

    async def _rebuild(self, reconstructor: Reconstructor, failed: Engine, names: str, error: Exception) -> bool:
        """After an engine has failed on frames of the cameras named: whether there is a new one, tried once.

        What was on its way to the failed one meanwhile fails too, and says nothing of the new one.
        """
        log.error("reconstructor %s failed on frames of %s", reconstructor.name, names, exc_info=error)
        self._metrics.failed(reconstructor)
        async with self._rebuilding:
            if reconstructor.engine is not failed:
                return True
            if failed not in self._rebuilt:
                try:
                    reconstructor.engine = await self._in_engine_thread(failed.reopened)
                except EngineError as rebuilding:
                    log.error("reconstructor %s can't be rebuilt: %s", reconstructor.name, rebuilding)
                else:
                    self._rebuilt.add(reconstructor.engine)
                    log.warning("reconstructor %s: its engine was rebuilt", reconstructor.name)
                    return True
            self._rebuilt.discard(failed)
            return False

    async def _in_engine_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
