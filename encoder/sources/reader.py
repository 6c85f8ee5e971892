"""A live source in a process of its own: what hangs in a driver or in FFmpeg is freed by ending the process.

A thread that hangs there can't be ended, keeps its camera and its memory, and may abort the whole program when that
ends. The process is told its source on standard input, a line of JSON, and ends when that is closed: no reader outlives
its encoder, however that ended. Exit code 1 if it broke down, with a traceback. On standard output it writes

    head   u8 what │ u32 height or length │ u32 width │ i64 captured, ns since 1970 │ f64 milliseconds │ u8 colour
    body   for a frame H·W bytes of luma, else that many bytes of UTF-8
"""

import json
import os
import struct
import sys
import threading
import traceback
from typing import BinaryIO

from encoder.sources import Source, SourceAwayError, SourceError, open_source

HEAD = struct.Struct("<BIIqdB")
OPENED, FRAME, AWAY, UNUSABLE = range(4)
"""What a message is: the source is open (its name and rate, as JSON), a frame, or why there is none."""


def main() -> None:
    """Read the source that standard input names, until one side ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints isn't a message
    code = 0
    try:
        spec = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_encoder, daemon=True).start()
        source = open_source(spec)
        _say(out, OPENED, json.dumps([source.name, source.frame_rate]))
        _frames(out, source)
    except BrokenPipeError:
        pass
    except SourceError as error:
        _say(out, AWAY if isinstance(error, SourceAwayError) else UNUSABLE, str(error))
    except Exception:  # noqa: BLE001 - nothing else would tell of it: the process ends here
        traceback.print_exc()
        code = 1
    os._exit(code)  # closing a source whose driver hangs would hang as well; the system frees it


def _frames(out: BinaryIO, source: Source) -> None:
    for frame in source.frames():
        height, width = frame.luma.shape
        _write(out, HEAD.pack(FRAME, height, width, frame.capture_time_ns, frame.capture_ms, frame.colour))
        _write(out, frame.luma.tobytes())


def _say(out: BinaryIO, what: int, text: str) -> None:
    told = text.encode(errors="replace")
    _write(out, HEAD.pack(what, len(told), 0, 0, 0.0, 0) + told)


def _write(out: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[out.write(rest) :]


def _end_with_encoder() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
