"""What a figure was measured on: hardware, versions, commit."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("numpy", "opencv-python-headless", "grpcio", "protobuf", "onnxruntime", "openvino")


def described() -> dict[str, object]:
    """Processor, cores, system, versions and commit, for the head of a table and for its JSON."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def headline(machine: dict[str, object]) -> str:
    """One line of it."""
    versions = machine["versions"]
    assert isinstance(versions, dict)
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    hardware = f"{machine['processor']}, {machine['cores']} cores"
    return f"{hardware}; Python {machine['python']}, {told}; commit {machine['commit']}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    asked = [git, "describe", "--always", "--dirty=+", "--abbrev=12"]
    answer = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
