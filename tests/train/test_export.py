"""Finished models as the files that camera and server read."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from decoder.catalogue import load_catalogue
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera, watched
from tests.train.schedules import CPU
from train.data.small import Pictures, SmallSet
from train.evaluation.small import (
    mean_psnr,
)
from train.export import ExportError, export_runs
from train.models import model_of, pictures_of
from train.reproduce import Schedule


def test_pictures_streamed_through_the_exported_models_are_those_of_the_evaluator(
    done: tuple[Schedule, Path], data: SmallSet, tmp_path: Path, start_service: StartService
) -> None:
    """Train → export → encoder → gRPC → decoder, picture by picture: the mean PSNR to a twentieth of a dB."""
    _, runs = done
    names = ["csnet-r10", "adv-csnet-e-r10"]
    list(export_runs(names, "csnet-r10", runs, tmp_path / "op.npz", tmp_path / "models", data.train.x))
    operator = Operator.load(tmp_path / "op.npz")
    assert operator.rows == 102
    assert np.allclose(operator.phi @ operator.phi.T, np.eye(102), atol=1e-5)
    service = start_service(catalogue=load_catalogue([tmp_path / "models"], "onnxruntime", 1))
    packer = Packer(operator, 0.1)
    sent = data.test[:20]
    pictures = sent.x[:, 0].numpy()
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, pictures[0]))
    camera.answer()
    seen, viewer = [], watched(service.channel())
    for number, picture in enumerate(pictures, 1):
        camera.say(frame=packer.pack(frame_of(picture, time.time_ns()), number)[0])
        seen.append(torch.from_numpy(next(viewer)))
    camera.bye()
    measured = mean_psnr(pictures_of(model_of(runs / "adv-csnet-e-r10" / "final.pt", CPU), sent, CPU), sent)
    assert mean_psnr(Pictures(torch.stack(seen)[:, None], sent.y), sent) == pytest.approx(measured, abs=0.05)


def test_export_refuses_what_no_camera_samples(done: tuple[Schedule, Path], tmp_path: Path) -> None:
    _, runs = done
    with pytest.raises(ExportError, match="only models of CIFAR-10"):
        list(export_runs(["csnet-r10"], "csnet-r10", runs, tmp_path / "op.npz", tmp_path, None))
    assert not list(tmp_path.iterdir())


def test_an_operator_of_the_papers_rows_serves_its_ratio() -> None:
    """⌊0.2·32²⌋ = 204 where the nearest whole number is 205."""
    phi = np.linalg.qr(np.random.default_rng(0).normal(size=(1024, 204)))[0].T.astype(np.float32)
    operator = Operator(phi, np.ones(204, np.float32), 32)
    assert operator.rows_for(0.2) == 204
    with pytest.raises(Exception, match="samples at ratios"):
        operator.rows_for(0.2005)
