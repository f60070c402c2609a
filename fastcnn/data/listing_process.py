"""Class folders listed in processes beside this one: the interpreter's lock lets threads gain nothing."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastcnn.data.file_columns import FileColumns
from fastcnn.system import own_module

MANY = 100_000
"""Files that are listed in the time in which a process starts, twice."""


def list_files(root: Path, folders: Sequence[Path], num_processes: int) -> FileColumns:
    """Return the files that may be photos of some folders, in their order.

    Where more than `MANY` are found and folders are left, so many processes list a share of these each.
    """
    columns, share = FileColumns(), list(folders)
    with contextlib.ExitStack() as stack:
        others: list[tuple[subprocess.Popen[bytes] | None, Sequence[Path]]] = []
        for at, folder in enumerate(folders, 1):
            if at > len(share):
                break
            columns.join(FileColumns.of(root, folder))
            if num_processes > 1 and not others and len(columns) >= MANY:
                cuts = np.ceil(np.linspace(at, len(folders), num_processes + 1)).astype(int).tolist()
                share = share[: cuts[1]]
                parts = [folders[start:end] for start, end in pairwise(cuts[1:]) if start < end]
                others = [(stack.enter_context(_started(root, part)), part) for part in parts]
        for process, part in others:
            num_before = len(columns.counts)
            for found in _results(process):
                columns.join(found)
            for folder in part[len(columns.counts) - num_before :]:  # where it failed
                columns.join(FileColumns.of(root, folder))
    return columns


@contextlib.contextmanager
def _started(root: Path, folders: Sequence[Path]) -> Iterator[subprocess.Popen[bytes] | None]:
    """Yield a process that lists folders, None where none can be started; it ends with the block."""
    if getattr(sys, "frozen", False):  # a program that would run itself again
        yield None
        return
    try:
        process = subprocess.Popen(
            own_module.command(__name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=own_module.environment(),
        )
    except OSError:
        yield None
        return
    with process:
        try:
            assert process.stdin
            with contextlib.suppress(OSError), process.stdin:  # of a process that ends at once
                process.stdin.write(json.dumps([str(root), *map(str, folders)]).encode())
            yield process
        finally:
            process.kill()


def _results(process: subprocess.Popen[bytes] | None) -> Iterator[FileColumns]:
    """Yield what a process has listed, folder by folder, as far as it came."""
    if process and process.stdout:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                yield FileColumns.read(process.stdout)


def main() -> None:
    """Write the files of the folders that standard input names to standard output, when all of them are listed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the caller, who ends this process
    root, *folders = map(Path, json.load(sys.stdin.buffer))
    for found in [FileColumns.of(root, folder) for folder in folders]:
        found.write(sys.stdout.buffer)


if __name__ == "__main__":
    main()
