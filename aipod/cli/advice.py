"""What a person can do about a failure, by its reason, where its text does not say so."""

from __future__ import annotations

# Of the commands that call a server; of `serve` none: its log is on the same screen.
ADVICE = {
    "BAD_KWARGS": "aipod methods tells what each method takes",
    "DAMAGED": "call again: that is a new job",
    "INTERRUPTED": "call again to run it once more; a method that is declared restartable is run again by itself",
    "LOAD_FAILED": "the server's log says more",
    "MODEL_ERROR": "the method has raised this; the server's log has the traceback",
    "NOT_FOUND": "aipod jobs lists those that there are",
    "OTHER_REQUEST": "give each request a ticket file of its own",
    "PERMISSION_DENIED": "whoever runs the server can allow it in the file of serve --tokens",
    "RELEASED": "call again: that is a new job",
    "SUPERSEDED": "another command has the same ticket file",
    "UNAUTHENTICATED": "give your token with --token-file FILE; whoever runs the server makes one with aipod token",
    "UNREACHABLE": "is it running? --to or AIPOD_TO says which server to call",
    "WORKER_CRASHED": "the server's log may say why; call again to run it once more",
}


def advice(reason: str, command: str) -> str:
    """As it goes behind the text of a failure of `command`; empty where there is none."""
    if reason == "NOT_FOUND" and command not in ("attach", "cancel"):
        return ""  # they name no job: it is a proxy that knows no such upstream
    text = "" if command in ("serve", "health") and reason != "UNREACHABLE" else ADVICE.get(reason, "")
    return f" ({text})" if text else ""
