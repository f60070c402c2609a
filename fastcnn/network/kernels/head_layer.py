"""Dense layers and cross-entropy as one differentiable function: two launches instead of some thirty.

For small batches, where launches are what takes the time; a large one is the library's, see `usable`. Importing this
needs triton. On a CPU the kernels run under TRITON_INTERPRET=1, for tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from fastcnn.network.kernels.activations import ACTIVATIONS
from fastcnn.network.kernels.head import head_backward, head_forward
from fastcnn.network.kernels.launch import Launch

ROWS, COLUMNS = 16, 16
MOST_IMAGES, MOST_NEURONS, MOST_CLASSES = 256, 256, 128


def usable(x: Tensor, dense: nn.Linear, output: nn.Linear) -> bool:
    """Return whether `head` takes these features and layers."""
    neurons, classes = dense.out_features, output.out_features
    fits = len(x) <= MOST_IMAGES and neurons <= MOST_NEURONS and classes <= MOST_CLASSES
    return fits and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class Loss(NamedTuple):
    """What a cross-entropy is taken of."""

    targets: Tensor
    """(N,) int64 labels, or (N, num_classes) class probabilities."""
    label_smoothing: float
    """Fraction of each label that is spread over all classes."""
    class_weights: Tensor | None
    """(num_classes,) fp32; None: all 1."""


def head(
    x: Tensor,
    dense: nn.Linear,
    output: nn.Linear,
    activation: str,
    dropped: Tensor | None,
    loss: Loss,
    counters: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (N,) fp32 cross-entropy losses and (N,) int64 most probable classes.

    Args:
        x: (N, C, H, W) features, channels_last, fp32, bf16 or fp16, as the layers' weights.
        activation: a name in `ACTIVATIONS`, between the layers.
        dropped: (N, neurons) factors of dropout after it; None: none.
        counters: see `pool_norm_layer.new_counters`.
    """
    weights = dense.weight, dense.bias, output.weight, output.bias
    made: tuple[Tensor, Tensor] = _Head.apply(x, *weights, (activation, dropped, loss, counters))  # type: ignore[no-untyped-call]
    return made


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dense: Tensor,
        dense_bias: Tensor,
        output: Tensor,
        output_bias: Tensor,
        options: tuple[str, Tensor | None, Loss, Tensor],
    ) -> tuple[Tensor, Tensor]:
        activation, dropped, loss, counters = options
        x = x.contiguous(memory_format=torch.channels_last)
        argument = x.new_empty((len(x), len(dense)))
        losses = x.new_empty(len(x), dtype=torch.float32)
        predictions = x.new_empty(len(x), dtype=torch.int64)
        d_logits = x.new_empty((len(x), len(output)), dtype=torch.float32)
        arguments = {
            "x": x,
            "dense": dense,
            "dense_bias": dense_bias,
            "output": output,
            "output_bias": output_bias,
            "targets": loss.targets,
            "class_weights": loss.class_weights,
            "dropped": dropped,
            "argument": argument,
            "losses": losses,
            "predictions": predictions,
            "d_logits": d_logits,
            "counters": counters,
            "num_images": len(x),
            "smoothing": float(loss.label_smoothing),
            "COLUMNS": COLUMNS,
            "CHUNK": 64,
            "VALUE": ACTIVATIONS[activation].value,
            "SOFT": loss.targets.dim() == 2,
            **_sizes(x, dense, output),
        }
        Launch(head_forward, (-(-len(x) // ROWS), -(-len(dense) // COLUMNS)), arguments).run()
        ctx.save_for_backward(x, dense, output, dropped, argument, d_logits)
        ctx.activation = activation
        ctx.mark_non_differentiable(predictions)
        ctx.set_materialize_grads(False)  # zeros for the predictions would be a launch
        return losses, predictions

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, dense, output, dropped, argument, d_logits = ctx.saved_tensors
        function = ACTIVATIONS[ctx.activation]
        d_x, d_dense, d_output = torch.empty_like(x), torch.empty_like(dense), torch.empty_like(output)
        d_dense_bias, d_output_bias = dense.new_empty(len(dense)), output.new_empty(len(output))
        arguments = {
            "x": x,
            "dense": dense,
            "output": output,
            "dropped": dropped,
            "argument": argument,
            "d_logits": d_logits,
            "d_losses": d_losses.contiguous(),
            "d_x": d_x,
            "d_dense": d_dense,
            "d_dense_bias": d_dense_bias,
            "d_output": d_output,
            "d_output_bias": d_output_bias,
            "num_images": len(x),
            "COLUMNS": COLUMNS,
            "NEURON_BLOCK": max(16, triton.next_power_of_2(len(dense))),
            "VALUE": function.value,
            "SLOPE": function.slope,
            **_sizes(x, dense, output),
        }
        Launch(head_backward, (-(-dense.shape[1] // COLUMNS) + 1,), arguments).run()
        return d_x, d_dense, d_dense_bias, d_output, d_output_bias, None


def _sizes(x: Tensor, dense: Tensor, output: Tensor) -> dict[str, Any]:
    """Return the constants of both kernels."""
    return {
        "PIXELS": x.shape[2] * x.shape[3],
        "CHANNELS": x.shape[1],
        "NEURONS": len(dense),
        "CLASSES": len(output),
        "ROWS": ROWS,
        "CLASS_BLOCK": max(16, triton.next_power_of_2(len(output))),
        "PRECISION": "ieee",
    }
