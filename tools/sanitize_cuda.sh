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
for tool in "${@:-memcheck racecheck initcheck}"; do
  for name in $tool; do
    # initcheck must see every kernel's writes; the other tools look at this library's kernels.
    only=(--kernel-name kernel_substring=mamba)
    [ "$name" = initcheck ] && only=()
    echo "== $name"
    compute-sanitizer --tool "$name" "${only[@]}" --error-exitcode 1 --print-limit 20 \
      "${PYTHON:-python}" tools/cuda_sweep.py ${PARTS:-} | grep -v "^ran " | tail -40
  done
done
