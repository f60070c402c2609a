"""The command `fastcnn`: its subcommands, its exit codes and its error messages. Nothing here imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from fastcnn.cli import checkout, data, model, train
from fastcnn.cli.group import SETTINGS, Commands
from fastcnn.cli.options import config_options, json_option
from fastcnn.config import in_our_words, option_name
from fastcnn.errors import CheckError, FastCNNError, UsageError, giving_warnings_to, nearest
from fastcnn.system import launch, quick_start, signals
from fastcnn.system.text import print_any_name, to_json


@click.group(cls=Commands, **SETTINGS)
@click.version_option(package_name="fastcnn", message="fastcnn %(version)s")
def commands() -> None:
    """Train small image classifiers from folders of images as fast as the machine allows."""


@commands.command(**SETTINGS)
@config_options("cache_dir")
@json_option
def doctor(cache_dir: str | None, as_json: bool) -> int:
    """Check this machine: GPU, decoders, compiler, disk.

    ok: usable. without: fastcnn works without it, slower or with fewer features. wrong: present, but unusable; the
    exit code is then 4.
    """
    from dataclasses import asdict

    from fastcnn.cli.doctor import examine, table

    checks = examine(cache_dir)
    click.echo(to_json([asdict(check) for check in checks]) if as_json else table(checks))
    return CheckError.exit_code if any(check.state == "wrong" for check in checks) else 0


for one in (
    *(train.train, train.sweep),
    *(model.evaluate, model.export, model.verify, model.predict, model.serve),
    *(data.data, data.cache),
    *(checkout.bench, checkout.parity),
):
    commands.add_command(one)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as `sys.argv` gives it unless `argv` does; return its exit code."""
    print_any_name()
    try:
        with giving_warnings_to(lambda text: _say(f"fastcnn: warning: {text}\n")):
            code = commands.main(list(sys.argv[1:] if argv is None else argv), "fastcnn", standalone_mode=False)
    except click.NoSuchOption as error:
        known = [option for parameter in (error.ctx.command.params if error.ctx else []) for option in parameter.opts]
        code = _fail(f"no option {error.option_name}{_proposal(error.option_name, known)}", UsageError.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = UsageError.exit_code
    except click.ClickException as error:
        code = _fail(" ".join(error.format_message().split()), UsageError.exit_code)
    except FastCNNError as error:
        code = _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        code = _fail("interrupted", getattr(error.__cause__ or error, "exit_code", 130))
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        code = 1
    return code or 0


def command() -> NoReturn:
    """Be the program `fastcnn`: do as `main` and leave the process."""
    quick_start.end(main())


def _proposal(option: str, known: Sequence[str]) -> str:
    """Return the option that was perhaps meant: another trainer's word for one of ours, else the one most like it."""
    field, value = in_our_words(option.removeprefix("--"), True)
    proposed = option_name(field)
    if proposed not in known or proposed == option:
        return nearest(option, known)
    return f"; did you mean '{proposed}'?" if value is True else f"; did you mean '{proposed}={value}'?"


def _fail(message: str, code: int) -> int:
    if message and (code != UsageError.exit_code or launch.is_first_on_machine()):  # else another rank reports it
        _say(f"fastcnn: error: {message}\n")
    return code


def _say(text: str) -> None:
    try:
        click.echo(text, err=True, nl=False)
    except OSError:  # the terminal was closed
        signals.silence_lost_outputs()
