"""Command line options made from the configuration, in the forms that people and W&B's agent give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from fastcnn.config import LAYOUT_FIELDS, OPTIONS, SECTIONS, Bytes, Interval, base_type, option_name, parse_bytes
from fastcnn.errors import UsageError
from fastcnn.system import launch
from fastcnn.system.text import printable

_METAVARS: dict[Any, str] = {
    **{"split": "FILE", "cache_dir": "DIR", "init_from": "RUN", "device": "DEVICE", "wandb_project": "NAME"},
    **dict.fromkeys(("train_dir", "val_dir", "test_dir"), "DIR"),
    **dict.fromkeys(("path_column", "label_column"), "NAME"),
    **{Bytes: "SIZE", Interval: "STEPS|TIME", int: "N", float: "X"},
}
"""Placeholder of a value in the help, by the name of a field or its type."""

sha256_option = click.option(
    "--sha256", metavar="HEX", help="Refuse MODEL unless this is its SHA-256: of the file, or the one stored in it."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
moved_to_option = click.option("--moved-to", metavar="DIR", help="Folder that the run's own images were moved to.")
quiet_option = click.option("--quiet", is_flag=True, help="Print warnings and errors only.")


class ConfigCommand(click.Command):
    """A command with options made from the configuration: help in sections, switches with a value too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with --no-batch-norm for --batch_norm=False or --batch-norm no. `meta` keeps the arguments."""
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, [_plain_flag(arg) for arg in _joined(args)])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then those of each section of the configuration under its title."""
        titles = {name: title for title, section in SECTIONS.items() for name in section.__pydantic_fields__}
        groups: dict[str, list[tuple[str, str]]] = {"Command": [], **{title: [] for title in SECTIONS}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups[titles.get(parameter.name or "", "Command")].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(f"{title} options"):
                    formatter.write_dl(records)


_SWITCHES = {
    **{"true": True, "yes": True, "on": True, "y": True, "t": True, "1": True},
    **{"false": False, "no": False, "off": False, "n": False, "f": False, "0": False},
}
"""Values of a switch, in small letters."""


def _joined(args: list[str]) -> list[str]:
    """Return the arguments with a word for on or off that follows a switch in one piece with it: --batch-norm=no."""
    joined: list[str] = []
    for arg in args:
        if joined and _switch(joined[-1]) and len(arg) > 1 and arg.lower() in _SWITCHES:
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _switch(name: str) -> str:
    """Return the field of the configuration that an option switches on, "" for any other argument."""
    field = name.removeprefix("--").replace("-", "_")
    return field if name.startswith("--") and field in OPTIONS and base_type(OPTIONS[field].annotation) is bool else ""


def _plain_flag(arg: str) -> str:
    name, equals, value = arg.partition("=")
    field = _switch(name)
    if not (equals and field):
        return arg
    if value.strip().lower() not in _SWITCHES:
        raise UsageError(f"{name}: expected true or false, got '{value}'")
    return option_name(field if _SWITCHES[value.strip().lower()] else f"no_{field}")


def config_options(*names: str, leave_out: Collection[str] = ("data",)) -> Callable[[Any], Any]:
    """Return a decorator that adds the options of these fields of Config; without names, of all but `leave_out`."""

    def add(command: Any) -> Any:
        for name in reversed(names or [name for name in OPTIONS if name not in leave_out]):
            command = _config_option(name)(command)
        return command

    return add


layout_options = config_options(*LAYOUT_FIELDS)
"""Decorator of a command that takes DATA, without the other options of the configuration."""


def reading_of(options: dict[str, Any], data: str | None) -> dict[str, Any]:
    """Return those of `layout_options` that the command line has. Raises UsageError where it has no DATA."""
    reading = {name: options[name] for name in LAYOUT_FIELDS if options.get(name) is not None}
    if reading and not data:
        raise UsageError(f"{option_name(next(iter(reading)))} says how DATA is read: give DATA, or leave it out")
    return reading


def _config_option(name: str) -> Callable[[Any], Any]:
    field, option = OPTIONS[name], option_name(name)
    kind, default = base_type(field.annotation), field.default
    shown = default
    if isinstance(default, tuple):
        shown = ",".join(map(str, default)) or "none"
    elif isinstance(default, float):
        shown = f"{default:g}"
    text = " ".join(str(field.description).split())
    if kind is bool:
        text = f"{text}  [default: {'on' if default else 'off'}]"
        return click.option(f"{option}/--no-{option[2:]}", name, default=None, help=text)
    if shown not in (None, ""):
        text = f"{text}  [default: {shown}]"
    return click.option(option, name, default=None, metavar=_metavar(name, kind), help=text)


def _metavar(name: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "LIST" if get_origin(kind) is tuple else _METAVARS.get(name) or _METAVARS[kind]


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the command line has."""
    return {name: value for name, value in options.items() if value is not None}


class ExportCommand(click.Command):
    """A command whose --half may stand alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after giving a bare --half its value: what follows it may be the run."""
        halves = [
            f"{arg}=auto" if arg == "--half" and following not in ("bf16", "fp16") else arg
            for arg, following in zip(args, [*args[1:], ""], strict=True)
        ]
        return super().parse_args(ctx, halves)


def photos_in(data: str, *, quiet: bool = False) -> str:
    """Return the folder that DATA names: itself, or where DATA is an archive, the folder that it is unpacked into."""
    if not Path(data).is_file():
        return data
    from fastcnn.data_tools.archive import unpacked
    from fastcnn.system.console import Console

    return unpacked(data, Console(quiet=quiet))


def say_opening(what: str, *, quiet: bool = False) -> None:
    """Say, before torch is imported, which takes seconds, what a command begins with."""
    if not quiet and launch.is_first_on_machine():
        click.echo(f"opening {printable(what)}", err=True)


def parse_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Return the number of bytes in 20MB or 1.5GiB; the callback of an option that takes a size."""
    count = parse_bytes(value)
    if count is None:
        raise UsageError(f"{param.opts[0]}: expected bytes as 256MB or 1.5GiB, got '{value}'")
    return count


def parse_origins(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return origins as browsers send them; the callback of an option that takes several."""
    origins = []
    for value in values:
        origin = value.lower().removesuffix("/")
        if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
            raise UsageError(f"{param.opts[0]}: expected an origin as https://example.org:8443, got '{value}'")
        origins.append(re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin))
    return tuple(origins)
