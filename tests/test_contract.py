"""The private names of grpclib, h2 and trio-asyncio that aipod/transport relies on: a new version that moves one fails
here, by name, and not as a puzzle elsewhere."""

from __future__ import annotations

import ast
import asyncio
import collections
import dataclasses
import inspect
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpclib.client
import grpclib.config
import grpclib.protocol
import grpclib.server
import grpclib.stream
import grpclib.utils
import h2.connection
import h2.settings
import h2.stream
import h2.windows
import pytest
from grpclib.const import Cardinality, Handler
from grpclib.health.v1.health_pb2 import HealthCheckRequest
from h2.config import H2Configuration
from h2.events import ConnectionTerminated, StreamReset
from h2.exceptions import InvalidBodyLengthError
from hyperframe.frame import GoAwayFrame

from aipod.config import Config
from aipod.transport.http2 import H2
from aipod.transport.protocol import configuration
from tests.conftest import ROOT, run

base = grpclib.protocol

# owner, name, parameters (without self) as `inspect` shows their names
METHODS: list[tuple[Any, str, tuple[str, ...]]] = [
    (base.Stream, "__init__", ("connection", "h2_connection", "transport", "stream_id", "wrapper")),
    (base.Stream, "send_request", ("headers", "end_stream", "_processor")),
    (base.Stream, "send_headers", ("headers", "end_stream")),
    (base.Stream, "send_data", ("data", "end_stream")),
    (base.Stream, "init_stream", ("stream_id", "connection")),
    (base.Stream, "recv_data", ("size",)),
    (base.Stream, "end", ()),
    (base.Stream, "reset_nowait", ("error_code",)),
    (base.Stream, "__terminated__", ("reason",)),
    (base.Connection, "__init__", ("connection", "transport", "config")),
    (base.Connection, "create_stream", ("stream_id", "wrapper")),
    (base.Connection, "ack", ("stream_id", "size")),
    (base.Connection, "flush", ()),
    (base.Connection, "initialize", ()),
    (base.Connection, "close", ()),
    (base.Connection, "data_send_process", ()),
    (base.Connection, "_ping", ()),
    (base.EventsProcessor, "__init__", ("handler", "connection")),
    (base.EventsProcessor, "register", ("stream",)),
    (base.EventsProcessor, "close", ("reason",)),
    (base.EventsProcessor, "process", ("event",)),
    (base.EventsProcessor, "process_stream_reset", ("event",)),
    (base.EventsProcessor, "process_data_received", ("event",)),
    (base.EventsProcessor, "process_connection_terminated", ("event",)),
    (grpclib.utils, "_current_task", ("loop",)),
    (grpclib.utils.Wrapper, "cancel", ("error",)),
    (grpclib.client.Channel, "_protocol_factory", ()),
    (grpclib.client.Channel, "_create_connection", ()),
    (grpclib.client.Channel, "request",
     ("name", "cardinality", "request_type", "reply_type", "timeout", "deadline", "metadata")),
    (grpclib.client.Stream, "__init__",
     ("channel", "method_name", "metadata", "cardinality", "send_type", "recv_type", "codec", "status_details_codec",
      "dispatch", "deadline")),
    (grpclib.client.Stream, "recv_initial_metadata", ()),
    (grpclib.client.Stream, "recv_trailing_metadata", ()),
    (grpclib.client.Stream, "__aexit__", ("exc_type", "exc_val", "exc_tb")),
    (grpclib.client.Channel, "__connect__", ()),
    (grpclib.client.Stream, "end", ()),
    (grpclib.server.Handler, "__init__", ("mapping", "codec", "status_details_codec", "dispatch")),
    (grpclib.server.Handler, "accept", ("stream", "headers", "release_stream")),
    (grpclib.server.Handler, "cancel", ("stream",)),
    (grpclib.server.Handler, "close", ()),
    (grpclib.server.Server, "_protocol_factory", ()),
    (grpclib.server, "request_handler",
     ("mapping", "_stream", "headers", "codec", "status_details_codec", "dispatch", "release_stream")),
    (grpclib.config.Configuration, "__for_client__", ()),
    (grpclib.config.Configuration, "__for_server__", ()),
    (h2.connection.H2Connection, "__init__", ("config",)),
    (h2.connection.H2Connection, "receive_data", ("data",)),
    (h2.connection.H2Connection, "end_stream", ("stream_id",)),
    (h2.connection.H2Connection, "_begin_new_stream", ("stream_id", "allowed_ids")),
    (h2.connection.H2Connection, "_terminate_connection", ("error_code",)),
    (h2.connection, "_decode_headers", ("decoder", "encoded_header_block")),
    (h2.stream.H2Stream, "receive_headers", ("headers", "end_stream", "header_encoding")),
    (h2.connection.H2Connection, "_receive_settings_frame", ("frame",)),
    (h2.stream.H2Stream, "_initialize_content_length", ("headers",)),
    (h2.stream.H2Stream, "_track_content_length", ("length", "end_stream")),
    (h2.windows.WindowManager, "window_consumed", ("size",)),
    (h2.connection.H2Connection, "initiate_connection", ()),
    (h2.connection.H2Connection, "increment_flow_control_window", ("increment", "stream_id")),
    (h2.settings.Settings, "__init__", ("client", "initial_values")),
]  # fmt: skip

