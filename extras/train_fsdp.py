"""
Trains a LLaMA that is larger than one GPU, at full rank by AdamW or Muon, or by GaLore. Each
process holds some rows of each weight and of its moments, and gathers the weights of a block when
it computes (FSDP2, torch.distributed.fsdp.fully_shard):

$ torchrun --standalone --nproc_per_node=4 extras/train_fsdp.py config/llama_1b.py \
      config/methods/galore.py

It trains what train_llama.py trains. Weights, gradients and moments are DTensors, so the optimizer
of galore.py runs on them as it is. GaLore's projections are whole in each process. The checkpoint
is one file, which process 0 writes: the memory of its computer has to hold all weights and moments.

Ctrl-C ends a run after the current step and saves it; --init_from=resume continues it.
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_map

from configurator import configure
from galore import (RULES, LowRankOptimizer, batches_of_one_shape, gather_state, load_state,
                    orthogonal)
from lowrank import (ProjectedLinear, ProjectedProduct, lowrank_layers, mean_over_processes,
                     merged_state_dict, replace_linears)
from model import SIZES, Llama, LlamaConfig

# -----------------------------------------------------------------------------
# run
out_dir = 'out/fsdp'  # ckpt.pt resumes the run, best.pt has the best merged weights, log.jsonl
init_from = 'scratch'  # or 'resume'
overwrite = False  # True: replace the run that out_dir holds
eval_interval = 1000  # steps between evaluations, each of which saves
eval_iters = 50  # batches per evaluation, always the same ones
log_interval = 10
seed = 1337
# data: a step trains on batch_size * gradient_accumulation_steps sequences, for any number of
# processes
dataset = 'data/c4'  # a folder made by prepare.py
batch_size = 128  # sequences per micro-batch, over all processes
gradient_accumulation_steps = 4
block_size = 256
# model
vocab_size = 50304
size = '60m'  # a name in model.SIZES, which sets the next four; '': they count
n_layer = 8
n_head = 8
n_embd = 512
intermediate_size = 1376
gradient_checkpointing = False  # recompute activations in the backward pass to save memory
# method, see config/methods
lowrank = ''  # '': full rank; 'galore'
target_modules = 'attn,mlp'  # 'attn', 'mlp', 'logit' or names of modules, separated by commas
rank = 128  # of the projection
update_proj_gap = 200  # steps between projections of a layer
galore_scale = 0.25  # multiplies the learning rate inside a projection
rule = 'adam'  # or 'muon': for GaLore, or at full rank for the target_modules
# optimizer
learning_rate = 1e-3
final_lr = 0.1  # at the end of the cosine schedule, relative to learning_rate
max_iters = 10000
warmup_iters = 1000
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0  # 0: no clipping
# system
device = 'cuda' if torch.cuda.is_available() else 'cpu'
_is_modern = device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = 'bfloat16' if _is_modern else 'float32'  # of gathered weights, activations
compile = _is_modern  # each block by torch.compile
# -----------------------------------------------------------------------------
config = configure(globals())

# processes
assert 'RANK' in os.environ, 'start this script with torchrun'
dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
process, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device, (world,))
if device == 'cuda':
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
assert init_from in ('scratch', 'resume'), f'{init_from=}: set scratch or resume'
assert lowrank in ('', 'galore'), f'there is no {lowrank=} here'
assert batch_size % world == 0, f'{batch_size=} rows cannot be dealt out to {world} processes'
resumes, checkpoint = init_from == 'resume', Path(out_dir, 'ckpt.pt')
assert resumes or overwrite or not checkpoint.exists(), \
    f'{out_dir} holds a run: resume it (--init_from=resume), or replace it (--overwrite=True)'
torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')

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
    """This process's inputs and targets (rows, block_size) of the windows that begin at starts."""
    rows = []
    for start in starts[process::world]:
        i = np.searchsorted(windows[split], start, 'right')
        start -= windows[split][i - 1] if i else 0
        rows.append(shards[split][i][start:start + block_size + 1])
    rows = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# GaLore and Muon on shards


