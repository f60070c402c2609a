"""The commands. Options are made from the fields of Config; nothing here imports torch before a command needs it."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin

import click

from fastcnn import config
from fastcnn.errors import FastCNNError, FastCNNWarning, UsageError, nearest

TOKENS: dict[str, Any] = {"token_normalize_func": lambda token: token.replace("_", "-")}  # --batch_size is --batch-size
HELP: dict[str, Any] = {"context_settings": {**TOKENS, "help_option_names": ["-h", "--help"], "max_content_width": 110}}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    warnings.showwarning = _show_warning
    try:
        code = commands.main(list(sys.argv[1:] if argv is None else argv), "fastcnn", standalone_mode=False)
    except click.NoSuchOption as error:
        known = [option for parameter in (error.ctx.command.params if error.ctx else []) for option in parameter.opts]
        code = _fail(f"no option {error.option_name}{nearest(error.option_name, known)}", UsageError.exit_code)
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
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(f"fastcnn: error: {message}", err=True)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, FastCNNWarning):
        click.echo(f"fastcnn: warning: {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


class Commands(click.Group):
    """A group that names the nearest command to a mistyped one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command that `args` begin with."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageError(f"no command '{args[0]}'{nearest(args[0], self.list_commands(ctx))}; see fastcnn --help")
        return super().resolve_command(ctx, args)


class ConfigCommand(click.Command):
    """A command with an option for every field of Config."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, after turning W&B's --batch_norm=False into --no-batch-norm."""
        return super().parse_args(ctx, [_plain_flag(arg) for arg in args])


