"""The processes that train one model together, as torchrun starts them, and what they tell each other."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastcnn.errors import FastCNNError, FastCNNWarning, UsageError, first_line
from fastcnn.system import launch

Value = TypeVar("Value")
STARTING = timedelta(minutes=10)  # until all are there
PATIENCE = timedelta(hours=12)  # to wait for a rank that lives: another run may be decoding. A dead one is noticed


class Told(FastCNNError):
    """An error that another rank has told the user."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Gone(FastCNNError):
    """Another rank ended."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train one model. Alone it is rank 0 of 1 and talks to nobody."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its GPU."""
    local_count: int = 1
    restarts: int = 0
    """How often torchrun has started all of them again."""
    joined: bool = False
    """Whether they are a process group, be it of one."""
    store: Any = None
    """What all of them may write into, a torch.distributed.Store; one of the launcher's outlives them."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """Return what `make` returns on the first rank; it is called there alone."""
        if not self.joined:
            return make()
        values = [make() if self.first else None]
        with noticing():
            torch.distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    def highest(self, *numbers: int) -> list[int]:
        """Return the highest of each number over the ranks."""
        if not self.joined:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with noticing():
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def slowest(self, seconds: float) -> float:
        """Return the longest of a time that each rank has measured: what all of them decide by."""
        return self.highest(round(seconds * 1e9))[0] / 1e9 if self.joined else seconds

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.highest(0)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return a tensor of one shape on all ranks, made their sum. On a GPU nothing waits for it."""
        if self.joined:
            with noticing():
                torch.distributed.all_reduce(tensor)
        return tensor

    def interleaved(self, part: Tensor, count: int) -> Tensor:
        """Return (count, ...): place i from place i // ranks of the part of rank i % ranks."""
        if not self.joined:
            return part
        rows = -(-count // self.count)  # the parts differ by one at most
        padded = part.new_zeros((rows, *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        with noticing():
            torch.distributed.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:count]

    def take_turn(self, turn: int, last: int, act: Callable[[], None]) -> None:
        """Do something after what the rank before did in turn - 1, from 0 to last; turn i is that of rank i % count.

        It may be called in a thread while no other collective is under way.
        """
        token = torch.zeros(1)
        with noticing():
            if self.count > 1 and turn > 0:
                torch.distributed.recv(token, (self.rank - 1) % self.count)
        act()
        with noticing():
            if self.count > 1 and turn < last:
                torch.distributed.send(token, (self.rank + 1) % self.count)

    def is_first_to(self, what: str) -> bool:
        """Return whether no other rank has asked this before."""
        if not self.joined:
            return True
        try:
            return int(self.store.add(f"{self.restarts}/{what}", 1)) == 1
        except RuntimeError:  # the launcher is gone
            return True

    def keep(self, name: str, value: str) -> None:
        """Keep a value for the ranks that torchrun starts after these."""
        if self.joined:
            self.store.set(name, value)

    def recall(self, name: str) -> str | None:
        """Return what earlier ranks kept."""
        if not self.joined or not self.store.check([name]):
            return None
        return bytes(self.store.get(name)).decode()


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Yield the ranks that a launcher has started, joined over NCCL and gloo on GPUs, else gloo; without one, ALONE.

    device: cpu or cuda. The first rank that fails tells the user; the others raise Told. A warning is told once.
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
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, else by the first rank
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    with noticing("the ranks do not find each other"):
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            number["MASTER_PORT"],
            is_master=rank == 0 and not hosted,
            timeout=STARTING,
            multi_tenant=True,
        )
        # torchrun's store is one for all restarts: without a name of its own a group finds the addresses of an earlier.
        number_here = next(_groups)
        own = _within(f"group {restarts} {number_here}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=number["WORLD_SIZE"], timeout=PATIENCE)
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
        with _warning_once(ranks):
            yield ranks
    except FastCNNError as error:
        if ranks.is_first_to("fail"):
            ranks.keep(f"{ranks.restarts}/exit code", str(error.exit_code))
            raise
        raise Told(_exit_code(ranks)) from None
    finally:
        dist.destroy_process_group()  # so that no rank waits for one that has failed


_groups = itertools.count()  # of this process: all ranks join as many
_VARIABLES = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 0,
    "TORCHELASTIC_RESTART_COUNT": 0,
}


def _within(name: str, store: Any) -> Any:
    return torch.distributed.PrefixStore(name, store)  # type: ignore[attr-defined]


def _exit_code(ranks: Ranks) -> int:
    with contextlib.suppress(RuntimeError):  # it failed in the moment between the two
        return int(bytes(ranks.store.get(f"{ranks.restarts}/exit code")))
    return FastCNNError.exit_code


@contextlib.contextmanager
def noticing(what: str = "another rank ended or cannot be reached") -> Iterator[None]:
    """Turn the end of another rank, which gloo and NCCL notice in the midst of a collective, into Gone."""
    try:
        yield
    except RuntimeError as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise
        line = first_line(error)
        reason = (line.partition("] ")[2] or line).partition(". ")[0]  # gloo begins with a path and ends in advice
        raise Gone(f"{what} ({reason})") from None


@contextlib.contextmanager
def _warning_once(ranks: Ranks) -> Iterator[None]:
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, FastCNNWarning) or ranks.is_first_to(f"warn/{message}"):
            before(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
