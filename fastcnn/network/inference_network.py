"""Network for inference: resize, normalisation, network and softmax in one module."""

# No `from __future__ import annotations`: TorchScript reads the types of attributes.

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fastcnn.network.pixels import normalisation
from fastcnn.network.small_cnn import BatchNorm, Block, SmallCNN

# Maps above glibc's largest threshold (32 MiB) go back to the system after every use, and are faulted in again.
MAP_BYTES = 16 * 2**20


class Deployed(nn.Module):
    """Network from uint8 images of any size to class probabilities.

    Args:
        network: (N, 3, image_size, image_size) normalised -> (N, num_classes) logits.
        image_size: side in pixels that photos are resized to.
        mean: mean of each colour channel, 0 to 1.
        std: standard deviation of each colour channel.
        classes: class names.
        dtype: dtype of the network's arithmetic; everything around it is fp32.
        always_resize: resize without a test of the size, which a traced program cannot make.

    TorchScript on a CPU runs batches in chunks of `chunk` images, which is faster. After `to(torch.half)` or `double()`
    the network computes in that type.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str],
        dtype: torch.dtype = torch.float32,
        always_resize: bool = False,
    ) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.image_size, self.always_resize = image_size, always_resize
        self.classes = list(classes)
        self.chunk = chunk(network, image_size)
        scale, shift = normalisation(mean, std, image_size)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8, any height and width -> (N, num_classes) fp32 probabilities."""
        assert images.dtype == torch.uint8, "expected uint8 images"
        assert images.dim() == 4, "expected images of shape (N, H, W, 3)"
        assert images.size(3) == 3, "expected images of shape (N, H, W, 3)"
        if is_scripting():  # noqa: SIM102
            if images.size(0) > self.chunk and not images.is_cuda:
                return torch.cat([self.probabilities(some) for some in images.split(self.chunk)])
        return self.probabilities(images)

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, num_classes) fp32 probabilities, all at once."""
        size = self.image_size
        if self.always_resize or images.size(1) != size or images.size(2) != size:
            x = images.permute(0, 3, 1, 2).float()
            x = F.interpolate(x, size=[size, size], mode="bilinear", align_corners=False, antialias=True)
            # Rounded like the uint8 pixels that the network was trained on.
            images = x.round().clamp(0.0, 255.0).permute(0, 2, 3, 1)
        rows = torch.addcmul(self.shift, images.flatten(2), self.scale)  # (N, size, size * 3)
        x = rows.view(-1, size, size, 3).permute(0, 3, 1, 2)
        return torch.softmax(self.network(x).float(), dim=1)


def chunk(network: nn.Module, image_size: int) -> int:
    """Return the number of images whose largest map in a network's blocks fits in MAP_BYTES."""
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    maps = [layer.out_channels * (image_size >> number) ** 2 for number, layer in enumerate(convolutions)]
    return max(1, MAP_BYTES // (4 * max(maps, default=3 * image_size**2)))


class Stage(nn.Module):
    """Block whose batch norm is one scale and one shift per channel.

    The norm stands after the pool, so it cannot be folded into the convolution before it; the next convolution could
    take it only with a border of its own, as it pads with zeros after the norm.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, block: Block, normalise: bool) -> None:
        super().__init__()
        self.conv, self.activation, self.pool = block.conv, block.activation, block.pool
        self.pool_first, self.normalise = block.pool_first, normalise
        scale, shift = scale_and_shift(block.norm, block.conv.out_channels)
        self.register_buffer("scale", scale.to(block.conv.weight.dtype).view(1, -1, 1, 1))
        self.register_buffer("shift", shift.to(block.conv.weight.dtype).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) float -> (N, out_channels, H // 2, W // 2)."""
        x = self.conv(x)
        x = self.activation(self.pooled(x)) if self.pool_first else self.pooled(self.activation(x))
        return torch.addcmul(self.shift, x, self.scale) if self.normalise else x

    def pooled(self, x: Tensor) -> Tensor:
        """Return the maxima of 2x2 windows."""
        if is_scripting():  # torch's own pooling writes an index for each, whether somebody asks for it or not
            height, width = x.size(2) // 2 * 2, x.size(3) // 2 * 2
            rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
            return torch.maximum(rows[:, :, :, 0:width:2], rows[:, :, :, 1:width:2])
        return self.pool(x)  # type: ignore[no-any-return]


class Inference(nn.Module):
    """Trained SmallCNN for inference: the same function in exact arithmetic.

    The last batch norm is folded into the dense layer, the others are scale and shift; dropout is gone. The network's
    test-time augmentation is part of it.
    """

    def __init__(self, network: SmallCNN) -> None:
        super().__init__()
        network = copy.deepcopy(network).requires_grad_(False).eval()
        *blocks, last = (block for block in network.blocks if isinstance(block, Block))
        stages = [Stage(block, normalise=isinstance(block.norm, BatchNorm)) for block in blocks]
        self.stages = nn.Sequential(*stages, Stage(last, normalise=False))
        self.dense = _with_norm(network.dense, last)
        self.activation, self.output = network.activation, network.output
        self.mirrors = network.mirrors

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) normalised, any float type -> (N, num_classes) logits in the weights' type."""
        x = x.to(self.dense.weight.dtype)
        return (self.logits(x) + self.logits(x.flip([3]))) / 2 if self.mirrors else self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the images as they are, without those of their mirror images."""
        x = self.stages(x).flatten(1)
        return self.output(self.activation(self.dense(x)))  # type: ignore[no-any-return]


def scale_and_shift(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a trained batch norm, (C,) float64 each; 1 and 0 where there is none."""
    if not isinstance(norm, BatchNorm):
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _with_norm(dense: nn.Linear, block: Block) -> nn.Linear:
    """Return the dense layer with the batch norm before it folded in."""
    scale, shift = scale_and_shift(block.norm, block.conv.out_channels)
    inputs = dense.in_features // len(scale)  # per channel, side by side
    scale, shift = scale.repeat_interleave(inputs), shift.repeat_interleave(inputs)
    weight = dense.weight.double()
    dense.bias = nn.Parameter((dense.bias.double() + weight @ shift).to(dense.bias.dtype), requires_grad=False)
    dense.weight = nn.Parameter((weight * scale).to(dense.weight.dtype), requires_grad=False)
    return dense
