"""Plots of a run, as PNG files in memory, drawn from plain data."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastcnn.system.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastcnn.reporting.outcome import Sample

NUM_SAMPLES = 30
RIGHT, WRONG = "#1a7f37", "#c62828"
TRAIN, VAL = "#1f6feb", "#d9730d"

# Used, where installed, for letters that matplotlib's own font lacks.
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Yu Gothic", "PingFang SC", "Hiragino Sans",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Sans", "Arial Unicode MS",
)  # fmt: skip


def curves(rows: Sequence[Mapping[str, float]], best_epoch: int) -> bytes:
    """Return a plot of loss, accuracy and learning rate by epoch; a loss that is not finite leaves a gap."""
    epochs = [row["epoch"] for row in rows]

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplot_mosaic([["loss", "accuracy"], ["lr", "lr"]], height_ratios=(3, 1))
        for metric in ("loss", "accuracy"):
            for split, color in (("train", TRAIN), ("val", VAL)):
                values = np.array([row[f"{split}/{metric}"] for row in rows], float)
                values[~np.isfinite(values)] = np.nan
                panels[metric].plot(epochs, values, color=color, marker="o", markersize=3, label=split)
        panels["lr"].plot(epochs, [row["lr"] for row in rows], color="#57606a", marker="o", markersize=3)
        for name, axes in panels.items():
            axes.set_title("learning rate" if name == "lr" else name, loc="left")
            axes.axvline(best_epoch, color="#57606a", linestyle=":", label=f"best: epoch {best_epoch}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels["lr"].set_xlabel("epoch")
        panels["loss"].legend(frameon=False)
        panels["accuracy"].legend(frameon=False)

    return png(9, 5.5, draw)


def confusion_matrix(counts: npt.NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Return a plot of the (K, K) counts, each shaded by its fraction of the true class.

    Up to 20 classes the counts are written into the cells, up to 100 the names stand at the axes.
    """
    num_classes = len(classes)
    names = [_short(name, 24) for name in classes]
    cell = float(np.clip(11 / num_classes, 0.125, 0.6)) if num_classes <= 100 else 12.5 / num_classes  # inches
    size = min(9.0, cell * 72 * 0.72)  # points
    margin = 0.4 + (max(map(len, names)) * size * 0.6 / 72 if num_classes <= 100 else 0)
    side = max(cell * num_classes, 3.2)
    of_class = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(of_class, 1)

    def draw(figure: Figure) -> None:
        from matplotlib.colors import PowerNorm

        axes = figure.subplots()
        # With many classes a single confusion is faint: the square root brings it out.
        scale = PowerNorm(1.0 if num_classes <= 20 else 0.5, vmin=0, vmax=1)
        shades = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        figure.colorbar(shades, ax=axes, fraction=0.03, pad=0.02, label="share of the true class's photos")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if num_classes <= 100:
            axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size, parse_math=False)
            axes.set_yticks(range(num_classes), names, fontsize=size, parse_math=False)
        axes.tick_params(length=0)
        if num_classes <= 20:
            digits = len(str(counts.max()))
            fontsize = min(10.0, cell * 72 * 0.85 / (0.64 * digits))
            for row, column in np.ndindex(counts.shape):
                share, count = shares[row, column], counts[row, column]
                color = "white" if share > 0.55 else "#24292f" if count else "#b0b7bf"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=fontsize, color=color)

    return png(side + margin + 1.2, side + margin, draw)


def choose_samples(
    labels: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.int64],
    confidence: npt.NDArray[np.float32],
    count: int = NUM_SAMPLES,
) -> npt.NDArray[np.intp]:
    """Return indices of up to `count` photos to show: the most confident mistakes, then evenly spaced correct ones."""
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    right = np.flatnonzero(predicted == labels)
    wanted = min(count - len(wrong), len(right))
    spread = np.linspace(0, len(right) - 1, wanted).round().astype(np.intp) if wanted else np.zeros(0, np.intp)
    return np.concatenate([wrong, right[spread]])


def predictions(samples: Sequence[Sample], columns: int = 3) -> bytes:
    """Return a grid of photos, each with its true class, predicted class and the probability of that."""
    columns = min(columns, len(samples))
    num_rows = -(-len(samples) // columns)
    width, height, photo = 3.3, 1.2, 1.1  # inches

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for i, sample in enumerate(samples):
            x, y = i % columns * width + 0.08, i // columns * height + 0.08
            right = sample.label == sample.predicted
            color, mark = (RIGHT, "✓") if right else (WRONG, "✗")
            stride = max(1, len(sample.image) // 256)
            extent = (x, x + photo, y + photo, y)
            axes.imshow(sample.image[::stride, ::stride], extent=extent, aspect="auto", zorder=1)
            frame_x, frame_y = [x, x + photo, x + photo, x, x], [y, y, y + photo, y + photo, y]
            axes.plot(frame_x, frame_y, color=color, linewidth=2.5, zorder=2)
            lines = (
                (f"true: {_short(sample.label, 20)}", "#24292f", "normal"),
                (f"{mark} {_short(sample.predicted, 20)}", color, "bold"),
                (f"{sample.probability:.1%}", color, "normal"),
            )
            for line, (text, text_color, weight) in enumerate(lines):
                axes.text(
                    x + photo + 0.1, y + 0.25 + 0.3 * line, text, color=text_color, weight=weight,
                    fontsize=9, va="center", parse_math=False,
                )  # fmt: skip
        axes.set(xlim=(0, columns * width), ylim=(num_rows * height + 0.08, 0))

    return png(columns * width, num_rows * height + 0.08, draw)


def filters(weights: npt.NDArray[np.float32]) -> bytes:
    """Return a picture of filters (F, 3, k, k) as colours, each scaled from its smallest to its largest weight."""
    count, _, side, _ = weights.shape
    columns = max(8, int(np.ceil(np.sqrt(count * 2))))
    num_rows = -(-count // columns)
    scale = max(1, 48 // side)
    gap = max(2, side * scale // 8)
    pitch = side * scale + gap
    canvas = np.ones((num_rows * pitch + gap, columns * pitch + gap, 3))
    for i, weight in enumerate(weights):
        low, high = float(weight.min()), float(weight.max())
        image = (weight.transpose(1, 2, 0) - low) / (high - low) if high > low else np.full((side, side, 3), 0.5)
        y, x = i // columns * pitch + gap, i % columns * pitch + gap
        canvas[y : y + side * scale, x : x + side * scale] = np.kron(image, np.ones((scale, scale, 1)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(canvas, interpolation="nearest")
        axes.axis("off")
        axes.set_title(f"first layer: {count} filters of {side}x{side}, each scaled to its own range", fontsize=10)

    width = min(columns * 0.7, 9.0)
    return png(width, width * len(canvas) / canvas.shape[1] + 0.35, draw)


def png(width: float, height: float, draw: Callable[[Figure], None]) -> bytes:
    """Return a PNG of a size in inches, drawn without the user's matplotlib style or global state."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    there = set(font_manager.get_font_names())
    file = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that no font has is drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(font for font in FALLBACK_FONTS if font in there)]
        figure = Figure((width, height), layout="constrained", facecolor="white")
        draw(figure)
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _short(name: str, length: int) -> str:
    """Return a name shortened in the middle to at most `length` letters, as both ends tell names apart."""
    name = printable(name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"
