"""Compress any timm model, or one from the Hub or a folder, on any labelled images.

The recipe starts from the weights published under the model's name. If the data has other classes, train a new
classifier first with --dense-epochs:

  python any_backbone.py --model mobilenetv3_small_100 --data my_images --dense-epochs 10 --keep-params 0.6
"""

from arp_hub.training import main

if __name__ == "__main__":
    main(
        __doc__,
        pretrained=True,
        keep_params=0.5,
        epochs=20,
        lr=0.01,
        batch_size=128,
        warmup_epochs=1,
        distill=0.5,
        clip_grad=5.0,
    )
