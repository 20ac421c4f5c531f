"""What goes over a connection, read from its bytes as any HTTP/2 peer reads them."""

from __future__ import annotations

import zstandard

from aipod.wire.ai import Open, Raw

_PREFACE = 24  # bytes of RFC 9113 section 3.4
_DATA, _PADDED = 0, 8


class Chunks:
    """What a client of `chaos` asks for over one connection, and the chunks that it sends."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []  # of the payload, in the order in which they were sent
        self.openings: list[Open] = []
        self._skip = _PREFACE
        self._frames = bytearray()
        self._streams: dict[int, bytearray] = {}

    def __call__(self, data: bytes) -> None:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._frames += data[skipped:]
        while len(self._frames) >= 9:
            end = 9 + int.from_bytes(self._frames[:3], "big")
            if len(self._frames) < end:
                return
            kind, flags, stream = self._frames[3], self._frames[4], int.from_bytes(self._frames[5:9], "big")
            if kind == _DATA:
                assert not flags & _PADDED
                self._messages(self._streams.setdefault(stream, bytearray()), self._frames[9:end])
            del self._frames[:end]

    def _messages(self, waiting: bytearray, data: bytearray) -> None:
        waiting += data
        while len(waiting) >= 5:
            end = 5 + int.from_bytes(waiting[1:5], "big")
            if len(waiting) < end:
                return
            raw = Raw.parse(bytes(waiting[5:end]))
            if raw.open is not None:
                self.openings.append(raw.open)
            elif raw.data:
                self.spans.append((raw.offset, raw.offset + zstandard.frame_content_size(raw.data)))
            del waiting[:end]

    @property
    def sent(self) -> int:
        """Bytes of the payload, whole chunks and (compressed) what there is of the last one."""
        return sum(end - start for start, end in self.spans) + sum(map(len, self._streams.values())) + len(self._frames)
