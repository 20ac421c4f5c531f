"""aipod's plugin for pytest: the fixture `aipod_server`, and a model's traceback in the report of a test that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aipod.testing import Served


@pytest.fixture
def aipod_server() -> Iterator[Callable[..., Served]]:
    """Serves classes for one test: `server = aipod_server(Scan, tick=0.1)`; see `aipod.testing.serve`.

        async def test_scan(aipod_server):
            async with aipod.Client(aipod_server(Scan).address) as client:
                assert await client.predict(b"the word") == ["word"]

    For tests of any flavor: asyncio, trio, or neither.
    """
    from aipod.testing import serve

    with contextlib.ExitStack() as servers:

        def start(model: type | str, **settings: Any) -> Served:
            return servers.enter_context(serve(model, **settings))

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None:
        from aipod.errors import AipodError, leaves

        for leaf in leaves(call.excinfo.value):
            if isinstance(leaf, AipodError) and (trace := leaf.metadata.get("trace")):
                report.sections.append(("In the model", trace))
    return report
