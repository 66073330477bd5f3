#!/usr/bin/env bash
# Every row that needs a GPU, in ten minutes at most: bash benchmarks/on_a_gpu.sh SHARED
# SHARED is a folder with weights/ and data/. A row that fails or takes two minutes does not stop the others.
set -u
shared=${1:?give the folder with weights/ and data/}
device=${DEVICE:-cuda}  # DEVICE=cpu tries the rows where there is no GPU

row() {
    local left=$((600 - SECONDS))
    if [ "$left" -le 0 ]; then
        echo "== no time left: $*"
        return
    fi
    echo "== $*"
    timeout "$((left < 120 ? left : 120))" python -m "$@" || echo "== failed: $*"
}

row pytest -q tests/planning/test_devices.py tests/test_penalty.py tests/refinement -k "gpu or device"
for model in cifar_resnet110 resnet50 vit_base_patch16_224; do
    row benchmarks.planning.planning_time "$model" --images 1024 --device "$device"
done
row benchmarks.penalty.penalty_cost resnet50 --batch-size 256 --device "$device" --bf16 --alone --seconds 3
row benchmarks.penalty.penalty_cost cifar_resnet20 --batch-size 128 --device "$device" --seconds 2
if [ "$device" = cuda ]; then
    row benchmarks.training.training_step cifar_resnet20 --data "$shared/data/cifar10" --gpu --blocks 4
    row benchmarks.training.training_step cifar_resnet20 --data "$shared/data/cifar10" --gpu --blocks 6 --recorded
    row benchmarks.planning.latency run 'gpu/*/half/*/eager' --again
fi
