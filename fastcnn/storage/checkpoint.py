"""Checkpoints: plain tensors and plain data, written whole, and refused where a bit of them has changed.

The file is the zip archive that torch.save writes, with the SHA-256 of everything before it as the archive's comment:
torch's own reader verifies no checksum. Nothing is parsed before the checksum is right, and nothing in the file is ever
executed (`weights_only=True`). An attacker can make the checksum too, so the content is checked against `FIELDS`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shlex
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcnn.config import OPTIONS, read_yaml, resolve
from fastcnn.errors import FastCNNError, UsageError, first_line
from fastcnn.storage import files, run_folder

FORMAT = 2

_MARK = b"fastcnn sha256 "
_COMMENT_BYTES = len(_MARK) + 64
_END_OF_ZIP, _END_BYTES = b"PK\x05\x06", 22  # the last record of a zip archive, without its comment


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` always holds a whole one. Raises FastCNNError where it cannot be written."""
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT}, buffer)
    try:
        files.write(path, _sealed(buffer).getbuffer())
    except OSError as error:
        kept = "; the one before it is kept" if path.is_file() else ""
        raise FastCNNError(
            f"cannot write the checkpoint {path}: {error.strerror or error}{kept}; free some space or make the folder "
            f"writable, then run: fastcnn train --resume {shlex.quote(str(path.parent))}"
        ) from None


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint's fields (see `FIELDS`), with every tensor on the CPU.

    Raises FastCNNError where the file is missing, damaged, of another format, or has unknown content.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FastCNNError(f"no checkpoint {path}") from None
    except OSError as error:
        raise FastCNNError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    _check_seal(path, data)
    try:
        _check_archive(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text advises to execute the file
        raise FastCNNError(f"{path} is not a checkpoint that can be read: it is not plain data; nothing ran") from None
    except Exception as error:
        raise FastCNNError(f"{path} is not a checkpoint that can be read: {first_line(error)}") from None
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise FastCNNError(f"{path} is not a checkpoint of fastcnn")
    if state["format"] != FORMAT:
        newer = state["format"] > FORMAT
        what = "upgrade fastcnn to read it" if newer else "read it with the fastcnn that wrote it, or start a new run"
        raise FastCNNError(f"{path} has format {state['format']}, this fastcnn reads {FORMAT}: {what}")
    _check_content(path, state, len(data))
    state["config"] = _config(path, state["config"])
    return state


def load_of_run(run_dir: Path, name: str) -> dict[str, Any]:
    """Return a checkpoint of a run, with photos and cache where its config.yaml has them.

    They may have been moved since the checkpoint was saved. Raises FastCNNError as `load` does.
    """
    path = run_dir / name
    saved, now = load(path), read_yaml(run_dir / run_folder.CONFIG)
    places: dict[str, Any] = {field: now[field] for field in ("data", "cache_dir") if field in now}
    saved["config"] = _config(path, {**saved["config"], **places})
    return saved


def _sealed(archive: io.BytesIO) -> io.BytesIO:
    """Return a zip archive after appending its checksum as its comment."""
    with archive.getbuffer() as body:  # in place: a copy would cost as much as the checksum
        assert body[-_END_BYTES:].tobytes().startswith(_END_OF_ZIP), "an archive without a comment ends in this record"
        body[-2:] = struct.pack("<H", _COMMENT_BYTES)
        checksum = hashlib.sha256(body).hexdigest().encode()
    archive.seek(0, io.SEEK_END)
    archive.write(_MARK + checksum)
    return archive


def _check_seal(path: Path, data: bytes) -> None:
    body, comment = memoryview(data)[:-_COMMENT_BYTES], data[-_COMMENT_BYTES:]
    if not comment.startswith(_MARK):
        raise FastCNNError(f"{path} is cut short, or not a checkpoint of this fastcnn: it does not end in a checksum")
    if comment[len(_MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise FastCNNError(f"{path} is damaged: its checksum is wrong; restore a copy, or start a new run")


def _check_archive(data: bytes) -> None:
    """Raise ValueError for an archive that unpacks to more than its own size: torch.save compresses nothing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("it holds more than its own size")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_scalar(value: object) -> bool:
    return value is None or type(value) in (bool, float, str) or (type(value) is int and -(2**63) <= value < 2**64)


def _is_options(value: object) -> bool:
    return _is_mapping(value, lambda v: _is_scalar(v) or _is_list(v, _is_scalar))


def _is_row(value: object) -> bool:
    return _is_mapping(value, lambda v: type(v) in (int, float) and _is_scalar(v))


def _is_list(value: object, holds: Callable[[Any], bool]) -> bool:
    return type(value) is list and all(map(holds, value))


def _is_tensor(value: object) -> bool:
    plain = type(value) is Tensor and value.layout == torch.strided and not value.is_quantized
    return plain and value.device.type == "cpu" and not value.requires_grad  # type: ignore[attr-defined]


def _is_tensors(value: object) -> bool:
    return _is_mapping(value, _is_tensor)


def _is_mapping(value: object, holds: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict):
        return False
    return all(type(name) is str for name in value) and all(map(holds, value.values()))


FIELDS: dict[str, Callable[[object], bool]] = {
    "config": _is_options,
    "classes": lambda value: _is_list(value, lambda name: type(name) is str),
    "network": _is_options,
    "model": _is_tensors,
    "optimizer": _is_tensors,
    "average": lambda value: value is None or _is_tensor(value),
    "loss_scale": _is_tensors,
    "epoch": _is_count,
    "cursor": _is_count,
    "step": _is_count,
    "skipped": _is_count,
    "sums": _is_tensor,
    "best": _is_row,
    "rows": lambda value: _is_list(value, _is_row),
    "rng": _is_tensor,
    "device_rng": lambda value: value is None or _is_tensor(value),
}
"""Fields of a checkpoint, and the check of each."""


def _check_content(path: Path, state: dict[str, Any], size: int) -> None:
    for name, holds in FIELDS.items():
        if name not in state or not holds(state[name]):
            raise FastCNNError(f"{path} is not a checkpoint of fastcnn: its '{name}' is missing or of another kind")
    tensors = [state["average"], state["sums"], state["rng"], state["device_rng"]]
    tensors += [tensor for name in ("model", "optimizer", "loss_scale") for tensor in state[name].values()]
    # A tensor with strides of 0 can claim any size over a few bytes of the file.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None) > size:
        raise FastCNNError(f"{path} is not a checkpoint of fastcnn: its tensors are larger than the file")


def _config(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration, checked like one that a user gives.

    A cache folder without caches is dropped: a file from elsewhere must not make folders here.
    """
    known = {name: value for name, value in saved.items() if name in OPTIONS}
    try:
        config = resolve(known).to_dict()
    except UsageError as error:
        raise FastCNNError(f"{path} is not a checkpoint of fastcnn: {error}") from None
    if config["cache_dir"] and not any(Path(config["cache_dir"]).glob("*/cache.json")):
        config["cache_dir"] = None
    return config
