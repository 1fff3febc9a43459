"""
A run: its settings, its processes, its checkpoint, its log. Functions only; nothing here knows of models or data.

Settings are the plain global names at the top of a script; `python train_x.py config/y.py --key=value` runs the
file with the script's defaults visible, then the command line wins. torch is imported inside the functions that
need it, so that a typo answers at once.
"""

import ast
import contextlib
import difflib
import json
import math
import os
import re
import signal
import sys
import time

# -----------------------------------------------------------------------------
# mistakes: one sentence, exit code 2


def fail(sentence):
    """Says what is wrong and what to do (once a machine) and ends the process with exit code 2."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {sentence}', file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def refusals():
    """While a run is set up, what the rooms (ValueError) or the disk (OSError) refuse is the user's to mend: `fail`."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


# -----------------------------------------------------------------------------
# settings


def defaults(namespace):
    """The settings of a script: every plain global (None, bool, int, float, str, tuple) defined so far."""
    return {key: value for key, value in namespace.items()
            if not key.startswith('_') and isinstance(value, (type(None), bool, int, float, str, tuple))}


def load(namespace, known, argv):
    """
    Resolves the settings of a script and writes them into its globals.

    namespace: the script's globals(); known: its `defaults`; argv: config files and --key=value, in any order.
    Returns the resolved settings as a dict. Unknown keys and wrong types end the process with exit code 2.
    """
    settings = dict(known)
    if '--help' in argv:
        print(namespace['__doc__'].strip(), '', *(f'--{key}={value!r}' for key, value in known.items()), sep='\n')
        raise SystemExit(0)
    for path in (word for word in argv if not word.startswith('--')):
        if not os.path.isfile(path):
            fail(f"config file '{path}' is not there: give a file such as config/quickstart.py, or --key=value with "
                 "a '='")
        scope = dict(settings)  # a file sees the settings so far, so it can compute with them
        try:
            with open(path, encoding='utf-8') as file:
                exec(compile(file.read(), path, 'exec'), scope)
        except Exception as error:  # it is the user's program, and may fail in any way
            fail(f"config file '{path}' does not run ({type(error).__name__}: {error}): correct it")
        plain = defaults(scope)  # functions, modules, lists of other names only help to compute
        for key, value in scope.items():
            if key in plain or key in known:
                settings[key] = _checked(known, key, value, f'in {path}')
    for word in (word for word in argv if word.startswith('--')):
        key, equals, text = word[2:].partition('=')
        if not equals:
            fail(f"'{word}' has no value: write --{key}={True if isinstance(known.get(key), bool) else 'value'}")
        settings[key] = _checked(known, key, _parse(text, known.get(key)), 'on the command line')
    namespace.update(settings)
    return settings


