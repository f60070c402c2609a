"""Imports go only down the levels of the design, and nothing heavy happens on the way to --help."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEVELS = [
    {"errors"},
    {"config", "files", "launch"},
    {"ranks", "tar"},
    {"shards"},
    {
        "index",
        "augment",
        "crops",
        "feed",
        "metrics",
        "console",
        "container",
        "runtime",
        "kernels",
        "signals",
        "runs",
        "archive",
        "twins",
        "sweepfile",
        "options",
    },
    {"study"},
    {"artefact", "wandb_tracker", "model", "cache", "checkpoint", "scorecard", "pictures", "page", "fetch"},
    {"tracker", "optim", "loader", "report", "deploy", "sweep_pictures"},
    {"sync", "dataset", "check"},
    {"step"},
    {"fused"},
    {"engines", "check_page"},
    {"evaluate", "predict", "skew", "triton_server", "card"},
    {"verify", "rescore", "session", "batcher"},
    {"export", "serve"},
    {"finish", "memory", "resume"},
    {"finite"},
    {"train", "data", "doctor", "shard_writer"},
    {"slot"},
    {"sweep"},
    {"sweep_agent"},
    {"cli"},
]
DECODING = {
    "batcher",
    "cache",
    "check",
    "check_page",
    "dataset",
    "doctor",
    "index",
    "loader",
    "predict",
    "serve",
    "shard_writer",
    "skew",
}  # what may import pipelines


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(
    p.stem
    for p in (ROOT / "fastcnn").iterdir()
    if (p.suffix == ".py" or (p / "__init__.py").is_file()) and p.stem != "__init__"
)


def test_every_module_has_a_level() -> None:
    assert set(MODULES) == set().union(*LEVELS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    level = next(i for i, names in enumerate(LEVELS) if module in names)
    below = set().union(*LEVELS[:level])
    path = ROOT / "fastcnn" / module
    names = set().union(*map(imported, path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]))
    used = {name.split(".")[1] for name in names if name.startswith("fastcnn.")}
    assert used & set(MODULES) <= below | {module}
    assert module in DECODING or not any(name.partition(".")[0] == "pipelines" for name in names)


def test_pipelines_know_nothing_of_fastcnn() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        assert not any(name.partition(".")[0] == "fastcnn" for name in imported(path)), path


def test_baselines_know_nothing_of_ours() -> None:
    for path in (ROOT / "bench" / "baselines").glob("*.py"):
        assert not any(name.partition(".")[0] in ("fastcnn", "pipelines") for name in imported(path)), path


@pytest.mark.parametrize("what", ["import fastcnn", "import fastcnn.cli", "import pipelines"])
def test_light_imports(what: str) -> None:
    code = f"{what}; import sys; sys.exit(bool({{'torch', 'wandb', 'matplotlib', 'nvidia', 'PIL'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_resolve() -> None:
    import fastcnn

    assert all(getattr(fastcnn, name) is not None for name in fastcnn.__all__)
    with pytest.raises(AttributeError):
        _ = fastcnn.nothing
