"""The proof on a borrowed GPU: it goes on after whatever fails, ends in time, and measures nothing twice."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_proof
from bench.gpu_proof import PHASES, SECONDS, Step, pack, run_phase
from bench.proof.lines import OUT_OF_TIME, NotHere, Proof
from tests.bench.test_bench import ROOT, outside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GPU boxes run Linux")
STEPS = "tests.bench.proof_steps"


def proof_in(folder: Path, *, seconds: float = 60.0, session: str = "a", **options: Any) -> Proof:
    return Proof(folder / "out", 1, False, session, time.time() + seconds, **options)


def outcomes(proof: Proof) -> dict[str, str]:
    return {line["figure"]: line["outcome"] for line in proof.lines() if not line["figure"].startswith("part: ")}


def test_a_figure_is_measured_once(tmp_path: Path) -> None:
    proof, calls = proof_in(tmp_path), iter(range(9))
    for _ in range(2):
        assert proof.measure("x", lambda: {"call": next(calls)}) == {"call": 0}
    with proof.path.open("a") as file:
        file.write('{"figure": "y", "outc')  # the machine went
    assert proof_in(tmp_path, session="b").measure("x", lambda: {"call": next(calls)}) == {"call": 0}
    small = Proof(proof.out, 1, True, "c", proof.deadline)
    assert small.measure("x", lambda: {"call": next(calls)}) == {"call": 1}


def test_what_failed_is_tried_again_in_the_next_sitting(tmp_path: Path) -> None:
    def not_here() -> dict[str, Any]:
        raise NotHere("needs a GPU")

    proof = proof_in(tmp_path, step="a step")
    assert proof.measure("bad", lambda: {"quotient": 1 / 0}) is None
    assert proof.measure("bad", lambda: {"quotient": 1}) is None
    assert proof.exit_code() == 1
    later = proof_in(tmp_path, session="b", step="a step")
    assert later.measure("bad", lambda: {"quotient": 1}) == {"quotient": 1}
    assert later.measure("absent", not_here) is None
    assert later.exit_code() == 0
    late = proof_in(tmp_path, session="c", seconds=1, step="a step")
    assert late.measure("late", lambda: {}) is None
    assert late.exit_code() == OUT_OF_TIME


def test_a_phase_goes_on_after_failures_and_is_repeated_where_it_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Step(name, 20, f"{STEPS}:{name}") for name in ("failing", "exiting", "dying", "lost", "good")]
    proof = proof_in(tmp_path)
    assert run_phase(proof, steps) == 1
    assert outcomes(proof) == {
        "failing": "failed",
        "after the failing one": "measured",
        "first": "measured",
        "ends the process": "failed",
        "never ends": "failed",
        "last": "measured",
        "illegal": "failed",
        "by another process": "measured",
        "good": "measured",
    }
    said = capsys.readouterr().out
    assert "failed: failing  ZeroDivisionError: division by zero" in said
    assert "step exiting: failed" in said
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert {"out/lines.jsonl", "out/logs/1-exiting.txt", "out/summary-1.txt"} <= set(tar.getnames())
    assert '| good | {"answer": 42' in (proof.out / "figures.md").read_text()
    assert run_phase(proof_in(tmp_path, session="b"), [Step("good", 20, f"{STEPS}:failing"), steps[-1]]) == 1
    assert "step good: done before" in capsys.readouterr().out


def test_a_phase_ends_in_time_and_names_what_did_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_proof, "PACKING_SECONDS", 0.5)
    proof = proof_in(tmp_path, seconds=6.5)
    assert run_phase(proof, [Step("slow", 30, f"{STEPS}:slow"), Step("good", 30, f"{STEPS}:good")]) == OUT_OF_TIME
    assert time.time() < proof.deadline + 1
    said = capsys.readouterr().out
    assert "no time left: slow" in said
    assert "step good: out of time" in said
    assert has_ended(proof.values("orphan")["pid"])


def test_a_phase_that_is_ended_leaves_its_tar_and_no_process(tmp_path: Path) -> None:
    script = f"""
