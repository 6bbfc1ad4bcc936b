#!/usr/bin/env bash
# All GPU tests and benchmarks in one command, under 9 minutes, with no network, on the Python that has torch and Triton.
#   benchmarks/gpu_check.sh [RESULTS_FOLDER]     on a card
#   benchmarks/gpu_check.sh --dry                toy shapes in Triton's interpreter, to know that this script works
# Peers are measured when they can be imported: put their wheels' folder on PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}" PYTHON="${PYTHON:-python3}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
out="${1:-benchmarks/results}" dry=()
if [ "${1:-}" = "--dry" ]; then
  export FDISTILL_DRY=1 TRITON_INTERPRET=1
  out="$scratch/results" dry=(--dry)
fi
failed=0
# the CUDA library needs nvcc alone; a dry run emulates its kernels
if [ ${#dry[@]} -eq 0 ] && command -v nvcc >/dev/null; then
  csrc/cuda/build.sh fdistill_kernels/libfdistill_cuda.so || failed=1
fi
"$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider -x --maxfail=20 || failed=1
if [ ${#dry[@]} -eq 0 ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 60 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" -c '
import torch, fdistill_kernels as fk
from fdistill_kernels.backends import BACKENDS
for v in (3001, 20000):  # rows that start anywhere within 16 bytes; a cluster of two
    student, teacher = (torch.randn(270, v, device="cuda").bfloat16() for _ in range(2))
    labels = torch.randint(v, (270,), device="cuda")
    for backend in ("triton", "cuda"):
        if BACKENDS[backend].why_not(student.device, student.dtype, None) is None:
            loss = fk.f_divergence(student.requires_grad_(), teacher, "js", labels=labels, ce_weight=0.1, backend=backend)
            loss.backward()
torch.cuda.synchronize()
' || failed=1
  done
fi
timeout 200 "$PYTHON" -m benchmarks.gpu_rows --out "$out/gpu_rows.json" "${dry[@]}" || failed=1
timeout 180 "$PYTHON" -m benchmarks.gpu_linear --out "$out/gpu_linear.json" "${dry[@]}" || failed=1
[ $failed -eq 0 ] && echo "gpu_check: all passed" || echo "gpu_check: FAILURES above"
exit $failed
