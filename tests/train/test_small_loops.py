"""The loops of the paper and of the ensemble, on bars, for seconds: resume is exact, what is frozen stays."""

import csv
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.train.schedules import CPU, CSNET, assert_ended_alike, killed_at
from train import checkpoint
from train.data.small import Pictures, SmallSet
from train.devices import Device
from train.evaluation.small import NOISE, controls, mean_psnr
from train.loops import adversarial, price, schedule
from train.loops.retrained import Rise
from train.loops.small import LOOPS
from train.models import classifier_of, csnet_of, made_by, model_of, pictures_of, reader_of, recognition, refined_of
from train.networks.classifiers import CLASSIFIERS
from train.networks.classifiers.classifier import Classifier
from train.networks.csnet import floor_rows
from train.networks.discriminator import Discriminator
from train.networks.steps import Steps
from train.networks.ways import Median
from train.settings import (
    AdversarialRun,
    ClassifierRun,
    EnsembleRun,
    GenerativeRun,
    RefinedRun,
    RetrainedRun,
    SettingsError,
    SmallRun,
    SteppedRun,
    StepsRun,
    read_run,
)

RUNS: dict[str, SmallRun] = {
    "csnet": CSNET,
    "refined": RefinedRun(extends="csnet", iterations=6, batch=10, warm_up=1),
    "reader": ClassifierRun(network="inception", iterations=24, warm_up=5, batch=50, learning_rate=0.05),
    "adversarial": AdversarialRun(
        extends="csnet", classifier="reader", iterations=6, batch=20, read_below=1.0, read_over=0.4, beta_later=0.1
    ),
    "generative": GenerativeRun(extends="csnet", gamma_d=1.0, iterations=6, batch=10),
    "ensemble": EnsembleRun(
        extends="csnet",
        surrogates=("reader", "other"),
        learning_readers=2,
        restart=2,
        iterations=6,
        batch=10,
        warm_up=1,
    ),
    "lean": EnsembleRun(
        extends="csnet",
        surrogates=("reader", "other"),
        fidelity="psnr",
        likeness=0.0,
        by_need=False,
        moved=False,
        purified=False,
        iterations=6,
        batch=10,
        warm_up=1,
    ),
    "other": ClassifierRun(
        network="convnext", optimiser="adamw", learning_rate=1e-3, iterations=6, warm_up=2, batch=20
    ),
    "retrained": RetrainedRun(reader="reader", model="csnet", iterations=6, batch=20, check_every=1, patience=3),
    "steps": StepsRun(
        extends="csnet", guide="retrained", surrogates=("reader",), steps=2, iterations=6, batch=10, psnr_lost=0.05
    ),
}


def changed(name: str, **settings: Any) -> SmallRun:
    return replace(RUNS[name], **settings)


def train(name: str, data: SmallSet, runs: Path, out: Path | None = None, run: SmallRun | None = None) -> Path:
    run = run or RUNS[name]
    return LOOPS[type(run)](run, data, CPU, out or runs / name, lambda row: None)


