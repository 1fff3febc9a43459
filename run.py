"""
A run: its processes, its checkpoint, its folder, its log. It has no command of its own:
train_gpt.py, train_llama.py and train_vit.py call it. Nothing here knows a particular model, or
data.

    process = join(settings)                    torchrun's processes, the device, 'auto' resolved
    checkpoint = open_run(settings, process)    out_dir is claimed; what a resumed run goes on from
    run = assemble(model, ...)                  a `Run`: what a step computes with
    start_run(settings, step)                   out_dir is made ready for this run's files
    meter = Meter(run, ...)                     the log
    save(run, 'ckpt.pt', ...)
"""

import ctypes
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import (USES, fail, locked, read_json, refuse_foreign, remove_leftovers, replacing,
                    said, write_json)
from galore import GaLoreAdamW, LowRankAdamW, param_groups
from lowrank import (FrozenLinear, MHLoRALinear, apply_mhlora, check_training, count_parameters,
                     freeze_rest, leaf_names, named_layers, replica_parameters)
from ranks import (FORMAT, gather_state, is_sharded, keep_out_of_ddp, load_state, local, mean,
                   per_rank_tensors, rank_and_world, traffic)

HERE = Path(__file__).parent
TIMEOUT = 1800  # seconds that ranks wait for each other; rank 0 may write 40 GB to a slow disk

# -----------------------------------------------------------------------------
# processes


