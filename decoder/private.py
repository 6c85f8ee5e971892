"""Files and folders that their owner alone reads, whatever the umask: what cameras saw, and who may see it."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator
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
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(path)) from None
        tell_if_loose(path)


def check_folder(path: Path) -> Path:
    """Whether a folder is there, or could be made, and be written; nothing is made.

    Returns:
        It, or the one above it that is there.

    Raises:
        OSError: it isn't so.
    """
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file, not a folder", str(path))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    return there


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


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in the place of one that may be there, in one step: whoever reads it gets the old one or the new one.

    It has the owner, the group and the mode of the one before: a service that could read that can read this, also if
    root runs the command. A new one is for its owner alone.

    Raises:
        OSError: it can't be written, or can't be given to whom the one before belongs; then nothing has changed.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        before = None
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open_new(fresh) as file:
            if before is not None:
                made = os.fstat(file.fileno())
                if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
                    _give(file.fileno(), before)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _give(file: int, before: os.stat_result) -> None:
    try:
        os.fchown(file, before.st_uid, before.st_gid)
    except OSError as error:
        whose = f"it belongs to user {before.st_uid}, group {before.st_gid}: do this as root, or as them"
        raise OSError(error.errno, whose) from None


@contextlib.contextmanager
def changed_by_one(folder: Path) -> Iterator[None]:
    """Wait until no other process here changes files of a folder, and keep others from it meanwhile.

    Raises:
        OSError: it isn't there, or can't be looked into.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
