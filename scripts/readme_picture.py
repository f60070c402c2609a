"""Draw the README's picture from the published results: python scripts/readme_picture.py [FOLDER, docs by default]."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.report.plots import draw  # noqa: E402
from bench.report.record import read  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "published" / "amd-epyc-2-cores.json"


def main(folder: Path) -> Path:
    """Write training_rate.png into the folder; return its path."""
    draw(read(RESULTS), folder, ["training_rate.png"])
    return folder / "training_rate.png"


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"))