def join(settings):
    """
    Joins torchrun's processes, if any, and resolves 'auto'.

    settings: device, dtype, param_dtype; for a training also compile, state_bits, per_layer, shard,
    split. Returns as attributes rank, ranks, device (of this process), device_type, and compute
    (the name of the dtype that is computed in).
    """
    device, several = settings['device'], 'RANK' in os.environ
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if not re.fullmatch(r'cpu|cuda(:\d+)?', device):
        fail(f"device={device!r} is not known: set 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device == 'cpu':
        keep_freed_memory()
    elif not torch.cuda.is_available():
        fail(f'device={device!r}, but torch {torch.__version__} finds no CUDA GPU here: set '
             '--device=cpu')
    elif several:
        device = card_of_rank(device)
    elif ':' in device and int(device.split(':')[1]) >= torch.cuda.device_count():
        fail(f'device={device!r}, but the last card here is cuda:{torch.cuda.device_count() - 1}: '
             'set that or one before it')
    if ':' in device:
        torch.cuda.set_device(device)
    compute = dtype_of(settings, device)
    if device != 'cpu':
        check_capability(settings, compute)
    if several:  # gloo beside nccl carries the stop flag, without waiting for the GPU
        backend = 'gloo' if device == 'cpu' else 'cpu:gloo,cuda:nccl'
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    return SimpleNamespace(rank=rank, ranks=ranks, device=device, device_type=device.split(':')[0],
                           compute=compute)


def card_of_rank(device):
    """The card of this one of torchrun's processes."""
    number, cards = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if ':' in device:
        fail(f"device={device!r} is one card for all of torchrun's processes: set 'cuda', and "
             'cards by CUDA_VISIBLE_DEVICES')
    if number >= cards:
        fail(f'torchrun starts more processes than there are cards: set --nproc_per_node={cards}')
    return f'cuda:{number}'


def dtype_of(settings, device):
    """The dtype that is computed in, see the setting dtype."""
    if settings['dtype'] != 'auto':
        return settings['dtype']
    if settings['param_dtype'] != 'float32' or device == 'cpu':
        return settings['param_dtype']
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bfloat16'
    # a card older than Ampere; float16 needs a GradScaler, which these cannot have: config.CHECKS
    unscaled = settings.get('per_layer') or settings.get('shard') and settings['split']
    return 'float32' if unscaled else 'float16'


def check_capability(settings, compute):
    """Refuses what this process's card cannot do, and says what is slow on it."""
    capability = torch.cuda.get_device_capability()
    here = 'this card has {}.{}'.format(*capability)
    # Triton would say so at the first step
    in_bfloat16 = 'bfloat16' in (compute, settings['param_dtype'])
    needed = (8, 0) if in_bfloat16 or settings.get('state_bits') == 16 else (7, 0)
    if settings.get('compile') and capability < needed:
        needed = '8.0 or newer for bfloat16' if needed == (8, 0) else '7.0 or newer'
        fail(f'compile=True needs a card of capability {needed}, and {here}: set --compile=False')
    if compute == 'bfloat16' and capability < (8, 0) and os.environ.get('RANK', '0') == '0':
        print(f'bfloat16 is slow here: cards compute in it from capability 8.0 on, and {here}')


def keep_freed_memory():
    """Makes glibc keep freed memory. By default every tensor above 32 MB comes as fresh pages,
    which the kernel first has to zero: a quarter of a step of GPT-2 124M with heads on two CPU
    cores."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 1 << 26)


_stop = {}  # the signal that came, 0 for none; empty where none is caught


def catch_signals():
    """Makes the first SIGTERM, SIGINT or SIGHUP (of a lost terminal, unless nohup ignores it) only
    raise a flag, see `stop_requested`; one more than ten seconds later ends the process at once.
    Sooner it counts as the same: where a supervisor signals all processes, torchrun passes its own
    on."""
    to_terminal = [number for number in (1, 2) if os.isatty(number)]

    def raise_flag(number, frame):
        if number == signal.SIGHUP:  # to write to a terminal that is gone is an error
            for output in to_terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        now = time.monotonic()
        if now - _stop.setdefault('time', now) > 10:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _stop['signal'] = number
    _stop.clear()
    _stop['signal'] = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, raise_flag)


def stop_requested():
    """True on every rank as soon as one of them got a signal. Every rank has to ask."""
    if not _stop or not dist.is_initialized():
        return _stop.get('signal', 0) > 0
    flag = torch.tensor([_stop['signal']])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag.item() > 0


# -----------------------------------------------------------------------------
# the layers, the frozen weights and the optimizer that settings ask for


def put_layers(model, settings, worker=0, workers=1):
    """Puts the low-rank layers that a script's settings ask for into a model, see `apply_mhlora`,
    and returns them, each once, in the order in which their heads are drawn."""
    if not settings['lowrank']:
        return []
    keys = ('heads', 'rank', 'alpha', 'factors', 'split', 'merge_every', 'merge_reset',
            'frozen_bits', 'param_bits', 'lora_dropout')
    own = {key: settings[key] for key in keys}
    if own['factors'] == 'basis':
        own['alpha'] = None  # it is of heads
    names = apply_mhlora(model, settings['lowrank'].split(','), worker=worker, workers=workers,
                         **own)
    return list(dict.fromkeys(map(model.get_submodule, names)))


def freeze_as_set(model, settings, new=()):
    """Freezes what settings['train'] leaves out. Replaces 'auto' there: by 'all', or for heads on
    loaded weights by 'factors' (if `new` is not empty, by 'classifier'). new: kinds of layers that
    did not come with the weights."""
    if settings['train'] == 'auto':
        loaded = settings['init_from'] != 'scratch'
        adapts = settings['lowrank'] and settings['factors'] != 'basis' and loaded
        settings['train'] = ('classifier' if new else 'factors') if adapts else 'all'
    if settings['train'] != 'all':
        freeze_rest(model, new if settings['train'] == 'classifier' else ())


def make_optimizer(model, settings):
    """Returns the optimizer that a script's settings ask for; call `put_layers` before it."""
    s = SimpleNamespace(**settings)
    is_loaded = s.init_from not in ('scratch', 'resume')
    if s.optimizer == 'muon' and is_loaded and rank_and_world()[0] == 0:
        print('Muon on loaded weights: a model that was trained by Adam loses by it (arXiv '
              '2605.10468), and lora, galore or full would be safer')
    common = dict(lr=s.learning_rate, betas=(s.beta1, s.beta2), seed=s.seed, per_layer=s.per_layer,
                  compile=s.compile)
    replicas = replica_parameters(model).values() if s.sync == 'merge' else ()
    if s.optimizer == 'adamw' or s.lowrank:
        return LowRankAdamW(
            model, weight_decay=s.weight_decay, scale=s.scale, basis=s.basis,
            basis_every=s.basis_every, state_bits=s.state_bits, sync_bits=s.sync_bits,
            rule='galore' if s.optimizer == 'adamw' else s.optimizer,
            sync_moments=s.sync_moments, momentum=s.momentum, replicas=replicas, **common)
    rank = s.rank if 'rank' in USES[s.optimizer] else 0
    groups = param_groups(model, s.weight_decay, rank, s.basis_every, s.scale, s.basis,
                          rule=s.optimizer, state_bits=s.state_bits, momentum=s.momentum)
    # eps is of what has no basis; in one it is 1e-6
    return GaLoreAdamW(groups, eps=1e-8, per_rank=replicas, **common)


@dataclass
class Run:
    """What a training step, an evaluation and a checkpoint compute with. Another model, such as an
    average of weights: dataclasses.replace(run, model=other, net=other), and where sync='merge'
    replicas=replica_parameters(other)."""
    rank: int  # these five are from `join`
    ranks: int
    device: str
    device_type: str
    compute: str
    settings: dict
    s: SimpleNamespace  # the settings as attributes
    model: torch.nn.Module
    shape: dict  # what the model is built from, for the checkpoint
    optimizer: torch.optim.Optimizer
    replicas: dict  # {name: parameter}: each rank trains its own copy, see lowrank.merge
    scaler: torch.amp.GradScaler  # for float16; with other dtypes it does nothing
    net: torch.nn.Module = None  # what a step calls: the model, or DDP around it
    ddp_bytes: float = 0  # bytes that a rank sends in a step by DDP or FSDP2, in a ring
    saved: int = None  # the step of the last checkpoint


def assemble(model, shape, optimizer, settings, process, checkpoint=None):
    """
    Returns the `Run` of a model and an optimizer; it goes on from a checkpoint if one is given.

    shape: see `Run`; process: from `join`. If settings say so it compiles blocks; `averaging` may
    put DDP around the model. ValueError: another model's checkpoint, loaded inf or nan, or a
    parameter that no optimizer steps on.
    """
    s = SimpleNamespace(**settings)
    scales = process.compute == 'float16'
    run = Run(**vars(process), settings=settings, s=s, model=model, shape=shape,
              optimizer=optimizer, scaler=torch.amp.GradScaler(process.device_type, enabled=scales),
              replicas=replica_parameters(model) if s.sync == 'merge' else {})
    if checkpoint:
        load_state(model, named_layers(model), optimizer, checkpoint, run.replicas)
        if checkpoint['scaler']:  # it is empty if the run had no float16
            run.scaler.load_state_dict(checkpoint['scaler'])
        run.saved = checkpoint['step']
    elif s.sync_bits < 32:  # ranks begin with equal weights: even the first merge sends changes
        for p in run.replicas.values():
            optimizer.state[p]['common'] = p.detach().clone()
    if checkpoint or s.init_from != 'scratch':
        if what := not_finite(model, optimizer if checkpoint else None):
            source = f'{s.out_dir}/ckpt.pt' if checkpoint else s.init_from
            raise ValueError(f"{what} is not finite in '{source}': restore it or choose another")
        if run.ranks > 1:  # nodes may have files of their own under one name
            compare_ranks({'step': run.saved, **sums_of_bits(run)}, run.ranks)
    if s.compile:  # block by block: all share one code, and per_layer steps after each block
        for part in filter(None, (*model.blocks, getattr(model, 'cross_entropy', None))):
            part.compile(fullgraph=True)
    check_training(model, optimizer)
    run.net, run.ddp_bytes = averaging(run)
    return run


def sums_of_bits(run):
    """{name: the sum of a tensor's bits, as integers} of the weights that all ranks have alike."""
    own = per_rank_tensors(named_layers(run.model).values())
    if run.saved is not None:
        own |= {*run.replicas.values()}
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    alike = {name: x.detach().contiguous().view(integers[x.element_size()])
             for name, x in [*run.model.named_parameters(), *run.model.named_buffers()]
             if x not in own and not is_sharded(x)}
    if not alike:
        return {}
    # integers add up alike in any order, as on cards of two kinds
    sums = torch.stack([x.sum(dtype=torch.int64) for x in alike.values()])
    return {f'the bits of {name}': number for name, number in zip(alike, sums.tolist())}


def averaging(run):
    """(net, bytes). net: the model, or DDP around it, which averages gradients over ranks; bytes:
    how many each rank sends in a step by DDP, or by FSDP2's gathering and reducing."""
    model, others = run.model, run.ranks - 1
    if any(map(is_sharded, model.parameters())):  # two passes gather weights, one reduces gradients
        sent = sum((2 + p.requires_grad) * local(p).nbytes for p in model.parameters()
                   if is_sharded(p))
        return model, run.s.gradient_accumulation_steps * others * sent
    # what the optimizer or a merge averages, or what differs by rank
    outside = {*run.optimizer.outside_ddp, *run.replicas.values(),
               *per_rank_tensors(named_layers(model).values())}
    sent = sum(p.nbytes for p in model.parameters() if p.requires_grad and p not in outside)
    if run.ranks == 1 or not sent:
        return model, 0
    keep_out_of_ddp(model, {*outside, *model.buffers()})  # buffers are equal, or differ by rank
    cards = [torch.device(run.device).index] if run.device_type == 'cuda' else None
    # with the buckets as gradients there is no second copy of them
    net = torch.nn.parallel.DistributedDataParallel(model, cards, gradient_as_bucket_view=True)
    return net, 2 * sent * others / run.ranks


def not_finite(model, optimizer=None):
    """Returns the name of the first tensor of a model, or of its optimizer's state, that holds inf
    or nan on any rank; None: there is none. Every rank takes part. Waits for the device."""
    found = dict([*model.named_parameters(), *model.named_buffers()])
    if optimizer:
        found |= {f'{key} of {name}': x for p, name in leaf_names(model).items()
                  for key, x in optimizer.state.get(p, {}).items()}
    found = {name: local(x.detach()) for name, x in found.items()
             if torch.is_tensor(x) and x.is_floating_point()}
    zero = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    largest = [torch.linalg.vector_norm(x, math.inf).to(torch.float64) if x.numel() else zero
               for x in found.values()]  # of one rank a shard may be empty
    bad = ~torch.stack(largest).isfinite()
    bad = mean(bad.to(torch.float32)).tolist()
    return next((name for name, share in zip(found, bad) if share), None)


# -----------------------------------------------------------------------------
# parts of a training step


def set_learning_rate(optimizer, settings, step):
    """Sets and returns the learning rate of a step: linear warm-up, then cosine to min_lr at
    max_iters. After a merge that resets, the rate begins at 1 / (rewarm_iters + 1) of this curve,
    and climbs back to it within rewarm_iters steps (ReLoRA, section 3)."""
    s = SimpleNamespace(**settings)
    if step < s.warmup_iters:
        rate = s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    else:
        progress = min((step - s.warmup_iters) / max(s.max_iters - s.warmup_iters, 1), 1.0)
        height = 0.5 * (1.0 + math.cos(math.pi * progress))  # from 1 to 0
        rate = s.min_lr + height * (s.learning_rate - s.min_lr)
    if s.merge_reset and step >= s.merge_every:
        rate *= min((step % s.merge_every + 1) / (s.rewarm_iters + 1), 1.0)
    for group in optimizer.param_groups:
        group['lr'] = rate
    return rate


def unscale(scaler, optimizer):
    """Divides gradients by the GradScaler's scale, for float16. If a gradient of one rank
    overflows, all ranks skip the step."""
    scaler.unscale_(optimizer)
    if scaler.is_enabled() and dist.is_initialized():
        state = scaler._per_optimizer_states[id(optimizer)]  # it has no public name
        for found in state['found_inf_per_device'].values():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)  # fused Adam takes 1 for yes, 2 for no


