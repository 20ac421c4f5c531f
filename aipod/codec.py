"""zstd, JSON and digests: everything that turns payload bytes into wire bytes and back. No I/O, no clock, no loop.

What comes from outside is bounded before it is decoded. Facts about python-zstandard that this relies on, each covered
by a test: `decompress` ignores `max_output_size` where the frame states its size; streaming decoders accept a cut
stream silently; one `decompressobj` call may make 1 GiB of 32 KiB. So single frames are checked before decoding, and
streams go through `StreamDecoder`, which decodes into a writer that gets 128 KiB at a time. No byte of a payload or of
kwargs is looked at in Python: a few kilobytes become megabytes of blocks that hold nothing.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

import xxhash
import zstandard

from aipod.config import CHUNK, KIB, MIB
from aipod.errors import Refused

# The window that RFC 8878 section 3.1.1.1.2 asks every decoder to support; it is also the memory a stream may cost.
MAX_WINDOW = 8 * MIB
# Pieces of a result for plain clients are held back until they are this long (never 4 bytes, as "PONG" is).
PIECE = 256 * KIB
PONG = b"PONG"
# No block has more content (RFC 8878 section 3.1.1.2.3).
_BLOCK = 128 * KIB
# How a stored frame begins: a single segment whose size follows in 4 bytes, with a checksum and no dictionary
# (RFC 8878 section 3.1.1.1).
_STORED = b"\x28\xb5\x2f\xfd\xa4"
# Bytes of a stored chunk of `CHUNK` bytes: header, blocks and their headers, checksum.
LAID = len(_STORED) + 4 + CHUNK + 3 * (CHUNK // _BLOCK) + 4
# Compressors that a thread keeps: a transfer that tries another level goes back to the one that it had.
_KEPT = 2
# Bytes of a ticket: nobody guesses 16, and no more than 64 are hashed for nothing.
TICKET_MIN, TICKET_MAX = 16, 64
# Tickets in one `Open.released`: each costs the server a look at its disk.
MAX_RELEASED = 64
# Lists and objects, and values, in kwargs: parsing that many takes a tenth of a second.
MAX_CONTAINERS = 100_000
MAX_VALUES = 1_000_000
# A stream is decoded in slices of this, whose blocks may all be empty: that is a millisecond between two looks at who
# has left. What a slice becomes is written 128 KiB at a time.
SLICE = PIECE


def digest(*parts: bytes) -> bytes:
    """xxh3-128 of `parts`, 16 bytes big-endian."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def new_hasher() -> xxhash.xxh3_128:
    """An incremental `digest`."""
    return xxhash.xxh3_128()


def job_id(ticket: bytes) -> str:
    """The public name of the job that `ticket` owns."""
    return hashlib.sha256(ticket).hexdigest()[:32]


def spool_name(spool_id: str) -> str:
    """The part of a spool's id that outlives a reboot of its machine: two ids with the same are one spool's."""
    return spool_id.partition("-")[0]


class Compressor:
    """Makes one zstd frame per call, with its size and checksum in it. Not to be shared between threads."""

    def __init__(self, level: int) -> None:
        self.level = level
        self._context = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)

    def frame(self, data: bytes | memoryview) -> bytes:
        return self._context.compress(data)


class _Compressors(threading.local):
    """The newest ones of a thread, oldest first: at level 9 each has 10 MB, and a thousand jobs may send at once."""

    def __init__(self) -> None:
        self.newest: list[Compressor] = []


_compressors = _Compressors()


def frame(data: bytes | memoryview, level: int | None) -> bytes:
    """`data`, of 1 to `CHUNK` bytes, as one zstd frame that states its size and has a checksum; stored for no level."""
    if level is None:
        return stored(data)
    newest = _compressors.newest
    for one in newest:
        if one.level == level:
            return one.frame(data)
    if len(newest) == _KEPT:
        del newest[0]  # first, or there are three for a moment
    newest.append(Compressor(level))
    return newest[-1].frame(data)


