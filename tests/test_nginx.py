"""What `aipod nginx-conf` makes, in a real nginx: where calls go, what cuts them, what callers are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import aipod
from aipod.cli.nginx_conf import version_here
from aipod.cli.nginx_setup import Setup, Upstream
from aipod.cli.nginx_template import render
from aipod.client import Event
from aipod.codec import Compressor
from aipod.config import Config
from aipod.errors import UsageError
from aipod.wire.ai import Raw
from tests.conftest import (
    FIRST,
    ROOT,
    Serve,
    Served,
    alive,
    children,
    first_only,
    free_port,
    left_in,
    peak_memory,
    require,
    run,
    wait_until,
)

of_nginx_alone = first_only("it is nginx's, whatever Python is behind it")
MODELS = ("Segment", "Classify", "Report")
LIMIT = 3  # seconds: every timeout in the configuration of the tests that are about timeouts


def derived(
    directory: Path,
    port: int,
    servers: Sequence[str],
    *,
    limit: int = 60,
    setup: Mapping[str, Any] | None = None,
    main: str = "",
    **values: str,
) -> str:
    """The configuration for two servers of each of MODELS, with all times `limit`, and `values` for directives.

    `setup`: what else is told to `aipod nginx-conf`; `main`: lines that come first.
    """
    pairs = zip(servers[::2], servers[1::2], strict=True)
    upstreams = tuple(
        Upstream(model.lower(), tuple(dict.fromkeys(pair)), shared_spool=model != "Report")
        for model, pair in zip(MODELS, pairs, strict=True)
    )
    text = render(
        Setup(
            upstreams=upstreams,
            listen=(f"127.0.0.1:{port}",),
            run_dir=str(directory),
            nginx=version_here(),
            **(setup or {}),
        )
    )
    times = re.findall(r"^ +(\w+_timeout|keepalive_time) \w+;", text, flags=re.MULTILINE)
    assert len(times) == 8, times
    for name in times:
        values.setdefault(name, f"{limit}s")
    for name, value in values.items():
        text, found = re.subn(rf"^( +){name} [^;]+;", f"{name} {value};", text, flags=re.MULTILINE)
        assert found == 1, f"{name}: {found}"
    return main + text


class Nginx:
    """nginx in the foreground, in a directory of its own, on a port of its own."""

    def __init__(self, directory: Path, upstreams: Sequence[str], **values: Any) -> None:
        self.directory = directory
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._command = nginx_command(directory)
        (directory / "nginx.conf").write_text(derived(directory, self.port, upstreams, **values))
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*self._command, "-g", "daemon off;"])
        try:
            wait_until(self._answers)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def log_text(self) -> str:
        return (self.directory / "error.log").read_text()

    def calls(self) -> list[str]:
        return (self.directory / "aipod.log").read_text().splitlines()

    def reload(self) -> None:
        """`nginx -s reload`; returns when the workers of before take no more connections."""
        before = set(children(self.process.pid))
        self._signal("reload")
        wait_until(lambda: all(not alive(pid) or b"shutting down" in command_line(pid) for pid in before))

    def mark_down(self, address: str) -> None:
        """Take a server out of its group, as deploy/README.md says."""
        conf = self.directory / "nginx.conf"
        text = conf.read_text()
        assert f"server {address} " in text
        conf.write_text(text.replace(f"server {address} ", f"server {address} down "))
        self.reload()

    def quit(self) -> None:
        """`nginx -s stop`: connections are closed in the middle of whatever they carry."""
        self._signal("stop")
        self.process.wait(10)

    def _signal(self, word: str) -> None:
        subprocess.run([*self._command, "-s", word], check=True, timeout=10)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(10) == 0, self.log_text()


def nginx_command(directory: Path) -> list[str]:
    program = require("nginx")
    return [program, "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log")]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def proxy(directory: Path, upstreams: Sequence[str], **values: Any) -> Iterator[Nginx]:
    nginx = Nginx(directory, upstreams, **values)
    try:
        yield nginx
    finally:
        nginx.stop()


Group = dict[str, list[Served]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Two servers of each model; the two share spool and data, as the servers of one group do."""
    require("nginx")
    homes = {model: tmp_path_factory.mktemp(model) for model in MODELS}
    with ThreadPoolExecutor(6) as threads:
        starting = {
            model: [
                threads.submit(Served, f"tests.models_proxied:{model}", home, ("--drain", "5"), "127.0.0.1:0")
                for _ in range(2)
            ]
            for model, home in homes.items()
        }
        started = {model: [future.result() for future in futures] for model, futures in starting.items()}
    try:
        yield started
    finally:
        below = [pid for pair in started.values() for served in pair for pid in children(served.process.pid)]
        with ThreadPoolExecutor(6) as threads:
            ends = list(threads.map(Served.stop, [served for pair in started.values() for served in pair]))
        assert ends == [0] * 6
        assert [pid for pid in below if alive(pid)] == []
        assert {model: left_in(pair[0].spool) for model, pair in started.items()} == {model: [] for model in MODELS}


