"""Regenerate `aipod/wire/` from the schema: run `python schema/generate.py` (needs `pip install -e '.[dev]'`).

Writes the betterproto2 dataclasses, and `ai.binpb`, the descriptor set that reflection serves, with gRPC's own health
service in it, whose messages are made from there (`aipod/service/schema.py`). With an argument it writes into that
directory instead; `tests/test_tree.py` compares the two.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCHEMA = Path(__file__).resolve().parent
WIRE = SCHEMA.parent / "aipod" / "wire"


def generate(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SCHEMA}"]
    ours, health = str(SCHEMA / "ai.proto"), str(SCHEMA / "grpc" / "health" / "v1" / "health.proto")
    options = [f"--python_betterproto2_out={out}", "--python_betterproto2_opt=client_generation=none"]
    # protoc looks for its plugin on PATH; it is installed beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for command in ([*protoc, *options, ours], [*protoc, f"--descriptor_set_out={out / 'ai.binpb'}", ours, health]):
        subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else WIRE)
