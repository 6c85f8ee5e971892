"""The report of finished runs: figures, targets, and what it doubts of itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.schedules import FILES, command, write_schedule
from train import checkpoint
from train.evaluation.small import (
    AS_IS,
    BLUR,
    ITSELF,
    NOISE,
    PURIFIERS,
)
from train.loops.schedule import fingerprints
from train.report import printed
from train.report.figures import draw_trade
from train.report.tables import ablation, doubts, lost, mapped_back, render, targets
from train.reproduce import SCHEDULES, Schedule


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small schedules in the place of those that ship, one folder each."""
    folder = tmp_path / "plans"
    for name in SCHEDULES:
        write_schedule(folder / name)
    monkeypatch.setattr("train.reproduce.RUN_FILES", folder)
    return folder


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
    assert "| CSNet: PSNR at r = 0.2, dB (within 0.3 of the paper's) | ≥ 28.21 | – | not measured |" in page
    assert "\n\nNot measured, or not at every ratio: Adv-CSNet-E; Adv-CSNet-S.\n" in page
    assert "Not run yet: `veilcam-train reproduce --schedule full`" in page
    assert paper["figures"]
    for figure in paper["figures"]:
        assert (tmp_path / "paper" / figure["file"]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "paper" / "reduced" / "csnet-r10.csv").read_text().startswith("iteration,loss")
    assert "inception-retrained-on-adv-csnet-e-r10" in paper["schedules"]["reduced"]["retrained"]
    looked = paper["schedules"]["reduced"]["models"]["adv-csnet-e-r10"]["recognition"]["inception"]
    assert looked[ITSELF].keys() == {AS_IS, *PURIFIERS}, "a reader that is retrained looks closely"
    assert looked.keys() == {ITSELF, NOISE, BLUR}


def test_a_report_keeps_what_was_told_of_runs_that_are_elsewhere(
    done: tuple[Schedule, Path], plans: Path, tmp_path: Path, data_folder: Path
) -> None:
    _, runs = done
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
    page = tmp_path / "docs" / "paper.md"
    assert "settings changed" not in page.read_text()
    (plans / "reduced" / "adv-csnet-vgg-r10.toml").write_text(FILES["adv-csnet-vgg-r10"] + "beta = 0.5")
    assert models() == everything
    changed = "- adv-csnet-vgg-r10: trained before settings changed (beta was 1.0, is 0.5)."
    assert changed in page.read_text()
    assert models() == everything
    assert changed in page.read_text(), "told each time"
    (plans / "reduced" / "adv-csnet-vgg-r10.toml").unlink()
    assert models() == everything - {"adv-csnet-vgg-r10"}
    assert changed not in page.read_text()
    assert figure5()[0] == {"csnet-r10"}, "it showed what is told of no more; the rest of it isn't here"
    other = tmp_path / "runs" / "reduced" / "inception" / "final.pt"
    as_it_was = other.read_bytes()
    checkpoint.save(other, checkpoint.load(other) | {"recognition": 1.0})
    shutil.rmtree(tmp_path / "runs" / "reduced" / "inception-retrained-on-adv-csnet-e-r10")
    assert models() == everything - {"adv-csnet-vgg-r10"}
    assert "- adv-csnet-e-r10, csnet-r10, inception-retrained-on-adv-csnet-e-r10: from an earlier" in page.read_text()
    evaluation = tmp_path / "runs" / "reduced" / "csnet-r10" / "evaluation.json"
    measured = json.loads(evaluation.read_text())
    evaluation.write_text(
        json.dumps(measured | {"needs": fingerprints(tmp_path / "runs" / "reduced", measured["needs"])})
    )
    others = (
        "- adv-csnet-e-r10, inception-retrained-on-adv-csnet-e-r10: from an earlier report, made from or measured with "
        "other runs of inception than the rest."
    )
    for _ in range(2):
        assert models() == everything - {"adv-csnet-vgg-r10"}
        assert others in page.read_text(), "told each time"
    (row,) = (line for line in page.read_text().splitlines() if "| from its own weights |" in line)
    assert " | – | " not in row, "both are of one earlier report"
    paper = json.loads((tmp_path / "docs" / "paper.json").read_text())
    for name in ("csnet-r10", "inception"):  # so that there is something to report whatever of the other is gone
        shutil.copytree(runs / name, tmp_path / "runs" / "short" / name)
    other.unlink()
    assert models() == everything - {"adv-csnet-vgg-r10"}
    assert "other runs of inception than the rest" in page.read_text(), "told though neither of the two runs is there"
    other.write_bytes(as_it_was)
    evaluation.write_text(json.dumps(measured))
    assert models() == everything - {"adv-csnet-vgg-r10"}
    assert "from an earlier report" not in page.read_text(), "the run that they were measured with is back"
    plain = tmp_path / "runs" / "reduced" / "csnet-r10" / "final.pt"
    shown = figure5()
    state = checkpoint.load(plain)
    state["net"]["reconstruction.initial.weight"] *= 0.5
    checkpoint.save(plain, state)
    evaluation.unlink()
    assert models() == everything - {"adv-csnet-vgg-r10"}
    assert figure5() == shown, "no picture of weights that nothing is told of"
    paper["schedules"]["reduced"]["models"]["adv-csnet-e-r10"]["needs"]["inception"] = "another"
    (row,) = (line for line in render(paper).splitlines() if "| from its own weights |" in line)
    assert " | – | " in row, "what that reader read before isn't known"


