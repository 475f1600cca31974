"""Make the Python modules of `jaxserve/server/protos`, in place: `uv run scripts/generate_protos.py`.

The generated modules import one another by the proto package's name (`jaxserve.v1`), which is no Python
package; the only change made to protoc's output is that line.
"""

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent.parent / "jaxserve" / "server" / "protos"
PYTHON_PACKAGE = "jaxserve.server.protos"


def generate(out: Path) -> list[Path]:
    """Write the modules of every proto under PROTO_ROOT to `out`; returns their paths, relative to either.

    Raises:
        RuntimeError: if protoc refuses a file; what it said is on stderr.
    """
    protos = sorted(path.relative_to(PROTO_ROOT).as_posix() for path in PROTO_ROOT.rglob("*.proto"))
    bundled = str(resources.files("grpc_tools") / "_proto")
    flags = [
        f"-I{PROTO_ROOT}",
        f"-I{bundled}",
        *(f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")),
    ]
    if protoc.main(["protoc", *flags, *protos]) != 0:
        raise RuntimeError(f"protoc refused one of {', '.join(protos)}")
    written = sorted(path for path in out.rglob("*_pb2*") if path.suffix in {".py", ".pyi"})
    for path in written:
        text = path.read_text(encoding="utf-8")
        path.write_text(
            text.replace("from jaxserve.v1 import", f"from {PYTHON_PACKAGE}.jaxserve.v1 import"),
            encoding="utf-8",
        )
    return [path.relative_to(out) for path in written]


def main() -> int:
    """Generate into the source tree and name what was written."""
    with tempfile.TemporaryDirectory() as folder:
        for path in generate(Path(folder)):
            (PROTO_ROOT / path).write_bytes((Path(folder) / path).read_bytes())
            print(PROTO_ROOT / path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
