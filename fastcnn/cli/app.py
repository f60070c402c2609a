"""The commands; nothing here imports torch before one needs it."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO, get_args

import click

from fastcnn.cli.options import ConfigCommand, ExportCommand, config_options
from fastcnn.config import OPTIONS, Export, load, parse_bytes
from fastcnn.errors import CheckError, FastCNNError, FastCNNWarning, UsageError, nearest
from fastcnn.system import launch

TOKENS: dict[str, Any] = {"token_normalize_func": lambda token: token.replace("_", "-")}  # --batch_size is --batch-size
HELP: dict[str, Any] = {"context_settings": {**TOKENS, "help_option_names": ["-h", "--help"], "max_content_width": 110}}
EXPORTS = ",".join(get_args(Export))
_MAX_RESTARTS = "With --devices: how often all start again, from the last checkpoint, after one has failed.  [0]"


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
    if message and (code != UsageError.exit_code or launch.is_first_on_machine()):  # else another rank reports it
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


@click.group(cls=Commands, **HELP)
@click.version_option(package_name="fastcnn", message="fastcnn %(version)s")
def commands() -> None:
    """Train a small image classifier from a folder of photos as fast as the machine allows."""


@commands.command(cls=ConfigCommand, **HELP)
@click.argument("data", required=False)
@click.option("--recipe", metavar="|".join(load.recipe_names()), help="Start from a recipe.")
@click.option("--config", "config_file", metavar="FILE", help="Start from a YAML file, as a run's config.yaml.")
@click.option("--resume", metavar="RUN", help="Go on with a run (a folder, or a name under runs/) where it stopped.")
@click.option("--run-dir", metavar="DIR", help="The run's folder; left out, the next free name under runs/.")
@click.option("--quiet", is_flag=True, help="Show warnings and errors only.")
@click.option("--print-config", is_flag=True, help="Print the configuration and stop.")
@click.option("--max-restarts", type=click.IntRange(0), default=0, metavar="N", help=_MAX_RESTARTS)
@config_options
def train(
    data: str | None,
    recipe: str | None,
    config_file: str | None,
    resume: str | None,
    run_dir: str | None,
    quiet: bool,
    print_config: bool,
    max_restarts: int,
    **options: Any,
) -> None:
    """Train on the photos in DATA: DATA/<class>/... or DATA/train/<class>/..."""
    from pathlib import Path

    start, ranks = time.perf_counter(), launch.num_ranks()
    given = {name: value for name, value in {"data": data, **options}.items() if value is not None}
    if ranks is not None:
        given.setdefault("devices", ranks)
    if resume:
        if recipe or config_file or run_dir:
            raise UsageError("--resume goes on as before: leave out --recipe, --config and --run-dir")
        from fastcnn.runs.resume import resumed_config

        run = resumed_config(resume, given)
    else:
        run = load.resolve(
            load.read_recipe(recipe) if recipe else {},
            load.read_yaml(Path(config_file)) if config_file else {},
            given,
        )
    if print_config:
        import yaml

        click.echo(yaml.safe_dump(run.to_dict(), sort_keys=False, allow_unicode=True), nl=False)
        return
    if ranks is not None and run.devices != ranks:
        raise UsageError(f"--devices {run.devices}: torchrun has started {ranks}; leave it out")
    if ranks is None and run.devices > 1:
        context = click.get_current_context()
        context.exit(launch.train(run.devices, context.meta["arguments"], max_restarts))
    from fastcnn.data import cache
    from fastcnn.system.console import Console

    if not resume:
        cache.start_early(run.data, run.decoder, run.cache_dir)
    try:
        from fastcnn.runs.fit import fit

        spent = time.perf_counter() - start
        fit(run, run_dir=run_dir, resume=resume, console=Console(quiet=quiet), import_seconds=spent)
    finally:
        cache.end_early()


def sweep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that all trials of a sweep may have."""
    return config_options(command, ("data", "wandb", "devices"))


