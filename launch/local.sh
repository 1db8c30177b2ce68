#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M with RankTuner on this machine, installing everything it needs first.
#
#   ./launch/local.sh                                        the default config
#   ./launch/local.sh --config.optimizer.learning_rate=5e-5  changes a setting
#   ./launch/local.sh --config=my.py --workdir=runs/mine     uses another config and workdir
#   ./launch/local.sh --dry-run ...                          prints the commands only
#
# One process uses all devices of the machine: its NVIDIA GPUs, the TPUs of a single host, or else
# its CPU. Run the same command again to resume an interrupted run, or to print its results.
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

# Each step allocates and frees gigabytes of memory, which is faster with huge pages.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
run exec .venv/bin/ranktuner train \
  --config=smollm2_chain_sum --workdir=runs/smollm2_chain_sum "$@"
