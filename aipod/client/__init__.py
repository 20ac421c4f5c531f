"""The client: asyncio, and nothing that imports trio. `api` is the class, `source` the payload, `call` one attempt,
`sink` the answer, `failure` what went wrong."""

from aipod.client.api import Client
from aipod.client.call import Event

__all__ = ["Client", "Event"]
