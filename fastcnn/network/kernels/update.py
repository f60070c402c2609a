"""Triton kernels of the end of a training step: gradients into one buffer, then all that an update changes."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.network.kernels.synchronisation import arrives_last, await_inputs
from fastcnn.network.kernels.tiles import narrow


@triton.jit
def collect(
    sources,  # tensors whose elements follow each other in `gradient`
    gradient,  # (P,) fp32
    SIZES: tl.constexpr,  # elements of each
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Copy tensors of several types behind each other: a program takes a block of one of them."""
    await_inputs(EARLY)
    program, first, start = tl.program_id(0), 0, 0
    for number in tl.static_range(len(SIZES)):
        size = SIZES[number]
        last = first + (size + BLOCK - 1) // BLOCK
        if (program >= first) & (program < last):
            place = (program - first) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(sources[number] + place, place < size, 0.0).to(tl.float32)
            tl.store(gradient + start + place, values, place < size)
        first, start = last, start + size


@triton.jit
def adam_update(
    values,  # (P,) fp32, as gradient, moments, decay and average
    gradient,
    exp_avg,
    exp_avg_sq,
    decay,  # None: no weight decay
    values_16bit,  # (P,) bf16 or fp16; None: the network computes in fp32
    average,  # moving average of the values; None: none
    average_weights,  # (T,) fp32
    lr_schedule,  # (T,) fp32
    corrections,  # (T, 2) fp32: 1 / (1 - beta1 ** t) and 1 / sqrt(1 - beta2 ** t)
    lr,  # () fp32, as num_updates and skipped
    num_updates,
    skipped,
    step_count,  # (1,) int64, as cursor
    cursor,
    checked,  # losses that must be finite for an update
    losses,  # (N,) fp32
    predictions,  # (N,) int64, as labels
    labels,
    sums,  # (3,) fp64: losses, correct predictions, images
    counters,
    num_values,
    num_checked,
    num_images,
    batch_size,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Adam, its copy for the arithmetic, the average and the step's sums: see `TrainingStep.update`."""
    await_inputs(EARLY)
    step = tl.load(step_count)
    rate, taken = tl.load(lr_schedule + step), tl.load(num_updates)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_checked, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(checked + place, place < num_checked, 0.0).to(tl.float32)
    all_of_them = tl.sum(total, 0)
    before = tl.load(skipped)
    skip = tl.maximum(tl.where(all_of_them - all_of_them == 0, 0.0, 1.0), tl.minimum(before, 1.0))
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < num_values
    g, old = tl.load(gradient + place, there, 0.0), tl.load(values + place, there, 0.0)
    value = old
    if decay is not None:
        own = tl.load(decay + place, there, 0.0)
        if DECOUPLED:
            value -= value * (own * rate)
        else:
            g += value * own
            tl.store(gradient + place, g, there)
    mean, square = tl.load(exp_avg + place, there, 0.0), tl.load(exp_avg_sq + place, there, 0.0)
    new_mean, new_square = mean + 0.1 * (g - mean), 0.999 * square + 0.001 * (g * g)
    correction = corrections + 2 * taken.to(tl.int64)
    value -= rate * tl.load(correction) * new_mean / (tl.sqrt(new_square) * tl.load(correction + 1) + 1e-8)
    value = tl.where(skip > 0, old, value)
    tl.store(values + place, value, there)
    tl.store(exp_avg + place, tl.where(skip > 0, mean, new_mean), there)
    tl.store(exp_avg_sq + place, tl.where(skip > 0, square, new_square), there)
    if values_16bit is not None:
        tl.store(values_16bit + place, narrow(value, values_16bit.dtype.element_ty), there)
    if average is not None:
        mean = tl.load(average + place, there, 0.0)
        tl.store(average + place, mean + tl.load(average_weights + step) * (value - mean), there)
    if arrives_last(counters + 2, tl.num_programs(0)):
        tl.store(lr, rate)
        tl.store(num_updates, taken + 1 - skip)
        tl.store(skipped, before + skip)
        tl.store(step_count, step + 1)
        tl.store(cursor, tl.load(cursor) + batch_size)
        lost, right = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        for start in range(0, num_images, BLOCK):
            place = start + tl.arange(0, BLOCK)
            there = place < num_images
            lost += tl.load(losses + place, there, 0.0).to(tl.float64)
            equal = tl.load(predictions + place, there, -1) == tl.load(labels + place, there, -2)
            right += equal.to(tl.float64)
        tl.store(sums, tl.load(sums) + tl.sum(lost, 0))
        tl.store(sums + 1, tl.load(sums + 1) + tl.sum(right, 0))
        tl.store(sums + 2, tl.load(sums + 2) + num_images)
