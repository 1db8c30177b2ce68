#!/usr/bin/env bash
# Runs all checks: format, lint, types, tests and docstring examples.
#
#   ./launch/test.sh             arguments go to pytest: ./launch/test.sh -k losses
#   ./launch/test.sh --parity    the comparisons with PyTorch instead, in .venv-parity
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

if [[ ${1:-} == --parity ]]; then
  shift
  install_into_venv test,parity .venv-parity
  exec .venv-parity/bin/python -m pytest -n 2 -m parity "$@"
fi
install_into_venv test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 "$@"
