"""A decoder that crashes or hangs where a photo's last bytes say so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines

PLANTED = """
import ctypes, os, signal, time
import numpy as np
from pipelines import pillow
from pipelines.verdict import read

def end(data):
    if data.endswith(b"segfault") or os.path.exists("broken"):
        ctypes.string_at(0)
    if data.endswith(b"out of memory"):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.endswith(b"abort"):
        os.abort()
    if data.endswith(b"exit"):
        os._exit(7)
    if data.endswith(b"raise"):
        raise RuntimeError("no decoder should")
    if data.endswith(b"scribble"):
        raise SystemExit("nor this")
    if data.endswith(b"once"):
        try:
            os.mkdir("seen")
        except FileExistsError:
            return
        os.abort()

def decode(sources, size, out, boxes, workers, gpu, max_pixels):
    for source in sources:
        data = read(source)
        if data.endswith(b"slow"):
            open(f"begun-{os.getpid()}", "w").close()
            time.sleep(600)
        if data.endswith(b"stuck"):
            ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
        if data.endswith(b"a while"):
            time.sleep(0.2)
        end(data)
    return pillow.decode(sources, size, out, boxes, workers, gpu, max_pixels)

def identity(gpu):
    return "planted-1"
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A decoder that does what a file's last bytes say. JPEG ignores what stands behind its end."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted_decoder.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setitem(pipelines.BACKENDS, "planted", "planted_decoder")
    yield "planted"
    pipelines._imported.pop("planted", None)
    sys.modules.pop("planted_decoder", None)
