"""Check that the committed protobuf code is what the compiler makes of the .proto today."""

import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PROTO = "protos/v1/veilcam.proto"


def main() -> int:
    """Compile into a temporary folder and compare every file."""
    # The compiler looks for mypy-protobuf's plugins on the path; they stand beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        if protoc.main(["protoc", f"-I{ROOT}", *outputs, str(ROOT / PROTO)]):
            return 1
        made = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        stale = [path.name for path in made if path.read_bytes() != (ROOT / path.relative_to(folder)).read_bytes()]
    if stale or not made:
        sys.stderr.write(f"not current: {', '.join(stale)}; run make proto\n")
        return 1
    sys.stdout.write(f"{len(made)} generated files are current\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
