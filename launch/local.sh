#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M with RankTuner on this machine, from an empty one to a table of results.
#
#   ./launch/local.sh                                        the embedded default
#   ./launch/local.sh --config.optimizer.learning_rate=5e-5  with another setting
#   ./launch/local.sh --config=my.py --workdir=runs/mine     another config, another place
#   ./launch/local.sh --dry-run ...                          only prints the commands
#
# One process uses all that the machine has: its NVIDIA GPUs, the TPUs of a single host, or else
# its CPU. Called again, it goes on where it was interrupted, or prints the results it has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi

extras=train,eval
if nvidia-smi --list-gpus &>/dev/null; then
  extras+=,cuda
elif compgen -G '/dev/accel*' >/dev/null || [[ -e /dev/vfio/0 ]]; then
  extras+=,tpu
fi
install_into_venv "$extras"

# A step takes gigabytes of fresh memory and gives them back: in large pages that costs less.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
run exec .venv/bin/ranktuner train \
  --config=smollm2_chain_sum --workdir=runs/smollm2_chain_sum "$@"
