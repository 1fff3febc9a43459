"""
Trains a vision transformer of timm, pretrained or from scratch, whole or by a method of
config/methods:

$ python train_vit.py config/vit_quickstart.py
$ python train_vit.py config/vit_base_pathmnist.py config/methods/lora.py --rank=16 --alpha=16
$ python train_vit.py config/vit_quickstart.py --init_from=out/vit_quickstart/best.pt \\
      --eval_only=True
$ TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \\
      train_vit.py config/vit_base_pathmnist.py
The variable gives a stopped run time to end its step and save (else, and before torch 2.13, it is
killed after 30 s).
"""

import sys
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
# settings: ViT-B/16 on PathMNIST, full fine-tuning of timm's pretrained weights
# run
out_dir = 'out/vit'  # checkpoints, log.jsonl, config.json
init_from = 'pretrained'  # 'scratch', 'resume', 'auto' (resume where there is a checkpoint, else
#                          scratch), 'pretrained' (timm's hub), or a file: timm's weights, a best.pt
#                          of ours
overwrite = False  # True: replace a run that out_dir already holds
eval_interval = 500  # steps between evaluations on the validation split; each writes a checkpoint
eval_only = False  # evaluate on the validation and test splits once and stop
log_interval = 10  # steps between lines of the log
seed = 1337
# data: a step trains batch_size * gradient_accumulation_steps images, on any number of ranks
dataset = 'pathmnist_224'  # a folder in data_dir, made by prepare.py
data_dir = 'data'
batch_size = 32  # images of a micro-batch, over all ranks
gradient_accumulation_steps = 1  # micro-batches of a step
augment = ''  # '' or a comma list of 'flip' (left and right) and 'crop' (moved by up to an eighth)
# model
# timm's name; its tag, as in 'vit_base_patch16_224.mae', says how images are normalised: give it
# where init_from is a file of such weights. The next five: as timm has them, unless they are set
# (the last three: not with 'pretrained')
model = 'vit_base_patch16_224'
img_size = None  # images of another size are resized on the device
patch_size = None
n_layer = None
n_head = None
n_embd = None
checkpointing = False  # recompute activations in the backward pass: less memory, more time
# low-rank layers: config/methods has a file for each method
lowrank = ''  # '' (full rank) or a comma list of 'attn', 'q', 'k', 'v', 'mlp', 'logit' or names of
#               modules
heads = 1  # low-rank heads of a layer
rank = 8  # of each head, or of GaLore's basis
alpha = 8.0  # heads are averaged, and scaled by alpha / rank (in a basis by 1)
lora_dropout = 0.0  # share of a layer's input that heads do not see in a step
factors = 'both'  # 'both' A and B train; 'B' alone (LoRA-FA); 'basis': one of them is a basis of
#                   the gradient, the other trains (GaLore)
split = False  # True: every head sees its own part of the batch only (LTE)
train = 'auto'  # 'all'; 'factors': the heads alone; 'classifier': and the classifier (without
#                 heads a linear probe); 'auto': 'all', but with heads on loaded weights
#                 'classifier'
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
learning_rate = 1e-4
epochs = 0  # passes over the training images; above 0 it sets max_iters
max_iters = 3000  # steps
weight_decay = 0.01  # on matrices only
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0  # norm of what is stepped on (GaLore: the projected gradient), 0: no clipping
warmup_iters = 100
min_lr = 0.0
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

import math
import os
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

import prepare
from hub import LOOK, SHAPE, create_vit, put_heads, read_vit
from lowrank import (averaged_heads, clip_gradients, drop_moments, lowrank_layers, merge,
                     named_layers)
from ranks import load_weights, mean, rank_and_world, rows_of, shard
from run import (Meter, Run, assemble, catch_signals, freeze_as_set, join, load_checkpoint,
                 make_optimizer, open_run, operations_of, refuse_other_data, save,
                 set_learning_rate, start_run, stop_requested, unscale)

# -----------------------------------------------------------------------------
# images


def to_device(x, device):
    """A tensor of the CPU on a device; a GPU goes on with what it still has to do."""
    if torch.device(device).type == 'cuda':
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def augmented(images, augment, key, *, count, rows):
    """
    Flips and crops uint8 images (rows, channels, size, size) on their device. The key alone decides
    how.

    Random numbers are drawn for all `count` images of the micro-batch; these images are its `rows`.
    A crop moves the image by up to an eighth of its size, and repeats its edge.
    """
    draws = torch.from_numpy(np.random.default_rng(key).random((count, 3))[rows])  # (rows, 3)
    size = images.shape[-1]
    most = size // 8 if 'crop' in augment else 0
    moves = (draws[:, :2] * (2 * most + 1)).long() - most  # (rows, 2)
    places = torch.arange(size) + moves.T[..., None]  # (2, rows, size)
    down, across = to_device(places.clamp(0, size - 1), images.device)
    if 'flip' in augment:
        is_flipped = to_device(draws[:, 2:] < 0.5, images.device)
        across = torch.where(is_flipped, across.flip(1), across)
    images = images.gather(2, down[:, None, :, None].expand_as(images))
    return images.gather(3, across[:, None, None, :].expand_as(images))


