"""Small labelled sets that the tests draw, in the official files' form: bars of five widths, upright or lying."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def bars(count: int, side: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (N, side, side) and labels: width and direction, which stay when a picture is mirrored."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    upright, pitch = labels // 5, 0.3 + 0.2 * (labels % 5)
    rows, columns = np.mgrid[:side, :side]
    phase = draw.uniform(0, 2 * np.pi, count)
    wave = pitch[:, None, None] * np.where(upright[:, None, None], columns, rows)
    pictures = 128 + 60 * np.sin(wave + phase[:, None, None]) + draw.normal(0, 2, (count, side, side))
    return pictures.clip(0, 255).astype(np.uint8), labels


def write_cifar10(folder: Path, per_file: int = 40, test: int = 80) -> Path:
    """The official binaries: five files to learn from, one to test."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        pictures, labels = bars(test if number == 5 else per_file, 32, number)
        colours = np.repeat(pictures.reshape(len(pictures), 1, -1), 3, 1).reshape(len(pictures), -1)
        (folder / name).write_bytes(np.concatenate([labels[:, None], colours], 1).tobytes())
    return folder


def write_mnist(folder: Path, train: int = 5200, test: int = 50) -> Path:
    """The official idx files, gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 1), ("t10k", test, 2)):
        pictures, labels = bars(count, 28, seed)
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder
