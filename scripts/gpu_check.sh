#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes: tests, kernels against the plain implementations,
# bandwidth, greedy selection, host syncs, bench cells. Prints one table last and leaves JSON in OUT.
#
#   scripts/gpu_check.sh [OUT]          on a machine with a CUDA GPU (OUT: gpu-check)
#   scripts/gpu_check.sh --cpu [OUT]    a dry run of the same steps on small sizes
#
# Nothing is installed: the checkout is put on the path, and with it any wheels in .whl/ (a transformers that the
# machine lacks). PYTHON names the interpreter (python3), with torch, triton and pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=cuda
if [ "${1:-}" = --cpu ]; then
  device=cpu
  shift
fi
out="$(realpath -m "${1:-gpu-check}")"
python="${PYTHON:-python3}"
[[ "$python" = */* ]] && python="$(realpath -s "$python")"
mkdir -p "$out"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
mkdir "$site/vlmprune"
ln -s "$PWD"/vlmprune/* "$PWD/patches" "$PWD/eval" "$site/vlmprune/"
for wheel in .whl/*.whl; do
  [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
start=$SECONDS
: >"$out/steps.tsv"

# step NAME SECONDS COMMAND...: output goes to a file, and a failure does not end the rest
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  local left=$((580 - (SECONDS - start)))
  ((limit < left)) || limit=$left
  if ((limit > 0)); then
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
  else
    status=124
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" >>"$out/steps.tsv"
  echo "$name: exit $status after $((SECONDS - begin)) s"
}

bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -P -m vlmprune bench --device "$device" "$@" --json "$out/$name.json"
}

step kernels 150 "$python" -P scripts/gpu_check.py kernels --device "$device" --json "$out/kernels.json"
step check 60 "$python" -P -m vlmprune check --device "$device" --dtype float32
if [ "$device" = cuda ]; then
  step tests 150 "$python" -P -m pytest -q -p no:cacheprovider tests/kernels tests/test_engine_syncs.py tests/test_engine.py
  next="--shape llava-next-7b --dtype bfloat16 --method fopru,todre --new-tokens 16"
  # shellcheck disable=SC2086
  bench bench-next-b1 110 $next --keep 320,160 --batch 1
  # shellcheck disable=SC2086
  bench bench-next-b8 150 $next --keep 320 --batch 8
  bench bench-1.5 100 --shape llava-1.5-7b --dtype bfloat16 --method fopru,random --keep 64 --batch 1,8 --new-tokens 16
else
  step tests 150 "$python" -P -m pytest -q -p no:cacheprovider tests/kernels/test_merge.py
  bench bench-scene 150 --shape scene-llava --method fopru,random --keep 16 --batch 1,2 --quick
fi
"$python" -P scripts/gpu_check.py table "$out"
