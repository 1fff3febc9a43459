"""
A run: its processes, its checkpoint, its folder, its log. It has no command of its own: train_gpt.py,
train_llama.py and train_vit.py call it. Nothing here knows a particular model, or data.
"""

import ctypes
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import fail, locked, read_json, refusals, replacing, said, write_json
from galore import GaLoreAdamW, LowRankAdamW, param_groups
from lowrank import (apply_mhlora, check_training, count_parameters, freeze_rest, leaf_names, named_layers,
                     replica_parameters)
from ranks import (FORMAT, gather_state, is_sharded, keep_out_of_ddp, load_state, local, mean,
                   per_rank_tensors, rows_of, traffic)

HERE = Path(__file__).parent
ANSWER = 1800  # seconds that ranks wait for each other, also while rank 0 writes 40 GB to a slow disk

# -----------------------------------------------------------------------------
# the learning rate


def set_learning_rate(optimizer, settings, step):
    """Sets and returns the learning rate of a step: linear warm-up, then cosine to min_lr at max_iters. After
    a merge that resets it climbs again from zero within rewarm_iters (ReLoRA, section 3)."""
    s = SimpleNamespace(**settings)
    if step < s.warmup_iters:
        rate = s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    else:
        progress = min((step - s.warmup_iters) / max(s.max_iters - s.warmup_iters, 1), 1.0)
        rate = s.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)
    if s.merge_reset and step >= s.merge_every:
        rate *= min((step % s.merge_every + 1) / (s.rewarm_iters + 1), 1.0)
    for group in optimizer.param_groups:
        group['lr'] = rate
    return rate


# -----------------------------------------------------------------------------
# processes


