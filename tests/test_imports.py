"""Imports go only down the levels of the design, and nothing heavy happens on the way to --help."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top floor first: a room imports only from those on floors below its own.
FLOORS = [
    {"cli"},
    {"sweeps"},
    {"runs", "data_tools"},
    {"reporting"},
    {"training", "export"},
    {"network", "data"},
    {"inference"},
    {"storage"},
    {"system"},
    {"config"},
    {"errors"},
]
DECODING = {"data", "data_tools", "inference", "export", "cli", "system"}  # what may import pipelines


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


ROOMS = sorted(
    p.stem for p in (ROOT / "fastcnn").iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")
)
ROOMS.remove("__init__")
ROOMS.remove("__main__")  # starts the command line


def test_every_room_has_a_floor() -> None:
    assert set(ROOMS) == set().union(*FLOORS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room: str) -> None:
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[floor + 1 :])
    path = ROOT / "fastcnn" / room
    for module in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        names = imported(module)
        used = {name.split(".")[1] for name in names if name.startswith("fastcnn.")}
        assert used & set(ROOMS) <= below | {room}, module
        assert room in DECODING or not any(name.partition(".")[0] == "pipelines" for name in names), module


def test_pipelines_know_nothing_of_fastcnn() -> None:
    for path in (ROOT / "pipelines").glob("*.py"):
        assert not any(name.partition(".")[0] == "fastcnn" for name in imported(path)), path


def test_baselines_know_nothing_of_ours() -> None:
    for path in (ROOT / "bench" / "baselines").glob("*.py"):
        assert not any(name.partition(".")[0] in ("fastcnn", "pipelines") for name in imported(path)), path


LIGHT = ("pipelines", "fastcnn", "fastcnn.cli", "fastcnn.data.cache_folders")
"""The last starts decoding processes, which import while torch is imported here."""
HEAVY = {"torch", "wandb", "matplotlib", "nvidia", "PIL"}


def test_light_imports() -> None:
    """In one process, so that what imports something heavy is the first that is named with it."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += f"    print(name, *({HEAVY} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, check=True).stdout
    assert found.split() == list(LIGHT), found


def test_public_names_resolve() -> None:
    import fastcnn

    assert all(getattr(fastcnn, name) is not None for name in fastcnn.__all__)
    with pytest.raises(AttributeError):
        _ = fastcnn.nothing


def test_what_tests_start_in_another_folder_finds_the_package(tmp_path: Path) -> None:
    """Where PYTHONPATH is "." and nothing is installed, too: -S leaves site-packages out."""
    assert all(Path(path).is_absolute() for path in os.environ["PYTHONPATH"].split(os.pathsep))
    script = "import importlib.util; print(importlib.util.find_spec('fastcnn').origin)"
    command = [sys.executable, "-S", "-c", script]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(ROOT)


def test_a_run_imports_no_sympy(photos: Path) -> None:
    """Some of torch's functions do, and inductor, which takes seconds."""
    words = ["train", str(photos), "--epochs=1", "--image-size=32", "--filters=4", "--no-report", "--quiet"]
    words.append("--deterministic")  # torch's function for it imports inductor
    unwanted = {"sympy", "torch._inductor.config"}
    code = f"import sys; from fastcnn.cli import main; main({words}); print(*{unwanted} & set(sys.modules), sep=',')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
