"""The penalty in your own training loop: plain Accelerate, small images, three lines of arp_hub.

  accelerate launch custom_loop.py

This recipe shows only the loop. The others also resume, distil, fine-tune and read settings from files.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ParseKwargs, distribute_bn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import arp_hub
from arp_hub.hub.load import load_model
from arp_hub.hub.push import check_push
from arp_hub.hub.save import check_folder
from arp_hub.training import evaluate, load_data, note_crop
from arp_hub.training.evaluate import why_not_measured

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="cifar_resnet20", help="timm name (default: %(default)s)")
parser.add_argument("--checkpoint", help="weights of the model; random ones by default")
parser.add_argument(
    "--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="arguments of the model, such as img_size=112"
)
parser.add_argument("--data", default="digits", help="small labelled images, in any form that the other recipes accept")
parser.add_argument("--keep-params", type=float, default=0.5, help="share of the parameters to keep (%(default)s)")
parser.add_argument("--epochs", type=int, default=8, help="epochs of ramp and hold together (%(default)s)")
parser.add_argument("--max-steps", type=int, help="stop after this many steps, for trial runs")
parser.add_argument("--batch-size", type=int, default=64, help="images a step on each process (%(default)s)")
parser.add_argument("--lr", type=float, default=0.05, help="learning rate (%(default)s)")
parser.add_argument("--output", default="runs/custom_loop", help="folder for the finished model (%(default)s)")
parser.add_argument("--push-to-hub", metavar="USER/NAME", help="publish the finished model on the Hub")
parser.add_argument("--seed", type=int, default=0, help="seed of data order and weights (%(default)s)")
parser.add_argument("--cpu", action="store_true", help="run on the CPU; required for several CPU processes")
args = parser.parse_args()

set_seed(args.seed)
accelerator = Accelerator(cpu=args.cpu)
if accelerator.is_main_process:  # refuse a folder of other files, a bad name or token now, not after the training
    check_folder(args.output)
    if args.push_to_hub:
        check_push(args.push_to_hub)
model = load_model(args.model, args.checkpoint, pretrained=False, **args.model_kwargs)
data = load_data(args.data, model)
note_crop(model, data.form)  # saved with the model: how the images of its accuracy are resized
if reason := why_not_measured(model, data.test):
    parser.error(f"model '{args.model}' does not fit data '{args.data}': {reason}")
loader = DataLoader(TensorDataset(*data.train.tensors()), args.batch_size, shuffle=True, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)

plan = arp_hub.make_plan(model, keep_params=args.keep_params)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
steps = min(args.epochs * len(loader), args.max_steps or args.epochs * len(loader))
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, steps)
plain = accelerator.unwrap_model(model)
penalty = arp_hub.AdaptiveRankPenalty(plain, plan, total_steps=steps)  # (1) the penalty of a plan, over all steps

model.train()
batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)
for x, y in tqdm(batches, total=steps, disable=None if accelerator.is_main_process else True):
    loss = F.cross_entropy(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    penalty.step()  # (2) after every optimiser step; exactly low-rank at the end

if accelerator.num_processes > 1:
    distribute_bn(plain, accelerator.num_processes, reduce=True)  # each process has statistics of its own images
before = evaluate(plain, data.test, accelerator=accelerator)
arp_hub.decompose(plain, plan, factors=penalty.factors())  # (3) leaves the outputs unchanged
after = evaluate(plain, data.test, accelerator=accelerator)
accelerator.print(f"top-1 before decomposition {before['top1']:.2f}, after {after['top1']:.2f}")
if accelerator.is_main_process:
    metrics = {**after, "data": args.data, "seed": args.seed}
    arp_hub.save_pretrained(plain, args.output, metrics=metrics, label_names=data.class_names or None)
    if args.push_to_hub:
        arp_hub.push_to_hub(args.output, args.push_to_hub)
model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)  # they hold the process group
accelerator.end_training()
