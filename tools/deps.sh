#!/usr/bin/env bash
# Installs what the project needs and only what is missing; says nothing when all is there.
#   tools/deps.sh [build|test|lint|bench|vulkan]...     (default: build; every group includes build)
#   tools/deps.sh --llama-source DIR             (unpacks llama.cpp's pinned source there)
# Debian packages are installed when root, else named. llama.cpp comes as prebuilt libraries from
# npm into .deps/llama (lib/, include/), pinned and checked; the tests' npm packages by `npm ci`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# group  Debian package  command in PATH that serves as well, whoever installed it ("-": none)
packages='
build  gcc                gcc
build  libc6-dev          -
build  make               make
build  cmake              cmake
build  ninja-build        ninja
build  pkg-config         pkg-config
build  git                git
build  ca-certificates    -
build  nodejs             node
build  npm                npm
build  libwebsockets-dev  -
build  libjansson-dev     -
build  libinih-dev        -
build  zlib1g-dev         -
test   libcmocka-dev      -
test   python3            python3
test   python3-websockets -
test   chromium           chromium
test   wrk                wrk
test   systemd            systemd-analyze
lint   clang-format       clang-format
lint   clang-tidy         clang-tidy
lint   shellcheck         shellcheck
bench  g++                g++
bench  curl               curl
bench  python3-torch      -
vulkan libvulkan1         -
vulkan mesa-vulkan-drivers -
'

# npm package  version  sha512 (base64, equal to the registry's "integrity")
llama_libs=(@node-llama-cpp/linux-x64 3.22.1
  5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==)
llama_source=(node-llama-cpp 3.22.1
  bltIipuWmc123H7tMIgDGKSsSrhmhlQYeVUC48XTjVW7XGJJiJJyCdlTMzQ/LiWoPkGDpcL4FviDpgw7qfTiDw==)
# libggml-base.so inside is the same file as above, so its Vulkan back end goes with those libraries.
llama_vulkan=(@node-llama-cpp/linux-x64-vulkan 3.22.1
  bBxqU+JOcBu1nb5Qj2zcMci+JByT1E8EajHvYodyNfVIPkEhXh+/HMwR1/BT7xP08YK0hks+kM8fglER0P8JEg==)
llama_stamp="llama.cpp v0.5.0 from node-llama-cpp 3.22.1, layout 1"

die() {
  echo "deps: $*" >&2
  exit 1
}