# Class attributes that are read or set. Where grpclib gives a default, it must be this one.
ATTRIBUTES: list[tuple[Any, str, Any]] = [
    (base.Connection, "_close_by_ping_handler", None),
    (base.Connection, "_ping_handle", None),
    (grpclib.client.Channel, "_protocol", None),
    (grpclib.utils.Wrapper, "_error", None),
    (grpclib.client.Handler, "connection_lost", False),
    (grpclib.client.Stream, "_send_request_done", False),
    (grpclib.client.Stream, "_end_done", False),
    (grpclib.server.Stream, "_send_initial_metadata_done", False),
    (grpclib.server.Stream, "_send_trailing_metadata_done", False),
    (grpclib.client.Stream, "_cancel_done", False),
    (grpclib.client.Stream, "_recv_initial_metadata_done", False),
    (grpclib.client.Stream, "_recv_trailing_metadata_done", False),
]

# Set by constructors, or only while a call is under way: looked at on real objects below.
INSTANCE = {
    "_connection", "_transport", "_config", "_h2_connection", "_stream", "_wrapper", "_tasks", "_cancelled",
    "_mapping", "_codec", "_status_details_codec", "_loop", "_settings", "_frame_dispatch_table", "_timers",
    "_timer_handle_cancelled", "_connected", "_headers_buffer", "_preamble_len", "_inbound_flow_control_window_manager",
    "_inbound_window_manager", "_expected_content_length", "_main_loop_one", "_io_task", "_q_recv", "_run", "_raise",
    "_scope", "_closed_streams", "_authority", "_channel", "_deadline", "_metadata", "_method_name", "_recv_type",
    "_release_stream", "_scheme", "_FakedPolicy", "_original_policy",
}  # fmt: skip
CONFIGURATION = {field.name for field in dataclasses.fields(grpclib.config.Configuration)}


def parameters(fn: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(fn).parameters if name != "self")


@pytest.mark.parametrize(("owner", "name", "wanted"), METHODS, ids=lambda value: getattr(value, "__name__", None))
def test_a_method_is_there_with_its_signature(owner: Any, name: str, wanted: tuple[str, ...]) -> None:
    assert parameters(getattr(owner, name)) == wanted


@pytest.mark.parametrize(("owner", "name", "default"), ATTRIBUTES, ids=lambda value: getattr(value, "__name__", None))
def test_an_attribute_is_there_with_its_default(owner: Any, name: str, default: Any) -> None:
    assert vars(owner)[name] is default


def test_what_is_a_coroutine_function_and_what_is_not() -> None:
    for fn in (base.Stream.recv_data, base.Stream.send_data, base.Stream.end, base.Stream.send_request):
        assert inspect.iscoroutinefunction(fn), fn
    for fn in (base.Buffer.read, grpclib.client.Channel._create_connection, grpclib.server.request_handler):
        assert inspect.iscoroutinefunction(fn), fn
    for plain in (base.Stream.reset_nowait, base.Connection._ping, grpclib.server.Handler.accept):
        assert not inspect.iscoroutinefunction(plain), plain
    assert isinstance(vars(grpclib.client.Channel)["_connected"], property)


def test_grpclib_reads_a_prefix_of_five_bytes_and_then_the_body() -> None:
    """H2Stream.recv_data has both ready when the first is asked for."""
    asked = []

    class Stream:
        async def recv_data(self, size: int) -> bytes:
            asked.append(size)
            return b"\0\0\0\0\5" if len(asked) == 1 else b"hello"

    class Codec:
        def decode(self, data: bytes, kind: type) -> bytes:
            return data

    coroutine = grpclib.stream.recv_message(Stream(), Codec(), bytes)  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert (asked, stopped.value.value) == ([5, 5], b"hello")