@pytest.fixture(scope="module")
def proxied(servers: Group, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    addresses = [served.address for model in MODELS for served in servers[model]]
    with proxy(tmp_path_factory.mktemp("nginx"), addresses, limit=LIMIT) as nginx:
        yield nginx


def to(upstream: str | None, method: str | None = None) -> list[tuple[str, str]]:
    named = [("x-upstream", upstream), ("x-func-name", method)]
    return [(name, value) for name, value in named if value is not None]


def call(address: str, payload: Any = b"", *, metadata: Sequence[tuple[str, str]] = (), **kwargs: Any) -> Any:
    """One call of chaos by aipod's own client."""

    async def main() -> Any:
        async with aipod.Client(address) as client:
            return await client.chaos(payload, metadata=metadata, **kwargs)

    return run(main)


def stock_call(
    address: str,
    pieces: Sequence[bytes] = (),
    *,
    pause: float = 0,
    metadata: Sequence[tuple[str, str]] = (),
    kwargs: bytes = b"{}",
) -> list[bytes]:
    """One call of chaos by grpcio, as a plain client; all that came back."""
    frame = Compressor(3).frame

    def messages() -> Iterator[bytes]:
        yield bytes(Raw(data=frame(kwargs)))
        for piece in pieces:
            time.sleep(pause)
            yield bytes(Raw(data=frame(piece)))

    with grpc.insecure_channel(address) as channel:
        method = channel.stream_stream("/ai.AI/chaos", response_deserializer=Raw.parse)
        return [raw.data for raw in method(messages(), metadata=list(metadata), timeout=60)]


def refusal(address: str, metadata: Sequence[tuple[str, str]], method: str = "/ai.AI/chaos") -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(method)(iter([b""]), metadata=list(metadata), timeout=20))
    return caught.value


# ---- where calls go


def test_three_models_with_two_servers_each_behind_one_location(servers: Group, proxied: Nginx) -> None:
    async def main() -> None:
        async with aipod.Client(proxied.address) as client:
            for model in MODELS:
                reached = set()
                # nginx leaves out for ten seconds who has not answered in time on a busy machine.
                while reached != {served.process.pid for served in servers[model]}:
                    answer = await client.chaos(b"12345", metadata=to(model.lower()))
                    assert (answer["model"], answer["size"]) == (model.lower(), 5)
                    reached.add(answer["server"])
                    await asyncio.sleep(0.01)

    run(main)


def test_the_default_upstream(proxied: Nginx) -> None:
    assert call(proxied.address)["model"] == "segment"
    assert b'"model":"segment"' in unpacked(stock_call(proxied.address)[-1])
    # To nginx an empty header is none; our own client does not send one.
    assert b'"model":"segment"' in unpacked(stock_call(proxied.address, metadata=to(""))[-1])
    with pytest.raises(UsageError, match="metadata"):
        call(proxied.address, metadata=to(""))


def unpacked(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data).replace(b" ", b"")


def test_the_method_is_chosen_by_a_header(proxied: Nginx) -> None:
    assert call(proxied.address, metadata=to("report", "title"), of="mice") == "A report on mice"
    answer = stock_call(proxied.address, metadata=to("report", "title"), kwargs=b'{"of": "men"}')
    assert unpacked(answer[-1]) == b'"Areportonmen"'