import sys
from bench import gpu_proof
gpu_proof.PHASES[1] = [gpu_proof.Step("slow", 60, "{STEPS}:slow")]
sys.exit(gpu_proof.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out"), "--phase", "1"]
    proof = proof_in(tmp_path)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=outside()) as process:
        while "slow" not in outcomes(proof):
            time.sleep(0.1)
        process.terminate()
        assert "ended early; packed" in process.communicate(timeout=30)[1]
    assert process.returncode == 128 + 15
    assert has_ended(proof.values("orphan")["pid"])
    assert (tmp_path / "out.tar.gz").is_file()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice; it has a few seconds for that."""
    stat = Path("/proc") / str(pid) / "stat"
    for _ in range(100):
        try:
            if "Z" in stat.read_text().rpartition(")")[2]:
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_what_nothing_runs_without_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_proof.NEEDED, "no_such_module", "a-package")
    assert gpu_proof.main([str(tmp_path / "out"), "--phase", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_proof: error: a-package: not installed; where there is a network, scripts/gpu_pack.sh")


def test_what_is_packed_stays_below_15_mb(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    for name, size in (("lines.jsonl", 10), ("work/cache.bin", 10), ("a.png", 9 << 20), ("b.png", 10 << 20)):
        (out / name).write_bytes(os.urandom(size))
    target, left_out = pack(out)
    assert target.stat().st_size < 15_000_000
    assert left_out == ["b.png"]
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["out/lines.jsonl", "out/a.png"]


def test_phases_are_as_long_as_promised_and_their_steps_are_there() -> None:
    assert all(SECONDS[phase] + 10 <= 60 * minutes for phase, minutes in {1: 5, 2: 6, 3: 8}.items())
    for steps in PHASES.values():
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            module, _, name = step.function.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("timeout", [True, False])
def test_tests_have_a_line_each_and_pass_once(timeout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pytest-timeout a file is the least that can be ended."""
    from bench.proof import machine_and_steps

    files = [tmp_path / name for name in ("test_hangs.py", "test_mixed.py")]
    files[0].write_text("import time\n\ndef test_hangs():\n    time.sleep(60)\n")
    files[1].write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2\n")
    has = {"pytest": True, "xdist": False, "pytest_timeout": timeout, "pytest_benchmark": True}
    monkeypatch.setattr(machine_and_steps, "installed", has.__getitem__)
    monkeypatch.setattr(machine_and_steps, "FILE_SECONDS", 4.0)
    proof = Proof(tmp_path / "out", 1, True, "a", time.time() + 40)
    for name, value in {**proof.environment(), **outside(), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    if timeout:  # it need not be installed: what is given to pytest is what counts
        given: list[list[str]] = []
        monkeypatch.setattr(machine_and_steps, "_pytest", lambda proof, options, files: given.append([*options, files]))
        machine_and_steps.run_tests(proof, files, "not long")
        assert len(given) == 1
        assert "--timeout=90" in given[0]
        return
    machine_and_steps.run_tests(proof, files, "not long")
    found = outcomes(proof)
    assert found["tests of test_hangs"] == "failed"
    assert found["tests of test_mixed"] == "measured"  # each test has its line
    assert {name.rpartition("::")[2]: outcome for name, outcome in found.items() if "::" in name} == {
        "test_good": "measured",
        "test_bad": "failed",
    }


def test_nvimagecodec_decodes_as_pillow_does(photos: Path) -> None:
    """Its CPU form, so that the calls are right where nobody has seen them on a GPU."""
    pytest.importorskip("nvidia.nvimgcodec")
    from bench.proof import truth

    paths = sorted(photos.rglob("*.jpg"))[:4]
    files = [*(path.read_bytes() for path in paths), b"no photo"]
    found = truth._nvimagecodec("CPU_ONLY", 1, files)
    assert (found["photos"], found["refused"]) == (5, 1)
    assert found["mean_difference_levels"] < 0.5
    assert truth._nvimagecodec("CPU_ONLY", 1, [truth._progressive(path) for path in paths])["refused"] == 0
    with pytest.raises(NotHere, match="decodes none of 1 files"):
        truth._nvimagecodec("CPU_ONLY", 1, [b"no photo"])


PIP = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
print(*arguments)
folder = pathlib.Path(arguments[arguments.index("--dest") + 1])
(folder / f"{{arguments[-1]}}-1-py3-none-any.whl").write_bytes(bytes({size}))
"""


@pytest.mark.parametrize(("size", "code"), [(1000, 0), (31 << 20, 1)])
def test_what_a_box_without_network_lacks_is_packed(size: int, code: int, photos: Path, tmp_path: Path) -> None:
    pip, carry = tmp_path / "python", tmp_path / "carry"
    pip.write_text(PIP.format(python=sys.executable, size=size))
    pip.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(pip), "CARRY": str(carry), "PHOTOS": str(photos)}
    command = [str(ROOT / "scripts" / "gpu_pack.sh"), "3.13"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    if code:
        assert "are more than 61440: choose fewer PHOTOS" in done.stderr
        assert not carry.exists()
        return
    with_needs, alone = [line for line in done.stdout.splitlines() if line.startswith("-m pip")]
    assert all("--only-binary=:all:" in line and "--python-version 3.13" in line for line in (with_needs, alone))
    assert with_needs.endswith(" pydantic")
    assert "--no-deps simplejpeg platformdirs nvidia-nvimgcodec-cu13 nvidia-nvjpeg" in alone
    carried = [path.relative_to(carry / "photos") for path in (carry / "photos").rglob("*.jpg")]
    assert {path.parts[0] for path in carried} == {path.name for path in photos.iterdir() if path.is_dir()}
    assert 0 < sum((photos / path).stat().st_size for path in carried) <= 20_000_000
    assert "2 wheels and" in done.stdout


WITHOUT_PIP = """#!/bin/sh
case "$*" in
  *"import pip"* | "-m pip"*) exit 1 ;;
  "-m bench.gpu_proof"*) exec {python} -c "import carried; print(carried.__file__)" ;;
