"""
Trains a vision transformer of timm on images: full fine-tuning, a linear probe, LoRA, heads, GaLore, or from scratch:

$ python train_vit.py config/vit_quickstart.py
$ python train_vit.py config/vit_base_pathmnist_lora.py --rank=16
$ python train_vit.py config/vit_quickstart.py --init_from=out/vit_quickstart/best.pt --eval_only=True
$ torchrun --standalone --nproc_per_node=4 train_vit.py config/vit_base_pathmnist_full.py
"""

import sys

import config

# -----------------------------------------------------------------------------
# settings: ViT-B/16 on PathMNIST, full fine-tuning of timm's pretrained weights
# run
out_dir = 'out/vit'  # checkpoints, log.jsonl, config.json, adapter.safetensors, confusion.png
init_from = 'pretrained'  # 'scratch', 'resume', 'pretrained' (timm's hub), or a file: timm's weights, a best.pt of ours
adapter = ''  # an adapter.safetensors to load on top: heads and classifier
overwrite = False  # True: replace a run that out_dir already holds
eval_interval = 500  # steps between evaluations on the whole validation split; each writes a checkpoint
eval_only = False  # evaluate on the validation and test splits once and stop
log_interval = 10  # steps between lines of the log
seed = 1337
# data: every step trains batch_size * gradient_accumulation_steps images in all, whatever the number of ranks
dataset = 'pathmnist_224'  # a folder in data_dir, made by prepare.py
data_dir = 'data'
batch_size = 32  # images of a micro-batch, over all ranks
gradient_accumulation_steps = 1  # micro-batches of a step
augment = ''  # '' or a comma list of 'flip' (left and right) and 'crop' (moved by up to an eighth)
# model
model = 'vit_base_patch16_224'  # timm's name of it; the next five: as it has them, unless they are set
img_size = None  # images of another size are resized on the device
patch_size = None
n_layer = None
n_head = None
n_embd = None
checkpointing = False  # recompute activations in the backward pass: less memory, more time
train = 'auto'  # besides heads: 'all', 'classifier' (biases, norms stay, as in PEFT; without heads: a linear probe) or
#                 'auto': 'classifier' with heads, 'all' without
# heads
lowrank = ''  # '' (full rank) or a comma list of 'attn', 'q', 'k', 'v', 'mlp', 'logit' (classifier), names of modules
heads = 1  # low-rank heads of a layer
rank = 4  # of each head
alpha = 4.0  # the heads' product is scaled by alpha / rank (GaLoLTE: by 1)
head_input = 'shared'  # 'shared': every head sees every image; 'split': each its own part of the batch (LTE)
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
learning_rate = 1e-4
epochs = 0  # passes over the training images; above 0 it sets max_iters
max_iters = 3000  # steps
weight_decay = 0.01  # on matrices only
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0  # norm of what is stepped on (GaLore: the projected gradient), 0: no clipping
warmup_iters = 100
lr_decay_iters = None  # the cosine's end, None: max_iters
min_lr = 0.0
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

import contextlib  # noqa: E402
import difflib  # noqa: E402
import os  # noqa: E402

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from medmnist.evaluator import getACC, getAUC  # noqa: E402
from tqdm import tqdm  # noqa: E402

import prepare  # noqa: E402
from galore import check_optimizer, make_optimizer, put_layers  # noqa: E402
from lowrank import (averaged_heads, check_settings, check_training, clip_gradients, count_parameters,  # noqa: E402
                     drop_moments, freeze_rest, gather_state, load_adapter, load_state, load_weights, merge,
                     merged_state_dict, own_heads, replica_parameters, save_adapter, traffic)

# -----------------------------------------------------------------------------
# model

SHAPE = dict(img_size='img_size', patch_size='patch_size', n_layer='depth', n_embd='embed_dim', n_head='num_heads')


