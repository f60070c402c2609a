"""Picture of docs/scale.md: how long a run takes and what its time is spent on."""

from __future__ import annotations

import io
from pathlib import Path

from bench.scale.rates import rate_values
from bench.scale.run import ALL_BUILT, AS_BUILT, Run, run_of
from bench.scale.tables import PHOTOS

PICTURE_GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
CAUSES = ["start-up", "list", "decode", "append", "loader", "storage", "compute", "launches", "exchange"]


def draw(path: Path) -> None:
    """Draw how long a run takes and what its time is spent on, over photos and GPUs: as built, and with more built."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from PIL import Image

    figure, panels = plt.subplots(2, figsize=(9, 8))
    colours = dict(zip(CAUSES, plt.get_cmap("Set3")(range(len(CAUSES))), strict=False))
    used = set()
    for axes, title, rates, plan in (
        (panels[0], "as built", rate_values(), AS_BUILT),
        (panels[1], "with the four changes that docs/scale.md names", rate_values(threads=True), ALL_BUILT),
    ):
        runs = [[run_of(photos, gpus, rates, plan) for gpus in PICTURE_GPUS] for photos in reversed(PHOTOS)]
        causes = [[one.bottleneck if isinstance(one, Run) else "" for one in row] for row in runs]
        used |= {cause for row in causes for cause in row}
        axes.table(
            [["-" if isinstance(one, str) else f"{one.time}\n{one.cost}" for one in row] for row in runs],
            [[colours.get(cause, "white") for cause in row] for row in causes],
            cellLoc="center",
            rowLabels=[f"{photos:,}" for photos in reversed(PHOTOS)],
            colLabels=[f"{gpus:,}" for gpus in PICTURE_GPUS],
            bbox=(0, 0, 1, 1),
        )
        axes.set_title(f"{title}: photos over GPUs", loc="left", fontsize=10)
        axes.axis("off")
    patches = [Patch(color=colour, label=cause) for cause, colour in colours.items() if cause in used]
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.96), ncols=len(patches), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=96, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)
