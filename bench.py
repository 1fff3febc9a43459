"""
Measures what the README claims, on any machine, by the scripts' own build and train_step:

$ python bench.py BENCH
$ python bench.py memory config/llama_1b.py config/methods/galore.py --budget=12GiB

Times are medians of interleaved runs, as ratios within one process. What is measured becomes a line of
assets/NAME.jsonl and is not measured again; assets/figures.py draws it.
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import statistics
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import config

BENCHES = {
    'heads': 'time of multi-head LoRA, heads at once, one after the other, and full rank',
    'speed': "time of every method's step, on a GPT, LLaMA and ViT",
    'memory': 'peak memory of LLaMA and ViT by method, planned and run; given files: what fits on a card',
    'communication': 'bytes that each worker puts into collectives, and on the wire, a step'}


def chosen(argv, benches=BENCHES, about=__doc__):
    """The options of a command line; words: what only scripts know. Answers mistakes before torch comes."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog='\n'.join(map('{0[0]:15}{0[1]}'.format, benches.items())))
    parser.add_argument('bench', nargs='?', help='one of those below')
    parser.add_argument('--only', default='', help='those whose words in the table hold this')
    parser.add_argument('--jobs', type=int, default=2, help='trainings side by side, each on one thread')
    parser.add_argument('--budget', default='12GiB', help='memory, with config files: that of the card')
    parser.add_argument('--ranks', type=int, default=1, help='memory, with config files: how many cards')
    options, options.words = parser.parse_known_args(argv)
    if options.bench is None:
        parser.parse_args(['--help'])
    if options.bench not in benches:
        near = difflib.get_close_matches(options.bench, benches, n=1, cutoff=0)[0]
        config.fail(f"'{options.bench}' is no bench: did you mean '{near}'?")
    if options.words and options.bench != 'memory':
        config.fail(f"bench.py {options.bench} does not know '{options.words[0]}': see bench.py --help")
    return options


if __name__ == '__main__':
    options = chosen(sys.argv[1:])

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank
import train_gpt
import train_llama
import train_vit
from model import SIZES
from prepare import ensure, read_meta
from ranks import gather_state, is_sharded, local, per_rank_tensors
from run import freeze_as_set, join, peak_memory_bytes

HERE = Path(__file__).parent
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

# -----------------------------------------------------------------------------
# what is measured: pairs (what it is called, all settings of its script). A name is looked up in assets


def method(name, **changes):
    """The settings of config/methods/NAME.py, with changes."""
    found = runpy.run_path(f'{HERE}/config/methods/{name}.py')
    return {**{key: value for key, value in found.items() if not key.startswith('_')}, **changes}


def named(base, methods, **about):
    """Pairs by the name of a method, of its settings beside those of `base`."""
    return [({**about, 'method': name}, {**base, **changes}) for name, changes in methods.items()]


PLAIN = dict(optimizer='galore', basis='power')  # the drop-in
# Single steps: {method: settings}
LLAMA = {**train_llama.defaults, 'param_dtype': 'bfloat16', 'dtype': 'bfloat16',
         'gradient_accumulation_steps': 1}
VIT = {'full fine-tuning': {},
       **{f'LoRA, rank {rank}': method('lora', lowrank='attn', rank=rank, alpha=float(rank))
          for rank in (1, 2, 4, 8, 16, 32)},
       'GaLore, drop-in, rank 64': dict(PLAIN, rank=64), 'GaLore, rank 64': method('galore', rank=64)}
SPEED = {'full rank': {}, 'MHLoRA': method('mhlora'), 'LTE': method('lte'), 'GaLore': method('galore'),
         'GaLore, drop-in': dict(PLAIN, rank=128), 'GaLoLTE': method('galolte', rank=128)}


