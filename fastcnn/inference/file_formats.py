"""File formats of exports: reading parts and metadata without running anything in the file, and hashing them."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

METADATA = "fastcnn.json"

# Records that torch's archive writer adds by itself.
_INCIDENTAL = (".data/serialization_id", ".data/version", "version", "byteorder")


class Contents(NamedTuple):
    """Parts and metadata of an exported file."""

    parts: dict[str, bytes]
    """Name -> bytes of all but the metadata: weights, program, structure."""
    metadata: dict[str, Any]
    """Empty if the file was not exported by fastcnn."""


def digest(parts: dict[str, bytes], metadata: dict[str, Any]) -> str:
    """Return the SHA-256 of a file's parts and its metadata without the hash in it."""
    total = hashlib.sha256()
    rest = {name: value for name, value in metadata.items() if name != "sha256"}
    plain = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    for name, content in [*sorted(parts.items()), (METADATA, plain)]:
        total.update(f"{len(name)} {name} {len(content)} ".encode())
        total.update(content)
    return total.hexdigest()


def read_archive(content: bytes) -> Contents:
    """Return the contents of a torch archive, read by torch. Raises ValueError or RuntimeError if it is not one."""
    import torch

    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    names = reader.get_all_records()
    if len(set(names)) < len(names):
        raise ValueError("the archive has two records of one name")
    parts = {name: reader.get_record(name) for name in names}
    metadata = parts.pop(f"extra/{METADATA}", b"{}")
    return Contents({name: part for name, part in parts.items() if name not in _INCIDENTAL}, _parse(metadata))


def pack_archive(contents: Contents) -> bytes:
    """Return the bytes of a torch archive with the given contents."""
    import torch

    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    writer.set_min_version(10)  # of the file format; torch has written it since 1.13
    metadata = json.dumps(contents.metadata).encode()
    for name, part in {**contents.parts, f"extra/{METADATA}": metadata}.items():
        writer.write_record(name, part, len(part))
    writer.write_end_of_file()
    return file.getvalue()


_METADATA_PROPS = 14  # of ONNX's ModelProto: entries of a key (1) and a value (2)


def read_onnx(content: bytes) -> Contents:
    """Return the contents of an ONNX file: the model, and the metadata in its properties. Raises ValueError."""
    model, found = [], list[bytes]()
    for number, whole, value in _fields(content):
        entry = {n: v for n, _, v in _fields(value)} if number == _METADATA_PROPS else {}
        if entry.get(1) == METADATA.encode():
            found.append(entry.get(2, b""))
        else:
            model.append(whole)
    if len(found) > 1:
        raise ValueError("the file has the metadata twice")
    return Contents({"model": b"".join(model)}, _parse(found[0]) if found else {})


def pack_onnx(contents: Contents) -> bytes:
    """Return the bytes of an ONNX file with the given contents."""
    entry = _field(1, METADATA.encode()) + _field(2, json.dumps(contents.metadata).encode())
    return contents.parts["model"] + _field(_METADATA_PROPS, entry)


def _fields(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number, whole bytes and value of each field of a protobuf message (its encoding's documentation)."""
    start = 0
    while start < len(content):
        key, place = _varint(content, start)
        kind = key & 7
        if kind == 2:
            length, place = _varint(content, place)
            end = place + length
        elif kind == 0:
            _, end = _varint(content, place)
        elif kind in (1, 5):
            end = place + (8 if kind == 1 else 4)
        else:
            raise ValueError("no protobuf message")
        if end > len(content):
            raise ValueError("the file ends too early")
        yield key >> 3, content[start:end], content[place:end]
        start = end


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("no protobuf message")


def _field(number: int, value: bytes) -> bytes:
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _parse(text: bytes) -> dict[str, Any]:
    metadata = json.loads(text)
    return metadata if isinstance(metadata, dict) else {}


class Format(NamedTuple):
    """Functions that read and write a file format."""

    read: Callable[[bytes], Contents]
    pack: Callable[[Contents], bytes]


FORMATS = {
    ".torchscript": Format(read_archive, pack_archive),
    ".onnx": Format(read_onnx, pack_onnx),
    ".pt2": Format(read_archive, pack_archive),
}


def check_program(parts: dict[str, bytes]) -> None:
    """Raise ValueError if torch.export.load would unpickle or evaluate something in an archive.

    It unpickles sample inputs, weights marked as pickled and objects among the constants, evaluates guards and size
    expressions, and calls any torch function that a node names. Our exports hold only numbers and ATen operators.
    """
    for name, part in parts.items():
        if not re.fullmatch(_PLAIN_PARTS, name) or (name.startswith("data/sample_inputs/") and part):
            raise ValueError(f"it holds {name}, which fastcnn does not write")
        if name.endswith("_config.json"):
            for entry in json.loads(part)["config"].values():
                if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                    raise ValueError("it holds pickled tensors")
    _check_node(json.loads(parts["models/model.json"]))


_PLAIN_PARTS = (
    r"archive_(format|version)|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
)
_PLAIN_STRINGS = {
    "target": r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|mul|add|sub|floordiv)",
    "expr_str": r"(Symbol\('s\d+'(, (positive|integer|nonnegative)=True)*\)|Integer\(-?\d+\)|Mul|Add|FloorDiv|[ ,()])+",
}


def _check_node(node: Any) -> None:
    if isinstance(node, list):
        for item in node:
            _check_node(item)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name in ("guards_code", "metadata") and value:
                raise ValueError(f"its program has {name}")
            if name in _PLAIN_STRINGS and not re.fullmatch(_PLAIN_STRINGS[name], str(value)):
                raise ValueError(f"its program uses {value}")
            _check_node(value)
