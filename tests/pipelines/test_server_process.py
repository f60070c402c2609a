"""A decoder's server that is a fork of its caller, as `fastcnn predict` starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DECODER = """
import os
from pipelines.pillow import decode as whole
from pipelines.verdict import read

def decode(sources, *rest):
    if any(read(source).endswith(b"abort") for source in sources):
        os.abort()
    return whole(sources, *rest)
"""

CALLER = """
import io, os, signal, sys, threading
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np
from PIL import Image
import pipelines
from pipelines import workers
from pipelines.server_process import ForkedProcess
from pipelines.shared_memory import shared
from pipelines.workers import Workers, end_early, start_early

pipelines.BACKENDS["planted"] = "planted_decoder"
file = io.BytesIO()
Image.new("RGB", (64, 64), "red").save(file, "JPEG")
good = file.getvalue()
out = shared((3, 32, 32, 3))

start_early("planted", fork=True)
forked = workers._early["planted"]._process
assert isinstance(forked, ForkedProcess)
print("text that the fork must not print again")
with Workers("planted") as decoding:
    reasons = [verdict.reason for verdict in decoding.decode([good, good + b"abort", good], 32, out)]
    assert reasons == ["", "decoder crash", ""], reasons
    assert (out[0] == out[2]).all() and out[0].any() and not out[1].any()
    os.kill(forked.pid, signal.SIGKILL)  # the next is a new process: this one may have threads by now
    decoding._workers[0].kill()
    decoding._workers[0] = None
    assert decoding.decode([good], 32, out[:1])[0].ok
    assert not isinstance(decoding._server._process, ForkedProcess)
assert not os.path.exists(f"/proc/{forked.pid}")

stop = threading.Event()
threading.Thread(target=stop.wait).start()
start_early("planted", fork=True)
assert not isinstance(workers._early["planted"]._process, ForkedProcess)  # a second thread may hold a lock
end_early()
stop.set()
"""


def test_a_fork_keeps_the_promise_about_crashes(tmp_path: Path) -> None:
    (tmp_path / "planted_decoder.py").write_text(DECODER)
    (tmp_path / "caller.py").write_text(CALLER)
    done = subprocess.run([sys.executable, "caller.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
