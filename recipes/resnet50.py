"""ResNet-50 on ImageNet-1k, to 40 % of its parameters, without fine-tuning after the cut. Meant for 8 GPUs.

Give the weights of a trained ResNet-50 with --checkpoint, or use timm's with --pretrained. Without either, the recipe
first trains one for 90 epochs. ILSVRC/imagenet-1k requires a Hub login (`hf auth login`). A local copy as parquet files
or class folders works too.
"""

from arp_hub.training import main

if __name__ == "__main__":
    main(
        __doc__,
        model="resnet50",
        data="ILSVRC/imagenet-1k",
        keep_params=0.4,
        dense_epochs=90,
        dense_lr=0.1,
        epochs=30,
        lr=0.01,
        batch_size=256,  # 32 on each of 8 GPUs
        weight_decay=1e-4,
        warmup_epochs=1,
        distill=0.5,
        clip_grad=5.0,
        workers=8,
        checkpoint_every=1000,
    )
