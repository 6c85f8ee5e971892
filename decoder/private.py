"""Files and folders that their owner alone reads, whatever the umask: what cameras saw."""

import logging
import os
import stat
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("veilcam.decode")


def make_folder(path: Path) -> None:
    """Make a folder for its owner alone. One that is there already and that others may enter is told in the log.

    Raises:
        OSError: it can't be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        tell_if_loose(path)
        if not path.is_dir():
            raise


def tell_if_loose(path: Path) -> None:
    """Say in the log if others may look into a folder."""
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        log.warning("%s: others may look into it (mode %o); if they shouldn't: chmod 700 %s", path, mode, path)


def open_new(path: Path) -> BinaryIO:
    """A file to write, for its owner alone, in place of one that is there.

    Raises:
        OSError: it can't be made.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")
