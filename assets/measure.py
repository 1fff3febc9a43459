"""
Trains what the tables and pictures of both README.md compare, and measures what it costs:

$ python assets/measure.py BENCH

A training becomes a line of assets/BENCH.jsonl as soon as it has ended, and is not run again.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config

BENCHES = {
    'screening': 'loss of each method on a small GPT, one setting changed at a time',
    'quality': 'loss of the finalists on a larger one, three seeds, and the time of a step',
    'sixteen': 'the same with weights in bfloat16, for three methods',
    'english': 'loss of some methods on a small LLaMA and English text',
    'longer': 'loss of some methods on the small GPT after four times as many steps',
    'smaller': 'loss of some methods on a GPT of a third of its size',
    'convergence': 'how fast LoRA and full rank adapt the ViT of config/vit_quickstart.py',
    'layers': 'loss and trainable parameters by the layers that have heads',
    'costs': 'time, memory, bytes sent of what is screened; bytes sent of quality and english'}


def options_of(argv):
    """The options of a command line."""
    lines = [f'{name:15}{what}' for name, what in BENCHES.items()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='\n'.join(lines))
    parser.add_argument('bench', choices=BENCHES, metavar='BENCH', help='one of those below')
    parser.add_argument('--only', default='', help='those whose words hold this')
    return parser.parse_args(argv or ['--help'])


if __name__ == '__main__':
    options = options_of(sys.argv[1:])
    print(f'{options.bench}: {BENCHES[options.bench]}', flush=True)

import torch

import bench
import train_gpt
import train_llama
import train_vit
from bench import PLAIN, measure_all, method, named, read_lines, time_steps, title
from prepare import ensure

# -----------------------------------------------------------------------------
# what is trained

# Trainings, {method: (its settings, [changes, each a training])}. First settings that they share.
# A GPT of 3.3M parameters, 600 steps of 2,048 bytes of Python sources:
SMALL = dict(
    dataset='stdlib', vocab_size=257, block_size=256, batch_size=8, n_layer=4, n_head=4, n_embd=256,
    max_iters=600, warmup_iters=60, eval_interval=600, eval_iters=40, log_interval=100, beta2=0.99,
    weight_decay=0.0, grad_clip=1.0, device='cpu', dtype='bfloat16')
SCREEN = {**train_gpt.defaults, **SMALL}
# The same of a LLaMA of 3.3M, on English: a dictionary, see assets/README.md
ENGLISH = {**train_llama.defaults, **SMALL, 'dataset': 'webster', 'n_mlp': 704,
           'gradient_accumulation_steps': 1}
# The GPT of 3.3M, four times as long:
LONGER = {**SCREEN, 'max_iters': 2400, 'warmup_iters': 240}
# One of 1.1M:
SMALLER = {**SCREEN, 'n_embd': 144}
LAYERS = {**SCREEN, 'max_iters': 500, 'warmup_iters': 50, 'eval_interval': 500}
# The finalists: 10.7M parameters, 1,000 steps of 1,024 bytes, all but the rate as the screening found best.
FINAL = {**SCREEN, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 128, 'max_iters': 1000,
         'warmup_iters': 100, 'eval_interval': 200}
# What config/vit_digits_adapt.py does, 20 epochs of 1,078 images, evaluated after each.
ADAPT = {**train_vit.defaults, **dict(
    init_from='out/vit_quickstart/best.pt', dataset='digits_shifted', batch_size=64, max_iters=337,
    model='vit_tiny_patch16_224', img_size=32, patch_size=8, n_layer=6, n_head=3, n_embd=96,
    eval_interval=17, log_interval=17, warmup_iters=20, min_lr=1e-5, device='cpu', dtype='float32')}

ONE, FOUR = (dict(lowrank='attn,mlp', heads=heads) for heads in (1, 4))
SPLIT = dict(**FOUR, split=True, merge_every=10)  # LTE
RELORA = dict(**ONE, merge_every=100, merge_reset=True, rewarm_iters=5)
BASES = dict(basis_every=50, beta2=0.999)
DROP_IN = dict(**BASES, **PLAIN)
FIRA = dict(DROP_IN, optimizer='fira')
APOLLO = dict(BASES, optimizer='apollo', basis='random')
LAYER = dict(**BASES, **ONE, factors='basis', merge_every=1, basis='sketch')
GALOLTE = dict(**BASES, **SPLIT, factors='basis', basis='sketch')
MUON_INSIDE, GALOLTE_MUON = (dict(those, optimizer='muon', scale=1.0) for those in (LAYER, GALOLTE))
OWN = dict(ranks=4, sync='merge')  # each worker has all that trains without heads for itself
LOCAL = dict(OWN, merge_every=10)
SLOW_LINKS = dict(GALOLTE_MUON, **OWN, sync_bits=2)
APART = dict(SLOW_LINKS, sync_moments=False)  # config/methods/galolte_2bit.py


def one_by_one(**values):
    """Changes of one setting each: to each of its values in turn."""
    return [{key: value} for key, those in values.items() for value in those]


def seeds(rate):
    """Two more seeds at a learning rate."""
    return [dict(learning_rate=rate, seed=seed) for seed in (1, 2)]


def rates(best, *others):
    """The best learning rate with three seeds, others with the first."""
    return [*(dict(learning_rate=rate, seed=1337) for rate in (best, *others)), *seeds(best)]


def at_rates(*rows):
    """Methods as below, of rows of a name, its settings, learning rates with three seeds, and others."""
    return {name: (shared, [*one_by_one(learning_rate=(*best, *others)), *sum(map(seeds, best), [])])
            for name, shared, best, *others in rows}


SCREENING = {
    'full rank': (dict(learning_rate=2e-3), [  # 4e-3 needs clipping; seeds: how much is noise
        {}, *one_by_one(learning_rate=(1e-3, 4e-3), beta2=(0.999,), grad_clip=(0.0,), seed=(1, 2))]),
    'GaLore, drop-in': (dict(DROP_IN, rank=64, learning_rate=2e-2), [
        {}, *one_by_one(learning_rate=(1e-2, 4e-2), grad_clip=(0.0,), basis=('random', 'svd'),
                        rank=(16, 32, 128)), dict(learning_rate=1e-2, basis='svd'), *seeds(2e-2)]),
    **at_rates(
        ('GaLore', dict(LAYER, rank=64), [2e-2], 1e-2, 4e-2),
        ('Fira', dict(FIRA, rank=64), [1e-2], 5e-3, 2e-2),
        ('APOLLO', dict(APOLLO, rank=64, scale=1.0), [2e-2], 5e-3, 1e-2, 4e-2),
        ('APOLLO-Mini', dict(APOLLO, rank=1, scale=128**0.5), [5e-3], 2.5e-3, 1e-2, 2e-2),
        ('SCALE', dict(optimizer='scale'), [5e-4], 2.5e-4, 1e-3, 2e-3),
        ('Muon', dict(optimizer='muon'), [8e-3], 1e-3, 2e-3, 4e-3, 1.6e-2),
        ('Muon, 8 bits', dict(optimizer='muon', state_bits=8), [], 8e-3),
        ('Muon, no momentum', dict(optimizer='muon', momentum=0.0), [1.6e-2, 8e-3, 4e-3], 3.2e-2),
        ('Muon, no momentum, 8 bits', dict(optimizer='muon', momentum=0.0, state_bits=8), [], 8e-3),
        ('Muon, lean', method('muon_lean'), [3.2e-2, 1.6e-2], 8e-3, 6.4e-2),
        ('GaLore, Muon', dict(MUON_INSIDE, rank=64), [8e-3], 2e-3, 4e-3, 1.6e-2),
        ('GaLore, Muon, no momentum', dict(MUON_INSIDE, momentum=0.0, rank=64), [3.2e-2, 1.6e-2, 8e-3],
         4e-3, 6.4e-2),
        ('GaLoLTE, Muon', dict(GALOLTE_MUON, rank=64), [8e-3], 4e-3, 1.6e-2),
        ('GaLoLTE, Muon, 2 bits', dict(GALOLTE_MUON, sync_bits=2, rank=64), [8e-3])),
    'GaLoLTE': (dict(GALOLTE, rank=64, learning_rate=2e-2), [
        {}, *one_by_one(sync_bits=(4, 2), seed=(1, 2), learning_rate=(1e-2, 4e-2))]),
    'GaLoLTE, Muon, on workers': (
        dict(SLOW_LINKS, rank=64, basis_every=100, learning_rate=8e-3),
        [dict(merge_every=T, sync_bits=bits) for T in (2, 10, 50) for bits in (32, 4, 2)]),
    "GaLoLTE, sync='merge'": (dict(GALOLTE, **OWN, rank=64), [
        dict(learning_rate=2e-2), dict(sync_bits=2, learning_rate=5e-3, scale=1.0)]),
    'MHLoRA': (dict(FOUR, rank=16, learning_rate=2e-3), [
        *(dict(rank=rank, alpha=times * rank) for times in (1.0, 4.0) for rank in (4, 16, 64)),
        *(dict(alpha=64.0, **change) for change in one_by_one(learning_rate=(1e-3, 4e-3), seed=(1, 2)))]),
    'LTE': (dict(SPLIT, rank=16, alpha=16.0, learning_rate=2e-3), [
        {}, *one_by_one(merge_every=(1, 50), alpha=(64.0,), learning_rate=(4e-3, 1e-3, 8e-3)),
        dict(rank=40, alpha=40.0, learning_rate=4e-3),  # GaLoLTE's memory
        *(dict(alpha=alpha, learning_rate=rate)
          for alpha, rate in ((64.0, 1e-3), (64.0, 5e-4), (4.0, 4e-3))), *seeds(4e-3)]),
    'ReLoRA': (dict(RELORA, rank=64, alpha=64.0, learning_rate=2e-3), [
        {}, *one_by_one(merge_every=(50,), learning_rate=(4e-3, 1e-3, 8e-3)), *seeds(4e-3)]),
    'local Muon, 2 bits': (dict(LOCAL, optimizer='muon', sync_bits=2, learning_rate=8e-3), [
        {}, *one_by_one(merge_every=(50,), learning_rate=(4e-3, 1.6e-2))]),
    'local AdamW': (dict(LOCAL, learning_rate=2e-3), [
        {}, *one_by_one(learning_rate=(4e-3, 1e-3), merge_every=(1, 50))])}
FINALISTS = {  # ranks are a quarter of the width in all
    'full rank': ({}, rates(1e-3, 5e-4, 2e-3)),
    'GaLore': (dict(LAYER, rank=96), rates(5e-3)),
    'GaLore, drop-in': (dict(DROP_IN, rank=96), rates(5e-3, 2.5e-3, 1e-2, 2e-2)),
    'GaLoLTE': (dict(GALOLTE, rank=96), rates(1.4e-2, 7e-3, 1e-2)),
    'ReLoRA': (dict(RELORA, rank=96, alpha=96.0), rates(2e-3, 4e-3, 1e-3)),
    'MHLoRA': (dict(FOUR, rank=24, alpha=96.0), rates(5e-4, 2.5e-4, 1e-3, 2e-3)),
    'LTE': (dict(SPLIT, rank=24, alpha=24.0), rates(2e-3, 4e-3, 1e-3)),
    'Fira': (dict(FIRA, rank=96), rates(1e-2)[:1]),
    'Muon': (dict(optimizer='muon'), rates(4e-3, 2e-3, 8e-3)),
    'GaLore, Muon': (dict(MUON_INSIDE, rank=96), rates(4e-3, 2e-3, 8e-3, 1.6e-2)),
    'GaLoLTE, 2 bits': (dict(GALOLTE, **OWN, sync_bits=2, rank=96), rates(1.4e-2)[:1]),
    'GaLoLTE, Muon, 2 bits': (dict(SLOW_LINKS, rank=96), rates(8e-3)),
    'GaLoLTE, Muon, 2 bits, rarely': (
        dict(SLOW_LINKS, rank=96, basis_every=100, learning_rate=8e-3, seed=1337),
        one_by_one(merge_every=(50, 20))),
    'GaLoLTE, Muon, 2 bits, moments apart': (dict(APART, rank=96, basis_every=100), rates(8e-3, 4e-3)),
    'GaLoLTE, Muon, 2 bits, moments apart, rarely': (
        dict(APART, rank=96, merge_every=20, basis_every=200), rates(8e-3, 4e-3)),
    'local AdamW': (LOCAL, rates(1e-3, 5e-4, 2e-3)),
    'local Muon, 2 bits': (dict(LOCAL, optimizer='muon', sync_bits=2), rates(4e-3)[:1]),
    'Muon, lean': (method('muon_lean'), rates(1.6e-2, 8e-3, 3.2e-2))}
SIXTEEN = {name: ({**FINALISTS[name][0], 'param_dtype': 'bfloat16'}, rates(rate))
           for name, rate in (('full rank', 1e-3), ('GaLore', 5e-3), ('LTE', 2e-3))}
ON_ENGLISH = at_rates(
    ('full rank', {}, [1e-3], 5e-4, 2e-3),
    ('GaLore', dict(LAYER, rank=64), [1e-2], 2e-2, 4e-2),
    ('Muon', dict(optimizer='muon'), [4e-3], 2e-3, 8e-3),
    ('GaLore, Muon', dict(MUON_INSIDE, rank=64), [4e-3], 8e-3, 1.6e-2),
    ('Muon, lean', method('muon_lean'), [1.6e-2], 8e-3, 3.2e-2),
    ('full rank, 16 bits', dict(param_dtype='bfloat16'), [], 2e-3),
    ('GaLore, 16 bits', dict(LAYER, rank=64, param_dtype='bfloat16'), [], 2e-2),
    ('LTE', dict(SPLIT, rank=16, alpha=16.0), [4e-3], 2e-3, 8e-3))
FOR_LONGER = at_rates(
    ('full rank', {}, [2e-3], 1e-3, 4e-3),
    ('GaLore', dict(LAYER, rank=64), [1e-2], 5e-3, 2e-2),
    ('Muon', dict(optimizer='muon'), [4e-3], 2e-3, 8e-3),
    ('GaLore, Muon', dict(MUON_INSIDE, rank=64), [4e-3], 2e-3, 8e-3),
    ('Muon, lean', method('muon_lean'), [1.6e-2], 4e-3, 8e-3))
FOR_SMALLER = at_rates(
    ('full rank', {}, [2e-3], 1e-3, 4e-3),
    ('GaLore', dict(LAYER, rank=36), [4e-2], 1e-2, 2e-2, 8e-2),
    ('Muon', dict(optimizer='muon'), [1.6e-2], 8e-3, 3.2e-2),
    ('GaLore, Muon', dict(MUON_INSIDE, rank=36), [8e-3], 4e-3, 1.6e-2, 3.2e-2),
    ('Muon, lean', method('muon_lean'), [3.2e-2], 1.6e-2, 6.4e-2))
ADAPTING = {
    'full fine-tuning': (dict(lowrank=''), rates(3e-3, 1e-3, 3e-4)),
    'LoRA, rank 2': (dict(ONE, rank=2, alpha=2.0), rates(1e-2, 3e-3, 1e-3)),
    'LoRA, rank 8': (dict(ONE, rank=8, alpha=8.0), rates(1e-2, 3e-3, 1e-3)),
    'LoRA, rank 32': (dict(ONE, rank=32, alpha=32.0), rates(3e-3, 1e-3, 1e-2))}
HEADS_ON = {  # all else is at full rank
    letters: (dict(SPLIT, rank=16, alpha=16.0, lowrank=layers) if layers else {}, rates(2e-3))
    for letters, layers in {'none': '', 'A': 'attn', 'M': 'mlp', 'L': 'logit', 'AM': 'attn,mlp',
                            'AL': 'attn,logit', 'ML': 'mlp,logit', 'AML': 'attn,mlp,logit'}.items()}
TRAININGS = {
    bench: [(dict(method=name, settings={**shared, **change}), {**base, **shared, **change})
            for name, (shared, changes) in methods.items() for change in changes]
    for bench, base, methods in (('screening', SCREEN, SCREENING), ('quality', FINAL, FINALISTS),
                                 ('sixteen', FINAL, SIXTEEN), ('english', ENGLISH, ON_ENGLISH),
                                 ('longer', LONGER, FOR_LONGER), ('smaller', SMALLER, FOR_SMALLER),
                                 ('convergence', ADAPT, ADAPTING), ('layers', LAYERS, HEADS_ON))}


def by_method(name, **about):
    """The last of a bench's trainings of each method, as cells."""
    last = {cell['method']: settings for cell, settings in TRAININGS[name]}
    return [({**about, 'method': called}, settings) for called, settings in last.items()]