def heads_cells():
    """GPT-2 124M, by the layers with heads (a table), and by heads and rank (a picture)."""
    table = [(4, dtype, targets, 4, 4) for dtype in ('float32', 'bfloat16')
             for targets in ('attn', 'attn,mlp', 'attn,mlp,logit')]
    figure = [(2, 'bfloat16', 'attn', heads, rank) for heads in (1, 4, 16) for rank in (1, 4, 16, 64)]
    for sequences, dtype, targets, heads, rank in table + figure:
        base = {**train_gpt.defaults, 'batch_size': sequences, 'dtype': dtype, 'grad_clip': 0.0}
        there = dict(lowrank=targets, heads=heads, rank=rank, alpha=float(rank))
        ways = {'full': {}, 'parallel': there, 'sequential': dict(there, layer=OneAfterTheOther)}
        yield from named(base, ways, device=DEVICE, sequences=sequences, dtype=dtype, targets=targets,
                         heads=heads, rank=rank)


def vit_cells(*batches):
    """ViT at 224 pixels by size and images of a batch."""
    for size, name, depth in (('ViT-B', 'vit_base_patch16_224', 12), ('ViT-L', 'vit_large_patch16_224', 24)):
        for images in batches:
            base = {**train_vit.defaults, 'model': name, 'n_layer': depth, 'batch_size': images,
                    'dtype': 'bfloat16', 'grad_clip': 0.0}
            yield from named(base, VIT, size=size, images=images)


def speed_cells():
    """Language models, 8 x 256 tokens in bfloat16."""
    gpt = {**train_gpt.defaults, 'dtype': 'bfloat16', 'block_size': 256, 'vocab_size': 257, 'n_layer': 8,
           'n_head': 8, 'n_embd': 512}
    few = {**LLAMA, 'size': '350m', 'n_layer': 4, 'vocab_size': 32}  # so that the output layer is nothing
    for case, base in (('GPT of 25M', gpt), ('LLaMA-60M', {**LLAMA, 'size': '60m'}),
                       ('4 layers of LLaMA-350M', few)):
        yield from named({**base, 'batch_size': 8}, SPEED, case=case)


def memory_cells():
    """LLaMA by size and method, one sequence of 256 tokens, and ViT. Bases have half of the width."""
    for size in ('60m', '350m', '1b', '7b'):
        width, depth = SIZES[size][:2]
        r = width // 2
        methods = {
            'full rank': {},
            'GaLore, drop-in': dict(PLAIN, rank=r),
            'GaLore': method('galore', rank=r),
            'GaLore, per layer': method('galore', rank=r, per_layer=True),
            'the same, 8 bits, checkpointing': method('galore_lean', rank=r // 2, checkpointing=True),
            'Muon, lean, checkpointing': method('muon_lean', checkpointing=True),
            'MHLoRA, 4 heads': method('mhlora'),
            # a worker with one head; how often it merges does not matter, so that three steps have a merge
            'LTE, a worker': method('lte', heads=1, rank=64, merge_every=2),
            'GaLoLTE, a worker': method('galolte', heads=1, rank=r, merge_every=2)}
        yield from named({**LLAMA, 'size': size, 'n_layer': depth, 'batch_size': 1}, methods, size=size)
    yield from vit_cells(4, 32)


def communication_cells(workers=32):
    """LLaMA-1B, rank 512, a head on each worker."""
    one, own = dict(rank=512, heads=1), dict(rank=512, heads=workers)
    galolte = method('galolte', basis_every=200, **own)
    ways = {'full rank': one, 'local AdamW': method('local_adamw', **one), 'GaLore': method('galore', **one),
            'LTE': method('lte', **own), "LTE, sync='merge'": method('lte', sync='merge', **own),
            'GaLoLTE': galolte, "GaLoLTE, sync='merge'": {**galolte, 'sync': 'merge'}}
    return named({**LLAMA, 'size': '1b', 'n_layer': 24}, ways, model='LLaMA-1B', workers=workers)


# -----------------------------------------------------------------------------
# what was measured


def machine():
    """What this runs on, in words: the GPU, or the processor and the number of its cores."""
    if DEVICE == 'cuda':
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        name = (re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) or [name])[0]
    return f'{name}, {os.cpu_count()} cores'


