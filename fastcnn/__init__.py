"""Train a small image classifier from a folder of photos as fast as the machine allows.

>>> import fastcnn
>>> result = fastcnn.fit(fastcnn.Config(data="photos", epochs=5))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcnn.artefact import open as open_artefact
    from fastcnn.config import Config
    from fastcnn.errors import FastCNNError
    from fastcnn.export import export_run
    from fastcnn.index import Index, scan
    from fastcnn.model import SmallCNN
    from fastcnn.predict import predict_photos
    from fastcnn.rescore import evaluate_run
    from fastcnn.train import Result, fit

# Lazy (PEP 562), so that `fastcnn --help` does not wait for torch.
_PUBLIC = {
    "Config": "fastcnn.config:Config",
    "FastCNNError": "fastcnn.errors:FastCNNError",
    "Index": "fastcnn.index:Index",
    "Result": "fastcnn.train:Result",
    "SmallCNN": "fastcnn.model:SmallCNN",
    "evaluate_run": "fastcnn.rescore:evaluate_run",
    "export_run": "fastcnn.export:export_run",
    "fit": "fastcnn.train:fit",
    "open_artefact": "fastcnn.artefact:open",
    "predict_photos": "fastcnn.predict:predict_photos",
    "scan": "fastcnn.index:scan",
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
