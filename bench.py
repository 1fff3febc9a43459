"""
Checks what the README claims, on any machine:

$ python bench.py heads          time of multi-head LoRA, heads at once, one after the other, and full rank
$ python bench.py speed          time of GaLore's step and bases and of every method, against others' code
$ python bench.py memory         peak memory by method: real runs, and planned ones for what does not fit here
$ python bench.py memory config/llama_1b.py config/methods/galore.py --budget=12GiB
                                 the largest micro-batch that fits on a card; no method given: of all
$ python bench.py vit            ViT-B and ViT-L at 224 pixels: parameters, memory and time of LoRA and GaLore
$ python bench.py communication  bytes a step of each method on several workers, and their time on slow links
$ python bench.py screening      validation loss of each method on a small GPT, one setting changed at a time
$ python bench.py quality        validation loss of the finalists on a larger one, three seeds
$ python bench.py convergence    how fast LoRA and full fine-tuning adapt a small ViT
$ python bench.py layers         validation loss and trainable parameters by the layers that have heads
$ python bench.py spectrum       effective rank of weights, of their change and of gradients over training
$ python bench.py readme         renews the table of losses in README.md, and draws loss against bytes sent

Times are medians of interleaved runs, as ratios within one process. What is measured goes to
assets/NAME.jsonl, a line a cell; finished trainings are not run again.
"""

import argparse
import contextlib
import gc
import glob
import importlib
import importlib.util
import itertools
import json
import os
import platform
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import galore
import train_gpt
import train_llama
from galore import GaLoreAdamW, LowRankAdamW, bases_of, make_optimizer, param_groups
from lowrank import (MHLoRALinear, apply_mhlora, clip_gradients, count_parameters, drop_moments, freeze_as_set,
                     lowrank_layers, merge, merged_state_dict, put_layers)
from model import GPT, SIZES, GPTConfig, Llama, LlamaConfig
from prepare import Tokens

HERE = os.path.dirname(os.path.abspath(__file__))
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

# -----------------------------------------------------------------------------
# cells: what was measured


def machine():
    """What this runs on, in words: the GPU, or the processor and the number of its cores."""
    if DEVICE == 'cuda':
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            name = (re.findall(r'model name\s*: (.*)', file.read()) or [name])[0]
    return f'{name}, {os.cpu_count()} cores'