def keep(name, cell):
    """Prints what was measured, and appends it to assets/NAME.jsonl with machine, version of torch, date."""
    print(json.dumps({key: x for key, x in cell.items() if key not in ('curve', 'ratios')}), flush=True)
    about = dict(machine=machine(), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    with open(HERE / f'assets/{name}.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps({**cell, **about}) + '\n')


def read_lines(path):
    """The lines of a .jsonl, none where there is no such file."""
    lines = Path(path).read_text(encoding='utf-8').splitlines() if os.path.exists(path) else []
    return [json.loads(line) for line in lines]


def kept(name, **about):
    """The lines of assets/NAME.jsonl for which all that is said holds."""
    return [cell for cell in read_lines(HERE / f'assets/{name}.jsonl') if about.items() <= cell.items()]


def title(about):
    """What is measured, in a line."""
    settings = about.get('settings', {}).values()
    return ' '.join(map(str, [*(x for key, x in about.items() if key != 'settings'), *settings]))


def lacking(name, cells, only):
    """Those of cells whose words hold `only` and that assets/NAME.jsonl lacks."""
    return [cell for cell in cells if only in title(cell[0]) and not kept(name, **cell[0])]


def table(first, *names, wide):
    """Prints the head of a table. Returns what prints a row of it: words, then numbers to the right."""
    widths = [max(len(name) + 1, 10) for name in names]

    def row(first, *values):
        forms = {int: '{:,}', float: '{:.3f}', type(None): ''}
        texts = (forms.get(type(x), '{}').format(x) for x in values)
        print(f'{first:{wide}}' + ''.join(f' {x:>{width}}' for x, width in zip(texts, widths)), flush=True)
    row(first, *names)
    return row


def show(name, cells, *keys):
    """A table of what assets/NAME.jsonl holds of cells."""
    found = [(title(about), cell) for about, _ in cells for cell in kept(name, **about)]
    row = table(name, *keys, wide=max([len(name), *(len(text) for text, _ in found)]))
    for text, cell in found:
        row(text, *map(cell.get, keys))


def measure_all(name, cells, only, measure, *keys, jobs=1):
    """Keeps measure(about, settings) of what assets/NAME.jsonl lacks, but where it is None; shows all."""
    cells = list(cells)
    todo = lacking(name, cells, only)
    print(f'{len(todo)} of {len(cells)} to measure', flush=True)

    def one(cell):
        if found := measure(*cell):
            keep(name, {**cell[0], **found})
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))
    show(name, cells, *keys)


# -----------------------------------------------------------------------------
# a script's step in this process


class OneAfterTheOther(lowrank.MHLoRALinear):
    """Heads in a loop: the same, slower. The study's first figure has both."""

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        for A, B in zip(self.A, self.B):
            y = y + F.linear(self.scale / self.heads * F.linear(x, A), B)
        return y


def stepper(settings, ranks=None):
    """
    (run, step) of a script from scratch: what its build makes, and its train_step on random data, a step
    further each call.

    settings: all that the script has, and `layer`, a class in place of MHLoRALinear; ranks: this is the first
    of so many on CPUs, whom it does not join.
    """
    s, numbers = dict(settings), itertools.count()
    script = train_llama if 'size' in s else train_vit if 'img_size' in s else train_gpt
    # train='auto' asks what is loaded
    freeze_as_set(nn.Module(), s, new=('logit',) * (script is train_vit))
    s.update(init_from='scratch', compile=False)
    where = join(s) if ranks is None else SimpleNamespace(
        rank=0, ranks=ranks, device='cpu', device_type='cpu', compute=s['dtype'])
    layer = s.pop('layer', lowrank.MHLoRALinear)
    with contextlib.redirect_stdout(None), mock.patch('lowrank.MHLoRALinear', layer):
        run = script.build(s, where, ['a class'] * 9 if script is train_vit else vocabulary(s))
    rows = s['batch_size'] // run.ranks

    def batch(micro_step):
        if script is train_vit:
            images = torch.randint(256, (rows, 3, run.look.size, run.look.size), dtype=torch.uint8)
            return images, torch.randint(9, (rows,))
        return torch.randint(run.model.config.vocab_size, (2, rows, s['block_size'])).unbind()
    return run, lambda: script.train_step(run, next(numbers), batch)


