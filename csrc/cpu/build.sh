#!/usr/bin/env bash
# Builds the CPU kernels into one shared library that needs no torch to be built, and serves every version of it.
#   csrc/cpu/build.sh OUTPUT [FLAG...]      flags go to every call of the compiler, $CXX or c++
set -euo pipefail
output=$1
[[ $output = /* ]] || output=$PWD/$output
shift
cd "$(dirname "$0")"
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
# a product and a sum may be one instruction; no other liberties
compiler=${CXX:-c++}  # unquoted: it may be "ccache g++"
flags=(-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wno-psabi -Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized "$@")
isas=default
target=$($compiler "$@" -dumpmachine 2>/dev/null) || target=$(uname -m)  # which need not be this machine
case $target in
  x86_64* | amd64*)
    flags+=(-DFDISTILL_X86)
    isas="default avx2 avx512"
    ;;
esac
wide() {
  case $1 in
    avx2) echo -mavx2 -mfma -mf16c ;;
    avx512) echo -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq ;;
  esac
}
running=()
for isa in $isas; do
  $compiler "${flags[@]}" $(wide "$isa") -DFDISTILL_ISA="isa_$isa" -c row_kernel.cpp -o "$objects/$isa.o" & running+=($!)
done
for file in rows products; do $compiler "${flags[@]}" -c "$file.cpp" -o "$objects/$file.o"; done
for job in "${running[@]}"; do wait "$job"; done
$compiler "${flags[@]}" -shared "$objects"/*.o -o "$output" -pthread -ldl
