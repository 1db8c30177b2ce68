#!/usr/bin/env bash
# Runs every check: format, lint, types, then all tests and the examples in docstrings.
#
#   ./launch/test.sh                      arguments go to pytest: ./launch/test.sh -k losses
#   RANKTUNER_PARITY=1 ./launch/test.sh   also compares with PyTorch (installs it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

install_into_venv "test${RANKTUNER_PARITY:+,parity}"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 "$@"
