#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M with RankTuner on this machine, from an empty one to a table of results.
#
#   ./launch/local.sh                                        the embedded default
#   ./launch/local.sh --config.optimizer.learning_rate=5e-5  with another setting
#   ./launch/local.sh --config=my.py --workdir=runs/mine     another config, another place
#
# Called again, it goes on where it was interrupted, or prints the results it has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

install_into_venv train,eval
exec .venv/bin/ranktuner train \
  --config=smollm2_chain_sum --workdir=runs/smollm2_chain_sum "$@"
