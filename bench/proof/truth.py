"""Phase 3, is it true: whole runs over the baselines, parity, repeats to the bit, resuming, memory, JPEGs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import pipelines
from bench.harness.machine import slug
from bench.harness.whole_runs import Runs
from bench.proof.lines import Line, NotHere, Proof
from bench.proof.machine_and_steps import DEVICE, ON_GPU, ROOT, installed
from fastcnn.config import Config, Interval
from fastcnn.errors import FastCNNError
from fastcnn.storage import checkpoint
from fastcnn.system.device import has_bf16, num_cores, release_memory
from fastcnn.training.engines import ENGINES

sys.path.insert(0, str(ROOT / "scripts"))
PHOTOS_VARIABLE = "FASTCNN_PROOF_PHOTOS"
BASELINES = ("seed", "tuned")
SEEDS = 3
# Another engine than the one asked for is an error. So would be the want of DALI on a GPU, which is none here.
STRICTLY: dict[str, Any] = {"strict": True, "decoder": pipelines.choose("auto", gpu=ON_GPU)[0]}


def photos(proof: Proof, count: int) -> Path:
    """Return a folder of so many generated photos of real size, in 10 classes."""
    folder = proof.work / f"photos-{count}"
    importlib.import_module("make_dataset").make(folder, classes=10, photos=count, seed=0)
    return folder


def many(proof: Proof) -> int:
    """Return how many photos whole runs take: 10,000 to train on, but for the small form."""
    return 60 if proof.small else 12_500


def few(proof: Proof) -> int:
    """Return how many photos comparisons over seeds take."""
    return 60 if proof.small else 2_500


def make_photos(proof: Proof) -> None:
    """Make the photos, before anything is timed."""
    counts = many(proof), few(proof)
    proof.measure("photos", lambda: {"photos": [photos(proof, count).name for count in counts]}, limit=150.0)


def whole_runs(proof: Proof) -> None:
    """Write our runs cold and warm, then the baselines' on the same split, each with its fastest settings."""
    scale = {"epochs": 2 if proof.small else 3, "image_size": 32 if proof.small else 128, "baselines": list(BASELINES)}
    runs = Runs(
        proof.work / f"runs-{proof.session}", photos(proof, many(proof)), DEVICE, {**scale, "try_compile": ON_GPU}
    )
    split, cache = proof.work / "split.csv", proof.work / f"cache-{proof.session}"
    for name, where in {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}.items():
        os.environ[name] = str(cache / where)  # cold means that nothing was compiled either

    def ours() -> Line:
        found = runs.train(runs.photos, cache)
        split.write_bytes((Path(found["run_dir"]) / "split.csv").read_bytes())
        for path in Path(found["run_dir"]).iterdir():
            if path.suffix in (".png", ".html", ".json", ".yaml") or path.name == "metrics.csv":
                (proof.out / "run").mkdir(exist_ok=True)
                shutil.copy(path, proof.out / "run")
        kept = "wall_seconds images_per_second val_accuracy seconds engine precision decoder num_train num_decoded"
        return {name: found[name] for name in kept.split()}

    def baseline(name: str) -> Line:
        if not split.is_file():
            raise NotHere("no run of ours, whose split it would take")
        seconds = runs.baseline(name, split)
        found = runs.done[name][-1]
        accuracy = max(row["val_accuracy"] for row in found["epochs"])
        rate = {"wall_seconds": seconds, "images_per_second": found["images_per_second"]}
        return {**rate, "val_accuracy": accuracy, "settings": runs.settings(name)}

    for name in ("cold", "warm"):
        proof.measure(f"whole run: fastcnn, {name}", ours, limit=120.0, least=10.0)
    for name in BASELINES:
        proof.measure(f"whole run: {name}.py", functools.partial(baseline, name), limit=150.0, least=20.0)


