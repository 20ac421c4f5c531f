"""A web application around a model: a browser's upload is streamed into a job; progress and answer come back as SSE.

    pip install -e '.[web]'  # in the checkout
    uvicorn aipod.examples.web:app --timeout-graceful-shutdown 5

Without more it has a server of its own, on a free port, which serves `aipod.examples.basics:Echo`; with AIPOD_TO it
calls the one there, which several workers (`--workers`) need: a job is at the server that took it.

A job's ticket owns the job. It is in a cookie, which scripts do not see and other sites do not send: neither URLs nor
logs have it, only the job's id. So a page that is loaded again finds its job. An upload whose browser leaves is given
up, and so is a job whose ticket nobody got. An upload waits in a temporary file (TMPDIR) until the server has it all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

import aipod
from aipod.client import Job

LIMIT = 8 * 1024**3  # bytes of an upload; each takes as much of the disk here while it lasts


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The server, where there is no other, and one client for all requests."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            if not (address := os.environ.get("AIPOD_TO")):
                config = aipod.Config(model="aipod.examples.basics:Echo", bind=("127.0.0.1:0",))
                address = (await stack.enter_async_context(aipod.serving(config))).addresses[0]
            app.state.client = await stack.enter_async_context(aipod.Client(address))
            yield
    except aipod.ServeError as exc:
        if exc.reason == "SERVER_ENDED":  # uvicorn would go on without it; whoever watches it starts it anew
            signal.raise_signal(signal.SIGTERM)
        raise


app = FastAPI(lifespan=lifespan)


@app.exception_handler(aipod.AipodError)
async def explain(request: Request, exc: aipod.AipodError) -> JSONResponse:
    """What the server has refused, or why it is not there."""
    passes = isinstance(exc, aipod.Unreachable | aipod.JobLost) or exc.retry_after is not None
    return JSONResponse({"detail": exc.message, "reason": exc.reason}, 503 if passes else 502)


@app.post("/jobs", status_code=201)
async def submit(request: Request, response: Response) -> dict[str, str]:
    """The body is the payload. Returns when the server has it all."""
    # No form of another site's can send this type, and no script of one without asking.
    if request.headers.get("content-type") != "application/octet-stream":
        raise HTTPException(415, "send the file as application/octet-stream")
    if int(request.headers.get("content-length", "0")) > LIMIT:
        raise HTTPException(413, f"at most {LIMIT} bytes")

    async def body() -> AsyncIterator[bytes]:
        size = 0
        async for piece in request.stream():
            if (size := size + len(piece)) > LIMIT:
                raise HTTPException(413, f"at most {LIMIT} bytes")
            yield piece

    try:
        job = await request.app.state.client.submit("predict", body())
    except ClientDisconnect:
        raise HTTPException(400, "the browser has left") from None  # for the log only
    if await request.is_disconnected():
        await job.cancel()
    where = f"/jobs/{job.id}"
    secure = request.url.scheme == "https"
    response.set_cookie("ticket", str(job), path=where, max_age=86400, httponly=True, secure=secure, samesite="strict")
    return {"job": where}


def owned(job_id: str, request: Request) -> Job:
    """The job of a request's path, if its cookie has the ticket."""
    try:
        job: Job = request.app.state.client.attach(request.cookies.get("ticket", ""))
    except aipod.UsageError:
        raise HTTPException(404, "no job of yours") from None
    if job.id != job_id:
        raise HTTPException(404, "no job of yours")
    return job


@app.get("/jobs/{job_id}")
async def follow(job: Annotated[Job, Depends(owned)]) -> StreamingResponse:
    """Server-sent events: `progress` at least once a second, then `answer` or `failed`.

    An answer of bytes, or a file, is where `answer` says.
    """

    async def events() -> AsyncIterator[str]:
        kind = ""
        try:
            async with contextlib.aclosing(job.events()) as told:
                async for event in told:
                    kind = event.content_type
                    yield sse("progress", phase=event.phase, progress=event.progress, log=event.log, place=event.place)
            if kind == "application/json":
                yield sse("answer", answer=await job.wait())
            else:
                yield sse("answer", at=f"/jobs/{job.id}/answer")
        except aipod.AipodError as exc:
            yield sse("failed", reason=exc.reason, text=exc.message)

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


@app.get("/jobs/{job_id}/answer")
async def answer(job: Annotated[Job, Depends(owned)]) -> StreamingResponse:
    """The answer's bytes, as they come."""
    # Whatever a model has made is not for the browser to show as a page of this site.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(job.chunks(), media_type="application/octet-stream", headers=headers)


@app.delete("/jobs/{job_id}", status_code=204)
async def cancel(job: Annotated[Job, Depends(owned)]) -> None:
    """Stop the job."""
    await job.cancel()


def sse(name: str, **data: object) -> str:
    """One event of the stream; JSON has no line breaks."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


@app.get("/")
async def page() -> HTMLResponse:
    """Uploads a file, and shows what becomes of it, also after a reload."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": "frame-ancestors 'none'"})


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>aipod</title>
<input type="file"> <button id="stop" disabled>Stop</button>
<progress value="0" max="1"></progress> <output></output>
<pre></pre>
<script>
const [input, bar, out, pre] = ["input", "progress", "output", "pre"].map(name => document.querySelector(name))
const stop = document.getElementById("stop")
function follow(job) {
  localStorage.job = job
  stop.disabled = false
  stop.onclick = () => fetch(job, {method: "DELETE"})
  const events = new EventSource(job)
  const end = text => { events.close(); stop.disabled = true; out.value = text }
  const on = (name, then) => events.addEventListener(name, event => then(JSON.parse(event.data)))
  on("progress", told => { out.value = told.phase; bar.value = told.progress; pre.append(told.log) })
  on("answer", told => {
    bar.value = 1
    end("DONE")
    told.at ? location.assign(told.at) : pre.append(JSON.stringify(told.answer))
  })
  on("failed", told => end(`${told.reason}: ${told.text}`))
  events.onopen = () => { pre.textContent = "" }  // the log comes from its beginning
  events.onerror = () => events.readyState == EventSource.CLOSED && end("the job is not there any more")
}
input.onchange = () => {
  const request = new XMLHttpRequest()
  request.upload.onprogress = event => { out.value = "UPLOAD"; bar.value = event.loaded / event.total }
  request.onload = () => request.status == 201 ? follow(JSON.parse(request.response).job) : out.value = request.response
  request.onerror = () => out.value = "the connection was lost; choose the file again"
  request.open("POST", "/jobs")
  request.setRequestHeader("Content-Type", "application/octet-stream")
  request.send(input.files[0])
}
if (localStorage.job) follow(localStorage.job)
</script>
"""