# -----------------------------------------------------------------------------
# the checkpoint: tensors and plain types


def save(run, name, about, resumable=False):
    """Writes out_dir/name: the weights, `about` (plain values, the step among them), and, if
    resumable, the rest of the state. Every rank takes part, and rank 0 writes. If something to
    write is not finite, it ends the run instead."""
    optimizer = run.optimizer if resumable else None
    refuse_non_finite(run, about['step'], not_finite(run.model, optimizer))
    found = gather_state(run.model, named_layers(run.model), optimizer, run.replicas)
    if resumable:
        found['scaler'] = run.scaler.state_dict()
        run.saved = about['step']
    if run.rank == 0:
        found.update(settings=run.settings, model_config=run.shape, **about)
        save_checkpoint(f'{run.s.out_dir}/{name}', found)


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain types, see `config.replacing`."""
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch's zip writer makes of an OSError
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_tensors(path):
    """Returns tensors and plain types that torch.save wrote, memory-mapped on the CPU. First, one
    process of a machine compares the checksums of the zip. ValueError, FileNotFoundError."""
    if not os.path.isfile(path):
        hint = 'check --out_dir, or train first'
        if os.path.isfile(os.path.join(os.path.dirname(path), 'ckpt.pt')):
            hint += ', or take ckpt.pt beside it'
        raise FileNotFoundError(f"there is no checkpoint '{path}': {hint}")
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
        raise ValueError(f"'{path}' is damaged or no checkpoint of tensors and plain types "
                         f'({why}): restore it or train anew') from error


def as_checkpoint(found, path):
    """What `load_tensors` gave, if `save` wrote it in this format. ValueError: it did not."""
    if not isinstance(found, dict) or 'format' not in found:
        raise ValueError(f"'{path}' is not a checkpoint of this project (it does not say its "
                         'format): check --out_dir')
    if found['format'] != FORMAT:
        raise ValueError(f"'{path}' was written by another version of this project (format "
                         f"{found['format']}, here {FORMAT}): go on with that version, or train "
                         'anew')
    return found


def load_checkpoint(path):
    """Reads what `save` wrote, see `load_tensors` and `as_checkpoint`."""
    return as_checkpoint(load_tensors(path), path)


def refuse_non_finite(run, step, what):
    """Ends the run (exit code 1) if something, in words, is inf or nan, before it gets into a
    checkpoint."""
    if not what:
        return
    stands, mend = 'no checkpoint was written yet', 'lower learning_rate or raise warmup_iters'
    if run.saved is not None:
        stands = f'{run.s.out_dir}/ckpt.pt of step {run.saved} is whole'
    if step == 0 or run.s.eval_only:
        mend = 'the weights are finite, so set another dtype'
    raise SystemExit(f'{what} at step {step} is not finite: {mend}; {stands}')


# -----------------------------------------------------------------------------
# a run's folder

RUN_FILES = 'ckpt.pt', 'best.pt', 'confusion.png', 'curve.png', 'log.jsonl', 'config.json'
# settings that a resumed run may change. One that older checkpoints lack has to be here, or they
# are refused
MAY_CHANGE = set("""
    out_dir init_from overwrite eval_interval eval_iters eval_only log_interval data_dir batch_size
    gradient_accumulation_steps checkpointing dropout lora_dropout learning_rate min_lr epochs
    max_iters warmup_iters rewarm_iters weight_decay beta1 beta2 momentum grad_clip basis
    basis_every scale per_layer shard sync_moments sync_bits device dtype compile
    wandb_log""".split())
LEFTOVER = re.compile(rf"({'|'.join(map(re.escape, RUN_FILES))})\.[0-9a-f]{{8}}\.tmp")  # of a kill
TOKENIZER = '.tokenizer_of_nanolowrank'  # marks out_dir/tokenizer as written by a run
# changes of these are not printed where a run resumes
NOT_REPORTED = {'out_dir', 'init_from', 'overwrite', 'data_dir', 'device', 'eval_only', 'wandb_log'}
_locks = []  # the one that this process holds


def open_run(settings, process):
    """
    Begins a run, before data are read and anything is built: refuses ranks whose settings or code
    differ, claims out_dir, and returns the checkpoint of a resumed run (else None), if its settings
    fit. Replaces 'auto' in settings['init_from'], and in a resumed run in settings['train'].
    ValueError, OSError: what is wrong.
    """
    path = os.path.join(settings['out_dir'], 'ckpt.pt')
    if settings['init_from'] == 'auto':  # each rank looks at its own disk
        settings['init_from'] = 'resume' if os.path.exists(path) else 'scratch'
    if process.ranks > 1:
        # dtype='auto' may become another dtype on another rank's card
        compare_ranks({**settings, 'dtype': process.compute, 'code': fingerprint_of_code()},
                      process.ranks)
    if process.rank == 0:
        claim_folder(settings)
    if process.ranks > 1:
        dist.barrier()
    if settings['init_from'] != 'resume':
        return None
    checkpoint = load_checkpoint(path)
    changed = refuse_other_settings(settings, checkpoint)
    other_rows = evaluated_rows(settings) != evaluated_rows(checkpoint['settings'])
    if other_rows and not settings['eval_only']:
        changed += '; best.pt begins anew, as another part of the text is evaluated'
        checkpoint['best_val_loss'] = math.inf
    if changed and process.rank == 0:
        print(f'resumed with other settings than before: {changed}')
    return checkpoint


def evaluated_rows(settings):
    """How many rows of text an evaluation takes; None of images, where it takes all."""
    return settings['eval_iters'] * settings['batch_size'] if 'eval_iters' in settings else None


def refuse_other_data(data, settings, process, checkpoint):
    """ValueError: data (a fingerprint) differ between ranks, or from those of the resumed run."""
    if process.ranks > 1:
        compare_ranks({'data': data}, process.ranks)
    if checkpoint and checkpoint.get('data', data) != data:
        raise ValueError(f"data set {settings['dataset']!r} is not the one that this run began "
                         'with: it was prepared anew, from other files or in another way')


def fingerprint_of_code():
    code = [*sorted(HERE.glob('*.py')), HERE / 'config/__init__.py']
    return hashlib.sha256(b''.join(path.read_bytes() for path in code)).hexdigest()[:16]


def compare_ranks(values, ranks):
    """ValueError: not all ranks have the same values."""
    all_ranks = [None] * ranks
    dist.all_gather_object(all_ranks, values)
    for key, value in all_ranks[0].items():
        for rank, other in enumerate(all_ranks):
            if other.get(key) != value:
                raise ValueError(f'rank 0 has {key}={value!r} and rank {rank} {other.get(key)!r}: '
                                 'start all ranks with the same settings, code, data and weights')


def claim_folder(settings):
    """Makes out_dir and locks it; with eval_only it only makes it. ValueError: another run trains
    there; or a fresh run would replace another run without `overwrite`, the file that it begins
    from, or files that no run of ours wrote (its config.json would tell)."""
    out_dir, source = settings['out_dir'], settings['init_from']
    unlock()  # of a run of this process that ended early
    os.makedirs(out_dir, exist_ok=True)
    if settings['eval_only']:
        return
    lock = locked(f'{out_dir}/.lock')
    if lock is None:
        raise ValueError(f"out_dir '{out_dir}' is that of another run which is training: choose "
                         'another --out_dir, or wait for it')
    _locks.append(lock)
    is_text, tokenizer = 'block_size' in settings, Path(out_dir, 'tokenizer')
    if is_text:  # removes what a kill has left, or refuses it before anything is lost
        remove_leftovers(tokenizer, TOKENIZER)
    if source == 'resume':
        return
    if is_text:
        refuse_foreign(tokenizer, TOKENIZER)
    held = [name for name in RUN_FILES if os.path.lexists(f'{out_dir}/{name}')]
    if not held:
        return
    if not is_run(out_dir):
        raise ValueError(f"out_dir '{out_dir}' holds {held[0]}, and no config.json of a run of "
                         'ours: choose another --out_dir')
    if held[0] in ('ckpt.pt', 'best.pt') and not settings['overwrite']:
        ways = 'choose another --out_dir, or replace it by --overwrite=True'
        if held[0] == 'ckpt.pt':
            ways = ('choose another --out_dir, go on with it by --init_from=resume, or replace it '
                    'by --overwrite=True')
        raise ValueError(f"out_dir '{out_dir}' already holds a run ({held[0]}): {ways}")
    for name in held:
        if os.path.exists(source) and os.path.samefile(source, f'{out_dir}/{name}'):
            raise ValueError(f"out_dir '{out_dir}' holds {name}, from which this run begins, and "
                             'which it would replace: choose another --out_dir')


def is_run(folder):
    """Whether a folder's config.json is that of a run."""
    try:
        found = read_json(f'{folder}/config.json')
    except (OSError, ValueError):
        return False
    return {'out_dir', 'init_from', 'lowrank'} <= found.keys()


