"""Regenerate `aipod/wire/` from `schema/ai.proto`: run `python schema/generate.py` (needs `pip install aipod[dev]`).

Writes the betterproto2 dataclasses, and `ai.binpb`, the descriptor set that reflection serves. With an argument it
writes into that directory instead; `tests/test_tree.py` compares the two.
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
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{SCHEMA}",
        f"--python_betterproto2_out={out}", "--python_betterproto2_opt=client_generation=none",
        f"--descriptor_set_out={out / 'ai.binpb'}", str(SCHEMA / "ai.proto"),
    ]  # fmt: skip
    # protoc looks for its plugin on PATH; it is installed beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else WIRE)