def test_objects_have_the_attributes_that_their_constructors_set() -> None:
    async def main() -> None:
        connection = h2.connection.H2Connection(H2Configuration(client_side=False))
        grpc = base.Connection(connection, transport := asyncio.Transport(), config=grpclib.config.Configuration())
        assert (grpc._connection, grpc._transport) == (connection, transport)
        assert grpc._config == grpclib.config.Configuration()
        assert isinstance(grpc.write_ready, asyncio.Event)
        assert isinstance(grpc.stream_close_waiter, asyncio.Event)
        stream = grpc.create_stream(stream_id=1)
        assert (stream._h2_connection, stream._transport) == (connection, transport)
        assert isinstance(stream.window_updated, asyncio.Event)
        assert stream.buffer.unacked_size() == 0  # what releasing a stream asks
        handler = grpclib.server.Handler({}, None, None, None)  # type: ignore[arg-type]
        assert (handler._tasks, handler._cancelled) == ({}, set())
        server = grpclib.server.Server([])
        assert server._mapping == {}
        assert {"_codec", "_status_details_codec", "_loop", "__dispatch__"} <= vars(server).keys()
        processor = base.EventsProcessor(handler, grpc)
        assert processor.streams == {}
        assert {StreamReset, ConnectionTerminated} <= processor.processors.keys()

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())


def test_h2_dispatches_frames_by_their_class_and_keeps_settings_in_deques() -> None:
    connection = h2.connection.H2Connection(H2Configuration(client_side=False))
    assert GoAwayFrame in connection._frame_dispatch_table
    assert connection.incoming_buffer._headers_buffer == []
    assert connection.incoming_buffer._preamble_len == len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert connection._inbound_flow_control_window_manager.current_window_size == 65535
    assert isinstance(connection.max_inbound_frame_size, int)
    assert isinstance(connection.decoder.max_header_list_size, int)
    assert isinstance(connection.highest_inbound_stream_id, int)
    closed = H2(H2Configuration(client_side=False))._closed_streams
    assert closed._size_limit == H2.MAX_CLOSED_STREAMS < connection._closed_streams._size_limit  # type: ignore[attr-defined]
    settings = h2.settings.Settings(client=False)._settings
    assert all(isinstance(value, collections.deque) for value in settings.values())


def test_a_stream_of_h2_has_what_frames_are_accounted_in() -> None:
    client = h2.connection.H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    client.send_headers(1, [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":authority", "x")])
    stream = client.streams[1]
    assert stream.state_machine.state is h2.stream.StreamState.OPEN
    assert stream._inbound_window_manager.current_window_size == 65535
    assert (stream.outbound_flow_control_window, client.outbound_flow_control_window) == (65535, 65535)
    assert client.state_machine.state is h2.connection.ConnectionState.CLIENT_OPEN


def test_a_stream_of_h2_has_what_a_content_length_is_kept_in() -> None:
    """And the method that reads it can be replaced on the stream itself."""
    client = h2.connection.H2Connection(H2Configuration(client_side=True))
    server = h2.connection.H2Connection(H2Configuration(client_side=False))
    client.initiate_connection()
    request = [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":authority", "x"), ("content-length", "5")]
    client.send_headers(1, request)
    client.send_headers(3, request)
    seen = []
    begin = server._begin_new_stream

    def begin_new_stream(stream_id: int, allowed_ids: Any) -> Any:
        stream = begin(stream_id, allowed_ids)
        if stream_id == 3:
            vars(stream)["_initialize_content_length"] = seen.append
        return stream

    vars(server)["_begin_new_stream"] = begin_new_stream
    server.receive_data(client.data_to_send())
    assert [server.streams[number]._expected_content_length for number in (1, 3)] == [5, None]
    assert len(seen) == 1
    server.streams[3]._track_content_length(1000, True)
    server.streams[3]._expected_content_length = 1002
    server.streams[3]._track_content_length(2, True)
    with pytest.raises(InvalidBodyLengthError):
        server.streams[3]._track_content_length(1, False)