def _parse(text, default):
    """The value that a command line's text means; text that is no Python literal is a string."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if isinstance(default, str) and not isinstance(value, str) else value  # --out_dir=7 is a name


def _checked(known, key, value, where):
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
        fail(f"unknown setting '{key}' {where}: did you mean '{near}'?")
    wanted, seen = type(known[key]), type(value)
    if wanted is float and seen is int:
        return float(value)
    if known[key] is None:  # such a default is worked out later, and is a whole number in the end
        wanted = int if value is not None else seen
    if wanted is not seen:
        fail(f'setting {key}={value!r} {where} is of type {seen.__name__}, but {wanted.__name__} is needed, '
             f"such as {1 if known[key] is None else repr(known[key])}")
    return value


LEAST = dict.fromkeys((
    'eval_interval', 'eval_iters', 'log_interval', 'batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer',
    'n_head', 'n_kv_head', 'n_embd', 'n_mlp', 'vocab_size', 'img_size', 'patch_size', 'heads', 'galore_rank',
    'galore_gap', 'num_samples', 'max_new_tokens'), 1) | dict.fromkeys((
        'seed', 'dropout', 'learning_rate', 'min_lr', 'max_iters', 'epochs', 'warmup_iters', 'rewarm_iters',
        'weight_decay', 'grad_clip', 'top_k', 'temperature'), 0)


def check_numbers(settings):
    """Refuses (ValueError) settings below what makes sense, whichever of them a script has."""
    for key, least in LEAST.items():
        if settings.get(key) is not None and settings[key] < least:
            raise ValueError(f'{key}={settings[key]} makes no sense: set at least {least}')
    if settings.get('dropout', 0) >= 1:
        raise ValueError(f"dropout={settings['dropout']} drops everything: set it below 1")


def learning_rate_at(step, learning_rate, warmup_iters, lr_decay_iters, min_lr, restart_every=0, restart_iters=0):
    """
    Learning rate of a step: linear warm-up, then cosine from learning_rate to min_lr at lr_decay_iters, then min_lr.

    restart_every, restart_iters: after each restart_every steps the rate climbs again from zero to the cosine
    within restart_iters steps (ReLoRA, section 3: a reset factor has no moments yet).
    """
    if step < warmup_iters:
        rate = learning_rate * (step + 1) / (warmup_iters + 1)
    else:
        progress = min((step - warmup_iters) / max(lr_decay_iters - warmup_iters, 1), 1.0)
        rate = min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
    if restart_every and restart_iters and step >= restart_every:
        rate *= min((step % restart_every + 1) / (restart_iters + 1), 1.0)
    return rate


def set_learning_rate(optimizer, settings, step):
    """Sets the learning rate of a step (`learning_rate_at`) as the settings say, and returns it."""
    s = settings
    rate = learning_rate_at(step, s['learning_rate'], s['warmup_iters'], s['lr_decay_iters'] or s['max_iters'],
                            s['min_lr'], s['merge_every'] if s['merge_reset'] else 0, s['rewarm_iters'])
    for group in optimizer.param_groups:
        group['lr'] = rate
    return rate


# -----------------------------------------------------------------------------
# processes


def join(device, dtype, param_dtype):
    """
    Joins torchrun's processes, if any, and resolves 'auto'.

    device: 'auto', 'cpu', 'cuda', 'cuda:1'; dtype: 'auto', or what is computed in; param_dtype: that of the weights.
    Returns (rank, world_size, device of this process, dtype as a name).
    """
    import torch
    import torch.distributed as dist
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device != 'cpu' and not re.fullmatch(r'cuda(:\d+)?', device):
        fail(f"device={device!r} is not known: set 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device != 'cpu' and not torch.cuda.is_available():
        fail(f'device={device!r}, but torch {torch.__version__} finds no CUDA GPU here: set --device=cpu')
    if param_dtype not in ('float64', 'float32', 'bfloat16'):
        fail(f"param_dtype={param_dtype!r} is not known: set 'float32', 'bfloat16' or 'float64'")
    if dtype == 'auto' and (param_dtype != 'float32' or device == 'cpu'):
        dtype = param_dtype
    elif dtype == 'auto':  # cards before Ampere have no bfloat16
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if dtype != param_dtype and not (param_dtype == 'float32' and dtype in ('bfloat16', 'float16')):
        fail(f"dtype={dtype!r} does not go with param_dtype={param_dtype!r}: set both the same, or compute in "
             "'bfloat16' or 'float16' with weights in 'float32'")
    if device == 'cpu':
        keep_freed_memory()
    if 'RANK' not in os.environ:
        return 0, 1, device, dtype
    if device == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # gloo beside nccl carries the stop flag from host to host, without waiting for the GPU
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    return dist.get_rank(), dist.get_world_size(), device, dtype


def keep_freed_memory():
    """
    Makes glibc keep freed memory for the next step instead of giving it back to the system (no effect elsewhere).

    By default every tensor above 32 MB comes as fresh pages each time, which the kernel first has to zero: of a step of
    GPT-2 124M with heads on every layer that was a quarter of the time on two CPU cores.
    """
    if sys.platform != 'linux':
        return
    import ctypes
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
            libc.mallopt(option, value)


def wrap(model, device, world_size, compiled, apart=()):
    """
    The callable that computes with a model: compiled, if asked, and under DDP, if there are several ranks.

    apart: a set of parameters and buffers that DDP does not touch, because somebody else reduces their gradients, or
    they differ by rank.
    Returns (callable, bytes that DDP reduces a step).
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel as DDP

    from lowrank import keep_out_of_ddp
    if compiled:  # block by block: their code is one, so that it is compiled once, and a block steps when it is done
        for block in model.blocks:
            block.compile(fullgraph=True)
    net = model
    carried = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad and p not in apart)
    if world_size > 1 and carried:
        keep_out_of_ddp(net, apart)
        net = DDP(net, device_ids=[torch.device(device).index] if device.startswith('cuda') else None,
                  broadcast_buffers=False,
                  gradient_as_bucket_view=True)  # the buckets are the gradients, not a second copy of them
    return net, carried * (world_size > 1)


