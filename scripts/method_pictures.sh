#!/usr/bin/env bash
# Draws what every method keeps of one shipped picture, for docs/methods/. Called by `make pictures`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

draw() { # model, method, further options
  vlmprune run --model "$1" --image eval/testbed/pictures/scene3.png --prompt "which digit is the top right object ?" \
    --method "$2" --save "docs/methods/$2.png" "${@:3}"
}

for method in fopru vtc_cls flowcut vispruner fastervlm hiprune holov vscan prumerge prumerge_plus divprune scope prunesid mmtok \
  visionzip todre transprune fastv pyramiddrop sparsevlm dart v2drop vflowopt zero_tprune m3 tcc showui catp random grid \
  pool; do
  draw scene-llava "$method" --keep 0.25,0.1
done
draw scene-llava cdpruner --option relevance=embeddings --keep 0.25,0.1
# ToMe merges equally many in each of four layers, at most half of what is there
for method in tome pitome; do draw scene-llava "$method" --keep 0.5,0.25; done
for method in globalcom2 lrs; do draw scene-llava-next "$method" --keep 0.25,0.1; done
draw scene-llava atp --option weights=atp-scene-llava
