#!/usr/bin/env bash
# Makes .peers, the environment of the trainers that fastcnn is compared with: python -m bench --only accuracy uses it.
# Their torch is not ours: torchvision, which they need, has no build for ours. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(torch==2.14.1 torchvision==0.29.1 timm==1.0.31 fastai==2.8.12 ultralytics==8.4.190)
if [ "$(cat .peers/packages 2>/dev/null)" != "${packages[*]}" ]; then
  echo "Installing ${packages[*]} into .peers (7 GB) ..."
  "${PYTHON:-python3}" -m venv --clear .peers
  .peers/bin/python -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  echo "${packages[*]}" >.peers/packages
fi
.peers/bin/python -c 'import torch, torchvision, timm, fastai, ultralytics'
echo "The peers are in .peers: python -m bench --only accuracy trains them too."
