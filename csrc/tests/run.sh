#!/usr/bin/env bash
# Builds the kernels and the driver with sanitizers, and runs them: run.sh [address | thread]; both by default.
set -euo pipefail
cd "$(dirname "$0")/.."
out=../build/sanitize
mkdir -p "$out"

build_and_run() { # name, sanitizers, threads
  local flags=(-std=c++20 -O1 -g -fno-omit-frame-pointer "-fsanitize=$2" -fno-sanitize-recover=all)
  flags+=(-Wno-psabi) # the real build has the warnings; with sanitizers GCC's own headers raise some
  local objects=() pids=() name set_flags
  for source in kernels_baseline kernels_avx2 kernels_avx512 dispatch tests/driver; do
    set_flags=()
    case "$source" in # as in setup.py
      kernels_avx2) set_flags=(-mavx2 -mfma -mf16c) ;;
      kernels_avx512) set_flags=(-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512) ;;
    esac
    case "$source,$(uname -m)" in
      kernels_avx*,x86_64 | kernels_baseline,* | dispatch,* | tests/*,*) ;;
      *) continue ;;
    esac
    name="$out/$1_$(basename "$source").o"
    "${CXX:-g++}" "${flags[@]}" "${set_flags[@]}" -c "$source.cpp" -o "$name" &
    pids+=($!)
    objects+=("$name")
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  "${CXX:-g++}" "${flags[@]}" "${objects[@]}" -pthread -o "$out/$1"
  echo "== $2 =="
  # The thread sanitizer needs its shadow where the kernel may have put the program; without randomisation it is free.
  if [ "$1" = thread ] && command -v setarch >/dev/null && setarch -R true 2>/dev/null; then
    setarch -R "$out/$1" "$3"
  else
    "$out/$1" "$3"
  fi
}

case "${1:-all}" in
  address) build_and_run address address,undefined 1 ;;
  thread) build_and_run thread thread 4 ;;
  all)
    build_and_run address address,undefined 1
    build_and_run thread thread 4
    ;;
  *)
    echo "expected address, thread or nothing, got $1" >&2
    exit 2
    ;;
esac
