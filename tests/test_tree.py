"""Rules of the tree: layers, doors, public names, fresh generated code."""

import ast
import filecmp
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aipod

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aipod"

# The rows at the top of aipod/__init__.py, lowest last. A module may import from strictly lower rows and from its own
# package (client/, cli/, job/, ...).
ROWS = [
    line.removeprefix("#   ").split("   ")[0].split()
    for line in (PACKAGE / "__init__.py").read_text().splitlines()
    if line.startswith("#   ")
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}

DOORS = {
    "trio_asyncio": {"transport/bridge.py"},
    "h2": {
        "transport/headers.py",
        "transport/connection.py",
        "transport/http2.py",
        "transport/frames.py",
        "transport/protocol.py",
        "transport/stream.py",
        "transport/requests.py",
        "transport/channel.py",
    },
    "hyperframe": {"transport/connection.py", "transport/http2.py"},
    "filelock": {"spool/locks.py"},
    "grpclib.protocol": {"transport/connection.py", "transport/protocol.py", "transport/stream.py"},
}
# Who starts processes: the runners, who starts a server for an application or to show it, and who asks nginx.
PROCESS_DOORS = {"runner/process.py", "embedded.py", "cli/demo.py", "cli/nginx_conf.py"}
PROCESSES = re.compile(
    r"(open|run)_process\(|(import|from) subprocess|multiprocessing|os\.(fork|spawn|posix_spawn|system)"
)


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "wire" not in path.relative_to(PACKAGE).parts]


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, type checking and functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_row() -> None:
    tops = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert tops | {"wire"} == set(ROW_OF)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_strictly_down(path: Path) -> None:
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if top == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "aipod" or len(parts) == 1 or parts[1] not in ROW_OF or parts[1] == top:
            continue
        assert ROW_OF[parts[1]] > ROW_OF[top], f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_doors(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    for door, allowed in DOORS.items():
        if any(module == door or module.startswith(door + ".") for module in imports(path)):
            assert name in allowed, f"{name} imports {door}"
    text = path.read_text()
    if PROCESSES.search(text):
        assert name in PROCESS_DOORS, f"{name} starts processes"
    if not name.startswith("cli/"):
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), f"{name} prints"


def test_public_names_exist_and_are_listed() -> None:
    assert sorted(aipod.__all__) == aipod.__all__
    for name in aipod.__all__:
        # `serve` imports trio_asyncio, which changes asyncio for the whole process: it is looked at in a child.
        if name != "serve":
            assert getattr(aipod, name) is not None
    with pytest.raises(AttributeError):
        _ = aipod.no_such_name


def loaded_after(code: str) -> set[str]:
    check = f"{code}\nimport sys; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split())


def test_a_worker_loads_neither_trio_nor_grpclib() -> None:
    loaded = loaded_after("import aipod.worker")
    assert not loaded & {"trio", "grpclib", "h2", "trio_asyncio", "betterproto2", "zstandard", "asyncio"}


def test_the_client_does_not_load_trio() -> None:
    assert not loaded_after("import aipod; aipod.Client") & {"trio", "trio_asyncio"}


@pytest.mark.parametrize("code", ["aipod.serve; aipod.Client", "aipod.Client; aipod.serve"])
def test_the_server_may_be_imported_before_or_after_the_client(code: str) -> None:
    """Python 3.12+: grpclib binds asyncio.current_task at import, and trio_asyncio replaces it (see bridge)."""
    check = "assert grpclib.utils._current_task is asyncio.current_task"
    assert "trio_asyncio" in loaded_after(f"import aipod; {code}; import asyncio, grpclib.utils; {check}")


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run([sys.executable, str(ROOT / "schema" / "generate.py"), str(tmp_path / "wire")], check=True)
    fresh = {path.relative_to(tmp_path / "wire") for path in (tmp_path / "wire").rglob("*") if path.is_file()}
    kept = {
        path.relative_to(PACKAGE / "wire")
        for path in (PACKAGE / "wire").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert fresh == kept
    for name in sorted(fresh):
        assert filecmp.cmp(tmp_path / "wire" / name, PACKAGE / "wire" / name, shallow=False), (
            f"aipod/wire/{name} is stale; run  python schema/generate.py"
        )


def test_no_file_is_too_long() -> None:
    assert [path.name for path in modules() if len(path.read_text().splitlines()) > 450] == []


def test_every_reason_in_the_code_is_in_the_table() -> None:
    from aipod.errors import TABLE

    used = set()
    for path in modules():
        used |= set(re.findall(r'(?:Refused|job_failed|failure|BadResult)\(\s*"([A-Z_]+)"', path.read_text()))
    assert used - set(TABLE) == set()


def test_every_module_says_what_it_owns() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_modules_import() -> None:
    for name in ("aipod.config", "aipod.errors", "aipod.codec", "aipod.models", "aipod.results"):
        importlib.import_module(name)