def join(settings):
    """Joins torchrun's processes, if any, and resolves 'auto'. settings: device, dtype, param_dtype,
    per_layer (if there is such). Returns as attributes: rank, ranks, device (of this process), device_type,
    compute (the name of the dtype that is computed in)."""
    device, dtype, param_dtype = (settings[key] for key in ('device', 'dtype', 'param_dtype'))
    several = 'RANK' in os.environ
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if not re.fullmatch(r'cpu|cuda(:\d+)?', device):
        fail(f"device={device!r} is not known: set 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device == 'cpu':
        keep_freed_memory()
    elif not torch.cuda.is_available():
        fail(f'device={device!r}, but torch {torch.__version__} finds no CUDA GPU here: set --device=cpu')
    elif several and ':' in device:
        fail(f"device={device!r} is one card for all of torchrun's processes: set 'cuda', and cards by "
             'CUDA_VISIBLE_DEVICES')
    elif several and int(os.environ['LOCAL_RANK']) >= torch.cuda.device_count():
        fail(f'torchrun starts more processes than there are cards: set --nproc_per_node='
             f'{torch.cuda.device_count()}')
    elif several:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if ':' in device:
        torch.cuda.set_device(device)
    if dtype == 'auto' and (param_dtype != 'float32' or device == 'cpu'):
        dtype = param_dtype
    elif dtype == 'auto' and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = 'bfloat16'
    elif dtype == 'auto':  # cards before Ampere; what goes with no GradScaler: see CHECKS
        unscaled = settings.get('per_layer') or settings.get('shard') and settings['split']
        dtype = 'float32' if unscaled else 'float16'
    if several:  # gloo beside nccl carries the stop flag from host to host, without waiting for the GPU
        dist.init_process_group('gloo' if device == 'cpu' else 'cpu:gloo,cuda:nccl',
                                timeout=timedelta(seconds=ANSWER))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    return SimpleNamespace(rank=rank, ranks=ranks, device=device, device_type=device.split(':')[0],
                           compute=dtype)


def keep_freed_memory():
    """Makes glibc keep freed memory. By default every tensor above 32 MB comes as fresh pages, which the
    kernel first has to zero: a quarter of a step of GPT-2 124M with heads on two CPU cores."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


# -----------------------------------------------------------------------------
# what settings say of a model and its optimizer


def put_layers(model, settings, worker=0, workers=1):
    """Puts the low-rank layers that a script's settings ask for into a model, see `apply_mhlora`, and
    returns them, each once, in the order in which their heads are drawn."""
    if not settings['lowrank']:
        return []
    keys = 'heads', 'rank', 'alpha', 'factors', 'split', 'merge_every', 'merge_reset'
    names = apply_mhlora(model, settings['lowrank'].split(','), **{key: settings[key] for key in keys},
                         worker=worker, workers=workers)
    return list(dict.fromkeys(map(model.get_submodule, names)))


def freeze_as_set(model, settings, new=()):
    """Freezes what settings['train'] leaves out, and writes there what 'auto' stands for: 'all', but
    for heads on loaded weights 'factors', or 'classifier' where `new`, kinds of layers, did not come
    with the weights."""
    if settings['train'] == 'auto':
        loaded = settings['init_from'] != 'scratch'
        adapts = settings['lowrank'] and settings['factors'] != 'basis' and loaded
        settings['train'] = ('classifier' if new else 'factors') if adapts else 'all'
    if settings['train'] != 'all':
        freeze_rest(model, new if settings['train'] == 'classifier' else ())


def make_optimizer(model, settings):
    """The optimizer that a script's settings ask for, of a model that `lowrank.put_layers` has seen."""
    s = settings
    common = dict(lr=s['learning_rate'], betas=(s['beta1'], s['beta2']), seed=s['seed'],
                  per_layer=s['per_layer'])
    if s['optimizer'] == 'adamw' or s['lowrank']:
        return LowRankAdamW(model, weight_decay=s['weight_decay'], scale=s['scale'], basis=s['basis'],
                            basis_every=s['basis_every'], state_bits=s['state_bits'],
                            rule='galore' if s['optimizer'] == 'adamw' else s['optimizer'],
                            sync_bits=s['sync_bits'], sync_moments=s['sync_moments'],
                            momentum=s['momentum'], **common)
    groups = param_groups(model, s['weight_decay'], s['rank'], s['basis_every'], s['scale'], s['basis'],
                          rule=s['optimizer'], state_bits=s['state_bits'], momentum=s['momentum'])
    return GaLoreAdamW(groups, **common)


def not_finite(model, optimizer=None):
    """What of a model, and of its optimizer's state, holds inf or nan on any rank, in words; None:
    nothing. Every rank takes part. Waits for the device."""
    found = dict([*model.named_parameters(), *model.named_buffers()])
    if optimizer:
        found |= {f'{key} of {name}': x for p, name in leaf_names(model).items()
                  for key, x in optimizer.state.get(p, {}).items()}
    found = {name: x.detach() for name, x in found.items() if torch.is_tensor(x) and x.is_floating_point()}
    # of one rank a shard may be empty
    largest = torch.stack([torch.linalg.vector_norm(x, math.inf).to(torch.float64) if x.numel() else
                           x.new_zeros((), dtype=torch.float64) for x in map(local, found.values())])
    bad = mean((~largest.isfinite()).to(torch.float32)).tolist()
    return next((name for name, share in zip(found, bad) if share), None)


def assemble(model, shape, optimizer, settings, where, checkpoint=None):
    """
    What a run computes with, as attributes: those of `where` (see `join`); settings, and s, the same as
    attributes; model, shape (what it is built from), optimizer; replicas (see lowrank.replica_parameters);
    scaler; net (the model, compiled or under DDP) and ddp_bytes (that DDP or FSDP2 sends a step, by a ring);
    rows (of a micro-batch, that this rank trains on); heads (how many are split, over all ranks, or 1); saved
    (the step of the last checkpoint, or None). Goes on from a checkpoint, if there is one.
    """
    layers = named_layers(model)
    s = SimpleNamespace(**settings)
    replicas = replica_parameters(model) if s.sync == 'merge' else {}
    scaler = torch.amp.GradScaler(where.device_type, enabled=where.compute == 'float16')
    if checkpoint or s.init_from != 'scratch':
        if checkpoint:
            load_state(model, layers, optimizer, checkpoint, replicas)
            if checkpoint['scaler']:  # empty of a run without float16
                scaler.load_state_dict(checkpoint['scaler'])
        if what := not_finite(model, optimizer if checkpoint else None):
            source = f'{s.out_dir}/ckpt.pt' if checkpoint else s.init_from
            raise ValueError(f"{what} is not finite in '{source}': restore it or choose another")
    if s.sync_bits < 32 and not checkpoint:  # ranks begin alike, so merges send changes from the first on
        for p in replicas.values():
            optimizer.state[p]['common'] = p.detach().clone()
    if s.compile:  # block by block: their code is one, compiled once, and a block steps when it is done
        for part in filter(None, (*model.blocks, getattr(model, 'cross_entropy', None))):
            part.compile(fullgraph=True)
    # what others average, or what differs by rank
    outside = {*optimizer.outside_ddp, *per_rank_tensors(layers.values()), *replicas.values()}
    carried = sum(p.nbytes for p in model.parameters() if p.requires_grad and p not in outside)
    net, ddp_bytes = model, 0
    if any(map(is_sharded, model.parameters())):  # both passes gather what ranks hold; gradients are reduced
        parts = sum((2 + p.requires_grad) * local(p).nbytes for p in model.parameters() if is_sharded(p))
        ddp_bytes = s.gradient_accumulation_steps * (where.ranks - 1) * parts
    elif where.ranks > 1 and carried:
        keep_out_of_ddp(model, {*outside, *model.buffers()})  # buffers are equal, or own: none has to be sent
        device_ids = [torch.device(where.device).index] if where.device_type == 'cuda' else None
        # with the buckets as gradients there is no second copy of them
        net = torch.nn.parallel.DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
        ddp_bytes = 2 * carried * (where.ranks - 1) / where.ranks
    # of this rank's heads, each has its rows together: the layer cuts the batch into equal parts
    heads = s.heads if s.lowrank and s.split else 1
    rows = rows_of(s.batch_size, max(1, heads // where.ranks), where.rank, where.ranks)
    return SimpleNamespace(
        **vars(where), settings=settings, s=s, model=model, shape=shape, optimizer=optimizer, rows=rows,
        replicas=replicas, scaler=scaler, net=net, ddp_bytes=ddp_bytes, heads=heads,
        saved=checkpoint['step'] if checkpoint else None)


def unscale(scaler, optimizer):
    """What was scaled for float16, unscaled. If a gradient of one rank overflows, all ranks skip the step."""
    scaler.unscale_(optimizer)
    if scaler.is_enabled() and dist.is_initialized():
        for found in scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device'].values():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)  # fused Adam takes 1 for yes, and 2 for no


_stop = {}  # the signal that came, 0 for none; empty where none is caught


def catch_signals():
    """From now on a SIGTERM or SIGINT raises a flag, see `stop_requested`; a second one ends at once."""
    def raise_flag(number, frame):
        _stop['signal'] = number
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
    _stop['signal'] = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, raise_flag)


def stop_requested():
    """True on every rank as soon as one of them got a signal. Every rank has to ask."""
    if not _stop or not dist.is_initialized():
        return _stop.get('signal', 0) > 0
    flag = torch.tensor([_stop['signal']])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag.item() > 0


# -----------------------------------------------------------------------------
# the checkpoint: tensors and plain types


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain types, see `replacing`."""
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch's zip writer makes of an OSError
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def save(run, name, about, resumable=False):
    """Writes out_dir/name: the weights, `about` (plain values, the step among them), and, if resumable,
    the rest of the state. Every rank takes part, and rank 0 writes; never what is not finite."""
    optimizer = run.optimizer if resumable else None
    refuse_non_finite(run, about['step'], not_finite(run.model, optimizer))
    found = gather_state(run.model, named_layers(run.model), optimizer, run.replicas)
    if resumable:
        found['scaler'] = run.scaler.state_dict()
        run.saved = about['step']
    if run.rank == 0:
        found.update(settings=run.settings, model_config=run.shape, **about)
        save_checkpoint(f'{run.s.out_dir}/{name}', found)


def load_tensors(path):
    """Tensors and plain types of torch.save, on the CPU, memory-mapped. One process of a host reads all
    of it before, to compare the checksums of its zip. ValueError, FileNotFoundError."""
    if not os.path.isfile(path):
        there = os.path.isfile(os.path.join(os.path.dirname(path), 'ckpt.pt'))
        raise FileNotFoundError(f"there is no checkpoint '{path}': check --out_dir, or train first"
                                + ', or take --checkpoint=ckpt.pt' * there)
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip() if os.environ.get('LOCAL_RANK', '0') == '0' else None
        if damaged:
            raise ValueError(f'the checksum of {damaged} is another')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes fail in any way
        why = said(error)
        if isinstance(error, pickle.UnpicklingError):
            why = 'it holds other objects, and code in a file is not run'
        raise ValueError(f"'{path}' is damaged or no checkpoint of tensors and plain types ({why}): "
                         'restore it or train anew') from error


def as_checkpoint(found, path):
    """What `load_tensors` gave, if `save` wrote it in this format. ValueError: it did not."""
    known = 'format', 'edition'  # as it was called once
    if not isinstance(found, dict) or not found.keys() & {*known}:
        raise ValueError(f"'{path}' is not a checkpoint of this project (it does not say its format): "
                         'check --out_dir')
    if found.get('format') != FORMAT:
        raise ValueError(f"'{path}' was written by another version of this project (format "
                         f"{found.get('format', found.get('edition'))}, here {FORMAT}): go on with "
                         'that version, or train anew')
    return found


def load_checkpoint(path):
    """Reads what `save` wrote, see `load_tensors` and `as_checkpoint`."""
    return as_checkpoint(load_tensors(path), path)


# -----------------------------------------------------------------------------
# a run's folder


RUN_FILES = ('ckpt.pt', 'best.pt', 'confusion.png', 'curve.png', 'log.jsonl', 'config.json')
_locks = []  # the one that this process holds


def unlock():
    """Ends what a run of this process holds: its folder and signals."""
    for lock in _locks:
        lock.release()
    _locks.clear()
    _stop.clear()


def open_run(settings, where, data):
    """What comes before anything is built: ranks whose settings, code or data (a fingerprint) differ are
    refused, out_dir is claimed, and the checkpoint of a run that goes on is read, compared and returned (else
    None). Resolves 'auto' in settings['init_from'] and ['train']. ValueError, OSError: what is wrong."""
    path = os.path.join(settings['out_dir'], 'ckpt.pt')
    if settings['init_from'] == 'auto':  # each rank looks at its own disk
        settings['init_from'] = 'resume' if os.path.exists(path) else 'scratch'
    if where.ranks > 1:
        code = sorted(HERE.glob('*.py')) + [HERE / 'config/__init__.py']
        code = hashlib.sha256(b''.join(path.read_bytes() for path in code)).hexdigest()[:16]
        all_ranks = [None] * where.ranks
        dist.all_gather_object(all_ranks, {**settings, 'data': data, 'code': code})
        for (key, value), (rank, other) in itertools.product(all_ranks[0].items(), enumerate(all_ranks)):
            if other.get(key) != value:
                raise ValueError(f'rank 0 has {key}={value!r} and rank {rank} {other.get(key)!r}: start all '
                                 'ranks with the same settings, code and data')
    if where.rank == 0:
        _claim_folder(settings)
    if where.ranks > 1:
        dist.barrier()
    if settings['init_from'] != 'resume':
        return None
    checkpoint = load_checkpoint(path)
    changed = need_same(settings, checkpoint)
    if checkpoint.get('data', data) != data:
        raise ValueError(f"data set {settings['dataset']!r} is not the one that this run began with: it was "
                         'prepared anew, from other files or in another way')
    if changed and where.rank == 0:
        print(f'resumed with other settings than before: {changed}')
    return checkpoint


def _claim_folder(settings):
    """Makes out_dir and locks it. A fresh run is refused (ValueError) where another one is, unless it is
    to be overwritten, and where files that are no run's of ours (its config.json tells) have the names
    of its own. eval_only changes nothing there."""
    out_dir, source = settings['out_dir'], settings['init_from']

    def refuse(why, other=''):
        raise ValueError(f"out_dir '{out_dir}' {why}: choose another --out_dir{other}") from None
    unlock()  # of a run of this process that ended early
    os.makedirs(out_dir, exist_ok=True)
    if settings['eval_only']:
        return
    lock = locked(f'{out_dir}/.lock')
    if lock is None:
        refuse('is that of another run which is training', ', or wait for it')
    _locks.append(lock)
    held = [name for name in RUN_FILES if os.path.lexists(f'{out_dir}/{name}')]
    if not held or source == 'resume':
        return
    try:
        ours = {'out_dir', 'init_from', 'lowrank'} <= read_json(f'{out_dir}/config.json').keys()
    except (OSError, ValueError):
        ours = False
    if not ours:
        refuse(f'holds {held[0]}, and no config.json of a run of ours')
    if held[0] in RUN_FILES[:2] and not settings['overwrite']:
        go_on = ', go on with it by --init_from=resume' * (held[0] == 'ckpt.pt')
        refuse(f'already holds a run ({held[0]})', f'{go_on}, or replace it by --overwrite=True')
    for name in held:
        if os.path.exists(source) and os.path.samefile(source, f'{out_dir}/{name}'):
            refuse(f'holds {name}, from which this run begins, and which it would replace')


def start_run(settings, step):
    """Writes config.json into the folder that `open_run` has claimed, for a run that begins at `step`. Of a
    resumed one the lines logged after it are dropped; a fresh one removes the old files."""
    paths = {name: os.path.join(settings['out_dir'], name) for name in RUN_FILES}
    held = [path for path in paths.values() if os.path.exists(path)]
    if settings['eval_only'] and settings['wandb_log']:
        raise ValueError('eval_only=True writes no run to wandb: set wandb_log=False')
    if settings['eval_only']:
        if not held:
            write_json(paths['config.json'], settings)
        return
    if settings['wandb_log']:
        try:
            import wandb
        except ImportError:
            raise ValueError('wandb_log=True needs wandb: pip install wandb, or set it to False') from None
        wandb.init(project='nanoLowRank', name=settings['out_dir'], config=settings)
    for path in paths.values():  # config.json is the last: where it is, the rest is known as ours
        if settings['init_from'] != 'resume' and path in held:
            os.remove(path)
    if os.path.exists(paths['log.jsonl']):
        ends = step >= settings['max_iters']  # what is logged again of this step
        again = ['val_loss'] * (ends or step % settings['eval_interval'] == 0) + ['test_loss'] * ends
        with open(paths['log.jsonl'], 'rb') as file:
            lines = [line for line in file if _logged_before(line, step, again)]
        with replacing(paths['log.jsonl']) as file:
            file.writelines(lines)
    write_json(paths['config.json'], settings)


def _logged_before(line, step, again):
    """Whether a line of log.jsonl is whole, and not one that a run from this step on logs again."""
    try:
        record = json.loads(line)
        return record['step'] < step or record['step'] == step and not any(key in record for key in again)
    except (ValueError, KeyError, TypeError, RecursionError):  # a crash cut it
        return False


def refuse_non_finite(run, step, what):
    """Ends the run (exit code 1) if something, in words, is inf or nan, before it gets into a checkpoint."""
    if what:
        good = f'{run.s.out_dir}/ckpt.pt of step {run.saved} is whole'
        raise SystemExit(f'{what} at step {step} is not finite: lower learning_rate or raise warmup_iters; '
                         f"{'no checkpoint was written yet' if run.saved is None else good}")


MAY_CHANGE = set("""
    out_dir init_from overwrite eval_interval eval_iters eval_only log_interval data_dir batch_size
    gradient_accumulation_steps checkpointing dropout learning_rate min_lr epochs max_iters warmup_iters
    rewarm_iters weight_decay beta1 beta2 momentum grad_clip basis basis_every scale per_layer shard
    sync_moments sync_bits device dtype compile wandb_log""".split())


def need_same(settings, checkpoint):
    """Refuses to resume from weights alone, or from other settings than those in MAY_CHANGE; returns in words
    what of these has changed. Where train is 'auto' it becomes what the checkpoint's run made of it."""
    before = checkpoint['settings']
    if 'optimizer' not in checkpoint:
        raise ValueError('ckpt.pt holds weights alone, like best.pt: resume from what the run wrote')
    if settings['train'] == 'auto':
        settings['train'] = before.get('train')
    for key in (key for key in settings if key not in MAY_CHANGE):
        if key not in before:
            raise ValueError(f'the checkpoint was written by another script (it has no setting {key}): check '
                             '--out_dir')
        if settings[key] != before[key]:
            raise ValueError(f'the checkpoint was trained with {key}={before[key]!r}, this run says '
                             f'{settings[key]!r}: resume with the config it was started with')
    old, new = (x['batch_size'] * x['gradient_accumulation_steps'] for x in (before, settings))
    if old != new:  # where the run is in its data is a number of steps
        raise ValueError(f'the checkpoint was trained with {old} rows a step, and batch_size times '
                         f'gradient_accumulation_steps is {new}: set them so that it is the same')
    here = {'out_dir', 'init_from', 'overwrite', 'data_dir', 'device', 'eval_only', 'wandb_log'}
    return ', '.join(f'{key} {before[key]!r} -> {value!r}' for key, value in settings.items()
                     if key not in here and value != before.get(key, value))


# -----------------------------------------------------------------------------
# log


def peak_memory_bytes(device):
    """Peak of the memory allocated on a GPU, or of this process's resident size on a CPU."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists('/proc/self/status'):  # getrusage's peak is also that of this process's parent
        return 1024 * int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def in_units(loss, tokens_per_byte):
    """A loss in nats a token as perplexity, and in bits a byte of the text."""
    return {'perplexity': math.exp(min(loss, 700)), 'bits_per_byte': loss * tokens_per_byte / math.log(2)}


def draw_curve(out_dir):
    """Draws the losses of log.jsonl against steps into curve.png, if there are ten lines of steps or more."""
    records = [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text('utf-8').splitlines()]
    if sum('train_loss' in record for record in records) < 10:
        return False
    from matplotlib.figure import Figure
    figure = Figure((6, 4), layout='constrained')
    axes = figure.subplots()
    for key, marker in (('train_loss', ''), ('val_loss', 'o')):
        some = [record for record in records if key in record]
        axes.plot([record['step'] for record in some], [record[key] for record in some], marker=marker,
                  label=key.replace('_', ' '))
    axes.set(xlabel='step', ylabel='loss')
    axes.legend()
    figure.savefig(os.path.join(out_dir, 'curve.png'), dpi=120)
    return True


class Meter:
    """
    The bookkeeping of a run: what a loop adds up between two lines of the log, and its lines.

    run: from `assemble`; step: where it starts; items: tokens or images of a step, `unit` says which. The sum
    of losses and the last gradient's norm stay on the device: but for merges that draw new heads, and
    float16's scaler, the host waits in `line` only.
    """
    def __init__(self, run, step, items, unit, more=''):

        s, counts = run.s, count_parameters(run.model)
        self.run, self.start, self.items, self.unit = run, step, items, unit
        self.sums, self.traffic = torch.zeros(3, device=run.device), traffic
        total, self.trainable, heads = (counts[key] for key in ('total', 'trainable', 'heads'))
        if run.rank == 0:
            start_run(run.settings, step)
            ranks = f"{run.ranks} rank{'s' * (run.ranks > 1)}"
            print(f'{total:,} parameters, {self.trainable:,} trainable ({heads:,} in heads), {items:,} '
                  f'{unit} a step, {more}{run.device}, {run.compute}, {ranks}')
        self.progress = tqdm(total=s.max_iters, initial=step, unit='step', leave=False,
                             disable=None if run.rank == 0 else True)
        self.restart()

    def restart(self):
        """Forgets what was added up: an evaluation is not a training step."""
        self.sums.zero_()
        self.steps, self.clock, self.sent = 0, time.perf_counter(), self.traffic['bytes']

    def add(self, loss, norm):
        """A step: its loss and the norm of its gradient, tensors; inf is a step that a GradScaler skipped."""
        self.sums[0] += loss
        self.sums[1] = norm
        if self.run.scaler.is_enabled():
            self.sums[2] += ~norm.isfinite()
        self.steps += 1
        self.progress.update()

    def line(self, step, lr):
        """A line of the log on the steps since the last one. Ends the run where something went wrong: what is
        not finite, a float16 run of which every step overflows, parameters that nothing steps on."""
        run, sent = self.run, self.traffic['bytes'] - self.sent
        self.sums[0] /= self.steps
        loss, norm, skipped = mean(self.sums).tolist()  # over all ranks
        dt = (time.perf_counter() - self.clock) / self.steps
        record = {'train_loss': loss, 'lr': lr, 'dt_ms': 1000 * dt, f'{self.unit}_per_s': self.items / dt,
                  'peak_memory_bytes': peak_memory_bytes(run.device), 'gradient_norm': norm,
                  'sync_bytes': round(run.ddp_bytes + sent / self.steps),
                  'trainable_parameters': self.trainable,
                  'optimizer_state_bytes': run.optimizer.state_bytes()}
        if run.scaler.is_enabled():  # it skips steps whose gradients are not finite and lowers its scale
            record.update(skipped_steps=math.ceil(skipped), loss_scale=run.scaler.get_scale())
            if not math.isfinite(norm):
                del record['gradient_norm']
            if record['loss_scale'] < 2**-14:  # thirty in a row, from torch's first scale
                refuse_non_finite(run, step, 'every gradient')
        with refusals():
            check_training(run.model, run.optimizer)
        self.log(step, record)
        self.restart()

    def log(self, step, record):
        """Prints one aligned line above the progress bar, appends the record to out_dir/log.jsonl (of
        eval_only to eval.jsonl), tells wandb. Ends the run where a loss or a norm is not finite."""
        bad = [f'{key} {record[key]}' for key in ('train_loss', 'val_loss', 'test_loss', 'gradient_norm')
               if not math.isfinite(record.get(key, 0))]
        refuse_non_finite(self.run, step, ' and '.join(bad))
        if self.run.rank:
            return
        shown = {'train_loss': 'train {:.4f}', 'val_loss': 'val   {:.4f}', 'test_loss': 'test  {:.4f}',
                 'perplexity': 'perplexity {:.3f}', 'bits_per_byte': '{:.4f} bits a byte',
                 'val_acc': 'accuracy {:.4f}', 'val_auc': 'AUC {:.4f}', 'test_acc': 'accuracy {:.4f}',
                 'test_auc': 'AUC {:.4f}', 'gradient_norm': 'norm {:.2f}', 'dt_ms': '{:8.1f} ms/step',
                 'tokens_per_s': '{:>9,.0f} tokens/s', 'images_per_s': '{:>9,.0f} images/s',
                 'lr': 'lr {:.2e}', 'peak_memory_bytes': 'peak {:.2f} GB', 'skipped_steps': '{} skipped',
                 'loss_scale': 'scale {:.3g}'}
        record = {'step': step, **record}
        words = [form.format(record[key] / 1e9 if key == 'peak_memory_bytes' else record[key])
                 for key, form in shown.items() if key in record]
        self.progress.write(f'step {step:>6} | ' + ' | '.join(words), file=sys.stdout)
        sys.stdout.flush()  # a log in a file is read while it grows
        path = os.path.join(self.run.s.out_dir, 'log.jsonl')
        if self.run.s.eval_only:
            path, record['init_from'] = f'{self.run.s.out_dir}/eval.jsonl', self.run.s.init_from
        try:
            with open(path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
        except OSError as error:
            error.filename = path  # a full disk does not say whose
            raise
        if self.run.s.wandb_log:
            import wandb
            wandb.log(record, step=step)

    def close(self, step, best):
        """The last lines of a run, and the end of what `join` began. best: the best value, in words."""
        s = self.run.s
        self.progress.close()
        if self.run.rank == 0 and step > self.start:  # no best one where a signal came before an evaluation
            so_far = f', {best}' if os.path.exists(f'{s.out_dir}/best.pt') else ''
            print(f'{s.out_dir}/ckpt.pt holds step {self.run.saved}{so_far}; --init_from=resume goes on')
            if draw_curve(s.out_dir):
                print(f'{s.out_dir}/curve.png shows the losses' + (
                    f'; next: python sample.py --out_dir={s.out_dir}, or another file of config/methods and '
                    '--out_dir' if self.unit == 'tokens' else ''))
        elif self.run.rank == 0 and step >= s.max_iters and not s.eval_only:
            print(f"step {step} of {s.max_iters}: nothing to train, raise "
                  f"{'epochs' if self.run.settings.get('epochs') else 'max_iters'} to go on")
        unlock()
        if torch.distributed.is_initialized():
            # gloo's threads let go of a collective's tensors some time after it, and need the lock of Python
            # for it, whose end holds that while it waits for them: it now and then hung (torch 2.13)
            time.sleep(0.1)
            torch.distributed.destroy_process_group()


if __name__ == '__main__':
    fail('run.py is no command: start train_gpt.py, train_llama.py or train_vit.py')
