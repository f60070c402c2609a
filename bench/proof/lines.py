"""Lines of a proof on a borrowed machine: a figure is one JSON line, written as it is measured, and measured once.

What was begun and never ended (the process died, or took too long) counts as failed for the rest of the sitting: the
step is started again and goes on with the next figure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.harness import json_lines

VARIABLE = "FASTCNN_PROOF"
NO_TIME = "no time left"
AGAIN, OUT_OF_TIME = 70, 75
"""Exit codes of a step: the GPU is lost to this process, begin a new one; figures did not fit into the time."""

Line = dict[str, Any]
"""figure, outcome (started, measured, failed, skipped), phase, step, card, small, session, at; a reason, or values."""


class NotHere(Exception):
    """The figure cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Proof:
    """A sitting: where its lines go, what form it has and until when it may measure."""

    out: Path
    phase: int
    small: bool
    session: str
    deadline: float
    """time.time() at which the phase, in a step the step, has to be over."""
    step: str = ""
    """Name of the step that a process is of."""

    @classmethod
    def of_this_process(cls) -> Proof:
        """Return the sitting that this process was started for."""
        given = json.loads(os.environ[VARIABLE])
        return cls(**{**given, "out": Path(given["out"])})

    def environment(self, **changes: Any) -> dict[str, str]:
        """Return the variable that hands the sitting to a process."""
        return {VARIABLE: json.dumps({**dataclasses.asdict(self), "out": str(self.out), **changes})}

    @property
    def path(self) -> Path:
        """The file of all lines."""
        return self.out / "lines.jsonl"

    @cached_property
    def card(self) -> str:
        """Name of the GPU; "cpu" without one."""
        if not (tool := shutil.which("nvidia-smi")):
            return "cpu"
        command = [tool, "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.splitlines()
        return found[0].strip() if found else "cpu"

    @property
    def work(self) -> Path:
        """A folder for photos and caches, which is not packed."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.time()

    def lines(self) -> Iterator[Line]:
        """Return the lines so far; one that was cut off when a machine went is none."""
        return json_lines.read(self.path)

    def own_lines(self) -> Iterator[Line]:
        """Yield the lines of this card and this form."""
        return (line for line in self.lines() if (line["card"], line["small"]) == (self.card, self.small))

    def latest(self, figure: str, *outcomes: str) -> Line | None:
        """Return the last line of a figure, of those outcomes where some are given."""
        found = [line for line in self.own_lines() if line["figure"] == figure]
        return next((line for line in reversed(found) if not outcomes or line["outcome"] in outcomes), None)

    def measured(self, figure: str) -> bool:
        """Return whether a figure is there."""
        return self.latest(figure, "measured") is not None

    def values(self, figure: str) -> Line:
        """Return the values of a figure; none where it was not measured."""
        return dict((self.latest(figure, "measured") or {}).get("values", {}))

    def write(self, figure: str, outcome: str, **more: Any) -> None:
        """Add a line: more is seconds, reason or values."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"figure": figure, "outcome": outcome, "phase": self.phase, "step": self.step, "card": self.card}
        line |= {"small": self.small, "session": self.session, "at": at}
        json_lines.append(self.path, {**line, **more})

    def measure(self, figure: str, work: Callable[[], Line], *, limit: float = 60.0, least: float = 3.0) -> Line | None:
        """Measure a figure unless it is there, write its line, and return its values; None where there are none.

        Ends the process (`AGAIN`) where the GPU answers this process no more; a later one goes on after this figure.

        Args:
            figure: its name.
            work: returns the values; raises NotHere where this machine cannot give them.
            limit: seconds after which the process is ended; in the small form the phase's alone.
            least: seconds that have to be left for it to be begun.
        """
        if self.measured(figure):
            return self.values(figure)
        before = self.latest(figure)
        if before and before["session"] == self.session and before["outcome"] in ("started", "failed"):
            if before["outcome"] == "started":
                self.write(figure, "failed", reason="the process ended, or it took too long")
            return None
        if self.seconds_left() < least:
            self.write(figure, "skipped", reason=NO_TIME)
            return None
        self.write(figure, "started")
        start = time.perf_counter()
        # Its default action ends the process, whatever that waits for.
        signal.alarm(0 if self.small else max(1, round(limit)))
        try:
            values = work()
        except NotHere as reason:
            self._ended(figure, "skipped", start, reason=str(reason))
        except Exception as error:
            self._ended(figure, "failed", start, reason=f"{type(error).__name__}: {error}"[:2000])
            if "CUDA error" in str(error) or "CUDNN_STATUS" in str(error):
                sys.exit(AGAIN)
        else:
            self._ended(figure, "measured", start, values=values)
            return values
        finally:
            signal.alarm(0)
        return None

    def _ended(self, figure: str, outcome: str, start: float, **more: Any) -> None:
        self.write(figure, outcome, seconds=round(time.perf_counter() - start, 3), **more)
        print(f"{figure}: {outcome}  {json.dumps(more, default=str)[:300]}", flush=True)

    def exit_code(self) -> int:
        """Return the exit code of a step, by what this sitting wrote for it."""
        last = {line["figure"]: line for line in self.lines() if line["session"] == self.session}
        ours = [line for line in last.values() if line["step"] == self.step]
        if any(line["outcome"] in ("failed", "started") for line in ours):
            return 1
        return OUT_OF_TIME if any(is_late(line) for line in ours) else 0


def is_late(line: Line) -> bool:
    """Return whether a line says that its figure did not fit into the time."""
    return bool(line["outcome"] == "skipped" and line["reason"] == NO_TIME)