class WholeZero(torch.autograd.Function):
    """The zero (long, r) of which each process has some rows; nothing is sent for it. Its gradients
    are averaged over processes, and each process gets its rows of the mean."""

    @staticmethod
    def forward(ctx, B):
        return B.to_local().new_zeros(()).expand(B.shape)

    @staticmethod
    def backward(ctx, R):
        return DTensor.from_local(R / world, mesh, [Partial()]).redistribute(placements=[Shard(0)])


class ShardedProjectedLinear(ProjectedLinear):
    """GaLore on rows of W. FSDP2 gathers W and reduces no gradient of it, because it is frozen."""

    def __init__(self, linear, rank):
        super().__init__(linear, rank)
        self.B = None  # FSDP2 has to see no B, see `shard`

    def shard(self):
        """Makes the B that the optimizer sees: a zero DTensor without memory, sharded by rows."""
        most = math.ceil(self.long / world)  # rows in a process; the last ones may have fewer
        rows = max(min(most, self.long - process * most), 0)
        self.B = nn.Parameter(DTensor.from_local(
            self.zeros(rows), mesh, [Shard(0)], shape=(self.long, self.rank),
            stride=(self.rank, 1)))

    def forward(self, x):
        if not torch.is_grad_enabled():
            return self.base(x)
        B = WholeZero.apply(self.B)
        return ProjectedProduct.apply(x, self.weight, self.Q, B, self.Omega, self.Z)


def sharded_muon(gradients, states, group):
    """galore.muon, for rows of matrices. Newton-Schulz iterations need whole matrices, so that each
    process gets some of them, instead of some rows of all."""
    directions = []
    for G, state in zip(gradients, states):
        if 'exp_avg' not in state:
            state['exp_avg'] = torch.zeros_like(G)
        M = state['exp_avg'].lerp_(G, 1 - group['momentum'])
        directions.append(G.lerp(M, group['momentum']))
    X = torch.stack(directions).redistribute(placements=[Shard(0)])  # (matrices, m, n)
    return orthogonal(X).redistribute(placements=[Shard(1)])


RULES['sharded_muon'] = sharded_muon

# -----------------------------------------------------------------------------
# model, method, optimizer
if size:
    n_layer, n_head, n_embd, intermediate_size = SIZES[size]
model_config = LlamaConfig(block_size, vocab_size, n_layer, n_head, n_embd, intermediate_size,
                           gradient_checkpointing)
with torch.device('meta'):  # without memory, because a whole model may not fit
    model = Llama(model_config)
    targets = target_modules.split(',')
    if lowrank:
        replace_linears(model, targets, lambda linear: ShardedProjectedLinear(linear, rank))
precision = MixedPrecisionPolicy()
if dtype == 'bfloat16':
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for module in [*model.blocks, model]:
    if compile and module is not model:
        module.compile()
    fully_shard(module, mesh=mesh, mp_policy=precision)
model.to_empty(device=device)
if not resumes:  # process 0 draws the weights of train_llama.py and sends each process its rows
    start = Llama(model_config).state_dict() if process == 0 else {}
    set_model_state_dict(model, start, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, strict=False))
    del start
for layer in lowrank_layers(model):
    layer.shard()
optimizer = LowRankOptimizer(
    model, learning_rate, (beta1, beta2), weight_decay,
    'sharded_muon' if rule == 'muon' else rule, targets, galore_scale, update_proj_gap, 'sketch',
    grad_clip, seed)
# at least one matrix for each process, whose rows take no more memory than on one device
matrices = {p: 1 for params in optimizer.batches for p in params}
optimizer.batches = [*batches_of_one_shape(matrices, world * 2**24)]


def whole(x):
    """All rows of a tensor, on the CPU, in process 0. All processes take part."""
    if not torch.is_tensor(x):
        return x
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.detach().cpu() if process == 0 else None


def rows_like(x, p):
    """This process's rows of x, if p is a sharded tensor of x's shape."""
    if not isinstance(p, DTensor) or not torch.is_tensor(x) or x.shape != p.shape:
        return x
    return distribute_tensor(x.to(device), mesh, p.placements, src_data_rank=None)


