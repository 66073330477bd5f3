"""VGG-16 on CIFAR-10, to a tenth of its parameters, without fine-tuning after the cut.

Give the weights of a trained VGG-16 with --checkpoint. Without it, the recipe first trains one.
"""

from arp_hub.training import main

if __name__ == "__main__":
    main(
        __doc__,
        model="cifar_vgg16",
        data="uoft-cs/cifar10",
        keep_params=0.1,
        dense_epochs=200,
        dense_lr=0.05,
        epochs=30,
        lr=0.01,
        batch_size=128,
        weight_decay=5e-4,
        distill=0.9,
        clip_grad=5.0,
    )