def fastest_engine(proof: Proof) -> str:
    """Return the engine with the highest rate in phase 1's table at batch 32 in bf16."""
    found = {name: proof.values(f"step: {name}, bf16, batch 32") for name in ENGINES}
    rates = {name: values["images_per_second"] for name, values in found.items() if values}
    return max(rates, key=lambda name: rates[name]) if rates else "hybrid+graphed"


def engines_here(proof: Proof) -> list[str]:
    """Return the engines to prove: captured ones, but for a CPU."""
    return list(dict.fromkeys(["graphed", fastest_engine(proof)])) if ON_GPU else ["eager"]


def parity(proof: Proof) -> None:
    """Write accuracy and losses by seed of seed.py's training and of ours, and how far they lie apart."""
    from bench.parity import arms
    from bench.parity.__main__ import differences

    precisions = ("bf16", "fp16") if ON_GPU else ("bf16" if has_bf16(DEVICE) else "fp32",)
    ours = {f"{engine}, {one}": (engine, one) for one in precisions for engine in engines_here(proof)}
    how: dict[str, Any] = {"epochs": 2 if proof.small else 5, "batch_size": 8 if proof.small else 32, "lr": 1e-3}
    how |= {"schedule": "onecycle", "image_size": 32 if proof.small else 128, "threads": None}
    with arms.prepared(photos(proof, few(proof)), val_fraction=0.4, note=print, **how) as experiment:
        for seed in range(SEEDS):
            for name in ("seed.py", *ours):
                if name == "seed.py":
                    work = functools.partial(arms.plain, experiment, seed)
                else:
                    chosen = dict(zip(("engine", "precision"), ours[name], strict=True))
                    work = functools.partial(arms.fast, experiment, seed, **chosen, **STRICTLY)
                proof.measure(f"parity: {name}, seed {seed}", work, limit=90.0, least=8.0)

    def runs(name: str) -> list[Line]:
        return [proof.values(f"parity: {name}, seed {seed}") for seed in range(SEEDS)]

    def apart(name: str) -> Line:
        pairs = [(a, b) for a, b in zip(runs(name), runs("seed.py"), strict=True) if a and b]
        if len(pairs) < 2:
            raise NotHere("fewer than two seeds of both")
        found = {measure: differences(measure, pairs) for measure in ("accuracy", "held_out_losses", "train_losses")}
        spreads = {measure: [statistics.fmean(values), statistics.stdev(values)] for measure, values in found.items()}
        return {"seeds": len(pairs), "mean_and_deviation": spreads}

    for name in ours:
        proof.measure(f"parity: {name}, over seeds", functools.partial(apart, name))


def config_of(proof: Proof, **options: Any) -> Config:
    """Return a configuration of a run to the bit."""
    size: dict[str, Any] = {"image_size": 32, "batch_size": 8, "filters": (8,)} if proof.small else {}
    shared = {"data": str(photos(proof, few(proof))), "epochs": 2, "report": False, "wandb": "disabled", **STRICTLY}
    return Config(**{**shared, **size, "deterministic": True, **options})


def deterministic(proof: Proof) -> None:
    """Write whether `--deterministic` twice gives the same weights, to the bit."""
    from fastcnn.runs.fit import fit

    def twice(engine: str) -> Line:
        config, folder = config_of(proof, engine=engine), proof.work / f"repeat-{proof.session}-{slug({'gpu': engine})}"
        runs = [fit(config, run_dir=folder / str(number)).run_dir for number in range(2)]
        return _equal(*runs)

    for engine in engines_here(proof):
        proof.measure(f"deterministic: {engine}", functools.partial(twice, engine), least=8.0)