def vocabulary(s):
    """Tokens of a run's data if they are here, else of the data that the script is made for."""
    if s['vocab_size']:
        return s['vocab_size']
    with contextlib.suppress(ValueError, OSError):
        ensure(s['dataset'], s['data_dir'])
        return read_meta(Path(s['data_dir'], s['dataset'], 'meta.json'))['vocab_size']
    return 32000 if 'size' in s else 50257


# words in the names of torch's collectives; what they send: see `on_the_wire`
COLLECTIVES = dict(scatter='scattered', alltoall='scattered', allgather='gathered', gather='scattered',
                   broadcast='broadcast')


class Watch(TorchDispatchMode):
    """
    Sees what happens to fake tensors: bytes of those alive (`now`), the most since `start` (`peak`), and
    bytes put into collectives (`sent`). What torch's MemTracker says, in half the time.
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
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool  # fake tensors have no values: all is finite, rates are zero
        out = function(*args, **kwargs or {})
        self.fake.fake_tensor_converter.tensor_memo.clear()  # Module.to bears no weak references
        if function.namespace == 'c10d':
            name = function.name()
            how = next((how for word, how in COLLECTIVES.items() if word in name), 'averaged')
            self.sent[how] += sum(x.nbytes for x in tree_leaves(args[how in ('gathered', 'scattered')]))
            return out
        for x in tree_leaves(out):
            # a sharded one is a shell around this rank's part
            if not torch.is_tensor(x) or is_sharded(x) or x.device.type == 'meta':
                continue
            if x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.alive[key] = weakref.ref(storage, functools.partial(self.remove, key, size))
                self.now += size
        now = self.now
        if dist.is_initialized():  # FSDP frees storages by making them empty
            now = sum(x.nbytes() for x in [ref() for ref in self.alive.values()] if x is not None)
        self.peak = max(self.peak, now)
        return out


def on_the_wire(sent, ranks):
    """Bytes that each of so many ranks sends by a ring, of what it has put into collectives, see `Watch`."""
    return ((2 * sent['averaged'] + sent['scattered']) * (ranks - 1) / ranks + sent['gathered'] * (ranks - 1)
            + sent['broadcast'])


@contextlib.contextmanager
def watched():
    """While this lasts tensors are fake: they have shapes, and nothing is computed. Gives the `Watch`."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Watch(fake) as watch:
        yield watch


# -----------------------------------------------------------------------------
# time


def time_steps(name, cells, options, steps):
    """
    Keeps what a training step takes where assets/NAME.jsonl lacks it.

    So many steps to warm up, then five times as many, in turn with those of the first that differs in its
    method alone. Kept are the median of the seconds of a step, and the ratios of neighbouring runs, its own
    to the first one's, and their median (to_full): what one costs in units of the other, whatever the
    machine's mood.
    """
    cells = list(cells)
    for _, group in itertools.groupby(cells, lambda cell: {**cell[0], 'method': ''}):
        group = list(group)
        todo, first = lacking(name, group, options.only), title(group[0][0])
        kinds = {title(about): stepper(settings) for about, settings in (group[0], *todo) if todo}
        seconds = {key: [] for key in kinds}
        for turn, key in itertools.product(range(6), kinds):
            start = time.perf_counter()
            for _ in range(steps):
                kinds[key][1]()
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
            if turn:
                seconds[key].append(time.perf_counter() - start)
        trained = {key: lowrank.count_parameters(run.model)['trainable'] for key, (run, _) in kinds.items()}
        kinds.clear()
        gc.collect()  # models and their moments, before the next ones
        for about, _ in todo:
            key = title(about)
            ratios = [mine / other for mine, other in zip(seconds[key], seconds[first])]
            keep(name, {**about, 'trainable': trained[key],
                        'trainable_to_full': trained[key] / trained[first],
                        'seconds': statistics.median(seconds[key]) / steps,
                        'to_full': statistics.median(ratios), 'ratios': ratios})
    show(name, cells, 'trainable', 'seconds', 'to_full')