def unlock():
    """Releases the folder that a run of this process has locked, and clears its stop flag."""
    for lock in _locks:
        lock.release()
    _locks.clear()
    _stop.clear()


def refuse_other_settings(settings, checkpoint):
    """Refuses (ValueError) to resume from weights alone, or with a changed setting that is not in
    MAY_CHANGE; returns in words which others have changed. If train is 'auto', or documents None,
    it gets the value of the checkpoint's run."""
    before = checkpoint['settings']
    if 'optimizer' not in checkpoint:
        raise ValueError('ckpt.pt holds weights alone, like best.pt: resume from what the run '
                         'wrote')
    if settings['train'] == 'auto':
        settings['train'] = before.get('train')
    if settings.get('documents', True) is None:
        settings['documents'] = before.get('documents')
    for key in settings.keys() - before.keys() - MAY_CHANGE:
        raise ValueError(f'the checkpoint was written by another script, or before there was a '
                         f'setting {key}: check --out_dir, or add it to MAY_CHANGE in run.py')
    changed = [key for key, value in settings.items() if value != before.get(key, value)]
    for key in changed:
        if key not in MAY_CHANGE:
            raise ValueError(f'the checkpoint was trained with {key}={before[key]!r}, this run '
                             f'says {settings[key]!r}: resume with the config it was started with')
    old, new = (x['batch_size'] * x['gradient_accumulation_steps'] for x in (before, settings))
    if old != new:  # a checkpoint knows its place in the data as a number of steps only
        raise ValueError(f'the checkpoint was trained with {old} rows a step, and batch_size times '
                         f'gradient_accumulation_steps is {new}: set them so that it is the same')
    if settings.get('epochs'):  # the script works out max_iters from epochs, later
        changed = [key for key in changed if key != 'max_iters']
    return ', '.join(f'{key} {before[key]!r} -> {settings[key]!r}' for key in changed
                     if key not in NOT_REPORTED)


