#!/usr/bin/env bash
# The whole test suite; --long adds the long form. Anything else goes to pytest: scripts/test.sh tests/test_index.py
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

marks="not long"
if [ "${1:-}" = --long ]; then
  marks=""
  shift
fi
exec python -m pytest -q -m "$marks" "$@"
