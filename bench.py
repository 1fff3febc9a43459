"""
Checks what the README claims, on any machine:

$ python bench.py heads       time of multi-head LoRA, all heads at once against one after the other and full rank
$ python bench.py speed       GaLore's step, bases and projected backward, against galore-torch (where it is installed)
$ python bench.py memory      peak memory by method: real runs, and planned ones for what does not fit or has no GPU here
$ python bench.py vit         ViT-B and ViT-L at 224 pixels: parameters, memory and time of LoRA and GaLore against full
$ python bench.py communication  bytes a step of each method on several workers, and what they cost on slow links
$ python bench.py quality     validation loss of each method on a small GPT; finished cells are not run again
$ python bench.py readme      renews the table of these losses in README.md

Times are medians of interleaved runs, as ratios within one process. Cells go to assets/NAME.jsonl.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
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
from galore import GaLoreAdamW, make_optimizer, param_groups, state_bytes, take_bases
from lowrank import MHLoRALinear, apply_mhlora, clip_gradients, count_parameters, freeze_rest
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


def keep(name, cells):
    """Appends measured cells to assets/NAME.jsonl, each with torch's version and today's date."""
    with open(f'{HERE}/assets/{name}.jsonl', 'a', encoding='utf-8') as file:
        for cell in cells:
            file.write(json.dumps({**cell, 'torch': torch.__version__, 'date': time.strftime('%Y-%m-%d')}) + '\n')


def kept(name):
    """The cells that assets/NAME.jsonl holds."""
    if not os.path.exists(f'{HERE}/assets/{name}.jsonl'):
        return []
    with open(f'{HERE}/assets/{name}.jsonl', encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def run_cells(name, words, script, base, cells, results):
    """
    Trains what assets/NAME.jsonl lacks of the cells (method, settings) with a script, each on one thread in a fresh folder.

    words: the command line. base: settings that all cells share; a cell's 'ranks' is the number of torchrun's processes.
    results(records): what to keep of the lines of a run's log.jsonl, a dict, besides its last validation loss, which is
    None where the run diverged.
    """
    options = argparse.ArgumentParser(f'bench.py {name}')
    options.add_argument('--jobs', type=int, default=2, help='runs side by side, each on one thread')
    options.add_argument('--methods', nargs='+', help='only these')
    options = options.parse_args(words)
    done = [(cell['method'], cell['settings']) for cell in kept(name)]
    todo = [cell for cell in cells if cell not in done and cell[0] in (options.methods or cell[0])]
    start, finished = time.time(), []

    def run(cell):
        method, changes = cell
        with tempfile.TemporaryDirectory() as folder:
            settings = {**base, 'min_lr': changes['learning_rate'] / 10, **changes, 'out_dir': folder}
            ranks = settings.pop('ranks', 1)
            launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
            ran = subprocess.run([sys.executable, *launch, script, *(f'--{key}={x}' for key, x in settings.items())],
                                 cwd=HERE, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
            said = next((line for line in reversed(ran.stderr.splitlines()) if 'rror: ' in line), ran.stderr[-300:])
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
    cells = []
    for dtype in ('float32', 'bfloat16'):
        for heads, rank in ((1, 4), (4, 1), (4, 4), (16, 4), (4, 16)):
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
            print(f"{dtype:10}{heads:6}{rank:6}{cell['dense_ms']:10.1f}{cell['parallel_to_loop']:15.2f}"
                  f"{cell['parallel_to_dense']:15.2f}", flush=True)
            cells.append(cell)
    return cells


def heads_model(device, repeats):
    """A training step of GPT-2 124M, 4 x 512 tokens, AdamW included: heads against full rank."""
    print('\nGPT-2 124M, 4 x 512 tokens, whole step with AdamW')
    print(f"{'dtype':10}{'heads on':16}{'compute':12}{'trainable':>12}{'s/step':>8}{'to full rank':>14}")
    cells = []
    for dtype in ('float32', 'bfloat16'):
        for targets in ('attn', 'attn,mlp', 'attn,mlp,logit'):
            functions, trainable = {}, {}
            for compute in ('full', 'parallel', 'sequential'):
                model = GPT(GPTConfig(block_size=512)).to(device)
                if compute != 'full':
                    apply_mhlora(model, targets.split(','), heads=4, rank=4, head_compute=compute)
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
                tokens = torch.randint(50257, (4, 512), device=device)

                def step(model=model, optimizer=optimizer):
                    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32'):
                        loss = model(tokens, tokens)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                functions[compute], trainable[compute] = step, count_parameters(model)['trainable']
            seconds = interleaved(functions, repeats)
            for compute in functions:
                cell = dict(bench='heads_model', dtype=dtype, targets=targets, compute=compute, heads=4, rank=4,
                            trainable=trainable[compute], seconds=statistics.median(seconds[compute]),
                            to_full=ratio(seconds, compute, 'full'))
                print(f"{dtype:10}{targets:16}{compute:12}{cell['trainable']:12,}{cell['seconds']:8.2f}"
                      f"{cell['to_full']:14.2f}", flush=True)
                cells.append(cell)
    return cells


def heads(words):
    options = argparse.ArgumentParser('bench.py heads')
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--repeats', type=int, default=5)
    options.add_argument('--only', choices=['layer', 'model'])
    options = options.parse_args(words)
    config.keep_freed_memory()  # as the scripts do on a CPU
    cells = []
    if options.only != 'model':
        cells += heads_layer(options.device, 4 * options.repeats)
    if options.only != 'layer':
        cells += heads_model(options.device, options.repeats)
    keep('heads', cells)


# -----------------------------------------------------------------------------
# speed

SHAPE, RANK = (2048, 5461), 512  # an MLP matrix of LLaMA-1B at a quarter of its width


def speed_step(device, repeats):
    """A step of one matrix without a refresh: our optimizer against galore-torch's."""
    try:
        from galore_torch import GaLoreAdamW as Reference
    except ImportError:
        print('galore-torch is not installed, so the step is not compared (pip install galore-torch)')
        return []
    cells = []
    for dtype in ('float32', 'bfloat16'):
        functions = {}
        for name, make, more in (('galore-torch', Reference, {}), ('ours', GaLoreAdamW, {'basis': 'random'}),
                                 ('ours, fira', GaLoreAdamW, {'basis': 'random', 'rule': 'fira'})):
            weight = nn.Parameter(0.02 * torch.randn(SHAPE, device=device).to(getattr(torch, dtype)))
            weight.grad = torch.randn_like(weight)
            functions[name] = make([dict(params=[weight], rank=RANK, update_proj_gap=10**9, scale=0.25, proj_type='std',
                                         **more)], lr=0.01).step
        projected = nn.Parameter(0.02 * torch.randn(SHAPE, device=device).to(getattr(torch, dtype)))
        mine = GaLoreAdamW([dict(params=[projected], rank=RANK, update_proj_gap=10**9, basis='random')], lr=0.01)
        mine.receive(projected, torch.randn(8, SHAPE[0], device=device).to(projected.dtype),
                     torch.randn(8, SHAPE[1], device=device).to(projected.dtype))
        mine.step()
        R = torch.randn_like(mine.state[projected]['exp_avg'])

        def update(mine=mine, projected=projected, R=R):
            mine.received[projected] = R  # as the projected backward leaves it; the step uses it up
            mine.step()
        functions['ours, after the projected backward'] = update
        P, weight = galore.orthonormal(torch.randn(SHAPE[0], RANK, device=device)).to(weight.dtype), weight.detach()
        functions['two plain products'] = lambda: weight.addmm_(P, P.mT @ weight, alpha=-1e-9)
        seconds = interleaved(functions, repeats)
        for name in functions:
            cell = dict(bench='speed_step', dtype=dtype, optimizer=name, ms=1000 * statistics.median(seconds[name]),
                        to_galore_torch=ratio(seconds, name, 'galore-torch'))
            print(f"step {dtype:10}{name:36}{cell['ms']:8.1f} ms{cell['to_galore_torch']:8.2f} of galore-torch",
                  flush=True)
            cells.append(cell)
    return cells