def mean_over_ranks(tensor, world_size):
    """The average of a tensor over all ranks, in place."""
    if world_size > 1:
        import torch.distributed as dist
        dist.all_reduce(tensor)
        tensor /= world_size
    return tensor


def share_overflow(scaler, optimizer, world_size):
    """After `scaler.unscale_`: where a gradient of one rank alone overflows float16, all ranks skip the step."""
    if world_size > 1 and scaler.is_enabled():
        import torch.distributed as dist
        for found in scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device'].values():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)  # fused Adam takes 1 for yes, and 2 for no


def leave(world_size):
    """
    Ends what `join` began.

    gloo's threads let go of the tensors of a collective some time after it returns, and need the interpreter's lock for
    it, which the end of DDP or of Python holds while it waits for them: without the pause a process now and then hung
    or aborted when all was done (torch 2.13).
    """
    if world_size > 1:
        import torch.distributed as dist
        time.sleep(0.1)
        dist.destroy_process_group()


_stop = {'signal': 0}


def catch_signals():
    """From now on SIGTERM and SIGINT only raise a flag, which `stop_requested` reads; a second one ends at once."""
    def raise_flag(number, frame):
        _stop['signal'] = number
        signal.signal(number, signal.SIG_DFL)
    _stop['signal'] = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, raise_flag)


def stop_requested(world_size):
    """True on every rank as soon as one of them got a signal."""
    if world_size == 1:
        return _stop['signal'] > 0
    import torch
    import torch.distributed as dist
    flag = torch.tensor([_stop['signal']])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag.item() > 0


# -----------------------------------------------------------------------------
# checkpoint: tensors and plain types, written to a temporary name, fsynced, renamed


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain types; a crash at any moment leaves the old file or the new one whole."""
    import torch
    with open(path + '.tmp', 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)
    folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    os.fsync(folder)  # the rename itself has to reach the disk too
    os.close(folder)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, onto the CPU, memory-mapped. ValueError, FileNotFoundError: say why not."""
    import torch

    from lowrank import EDITION
    if not os.path.isfile(path):
        other = ', or take --checkpoint=ckpt.pt' * os.path.isfile(os.path.join(os.path.dirname(path), 'ckpt.pt'))
        raise FileNotFoundError(f"there is no checkpoint '{path}': check --out_dir, or train first{other}")
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes fail in any way
        raise ValueError(f"'{path}' is damaged or not a checkpoint of tensors and plain types "
                         f'({(str(error).splitlines() or [""])[0][:80]}): restore it or train anew') from error
    if not (isinstance(checkpoint, dict) and {'model', 'settings', 'step', 'model_config'} <= checkpoint.keys()):
        raise ValueError(f"'{path}' is not a checkpoint of this project (no model, settings, step in it): "
                         'check --out_dir')
    if checkpoint.get('edition') != EDITION:
        raise ValueError(f"'{path}' was written by the first edition of this project, whose layers were others: train "
                         'anew, or go on with that edition')
    return checkpoint


def _logged_before(line, step):
    """Whether a line of log.jsonl is whole and not of what a run from this step on logs again (it evaluates first)."""
    try:
        record = json.loads(line)
        return record['step'] < step or record['step'] == step and 'val_loss' not in record
    except (ValueError, KeyError, TypeError):  # a crash cut it
        return False


def start_run(settings, step):
    """Makes out_dir and writes config.json; refuses one that holds a run unless that is resumed or overwritten. step:
    where the run begins; lines that a crashed one logged after it are dropped."""
    out_dir = settings['out_dir']
    held = [name for name in ('ckpt.pt', 'best.pt') if os.path.exists(os.path.join(out_dir, name))]
    if held and settings['init_from'] != 'resume' and not settings['overwrite']:
        raise ValueError(f"out_dir '{out_dir}' already holds a run ({held[0]}): go on with it by "
                         '--init_from=resume, choose another --out_dir, or replace it by --overwrite=True')
    if settings['wandb_log']:
        try:
            import wandb
        except ImportError:
            raise ValueError('wandb_log=True needs the package wandb: pip install wandb, or set it to False') from None
        wandb.init(project=settings['wandb_project'], name=out_dir, config=settings)
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f'out_dir={out_dir!r} cannot be made ({error.strerror}): set another folder') from None
    if settings['init_from'] != 'resume':
        for name in held + ['log.jsonl', 'adapter.safetensors']:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out_dir, name))
    path = os.path.join(out_dir, 'log.jsonl')
    if os.path.exists(path) and not settings['eval_only']:
        with open(path, encoding='utf-8') as file:
            lines = [line for line in file if _logged_before(line, step)]
        with open(path + '.tmp', 'w', encoding='utf-8') as file:
            file.writelines(lines)
        os.replace(path + '.tmp', path)
    with open(os.path.join(out_dir, 'config.json'), 'w', encoding='utf-8') as file:
        json.dump(settings, file, indent=2)


