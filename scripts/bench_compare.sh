#!/usr/bin/env bash
# Is a revision slower than another? scripts/bench_compare.sh BASE [HEAD] [--json FILE]; --help lists the rest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec python -m bench.compare "$@"
