#!/usr/bin/env bash
# All GPU tests and benchmarks in one command, with no network, on the Python that has torch and Triton; see --help.
#   benchmarks/gpu_check.sh [--first] [RESULTS]   on a card
#   benchmarks/gpu_check.sh --dry                 toy shapes on a CPU, to know that all this works
# Peers are measured when they can be imported: put their wheels' folder on PYTHONPATH. FDISTILL_COMMIT names the commit
# of a tree that was copied without its git.
from="$PWD"  # RESULTS is of the caller's folder
cd "$(dirname "$0")/.." && FDISTILL_FROM="$from" PYTHONPATH="$PWD:${PYTHONPATH:-}" exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
