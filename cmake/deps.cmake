# Libraries: Debian's through pkg-config, llama.cpp from .deps (tools/deps.sh fetches it, pinned).
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(LWS REQUIRED IMPORTED_TARGET libwebsockets)
pkg_check_modules(INIH REQUIRED IMPORTED_TARGET inih)
pkg_check_modules(ZLIB REQUIRED IMPORTED_TARGET zlib)

set(IC_LLAMA_DIR "${CMAKE_SOURCE_DIR}/.deps/llama" CACHE PATH "llama.cpp: include/ and lib/")
set(IC_LLAMA_LIB "${IC_LLAMA_DIR}/lib")
if(NOT EXISTS "${IC_LLAMA_DIR}/include/llama.h")
  message(FATAL_ERROR "llama.cpp is not in ${IC_LLAMA_DIR}: run `make deps` first")
endif()
add_library(llama INTERFACE)
target_include_directories(llama SYSTEM INTERFACE "${IC_LLAMA_DIR}/include")
target_link_directories(llama INTERFACE "${IC_LLAMA_LIB}")
set(CMAKE_BUILD_RPATH "${IC_LLAMA_LIB}") # not a link option: that would be installed as well
target_link_libraries(llama INTERFACE -l:libllama.v0.5.0.so -l:libggml.v0.5.0.so -l:libggml-base.so)