def keep(name, cell):
    """Prints a measured cell and appends it to assets/NAME.jsonl, with machine, torch's version and date."""
    shown = {key: x for key, x in cell.items() if key not in ('curve', 'points', 'ratios')}
    words = (f'{key} {x:.4g}' if isinstance(x, float) else f'{key} {x}' for key, x in shown.items())
    print(*words, sep='  ', flush=True)
    about = dict(machine=machine(), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    with open(f'{HERE}/assets/{name}.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps({**cell, **about}) + '\n')


def read_lines(path):
    """The lines of a .jsonl, none where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def kept(name, cells=None):
    """What assets/NAME.jsonl holds, or of that what is among cells (method, settings). Settings with a key
    superseded are of what today's code does not do: no new cell has them."""
    return [cell for cell in read_lines(f'{HERE}/assets/{name}.jsonl')
            if cells is None or (cell['method'], cell['settings']) in cells]


def lacking(name, cells):
    """Those cells (method, settings) that assets/NAME.jsonl does not hold."""
    done = [(cell['method'], cell['settings']) for cell in kept(name)]
    return [cell for cell in cells if cell not in done]


def table(first, *names, wide=36):
    """Prints the head of a table. Returns what prints a row of it: words, then numbers to the right."""
    widths = [max(len(name) + 2, 9) for name in names]

    def row(first, *values):
        forms = {int: '{:,}', float: '{:.3f}', type(None): ''}
        words = (forms.get(type(x), '{}').format(x) for x in values)
        print(f'{first:{wide}}' + ''.join(f'{x:>{width}}' for x, width in zip(words, widths)), flush=True)
    row(first, *names)
    return row


def parse(bench, words, choices=None, **defaults):
    """Options --key of a bench, each of its default's type; a list takes several. choices: allowed values."""
    parser = argparse.ArgumentParser(f'bench.py {bench}')
    for key, value in defaults.items():
        kind, many = (type(value[0]), '*') if isinstance(value, list) else (type(value), None)
        parser.add_argument(f'--{key}', type=kind, default=value, nargs=many,
                            choices=(choices or {}).get(key))
    return parser.parse_args(words)


# -----------------------------------------------------------------------------
# training: a script in a process of its own, or its steps in this one


def method(name, **changes):
    """The settings of config/methods/NAME.py, with changes."""
    found = runpy.run_path(f'{HERE}/config/methods/{name}.py')
    return {**{key: value for key, value in found.items() if not key.startswith('_')}, **changes}


def run_cells(name, words, script, base, cells):
    """
    Trains with a script what assets/NAME.jsonl lacks of the cells (method, settings), each on one thread.

    words: the command line. base: settings of all; a cell's 'ranks': how many processes torchrun starts.
    """
    names = list(dict(cells))
    options = parse(name, words, dict(methods=names), methods=names, jobs=2)  # jobs: runs side by side
    todo = [cell for cell in lacking(name, cells) if cell[0] in options.methods]
    print(f'{len(todo)} cells to run')

    def run(cell):
        with tempfile.TemporaryDirectory() as folder:
            settings = {**base, **cell[1], 'out_dir': folder}
            ranks = settings.pop('ranks', 1)
            torchrun = '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'
            ran = subprocess.run([sys.executable, *(torchrun if ranks > 1 else ()), script,
                                  *(f'--{key}={x}' for key, x in settings.items())], cwd=HERE, text=True,
                                 capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
            records = read_lines(f'{folder}/log.jsonl')
        if ran.returncode and not re.search('is (nan|inf) at step', ran.stderr):
            said = [line for line in ran.stderr.splitlines() if 'rror: ' in line]
            print(*cell, 'did not run:', *said[:1], flush=True)
        else:
            found = results(records, diverged=ran.returncode > 0)
            keep(name, dict(method=cell[0], settings=cell[1], **found))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, todo))


def results(records, diverged):
    """What is kept of a log.jsonl: losses, of images accuracies too, numbers of parameters, bytes."""
    steps, looks = ([line for line in records if key in line] for key in ('train_loss', 'val_loss'))
    found = {'val_loss': None if diverged else looks[-1]['val_loss'],
             'curve': [(look['step'], look['val_loss']) for look in looks],
             'trainable_parameters': steps[0]['trainable_parameters'] if steps else None,
             'optimizer_state_bytes': max((line['optimizer_state_bytes'] for line in steps), default=None)}
    if looks and 'val_acc' in looks[0]:
        found['curve'] = {key: [look[key] for look in looks] for key in ('step', 'val_loss', 'val_acc')}
        found |= {key: records[-1].get(key) for key in ('test_acc', 'test_auc')}
    return found


def model_of(settings, layers=None):
    """The model that a script makes of its settings, without heads: LLaMA where they have a size, a ViT where
    they have an img_size, else a GPT. layers: another depth."""
    s = settings
    if 'size' in s:
        width, depth, many, hidden = (s[key] or usual for key, usual in
                                      zip(('n_embd', 'n_layer', 'n_head', 'n_mlp'), SIZES[s['size']]))
        return Llama(LlamaConfig(s['block_size'], s['vocab_size'] or 32000, width, layers or depth, many,
                                 hidden, s['n_kv_head'] or many, checkpointing=s['checkpointing']))
    if 'img_size' in s:
        import train_vit
        shape = {key: s[key] for key in ('model', *train_vit.SHAPE)}
        model = train_vit.create({**shape, 'n_layer': layers or s['n_layer']}, 9)
        model.set_grad_checkpointing(s['checkpointing'])
        return model
    return GPT(GPTConfig(s['block_size'], s['vocab_size'] or 50257, layers or s['n_layer'], s['n_head'],
                         s['n_embd'], s['dropout'], s['bias'], s['checkpointing']))


def trainer(model, settings, batch=None):
    """
    (optimizer, step) of a model without heads: a script's heads, optimizer and step in one process.

    settings: all that the script has. batch(number): the data of a step; None: made-up data, and of
    micro-steps two, as with several gradients are held in the second one.
    """
    s, vit, steps, micro_steps = dict(settings), 'img_size' in settings, itertools.count(), 1
    if s['min_lr'] is None:
        s['min_lr'] = s['learning_rate'] / 10
    with contextlib.redirect_stdout(None):
        put_layers(model, s)
        freeze_as_set(model, s, new=('logit',) * vit)
        optimizer = make_optimizer(model, s)
    device = next(model.parameters()).device.type
    if batch is None:
        micro_steps = min(2, s['gradient_accumulation_steps'])
        x = y = torch.zeros(s['batch_size'], *(() if vit else (s['block_size'],)), dtype=torch.int64)
        if vit:
            x = torch.zeros(len(y), 3, *model.patch_embed.img_size, dtype=getattr(torch, s['param_dtype']))

    def step():
        number = next(steps)
        config.set_learning_rate(optimizer, s, number)
        for micro_step in range(micro_steps):
            optimizer.begin(number, micro_step, micro_steps)
            inputs, targets = (part.to(device) for part in ((x, y) if batch is None else batch(number)))
            with torch.autocast(device, torch.bfloat16, enabled=s['dtype'] != s['param_dtype']):
                loss = F.cross_entropy(model(inputs).float(), targets) if vit else model(inputs, targets)
            loss.backward()
        optimizer.take_bases()
        if s['grad_clip']:
            clip_gradients(model, s['grad_clip'])
        optimizer.step()
        optimizer.zero_grad()
        if s['merge_every'] and (number + 1) % s['merge_every'] == 0:
            merge(model, torch.Generator().manual_seed(s['seed'] + number + 1))
            if s['merge_reset']:
                drop_moments(model, optimizer)
    return optimizer, step


# -----------------------------------------------------------------------------
# time


def timed(functions, repeats, steps=1):
    """
    {name: cell} of functions that make so many steps, run once to warm up, then `repeats` times in turn.

    A cell has the median of the seconds of a step, and of the ratios of neighbouring runs, its own to the
    first function's, all (ratios) and their median (to_full): what one costs in units of the other, whatever
    the machine's mood.
    """
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    ratios = {name: [a / b for a, b in zip(mine, first)] for name, mine in seconds.items()}
    return {name: dict(seconds=statistics.median(seconds[name]) / steps,
                       to_full=statistics.median(ratios[name]), ratios=ratios[name]) for name in functions}


def timed_training(methods, base, repeats, steps=1, batch=None, build=model_of):
    """`timed` for training steps of methods (settings by name), with their numbers of trainable parameters.
    base: settings of all; batch: see `trainer`; build(settings): the model."""
    functions, trainable = {}, {}
    for name, changes in methods.items():
        settings = {**base, **changes}
        device = DEVICE if settings['device'] == 'auto' else settings['device']
        model = build(settings).to(device, getattr(torch, settings['param_dtype']))
        step = trainer(model, settings, batch)[1]
        functions[name] = lambda step=step: [step() for _ in range(steps)]
        trainable[name] = count_parameters(model)['trainable']
    cells = timed(functions, repeats, steps)
    return {name: dict(trainable=trainable[name], **cells[name]) for name in methods}


def step_times(name, methods, base, repeats, steps=1, batch=None):
    """Appends to assets/NAME_time.jsonl what a training step takes on one thread of those methods that it
    lacks, next to the first one: runs side by side disturb each other's clock. See `timed_training`."""
    done, first = [cell['method'] for cell in kept(f'{name}_time')], next(iter(methods))
    todo = {key: changes for key, changes in methods.items() if key not in done}
    if todo:
        torch.set_num_threads(1)
        config.keep_freed_memory()  # as the scripts do
        cells = timed_training({first: methods[first], **todo}, base, repeats, steps, batch)
        for key in todo:
            keep(f'{name}_time', dict(method=key, **cells[key]))


def seconds_of_steps(name):
    """{method: seconds of a step} as `step_times` kept them: the first one's, times the ratio to it."""
    cells = kept(f'{name}_time')
    return {cell['method']: cells[0]['seconds'] * cell['to_full'] for cell in cells}


# -----------------------------------------------------------------------------
# heads


def layer_step(module, x, dtype):
    """Forward and backward of a layer under autocast, its input's gradient included."""
    def forward():
        with torch.autocast(DEVICE, getattr(torch, dtype), enabled=dtype != 'float32'):
            return module(x)
    grad = torch.randn_like(forward())

    def run():
        forward().backward(grad)
        for parameter in (x, *module.parameters()):
            parameter.grad = None
    return run


def heads_layer(repeats):
    """One 768 -> 2304 linear layer, 2,048 tokens, forward and backward: trained itself, with heads all at
    once, and one after the other."""
    shapes = (1, 4), (4, 1), (4, 4), (16, 4), (4, 16)
    for dtype, (count, rank) in itertools.product(('float32', 'bfloat16'), shapes):
        x = torch.randn(2048, 768, device=DEVICE, requires_grad=True)
        layers = {'dense': nn.Linear(768, 2304, device=DEVICE)}
        for compute in ('parallel', 'sequential'):
            linear = nn.Linear(768, 2304, device=DEVICE)
            layers[compute] = MHLoRALinear(linear, count, rank, 4.0, head_compute=compute)
            nn.init.normal_(layers[compute].B)
        cells = timed({name: layer_step(layer, x, dtype) for name, layer in layers.items()}, repeats)
        for name, cell in cells.items():
            keep('heads', dict(bench='heads_layer', dtype=dtype, heads=count, rank=rank, compute=name,
                               **cell))


def heads_steps(cases, sequences, repeats):
    """A training step of GPT-2 124M, sequences x 512 tokens, AdamW included: heads against full rank. cases:
    (dtype, layers with heads, heads, rank). Those that assets/heads.jsonl has are not run again."""
    for dtype, targets, count, rank in cases:
        about = dict(bench='heads_steps', device=DEVICE, sequences=sequences, dtype=dtype, targets=targets,
                     heads=count, rank=rank)
        if any(about.items() <= cell.items() for cell in kept('heads')):
            continue

        def build(settings):  # how heads are computed is no setting of the scripts
            model = model_of(settings)
            if settings['compute'] != 'full':
                with contextlib.redirect_stdout(None):
                    apply_mhlora(model, targets.split(','), count, rank, head_compute=settings['compute'])
            return model
        base = {**train_gpt.defaults, 'batch_size': sequences, 'dtype': dtype, 'grad_clip': 0.0}
        methods = {name: dict(compute=name) for name in ('full', 'parallel', 'sequential')}
        cells = timed_training(methods, base, repeats, build=build,
                               batch=lambda number: torch.randint(50257, (2, sequences, 512)))
        for compute, cell in cells.items():
            cell['trainable_to_full'] = cell['trainable'] / cells['full']['trainable']
            keep('heads', dict(**about, compute=compute, **cell))
        gc.collect()  # three models and their moments, before the next three


def heads(words):
    parts = 'layer', 'model', 'figure'
    options = parse('heads', words, dict(only=parts), only=list(parts), repeats=5)
    config.keep_freed_memory()  # as the scripts do on a CPU
    if 'layer' in options.only:
        heads_layer(4 * options.repeats)
    if 'model' in options.only:
        heads_steps([(dtype, targets, 4, 4) for dtype in ('float32', 'bfloat16')
                     for targets in ('attn', 'attn,mlp', 'attn,mlp,logit')], 4, options.repeats)
    if 'figure' in options.only:
        heads_steps([('bfloat16', 'attn', count, rank) for count in (1, 4, 16) for rank in (1, 4, 16, 64)], 2,
                    options.repeats)
        draw_heads()


# -----------------------------------------------------------------------------
# speed

SHAPE, RANK = (2048, 5461), 512  # an MLP matrix of LLaMA-1B at a quarter of its width


def speed_step(repeats=12):
    """A step of one matrix without a refresh: our optimizers against galore-torch's."""
    try:
        from galore_torch import GaLoreAdamW as Reference
    except ImportError:
        return print('galore-torch is not installed, so the step is not compared (pip install galore-torch)')
    group = dict(rank=RANK, update_proj_gap=10**9, scale=0.25, proj_type='std')
    for dtype in ('float32', 'bfloat16'):
        functions = {}
        for name, make, more in (('galore-torch', Reference, {}), ('ours', GaLoreAdamW, {'basis': 'random'}),
                                 ('ours, fira', GaLoreAdamW, {'basis': 'random', 'rule': 'fira'})):
            weight = nn.Parameter(0.02 * torch.randn(SHAPE, device=DEVICE).to(getattr(torch, dtype)))
            weight.grad = torch.randn_like(weight)
            functions[name] = make([dict(params=[weight], **group, **more)], lr=0.01).step
        linear = nn.Linear(*SHAPE[::-1], bias=False, device=DEVICE, dtype=weight.dtype)
        layer = MHLoRALinear(linear, rank=RANK, factors='basis', merge_every=1)
        optimizer = LowRankAdamW(layer, lr=0.01, basis='random', basis_every=10**9)
        optimizer.begin(0)
        layer.trained.grad = torch.randn_like(layer.trained)  # as a backward pass leaves it
        functions['ours, of the layer'] = optimizer.step
        P = galore.orthonormal(torch.randn(SHAPE[0], RANK, device=DEVICE)).to(weight.dtype)
        W = weight.detach()
        functions['two plain products'] = lambda: W.addmm_(P, P.mT @ W, alpha=-1e-9)
        for name, cell in timed(functions, repeats).items():
            keep('speed', dict(bench='speed_step', dtype=dtype, optimizer=name, **cell))


def speed_refresh(repeats=2):
    """A new basis: subspace iteration from a sketch (cold) and from the old basis (warm) against the SVD."""
    for dtype in ('float32', 'bfloat16'):
        G = torch.randn(SHAPE, device=DEVICE).to(getattr(torch, dtype))
        old = bases_of(G, RANK, True, False, 'power')
        cells = timed({'svd': lambda: bases_of(G, RANK, True, False, 'svd'),
                       'power, cold': lambda: bases_of(G, RANK, True, False, 'power'),
                       'power, warm': lambda: bases_of(G, RANK, True, False, 'power', old)}, repeats)
        for name, cell in cells.items():
            keep('speed', dict(bench='speed_refresh', dtype=dtype, basis=name, **cell))


def speed_energy(steps=(1, 100, 300)):
    """Part of the gradient's energy |P^T G|^2 that `power` captures of what the SVD captures, for a GPT in
    training: the least of all matrices."""
    torch.manual_seed(0)
    data = Tokens('stdlib', 'train', 128, f'{HERE}/data')
    model = GPT(GPTConfig(128, data.vocab_size, 4, 4, 256)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    matrices, warm = param_groups(model, rank=1)[0]['params'], {}
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        x, y = data.batch(16, step)
        model(x.to(DEVICE), y.to(DEVICE)).backward()
        for rank in (64, 16) if step in steps else ():
            least = {'cold': 1.0, 'warm': 1.0}
            for p in matrices:
                both = galore.sides(p.shape, 'std')

                def energy(bases):
                    return galore.project(p.grad, *bases).square().sum().item()
                exact = energy(bases_of(p.grad, rank, *both, 'svd'))
                cold = bases_of(p.grad, rank, *both, 'power', seed=step)
                warm[p, rank] = bases_of(p.grad, rank, *both, 'power', warm.get((p, rank), cold))
                for start, bases in (('cold', cold), ('warm', warm[p, rank])):
                    least[start] = min(least[start], energy(bases) / exact)
            for start, part in least.items():
                keep('speed', dict(bench='speed_energy', step=step, rank=rank, start=start,
                                   least_of_svd=part))
        optimizer.step()


def speed_lean(repeats=3):
    """A whole training step of LLaMA in bfloat16, 8 x 256 tokens: full rank with fused AdamW, GaLore on full
    gradients and as a layer. What new bases every ten steps cost is divided by twenty, as they are taken
    every 200; sketches add up over ten steps in both."""
    config.keep_freed_memory()  # as the scripts do
    base = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16', 'batch_size': 8}
    few = dict(size='350m', n_layer=4, vocab_size=32)  # so few tokens that the output layer is nothing
    for case, shape, rank in (('LLaMA 60M', dict(size='60m'), 128),
                              ('4 layers of LLaMA 350M, no output', few, 256),
                              ('4 layers of LLaMA 350M, no output', few, 128)):
        kinds = {'GaLore, drop-in': dict(optimizer='galore', basis='power', rank=rank),
                 'GaLore layer': method('galore', rank=rank)}
        rarely = {name: {**changes, 'basis_every': 10**9} for name, changes in kinds.items()}
        often = {f'{name}, bases': {**changes, 'basis_every': 10} for name, changes in kinds.items()}
        cells = timed_training({'full rank': {}, **rarely, **often}, {**base, **shape}, repeats, 10,
                               lambda number: torch.randint(32, (2, 8, 256)))
        for name in ('full rank', *kinds):
            steady, new = cells[name]['to_full'], cells.get(f'{name}, bases', cells[name])['to_full']
            keep('speed', dict(bench='speed_lean', case=case, rank=rank, method=name, **cells[name],
                               to_full_with_bases=steady + (new - steady) / 20))


def speed_methods(repeats=3):
    """Training of a GPT of width 512 by every method, as train_gpt.py does it, 8 x 256 tokens a step and ten
    steps at a time, with their merges and new bases. of_peak: 6 N operations a token, those of full rank, for
    every method (MFU), N weights being in products, over those of a large product of matrices in bfloat16."""
    config.keep_freed_memory()  # as the scripts do
    width, layers, size = 512, 8, 4096
    weights = 12 * layers * width**2 + 257 * width  # N: attention, MLP, output layer
    methods = {'full rank': {}, 'MHLoRA': method('mhlora'), 'LTE': method('lte'),
               'GaLore, drop-in': dict(optimizer='galore', basis='power', rank=width // 4),
               'GaLore layer': method('galore', rank=width // 4),
               'GaLoLTE': method('galolte', rank=width // 4)}
    base = {**train_gpt.defaults, 'dtype': 'bfloat16', 'batch_size': 8, 'block_size': 256, 'vocab_size': 257,
            'n_layer': layers, 'n_head': 8, 'n_embd': width}
    cells = timed_training(methods, base, repeats, 10, lambda number: torch.randint(257, (2, 8, 256)))
    A = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    peak = 2 * size**3 / timed({'product': lambda: A @ A}, repeats)['product']['seconds']
    for name, cell in cells.items():
        speed = 8 * 256 / cell['seconds']
        keep('speed', dict(bench='speed_methods', device=DEVICE, method=name, **cell, tokens_per_s=speed,
                           tokens_per_s_to_full=1 / cell['to_full'], of_peak=6 * weights * speed / peak,
                           peak=peak))


def speed_nanogpt(path, repeats=12):
    """A step of GPT-2 124M at full rank, 4 x 512 tokens, on the CPU: ours against nanoGPT's."""
    if not os.path.isfile(f'{path}/model.py'):
        raise ValueError(f"--nanogpt '{path}' has no model.py: give a checkout of karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location('nanogpt_model', f'{path}/model.py')
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    x, y = torch.randint(50257, (2, 4, 512))
    model = theirs.GPT(theirs.GPTConfig(block_size=512, vocab_size=50257))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')

    def step():
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    functions = {'nanoGPT': step}
    for dtype in ('float32', 'bfloat16'):
        settings = {**train_gpt.defaults, 'dtype': dtype}
        functions[f'ours, {dtype}'] = trainer(model_of(settings), settings, lambda number: (x, y))[1]
    for name, cell in timed(functions, repeats).items():
        keep('speed', dict(bench='speed_nanogpt', loop=name, **cell))


def speed(words):
    parts = dict(step=speed_step, refresh=speed_refresh, energy=speed_energy, lean=speed_lean,
                 methods=speed_methods)
    options = parse('speed', words, dict(only=parts), only=list(parts), nanogpt='')
    if options.nanogpt:  # the folder of a checkout
        return speed_nanogpt(options.nanogpt)
    for name in options.only:
        parts[name]()


# -----------------------------------------------------------------------------
# memory

MEMORY_METHODS = {  # rank None: half of the width, a quarter with 8 bits
    'full rank': {},
    'GaLore': dict(optimizer='galore', basis='power', rank=None),
    'GaLore, projected': method('galore', rank=None),
    'GaLore, projected, per layer': method('galore', rank=None, per_layer=True),
    'the same, 8 bits, checkpointing': method('galore_lean', rank=None, checkpointing=True),
    'MHLoRA, 4 heads': method('mhlora'),
    # a worker with one head; how often it merges does not matter, so that three steps have a merge
    'LTE, a worker': method('lte', heads=1, rank=64, merge_every=2),
    'GaLoLTE, a worker': method('galolte', heads=1, rank=None, merge_every=2, basis='sketch')}


class Peak(TorchDispatchMode):
    """Peak bytes of the tensors alive: a model's and all that appear while it is on. The same numbers as
    torch's MemTracker in under half of its time, which goes into statistics of every module."""

    def __init__(self, model):
        super().__init__()
        self.model, self.alive, self.now, self.bytes, self.gradients = model, {}, 0, 0, 0
        for x in (*model.parameters(), *model.buffers()):
            self.add(x)

    def add(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.remove(key, size))
            self.now += size

    def remove(self, key, size):
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True  # a fake tensor has no value; what is asked is whether one is finite
        out = function(*args, **kwargs or {})
        for x in (out,) if torch.is_tensor(out) else tree_leaves(out):
            if torch.is_tensor(x):
                self.add(x)
        if self.now > self.bytes:
            self.bytes = self.now
            self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return out


def planned(settings, layers, batch_size):
    """Peak bytes of two training steps by category, without computing anything: fake tensors. Sketches of the
    blocks whose turn it is come later, and are left out. layers: None: as deep as the settings say."""
    settings, vit = {**settings, 'batch_size': batch_size}, 'img_size' in settings
    with torch.device('meta') if vit else FakeTensorMode() as fake:  # timm computes while it builds
        torch.set_default_dtype(getattr(torch, settings['param_dtype']))
        model = model_of(settings, layers)
        torch.set_default_dtype(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) if vit else fake, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if vit:
            model.to_empty(device='cpu')
        with Peak(model) as peak:
            optimizer, step = trainer(model, settings)
            for _ in range(2):
                step()
        state = optimizer.state_bytes()
        held = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]  # zero factors share
        weights = sum({x._cdata: x.nbytes() for x in held}.values()) - bytes_of_bases(model)  # they are state
    return dict(weights=weights, state=state, gradients=peak.gradients,
                activations=peak.bytes - weights - state - peak.gradients, total=peak.bytes)


def bytes_of_bases(model):
    return sum(layer.basis.nbytes for layer in lowrank_layers(model) if layer.factors == 'basis')


def extrapolated(settings, layers, batch_size):
    """`planned` for a deep model from five and six layers: every category is linear in their number, but for
    shallower ones, which peak at another moment."""
    if layers <= 6:
        return planned(settings, layers, batch_size)
    five, six = (planned(settings, shallow, batch_size) for shallow in (5, 6))
    return {key: five[key] + (layers - 5) * (six[key] - five[key]) for key in five}


def memory_real(settings, steps=3):
    """(growth of the peak resident size over training steps in bytes, seconds), in a fresh process that gives
    freed memory back at once."""
    code = ('import ctypes, json, sys, time, bench, config, torch; ctypes.CDLL(None).mallopt(-3, 1 << 18)\n'
            'import train_vit\n'  # what it imports is none of the model's memory
            's = json.loads(sys.argv[1]); llama = "size" in s; before = config.peak_memory_bytes("cpu")\n'
            'with torch.device("meta" if llama else "cpu"): model = bench.model_of(s)\n'
            'if llama: model.to(getattr(torch, s["param_dtype"])).to_empty(device="cpu").init_weights()\n'
            'start = time.time(); step = bench.trainer(model, s)[1]\n'
            'for _ in range(int(sys.argv[2])): step()\n'
            'print(config.peak_memory_bytes("cpu") - before, time.time() - start)')
    ran = subprocess.run([sys.executable, '-c', code, json.dumps(settings), str(steps)], cwd=HERE, check=True,
                         stdout=subprocess.PIPE, text=True)
    grown, seconds = ran.stdout.split()
    return int(grown), float(seconds)


def memory_cells():
    """{(size, method): the last cell of it}, sizes and methods in order."""
    cells = {(cell['size'], cell['method']): cell for cell in kept('memory')}
    return {key: cells[key] for key in itertools.product(SIZES, MEMORY_METHODS) if key in cells}


def memory(words):
    if any(word.endswith('.py') for word in words):
        return plan(words)
    options = parse('memory', words, dict(sizes=SIZES, real=SIZES, methods=MEMORY_METHODS),
                    sizes=['60m', '350m', '1b', '7b'], methods=list(MEMORY_METHODS),
                    real=['60m', '350m', '1b'])  # the sizes to run for real too
    base = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16', 'batch_size': 1,
            'gradient_accumulation_steps': 1}
    for size, name in itertools.product(options.sizes, options.methods):
        changes, (width, depth), real = MEMORY_METHODS[name], SIZES[size][:2], size in options.real
        rank = changes.get('rank', 1) or width // (4 if '8 bits' in name else 2)
        settings, cell = {**base, **changes, 'size': size, 'rank': rank}, memory_cells().get((size, name), {})
        if not cell or real and 'measured' not in cell:
            cell = cell or dict(bench='memory', size=size, method=name, rank=rank if changes else 0,
                                **extrapolated(settings, depth, 1))
            if real:
                cell['measured'], cell['seconds'] = memory_real(settings)
            keep('memory', cell)
    print('LLaMA in bfloat16, 1 x 256 tokens, GB: planned, and growth of the resident size, measured')
    keys = 'weights', 'state', 'gradients', 'activations', 'total', 'measured'
    row = table('method', 'rank', *keys, wide=38)
    for (size, name), cell in memory_cells().items():
        row(f'{size} {name}', cell['rank'], *(cell[key] / 1e9 if key in cell else None for key in keys))
    draw_memory()


# -----------------------------------------------------------------------------
# the planner


def largest_batch(settings, depth, room):
    """(largest micro-batch that fits into so many bytes, or 0; `planned` at the smallest; bytes it takes)."""
    parts = settings['heads'] if settings['split'] else 1  # such heads divide the batch
    one = extrapolated(settings, depth, parts)
    if one['total'] > room:
        return 0, one, one['total']
    # the optimizer's step makes the peak of small batches; then it grows along a line with activations
    b = -(-8192 // settings.get('block_size', 256) // parts) * parts
    low, high = (extrapolated(settings, depth, n)['total'] for n in (b, 2 * b))
    slope = (high - low) / b
    fits = max(int(b + (room - low) // slope) // parts, 1) * parts
    return fits, one, max(one['total'], low + (fits - b) * slope)


def vocabulary(settings):
    """The vocabulary of a run: what it says, else that of its data if they are here, else None."""
    s = settings
    if 'block_size' in s and not s['vocab_size']:
        with contextlib.suppress(ValueError, OSError):  # the data may be elsewhere
            found = Tokens(s['dataset'], 'train', s['block_size'], s['data_dir']).vocab_size
            return max(found, 32000 if 'size' in s else 0)
    return s.get('vocab_size')


def plan(words):
    """
    Which methods, dtypes and batch sizes of a run fit on a card; computes nothing, needs no GPU.

    words: config files and --key=value, as for the scripts, and --budget=12GiB, the memory of the card. Files
    of config/methods are the methods to plan; without any it is all with which the run goes.
    """
    budget = next((word for word in words if word.startswith('--budget=')), '--budget=12GiB')
    room = re.fullmatch(r'--budget=([\d.e-]+)(GiB|GB|MiB)', budget)
    if not room:
        config.fail(f'{budget} is no number with a unit: write it as --budget=12GiB or --budget=12GB')
    # CUDA itself, and what its allocator cannot reuse, want about 1 GB
    room = float(room[1]) * {'GiB': 2**30, 'GB': 10**9, 'MiB': 2**20}[room[2]] - 10**9
    given = [word for word in words if os.path.basename(os.path.dirname(os.path.abspath(word))) == 'methods']
    every = sorted(glob.glob(f'{HERE}/config/methods/*.py'), key=lambda path: ('/full.py' not in path, path))
    words = [word for word in words if word not in (budget, *given)]
    text = ''
    for path in filter(os.path.isfile, words):  # of the others config.load says that they are not there
        with open(path, encoding='utf-8') as file:
            text += file.read()
    script = re.search(r'\btrain_(gpt|llama|vit)\b', text)
    if text and not script:
        config.fail(f"{' '.join(words)} does not say whose it is: write '# python train_gpt.py FILE' (or "
                    'train_llama.py, train_vit.py) into its second line')
    known = importlib.import_module(script[0] if script else 'train_gpt').defaults
    row = None
    for path in given or every:
        try:
            with config.refusals():
                settings = config.load({}, known, [*words, path, '--learning_rate=1'])  # any will do
                settings.update(dtype='bfloat16', vocab_size=vocabulary(settings))
                with torch.device('meta'):
                    model = model_of(settings)
                depth = model.config.n_layer if hasattr(model, 'config') else len(model.blocks)
                found = {dtype: largest_batch({**settings, 'param_dtype': dtype}, depth, room)
                         for dtype in ('float32', 'bfloat16')}
        except SystemExit:
            if given or path == every[0]:
                raise
            continue  # it has said why
        if row is None:
            what = f"sequences of {settings['block_size']}" if 'block_size' in settings else 'images'
            print(f"{count_parameters(model)['total'] / 1e6:,.0f}M parameters, {what}, {budget[9:]}: the "
                  'largest micro-batch that fits one process, and GB\n'
                  'with 1 GB left to CUDA itself and to what its allocator cannot reuse')
            row = table('method', 'weights in', 'batch', 'all', 'weights', 'state', wide=16)
        for dtype, (fits, one, total) in found.items():
            row(os.path.basename(path)[:-3], dtype, fits or 'none',
                *(x / 1e9 for x in (total, one['weights'], one['state'])))


# -----------------------------------------------------------------------------
# vision

VIT_METHODS = {
    'full fine-tuning': {},
    **{f'LoRA, rank {rank}': method('lora', lowrank='attn', rank=rank, alpha=float(rank))
       for rank in (1, 2, 4, 8, 16, 32)},
    'GaLore, rank 64': dict(optimizer='galore', basis='power', rank=64),
    'GaLore, rank 64, projected': method('galore', rank=64)}


def vit(words):
    import train_vit
    options = parse('vit', words, models=['vit_base_patch16_224', 'vit_large_patch16_224'], repeats=3,
                    batch_size=4)  # of what is run here; 32 is planned besides
    print('224 pixels, bfloat16 autocast, LoRA on qkv and proj with the classifier; '
          f'{options.batch_size} images a step are run, 32 planned; GB')
    keys = 'planned_32', 'planned', 'measured'
    row = table('method', 'trainable', *keys, 's/step', 'of full', wide=50)
    for model, (name, changes) in itertools.product(options.models, VIT_METHODS.items()):
        about = dict(bench='vit', model=model, method=name, batch_size=options.batch_size)
        cell = next((cell for cell in kept('vit') if about.items() <= cell.items()), None)
        if not cell:  # next to full fine-tuning, so that their ratio is of one run
            base = {**train_vit.defaults, 'model': model, 'dtype': 'bfloat16', 'grad_clip': 0.0,
                    'batch_size': options.batch_size}
            cell = timed_training({'full fine-tuning': {}, name: changes}, base, options.repeats)[name]
            small, large = (planned({**base, **changes}, None, b) for b in (options.batch_size, 32))
            cell = dict(**about, **cell, planned=small['total'], planned_32=large['total'],
                        weights=large['weights'], state=large['state'],
                        measured=memory_real({**base, **changes})[0])
            keep('vit', cell)
        row(f'{model} {name}', cell['trainable'], *(cell[key] / 1e9 for key in keys), cell['seconds'],
            cell['to_full'])
    draw_vit()


# -----------------------------------------------------------------------------
# communication

COMMUNICATION = ('full rank, DDP', 'GaLore, projected', 'GaLore, projected, sketch', 'local AdamW', 'LTE',
                 "LTE, sync='merge'", 'GaLoLTE', "GaLoLTE, sync='merge'")


def shapes_of(model):
    """(m, n) of attention's and MLP's matrices, and the number of all other parameters."""
    with contextlib.redirect_stdout(None):
        shapes = [tuple(p.shape) for p in param_groups(model, rank=1)[0]['params']]
    return shapes, sum(p.numel() for p in model.parameters()) - sum(m * n for m, n in shapes)


def sent_bytes(shapes, others, method, rank, workers, heads=1, itemsize=4):
    """What one worker of so many heads puts into collectives, as `sync_bytes` in the log counts it: bytes
    averaged each step, gathered at a merge, averaged at a merge, averaged in a period of refreshes. shapes,
    others: see `shapes_of`. Merges and sketches average in at least float32."""
    wide, merging = max(4, itemsize), 'sync' in method
    large = sum(m * n for m, n in shapes)
    trained, bases = (sum(min(rank, m, n) * side(m, n) for m, n in shapes) for side in (max, min))
    if method == 'local AdamW':
        return 0, 0, wide * (large + others), 0
    if 'projected' in method:
        seen = bases * wide if 'sketch' in method else large * itemsize
        return (trained + others) * itemsize, 0, 0, seen + bases * itemsize
    if 'LTE' not in method:
        return (large + others) * itemsize, 0, 0, 0
    step, merge = (0, others * wide) if merging else (others * itemsize, 0)
    if 'GaLo' in method:  # what is trained and its first moment; at a refresh the sketch and the basis
        return step, 0, merge + 2 * trained * wide, bases * (wide + itemsize)
    gathered = 0
    for m, n in shapes:  # LTE's factors come with those of the last merge
        factors = 2 * heads * min(rank, m, n) * (m + n) * itemsize
        if workers > 1 and workers * factors > 2 * m * n * wide:  # as MHLoRALinear.sends_products
            merge += m * n * wide
        else:
            gathered += factors
    return step, gathered, merge, 0


def a_step(sent, merge_every, basis_every, workers):
    """Bytes a step of what `sent_bytes` says: (put into collectives, on the wire). A ring sends twice what is
    averaged, and what is gathered once for every other worker."""
    step, gathered, merge, refresh = sent
    averaged, gathered = step + merge / merge_every + refresh / basis_every, gathered / merge_every
    return averaged + gathered, 2 * averaged * (workers - 1) / workers + gathered * (workers - 1)


def communication(words):
    # seconds that a step computes; gap: steps between refreshes
    options = parse('communication', words, compute=1.0, workers=[4, 32, 256], merge_every=10, gap=200)
    links = {'50 Mbit/s': 50e6 / 8, '1 Gbit/s': 1e9 / 8, '100 Gbit/s': 100e9 / 8}  # bytes a second
    print('bytes in bfloat16 (merges in float32), rank = width / 4, one head a worker, merges every '
          f'{options.merge_every} steps,\nbases every {options.gap}. A step that computes '
          f'{options.compute:g} s takes so many seconds on each link:')
    row = table('method', 'workers', 'put in, MB', 'on the wire, MB', *links, wide=38)
    models = {'GPT-2 124M': train_gpt.defaults, 'LLaMA 1b': {**train_llama.defaults, 'size': '1b'},
              'LLaMA 7b': {**train_llama.defaults, 'size': '7b'}}
    for name, settings in models.items():
        with torch.device('meta'):
            shapes, others = shapes_of(model_of(settings))
        rank = min(min(shape) for shape in shapes) // 4
        for workers, kind in itertools.product(options.workers, COMMUNICATION):
            sent = sent_bytes(shapes, others, kind, rank, workers, itemsize=2)
            put_in, wire = a_step(sent, options.merge_every, options.gap, workers)
            row(f'{name} {kind}', workers, put_in / 1e6, wire / 1e6,
                *(options.compute + wire / speed for speed in links.values()))


def wire_bytes(settings, shape, workers=4):
    """Bytes that a worker puts on the wire a step where what has these settings runs on so many of them, one
    head each, in float32; None for what is not meant for it. shape: SCREEN or FINAL."""
    s, merges = settings, settings.get('merge_every', 1) > 1
    if s.get('factors') == 'basis':
        kind = 'GaLoLTE' if merges else 'GaLore, projected' + ', sketch' * (s['basis'] == 'sketch')
    elif 'lowrank' in s:
        kind = 'LTE' if s.get('split') else None
    else:
        kind = 'local AdamW' if s.get('sync') == 'merge' else 'full rank, DDP'
    if kind:
        sent = sent_bytes(*shapes_of(gpt(shape)), kind, s.get('rank', 0), workers)
        return a_step(sent, s.get('merge_every', 1), s.get('basis_every', 1), workers)[1]


# -----------------------------------------------------------------------------
# trainings: cells (method, settings), and tables of what is kept of them

# A GPT of 3.3M parameters, 600 steps of 2,048 bytes of Python sources; each cell says only what it changes.
SCREEN = dict(dataset='stdlib', block_size=256, batch_size=8, n_layer=4, n_head=4, n_embd=256, max_iters=600,
              warmup_iters=60, eval_interval=600, eval_iters=40, log_interval=100, beta2=0.99,
              weight_decay=0.0, grad_clip=1.0, device='cpu', dtype='bfloat16')
LAYERS = {**SCREEN, 'max_iters': 500, 'warmup_iters': 50, 'eval_interval': 500}
# The finalists: 10.7M parameters, 1,000 steps of 1,024 bytes, all but the rate as the screening found best.
FINAL = {**SCREEN, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 128, 'max_iters': 1000,
         'warmup_iters': 100, 'eval_interval': 200}
# What config/vit_digits_adapt.py does, evaluated after every epoch (1,078 images, 17 steps).
ADAPT = dict(init_from='out/vit_quickstart/best.pt', dataset='digits_shifted', batch_size=64,
             model='vit_tiny_patch16_224', epochs=20, eval_interval=17, log_interval=17, warmup_iters=20,
             min_lr=1e-5, device='cpu', dtype='float32')

ONE, FOUR = (dict(lowrank='attn,mlp', heads=heads) for heads in (1, 4))
SPLIT = dict(**FOUR, split=True, merge_every=10)  # LTE
RELORA = dict(**ONE, merge_every=100, merge_reset=True, rewarm_iters=5)
BASES = dict(basis_every=50, beta2=0.999)
DROP_IN = dict(**BASES, optimizer='galore', basis='power')
FIRA = dict(**BASES, optimizer='fira', basis='power')
LAYER = dict(**BASES, **ONE, factors='basis', merge_every=1, basis='sketch')
GALOLTE = dict(**BASES, **SPLIT, factors='basis', basis='sketch')
LOCAL = dict(ranks=4, sync='merge', merge_every=10)


def gpt(shape):
    """The GPT of SCREEN or FINAL, without memory."""
    with torch.device('meta'):
        return model_of({**train_gpt.defaults, **shape, 'vocab_size': 257})


def screening_cells():
    """Every cell of the screening: what those of a method share, and what each changes."""
    def lr(rate, **more):
        return dict(more, learning_rate=rate)

    def every(steps, **more):
        return dict(more, merge_every=steps)
    grid = {
        'full rank': (lr(2e-3), [
            {}, lr(1e-3), lr(4e-3), dict(beta2=0.999), dict(grad_clip=0.0),  # 4e-3 needs clipping
            dict(seed=1), dict(seed=2)]),  # how much is noise
        'GaLore, drop-in': (lr(2e-2, **DROP_IN, rank=64), [
            {}, lr(1e-2), lr(4e-2), dict(grad_clip=0.0), dict(basis='random'), dict(basis='svd'),
            lr(1e-2, basis='svd'), dict(rank=16), dict(rank=32), dict(rank=128), dict(seed=1), dict(seed=2)]),
        'GaLore': (lr(2e-2, **LAYER, rank=64), [{}, lr(1e-2)]),
        'Fira': (lr(2e-2, **FIRA, rank=64), [{}, lr(1e-2)]),
        'GaLoLTE': (lr(2e-2, **GALOLTE, rank=64), [
            {}, dict(basis='power'), lr(3e-2), every(5), every(50), lr(1e-2, merge_every=50),
            dict(grad_clip=0.0), dict(basis_every=100)]),
        'MHLoRA': (lr(2e-3, **FOUR, rank=16), [
            dict(rank=4, alpha=4.0), dict(alpha=16.0), dict(rank=64, alpha=64.0), dict(rank=4, alpha=16.0),
            dict(alpha=64.0), dict(rank=64, alpha=256.0), lr(1e-3, alpha=64.0), lr(4e-3, alpha=64.0)]),
        'LTE': (lr(2e-3, **SPLIT, rank=16, alpha=16.0), [
            every(1), {}, every(50), dict(alpha=64.0), lr(4e-3), lr(1e-3),
            lr(4e-3, rank=40, alpha=40.0)]),  # the last one: GaLoLTE's memory
        'ReLoRA': (lr(2e-3, **RELORA, rank=64, alpha=64.0), [every(50), {}, lr(4e-3), lr(1e-3)]),
        'local AdamW': (lr(2e-3, **LOCAL), [{}, lr(4e-3), lr(1e-3), every(1), every(50)])}
    return [(name, {**base, **change}) for name, (base, changes) in grid.items() for change in changes]


def quality_cells():
    """The finalists: each at its learning rates with one seed, then at the first of these, the best, with two
    more. Ranks are a quarter of the width in all."""
    methods = {
        'full rank': ({}, (1e-3, 5e-4, 2e-3)),
        'GaLore': (dict(**LAYER, rank=96), (5e-3, 1e-2)),
        'GaLore, drop-in': (dict(**DROP_IN, rank=96), (5e-3, 2.5e-3, 1e-2, 2e-2)),
        'GaLoLTE': (dict(**GALOLTE, rank=96), (1e-2, 2e-2)),
        'ReLoRA': (dict(**RELORA, rank=96, alpha=96.0), (2e-3, 4e-3, 1e-3)),
        'MHLoRA': (dict(**FOUR, rank=24, alpha=96.0), (5e-4, 2.5e-4, 1e-3, 2e-3)),
        'LTE': (dict(**SPLIT, rank=24, alpha=24.0), (2e-3, 4e-3, 1e-3)),
        'Fira': (dict(**FIRA, rank=96), (1e-2, 2e-2, 5e-3)),
        'local AdamW': (LOCAL, (1e-3, 5e-4, 2e-3))}
    cells = [(name, dict(settings, learning_rate=lr, seed=seed)) for seed in (1337, 1, 2)
             for name, (settings, rates) in methods.items() for lr in (rates if seed == 1337 else rates[:1])]
    return [*cells, ('GaLoLTE', dict(GALOLTE, rank=96, basis='power', learning_rate=2e-2, seed=1337))]


def convergence_cells():
    """The adaptation, one seed after the other."""
    methods = {'full fine-tuning': (dict(lowrank=''), (3e-4, 1e-3, 3e-3)),
               **{f'LoRA, rank {rank}': (dict(**ONE, rank=rank, alpha=float(rank)), (1e-3, 3e-3, 1e-2))
                  for rank in (2, 8, 32)}}
    return [(name, dict(settings, learning_rate=lr, seed=seed)) for seed in (1337, 1, 2)
            for name, (settings, rates) in methods.items() for lr in rates]


def layers_cells():
    """The letters of layers with heads; all else is at full rank, and the learning rate fixed."""
    kinds, cells = {'A': 'attn', 'M': 'mlp', 'L': 'logit'}, []
    for seed, letters in itertools.product((1337, 1, 2), ('none', 'A', 'M', 'L', 'AM', 'AL', 'ML', 'AML')):
        targets = ','.join(kinds[letter] for letter in letters if letter in kinds)
        there = dict(SPLIT, rank=16, alpha=16.0, lowrank=targets) if targets else {}
        cells.append((letters, dict(there, learning_rate=2e-3, seed=seed)))
    return cells


def label(cell):
    """A cell's method and what it sets, in a few words."""
    s = cell['settings']
    forms = dict(heads='H = {}', rank='r = {}', alpha='alpha = {:g}', merge_every='T = {}', basis='{} bases',
                 basis_every='every {}', beta2='beta2 {:g}', grad_clip='clipping at {:g}', ranks='{} workers',
                 superseded='({})', learning_rate='lr {:g}')
    name = 'Fira' if s.get('optimizer') == 'fira' else cell['method']
    return ', '.join([name, *(form.format(s[key]) for key, form in forms.items() if key in s)])


def losses(cells):
    return [cell['val_loss'] for cell in cells]


def groups(name, cells=None):
    """{method: [its kept cells that differ in their seed alone, ...]} of what did not diverge: the group with
    the most seeds comes first, of these the one with the least loss."""
    found = {}
    for cell in kept(name, cells):
        if cell['val_loss'] is not None:
            others = found.setdefault(cell['method'], {})
            others.setdefault(json.dumps({**cell['settings'], 'seed': 0}, sort_keys=True), []).append(cell)

    def order(group):
        return -len(group), statistics.mean(losses(group))
    return {name: sorted(found[name].values(), key=order)
            for name in dict(cells or found.items()) if name in found}


def show(name):
    """A table of all kept trainings."""
    row = table('method', 'seeds', 'trainable', 'loss', 'least', 'largest', 'test accuracy', wide=130)
    for group in itertools.chain(*groups(name).values()):
        found, tests = losses(group), [cell['test_acc'] for cell in group if 'test_acc' in cell]
        row(label(group[0]), len(group), group[0]['trainable_parameters'], statistics.mean(found), min(found),
            max(found), statistics.mean(tests) if tests else None)
    for cell in kept(name):
        if cell['val_loss'] is None:
            row(label(cell), 1, cell['trainable_parameters'], 'diverged')


def screening(words):
    run_cells('screening', words, 'train_gpt.py', SCREEN, screening_cells())
    show('screening')


def quality(words):
    run_cells('quality', words, 'train_gpt.py', FINAL, quality_cells())
    one_process = {name: settings for name, settings in quality_cells() if 'ranks' not in settings}
    size = 2, FINAL['batch_size'], FINAL['block_size']
    step_times('quality', one_process, {**train_gpt.defaults, **FINAL, 'vocab_size': 257}, 5,
               10,  # steps at a time, with their merges and new bases
               lambda number: torch.randint(257, size))
    show('quality')
    draw_quality()


def convergence(words):
    import train_vit
    cells, start = convergence_cells(), 'config/vit_quickstart.py'
    if lacking('convergence', cells) and not os.path.exists(f"{HERE}/{ADAPT['init_from']}"):
        subprocess.run([sys.executable, 'train_vit.py', start, '--overwrite=True'], cwd=HERE, check=True)
    run_cells('convergence', words, 'train_vit.py', ADAPT, cells)
    base = {**config.load({}, train_vit.defaults, [f'{HERE}/{start}']), **ADAPT}
    step_times('convergence', dict(cells), base, 100)
    show('convergence')
    draw_convergence()


def layers(words):
    run_cells('layers', words, 'train_gpt.py', LAYERS, layers_cells())
    show('layers')
    draw_layers()


def all_state(cell):
    """Bytes of a finalist's optimizer state, bases included, of all workers; the log has those of one
    process, and not those that a merge with a reset has just dropped."""
    s = cell['settings']
    if s.get('merge_reset'):
        return 8 * cell['trainable_parameters']
    if not s.get('split'):
        return cell['optimizer_state_bytes'] * s.get('ranks', 1)
    model = gpt(FINAL)
    with contextlib.redirect_stdout(None):
        put_layers(model, {**train_gpt.defaults, **s})
    counts = count_parameters(model)
    # each of the other workers has the bases too, and moments of what has no heads
    more = bytes_of_bases(model) + 8 * (counts['trainable'] - counts['heads'])
    return cell['optimizer_state_bytes'] + (s['heads'] - 1) * more


def readme(words):
    """Renews the two tables between markers in README.md, and draws the frontier."""
    def but_rate(cell):
        return {key: x for key, x in cell['settings'].items() if key not in ('learning_rate', 'seed')}
    cells, times = kept('quality', quality_cells()), seconds_of_steps('quality')
    lines = ['| method | trained | optimizer state | sent a step | time of a step | validation loss: mean '
             '(range; seeds) | other rates, one seed |', '|---|---|---|---|---|---|---|']
    for name, (mine, *_) in groups('quality', quality_cells()).items():
        first, found = mine[0], losses(mine)
        rates = {cell['settings']['learning_rate']: cell['val_loss'] for cell in cells
                 if cell['method'] == name and but_rate(cell) == but_rate(first)}
        del rates[first['settings']['learning_rate']]
        others = [f"{lr:g}: {f'{loss:.3f}' if loss else 'diverged'}" for lr, loss in sorted(rates.items())]
        sent = wire_bytes(first['settings'], FINAL)
        spread = f'{min(found):.3f} to {max(found):.3f}; {len(found)}' if len(found) > 1 else 'one seed'
        columns = (label(first), f"{first['trainable_parameters'] / 1e6:.1f}M",
                   f'{all_state(first) / 1e6:.0f} MB', f'{sent / 1e6:.1f} MB' if sent else '',
                   f"{times[name] / times['full rank']:.2f}" if name in times else '',
                   f'{statistics.mean(found):.3f} ({spread})', ', '.join(others))
        lines.append(f"| {' | '.join(columns)} |")
    dates, machines, torches = (sorted({cell[key] for cell in cells}) for key in ('date', 'machine', 'torch'))
    lines += ['', f"Cells of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {' and '.join(machines)}, "
              f"torch {' and '.join(torches)}: `python bench.py quality` (five minutes a run), then "
              '`python bench.py readme`.']
    methods = ['| method | what it is, and learning rates that were good |', '|---|---|']
    for path in sorted(glob.glob(f'{HERE}/config/methods/*.py')):
        with open(path, encoding='utf-8') as file:
            said = file.readline().removeprefix('# ').strip()
        methods.append(f'| [`{os.path.basename(path)[:-3]}`](config/methods/{os.path.basename(path)}) | {said} |')
    with open(f'{HERE}/README.md', encoding='utf-8') as file:
        text = file.read()
    for mark, rows in (('methods', methods), ('quality', lines)):
        before, _, rest = text.partition(f'<!-- {mark} -->\n')
        text = '\n'.join([f'{before}<!-- {mark} -->', *rows, '<!-- end -->', rest.partition('<!-- end -->\n')[2]])
    with open(f'{HERE}/README.md', 'w', encoding='utf-8') as file:
        file.write(text)
    draw_frontier()


# -----------------------------------------------------------------------------
# spectrum

SPECTRUM_STEPS = (0, 25, 50, 100, 200, 300)
SPECTRUM_CELLS = [
    ('full rank', dict(learning_rate=2e-3)),
    ('LoRA, rank 16', dict(**ONE, rank=16, alpha=16.0, learning_rate=2e-3)),
    ('LTE, 4 heads of rank 16', dict(**SPLIT, rank=16, alpha=16.0, learning_rate=2e-3)),
    ('LTE, heads drawn anew at merges',
     dict(**SPLIT, rank=16, alpha=16.0, merge_reset=True, learning_rate=2e-3)),
    ('GaLore, rank 64', dict(**DROP_IN, rank=64, learning_rate=2e-2))]


def effective_rank(W):
    """exp of the entropy of the singular values of W (m, n), scaled to sum to one (Roy and Vetterli 2007):
    from 1 to min(m, n), which it is where all are the same. 0 for a matrix of zeros, as its rank."""
    values = torch.linalg.svdvals(W)
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total else 0.0


def spectrum_points(settings):
    """Trains the GPT of the screening and measures at SPECTRUM_STEPS, as a mean over the matrices of
    attention and MLP, the effective rank of what the weights (heads merged) have changed by, of the weights,
    and of the loss's full gradient with respect to them on a batch that is always the same. Returns a dict
    for each step."""
    length, folder = settings['block_size'], f'{HERE}/data'
    data, val = (Tokens('stdlib', split, length, folder) for split in ('train', 'val'))
    s = {**settings, 'vocab_size': data.vocab_size}
    x, y = val.fixed_batch(0, 1, s['batch_size'])

    def batch(number):
        return data.batch(s['batch_size'], number, seed=s['seed'], heads=s['heads'] if s['split'] else 1)
    torch.manual_seed(s['seed'])
    model = model_of(s)
    step = trainer(model, s, batch)[1]
    plain, start, points = model_of(s), {}, []  # gradients are taken in a model without heads, in float32
    matrices = param_groups(plain, rank=1)[0]['params']
    for number in range(SPECTRUM_STEPS[-1] + 1):
        if number in SPECTRUM_STEPS:
            plain.load_state_dict(merged_state_dict(model))
            plain.zero_grad()
            loss = plain(x, y)
            loss.backward()
            point = dict(step=number, loss=loss.item())
            start = start or {p: p.detach().clone() for p in matrices}
            for key, of in (('change', lambda p: p.detach() - start[p]), ('weight', lambda p: p.detach()),
                            ('gradient', lambda p: p.grad)):
                point[key] = statistics.mean(effective_rank(of(p)) for p in matrices)
            points.append(point)
        if number < SPECTRUM_STEPS[-1]:
            step()
    return points


def spectrum(words):
    options = parse('spectrum', words, dict(methods=dict(SPECTRUM_CELLS)), methods=list(dict(SPECTRUM_CELLS)))
    config.keep_freed_memory()  # as the scripts do on a CPU
    base = {**train_gpt.defaults, **SCREEN, 'max_iters': SPECTRUM_STEPS[-1], 'warmup_iters': 30}
    for name, changes in lacking('spectrum', SPECTRUM_CELLS):
        if name in options.methods:
            keep('spectrum', dict(method=name, settings=changes, points=spectrum_points({**base, **changes})))
    print('effective rank, exp(entropy of the normalised singular values), mean over attention and MLP, at '
          f"most {SCREEN['n_embd']}")
    keys = 'step', 'change', 'weight', 'gradient', 'loss'
    row = table('method', *keys)
    for cell in kept('spectrum', SPECTRUM_CELLS):
        for point in cell['points']:
            row(cell['method'], *(point[key] for key in keys))
    draw_spectrum()


# -----------------------------------------------------------------------------
# pictures: each draws assets/NAME.png from what is kept


@contextlib.contextmanager
def picture(name, size, shape=(1, 1), columns=3, grid=True, **sharing):
    """The panels (rows, columns) of assets/NAME.png, with the last one's legend below unless columns is 0."""
    from matplotlib.figure import Figure
    figure = Figure(size, layout='constrained')
    panels = figure.subplots(*shape, squeeze=False, **sharing)
    yield panels
    for axes in panels.flat if grid else ():
        axes.grid(alpha=0.3)
    if columns:
        handles = panels.flat[-1].get_legend_handles_labels()
        figure.legend(*handles, loc='outside lower center', ncols=columns, fontsize=8)
    figure.savefig(f'{HERE}/assets/{name}.png', dpi=130)


def band(axes, x, curves, color, label=None):
    """The mean of curves, one a seed, within their range."""
    values = list(zip(*curves))  # a point: one a seed
    x = x[:len(values)]
    axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2, lw=0)
    axes.plot(x, list(map(statistics.mean, values)), color=color, lw=1.5, label=label)


def bars(middle, values):
    """How far the least and the largest of values are from the middle, as errorbar wants them."""
    return [[middle - min(values)], [max(values) - middle]]


def draw_heads():
    """Time of a step, full rank = 1, with the range of its repeats, and trainable parameters, against the
    rank; a panel for each number of heads."""
    want = dict(bench='heads_steps', device=DEVICE, dtype='bfloat16', sequences=2, targets='attn')
    cells = [cell for cell in kept('heads') if want.items() <= cell.items()]
    cells.sort(key=lambda cell: cell['rank'])
    with picture('heads', (9.3, 3.4), (1, 3), 4, sharey=True) as panels:
        for axes, count in zip(panels[0], (1, 4, 16)):
            for compute, style, color in (('parallel', 'o-', 'C0'), ('sequential', 's--', 'C1')):
                mine = [cell for cell in cells if (cell['compute'], cell['heads']) == (compute, count)]
                ranks = [cell['rank'] for cell in mine]
                axes.plot(ranks, [cell['to_full'] for cell in mine], style, color=color, label=compute)
                for cell in mine:
                    axes.errorbar(cell['rank'], cell['to_full'], bars(cell['to_full'], cell['ratios']),
                                  color=color, capsize=3)
            axes.plot(ranks, [cell['trainable_to_full'] for cell in mine], '^:', color='grey',
                      label='trained parameters')
            axes.axhline(1.0, color='black', lw=1, label='full rank')
            axes.set_xscale('log', base=2)
            axes.set_xticks(ranks, ranks)
            axes.set(title=f"{count} head{'s' * (count > 1)}", xlabel='rank of each head')
        panels[0, 0].set(ylabel='time, parameters; full rank = 1', ylim=(0, None))


def draw_peaks(name, panels):
    """Stacked bars of peak memory. panels: {title: [(name, bytes by category, those measured or None)]}."""
    longest = max(map(len, panels.values()))
    categories = {'weights': ('#4c72b0', 'weights'), 'state': ('#dd8452', 'optimizer state'),
                  'gradients': ('#c44e52', 'gradients'),
                  'activations': ('#8c8c8c', 'activations and buffers')}
    with picture(name, (3.1 * len(panels), 1 + 0.5 * longest), (1, len(panels)), 5, False) as all_axes:
        for axes, (title, rows) in zip(all_axes[0], panels.items()):
            names, left = [row[0] for row in rows], [0.0] * len(rows)
            for key, (color, category) in categories.items():
                values = [cell.get(key, 0) / 1e9 for _, cell, _ in rows]
                axes.barh(names, values, left=left, color=color, label=category if any(values) else None)
                left = [a + b for a, b in zip(left, values)]
            measured = [(i, row[2] / 1e9) for i, row in enumerate(rows) if row[2]]
            for i, x in measured:
                axes.plot([x, x], [i - 0.4, i + 0.4], color='black', lw=2)
            if any(row[2] for rows in panels.values() for row in rows):
                axes.plot([], [], color='black', lw=2, label='measured')
            axes.invert_yaxis()
            axes.set(title=title, xlabel='peak memory, GB')
            named = axes.get_subplotspec().is_first_col() or len(rows) < longest
            axes.tick_params('y', labelsize=7, labelleft=named)


def draw_memory():
    """Peak memory of LLaMA by category and method, and the measured total as a line."""
    panels = {}
    for (size, name), cell in memory_cells().items():
        name = name.replace(', ', ',\n').replace('the same', 'all that')
        panels.setdefault(f'LLaMA {size.upper()}', []).append((name, cell, cell.get('measured')))
    draw_peaks('memory', panels)


def draw_vit():
    """Planned peak memory of ViT-B and ViT-L at batch 32; gradients hardly live at the peak."""
    panels = {}
    for cell in kept('vit'):
        title = f"{cell['model'].replace('_patch16_224', '').replace('vit_', 'ViT ')}, 32 images"
        rest = cell['planned_32'] - cell['weights'] - cell['state']
        panels.setdefault(title, []).append((cell['method'], {**cell, 'activations': rest}, None))
    draw_peaks('vit', panels)


def draw_quality():
    """Validation loss of the finalists against steps, time and the optimizer's bytes."""
    found, times = groups('quality', quality_cells()), seconds_of_steps('quality')
    with picture('quality', (11, 4.4), (1, 3), 4, sharey=True) as ((by_step, by_time, by_bytes),):
        for number, (name, (mine, *_)) in enumerate(found.items()):
            color, steps = f'C{number}', [step for step, _ in mine[0]['curve']]
            curves = [[loss for _, loss in cell['curve']] for cell in mine]
            band(by_step, steps, curves, color)
            if name in times:
                band(by_time, [step * times[name] for step in steps], curves, color)
            mean, trained = statistics.mean(losses(mine)), mine[0]['trainable_parameters'] / 1e6
            seeds = f"{len(mine)} seed{'s' * (len(mine) > 1)}"
            by_bytes.errorbar(all_state(mine[0]) / 1e6, mean, bars(mean, losses(mine)), color=color,
                              fmt='os^vDP*Xph'[number], capsize=3,
                              label=f'{name} ({trained:.1f}M trained, {seeds})')
        shown = [loss for mine, *_ in found.values() for cell in mine
                 for step, loss in cell['curve'] if step >= 400]
        by_step.set(xlabel='step', ylabel='validation loss (nats a byte)', xlim=(400, FINAL['max_iters']),
                    ylim=(min(shown) - 0.02, max(shown) + 0.02))
        by_time.set(xlabel='training, s (one CPU thread)', xlim=(400 * min(times.values(), default=0), None))
        by_bytes.set(xlabel="optimizer state, MB (all workers')", xscale='log')
        by_bytes.set_xticks(ticks := [20, 50, 100, 200, 400], list(map(str, ticks)))
        by_bytes.minorticks_off()


def draw_frontier():
    """Validation loss of the screening against bytes on the wire, each method's best for each rank or T."""
    best, known = {}, ('', 'first edition: running sketch, shared bases')  # sent what today's code sends
    for cell in kept('screening'):
        s = cell['settings']
        bytes_, edition = wire_bytes(s, SCREEN), s.get('superseded', '')
        if bytes_ and cell['val_loss'] and 'seed' not in s and edition in known:
            what = f"T={s['merge_every']}" if 'merge_every' in s else f"r={s['rank']}" if 'rank' in s else ''
            key = cell['method'] + ' (first edition)' * bool(edition), bytes_, what
            best[key] = min(best.get(key, 9.0), cell['val_loss'])
    with picture('frontier', (8.5, 4.2), columns=0) as ((axes,),):
        for number, name in enumerate(dict.fromkeys(key[0] for key in best)):
            points = sorted((key[1] / 1e6, loss, key[2]) for key, loss in best.items() if key[0] == name)
            color, style = f'C{number}', 'osD^vP*Xph'[number]
            axes.plot(*zip(*(point[:2] for point in points)), style, color=color, label=name)
            for x, y, what in points if len(points) > 1 else ():
                axes.annotate(what, (x, y), (4, 4), textcoords='offset points', fontsize=7, color=color)
        axes.set_xscale('log')
        axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20], list(map(str, ticks)))
        axes.minorticks_off()
        axes.set(xlabel='MB that each of four workers puts on the wire a step (float32, ring)',
                 ylabel='validation loss (nats a byte)')
        axes.legend(fontsize=8)


def draw_convergence():
    """Loss and accuracy of the adaptation, each method at its best rate, against epochs and time."""
    times, epoch = seconds_of_steps('convergence'), 1078 / ADAPT['batch_size']
    found = groups('convergence', convergence_cells())
    with picture('convergence', (8.5, 6.2), (2, 2), 2, sharex='col', sharey='row') as plots:
        for (name, (mine, *_)), color in zip(found.items(), ('#333333', '#4c72b0', '#dd8452', '#55a868')):
            steps, trained = mine[0]['curve']['step'], mine[0]['trainable_parameters'] / 1e3
            rate = mine[0]['settings']['learning_rate']
            for row, key in zip(plots, ('val_loss', 'val_acc')):
                curves = [cell['curve'][key] for cell in mine]
                for axes, unit in zip(row, (1 / epoch, times[name])):
                    band(axes, [step * unit for step in steps], curves, color,
                         f'{name} ({trained:.0f}k trainable, learning rate {rate:g})')
        plots[0, 0].set(ylabel='validation loss (nats)', yscale='log')
        plots[0, 0].set_yticks([0.2, 0.5, 1, 2, 5], ['0.2', '0.5', '1', '2', '5'])
        plots[0, 0].minorticks_off()
        plots[1, 0].set(ylabel='validation accuracy', ylim=(0.5, 1), xlabel='epochs', xlim=(0, 20))
        plots[1, 1].set(xlabel='training, s (one CPU thread)', xlim=0)


def draw_layers():
    """Validation loss against trainable parameters; bars from the least to the largest of seeds."""
    with picture('layers', (6.4, 4.2), columns=0) as ((axes,),):
        for letters, (mine, *_) in groups('layers', layers_cells()).items():
            trained, mean = mine[0]['trainable_parameters'] / 1e6, statistics.mean(losses(mine))
            axes.errorbar(trained, mean, bars(mean, losses(mine)), fmt='o', capsize=3,
                          color='black' if letters == 'none' else '#4c72b0')
            right = 'L' in letters  # heads on the output layer move a point only a little to the right
            axes.annotate(letters, (trained, mean), (6 if right else -6, 5), textcoords='offset points',
                          ha='left' if right else 'right')
        axes.margins(0.1)
        axes.set(xlabel='trainable parameters, millions', ylabel='validation loss, nats per byte',
                 title='four split heads on A(ttn), M(lp), L(ogit)')


def draw_spectrum():
    """Effective ranks over training, a line for each method."""
    titles = {'change': 'what the weights changed by', 'weight': 'weights, heads merged',
              'gradient': 'full gradient'}
    with picture('spectrum', (10, 3.8), (1, 3)) as (panels,):
        for axes, (key, title) in zip(panels, titles.items()):
            for cell in kept('spectrum', SPECTRUM_CELLS):
                points = [(point['step'], point[key]) for point in cell['points'] if point[key]]  # at 0 none
                axes.plot(*zip(*points), 'o-', ms=3, label=cell['method'])
            axes.set(title=title, xlabel='step')
        panels[0].set_ylabel(f"effective rank, of {SCREEN['n_embd']}")


if __name__ == '__main__':
    benches = {bench.__name__: bench for bench in (
        heads, speed, memory, vit, communication, screening, quality, convergence, layers, spectrum, readme)}
    if len(sys.argv) < 2 or sys.argv[1] not in benches:
        print(f"usage: python bench.py {' | '.join(benches)} [options]", file=sys.stderr)
        raise SystemExit(2)
    with config.refusals():
        benches[sys.argv[1]](sys.argv[2:])