@commands.command(cls=ConfigCommand, **HELP)
@click.argument("data", required=False)
@click.option("--config", "sweep_file", metavar="FILE", help="A W&B sweep file; left out, the assignment's.")
@click.option("--trials", type=click.IntRange(1), metavar="N", help="Trials in all; left out, run_cap or the grid.")
@click.option("--dir", "folder", metavar="DIR", help="The sweep's folder; left out, its name under sweeps/.")
@click.option("--storage", metavar="URL", help="Where Optuna keeps the trials, as sqlite:///sweep.db; left out, DIR.")
@click.option("--pack", type=click.IntRange(1), default=1, metavar="K", help="Trials at once, on a CPU.  [1]")
@click.option("--wandb", "as_agent", is_flag=True, help="Run trials as an agent of a W&B sweep; needs a login.")
@click.option("--sweep-id", metavar="ID", help="With --wandb: the sweep; left out, one is begun as FILE says.")
@click.option("--recipe", metavar="|".join(load.recipe_names()), help="Every trial starts from a recipe.")
@click.option("--quiet", is_flag=True, help="Show warnings and errors only.")
@click.option("--print-file", is_flag=True, help="Print the assignment's sweep file and stop.")
@sweep_options
def sweep(
    data: str | None,
    sweep_file: str | None,
    trials: int | None,
    folder: str | None,
    storage: str | None,
    pack: int,
    as_agent: bool,
    sweep_id: str | None,
    recipe: str | None,
    quiet: bool,
    print_file: bool,
    **options: Any,
) -> None:
    """Train many times on the photos in DATA, by a W&B sweep file, to choose hyperparameters.

    The same command goes on with a sweep that was stopped, and may run several times at once. The options from --epochs
    on are every trial's; one that FILE varies is then not varied.
    """
    from pathlib import Path

    from fastcnn.sweeps import sweep_file as sweepfile

    if print_file:
        click.echo(sweepfile.shipped(), nl=False)
        return
    if sweep_id and not as_agent:
        raise UsageError("--sweep-id is for --wandb")
    if as_agent and (storage or pack > 1):
        raise UsageError("--wandb: W&B keeps the trials and runs one after another: leave out --storage and --pack")
    given = {name: value for name, value in {"data": data, **options}.items() if value is not None}
    plan = sweepfile.read(Path(sweep_file) if sweep_file else None).without(given)
    every = {**(load.read_recipe(recipe) if recipe else {}), **_command_options(plan.command), **given}
    where = Path(folder) if folder else None
    from fastcnn.system.console import Console

    console = Console(quiet=quiet)
    if as_agent:
        from fastcnn.sweeps import wandb_agent as sweep_agent

        sweep_agent.run(plan, every, sweep_id=sweep_id, trials=trials, folder=where, console=console)
        return
    from fastcnn.sweeps import sweep as sweeps

    sweeps.run(plan, every, folder=where, trials=trials, storage=storage, pack=pack, console=console)


def _command_options(command: Sequence[str]) -> dict[str, Any]:
    """Return what a sweep file's command says beside ${args}: options of `fastcnn train`."""
    if "train" not in command:
        return {}
    words = [word for word in command[command.index("train") + 1 :] if not word.startswith("${")]
    found = train.make_context("train", list(words)).params
    return {name: value for name, value in found.items() if name in OPTIONS and value is not None}


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

    from fastcnn.runs.evaluate_run import evaluate_run
    from fastcnn.system.console import Console

    decoder = load.resolve({"decoder": decoder}).decoder if decoder else None
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
    for name, card in scores.by_split.items():
        where = f"{scores.data}, the photos that the run held out" if data is None else str(scores.data)
        click.echo(f"\n{name} photos of {where}\n{card.table()}")


