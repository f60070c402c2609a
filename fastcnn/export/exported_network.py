"""The network of a checkpoint as it is exported."""

from __future__ import annotations

from typing import Any

from fastcnn.network.inference_network import Deployed, Inference
from fastcnn.network.small_cnn import restore
from fastcnn.system.device import DTYPES
from fastcnn.system.text import as_utf8


def deployed(state: dict[str, Any], precision: str, *, always_resize: bool) -> Deployed:
    """Return the network of a checkpoint as it is exported; see `Deployed`. precision: a name in `DTYPES`."""
    config = state["config"]
    return Deployed(
        Inference(restore(state)),
        config["image_size"],
        config["mean"],
        config["std"],
        list(map(as_utf8, state["classes"])),
        DTYPES[precision],
        always_resize=always_resize,
    ).eval()
