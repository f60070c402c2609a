#!/usr/bin/env bash
# Gathers in .carry, below 60 MiB, what a GPU box without network lacks; scripts/gpu_proof.sh finds it there.
# Usage: scripts/gpu_pack.sh [PYTHON_VERSION]     of the box, 3.12 unless given; PHOTOS=DIR: real photos, CARRY=DIR: where
# Wheels: simplejpeg, platformdirs, pydantic with what it needs, nvImageCodec and nvJPEG (for CUDA 13), pytest-timeout.
# Photos: 20 MB of PHOTOS (../shared/data/clothing-10, which is CC0); without them, generated ones are decoded.
set -euo pipefail
version=${1:-3.12}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
carry=$(realpath -m "${CARRY:-.carry}")
photos=${PHOTOS:-../shared/data/clothing-10}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
most_kib=$((60 * 1024))

# Made beside it and renamed: what is there is whole.
new=$carry.new
rm -rf "$new"
mkdir -p "$new/wheels"
get=("$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp
  --python-version "$version" --dest "$new/wheels" -c constraints.txt)
for glibc in 2_28 2_27 2_17; do get+=(--platform "manylinux_${glibc}_x86_64"); done
get+=(--platform manylinux2014_x86_64)
"${get[@]}" pydantic
# Their needs (numpy, a CUDA runtime) come with torch.
"${get[@]}" --no-deps simplejpeg platformdirs nvidia-nvimgcodec-cu13 nvidia-nvjpeg pytest-timeout

if [ -d "$photos" ]; then
  mkdir "$new/photos"
  # By file name, which in that set is random: a few of every class.
  (cd "$photos" && find . -iname '*.jpg' -printf '%s %f %p\n' | sort -k 2 |
    awk '(bytes += $1) <= 20000000 { print $3 }' | xargs -d '\n' cp --parents --target-directory "$new/photos")
else
  echo "no photos in $photos: generated ones will be decoded"
fi
kib=$(du -sk --apparent-size "$new" | cut -f 1)
if [ "$kib" -gt $most_kib ]; then
  echo "gpu_pack: error: $kib KiB in $new are more than $most_kib: choose fewer PHOTOS" >&2
  exit 1
fi
rm -rf "$carry"
mv "$new" "$carry"
echo "$(find "$carry/wheels" -name '*.whl' | wc -l) wheels and $(find "$carry" -iname '*.jpg' | wc -l) photos," \
  "$((kib / 1024)) MiB in $carry"