@commands.command(cls=ExportCommand, **HELP)
@click.argument("run")
@click.option("--format", "formats", default="torchscript", metavar="LIST", help=f"{EXPORTS}.  [torchscript]")
@click.option("--half", metavar="[bf16|fp16]", help="16-bit weights and arithmetic; alone: bf16, in ONNX fp16.")
@click.option("--output", metavar="FILE", help="The file; left out, model.<format> in the run folder.")
@click.option("--triton", metavar="DIR", help="Add it to a Triton model repository too, as DIR/<name of the run>.")
def export(run: str, formats: str, half: Any, output: str | None, triton: str | None) -> None:
    """Export the best model of RUN (a folder, or a name under runs/) to files for deployment.

    A file is kept once a process of its own has found that it says what the trained model says.
    """
    from fastcnn.export.exporters import export_run

    names = [name.strip() for name in formats.split(",")]
    if output and len(names) > 1:
        raise UsageError("--output is one file: give one --format")
    if triton and len(names) > 1:
        raise UsageError("--triton serves one file: give one --format")
    if triton and names[0] == "pt2":
        raise UsageError("--triton: expected --format torchscript or onnx, got pt2")
    for name in names:
        path = export_run(run, format=name, output=output, half=half, note=click.echo)
    if triton:
        from fastcnn.export.triton_repository import repository_name, write_repository
        from fastcnn.storage import run_folder as runs

        folder = write_repository(path, triton, repository_name(runs.find(run)))
        click.echo(f"model repository {triton}: {folder.name}")


sha256_option = click.option(
    "--sha256", metavar="HEX", help="What MODEL must be: the hash that its export printed, or the one inside it."
)


@commands.command(**HELP)
@click.argument("model")
@click.argument("data", required=False)
@sha256_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(model: str, data: str | None, sha256: str | None, as_json: bool) -> None:
    """Check an exported MODEL (a file, or a run folder): that nothing was changed, and that it says what it should.

    It is compared on the golden inputs that it carries and, in its run folder, on the photos that the run held out.
    With DATA, a folder of photos in classes: how much its answers depend on what decodes them. Exit code 4 where the
    check fails.
    """
    import dataclasses
    import json

    from fastcnn.export.verify import verify_file
    from fastcnn.inference import artefact

    opened = artefact.open(model, sha256=sha256, warn_of_strangers=True)
    report = verify_file(opened)
    skew = None
    if data:
        import torch

        from fastcnn.export.decoder_sensitivity import measure
        from fastcnn.system.console import Console

        with Console().progress("comparing", "photos") as progress:
            skew = measure(
                opened,
                data,
                gpu=0 if torch.cuda.is_available() else None,
                progress=lambda done, total: progress(done, total, ""),
            )
    if as_json:
        answer = dataclasses.asdict(report) | ({"decoders": skew.to_dict()} if skew else {})
        click.echo(json.dumps(answer, indent=1))
    else:
        click.echo("\n".join([f"{opened.path}  SHA-256 {report.sha256}", *report.lines()]))
        if skew:
            click.echo(f"\n{skew.table()}")
    if report.problems:
        raise CheckError(f"{opened.path}: {'; '.join(report.problems)}")


@commands.command(**HELP)
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--top-k", type=click.IntRange(1), default=1, help="Classes shown of each photo.  [1]")
@click.option("--format", "format_", type=click.Choice(["table", "csv", "jsonl"]), default="table", help="[table]")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Decoding threads; left out, one a core.")
@click.option("--max-pixels", metavar="N", help="As for train.")
@click.option("--quiet", is_flag=True, help="Show no progress and no summary.")
@sha256_option
def predict(
    model: str,
    inputs: tuple[str, ...],
    top_k: int,
    format_: str,
    workers: int | None,
    max_pixels: str | None,
    quiet: bool,
    sha256: str | None,
) -> int:
    """Print class and probability of photos, by an exported MODEL or the one in a run folder.

    INPUT is a photo, a folder, a glob, or - for paths on standard input. A photo that cannot be used gets a line that
    says why, and the exit code is 1.
    """
    from fastcnn.inference import artefact
    from fastcnn.inference.predict import predict_photos, writer
    from fastcnn.system.console import Console

    opened = artefact.open(model, sha256=sha256, warn_of_strangers=True)
    write, bad = writer(format_, opened.classes, top_k), 0
    with Console(quiet=quiet).progress("predicting", "photos") as progress:
        for prediction in predict_photos(
            opened,
            inputs,
            workers=workers,
            max_pixels=_max_pixels(max_pixels),
            progress=lambda done, total: progress(done, total, ""),
            note=lambda text: None if quiet else click.echo(text, err=True),
        ):
            write(prediction)
            bad += bool(prediction.reason)
    return 1 if bad else 0


