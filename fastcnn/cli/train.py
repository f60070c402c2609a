"""The commands that train: train and sweep."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastcnn.cli.group import SETTINGS
from fastcnn.cli.options import ConfigCommand, config_options, given, photos_in, quiet_option, say_opening
from fastcnn.config import OPTIONS, Config, read_recipe, read_yaml, recipe_names, require_data, resolve
from fastcnn.errors import UsageError
from fastcnn.system import launch, quick_start, signals


@click.command(cls=ConfigCommand, **SETTINGS)
@click.argument("data", required=False)
@click.option("--recipe", metavar="|".join(recipe_names()), help="Start from the options of a recipe.")
@click.option("--config", "config_file", metavar="FILE", help="Start from a YAML file, such as a run's config.yaml.")
@click.option("--resume", metavar="RUN", help="Continue a run (a folder, or a name under runs/) where it stopped.")
@click.option("--run-dir", metavar="DIR", help="Run folder. Default: the next free name under runs/.")
@quiet_option
@click.option("--print-config", is_flag=True, help="Print the configuration and exit.")
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="With --devices: restart all processes from the last checkpoint up to N times after one has failed.",
)
@config_options()
def train(
    *,
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
    """Train on a folder of images.

    DATA holds DATA/<class>/..., or DATA/train/<class>/... with val and test folders beside it; it may be a zip or tar
    file of these, or a CSV or Parquet file of paths and labels. Options override --config, which overrides --recipe.
    """
    start, ranks = time.perf_counter(), launch.num_ranks()
    changes = given({"data": data, **options})
    if ranks is not None:
        changes.setdefault("devices", ranks)
    if resume:
        if recipe or config_file or run_dir:
            raise UsageError("--resume takes the run's own options: leave out --recipe, --config and --run-dir")
        from fastcnn.runs.resume import resumed_config

        config = resumed_config(resume, changes)
    else:
        config = resolve(
            read_recipe(recipe) if recipe else {}, read_yaml(Path(config_file)) if config_file else {}, changes
        )
    if print_config:
        import yaml

        click.echo(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), nl=False)
        return
    require_data(config.data, "train")  # before torch is imported
    config = dataclasses.replace(config, data=photos_in(config.data, quiet=quiet))
    if ranks is not None and config.devices != ranks:
        raise UsageError(f"--devices {config.devices} differs from the {ranks} processes of torchrun: leave it out")
    if ranks is None and config.devices > 1:
        context = click.get_current_context()
        context.exit(launch.train(config.devices, context.meta["arguments"], max_restarts))
    _fit(config, run_dir, resume, quiet, start)


def _fit(config: Config, run_dir: str | None, resume: str | None, quiet: bool, start: float) -> None:
    """Train, with the processes of the cache started before torch is imported."""
    say_opening(config.data, quiet=quiet)
    from fastcnn.data.cache_folders import start_early
    from fastcnn.system.console import Console
    from pipelines.workers import end_early

    with signals.raising():  # while torch is imported, too, so that no process is left
        try:
            # Several ranks leave no core on which another process could import the same meanwhile.
            forked = launch.num_ranks() is not None
            with quick_start.importing():
                if not resume:
                    start_early(config.data, config.decoder, config.cache_dir, strict=config.strict, fork=forked)
                from fastcnn.runs.fit import fit

            spent = time.perf_counter() - start
            fit(config, run_dir=run_dir, resume=resume, console=Console(quiet=quiet), import_seconds=spent)
        finally:
            end_early()


@click.command(cls=ConfigCommand, **SETTINGS)
@click.argument("data", required=False)
@click.option("--config", "sweep_file", metavar="FILE", help="W&B sweep file. Default: the assignment's.")
@click.option(
    "--trials", type=click.IntRange(1), metavar="N", help="Number of points to try. Default: run_cap, or the grid."
)
@click.option("--seeds", type=click.IntRange(1), default=1, metavar="N", help="Trials of each point, by other seeds.")
@click.option("--dir", "folder", metavar="DIR", help="Sweep folder. Default: the sweep's name under sweeps/.")
@click.option("--storage", metavar="URL", help="Optuna storage, such as sqlite:///sweep.db. Default: a file in DIR.")
@click.option("--pack", type=click.IntRange(1), default=1, metavar="K", help="Trials at the same time, on a CPU.")
@click.option("--wandb", "as_agent", is_flag=True, help="Run trials as an agent of a W&B sweep; needs a W&B login.")
@click.option("--sweep-id", metavar="ID", help="With --wandb: join this sweep. Default: create one from FILE.")
@click.option("--recipe", metavar="|".join(recipe_names()), help="Start every trial from the options of a recipe.")
@quiet_option
@click.option("--print-file", is_flag=True, help="Print the assignment's sweep file and exit.")
@config_options(leave_out=("data", "wandb", "devices"))
def sweep(
    *,
    data: str | None,
    sweep_file: str | None,
    trials: int | None,
    seeds: int,
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
    """Search hyperparameters with many runs.

    The trials train on the images in DATA, with hyperparameters drawn as a W&B sweep file says. The same command
    continues a sweep that was stopped, and may run several times at once. The data, model, optimization and run options
    are those of every trial; one that FILE varies is then not varied.
    """
    from fastcnn.sweeps import sweep_file as files

    if print_file:
        click.echo(files.shipped(), nl=False)
        return
    if sweep_id and not as_agent:
        raise UsageError("--sweep-id works only with --wandb: add --wandb, or leave it out")
    if as_agent and (storage or pack > 1 or seeds > 1):
        raise UsageError("--wandb keeps the trials in W&B, one after another: leave out --storage, --pack and --seeds")
    fixed = given({"data": data and photos_in(data, quiet=quiet), **options})
    plan = files.read(Path(sweep_file) if sweep_file else None).without(fixed)
    fixed = {**(read_recipe(recipe) if recipe else {}), **_command_options(plan.command), **fixed}
    where = Path(folder) if folder else None
    if fixed.get("data"):
        say_opening(fixed["data"], quiet=quiet)
    from fastcnn.system.console import Console

    console = Console(quiet=quiet)
    if as_agent:
        from fastcnn.sweeps import wandb_agent

        wandb_agent.run(plan, fixed, sweep_id=sweep_id, trials=trials, folder=where, console=console)
        return
    from fastcnn.sweeps import sweep as sweeps

    sweeps.run(plan, fixed, folder=where, trials=trials, seeds=seeds, storage=storage, pack=pack, console=console)


def _command_options(command: Sequence[str]) -> dict[str, Any]:
    """Return the options of `fastcnn train` in a sweep file's command, beside ${args}."""
    if "train" not in command:
        return {}
    words = [word for word in command[command.index("train") + 1 :] if not word.startswith("${")]
    found = train.make_context("train", list(words)).params
    return {name: value for name, value in given(found).items() if name in OPTIONS}
