"""
Checks what the README claims, on any machine:

$ python bench.py heads       time of multi-head LoRA, all heads at once against one after the other and full rank
$ python bench.py speed       GaLore's step, bases and projected backward, against galore-torch (where it is installed)
$ python bench.py memory      peak memory by method: real runs, and planned ones for what does not fit here
$ python bench.py vit         ViT-B and ViT-L at 224 pixels: parameters, memory and time of LoRA and GaLore against
                              full; finished cells are not run again
$ python bench.py communication  bytes a step of each method on several workers, and what they cost on slow links
$ python bench.py layers      validation loss and trainable parameters by the layers that have heads
$ python bench.py spectrum    effective rank of weights, of their change and of gradients over training
$ python bench.py screening   validation loss of each method on a small GPT, one setting changed at a time
$ python bench.py quality     validation loss of the finalists on a larger one, three seeds
$ python bench.py convergence how fast LoRA and full fine-tuning adapt a small ViT
$ python bench.py readme      renews the tables of these losses in README.md, and draws loss against bytes sent

Times are medians of interleaved runs, as ratios within one process. Cells go to assets/NAME.jsonl; finished trainings
are not run again.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import os
import platform
import re
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
from galore import GaLoreAdamW, LowRankAdamW, make_optimizer, param_groups, put_layers, take_bases
from lowrank import (MHLoRALinear, clip_gradients, count_parameters, drop_moments, freeze_rest, lowrank_layers, merge,
                     merged_state_dict)
from model import GPT, SIZES, GPTConfig, Llama, LlamaConfig
from prepare import Tokens

HERE = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# measuring


def interleaved(functions, repeats):
    """Runs every function once to warm up, then `repeats` times in turn. Returns {name: list of seconds}."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, name, base):
    """Median of the ratios of neighbouring runs: what one costs in units of the other, whatever the machine's mood."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


def machine():
    """What this runs on, in words: the GPU, or the processor and the number of its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            name = next((line.partition(': ')[2].strip() for line in file if line.startswith('model name')), name)
    return f'{name}, {os.cpu_count()} cores'


def keep(name, cells):
    """Appends measured cells to assets/NAME.jsonl, each with the machine, torch's version and today's date."""
    about = dict(machine=machine(), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    with open(f'{HERE}/assets/{name}.jsonl', 'a', encoding='utf-8') as file:
        file.writelines(json.dumps({**cell, **about}) + '\n' for cell in cells)


def record(name, cell, line):
    """Prints the line of a measured cell and keeps it."""
    print(line, flush=True)
    keep(name, [cell])


def kept(name, cells=None):
    """What assets/NAME.jsonl holds, or of that what is among cells (method, settings)."""
    if cells is not None:
        return [cell for cell in kept(name) if (cell['method'], cell['settings']) in cells]
    if not os.path.exists(f'{HERE}/assets/{name}.jsonl'):
        return []
    with open(f'{HERE}/assets/{name}.jsonl', encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def parse(name, words, **defaults):
    """Options --key of a bench, each of its default's type: a list takes several, a tuple one of its values or none.
    Whole numbers are at least 1."""
    parser = argparse.ArgumentParser(f'bench.py {name}')
    for key, value in defaults.items():
        if isinstance(value, tuple):
            parser.add_argument(f'--{key}', choices=value)
        else:
            first, many = (value[0], '+') if isinstance(value, list) else (value, None)
            parser.add_argument(f'--{key}', type=type(first), default=value, nargs=many,
                                choices=value if key == 'methods' else None)
    options = parser.parse_args(words)
    for key, value in vars(options).items():
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, int) and x < 1:
                parser.error(f'--{key} {x} makes no sense: give at least 1')
    if getattr(options, 'device', 'cpu') != 'cpu' and not torch.cuda.is_available():
        parser.error(f'--device {options.device}: torch finds no CUDA GPU here, give cpu')
    return options


@contextlib.contextmanager
def picture(name, size, shape=(1, 1), columns=3, grid=True, **sharing):
    """The panels (rows, columns) of assets/NAME.png, with the legend of the last one below unless columns is 0."""
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


def run_cells(name, words, script, base, cells, results, first=None):
    """
    Trains what assets/NAME.jsonl lacks of the cells (method, settings) with a script, each on one thread.

    words: the command line. base: settings that all cells share; a cell's 'ranks': how many processes torchrun starts.
    results(records): what to keep of the lines of a run's log.jsonl, a dict, besides its last validation loss, which is
    None where the run diverged. first(): called before the first run.
    """
    options = parse(name, words, jobs=2, methods=list(dict(cells)))  # jobs: runs side by side, each on one thread
    done = [(cell['method'], cell['settings']) for cell in kept(name)]
    todo = [cell for number, cell in enumerate(cells) if cell not in done and cell not in cells[:number]
            and cell[0] in options.methods]
    if todo and first:
        first()
    start, finished = time.time(), []

    def run(cell):
        method, changes = cell
        with tempfile.TemporaryDirectory() as folder:
            settings = {'min_lr': changes['learning_rate'] / 10, **base, **changes, 'out_dir': folder}
            ranks = settings.pop('ranks', 1)
            launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
            ran = subprocess.run([sys.executable, *launch, script, *(f'--{key}={x}' for key, x in settings.items())],
                                 cwd=HERE, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
            lines = [line for line in ran.stderr.splitlines() if 'rror: ' in line and 'ChildFailed' not in line]
            said = next((line for line in lines if line.startswith('error: ')), lines[-1] if lines else '')
            if ran.returncode and ' is nan at step' not in ran.stderr and ' is inf at step' not in ran.stderr:
                print(f'{method} {changes} did not run: {said}', flush=True)
                return
            records = []
            if os.path.exists(f'{folder}/log.jsonl'):
                with open(f'{folder}/log.jsonl', encoding='utf-8') as file:
                    records = [json.loads(line) for line in file]
        loss = None  # a run that diverged is a result too
        if not ran.returncode:
            loss = next(record['val_loss'] for record in reversed(records) if 'val_loss' in record)
        keep(name, [{'method': method, 'settings': changes, 'val_loss': loss, **results(records)}])
        finished.append(cell)
        left = (time.time() - start) / len(finished) * (len(todo) - len(finished))
        print(f"{method:14} {'diverged' if loss is None else f'{loss:.4f}'}  {changes}  ({left / 60:.0f} min left)",
              flush=True)

    print(f'{len(todo)} cells to run')
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, todo))


def trainer(model, settings, batch=None, device='cpu'):
    """
    (optimizer, step) of a model without heads: a script's heads, optimizer and step in one process.

    settings: all that the script has. batch(number): the data of a step; None: made-up data, and of micro-steps two, as
    with several gradients are held in the second one.
    """
    s, vit, steps, micro_steps = settings, 'img_size' in settings, itertools.count(), 1
    with contextlib.redirect_stdout(None):
        put_layers(model, s)
        if vit and (s['train'] == 'classifier' or s['train'] == 'auto' and s['lowrank']):
            freeze_rest(model, ('logit',))
        optimizer = make_optimizer(model, s)
    if batch is None:
        micro_steps = min(2, s['gradient_accumulation_steps'])
        x = y = torch.zeros(s['batch_size'], *(() if vit else (s['block_size'],)), dtype=torch.int64)
        if vit:
            x = torch.zeros(s['batch_size'], 3, *model.patch_embed.img_size, dtype=getattr(torch, s['param_dtype']))

    def step():
        number = next(steps)
        config.set_learning_rate(optimizer, s, number)
        for micro_step in range(micro_steps):
            optimizer.begin(number, micro_step, micro_steps)
            images, labels = (x, y) if batch is None else (part.to(device) for part in batch(number))
            with torch.autocast(device, torch.bfloat16, enabled=s['dtype'] != s['param_dtype']):
                loss = F.cross_entropy(model(images).float(), labels) if vit else model(images, labels)
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


def timed(methods, base, repeats, steps=1, batch=None, device='cpu'):
    """
    {method: cell} of training steps of methods (settings by name), so many at a time, interleaved.

    base: settings of all. batch: see `trainer`. A cell has the numbers of trainable parameters, seconds of a step, and
    the times in units of the first method's: the median (to_full) and those of all repeats (ratios).
    """
    functions, trainable = {}, {}
    for method, changes in methods.items():
        settings = {**base, **changes}
        model = model_of(settings).to(device, getattr(torch, settings['param_dtype']))
        _, step = trainer(model, settings, batch, device)
        functions[method] = lambda step=step: [step() for _ in range(steps)]
        trainable[method] = count_parameters(model)['trainable']
    seconds, first = interleaved(functions, repeats), next(iter(methods))
    return {method: dict(trainable=trainable[method], seconds=statistics.median(seconds[method]) / steps,
                         to_full=ratio(seconds, method, first),
                         ratios=[a / b for a, b in zip(seconds[method], seconds[first])]) for method in methods}


# -----------------------------------------------------------------------------
# heads


def step_of(module, x, dtype, device):
    """Forward and backward of a layer under autocast, its input's gradient included."""
    def forward():
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32'):
            return module(x)
    grad = torch.randn_like(forward())

    def run():
        forward().backward(grad)
        for parameter in (x, *module.parameters()):
            parameter.grad = None
    return run


def heads_layer(device, repeats):
    """One 768 -> 2304 linear layer, 2,048 tokens: heads in parallel, one after the other, and a trained dense layer."""
    print('\n768 -> 2304, 2,048 tokens, forward and backward')
    print(f"{'dtype':10}{'heads':>6}{'rank':>6}{'dense ms':>10}{'parallel/loop':>15}{'parallel/dense':>15}")
    for dtype, (heads, rank) in itertools.product(('float32', 'bfloat16'), ((1, 4), (4, 1), (4, 4), (16, 4), (4, 16))):
        x = torch.randn(2048, 768, device=device, requires_grad=True)
        functions = {'dense': step_of(nn.Linear(768, 2304, device=device), x, dtype, device)}
        for compute in ('parallel', 'sequential'):
            layer = MHLoRALinear(nn.Linear(768, 2304, device=device), heads, rank, 4.0, head_compute=compute)
            nn.init.normal_(layer.B)
            functions[compute] = step_of(layer, x, dtype, device)
        seconds = interleaved(functions, repeats)
        cell = dict(bench='heads_layer', dtype=dtype, heads=heads, rank=rank,
                    dense_ms=1000 * statistics.median(seconds['dense']),
                    parallel_to_loop=ratio(seconds, 'parallel', 'sequential'),
                    parallel_to_dense=ratio(seconds, 'parallel', 'dense'))
        record('heads', cell, f"{dtype:10}{heads:6}{rank:6}{cell['dense_ms']:10.1f}{cell['parallel_to_loop']:15.2f}"
               f"{cell['parallel_to_dense']:15.2f}")


