"""The penalty in a training loop of one's own: plain Accelerate, digits, two lines of arp_hub in the loop.

accelerate launch custom_loop.py
"""

import argparse
import itertools

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import arp_hub
from arp_hub.training import calibration_images, evaluate, load_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="cifar_resnet20", help="timm name; its weights are random here")
parser.add_argument("--data", default="digits", help="small labelled images, as the other recipes take them")
parser.add_argument("--keep-params", type=float, default=0.5, help="share of the parameters to keep")
parser.add_argument("--steps", type=int, default=200, help="optimiser steps, ramp and hold together")
parser.add_argument("--batch-size", type=int, default=64, help="images a step on each process")
parser.add_argument("--output", default="runs/custom_loop", help="folder for the finished model")
parser.add_argument("--cpu", action="store_true", help="needed for several CPU processes")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator(cpu=args.cpu)
model = timm.create_model(args.model, num_classes=10)
data = load_data(args.data, model)
images = calibration_images(data, count=len(data.train))
loader = DataLoader(TensorDataset(images, data.train.labels), args.batch_size, shuffle=True, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

plan = arp_hub.make_plan(model, keep_params=args.keep_params)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
plain = accelerator.unwrap_model(model)
penalty = arp_hub.AdaptiveRankPenalty(plain, plan, total_steps=args.steps)  # (1)

model.train()
batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), args.steps)
for x, y in tqdm(batches, total=args.steps, disable=None if accelerator.is_main_process else True):
    loss = F.cross_entropy(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    penalty.step()  # (2) after every optimiser step; exactly low rank at the end

before = evaluate(plain, data.test, accelerator=accelerator)
arp_hub.decompose(plain, plan, factors=penalty.factors())
after = evaluate(plain, data.test, accelerator=accelerator)
accelerator.print(f"top-1 before decomposition {before['top1']:.2f}, after {after['top1']:.2f}")
if accelerator.is_main_process:
    arp_hub.save_pretrained(plain, args.output, metrics={"top1": after["top1"]})
accelerator.end_training()