def start_run(settings, step):
    """Writes config.json into the folder that `open_run` has claimed, for a run that begins at
    `step`. A resumed run drops the lines of the log that it will log again; a fresh one removes the
    old files. With eval_only nothing that is there changes."""
    paths = {name: os.path.join(settings['out_dir'], name) for name in RUN_FILES}
    held = [path for path in paths.values() if os.path.exists(path)]
    if settings['eval_only']:
        if not held:
            write_json(paths['config.json'], settings)
        return
    if settings['wandb_log']:
        import wandb
        wandb.init(project='nanoLowRank', name=settings['out_dir'], config=settings)
    if is_run(settings['out_dir']):
        for name in filter(LEFTOVER.fullmatch, os.listdir(settings['out_dir'])):
            os.remove(os.path.join(settings['out_dir'], name))
    if settings['init_from'] != 'resume':
        for path in held:  # config.json is the last: where it is, the rest is known as ours
            os.remove(path)
    if os.path.exists(paths['log.jsonl']):
        ends = step >= settings['max_iters']
        again = ends or step % settings['eval_interval'] == 0  # this step is evaluated again
        with open(paths['log.jsonl'], 'rb') as file:
            lines = [line for line in file if was_logged_before(line, step, again, ends)]
        with replacing(paths['log.jsonl']) as file:
            file.writelines(lines)
    write_json(paths['config.json'], settings)


