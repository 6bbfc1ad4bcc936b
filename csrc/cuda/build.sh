#!/usr/bin/env bash
# Builds the CUDA row kernels into one shared library that needs neither a GPU nor torch, here or where it is loaded.
#   csrc/cuda/build.sh OUTPUT
set -euo pipefail
nvcc="${NVCC:-nvcc}"
# on every processor, where this nvcc can: it makes the same code
split=
[[ $("$nvcc" --help) == *--split-compile* ]] && split=--split-compile=0
# --use_fast_math: exp and log are one instruction each, and denormals are 0, as in the Triton backend
exec "$nvcc" $split -std=c++17 -O3 --use_fast_math -gencode arch=compute_90a,code=sm_90a -Xptxas --warn-on-spills \
  -DFDISTILL_ARCHITECTURES='"sm_90a"' -Xcompiler -fPIC -shared -cudart static "$(dirname "$0")/rows.cu" -o "$1"