def stored(data: bytes | memoryview) -> bytes:
    """As `frame`, in blocks that hold `data` as it is (RFC 8878 section 3.1.1.2): a copy and a checksum."""
    view = memoryview(data)
    size = len(view)
    pieces: list[bytes | memoryview] = [_STORED + size.to_bytes(4, "little")]
    for start in range(0, size, _BLOCK):
        piece = view[start : start + _BLOCK]
        pieces += [_raw_block(len(piece), is_last=start + _BLOCK >= size), piece]
    checksum = xxhash.xxh64_intdigest(view) & 0xFFFFFFFF
    return b"".join([*pieces, checksum.to_bytes(4, "little")])


class Laid:
    """A chunk of `CHUNK` bytes that lies in `view`, of `LAID` bytes, as it would in the frame that stores it.

    For what most likely does not shrink: whoever reads it into `pieces` need not copy it to store it.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        starts = range(len(_STORED) + 4 + 3, LAID - 4, _BLOCK + 3)
        self.pieces = [self._view[start : start + _BLOCK] for start in starts]

    def __len__(self) -> int:
        return CHUNK

    def joined(self, size: int = CHUNK) -> memoryview:
        """The first `size` bytes, moved together. Nothing else can be done with it then."""
        for place, piece in enumerate(self.pieces):
            self._view[place * _BLOCK : (place + 1) * _BLOCK] = piece
        return self._view[:size]

    def stored(self) -> memoryview:
        """As the function `stored`."""
        view, checksum, at = self._view, xxhash.xxh64(), len(_STORED) + 4
        view[:at] = _STORED + CHUNK.to_bytes(4, "little")
        for piece in self.pieces:
            view[at : at + 3] = _raw_block(_BLOCK, is_last=piece is self.pieces[-1])
            checksum.update(piece)
            at += 3 + _BLOCK
        view[at:] = (checksum.intdigest() & 0xFFFFFFFF).to_bytes(4, "little")
        return view


def _raw_block(size: int, *, is_last: bool) -> bytes:
    """The header of a raw block of `size` bytes."""
    return (size << 3 | is_last).to_bytes(3, "little")


def stored_pieces(data: bytes | memoryview) -> list[memoryview] | None:
    """What `stored` was given, where it lies in its frame; None for any other frame, whole or not, and for one whose
    checksum is wrong.

    All blocks but the last must be as long as can be, so there are few to look at whatever comes.
    """
    view = memoryview(data)
    if view[: len(_STORED)] != _STORED:
        return None
    at = len(_STORED) + 4
    size = int.from_bytes(view[at - 4 : at], "little")
    blocks = -(-size // _BLOCK)
    if not 0 < size <= CHUNK or len(view) != at + 3 * blocks + size + 4:
        return None
    pieces, checksum = [], xxhash.xxh64()
    for start in range(0, size, _BLOCK):
        length = min(_BLOCK, size - start)
        if view[at : at + 3] != _raw_block(length, is_last=start + length == size):
            return None
        piece = view[at + 3 : at + 3 + length]
        checksum.update(piece)
        pieces.append(piece)
        at += 3 + length
    if checksum.intdigest() & 0xFFFFFFFF != int.from_bytes(view[at:], "little"):
        return None
    return pieces


def stated_size(data: bytes) -> int | None:
    """Bytes that a zstd frame says it becomes; None where it does not say, or is none."""
    try:
        size: int = zstandard.get_frame_parameters(data).content_size
    except zstandard.ZstdError:
        return None
    return None if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR) else size


class _Contexts(threading.local):
    """A thread's own: to make one takes longer than a short message does, or a tenth of a chunk; and no two threads may
    use one at once.

    Not for frames that do not state their size: a window would be kept for them.
    """

    def __init__(self) -> None:
        self._decompressors: dict[int, zstandard.ZstdDecompressor] = {}

    def decompressor(self, window: int) -> zstandard.ZstdDecompressor:
        """For frames with at most that window; there are two of them in a server."""
        if window not in self._decompressors:
            self._decompressors[window] = zstandard.ZstdDecompressor(max_window_size=window)
        return self._decompressors[window]


_contexts = _Contexts()


def unframe(data: bytes, limit: int, reason: str) -> bytes:
    """Decode exactly one frame of at most `limit` bytes, stated or not. Raises `Refused(reason)`."""
    try:
        params = zstandard.get_frame_parameters(data)
        _check_window(params, limit, reason)
        window = max(MAX_WINDOW, limit)
        # For a stated size of 0 `decompress` returns without a look at what follows.
        if params.content_size in (0, zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            return _unframe_unsized(zstandard.ZstdDecompressor(max_window_size=window), data, limit, reason)
        if params.content_size > limit:
            raise Refused(reason, f"{params.content_size} bytes after decompression; the limit is {limit}")
        return _contexts.decompressor(window).decompress(data, max_output_size=limit, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, MemoryError) as exc:
        raise _no_frame(reason, exc) from None


def _check_window(params: Any, limit: int, reason: str) -> None:
    if params.window_size > max(MAX_WINDOW, limit):
        raise Refused(reason, f"the zstd window of {params.window_size} bytes is over the limit of {MAX_WINDOW}")


def _no_frame(reason: str, exc: Exception) -> Refused:
    return Refused(reason, f"not one whole zstd frame: {exc}")


def _unframe_unsized(context: zstandard.ZstdDecompressor, data: bytes, limit: int, reason: str) -> bytes:
    """A frame that does not state its size, as stream compressors write them: measured first, piece by piece."""
    size = 0
    with context.stream_reader(data) as reader:
        while piece := reader.read(PIECE):
            size += len(piece)
            if size > limit:
                raise Refused(reason, f"more than {limit} bytes after decompression")
    decoder = context.decompressobj()
    out: bytes = decoder.decompress(data)
    if not decoder.eof:
        raise ValueError("it is cut")
    if decoder.unused_data:
        raise ValueError("something follows it")
    return out


def chunk_pieces(data: bytes | memoryview) -> list[bytes | memoryview]:
    """What `decode_chunk` gives, in pieces. A stored chunk costs its checksum and no copy: the pieces are views of it.

    Raises `Refused`. All that is not exactly what `stored` makes is for zstd to judge.
    """
    pieces = stored_pieces(data)
    return [decode_chunk(data)] if pieces is None else [*pieces]


def cut(pieces: collections.deque[memoryview], size: int) -> Iterator[memoryview]:
    """The first `size` bytes of `pieces`, which lose them."""
    while size:
        piece = pieces.popleft()
        if size < len(piece):
            pieces.appendleft(piece[size:])
            piece = piece[:size]
        size -= len(piece)
        yield piece


def decode_chunk(data: bytes | memoryview) -> bytes:
    """Decode an own client's chunk: exactly one frame that states a size of 1 byte to `CHUNK`. Raises `Refused`."""
    try:
        params = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as exc:
        raise Refused("BAD_CHUNK", f"the chunk is no zstd frame: {exc}") from None
    if params.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise Refused("BAD_CHUNK", "the chunk's zstd frame does not state its size")
    if not 0 < params.content_size <= CHUNK:
        raise Refused("BAD_CHUNK", f"a chunk of {params.content_size} bytes; it must have 1 to {CHUNK}")
    _check_window(params, CHUNK, "BAD_CHUNK")
    try:
        context = _contexts.decompressor(MAX_WINDOW)
        whole: bytes = context.decompress(data, max_output_size=CHUNK, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, MemoryError) as exc:
        raise _no_frame("BAD_CHUNK", exc) from None
    return whole


