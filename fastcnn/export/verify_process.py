"""Verification of an exported file in a new process, which gets only the file and the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckError, FastCNNError, giving_warnings_to, warn
from fastcnn.export.verify import Verification, verify_file
from fastcnn.inference import artefact
from fastcnn.system import own_module, quick_start


def verify_in_new_process(
    path: Path,
    run: Path,
    moved_to: str | Path | None,
    cache_dir: str | Path | None,
    *,
    quick: bool,
    progress: Callable[[int, int], None],
) -> Verification:
    """Return the verification of a file by a new process; arguments as for `verify_file`.

    Raises CheckError where the file cannot be opened or the process dies.
    """
    arguments = [str(path), str(run), str(moved_to or ""), str(cache_dir or ""), "quick" * quick]
    command = own_module.command("fastcnn.export.verify_process", *arguments)
    answer: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=own_module.environment(), encoding="utf-8") as process:
        assert process.stdout
        try:
            for line in process.stdout:
                answer = {}
                with contextlib.suppress(ValueError):  # it was cut off
                    answer = json.loads(line)
                if "done" in answer:
                    progress(answer["done"], answer["total"])
                elif "warning" in answer:
                    warn(answer["warning"])
        except BaseException:
            process.kill()
            raise
    if "error" in answer:
        raise CheckError(f"the exported file was not kept, as it cannot be verified: {answer['error']}")
    if "sha256" not in answer:
        raise CheckError(
            f"the process that verifies the export ended with code {process.returncode}: the file was not kept"
        )
    return Verification(**answer)


def main(path: str, run: str, moved_to: str, cache_dir: str, quick: str) -> None:
    """Print progress, warnings and verification of a file, each as a line of JSON. "" stands for None."""
    try:
        with giving_warnings_to(lambda text: _say({"warning": text})):
            found = verify_file(
                artefact.open(path),
                run,
                moved_to or None,
                cache_dir or None,
                quick=bool(quick),
                progress=lambda done, total: _say({"done": done, "total": total}),
            )
    except FastCNNError as error:
        _say({"error": str(error)})
    else:
        _say(dataclasses.asdict(found))


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    quick_start.end(0)
