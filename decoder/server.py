"""A whole decoder service: starts its parts, tells where they listen, and ends them in order, within a limit."""

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from decoder.access.addresses import unmapped
from decoder.access.audit import Audit
from decoder.access.connections import Listener, page_protocol
from decoder.access.door import Door
from decoder.access.exposure import check_exposure, is_everywhere
from decoder.access.guards import GrpcGuard
from decoder.access.people import People
from decoder.access.tls import Certificates
from decoder.admission import Policy, Refusal
from decoder.cameras import Cameras
from decoder.catalogue import Catalogue
from decoder.metrics import Metrics
from decoder.private import make_folder
from decoder.reconstruction import Worker
from decoder.recordings.playback import Playback
from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from decoder.service import FIRST_MESSAGE_S, UNREAD_S, CamerasService, ViewersService
from decoder.settings import AT_ONCE, Settings, changed
from decoder.viewers.folder import save_pictures
from decoder.viewers.hook import ON_CLOSE_S, Hook
from decoder.viewers.probes import probes
from decoder.viewers.recorded import recorded
from decoder.viewers.web import web_app
from protos.rules import CAMERA_NAME
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import add_CamerasServicer_to_server, add_ViewersServicer_to_server

log = logging.getLogger("veilcam.decode")

GRACE_S = 5.0
_LAST_S = 1.0
"""What waits for the disk has so long at least, however slowly others went."""
_MESSAGE_OVERHEAD = 4096
_MOST_OF_A_HEAD = 1 << 16
"""Bytes of a request's line and headers: the page tells there what it has seen of each camera."""


class ServerError(Exception):
    """An address that can't be listened on, or a folder that can't be written; the message names it."""


