"""The whole way of the paper on drawn pictures: plan, train, measure, retrain, report, export, stream."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.fidelity import ssim
from decoder.catalogue import load_catalogue
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.test_service import Camera, watched
from tests.train.drawn import write_cifar10
from train import checkpoint
from train.cli import app
from train.data.small import Pictures, SmallSet, open_set
from train.devices import Device
from train.evaluation.small import (
    AS_IS,
    BLUR,
    ITSELF,
    NOISE,
    PURIFIERS,
    Reader,
    controls,
    mean_psnr,
    mean_ssim,
    measure_model,
    passes,
    purify,
)
from train.export import ExportError, export_runs
from train.jobs import JobError, do_at_once
from train.models import model_of, pictures_of
from train.networks.classifiers.classifier import Classifier
from train.networks.csnet import CSNet
from train.report import printed
from train.report.tables import doubts, lost, render, targets
from train.reproduce import RUN_FILES, SCHEDULES, Runner, Schedule, Step
from train.settings import ClassifierRun, SettingsError

CPU = Device(torch.device("cpu"), False, "CPU")
FILES = {
    "csnet-r10": """
        kind = "csnet"
        ratio = 0.1
        start = "principal"
        iterations = 4
        batch = 20
        learning_rate = 1e-4
    """,
    "inception": """
        kind = "classifier"
        network = "inception"
        iterations = 40
        warm_up = 5
        batch = 50
    """,
    "adv-csnet-vgg-r10": """
        kind = "adversarial"
        extends = "csnet-r10"
        classifier = "inception"
        iterations = 4
        batch = 20
    """,
    "adv-csnet-e-r10": """
        kind = "ensemble"
        extends = "csnet-r10"
        surrogates = ["inception"]
        iterations = 4
        batch = 20
    """,
    "measurement": """
        kind = "measurement"
        readers = ["inception"]
        retrained = ["adv-csnet-e-*"]
        retrained_iterations = 3
    """,
}


def write_schedule(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**FILES, **changed}.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("data") / "cifar10")


@pytest.fixture(scope="module")
def data(data_folder: Path) -> SmallSet:
    return open_set("cifar10", [data_folder], data_folder)


@contextmanager
def no_bar(name: str, total: int) -> Iterator[Any]:
    yield lambda row: None


@pytest.fixture(scope="module")
def done(data: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Schedule, Path]:
    """A finished small schedule."""
    torch.set_num_threads(1)
    schedule = Schedule(write_schedule(tmp_path_factory.mktemp("schedules") / "reduced"))
    runs = tmp_path_factory.mktemp("runs") / "reduced"
    runner = Runner(schedule, runs, CPU, lambda name: data, no_bar)
    for step in schedule.steps():
        assert not runner.done(step)
        runner.do(step)
        assert runner.done(step)
    return schedule, runs


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


# Plan


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_that_ship_are_whole(name: str) -> None:
    schedule = Schedule(RUN_FILES / name)
    steps = schedule.steps()
    finished: set[str] = set()
    for step in steps:
        assert set(step.needs) <= finished | ({step.name} if step.run is None else set()), step.name
        finished.add(step.name)
    for model in ("csnet", "adv-csnet-vgg", "adv-csnet-resnet", "adv-csnet-gamma0", "adv-csnet-gamma1", "adv-csnet-e"):
        for ratio in (10, 20, 30):
            assert f"{model}-r{ratio}" in schedule.models
    networks = {run.network for run in schedule.runs.values() if isinstance(run, ClassifierRun)}
    assert {"vgg16", "resnet110", "mobilenet_v2", "densenet", "convnext", "vit"} <= networks


def test_the_full_schedule_is_the_papers() -> None:
    schedule = Schedule(RUN_FILES / "full")
    for name, run in schedule.runs.items():
        if name.startswith(("csnet", "adv-csnet")) and not name.startswith("adv-csnet-e"):
            assert (run.iterations, run.batch, run.learning_rate) == (300 * 200, 250, 1e-3)
            assert run.drops == (125 * 200, 225 * 200)  # type: ignore[attr-defined]
        if name.startswith(("mnist-csnet", "mnist-adv")):
            assert (run.iterations, run.batch) == (500 * 220, 250)
            assert run.drops == (200 * 220, 350 * 220)  # type: ignore[attr-defined]
    generative = [schedule.runs[f"adv-csnet-gamma{gamma}-r10"] for gamma in (0, 1)]
    for run, gamma in zip(generative, (0.0, 1.0), strict=True):
        weights = [getattr(run, key) for key in ("lambda_d", "gamma_d", "alpha", "lambda_g", "gamma_g")]
        assert weights == [1.0, gamma, 1.0, 1.0, 0.1]


def test_only_takes_what_is_asked_and_what_that_needs(tmp_path: Path) -> None:
    schedule = Schedule(write_schedule(tmp_path / "plan"))
    told = [step.told for step in schedule.steps(["adv-csnet-vgg-*"])]
    assert told == [
        "csnet csnet-r10", "classifier inception", "adversarial adv-csnet-vgg-r10", "measure adv-csnet-vgg-r10",
    ]  # fmt: skip
    assert [step.told for step in schedule.steps(["csnet-r10"])][-1] == "measure csnet-r10"
    with pytest.raises(SettingsError, match="--only other: matches none of"):
        schedule.steps(["other"])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"csnet-r10": FILES["csnet-r10"] + "\nspeed = 3"}, r"csnet-r10\.toml: unknown key 'speed'"),
        ({"adv-csnet-vgg-r10": FILES["adv-csnet-vgg-r10"].replace("inception", "vgg")}, "needs vgg, which has no run"),
        ({"csnet-r10": 'kind = "plain"'}, "a plain run has no place in a schedule"),
        ({"measurement": 'kind = "measurement"\nreaders = "vgg16"'}, "expected a list of str"),
        ({"inception": 'kind = "classifier"\nnetwork = "alexnet"'}, "network = 'alexnet', expected one of vgg16"),
        ({"inception": FILES["inception"] + '\ndata = "mnist"'}, "inception is of mnist, expected cifar10"),
        ({"adv-csnet-e-r10": FILES["adv-csnet-e-r10"].replace('"csnet-r10"', '"inception"')}, "expected a csnet"),
        ({"measurement": 'kind = "measurement"\nreaders = ["vgg16"]'}, "readers: vgg16 is no classifier run beside it"),
        ({"measurement": FILES["measurement"].replace("adv-csnet-e-*", "e-*")}, "retrained: e-* matches none of"),
    ],
)
def test_a_schedule_that_cannot_be_done_is_told_in_one_line(
    changed: dict[str, str], problem: str, tmp_path: Path, data_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_schedule(tmp_path / "plan", **changed)
    code, _ = command("reproduce", "--schedule", folder, "--data", data_folder, "--runs", tmp_path / "runs")
    assert code == 2
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert problem.replace("\\", "") in errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_estimates_every_step_and_leaves_nothing(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = write_schedule(tmp_path / "plan")
    code, output = command(
        "reproduce", "--schedule", folder, "--data", data_folder, "--runs", tmp_path / "runs", "--dry-run"
    )
    assert code == 0, output
    for step in Schedule(folder).steps():
        assert step.told in output
    assert "in all" in output
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_goes_on_only_when_asked(
    done: tuple[Schedule, Path], tmp_path: Path, data_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule, runs = done
    copy = tmp_path / "runs" / "reduced" / "csnet-r10"
    copy.mkdir(parents=True)
    (copy / "last.pt").write_bytes((runs / "csnet-r10" / "last.pt").read_bytes())
    asked = ("reproduce", "--schedule", schedule.folder, "--data", data_folder, "--runs", tmp_path / "runs")
    only = ("--only", "csnet-r10")
    assert command(*asked, *only)[0] == 2
    assert "was interrupted; --resume goes on with it" in caplog.text
    code, output = command(*asked, *only, "--resume")
    assert code == 0, output
    assert (copy / "evaluation.json").exists()
    caplog.clear()
    assert command(*asked, *only)[0] == 0
    assert "1 of" not in caplog.text


def test_steps_done_at_once_give_what_they_give_one_by_one(
    done: tuple[Schedule, Path], tmp_path: Path, data_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    schedule, runs = done
    asked = ("reproduce", "--schedule", schedule.folder, "--data", data_folder, "--runs", tmp_path, "--jobs", 2)
    code, output = command(*asked)
    assert code == 0, output
    for name in schedule.models:
        one_by_one, at_once = (checkpoint.load(f / name / "final.pt")["net"] for f in (runs, tmp_path / "reduced"))
        for key, value in one_by_one.items():
            assert torch.allclose(at_once[key], value, atol=1e-3), (name, key)
    begun = [record.getMessage() for record in caplog.records if record.getMessage().startswith("begun")]
    assert len(begun) == len(schedule.steps())
    caplog.clear()
    assert command(*asked)[0] == 0
    assert "begun" not in caplog.text


def test_what_needs_a_step_that_failed_is_left_and_the_rest_is_done(
    tmp_path: Path, data_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    greedy = FILES["adv-csnet-vgg-r10"].replace("batch = 20", "batch = 4000")
    folder = write_schedule(tmp_path / "plan", **{"adv-csnet-vgg-r10": greedy})
    code, _ = command(
        "reproduce", "--schedule", folder, "--data", data_folder, "--runs", tmp_path / "runs", "--jobs", 2
    )
    assert code == 1
    assert "adversarial adv-csnet-vgg-r10 failed; 1 more need them" in caplog.text
    assert "500 pictures to learn from, expected at least a batch of 4000" in caplog.text
    assert (tmp_path / "runs" / "plan" / "adv-csnet-e-r10" / "evaluation.json").exists()
    assert not (tmp_path / "runs" / "plan" / "adv-csnet-vgg-r10" / "final.pt").exists()


class Fated(Runner):
    """Of three steps one fails, one's process is killed once the third has begun, and that would never end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, step: Step) -> None:
        if step.name == "fails":
            raise ValueError("no such thing")
        if step.name == "endless":
            (self.folder / "begun").touch()
        while step.name == "endless" or not (self.folder / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_blamed_on_no_single_step_and_failures_before_it_are_told(tmp_path: Path) -> None:
    steps = [Step(name, None, (), tmp_path) for name in ("fails", "killed", "endless")]
    with pytest.raises(JobError) as error:
        do_at_once(steps, 2, partial(Fated, tmp_path))
    told, _, before = str(error.value).partition("; ")
    assert told.startswith("a process was killed (by lack of memory?), of one of these: ")
    assert sorted(told.rpartition(": ")[2].split(", ")) == ["measure endless", "measure killed"]
    assert before == "failed before that: measure fails"


def test_a_run_done_by_other_settings_is_not_overwritten(done: tuple[Schedule, Path], data: SmallSet) -> None:
    schedule, runs = done
    runner = Runner(schedule, runs, CPU, lambda name: data, no_bar)
    step = schedule.steps(["csnet-r10"])[0]
    assert step.run is not None
    with pytest.raises(checkpoint.CheckpointError, match="of a run with other settings"):
        runner.done(replace(step, run=replace(step.run, seed=7)))


def test_what_was_made_from_other_runs_is_stale(done: tuple[Schedule, Path], data: SmallSet, tmp_path: Path) -> None:
    schedule, runs = done
    copy = tmp_path / "reduced"
    shutil.copytree(runs, copy)
    runner = Runner(schedule, copy, CPU, lambda name: data, no_bar)
    steps = {step.told: step for step in schedule.steps()}
    state = checkpoint.load(copy / "inception" / "final.pt")
    checkpoint.save(copy / "inception" / "final.pt", state | {"recognition": 1.0})
    assert runner.done(steps["csnet csnet-r10"])
    assert not runner.done(steps["measure csnet-r10"])
    with pytest.raises(checkpoint.CheckpointError, match="made from other runs of csnet-r10, inception"):
        runner.done(steps["adversarial adv-csnet-vgg-r10"])


# Measuring


class Bright(torch.nn.Module):
    """Says 9 of a picture brighter than mid-grey, else 0."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        level = pictures.mean((1, 2, 3)) * 0.25
        scores = torch.zeros(len(pictures), 10)
        scores[:, 9], scores[:, 0] = level, -level
        return scores


def test_recognition_is_counted_rightly() -> None:
    """Four flat pictures that any CSNet from principal directions gives back; one of the labels is wrong."""
    flat = torch.tensor([30, 60, 200, 220], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 32, 32).contiguous()
    test = Pictures(flat, torch.tensor([0, 9, 9, 9]))
    net = CSNet(1)
    net.start_from(torch.full((1, 1024), 1 / 32))
    torch.nn.init.zeros_(net.reconstruction.deep[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(net.reconstruction.deep[-1].bias)  # type: ignore[arg-type]
    reader = Classifier(torch.nn.Identity(), Bright()).eval()
    counted: list[None] = []
    result = measure_model(net, net, test, {"bright": Reader(reader, 75.0)}, True, CPU, lambda: counted.append(None))
    assert result["recognition"]["bright"][ITSELF] == {AS_IS: 75.0} | dict.fromkeys(PURIFIERS, 75.0)
    assert result["recognition"]["bright"][NOISE] == {AS_IS: 75.0}
    assert result["originals"] == {"bright": 75.0}
    assert result["psnr"][ITSELF] > 100
    assert result["ssim"][ITSELF] == pytest.approx(1.0, abs=1e-4)
    assert len(counted) == passes(1, True, True) == 6


def test_controls_cost_as_much_as_is_asked(data: SmallSet) -> None:
    plain = Pictures(data.test.x, data.test.y)
    for control in controls(plain, data.test, 30.0, CPU).values():
        assert mean_psnr(control, data.test) == pytest.approx(30.0, abs=0.1)
    found = controls(plain, data.test, 25.0, CPU)
    assert not torch.equal(found[NOISE].x, found[BLUR].x)
    assert torch.equal(found[NOISE].y, data.test.y)


def test_purifiers_are_those_of_opencv_and_keep_the_picture(data: SmallSet) -> None:
    for way in PURIFIERS:
        seen = purify(data.test, way)
        assert not torch.equal(seen.x, data.test.x)
        assert mean_psnr(seen, data.test) > 15


def test_ssim_is_the_projects_other_definition(data: SmallSet) -> None:
    """benchmarks.fidelity is held against scikit-image's."""
    draw = torch.randn(data.test.x.shape, generator=torch.Generator().manual_seed(0))
    noisy = Pictures((data.test.x.float() + 20 * draw).clamp(0, 255).byte(), data.test.y)
    theirs = [ssim(a.numpy(), b.numpy()) for a, b in zip(noisy.x[:10, 0], data.test.x[:10, 0], strict=True)]
    assert mean_ssim(noisy[:10], data.test[:10]) == pytest.approx(float(np.mean(theirs)), abs=1e-4)


# Report


def test_the_report_is_written_from_its_numbers(
    done: tuple[Schedule, Path], tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, runs = done
    for other in ("short", "full"):
        write_schedule(schedule.folder.parent / other)
    monkeypatch.setattr("train.reproduce.RUN_FILES", schedule.folder.parent)
    asked = ("report", "--data", data_folder, "--docs", tmp_path, "--runs")
    assert command(*asked, tmp_path / "nothing")[0] == 2
    assert not list(tmp_path.iterdir())
    code, output = command(*asked, runs.parent)
    assert code == 0, output
    paper = json.loads((tmp_path / "paper.json").read_text())
    page = (tmp_path / "paper.md").read_text()
    assert page == render(paper)
    ours = paper["schedules"]["reduced"]["models"]["csnet-r10"]["psnr"][ITSELF]
    assert f"{ours:.2f} (25.01, {ours - 25.01:+.2f})" in page
    assert "Not run yet: `veilcam-train reproduce --schedule full`" in page
    for figure in paper["figures"]:
        assert (tmp_path / "paper" / figure["file"]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "paper" / "reduced" / "csnet-r10.csv").read_text().startswith("iteration,loss")
    assert "inception-retrained-on-adv-csnet-e-r10" in paper["schedules"]["reduced"]["retrained"]


def test_a_report_keeps_what_was_told_of_runs_that_are_elsewhere(
    done: tuple[Schedule, Path], tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runs = done
    plans = tmp_path / "plans"
    for name in SCHEDULES:
        write_schedule(plans / name)
    monkeypatch.setattr("train.reproduce.RUN_FILES", plans)
    shutil.copytree(runs, tmp_path / "runs" / "reduced")

    def figure5() -> tuple[set[str], bytes]:
        """What it shows, and its picture."""
        figures = json.loads((tmp_path / "docs" / "paper.json").read_text())["figures"]
        (figure,) = (each for each in figures if each["file"] == "figure5-reduced.png")
        return set(figure["runs"]), (tmp_path / "docs" / "paper" / figure["file"]).read_bytes()

    def models() -> set[str]:
        code, output = command(
            "report", "--data", data_folder, "--docs", tmp_path / "docs", "--runs", tmp_path / "runs"
        )
        assert code == 0, output
        paper = json.loads((tmp_path / "docs" / "paper.json").read_text())
        assert all((tmp_path / "docs" / "paper" / figure["file"]).exists() for figure in paper["figures"])
        return set(paper["schedules"]["reduced"]["models"])

    everything = {"csnet-r10", "adv-csnet-vgg-r10", "adv-csnet-e-r10"}
    assert models() == everything
    whole = figure5()
    assert whole[0] == everything
    shutil.rmtree(tmp_path / "runs" / "reduced" / "adv-csnet-e-r10")
    shutil.rmtree(tmp_path / "runs" / "reduced" / "adv-csnet-vgg-r10")
    assert models() == everything
    assert figure5() == whole, "not drawn anew without the pictures of those that are elsewhere"
    (plans / "reduced" / "adv-csnet-vgg-r10.toml").write_text(FILES["adv-csnet-vgg-r10"] + "beta = 0.5")
    assert models() == everything - {"adv-csnet-vgg-r10"}
    assert figure5()[0] == {"csnet-r10"}, "it showed what is told of no more; the rest of it isn't here"
    other = tmp_path / "runs" / "reduced" / "inception" / "final.pt"
    checkpoint.save(other, checkpoint.load(other) | {"recognition": 1.0})
    shutil.rmtree(tmp_path / "runs" / "reduced" / "inception-retrained-on-adv-csnet-e-r10")
    assert command("report", "--data", data_folder, "--docs", tmp_path / "docs", "--runs", tmp_path / "runs")[0] == 2


def told(**recognition: float) -> dict[str, Any]:
    """A schedule in which every model keeps its PSNR and each reader reads as said, controls 60 %."""
    readers = ("vgg16", "resnet110", "mobilenet_v2", "densenet", "convnext", "vit")

    def table(value: float) -> dict[str, Any]:
        ways = {AS_IS: value} | dict.fromkeys(PURIFIERS, value)
        return {reader: {ITSELF: ways, NOISE: {AS_IS: 60.0}, BLUR: {AS_IS: 60.0}} for reader in readers}

    models = {}
    for ratio, fidelity in ((10, 25.0), (20, 28.5), (30, 31.2)):
        ours = recognition.get("ours", 10.0)
        for name, value in {"csnet": 50.0, "adv-csnet-e": ours, "adv-csnet-e-known": ours}.items():
            psnr_of = {ITSELF: fidelity * (0.99 if name != "csnet" else 1.0), NOISE: fidelity, BLUR: fidelity}
            models[f"{name}-r{ratio}"] = {"run": {"data": "cifar10"}, "psnr": psnr_of, "recognition": table(value)}
    classifiers = {reader: {"run": {"network": reader}, "recognition": 92.0} for reader in readers}
    return {"models": models, "classifiers": classifiers, "retrained": {}}


def test_targets_are_judged_by_their_numbers() -> None:
    reached = {target.what: target for target in targets(told())}
    assert [target.missed_by for target in reached.values()] == [0.0] * 15
    assert reached["Adv-CSNet-E, ours: PSNR lost, %"].ours == pytest.approx(1.0)
    missed = {target.what: target.missed_by for target in targets(told(ours=12.6))}
    assert missed["Adv-CSNet-E, ours: VGG-16 and ResNet-110, mean over the ratios, %"] == pytest.approx(0.1)
    assert missed["Adv-CSNet-E, ours: four judges that it never saw, %"] == 0
    part = told()
    part["models"]["csnet-r10"]["psnr"][ITSELF] = 24.5
    del part["models"]["adv-csnet-e-r30"]
    found = targets(part)
    assert found[0].missed_by == pytest.approx(0.21)
    assert [target.missed_by for target in found[3:9]] == [None] * 6


def test_what_psnr_costs_is_counted_as_the_paper_counts_it() -> None:
    """It prints 10.6 % for Adv-CSNet and 1.0 % for Adv-CSNet-VGG: one minus the ratio of the means."""
    paper = told()
    for ratio, value in zip((10, 20, 30), printed.PSNR["Adv-CSNet"], strict=True):
        paper["models"][f"adv-csnet-gamma1-r{ratio}"] = {
            "run": {"data": "cifar10"},
            "psnr": {ITSELF: value},
            "recognition": {},
        }
        paper["models"][f"csnet-r{ratio}"]["psnr"][ITSELF] = printed.PSNR["CSNet"][(ratio // 10) - 1]
    assert lost(paper, "adv-csnet-gamma1", (10, 20, 30)) == pytest.approx(10.6, abs=0.05)


def test_the_report_doubts_itself() -> None:
    assert doubts(told()) == []
    weak = told(ours=61.0)
    weak["classifiers"]["vgg16"]["recognition"] = 85.0
    del weak["classifiers"]["vit"]
    found = doubts(weak)
    assert any("vgg16 reads 85.00 % of the originals" in line for line in found)
    assert any("vit wasn't trained" in line for line in found)
    assert sum("at equal PSNR leaves 60.00 %" in line for line in found) == 12


# Export


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
