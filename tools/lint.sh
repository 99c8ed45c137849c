#!/usr/bin/env bash
# Checks the form of C sources (clang-format) and scripts (shellcheck, node); --fix formats the C.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/deps.sh lint
mapfile -t c < <(git ls-files --cached --others --exclude-standard '*.c' '*.h' '*.cu' '*.cuh')
if [[ ${1-} == --fix ]]; then
  clang-format -i "${c[@]}"
  exit
fi
mapfile -t sh < <(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)
status=0
clang-format --dry-run -Werror "${c[@]}" || status=1
shellcheck "${sh[@]}" || status=1
for file in tools/npm-get.cjs tools/soak/*.mjs; do node --check "$file" || status=1; done
exit "$status"
