"""Export of a trained run to one file with its preprocessing, verified against the trained model."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastcnn.errors import CheckError, FastCNNError, UsageError, ignoring_warnings, nearest, os_error_as
from fastcnn.export import model_card
from fastcnn.export.exported_network import deployed
from fastcnn.export.script_process import script
from fastcnn.export.verify import verify
from fastcnn.export.verify_process import verify_in_new_process
from fastcnn.inference import artefact, file_formats
from fastcnn.inference.artefact import Artefact, Images
from fastcnn.network.inference_network import Deployed, chunk
from fastcnn.network.pixels import Normalise, resized
from fastcnn.network.small_cnn import restore
from fastcnn.storage import checkpoint, files, run_folder
from fastcnn.system.device import versions
from fastcnn.system.switches import one_thread, tracing
from fastcnn.system.text import as_utf8, finite_or_none

Half = Literal["auto", "bf16", "fp16"]

# Largest difference in a probability between the trained and the exported model, by the network's precision.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}

# Largest difference for golden inputs that are resized. onnxruntime's resize differs from torch's by 6e-5 of a level,
# which rounds some 30 of 49,152 values to the next level: 1.3e-4 in a probability; a wrong resize makes 3e-2.
RESIZE_TOLERANCES = {"onnx": 1e-3}


def export_run(
    run: str | Path,
    *,
    format: str = "torchscript",
    output: str | Path | None = None,
    half: Half | None = None,
    moved_to: str | Path | None = None,
    cache_dir: str | Path | None = None,
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Export a run's best weights and return the file, after verifying it in a new process.

    Args:
        run: a run folder, or a name under `runs/`.
        format: a name in `EXPORTERS`.
        output: the file to write; None: `model.<format>` in the run folder. An earlier export is replaced, a folder
            that does not exist is made.
        half: 16-bit weights and arithmetic between normalisation and softmax; auto: bf16, in ONNX fp16.
        moved_to: the folder that the run's photos were moved to; None: they are where its config.yaml has them.
        cache_dir: folder of all caches; None: the run's.
        quick: verify on the golden inputs and `verify.QUICK` of the validation photos.
        progress: called with the number of validation photos compared and the total.
        note: called with each line of the result.

    Raises CheckError, and keeps no file, if it does not give the trained model's probabilities for the golden inputs
    and the validation photos (see `verify`); UsageError for a wrong argument; FastCNNError if it cannot be written, or
    the network gives no finite numbers.
    """
    _check_arguments(format, half)
    folder = run_folder.find(run)
    state = checkpoint.load(folder / "best.pt")
    path = Path(output) if output else folder / f"model.{format}"
    if not path.suffix == f".{format}" or path.is_dir():
        raise UsageError(f"--output: expected the name of a file that ends in .{format}, got {path}")
    _check_writable(path.parent)
    with os_error_as(f"cannot write {path}"), tempfile.TemporaryDirectory() as unchecked:
        temporary = Path(unchecked) / path.name
        write(state, temporary, format, half)
        verification = verify_in_new_process(temporary, folder, moved_to, cache_dir, quick=quick, progress=progress)
        if verification.problems:
            raise CheckError(f"{verification.problems[0]}: the exported file was not kept; please report this")
        files.write(path, temporary.read_bytes())
    note(f"exported {path} ({path.stat().st_size / 1024:,.0f} KiB), SHA-256 {artefact.remember_export(path)}")
    for line in verification.lines():
        note(line)
    _write_card(path, folder)
    return path


def open_run(run: Path) -> Artefact:
    """Return a run's best model as an exported one, of which no file is kept; compared on the golden inputs alone.

    Raises CheckError if they differ, FastCNNError if the checkpoint cannot be used.
    """
    state = checkpoint.load(run / "best.pt")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.torchscript"
        write(state, file, "torchscript")
        model = artefact.open(file)
    if problems := verify(model).problems:
        raise CheckError(f"{run / 'best.pt'} gives another model once exported: {problems[0]}; please report this")
    return dataclasses.replace(model, path=run / "best.pt")


