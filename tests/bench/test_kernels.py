"""Machine code, launches and bounds of the hybrid engine's step, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")

MOST = {"pool_forward": 5000, "pool_backward": 4450, "head_forward": 1750, "head_backward": 2550, "adam_update": 990}
"""Instructions that a warp issues at batch 32 for sm_90 in bf16, by Triton 3.6 or 3.7: a change that raises them has to
say why."""


def printed(*command: str) -> tuple[str, int]:
    """What Python prints and its exit code, in a process of its own: without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "triton")  # what the last run compiled
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.stdout, done.stderr
    return done.stdout, done.returncode


MEASURED = """
import json
from unittest import mock
from bench.kernels import __main__ as command
codes = []
def kept(launches, architecture):
    codes.extend(plain(launches, architecture))
    return codes
plain = command.machine_code
with mock.patch.object(command, "machine_code", kept):
    code = command.main("--types bf16 --architectures 90 --batches 32".split())
print(json.dumps({"code": code, "instructions": [[one.kernel, one.instructions] for one in codes]}))
"""
LAUNCHES = """
import json
from bench.kernels import bounds
from bench.kernels.launch_counts import count_launches
found = bounds.bounds("hybrid", 32)
print(json.dumps({
    "all": found.num_launches,
    "augmented": count_launches("hybrid", "bf16", ["flip", "shift"]).total(),
    "seconds": max(found.seconds(bounds.CARDS[0]).values()),
}))
"""


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], str]:
    """What is known of a step at batch 32 in bf16 on sm_90, each launch compiled once; and what the command prints."""
    text, code = printed("-c", MEASURED)
    assert code == 0, text
    return json.loads(text.splitlines()[-1]), text


@pytest.mark.long
def test_kernels_compile_for_a_gpu_and_issue_no_more_instructions(measured: tuple[dict[str, Any], str]) -> None:
    """Through Triton's own specialisation; the reference network spills nothing."""
    found, text = measured
    assert found["code"] == 0, text
    assert "14 launches, 0 of which spill registers" in text
    most = {name: max(count for kernel, count in found["instructions"] if kernel == name) for name in MOST}
    assert all(most[name] <= MOST[name] for name in MOST), most
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| pool")]
    assert max(int(row[-1]) for row in rows if row[0] == "pool_forward") == most["pool_forward"]


@pytest.mark.long
def test_all_launches_compile_for_two_gpus_in_all_types() -> None:
    for filters in ("32,32,32,32,32", "32,64,128,256,512", "8,5,6,7,8"):
        text, code = printed("-m", "bench.kernels", "--filters", filters)
        print("\n" + text)
        assert code == 0, text


EARLY = """
import json
from unittest import mock
from triton.runtime.driver import driver
from bench.kernels.machine_code import own_launches
from bench.kernels.pretended_gpu import pretended_driver
from fastcnn.network.kernels import launch
found = {}
with (
    mock.patch.object(driver, "_active", pretended_driver(90)),
    mock.patch.object(launch, "starts_early", lambda one: True),
):
    for one in {one.kernel: one for one in own_launches("bf16")}.values():
        made = one.kernel.warmup(**one.arguments, grid=one.grid, **one.options())
        found[one.kernel.__name__] = [made.metadata.launch_pdl, made.asm["ptx"].count("griddepcontrol.")]
print(json.dumps(found))
"""


@pytest.mark.long
def test_launches_that_begin_early_compile() -> None:
    """Each waits for the one before and lets the next one begin."""
    text, code = printed("-c", EARLY)
    assert code == 0
    assert json.loads(text.splitlines()[-1]) == {name: [True, 2] for name in (*MOST, "collect")}


@pytest.mark.long
def test_a_step_of_the_hybrid_engine_is_thirty_launches() -> None:
    text, code = printed("-c", LAUNCHES)
    assert code == 0, text
    found = json.loads(text.splitlines()[-1])
    assert found["all"] <= 30
    assert found["augmented"] <= 31
    assert found["seconds"] < 100e-6


INDUCTOR = """
import importlib.util, re, tempfile
from pathlib import Path
from unittest import mock
from torch._inductor.runtime import triton_helpers
from triton.runtime.driver import driver
from bench.kernels import inductor, launch_counts
from bench.kernels.pretended_gpu import pretended_driver, pretended_gpu
found, plain = [], inductor.gpu_code
def kept(graph, inputs):
    found.append(plain(graph, inputs))
    return found[-1]
with mock.patch.object(inductor, "gpu_code", kept):
    launch_counts.count_launches("hybrid", "bf16", ["flip", "shift"])
    launch_counts.count_launches("compiled", "bf16")
    launch_counts.count_launches("compiled", "fp16")
pattern = re.compile(r"async_compile\\.triton\\('(\\w+)', '''(.*?)'''", re.DOTALL)
kernels = [kernel for code in found for kernel in pattern.findall(code)]
with (
    tempfile.TemporaryDirectory() as folder,
    pretended_gpu(),
    mock.patch.object(driver, "_active", pretended_driver(90)),
    mock.patch.object(triton_helpers, "set_driver_to_gpu"),
):
    for number, (name, source) in enumerate(kernels):
        path = Path(folder) / f"kernel_{number}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for config in getattr(module, name).configs:
            getattr(module, name)._precompile_config(config)
print(len(kernels))
"""


@pytest.mark.long
def test_what_inductor_writes_for_a_gpu_compiles() -> None:
    text, code = printed("-c", INDUCTOR)
    assert code == 0
    assert int(text.splitlines()[-1]) > 50
