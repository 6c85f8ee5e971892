"""Where Φ starts: the eigenvectors of the covariance of blocks, and the order of its rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def blocks_of(pictures: Sequence[Tensor], block: int) -> Iterator[Tensor]:
    """Each picture's whole blocks, float64 (blocks, B²), pixels 0..255 minus their common mid-grey of 128."""
    for picture in pictures:
        height, width = (side // block * block for side in picture.shape)
        tiles = picture[:height, :width].reshape(height // block, block, width // block, block)
        yield tiles.transpose(1, 2).reshape(-1, block**2).double() - 128


def covariance(pictures: Sequence[Tensor], block: int) -> Tensor:
    """Second moment of blocks about mid-grey: float64 (B², B²)."""
    total, count = torch.zeros(block**2, block**2, dtype=torch.float64), 0
    for blocks in blocks_of(pictures, block):
        total += blocks.T @ blocks
        count += len(blocks)
    return total / count


def principal_rows(moment: Tensor, rows: int, known: Tensor | None = None) -> Tensor:
    """The ``rows`` unit directions of most energy, most energetic first: float32 (rows, B²).

    Args:
        moment: what ``covariance`` gives.
        known: (k, B²) rows measured already; the new ones are orthogonal to them.
    """
    keep = torch.eye(len(moment), dtype=torch.float64)
    if known is not None:
        basis = torch.linalg.qr(known.double().T).Q
        keep = keep - basis @ basis.T
    vectors: Tensor = torch.linalg.eigh(keep @ moment @ keep).eigenvectors
    return vectors.flip(1)[:, :rows].T.float().contiguous()


def energy(phi: Tensor, moment: Tensor) -> Tensor:
    """Mean square of each row's measurement: (m,)."""
    return torch.einsum("mi,ij,mj->m", phi.double(), moment, phi.double())
