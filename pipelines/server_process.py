"""The process that `pipelines.worker_server.serve` runs in: a new one, or a fork of the caller."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

from pipelines.worker_server import serve


def new_process(link: socket.socket) -> subprocess.Popen[bytes]:
    """Start a server in a new process, with its end of the link."""
    code = f"from pipelines.worker_server import serve; serve({link.fileno()})"
    # Several photos are decoded in parallel: the libraries' own threads would only compete with them.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=env,
        pass_fds=[link.fileno()],
    )


class ForkedProcess:
    """A server in a fork of this process, with the methods of Popen that are used here."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                nowhere = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1):
                    os.dup2(nowhere, stream)
                if torch := sys.modules.get("torch"):
                    torch.set_num_threads(1)
                serve(theirs.detach())
            finally:
                os._exit(0)

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it has ended."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
