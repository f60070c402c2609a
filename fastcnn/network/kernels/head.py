"""Triton kernels of the network's head: two dense layers and cross-entropy, forward in one launch, backward in one."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.network.kernels.synchronisation import arrives_last, await_inputs
from fastcnn.network.kernels.tiles import dot, narrow


@triton.jit
def head_forward(
    x,  # (N, PIXELS, CHANNELS)
    dense,  # (NEURONS, CHANNELS * PIXELS): the pixels of a channel are neighbours
    dense_bias,
    output,  # (CLASSES, NEURONS)
    output_bias,
    targets,  # (N,) int64 labels, or (N, CLASSES) probabilities where SOFT
    class_weights,  # (CLASSES,) fp32; None: all 1
    dropped,  # (N, NEURONS) factors of dropout; None: none
    argument,  # (N, NEURONS): what the activation is applied to
    losses,  # (N,) fp32
    predictions,  # (N,) int64
    d_logits,  # (N, CLASSES) fp32: gradient of each loss by its logits
    counters,
    num_images,
    smoothing,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEURONS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASS_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    SOFT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program computes some neurons of some images; the last of these images' programs goes on to their losses."""
    await_inputs(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    neuron = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, known = (row < num_images)[:, None], (neuron < NEURONS)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, PIXELS * CHANNELS, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < PIXELS * CHANNELS
        one = tl.load(x + row[:, None] * (PIXELS * CHANNELS) + place[None, :], there & inside[None, :], 0.0)
        feature = place % CHANNELS * PIXELS + place // CHANNELS
        other = tl.load(dense + neuron[None, :] * (PIXELS * CHANNELS) + feature[:, None], known & inside[:, None], 0.0)
        sums = dot(one, other, sums, PRECISION)
    sums += tl.load(dense_bias + neuron, neuron < NEURONS, 0.0).to(tl.float32)[None, :]
    tl.store(argument + row[:, None] * NEURONS + neuron[None, :], narrow(sums, x.dtype.element_ty), there & known)
    if arrives_last(counters + 3 * tl.program_id(0) + 2, tl.num_programs(1)):
        label = tl.arange(0, CLASS_BLOCK)
        real = (label < CLASSES)[None, :]
        logits = tl.zeros((ROWS, CLASS_BLOCK), tl.float32)
        for start in range(0, NEURONS, COLUMNS):
            neuron = start + tl.arange(0, COLUMNS)
            one = activations(argument, dropped, row, neuron, there, NEURONS, VALUE)
            mask = real & (neuron < NEURONS)[:, None]
            other = tl.load(output + label[None, :] * NEURONS + neuron[:, None], mask, 0.0)
            logits = dot(one, other, logits, PRECISION)
        logits += tl.load(output_bias + label, label < CLASSES, 0.0).to(tl.float32)[None, :]
        logits = tl.where(real, narrow(logits, x.dtype.element_ty).to(tl.float32), float("-inf"))
        if SOFT:
            wanted = tl.load(targets + row[:, None] * CLASSES + label[None, :], there & real, 0.0).to(tl.float32)
        else:
            wanted = tl.where(tl.load(targets + row, row < num_images, 0)[:, None] == label[None, :], 1.0, 0.0)
        wanted = wanted * (1 - smoothing) + smoothing / CLASSES
        if class_weights is not None:
            wanted *= tl.load(class_weights + label, label < CLASSES, 0.0)[None, :]
        wanted = tl.where(real, wanted, 0.0)
        apart = logits - tl.max(logits, 1)[:, None]
        total = tl.sum(tl.exp(apart), 1)
        loss = tl.sum(wanted * tl.where(real, tl.log(total)[:, None] - apart, 0.0), 1)
        gradient = tl.exp(apart) / total[:, None] * tl.sum(wanted, 1)[:, None] - wanted
        tl.store(losses + row, loss, row < num_images)
        tl.store(predictions + row, tl.argmax(logits, 1).to(tl.int64), row < num_images)
        tl.store(d_logits + row[:, None] * CLASSES + label[None, :], gradient, there & real)


@triton.jit
def head_backward(
    x,
    dense,
    output,
    dropped,
    argument,
    d_logits,
    d_losses,  # (N,) fp32
    d_x,
    d_dense,
    d_dense_bias,
    d_output,
    d_output_bias,
    num_images,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEURONS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # features of a program
    NEURON_BLOCK: tl.constexpr,  # all neurons
    CLASS_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program computes the gradients of some features and their weights; the last one those of all else."""
    await_inputs(EARLY)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        feature_gradients(
            x, dense, output, dropped, argument, d_logits, d_losses, d_x, d_dense, num_images,
            PIXELS, CHANNELS, NEURONS, CLASSES, ROWS, COLUMNS, NEURON_BLOCK, CLASS_BLOCK, SLOPE, PRECISION,
        )  # fmt: skip
    else:
        output_gradients(
            output, dropped, argument, d_logits, d_losses, d_dense_bias, d_output, d_output_bias, num_images,
            NEURONS, CLASSES, ROWS, NEURON_BLOCK, CLASS_BLOCK, VALUE, SLOPE, PRECISION,
        )  # fmt: skip


@triton.jit
def feature_gradients(
    x,
    dense,
    output,
    dropped,
    argument,
    d_logits,
    d_losses,
    d_x,
    d_dense,
    num_images,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEURONS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEURON_BLOCK: tl.constexpr,
    CLASS_BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of some features and of the dense layer's weights for them."""
    neuron = tl.arange(0, NEURON_BLOCK)
    known = (neuron < NEURONS)[:, None]
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (place < PIXELS * CHANNELS)[None, :]
    feature = place % CHANNELS * PIXELS + place // CHANNELS
    columns = neuron[:, None] * (PIXELS * CHANNELS) + feature[None, :]
    own = tl.load(dense + columns, known & inside, 0.0)
    weights = output_weights(output, NEURONS, CLASSES, NEURON_BLOCK, CLASS_BLOCK)
    sums = tl.zeros((NEURON_BLOCK, COLUMNS), tl.float32)
    for start in range(0, num_images, ROWS):
        row = start + tl.arange(0, ROWS)
        images = (row < num_images)[:, None]
        g = logit_gradients(d_logits, d_losses, row, num_images, CLASSES, CLASS_BLOCK, x.dtype.element_ty)
        g = argument_gradients(g, weights, argument, dropped, row, images, NEURONS, NEURON_BLOCK, SLOPE, PRECISION)
        places = row[:, None] * (PIXELS * CHANNELS) + place[None, :]
        found = dot(g, own, tl.zeros((ROWS, COLUMNS), tl.float32), PRECISION)
        tl.store(d_x + places, narrow(found, x.dtype.element_ty), images & inside)
        sums = dot(tl.trans(g), tl.load(x + places, images & inside, 0.0), sums, PRECISION)
    tl.store(d_dense + columns, narrow(sums, x.dtype.element_ty), known & inside)


@triton.jit
def output_gradients(
    output,
    dropped,
    argument,
    d_logits,
    d_losses,
    d_dense_bias,
    d_output,
    d_output_bias,
    num_images,
    NEURONS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    NEURON_BLOCK: tl.constexpr,
    CLASS_BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of the output layer and of the dense layer's biases."""
    neuron, label = tl.arange(0, NEURON_BLOCK), tl.arange(0, CLASS_BLOCK)
    known, real = neuron < NEURONS, label < CLASSES
    weights = output_weights(output, NEURONS, CLASSES, NEURON_BLOCK, CLASS_BLOCK)
    sums = tl.zeros((CLASS_BLOCK, NEURON_BLOCK), tl.float32)
    biased = tl.zeros((ROWS, CLASS_BLOCK), tl.float32)
    dense_biased = tl.zeros((ROWS, NEURON_BLOCK), tl.float32)
    for start in range(0, num_images, ROWS):
        row = start + tl.arange(0, ROWS)
        images = (row < num_images)[:, None]
        g = logit_gradients(d_logits, d_losses, row, num_images, CLASSES, CLASS_BLOCK, output.dtype.element_ty)
        biased += g.to(tl.float32)
        one = activations(argument, dropped, row, neuron, images, NEURONS, VALUE)
        sums = dot(tl.trans(g), one, sums, PRECISION)
        g = argument_gradients(g, weights, argument, dropped, row, images, NEURONS, NEURON_BLOCK, SLOPE, PRECISION)
        dense_biased += g.to(tl.float32)
    places, there = label[:, None] * NEURONS + neuron[None, :], real[:, None] & known[None, :]
    tl.store(d_output + places, narrow(sums, output.dtype.element_ty), there)
    tl.store(d_output_bias + label, narrow(tl.sum(biased, 0), output.dtype.element_ty), real)
    tl.store(d_dense_bias + neuron, narrow(tl.sum(dense_biased, 0), output.dtype.element_ty), known)


@triton.jit
def output_weights(
    output, NEURONS: tl.constexpr, CLASSES: tl.constexpr, NEURON_BLOCK: tl.constexpr, CLASS_BLOCK: tl.constexpr
):
    """Return (classes, neurons) weights of the output layer."""
    neuron, label = tl.arange(0, NEURON_BLOCK), tl.arange(0, CLASS_BLOCK)
    there = (label < CLASSES)[:, None] & (neuron < NEURONS)[None, :]
    return tl.load(output + label[:, None] * NEURONS + neuron[None, :], there, 0.0)


@triton.jit
def activations(argument, dropped, row, neuron, there, NEURONS: tl.constexpr, VALUE: tl.constexpr):
    """Return (rows, neurons) inputs of the output layer. Read past the first cache: others wrote them."""
    places, mask = row[:, None] * NEURONS + neuron[None, :], there & (neuron < NEURONS)[None, :]
    z = tl.load(argument + places, mask, 0.0, cache_modifier=".cg")
    value = narrow(VALUE(z.to(tl.float32)), z.dtype)
    if dropped is not None:
        value = narrow(value.to(tl.float32) * tl.load(dropped + places, mask, 0.0).to(tl.float32), z.dtype)
    return tl.where(mask, value, 0.0).to(z.dtype)


@triton.jit
def logit_gradients(
    d_logits, d_losses, row, num_images, CLASSES: tl.constexpr, CLASS_BLOCK: tl.constexpr, kind: tl.constexpr
):
    """Return (rows, classes) gradients of the logits."""
    label = tl.arange(0, CLASS_BLOCK)
    mask = (row < num_images)[:, None] & (label < CLASSES)[None, :]
    g = tl.load(d_logits + row[:, None] * CLASSES + label[None, :], mask, 0.0)
    return narrow(g * tl.load(d_losses + row, row < num_images, 0.0)[:, None], kind)


@triton.jit
def argument_gradients(
    g,
    weights,
    argument,
    dropped,
    row,
    images,
    NEURONS: tl.constexpr,
    NEURON_BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return (rows, neurons) gradients of the dense layer's sums from those of the logits."""
    neuron = tl.arange(0, NEURON_BLOCK)
    places, mask = row[:, None] * NEURONS + neuron[None, :], images & (neuron < NEURONS)[None, :]
    found = dot(g, weights, tl.zeros((g.shape[0], NEURON_BLOCK), tl.float32), PRECISION)
    if dropped is not None:
        found *= tl.load(dropped + places, mask, 0.0).to(tl.float32)
    slope = SLOPE(tl.load(argument + places, mask, 0.0).to(tl.float32))
    return narrow(tl.where(mask, found * slope, 0.0), g.dtype)