@dataclass
class Look:
    """How a model sees images: resized to size / crop_pct, cropped to the middle (size, size), then
    minus mean and divided by std, both (3, 1, 1), for pixels from 0 to 1."""
    size: int
    crop_pct: float
    interpolation: str
    mean: torch.Tensor
    std: torch.Tensor


def look_of(model, shape, device):
    """The `Look` of a timm model, as its weights are evaluated. ValueError: it is not supported."""
    theirs = timm.data.resolve_data_config({}, model=model)
    if theirs['crop_mode'] != 'center' and rank_and_world()[0] == 0:
        print(f"timm evaluates these weights by crop_mode={theirs['crop_mode']!r}, whole pictures; "
              'here they see the middle, as prepare.py keeps it')
    found = {key: theirs[key] for key in LOOK}
    if not 0.1 < found['crop_pct'] <= 1 or found['interpolation'] not in ('bilinear', 'bicubic'):
        raise ValueError(f'{found} is not supported: choose a model that is evaluated on bicubic '
                         'images')
    mean = torch.tensor(theirs['mean'], device=device).view(3, 1, 1)
    std = torch.tensor(theirs['std'], device=device).view(3, 1, 1)
    return Look(shape['img_size'] or theirs['input_size'][-1], **found, mean=mean, std=std)


def normalised(images, look, dtype):
    """Makes a model's input (rows, 3, size, size) from uint8 images (rows, 1 or 3, pixels, pixels)
    on their device, as timm does for evaluation; look: a `Look`."""
    x = images.to(torch.promote_types(dtype, torch.float32)).expand(-1, 3, -1, -1)
    side = math.floor(look.size / look.crop_pct)
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode=look.interpolation, antialias=True).clamp(0, 255)
    first = round((side - look.size) / 2)
    x = x[..., first:first + look.size, first:first + look.size]
    return ((x / 255 - look.mean) / look.std).to(dtype)


# -----------------------------------------------------------------------------
# evaluation


def criterion(logits, labels):
    """Mean cross entropy of labels (rows,), or binary cross entropy of labels (rows, classes) that
    are 0 or 1: an image may have several. For mixup mix the losses of both images' labels."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def measure(logits, labels):
    """
    Returns accuracy and AUC as medmnist's evaluator computes them, the accuracy of each class, and
    the confusion matrix, whose rows are true classes.

    logits (n, classes); labels (n,), or (n, classes) if an image may have several: then the matrix
    is None, and a class counts as a yes-or-no question. The AUC is the mean over classes that some
    images have and some have not. With labels (n,) a class without images has accuracy None.
    """
    n, classes = logits.shape
    several = labels.dim() == 2
    logits = logits.double()  # before: ones in float32 would tie
    scores = logits.sigmoid() if several else logits.softmax(1)
    scores, labels = scores.numpy(), labels.numpy()
    truth = labels if several else np.eye(classes)[labels]  # (n, classes)
    columns = [1] if classes == 2 and not several else range(classes)
    areas = [roc_auc_score(truth[:, i], scores[:, i]) for i in columns
             if 0 < truth[:, i].mean() < 1]
    auc = float(np.mean(areas)) if areas else math.nan
    if several:
        right = (scores > 0.5) == labels
        return float(right.mean()), auc, right.mean(0).tolist(), None
    pairs = labels * classes + scores.argmax(1)  # (n,): true class, predicted class
    matrix = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    by_class = [float(row[i] / row.sum()) if row.any() else None for i, row in enumerate(matrix)]
    return float(matrix.trace() / n), auc, by_class, matrix


# -----------------------------------------------------------------------------
# a run


@dataclass
class ViTRun(Run):
    look: Look = None


def build(settings, process, classes, checkpoint=None):
    """
    The model and its optimizer, ready to train: a `ViTRun`.

    process: from run.join; classes: names; checkpoint: to go on from. Writes settings['train'], if
    it is 'auto'.
    """
    s = SimpleNamespace(**settings)
    torch.manual_seed(s.seed)
    shape, weights, path = {key: settings[key] for key in ('model', *SHAPE)}, False, ''
    if checkpoint:
        shape = {**LOOK, **checkpoint['model_config']}
    elif os.path.isfile(s.init_from):
        path = s.init_from
        shape, weights = read_vit(path, shape, classes, s.eval_only, s.frozen_bits)
    elif s.init_from == 'scratch':
        shape.update(LOOK)
    elif s.init_from == 'pretrained':
        weights = True
    else:
        raise ValueError(f"init_from={s.init_from!r} is no file: set 'scratch', 'resume', "
                         "'pretrained', or the path of a best.pt or of weights of timm")
    model = create_vit(shape, len(classes), weights, path)
    known = model.pretrained_cfg.get('num_classes')
    if s.eval_only and weights is True and known != len(classes):
        raise ValueError(f"the classifier of timm's weights knows {known} classes, and not the "
                         f'{len(classes)} of the data: set init_from to the best.pt of a run')
    (height, width), (tall, wide) = model.patch_embed.img_size, model.patch_embed.patch_size
    if (height % tall or width % wide) and process.rank == 0:
        print(f'the last {height % tall} rows and {width % wide} columns of images are in no patch '
              f'of {tall} x {wide} pixels')
    look = look_of(model, shape, process.device)
    shape.update({key: getattr(look, key) for key in LOOK})
    if process.rank == 0:
        side, average = math.floor(look.size / look.crop_pct), look.mean.flatten().tolist()
        print(f'images: {side} pixels a side, the model sees the middle {look.size}; less a mean '
              'of ' + ', '.join(f'{x:.3f}' for x in average))
    model.to('cpu' if s.shard else process.device, getattr(torch, s.param_dtype))
    put_heads(model, settings, process.rank, process.ranks)
    model.set_grad_checkpointing(s.checkpointing)
    freeze_as_set(model, settings, new=('logit',))
    if s.shard:
        shard(model, lowrank_layers(model), process.device)
    optimizer = make_optimizer(model, settings)
    run = assemble(model, shape, optimizer, settings, process, checkpoint)
    return ViTRun(**vars(run), look=look)


def operations_of_image(model):
    """Returns the operations of a training step for one image, see run.operations_of. The head sees
    one token, and is counted as if it saw all."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return tokens * operations_of(model, tokens, model.embed_dim)


