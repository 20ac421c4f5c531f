"""An upload and a download as a web developer writes them: httpx to Starlette on uvicorn[standard].

As their documents say: uvicorn with uvloop and httptools and without an access log (https://www.uvicorn.org/settings/);
`request.stream()` for a body that does not fit into memory (https://www.starlette.io/requests/), `FileResponse` for a
file (https://www.starlette.io/responses/); one `httpx.Client`, content from a generator, in pieces of 1 MiB, with its
length in the header, so that it is not chunked (https://www.python-httpx.org/advanced/clients/); `stream` for the
answer. The synchronous client, for it is the faster one.

What comes is written on the loop: a thread for each piece of 64 KiB costs more than to write it to the page cache. The
model's work is in a thread. `--sync-from=BYTES`: a payload of that size is synced once before the model gets it,
because aipod syncs what it has for longer than a second, or 64 MiB of it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import httpx

from bench.models import describe
from bench.peers import common

PIECE = 1 << 20


def _application(directory: str, sync_from: int) -> Any:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    async def upload(request: Request) -> JSONResponse:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            size = 0
            async for data in request.stream():
                file.write(data)
                size += len(data)
            file.flush()
            if size >= sync_from:
                await run_in_threadpool(os.fdatasync, file.fileno())
            return JSONResponse(await run_in_threadpool(describe, file.name))

    async def download(request: Request) -> FileResponse:
        return FileResponse(request.query_params["path"])

    return Starlette(routes=[Route("/file", upload, methods=["POST"]), Route("/result", download)])


def serve(directory: str, sync_from: int) -> None:
    import uvicorn

    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        common.announce(listener.getsockname()[1])
        application = _application(directory, sync_from)
        config = uvicorn.Config(application, loop="uvloop", http="httptools", log_level="warning", access_log=False)
        uvicorn.Server(config).run([listener])


def _pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while data := file.read(PIECE):
            yield data


@contextlib.contextmanager
def _client(port: int) -> Iterator[httpx.Client]:
    """Without a time-out: the model may take its time. With a connection that was used."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False) as client:
        client.post("/file", content=b"warm").raise_for_status()
        yield client


def file(port: int, path: str) -> common.Report:
    with _client(port) as client:
        with common.Clock() as clock:
            length = {"content-length": str(os.stat(path).st_size)}
            response = client.post("/file", content=_pieces(path), headers=length)
            answer = response.raise_for_status().json()
        return clock.report() | {"answer": answer, "bytes": answer["size"]}


def result(port: int, path: str, save_to: str) -> common.Report:
    with _client(port) as client:
        with common.Clock() as clock, open(save_to, "wb", buffering=0) as target:
            with client.stream("GET", "/result", params={"path": path}) as response:
                response.raise_for_status()
                for data in response.iter_raw():
                    target.write(data)
        answer = describe(save_to)
        return clock.report() | {"answer": answer, "bytes": answer["size"]}


if __name__ == "__main__":
    common.main(serve, {"file": file, "result": result})
