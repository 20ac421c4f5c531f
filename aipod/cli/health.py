"""`aipod health [SERVICE]`."""

from __future__ import annotations

import json
from typing import Any

import click

from aipod.cli import end_on_signals, plain, run_async
from aipod.cli.help import Command
from aipod.cli.options import (
    CONNECTION,
    config_options,
    make_config,
    timeout_option,
    to_option,
    upstream_option,
)
from aipod.config import Config


@click.command(cls=Command)
@click.argument("service", default="")
@click.option("--all", "everything", is_flag=True, help="Print the health of every service that the server names.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: service and status.")
@to_option
@timeout_option("Time for the answer.", 5.0)
@upstream_option
@config_options(("tls", "tls_ca", "tls_cert", "tls_key"), text="client", section=CONNECTION)
@click.pass_context
def health(
    context: click.Context,
    /,
    service: str,
    everything: bool,
    as_json: bool,
    to: str,
    timeout: float,
    upstream: str,
    **options: Any,
) -> None:
    """Print a server's health: exit status 0 when it is SERVING, 1 when not, 3 when it cannot be reached.

    SERVICE is one of ai.AI, liveness, readiness, or nothing for the whole server; --all names them.
    """
    end_on_signals()
    if everything and service:
        raise click.UsageError("--all and a SERVICE: give one of them")
    config = make_config({**options, "connect_timeout": max(timeout, 0.1)})
    metadata = [("x-upstream", upstream)] if upstream else []
    statuses = run_async(_ask(None if everything else service, to, timeout, config, metadata))
    for name, status in sorted(statuses.items()):
        if as_json:
            click.echo(json.dumps({"service": name, "status": status}))
            continue
        click.echo(f"{status:<12} {plain(name) or '(the whole server)'}" if everything else status)
    context.exit(0 if set(statuses.values()) == {"SERVING"} else 1)


async def _ask(
    service: str | None, to: str, timeout: float, config: Config, metadata: list[tuple[str, str]]
) -> dict[str, str]:
    """The status of each service by its name: of all where it is None."""
    from grpclib.client import UnaryUnaryMethod
    from grpclib.const import Status
    from grpclib.exceptions import GRPCError, StreamTerminatedError

    from aipod.errors import Refused, Unreachable, UsageError
    from aipod.service.schema import health_message
    from aipod.transport.channel import Channel, why_unconnected

    method = "List" if service is None else "Check"
    response = health_message(f"Health{method}Response")
    request = health_message(f"Health{method}Request")
    names: dict[int, str] = {
        number: name for name, number in health_message("HealthCheckResponse").ServingStatus.items()
    }

    def name_of(status: int) -> str:
        return names.get(status, f"UNKNOWN ({status})")  # a newer server's, or nonsense

    try:
        channel = Channel(to, config)
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    ask = UnaryUnaryMethod[Any, Any](channel, f"/grpc.health.v1.Health/{method}", request, response)
    try:
        if service is None:
            told = (await ask(request(), timeout=timeout, metadata=metadata)).statuses
            return {name: name_of(one.status) for name, one in told.items()}
        return {service: name_of((await ask(request(service=service), timeout=timeout, metadata=metadata)).status)}
    except GRPCError as exc:
        if exc.status is Status.NOT_FOUND and service is not None:
            # A proxy says it too, of an upstream.
            parts = [f"the server knows no service {service!r}" if service else "", exc.message or ""]
            raise Refused("NOT_FOUND", ": ".join(filter(None, parts)) or "no such service") from None
        raise Unreachable(f"no answer from {to}: {exc.status.name}: {exc.message}") from None
    except (OSError, TimeoutError, StreamTerminatedError) as exc:
        raise Unreachable(f"no server answers at {to}: {why_unconnected(exc) or 'timed out'}") from None
    finally:
        await channel.aclose()
