#!/usr/bin/env bash
# All benchmarks, one after the other: text beside llama.cpp's tools, laws beside PyTorch, laws served. Called by
# `make bench` (tools/bench.sh), which has built and fetched what they need. Goes on when one misses its bar; ends with 1 then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
build=${BUILD:-build}
failed=0
cmake --build "$build" --target text-bench law-serve-bench law-cpu-bench >/dev/null || exit 1
bash bench/text.sh "$@" || failed=1
if /usr/bin/python3 -c 'import torch' 2>/dev/null; then
  bash bench/law.sh "$build" || failed=1
else
  echo "bench: laws beside PyTorch: skipped, /usr/bin/python3 has no torch (Debian: python3-torch)"
fi
bash bench/law_serve.sh "$build" || failed=1
exit "$failed"
