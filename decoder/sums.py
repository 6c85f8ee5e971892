"""Whether a model's file is the one it should be: ``SHA256SUMS`` beside it, as ``sha256sum`` writes and checks it.

The shipped reconstructors have one (``make sums``). In any other folder it may stand; where it does, it holds for every
model there.
"""

import hashlib
import re
from pathlib import Path

SHIPPED = Path(__file__).parent / "reconstructors"
SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\]+)")


class SumsError(Exception):
    """A file that isn't what its folder's SHA256SUMS says, or a SHA256SUMS that isn't one; the message names it."""


def read_sums(folder: Path) -> dict[str, str] | None:
    """SHA-256 in hexadecimal digits by file name; None where no SHA256SUMS is.

    Raises:
        SumsError: it can't be read, isn't one, or is missing where it is shipped.
    """
    file = folder / SUMS
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        if SHIPPED in (folder.absolute(), folder.absolute().parent):
            raise SumsError(f"{file}: not there, and shipped reconstructors aren't used without") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise SumsError(f"{file}: can't be read ({error})") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            found = _LINE.fullmatch(line)
            if found is None:
                raise SumsError(f"{file}: line {number}: expected 64 hexadecimal digits, two spaces and a file name")
            sums[found[2]] = found[1]
    return sums


def check_sum(path: Path, content: bytes) -> None:
    """Refuse what isn't the file that its folder's SHA256SUMS names; without one, nothing is refused.

    Raises:
        SumsError: it says which sum was expected.
    """
    sums = read_sums(path.parent)
    if sums is None:
        return
    found = hashlib.sha256(content).hexdigest()
    if path.name not in sums:
        raise SumsError(
            f"{path}: not in the {SUMS} beside it (sha256sum *.onnx > {SUMS}, if you know where it is from)"
        )
    if sums[path.name] != found:
        raise SumsError(f"{path}: SHA-256 is {found}, the {SUMS} beside it says {sums[path.name]}")