def test_calls_of_grpclib_have_their_stream_and_a_wrapper() -> None:
    """Stock grpclib on both sides."""

    class Service:
        def __mapping__(self) -> dict[str, Any]:
            return {"/t/t": Handler(self.serve, Cardinality.STREAM_STREAM, HealthCheckRequest, HealthCheckRequest)}

        async def serve(self, stream: grpclib.server.Stream[Any, Any]) -> None:
            assert isinstance(stream._stream, base.Stream)
            await stream.send_message(HealthCheckRequest(service="served"))

    async def main() -> None:
        server = grpclib.server.Server([Service()])
        with socket.create_server(("127.0.0.1", 0)) as sock:
            await server.start(sock=sock)
            channel = grpclib.client.Channel("127.0.0.1", sock.getsockname()[1])
            kinds = (HealthCheckRequest, HealthCheckRequest)
            async with channel.request("/t/t", Cardinality.STREAM_STREAM, *kinds) as call:
                assert isinstance(call._wrapper, grpclib.utils.Wrapper)
                assert (call._channel, call._method_name, call._deadline) == (channel, "/t/t", None)
                assert (list(call._metadata), call._recv_type) == ([], HealthCheckRequest)
                assert (channel._scheme, channel._authority) == ("http", f"127.0.0.1:{sock.getsockname()[1]}")
                await call.send_request()
                assert isinstance(call._stream, base.Stream)
                assert callable(call._release_stream)
                await call.end()
                assert (await call.recv_message()).service == "served"
            channel.close()
            server.close()
            await server.wait_closed()

    run(main)


def test_trio_asyncio_has_what_the_bridge_uses() -> None:
    """In a process of its own: importing trio_asyncio changes asyncio for all of this one."""
    code = """
import asyncio, heapq, inspect, socket, trio, trio_asyncio
async def main():
    async with trio_asyncio.open_loop() as loop:
        assert isinstance(loop._timers, list), "_timers"
        assert list(inspect.signature(loop._timer_handle_cancelled).parameters) == ["handle"]
        assert list(inspect.signature(loop._main_loop_one).parameters) == ["no_wait"]
        assert list(inspect.signature(loop._io_task).parameters) == ["fd", "handle", "wait_ready"]
        assert isinstance(loop._q_recv, trio.MemoryReceiveChannel)
        with socket.socket() as sock:
            reader = loop._add_reader(sock, print)
            assert isinstance(reader._scope, trio.CancelScope)
            assert callable(reader._run) and callable(reader._raise) and reader._cancelled is False
            loop._remove_reader(sock)
            assert reader._cancelled is True
        handle = loop.call_later(5, print)
        assert hasattr(handle, "cancelled"), "a timer that says whether it is cancelled"
        handle.cancel()
for name in ("open_loop", "aio_as_trio"):
    assert callable(getattr(trio_asyncio, name)), name
assert inspect.iscoroutinefunction(trio_asyncio.TrioEventLoop.run_aio_future)
assert trio_asyncio._loop._FakedPolicy.policy is None, "where no thread has set a policy"
assert isinstance(trio_asyncio._loop._original_policy, asyncio.DefaultEventLoopPolicy)
trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_private_name_that_transport_uses_is_listed_here() -> None:
    listed = {name for _, name, _ in METHODS} | {name for _, name, _ in ATTRIBUTES} | INSTANCE | CONFIGURATION
    listed |= {name for _, _, names in METHODS for name in names}
    own, used = set[str](), set[str]()
    for path in (ROOT / "aipod/transport").glob("*.py"):
        tree = ast.parse(path.read_text())
        own |= set(_defined(tree))
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert sorted(private - own - listed) == []


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id
                elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield target.attr


@pytest.mark.parametrize("side", ["__for_client__", "__for_server__"])
def test_both_sides_ping_as_the_first_version_did(side: str) -> None:
    made = getattr(configuration(Config()), side)()
    assert made._keepalive_time == 5
    assert made._keepalive_timeout == 120
    assert made._keepalive_permit_without_calls is True
    assert made._http2_max_pings_without_data == 0  # unlimited
    assert made._http2_min_sent_ping_interval_without_data <= 1
    assert made.http2_stream_window_size == Config().stream_window
    assert made.http2_connection_window_size == Config().connection_window


def test_a_short_ping_interval_is_not_held_back() -> None:
    assert configuration(Config(ping_interval=0.2))._http2_min_sent_ping_interval_without_data == 0.2