@commands.command(**HELP)
@click.argument("model")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is every one.  [127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 is a free one.  [8000]")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Decoding threads; left out, one a core.")
@click.option("--max-upload", default="20MB", metavar="SIZE", help="Largest file that is taken.  [20MB]")
@click.option("--max-pixels", metavar="N", help="As for train.")
@click.option("--max-queue", type=click.IntRange(1), default=256, help="Photos that may wait for their turn.  [256]")
@click.option("--max-batch", type=click.IntRange(1), default=32, help="Photos decoded at a time.  [32]")
@click.option("--window", type=click.FloatRange(0), default=5.0, help="Milliseconds that a batch waits.  [5]")
@sha256_option
def serve(
    model: str,
    host: str,
    port: int,
    workers: int | None,
    max_upload: str,
    max_pixels: str | None,
    max_queue: int,
    max_batch: int,
    window: float,
    sha256: str | None,
) -> None:
    """Serve an exported MODEL over HTTP: a page for people, JSON for programs, metrics for Prometheus."""
    from fastcnn.inference import artefact

    upload = parse_bytes(max_upload)
    if not upload:
        raise UsageError(f"--max-upload: expected bytes as 20MB or 1.5GiB, got '{max_upload}'")
    opened = artefact.open(model, sha256=sha256, warn_of_strangers=True)
    try:
        from fastcnn.inference import batcher
        from fastcnn.inference import serve as service
    except ImportError as error:
        raise FastCNNError(f"serve needs {error.name}: pip install 'fastcnn[serve]'") from None
    service.serve(
        opened,
        host,
        port,
        batcher.Limits(
            upload=upload, pixels=_max_pixels(max_pixels), queue=max_queue, batch=max_batch, window=window / 1000
        ),
        workers=workers,
    )


def _max_pixels(given: str | None) -> int:
    return load.resolve({} if given is None else {"max_pixels": given}).max_pixels


