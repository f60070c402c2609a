"""Server and worker processes of `pipelines.workers`: both import the decoder and little else.

The server forks workers until its caller is gone; a worker decodes batches until its caller is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import mmap
import os
import select
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn, overload

import numpy as np

from pipelines.verdict import Source, Verdict

BEAT = 0.2  # seconds between two signs of life, at least
MAPPED = 2  # shared arrays that a worker keeps mapped: mapping and zeroing them anew costs 4% of its time


class Batch(NamedTuple):
    """Sources to decode into consecutive rows of an array in shared memory."""

    sources: list[Source]
    size: int
    first: int  # row of the first source


class _Beating(Sequence[Source]):
    """Sources that tell of each photo that is begun, whichever decoder takes them."""

    def __init__(self, sources: list[Source], beat: Callable[[], None]) -> None:
        self._sources, self._beat = sources, beat

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Source]: ...
    def __getitem__(self, index: int | slice) -> Source | Sequence[Source]:
        self._beat()
        return self._sources[index]

    def __len__(self) -> int:
        return len(self._sources)


class _Link:
    """The connection to the caller, on which decoding threads send signs of life (None) before the answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock, self._last = connection, threading.Lock(), -math.inf

    def receive(self) -> tuple[Batch, tuple[int, int | None, int]]:
        request: tuple[Batch, tuple[int, int | None, int]] = self._connection.recv()
        self._last = -math.inf  # the first sign of life of each request is sent
        return request

    def answer(self, answer: list[Verdict] | Verdict) -> None:
        with self._lock:
            self._connection.send(answer)

    def beat(self) -> None:
        """Send a sign of life, unless one was sent just now: each wakes the caller."""
        with self._lock:
            now = time.monotonic()
            if now - self._last >= BEAT:
                self._last = now
                self._connection.send(None)


def serve(handle: int) -> NoReturn:
    """Import the decoder that the caller names, then fork workers until the caller is gone: the server's main."""
    try:
        _serve(handle)
    finally:
        os._exit(0)  # the interpreter's own way takes half a second, for which the caller waits


def _serve(handle: int) -> None:
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
                gc.disable()  # nothing that an import makes is garbage
                with _ending_with_caller(link):
                    importlib.import_module(module)
                gc.freeze()
                gc.enable()
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
                os._exit(0)

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
        caller = _Link(Connection(os.dup(handle)))
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
            batch, options = caller.receive()
            caller.answer(_answer(module, batch, options, mapped[number], caller.beat))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _answer(
    module: str,
    batch: Batch,
    options: tuple[int, int | None, int],
    memory: mmap.mmap,
    beat: Callable[[], None],
) -> list[Verdict] | Verdict:
    """Return the verdicts on a batch, or where the decoder raised the one that its photo gets if it is alone."""
    shape = len(batch.sources), batch.size, batch.size, 3
    part = np.ndarray(shape, np.uint8, memory, batch.first * batch.size**2 * 3)
    try:
        decoder = importlib.import_module(module)
        beat()  # on a GPU the import takes its time, which is no photo's
        verdicts: list[Verdict] = decoder.decode(_Beating(batch.sources, beat), batch.size, part, None, *options)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict("decoder crash", f"{type(error).__name__}: {error} ({last.name})")
    return verdicts
