#!/usr/bin/env bash
# Two small, really trained models answer questions about shipped pictures with all, a quarter and a tenth of their
# visual tokens. Prints one table and leaves pictures of what was kept in demo-out/. Called by `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# more threads are slower for models this small
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
exec vlmprune demo --out demo-out "$@"
