"""The house: who may import whom, what the camera may need, and that every module can be imported alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "protos": set(),
    "encoder": {"protos"},
    "decoder": {"protos"},
    "train": {"protos", "encoder"},
    "benchmarks": {"protos", "encoder", "decoder", "train"},
}
"""Room → the rooms that it may import."""
NOT_ON_A_CAMERA = {"torch", "onnx", "onnxruntime", "starlette", "uvicorn", "cryptography", "argon2"}


def modules(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in path.name]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for path in modules(room):
        rooms = {name.split(".")[0] for name in imported(path)} & set(ROOMS) - {room}
        assert rooms <= ROOMS[room], f"{path} imports {rooms - ROOMS[room]}"


def test_train_takes_only_sampling_from_the_encoder() -> None:
    for path in modules("train"):
        assert {name for name in imported(path) if name.startswith("encoder")} <= {"encoder.sampling"}, path


@pytest.mark.parametrize("room", ["protos", "encoder"])
def test_the_camera_needs_no_server_or_training_package(room: str) -> None:
    for path in modules(room):
        assert not {name.split(".")[0] for name in imported(path)} & NOT_ON_A_CAMERA, path


def test_no_decoder_module_imports_torch() -> None:
    for path in modules("decoder"):
        assert "torch" not in {name.split(".")[0] for name in imported(path)}, path


def test_every_module_can_be_imported_alone() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in ROOMS
        for path in modules(room)
        if path.name != "__main__.py"
    ]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    for known in [m for m in sys.modules if m.split('.')[0] in {sorted(ROOMS)} and '_pb2' not in m]:\n"
        "        del sys.modules[known]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *names], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_page(room: str) -> None:
    text = (ROOT / room / "README.md").read_text()
    assert "|" in text, "a table of its parts"
    assert len(text.splitlines()) < 60, "one screen"