# Behind a whole stream this comes out as the one byte that it holds, and behind anything else not.
_PROBE = b"\x28\xb5\x2f\xfd\x20\x01\x09\x00\x00?"


class StreamDecoder:
    """Decodes a plain client's payload: one zstd stream or many concatenated frames, cut anywhere.

    `write` gets at most 128 KiB at a time, whatever the input claims, and may raise to stop. So may `check`, which is
    called before each `SLICE` of the input, for that may become nothing. Raises `Refused`.
    """

    def __init__(self, write: Callable[[bytes], Any], check: Callable[[], Any] = lambda: None) -> None:
        self._write = write
        self._check = check
        self._sink = _Sink()
        context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._writer = context.stream_writer(cast(IO[bytes], self._sink), closefd=False)

    def feed(self, data: bytes) -> None:
        try:
            self._sink.write = self._write
            for start in range(0, len(data), SLICE):
                self._check()
                self._decode(memoryview(data)[start : start + SLICE])
        except (zstandard.ZstdError, MemoryError) as exc:
            raise Refused("BAD_CHUNK", f"not valid zstd: {exc}") from None
        finally:
            self._sink.write = None

    def _decode(self, piece: memoryview) -> None:
        # Where a header was cut before, ZSTD_decompressStream takes a whole frame at the beginning of its input for the
        # header's own frame, in its single-pass mode: it must not see one there.
        self._writer.write(piece[:1])
        self._writer.write(piece[1:])

    def finish(self) -> None:
        """Raises `Refused(TRUNCATED)` where the stream ends inside a frame."""
        out: list[bytes] = []
        self._sink.write = out.append
        with contextlib.suppress(zstandard.ZstdError):
            self._decode(memoryview(_PROBE))
        self._sink.write = None
        if out != [b"?"]:
            raise Refused("TRUNCATED", "the zstd stream ends in the middle of a frame")