def heads(options):
    time_steps('heads', heads_cells(), options, 1)


def speed(options):
    time_steps('speed', speed_cells(), options, 10)  # with merges and new bases
    time_steps('speed', vit_cells(4), options, 1)


@contextlib.contextmanager
def fake_ranks(ranks):
    """This process as the first of so many ranks, whose collectives do nothing; DDP, which wants real memory,
    is left out."""
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh('cpu', (ranks,))  # reads its numbers, and fake tensors have none
    try:
        alone = mock.patch('torch.nn.parallel.DistributedDataParallel',
                           side_effect=lambda model, *_, **__: model)
        with alone, mock.patch('torch.distributed.device_mesh.init_device_mesh', return_value=mesh):
            yield
    finally:
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# memory


def planned(settings, ranks=1):
    """Peak bytes of two training steps on one of so many ranks by category, without computing anything, and
    bytes that it sends for a micro-batch, by a ring; steps of two micro-batches where they are more, as
    gradients are held from the second on. Sketches of blocks with a later turn are left out."""
    found = of_depth(functools.partial(peaks, ranks=ranks), settings)
    # each of the two is linear in the depth, and the larger of them is not
    total = max(found.pop('backward'), found.pop('step'))
    rest = total - found['weights'] - found['state'] - found['gradients']
    return dict(found, activations=rest, total=total)


def peaks(settings, ranks):
    """See `planned`: bytes of weights, state, gradients, the peaks before and in an optimizer step, sent, and
    those that rank 0 gathers in its host's memory while it saves."""
    with fake_ranks(ranks) if ranks > 1 else contextlib.nullcontext(), watched() as watch:
        s = {**settings, 'gradient_accumulation_steps': min(2, settings['gradient_accumulation_steps'])}
        run, step = stepper(s, ranks)
        most = dict(backward=0, step=0, gradients=0)

        def note(phase):
            most[phase], watch.peak = max(most[phase], watch.peak), 0

        def before_step(*_):
            note('backward')
            most['gradients'] = sum(local(p.grad).nbytes for p in lowrank.leaf_names(run.model)
                                    if p.grad is not None)
        run.optimizer.register_step_pre_hook(before_step)
        for _ in range(2):
            watch.start()
            step()
            note('step')
        bases = [local(layer.basis) for layer in lowrank.lowrank_layers(run.model)
                 if layer.factors == 'basis']
        held = {x.untyped_storage()._cdata: x.untyped_storage().nbytes()  # zero factors share theirs
                for x in map(local, (*run.model.parameters(), *run.model.buffers()))}
        weights, state = sum(held.values()) - sum(x.nbytes for x in bases), run.optimizer.state_bytes()
        sent = on_the_wire(watch.sent, ranks) / s['gradient_accumulation_steps']
        # what all ranks have alike torch saves tensor by tensor, from where it is
        alive = {x for x, reference in watch.alive.items() if reference() is not None}
        saved = gather_state(run.model, lowrank.named_layers(run.model), run.optimizer, run.replicas)
        saved = filter(torch.is_tensor, tree_leaves(saved))
        gathered = {x.untyped_storage()._cdata: x.nbytes for x in saved}
        host = sum(size for key, size in gathered.items() if key not in alive)
        return dict(weights=weights, state=state, **most, sent=sent, host=host)