def heads_steps(cases, sequences, repeats, device):
    """A training step of GPT-2 124M, sequences x 512 tokens, AdamW included: heads against full rank. cases: (dtype,
    layers with heads, heads, rank). Those that assets/heads.jsonl has are not run again."""
    import train_gpt
    print(f'\nGPT-2 124M, {sequences} x 512 tokens, whole step with AdamW')
    print(f"{'dtype':10}{'heads on':16}{'heads':>6}{'rank':>6}  {'compute':12}{'trainable':>12}{'of full':>9}"
          f"{'s/step':>8}{'to full rank':>14}")
    for dtype, targets, count, rank in cases:
        about = dict(bench='heads_steps', device=device, sequences=sequences, dtype=dtype, targets=targets, heads=count,
                     rank=rank)
        if any(about.items() <= cell.items() for cell in kept('heads') if cell['bench'] == 'heads_steps'):
            continue
        there = dict(lowrank=targets, heads=count, rank=rank)
        cells = timed({'full': {}, 'parallel': there, 'sequential': {**there, 'head_compute': 'sequential'}},
                      {**train_gpt.defaults, 'batch_size': sequences, 'dtype': dtype, 'grad_clip': 0.0}, repeats,
                      batch=lambda number: torch.randint(50257, (2, sequences, 512)), device=device)
        for compute, cell in cells.items():
            cell.update(about, compute=compute, trainable_to_full=cell['trainable'] / cells['full']['trainable'])
            print(f"{dtype:10}{targets:16}{count:6}{rank:6}  {compute:12}{cell['trainable']:12,}"
                  f"{cell['trainable_to_full']:9.3f}{cell['seconds']:8.2f}{cell['to_full']:14.2f}", flush=True)
        keep('heads', cells.values())
        gc.collect()  # three models and their moments, before the next three


def draw_heads(device, dtype):
    """assets/heads.png: time of a step, full rank = 1, with the range of its repeats, and trainable parameters, against
    the rank; a panel for each number of heads."""
    cells = [cell for cell in kept('heads') if cell['bench'] == 'heads_steps'
             and (cell['dtype'], cell['device'], cell['sequences'], cell['targets']) == (dtype, device, 2, 'attn')]
    with picture('heads', (9.3, 3.4), (1, 3), 4, sharey=True) as panels:
        for axes, count in zip(panels[0], (1, 4, 16)):
            for compute, style in (('parallel', 'o-'), ('sequential', 's--')):
                mine = sorted((cell for cell in cells if (cell['compute'], cell['heads']) == (compute, count)),
                              key=lambda cell: cell['rank'])
                ranks, times = ([cell[key] for cell in mine] for key in ('rank', 'to_full'))
                spread = [[time - min(cell['ratios']) for time, cell in zip(times, mine)],
                          [max(cell['ratios']) - time for time, cell in zip(times, mine)]]
                axes.errorbar(ranks, times, spread, fmt=style, capsize=3, label=compute)
            axes.plot(ranks, [cell['trainable_to_full'] for cell in mine], '^:', color='grey',
                      label='trained parameters')
            axes.axhline(1.0, color='black', lw=1, label='full rank')
            axes.set_xscale('log', base=2)
            axes.set_xticks(ranks, ranks)
            axes.set(title=f"{count} head{'s' * (count > 1)}", xlabel='rank of each head')
        panels[0, 0].set(ylabel='time, parameters; full rank = 1', ylim=(0, None))


def heads(words):
    options = parse('heads', words, device='cuda' if torch.cuda.is_available() else 'cpu', repeats=5,
                    only=('layer', 'model', 'figure'), dtype=('bfloat16', 'float32'))  # dtype: of the figure
    config.keep_freed_memory()  # as the scripts do on a CPU
    if options.only in (None, 'layer'):
        heads_layer(options.device, 4 * options.repeats)
    if options.only in (None, 'model'):
        heads_steps([(dtype, targets, 4, 4) for dtype in ('float32', 'bfloat16')
                     for targets in ('attn', 'attn,mlp', 'attn,mlp,logit')], 4, options.repeats, options.device)
    if options.only in (None, 'figure'):
        dtype = options.dtype or 'bfloat16'
        heads_steps([(dtype, 'attn', count, rank) for count in (1, 4, 16) for rank in (1, 4, 16, 64)], 2,
                    options.repeats, options.device)
        draw_heads(options.device, dtype)


# -----------------------------------------------------------------------------
# speed

SHAPE, RANK = (2048, 5461), 512  # an MLP matrix of LLaMA-1B at a quarter of its width


def speed_step(device, repeats):
    """A step of one matrix without a refresh: our optimizer against galore-torch's."""
    try:
        from galore_torch import GaLoreAdamW as Reference
    except ImportError:
        print('galore-torch is not installed, so the step is not compared (pip install galore-torch)')
        return
    for dtype in ('float32', 'bfloat16'):
        functions = {}
        for name, make, more in (('galore-torch', Reference, {}), ('ours', GaLoreAdamW, {'basis': 'random'}),
                                 ('ours, fira', GaLoreAdamW, {'basis': 'random', 'rule': 'fira'})):
            weight = nn.Parameter(0.02 * torch.randn(SHAPE, device=device).to(getattr(torch, dtype)))
            weight.grad = torch.randn_like(weight)
            functions[name] = make([dict(params=[weight], rank=RANK, update_proj_gap=10**9, scale=0.25, proj_type='std',
                                         **more)], lr=0.01).step
        linear = nn.Linear(*SHAPE[::-1], bias=False, device=device, dtype=weight.dtype)
        layer = MHLoRALinear(linear, rank=RANK, factors='basis', merge_every=1)
        mine = LowRankAdamW(layer, lr=0.01, basis='random', basis_every=10**9)
        mine.begin(0)
        layer.trained.grad = torch.randn_like(layer.trained)  # as the projected backward leaves it
        functions['ours, after the projected backward'] = mine.step
        P, weight = galore.orthonormal(torch.randn(SHAPE[0], RANK, device=device)).to(weight.dtype), weight.detach()
        functions['two plain products'] = lambda: weight.addmm_(P, P.mT @ weight, alpha=-1e-9)
        seconds = interleaved(functions, repeats)
        for name in functions:
            cell = dict(bench='speed_step', dtype=dtype, optimizer=name, ms=1000 * statistics.median(seconds[name]),
                        to_galore_torch=ratio(seconds, name, 'galore-torch'))
            record('speed', cell, f"step {dtype:10}{name:36}{cell['ms']:8.1f} ms{cell['to_galore_torch']:8.2f} of "
                   'galore-torch')


def speed_refresh(device, repeats):
    """A new basis: subspace iteration, from a sketch (cold) and from the old basis (warm), against the SVD."""
    for dtype in ('float32', 'bfloat16'):
        G = torch.randn(SHAPE, device=device).to(getattr(torch, dtype))
        old = take_bases(G, RANK, True, False, 'power')
        seconds = interleaved({'svd': lambda: take_bases(G, RANK, True, False, 'svd'),
                               'power, cold': lambda: take_bases(G, RANK, True, False, 'power'),
                               'power, warm': lambda: take_bases(G, RANK, True, False, 'power', old)}, repeats)
        for name in seconds:
            cell = dict(bench='speed_refresh', dtype=dtype, basis=name, ms=1000 * statistics.median(seconds[name]),
                        to_svd=ratio(seconds, name, 'svd'))
            record('speed', cell, f"refresh {dtype:10}{name:15}{cell['ms']:9.1f} ms{cell['to_svd']:8.3f} of the SVD")


