"""
Trains GPT-2 by local SGD (arXiv 1805.09767), for computers that a slow network joins. Each process
is a worker: it trains all weights on its own rows of the batch. Every merge_every steps the workers
continue from the mean of their weights, or from what an outer optimizer makes of it:

$ torchrun --standalone --nproc_per_node=4 extras/train_local.py config/quickstart.py \
      config/methods/muon.py --sync_bits=2

With AdamW inside and momentum outside this is DiLoCo (2311.08105), and with Muon MuLoCo
(2505.23725). With --lowrank=galolte the matrices train inside a projection, and only their changes
there are sent. The log counts the bytes that a process sends.

Ctrl-C ends a run at the next merge and saves it; --init_from=resume continues it. Each process
writes a checkpoint of its own, so that moments do not travel.
"""
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import configure
from extras.two_bits import TwoBitGaLoLTELinear, two_bit_mean
from galore import LowRankOptimizer
from lowrank import (GaLoLTELinear, lowrank_layers, mean_over_processes, merged_state_dict,
                     replace_linears)
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# run
out_dir = 'out/local'  # ckpt_PROCESS_STEP.pt resumes the run; best.pt and log.jsonl of process 0
init_from = 'scratch'  # or 'resume'
overwrite = False  # True: replace the run that out_dir holds
eval_interval = 250  # steps between evaluations, each of which saves
eval_iters = 50  # batches per evaluation, always the same ones
log_interval = 10
seed = 1337
# workers
merge_every = 10  # steps between merges; all intervals are multiples of it
sync_bits = 32  # per element of what workers send; or 2, with error feedback
outer_lr = 1.0  # of SGD with Nesterov momentum, through which the mean change of the workers goes
outer_momentum = 0.0  # at a merge (DiLoCo); at 1 and 0 a merge averages
# data: a step trains on batch_size * gradient_accumulation_steps sequences, of all workers together
dataset = 'data/cnn_dailymail'  # a folder made by prepare.py
batch_size = 12
gradient_accumulation_steps = 1
block_size = 512
# model
vocab_size = 50304
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
gradient_checkpointing = False  # recompute activations in the backward pass to save memory
# method
lowrank = ''  # '': full rank; 'galolte'
target_modules = 'attn,mlp'  # of Muon and GaLoLTE
rank = 64  # of the projection
update_proj_gap = 200  # steps between projections of a layer
galore_scale = 0.25  # multiplies the learning rate inside a projection
rule = 'adam'  # or 'muon'
# optimizer
learning_rate = 6e-4
final_lr = 0.1  # at the end of the cosine schedule, relative to learning_rate
max_iters = 10000
warmup_iters = 200
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # 0: no clipping
# system
device = 'cuda' if torch.cuda.is_available() else 'cpu'
_is_modern = device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = 'bfloat16' if _is_modern else 'float32'  # of activations, by autocast
compile = _is_modern  # each block by torch.compile
# -----------------------------------------------------------------------------
config = configure(globals())

# processes
process, world = 0, 1
if 'RANK' in os.environ:
    dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    process, world = dist.get_rank(), dist.get_world_size()
    if device == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
assert init_from in ('scratch', 'resume'), f'{init_from=}: set scratch or resume'
assert lowrank in ('', 'galolte') and sync_bits in (2, 32), f'{lowrank=}, {sync_bits=}'
assert batch_size % world == 0, f'{batch_size=} rows cannot be dealt out to {world} workers'
for interval in ('eval_interval', 'log_interval', 'max_iters'):  # between merges weights differ
    assert config[interval] % merge_every == 0, f'make {interval} a multiple of {merge_every=}'
torch.manual_seed(seed)  # all workers begin with the same weights
torch.set_float32_matmul_precision('high')
autocast = torch.autocast(device.split(':')[0], torch.bfloat16, enabled=dtype == 'bfloat16')


class Traffic(TorchDispatchMode):
    """Counts what this process sends inside of `with traffic`, if processes form a ring."""
    # which argument of an operation is sent, and how often a byte of it is
    SENT = {'c10d::allreduce_': (0, 2), 'c10d::broadcast_': (0, 1), 'c10d::alltoall_base_': (1, 1),
            'c10d::allgather_': (1, world)}
    bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == 'c10d':
            index, times = self.SENT[function.name()]
            x = args[index] if torch.is_tensor(args[index]) else args[index][0]
            self.bytes += times * x.nbytes * (world - 1) / world
        return function(*args, **kwargs or {})


