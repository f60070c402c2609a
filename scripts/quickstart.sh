#!/usr/bin/env bash
# From a fresh clone to predictions: makes the environment and photos, trains, exports and predicts. May be repeated.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

photos=photos
python scripts/make_dataset.py "$photos" --classes 10 --photos 3000 --seed 0
fastcnn train "$photos" --epochs 5
run=$(ls -td runs/photos*/ | head -n 1)
fastcnn export "$run"
echo "three predictions:"
ls "$photos"/*/*.jpg | awk 'NR == 1 || NR == 1000 || NR == 2000' | xargs fastcnn predict "${run%/}/model.torchscript"