@pytest.mark.parametrize("service", ["", "ai.AI", "liveness"])
def test_health_of_the_upstream_that_is_named(proxied: Nginx, service: str) -> None:
    from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    with grpc.insecure_channel(proxied.address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check", response_deserializer=HealthCheckResponse.FromString
        )
        request = HealthCheckRequest(service=service).SerializeToString()
        assert check(request, metadata=to("report"), timeout=10).status == HealthCheckResponse.SERVING
        assert check(request, timeout=10).status == HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(request, metadata=to("nobody"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    # Mutant seen: what the server, or the proxy, has said of it is not told.
    command = [sys.executable, "-m", "aipod", "health", *filter(None, [service]), "--to", proxied.address]
    done = subprocess.run([*command, "--upstream", "nobody"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    known = f"the server knows no service {service!r}: " if service else ""
    wanted = f"aipod: NOT_FOUND: {known}x-upstream names no upstream of this proxy\n"
    assert (done.returncode, done.stderr) == (1, wanted)
    # Mutant seen: it is told to look at `aipod jobs`, which has no upstreams.
    command = [sys.executable, "-m", "aipod", "jobs", "--to", proxied.address, "--upstream", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    wanted = "aipod: NOT_FOUND: x-upstream names no upstream of this proxy\n"
    assert (done.returncode, done.stderr) == (1, wanted)


def test_what_is_not_listed_is_refused_and_nothing_is_connected(proxied: Nginx, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        port = tcp.getsockname()[1]
        names = ["nobody", "127.0.0.1:22", f"127.0.0.1:{port}", f"localhost:{port}", f"grpc://127.0.0.1:{port}"]
        names += [f"unix:{tmp_path}/s", "segment,classify", "segment classify", "$http_host", "../segment", "default"]
        for name in names:
            with pytest.raises(aipod.Refused, match="names no upstream") as caught:
                call(proxied.address, b"x", metadata=to(name))
            assert caught.value.reason == "NOT_FOUND"
            assert refusal(proxied.address, to(name)).code() is grpc.StatusCode.NOT_FOUND
        # Whatever two headers mean to nginx, they reach nothing that is not listed.
        with contextlib.suppress(aipod.AipodError):
            call(proxied.address, metadata=[*to("segment"), *to(f"127.0.0.1:{port}")])
        for listener in (tcp, unix):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_a_refusal_reaches_a_client_that_is_in_the_middle_of_an_upload(proxied: Nginx, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(16 << 20))
    with pytest.raises(aipod.Refused, match="names no upstream"):
        call(proxied.address, large, metadata=to("nobody"))
    with pytest.raises(aipod.Refused, match="no_such_method"):
        call(proxied.address, large, metadata=to("segment", "no_such_method"))


def test_other_paths_are_unimplemented(proxied: Nginx) -> None:
    for method in ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/ai.Other/chaos", "/"):
        assert refusal(proxied.address, (), method).code() is grpc.StatusCode.UNIMPLEMENTED
    # The page that errors come from cannot be asked for.
    assert refusal(proxied.address, (), "/.grpc-status/0").code() is grpc.StatusCode.UNIMPLEMENTED


# ---- what does not cut a call


@of_nginx_alone
def test_a_job_three_times_as_long_as_every_timeout_is_not_cut(proxied: Nginx) -> None:
    """Long jobs and slow uploads, by aipod's own client and by grpcio, all at the same time."""
    pieces, pause = [os.urandom(1000)] * 2, 1.5 * LIMIT

    async def slowly() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(pause)
            yield piece

    def stock(slow: bool) -> bytes:
        if slow:
            return unpacked(stock_call(proxied.address, pieces, pause=pause, metadata=to("classify"))[-1])
        return unpacked(stock_call(proxied.address, metadata=to("classify"), kwargs=b'{"seconds": 9.1}')[-1])

    async def main() -> None:
        events: list[Event] = []
        async with aipod.Client(proxied.address) as client:
            started = time.monotonic()
            async with asyncio.TaskGroup() as group:
                results = [
                    group.create_task(client.chaos(metadata=to("classify"), seconds=3.04 * LIMIT)),
                    group.create_task(
                        client.chaos(metadata=to("segment"), seconds=3.04 * LIMIT, on_event=events.append)
                    ),
                    group.create_task(client.chaos(slowly(), metadata=to("classify"))),
                    group.create_task(asyncio.to_thread(stock, slow=True)),
                    group.create_task(asyncio.to_thread(stock, slow=False)),
                ]
            assert time.monotonic() - started >= 3 * LIMIT
            own_long, own_worker, own_slow, stock_slow, stock_long = (task.result() for task in results)
            assert own_long["size"] == own_worker["size"] == 0
            assert own_slow["size"] == 2000
            assert b'"size":2000' in stock_slow
            assert b'"size":0' in stock_long
            assert events[-1].heartbeats >= 8
            # The connection is older than keepalive_time: what comes next needs a new one.
            assert (await client.chaos(metadata=to("report")))["model"] == "report"

    run(main)


def test_a_reload_cuts_no_job_and_the_next_call_works(proxied: Nginx, tmp_path: Path) -> None:
    async def main() -> None:
        async with aipod.Client(proxied.address) as client:
            job, begun = working(client, tmp_path / "go")
            await begun.wait()
            await asyncio.to_thread(proxied.reload)
            assert (await client.chaos(metadata=to("report")))["model"] == "report"
            await asyncio.to_thread(proxied.reload)
            assert not job.done()
            (tmp_path / "go").touch()
            assert await job == "waited"
            assert (await client.chaos(metadata=to("classify")))["model"] == "classify"

    run(main)


@of_nginx_alone
def test_a_large_file_up_and_back_bit_for_bit_in_little_memory(servers: Group, proxied: Nginx, tmp_path: Path) -> None:
    """Large enough for what could pile up somewhere to be seen."""
    sent, back = tmp_path / "sent", tmp_path / "back"
    with sent.open("wb") as file:
        for _ in range(256):
            file.write(os.urandom(1 << 20))
    code = (
        "import asyncio, sys, aipod\n"
        "async def main(address, sent, back):\n"
        "    async with aipod.Client(address) as client:\n"
        "        await client.chaos(sent, metadata=[('x-func-name', 'echo')], save_to=back)\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    command = [sys.executable, "-c", code, proxied.address, str(sent), str(back)]
    client = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert client.returncode == 0, client.stderr
    with sent.open("rb") as one, back.open("rb") as two:
        while piece := one.read(1 << 20):
            assert piece == two.read(1 << 20)
        assert two.read() == b""
    peaks = {
        "client": int(client.stdout) / 1024,
        "server": max(peak_memory(served.process.pid) for served in servers["Segment"]),
        "nginx": max(peak_memory(pid) for pid in children(proxied.process.pid)),
    }
    print(peaks)
    assert peaks["client"] < 130
    assert peaks["server"] < 130
    assert peaks["nginx"] < 50


@of_nginx_alone
def test_64_jobs_at_once(servers: Group, proxied: Nginx, tmp_path: Path) -> None:
    """None ends before all are there; both servers have some of them."""
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(200_000))
    meeting = tmp_path / "meeting"
    meeting.mkdir()

    async def main() -> None:
        async with aipod.Client(proxied.address) as client:
            metadata = to("classify", "meet")
            jobs = [client.chaos(payload, metadata=metadata, meeting=str(meeting), count=64) for _ in range(64)]
            assert await asyncio.gather(*jobs) == [200_000] * 64

    run(main)


# ---- what callers are told when something is gone


def everywhere(address: str) -> list[str]:
    """One address for all models."""
    return [address] * 2 * len(MODELS)


def nobody() -> str:
    return f"127.0.0.1:{free_port()}"


def test_a_dead_upstream_is_told_at_once(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(16 << 20))

    async def main() -> None:
        async with aipod.Client(nginx.address, config=Config(attempts=1)) as client:
            # No payload, however small, is completed before the server has answered: certainly nothing ran.
            for payload in (large, b""):
                with pytest.raises(aipod.Unreachable, match="upstream cannot be reached"):
                    await client.chaos(payload)

    with proxy(tmp_path, everywhere(nobody())) as nginx:
        started = time.monotonic()
        error = refusal(nginx.address, ())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "upstream cannot be reached" in error.details()
        run(main)
        assert time.monotonic() - started < 20


@of_nginx_alone
def test_an_upstream_that_comes_back_between_two_attempts(serve: Serve, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(16 << 20))
    address = nobody()

    async def main() -> None:
        events: list[Event] = []
        async with aipod.Client(nginx.address, config=Config(attempts=10)) as client:
            job = asyncio.create_task(client.chaos(large, on_event=events.append))
            await asyncio.to_thread(wait_until, nginx.calls)  # nginx logs a call at its end
            await asyncio.to_thread(serve, "tests.models_proxied:Segment", bind=address)
            assert (await job)["size"] == 16 << 20
        assert [event.phase for event in events].count("CONNECTING") > 1

    with proxy(tmp_path, everywhere(address)) as nginx:
        run(main)


def test_the_other_server_of_a_group_takes_over_from_a_dead_one(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_proxied:Classify")
    with proxy(tmp_path, [served.address, nobody()] * 3) as nginx:

        async def main() -> None:
            async with aipod.Client(nginx.address, config=Config(attempts=1)) as client:
                for _ in range(6):
                    assert (await client.chaos(b"x"))["server"] == served.process.pid

        run(main)


@pytest.mark.parametrize("stock", [False, *([True] if FIRST else [])], ids={False: "own client", True: "grpcio"}.get)
def test_a_server_that_is_killed_while_a_job_runs(serve: Serve, tmp_path: Path, stock: bool) -> None:
    served = serve("tests.models_proxied:Classify")
    with proxy(tmp_path, everywhere(served.address)) as nginx:
        if stock:
            error, seconds = killed_under_grpcio(nginx, served)
            # What nginx makes of it: the reset stream is INTERNAL to a gRPC client, where direct it were UNAVAILABLE.
            assert error.code() is grpc.StatusCode.INTERNAL
        else:
            seconds = run(lambda: killed_under_aipod(nginx, served))
    assert seconds < 10, "not by its silence"


def killed_under_grpcio(nginx: Nginx, served: Served) -> tuple[grpc.RpcError, float]:
    with grpc.insecure_channel(nginx.address) as channel:
        first = bytes(Raw(data=Compressor(3).frame(b'{"seconds": 60}')))
        answers = channel.stream_stream("/ai.AI/chaos")(iter([first]), timeout=30)
        for _ in range(2):
            next(answers)
        served.stop(number=signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
        return caught.value, time.monotonic() - started


async def killed_under_aipod(nginx: Nginx, served: Served) -> float:
    running = asyncio.Event()
    async with aipod.Client(nginx.address, config=Config(reconnect=0.5)) as client:
        job = client.chaos(seconds=60, on_event=lambda event: event.phase == "RUNNING" and running.set())
        task = asyncio.create_task(job)
        await running.wait()
        started = time.monotonic()
        served.stop(number=signal.SIGKILL)
        with pytest.raises(aipod.JobLost, match="may have run"):
            await task
        return time.monotonic() - started


@of_nginx_alone
def test_a_server_that_hangs_is_given_up_by_both_clients(serve: Serve, tmp_path: Path) -> None:
    """Stopped, not killed: only its silence tells."""
    served = serve("tests.models_proxied:Classify")

    async def main() -> None:
        running = asyncio.Event()
        async with aipod.Client(nginx.address, config=Config(silence=60, reconnect=0.5)) as client:
            job = client.chaos(seconds=60, on_event=lambda event: event.phase == "RUNNING" and running.set())
            task = asyncio.create_task(job)
            await running.wait()
            served.process.send_signal(signal.SIGSTOP)
            # Nothing at all comes of this one: nginx's read timeout speaks, before any header.
            second = asyncio.create_task(asyncio.to_thread(refusal, nginx.address, ()))
            with pytest.raises(aipod.JobLost):
                await task
            assert (await second).code() is grpc.StatusCode.UNAVAILABLE

    try:
        with proxy(tmp_path, everywhere(served.address), limit=LIMIT) as nginx:
            run(main)
    finally:
        served.stop(number=signal.SIGKILL)  # its job would go on for the grace time


def test_a_client_that_leaves_cancels_its_job(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_under_test:Async")

    async def main() -> None:
        running = asyncio.Event()
        async with aipod.Client(nginx.address) as client:
            job = asyncio.create_task(
                client.chaos(
                    metadata=to(None, "forever"),
                    mark=str(tmp_path / "mark"),
                    on_event=lambda event: event.phase == "RUNNING" and running.set(),
                )
            )
            await running.wait()
            job.cancel()
            await asyncio.wait([job])
            assert job.cancelled()

    with proxy(tmp_path, everywhere(served.address)) as nginx:
        run(main)
        wait_until((tmp_path / "mark").exists)


@of_nginx_alone
def test_a_server_that_is_marked_down_first_drains_unnoticed(serve: Serve, tmp_path: Path) -> None:
    """Its job finishes, also though nginx reloads and the server leaves; every new call goes to the other one."""
    leaving = serve("tests.models_proxied:Segment", "--drain", "20", directory=home(tmp_path / "leaving"))
    staying = serve("tests.models_proxied:Segment", directory=home(tmp_path / "staying"))

    async def main() -> None:
        async with aipod.Client(nginx.address, config=Config(attempts=1)) as client:
            jobs = [working(client, tmp_path / "go") for _ in range(2)]
            tasks = [task for task, _ in jobs]
            for _, begun in jobs:
                await begun.wait()
            await asyncio.to_thread(nginx.mark_down, leaving.address)
            leaving.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_until, lambda: "draining" in leaving.log_text())
            quick = asyncio.gather(*(client.chaos() for _ in range(4)))
            (tmp_path / "go").touch()
            assert await asyncio.gather(*tasks) == ["waited"] * 2
            assert {answer["server"] for answer in await quick} == {staying.process.pid}
        assert sum(f"at={leaving.address}" in line for line in nginx.calls()) == 1

    with proxy(tmp_path, [leaving.address, staying.address] * 3) as nginx:
        run(main)
    leaving.process.communicate(timeout=20)
    assert leaving.process.returncode == 0, leaving.log_text()


def home(directory: Path) -> Path:
    directory.mkdir()
    return directory


def working(
    client: aipod.Client, go: Path, *, seen: Callable[[Event], None] = lambda event: None
) -> tuple[asyncio.Task[Any], asyncio.Event]:
    """A job that works until the file `go` is there, and an event that is set once it has begun."""
    begun = asyncio.Event()

    def on_event(event: Event) -> None:
        seen(event)
        if event.log:
            begun.set()

    call = client.chaos(metadata=to(None, "wait_for"), file=str(go), on_event=on_event)
    return asyncio.create_task(call), begun


def test_a_draining_server_that_is_alone_refuses_with_its_reason(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_proxied:Segment", "--drain", "20")

    async def main() -> None:
        async with aipod.Client(nginx.address, config=Config(attempts=1)) as client:
            job, begun = working(client, tmp_path / "go")
            await begun.wait()
            served.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_until, lambda: "draining" in served.log_text())
            with pytest.raises(aipod.Refused) as caught:
                await client.chaos()
            assert caught.value.reason == "DRAINING"
            (tmp_path / "go").touch()
            assert await job == "waited"

    with proxy(tmp_path, everywhere(served.address)) as nginx:
        run(main)
    served.process.communicate(timeout=20)
    assert served.process.returncode == 0, served.log_text()


@of_nginx_alone
@pytest.mark.parametrize(
    "values",
    [
        {"http2_max_concurrent_streams": "4"},
        {"keepalive_requests": "5"},
        {"http2_max_concurrent_streams": "4", "keepalive_requests": "20"},
    ],
    ids=["more calls than streams", "a new connection every five calls", "both"],
)
def test_what_nginx_does_not_process_waits_or_is_tried_again(
    serve: Serve, tmp_path: Path, values: dict[str, str]
) -> None:
    """A GOAWAY below the stream's number says that nothing was done for it, however much was sent."""
    served = serve("tests.models_proxied:Classify")

    async def main() -> None:
        async with aipod.Client(nginx.address, config=Config(attempts=10)) as client:
            answers = await asyncio.gather(*(client.chaos(seconds=0.05) for _ in range(64)))
            assert {answer["model"] for answer in answers} == {"classify"}

    with proxy(tmp_path, everywhere(served.address), **values) as nginx:
        run(main)
        passed = [line for line in nginx.calls() if f"at={served.address}" in line]
        assert len({re.search("job=[0-9a-f]{32}", line)[0] for line in passed}) == 64
        assert len(passed) <= 64 + 1, "another call releases what has arrived; it may not be in the log yet"
