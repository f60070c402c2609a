"""TorchScript of a trained network, made where nothing was scripted before."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import torch

from fastcnn.errors import FastCNNError, ignoring_warnings
from fastcnn.export.exported_network import deployed
from fastcnn.system import own_module, quick_start

NEEDED = ("config", "classes", "network", "model")
"""Fields of a checkpoint from which the network is made."""


def script(state: dict[str, Any], precision: str) -> bytes:
    """Return the TorchScript archive of a checkpoint's network: the same whatever this process scripted before.

    A process gives the second class of a name another one, `___torch_mangle_7`, by a counter of its own, so that
    networks scripted before would change the file and its hash. Where there were any, a new process scripts.

    Raises FastCNNError if that process ends without one.
    """
    if not torch.jit._state._python_cu.get_functions():  # type: ignore[func-returns-value]
        return script_here(state, precision)
    needed = io.BytesIO()
    torch.save({name: state[name] for name in NEEDED}, needed)
    command = own_module.command("fastcnn.export.script_process", precision)
    done = subprocess.run(command, input=needed.getvalue(), capture_output=True, env=own_module.environment())
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise FastCNNError(f"the process that writes TorchScript ended with code {done.returncode}: {why}")
    return done.stdout


def script_here(state: dict[str, Any], precision: str) -> bytes:
    """Return the archive with the names that this process gives."""
    file = io.BytesIO()
    with ignoring_warnings(DeprecationWarning):  # torch.jit is deprecated upstream
        # Not frozen: a frozen module has no parameters left, so .to("cuda") would not move it.
        torch.jit.save(torch.jit.script(deployed(state, precision, always_resize=False)), file)
    return file.getvalue()


def main(precision: str) -> None:
    """Write the archive to standard output. Standard input has the checkpoint's fields in `NEEDED`."""
    state = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
    sys.stdout.buffer.write(script_here(state, precision))


if __name__ == "__main__":
    main(*sys.argv[1:])
    quick_start.end(0)
