"""An answer that is handed on as it comes, and kept nowhere: chunks for who asks for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aipod.client.failure import BadAnswer
from aipod.client.source import HOP
from aipod.codec import decode_chunk, new_hasher
from aipod.errors import AipodError, Refused
from aipod.wire.ai import Raw, State

Pour = Callable[[bytes], Awaitable[None]]


class Flow:
    """One answer. `received` bytes were handed on, over any number of connections, and none of them twice.

    `pour` waits until there is room for a chunk. Of what waits there is one chunk, here and where it is taken, and
    what the stream's window holds.
    """

    def __init__(self, state: State, pour: Pour) -> None:
        self._state = state
        self._pour = pour
        self._hasher = new_hasher()
        self.received = 0

    async def carry(
        self,
        state: State,
        message: Raw | None,
        receive: Callable[[], Awaitable[Raw | None]],
        in_thread: Callable[..., Awaitable[Any]],
        tell: Callable[..., None],
    ) -> bool:
        """Hand on `message` and what is received behind it; False where that ends before the answer does.

        `tell` hears of each chunk. Raises `BadAnswer` for a chunk that is to be had once more, and `AipodError`
        (BAD_ANSWER) where what was handed on is not what was stored, or `state` tells of something else.
        This is an asyncio-flavored function.
        """
        if (state.size, state.digest) != (self._state.size, self._state.digest):
            raise _torn("the server has another one than before")
        before, wire = self.received, 0
        while message is not None:
            await self.add(message, in_thread)
            wire += len(message.data)
            tell(received=self.received, ratio=(self.received - before) / wire if wire else 0.0)
            if message.last:
                self.finish()
                return True
            message = await receive()
        return False

    async def add(self, message: Raw, in_thread: Callable[..., Awaitable[Any]]) -> None:
        """Hand one chunk on. Raises `BadAnswer` where it is not the one that must come now.

        This is an asyncio-flavored function; who is cancelled in it has no use for the rest.
        """
        if message.offset != self.received:
            raise BadAnswer(f"it goes on at byte {message.offset}, not at {self.received}")
        if not message.data:
            return
        packed = message.data
        data = self._decode(packed) if len(packed) <= HOP else await in_thread(self._decode, packed)
        self.received += len(data)
        await self._pour(data)

    def _decode(self, packed: bytes) -> bytes:
        try:
            data = decode_chunk(packed)
        except Refused as exc:
            raise BadAnswer(f"it cannot be read: {exc}") from None
        self._hasher.update(data)
        return data

    def finish(self) -> None:
        """Raises `AipodError` (BAD_ANSWER) where what was handed on is not what was stored."""
        if self.received != self._state.size or self._hasher.digest() != self._state.digest:
            raise _torn("it is not the one that was stored")

    def leave(self) -> None:
        """Nothing of it can be left to a later process."""

    def discard(self) -> None:
        """There is nothing of it here."""


def _torn(why: str) -> AipodError:
    """What to raise where chunks were handed on that are not to be used."""
    return AipodError("BAD_ANSWER", f"the answer arrived damaged: {why}; drop what has come of it, and call again")
