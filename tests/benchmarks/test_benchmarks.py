import json
import os
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.cli import app
from benchmarks.damage import KINDS, damaged, message
from benchmarks.fidelity import psnr, ssim
from benchmarks.latency import STAGES
from decoder.catalogue import SHIPPED
from protos.payload import Payload, Plane
from protos.v1 import veilcam_pb2 as pb

CLI = [sys.executable, "-c", "from benchmarks.cli import main; main()"]
SLOWED = os.environ | {"VEILCAM_MAX_FRAME_RATE": "0.5"}
"""A service's limit that what it is measured by doesn't know."""


@pytest.fixture
def folder(photographs: list[NDArray[np.uint8]], tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for index in (0, 4):
        cv2.imwrite(str(path / f"{index}.png"), photographs[index][:, : 437 + index])
    return path


def test_psnr_and_ssim_of_known_cases(photographs: list[NDArray[np.uint8]]) -> None:
    picture = photographs[0]
    brighter = np.asarray(np.minimum(picture.astype(int), 245) + 10, np.uint8)
    assert psnr(picture, picture) == pytest.approx(148.13, abs=0.01)
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert psnr(np.zeros((20, 20), np.uint8), np.full((20, 20), 255, np.uint8)) == pytest.approx(0.0)
    flat = np.full((32, 32), 100, np.uint8), np.full((32, 32), 110, np.uint8)
    # Without structure only the luminance term is left: (2ab + C1) / (a² + b² + C1).
    assert ssim(*flat) == pytest.approx((2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025), rel=1e-6)
    noisy = np.asarray(np.clip(picture + np.random.default_rng(0).normal(0, 20, picture.shape), 0, 255), np.uint8)
    assert 0 < ssim(noisy, picture) < ssim(brighter, picture) < 1


def test_quality_goes_through_the_real_path(folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "quality.json"
    done = subprocess.run([*CLI, "quality", str(folder), "--json", str(result)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(result.read_text())
    assert [row["picture"] for row in told["pictures"]] == ["0.png", "4.png"]
    assert told["psnr"] == pytest.approx(np.mean([row["psnr"] for row in told["pictures"]]))
    assert told["psnr"] > 28
    assert 0.7 < told["ssim"] < 1
    assert 0.05 < told["bpp"] < 0.8
    assert "mean of 2" in done.stdout
    assert told["machine"]["processor"]


def test_more_rows_are_nearer_to_the_picture_and_cost_more(folder: Path, tmp_path: Path) -> None:
    figures = []
    for ratio in ("0.1", "0.25"):
        result = tmp_path / f"{ratio}.json"
        app(["quality", str(folder), "--ratio", ratio, "--json", str(result)], standalone_mode=False)
        figures.append(json.loads(result.read_text()))
    assert figures[1]["psnr"] > figures[0]["psnr"] + 1
    assert figures[1]["bpp"] > figures[0]["bpp"]


def test_latency_has_every_stage_and_the_peer(tmp_path: Path) -> None:
    result = tmp_path / "latency.json"
    source = ["latency", "--source", "pattern:96x64@30#20"]
    done = subprocess.run([*CLI, *source, "--json", str(result)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(result.read_text())
    assert list(told["stages_ms"]) == list(STAGES)
    assert all(0 <= q["median"] <= q["p95"] <= q["p99"] for q in told["stages_ms"].values())
    total = told["stages_ms"]["capture to shown"]["median"]
    assert total >= told["stages_ms"]["reconstruct"]["median"]
    assert told["frames"]["captured"] == 20
    assert told["full_speed_fps"] > 0
    assert told["jpeg"]["bytes"] > told["payload_bytes"] > 0


def test_engines_stand_side_by_side(tmp_path: Path) -> None:
    result = tmp_path / "engines.json"
    arguments = ["engines", "--reconstructor", str(SHIPPED), "--size", "64x48", "--rounds", "1", "--json", str(result)]
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(result.read_text())["reconstructors"]
    assert set(told) == {"plain-r10", "plain-r25", "veil-r10"}
    for engines in told.values():
        assert engines["onnxruntime"]["sizes"]["64x48"]["times_faster"] == 1.0
        assert engines["onnxruntime-int8"]["precision"] == "int8"
        assert engines["onnxruntime-int8"]["sizes"]["64x48"]["median_ms"] > 0


def test_serve_counts_every_frame(tmp_path: Path) -> None:
    result = tmp_path / "serve.json"
    arguments = ["serve", "--cameras", "2", "--viewers", "0", "--size", "64x48", "--seconds", "2"]
    arguments += ["--engine", "onnxruntime", "--json", str(result)]
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=200, env=SLOWED)
    assert done.returncode == 0, done.stderr
    watched, unwatched = json.loads(result.read_text())["rows"]
    assert (watched["cameras"], watched["viewers"]) == (2, 1)
    assert watched["received"] > 10
    assert watched["made"] + watched["dropped"] <= watched["received"] + 4
    assert 0 < watched["latency_ms"]["median"] <= watched["latency_ms"]["p99"]
    assert (unwatched["viewers"], unwatched["made"]) == (0, 0)
    assert unwatched["received"] > 5


def test_faults_leave_the_service_and_a_sound_camera_alone(tmp_path: Path) -> None:
    result = tmp_path / "faults.json"
    arguments = ["faults", "--damaged", "40", "--connects", "4", "--seconds", "1", "--json", str(result)]
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=250, env=SLOWED)
    assert done.returncode == 0, done.stderr
    told = json.loads(result.read_text())
    rows = {row["phase"]: row for row in told["rows"]}
    assert len(rows) == 7
    assert all(row["fps"] > 1 and row["endless"] == 0 for row in rows.values())
    assert set(told["damage"]) == set(KINDS)
    assert sum(rows["another camera, damaged"]["answers"].values()) == 40
    assert rows["cameras and viewers come and go"]["answers"] == {"shown, OK": 2, "shown, cut": 2}
    assert rows["an engine that raises"]["answers"] == {"shown": 40, "not shown": 40, "INTERNAL": 10}
    assert rows["viewers that don't read"]["answers"]["let go"] > 8
    assert told["stop"]["code"] == 0
    assert told["problems"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_done_to_a_copy_and_is_the_same_for_the_same_seed(kind: str) -> None:
    payload = Payload("0" * 16, 16, (Plane(np.arange(60, dtype=np.int16).reshape(3, 4, 5)),)).pack()
    sound = pb.Frame(
        sequence=7, capture_time_ns=1, planes=[pb.PLANE_KIND_LUMA], kind=pb.FRAME_KIND_KEY, payload=payload
    )
    before = sound.SerializeToString()
    once, twice = (damaged(sound, kind, random.Random(3)) for _ in range(2))
    assert once == twice
    assert sound.SerializeToString() == before
    assert once != message(sound)


def test_demo_ends_by_itself_with_figures_and_a_picture(tmp_path: Path) -> None:
    arguments = ["demo", "--source", "pattern:160x128@12#30", "--seconds", "30", "--out", str(tmp_path)]
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["frames_captured"] == 30
    assert told["frames_sent"] == told["frames_shown"] + told["frames_dropped"]
    assert told["frames_shown"] > 0
    assert 0 < told["latency_ms"]["median"] <= told["latency_ms"]["p95"] <= told["latency_ms"]["p99"]
    assert told["psnr_plain"] > told["psnr_veiled"] > 12
    assert told["kbit_s"] > 0
    picture = cv2.imread(told["picture"], cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    assert picture.shape == (128 + 28, 3 * 160 + 2 * 6)
    assert "watch it: http://127.0.0.1:" in done.stderr
    assert str(told["picture"]) in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["quality", "absent"], 2, "absent: no such folder"),
        (["quality", ".", "--json", "absent/x.json"], 2, "--json absent/x.json: expected a file"),
        (["latency", "--source", "pattern:64x64"], 2, "doesn't end"),
        (["quality", ".", "--ratio", "0.9"], 2, "ratio 0.9"),
        (["quality", ".", "--reconstructor", "absent.onnx"], 2, "absent.onnx: no reconstructor"),
        (["quality", ".", "--engine", "abacus"], 2, "engine 'abacus'"),
        (["engines", "--size", "large"], 2, "--size large: expected WIDTHxHEIGHT"),
        (["serve", "--size", "large"], 2, "--size large: expected WIDTHxHEIGHT"),
        (["engines", "--reconstructor", "absent.onnx"], 2, "absent.onnx: no reconstructor"),
        (["latency", "--source", "absent.mp4"], 2, "absent.mp4: no such video file"),
        (["demo", "--source", "absent.mp4"], 2, "absent.mp4: no such video file"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, problem: str, tmp_path: Path
) -> None:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == code
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