def batch_of(run, data, rows, step, micro_step):
    """Images and labels of a micro-batch on this rank's device: the given rows of it, augmented."""
    s = run.s
    images, labels = data.batch(s.batch_size, step, micro_step, seed=s.seed, rows=rows,
                                accumulation=s.gradient_accumulation_steps)
    images, labels = to_device(images, run.device), to_device(labels, run.device)
    if s.augment:
        key = s.seed, step, micro_step
        images = augmented(images, s.augment, key, count=s.batch_size, rows=rows)
    return images, labels


def logits_of(run, images):
    """Logits (rows, classes), in float32 or wider, of images on their device, values 0 to 255."""
    x = normalised(images, run.look, getattr(torch, run.s.param_dtype))
    with torch.autocast(run.device_type, getattr(torch, run.compute),
                        enabled=run.compute != run.s.param_dtype):
        y = run.net(x)
    return y.to(torch.promote_types(y.dtype, torch.float32))


def train_step(run, step, batch):
    """
    One step, from 0: forward, backward, clip, step, merge.

    batch(micro_step) gives this rank's images and labels, on its device. Returns the mean loss and
    the norm of the gradient before clipping, tensors.
    """
    s, total, micro_steps = run.s, 0.0, run.s.gradient_accumulation_steps
    if s.lora_dropout:
        torch.manual_seed(hash((s.seed, step, run.rank)))  # the same masks after a resume
    for micro_step in range(micro_steps):
        run.net.require_backward_grad_sync = micro_step == micro_steps - 1  # gradients travel once
        run.optimizer.begin(step, micro_step, micro_steps)  # bases; which micro-batch is the last
        images, labels = batch(micro_step)
        loss = criterion(logits_of(run, images), labels) / micro_steps
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
def evaluate(run, data, name):
    """Evaluates a whole split. Returns a record for the log and the confusion matrix, or None, None
    if a signal came. Ranks share the work, and each gets all scores."""
    batch_size, batches = run.s.batch_size, -(-len(data) // run.s.batch_size)
    run.model.eval()
    wide = torch.promote_types(getattr(torch, run.s.param_dtype), torch.float32)
    _, y = data.fixed_batch(0, 1)
    logits = torch.zeros(len(data), data.num_classes, dtype=wide, device=run.device)
    labels = torch.zeros(len(data), *y.shape[1:], dtype=y.dtype, device=run.device)
    i = 0
    with averaged_heads(run.model, run.replicas):
        while i < batches and not stop_requested():
            images, y = data.fixed_batch(i, batch_size, run.rank, world_size=run.ranks)
            of_rank = slice(i * batch_size + run.rank, (i + 1) * batch_size, run.ranks)
            rows = len(y)  # 0 is possible in the last batch; but with shards all ranks must compute
            if not rows and run.s.shard:
                images, y = data.fixed_batch(0, 1)
            if len(y):
                logits[of_rank] = logits_of(run, to_device(images, run.device))[:rows]
                labels[of_rank] = to_device(y, run.device)[:rows]
            i += 1
    run.model.train()
    if i < batches:
        return None, None
    if run.ranks > 1:  # zeros are where the others' rows belong
        torch.distributed.all_reduce(logits)
        torch.distributed.all_reduce(labels)
    loss = criterion(logits, labels).item()
    if not math.isfinite(loss):
        return {f'{name}_loss': loss}, None  # the log ends the run
    accuracy, auc, by_class, matrix = measure(logits.cpu(), labels.cpu())
    return {f'{name}_loss': loss, f'{name}_acc': accuracy, f'{name}_auc': auc,
            f'{name}_acc_by_class': by_class}, matrix


def test(run, data, meter, step):
    """Evaluates the test split, by the weights of best.pt if all nodes have it. Logs scores,
    prints accuracy by class; assets/figures.py draws the confusion matrix from the log."""
    best = f'{run.s.out_dir}/best.pt'
    if run.ranks > 1:
        torch.distributed.barrier()  # rank 0 has written best.pt
    is_there = not run.s.eval_only and os.path.exists(best)
    share = mean(torch.tensor(float(is_there), device=run.device)).item()
    if share == 1:
        with config.refusals():
            load_weights(run.model, named_layers(run.model), load_checkpoint(best)['model'])
    elif run.rank == 0 and not run.s.eval_only:
        print('best.pt is not there, or not on the disk of each node: the test is of the last '
              'weights')
    record, matrix = evaluate(run, data, 'test')
    if record is None:
        return
    if matrix is not None:
        record['test_confusion'], record['classes'] = matrix.tolist(), data.classes
    meter.log(step, record)
    if run.rank == 0:
        shares = ('no images' if x is None else f'{x:.3f}' for x in record['test_acc_by_class'])
        print('accuracy by class: ' + '; '.join(map(' '.join, zip(data.classes, shares))))
        drawn_from_log = run.s.eval_only and os.path.exists(f'{run.s.out_dir}/log.jsonl')
        if matrix is not None and not drawn_from_log:
            print(f'python assets/figures.py {run.s.out_dir} draws the confusion matrix')


def main(settings):
    process = join(settings)
    with config.refusals():
        checkpoint = open_run(settings, process)
        s = SimpleNamespace(**settings)  # open_run has settled init_from
        train_data, val_data, test_data = (prepare.Images(s.dataset, split, s.data_dir)
                                           for split in ('train', 'val', 'test'))
        refuse_other_data(train_data.fingerprint, settings, process, checkpoint)
        classes, images = train_data.classes, s.batch_size * s.gradient_accumulation_steps
        if s.epochs:
            settings['max_iters'] = -(-s.epochs * len(train_data) // images)
        steps = settings['max_iters']
        # the rows of a micro-batch that this rank trains on; each split head has its part of them
        heads = s.heads if s.lowrank and s.split else 1
        rows = rows_of(s.batch_size, heads, process.rank, process.ranks)
        run = build(settings, process, classes, checkpoint)
        s = run.s  # with what `build` has settled
        step = checkpoint['step'] if checkpoint else 0
        best_val_auc = checkpoint['best_val_auc'] if checkpoint else 0.0
        epochs = f'{steps * images / len(train_data):.1f} epochs, '
        if run.rank == 0:  # a fresh run removes the files of an older one here
            start_run(settings, step)
        meter = Meter(run, step, images, 'images', epochs, operations_of_image(run.model))
    base = s.init_from  # what adapters belong to
    if checkpoint:
        base = checkpoint.get('base', checkpoint['settings']['init_from'])
    del checkpoint

    def batch(micro_step):
        return batch_of(run, train_data, rows, step, micro_step)

    catch_signals()
    start, stop = step, False
    while True:
        lr = set_learning_rate(run.optimizer, settings, step)
        last = stop or step >= steps or s.eval_only

        if last or step % s.eval_interval == 0:
            record, _ = evaluate(run, val_data, 'val')
            stop = record is None  # a signal wants the checkpoint soon
            better = False
            if not stop:
                meter.log(step, record)
                # not <: equal AUCs and undefined ones (nan) are saved, too; and a run that resumes
                # at its best may have been killed before it wrote best.pt
                auc = record['val_auc']
                better = not s.eval_only and step > 0 and not auc < best_val_auc
                best_val_auc = auc if better else best_val_auc
            about = dict(step=step, best_val_auc=best_val_auc, data=train_data.fingerprint,
                         classes=classes, base=base)
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
        due = step % s.log_interval == 0 or step % s.eval_interval == 0 or step == steps
        if stop or due:
            meter.line(step, lr)

    if not stop:
        test(run, test_data, meter, step)
    meter.close(step, f'highest validation AUC so far {best_val_auc:.4f}')
    return best_val_auc


if __name__ == '__main__':
    main(settings)
