"""CIFAR-10 and MNIST: read in each of their forms, fetched, and walked through."""

import gzip
import hashlib
import http.server
import logging
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.train.drawn import bars, write_cifar10, write_mnist
from train.data import cifar10, files, mnist
from train.data.files import DataError
from train.data.small import Batches, Pictures, cropped, moved, open_set, padded


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("data") / "cifar10")


def test_official_binaries_become_gray_as_pillow_makes_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
    record = np.concatenate([np.arange(4, dtype=np.uint8)[:, None], colours.reshape(4, -1)], 1)
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        (tmp_path / name).write_bytes(record.tobytes())
    (train, labels), (test, _) = cifar10.read(tmp_path)
    assert train.shape == (20, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3] * 5
    for gray, picture in zip(test, colours, strict=True):
        assert np.array_equal(gray, np.asarray(Image.fromarray(picture.transpose(1, 2, 0)).convert("L")))


def test_the_archive_and_its_folder_are_read_alike(binaries: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(binaries, "cifar-10-batches-bin")
    for (x, y), (same_x, same_y) in zip(cifar10.read(binaries), cifar10.read(tmp_path), strict=True):
        assert np.array_equal(x, same_x)
        assert np.array_equal(y, same_y)


def test_mosaics_are_read_row_by_row(tmp_path: Path) -> None:
    pictures, labels = bars(5000, 32, 0)
    mosaic = pictures.reshape(100, 50, 32, 32).transpose(0, 2, 1, 3).reshape(3200, 1600)
    for split in ("train", "test"):
        Image.fromarray(mosaic).save(tmp_path / f"{split}_00.webp", lossless=True)
        np.save(tmp_path / f"{split}_labels.npy", labels)
    (x, y), _ = cifar10.read(tmp_path)
    assert np.array_equal(x, pictures)
    assert np.array_equal(y, labels)


def test_mnist_learns_from_the_last_55000(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_mnist(tmp_path / "mnist")
    (x, y), _ = mnist.read(folder)
    with caplog.at_level(logging.INFO):
        opened = open_set("mnist", [tmp_path], tmp_path)
    assert len(opened.train) == 200
    assert np.array_equal(opened.train.x[:, 0].numpy(), x[5000:])
    assert opened.train.y.tolist() == y[5000:].tolist()
    assert "all but the first 5,000: the usual 55,000" in caplog.text
    for (name, kind), array in {("train", "images-idx3"): x, ("train", "labels-idx1"): y}.items():
        packed = folder / f"{name}-{kind}-ubyte.gz"
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
        assert np.array_equal(mnist.read(folder)[0][0], x), array.shape


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("data_batch_3.bin", None, r"data_batch_3\.bin: No such file"),
        ("data_batch_3.bin", b"", "expected records of 3073"),
        ("test_batch.bin", b"\0" * 3000, r"test_batch\.bin: 3000 bytes, expected records of 3073"),
        ("test_batch.bin", b"\x0b" + b"\0" * 3072, "labels 11 to 11, expected 0 to 9"),
    ],
)
def test_a_damaged_binary_is_named(
    binaries: Path, tmp_path: Path, file: str, content: bytes | None, problem: str
) -> None:
    for path in binaries.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        open_set("cifar10", [tmp_path], tmp_path)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_idx_file_or_told(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("idx")
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="ubyte: "):
        mnist.read(folder)


def test_a_folder_without_the_set_says_what_was_looked_for_and_the_next_way_is_tried(
    binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.INFO):
        assert len(open_set("cifar10", [tmp_path / "empty"], binaries.parent).test) == 80
    assert "no data set there, expected data_batch_1.bin" in caplog.text
    assert f"cifar10 from {binaries}" in caplog.text
    assert "the official set has 50000 and 10000" in caplog.text
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_set("cifar10", [tmp_path / "nowhere"], binaries.parent)
    monkeypatch.setattr(cifar10, "ADDRESS", "http://127.0.0.1:1/")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/: .*name a folder that has it"):
        open_set("cifar10", [tmp_path / "empty"], tmp_path)


@pytest.mark.parametrize("file", ["train.npz", "train_labels.npy", "train_00.webp", "cifar-10-binary.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08\x00 no gzip"])
def test_damaged_packed_files_are_named(file: str, content: bytes, tmp_path: Path) -> None:
    if file.startswith("train_0"):
        np.save(tmp_path / "train_labels.npy", np.zeros(5000, np.uint8))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=file):
        mnist.read(tmp_path) if file.endswith("npz") else cifar10.read(tmp_path)


