"""
Trains GPT-2 with full-rank weights, or by a method of config/methods. On one process or on several:

$ python train_gpt.py config/quickstart.py config/methods/mhlora.py
$ python train_gpt.py config/gpt2.py config/methods/lte.py --batch_size=8
$ TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \\
      train_gpt.py config/gpt2.py config/methods/lte.py
The variable gives a stopped run time to end its step and save (else, and before torch 2.13, it is
killed after 30 s).
On two nodes run the same line on both, with --nnodes=2 --rdzv_backend=c10d
--rdzv_endpoint=HOST:PORT in place of --standalone.
"""

import functools
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
# settings: GPT-2 124M on CNN/DailyMail, full rank
# run
out_dir = 'out/gpt2'  # checkpoints, log.jsonl, config.json
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume where there is a checkpoint, else
#                       scratch), a transformers folder, a hub name ('gpt2'), a .pt of nanoGPT or
#                       ours
overwrite = False  # True: replace a run that out_dir already holds
eval_interval = 250  # steps between evaluations; each writes a checkpoint
eval_iters = 50  # batches of an evaluation, always the same ones
eval_only = False  # evaluate once and stop
log_interval = 10  # steps between lines of the log
seed = 1337
# data: a step trains batch_size * gradient_accumulation_steps sequences, on any number of ranks
dataset = 'cnn_dailymail'  # a folder in data_dir, made by prepare.py
data_dir = 'data'
documents = None  # True: they do not see each other, and rows hold whole ones; None: where data
#                   have prompts
batch_size = 12  # sequences of a micro-batch, over all ranks
gradient_accumulation_steps = 1  # micro-batches of a step
block_size = 512  # tokens of a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = True  # biases in linears and norms
vocab_size = None  # None: that of the data. With gpt2's 50257 tokens 50304, a multiple of 64, is
#                    faster on GPUs (nanoGPT)
checkpointing = False  # recompute activations in the backward pass: less memory, more time
# low-rank layers: config/methods has a file for each method
lowrank = ''  # '' (full rank) or a comma list of 'attn', 'mlp', 'logit' or names of modules
heads = 1  # low-rank heads of a layer
rank = 8  # of each head, or of GaLore's basis
alpha = 8.0  # heads are averaged, and scaled by alpha / rank (in a basis by 1)
lora_dropout = 0.0  # share of a layer's input that heads do not see in a step
factors = 'both'  # 'both' A and B train; 'B' alone (LoRA-FA); 'basis': one of them is a basis of
#                   the gradient, the other trains (GaLore)
split = False  # True: every head sees its own part of the batch only (LTE)
train = 'auto'  # 'all'; 'factors': the heads alone; 'auto': 'factors' for heads on loaded weights,
#                 else 'all'
merge_every = 0  # steps between merges into the frozen weight, 0: never; 1 in a basis: GaLore
merge_reset = False  # after a merge draw new heads (ReLoRA) instead of training the old on (LTE)
rewarm_iters = 0  # steps in which the learning rate climbs again after a merge that resets
frozen_bits = None  # 4: loaded weights of attention and MLP in nf4 (QLoRA), beside heads that are
#                     never merged; None: as param_dtype
param_bits = None  # 8: weights that train in a basis as integers, a scale for each 128; None: as
#                    param_dtype
sync = 'step'  # ranks average what has no heads at every 'step', or, as LTE, at a 'merge' alone
sync_moments = True  # at merges in a basis average first moments, too; False: fewer bytes
sync_bits = 32  # of a number sent at merges: 32 (as it is), or 8, 4, 2, and later what is left
# optimizer
optimizer = 'adamw'  # or, on full gradients, 'galore' (the drop-in), 'fira', 'apollo', 'scale'; or
#                      'muon' (in a basis, too), with AdamW on all but attention and MLP's matrices
basis = 'sketch'  # in layers 'sketch' or 'random'; of full gradients 'svd' (exact), 'power'
#                   (subspace iteration) or 'random'
basis_every = 200  # steps between two bases of a matrix; the blocks of a model take turns
scale = 0.25  # multiplies the learning rate of what steps inside a basis; Muon's methods have 1
momentum = 0.95  # of Muon; 0: no moment of its matrices is kept
state_bits = None  # of the moments: 32, 16, or 8 (a scale for each block); None: as the weights
shard = False  # True: each rank holds its rows of every weight, gradient and moment (FSDP2)
per_layer = False  # update a parameter in the backward pass, and free its gradient; no grad_clip
learning_rate = 6e-4
max_iters = 10000  # steps
weight_decay = 0.1  # on matrices only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # norm of what is stepped on (GaLore: the projected gradient), 0: no clipping
warmup_iters = 200
min_lr = None  # the cosine's end, None: a tenth of learning_rate
# system
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1'
dtype = 'auto'  # of computation: 'float32', 'bfloat16', 'float16' (with a GradScaler), 'float64'
param_dtype = 'float32'  # weights; computation in another dtype goes through autocast
compile = None  # True: torch.compile blocks, and the optimizer's steps in 16 and 8 bits; None: on
#                 GPUs these steps alone; False: nothing
wandb_log = False  # needs the package wandb
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    settings = config.load(globals(), defaults, sys.argv[1:])  # before torch: mistakes come at once

