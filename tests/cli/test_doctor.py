"""`fastcnn doctor` on this machine and on simulated ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import pipelines
from fastcnn.cli import doctor, main
from fastcnn.network.kernels import cpu_max_pool

SMI = """#!/bin/sh
if [ $# -gt 0 ]; then echo "NVIDIA H100 80GB HBM3, 580.65.06"; else echo "| NVIDIA-SMI 580   CUDA Version: 13.0  |"; fi
"""


def checks() -> dict[str, doctor.Check]:
    return {check.what: check for check in doctor.examine()}


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", "--json", "--cache-dir", str(tmp_path)])
    found = {line["what"]: line for line in json.loads(capsys.readouterr().out)}
    wanted = {
        "fastcnn",
        "processor",
        "memory",
        "disk",
        "torch",
        "GPU",
        "DALI",
        "libjpeg-turbo",
        "Pillow",
        "compiler",
        "W&B",
    }
    assert wanted <= set(found)
    assert torch.__version__ in found["torch"]["found"]
    assert str(tmp_path) in found["disk"]["found"]
    assert found["workers"]["state"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, advice in ((None, "install torch's CUDA build"), ("12.9", "update the driver")):
        monkeypatch.setattr(torch.version, "cuda", built)
        found = checks()
        assert found["torch"].state == found["GPU"].state == "wrong"
        assert advice in found["torch"].advice
        assert found["driver"].found == "580.65.06, for CUDA up to 13.0"
    status = main(["doctor"])
    assert status == 4


def test_what_is_missing_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel() -> None:
        raise cpu_max_pool.NoKernel("there is no C compiler: install gcc")

    for name in ("dali", "turbo"):
        monkeypatch.setitem(pipelines.BACKENDS, name, "pipelines.not_there")
        monkeypatch.delitem(pipelines._imported, name, raising=False)
    monkeypatch.setattr(cpu_max_pool, "load", no_kernel)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 2**20))  # type: ignore[attr-defined]
    found = checks()
    assert {found[what].state for what in ("DALI", "libjpeg-turbo", "compiler", "W&B", "disk")} == {"without"}
    assert found["libjpeg-turbo"].advice == "pip install simplejpeg"
    assert "gcc" in found["compiler"].advice
    assert found["W&B"].advice == "wandb login"
    assert "--cache-dir" in found["disk"].advice
    text = doctor.table(list(found.values()))
    assert all(line.advice in text for line in found.values())


def test_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    line = checks()["W&B"]
    assert line.state == "ok"
    assert "logged in" in line.found
    assert "secret" not in doctor.table([line])
