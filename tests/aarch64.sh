#!/usr/bin/env bash
# What is committed, on an aarch64 that QEMU emulates: `fdistill verify` and the CPU kernels' tests; fifteen minutes.
#   tests/aarch64.sh    as root on Debian, with debootstrap, qemu-user-static, g++-aarch64-linux-gnu, pip and Python 3.11
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/aarch64
mkdir -p "$root"
if [[ ! -e $root/usr/bin/python3.11 ]]; then  # the packages unpacked, none configured
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 bookworm "$root"
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$root"; done
fi
into=(--quiet --target "$root/site" --python-version 3.11 --only-binary :all:)
into+=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64)
if [[ ! -e $root/site/torch ]]; then  # without what pip, on this machine, thinks that torch needs
  python3 -m pip install "${into[@]}" numpy pytest hypothesis xxhash safetensors jinja2 networkx sympy typing-extensions
  python3 -m pip install "${into[@]}" --no-deps torch==2.10.0 triton==3.6.0 filelock fsspec
fi
# the compiler under the names that builds and tests call it by
mkdir -p "$root/cross"
ln -sf "$(command -v aarch64-linux-gnu-g++)" "$root/cross/c++"
export PATH=$root/cross:$PATH CXX=c++ OMP_NUM_THREADS=1 PYTHONPATH=$root/tree:$root/site
rm -rf "$root/tree" && mkdir "$root/tree"
git archive HEAD | tar -x -C "$root/tree"
cd "$root/tree"
bash csrc/cpu/build.sh "$PWD/fdistill_kernels/libfdistill_cpu.so"
emulated() { qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11" "$@"; }
emulated -c "import sys; from fdistill_kernels.cli import main; sys.argv[1:] = ['verify']; main()"
emulated -m pytest -q -p no:cacheprovider -k "(cpu or vector) and not (compile or cuda or triton)" \
  tests/test_{vector,divergences,functional,contract,sparse,linear,precision}.py