def create(shape, num_classes, hub=False, weights=None):
    """
    timm's model of that shape (settings by name) with drawn weights, those of timm's hub, or a state dict in its form.

    timm fits weights to another image or patch size. ValueError: a name, a shape or weights that do not go together.
    """
    name = shape['model']
    if ':' not in name and not timm.is_model(name):  # a name with a colon is a place, such as hf-hub:timm/...
        near = difflib.get_close_matches(name, timm.list_models('*vit*'), n=1, cutoff=0)[0]
        raise ValueError(f"model={name!r} is not known to timm {timm.__version__}: did you mean '{near}'?")
    changes = {theirs: shape[ours] for ours, theirs in SHAPE.items() if shape[ours] is not None}
    overlay = weights and dict(state_dict=weights, num_classes=num_classes)  # as many as the model: nothing is dropped
    try:
        vit = timm.create_model(name, pretrained=hub or bool(weights), num_classes=num_classes,
                                pretrained_cfg_overlay=overlay, **changes)
    except (RuntimeError, TypeError, AssertionError) as error:
        what = f"the weights '{init_from}'" if weights else f'{changes or "the pretrained weights"}'
        raise ValueError(f"model={name!r} does not go with {what} ({' '.join(str(error).split())[:160]}): set model, "
                         'n_layer, n_embd, n_head, patch_size as they belong together') from None
    except OSError as error:
        raise ValueError(f"timm's weights of {name!r} cannot be downloaded ({str(error)[:80]}): connect and run it "
                         'again, or set init_from to a file of them (model.safetensors)') from None
    if not isinstance(vit, timm.models.VisionTransformer):  # others compute around their linears, and heads with them
        raise ValueError(f"model={name!r} is no VisionTransformer of timm: set one, such as 'vit_base_patch16_224'")
    return vit


def read_weights(path, shape, classes, keep):
    """
    Weights of a file, (shape, state dict in timm's form): of our best.pt with its heads merged, or of timm.

    Of our checkpoint the shape fills in what is not set. The classifier stays if it is one of the same classes (timm's
    files do not name theirs: of as many); otherwise it is drawn anew, or refused (ValueError) where `keep` is True.
    """
    checkpoint = None
    if not path.endswith('.safetensors'):
        with contextlib.suppress(ValueError):  # not ours
            checkpoint = config.load_checkpoint(path)
    if not checkpoint:
        try:
            weights = timm.models.load_state_dict(path)
        except Exception as error:  # of pickle, zipfile, safetensors
            raise ValueError(f"'{path}' is damaged or holds no weights ({str(error).splitlines()[0][:80]}): "
                             'check init_from') from None
        theirs = len(weights.get('head.bias', ()))
        same = theirs == len(classes)
    else:
        saved = checkpoint['model_config']
        for key in ('model', 'n_layer', 'n_embd', 'n_head'):
            if key not in saved or shape[key] not in (None, saved[key]):
                raise ValueError(f"'{path}' is a checkpoint of {key}={saved.get(key)!r}, this run says "
                                 f'{shape.get(key)!r}: set the same, or choose another init_from')
        shape = {key: saved[key] if value is None else value for key, value in shape.items()}
        full = create(saved, len(checkpoint['classes'])).to(getattr(torch, checkpoint['settings']['param_dtype']))
        put_layers(full, checkpoint['settings'])
        full.load_state_dict(checkpoint['model'])
        weights = merged_state_dict(full)
        theirs, same = len(checkpoint['classes']), checkpoint['classes'] == list(classes)
    if not same and keep:
        raise ValueError(f"the classifier of '{path}' knows {theirs} classes, and not the {len(classes)} of data set "
                         f'{dataset!r} ({str(list(classes))[:60]}): evaluate it on its own data, or train first')
    if not same:  # as timm draws it
        width = next((x.shape[0] for name, x in weights.items() if name.endswith('norm.weight')), 1)
        weights['head.weight'] = torch.nn.init.trunc_normal_(torch.empty(len(classes), width), std=0.02)
        weights['head.bias'] = torch.zeros(len(classes))
    return shape, weights


