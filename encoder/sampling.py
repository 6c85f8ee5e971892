"""The sampling operator Φ: its file, sampling (paper, S) and the quantiser.

The one definition that the camera, the trainer and the exporter share. A picture is cut into B×B blocks; with
x a block's B² pixels minus mid-grey, read row by row, the measurements are ``y = Φ x`` and what travels is
``q = round(y / step)``, one step a row. ``finest_steps`` are just so wide that no 8-bit picture can leave int8. An
operator for pictures of one kind may have finer ones; then what goes further than any of those is clipped. Rows are
ordered by energy: any prefix of them is a sampling operator of a lower ratio.
"""

import hashlib
import io
import math
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos.rules import MAX_LEVEL

MID_GREY = 128.0
"""Subtracted from pixels before sampling, so that the first measurement fits the quantiser like the others."""

FORMAT_VERSION = 1
_FINEST = 128
"""Steps may be so many times finer than the finest that never clip: beyond that they are damaged, not fitted."""
_KEYS = {"format": 0, "block": 0, "phi": 2, "steps": 1}
"""Field → its number of dimensions."""
_MOST_BYTES = 256 << 20
"""Of a field; Φ of blocks of 64 has 64 MiB at most."""
# numpy's own reader takes much more than is ever written here, believes any shape, and fails in many ways.
_ARRAY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>][if][248])', 'fortran_order': False, 'shape': \(([\d, ]{0,40})\), \} *\n",
    re.DOTALL,
)


class OperatorError(ValueError):
    """An operator file that can't be used; the message names the file, the field and what was expected."""


