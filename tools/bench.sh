#!/usr/bin/env bash
# `make bench`: our build, llama.cpp's tools of the same version, the model, then bench/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/build.sh release inference-core
tools/peers.sh
model=$(tools/fetch-model.sh)
MODEL=${MODEL:-$model} PEERS=$PWD/.bench/llama/bin exec bash bench/run.sh "$@"
