"""TorchScript of a network, made where nothing was scripted before."""

from __future__ import annotations

import io
import subprocess
import sys

import torch

from fastcnn.errors import FastCNNError, ignoring_warnings
from fastcnn.network.inference_network import Deployed
from fastcnn.system import own_module


def script(model: Deployed) -> bytes:
    """Return the TorchScript archive of a model: the same for a model whatever this process scripted before.

    A process gives the second class of a name another one, `___torch_mangle_7`, by a counter of its own, so that
    networks scripted before would change the file and its hash. Where there were any, a new process scripts.

    Raises FastCNNError if that process ends without one.
    """
    if not torch.jit._state._python_cu.get_functions():  # type: ignore[func-returns-value]
        return _script(model)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    command = own_module.command("fastcnn.export.script_process")
    done = subprocess.run(command, input=pickled.getvalue(), capture_output=True, env=own_module.environment())
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise FastCNNError(f"the process that writes TorchScript ended with code {done.returncode}: {why}")
    return done.stdout


def _script(model: Deployed) -> bytes:
    file = io.BytesIO()
    with ignoring_warnings(DeprecationWarning):  # torch.jit is deprecated upstream
        # Not frozen: a frozen module has no parameters left, so .to("cuda") would not move it.
        torch.jit.save(torch.jit.script(model), file)
    return file.getvalue()


def main() -> None:
    """Write the archive of the model on standard input, which the process above pickled, to standard output."""
    model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
    sys.stdout.buffer.write(_script(model))


if __name__ == "__main__":
    main()