def test_a_report_may_begin_with_a_classifier_alone(
    done: tuple[Schedule, Path], plans: Path, tmp_path: Path, data_folder: Path
) -> None:
    shutil.copytree(done[1] / "inception", tmp_path / "runs" / "full" / "inception")
    asked = ("report", "--data", data_folder, "--docs", tmp_path / "docs", "--runs", tmp_path / "runs")
    code, output = command(*asked)
    assert code == 0, output
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "| [inception](../train/runs/paper/full/inception.toml) | cifar10 |" in page
    assert "schedule short`" in page
    assert "schedule full`" not in page


def test_a_csnet_is_told_of_before_any_classifier_is_trained(
    done: tuple[Schedule, Path], plans: Path, tmp_path: Path, data_folder: Path
) -> None:
    _, runs = done
    there = tmp_path / "runs" / "full" / "csnet-r10"
    shutil.copytree(runs / "csnet-r10", there)
    measured = json.loads((there / "evaluation.json").read_text())
    (there / "evaluation.json").unlink()
    asked = ("report", "--data", data_folder, "--docs", tmp_path / "docs", "--runs", tmp_path / "runs")

    def model() -> tuple[dict[str, Any], str]:
        code, output = command(*asked)
        assert code == 0, output
        paper = json.loads((tmp_path / "docs" / "paper.json").read_text())
        return paper["schedules"]["full"]["models"]["csnet-r10"], (tmp_path / "docs" / "paper.md").read_text()

    told, page = model()
    assert told["recognition"] == {}
    assert told["psnr"][ITSELF] == pytest.approx(measured["psnr"][ITSELF], abs=1e-4)
    assert told["ssim"][ITSELF] == pytest.approx(measured["ssim"][ITSELF], abs=1e-5)
    ours = told["psnr"][ITSELF]
    assert f"| CSNet: PSNR at r = 0.1, dB (within 0.3 of the paper's) | ≥ 24.71 | {ours:.2f} |" in page
    assert "| CSNet | – (28.92) |" in page
    assert "- csnet-r10: trained, but no classifier has read its pictures yet." in page
    for run in (path.name for path in runs.iterdir() if path.is_dir() and path.name != "csnet-r10"):
        shutil.copytree(runs / run, there.parent / run)
    (there / "evaluation.json").write_text(json.dumps(measured))
    assert model()[0]["recognition"] == measured["recognition"]
    shutil.rmtree(there.parent / "inception")
    log = tmp_path / "docs" / "paper" / "full" / "csnet-r10.csv"
    of_what_is_told = log.read_bytes()
    (there / "log.csv").write_text("iteration,loss\n1,2.0\n")
    assert model()[0]["recognition"] == measured["recognition"], "an earlier report told more"
    assert log.read_bytes() == of_what_is_told


def told(**recognition: float) -> dict[str, Any]:
    """A schedule in which every model keeps its PSNR and each reader reads as said, controls 60 %."""
    readers = ("vgg16", "resnet110", "mobilenet_v2", "densenet", "convnext", "vit")

    def table(value: float) -> dict[str, Any]:
        ways = {AS_IS: value} | dict.fromkeys(PURIFIERS, value)
        return {reader: {ITSELF: ways, NOISE: {AS_IS: 60.0}, BLUR: {AS_IS: 60.0}} for reader in readers}

    models = {}
    for ratio, fidelity in ((10, 25.0), (20, 28.5), (30, 31.2)):
        ours = recognition.get("ours", 10.0)
        for name, value in {
            "csnet": 50.0,
            "adv-csnet-e": ours,
            "adv-csnet-s": ours,
        }.items():
            psnr_of = {ITSELF: fidelity * (0.99 if name != "csnet" else 1.0), NOISE: fidelity, BLUR: fidelity}
            models[f"{name}-r{ratio}"] = {"run": {"data": "cifar10"}, "psnr": psnr_of, "recognition": table(value)}
    classifiers = {reader: {"run": {"network": reader}, "recognition": 92.0} for reader in readers}
    return {"models": models, "classifiers": classifiers, "retrained": {}}