traffic = Traffic()

# data: windows of the shards. What a step sees depends on the seed and the step only.
assert Path(dataset, 'meta.json').exists(), f'there is no {dataset}: make it with prepare.py'
meta = json.loads(Path(dataset, 'meta.json').read_text())
assert meta['vocab_size'] <= vocab_size, f"the data has {meta['vocab_size']} kinds of tokens"
shards = {split: [np.memmap(path, np.uint16, 'r')
                  for path in sorted(Path(dataset).glob(f'{split}_*.bin'))]
          for split in ('train', 'val')}
windows = {split: np.cumsum([len(shard) - block_size for shard in shards[split]])
           for split in shards}  # the number of windows in all shards up to each one


def get_batch(split, starts):
    """This worker's inputs and targets (rows, block_size) of the windows that begin at starts."""
    rows = []
    for start in starts[process::world]:
        i = np.searchsorted(windows[split], start, 'right')
        start -= windows[split][i - 1] if i else 0
        rows.append(shards[split][i][start:start + block_size + 1])
    rows = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# model, method, optimizer
model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout,
                      gradient_checkpointing)).to(device)
targets = target_modules.split(',')
if lowrank:
    Linear = TwoBitGaLoLTELinear if sync_bits == 2 else GaLoLTELinear
    replace_linears(model, targets, lambda linear: Linear(
        linear, rank, world, merge_every, outer_lr, outer_momentum))
optimizer = LowRankOptimizer(
    model, learning_rate, (beta1, beta2), weight_decay, rule, targets, galore_scale,
    update_proj_gap, 'sketch', grad_clip, seed)
if compile:
    for block in model.blocks:
        block.compile()

# what all workers have in common are the weights after the last merge, `base`, and the momentum of
# the outer optimizer; GaLoLTE's layers merge by themselves
heads = {layer.B for layer in lowrank_layers(model)}
replicas = [p for p in model.parameters() if p.requires_grad and p not in heads]
base = parameters_to_vector(replicas).detach()  # one vector, so that one message is enough
parts = base.split([p.numel() for p in replicas])
last_merged = {p: part.view_as(p) for p, part in zip(replicas, parts)}
velocity = torch.zeros_like(base) if outer_momentum else None
error = torch.zeros_like(base) if sync_bits == 2 else None  # see two_bits.py


@torch.no_grad()
def merge(decay):
    """Continues from the mean of all workers. decay: what the weights have been multiplied by since
    the last merge. It is no part of the change, or else momentum would repeat it."""
    for group in optimizer.param_groups:
        for p in group['params']:
            if group['weight_decay'] and p in last_merged:
                last_merged[p].mul_(decay)
    change = parameters_to_vector(replicas) - base
    change = two_bit_mean(change, error) if sync_bits == 2 else mean_over_processes(change)
    if outer_momentum:
        velocity.mul_(outer_momentum).add_(change)
        change.add_(velocity, alpha=outer_momentum)
    base.add_(change, alpha=outer_lr)
    for p, x in last_merged.items():
        p.copy_(x)


def checkpoints():
    """{step: path} of this process's checkpoints."""
    paths = Path(out_dir).glob(f'ckpt_{process}_*.pt')
    return {int(path.stem.split('_')[-1]): path for path in paths}


# a resumed run continues exactly
first_step, best, total = 0, math.inf, torch.zeros((), device=device)
if init_from == 'resume':
    # all processes have the checkpoint before the last one until all have the last one
    newest = torch.tensor(max(checkpoints(), default=-1))
    if world > 1:
        dist.all_reduce(newest, dist.ReduceOp.MIN)
    assert newest >= 0, f'{out_dir} has no checkpoint of each of the {world} processes'
    saved = torch.load(checkpoints()[newest.item()], map_location=device)
    assert saved['world'] == world, f"resume with {saved['world']} processes, as before"
    for key in ('dataset', 'block_size', 'lowrank', 'target_modules', 'rank', 'rule', 'merge_every',
                'sync_bits', 'outer_momentum'):
        assert config[key] == saved['config'][key], \
            f"{out_dir} has {key}={saved['config'][key]!r}, and a resumed run cannot change it"
    model.load_state_dict(saved['model'])
    optimizer.load_state_dict(saved['optimizer'])
    base.copy_(parameters_to_vector(replicas))
    for x, y in zip((velocity, error, total), saved['vectors']):
        if x is not None:
            x.copy_(y)
    first_step, best, traffic.bytes = saved['step'], saved['best'], saved['bytes']
    del saved
