"""Finished models as the files that camera and server read."""

import json
import math
import time
from collections.abc import Container
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from decoder.catalogue import load_catalogue
from decoder.engines.choice import agreeing
from decoder.model import read_model
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
from train.loops.schedule import fingerprints
from train.loops.small import LOOPS
from train.models import model_of, pictures_of
from train.reproduce import Schedule
from train.settings import ClassifierRun, RefinedRun, RetrainedRun, StepsRun

ROOT = Path(__file__).parent.parent.parent


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


def test_steps_that_a_decoder_takes_run_in_its_engine(
    done: tuple[Schedule, Path], data: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file refines, carries readers, their ways and the ways back; onnxruntime is held against torch."""
    _, runs = done
    (tmp_path / "csnet-r10").symlink_to(runs / "csnet-r10")
    trained = {
        "reader": ClassifierRun(network="resnet14", iterations=2, warm_up=1, batch=20),
        "mixed": ClassifierRun(network="convmixer", iterations=2, warm_up=1, batch=20),
        "refined": RefinedRun(extends="csnet-r10", iterations=2, batch=20),
        "guide": RetrainedRun(reader="reader", model="refined", iterations=2, batch=20),
        "steps": StepsRun(
            extends="csnet-r10",
            refined="refined",
            guide="guide",
            surrogates=("reader", "mixed"),
            through=("jpeg", "median"),
            steps=1,
            iterations=4,
            batch=20,
            psnr_lost=0.05,
        ),
    }
    for name, run in trained.items():
        LOOPS[type(run)](run, data, CPU, tmp_path / name, lambda row: None)
    (tmp_path / "steps" / "evaluation.json").write_text(json.dumps({"needs": fingerprints(tmp_path, ["steps"])}))
    names = ["csnet-r10", "steps"]
    list(export_runs(names, "csnet-r10", tmp_path, tmp_path / "op.npz", tmp_path / "models", data.train.x))
    operator = Operator.load(tmp_path / "op.npz")
    sent = data.test[:20]
    sampled = [operator.quantise(operator.sample(p, operator.rows), (1, 1)) for p in sent.x[:, 0].numpy()]
    session = onnxruntime.InferenceSession(tmp_path / "models" / "steps.onnx", providers=["CPUExecutionProvider"])
    shown = torch.from_numpy(session.run(None, {"measurements": np.stack(sampled)})[0])
    expected = pictures_of(model_of(tmp_path / "steps" / "final.pt", CPU), sent, CPU)
    assert mean_psnr(Pictures(shown.reshape(expected.x.shape), sent.y), sent) == pytest.approx(
        mean_psnr(expected, sent), abs=0.05
    )
    plain = pictures_of(model_of(tmp_path / "csnet-r10" / "final.pt", CPU), sent, CPU)
    assert mean_psnr(expected, sent) < mean_psnr(plain, sent) - 0.2
    graph = onnx.load(tmp_path / "models" / "steps.onnx").graph
    large = {tensor.name: tensor.data_type for tensor in graph.initializer if math.prod(tensor.dims) >= 1024}
    halved = {name for name, kind in large.items() if kind == onnx.TensorProto.FLOAT16}
    assert halved == {name for name in large if name.startswith(("reconstructor.after.guide", "reconstructor.after.r"))}
    assert len(halved) > 20, "two readers of fourteen layers and one more"
    exported = read_model(tmp_path / "models" / "steps.onnx")
    refused = [str(each) for each in agreeing({"float32": exported}, 1)[1].values() if "refused" in each.problem]
    assert not refused, "other engines go the same way, as near as its sample says"
    damaged = onnx.load(exported.path)
    for tensor in damaged.graph.initializer:
        if tensor.name in halved:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    monkeypatch.setattr("train.export._written", lambda module, rows: damaged)
    monkeypatch.setattr("train.export._halve", lambda graph, names: None)
    with pytest.raises(ExportError, match=r"steps end .* grey levels from where torch's do"):
        list(export_runs(["steps"], "csnet-r10", tmp_path, tmp_path / "op.npz", tmp_path / "other", data.train.x))
    assert not list((tmp_path / "other").iterdir())


def test_a_file_that_shows_another_picture_is_not_written(
    done: tuple[Schedule, Path], data: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(graph: onnx.GraphProto, names: Container[str]) -> None:
        bias = next(tensor for tensor in graph.initializer if tensor.name == "reconstructor.deep.0.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.5, bias.name))

    _, runs = done
    monkeypatch.setattr("train.export._halve", damage)
    with pytest.raises(ExportError, match="onnxruntime and torch differ by"):
        list(export_runs(["csnet-r10"], "csnet-r10", runs, tmp_path / "op.npz", tmp_path / "models", data.train.x))
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("ratio", ["r10", "r20", "r30"])
def test_the_papers_files_that_ship_are_those_that_its_report_tells_of(ratio: str, data: SmallSet) -> None:
    """One operator serves them, their measurements are the page's, and the veil is seen in what they show."""
    told = json.loads((ROOT / "docs" / "paper.json").read_text())["schedules"]["short"]["models"]
    shipped = ROOT / "train" / "weights" / "paper"
    operator = Operator.load(shipped / f"cifar10-{ratio}.npz")
    sent = data.test.x[0, 0].numpy()
    sampled = operator.quantise(operator.sample(sent, operator.rows), (1, 1))[None]
    shown = {}
    for name in ("csnet", "adv-csnet-e", "adv-csnet-s"):
        model = read_model(shipped / f"{name}-{ratio}.onnx")
        assert model.told["operator_id"] == operator.id
        measured = json.loads(model.told["measured"])
        for number in ("psnr", "recognition"):
            assert measured[number] == told[f"{name}-{ratio}"][number], name
        session = onnxruntime.InferenceSession(model.content, providers=["CPUExecutionProvider"])
        (shown[name],) = session.run(None, {"measurements": sampled})[0].astype(np.float64)
    for veiled in ("adv-csnet-e", "adv-csnet-s"):
        assert 0.1 < np.abs(shown[veiled] - shown["csnet"]).mean() < 10, veiled


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
