"""
Trains GPT-2 with full-rank weights, LoRA heads (LTE, ReLoRA), GaLore or both (GaLoLTE). On one process or on several:

$ python train_gpt.py config/quickstart.py
$ python train_gpt.py config/gpt2_mhlora.py --batch_size=8 --rank=16
$ torchrun --standalone --nproc_per_node=4 train_gpt.py config/gpt2_mhlora.py
Two nodes: the same line on both, with --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT instead of --standalone.
"""

import sys
from dataclasses import asdict

import config

# -----------------------------------------------------------------------------
# settings: GPT-2 124M on CNN/DailyMail, full rank
# run
out_dir = 'out/gpt2'  # checkpoints, log.jsonl, config.json
init_from = 'scratch'  # 'scratch', 'resume', 'gpt2' (also -medium, -large, -xl) or the path of a model.safetensors
overwrite = False  # True: replace a run that out_dir already holds
eval_interval = 250  # steps between evaluations; each writes a checkpoint
eval_iters = 50  # batches of an evaluation, always the same ones
eval_only = False  # evaluate once and stop
log_interval = 10  # steps between lines of the log
seed = 1337
# data: every step trains batch_size * gradient_accumulation_steps sequences in all, whatever the number of ranks
dataset = 'cnn_dailymail'  # a folder in data_dir, made by prepare.py
data_dir = 'data'
batch_size = 12  # sequences of a micro-batch, over all ranks
gradient_accumulation_steps = 1  # micro-batches of a step
block_size = 512  # tokens of a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = True  # biases in linears and norms
vocab_size = None  # None: that of the data
checkpointing = False  # recompute activations in the backward pass: less memory, more time
# heads
lowrank = ''  # '' (full rank) or a comma list of 'attn', 'mlp', 'logit' or names of modules
heads = 1  # low-rank heads of a layer
rank = 4  # of each head
alpha = 4.0  # the heads' product is scaled by alpha / rank (GaLoLTE: by 1)
head_input = 'shared'  # 'shared': every head sees every token; 'split': each its own part of the batch (LTE)
head_compute = 'parallel'  # 'parallel' or 'sequential': the same result, at another speed
head_basis = 'trained'  # 'gradient': one factor of the split heads is a basis of their gradient, as in GaLore (GaLoLTE)
merge_every = 0  # steps between merges into the frozen weight, 0: never
merge_reset = False  # after a merge draw new heads (ReLoRA) instead of training the old ones on (LTE)
sync = 'step'  # parameters without heads: every 'step', or, on ranks, each its own, averaged at every 'merge' (LTE)
rewarm_iters = 0  # steps in which the learning rate climbs again after a merge that resets
# optimizer
optimizer = 'adamw'  # 'adamw', or 'galore': Adam in a projection of the gradients of attention and MLP
galore_rank = 128
galore_gap = 200  # steps between two bases of a matrix; in layers blocks take turns
galore_scale = 0.25  # multiplies the learning rate of what is projected
galore_basis = 'power'  # 'svd' (exact), 'power' (subspace iteration, a tenth of the time), 'random'; in layers
#                         ('projected', GaLoLTE) also 'sketch': never from a full gradient
galore_rule = 'galore'  # 'galore' or 'fira'
galore_backward = 'full'  # 'projected': the backward pass forms the projected gradient, never the full one
per_layer = False  # update every parameter during the backward pass and free its gradient; without grad_clip
state_bits = None  # of the moments; None: as the weights, 32, 16, 8: block by block
learning_rate = 6e-4
max_iters = 10000  # steps
weight_decay = 0.1  # on matrices only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # norm of what is stepped on (GaLore: the projected gradient), 0: no clipping
warmup_iters = 200
lr_decay_iters = None  # the cosine's end, None: max_iters
min_lr = 6e-5
# system
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1'
dtype = 'auto'  # computation: 'auto', 'float32', 'bfloat16', 'float16' (with a GradScaler), 'float64'
param_dtype = 'float32'  # weights; computation in another dtype goes through autocast
compile = False  # torch.compile
wandb_log = False  # needs the package wandb
wandb_project = 'nanoLowRank'
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    config.load(globals(), defaults, sys.argv[1:])  # before torch is imported, so that a typo answers at once

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import prepare  # noqa: E402
from galore import check_optimizer, make_optimizer, put_layers  # noqa: E402
from lowrank import (averaged_heads, check_settings, check_training, clip_gradients, count_parameters,  # noqa: E402
                     drop_moments, gather_state, load_state, merge, own_heads, replica_parameters, traffic)
