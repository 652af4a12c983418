#!/usr/bin/env bash
# The six methods and the controls on three small, really trained models, at a half, a quarter and a tenth of their visual
# tokens: prints the table and leaves a report in runs/demo/. Called by `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# more threads are slower for models this small
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
exec vlmprune eval configs/demo.yaml "$@"
