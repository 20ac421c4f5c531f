"""`aipod health [SERVICE]`."""

from __future__ import annotations

from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.options import config_options, make_config, timeout_option, to_option, upstream_option
from aipod.config import Config


@click.command(short_help="Print whether a server takes jobs.")
@click.argument("service", default="")
@to_option
@timeout_option("Time for the answer.", 5.0)
@upstream_option
@config_options(("tls", "tls_ca", "tls_cert", "tls_key"))
@click.pass_context
def health(context: click.Context, /, service: str, to: str, timeout: float, upstream: str, **options: Any) -> None:
    """Print a server's health: exit status 0 when it is SERVING, 1 when not, 3 when it cannot be reached.

    SERVICE is one of ai.AI, liveness, readiness, or nothing for the whole server.
    """
    end_on_signals()
    config = make_config({**options, "connect_timeout": max(timeout, 0.1)})
    metadata = [("x-upstream", upstream)] if upstream else []
    status = run_async(_check(service, to, timeout, config, metadata))
    click.echo(status)
    context.exit(0 if status == "SERVING" else 1)


async def _check(service: str, to: str, timeout: float, config: Config, metadata: list[tuple[str, str]]) -> str:
    from grpclib.const import Status
    from grpclib.exceptions import GRPCError, StreamTerminatedError
    from grpclib.health.v1.health_grpc import HealthStub
    from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    from aipod.errors import Refused, Unreachable, UsageError
    from aipod.transport.channel import Channel

    try:
        channel = Channel(to, config)
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    try:
        request = HealthCheckRequest(service=service)
        answer = await HealthStub(channel).Check(request, timeout=timeout, metadata=metadata)
        return str(HealthCheckResponse.ServingStatus.Name(answer.status))
    except GRPCError as exc:
        if exc.status is Status.NOT_FOUND:
            # A proxy says it too, of an upstream.
            parts = [f"the server knows no service {service!r}" if service else "", exc.message or ""]
            raise Refused("NOT_FOUND", ": ".join(filter(None, parts)) or "no such service") from None
        raise Unreachable(f"no answer from {to}: {exc.status.name}: {exc.message}") from None
    except (OSError, TimeoutError, StreamTerminatedError) as exc:
        raise Unreachable(f"no server answers at {to}: {exc or 'timed out'}") from None
    finally:
        await channel.aclose()
