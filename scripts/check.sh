#!/usr/bin/env bash
# Format, lint and types; no tests.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ruff format --check .
ruff check .
mypy