PASSED_ON: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@commands.command(context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> int:
    """Measure throughput side by side with the usual ways. [--quick] [--only GROUP...]: see fastcnn bench --help.

    Needs a checkout: the benchmarks and the loops that they race are not installed.
    """
    return _from_checkout("bench", "bench", "run scripts/bench.sh in a clone", arguments)


@commands.command(context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def parity(arguments: tuple[str, ...]) -> int:
    """Prove that training is as accurate as the plain script's. DATA [--seeds N]: see fastcnn parity --help.

    Needs a checkout: the script that it is compared with is not installed.
    """
    return _from_checkout("parity", "bench.parity", "run fastcnn parity in a clone", arguments)


def _from_checkout(name: str, module: str, advice: str, arguments: Sequence[str]) -> int:
    """Run a module that is not installed with the package and return its exit code."""
    import os
    import subprocess
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise FastCNNError(f"{name} needs a checkout, and this is an installed package: {advice}")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # -P: a folder named bench where the user stands is not ours; --photos and --out are relative to there.
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode


@commands.group(cls=Commands, **HELP)
def cache() -> None:
    """Look at the decoded photos that are kept on disk, or delete them."""


cache_dir = click.option("--cache-dir", metavar="DIR", help="Where they are; left out, the user's cache folder.")


@cache.command("list", **HELP)
@cache_dir
def cache_list(cache_dir: str | None) -> None:
    """List the caches: key, photos, size, decoder, data folder."""
    from fastcnn.data.cache import list_caches

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
    from fastcnn.data.cache import default_folder, list_caches

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
    from fastcnn.data.cache import clear, list_caches

    keys = [entry["key"] for entry in list_caches(cache_dir)]
    if key and key not in keys:
        raise FastCNNError(f"no cache {key}{nearest(key, keys)}; see fastcnn cache list")
    click.echo(f"freed {clear(cache_dir, key) / 2**20:,.0f} MiB")


@commands.group(cls=Commands, **HELP)
def data() -> None:
    """Look at folders of photos, or get one."""


@data.command("check", **HELP)
@click.argument("folder", metavar="DATA")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, not a table.")
@click.option("--html", metavar="FILE", help="Write a page with pictures of the photos, too.")
@click.option("--decoder", default="auto", metavar="auto|dali|turbo|pillow", help="What decodes the photos.  [auto]")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Decoding threads; left out, one a core.")
@click.option("--max-bad", metavar="X", help="As for train.")
@click.option("--max-pixels", metavar="N", help="As for train.")
def data_check(
    folder: str,
    as_json: bool,
    html: str | None,
    decoder: str,
    workers: int | None,
    max_bad: str | None,
    max_pixels: str | None,
) -> int:
    """Say what is in DATA: classes and sizes, formats, photos that cannot be used, copies, labels in doubt.

    Every photo is decoded; nothing in DATA is changed. The exit code is 3 where a run would refuse DATA.
    """
    import json
    from pathlib import Path

    from fastcnn.data_tools import check
    from fastcnn.data_tools import check_report as check_page
    from fastcnn.system.console import Console

    given = {"decoder": decoder, "max_bad": max_bad, "max_pixels": max_pixels}
    options = load.resolve({name: value for name, value in given.items() if value is not None})
    with Console().progress("checking", "photos") as progress:
        findings = check.check(
            folder,
            decoder=options.decoder,
            workers=workers,
            max_bad=options.max_bad,
            max_pixels=options.max_pixels,
            progress=lambda done, total: progress(done, total, ""),
        )
    if html:
        check_page.write(Path(html), findings)
    if as_json:
        click.echo(json.dumps(findings.to_dict(), indent=1))
    else:
        click.echo(check.table(findings))
        if html:
            click.echo(f"\npage: {html}")
    return 3 if findings.refusal else 0


@data.command("download", **HELP)
@click.argument("name")
@click.argument("folder", metavar="DIR")
@click.option("--url", metavar="URL", help="A mirror's address of the archive; left out, the set's own.")
def data_download(name: str, folder: str, url: str | None) -> None:
    """Load the photos called NAME (inaturalist12k) into DIR, and unpack them there.

    A broken download is gone on with: in the same command, or by the same command later.
    """
    import shlex

    from fastcnn.data_tools.download import download
    from fastcnn.system.console import Console

    photos = download(name, folder, url=url, console=Console())
    click.echo(f"next: fastcnn train {shlex.quote(str(photos))}")


@data.command("shard", **HELP)
@click.argument("folder", metavar="DATA")
@click.argument("out", metavar="OUT")
@click.option("--photos", type=click.IntRange(1), metavar="N", help="Photos in a shard at most; left out, any number.")
@click.option("--shard-size", default="256MB", metavar="SIZE", help="Photos' bytes in a shard at most.  [256MB]")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the order of the photos.  [0]")
def data_shard(folder: str, out: str, photos: int | None, shard_size: str, seed: int) -> None:
    """Write the photos in DATA as WebDataset shards into OUT: OUT/000000.tar ..., or OUT/train/000000.tar ...

    Photos are copied as they are, in an order that the seed draws: readers of shards shuffle in a window at best. A
    run takes OUT as it takes DATA. OUT is filled at the end, and left empty where that is not reached.
    """
    import shlex

    from fastcnn.data_tools.write_shards import write
    from fastcnn.system.console import Console

    size = parse_bytes(shard_size)
    if not size:
        raise UsageError(f"--shard-size: expected bytes as 256MB or 1.5GiB, got '{shard_size}'")
    written = write(folder, out, photos_each=photos, bytes_each=size, seed=seed, console=Console())
    if strange := written.no_images:
        some = "1 file is" if len(strange) == 1 else f"{len(strange):,} files are"
        click.echo(f"{some} no image and in the shards all the same: see fastcnn data check {shlex.quote(folder)}")
    click.echo(f"{written.photos:,} photos in {written.shards:,} shard{'s' * (written.shards != 1)}")
    click.echo(f"next: fastcnn train {shlex.quote(out)}")


@commands.command(**HELP)
@cache_dir
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def doctor(cache_dir: str | None, as_json: bool) -> int:
    """Say what this machine has for fastcnn, and what to install for what it lacks.

    without: a run does without it, slower or with less. wrong: what is there cannot be used; the exit code is then 4.
    """
    import json

    from fastcnn.cli.doctor import examine, table, to_dict

    lines = examine(cache_dir)
    click.echo(json.dumps(to_dict(lines), indent=1) if as_json else table(lines))
    return 4 if any(line.state == "wrong" for line in lines) else 0
