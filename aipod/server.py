"""The server's life: spool, pool, listeners, then a drain.

This is trio; `transport.bridge` hosts grpclib's asyncio server in it. The nurseries, from the outside in: the pool's
(instances that shut down), the jobs', the calls', and one in each call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import resource
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import outcome
import trio

from aipod.codec import spool_name
from aipod.config import Config, state_home
from aipod.errors import TABLE, ServeError, bare, why
from aipod.identity import Identities
from aipod.methods import describe
from aipod.metrics import Metrics
from aipod.models import LoadError, check_class
from aipod.pool import MakeRunner, Pool, open_pool
from aipod.restarts import Restarts
from aipod.runner import Description, load_failed
from aipod.runner.capture import captured
from aipod.runner.loop import LoopRunner, ThreadRunner
from aipod.runner.process import ProcessRunner
from aipod.service.ai import AI
from aipod.service.health import ServingStatus
from aipod.service.reflection import with_reflection
from aipod.spool import Spool, Sweeper
from aipod.transport import bridge
from aipod.transport.listeners import Given, Listener, is_loopback, open_metrics_socket, open_sockets
from aipod.transport.server import Server
from aipod.trash import remove
from aipod.versions import Versions, check_version

log = logging.getLogger("aipod.server")
T = TypeVar("T")

# Seconds between sweeps for uploads that nobody came back to.
SWEEP = 30.0
# Seconds that peers get to take the last trailers and GOAWAY, and to close: when nothing hurries, and when it does.
LINGER = 2.0
LINGER_AT_ONCE = 0.5
# A connection takes one descriptor, a job two in line (its lock and its journal), three while it uploads, and one more
# for a moment.
FILES_PER_CONNECTION = 5
# What a server has open besides: its listeners, its loop, its workers.
RESERVED_FILES = 32


async def serve(
    config: Config,
    *,
    cls: type | None = None,
    stop: trio.Event | None = None,
    sockets: Given = (),
    files: int = 0,
    say: Callable[[str], None] = log.debug,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `config.model` until `stop` is set or the task is cancelled.

    This is a trio-flavored async function: `await nursery.start(serve, config)` returns the addresses once health
    answers, or none where `stop` was set before. `stop` begins a drain: health NOT_SERVING, new jobs refused, running
    ones get `config.drain` seconds, the instances' `close` hooks run, and it returns. Cancelled: the same with no time
    for jobs. `cls`: the class itself instead of its name, which `config.model` then need not be; it runs in this
    process (runner thread or loop). `sockets`: listening ones, each with a name, instead of those of `config.bind`;
    they are closed at the end, and others may accept connections on them. `files`: how many files a worker may have
    open; 0 is as many as this process. `say` is told what goes on, once a second at most.

    Signals, limits and logging stay the caller's. The one thing that it changes in the process, and only while a model
    runs inside it: what the model prints and logs is its job's too (see `runner.capture`).
    Raises `ServeError` (also its `BindError` and `spool.SpoolError`), `JobFailed` (the class does not load) and
    `UsageError` (a file of `config` cannot be used); by themselves, in no ExceptionGroup but those of the caller's own.
    """
    if stop is None:
        stop = trio.Event()
    if cls is not None and not config.model:
        config = dataclasses.replace(config, model=f"{cls.__module__}:{cls.__name__}")
    if not config.model:
        raise ServeError(
            "NO_MODEL", 'there is nothing to serve; name a class: Config(model="mypackage.mymodule:MyModel")'
        )
    identities = await trio.to_thread.run_sync(_identities, config)
    with (
        bare(),
        open_sockets(config, sockets) as listeners,
        open_metrics_socket(config, shared=config.reuse_port or bool(sockets)) as metrics_socket,
        _home(config) as (spool_path, data_path),
        contextlib.ExitStack() as inside,
    ):
        _warn_of_open_tokens(config, listeners)
        say(f"loading {config.model}")
        config = _with_room(config, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        open_disk = functools.partial(trio.to_thread.run_sync, _open_disk, config, spool_path, data_path)
        # One that there is may belong to another app, which is known at once. None is made for a class that is none.
        disk = await open_disk() if spool_path.exists() else None
        async with bridge.open_loop():
            description = await _unless(stop, _look_at_model, config, cls, files)
            if description is None:
                task_status.started([])
                return
            spool, versions = disk or await open_disk()
            if description.is_async or config.runner == "thread" or cls is not None:
                inside.enter_context(captured())
                make = _inside(config, cls, description, versions)
            else:
                make = _processes(config, spool, versions, files)
            status = ServingStatus(reflection=config.reflection)
            metrics = Metrics(description.methods, TABLE)
            async with (
                open_pool(
                    make,
                    versions.present,
                    shared=description.is_async,
                    at_once=config.concurrency,
                    per_version=config.instances,
                    total=config.max_instances,
                    idle=config.idle,
                    restarts=Restarts(versions.is_known, status.set_ready, metrics),
                ) as pool,
                trio.open_nursery() as jobs,
            ):
                if await _unless(stop, _preload, pool, config.preload) is None:
                    task_status.started([])
                    return
                ai = AI(config, identities, description, pool, spool, versions, jobs, metrics)
                jobs.start_soon(_sweep, Sweeper(spool, upload_ttl=config.upload_ttl, ttl=config.ttl), ai.adopt)
                jobs.start_soon(ai.run)
                services, sockets_ = [ai, status], [one.sock for one in listeners]
                async with _listening(config, identities, services, sockets_, metrics) as server:
                    if metrics_socket is not None:
                        # Not before: it takes memory and time that most servers have better uses for.
                        from aipod.service.figures import Figures, serve_figures

                        figures = Figures(metrics, ai.now, ai.drain, pool, spool, lambda: len(server.protocols))
                        # Who has the port as well takes the next connections: its numbers are others.
                        until = stop if any(listener.shared for listener in listeners) else None
                        jobs.start_soon(serve_figures, metrics_socket, figures, until)
                    task_status.started([listener.name for listener in listeners])
                    try:
                        await stop.wait()
                        status.stop_serving()
                        # Where others accept connections on the same address, they do it better from now on. One
                        # that is alone has callers who ask for their jobs, and for its health.
                        shared = [listener for listener in listeners if listener.shared]
                        for listener in shared:
                            listener.hold_back()
                        await bridge.to_trio(server.leave)([listener.sock for listener in shared])
                        for listener in shared:
                            listener.sock.close()
                        log.info("draining: at most %g s for running jobs", config.drain)
                        began = trio.current_time()
                        await ai.drain.run(config.drain, say)
                        log.info("drained in %.3f s; closing the instances", trio.current_time() - began)
                        say("closing the instances")
                    finally:
                        status.close()
                        server.stop_listening()
                        for listener in listeners:  # else callers would wait in the backlog while models close
                            listener.sock.close()
                        with trio.move_on_after(LINGER_AT_ONCE, shield=True):
                            await _emptied(server)
                        with trio.move_on_after(LINGER):
                            await _emptied(server)
                jobs.cancel_scope.cancel()


def _identities(config: Config) -> Identities:
    return Identities(config.tokens, certificates=bool(config.tls_cert and config.tls_ca))


async def _preload(pool: Pool, names: tuple[str, ...]) -> bool:
    for version in map(check_version, names):
        began = trio.current_time()
        await pool.preload(version)
        log.info("version %s is loaded, in %.3f s", version, trio.current_time() - began)
    return True


async def _emptied(server: Server) -> None:
    """Wait until the peers, which have been told that this is the end, have closed their connections."""
    while server.protocols:  # noqa: ASYNC110 - once in its life
        await trio.sleep(0.02)


async def _unless(stop: trio.Event, fn: Callable[..., Awaitable[T]], *args: Any) -> T | None:
    """`await fn(*args)`, or None where `stop` is set before it is done. This is a trio-flavored async function."""
    async with trio.open_nursery() as nursery:

        async def cancel_when_set() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel_when_set)
        result = await outcome.acapture(fn, *args)
        nursery.cancel_scope.cancel()
    return None if stop.is_set() else result.unwrap()


