"""Server and worker processes of `pipelines.workers`: both import the decoder and little else.

The server forks workers until its caller is gone; a worker decodes batches until its caller is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import select
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from pipelines.verdict import Source, Verdict

MAPPED = 2  # shared arrays that a worker keeps mapped: mapping and zeroing them anew costs 4% of its time


class Batch(NamedTuple):
    """Sources to decode into consecutive rows of an array in shared memory."""

    sources: list[Source]
    size: int
    first: int  # row of the first source


def serve(handle: int) -> None:
    """Import the decoder that the caller names, then fork workers until the caller is gone: the server's main."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the whole process group: the caller decides
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    link = socket.socket(fileno=handle)
    connection = Connection(os.dup(handle))
    workers: set[int] = set()
    with contextlib.suppress(EOFError, OSError):
        module, preload = connection.recv()
        try:
            if preload:
                with _ending_with_caller(link):
                    importlib.import_module(module)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send("")
        while True:
            request = connection.recv()
            if isinstance(request, str):  # the caller's working directory: fork a worker there
                _, handles, _, _ = socket.recv_fds(link, 1, 1)
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    link.close()
                    _work(module, handles[0], request)
                os.close(handles[0])
                workers.add(pid)
                connection.send(pid)
            else:
                workers.discard(request)
                connection.send(_end_of(request))
    for pid in workers:  # in the middle of a batch they do not notice
        os.kill(pid, signal.SIGKILL)
    for pid in workers:
        _end_of(pid)  # else they would stay, as zombies, until some init looks after them


@contextlib.contextmanager
def _ending_with_caller(link: socket.socket) -> Iterator[None]:
    """End this process at once where the caller goes meanwhile: an import takes seconds, and does not notice."""
    imported = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(link, 0)  # a closed socket alone
        while not imported.wait(0.05):
            if poll.poll(0):
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        imported.set()
        watcher.join()  # no thread must run when workers are forked


def _end_of(pid: int) -> int:
    """Return the exit code of a worker that died, or minus the signal that killed it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # a worker of an earlier server, which was killed
        return -signal.SIGKILL


def _work(module: str, handle: int, directory: str) -> None:
    """Decode batches until the caller is gone: a worker's main."""
    try:
        with contextlib.suppress(OSError):  # gone, or not to be entered: absolute paths need none
            os.chdir(directory)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")  # without memory the system should kill this process first
        link = socket.socket(fileno=handle)
        connection = Connection(os.dup(handle))
        mapped: dict[int, mmap.mmap] = {}
        while True:
            _, handles, _, _ = socket.recv_fds(link, 1, 1)
            if not handles:
                break
            number = os.fstat(handles[0]).st_ino  # unique while the file is mapped
            if number not in mapped:
                if len(mapped) == MAPPED:
                    del mapped[next(iter(mapped))]
                mapped[number] = mmap.mmap(handles[0], 0)
            os.close(handles[0])
            (batch, options) = connection.recv()
            connection.send(_answer(module, batch, options, mapped[number]))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _answer(
    module: str, batch: Batch, options: tuple[int, int | None, int], memory: mmap.mmap
) -> list[Verdict] | Verdict:
    """Return the verdicts on a batch, or where the decoder raised the one that its photo gets if it is alone."""
    shape = len(batch.sources), batch.size, batch.size, 3
    part = np.ndarray(shape, np.uint8, memory, batch.first * batch.size**2 * 3)
    try:
        verdicts: list[Verdict] = importlib.import_module(module).decode(
            batch.sources, batch.size, part, None, *options
        )
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("decoder crash", f"{type(error).__name__}: {error} ({last.name})")
    return verdicts
