"""What a film leaves of a veil: readers look at pictures as they are shown, and in the film that ``export`` makes.

H.264 takes noise away, and a veil is a fine one. Each photograph is a scene of its own that moves by two pixels a
picture; what is read is the middle one, which the film has as a difference to others.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.fidelity import psnr
from benchmarks.quality import QualityError, rebuilt
from benchmarks.tables import table
from decoder.catalogue import Catalogue, Reconstructor
from decoder.model import RENDITIONS
from decoder.recordings.film import write_film
from decoder.recordings.playback import Shot
from encoder.sampling import Operator
from train.data.labelled import Labelled
from train.data.photographs import read_gray
from train.readers import Reader

PICTURES, STEP = 9, 2
"""Of a scene, and by how many pixels it moves between two of them."""
_INTERVAL_NS = 100_000_000


def measure(
    items: Sequence[Labelled],
    readers: Mapping[str, Reader],
    operator: Operator,
    ratio: float,
    catalogue: Catalogue,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Recognition in percent by rendition and reader, ``shown`` and in a ``film``, and PSNR in dB of both.

    Args:
        items: labelled photographs.
        readers: by name.
        progress: called after each photograph.

    Raises:
        QualityError: the catalogue has no reconstructor for a rendition.
    """
    chosen = {each: _chosen(catalogue, each, operator, ratio) for each in RENDITIONS}
    right = {each: {name: {"shown": 0, "film": 0} for name in readers} for each in chosen}
    fidelity = {each: {"shown": 0.0, "film": 0.0} for each in chosen}
    sizes = dict.fromkeys(chosen, 0)
    for item in items:
        original = read_gray(item.path)
        for rendition, reconstructor in chosen.items():
            scene = [_moved(original, number) for number in range(PICTURES)]
            pictures = [rebuilt(each, operator, ratio, reconstructor)[0] for each in scene]
            middle = PICTURES // 2
            filmed, size = _filmed(pictures, middle)
            sizes[rendition] += size
            for way, seen in (("shown", pictures[middle]), ("film", filmed)):
                fidelity[rendition][way] += psnr(seen, scene[middle])
                given = torch.from_numpy(seen.astype(np.float32))[None, None] / 255
                for name, reader in readers.items():
                    with torch.no_grad():
                        right[rendition][name][way] += int(reader(given).argmax(1)) == item.label
        progress()
    count = len(items)
    return {
        "pictures": count,
        "ratio": ratio,
        "names": {each: reconstructor.name for each, reconstructor in chosen.items()},
        "recognition": {
            each: {name: {way: round(100 * n / count, 1) for way, n in ways.items()} for name, ways in read.items()}
            for each, read in right.items()
        },
        "psnr": {
            each: {way: round(total / count, 2) for way, total in ways.items()} for each, ways in fidelity.items()
        },
        "bytes_a_picture": {each: round(size / count / PICTURES) for each, size in sizes.items()},
    }


def printed(result: dict[str, Any]) -> Iterator[Table]:
    """A row for each rendition and reader."""
    rows = (
        (result["names"][each], name, f"{ways['shown']:.1f}", f"{ways['film']:.1f}")
        for each, read in result["recognition"].items()
        for name, ways in read.items()
    )
    title = f"{result['pictures']} photographs: read of what is shown, and in a film, %"
    yield table(title, ("reconstructor", "reader", "shown", "film"), rows, result["machine"], words=2)


def _chosen(catalogue: Catalogue, rendition: str, operator: Operator, ratio: float) -> Reconstructor:
    chosen = catalogue.choose(operator.id, rendition, operator.rows_for(ratio))
    if chosen is None:
        raise QualityError(f"no {rendition} reconstructor for operator {operator.id}")
    return chosen


def _moved(picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    wide = picture.shape[1] - STEP * (PICTURES - 1)
    return np.ascontiguousarray(picture[:, STEP * number : STEP * number + wide])


def _filmed(pictures: Sequence[NDArray[np.uint8]], place: int) -> tuple[NDArray[np.uint8], int]:
    """One picture of those, as it is in a film of all of them, and the film's bytes."""
    shots = [Shot(number * _INTERVAL_NS, picture) for number, picture in enumerate(pictures)]
    with tempfile.TemporaryDirectory() as folder:
        film = write_film(shots, Path(folder) / "film.mp4").path
        with av.open(str(film)) as container:
            frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        height, width = pictures[place].shape
        return np.asarray(frames[place][:height, :width], np.uint8), film.stat().st_size
