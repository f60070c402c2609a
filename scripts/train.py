"""`fastcnn train` from a checkout: python scripts/train.py DATA, or torchrun scripts/train.py DATA."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcnn.cli import main
from fastcnn.system import quick_start

if __name__ == "__main__":
    quick_start.end(main(["train", *sys.argv[1:]]))
