"""What is shipped for running it: the settings file, the unit, the container file and the dashboard fit the service."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import generate_latest

from decoder.access.keys import init
from decoder.settings import AT_ONCE, Settings, read_settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.decoder.test_web import get

DEPLOY = Path(__file__).parents[2] / "decoder" / "deploy"


def test_the_settings_file_is_the_defaults_and_names_every_setting() -> None:
    text = (DEPLOY / "veilcam.toml").read_text()
    assert read_settings(DEPLOY / "veilcam.toml", {}, {}) == Settings()
    named = re.findall(r"^(?:# )?(\w+) = .*?(#.*)?$", text, re.MULTILINE)
    assert {name for name, _ in named} == set(Settings.model_fields)
    assert {name for name, comment in named if comment.startswith("# *")} == set(AT_ONCE)
    uncommented = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    assert Settings.model_validate(tomllib.loads(uncommented)).record == Path("/var/lib/veilcam/recordings")


def test_the_dashboard_asks_for_metrics_that_there_are_and_shows_all(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    init(tmp_path / "keys")
    pair = {name: tmp_path / "keys" / f"server.{end}" for name, end in (("certificate", "pem"), ("key", "key"))}
    secured = start_service(Settings.model_validate({"port": 0, "http": 0} | pair))
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings"))
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], 1), 1)[0])
    camera.settled(1)
    assert get(f"{service.page}/cameras/camera.jpg")[0] == 200
    told = get(f"{service.page}/metrics")[1].decode() + generate_latest(secured.server.metrics.registry).decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", told, re.MULTILINE))
    there = set(re.findall(r"^(\w+)", told, re.MULTILINE)) | set(kinds)
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"\b(?:veilcam|process)_\w+", expression)}
    assert names <= there
    ours = {name for name in kinds if name.startswith("veilcam_") and not name.endswith("_created")}
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in names}
    assert ours - shown == set(), "no panel shows them"
    camera.bye()


def test_what_the_container_sets_are_settings() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    environment = dict(re.findall(r"(VEILCAM_\w+)=(\S+)", text))
    assert read_settings(None, {}, environment).host == "0.0.0.0"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_the_unit_is_sound(tmp_path: Path) -> None:
    unit = tmp_path / "veilcam-decode.service"
    text = (DEPLOY / "veilcam-decode.service").read_text()
    unit.write_text(text.replace("/opt/veilcam/bin/veilcam-decode", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
