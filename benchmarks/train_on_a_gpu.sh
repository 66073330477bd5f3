#!/usr/bin/env bash
# Trainings that need a GPU, in pieces of ten minutes: bash benchmarks/train_on_a_gpu.sh SHARED ROW [OPTION ...]
# SHARED is a folder with weights/ and data/. Options go to the recipe; --max-steps 4 tries a row where there is no GPU.
# Repeat the line until it says "done". Rows:
#   resnet110-SEED   65 % removed, dense network trained for 200 epochs
#   resnet56         65 % removed, 60 epochs from the trained network
#   vgg16-SEED       90 % removed, dense network trained for 200 epochs
#   vit-KEEP         DINOv2's ViT-S/14, fine-tuned on CIFAR-10 for 5 epochs, then 10 with the penalty; KEEP such as 0.5
set -u
shared=${1:?give the folder with weights/ and data/}
row=${2:?give a row: resnet110-SEED, resnet56, vgg16-SEED or vit-KEEP}
shift 2
case $row in
    resnet110-*) recipe=cifar_resnet110 options=(--keep-params 0.35 --epochs 60 --seed "${row#*-}") ;;
    resnet56) recipe=cifar_resnet56 options=(--keep-params 0.35 --epochs 60 --checkpoint "$shared/weights/resnet56_cifar10.safetensors") ;;
    vgg16-*) recipe=cifar_vgg16 options=(--keep-params 0.1 --epochs 60 --seed "${row#*-}") ;;
    vit-*)
        recipe=vit options=(
            --keep-params "${row#*-}" --model vit_small_patch14_dinov2 --no-pretrained --model-kwargs img_size=112 num_classes=10
            --checkpoint "$shared/weights/vit_small_patch14_dinov2_cifar10_112.safetensors"
            --dense-epochs 5 --epochs 10 --batch-size 128 --lr 5e-5 --layer-decay 0.75
        )
        ;;
    *)
        echo "there is no row '$row': give resnet110-SEED, resnet56, vgg16-SEED or vit-KEEP" >&2
        exit 2
        ;;
esac
out=runs/gpu/$row
case " $* " in *" --max-steps "*) out+=-trial ;; esac  # a trial is no row
if [ -e "$out/metrics.json" ]; then
    echo "done: $out"
    exit
fi
# at the end of its time the recipe is told to stop: it saves a checkpoint first
timeout 570 python "recipes/$recipe.py" --data "$shared/data/cifar10" --output "$out" --resume auto \
    --mixed-precision bf16 "${options[@]}" "$@"
code=$?
case $code in
    0) echo "done: $out" ;;
    124) echo "time is up: run the same line again to go on" ;;
    *) exit "$code" ;;
esac
