"""What mypy, strictly, must see of the faces of the client. It is checked with the package, and never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import aipod
from aipod.client import Event
from aipod.faces.sync import SyncCall, SyncJob
from aipod.faces.trio import TrioCall, TrioJob


def sync(client: aipod.SyncClient) -> None:
    assert_type(client.predict(b"", version="1", timeout=3, top=5), Any)
    client.predict(b"", version=1)  # type: ignore[arg-type]
    client.predict(payload=b"", timeout="3")  # type: ignore[arg-type]
    client.submit()  # type: ignore[call-arg]
    assert_type(client.submit("train", "set.csv"), SyncJob)
    job = client.attach(b"", metadata=[("x-upstream", "a")])
    assert_type(job, SyncJob)
    assert_type(job.save("x"), Path)
    job.wait(timout=3)  # type: ignore[call-arg]
    for event in job.events():
        assert_type(event, Event)
    with client.stream("predict", timeout=3) as call:
        assert_type(call, SyncCall)
        for chunk in call.chunks():
            assert_type(chunk, bytes)


async def trio(client: aipod.TrioClient) -> None:
    assert_type(await client.predict(b"", version="1"), Any)
    await client.predict(b"", on_event=3)  # type: ignore[arg-type]
    assert_type(await client.submit("train", "set.csv"), TrioJob)
    assert_type(client.attach(""), TrioJob)
    assert_type(await client.attach("").save("x"), Path)
    async with client.stream("predict", timeout=3) as call:
        assert_type(call, TrioCall)
        async for event in call.events():
            assert_type(event, Event)
        async for chunk in call.chunks():
            assert_type(chunk, bytes)
