"""ViT-B/16 on ImageNet-1k, to half of its parameters, without fine-tuning after the cut. Meant for 8 GPUs.

The recipe starts from the weights of DeiT III that timm publishes. Use --checkpoint for other weights, or --model for
another transformer. ILSVRC/imagenet-1k requires a Hub login (`hf auth login`). A local copy as parquet files or class
folders works too. configs/deit3.yaml adds the regularisation of DeiT III.
"""

from arp_hub.training import main

if __name__ == "__main__":
    main(
        __doc__,
        model="deit3_base_patch16_224.fb_in1k",
        pretrained=True,
        data="ILSVRC/imagenet-1k",
        keep_params=0.5,
        epochs=20,
        optimizer="adamw",
        lr=1e-4,
        batch_size=512,  # 64 on each of 8 GPUs
        weight_decay=0.1,
        warmup_epochs=1,
        distill=0.5,
        clip_grad=1.0,
        workers=8,
        checkpoint_every=1000,
    )