def of_depth(measure, settings, shallow=5):
    """measure(settings), a dict of numbers that are linear in the number of layers, from models of `shallow`
    layers and of one more: deep ones take minutes even where nothing is computed."""
    depth = settings['n_layer']
    if depth <= shallow + 1:
        return measure(settings)
    one, two = (measure({**settings, 'n_layer': layers}) for layers in (shallow, shallow + 1))
    return {key: one[key] + (depth - shallow) * (two[key] - one[key]) for key in one}


def grown(settings):
    """Bytes by which the peak resident size grows over three training steps, in a fresh process."""
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # what is freed goes back to the system at once
    before = peak_memory_bytes('cpu')
    step = stepper(settings, ranks=1)[1]
    step(), step(), step()
    return peak_memory_bytes('cpu') - before


def memory(options):
    if options.words:
        return plan(options.words, options.budget, options.ranks)
    peaks_of(memory_cells(), options)


def peaks_of(cells, options):
    """Keeps the memory that cells take where assets/memory.jsonl lacks it."""
    def measure(about, settings):
        found = {'rank': settings['rank'], **planned(settings)}
        if found['total'] < 12e9 or options.only:  # others take ten minutes or more
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                found['measured'] = pool.submit(grown, settings).result()
        return found
    measure_all('memory', cells, options.only, measure,
                'weights', 'state', 'gradients', 'activations', 'total', 'measured')


