#!/bin/sh
# A step in float32, fp16, bf16 and NF4 beside each other on the CPU back end, and what the weights take.
#
#   bench/law_precision.sh BUILD_FOLDER [ROUNDS]     THREADS=1 CASES="64,1 64,16 128,1"
#
# The precisions take turns, ROUNDS times (default 5). Printed per case: the median over rounds of the rounds' median,
# and the least of all, in milliseconds: of CPU time where THREADS is 1 (the default: on a busy machine it is what can be
# compared), else of the clock; and both as a share of float32's.
set -eu
build=${1:?usage: bench/law_precision.sh BUILD_FOLDER [ROUNDS]}
rounds=${2:-5}
threads=${THREADS:-1}
cases=${CASES:-64,1 64,16 128,1}
bench=$build/src/law/cpu/law-cpu-bench
[ -x "$bench" ] || { echo "no $bench: cmake --build $build --target law-cpu-bench" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
i=0
while [ $i -lt "$rounds" ]; do
  i=$((i + 1))
  for p in fp32 fp16 bf16 nf4; do
    for c in $cases; do
      case $c in 64,1) n=60 ;; *) n=9 ;; esac
      "$bench" --threads "$threads" --precision $p --case "$c" --repeat $n |
        awk -v p=$p -v c="$c" -v threads="$threads" '
          /packed weights/ { match($0, /packed weights [0-9.]+/); mib = substr($0, RSTART + 15, RLENGTH - 15) }
          /CPU time/ { median = $3; least = $6; sub(/\)/, "", least) }
          $1 == "RESULT" { if (threads > 1) { median = $4; least = $5 } print c, p, median, least, mib }' >> "$tmp/all"
    done
  done
done
[ "$threads" -gt 1 ] && what="wall clock" || what="CPU time"
echo "$threads thread(s), $rounds rounds; ms of $what a step: median, least; share of fp32's; packed weights, MiB"
for c in $cases; do
  for p in fp32 fp16 bf16 nf4; do
    awk -v c="$c" -v p=$p '$1 == c && $2 == p { print $3, $4, $5 }' "$tmp/all" | sort -n |
      awk -v c="$c" -v p=$p '{ m[NR] = $1; if (NR == 1 || $2 < least) least = $2; mib = $3 }
        END { print c, p, m[int((NR + 1) / 2)], least, mib }'
  done
done | awk '{ if ($2 == "fp32") { a = $3; b = $4 }
  printf "grid,batch %-7s %-5s %9.2f %9.2f   %5.2f %5.2f   %6.2f\n", $1, $2, $3, $4, $3 / a, $4 / b, $5 }'
