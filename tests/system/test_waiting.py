"""How OpenMP's threads wait is set before torch is loaded, unless the user has set it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastcnn.system.waiting import BLOCK_TIME, CHOSEN_BY_USER, SPIN_COUNT

SHOW = (
    "import os; print(*(os.environ.get(name, '-') for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')))"
)
OURS = f"- {SPIN_COUNT} {BLOCK_TIME}"


def run(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_import_sets_it_before_torch_is_loaded() -> None:
    assert run(f"import fastcnn, sys; assert 'torch' not in sys.modules; {SHOW}") == OURS


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        ({"OMP_WAIT_POLICY": "active"}, "active - -"),
        ({"GOMP_SPINCOUNT": "7"}, "- 7 -"),
        ({"KMP_BLOCKTIME": "0"}, "- - 0"),
    ],
)
def test_what_the_user_has_set_stays(chosen: dict[str, str], shown: str) -> None:
    assert run(f"import fastcnn; {SHOW}", **chosen) == shown


def test_children_inherit_it() -> None:
    code = f"import fastcnn, subprocess, sys; subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)"
    assert run(code) == OURS


def test_nothing_is_set_once_torch_is_loaded() -> None:
    assert run(f"import sys; sys.modules['torch'] = sys; import fastcnn; {SHOW}") == "- - -"
