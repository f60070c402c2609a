"""Contenders for accuracy over time: fastcnn's recipes, the baselines' scripts, and peers in their own environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.harness.whole_runs import ROOT
from fastcnn.config import read_recipe, recipe_names, resolve
from fastcnn.errors import UsageError, nearest

SCRIPTS = ("seed", "tuned", "cached")
"""Baselines in bench/baselines that train the network of `seed.py`."""
PEERS = {
    "timm_train": "timm_train",
    "timm_loader": "timm_loader",
    "fastai_learner": "fastai_learner",
    "ultralytics_classify": "ultralytics_classify",
    "seed.py@peers": "seed",
}
"""Peer -> its script in bench/baselines. The last is `seed.py` with the peers' versions of torch."""
PEERS_PYTHON = ROOT / ".peers" / "bin" / "python"
"""Interpreter of the environment that scripts/peers.sh makes."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A recipe, a script or a peer with its number of epochs and options."""

    name: str
    epochs: int
    options: tuple[str, ...] = ()
    """NAME=VALUE, as on the command line without the dashes."""

    @property
    def label(self) -> str:
        """The name with epochs and options, as `parsed` reads it."""
        return ",".join([f"{self.name}:{self.epochs}", *self.options])

    @property
    def title(self) -> str:
        """The name with epochs and options, for people."""
        return ", ".join([self.name, f"{self.epochs} epoch{'s' * (self.epochs != 1)}", *self.options])

    @property
    def is_recipe(self) -> bool:
        """Whether fastcnn trains it."""
        return self.name in recipe_names()

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's settings; of a script, none."""
        return read_recipe(self.name) if self.is_recipe else {}

    @property
    def script(self) -> str:
        """Name of its script in bench/baselines."""
        return PEERS.get(self.name, self.name.removesuffix(".py"))

    @property
    def missing(self) -> str:
        """Why it cannot run here; "" where it can."""
        if self.name in PEERS and not PEERS_PYTHON.exists():
            return f"its environment {PEERS_PYTHON.parents[1].name}/ is not there: scripts/peers.sh makes it"
        return ""


def known() -> list[str]:
    """Return the names of all contenders, those that cannot run here too."""
    return [*(f"{name}.py" for name in SCRIPTS), *recipe_names(), *PEERS]


def parsed(text: str, epochs: int) -> Contender:
    """Return the contender of NAME[:EPOCHS][,OPTION=VALUE...]. Raises UsageError for what is unknown or wrong.

    epochs: of a contender that names none and of a recipe that has none.
    """
    head, *options = text.split(",")
    name, _, count = head.partition(":")
    if name not in known():
        raise UsageError(f"no contender '{name}'{nearest(name, known())}; there are {', '.join(known())}")
    own = read_recipe(name) if name in recipe_names() else {}
    if count and not (count.isdecimal() and int(count)):
        raise UsageError(f"contender {text}: expected {name}:EPOCHS with 1 epoch or more, got '{count}'")
    if wrong := [option for option in options if "=" not in option]:
        raise UsageError(f"contender {text}: expected OPTION=VALUE, got '{wrong[0]}'")
    if own:
        resolve(own, dict(option.split("=", 1) for option in options))
    # The recipe that sets the target writes the defaults out; a short form trains it for less.
    default = epochs if name == "seed" else own.get("epochs", epochs)
    return Contender(name=name, epochs=int(count or default), options=tuple(options))


def parse_seeds(text: str) -> range:
    """Return the seeds of FIRST-LAST, or of a single one. Raises UsageError."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first)):
        raise UsageError(f"--seeds: expected FIRST-LAST, as in 100-107, got '{text}'")
    return range(int(first), int(last or first) + 1)
