"""
Measures memory, times and bytes on the wire of the scripts' own steps, on any machine:

$ python bench.py BENCH
$ python bench.py memory config/llama_1b.py config/methods/galore.py --budget=12GiB

A cell of a table becomes a line of assets/NAME.jsonl as soon as it is known, and is not measured
again. assets/measure.py has the trainings behind the tables, and assets/figures.py draws both.
"""

import argparse
import ast
import contextlib
import ctypes
import functools
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import config

BENCHES = {
    'heads': 'time of a step with heads at once, with one after the other, and at full rank',
    'speed': "time of every method's step, on a GPT, LLaMA and ViT",
    'memory': 'peak memory by method, planned and run; of given files: what fits on a card',
    'communication': 'bytes that each worker puts on the wire a step',
    'card': 'all that one GPU tells in 25 minutes; --dry: whether it would run, without one'}


def options_of(argv):
    """The options of a command line; words: config files and --key=value of a run to plan."""
    lines = [f'{name:15}{what}' for name, what in BENCHES.items()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='bench.py BENCH [config files and --key=value] [options]', allow_abbrev=False,
        epilog='\n'.join(lines))
    parser.add_argument('bench', help='one of those below')
    parser.add_argument('--only', default='', help='cells whose words in the table hold this')
    parser.add_argument('--budget', default='12GiB', help='with config files: memory of the card')
    parser.add_argument('--ranks', type=int, default=1, help='with config files: how many cards')
    parser.add_argument('--dry', action='store_true', help='card: the same on a CPU, small')
    options, options.words = parser.parse_known_args(argv or ['--help'])
    if options.bench not in BENCHES:
        config.fail(f"'{options.bench}' is no bench: take one of {', '.join(BENCHES)}")
    if options.words and options.bench != 'memory':
        config.fail(f"bench.py {options.bench} does not know '{options.words[0]}': see --help")
    idle = {'dry': options.bench != 'card', 'only': options.words, 'budget': not options.words,
            'ranks': not options.words}
    if options.ranks < 1:
        config.fail(f'--ranks={options.ranks} is no number of cards: write --ranks=4')
    for name, is_idle in idle.items():
        if is_idle and getattr(options, name) != parser.get_default(name):
            config.fail(f'--{name} does nothing here: see --help')
    return options


if __name__ == '__main__':
    options = options_of(sys.argv[1:])  # before torch: mistakes are answered at once
    what = BENCHES[options.bench]
    if options.words:
        what = f"plans {' '.join(options.words)}"
    print(f'{options.bench}: {what}', flush=True)

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank
import rules
import train_gpt
import train_llama
import train_vit
from hub import refuse_shape, shape_of
from model import SIZES, GPTConfig, LlamaConfig
from prepare import ensure, read_meta
from ranks import gather_state, is_sharded, local, per_rank_tensors
from run import (Meter, freeze_as_set, join, not_finite, operations_of, peak_memory_bytes, peak_of,
                 set_learning_rate)

HERE = Path(__file__).parent
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

# -----------------------------------------------------------------------------
# what is measured: a cell is a pair, (a dict that names it, all settings of its script)

FILES = sorted(HERE.glob('config/methods/*.py'), key=lambda path: (path.stem != 'full', path.stem))
METHODS = {path.stem: config.defaults(runpy.run_path(str(path))) for path in FILES}
METHODS['GaLore drop-in'] = dict(optimizer='galore', basis='power')  # it has no file


def method(name):
    """The settings of a method by its name: that of a file of config/methods, and what is changed,
    such as 'galolte_2bit, merge_every=20'."""
    file, *words = name.split(', ')
    settings = dict(METHODS[file])
    for key, value in (word.split('=') for word in words):
        settings[key] = value  # a word, where it is no number
        with contextlib.suppress(ValueError):
            settings[key] = ast.literal_eval(value)
    return settings


def named(base, methods, **about):
    """Cells by the names of methods; methods: {name: more changes}; base: the other settings."""
    return [({**about, 'method': name}, {**base, **method(name), **changes})
            for name, changes in methods.items()]


LLAMA = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16',
         'gradient_accumulation_steps': 1}


def heads_cells():
    """GPT-2 124M, by the layers with heads (a table), and by heads and rank (a picture)."""
    layers = 'attn', 'attn,mlp', 'attn,mlp,logit'
    table = itertools.product([4], ['float32', 'bfloat16'], layers, [4], [4])
    figure = itertools.product([2], ['bfloat16'], ['attn'], [1, 4, 16], [1, 4, 16, 64])
    for sequences, dtype, targets, heads, rank in [*table, *figure]:
        about = dict(device=DEVICE, sequences=sequences, dtype=dtype, targets=targets, heads=heads,
                     rank=rank)
        base = {**train_gpt.defaults, 'batch_size': sequences, 'dtype': dtype, 'grad_clip': 0.0}
        there = {**base, 'lowrank': targets, 'heads': heads, 'rank': rank, 'alpha': float(rank)}
        for way, settings in (('full', base), ('parallel', there), ('sequential', there)):
            yield {**about, 'method': way}, settings


def speed_cells():
    """Language models, 8 x 256 tokens in bfloat16."""
    gpt = {**train_gpt.defaults, 'dtype': 'bfloat16', 'block_size': 256, 'vocab_size': 257,
           'n_layer': 8, 'n_head': 8, 'n_embd': 512}
    # so few words that the output layer costs nothing
    few = {**LLAMA, 'size': '350m', 'n_layer': 4, 'vocab_size': 32}
    bases = {'GPT of 25M': gpt, 'LLaMA-60M': {**LLAMA, 'size': '60m'},
             '4 layers of LLaMA-350M': few}
    wide = dict(rank=128)
    methods = {'full': {}, 'mhlora': {}, 'lte': {}, 'galore': wide, 'GaLore drop-in': wide,
               'galolte': wide}
    for case, base in bases.items():
        yield from named({**base, 'batch_size': 8}, methods, case=case)


def vit_cells(*batches):
    """ViT at 224 pixels by size and images of a batch."""
    methods = {'full': {}}
    for rank in (1, 2, 4, 8, 16, 32):
        methods[f'lora, rank={rank}'] = dict(lowrank='attn', alpha=float(rank))
    methods.update({'GaLore drop-in, rank=64': {}, 'galore, rank=64': {}})
    for size, depth in (('base', 12), ('large', 24)):
        for images in batches:
            base = {**train_vit.defaults, 'model': f'vit_{size}_patch16_224', 'n_layer': depth,
                    'batch_size': images, 'dtype': 'bfloat16', 'grad_clip': 0.0}
            yield from named(base, methods, size=f'ViT-{size[0].upper()}', images=images)


