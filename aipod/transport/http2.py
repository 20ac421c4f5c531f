"""h2's connection, where it has to do something else, or the same with less."""

from __future__ import annotations

import logging

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, ConnectionInputs, _decode_headers
from h2.connection import H2Connection as BaseH2
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, Event
from h2.exceptions import NoAvailableStreamIDError, ProtocolError, TooManyStreamsError
from h2.settings import SettingCodes
from h2.stream import H2Stream as BaseH2Stream
from h2.stream import StreamInputs, StreamState
from hpack import HeaderTuple
from hyperframe.frame import Frame, GoAwayFrame, SettingsFrame

from aipod.config import KIB
from aipod.transport.frames import HEAD, ends_stream, frame_stream, headers_head, is_whole_block
from aipod.transport.headers import Headers

# At DEBUG it logs every header that comes, tokens and cookies too: not in an application that wants to see its own.
if logging.getLogger("hpack").level == logging.NOTSET:
    logging.getLogger("hpack").setLevel(logging.INFO)

# What nearly every call's response begins and ends with, coded once, as literals that enter no table (RFC 7541 section
# 6.2.2; 0x88 and the name 31 are in the static one): small calls are 7 % faster for it, and such a block is read at a
# glance.
BEGINNING = ((":status", "200"), ("content-type", "application/grpc+proto"))
CODED = {
    BEGINNING: b"\x88\x0f\x10\x16application/grpc+proto",
    (("grpc-status", "0"),): b"\x00\x0bgrpc-status\x010",
}
_DECODED = {
    block: [HeaderTuple(name.encode(), value.encode()) for name, value in headers] for headers, block in CODED.items()
}

RECEIVING = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)

# Streams that are there, open or not, up to which nobody counts the open ones.
_UNCOUNTED = 256
# Bytes of headers whose block is shorter than any frame may be: a character has at most 30 bits there.
_SHORT_BLOCK = 4 * KIB
# Headers whose values are of one call only: put into the table they would push out those that each call has.
_OF_ONE_CALL = frozenset(("x-job-id", "grpc-timeout", "traceparent"))
_SHORT = 126  # bytes of a name or value whose length is one byte (RFC 7541 section 5.1)
# Blocks that are kept: of so many kinds of calls.
_BLOCKS = 64
# What h2 does something with; it would keep any other one for ever, and go through all of them at every SETTINGS.
_SETTINGS = frozenset(SettingCodes)
# Bytes of headers that are kept so that they need not be sent again: HPACK's default, whatever more the peer allows.
_HEADER_TABLE = 4 * KIB