import torch

import prepare
from hub import carry_along, fill, load_heads, read_for
from lowrank import averaged_heads, clip_gradients, drop_moments, lowrank_layers, merge
from model import GPT, GPTConfig
from ranks import mean, rows_of, shard, where_to_draw, write
from run import (Meter, assemble, catch_signals, freeze_as_set, in_units, join, make_optimizer,
                 open_run, operations_of, put_layers, refuse_other_data, save, set_learning_rate,
                 start_run, stop_requested, unscale)


def build(settings, process, vocabulary, checkpoint=None, planned=None):
    """
    Builds the model and its optimizer, ready to train, and returns them as a `run.Run`.

    process: from run.join; vocabulary: how many tokens the data have; checkpoint: to resume, or
    None; planned: for bench.py, a configuration in place of the settings'. Replaces
    settings['train'] if it is 'auto'.
    """
    s = SimpleNamespace(**settings)
    torch.manual_seed(s.seed)
    loaded = adapter = None
    if checkpoint:
        shape = GPTConfig(**checkpoint['model_config'])
    elif planned:
        shape = planned
    elif s.init_from == 'scratch':
        shape = GPTConfig(s.block_size, s.vocab_size or vocabulary, n_layer=s.n_layer,
                          n_head=s.n_head, n_embd=s.n_embd, bias=s.bias)
    else:
        shape, loaded, adapter = read_for(settings, GPTConfig)
    shape = replace(shape, dropout=s.dropout, checkpointing=s.checkpointing)
    with torch.device('meta'):
        model, plain = GPT(shape), GPT(shape)
    if vocabulary > shape.vocab_size:
        raise ValueError(f'data set {s.dataset!r} has {vocabulary} tokens, the model '
                         f'{shape.vocab_size}: choose other data, or from scratch set '
                         f'vocab_size={vocabulary}')
    model.to(getattr(torch, s.param_dtype))
    layers = put_layers(model, settings, process.rank, process.ranks)
    freeze_as_set(model, settings)
    if s.shard:
        shard(model, lowrank_layers(model), process.device)
    else:
        model.to_empty(device=process.device)
    model.tie()
    if not checkpoint:
        # `plain` has the names and shapes that files have. Each tensor, read or drawn, is written
        # into `model` at once (with shards only this rank's rows): no process holds a second model
        if loaded is None:
            loaded = plain.drawn(device=where_to_draw(process.device),
                                 dtype=getattr(torch, s.param_dtype))
        fill(plain, loaded, s.init_from, functools.partial(write, model))
        for layer in layers:
            layer.start()
        if adapter:
            load_heads(model, settings, adapter)
    optimizer = make_optimizer(model, settings)
    return assemble(model, asdict(model.config), optimizer, settings, process, checkpoint)


def loss_of(run, x, y, weights=None, documents=None):
    """Returns the mean loss of tokens x and targets y (rows, time), on the CPU; with weights
    (rows,), the weighted sum. documents: (rows, time), each token's, if they are apart."""
    if weights is not None:
        weights = weights.to(torch.promote_types(getattr(torch, run.s.param_dtype), torch.float32))
    batch = [part for part in (x, y, weights, documents) if part is not None]
    if run.device_type == 'cuda':  # pinned: the copy overlaps with what the GPU still has to do
        batch = [part.contiguous().pin_memory() for part in batch]
    with torch.autocast(run.device_type, getattr(torch, run.compute),
                        enabled=run.compute != run.s.param_dtype):
        return run.net(*(part.to(run.device, non_blocking=True) for part in batch))


