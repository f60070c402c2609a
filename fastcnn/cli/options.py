"""Options of commands, made from the fields of Config, in the forms that people and W&B's agent give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import click

from fastcnn.config import coerce
from fastcnn.config import fields as config
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
    if not (equals and name.startswith("--") and config.field_types().get(field) is bool):
        return arg
    if value.lower() not in ("true", "false", "1", "0"):
        raise UsageError(f"{name}: expected true or false, got '{value}'")
    return coerce.option_name(field if value.lower() in ("true", "1") else f"no_{field}")


def config_options(command: Callable[..., Any], without: Sequence[str] = ("data",)) -> Callable[..., Any]:
    """Add an option for every field of Config but some."""
    defaults = config.Config()
    for field, kind in reversed(config.field_types().items()):
        if field in without:
            continue
        name, default = coerce.option_name(field), getattr(defaults, field)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = config.field_docs()[field] + ("" if shown is None or kind is bool else f"  [{shown}]")
        if kind is bool:
            flags = f"{name}/--no-{name[2:]}"
            command = click.option(flags, field, default=None, help=f"{text}  [{'on' if default else 'off'}]")(command)
        else:
            command = click.option(name, field, default=None, metavar=_metavar(kind), help=text)(command)
    return command


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    text = str(kind)
    return (
        "SIZE"
        if "Bytes" in text
        else "STEPS|TIME"
        if "Interval" in text
        else "LIST"
        if "tuple" in text
        else "N"
        if "int" in text
        else "X"
        if "float" in text
        else "TEXT"
    )


class ExportCommand(click.Command):
    """A command whose --half may stand alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after giving a bare --half its value: what follows it may be the run."""
        halves = [
            f"{arg}=auto" if arg == "--half" and following not in ("bf16", "fp16") else arg
            for arg, following in zip(args, [*args[1:], ""], strict=True)
        ]
        return super().parse_args(ctx, halves)
