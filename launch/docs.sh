#!/usr/bin/env bash
# Builds the documentation in build/docs and serves it at http://localhost:8000.
#
#   ./launch/docs.sh                 arguments go to sphinx-build: ./launch/docs.sh --fresh-env
#   ./launch/docs.sh --dry-run ...   prints the commands only
#
# PORT is the port (default: 8000); PORT=0 builds without serving.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi

install_into_venv train,eval,docs
run env JAX_PLATFORMS=cpu .venv/bin/sphinx-build --quiet --fail-on-warning --conf-dir docs \
  --doctree-dir build/doctrees . build/docs "$@"
if [[ ${PORT:=8000} != 0 ]]; then
  [[ -n ${DRY_RUN:-} ]] || echo "http://localhost:$PORT/docs/"
  run exec .venv/bin/python -m http.server --bind localhost --directory build/docs "$PORT"
fi
