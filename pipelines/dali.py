"""NVIDIA DALI, on a GPU or a CPU with one graph for both. Everything but plain JPEGs is decoded by Pillow."""

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from pipelines import pillow
from pipelines.jpeg import Header, complaint, header, upright_size
from pipelines.verdict import USABLE, Box, Source, Unusable, Verdict, check_pixels, read

# Not an import statement, because DALI's type hints lack half of its names.
_dali: Any = importlib.import_module("nvidia.dali")

# DALI 2.2 to 2.4 segfaults on a header that fails to parse in a batch of 32 or more; up to 31 it raised in 456 tries.
# Headers are checked before, so this is a second safeguard. On a GPU a batch must fill the device.
_CPU_BATCH = 24
_GPU_BATCH = 128

# One decode at a time: the pipelines are shared, and close() must know that nothing is in flight.
_lock = threading.Lock()
_pipelines: dict[tuple[int, int, int | None], Any] = {}


class _Photo(NamedTuple):
    row: int
    data: bytes
    box: Box | None  # the caller's, for Pillow
    region: np.ndarray  # (4,) float32: top, left, bottom, right, for DALI


def decode(
    sources: Sequence[Source],
    size: int,
    out: np.ndarray,
    boxes: Sequence[Box] | None,
    workers: int,
    gpu: int | None,
    max_pixels: int,
) -> list[Verdict]:
    """See `pipelines.decode`."""
    pillow.prepare(max_pixels)
    verdicts = [USABLE] * len(sources)

    def with_pillow(index: int, data: bytes, box: Box | None) -> None:
        verdicts[index] = pillow.one(data, size, out[index], box, max_pixels)

    def prepare(index: int) -> _Photo | None:
        """Return the photo if DALI may decode it; anything else is decoded here, in a reading thread."""
        box = None if boxes is None else boxes[index]
        try:
            data = read(sources[index])
            head = header(data)
            if head is not None:
                check_pixels(head.width, head.height, max_pixels)
                # Damaged photos are left to Pillow: DALI decodes the part that is there, even where libjpeg gives up,
                # or fails the whole batch.
                if _complete(data, head) and not complaint(data):
                    return _Photo(index, data, box, _region(head, box))
            with_pillow(index, data, box)
        except Unusable as error:
            verdicts[index] = error.verdict
        return None

    def run(batch: list[_Photo]) -> None:
        try:
            pixels = _run(_pipeline(size, workers, gpu), batch)
        except RuntimeError:
            if len(batch) == 1:
                with_pillow(batch[0].row, batch[0].data, batch[0].box)
                return
            # One at a time, so that pixels do not depend on a photo's neighbours. The pipeline goes on (exec_dynamic).
            for photo in batch:
                run([photo])
        else:
            out[[photo.row for photo in batch]] = pixels

    with _lock, ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        for batch in _batches(pool, prepare, len(sources), _CPU_BATCH if gpu is None else _GPU_BATCH):
            run(batch)
    for index, verdict in enumerate(verdicts):
        if not verdict.ok:
            out[index] = 0
    return verdicts


def identity(gpu: int | None) -> str:
    """See `pipelines.identity`."""
    return "dali-cpu-2" if gpu is None else "dali-gpu-2"


def close() -> None:
    """See `pipelines.close`. Waits for a decode in progress."""
    with _lock:
        _pipelines.clear()


def _batches(
    pool: ThreadPoolExecutor, prepare: Callable[[int], _Photo | None], num: int, batch_size: int
) -> Iterator[list[_Photo]]:
    """Yield batches of photos for DALI; each is read while DALI decodes the one before it."""
    pending = pool.map(prepare, range(min(batch_size, num)))
    for start in range(0, num, batch_size):
        following = pool.map(prepare, range(start + batch_size, min(start + 2 * batch_size, num)))
        batch = [photo for photo in pending if photo is not None]
        if batch:
            yield batch
        pending = following


def _complete(data: bytes, head: Header) -> bool:
    """Return whether the file has its end marker. Without it Pillow says "truncated" and DALI fails the whole batch."""
    return data.rfind(b"\xff\xd9", max(head.scan, len(data) - 1024)) >= 0


def _region(head: Header, box: Box | None) -> np.ndarray:
    left, top, right, bottom = pillow.clip(box, *upright_size(head))
    return np.array([top, left, bottom, right], np.float32)


def _run(pipe: Any, batch: list[_Photo]) -> np.ndarray:
    """Return (len(batch), size, size, 3) uint8. Raises RuntimeError where DALI cannot decode one of them."""
    pipe.feed_input("encoded", [np.frombuffer(photo.data, np.uint8) for photo in batch])
    pipe.feed_input("region", [photo.region for photo in batch])
    pixels: np.ndarray = pipe.run()[0].as_cpu().as_array()
    return pixels


def _pipeline(size: int, workers: int, gpu: int | None) -> Any:
    """Return the pipeline, built on first use and kept (building takes 0.15 s)."""
    key = size, workers, gpu
    if key not in _pipelines:
        _pipelines.clear()  # one at a time: each holds threads and, on a GPU, memory
        _pipelines[key] = _build(size, workers, gpu)
    return _pipelines[key]


def _build(size: int, workers: int, gpu: int | None) -> Any:
    fn, types = _dali.fn, _dali.types
    pipe = _dali.Pipeline(
        batch_size=_CPU_BATCH if gpu is None else _GPU_BATCH,
        num_threads=workers,
        device_id=gpu,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    with pipe:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        region = fn.external_source(name="region", dtype=types.FLOAT, ndim=1)
        device = {"device": "cpu"} if gpu is None else {"device": "mixed", "jpeg_fancy_upsampling": True}
        photos = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=True, **device)
        pixels = fn.resize(
            photos,
            size=[size, size],
            roi_start=region[:2],  # the whole photo as a region gives the same pixels as no region
            roi_end=region[2:],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        pipe.set_outputs(pixels)
    pipe.build()
    return pipe
