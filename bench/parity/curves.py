"""The loss curves of seed.py and of what is compared with it, on one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.report.record import Record

COLORS = ("#8c8c8c", "#1f5fa8", "#d9730d", "#1a7f37", "#c62828", "#7b4fb5")
PANELS = {"train_losses": "training loss", "held_out_losses": "held-out loss"}


def draw(record: Record, path: Path) -> None:
    """Write the picture: each arm's mean over the seeds; with two arms every seed, thin, too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.2))
    for axes, (measure, title) in zip(panels, PANELS.items(), strict=True):
        for number, row in enumerate(record.rows):
            curves = np.array([found[measure] for found in row["extra_info"]["runs"].values()])  # (seeds, epochs)
            epochs = np.arange(1, curves.shape[1] + 1)
            style = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":")[number // len(COLORS) % 3]}
            if len(record.rows) == 2:
                axes.plot(epochs, curves.T, linewidth=0.6, alpha=0.35, **style)
            axes.plot(epochs, curves.mean(0), linewidth=2, label=f"{row['name']}, mean of {len(curves)}", **style)
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    settings = record.settings
    figure.suptitle(
        f"{settings['data']}, {settings['image_size']} px, {settings['num_train']:,} training photos, "
        f"{settings['num_held_out']:,} held out",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
