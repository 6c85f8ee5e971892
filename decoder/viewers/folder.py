"""Pictures into a folder: ``DIR/CAMERA/CAPTURETIME-SEQUENCE.png``, the newest when the disk is slow."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2

from decoder.access.audit import HERE, Audit, os_user
from decoder.cameras import Cameras
from decoder.pictures import Picture, Relay
from decoder.private import open_new

log = logging.getLogger("veilcam.decode")


async def save_pictures(cameras: Cameras, folder: Path, audit: Audit) -> None:
    """Save what every camera shows, until cancelled. A picture that can't be written ends the saving, loudly.

    One thread writes: a disk that hangs holds up nothing but this.
    """
    seen: dict[Relay, int] = {}
    saved = missed = 0
    pool, who = ThreadPoolExecutor(1, thread_name_prefix="save"), os_user()
    try:
        while True:
            changed = cameras.changed()
            shown = {each.relays[each.rendition]: each for each in cameras.all() if each.rendition}
            for relay in shown.keys() - seen.keys():
                seen[relay] = relay.serial
                relay.enter()
            for relay in seen.keys() - shown.keys():
                del seen[relay]
                relay.leave()
            for relay, camera in shown.items():
                if relay.latest is None or relay.serial == seen[relay]:
                    continue
                if camera.rendition is None or camera.relays[camera.rendition] is not relay:
                    continue  # while others were written, it was decided that this is no longer given
                missed += relay.serial - seen[relay] - 1
                seen[relay] = relay.serial
                audit.gave("--save", who, HERE, camera.name, relay.latest.rendition, relay.latest.capture_time_ns)
                await asyncio.get_running_loop().run_in_executor(pool, _write, relay.latest, folder / camera.name)
                saved += 1
            await changed.wait()
    except (OSError, ValueError, cv2.error) as error:
        log.error("--save: %s; no more pictures are saved", error)
    finally:
        pool.shutdown(wait=False)
        for relay in seen:
            relay.leave()
        log.info("--save: %d pictures saved, %d passed by while the disk was busy", saved, missed)


def _write(picture: Picture, folder: Path) -> None:
    """Whole or not at all: the process may end in the middle of it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    encoded, data = cv2.imencode(".png", picture.pixels)
    if not encoded:
        raise ValueError(f"OpenCV can't encode a picture of {picture.pixels.shape} as PNG")
    path = folder / f"{picture.capture_time_ns}-{picture.sequence:08d}.png"
    partial = path.with_name(f"{path.name}.partial")
    with open_new(partial) as file:
        file.write(data.tobytes())
    partial.replace(path)
