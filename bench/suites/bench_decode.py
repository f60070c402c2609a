"""JPEGs to uint8 pixels: photos a second by decoder and threads, over DataLoader + Pillow at its best workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import pipelines
from bench.baselines import decoding
from bench.harness.race import Race
from bench.harness.timing import Clocked, clocked
from fastcnn.system.device import num_cores


@pytest.fixture(scope="module")
def paths(photos: Path, scale: dict[str, Any]) -> list[Path]:
    """The photos, evenly over the classes."""
    wanted = scale["decode_photos"]
    found = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    assert len(found) >= wanted, f"{photos} holds {len(found)} JPEGs: {wanted} or more are needed"
    return found[:: len(found) // wanted][:wanted]


@pytest.fixture(scope="module")
def baseline(paths: list[Path], scale: dict[str, Any]) -> dict[str, Clocked]:
    """DataLoader + Pillow with as many workers as serve it best, of 0, half the cores and all of them."""
    cores = num_cores()
    tried = {}
    for workers in sorted({0, cores // 2, cores}):
        run = clocked(decoding.pillow_loader(paths, scale["image_size"], workers), torch.device("cpu"))
        run()
        tried[f"DataLoader + Pillow, {workers} workers"] = run, run()
    best = min(tried, key=lambda name: tried[name][1])
    return {best: tried[best][0]}


@pytest.fixture(scope="module")
def reference(paths: list[Path], scale: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """The first photos by Pillow."""
    size, first = scale["image_size"], paths[:100]
    out = np.zeros((len(first), size, size, 3), np.uint8)
    pipelines.decode(first, size, out, decoder="pillow")
    return out


@pytest.mark.parametrize("decoder", [*pipelines.BACKENDS, "dali on the GPU"])
@pytest.mark.parametrize("threads", sorted({num_cores(), 1}, reverse=True))
def bench_decoder(
    race: Race,
    decoder: str,
    threads: int,
    paths: list[Path],
    baseline: dict[str, Clocked],
    reference: npt.NDArray[np.uint8],
    request: pytest.FixtureRequest,
) -> None:
    """Ours."""
    name, on_gpu = decoder.partition(" ")[0], decoder.endswith("GPU")
    if threads < num_cores() and request.config.getoption("--scale") != "full":
        pytest.skip("in the full form only")
    if on_gpu and race.device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    try:
        pipelines.choose(name, gpu=on_gpu)
    except pipelines.DecoderUnavailable as error:
        pytest.skip(str(error))
    size = race.scale["image_size"]
    out = np.zeros((len(paths), size, size, 3), np.uint8)
    decode = functools.partial(pipelines.decode, decoder=name, workers=threads, gpu=0 if on_gpu else None)
    race(
        f"{decoder}, {threads} thread{'s' * (threads > 1)}",
        lambda: decode(paths, size, out),
        baseline,
        images=len(paths),
    )
    difference = float(np.abs(out[: len(reference)].astype(np.int16) - reference).mean())
    race.note(mean_difference_levels=difference)
    assert difference <= 2.5
    pipelines.close()


PEERS: dict[str, Callable[[Path, list[Path], int], Callable[[], Any]]] = {
    "torchvision ImageFolder": lambda folder, paths, size: decoding.image_folder(folder, size, num_cores()),
    "torchvision decode_jpeg on the GPU": lambda folder, paths, size: decoding.decode_jpeg_on_gpu(paths, size),
}


@pytest.mark.parametrize("peer", PEERS)
def bench_peer(race: Race, peer: str, photos: Path, paths: list[Path], baseline: dict[str, Clocked]) -> None:
    """Decoders of torchvision."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    if peer.endswith("GPU") and race.device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    run = PEERS[peer](photos, paths, race.scale["image_size"])
    race(peer, run, baseline, images=len(run()), peer=True)
