"""grpc.reflection v1 and v1alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpclib.reflection.service import ServerReflection
from grpclib.reflection.v1 import reflection_pb2 as v1
from grpclib.reflection.v1alpha import reflection_pb2 as v1alpha

from aipod.service.schema import descriptors


def with_reflection(services: Sequence[Any]) -> list[Any]:
    """`services` and the two reflection services that describe them."""
    pool = descriptors()
    for module in (v1, v1alpha):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return list(ServerReflection.extend(services, pool=pool))
