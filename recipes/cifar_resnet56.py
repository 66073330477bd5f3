"""ResNet-56 on CIFAR-10, to 35 % of its parameters, without fine-tuning after the cut.

Give the weights of a trained ResNet-56 with --checkpoint. Without it, the recipe first trains one.
"""

from arp_hub.training import main

if __name__ == "__main__":
    main(
        __doc__,
        model="cifar_resnet56",
        data="uoft-cs/cifar10",
        keep_params=0.35,
        dense_epochs=200,
        dense_lr=0.1,
        epochs=30,
        lr=0.01,
        batch_size=128,
        weight_decay=1e-4,
        distill=0.9,
        clip_grad=5.0,
    )