def resumed(proof: Proof) -> None:
    """Write whether a run killed in the middle of an epoch, with dropout, ends as one that was not, to the bit."""
    from fastcnn.runs.fit import fit
    from fastcnn.runs.loop import CheckpointTimer
    from fastcnn.runs.resume import resumed_config

    class Killed(BaseException):
        """Nothing is put in order after it."""

    def cut(engine: str) -> Line:
        config = config_of(proof, engine=engine, dropout=0.3, augment=("flip", "shift"))
        folder, saves = proof.work / f"cut-{proof.session}-{slug({'gpu': engine})}", iter(range(10**6))

        def save(self: CheckpointTimer) -> None:
            if next(saves) == 3:  # the first is the beginning
                raise Killed

        whole = fit(config, run_dir=folder / "whole").run_dir
        with mock.patch.object(CheckpointTimer, "restart", save):
            try:
                fit(dataclasses.replace(config, checkpoint_every=Interval("1")), run_dir=folder / "cut")
            except Killed:
                step = checkpoint.load(folder / "cut" / "last.pt")["step"]
        fit(resumed_config(folder / "cut", {}), resume=folder / "cut")
        return {"killed_after_step": step, **_equal(whole, folder / "cut")}

    for engine in engines_here(proof):
        proof.measure(f"resumed within an epoch: {engine}", functools.partial(cut, engine), least=8.0)


def _equal(one: Path, other: Path) -> Line:
    first, second = (checkpoint.load(folder / "last.pt") for folder in (one, other))
    unequal = [
        f"{what} {name}"
        for what in ("model", "optimizer")
        for name, value in first[what].items()
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(second[what][name]))
    ]
    if unequal or first["step"] != second["step"]:
        raise AssertionError(f"not equal to the bit: {', '.join(unequal[:5])} ({len(unequal)} in all)")
    return {"equal": True, "tensors": len(first["model"]) + len(first["optimizer"]), "steps": first["step"]}


def memory(proof: Proof) -> None:
    """Write what a run says whose GPU has no memory left, and whether the same process trains afterwards."""
    for engine in ("eager", "graphed"):
        proof.measure(f"memory that runs out: {engine}", functools.partial(_exhausted, proof, engine), limit=90.0)


def _exhausted(proof: Proof, engine: str) -> Line:
    from fastcnn.runs.fit import fit

    if not ON_GPU:
        raise NotHere("needs an NVIDIA GPU")
    folder = proof.work / f"memory-{proof.session}-{engine}"
    config = config_of(proof, engine=engine, deterministic=False, strict=False, epochs=1, batch_size=1024)
    torch.zeros(1, device=DEVICE)
    taken = torch.empty(torch.cuda.mem_get_info(DEVICE)[0] - (700 << 20), dtype=torch.uint8, device=DEVICE)
    try:
        fit(config, run_dir=folder / "full")
    except FastCNNError as error:
        said = str(error)
    else:
        raise AssertionError("a run fitted into 700 MiB: this says nothing")
    finally:
        del taken
        release_memory()
    if "\n" in said:
        raise AssertionError(f"not one line: {said}")
    return {"said": said, "afterwards": fit(config, run_dir=folder / "again").summary["engine"]}


