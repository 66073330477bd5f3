"""Models that arp_hub registers with timm: CIFAR networks, and ``arp_lowrank``, which rebuilds decomposed backbones."""

from .cifar_resnet import CifarResNet
from .cifar_vgg import CifarVgg
from .lowrank import arp_lowrank

__all__ = ["CifarResNet", "CifarVgg", "arp_lowrank"]