esac
exec {python} "$@"
"""


def test_what_was_carried_is_used_in_an_environment_without_pip(tmp_path: Path) -> None:
    carry, python = tmp_path / "carry", tmp_path / "python"
    (carry / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(carry / "wheels" / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
    python.write_text(WITHOUT_PIP.format(python=sys.executable))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CARRY": str(carry)}
    command = [str(ROOT / "scripts" / "gpu_proof.sh"), str(tmp_path / "out"), "--phase", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / "out" / "site" / "carried.py"), done.stderr


NCU = """#!{python}
import re, subprocess, sys
arguments = sys.argv[1:]
at = arguments.index({python!r})
given = dict(zip(arguments[1:at:2], arguments[2:at:2]))  # --csv takes nothing
names = re.compile(given["--kernel-name"].removeprefix("regex:"))
subprocess.run(arguments[at:], check=True)
print("==PROF== Connected to process 1")
print('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
for number, metric in enumerate(given["--metrics"].split(",")):
    print(f'"{{number}}","pool_forward","{{metric}}","%","{{number}}"')
"""
SANITIZER = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
subprocess.run(arguments[arguments.index({python!r}):], check=True)
if arguments[1] == {bad!r}:
    print("========= ERROR SUMMARY: 3 errors")
    sys.exit(int(arguments[arguments.index("--error-exitcode") + 1]))
print("========= ERROR SUMMARY: 0 errors")
"""


def stand_ins(folder: Path, bad: str = "") -> Path:
    """Return a folder with what looks like ncu and compute-sanitizer: they run what they are given, on the CPU."""
    folder.mkdir(exist_ok=True)
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text.format(python=sys.executable, bad=bad))
        (folder / name).chmod(0o755)
    return folder


