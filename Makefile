# Short names for hands; the work is done by the scripts in tools/. `make help` lists them.
# Variables: MODEL=/path/to/your.gguf  LAW=/path/to/checkpoint.pth  PORT=3000  ARGS="--more --options"  (for run)
MAKEFLAGS += --no-builtin-rules --no-print-directory
export MODEL LAW PORT ARGS

all: ## install what is missing and build build/inference-core
	@tools/build.sh release inference-core
deps: ## install what is missing for building and testing (names it when not root)
	@tools/deps.sh test
model: ## fetch the default model (TinyLlama chat, 319 MB), once only
	@tools/deps.sh && tools/fetch-model.sh
run: ## build, fetch the model, start the server; on a terminal also show a first answer
	@tools/run.sh
test: ## build and run every test (release, then unit and wire tests with sanitizers)
	@tools/test.sh release asan
test-asan: ## unit and wire tests with the address and undefined-behaviour sanitizers
	@tools/test.sh asan
test-tsan: ## unit and wire tests with the thread sanitizer
	@tools/test.sh tsan
bench: ## measure, beside llama.cpp's own tools (built once, five minutes)
	@tools/bench.sh
format: ## format the C sources in place
	@tools/lint.sh --fix
lint: ## check the format of the C sources and the scripts
	@tools/lint.sh
clean: ## remove what was built; dependencies and models stay
	rm -rf build build-*
distclean: clean ## remove everything that can be fetched or built again
	rm -rf .deps .models .bench tests/node_modules
help:
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 18

.PHONY: all deps model run test test-asan test-tsan bench format lint clean distclean help
