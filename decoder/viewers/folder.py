"""Pictures into a folder: ``DIR/CAMERA/CAPTURETIME-SEQUENCE.png``, the newest when the disk is slow."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2

from decoder.cameras import Cameras
from decoder.pictures import Picture

log = logging.getLogger("veilcam.decode")


async def save_pictures(cameras: Cameras, folder: Path) -> None:
    """Save what every camera shows, until cancelled. A picture that can't be written ends the saving, loudly.

    One thread writes: a disk that hangs holds up nothing but this.
    """
    seen: dict[str, int] = {}
    saved = missed = 0
    with ThreadPoolExecutor(1, thread_name_prefix="save") as pool:
        try:
            while True:
                changed = asyncio.ensure_future(cameras.changed())
                for camera in cameras.all():
                    relay = camera.relays[camera.rendition]
                    if relay.latest is None or relay.serial == seen.get(camera.name):
                        continue
                    missed += relay.serial - seen.get(camera.name, relay.serial - 1) - 1
                    seen[camera.name] = relay.serial
                    await asyncio.get_running_loop().run_in_executor(pool, _write, relay.latest, folder / camera.name)
                    saved += 1
                seen = {camera.name: seen[camera.name] for camera in cameras.all() if camera.name in seen}
                await changed
        except (OSError, ValueError, cv2.error) as error:
            log.error("--save: %s; no more pictures are saved", error)
        finally:
            log.info("--save: %d pictures saved, %d passed by while the disk was busy", saved, missed)


def _write(picture: Picture, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(".png", picture.pixels)
    if not encoded:
        raise ValueError(f"OpenCV can't encode a picture of {picture.pixels.shape} as PNG")
    (folder / f"{picture.capture_time_ns}-{picture.sequence:08d}.png").write_bytes(data.tobytes())
