#!/usr/bin/env bash
# Builds the presets given and runs their tests: every test for release, unit and wire tests for the
# sanitizers (the model is too slow there). Ends with the line "N passed, N failed, N skipped".
#   tools/test.sh [release] [asan] [tsan]        CTEST_ARGS="-R name" narrows the choice
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra ctest_args <<<"${CTEST_ARGS:-}"
passed=0 failed=0 skipped=0

# count JUNIT-FILE EXIT-CODE: adds the suite's figures. What ctest reports in no other way (no test
# found, a program that was not built) still counts as a failure.
count() {
  local suite tests=0 failures=0 left_out=0
  suite=$(grep -m1 -A8 '<testsuite' "$1" 2>/dev/null || true)
  attribute() { sed -n "s/.*[[:space:]]$1=\"\([0-9]*\)\".*/\1/p" <<<"$suite" | head -n 1; }
  if [[ -n $suite ]]; then
    tests=$(attribute tests) failures=$(attribute failures)
    left_out=$(($(attribute skipped) + $(attribute disabled)))
  fi
  ((tests >= failures + left_out)) || left_out=$((tests - failures))
  if (($2 != 0 && failures == 0)); then
    failed=$((failed + 1))
  fi
  passed=$((passed + tests - failures - left_out))
  failed=$((failed + failures))
  skipped=$((skipped + left_out))
}

run_preset() {
  local preset=$1 dir=build-$1 code=0 start=$SECONDS labels=(-L 'unit|wire')
  if [[ $preset == release ]]; then
    dir=build labels=()
  fi
  echo "test: $preset"
  tools/build.sh "$preset" || code=$?
  echo "test: $preset built after $((SECONDS - start)) s"
  rm -f "$dir/junit.xml"
  if ((code == 0)); then
    ctest --test-dir "$dir" --output-on-failure --no-tests=error -j "${TEST_JOBS:-$(nproc)}" \
      --output-junit junit.xml "${labels[@]}" "${ctest_args[@]}" || code=$?
  fi
  count "$dir/junit.xml" "$code"
  echo "test: $preset took $((SECONDS - start)) s"
}

tools/deps.sh test
if [[ " $* " == *" release "* ]]; then
  IC_TEST_MODEL=$(tools/fetch-model.sh)
  export IC_TEST_MODEL
fi
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=suppressions=$PWD/tools/tsan.supp
for preset in "$@"; do
  run_preset "$preset"
done
echo
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