def largest_batch(settings, free, ranks):
    """(largest micro-batch over all ranks that fits into so many bytes of each, or 0; `planned` at the
    smallest; bytes it takes)."""
    def at(rows):
        return planned({**settings, 'batch_size': rows}, ranks)
    parts = math.lcm(settings['heads'] if settings['split'] else 1, ranks)  # such heads divide the batch
    one = at(parts)
    if one['total'] > free:
        return 0, one, one['total']
    # the optimizer's step makes the peak of small batches; then it grows along a line with activations
    rows = -(-8192 // settings.get('block_size', 256) // parts) * parts
    low, high = at(rows)['total'], at(2 * rows)['total']
    slope = (high - low) / rows
    fits = max(int(rows + (free - low) // slope) // parts, 1) * parts
    return fits, one, max(one['total'], low + (fits - rows) * slope)


def plan(words, budget, ranks=1):
    """
    Which methods, dtypes and batch sizes of a run fit on a card, or on each of so many; computes nothing,
    needs no GPU. With shard=True each holds its part; else what DDP itself sends and holds is left out.

    words: config files and --key=value, as for the scripts; budget: the card's memory, such as 12GiB. Files
    of config/methods are the methods to plan; without any it is all with which the run goes.
    """
    size = re.fullmatch(r'([\d.e-]+)(GiB|GB|MiB)', budget)
    if not size:
        config.fail(f'--budget={budget} is no number with a unit: write --budget=12GiB or --budget=12GB')
    if ranks > 1 and torch.__version__ < (2, 13):
        config.fail(f'--ranks wants the fake tensors of torch 2.13, and this is {torch.__version__}')
    # CUDA itself, and what its allocator cannot reuse, want about 1 GB
    free = float(size[1]) * {'GiB': 2**30, 'GB': 10**9, 'MiB': 2**20}[size[2]] - 10**9
    methods = [word for word in words if Path(word).resolve().parent.name == 'methods']
    words = [word for word in words if word not in methods]
    every = sorted(HERE.glob('config/methods/*.py'), key=lambda path: (path.stem != 'full', path.stem))
    methods = methods or list(map(str, every))
    # of files that are not there config.load says so
    text = ''.join(Path(word).read_text(encoding='utf-8') for word in words if os.path.isfile(word))
    script = re.search(r'\btrain_(gpt|llama|vit)\b', text)
    if text and not script:
        config.fail(f"{' '.join(words)} does not say whose it is: write '# python train_gpt.py FILE' (or "
                    'train_llama.py, train_vit.py) into its first lines')
    known = sys.modules[script[0] if script else 'train_gpt'].defaults
    for path in methods:
        try:
            with config.refusals(), mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
                settings = config.load({}, known, [*words, path, '--learning_rate=1'])  # any will do
                settings.update(device='cpu', dtype='bfloat16')
                with watched():
                    whole = stepper({**settings, 'lowrank': '', 'optimizer': 'adamw'}, ranks=1)[0].model
                settings['n_layer'] = len(whole.blocks)
                found = {dtype: largest_batch({**settings, 'param_dtype': dtype}, free, ranks)
                         for dtype in ('float32', 'bfloat16')}
        except SystemExit:
            if path == methods[0]:
                raise
            continue  # it has said why
        if path == methods[0]:
            what = f"sequences of {settings['block_size']}" if 'block_size' in settings else 'images'
            print(f"{lowrank.count_parameters(whole)['total'] / 1e6:,.0f}M parameters, {what}, "
                  f'{ranks} x {budget}: the largest micro-batch that fits, and GB\nof a card with it, 1 GB '
                  'left to CUDA itself and what its allocator cannot reuse;\nthen GB with the smallest, '
                  "its parts, and what a card sends for it; and what rank 0's host gathers to save")
            row = table('method', 'weights in', 'batch', 'all', 'smallest', 'weights', 'state', 'gradients',
                        'the rest', 'sent', 'to save', wide=16)
        for dtype, (fits, one, total) in found.items():
            row(Path(path).stem, dtype, fits or 'none', *(x / 1e9 for x in (total, *(one[key] for key in (
                'total', 'weights', 'state', 'gradients', 'activations', 'sent', 'host')))))


# -----------------------------------------------------------------------------
# communication


def sent(settings, workers, steps):
    """(bytes that one of so many workers sends in each step, by a ring; those of its optimizer's state, but
    for what it keeps of its own heads)."""
    with fake_ranks(workers), watched() as watch:
        run, step = stepper(settings, workers)
        counts = []
        for _ in range(steps):
            watch.start()
            step()
            counts.append(on_the_wire(watch.sent, workers) + (0 if settings['shard'] else run.ddp_bytes))
    own = per_rank_tensors(lowrank.lowrank_layers(run.model))
    mine = [x for p in own for x in run.optimizer.state[p].values() if torch.is_tensor(x)]
    return counts, run.optimizer.state_bytes() - sum(x.nbytes for x in mine)


def sent_a_step(settings, workers):
    """
    Bytes of one of so many workers: `wire`, what it sends a step by a ring, and `shared`, of the optimizer's
    state what is not of its own heads. Counted in short periods: a merge every three steps, a new basis of
    each layer every twelve; the last step has ended all sketches.
    """
    T, every = settings['merge_every'], settings['basis_every']
    short = {**settings, 'merge_every': min(T, 3), 'basis_every': 12, 'batch_size': workers}
    counts, shared = sent(short, workers, 25)
    put = counts[-12:]
    step, period = put[3], sum(put[2:5])  # from one merge to the next, without new bases
    return dict(shared=shared, wire=step + (period - 3 * step) / max(T, 1) + (sum(put) - 4 * period) / every)


def communication(options):
    sent_by(communication_cells(), options)


def sent_by(cells, options):
    """Keeps what cells send where assets/communication.jsonl lacks it."""
    def measure(about, settings):
        found = of_depth(functools.partial(sent_a_step, workers=about['workers']), settings, 1)
        return {key: round(x) for key, x in found.items()}
    measure_all('communication', cells, options.only, measure, 'shared', 'wire')


if __name__ == '__main__':
    with config.refusals():
        globals()[options.bench](options)
