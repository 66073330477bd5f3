"""A complete run of arp_hub in three minutes, without a download.

It trains a small CIFAR-style ResNet on scikit-learn's 8x8 digits, compresses it to 35 % of its parameters with the
penalty, saves it, and loads it through timm.
"""

import timm
from accelerate import PartialState

import arp_hub
from arp_hub.layers.model import count_params
from arp_hub.training import evaluate, load_data, main

if __name__ == "__main__":
    metrics = main(
        __doc__,
        model="cifar_resnet20",
        data="digits",
        keep_params=0.35,
        dense_epochs=8,
        epochs=6,
        lr=0.05,
        dense_lr=0.1,
        batch_size=128,
        calibration_images=256,
        calibration_copies=0,
        output="runs/quickstart",
    )
    if PartialState().is_main_process:
        config = metrics["config"]
        folder = config["output"]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)  # needs only `import arp_hub`
        keys = ("image_key", "label_key", "streaming", "epoch_images", "data_dir", "train_split", "test_split")
        again = evaluate(model, load_data(config["data"], model, **{key: config[key] for key in keys}).test)
        before, after = metrics["dense"]["params"], count_params(model)
        print(f"{folder}, reloaded through timm with arp_hub {arp_hub.__version__}:")
        print(f"  parameters {before:,} -> {after:,} ({100 * after / before:.1f} %)")
        print(f"  top-1 on {again['images']} test images {metrics['dense']['top1']:.2f} -> {again['top1']:.2f}")
