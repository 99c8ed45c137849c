#!/usr/bin/env bash
# Builds llama.cpp's own tools, the peers that the benchmarks compare with, into .bench/llama/bin.
# Once only; about five minutes on two cores.
#
# The tools (server, bench, ...) are compiled here from the pinned source, but they load the very
# libllama, libggml and CPU kernels that inference-core loads, byte for byte. What a comparison
# then shows is the server around the engine, never two compilers or two sets of flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=(llama-bench llama-batched-bench llama-server llama-completion llama-simple llama-quantize llama-tokenize)
jobs=${JOBS:-2}
dest=.bench/llama

tools/deps.sh bench
stamp="$(<.deps/llama/STAMP); tools ${tools[*]}; build 1"
[[ -f $dest/STAMP && $(<"$dest/STAMP") == "$stamp" ]] && exit
mkdir -p "$dest"
exec 9>"$dest/lock"
flock 9
[[ -f $dest/STAMP && $(<"$dest/STAMP") == "$stamp" ]] && exit

echo "peers: building ${tools[*]}"
lib=$PWD/.deps/llama/lib
rm -rf "${dest:?}"/{source,build,new}
mkdir -p "$dest/new"
tools/deps.sh --llama-source "$dest/source"

# In place of the engine's sources: targets of the same names that stand for the prebuilt libraries.
cat >"$dest/source/ggml/CMakeLists.txt" <<STUB
add_library(ggml-base INTERFACE)
target_include_directories(ggml-base INTERFACE \${CMAKE_CURRENT_SOURCE_DIR}/include)
target_link_directories(ggml-base INTERFACE $lib)
target_link_libraries(ggml-base INTERFACE -l:libggml-base.so)
add_library(ggml INTERFACE)
target_link_libraries(ggml INTERFACE -l:libggml.v0.5.0.so ggml-base)
STUB
cat >"$dest/source/src/CMakeLists.txt" <<STUB
add_library(llama INTERFACE)
target_include_directories(llama INTERFACE \${CMAKE_CURRENT_SOURCE_DIR} \${CMAKE_CURRENT_SOURCE_DIR}/../include)
target_link_libraries(llama INTERFACE -l:libllama.v0.5.0.so ggml)
STUB

log=$dest/build.log
if ! {
  # Nothing may be fetched: no web UI, no HTTPS. The tools find the libraries beside themselves.
  # (GIT_DIR: else the tools would give our own commit as theirs.)
  GIT_DIR=/nonexistent cmake -S "$dest/source" -B "$dest/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_IS_DEV=OFF \
    -DCMAKE_BUILD_RPATH="\$ORIGIN" -DBUILD_SHARED_LIBS=OFF -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_APP=OFF &&
  nice -n 19 cmake --build "$dest/build" -j "$jobs" --target "${tools[@]}"
} >"$log" 2>&1; then
  tail -n 30 "$log" >&2
  echo "peers: the build failed, see $log" >&2
  exit 1
fi
cp "${tools[@]/#/$dest/build/bin/}" "$lib"/*.so "$dest/new/"
strip "${tools[@]/#/$dest/new/}"
rm -rf "${dest:?}"/{source,build,bin,STAMP}
mv "$dest/new" "$dest/bin"
echo "$stamp" >"$dest/STAMP"
echo "peers: built in ${SECONDS} s, in $dest/bin"
