"""Make a folder of JPEG photos to train on: shapes filled with textures, lost in clutter.

    python scripts/make_dataset.py OUT --classes 10 --photos 3000 --seed 0

A class is a shape with a texture (`star-striped`). Colour, place, size, angle and light are random, so thumbnails
tell nothing and a small network has something to learn. Files are like a phone's or a web site's: their sizes, noise
and JPEG settings vary, and a few are grey, progressive or stored turned (EXIF). The same arguments give the same bytes.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Floats = NDArray[np.floating[Any]]
Points = NDArray[np.complex128]  # a polygon: one corner per item, x + iy, within about the unit circle
Task = tuple[Path, int, int, int]  # path, label, index, seed

LAYOUTS = {"flat": 1, "split": 2}  # name -> the fewest photos a class needs
PICTURES = 1  # version of the photos, raised whenever the same arguments give other bytes: old folders are then refused
NOISE_STD = 12.0  # of the noise bank; a photo takes a fraction of it


def make(out: Path, *, classes: int, photos: int, seed: int, layout: str = "flat", workers: int | None = None) -> None:
    """Write `photos` JPEGs into `out`, spread evenly over `classes` folders; return at once where they are there.

    `layout` "flat" writes out/<class>/NNNNN.jpg; "split" writes out/train/<class> (80%) and out/val/<class> (20%).
    The same call completes a folder that an interrupted one left. Raises ValueError for arguments out of range, and
    FileExistsError where `out` holds anything else. The bytes do not depend on `workers` (default: by cores and
    photos).
    """
    if not 2 <= classes <= MAX_CLASSES:
        raise ValueError(f"classes must be 2 to {MAX_CLASSES}, got {classes}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if photos < (fewest := classes * LAYOUTS[layout]) or seed < 0:
        raise ValueError(f"photos must be at least {fewest} and seed at least 0, got {photos} and {seed}")
    arguments = {"classes": classes, "photos": photos, "seed": seed, "layout": layout, "pictures": PICTURES}
    marker = json.dumps(arguments) + "\n"
    complete, partial = out / ".dataset.json", out / ".dataset.partial"
    if _holds(complete, marker):
        print(f"{out} already holds these {photos:,} photos")
        return
    if out.exists() and not _holds(partial, marker) and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something other than this dataset; remove it or choose another folder")

    started = time.perf_counter()
    tasks = [
        (path, label, index, seed)
        for label in range(classes)
        for index, path in enumerate(_paths(out, label, photos // classes + (label < photos % classes), layout))
    ]
    for folder in {task[0].parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    partial.write_text(marker, encoding="utf-8")
    todo = [task for task in tasks if not task[0].exists()]
    _run(todo, workers)
    partial.replace(complete)
    seconds = time.perf_counter() - started
    kilobytes = statistics.median(task[0].stat().st_size for task in tasks) / 1000
    print(f"{len(todo):,} photos written to {out} in {seconds:.1f} s (median of all {photos:,}: {kilobytes:.1f} KB)")


def photo(label: int, index: int, seed: int, num_classes: int) -> Image.Image:
    """Return photo `index` of class `label`: RGB, 300 to 800 pixels a side, not compressed yet."""
    assert 0 <= label < num_classes <= MAX_CLASSES, f"label {label} of {num_classes} classes"
    return _photo(_rng(label, index, seed), label)


def class_name(label: int) -> str:
    """Return the name of class `label`, and of its folder: a shape and a texture."""
    # 6 shapes and 5 textures have no common factor, so each of 30 labels is a pair of its own.
    return f"{list(SHAPES)[label % len(SHAPES)]}-{list(TEXTURES)[label % len(TEXTURES)]}"


def main() -> int:
    """Read the command line, make the dataset and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--classes", type=int, default=10, help=f"2 to {MAX_CLASSES} (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=3000, help="total, spread evenly over classes (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other photos (default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, default="flat", help="split: train/ (80%%) and val/ (20%%)")
    parser.add_argument("--workers", type=int, help="processes (default: by cores and photos); the photos are the same")
    options = parser.parse_args()
    try:
        make(**vars(options))
    except (ValueError, OSError) as error:
        print(f"make_dataset: {error}", file=sys.stderr)
        return 2
    return 0


def _holds(marker: Path, text: str) -> bool:
    return marker.is_file() and marker.read_text(encoding="utf-8") == text


def _paths(out: Path, label: int, count: int, layout: str) -> list[Path]:
    num_train = count - max(1, round(count / 5))
    splits = [""] * count if layout == "flat" else ["train"] * num_train + ["val"] * (count - num_train)
    return [out / split / class_name(label) / f"{index:05d}.jpg" for index, split in enumerate(splits)]


def _run(tasks: list[Task], workers: int | None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A process takes as long to start as 50 photos to make; Windows can wait for 61 processes and no more.
    workers = min(workers or min(cores, len(tasks) // 100), len(tasks), 60)
    if workers <= 1:
        _follow(map(_write, tasks), len(tasks))
        return
    # Spawned, because the caller may have threads (torch's), and a fork of those can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        _follow(pool.map(_write, tasks, chunksize=16), len(tasks))


def _follow(results: Iterable[None], total: int) -> None:
    live = sys.stdout.isatty()
    if not live:
        print(f"making {total:,} photos", flush=True)
    for done, _ in enumerate(results, 1):
        if live and (done % 50 == 0 or done == total):
            print(f"\rmaking photos: {done:,} of {total:,}", end="\n" if done == total else "", flush=True)


def _write(task: Task) -> None:
    path, label, index, seed = task
    rng = _rng(label, index, seed)
    image = _photo(rng, label)
    exif = b""
    quality, kind = int(rng.integers(75, 93)), rng.random()
    if kind < 0.02:
        orientation = Image.Exif()
        orientation[0x0112] = 6  # viewers turn the photo 90 degrees clockwise, so it is stored turned back
        exif = orientation.tobytes()
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif kind < 0.03:
        image = image.convert("L")
    temporary = path.with_name(f".{path.name}.tmp")
    progressive = 0.03 <= kind < 0.04
    image.save(temporary, "JPEG", quality=quality, subsampling="4:2:0", progressive=progressive, exif=exif)
    temporary.replace(path)


def _rng(label: int, index: int, seed: int) -> Generator:
    # Each photo has its own generator, so that neither the number of processes nor that of classes changes it.
    return np.random.default_rng([seed, label, index])


def _photo(rng: Generator, label: int) -> Image.Image:
    # Sizes, noise and difficulty are tuned together: files and decoding cost what a set of real clothing photos does
    # (25 KB, 0.22 megapixels at the median), and SmallCNN is right about 3 times in 4 after 5 epochs of 3,000 photos.
    long = 450 + 350 * rng.random() ** 2
    size = round(long), round(max(300, long * rng.choice([0.6, 0.667, 0.75, 0.75, 0.75, 1.0])))
    width, height = size if rng.random() < 0.4 else size[::-1]
    # Drawn at half to three quarters of the size: blurred like a lens, smooth edges, a third of the time.
    sharpness = rng.uniform(0.5, 0.75)
    scene = _background(rng, round(width * sharpness), round(height * sharpness))
    for _ in range(rng.integers(2, 6)):
        _distractor(rng, scene, 0.16)
    _subject(rng, scene, label)
    for _ in range(rng.integers(0, 3)):
        _distractor(rng, scene, 0.08)
    light = Image.fromarray(rng.integers(140, 256, (3, 3), dtype=np.uint8)).resize(scene.size, Image.Resampling.BICUBIC)
    scene = ImageChops.multiply(scene, Image.merge("RGB", (light, light, light)))
    scene = scene.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (int(x) for x in rng.integers(0, 1024 - 800, 2))
    noise = _noise_bank().crop((left, top, left + width, top + height))
    grey = Image.new("RGB", noise.size, (128, 128, 128))
    return ImageChops.add(scene, Image.blend(grey, noise, rng.uniform(0.06, 0.33)), 1, -128)


@functools.cache
def _noise_bank() -> Image.Image:
    # One per process: drawing 600,000 normal numbers a photo would take longer than all the rest.
    rng = np.random.default_rng(0)
    noise = rng.normal(0, NOISE_STD, (1024, 1024, 1)) + rng.normal(0, NOISE_STD / 3, (1024, 1024, 3))
    return Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8))


def _background(rng: Generator, width: int, height: int) -> Image.Image:
    # Everything here is blurred, so a quarter of the size is enough.
    small = Image.new("RGB", (3, 3))
    small.putdata([_colour(rng) for _ in range(9)])
    small = small.resize((width // 4, height // 4), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(4, 12)):
        _distractor(rng, small, 0.4)
    small = small.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4)))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _distractor(rng: Generator, scene: Image.Image, most: float) -> None:
    radius = min(scene.size) * rng.uniform(most / 4, most)
    centre = complex(*rng.uniform(0, scene.size))
    angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 9)))
    corners = rng.uniform(0.5, 1, len(angles)) * np.exp(1j * angles)
    ImageDraw.Draw(scene).polygon(_place(rng, corners, radius, centre), fill=_colour(rng))


