"""aipod whole: `python -m aipod serve` and `aipod.Client`, with default settings.

    serve --model=CLASS --directory=DIR [--OPTION=VALUE …]    of bench.models, spool and data below DIR
    calls, file, result                                         see bench.peers.common; --level=LEVEL

The server is the command itself, run in this process, with a thread that ends it with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from aipod import Client, Config
from bench.models import describe
from bench.peers import common


def serve(model: str, directory: str, **options: Any) -> None:
    common.end_with_stdin()
    sys.argv[1:] = ["serve", f"bench.models:{model}", "--bind", "127.0.0.1:0", "--reserve", "0"]
    sys.argv += ["--spool", f"{directory}/spool", "--data", f"{directory}/data"]
    for name, value in options.items():
        sys.argv += [f"--{name.replace('_', '-')}", str(value)]
    from aipod.__main__ import main

    main()


def settings(level: int | str | None) -> Config:
    return Config() if level is None else Config(level=level)  # type: ignore[arg-type]


def calls(port: int, count: int, at_once: int) -> common.Report:
    async def run() -> common.Report:
        async with Client(f"127.0.0.1:{port}") as client:
            return await common.time_jobs(client.chaos, count, at_once)

    return asyncio.run(run())


def file(port: int, path: str, level: int | str | None = None) -> common.Report:
    """The file to the model, and its answer."""

    async def run() -> common.Report:
        async with Client(f"127.0.0.1:{port}", config=settings(level)) as client:
            await client.predict(b"warm")
            with common.Clock() as clock:
                answer = await client.predict(path)
            return clock.report() | {"answer": answer, "bytes": answer["size"]}

    return asyncio.run(run())


def result(port: int, path: str, save_to: str) -> common.Report:
    """The model's file, here. `path` is at the server, `save_to` in the client's directory."""

    async def run() -> common.Report:
        method = [("x-func-name", "fetch")]
        async with Client(f"127.0.0.1:{port}") as client:
            await client.predict(b"warm")
            with common.Clock() as clock:
                await client.chaos(metadata=method, save_to=save_to, kwargs={"name": path})
            return clock.report()

    report, answer = asyncio.run(run()), describe(save_to)
    return report | {"answer": answer, "bytes": answer["size"]}


if __name__ == "__main__":
    common.main(serve, {"calls": calls, "file": file, "result": result})