# -----------------------------------------------------------------------------
# what is measured


def train(name, only):
    """Keeps the trainings that assets/NAME.jsonl lacks; of some benches times of a step, too."""
    for dataset in {settings['dataset'] for _, settings in TRAININGS[name]}:
        ensure(dataset)  # before trainings side by side want it at once
    measure_all(name, TRAININGS[name], only, train_one, jobs=os.cpu_count())
    if name in ('quality', 'convergence'):
        torch.set_num_threads(1)
        # of several workers, what all of them compute
        cells = [(about, {**settings, 'sync': 'step'}) for about, settings in by_method(name)]
        time_steps(f'{name}_time', cells, only, 10)


def train_one(about, settings, tell):
    """
    What is kept of a training, on one thread of its own process or of each of its ranks: losses, of
    images accuracies too, numbers of parameters, bytes.

    Where it did not run it says why and gives None; where it diverged there is no loss.
    """
    ranks = settings.get('ranks', 1)
    command = [sys.executable]
    if ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    with tempfile.TemporaryDirectory() as folder:
        own = {**settings, 'out_dir': folder}
        command += [bench.script_of(settings).__file__]
        command += [f'--{key}={x}' for key, x in own.items() if key != 'ranks']
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        said = []
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            for line in process.stdout:
                said.append(line)
                if step := re.match(r'step +(\d+) \| train', line):
                    tell(int(step[1]) / settings['max_iters'])
        records = read_lines(f'{folder}/log.jsonl')
    diverged = any('is not finite' in line for line in said)
    if process.returncode and not diverged:
        print(bench.title(about), 'did not run:', *[line for line in said if 'rror: ' in line][:1])
        return None
    looks = [line for line in records if 'val_loss' in line]
    found = {'val_loss': None if diverged else looks[-1]['val_loss'],
             'curve': {key: [look[key] for look in looks] for key in ('step', 'val_loss', 'val_acc')
                       if key in looks[0]}}
    for key in ('test_acc', 'trainable_parameters', 'optimizer_state_bytes'):
        if values := [line[key] for line in records if key in line]:
            found[key] = max(values)
    return found