def speed_energy(device, steps=(1, 100, 300)):
    """Part of the gradient's energy |P^T G|^2 that `power` captures of what the SVD captures, for a GPT in training."""
    torch.manual_seed(0)
    data = Tokens('stdlib', 'train', 128, f'{HERE}/data')
    model = GPT(GPTConfig(128, data.vocab_size, 4, 4, 256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    matrices = {name: p for name, p in model.named_parameters() if '.attn.' in name or '.mlp.' in name}
    matrices = {name: p for name, p in matrices.items() if p.dim() == 2}
    warm = {}
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        x, y = data.batch(16, step)
        model(x.to(device), y.to(device)).backward()
        for rank in (64, 16) if step in steps else ():
            least = {}
            for name, p in matrices.items():
                left, right = galore.sides(p.shape, 'std')

                def energy(bases):
                    return galore.project(p.grad, *bases).square().sum().item()
                exact = energy(take_bases(p.grad, rank, left, right, 'svd'))
                kinds = {'cold': take_bases(p.grad, rank, left, right, 'power', seed=step)}
                if (name, rank) in warm:
                    kinds['warm'] = take_bases(p.grad, rank, left, right, 'power', warm[name, rank])
                warm[name, rank] = kinds.get('warm', kinds['cold'])
                for kind, bases in kinds.items():
                    least[kind] = min(least.get(kind, 1.0), energy(bases) / exact)
            for kind, value in least.items():
                record('speed', dict(bench='speed_energy', step=step, rank=rank, start=kind, least_of_svd=value),
                       f'energy, step {step:3}, rank {rank:2} of width 256, {kind}: at least {value:.4f} of the SVD')
        optimizer.step()


def speed_lean(device, repeats):
    """A whole training step of LLaMA in bfloat16, 8 x 256 tokens: full rank with fused AdamW, GaLore with the full and
    with the projected backward. What new bases every ten steps cost is divided by twenty, as they are taken every 200;
    sketches add up over ten steps in both."""
    import train_llama
    base = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16', 'batch_size': 8, 'grad_clip': 0.0,
            'galore_gap': 10**9}
    few = dict(size='350m', n_layer=4, vocab_size=32)  # so few tokens that the output layer is nothing
    for case, shape, rank in (('LLaMA 60M', dict(size='60m', vocab_size=32000), 128),
                              ('4 layers of LLaMA 350M, no output', few, 256),
                              ('4 layers of LLaMA 350M, no output', few, 128)):
        methods = {name: {**LLAMA_METHODS[name], 'galore_rank': rank}
                   for name in ('full rank', 'GaLore', 'GaLore, projected')}
        often = {f'{name}, bases': {**methods[name], 'galore_gap': 10} for name in methods if name != 'full rank'}
        cells = timed({**methods, **often}, {**base, **shape}, repeats, 10,
                      lambda number: torch.randint(32, (2, 8, 256)), device)
        for name in methods:
            cell, steady = cells[name], cells[name]['to_full']
            new = cells.get(f'{name}, bases', cell)['to_full']
            cell.update(bench='speed_lean', case=case, rank=rank, method=name,
                        to_full_with_bases=steady + (new - steady) / 20)
            record('speed', cell, f"{case:34} rank {rank:4} {name:18}{cell['seconds']:7.3f} s/step{steady:7.3f} of "
                   f"full rank, {cell['to_full_with_bases']:6.3f} with new bases every 200 steps")


PRODUCT = 4096  # rows and columns of the products that are this machine's peak


def speed_methods(device, repeats):
    """Training of a GPT of width 512 by every method, as train_gpt.py does it, against the peak of matrix products."""
    import train_gpt
    width, layers, vocabulary, time = 512, 8, 257, 256
    weights = 12 * layers * width**2 + vocabulary * width  # of products: attention, MLP, output layer
    galore_quarter = dict(optimizer='galore', galore_rank=width // 4)
    lte = dict(lowrank='attn,mlp', heads=4, head_input='split', merge_every=10)
    methods = {'full rank': {}, 'MHLoRA': dict(lowrank='attn,mlp', heads=4, rank=16), 'GaLore': galore_quarter,
               'GaLore, projected': dict(**galore_quarter, galore_backward='projected', galore_basis='sketch'),
               'LTE': dict(**lte, rank=16),
               'GaLoLTE': dict(**lte, rank=width // 4, head_basis='gradient', galore_basis='sketch')}
    base = {**train_gpt.defaults, 'dtype': 'bfloat16', 'batch_size': 8, 'block_size': time, 'vocab_size': vocabulary,
            'n_layer': layers, 'n_head': 8, 'n_embd': width}
    cells = timed(methods, base, repeats, 10, lambda number: torch.randint(vocabulary, (2, 8, time)), device)
    products = {dtype: torch.randn(PRODUCT, PRODUCT, device=device).to(getattr(torch, dtype))
                for dtype in ('bfloat16', 'float32')}
    seconds = interleaved({dtype: lambda A=A: A @ A for dtype, A in products.items()}, repeats)
    peaks = {dtype: 2 * PRODUCT**3 / min(seconds[dtype]) for dtype in products}
    print(f'GPT of {weights / 1e6:.1f}M weights in products (N), 8 x {time} tokens a step, bfloat16 autocast; ten '
          'steps at a time, with their merges and new bases')
    print(f"peak: the best of {repeats} products of {PRODUCT} x {PRODUCT} matrices, "
          f"{peaks['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16, {peaks['float32'] / 1e9:.0f} in float32")
    print('of peak: 6 N operations a token, those of full rank, for every method (MFU), over the peak in bfloat16')
    print(f"{'method':20}{'s/step':>8}{'tokens/s':>10}{'to full rank':>14}{'of peak':>9}")
    for name, cell in cells.items():
        speed = 8 * time / cell['seconds']
        cell.update(bench='speed_methods', device=device, method=name, tokens_per_s=speed, weights=weights,
                    tokens_per_s_to_full=statistics.median(1 / x for x in cell['ratios']),
                    of_peak=6 * weights * speed / peaks['bfloat16'], peak=peaks['bfloat16'],
                    peak_float32=peaks['float32'])
        record('speed', cell, f"{name:20}{cell['seconds']:8.3f}{speed:10.0f}{cell['tokens_per_s_to_full']:14.2f}"
               f"{cell['of_peak']:9.2f}")


def speed_nanogpt(path, repeats):
    """A step of GPT-2 124M at full rank, 4 x 512 tokens, on the CPU: ours against nanoGPT's model and optimizer."""
    if not os.path.isfile(os.path.join(path, 'model.py')):
        raise ValueError(f"--nanogpt '{path}' has no model.py: give a checkout of karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(path, 'model.py'))
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    x, y = torch.randint(50257, (2, 4, 512))

    def stepper(model, optimizer, loss_of):
        def step():
            loss_of(model).backward()
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step
    model = theirs.GPT(theirs.GPTConfig(block_size=512, vocab_size=50257))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
    functions = {'nanoGPT': stepper(model, optimizer, lambda net: net(x, y)[1])}
    for dtype in ('float32', 'bfloat16'):
        def loss_of(net, dtype=dtype):
            with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                return net(x, y)
        model = GPT(GPTConfig(block_size=512))
        functions[f'ours, {dtype}'] = stepper(model, torch.optim.AdamW(param_groups(model, 0.1), fused=True), loss_of)
    seconds = interleaved(functions, repeats)
    for name in functions:
        cell = dict(bench='speed_nanogpt', loop=name, seconds=statistics.median(seconds[name]),
                    tokens_per_s_to_nanogpt=ratio(seconds, 'nanoGPT', name))
        record('speed', cell, f"{name:16}{cell['seconds']:7.2f} s/step{cell['tokens_per_s_to_nanogpt']:7.2f} of "
               "nanoGPT's tokens/s")


def speed(words):
    options = parse('speed', words, device='cuda' if torch.cuda.is_available() else 'cpu', repeats=12, nanogpt='',
                    only=('step', 'refresh', 'energy', 'lean', 'methods'))
    device, repeats = options.device, options.repeats
    if options.nanogpt:
        return speed_nanogpt(options.nanogpt, repeats)
    parts = {'step': lambda: speed_step(device, repeats), 'refresh': lambda: speed_refresh(device, 2),
             'energy': lambda: speed_energy(device),
             # these as the scripts run; galore-torch and nanoGPT are measured with memory as their users have it
             'lean': lambda: (config.keep_freed_memory(), speed_lean(device, max(3, repeats // 4))),
             'methods': lambda: (config.keep_freed_memory(), speed_methods(device, max(3, repeats // 4)))}
    for name, part in parts.items():
        if options.only in (None, name):
            part()
    if not options.only:
        print('nanoGPT is not compared: give --nanogpt FOLDER, a checkout of it')


# -----------------------------------------------------------------------------
# memory

LLAMA_METHODS = {  # the last one is what llama_1b_galore_lean.py does
    'full rank': dict(optimizer='adamw'),
    'GaLore': dict(optimizer='galore'),
    'GaLore, projected': (lean := dict(optimizer='galore', galore_backward='projected', galore_basis='sketch')),
    'GaLore, projected, per layer': (lean := dict(lean, per_layer=True, grad_clip=0.0)),
    'the same, 8 bits, checkpointing': dict(lean, state_bits=8, checkpointing=True)}
# a worker with one head; how often it merges does not matter here, so that the few steps of a measurement have a merge
WORKER = dict(optimizer='adamw', lowrank='attn,mlp', heads=1, head_input='split', merge_every=2)
MEMORY_METHODS = {**LLAMA_METHODS, 'MHLoRA, 4 heads': dict(optimizer='adamw', lowrank='attn,mlp', heads=4, rank=16),
                  'LTE, a worker': dict(**WORKER, rank=64),
                  'GaLoLTE, a worker': dict(**WORKER, head_basis='gradient', galore_basis='sketch')}


def llama_shape(settings, layers=None):
    """The LlamaConfig that train_llama.py makes of its settings; layers: another depth."""
    s = settings
    width, depth, many, hidden = (s[key] or usual for key, usual in
                                  zip(('n_embd', 'n_layer', 'n_head', 'n_mlp'), SIZES[s['size']]))
    return LlamaConfig(s['block_size'], s['vocab_size'] or 32000, width, layers or depth, many, hidden,
                       s['n_kv_head'] or many, checkpointing=s['checkpointing'])


def model_of(settings, layers=None):
    """The model that a script makes of its settings, without heads: LLaMA where they have a size, a ViT where they have
    an img_size, else a GPT. layers: another depth."""
    s = settings
    if 'size' in s:
        return Llama(llama_shape(s, layers))
    if 'img_size' in s:
        import train_vit
        shape = {key: s[key] for key in ('model', *train_vit.SHAPE)}
        model = train_vit.create({**shape, 'n_layer': layers or s['n_layer']}, 9)
        model.set_grad_checkpointing(s['checkpointing'])
        return model
    return GPT(GPTConfig(s['block_size'], s['vocab_size'] or 50257, layers or s['n_layer'], s['n_head'], s['n_embd'],
                         s['dropout'], s['bias'], s['checkpointing']))


class Peak(TorchDispatchMode):
    """Peak bytes of the tensors alive: a model's and all that appear while it is on. The same numbers as torch's
    MemTracker in under half of its time, which goes into statistics of every module."""

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
        out = function(*args, **kwargs or {})
        for x in (out,) if torch.is_tensor(out) else tree_leaves(out):
            if torch.is_tensor(x):
                self.add(x)
        if self.now > self.bytes:
            self.bytes = self.now
            self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return out


def planned(settings, layers, batch_size):
    """Peak bytes of two training steps by category, without computing anything: fake tensors. Sketches of the blocks
    whose turn it is come later, and are left out. layers: None: as deep as the settings say."""
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
        held = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]  # factors of zeros share theirs
        weights = sum({x._cdata: x.nbytes() for x in held}.values())
        weights -= sum(layer.basis.nbytes for layer in lowrank_layers(model) if layer.factors == 'basis')  # state
    return dict(weights=weights, state=state, gradients=peak.gradients,
                activations=peak.bytes - weights - state - peak.gradients, total=peak.bytes)


def extrapolated(settings, layers, batch_size):
    """`planned` for a deep model from two and three layers: every category is linear in their number. (A shallow model
    may peak at another moment than a deep one; at 350M and 1B the totals agree with real runs.)"""
    two, three = (planned(settings, shallow, batch_size) for shallow in (2, 3))
    return {key: two[key] + (layers - 2) * (three[key] - two[key]) for key in two}


def memory_real(settings, steps=3):
    """(growth of the peak resident size over training steps in bytes, seconds), in a fresh process that gives freed
    memory back at once."""
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


def memory(words):
    import train_llama
    options = argparse.ArgumentParser('bench.py memory')
    options.add_argument('--sizes', nargs='+', default=['60m', '350m', '1b', '7b'], choices=SIZES)
    options.add_argument('--real', nargs='*', default=['60m', '350m', '1b'], help='the sizes to run for real too')
    options.add_argument('--lean', action='store_true', help='only the leanest method, against nothing')
    options.add_argument('--config', help='plan this config of a script instead')
    options.add_argument('--budget', default='12GiB', help='with --config: memory of the card')
    options = options.parse_args(words)
    base = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16', 'block_size': 256, 'batch_size': 1,
            'vocab_size': 32000, 'gradient_accumulation_steps': 1}
    if options.config:
        return plan(options.config, options.budget)
    print('LLaMA in bfloat16, 1 x 256 tokens, GB: planned with fake tensors, and growth of the resident size, measured')
    print(f"{'size':6}{'method':34}{'rank':>6}{'weights':>9}{'state':>8}{'gradients':>11}{'activations':>13}"
          f"{'planned':>9}{'of full':>9}{'measured':>10}{'of full':>9}")
    done = memory_cells()
    for size in options.sizes:
        width, depth = SIZES[size][:2]
        full = None
        for method, changes in MEMORY_METHODS.items():
            if options.lean and '8 bits' not in method:
                continue
            usual = 0 if method == 'full rank' else width // 4 if '8 bits' in method else width // 2
            rank = changes.get('rank', usual)
            settings = {**base, **changes, 'size': size, 'galore_rank': rank or 1, 'rank': rank or 1}
            cell, real = done.get((size, method), {}), size in options.real
            if not cell or real and 'measured' not in cell:
                cell = cell or dict(bench='memory', size=size, method=method, rank=rank,
                                    **extrapolated(settings, depth, 1))
                if real:
                    cell['measured'], cell['seconds'] = memory_real(settings)
                keep('memory', [cell])
            if method == 'full rank':
                full = cell
            numbers = ''.join(f'{cell[key] / 1e9:{wide}.2f}' for key, wide in
                              (('weights', 9), ('state', 8), ('gradients', 11), ('activations', 13), ('total', 9)))
            of_full = f"{cell['total'] / full['total']:9.2f}" if full else 9 * ' '
            shown = f"{cell['measured'] / 1e9:10.2f}" if 'measured' in cell else ''
            shown += f"{cell['measured'] / full['measured']:9.2f}" if shown and 'measured' in (full or {}) else ''
            print(f'{size:6}{method:34}{rank:6}{numbers}{of_full}{shown}', flush=True)
            if options.lean and 'measured' in cell:
                print(f"three steps, the first bases included: {cell['seconds']:.0f} s")
    draw_memory()


def memory_cells():
    """{(size, method): the last cell of it}, sizes and methods in order."""
    cells = {(cell['size'], cell['method']): cell for cell in kept('memory')}
    return {key: cells[key] for key in itertools.product(SIZES, MEMORY_METHODS) if key in cells}


def draw_memory():
    """assets/memory.png: peak memory of LLaMA by category and method, and the measured total as a line."""
    panels = {}
    for (size, method), cell in memory_cells().items():
        name = method.replace(', ', ',\n').replace('the same', 'all that')
        panels.setdefault(f'LLaMA {size.upper()}', []).append((name, cell, cell.get('measured')))
    draw_peaks('memory', panels)


def draw_peaks(name, panels):
    """Stacked bars of peak memory by category. panels: {title: [(bar's name, bytes by category, measured or None)]}."""
    longest = max(map(len, panels.values()))
    with picture(name, (3.1 * len(panels), 1 + 0.5 * longest), (1, len(panels)), 5, False) as all_axes:
        for axes, (title, bars) in zip(all_axes[0], panels.items()):
            left = [0.0] * len(bars)
            for key, color, category in (('weights', '#4c72b0', 'weights'), ('state', '#dd8452', 'optimizer state'),
                                         ('gradients', '#c44e52', 'gradients'),
                                         ('activations', '#8c8c8c', 'activations and buffers')):
                values = [parts.get(key, 0) / 1e9 for _, parts, _ in bars]
                axes.barh([bar for bar, _, _ in bars], values, left=left, color=color,
                          label=category if any(values) else None)
                left = [a + b for a, b in zip(left, values)]
            for i, (_, _, measured) in enumerate(bars):
                if measured:
                    axes.plot([measured / 1e9] * 2, [i - 0.4, i + 0.4], color='black', lw=2)
            axes.plot([], [], color='black', lw=2, label='measured' if any(bar[2] for bar in panels[next(iter(panels))])
                      else None)
            axes.invert_yaxis()
            axes.set(title=title, xlabel='peak memory, GB')
            axes.tick_params('y', labelsize=7, labelleft=axes.get_subplotspec().is_first_col() or len(bars) < longest)


def draw_vit():
    """assets/vit.png: planned peak memory of ViT-B and ViT-L at batch 32; gradients hardly live at the peak."""
    cells, panels = {(cell['model'], cell['method']): cell for cell in kept('vit')}, {}
    titles = {'vit_base_patch16_224': 'ViT-B/16, 32 images', 'vit_large_patch16_224': 'ViT-L/16, 32 images'}
    for model, method in itertools.product(titles, VIT_METHODS):
        if (model, method) in cells:
            cell = cells[model, method]
            rest = cell['planned_32'] - cell['weights'] - cell['state']
            panels.setdefault(titles[model], []).append((method, {**cell, 'activations': rest}, None))
    draw_peaks('vit', panels)


def plan_methods(settings, defaults):
    """{method: settings} of what a config's script can do instead: with the config's heads, or else some usual ones."""
    usual = ('lowrank', 'heads', 'head_input', 'head_basis', 'merge_every', 'merge_reset', 'galore_basis',
             'galore_backward', 'per_layer', 'state_bits')
    plain = {**settings, **{key: defaults[key] for key in usual}}
    if 'size' in settings:
        methods = {name: {**plain, **changes, 'checkpointing': changes.get('checkpointing', settings['checkpointing'])}
                   for name, changes in LLAMA_METHODS.items()}
    else:
        methods = {name: {**plain, **LLAMA_METHODS[name]} for name in ('full rank', 'GaLore', 'GaLore, projected')}
    s = settings
    if not s['lowrank']:
        s = {**plain, 'optimizer': 'adamw', 'lowrank': 'attn,mlp' if 'size' in s else 'attn',
             'heads': 1 if 'img_size' in s else 4, 'rank': 4}
    if s['lowrank']:
        kind = ('GaLoLTE' if s['head_basis'] == 'gradient' else 'LTE' if s['head_input'] == 'split' else
                'ReLoRA' if s['merge_reset'] else 'LoRA' if s['heads'] == 1 else 'MHLoRA')
        methods[f"{kind}, {s['heads']} head{'s' * (s['heads'] > 1)} of rank {s['rank']}"] = s
    return methods


def plan(path, budget):
    """Which methods, dtypes and batch sizes of a config fit on a card of this size; computes nothing, needs no GPU."""
    number = re.fullmatch(r'([\d.e-]+)(GiB|GB|MiB)', budget)
    if not number:
        config.fail(f'--budget={budget!r} is no number with a unit: write it as 12GiB or 12GB')
    # CUDA itself, and what its allocator cannot reuse, want about 1 GB
    room = float(number[1]) * {'GiB': 2**30, 'GB': 10**9, 'MiB': 2**20}[number[2]] - 10**9
    script = None
    if os.path.isfile(path):  # else config.load says that it is not there
        with open(path, encoding='utf-8') as file:
            script = re.search(r'\btrain_(gpt|llama|vit)\b', file.read())
        if not script:
            config.fail(f"config file '{path}' does not say whose it is: write '# python train_gpt.py {path}' (or "
                        'train_llama.py, train_vit.py) into its second line')
    defaults = importlib.import_module(script[0] if script else 'train_gpt').defaults
    settings = {**config.load({}, defaults, [path]), 'dtype': 'bfloat16'}
    if 'img_size' not in settings and not settings['vocab_size']:
        with contextlib.suppress(ValueError, OSError):  # the data may be elsewhere
            found = Tokens(settings['dataset'], 'train', settings['block_size'], settings['data_dir']).vocab_size
            settings['vocab_size'] = max(found, 32000 if 'size' in settings else 0)
    with config.refusals():
        with torch.device('meta'):
            model = model_of(settings)
        depth = model.config.n_layer if hasattr(model, 'config') else len(model.blocks)
        many = max(1, 8192 // settings.get('block_size', 256))  # enough for activations to make the peak
        what = f"sequences of {settings['block_size']}" if 'block_size' in settings else 'images'
        print(f"{path}, {count_parameters(model)['total'] / 1e6:,.0f}M parameters, {what}, {budget}; the largest "
              'micro-batch that fits one process\nwith 1 GB left to CUDA itself and to what its allocator cannot reuse')
        print(f"{'method':34}{'weights in':>12}{'batch':>7}{'GB':>8}{'weights':>9}{'state':>8}")
        for method, here in plan_methods(settings, defaults).items():
            parts = here['heads'] if here['head_input'] == 'split' else 1  # such heads divide the batch
            for dtype in ('float32', 'bfloat16'):
                here, fits = {**here, 'param_dtype': dtype}, 0
                # the optimizer's step makes the peak of small batches; then it grows along a line with activations
                one = extrapolated(here, depth, parts)
                total = one['total']
                if total <= room:
                    b = -(-many // parts) * parts
                    low, high = (extrapolated(here, depth, n)['total'] for n in (b, 2 * b))
                    slope = (high - low) / b
                    start = low - b * slope
                    fits = max(int((room - start) // slope) // parts, 1) * parts
                    total = max(total, start + fits * slope)
                print(f"{method:34}{dtype:>12}{fits or 'none':>7}{total / 1e9:8.2f}{one['weights'] / 1e9:9.2f}"
                      f"{one['state'] / 1e9:8.2f}", flush=True)


# -----------------------------------------------------------------------------
# vision

VIT_METHODS = {'full fine-tuning': {}, **{f'LoRA, rank {rank}': dict(lowrank='attn', rank=rank, alpha=float(rank))
                                          for rank in (1, 2, 4, 8, 16, 32)},
               'GaLore, rank 64': dict(optimizer='galore', galore_rank=64),
               'GaLore, rank 64, projected': dict(optimizer='galore', galore_rank=64, galore_backward='projected',
                                                  galore_basis='sketch')}


def vit(words):
    import train_vit
    options = parse('vit', words, models=['vit_base_patch16_224', 'vit_large_patch16_224'], repeats=3, batch_size=4)
    batch_size = options.batch_size  # of what is run here; 32 is planned besides
    print('224 pixels, bfloat16 autocast, LoRA on qkv and proj with the classifier; '
          f'{batch_size} images a step are run, 32 planned; GB')
    print(f"{'model':23}{'method':28}{'trainable':>12}{'planned, 32':>12}{'of full':>9}{'planned':>9}{'measured':>9}"
          f"{'s/step':>8}{'of full':>9}")
    done = {(cell['model'], cell['method']): cell for cell in kept('vit') if cell['batch_size'] == batch_size}
    for name in options.models:
        base, full = {**train_vit.defaults, 'model': name, 'dtype': 'bfloat16', 'grad_clip': 0.0}, None
        for method, changes in VIT_METHODS.items():
            cell, settings = done.get((name, method)), {**base, **changes, 'batch_size': batch_size}
            if cell is None:  # next to full fine-tuning, so that their ratio is of one run
                cell = timed({'full fine-tuning': {}, method: changes}, {**base, 'batch_size': batch_size},
                             options.repeats)[method]
                small, large = (planned(settings, None, b) for b in (batch_size, 32))
                cell.update(bench='vit', model=name, method=method, batch_size=batch_size, planned=small['total'],
                            planned_32=large['total'], weights=large['weights'], state=large['state'],
                            measured=memory_real(settings)[0])
                keep('vit', [cell])
            full = full or cell
            print(f"{name:23}{method:28}{cell['trainable']:12,}{cell['planned_32'] / 1e9:12.2f}"
                  f"{cell['planned_32'] / full['planned_32']:9.2f}{cell['planned'] / 1e9:9.2f}"
                  f"{cell['measured'] / 1e9:9.2f}{cell['seconds']:8.2f}{cell['to_full']:9.2f}", flush=True)
    draw_vit()


# -----------------------------------------------------------------------------
# communication

COMMUNICATION = ('full rank, DDP', 'GaLore, DDP', 'GaLore, projected', 'GaLore, projected, sketch', 'local AdamW',
                 'LTE', "LTE, sync='merge'", 'GaLoLTE', "GaLoLTE, sync='merge'")


def shapes_of(model):
    """(m, n) of attention's and MLP's matrices, and the number of all other parameters."""
    with contextlib.redirect_stdout(None):
        groups = param_groups(model, rank=1)
    shapes = [tuple(p.shape) for group in groups if 'rank' in group for p in group['params']]
    return shapes, sum(p.numel() for p in model.parameters()) - sum(m * n for m, n in shapes)


def sent_bytes(shapes, others, method, rank, workers, heads=1, itemsize=4):
    """What one worker of so many heads puts into collectives, as `sync_bytes` in the log counts it: bytes averaged each
    step, gathered at a merge, averaged at a merge, averaged in a period of refreshes. shapes, others: see
    `shapes_of`. Merges and sketches average in at least float32."""
    wide, merging = max(4, itemsize), 'sync' in method
    gradients, small = sum(m * n for m, n in shapes), sum(min(rank, m, n) * max(m, n) for m, n in shapes)
    bases = sum(min(rank, m, n) * min(m, n) for m, n in shapes)
    if method == 'local AdamW':
        return 0, 0, wide * (gradients + others), 0
    if 'LTE' not in method:
        if 'projected' in method:
            seen = bases * wide if 'sketch' in method else gradients * itemsize
            return (small + others) * itemsize, 0, 0, seen + bases * itemsize
        return (gradients + others) * itemsize, 0, 0, 0
    step, merge = (0, others * wide) if merging else (others * itemsize, 0)
    if 'GaLo' in method:  # what is trained and its first moment; at a refresh the sketch and the basis
        return step, 0, merge + 2 * small * wide, bases * (wide + itemsize)
    gathered = 0
    for m, n in shapes:  # LTE's factors come with those of the last merge
        factors = 2 * heads * min(rank, m, n) * (m + n) * itemsize
        if workers > 1 and workers * factors > 2 * m * n * wide:  # as MHLoRALinear.sends_products
            merge += m * n * wide
        else:
            gathered += factors
    return step, gathered, merge, 0


def communication(words):
    # seconds that a step computes; gap: steps between refreshes
    options = parse('communication', words, compute=1.0, workers=[4, 32, 256], merge_every=10, gap=200)
    links = {'50 Mbit/s': 50e6 / 8, '1 Gbit/s': 1e9 / 8, '100 Gbit/s': 100e9 / 8}  # bytes a second of one worker
    print('bytes in bfloat16 (merges in float32), rank = width / 4, one head a worker, merges every '
          f'{options.merge_every} steps,\nbases every {options.gap}; a ring sends twice what is averaged, and what is '
          'gathered once for every other worker.\nMemory: weights, gradients, optimizer state and heads of a worker, '
          'all in bfloat16, without activations.\nA step that computes '
          f'{options.compute:g} s takes so many seconds on each link:')
    print(f"{'model':12}{'workers':>8}  {'method':33}{'memory, GB':>11}{'put in, MB':>11}{'on the wire, MB':>16}"
          + ''.join(f'{link:>12}' for link in links))
    with torch.device('meta'):
        models = {'GPT-2 124M': GPT(GPTConfig()), **{f'LLaMA {size}': Llama(LlamaConfig(256, 32000, *(
            SIZES[size]), SIZES[size][2])) for size in ('1b', '7b')}}
    for name, model in models.items():
        shapes, others = shapes_of(model)
        rank = min(min(shape) for shape in shapes) // 4
        for workers in options.workers:
            for method in COMMUNICATION:
                step, gathered, merge, refresh = sent_bytes(shapes, others, method, rank, workers, itemsize=2)
                averaged = step + merge / options.merge_every + refresh / options.gap
                gathered /= options.merge_every
                wire = 2 * averaged * (workers - 1) / workers + gathered * (workers - 1)
                print(f'{name:12}{workers:8}  {method:33}{2 * worker_numbers(shapes, others, method, rank) / 1e9:11.2f}'
                      f'{(averaged + gathered) / 1e6:11.1f}{wire / 1e6:16.1f}'
                      + ''.join(f'{options.compute + wire / speed:12.2f}' for speed in links.values()), flush=True)


def worker_numbers(shapes, others, method, rank):
    """Numbers that a worker with one head holds: weights, gradients, Adam's moments, factors, bases."""
    total, large = 4 * others, sum(m * n for m, n in shapes)
    small = sum(min(rank, m, n) * max(m, n) for m, n in shapes)  # of what is trained inside a basis
    bases = sum(min(rank, m, n) * min(m, n) for m, n in shapes)
    if 'GaLore' in method:
        return total + (large if 'projected' in method else 2 * large - small) + 3 * small + bases
    if 'GaLoLTE' in method:
        return total + large + 4 * small + bases
    if 'LTE' in method:
        return total + large + 5 * (small + bases)  # A, B, gradients, two moments, as they were at the last merge
    return total + 4 * large


# -----------------------------------------------------------------------------
# screening and quality

# A GPT of 3.3M parameters, 600 steps of 2,048 bytes of Python sources; each cell says only what it changes.
SCREEN = dict(dataset='stdlib', block_size=256, batch_size=8, n_layer=4, n_head=4, n_embd=256, max_iters=600,
              warmup_iters=60, eval_interval=600, eval_iters=40, log_interval=100, beta2=0.99, weight_decay=0.0,
              grad_clip=1.0, device='cpu', dtype='bfloat16')


def screening_cells():
    """(method, settings) of every cell of the screening: what those of a method share, and what each changes."""
    galore = dict(optimizer='galore', galore_rank=64, galore_gap=50, galore_basis='power', beta2=0.999,
                  learning_rate=2e-2)
    galolte = dict(lowrank='attn,mlp', heads=4, rank=64, head_input='split', head_basis='gradient',
                   galore_basis='sketch', beta2=0.999, learning_rate=2e-2, merge_every=10, galore_gap=50)
    heads = dict(lowrank='attn,mlp', heads=4, rank=16, alpha=16.0, learning_rate=2e-3)
    relora = dict(heads, heads=1, rank=64, alpha=64.0, merge_every=100, merge_reset=True, rewarm_iters=5)

    def lr(rate, **more):
        return dict(more, learning_rate=rate)

    def every(steps, **more):
        return dict(more, merge_every=steps)
    grid = {
        'full rank': (lr(2e-3), [{}, lr(1e-3), lr(4e-3), dict(beta2=0.999), dict(grad_clip=0.0),  # 4e-3 needs clipping
                                 dict(seed=1), dict(seed=2)]),  # how much is noise
        'GaLore': (galore, [{}, lr(1e-2), lr(4e-2), dict(grad_clip=0.0), dict(galore_basis='random'), *(
                                lr(rate, **more) for rate in (1e-2, 2e-2) for more in (
                                    dict(galore_basis='svd'), dict(galore_rule='fira'))),
                            dict(galore_backward='projected', galore_basis='sketch'),  # GaLoLTE with T = 1
                            *(dict(galore_rank=rank) for rank in (16, 32, 128)), dict(seed=1), dict(seed=2)]),
        'GaLoLTE': (galolte, [{}, dict(galore_basis='power'), lr(3e-2), every(5), every(50), lr(1e-2, merge_every=50),
                              dict(grad_clip=0.0), dict(galore_gap=100)]),
        'MHLoRA': (heads, [*(dict(rank=rank, alpha=float(alpha)) for rank, alpha in (
            (4, 4), (16, 16), (64, 64), (4, 16), (16, 64), (64, 256))), lr(1e-3, alpha=64.0), lr(4e-3, alpha=64.0)]),
        'LTE': (dict(heads, head_input='split', merge_every=10), [
            every(1), {}, every(50), dict(alpha=64.0), lr(4e-3), lr(1e-3),
            lr(4e-3, rank=40, alpha=40.0)]),  # the last one: GaLoLTE's memory
        'ReLoRA': (relora, [every(50), {}, lr(4e-3), lr(1e-3)]),
        'local AdamW': (dict(ranks=4, sync='merge', merge_every=10, learning_rate=2e-3), [
            {}, lr(4e-3), lr(1e-3), every(1), every(50)])}
    for method, (base, changes) in grid.items():
        yield from ((method, {**base, **change}) for change in changes)


def training_results(records):
    """What is kept of a run: validation losses by step, numbers of parameters, bytes."""
    last = next((record for record in reversed(records) if 'train_loss' in record), {})
    return {'curve': [(record['step'], record['val_loss']) for record in records if 'val_loss' in record],
            'trainable_parameters': last.get('trainable_parameters'),
            'optimizer_state_bytes': max((x['optimizer_state_bytes'] for x in records if 'optimizer_state_bytes' in x),
                                         default=None)}  # a reset drops moments for a while


def show_trained(cells):
    """A table of trained cells."""
    print(f"{'method':100}{'seed':>5}{'trainable':>12}{'state, MB':>11}{'loss':>8}")
    for cell in cells:
        loss = 'diverged' if cell['val_loss'] is None else f"{cell['val_loss']:.3f}"
        print(f"{label(cell):100}{cell['settings'].get('seed', 1337):5}{cell['trainable_parameters'] or 0:12,}"
              f"{(cell['optimizer_state_bytes'] or 0) / 1e6:11.1f}{loss:>8}")


def screening(words):
    run_cells('screening', words, 'train_gpt.py', SCREEN, list(screening_cells()), training_results)
    show_trained(kept('screening', list(screening_cells())))


# The finalists: 10.7M parameters, 1,000 steps of 1,024 bytes, all but the learning rate as the screening found best.
FINAL = {**SCREEN, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 128, 'max_iters': 1000, 'warmup_iters': 100,
         'eval_interval': 200}


def quality_cells():
    """(method, settings) of the finalists: each at its learning rates with one seed, then at the first of these, the
    best, with two more. Ranks are a quarter of the width in all."""
    heads = dict(lowrank='attn,mlp', heads=4)
    galore_96 = dict(optimizer='galore', galore_rank=96, galore_gap=50, beta2=0.999)
    galolte = dict(**heads, rank=96, head_input='split', head_basis='gradient', galore_basis='sketch', beta2=0.999,
                   galore_gap=50)
    methods = {
        'full rank': ({}, (1e-3, 5e-4, 2e-3)),
        'GaLore': (galore_96, (5e-3, 2.5e-3, 1e-2, 2e-2)),
        'GaLoLTE': ({**galolte, 'merge_every': 10}, (2e-2, 1e-2)),
        'ReLoRA': (dict(lowrank='attn,mlp', heads=1, rank=96, alpha=96.0, merge_every=100, merge_reset=True,
                        rewarm_iters=5), (2e-3, 4e-3, 1e-3)),
        'MHLoRA': (dict(**heads, rank=24, alpha=96.0), (5e-4, 2.5e-4, 1e-3, 2e-3)),
        'LTE': (dict(**heads, rank=24, alpha=24.0, head_input='split', merge_every=10), (2e-3, 4e-3, 1e-3)),
        'Fira': ({**galore_96, 'galore_rule': 'fira'}, (1e-2, 2e-2, 5e-3)),
        'local AdamW': (dict(ranks=4, sync='merge', merge_every=10), (1e-3, 5e-4, 2e-3))}
    for seed in (1337, 1, 2):
        for method, (settings, rates) in methods.items():
            for lr in rates if seed == 1337 else rates[:1]:
                yield method, {**settings, 'learning_rate': lr, 'seed': seed}
        if seed == 1337:  # how far T can grow
            yield 'GaLoLTE', {**galolte, 'merge_every': 25, 'learning_rate': 2e-2, 'seed': seed}


def step_times(name, cells, base, repeats, steps=1, batch=None):
    """Appends to assets/NAME_time.jsonl what a training step of each method of cells takes on one thread, as `timed`
    has it: runs side by side disturb each other's clock. base: settings of all."""
    torch.set_num_threads(1)
    config.keep_freed_memory()  # as the scripts do
    keep(f'{name}_time', [dict(cell, method=method) for method, cell in timed(
        dict(cells), base, repeats, steps, batch).items()])


def seconds_of_steps(name):
    """{method: seconds of a step} as `step_times` kept them: of the first method, times each one's ratio to it."""
    cells = kept(f'{name}_time')
    return {cell['method']: cells[0]['seconds'] * cell['to_full'] for cell in cells}


def quality(words):
    import train_gpt
    run_cells('quality', words, 'train_gpt.py', FINAL, list(quality_cells()), training_results)
    if not kept('quality_time'):  # ten steps at a time, with their merges and new bases; one process
        step_times('quality', [cell for cell in quality_cells() if 'ranks' not in cell[1]],
                   {**train_gpt.defaults, **FINAL, 'vocab_size': 257}, 5, 10,
                   lambda number: torch.randint(257, (2, FINAL['batch_size'], FINAL['block_size'])))
    show_trained(kept('quality', list(quality_cells())))
    if finalists():
        draw_quality()


def all_state(cell):
    """Bytes of a finalist's optimizer state, bases included, of all workers; the log has those of one process."""
    s = cell['settings']
    if s.get('merge_reset'):  # lines of the log follow a reset, which drops the moments
        return 8 * cell['trainable_parameters']
    if s.get('head_input') != 'split':
        return cell['optimizer_state_bytes'] * s.get('ranks', 1)
    import train_gpt
    with torch.device('meta'), contextlib.redirect_stdout(None):
        model = GPT(GPTConfig(FINAL['block_size'], 257, FINAL['n_layer'], FINAL['n_head'], FINAL['n_embd']))
        put_layers(model, {**train_gpt.defaults, **s})
    counts = count_parameters(model)
    bases = sum(layer.basis.nbytes for layer in lowrank_layers(model) if layer.factors == 'basis')
    # each of the other workers has the bases too, and moments of what has no heads
    return cell['optimizer_state_bytes'] + (s['heads'] - 1) * (bases + 8 * (counts['trainable'] - counts['heads']))


def finalists():
    """{method: its kept cells of all seeds, at the learning rate chosen}."""
    chosen = dict(quality_cells())
    groups = {method: [cell for cell in kept('quality') if cell['val_loss'] is not None and cell['method'] == method
                       and {**cell['settings'], 'seed': 2} == chosen[method]] for method in chosen}
    return {method: cells for method, cells in groups.items() if cells}


def draw_quality():
    """assets/quality.png: validation loss of the finalists against steps, time and the optimizer's bytes."""
    groups, times = finalists(), seconds_of_steps('quality')
    shown = [loss for cells in groups.values() for cell in cells for step, loss in cell['curve'] if step >= 400]
    with picture('quality', (11, 4.4), (1, 3), 4, sharey=True) as ((by_step, by_time, by_bytes),):
        for number, (method, mine) in enumerate(groups.items()):
            losses, color = [cell['val_loss'] for cell in mine], f'C{number}'
            steps = [step for step, _ in mine[0]['curve']]
            curves = [[loss for _, loss in cell['curve']] for cell in mine]
            band(by_step, steps, curves, color)
            if method in times:
                band(by_time, [step * times[method] for step in steps], curves, color)
            mean = statistics.mean(losses)
            by_bytes.errorbar(all_state(mine[0]) / 1e6, mean, [[mean - min(losses)], [max(losses) - mean]],
                              fmt='os^vDP*X'[number], color=color, capsize=3,
                              label=f"{method} ({mine[0]['trainable_parameters'] / 1e6:.1f}M trained, {len(mine)} "
                                    f"seed{'s' * (len(mine) > 1)})")
        by_step.set(xlabel='step', ylabel='validation loss (nats a byte)', xlim=(400, FINAL['max_iters']),
                    ylim=(min(shown) - 0.02, max(shown) + 0.02))
        by_time.set(xlabel='training, s (one CPU thread)', xlim=(400 * min(times.values(), default=0), None))
        by_bytes.set(xlabel="optimizer state, MB (all workers')", xscale='log')
        by_bytes.set_xticks(ticks := [20, 50, 100, 200, 400], list(map(str, ticks)))
        by_bytes.minorticks_off()


# -----------------------------------------------------------------------------
# convergence

# What config/vit_digits_adapt.py does, evaluated after every epoch (1,078 images, 17 steps).
ADAPT = dict(init_from='out/vit_quickstart/best.pt', dataset='digits_shifted', batch_size=64,
             model='vit_tiny_patch16_224', epochs=20, eval_interval=17, log_interval=17, warmup_iters=20, min_lr=1e-5,
             device='cpu', dtype='float32')
EPOCH = 1078 / ADAPT['batch_size']  # steps


def convergence_cells():
    """(method, settings) of every cell of the adaptation, one seed after the other."""
    for seed in (1337, 1, 2):
        for lr in (3e-4, 1e-3, 3e-3):
            yield 'full fine-tuning', dict(lowrank='', learning_rate=lr, seed=seed)
        for rank in (2, 8, 32):
            for lr in (1e-3, 3e-3, 1e-2):
                yield f'LoRA, rank {rank}', dict(lowrank='attn,mlp', heads=1, rank=rank, alpha=float(rank),
                                                 learning_rate=lr, seed=seed)


def convergence(words):
    import train_vit

    def results(records):
        curve = {key: [] for key in ('step', 'val_loss', 'val_acc')}
        lines = [record for record in records if 'dt_ms' in record]
        for record in records:
            for key, values in curve.items() if 'val_loss' in record else ():
                values.append(record[key])
        last = records[-1] if records else {}  # the test split, unless it diverged
        return {'curve': curve, 'test_acc': last.get('test_acc'), 'test_auc': last.get('test_auc'),
                'trainable_parameters': lines[0]['trainable_parameters'] if lines else None}

    def pretrain():
        if not os.path.exists(f"{HERE}/{ADAPT['init_from']}"):
            subprocess.run([sys.executable, 'train_vit.py', 'config/vit_quickstart.py', '--overwrite=True'], cwd=HERE,
                           check=True)
    run_cells('convergence', words, 'train_vit.py', ADAPT, list(convergence_cells()), results, pretrain)
    if not kept('convergence_time'):
        step_times('convergence', convergence_cells(),
                   {**config.load({}, train_vit.defaults, [f'{HERE}/config/vit_quickstart.py']), **ADAPT}, 100)
    if kept('convergence'):
        show_convergence()


def show_convergence():
    """
    Prints a table of the kept cells of the adaptation and draws assets/convergence.png, each method at its best rate.

    The time axis is that of `step_times`.
    """
    groups = {}  # method: learning rate: cells, one a seed
    for cell in sorted(kept('convergence', list(convergence_cells())),
                       key=lambda cell: cell['settings']['learning_rate']):
        groups.setdefault(cell['method'], {}).setdefault(cell['settings']['learning_rate'], []).append(cell)
    print('best: the rate with the highest mean over seeds of the best validation accuracy, the one drawn. Test: mean '
          '± largest - smallest over seeds.\nTo 90% and 93% of validation accuracy, looked at once an epoch: mean '
          'over seeds, - where one does not reach it;\nseconds of training on one CPU thread, by interleaved steps')
    times = seconds_of_steps('convergence')
    print(f"{'method':18}{'trainable':>10}{'ms/step':>9}{'rate':>8}{'seeds':>6}{'test accuracy':>16}"
          f"{'epochs to 90%':>15}{'s':>7}{'epochs to 93%':>15}{'s':>7}")
    with picture('convergence', (8.5, 6.2), (2, 2), 2, sharex='col', sharey='row') as plots:
        for method, color in zip([m for m in dict(convergence_cells()) if m in groups],
                                 ('#333333', '#4c72b0', '#dd8452', '#55a868')):
            rates = groups[method]
            second = times[method]  # of a step

            def quality_of(lr, rates=rates):
                return (statistics.mean(max(cell['curve']['val_acc'], default=0) for cell in rates[lr]),
                        -statistics.mean(cell['val_loss'] or 9 for cell in rates[lr]))
            best = max(rates, key=quality_of)
            for lr, cells in rates.items():
                tests = [cell['test_acc'] for cell in cells]
                numbers = '-' if None in tests else f'{statistics.mean(tests):.3f} ± {max(tests) - min(tests):.3f}'
                line = (f"{method:18}{cells[0]['trainable_parameters']:10,}{1000 * second:9.1f}{lr:8g}{len(cells):6}"
                        f'{numbers:>16}')
                for goal in (0.9, 0.93):
                    steps = [next((step for step, accuracy in zip(cell['curve']['step'], cell['curve']['val_acc'])
                                   if accuracy >= goal), None) for cell in cells]
                    mean = None if None in steps else statistics.mean(steps)
                    line += f"{'-':>15}{'-':>7}" if mean is None else f'{mean / EPOCH:15.1f}{mean * second:7.1f}'
                print(line + '  best' * (lr == best))
            steps = rates[best][0]['curve']['step']
            trainable = f"{rates[best][0]['trainable_parameters'] / 1e3:.0f}k"
            for row, key in zip(plots, ('val_loss', 'val_acc')):
                for axes, unit in zip(row, (1 / EPOCH, second)):
                    band(axes, [step * unit for step in steps], [cell['curve'][key] for cell in rates[best]], color,
                         f'{method} ({trainable} trainable, learning rate {best:g})')
        plots[0, 0].set(ylabel='validation loss (nats)', yscale='log')
        plots[0, 0].set_yticks([0.2, 0.5, 1, 2, 5], ['0.2', '0.5', '1', '2', '5'])
        plots[0, 0].minorticks_off()
        plots[1, 0].set(ylabel='validation accuracy', ylim=(0.5, 1), xlabel='epochs', xlim=(0, ADAPT['epochs']))
        plots[1, 1].set(xlabel='training, s (one CPU thread)', xlim=0)


# -----------------------------------------------------------------------------
# layers

LAYERS = {**SCREEN, 'max_iters': 500, 'warmup_iters': 50, 'eval_interval': 500}
SPLIT = dict(lowrank='attn,mlp', heads=4, rank=16, alpha=16.0, head_input='split', merge_every=10)  # LTE
LETTERS = {'A': 'attn', 'M': 'mlp', 'L': 'logit'}


def layers_cells():
    """(method, settings): the letters of layers with heads; all else is at full rank, and the learning rate fixed."""
    for seed in (1337, 1, 2):
        for letters in ('none', 'A', 'M', 'L', 'AM', 'AL', 'ML', 'AML'):
            targets = ','.join(LETTERS[letter] for letter in letters) if letters != 'none' else ''
            yield letters, dict(**{**SPLIT, 'lowrank': targets} if targets else {}, learning_rate=2e-3, seed=seed)


def layers(words):
    run_cells('layers', words, 'train_gpt.py', LAYERS, list(layers_cells()), training_results)
    rows = []  # letters, trainable parameters, losses of the seeds
    for letters in dict.fromkeys(letters for letters, _ in layers_cells()):
        cells = [cell for cell in kept('layers', list(layers_cells())) if cell['method'] == letters]
        losses = [cell['val_loss'] for cell in cells if cell['val_loss'] is not None]
        diverged = len(cells) - len(losses)
        if losses:
            trainable = next(cell['trainable_parameters'] for cell in cells if cell['val_loss'] is not None)
            rows.append((letters, trainable, losses))
        if diverged:
            print(f'heads on {letters}: {diverged} of {len(cells)} seeds diverged')
    print(f"\n{'heads on':10}{'trainable':>12}{'seeds':>7}{'validation loss':>17}{'min':>9}{'max':>9}")
    for letters, trainable, losses in rows:
        print(f'{letters:10}{trainable:12,}{len(losses):7}{statistics.mean(losses):17.4f}{min(losses):9.4f}'
              f'{max(losses):9.4f}')
    if rows:
        draw_layers(rows)


def draw_layers(rows):
    """assets/layers.png: validation loss against trainable parameters; bars from the least to the largest of seeds."""
    with picture('layers', (6.4, 4.2), columns=0) as ((axes,),):
        for letters, trainable, losses in rows:
            mean = statistics.mean(losses)
            axes.errorbar(trainable / 1e6, mean, [[mean - min(losses)], [max(losses) - mean]], fmt='o', capsize=3,
                          color='black' if letters == 'none' else '#4c72b0')
            right = 'L' in letters  # heads on the output layer move a point only a little to the right
            axes.annotate(letters, (trainable / 1e6, mean), (6 if right else -6, 5), textcoords='offset points',
                          ha='left' if right else 'right')
        axes.margins(0.1)
        axes.set(xlabel='trainable parameters, millions', ylabel='validation loss, nats per byte',
                 title='four split heads on A(ttn), M(lp), L(ogit)')


# -----------------------------------------------------------------------------
# spectrum

SPECTRUM_STEPS = (0, 25, 50, 100, 200, 300)
SPECTRUM_METHODS = {
    'full rank': dict(learning_rate=2e-3),
    'LoRA, rank 16': dict(lowrank='attn,mlp', heads=1, rank=16, alpha=16.0, learning_rate=2e-3),
    'LTE, 4 heads of rank 16': dict(**SPLIT, learning_rate=2e-3),
    'LTE, heads drawn anew at merges': dict(**SPLIT, merge_reset=True, learning_rate=2e-3),
    'GaLore, rank 64': dict(optimizer='galore', galore_rank=64, galore_gap=50, galore_basis='power', beta2=0.999,
                            learning_rate=2e-2)}


def effective_rank(W):
    """exp of the entropy of the singular values of W (m, n), scaled to sum to one (Roy and Vetterli 2007): from 1 to
    min(m, n), which it is where all are the same. 0 for a matrix of zeros, as its rank."""
    values = torch.linalg.svdvals(W)
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total else 0.0


def spectrum_points(settings):
    """Trains the GPT of the screening and measures at SPECTRUM_STEPS, as a mean over the matrices of attention and MLP,
    the effective rank of what the weights (heads merged) have changed by, of the weights, and of the loss's full
    gradient with respect to them on a batch that is always the same. Returns a dict for each step."""
    data, held_out = (Tokens('stdlib', split, settings['block_size'], f'{HERE}/data') for split in ('train', 'val'))
    x, y = held_out.fixed_batch(0, 1, settings['batch_size'])
    sizes = (settings[key] for key in ('n_layer', 'n_head', 'n_embd'))
    shape = GPTConfig(settings['block_size'], data.vocab_size, *sizes)
    groups = settings['heads'] if settings['head_input'] == 'split' else 1
    torch.manual_seed(settings['seed'])
    model = GPT(shape)
    _, step = trainer(model, settings, lambda number: data.batch(
        settings['batch_size'], number, seed=settings['seed'], heads=groups))
    plain, start, points = GPT(shape), {}, []  # gradients are taken in a model without heads, in float32
    for number in range(SPECTRUM_STEPS[-1] + 1):
        if number in SPECTRUM_STEPS:
            plain.load_state_dict(merged_state_dict(model))
            plain.zero_grad()
            loss = plain(x, y)
            loss.backward()
            ranks = {'change': [], 'weight': [], 'gradient': []}
            for name, p in plain.named_parameters():
                if name.startswith('transformer.h.') and p.dim() == 2:
                    first = start.setdefault(name, p.detach().clone())
                    for key, W in (('change', p.detach() - first), ('weight', p.detach()), ('gradient', p.grad)):
                        ranks[key].append(effective_rank(W))
            points.append(dict(step=number, loss=loss.item(), **{key: statistics.mean(x) for key, x in ranks.items()}))
        if number < SPECTRUM_STEPS[-1]:
            step()
    return points


def spectrum(words):
    import train_gpt
    options = parse('spectrum', words, methods=list(SPECTRUM_METHODS))
    config.keep_freed_memory()  # as the scripts do on a CPU
    base = {**train_gpt.defaults, **SCREEN, 'max_iters': SPECTRUM_STEPS[-1], 'warmup_iters': 30}
    print('effective rank, exp(entropy of the normalised singular values), mean over attention and MLP, at most '
          f"{SCREEN['n_embd']}")
    print(f"{'method':32}{'step':>6}{'change':>9}{'weight':>9}{'gradient':>10}{'loss':>8}")
    done = {cell['method']: cell for cell in kept('spectrum')}
    for method, changes in SPECTRUM_METHODS.items():
        cell = done.get(method)
        if cell is None and method in options.methods:
            begin = time.time()
            points = spectrum_points({**base, 'min_lr': changes['learning_rate'] / 10, **changes})
            cell = dict(method=method, settings=changes, points=points, seconds=time.time() - begin)
            keep('spectrum', [cell])
        for point in cell['points'] if cell else ():
            print(f"{method:32}{point['step']:6}{point['change']:9.1f}{point['weight']:9.1f}{point['gradient']:10.1f}"
                  f"{point['loss']:8.3f}", flush=True)
    draw_spectrum()


def draw_spectrum():
    """assets/spectrum.png: effective ranks over training, a line for each method."""
    cells = {cell['method']: cell for cell in kept('spectrum')}
    titles = {'change': 'what the weights changed by', 'weight': 'weights, heads merged', 'gradient': 'full gradient'}
    with picture('spectrum', (10, 3.8), (1, 3)) as (panels,):
        for axes, (key, title) in zip(panels, titles.items()):
            for method in SPECTRUM_METHODS:
                points = cells[method]['points'] if method in cells else []
                points = [point for point in points if key != 'change' or point['step']]  # no change yet
                axes.plot([point['step'] for point in points], [point[key] for point in points], 'o-', ms=3,
                          label=method)
            axes.set(title=title, xlabel='step')
        panels[0].set_ylabel(f"effective rank, of {SCREEN['n_embd']}")


# -----------------------------------------------------------------------------
# README


def wire_bytes(cell, shape, workers=4):
    """Bytes that a worker puts on the wire a step where a cell's method runs on so many of them, one head each, in
    float32; None for what is not meant for it. shape: SCREEN or FINAL. A ring sends twice what is averaged."""
    s, method = cell['settings'], cell['method']
    with torch.device('meta'):
        model = GPT(GPTConfig(shape['block_size'], 257, shape['n_layer'], shape['n_head'], shape['n_embd']))
    shapes, others = shapes_of(model)
    if method in ('full rank', 'GaLore', 'Fira'):
        name = 'full rank, DDP' if method == 'full rank' or s.get('galore_rule') == 'fira' else (
            f"GaLore, projected, {s['galore_basis']}" if 'galore_basis' in s else 'GaLore, projected')
    elif method in ('local AdamW', 'LTE', 'GaLoLTE'):
        name = method
    else:
        return None
    step, gathered, merge, refresh = sent_bytes(shapes, others, name, s.get('rank', s.get('galore_rank', 0)), workers)
    every = s.get('merge_every', 1)
    averaged = step + merge / every + refresh / s.get('galore_gap', 1)
    return 2 * averaged * (workers - 1) / workers + gathered / every * (workers - 1)


def draw_frontier(cells):
    """assets/frontier.png: validation loss against bytes on the wire, each method at its best for each T."""
    best = {}
    for cell in cells:
        bytes_ = None if cell['val_loss'] is None else wire_bytes(cell, SCREEN)
        if bytes_ is not None:
            s = cell['settings']
            name = {'GaLore': 'GaLore, projected'}.get(cell['method'], cell['method'])
            name = name if s.get('galore_rule') != 'fira' else "Fira's rule"
            key = name, bytes_, f"r={s['galore_rank']}" if 'galore_rank' in s else f"T={s.get('merge_every', 1)}"
            best[key] = min(best.get(key, 9.0), cell['val_loss'])
    with picture('frontier', (8.5, 4.2), columns=0) as ((axes,),):
        for number, name in enumerate(dict.fromkeys(key[0] for key in best)):
            points = sorted((bytes_ / 1e6, loss, what) for (method, bytes_, what), loss in best.items()
                            if method == name)
            axes.plot(*zip(*(point[:2] for point in points)), 'osD^vP*'[number], color=f'C{number}', label=name)
            for x, y, what in points if len(points) > 1 else ():
                axes.annotate(what, (x, y), (4, 4), textcoords='offset points', fontsize=7, color=f'C{number}')
        axes.set_xscale('log')
        axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20], list(map(str, ticks)))
        axes.minorticks_off()
        axes.set(xlabel='MB that each of four workers puts on the wire a step (float32, ring)',
                 ylabel='validation loss (nats a byte)')
        axes.legend(fontsize=8)


def label(cell):
    """A cell's method and what it sets, in a few words."""
    s = cell['settings']
    heads, words = 'heads' in s, [cell['method']]
    if heads:
        words.append(f"{s['heads']} head{'s' * (s['heads'] > 1)} of rank {s['rank']}")
    for key, text, shown in (('alpha', 'alpha {:g}', True), ('galore_rank', 'rank {}', True),
                             ('merge_every', 'T = {}', True),
                             ('galore_gap', 'bases every {}', heads), ('galore_basis', '{}', True),
                             ('galore_rule', "{}'s rule", cell['method'] != 'Fira'),
                             ('grad_clip', 'clipping at {:g}', True),
                             ('ranks', '{} workers', True),
                             ('beta2', 'beta2 {:g}', cell['method'] == 'full rank')):
        if key in s and shown:
            words.append(text.format(s[key]))
    return ', '.join([*words, f"lr {s['learning_rate']:g}"])


def but_rate_and_seed(cell):
    """A cell's method and what else it sets."""
    return cell['method'], {key: x for key, x in cell['settings'].items() if key not in ('learning_rate', 'seed')}


def readme(words):
    """Renews the table between the markers in README.md, a row a method, and draws loss against bytes sent."""
    times, lines = seconds_of_steps('quality'), [
        '| method | trained | optimizer state | sent a step | time of a step | validation loss: mean (range; seeds) | '
        'other rates, one seed |', '|---|---|---|---|---|---|---|']
    for method, cells in finalists().items():
        mine, losses = cells[0], [cell['val_loss'] for cell in cells]
        rates = {cell['settings']['learning_rate']: cell['val_loss'] for cell in kept('quality', list(quality_cells()))
                 if but_rate_and_seed(cell) == but_rate_and_seed(mine)}
        del rates[mine['settings']['learning_rate']]
        others = ', '.join(f"{lr:g}: {f'{loss:.3f}' if loss else 'diverged'}" for lr, loss in sorted(rates.items()))
        sent = f'{wire_bytes(mine, FINAL) / 1e6:.1f} MB' if wire_bytes(mine, FINAL) else ''
        slower = f"{times[method] / times['full rank']:.2f}" if method in times else ''
        spread = f'{min(losses):.3f} to {max(losses):.3f}; {len(losses)}' if len(losses) > 1 else 'one seed'
        lines.append(f"| {label(mine)} | {mine['trainable_parameters'] / 1e6:.1f}M | "
                     f"{all_state(mine) / 1e6:.0f} MB | {sent} | {slower} | {statistics.mean(losses):.3f} ({spread}) | "
                     f'{others} |')
    cells = kept('quality')
    dates = sorted({cell['date'] for cell in cells})
    lines += ['', f"Cells of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
              f"{' and '.join(sorted({cell['machine'] for cell in cells}))}, torch "
              f"{' and '.join(sorted({cell['torch'] for cell in cells}))}: `python bench.py quality` (five minutes a "
              'run), then `python bench.py readme`.']
    with open(f'{HERE}/README.md', encoding='utf-8') as file:
        before, _, rest = file.read().partition('<!-- quality -->\n')
    with open(f'{HERE}/README.md', 'w', encoding='utf-8') as file:
        file.write('\n'.join([before + '<!-- quality -->', *lines, '<!-- end -->',
                              rest.partition('<!-- end -->\n')[2]]))
    draw_frontier([cell for cell in kept('screening', list(screening_cells()))
                   if cell['val_loss'] and 'seed' not in cell['settings']])


if __name__ == '__main__':
    benches = {'heads': heads, 'speed': speed, 'memory': memory, 'vit': vit, 'communication': communication,
               'screening': screening, 'quality': quality, 'convergence': convergence, 'layers': layers,
               'spectrum': spectrum, 'readme': readme}
    if len(sys.argv) < 2 or sys.argv[1] not in benches:
        print(f"usage: python bench.py {' | '.join(benches)} [options]", file=sys.stderr)
        raise SystemExit(2)
    with config.refusals():
        benches[sys.argv[1]](sys.argv[2:])
