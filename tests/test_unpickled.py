"""Nothing that ships unpickles what it is given: a file of numbers or weights is never a program."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("protos", "encoder", "decoder", "train", "benchmarks")
NEVER = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
NEEDED = {
    # what is called: the argument that it must be given, and its value
    ("np", "load"): ("allow_pickle", False),
    ("numpy", "load"): ("allow_pickle", False),
    ("format", "read_array"): ("allow_pickle", False),
    ("format", "write_array"): ("allow_pickle", False),
    ("torch", "load"): ("weights_only", True),
}


def problems(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            loads = {alias.name for alias in node.names} & {"load", "read_array"}
            if node.module in ("numpy", "torch", "numpy.lib.format") and loads:
                yield f"line {node.lineno}: {node.module}.{loads.pop()} by another name"
        else:
            names = []
        yield from (f"line {node.lineno}: imports {name}" for name in names if name.partition(".")[0] in NEVER)  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        called = (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""), node.func.attr)
        if called in NEEDED:
            name, value = NEEDED[called]
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if given.get(name) is not value:
                yield f"line {node.lineno}: {'.'.join(called)} without {name}={value}"
        if called == ("jit", "load"):
            yield f"line {node.lineno}: torch.jit.load"


FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def test_no_file_is_unpickled() -> None:
    found = [f"{path.relative_to(ROOT)}: {problem}" for path in FILES for problem in problems(path.read_text())]
    assert not found
    assert len(FILES) > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np; np.load(path)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import numpy; numpy.load(path, allow_pickle=flag)",
        "np.lib.format.read_array(file)",
        "from numpy import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.jit.load(path)",
    ],
)
def test_it_would_be_found(line: str) -> None:
    assert list(problems(line))
