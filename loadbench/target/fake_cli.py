"""The command ``fake``: the scripted endpoint by hand. Its options are the fields of ``Script``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic_core import PydanticCustomError

from loadbench.errors import UsageError
from loadbench.scenario.units import DURATION
from loadbench.target.fake_faults import FAULTS
from loadbench.target.fake_script import Script, script_from, script_from_file

EPILOG = "\b\nFaults, and what a client should call them:\n" + "\n".join(
    f"  {fault.name:24} {fault.outcome:21} {fault.meaning}" for fault in FAULTS.values()
)


def script_from_options(options: dict[str, Any], file: Path | None = None) -> Script:
    """The script of the command line: the ``options`` that were given over ``file`` over the defaults.

    None and () are options that were not given. Raises UsageError.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return script_from(given, "fake", None if file is None else script_from_file(file))


def _option(name: str, field: Any) -> click.Option:
    """The option of a field. It has no default for click: only what was given may override the file."""
    flag = "--" + name.replace("_", "-")
    more: dict[str, Any] = {"metavar": "VALUE"}
    if get_origin(field.annotation) is Literal:
        more = {"type": click.Choice(get_args(field.annotation))}
    elif field.annotation is bool:
        flag, more = f"{flag}/--no-{flag[2:]}", {}
    elif "tuple" in str(field.annotation):
        flag, more = flag.removesuffix("s"), {"multiple": True, "metavar": "NAME"}
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if default in (None, "", False) else f"  [default: {'yes' if default is True else default}]"
    return click.Option([flag, name], default=None, help=f"{field.description}{shown}", **more)


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return DURATION.read(value)
    except PydanticCustomError as error:
        raise UsageError(f"fake: --{parameter.name}: {error.message()}, got {value!r}") from None


@click.command("fake", epilog=EPILOG)
@click.option("--script", type=click.Path(path_type=Path), help="JSON file of script values")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="port to listen on; 0: any that is free")
@click.option("--token", envvar="LOADBENCH_FAKE_TOKEN", help="the bearer token to ask for, needed beyond loopback")
@click.option(
    "--log", type=click.Path(path_type=Path), help="file to append the ground truth to, a JSON line a request"
)
@click.option("--duration", metavar="TIME", callback=_seconds, help="end after so long, for example 30s")
@click.option("--until-stdin-closes", is_flag=True, help="end when standard input does: with the parent process")
def fake_command(
    script: Path | None,
    host: str,
    port: int,
    token: str | None,
    log: Path | None,
    duration: float | None,
    until_stdin_closes: bool,
    **options: Any,
) -> None:
    """Serve the scripted endpoint: an OpenAI-compatible server that answers, and goes wrong, as told.

    Prints its base URL first. A request may differ: the header X-Fake-Script holds a JSON object of values (those of
    its own, not slots and models), the header X-Fake-Fault names a fault, and so does fake-fault:NAME in the model's
    name or in the last message.
    """
    from loadbench.target.fake import run_fake

    run_fake(script_from_options(options, script), host, port, log, duration, token, until_stdin_closes)


fake_command.params += [_option(name, field) for name, field in Script.__pydantic_fields__.items()]  # type: ignore[attr-defined]
