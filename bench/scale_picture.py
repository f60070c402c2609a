"""The picture of docs/scale.md: what a run's time is spent on, over photos and GPUs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from bench import rates
from bench.scale import ALL_BUILT, AS_BUILT, Plan
from bench.scale_step import Values
from bench.scale_tables import PHOTOS, dollars, duration, run_of, with_threads

GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
COLOURS = {
    "start-up": "#d9d9d9",
    "list": "#b8a2d8",
    "decode": "#f4a35c",
    "append": "#c9a26b",
    "loader": "#f6d55c",
    "storage": "#d1605e",
    "compute": "#7fbf7b",
    "launches": "#a8c8e8",
    "exchange": "#4a7fb5",
}


def draw(path: Path) -> None:
    """Draw how long a run takes and what its time is spent on, over photos and GPUs: as built, and with more built."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from PIL import Image

    figure, panels = plt.subplots(2, figsize=(9, 8), sharex=True)
    panels[0].set_title("as built", loc="left", fontsize=10)
    panels[1].set_title("with the five changes that docs/scale.md names", loc="left", fontsize=10)
    used = _panel(panels[0], rates.values(), AS_BUILT) | _panel(panels[1], with_threads(), ALL_BUILT)
    panels[1].set_xlabel("GPUs")
    patches = [Patch(color=colour, label=cause) for cause, colour in COLOURS.items() if cause in used]
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.96), ncols=len(patches), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=96, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)


def _panel(axes: Any, values: Values, plan: Plan) -> set[str]:
    """Draw one; return the causes in it."""
    from matplotlib.patches import Rectangle

    used = set()
    for y, photos in enumerate(PHOTOS):
        for x, count in enumerate(GPUS):
            run, colour, text = run_of(photos, count, values, plan), "white", "-"
            if not isinstance(run, str):
                used.add(run.bottleneck)
                colour = COLOURS.get(run.bottleneck, "#eeeeee")
                text = f"{duration(run.seconds)}\n{dollars(run, values['price'])}"
            axes.add_patch(Rectangle((x, y), 1, 1, fc=colour, ec="white"))
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, len(GPUS)), ylim=(0, len(PHOTOS)), ylabel="photos")
    axes.set_xticks([x + 0.5 for x in range(len(GPUS))], [f"{count:,}" for count in GPUS])
    axes.set_yticks([y + 0.5 for y in range(len(PHOTOS))], [f"$10^{power}$" for power in range(3, 10)])
    axes.tick_params(length=0)
    return used
