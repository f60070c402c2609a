"""Train small image classifiers from folders of images as fast as the machine allows.

>>> import fastcnn
>>> result = fastcnn.fit(fastcnn.Config(data="photos", epochs=5))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcnn.system.waiting import wait_briefly

if TYPE_CHECKING:
    from fastcnn.config import Config
    from fastcnn.data.index import Index, scan
    from fastcnn.errors import FastCNNError
    from fastcnn.export.exporters import export_run
    from fastcnn.inference.artefact import open as open_artefact
    from fastcnn.inference.predict import predict_photos
    from fastcnn.network.small_cnn import SmallCNN
    from fastcnn.runs.evaluate_run import evaluate_run
    from fastcnn.runs.fit import Result, fit

wait_briefly()  # the one effect of this import, as torch must not be loaded before it

# Lazy (PEP 562), so that `fastcnn --help` does not wait for torch.
_PUBLIC = {
    "Config": "fastcnn.config:Config",
    "FastCNNError": "fastcnn.errors:FastCNNError",
    "Index": "fastcnn.data.index:Index",
    "Result": "fastcnn.runs.fit:Result",
    "SmallCNN": "fastcnn.network.small_cnn:SmallCNN",
    "evaluate_run": "fastcnn.runs.evaluate_run:evaluate_run",
    "export_run": "fastcnn.export.exporters:export_run",
    "fit": "fastcnn.runs.fit:fit",
    "open_artefact": "fastcnn.inference.artefact:open",
    "predict_photos": "fastcnn.inference.predict:predict_photos",
    "scan": "fastcnn.data.index:scan",
}

__all__ = [
    "Config",
    "FastCNNError",
    "Index",
    "Result",
    "SmallCNN",
    "evaluate_run",
    "export_run",
    "fit",
    "open_artefact",
    "predict_photos",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastcnn' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