def _subject(rng: Generator, scene: Image.Image, label: int) -> None:
    shape, texture = list(SHAPES.values())[label % len(SHAPES)], list(TEXTURES.values())[label % len(TEXTURES)]
    radius = min(scene.size) * rng.uniform(0.30, 0.44)
    edge = 2 * math.ceil(radius)
    mask = Image.new("L", (edge, edge))
    ImageDraw.Draw(mask).polygon(_place(rng, shape, radius * 0.8, complex(radius, radius)), fill=255)

    period = min(scene.size) * rng.uniform(0.085, 0.125)
    turn, start = np.exp(2j * math.pi * rng.random()) / period, rng.uniform(0, 1, 2)
    x = np.arange(edge, dtype=np.float32)
    u = (x * turn.real - x[:, None] * turn.imag + start[0]).astype(np.float32)
    v = (x * turn.imag + x[:, None] * turn.real + start[1]).astype(np.float32)
    share = ((texture(u, v) * 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
    light, dark = _colour(rng), _colour(rng)
    while math.dist(light, dark) < 160:
        dark = _colour(rng)
    filling = Image.new("RGB", mask.size, dark)
    filling.paste(light, mask=Image.fromarray(share))
    left, top = (int(rng.uniform(-0.1 * edge, side - 0.9 * edge)) for side in scene.size)
    scene.paste(filling, (left, top), mask)


def _place(rng: Generator, shape: Points, radius: float, centre: complex) -> list[tuple[float, float]]:
    # z + k conj(z) squeezes along a random axis: the shape seen from the side.
    turn, axis = np.exp(2j * math.pi * rng.random(2))
    squeezed = turn * (shape + rng.uniform(0, 0.15) * axis * shape.conj())
    return [(z.real, z.imag) for z in (squeezed * radius + centre).tolist()]


def _colour(rng: Generator) -> tuple[int, int, int]:
    # A grey with some hue: few things are as bright as three independent channels would be.
    red, green, blue = (rng.uniform(20, 235) + rng.uniform(-60, 60, 3)).clip(0, 255).astype(int).tolist()
    return red, green, blue


def _radial(radii: Iterable[float]) -> Points:
    lengths = np.fromiter(radii, float)
    return np.asarray(lengths * np.exp(2j * math.pi * np.arange(len(lengths)) / len(lengths)))


def _arc(radius: float, first: float, last: float, centre: float = 0.0) -> Points:
    return np.asarray(centre + radius * np.exp(1j * np.linspace(first, last, 40)))


SHAPES: dict[str, Points] = {
    "star": _radial([1, 0.4] * 5),
    "cross": np.array([c * 1j**k for k in range(4) for c in (0.95 - 0.3j, 0.95 + 0.3j, 0.3 + 0.3j)]),
    "ring": np.concatenate([_arc(0.95, 0, 2 * math.pi), _arc(0.5, 2 * math.pi, 0)]),
    "triangle": _radial([1] * 3),
    "crescent": np.concatenate([_arc(1, 0.8, 2 * math.pi - 0.8), _arc(0.78, 2 * math.pi - 1.18, 1.18, 0.4)]),
    "square": _radial([1] * 4),
}

TEXTURES: dict[str, Callable[[Floats, Floats], Floats]] = {  # (u, v) in periods -> above 0 for the light colour
    "striped": lambda u, v: _wave(u),
    "dotted": lambda u, v: _wave(u) + _wave(v) - 0.9,
    "checked": lambda u, v: _wave(u / 1.5) * _wave(v / 1.5),
    "wavy": lambda u, v: _wave(u + 0.5 * _wave(v / 2)),
    "plain": lambda u, v: np.full_like(u, -1),
}
MAX_CLASSES = len(SHAPES) * len(TEXTURES)


def _wave(x: Floats) -> Floats:
    wave: Floats = np.cos(2 * math.pi * x)
    return wave


if __name__ == "__main__":
    sys.exit(main())