def _check_writable(folder: Path) -> None:
    """Make a folder. Raises FastCNNError, before there is anything to lose, where no file can be written in it."""
    with os_error_as(f"cannot write into the folder {folder}", "; choose another with --output"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _write_card(path: Path, run: Path) -> None:
    """Write the model card of an exported file and of the files beside it that hold the same model."""
    metadata = _read_metadata(path)
    beside = [file for suffix in file_formats.FORMATS if (file := path.with_suffix(suffix)).is_file()]
    same_model = [file for file in beside if _read_metadata(file).get("golden") == metadata["golden"]]
    model_card.write(path.parent, metadata, same_model, run)


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        return file_formats.FORMATS[path.suffix].read(path.read_bytes()).metadata
    except (OSError, ValueError, RuntimeError):  # not written by fastcnn
        return {}


def _check_arguments(format: str, half: Half | None) -> None:
    if format not in EXPORTERS:
        raise UsageError(
            f"--format: expected one of {', '.join(EXPORTERS)}, got '{format}'{nearest(format, EXPORTERS)}"
        )
    if half is not None and half not in get_args(Half):
        raise UsageError(f"--half: expected one of {', '.join(get_args(Half))}, got '{half}'")


def write(state: dict[str, Any], path: Path, format: str, half: Half | None = None) -> None:
    """Write the network of a checkpoint as an exported file, without verifying it."""
    config, network, classes = state["config"], restore(state), list(map(as_utf8, state["classes"]))
    # onnxruntime has no bf16 convolution on a CPU.
    precision = "fp32" if half is None else half if half != "auto" else "fp16" if format == "onnx" else "bf16"
    metadata = {
        "format": artefact.FORMAT,
        "classes": classes,
        "image_size": config["image_size"],
        "mean": config["mean"],
        "std": config["std"],
        "tta": config.get("tta", "none"),
        "input": "uint8 (N, H, W, 3), any N, H and W",
        "output": f"float32 (N, {len(classes)}) probabilities",
        "chunk": chunk(network, config["image_size"]),
        "precision": precision,
        "tolerance": TOLERANCES[precision],
        "resize_tolerance": max(TOLERANCES[precision], RESIZE_TOLERANCES.get(format, 0.0)),
        "training": {name: finite_or_none(value) for name, value in state["best"].items()},
        "versions": versions(),
        "golden": golden_inputs(network, config),
    }
    with tracing():
        parts = EXPORTERS[format](state, precision)
    metadata["sha256"] = file_formats.digest(parts, metadata)
    path.write_bytes(file_formats.FORMATS[path.suffix].pack(file_formats.Contents(parts, metadata)))


def golden_inputs(network: torch.nn.Module, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return synthetic images and the trained network's probabilities for them, as plain data.

    Raises FastCNNError if a probability is not a finite number.
    """
    normalise = Normalise(config["mean"], config["std"], config["image_size"])
    size = config["image_size"]
    found = []
    for image in golden_images(size):
        with torch.inference_mode(), one_thread():  # other numbers of them give other last bits and hashes
            pixels = resized(torch.from_numpy(image)[None], size)
            probabilities = torch.softmax(network(normalise(pixels)), 1)[0]
        if not probabilities.isfinite().all():
            raise FastCNNError(
                "the network's probabilities are not finite numbers, as its weights are too large: nothing is "
                "exported; train again, with a lower --lr"
            )
        found.append({**artefact.pack_image(image), "probabilities": probabilities.tolist()})
    return found


def golden_images(size: int) -> list[Images]:
    """Return (H, W, 3) images: blocks and a gradient of the model's size, smaller noise and larger blocks.

    They are synthetic because training photos in a published file may be private, and blocks compress well.
    """
    rng = np.random.default_rng(0)

    def blocks(height: int, width: int, side: int) -> Images:
        colours = rng.integers(0, 256, (-(-height // side), -(-width // side), 3), np.uint8)
        return np.ascontiguousarray(colours.repeat(side, 0).repeat(side, 1)[:height, :width])

    slope = np.linspace([0, 255, 60], [255, 0, 200], size).round().astype(np.uint8)  # (size, 3)
    return [
        blocks(size, size, max(1, size // 16)),
        np.ascontiguousarray(np.broadcast_to(slope, (size, size, 3))),
        blocks(37, 53, 1),
        blocks(size + size // 7, 2 * size - 5, max(1, size // 32)),
    ]


def _export_torchscript(state: dict[str, Any], precision: str) -> dict[str, bytes]:
    parts = file_formats.read_archive(script(state, precision)).parts
    # These hold source lines and paths of this machine, which only tracebacks need.
    parts = {name: part for name, part in parts.items() if not name.endswith(".debug_pkl")}
    return {name: _ordered(part) if name.endswith(".py") else part for name, part in parts.items()}


def _ordered(code: bytes) -> bytes:
    """Return TorchScript code with constants sorted by name, as torch's order differs from process to process."""
    lines = code.splitlines(keepends=True)
    groups = itertools.groupby(lines, lambda line: b" : Final[" in line)
    return b"".join(line for constants, group in groups for line in (sorted(group) if constants else group))


def _export_pt2(state: dict[str, Any], precision: str) -> dict[str, bytes]:
    file = io.BytesIO()
    model = deployed(state, precision, always_resize=True)
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch.export.save supports no other
    program = torch.export.export(model, (_example(model),), dynamic_shapes=(_any_size(),))
    for node in program.graph.nodes:  # source lines and paths of this machine
        node.meta = {name: value for name, value in node.meta.items() if name == "val"}
    torch.export.save(program, file)
    parts = file_formats.read_archive(file.getvalue()).parts
    # The example input is pickled and the guards are Python code: neither is needed.
    parts["data/sample_inputs/model.pt"] = b""
    content = json.loads(parts["models/model.json"])
    content["guards_code"] = []
    parts["models/model.json"] = json.dumps(content).encode()
    return parts


def _export_onnx(state: dict[str, Any], precision: str) -> dict[str, bytes]:
    try:
        import onnx
        import onnxruntime  # noqa: F401  (needed to verify the file)
        import onnxscript  # noqa: F401  (torch's exporter needs it and fails less clearly)
    except ImportError as error:
        raise FastCNNError(f"--format onnx needs {error.name}: pip install 'fastcnn[export]'") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it asks for torchvision, which is not needed
    model = deployed(state, precision, always_resize=True)
    with ignoring_warnings():  # torch's exporter uses deprecated parts of torch
        program = torch.onnx.export(
            model,
            (_example(model),),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=(_any_size(),),
            opset_version=18,  # the first whose Resize has antialias
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    for item in [graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output]:
        item.ClearField("metadata_props")  # source lines and paths of this machine
        item.ClearField("doc_string")
    onnx.checker.check_model(proto)
    return file_formats.read_onnx(proto.SerializeToString(deterministic=True)).parts


EXPORTERS: dict[str, Callable[[dict[str, Any], str], dict[str, bytes]]] = {
    "torchscript": _export_torchscript,
    "onnx": _export_onnx,
    "pt2": _export_pt2,
}
"""Format -> function from a checkpoint and a name in `DTYPES` to the file's parts but for the metadata."""


def _example(model: Deployed) -> Tensor:
    """Return images to trace with, of unequal height and width: torch.export would tie equal sizes together."""
    size = model.image_size
    return torch.zeros(2, size + 3, size + 5, 3, dtype=torch.uint8)


def _any_size() -> dict[int, Any]:
    return {0: torch.export.Dim("n"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
