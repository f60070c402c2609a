from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="how Linux counts")
def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    one = "import torch; from fastcnn.system import device; print(device.peak_memory_bytes(torch.device('cpu')))"
    start = f"import subprocess, sys; x = b'x' * 2**30; subprocess.run([sys.executable, '-c', {one!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**30