def train_step(run, step, batch):
    """
    Makes training step `step`, from 0: forward, backward, clip, update, merge.

    batch(micro_step) returns this rank's x and y, and where data have them weights and documents,
    see `loss_of`. Returns the mean loss and the norm of the gradient before clipping, tensors.
    """
    s, total, micro_steps = run.s, 0.0, run.s.gradient_accumulation_steps
    if s.dropout or s.lora_dropout:
        torch.manual_seed(hash((s.seed, step, run.rank)))  # the same masks after a resume
    for micro_step in range(micro_steps):
        run.net.require_backward_grad_sync = micro_step == micro_steps - 1  # gradients travel once
        run.optimizer.begin(step, micro_step, micro_steps)  # bases; which micro-batch is the last
        loss = loss_of(run, *batch(micro_step)) / micro_steps
        run.scaler.scale(loss).backward()
        total += loss.detach()
    unscale(run.scaler, run.optimizer)
    norm = clip_gradients(run.model, s.grad_clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if s.merge_every and (step + 1) % s.merge_every == 0:
        merge(run.model, torch.Generator().manual_seed(s.seed + step + 1), run.replicas,
              bits=s.sync_bits, state=run.optimizer.state)
        if s.merge_reset:
            drop_moments(run.model, run.optimizer)
    return total, norm


@torch.no_grad()
def evaluate(run, data):
    """Mean loss of the fixed batches of a split, with heads averaged; None where a signal came."""
    s, losses = run.s, []
    run.model.eval()
    with averaged_heads(run.model, run.replicas):
        while len(losses) < s.eval_iters and not stop_requested():
            batch = data.fixed_batch(len(losses), s.eval_iters, s.batch_size, rank=run.rank,
                                     world_size=run.ranks)
            losses.append(loss_of(run, *batch))
    run.model.train()
    if len(losses) < s.eval_iters:
        return None
    return mean(torch.stack(losses).mean()).item()


def main(settings):
    process = join(settings)
    with config.refusals():
        checkpoint = open_run(settings, process)
        s = SimpleNamespace(**settings)  # open_run has settled init_from
        train_data, val_data = (
            prepare.Tokens(s.dataset, split, s.block_size, s.data_dir, s.documents)
            for split in ('train', 'val'))
        settings['documents'] = train_data.documents
        refuse_other_data(train_data.fingerprint, settings, process, checkpoint)
        # the rows of a micro-batch that this rank trains on; each split head has its part of them
        heads = s.heads if s.lowrank and s.split else 1
        rows = rows_of(s.batch_size, heads, process.rank, process.ranks)
        run = build(settings, process, train_data.vocab_size, checkpoint)
        step = checkpoint['step'] if checkpoint else 0
        best_val_loss = checkpoint['best_val_loss'] if checkpoint else float('inf')
        tokens = s.batch_size * s.gradient_accumulation_steps * s.block_size
        operations = operations_of(run.model, s.block_size, run.model.config.n_embd)
        if run.rank == 0:  # a fresh run removes the files of an older one here
            start_run(settings, step)
            carry_along(settings)
        meter = Meter(run, step, tokens, 'tokens', operations=operations)
    del checkpoint

    def batch(micro_step):
        return train_data.batch(s.batch_size, step, micro_step, seed=s.seed, rows=rows, heads=heads,
                                accumulation=s.gradient_accumulation_steps)

    catch_signals()
    start, stop = step, False
    while True:
        lr = set_learning_rate(run.optimizer, settings, step)
        last = stop or step >= s.max_iters or s.eval_only

        if last or step % s.eval_interval == 0:
            val_loss = evaluate(run, val_data)
            stop = val_loss is None  # a signal wants the checkpoint soon
            better = False
            if not stop:
                units = in_units(val_loss, val_data.tokens_per_byte) if s.eval_only else {}
                meter.log(step, {'val_loss': val_loss, **units})
                # <=: a run that resumes at its best may have been killed before it wrote best.pt
                better = not s.eval_only and step > 0 and val_loss <= best_val_loss
                best_val_loss = val_loss if better else best_val_loss
            about = dict(step=step, best_val_loss=best_val_loss, data=train_data.fingerprint,
                         tokenizer=train_data.meta.get('tokenizer', ''))
            if step > start:
                save(run, 'ckpt.pt', about, resumable=True)
            if better:
                save(run, 'best.pt', about)
            meter.restart()
        if last or stop:
            break

        loss, norm = train_step(run, step, batch)
        meter.add(loss, norm)
        step += 1
        stop = stop_requested()
        due = step % s.log_interval == 0 or step % s.eval_interval == 0 or step == s.max_iters
        if stop or due:
            meter.line(step, lr)

    has_best = best_val_loss < float('inf')
    meter.close(step, f'lowest validation loss so far {best_val_loss:.4f}' if has_best else '')
    return best_val_loss


if __name__ == '__main__':
    main(settings)