def _open_disk(config: Config, spool_path: Path, data_path: Path) -> tuple[Spool, Versions]:
    measure = bool(config.metrics)
    spool = Spool.open(spool_path, config.app, reserve=config.reserve, max_spool=config.max_spool, measure=measure)
    if spool.free() < spool.reserve:
        text = "spool %s: %d bytes are free, fewer than the %d that uploads must leave (--reserve): all are refused"
        log.warning(text, spool_path, spool.free(), spool.reserve)
    versions = Versions(data_path, f"{spool_name(spool.id)}.")
    try:
        versions.sweep(spool.is_held)
    except OSError as exc:
        raise ServeError(
            "DATA_UNUSABLE", f"data directory {data_path}: {why(exc)}; choose another with --data"
        ) from exc
    return spool, versions


def _with_room(config: Config, files: int) -> Config:
    """`config` with as many connections, and as many jobs, as a process that may have `files` open can serve."""
    room = max(1, (files - RESERVED_FILES) // FILES_PER_CONNECTION)
    connections, jobs = min(config.max_connections or room, room), min(config.max_jobs, room)
    if files == resource.RLIM_INFINITY or (connections, jobs) == (config.max_connections, config.max_jobs):
        return config
    text = "at most %d connections and %d jobs at once: this process may have only %d files open (ulimit -n)"
    default = Config()
    asked = config.max_connections not in (connections, default.max_connections)
    asked = asked or config.max_jobs not in (jobs, default.max_jobs)
    log.log(logging.WARNING if asked else logging.INFO, text, connections, jobs, files)
    return dataclasses.replace(config, max_connections=connections, max_jobs=jobs)


async def _look_at_model(config: Config, cls: type | None, files: int) -> Description:
    """Have a worker import the class and tell what it is: the server never imports a user's heavy module unasked."""
    if cls is not None:
        if config.runner == "process":
            raise ServeError("BAD_RUNNER", f"{config.model} is given as a class, which no worker process can import")
        try:
            check_class(config.model, cls)
        except LoadError as exc:
            raise await load_failed(exc) from None
        description = Description.of(describe(cls))
    else:
        description = await ProcessRunner(config.model, "", Path(), None, **_bounds(config), files=files).look()
    if config.runner in ("process", "thread") and description.is_async:
        raise ServeError("BAD_RUNNER", f"{config.model} has async methods; they run on the loop: --runner auto")
    if config.runner == "loop" and not description.is_async:
        description = Description(description.name, description.methods, True)
    return description


def _bounds(config: Config) -> dict[str, float]:
    return {"load_timeout": config.load_timeout, "grace": config.cancel_grace}


def _inside(config: Config, cls: type | None, description: Description, versions: Versions) -> MakeRunner:
    runner = LoopRunner if description.is_async else ThreadRunner
    return lambda version: runner(config.model, version, versions.data_dir(version), **_bounds(config), cls=cls)


def _processes(config: Config, spool: Spool, versions: Versions, files: int) -> MakeRunner:
    return lambda version: ProcessRunner(
        config.model, version, versions.data_dir(version), spool, **_bounds(config), files=files
    )


async def _sweep(sweeper: Sweeper, adopt: Callable[[list[str]], Awaitable[None]]) -> None:
    """At the start and every `SWEEP` seconds, in steps: with 100,000 entries one sweep takes seconds.

    Jobs whose server was killed go on at another one, or at the next, whether anybody asks for them or not.
    """
    while True:
        try:
            steps = sweeper.sweep()
            removed = 0
            while (count := await trio.to_thread.run_sync(next, steps, None)) is not None:
                removed += count
            if removed:
                log.info("removed %d entries that nobody wants any more", removed)
            await adopt(await trio.to_thread.run_sync(sweeper.orphans))
        except Exception as exc:  # whatever it is: without its broom a server goes on for long
            log.error("sweeping failed; trying again in %g s", SWEEP, exc_info=exc)
        await trio.sleep(SWEEP)


@contextlib.asynccontextmanager
async def _listening(
    config: Config, identities: Identities, services: list[Any], sockets: list[socket.socket], metrics: Metrics
) -> AsyncIterator[Server]:
    """grpclib's server on `sockets`; leaving drops what connections there still are."""

    async def start() -> Server:
        shown = with_reflection(services) if config.reflection else services
        server = Server(shown, config, spawner, metrics, knows=identities.knows)
        await server.listen(sockets)
        return server

    async with trio.open_nursery() as calls:
        spawner = bridge.Spawner(calls)
        server = await bridge.to_trio(start)()
        calls.start_soon(server.watch_tls)
        try:
            yield server
        finally:
            server.stop_listening()
            server.abort()
            calls.cancel_scope.cancel()


@contextlib.contextmanager
def _home(config: Config) -> Iterator[tuple[Path, Path]]:
    """The spool and data directories; a temporary spool is removed at the end."""
    # Absolute: a model on the loop may call chdir.
    base = state_home(os.environ).absolute() / config.app
    data = Path(config.data).expanduser().absolute() if config.data else base / "data"
    if config.spool != "tmp":
        yield Path(config.spool).expanduser().absolute() if config.spool else base / "spool", data
        return
    path = Path(tempfile.mkdtemp(prefix="aipod-spool-")).absolute()
    try:
        yield path, data
    finally:
        remove(path)


def _warn_of_open_tokens(config: Config, listeners: list[Listener]) -> None:
    if config.tokens and not config.tls_cert:
        for listener in listeners:
            if listener.sock.family != socket.AF_UNIX and not is_loopback(listener.sock.getsockname()[0]):
                text = "%s: tokens come unencrypted unless a proxy before this server speaks TLS (--tls-cert)"
                log.warning(text, listener.name)
