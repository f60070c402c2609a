"""The loss curves of seed.py and of what is compared with it, on one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.report.plots import COLOURS, STYLE
from bench.report.record import Record

PANELS = {"train_losses": "training loss", "held_out_losses": "held-out loss"}


def draw(record: Record, path: Path) -> None:
    """Write the picture: each arm's mean over the seeds; with two arms every seed, thin, too."""
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot as plt

    styles = cycler(linestyle=["-", "--", ":"]) * cycler(color=["#8c8c8c", *COLOURS])
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.2))
        for axes, (measure, title) in zip(panels, PANELS.items(), strict=True):
            for row, style in zip(record.rows, styles(), strict=False):
                curves = np.array([found[measure] for found in row["extra_info"]["runs"].values()])  # (seeds, epochs)
                epochs = np.arange(1, curves.shape[1] + 1)
                if len(record.rows) == 2:
                    axes.plot(epochs, curves.T, linewidth=0.6, alpha=0.35, **style)
                axes.plot(epochs, curves.mean(0), linewidth=2, label=f"{row['name']}, mean of {len(curves)}", **style)
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(
            "{data}, {image_size} px, {num_train:,} training photos, {num_held_out:,} held out".format_map(
                record.settings
            )
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)
