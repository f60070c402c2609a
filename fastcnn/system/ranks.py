"""Ranks: the processes that train one model together, as torchrun starts them, and their communication."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastcnn.errors import FastCNNError, UsageError, first_line, giving_warnings_to
from fastcnn.system import launch
from fastcnn.system.device import release_captures

Part = TypeVar("Part")
Value = TypeVar("Value")
JOIN_TIMEOUT = timedelta(minutes=10)  # until all ranks have started
# For a rank that is alive: it may be waiting for another run that decodes. A dead one is noticed at once.
COLLECTIVE_TIMEOUT = timedelta(hours=12)


class ReportedElsewhere(FastCNNError):
    """An error that another rank has already reported to the user."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class RankLost(FastCNNError):
    """Another rank ended or cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process as one of those that train a model together. Alone, it is rank 0 of 1."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Rank among those of this machine, which is the number of its GPU."""
    local_count: int = 1
    restarts: int = 0
    """How often torchrun has restarted all ranks."""
    joined: bool = False
    """Whether there is a process group, if only of one rank."""
    store: Any = None
    """The torch.distributed.Store of all ranks; torchrun's own outlives a restart."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """Return on all ranks what `make` returns on the first; it is called only there, and may use `map`."""
        if not self.joined:
            return make()
        task, value = self._tell((None, make()) if self.first else None)
        while task is not None:  # on the others
            self._gather(task(value[self.rank]))
            task, value = self._tell(None)
        return value  # type: ignore[no-any-return]

    def map(self, task: Callable[[Part], Value], parts: Sequence[Part]) -> list[Value]:
        """Return what `task` returns for each of some parts, one a rank, which is called there.

        To be called by the first rank while the others wait for it in `broadcast`. Both must be possible to pickle.
        """
        if not self.joined:
            return [task(part) for part in parts]
        self._tell((task, parts))
        return self._gather(task(parts[0]))

    def _tell(self, message: object, source: int = 0) -> Any:
        """Return the message of one rank on all."""
        messages = [message]
        with detecting_lost_ranks():
            torch.distributed.broadcast_object_list(messages, source, device=torch.device("cpu"))
        return messages[0]

    def _gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks on the first; on the others nothing."""
        values: list[Any] = [None] * (self.count if self.first else 0)
        with detecting_lost_ranks():
            torch.distributed.gather_object(value, values if self.first else None)
        return values

    def maximum(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over the ranks."""
        if not self.joined:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with detecting_lost_ranks():
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def slowest(self, seconds: float) -> float:
        """Return the longest of the times that the ranks have measured, so that all of them decide alike."""
        return self.maximum(round(seconds * 1e9))[0] / 1e9 if self.joined else seconds

    def agree(self, problem: str) -> str:
        """Return on all ranks the problem of the first that has one, with its number; "" where none has."""
        if not self.joined:
            return problem
        first = self.count - self.maximum(self.count - self.rank if problem else 0)[0]
        if first == self.count:
            return ""
        return f"rank {first}: {self._tell(problem, first)}"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Leave out the sums over the ranks for a while: for what may fail on a rank, for which the others would wait.

        They agree afterwards. What is captured has to be summed, so it is not captured within.
        """
        if self.joined:
            _alone.append(None)
        try:
            yield
        finally:
            if self.joined:
                _alone.pop()

    def wait(self) -> None:
        """Wait until every rank calls this."""
        self.maximum(0)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks in place and return it. On a GPU this does not wait."""
        if self.joined and not is_alone():
            with detecting_lost_ranks():
                torch.distributed.all_reduce(tensor)
        return tensor

    def gather_interleaved(self, part: Tensor, count: int) -> Tensor:
        """Return (count, ...): row i is row i // ranks of the part that rank i % ranks gives."""
        if not self.joined:
            return part
        rows = -(-count // self.count)  # the parts differ in length by at most 1
        padded = part.new_zeros((rows, *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        with detecting_lost_ranks():
            torch.distributed.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:count]

    def is_first_to(self, what: str) -> bool:
        """Return whether no other rank has called this with the same `what`."""
        if not self.joined:
            return True
        try:
            return int(self.store.add(f"{self.restarts}/{what}", 1)) == 1
        except RuntimeError:  # torchrun has ended
            return True

    def keep(self, name: str, value: str) -> None:
        """Store a value for the ranks of a restart."""
        if self.joined:
            self.store.set(name, value)

    def recall(self, name: str) -> str | None:
        """Return the value that the ranks before a restart stored."""
        if not self.joined or not self.store.check([name]):
            return None
        return bytes(self.store.get(name)).decode()


ALONE = Ranks()
_alone: list[None] = []  # one for each `Ranks.alone` under way; of the process, as autograd has threads of its own


def is_alone() -> bool:
    """Return whether sums over the ranks are left out: see `Ranks.alone`."""
    return bool(_alone)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yield the ranks that torchrun has started, as a process group over NCCL (GPUs) and gloo; without it, ALONE.

    The first rank that fails reports its error, the others raise ReportedElsewhere. A warning is shown once.

    device: cpu or cuda.
    """
    if launch.num_ranks() is None:
        yield ALONE
        return
    import torch.distributed as dist

    number = {name: int(os.environ.get(name, default)) for name, default in _VARIABLES.items()}
    rank, restarts = number["RANK"], number["TORCHELASTIC_RESTART_COUNT"]
    if device == "cuda":
        if number["LOCAL_WORLD_SIZE"] > torch.cuda.device_count():
            raise UsageError(
                f"--devices {number['LOCAL_WORLD_SIZE']}: this machine has {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(number["LOCAL_RANK"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the store: by torchrun, else by the first rank
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    with detecting_lost_ranks("the ranks do not find each other"):
        store = _store(os.environ["MASTER_ADDR"], number["MASTER_PORT"], rank == 0 and not hosted)
        # Groups and restarts share it: without its own prefix a group would find the addresses of an earlier one.
        number_here = next(_groups)
        own = _within(f"group {restarts} {number_here}", store)
        own.set(f"rank {rank}", "")
        own.wait([f"rank {one}" for one in range(number["WORLD_SIZE"])], JOIN_TIMEOUT)
        dist.init_process_group(
            backend, store=own, rank=rank, world_size=number["WORLD_SIZE"], timeout=COLLECTIVE_TIMEOUT
        )
    ranks = Ranks(
        rank=rank,
        count=number["WORLD_SIZE"],
        local_rank=number["LOCAL_RANK"],
        local_count=number["LOCAL_WORLD_SIZE"],
        restarts=restarts,
        joined=True,
        store=_within(f"fastcnn {number_here}", store),
    )
    try:
        with giving_warnings_to(lambda text: ranks.is_first_to(f"warn/{text}")):  # each is shown once
            yield ranks
    except FastCNNError as error:
        if ranks.is_first_to("fail"):
            ranks.keep(f"{ranks.restarts}/exit code", str(error.exit_code))
            raise
        raise ReportedElsewhere(_exit_code(ranks)) from None
    finally:
        release_captures()
        dist.destroy_process_group()  # so that no other rank waits for this one


_groups = itertools.count()  # that this process has joined; the same number on all ranks
_VARIABLES = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 0,
    "TORCHELASTIC_RESTART_COUNT": 0,
}


@functools.cache
def _store(address: str, port: int, is_master: bool) -> Any:
    """Return the store in which ranks find each other.

    It stays while the process does: a rank that is at its next run already would else look for it in the last run's.
    """
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=is_master, timeout=JOIN_TIMEOUT, multi_tenant=True
    )


def _within(name: str, store: Any) -> Any:
    return torch.distributed.PrefixStore(name, store)  # type: ignore[attr-defined]


def _exit_code(ranks: Ranks) -> int:
    with contextlib.suppress(RuntimeError):  # the other rank has not stored it yet
        return int(bytes(ranks.store.get(f"{ranks.restarts}/exit code")))
    return FastCNNError.exit_code


@contextlib.contextmanager
def detecting_lost_ranks(what: str = "another rank ended or cannot be reached") -> Iterator[None]:
    """Raise RankLost if a collective inside fails because another rank ended."""
    try:
        yield
    except RuntimeError as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise
        line = first_line(error)
        reason = (line.partition("] ")[2] or line).partition(". ")[0]  # gloo's begins with a path and ends with advice
        raise RankLost(f"{what} ({reason})") from None