else:
    assert overwrite or not checkpoints(), \
        f'{out_dir} holds a run: resume it (--init_from=resume), or replace it (--overwrite=True)'
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for path in checkpoints().values():
        path.unlink()
    if process == 0:
        for name in ('best.pt', 'log.jsonl'):
            Path(out_dir, name).unlink(missing_ok=True)


def write(contents, name):
    """Writes a file, whole or not at all."""
    with open(Path(out_dir, f'{name}.tmp'), 'wb') as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(Path(out_dir, f'{name}.tmp'), Path(out_dir, name))


@torch.no_grad()
def save(step, is_best):
    """Call it right after a merge, when all workers have the same weights."""
    tensors = [total, *model.parameters()]
    finite = torch.stack([x.isfinite().all() for x in tensors]).all().float()
    if mean_over_processes(finite) < 1:
        sys.exit(f'the loss or a weight is not finite after step {step}: lower learning_rate')
    if is_best:
        weights = merged_state_dict(model)
        if process == 0:
            write(dict(model=weights, model_config=vars(model.config),
                       tokenizer=meta['tokenizer']), 'best.pt')
    older = checkpoints()
    write(dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
               vectors=(velocity, error, total), bytes=traffic.bytes, step=step, best=best,
               world=world, config=config), f'ckpt_{process}_{step}.pt')
    if world > 1:
        dist.barrier()
    for old_step, path in older.items():
        if old_step != step:
            path.unlink()


@torch.no_grad()
def estimate_loss():
    """The mean loss of eval_iters batches that are spread evenly over the validation split."""
    starts = np.linspace(0, windows['val'][-1] - 1, eval_iters * batch_size).astype(np.int64)
    model.eval()
    with autocast:
        losses = [model(*get_batch('val', some)) for some in starts.reshape(eval_iters, -1)]
    model.train()
    return mean_over_processes(torch.stack(losses).mean()).item()


def get_lr(step):
    """A linear warmup, then a cosine."""
    progress = (step - warmup_iters) / max(max_iters - warmup_iters, 1)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0), 1))  # from 1 to 0
    lr = learning_rate * (final_lr + (1 - final_lr) * cosine)
    return lr * min((step + 1) / (warmup_iters + 1), 1)


def log(**record):
    if process == 0:
        print(*(f'{key} {value:.4g}' for key, value in record.items()), sep=' | ', flush=True)
        with open(Path(out_dir, 'log.jsonl'), 'a') as file:
            file.write(json.dumps(record) + '\n')


# training
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *received: signals.append(received))
step, clock = first_step, time.time()
while True:  # here all workers have the same weights
    # all of them end after the same step; these few bytes are not counted
    news = mean_over_processes(torch.stack([total, total.new_tensor(len(signals))]))
    mean_total, stops = news.tolist()
    if step % log_interval == 0 and step > first_step:
        log(step=step, train_loss=mean_total / log_interval, lr=get_lr(step - 1),
            grad_norm=optimizer.grad_norm.item(), bytes=traffic.bytes,
            ms=1000 * (time.time() - clock) / log_interval)
        total.zero_()
        clock = time.time()
    is_last = stops > 0 or step >= max_iters
    if is_last or step % eval_interval == 0:
        began, is_best = time.time(), False
        if not stops:
            val_loss = estimate_loss()
            log(step=step, val_loss=val_loss)
            is_best = val_loss < best and step > 0
            best = val_loss if is_best else best
        if step > first_step:
            save(step, is_best)
        clock += time.time() - began  # not the time of training
    if is_last:
        break

    decay = 1.0
    for step in range(step, step + merge_every):  # each worker alone
        for group in optimizer.param_groups:
            group['lr'] = get_lr(step)
        decay *= 1 - get_lr(step) * weight_decay
        if dropout:
            torch.manual_seed(seed + step * world + process)  # the same masks after a resume
        for micro_step in range(gradient_accumulation_steps):
            starts = np.random.default_rng((seed, step, micro_step)).integers(
                windows['train'][-1], size=batch_size)
            with autocast:
                loss = model(*get_batch('train', starts)) / gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        with traffic:  # GaLoLTE merges, and sends sketches
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step += 1
    with traffic:
        merge(decay)
if world > 1:
    time.sleep(0.1)  # gloo's threads still free tensors; without a pause a process sometimes hangs
    dist.destroy_process_group()
