"""Quality of whole pictures through the real path: sampling, quantiser, payload, admission, engine."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.fidelity import psnr, ssim
from benchmarks.tables import table
from decoder.admission import checked_levels, unpack
from decoder.catalogue import Catalogue, Reconstructor, fit_rows
from encoder.packing import Packer
from encoder.sampling import Operator
from encoder.sources import Frame
from encoder.sources.capture import gray
from protos.v1 import veilcam_pb2 as pb

_SMALLEST_SIDE = 11
_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm"}


class QualityError(Exception):
    """Pictures or a model that can't be measured; the message names which."""


@dataclass(frozen=True)
class Quality:
    """One picture's figures: dB, SSIM, and bits of the payload per pixel of the picture."""

    picture: str
    psnr: float
    ssim: float
    bpp: float


def measure(folder: Path, operator: Operator, ratio: float, catalogue: Catalogue, rendition: str) -> dict[str, Any]:
    """Means of a folder's pictures and each picture's own, by the reconstructor that a server would take.

    Raises:
        QualityError: no such reconstructor, or no pictures.
    """
    chosen = catalogue.choose(operator.id, rendition, operator.rows_for(ratio))
    if chosen is None:
        raise QualityError(f"no {rendition} reconstructor for operator {operator.id}")
    pictures = [asdict(each) for each in _pictures(folder, operator, ratio, chosen)]
    means = {name: float(np.mean([each[name] for each in pictures])) for name in ("psnr", "ssim", "bpp")}
    return means | {
        "pictures": pictures,
        "folder": folder.name,
        "ratio": ratio,
        "rows": operator.rows_for(ratio),
        "rows_read": chosen.engine.rows,
        "operator": operator.id,
        "rendition": rendition,
        "name": chosen.name,
        "reconstructor": chosen.id,
        "engine": chosen.engine.name,
    }


def printed(result: dict[str, Any]) -> Iterator[Table | str]:
    """Each picture, and their means."""
    name, rows, read = (result[key] for key in ("name", "rows", "rows_read"))
    mean = result | {"picture": f"mean of {len(result['pictures'])}"}

    def cells(each: dict[str, Any]) -> tuple[str, ...]:
        return each["picture"], f"{each['psnr']:.2f}", f"{each['ssim']:.4f}", f"{each['bpp']:.3f}"

    title = f"{result['folder']}, r = {result['ratio']:g}, {name} ({result['reconstructor']})"
    columns = ("picture", "PSNR, dB", "SSIM", "bits per pixel")
    shown = table(title, columns, map(cells, result["pictures"]), result["machine"])
    shown.add_section()
    shown.add_row(*cells(mean))
    yield shown
    if read < rows:
        yield f"{name} reads {read} of the {rows} rows sent"


def _pictures(folder: Path, operator: Operator, ratio: float, reconstructor: Reconstructor) -> Iterator[Quality]:
    """Each picture of a folder, as a key frame of its own."""
    try:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    except OSError as error:
        raise QualityError(f"{folder}: can't be read ({error.strerror})") from None
    if not files:
        raise QualityError(f"{folder}: no such folder, or no pictures in it")
    for path in files:
        read = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if read is None or min(read.shape[:2]) < _SMALLEST_SIDE:
            raise QualityError(
                f"{path}: not a picture that can be read, or a side of less than {_SMALLEST_SIDE} pixels"
            )
        luma, _ = gray(np.asarray(read, np.uint8))
        seen, size = rebuilt(luma, operator, ratio, reconstructor)
        yield Quality(path.name, psnr(seen, luma), ssim(seen, luma), 8 * size / luma.size)


def rebuilt(
    luma: NDArray[np.uint8], operator: Operator, ratio: float, reconstructor: Reconstructor
) -> tuple[NDArray[np.uint8], int]:
    """A picture (H, W) the whole way, as a key frame of its own: what people see, and the bytes of its payload."""
    height, width = luma.shape
    message, _ = Packer(operator, ratio).pack(Frame(luma, 1, 0.0, False), 1)
    hello = pb.Hello(camera="quality", operator_id=operator.id, width=width, height=height)
    levels = checked_levels(unpack(message, hello, operator.block))
    seen = reconstructor.engine.reconstruct(fit_rows(levels, reconstructor.engine.rows)[None])[0, :height, :width]
    return seen, len(message.payload)