def lines_of(phase: int, out: Path, code: int, **environment: str) -> dict[str, dict[str, Any]]:
    """Run a phase's small form by the script; return the last line of each figure."""
    variables = {**outside(), "PYTHON": sys.executable, **environment}
    variables.pop("TRITON_INTERPRET", None)  # the tests' own: nothing can be compiled under it
    command = [str(ROOT / "scripts" / "gpu_proof.sh"), str(out), "--phase", str(phase), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == code, done.stdout + done.stderr
    assert [path.name for path in out.parent.glob("*.tar.gz")] == ["out.tar.gz"]
    with tarfile.open(out.with_name("out.tar.gz")) as tar:
        lines = tar.extractfile("out/lines.jsonl")
        assert lines
        return {line["figure"]: line for line in map(json.loads, lines.read().decode().splitlines())}


def failed(lines: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the figures that failed, parts of the phase aside."""
    return [
        name for name, line in lines.items() if line["outcome"] == "failed" and not name.startswith(("part:", "tests"))
    ]


@pytest.mark.long
@pytest.mark.parametrize("phase", [1, 3])
def test_the_small_form_runs_on_a_cpu(phase: int, tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text("def test_planted():\n    assert not 'made to fail'\n")
    lines = lines_of(phase, tmp_path / "out", 1 if phase == 1 else 0, FASTCNN_PROOF_TESTS=str(planted))
    assert [name.rpartition("::")[2] for name in failed(lines)] == (["test_planted"] if phase == 1 else [])
    assert {f"part: {step.name}" for step in gpu_proof.PHASES[phase]} <= lines.keys()


@pytest.mark.long
def test_the_small_form_of_phase_2_goes_on_after_a_tool_that_fails_and_repeats_that_alone(tmp_path: Path) -> None:
    out, tools = tmp_path / "out", stand_ins(tmp_path / "tools", bad="racecheck")
    lines = lines_of(2, out, 1, FASTCNN_PROOF_TOOLS=str(tools))
    assert failed(lines) == ["compute-sanitizer racecheck"]
    assert "exit code 9: ========= ERROR SUMMARY: 3 errors" in lines["compute-sanitizer racecheck"]["reason"]
    assert {f"part: {step.name}" for step in gpu_proof.PHASES[2]} <= lines.keys()
    measured = {name for name, line in lines.items() if line["outcome"] == "measured"}
    assert {"ncu", "compute-sanitizer memcheck", "kernels: eager, batch 8", "idea: gathering, batch 8"} <= measured
    assert {"rivals: ours, eager, bf16, batch 16", "rivals: plain, fp32, batch 16"} <= measured
    again = lines_of(2, out, 0, FASTCNN_PROOF_TOOLS=str(stand_ins(tools)))
    assert failed(again) == []
    assert all(again[name]["at"] == lines[name]["at"] for name in measured - {"part: compute-sanitizer"})


@pytest.mark.long
def test_counters_are_read_from_what_ncu_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.proof import causes

    proof = Proof(tmp_path / "out", 2, True, "a", time.time() + 60)
    monkeypatch.setattr(causes, "TOOLS_VARIABLE", "NO_SUCH_VARIABLE")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NotHere, match="ncu is not installed"):
        causes._counters(proof)
    monkeypatch.undo()
    monkeypatch.setenv("FASTCNN_PROOF_TOOLS", str(stand_ins(tmp_path / "tools")))
    monkeypatch.setattr(causes, "WATCHED", "a name that no engine has")
    table = {"most": ["void at::native::add<float>(int)", "aten::convolution"]}
    proof.write("kernels: a name that no engine has, batch 8", "measured", values=table)
    with pytest.raises(RuntimeError, match="ncu gave no table"):  # what it runs fails, and so it prints none
        causes._counters(proof)
