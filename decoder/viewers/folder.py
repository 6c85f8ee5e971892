"""Pictures into a folder: ``DIR/CAMERA/SEQUENCE.png``, the newest when the disk is slow."""

import asyncio
import logging
from pathlib import Path

import cv2

from decoder.cameras import Cameras
from decoder.pictures import Picture, Relay

log = logging.getLogger("veilcam.decode")

_LOOK_FOR_CAMERAS_S = 0.2


async def save_pictures(cameras: Cameras, folder: Path, rendition: str) -> None:
    """Save what every camera shows, until cancelled. A picture that can't be written ends the saving, loudly."""
    tasks: dict[Relay, asyncio.Task[None]] = {}
    try:
        while True:
            for camera in cameras.all():
                relay = camera.relays[rendition]
                if relay not in tasks:
                    tasks[relay] = asyncio.create_task(_save_relay(relay, folder / camera.name))
            for task in [task for task in tasks.values() if task.done()]:
                task.result()
            await asyncio.sleep(_LOOK_FOR_CAMERAS_S)
    except OSError as error:
        log.error("--save: %s; no more pictures are saved", error)
    finally:
        for task in tasks.values():
            task.cancel()


async def _save_relay(relay: Relay, folder: Path) -> None:
    with relay.watch() as pictures:
        async for picture in pictures:
            await asyncio.to_thread(_write, picture, folder)


def _write(picture: Picture, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".png", picture.pixels)
    (folder / f"{picture.sequence:08d}.png").write_bytes(data.tobytes())
