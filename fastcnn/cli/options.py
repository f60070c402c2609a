"""Options of commands, made from the fields of Config, in the forms that people and W&B's agent give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import click

from fastcnn.config import OPTIONS, Bytes, Interval, base_type, option_name
from fastcnn.errors import UsageError


class ConfigCommand(click.Command):
    """A command with an option for every field of Config."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after turning W&B's --batch_norm=False into --no-batch-norm. `meta` keeps the arguments."""
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, [_plain_flag(arg) for arg in args])


def _plain_flag(arg: str) -> str:
    name, equals, value = arg.partition("=")
    field = name.removeprefix("--").replace("-", "_")
    if not (equals and name.startswith("--") and field in OPTIONS and base_type(OPTIONS[field].annotation) is bool):
        return arg
    if value.lower() not in ("true", "false", "1", "0"):
        raise UsageError(f"{name}: expected true or false, got '{value}'")
    return option_name(field if value.lower() in ("true", "1") else f"no_{field}")


def config_options(command: Callable[..., Any], without: Sequence[str] = ("data",)) -> Callable[..., Any]:
    """Add an option for every field of Config but some."""
    for name, field in reversed(OPTIONS.items()):
        if name in without:
            continue
        option, kind, default = option_name(name), base_type(field.annotation), field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = str(field.description) + ("" if shown is None or kind is bool else f"  [{shown}]")
        if kind is bool:
            flags = f"{option}/--no-{option[2:]}"
            command = click.option(flags, name, default=None, help=f"{text}  [{'on' if default else 'off'}]")(command)
        else:
            command = click.option(option, name, default=None, metavar=_metavar(kind), help=text)(command)
    return command


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "LIST"
    return {Bytes: "SIZE", Interval: "STEPS|TIME", int: "N", float: "X"}.get(kind, "TEXT")


class ExportCommand(click.Command):
    """A command whose --half may stand alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after giving a bare --half its value: what follows it may be the run."""
        halves = [
            f"{arg}=auto" if arg == "--half" and following not in ("bf16", "fp16") else arg
            for arg, following in zip(args, [*args[1:], ""], strict=True)
        ]
        return super().parse_args(ctx, halves)
