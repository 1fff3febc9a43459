"""
Measures what the README claims, on any machine, by the scripts' own build and train_step:

$ python bench.py BENCH
$ python bench.py memory config/llama_1b.py config/methods/galore.py --budget=12GiB

Times are medians of interleaved runs, as ratios within one process. What is measured goes to
assets/NAME.jsonl, a line a cell, and is not measured again; assets/figures.py draws it.
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
import gc
import glob
import importlib.util
import itertools
import json
import multiprocessing
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import config

BENCHES = {
    'heads': 'time of multi-head LoRA, heads at once, one after the other, and full rank',
    'speed': "time of every method's step; of one matrix's step and basis; others' code beside them",
    'memory': 'peak memory by method, planned and run; given config files: what fits on a card',
    'vit': 'ViT-B and ViT-L at 224 pixels: parameters, memory and time of LoRA and GaLore',
    'communication': 'bytes that each method sends between workers a step, and their time on slow links',
    'screening': 'validation loss of each method on a small GPT, one setting changed at a time',
    'quality': 'validation loss of the finalists on a larger one, three seeds, and the time of a step',
    'convergence': 'how fast LoRA and full fine-tuning adapt a small ViT',
    'layers': 'validation loss and trainable parameters by the layers that have heads',
    'spectrum': 'effective rank of weights, of their change and of gradients over training',
    'readme': "draws the pictures and renews README.md's tables (as python assets/figures.py)"}


def chosen(argv):
    """The options of a command line; words: what only scripts know. Answers mistakes before torch comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage='bench.py BENCH [options]', epilog='\n'.join(map('{0[0]:15}{0[1]}'.format, BENCHES.items())))
    parser.add_argument('bench', nargs='?', help='one of those below')
    parser.add_argument('--only', default='', help='cells whose words hold this')
    parser.add_argument('--jobs', type=int, default=2, help='trainings side by side, each on one thread')
    parser.add_argument('--workers', type=int, default=32, help='communication: how many there are')
    parser.add_argument('--nanogpt', default='', help='speed: a checkout of karpathy/nanoGPT')
    parser.add_argument('--budget', default='12GiB', help='memory, with config files: that of the card')
    options, options.words = parser.parse_known_args(argv)
    if options.bench is None:
        parser.print_help()
        raise SystemExit(0)
    if options.bench not in BENCHES:
        near = difflib.get_close_matches(options.bench, BENCHES, n=1, cutoff=0)[0]
        config.fail(f"'{options.bench}' is no bench: did you mean '{near}'?")
    if options.words and options.bench != 'memory':
        config.fail(f"bench.py {options.bench} does not know '{options.words[0]}': see bench.py --help")
    return options


if __name__ == '__main__':
    options = chosen(sys.argv[1:])

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import galore
import train_gpt
import train_llama
import train_vit
from lowrank import (MHLoRALinear, count_parameters, freeze_as_set, lowrank_layers, merged_state_dict,
                     own_heads)
from model import SIZES
from prepare import Tokens

HERE = os.path.dirname(os.path.abspath(__file__))
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def method(name, **changes):
    """The settings of config/methods/NAME.py, with changes."""
    found = runpy.run_path(f'{HERE}/config/methods/{name}.py')
    return {**{key: value for key, value in found.items() if not key.startswith('_')}, **changes}


# -----------------------------------------------------------------------------
# trainings: cells (method, settings). In assets those with a key `superseded` are not of today's code

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
        'GaLoLTE': (dict(**GALOLTE, rank=96), (1e-2, 7e-3, 2e-2)),
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


TRAININGS = {  # the script, settings of all cells, the cells
    'screening': ('train_gpt.py', SCREEN, screening_cells()),
    'quality': ('train_gpt.py', FINAL, quality_cells()),
    'convergence': ('train_vit.py', ADAPT, convergence_cells()),
    'layers': ('train_gpt.py', LAYERS, layers_cells())}
SPECTRUM_STEPS = (0, 25, 50, 100, 200, 300)
SPECTRUM = [
    ('full rank', dict(learning_rate=2e-3)),
    ('LoRA, rank 16', dict(**ONE, rank=16, alpha=16.0, learning_rate=2e-3)),
    ('LTE, 4 heads of rank 16', dict(**SPLIT, rank=16, alpha=16.0, learning_rate=2e-3)),
    ('LTE, heads drawn anew at merges',
     dict(**SPLIT, rank=16, alpha=16.0, merge_reset=True, learning_rate=2e-3)),
    ('GaLore, rank 64', dict(**DROP_IN, rank=64, learning_rate=2e-2))]

