#!/usr/bin/env bash
# Builds the native CPU library with AddressSanitizer and UBSan.
#   tests/fuzz/build_sanitized.sh OUTPUT [SOURCES]     SOURCES: csrc by default, or an altered copy of it
# PYTHON is the one whose torch it is built against. Vector intrinsics by mask are not instrumented, loops of the default
# build are: `make sanitize` runs the fuzzer with both. No UBSan check is left out but two whose reason is not a fault:
#   float-divide-by-zero  1/0 and log 0 are IEEE infinities, which the kernels mean (not in -fsanitize=undefined anyway)
#   vptr                  torch is built without RTTI checks of its own, and its objects come from another library
set -euo pipefail
output=$(realpath -m "$1") sources=$(realpath "${2:-$(dirname "$0")/../../csrc}")
objects=$output.objects
mkdir -p "$objects"

read -r -a torch_flags < <("${PYTHON:-python}" - <<'PYTHON'
import torch.utils.cpp_extension as cpp
print(*(f"-isystem{path}" for path in cpp.include_paths()), *(f"-L{path}" for path in cpp.library_paths()))
PYTHON
)
flags=(-std=c++20 -O1 -g -fPIC -fopenmp -Wno-psabi -fno-omit-frame-pointer "${torch_flags[@]}"
       -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined)
avx2=(-mavx2 -mfma -mf16c)
declare -A isa_flags=([default]="" [avx2]="${avx2[*]}" [avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq ${avx2[*]}")
isas=(default)
if [ "$(uname -m)" = x86_64 ]; then
  flags+=(-DFDISTILL_X86)
  isas+=(avx2 avx512)
fi

compile() { # NAME FLAGS...
  echo "sanitized: $1.cpp"
  "${CXX:-g++}" "${flags[@]}" "${@:2}" -c "$sources/cpu/$1.cpp" -o "$objects/$1.o"
}
commands=()
for isa in "${isas[@]}"; do
  # shellcheck disable=SC2206 # one word a flag
  chosen=(${isa_flags[$isa]})
  compile "row_kernel_$isa" "-DCPU_CAPABILITY=${isa^^}" "-DCPU_CAPABILITY_${isa^^}" "${chosen[@]}" &
  commands+=($!)
  # two compilers at a time: each takes about a gigabyte
  if [ ${#commands[@]} -ge 2 ]; then wait "${commands[0]}"; commands=("${commands[@]:1}"); fi
done
for command in "${commands[@]}"; do wait "$command"; done
compile bindings &
command=$!
compile products
wait "$command"
"${CXX:-g++}" "${flags[@]}" -shared "$objects"/*.o -lc10 -ltorch_cpu -ltorch -o "$output"
