"""End of a training step in two launches: `collect` and `update` of its functions, by kernels of our own.

torch's fused Adam shares its work out in pieces of 65,536 values, so that a network of 105,162 is computed by two of a
GPU's 132 multiprocessors; and the copy in 16 bits, the average, the sums and the counters are launches of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.network.kernels.launch import Launch
from fastcnn.network.kernels.update import adam_update, collect
from fastcnn.training.optimizers import Adam
from fastcnn.training.parameters import in_memory_order
from fastcnn.training.step import TrainingStep

BLOCK = 1024


def refusal(step: TrainingStep) -> str:
    """Return the reason why a step is updated by torch's kernels; "" where it is by these."""
    if not isinstance(step.optimizer, Adam):
        return "its optimizer is not Adam or AdamW"
    if step.loss_scale is not None:
        return "its loss is scaled (fp16)"
    if step.clip_norm is not None:
        return "its gradient is clipped"
    return "it skips steps whose loss is not finite" if step.skip_nan else ""


class WrittenUpdate:
    """`collect` and `update` of a training step with Adam or AdamW.

    counters: see `pool_norm_layer.new_counters`.
    """

    def __init__(self, step: TrainingStep, counters: Tensor) -> None:
        self.step, self.counters = step, counters
        taken = torch.arange(1, len(step.lr_schedule) + 1, dtype=torch.float64)
        corrections = torch.stack([1 / (1 - 0.9**taken), 1 / (1 - 0.999**taken).sqrt()], 1)
        self.corrections = corrections.float().to(step.lr_schedule.device)

    def collect(self, gradients: Sequence[Tensor], losses: Tensor) -> None:
        """Copy gradients (one per parameter) into the flat gradient, and the sum of the losses (N,) behind it."""
        sources = [in_memory_order(gradient) for gradient in gradients]
        if self.step.ranks.joined:
            sources.append(losses.sum().view(1))
        sizes = tuple(len(source) for source in sources)
        arguments = {
            "sources": tuple(sources),
            "gradient": self.step.parameters.reduced,
            "SIZES": sizes,
            "BLOCK": BLOCK,
        }
        Launch(collect, (sum(-(-size // BLOCK) for size in sizes),), arguments).run()

    def update(self, losses: Tensor, predictions: Tensor, labels: Tensor, buffers: Sequence[Tensor]) -> None:
        """Update the weights, add losses and predictions (N,) to the sums, and advance the cursor."""
        step, parameters, optimizer = self.step, self.step.parameters, self.step.optimizer
        checked = parameters.loss.view(1) if step.ranks.joined else losses
        arguments = {
            "values": parameters.values,
            "gradient": parameters.gradient,
            **optimizer.moments,
            "decay": optimizer.decay,
            "values_16bit": parameters.values_16bit,
            "average": step.average,
            "average_weights": step.average_weights,
            "lr_schedule": step.lr_schedule,
            "corrections": self.corrections,
            "lr": optimizer.lr,
            "num_updates": optimizer.num_updates,
            "skipped": step.skipped,
            "step_count": step.step_count,
            "cursor": step.feed.cursor,
            "checked": checked,
            "losses": losses,
            "predictions": predictions,
            "labels": labels,
            "sums": step.sums.values,
            "counters": self.counters,
            "num_values": len(parameters.values),
            "num_checked": len(checked),
            "num_images": len(losses),
            "batch_size": step.batch_size,
            "DECOUPLED": optimizer.decoupled,
            "BLOCK": BLOCK,
        }
        Launch(adam_update, (-(-len(parameters.values) // BLOCK),), arguments).run()