def test_targets_are_judged_by_their_numbers() -> None:
    reached = {(target.model, target.what): target for target in targets(told())}
    assert [target.missed_by for target in reached.values()] == [0.0] * 15
    ours = "Adv-CSNet-E"
    assert reached[ours, "PSNR lost, %"].ours == pytest.approx(1.0)
    missed = {(target.model, target.what): target.missed_by for target in targets(told(ours=12.6))}
    assert missed[ours, "VGG-16 and ResNet-110, mean over the ratios, %"] == pytest.approx(0.1)
    assert missed[ours, "four judges that it never saw, %"] == 0
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
    below = told(ours=8.0)
    below["retrained"] = {
        f"vgg16-retrained-on-{model}": {"iterations": iterations, "run": {"reader": "vgg16", "iterations": 800}}
        for model, iterations in (("cut", 800), ("ended", 700))
    }
    unmapped, cut = doubts(below)
    assert unmapped.startswith("Adv-CSNet-E, r = 0.1; Adv-CSNet-E, r = 0.2; Adv-CSNet-E, r = 0.3; Adv-CSNet-S, r = 0.1")
    assert "a reader is below chance" in unmapped
    assert cut.startswith("1 of 2 retrained readers (T4) ended by their limit of iterations")
    for model in below["models"].values():
        model["mapped_back"] = dict.fromkeys(model["recognition"], 20.0)
    assert doubts(below) == [cut]


def test_recognition_is_drawn_against_fidelity_for_every_model(tmp_path: Path) -> None:
    paper = told()
    ours = paper["models"]["csnet-r10"]
    names = [f"{key}-r10" for key in printed.MODELS]
    paper["models"] = {name: ours | {"needs": {name: "a fingerprint"}} for name in names}
    (figure,) = draw_trade("short", paper, tmp_path)
    assert set(figure["runs"]) == set(names)
    assert (tmp_path / figure["file"]).read_bytes().startswith(b"\x89PNG")


def test_answers_mapped_back_are_told_where_they_were_measured() -> None:
    paper = told()
    paper["models"]["adv-csnet-s-r10"]["mapped_back"] = {"vgg16": 21.0, "resnet110": 19.0}
    assert mapped_back(paper, "short")[2:] == ["| Adv-CSNet-S, r = 0.1 | 21.00 | 19.00 | – | – | – | – | – |"]
    assert mapped_back(told(), "short") == []


def test_the_ablation_tells_what_each_run_changed_and_what_that_gave() -> None:
    paper = told()
    assert ablation(paper, "short") == []
    settings = {"kind": "ensemble", "data": "cifar10", "extends": "csnet-r10", "iterations": 800, "batch": 125}
    settings |= {"surrogates": ["a", "b"]}
    base = paper["models"]["adv-csnet-e-r10"] | {"run": settings}
    paper["models"]["adv-csnet-e-r10"] = base
    fewer = {**base, "run": {**settings, "surrogates": ["a"], "likeness": 0.0}}
    paper["models"] |= {"ablation-fewer-r10": fewer, "ablation-base-r10": base}
    head, _, first, second, *_, last = ablation(paper, "short")
    assert head.startswith("| run | changed | PSNR lost, % | vgg16 | resnet110 |")
    assert first.startswith("| [ablation-base-r10](../train/runs/paper/short/ablation-base-r10.toml) |")
    assert "| surrogates = a, likeness = 0.0 | 1.00 | 10.00 |" in second
    assert last == "800 iterations of 125 pictures each, r = 0.1."
    paper["models"]["adv-csnet-e-r10"] = {**base, "run": {**settings, "iterations": 4000}}
    changed = " The first run isn't adv-csnet-e-r10 itself: iterations = 800."
    assert ablation(paper, "short")[-1] == last + changed
    assert not any("ablation" in line for line in doubts(paper))
    stepping = {**base, "run": {**settings, "kind": "steps", "steps": 6, "guide": "it"}}
    once = {**base, "run": {**stepping["run"], "steps": 1, "refined": "", "guide": ""}}
    paper["models"] |= {"adv-csnet-s-r10": stepping, "ablation-s-once-r10": once}
    _, _, first, second, *_ = ablation(paper, "short", "adv-csnet-s-r10")
    assert "short/adv-csnet-s-r10.toml) | nothing | 1.00 |" in first
    assert "short/ablation-s-once-r10.toml) | guide = none, steps = 1 | 1.00 |" in second, (
        "what an older run doesn't tell is no change"
    )
    once["run"]["guide"] = "other"
    for guide, iterations in (("it", 1600), ("other", 800)):
        paper["retrained"][guide] = {"run": {"kind": "retrained", "iterations": iterations}}
    *_, row, _, _ = ablation(paper, "short", "adv-csnet-s-r10")
    assert "| guide = other, steps = 1, its iterations = 800 | 1.00 |" in row
    once["run"]["guide"] = ""
    assert len(ablation(paper, "short")) == len([head, _, first, second, "", last])