def was_logged_before(line, step, again, ends):
    """Whether a line of log.jsonl is whole, and a run from this step on does not log it again.
    again: the run evaluates this step again; ends: the run ends here, and tests again."""
    try:
        record = json.loads(line)
        if record['step'] == step and 'test_loss' in record:
            return not ends
        if record['step'] == step and 'train_loss' not in record:
            return not again
        return record['step'] <= step
    except (ValueError, KeyError, TypeError, RecursionError):  # a crash cut it
        return False


# -----------------------------------------------------------------------------
# the log

SHOWN = {  # of a record, in this order
    'train_loss': 'train {:.4f}', 'val_loss': 'val   {:.4f}', 'test_loss': 'test  {:.4f}',
    'perplexity': 'perplexity {:.3f}', 'bits_per_byte': '{:.4f} bits a byte',
    'val_acc': 'accuracy {:.4f}', 'val_auc': 'AUC {:.4f}', 'test_acc': 'accuracy {:.4f}',
    'test_auc': 'AUC {:.4f}', 'gradient_norm': 'norm {:.2f}', 'dt_ms': '{:8.1f} ms/step',
    'tokens_per_s': '{:>9,.0f} tokens/s', 'images_per_s': '{:>9,.0f} images/s', 'lr': 'lr {:.2e}',
    'mfu': 'MFU {:.1%}', 'peak_memory_gb': 'peak {:.2f} GB', 'skipped_steps': '{} skipped',
    'loss_scale': 'scale {:.3g}', 'kept_bases': '{} bases kept'}
SILENT = {'peak_memory_bytes', 'sync_bytes', 'parameters', 'trainable_parameters',
          'optimizer_state_bytes'}


# peak of a card's matrix products in operations a second, dense, with float32 sums, by vendors'
# data sheets: in bfloat16, in float16. The first one whose words are in the card's name counts
PEAKS = {
    'H200': (989e12, 989e12), 'H100 PCIe': (756e12, 756e12), 'H100': (989e12, 989e12),
    'A100': (312e12, 312e12), 'L40S': (362e12, 362e12), 'L4': (121e12, 121e12),
    'A10': (125e12, 125e12), 'RTX 4090': (165e12, 165e12), 'RTX 3090': (71e12, 71e12),
    'RTX 3060': (25.6e12, 25.6e12), 'T4': (None, 65e12), 'V100-SXM2': (None, 125e12)}
OTHER_CARDS = r'\b(Ti|D|SUPER|Laptop|NVL|MIG)\b'  # have such a name, and another peak