def _plain_flag(arg: str) -> str:
    name, equals, value = arg.partition("=")
    field = name.removeprefix("--").replace("-", "_")
    if not (equals and name.startswith("--") and config.field_types().get(field) is bool):
        return arg
    if value.lower() not in ("true", "false", "1", "0"):
        raise UsageError(f"{name}: expected true or false, got '{value}'")
    return config.option_name(field if value.lower() in ("true", "1") else f"no_{field}")


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every field of Config but `data`."""
    defaults = config.Config()
    for field, kind in reversed(config.field_types().items()):
        if field == "data":
            continue
        name, default = config.option_name(field), getattr(defaults, field)
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


@click.group(cls=Commands, **HELP)
@click.version_option(package_name="fastcnn", message="fastcnn %(version)s")
def commands() -> None:
    """Train a small image classifier from a folder of photos as fast as the machine allows."""


@commands.command(cls=ConfigCommand, **HELP)
@click.argument("data", required=False)
@click.option("--recipe", metavar="|".join(config.recipe_names()), help="Start from a recipe.")
@click.option("--config", "config_file", metavar="FILE", help="Start from a YAML file, as a run's config.yaml.")
@click.option("--resume", metavar="RUN", help="Go on with a run (a folder, or a name under runs/) where it stopped.")
@click.option("--run-dir", metavar="DIR", help="The run's folder; left out, the next free name under runs/.")
@click.option("--quiet", is_flag=True, help="Show warnings and errors only.")
@click.option("--print-config", is_flag=True, help="Print the configuration and stop.")
@config_options
def train(
    data: str | None,
    recipe: str | None,
    config_file: str | None,
    resume: str | None,
    run_dir: str | None,
    quiet: bool,
    print_config: bool,
    **options: Any,
) -> None:
    """Train on the photos in DATA: DATA/<class>/... or DATA/train/<class>/..."""
    from pathlib import Path

    start = time.perf_counter()
    given = {name: value for name, value in {"data": data, **options}.items() if value is not None}
    if resume:
        if recipe or config_file or run_dir:
            raise UsageError("--resume goes on as before: leave out --recipe, --config and --run-dir")
        from fastcnn.resume import resumed_config

        run = resumed_config(resume, given)
    else:
        run = config.resolve(
            config.read_recipe(recipe) if recipe else {},
            config.read_yaml(Path(config_file)) if config_file else {},
            given,
        )
    if print_config:
        import yaml

        click.echo(yaml.safe_dump(run.to_dict(), sort_keys=False, allow_unicode=True), nl=False)
        return
    from fastcnn.console import Console
    from fastcnn.train import fit

    fit(run, run_dir=run_dir, resume=resume, console=Console(quiet=quiet), import_seconds=time.perf_counter() - start)


@commands.command("eval", **HELP)
@click.argument("run")
@click.argument("data", required=False)
@click.option("--device", default="auto", help="As for train.  [auto]")
@click.option("--decoder", metavar="auto|dali|turbo|pillow", help="What decodes the photos; left out, as in the run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
@click.option("--output", metavar="FILE", help="Write the JSON to a file too.")
def evaluate(run: str, data: str | None, device: str, decoder: str | None, as_json: bool, output: str | None) -> None:
    """Score the best model of RUN (a folder, or a name under runs/): accuracy, loss, top-5, and figures by class.

    Without DATA on the run's own validation and test photos, by its split.csv. Of DATA the photos in its val and test
    folders are used; without those, the ones in its train folder; without that, all of DATA/<class>/...
    """
    import json
    from pathlib import Path

    from fastcnn.console import Console
    from fastcnn.rescore import evaluate_run

    decoder = config.resolve({"decoder": decoder}).decoder if decoder else None
    with Console().progress("decoding", "photos") as progress:
        scores = evaluate_run(
            run, data, device=device, decoder=decoder, progress=lambda done, total: progress(done, total, "")
        )
    text = json.dumps(scores.to_dict(), indent=1)
    if output:
        try:
            Path(output).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise FastCNNError(f"cannot write {output}: {error.strerror or error}") from None
    if as_json:
        click.echo(text)
        return
    click.echo(f"epoch {scores.best_epoch} of {scores.run_dir}, {scores.precision} on {scores.device}")
    for name, card in scores.scorecards.items():
        where = f"{scores.data}, the photos that the run held out" if data is None else str(scores.data)
        click.echo(f"\n{name} photos of {where}\n{card.table()}")


@commands.command(**HELP)
@click.argument("run")
@click.option("--format", "format_", default="torchscript", metavar="torchscript", help="Format of the file.")
@click.option("--output", metavar="FILE", help="The file; left out, model.<format> in the run folder.")
def export(run: str, format_: str, output: str | None) -> None:
    """Export the best model of RUN (a folder, or a name under runs/) to a file for deployment."""
    from fastcnn.export import export_run

    path = export_run(run, format=format_, output=output)
    click.echo(f"exported {path} ({path.stat().st_size / 1024:,.0f} KiB): the same probabilities as the trained model")


@commands.command(**HELP)
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="PHOTO|FOLDER...")
@click.option("--top-k", type=click.IntRange(1), default=1, help="Classes shown of each photo.  [1]")
@click.option("--format", "format_", type=click.Choice(["table", "csv", "jsonl"]), default="table", help="[table]")
def predict(model: str, inputs: tuple[str, ...], top_k: int, format_: str) -> int:
    """Print class and probability of photos, by an exported MODEL or the one in a run folder.

    A photo that cannot be used gets a line that says why, and the exit code is 1.
    """
    from fastcnn import artefact
    from fastcnn.predict import predict_photos, writer

    opened = artefact.open(model)
    write, bad = writer(format_, opened.classes, top_k), 0
    for prediction in predict_photos(opened, inputs):
        write(prediction)
        bad += bool(prediction.reason)
    return 1 if bad else 0


@commands.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> int:
    """Measure throughput side by side with the usual ways. [--quick] [--only GROUP...]: see fastcnn bench --help.

    Needs a checkout: the benchmarks and the loops that they race are not installed.
    """
    import os
    import subprocess
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise FastCNNError("bench needs a checkout, and this is an installed package: run scripts/bench.sh in a clone")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # -P: a folder named bench where the user stands is not ours; --photos and --out are relative to there.
    command = [sys.executable, "-P", "-m", "bench", *arguments]
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode


@commands.group(cls=Commands, **HELP)
def cache() -> None:
    """Look at the decoded photos that are kept on disk, or delete them."""


cache_dir = click.option("--cache-dir", metavar="DIR", help="Where they are; left out, the user's cache folder.")


@cache.command("list", **HELP)
@cache_dir
def cache_list(cache_dir: str | None) -> None:
    """List the caches: key, photos, size, decoder, data folder."""
    from fastcnn.cache import list_caches

    for entry in list_caches(cache_dir):
        size = f"{entry['image_size']}x{entry['image_size']}"
        click.echo(
            f"{entry['key']}  {entry['photos']:>9,} photos  {size:>9}  {entry['bytes'] / 2**20:>9,.0f} MiB  "
            f"{entry['decoder']:<10}  {entry['root']}"
        )


@cache.command("info", **HELP)
@cache_dir
def cache_info(cache_dir: str | None) -> None:
    """Say where the caches are and how much they hold."""
    from fastcnn.cache import default_folder, list_caches

    caches = list_caches(cache_dir)
    click.echo(f"folder  {default_folder(cache_dir)}")
    click.echo(f"caches  {len(caches)}")
    click.echo(f"photos  {sum(entry['photos'] for entry in caches):,}")
    click.echo(f"size    {sum(entry['bytes'] for entry in caches) / 2**20:,.0f} MiB")


@cache.command("clear", **HELP)
@click.argument("key", required=False)
@cache_dir
def cache_clear(key: str | None, cache_dir: str | None) -> None:
    """Delete the cache KEY, or all of them. Photos are decoded again when they are next needed."""
    from fastcnn.cache import clear, list_caches

    keys = [entry["key"] for entry in list_caches(cache_dir)]
    if key and key not in keys:
        raise FastCNNError(f"no cache {key}{nearest(key, keys)}; see fastcnn cache list")
    click.echo(f"freed {clear(cache_dir, key) / 2**20:,.0f} MiB")


@commands.group(cls=Commands, **HELP)
def data() -> None:
    """Get folders of photos."""


@data.command("download", **HELP)
@click.argument("name")
@click.argument("folder", metavar="DIR")
@click.option("--url", metavar="URL", help="A mirror's address of the archive; left out, the set's own.")
def data_download(name: str, folder: str, url: str | None) -> None:
    """Load the photos called NAME (inaturalist12k) into DIR, and unpack them there.

    A broken download is gone on with: in the same command, or by the same command later.
    """
    import shlex

    from fastcnn.console import Console
    from fastcnn.data import download

    photos = download(name, folder, url=url, console=Console())
    click.echo(f"next: fastcnn train {shlex.quote(str(photos))}")


if __name__ == "__main__":
    main()
