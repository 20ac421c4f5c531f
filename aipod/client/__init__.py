"""The client: asyncio, and nothing that imports trio.

`api` is the class, `prepare` what it does with arguments, `stream` a call under way, `job` the handle of a submitted
job, `follow` one job as its caller sees it, `call` one attempt, `course` what outlives an attempt, `link` what the
calls of a client share; `source` and `reader` the payload, `sink` the answer, or `flow` where it is handed on to an
iterator (`handed`), `part` the file that it is collected in, `ticket` the ticket file; `failure` what follows from a
failed attempt, `patience` how long it is tried.
"""

from aipod.client.api import Client
from aipod.client.event import Event
from aipod.client.job import Job
from aipod.client.stream import Call

__all__ = ["Call", "Client", "Event", "Job"]