@dataclass(frozen=True, eq=False)
class Operator:
    """Φ and its quantiser.

    Attributes:
        phi: float32 (m, B²), rows of unit length, most energetic first.
        steps: float32 (m,), quantiser step of each row in units of the 0..255 pixel scale.
        block: B, the block side in pixels.
    """

    phi: NDArray[np.float32]
    steps: NDArray[np.float32]
    block: int

    def __post_init__(self) -> None:
        if self.phi.ndim != 2 or self.steps.shape != self.phi.shape[:1] or not self.phi.size:
            raise OperatorError(f"phi {self.phi.shape} and steps {self.steps.shape}: expected (m, B²) and (m,)")
        if self.block < 2 or self.phi.shape[1] != self.block**2 or self.phi.shape[0] > self.block**2:
            raise OperatorError(f"phi {self.phi.shape} doesn't fit block {self.block}: expected (at most B², B²)")
        if not (np.isfinite(self.phi).all() and np.isfinite(self.steps).all() and (self.steps > 0).all()):
            raise OperatorError("phi and steps: expected finite numbers, and steps above 0")
        if (self.steps * _FINEST < finest_steps(self.phi)).any():
            raise OperatorError(f"steps: too fine, an 8-bit picture could go {_FINEST} times beyond ±{MAX_LEVEL}")

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of SHA-256 over block, Φ and steps: equal content, equal id, on any machine."""
        digest = hashlib.sha256(f"veilcam operator {FORMAT_VERSION} {self.block} {len(self.phi)}".encode())
        digest.update(np.ascontiguousarray(self.phi, "<f4").tobytes())
        digest.update(np.ascontiguousarray(self.steps, "<f4").tobytes())
        return digest.hexdigest()[:16]

    @property
    def rows(self) -> int:
        """m, the number of rows in the file: the most measurements a block can have."""
        return len(self.phi)

    def rows_for(self, ratio: float) -> int:
        """Rows at a sampling ratio: the whole number nearest to r·B², 26 of 256 at r = 0.1.

        The paper floors it: an operator that was made so (204 rows of 1,024 for r = 0.2) gives all its rows.

        Raises:
            OperatorError: the ratio gives no row, or more than the operator has.
        """
        rows = nearest_rows(ratio, self.block)
        if rows == self.rows + 1 and self.rows <= ratio * self.block**2 < rows:
            rows = self.rows
        if not 1 <= rows <= self.rows:
            low, high = 1 / self.block**2, self.rows / self.block**2
            raise OperatorError(f"ratio {ratio:g}: operator {self.id} samples at ratios {low:.4f} to {high:.4f}")
        return rows

    @cached_property
    def _levels_per_pixel(self) -> NDArray[np.float32]:
        return np.ascontiguousarray((self.phi / self.steps[:, None]).T)

    def sample(self, plane: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
        """Measurements in quantiser steps, not yet rounded.

        Args:
            plane: uint8 (H, W); edges are repeated up to whole blocks.
            rows: how many of Φ's rows to use, from the first.

        Returns:
            float32 (blocks, rows), blocks row by row.
        """
        side = self.block
        padded = pad_to_blocks(plane, side)
        height, width = padded.shape
        blocks = padded.reshape(height // side, side, width // side, side).transpose(0, 2, 1, 3)
        pixels = blocks.reshape(-1, side * side).astype(np.float32)
        pixels -= np.float32(MID_GREY)
        return pixels @ self._levels_per_pixel[:, :rows]

    def quantise(self, levels: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.int8]:
        """Round measurements for the wire: int8 (rows, H/B, W/B) from float32 (blocks, rows)."""
        quantised = np.rint(levels.T)
        np.clip(quantised, -MAX_LEVEL, MAX_LEVEL, out=quantised)
        return quantised.astype(np.int8).reshape(-1, *grid)

    def save(self, path: Path) -> None:
        """Write the operator file, the same bytes for the same content."""
        arrays = {
            "format": np.asarray(FORMAT_VERSION, np.int64),
            "block": np.asarray(self.block, np.int64),
            "phi": np.ascontiguousarray(self.phi, "<f4"),
            "steps": np.ascontiguousarray(self.steps, "<f4"),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Operator":
        """Read an operator file.

        Raises:
            OperatorError: no such file, not an operator file, or content that can't be used.
        """
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                fields = {name: _field(archive, name) for name in _KEYS}
        except FileNotFoundError:
            raise OperatorError(f"{path}: no such operator file") from None
        # NotImplementedError: zipfile's word for what it can't read.
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise OperatorError(f"{path}: not an operator file ({error})") from None
        for name, dimensions in _KEYS.items():
            if fields[name].ndim != dimensions or not np.isfinite(fields[name]).all():
                shape = fields[name].shape
                raise OperatorError(f"{path}: field {name} {shape}: expected {dimensions} dimensions of finite numbers")
        if int(fields["format"]) != FORMAT_VERSION:
            raise OperatorError(f"{path}: format {int(fields['format'])}, this program reads {FORMAT_VERSION}")
        try:
            with np.errstate(over="ignore"):  # what is infinite then is refused
                phi, steps = fields["phi"].astype(np.float32), fields["steps"].astype(np.float32)
                return cls(phi, steps, int(fields["block"]))
        except OperatorError as error:
            raise OperatorError(f"{path}: {error}") from None


def _field(archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    """An array of an operator file, at most as large as the bytes that are there.

    Raises:
        ValueError: the field is missing, or isn't laid out as ``Operator.save`` does it.
    """
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise ValueError(f"field {name} is missing")
    told = archive.getinfo(member)
    stored = told.compress_type == zipfile.ZIP_STORED and told.compress_size == told.file_size
    if not stored or told.flag_bits & 1 or told.file_size > _MOST_BYTES:
        raise ValueError(f"field {name}: expected at most {_MOST_BYTES} bytes, neither compressed nor encrypted")
    data = archive.read(member)
    head = _ARRAY.match(data)
    if head is None:
        raise ValueError(f"field {name}: expected an array of numbers in NumPy's format 1.0")
    kind, shape = np.dtype(head[1].decode()), tuple(int(side) for side in head[2].replace(b",", b" ").split())
    if len(data) - head.end() != math.prod(shape) * kind.itemsize:
        raise ValueError(f"field {name}: {len(data) - head.end()} bytes, its shape {shape} says otherwise")
    return np.frombuffer(data, kind, offset=head.end()).reshape(shape)


def nearest_rows(ratio: float, block: int) -> int:
    """The whole number of rows nearest to r·B²; 0 for what is no ratio."""
    return round(ratio * block**2) if 0 < ratio <= 1 else 0


def finest_steps(phi: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest step of each row with which no 8-bit picture saturates: float32 (m,)."""
    return np.asarray(MID_GREY * np.abs(phi).sum(1) / MAX_LEVEL, np.float32)


def pad_to_blocks(plane: NDArray[np.uint8], block: int) -> NDArray[np.uint8]:
    """Repeat the last row and column until both sides are multiples of ``block``; the decoder crops them again."""
    height, width = plane.shape
    pad = (-height % block, -width % block)
    return np.pad(plane, ((0, pad[0]), (0, pad[1])), mode="edge") if any(pad) else plane