class H2(BaseH2):
    """A graceful GOAWAY lets open streams finish (h2 would forbid every later send); what a peer says in SETTINGS makes
    nothing grow; a stream that opens or is over costs the same, however many there are.
    """

    # Of how many streams it is known how they ended: DATA that was on its way when one was reset is no error. More than
    # end in a round trip; h2's own number lets each connection keep 11 MiB.
    MAX_CLOSED_STREAMS = 8192
    told_to_go = False  # by GOAWAY, and the peer would ignore a new stream (RFC 9113 section 6.8); or by the end

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config=config)
        self._frame_dispatch_table[GoAwayFrame] = self._receive_goaway
        self._blocks: dict[tuple[tuple[str, str], ...], bytes] = {}  # of headers that the encoder's table has

    def get_next_available_stream_id(self) -> int:
        if self.told_to_go:
            raise NoAvailableStreamIDError("the peer has sent GOAWAY, or the connection has ended")
        return super().get_next_available_stream_id()

    def open_stream(self, headers: Headers, *, end: bool) -> tuple[int, bytes]:
        """Open a stream: its id, and what has to be written for it.

        Raises TooManyStreamsError, NoAvailableStreamIDError.
        """
        stream_id = self.get_next_available_stream_id()
        if sum(len(name) + len(value) for name, value in headers) > _SHORT_BLOCK:
            self.send_headers(stream_id, headers, end_stream=end)
            self._blocks.clear()
            return stream_id, self.data_to_send()
        # As h2 does it, without its objects for frames.
        if self.open_outbound_streams >= self.remote_settings.max_concurrent_streams:
            raise TooManyStreamsError("the peer takes no more streams at once")
        self.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
        stream = self._begin_new_stream(stream_id, AllowedStreamIDs(self.config.client_side))
        stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
        if end:
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        block = self._block(headers)
        return stream_id, self.data_to_send() + headers_head(len(block), stream_id, end=end) + block

    def _block(self, headers: Headers) -> bytes:
        """`headers`, coded. To look each of them up in the table takes as long as all else of a call's opening."""
        own: Headers = []
        shared: Headers = []
        for name, value in headers:
            is_own = name in _OF_ONE_CALL and len(value) <= _SHORT
            (own if is_own else shared).append((name, value))
        key = tuple(shared)
        block = None if self.encoder.table_size_changes else self._blocks.get(key)
        if block is None:
            block = self.encoder.encode(shared)
            # Not indexes alone (RFC 7541 section 6): something has entered the table, and the others have moved.
            if min(block) < 0x80 or len(self._blocks) >= _BLOCKS:
                self._blocks.clear()
            else:
                self._blocks[key] = block
        # Literals that enter no table (section 6.2.2).
        return block + b"".join(
            b"\0%c%b%c%b" % (len(name), name.encode(), len(value), value.encode()) for name, value in own
        )

    def take(self, frame: bytes) -> list[Event]:
        """What a whole frame means. Raises ProtocolError."""
        stream_id = frame_stream(frame)
        stream = self.streams.get(stream_id)
        if not is_whole_block(frame) or self.incoming_buffer._headers_buffer or not self._is_due(stream_id, stream):
            return self.receive_data(frame)
        # As h2 does it, without its objects for frames.
        try:
            if stream is None and self.open_inbound_streams >= self.local_settings.max_concurrent_streams:
                raise TooManyStreamsError("the peer has opened too many streams")
            block = frame[HEAD:]
            headers = _DECODED.get(block) or _decode_headers(self.decoder, block)
            self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
            if stream is None:
                stream = self._begin_new_stream(stream_id, AllowedStreamIDs.ODD)
            return stream.receive_headers(headers, ends_stream(frame), self.config.header_encoding)[1]
        except ProtocolError as exc:
            self._terminate_connection(exc.error_code)
            raise

    def _is_due(self, stream_id: int, stream: BaseH2Stream | None) -> bool:
        """Whether headers are what comes on this stream: a client's first, or what a server answers."""
        if self.config.client_side:
            return stream is not None and stream.state_machine.state in RECEIVING
        is_new = stream is None and stream_id % 2 == 1 and stream_id > self.highest_inbound_stream_id
        return is_new and not self.incoming_buffer._preamble_len  # the client has sent its preface

    def forget(self, stream_id: int) -> None:
        """Keep of a stream, which nobody uses any more, nothing but how it ended."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.closed:
            del self.streams[stream_id]
            self._closed_streams[stream_id] = stream.closed_by

    def _open_streams(self, remainder: int) -> int:
        """At each new stream h2 looks at all of them; only where there are about as many as may be that matters."""
        outbound = remainder == int(self.config.client_side)
        limit = (self.remote_settings if outbound else self.local_settings).max_concurrent_streams
        return len(self.streams) if len(self.streams) < min(limit, _UNCOUNTED) else super()._open_streams(remainder)

    def count_inbound(self) -> int:
        """How many streams of the peer's are open."""
        return super()._open_streams(int(not self.config.client_side))

    def _begin_new_stream(self, stream_id: int, allowed_ids: AllowedStreamIDs) -> BaseH2Stream:
        stream = super()._begin_new_stream(stream_id, allowed_ids)
        # For a content-length that is wrong h2 ends the connection; the server looks at it, and ends the stream.
        vars(stream)["_initialize_content_length"] = _nothing
        return stream

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[Event]]:
        said = {code: value for code, value in frame.settings.items() if code in _SETTINGS}
        table = min(said.pop(SettingCodes.HEADER_TABLE_SIZE, self.encoder.header_table_size), _HEADER_TABLE)
        if table != self.encoder.header_table_size:  # the same again would make hpack forget to say it
            said[SettingCodes.HEADER_TABLE_SIZE] = table
        frame.settings = said
        received = super()._receive_settings_frame(frame)
        changes = self.encoder.table_size_changes
        if len(changes) > 1:  # the smallest and the last have to be said, and no more may (RFC 7541 section 4.2)
            changes[:] = sorted({min(changes), changes[-1]})
        return received

    @staticmethod
    def _receive_goaway(frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        event = ConnectionTerminated()
        known = {int(code) for code in ErrorCodes}
        event.error_code = ErrorCodes(frame.error_code) if frame.error_code in known else frame.error_code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]


def _nothing(_: object) -> None:
    """Stands in for what h2 would do."""
