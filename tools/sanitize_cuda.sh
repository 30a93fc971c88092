#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer, on a machine with a GPU:
#     tools/sanitize_cuda.sh [memcheck racecheck initcheck]
# PYTHON is the interpreter (default python), PARTS the parts of tools/cuda_sweep.py (default all). Fails if
# a tool finds an error. Torch's caching allocator is off, so that memory which nobody wrote and accesses
# beyond an allocation are seen. racecheck needs a library that was built for it (csrc/selective_scan/cuda/
# barrier.cuh says why): NVCC_APPEND_FLAGS=-DMAMBA_RACECHECK python -m mamba_ssm build --device cuda
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$PWD
log=$(mktemp)
trap 'rm -f "$log"' EXIT

for tool in "${@:-memcheck racecheck initcheck}"; do
  for name in $tool; do
    # initcheck must see every kernel's writes. racecheck ends in an illegal access, also in a program with
    # torch's kernels alone, where it leaves cuBLAS's kernels out, so it sees them too.
    only=() sweep=(${PARTS:-})
    [ "$name" = memcheck ] && only=(--kernel-name kernel_substring=mamba)
    # It does not see what cuBLAS's 16-bit products write (with bulk copies), and takes every read of that
    # for one of memory that nobody wrote.
    [ "$name" = initcheck ] && sweep+=(--no-products)
    echo "== $name"
    status=0
    compute-sanitizer --tool "$name" "${only[@]}" --error-exitcode 1 --print-limit 200 \
      "${PYTHON:-python}" tools/cuda_sweep.py "${sweep[@]}" >"$log" 2>&1 || status=$?
    # This library's hazards first: cuBLAS's own may be many.
    grep -A 2 "mamba::" "$log" | head -40 || true
    grep -v "^ran " "$log" | tail -40
    # Hazards that cuBLAS's own kernels have are no failure of this library's.
    if [ "$name" = racecheck ] && [ "$status" != 0 ] && ! grep -q "mamba::" "$log" &&
      ! grep -q "returned an error\|Internal Sanitizer Error" "$log"; then
      echo "none of the hazards is in a kernel of this library"
      status=0
    fi
    [ "$status" = 0 ] || exit "$status"
  done
done