# -----------------------------------------------------------------------------
# times and memory: cells (what they are called, settings); times are in units of the first cell of a list


def cells_of(base, methods, key='method', **about):
    """Cells by method: its settings, beside those of `base`."""
    return [({**about, key: name}, {**base, **changes}) for name, changes in methods.items()]


def heads_cells():
    """Lists of cells: GPT-2 124M, by the layers with heads (a table), and by heads and rank (a picture)."""
    table = [(4, dtype, targets, 4, 4) for dtype in ('float32', 'bfloat16')
             for targets in ('attn', 'attn,mlp', 'attn,mlp,logit')]
    figure = [(2, 'bfloat16', 'attn', heads, rank) for heads in (1, 4, 16) for rank in (1, 4, 16, 64)]
    for sequences, dtype, targets, heads, rank in table + figure:
        base = {**train_gpt.defaults, 'batch_size': sequences, 'dtype': dtype, 'grad_clip': 0.0}
        there = dict(lowrank=targets, heads=heads, rank=rank, alpha=float(rank))
        ways = {'full': {}, **{way: dict(there, head_compute=way) for way in ('parallel', 'sequential')}}
        yield cells_of(base, ways, 'compute', bench='heads_steps', device=DEVICE, sequences=sequences,
                       dtype=dtype, targets=targets, heads=heads, rank=rank)


def speed_cells():
    """Lists of cells: LLaMA in bfloat16, GaLore with new bases never and every ten steps; a GPT of 25M."""
    base = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16', 'batch_size': 8,
            'gradient_accumulation_steps': 1}
    few = dict(size='350m', n_layer=4, vocab_size=32)  # so few tokens that the output layer is nothing
    drop_in = dict(optimizer='galore', basis='power')
    for name, shape, rank in (('LLaMA 60M', dict(size='60m'), 128), ('4 layers of LLaMA 350M', few, 256),
                              ('4 layers of LLaMA 350M', few, 128)):
        kinds = {f'{kind}, bases {words}': {**changes, 'rank': rank, 'basis_every': every}
                 for words, every in (('never', 10**9), ('every 10', 10))
                 for kind, changes in (('drop-in', drop_in), ('layer', method('galore')))}
        yield cells_of({**base, **shape}, {'full rank': {}, **kinds}, case=name, rank=rank)
    methods = {'full rank': {}, 'MHLoRA': method('mhlora'), 'LTE': method('lte'),
               'drop-in': dict(drop_in, rank=128), 'layer': method('galore'),
               'GaLoLTE': method('galolte', rank=128)}
    base = {**train_gpt.defaults, 'dtype': 'bfloat16', 'batch_size': 8, 'block_size': 256, 'vocab_size': 257,
            'n_layer': 8, 'n_head': 8, 'n_embd': 512}
    yield cells_of(base, methods, case='GPT of 25M')


MEMORY = {  # rank None: half of the width, a quarter with 8 bits
    'full rank': {},
    'GaLore': dict(optimizer='galore', basis='power', rank=None),
    'GaLore, projected': method('galore', rank=None),
    'GaLore, projected, per layer': method('galore', rank=None, per_layer=True),
    'the same, 8 bits, checkpointing': method('galore_lean', rank=None, checkpointing=True),
    'MHLoRA, 4 heads': method('mhlora'),
    # a worker with one head; how often it merges does not matter, so that three steps have a merge
    'LTE, a worker': method('lte', heads=1, rank=64, merge_every=2),
    'GaLoLTE, a worker': method('galolte', heads=1, rank=None, merge_every=2)}


def memory_cells():
    """LLaMA by size and method in bfloat16, one sequence of 256 tokens."""
    base = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16', 'batch_size': 1,
            'gradient_accumulation_steps': 1}
    for size in ('60m', '350m', '1b', '7b'):
        for name, changes in MEMORY.items():
            rank = changes.get('rank', 1) or SIZES[size][0] // (4 if '8 bits' in name else 2)
            yield dict(size=size, method=name), {**base, **changes, 'size': size, 'rank': rank}