def refuse_non_finite(step, saved, out_dir, **values):
    """Ends the run (exit code 1) where a loss or a norm is inf or nan, before anything can overwrite its checkpoint."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise SystemExit(f'{name} is {value} at step {step}: lower learning_rate or raise warmup_iters; '
                             + (f'the last good checkpoint is {out_dir}/ckpt.pt of step {saved}' if saved is not None
                                else 'no checkpoint was written yet'))


def need_same(settings, checkpoint, keys):
    """Refuses to resume a checkpoint of weights alone, or one trained with other values of the settings `keys`."""
    if 'optimizer' not in checkpoint:
        raise ValueError('ckpt.pt holds weights alone, like best.pt: resume from the ckpt.pt that the run wrote')
    for key in keys:
        if key not in checkpoint['settings']:
            raise ValueError(f'the checkpoint was written by another script (it has no setting {key}): check --out_dir')
        if settings[key] != checkpoint['settings'][key]:
            raise ValueError(f"the checkpoint was trained with {key}={checkpoint['settings'][key]!r}, this run says "
                             f'{settings[key]!r}: resume with the config it was started with')


# -----------------------------------------------------------------------------
# log


def peak_memory_bytes(device):
    """Peak of the memory allocated on a GPU, or of this process's resident size on a CPU."""
    if device.startswith('cuda'):
        import torch
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists('/proc/self/status'):  # getrusage's peak is also that of the process that started this one
        with open('/proc/self/status', encoding='utf-8') as file:
            for line in file:
                if line.startswith('VmHWM'):
                    return int(line.split()[1]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def start_meter(device):
    """What a loop adds up between two lines of the log: sums[0] of the losses, sums[1] the gradient's norm, steps."""
    import torch
    return {'sums': torch.zeros(2, device=device), 'steps': 0, 'clock': time.perf_counter()}


def read_meter(meter, world_size):
    """(mean loss of a step and gradient norm, both over all ranks, seconds a step); the meter starts again. But for
    merges that draw new heads, this is the only place of a training step where the host waits for the device."""
    meter['sums'][0] /= meter['steps']
    train_loss, gradient_norm = mean_over_ranks(meter['sums'], world_size).tolist()
    seconds = (time.perf_counter() - meter['clock']) / meter['steps']
    restart_meter(meter)
    return train_loss, gradient_norm, seconds


def restart_meter(meter):
    """Forgets what was added up: an evaluation is not a training step."""
    meter['sums'].zero_()
    meter.update(steps=0, clock=time.perf_counter())


def log(settings, record, progress):
    """Prints one aligned line above the progress bar (a tqdm), appends the record to out_dir/log.jsonl, tells wandb."""
    shown = {'train_loss': 'train {:.4f}', 'val_loss': 'val   {:.4f}', 'test_loss': 'test  {:.4f}',
             'val_acc': 'accuracy {:.4f}', 'val_auc': 'AUC {:.4f}',
             'test_acc': 'accuracy {:.4f}', 'test_auc': 'AUC {:.4f}',
             'dt_ms': '{:8.1f} ms/step', 'tokens_per_s': '{:>9,.0f} tokens/s', 'images_per_s': '{:>9,.0f} images/s',
             'lr': 'lr {:.2e}', 'peak_memory_bytes': 'peak {:.2f} GB'}
    words = [form.format(record[key] / 1e9 if key == 'peak_memory_bytes' else record[key])
             for key, form in shown.items() if key in record]
    progress.write(f"step {record['step']:>6} | " + ' | '.join(words), file=sys.stdout)
    sys.stdout.flush()  # a log in a file is read while it grows
    with open(os.path.join(settings['out_dir'], 'log.jsonl'), 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
    if settings['wandb_log']:
        import wandb
        wandb.log(record, step=record['step'])