def memory_cells():
    """LLaMA by size and method, one sequence of 256 tokens, and ViT. LLaMA's bases have half of the
    width as rank; galore_lean's a quarter, galore_int8's an eighth."""
    for size in ('60m', '350m', '1b', '7b'):
        width, depth = SIZES[size][:2]
        half = dict(rank=width // 2)
        methods = {
            'full': {},
            'GaLore drop-in': half,
            'galore': half,
            'galore, per_layer=True': half,
            'galore_lean, checkpointing=True': dict(rank=width // 4),
            'galore_int8, checkpointing=True': dict(rank=width // 8),
            'lora, frozen_bits=4, checkpointing=True': dict(rank=16, train='factors'),
            'muon_lean, checkpointing=True': {},
            'mhlora': {},
            # a worker with one head; three steps have a merge
            'lte, heads=1': dict(rank=64, merge_every=2),
            'galolte, heads=1': dict(half, merge_every=2)}
        base = {**LLAMA, 'size': size, 'n_layer': depth, 'batch_size': 1}
        yield from named(base, methods, size=size)
    yield from vit_cells(4, 32)


def communication_cells():
    """LLaMA-1B, rank 512, a head on each of 32 workers."""
    one, own = dict(rank=512), dict(rank=512, heads=32)
    often = dict(own, basis_every=200)
    methods = {'full': {}, 'local_adamw': {}, 'galore': one, 'lte': own, 'lte, sync=merge': own,
               'galolte': often, 'galolte, sync=merge': often}
    base = {**LLAMA, 'size': '1b', 'n_layer': 24}
    return named(base, methods, model='LLaMA-1B', workers=32)


# -----------------------------------------------------------------------------
# what was measured


def machine():
    """What this runs on, in words: the GPU, or the processor and the number of its cores."""
    if DEVICE == 'cuda':
        return torch.cuda.get_device_name()
    names = []
    if os.path.exists('/proc/cpuinfo'):
        names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return f'{(names or [platform.machine()])[0]}, {os.cpu_count()} cores'


def keep(name, cell):
    """Prints a cell, and appends it to assets/NAME.jsonl with machine, version of torch, date."""
    print(*(f'{key}={x}' for key, x in cell.items() if key not in ('curve', 'ratios', 'run')),
          flush=True)
    about = dict(machine=machine(), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    with open(HERE / f'assets/{name}.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps({**cell, **about}) + '\n')


def read_lines(path):
    """The lines of a .jsonl, none where there is no such file."""
    lines = Path(path).read_text(encoding='utf-8').splitlines() if os.path.exists(path) else []
    return [json.loads(line) for line in lines]


def kept(name, **about):
    """The lines of assets/NAME.jsonl for which all that is said holds."""
    lines = read_lines(HERE / f'assets/{name}.jsonl')
    return [line for line in lines if about.items() <= line.items()]


def title(about):
    """Returns a cell's name in one line; of a training it also says the settings that differ from
    those of its method."""
    words = [str(x) for key, x in about.items() if key != 'settings']
    if 'settings' in about:
        usual = method(about['method'])
        words += [f'{key}={x}' for key, x in about['settings'].items() if usual.get(key) != x]
    return ', '.join(words)


def progress(total):
    """
    A function that says which of so many cells is measured, and the time left if the rest goes on
    as before: `3 of 12 · GPT of 25M, galore · about 4 min left`.

    Its arguments: the cell's number, from 0, its words, and how much of it is done, 0 to 1. It
    prints a line at the start of each cell, and then at most one every ten seconds.
    """
    begun = last = time.perf_counter()
    parts = [0.0] * total

    def say(number, words, part=0.0):
        nonlocal last
        now = time.perf_counter()
        parts[number] = part
        if part == 1 or part and now - last < 10:
            return
        last, done = now, sum(parts)
        left = 'time left: not known yet'
        if done:
            left = f'about {math.ceil((total / done - 1) * (now - begun) / 60)} min left'
        print(f'{number + 1} of {total} · {words} · {left}', file=sys.stderr, flush=True)
    return say


def measure_all(name, cells, only, measure, jobs=1):
    """
    Measures each cell that assets/NAME.jsonl lacks and whose title holds `only`, `jobs` at a time.

    measure(about, settings, tell) returns what to keep of a cell, or None; it is kept at once. It
    may call tell(part) to say how much of the cell is done, 0 to 1.
    """
    cells = [cell for cell in cells if only in title(cell[0])]
    if not cells:
        config.fail(f"--only='{only}': no cell of {name} has these words")
    todo = [cell for cell in cells if not kept(name, **cell[0])]
    print(f'{len(todo)} of {len(cells)} lines are missing in assets/{name}.jsonl', flush=True)
    say = progress(len(todo))

    def one(number, cell):
        about, settings = cell
        tell = functools.partial(say, number, title(about))
        tell()
        if found := measure(about, settings, tell):
            keep(name, {**about, **found})
        tell(1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(len(todo)), todo))


# -----------------------------------------------------------------------------
# a script's step in this process


def script_of(settings):
    """The script that has such settings."""
    if 'img_size' in settings:
        return train_vit
    return train_llama if 'size' in settings else train_gpt


class Drawn:
    """Random data in the place of prepare.Tokens, or of Images with `num_classes`: what a rank gets
    of a micro-batch."""
    num_classes = 9

    def __init__(self, run):
        self.run, self.rows, self.drawn = run, run.s.batch_size // run.ranks, None

    def __len__(self):
        return self.run.s.batch_size

    def batch(self, *_, **__):
        if self.drawn is None:  # once: to draw images takes as long as a card's step
            self.drawn = self.draw()
        return self.drawn

    def draw(self):
        run, rows = self.run, self.rows
        if 'img_size' in run.settings:
            size = run.look.size
            images = torch.randint(256, (rows, 3, size, size), dtype=torch.uint8)
            return images, torch.randint(self.num_classes, (rows,))
        shape = rows, run.s.block_size
        x, y = torch.randint(run.model.config.vocab_size, (2, *shape)).unbind()
        if run.s.documents:  # one a row
            return x, y, torch.ones(rows), torch.zeros(shape, dtype=torch.int64)
        return x, y

    fixed_batch = batch  # of an evaluation


def stepper(settings, ranks=None, rank=0, device='cpu'):
    """
    Returns (run, step) of a script from scratch: run is what its build makes, and each call of step
    does the next train_step, on random data.

    settings: all that the script has, and as `shape`, if it is there, the configuration of loaded
    weights, whose depth n_layer sets. ranks: this process acts as `rank` of so many on `device`,
    and joins no others; None: it joins those of torchrun, if any.
    """
    s, script, numbers = dict(settings), script_of(settings), itertools.count()
    of_images = script is train_vit
    shape = s.pop('shape', None)
    planned = {'planned': replace(shape, n_layer=s['n_layer'])} if shape else {}
    # what trains depends on init_from (train='auto')
    freeze_as_set(nn.Module(), s, new=['logit'] if of_images else [])
    s.update(init_from='scratch')
    if not of_images:
        meta = about_data(s)
        words = vocabulary(s, meta, shape)
        if s['documents'] is None:
            s['documents'] = meta.get('starts', False) and meta.get('prompts', False)
    process = join(s) if ranks is None else SimpleNamespace(
        rank=rank, ranks=ranks, device=device, device_type=device.split(':')[0], compute=s['dtype'])
    with contextlib.redirect_stdout(None):
        names = ['a class'] * Drawn.num_classes if of_images else words
        run = script.build(s, process, names, **planned)
    data = Drawn(run)

    def step():
        number = next(numbers)

        def batch(micro_step):
            if of_images:  # these lie on the device
                return script.batch_of(run, data, list(range(data.rows)), number, micro_step)
            return data.batch()
        return script.train_step(run, number, batch)
    return run, step


def about_data(s):
    """The meta.json of a run's data, or {} where they are not there."""
    with contextlib.suppress(ValueError, OSError):
        ensure(s['dataset'], s['data_dir'])
        return read_meta(Path(s['data_dir'], s['dataset'], 'meta.json'))
    return {}


def vocabulary(s, meta, shape=None):
    """The vocabulary size: as set, or of the run's data, or of loaded weights of that shape, or of
    the data that the script is for."""
    usual = 32000 if 'size' in s else 50257
    return s['vocab_size'] or meta.get('vocab_size') or (shape.vocab_size if shape else usual)


class OneAfterTheOther(nn.Module):
    """A layer whose heads run in a loop: the same numbers, slower."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        y = F.linear(x, layer.weight, layer.bias)
        for A, B in zip(layer.A, layer.B):
            inside = F.linear(x, A)
            y = y + F.linear(layer.scale / layer.heads * inside, B)
        return y


def loop_over_heads(model):
    """Puts a `OneAfterTheOther` in the place of every layer with heads."""
    for name, layer in lowrank.named_layers(model).items():
        model.set_submodule(name, OneAfterTheOther(layer))


# -----------------------------------------------------------------------------
# time


def time_steps(name, cells, only, steps):
    """
    Keeps the time of a training step of each cell that assets/NAME.jsonl lacks.

    A cell takes turns with its reference, the first cell that differs only in its method: `steps`
    steps of the reference, then as many of the cell, six times; the first time is a warm-up. Kept
    are `seconds`, the median of a step of the cell; `ratios`, each time of the cell divided by the
    reference's just before; and `to_full`, their median, in which the machine's speed cancels.
    """
    cells = list(cells)

    def measure(about, settings, tell):
        gc.collect()  # models of the cell before
        first = next(cell for cell in cells if {**cell[0], 'method': ''} == {**about, 'method': ''})
        pair = [settings] if about == first[0] else [first[1], settings]
        runs = [stepper(s) for s in pair]
        if about['method'] == 'sequential':
            loop_over_heads(runs[-1][0].model)
        seconds = [[] for _ in runs]
        for turn in range(6):
            for (_, step), mine in zip(runs, seconds):
                start = time.perf_counter()
                for _ in range(steps):
                    step()
                if DEVICE == 'cuda':
                    torch.cuda.synchronize()
                mine.append(time.perf_counter() - start)
            tell((turn + 1) / 6)
        theirs, mine = seconds[0][1:], seconds[-1][1:]
        ratios = [a / b for a, b in zip(mine, theirs)]
        trained = [lowrank.count_parameters(run.model)['trainable'] for run, _ in runs]
        return dict(trainable=trained[-1], trainable_to_full=trained[-1] / trained[0],
                    seconds=statistics.median(mine) / steps, to_full=statistics.median(ratios),
                    ratios=ratios)
    measure_all(name, cells, only, measure)


def heads(only):
    time_steps('heads', heads_cells(), only, 1)


def speed(only):
    time_steps('speed', speed_cells(), only, 10)  # with merges and new bases
    time_steps('speed', vit_cells(4), only, 1)


# -----------------------------------------------------------------------------
# tensors without values, on ranks that are not there

# words in the names of torch's collectives; what they send: see `on_the_wire`
COLLECTIVES = dict(scatter='scattered', alltoall='scattered', allgather='gathered',
                   gather='scattered', broadcast='broadcast')


def put_in(name, args):
    """(how it is sent, see COLLECTIVES; the tensors that a rank puts in) of torch's collective of
    that name."""
    how = next((how for word, how in COLLECTIVES.items() if word in name), 'averaged')
    return how, tree_leaves(args[how in ('gathered', 'scattered')])


def number_in(function, args):
    """Returns the number that an operator reads out of a fake tensor: True for a bool (so all is
    finite), else zero (so rates are zero). None: the operator reads no number."""
    if function is torch.ops.aten._local_scalar_dense.default:
        return args[0].dtype == torch.bool
    return None


class Watch(TorchDispatchMode):
    """
    Sees what happens to fake tensors: bytes of those alive (`now`), the most since `start`
    (`peak`), and bytes put into collectives (`sent`). What torch's MemTracker says, in half the
    time.
    """

    def __init__(self, fake):
        super().__init__()
        self.fake, self.alive, self.now = fake, {}, 0
        self.start()

    def start(self):
        self.peak = 0
        self.sent = dict(averaged=0, gathered=0, scattered=0, broadcast=0)

    def remove(self, key, size, _):
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (number := number_in(function, args)) is not None:
            return number
        out = function(*args, **kwargs or {})
        self.fake.fake_tensor_converter.tensor_memo.clear()  # Module.to bears no weak references
        if function.namespace == 'c10d':
            how, inputs = put_in(function.name(), args)
            self.sent[how] += sum(x.nbytes for x in inputs)
            return out
        for x in tree_leaves(out):
            # a sharded one is a shell around this rank's part
            if not torch.is_tensor(x) or is_sharded(x) or x.device.type == 'meta':
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, functools.partial(self.remove, key, size))
                self.now += size
        now = self.now
        if dist.is_initialized():  # FSDP frees storages by making them empty
            there = [reference() for reference in self.alive.values()]
            now = sum(x.nbytes() for x in there if x is not None)
        self.peak = max(self.peak, now)
        return out


def on_the_wire(sent, ranks):
    """Bytes that each of so many ranks sends by a ring, of what it has put into collectives."""
    in_parts = (2 * sent['averaged'] + sent['scattered']) * (ranks - 1) / ranks
    return in_parts + sent['gathered'] * (ranks - 1) + sent['broadcast']


class LossOfACard(torch.autograd.Function):
    """In the place of torch's linear_cross_entropy, as model.py calls it for x (tokens, width) and
    weight (words, width): makes the tensors that it makes on a card."""

    @staticmethod
    def forward(ctx, x, weight, chunk, is_mean):
        ctx.chunk, ctx.gradients = chunk, None
        logits = torch.empty(chunk, len(weight))
        if is_mean:  # of float32: its gradients come at once
            ctx.gradients = LossOfACard.gradients_of(ctx, x, weight)
        else:
            ctx.save_for_backward(x, weight)
        del logits
        return x.new_empty(() if is_mean else len(x))

    @staticmethod
    def gradients_of(ctx, x, weight):
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            x, weight = ctx.saved_tensors
            gradients = LossOfACard.gradients_of(ctx, x, weight)
            logits = torch.empty(ctx.chunk, len(weight))
            # in 16 bits, too, those of the chunk before among them
            logits = [logits, *(logits.to(x.dtype) for _ in range(2 if ctx.chunk < len(x) else 1))]
        return *gradients, None, None


@contextlib.contextmanager
def watched():
    """
    Makes tensors fake while it lasts: they have shapes, and nothing is computed. Gives the `Watch`.

    Where kernels differ those of a card are counted: attention with dropout keeps no matrix of
    (time, time), documents apart are one mask, and the loss in chunks has other temporaries.
    """
    attend = F.scaled_dot_product_attention

    def attention(*tensors, dropout_p=0.0, **how):
        return attend(*tensors, **how)

    def loss(x, weight, targets, reduction, options):
        chunk = min(options.batch_chunk_size, len(x))
        return LossOfACard.apply(x, weight, chunk, reduction == 'mean')
    with (mock.patch.object(F, 'scaled_dot_product_attention', attention),
          mock.patch('model.spans_of', lambda _: []),
          mock.patch.object(F, 'linear_cross_entropy', loss, create=True),  # from torch 2.13 on
          FakeTensorMode(allow_non_fake_inputs=True) as fake, Watch(fake) as watch):
        yield watch


@contextlib.contextmanager
def fake_ranks(ranks, rank=0, device='cpu'):
    """Makes this process one of so many ranks, whose collectives do nothing; DDP, which wants real
    memory, is left out."""
    if ranks == 1:
        yield
        return
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=ranks)
    mesh = init_device_mesh(device, (ranks,))  # reads its numbers, and fake tensors have none
    try:
        alone = mock.patch('torch.nn.parallel.DistributedDataParallel',
                           side_effect=lambda model, *_, **__: model)
        made = mock.patch('torch.distributed.device_mesh.init_device_mesh', return_value=mesh)
        with alone, made:
            yield
    finally:
        dist.destroy_process_group()


def of_depth(measure, settings, shallow=5):
    """Returns measure(settings), a dict of numbers that are linear in the number of layers. It
    extrapolates from `shallow` and one more: deep models take minutes even without computing."""
    depth = settings['n_layer']
    if depth <= shallow + 1:
        return measure(settings)
    one, two = (measure({**settings, 'n_layer': layers}) for layers in (shallow, shallow + 1))
    return {key: one[key] + (depth - shallow) * (two[key] - one[key]) for key in one}


# -----------------------------------------------------------------------------
# memory


def planned(settings, ranks=1):
    """
    Returns the peak bytes of two training steps on one of so many ranks, by category, without
    computing anything; `sent`: bytes that the rank sends for a micro-batch, in a ring; `host`:
    bytes that rank 0 gathers in its host's memory to save.

    If steps have more than two micro-batches, two are run: from the second on gradients are held.
    Not counted: sketches of blocks whose turn comes later, and temporaries, up to 134 MB, of
    compiled steps on moments of 8 bits.
    """
    found = of_depth(functools.partial(peaks, ranks=ranks), settings)
    # each of the two is linear in the depth, and the larger of them is not
    total = max(found.pop('backward'), found.pop('step'))
    rest = total - found['weights'] - found['state'] - found['gradients']
    return dict(found, activations=rest, total=total)


def storages(tensors):
    """{storage: bytes} of tensors, of what this rank holds of them."""
    found = [local(x).untyped_storage() for x in tensors]
    return {x._cdata: x.nbytes() for x in found}


def peaks(settings, ranks):
    """What `planned` makes its numbers of: peaks before an optimizer's step and in it."""
    merges = settings['merge_every'] > 1
    if merges:  # soon, as the first one makes state
        settings = dict(settings, merge_every=2, basis_every=200)
    with fake_ranks(ranks), watched() as watch:
        micro_steps = min(2, settings['gradient_accumulation_steps'])
        run, step = stepper(dict(settings, gradient_accumulation_steps=micro_steps, compile=False),
                            ranks)
        most = dict(backward=0, step=0, gradients=0)

        def note(phase):
            most[phase], watch.peak = max(most[phase], watch.peak), 0

        def before_step(*_):
            note('backward')
            grads = [p.grad for p in lowrank.leaf_names(run.model) if p.grad is not None]
            most['gradients'] = sum(local(grad).nbytes for grad in grads)
        run.optimizer.register_step_pre_hook(before_step)
        for _ in range(3 if merges else 2):
            watch.start()
            step()
            note('step')
        layers = lowrank.named_layers(run.model)
        bases = [local(layer.basis) for layer in layers.values() if layer.factors == 'basis']
        held = storages([*run.model.parameters(), *run.model.buffers()])  # zeros share theirs
        weights = sum(held.values()) - sum(x.nbytes for x in bases)
        state = run.optimizer.state_bytes()
        sent = on_the_wire(watch.sent, ranks) / micro_steps
        if ranks > 1 and not settings['shard']:
            sent += run.ddp_bytes / settings['gradient_accumulation_steps']
            # its buckets are there from the beginning of the last pass, beside what others left
            most['backward'] += run.ddp_bytes * ranks / (ranks - 1) / 2
        # what all ranks have alike torch saves tensor by tensor, from where it is
        alive = {key for key, reference in watch.alive.items() if reference() is not None}
        saved = gather_state(run.model, layers, run.optimizer, run.replicas)
        gathered = storages(filter(torch.is_tensor, tree_leaves(saved)))
        host = sum(size for key, size in gathered.items() if key not in alive)
        return dict(weights=weights, state=state, **most, sent=sent, host=host)


def grown(settings):
    """Bytes by which the peak resident size of a fresh process grows over three training steps."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).mallopt(-3, 1 << 18)  # what is freed goes back to the system at once
    before = peak_memory_bytes('cpu')
    step = stepper(settings, ranks=1)[1]
    step(), step(), step()
    return peak_memory_bytes('cpu') - before


def memory(only, cells=None):
    """Keeps the memory of training steps: of cells, or of LLaMA and ViT by size and method."""
    def measure(about, settings, tell):
        found = {'rank': settings['rank'], **planned(settings)}
        if found['total'] < 12e9 or only:  # others take ten minutes or more
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                found['measured'] = pool.submit(grown, settings).result()
        return found
    measure_all('memory', cells or memory_cells(), only, measure)


# -----------------------------------------------------------------------------
# what fits on a card

COLUMNS = {'total': 'smallest', 'weights': 'weights', 'state': 'state', 'gradients': 'gradients',
           'activations': 'the rest', 'sent': 'sent', 'host': 'to save'}


def largest_batch(settings, free, ranks):
    """Returns (the largest micro-batch over all ranks with which each fits into `free` bytes, or 0;
    the bytes of each with it; then COLUMNS, as `planned` for the smallest micro-batch)."""
    def at(rows):
        return planned({**settings, 'batch_size': rows}, ranks)
    parts = math.lcm(settings['heads'] if settings['split'] else 1, ranks)  # they divide the batch
    one = at(parts)
    fits, total = 0, one['total']
    if total <= free:
        # from 8,192 tokens a card on it grows along a line
        rows = -(-8192 * ranks // settings.get('block_size', 256) // parts) * parts
        low, high = at(rows)['total'], at(2 * rows)['total']
        slope = (high - low) / rows
        fits = max(int(rows + (free - low) // slope) // parts, 1) * parts
        if fits >= rows:
            total = low + (fits - rows) * slope
        else:  # the optimizer's step may make the peak, and the loss works on pieces or not
            fits, total = bisected(at, free, parts, total, fits)
    return fits, total, *(one[key] for key in COLUMNS)


def bisected(at, free, parts, total, most):
    """Returns (rows, their bytes) that fit into `free` bytes: `most`, which is tried first, or
    fewer, where `parts` rows more do not fit. total: the bytes of `parts` rows, which fit."""
    fits, too_many, rows = parts, most + parts, most
    while too_many - fits > parts:
        size = at(rows)['total']
        if size <= free:
            fits, total = rows, size
        else:
            too_many = rows
        rows = (fits + too_many) // 2 // parts * parts
    return fits, total


def print_head(settings, model, cards, compute):
    """Prints what the columns of `plan` are."""
    if compute == 'float32':
        cards += ', computed in float32 (weights in bfloat16: in bfloat16)'
    what = f"sequences of {settings['block_size']}" if 'block_size' in settings else 'images'
    total = lowrank.count_parameters(model)['total']
    print(f'{total / 1e6:,.0f}M parameters, {what}, {cards}: the largest micro-batch that fits,\n'
          'and GB of a card with it, 1 GB left to CUDA and what its allocator cannot reuse;\n'
          'then GB with the smallest, its parts, and what a card sends for it; and what the\n'
          'host of rank 0 gathers to save')
    names = 'weights in', 'batch', 'all', *COLUMNS.values()
    print(f"{'method':16}" + ''.join(f'{name:>11}' for name in names))


def named_script(words):
    """The script that config files name; without files train_gpt."""
    # of files that are not there config.load says so
    texts = [Path(word).read_text(encoding='utf-8') for word in words if os.path.isfile(word)]
    script = re.search(r'\btrain_(gpt|llama|vit)\b', ''.join(texts))
    if texts and not script:
        config.fail(f"{' '.join(words)} does not say whose it is: write '# python train_gpt.py "
                    "FILE' (or train_llama.py, train_vit.py) into its first lines")
    return sys.modules[script[0]] if script else train_gpt


def plan(words, budget, ranks=1):
    """
    Prints which methods, dtypes and batch sizes of a run fit on each of so many cards. It computes
    nothing and needs no GPU. With shard=True each card holds its part; otherwise what DDP sends and
    its buckets are counted.

    words: config files and --key=value, as for the scripts; budget: a card's memory, such as 12GiB.
    Torch may see less than a card's name says: 11.76 GiB of 12 GB is what others report.
    Files of config/methods are the methods to plan; without any, all are planned that the settings
    allow, and what refuses the others is printed.
    """
    size = re.fullmatch(r'(\d+\.?\d*(?:e-?\d+)?)(GiB|GB|MiB)', budget)
    if not size:
        config.fail(f'--budget={budget} is no number with a unit: write --budget=12GiB or 12GB')
    if ranks > 1 and torch.__version__ < (2, 13):
        config.fail(f'--ranks wants fake tensors of torch 2.13, and this is {torch.__version__}')
    # CUDA itself, and what its allocator cannot reuse, want about 1 GB
    free = float(size[1]) * {'GiB': 2**30, 'GB': 10**9, 'MiB': 2**20}[size[2]] - 10**9
    methods = [word for word in words if Path(word).resolve().parent.name == 'methods']
    words = [word for word in words if word not in methods]
    methods = methods or list(map(str, FILES))
    script = named_script(words)
    dtypes = [word.split('=')[1] for word in words if word.startswith('--param_dtype=')]
    dtypes = dtypes or ['float32', 'bfloat16']
    say = progress(len(methods) * len(dtypes))
    refused, is_head_printed, rows = set(), False, 0
    for number, path in enumerate(methods):
        name, sentence = Path(path).stem, io.StringIO()
        try:
            with (contextlib.redirect_stdout(None),  # a table is printed
                  contextlib.redirect_stderr(sentence), config.refusals()):
                settings, model = run_to_plan(script, [*words, path, '--learning_rate=1'], ranks)
            with config.refusals():
                compute = 'float32' if settings['dtype'] == 'float32' else 'bfloat16'
                if not is_head_printed:
                    print_head(settings, model, f'{ranks} x {budget}', compute)
                is_head_printed = True
                for part, dtype in enumerate(dtypes):
                    tell = functools.partial(say, len(dtypes) * number + part)
                    tell(f'{name}, weights in {dtype}')
                    own = dict(param_dtype=dtype, dtype=compute if dtype == 'float32' else dtype)
                    fits, *sizes = largest_batch({**settings, **own}, free, ranks)
                    tell(name, 1)
                    sizes = ''.join(f'{size / 1e9:11.3f}' for size in sizes)
                    print(f"{name:16}{dtype:>11}{fits or 'none':>11}{sizes}", flush=True)
                    rows += 1
        except SystemExit:
            if sentence.getvalue() not in refused:
                print(sentence.getvalue(), end='', file=sys.stderr)
            refused.add(sentence.getvalue())
    if not rows:
        raise SystemExit(2)


def run_to_plan(script, words, ranks):
    """Returns (all settings of a run on so many cards, its model at full rank without numbers)."""
    with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
        settings = config.load(vars(script), script.defaults, words)
    source, of_text = settings['init_from'], 'block_size' in settings
    if of_text and source not in ('scratch', 'auto', 'resume'):
        settings['shape'] = shape_of(source)
        refuse_shape(settings['shape'], GPTConfig if script is train_gpt else LlamaConfig, settings)
        settings['n_layer'] = settings['shape'].n_layer
    settings.update(device='cpu', compile=False)
    with watched():
        full = dict(lowrank='', optimizer='adamw', basis='sketch', dtype='bfloat16')
        model = stepper({**settings, **full}, ranks=1)[0].model
    settings['n_layer'] = len(model.blocks)
    return settings, model


# -----------------------------------------------------------------------------
# communication


def sent(settings, workers, steps):
    """Returns ([bytes that one of so many workers sends in each step, in a ring], the bytes of its
    optimizer's state without the state of its own heads)."""
    with fake_ranks(workers), watched() as watch:
        run, step = stepper(settings, workers)
        by_ddp = 0 if settings['shard'] else run.ddp_bytes  # which is left out here
        counts = []
        for _ in range(steps):
            watch.start()
            step()
            counts.append(on_the_wire(watch.sent, workers) + by_ddp)
    states = [run.optimizer.state[p] for p in per_rank_tensors(lowrank.lowrank_layers(run.model))]
    own = filter(torch.is_tensor, itertools.chain(*(state.values() for state in states)))
    return counts, run.optimizer.state_bytes() - sum(x.nbytes for x in own)


def sent_a_step(settings, workers):
    """
    Returns bytes of one of so many workers: `wire`, what it sends a step in a ring, and `shared`,
    the optimizer's state without that of its own heads.

    They are counted with short periods: a merge every three steps, a new basis of each layer every
    twelve. After the last step no sketch is open.
    """
    T, every = settings['merge_every'], settings['basis_every']
    short = {**settings, 'merge_every': min(T, 3), 'basis_every': 12, 'batch_size': workers}
    counts, shared = sent(short, workers, 25)
    last = counts[-12:]
    step, period = last[3], sum(last[2:5])  # from one merge to the next, without new bases
    merge, bases = period - 3 * step, sum(last) - 4 * period
    return dict(shared=shared, wire=step + merge / max(T, 1) + bases / every)


def communication(only, cells=None):
    """Keeps what a worker sends: of cells, or of LLaMA-1B by method."""
    def measure(about, settings, tell):
        found = of_depth(functools.partial(sent_a_step, workers=about['workers']), settings, 1)
        return {key: round(x) for key, x in found.items()}
    measure_all('communication', cells or communication_cells(), only, measure)


# -----------------------------------------------------------------------------
# a card that is not there: steps on fake tensors of 'cuda:0', in a process of their own

# Autograd asks torch's C++ for the card of a tensor. This one is always there, and does nothing. It
# has to be loaded before torch, which looks for cards once.
CARD = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static const Device card(DeviceType::CUDA, 0);
struct Guard : impl::DeviceGuardImplInterface {
  DeviceType type() const { return card.type(); }
  Device getDevice() const { return card; }
  Device exchangeDevice(Device) const { return card; }
  void setDevice(Device) const {}
  void uncheckedSetDevice(Device) const noexcept {}
  Stream getStream(Device) const { return Stream(Stream::DEFAULT, card); }
  Stream exchangeStream(Stream stream) const { return stream; }
  DeviceIndex deviceCount() const noexcept { return 1; }
};
extern "C" void take_place() {  // of that of a torch with CUDA
  static Guard guard;
  impl::device_guard_impl_registry[static_cast<size_t>(card.type())].store(&guard);
}
namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const {}
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(DeviceIndex) const { return true; }
  DeviceIndex deviceCount() const { return 1; }
  long versionRuntimeCuDNN() const { return 0; }
  Generator getNewGenerator(DeviceIndex = -1) const { return detail::createCPUGenerator(); }
};
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", REGISTRY_PREFERRED, Hooks)
}
"""
FAKE_STEPS = 3  # with merges and new bases after two
# operators whose kernels on a card wait for it; fake tensors refuse those whose results have a size
# that the card decides, such as nonzero
WAITING = {'_local_scalar_dense', '_linalg_svd', '_linalg_eigh', '_linalg_eig',
           '_linalg_check_errors'}
MAY_WAIT = {  # functions of a phase
    'step': {'pairs_of_levels',  # once
             'refuse_equal_heads',  # at the first merge
             'draw_heads',  # of a merge that draws new ones
             '_maybe_opt_step'},  # of float16's scaler
    'line': {'line'},
    'evaluate': {'evaluate'},
    'save': {'not_finite', 'gather_state', 'collect'}}


def place():
    """Where in this project, or in torch's GradScaler, an operator was called: the function, and it
    with its callers in words."""
    frame, found = sys._getframe(1), []
    while frame and len(found) < 3:
        path = Path(frame.f_code.co_filename)
        name = frame.f_code.co_name
        is_ours = path.parent == HERE and path != Path(__file__) or path.name == 'grad_scaler.py'
        if is_ours and name[0] != '<':  # not a comprehension
            found.append((path.name, frame.f_lineno, name))
        frame = frame.f_back
    words = ' < '.join(f'{name}:{line} {function}' for name, line, function in found)
    return (found[0][2], words) if found else ('', 'the backward pass')


class FakeCard(FakeTensorMode):
    """Fake tensors of a card that torch need not touch."""
    avoid_device_init = True  # torch's name: what is made of numbers is made on the CPU


class CardWatch(TorchDispatchMode):
    """
    Records where the host would wait for the card, by `phase`, which the caller sets.

    waits: {phase: {(function, words)}} of operators that wait for the card, copy from it, or copy
    to it and are not both pinned and non_blocking; mixed: {words} of operators that mix devices;
    collectives: for each its name, and the dtype and shape of each tensor that is put in.
    """

    def __init__(self, fake):
        super().__init__()
        self.fake, self.pinned, self.phase = fake, [], ''
        self.waits, self.mixed, self.collectives = {}, set(), []

    def pin(self, x):
        """In the place of Tensor.pin_memory."""
        self.pinned.append(x)
        return x

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == 'prim':  # asks for a tensor's device
            return function(*args, **kwargs)
        out = number_in(function, args)
        if out is None:
            out = function(*args, **kwargs)
        self.fake.fake_tensor_converter.tensor_memo.clear()  # Module.to bears no weak references
        name = function.name().split('::')[1].split('.')[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if function.namespace == 'c10d':
            put = [(str(x.dtype), *x.shape) for x in put_in(function.name(), args)[1]]
            self.collectives.append((name, *put))
            self.mixed |= {f'{name} of a tensor that is not contiguous, at {place()[1]}'
                           for x in inputs if not x.is_contiguous()}
            return out
        where = {x.device.type for x in inputs if x.dim()}
        target = out.device.type if torch.is_tensor(out) else ''
        if name in ('copy_', '_to_copy'):
            source = inputs[-1]
            way = source.device.type, target
            is_pinned = any(x is source for x in self.pinned)
            no_wait = kwargs.get('non_blocking') or args[2:3] == (True,)
            if way == ('cuda', 'cpu') or way == ('cpu', 'cuda') and not (is_pinned and no_wait):
                self.note(f'{name} from {way[0]} to {way[1]}')
        elif where == {'cpu', 'cuda'} or any(map(has_both, args)):
            self.mixed.add(f'{name} mixes devices, at {place()[1]}')
        elif name in WAITING or is_by_mask(name, args):
            if any(x.device.type == 'cuda' for x in inputs):
                self.note(name)
        return out

    def note(self, what):
        function, words = place()
        self.waits.setdefault(self.phase, set()).add((function, f'{what}, at {words}'))

    def wrong(self):
        """What is not as it should be, in sentences."""
        found = sorted(self.mixed)
        for phase, may in MAY_WAIT.items():
            waits = sorted(self.waits.get(phase, ()))
            found += [f'{phase} waits: {words}' for function, words in waits if function not in may]
            if phase == 'line' and len(waits) > 1:
                found.append('line waits more than once: ' + '; '.join(words for _, words in waits))
        return found


def has_both(x):
    """Whether x is a list with tensors of a card and of the CPU, numbers among them."""
    return isinstance(x, (list, tuple)) and {'cpu', 'cuda'} <= {
        part.device.type for part in x if torch.is_tensor(part)}


def is_by_mask(name, args):
    """Whether an operator reads or writes where a mask is true: how many numbers the card knows."""
    return name in ('index', 'index_put_', '_index_put_impl_') and any(
        x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None)


class Done:
    """A stream or an event of a card that has nothing to do."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    stream_id = device_index = 0
    device_type = DeviceType.CUDA.value

    def wait(self, *_):
        pass

    record = record_event = wait_event = wait_stream = wait


@contextlib.contextmanager
def fake_card(ranks=1, rank=0):
    """While it lasts, this process is one of so many ranks, each with a card that computes nothing.
    Gives the `CardWatch`."""
    answers = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        set_device=lambda _: None, is_bf16_supported=lambda *_, **__: True,
        get_device_name=lambda *_: 'no card', get_device_capability=lambda *_: (9, 0),
        max_memory_allocated=lambda _: 0,
        Stream=Done, Event=Done, stream=Done, current_stream=Done, default_stream=Done)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        touch = 'torch._subclasses.fake_tensor.init_gpu_context'
        stack.enter_context(mock.patch(touch, lambda _: None))
        # objects travel as bytes, which fake tensors have not
        stack.enter_context(mock.patch('torch.distributed.all_gather_object', all_alike))
        # these pass fake tensors over, and on a card everything is to run
        stack.enter_context(mock.patch('rules.FakeTensor', ()))
        for kept in (rules.pairs_of_levels, rules.on_device):
            kept.cache_clear()
        # AUC and so on are computed from numbers
        stack.enter_context(mock.patch('train_vit.measure', lambda *_: (0.0, 0.0, [], None)))
        # a fake number is zero, and a scale of zero ends a run
        stack.enter_context(mock.patch.object(torch.amp.GradScaler, 'get_scale', lambda _: 1.0))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others ask what card it is
        stack.enter_context(torch.compiler.set_stance('force_eager'))
        stack.enter_context(fake_ranks(ranks, rank, 'cuda'))
        fake = stack.enter_context(FakeCard(allow_non_fake_inputs=True))
        watch = stack.enter_context(CardWatch(fake))
        stack.enter_context(mock.patch.object(torch.Tensor, 'pin_memory', lambda x: watch.pin(x)))
        yield watch


def all_alike(found, x):
    """In the place of dist.all_gather_object: all ranks have what this one has."""
    found[:] = [x] * len(found)


def not_there(run):
    """Names of what a run has on another device than its own."""
    found = dict([*run.model.named_parameters(), *run.model.named_buffers()])
    for name, module in run.model.named_modules():  # such as a sketch
        found |= {f'{name}.{key}': x for key, x in vars(module).items()}
    for p, state in run.optimizer.state.items():
        found |= {f'{key} of {run.optimizer.names[p]}': x for key, x in state.items()}
    tensors = {name: x for name, x in found.items() if torch.is_tensor(x)}
    tensors |= {f'{name}.grad': x.grad for name, x in tensors.items() if x.is_leaf
                and x.grad is not None}
    return [name for name, x in tensors.items() if x.device != torch.device(run.device)]


def on_fake_card(settings, ranks=1, rank=0):
    """Runs steps (with merges and new bases), a line of the log, an evaluation and the gathering of
    a save on a fake card. Returns ([what is wrong, in sentences], collectives)."""
    script = script_of(settings)
    of_images = script is train_vit
    with fake_card(ranks, rank) as watch, tempfile.TemporaryDirectory() as folder:
        run, step = stepper({**settings, 'out_dir': folder}, ranks, rank, 'cuda:0')
        meter = Meter(run, 0, 1, 'images' if of_images else 'tokens')
        watch.phase = 'step'
        for number in range(FAKE_STEPS):
            watch.pinned.clear()
            set_learning_rate(run.optimizer, run.settings, number)
            meter.add(*step())
        watch.phase = 'line'
        meter.line(FAKE_STEPS, 0.0)
        watch.phase = 'evaluate'
        script.evaluate(run, Drawn(run), *['val'] * of_images)
        watch.phase = 'save'
        not_finite(run.model, run.optimizer)
        gather_state(run.model, lowrank.named_layers(run.model), run.optimizer, run.replicas)
        return watch.wrong() + [f'{name} is not on the card' for name in not_there(run)], \
            watch.collectives


# small models by script (in shards none is a ViT, which FSDP2 moves to the card in a way that fake
# tensors do not see), and dtypes of weights and of products
SMALL = {
    'train_gpt': dict(n_head=2, n_embd=64, vocab_size=257, block_size=32),
    'train_llama': dict(n_head=2, n_kv_head=1, n_embd=128, n_mlp=256, vocab_size=9,
                        block_size=32),  # of four ranks one has none of nine rows
    'train_vit': dict(model='vit_tiny_patch16_224', img_size=32, patch_size=8, n_head=2, n_embd=64,
                      augment='flip,crop')}
DTYPES = {'float32, bfloat16': dict(dtype='bfloat16'), 'float32, float16': dict(dtype='float16'),
          'bfloat16': dict(param_dtype='bfloat16', dtype='bfloat16')}
FAKE_CELLS = (  # of the tests: script, method, dtypes, ranks, in shards
    ('train_gpt', 'full', 'float32, float16', 1, False),
    ('train_gpt', 'relora', 'float32, float16', 1, False),
    ('train_gpt', 'fira', 'float32, bfloat16', 1, False),
    ('train_gpt', 'muon_lean', 'bfloat16', 1, False),
    ('train_llama', 'galore', 'float32, float16', 1, False),
    ('train_llama', 'galore_int8', 'bfloat16', 1, False),
    ('train_llama', 'lora, frozen_bits=4, lora_dropout=0.1, train=factors, documents=True',
     'bfloat16', 1, False),
    ('train_vit', 'lte', 'bfloat16', 1, False),
    ('train_gpt', 'lte', 'float32, bfloat16', 4, False),
    ('train_gpt', 'galolte_2bit', 'bfloat16', 4, False),
    ('train_llama', 'galore', 'float32, bfloat16', 4, True))


def small_settings(script, method_name, dtypes, shard):
    """All settings of a small model on the fake card."""
    known = sys.modules[script].defaults
    s = {**known, **method(method_name), **SMALL[script], **DTYPES[dtypes], 'shard': shard}
    s.update(n_layer=2, batch_size=8, gradient_accumulation_steps=2, init_from='scratch',
             rank=min(s['rank'], 16), basis_every=2, min_lr=0.0)
    if 'eval_iters' in s:  # of a ViT a split says how many
        s['eval_iters'] = 2
    s.update(grad_clip=0.0 if s['per_layer'] else 1.0)
    if s['merge_every'] > 1:
        s.update(merge_every=2, rewarm_iters=0)
    return s


def all_fake_cells():
    """Yields cells like FAKE_CELLS: each method on each script, and on one script on four ranks,
    without and with shards; dtypes take turns. Cells that the scripts refuse are left out."""
    for number, name in enumerate(METHODS):
        for turn, (script, ranks, shard) in enumerate((
                ('train_gpt', 1, False), ('train_llama', 1, False), ('train_vit', 1, False),
                (list(SMALL)[number % 3], 4, False), (list(SMALL)[number % 2], 4, True))):
            cell = script, name, list(DTYPES)[(number + turn) % 3], ranks, shard
            settings, world = small_settings(*cell[:3], shard), {'WORLD_SIZE': str(ranks)}
            try:
                with mock.patch.dict(os.environ, world), contextlib.redirect_stderr(io.StringIO()):
                    config.check(settings, settings, {})
            except SystemExit:
                continue
            yield cell


def try_on_fake_card(script, method_name, dtypes, ranks, shard):
    """What is wrong in a cell, in sentences. Of several ranks it is run as the first, the second
    and the last one, whose collectives have to be alike."""
    settings = small_settings(script, method_name, dtypes, shard)
    found, sent = [], []
    for rank in (0,) if ranks == 1 else (0, 1, ranks - 1):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                wrong, collectives = on_fake_card(settings, ranks, rank)
        except Exception as error:  # such as an operator that mixes devices
            wrong, collectives = [f'{type(error).__name__}: {config.said(error)}, at '
                                  f'{place_of(error)}'], []
        found += [words for words in wrong if words not in found]
        sent.append(collectives)
        for number, (first, mine) in enumerate(itertools.zip_longest(sent[0], collectives)):
            if first != mine:
                found.append(f'collective {number} is {first} on rank 0, and {mine} on rank {rank}')
                break
    return found


def place_of(error):
    """Where in this project an error was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).parent == HERE]
    return f'{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}'


def answer(cells):
    """Prints what is wrong in cells, a line of JSON each: what `ask_fake_card` reads."""
    warnings.simplefilter('ignore')
    rules.load_kernels()  # they ask torch for cards
    for cell in cells:
        print(json.dumps([cell, try_on_fake_card(*cell)]), flush=True)


def ask_fake_card(cells):
    """Yields (cell, what is wrong in it, in sentences) of cells such as FAKE_CELLS."""
    for line in beside_fake_card('bench.answer(json.loads(sys.argv[2]))', json.dumps(cells)):
        yield json.loads(line)


def beside_fake_card(code, word=''):
    """Yields the lines that code prints in a process of its own with the card of CARD; word: its
    sys.argv[2]. ValueError: g++ is not there, or the process fails."""
    if not shutil.which('g++'):
        raise ValueError('a card that is not there wants a compiler: install g++')
    code = ('import ctypes, json, sys; card = ctypes.CDLL(sys.argv[1]); import bench; '
            f'card.take_place()\n{code}')
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = f'{folder}/card.cpp', f'{folder}/card.so'
        Path(source).write_text(CARD, 'utf-8')
        command = ['g++', '-std=c++20', '-shared', '-fPIC', '-w', source, '-o', library]
        command += [f'-I{root}/include', f'-L{root}/lib', '-lc10', '-ltorch_cpu']
        subprocess.run([*command, f'-Wl,-rpath,{root}/lib'], check=True)
        process = subprocess.Popen([sys.executable, '-c', code, library, word],
                                   cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
        with process:
            yield from process.stdout
        if process.returncode:
            raise ValueError(f'the process with a fake card ended with code {process.returncode}')


# -----------------------------------------------------------------------------
# one card

# tests of test_lowrank.py that take TEST_DEVICE: what the core computes
TESTS_OF_CARDS = (
    'as_it_is_written_down', 'bases_are_orthonormal', 'power_converges', 'a_plain_group', 'muon_is',
    'muon_in_a_basis', 'a_sketch_is', '8_bits_are_off', 'rounding_is', 'rounding_drifts',
    'random_bits', 'compiled_steps')


def card_cells(dry):
    """Cells of a card, those that say most first. In a dry run models are small."""
    alone = [name for name, settings in METHODS.items()
             if settings.get('sync') != 'merge' or settings.get('split')]
    gpt = {**train_gpt.defaults, 'batch_size': 8, 'dtype': 'bfloat16', 'vocab_size': 50257}
    llama = {**LLAMA, 'size': '1b', 'n_layer': 24, 'batch_size': 4, 'vocab_size': 32000,
             'checkpointing': True}
    vit = {**train_vit.defaults, 'n_layer': 12, 'batch_size': 32, 'dtype': 'bfloat16'}
    large = {**llama, 'size': '7b', 'n_layer': 32, 'batch_size': 8}
    if dry:
        gpt.update(SMALL['train_gpt'], n_layer=2)
        llama.update(SMALL['train_llama'], n_layer=2)
        large.update(SMALL['train_llama'], n_layer=2)
        vit.update(SMALL['train_vit'], n_layer=2, batch_size=8)
    step = dict(sync='step')
    first = dict.fromkeys(('full', 'galore', 'muon', 'galore_lean', 'mhlora', 'lora'), step)
    rest = {name: step for name in alone if name not in first}
    seven = {'galore_lean': dict(rank=1024), 'galore_int8': dict(rank=512),
             'lora, frozen_bits=4': dict(train='factors')}
    some = {name: step for name in ('full', 'galore', 'mhlora', 'lte')}

    def cells(model, base, methods):
        return named(base, methods, what='step', model=model, dtype=base['dtype'],
                     compile=base['compile'])
    found = [
        *cells('GPT-2 124M', gpt, first), *cells('LLaMA-1B', llama, first),
        (dict(what='tests'), {}), *cells('LLaMA-7B', large, seven), *cells('ViT-B', vit, first),
        *cells('GPT-2 124M', dict(gpt, compile=True), some),
        *cells('GPT-2 124M', dict(gpt, dtype='float16'), some)]
    if dry:  # compiled code takes a minute, and other models have the same layers
        found = [cell for cell in found if not cell[0].get('compile')]
        return found + cells('GPT-2 124M', gpt, rest)
    return [*found, *cells('GPT-2 124M', gpt, rest), *cells('LLaMA-1B', llama, rest),
            *cells('ViT-B', vit, rest)]


def launches_of(step):
    """How many kernels a step starts on the card; on a CPU, how many operators."""
    kind = ProfilerActivity.CUDA if DEVICE == 'cuda' else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        step()
        if DEVICE == 'cuda':
            torch.cuda.synchronize()
    if DEVICE == 'cuda':  # but for copies, and what only names a part of the step
        return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation
                   and not event.name.startswith('Mem') for event in found.events())
    return sum(event.name.startswith('aten::') for event in found.events())


def steps_on_card(settings, most=3.0):
    """Returns what a step takes here: launches, seconds (the mean, as in a run: nothing waits for
    the card until the last one), items a second, peak bytes and MFU. It times 3 steps, and begins
    up to 17 more before `most` seconds have passed."""
    run, step = stepper(settings)
    for _ in range(3):  # bases, moments, compiled code
        step()
    found, steps = dict(launches=launches_of(step)), 0
    start = time.perf_counter()
    while steps < 3 or steps < 20 and time.perf_counter() - start < most:
        step()
        steps += 1
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    found['seconds'] = (time.perf_counter() - start) / steps
    items = settings['batch_size'] * settings.get('block_size', 1)
    if script_of(settings) is train_vit:
        operations = train_vit.operations_of_image(run.model)
    else:
        operations = operations_of(run.model, settings['block_size'], run.model.config.n_embd)
    found['items_per_s'] = items / found['seconds']
    found['measured'] = peak_memory_bytes(run.device)
    if peak := peak_of(machine(), run.compute):
        found['mfu'] = operations * found['items_per_s'] / peak
    return found


def tests_on_card(dry):
    """What the tests say with their tensors on this machine's device. dry: which there are."""
    words = [sys.executable, '-m', 'pytest', '-q', 'test_lowrank.py']
    words += ['-k', ' or '.join(TESTS_OF_CARDS), *['--collect-only'] * dry]
    ran = subprocess.run(words, cwd=HERE, env={**os.environ, 'TEST_DEVICE': DEVICE},
                         capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line] or ['nothing']
    found = dict(said=lines[-1])
    if ran.returncode:
        failed = [line for line in lines if line.startswith(('FAILED', 'ERROR'))]
        found['error'] = '; '.join([f'{len(failed)} failed', *failed])[:600]
    return found


def on_card(about, settings, dry):
    """Returns what is kept of a cell of a card; `error`: a sentence on what failed. If not dry, its
    steps run in a process of their own: an error of the card lasts as long as its process."""
    if about['what'] == 'tests':
        return tests_on_card(dry)
    found = {}
    try:
        if dry:
            found.update(steps_on_card(settings, 0.0))
            found['planned'] = planned(settings)['total']
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                steps = pool.submit(steps_on_card, settings)
                found['planned'] = planned(settings)['total']  # meanwhile
                found.update(steps.result())
    except (Exception, SystemExit) as error:  # SystemExit: what the card cannot do is refused
        found['error'] = f'{type(error).__name__}: {config.said(error)}'
    return found


def card(only, dry=False):
    """Keeps what one card tells, a cell at a time. dry: keeps nothing, asks the fake card, too, and
    ends with exit code 1 if something fails, or would wait for a card."""
    if not dry and DEVICE != 'cuda':
        raise ValueError('bench.py card wants a GPU: say --dry to see whether it would run')
    if not dry:
        measure_all('card', card_cells(dry), only, lambda *cell: on_card(*cell[:2], dry))
        return
    torch.set_num_threads(1)  # of small shapes more would wait for each other
    wrong = []

    def say(words, found):
        print(words, *found, sep='\n    ', flush=True)
        wrong.extend(found)

    def ask(cells):
        for cell, found in ask_fake_card(cells):
            say(', '.join(map(str, cell)), found)
    cells = dict.fromkeys([*FAKE_CELLS, *all_fake_cells()])
    if torch.__version__ < (2, 13):  # whose fake tensors know no collectives
        cells = [cell for cell in cells if cell[3] == 1]
    cells = [cell for cell in cells if only in ', '.join(map(str, cell))]
    of_card = [cell for cell in card_cells(dry) if only in title(cell[0])]
    if not cells and not of_card:
        config.fail(f"--only='{only}': no cell of card has these words")
    with ThreadPoolExecutor(2) as pool:  # each has a process
        asked = [pool.submit(ask, cells[first::2]) for first in (0, 1)]
        for about, settings in of_card:
            found = on_card(about, settings, dry)
            error = [found.pop('error')] if 'error' in found else []
            say(f'{title(about)}: {found}', error)
        for part in asked:
            part.result()
    print(f'{len(wrong)} things are wrong')
    raise SystemExit(1 if wrong else 0)


if __name__ == '__main__':
    sys.excepthook = config.in_one_line  # of Ctrl-C
    with config.refusals():
        if options.words:
            plan(options.words, options.budget, options.ranks)
        else:
            run_bench = globals()[options.bench]
            more = [options.dry] if options.bench == 'card' else []
            run_bench(options.only, *more)