class Server:
    """A decoder service in the running event loop.

    Args:
        catalogue: opened as the settings say.
        settings: they may change while it runs, with ``apply``.

    Raises:
        AccessError: it would listen beyond loopback without TLS and authentication, or a file of certificates or
            users can't be.

    Attributes:
        settings: in force; what waits for the next start isn't among them.
    """

    def __init__(self, catalogue: Catalogue, settings: Settings) -> None:
        check_exposure(settings)
        self._certificates = Certificates(settings) if settings.certificate is not None else None
        self.settings = settings
        self._policy = _policy(settings)
        self._door = Door(People(settings.users)) if settings.users is not None else None
        self._audit = Audit()
        self.cameras = Cameras(self._policy)
        self.port = 0
        self.http_port = 0
        self._catalogue = catalogue
        self._store = _store(settings)
        self._recorder = Recorder(self._store) if self._store else None
        if self._recorder is not None:
            self.cameras.forgotten.append(self._recorder.forget)
        for name, seen_ns in self._store.cameras().items() if self._store else ():
            if CAMERA_NAME.fullmatch(name):
                self.cameras.remember(name, seen_ns)
        self._hook = Hook(settings.on_change.get_secret_value()) if settings.on_change is not None else None
        if self._hook is not None:
            self.cameras.turned.append(self._hook.tell)
        until = self._certificates.until if self._certificates is not None else None
        self.metrics = Metrics(self.cameras, self._recorder.told if self._recorder else dict, until)
        self._worker = Worker(self.cameras, catalogue, self._policy, self.metrics)
        self._health = health.aio.HealthServicer()
        self._grpc = self._grpc_server()
        self._ready = False
        more = probes(self.metrics.registry, lambda: self._ready)
        more += (
            recorded(Playback(self._store, catalogue), self._worker, self._policy, self._audit) if self._store else []
        )
        proxy = unmapped(str(settings.trusted_proxy)) if settings.trusted_proxy is not None else None
        people = self._door, self._secure, proxy is not None
        app = web_app(self.cameras, catalogue, self._policy, more, settings.host, self._audit, *people)
        config = uvicorn.Config(
            app,
            http=page_protocol(settings.request_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=proxy is not None,
            forwarded_allow_ips=proxy,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=settings.idle_seconds,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=_MOST_OF_A_HEAD,
        )
        if self._certificates is not None:
            context = self._certificates.for_page()
            config.ssl_context_factory = lambda *_: context
        self._web = _Web(config)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen.

        Raises:
            ServerError: an address is taken or can't be listened on.
        """
        host, port, http_port = self.settings.host, self.settings.port, self.settings.http
        if self.settings.save:
            _writable(self.settings.save, "--save")
        try:
            listening = _listening(host, http_port)
        except OSError as error:
            why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
            raise ServerError(f"{host}:{http_port} (--http): can't listen there ({why})") from None
        proxy = self.settings.trusted_proxy
        most = self.settings.max_http, self.settings.max_peer_streams
        listener = Listener(listening, *most, exempt=str(proxy) if proxy is not None else None)
        # What HTTP gives can't be taken back from a connection that reads nothing; the kernel can.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(UNREAD_S * 1e3))
        self.http_port = listener.getsockname()[1]
        try:
            self.port = self._listen(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError:
            listener.close()
            raise ServerError(f"{host}:{port} (--port): can't listen there (address already in use?)") from None
        await self._grpc.start()
        self._tasks.append(asyncio.create_task(self._worker.run(), name="worker"))
        self._tasks.append(asyncio.create_task(self.cameras.keep_looking(), name="states"))
        self._tasks.append(asyncio.create_task(self._web.serve([listener]), name="web"))
        self._tasks.append(asyncio.create_task(self._audit.keep_telling(), name="audit"))
        if self._certificates is not None:
            self._tasks.append(asyncio.create_task(self._certificates.keep_looking(), name="certificates"))
        if self.settings.save:
            saving = save_pictures(self.cameras, self.settings.save, self._audit)
            self._tasks.append(asyncio.create_task(saving, name="save"))
        for service in ("", "veilcam.v1.Cameras", "veilcam.v1.Viewers"):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._ready = True

    @property
    def _secure(self) -> bool:
        return self._certificates is not None

    async def failed(self) -> None:
        """Wait until a part ends that should not have; raises what ended it."""
        watched = [task for task in self._tasks if task.get_name() != "save"]
        done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self, grace: float = GRACE_S) -> None:
        """Refuse what is new, let viewers and cameras go, and end; at most ``grace`` seconds and a little for all."""
        deadline = time.monotonic() + grace

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        self._ready = False
        await self._health.enter_graceful_shutdown()
        self._web.should_exit = True
        self.cameras.close()
        await self._grpc.stop(grace)
        web = next(task for task in self._tasks if task.get_name() == "web")
        await asyncio.wait([web], timeout=left())
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=left())
        self._audit.close()
        # Beside each other: an engine that hangs doesn't take the time that what was recorded needs to reach the disk.
        last = max(_LAST_S, left())
        parts: list[Callable[[], None]] = [part.close for part in (self._worker, self._recorder) if part is not None]
        if self._hook is not None:  # it still has to say what it hasn't told
            parts.append(partial(self._hook.close, min(ON_CLOSE_S, last / 2)))
        closing = [asyncio.create_task(asyncio.to_thread(close)) for close in parts]
        await asyncio.wait(closing, timeout=last)

    def apply(self, after: Settings, catalogue: Catalogue | None = None) -> list[str]:
        """Take up changed settings; cameras and viewers whom they don't concern don't notice.

        Args:
            after: what is to hold now.
            catalogue: opened anew as they say, if that changed.

        Returns:
            Names of the settings that changed and wait for the next start.
        """
        later = [name for name in changed(self.settings, after) if name not in AT_ONCE]
        self.settings = after.model_copy(update={name: getattr(self.settings, name) for name in later})
        vars(self._policy).update(vars(_policy(self.settings)))
        if self._store is not None:
            self._store.retention = _retention(self.settings)
        if catalogue is not None:
            self._catalogue.reconstructors = catalogue.reconstructors
        for camera in self.cameras.all():
            stream = camera.stream or (camera.newest.stream if camera.newest is not None else None)
            if stream is not None:
                try:
                    camera.offer(self._worker.admit(stream.hello))
                except Refusal as refusal:
                    camera.offer(())
                    stream.end(refusal)
        self.cameras.tell()
        return later

    def _listen(self, address: str) -> int:
        if self._certificates is None:
            return self._grpc.add_insecure_port(address)
        return self._grpc.add_secure_port(address, self._certificates.for_grpc())

    def _grpc_server(self) -> aio.Server:
        options = [
            ("grpc.max_receive_message_length", self.settings.max_payload + _MESSAGE_OVERHEAD),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ("grpc.max_connection_idle_ms", self.settings.idle_seconds * 1000),
            ("grpc.server_handshake_timeout_ms", round(self.settings.request_seconds * 1e3)),
            ("grpc.max_allowed_incoming_connections", self.settings.max_connections),
            ("grpc.max_concurrent_streams", self.settings.max_connections),
            ("grpc.so_reuseport", 0),
        ]
        guards = [GrpcGuard(self._door, self.settings.max_peer_streams, FIRST_MESSAGE_S)]
        server = aio.server(options=options, interceptors=guards, maximum_concurrent_rpcs=self.settings.max_connections)
        add_CamerasServicer_to_server(
            CamerasService(
                *(self.cameras, self._catalogue, self._worker, self._policy, self._recorder),
                certified=self.settings.client_ca is not None,
            ),
            server,
        )
        add_ViewersServicer_to_server(ViewersService(self.cameras, self._policy, self._audit), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
        names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        return server


def _listening(host: str, port: int) -> socket.socket:
    """At all addresses, IPv4's are among IPv6's, as for gRPC."""
    if ":" not in host:
        return socket.create_server((host, port))
    both = is_everywhere(host) and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=both)


def _policy(settings: Settings) -> Policy:
    return Policy(
        cameras=settings.max_cameras,
        pixels=settings.max_pixels,
        payload_bytes=settings.max_payload,
        batch=settings.batch,
        allow_plain=settings.allow_plain,
        frame_rate=settings.max_frame_rate,
        byte_rate=settings.max_byte_rate,
        silent_s=settings.silent_seconds,
    )


def _retention(settings: Settings) -> Retention:
    return Retention(settings.record_hours, settings.record_megabytes, settings.record_free)


def _store(settings: Settings) -> Store | None:
    if settings.record is None:
        return None
    _writable(settings.record, "--record")
    return Store(settings.record, _retention(settings))


def _writable(folder: Path, option: str) -> None:
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ServerError(f"{option} {folder}: can't be written ({error.strerror})") from None


class _Web(uvicorn.Server):
    """Uvicorn without its signal handlers: the command has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
