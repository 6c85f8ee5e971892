"""DIR/CAMERA, the folder of one spool: whose it is, the number of the last run, and what is deleted and flushed."""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

from protos.segment import SUFFIX, index_of

log = logging.getLogger("veilcam.encode")

OWN = "give it to the user that runs veilcam-encode, with chown"
"""What to do about a file that is another user's."""
_LOCK_WAIT_S = 1.0
"""Another camera here looks for a moment whether this one runs."""


class Folder:
    """The folder of one camera's spool, which no other process has until this one closes it.

    Args:
        spools: of all cameras here; made, for its owner alone, if it isn't there.
        camera: its name.

    Raises:
        BlockingIOError: another process has it.
        OSError: it can't be made or used.

    Attributes:
        path: where it is.
    """

    def __init__(self, spools: Path, camera: str) -> None:
        self.path = spools / camera
        self._undeleted: set[Path] = set()
        spools.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        _tell_if_loose(spools, self.path)
        self._locked = _lock(self.path)

    def close(self) -> None:
        """Leave it to another process."""
        os.close(self._locked)

    def last_epoch(self) -> int:
        """The number of the run before, 0 for none."""
        file = self.path / "epoch"
        try:
            return int(file.read_text())
        except FileNotFoundError:
            pass
        except ValueError:
            log.warning("spool: %s holds no number; the clock alone numbers this run", file)
        return 0

    def write_epoch(self, epoch: int) -> None:
        """Keep the number of a run, also over a loss of power."""
        file = self.path / "epoch"
        written = file.with_suffix(".new")
        with os.fdopen(os.open(written, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as opened:
            opened.write(f"{epoch}\n")
            opened.flush()
            os.fsync(opened.fileno())
        written.replace(file)
        _fsync(self.path)

    def delete(self, part: Path) -> bool:
        """Whether a segment and its index could be deleted; if not, that is told once, and the caller tries again."""
        try:
            index_of(part).unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        except OSError as error:
            if not self._undeleted:
                told = (
                    "spool: %s can't be deleted (%s); it is tried again, and after a restart its frames are sent again"
                )
                log.error(told, error.filename, cause(error))
            self._undeleted.add(part)
            return False
        self._undeleted.discard(part)
        return True

    def flush(self, part: Path) -> None:
        """Bring a segment, and that it is here, onto the disk itself.

        Raises:
            OSError: the disk didn't take it.
        """
        for path in (part, self.path):
            with contextlib.suppress(FileNotFoundError):  # through meanwhile
                _fsync(path)

    def tell_others(self) -> None:
        """One line for each camera whose frames wait beside these and which doesn't run: this one's former name?"""
        with contextlib.suppress(PermissionError):  # other users' spools, in a folder that isn't to be looked into
            for other in sorted(self.path.parent.iterdir()):
                if other != self.path and (size := _unsent(other)):
                    log.warning(
                        "spool %s: %.1f MB of camera %s wait there, and only veilcam-encode --name %s sends them: it "
                        "doesn't run now",
                        *(other, size / 1e6, other.name, other.name),
                    )


def cause(error: OSError) -> str:
    """For people: what the system says, and what to do if the file is another user's."""
    denied = error.errno in (errno.EACCES, errno.EPERM)
    return f"{error.strerror}; {OWN}" if denied else error.strerror or str(error)


def _tell_if_loose(spools: Path, camera: Path) -> None:
    """One line each if others may put something else in the place of a camera's spool, or look into it."""
    mode = stat.S_IMODE(spools.stat().st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        log.warning(
            "spool %s: others may write into it (mode %o); if they shouldn't: chmod 700 %s", spools, mode, spools
        )
    if (mode := stat.S_IMODE(camera.stat().st_mode)) & 0o077:
        log.warning(
            "spool %s: others may look into it (mode %o); if they shouldn't: chmod 700 %s", camera, mode, camera
        )


def _lock(folder: Path, wait_s: float = _LOCK_WAIT_S) -> int:
    """A descriptor that holds a spool's lock until it is closed.

    Raises:
        BlockingIOError: another process has it, also after a while.
    """
    deadline = time.monotonic() + wait_s
    locked = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    while True:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(locked)
                raise
            time.sleep(_LOCK_WAIT_S / 20)
        else:
            return locked


def _unsent(folder: Path) -> int:
    """Bytes of parts in the spool of another camera; 0 while that runs, or if it isn't this user's."""
    try:
        if (folder / "lock").exists():
            os.close(_lock(folder, wait_s=0.0))
            return sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
    except OSError:
        pass  # it runs, or it is another user's, who is told
    return 0


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
