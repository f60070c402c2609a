"""The oldest torch of the supported range, in an environment of its own: what a GPU would run, rehearsed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OLDEST = "torch==2.11.0"
# Its Triton's interpreter does not work with numpy 2.4 and later.
OTHERS = ["numpy<2.4", "pillow", "pydantic", "pyyaml", "click", "rich", "jinja2", "filelock", "matplotlib"]
OTHERS += ["platformdirs", "pytest", "pytest-benchmark", "hypothesis", "scipy"]
KERNELS = "tests/bench/test_kernels.py"
REHEARSAL = (
    ["-m", "not long", "tests/network", "tests/training"],
    ["-m", "long", KERNELS, "--deselect", f"{KERNELS}::test_all_launches_compile_for_two_gpus_in_all_types"],
)


def python() -> Path:
    """The environment's Python; made where it is not there yet: 5 GB with the CUDA build's packages."""
    folder = ROOT / "build" / "oldest-torch"
    found = folder / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [found, "-m", "pip", "install", "-q", OLDEST, *OTHERS]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"{OLDEST} cannot be installed: {made.stderr.strip().splitlines()[-1]}")
        (folder / "made").touch()
    return found


@pytest.mark.long
@pytest.mark.parametrize("tests", REHEARSAL, ids=["network", "kernels"])
def test_the_rehearsal_under_the_oldest_torch(tests: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [python(), "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-5000:]
