#!/usr/bin/env bash
# Proof on a borrowed GPU, in three phases of 5, 6 and 8 minutes that end by themselves and can be repeated to go on.
# Usage: scripts/gpu_proof.sh [OUT] --phase 1|2|3 [--small]      (bench/gpu_proof.py says what each does)
# Results: lines in OUT (bench/results/gpu_proof), all of it in OUT.tar.gz. --small shows on a CPU that it runs.
# Uses PYTHON, else .venv, else python3. Wheels and photos that scripts/gpu_pack.sh gathered in .carry are used, unless
# the environment has the packages; nothing is installed into the environment.
set -euo pipefail
out=bench/results/gpu_proof
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  out=$1
  shift
fi
out=$(realpath -m "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
carry=${CARRY:-$PWD/.carry}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
path=$PWD
if [ -d "$carry/wheels" ]; then
  # Into a folder of its own: the environment stays as it is. One that uv has made has no pip.
  unpack() {
    if "$python" -c 'import pip' 2> /dev/null; then
      "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$out/site" "$carry"/wheels/*.whl
    else
      for wheel in "$carry"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$out/site" || return; done
    fi
  }
  [ -d "$out/site" ] || unpack || { rm -rf "$out/site" && echo "no carried packages" >&2; }
  path=$path:$out/site
fi
[ -d "$carry/photos" ] && export FASTCNN_PROOF_PHOTOS=$carry/photos
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m bench.gpu_proof "$out" "$@"
