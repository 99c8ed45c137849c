#!/usr/bin/env bash
# Installs what is missing and builds one preset of CMakePresets.json; quiet when nothing is to do.
#   tools/build.sh release|dev|asan|tsan [TARGET]   (into build/ for release, else build-PRESET/)
# Without a target everything is built, the tests too, which need `tools/deps.sh test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=${1:-release} target=${2:-all}
dir=build-$preset
[[ $preset != release ]] || dir=build

tools/deps.sh
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Configured each time (half a second), so that a changed preset or a new file always counts.
cmake --preset "$preset" >"$log" 2>&1 || {
  cat "$log" >&2
  exit 1
}
grep -q '^ninja: no work to do' <(ninja -C "$dir" -n "$target" 2>&1) ||
  cmake --build "$dir" -j "${JOBS:-$(nproc)}" --target "$target"
