"""A schedule of runs: its plan, what is done, left, resumed or stale."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.train.schedules import CPU, FILES, command, no_bar, write_schedule
from tests.waiting import wait_for
from train import checkpoint, cli, reproduce
from train.data import mnist
from train.data.small import Pictures, SmallSet
from train.devices import Device
from train.evaluation.small import AS_IS, ITSELF
from train.jobs import JobError, do_at_once
from train.loops import schedule as loops_schedule
from train.models import made_by
from train.report.printed import MODELS, RATIOS
from train.reproduce import RUN_FILES, SCHEDULES, Runner, Schedule, Step, estimates, evaluated
from train.settings import ClassifierRun, RetrainedRun, SettingsError

STEPPED = {
    "refined-r10": 'kind = "refined"\nextends = "csnet-r10"',
    "guide": 'kind = "retrained"\nreader = "inception"\nmodel = "csnet-r10"',
    "adv-csnet-s-r10": """
        kind = "steps"
        extends = "csnet-r10"
        refined = "refined-r10"
        guide = "guide"
        surrogates = ["inception"]
    """,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_that_ship_are_whole(name: str) -> None:
    schedule = Schedule(RUN_FILES / name)
    steps = schedule.steps()
    trained: set[str] = set()
    for step in steps:
        assert set(step.needs) <= trained, step.told
        if step.run is not None:
            trained.add(step.name)
    for model in MODELS:
        for ratio in RATIOS:
            assert f"{model}-r{ratio}" in schedule.models
    classifiers = {name: run.network for name, run in schedule.runs.items() if isinstance(run, ClassifierRun)}
    reported = {"vgg16", "resnet110", "mobilenet_v2", "densenet", "convnext", "vit"}
    assert reported <= set(classifiers.values())
    closely = {name: network for name, network in classifiers.items() if schedule.looks_closely(name)}
    assert closely == {name: network for name, network in classifiers.items() if network in reported}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_papers_models_come_first_and_each_is_measured_as_soon_as_it_can_be(name: str) -> None:
    steps = Schedule(RUN_FILES / name).steps()
    kinds = [step.run.kind if step.run is not None else "measure" for step in steps]
    papers = max(place for place, kind in enumerate(kinds) if kind in ("csnet", "adversarial", "generative"))
    ours = [place for place, kind in enumerate(kinds) if kind in ("ensemble", "refined", "steps")]
    again = [place for place, step in enumerate(steps) if "-retrained-on-" in step.name]
    assert papers < min(ours)
    assert max(ours) < min(again)
    for before, step in pairwise(steps):
        if step.run is None and before.run is not None:
            assert before.name in step.needs, step.told


def test_the_full_schedule_is_the_papers() -> None:
    schedule = Schedule(RUN_FILES / "full")
    for name, run in schedule.runs.items():
        if name.startswith(("csnet", "adv-csnet")) and not name.startswith(("adv-csnet-e", "adv-csnet-s")):
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
    with pytest.raises(SettingsError, match=r"--only inceptoin: no run is called so, but inception$"):
        schedule.steps(["inceptoin"])
    with pytest.raises(SettingsError, match=r"--only vgg-\*: no run is called so; there are csnet-r10, inception, "):
        schedule.steps(["vgg-*"])


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
        (
            {"measurement": FILES["measurement"].replace('retrained = ["adv-csnet-e-*"]', 'retrained = ["e-*"]')},
            "retrained: e-* matches none of",
        ),
        ({"inception": 'kind = "classifier"\nnetwork = "vit"'}, "inception is a judge, vit, which no veil may be made"),
        (
            {**STEPPED, "guide": STEPPED["guide"].replace("inception", "inceptoin")},
            "guide.toml: needs inceptoin,",
        ),
        ({**STEPPED, "guide": STEPPED["guide"].replace('"inception"', '"csnet-r10"')}, "csnet-r10 is a csnet run, exp"),
        (
            {
                **STEPPED,
                "guide": STEPPED["guide"].replace("csnet-r10", "refined-r10"),
                "inception": 'kind = "classifier"\nnetwork = "mixer"',
            },
            "adv-csnet-s-r10.toml: guide: inception can't be carried by a decoder",
        ),
        (STEPPED, "guide: guide learns from pictures of csnet-r10, expected refined-r10"),
        (
            {**STEPPED, "csnet-r20": FILES["csnet-r10"], "refined-r10": 'kind = "refined"\nextends = "csnet-r20"'},
            "refined: refined-r10 refines csnet-r20, expected csnet-r10",
        ),
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


def tried_on_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pictures as a try needs, for no longer than it must."""
    for name, value in {"TRIED_S": 0.0, "_TRIED_TRAIN": 40, "_TRIED_TEST": 20, "_TRIED_ITERATIONS": 2}.items():
        monkeypatch.setattr(reproduce, name, value)


