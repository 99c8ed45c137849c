#!/bin/sh
# Steps/s of Law M's CPU back end against PyTorch: same weights, same machine, same thread count, one run.
#
#   bench/law.sh BUILD_FOLDER [ROUNDS]        THREADS=2 CASES="64,1 64,16 128,1" PYTHON=/usr/bin/python3
#
# The two take turns, ROUNDS times (default 3), so that a busy moment of the machine hits both; printed is
# the ratio of the medians over rounds, and that of the fastest steps. Ends with 1 where a ratio of
# medians is below 4.
set -eu
build=${1:?usage: bench/law.sh BUILD_FOLDER [ROUNDS]}
rounds=${2:-3}
threads=${THREADS:-$(nproc)}
cases=${CASES:-64,1 64,16 128,1}
python=${PYTHON:-/usr/bin/python3}
here=$(cd "$(dirname "$0")" && pwd)
bench=$build/src/law/cpu/law-cpu-bench
[ -x "$bench" ] || { echo "no $bench: cmake --build $build --target law-cpu-bench" >&2; exit 2; }
"$python" -c 'import torch' 2>/dev/null || { echo "$python has no torch: apt-get install python3-torch" >&2; exit 2; }

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
args=
for c in $cases; do args="$args --case $c"; done
i=0
while [ $i -lt "$rounds" ]; do
  i=$((i + 1))
  echo "== round $i of $rounds: own"
  # shellcheck disable=SC2086
  "$bench" --threads "$threads" --dump "$tmp" $args | tee "$tmp/own.$i"
  echo "== round $i of $rounds: PyTorch"
  # shellcheck disable=SC2086
  "$python" "$here/law_torch.py" --threads "$threads" --dump "$tmp" $args | tee "$tmp/torch.$i"
done

echo "== $threads threads, $rounds rounds: median of the rounds' medians; fastest step of all rounds"
awk -v rounds="$rounds" '
function median(who, c,   n, i, j, v, t) {
  n = count[who, c]
  for (i = 1; i <= n; i++) v[i] = med[who, c, i]
  for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
  return v[int((n + 1) / 2)]
}
$1 == "RESULT" {
  who = FILENAME ~ /own/ ? "own" : "torch"; c = $2 " " $3
  if (!(c in seen)) { seen[c] = 1; order[++cases] = c }
  med[who, c, ++count[who, c]] = $4
  if (!((who, c) in best) || $5 < best[who, c]) best[who, c] = $5
}
END {
  printf "%4s %5s %12s %12s %7s %12s %12s %7s\n", "grid", "batch", "own ms", "torch ms", "ratio", "own best", "torch best", "ratio"
  for (i = 1; i <= cases; i++) {
    c = order[i]; split(c, p, " "); a = median("own", c); b = median("torch", c)
    printf "%4d %5d %12.2f %12.2f %6.1fx %12.2f %12.2f %6.1fx\n", p[1], p[2], a, b, b / a, best["own", c], best["torch", c], best["torch", c] / best["own", c]
    if (b / a < 4) bad = 1
  }
  exit bad
}' "$tmp"/own.* "$tmp"/torch.*