# Debian packages of the groups given that are neither installed nor replaced by a command in PATH.
missing_packages() {
  local group package command wanted=()
  while read -r group package command; do
    [[ -n $group && " $* " == *" $group "* ]] || continue
    [[ $command != - ]] && command -v "$command" >/dev/null && continue
    wanted+=("$package")
  done <<<"$packages"
  ((${#wanted[@]})) || return 0
  command -v dpkg-query >/dev/null || die "this is not Debian; install the equivalents of: ${wanted[*]}"
  comm -23 <(printf '%s\n' "${wanted[@]}" | sort) \
    <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${wanted[@]}" 2>/dev/null | sed -n 's/^installed //p' | sort)
}

install_packages() {
  local missing apt=(apt-get -y --no-install-recommends -o DPkg::Lock::Timeout=600)
  missing_packages "$@" >"$scratch/missing"
  mapfile -t missing <"$scratch/missing"
  ((${#missing[@]})) || return 0
  ((EUID == 0)) || die "missing Debian packages; as root: apt-get update && apt-get install --no-install-recommends ${missing[*]}"
  echo "deps: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # An index that is absent or stale shows as a failed install; only then is it fetched.
  "${apt[@]}" -q install "${missing[@]}" >"$scratch/apt.log" 2>&1 && return
  "${apt[@]}" -q update >"$scratch/apt.log" 2>&1 && "${apt[@]}" -q install "${missing[@]}" >>"$scratch/apt.log" 2>&1 && return
  cat "$scratch/apt.log" >&2
  die "apt-get could not install: ${missing[*]}"
}

# npm_fetch NAME VERSION SHA512 DIR: the checked tarball, unpacked as DIR/package. `npm pack` runs no
# install script.
npm_fetch() {
  local name=$1 version=$2 sum=$3 dir=$4 file
  mkdir -p "$dir"
  file=$dir/$(npm pack --silent --pack-destination "$dir" "$name@$version") || die "npm cannot fetch $name@$version"
  sum=$(base64 -d <<<"$sum" | od -An -v -tx1 | tr -d ' \n')
  sha512sum --status -c - <<<"$sum  $file" || die "$name@$version is not the pinned file: SHA-512 differs"
  tar -xzf "$file" -C "$dir"
}

install_llama() {
  [[ -f .deps/llama/STAMP && $(<.deps/llama/STAMP) == "$llama_stamp" ]] && return
  [[ $(uname -sm) == "Linux x86_64" ]] || die "the prebuilt llama.cpp is for Linux on x86-64 only"
  echo "deps: fetching llama.cpp (46 MB)"
  local new=.deps/new.$$ bins package
  rm -rf .deps/new.*
  mkdir -p "$new/llama/lib" "$new/llama/include" "$new/llama/licenses"
  npm_fetch "${llama_libs[@]}" "$new/libs"
  npm_fetch "${llama_source[@]}" "$new/source"

  package=$new/libs/package bins=$package/bins/linux-x64
  # Another backend (libggml-vulkan.so, libggml-cuda.so) of the same version would go beside these.
  cp "$bins"/libllama.v0.5.0.so "$bins"/libggml.v0.5.0.so "$bins"/libggml-base.so "$bins"/libggml-cpu-*.so "$new/llama/lib/"
  cp "$package/LICENSE" "$new/llama/licenses/node-llama-cpp"
  git clone --quiet --bare "$new/source/package/llama/gitRelease.bundle" "$new/git" 2>/dev/null
  git -C "$new/git" archive HEAD include ggml/include LICENSE | tar -x -C "$new"
  cp "$new"/include/* "$new"/ggml/include/* "$new/llama/include/"
  cp "$new/LICENSE" "$new/llama/licenses/llama.cpp"

  echo "$llama_stamp" >"$new/llama/STAMP"
  [[ ! -e .deps/llama ]] || mv .deps/llama "$new/old"
  mv "$new/llama" .deps/llama
  rm -rf "$new"
}

# Into .deps/vulkan/lib: llama.cpp's back ends for the CPU and the one for Vulkan, a folder for --backends. With Debian's
# lavapipe and GGML_VK_VISIBLE_DEVICES=0 that is a GPU in software, slow but real.
install_vulkan() {
  [[ -f .deps/vulkan/STAMP && $(<.deps/vulkan/STAMP) == "$llama_stamp" ]] && return
  echo "deps: fetching llama.cpp's Vulkan back end (24 MB)"
  local new=.deps/new-vulkan.$$
  rm -rf .deps/new-vulkan.*
  npm_fetch "${llama_vulkan[@]}" "$new/npm"
  mkdir -p "$new/vulkan/lib"
  cp "$new"/npm/package/bins/linux-x64-vulkan/libggml-vulkan.so .deps/llama/lib/libggml-cpu-*.so \
    .deps/llama/lib/libggml-base.so "$new/vulkan/lib/"
  cmp -s .deps/llama/lib/libggml-base.so "$new"/npm/package/bins/linux-x64-vulkan/libggml-base.so ||
    die "the Vulkan back end is of another ggml than the libraries"
  echo "$llama_stamp" >"$new/vulkan/STAMP"
  rm -rf .deps/vulkan
  mv "$new/vulkan" .deps/vulkan
  rm -rf "$new"
}

# unpack_llama_source DIR: the whole source of that llama.cpp, for tools/peers.sh.
unpack_llama_source() {
  npm_fetch "${llama_source[@]}" "$scratch/source"
  git clone --quiet --bare "$scratch/source/package/llama/gitRelease.bundle" "$scratch/git" 2>/dev/null
  mkdir -p "$1"
  git -C "$scratch/git" archive HEAD | tar -x -C "$1"
}

install_node_modules() {
  [[ -f tests/package-lock.json ]] || return 0
  local stamp=tests/node_modules/.lock.sha256
  [[ -f $stamp ]] && sha256sum --status -c "$stamp" && return
  echo "deps: fetching the tests' npm packages"
  npm ci --prefix tests --silent --no-audit --no-fund --ignore-scripts || die "npm ci failed in tests/"
  sha256sum tests/package-lock.json >"$stamp"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ ${1-} == --llama-source ]]; then
  unpack_llama_source "$2"
  exit
fi
for group in "$@"; do
  [[ " build test lint bench vulkan " == *" $group "* ]] || die "unknown group '$group' (build, test, lint, bench, vulkan)"
done
groups=(build "$@")
mkdir -p .deps
exec 9>.deps/lock
flock 9 # two at once: the second waits and finds all done

install_packages "${groups[@]}"
install_llama
[[ " ${groups[*]} " != *" test "* ]] || install_node_modules
[[ " ${groups[*]} " != *" vulkan "* ]] || install_vulkan