def test_a_dry_run_estimates_every_step_and_leaves_nothing(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tried_on_few(monkeypatch)
    folder = write_schedule(tmp_path / "plan")
    code, output = command(
        "reproduce", "--schedule", folder, "--data", data_folder, "--runs", tmp_path / "runs", "--dry-run"
    )
    assert code == 0, output
    steps = Schedule(folder).steps()
    for number, step in enumerate(steps, 1):
        assert re.search(rf"{step.told} .*, {number} of {len(steps)}$", output, re.MULTILINE)
    assert "in all" in output
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_the_pictures_that_readers_learn_from_once(
    tmp_path: Path, data: SmallSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second for ten of them is by far the longest here."""
    tried_on_few(monkeypatch)
    monkeypatch.setattr(reproduce, "_TRIED_TEST", 10)

    def slowly(path: Path, originals: Pictures, device: Device) -> Pictures:
        time.sleep(0.5)
        return made_by(path, originals, device)

    monkeypatch.setattr(reproduce, "made_by", slowly)
    how = """
        kind = "measurement"
        readers = ["inception"]
        retrained = ["csnet-r10"]
        retrained_iterations = 3
        scratch = true
    """
    schedule = Schedule(write_schedule(tmp_path / "plan", measurement=how))
    steps = schedule.steps(["inception-*-on-csnet-r10"])
    first, second = (step for step in steps if isinstance(step.run, RetrainedRun))
    longest = 0.5 * len(data.train) / 10

    def told(todo: list[Step]) -> list[float]:
        found = {step.name: s for step, s in estimates(schedule, steps, todo, CPU, lambda _: data, no_bar)}
        return [found[first.name], found[second.name]]

    both = told([first, second])
    assert both[0] > longest > 2 * both[1]
    assert told([second])[1] < longest / 2


def test_a_dry_run_passes_over_what_is_done(
    done: tuple[Schedule, Path], tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried_on_few(monkeypatch)
    schedule, runs = done
    shutil.copytree(runs, tmp_path / "runs" / schedule.folder.name)
    shutil.rmtree(tmp_path / "runs" / schedule.folder.name / "adv-csnet-e-r10")
    asked = ("reproduce", "--schedule", schedule.folder, "--data", data_folder, "--runs", tmp_path / "runs")
    code, output = command(*asked, "--dry-run")
    assert code == 0, output
    assert re.search(r"done  csnet csnet-r10 ", output)
    assert re.search(r"min  ensemble adv-csnet-e-r10 ", output)
    assert re.search(r"min  measure adv-csnet-e-r10 ", output)


def test_a_surrogate_that_came_since_makes_no_measurement_obsolete_and_a_judge_does(
    done: tuple[Schedule, Path], tmp_path: Path
) -> None:
    _, runs = done
    for each in (*runs.iterdir(), runs / "inception"):
        name = "another" if (tmp_path / each.name).exists() else each.name
        (tmp_path / name).symlink_to(each)
    for network, known in {"convnet8": True, "vit": False}.items():
        more = FILES["inception"].replace("inception", network)
        schedule = Schedule(write_schedule(tmp_path / "plans" / network, another=more))
        assert (evaluated(schedule, tmp_path, "csnet-r10") is not None) is known


def test_an_interrupted_run_goes_on_only_when_asked(
    done: tuple[Schedule, Path], tmp_path: Path, data_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
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
    assert "csnet-r10 goes on at 4 of 4" in caplog.text
    assert "measure csnet-r10: 4 of 4" in caplog.text, "told where no terminal shows a bar"
    caplog.clear()
    assert command(*asked, *only)[0] == 0
    assert "1 of" not in caplog.text


def test_data_that_is_missing_is_told_before_anything_begins(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mnist, "ADDRESS", "http://127.0.0.1:1/")
    other = FILES["csnet-r10"] + '\ndata = "mnist"'
    folder = write_schedule(tmp_path / "plan", **{"mnist-csnet-r10": other})
    asked = ("--data", data_folder, "--runs", tmp_path / "runs", "--cache", tmp_path / "cache")
    assert command("reproduce", "--schedule", folder, *asked, "--only", "*csnet-r10")[0] != 0
    assert "train-images-idx3" in caplog.records[-1].getMessage()
    assert not (tmp_path / "runs").exists()


def test_a_run_against_a_judge_is_refused(tmp_path: Path, data_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = {"run": {"kind": "classifier", "network": "vit"}, "net": {}, "provenance": {}}
    (tmp_path / "runs" / "inception").mkdir(parents=True)
    checkpoint.save(tmp_path / "runs" / "inception" / "final.pt", judge)
    (tmp_path / "veil.toml").write_text(FILES["adv-csnet-vgg-r10"])
    asked = ("run", tmp_path / "veil.toml", "--data", data_folder, "--runs", tmp_path / "runs")
    assert command(*asked)[0] == 2
    assert "inception is a judge, vit, which no veil may be made against" in caplog.text


@pytest.mark.parametrize(("every", "told"), [(0.0, ["1", "2", "3", "4"]), (1e9, ["1", "4"])])
def test_without_a_terminal_a_line_is_logged_now_and_then(
    every: float,
    told: list[str],
    tmp_path: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cli, "_TOLD_EVERY_S", every)
    monkeypatch.setattr(loops_schedule, "REPORT_EVERY", 1)
    (tmp_path / "small.toml").write_text(FILES["csnet-r10"])
    code, output = command("run", tmp_path / "small.toml", "--data", data_folder, "--runs", tmp_path / "runs")
    assert code == 0, output
    lines = [text for record in caplog.records if (text := record.getMessage()).startswith("small: ")]
    assert [line.split()[1] for line in lines] == told
    assert all("psnr " in line for line in lines)
    assert ["min left" in line for line in lines] == [False, *[True] * (len(told) - 2), False]


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
            assert torch.allclose(at_once[key], value, atol=1e-5), (name, key)
    begun = [record.getMessage() for record in caplog.records if record.getMessage().startswith("begun")]
    assert len(begun) == len(schedule.steps())
    assert begun[:2] == ["begun: classifier inception", "begun: csnet csnet-r10"], "as many wait for each; the longest"
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
    assert "200 pictures to learn from, expected at least a batch of 4000" in caplog.text
    assert "Traceback" not in caplog.text
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


def test_a_process_that_is_killed_is_blamed_on_no_single_step_and_failures_before_it_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = [Step(name, None, (), tmp_path) for name in ("fails", "killed", "endless")]
    with pytest.raises(JobError) as error:
        do_at_once(steps, 2, partial(Fated, tmp_path))
    told, _, before = str(error.value).partition("; ")
    assert told.startswith("a process was killed (by lack of memory?), of one of these: ")
    assert sorted(told.rpartition(": ")[2].split(", ")) == ["measure endless", "measure killed"]
    assert before == "failed before that: measure fails"
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "no such thing" in str(record.exc_info), "a bug keeps its traceback"


class Endless(Runner):
    """Writes down in which process it is, and never ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, step: Step) -> None:
        (self.folder / "process").write_text(str(os.getpid()))
        while True:
            time.sleep(0.01)


_ENDLESS = """
import signal
import sys
from functools import partial
from pathlib import Path
from tests.train.test_reproduce import Endless
from train.jobs import do_at_once
from train.reproduce import Step
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where these tests run in the background
    do_at_once([Step("endless", None, (), Path("."))], 2, partial(Endless, Path(sys.argv[1])))
"""


def runs_still(pid: int) -> bool:
    """A process that ended stays as a zombie where nobody asks after it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_steps_end_when_what_began_them_is_killed_or_interrupted(tmp_path: Path, by: signal.Signals) -> None:
    command_line = [sys.executable, "-c", _ENDLESS, str(tmp_path)]
    process = tmp_path / "process"
    with subprocess.Popen(command_line, cwd=Path(__file__).parent.parent.parent) as begun:
        try:
            wait_for(lambda: process.exists() and process.read_text() != "", "the step", 60)
            begun.send_signal(by)
            begun.wait(60)
        finally:
            begun.kill()
    pid = int(process.read_text())
    try:
        wait_for(lambda: not runs_still(pid), "the end of its process", 20)
    finally:
        if runs_still(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_run_done_by_other_settings_is_not_overwritten(done: tuple[Schedule, Path], data: SmallSet) -> None:
    schedule, runs = done
    runner = Runner(schedule, runs, CPU, lambda name: data, no_bar)
    step = schedule.steps(["csnet-r10"])[0]
    assert step.run is not None
    with pytest.raises(checkpoint.CheckpointError, match="of a run with other settings"):
        runner.done(replace(step, run=replace(step.run, seed=7)))


def test_a_measurement_is_done_anew_when_more_is_asked_and_not_when_less_is(
    done: tuple[Schedule, Path], data: SmallSet, tmp_path: Path
) -> None:
    _, runs = done
    copy = tmp_path / "reduced"
    shutil.copytree(runs, copy)
    evaluation = copy / "csnet-r10" / "evaluation.json"
    measured = json.loads(evaluation.read_text())

    def is_done(how: str = FILES["measurement"], **told: object) -> bool:
        evaluation.write_text(json.dumps(measured | told))
        schedule = Schedule(write_schedule(tmp_path / "plan", measurement=how))
        (step,) = (step for step in schedule.steps() if step.told == "measure csnet-r10")
        return Runner(schedule, copy, CPU, lambda name: data, no_bar).done(step)

    assert is_done()
    assert not is_done(mapped_back={}), "by a program that measures more"
    unpurified = {reader: {ITSELF: {AS_IS: table[ITSELF][AS_IS]}} for reader, table in measured["recognition"].items()}
    assert not is_done(recognition=unpurified)
    assert is_done(FILES["measurement"] + 'purified = ["adv-csnet-e-*"]', recognition=unpurified)
    gone = measured["recognition"] | {"gone": measured["recognition"]["inception"]}
    assert is_done(recognition=gone), "a reader that has left the schedule"


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
    with pytest.raises(checkpoint.CheckpointError, match="made from other runs of inception than"):
        runner.done(steps["adversarial adv-csnet-vgg-r10"])
