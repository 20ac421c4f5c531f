"""The schema as descriptors, from the set that was generated beside the dataclasses: what reflection shows, and the
messages of grpc.health.v1.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass


@functools.cache
def descriptors() -> DescriptorPool:
    """ai and grpc.health.v1.

    A pool of our own: the process-wide one may hold another file called ai.proto, or another package's health service,
    where aipod is embedded.
    """
    pool = DescriptorPool()
    raw = (importlib.resources.files("aipod.wire") / "ai.binpb").read_bytes()
    for file in FileDescriptorSet.FromString(raw).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def health_message(name: str) -> Any:
    """The class of a message of grpc.health.v1."""
    return GetMessageClass(descriptors().FindMessageTypeByName(f"grpc.health.v1.{name}"))