def group_of_one(proof: Proof) -> None:
    """Time a process group of this process alone, by NCCL on a GPU; figures go to rows.jsonl."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-W", "default", "-p", "no:cacheprovider"]
    command += [f"--scale={'smoke' if proof.small else 'gpu'}", f"--lines={proof.out / 'rows.jsonl'}"]
    command += [str(ROOT / "bench" / "suites" / "bench_ranks.py")]
    proof.measure("group of one", lambda: {"exit_code": subprocess.run(command, cwd=ROOT, check=True).returncode})


def jpegs(proof: Proof) -> None:
    """Write decoding rates and pixels against Pillow's: our decoders, nvImageCodec's kinds, and progressive files."""
    own = os.environ.get(PHOTOS_VARIABLE)
    folder = Path(own) if own else photos(proof, few(proof))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = paths[: 40 if proof.small else 1000]
    for name, gpu in (("dali", True), ("dali", False), ("turbo", False), ("pillow", False)):
        where = "on the GPU" if gpu else "on the CPU"
        work = functools.partial(_ours, name, gpu, paths)
        proof.measure(f"JPEG: {name} {where}, {folder.name}", work, limit=60.0, least=5.0)
    for kind in ("HW_GPU_ONLY", "HYBRID_CPU_GPU", "GPU_ONLY", "CPU_ONLY"):
        for upsampling in (1, 0):
            work = functools.partial(_nvimagecodec, kind, upsampling, [path.read_bytes() for path in paths])
            proof.measure(f"JPEG: nvImageCodec {kind}, fancy upsampling {upsampling}, {folder.name}", work, least=5.0)
        progressive = functools.partial(_nvimagecodec, kind, 1, [_progressive(path) for path in paths[:8]])
        proof.measure(f"JPEG: nvImageCodec {kind}, progressive", progressive, least=5.0)


def _ours(name: str, gpu: bool, paths: Sequence[Path]) -> Line:
    if gpu and not ON_GPU:
        raise NotHere("needs an NVIDIA GPU")
    out = np.zeros((len(paths), 128, 128, 3), np.uint8)
    try:
        pipelines.choose(name, gpu=gpu)
    except pipelines.DecoderUnavailable as error:
        raise NotHere(str(error)) from None
    decode = functools.partial(pipelines.decode, decoder=name, workers=num_cores(), gpu=0 if gpu else None)
    decode(paths[:32], 128, out[:32])
    start = time.perf_counter()
    decode(paths, 128, out)
    seconds, first = time.perf_counter() - start, paths[:100]
    reference = np.zeros_like(out[: len(first)])
    pipelines.decode(first, 128, reference, decoder="pillow")
    difference = np.abs(out[: len(first)].astype(np.int16) - reference).mean()
    pipelines.close()
    return {"photos_per_second": round(len(paths) / seconds, 1), "mean_difference_levels": round(float(difference), 3)}


def _progressive(path: Path) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as photo:
        photo.convert("RGB").save(buffer, "JPEG", quality=90, progressive=True)
    return buffer.getvalue()


def _nvimagecodec(kind: str, upsampling: int, files: Sequence[bytes]) -> Line:
    """Return photos a second, full size, in batches of 64, and the mean difference from Pillow's pixels, in levels."""
    if not installed("nvidia.nvimgcodec"):
        raise NotHere("nvImageCodec is not installed")
    if not ON_GPU and kind != "CPU_ONLY":
        raise NotHere("needs an NVIDIA GPU")
    from nvidia import nvimgcodec

    backend = nvimgcodec.Backend(getattr(nvimgcodec.BackendKind, kind))
    device = 0 if ON_GPU else nvimgcodec.NO_DEVICE if hasattr(nvimgcodec, "NO_DEVICE") else -99999
    decoder = nvimgcodec.Decoder(device_id=device, backends=[backend], options=f":fancy_upsampling={upsampling}")
    decoder.decode(list(files[:64]))
    decoded: list[Any] = []
    start = time.perf_counter()
    for at in range(0, len(files), 64):
        batch = decoder.decode(list(files[at : at + 64]))
        decoded += batch[:100] if at < 100 else [None if image is None else True for image in batch]
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    refused = sum(image is None for image in decoded)
    if refused == len(files):
        raise NotHere(f"decodes none of {len(files)} files")
    pairs = zip(decoded[:64], files[:64], strict=True)
    differences = [_difference(np.asarray(image.cpu()), file) for image, file in pairs if image is not None]
    found = {"photos_per_second": round((len(files) - refused) / seconds, 1), "refused": refused, "photos": len(files)}
    return {**found, "mean_difference_levels": round(statistics.fmean(differences), 4) if differences else None}


def _difference(pixels: Any, file: bytes) -> float:
    with Image.open(io.BytesIO(file)) as photo:
        turned = photo.getexif().get(0x0112, 1) != 1
        expected = np.asarray(photo.convert("RGB"))
    if turned or pixels.shape != expected.shape:
        return 0.0
    return float(np.abs(pixels.astype(np.int16) - expected).mean())