def logged(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "log.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def runs(data: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished CSNet, two finished classifiers, and one of these that learned to read the CSNet's pictures."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    for name in ("csnet", "reader", "other", "retrained"):
        train(name, data, folder)
    return folder


@pytest.fixture(autouse=True)
def landed_on_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a veil costs is looked for on so many pictures."""
    monkeypatch.setattr(price, "_LANDED_ON", 40)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_ends_where_it_would_have_ended(
    name: str, data: SmallSet, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is saved at the end is equal: weights, optimisers, averages, random state, what a loop counted."""
    monkeypatch.setattr(schedule, "REPORT_EVERY", 2)
    monkeypatch.setattr(schedule, "SAVE_AFTER_S", 0.0)
    run = changed(name, iterations=6)
    if isinstance(run, SteppedRun):
        run = replace(run, drops=(5,))
    for finished in ("csnet", "reader", "other", "retrained"):
        (tmp_path / finished).symlink_to(runs / finished)
    train(name, data, tmp_path, tmp_path / "whole", run)
    with killed_at(5):
        train(name, data, tmp_path, tmp_path / "killed", run)
    assert checkpoint.load(tmp_path / "killed" / "last.pt")["iteration"] == 4
    train(name, data, tmp_path, tmp_path / "killed", run)
    assert_ended_alike(tmp_path / "whole", tmp_path / "killed")
    if isinstance(run, SteppedRun):
        rates = [float(row["learning_rate"]) for row in logged(tmp_path / "killed")]
        assert rates == pytest.approx([run.learning_rate, run.learning_rate, run.learning_rate / 10])


def test_a_run_that_goes_on_elsewhere_tells_of_both(
    data: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "REPORT_EVERY", 1)
    monkeypatch.setattr(schedule, "SAVE_AFTER_S", 0.0)
    for last, where in ((1, "one"), (3, "other"), (5, "one"), (None, "other")):
        monkeypatch.setenv("TRAIN_COMMIT", where)
        with nullcontext() if last is None else killed_at(last):
            LOOPS[type(CSNET)](CSNET, data, replace(CPU, told=where), tmp_path / "csnet", lambda row: None)
    provenance = checkpoint.load(tmp_path / "csnet" / "final.pt")["provenance"]
    assert (provenance["commit"], provenance["device"]) == ("one, then other", "one, then other")
    assert ", then " not in provenance["processor"]


def test_a_run_does_not_go_on_with_other_runs_than_it_began_with(
    data: SmallSet, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "REPORT_EVERY", 1)
    monkeypatch.setattr(schedule, "SAVE_AFTER_S", 0.0)
    for finished in ("csnet", "reader"):
        shutil.copytree(runs / finished, tmp_path / finished)
    with killed_at(2):
        train("adversarial", data, tmp_path)
    begun = (tmp_path / "adversarial" / "last.pt").read_bytes()
    reader = checkpoint.load(tmp_path / "reader" / "final.pt")
    checkpoint.save(tmp_path / "reader" / "final.pt", reader | {"recognition": 1.0})
    with pytest.raises(
        checkpoint.CheckpointError, match=r"last\.pt: begun with other runs of reader than are there now"
    ):
        train("adversarial", data, tmp_path)
    assert (tmp_path / "adversarial" / "last.pt").read_bytes() == begun


@pytest.mark.parametrize("name", ["adversarial", "generative", "ensemble"])
def test_only_the_reconstruction_is_veiled(name: str, data: SmallSet, runs: Path) -> None:
    model = model_of(train(name, data, runs), CPU)
    base = csnet_of(runs / "csnet" / "final.pt", CPU)
    assert torch.equal(model.sampling.weight, base.sampling.weight)
    assert not torch.equal(model.reconstruction.initial.weight, base.reconstruction.initial.weight)


def test_the_frozen_classifier_is_not_moved_while_g_learns(
    data: SmallSet, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[nn.Module] = []

    def remembering(path: Path, device: Device) -> tuple[Classifier, dict[str, Any]]:
        reader, state = reader_of(path, device)
        used.append(reader)
        return reader, state

    monkeypatch.setattr(adversarial, "reader_of", remembering)
    train("adversarial", data, runs, runs / "again")
    fresh, _ = reader_of(runs / "reader" / "final.pt", CPU)
    moved, kept = used[0].state_dict(), fresh.state_dict()
    assert all(torch.equal(moved[key], kept[key]) for key in kept)


@pytest.mark.parametrize("network", CLASSIFIERS)
def test_a_folded_reader_answers_as_it_did_and_leads_back_to_the_same_gradient(tmp_path: Path, network: str) -> None:
    torch.manual_seed(0)
    trained = CLASSIFIERS[network]()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of what it sees, all at once
    trained(torch.rand(16, 1, 32, 32))
    run = {"kind": "classifier", "network": network}
    checkpoint.save(tmp_path / "final.pt", {"run": run, "net": trained.state_dict(), "provenance": {}})
    answers: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for net in (classifier_of(tmp_path / "final.pt", CPU)[0], reader_of(tmp_path / "final.pt", CPU)[0]):
        pictures = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        scores = net(pictures)
        answers.append(scores.detach())
        gradients.append(*torch.autograd.grad(scores.square().sum(), pictures))
    assert network != "resnet110" or not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-4)
    # A unit that is nearly at rest may come down on the other side of its kink.
    trained_one, folded_one = (gradient.flatten() for gradient in gradients)
    assert nn.functional.cosine_similarity(trained_one, folded_one, dim=0) > 0.999


def test_the_discriminator_sees_detached_pictures(data: SmallSet, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While D learns, nothing it looks at leads back to G; while G learns, D's weights take no gradient."""
    seen: list[tuple[bool, bool]] = []
    forward = Discriminator.forward

    def watching(self: Discriminator, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((pictures.requires_grad, self.real.weight.requires_grad))
        return forward(self, pictures)

    monkeypatch.setattr(Discriminator, "forward", watching)
    train("generative", data, runs, runs / "watched", changed("generative", iterations=2))
    assert seen == [(False, True), (False, True), (True, False)] * 2


def test_what_weighs_on_the_discriminators_classes_is_what_makes_it_err(
    data: SmallSet, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D learns to read originals; γ_G makes of them what it can't read, λ_G what it takes for real."""
    monkeypatch.setattr(schedule, "REPORT_EVERY", 5)
    ends = {}
    for weighs in ("gamma_g", "lambda_g"):
        weights = {"lambda_g": 0.0, "gamma_g": 0.0, weighs: 5.0}
        run = changed("generative", gamma_d=1.0, iterations=25, batch=10, **weights)
        train("generative", data, runs, runs / f"by-{weighs}", run)
        ends[weighs] = {key: float(value) for key, value in logged(runs / f"by-{weighs}")[-1].items()}
        assert ends[weighs]["originals_recognition"] > 0.4
    assert ends["gamma_g"]["D_recognition"] < 0.3
    assert ends["lambda_g"]["D_recognition"] > 0.4
    assert ends["gamma_g"]["psnr"] < ends["lambda_g"]["psnr"] - 5


def test_gamma_0_leaves_the_layer_of_the_class_head_as_it_was_drawn(data: SmallSet, runs: Path) -> None:
    for gamma, same in ((0.0, True), (1.0, False)):
        out = runs / f"gamma{gamma}"
        train("generative", data, runs, out, changed("generative", gamma_d=gamma))
        learned = checkpoint.load(out / "last.pt")["discriminator"]["recognised.weight"]
        started = _first_weights(data, runs, out.with_name(f"start{gamma}"), gamma)
        assert torch.equal(learned, started) == same


def _first_weights(data: SmallSet, runs: Path, out: Path, gamma: float) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    drawn = Discriminator.__init__

    def keeping(self: Discriminator) -> None:
        drawn(self)
        kept.append(self.recognised.weight.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Discriminator, "__init__", keeping)
        train("generative", data, runs, out, changed("generative", gamma_d=gamma, iterations=1))
    return kept[0]


def assert_read_less_than_noise(reader: Classifier, veiled: Pictures, plain: Pictures, data: SmallSet) -> None:
    """By a fifth of the pictures, at equal PSNR."""
    noisy = controls(plain, data.test, mean_psnr(veiled, data.test), CPU)[NOISE]
    assert recognition(reader, veiled, CPU) < recognition(reader, noisy, CPU) - 20


def test_training_against_a_classifier_makes_it_err(data: SmallSet, runs: Path) -> None:
    reader, state = classifier_of(runs / "reader" / "final.pt", CPU)
    plain = pictures_of(model_of(runs / "csnet" / "final.pt", CPU), data.test, CPU)
    assert state["recognition"] > 80
    assert recognition(reader, plain, CPU) > 50
    for name, settings in (
        ("adversarial", {"beta": 4.0, "iterations": 25, "batch": 10, "read_below": 0.0}),
        (
            "ensemble",
            {
                "beta": 20.0,
                "psnr_lost": 0.1,
                "psnr_lost_at_first": 0.1,
                "iterations": 25,
                "learning_readers": 0,
                "surrogates": ("reader",),
            },
        ),
    ):
        out = runs / f"long-{name}"
        model = model_of(train(name, data, runs, out, changed(name, **settings)), CPU)
        assert_read_less_than_noise(reader, pictures_of(model, data.test, CPU), plain, data)


def test_a_retrained_reader_reads_at_least_as_well(data: SmallSet, runs: Path) -> None:
    reader, _ = classifier_of(runs / "reader" / "final.pt", CPU)
    plain = recognition(reader, pictures_of(model_of(runs / "csnet" / "final.pt", CPU), data.test, CPU), CPU)
    run = changed("retrained", iterations=60, check_every=10)
    state = checkpoint.load(train("retrained", data, runs, runs / "long-retrained", run))
    assert state["recognition"] >= plain


def test_a_log_tells_means_of_what_varies_and_what_was_held_back_as_it_was_last_read(
    data: SmallSet, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader is asked every other iteration, and what it answers stands in the rows until it is asked again."""
    run, noted, rows = changed("retrained", check_every=2, learning_rate=0.1), [], {}
    note = Rise.note

    def remembering(self: Rise, accuracy: float, net: nn.Module) -> None:
        noted.append(accuracy)
        note(self, accuracy, net)

    monkeypatch.setattr(Rise, "note", remembering)
    for every in (1, 3):
        monkeypatch.setattr(schedule, "REPORT_EVERY", every)
        train("retrained", data, runs, runs / f"told-{every}", run)
        rows[every] = logged(runs / f"told-{every}")
    assert [float(row["held_back"]) for row in rows[3]] == pytest.approx([noted[0], noted[2]], abs=0.01)
    singly = [float(row["cross_entropy"]) for row in rows[1]]
    assert float(rows[3][0]["cross_entropy"]) == pytest.approx(sum(singly[:3]) / 3, rel=1e-3)


def test_a_reader_that_reads_no_better_ends_before_its_iterations_do(data: SmallSet, runs: Path) -> None:
    run = changed("retrained", iterations=40, check_every=1, patience=2, learning_rate=1e-7)
    state = checkpoint.load(train("retrained", data, runs, runs / "no-better", run))
    assert state["iterations"] == 5
    *_, last = logged(runs / "no-better")
    assert last["iteration"] == "5"


def test_pictures_that_a_kill_left_are_kept_and_the_rest_are_made(data: SmallSet, runs: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(runs / "csnet" / "final.pt", tmp_path))
    originals = Pictures(data.test.x.repeat(3, 1, 1, 1), data.test.y.repeat(3))
    expected = pictures_of(model_of(model, CPU), originals, CPU)
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(lambda _: made_by(model, originals, CPU), range(2)):
            assert torch.equal(made.x, expected.x)
            assert torch.equal(made.y, expected.y)
    (kept,) = model.parent.glob("pictures-*")
    whole, marked = kept.read_bytes(), bytes([7]) * 100 * 1024
    kept.write_bytes(marked + whole[len(marked) : -2000])
    assert len(originals) > 200
    assert torch.equal(made_by(model, originals, CPU).x[:100], torch.full_like(expected.x[:100], 7))
    assert kept.read_bytes() == marked + whole[len(marked) :]
    assert torch.equal(made_by(model, data.test, CPU).x, expected.x[: len(data.test)])
    state = checkpoint.load(model)
    state["net"]["reconstruction.deep.0.bias"] += 0.1
    checkpoint.save(model, state)
    others = made_by(model, originals, CPU)
    assert torch.equal(others.x, pictures_of(model_of(model, CPU), originals, CPU).x)
    assert not torch.equal(others.x, expected.x)


def test_accuracy_that_stops_rising_drops_the_rate_once_and_then_ends() -> None:
    rise, net = Rise(patience=2), nn.Linear(1, 1)
    drops = []
    for number, accuracy in enumerate((50.0, 60.0, 60.0, 59.0, 61.0, 61.0, 61.0)):
        nn.init.constant_(net.weight, number)
        rise.note(accuracy, net)
        drops.append(rise.drops)
    assert drops == [0, 0, 0, 1, 1, 1, 2]
    assert rise.ended
    assert float(rise.weights["weight"]) == 4
    hurried = Rise(patience=2)
    hurried.note(50.0, net)
    hurried.note(50.0, net)
    hurried.lower()
    hurried.note(50.0, net)
    assert hurried.drops == 1
    hurried.note(50.0, net)
    assert hurried.ended


@pytest.mark.parametrize(("passes", "before"), [(0.4, 4), (0.2, 2)])
def test_beta_changes_when_little_was_read_of_the_pictures_that_count(
    passes: float, before: int, data: SmallSet, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "REPORT_EVERY", 1)
    run = changed("adversarial", batch=len(data.train) // 10, read_over=passes)
    rows: list[dict[str, str]] = []
    LOOPS[AdversarialRun](run, data, CPU, runs / f"changes-{passes}", rows.append)
    assert [float(row["beta"]) for row in rows] == [1.0] * before + [0.1] * (6 - before)


def test_a_checkpoint_older_than_a_setting_has_its_default() -> None:
    run = AdversarialRun(extends="csnet", classifier="reader")
    told = schedule.described(run)
    del told["answers"]
    assert schedule.same_settings(told, run)
    assert not schedule.same_settings(told, replace(run, answers="softmax"))
    assert not schedule.same_settings(told | {"beta": 2.0}, run)
    veil = EnsembleRun(extends="csnet", surrogates=("reader",))
    before = schedule.described(veil)
    del before["by_need"], before["moved"]
    assert not schedule.same_settings(before, veil), "it did neither then"
    assert schedule.same_settings(before, replace(veil, by_need=False, moved=False))


def test_answers_through_a_second_softmax_bound_the_adversarial_term(data: SmallSet, runs: Path) -> None:
    """Between log(e + 9) − 1 and log(e + 9): the log of the run shows the term, for β = 1."""
    run = changed("adversarial", answers="softmax", read_below=0.0, batch=10, iterations=30)
    train("adversarial", data, runs, runs / "softmax", run)
    term = float(logged(runs / "softmax")[-1]["classifier"])
    assert -math.log(math.e + 9) <= term <= 1 - math.log(math.e + 9)


@pytest.mark.parametrize(
    ("kind", "content"),
    [("classifier", {"net": {}, "run": {"kind": "csnet"}, "provenance": {}}), ("csnet", {"net": {}, "run": {}})],
)
def test_a_checkpoint_of_another_kind_is_refused(kind: str, content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "final.pt"
    checkpoint.save(path, content)
    with pytest.raises(checkpoint.CheckpointError, match=f"expected a finished one of {kind}"):
        classifier_of(path, CPU) if kind == "classifier" else csnet_of(path, CPU)


def test_weights_of_another_architecture_are_refused(runs: Path, tmp_path: Path) -> None:
    state = checkpoint.load(runs / "reader" / "final.pt")
    state["run"]["network"] = "convnext"
    checkpoint.save(tmp_path / "final.pt", state)
    with pytest.raises(checkpoint.CheckpointError, match="not the weights of convnext"):
        classifier_of(tmp_path / "final.pt", CPU)


def test_a_ratio_without_a_measurement_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('kind = "csnet"\nratio = 0.0005')
    with pytest.raises(SettingsError, match=r"run\.toml: ratio = 0\.0005, expected 0\.001 to"):
        read_run(tmp_path / "run.toml")
    assert floor_rows(0.001) == 1


def test_error_counts_squared_or_by_its_logarithm(data: SmallSet, runs: Path) -> None:
    """Which of the two a log shows by its sign."""
    for fidelity, below_zero in (("error", False), ("psnr", True)):
        out = runs / f"fidelity-{fidelity}"
        train("lean", data, runs, out, changed("lean", fidelity=fidelity, iterations=1, surrogates=("reader",)))
        (row,) = logged(out)
        assert (float(row["reconstruction"]) < 0) is below_zero


def test_steps_cost_what_they_may_and_the_carried_reader_loses_by_them(data: SmallSet, runs: Path) -> None:
    run = changed("steps", iterations=8, batch=20, through=("as is", "median"))
    model = model_of(train("steps", data, runs, runs / "stepped", run), CPU)
    assert [type(way) for way in cast(Steps, model.after).ways] == [nn.Sequential, Median]
    plain = pictures_of(csnet_of(runs / "csnet" / "final.pt", CPU), data.test, CPU)
    stepped = pictures_of(model, data.test, CPU)
    lost = 1 - mean_psnr(stepped, data.test) / mean_psnr(plain, data.test)
    assert lost == pytest.approx(0.05, rel=0.25)
    reader, _ = classifier_of(runs / "reader" / "final.pt", CPU)
    assert_read_less_than_noise(reader, stepped, plain, data)


def test_what_a_refinement_wins_is_spent_on_steps(data: SmallSet, runs: Path, tmp_path: Path) -> None:
    for each in runs.iterdir():
        (tmp_path / each.name).symlink_to(each)
    train("refined", data, tmp_path)
    train("retrained", data, tmp_path, tmp_path / "guide", changed("retrained", model="refined"))
    run = changed("steps", refined="refined", guide="guide", iterations=8, batch=20, psnr_lost=0.02)
    stepped = model_of(train("steps", data, tmp_path, tmp_path / "spent", run), CPU)
    better, _ = refined_of(tmp_path / "refined" / "final.pt", CPU)
    models = csnet_of(runs / "csnet" / "final.pt", CPU), better, stepped
    some = data.train[:100]
    plain, refined, spent = (mean_psnr(pictures_of(model, some, CPU), some) for model in models)
    assert refined > plain + 1
    assert spent == pytest.approx((1 - 0.02) * plain, abs=0.25 * (refined - plain))
    (tmp_path / "another").symlink_to(runs / "csnet")
    for settings, problem in (
        ({"guide": "retrained"}, "guide: retrained learned from pictures of csnet, expected refined"),
        ({"extends": "another"}, "refined: refined refines csnet, expected another"),
        ({"refined": "reader"}, "of a classifier run, expected a finished one of refined"),
    ):
        asked: dict[str, Any] = {"refined": "refined", "guide": "guide", **settings}
        with pytest.raises((SettingsError, checkpoint.CheckpointError), match=problem):
            train("steps", data, tmp_path, tmp_path / "misled", changed("steps", **asked))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"surrogates": ("other",)}, "surrogates: other can't be carried by a decoder"),
        ({"extends": "another"}, "guide: retrained learned from pictures of csnet, expected another"),
        ({"guide": "reader"}, "of a classifier run, expected a finished one of retrained"),
        ({"surrogates": ("retrained",)}, "of a retrained run, expected a finished one of classifier"),
    ],
)
def test_readers_that_no_decoder_can_carry_or_go_by_are_told(
    settings: dict[str, Any], problem: str, data: SmallSet, runs: Path, tmp_path: Path
) -> None:
    for each in runs.iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "another").symlink_to(runs / "csnet")
    with pytest.raises((SettingsError, checkpoint.CheckpointError), match=problem):
        train("steps", data, tmp_path, tmp_path / "uncarried", changed("steps", **settings))