class _Sink:
    """The file-like object that zstandard's writer wants.

    Python's garbage collector does not see through that writer: a reference to whoever owns the decoder, kept here
    between two calls, would close a cycle that is never freed.
    """

    write: Callable[[bytes], Any] | None = None


def parse_kwargs(data: bytes, limit: int) -> dict[str, Any]:
    """The keyword arguments in the first message: zstd(JSON object), empty for none. Raises `Refused(BAD_KWARGS)`."""
    if not data:
        return {}
    text = unframe(data, limit, "BAD_KWARGS")
    # json.loads holds the GIL, and with it every heartbeat: 16 MiB of empty lists take it for seconds.
    if text.count(b"[") + text.count(b"{") > MAX_CONTAINERS or text.count(b",") > MAX_VALUES:
        raise Refused(
            "BAD_KWARGS", "the JSON of the keyword arguments has too many values; send large data as the payload"
        )
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise Refused("BAD_KWARGS", f"the keyword arguments are not JSON: {exc}") from None
    if not isinstance(kwargs, dict):
        raise Refused("BAD_KWARGS", f"the keyword arguments are a JSON {type(kwargs).__name__}, not an object")
    return kwargs


def plain_pieces(parts: Iterable[bytes], level: int, single: int) -> Iterator[bytes]:
    """`parts` as one zstd stream in pieces for a plain client: one piece where it fits into `single` bytes.

    Above that, pieces of at least `PIECE` bytes; no piece is 4 bytes long, so none can be taken for a heartbeat.
    """
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj()
    held = bytearray()
    threshold = single
    for part in parts:
        held += compressor.compress(part)
        if len(held) > threshold:
            # Over the single-message limit: from here on it is a stream, and a tail of PIECE is enough to hold back.
            threshold = PIECE
            yield bytes(held[:-8])
            del held[:-8]
    held += compressor.flush()
    yield bytes(held)


def json_string_pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The JSON string whose text is the UTF-8 in `chunks`. Raises `UnicodeDecodeError`."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    yield b'"'
    for chunk in chunks:
        yield json.dumps(decoder.decode(chunk))[1:-1].encode()
    yield json.dumps(decoder.decode(b"", final=True))[1:-1].encode() + b'"'
