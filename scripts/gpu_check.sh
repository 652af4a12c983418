#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes: kernels without a toolkit, the trial of this device,
# compute-sanitizer where there is one, kernels against the plain implementations, bandwidth, CUDA graphs, greedy selection, host syncs, bench cells, profiles, tests. Prints one table last and leaves in OUT
# kernels.json, profile.json, table.json, three bench-*.json and logs.tgz.
#
#   scripts/gpu_check.sh [OUT]          on a machine with a CUDA GPU (OUT: gpu-check)
#   scripts/gpu_check.sh --cpu [OUT]    a dry run of the same steps on small sizes
#
# Nothing is installed: the checkout is put on the path, and with it any wheels in .whl/ (a transformers that the
# machine lacks). PYTHON names the interpreter (python3), with torch, triton, pytest and pytest-xdist.
set -uo pipefail
start=0 # of SECONDS: what comes before the first step counts too
LIMIT=540
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
logs="$site/logs"
trap 'tar -czf "$out/logs.tgz" -C "$site" logs; rm -rf "$site"' EXIT
mkdir "$site/vlmprune" "$logs"
ln -s "$PWD"/vlmprune/* "$PWD/patches" "$PWD/eval" "$site/vlmprune/"
for wheel in .whl/*.whl; do
  [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export XDG_CACHE_HOME="$site/cache" # a verdict of another day would skip the trial
# for Triton and compute-sanitizer; the parts no_toolkit and trial run without
if [ -d "${CUDA_HOME:=/usr/local/cuda}" ]; then
  export CUDA_HOME LD_LIBRARY_PATH="$CUDA_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi

# step NAME SECONDS COMMAND...: output goes to a file, and a failure does not end the rest
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  local left=$((LIMIT - (SECONDS - start)))
  ((limit < left)) || limit=$left
  if ((limit > 0)); then
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null || status=$?
  else
    status=124
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" >>"$logs/steps.tsv"
  echo "$name: exit $status after $((SECONDS - begin)) s"
}

bench() {
  local name=$1 limit=$2
  shift 2
  rm -f "$out/$name.json" # results of another day, which bench does not overwrite
  step "$name" "$limit" "$python" -P -m vlmprune bench --device "$device" "$@" --json "$out/$name.json"
}

part() {
  step "$1" "$2" "$python" -P scripts/gpu_check.py "$1" --device "$device" --json "$out/$1.json"
}

# whether kernels run at all, and right, comes first; then what the targets are about; what tests can say last
bare() {
  step "$1" "$2" env -u CUDA_HOME -u CUDA_PATH -u LD_LIBRARY_PATH PATH=/usr/bin:/bin "$python" -P scripts/gpu_check.py "$1" \
    --device "$device" --json "$out/$1.json"
}
python="$(command -v "$python")"
bare no_toolkit 60
bare trial 200
sanitizer="$(command -v compute-sanitizer || true)"
for tool in memcheck racecheck; do
  if [ "$device" = cuda ] && [ -n "$sanitizer" ]; then
    step "$tool" 60 env -u CUDA_HOME "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -P scripts/gpu_check.py sanitize \
      --device cuda --json "$out/$tool.json"
  fi
done
part kernels 180
if [ "$device" = cuda ]; then
  next="--shape llava-next-7b --dtype bfloat16 --keep 320,160 --new-tokens 16"
  # shellcheck disable=SC2086
  bench bench-next-b1 110 $next --method fopru,todre,fastv --batch 1
  # shellcheck disable=SC2086
  bench bench-next-b8 130 $next --method fopru,todre --batch 8
  bench bench-1.5 90 --shape llava-1.5-7b --dtype bfloat16 --method fopru,random --keep 64 --batch 1,8 --new-tokens 16
  part profile 60
  step bool 30 "$python" -P -m pytest -q -p no:cacheprovider tests/kernels/test_select_gather.py -k bool
  step tests 120 "$python" -P -m pytest -q -p no:cacheprovider -n 12 tests/kernels tests/engine/test_syncs.py \
    tests/engine/test_hooks_and_prefill.py tests/verify/test_check.py::test_on_a_gpu tests/features/test_caches.py::test_an_offloaded_cache \
    --deselect tests/kernels/test_compile.py
  step check 60 "$python" -P -m vlmprune check --device "$device" --dtype float32
else
  bench bench-scene 150 --shape scene-llava --method fopru,random --keep 16 --batch 1,2 --quick
  part profile 60
  step tests 150 "$python" -P -m pytest -q -p no:cacheprovider -n 2 tests/kernels/test_merge.py
  step check 60 "$python" -P -m vlmprune check --device "$device" --dtype float32
fi
"$python" -P scripts/gpu_table.py "$out" --steps "$logs/steps.tsv"
