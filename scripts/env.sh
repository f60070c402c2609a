# Sourced by the other scripts: makes .venv with the versions of constraints.txt, or reuses one that has them.
# PYTHON=... chooses the interpreter (3.11 to 3.13).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python 3.11 to 3.13 found: install one, or name it with PYTHON=/path/to/python" >&2
  return 1
}

# The DALI extra for this machine's driver: both wheels ship the same module, so it is one or the other.
dali_extra() {
  [ "$(uname -s)" = Linux ] || return 0
  local cuda
  cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1 || true)
  if [ "$cuda" = 12 ]; then
    echo "The driver is for CUDA 12 and the registry's torch for CUDA 13: if torch sees no GPU, update the driver," \
      "or install torch's own CUDA 12 build into .venv and run this again." >&2
    echo ",cuda12"
  else
    echo ",cuda13"
  fi
}

make_env() {
  local python extras stamp wanted
  python=$(find_python)
  extras="dev$(dali_extra)"
  stamp=.venv/fastcnn-installed
  wanted="$("$python" --version) $extras $(cat constraints.txt setup.cfg pyproject.toml | cksum) $PWD"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Installing into .venv (the first time this downloads torch and DALI) ..."
  # An environment that another interpreter made cannot be reused.
  local which='import sys; print(sys.base_prefix, sys.version)'
  if [ "$(.venv/bin/python -c "$which" 2>/dev/null)" != "$("$python" -c "$which")" ]; then
    rm -rf .venv
  fi
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  echo "$wanted" >"$stamp"
}

make_env
export PATH="$PWD/.venv/bin:$PATH"