# -----------------------------------------------------------------------------
# images


def augmented(images, augment, key, count, rows):
    """Flips and crops of uint8 images (rows, channels, size, size) on their device, a pure function of the key.

    Draws are made for all `count` images of the micro-batch, of which these are the given rows: for any number of ranks
    the same. A crop is the image moved by up to an eighth, its edge repeated."""
    draws = torch.from_numpy(np.random.default_rng(key).random((count, 3))[rows])  # (rows, 3)
    size = images.shape[-1]
    most = size // 8 if 'crop' in augment else 0
    places = [(torch.arange(size) + (draw[:, None] * (2 * most + 1)).long() - most).clamp(0, size - 1)  # (rows, size)
              for draw in draws[:, :2].T]
    if 'flip' in augment:
        places[1] = torch.where(draws[:, 2:] < 0.5, places[1].flip(1), places[1])
    down, across = (place.to(images.device, non_blocking=True) for place in places)
    images = images.gather(2, down[:, None, :, None].expand_as(images))
    return images.gather(3, across[:, None, None, :].expand_as(images))


def normalised(images, size, mean, std, dtype):
    """What a model takes, (rows, 3, size, size), from uint8 images (rows, 1 or 3, other, other) on their device."""
    x = images.to(torch.promote_types(dtype, torch.float32)).expand(-1, 3, -1, -1)
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode='bicubic', antialias=True).clamp(0, 255)
    return ((x / 255 - mean) / std).to(dtype)


# -----------------------------------------------------------------------------
# evaluation


