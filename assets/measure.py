"""
Trains what the tables and pictures of both README.md compare, and measures what it costs:

$ python assets/measure.py BENCH

A training becomes a line of assets/BENCH.jsonl as soon as it has ended, and is not run again; one
that was stopped, by Ctrl-C too, goes on where it was saved.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config

BENCHES = {
    'screening': 'loss of each method on a small GPT, one setting changed at a time',
    'quality': 'loss of the finalists on a larger one, three seeds, and the time of a step',
    'sixteen': 'the same with weights in bfloat16, and of GaLore in 8 bits',
    'eight': 'loss of GaLore on the small GPT with weights in 32, 16 and 8 bits, at two rates',
    'english': 'loss of some methods on a small LLaMA and English text',
    'longer': 'loss of some methods on the small GPT after four times as many steps',
    'smaller': 'loss of some methods on a GPT of a third of its size',
    'twenty': 'loss of some methods on a GPT of 0.5M after 20 bytes a parameter, tuned one by one',
    'larger': 'the same of a GPT of 1.1M: AdamW and the best of those',
    'largest': 'the same of a GPT of 3.3M: AdamW, Muon and muon_lean',
    'convergence': 'how fast LoRA and full rank adapt the ViT of config/vit_quickstart.py',
    'layers': 'loss and trainable parameters by the layers that have heads',
    'costs': 'time, memory of screening and twenty; bytes sent of them, quality and english'}


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
from bench import measure_all, method, named, read_lines, time_steps
from prepare import ensure

# -----------------------------------------------------------------------------
# settings that the trainings of a bench share

# A GPT of 3.3M parameters, 600 steps of 2,048 bytes of Python sources
SMALL = dict(
    dataset='stdlib', vocab_size=257, block_size=256, batch_size=8, n_layer=4, n_head=4, n_embd=256,
    max_iters=600, warmup_iters=60, eval_interval=600, eval_iters=40, log_interval=100, beta2=0.99,
    weight_decay=0.0, grad_clip=1.0, device='cpu', dtype='bfloat16')
SCREEN = {**train_gpt.defaults, **SMALL}
# A LLaMA of 3.3M, on English: a dictionary, see assets/README.md
ENGLISH = {**train_llama.defaults, **SMALL, 'dataset': 'webster', 'n_mlp': 704,
           'gradient_accumulation_steps': 1}
LONGER = {**SCREEN, 'max_iters': 2400, 'warmup_iters': 240}
SMALLER = {**SCREEN, 'n_embd': 144}  # 1.1M


PARAMETERS = {96: 496_800, 144: 1_076_976, 256: 3_290_880}  # of a GPT so wide, embeddings included
BATCH = 8192  # bytes a step


def lasting(times, batch=BATCH, width=96):
    """Settings of a GPT so wide that trains on `times` bytes a parameter, `batch` a step. The rate
    climbs for a tenth of the steps and ends at 0; 256 KiB are evaluated after each quarter."""
    steps, rows = times * PARAMETERS[width] // batch, batch // SMALL['block_size']
    return dict(n_embd=width, batch_size=rows, max_iters=steps, warmup_iters=steps // 10,
                min_lr=0.0, eval_interval=-(-steps // 4), eval_iters=1024 // rows,
                log_interval=-(-steps // 20))


TWENTY = {**SCREEN, 'dataset': 'texts', **lasting(20)}
LARGER = {**TWENTY, **lasting(20, width=144)}
LARGEST = {**TWENTY, **lasting(20, width=256)}
LAYERS = {**SCREEN, 'max_iters': 500, 'warmup_iters': 50, 'eval_interval': 500}
# The finalists: 10.7M, 1,000 steps of 1,024 bytes, all but the rate as the screening found best
FINAL = {**SCREEN, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 128, 'max_iters': 1000,
         'warmup_iters': 100, 'eval_interval': 200}
# What config/vit_digits_adapt.py does, 20 epochs of 1,078 images, evaluated after each
ADAPT = {**train_vit.defaults, **dict(
    init_from='out/vit_quickstart/best.pt', dataset='digits_shifted', batch_size=64, max_iters=337,
    model='vit_tiny_patch16_224', img_size=32, patch_size=8, n_layer=6, n_head=3, n_embd=96,
    eval_interval=17, log_interval=17, warmup_iters=20, min_lr=1e-5, device='cpu',
    dtype='float32')}

# -----------------------------------------------------------------------------
# trainings: {method: (settings beside those of its name, [changes, each a training])}

OFTEN = dict(basis_every=50, beta2=0.999)  # of methods with a basis


def each(**values):
    """Changes of one setting each: to each of its values in turn."""
    return [{key: value} for key, those in values.items() for value in those]


def seeds(rate):
    """Two more seeds at a learning rate."""
    return [dict(learning_rate=rate, seed=seed) for seed in (1, 2)]


def rates(best, *others):
    """Learning rates: the best ones with three seeds, others with the first."""
    return [*each(learning_rate=(*best, *others)), *sum(map(seeds, best), [])]


def searched(rank, methods):
    """Trainings of methods, {name: (best rates, *others)}; bases have so many directions."""
    in_basis = dict(OFTEN, rank=rank)
    return {name: (in_basis if 'basis' in method(name) else {}, rates(*those))
            for name, those in methods.items()}


SCREENING = {
    'full': (dict(learning_rate=2e-3), [  # 4e-3 needs clipping; seeds: how much is noise
        {}, *each(learning_rate=(1e-3, 4e-3), beta2=(0.999,), grad_clip=(0.0,), seed=(1, 2))]),
    'GaLore drop-in': (dict(OFTEN, rank=64, learning_rate=2e-2), [
        {}, *each(learning_rate=(1e-2, 4e-2), grad_clip=(0.0,), basis=('random', 'svd'),
                  rank=(16, 32, 128)), dict(learning_rate=1e-2, basis='svd'), *seeds(2e-2)]),
    'apollo_mini': (OFTEN, rates([5e-3], 2.5e-3, 1e-2, 2e-2)),
    **searched(64, {
        'galore': ([2e-2], 1e-2, 4e-2),
        'fira': ([1e-2], 5e-3, 2e-2),
        'apollo': ([2e-2], 5e-3, 1e-2, 4e-2),
        'scale': ([5e-4], 2.5e-4, 1e-3, 2e-3),
        'muon': ([8e-3], 1e-3, 2e-3, 4e-3, 1.6e-2),
        'muon, state_bits=8': ([], 8e-3),
        'muon, momentum=0.0': ([1.6e-2, 8e-3, 4e-3], 3.2e-2),
        'muon, momentum=0.0, state_bits=8': ([], 8e-3),
        'muon_lean': ([3.2e-2, 1.6e-2], 8e-3, 6.4e-2),
        'galore_muon': ([8e-3], 2e-3, 4e-3, 1.6e-2),
        'galore_muon, momentum=0.0': ([3.2e-2, 1.6e-2, 8e-3], 4e-3, 6.4e-2)}),
    'galolte, optimizer=muon': (
        dict(OFTEN, rank=64, scale=1.0), rates([8e-3], 4e-3, 1.6e-2)),
    'galolte, optimizer=muon, sync_bits=2': (dict(OFTEN, rank=64, scale=1.0), rates([8e-3])),
    'galolte': (dict(OFTEN, rank=64, learning_rate=2e-2), [
        {}, *each(sync_bits=(4, 2), seed=(1, 2), learning_rate=(1e-2, 4e-2))]),
    'galolte_2bit, sync_moments=True': (
        dict(rank=64, beta2=0.999, ranks=4, learning_rate=8e-3),
        [dict(merge_every=T, sync_bits=bits) for T in (2, 10, 50) for bits in (32, 4, 2)]),
    'galolte, sync=merge': (dict(OFTEN, rank=64, ranks=4), [
        dict(learning_rate=2e-2), dict(sync_bits=2, learning_rate=5e-3, scale=1.0)]),
    'mhlora': (dict(learning_rate=2e-3), [
        *(dict(rank=rank, alpha=times * rank) for times in (1.0, 4.0) for rank in (4, 16, 64)),
        *each(learning_rate=(1e-3, 4e-3), seed=(1, 2))]),
    'lte': (dict(learning_rate=2e-3), [
        {}, *each(merge_every=(1, 50), alpha=(64.0,), learning_rate=(4e-3, 1e-3, 8e-3)),
        dict(rank=40, alpha=40.0, learning_rate=4e-3),  # GaLoLTE's memory
        dict(alpha=64.0, learning_rate=1e-3), dict(alpha=64.0, learning_rate=5e-4),
        dict(alpha=4.0, learning_rate=4e-3), *seeds(4e-3)]),
    'relora': (dict(learning_rate=2e-3), [
        {}, *each(merge_every=(50,), learning_rate=(4e-3, 1e-3, 8e-3)), *seeds(4e-3)]),
    'local_muon': (dict(ranks=4, learning_rate=8e-3), [
        {}, *each(merge_every=(50,), learning_rate=(4e-3, 1.6e-2))]),
    'local_adamw': (dict(ranks=4, learning_rate=2e-3), [
        {}, *each(learning_rate=(4e-3, 1e-3), merge_every=(1, 50))])}
WORKERS = dict(rank=96, beta2=0.999, ranks=4)
FINALISTS = {  # ranks are a quarter of the width in all
    **searched(96, {
        'full': ([1e-3], 5e-4, 2e-3),
        'galore': ([5e-3], 5e-4),
        'GaLore drop-in': ([5e-3], 2.5e-3, 1e-2, 2e-2),
        'galolte': ([1.4e-2], 7e-3, 1e-2),
        'fira': ([], 1e-2),
        'muon': ([4e-3], 2e-3, 8e-3),
        'galore_muon': ([4e-3], 2e-3, 8e-3, 1.6e-2),
        'muon_lean': ([1.6e-2], 8e-3, 3.2e-2)}),
    'relora': (dict(rank=96, alpha=96.0), rates([2e-3], 4e-3, 1e-3)),
    'mhlora': (dict(rank=24, alpha=96.0), rates([5e-4], 2.5e-4, 1e-3, 2e-3)),
    'lte': (dict(rank=24, alpha=24.0), rates([2e-3], 4e-3, 1e-3)),
    'galolte, sync=merge, sync_bits=2': (dict(WORKERS, basis_every=50), rates([], 1.4e-2)),
    'galolte_2bit, sync_moments=True': (dict(WORKERS, learning_rate=8e-3), [
        dict(merge_every=50), *each(basis_every=(50,)),
        *(dict(seeded, basis_every=50) for seeded in seeds(8e-3))]),
    'galolte_2bit, sync_moments=True, merge_every=20': (WORKERS, rates([], 8e-3)),
    'galolte_2bit': (WORKERS, rates([8e-3], 4e-3)),
    'galolte_2bit, merge_every=20': (dict(WORKERS, basis_every=200), rates([8e-3], 4e-3)),
    'local_adamw': (dict(ranks=4), rates([1e-3], 5e-4, 2e-3)),
    'local_muon': (dict(ranks=4), rates([], 4e-3))}
SIXTEEN = {name: (dict(FINALISTS[name][0], param_dtype='bfloat16'), rates([rate]))
           for name, rate in (('full', 1e-3), ('galore', 5e-3), ('lte', 2e-3))}
SIXTEEN['galore, param_bits=8'] = FINALISTS['galore'][0], rates([5e-3], 5e-4)
EIGHT = searched(64, {
    'galore': ([2e-2, 2e-3],),
    'galore, param_dtype=bfloat16': ([2e-2, 2e-3],),
    'galore, param_bits=8': ([2e-2, 2e-3],)})
ON_ENGLISH = searched(64, {
    'full': ([1e-3], 5e-4, 2e-3),
    'galore': ([1e-2], 2e-2, 4e-2),
    'muon': ([4e-3], 2e-3, 8e-3),
    'galore_muon': ([4e-3], 8e-3, 1.6e-2),
    'muon_lean': ([1.6e-2], 8e-3, 3.2e-2),
    'full, param_dtype=bfloat16': ([], 2e-3),
    'galore, param_dtype=bfloat16': ([], 2e-2),
    'lte': ([4e-3], 2e-3, 8e-3)})
FOR_LONGER = searched(64, {
    'full': ([2e-3], 1e-3, 4e-3),
    'galore': ([1e-2], 5e-3, 2e-2),
    'galore, param_dtype=bfloat16': ([1e-2],),
    'galore, param_bits=8': ([1e-2],),
    'muon': ([4e-3], 2e-3, 8e-3),
    'galore_muon': ([4e-3], 2e-3, 8e-3),
    'muon_lean': ([1.6e-2], 4e-3, 8e-3)})
FOR_SMALLER = searched(36, {
    'full': ([2e-3], 1e-3, 4e-3),
    'galore': ([4e-2], 1e-2, 2e-2, 8e-2),
    'muon': ([1.6e-2], 8e-3, 3.2e-2),
    'galore_muon': ([8e-3], 4e-3, 1.6e-2, 3.2e-2),
    'muon_lean': ([3.2e-2], 1.6e-2, 6.4e-2)})
# At 20 bytes a parameter: first the batch, by AdamW and Muon, with decay; then, at the best batch,
# rate times decay. Where the best rate is the last one of a grid, the grid is widened
BATCHES = {
    'full': {8192: (2e-3, 4e-3, 8e-3, 1.6e-2), 2048: (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
             32768: (4e-3, 8e-3, 1.6e-2)},
    'muon': {8192: (8e-3, 1.6e-2, 3.2e-2), 2048: (4e-3, 8e-3, 1.6e-2),
             32768: (1.6e-2, 3.2e-2, 6.4e-2)}}
TUNED = {
    'full': (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    'muon': (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    'galore': (2e-2, 4e-2, 8e-2, 1.6e-1),
    'galore_muon': (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    'muon_lean': (1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1)}
# The others are tuned with decay 0.1 only, which the best trial of each of those had
TUNED_WITH_DECAY = {
    'fira, rank=48': (2e-2, 4e-2, 8e-2),
    'apollo_mini': (5e-3, 1e-2, 2e-2),
    'apollo, rank=48': (4e-2,),
    'scale': (2e-3,),
    'muon, state_bits=8': (3.2e-2,),
    'GaLore drop-in, rank=48': (8e-2,),
    'relora, rank=48': (4e-3, 8e-3, 1.6e-2),
    'mhlora, rank=12': (2e-3, 4e-3, 8e-3, 1.6e-2),
    'galolte, rank=48': (2e-2, 4e-2, 8e-2),
    'galolte_2bit': (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    'local_muon': (1.6e-2, 3.2e-2, 6.4e-2),
    'lte': (4e-3, 8e-3, 1.6e-2),
    'local_adamw': (4e-3, 8e-3)}
OWN = {  # settings where they are not those of methods with a basis, of a quarter of the width
    'relora, rank=48': dict(alpha=48.0),
    'mhlora, rank=12': dict(alpha=48.0),
    'galolte_2bit': dict(rank=48, beta2=0.999, ranks=4),
    'local_muon': dict(ranks=4),
    'lte': dict(rank=24, alpha=24.0, ranks=4),
    'local_adamw': dict(ranks=4)}
# Controls: AdamW with other averages (beta2); GaLore with a basis of all directions, at AdamW's
# rate, and with Muon inside, at Muon's rate; scale=1, so that the embeddings have the rate of the
# basis; other bases; twice as many directions; a rate higher than those above; merges less often
CONTROLS = {
    'full': [dict(weight_decay=0.1, learning_rate=1.6e-2, beta2=beta2) for beta2 in (0.95, 0.999)],
    'galore': [dict(weight_decay=0.1, learning_rate=1.6e-2, beta2=0.99, rank=96, scale=1.0),
               *(dict(weight_decay=0.1, learning_rate=rate, scale=1.0) for rate in (2e-2, 4e-2)),
               *(dict(weight_decay=0.1, learning_rate=8e-2, **change) for change in (
                   dict(basis_every=10), dict(basis_every=200), dict(basis='random'))),
               *(dict(weight_decay=0.1, learning_rate=rate, rank=48)
                 for rate in (4e-2, 8e-2, 1.6e-1))],
    'galore_muon': [dict(weight_decay=0.1, learning_rate=3.2e-2, beta2=0.99, rank=96),
                    *(dict(weight_decay=0.1, learning_rate=rate, rank=48)
                      for rate in (1.6e-2, 3.2e-2, 6.4e-2)),
                    dict(weight_decay=0.1, learning_rate=1.28e-1)],
    'galolte_2bit': [dict(weight_decay=0.1, learning_rate=3.2e-2, merge_every=T)
                     for T in (20, 50)]}
# AdamW is tuned at 80 bytes a parameter, too; others are tried at half of their rate: (rate, decay)
TUNED_AT_80 = {'full': [(8e-3, 0.1), (8e-3, 0.0), (4e-3, 0.1), (1.6e-2, 0.1)],
               'muon': [(1.6e-2, 0.1)],
               'muon_lean': [(3.2e-2, 0.1)],
               'galore_muon, rank=48': [(1.6e-2, 0.1)]}
# Trainings that judge: seeds that have tuned nothing (FRESH: {bytes a parameter: seeds}), at the
# best rate and decay above (JUDGED: (rate, decay, *bytes a parameter)). AdamW's best rate is the
# luck of a seed, so its second best and a lower one are judged, too; of Muon and muon_lean at 80
# half of their rate. At 10 and 40 AdamW alone, for a curve on which losses of others are looked up
FRESH = {5: (1, 2, 3, 4, 5), 10: (1,), 20: (1, 2, 3, 4, 5), 40: (1, 2), 80: (1, 2, 3)}
JUDGED = {
    'full': [(8e-3, 0.0, 5, 10, 20), (4e-3, 0.0, 5, 10), (1.6e-2, 0.1, 5, 20, 40, 80)],
    'muon': [(3.2e-2, 0.1, 5, 20, 80), (1.6e-2, 0.1, 80)],
    'muon, state_bits=8': [(3.2e-2, 0.1, 5, 20)],
    'galore_muon, rank=48': [(3.2e-2, 0.1, 5, 20, 80)],
    'galore, rank=48': [(8e-2, 0.1, 5, 20, 80)],
    'muon_lean': [(6.4e-2, 0.1, 5, 20, 80), (3.2e-2, 0.1, 80)]}


def at_twenty(name):
    """(settings, changes) of a method at 20 bytes a parameter, and of what judges it."""
    shared = OWN.get(name, {})
    if not shared and 'basis' in method(name):
        shared = OFTEN
        if 'rank=' not in name and method(name).get('rank') != 1:
            shared = dict(OFTEN, rank=24)
    changes = [dict(weight_decay=decay, learning_rate=rate)
               for rate in TUNED.get(name, ()) for decay in (0.1, 0.0)]
    changes += [dict(weight_decay=0.1, learning_rate=rate)
                for rate in TUNED_WITH_DECAY.get(name, ())]
    for batch, those in BATCHES.get(name, {}).items():
        how = {} if batch == BATCH else lasting(20, batch)
        of_batch = [dict(weight_decay=0.1, learning_rate=rate, **how) for rate in those]
        changes += [change for change in of_batch if change not in changes]
    changes += CONTROLS.get(name, [])
    changes += [dict(weight_decay=decay, learning_rate=rate, **lasting(80))
                for rate, decay in TUNED_AT_80.get(name, [])]
    for rate, decay, *lengths in JUDGED.get(name, []):
        for times in lengths:
            how = {} if times == 20 else lasting(times)
            changes += [dict(weight_decay=decay, learning_rate=rate, seed=seed, **how)
                        for seed in FRESH[times]]
    return shared, changes


AT_TWENTY = {name: at_twenty(name) for name in {**TUNED, **TUNED_WITH_DECAY, **JUDGED}}
# A GPT of 1.1M at 20 bytes a parameter, ranks half of the width: (rate, decay, *seeds that judge)
LARGE = {
    name: (OFTEN if 'basis' in method(name) else {},
           [dict(weight_decay=decay, learning_rate=rate, **seed) for rate, decay, *fresh in those
            for seed in ({}, *each(seed=fresh))])
    for name, those in {
        'full': [(4e-3, 0.1), (8e-3, 0.1, 1), (1.6e-2, 0.1)],
        'muon': [(1.6e-2, 0.1, 1), (3.2e-2, 0.1)],
        'galore_muon, rank=72': [(3.2e-2, 0.1, 1)],
        'galore, rank=72': [(8e-2, 0.1)],
        'muon_lean': [(6.4e-2, 0.1, 1)]}.items()}
# One of 3.3M: a training takes hours; rates fall as the width grows
OF_3M = {'full': ({}, [dict(weight_decay=0.1, learning_rate=rate) for rate in (4e-3, 8e-3)]),
         'muon': ({}, [dict(weight_decay=0.1, learning_rate=1.6e-2)]),
         'muon_lean': ({}, [dict(weight_decay=0.1, learning_rate=3.2e-2)])}
ADAPTING = {
    'full': ({}, rates([3e-3], 1e-3, 3e-4)),
    'lora, rank=2': (dict(alpha=2.0), rates([1e-2], 3e-3, 1e-3)),
    'lora, rank=8': (dict(alpha=8.0), rates([1e-2], 3e-3, 1e-3)),
    'lora, rank=32': (dict(alpha=32.0), rates([3e-3], 1e-3, 1e-2))}
HEADS_ON = {name: ({}, rates([2e-3])) for name in (  # all else is at full rank
    'full', 'lte, lowrank=attn', 'lte, lowrank=mlp', 'lte, lowrank=logit', 'lte, lowrank=attn,mlp',
    'lte, lowrank=attn,logit', 'lte, lowrank=mlp,logit', 'lte, lowrank=attn,mlp,logit')}


def cells_of(name, base, methods):
    """
    Cells of a bench's trainings: ({method, settings: what it sets}, all settings).

    Where a line of assets/NAME.jsonl has other words for the same settings, the cell has those.
    """
    lines = read_lines(ROOT / f'assets/{name}.jsonl')
    for called, (shared, changes) in methods.items():
        known = [line['settings'] for line in lines if line['method'] == called]
        for change in changes:
            own = {**method(called), **shared, **change}
            same = [words for words in known if {**base, **words} == {**base, **own}]
            yield dict(method=called, settings=(same or [own])[0]), {**base, **own}


TRAININGS = {name: list(cells_of(name, base, methods)) for name, base, methods in (
    ('screening', SCREEN, SCREENING), ('quality', FINAL, FINALISTS), ('sixteen', FINAL, SIXTEEN),
    ('eight', SCREEN, EIGHT),
    ('english', ENGLISH, ON_ENGLISH), ('longer', LONGER, FOR_LONGER),
    ('smaller', SMALLER, FOR_SMALLER), ('twenty', TWENTY, AT_TWENTY), ('larger', LARGER, LARGE),
    ('largest', LARGEST, OF_3M),
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
        ensure(dataset, ROOT / 'data')  # before trainings side by side want it at once
    measure_all(name, TRAININGS[name], only, train_one, jobs=os.cpu_count())
    if name in ('quality', 'convergence'):
        torch.set_num_threads(1)
        # of several workers, what all of them compute
        cells = [(about, {**settings, 'sync': 'step'}) for about, settings in by_method(name)]
        time_steps(f'{name}_time', cells, only, 10)


def train_one(about, settings, tell):
    """
    Trains in a process of its own, or one for each rank, with one thread each. Returns what is
    kept: losses, accuracies of images, numbers of parameters, bytes, and as `run` the settings that
    differ from the script's defaults.

    If the training did not run or was stopped, this prints so and returns None; if it diverged, the
    loss is None. Until it ends, its files are in out/measure_*.
    """
    ranks = settings.get('ranks', 1)
    command = [sys.executable]
    if ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    words = json.dumps(settings, sort_keys=True)
    folder = ROOT / 'out' / f'measure_{hashlib.sha256(words.encode()).hexdigest()[:12]}'
    own = {**settings, 'out_dir': folder, 'overwrite': True}
    if (folder / 'ckpt.pt').exists():
        own.update(init_from='resume', overwrite=False)
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
    diverged = any('is not finite' in line for line in said)
    if process.returncode and not diverged:
        print(bench.title(about), 'did not run:', *[line for line in said if 'rror: ' in line][:1])
        return None
    records = read_lines(folder / 'log.jsonl')
    looks = [line for line in records if 'val_loss' in line]
    if not diverged and (not looks or looks[-1]['step'] < settings['max_iters']):
        print(bench.title(about), 'was stopped, and goes on next time')
        return None
    shutil.rmtree(folder)
    usual = bench.script_of(settings).defaults
    found = {'val_loss': None if diverged else looks[-1]['val_loss'],
             'run': {key: x for key, x in settings.items() if usual.get(key) != x},
             'curve': {key: [look[key] for look in looks] for key in ('step', 'val_loss', 'val_acc')
                       if key in looks[0]}}
    for key in ('test_acc', 'parameters', 'trainable_parameters', 'optimizer_state_bytes',
                'peak_memory_bytes'):
        if values := [line[key] for line in records if key in line]:
            found[key] = max(values)
    return found


def sending(model, about):
    """What a training on four workers is called in assets/communication.jsonl."""
    settings = {'sync_bits': 32, **about['settings']}
    keys = 'rank', 'merge_every', 'basis', 'basis_every', 'sync_bits'
    what = {key: settings[key] for key in keys if key in settings}
    if not settings.get('sync_moments', True):
        what['sync_moments'] = False
    return dict(model=model, method=about['method'], workers=4, **what)


def sending_cells():
    """What is sent on four workers, of trainings in one process too; and bits by `sync`."""
    cells = {}  # whatever the rate and the seed
    for model in ('screening', 'quality', 'english', 'twenty'):
        for about, settings in TRAININGS[model]:
            if model == 'twenty':
                wanted = about['method'] in JUDGED or 'ranks' in settings
            else:
                wanted = about['method'] not in ('mhlora', 'relora')
            if wanted:
                about = sending(model, about)
                cells[bench.title(about)] = about, {**settings, 'dtype': 'float32'}
    few = {f'galolte, sync_bits={bits}': dict(OFTEN, rank=96, dtype='float32')
           for bits in (32, 8, 4, 2)}
    for sync in ('merge', 'step'):
        yield from named({**FINAL, 'sync': sync}, few, model='quality', workers=4, sync=sync)
    yield from cells.values()


def costs(only):
    """Keeps what a step of two benches' methods costs in one process, and bytes that workers
    send."""
    alone = [(about, s) for name, methods in (('screening', SCREENING), ('twenty', JUDGED))
             for about, s in by_method(name, of=name)
             if about['method'] in methods and 'ranks' not in s]
    time_steps('speed', alone, only, 10)
    bench.memory(only, alone)
    bench.communication(only, sending_cells())


if __name__ == '__main__':
    sys.excepthook = config.in_one_line  # of Ctrl-C
    with config.refusals():
        if options.bench == 'costs':
            costs(options.only)
        else:
            train(options.bench, options.only)
