"""Training loops over photos that are on the device already, as a careful user writes them. Nothing of fastcnn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines.cached import Trainer
from bench.baselines.seed import Training, small_cnn

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def loop(
    images: Tensor, labels: Tensor, filters: Sequence[int], batch_size: int, precision: str, *, tuned: bool
) -> Callable[[], None]:
    """Return a step of the plain eager loop: NCHW, autocast for 16 bits, Adam, one batch after the other.

    images: (M, 3, H, W) fp32, normalised, on the device. labels: (M,).
    tuned: in channels_last, compiled with mode="max-autotune", Adam fused.
    """
    model: nn.Module = small_cnn(int(labels.max()) + 1, images.shape[-1], filters).to(images.device)
    if tuned:
        images = images.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = torch.compile(model, mode="max-autotune")  # type: ignore[assignment]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=tuned)
    dtype, at = DTYPES[precision], 0
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == torch.float16)
    order = torch.randperm(len(labels), device=images.device)

    def step() -> None:
        nonlocal at
        if at + batch_size > len(order):
            at = 0
        batch = order[at : at + batch_size]
        at += batch_size
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def cached(
    images: Tensor, labels: Tensor, filters: Sequence[int], batch_size: int, precision: str
) -> Callable[[], None]:
    """Return a step of cached.py, over the images as uint8, in the layout that is faster over a few steps."""
    assert precision == "fp32", precision
    pixels = (images * 64 + 128).clamp(0, 255).to(torch.uint8)
    rates: dict[float, Training] = {}
    for channels_last in (False, True):
        trainer = Trainer(int(labels.max()) + 1, images.shape[-1], filters, 1e-3, channels_last)
        training = trainer.training((pixels, labels), (pixels, labels), batch_size)
        rates[training.rate()] = training
    fastest = rates[max(rates)]

    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from fastest.batches()

    batches = epochs()

    def step() -> None:
        fastest.step(*next(batches))

    return step


LOOPS: dict[str, Callable[..., Callable[[], None]]] = {
    "plain": functools.partial(loop, tuned=False),
    "max-autotune": functools.partial(loop, tuned=True),
    "cached": cached,
}


def random_steps(
    name: str, photos: int, size: int, filters: Sequence[int], batch_size: int, precision: str
) -> Callable[[], None]:
    """Return a step of a loop over random photos, on the GPU where there is one.

    precision: "fp32" is strict, as ours is: torch's own default takes TF32 for convolutions, which is "tf32" here. Set
    for the whole process.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    images = torch.randn(photos, 3, size, size, device=device)
    return LOOPS[name](images, torch.arange(photos, device=device) % 10, filters, batch_size, precision)
