#!/usr/bin/env bash
# Runs all checks: format, lint, types, tests and docstring examples.
#
#   ./launch/test.sh             arguments go to pytest: ./launch/test.sh -k losses
#   ./launch/test.sh --parity    the comparisons with PyTorch instead, in .venv-parity
#   ./launch/test.sh --trainers  the adapters for other trainers instead: those that take seconds to
#                                install, or -s NAME; each in an environment in .nox
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

if [[ ${1:-} == --parity ]]; then
  shift
  # Pip's settings choose between the builds of PyTorch, of which those for GPUs take several GB.
  make_venv .venv-parity
  .venv-parity/bin/pip install --quiet "$(grep -oE '^ +torch==[0-9.]+' setup.cfg | tr -d ' ')"
  install_into_venv test,parity .venv-parity
  exec .venv-parity/bin/python -m pytest -n 2 -m "parity and not drill" "$@"
fi
if [[ ${1:-} == --trainers ]]; then
  shift
  make_venv .venv-nox
  .venv-nox/bin/pip install --quiet "nox[uv]>=2025.5"
  exec .venv-nox/bin/nox "$@"
fi
install_into_venv test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# Some tests wait for processes of their own: three workers keep two cores busy.
exec .venv/bin/python -m pytest -n 3 "$@"
