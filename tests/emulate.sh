#!/usr/bin/env bash
# The CUDA kernels for a CPU, by tests/emulation.h.
#   tests/emulate.sh SOURCES OUTPUT
set -euo pipefail
"${CXX:-g++}" -x c++ -std=c++17 -O1 -fPIC -shared -Wall -Werror -Wno-unknown-pragmas -I "$1" -I "$(dirname "$0")" \
  -DFDISTILL_ARCHITECTURES='"emulation"' "$1/cuda/rows.cu" -o "$2.partial"
mv "$2.partial" "$2"
