#!/usr/bin/env bash
# Builds the kernels and their driver without torch, and runs them: run.sh [address | thread | neon], the first two by default.
# What each is for stands in docs/kernel-tests.md.
set -euo pipefail
cd "$(dirname "$0")/.."
out=../build/kernel-tests
mkdir -p "$out"

build() { # name of the program, machine, compiler, flags
  local program="$out/$1" machine="$2" compiler="$3" objects=() pids=() source name set_flags
  shift 3
  for source in kernels_*.cpp dispatch.cpp tests/*.cpp; do
    set_flags=()
    case "$machine,$source" in # as in setup.py
      x86_64,kernels_avx2.cpp) set_flags=(-mavx2 -mfma -mf16c) ;;
      x86_64,kernels_avx512.cpp)
        set_flags=(-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
        ;;
      *,kernels_avx*) continue ;;
    esac
    name="${source//\//_}"
    name="${program}_${name%.cpp}.o"
    "$compiler" -std=c++20 "$@" "${set_flags[@]}" -c "$source" -o "$name" &
    pids+=($!)
    objects+=("$name")
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
  "$compiler" "$@" "${objects[@]}" -pthread -o "$program"
}

sanitize() { # name, sanitizers, threads
  # Without warnings: the real build has them, and with sanitizers GCC's own headers raise some.
  build "$1" "$(uname -m)" "${CXX:-g++}" -O1 -g -fno-omit-frame-pointer "-fsanitize=$2" -fno-sanitize-recover=all -w
  echo "== $2 =="
  # The thread sanitizer needs its shadow where the kernel may have put the program; without randomisation it is free.
  if [ "$1" = thread ] && command -v setarch >/dev/null && setarch -R true 2>/dev/null; then
    setarch -R "$out/$1" "$3"
  else
    "$out/$1" "$3"
  fi
}

neon() {
  local compiler=aarch64-linux-gnu-g++ emulator disassembler=aarch64-linux-gnu-objdump vectors
  if [ "$(uname -m)" = aarch64 ]; then
    compiler="${CXX:-g++}" emulator=env disassembler=objdump
  else
    emulator="$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)"
  fi
  if ! command -v "$compiler" >/dev/null || [ -z "$emulator" ]; then
    echo "neon: skipped, for want of $compiler or qemu-aarch64 (Debian: g++-aarch64-linux-gnu and qemu-user-static)"
    return
  fi
  # As setup.py compiles for users; in one piece, because the emulator has no libraries of that machine.
  build neon aarch64 "$compiler" -O3 -Wall -Wextra -Wno-unused-parameter -static
  vectors=$("$disassembler" -d "$out/neon_kernels_baseline.o" | grep -cE '\sfml[as]\s+v[0-9]+\.(4s|2d)' || true)
  echo "== neon: $vectors fused multiply-adds of vectors in the kernels =="
  [ "$vectors" -gt 0 ]
  "$emulator" "$out/neon" 2
}

case "${1:-all}" in
  address) sanitize address address,undefined 1 ;;
  thread) sanitize thread thread 4 ;;
  neon) neon ;;
  all)
    sanitize address address,undefined 1
    sanitize thread thread 4
    ;;
  *)
    echo "expected address, thread, neon or nothing, got $1" >&2
    exit 2
    ;;
esac
