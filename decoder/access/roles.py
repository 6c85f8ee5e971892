"""Who may ask for what: the one table, and who is asking."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from decoder.admission import Policy
from decoder.model import RENDITIONS


class Role(StrEnum):
    """What someone is to this server."""

    NOBODY = "nobody"
    """Shows nothing that is known here."""
    CAMERA = "camera"
    """Publishes under the name in its certificate."""
    VIEWER = "viewer"
    """Sees veiled pictures of the cameras it is given."""
    TRUSTED = "trusted"
    """Sees plain ones too, where the server allows any."""
    ADMIN = "admin"
    """Sees all cameras, and how the server fares."""


ANYONE = frozenset(Role)
WATCHING = frozenset({Role.VIEWER, Role.TRUSTED, Role.ADMIN})
PLAIN = frozenset({Role.TRUSTED, Role.ADMIN})
"""To whom plain pictures may go."""
ADMINS = frozenset({Role.ADMIN})
GIVEN = ("viewer", "trusted", "admin")
"""Roles that people and programs may have. Cameras have certificates."""

TABLE: dict[str, frozenset[Role]] = {
    "/": WATCHING,
    "/login": ANYONE,
    "/logout": ANYONE,
    "/cameras.json": WATCHING,
    "/reconstructors.json": WATCHING,
    "/pictures": WATCHING,
    "/cameras/{name}.jpg": WATCHING,
    "/cameras/{name}.mjpeg": WATCHING,
    "/recordings/{name}.json": WATCHING,
    "/recordings/{name}.jpg": WATCHING,
    "/metrics": ADMINS,
    "/healthz": ANYONE,
    "/readyz": ANYONE,
    "/veilcam.v1.Cameras/Publish": frozenset({Role.CAMERA}),
    "/veilcam.v1.Cameras/Backlog": frozenset({Role.CAMERA}),
    "/veilcam.v1.Viewers/Watch": WATCHING,
    "/veilcam.v1.Viewers/Cameras": WATCHING,
    "/grpc.health.v1.Health/Check": ANYONE,
    "/grpc.health.v1.Health/List": ANYONE,
    "/grpc.health.v1.Health/Watch": ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": WATCHING,
}
"""Page's route or gRPC's method → who may. What isn't here no one may."""


@dataclass(frozen=True)
class Who:
    """Someone who asks.

    Attributes:
        name: of a user or a camera.
        role: theirs.
        cameras: that they may see; all, if None.
        holds: whether all that is still so. Whoever is given pictures for long is asked again before each.
    """

    name: str
    role: Role
    cameras: frozenset[str] | None = frozenset()
    holds: Callable[[], bool] = lambda: True

    def may(self, endpoint: str | None) -> bool:
        """Whether the table has them beside it."""
        return self.role in TABLE.get(endpoint or "", ())

    def sees(self, camera: str) -> bool:
        """Whether they were given this camera."""
        return self.cameras is None or camera in self.cameras

    def renditions(self, policy: Policy) -> tuple[str, ...]:
        """What they are given of what the server gives."""
        return policy.renditions if self.role in PLAIN else RENDITIONS[:1]


NOBODY = Who("nobody", Role.NOBODY)
EVERYONE = Who("anyone", Role.ADMIN, None)
"""Who asks a server without users: on loopback, or since --insecure was said."""
WHO: ContextVar[Who] = ContextVar("who", default=NOBODY)
"""Who asks for what is being answered. The guards say it; what they haven't seen, such as another thread, is nobody."""