from model import GPT, GPTConfig  # noqa: E402


def main(argv):
    settings = config.load(globals(), defaults, argv)

    # -------------------------------------------------------------------------
    # processes
    dist_rank, world_size, dev, compute = config.join(device, dtype, param_dtype)
    device_type = dev.split(':')[0]
    with config.refusals():
        config.check_numbers(settings)
        check_settings(settings, world_size)
        check_optimizer(settings, compute)

        # ---------------------------------------------------------------------
        # data
        train_data = prepare.Tokens(dataset, 'train', block_size, data_dir)
        val_data = prepare.Tokens(dataset, 'val', block_size, data_dir)
        vocabulary = vocab_size or train_data.vocab_size

        # ---------------------------------------------------------------------
        # model: first the weights, then the heads on top
        torch.manual_seed(seed)
        step, best_val_loss, checkpoint = 0, float('inf'), None
        if init_from == 'scratch':
            model = GPT(GPTConfig(block_size, vocabulary, n_layer, n_head, n_embd, dropout, bias, checkpointing))
        elif init_from == 'resume':
            checkpoint = config.load_checkpoint(f'{out_dir}/ckpt.pt')
            config.need_same(settings, checkpoint, (
                'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'lowrank', 'heads', 'rank', 'alpha',
                'head_input', 'head_basis', 'merge_every', 'merge_reset', 'sync', 'param_dtype',
                'optimizer', 'galore_rank', 'galore_backward', 'state_bits'))
            step, best_val_loss = checkpoint['step'], checkpoint['best_val_loss']
            model = GPT(GPTConfig(**{**checkpoint['model_config'], 'dropout': dropout, 'checkpointing': checkpointing}))
        else:
            model = GPT.from_pretrained(init_from, block_size, dropout)
            model.config.checkpointing = checkpointing
        model.to(dev, getattr(torch, param_dtype))
        if train_data.vocab_size > model.config.vocab_size:
            raise ValueError(f'data set {dataset!r} has {train_data.vocab_size} tokens, the model only '
                             f'{model.config.vocab_size}: set vocab_size={train_data.vocab_size}, or choose other data')
        put_layers(model, settings, dist_rank, world_size)
        replicas = replica_parameters(model) if sync == 'merge' else {}
        counts = count_parameters(model)

        # ---------------------------------------------------------------------
        # optimizer
        adam = make_optimizer(model, settings)
        if checkpoint:
            load_state(model, adam, checkpoint, replicas)
        if dist_rank == 0:
            config.start_run(settings, step)
    scaler = torch.amp.GradScaler(device_type, enabled=compute == 'float16')
    if checkpoint:
        if scaler.is_enabled() and checkpoint['scaler']:
            scaler.load_state_dict(checkpoint['scaler'])
        del checkpoint

    # -------------------------------------------------------------------------
    # `net` computes, `model` is the same weights under their own names
    apart = {*adam.apart, *own_heads(model), *replicas.values()}
    net, ddp_bytes = config.wrap(model, dev, world_size, compile, apart)

    def loss_of(x, y):
        if device_type == 'cuda':  # pinned, so that the copy overlaps with what the GPU still has to do
            x, y = x.pin_memory().to(dev, non_blocking=True), y.pin_memory().to(dev, non_blocking=True)
        with torch.autocast(device_type, getattr(torch, compute), enabled=compute != param_dtype):
            return net(x.to(dev), y.to(dev))

    @torch.no_grad()
    def evaluate():
        model.eval()
        with averaged_heads(model, replicas):
            losses = [loss_of(*val_data.fixed_batch(i, eval_iters, batch_size, dist_rank, world_size))
                      for i in range(eval_iters)]
        model.train()
        return config.mean_over_ranks(torch.stack(losses).mean(), world_size).item()

    def save(name, stepping=None, **extra):
        whole = gather_state(model, stepping, replicas)  # every rank takes part
        if dist_rank == 0:
            config.save_checkpoint(f'{out_dir}/{name}', {
                **whole, 'settings': settings, 'step': step, 'best_val_loss': best_val_loss,
                'model_config': asdict(model.config), 'tokenizer': train_data.meta['tokenizer'], **extra})

    # -------------------------------------------------------------------------
    # loop
    if dist_rank == 0:
        print(f"{counts['total']:,} parameters, {counts['trainable']:,} trainable ({counts['heads']:,} in heads), "
              f"{batch_size * gradient_accumulation_steps * block_size:,} tokens a step, {dev}, {compute}, "
              f"{world_size} rank{'s' * (world_size > 1)}")
    progress = tqdm(total=max_iters, initial=step, unit='step', disable=None if dist_rank == 0 else True, leave=False)
    config.catch_signals()
    start, saved = step, step if init_from == 'resume' else None
    meter, sent, stop = config.start_meter(dev), 0, False
    while True:
        lr = config.set_learning_rate(adam, settings, step)

        # evaluate and save
        last = stop or step >= max_iters or eval_only
        if last or step % eval_interval == 0:
            val_loss = None
            if not stop:  # a signal wants the checkpoint soon
                val_loss = evaluate()
                config.refuse_non_finite(step, saved, out_dir, val_loss=val_loss)
                if dist_rank == 0:
                    config.log(settings, {'step': step, 'val_loss': val_loss}, progress)
            if val_loss is not None and val_loss < best_val_loss and step > 0 and not eval_only:
                best_val_loss = val_loss
                save('best.pt')
            if step > start:
                save('ckpt.pt', adam, scaler=scaler.state_dict())
                saved = step
            config.restart_meter(meter)
            sent = traffic['bytes']
        if last:
            break

        # forward, backward
        if dropout:
            torch.manual_seed(hash((seed, step, dist_rank)))  # the same masks after a resume
        for micro_step in range(gradient_accumulation_steps):
            net.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1  # they travel once a step
            adam.begin(step, micro_step, gradient_accumulation_steps)  # bases, and which micro-batch is the last
            x, y = train_data.batch(batch_size, step, micro_step, gradient_accumulation_steps, seed, dist_rank,
                                    world_size, heads // world_size if lowrank and head_input == 'split' else 1)
            loss = loss_of(x, y) / gradient_accumulation_steps
            scaler.scale(loss).backward()
            meter['sums'][0] += loss.detach()
        adam.take_bases()
        scaler.unscale_(adam)
        config.share_overflow(scaler, adam, world_size)
        norm = clip_gradients(model, grad_clip)

        # update, merge
        scaler.step(adam)
        scaler.update()
        meter['sums'][1] = norm
        adam.zero_grad(set_to_none=True)
        step += 1
        meter['steps'] += 1
        if merge_every and step % merge_every == 0:
            merge(model, torch.Generator().manual_seed(seed + step), replicas)
            if merge_reset:
                drop_moments(model, adam)

        # log
        stop = config.stop_requested(world_size)
        if step % log_interval == 0 or step == max_iters or step % eval_interval == 0 or stop:
            sync_bytes = ddp_bytes + (traffic['bytes'] - sent) // meter['steps']  # a step
            train_loss, gradient_norm, seconds = config.read_meter(meter, world_size)
            config.refuse_non_finite(step, saved, out_dir, train_loss=train_loss)
            if not scaler.is_enabled():  # a GradScaler skips such steps and lowers its scale
                config.refuse_non_finite(step, saved, out_dir, gradient_norm=gradient_norm)
            with config.refusals():
                check_training(model, adam)
            sent = traffic['bytes']
            if dist_rank == 0:
                config.log(settings, {
                    'step': step, 'train_loss': train_loss, 'lr': lr, 'dt_ms': 1000 * seconds,
                    'tokens_per_s': batch_size * gradient_accumulation_steps * block_size / seconds,
                    'peak_memory_bytes': config.peak_memory_bytes(dev), 'trainable_parameters': counts['trainable'],
                    'optimizer_state_bytes': adam.state_bytes(), 'sync_bytes': sync_bytes}, progress)
        progress.update()

    # -------------------------------------------------------------------------
    progress.close()
    if dist_rank == 0 and step == start and not eval_only and not stop:
        print(f'step {step} of {max_iters}: nothing to train, raise max_iters to go on')
    if dist_rank == 0 and step > start:
        # none where a signal came before the first evaluation
        so_far = f', lowest validation loss so far {best_val_loss:.4f}' if best_val_loss < float('inf') else ''
        print(f'{out_dir}/ckpt.pt holds step {saved}{so_far}; --init_from=resume goes on')
    config.leave(world_size)
    return best_val_loss


if __name__ == '__main__':
    main(sys.argv[1:])
