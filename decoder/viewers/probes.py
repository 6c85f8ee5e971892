"""What monitors ask for: Prometheus' scrape, and whether the service is alive and ready."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from decoder.viewers.web import NEVER_STORED, text


def probes(registry: CollectorRegistry, ready: Callable[[], bool]) -> list[Route]:
    """Routes.

    Args:
        registry: what ``/metrics`` tells.
        ready: whether cameras and viewers are served, for ``/readyz``.
    """

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST, headers=NEVER_STORED)

    async def healthz(request: Request) -> Response:
        return text(200, "alive")

    async def readyz(request: Request) -> Response:
        return text(200, "ready") if ready() else text(503, "starting or stopping")

    return [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