# a resumed run continues exactly
first_step, best = 0, math.inf
if resumes:
    saved = torch.load(checkpoint, map_location='cpu', mmap=True)
    for key in ('dataset', 'block_size', 'lowrank', 'target_modules', 'rank', 'rule'):
        assert config[key] == saved['config'][key], \
            f"{out_dir} has {key}={saved['config'][key]!r}, and a resumed run cannot change it"
    for name, p in model.named_parameters():
        if name in saved['model']:
            saved['model'][name] = rows_like(saved['model'][name], p)
    params = [p for group in optimizer.param_groups for p in group['params']]
    for i, state in saved['optimizer']['state'].items():
        state.update({key: rows_like(x, params[i]) for key, x in state.items()})
    load_state(model, optimizer, saved)
    first_step, best = saved['step'], saved['best']
    del saved, state


def write(contents, name):
    """Writes a file in process 0, whole or not at all."""
    if process == 0:
        with open(Path(out_dir, f'{name}.tmp'), 'wb') as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(Path(out_dir, f'{name}.tmp'), Path(out_dir, name))


@torch.no_grad()
def save(step, is_best):
    tensors = [total, *(p.to_local() for p in model.parameters())]
    finite = torch.stack([x.isfinite().all() for x in tensors]).all().float()
    if mean_over_processes(finite) < 1:
        sys.exit(f'the loss or a weight is not finite after step {step}: lower learning_rate')
    if is_best:
        write(dict(model=tree_map(whole, merged_state_dict(model)),
                   model_config=asdict(model_config), tokenizer=meta['tokenizer']), 'best.pt')
    state = gather_state(model, optimizer)
    for name in [name for name in state['model'] if name.endswith('.B')]:
        del state['model'][name]  # GaLore's zeros, which would get memory
    write(dict(**tree_map(whole, state), step=step, best=best, config=config), 'ckpt.pt')


@torch.no_grad()
def estimate_loss():
    """The mean loss of eval_iters batches that are spread evenly over the validation split."""
    starts = np.linspace(0, windows['val'][-1] - 1, eval_iters * batch_size).astype(np.int64)
    model.eval()
    losses = [model(*get_batch('val', some)) for some in starts.reshape(eval_iters, -1)]
    model.reshard()  # without a backward pass, embedding and head stay whole
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
Path(out_dir).mkdir(parents=True, exist_ok=True)
if not resumes and process == 0:
    for name in ('ckpt.pt', 'best.pt', 'log.jsonl'):
        Path(out_dir, name).unlink(missing_ok=True)
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *received: signals.append(received))
step, total, clock = first_step, torch.zeros((), device=device), time.time()
while True:
    # all processes end after the same step, so they ask each other
    stops = mean_over_processes(torch.tensor(float(len(signals)))) > 0
    is_last = stops or step >= max_iters
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

    for group in optimizer.param_groups:
        group['lr'] = get_lr(step)
    for micro_step in range(gradient_accumulation_steps):
        starts = np.random.default_rng((seed, step, micro_step)).integers(
            windows['train'][-1], size=batch_size)
        loss = model(*get_batch('train', starts)) / gradient_accumulation_steps
        loss.backward()  # each micro-batch sends gradients, because none fits into memory whole
        total += loss.detach()
    with implicit_replication():  # plain tensors beside DTensors are the same in all processes
        optimizer.step()  # clips, updates, and takes new projections
    optimizer.zero_grad(set_to_none=True)
    step += 1
    if step % log_interval == 0:
        log(step=step, train_loss=total.item() / log_interval, lr=get_lr(step - 1),
            grad_norm=optimizer.grad_norm.full_tensor().item(),
            ms=1000 * (time.time() - clock) / log_interval)
        total.zero_()
        clock = time.time()
time.sleep(0.1)  # gloo's threads still free tensors; without a pause a process sometimes hangs
dist.destroy_process_group()
