"""Plots of a run, as PNG files in memory, drawn from plain data."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastcnn.errors import ignoring_warnings
from fastcnn.system.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastcnn.reporting.outcome import Sample

NUM_SAMPLES = 30
DPI = 110
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
    names = [short(name, 24) for name in classes]
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
    """Return indices of up to `count` photos to show: the most confident mistakes, then evenly spaced correct ones.

    Each of the two has at least half of the places, as far as there are enough.
    """
    wrong, right = np.flatnonzero(predicted != labels), np.flatnonzero(predicted == labels)
    num_wrong = min(len(wrong), max(-(-count // 2), count - len(right)))
    num_right = min(len(right), count - num_wrong)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:num_wrong]
    spread = np.linspace(0, len(right) - 1, num_right).round().astype(np.intp) if num_right else np.zeros(0, np.intp)
    return np.concatenate([wrong, right[spread]])


def predictions(samples: Sequence[Sample]) -> bytes:
    """Return a grid of photos, mistakes apart from correct ones, each with its true and predicted class."""
    columns = min(3, len(samples))
    photo, room, gap, head = 2.2, 1.6, 0.12, 0.45  # inches; room: for the text beside a photo
    width, height = photo + room + 3 * gap, photo + gap
    wrong = [sample for sample in samples if sample.label != sample.predicted]
    right = [sample for sample in samples if sample.label == sample.predicted]
    groups = [("Mistakes, the most confident first", wrong), ("Correct", right)]
    groups = [(title, group) for title, group in groups if group]
    full_height = sum(head + -(-len(group) // columns) * height for _, group in groups)

    def draw_sample(axes: Axes, sample: Sample, x: float, y: float) -> None:
        color, mark = (RIGHT, "✓") if sample.label == sample.predicted else (WRONG, "✗")
        _draw_photo(axes, sample.image, x, y, photo, color)
        lines = (
            (0.3, "true", "#57606a", "normal"),
            (0.52, short(sample.label, 20), "#24292f", "normal"),
            (0.95, "predicted", "#57606a", "normal"),
            (1.17, f"{mark} {short(sample.predicted, 20)}", color, "bold"),
            (1.39, f"{sample.probability:.1%}", color, "normal"),
        )
        for down, text, text_color, weight in lines:
            _write(axes, x + photo + gap, y + down, text, room, color=text_color, weight=weight)

    def draw(figure: Figure) -> None:
        axes = _inches(figure, columns * width, full_height)
        top = 0.0
        for title, group in groups:
            _write(axes, gap, top + head / 2, title, width, fontsize=12, weight="bold")
            for i, sample in enumerate(group):
                x, y = i % columns * width + gap, top + head + i // columns * height
                draw_sample(axes, sample, x, y)
            top += head + -(-len(group) // columns) * height

    return png(columns * width, full_height, draw)


def batch(images: npt.NDArray[np.uint8], captions: Sequence[Sequence[str]], title: str) -> bytes:
    """Return a grid of the images (N, H, W, 3) of a batch, each with the lines of its caption below."""
    columns = min(6, len(images))
    photo, margin, head, line = 1.65, 0.08, 0.4, 0.19  # inches
    pitch = photo + margin + line * max(map(len, captions)) + 0.08
    num_rows = -(-len(images) // columns)
    width, height = max(columns * (photo + margin) + margin, 3.0), head + num_rows * pitch

    def draw(figure: Figure) -> None:
        axes = _inches(figure, width, height)
        _write(axes, margin, head / 2, title, width - 2 * margin, fontsize=12, weight="bold")
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, y = i % columns * (photo + margin) + margin, head + i // columns * pitch
            _draw_photo(axes, image, x, y, photo, "#d0d7de")
            for number, text in enumerate(caption):
                _write(axes, x, y + photo + line * (number + 0.7), short(text, 24), photo, fontsize=9)

    return png(width, height, draw)


def _inches(figure: Figure, width: float, height: float) -> Axes:
    """Return axes over a whole figure whose units are inches from its top left corner."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return axes


def _draw_photo(axes: Axes, image: npt.NDArray[np.uint8], x: float, y: float, side: float, color: str) -> None:
    stride = max(1, len(image) // 256)
    extent = (x, x + side, y + side, y)
    axes.imshow(image[::stride, ::stride], extent=extent, aspect="auto", zorder=1)
    axes.plot([x, x + side, x + side, x, x], [y, y, y + side, y + side, y], color=color, linewidth=2.5, zorder=2)


def _write(axes: Axes, x: float, y: float, text: str, room: float, **style: Any) -> None:
    """Write one line, smaller where it would be wider than `room` inches."""
    style = {"color": "#24292f", "fontsize": 10, **style}
    line = axes.text(x, y, text, va="center", parse_math=False, **style)
    width = line.get_window_extent().width / DPI
    line.set_fontsize(style["fontsize"] * min(1.0, room / width))


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    there = set(font_manager.get_font_names())
    pixels, file = io.BytesIO(), io.BytesIO()
    with ignoring_warnings(), matplotlib.rc_context():  # a letter that no font has is drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(font for font in FALLBACK_FONTS if font in there)]
        figure = Figure((width, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)  # becomes the figure's canvas: one renderer for all texts that are measured
        draw(figure)
        figure.savefig(pixels, format="rgba", dpi=DPI)
    # Without alpha and at a lower level, photos are packed as small as by matplotlib and 2.5 times as fast.
    image = Image.frombytes("RGBA", figure.canvas.get_width_height(), pixels.getvalue()).convert("RGB")
    image.save(file, "png", compress_level=3, dpi=(DPI, DPI))
    return file.getvalue()


def short(name: str, length: int) -> str:
    """Return a name shortened in the middle to at most `length` letters, as both ends tell names apart."""
    name = printable(name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"
