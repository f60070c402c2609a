"""Make a picture for each augmentation: 16 photos before, and the same after. docs/augmentations/ holds them.

python scripts/augment_pictures.py [OUT] [--photos FOLDER] [--size 96]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pipelines
from fastcnn.config import STRENGTHS, Config
from fastcnn.training.augment import Augment
from scripts.make_dataset import make

COUNT, COLUMNS, GAP = 16, 8, 4


def main() -> None:
    """Write a picture for each augmentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/augmentations"), help="(default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="folder of photos (default: generated ones)")
    parser.add_argument("--size", type=int, default=96, help="pixels of a photo's side (default: 96)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.photos is None:
            args.photos = Path(folder)
            make(args.photos, classes=COUNT // 2, photos=COUNT, seed=3)
        paths = sorted(path for path in args.photos.rglob("*.jpg"))[:COUNT]
        pixels = np.zeros((COUNT, args.size, args.size, 3), np.uint8)
        pipelines.decode(paths, args.size, pixels, decoder="pillow")
    photos, indices = torch.from_numpy(pixels), torch.arange(COUNT)
    for name in STRENGTHS:
        config = Config(augment=(name,))
        augment = Augment(config.augmentations, args.size)
        changed = augment(photos, indices, indices, augment.draw(COUNT, (0, 1))).images
        path = args.out / f"{name}.jpg"
        sheet(photos.numpy(), changed.numpy()).save(path, quality=88)
        print(f"{path}: {config.augment[0]}")


def sheet(before: np.ndarray, after: np.ndarray) -> Image.Image:
    """Return a page with the photos before in its upper half and after in its lower, in the same order."""
    side = before.shape[1] + GAP
    rows = -(-len(before) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * side - GAP, 2 * rows * side + 3 * GAP), "white")
    for half, images in enumerate((before, after)):
        for i, image in enumerate(images):
            row, column = divmod(i, COLUMNS)
            page.paste(Image.fromarray(image), (column * side, half * (rows * side + 4 * GAP) + row * side))
    return page


if __name__ == "__main__":
    main()