def test_an_interrupted_fetch_of_mnist_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = write_mnist(tmp_path / "shop")
    cache = tmp_path / "cache" / "mnist"
    cache.mkdir(parents=True)
    sums = {name: hashlib.md5((shop / name).read_bytes(), usedforsecurity=False).hexdigest() for name in mnist.MD5}
    monkeypatch.setattr(mnist, "MD5", sums)
    monkeypatch.setattr(mnist, "ADDRESS", shop.as_uri() + "/")
    first, second, *_ = sums
    (cache / first).write_bytes((shop / first).read_bytes())
    (cache / f"{second}.partial").write_bytes((shop / second).read_bytes()[:10])
    assert len(open_set("mnist", [], tmp_path / "cache").train) == 200


CONTENT = np.random.default_rng(0).integers(0, 256, 700_000).astype(np.uint8).tobytes()
DIGEST = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Shop(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges, and breaks off once after some bytes where it is told to."""

    asked: ClassVar[list[str | None]] = []
    breaks_after = 0

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        Shop.asked.append(wanted)
        if self.path != "/whole":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = start + Shop.breaks_after if Shop.breaks_after else len(CONTENT)
        Shop.breaks_after = 0
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Shop.asked = []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_fetch_that_broke_off_goes_on(shop: str, tmp_path: Path) -> None:
    Shop.breaks_after = 300_000
    path = tmp_path / "new" / "file"
    with pytest.raises(DataError, match="run again to go on"):
        files.fetch(f"{shop}/whole", path, DIGEST)
    assert not path.exists()
    files.fetch(f"{shop}/whole", path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert Shop.asked == [None, "bytes=300000-"]


def test_a_fetch_of_other_content_leaves_nothing(shop: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"MD5 {DIGEST}, expected 0000"):
        files.fetch(f"{shop}/whole", tmp_path / "file", "0000")
    with pytest.raises(DataError, match=r"404 .*name a folder that has it \(--data\)"):
        files.fetch(f"{shop}/other", tmp_path / "file", DIGEST)
    assert not list(tmp_path.iterdir())


def test_what_came_wholly_but_was_not_yet_named_is_taken(shop: str, tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(CONTENT)
    files.fetch(f"{shop}/whole", tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_the_cache_is_filled_from_the_public_address(
    binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "original.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(binaries, "cifar-10-batches-bin")
    monkeypatch.setattr(cifar10, "ADDRESS", archive.as_uri())
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    fetched = open_set("cifar10", [], tmp_path / "cache")
    monkeypatch.setattr(cifar10, "ADDRESS", "http://127.0.0.1:1/")
    again = open_set("cifar10", [], tmp_path / "cache")
    assert torch.equal(fetched.train.x, again.train.x)
    assert len(fetched.train) == 200


def numbered(count: int) -> Pictures:
    return Pictures(torch.arange(count).reshape(-1, 1, 1, 1).to(torch.uint8), torch.arange(count))


def test_batches_walk_through_every_picture_once_a_pass() -> None:
    batches = Batches(numbered(20), 5, seed=1)
    first, second = ([batches.at(k)[1] for k in range(start, start + 4)] for start in (0, 4))
    assert sorted(torch.cat(first).tolist()) == list(range(20))
    assert sorted(torch.cat(second).tolist()) == list(range(20))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(Batches(numbered(20), 5, seed=1).at(6)[1], second[2])
    with pytest.raises(DataError, match="at least a batch of 50"):
        Batches(numbered(20), 50, seed=1)


def test_digits_are_padded_and_cropped_without_loss() -> None:
    digits = torch.rand(2, 1, 28, 28)
    whole = padded(digits)
    assert whole.shape == (2, 1, 32, 32)
    assert float(whole[..., :2, :].abs().max()) == 0
    assert torch.equal(cropped(whole, digits), digits)
    pictures = torch.rand(2, 1, 32, 32)
    assert torch.equal(padded(pictures), pictures)


def test_all_channels_of_a_picture_move_together() -> None:
    pictures = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    both = moved(torch.cat([pictures, 2 * pictures], 1), torch.Generator().manual_seed(0), mirror=True, by=2)
    assert torch.equal(both[:, 1:], 2 * both[:, :1])
    assert torch.equal(both[:, :1], moved(pictures, torch.Generator().manual_seed(0), mirror=True, by=2))
    assert not torch.equal(both[:, :1], pictures)


def test_moved_pictures_keep_their_content() -> None:
    picture = torch.zeros(64, 1, 32, 32)
    picture[..., 10:20, 10:22] = 1
    seen = moved(picture, torch.Generator().manual_seed(0), mirror=True)
    assert seen.sum((1, 2, 3)).tolist() == [120.0] * 64
    assert len({tuple(picture.nonzero()[0].tolist()) for picture in seen[:, 0]}) > 30
