"""The command ``probe``: this machine's memory figures for a loadbench on another host."""

from __future__ import annotations

import re
import sys

import click

from loadbench.errors import UsageError


def _address(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+)):(\d{1,5})", value)
    if found is None or int(found[3]) > 65535:
        raise UsageError(f"probe: --listen: expected HOST:PORT, got {value!r}")
    return found[1] or found[2], int(found[3])


@click.command("probe")
@click.option(
    "--listen",
    default="127.0.0.1:5280",
    show_default=True,
    metavar="HOST:PORT",
    callback=_address,
    help="address to listen on; port 0: any that is free",
)
@click.option(
    "--token",
    envvar="LOADBENCH_PROBE_TOKEN",
    show_envvar=True,
    help="the bearer token to ask for, needed beyond loopback; others on this host can read a command line",
)
@click.option("--port", type=click.IntRange(1, 65535), help="watch the process that listens on this port")
@click.option("--pid", type=click.IntRange(1), help="watch this process")
@click.option("--name", metavar="PATTERN", help="watch the process whose name matches this pattern")
def probe_command(
    listen: tuple[str, int], token: str | None, port: int | None, pid: int | None, name: str | None
) -> None:
    """Serve the memory figures of the model's host, read-only, to a scenario's target_probe.

    Prints its address first. Without --port, --pid or --name it watches what listens on Foundry Local's usual ports
    or is called like it. There is no encryption: beyond a network that you trust, listen on loopback and forward the
    port with ssh.
    """
    if sum(given is not None for given in (port, pid, name)) > 1:
        raise UsageError("probe: expected one of --port, --pid and --name, got several")
    if name is not None:
        try:
            re.compile(name)
        except re.error as error:
            raise UsageError(f"probe: --name: expected a regular expression, got {name!r}: {error}") from None
    from loadbench.platform import run_in_loop
    from loadbench.target.probe import run_probe

    run_in_loop(run_probe(*listen, token, pid=pid, service_port=port, name=name, out=sys.stdout))