def criterion(logits, labels):
    """Mean loss: cross entropy of labels (rows,), binary cross entropy of labels (rows, classes), several an image."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def measure(logits, labels, task):
    """
    Accuracy and AUC as medmnist's evaluator takes them, the accuracy of each class, and the confusion matrix.

    logits (n, classes); labels (n,), or (n, classes) where an image has several: then there is no matrix (None), and
    the accuracy of a class is that of its yes or no. Rows of the matrix are true classes, columns predicted ones.
    """
    n, classes = logits.shape
    scores = (logits.softmax(1) if labels.dim() == 1 else logits.sigmoid()).double().numpy()
    labels = labels.numpy()
    accuracy, auc = float(getACC(labels, scores, task)), float(getAUC(labels, scores, task))
    if labels.ndim == 2:
        return accuracy, auc, ((scores > 0.5) == labels).mean(0).tolist(), None
    matrix = np.bincount(labels * classes + scores.argmax(1), minlength=classes**2).reshape(classes, classes)
    return accuracy, auc, (matrix.diagonal() / matrix.sum(1).clip(1)).tolist(), matrix


def draw_confusion(matrix, classes, path):
    """A picture of a confusion matrix: counts, and as colour the share of each true class."""
    from matplotlib.figure import Figure
    size = 2.5 + 0.45 * len(classes)
    figure = Figure((size, size), layout='constrained')
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for (true, said), count in np.ndenumerate(matrix):
        axes.text(said, true, count, ha='center', va='center', size=8, color='wk'[int(share[true, said] < 0.5)])
    names = [name if len(name) < 25 else f'{name[:23]}..' for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel='predicted', ylabel='true')
    figure.savefig(path, dpi=120)


# -----------------------------------------------------------------------------


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
        if adapter and head_input == 'split':
            raise ValueError("an adapter has heads that see every image: set head_input='shared', or adapter=''")
        if epochs < 0:
            raise ValueError(f'{epochs=} makes no sense: set 0 (then max_iters counts) or more')
        if eval_only and wandb_log:
            raise ValueError('eval_only=True writes no run to wandb: set wandb_log=False')
        if train not in ('auto', 'all', 'classifier'):
            raise ValueError(f"train={train!r} is not known: set 'auto', 'all' or 'classifier'")
        if not {'flip', 'crop'}.issuperset(augment.split(',') if augment else ()):
            raise ValueError(f"augment={augment!r} is not known: set '', 'flip', 'crop' or 'flip,crop'")

        # ---------------------------------------------------------------------
        # data
        train_data, val_data, test_data = (prepare.Images(dataset, name, data_dir) for name in ('train', 'val', 'test'))
        classes, task = list(train_data.classes), train_data.task
        images_a_step = batch_size * gradient_accumulation_steps
        if epochs:
            settings['max_iters'] = -(-epochs * len(train_data) // images_a_step)
        steps = settings['max_iters']

        # ---------------------------------------------------------------------
        # model: first the weights, then the heads on top
        torch.manual_seed(seed)
        step, best_val_auc, checkpoint, weights = 0, 0.0, None, None
        shape = {key: settings[key] for key in ('model', *SHAPE)}
        if init_from == 'resume':
            checkpoint = config.load_checkpoint(f'{out_dir}/ckpt.pt')
            config.need_same(settings, checkpoint, (
                *shape, 'train', 'lowrank', 'heads', 'rank', 'alpha', 'head_input', 'head_basis',
                'merge_every', 'merge_reset', 'sync', 'param_dtype', 'optimizer', 'galore_rank',
                'galore_backward', 'state_bits'))
            if checkpoint['classes'] != classes:
                theirs = len(checkpoint['classes'])
                raise ValueError(f'the checkpoint knows {theirs} classes, and not the {len(classes)} of data set '
                                 f'{dataset!r}: resume with the data it was started with')
            step, best_val_auc, shape = checkpoint['step'], checkpoint['best_val_auc'], checkpoint['model_config']
        elif os.path.isfile(init_from):
            shape, weights = read_weights(init_from, shape, classes, keep=eval_only and not adapter)
        elif init_from not in ('scratch', 'pretrained'):
            raise ValueError(f"init_from={init_from!r} is not known and no file: set 'scratch', 'resume', 'pretrained' "
                             'or the path of a best.pt or of weights of timm')
        vit = create(shape, len(classes), init_from == 'pretrained', weights).to(dev, getattr(torch, param_dtype))
        del weights
        vit.pretrained_cfg.pop('state_dict', None)  # timm keeps a copy too
        put_layers(vit, settings, dist_rank, world_size)
        vit.set_grad_checkpointing(checkpointing)
        alone = lowrank and train != 'all' and not merge_every and head_input == 'shared'  # on an unchanging base
        if train == 'classifier' or train == 'auto' and lowrank:
            freeze_rest(vit, ('logit',))
        about = {**{key: settings[key] for key in ('model', 'lowrank', 'heads', 'rank', 'alpha')}, 'classes': classes}
        if adapter and not checkpoint:
            load_adapter(vit, adapter, about)
        look = timm.data.resolve_data_config({}, model=vit)
        size = shape['img_size'] or look['input_size'][-1]
        mean, std = (torch.tensor(look[key], device=dev).view(3, 1, 1) for key in ('mean', 'std'))
        replicas = replica_parameters(vit) if sync == 'merge' else {}
        counts = count_parameters(vit)

        # ---------------------------------------------------------------------
        # optimizer
        adam = make_optimizer(vit, settings)
        if checkpoint:
            load_state(vit, adam, checkpoint, replicas)
        if eval_only:
            os.makedirs(out_dir, exist_ok=True)
        elif dist_rank == 0:
            config.start_run(settings, step)
    scaler = torch.amp.GradScaler(device_type, enabled=compute == 'float16')
    if checkpoint:
        if scaler.is_enabled() and checkpoint['scaler']:
            scaler.load_state_dict(checkpoint['scaler'])
        del checkpoint

    # -------------------------------------------------------------------------
    # `net` computes, `vit` is the same weights under their own names
    apart = {*adam.apart, *own_heads(vit), *replicas.values()}
    net, ddp_bytes = config.wrap(vit, dev, world_size, compile, apart)

    def to_device(x):
        # pinned, so that the copy overlaps with what the GPU still has to do
        return x.pin_memory().to(dev, non_blocking=True) if device_type == 'cuda' else x

    def logits_of(images):
        x = normalised(images, size, mean, std, getattr(torch, param_dtype))
        with torch.autocast(device_type, getattr(torch, compute), enabled=compute != param_dtype):
            y = net(x)  # (rows, classes)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    @torch.no_grad()
    def evaluate(name, data):
        """A whole split: a record for the log, and the confusion matrix. Ranks share the work; each gets all scores."""
        vit.eval()
        wide = torch.promote_types(getattr(torch, param_dtype), torch.float32)
        _, y = data.fixed_batch(0, 1)
        labels = torch.zeros(len(data), *y.shape[1:], dtype=y.dtype, device=dev)  # (n,) or (n, classes)
        logits = torch.zeros(len(data), len(classes), dtype=wide, device=dev)
        with averaged_heads(vit, replicas):
            for i in range(-(-len(data) // batch_size)):
                images, y = data.fixed_batch(i, batch_size, dist_rank, world_size)
                mine = slice(i * batch_size + dist_rank, (i + 1) * batch_size, world_size)
                if len(y):  # the last batch may be short
                    logits[mine], labels[mine] = logits_of(to_device(images)), to_device(y)
        vit.train()
        if world_size > 1:  # zeros are where the others' rows belong
            torch.distributed.all_reduce(logits)
            torch.distributed.all_reduce(labels)
        loss = criterion(logits, labels).item()
        config.refuse_non_finite(step, saved, out_dir, **{f'{name}_loss': loss})
        accuracy, auc, by_class, matrix = measure(logits.cpu(), labels.cpu(), task)
        return {'step': step, f'{name}_loss': loss, f'{name}_acc': accuracy, f'{name}_auc': auc,
                f'{name}_acc_by_class': by_class}, matrix

    def save(name, stepping=None, **extra):
        whole = gather_state(vit, stepping, replicas)  # every rank takes part
        if dist_rank == 0:
            config.save_checkpoint(f'{out_dir}/{name}', {
                **whole, 'settings': settings, 'step': step, 'best_val_auc': best_val_auc,
                'model_config': shape, 'classes': classes, **extra})

    # -------------------------------------------------------------------------
    # loop
    if dist_rank == 0:
        print(f"{counts['total']:,} parameters, {counts['trainable']:,} trainable ({counts['heads']:,} in heads), "
              f"{images_a_step:,} images a step, {steps * images_a_step / len(train_data):.1f} epochs, {dev}, "
              f"{compute}, {world_size} rank{'s' * (world_size > 1)}")
    progress = tqdm(total=steps, initial=step, unit='step', disable=None if dist_rank == 0 else True, leave=False)
    config.catch_signals()
    start, saved = step, step if init_from == 'resume' else None
    meter, sent, stop = config.start_meter(dev), 0, False
    while True:
        lr = config.set_learning_rate(adam, settings, step)

        # evaluate and save
        last = stop or step >= steps or eval_only
        if last or step % eval_interval == 0:
            better = False
            if not stop:  # a signal wants the checkpoint soon
                record, _ = evaluate('val', val_data)
                better = not record['val_auc'] < best_val_auc  # the last of equals, or where AUC is undefined
                if dist_rank == 0:
                    config.log(settings, record, progress)
            if better and step > 0 and not eval_only:
                best_val_auc = record['val_auc']
                save('best.pt')
                if alone and dist_rank == 0:
                    save_adapter(vit, f'{out_dir}/adapter.safetensors', about)
            if step > start:
                save('ckpt.pt', adam, scaler=scaler.state_dict())
                saved = step
            config.restart_meter(meter)
            sent = traffic['bytes']
        if last:
            break

        # forward, backward
        for micro_step in range(gradient_accumulation_steps):
            net.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1  # they travel once a step
            adam.begin(step, micro_step, gradient_accumulation_steps)  # bases, and which micro-batch is the last
            shards = heads // world_size if lowrank and head_input == 'split' else 1
            images, y = map(to_device, train_data.batch(batch_size, step, micro_step, gradient_accumulation_steps, seed,
                                                        dist_rank, world_size, shards))
            if augment:
                images = augmented(images, augment, (seed, step, micro_step), batch_size,
                                   prepare.rows_of(batch_size, dist_rank, world_size, shards))
            loss = criterion(logits_of(images), y) / gradient_accumulation_steps
            scaler.scale(loss).backward()
            meter['sums'][0] += loss.detach()
        adam.take_bases()
        scaler.unscale_(adam)
        config.share_overflow(scaler, adam, world_size)
        norm = clip_gradients(vit, grad_clip)

        # update, merge
        scaler.step(adam)
        scaler.update()
        meter['sums'][1] = norm
        adam.zero_grad(set_to_none=True)
        step += 1
        meter['steps'] += 1
        if merge_every and step % merge_every == 0:
            merge(vit, torch.Generator().manual_seed(seed + step), replicas)
            if merge_reset:
                drop_moments(vit, adam)

        # log
        stop = config.stop_requested(world_size)
        if step % log_interval == 0 or step == steps or step % eval_interval == 0 or stop:
            sync_bytes = ddp_bytes + (traffic['bytes'] - sent) // meter['steps']  # a step
            train_loss, gradient_norm, seconds = config.read_meter(meter, world_size)
            config.refuse_non_finite(step, saved, out_dir, train_loss=train_loss)
            if not scaler.is_enabled():  # a GradScaler skips such steps and lowers its scale
                config.refuse_non_finite(step, saved, out_dir, gradient_norm=gradient_norm)
            with config.refusals():
                check_training(vit, adam)
            sent = traffic['bytes']
            if dist_rank == 0:
                config.log(settings, {
                    'step': step, 'train_loss': train_loss, 'lr': lr, 'dt_ms': 1000 * seconds,
                    'images_per_s': images_a_step / seconds,
                    'peak_memory_bytes': config.peak_memory_bytes(dev), 'trainable_parameters': counts['trainable'],
                    'optimizer_state_bytes': adam.state_bytes(), 'sync_bytes': sync_bytes}, progress)
        progress.update()

    # -------------------------------------------------------------------------
    # the test split, once, by the best weights
    if not stop:
        if world_size > 1:
            torch.distributed.barrier()  # rank 0 has written best.pt
        if not eval_only and os.path.exists(f'{out_dir}/best.pt'):
            load_weights(vit, config.load_checkpoint(f'{out_dir}/best.pt')['model'])
        record, matrix = evaluate('test', test_data)
        if dist_rank == 0:
            config.log(settings, record, progress)
            print('accuracy by class: ' + ', '.join(f'{name} {share:.3f}'
                                                    for name, share in zip(classes, record['test_acc_by_class'])))
            if matrix is not None:
                draw_confusion(matrix, classes, f'{out_dir}/confusion.png')
    progress.close()
    if dist_rank == 0 and step == start and not eval_only and not stop:
        print(f'step {step} of {steps}: nothing to train, raise max_iters or epochs to go on')
    if dist_rank == 0 and step > start:
        # none where a signal came before the first evaluation
        so_far = f', highest validation AUC so far {best_val_auc:.4f}' if best_val_auc else ''
        print(f'{out_dir}/ckpt.pt holds step {saved}{so_far}; --init_from=resume goes on')
    config.leave(world_size)
    return best_val_auc


if __name__ == '__main__':
    main(sys.argv[1:])