def speed_refresh(device, repeats):
    """A new basis: subspace iteration, from a sketch (cold) and from the old basis (warm), against the SVD."""
    cells = []
    for dtype in ('float32', 'bfloat16'):
        G = torch.randn(SHAPE, device=device).to(getattr(torch, dtype))
        old = take_bases(G, RANK, True, False, 'power')
        seconds = interleaved({'svd': lambda: take_bases(G, RANK, True, False, 'svd'),
                               'power, cold': lambda: take_bases(G, RANK, True, False, 'power'),
                               'power, warm': lambda: take_bases(G, RANK, True, False, 'power', old)}, repeats)
        for name in seconds:
            cell = dict(bench='speed_refresh', dtype=dtype, basis=name, ms=1000 * statistics.median(seconds[name]),
                        to_svd=ratio(seconds, name, 'svd'))
            print(f"refresh {dtype:10}{name:15}{cell['ms']:9.1f} ms{cell['to_svd']:8.3f} of the SVD", flush=True)
            cells.append(cell)
    return cells


def speed_energy(device, steps=(1, 100, 300)):
    """Part of the gradient's energy |P^T G|^2 that `power` captures of what the SVD captures, for a GPT in training."""
    torch.manual_seed(0)
    data = Tokens('stdlib', 'train', 128, f'{HERE}/data')
    model = GPT(GPTConfig(128, data.vocab_size, 4, 4, 256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    matrices = {name: p for name, p in model.named_parameters() if '.attn.' in name or '.mlp.' in name}
    matrices = {name: p for name, p in matrices.items() if p.dim() == 2}
    warm, cells = {}, []
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
                cells.append(dict(bench='speed_energy', step=step, rank=rank, start=kind, least_of_svd=value))
                print(f'energy, step {step:3}, rank {rank:2} of width 256, {kind}: at least {value:.4f} of the SVD',
                      flush=True)
        optimizer.step()
    return cells


def speed_lean(device, repeats):
    """A whole training step of LLaMA in bfloat16, 8 x 256 tokens: full rank with fused AdamW, GaLore with the full and
    with the projected backward. New bases for all matrices are a step of their own here, and a 200th of it is added."""
    cells = []
    cases = (('LLaMA 60M', '60m', None, 32000, 128), ('4 layers of LLaMA 350M, no output', '350m', 4, 32, 256),
             ('4 layers of LLaMA 350M, no output', '350m', 4, 32, 128))
    for case, size, layers, vocabulary, rank in cases:
        width, depth, many, hidden = SIZES[size]
        shape = LlamaConfig(256, vocabulary, width, layers or depth, many, hidden, many)
        tokens, functions = torch.randint(32, (8, 256), device=device), {}
        for name in ('full rank', 'GaLore', 'GaLore, projected', 'GaLore, projected, all bases new'):
            model = Llama(shape).to(device, torch.bfloat16)
            if name == 'full rank':
                optimizer = torch.optim.AdamW(param_groups(model), lr=1e-4, fused=True)
            else:
                gap = 1 if 'new' in name else 10**9
                optimizer = GaLoreAdamW(param_groups(model, rank=rank, gap=gap), lr=1e-4)
            if 'projected' in name:
                galore.project_backward(model, optimizer)

            def step(model=model, optimizer=optimizer):
                loss = model(tokens, tokens) if layers is None else model.hidden(tokens).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            functions[name] = step
        seconds = interleaved(functions, repeats)
        new = ratio(seconds, 'GaLore, projected, all bases new', 'full rank')
        for name in ('full rank', 'GaLore', 'GaLore, projected'):
            steady = ratio(seconds, name, 'full rank')
            cell = dict(bench='speed_lean', case=case, rank=rank, method=name, seconds=statistics.median(seconds[name]),
                        to_full=steady, to_full_with_bases=steady + (new - steady) / 200 * (name != 'full rank'))
            print(f"{case:34} rank {rank:4} {name:18}{cell['seconds']:7.3f} s/step{steady:7.3f} of full rank, "
                  f"{cell['to_full_with_bases']:6.3f} with new bases every 200 steps", flush=True)
            cells.append(cell)
    return cells


def speed_nanogpt(path, repeats):
    """A step of GPT-2 124M at full rank, 4 x 512 tokens, on the CPU: ours against nanoGPT's model and optimizer."""
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
    cells = []
    for name in functions:
        cell = dict(bench='speed_nanogpt', loop=name, seconds=statistics.median(seconds[name]),
                    tokens_per_s_to_nanogpt=ratio(seconds, 'nanoGPT', name))
        print(f"{name:16}{cell['seconds']:7.2f} s/step{cell['tokens_per_s_to_nanogpt']:7.2f} of nanoGPT's tokens/s",
              flush=True)
        cells.append(cell)
    return cells


def speed(words):
    # without keep_freed_memory: galore-torch and nanoGPT are measured as their users have them
    options = argparse.ArgumentParser('bench.py speed')
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--repeats', type=int, default=12)
    options.add_argument('--only', choices=['step', 'refresh', 'energy', 'lean'])
    options.add_argument('--nanogpt', help='a checkout of karpathy/nanoGPT: compare with its step, and only that')
    options = options.parse_args(words)
    if options.nanogpt:
        keep('speed', speed_nanogpt(options.nanogpt, options.repeats))
    if options.only in (None, 'step') and not options.nanogpt:
        keep('speed', speed_step(options.device, options.repeats))
    if options.only in (None, 'refresh') and not options.nanogpt:
        keep('speed', speed_refresh(options.device, 2))
    if options.only in (None, 'energy') and not options.nanogpt:
        keep('speed', speed_energy(options.device))
    if options.only in (None, 'lean') and not options.nanogpt:
        config.keep_freed_memory()  # as the scripts do on a CPU
        keep('speed', speed_lean(options.device, max(3, options.repeats // 2)))


# -----------------------------------------------------------------------------
# memory

LLAMA_METHODS = {  # of the memory table; the last one is what llama_1b_galore_lean.py does
    'full rank': dict(optimizer='adamw'),
    'GaLore': dict(optimizer='galore'),
    'GaLore, projected': dict(optimizer='galore', galore_backward='projected'),
    'GaLore, projected, per layer': dict(optimizer='galore', galore_backward='projected', per_layer=True),
    'the same, 8 bits, checkpointing': dict(optimizer='galore', galore_backward='projected', per_layer=True,
                                            state_bits=8, checkpointing=True)}


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
        return train_vit.create({**shape, 'n_layer': layers or s['n_layer']}, 9)
    return GPT(GPTConfig(s['block_size'], s['vocab_size'] or 50257, layers or s['n_layer'], s['n_head'], s['n_embd'],
                         s['dropout'], s['bias']))


def trainer(model, settings):
    """(optimizer, step) of a model: a script's heads, optimizer and step, on made-up data."""
    s, vit, steps = settings, 'img_size' in settings, itertools.count()
    if s['lowrank']:
        apply_mhlora(model, s['lowrank'].split(','), s['heads'], s['rank'], s['alpha'], s['head_input'],
                     s['head_compute'], s['merge_reset'] or not s['merge_every'], head_basis=s['head_basis'])
    if vit and (s['train'] == 'classifier' or s['train'] == 'auto' and s['lowrank']):
        freeze_rest(model)
    optimizer = make_optimizer(model, s)
    if vit:
        x = torch.zeros(s['batch_size'], 3, *model.patch_embed.img_size, dtype=getattr(torch, s['param_dtype']))
        y = torch.zeros(s['batch_size'], dtype=torch.int64)
    else:
        x = y = torch.zeros(s['batch_size'], s['block_size'], dtype=torch.int64)

    def step():
        number = next(steps)
        # with several micro-steps gradients are held in the second one; the first step, without moments, is no peak
        micro_steps = min(2 if number else 1, s['gradient_accumulation_steps'])
        if s['head_basis'] == 'gradient' and number % s['merge_every'] == 0:
            galore.renew_bases(model, optimizer, number, s['merge_every'], s['basis_from'] == 'shared')
        for micro_step in range(micro_steps):
            optimizer.last_micro_batch = micro_step == micro_steps - 1
            with torch.autocast('cpu', torch.bfloat16, enabled=s['dtype'] != s['param_dtype']):
                loss = F.cross_entropy(model(x).float(), y) if vit else model(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, step


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
    """Peak bytes of two training steps by category, without computing anything: fake tensors. layers: None: as deep as
    the settings say."""
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
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        state = state_bytes(optimizer)
    return dict(weights=weights, state=state, gradients=peak.gradients,
                activations=peak.bytes - weights - state - peak.gradients, total=peak.bytes)


def extrapolated(settings, layers, batch_size):
    """`planned` for a deep model from two and three layers: every category is linear in their number. (A shallow model
    may peak at another moment than a deep one; at 350M and 1B the totals agree with real runs.)"""
    two, three = (planned(settings, shallow, batch_size) for shallow in (2, 3))
    return {key: two[key] + (layers - 2) * (three[key] - two[key]) for key in two}


def resident_peak():
    """Peak resident bytes of this process (VmHWM: unlike ru_maxrss it knows nothing of the parent)."""
    with open('/proc/self/status', encoding='utf-8') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM'))


def memory_real(settings, steps=3):
    """Growth of the peak resident size over training steps, in a fresh process that gives freed memory back at once."""
    code = ('import ctypes, json, sys, time, bench, torch; ctypes.CDLL(None).mallopt(-3, 1 << 18)\n'  # M_MMAP_THRESHOLD
            'settings = json.loads(sys.argv[1]); before = bench.resident_peak()\n'
            'with torch.device("meta"): model = bench.Llama(bench.llama_shape(settings))\n'
            'model.to(getattr(torch, settings["param_dtype"])).to_empty(device="cpu").init_weights()\n'
            'start = time.time(); step = bench.trainer(model, settings)[1]\n'
            'for _ in range(int(sys.argv[2])): step()\n'
            'print(bench.resident_peak() - before, time.time() - start)')
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
    done = {(cell['size'], cell['method'], cell['rank']): cell for cell in kept('memory')}
    for size in options.sizes:
        width, depth = SIZES[size][:2]
        full = None
        for method, changes in list(LLAMA_METHODS.items())[-1 if options.lean else 0:]:
            rank = 0 if method == 'full rank' else width // 4 if '8 bits' in method else width // 2
            settings = {**base, **changes, 'size': size, 'galore_rank': rank or 1}
            cell = done.get((size, method, rank))
            if cell is None:
                cell = dict(bench='memory', size=size, method=method, rank=rank, **extrapolated(settings, depth, 1))
                if size in options.real:
                    cell['measured'], cell['seconds'] = memory_real(settings)
                keep('memory', [cell])
            if method == 'full rank':
                full = cell
            numbers = ''.join(f'{cell[key] / 1e9:{wide}.2f}' for key, wide in
                              (('weights', 9), ('state', 8), ('gradients', 11), ('activations', 13), ('total', 9)))
            of_full = f"{cell['total'] / full['total']:9.2f}" if full else 9 * ' '
            real = f"{cell['measured'] / 1e9:10.2f}" if 'measured' in cell else ''
            real += f"{cell['measured'] / full['measured']:9.2f}" if real and 'measured' in (full or {}) else ''
            print(f'{size:6}{method:34}{rank:6}{numbers}{of_full}{real}', flush=True)
            if options.lean and 'measured' in cell:
                print(f"three steps, the first bases included: {cell['seconds']:.0f} s")
    draw_memory()


def draw_memory():
    """assets/memory.png: peak memory of LLaMA by category and method, and the measured total as a line."""
    from matplotlib.figure import Figure
    cells = kept('memory')
    sizes = list(dict.fromkeys(cell['size'] for cell in cells))
    figure = Figure((3.1 * len(sizes), 3.6), layout='constrained')
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes):
        order = list(LLAMA_METHODS)
        mine = sorted((cell for cell in cells if cell['size'] == size), key=lambda cell: order.index(cell['method']))
        names = [cell['method'].replace(', ', ',\n').replace('the same', 'all that') for cell in mine]
        left = [0.0] * len(mine)
        for key, color, name in (('weights', '#4c72b0', 'weights'), ('state', '#dd8452', 'optimizer state'),
                                 ('gradients', '#c44e52', 'gradients'),
                                 ('activations', '#8c8c8c', 'activations and buffers')):
            values = [cell[key] / 1e9 for cell in mine]
            axes.barh(names, values, left=left, color=color, label=name)
            left = [a + b for a, b in zip(left, values)]
        for i, cell in enumerate(mine):
            if 'measured' in cell:
                axes.plot([cell['measured'] / 1e9] * 2, [i - 0.4, i + 0.4], color='black', lw=2,
                          label='measured' if not i else None)
        axes.invert_yaxis()
        axes.set(title=f'LLaMA {size.upper()}', xlabel='peak memory, GB')
        first = axes.get_subplotspec().is_first_col()
        axes.tick_params('y', labelsize=7, labelleft=first or len(mine) < len(LLAMA_METHODS))
    figure.legend(*axes.figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, fontsize=8)
    figure.savefig(f'{HERE}/assets/memory.png', dpi=130)


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
    if not s['lowrank'] and 'size' not in s:
        s = {**plain, 'optimizer': 'adamw', 'lowrank': 'attn', 'heads': 1 if 'img_size' in s else 4, 'rank': 4}
    if s['lowrank']:
        kind = ('GaLoLTE' if s['head_basis'] == 'gradient' else 'LTE' if s['head_input'] == 'split' else
                'ReLoRA' if s['merge_reset'] else 'LoRA' if s['heads'] == 1 else 'MHLoRA')
        methods[f"{kind}, {s['heads']} head{'s' * (s['heads'] > 1)} of rank {s['rank']}"] = s
    return methods


def plan(path, budget):
    """Which methods, dtypes and batch sizes of a config fit on a card of this size; computes nothing, needs no GPU."""
    units = {'GiB': 2**30, 'GB': 10**9, 'MiB': 2**20}
    unit = next((unit for unit in units if budget.endswith(unit)), None)
    if unit is None:
        config.fail(f"--budget={budget!r} has no unit: write it as 12GiB or 12GB")
    try:
        room = float(budget.removesuffix(unit)) * units[unit]
    except ValueError:
        config.fail(f'--budget={budget!r} is no number with a unit: write it as 12GiB or 12GB')
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
              'micro-batch that fits one process')
        print('(what is allocated: CUDA itself, and what its allocator cannot reuse, want about 1 GB more)')
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
               'GaLore, rank 64, projected': dict(optimizer='galore', galore_rank=64, galore_backward='projected')}


def vit_settings(name, method, batch_size):
    """The settings of train_vit.py for one of VIT_METHODS, computing in bfloat16."""
    import train_vit
    return {**train_vit.defaults, 'model': name, 'batch_size': batch_size, 'dtype': 'bfloat16', 'grad_clip': 0.0,
            **VIT_METHODS[method]}


def vit_trainer(name, method, batch_size):
    """(model, optimizer, step) of a timm ViT at 224 pixels and nine classes."""
    settings = vit_settings(name, method, batch_size)
    model = model_of(settings)
    return (model, *trainer(model, settings))


def vit_real(name, method, batch_size):
    """Growth of the peak resident size over three steps in a fresh process, bytes."""
    code = ('import ctypes, sys, bench, train_vit; ctypes.CDLL(None).mallopt(-3, 1 << 18); before = bench.resident_peak()\n'
            'step = bench.vit_trainer(sys.argv[1], sys.argv[2], int(sys.argv[3]))[2]\n'
            'for _ in range(3): step()\n'
            'print(bench.resident_peak() - before)')
    ran = subprocess.run([sys.executable, '-c', code, name, method, str(batch_size)], cwd=HERE, check=True,
                         stdout=subprocess.PIPE, text=True)
    return int(ran.stdout)


def vit(words):
    options = argparse.ArgumentParser('bench.py vit')
    options.add_argument('--models', nargs='+', default=['vit_base_patch16_224', 'vit_large_patch16_224'])
    options.add_argument('--repeats', type=int, default=3)
    options.add_argument('--batch_size', type=int, default=4, help='of what is run here; 32 is planned besides')
    options = options.parse_args(words)
    print(f'224 pixels, bfloat16 autocast, LoRA on qkv and proj with the classifier; {options.batch_size} images a step '
          'are run, 32 planned; GB')
    print(f"{'model':23}{'method':28}{'trainable':>12}{'planned, 32':>12}{'of full':>9}{'planned':>9}{'measured':>9}"
          f"{'s/step':>8}{'of full':>9}")
    for name in options.models:
        trainers = {method: vit_trainer(name, method, options.batch_size) for method in VIT_METHODS}
        seconds = interleaved({method: trainer[2] for method, trainer in trainers.items()}, options.repeats)
        trainable = {method: count_parameters(trainer[0])['trainable'] for method, trainer in trainers.items()}
        del trainers
        full = None
        for method in VIT_METHODS:
            small, large = (planned(vit_settings(name, method, b), None, b)
                            for b in (options.batch_size, 32))
            cell = dict(bench='vit', model=name, method=method, trainable=trainable[method], planned_32=large['total'],
                        weights=large['weights'], state=large['state'], batch_size=options.batch_size,
                        planned=small['total'], measured=vit_real(name, method, options.batch_size),
                        seconds=statistics.median(seconds[method]), to_full=ratio(seconds, method, 'full fine-tuning'))
            full = full or cell
            keep('vit', [cell])
            print(f"{name:23}{method:28}{cell['trainable']:12,}{large['total'] / 1e9:12.2f}"
                  f"{large['total'] / full['planned_32']:9.2f}{small['total'] / 1e9:9.2f}{cell['measured'] / 1e9:9.2f}"
                  f"{cell['seconds']:8.2f}{cell['to_full']:9.2f}", flush=True)


# -----------------------------------------------------------------------------
# communication


def sent_bytes(shapes, others, method, rank, itemsize=4):
    """What one worker with one head puts into collectives, as `sync_bytes` in the log counts it: bytes (every step, at a
    merge, at a refresh of one matrix after the other). shapes: (m, n) of attention's and MLP's matrices; others: the number
    of all other parameters, averaged every step or, with sync='merge', in float32 at merges."""
    gradients, small = sum(m * n for m, n in shapes), sum(min(rank, m, n) * max(m, n) for m, n in shapes)
    factors = sum(min(rank, m, n) * (m + n) for m, n in shapes)
    return {'full rank or GaLore, DDP': ((gradients + others) * itemsize, 0, 0),
            'GaLore, projected': ((small + others) * itemsize, 0, (gradients - small) * itemsize),
            'LTE': (others * itemsize, 2 * factors * itemsize, 0),  # the factors, and as they were at the last merge
            "LTE, sync='merge'": (0, 2 * factors * itemsize + 4 * others, 0),
            'GaLoLTE': (others * itemsize, factors * itemsize, 0),
            "GaLoLTE, sync='merge'": (0, factors * itemsize + 4 * others, 0)}[method]


def communication(words):
    options = argparse.ArgumentParser('bench.py communication')
    options.add_argument('--compute', type=float, default=1.0, help='seconds that a step computes')
    options.add_argument('--workers', type=int, nargs='+', default=[4, 32, 256])
    options.add_argument('--merge_every', type=int, default=10)
    options.add_argument('--gap', type=int, default=200, help='steps between refreshes')
    options = options.parse_args(words)
    links = {'50 Mbit/s': 50e6 / 8, '1 Gbit/s': 1e9 / 8, '100 Gbit/s': 100e9 / 8}  # bytes a second of one worker
    print(f'bytes in bfloat16, rank = width / 4, merges every {options.merge_every} steps, bases every {options.gap}; a ring '
          'sends twice what is averaged, and what is gathered once for every other worker. A step that computes '
          f'{options.compute:g} s takes so many seconds on each link:')
    print(f"{'model':10}{'workers':>8}  {'method':28}{'put in, MB':>11}{'on the wire, MB':>16}"
          + ''.join(f'{link:>12}' for link in links))
    with torch.device('meta'):
        models = {'GPT-2 124M': GPT(GPTConfig()), **{f'LLaMA {size}': Llama(LlamaConfig(256, 32000, *(
            SIZES[size]), SIZES[size][2])) for size in ('1b', '7b')}}
    for name, model in models.items():
        shapes = [tuple(p.shape) for group in param_groups(model, rank=1) if 'rank' in group for p in group['params']]
        others = sum(p.numel() for p in model.parameters()) - sum(m * n for m, n in shapes)
        rank = min(min(shape) for shape in shapes) // 4
        for workers in options.workers:
            for method in ('full rank or GaLore, DDP', 'GaLore, projected', 'LTE', "LTE, sync='merge'", 'GaLoLTE',
                           "GaLoLTE, sync='merge'"):
                step, merging, refresh = sent_bytes(shapes, others, method, rank, 2)
                averaged = step + refresh / options.gap + (4 * others / options.merge_every if 'sync' in method else 0)
                gathered = (merging - (4 * others if 'sync' in method else 0)) / options.merge_every
                wire = 2 * averaged * (workers - 1) / workers + gathered * (workers - 1)
                print(f'{name:10}{workers:8}  {method:28}{(averaged + gathered) / 1e6:11.1f}{wire / 1e6:16.1f}'
                      + ''.join(f'{options.compute + wire / speed:12.2f}' for speed in links.values()), flush=True)


# -----------------------------------------------------------------------------
# quality

# A GPT of 3.3M parameters, 600 steps of 2,048 bytes of Python sources; each cell says only what it changes.
SCREEN = dict(dataset='stdlib', block_size=256, batch_size=8, n_layer=4, n_head=4, n_embd=256, max_iters=600,
              warmup_iters=60, eval_interval=600, eval_iters=40, log_interval=100, beta2=0.99, weight_decay=0.0,
              grad_clip=1.0, device='cpu', dtype='bfloat16')


def quality_cells():
    """(method, settings) of every cell of the screening."""
    def heads_on(count, rank, alpha, **more):
        return dict(lowrank='attn,mlp', heads=count, rank=rank, alpha=float(alpha), learning_rate=2e-3, **more)
    galore_64 = dict(optimizer='galore', galore_rank=64, galore_gap=50, beta2=0.999, learning_rate=2e-2)
    power = {**galore_64, 'galore_basis': 'power'}
    for lr in (2e-3, 1e-3, 4e-3):
        yield 'full rank', dict(learning_rate=lr)
    yield 'full rank', dict(learning_rate=2e-3, beta2=0.999)
    yield 'full rank', dict(learning_rate=2e-3, grad_clip=0.0)  # without it, larger rates do not learn
    yield 'GaLore', {**power, 'grad_clip': 0.0}
    yield 'GaLore', power
    for lr in (1e-2, 4e-2):
        yield 'GaLore', {**power, 'learning_rate': lr}
    for lr in (1e-2, 2e-2):
        yield 'GaLore', {**galore_64, 'galore_basis': 'svd', 'learning_rate': lr}
        yield 'GaLore', {**power, 'galore_moments': 'rotate', 'learning_rate': lr}
        yield 'GaLore', {**power, 'galore_rule': 'fira', 'learning_rate': lr}
    yield 'GaLore', {**power, 'galore_moments': 'reset'}
    yield 'GaLore', {**galore_64, 'galore_basis': 'random'}
    for rank in (16, 32, 128):
        yield 'GaLore', {**power, 'galore_rank': rank}
    lte = dict(lowrank='attn,mlp', heads=4, rank=64, head_input='split', head_basis='gradient', galore_basis='power',
               galore_moments='rotate', beta2=0.999, learning_rate=2e-2)
    yield 'GaLoLTE', {**lte, 'merge_every': 10, 'galore_gap': 50}
    yield 'GaLoLTE', {**lte, 'merge_every': 1, 'galore_gap': 50}
    yield 'GaLoLTE', {**lte, 'merge_every': 10, 'galore_gap': 50, 'galore_basis': 'sketch'}
    yield 'GaLoLTE', {**lte, 'merge_every': 10, 'galore_gap': 50, 'basis_from': 'shared'}
    yield 'GaLoLTE', {**lte, 'merge_every': 10, 'galore_gap': 50, 'galore_basis': 'sketch', 'learning_rate': 3e-2}
    yield 'GaLoLTE', {**lte, 'merge_every': 1, 'galore_gap': 50, 'galore_basis': 'sketch'}
    for seed in (1, 2):  # how much is noise
        yield 'full rank', dict(learning_rate=2e-3, seed=seed)
        yield 'GaLore', {**power, 'seed': seed}
    for rank, alpha in ((4, 4), (16, 16), (64, 64), (4, 16), (16, 64), (64, 256)):
        yield 'MHLoRA', heads_on(4, rank, alpha)
    for every in (1, 10, 50):
        yield 'LTE', heads_on(4, 16, 16, head_input='split', merge_every=every)
    yield 'LTE', heads_on(4, 16, 64, head_input='split', merge_every=10)
    for every in (50, 100):
        yield 'ReLoRA', heads_on(1, 64, 64, merge_every=every, merge_reset=True, rewarm_iters=5)


def quality(words):
    def results(records):
        last = next((record for record in reversed(records) if 'train_loss' in record), {})
        return {'steps': SCREEN['max_iters'], 'trainable_parameters': last.get('trainable_parameters'),
                'optimizer_state_bytes': last.get('optimizer_state_bytes'), 'ms_per_step_one_thread': last.get('dt_ms')}
    run_cells('quality', words, 'train_gpt.py', SCREEN, list(quality_cells()), results)


# -----------------------------------------------------------------------------
# README


def label(cell):
    """A cell's method and what it sets, in a few words."""
    s = cell['settings']
    heads, words = 'heads' in s, [cell['method']]
    if heads:
        words.append(f"{s['heads']} head{'s' * (s['heads'] > 1)} of rank {s['rank']}")
    for key, text, shown in (('alpha', 'alpha {:g}', True), ('galore_rank', 'rank {}', True), ('merge_every', 'T = {}', True),
                             ('galore_gap', 'bases every {}', heads), ('galore_basis', '{}', True),
                             ('basis_from', '{} bases', True), ('galore_moments', 'moments {}', not heads),
                             ('galore_rule', "{}'s rule", True), ('grad_clip', 'clipping at {:g}', True),
                             ('beta2', 'beta2 {:g}', cell['method'] == 'full rank'), ('seed', 'seed {}', True)):
        if key in s and shown:
            words.append(text.format(s[key]))
    return ', '.join([*words, f"lr {s['learning_rate']:g}"])


def readme(words):
    """Renews the table of the screened losses between the markers in README.md: the best five cells of each method."""
    cells = kept('quality')
    order = list(dict.fromkeys(method for method, _ in quality_cells()))
    cells.sort(key=lambda cell: (order.index(cell['method']), cell['val_loss'] or 9))
    dates = sorted({cell['date'] for cell in cells})
    lines = [f"Cells of {' to '.join(dates[::len(dates) - 1] if len(dates) > 1 else dates)}, torch {cells[0]['torch']}.", '',
             '| method | trainable | optimizer state | validation loss |', '|---|---|---|---|']
    for cell in [cell for method in order for cell in [cell for cell in cells if cell['method'] == method][:5]]:
        loss = 'diverged' if cell['val_loss'] is None else f"{cell['val_loss']:.3f}"
        numbers = ('', '') if cell['val_loss'] is None else (f"{cell['trainable_parameters'] / 1e6:.2f}M",
                                                             f"{cell['optimizer_state_bytes'] / 1e6:.1f} MB")
        lines.append(f'| {label(cell)} | {numbers[0]} | {numbers[1]} | {loss} |')
    with open(f'{HERE}/README.md', encoding='utf-8') as file:
        before, _, rest = file.read().partition('<!-- quality -->\n')
    with open(f'{HERE}/README.md', 'w', encoding='utf-8') as file:
        file.write('\n'.join([before + '<!-- quality -->', *lines, '<!-- end -->', rest.partition('<!-- end -->\n')[2]]))


if __name__ == '__main__':
    benches = {'heads': heads, 'speed': speed, 'memory': memory, 'vit': vit,
               'communication': communication, 'quality': quality, 'readme': readme}
    if len(sys.argv) < 2 or sys.argv[1] not in benches:
        print(f"usage: python bench.py {' | '.join(benches)} [options]", file=sys.stderr)
        raise SystemExit(2)
    benches[sys.argv[1]](sys.argv[2:])
