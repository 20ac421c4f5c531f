"""What the author of a model sees: `Model`, `method`, `Context`; and which methods a caller may call.

Standard library only: worker processes import it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
DEFAULT_VERSION = "default"


class Model:
    """Base of a served class: public methods it defines can be called, the hooks below cannot.

    A method is called as `method(context, path, **kwargs)`: `path` is the payload in a file (empty without a payload),
    read-only. It returns anything JSON can hold, `bytes`, or a `pathlib.Path` to a file. A class with only plain
    methods runs in worker processes (threads of the server's with `--runner thread`), one job at a time each; one
    method, `train`, in an instance that runs nothing else, so that the others go on with the former data. A class with
    any `async def` is one instance in the server's process: its async methods run concurrently (trio-flavored unless
    `@method(flavor="asyncio")`), its plain ones in threads.
    """

    version: str = DEFAULT_VERSION
    data_dir: Path = Path()

    def load(self) -> Any:
        """Called once per instance before its first job; `self.version` and `self.data_dir` are set."""

    def warm_up(self) -> Any:
        """Called once after `load`."""

    def close(self) -> Any:
        """Called once when the instance is released."""


RESERVED = frozenset(name for name in vars(Model) if not name.startswith("_")) | {"version", "data_dir"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What `@method(...)` declared."""

    restartable: bool = False
    timeout: float | None = None
    flavor: str = "trio"


def method(*, restartable: bool = False, timeout: float | None = None, flavor: str = "trio") -> Callable[[F], F]:
    """Declare options of an exported method.

    `restartable`: may be run once more after a kill. `timeout`: seconds for one run. `flavor`: of an `async def`,
    "trio" or "asyncio".
    """
    if flavor not in ("trio", "asyncio"):
        raise ValueError(f'flavor={flavor!r} is neither "trio" nor "asyncio"')
    options = Options(restartable, timeout, flavor)

    def mark(function: F) -> F:
        function.__aipod__ = options  # type: ignore[attr-defined]
        return function

    return mark


class Context:
    """What a running method may know and say about its job. All of it may be called from any thread of the model."""

    def __init__(
        self,
        *,
        job_id: str,
        method: str,
        version: str,
        metadata: Mapping[str, str],
        work_dir: str,
        new_version: str,
        timeout: float | None,
        report: Callable[[float | None, str | None, str | None], None],
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """`asked`: whether the end has been asked for, where nobody calls `cancel`."""
        self.job_id = job_id
        self.method = method
        self.version = version
        # The call's metadata, lower-case names, without credentials (see job.request).
        self.metadata = dict(metadata)
        self._work_dir = work_dir
        self._new_version = new_version
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._report = report
        self._asked = asked
        self._cancelled = threading.Event()

    @property
    def work_dir(self) -> Path:
        """A directory of the job's own; removed with the job. A result `Path` inside it is moved, any other copied."""
        path = Path(self._work_dir)
        path.mkdir(exist_ok=True)
        return path

    @property
    def new_version(self) -> Path:
        """A new directory that becomes the data of `version` when the method returns, and vanishes when it raises."""
        path = Path(self._new_version)
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def cancelled(self) -> bool:
        """True once nobody wants the result any more; a method that looks at it can stop early by raising.

        Also once the run is over, for threads that it has left behind.
        """
        if not self._cancelled.is_set() and self._asked():
            self._cancelled.set()
        return self._cancelled.is_set()

    @property
    def deadline(self) -> float | None:
        """Seconds that are left for this run; None where there is no limit."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def progress(self, fraction: float, message: str = "") -> None:
        """Tell the caller how far the run is (0 to 1). Cheap: only the newest one of a tick is sent."""
        # It goes out with every heartbeat: valid UTF-8, and no more than a line.
        line = str(message)[:1000].encode("utf-8", "backslashreplace").decode()
        self._report(min(1.0, max(0.0, float(fraction))), line, None)

    def log(self, text: str) -> None:
        """Append a line to the job's log, which the caller sees."""
        self._report(None, None, str(text))

    def cancel(self) -> None:
        """Set `cancelled`. The runner calls it."""
        self._cancelled.set()


class LoadError(Exception):
    """MODULE:CLASS cannot be served; the text says why and what would be right."""


def load_class(spec: str) -> type:
    """Import `MODULE:CLASS`. Raises `LoadError`; whatever the module itself raises is its cause."""
    module_name, _, class_name = spec.partition(":")
    if not module_name or not class_name:
        raise LoadError(f"{spec!r} is not MODULE:CLASS; write for example  mypackage.mymodule:MyModel")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name and module_name.startswith(exc.name):
            raise LoadError(f"there is no module {exc.name!r}; start where it lies, or set PYTHONPATH") from exc
        raise LoadError(f"importing {module_name} failed: {exc}; install what it needs") from exc
    except Exception as exc:
        raise LoadError(f"importing {module_name} failed: {type(exc).__name__}: {exc}") from exc
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        raise LoadError(f"module {module_name} has no class {class_name!r}")
    check_class(spec, cls)
    return cls


def check_class(spec: str, cls: type) -> None:
    """Raises `LoadError` for a class that nobody could call."""
    if not exported(cls):
        raise LoadError(f"{spec} has no public method to call; define one:  def predict(self, context, path): ...")
    for name in exported(cls):
        _check_parameters(spec, name, getattr(cls, name))


def _check_parameters(spec: str, name: str, function: Callable[..., Any]) -> None:
    """Raises `LoadError` for a method that no call could fit."""
    signature = inspect.signature(function, follow_wrapped=False)
    try:
        taken = signature.bind_partial(None, None, None).arguments
    except TypeError:
        right = f"def {name}(self, context, path)"
        raise LoadError(f"{spec}.{name} takes {signature}; it is called with context and path:  {right}") from None
    for key, parameter in signature.parameters.items():
        required = key not in taken and parameter.default is parameter.empty
        if required and parameter.kind is parameter.POSITIONAL_ONLY:
            raise LoadError(f"{spec}.{name}: parameter {key!r} has no name for its callers; take the / away")
        if required and key == "version" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise LoadError(f"{spec}.{name}: parameter 'version' never comes; context.version has it")


def exported(cls: type) -> dict[str, Options]:
    """The methods that may be called from outside, by name: public functions in the class's own body.

    Not hooks of `Model`, not names with an underscore, nothing inherited: a base class of a library would otherwise
    open its methods to the network. To export an inherited one, name it: `predict = Base.predict`.
    """
    return {
        name: getattr(value, "__aipod__", Options())
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in RESERVED
    }


def is_async(cls: type) -> bool:
    """True where any method in the class's body is `async def`: the class then lives in the server's process."""
    return any(inspect.iscoroutinefunction(value) for value in vars(cls).values())
