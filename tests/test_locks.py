"""The locks hold what pyproject.toml asks for, by hashes, and the page of licences names all of it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.licences import LOCKS, PAGE, ROOT, locked, rows

EXTRAS = {"service": ["decoder", "openvino"], "test": ["decoder", "openvino", "tensorrt-rtx", "train", "dev"]}


@pytest.mark.parametrize("lock", LOCKS)
def test_what_is_asked_for_is_locked(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for x in EXTRAS[lock] for each in project["optional-dependencies"][x])]
    there = locked(lock)
    for requirement in map(Requirement, asked):
        versions = there.get(canonicalize_name(requirement.name), [])
        if requirement.name == "torch":
            assert not versions
            continue
        assert versions, f"{requirement} isn't in requirements/{lock}.txt: make lock"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: make lock"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_locked_by_hashes(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 20
    assert not [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry]


def test_the_service_is_tested_with_what_the_container_installs() -> None:
    service, test = locked("service"), locked("test")
    assert {name: test[name] for name in service} == service, "make lock"


def test_the_page_of_licences_names_all_that_is_locked() -> None:
    told = re.findall(r"^\| (\S+) \| (.+?) \| (service|test) \| \S.* \|$", PAGE.read_text(), re.MULTILINE)
    assert told == rows(), "run make licences"


def test_the_container_installs_from_the_lock() -> None:
    text = Path(ROOT / "decoder/deploy/Containerfile").read_text()
    assert "--require-hashes --no-deps -r /source/requirements/service.txt" in text
