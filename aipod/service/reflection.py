"""grpc.reflection v1 and v1alpha, from the descriptor set that was generated beside the dataclasses."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpclib.health.v1 import health_pb2
from grpclib.reflection.service import ServerReflection
from grpclib.reflection.v1 import reflection_pb2 as v1
from grpclib.reflection.v1alpha import reflection_pb2 as v1alpha


def with_reflection(services: Sequence[Any]) -> list[Any]:
    """`services` and the two reflection services that describe them."""
    # A pool of our own: the process-wide one may hold another file called ai.proto, where aipod is embedded.
    pool = DescriptorPool()
    raw = (importlib.resources.files("aipod.wire") / "ai.binpb").read_bytes()
    for file in FileDescriptorSet.FromString(raw).file:
        pool.AddSerializedFile(file.SerializeToString())
    for module in (health_pb2, v1, v1alpha):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return list(ServerReflection.extend(services, pool=pool))