def vit_cells(model):
    """ViT at 224 pixels, four images a step."""
    ranks = {f'LoRA, rank {rank}': method('lora', lowrank='attn', rank=rank, alpha=float(rank))
             for rank in (1, 2, 4, 8, 16, 32)}
    base = {**train_vit.defaults, 'model': model, 'dtype': 'bfloat16', 'grad_clip': 0.0, 'batch_size': 4}
    methods = {'full fine-tuning': {}, **ranks, 'GaLore, rank 64, projected': method('galore', rank=64),
               'GaLore, rank 64': dict(optimizer='galore', basis='power', rank=64)}
    return cells_of(base, methods, model=model, batch_size=4)


COMMUNICATION = {  # a head on each worker, merges every ten steps, bases every 200
    'full rank, DDP': {}, 'GaLore': method('galore'), 'GaLore, power bases': method('galore', basis='power'),
    'local AdamW': method('local_adamw'), 'LTE': method('lte'),
    "LTE, sync='merge'": method('lte', sync='merge'), 'GaLoLTE': method('galolte', basis_every=200),
    "GaLoLTE, sync='merge'": method('galolte', basis_every=200, sync='merge')}

# -----------------------------------------------------------------------------
# what was measured


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
    print(*(f'{key} {x:.4g}' if isinstance(x, float) else f'{key} {x}' for key, x in shown.items()), sep='  ',
          flush=True)
    about = dict(machine=machine(), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    with open(f'{HERE}/assets/{name}.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps({**cell, **about}) + '\n')


def read_lines(path):
    """The lines of a .jsonl, none where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def kept(name, **about):
    """The cells of assets/NAME.jsonl, those of which all that is said holds."""
    return [cell for cell in read_lines(f'{HERE}/assets/{name}.jsonl') if about.items() <= cell.items()]


def lacking(name, cells, only=''):
    """Those of cells (what they are called, settings) that assets/NAME.jsonl lacks and that `only` names."""
    named = (cell for cell in cells if only in ' '.join(map(str, cell[0].values())))
    return [(about, settings) for about, settings in named if not kept(name, **about)]


def table(first, *names, wide):
    """Prints the head of a table. Returns what prints a row of it: words, then numbers to the right."""
    widths = [max(len(name) + 2, 16) for name in names]

    def row(first, *values):
        forms = {int: '{:,}', float: '{:.3f}', type(None): ''}
        words = (forms.get(type(x), '{}').format(x) for x in values)
        print(f'{first:{wide}}' + ''.join(f'{x:>{width}}' for x, width in zip(words, widths)), flush=True)
    row(first, *names)
    return row


def show(name, *keys):
    """A table of what assets/NAME.jsonl holds: words or settings that tell cells apart, and numbers."""
    row, about = table(name, *keys, wide=90), ('bench', 'machine', 'torch', 'date', 'device')
    for cell in kept(name):
        words = [x for key, x in cell.items()
                 if isinstance(x, str) and key not in about or key in ('sequences', 'heads', 'rank')]
        row(' '.join(map(str, [*words, *cell.get('settings', {}).values()])), *map(cell.get, keys))


# -----------------------------------------------------------------------------
# a script's step in this process


def alone(settings, ranks=1):
    """What config.join would return to the first of so many ranks on CPUs."""
    return SimpleNamespace(rank=0, ranks=ranks, device='cpu', device_type='cpu', compute=settings['dtype'])


def stepper(settings, where=None, batch=None):
    """
    (run, step) of a script from scratch: what its build makes, and its train_step, a step further each call.

    settings: all that the script has, and head_compute, which only layers have; where: see config.join;
    batch(step, micro_step): the data; None: random tokens, or images and labels.
    """
    s = dict(settings)
    script = train_llama if 'size' in s else train_vit if 'img_size' in s else train_gpt
    head_compute = s.pop('head_compute', 'parallel')
    freeze_as_set(nn.Module(), s, new=('logit',) * (script is train_vit))  # train='auto' asks what was loaded
    s.update(init_from='scratch', compile=False)
    data = ['a class'] * 9 if script is train_vit else vocabulary(s)
    with contextlib.redirect_stdout(None):
        run = script.build(s, where or config.join(s), data)
    for layer in lowrank_layers(run.model):
        layer.head_compute = head_compute
    rows, numbers = s['batch_size'] // run.ranks, itertools.count()

    def random(step, micro_step):
        if script is train_vit:
            images = torch.randint(256, (rows, 3, run.size, run.size), dtype=torch.uint8)
            return images, torch.randint(9, (rows,))
        return torch.randint(run.model.config.vocab_size, (2, rows, s['block_size'])).unbind()

    def step():
        number = next(numbers)
        return script.train_step(run, number, functools.partial(batch or random, number))
    return run, step


def vocabulary(settings):
    """Tokens of a run's data if they are here, else of the data that the script is made for."""
    s = settings
    with contextlib.suppress(ValueError, OSError):
        return s['vocab_size'] or Tokens(s['dataset'], 'train', s['block_size'], s['data_dir']).vocab_size
    return 32000 if 'size' in s else 50257


class Watch(TorchDispatchMode):
    """
    Sees what happens to fake tensors: bytes of those alive (`now`), the most since `start` (`peak`; then
    `gradients`), and bytes put into collectives (`sent`). What torch's MemTracker says, in half the time.
    """

    def __init__(self, fake):
        super().__init__()
        self.fake, self.alive, self.now = fake, {}, 0
        self.start(nn.Module())

    def start(self, model):
        self.model, self.peak, self.gradients, self.sent = model, self.now, 0, dict(averaged=0, gathered=0)

    def remove(self, key, size, _):
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool  # fake tensors have no values: all is finite, rates are zero
        out = function(*args, **kwargs or {})
        self.fake.fake_tensor_converter.tensor_memo.clear()  # Module.to bears no weak references
        if function.namespace == 'c10d':
            gathers = 'gather' in function.name()
            into = 'gathered' if gathers else 'averaged'
            self.sent[into] += sum(x.nbytes for x in tree_leaves(args[gathers]))
            return out
        for x in (out,) if torch.is_tensor(out) else tree_leaves(out):
            if torch.is_tensor(x):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive[key] = weakref.ref(storage, functools.partial(self.remove, key, size))
                    self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return out


@contextlib.contextmanager
def watched():
    """While this lasts tensors are fake: they have shapes, and nothing is computed. Gives the `Watch`."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Watch(fake) as watch, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield watch


# -----------------------------------------------------------------------------
# trainings


def trainings_lacking(name, cells, options):
    """`lacking` for (method, settings)."""
    return lacking(name, [(dict(method=method, settings=s), s) for method, s in cells], options.only)


def train(options):
    """Trains those cells of a bench that assets/NAME.jsonl lacks, each on one thread in its own process."""
    name = options.bench
    script, base, cells = TRAININGS[name]
    todo = trainings_lacking(name, cells, options)
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
            keep(name, {**cell[0], **results(records, diverged=ran.returncode > 0)})

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, todo))
    show(name, 'trainable_parameters', 'val_loss', *['test_acc'] * (script == 'train_vit.py'))


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


def quality(options):
    train(options)
    torch.set_num_threads(1)
    methods = {name: s for name, s in TRAININGS['quality'][2] if 'ranks' not in s}
    base = {**train_gpt.defaults, **FINAL, 'vocab_size': 257}
    time_steps('quality_time', [cells_of(base, methods)], options, 5, 10)


def convergence(options):
    start, cells = 'config/vit_quickstart.py', TRAININGS['convergence'][2]
    todo = trainings_lacking('convergence', cells, options)
    if todo and not os.path.exists(f"{HERE}/{ADAPT['init_from']}"):
        subprocess.run([sys.executable, 'train_vit.py', start, '--overwrite=True'], cwd=HERE, check=True)
    train(options)
    torch.set_num_threads(1)
    base = {**config.load({}, train_vit.defaults, [f'{HERE}/{start}']), **ADAPT}
    time_steps('convergence_time', [cells_of(base, dict(cells))], options, 100)


def spectrum(options):
    """Trains the GPT of the screening and measures at SPECTRUM_STEPS, as a mean over attention's and MLP's
    matrices, the effective rank of what the weights (heads merged) have changed by, of the weights, and of
    their gradient on a batch that is always the same."""
    data, val = (Tokens('stdlib', split, SCREEN['block_size'], f'{HERE}/data') for split in ('train', 'val'))
    base = {**train_gpt.defaults, **SCREEN, 'vocab_size': data.vocab_size, 'max_iters': SPECTRUM_STEPS[-1],
            'warmup_iters': 30, 'min_lr': 2e-4}
    x, y = val.fixed_batch(0, 1, SCREEN['batch_size'])
    for about, settings in trainings_lacking('spectrum', SPECTRUM, options):
        s = {**base, **settings, 'min_lr': settings['learning_rate'] / 10}
        run, step = stepper(s, batch=lambda number, micro_step: data.batch(
            s['batch_size'], number, seed=s['seed'], rows=run.rows))
        plain = stepper(base)[0].model  # whole gradients are those of a model without heads, in float32
        matrices, start, points = galore.param_groups(plain, rank=1)[0]['params'], {}, []
        for number in range(SPECTRUM_STEPS[-1] + 1):
            if number in SPECTRUM_STEPS:
                plain.load_state_dict(merged_state_dict(run.model))
                plain.zero_grad()
                loss = plain(x, y)
                loss.backward()
                start = start or {p: p.detach().clone() for p in matrices}
                found = {'change': [p.detach() - start[p] for p in matrices],
                         'weight': [p.detach() for p in matrices], 'gradient': [p.grad for p in matrices]}
                points.append(dict(step=number, loss=loss.item(), **{
                    key: statistics.mean(map(effective_rank, of)) for key, of in found.items()}))
            if number < SPECTRUM_STEPS[-1]:
                config.set_learning_rate(run.optimizer, s, number)
                step()
        keep('spectrum', {**about, 'points': points})


def effective_rank(W):
    """exp of the entropy of the singular values of W (m, n), scaled to sum to one (Roy and Vetterli 2007):
    from 1 to min(m, n), which it is where all are the same. 0 for a matrix of zeros, as its rank."""
    values = torch.linalg.svdvals(W)
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total else 0.0


# -----------------------------------------------------------------------------
# time


def timed(functions, repeats, steps=1):
    """
    {name: cell} of functions that make a step: so many to warm up, then `repeats` times as many, in turn.

    A cell has the median of the seconds of a step, and of the ratios of neighbouring runs, its own to the
    first function's, all (ratios) and their median (to_full): what one costs in units of the other, whatever
    the machine's mood.
    """
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(steps):
                function()
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    ratios = {name: [a / b for a, b in zip(mine, first)] for name, mine in seconds.items()}
    return {name: dict(seconds=statistics.median(seconds[name]) / steps,
                       to_full=statistics.median(ratios[name]), ratios=ratios[name]) for name in functions}


def time_steps(name, lists, options, repeats, steps=1, more=lambda settings: {}):
    """Appends to assets/NAME.jsonl what a training step takes of the cells that it lacks, beside the first of
    their list, how many parameters it trains, and `more` of its settings."""
    for cells in lists:
        todo = lacking(name, cells, options.only)
        if todo:
            runs = {str(about): stepper(settings) for about, settings in (cells[0], *todo)}
            times = timed({key: step for key, (_, step) in runs.items()}, repeats, steps)
            trained = {key: count_parameters(run.model)['trainable'] for key, (run, _) in runs.items()}
            del runs
            gc.collect()  # models and their moments, before the next ones
            for about, settings in todo:
                mine, first = (trained[str(key)] for key in (about, cells[0][0]))
                keep(name, dict(about, trainable=mine, trainable_to_full=mine / first, **times[str(about)],
                                **more(settings)))
    show(name, 'trainable', 'seconds', 'to_full')


def heads(options):
    time_steps('heads', heads_cells(), options, 5)


def speed(options):
    if options.nanogpt:
        return speed_nanogpt(options.nanogpt)
    for dtype in ('float32', 'bfloat16'):
        for case, matrix in (('a step of one matrix', matrix_step), ('its basis', matrix_basis)):
            about = dict(case=case, dtype=dtype)
            if lacking('speed', [(about, None)], options.only):
                for name, cell in timed(matrix(getattr(torch, dtype)), 5).items():
                    keep('speed', dict(about, method=name, **cell))
    time_steps('speed', speed_cells(), options, 3, 10)


def matrix_step(dtype):
    """Steps without a new basis on an MLP matrix of LLaMA-1B: galore-torch's, if it is here, and ours."""
    linear = nn.Linear(5461, 2048, bias=False, device=DEVICE, dtype=dtype)
    kinds = {'ours': (galore.GaLoreAdamW, dict(basis='random')),
             'ours, Fira': (galore.GaLoreAdamW, dict(basis='random', rule='fira'))}
    with contextlib.suppress(ImportError):
        from galore_torch import GaLoreAdamW
        kinds = {'galore-torch': (GaLoreAdamW, {}), **kinds}
    steps = {}
    for name, (make, more) in kinds.items():
        p = nn.Parameter(linear.weight.detach().clone())
        p.grad = torch.randn_like(p)
        group = dict(params=[p], rank=512, update_proj_gap=10**9, scale=0.25, proj_type='std', **more)
        steps[name] = make([group], lr=0.01).step
    layer = MHLoRALinear(linear, rank=512, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(layer, lr=0.01, basis='random', basis_every=10**9)
    optimizer.begin(0)
    layer.trained.grad = torch.randn_like(layer.trained)  # as a backward pass leaves it
    return {**steps, 'ours, of the layer': optimizer.step}


def matrix_basis(dtype):
    """A new basis of such a matrix: by the SVD, by subspace iteration from a sketch or from the old basis."""
    G = torch.randn(2048, 5461, device=DEVICE).to(dtype)
    take = functools.partial(galore.bases_of, G, 512, True, False)
    old = take('power')
    return {'svd': lambda: take('svd'), 'power, cold': lambda: take('power'),
            'power, warm': lambda: take('power', old)}


def speed_nanogpt(path):
    """A step of GPT-2 124M at full rank, 4 x 512 tokens, on the CPU: nanoGPT's and ours."""
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
        settings = {**train_gpt.defaults, 'device': 'cpu', 'dtype': dtype, 'batch_size': 4}
        functions[f'ours, {dtype}'] = stepper(settings)[1]
    for name, cell in timed(functions, 12).items():
        keep('speed', dict(case='GPT-2 against nanoGPT', method=name, **cell))


# -----------------------------------------------------------------------------
# memory


def planned(settings):
    """Peak bytes of two training steps by category, without computing anything; of two micro-steps where they
    are more, as gradients are held from the second on. Sketches of blocks with a later turn are left out."""
    with watched() as watch:
        s = {**settings, 'gradient_accumulation_steps': min(2, settings['gradient_accumulation_steps'])}
        run, step = stepper(s, alone(s))
        watch.start(run.model)
        step(), step()
        bases = [layer.basis for layer in lowrank_layers(run.model) if layer.factors == 'basis']
        held = {x.untyped_storage()._cdata: x.untyped_storage().nbytes()  # zero factors share theirs
                for x in (*run.model.parameters(), *run.model.buffers())}
        weights, state = sum(held.values()) - sum(x.nbytes for x in bases), run.optimizer.state_bytes()
        return dict(weights=weights, state=state, gradients=watch.gradients,
                    activations=watch.peak - weights - state - watch.gradients, total=watch.peak)


def depth_of(settings):
    """The number of layers of a model, and of its parameters at full rank."""
    with watched():
        model = stepper({**settings, 'lowrank': '', 'optimizer': 'adamw'}, alone(settings))[0].model
    return len(model.blocks), count_parameters(model)['total']


def of_depth(measure, settings, shallow, depth):
    """measure(settings), a dict of numbers that are linear in the number of layers, from models of `shallow`
    layers and of one more: deep ones take minutes even where nothing is computed."""
    if depth <= shallow + 1:
        return measure(settings)
    one, two = (measure({**settings, 'n_layer': layers}) for layers in (shallow, shallow + 1))
    return {key: one[key] + (depth - shallow) * (two[key] - one[key]) for key in one}


def grown(settings, steps=3):
    """Bytes by which a fresh process's peak resident size grows over training steps, and their seconds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(grown_here, settings, steps).result()


def grown_here(settings, steps):
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # what is freed goes back to the system at once
    before = config.peak_memory_bytes('cpu')
    step, start = stepper(settings, alone(settings))[1], time.time()
    for _ in range(steps):
        step()
    return config.peak_memory_bytes('cpu') - before, time.time() - start


def memory(options):
    if options.words:
        return plan(options.words, options.budget)
    for about, settings in lacking('memory', memory_cells(), options.only):
        cell = dict(about, rank=settings['rank'], **of_depth(planned, settings, 5, depth_of(settings)[0]))
        if about['size'] != '7b' or options.only:  # which takes ten minutes or more
            cell['measured'], cell['seconds'] = grown(settings)
        keep('memory', cell)
    show('memory', 'weights', 'state', 'gradients', 'activations', 'total', 'measured')


def vit(options):
    def more(settings):
        small, large = (planned({**settings, 'batch_size': images}) for images in (4, 32))
        return dict(planned=small['total'], planned_32=large['total'], weights=large['weights'],
                    state=large['state'], measured=grown(settings)[0])
    models = 'vit_base_patch16_224', 'vit_large_patch16_224'
    time_steps('vit', map(vit_cells, models), options, 3, more=more)
    show('vit', 'weights', 'state', 'planned', 'measured', 'planned_32')


def largest_batch(settings, depth, room):
    """(largest micro-batch that fits into so many bytes, or 0; `planned` at the smallest; bytes it takes)."""
    def at(rows):
        return of_depth(planned, {**settings, 'batch_size': rows}, 5, depth)
    parts = settings['heads'] if settings['split'] else 1  # such heads divide the batch
    one = at(parts)
    if one['total'] > room:
        return 0, one, one['total']
    # the optimizer's step makes the peak of small batches; then it grows along a line with activations
    rows = -(-8192 // settings.get('block_size', 256) // parts) * parts
    low, high = at(rows)['total'], at(2 * rows)['total']
    slope = (high - low) / rows
    fits = max(int(rows + (room - low) // slope) // parts, 1) * parts
    return fits, one, max(one['total'], low + (fits - rows) * slope)


def plan(words, budget):
    """
    Which methods, dtypes and batch sizes of a run fit on a card; computes nothing, needs no GPU.

    words: config files and --key=value, as for the scripts; budget: the card's memory, such as 12GiB. Files
    of config/methods are the methods to plan; without any it is all with which the run goes.
    """
    room = re.fullmatch(r'([\d.e-]+)(GiB|GB|MiB)', budget)
    if not room:
        config.fail(f'--budget={budget} is no number with a unit: write --budget=12GiB or --budget=12GB')
    # CUDA itself, and what its allocator cannot reuse, want about 1 GB
    room = float(room[1]) * {'GiB': 2**30, 'GB': 10**9, 'MiB': 2**20}[room[2]] - 10**9
    given = [word for word in words if os.path.basename(os.path.dirname(os.path.abspath(word))) == 'methods']
    every = sorted(glob.glob(f'{HERE}/config/methods/*.py'), key=lambda path: ('/full.py' not in path, path))
    words = [word for word in words if word not in given]
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
                settings.update(device='cpu', dtype='bfloat16')
                depth, parameters = depth_of(settings)
                found = {dtype: largest_batch({**settings, 'param_dtype': dtype}, depth, room)
                         for dtype in ('float32', 'bfloat16')}
        except SystemExit:
            if given or path == every[0]:
                raise
            continue  # it has said why
        if row is None:
            what = f"sequences of {settings['block_size']}" if 'block_size' in settings else 'images'
            print(f'{parameters / 1e6:,.0f}M parameters, {what}, {budget}: the largest micro-batch that fits '
                  'one process, and GB\nwith 1 GB left to CUDA itself and to what its allocator cannot reuse')
            row = table('method', 'weights in', 'batch', 'all', 'weights', 'state', wide=16)
        for dtype, (fits, one, total) in found.items():
            row(os.path.basename(path)[:-3], dtype, fits or 'none',
                *(x / 1e9 for x in (total, one['weights'], one['state'])))


# -----------------------------------------------------------------------------
# communication


def sent(settings, workers, steps):
    """(bytes that one of so many workers puts into collectives in each step, {'averaged', 'gathered'}; those
    of its optimizer's state but for the moments of its own heads)."""
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=workers)
    try:
        with watched() as watch, mock.patch('torch.nn.parallel.DistributedDataParallel'):
            run, step = stepper(settings, alone(settings, workers))
            run.net = run.model  # DDP wants real memory; what it would average the run knows
            counts = []
            for _ in range(steps):
                watch.start(run.model)
                step()
                counts.append(dict(watch.sent, averaged=watch.sent['averaged'] + run.ddp_bytes))
    finally:
        dist.destroy_process_group()
    own = own_heads(run.model)
    mine = [x for p in own for x in run.optimizer.state[p].values() if torch.is_tensor(x)]
    return counts, run.optimizer.state_bytes() - sum(x.nbytes for x in mine)


def sent_a_step(settings, workers):
    """
    Bytes of one of so many workers: put into collectives a step (averaged, gathered; what is broadcast counts
    as averaged), on the wire, and `shared`, of the optimizer's state what is not of its own heads. A ring
    sends twice what is averaged, and what is gathered once for every other worker. Counted in short periods:
    a step without merge or new basis, a merge, and new bases of all layers.
    """
    T, every = settings['merge_every'], settings['basis_every']
    s = {**settings, 'merge_every': min(T, 3), 'batch_size': workers}
    seldom, shared = sent({**s, 'basis_every': 3 * 10**6}, workers, 6)
    often = 2 * seldom
    if s['factors'] == 'basis':
        often, _ = sent({**s, 'basis_every': 6}, workers, 12)
    found = dict(shared=shared)
    for key in ('averaged', 'gathered'):
        (first, step, last), all_bases = (x[key] for x in seldom[3:]), sum(x[key] for x in often[6:])
        merge, basis = first + last - 2 * step, all_bases - 2 * (first + step + last)
        found[key] = step + merge / max(T, 1) + basis / every
    found['wire'] = 2 * found['averaged'] * (workers - 1) / workers + found['gathered'] * (workers - 1)
    return found


def talks(settings):
    """Those settings of a training that say what workers send; None for what is not meant for several."""
    s = settings
    if 'lowrank' not in s:
        return {key: s[key] for key in ('sync', 'merge_every') if key in s}
    if s.get('factors') == 'basis' and s['merge_every'] == 1:  # whatever its heads are called, GaLore
        s = {**s, 'heads': 1, 'split': False}
    keys = 'lowrank', 'heads', 'rank', 'factors', 'split', 'merge_every', 'basis', 'basis_every'
    return {key: s[key] for key in keys if key in s} if s.get('split') or 'factors' in s else None


def communication(options):
    for name in ('screening', 'quality'):  # what figures.py shows of these trainings, on four workers
        base = {**train_gpt.defaults, **TRAININGS[name][1], 'vocab_size': 257, 'dtype': 'float32'}
        for s in (talks(cell['settings']) for cell in kept(name)):
            about = dict(model=name, workers=4, settings=s)
            if s is not None and not kept('communication', **about):
                found = of_depth(functools.partial(sent_a_step, workers=4), {**base, **s}, 1, base['n_layer'])
                keep('communication', {**about, **found})
    links = {'50 Mbit/s': 50e6 / 8, '1 Gbit/s': 1e9 / 8, '100 Gbit/s': 100e9 / 8}  # bytes a second
    print(f'LLaMA-1B in bfloat16 (merges in float32), rank 512, {options.workers} workers with a head each, '
          'merges every 10 steps, bases every 200.\nA step of 1 s takes so many seconds on each link:')
    row = table('method', 'put in, MB', 'on the wire, MB', *links, wide=24)
    for name, changes in COMMUNICATION.items():
        s = {**train_llama.defaults, 'size': '1b', 'param_dtype': 'bfloat16', 'dtype': 'bfloat16',
             'gradient_accumulation_steps': 1, **changes, 'rank': 512}
        s['heads'] = options.workers if s['split'] else 1
        found = of_depth(functools.partial(sent_a_step, workers=options.workers), s, 1, 24)
        row(name, (found['averaged'] + found['gathered']) / 1e6, found['wire'] / 1e6,
            *(1 + found['wire'] / speed for speed in links.values()))


def readme(options):
    runpy.run_path(f'{HERE}/assets/figures.py', run_name='__main__')


if __name__ == '__main__':
    bench = globals().get(options.bench, train)
    with config.refusals():
        bench(options)