def sending(model, name, settings):
    """What a training on four workers is called in assets/communication.jsonl."""
    keys = 'rank', 'merge_every', 'basis', 'basis_every', 'sync_moments'
    what = {key: settings[key] for key in keys if key in settings}
    return dict(model=model, method=name, workers=4, **what, sync_bits=settings.get('sync_bits', 32))


def sending_cells():
    """Trainings that are meant for several workers, as four of them."""
    cells = [(sending(model, about['method'], about['settings']), {**settings, 'dtype': 'float32'})
             for model in ('screening', 'quality', 'english') for about, settings in TRAININGS[model]
             if about['method'] not in ('MHLoRA', 'ReLoRA')]
    few = {f'GaLoLTE, {bits} bits': {'sync_bits': bits} for bits in (32, 8, 4, 2)}
    for sync in ('merge', 'step'):
        base = {**FINAL, **GALOLTE, 'rank': 96, 'sync': sync, 'dtype': 'float32'}
        cells += named(base, few, model='quality', workers=4, sync=sync)
    return {title(cell[0]): cell for cell in cells}.values()  # whatever the rate and the seed


def costs(only):
    """Keeps what a step of what is screened costs in one process, and bytes that workers send."""
    alone = [cell for cell in by_method('screening', of='screening') if 'ranks' not in cell[1]]
    time_steps('speed', alone, only, 10)
    bench.memory(only, alone)
    bench.communication(only, sending_cells())


if __name__ == '__main__':
    with config.refusals():
        if options.bench == 'costs':
            costs(options.only)
        else:
            train(options.bench, options.only)