def peak_of(card, dtype):
    """The peak of a card of that name in a dtype, see PEAKS; None: not known."""
    known = [peaks for words, peaks in PEAKS.items() if re.search(rf'\b{words}\b', card)]
    if not known or dtype not in ('bfloat16', 'float16') or re.search(OTHER_CARDS, card):
        return None
    return known[0][dtype == 'float16']


def operations_of(model, length, width):
    """
    Operations of all matrix products of a training step for one token; a row has `length` tokens.

    A trained weight of a linear layer needs 6 for each number; a frozen one 4, as no product gives
    its gradient. Heads need 6 for each number that a token meets, GaLore's projection 2. Attention,
    of `width`, needs 12 length width in each block, as nanoGPT counts it. Not counted: what
    checkpointing computes again, tables of embeddings, optimizers.
    """
    found = 12 * len(model.blocks) * length * width
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, FrozenLinear)):
            m, n = layer.out_features, layer.in_features
            found += (6 if layer.weight.requires_grad else 4) * m * n
        if isinstance(layer, MHLoRALinear):
            rank = layer.rank if layer.split else layer.heads * layer.rank
            found += (2 if layer.moves_weight else 6) * rank * (m + n)
    return found


class Meter:
    """
    A meter adds up what happens between two lines of the log, and writes the lines.

    run: from `assemble`; step: where it starts; items: how many tokens or images (unit: which) a
    step has; operations: of one item, see `operations_of`. If the card's peak is known, the log has
    the MFU: operations as a share of the peak (Chowdhery et al., arXiv 2204.02311). Sums stay on
    the device: the host waits in `line`, in merges that draw heads, and for float16's scaler.
    """

    def __init__(self, run, step, items, unit, more='', operations=0):
        counts = count_parameters(run.model)
        peak = None
        if run.device_type == 'cuda':
            peak = peak_of(torch.cuda.get_device_name(run.device), run.compute)
        # seconds of a step at the peak of all cards
        self.fastest = items * operations / peak / run.ranks if peak else 0
        self.run, self.start, self.items, self.unit = run, step, items, unit
        self.total, self.trainable = counts['total'], counts['trainable']
        self.has_logged = False
        # losses, the last norm, skipped steps, bases that were not taken
        self.sums = torch.zeros(4, device=run.device)
        if run.rank == 0:
            ranks = '1 rank' if run.ranks == 1 else f'{run.ranks} ranks'
            print(f"{self.total:,} parameters, {self.trainable:,} trainable "
                  f"({counts['heads']:,} in heads), {items:,} {unit} a step, {more}{run.device}, "
                  f'{run.compute}, {ranks}')
            if run.s.warmup_iters > run.s.max_iters:
                print(f'warmup_iters={run.s.warmup_iters} is above max_iters={run.s.max_iters}: '
                      f'learning_rate={run.s.learning_rate:g} is never reached')
        # None: where nobody looks at a terminal there is no bar
        self.progress = tqdm(total=run.s.max_iters, initial=step, unit='step', leave=False,
                             disable=None if run.rank == 0 else True)
        self.restart()

    def restart(self):
        """Forgets what was added up: an evaluation is not a training step."""
        self.sums.zero_()
        self.steps, self.clock, self.sent = 0, time.perf_counter(), traffic['bytes']

    def add(self, loss, norm):
        """Adds a step: its loss and the norm of its gradient, tensors. With a GradScaler, a norm
        that is not finite counts as a skipped step."""
        self.sums[0] += loss
        self.sums[1] = norm
        if self.run.scaler.is_enabled():
            self.sums[2] += ~norm.isfinite()
        self.steps += 1
        self.progress.update()

    def line(self, step, lr):
        """Logs one line about the steps since the last line. Ends the run if a loss or a norm is
        not finite, or if every step of a float16 run overflows."""
        run, sent = self.run, traffic['bytes'] - self.sent
        self.sums[0] /= self.steps
        self.sums[3].fill_(run.optimizer.kept_bases)  # an assigned number would come from the CPU
        loss, norm, skipped, kept = mean(self.sums).tolist()  # over all ranks
        seconds = (time.perf_counter() - self.clock) / self.steps
        record = {'train_loss': loss, 'lr': lr, 'dt_ms': 1000 * seconds,
                  f'{self.unit}_per_s': self.items / seconds,
                  'peak_memory_bytes': peak_memory_bytes(run.device), 'gradient_norm': norm,
                  'sync_bytes': round(run.ddp_bytes + sent / self.steps),
                  'parameters': self.total, 'trainable_parameters': self.trainable,
                  'optimizer_state_bytes': run.optimizer.state_bytes()}
        if run.s.per_layer:  # each layer has stepped already, and dropped its gradient
            del record['gradient_norm']
        if self.fastest:
            record['mfu'] = self.fastest / seconds
        if kept:  # refreshes since the run began whose sketch was not finite, or zero
            record['kept_bases'] = math.ceil(kept)
        if run.scaler.is_enabled():  # it skips steps that are not finite, and lowers its scale
            record.update(skipped_steps=math.ceil(skipped), loss_scale=run.scaler.get_scale())
            if not math.isfinite(norm):
                del record['gradient_norm']
            if record['loss_scale'] < 2**-14:  # 31 skipped in a row, from torch's first scale
                refuse_non_finite(run, step, 'every gradient')
        self.log(step, record)
        self.restart()

    def log(self, step, record):
        """Prints one aligned line above the progress bar, appends the record to out_dir/log.jsonl
        (of eval_only to eval.jsonl), tells wandb. Ends the run where a loss or a norm is not
        finite."""
        keys = 'train_loss', 'val_loss', 'test_loss', 'gradient_norm'
        bad = [f'{key} {record[key]}' for key in keys if not math.isfinite(record.get(key, 0))]
        refuse_non_finite(self.run, step, ' and '.join(bad))
        self.has_logged = True
        if self.run.rank:
            return
        shown = {**record, 'peak_memory_gb': record.get('peak_memory_bytes', 0) / 1e9}
        if 'peak_memory_bytes' not in record:
            del shown['peak_memory_gb']
        words = [form.format(shown[key]) for key, form in SHOWN.items() if key in shown]
        words += [f'{key} {value}' for key, value in record.items()
                  if key not in SHOWN and key not in SILENT and not isinstance(value, list)]
        self.progress.write(f'step {step:>6} | ' + ' | '.join(words), file=sys.stdout)
        sys.stdout.flush()  # a log in a file is read while it grows
        s, record = self.run.s, {'step': step, **record}
        path = f'{s.out_dir}/log.jsonl'
        if s.eval_only:
            path, record['init_from'] = f'{s.out_dir}/eval.jsonl', s.init_from
        try:
            with open(path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
        except OSError as error:
            error.filename = path  # a full disk does not say whose
            raise
        if s.wandb_log:
            import wandb
            wandb.log(record, step=step)

    def close(self, step, best):
        """Prints the last lines of a run, draws its curve, and ends what `open_run` and `join`
        began. best: the best value, in words, '' before a first evaluation."""
        s = self.run.s
        longer = 'epochs' if self.run.settings.get('epochs') else 'max_iters'
        self.progress.close()
        if self.run.rank == 0 and step > self.start:
            words = f'{s.out_dir}/ckpt.pt holds step {self.run.saved}'
            if best and os.path.exists(f'{s.out_dir}/best.pt'):
                words += f', {best}'
            more = f', with more {longer},' if step >= s.max_iters else ''
            print(f'{words}; --init_from=resume{more} goes on')
            if draw_curve(s.out_dir):
                print(f'{s.out_dir}/curve.png shows the losses')
            if self.unit == 'tokens':
                which = '' if os.path.exists(f'{s.out_dir}/best.pt') else ' --checkpoint=ckpt.pt'
                print(f'next: python sample.py --out_dir={s.out_dir}{which}, or another file of '
                      'config/methods and --out_dir')
        elif self.run.rank == 0 and step >= s.max_iters and not s.eval_only:
            print(f'step {step} of {s.max_iters}: nothing to train, raise {longer} to go on')
        elif self.run.rank == 0 and not s.eval_only:
            print(f'stopped before step {step} was trained: nothing new to save')
        elif self.run.rank == 0 and not self.has_logged:
            print('stopped before the evaluation ended: nothing is known')
        unlock()
        if dist.is_initialized():
            # gloo's threads free a collective's tensors some time after it, and need Python's lock
            # for that. At its end Python holds this lock and waits for them: without a pause it now
            # and then hung (torch 2.13)
            time.sleep(0.1)
            dist.destroy_process_group()


def peak_memory_bytes(device):
    """Peak of the memory allocated on a GPU, or of this process's resident size on a CPU."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    status = Path('/proc/self/status')  # getrusage's peak is also that of the parent
    text = status.read_text() if status.exists() else ''
    if kilobytes := re.search(r'VmHWM:\s*(\d+)', text):  # some sandboxes do not say it
        return 1024 * int(kilobytes[1])
    import resource  # Windows has none
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def in_units(loss, tokens_per_byte):
    """A loss in nats a token as perplexity, and in bits a byte of the text."""
    bits = loss * tokens_per_byte / math.log(2)
    return {'perplexity': math.exp(min(loss, 700)), 'bits_per_byte': bits}


def draw_curve(out_dir):
    """Draws the losses of log.jsonl against steps into curve.png, if there are ten lines of steps
    or more, and returns whether it did."""
    lines = Path(out_dir, 'log.jsonl').read_text('utf-8').splitlines()
    records = [json.loads(line) for line in lines]
    if sum('train_loss' in record for record in records) < 10:
        return False
    from matplotlib.figure import Figure  # it takes half a second
    figure = Figure((6, 4), layout='constrained')
    axes = figure.subplots()
    for key, marker, label in (('train_loss', '', 'train loss'), ('val_loss', 'o', 'val loss')):
        some = [record for record in records if key in record]
        steps = [record['step'] for record in some]
        axes.plot(steps, [record[key] for record in some], marker=marker, label=label)
    axes.set(xlabel='step', ylabel='loss')
    axes.legend()
    with replacing(os.path.join(out_dir, 'curve.png')) as file:
        figure.savefig(file, format='png', dpi=120)
    return True


if __name__ == '__main__':
    fail('run.py is no command: start train_gpt.py, train_llama.py or train_vit.py')
