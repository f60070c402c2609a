"""`fastcnn export --triton`: a model repository with the fields of Triton's model_config.proto."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from fastcnn.errors import FastCNNError, UsageError
from fastcnn.export import triton_repository
from fastcnn.inference import artefact

SIZE = 32
STRING, INT32, INT64, UINT64 = (getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name}") for name in (
    "STRING", "INT32", "INT64", "UINT64",
))  # fmt: skip

# What we use of model_config.proto (triton-inference-server/common): message -> field -> number, type, repeated.
SCHEMA: dict[str, dict[str, tuple[int, int | str, bool]]] = {
    "ModelInput": {
        "name": (1, STRING, False),
        "data_type": (2, "DataType", False),
        "dims": (4, INT64, True),
    },
    "ModelOutput": {
        "name": (1, STRING, False),
        "data_type": (2, "DataType", False),
        "dims": (3, INT64, True),
        "label_filename": (4, STRING, False),
    },
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, INT32, True),
        "max_queue_delay_microseconds": (2, UINT64, False),
    },
    "ModelConfig": {
        "name": (1, STRING, False),
        "platform": (2, STRING, False),
        "max_batch_size": (4, INT32, False),
        "input": (5, "ModelInput", True),
        "output": (6, "ModelOutput", True),
        "dynamic_batching": (11, "ModelDynamicBatching", False),
    },
}
DATA_TYPES = {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_FP16": 10, "TYPE_FP32": 11}


def read_config(path: Path) -> Any:
    """Return the ModelConfig in a file, read as Triton reads it."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for name, number in DATA_TYPES.items():
        types.value.add(name=name, number=number)
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            field = described.field.add(name=name, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                field.type_name = f".inference.{kind}"
                field.type = field.TYPE_ENUM if kind == "DataType" else field.TYPE_MESSAGE
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    return text_format.Parse(path.read_text(encoding="utf-8"), config)


@pytest.fixture(params=triton_repository.PLATFORMS)
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Path]) -> Path:
    return exports(request.param[1:])


def test_the_configuration(exported: Path, tmp_path: Path) -> None:
    model = artefact.open(exported)
    folder = triton_repository.write_repository(exported, tmp_path / "models", "animals")
    assert folder == tmp_path / "models" / "animals"
    config = read_config(folder / "config.pbtxt")
    platform = triton_repository.PLATFORMS[exported.suffix]
    assert (config.name, config.platform) == ("animals", platform.name)
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    (pixels,), (probabilities,) = config.input, config.output
    assert (pixels.data_type, list(pixels.dims)) == (DATA_TYPES["TYPE_UINT8"], [SIZE, SIZE, 3])
    assert (probabilities.data_type, list(probabilities.dims)) == (DATA_TYPES["TYPE_FP32"], [4])
    assert (folder / probabilities.label_filename).read_text().splitlines() == model.classes


def test_the_model_takes_what_the_configuration_says(exported: Path, tmp_path: Path) -> None:
    folder = triton_repository.write_repository(exported, tmp_path, "animals")
    config = read_config(folder / "config.pbtxt")
    images = np.random.default_rng(0).integers(0, 256, (3, *config.input[0].dims), np.uint8)
    if exported.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        assert [tensor.name for tensor in session.get_inputs()] == [config.input[0].name]
        assert [tensor.name for tensor in session.get_outputs()] == [config.output[0].name]
        assert session.get_inputs()[0].type == "tensor(uint8)"
        assert session.get_outputs()[0].type == "tensor(float)"
        found = session.run([config.output[0].name], {config.input[0].name: images})[0]
    else:
        with pytest.warns(DeprecationWarning, match=r"torch\.jit\.load"):
            module = torch.jit.load(folder / "1" / "model.pt")
        assert (config.input[0].name, config.output[0].name) == ("INPUT__0", "OUTPUT__0")
        found = module(torch.from_numpy(images)).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, artefact.open(exported).probabilities(images), atol=1e-6)


def test_exporting_again_adds_a_version(exported: Path, tmp_path: Path) -> None:
    file = triton_repository.PLATFORMS[exported.suffix].file
    folder = triton_repository.write_repository(exported, tmp_path, "animals")
    triton_repository.write_repository(exported, tmp_path, "animals")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    (folder / "1" / file).write_bytes(b"an earlier model")
    triton_repository.write_repository(exported, tmp_path, "animals")
    assert (folder / "1" / file).read_bytes() == b"an earlier model"
    assert (folder / "2" / file).read_bytes() == exported.read_bytes()


def test_errors(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.torchscript or \.onnx"):
        triton_repository.write_repository(tmp_path / "model.pt2", tmp_path, "animals")
    with pytest.raises(UsageError, match="of letters, digits"):
        triton_repository.write_repository(exported, tmp_path, "../animals")
    folder = triton_repository.write_repository(exported, tmp_path, "animals")
    (folder / "labels.txt").write_text("other\n")
    with pytest.raises(FastCNNError, match=r"another labels\.txt"):
        triton_repository.write_repository(exported, tmp_path, "animals")
    (tmp_path / "file").touch()
    with pytest.raises(FastCNNError, match="cannot write"):
        triton_repository.write_repository(exported, tmp_path / "file", "animals")
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("run", "name"), [("clothing-10-2", "clothing-10-2"), ("my photos.v1", "my-photos-v1"), ("日本", "model")]
)
def test_a_name_from_the_run(run: str, name: str) -> None:
    assert triton_repository.repository_name(Path("runs") / run) == name
