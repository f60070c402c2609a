"""The commands that need a checkout of the repository: bench and parity."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import click

from fastcnn.errors import FastCNNError
from fastcnn.system import own_module

PASSED_ON: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> int:
    """Measure throughput beside the usual alternatives. See fastcnn bench --help; needs a checkout."""
    return _from_checkout("bench", "bench", arguments)


@click.command(context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def parity(arguments: tuple[str, ...]) -> int:
    """Compare accuracy with a plain PyTorch script. See fastcnn parity --help; needs a checkout."""
    return _from_checkout("parity", "bench.parity", arguments)


def _from_checkout(name: str, module: str, arguments: Sequence[str]) -> int:
    """Run a module that is not installed with the package and return its exit code."""
    if not (own_module.ROOT / "bench" / "__main__.py").is_file():
        raise FastCNNError(f"{name} needs a checkout, and this is an installed package: run fastcnn {name} in a clone")
    # A folder named bench where the user stands is not ours; --photos and --out are relative to there.
    command = own_module.command(module, *arguments)
    return subprocess.run(command, check=False, env=own_module.environment()).returncode
