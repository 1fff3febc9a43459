"""
What holds in this repository: `pytest test_lowrank.py`. Laws are checked in float64, on tiny
shapes, against formulations of their own; the scripts run for real, on tiny data.
"""

import contextlib
import contextvars
import copy
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._inductor import metrics
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.func import functional_call
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.transforms.functional import to_pil_image

import bench
import config
import export
import galore
import hub
import lowrank
import model as models
import prepare
import ranks as processes
import rules
import sample
import textbook
import train_gpt
import train_llama
import train_vit
from run import (MAY_CHANGE, Meter, assemble, join, load_checkpoint, make_optimizer, operations_of,
                 peak_memory_bytes, peak_of, put_layers, refuse_other_settings, save,
                 save_checkpoint, set_learning_rate, start_run, unlock, unscale)

pytestmark = [
    # of vmap
    pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning'),
    # of bitsandbytes
    pytest.mark.filterwarnings('ignore:`torch.jit.script_method` is deprecated'),
    pytest.mark.filterwarnings('ignore:LowRankAdamW.step without begin:UserWarning')]
torch.set_num_threads(1)  # tiny shapes: threads would only wait for each other
HERE = os.path.dirname(os.path.abspath(__file__))
DEVICE = os.environ.get('TEST_DEVICE', 'cpu')  # of what the core computes, for bench.py card
wants_a_compiler = pytest.mark.skipif(
    not shutil.which('g++'), reason='torch.compile wants a compiler: install g++')
SCRIPTS = {'gpt': train_gpt, 'llama': train_llama, 'vit': train_vit}
FILES = {name[:-3]: f'{HERE}/config/methods/{name}'
         for name in sorted(os.listdir(f'{HERE}/config/methods')) if name.endswith('.py')}
# for runs of eight steps
SMALL = {'rank': 3, 'merge_every': 3, 'basis_every': 6, 'rewarm_iters': 2}
double = torch.float64


def settings_of(script, *words, ranks=1):
    """What a script makes of a command line on so many ranks."""
    with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
        return config.load(vars(script), script.defaults, [*map(str, words)])


def start(script, words):
    """Runs a script with a command line; returns what its main does."""
    return script.main(config.load(vars(script), script.defaults, [*map(str, words)]))


METHODS = {name: settings_of(train_gpt, path, ranks=2) for name, path in FILES.items()}
# need no other rank
ALONE = [name for name, settings in METHODS.items() if settings['sync'] == 'step']


def method(name, *more):
    """The words that give a method to a tiny run."""
    own = runpy.run_path(FILES[name])
    small = [f'--{key}={value}' for key, value in SMALL.items() if own.get(key, 0) > 1]
    return [FILES[name], *small, *['--grad_clip=0.2'] * ('grad_clip' not in own), *more]


TEXT = '--dataset=tiny --block_size=16 --eval_iters=2 --learning_rate=0.01 --min_lr=0.01 '
OWN = {'gpt': TEXT, 'llama': TEXT + '--n_mlp=24 --n_kv_head=1 --vocab_size=257',
       'vit': '--dataset=xrays --init_from=scratch --model=vit_tiny_patch16_224 --img_size=28 '
              '--patch_size=14 --learning_rate=0.001 --min_lr=0.001'}
ALL = ('--n_layer=2 --n_head=2 --n_embd=16 --batch_size=8 --max_iters=4 --eval_interval=4 '
       '--log_interval=2 --warmup_iters=2 --param_dtype=float64 --dtype=float64 '
       f'--device={DEVICE} ')


def tiny(script, root, out, *words):
    """The command line of a tiny run in float64; {base}: a LLaMA to begin from."""
    words = [f'--data_dir={root}', f'--out_dir={out}', *(ALL + OWN[script]).split(), *words]
    if '--init_from={base}' in words:
        words = loading([word.format(base=f'{root}/base') for word in words])
    return words


def heads_of(run):
    return run.s.heads if run.s.lowrank and run.s.split else 1


def rows_of_rank(run):
    """Of a micro-batch the rows of a rank, as the scripts have them."""
    return processes.rows_of(run.s.batch_size, heads_of(run), run.rank, run.ranks)


def batch_of(run, data, step, micro_step=0):
    """Of a micro-batch what a rank trains on, as the scripts have it."""
    s, rows = run.s, rows_of_rank(run)
    if 'augment' in run.settings:
        return train_vit.batch_of(run, data, rows, step, micro_step)
    return data.batch(s.batch_size, step, micro_step, s.gradient_accumulation_steps, s.seed, rows,
                      heads=heads_of(run))


def saved(out, name='ckpt.pt'):
    return load_checkpoint(f'{out}/{name}')


def train(script, root, out, *words):
    """Runs a script's main on a tiny model and returns the checkpoint that it ends with."""
    start(SCRIPTS[script], tiny(script, root, out, *words))
    return saved(out)


@pytest.fixture(scope='session')
def plains(root, tmp_path_factory):
    """A model of each script without anything low-rank, as a form to compute with other weights."""
    return {script: built(script, root, tmp_path_factory.mktemp('plain'))[0].model
            for script in SCRIPTS}


def built(script, root, out, *words, checkpoint=None, ranks=1):
    """A tiny run that is set up and has not begun, and its training data."""
    settings = settings_of(SCRIPTS[script], *tiny(script, root, out, *words), ranks=ranks)
    if script == 'vit':
        data = prepare.Images(settings['dataset'], 'train', root)
        about = data.classes
    else:
        data = prepare.Tokens(settings['dataset'], 'train', settings['block_size'], root,
                              settings['documents'])
        about = data.vocab_size
    return SCRIPTS[script].build(settings, join(settings), about, checkpoint), data


def records(out, name='log.jsonl'):
    with open(f'{out}/{name}', encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def logged(out, key):
    """{step: value} of a key in log.jsonl."""
    return {record['step']: record[key] for record in records(out) if key in record}


def same_state(a, b):
    """Two checkpoints hold the same tensors and numbers, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def refused(capsys, call, *needles):
    """The call ends with exit code 2 and one line on stderr that holds every needle."""
    with pytest.raises(SystemExit) as ended:
        call()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count('\n') == 1 and said.startswith('error: '), said
    for needle in needles:
        assert needle in said, said


def normal(*shape, seed=0, dtype=double):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=double).to(DEVICE, dtype)


def tokens_of(*shape, high=31, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def eye(size):
    return torch.eye(size, dtype=double, device=DEVICE)


def close(a, b, tolerance=1e-12):
    """Equal to rounding, relative to nothing."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
    return models.GPT(models.GPTConfig(**{**shape, **changes})).double()


def tiny_llama(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_mlp=24,
                 n_kv_head=2)
    return models.Llama(models.LlamaConfig(**{**shape, **changes})).double()


def tiny_vit():
    torch.manual_seed(0)
    shape = dict(model='vit_tiny_patch16_224', img_size=28, patch_size=14, n_layer=2, n_head=2,
                 n_embd=16)
    return hub.create_vit(shape, 9).double()


ANSWERS = [{'prompt': 'p' * (i * 7 % 23) + '?', 'completion': 'c' * (i * 5 % 31) + '!'}
           for i in range(200)]


@pytest.fixture(scope='session')
def root(tmp_path_factory):
    """A folder of data sets, made by the real writers."""
    root = tmp_path_factory.mktemp('data')
    texts = [f'document {i}: ' + ' '.join(str(i * j % 97) for j in range(60)) for i in range(120)]
    (root / 'tiny.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    prepare_text(root, root / 'tiny.jsonl', '--name', 'tiny')
    prepare_text(root, numbered(root / 'mine.txt'), '--name', 'mine', '--shard_tokens', 20_000)
    # a value is no key
    answers = [{'type': 'text', **x} for x in (*ANSWERS, {'text': 'all of it'})]
    (root / 'answers.jsonl').write_text('\n'.join(map(json.dumps, answers)))
    prepare_text(root, root / 'answers.jsonl', '--name', 'answers')
    archive(root)
    prepare_images(root)
    ill = np.arange(64)[:, None, None] % 2  # who is ill is lighter
    images = (np.random.default_rng(0).integers(0, 128, (64, 28, 28)) + 100 * ill).astype(np.uint8)
    archive(root, 'pneumoniamnist', counts={'train': 64, 'val': 12, 'test': 13},
            train_images=images, val_images=images[:12], test_images=images[:13])
    prepare_images(root, 'pneumoniamnist', '--name', 'xrays')
    for name in prepare.DIGITS:
        prepare.ensure(name, root)
    # to be in 4 bits
    out_of(tiny_llama(vocab_size=257, n_embd=64, n_mlp=128).float(), f'{root}/base')
    return root


# -----------------------------------------------------------------------------
# settings


def write_files(folder, **texts):
    """Config files; those whose name begins with m_ are methods. Returns the paths by name."""
    (folder / 'methods').mkdir()
    paths = {name: folder / 'methods' / f'{name[2:]}.py' if name[:2] == 'm_'
             else folder / f'{name}.py' for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name] + '\n')
    return {name: str(path) for name, path in paths.items()}


def test_files_run_in_their_order_tables_win_and_the_command_line_wins_over_all(tmp_path, capsys):
    paths = write_files(
        tmp_path, a='import math\n_half = rate / 2\nrate = _half\nshape = 1, 2\nname = "x"',
        b='rates = [1, 2]\nrate = rates[1]',  # what else it takes to compute
        m_galore="lowrank, factors, merge_every, rank = 'attn', 'basis', 1, 64\nbeta2 = 0.9",
        run="batch_size = 8\nlearning_rate = {'full': 1e-3, 'galore': n_layer * 1e-3}\n"
            "rank = {'galore': 4}\nbeta1, alpha, lowrank, scale = "
            "{'lte': 0.5}, {'lte': 3.0}, {'lte': 'mlp'}, {'galore': 1}",
        more='batch_size = 8\nbeta1 = 0.8', c='rate = 1.0', again="alpha = {'lte': 5.0}",
        no="state_bits = {}")
    known = dict(rate=1.0, shape=(3,), flag=False, name='', limit=None, count=1)
    got = config.load({}, known, ['--name=7', paths['a'], '--count=3', '--limit=2', '--flag=True'])
    assert got == dict(rate=0.5, shape=(1, 2), flag=True, name='7', limit=2, count=3)
    for text in ('{{}}', '"""a"""', "('a')", '"a" # b', '"\'a\'"'):
        assert config.load({}, known, [f'--name={text}'])['name'] == text
    base = tmp_path / 'base.py'  # a file may build on another one
    base.write_text('import math\nrate = 2.0\ncount = sum(limit for limit in (1, 2))\n')
    for i, line in enumerate((
            f'exec(open({str(base)!r}).read())',
            f'import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom base import *')):
        (tmp_path / f'derived{i}.py').write_text(f'{line}\nname = "z"\n')
        got = config.load({}, known, [f'{tmp_path}/derived{i}.py'])
        assert got == {**known, 'rate': 2.0, 'count': 3, 'name': 'z'}
    got = config.load({}, known, [paths['b'], "--name='x y'", '--limit=None'])
    assert got == {**known, 'rate': 2.0, 'name': 'x y'}  # int for float; nothing is left over

    got = [config.load({}, known, [paths[a], paths[b]])['rate']
           for a, b in ('ab', 'ba', 'cb', 'bc')]
    assert got == [2.0, 1.0, 2.0, 1.0]  # the last one counts, and sees what those before it set
    said = capsys.readouterr().out
    assert f"rate=1.0 in {paths['c']} takes the place of 2.0 in {paths['b']}" in said

    run, more, galore_file = paths['run'], paths['more'], paths['m_galore']
    first, *others = [settings_of(train_gpt, *words)
                      for words in itertools.permutations([run, more, galore_file, '--seed=3'])]
    assert all(other == first for other in others)
    merged = settings_of(train_gpt, FILES['lte'], '--learning_rate=1', run, paths['again'])
    assert (merged['alpha'], merged['beta1'], merged['lowrank']) == (5.0, 0.5, 'mlp')
    with pytest.raises(SystemExit):  # a table that is for no method
        settings_of(train_gpt, FILES['lte'], '--learning_rate=1', paths['no'])
    changed = {key: value for key, value in first.items() if value != train_gpt.defaults[key]}
    assert changed == dict(
        lowrank='attn', factors='basis', merge_every=1, rank=4, batch_size=8, seed=3, scale=1.0,
        beta1=0.8, beta2=0.9, learning_rate=0.012, min_lr=0.012 / 10)  # tables win
    assert isinstance(first['scale'], float)  # entries of tables have the types of settings, too
    full = settings_of(train_gpt, run, more, '--min_lr=0.0')
    # no rank is missed
    assert (full['learning_rate'], full['rank'], full['min_lr']) == (1e-3, 8, 0.0)
    assert settings_of(
        train_gpt, run, more, galore_file, '--learning_rate=1')['learning_rate'] == 1.0


SCRIPT_OF = {key: name for name, script in SCRIPTS.items() for key in script.defaults}
BASIS = '--lowrank=attn --factors=basis '
SPLIT = '--lowrank=attn --split=True '
MISTAKES = [  # script, words, ranks, what is said
    ('gpt', '--learning_rat=1', 1,
     "learning_rat' on the command line: did you mean 'learning_rate'"),
    ('gpt', '--heads=many', 1, 'type str, but int'),
    ('gpt', '--compile=1', 1, 'type int, but bool'),
    ('gpt', '--heads=True', 1, 'type bool, but int'), ('gpt', '--rank', 1, '--rank=value'),
    ('gpt', '--n_layer=None', 1, 'NoneType, but int'),
    ('gpt', '--vocab_size=abc', 1, 'type str, but int'),
    ('gpt', 'config/nowhere.py', 1, 'nowhere.py'),
    *((SCRIPT_OF[key], f'--{key}={least - 1}', 1, f'set at least {least}')
      for key, least in config.LEAST.items() if key in SCRIPT_OF),
    *((SCRIPT_OF[key], f"--{key}={12 if '_bits' in key else 'nonsense'}", 1,
       'is not known: set one of')
      for key in config.CHOICES),
    # what has no effect
    ('gpt', '--heads=4', 1,
     'heads=4 on the command line has no effect: there are no low-rank layers'),
    ('llama', '--rank=4', 1, 'rank=4 on the command line has no effect'),
    ('gpt', '--alpha=4', 1, 'alpha=4.0'),
    ('gpt', f'{BASIS}--merge_every=1 --alpha=4', 1, 'not a basis'),
    ('gpt', '--merge_reset=True', 1, 'merge_reset=True'),
    ('gpt', '--merge_every=5', 1, 'no heads to merge'),
    ('gpt', '--lowrank=attn --rewarm_iters=2', 1, 'merges that reset'),
    ('gpt', '--eval_only=True --wandb_log=True', 1, 'set wandb_log=False'),
    ('vit', '--init_from=pretrained --n_layer=3', 1, "timm's weights have a shape"),
    ('vit', f'--seed={2**62}', 1, 'below 2**62'),
    ('gpt', '--lowrank=attn --split=True --merge_every=2', 1, 'changes nothing'),
    ('gpt', FILES['local_adamw'], 1, 'start it with torchrun'),
    ('gpt', 'config/quickstart.py --lowrank=attn --rank=4 --alpha=4', 1,
     'learning_rate in config/quickstart.py is that'),
    ('gpt', '--basis=svd', 1, "basis='svd' on the command line has no effect: no basis is taken"),
    ('vit', '--lowrank=attn --basis_every=5', 1, 'no basis'),
    ('vit', '--epochs=2 --max_iters=9', 1, 'max_iters=9 on the command line has no effect: epochs'),
    ('gpt', '--init_from=gpt2 --n_layer=3', 1, 'loaded weights have a shape'),
    # what makes no sense together
    ('gpt', '--dropout=1.5', 1, 'dropout=1.5'),
    ('gpt', '--dtype=float16 --param_dtype=bfloat16', 1, 'param_dtype'),
    ('gpt', '--lowrank=attn --optimizer=galore --basis=svd', 1, "optimizer='adamw'"),
    ('gpt', '--lowrank=attn --merge_reset=True', 1, 'needs merges'),
    ('gpt', '--lowrank=attn --merge_reset=True --merge_every=2 --rewarm_iters=2', 1,
     'rewarm_iters=2'),
    ('gpt', f'{SPLIT}--heads=2', 1, 'never meet'),
    ('gpt', '--lowrank=attn --merge_every=5', 1, 'merge_reset=True'),
    ('gpt', '--sync=merge --merge_every=5', 1, 'torchrun'),
    ('gpt', '--sync=merge', 2, 'set merge_every'),
    ('gpt', '--lowrank=attn --sync=merge --merge_every=2 --merge_reset=True', 2, 'split=True'),
    ('gpt', '--sync=merge --merge_every=5 --optimizer=galore --basis=svd', 2, 'other bases'),
    ('gpt', f'{BASIS}--merge_every=1 --sync_bits=4', 1,
     'sync_bits=4 on the command line has no effect'),
    ('gpt', f'{BASIS}--merge_every=1 --sync_moments=False', 1, 'no heads have moments to average'),
    ('gpt', f'{FILES["galolte"]} --optimizer=muon --momentum=0 --sync_moments=False', 1,
     'a momentum'),
    *(('gpt', f'{FILES["lte"]} --sync_bits=2 --sync={sync}', 2, 'galolte_2bit.py or local_muon.py')
      for sync in ('step', 'merge')),
    ('gpt', '--train=classifier', 1, 'for images'),
    ('gpt', '--learning_rate=1e-4 --min_lr=1e-2', 1, 'would rise from 0.0001'),
    ('gpt', '--per_layer=True', 1, 'grad_clip=0.0'),
    ('gpt', '--per_layer=True --grad_clip=0 --dtype=float16', 1, 'GradScaler'),
    ('gpt', '--per_layer=True --grad_clip=0 --shard=True', 1, 'per_layer=False'),
    ('gpt', '--optimizer=muon --rank=4', 1, 'has a low rank'),
    ('gpt', '--momentum=0', 1, "it is Muon's"),
    ('gpt', '--optimizer=scale --scale=2.0', 1, 'no basis'),
    ('gpt', '--sync=merge --merge_every=2 --shard=True', 2, "set sync='step' and"),
    ('gpt', 'config/methods/lte.py --heads=2 --learning_rate=1 --shard=True --dtype=float16', 2,
     'whole heads'),
    *(('gpt', f'--optimizer={name} --shard=True', 2, f"optimizer='{name}' wants columns")
      for name in ('fira', 'scale')),
    ('gpt', '--per_layer=True --grad_clip=0 --sync=merge --merge_every=2', 2, "sync='merge' none"),
    # files
    ('gpt', 'config/methods/lte.py config/methods/galore.py', 1, 'lte and galore are two methods'),
    ('gpt', 'config/llama_60m.py', 1, "'config/llama_60m.py' is one of train_llama.py"),
    ('llama', 'config/vit_quickstart.py', 1, 'is one of train_vit.py'),
    ('llama', 'config/llama_1b.py config/methods/lte.py', 1,
     "there are values of learning_rate in config/llama_1b.py for full, galore, galore_lean, "
     "galore_int8, and not for the method 'lte'"),
    ('gpt', 'config/quickstart.py {m_mine}', 1,
     "learning_rate, beta2 in config/quickstart.py for full, local_adamw"),
    ('gpt', 'config/quickstart.py {m_mine}', 1,
     "the method 'mine': add them there, or set --learning_rate=, --beta2="),
    ('gpt', '{ends}', 1, "ends.py' does not run (SystemExit: 0)"),
    ('gpt', '--rank 16', 1, "'--rank' has no value: write --rank=16"),
    ('gpt', '--overwrite config/nowhere.py', 1, "config/nowhere.py' is not there"),
    ('gpt', '--learning_rate=1e400', 1,
     'learning_rate=inf on the command line is no number to compute with'),
    ('gpt', f'--learning_rate={10**400}', 1, 'learning_rate=inf on the command line'),
    ('gpt', '--data_dir=', 1, "data_dir='' names nothing: set --data_dir=data"),
    ('gpt', f'--n_layer={"x" * 5000}', 1,
     f"n_layer='{'x' * 79} on the command line is of type str"),
    ('gpt', '{tables}', 1, 'rank=4.5 for lte in {tables} is of type float, but int'),
    ('gpt', '{list}', 1, 'type list, but str'),
    ('gpt', '{typo}', 1, "did you mean 'learning_rate'"), ('gpt', '{syntax}', 1, 'SyntaxError'),
    ('gpt', '{name}', 1, "name 'many' is not defined")]


@pytest.mark.parametrize('script, words, ranks, said', MISTAKES,
                         ids=[f'{m[0]} {m[1]}' for m in MISTAKES])
def test_a_mistake_is_one_sentence(tmp_path, capsys, monkeypatch, script, words, ranks, said):
    monkeypatch.chdir(HERE)
    paths = write_files(
        tmp_path, tables="rank = {'lte': 4.5}", list="lowrank = ['attn']",
        typo="lerning_rate = {'full': 1.0}", syntax="lowrank = 'attn", name='max_iters = many * 2',
        m_mine="optimizer = 'adamw'", ends='import sys; sys.exit(0)')
    for name, path in paths.items():
        words, said = words.replace(f'{{{name}}}', path), said.replace(f'{{{name}}}', path)
    refused(capsys, lambda: settings_of(SCRIPTS[script], *words.split(), ranks=ranks), said)


def test_a_bare_key_is_true_where_yes_or_no_is_asked():
    found = settings_of(train_gpt, '--compile', '--documents', '--overwrite=False')
    assert (found['compile'], found['documents'], found['overwrite']) == (True, True, False)


def test_all_this_comes_before_torch_is_imported():
    lines = [f'train_{script}.py {words}' for script, words, ranks, _ in MISTAKES
             if ranks == 1 and '{' not in words]
    code = '''if True:
        import contextlib, io, runpy, sys
        for line in sys.argv[1:]:
            sys.argv = line.split()
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    runpy.run_path(sys.argv[0], run_name='__main__')
            except SystemExit as end:
                assert end.code == (0 if line.endswith(('-h', '--help')) else 2), (
                    line, said.getvalue())
            if line.endswith('--help'):
                print(said.getvalue())
        assert not {'torch', 'numpy', 'timm'} & set(sys.modules)'''
    asked = ['train_vit.py config/vit_quickstart.py --help', 'train_gpt.py -h']
    command = [sys.executable, '-c', code, *lines, *asked]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    wrong = subprocess.run(
        [sys.executable, prepare.__file__, 'stdlb'], capture_output=True, text=True)
    assert wrong.returncode == 2 and not wrong.stdout and wrong.stderr.count('\n') == 1
    assert ran.stdout.startswith('Trains a vision transformer') and '\n# optimizer\n' in ran.stdout
    assert "\nfactors = 'both'  # 'both' A and B train; 'B' alone (LoRA-FA)" in ran.stdout
    assert ran.stdout.rstrip().endswith('wandb_log = False  # needs the package wandb')


def test_every_config_file_goes_with_every_method_it_has_a_rate_for():
    count = 0
    for name in sorted({*os.listdir(f'{HERE}/config')} - {'__init__.py', 'methods', '__pycache__'}):
        path = f'{HERE}/config/{name}'
        with open(path, encoding='utf-8') as file:
            head = list(itertools.takewhile(lambda line: line.startswith('# '), file))
        assert (len(head) > 2 and any('train_' in line for line in head[1:])
                and ':' in head[-1]), name
        assert all(head[i - 1].endswith('TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \\\n')
                   for i, line in enumerate(head) if line.startswith('#   train_')), name
        script = SCRIPTS.get(name.split('_')[0], train_gpt)
        rates = runpy.run_path(path, init_globals=script.defaults)['learning_rate']
        for other in rates if isinstance(rates, dict) else METHODS:
            settings = settings_of(script, path, FILES[other], ranks=1 if other in ALONE else 4)
            assert settings['out_dir'] == f'out/{name[:-3]}'
            assert settings['learning_rate'] == (rates[other] if isinstance(rates, dict) else rates)
            count += 1
    assert count > 40


def test_optimizers_are_those_of_the_methods_and_do_what_these_use():
    for name, path in FILES.items():
        own = {'optimizer': 'adamw', 'lowrank': '', **config.defaults(runpy.run_path(path))}
        uses = {'momentum'} & own.keys()
        if own['lowrank'] and own['factors'] == 'basis':
            uses.add('basis')
        elif 'rank' in own and not own['lowrank']:
            uses.add('rank')
        assert uses <= config.USES[own['optimizer']], name
    assert {*config.USES} == {*rules.PROJECTED, *rules.FULL, *rules.INSIDE, 'adamw'}


def test_what_tables_set_and_whose_rate_it_is_is_said(capsys):
    files = [f'{HERE}/config/quickstart.py', FILES['galore']]
    settings_of(train_gpt, *files, '--learning_rate=0.5')
    assert capsys.readouterr().out == (
        "of the tables for galore: rank=32, basis_every=50, beta2=0.999\n")
    settings_of(train_gpt, FILES['galore'])
    assert capsys.readouterr().out == (
        "learning_rate=0.0006 is the script's own, for full rank: set one for galore\n")


def test_a_log_for_wandb_wants_the_package_and_not_a_folder_of_that_name(
        tmp_path, monkeypatch, capsys):
    (tmp_path / 'some_folder').mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert (config.is_installed('torch')
            and not any(map(config.is_installed, ('some_folder', 'no_package'))))
    monkeypatch.setattr(config, 'is_installed', lambda package: package != 'wandb')
    for script in SCRIPTS.values():
        refused(capsys, lambda: settings_of(script, '--wandb_log=True'), 'pip install wandb')


def test_every_number_of_a_script_has_a_least_value():
    numbers = {key for script in (*SCRIPTS.values(), sample)
               for key, value in script.defaults.items() if type(value) in (int, float)}
    assert numbers - config.LEAST.keys() - config.CHOICES.keys() == {'alpha'}  # see the layer


@pytest.mark.parametrize('rule, scale', [('galore', 0.25), ('muon', 1.0)])
def test_a_scale_that_is_not_given_is_that_of_the_rule(rule, scale):
    optimizer = galore.LowRankAdamW(
        put(linears(), rank=2, factors='basis', merge_every=1), rule=rule)
    assert [group['scale'] for group in optimizer.param_groups if 'inside' in group] == [scale]


def test_a_mistake_in_code_is_no_refusal(capsys):
    with pytest.raises(SystemExit), config.refusals():
        raise ValueError(
            'a sentence')
    assert capsys.readouterr().err == 'error: a sentence\n'

    def of_text():
        int('x')

    def of_count():
        a, b = (1,)
    for mistake in (of_text, of_count):
        with pytest.raises(ValueError), config.refusals():
            mistake()


def test_what_may_not_change_has_to_be_the_same_on_resume():
    checkpoint = {'settings': {**train_gpt.defaults, 'train': 'all'}, 'optimizer': {}}
    assert MAY_CHANGE <= {*train_gpt.defaults, *train_vit.defaults}
    assert MAY_CHANGE.isdisjoint(  # other batches, or another function of the same tensors
        'seed dataset documents block_size augment alpha rank heads factors split lowrank '
        'merge_every merge_reset sync optimizer param_dtype frozen_bits param_bits state_bits '
        'model n_layer n_head n_embd vocab_size img_size patch_size'.split())
    for key in train_gpt.defaults:
        settings = {**train_gpt.defaults, key: 'something else'}
        if key in ('batch_size', 'gradient_accumulation_steps'):  # both, to the same number of rows
            with pytest.raises(ValueError, match='12 rows a step'):
                refuse_other_settings(settings, checkpoint)
            settings.update(batch_size=6, gradient_accumulation_steps=2)
        if key in MAY_CHANGE:
            refuse_other_settings(settings, checkpoint)
            assert settings['train'] == 'all'  # 'auto' is what the run made of it
        else:
            with pytest.raises(
                    ValueError, match=f"trained with {key}=.*this run says 'something else'"):
                refuse_other_settings(settings, checkpoint)
    with pytest.raises(ValueError, match='another script, .*n_mlp'):
        refuse_other_settings({**train_gpt.defaults, 'n_mlp': None}, checkpoint)


# -----------------------------------------------------------------------------
# files that are read: shards, checkpoints, weights. What writes shards comes at the end


@pytest.fixture(params=['text', 'images'])
def data(request, root):
    if request.param == 'text':
        return prepare.Tokens('mine', 'train', 64, root)
    return prepare.Images('pathmnist', 'train', root)


def rows_of(batch):
    return [x.numpy().tobytes() + y.numpy().tobytes() for x, y in zip(*batch)]


def test_every_item_once_an_epoch_in_the_same_order_on_any_number_of_ranks(data):
    count, orders = int(data.first[-1]), {}
    everything = rows_of(data.items(np.arange(count)))  # line numbers, or noise: all are different
    assert len(set(everything)) == count and len(data.shards) > 2
    for epoch, world_size in ((0, 1), (0, 2), (1, 1), (1, 3)):
        # batches do not divide the epoch: what counts is the row of items
        rows, first = [], epoch * count
        for step in range(first // 12, (first + count) // 12 + 1):
            ranks = [rows_of(data.batch(12, step, seed=5,
                                        rows=processes.rows_of(12, 1, rank, world_size)))
                     for rank in range(world_size)]
            rows += [ranks[j % world_size][j // world_size] for j in range(12)]
        order = rows[first % 12:][:count]
        assert sorted(order) == sorted(everything) and order == orders.setdefault(epoch, order)
    assert orders[0] != orders[1] != everything


def test_a_batch_depends_on_its_arguments_alone(data):
    first = rows_of(data.batch(8, 3, 1, accumulation=2, seed=1))
    assert first == rows_of(data.batch(8, 3, 1, accumulation=2, seed=1))
    # the seventh
    assert first == rows_of(data.batch(8, 7, seed=1)) != rows_of(data.batch(8, 7, seed=2))
    whole = rows_of(data.batch(24, 2, seed=3))
    for heads, world_size in ((1, 1), (1, 2), (1, 3), (4, 1), (2, 2), (1, 4)):
        # a row goes to the same of all heads, whatever the number of ranks
        for rank in range(world_size):
            rows = rows_of(data.batch(24, 2, seed=3,
                                      rows=processes.rows_of(24, heads * world_size, rank,
                                                              world_size)))
            parts = [whole[head * world_size + rank::heads * world_size] for head in range(heads)]
            assert rows == sum(parts, [])
    for batch_size, heads, world, said in (
            (8, 4, 3, 'heads=4 do not split over 3 ranks'), (8, 6, 3, 'over 2 heads on each of 3'),
            (8, 1, 3, 'over 1 heads on each of 3 ranks: set a multiple of 3')):
        with pytest.raises(ValueError, match=said):
            processes.rows_of(batch_size, heads, 0, world)


def test_an_order_is_a_permutation_another_one_in_each_epoch_and_stays_what_it_is():
    assert prepare.order_of(8, 1337, 1).tolist() == [3, 7, 0, 1, 6, 5, 2, 4]
    for size in (1, 2, 1000):
        orders = [prepare.order_of(size, seed, epoch)
                  for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
        assert all(np.array_equal(np.sort(order), np.arange(size)) for order in orders)
        assert (size < 1000
                or np.abs(np.corrcoef([np.arange(size), *orders]) - np.eye(5)).max() < 0.15)


def test_fixed_batches_spread_over_all_windows_and_hold_every_image_once(root):
    text, images = (prepare.Tokens('mine', 'train', 64, root),
                    prepare.Images('pathmnist', 'test', root))
    x, y = text.items(np.arange(text.num_windows))
    windows = [shard[i * 64:i * 64 + 65]
               for shard in text.shards for i in range((len(shard) - 1) // 64)]
    assert x.dtype == y.dtype == torch.int64 and len(windows) == text.num_windows
    assert (np.array_equal(torch.cat([x, y[:, -1:]], 1), windows)
            and torch.equal(x[:, 1:], y[:, :-1]))
    place, everything = ({row: i for i, row in enumerate(rows_of((x, y)))},
                         rows_of(images.fixed_batch(0, 41)))
    # of 39: the third rank has none
    for world_size, size in itertools.product((1, 2, 3), (6, 12, 39)):
        rows = [None] * 41
        for index, rank in itertools.product(range(math.ceil(41 / size)), range(world_size)):
            batch = images.fixed_batch(index, size, rank, world_size)
            assert batch[0].shape[1:] == (3, 28, 28)
            rows[index * size + rank:(index + 1) * size:world_size] = rows_of(batch)
        assert rows == everything
        seen = [None] * 30  # five batches of six: one window in each thirtieth of the split
        for index, rank in itertools.product(range(5), range(world_size)):
            mine = rows_of(text.fixed_batch(index, 5, 6, rank, world_size))
            seen[index * 6 + rank:(index + 1) * 6:world_size] = [place[row] for row in mine]
        off = np.array(seen) * 30 / text.num_windows - np.arange(30)
        assert text.num_windows > 300 and np.abs(off).max() < 1, seen


@pytest.mark.parametrize('vocab_size, item', [(257, 2), (65536, 2), (65537, 4)])
def test_tokens_of_any_vocabulary_round_trip(tmp_path, vocab_size, item):
    encoding = SimpleNamespace(  # its tokens: the numbers in the text
        eot_token=vocab_size - 1, begin=(), folder=None,
        encode_many=lambda texts: [np.array(text.split(), np.uint32) for text in texts])
    rows = [np.random.default_rng(i).integers(0, vocab_size - 1, 100) for i in range(50)]
    documents = [prepare.Document(' '.join(map(str, row)), split=split)
                 for split in ('train', 'val') for row in rows]
    settings = {'limit': None, 'shard_tokens': 1000, 'vocab_size': vocab_size}
    fill = functools.partial(prepare.write_tokens, documents=lambda: documents, encoding=encoding,
                             val_share=0)
    prepare.write(tmp_path / 'it', settings, fill, overwrite=False)
    for split in ('train', 'val'):
        data = prepare.Tokens('it', split, 8, tmp_path)
        assert ([len(shard) for shard in data.shards] == [1010] * 5
                and data.shards[0].dtype == f'<u{item}')
        assert np.array_equal(np.concatenate(data.shards),
                              sum([[*row, vocab_size - 1] for row in rows], []))
        assert data.meta['bytes'][split] == sum(len(x.text) for x in documents if x.split == split)


def test_a_shard_is_a_header_and_items_with_a_checksum(data, root):
    image = data.meta.get('kind') == 'images'  # the label, one byte, and three channels
    for shard in data.meta['shards']:
        content = (root / ('pathmnist' if image else 'mine') / shard['file']).read_bytes()
        item, items = (1 + 3 * 28 * 28, shard['images']) if image else (2, shard['tokens'])
        assert content[:32] == b'nLRshard' + struct.pack('<IIQQ', 1, item, items, 0)
        assert (len(content) == 32 + item * items
                and hashlib.sha256(content).hexdigest() == shard['sha256'])
    assert (not image
            or content[32] == prepare.Images('pathmnist', 'test', root).fixed_batch(0, 1)[1].item())


def test_shifted_digits_are_the_digits_under_another_look(root):
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits
    counts, theirs = 0, load_digits()
    for split in COUNTS:
        digits, shifted = (prepare.Images(name, split, root) for name in prepare.DIGITS)
        (x, y), (x2, y2) = digits.fixed_batch(0, 2000), shifted.fixed_batch(0, 2000)
        assert (torch.equal(y, y2) and y.bincount().min() > 20
                and x.shape == x2.shape == (len(y), 3, 32, 32))
        # coloured
        assert torch.equal(x[:, 0], x[:, 1]) and (x2.amax(1) != x2.amin(1)).any((1, 2)).all()
        # inverted, and turned by 30 degrees
        channel = x2[:, 0].float()
        ink = 1 - channel / channel.amax((1, 2), keepdim=True)
        turned = rotate(x[:, 0].numpy() / 255, 30, (2, 1), reshape=False, order=1)
        assert abs(ink.numpy() - turned).max() < 0.03
        # scikit-learn's pixels with its labels: a pixel is about the middle of 4 x 4 of ours
        small = F.avg_pool2d(x[:, :1, 1:, 1:].float(), 2, 4).flatten(1) / 255 * 16
        nearest = torch.cdist(small, torch.from_numpy(theirs.data).float()).argmin(1)
        assert (theirs.target[nearest] == y.numpy()).mean() > 0.99
        counts += len(y)
    assert counts == 1797 and digits.task == 'multi-class' and digits.classes == list('0123456789')


def cut(begin, end):
    return lambda whole: whole[begin:end]


def flipped(place):
    """One bit of a byte, at a number or a share of the file."""
    def damage(whole):
        at = place if isinstance(place, int) else int(place * len(whole))
        return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:]
    return damage


def holding(content):
    return lambda whole: content


@pytest.fixture(scope='session')
def readers(root, tmp_path_factory):
    """{name: (a whole file of every kind that is read, its reader)}"""
    folder = tmp_path_factory.mktemp('readers')
    words = method('galolte', '--n_layer=1')
    train('gpt', root, folder / 'gpt', *words)
    train('vit', root, folder / 'vit', '--n_layer=1')
    shutil.copytree(root / 'tiny', folder / 'tiny')
    shutil.copytree(f'{GOLDEN}/llama3', folder / 'llama3')
    torch.save(saved(folder / 'vit', 'best.pt')['model'], folder / 'timm.pt')
    safetensors.torch.save_file(tiny_vit().state_dict(), folder / 'vit.safetensors')
    archive(folder, counts=FEW)
    numbered(folder / 'a.txt', 300)
    (folder / 'a.jsonl').write_text(
        ''.join(f'{{"text": "line {i}", "n": {i}}}\n' for i in range(99)))
    (folder / 'a.parquet').write_bytes(parquet(text=[f'text {i}' for i in range(99)]))

    def resumed(path):
        run, _ = built('gpt', root, folder / 'gpt', *words, checkpoint=load_checkpoint(path))
        assert run.optimizer.state

    def weights(path):
        shape = dict(model=None, n_layer=None, n_embd=None, n_head=None, img_size=28, patch_size=14)
        hub.read_vit(path, shape, ['normal', 'pneumonia'])

    def model(path):
        loaded(os.path.dirname(path))

    def tokens(path):
        prepare.main(['verify', 'tiny', '--data_dir', str(folder)])
        prepare.Tokens('tiny', 'train', 8, folder).batch(4, 0)

    def prepared(name, *words):
        def read(path):
            before = files_of(folder / 'out' / name)
            try:
                prepare.main([*words, '--data_dir', str(folder / 'out'), '--name', name,
                              '--overwrite'])
            except prepare.DataError:  # what was prepared stays until the new one is whole
                assert files_of(folder / 'out' / name) == before
                raise
        return read
    text = {name: prepared(name, 'text', '--tokenizer', 'bytes', '--input', str(folder / name))
            for name in ('a.txt', 'a.jsonl', 'a.parquet')}
    found = {
        'gpt/ckpt.pt': resumed, 'vit/best.pt': weights, 'timm.pt': weights,
        'vit.safetensors': weights, 'tiny/train_000000.bin': tokens, 'tiny/meta.json': tokens,
        SHARDED: model, INDEX: model, 'llama3/config.json': model,
        NPZ: prepared('archive', 'pathmnist', '--path', str(folder)), **text}
    for name, read in found.items():
        read(str(folder / name))  # it is whole
    return {name: (folder / name, read) for name, read in found.items()}


SHARD, NPZ, CKPT = 'tiny/train_000000.bin', 'pathmnist.npz', 'gpt/ckpt.pt'
SHARDED, INDEX = 'llama3/model-00002-of-00002.safetensors', 'llama3/model.safetensors.index.json'
FEW = {'train': 70, 'val': 30, 'test': 41}  # images
PIXELS = np.zeros((30, 28, 28, 3), np.uint8)
# a file, its damage: of bytes, None for none at all, or other things in it; what is said
DAMAGES = [
    # checkpoints and weights
    (CKPT, flipped(0.5), 'is damaged'), (CKPT, cut(0, -99), 'is damaged'),
    (CKPT, None, 'train first'), (CKPT, {'other': 1}, 'not a checkpoint of this project'),
    (CKPT, {'format': 4}, 'format 4, here 8'),
    (CKPT, {'model': nn.Linear(1, 1)}, 'holds other objects'),
    ('vit/best.pt', flipped(0.5), 'is damaged'),
    ('timm.pt', cut(0, 200), 'is damaged'), ('vit.safetensors', cut(0, 200), 'is damaged'),
    (SHARDED, cut(0, 3000), 'is damaged'), (SHARDED, None, 'is missing'),
    (INDEX, None, 'no model.safetensors'), (INDEX, holding(b'[]'), 'is damaged'),
    (INDEX, holding(b'{"weight_map": {"x": "../x"}}'), 'is missing'),
    (INDEX, {'weight_map': []}, r'weight_map=\[\], which is no dict'),
    ('llama3/config.json', None, 'no config.json'),
    *(('llama3/config.json', changes, said) for changes, said in (  # that is not ours
        ({'model_type': 'gemma'}, "model_type='gemma'"), ({'hidden_act': 'gelu'}, 'hidden_act'),
        ({'attention_bias': True}, 'attention_bias'),
        ({'rope_scaling': {'rope_type': 'yarn'}}, 'yarn'),
        ({'rope_scaling': None, 'rope_parameters': {'rope_type': 'llama3', 'factor': 2.0}},
         "rope_scaling=\\['llama3'\\]"),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
        ({'rms_norm_eps': None}, 'rms_norm_eps'),
        ({'layer_types': ['linear_attention']}, 'layer_types'), ({'hidden_size': 0}, 'hidden_size'),
        ({'num_hidden_layers': '2'}, "num_hidden_layers='2', which is no int"),
        ({'intermediate_size': 25}, 'of shape'), ({'num_hidden_layers': 1}, 'layers.1'))),
    # shards
    (SHARD, flipped(16), 'damaged .it does not begin as .*--overwrite'),
    (SHARD, cut(0, -1), 'damaged .*--overwrite'), (SHARD, None, 'is missing.*--overwrite'),
    (SHARD, flipped(99), 'train_000000.bin.*checksum.*--overwrite'),
    ('tiny/meta.json', cut(0, 30), 'is damaged'),
    ('tiny/meta.json', {'vocab_size': '257'}, "vocab_size='257', which is no int"),
    ('tiny/meta.json', {'shards': [{'file': 1}]}, 'file=1, which is no str'),
    ('tiny/meta.json', {'shards': [{'file': 'a'}]}, 'it has no split'),
    # what prepare reads
    ('a.txt', holding(b' \n\n'), 'is empty'),
    ('a.txt', holding(b'x' * 100_000 + b'\0'), 'is binary'),
    ('a.jsonl', holding(b'{"text": "x"}\n{"txt": 1}\n'), 'line 2 of'),
    ('a.parquet', lambda whole: parquet(text=[1, 2]), "a.parquet.*'text' of strings .it holds int"),
    (NPZ, flipped(0.5), 'damaged'), (NPZ, dict(train_images=None), 'no archive of MedMNIST'),
    (NPZ, dict(val_images=PIXELS[:, :14, :14]), r'no archive of MedMNIST of this size'),
    (NPZ, dict(val_images=PIXELS.repeat(2, 1)),
     r'no archive of .* this size .val images are larger'),
    (NPZ, dict(val_labels=np.full((30, 1), 9)), 'val labels up to 9, not below 9')]


@pytest.mark.parametrize('name, damage, said', DAMAGES)
def test_a_damaged_file_is_refused_by_name(readers, name, damage, said):
    path, read = readers[name]
    whole = path.read_bytes()
    try:
        if callable(damage):
            path.write_bytes(damage(whole))
        elif damage is None:
            path.unlink()
        elif path.suffix == '.npz':
            archive(path.parent, counts=FEW, **damage)
        elif path.suffix == '.json':
            path.write_text(json.dumps({**json.loads(whole), **damage}))
        else:
            keep = {} if 'other' in damage else torch.load(path, weights_only=True)
            torch.save({**keep, **damage}, path)
        with pytest.raises((ValueError, OSError), match=said) as refusal:
            read(str(path))
        names_it(refusal.value, path)
    finally:
        path.write_bytes(whole)


def names_it(error, path):
    said = str(error)
    assert (path.name in said or path.parent.name in said) and '\n' not in said, said


def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_old_one(tmp_path):
    class Interrupts:
        def __reduce__(self):
            raise KeyboardInterrupt
    path = f'{tmp_path}/ckpt.pt'
    save_checkpoint(path, {'step': 1})
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {'step': 2, 'weights': torch.ones(9), 'more': Interrupts()})
    assert torch.load(path) == {'step': 1}
    with pytest.raises(FileNotFoundError, match='or take ckpt.pt beside it'):
        load_checkpoint(f'{tmp_path}/best.pt')


# -----------------------------------------------------------------------------
# models


@pytest.mark.parametrize('make', [tiny_gpt, tiny_llama])
def test_a_model_may_recompute_what_its_backward_pass_needs(make):
    idx = tokens_of(2, 16)
    nets, kept = [make(checkpointing=checkpointing) for checkpointing in (False, True)], [0, 0]
    for i, net in enumerate(nets):
        torch.manual_seed(1)
        lowrank.apply_mhlora(net, ('attn', 'mlp'), 2, 2)

        def count(x):
            kept[i] += 1
            return x
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = net(idx, idx.roll(-1, 1))  # of the token before: not zero
        loss.backward()
    assert kept[1] < kept[0] / 2
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a.grad, b.grad) if a.requires_grad else b.grad is None


def test_a_vit_may_recompute_what_its_backward_pass_needs(root, tmp_path):
    kept = []
    for checkpointing in (False, True):
        run, data = built('vit', root, tmp_path, f'--checkpointing={checkpointing}')
        images, _ = batch_of(run, data, 0)
        saved_ones = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: saved_ones.append(x) or x, lambda x: x):
            train_vit.logits_of(run, images)
        kept.append(len(saved_ones))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize('make', [tiny_gpt, tiny_llama])
def test_a_model_starts_at_the_loss_of_guessing_with_the_papers_deviations(make):
    net = make(vocab_size=97, n_embd=64, n_layer=8)
    assert abs(net(tokens_of(4, 16, high=97), tokens_of(4, 16, high=97, seed=2)).item()
               - math.log(97)) < 0.2
    for name, p in net.named_parameters():
        if p.dim() == 2:  # GPT-2: the residual stream sums 2 L projections
            std = 0.02 / (4 if name.endswith('c_proj.weight') else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (p == float(not name.endswith('bias'))).all(), name


@pytest.mark.parametrize('one_piece', [2**26, 2**13])  # logits; more go in chunks
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_is_the_cross_entropy_of_what_counts(one_piece, dtype, tolerance):
    tokens, words = 2100, 40
    torch.manual_seed(0)
    heads = [nn.Linear(4, words, bias=False)]
    x, targets = torch.randn(1, tokens, 4), tokens_of(1, tokens, high=words)
    targets[0, :300] = -100
    heads.append(copy.deepcopy(heads[0]).to(dtype))
    inputs = [x.to(kind, copy=True).requires_grad_() for kind in (torch.float32, dtype)]
    losses = [F.cross_entropy(heads[0](some), some_targets, reduction='sum')  # some at a time
              for some, some_targets in zip(inputs[0][0].split(300), targets[0].split(300))]
    exact = sum(losses) / (tokens - 300)
    exact.backward()
    with mock.patch.object(models, 'ONE_PIECE', one_piece):
        loss = models.language_loss(heads[1], inputs[1], targets)
        loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=min(tolerance, 1e-3))
    for wanted, got in (inputs, (head.weight for head in heads)):
        assert (got.grad - wanted.grad).norm() < tolerance * wanted.grad.norm()


def test_shapes_have_the_papers_numbers_of_parameters():
    width, depth, many, hidden = models.SIZES['7b']
    with torch.device('meta'):
        llama = models.Llama(models.LlamaConfig(256, 32000, width, depth, many, hidden, many))
        gpt, untied, workers = (models.GPT(models.GPTConfig(block_size=512)) for _ in range(3))
        vit = timm.create_model('vit_base_patch16_224', num_classes=9)
    full = lowrank.count_parameters(gpt)['trainable']
    lowrank.apply_mhlora(gpt, ('attn',), heads=4, rank=4)  # of the study
    assert (lowrank.count_parameters(llama)['total'], full) == (6_738_415_616, 124_046_592)
    assert 1 - lowrank.count_parameters(gpt)['trainable'] / full == pytest.approx(0.221, abs=5e-4)
    lowrank.apply_mhlora(untied, ('logit',), heads=4, rank=2)  # the embedding goes on training
    counts, heads = lowrank.count_parameters(untied), 4 * 2 * (768 + 50257)
    assert (counts['heads'], counts['total'], counts['trainable']) == (
        heads, 768 * 50257 + full + heads, full + heads)
    lowrank.apply_mhlora(workers, ('attn',), heads=4, rank=4, factors='basis', split=True,
                         merge_every=2)
    counts, heads = lowrank.count_parameters(workers), 4 * 4 * 12 * (2304 + 768)
    assert (counts['heads'], counts['trainable']) == (heads, full - 12 * (2304 + 768) * 768 + heads)
    lowrank.apply_mhlora(llama, rank=8, factors='basis', merge_every=1)  # every weight moves
    assert lowrank.count_parameters(llama)['trainable'] == 6_738_415_616
    hub.put_heads(vit, {**train_vit.defaults, 'lowrank': 'q,v', 'rank': 4})  # of MeLo
    lowrank.freeze_rest(vit, ('logit',))
    counts = lowrank.count_parameters(vit)
    assert (counts['heads'], counts['trainable']) == (147_456, 147_456 + 769 * 9)


def continued(net, idx, count, **how):
    return torch.cat([idx, *itertools.islice(models.following(net, idx, **how), count)], 1)


def test_text_continues_inside_the_block_the_vocabulary_and_the_k_most_likely():
    net, idx = tiny_gpt(), tokens_of(2, 14)
    for p in net.parameters():
        p.data.mul_(5)
    best = continued(net, idx, 5, temperature=0)
    for t in range(14, 19):  # the last 16 tokens are what it sees
        assert torch.equal(best[:, t], net(best[:, max(0, t - 16):t])[:, -1].argmax(-1))

    def drawn(**options):
        return continued(net, idx, 5, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(drawn(top_k=1), best) and torch.equal(drawn(temperature=1e-6), best)
    three = drawn(top_k=3, temperature=9.0)
    for t in range(14, 19):
        likely = net(three[:, max(0, t - 16):t])[:, -1].topk(3).indices
        assert (three[:, t, None] == likely).any(1).all()
    assert not torch.equal(three, best)
    few = drawn(vocab_size=7, temperature=9.0)
    assert (torch.equal(few[:, :14], idx) and few[:, 14:].max() < 7
            and not torch.equal(drawn(), best))


@pytest.mark.parametrize('place', [*range(5), 'attention'])
def test_dropout_is_where_gpt2_has_it(place):
    """Embeddings, and in each block attention, its output and that of the MLP. Here at one place
    alone."""
    net, idx, places = tiny_gpt(dropout=0.5), tokens_of(2, 16), []
    attend, dropout = F.scaled_dot_product_attention, F.dropout

    def attend_once(*args, dropout_p, **kwargs):
        return attend(*args, dropout_p=dropout_p * (place == 'attention'), **kwargs)

    def drop_once(x, p, training):
        places.append(x)
        return dropout(x, p, training and len(places) - 1 == place)
    with mock.patch.object(F, 'dropout', drop_once):
        with mock.patch.object(F, 'scaled_dot_product_attention', attend_once):
            trained = net(idx, tokens_of(2, 16, seed=2))
    assert len(places) == 5 and trained.item() != net.eval()(idx, tokens_of(2, 16, seed=2)).item()


def test_dropout_is_another_in_each_step_and_on_each_rank_and_the_same_again(root, tmp_path):
    run, data = built('gpt', root, tmp_path, '--dropout=0.2')
    for group in run.optimizer.param_groups:
        group['lr'] = 0.0

    def loss(step, rank):
        run.rank = rank
        return train_gpt.train_step(run, step, lambda i: data.batch(8, 0, i))[0].item()
    found = [loss(step, rank) for step in range(3) for rank in range(3)]
    assert (len({*found}) == 9
            and found == [loss(step, rank) for step in range(3) for rank in range(3)])


# -----------------------------------------------------------------------------
# every method, as textbook.py has it


def test_the_textbook_has_every_method_and_no_other():
    assert sorted(textbook.METHODS) == sorted(METHODS)


def test_the_textbook_prints_a_row_for_each_method_and_where_the_fast_code_stands(capsys):
    with mock.patch.object(textbook, 'toy', functools.partial(textbook.toy, steps=21)):
        textbook.main()
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert ([row.split()[0] for row in rows] == list(textbook.METHODS)
            and {*map(len, rows)} == {len(head)})
    for row in rows:
        trained, state, sent, first, end = map(float, row.split()[1:])
        assert trained > 0 and state > 0 and sent > 0 and end < first < math.log(32) + 0.1
    assert ('rank nothing' in last
            and all(f'{name}.py' in last for name in ('lowrank', 'galore', 'rules')))


def svd_of_one_sign(G, full_matrices, svd=torch.linalg.svd):
    """The decomposition that G.T has, too: each pair of vectors may change its sign."""
    U, S, Vh = svd(G, full_matrices=full_matrices)
    sign = (U.sum(0) + Vh.sum(1)).sign()
    return torch.return_types.linalg_svd((U * sign, S, Vh * sign[:, None]))


def book_of(plain, model, optimizer, settings, ranks=1):
    """
    What textbook.train takes for a run, from what it begins with: (forward, start, matrices,
    method).

    plain: a model without anything low-rank, as a form; what is drawn at random in the run is
    handed over.
    """
    s, trained = SimpleNamespace(**settings), {p for p in model.parameters() if p.requires_grad}
    layers = {f'{name}.weight': layer for name, layer in lowrank.named_layers(model).items()}
    state, own = lowrank.merged_state_dict(model), dict(model.named_parameters())
    names = {*dict(plain.named_parameters()), *layers}
    trains = {name: state[name].clone() for name in state
              if name in names and (name in layers or own[name] in trained)}
    frozen = {name: state[name].clone() for name in names - trains.keys()}
    inside = [name for name in trains
              if trains[name].dim() == 2 and ('attn' in name or 'mlp' in name)]
    due, rules, drawn = {}, {}, []
    blocks = {name: re.match(r'.*?\.\d+', name)[0] for name in layers if s.factors == 'basis'}
    turns = list(dict.fromkeys(blocks.values()))
    for name, block in blocks.items():  # blocks take turns, at merges
        turn = turns.index(block) * (s.basis_every // s.merge_every) // len(turns)
        due[name] = turn * s.merge_every
    for name in trains if s.optimizer == 'scale' else ():
        if 'head' in name or 'wte' in name:  # GPT's embedding is its output layer
            rules[name] = functools.partial(textbook.scale, momentum=0.9)
        elif 'wpe' in name or 'embed_tokens' in name:
            rules[name] = functools.partial(textbook.scale, dim=0)
    rules = {name: rule for name, rule in rules.items() if trains[name].dim() == 2}
    for name in layers or inside if s.optimizer == 'muon' else ():
        if name.endswith(('c_attn.weight', 'qkv.weight')):
            rule = textbook.galore if layers else textbook.muon
            rules[name] = functools.partial(rule, stacked=3)

    def forward(W, x):
        """Logits of tokens, or of images in [0, 255], as timm normalises them."""
        if x.dim() == 4:
            x = (x.double() / 255 - 0.5).expand(-1, 3, -1, -1) / 0.5
        return functional_call(plain, {**frozen, **W}, (x,), tie_weights='lm_head.weight' not in W)

    def draw(rows, rank, name, t, head=None):
        if head is not None:
            A = layers[name].A[head].detach()
            drawn.append(A[0, 0].item())
            assert len(drawn) == len({*drawn})  # every draw is another
            return A.T
        if name in layers:
            return layers[name].basis.clone()
        p = own[name]
        if s.optimizer == 'apollo':
            return galore.gaussian(rows, rank, p, optimizer._seed(p, t // s.basis_every))
        return galore.gaussian(rows, rank, p, optimizer._seed(p, t))

    def rate(t):
        part = min((t - s.warmup_iters) / (s.max_iters - s.warmup_iters), 1)
        if t < s.warmup_iters:
            return s.learning_rate * (t + 1) / (s.warmup_iters + 1)
        return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(math.pi * part)) / 2
    method = {key: settings[key] for key in textbook.DEFAULTS.keys() & settings} | dict(
        factors=s.factors if layers else '', split=bool(layers) and s.split and s.heads > 1,
        workers=ranks if s.sync == 'merge' else 1, learning_rate=rate, draw=draw, due=due,
        rules=rules, no_decay=('pos_embed', 'cls_token'))
    return forward, trains, [*layers] or inside, method


def merged_in_book(start, matrices, method, workers):
    """{name: W} that is evaluated: what workers compute with, averaged."""
    s = textbook.plan(start, matrices, method)
    weights = [textbook.full(w, s) for w in workers]
    return {name: sum(W[name] for W in weights) / len(weights) for name in start}


class Reused(nn.Module):
    """A wide layer that is called twice, and two tall ones that share their weight."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(257, 16), nn.Linear(24, 257, bias=False)
        tied = nn.ModuleList(nn.Linear(12, 24, bias=False) for _ in range(2))
        tied[1].weight = tied[0].weight
        self.h = nn.ModuleList([nn.ModuleDict(dict(attn=nn.Linear(16, 12), mlp=tied))])
        self.double()

    def forward(self, idx, targets=None):
        x, attn, (first, second) = self.wte(idx), self.h[0]['attn'], self.h[0]['mlp']
        x = torch.tanh(attn(x)) + attn(torch.sin(x))
        logits = self.head(torch.tanh(first(x)) + second(x.square()))
        return logits if targets is None else F.cross_entropy(
            logits.flatten(0, 1), targets.flatten())


def test_heads_compute_the_same_in_a_loop_and_under_autocast():
    torch.manual_seed(0)
    seen, heads = [], lowrank.MHLoRALinear(nn.Linear(7, 5).double(), 3, 4, 2.0).state_dict()
    heads['B'].normal_(std=0.3)
    for in_turn, autocast in itertools.product((False, True), (False, True)):
        one, x = lowrank.MHLoRALinear(nn.Linear(7, 5).double(), 3, 4, 2.0), normal(2, 6, 7)
        one.load_state_dict(heads)
        if autocast:  # passes float64 over
            one, x = one.float(), x.float()
        net = nn.Sequential(one)
        if in_turn:
            bench.loop_over_heads(net)
        assert isinstance(net[0], bench.OneAfterTheOther) == in_turn
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = net(x.requires_grad_())
        y.double().square().sum().backward()
        seen.append([y, x.grad, one.A.grad, one.B.grad, one.bias.grad])
        for got, wanted in zip(seen[-1], seen[0]):
            assert (got - wanted).norm() < (2e-2 if autocast else 1e-13) * wanted.norm()


@pytest.mark.parametrize('make, targets, layers, settings', [
    (tiny_gpt, 'attn,mlp,logit', 9, {}), (tiny_llama, 'attn,mlp,logit', 15, dict(split=True)),
    (tiny_vit, 'attn,mlp,logit', 9, dict(split=True, merge_reset=True)), (tiny_gpt, 'c_fc', 2, {}),
    (tiny_vit, 'q,v', 4, dict(split=True)), (tiny_vit, 'k', 2, {}), (tiny_vit, 'logit', 1, {}),
    (tiny_vit, 'qkv', 2, {}), (tiny_vit, 'attn,q', 8, {}),
    (tiny_llama, 'attn', 8, dict(factors='basis', split=True))])
def test_a_merge_keeps_the_function_and_evaluation_changes_no_weight(
        make, targets, layers, settings):
    net, plain = make(), make()
    x = normal(4, 3, 28, 28) if make is tiny_vit else tokens_of(4, 16)
    if {'q', 'k'} & {*targets.split(',')}:
        hub.split_qkv(net)
    alpha = None if 'factors' in settings else 6.0
    names = lowrank.apply_mhlora(net, targets.split(','), 2, 3, alpha, merge_every=2, **settings)
    assert len(names) == len(lowrank.lowrank_layers(net)) == layers
    close(net(x), plain(x))
    for step in range(2):  # the second time earlier values are taken off
        for layer in lowrank.lowrank_layers(net):
            if layer.factors == 'basis':
                layer.basis.copy_(torch.linalg.qr(normal(*layer.basis.shape, seed=step))[0])
            for factor in lowrank.heads_of(layer):
                factor.data = factor.data * -1.5 + 0.02 * normal(*factor.shape, seed=step)
        state = copy.deepcopy(net.state_dict())
        plain.load_state_dict(hub.fuse_qkv(lowrank.merged_state_dict(net)))
        with lowrank.averaged_heads(net):
            before = net.eval()(x)
        net.train()
        assert same_state(dict(net.state_dict()), dict(state))
        assert not torch.allclose(before, make()(x), atol=1e-5)
        for _ in range(2):  # the second time nothing is left to merge
            lowrank.merge(net)
            with lowrank.averaged_heads(net):
                close(net(x), before)
        # an output of its own goes into no tied model
        if make is not tiny_gpt or 'logit' not in targets:
            close(plain(x), before)


def test_with_one_factor_trained_inputs_are_not_kept():
    for factors in ('both', 'B'):
        layer, kept = lowrank.MHLoRALinear(nn.Linear(64, 6), 2, 3, factors=factors), []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(x.shape) or x, lambda x: x):
            layer(torch.ones(50, 64))
        assert ((50, 64) in kept) == (factors == 'both')


def test_four_files_and_torch_are_enough_for_a_loop_of_ones_own(tmp_path):
    for name in ('rules', 'ranks', 'lowrank', 'galore'):
        shutil.copy(f'{HERE}/{name}.py', tmp_path)
    code = '''import sys, torch
import galore, lowrank
net = torch.nn.ModuleDict({'attn': torch.nn.Linear(8, 8)})
lowrank.apply_mhlora(net, ('attn',), rank=2, factors='basis', merge_every=1)
optimizer = galore.LowRankAdamW(net)
optimizer.begin(0)
net['attn'](torch.ones(4, 8)).sum().backward()
optimizer.step()
assert sys.modules.keys().isdisjoint(('timm', 'tiktoken', 'datasets', 'tokenizers', 'safetensors'))
'''
    alone = {key: x for key, x in os.environ.items() if key != 'PYTHONPATH'}
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=alone, check=True)


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shapes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        found = call(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(found)
                      if isinstance(x, torch.Tensor) and not x._is_view()}
        return found


@pytest.mark.parametrize('merge_every', [1, 2])  # GaLore, GaLoLTE
@pytest.mark.parametrize('m, n', [(40, 24), (24, 40)])
def test_a_layer_with_a_basis_never_forms_the_gradient(m, n, merge_every):
    for has_basis in (False, True):  # of plain linears the gradient is seen
        net = linears(attn=nn.Linear(n, m, bias=False))
        if has_basis:
            put(net, rank=4, factors='basis', merge_every=merge_every)
        loss = net['attn'](torch.ones(3, 7, n, requires_grad=True)).square().sum()
        with Shapes() as shapes:
            loss.backward()
        assert ({(m, n), (n, m)}.isdisjoint(shapes.seen)) == has_basis, shapes.seen
        assert ((max(m, n), 4) in {shape[-2:] for shape in shapes.seen}) == has_basis


# -----------------------------------------------------------------------------
# GaLore: bases and arithmetic, the drop-in

SHAPES = (12, 7), (7, 12), (8, 8)
PROJ_TYPES = ('std', 'reverse_std', 'left', 'right')
BASES = ('svd', 'power', 'random')
RULES = [dict(basis=basis, rule=rule)
         for basis, rule in itertools.product(BASES, ('galore', 'fira'))]


def follow(optimizer, params, grads):
    """Steps along given gradients: grads[step][i] for params[i]."""
    for gs in grads:
        for p, g in zip(params, gs):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize('bits, steps, dtype, off', [  # narrow moments are exact at first
    (None, 6, double, 1e-12), (16, 1, double, 1e-12), (16, 1, torch.float32, 1e-6),
    (8, 1, torch.float32, 1e-6)])
def test_a_plain_group_is_torchs_or_galore_torchs_adamw(bits, steps, dtype, off):
    grads = [[normal(*shape, seed=step, dtype=dtype) for shape in ((64, 64), (7,), (2, 3, 4))]
             for step in range(steps)]
    hyper, ends = dict(lr=0.1, betas=(0.8, 0.95), eps=0.5, weight_decay=0.3), []
    for make, more in ((galore.GaLoreAdamW, dict(rule='adamw', state_bits=bits)),
                       (functools.partial(torch.optim.AdamW, fused=True), {}),
                       (torch.optim.AdamW, {})):
        params = [nn.Parameter(torch.ones_like(g)) for g in grads[0]]
        ends.append(follow(make([dict(params=params, **more)], **hyper), params, grads))
    for mine, fused, plain in zip(*ends):
        assert bits or torch.equal(mine, fused)
        close(mine, plain, off)
    params = [nn.Parameter(torch.ones_like(g)) for g in grads[0]]
    ends = follow(
        galore.GaLoreAdamW([dict(params=params, state_bits=bits)], **hyper), params, grads)
    for i, end in enumerate(ends):
        W, M, V = torch.ones_like(end), 0, 0
        for step in range(1, steps + 1):
            G = grads[step - 1][i]
            M, V = 0.8 * M + 0.2 * G, 0.95 * V + 0.05 * G**2
            W = W - 0.1 * (1 - 0.95**step) ** 0.5 / (1 - 0.8**step) * M / (V.sqrt() + 0.5)
            W = W - 0.1 * 0.3 * W
        close(end, W, off)


@pytest.mark.parametrize('shape', SHAPES)
def test_it_is_galore_torch(shape):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            from galore_torch import GaLoreAdamW as Reference
    # it drags in transformers and bitsandbytes, which fail in their own ways
    except Exception as error:
        pytest.skip(f'galore-torch cannot be imported here: {error}')
    for proj_type in PROJ_TYPES:
        runs = []
        for cls in (Reference, galore.GaLoreAdamW):  # constructed alike, its own defaults included
            W, plain = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
            group = dict(params=[W], rank=3, update_proj_gap=3, scale=0.25, proj_type=proj_type)
            optimizer = cls([group, dict(params=[plain])], lr=0.01, weight_decay=0.1,
                            no_deprecation_warning=True)
            grads = normal(8, 1, *shape, dtype=torch.float32)
            runs.append(follow(optimizer, [W, plain], [(g, 1e-6 * g) for g, in grads]))
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(double, 1e-13), (torch.float32, 1e-5),
                                              (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_bases_are_orthonormal_deterministic_and_survive_a_gradient_that_is_not_finite(
        dtype, tolerance):
    G, before = normal(40, 30).to(dtype), torch.random.get_rng_state()
    for basis, left in itertools.product(BASES, (True, False)):
        one, again, other = (galore.basis_of(G, 8, left, basis, seed=seed) for seed in (5, 5, 6))
        assert torch.equal(one, other) == (basis == 'svd') and torch.equal(one, again)
        assert one.dtype == dtype
        assert one.untyped_storage().nbytes() == one.nbytes, 'a view would keep all of U alive'
        close(one.mT.double() @ one.double(), eye(8), tolerance)
        for bad in (math.nan, math.inf, 0.0):
            spoilt = G.clone()
            spoilt[3, 4] = bad
            if not bad:  # as an expert without tokens has it
                spoilt.zero_()
            assert torch.equal(galore.basis_of(spoilt, 8, left, basis, one), one)
            none = galore.basis_of(spoilt, 8, left, basis)  # without an old one
            close(none.mT.double() @ none.double(), eye(8), tolerance)
    assert torch.equal(before, torch.random.get_rng_state()), (
        'the global random numbers are not ours')


@pytest.mark.parametrize('m, n', [(30, 50), (50, 30)])
def test_power_converges_to_the_svd_and_does_not_flip(m, n):
    U, V = (torch.linalg.qr(normal(k, 30, seed=k))[0] for k in (m, n))
    G, energy = (U * 0.5 ** torch.arange(30., device=DEVICE) @ V.mT,
                 0.98 * sum(0.25**i for i in range(5)))
    U = U[:, :5]
    P, gaps = galore.basis_of(G, 5, True, 'power'), []
    for _ in range(12):
        gaps.append(torch.linalg.matrix_norm(U @ U.mT - P @ P.mT, 2).item())
        old, P = P, galore.basis_of(G, 5, True, 'power', old=P)
    assert gaps[-1] < 1e-6 and all(b < a for a, b in zip(gaps, gaps[1:]) if a > 1e-7), gaps
    assert ((old * P).sum(0) > 0.99).all()
    for Y in (P, -P):
        close(galore.orthonormal(Y), Y)
    for left in (True, False):  # cold, one call
        cold = galore.basis_of(G, 5, left, 'power')
        assert ((G.mT if left else G) @ cold).square().sum() >= energy
    small = galore.basis_of((G * 1e-4).half(), 5, True, 'power').double()  # squares would vanish
    assert (small.mT @ G).square().sum() >= energy


@pytest.mark.parametrize('T, turns', [(1, 5), (5, 5), (10, 5), (10, 4), (1, 30)])
def test_layers_take_turns_at_their_refreshes(T, turns):
    """Once in fifty steps each, no two of them in one, and after merges."""
    due = [[turn for turn in range(turns) if galore.steps_to_refresh(step, 50, T, turn, turns) == 0]
           for step in range(100)]
    assert (due[:50] == due[50:] and sorted(sum(due[:50], [])) == [*range(turns)]
            and max(map(len, due)) == 1)
    assert not any(some for step, some in enumerate(due) if step % T)
    for step, turn in itertools.product(range(50), range(turns)):
        steps = galore.steps_to_refresh(step, 50, T, turn, turns)
        assert [turn in due[step + i] for i in range(steps + 1)] == [False] * steps + [True]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('setting', RULES, ids=lambda rule: ' '.join(rule.values()))
def test_the_drop_in_resumes_bit_for_bit_from_torchs_state_dict(setting, dtype):
    shapes = (6, 9), (9, 6), (8, 5), (4, 4), (5,), (64, 64)  # the last one's moments are of 8 bits
    grads = [[normal(*shape, seed=step, dtype=dtype) for shape in shapes] for step in range(8)]

    def fresh(weights):
        params = [nn.Parameter(x.clone()) for x in weights]
        groups = [dict(params=params[:3], rank=2, update_proj_gap=3, **setting),
                  dict(params=params[3:5]), dict(params=params[5:], state_bits=8)]
        return params, galore.GaLoreAdamW(groups, lr=0.01, weight_decay=0.1, seed=3)
    params, optimizer = fresh(grads[0])
    straight = follow(optimizer, params, grads)
    params, optimizer = fresh(grads[0])
    halfway, file = follow(optimizer, params, grads[:4]), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    params, optimizer = fresh(halfway)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(99)  # the global random numbers must not matter
    assert same_state(straight, follow(optimizer, params, grads[4:]))
    values = [x for state in optimizer.state_dict()['state'].values() for x in state.values()]
    assert {type(x) for x in values} <= {torch.Tensor, int}


@pytest.mark.parametrize('dtype', [double, torch.float32, torch.bfloat16])
def test_a_window_of_sketches_resumes_bit_for_bit_from_torchs_state_dict(dtype):
    def steps(net, optimizer, some):
        for step in some:  # new bases at steps 0, 8, 16; sketches from 3, 11
            optimizer.begin(step)
            net(tokens_of(4, 16, seed=step), tokens_of(4, 16, seed=step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        net = tiny_llama(n_layer=1).to(dtype)
        lowrank.apply_mhlora(net, rank=3, factors='basis', merge_every=1)
        return net, galore.LowRankAdamW(net, lr=0.01, basis_every=8)
    straight, again = fresh(), fresh()
    steps(*straight, range(18))
    steps(*again, range(6))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in again], file)
    file.seek(0)
    again = fresh()
    for part, state in zip(again, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    steps(*again, range(6, 18))
    assert same_state(dict(straight[0].state_dict()), dict(again[0].state_dict()))


def test_ranks_with_several_kinds_of_cards_draw_on_the_cpu():
    for alike in (True, False):
        with mock.patch.object(processes, 'cards_are_alike', lambda: alike):
            assert processes.where_to_draw('cuda').type == ('cuda' if alike else 'cpu')
            assert processes.where_to_draw('cpu').type == 'cpu'


def test_random_bases_are_standard_normal():
    drawn = [galore.gaussian(200, 300, torch.ones(1, dtype=double), seed) for seed in (1, 1, 2)]
    assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])
    assert drawn[0].std().item() == pytest.approx(1, abs=0.02) and abs(drawn[0].mean()) < 0.02


@pytest.mark.parametrize('dtype, begin, tolerance', [  # around 0 bfloat16 holds small moves
    (torch.float32, 1.0, 2e-4), (torch.bfloat16, 0.0, 2e-3)])
@pytest.mark.parametrize('momentum', [None, 0.8, 0.0])
def test_muon_is_torchs(dtype, begin, tolerance, momentum):
    own = {} if momentum is None else {'momentum': momentum}
    for shape in SHAPES:
        W, theirs = (nn.Parameter(torch.full(shape, begin, dtype=kind, device=DEVICE))
                     for kind in (dtype, torch.float32))
        grads, hyper = normal(6, 1, *shape, dtype=dtype), dict(lr=0.01, weight_decay=0.1)
        optimizer = galore.GaLoreAdamW([dict(params=[W], rule='muon', **own)], **hyper)
        ours, = follow(optimizer, [W], grads)
        theirs.data = theirs.data.to(torch.promote_types(dtype, torch.float32))
        wanted, = follow(
            torch.optim.Muon([theirs], adjust_lr_fn='match_rms_adamw', **own, **hyper),
            [theirs], grads.to(theirs.dtype))
        close(ours.to(wanted.dtype), wanted, tolerance)
        assert (optimizer.state_bytes() == 0) == (momentum == 0)


@pytest.mark.parametrize('shape', SHAPES)
def test_muon_in_a_basis_of_all_directions_is_muon(shape):
    linear = nn.Linear(*shape[::-1], bias=False, device=DEVICE)
    theirs = nn.Parameter(torch.zeros(shape, device=DEVICE))
    nn.init.zeros_(linear.weight)
    net = lowrank.MHLoRALinear(linear, rank=min(shape), factors='basis', merge_every=1)
    ours = galore.LowRankAdamW(
        net, lr=0.01, weight_decay=0.1, scale=1.0, rule='muon', basis_every=3)
    muon = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')
    for step in range(8):  # the moment turns with its basis
        x, y = (normal(5, 5, k, seed=step + i, dtype=torch.float32)
                for i, k in enumerate(shape[::-1]))
        ours.begin(step)
        (net(x) * y).sum().backward()
        theirs.grad = y.flatten(0, 1).T @ x.flatten(0, 1)
        ours.step(), muon.step()
        ours.zero_grad()
    close(net.weight, theirs, 0.03 * theirs.abs().max().item())  # it rounds to bfloat16 inside


@pytest.mark.parametrize('rule, momentum', [('galore', 0.95), ('muon', 0.95), ('muon', 0.0)])
def test_what_few_bits_left_turns_with_the_basis(rule, momentum):
    net = lowrank.MHLoRALinear(nn.Linear(12, 8), 2, 4, factors='basis', split=True, merge_every=2)
    optimizer = galore.LowRankAdamW(net, rule=rule, basis='random', basis_every=4, sync_bits=2,
                                    momentum=momentum)
    for step in range(4):
        optimizer.begin(step)
        net(normal(4, 12, seed=step, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
        if step % 2:
            lowrank.merge(net, bits=2, state=optimizer.state)
    basis, error = net.basis.clone(), optimizer.state[net.factor]['error'].clone()
    optimizer.begin(4)
    assert error.any() and not torch.equal(basis, net.basis)
    close(optimizer.state[net.factor]['error'], error @ basis.T @ net.basis, 1e-6)


def test_a_merge_in_full_forgets_what_few_bits_left():
    p = nn.Parameter(normal(64, 64))
    state = {p: {'step': 1}}
    for bits in (2, 2, 32):
        lowrank.merge(nn.Module(), torch.Generator(), {'p': p}, bits, state)
        assert ('common' in state[p]) == (bits == 2)
        with torch.no_grad():
            p += 1
    assert state[p] == {'step': 1}


@pytest.mark.parametrize('bits', [None, 16, 8])
def test_a_rank_may_have_no_row_of_a_parameter(bits):
    for shape in ((0,), (0, 40)):
        p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        follow(galore.GaLoreAdamW([dict(params=[p], rule='adamw', state_bits=bits)]),
               [p], [[p.detach()]] * 2)


@pytest.mark.parametrize('rule', rules.FULL)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_average_is_as_wide_as_its_parameter(rule, dtype):
    W = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
    optimizer = galore.GaLoreAdamW([dict(params=[W], rule=rule, momentum=0.9)])
    follow(optimizer, [W], [[normal(8, 6, dtype=dtype)]])
    assert optimizer.state[W].get('exp_avg', W).dtype == dtype


def test_an_output_layer_is_one_under_each_of_its_names():
    net = nn.Module()
    net.lm_head, net.mlp, net.proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
    net.proj.weight = net.lm_head.weight
    groups = galore.param_groups(net, rule='scale')
    assert [group['momentum'] for group in groups
            if 'lm_head.weight' in group['param_names']] == [0.9]


def test_what_is_averaged_within_an_average_stays():
    layer = lowrank.MHLoRALinear(nn.Linear(6, 5).double(), 2, 3, split=True, merge_every=2)
    layer.B.data.normal_()
    x = normal(4, 6)
    with lowrank.averaged_heads(layer):
        once = layer(x)
        with lowrank.averaged_heads(layer):
            pass
        assert torch.equal(layer(x), once)


@pytest.mark.parametrize('rule', rules.FULL)
def test_averages_of_narrow_bits_and_of_transposed_weights(rule):
    grads = normal(3, 1, 64, 80)
    ends = []
    for bits, transposed in ((None, False), (None, True), (16, False), (8, False)):
        W = nn.Parameter(torch.zeros(80, 64).T.double() if transposed
                         else torch.zeros(64, 80, dtype=double))
        group = dict(params=[W], rule=rule, state_bits=bits, momentum=0.9)
        ends += follow(galore.GaLoreAdamW([group], lr=0.01), [W], grads)
    close(ends[0], ends[1])
    for end in ends[2:]:
        assert (end - ends[0]).norm() < 0.05 * ends[0].norm()


def test_a_rank_is_clamped_and_said_once():
    W = nn.Parameter(torch.zeros(6, 9))
    with pytest.warns(UserWarning, match=r'rank 99 .* h.0.mlp.weight \(6, 9\)'):
        optimizer = galore.GaLoreAdamW(
            [{'params': [W], 'param_names': ['h.0.mlp.weight'], 'rank': 99}])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        follow(optimizer, [W], torch.ones(1, 1, 6, 9))
    assert optimizer.state[W]['basis'].shape == (6, 6)
    for basis in BASES:
        W = nn.Parameter(torch.zeros(9, 6))
        with pytest.warns(UserWarning, match=r'parameter 0 \(9, 6\)'):
            optimizer = galore.GaLoreAdamW(
                [dict(params=[W], rank=8, basis=basis, proj_type='left')])
        follow(optimizer, [W], normal(1, 1, 9, 6, dtype=torch.float32))
        assert optimizer.state[W]['basis'].shape == (9, 6)


@pytest.mark.parametrize('make', [tiny_gpt, tiny_llama, tiny_vit])
def test_param_groups_partition_the_model(make):
    net = make()
    next(p for p in net.parameters() if p.dim() == 1).requires_grad_(False)
    kwargs = dict(scale=2.0, basis='power', weight_decay=0.1)
    wanted = {name: p for name, p in net.named_parameters() if p.requires_grad}  # a tied one once
    for rank, rule in ((0, 'galore'), (2, 'fira')):
        groups = galore.param_groups(net, gap=7, rank=rank, rule=rule, **kwargs)
        place = {name: (group, p) for group in groups
                 for name, p in zip(group['param_names'], group['params'])}
        assert (place.keys() == wanted.keys()
                and sum(len(group['params']) for group in groups) == len(place))
        for name, (group, p) in place.items():
            matrix = p.dim() > 1 and name not in ('pos_embed', 'cls_token')
            inside = rank > 0 and matrix and ('attn' in name or 'mlp' in name)
            assert p is wanted[name] and group['weight_decay'] == 0.1 * matrix
            assert ('rank' in group) == inside, name
            assert (not inside
                    or {**kwargs, 'rank': 2, 'rule': 'fira', 'update_proj_gap': 7}.items()
                    <= group.items())
    torch.optim.AdamW(galore.param_groups(net, 0.1))


def test_a_step_needs_no_value_of_the_device_and_no_other_device():
    """Refreshes included: memory can be planned on fake tensors. On the meta device, as on a GPU,
    a tensor of the CPU's does not go with the others."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    for setting in RULES:
        with FakeTensorMode():
            params = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 9), (9, 6), (6,))]
            group = {'params': params[:2], 'rank': 2, 'update_proj_gap': 1, **setting}
            optimizer = galore.GaLoreAdamW([group, {'params': params[2:]}])
            follow(optimizer, params, [list(map(torch.ones_like, params))] * 2)
            assert optimizer.state_bytes() > 0
    group = dict(scale=0.5, betas=(0.9, 0.99))
    for shape, left in itertools.product(SHAPES, (True, False)):  # all but torch's fused Adam
        G = torch.ones(shape, device='meta')
        basis = galore.basis_of(G, 3, left)
        tall = G.mT if left else G
        R = tall @ basis
        galore.add_(G, R, basis, left, 0.1)
        state = {'step': 1, 'rest_norm': R.norm()}
        assert rules.fira(tall, R, R, basis, state, group).shape == tall.shape
        assert rules.decode(*rules.encode(R, 1, 127, 2, torch.int8), 127, 2).device.type == 'meta'
    net = nn.Linear(3, 3, device='meta')
    net.weight.grad = torch.ones(3, 3, device='meta')
    assert lowrank.clip_gradients(net, 1.0).device.type == 'meta'


@pytest.mark.parametrize('n', [5003, 256, 40])
@pytest.mark.parametrize('key', ['exp_avg', 'exp_avg_sq'])
def test_8_bits_are_off_by_less_than_a_level(key, n):
    levels, power, dtype = rules.EIGHT_BITS[key]
    x = normal(3, n, dtype=torch.float32) ** 3 * 1e-4
    x[:, n // 4:n // 2] = 0
    if dtype == torch.uint8:
        x = x.abs()
    blocks = -(-n // 256)
    size = F.pad(x.abs(), (0, -n % blocks)).view(3, blocks, -1)
    size = size.amax(-1, keepdim=True).expand_as(size).flatten(1)[:, :n]
    level = (x.abs() / size.clamp_min(1e-30)) ** (1 / power) * levels
    bound = size * ((level.floor() + 1) ** power - level.floor() ** power) / levels ** power
    total = torch.zeros_like(x)
    for age in range(10**6, 10**6 + 400):
        code, top = rules.encode(x, rules.shift_of(age), levels, power, dtype)
        y = rules.decode(code, top, levels, power)
        assert ((y - x).abs() <= bound * (1 + 1e-5) + 1e-7 * size).all()
        total += y
    off = (total / 400 - x).abs() / bound.clamp_min(1e-30)
    assert off[x != 0 if dtype == torch.int8 else level >= 1].max() < 0.01  # right on average
    assert code.dtype == dtype and code.shape == x.shape and top.shape == (3, -(-n // 256))
    # the update divides by the second's root
    assert code.min() >= (-127 if dtype == torch.int8 else 1)
    rows = [rules.encode(row, rules.shift_of(age), levels, power, dtype)
            for row in x.split(1)]  # of a shard
    assert all(torch.equal(torch.cat(parts), all) for parts, all in zip(zip(*rows), (code, top)))


@pytest.mark.parametrize('shape, tops', [
    ((30, 40), (30, 1)), ((3, 600), (3, 3)), ((2, 6, 40), (2, 6, 1)), ((32, 3, 4, 4), (32, 1)),
    ((0, 6, 40), (0, 6, 1)), ((64, 8), None), ((2, 3, 5), None), ((4096,), None), ((), None)])
def test_blocks_of_8_bits_lie_in_rows(shape, tops):
    state, x = {'step': 1}, normal(*shape, dtype=torch.float32)
    rules.new_moments(state, x, 8)
    rules.write_moments(state, [x, x.square()], 0)
    assert [*map(type, state.values())].count(torch.Tensor) == (4 if tops else 2)
    for found, wanted in zip(rules.read_moments(state), (x, x.square())):
        off = 0.1 * x.abs().max() ** 2 if tops and x.numel() else 0.0
        assert not tops or state['exp_avg_top'].shape == tops
        close(found.view(shape), wanted, off)


def test_rows_too_short_for_8_bits_are_said(capsys):
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((20, 30), (30, 8), (30,))]
    galore.GaLoreAdamW([dict(params=params, state_bits=8)])
    assert 'moments of 1 matrices, such as parameter 1, stay in 32 bits' in capsys.readouterr().out
    galore.GaLoreAdamW([dict(params=params[:1], state_bits=8, rank=4), dict(params=params[1:])])
    assert 'such as parameter 0, stay in 32 bits' in capsys.readouterr().out


def test_an_8_bit_second_moment_decays_beside_one_that_does_not():
    state, R, spike = {'step': 0}, normal(64, 64, dtype=torch.float32), torch.zeros(16, 256)
    spike[:, 0] = 3.0  # in every block of 256
    rules.new_moments(state, R, 8)
    for step in range(600):
        state['step'] += 1
        grad = R * (step == 0) + spike.view(64, 64)
        rules.step_(grad, grad, state, 1.0, 0.0, (0.9, 0.999), 1e-8)
    V, exact = rules.read_moments(state)[1].view(16, 256)[:, 1:], 0.001 * R.square() * 0.999 ** 599
    exact = exact.view(16, 256)[:, 1:]
    large = exact > 0.01 * exact.max()
    assert (V[large].sum() / exact[large].sum()).item() == pytest.approx(1, abs=0.2)


# -----------------------------------------------------------------------------
# GaLore and GaLoLTE in layers


def test_random_bases_are_others_for_each_seed_layer_and_refresh(root, tmp_path):
    drawn = []
    for seed in (0, 1):
        words = method('galore', '--basis=random', '--basis_every=2', '--n_layer=1',
                       f'--seed={seed}')
        run, _ = built('llama', root, tmp_path, *words)
        for step in range(4):
            run.optimizer.begin(step)
            layers = lowrank.lowrank_layers(run.model) if step % 2 == 0 else ()
            drawn += [layer.basis.sum().item() for layer in layers]
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 7


# shorter and longer than the rank, 3: two orders of the products
@pytest.mark.parametrize('time', [2, 7])
@pytest.mark.parametrize('m, n', [(6, 8), (8, 6)])
@pytest.mark.parametrize('dtype', [double, torch.float16])
def test_a_sketch_is_the_sum_over_sequences_in_either_order_of_products(m, n, time, dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(5, time, n).to(DEVICE), torch.randn(5, time, m).to(DEVICE)
    x[1], dy[2], wanted = 0, 0, 0  # sequences that count for nothing
    linear = nn.Linear(n, m, False).to(DEVICE, dtype)
    layer = lowrank.MHLoRALinear(linear, rank=3, factors='basis', merge_every=1)
    P = torch.linalg.qr(torch.randn(6, 3).double())[0].to(DEVICE)
    for G in dy.double().mT @ x.double():
        G = G if m < n else G.T
        wanted = wanted + G @ (G.T @ P) / (G.T @ P).norm().clamp_min(1e-9)
    size = 1 if dtype == double else 1e-4  # squares of which float16 does not know
    layer.basis.copy_(P)
    layer.ask_sketch()
    for part in (slice(1), slice(1, 5)):  # however they are spread over micro-batches
        layer(x[part].to(dtype)).backward((dy[part] * size).to(dtype))
    assert ((layer.sketch.grad / size - wanted).norm() / wanted.norm()
            < (1e-12 if dtype == double else 2e-2))


@pytest.mark.parametrize('words', [
    method('galore', '--basis_every=3'), method('galolte', '--sync_bits=2')],
    ids=['galore', 'bits'])
def test_a_layer_whose_factor_is_frozen_stays_as_it_is(root, tmp_path, words):
    run, data = built('llama', root, tmp_path, *words, '--n_layer=1')
    first, second, *_ = lowrank.lowrank_layers(run.model)
    before = [layer.weight.clone() for layer in (first, second)]
    first.factor.requires_grad_(False)
    run.optimizer = make_optimizer(run.model, run.settings)
    for step in range(6):
        train_llama.train_step(run, step, lambda _: data.batch(8, step))
    assert torch.equal(first.weight, before[0]) and not torch.equal(second.weight, before[1])
    lowrank.check_training(run.model, run.optimizer)
    save(run, 'ckpt.pt', {'step': 6}, resumable=True)  # few bits have left no state of it
    second.factor.requires_grad_(False)  # while sketches are added up
    assert second.sketch is not None
    before = second.weight.clone()
    for step in range(6, 9):
        train_llama.train_step(run, step, lambda _: data.batch(8, step))
    assert torch.equal(second.weight, before)


def test_a_sequence_whose_sum_is_lost_to_rounding_does_not_outweigh_the_others():
    torch.manual_seed(11)
    u, v = torch.randn(8, 16, 96), torch.randn(8, 16, 64)
    u[0] = torch.randn(96) + 0.01 * torch.randn(16, 96)  # nearly one gradient at all tokens, and
    v[0] -= v[0].mean(0)  # inputs whose sum is nearly zero
    Q = torch.linalg.qr(torch.randn(64, 32))[0]
    for dtype in (torch.bfloat16, torch.float16):
        a, b = u.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1)
        Y = lowrank.second_moment(a, b, (b.float() @ Q).to(dtype), 8).float()
        assert Y.norm() <= 1.1 * (u.flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)).sum()


def test_moments_of_float16_are_wider_than_their_weights():
    net = nn.Linear(8, 8, dtype=torch.float16)
    before = net.weight.clone()
    optimizer = galore.GaLoreAdamW([dict(params=[net.weight], rule='adamw')], lr=1e-3)
    for _ in range(10):
        net.weight.grad = torch.full_like(net.weight, 1e-4)  # squares are below float16's range
        optimizer.step()
    moved = (net.weight - before).abs().max().item()
    assert moved == pytest.approx(0.01, rel=0.1)  # lr a step


def test_weights_in_8_bits_take_no_others_and_refused_arguments_change_nothing():
    net, plain = (put(wide_linears(), factors='basis', merge_every=1, param_bits=bits)
                  for bits in (8, None))
    for one, other in ((net, plain), (plain, net)):
        before = one['attn'].weight.clone()
        with pytest.raises(RuntimeError, match='give apply_mhlora the same bits'):
            one.load_state_dict(other.state_dict(), strict=False)
        assert torch.equal(one['attn'].weight, before)
    net = linears(mlp=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank=4 does not fit 'mlp' of 2 inputs"):
        put(net, ('attn', 'mlp'))
    with pytest.raises(ValueError, match='or one of attn, experts, mlp$'):
        put(nn.ModuleDict({'net': net, 'experts': nn.ModuleList([nn.Linear(2, 2)])}), ('x',))
    assert type(net['attn']) is nn.Linear and net['attn'].weight.requires_grad


def test_a_layer_with_two_names_is_merged_alike():
    net = linears().to(torch.bfloat16)
    net['mlp'] = net['attn']
    put(net, ('attn', 'mlp'), rank=2, factors='basis', merge_every=2)
    net['attn'].factor.data.normal_()
    net['attn'].basis.normal_()
    state = lowrank.merged_state_dict(net)
    assert torch.equal(state['attn.weight'], state['mlp.weight'])


def test_gradients_of_one_head_lie_as_their_parameters():
    net = put(linears(), rank=2)
    net['attn'](torch.ones(3, 8)).sum().backward()
    for p in (net['attn'].A, net['attn'].B):  # else DDP copies them, and warns
        assert p.grad.stride() == p.stride()


def test_begin_again_takes_no_other_basis():
    net = put(linears(), rank=2, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(net, basis='random', basis_every=1)
    bases = []
    for step in (0, 0, 1, 1):  # of micro-batches without their numbers, or after a failed pass
        optimizer.begin(step)
        bases.append(net['attn'].basis.clone())
    assert torch.equal(*bases[:2]) and torch.equal(*bases[2:]) and not torch.equal(*bases[1:3])


def test_heads_are_drawn_on_the_cpu_whatever_the_default_device():
    layer = lowrank.MHLoRALinear(nn.Linear(8, 8))
    layer.A.data.zero_()
    with torch.device('meta'):
        layer.draw_heads()
    assert layer.A.any()


@pytest.mark.parametrize('merge_every', [1, 2])
def test_a_frozen_weight_gets_no_basis(capsys, merge_every):
    net = linears(attn=nn.Linear(8, 8), mlp=nn.Linear(8, 8))
    net['attn'].weight.requires_grad_(False)
    put(net, ('attn', 'mlp'), rank=2, factors='basis', merge_every=merge_every)
    assert '; 1 stay as they are, being frozen, such as attn' in capsys.readouterr().out
    before = [net[name].weight.clone() for name in ('attn', 'mlp')]
    optimizer = galore.LowRankAdamW(net, basis_every=2)
    for step in range(2):
        optimizer.begin(step)
        net['mlp'](net['attn'](normal(2, 8).float())).square().sum().backward()
        optimizer.step()
    if merge_every > 1:
        lowrank.merge(net)
    after = [net[name].weight for name in ('attn', 'mlp')]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def bytes_held(net):
    """Of the distinct memory behind parameters and buffers."""
    storages = [x.untyped_storage() for x in (*net.parameters(), *net.buffers())]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def test_what_is_always_zero_takes_no_memory_whatever_torch_does(root, tmp_path):
    words = '--param_dtype=float32', '--dtype=float32'
    plain = built('llama', root, tmp_path, *words)[0].model
    run, data = built('llama', root, tmp_path, *method('galore', *words))
    net, layers, batch = run.model, lowrank.lowrank_layers(run.model), data.batch(2, 0)
    held, state, bases = (bytes_held(net), net.state_dict(),
                          sum(layer.basis.nbytes for layer in layers))
    # and one buffer, as large as the largest factor
    assert held == bytes_held(plain) + bases + 4 * 3 * 24
    assert {name for name in state if not name.endswith('.basis')} == {*plain.state_dict()}

    def loaded(assign):
        other = copy.deepcopy(net)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        return other
    for other, size in (
            (net.to(torch.float32), held), (copy.deepcopy(net), held), (loaded(False), held),
            (loaded(True), held), (copy.deepcopy(net).to('meta').to_empty(device='cpu'), held),
            (copy.deepcopy(net).to(torch.bfloat16), held // 2)):
        leaves = [layer.factor for layer in lowrank.lowrank_layers(other)]
        assert bytes_held(other) == size and not any(leaf.any() for leaf in leaves)
        assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == 1
        galore.LowRankAdamW(other).begin(0)  # the layers still have their leaves
        if other.lm_head.weight.isfinite().all():
            other(*batch).backward()
            assert all(leaf.grad.any() for leaf in leaves)
    with pytest.raises(RuntimeError, match='Unexpected key.*proj.B'):
        net.load_state_dict({**state, 'model.layers.0.mlp.gate_proj.B': torch.zeros(1, 24, 3)})
    with pytest.raises(ValueError, match='LowRankAdamW'):
        galore.param_groups(net)
    net.zero_grad()
    foreign = torch.optim.AdamW(net.parameters(), fused=True)
    with pytest.raises(ValueError, match='no galore.LowRankAdamW holds .*proj'):
        lowrank.check_training(net, foreign)


@pytest.mark.parametrize('name, bits', [('full', None), ('full', 32), *itertools.product(
    ('full', 'mhlora', 'galolte', 'galore', 'fira'), (16, 8))])
def test_moments_are_as_wide_as_asked_for(root, tmp_path, name, bits):
    words = method(name, '--dtype=bfloat16', '--param_dtype=bfloat16', '--n_embd=64', '--n_mlp=128',
                   f'--state_bits={bits}', *['--rank=32'] * (name != 'full'),
                   *['--basis_every=60'] * ('gal' in name))
    run, data = built('llama', root, tmp_path, '--n_layer=1', *words)
    train_llama.train_step(run, 0, lambda _: data.batch(8, 0))
    wide, seen = {None: torch.bfloat16, 16: torch.bfloat16}.get(bits, torch.float32), set()
    for state in run.optimizer.state.values():
        codes = bits == 8 and state['exp_avg'].dim() > 1  # no vectors
        seen.add(codes)
        assert (state['exp_avg'].dtype == (torch.int8 if codes else wide)
                and type(state['step']) is int)
        assert state['exp_avg_sq'].dtype == (torch.uint8 if codes else wide)
        assert ('exp_avg_top' in state) == codes
    assert len(run.optimizer.state) == sum(p.requires_grad for p in run.model.parameters())
    assert seen == {False, bits == 8}
    held = [x for state in run.optimizer.state.values()
            for x in state.values() if torch.is_tensor(x)]
    # no sketch in step 0
    held += [x for key, x in run.model.named_buffers() if key.endswith('.basis')]
    assert run.optimizer.state_bytes() == sum(x.nbytes for x in held)


def linears(**modules):
    return nn.ModuleDict({'attn': nn.Linear(8, 16), **modules})


def wide_linears():
    return nn.ModuleDict({'attn': nn.Linear(128, 16)})


def put(net, targets=('attn',), **settings):
    lowrank.apply_mhlora(net, targets, **settings)
    return net


def encoder_layer(kind=nn.TransformerEncoderLayer):
    return kind(8, 2, 16, batch_first=True)


def hooked(register=nn.Module.register_forward_hook):
    net = linears()
    register(net['attn'], lambda *inputs: None)
    return net


def shared_weight_but_not_bias():
    net = linears(mlp=nn.Linear(8, 16))
    net['mlp'].weight = net['attn'].weight
    return net


def split_heads(rows):
    return put(linears(), heads=2, split=True, merge_every=2)['attn'].train(rows != 2)(
        torch.ones(rows, 8))


def twice():
    x = torch.ones(2, 8, requires_grad=True)
    dx, = torch.autograd.grad(put(linears())['attn'](x).square().sum(), x, create_graph=True)
    dx.sum().backward()


def scaled_per_layer():
    net = linears()
    optimizer, scaler = (galore.GaLoreAdamW(net.parameters(), per_layer=True),
                         torch.amp.GradScaler('cpu'))
    scaler.scale(net['attn'](torch.ones(2, 8)).sum()).backward()
    scaler.step(optimizer)


def in_basis(heads=1, merge_every=1, **settings):
    net = put(linears(), heads=heads, rank=2, factors='basis', split=heads > 1,
              merge_every=merge_every)
    optimizer = galore.LowRankAdamW(net, **settings)
    net['attn'](torch.ones(2, 8)).sum().backward()
    optimizer.step()


def merged_late():
    net = put(linears(), rank=2, factors='basis', merge_every=2)
    optimizer = galore.LowRankAdamW(net, basis_every=4)
    for step in range(5):
        optimizer.begin(step)
        net['attn'](torch.ones(2, 8)).sum().backward()
        optimizer.step()
        if step % 2 == 0:
            lowrank.merge(net)


def by_galore(**settings):
    net = put(linears(), rank=2, factors='basis', merge_every=1)
    return galore.LowRankAdamW(net, **settings)


def epochs():
    optimizer = by_galore()
    for step in (0, 1, 0):
        optimizer.begin(step)


def uncounted():
    optimizer = by_galore()
    for _ in range(2):
        optimizer.begin(0)
        optimizer.step()


def unfrozen():
    net = put(linears()).requires_grad_(True)
    lowrank.check_training(net, torch.optim.AdamW(net.parameters()))


def heads_in_different_numbers():
    net = linears(mlp=nn.Linear(16, 8))
    for target, heads in (('attn', 4), ('mlp', 2)):
        put(net, (target,), heads=heads, split=True, merge_every=2)
    net['mlp'](net['attn'](torch.ones(4, 8))).sum().backward()
    lowrank.clip_gradients(net, 1.0)


def dropin(**group):
    return galore.GaLoreAdamW([{'params': [nn.Parameter(torch.zeros(6, 9))], 'rank': 2, **group}])


LIBRARY = [  # a call that would go wrong in silence, what is said
    (lambda: put(linears(), lora_dropout=1.0), 'lora_dropout=1.0 has to be in'),
    (lambda: galore.GaLoreAdamW([dict(params=[nn.Parameter(torch.ones(4, 3))], rule='muon',
                                      stacked=3)]), 'does not hold stacked=3 matrices'),
    (lambda: put(linears(), lora_dropout=0.1, heads=2, split=True, merge_every=2),
     'see all tokens'),
    (lambda: put(linears(), lora_dropout=0.1, factors='basis', merge_every=1), 'lora_dropout=0.1'),
    (lambda: put(tiny_gpt(), ('q_proj',)), 'c_attn, c_fc, c_proj, lm_head'),
    (lambda: put(tiny_gpt(), rank=17), 'between 1 and 16'),
    (lambda: galore.LowRankAdamW(put(linears()), rule='muon'), 'the model has none'),
    (lambda: galore.LowRankAdamW(linears().requires_grad_(False)), 'all parameters are frozen'),
    (lambda: put(tiny_vit(), ['q_proj']), 'qkv'),
    (lambda: put(linears(), 'attn'), "targets='attn' is a string"),
    (lambda: put(linears(attn=encoder_layer()), ('linear1',)), 'TransformerEncoderLayer'),
    (lambda: put(nn.TransformerEncoder(encoder_layer(), 2)), 'TransformerEncoderLayer'),
    (lambda: put(linears(attn=encoder_layer(type('Sub', (nn.TransformerEncoderLayer,), {})))),
     'Sub'),
    (lambda: put(linears(attn=timm.models.beit.Attention(16, 2))), r"'attn' \(Attention\) reads"),
    (lambda: put(linears(attn=timm.models.swin_transformer_v2.WindowAttention(16, (4, 4), 2))),
     r"'attn' \(WindowAttention\) reads"),
    (lambda: put(linears(attn=ShiftedWindowAttention(16, [4, 4], [0, 0], 2))),
     r"'attn' \(ShiftedWindowAttention\) reads"),
    (lambda: lowrank.freeze_rest(linears(), 'logit'), "kinds='logit' is one word"),
    (lambda: put(linears(attn=timm.models.eva.EvaAttention(16, 2, scale_norm=False)), ('qkv',)),
     r"'attn' \(EvaAttention\) reads"),
    (lambda: put(shared_weight_but_not_bias(), ('attn', 'mlp')), 'but not its bias'),
    (lambda: put(hooked()), "'attn' has hooks"),
    (lambda: put(hooked(nn.Module.register_full_backward_pre_hook), ('attn',)), "'attn' has hooks"),
    (lambda: put(hooked(lambda linear, other: setattr(linear, 'forward', other))),
     'forward of its own'),
    (lambda: put(linears(), factors='A'), "factors='A' is not known"),
    (lambda: put(linears(), rank=0), 'rank=0'),
    (lambda: put(linears(), factors='basis'), 'merge_every=1'),
    (lambda: put(linears(), heads=2, factors='basis', merge_every=4), 'split=True'),
    (lambda: put(linears(), heads=3, split=True, merge_every=4, workers=2), 'over 2 ranks'),
    (lambda: put(wide_linears(), frozen_bits=4, merge_every=2, merge_reset=True),
     'weights in 4 bits stay as they are'),
    (lambda: put(wide_linears(), frozen_bits=4, factors='basis', merge_every=1),
     'weights in 4 bits stay as they are'),
    (lambda: put(wide_linears(), param_bits=8), "8 bits train in a basis, and factors='both'"),
    (lambda: put(linears(), frozen_bits=8),
     'frozen_bits=8, has to be|frozen_bits=8 has to be None or 4'),
    (lambda: put(linears(), frozen_bits=4, param_bits=8), 'one of them None'),
    (lambda: put(wide_linears().double(), frozen_bits=4), 'weights in float64 are not'),
    (lambda: put(linears(), frozen_bits=4), 'no weight goes into 4 bits.*width that 64 does not'),
    (lambda: split_heads(2), 'averaged_heads'),
    (lambda: split_heads(3), 'does not split over 2 heads'),
    (lambda: lowrank.check_training(linears(), torch.optim.SGD([nn.Parameter(torch.ones(1))])),
     'attn.weight and 1 more'),
    (lambda: lowrank.freeze_rest(put(linears(), factors='basis', merge_every=1), ('logit',)),
     "'attn' trains its weight in a basis, and freeze_rest would"),
    (lambda: put(linears().requires_grad_(False), factors='basis', merge_every=1),
     'all weights of attn are frozen, and in a basis'),
    (lambda: lowrank.MHLoRALinear(nn.Linear(8, 8).requires_grad_(False), factors='basis',
                                  merge_every=1), 'the weight is frozen'),
    (lambda: in_basis(basis='svd'), "basis='svd' .* set basis='sketch'"),
    (lambda: in_basis(state_bits=4), 'state_bits=4'),
    (lambda: in_basis(2, 4, basis_every=6), 'no multiple of merge_every=4'), (in_basis, 'begin'),
    (twice, 'twice'), (lambda: tiny_llama(n_embd=16, n_head=3), 'clash'),
    *((lambda group=group: dropin(**group), said) for group, said in (
        (dict(lr=-1.0), 'lr=-1.0.* must be at least 0'), (dict(betas=(0.9, 1.0)), 'below 1'),
        (dict(rank=0), 'rank=0'), (dict(update_proj_gap=0), 'update_proj_gap=0'),
        (dict(rule='adam'), "rule='adam'"), (dict(proj_type='both'), "proj_type='both'"),
        (dict(basis='qr'), "basis='qr'"),
        (dict(params=[nn.Parameter(torch.zeros(6))]), 'is no matrix'),
        (dict(state_bits=4), 'state_bits=4'), (dict(proj_type='full'), "set one of 'std'"),
        (dict(correct_bias=False), 'correct_bias=False'), (dict(rule='muon'), "rule='muon'"),
        (dict(rule='apollo', basis='svd'), "basis='random'"))),
    *((lambda group=group: galore.GaLoreAdamW([group]), said) for group, said in (
        (dict(params=[nn.Parameter(torch.zeros(6, 9))], rule='fira'), 'with rank=None: set one of'),
        (dict(params=[nn.Parameter(torch.zeros(6))], rule='muon'), 'is no matrix'),
        (dict(params=[nn.Parameter(torch.zeros(6, 9))], rule='muon', momentum=1.0),
         'momentum=1.0'))),
    (epochs, r'begin\(0\) comes after step 1: .* over all epochs'),
    (uncounted, r'begin\(0\) comes after step 0: .* over all epochs'),
    (lambda: lowrank.merge(linears(), bits=2), 'bits=2 leaves .* give the optimizer'),
    (lambda: lowrank.merged_state_dict(
        put(linears(), heads=2, split=True, merge_every=2, workers=2)),
     'dealt to 2 workers, and the number of ranks is 1'),
    (lambda: dropin(rank=3).load_state_dict(dropin().state_dict()), 'rank=2, and here it is 3'),
    (lambda: by_galore(rule='muon').load_state_dict(by_galore().state_dict()),
     "inside='galore', and here it is 'muon'"),
    (merged_late, r'begin\(4\) takes new bases, and a layer was not merged'),
    (unfrozen, "the weight of 'attn' is to stay frozen"),
    (heads_in_different_numbers, 'different numbers of split heads'),
    (lambda: lowrank.merge(linears(), replicas={'p': nn.Parameter(torch.ones(1))}),
     'give a generator'),
    (lambda: put(linears(), factors='basis', merge_every=1, alpha=8.0), 'alpha=8.0, merge_reset='),
    (lambda: galore.GaLoreAdamW(linears().requires_grad_(False).parameters(), per_layer=True),
     'parameter 0 is frozen, and per_layer'),
    (lambda: dropin().load_state_dict({'state': {0: {'step': 1, 'projector': None}},
                                       'param_groups': []}), "galore-torch's class"),
    (lambda: galore.param_groups(linears(), rank=4, rule='muon'),
     'for whole gradients, and rank=4'),
    (lambda: galore.param_groups(linears(), rule='fira'), "rule='fira' .* set its rank"),
    (lambda: galore.param_groups(nn.Linear(3, 3), rank=4), 'rank=4'),
    (lambda: galore.param_groups(linears(attn=type('Conv1D', (nn.Module,), {})()), rank=4),
     "Conv1D is no nn.Linear"),
    (lambda: lowrank.MHLoRALinear(nn.Linear(3, 3), rank='2'), "rank='2', heads=1 must be integers"),
    (lambda: [put(net) for net in [linears()] * 2], "'attn' has low-rank weights already"),
    (scaled_per_layer, 'per_layer=True steps in the backward pass, before a GradScaler')]


def test_what_only_shows_later_is_warned_of_once():
    x, T = torch.randn(4, 8), 2
    net = Squares()
    lowrank.apply_mhlora(net, heads=2, split=True, merge_every=T)
    optimizer = torch.optim.AdamW(net.parameters())
    for merged in (True, False):
        lowrank.check_training(net, optimizer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            for step in range(50):
                net(x).backward()
                optimizer.step()
                optimizer.zero_grad()
                if merged and (step + 1) % T == 0:
                    lowrank.merge(net)
        assert len(said) == (not merged), said
    assert 'merge_every=2, and 20 steps without a merge' in str(said[0].message)
    net = Squares()
    lowrank.apply_mhlora(net, rank=2, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(net)
    optimizer.begin(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(5):
            net(x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(said) == 1 and 'without begin(step)' in str(said[0].message)
    optimizer, counted = galore.LowRankAdamW(net), []  # torch's hooks run once a step
    galore.GaLoreAdamW(nn.Linear(3, 3).parameters())
    optimizer.register_step_post_hook(lambda *_: counted.append(1))
    optimizer.begin(0)
    optimizer.step()
    assert counted == [1]


def test_begin_is_seen_by_all_groups_of_a_step():
    net = tiny_gpt()
    lowrank.apply_mhlora(net, rank=2, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(net, rule='muon')  # q, k and v have a group of their own
    assert sum('inside' in group for group in optimizer.param_groups) == 2
    optimizer.begin(0)
    for begun in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            net(tokens_of(2, 16), tokens_of(2, 16, seed=1)).backward()
            optimizer.step()
        assert ['without begin(step)' in str(line.message) for line in said] == [True] * (not begun)


def test_layers_that_are_read_and_not_called_are_warned_of():
    class Reads(Squares):
        def forward(self, x):
            return self.mlp(F.linear(x, self.attn.weight)).square().mean()

    for kind, settings in itertools.product((Squares, Reads), (
            {}, dict(factors='B'), dict(factors='basis', merge_every=1))):
        net = kind()
        lowrank.apply_mhlora(net, rank=2, **settings)
        optimizer = galore.LowRankAdamW(net)
        lowrank.check_training(net, optimizer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            for step in range(2):
                optimizer.begin(step)
                net(torch.ones(2, 8)).backward()
                optimizer.step()
        said = [str(line.message) for line in said if 'got no gradient' in str(line.message)]
        assert len(said) == (kind is Reads) and all(line.startswith('attn.') for line in said)


def test_shards_of_another_kind_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
    try:
        merged = dict(merge_every=2)
        split = dict(heads=4, split=True, workers=4)
        pairs = init_device_mesh('cpu', (2, 2), mesh_dim_names=('a', 'b'))
        for mesh, settings, needle in ((init_device_mesh('cpu', (4,)), merged, None),
                                       (pairs, merged, 'not in rows over all of them'),
                                       (init_device_mesh('cpu', (4,)), split, 'heads that differ'),
                                       (pairs, None, 'not in rows over all of them')):
            net = nn.Sequential(Squares())
            if settings:
                put(net, **settings)
            fully_shard(net, mesh=mesh)
            checks = [lambda: galore.LowRankAdamW(net), lambda: lowrank.clip_gradients(net, 1.0),
                      lambda: lowrank.check_training(net, torch.optim.AdamW(net.parameters()))]
            if not settings:  # without merges torch's AdamW knows all of them
                checks.pop()()
            if settings is split:
                del checks[1]
            for check in checks:
                refuses = pytest.raises(ValueError, match=needle)
                with refuses if needle else contextlib.nullcontext():
                    check()
    finally:
        torch.distributed.destroy_process_group()


def test_what_an_unfinished_accumulation_has_left_is_averaged_over_ranks(monkeypatch):
    net, averaged = tiny_gpt(), []
    optimizer = galore.LowRankAdamW(net, per_layer=True)
    monkeypatch.setattr(galore, 'mean', lambda x: averaged.append(x) or x)
    for micro_step in range(2):
        optimizer.begin(0, micro_step, 4)
        net(tokens_of(2, 16), tokens_of(2, 16, seed=1)).backward()
    assert not averaged
    grads = [p.grad for group in optimizer.param_groups for p in group['params']]
    optimizer.step()
    # in one order, as other ranks
    assert list(map(id, averaged)) == list(map(id, grads)) and len(grads) > 9


def test_parameters_are_found_under_each_of_their_names_and_in_lists():
    vit = tiny_vit()
    for net in (vit, nn.ModuleDict({'inside': vit})):
        groups = galore.param_groups(net, weight_decay=0.1, leave=[vit.head.weight, vit.head.bias])
        decays = {p: group['weight_decay'] for group in groups for p in group['params']}
        assert decays[vit.pos_embed] == decays[vit.cls_token] == 0
        assert decays[vit.blocks[0].attn.qkv.weight] == 0.1 and vit.head.weight not in decays
    processes.keep_out_of_ddp(vit, [vit.head.weight, vit.head.bias])
    assert vit._ddp_params_and_buffers_to_ignore == ['head.weight', 'head.bias']
    gpt = tiny_gpt()
    assert gpt.lm_head.weight is gpt.embedding.weight
    lowrank.freeze_rest(gpt, ('logit',))
    assert [p for p in gpt.parameters() if p.requires_grad] == [gpt.lm_head.weight]


@pytest.mark.parametrize('basis', ['svd', 'power', 'random'])
def test_the_state_of_a_drop_in_goes_on_in_another_dtype(basis):
    saved_state = None
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(6, 8, dtype=dtype))
        group = dict(params=[p], rank=2, update_proj_gap=2, basis=basis)
        optimizer = galore.GaLoreAdamW([group], lr=0.1)
        if saved_state:
            optimizer.load_state_dict(saved_state)
        for step in range(3):
            p.grad = normal(6, 8, seed=step).to(dtype)
            optimizer.step()
        saved_state = optimizer.state_dict()
    assert p.isfinite().all() and (p != 1).any()


def test_what_a_run_does_not_reach_is_said(root, tmp_path, capsys):
    run, data = built('gpt', root, tmp_path, *method(
        'galore', '--warmup_iters=9', '--max_iters=8', '--basis_every=2'))
    meter = Meter(run, 0, 128, 'tokens')
    assert 'warmup_iters=9 is above max_iters=8: learning_rate=' in capsys.readouterr().out
    layer = lowrank.lowrank_layers(run.model)[0]
    for step in range(3):
        meter.add(*train_gpt.train_step(run, step, lambda i: batch_of(run, data, step, i)))
        layer.sketch.grad.fill_(math.inf)
    meter.line(3, 1e-3)
    assert '1 bases kept' in capsys.readouterr().out and layer.basis.isfinite().all()
    net = Squares()
    net.memory = nn.GRU(8, 8)
    lowrank.apply_mhlora(net, heads=2, split=True, merge_every=2)
    assert "'memory' has batch_first=False" in capsys.readouterr().out


def test_a_step_of_per_layer_is_made_once():
    net = Squares()
    optimizer = galore.LowRankAdamW(net, per_layer=True)
    for micro_step in range(2):
        optimizer.begin(0, micro_step, 2)
        net(torch.randn(4, 8)).backward()
    assert {state['step'] for state in optimizer.state.values()} == {1}
    optimizer.begin(1)
    net(torch.randn(4, 8)).backward()
    with pytest.raises(ValueError, match=r'begin\(1\) again.*micro_steps'):
        optimizer.begin(1)  # of a second micro-batch
    net(torch.randn(4, 8)).backward()
    net.zero_grad()
    with pytest.raises(ValueError, match='two gradients in one step'):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # a step may be made again
    optimizer.begin(1)
    net(torch.randn(4, 8)).backward()
    optimizer.begin(2)
    net.attn(torch.randn(4, 8)).sum().backward()  # a pass that fails comes to some
    optimizer.begin(2)
    net(torch.randn(4, 8)).backward()
    optimizer.step()


def test_alpha_travels_with_heads():
    net, other, bare = Squares(), Squares(), Squares()
    for one, alpha in ((net, 6.1), (other, 4.0)):
        lowrank.apply_mhlora(one, rank=4, alpha=alpha)
    state, nothing = net.state_dict(), torch.zeros(())
    half = {key: x.to(torch.bfloat16) for key, x in state.items()}
    mean = {key: sum([x] * 5) / 5 for key, x in half.items()}
    ema = {key: x.clone() for key, x in half.items()}
    for key, x in half.items():
        ema[key].mul_(0.9).add_(x, alpha=0.1)
    there = safetensors.torch.load(safetensors.torch.save(half))
    for found in (state, half, mean, ema, there,
                  torch.optim.swa_utils.AveragedModel(net).module.state_dict(),
                  get_model_state_dict(net), copy.deepcopy(net).bfloat16().state_dict()):
        net.load_state_dict(found)
        assert torch.equal(net.mlp.alpha, state['mlp.alpha'])
        with pytest.raises(RuntimeError, match='mlp.alpha is 6.* in the state dict, and here 4'):
            other.load_state_dict(found)
    net.load_state_dict({key: x for key, x in state.items()
                         if key[-5:] != 'alpha'})  # of an older one
    with pytest.raises(RuntimeError, match='mlp.alpha is 1, 1, .* in the state dict'):
        net.load_state_dict({**state, 'mlp.alpha': torch.ones(16)})  # digits, of format 7
    with pytest.raises(RuntimeError, match='mlp.alpha is 0 in the state dict, and here 6.1'):
        net.load_state_dict({**state, 'mlp.alpha': nothing})
    for alpha in (np.float64(6.1), torch.tensor(6.1, dtype=torch.float64)):
        lowrank.apply_mhlora(other := Squares(), rank=np.int64(4), alpha=alpha)
        other.load_state_dict(state)
    with torch.device('meta'):
        lowrank.apply_mhlora(other := Squares(), rank=4, alpha=6.1)
    other.to_empty(device='cpu').load_state_dict(state)
    for layer in lowrank.lowrank_layers(other.to_empty(device='cpu')):
        layer.start()
    assert torch.equal(other.mlp.alpha, net.mlp.alpha)
    bare.load_state_dict(lowrank.merged_state_dict(net))


DATA = [  # a reader, its words, what is said; or the words of a command of prepare.py
    (prepare.Tokens, 'c4 train 8', "'c4' is not there: run '.* prepare.py c4"),
    (prepare.Tokens, 'foo train 8', "run 'python prepare.py text --input FILE --name foo"),
    (prepare.Tokens, 'tiny train 10000000', 'block_size 10000000 is longer .* or less'),
    (prepare.Tokens, 'tiny test 8', "no split 'test'"),
    (prepare.Tokens, 'digits train 8', "'digits' holds images, not tokens"),
    (prepare.Images, 'foo train', "run 'python prepare.py images --input FOLDER --name foo"),
    (prepare.Images, 'pathmnist_64 train', "run 'python prepare.py pathmnist --size 64 --"),
    (prepare.Images, 'bloodmnist train', "run 'python prepare.py bloodmnist --size 28 --"),
    (prepare.Images, 'digits valid', "no split 'valid': use one of train, val"),
    *((None, *row) for row in (
        ('stdlb', "did you mean 'stdlib'"), ('verify mine', 'holds no data set'),
        ('text', '--input'), ('c4', '--tokens'), (f'text --input {HERE}/README.md', '.txt'),
        ('c4 --tokens 0', 'at least 1'), ('stdlib --tokns 3', '--tokns'),
        (f'c4 --path {HERE}', 'en/c4-train'), ('stdlib --path x', '--path'),
        ('pathmist', "did you mean 'pathmnist'"), ('PathMNIST', "did you mean 'pathmnist'"),
        ('organmnist3d', 'did you mean'), (f'octmnist --path {HERE}', 'octmnist.npz.*missing'),
        (f'octmnist --size 64 --path {HERE}', 'octmnist_64.npz.*missing.*--path'),
        ('pathmnist --size 32', '28'), ('digits --size 64', '--size'),
        ('digits --path x', '--path'), ('digits --tokens 3', '--tokens'),
        ('stdlib --shard_bytes 3', '--shard_bytes'), ('pathmnist --shard_bytes 0', 'at least 1'),
        ('stdlib --name ../x', r"not '\.\./x'"), ('stdlib --name /x', "not '/x'"),
        ('stdlib --name ..', 'name of a folder'), ('--overwrite stdlib', 'did you')))]


@pytest.mark.parametrize('call, message', LIBRARY)
def test_what_would_go_wrong_in_silence_is_one_sentence(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message) as refusal:
        call()
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('reader, words, message', DATA)
def test_missing_data_and_mistaken_commands_are_one_sentence(
        root, tmp_path, reader, words, message):
    with pytest.raises(prepare.DataError, match=message) as refusal:
        if reader:
            reader(*(int(word) if word.isdigit() else word for word in words.split()), root)
        else:
            prepare.main([*words.split(), '--data_dir', str(tmp_path / 'data')])
    assert '\n' not in str(refusal.value) and not (tmp_path / 'data').exists()


def test_what_is_replaced_passed_over_or_clamped_is_named(capsys):
    blocks = [f'transformer.h.{i}' for i in range(2)]
    assert lowrank.apply_mhlora(tiny_gpt(), ('c_fc',)) == [f'{block}.mlp.c_fc' for block in blocks]
    capsys.readouterr()
    other = type('Sub', (nn.Linear,), {})(8, 8)
    put(linears(mlp=nn.Sequential(nn.Linear(16, 8), other)), ('attn', 'mlp'), rank=12,
        factors='basis', merge_every=1)
    said = capsys.readouterr().out
    assert '2 of 2 linear layers' in said and 'subclasses of nn.Linear: mlp.1' in said
    assert "rank 12 is clamped to the smaller side of 2, such as attn" in said


# -----------------------------------------------------------------------------
# images


def auc_by_hand(positive, score):
    """The share of pairs in which the positive one scores higher than the negative; equal ones
    count half."""
    higher = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    return sum(higher) / len(higher)


def test_metrics_agree_with_a_hand_computation():
    logits = normal(30, 3, seed=1).round(decimals=1)
    y, p = torch.arange(30) % 3, logits.exp() / logits.exp().sum(1, keepdim=True)
    right = logits.argmax(1) == y
    accuracy, auc, by_class, matrix = train_vit.measure(logits, y)
    assert accuracy == pytest.approx(right.double().mean().item())
    assert by_class == pytest.approx([right[c::3].double().mean().item() for c in range(3)])
    assert auc == pytest.approx(sum(auc_by_hand(y == c, p[:, c]) for c in range(3)) / 3)
    for true, said in itertools.product(range(3), range(3)):
        assert matrix[true, said] == (logits[true::3].argmax(1) == said).sum()
    accuracy, auc, _, matrix = train_vit.measure(logits[:, :2], y % 2)
    assert auc == pytest.approx(auc_by_hand(y % 2 == 1, (logits[:, 1] - logits[:, 0]).sigmoid()))
    assert accuracy == pytest.approx(matrix.diagonal().sum() / 30)
    several = torch.stack([y == 0, y < 2, torch.arange(30) < 9], 1).float()
    accuracy, auc, by_class, matrix = train_vit.measure(logits, several)
    assert by_class == pytest.approx(((logits > 0) == (several > 0)).double().mean(0).tolist())
    assert accuracy == pytest.approx(sum(by_class) / 3) and matrix is None
    assert auc == pytest.approx(
        sum(auc_by_hand(several[:, c] > 0, logits[:, c]) for c in range(3)) / 3)
    y = y.clamp(max=1)  # of a class without images there is neither
    _, auc, by_class, _ = train_vit.measure(logits, y)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert auc == pytest.approx(sum(auc_by_hand(y == c, p[:, c]) for c in range(2)) / 2)
    assert by_class[2] is None and math.isnan(train_vit.measure(logits[:1], y[:1])[1])
    p = logits.sigmoid()
    by_hand = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    assert train_vit.criterion(logits, several).item() == pytest.approx(by_hand.item())


def test_augmentation_is_a_function_of_key_and_row():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)

    def augmented(kind, key, rows=slice(None)):
        return train_vit.augmented(images[rows], kind, key, count=8, rows=np.arange(8)[rows])
    both, flipped = augmented('flip,crop', (1, 2, 0)), augmented('flip', (0,))
    assert torch.equal(both, augmented('flip,crop', (1, 2, 0)))
    assert torch.equal(both[1::2], augmented('flip,crop', (1, 2, 0), slice(1, None, 2)))
    assert not torch.equal(both, augmented('flip,crop', (1, 3, 0)))
    transposed = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, images)]
    assert (0 < sum(transposed) < 8
            and all(t or torch.equal(a, b) for t, a, b in zip(transposed, flipped, images)))
    pair = torch.tensor([0, 1], dtype=torch.uint8).expand(4000, 1, 2, 2)
    pair = train_vit.augmented(pair, 'flip', (0,), count=4000, rows=np.arange(4000))
    assert pair[..., 0].double().mean().item() == pytest.approx(0.5, abs=0.03)  # every second one
    wide = F.pad(images.float(), (2, 2, 2, 2), mode='replicate').byte()
    places = [(i, j) for a, b in zip(augmented('crop', (0,)), wide)
              for i in range(5) for j in range(5) if torch.equal(a, b[:, i:i + 16, j:j + 16])]
    assert len(places) == 8 and {0, 2, 4} <= {*itertools.chain(*places)}  # by up to an eighth


@pytest.mark.parametrize('side, size, crop_pct, interpolation', [
    (28, 28, 1.0, 'bicubic'), (28, 56, 1.0, 'bicubic'), (64, 28, 0.9, 'bicubic'),
    (28, 42, 0.875, 'bilinear'), (31, 28, 0.9, 'bicubic')])
def test_images_are_seen_as_timm_evaluates_them(side, size, crop_pct, interpolation):
    # PIL rounds and clips after either direction: contrasts are such that nothing is clipped
    images = torch.randint(80, 176, (3, 1 if side == 28 else 3, side, side), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    look = SimpleNamespace(size=size, crop_pct=crop_pct, interpolation=interpolation,
                           mean=torch.tensor(mean).view(3, 1, 1),
                           std=torch.tensor(std).view(3, 1, 1))
    theirs = timm.data.create_transform(
        input_size=(3, size, size), is_training=False, mean=mean, std=std, crop_pct=crop_pct,
        interpolation=interpolation)
    ours = train_vit.normalised(images, look, torch.float32)
    for x, y in zip(images.expand(-1, 3, -1, -1), ours):
        levels = 255 * look.std * (y - theirs(to_pil_image(x)))
        assert (y.shape == (3, size, size)
                and levels.abs().max() < (1e-3 if size == crop_pct * side else 1.6))


def test_a_data_set_is_another_one_where_its_numbers_mean_something_else(root, tmp_path):
    for name, reader, key in (('digits', prepare.Images, 'classes'),
                              ('tiny', prepare.Tokens, 'tokenizer')):
        shutil.copytree(root / name, tmp_path / name)
        words = ['train', 8, tmp_path] if reader is prepare.Tokens else ['train', tmp_path]
        path, before = tmp_path / name / 'meta.json', reader(name, *words).fingerprint
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({**meta, key: meta[key][::-1]}))
        assert reader(name, *words).fingerprint != before


def test_what_an_error_says_is_short_and_never_nothing():
    assert config.said(AssertionError()) == 'AssertionError'
    assert config.said(ValueError('a\n  b')) == 'a b'
    assert config.said(ValueError('a' * 200)) == 'a' * 157 + '...'


@pytest.mark.parametrize('make', [  # what torch says on CPUs and GPUs
    lambda: torch.empty(2**55),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory'))])
def test_full_memory_ends_in_one_sentence(capsys, make):
    with pytest.raises(RuntimeError) as ended:
        next(iter(make()))
    config.in_one_line(ended.type, ended.value, ended.tb)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'memory is full' in said and 'bench.py memory' in said


def test_a_lost_rank_is_one_sentence(capsys):
    lost = RuntimeError('[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by '
                        'peer [127.0.0.1]:9')
    config.in_one_line(RuntimeError, lost, None)
    assert capsys.readouterr().err == 'error: another rank has ended: see what it said\n'


def test_a_number_of_a_token_that_no_model_has_is_one_sentence(tmp_path):
    from tokenizers import Tokenizer, models as kinds
    words = Tokenizer(kinds.WordLevel({'<unk>': 0, 'a': 1, '<end>': 2**25}, unk_token='<unk>'))
    words.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'a.txt').write_text('a a')
    with pytest.raises(prepare.DataError, match="33554432 for '<end>'.*below 2.24"):
        prepare_text(tmp_path, tmp_path / 'a.txt', '--tokenizer', str(tmp_path))


@pytest.mark.parametrize('name, text', [
    ('tokenizer_config.json', '[1'), ('tokenizer_config.json', '{"eos_token": 5}'),
    ('tokenizer.json', '{"model": 1}'),
    ('tokenizer_config.json', '{"eos_token": {"content": "no such token"}}')])
def test_a_damaged_tokenizer_is_one_sentence(bases, tmp_path, capsys, name, text):
    folder = shutil.copytree(bases / 'llama', tmp_path / 'llama')
    (folder / name).write_text(text)
    refused(capsys, lambda: start(sample, [f'--init_from={folder}', '--device=cpu']), name)


def test_epochs_are_passes_over_the_images_and_images_may_have_several_labels(root, tmp_path):
    words = [word for word in tiny('vit', root, tmp_path / 'a')
             if not word.startswith('--max_iters')]
    start(train_vit, [*words, '--epochs=3', '--batch_size=7', '--eval_interval=9',
                      '--learning_rate=0.01'])
    assert saved(tmp_path / 'a')['step'] == 28 and records(tmp_path / 'a')[-1]['test_auc'] > 0.95
    archive(tmp_path, 'chestmnist', counts=dict(train=20, val=30, test=30))
    prepare_images(tmp_path, 'chestmnist')
    train('vit', tmp_path, tmp_path / 'b', '--dataset=chestmnist')
    last = records(tmp_path / 'b')[-1]
    assert len(last['test_acc_by_class']) == 14 and 'test_confusion' not in last
    assert last['test_acc'] == pytest.approx(np.mean(last['test_acc_by_class']))


def test_weights_of_timm_and_checkpoints_of_ours_are_gone_on_from(root, tmp_path, capsys):
    def see(out, weights, *words):
        words = tiny('vit', root, tmp_path / out, f'--init_from={weights}', '--max_iters=2', *words)
        start(train_vit, [*words, '--eval_interval=2'])
        return records(tmp_path / out, 'eval.jsonl' if '--eval_only=True' in words else 'log.jsonl')
    torch.manual_seed(3)
    shape = dict(img_size=28, patch_size=14, depth=2, num_heads=2, embed_dim=16)
    theirs, path = (timm.create_model('vit_tiny_patch16_224', num_classes=9, **shape),
                    f'{tmp_path}/theirs')
    safetensors.torch.save_file(theirs.state_dict(), f'{path}.safetensors')
    torch.save(theirs.state_dict(), f'{path}.pt')
    asked = ['--dataset=pathmnist', '--eval_only=True']
    log = see('a', f'{path}.safetensors', *asked)
    x, y = prepare.Images('pathmnist', 'val', root).fixed_batch(0, 30)
    wanted = timm.data.resolve_data_config({'input_size': (3, 28, 28)}, model=theirs)
    look = timm.data.create_transform(**wanted)  # resizes to 31, and takes the middle of that
    x = torch.stack([look(to_pil_image(image)) for image in x]).double()
    loss = F.cross_entropy(theirs.double()(x), y).item()
    assert log[0]['val_loss'] == pytest.approx(loss, abs=1e-3) and 'test_acc' in log[1]
    again = see('b', f'{path}.pt', *asked)
    assert again == [{**record, 'init_from': f'{path}.pt'} for record in log]
    # the embedding of places resized
    log = see('c', f'{path}.pt', '--dataset=pathmnist', '--img_size=42')
    state, best = saved(tmp_path / 'c'), f'{tmp_path}/c/best.pt'
    assert (state['model_config']['crop_pct'], state['model_config']['interpolation']) == (
        0.9, 'bicubic')
    again = see('g', best, '--dataset=pathmnist', '--img_size=None', '--eval_only=True')
    assert (again[0]['val_loss'] == pytest.approx(log[2]['val_loss'], abs=1e-6)
            and log[2]['step'] == 2)
    see('c', 'resume', '--dataset=pathmnist', '--img_size=42', '--max_iters=4')
    assert saved(tmp_path / 'c')['model_config'] == state['model_config']
    # ours: split heads that merge, then full fine-tuning from what they made of it, with another
    # classifier
    lte = see('lte', 'scratch', '--lowrank=attn', '--heads=2', '--rank=2', '--split=True',
              '--merge_every=2')
    best = f'{tmp_path}/lte/best.pt'
    again = see('d', best, '--eval_only=True', '--n_layer=None')
    assert (again[0]['val_loss'] == pytest.approx(lte[2]['val_loss'], abs=1e-6)
            and lte[2]['step'] == 2)
    see('e', best, '--dataset=digits', '--n_layer=None')
    other = saved(tmp_path / 'e')
    assert other['model']['head.weight'].shape == (10, 16) and other['model_config']['n_layer'] == 2
    assert other['model_config']['crop_pct'] == 1  # that of a run from scratch
    refused(capsys, lambda: see('f', best, '--dataset=digits', '--eval_only=True'), '2 classes',
            '10 of the data')
    refused(capsys, lambda: see('f', f'{path}.pt', '--n_layer=3'), 'theirs.pt', 'n_layer')
    refused(capsys, lambda: see('f', best, '--n_head=4'), 'n_head=2', '4')


# -----------------------------------------------------------------------------
# the scripts: every method, on one process and on several

# name: its script, and what it sets; its method, and what it changes; the laws that hold for it:
#   one      on one process a run that stops at step 4 resumes bit for bit
#   two      on two ranks it trains as on one
#   four     and on four
#   wander   and where one process begins, two go on and one ends it
#   again    on two ranks a run that stops at step 4 resumes bit for bit
#   written  its ranks, with weights of their own, are workers as they are written down
RUNS = [line.split('|') for line in '''
gpt_apollo            | apollo                                           | one
gpt_apollo_apart      | apollo --sync=merge --merge_every=2              | again
gpt_fira              | fira                                             | one two
gpt_fira_8            | fira --state_bits=8                              | one
gpt_full              | full                                             | one two wander
gpt_galolte           | galolte                                          | one two wander again four
gpt_galolte_2bit      | galolte_2bit                                     | again
gpt_galore            | galore                                           | one two wander
gpt_galore_lean       | galore_lean                                      | one two
gpt_galore_muon       | galore_muon                                      | one two
gpt_local_adamw       | local_adamw                                      | again written
gpt_local_muon        | local_muon                                       | again
gpt_lora_fa           | lora_fa                                          | one
gpt_lte               | lte                                              | one two wander again four
gpt_lte_8             | lte --state_bits=8                               | one two wander
gpt_mhlora            | mhlora                                           | one two
gpt_muon              | muon                                             | one two
gpt_muon_lean         | muon_lean                                        | one two
gpt_relora            | relora                                           | one two
gpt_scale             | scale                                            | one
llama_full            | full                                             | one two wander
llama_galolte         | galolte                                          | one two wander
llama_galore          | galore                                           | one two wander
llama_local_adamw     | local_adamw                                      | again written
llama_lte             | lte                                              | one two wander
vit_full              | full                                             | one two wander
vit_galolte           | galolte                                          | one two wander
vit_galore            | galore                                           | one two wander
vit_local_adamw       | local_adamw                                      | again written
vit_lte               | lte                                              | one two wander
gpt_reset             | lte --merge_reset=True                           | one two wander again four
gpt_answers           | lte --dataset=answers --block_size=64            | one two wander
llama_answers         | galore --dataset=answers --documents=False       | one two
gpt_bits              | galolte --sync_bits=2                            | one two wander again four
gpt_muons             | galolte {muon}                                   | one two wander
gpt_relogit           | relora --lowrank=attn,logit                      | one two
gpt_replicas          | lte --sync=merge                                 | again
gpt_lte_pair          | lte --sync=merge --heads=2                       | again written
gpt_galolte_pair      | galolte_2bit --sync_bits=32 --heads=2            | again written
gpt_local_8           | local_adamw --sync_bits=8                        | again written
gpt_local_muon_32     | local_muon --sync_bits=32                        | again written
gpt_dropout           | full --dropout=0.1                               | one
gpt_float16           | lte --lowrank=attn,logit {float16}               | one
gpt_few_random        | galolte --basis=random --sync_bits=4 {bfloat16}  | one
llama_bfloat16        | fira --basis=svd {bfloat16}                      | one
llama_checkpointing   | galore --checkpointing=True                      | one
llama_16              | galore --basis=random --state_bits=16            | one
llama_lean            | galore_lean {wider}                              | one two
llama_leaner          | galore_lean {wider} {bfloat16} --checkpointing=True | one
llama_int8            | galore_int8 {coded} --rank=16                    | one two wander
gpt_int8              | galolte {coded} --param_bits=8                   | one two
llama_int8_shard      | galore_int8 {coded} --rank=16 --per_layer=False --shard=True | two
llama_nf4             | mhlora {base}                                    | one two wander
llama_nf4_shard       | mhlora {base} --shard=True                       | two wander
llama_dropin          | full {dropin}                                    | one
vit_melo              | lora --lowrank=q,v --train=classifier            | one two
vit_probe             | full --train=classifier {float16}                | one
gpt_full_shard        | full --shard=True                                | two wander again
gpt_lte_shard         | lte --shard=True                                 | two wander
gpt_galore_shard      | galore --shard=True                              | two wander again four
gpt_galolte_shard     | galolte --shard=True                             | two wander
gpt_bits_shard        | galolte --sync_bits=2 --shard=True               | two wander
gpt_half_shard        | galore {float16} --shard=True                    | two wander
gpt_one_head_shard    | galore --merge_every=3 --shard=True              | two wander
gpt_one_muon_shard    | galore_muon --merge_every=3 --shard=True         | two wander
gpt_muon_shard        | muon --shard=True                                | two wander
gpt_muons_shard       | galolte {muon} --shard=True                      | two wander
gpt_galore_muon_shard | galore_muon --shard=True                         | two wander
llama_leans_shard     | galore {wider} --state_bits=8 --shard=True       | two wander
vit_galore_shard      | galore --shard=True                              | two wander
vit_melo_shard        | lora --lowrank=q,v --train=classifier --shard=True | two wander
vit_few_shard         | full --batch_size=12 --shard=True                | two wander
vit_head_shard        | full --train=classifier --shard=True             | two wander
'''.format(float16='--param_dtype=float32 --dtype=float16',
           bfloat16='--param_dtype=bfloat16 --dtype=bfloat16',
           coded='--param_dtype=float32 --dtype=float32 --n_embd=128',
           base='--param_dtype=float32 --dtype=float32 --init_from={base} --frozen_bits=4 '
                '--lowrank=v_proj,mlp',
           wider='--rank=64 --n_embd=64 --n_mlp=96',
           muon='--optimizer=muon --sync_bits=4 --sync_moments=False',
           dropin='--optimizer=galore --basis=svd --rank=3 --basis_every=3 --per_layer=True '
                  '--grad_clip=0').strip().splitlines()]
RUNS = {name.strip(): (words.strip(), set(laws.split())) for name, words, laws in RUNS}
if torch.__version__ < (2, 13):  # its FSDP2 cuts no integers, and says so
    RUNS = {name: run for name, run in RUNS.items()
            if name not in ('llama_int8_shard', 'llama_nf4_shard')}


def that_hold(*laws):
    """The names of the runs for which one of these laws holds."""
    return [name for name in RUNS if RUNS[name][1] & {*laws}]


def words_of(name, root, out):
    """The command line of a run of RUNS."""
    shard = ['--shard=False'] * (name not in RUNS)  # the same without shards
    script, (which, *own) = name.split('_')[0], RUNS.get(name, RUNS.get(f'{name}_shard'))[0].split()
    own = ['--augment=flip,crop'] * (script == 'vit') + ['--gradient_accumulation_steps=2'] + own
    return tiny(script, root, out, *method(which), *own, *shard)


def run(name, root, out, *words):
    """A run of RUNS."""
    start(SCRIPTS[name.split('_')[0]], [*words_of(name, root, out), *words])


def run_of_eight(name, root, out, at_four):
    """A run of RUNS, and its folder as a kill after the evaluation of step 4 leaves it:
    `at_four`."""
    restart = Meter.restart

    def copies(meter):
        restart(meter)
        if meter.run.saved == 4 and meter.run.rank == 0 and not os.path.exists(at_four):
            shutil.copytree(out, at_four)
    with mock.patch.object(Meter, 'restart', copies):
        run(name, root, out, '--max_iters=8')


@pytest.fixture(scope='session')
def runs(root, tmp_path_factory):
    """A function: the folder of a run of one process after so many steps. Each is trained once."""
    folder = tmp_path_factory.mktemp('runs')

    @functools.cache
    def trained(name, steps):
        out = folder / f'{name}_{steps}'
        if steps == 8:
            run_of_eight(name, root, out, folder / f'{name}_4')
        elif steps == 4:
            trained(name, 8)
        else:
            run(name, root, out, f'--max_iters={steps}')
        return out
    return trained


def go_on(name, root, begun, out, steps):
    """The checkpoint of a run that goes on from the folder `begun`, and leaves it as it is."""
    shutil.copytree(begun, out)
    run(name, root, out, '--init_from=resume', f'--max_iters={steps}')
    return saved(out)


def same_run(a, b):
    return same_state({**a, 'settings': 0}, {**b, 'settings': 0})


def seen(script, data, step, settings):
    """Both micro-batches of a step, as a model sees them: augmented."""
    batches = [data.batch(8, step, i, 2, seed=settings['seed'])[:2] for i in range(2)]
    if script != 'vit':
        return batches
    return [(train_vit.augmented(x, 'flip,crop', (settings['seed'], step, i), count=8,
                                 rows=np.arange(8)), y)
            for i, (x, y) in enumerate(batches)]


WRITTEN_DOWN = [  # everything that one process trains in float64, where nothing is rounded away
    *(f'{script} {name}' + ' --state_bits=None' * name.endswith('lean')
      for script in SCRIPTS for name in ALONE if name != 'galore_int8'),  # it is galore_lean then
    *(f'{words} --dataset=answers --documents=False'
      for words in ('gpt lte', 'llama galore', 'llama galolte')),
    'gpt relora --lowrank=attn,logit', 'gpt lte --merge_reset=True', 'gpt lte --factors=B',
    'vit galore --checkpointing=True',
    'gpt lte --train=factors', 'gpt galolte --merge_every=1 --heads=1',
    'gpt galolte --merge_every=2 --heads=2 --basis_every=4', 'gpt galolte --optimizer=muon',
    'llama galolte --sync_moments=False', 'vit galolte --basis=random',
    'llama galore_muon --momentum=0', 'gpt galolte --optimizer=muon --momentum=0',
    'gpt fira --per_layer=True --grad_clip=0',
    'llama galore --checkpointing=True', 'llama galore --basis=random',
    'llama galore --basis_every=7', 'llama fira --basis=svd', 'llama lora --grad_clip=0',
    'llama full --optimizer=galore --basis=svd --rank=3 --basis_every=3',
    'reused lte', 'reused galolte --basis=random', 'reused galore --basis=random --merge_every=2',
    'reused galore --basis=random --per_layer=True --grad_clip=0']


@mock.patch('torch.linalg.svd', svd_of_one_sign)
@pytest.mark.parametrize('words', WRITTEN_DOWN)
def test_every_method_steps_and_evaluates_as_it_is_written_down(root, plains, tmp_path, words):
    """Steps with two micro-batches, clipping, decay, two merges and bases; the learning rate falls
    to its end. Four steps where nothing merges and no basis is taken."""
    kind, name, *words = words.split()
    script = kind if kind in SCRIPTS else 'gpt'
    scaled = 'gal' in f'{name} {words}' or name in ('fira', 'apollo')
    more = ('--gradient_accumulation_steps=2 --weight_decay=0.3 --beta1=0.8 --beta2=0.9 '
            f'--max_iters=7 --min_lr={0.0004 if script == "vit" else 0.004}'
            + ' --scale=0.5' * scaled + ' --augment=flip,crop' * (script == 'vit'))
    run, data = built(script, root, tmp_path, *method(name, *more.split(), *words))
    plain, module, steps = plains[script], SCRIPTS[script], 4
    for key, value in vars(run.model.config).items() if script != 'vit' else ():
        assert run.settings.get(key) in (None, value), key
    if kind == 'reused':
        plain, run.model = Reused(), Reused()
        put_layers(run.model, run.settings)
        run.net, run.optimizer = run.model, make_optimizer(run.model, run.settings)
    if min(run.settings['merge_every'] or 8, run.settings['basis_every']) < 8:
        # blocks take a second basis after one period and, the last one, a half
        period, T = run.settings['basis_every'] % 8, run.settings['merge_every'] % 8
        steps = max(period + period // 2 + 1, 2 * T + 1)
    batches = [seen(script, data, step, run.settings) for step in range(steps)]
    joined = [tuple(torch.cat(parts).to(DEVICE) for parts in zip(*batch)) for batch in batches]
    forward, first, matrices, how = book_of(plain, run.model, run.optimizer, run.settings)
    book = textbook.train(forward, first, joined, matrices, how)
    for step, _ in enumerate(batches):
        lr = set_learning_rate(run.optimizer, run.settings, step)
        assert how['merge_reset'] or lr == pytest.approx(how['learning_rate'](step))
        loss, norm = module.train_step(run, step, lambda i: batch_of(run, data, step, i))
        wanted, workers = next(book)
        assert loss.item() == pytest.approx(wanted.item())
        if not run.settings['per_layer']:  # else what has stepped in the backward pass is gone
            along = [*workers[0].rest.values(), *(g for w in workers for g in w.low.values())]
            assert norm.item() == pytest.approx(math.hypot(*(g.norm().item() for g in along)))
        state = lowrank.merged_state_dict(run.model)
        mean = merged_in_book(first, matrices, how, workers)
        for key, W in mean.items():
            close(state[key], W, 1e-8)
    lowrank.check_training(run.model, run.optimizer)
    assert all(p.grad is None for p in run.model.parameters())
    if script == 'vit':
        val = prepare.Images('xrays', 'val', root)
        x, y = val.fixed_batch(0, 12)  # the last batch of eight is short
        record, matrix = module.evaluate(run, val, 'val')
        got = record['val_loss']
        assert (matrix.sum() == 12
                and matrix.diagonal().sum() / 12 == pytest.approx(record['val_acc']))
    else:
        val = prepare.Tokens(run.settings['dataset'], 'val', 16, root, run.settings['documents'])
        x, y = map(torch.cat, zip(*(val.fixed_batch(i, 2, 8)[:2] for i in range(2))))
        got = module.evaluate(run, val)
    wanted = F.cross_entropy(forward(mean, x.to(DEVICE)).flatten(0, -2), y.to(DEVICE).flatten())
    assert got == pytest.approx(wanted.item(), abs=1e-6) and run.model.training


def test_a_gradient_may_lie_otherwise_than_its_parameter():
    """As autograd.grad gives that of B. torch's fused kernel reads memory, not strides."""
    grads, ends = [[normal(5, 7, seed=step).mT] for step in range(3)], []
    for make in (galore.GaLoreAdamW, torch.optim.AdamW):
        p = nn.Parameter(torch.ones(7, 5, dtype=double))
        groups = [dict(params=[p], rule='adamw')]
        ends += follow(make(groups, lr=0.1, eps=1e-8, weight_decay=0.0), [p], grads)
    close(*ends)


@pytest.mark.parametrize('view', [
    lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, :4]])
def test_a_parameter_may_lie_otherwise_than_its_moments(view):
    weights, ends = normal(4, 6, 3, 3), []
    around = weights.clone()
    for make, first in ((galore.GaLoreAdamW, around),
                        (functools.partial(torch.optim.AdamW, fused=False), weights.clone())):
        p = nn.Parameter(view(first))
        grads = [[normal(*p.shape, seed=step)] for step in range(4)]
        optimizer = make([dict(params=[p], rule='adamw')], lr=0.1, eps=1e-8, weight_decay=0.1)
        follow(optimizer, [p], grads[:2])
        p.data = p.data.contiguous()  # as a checkpoint of another layout
        ends += follow(optimizer, [p], grads[2:])
    close(*ends)
    assert torch.equal(around[:, 4:], weights[:, 4:])


@pytest.mark.parametrize('rule, least', [('fira', 1), ('apollo', 0.8)])
def test_a_gradient_of_zero_does_not_stop_what_follows(rule, least):
    ends = []
    for zeros in (False, True):
        p = nn.Parameter(torch.ones(6, 8, dtype=double))
        optimizer = galore.GaLoreAdamW([dict(params=[p], rank=2, rule=rule, scale=1.0)], lr=0.1)
        grads = [[normal(6, 8, seed=step)] for step in range(6)]
        follow(optimizer, [p], [[torch.zeros(6, 8, dtype=double)]] * zeros + grads)
        ends.append((p - 1).norm().item())
    assert ends[1] > least * ends[0]


def test_layers_keep_what_the_linears_were_and_what_follows_may_change_their_output():
    net, x = linears(mlp=nn.Linear(16, 12)).double().eval(), normal(4, 5, 8)
    before = F.relu(net.mlp(net.attn(x)))
    lowrank.apply_mhlora(net, ('mlp',), rank=2)
    assert not any(module.training for module in net.modules())
    after = F.relu(net.mlp(net.attn(x)), inplace=True)
    close(after, before)
    after.sum().backward()
    net = linears(mlp=nn.Linear(8, 8))
    net.other = net.mlp
    with pytest.raises(ValueError, match="called 'other'"):
        lowrank.apply_mhlora(net, ('mlp',))


def test_bases_are_not_lost_in_silence():
    net = nn.Sequential(OrderedDict(mlp=nn.Linear(8, 6)))
    plain = copy.deepcopy(net)
    made = []
    for one in (net, plain):
        lowrank.apply_mhlora(one, ('mlp',), rank=2, factors='basis', merge_every=1)
        made.append(galore.LowRankAdamW(one, lr=0.1))
    made[0].begin(0)
    net(torch.ones(5, 8)).square().sum().backward()
    made[0].step()
    made[1].load_state_dict(made[0].state_dict())
    with pytest.raises(ValueError, match='not the bases'):
        made[1].begin(1)


def test_heads_may_be_merged_while_they_are_averaged():
    net = nn.Sequential(
        lowrank.MHLoRALinear(nn.Linear(6, 5), 2, 2, split=True, merge_every=3)).double()
    nn.init.normal_(net[0].B)
    wanted, x = lowrank.merged_state_dict(net), normal(3, 6)
    with lowrank.averaged_heads(net.eval()):
        before = net(x)
        assert same_state(wanted, lowrank.merged_state_dict(net)) and torch.equal(net(x), before)


def test_a_merge_without_a_generator_draws_the_same_heads_on_every_rank():
    start, drawn = lowrank.MHLoRALinear(
        nn.Linear(9, 7), rank=3, merge_every=2, merge_reset=True), []
    for seed in (1, 2):  # nanoGPT's ranks have seeds of their own
        torch.manual_seed(seed)
        lowrank.merge(layer := copy.deepcopy(start))  # of a copy, as to save it on one rank
        drawn.append(layer.A)
    assert torch.equal(*drawn) and not torch.equal(drawn[0], start.A)
    before = layer.A.detach().clone()
    lowrank.merge(layer)
    assert not torch.equal(layer.A, before)


@mock.patch('torch.linalg.svd', svd_of_one_sign)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('rule', ['galore', 'fira'])
@pytest.mark.parametrize('proj_type', PROJ_TYPES)
def test_the_drop_in_projects_either_side(shape, rule, proj_type):
    (m, n), r, side = shape, 3, lambda x: x
    left = {'left': True, 'right': False, 'std': m < n, 'reverse_std': m >= n}[proj_type]
    if left:
        side = torch.t
    net = nn.Sequential()
    net.add_module('attn', nn.Linear(n, m, bias=False).double())
    group = dict(rank=r, scale=0.5, basis='svd')
    groups = galore.param_groups(net, weight_decay=0.2, gap=3, rule=rule, **group)
    groups[0]['proj_type'] = proj_type
    optimizer = galore.GaLoreAdamW(groups, lr=0.1, betas=(0.8, 0.95))
    p, state = net.attn.weight, {}
    W, how = p.detach().clone(), dict(group, optimizer=rule, basis_every=3, beta1=0.8, beta2=0.95)
    s = textbook.plan({'W': W}, ['W'], how)
    for step in range(8):  # refreshes at steps 0, 3, 6; the gradient grows, so that Fira limits it
        G = normal(m, n, seed=step) * 1.3 ** step
        p.grad = G.clone()
        optimizer.step()
        textbook.refresh([state], side(G)[None], 'W', step, s)
        W = (1 - 0.1 * 0.2) * (W - 0.1 * side(textbook.RULES[rule](side(G), state, s)))
        close(p, W, 1e-9)
    state = optimizer.state[p]
    numbers = m * r + 2 * n * r if left else n * r + 2 * m * r
    numbers += 'rest_norm' in state
    assert sum(x.numel() for x in state.values() if torch.is_tensor(x) and x.dim()) == numbers
    assert state['basis'].shape == (min(m, n) if 'std' == proj_type else m if left else n, r)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_scale_of_float16_goes_on_and_is_taken_off(root, tmp_path, script):
    words = '--param_dtype=float32', '--dtype=float16'
    run, data = built(script, root, tmp_path, *words)
    assert run.scaler.get_scale() == 65536
    about = (dict(best_val_auc=0.0, classes=data.classes) if script == 'vit'
             else dict(best_val_loss=0.0))
    save(run, 'ckpt.pt', dict(step=0, **about), resumable=True)
    checkpoint = saved(tmp_path)
    checkpoint['scaler']['scale'] = 8.0
    again, _ = built(script, root, tmp_path, *words, '--init_from=resume', checkpoint=checkpoint)
    assert again.scaler.get_scale() == 8.0
    plain, _ = built(script, root, tmp_path, words[0], '--dtype=float32')
    norms = [SCRIPTS[script].train_step(one, 0, lambda _: data.batch(8, 0))[1].item()
             for one in (again, plain)]
    # unscaled, and rounded
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] != norms[1]


# inside a period of merges, and of a sketch; where bases are due
@pytest.mark.parametrize('name, stop', [
    *((name, 4) for name in that_hold('one')), ('gpt_galolte', 6), ('llama_galore', 6)])
def test_a_run_resumes_bit_for_bit(root, runs, tmp_path, name, stop):
    half, whole, vit = runs(name, stop), saved(runs(name, 8)), name.startswith('vit')
    assert same_run(whole, go_on(name, root, half, tmp_path / 'on', 8)) and whole['step'] == 8
    now, before, how = whole['model'], saved(half)['model'], whole['settings']
    trains = dict(vit_melo='classifier', vit_probe='classifier', llama_nf4='factors')
    assert how['train'] == trains.get(name, 'all')
    if how['train'] == 'factors':
        assert {key[-2:] for key in now if not torch.equal(now[key], before[key])} == {'.A', '.B'}
    # what trains moves, and that alone; at step 6 heads were merged
    if how['train'] == 'all' and stop == 4:
        still = {key for key in now if f'{key[:-6]}A' in now and not how['merge_every']
                 or key.endswith(('.A', '.A_merged')) and how['factors'] == 'B'}
        assert still == {key for key in now if torch.equal(now[key], before[key])
                         and not key.endswith(('.basis', '.alpha'))}
    assert name != 'gpt_float16' or 0 < whole['scaler']['scale'] < 65536  # it skips the first steps
    log = records(runs(name, 8))
    lines, others = ([(record['step'], 'val_loss' in record)
                      for record in some if 'test_loss' not in record]
                     for some in (log, records(tmp_path / 'on')))
    assert lines == others or stop != 4  # nothing twice
    losses = [record['val_loss'] for record in log if 'val_loss' in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    # no dropout where it is evaluated, and the same start
    assert name != 'gpt_dropout' or losses[0] == logged(runs('gpt_full', 8), 'val_loss')[0]
    assert {'train_loss', 'lr', 'dt_ms', 'images_per_s' if vit else 'tokens_per_s',
            'peak_memory_bytes', 'trainable_parameters', 'optimizer_state_bytes',
            'sync_bytes'} <= log[1].keys()
    if vit:
        assert log[-1] == records(tmp_path / 'on')[-1] and len(log[-1]['test_acc_by_class']) == 2
        assert (np.shape(log[-1]['test_confusion']) == (2, 2)
                and log[-1]['classes'] == whole['classes'])


def test_a_classifier_of_other_classes_is_drawn_anew_and_said(runs, capsys):
    shape = dict.fromkeys(('model', 'n_layer', 'n_embd', 'n_head', 'img_size', 'patch_size'))
    path = runs('vit_full', 4) / 'best.pt'
    said = 'of 2 classes, the data have 2 .*pneumonia, lungs'
    for classes, drawn in (['normal', 'pneumonia'], False), (['normal', 'lungs'], True):
        capsys.readouterr()
        hub.read_vit(path, shape, classes)
        assert bool(re.search(said, capsys.readouterr().out)) == drawn
    with pytest.raises(ValueError, match='knows 2 classes, and not the 2 .*pneumonia, lungs'):
        hub.read_vit(path, shape, classes, keep=True)


def test_scores_near_one_do_not_tie():
    logits = torch.tensor([[0.0, 20.0], [0.0, 30.0]])  # of float32 both probabilities are 1
    assert train_vit.measure(logits, torch.tensor([0, 1]))[1] == 1


def test_the_log_of_a_vit_is_drawn_as_a_confusion_matrix(root, runs, tmp_path, capsys):
    out = runs('vit_full', 8)
    shutil.copytree(out, tmp_path / 'again')
    capsys.readouterr()  # of the training
    for place, is_said in (('again', False), ('new', True)):  # a log of training is drawn first
        start(train_vit, tiny('vit', root, tmp_path / place, '--eval_only=True',
                              f'--init_from={out}/best.pt'))
        assert ('draws the confusion matrix' in capsys.readouterr().out) == is_said
    with mock.patch.object(sys, 'path', [f'{HERE}/assets', *sys.path]):
        draw = runpy.run_path(f'{HERE}/assets/figures.py')['draw_confusion']
    draw(out)
    assert (out / 'confusion.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match='no log of a test'):
        draw(runs('gpt_full', 8))


def test_a_line_of_the_log_has_the_mean_loss_since_the_last_one_and_the_last_norm(root, tmp_path):
    for every in (1, 3):
        train('gpt', root, tmp_path / str(every), f'--log_interval={every}', '--eval_interval=3',
              '--max_iters=3')
    for key, take in (('train_loss', statistics.mean), ('gradient_norm', lambda x: [*x][-1])):
        each, line = (logged(tmp_path / name, key) for name in '13')
        assert [*each] == [1, 2, 3] and [*line] == [3]
        assert line[3] == pytest.approx(take(each.values()), abs=1e-6)
    for record in records(tmp_path / '1')[1:4]:
        tokens = record['tokens_per_s'] * record['dt_ms'] / 1000
        assert tokens == pytest.approx(8 * 16)
    train('gpt', root, tmp_path / 'lean', *method('muon_lean'), '--max_iters=2')
    assert not logged(tmp_path / 'lean', 'gradient_norm')  # there is none when the line is written


def test_the_peak_of_memory_is_known_where_the_kernel_does_not_say_it(monkeypatch):
    known = peak_memory_bytes('cpu')
    monkeypatch.setattr('run.Path.read_text', lambda *_: 'Name: python\nVmRSS: 12 kB\n')
    # getrusage's may be the parent's, and some kernels count pages of each thread a little later
    assert 0.99 * known < peak_memory_bytes('cpu') < 16 * known


def test_wandb_is_told_each_line_of_the_log(root, tmp_path, monkeypatch):
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr(config, 'is_installed', lambda package: True)
    train('gpt', root, tmp_path, '--max_iters=2', '--wandb_log=True')
    assert wandb.init.call_args.kwargs['config']['max_iters'] == 2
    told = [dict(call.args[0], step=call.kwargs['step']) for call in wandb.log.call_args_list]
    assert told == records(tmp_path)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_best_weights_stay_where_a_run_gets_worse_and_are_those_tested(
        root, tmp_path, capsys, script):
    out, vit = (tmp_path / 'a',
                ['--dataset=digits', '--img_size=32', '--patch_size=16'] * (script == 'vit'))
    run(f'{script}_full', root, out, '--max_iters=8', *vit)
    for steps in (10, 12):
        more = (f'--init_from=resume --max_iters={steps} --eval_interval=2 --learning_rate=30 '
                '--min_lr=30')
        run(f'{script}_full', root, out, *more.split(), *vit)
    word, best = ('val_auc', max) if script == 'vit' else ('val_loss', min)
    values = {step: value for step, value in logged(out, word).items() if step > 0}
    held, last = saved(out, 'best.pt'), saved(out)
    assert (held['step'] < last['step'] == 12
            and values[held['step']] == best(values.values()) != values[12])
    assert held[f'best_{word}'] == last[f'best_{word}'] == best(values.values())
    rates, usual = logged(out, 'lr'), 0.001 if script == 'vit' else 0.01
    assert (rates[2], rates[8], rates[12]) == pytest.approx((usual * 2 / 3, usual, 30))
    # what is logged is of the splits that it is said to be of
    begun, data = built(script, root, tmp_path / 'b', *vit)
    if script == 'vit':
        ended, _ = built('vit', root, tmp_path / 'b', f'--init_from={out}/best.pt', *vit)
        val, test = (prepare.Images('digits', split, root) for split in ('val', 'test'))
        got = [train_vit.evaluate(one, split, 'its')[0]['its_loss']
               for one, split in ((begun, val), (ended, test))]
        wanted = [logged(out, 'val_loss')[0], logged(out, 'test_loss')[12]]
        best = tmp_path / 'b' / 'best.pt'
        best.parent.mkdir()
        train_vit.test(begun, test, Meter(begun, 0, 1, 'images'), 0)
        assert 'best.pt is not there' in capsys.readouterr().out
        best.write_bytes(b'PK')
        refused(capsys, lambda: train_vit.test(begun, test, None, 0), 'best.pt', 'damaged')
    else:
        got = SCRIPTS[script].evaluate(begun, prepare.Tokens('tiny', 'val', 16, root))
        wanted = logged(out, 'val_loss')[0]
    assert got == pytest.approx(wanted, abs=1e-6)  # timm reads weights as float32


def test_heads_on_loaded_weights_train_alone(root, tmp_path):
    donor, idx, path = tiny_gpt(vocab_size=257), tokens_of(2, 8), tmp_path / 'gpt2'
    path.mkdir()  # in the layout of the hub
    weights = {name: value.T.contiguous() if value.dim() == 2 and name[0] == 'h'
               else value.contiguous()
               for name, value in donor.transformer.state_dict().items()}
    weights['h.0.attn.bias'] = torch.ones(1, 1, 16, 16)  # the causal mask, of old files
    safetensors.torch.save_file(weights, path / 'model.safetensors')
    config.write_json(f'{path}/config.json', hub.config_json(donor.config))
    loaded = hub.fill(models.GPT(hub.read_config(path)), hub.read_tensors(path, donor.config), path)
    close(loaded(idx), donor.float()(idx), 1e-6)
    for name, trains in (('lora', 'factors'), ('galore', 'all'), ('full', 'all')):
        words = loading(tiny('gpt', root, tmp_path / name, *method(name), f'--init_from={path}'))
        for more in ([], ['--init_from=resume', '--max_iters=6']):  # 'auto' stays what it was
            start(train_gpt, [*words, *more])
            state = saved(tmp_path / name)
            assert state['settings']['train'] == trains and state['step'] in (4, 6)
            for key, value in donor.double().state_dict().items():
                assert torch.equal(state['model'][key], value) == (trains == 'factors'), key


def loading(words):
    """Without the shape, which loaded weights have of their own."""
    return [word for word in words if not word.startswith(('--n_', '--vocab_size'))]


def test_a_resumed_run_steps_as_its_own_settings_say(root, runs, tmp_path):
    name, ends = 'transformer.h.0.mlp.c_fc.weight', []
    start = saved(runs('gpt_full', 4))['model'][name]
    # one step of AdamW apart: W (1 - lr decay) against W, and the same update
    for decay in (0.5, 0.0):
        shutil.copytree(runs('gpt_full', 4), tmp_path / f'{decay}')
        ends.append(train('gpt', root, tmp_path / f'{decay}', '--init_from=resume', '--max_iters=5',
                          '--dropout=0.2', f'--weight_decay={decay}',
                          '--gradient_accumulation_steps=2'))
    close(ends[1]['model'][name] - ends[0]['model'][name], 0.5 * 0.01 * start)
    assert ends[0]['model_config']['dropout'] == 0.2


@pytest.mark.parametrize('name', ['gpt_float16', 'gpt_galolte', 'llama_galore'])
def test_text_is_of_the_tokenizer(root, tmp_path, capsys, name):
    run(name, root, tmp_path, '--vocab_size=4000', '--eval_interval=8')
    capsys.readouterr()
    words = [f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=20', '--prompt=doc',
             '--top_k=0', '--device=cpu']
    texts = start(sample, words)
    assert capsys.readouterr().out.count('doc') == 2
    assert start(sample, words) == texts != start(sample, [*words, '--seed=7'])
    assert max(map(len, texts)) == 23 and max(map(max, texts)) < 256  # 256 ends a text


@pytest.mark.parametrize('words', [
    'gpt lte --lowrank=attn,logit', 'vit lora_fa --lowrank=mlp',
    'llama galolte --lowrank=up_proj --basis_every=12 --dataset=answers --block_size=64',
    ('gpt galore --lowrank=c_fc --param_bits=8 --n_embd=128 --basis_every=12 '
     '--param_dtype=float32 --dtype=float32'),
    ('llama lora --lowrank=q_proj --init_from={base} --frozen_bits=4 --param_dtype=float32 '
     '--dtype=float32')])
def test_compiled_blocks_share_two_graphs_and_train_the_same(root, tmp_path, words):
    """Torch gives up after eight graphs of one function, in silence."""
    from torch._dynamo.testing import CompileCounterWithBackend
    script, name, *words = words.split()
    counter, losses, compile_ = CompileCounterWithBackend('aot_eager'), [], nn.Module.compile
    torch._dynamo.reset()
    # steps have tests of their own: a compiler takes half a minute for one of weights in 8 bits
    with mock.patch.object(rules, 'compiled', lambda function: function), mock.patch.object(
            nn.Module, 'compile', lambda part, **how: compile_(part, backend=counter, **how)):
        for compiled in (False, True):
            words = [*words, f'--compile={compiled}', '--n_layer=3']
            run, data = built(script, root, tmp_path, *method(name, *words))
            for step in range(4):  # with a merge; blocks are at a sketch in turns
                batch = data.batch(8, step, rows=rows_of_rank(run))
                losses.append(SCRIPTS[script].train_step(run, step, lambda _: batch)[0].item())
            graphs = counter.frame_count
            if script == 'gpt':
                losses.append(train_gpt.evaluate(run, prepare.Tokens('tiny', 'val', 16, root)))
    half = len(losses) // 2
    close_enough = 1e-6 if '--dtype=float32' in words else 1e-8
    assert (losses[:half] == pytest.approx(losses[half:], abs=close_enough)
            and losses[0] != losses[3])
    assert 1 <= graphs <= 2 + (script != 'vit')  # and the loss's


@pytest.mark.parametrize('key, value', [
    ('use_dora', True), ('use_rslora', True), ('modules_to_save', ['lm_head']),
    ('rank_pattern', {'q_proj': 4}), ('alpha_pattern', {'q_proj': 4}), ('lora_bias', True),
    ('layer_replication', [[0, 2]]), ('trainable_token_indices', [1]), ('target_parameters', ['w']),
    ('bias', 'all'), ('peft_type', 'LOHA'), ('init_lora_weights', 'pissa'), ('r', 0),
    ('lora_alpha', 0.0)])
def test_what_peft_can_do_and_we_do_not_read_is_refused_by_its_key(tmp_path, key, value):
    about = {'r': 2, 'lora_alpha': 4.0, 'peft_type': 'LORA', 'bias': 'none', key: value}
    config.write_json(tmp_path / 'adapter_config.json', about)
    with pytest.raises(ValueError, match=f'says {key}=.*merge it by PEFT first'):
        hub.read_adapter(str(tmp_path))


def test_whole_weights_beside_lora_and_single_files_of_a_model_are_refused(tmp_path):
    about = {'r': 2, 'lora_alpha': 4.0, 'peft_type': 'LORA', 'bias': 'none'}
    config.write_json(tmp_path / 'adapter_config.json', about)
    path = tmp_path / 'adapter_model.safetensors'
    name = 'base_model.model.lm_head.base_layer.weight'
    safetensors.torch.save_file({name: torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match='holds lm_head.base_layer.weight, .*merge it by PEFT'):
        hub.read_adapter(str(tmp_path))
    for read in (hub.read_weights, hub.shape_of):
        with pytest.raises(ValueError, match='give its folder'):
            read(str(path))


@contextlib.contextmanager
def signal_in_batch(number, training=True, kind=signal.SIGTERM):
    """A signal when a model is given so manieth a micro-batch to train on, or to evaluate,
    from 0."""
    batches, kinds = itertools.count(), (models.GPT, models.Llama, timm.models.VisionTransformer)

    def sees(module, inputs):
        if isinstance(module, kinds) and module.training == training and next(batches) == number:
            signal.raise_signal(kind)
    hook = nn.modules.module.register_module_forward_pre_hook(sees)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize('kind', [signal.SIGTERM, signal.SIGINT])  # SIGINT: Ctrl-C
def test_a_signal_saves_and_ends_with_zero(root, tmp_path, kind):
    words = ['train_gpt.py', *tiny('gpt', root, tmp_path, '--max_iters=8')]
    with mock.patch.object(sys, 'argv', words), signal_in_batch(1, kind=kind):
        runpy.run_path(f'{HERE}/train_gpt.py', run_name='__main__')  # no SystemExit
    assert saved(tmp_path)['step'] == 2


def test_a_terminal_that_is_lost_saves(root, tmp_path):
    code = """if True:
        import os, pty, sys
        child, terminal = pty.fork()
        if not child:
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        said = b''
        while b'step      3' not in said:
            said += os.read(terminal, 1000)
        os.close(terminal)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    words = tiny('gpt', root, tmp_path, '--max_iters=100000', '--log_interval=1')
    command = [sys.executable, '-c', code, f'{HERE}/train_gpt.py', *words]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert saved(tmp_path)['step'] > 3


def test_a_later_signal_ends_the_process_and_one_that_comes_twice_does_not():
    code = """if True:
        import signal, time, run
        now = [100.0]
        time.monotonic = lambda: now[0]
        run.catch_signals()
        assert not run.stop_requested()
        for now[0] in (100.0, 109.0):  # torchrun passes on what its workers have got, too
            signal.raise_signal(signal.SIGTERM)
            assert run.stop_requested()
        print('saves', flush=True)
        now[0] = 111.0
        run.catch_signals()  # of another run in this process: it begins anew
        signal.raise_signal(signal.SIGTERM)
        print('saves', flush=True)
        now[0] = 122.0
        signal.raise_signal(signal.SIGINT)
        print('saves again')
        """
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, 'saves\n' * 2), done.stderr


def test_a_signal_before_the_first_step_says_that_nothing_is_saved(root, tmp_path, capsys):
    words = ['train_gpt.py', *tiny('gpt', root, tmp_path)]
    with mock.patch.object(sys, 'argv', words), signal_in_batch(0, training=False):
        runpy.run_path(f'{HERE}/train_gpt.py', run_name='__main__')
    assert 'before step 0 was trained: nothing new to save' in capsys.readouterr().out
    assert not (tmp_path / 'ckpt.pt').exists()
    words += ['--eval_only=True']
    with mock.patch.object(sys, 'argv', words), signal_in_batch(0, training=False):
        runpy.run_path(f'{HERE}/train_gpt.py', run_name='__main__')
    assert 'stopped before the evaluation ended: nothing is known' in capsys.readouterr().out


def test_what_a_run_says_at_its_end_works(root, tmp_path, capsys):
    for name, words in (('early', ['--eval_interval=9', '--max_iters=9']), ('late', [])):
        with signal_in_batch(5 if name == 'late' else 1):
            train('gpt', root, tmp_path / name, *words)
        asked = re.search(r'next: python sample.py (.*), or', capsys.readouterr().out)[1].split()
        assert (asked[1:] == ['--checkpoint=ckpt.pt']) == (name == 'early')
        start(sample, [*asked, '--max_new_tokens=2'])
    refused(capsys, lambda: start(sample, [f'--init_from={tmp_path}/late']), 'folder of a run',
            'best.pt')


def test_a_resumed_run_that_evaluates_other_text_chooses_its_best_anew(root, tmp_path, capsys):
    train('gpt', root, tmp_path, '--max_iters=4', '--eval_interval=2')
    for words, same in ((['--dropout=0.1'], True), (['--eval_iters=1'], False)):
        tampered = {**saved(tmp_path), 'best_val_loss': -1.0}  # lower than any
        save_checkpoint(f'{tmp_path}/ckpt.pt', tampered)
        steps = saved(tmp_path)['step'] + 2
        more = ['--init_from=resume', '--eval_interval=2', f'--max_iters={steps}', *words]
        capsys.readouterr()
        now = train('gpt', root, tmp_path, *more)
        assert ('best.pt begins anew' in capsys.readouterr().out) != same
        assert (now['best_val_loss'] == -1.0) == same
        assert (saved(tmp_path, 'best.pt')['step'] == steps) != same


@pytest.mark.parametrize('name', ['gpt_dropout', 'llama_dropin', 'vit_full', 'llama_galore'])
def test_a_signal_ends_a_run_after_its_step(root, tmp_path, name):
    words = ['--gradient_accumulation_steps=3', '--max_iters=7', '--eval_interval=7']
    run(name, root, tmp_path / 'a', *words)
    with signal_in_batch(5 * 3 + 1):  # at the second micro-batch of step 5, counted from 0
        run(name, root, tmp_path / 'b', *words)
    assert saved(tmp_path / 'b')['step'] == 6 == max(logged(tmp_path / 'b', 'train_loss'))
    run(name, root, tmp_path / 'b', *words, '--init_from=resume')
    assert same_run(saved(tmp_path / 'a'), saved(tmp_path / 'b'))


def test_a_run_that_is_stopped_where_it_evaluates_makes_up_for_it(root, tmp_path):
    whole = train('gpt', root, tmp_path / 'a', '--max_iters=8')
    for stop in (4, 8):
        out = tmp_path / f'{stop}'
        with signal_in_batch(stop - 1):
            assert train('gpt', root, out, '--max_iters=8')['step'] == stop
        assert stop not in logged(out, 'val_loss')  # it wants to be saved soon
        with open(out / 'log.jsonl', 'a') as file:
            file.write('\n{"step": 9, "val_loss": 0}\n{"step":')  # of a crash
        resumed = train('gpt', root, out, '--max_iters=8', '--init_from=resume')
        assert resumed['step'] == 8 and same_state(whole['model'], resumed['model'])
        assert logged(out, 'val_loss') == logged(tmp_path / 'a', 'val_loss')
        best = [saved(folder, 'best.pt') for folder in (tmp_path / 'a', out)]
        assert (best[0]['step'] == best[1]['step']
                and best[0]['best_val_loss'] == best[1]['best_val_loss'])
    with signal_in_batch(1):
        train('gpt', root, out, '--overwrite=True', '--log_interval=1')
    # all of the old is gone
    assert not (out / 'best.pt').exists() and [*logged(out, 'step')] == [0, 1, 2]


def test_bad_input_is_one_sentence_and_loses_nothing(root, runs, tmp_path, capsys):
    held = {}
    for name in (*SCRIPTS, 'best', 'damaged'):
        held[name] = shutil.copytree(
            runs(f'{name if name in SCRIPTS else "gpt"}_full', 4), tmp_path / name)
    before = {script: (held[script] / 'ckpt.pt').read_bytes() for script in SCRIPTS}
    os.replace(held['best'] / 'best.pt', held['best'] / 'ckpt.pt')
    (held['damaged'] / 'ckpt.pt').write_bytes(before['gpt'][:1000])
    out_of(tiny_gpt(vocab_size=257), tmp_path / 'gpt2')
    more = {**safetensors.torch.load_file(tmp_path / 'gpt2' / 'model.safetensors'),
            'x': torch.ones(1)}
    safetensors.torch.save_file(more, tmp_path / 'gpt2' / 'model.safetensors')
    state = tiny_vit().state_dict()
    state['norm.bias'][3] = math.nan
    safetensors.torch.save_file(state, nan := tmp_path / 'nan.safetensors')
    resume = '--init_from=resume'
    for script, words, *needles in [
            ('gpt', '--dataset=c4', 'c4', 'prepare.py'),
            ('gpt', '--vocab_size=100', '257', 'vocab_size=257'),
            ('gpt', '--block_size=100000', 'block_size', '100000'),
            ('gpt', '--n_embd=17', 'n_head'),
            ('gpt', '--n_layer=2', 'already holds a run', resume, '--overwrite=True'),
            ('gpt', '--lowrank=nowhere', 'c_attn'), ('gpt', '--device=foo', "'cuda:N'"),
            ('gpt', '--lowrank=attn --alpha=0', 'alpha=0.0', 'above 0'),
            ('gpt', BASIS, 'merge_every=1'), ('gpt', '--beta2=1', 'below 1'),
            ('gpt', '--train=factors', 'all parameters are frozen'),
            ('vit', f'{BASIS}--merge_every=1 --train=factors', 'freeze_rest would freeze that'),
            ('gpt', f'{resume} --batch_size=4', '16 rows a step', 'is 4: set'),
            ('vit', '--patch_size=56', 'no patch of (56, 56) pixels'),
            ('gpt', f'{resume} --n_layer=3', 'n_layer=2', '3'), ('llama', '--size=3b', '60m'),
            ('llama', f'{resume} --out_dir={held["gpt"]}', 'script'),
            ('gpt', f'{resume} --out_dir={tmp_path}/none', 'ckpt.pt'),
            ('gpt', f'{resume} --out_dir={held["best"]}', 'weights alone'),
            ('gpt', f'{resume} --out_dir={held["damaged"]}', 'damaged'),
            ('vit', '--model=vit_tiny_patch16_244', "did you mean 'vit_tiny_patch16_224'"),
            ('vit', '--dataset=bloodmnist', 'prepare.py'),
            ('vit', '--n_head=3', 'num_heads', 'n_embd'),
            ('vit', '--init_from=nowhere.pt', 'nowhere.pt'),
            ('vit', f'--init_from={held["gpt"]}/best.pt', 'of a GPT or a LLaMA'),
            ('vit', f'--init_from={nan}', 'norm.bias is not finite', 'nan.safetensors'),
            ('vit', '--max_iters=9', 'already holds a run'),
            ('vit', f'{resume} --augment=flip', "augment='flip,crop'"),
            ('vit', f'{resume} --dataset=digits', "dataset='xrays'", "'digits'")]:
        fresh = resume not in words and 'already holds a run' not in needles
        words = words.split() + ['--overwrite=True'] * fresh
        refused(capsys, lambda: train(script, root, held[script], *words), *needles)
    for script, weights, needle in (
            ('llama', tmp_path / 'gpt2', 'train_gpt.py'), ('gpt', 'none.safetensors', 'none.'),
            ('gpt', tmp_path / 'gpt2', 'transformer.x'),
            ('gpt', held['gpt'] / 'best.pt', 'would replace')):
        words = loading(
            tiny(script, root, held[script], f'--init_from={weights}', '--overwrite=True'))
        refused(capsys, lambda: start(SCRIPTS[script], words), needle)
    if not torch.cuda.is_available():
        gpu = ['--device=cuda', '--overwrite=True']
        refused(capsys, lambda: train('gpt', root, held['gpt'], *gpu), '--device=cpu')
    refused(capsys, lambda: start(sample, [f'--out_dir={held["vit"]}', '--device=cpu']), 'of a ViT')
    with pytest.raises(SystemExit, match='ckpt.pt of step 4'):  # a loss that is not finite
        train('gpt', root, held['gpt'], resume, '--gradient_accumulation_steps=2', '--max_iters=40',
              '--learning_rate=1e300', '--min_lr=1e300')
    with pytest.raises(SystemExit, match='val_loss nan at step 0 .* no checkpoint'):
        with mock.patch('train_vit.logits_of',
                        side_effect=lambda run, x: torch.full((len(x), 2), math.nan)):
            train('vit', root, tmp_path / 'new')
    logged_before = records(held['gpt'])
    train('gpt', root, held['gpt'], '--eval_only=True', '--overwrite=True')
    assert records(held['gpt']) == logged_before
    assert before == {script: (held[script] / 'ckpt.pt').read_bytes() for script in SCRIPTS}


# -----------------------------------------------------------------------------
# prepare: its command line


def numbered(path, lines=4000):
    """A .txt of different lines of 9 to 40 bytes."""
    tails = np.random.default_rng(0).integers(0, 32, lines)
    path.write_text(''.join(
        f'{i:07d} ' + 'abcdefgh'[i % 8] * tail + '\n' for i, tail in enumerate(tails)))
    return path


def parquet(**columns):
    """The bytes of such a file."""
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), file := io.BytesIO())
    return file.getvalue()


def prepare_text(root, *words):
    prepare.main(['text', '--tokenizer', 'bytes', '--data_dir', str(root), '--input',
                  *map(str, words)])


def all_tokens(root, name, split):
    return np.concatenate(prepare.Tokens(name, split, 1, root, documents=False).shards)


def texts_of(root, name):
    """The documents of the training split and those of validation."""
    texts = [prepare.tokenizer('bytes').decode(all_tokens(root, name, split).tolist())
             for split in ('train', 'val')]
    assert all(text.endswith('<|endoftext|>') for text in texts)
    return [text.split('<|endoftext|>')[:-1] for text in texts]


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob('*.*'))
            if not path.name.endswith('_of_nanolowrank')}


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path):
    done, replace = [], os.replace
    with mock.patch.object(os, 'fsync', lambda file: done.append('fsync')), \
            mock.patch.object(os, 'replace', lambda *a: done.append('replace') or replace(*a)):
        config.write_json(tmp_path / 'a.json', {})
    assert done == ['fsync', 'replace', 'fsync']  # the last one of the folder


def interrupt(what, times, call, kill):
    """Ctrl-C, or a kill in a fork, where a call would do `what` after so many times."""
    if kill and (child := os.fork()):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    done, real = [], getattr(os, what)

    def stop(*args):
        if len(done) == times:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        done.append(real(*args))
    try:
        with mock.patch.object(os, what, stop), pytest.raises(KeyboardInterrupt):
            call()
    finally:
        if kill:  # it is there still
            os._exit(0)


def test_stdlib_is_prepared_when_it_is_missing(tmp_path):
    data = prepare.Tokens('stdlib', 'val', 256, tmp_path)
    assert (data.vocab_size == 257 and data.meta['eot'] == 256
            and data.meta['documents']['val'] >= 10)
    assert 0.01 < data.meta['tokens']['val'] / data.meta['tokens']['train'] < 0.1
    assert 'def ' in prepare.tokenizer('bytes').decode(data.shards[0].tolist())
    assert sum(data.shards[0] == 256) == data.meta['documents']['val']  # documents are separated
    assert all(name.endswith(('.bin', 'meta.json')) for name in files_of(tmp_path / 'stdlib'))


def test_validation_is_not_the_tail_and_nothing_is_lost(root, tmp_path):
    lines = []
    for documents in texts_of(root, 'mine'):
        numbers = [[int(line.split()[0]) for line in text.splitlines()] for text in documents]
        assert all(run == list(range(run[0], run[-1] + 1)) for run in numbers)  # lines in a row
        lines.append(sum(numbers, []))
    train, val = lines
    assert sorted(train + val) == list(range(4000)) and 20 < len(val) < 600
    assert train[-1] > val[-1] or val[0] < train[len(train) // 2]
    for few in (8, 20, 100):  # and a handful still gives both splits
        prepare_text(tmp_path, numbered(tmp_path / 'few.txt', few), '--name', few)
        tokens = [len(all_tokens(tmp_path, f'{few}', split)) for split in ('train', 'val')]
        assert 0 < tokens[1] < tokens[0] + 300
        held = prepare.Tokens(f'{few}', 'val', 1, tmp_path).meta['bytes']
        assert (sum(held.values()) == (tmp_path / 'few.txt').stat().st_size
                and held['val'] < tokens[1])
    (tmp_path / 'one.txt').write_text('one line\n')
    same = [json.dumps({'prompt': 'a story?', 'completion': f'{i}'}) for i in range(99)]
    (tmp_path / 'same.jsonl').write_text('\n'.join(same))
    for name in ('one.txt', 'same.jsonl'):
        with pytest.raises(prepare.DataError, match='too little text.* other prompts'):
            prepare_text(tmp_path, tmp_path / name)


def test_a_document_keeps_its_split_and_bad_bytes_are_replaced_and_counted(tmp_path, capsys):
    texts, splits = [f'document {i} — ü' for i in range(300)], []
    (tmp_path / 'a.jsonl').write_text(
        '\n'.join(json.dumps({'text': text}) for text in texts[:150]) + '\n\n')
    (tmp_path / 'b.parquet').write_bytes(parquet(text=texts[150:] + [None]))
    for order in (['a.jsonl', 'b.parquet'], ['b.parquet', 'a.jsonl']):
        prepare_text(tmp_path, *(tmp_path / file for file in order), '--overwrite')
        splits.append(texts_of(tmp_path, 'text'))
    (train, val), (train2, val2) = splits
    assert sorted(train + val) == sorted(texts) and 3 <= len(val) <= 40
    assert sorted(val) == sorted(val2) and train != train2
    good = ''.join(f'line {i} ä\n' for i in range(3000)).encode()
    at = good.index(b'\n', 1000)
    (tmp_path / 'a.txt').write_bytes(good[:at] + b'\xff\xfe\xe2' + good[at:])
    (tmp_path / 'b.jsonl').write_bytes(b'{"text": "caf\xe9 \\ud800 end"}\n')
    prepare_text(tmp_path, tmp_path / 'a.txt', tmp_path / 'b.jsonl', '--name', 'bad')
    assert prepare.Tokens('bad', 'train', 8, tmp_path).meta['replaced_bytes'] == 6
    assert '6 bytes that were not UTF-8' in capsys.readouterr().out
    both = ''.join(itertools.chain(*texts_of(tmp_path, 'bad')))
    assert both.count('\ufffd') == 5 and both.count('ä') == 3000


def test_news_and_c4_come_from_a_folder_in_the_layout_of_the_hub(tmp_path):
    (tmp_path / '3.0.0').mkdir()
    (tmp_path / 'en').mkdir()

    def prepared(name, *words):
        here = '--path', str(tmp_path), '--data_dir', str(tmp_path)
        prepare.main([name, *here, '--tokenizer', 'bytes', *words])
        return texts_of(tmp_path, 'some' if words else name)
    wanted = {'train': [], 'validation': []}
    for split, file in (('train', 0), ('train', 1), ('validation', 0)):
        ids = [f'{split}{file}{i}' for i in range(5)]
        name = f'{split}-0000{file}-of-0000{1 + (split == "train")}.parquet'
        columns = dict(article=ids, highlights=[f'short {i}' for i in ids], id=ids)
        (tmp_path / '3.0.0' / name).write_bytes(parquet(**columns))
        wanted[split] += [f'{i}\n\nshort {i}' for i in ids]
    assert prepared('cnn_dailymail') == list(wanted.values())
    wanted = {'train': [], 'validation': []}
    for split, file in (('train', '00000-of-01024'), ('train', '00001-of-01024'),
                        ('validation', '00000-of-00008')):
        texts = [f'{split} {file} {i}\n' + 'word ' * (i % 40) for i in range(200)]
        with gzip.open(tmp_path / 'en' / f'c4-{split}.{file}.json.gz', 'wt') as out:
            out.write('\n'.join(json.dumps({'text': text, 'url': 'a'}) for text in texts))
        wanted[split] += texts
    assert prepared('c4') == list(wanted.values())
    prepared('c4', '--tokens', '20_000', '--name', 'some')
    assert 20_000 <= len(all_tokens(tmp_path, 'some', 'train')) < 20_300


def test_a_source_of_text_is_a_generator_and_a_row(tmp_path, monkeypatch):
    with open(prepare.__file__, encoding='utf-8') as file:  # the example that its comment shows
        example = ''.join(line[6:] for line in file if line.startswith('#     '))
    generator, row = example.split("'notes': ")
    exec(generator, scope := {**vars(prepare)})
    shown = eval(row.rstrip(',\n'), scope)
    for name in 'abcdefghij':
        (tmp_path / 'mine' / name).mkdir(parents=True)
        (tmp_path / 'mine' / name / 'x.md').write_bytes(f'note {name} \xff'.encode('latin-1'))

    def answers(args):  # has prompts, says its splits, and goes on in pieces
        for i in range(4):
            yield prepare.Document(f'{i}', prompt='q', split='train', ends=False)
        yield prepare.Document('end', split='train')
        yield prepare.Document('checked', split='val')
    monkeypatch.setitem(prepare.SOURCES, 'notes', shown)
    monkeypatch.setitem(prepare.SOURCES, 'asked', prepare.Source(answers, lambda args: ('', 0.05)))
    (tmp_path / 'files').mkdir()
    for split in ('some', 'other'):
        rows = ''.join(json.dumps({'a': f'{split} {i}', 'b': 'b', 'c': 1}) + '\n' for i in range(9))
        (tmp_path / 'files' / f'{split}.jsonl').write_text(rows)
    monkeypatch.setitem(prepare.SOURCES, 'rows', prepare.hub(
        'who/knows', columns=['b', 'a'],
        files={'train': 'files/some*', 'val': 'files/other.jsonl'}))
    here = ['--data_dir', str(tmp_path), '--tokenizer', 'bytes']
    for words in (['notes', '--path', f'{tmp_path}/mine'], ['asked'],
                  ['rows', '--path', str(tmp_path)]):
        prepare.main([*words, *here])
    assert sorted(sum(texts_of(tmp_path, 'notes'), [])) == [
        f'note {name} \ufffd' for name in 'abcdefghij']
    assert texts_of(tmp_path, 'rows') == [
        [f'b\n\n{split} {i}' for i in range(9)] for split in ('some', 'other')]
    tokens = all_tokens(tmp_path, 'asked', 'train')
    assert (tokens & 0xFFFF).tolist() == [*b'q0q1q2q3end', 256]
    assert (tokens >= prepare.PROMPT).tolist() == [True, False] * 4 + [False] * 4
    with pytest.raises(prepare.DataError, match='no .md files in'):
        prepare.main(['notes', '--path', f'{tmp_path}/files', *here])
    (tmp_path / 'mine' / 'x.md').write_text('one more')
    with pytest.raises(prepare.DataError, match='data set with source .10 notes of .*--overwrite'):
        prepare.main(['notes', '--path', f'{tmp_path}/mine', *here])
    with pytest.raises(prepare.DataError, match='unrecognized arguments: --path'):
        prepare.main(['asked', '--path', f'{tmp_path}/files', *here])


def beside(folder):
    """What lies beside a folder: the states of commands that write it."""
    return sorted(path.suffix for path in folder.parent.glob(f'{folder.name}.*') if path.is_dir())


@pytest.mark.parametrize('kind', ['text', 'images'])
def test_an_interrupted_command_leaves_the_old_data_set_or_the_new_one(tmp_path, capsys, kind):
    archive(tmp_path)
    folder, path = tmp_path / 'it', numbered(tmp_path / 'a.txt')
    other = ('--tokens', '30_000') if kind == 'text' else ('--shard_bytes', '3_000_000')

    def make(*words):
        if kind == 'text':
            prepare_text(tmp_path, path, '--name', 'it', '--shard_tokens', '20_000', *words)
        else:
            prepare_images(tmp_path, 'pathmnist', '--name', 'it', *words)
        return files_of(folder)
    whole = make()
    shutil.rmtree(folder)
    assert len(whole) > 5
    some = make(*other)
    for what, times, left in (
            ('fsync', 1, ['.writing']), ('fsync', 3, ['.writing']), ('rename', 0, ['.writing']),
            ('rename', 1, ['.whole']), ('rename', 2, ['.old', '.whole']), ('rename', 3, ['.old']),
            ('unlink', 2, ['.writing'])):
        interrupt(what, times, lambda: make('--overwrite'), kill=True)
        assert beside(folder) == left
        # while the old one is removed
        if left in (['.old'], ['.writing']) and files_of(folder) == whole:
            assert make('--overwrite') == whole and not beside(folder)
            shutil.rmtree(folder)
            some = make(*other)
            continue
        if not folder.exists():  # between the two renames
            with pytest.raises(ValueError, match=r'it.\w{8}.old is the old one, '
                                                 r'it.\w{8}.whole is the new one'):
                make()
            assert [files_of(next(tmp_path.glob(f'it.*{state}'))) for state in left] == [
                some, whole]
            os.rename(next(tmp_path.glob('it.*.old')), folder)
        assert files_of(folder) == some == make(*other)
        assert make('--overwrite') == whole and not beside(folder)
        shutil.rmtree(folder)
        interrupt('fsync', 1, make, kill=False)
        assert not folder.exists() and not beside(folder)
        with pytest.raises(prepare.DataError, match="'it' is not there: run '.*it --data_dir"):
            prepare.Tokens('it', 'train', 8, tmp_path)
        some = make(*other)
    held = make('--overwrite')
    assert kind == 'text' or '1,000 train, 30 val, 41 test images' in capsys.readouterr().out
    assert make() == held and 'already there' in capsys.readouterr().out
    with pytest.raises(prepare.DataError, match='holds a data set with .*, not .*--overwrite'):
        make(*other)
    assert files_of(folder) == held


def test_of_two_commands_at_once_the_second_is_refused_and_files_of_others_stay(tmp_path):
    path, folder = numbered(tmp_path / 'a.txt', 300), tmp_path / 'mine'

    def make(*words):
        prepare_text(tmp_path, path, '--name', 'mine', *words)
    folder.mkdir()  # an empty one is no trouble
    with config.written_beside(folder, prepare.MARKER):  # another command
        for words in ([], ['--overwrite']):
            with pytest.raises(ValueError, match="another command is writing '.*mine'"):
                make(*words)
    make('--overwrite')
    (folder / 'notes.txt').write_text('precious')
    with pytest.raises(ValueError, match="mine' holds notes.txt, which this command did not write"):
        make('--overwrite')
    (folder / 'notes.txt').unlink()
    os.rename(folder, tmp_path / 'elsewhere')  # on another disk
    folder.symlink_to(tmp_path / 'elsewhere')
    for _ in range(2):
        make('--overwrite')
    assert (folder.is_symlink() and len(files_of(folder)) == 3
            and beside(tmp_path / 'elsewhere') == [])
    folder.unlink()
    for theirs in (folder, tmp_path / 'mine.0123abcd.writing'):
        theirs.mkdir()
        (theirs / 'train_000000.bin').write_bytes(b'theirs')
    (folder / '.export_of_nanolowrank').touch()
    for words in ([], ['--overwrite']):
        with pytest.raises(ValueError, match="mine' is there, and was not written"):
            make(*words)
    assert {path.read_bytes() for path in tmp_path.glob('mine*/*.bin')} == {b'theirs'}
    for content in ('{"name": "a web page"}', '[]', 'hello'):
        (folder / 'meta.json').write_text(content)
        with pytest.raises(ValueError, match='meta.json.* (move it away|damaged)'):
            make()


@pytest.fixture
def gpt2():
    """GPT-2's tokens; without a network and a copy of them a test is skipped."""
    try:
        return prepare.tokenizer('gpt2')
    except prepare.DataError as error:
        assert 'TIKTOKEN_CACHE_DIR' not in os.environ, error  # where it is said to be it has to be
        pytest.skip(str(error))


def test_gpt2_tokens_round_trip(gpt2, tmp_path):
    path = numbered(tmp_path / 'a.txt', 500)
    prepare.main(['text', '--input', str(path), '--data_dir', str(tmp_path)])
    data = prepare.Tokens('text', 'train', 8, tmp_path)
    assert (data.vocab_size, data.meta['eot'], data.shards[0].dtype) == (
        50257, gpt2.eot_token, '<u2')
    text = ''.join(gpt2.decode(all_tokens(tmp_path, 'text', part).tolist())
                   for part in ('train', 'val'))
    assert (sorted(text.replace('<|endoftext|>', '').splitlines())
            == sorted(path.read_text().splitlines()))


INFO = prepare.medmnist_info()
COUNTS = {'train': 1000, 'val': 30, 'test': 41}


def archive(folder, flag='pathmnist', size=28, compressed=False, counts=COUNTS, **changes):
    """An archive in MedMNIST's layout, of noise with every class in it; changes: other arrays."""
    rng, info, arrays = np.random.default_rng(0), INFO[flag], {}
    classes, several = len(info['label']), flag == 'chestmnist'
    for split, n in counts.items():
        shape = (n, size, size, 3) if info['n_channels'] == 3 else (n, size, size)
        arrays[f'{split}_images'] = rng.integers(0, 256, shape, np.uint8)
        labels = rng.integers(0, 2, (n, classes)) if several else np.arange(n)[:, None] % classes
        arrays[f'{split}_labels'] = labels.astype(np.uint8)
    path = folder / f'{flag}{"" if size == 28 else f"_{size}"}.npz'
    (np.savez_compressed if compressed else np.savez)(path, **{**arrays, **changes})
    return path


def prepare_images(root, flag='pathmnist', *words):
    prepare.main([flag, '--path', str(root), '--data_dir', str(root),
                  '--shard_bytes', '1_000_000', *words])


@pytest.mark.parametrize('flag, size, compressed', [
    ('pathmnist', 28, False), ('pathmnist', 28, True), ('chestmnist', 28, True),
    ('pneumoniamnist', 28, False), ('retinamnist', 64, True)])
def test_images_are_those_of_medmnist_itself(tmp_path, flag, size, compressed):
    import medmnist
    path = archive(tmp_path, flag, size, compressed, FEW)
    prepare_images(tmp_path, flag, '--size', str(size))
    info, multi = INFO[flag], flag == 'chestmnist'
    for split in FEW:
        data = prepare.Images(path.stem, split, tmp_path)
        x, y = data.fixed_batch(0, 100)
        theirs = getattr(medmnist, info['python_class'])(split, root=tmp_path, size=size)
        images, labels = zip(*(theirs[i] for i in range(len(data))))
        assert len(data) == theirs.imgs.shape[0] == data.meta['images'][split]
        assert (x.dtype == torch.uint8 and x.is_contiguous()
                and x.shape[1:] == (data.channels, size, size))
        assert np.array_equal(x.permute(0, 2, 3, 1).squeeze(),
                              np.stack([np.array(i) for i in images]))
        assert y.dtype == (torch.float32 if multi else torch.int64) and y.ndim == 1 + multi
        assert np.array_equal(y.numpy().reshape(len(y), -1), np.stack(labels))
    assert (data.meta['kind'], data.task) == ('images', info['task'])
    assert data.classes == list(info['label'].values()) and data.num_classes == len(data.classes)
    assert (data.channels, data.size) == (info['n_channels'], size)
    chunks = prepare.medmnist_images(path, size, info)  # what is there is not downloaded again
    assert sum(len(labels) for _, labels, _ in chunks) == 141


@pytest.mark.skipif(sys.platform != 'linux',
                    reason='elsewhere the peak is also that of who started this')
def test_memory_does_not_grow_with_the_archive(tmp_path):
    path = archive(tmp_path, size=224, counts={'train': 400, 'val': 9, 'test': 9})
    assert path.stat().st_size > 60e6
    code = ('import prepare, run, sys\n'
            "before = run.peak_memory_bytes('cpu'); prepare.main(sys.argv[1:])\n"
            "print(run.peak_memory_bytes('cpu') - before)")
    command = ['pathmnist', '--size', '224', '--path', str(tmp_path), '--data_dir', str(tmp_path)]
    run = subprocess.run(
        [sys.executable, '-c', code, *command], cwd=HERE, capture_output=True, check=True)
    assert 0 < int(run.stdout.split()[-1]) < 30e6, run.stdout


# -----------------------------------------------------------------------------
# bench


def test_the_planner_takes_a_run_and_methods_and_counts_every_byte(tmp_path, capsys):
    path, bare = tmp_path / 'tiny.py', tmp_path / 'bare.py'
    path.write_text("# tiny\n# python train_gpt.py tiny.py\nrank = {'galore': 3, 'lte': 3}\n"
                    'block_size, n_layer, n_head, n_embd, vocab_size = 16, 1, 2, 32, 64\n')
    bare.write_text('n_layer = 2\n')
    methods = ['full', 'galore', 'lte']
    bench.plan([str(path), *(FILES[name] for name in methods)], '1e-6GB')  # where nothing fits
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if 'float' in line]
    assert rows == [[name, dtype, 'none'] for name in methods for dtype in ('float32', 'bfloat16')]
    shape = dict(n_layer=1, n_embd=32, n_head=2, dtype='float32')
    for script, more in ((train_llama, dict(n_mlp=48, vocab_size=64, block_size=16)),
                         (train_vit, dict(img_size=32, patch_size=16))):
        said = bench.planned({**script.defaults, **shape, **more, 'batch_size': 4})
        if torch.__version__ >= (2, 13):  # whose fake tensors know collectives
            settings = {**script.defaults, **shape, **more, 'batch_size': 4, 'shard': True}
            part = bench.planned(settings, ranks=2)
            assert all(0.4 < part[key] / said[key] < 0.6 for key in ('weights', 'state'))
            both = bench.planned({**settings, 'shard': False}, ranks=2)  # DDP
            sent = both['sent'] * settings['gradient_accumulation_steps']
            assert sent == pytest.approx(said['weights'], rel=0.02)
        if torch.__version__ >= (2, 13) and script is train_llama:
            with bench.fake_ranks(4), bench.watched() as watch:  # no rank ever holds a whole model
                run, _ = bench.stepper({**settings, 'n_layer': 9}, 4)
            sizes = [p.nbytes for p in run.model.parameters()]
            assert watch.peak < sum(sizes) / 4 + 2 * max(sizes)
        # two moments; buffers have none
        assert said['state'] - 2 * said['weights'] in range(-8192, 4096)
        # the peak is in the optimizer's step, or not much more
        assert 4 * said['weights'] - 16384 < said['total'] < 9 * said['weights']
    for word, budget, needle in ((path, '12', 'no number with a unit'), (path, 'xGB', 'unit'),
                                 (tmp_path / 'no.py', '12GB', 'is not there'),
                                 (bare, '12GB', 'does not say whose it is')):
        refused(capsys, lambda: bench.plan([str(word)], budget), needle)
    refused(capsys, lambda: bench.options_of(['memory', 'a.py', '--ranks=0']), '--ranks=0 is no')
    for words, name in ((['speed', '--dry'], 'dry'), (['memory', 'a.py', '--only=b'], 'only'),
                        (['memory', '--ranks=2'], 'ranks'), (['speed', '--budget=9GB'], 'budget')):
        refused(capsys, lambda: bench.options_of(words), f'--{name} does nothing here')
    refused(capsys, lambda: bench.options_of(['spead']), "'spead' is no bench", 'speed, memory')
    refused(capsys, lambda: bench.options_of(['speed', '--what=1']),
            "speed does not know '--what=1'")


def test_the_batch_that_a_plan_names_fits_and_the_next_one_does_not():
    settings = {**train_gpt.defaults, 'n_layer': 1, 'n_embd': 32, 'n_head': 2, 'vocab_size': 64,
                'block_size': 16, 'dtype': 'float32'}

    def total(rows):
        return bench.planned({**settings, 'batch_size': rows})['total']
    for rows in (3, 40, 700):  # of 16 tokens; where the step makes the peak, below and on the line
        free = total(rows)
        fits, said, *_ = bench.largest_batch(settings, free, 1)
        assert fits >= rows and said == pytest.approx(total(fits), rel=1e-3)
        assert total(fits) <= 1.001 * free < total(fits + max(fits // 100, 1))


def test_a_plan_is_of_the_weights_that_are_named(tmp_path, capsys):
    folder, adapter = tmp_path / 'deep', tmp_path / 'adapter'
    shape = dict(n_layer=1, n_head=2, n_embd=360, vocab_size=280)  # 1.7M; of 12 layers 19M
    for place, name, about in (
            (folder, 'config.json', dict(shape, model_type='gpt2', n_positions=32)),
            (adapter, 'adapter_config.json', {'base_model_name_or_path': str(folder)})):
        place.mkdir()
        config.write_json(place / name, about)
    torch.save({'model': {}, 'model_args': dict(shape, block_size=32, bias=True)},
               tmp_path / 'nano.pt')
    for source in (folder, adapter, tmp_path / 'nano.pt'):
        bench.plan([f'--init_from={source}', '--block_size=16', '--dataset=none', FILES['full'],
                    '--dtype=float32'], '1e-6GB')
        said = capsys.readouterr().out
        assert said.startswith('2M parameters, sequences of 16, 1 x 1e-6GB, computed in float32')
    for words, said in ((['config/llama_finetune.py'], 'is a GPT-2: train it by train_gpt.py'),
                        (['--block_size=64'], 'block_size=64 is more than the 32 positions')):
        with pytest.raises(SystemExit):
            bench.plan([*words, f'--init_from={folder}', '--dataset=none', FILES['full']], '1GB')
        assert said in capsys.readouterr().err


def test_every_method_of_one_process_is_planned(monkeypatch, capsys):
    names = [name for name in FILES if not name.startswith(('local_', 'galolte_2bit'))]
    monkeypatch.setattr(bench, 'largest_batch', lambda *_: (3, *[1e9] * 8))
    shape = '--n_layer=1 --n_embd=32 --n_head=2 --vocab_size=64 --block_size=16 --dataset=none'
    bench.plan(shape.split(), '12GiB')
    said = capsys.readouterr()
    for name in names:
        assert said.out.count(f'\n{name:16}') == 2, name
    assert said.err.count('error: ') == 1 and "sync='merge' averages what several" in said.err
    bench.plan([*shape.split(), '--param_dtype=bfloat16', FILES['full']], '12GiB')
    assert capsys.readouterr().out.count('\nfull') == 1


def test_a_deep_model_is_planned_by_two_shallow_ones():
    settings = {**train_gpt.defaults, **bench.method('galore'), 'n_layer': 9, 'n_embd': 32,
                'n_head': 2, 'vocab_size': 64, 'block_size': 16, 'batch_size': 4, 'rank': 8,
                'dtype': 'float32'}
    found = bench.planned(settings)
    with mock.patch.object(bench, 'of_depth', lambda measure, settings: measure(settings)):
        assert found == bench.planned(settings)


def test_a_planner_patches_nothing_of_ours_and_leaves_no_fake_behind():
    before = [dict(vars(module)) for module in (rules, lowrank, galore)]
    with bench.watched() as watch:
        assert before == [dict(vars(module)) for module in (rules, lowrank, galore)]
        x, out = torch.zeros(2**21), torch.zeros(2**21, dtype=torch.bfloat16)
        rules.round_(out, x, 7)  # as if it were compiled, without temporaries
        assert x.nbytes + out.nbytes <= watch.peak < x.nbytes + out.nbytes + 100


def test_a_cell_is_kept_as_soon_as_it_is_known_beside_a_reference(tmp_path, monkeypatch, capsys):
    (tmp_path / 'assets').mkdir()
    monkeypatch.setattr(bench, 'HERE', tmp_path)
    before = []

    def measure(about, settings, tell):
        before.append(len(bench.kept('some')))
        return {'x': 1.5} if about['case'] else None
    bench.measure_all('some', (({'case': i}, {}) for i in (0, 1, 2, 10)), '', measure)
    with pytest.raises(SystemExit):
        bench.measure_all('some', [({'case': 0}, {})], 'galore', measure)
    assert (before == [0, 0, 1, 2]
            and [line['case'] for line in bench.kept('some', x=1.5)] == [1, 2, 10])
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == [
        '4 of 4 lines are missing in assets/some.jsonl', 'case=1 x=1.5']
    assert said.err.splitlines()[::3] == ['1 of 4 · 0 · time left: not known yet',
                                          '4 of 4 · 10 · about 1 min left']
    base = {**train_gpt.defaults, 'block_size': 16, 'vocab_size': 64, 'n_layer': 1, 'n_head': 2,
            'n_embd': 32, 'batch_size': 4, 'device': 'cpu', 'dtype': 'float32'}
    cells = bench.named(base, {'full': {}, 'lora, rank=4': {}}, case='tiny')
    for _ in range(2):  # the second time nothing is left to measure
        bench.time_steps('time', cells, 'tiny', 2)
    full, lora = bench.kept('time', case='tiny')
    assert (lora['method'] == 'lora, rank=4' and len(lora['ratios']) == 5
            and full['ratios'] == [1.0] * 5)
    assert (lora['to_full'] == np.median(lora['ratios']) > 0
            and lora['trainable'] < full['trainable'])
    assert '0 of 2 lines are missing' in capsys.readouterr().out


DEEDS = """
import torch
with bench.fake_card() as watch:
    watch.phase, x, number = 'step', torch.ones(3, 3, device='cuda:0'), torch.ones(())
    torch.ones(3).pin_memory().to('cuda:0', non_blocking=True), x * number  # these do not wait
    x.sum().item(), x.cpu(), torch.ones(3).to('cuda:0'), torch.ones(3).to(
        'cuda:0', non_blocking=True)
    x[torch.tensor([0])], torch.stack([x[0, 0], number])
    torch.linalg.svd(x), x.index_put_([x[:, 0] > 0], x)
print(json.dumps(watch.wrong()))

def peak_of_a_loss(dtype):
    accumulate = linear_cross_entropy._linear_cross_entropy_batch_chunked_accumulator
    how = 'none' if dtype == torch.bfloat16 else 'mean'
    with bench.FakeCard(allow_non_fake_inputs=True) as fake, bench.Watch(fake) as watch:
        x, weight = (torch.empty(n, 16, dtype=dtype, device='cuda') for n in (3000, 999))
        targets, before = torch.zeros(3000, dtype=torch.int64, device='cuda'), watch.now
        into = torch.empty(3000, dtype=dtype, device='cuda') if how == 'none' else None
        accumulate(x, weight, targets, None, None, how, -100, 0.0, 1024, 'compact', torch.float32,
                   True, True, False, loss_grad_output=into)
    return watch.peak - before
peaks = []
if hasattr(torch.nn, 'LinearCrossEntropyOptions'):
    from torch.nn.modules import linear_cross_entropy
    peaks = [peak_of_a_loss(dtype) for dtype in (torch.bfloat16, torch.float32)]
print(json.dumps(peaks))

import model
from unittest import mock
from torch.nn import functional as F
def attends(q, *_, enable_gqa, **__):
    attention.append([str(q.dtype), enable_gqa])
def loses(x, *_, **__):
    losses.append(str(x.dtype))
    return x.sum(1)
attention, losses, patch = [], [], mock.patch.object
with bench.fake_card(), patch(F, 'scaled_dot_product_attention', attends), patch(
        F, 'linear_cross_entropy', loses, create=True):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k = (torch.empty(1, heads, 3, 4, dtype=dtype, device='cuda') for heads in (4, 2))
        model.attention(q, k, k, grouped=True)
    for can in (True, False) if peaks else ():
        with patch(torch.cuda, 'is_bf16_supported', lambda **_: can):
            x = torch.empty(9, 16, dtype=torch.bfloat16, device='cuda')
            model.chunked_loss(x, x, torch.zeros(9, dtype=torch.int64, device='cuda'), 'none')
print(json.dumps([*attention, losses]))
bench.answer(json.loads(sys.argv[2]))
"""


@pytest.fixture(scope='session', autouse=True)
def fake_card(request, spawn):
    """Begins the process with a fake card if a test asks for it: it runs beside the others. A
    future of its lines."""
    if not any('said_of_card' in item.fixturenames for item in request.session.items):
        yield
        return
    cells = [cell for cell in bench.FAKE_CELLS
             if cell[3] == 1 or torch.__version__ >= (2, 13)]  # collectives
    with ThreadPoolExecutor(1) as pool:
        yield cells, pool.submit(lambda: list(bench.beside_fake_card(DEEDS, json.dumps(cells))))


@pytest.fixture(scope='session')
def said_of_card(fake_card):
    """Cells, and the lines of that process when it has ended."""
    cells, lines = fake_card
    return cells, lines.result()


@wants_a_compiler
def test_on_a_card_that_is_not_there_nothing_waits_and_no_devices_mix(said_of_card):
    cells, lines = said_of_card
    wrong, _, _, *found = map(json.loads, lines)
    deeds = [words.split(', at')[0].removeprefix('step waits: ') for words in wrong]
    assert deeds == [
        'index mixes devices', 'stack mixes devices', '_linalg_svd', '_local_scalar_dense',
        '_to_copy from cpu to cuda', '_to_copy from cuda to cpu', 'index_put_']
    assert [tuple(cell) for cell, _ in found] == cells
    assert not [(cell, words) for cell, words in found if words]


@wants_a_compiler
def test_a_card_is_asked_for_what_it_has_kernels_for(said_of_card):
    *attention, losses = json.loads(said_of_card[1][2])
    assert attention == [
        ['torch.bfloat16', True], ['torch.float16', False], ['torch.float32', False]]
    # with and without units for bfloat16; older torch has no such loss
    assert losses == ['torch.bfloat16', 'torch.float32'] * hasattr(nn, 'LinearCrossEntropyOptions')


@wants_a_compiler
def test_a_plan_counts_what_a_card_takes_for_a_loss_in_chunks(said_of_card):
    peaks = json.loads(said_of_card[1][1])
    for dtype, peak in zip((torch.bfloat16, torch.float32), peaks):
        with bench.watched() as watch:
            x, weight = (torch.empty(n, 16, dtype=dtype, requires_grad=True) for n in (3000, 999))
            before = watch.now
            models.chunked_loss(weight, x, torch.zeros(3000, dtype=torch.int64), 'mean').backward()
        assert watch.peak - before == pytest.approx(peak, rel=0.03)
    settings = {**train_gpt.defaults, 'n_layer': 2, 'n_head': 8, 'n_embd': 32, 'vocab_size': 64,
                'dtype': 'bfloat16'}
    plain, dropped = (bench.planned({**settings, 'dropout': share}) for share in (0.0, 0.1))
    assert dropped['total'] < 1.3 * plain['total']  # no dropped matrix of (time, time) is kept
    apart = bench.planned({**settings, 'documents': True})
    assert plain['total'] < apart['total'] < 1.4 * plain['total']


def test_the_peak_of_a_card_is_looked_up_and_operations_are_counted_by_what_trains():
    for name, dtype, peak in (
            ('NVIDIA H100 80GB HBM3', 'bfloat16', 989e12), ('NVIDIA H100 PCIe', 'bfloat16', 756e12),
            ('NVIDIA A100-SXM4-40GB', 'float16', 312e12), ('NVIDIA L40S', 'bfloat16', 362e12),
            ('NVIDIA L4', 'bfloat16', 121e12), ('NVIDIA GeForce RTX 3060', 'float16', 25.6e12),
            ('Tesla T4', 'float16', 65e12), ('Tesla T4', 'bfloat16', None),
            ('NVIDIA A10G', 'bfloat16', None), ('NVIDIA GeForce RTX 3090 Ti', 'bfloat16', None),
            ('NVIDIA H100 NVL', 'bfloat16', None),
            ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16', None),
            ('NVIDIA L4', 'float32', None)):
        assert peak_of(name, dtype) == peak, name
    net, attention = tiny_gpt(), 12 * 2 * 16 * 16
    # numbers of the blocks' weights, and of the output layer
    products = 2 * (3 + 1 + 4 + 4) * 16**2 + 31 * 16
    assert operations_of(net, 16, 16) == 6 * products + attention
    lowrank.apply_mhlora(net, ('attn',), heads=2, rank=3)
    lowrank.freeze_rest(net)  # heads of rank 6 on matrices (48, 16) and (16, 16)
    assert operations_of(net, 16, 16) == 4 * products + 2 * 6 * 6 * (48 + 16 + 16 + 16) + attention
    net = tiny_gpt()
    lowrank.apply_mhlora(net, ('attn',), rank=3, factors='basis', merge_every=1)
    by_galore = 2 * (3 + 1) * 16**2
    wanted = (6 * (products - by_galore) + 4 * by_galore
              + 2 * 2 * 3 * (48 + 16 + 16 + 16) + attention)
    assert operations_of(net, 16, 16) == wanted


def test_every_training_behind_the_tables_is_a_command_line_and_its_line_is_found():
    trainings = runpy.run_path(f'{HERE}/assets/measure.py')['TRAININGS']
    for name, cells in trainings.items():
        for about, settings in cells:
            words = [f'--{key}={value}' for key, value in settings.items() if key != 'ranks']
            settings_of(bench.script_of(settings), *words, ranks=settings.get('ranks', 1))
    for name in ('screening', 'quality', 'smaller'):
        assert (sum(bool(bench.kept(name, **about)) for about, _ in trainings[name])
                > 0.9 * len(trainings[name]))


# -----------------------------------------------------------------------------
# a run's folder: nothing of others is lost, nothing damaged is used


def test_a_run_takes_no_folder_that_is_not_its_own(root, tmp_path, capsys):
    def run(*words, script='gpt', out=tmp_path):
        return lambda: train(script, root, out, '--max_iters=1', *words)
    for name in ('best.pt', 'log.jsonl'):  # of somebody else: no config.json of ours
        (tmp_path / name).write_text('precious')
        (tmp_path / 'config.json').write_text('{"lowrank": 1}')
        for words in ((), ('--overwrite=True',)):
            refused(capsys, run(*words), name, 'no config.json of a run of ours')
        assert (tmp_path / name).read_text() == 'precious'
        (tmp_path / name).unlink()
    (tmp_path / 'config.json').unlink()
    (tmp_path / 'theirs').write_text('precious')
    (tmp_path / 'ckpt.pt.tmp').symlink_to(tmp_path / 'theirs')  # it is not written through
    (tmp_path / 'tokenizer').mkdir()
    (tmp_path / 'tokenizer' / 'tokenizer.json').write_text('precious')
    refused(capsys, run(), 'tokenizer', 'was not written by this command')
    assert (tmp_path / 'tokenizer' / 'tokenizer.json').read_text() == 'precious'
    shutil.rmtree(tmp_path / 'tokenizer')
    (tmp_path / 'best.pt.0123abcd.tmp').write_text('half')  # nobody says whose
    unlock()  # as the end of a process does
    with open(tmp_path / '.lock', 'w') as lock:  # another process trains there
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused(capsys, run(), 'another run')
    run()()
    assert (tmp_path / 'best.pt.0123abcd.tmp').exists()
    # before data are read
    refused(capsys, run('--dataset=nothing'), 'already holds a run', '--overwrite=True')
    run('--overwrite=True')()
    assert (tmp_path / 'theirs').read_text() == 'precious'
    # of a run of ours it is a kill's
    assert [path.name for path in tmp_path.glob('*.tmp')] == ['ckpt.pt.tmp']
    (tmp_path / 'tokenizer' / 'notes.txt').write_text('precious')
    refused(capsys, run('--overwrite=True'), 'notes.txt, which this command did not write')
    # evaluating makes no folder ours
    for script, content in (('gpt', b'theirs'), *((script, None) for script in SCRIPTS)):
        out = tmp_path / script / str(content)
        out.mkdir(parents=True)
        if content:
            (out / 'ckpt.pt').write_bytes(content)
        start(SCRIPTS[script], tiny(script, root, out, '--eval_only=True', '--max_iters=1'))
        if content:
            refused(capsys, run('--overwrite=True', script=script, out=out), 'ckpt.pt', 'ours')
            assert (out / 'ckpt.pt').read_bytes() == content
        else:
            run(script=script, out=out)()


def test_a_full_disk_ends_a_run_in_one_sentence_and_costs_no_checkpoint(
        root, runs, tmp_path, capsys):
    out = shutil.copytree(runs('gpt_full', 4), tmp_path / 'a')
    before, limits = (out / 'ckpt.pt').read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError) as ended:
            train('gpt', root, out, '--max_iters=8', '--init_from=resume',
                  '--gradient_accumulation_steps=2')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    capsys.readouterr()
    # what Python does with it, before it ends with 1
    sys.excepthook(ended.type, ended.value, ended.tb)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'ckpt.pt' in said and 'File too large' in said
    assert (out / 'ckpt.pt').read_bytes() == before and not list(out.glob('*.tmp'))


# -----------------------------------------------------------------------------
# the first page


def test_the_snippets_of_the_readme_run():
    with open(f'{HERE}/README.md', encoding='utf-8') as file:
        snippets = file.read().split('```python run\n')[1:]
    assert len(snippets) == 2
    for snippet in snippets:
        model, batches = tiny_gpt(n_embd=64), [tokens_of(2, 3, 9) for _ in range(3)]
        before = model(*batches[0]).item()
        exec(snippet.split('```')[0], dict(model=model, batches=batches, torch=torch))
        assert model(*batches[0]).item() < before


@pytest.mark.parametrize('name', ['ddp', 'accumulation', 'scaler', 'accelerate', 'transformers'])
def test_loops_that_people_write_train(tmp_path, monkeypatch, name):
    with open(f'{HERE}/assets/README.md', encoding='utf-8') as file:
        snippet = file.read().split(f'```python run {name}\n')[1].split('```')[0]
    model, batches = tiny_gpt(n_embd=64).float(), [tokens_of(2, 3, 9)] * 6
    names = dict(model=model, batches=batches, torch=torch, device='cpu')
    if name == 'accelerate':
        pytest.importorskip('accelerate')
    if name == 'transformers':
        pytest.importorskip('accelerate')
        theirs = pytest.importorskip('transformers')
        model = names['model'] = theirs.LlamaForCausalLM(theirs.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2))
        names['data'] = [dict(input_ids=list(range(9)), labels=list(range(9)))] * 8
    monkeypatch.chdir(tmp_path)

    def loss():
        if name != 'transformers':
            return model(*batches[0]).item()
        tokens = torch.arange(9)[None]
        return model(input_ids=tokens, labels=tokens).loss.item()
    before = loss()
    if name == 'ddp':
        torch.distributed.init_process_group(
            'gloo', f'file://{tmp_path}/pair', rank=0, world_size=1)
    try:
        exec(snippet, names)
    finally:
        # the wrapper first, and gloo's threads have to be at rest: see Meter.close
        if name == 'ddp':
            names.pop('net', None)
            time.sleep(0.2)
            torch.distributed.destroy_process_group()
    assert loss() < before


# -----------------------------------------------------------------------------
# runs that something goes wrong in


@pytest.mark.parametrize('name', ['full', 'fira', 'galore_lean', 'galolte'])
def test_what_is_not_finite_is_never_saved_over_what_is(root, tmp_path, name):
    run, data = built('llama', root, tmp_path, *method(name, '--n_layer=1'))
    for step in range(4):
        train_llama.train_step(
            run, step, lambda micro_step: data.batch(8, step, rows=rows_of_rank(run)))
    save(run, 'ckpt.pt', dict(step=4), resumable=True)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [x for state in run.optimizer.state.values()
                for x in state.values() if torch.is_tensor(x)]
    for x, value in zip((x for x in tensors if x.is_floating_point()),
                        itertools.cycle((math.nan, math.inf))):
        last = x.detach()[(-1,) * x.dim()]
        kept = last.clone()
        last.fill_(value)
        with pytest.raises(SystemExit, match='at step 5 is not finite.*ckpt.pt of step 4'):
            save(run, 'ckpt.pt', dict(step=5), resumable=True)
        last.copy_(kept)
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    save(run, 'ckpt.pt', dict(step=5), resumable=True)  # all of it is whole again


def test_a_float16_run_counts_the_steps_it_skips_and_ends_if_it_skips_them_all(root, tmp_path):
    run, data = built('gpt', root, tmp_path, '--param_dtype=float32', '--dtype=float16')
    meter = Meter(run, 0, 128, 'tokens')
    next(run.model.parameters()).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(SystemExit, match='every gradient at step 40 is not finite.*no checkpoint'):
        for step in range(40):
            meter.add(*train_gpt.train_step(run, step, lambda micro_step: data.batch(8, step)))
            if step in (3, 39):
                meter.line(step + 1, 0.1)
    (line,) = records(tmp_path)
    assert (line['step'], line['skipped_steps'], line['loss_scale']) == (4, 4, 4096)


@pytest.mark.parametrize('script', SCRIPTS)
def test_auto_begins_goes_on_after_a_kill_between_two_files_and_names_what_changed(
        root, tmp_path, capsys, script):
    best = 'best_val_auc' if script == 'vit' else 'best_val_loss'
    train(script, root, tmp_path, '--init_from=auto')
    assert 'resumed' not in capsys.readouterr().out
    before = saved(tmp_path, 'best.pt')
    (tmp_path / 'best.pt').unlink()  # ckpt.pt is written first
    again = train(script, root, tmp_path, '--init_from=auto')
    assert (same_state(saved(tmp_path, 'best.pt')['model'], before['model'])
            and again[best] == before[best])
    steps = [(step, key) for key in ('val_loss', 'test_loss') for line in records(tmp_path)
             for step in [line['step']] if key in line]
    assert len(steps) == len(set(steps))  # nothing twice
    end = train(script, root, tmp_path, '--init_from=auto', '--max_iters=8', '--beta1=0.8')
    assert end['step'] == 8 and end['data'] == built(script, root, tmp_path)[1].fingerprint
    said = 'resumed with other settings than before: max_iters 4 -> 8, beta1 0.9 -> 0.8\n'
    assert said in capsys.readouterr().out


def test_a_run_goes_on_with_the_data_it_began_with(root, tmp_path, capsys):
    train('gpt', root, tmp_path / 'run')
    prepare_text(tmp_path, numbered(tmp_path / 'other.txt'), '--name', 'tiny')
    words = tiny('gpt', tmp_path, tmp_path / 'run', '--init_from=resume', '--max_iters=8')
    refused(capsys, lambda: start(train_gpt, words),
            "'tiny' is not the one that this run began with")


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_signal_ends_an_evaluation(root, tmp_path, script):
    train(script, root, tmp_path, '--max_iters=3')
    with signal_in_batch(0, training=False):  # in the first of two
        stopped = train(script, root, tmp_path, '--init_from=resume', '--max_iters=8')
    assert stopped['step'] == 4 and 4 not in {
        **logged(tmp_path, 'val_loss'), **logged(tmp_path, 'test_loss')}


# -----------------------------------------------------------------------------
# prompts, which are read and not learned


def test_of_prompts_no_token_is_a_target_and_every_other_one_is(root):
    data = prepare.Tokens('answers', 'train', 16, root, documents=False)
    asked = {}  # no prompt is in both splits
    for split in ('train', 'val'):
        prompted = (all_tokens(root, 'answers', split) >= prepare.PROMPT).astype(np.uint8).tobytes()
        asked[split] = {*map(len, prompted.split(b'\0'))} - {0}
    assert asked['train'] and asked['val'] and not asked['train'] & asked['val']
    assert (sum(data.meta['tokens'].values())
            == sum(len(''.join(x.values())) + 1 for x in ANSWERS) + 10)
    assert sum(data.meta['bytes'].values()) == sum(len(x['completion']) for x in ANSWERS) + 9
    for x, y, weights in (data.batch(8, step) for step in range(20)):
        following = torch.cat([x[:, 1:], torch.full((8, 1), -1)], 1)
        assert not {*map(int, y[y >= 0])} & set(b'p?') and {*map(int, y.unique())} > {-100, 256}
        learned = (y[:, :-1] >= 0)
        assert torch.equal(y[:, :-1][learned], following[:, :-1][learned])
        assert {*map(int, following[:, :-1][~learned])} <= set(b'p?')
        assert weights.unique().item() == pytest.approx(1 / int((y >= 0).sum()))


def test_a_batch_of_prompts_alone_is_no_loss_and_a_run_learns_to_answer(root, tmp_path):
    gpt, idx = tiny_gpt(), tokens_of(2, 16)
    assert gpt(idx, torch.full_like(idx, -100), torch.zeros(2, dtype=double)).item() == 0
    words = ('--dataset=answers', '--block_size=64', '--max_iters=60', '--eval_interval=30',
             '--eval_iters=4')
    train('gpt', root, tmp_path, *words)
    losses = logged(tmp_path, 'val_loss')
    assert losses[60] < 2.5 < losses[0]
    assert (tmp_path / 'curve.png').read_bytes().startswith(b'\x89PNG')


# -----------------------------------------------------------------------------
# sixteen bits


def rounded(x, key, first=0):
    out = torch.empty_like(x, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    rules.round_(out, x.clone(), key, first)
    return out.float()


def test_rounding_is_right_on_average_and_independent_from_place_to_place_and_time_to_time():
    x = normal(64, 50, dtype=torch.float32) * 10.0 ** torch.arange(-32, 32, device=DEVICE)[:, None]
    keys = [hash((seed, step)) for seed in (1, 2) for step in range(1000)]
    # (times, numbers)
    ups = torch.stack([(rounded(x, key) > x).flatten() for key in keys]).double()
    low = (x.view(torch.int32) & -2**16).view(torch.float32)
    # of the way away from zero
    share = (x.view(torch.int32) & (2**16 - 1)).flatten().double() / 2**16
    share = torch.where(x.flatten() < 0, 1 - share, share)
    error = (ups.mean(0) - share) / (share * (1 - share) / len(keys)).sqrt()
    assert error.abs().max() < 5 and abs(error.mean()) < 0.1 and 0.9 < error.std() < 1.1
    assert ((rounded(x, 5) - low).abs() <= 2.0**-7 * x.abs()).all()
    noise = (ups - share) / (share * (1 - share)).sqrt()  # of mean zero and variance one
    rolled = [noise.roll(*by) for by in ((1, 0), (1, 1), (50, 1), ((1, 1), (0, 1)))]
    for other in (*rolled, noise.flip(1)):
        assert abs((noise * other).mean()) < 5 / math.sqrt(noise.numel())


def test_rounding_drifts_nowhere():
    x = normal(2**20, dtype=torch.float32)
    spacing = 2.0 ** (x.abs().log2().floor() - 7)
    drift = sum(((rounded(x, key) - x) / spacing).mean().item() for key in range(400)) / 400
    assert abs(drift) < 1e-4  # its standard error is 2e-5


def test_a_compiled_step_begins_its_random_bits_with_a_tensor_of_32_bits():
    seen = []
    with mock.patch.object(rules, 'compiled', lambda _: lambda *args: seen.append(args[-1])):
        rules.in_pieces(rules.put_rows, [torch.zeros(4, 3)] * 2, key=7, first=5, compile=True)
    assert (seen[0].dtype, seen[0].item()) == (torch.int32, rules.start_of(7, 5))


def test_random_bits_are_even_and_independent_of_neighbours_other_keys_and_each_other():
    x, halves = torch.empty(2**20, device=DEVICE), {}
    for key in (7, 8, 7 + 2**16):
        bits = rules.random_bits(x, rules.start_of(key, 0))
        halves[key, 0], halves[key, 1] = rules.upper(bits), rules.lower(bits)
    noise = {where: ((half + 0.5) / 2**16 - 0.5) * 12**0.5 for where, half in halves.items()}
    for half, u in zip(halves.values(), noise.values()):
        assert half.min() >= 0 and half.max() < 2**16 and abs(u.mean()) < 5 / 2**10
        for lag in (1, 2, 64, 96, 256, 768, 1024, 4096, 5461, 2**16):
            assert abs((u[lag:] * u[:-lag]).mean()) < 5 / 2**10, lag
        counts = torch.bincount(half >> 6, minlength=2**10)
        assert abs(((counts - 2**10) ** 2 / 2**10).mean() - 1) < 0.3
    for a, b in itertools.combinations(noise.values(), 2):
        assert abs((a * b).mean()) < 5 / 2**10
    some = rules.random_bits(x[:1000], rules.start_of(7, 5000))  # of a part
    assert torch.equal(some, rules.random_bits(x, rules.start_of(7, 0))[5000:6000])


def test_what_bfloat16_holds_is_not_rounded_and_every_shard_rounds_alike():
    codes = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16)
    for key in range(20):
        held = codes.view(torch.bfloat16).float()
        torch.testing.assert_close(rounded(held, key), held, rtol=0, atol=0, equal_nan=True)
        nan = torch.tensor([2**31 - 1, 0x7FC00000, 0xFFC00000 - 2**32], dtype=torch.int32)
        # CUDA's is the first, a CPU's the last
        assert rounded(nan.view(torch.float32), key).isnan().all()
    x = normal(3 * 2**20 + 77, dtype=torch.float32)
    whole = rounded(x, 7)
    for a, b in ((0, 1), (5, 2**20 + 3), (2**20, 2**21), (2**21 - 9, len(x))):
        assert torch.equal(rounded(x[a:b], 7, a), whole[a:b])
    states = {}
    # rows of a step on bfloat16
    for first, last, chunk in ((0, 60, 2**18), (0, 17, 2000), (17, 60, 2000)):
        p, state = x[:60 * 400].view(60, 400)[first:last].bfloat16(), {'step': 3}
        rules.new_moments(state, p, None)
        where = dict(betas=(0.99, 0.99), eps=1e-8, key=7, first=first * 400)
        with mock.patch.object(rules, 'CHUNK_OF_A_CPU', chunk):
            rules.step_(p, x[-60 * 400:].view(60, 400)[first:last].bfloat16(), state, 0.01, 0.9,
                        **where)
        states[first, last] = torch.stack([p, *(x for x in state.values() if torch.is_tensor(x))])
    assert torch.equal(states[0, 60], torch.cat([states[0, 17], states[17, 60]], 1))
    square, transposed = x[:2500].view(50, 50), torch.empty(50, 50, dtype=torch.bfloat16).T
    rules.round_(transposed, square.clone(), 7)
    assert (torch.equal(transposed.float().flatten(), whole[:2500])
            and not torch.equal(whole, rounded(x, 8)))
    twice = rounded(x[:2**20].repeat(2), 7)  # no two blocks of 2^20 alike
    assert (twice[:2**20] != twice[2**20:]).float().mean() > 0.1
    W = torch.zeros(8, 2**18, dtype=torch.bfloat16)  # 4 rows are a block
    X, Y = torch.ones(8, 1, dtype=torch.bfloat16), x[:2**18, None].bfloat16()
    galore.add_(W, X, Y, False, 0.3)
    assert (W[:4] != W[4:]).float().mean() > 0.1
    M, V = torch.zeros(2, 50, 50, dtype=torch.bfloat16)
    rules.write_moments({'exp_avg': M, 'exp_avg_sq': V, 'step': 1}, [square, square], 7)
    assert (M != V).float().mean() > 0.1 and not torch.equal(M, square.bfloat16())
    for beta1 in (0.9, 0.99):  # of a short average the nearest
        state = {'step': 1, 'exp_avg': torch.zeros_like(M), 'exp_avg_sq': torch.zeros_like(M)}
        rules.step_(torch.zeros_like(M), square.bfloat16(), state, 0.1, 1.0, (beta1, 0.99), 1e-8)
        kept, wanted = state['exp_avg'], square.bfloat16().float() * (1 - beta1)
        assert torch.equal(kept, wanted.bfloat16()) == (beta1 == 0.9)
    layer = lowrank.MHLoRALinear(nn.Linear(50, 50), rank=2, factors='basis', merge_every=1)
    before = layer.weight.clone()
    lowrank.merged_state_dict(layer, dtype=torch.bfloat16)
    assert torch.equal(layer.weight, before)  # what is rounded stays as it is


def graphs_compiled():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def adam_in_few_bits(p, n, compile, bits, steps):
    """p and its moments after some steps of rules.step_."""
    state, p = {'step': 0}, p[:, :n].clone()
    rules.new_moments(state, p, bits)
    for step in range(steps):
        state['step'] += 1
        rules.step_(p, p.roll(1, 0), state, 0.01 / (step + 1), 0.99 - step / 100, (0.9, 0.999),
                    1e-8, step, first=7 * n, compile=compile)
    return [p, *(x for x in state.values() if torch.is_tensor(x))]


def moved(p, n, compile, bits, steps):
    """A weight after some moves."""
    W, scales = p[:, :n].clone(), None
    if bits:
        W, scales = rules.new_codes(p[:, :n], 8)
        rules.code_(W, scales, p[:, :n])
    for step in range(steps):
        galore.move_(W, p[:, -n:].clone(), 0.01 / (step + 1), 0.99 - step / 100, step, 7 * n,
                     scales, compile)
    return [W] if scales is None else [W, scales]


def averages(p, n, compile, bits, steps):
    """What Muon makes orthogonal, and its moment."""
    state, group = {'step': 0}, dict(momentum=0.95, state_bits=bits, compile=compile)
    for step in range(steps):
        state['step'] += 1
        ahead = rules.nesterov(p[:, :n].roll(step, 0), state, group, step, 7 * n)
    return [ahead, *(x for x in state.values() if torch.is_tensor(x))]


@wants_a_compiler
@pytest.mark.parametrize('function, bits, most', [
    (adam_in_few_bits, None, 3), (adam_in_few_bits, 8, 16), (moved, None, 3), (moved, 8, 10),
    (averages, None, 3)])
def test_compiled_steps_have_the_same_bits_and_neither_steps_nor_shapes_compile_again(
        function, bits, most):
    p = normal(40, 1024, dtype=torch.float32).bfloat16()
    before, metrics.generated_kernel_count = graphs_compiled(), 0
    for rows, n in ((40, 512), (30, 768), (3, 1024)):
        found, wanted = (function(p[:rows], n, compile, bits, 3) for compile in (True, False))
        for a, b in zip(found, wanted):
            if DEVICE == 'cpu':
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            elif a.dtype == torch.float32:  # a card adds products with one rounding
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
            else:
                assert (a == b).float().mean() > 0.99
    # of codes each length of a row is compiled on its own; here moments have blocks of 256
    assert graphs_compiled() - before == (3 if function is moved and bits else 1)
    assert 0 < metrics.generated_kernel_count / (graphs_compiled() - before) <= most
    in_context = len(contextvars.copy_context())
    function(p[:rows], n, True, bits, 3)
    assert len(contextvars.copy_context()) == in_context  # a variable in it stays for ever


@wants_a_compiler
def test_what_is_compiled_for_a_gradient_in_its_own_place_is_not_taken_for_others():
    p, before = normal(600, dtype=torch.float32).bfloat16(), graphs_compiled()
    group = dict(state_bits=None, betas=(0.9, 0.999), eps=1e-8)
    for shape, make in (
            ((20, 30), None), ((20, 30), torch.clone), ((600,), torch.clone),
            ((30, 20), nn.Parameter), ((600, 1), torch.clone), ((20, 30), None)):
        found = []
        for compile in (True, False):
            state, x = {'step': 1}, p.clone().view(shape)
            if make is None:
                rules.adam(x, state, dict(group, compile=compile))
            else:
                x = make(x)
                rules.new_moments(state, x, None)
                with torch.no_grad():
                    rules.step_(x, x.flip(0), state, 0.01, 0.9, (0.9, 0.999), 1e-8, compile=compile)
            found.append([x, state['exp_avg'], state['exp_avg_sq']])
        assert all(map(torch.equal, *found))
    assert graphs_compiled() - before == 2


def test_a_group_may_be_empty_and_a_checkpoint_does_not_choose_what_is_compiled():
    p = nn.Parameter(torch.ones(3, 4))
    plain, compiles = (
        galore.GaLoreAdamW([dict(params=[]), dict(params=[p], rule='adamw')], compile=choice)
        for choice in (False, True))
    compiles.load_state_dict(plain.state_dict())
    assert plain.param_groups[1]['compile'] is False and compiles.param_groups[1]['compile'] is True


def test_steps_are_compiled_on_gpus_that_can(tmp_path, capsys):
    cpu, card = torch.device('cpu'), torch.device('cuda', 0)
    known = {}
    for capability, package, compiler in itertools.product(
            ((7, 5), (8, 0)), (None, 'triton'), (None, 'cc')):
        rules.has_compilers.cache_clear()
        with (mock.patch('torch.cuda.get_device_capability', lambda _: capability),
              mock.patch('importlib.util.find_spec', lambda _: package),
              mock.patch('shutil.which', lambda _: compiler)):
            known[capability[0], package, compiler] = rules.is_compiled(None, card)
            assert rules.is_compiled(True, cpu) and not rules.is_compiled(False, card)
            assert not rules.is_compiled(None, cpu)
    rules.has_compilers.cache_clear()
    assert [where for where, compiles in known.items() if compiles] == [(8, 'triton', 'cc')]
    with (mock.patch('torch.cuda.get_device_capability', lambda _: (8, 0)),
          mock.patch('importlib.util.find_spec', lambda _: 'triton'),
          mock.patch('shutil.which', lambda _: 'cc'),
          mock.patch('sysconfig.get_path', lambda _: str(tmp_path))):
        assert not rules.is_compiled(None, card)
    rules.has_compilers.cache_clear()
    assert capsys.readouterr().out.splitlines() == [
        f'steps in 16 and 8 bits are slow here: to compile them torch wants {what}'
        for what in ('triton and a C compiler', 'triton', 'a C compiler',
                     'Python.h (of python3-dev)')]


@wants_a_compiler
def test_a_backward_pass_steps_by_compiled_functions_from_any_thread():
    results = []
    for compile in (True, False):
        net = put(tiny_llama(n_embd=64, n_mlp=96).bfloat16(), rank=16, factors='basis',
                  merge_every=1)
        optimizer = galore.LowRankAdamW(
            net, lr=0.01, state_bits=16, per_layer=True, compile=compile)
        for step in range(2):
            optimizer.begin(step)
            loss = net(tokens_of(2, 8), tokens_of(2, 8))
            worker = threading.Thread(target=loss.backward)  # as autograd on a GPU has its own
            worker.start()
            worker.join()
            optimizer.step()
            optimizer.zero_grad()
        results.append(net.state_dict())
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


@pytest.mark.parametrize('kind', ['full', 'drop-in', 'fira', 'layer'])
def test_small_steps_on_bfloat16_add_up(kind):
    G = (normal(48, 4) * torch.tensor([8.0, 4, 2, 1]) @ normal(4, 64, seed=1)
         + 0.1 * normal(48, 64, seed=2))

    def run(dtype):  # how far 500 steps of 5e-6 along one gradient go
        linear = nn.Linear(64, 48, bias=False, dtype=dtype)
        nn.init.constant_(linear.weight, 0.02)
        start, group = (linear.weight.detach().double(),
                        dict(rank=4, update_proj_gap=10**6, basis='power'))
        if kind == 'layer':
            net = lowrank.MHLoRALinear(linear, rank=4, factors='basis', merge_every=1)
            optimizer = galore.LowRankAdamW(net, lr=2e-5, basis_every=10**6)
            optimizer.begin(0)
            net.basis.copy_(galore.basis_of(G.to(dtype), 4, transposed=True, basis='power'))
            trained, grad = net.factor, G.to(dtype).T @ net.basis
        else:
            group = {'full': {}, 'drop-in': group, 'fira': dict(group, rule='fira')}[kind]
            group['params'] = [linear.weight]
            optimizer = galore.GaLoreAdamW([group], lr=5e-6 if kind == 'full' else 2e-5)
            trained, grad = linear.weight, G.to(dtype)
        for _ in range(250):
            trained.grad = grad.clone()
            optimizer.step()
        return (linear.weight.detach().double() - start).flatten()
    ours, exact = run(torch.bfloat16), run(torch.float32)
    assert (ours @ exact / (exact @ exact)).item() == pytest.approx(1, abs=0.05)


def test_a_thousand_small_merges_into_bfloat16_add_up():
    layer = lowrank.MHLoRALinear(
        nn.Linear(64, 48, bias=False), rank=2, merge_every=5, merge_reset=True)
    layer = layer.to(torch.bfloat16)
    nn.init.constant_(layer.weight, 0.02)
    for _ in range(1000):
        with torch.no_grad():
            layer.A.fill_(1e-3), layer.B.fill_(5e-3)  # together 1e-5 in each weight
        lowrank.merge(layer)
    exact = (0.02 + 1000 * 2 * float(torch.tensor(1e-3).bfloat16())
             * float(torch.tensor(5e-3).bfloat16()))
    assert layer.weight.float().mean().item() == pytest.approx(exact, rel=0.01)
    noise = layer.weight.float().std().item()
    assert 0 < noise < 3 * math.sqrt(1000) * 2.0**-14  # that of so many roundings


@pytest.mark.parametrize('per_layer', [False, True])
def test_groups_may_come_later_and_their_rates_hold_after_a_state_dict_is_loaded(per_layer):
    first, second = (nn.Parameter(torch.ones(6, 6, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = galore.GaLoreAdamW([first], lr=0.1, per_layer=per_layer)
    optimizer.add_param_group(dict(params=[second], rank=2))

    def step():
        (first.sum() + second.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return first.detach().clone(), second.detach().clone()
    assert all((x != 1).any() for x in step())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    before = first.detach().clone(), second.detach().clone()
    assert all(map(torch.equal, step(), before))
    for group in optimizer.param_groups:
        group['lr'] = 0.1
    for again in (False, True) if per_layer else ():  # the earlier one would go on
        with pytest.raises(
                ValueError, match='parameter 0 is stepped in the backward pass by an earlier'):
            galore.GaLoreAdamW([first], per_layer=again)
    third = nn.Parameter(torch.ones(6))
    with pytest.raises(ValueError, match='state_bits=7'):  # leaves no hook
        galore.GaLoreAdamW([dict(params=[third], state_bits=7)], per_layer=per_layer)
    galore.GaLoreAdamW([third], per_layer=per_layer)


def test_a_second_moment_in_bfloat16_decays():
    p = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = galore.GaLoreAdamW([p], lr=0.0, betas=(0.9, 0.999))
    for step in range(500):
        p.grad = torch.full_like(p, float(step == 0))
        optimizer.step()
    expected = float(torch.tensor(0.001).bfloat16()) * 0.999 ** 499
    assert optimizer.state[p]['exp_avg_sq'].float().mean().item() == pytest.approx(
        expected, rel=0.05)


# real models


GOLDEN = f'{HERE}/assets/golden'


def loaded(source):
    """The model of a folder or a file, in float64, and what its tokens are called."""
    shape, tensors, tokens = hub.read_weights(str(source))
    return hub.fill(models.make_model(shape).double(), tensors, source).eval(), tokens


def out_of(model, folder):
    """Writes a model as a transformers folder."""
    os.mkdir(folder)
    export.write_tensors(folder, hub.tensors_for_transformers(model.config, model.state_dict()),
                         next(model.parameters()).dtype)
    config.write_json(f'{folder}/config.json', hub.config_json(model.config))
    return folder


def with_tokens(folder, words=('</s>',), **about):
    """Puts a tokenizer of 256 bytes and `words` into a folder: another one than that of
    prepare.py."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, processors
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(kinds.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    made.add_special_tokens(list(words))
    if '<s>' in words:
        made.post_processor = processors.TemplateProcessing(
            single='<s> $A', special_tokens=[('<s>', made.token_to_id('<s>'))])
    made.save(f'{folder}/tokenizer.json')
    config.write_json(f'{folder}/tokenizer_config.json', {'eos_token': '</s>', **about})
    return folder


@pytest.fixture(scope='session')
def bases(root, tmp_path_factory):
    """Folders of a GPT-2, a tied LLaMA and a Qwen2, with one tokenizer, and data 'theirs' of its
    tokens."""
    folder = tmp_path_factory.mktemp('bases')
    shapes = {'gpt': tiny_gpt(vocab_size=260, norm_eps=1e-3),
              'llama': tiny_llama(vocab_size=260, tied=True),
              'qwen2': tiny_llama(vocab_size=260, family='qwen2')}
    for name, model in shapes.items():
        with_tokens(out_of(model, folder / name))
    prepare.main(['text', '--tokenizer', str(folder / 'gpt'), '--data_dir', str(root), '--input',
                  str(root / 'tiny.jsonl'), '--name', 'theirs'])
    return folder


def tune(script, root, base, out, *words):
    """A run of four steps on loaded weights."""
    usual = loading(tiny(script, root, out, f'--init_from={base}', '--dataset=theirs',
                         '--gradient_accumulation_steps=1', *words))
    start(SCRIPTS[script], [word for word in usual if not word.startswith('--dataset=tiny')])


@pytest.mark.parametrize('name', [name for name in sorted(os.listdir(GOLDEN))
                                  if os.path.exists(f'{GOLDEN}/{name}/config.json')])
def test_logits_are_those_of_transformers_and_of_what_is_written_again(tmp_path, name):
    model, _ = loaded(f'{GOLDEN}/{name}')
    golden = safetensors.torch.load_file(f'{GOLDEN}/{name}/logits.safetensors')
    close(model(golden['tokens']).float(), golden['logits'], 1e-5)
    again, _ = loaded(out_of(model, tmp_path / name))
    assert torch.equal(again(golden['tokens']), model(golden['tokens']))
    assert again.config == model.config


def test_a_sliding_window_bounds_the_context(tmp_path, root, capsys):
    assert [loaded(f'{GOLDEN}/{name}')[0].config.block_size
            for name in ('mistral', 'qwen2')] == [40, 48]
    refused(capsys, lambda: start(train_llama, [
        f'--init_from={GOLDEN}/mistral', '--block_size=41', '--dataset=tiny', f'--data_dir={root}',
        f'--out_dir={tmp_path}/a', '--device=cpu']), 'block_size=41', '40 positions')


def test_a_name_of_the_hub_is_looked_up_where_its_client_keeps_it(tmp_path, monkeypatch):
    with pytest.raises(prepare.DataError, match='there is no folder .*nowhere'):
        loaded(tmp_path / 'nowhere')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    for name, golden in (('gpt2', 'gpt2'), ('HuggingFaceTB/SmolLM2-135M', 'smollm2')):
        with pytest.raises(prepare.DataError, match='cannot be reached'):
            loaded(name)
        full = {'gpt2': 'openai-community/gpt2'}.get(name, name)
        repository = tmp_path / 'cache' / f"models--{full.replace('/', '--')}"
        # as the hub's client keeps it
        shutil.copytree(f'{GOLDEN}/{golden}', repository / 'snapshots' / 'abc')
        (repository / 'refs').mkdir()
        (repository / 'refs' / 'main').write_text('abc')
        assert loaded(name)[0].config == loaded(f'{GOLDEN}/{golden}')[0].config


def test_tokens_are_those_of_the_folder_and_its_files_travel(root, bases, tmp_path, capsys):
    data, text = prepare.Tokens('theirs', 'val', 16, root), 'a letter\n\u00e9'
    found = prepare.tokenizer(data.meta['tokenizer'], root / 'theirs' / 'tokenizer')
    assert data.meta['eot'] == found.eot_token == 256 and found.n_vocab == data.vocab_size == 257
    assert (found.decode(found.encode_ordinary(text)) == text
            and len(found.encode_ordinary(text)) == 11)
    texts = [json.loads(line)['text'] for line in open(root / 'tiny.jsonl')]
    held = [all_tokens(root, 'theirs', split).tolist() for split in ('train', 'val')]
    pieces = [found.decode(tokens) for split in held for tokens in documents(split, 256)]
    assert sorted(pieces) == sorted(texts)
    assert data.tokens_per_byte == pytest.approx(len(held[1]) / data.meta['bytes']['val'])
    # one that puts a token before each text
    os.mkdir(tmp_path / 'begins')
    with_tokens(tmp_path / 'begins', ('<s>', '</s>'))
    prepare.main(['text', '--tokenizer', str(tmp_path / 'begins'), '--data_dir', str(tmp_path),
                  '--input', str(root / 'tiny.jsonl'), '--name', 'begun'])
    for tokens in documents(all_tokens(tmp_path, 'begun', 'val').tolist(), 257):
        assert tokens[0] == 256 and 256 not in tokens[1:]
    train('llama', tmp_path, tmp_path / 'run', '--dataset=begun', '--vocab_size=258')
    start(export, [f"--out_dir={tmp_path / 'run'}", f'--to={tmp_path}/hf'])
    said = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert (said['bos_token_id'], said['eos_token_id']) == (256, 257)
    with_tokens(tmp_path / 'begins', eos_token='<end>')
    for name, said in (('begins', 'eos_token'), ('nothing', 'there is no folder')):
        with pytest.raises(prepare.DataError, match=said):
            prepare.main(['text', '--tokenizer', str(tmp_path / name), '--data_dir', str(tmp_path),
                          '--input', str(root / 'tiny.jsonl'), '--name', 'more'])
    # the other file says it, where this one says nothing
    with_tokens(tmp_path / 'begins', eos_token=None)
    config.write_json(tmp_path / 'begins' / 'special_tokens_map.json',
                      {'eos_token': {'content': '</s>'}})
    tokens = prepare.HubTokenizer(str(tmp_path / 'begins'))
    assert tokens.eot_token == tokens.inner.token_to_id('</s>') is not None
    # other tokens than those of the weights
    refused(capsys, lambda: tune('gpt', root, bases / 'gpt', tmp_path / 'a', '--dataset=mine'),
            'other tokens', 'bytes')
    refused(capsys, lambda: tune('llama', root, bases / 'gpt', tmp_path / 'b'), 'train_gpt.py')


def test_prompt_and_completion_are_encoded_apart_and_a_space_between_them_is_said(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models as kinds, normalizers
    letters = ['<unk>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '\u2581', *'abcde']
    made = Tokenizer(kinds.BPE({letter: i for i, letter in enumerate(letters)}, [],
                               unk_token='<unk>', byte_fallback=True))  # as LLaMA 2's
    made.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'),
                                            normalizers.Replace(' ', '\u2581')])
    made.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    made.save(f'{tmp_path}/tokenizer.json')
    config.write_json(f'{tmp_path}/tokenizer_config.json', {'eos_token': '</s>'})
    pairs = [('abc', ' de'), ('abc', 'de'), ('a\n', 'cab'),
             *(('b' * i, 'ad') for i in range(2, 60))]
    lines = [json.dumps({'prompt': prompt, 'completion': text}) for prompt, text in pairs]
    (tmp_path / 'answers.jsonl').write_text('\n'.join(lines))
    prepare_text(
        tmp_path, tmp_path / 'answers.jsonl', '--name', 'answ', '--tokenizer', str(tmp_path))
    assert 'put a space before every text: before completions' in capsys.readouterr().out
    held = [tokens for split in ('train', 'val')
            for tokens in documents((all_tokens(tmp_path, 'answ', split) & 0xFFFF).tolist(), 1)]
    assert sorted(held) == sorted(
        made.encode(prompt).ids + made.encode(text).ids for prompt, text in pairs)


def documents(tokens, end):
    """Lists of tokens, cut at the token that ends documents."""
    ends = [-1, *(i for i, token in enumerate(tokens) if token == end)]
    return [tokens[a + 1:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize('base, name, words', [
    ('gpt', 'mhlora', []), ('gpt', 'full', []), ('llama', 'galore', []),
    ('llama', 'lte', ['--merge_every=2']), ('qwen2', 'lora', ['--lowrank=attn']),
    ('llama', 'mhlora', ['--lowrank=attn,logit']),
    ('gpt', 'lte', ['--merge_every=2', '--lowrank=c_fc,logit'])])
def test_what_is_tuned_is_exported_and_read_again(root, bases, tmp_path, capsys, base, name, words):
    script, out = 'gpt' if base == 'gpt' else 'llama', tmp_path / 'out'
    tune(script, root, bases / base, out, *method(name, *words), '--param_dtype=float64')
    tuned, tokens = loaded(out / 'ckpt.pt')
    idx = tokens_of(2, 16, high=257)
    run = built_again(out)
    with lowrank.averaged_heads(run):
        close(tuned(idx), run(idx))
    start(export, [f'--out_dir={out}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/hf',
                   '--dtype=float64', '--check'])
    said = re.search(r'loss (\S+) before the merge, (\S+) after it; logits differ by (\S+)',
                     capsys.readouterr().out)
    assert said[1] == said[2] and float(said[3]) < 1e-4
    merged, theirs = loaded(tmp_path / 'hf')
    close(merged(idx), tuned(idx))
    assert theirs == tokens == loaded(bases / base)[1]
    assert (tmp_path / 'hf' / 'tokenizer_config.json').read_text() == \
        (bases / base / 'tokenizer_config.json').read_text()
    more = [f'--out_dir={out}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/peft', '--adapter=True']
    if name in ('galore', 'full'):
        refused(capsys, lambda: start(export, more), 'without --adapter')
        assert not (tmp_path / 'peft').exists()
    else:
        start(export, more)
        close(loaded(tmp_path / 'peft')[0](idx), tuned(idx), 1e-5)  # the base lies in float32
        about = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
        (tmp_path / 'peft' / 'adapter_config.json').write_text(
            json.dumps({**about, 'use_dora': True}))
        with pytest.raises(ValueError, match='use_dora'):
            loaded(tmp_path / 'peft')
        (tmp_path / 'peft' / 'adapter_config.json').write_text(json.dumps(about))
        path = tmp_path / 'peft' / 'adapter_model.safetensors'
        heads = safetensors.torch.load_file(path)
        first = next(key for key in heads if 'lm_head' not in key).rpartition('.lora_')[0]
        heads = {key: x for key, x in heads.items() if not key.startswith(first)}
        safetensors.torch.save_file(heads, path)  # as of a base with fewer layers
        with pytest.raises(ValueError, match='nothing for .* fewer layers'):
            loaded(tmp_path / 'peft')
    capsys.readouterr()
    more = ['--num_samples=1', '--max_new_tokens=5', '--prompt=doc', '--device=cpu',
            '--temperature=0']
    text = start(sample, [f'--out_dir={out}', '--checkpoint=ckpt.pt', *more])
    assert text == start(sample, [f'--init_from={tmp_path}/hf', *more]) and len(text[0]) == 8
    assert capsys.readouterr().out.count('doc') == 2
    # a run that goes on from a run
    tune(script, root, out / 'ckpt.pt', tmp_path / 'more', '--learning_rate=0', '--min_lr=0')
    close(loaded(tmp_path / 'more' / 'ckpt.pt')[0](idx), tuned(idx), 1e-5)


def built_again(out, dtype=double):
    """The model of a checkpoint with its heads."""
    state = saved(out)
    shape = state['model_config']
    if 'classes' in state:
        model = hub.create_vit(shape, len(state['classes'])).double()
        hub.put_heads(model, state['settings'])
    else:
        model = models.make_model(shape).to(dtype)
        put_layers(model, state['settings'])
    model.load_state_dict(state['model'])
    return model.eval()


def test_a_checkpoint_of_nanogpt_is_gone_on_from(root, tmp_path, capsys):
    donor, idx = tiny_gpt(vocab_size=257, bias=False), tokens_of(2, 16)
    shape = dict(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=False,
                 dropout=0.1)
    state = {f'_orig_mod.{name}': x for name, x in donor.state_dict().items()}
    torch.save({'model': state, 'model_args': shape, 'iter_num': 3, 'config': {}},
               tmp_path / 'ckpt.pt')
    close(loaded(tmp_path / 'ckpt.pt')[0](idx), donor(idx))
    words = tiny('gpt', root, tmp_path / 'a', f'--init_from={tmp_path}/ckpt.pt', '--max_iters=0')
    start(train_gpt, loading(words))
    for broken in ({'model': {}, 'model_args': shape},
                   {'model': state, 'model_args': {'n_head': 2}}):
        torch.save(broken, tmp_path / 'ckpt.pt')
        refused(capsys, lambda: start(train_gpt, loading([*words, f'--out_dir={tmp_path}/b'])),
                'ckpt.pt')
    # without biases, as GPT-2's layout does not know it
    close(loaded(out_of(donor, tmp_path / 'hf'))[0](idx), donor(idx))


def test_an_export_of_bytes_says_what_its_tokens_are(runs, tmp_path):
    out = runs('gpt_full', 8)
    start(export, [f'--out_dir={out}', f'--to={tmp_path}/hf'])
    texts = [start(sample, [f'--init_from={source}', '--device=cpu', '--max_new_tokens=4',
                            '--num_samples=1'])
             for source in (f'{tmp_path}/hf', f'{out}/best.pt')]
    assert texts[0] == texts[1]
    shapes = [hub.shape_of(source) for source in (f'{tmp_path}/hf', f'{out}/best.pt')]
    assert shapes[0] == shapes[1] and shapes[0].n_layer == 2
    assert (os.stat(tmp_path / 'hf' / 'model.safetensors').st_mode
            == os.stat(tmp_path / 'hf' / 'config.json').st_mode)


def test_a_download_that_breaks_leaves_no_archive(tmp_path, monkeypatch):
    path, info = tmp_path / 'a.npz', prepare.medmnist_info()['pathmnist']
    arrays = {f'{split}_{what}': np.zeros((2, *shape), np.uint8)
              for split in prepare.SPLITS['images']
              for what, shape in (('images', (28, 28, 3)), ('labels', (1,)))}

    def fetched(url, root, name, md5, breaks=True):
        with open(f'{root}/{name}', 'wb') as file:
            np.savez(file, **arrays)
            if breaks:
                file.truncate(100)
                raise OSError('403. (Request ID: Root=1-2;3-4) It is gated')
    monkeypatch.setattr('torchvision.datasets.utils.download_url', fetched)
    with pytest.raises(prepare.DataError, match=r'cannot be downloaded \(403\. It is gated\)'):
        next(prepare.medmnist_images(path, 28, info))
    assert not path.exists()
    monkeypatch.setattr('torchvision.datasets.utils.download_url',
                        functools.partial(fetched, breaks=False))
    assert len([*prepare.medmnist_images(path, 28, info)]) == 3 and path.exists()


def test_a_long_line_is_cut_between_words(gpt2, tmp_path):
    prose = '\n'.join(' '.join(['some', 'words'] * 30) for _ in range(20)) + '\n'
    for text in (prose, 'x' * 5000, '\u00e9' * 300 + ' a\n'):
        (tmp_path / 'a.txt').write_text(text)
        pieces = [document.text for document in prepare.read_txt(tmp_path / 'a.txt', 64)]
        assert ''.join(pieces) == text and len(pieces) > 3
        if text == prose:  # the tokens are those of the whole
            tokens = [token for piece in pieces for token in gpt2.encode_ordinary(piece)]
            assert tokens == gpt2.encode_ordinary(text)


def test_an_export_is_whole_or_not_there(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, 'SHARD', 30_000)
    words = [f'--out_dir={runs("gpt_full", 4)}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/hf']
    start(export, words)
    assert 'no tokenizer.json is written: bytes have none' in capsys.readouterr().out
    assert (tmp_path / 'hf' / 'model.safetensors.index.json').exists()
    before = files_of(tmp_path / 'hf')
    model, tokens = loaded(tmp_path / 'hf')
    run = built_again(runs('gpt_full', 4))
    close(model(tokens_of(2, 16)), run(tokens_of(2, 16)))
    refused(capsys, lambda: start(export, words), 'already there', '--overwrite')
    with mock.patch.object(prepare, 'Tokens', side_effect=FileNotFoundError('no data')):
        more = [*words[:2], f'--to={tmp_path}/new', '--check']
        refused(capsys, lambda: start(export, more), 'no data')
    assert not (tmp_path / 'new').exists()
    begun = runs('gpt_full', 4)  # a run's folder has a config.json too
    for others in (tmp_path, begun):
        refused(capsys, lambda: start(export, [*words[:2], f'--to={others}', '--overwrite=True']),
                'was not written by this command')
    assert (begun / 'ckpt.pt').exists()
    refused(capsys, lambda: start(export, words[:2]), '--to')
    with monkeypatch.context() as broken:
        broken.setattr(export, 'config_json', None)
        with pytest.raises(TypeError):
            start(export, [*words, '--overwrite=True'])
    assert (files_of(tmp_path / 'hf') == before
            and sorted(os.listdir(tmp_path)) == ['.hf.lock', 'hf'])
    start(export, [*words, '--overwrite=True', '--dtype=bfloat16'])
    assert (sorted(os.listdir(tmp_path)) == ['.hf.lock', 'hf']
            and files_of(tmp_path / 'hf') != before)


def test_a_vit_is_exported_for_timm(runs, tmp_path):
    out = runs('vit_lte', 4)
    start(export, [f'--out_dir={out}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/vit',
                   '--dtype=float32'])
    theirs = timm.create_model(f'local-dir:{tmp_path}/vit').eval()
    # as pretrained=True of newer ones does
    timm.models.load_checkpoint(theirs, f'{tmp_path}/vit/model.safetensors')
    ours, x = built_again(out), normal(2, 3, 28, 28, dtype=torch.float32)
    with lowrank.averaged_heads(ours):
        close(theirs(x).double(), ours(x.double()), 1e-5)
    assert theirs.pretrained_cfg['label_names'] == saved(out)['classes']
    modes = {os.stat(f'{tmp_path}/vit/{file}').st_mode & 0o666
             for file in ('config.json', 'model.safetensors')}
    assert len(modes) == 1
    start(export, [f'--out_dir={out}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/exact'])
    exact = safetensors.torch.load_file(tmp_path / 'exact' / 'model.safetensors')
    assert same_state(exact, hub.merged_vit(saved(out)))  # float64, as the run
    # a file's weights are taken, not those of the place that gives the model its name
    shape = {**saved(out)['model_config'], 'model': f'local-dir:{tmp_path}/vit'}
    others = {name: value + 1 for name, value in theirs.state_dict().items()}
    made = hub.create_vit(shape, len(saved(out)['classes']), others, 'others.pt')
    close(made.state_dict()['pos_embed'], others['pos_embed'])


@pytest.mark.parametrize('words, wanted', [
    (['--lowrank=q,v'], ['qkv']), (['--lowrank=k,fc1,logit'], ['fc1', 'qkv']),
    (['--lowrank=logit'], None),
    (['--lowrank=attn', '--split=True', '--merge_every=2'],  # a convolution is called proj, too
     [f'blocks.{i}.attn.{name}' for i in range(2) for name in ('qkv', 'proj')])])
def test_the_heads_and_the_classifier_of_a_vit_are_exported_for_peft(
        root, runs, tmp_path, capsys, words, wanted):
    base = runs('vit_full', 4) / 'best.pt'
    heads = ['--heads=2', '--rank=2', '--alpha=6', *words]
    train('vit', root, tmp_path / 'a', f'--init_from={base}', '--max_iters=2', *heads)
    state = train('vit', root, tmp_path / 'a', '--init_from=resume', *heads)
    assert state['settings']['train'] == 'classifier'  # 'auto', on loaded weights
    more = [f'--out_dir={tmp_path}/a', '--checkpoint=ckpt.pt', f'--to={tmp_path}/peft',
            '--adapter=True']
    if not wanted:
        refused(capsys, lambda: start(export, more), 'no heads in its blocks')
        words = [f"--init_from={runs('vit_lte', 4)}/ckpt.pt", '--lowrank=attn']
        train('vit', root, tmp_path / 'b', *words)
        more[0] = f'--out_dir={tmp_path}/b'  # nobody else has the weights that it began from
        refused(capsys, lambda: start(export, more), 'weights that others can load')
        return
    start(export, more)
    about = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    parts = safetensors.torch.load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
    assert (about['target_modules'], about['modules_to_save']) == (wanted, ['head'])
    merged = hub.merged_vit(state)
    for name, x in saved(base.parent, 'best.pt')['model'].items():  # as PEFT does it
        A, B = (parts.pop(f'base_model.model.{name[:-7]}.lora_{factor}.weight', None)
                for factor in 'AB')
        if A is not None:
            assert len(A) == B.shape[1] == about['r']
            x = x + about['lora_alpha'] / about['r'] * B @ A
        # timm loads it in float32
        close(parts.pop(f'base_model.model.{name}', x), merged[name], 1e-6)
    assert not parts


def test_pictures_that_timm_would_squash_are_named_and_exported_as_they_were_seen(
        root, tmp_path, capsys):
    start(train_vit, tiny('vit', root, tmp_path / 'a', '--max_iters=1',
                          '--model=vit_base_patch16_clip_384.openai_ft_in12k_in1k'))
    assert "crop_mode='squash', whole pictures; here they see the middle" in capsys.readouterr().out
    start(export, [f'--out_dir={tmp_path}/a', '--checkpoint=ckpt.pt', f'--to={tmp_path}/vit'])
    about = json.loads((tmp_path / 'vit' / 'config.json').read_text())
    assert about['pretrained_cfg']['crop_mode'] == 'center'


def test_a_vit_names_its_base_and_trains_both_of_its_classifiers(root, runs, tmp_path, monkeypatch):
    state = saved(runs('vit_full', 4))
    heads = train('vit', root, tmp_path / 'a', f"--init_from={runs('vit_full', 4)}/best.pt",
                  '--lowrank=attn')
    (tmp_path / 'peft').mkdir()
    export.write_peft(tmp_path / 'a', {**heads, 'base': 'pretrained'}, tmp_path / 'peft',
                      torch.float32)
    about = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert about['base_model_name_or_path'] == 'vit_tiny_patch16_224'
    shape = {**state['model_config'], 'model': 'deit_tiny_distilled_patch16_224'}
    net = hub.create_vit(shape, 3)
    lowrank.freeze_rest(put(net, ('attn',)), ['logit'])
    assert net.head.weight.requires_grad and net.head_dist.weight.requires_grad
    path = f'{tmp_path}/two.safetensors'
    safetensors.torch.save_file(hub.create_vit(shape, 3).state_dict(), path)
    for count in (3, 5):  # of others both are drawn
        classes = [*map(str, range(count))]
        weights = hub.read_vit(path, dict(shape), classes)[1]
        assert len(hub.create_vit(shape, count, weights, path).head_dist.weight) == count
    weights = hub.create_vit(shape, 3).state_dict()
    for gone, said in (('bias', 'Missing key.* "head.bias"'), ('weight', 'no classifier')):
        del weights[f'head.{gone}']
        safetensors.torch.save_file(weights, path)
        with pytest.raises(ValueError, match=said):
            hub.create_vit(shape, 3, hub.read_vit(path, dict(shape), ['a'] * 3, True)[1], path)
    with torch.device('meta'), pytest.raises(ValueError, match='has BatchNorm'):
        hub.create_vit(dict.fromkeys(shape) | {'model': 'vit_base_mci_224', 'n_layer': 1}, 5)
    create = hub.create_vit  # as if the weights were there
    monkeypatch.setattr(train_vit, 'create_vit', lambda shape, count, *_: create(shape, count))
    with pytest.raises(ValueError, match='knows 1000 classes, and not the .* of the data'):
        built('vit', root, tmp_path / 'b', '--init_from=pretrained', '--eval_only=True',
              *(f'--{key}=None' for key in ('n_layer', 'n_head', 'n_embd')))


def test_evaluating_tells_bits_a_byte(root, tmp_path):
    start(train_gpt, tiny('gpt', root, tmp_path, '--eval_only=True'))
    record, meta = records(tmp_path, 'eval.jsonl')[0], prepare.Tokens('tiny', 'val', 16, root).meta
    bits = record['val_loss'] * meta['tokens']['val'] / meta['bytes']['val'] / math.log(2)
    assert record['bits_per_byte'] == pytest.approx(bits)
    assert record['perplexity'] == pytest.approx(math.exp(record['val_loss']))


def test_own_pictures_are_prepared_by_class(tmp_path):
    from PIL import Image
    drawn = np.random.default_rng(0).integers(0, 255, (60, 12, 20, 3), np.uint8)
    for i, pixels in enumerate(drawn):
        folder = tmp_path / 'mine' / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f'{i}.png')
    words = f'images --input {tmp_path}/mine --size 12 --data_dir {tmp_path}/data'.split()
    prepare.main(words)
    splits = [prepare.Images('images', split, tmp_path / 'data')
              for split in ('train', 'val', 'test')]
    assert splits[0].classes == ['a', 'b'] and [len(split) > 0 for split in splits] == [True] * 3
    held = {}
    for split in splits:
        for image, label in zip(*split.items(np.arange(len(split)))):
            held[image.numpy().tobytes()] = int(label)
    middle = drawn[:, :, 4:16].transpose(0, 3, 1, 2)
    assert held == {pixels.tobytes(): i % 2 for i, pixels in enumerate(middle)}
    path = tmp_path / 'mine' / 'a' / '0.png'
    os.rename(path, tmp_path / 'mine' / 'b' / '0.png')  # of another class now
    with pytest.raises(prepare.DataError, match='holds a data set with source'):
        prepare.main(words)
    os.rename(tmp_path / 'mine' / 'b' / '0.png', path)
    wide, transposed = (Image.fromarray(np.full((12, 20), 40000, np.uint16)),
                        Image.fromarray(drawn[0]))
    large = Image.new('1', (9000, 9000))
    for said, write in (
            ('8 bits', lambda: wide.save(path)), ('8 bits', lambda: sixteen_bits(path)),
            ('8 bits', lambda: sixteen_bits_by_channel(path)),
            ('2 frames', lambda: transposed.save(path, 'TIFF', save_all=True,
                                                 append_images=[transposed])),
            ('9000 x 9000 pixels', lambda: large.save(path)),
            ('damaged', lambda: path.write_bytes(b'no picture')),
            ('damaged', lambda: transposed.save(path, exif=b'Exif\0\0XX*\0\x08\0\0\0garbage'))):
        write()
        with pytest.raises(prepare.DataError, match=f'0.png.*{said}'):
            prepare.main([*words, '--overwrite'])
    assert len(prepare.Images('images', 'train', tmp_path / 'data')) == len(splits[0])
    for name, said in (('c', 'in c are no pictures'), ('caf\udce9', 'UTF-8')):
        (tmp_path / 'mine' / name).mkdir()
        with pytest.raises(prepare.DataError, match=said):
            prepare.main([*words, '--overwrite'])


def test_folders_of_splits_and_of_patients_stay_whole(tmp_path, capsys):
    from PIL import Image

    def held(folder):
        words = f'images --input {tmp_path}/{folder} --name {folder} --size 4'.split()
        prepare.main([*words, '--data_dir', f'{tmp_path}/data', '--overwrite'])
        found = {}
        for split in ('train', 'val', 'test'):
            images = prepare.Images(folder, split, tmp_path / 'data')
            for image, label in zip(*images.items(np.arange(len(images)))):
                found[int(image[0, 0, 0])] = split, int(label)
        return found
    for i in range(200):
        pixels = np.full((4, 4, 3), i, np.uint8)
        for place in (f'split/{("Training", "test")[i % 5 == 0]}/{"ab"[i % 2]}',
                      f'nested/{"ab"[i % 2]}/{"ab"[i // 8 % 2] if i < 16 else i // 8}/b',
                      f'few/{"ab"[i % 2]}/all'):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / place / f'{i}.png')
    found = held('split')  # a tenth of the rest is for validation
    assert {i for i in found if found[i][0] == 'test'} == {*range(0, 200, 5)}
    assert 5 < sum(split == 'val' for split, _ in found.values()) < 35
    assert all(label == i % 2 for i, (_, label) in found.items())
    capsys.readouterr()
    (tmp_path / 'nested/a/more').symlink_to(tmp_path / 'few')
    found = held('nested')  # patients may have the name of a class
    said = capsys.readouterr().out
    assert '25 folders inside those of classes: the pictures of one' in said
    assert '1 links inside folders of classes' in said
    assert all(found[i][0] == found[i - i % 8][0] for i in range(200))
    assert {split for split, _ in found.values()} == {'train', 'val', 'test'}
    entries = [('train', f'{i}/a.png', f'{i}') for i in range(12)]
    entries += [('test', f't{i}/a.png', f't{i}') for i in range(12)]
    drawn = prepare.splits_of_folders({'a': entries}, ['val'])  # of those of train alone
    assert len(drawn) == 12 and 'val' in drawn.values()
    assert len(held('few')) == 200 and 'split one by one' in capsys.readouterr().out
    (tmp_path / 'split' / 'more' / 'a').mkdir(parents=True)
    with pytest.raises(prepare.DataError, match='folders of splits, and more beside them'):
        held('split')
    with pytest.raises(prepare.DataError, match='nowhere.* is no folder'):
        held('nowhere')
    inside = (tmp_path / 'few' / 'a' / 'all').rename(tmp_path / 'few' / 'a' / 'Test')
    with pytest.raises(prepare.DataError, match="hold 'Test', .*FOLDER/Test/class/"):
        held('few')
    inside.rename(tmp_path / 'few' / 'a' / 'all')
    for i in range(7):  # all are named at once, but for the sixth and the seventh
        (tmp_path / 'few' / 'a' / f'bad{i}.png').write_bytes(b'')
    with pytest.raises(prepare.DataError, match='bad0.png.*bad4.png.*and so on, 7 in all'):
        held('few')


def sixteen_bits(path):
    """Writes a PNG of 4 x 4 pixels with three channels of 16 bits."""
    def chunk(kind, data):
        code = zlib.crc32(kind + data)
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', code)
    rows = (b'\0' + b'\x0f\xff' * 12) * 4
    path.write_bytes(b'\x89PNG\r\n\x1a\n'
                     + chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 4, 16, 2, 0, 0, 0))
                     + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def sixteen_bits_by_channel(path):
    """Writes a TIFF of 4 x 4 pixels with three channels of 16 bits, one after the other."""
    end = 8 + 2 + 10 * 12 + 4
    tags = ((256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, end), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 3, end + 6), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 3, end + 18),
            (284, 3, 1, 2))  # the last: by channel; 258: bits; 273, 279: where each one is
    path.write_bytes(struct.pack('<2sHIH', b'II', 42, 8, len(tags))
                     + b''.join(struct.pack('<HHII', *tag) for tag in tags) + bytes(4)
                     + struct.pack('<3H6I', 16, 16, 16, end + 30, end + 62, end + 94, 32, 32, 32)
                     + np.repeat(np.uint16([40000, 200, 65000]), 16).tobytes())


def test_transparent_pictures_lie_on_white_and_a_split_without_a_class_is_named(tmp_path, capsys):
    from PIL import Image
    for i in range(40):
        ink = np.zeros((8, 8, 4), np.uint8)  # black, and where it is not transparent one dot
        ink[i // 8, i % 8, 3] = 255
        folder = tmp_path / 'mine' / ('rare' if i == 7 else 'ab'[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ink).save(folder / f'{i}.png')
    (tmp_path / 'mine' / 'a' / 'notes.txt').write_text('of the photographer')
    (tmp_path / 'mine' / 'labels.csv').write_text('0,a')
    prepare.main(['images', '--input', f'{tmp_path}/mine', '--size=8', f'--data_dir={tmp_path}'])
    said = capsys.readouterr()
    assert 'images of rare' in said.err and 'end in .txt are passed over' in said.out
    assert '1 files beside the folders of classes are passed over' in said.out
    for split in ('train', 'val', 'test'):
        data = prepare.Images('images', split, tmp_path)
        for image in data.items(np.arange(len(data)))[0]:
            assert image.unique().tolist() == [0, 255] and (image[0] == 0).sum() == 1


def test_pictures_are_turned_as_their_cameras_say_transparent_ones_too(tmp_path):
    from PIL import Image
    half = np.full((24, 24, 4), 255, np.uint8)  # it becomes a third of that
    half[:9, :, :3] = 0  # dark above, and taken upside down
    exif = Image.Exif()
    exif[274] = 3
    for i in range(40):
        folder = tmp_path / 'mine' / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        half[21:, 21:] = 5 * i  # all are different
        picture = Image.fromarray(half if i % 4 > 1 else half[..., :3])
        picture.save(folder / f'{i}.png', exif=exif)
    prepare.main(['images', '--input', f'{tmp_path}/mine', '--size=8', f'--data_dir={tmp_path}'])
    images = prepare.Images('images', 'train', tmp_path)
    found = images.items(np.arange(len(images)))[0]  # (images, 3, 8, 8)
    assert (found[:, :, 6:] < 9).all() and (found[:, :, :4, 3:] > 240).all()


def test_pixels_that_are_in_no_patch_are_named(root, tmp_path, capsys):
    built('vit', root, tmp_path, '--img_size=30')
    assert 'the last 2 rows and 2 columns of images are in no patch' in capsys.readouterr().out
    built('vit', root, tmp_path)
    assert 'in no patch' not in capsys.readouterr().out


# -----------------------------------------------------------------------------
# weights in 4 and in 8 bits


@pytest.mark.parametrize('with_bias', [True, False])
def test_a_layer_in_4_bits_is_bitsandbytes_own(with_bias):
    torch.manual_seed(0)
    linear, x = (nn.Linear(128, 96, with_bias),
                 normal(5, 7, 128, dtype=torch.float32).requires_grad_())
    from bitsandbytes.nn import Linear4bit
    theirs = Linear4bit(128, 96, with_bias, torch.float32, False, 'nf4')
    theirs.load_state_dict(linear.state_dict())
    theirs.to('cpu')  # packs it
    headless = lowrank.FrozenLinear(copy.deepcopy(linear), 4)
    layer = lowrank.MHLoRALinear(copy.deepcopy(linear), heads=2, rank=4, alpha=8.0, bits=4)
    layer.B.data.normal_()
    s, dy = 8.0 / 4 / 2, normal(5, 7, 96, seed=1, dtype=torch.float32)
    y = theirs(x) + s * sum(x @ A.T @ B.T for A, B in zip(layer.A, layer.B))
    wanted = torch.autograd.grad(y, [x, layer.A, layer.B], dy)
    close(layer(x), y, 1e-4)
    for got, grad in zip(torch.autograd.grad(layer(x), [x, layer.A, layer.B], dy), wanted):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(headless(x), theirs(x))
    torch.testing.assert_close(*(torch.autograd.grad(net(x), x, dy) for net in (headless, theirs)))
    assert layer.weight.shape == (96, 64) and layer.scales.shape == (96, 2)
    assert torch.equal(layer.weight.flatten(), theirs.weight.flatten())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_without_bitsandbytes_4_bits_are_unpacked_to_the_same_numbers(dtype):
    W = normal(300, 64 * 20, dtype=torch.float32) * torch.rand(300, 1)
    codes, scales = rules.new_codes(W, 4)
    rules.code_(codes, scales, W)
    theirs = rules.dense(codes, scales, dtype)
    with mock.patch.object(rules, 'kernels', None):
        assert torch.equal(rules.dense(codes, scales, dtype), theirs)
        with pytest.raises(ValueError, match='pip install bitsandbytes'):
            rules.code_(codes, scales, W)
    assert 0.05 < (theirs.float() - W).norm() / W.norm() < 0.11  # of a normal distribution 0.09


def test_a_run_in_4_bits_goes_on_without_bitsandbytes(root, runs, tmp_path):
    whole, half = saved(runs('llama_nf4', 8)), runs('llama_nf4', 4)
    with (mock.patch.object(rules, 'kernels', None),
          mock.patch.object(rules, 'load_kernels', lambda: None)):
        assert same_run(whole, go_on('llama_nf4', root, half, tmp_path / 'on', 8))


def test_8_bits_are_right_on_average_and_stay_where_nothing_moves():
    x = normal(6, 256, dtype=torch.float32) * torch.logspace(-6, 3, 6)[:, None]
    codes, scales = rules.new_codes(x, 8)
    rules.code_(codes, scales, x)
    level = scales.repeat_interleave(128, 1)
    nearest = rules.dense(codes, scales, torch.float32)
    assert ((nearest - x).abs() <= 0.5001 * level).all()
    mean = torch.zeros_like(x)
    for key in range(400):
        rules.code_(codes, scales, x, key)
        once = rules.dense(codes, scales, torch.float32)
        assert ((once - x).abs() <= 1.0001 * level).all()
        mean += once / 400
    # of 1,536 numbers, deviation up to 0.5 / 20
    assert ((mean - x).abs() / level).max() < 0.5 * 4.5 / 20
    again, tops = rules.new_codes(x, 8)
    rules.code_(again, tops, once, 7)
    assert (again.int() - codes).abs().max() <= 1 and (again != codes).float().mean() < 1e-3
    parts = [rules.new_codes(part, 8) for part in x.split([1, 2, 3])]  # as shards
    for (some, top), part, first in zip(parts, x.split([1, 2, 3]), (0, 256, 768)):
        rules.code_(some, top, part, 9, first)
    rules.code_(codes, scales, x, 9)
    assert torch.equal(torch.cat([some for some, _ in parts]), codes)
    rules.code_(codes[:1], scales[:1], torch.full((1, 256), math.inf), 9)  # what is none is seen
    assert not rules.dense(codes, scales, torch.float32)[0].isfinite().any()


@pytest.mark.parametrize('lowrank_on', ['attn', 'v_proj,logit'])
def test_4_bits_are_of_all_linears_of_attention_and_mlp(capsys, lowrank_on):
    net, idx = tiny_llama(n_embd=64, n_mlp=96).float(), tokens_of(2, 8)
    before, plain = net(idx), copy.deepcopy(net)
    parameters = lowrank.count_parameters(net)['total']
    put(net, lowrank_on.split(','), frozen_bits=4)
    said = capsys.readouterr().out
    assert ('12 weights in 4 bits, not' in said and 'down_proj' in said if lowrank_on == 'attn'
            else 'lm_head' in said)
    assert 0 < (net(idx) - before).abs().max() < 0.5
    kinds = {name: getattr(module, 'bits', None) for name, module in net.named_modules()
             if isinstance(module, (nn.Linear, lowrank.FrozenLinear))}
    assert {name.split('.')[-1] for name, bits in kinds.items() if bits is None} == {
        'down_proj', 'lm_head'}
    counts = lowrank.count_parameters(net)
    assert counts['total'] - counts['heads'] == parameters
    lowrank.freeze_rest(net)
    counts = lowrank.count_parameters(net)
    assert counts['trainable'] == counts['heads']
    merged = lowrank.merged_state_dict(net)
    plain.load_state_dict(merged)
    close(plain(idx), net(idx), 1e-5)
    assert merged.keys() == copy.deepcopy(plain).state_dict().keys()
    again = put(copy.deepcopy(plain), lowrank_on.split(','), frozen_bits=4)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(idx), net(idx))
    with pytest.raises(ValueError, match='merged_state_dict'):
        lowrank.merge(net)
    with pytest.raises(ValueError, match='scales of coded weights are in torch.bfloat16'):
        net.bfloat16()(idx)


def test_heads_on_4_bits_are_exported_and_begun_from(root, tmp_path, capsys):
    base, out, idx = tmp_path / 'base', tmp_path / 'out', tokens_of(2, 16, high=257)
    with_tokens(out_of(
        tiny_llama(vocab_size=260, n_embd=64, n_mlp=128, tied=True).bfloat16(), base))
    prepare.main(['text', '--tokenizer', str(base), '--data_dir', str(tmp_path), '--input',
                  str(root / 'tiny.jsonl'), '--name', 'theirs'])
    more = [*method('mhlora', '--rank=2', '--lowrank=q_proj,v_proj'), '--param_dtype=bfloat16',
            '--dtype=bfloat16', '--frozen_bits=4', f'--data_dir={tmp_path}']
    tune('llama', root, base, out, *more)
    net = built_again(out, torch.bfloat16)
    start(export, [f'--out_dir={out}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/hf'])
    merged = safetensors.torch.load_file(tmp_path / 'hf' / 'model.safetensors')
    for name, layer in net.named_modules():  # onto what was trained on
        if isinstance(layer, lowrank.FrozenLinear):
            W = rules.dense(layer.weight, layer.scales, torch.float32)
            if isinstance(layer, lowrank.MHLoRALinear):
                W = W + layer.scale / layer.heads * sum(
                    B.float() @ A.float() for A, B in zip(layer.A, layer.B))
            torch.testing.assert_close(merged[f'{name}.weight'], W.bfloat16(), rtol=2**-7, atol=0)
    start(export, [f'--out_dir={out}', '--checkpoint=ckpt.pt', f'--to={tmp_path}/peft',
                   '--adapter=True'])
    assert 'these heads belong to a base in 4 bits' in capsys.readouterr().out
    about = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert about['base_model_name_or_path'] == str(base)
    # a run that begins from it has the same weights and heads, to the last bit
    still = ['--learning_rate=0', '--min_lr=0', '--max_iters=1']
    tune('llama', root, tmp_path / 'peft', tmp_path / 'on', *more, *still)
    a, b = saved(out)['model'], saved(tmp_path / 'on')['model']
    assert same_state({**a, 'lm_head.weight': 0}, {**b, 'lm_head.weight': 0})
    start(export, [f'--out_dir={tmp_path}/on', '--checkpoint=ckpt.pt', f'--to={tmp_path}/peft2',
                   '--adapter=True'])
    assert same_state(*(safetensors.torch.load_file(tmp_path / name / 'adapter_model.safetensors')
                        for name in ('peft', 'peft2')))
    for other, said in (('--rank=1', 'heads times rank is 4'), ('--alpha=5.0', 'alpha 5'),
                        ('--lowrank=q_proj,o_proj', 'other layers')):
        refused(
            capsys, lambda: tune('llama', root, tmp_path / 'peft', tmp_path / 'no', *more, other),
            said, 'frozen_bits=None')
    refused(capsys, lambda: tune('llama', root, out / 'ckpt.pt', tmp_path / 'no', *more),
            '--adapter=True')
    # without, they are merged
    tune('llama', root, tmp_path / 'peft', tmp_path / 'sum', *still, f'--data_dir={tmp_path}',
         '--param_dtype=float64')
    plain, _ = loaded(tmp_path / 'peft')
    close(loaded(tmp_path / 'sum' / 'ckpt.pt')[0](idx), plain(idx), 1e-9)
    texts = [start(sample, [f'--init_from={source}', '--num_samples=1', '--max_new_tokens=5',
                            '--device=cpu'])
             for source in (out / 'ckpt.pt', tmp_path / 'hf')]
    assert texts[0] == texts[1]


def test_a_vit_and_a_gpt_adapt_in_4_bits(root, tmp_path, capsys):
    wide = ['--n_embd=64', '--param_dtype=float32', '--dtype=float32', '--max_iters=2']
    train('vit', root, tmp_path / 'vit', *wide)
    words = tiny('vit', root, tmp_path / 'on', *method('lora', '--lowrank=q,v'), *wide,
                 '--frozen_bits=4')
    words = [word for word in words if word != '--init_from=scratch']
    start(train_vit, [*words, f'--init_from={tmp_path}/vit/best.pt'])
    held = saved(tmp_path / 'on')
    assert {key.split('.')[-2] for key in held['model'] if key.endswith('.scales')} == \
        {'q', 'k', 'v', 'proj', 'fc1', 'fc2'}
    assert held['settings']['train'] == 'classifier'
    again, looks = tmp_path / 'on' / 'best.pt', []
    for more in ([], ['--eval_only=True']):
        start(train_vit, [*tiny('vit', root, tmp_path / 'more', *wide), f'--init_from={again}',
                          '--learning_rate=0', '--min_lr=0', *more])
        looks.append(records(
            tmp_path / 'more', 'eval.jsonl' if more else 'log.jsonl')[0]['val_loss'])
    assert looks == pytest.approx(2 * [records(tmp_path / 'on')[-2]['val_loss']], abs=1e-4)
    refused(capsys, lambda: start(train_vit, [*words, f'--init_from={again}',
                                              f'--out_dir={tmp_path}/no']),
            'coded again together would be others')
    start(export, [f'--out_dir={tmp_path}/on', f'--to={tmp_path}/timm'])
    base = out_of(tiny_gpt(vocab_size=257, n_embd=64).float(), tmp_path / 'gpt')
    words = loading(tiny('gpt', root, tmp_path / 'tuned', *method('lora_fa'), f'--init_from={base}',
                         '--param_dtype=float32', '--dtype=float32', '--frozen_bits=4'))
    start(train_gpt, words)
    held = saved(tmp_path / 'tuned')['model']
    assert sum(x.dtype == torch.uint8 for x in held.values()) == 8
    assert held['transformer.h.0.attn.c_attn.B'].any()


def test_int8_is_said_and_comes_out_as_numbers(root, tmp_path, capsys):
    words = ['--param_dtype=float32', '--dtype=float32', '--n_embd=128', '--learning_rate=0.001',
             '--min_lr=0']
    train('llama', root, tmp_path / 'a', *method('galore_int8'), *words)
    said = capsys.readouterr().out
    assert '12 weights in 8 bits, not 2, such as model.layers.0.mlp.down_proj' in said
    run, _ = built('llama', root, tmp_path / 'a', *method('galore_int8'), *words,
                   '--init_from=resume', checkpoint=saved(tmp_path / 'a'))
    idx = tokens_of(2, 16)
    run.model.eval()
    close(loaded(tmp_path / 'a' / 'ckpt.pt')[0].float()(idx), run.model(idx), 1e-4)
    start(export, [f'--out_dir={tmp_path}/a', '--checkpoint=ckpt.pt', f'--to={tmp_path}/hf'])
    close(loaded(tmp_path / 'hf')[0].float()(idx), run.model(idx), 1e-4)


# -----------------------------------------------------------------------------
# chats, and documents that do not see each other

# by transformers
WRITTEN = json.loads(open(f'{GOLDEN}/chats/written.json', encoding='utf-8').read())


def talker(folder, template, eos_token='<|im_end|>', **about):
    """A folder with the tokenizer of assets/golden/chats and a template, a name there or a text."""
    os.makedirs(folder, exist_ok=True)
    shutil.copy(f'{GOLDEN}/chats/tokenizer.json', folder)
    if os.path.exists(path := f'{GOLDEN}/chats/{template}.jinja'):
        template = open(path).read()
    config.write_json(
        f'{folder}/tokenizer_config.json',
        {'bos_token': '<s>', 'eos_token': eos_token, 'chat_template': template, **about})
    return folder


def prepared(folder, name, lines, *words):
    """A data set of lines of .jsonl."""
    (folder / f'{name}.jsonl').write_text('\n'.join(json.dumps(line) for line in lines))
    prepare_text(folder, folder / f'{name}.jsonl', '--name', name, *words)
    return [all_tokens(folder, name, split) for split in ('train', 'val')]


@pytest.mark.parametrize('name', ['chatml', 'inst', 'headers', 'thinking'])
def test_chats_are_spelled_as_transformers_does(tmp_path, capsys, name):
    some = [chat for chat in WRITTEN if chat['template'] == name]
    folder = talker(tmp_path / name, name, some[0]['eos_token'])
    template, tokens = prepare.Template(folder), prepare.HubTokenizer(folder)
    base, eos = talker(tmp_path / 'base', name, '<s>'), some[0]['eos_token']
    # the end-of-text of a base model ends a turn only where the template asks for it
    for source, wanted in ((folder, eos), (base, '<s>' if name == 'inst' else eos)):
        end = sample.end_of_turn(prepare.Template(source), prepare.HubTokenizer(source))
        assert tokens.inner.id_to_token(end) == wanted
    # one that asks for an answer otherwise than it spells one, and one that marks no end
    for ask, after, wanted in (('<think>', '<|im_end|>', 259), ('', '.', None)):
        talker(base, "{%% for m in messages %%}{{ m['content'] }}%s{%% endfor %%}"
               "{%% if add_generation_prompt %%}%s{%% endif %%}" % (after, ask))
        assert sample.end_of_turn(prepare.Template(base), tokens) == wanted
    for chat in some:
        messages = chat['messages']
        assert template.render(messages) == chat['text']
        assert template.render(messages[:-1], True) == chat['asked']
        turns, are_all = template.turns(*prepare.messages_of(chat))
        answers = [message['content'] for message in messages if message['role'] == 'assistant']
        assert are_all == (name != 'thinking' or len(answers) == 1 or '</think>' not in answers[0])
        assert ''.join(itertools.chain(*turns)) == chat['text']
        assert len(turns) == (len(answers) if are_all else 1)
        for (prompt, learned), said in zip(turns[::-1], answers[::-1]):
            assert (said.strip() in learned and not prompt.endswith(said)
                    and len(learned) < len(said) + 14)
    held = prepared(tmp_path, 'chats', [{'messages': chat['messages']} for chat in some],
                    '--tokenizer', folder)
    numbers = [int(token) & prepare.FIRST - 1 for split in held for token in split]
    starts = [i for i, token in enumerate(itertools.chain(*held))
              if token & prepare.FIRST] + [len(numbers)]
    spelled = sorted(numbers[a:b] for a, b in itertools.pairwise(starts))
    wanted = [chat['tokens'] for chat in some]
    if name == 'thinking':  # of the last one alone
        assert '1 chats of which the last answer alone is learned' in capsys.readouterr().out
    assert spelled == sorted(wanted)
    learned = [tokens.decode([int(x) for x in split if x < prepare.PROMPT]) for split in held]
    assert 'Hi <you>' not in ''.join(learned) and 'Hello' in ''.join(learned)


BAD_CHATS = [
    ({'messages': [{'content': 'a'}]}, 'line 2 .*a role is None, and not one of system, user'),
    ({'messages': [{'role': 'tool', 'content': 'a'}]}, "line 2 .*a role is 'tool'"),
    ({'messages': [{'role': 'user', 'content': ' '}]}, 'line 2 .*the user says nothing'),
    ({'messages': [{'role': 'user', 'content': 'a'}]}, 'line 2 .*no assistant answers'),
    ({'messages': WRITTEN[0]['messages'], 'tools': [{}]}, 'line 2 .*has tools beside messages'),
    ({'messages': WRITTEN[0]['messages'], 'system': 'a'}, 'line 2 .*has system beside messages'),
    ({'instruction': 'a', 'input': 'b', 'output': 'c'}, "line 2 .*has no string 'text'"),
    ({'messages': [{'role': 'assistant', 'content': 'a', 'tool_calls': [1]}]},
     'line 2 .*a message has tool_calls'),
    ({'messages': [{'role': 'assistant', 'content': 'a', 'reasoning_content': 'b'}]},
     'line 2 .*a message has reasoning_content'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}]},
     'line 2 .*content of type image'),
    ({'messages': [{'role': 'user', 'content': 'a' * 10**7}]}, 'line 2 .*characters'),
    ({'messages': 3}, "line 2 .*has no string 'text'"),
    ({'text': '', 'completion': ''}, 'line 2 .*has text and completion, which do not go'),
    ({'text': '', 'prompt': ''}, 'line 2 .*has text and prompt, which do not go'),
    ({'text': None, 'messages': 3}, "line 2 .*has no string 'text'"),
    ({'prompt': [{'role': 'user', 'content': 'a'}], 'completion': 'b'},
     'line 2 .*prompt is a list of messages, and completion is not')]


@pytest.mark.parametrize('line, said', BAD_CHATS)
def test_a_chat_that_cannot_be_learned_is_refused_by_its_line(tmp_path, line, said):
    good = {'messages': WRITTEN[0]['messages']}
    with pytest.raises(prepare.DataError, match=said) as refusal:
        prepared(tmp_path, 'chats', [good, line], '--tokenizer', talker(tmp_path / 'm', 'chatml'))
    assert '\n' not in str(refusal.value) and not (tmp_path / 'chats').exists()


def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path):
    template = prepare.Template(talker(tmp_path / 'm', 'chatml'))
    said = [('user', 'a', None), ('assistant', 'WRONG', 0), ('user', 'b', None),
            ('assistant', 'right', 1), ('user', 'c', None), ('assistant', 'too', None)]
    messages = [dict(role=role, content=x, weight=weight) for role, x, weight in said]
    (first, second), are_all = template.turns(*prepare.messages_of({'messages': messages}))
    assert are_all and 'WRONG' in first[0] and 'right' in first[1] and 'too' in second[1]
    assert ''.join(first + second) == template.render([
        dict(role=role, content=x) for role, x, _ in said])


def test_the_chat_template_of_the_data_goes_before_that_of_the_weights(tmp_path):
    base = talker(out_of(tiny_llama(vocab_size=280).float(), tmp_path / 'base'), '', '</s>',
                  chat_template=None)
    config.write_json(base / 'generation_config.json', {'eos_token_id': 2})
    talker(tmp_path / 'data' / 'chats' / 'tokenizer', 'chatml')
    settings = dict(init_from=str(base), frozen_bits=None, eval_only=False, dataset='chats',
                    data_dir=tmp_path / 'data', out_dir=tmp_path / 'out')
    (tmp_path / 'out').mkdir()
    hub.carry_along(settings)
    carried = tmp_path / 'out' / 'tokenizer'
    assert (carried / 'config.json').read_bytes() == (base / 'config.json').read_bytes()
    assert prepare.Template(carried).render(WRITTEN[0]['messages'])
    assert sample.tokens_that_end(prepare.HubTokenizer(carried)) == {259, None}
    shutil.rmtree(carried)
    hub.carry_along({**settings, 'dataset': 'bytes'})  # whose tokens have no files
    assert (carried / 'generation_config.json').exists()
    # an adapter's folder goes before its base's, if its tokens are the same
    adapter = talker(tmp_path / 'adapter', 'chatml')
    config.write_json(adapter / 'adapter_config.json', {
        'base_model_name_or_path': str(base), 'r': 1, 'lora_alpha': 1.0, 'peft_type': 'LORA',
        'target_modules': 'none'})
    safetensors.torch.save_file({}, adapter / 'adapter_model.safetensors')
    assert sample.read(str(adapter))[1].folder == str(adapter)


def test_the_hubs_gpt2_does_not_say_which_token_ends_a_text(tmp_path, monkeypatch):
    with_tokens(tmp_path, ['<|endoftext|>'])
    (tmp_path / 'tokenizer_config.json').write_text('{"model_max_length": 1024}')
    with pytest.raises(prepare.DataError, match='does not say which token ends a text'):
        prepare.HubTokenizer(tmp_path).eot_token
    digest = prepare.HubTokenizer(tmp_path).name.split()[1]
    monkeypatch.setattr(prepare, 'GPT2_TOKENS', digest)
    found = prepare.HubTokenizer(tmp_path)
    assert found.name == 'gpt2'
    assert found.eot_token == found.inner.token_to_id('<|endoftext|>') == 256


def test_what_stands_beside_messages_is_named_and_passed_over(tmp_path, capsys):
    folder = talker(tmp_path / 'm', 'chatml')
    chats = [chat['messages'] for chat in WRITTEN if chat['template'] == 'chatml']
    alone = prepared(tmp_path, 'alone', [{'messages': chat} for chat in chats],
                     '--tokenizer', folder)
    assert 'passed over' not in capsys.readouterr().out
    for number, more in enumerate(({'prompt': 'Hi', 'completion': None}, {'text': 'x'},
                                   {'input': 'x'})):
        lines = [{'messages': chat, **more} for chat in chats]
        held = prepared(tmp_path, f'{number}', lines, '--tokenizer', folder)
        assert all(map(np.array_equal, alone, held))
        name = [*more][0]
        assert f"{number}.jsonl': {name} passed over, beside messages" in capsys.readouterr().out


def test_chats_of_another_template_are_other_data(tmp_path):
    lines = [chat for chat in WRITTEN if chat['template'] == 'chatml']
    folders = [talker(tmp_path / name, name) for name in ('chatml', 'headers')]
    prepared(tmp_path, 'chats', lines, '--tokenizer', folders[0])
    with pytest.raises(prepare.DataError, match='holds a data set with template'):
        prepared(tmp_path, 'chats', lines, '--tokenizer', folders[1])


def test_chats_are_encoded_as_a_whole(tmp_path):
    from tokenizers import Tokenizer, models as kinds, normalizers, pre_tokenizers
    letters = [*'\u2581[INST]/Hiyou. ', '</s>']
    made = Tokenizer(kinds.BPE({letter: i for i, letter in enumerate(dict.fromkeys(letters))}, []))
    made.normalizer, made.pre_tokenizer = (
        normalizers.Prepend('\u2581'), pre_tokenizers.Split(' ', 'isolated'))
    made.add_special_tokens(['</s>'])  # as LLaMA 2's it puts a space before each text
    folder = talker(tmp_path / 'm', "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' "
                    "if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}", '</s>')
    made.save(f'{folder}/tokenizer.json')
    chats = [[{'role': 'user', 'content': said}, {'role': 'assistant', 'content': 'you.'}]
             for said in ('Hi', 'H', 'i', 'you')]
    chat = chats[0]
    held = prepared(
        tmp_path, 'chats', [{'messages': some * (1 + i % 2)} for i, some in enumerate(chats)],
        '--tokenizer', folder)
    tokens = prepare.HubTokenizer(folder)
    for split in held:
        starts = [*np.flatnonzero(split & prepare.FIRST), len(split)]
        for a, b in itertools.pairwise(starts):
            some = [int(token) & prepare.FIRST - 1 for token in split[a:b]]
            wholes = [f"[INST] {said[0]['content']} [/INST] you.</s>" * (1 + i % 2)
                      for i, said in enumerate(chats)]
            turns = 1 + [tokens.encode_ordinary(whole) for whole in wholes].index(some) % 2
            assert (split[a:b] < prepare.PROMPT).sum() == turns * len(' you.') + turns
    template = prepare.Template(talker(
        tmp_path / 'g', '{% generation %}{{ messages[0].content }}{% endgeneration %}!'))
    assert template.render(chat) == 'Hi!'


def test_chats_want_a_template_and_utf_8(tmp_path):
    lines = [{'messages': WRITTEN[0]['messages']}] * 2
    with pytest.raises(prepare.DataError, match='--tokenizer the folder'):
        prepared(tmp_path, 'chats', lines)
    os.mkdir(tmp_path / 'none')
    with pytest.raises(prepare.DataError, match='has no chat_template'):
        prepared(tmp_path, 'chats', lines, '--tokenizer', with_tokens(tmp_path / 'none'))
    (tmp_path / 'chats.jsonl').write_bytes(
        b'\n'.join(json.dumps(line).encode() for line in lines).replace(b'Hello', b'Hell\xf6'))
    with pytest.raises(prepare.DataError, match=r'line 1 .*U\+FFFD'):
        prepare_text(tmp_path, tmp_path / 'chats.jsonl', '--name', 'chats', '--tokenizer',
                     talker(tmp_path / 'm', 'chatml'))


BAD_TEMPLATES = [
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ("{{ messages.__init__.__globals__ }}", 'SecurityError'),
    ('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
     'more than 1 s'),
    ("{{ 'a' * 999999999 }}", r'\* of too much'), ('{{ 9 ** 9 ** 9 }}', r'\*\* of too much'),
    ("{{ '%999999999d' % 1 }}", 'MemoryError|more than 1 s|characters'),
    ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", 'more than 10000000 characters'),
    ("{% set ns = namespace(a='b') %}{% for i in range(64) %}{% set ns.a = ns.a + ns.a %}"
     "{% endfor %}", 'MemoryError|more than 1 s'),
    ("{{ messages.append(1) }}", 'SecurityError'), ("{{ raise_exception('roles') }}", 'roles'),
    ('{% if %}', 'none')]


@pytest.mark.parametrize('template, said', BAD_TEMPLATES)
def test_a_template_is_a_strangers_program(tmp_path, monkeypatch, template, said):
    if '1 s' in said:  # the others may be slow to start on a busy machine
        monkeypatch.setattr(prepare, 'SECONDS', 1)
    monkeypatch.setattr(prepare, 'MEMORY', 2**28)
    with pytest.raises((ValueError, prepare.DataError), match=said) as refusal:
        prepare.Template(talker(tmp_path / 'm', template)).render(WRITTEN[0]['messages'])
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('make', [tiny_gpt, tiny_llama])
def test_what_is_kept_of_tokens_changes_nothing(make):
    net, idx = make().float().eval(), tokens_of(2, 16)
    cache, found = models.new_cache(net), []
    for a, b in itertools.pairwise((0, 5, 6, 11, 16)):
        found.append(net.lm_head(net.hidden(idx[:, a:b], cache=cache)))
    close(torch.cat(found, 1), net(idx), 1e-5)
    models.crop(cache, 7)
    close(net.lm_head(net.hidden(idx[:, 7:9], cache=cache)), net(idx)[:, 7:9], 1e-5)


def test_a_chat_is_answered_and_remembered(tmp_path, monkeypatch, capsys):
    folder = talker(
        out_of(tiny_llama(vocab_size=280, block_size=400).float(), tmp_path / 'm'), 'chatml')
    said = iter(['Hi', '', 'And?', 'x' * 340])

    def typed(_):
        if (line := next(said, None)) is None:
            raise EOFError
        return line
    monkeypatch.setattr('builtins.input', typed)
    words = [f'--init_from={folder}', '--chat', '--device=cpu', '--max_new_tokens=6',
             '--temperature=0']
    messages = start(sample, words)
    # too long: it began anew
    assert [message['role'] for message in messages] == ['user', 'assistant']
    assert 'a chat of more than 400 tokens' in capsys.readouterr().out
    # what it answers is what it would answer without what is kept
    said, (net, tokens) = iter(['Hi', 'And?']), sample.read(str(folder))
    messages, template = start(sample, words), prepare.Template(folder)
    for i in (1, 3):
        idx = torch.tensor([tokens.encode_ordinary(template.render(messages[:i], True))])
        answer = continued(net.eval(), idx, 6, temperature=0)[0, idx.shape[1]:].tolist()
        ends = [*answer, 259].index(259)
        assert messages[i]['content'] == tokens.decode(answer[:ends]).rstrip('\ufffd')
    calls, hidden, make = itertools.count(), models.Llama.hidden, prepare.Template
    made = []
    monkeypatch.setattr(prepare, 'Template', lambda source: made.append(make(source)) or made[-1])

    # Ctrl-C ends an answer, and neither the chat nor its template
    def interrupted(net, *args, **how):
        if next(calls) == 3:
            os.kill(made[-1].process.pid, signal.SIGINT)
            raise KeyboardInterrupt
        return hidden(net, *args, **how)
    said = iter(['Hi', 'And?'])
    with mock.patch.object(models.Llama, 'hidden', interrupted):
        assert [message['role'] for message in start(sample, words)] == ['user', 'assistant'] * 2


@pytest.mark.parametrize('make, checkpointing', [
    (tiny_gpt, False), (tiny_llama, False), (tiny_llama, True)])
def test_documents_in_a_row_are_as_if_alone(make, checkpointing):
    net, idx, lengths = make(checkpointing=checkpointing).float(), tokens_of(1, 16), (5, 1, 8)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([*lengths, 2]))[None]
    targets = tokens_of(1, 16, seed=3)
    targets[0, 14:] = -100
    weights = torch.ones(1)
    net(idx, targets, weights, documents).backward()
    together = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    logits = net(idx, documents=documents)
    with mock.patch.object(torch.compiler, 'is_compiling', lambda: True):  # by a mask
        close(net(idx, documents=documents), logits, 1e-5)
    for x, y, wanted in zip(idx.split((*lengths, 2), 1), targets.split((*lengths, 2), 1),
                            logits.split((*lengths, 2), 1)):
        close(net(x), wanted, 1e-5)
        if y[0, 0] >= 0:
            net(x, y, weights).backward()
    for name, p in net.named_parameters():
        close(p.grad, together[name], 1e-4)


def test_rows_hold_whole_documents_in_order(root, tmp_path, capsys):
    lines = [{'prompt': 'p' * (i * 7 % 23) + '?', 'completion': 'c' * (i * 5 % 11) + '!'}
             for i in range(90)]
    lines += [{'prompt': 'a' * 9, 'completion': 'b' * 9}] * 9 + [
        {'prompt': 'q' * 40, 'completion': 'never'}, {'prompt': 'r' * 20, 'completion': 'd' * 40}]
    held = prepared(tmp_path, 'answ', lines, '--tokenizer', 'bytes', '--shard_tokens', 300)
    data = prepare.Tokens('answ', 'train', 32, tmp_path)
    assert data.documents and re.search(
        r'padding, . cut, of . no target is left: 9.% of', capsys.readouterr().out)
    pieces, of_data = [], held[0]
    for i in range(data.num_windows):
        x, y, documents = (part[0].numpy() for part in data.items(np.array([i])))
        for document in range(documents.max() + 1):
            here = documents == document
            pieces.append((bytes(x[here].astype(np.uint8)), y[here]))
        assert ((y[documents == -1] == -100).all()
                and (np.diff(documents[documents >= 0]) >= 0).all())
        assert data.learned[i] == (y >= 0).sum() > 0
    starts = [*np.flatnonzero(of_data & prepare.FIRST), len(of_data)]
    wanted = [of_data[a:b][:33] for a, b in itertools.pairwise(starts)]
    wanted = [some for some in wanted if (some[1:] < prepare.PROMPT).any()]
    assert [text for text, _ in pieces] == [
        bytes((some[:-1] & 255).astype(np.uint8)) for some in wanted]
    for (_, y), some in zip(pieces, wanted):
        assert (y == np.where(some[1:] < prepare.PROMPT, some[1:].astype(np.int64) & 2**30 - 1,
                              -100)).all()
    whole = prepare.Tokens('answ', 'train', 32, tmp_path, documents=False)
    assert not whole.documents and len(whole.batch(4, 0)) == 3 and len(data.batch(4, 0)) == 4
    # of plain text nothing is cut, and it has to say where documents begin
    with pytest.raises(prepare.DataError, match='prepare it with --documents'):
        prepare.Tokens('tiny', 'train', 16, root, documents=True)
    texts = [{'text': f'{i} ' * (i + 1)} for i in range(40)]
    held = prepared(tmp_path, 'texts', texts, '--tokenizer', 'bytes', '--documents')
    assert not prepare.Tokens('texts', 'train', 16, tmp_path).documents
    data = prepare.Tokens('texts', 'train', 16, tmp_path, documents=True)
    count = sum(int((data.items(np.array([i]))[1] >= 0).sum()) for i in range(data.num_windows))
    assert count == len(held[0]) - sum(1 for token in held[0] if token & prepare.FIRST)
    prepare_text(tmp_path, root / 'mine.txt', '--name', 'long', '--documents',
                 '--shard_tokens', 5000)  # one text
    data = prepare.Tokens('long', 'train', 16, tmp_path, documents=True)
    count = sum(int((data.items(np.array([i]))[1] >= 0).sum()) for i in range(data.num_windows))
    assert (len(data.shards) > 3
            and count > sum(map(len, data.shards)) - 2 * data.meta['documents']['val'] - 9)


def test_a_run_learns_chats_apart_and_goes_on_so(root, tmp_path, capsys):
    for name, words in (('a', []), ('b', ['--documents=False'])):
        out = tmp_path / name
        words = ['--dataset=answers', '--block_size=64', '--gradient_accumulation_steps=2', *words]
        train('llama', root, out, *words)
        settings = saved(out)['settings']
        assert settings['documents'] == (name == 'a')
        start(train_llama, tiny('llama', root, out, *words[:3], '--init_from=resume',
                                '--max_iters=6'))
        assert saved(out)['settings']['documents'] == (name == 'a') and saved(out)['step'] == 6
    more = '--init_from=resume', '--documents=False'
    refused(
        capsys, lambda: start(train_llama, tiny('llama', root, tmp_path / 'a', *words[:3], *more)),
        'documents=True')


@pytest.mark.parametrize('script', SCRIPTS)
def test_heads_drop_what_they_see_as_peft_does(root, tmp_path, script):
    layer = lowrank.MHLoRALinear(nn.Linear(6, 5), heads=2, rank=3, alpha=6.0, dropout=0.25)
    layer.B.data.normal_()
    x, s = normal(40, 6, dtype=torch.float32), 6.0 / 3 / 2
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    seen = F.dropout(x, 0.25)
    close(y, F.linear(x, layer.weight, layer.bias)
          + s * sum(seen @ A.T @ B.T for A, B in zip(layer.A, layer.B)), 1e-5)
    assert not torch.equal(seen, x)
    close(layer.eval()(x), F.linear(x, layer.merged_weight(), layer.bias), 1e-5)
    ends = []  # the same masks after a resume
    for out, steps in (('whole', [6]), ('parts', [4, 6])):
        for end in steps:
            more = ['--init_from=resume'] * (end == 6 and out == 'parts')
            start(SCRIPTS[script], tiny(
                script, root, tmp_path / out, *method('mhlora', '--lora_dropout=0.2'),
                f'--max_iters={end}', '--eval_interval=2', *more))
        ends.append(saved(tmp_path / out))
    assert same_run(*ends)


def test_muon_on_loaded_weights_is_warned_of(root, bases, tmp_path, capsys):
    for name in ('galore_muon', 'muon', 'lora'):
        tune('llama', root, bases / 'llama', tmp_path / name, *method(name), '--max_iters=0')
        assert ('2605.10468' in capsys.readouterr().out) == ('muon' in name)


def test_an_export_is_compared_with_what_was_trained(root, bases, tmp_path, capsys):
    tune('llama', root, bases / 'llama', tmp_path / 'a', *method('lte', '--merge_every=2'),
         '--param_dtype=float32', '--dtype=float32')
    words = [f'--out_dir={tmp_path}/a', '--checkpoint=ckpt.pt', f'--to={tmp_path}/hf', '--check',
             '--overwrite']
    start(export, words)
    said = re.search(r'64 validation tokens: loss (\S+) before the merge, (\S+) after it; '
                     r'logits differ by (\S+)', capsys.readouterr().out)
    assert said[1] == said[2] and float(said[3]) < 1e-5
    with mock.patch.object(
            export, 'write_tensors',
            lambda folder, tensors, dtype, write=export.write_tensors: write(
                folder, [(name, 1.1 * x) for name, x in tensors], dtype)):
        start(export, words)
    assert float(re.search(r'differ by (\S+)', capsys.readouterr().out)[1]) > 0.01
    refused(capsys, lambda: start(export, [*words, '--adapter']), 'leave out --adapter')
    # what llama.cpp's converter reads of a LLaMA
    about = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    for key in ('num_hidden_layers', 'max_position_embeddings', 'hidden_size',
                'intermediate_size', 'num_attention_heads', 'num_key_value_heads', 'rms_norm_eps',
                'vocab_size', 'rope_theta'):
        assert about[key], key
    assert (about['architectures'] == ['LlamaForCausalLM']
            and (tmp_path / 'hf' / 'tokenizer.json').is_file())


# -----------------------------------------------------------------------------
# code in files


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol:UserWarning')
@pytest.mark.parametrize('kind', ['zip', 'old', 'pickle', 'safetensors'])
def test_no_code_of_a_file_runs(readers, tmp_path, kind):
    path, ran = f'{tmp_path}/weights.{kind}', tmp_path / 'ran'
    if kind in ('zip', 'old'):
        torch.save({'head.bias': RunsCode(ran)}, path, _use_new_zipfile_serialization=kind == 'zip')
    else:
        with open(path, 'wb') as file:
            pickle.dump(RunsCode(ran), file)
    for read in (readers['vit.safetensors'][1], load_checkpoint):
        with pytest.raises(ValueError, match=f"weights.{kind}' is damaged or"):
            read(path)
        assert not ran.exists()
    with open(path, 'rb') as file, contextlib.suppress(Exception):  # it would have
        (torch.load(file, weights_only=False) if kind in ('zip', 'old') else pickle.load(file))
    assert ran.exists()


def test_no_code_of_a_data_set_runs(tmp_path):
    hub = tmp_path / 'hub'
    (hub / '3.0.0').mkdir(parents=True)
    (hub / '3.0.0' / 'train-0.parquet').write_bytes(parquet(article=['a'], highlights=['b']))
    (hub / 'hub.py').write_text(f'import os\nos.mkdir({str(tmp_path / "ran")!r})')
    with pytest.raises(prepare.DataError, match='hub'):
        prepare.main(f'cnn_dailymail --path {hub} --data_dir {tmp_path} --tokenizer bytes'.split())
    assert not (tmp_path / 'ran').exists()


def test_a_token_that_is_none_is_refused(root):
    data = prepare.Tokens('tiny', 'train', 8, root)
    data.windows = [np.full_like(windows, 300) for windows in data.windows]
    with pytest.raises(OSError, match='token 300, and there are 257.*--overwrite.*tiny'):
        data.batch(4, 0)


# -----------------------------------------------------------------------------
# averages in few bits


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_what_few_bits_leave_is_sent_later_and_does_not_grow(bits):
    error, sent, meant, drawn = torch.zeros(4, 9, 33, dtype=double), 0, 0, []
    for step in range(100):
        x = normal(4, 9, 33, seed=step) * normal(9, 33, seed=1) ** 3  # spikes
        sent, meant = sent + processes.coded_mean(x, bits, error=error), meant + x.mean(0)
        close(sent + error.mean(0), meant, 1e-9)
        drawn.append(((sent - meant).norm() / x.mean(0).norm()).item())
    assert max(drawn[50:]) < 1.3 * max(drawn[:50]) < {2: 6, 3: 2, 4: 1, 8: 0.05}[bits]
    one = processes.coded_mean(x, bits)
    assert one.shape == x.shape[1:] and not processes.coded_mean(0 * x, bits).any()


def test_codes_have_their_size_are_nearer_than_nothing_and_never_make_numbers_of_what_is_none():
    for bits, off in {2: 0.12, 3: 0.04, 4: 0.0095, 8: 4e-5}.items():
        x = normal(2000, rules.PACK)
        codes = rules.pack(x, bits)
        assert codes.shape == (2000, 8 * bits + 2) and codes.dtype == torch.uint8
        assert (rules.unpack(codes, double) - x).square().mean() < off
        for part in (x, x**9, F.one_hot(torch.arange(rules.PACK)).double(), 0 * x):
            left = part - rules.unpack(rules.pack(part, bits), double)
            assert (left.norm(dim=1) <= 0.96 * part.norm(dim=1)).all()
        for odd in (math.nan, math.inf, -math.inf):
            x[3, 5] = odd
            got = rules.unpack(rules.pack(x, bits), double)
            assert got[3].isnan().all() and got.isnan().sum() == rules.PACK
    for bits in (1, 16):
        with pytest.raises(ValueError, match=f'bits={bits} does not fit'):
            processes.coded_mean(x[None], bits)


# -----------------------------------------------------------------------------
# cards that are not here: what `join` makes of them


@contextlib.contextmanager
def cards(*capabilities):
    """A host with GPUs of these capabilities, as far as `join` looks at it. Gives a dict: what
    torch was told."""
    told = {'card': 0}

    def properties(card=None):
        major, minor = capabilities[told['card'] if card is None else card]
        return SimpleNamespace(major=major, minor=minor)

    def set_device(device):
        told['card'] = torch.device(device).index

    def init_process_group(backend, timeout):
        told.update(backend=backend, card_then=told['card'])
    host = dict(is_available=lambda: len(capabilities) > 0, device_count=lambda: len(capabilities),
                current_device=lambda: told['card'], get_device_properties=properties,
                set_device=set_device, _check_bf16_tensor_supported=lambda card: True)  # emulated
    group = dict(init_process_group=init_process_group,
                 get_rank=lambda: int(os.environ['RANK']),
                 get_world_size=lambda: int(os.environ['WORLD_SIZE']))
    with mock.patch.multiple(torch.cuda, **host), mock.patch.multiple(torch.distributed, **group), \
            mock.patch.object(torch.version, 'cuda', '12.8'):
        yield told


def torchrun(rank, ranks, local_rank):
    """The environment of one of torchrun's processes."""
    return mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(ranks),
                           LOCAL_RANK=str(local_rank))


@pytest.mark.parametrize('words, old, new', [  # before capability 8.0, and from it on
    ([], 'float16', 'bfloat16'), (['--dtype=float16'], 'float16', 'float16'),
    (['--dtype=float32'], 'float32', 'float32'), (['--dtype=bfloat16'], 'bfloat16', 'bfloat16'),
    (['--param_dtype=bfloat16'], 'bfloat16', 'bfloat16'),
    (['--param_dtype=float64'], 'float64', 'float64'),
    (method('lte'), 'float16', 'bfloat16'),
    (method('galore', '--shard=True'), 'float16', 'bfloat16'),
    (method('lte', '--shard=True'), 'float32', 'bfloat16'),  # no GradScaler goes with these two
    (['--per_layer=True', '--grad_clip=0'], 'float32', 'bfloat16')])
@pytest.mark.parametrize('capability', [(7, 5), (8, 6)])
def test_a_card_computes_in_what_it_is_good_at(capsys, capability, words, old, new):
    settings = settings_of(train_gpt, *words, '--learning_rate=0.01')
    with cards(capability):
        process = join(settings)
        said = capsys.readouterr().out
        net = tiny_gpt()
        put_layers(net, settings)
        run = assemble(net, {}, make_optimizer(net, settings), settings, process)
    wanted = old if capability < (8, 0) else new
    assert (process.device, process.compute) == ('cuda', wanted)
    assert run.scaler.is_enabled() == (wanted == 'float16')
    assert run.scaler._device == 'cuda'
    is_slow = wanted == 'bfloat16' and capability < (8, 0)
    assert ('bfloat16 is slow here' in said) == is_slow
    assert not is_slow or said.endswith('this card has {}.{}\n'.format(*capability))


def test_a_rank_has_its_card_and_backend(capsys):
    def joined(words, *capabilities):
        with cards(*capabilities) as told:
            process = join(settings_of(train_gpt, *words.split()))
        found = process.rank, process.ranks, process.device, process.device_type, process.compute
        return found, told
    pair = (7, 5), (8, 6)
    assert joined('', *pair) == ((0, 1, 'cuda', 'cuda', 'float16'), {'card': 0})
    assert joined('--device=cuda:1', *pair) == ((0, 1, 'cuda:1', 'cuda', 'bfloat16'), {'card': 1})
    assert joined('--device=cpu', *pair) == ((0, 1, 'cpu', 'cpu', 'float32'), {'card': 0})
    assert joined('') == ((0, 1, 'cpu', 'cpu', 'float32'), {'card': 0})
    with torchrun(rank=3, ranks=4, local_rank=1):  # of the second of two hosts
        both = {'card': 1, 'card_then': 1, 'backend': 'cpu:gloo,cuda:nccl'}
        for words in ('', '--device=cuda'):
            assert joined(words, *pair) == ((3, 4, 'cuda:1', 'cuda', 'bfloat16'), both)
        alone = {'card': 0, 'card_then': 0, 'backend': 'gloo'}
        assert joined('--device=cpu', *pair) == ((3, 4, 'cpu', 'cpu', 'float32'), alone)
        assert joined('') == ((3, 4, 'cpu', 'cpu', 'float32'), alone)
        assert not capsys.readouterr().out
        joined('--dtype=bfloat16', (7, 5), (7, 5))  # rank 0 says that it is slow
        assert not capsys.readouterr().out


@pytest.mark.parametrize('words, capabilities, local_rank, said', [
    ('--device=cuda', [], None, "device='cuda', but torch"),
    ('--device=cuda', [], 0, 'finds no CUDA GPU here: set --device=cpu'),
    ('--device=cuda:2', [(8, 6), (8, 6)], None, 'the last card here is cuda:1: set'),
    ('--device=cuda:1', [(8, 6), (8, 6)], 0, "device='cuda:1' is one card for all"),
    ('', [(8, 6), (8, 6)], 2, 'processes than there are cards: set --nproc_per_node=2'),
    ('--compile=True', [(6, 1)], None, '7.0 or newer, and this card has 6.1: set --compile=False'),
    ('--compile=True', [(9, 0), (6, 1)], 1, '7.0 or newer, and this card has 6.1'),
    ('--compile=True --param_dtype=bfloat16', [(7, 5)], None,
     '8.0 or newer for bfloat16, and this card has 7.5')])
def test_what_no_card_here_can_do_is_one_sentence(capsys, words, capabilities, local_rank, said):
    settings, place = settings_of(train_gpt, *words.split()), contextlib.nullcontext()
    if local_rank is not None:
        place = torchrun(local_rank, 3, local_rank)
    with cards(*capabilities) as told, place, mock.patch('time.sleep'):
        with pytest.raises(SystemExit) as ended:
            join(settings)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count('\n') == 1 and said in error
    assert 'backend' not in told  # no other rank waits
    with cards((7, 0)):  # the oldest that compiles
        join(settings_of(train_gpt, '--compile=True'))


# -----------------------------------------------------------------------------
# several ranks: one spawn for all, which runs beside the tests above

# What nccl demands of the collectives of torch.distributed is demanded of them here, where gloo
# would take more. Those of objects are left out: they go by gloo in a run on GPUs, too.

COLLECTIVES = (  # some under their names from torch 2.13 on, and before
    'all_gather all_gather_into_tensor all_gather_single all_reduce all_to_all all_to_all_single '
    'broadcast gather reduce reduce_scatter reduce_scatter_single reduce_scatter_tensor scatter')
NCCL_SENDS = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64,
              torch.float16, torch.bfloat16, torch.float32, torch.float64}
_calls = []  # (collective, shape, dtype) of this rank's, since `ranks_made_the_same_calls`


def as_nccl_demands(collective):
    """The collective, which asserts before what nccl demands of its tensors. The stop flag lies on
    the CPU in a run on GPUs, too, and goes by gloo ('cpu:gloo,cuda:nccl'): so any device is
    allowed, but one call has one device."""
    name = collective.__name__

    @functools.wraps(collective)
    def checked(*args, **how):
        given = [[x] if torch.is_tensor(x) else x for x in (*args, *how.values())]
        given = [some for some in given if isinstance(some, list)]
        tensors = [x for some in given for x in some]
        for x in tensors:
            assert x.is_contiguous(), f'{name}: {(*x.shape,)} of strides {x.stride()}'
            assert x.dtype in NCCL_SENDS, f'{name}: {x.dtype}'
        for some in given:
            shapes = {(*x.shape,) for x in some}
            assert len(shapes) == 1, f'{name}: {shapes} in one list'
        kinds = {(x.dtype, x.device) for x in tensors}
        assert len(kinds) == 1, f'{name}: {kinds} in one call'
        first = tensors[0]
        _calls.append((name, (*first.shape,), first.dtype))
        return collective(*args, **how)
    return checked


def ranks_made_the_same_calls():
    """Asserts that all ranks did, with tensors of one shape. Waits for all of them."""
    of_ranks = [None] * processes.rank_and_world()[1]
    torch.distributed.all_gather_object(of_ranks, _calls)
    _calls.clear()
    for calls in itertools.zip_longest(*of_ranks):
        assert len({*calls}) == 1, f'ranks made other calls: {calls}'


def test_what_nccl_would_refuse_is_refused():
    def gather(x, parts=None):
        return 'sent'
    checked, x = as_nccl_demands(gather), torch.zeros(2, 3)
    _calls.clear()
    assert checked(x) == checked(x[1:], parts=[x[0], x[1]]) == checked(torch.tensor([1])) == 'sent'
    calls = [('gather', (2, 3), torch.float32), ('gather', (1, 3), torch.float32),
             ('gather', (1,), torch.int64)]
    for wrong, said in (([x.mT], 'strides'), ([x, [x.mT]], 'strides'), ([x.short()], 'int16'),
                        ([x, [x[0], x[:1]]], 'in one list'), ([x, [x.double()]], 'in one call'),
                        ([x, [x.to('meta')]], 'in one call')):
        with pytest.raises(AssertionError, match=f'gather: .*{said}'):
            checked(*wrong)
    assert _calls == calls


@pytest.mark.parametrize('other', [[], [('gather', (1, 2), torch.float32)],
                                   [('gather', (2, 1), torch.float64)]])
def test_ranks_that_make_other_calls_are_found(other):
    mine = [('gather', (2, 1), torch.float32)]

    def all_gather_object(of_ranks, calls):
        of_ranks[:] = [*calls], theirs
    with mock.patch.object(torch.distributed, 'all_gather_object', all_gather_object):
        _calls[:], theirs = mine, mine
        ranks_made_the_same_calls()
        _calls[:], theirs = mine, other
        with pytest.raises(AssertionError, match='ranks made other calls'):
            ranks_made_the_same_calls()


def several_ranks(root, out, me, port):
    """What each of four processes runs. The last two go on as a pair when all four have trained."""
    said = os.open(f'{out}/said', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout, sys.stderr = (open(i, 'w', buffering=1, closefd=False) for i in (1, 2))
    dist = torch.distributed
    for name in COLLECTIVES.split():
        if hasattr(dist, name):
            setattr(dist, name, as_nccl_demands(getattr(dist, name)))
    os.environ.update(RANK=str(me), LOCAL_RANK=str(me), WORLD_SIZE='4')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    join, end = dist.init_process_group, dist.destroy_process_group
    join('gloo', f'file://{out}/store', rank=me, world_size=4)
    # all runs share a group, and rank 0's files are written when one ends
    dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)
    dist.destroy_process_group = ranks_made_the_same_calls
    for name in (*that_hold('four'), 'gpt_local_adamw', 'gpt_replicas'):
        steps = 4 if name.endswith('_shard') else 8 if name in that_hold('four') else 1
        run(name, root, f'{out}/{name}_four', f'--max_iters={steps}')
    few_bits_are_the_same_on_any_number_of_ranks()
    transposed_tensors_are_averaged()
    plain_ddp_is_refused()
    ranks_send_what_is_counted()
    ranks_made_the_same_calls()
    time.sleep(0.1)
    end()
    if me == 3:
        with mock.patch.multiple(dist, init_process_group=join, destroy_process_group=end):
            what_two_ranks_send(root, out)
    if me > 1:
        os.environ.update(RANK=str(me - 2), WORLD_SIZE='2')
        join('gloo', f'file://{out}/pair', rank=me - 2, world_size=2)
        a_run_in_shards_loses_a_rank(root, f'{out}/lost')
    env = {**os.environ, 'WORLD_SIZE': '2'}

    for key in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):  # one process each
        del os.environ[key]
    for name in that_hold('wander')[me::2]:
        run(name, root, f'{out}/{name}_on', '--max_iters=4')

    os.environ.update(env)
    for name in that_hold('two', 'again'):
        run_of_eight(name, root, f'{out}/{name}', f'{out}/{name}_again')
        if 'wander' in RUNS[name][1]:
            run(name, root, f'{out}/{name}_on', '--init_from=resume', '--max_iters=6')
        if 'again' in RUNS[name][1]:
            run(name, root, f'{out}/{name}_again', '--max_iters=8', '--init_from=resume')
    for more in (['--max_iters=6', '--shard=False'], ['--max_iters=8']):
        run('gpt_galore_shard', root, f'{out}/gpt_galore_shard_four', '--init_from=resume', *more)
    for name in ('gpt_local_adamw', 'gpt_replicas'):
        with pytest.raises(SystemExit):  # says: as many as before
            run(name, root, f'{out}/{name}_four', '--init_from=resume')
    with signal_in_batch(5 * 2 if me else None):  # to one rank inside a step: both end after it
        run('gpt_full', root, f'{out}/left', '--max_iters=8')
    assert me or saved(f'{out}/left')['step'] == 6
    run('gpt_full', root, f'{out}/left', '--max_iters=8', '--init_from=resume')
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        run('gpt_full', root, f'{out}/differ', f'--seed={me}')
    assert 'rank 0 has seed=0 and rank 1 1: start all ranks with the same' in said.getvalue()
    unlike = mock.patch('run.dtype_of', return_value=('float16', 'bfloat16')[me])  # cards
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit), unlike:
        run('gpt_full', root, f'{out}/differ')
    assert "rank 0 has dtype='float16' and rank 1 'bfloat16': start all" in said.getvalue()
    unlike = mock.patch('run.fingerprint_of_code', return_value=str(me))
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit), unlike:
        run('gpt_full', root, f'{out}/differ')
    assert "rank 0 has code='0' and rank 1 '1': start all" in said.getvalue()
    # of two nodes, the first one has a checkpoint
    os.mkdir(f'{out}/disk{me}'), os.chdir(f'{out}/disk{me}')
    if me == 0:
        shutil.copytree(f'{out}/gpt_full', 'here')
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        run('gpt_full', root, 'here', '--max_iters=8', '--init_from=auto')
    assert "rank 0 has init_from='resume' and rank 1 'scratch'" in said.getvalue()
    # both have one, of other steps
    shutil.copytree((f'{out}/gpt_full', f'{out}/gpt_full_on')[me], 'there')
    words = words_of('gpt_full', root, 'fresh')
    for more, wanted in (([*words, '--out_dir=there', '--init_from=resume'], 'step=8 and rank 1 6'),
                         ([*loading(words), '--init_from=there/ckpt.pt'], 'the bits of ')):
        with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
            start(train_gpt, more)
        assert wanted in said.getvalue() and 'data and weights' in said.getvalue()
    os.chdir(HERE)
    for words, said in (('--batch_size=3', '1 heads on each of 2 ranks'),
                        (f'{SPLIT}--heads=3 --merge_every=2', 'over 2 ranks')):
        with pytest.raises(ValueError, match=said):
            rows_of_rank(built('gpt', root, out, *words.split(), ranks=2)[0])
    all_ranks_hold_the_same_bits(root, f'{out}/bits')
    each_rank_rounds_its_own_copies_in_its_own_way(root, f'{out}/own')
    few_bits_are_the_same_on_any_number_of_ranks()
    all_ranks_skip_a_step_that_overflows_on_one()
    shards_of_a_block_that_is_called_twice()
    shards_begin_with_the_bits_of_one_process(root, f'{out}/begin')
    one_rank_saves_what_all_ranks_load(root, out / 'rows')
    no_rank_saves_what_is_not_finite_on_one(root, out)
    ranks_made_the_same_calls()
    end()


def what_two_ranks_send(root, out):
    """In the collectives of torch, in each of four steps, written into a file."""
    found = {name: bench.sent(settings_of(train_gpt, *words_of(name, root, out), ranks=2), 2, 4)[0]
             for name in (f'gpt_{name}' for name in (
                 'replicas', 'local_adamw', 'local_muon', 'galolte', 'galolte_2bit',
                 'galolte_shard'))
             if torch.__version__ >= (2, 13)}  # older fake tensors know no collectives
    (out / 'sent.json').write_text(json.dumps(found))


def all_ranks_hold_the_same_bits(root, out):
    """Of all that is not each one's own, after merges."""
    for name, dtype, rank in (
            ('lte', 'float32', 2), ('reset', 'bfloat16', 2), ('replicas', 'float32', 8),
            ('galolte', 'bfloat16', 8), ('bits', 'bfloat16', 8), ('galolte_2bit', 'float32', 8)):
        which, *words = RUNS[f'gpt_{name}'][0].split()
        words += [f'--rank={rank}', f'--dtype={dtype}', f'--param_dtype={dtype}']
        mine, data = built('gpt', root, out, *method(which, *words), ranks=2)
        for step in range(6):
            train_gpt.train_step(mine, step, lambda _: data.batch(8, step, rows=rows_of_rank(mine)))
        own = processes.per_rank_tensors(lowrank.lowrank_layers(mine.model))
        for x in (*mine.model.parameters(), *mine.model.buffers()):
            assert x in own or torch.equal(*processes.gather(x)), name


def each_rank_rounds_its_own_copies_in_its_own_way(root, out):
    """In bfloat16, from equal numbers and gradients; and what all share in the same way."""
    for which, *words in (('local_adamw',), ('local_muon',), ('apollo', '--sync=merge'),
                          ('lte', '--sync=merge'), ('galolte', '--state_bits=16')):
        words += ['--merge_every=2', '--dtype=bfloat16', '--param_dtype=bfloat16', '--rank=8']
        mine, _ = built('gpt', root, out, *method(which, *words), ranks=2)
        mine.optimizer.begin(0)
        own = processes.per_rank_tensors(lowrank.lowrank_layers(mine.model))
        own |= {*mine.replicas.values()}
        for i, p in enumerate(mine.model.parameters()):
            if p.requires_grad:
                p.data = normal(*p.shape, seed=i).to(p.dtype)
                p.grad = normal(*p.shape, seed=-i).to(p.dtype)
        mine.optimizer.step()
        for name, p in mine.model.named_parameters():
            if p.requires_grad and p.dim() > 1:
                some = (p.data, mine.optimizer.state[p].get('exp_avg_sq'))
                pairs = [processes.gather(x) for x in some if x is not None]
                alike = {torch.equal(*pair) for pair in pairs}
                assert alike == {p not in own}, (which, name)


def few_bits_are_the_same_on_any_number_of_ranks():
    rank, ranks = processes.rank_and_world()
    here, error = torch.zeros(4 // ranks, 7, 33), torch.zeros(4, 7, 33)
    for step in range(5):
        x = normal(4, 7, 33, seed=step, dtype=torch.float32)
        wanted = processes.coded_mean(x, 2, error=error)
        got = processes.coded_mean(x[rank::ranks], 2, ranks, here)
        assert torch.equal(got, wanted) and torch.equal(here, error[rank::ranks])
        got, wanted = processes.mean_at(1, x[rank::ranks], ranks), processes.mean_at(0, x, 1)
        assert (rank != 1
                or torch.equal(got, wanted) and (got - x.mean(0)).norm() < 3e-3 * got.norm())
        assert torch.equal(processes.coded_same(1, got, 8), processes.coded_same(1, wanted, 8))
    if rank == 1:
        here[0, 6, 32] = math.inf
    got = processes.coded_mean(x[rank::ranks], 8, ranks, here)
    assert got.isfinite()[0].all() and got[6, 32].isnan()


def transposed_tensors_are_averaged():
    """Such as the gradient of a transposed parameter."""
    rank, ranks = processes.rank_and_world()
    of_ranks = [normal(3, 4, seed=seed).mT for seed in range(ranks)]
    wanted = torch.stack(of_ranks).mean(0)
    x = of_ranks[rank]
    assert processes.mean(x) is x
    close(x, wanted)


def ranks_send_what_is_counted():
    """A megabyte each; what the kernel says that the sockets of this process have sent."""
    ranks, x = processes.rank_and_world()[1], torch.ones(4, 2**16)

    def count():
        torch.distributed.barrier()
        total = 0
        for name in os.listdir('/proc/self/fd'):
            path = f'/proc/self/fd/{name}'
            if os.path.lexists(path) and os.readlink(path).startswith('socket'):
                with (socket.socket(fileno=os.dup(int(name))) as one,
                      contextlib.suppress(OSError)):  # no TCP
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
                    total += struct.unpack_from('Q', info, 200)[0]  # tcpi_bytes_sent
        return total
    net = nn.parallel.DistributedDataParallel(nn.Linear(512, 512, False))
    for call, share, counted in (
            (lambda: processes.mean(x), 1, 0), (lambda: processes.gather(x), 1, 0),
            (lambda: processes.exchanged(x), 1, 0),
            (lambda: processes.coded_mean(x[None], 8, ranks), 1, 0),
            (lambda: net(torch.ones(512)).sum().backward(), 1, 2 * 2**20 * 3 / 4),
            (lambda: processes.mean_at(1, x[None], ranks), 1, 0),
            (lambda: processes.mean_rows(x)(), 2, 0),  # gloo does all of an all_reduce
            # a ring's last one sends nothing, of gloo's tree several
            (lambda: processes.same(x), 3 / 4, 0)):
        before, counted = count(), counted - processes.traffic['bytes']
        call()
        counted += processes.traffic['bytes']
        sent = processes.mean(torch.tensor(float(count() - before)))
        assert sent.item() == pytest.approx(share * counted, rel=0.03)


class Squares(nn.Module):
    """A model whose loss is a number for each rank."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.mlp(self.attn(x)).square().mean()


def plain_ddp_is_refused():
    """Where it would step twice on a gradient, or make heads equal; not without what differs."""
    ddp, rank = nn.parallel.DistributedDataParallel, processes.rank_and_world()[0]
    for apart in (False, True):
        torch.manual_seed(0)
        net, x = Squares(), torch.randn(4, 8) + rank
        lowrank.apply_mhlora(net, rank=2, factors='basis', merge_every=1)
        stepping = galore.LowRankAdamW(net, per_layer=True)
        stepping.begin(0)
        if apart:
            processes.keep_out_of_ddp(net, stepping.outside_ddp)
        wrapped = net if apart else ddp(net)
        wrapped(x).backward()
        if apart:
            stepping.step()
            assert {state['step'] for state in stepping.state.values()} == {1}
        else:
            with pytest.raises(ValueError, match='two gradients in one step.*keep_out_of_ddp'):
                stepping.step()
    net = Squares()
    stepping, wrapped = galore.GaLoreAdamW(net.parameters(), per_layer=True), ddp(net)
    wrapped(torch.randn(4, 8)).backward()
    # as galore-torch's loops are
    with pytest.raises(ValueError, match='two gradients in one step'):
        stepping.step()
    net = Squares()
    net.mlp.weight = net.attn.weight
    stepping = galore.GaLoreAdamW([net.attn.weight], per_layer=True)
    processes.keep_out_of_ddp(net, stepping.outside_ddp)  # by both names
    stepping.begin(0)
    ddp(net)(torch.randn(4, 8)).backward()
    stepping.step()
    for apart, how in itertools.product((False, True), (dict(), dict(factors='basis'))):
        torch.manual_seed(0)
        net, rank, world = Squares(), *processes.rank_and_world()
        lowrank.apply_mhlora(net, heads=world, rank=2, split=True, merge_every=2, worker=rank,
                             workers=world, **how)
        if apart:
            processes.keep_out_of_ddp(net, processes.per_rank_tensors(lowrank.lowrank_layers(net)))
        whole = ddp(net)
        optimizer = galore.LowRankAdamW(net, basis_every=10)
        for step in range(2):
            optimizer.begin(step)
            whole(torch.randn(4, 8) + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        with contextlib.nullcontext() if apart else pytest.raises(
                ValueError, match='equal on all ranks'):
            lowrank.merge(net)


class Twice(nn.Module):
    """A block that is called twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(OrderedDict(mlp=nn.Linear(9, 9)))])
        self.out = nn.Linear(9, 5)

    def forward(self, x):
        return self.out(self.blocks[0](self.blocks[0](x).tanh())).square().mean()


def shards_of_a_block_that_is_called_twice():
    torch.manual_seed(3)
    one = Twice().double()
    lowrank.apply_mhlora(one, ('mlp',), rank=3, factors='basis', merge_every=1)
    two, rank = copy.deepcopy(one), torch.distributed.get_rank()
    processes.shard(two, lowrank.lowrank_layers(two), 'cpu')
    optimizers = [galore.LowRankAdamW(net, lr=0.01, basis_every=4) for net in (one, two)]
    for step in range(9):
        x = normal(4, 6, 9, seed=step)
        # as a backward pass that has failed leaves one
        processes._running.append(
            (lowrank.lowrank_layers(two)[0].factor_rows, lambda: normal(5 - rank, 3)))
        for net, optimizer, rows in zip((one, two), optimizers, (x, x[rank::2])):
            optimizer.begin(step)
            net(rows).backward()
            assert not processes._running
            lowrank.clip_gradients(net, 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for name, x in two.state_dict().items():
        close(processes.all_rows(x), one.state_dict()[name], 1e-12)
    lowrank.check_training(two, optimizers[1])
    three = Twice()
    lowrank.apply_mhlora(three, ('mlp',), rank=3, factors='basis', merge_every=1)
    torch.distributed.fsdp.fully_shard(three)
    with pytest.raises(ValueError, match="'blocks.0.mlp' is in shards, and its basis is not"):
        galore.LowRankAdamW(three)
    plain = Twice()
    torch.distributed.fsdp.fully_shard(plain)
    with pytest.raises(ValueError, match='columns of a gradient are wanted'):
        galore.GaLoreAdamW([{'params': [plain.out.weight], 'rank': 2}])
    for place in ('blocks.1.mlp', 'out'):
        tied = Twice()
        tied.blocks.append(nn.Sequential(OrderedDict(mlp=nn.Linear(9, 9))))
        tied.get_submodule(place).weight = tied.blocks[0].mlp.weight
        with pytest.raises(
                ValueError, match='blocks.0.mlp.weight is shared by two blocks, or by a block'):
            processes.shard(tied, [], 'cpu')


def shards_begin_with_the_bits_of_one_process(root, out):
    wide = '--param_dtype=bfloat16', '--dtype=bfloat16'
    for script, words in itertools.product(
            ('gpt', 'llama'), (method('mhlora'), method('galolte', *wide))):
        both = [built(script, root, out, *words, f'--shard={shard}', ranks=2)[0].model
                for shard in (True, False)]
        shards, one = (processes.gather_state(model, lowrank.named_layers(model)) for model in both)
        if processes.rank_and_world()[0] == 0:
            assert same_state(dict(shards['model']), dict(one['model']))


def one_rank_saves_what_all_ranks_load(root, out):
    words = [*method('galore', '--state_bits=8', '--rank=64', '--n_embd=64', '--n_mlp=96',
                     '--shard=True')]
    mine, data = built('llama', root, out, *words, ranks=2)
    out.mkdir(exist_ok=True)
    for step in range(2):
        train_llama.train_step(
            mine, step, lambda micro_step: data.batch(8, step, rows=rows_of_rank(mine)))
    save(mine, 'ckpt.pt', dict(step=1, best_val_loss=0.0), resumable=True)
    torch.distributed.barrier()
    assert {*files_of(out)} == {'ckpt.pt'}
    checkpoint = load_checkpoint(f'{out}/ckpt.pt')
    again, _ = built('llama', root, out, *words, '--init_from=resume', ranks=2,
                     checkpoint=checkpoint)
    states = [run.optimizer.state for run in (mine, again)]
    assert any('exp_avg_top' in state for state in states[0].values())
    for state, other in zip(*(found.values() for found in states)):
        assert same_state(state, other)
    for p, q in zip(mine.model.parameters(), again.model.parameters()):
        assert torch.equal(processes.local(p), processes.local(q))
    state = load_checkpoint(f'{out}/../gpt_bits_shard/ckpt.pt')  # sketches of heads, then of ranks
    in_full, _ = built('gpt', root, out, *method('galolte', '--shard=True'), ranks=2,
                       checkpoint=state)
    sketches = {p: x for p, x in in_full.optimizer.state.items() if 'sketch' in x}
    assert sketches
    for p, found in sketches.items():
        grads, sums = (processes.gather(found['sketch']),
                       state['optimizer'][in_full.optimizer.names[p]]['sketch'])
        assert grads.shape[:2] == (2, 1) and len(sums) == 4
        assert found['sketch'] is in_full.optimizer.layers[p].sketch.grad
        close(grads.mean((0, 1)), sums.mean(0), 1e-12)
    words = method('local_adamw', '--state_bits=8')  # moments of each rank's own
    mine, data = built('gpt', root, out, *words, ranks=2)
    train_gpt.train_step(mine, 0, lambda micro_step: data.batch(8, 0, rows=rows_of_rank(mine)))
    save(mine, 'best.pt', dict(step=1, best_val_loss=0.0), resumable=True)
    torch.distributed.barrier()
    again, _ = built('gpt', root, out, *words, ranks=2,
                     checkpoint=load_checkpoint(f'{out}/best.pt'))
    layers = [lowrank.named_layers(one.model) for one in (mine, again)]
    assert same_state(*(processes.gather_state(one.model, own, one.optimizer, one.replicas)
                        for one, own in zip((mine, again), layers)))


def a_run_in_shards_loses_a_rank(root, out):
    """And the other one does not wait for it."""
    run, data = built('gpt', root, out, *method('galore'), '--shard=True', ranks=2)
    with pytest.raises(RuntimeError):
        for step in range(3):
            if run.rank and step == 1:
                os._exit(0)
            train_gpt.train_step(run, step, lambda _: data.batch(8, step, rows=rows_of_rank(run)))
    assert step
    os._exit(0)  # no end is waited for


def all_ranks_skip_a_step_that_overflows_on_one():
    """GaLore's leaf under plain DDP, which averages it, and its poisoned sketch; and AdamW beside
    it."""
    gpt, idx, alone = tiny_gpt().float(), torch.arange(16)[None], nn.Parameter(torch.ones(3))
    lowrank.apply_mhlora(gpt, rank=3, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(gpt, lr=0.01, basis_every=4)
    fused, net = torch.optim.AdamW([alone], fused=True), nn.parallel.DistributedDataParallel(gpt)
    scalers = [torch.amp.GradScaler('cpu') for _ in range(2)]
    start = lowrank.merged_state_dict(copy.deepcopy(gpt))
    for step, overflows in enumerate(((0,), (0, 1), (), (), (), ())):  # on which ranks
        much = math.inf if torch.distributed.get_rank() in overflows else 1.0
        optimizer.begin(step)
        for loss, scaler, stepping in zip(
                (net(idx, idx), alone.sum()), scalers, (optimizer, fused)):
            scaler.scale(loss * much).backward()
            unscale(scaler, stepping)
            lowrank.clip_gradients(gpt, 1.0)
            scaler.step(stepping)
            scaler.update()
            stepping.zero_grad()
        moved = [not torch.equal(x, start[name])
                 for name, x in lowrank.merged_state_dict(gpt).items()]
        assert {*moved, not torch.equal(alone, torch.ones(3))} == {step > 1}, step
    for layer in lowrank.lowrank_layers(gpt):  # the second gradient was lost, the sketch was not
        assert optimizer.state[layer.factor]['bases'] == 2
    assert all(scaler.get_scale() == 2**14 for scaler in scalers)
    assert all(torch.equal(*processes.gather(x)) and x.isfinite().all()
               for x in gpt.state_dict().values())


def no_rank_saves_what_is_not_finite_on_one(root, out):
    for name in ('lte', 'galolte'):
        one, data = built('gpt', root, f'{out}/{name}_nan', *method(name))
        train_gpt.train_step(one, 0, lambda micro_step: data.batch(8, 0, rows=rows_of_rank(one)))
        if one.rank == 1:
            heads = next(iter(processes.per_rank_tensors(lowrank.lowrank_layers(one.model))
                              & one.optimizer.state.keys()))
            one.optimizer.state[heads]['exp_avg'].view(-1)[3] = math.nan
        with pytest.raises(SystemExit, match='exp_avg of .* at step 1 is not finite'):
            save(one, 'ckpt.pt', dict(step=1), resumable=True)


@pytest.fixture(scope='session', autouse=True)
def spawn(request, root, tmp_path_factory):
    """The ranks, forked before the other tests if one asks for them: the processes, and their
    folder. Nothing here cuts the power, so no test waits for the disk."""
    fsync = mock.patch.object(os, 'fsync')
    fsync.start()
    request.addfinalizer(fsync.stop)
    if not any('spawned' in item.fixturenames for item in request.session.items):
        yield
        return
    out, fork = tmp_path_factory.mktemp('ranks'), multiprocessing.get_context('fork')
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    ranks = [fork.Process(target=several_ranks, args=(root, out, rank, port)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    yield ranks, out
    for rank in ranks:
        rank.kill()  # if it is there still
        rank.join()


@pytest.fixture(scope='session')
def spawned(spawn):
    """The folder of the runs of `several_ranks`, when they are done."""
    ranks, out = spawn
    end = time.time() + 300
    while (None in (codes := [rank.exitcode for rank in ranks])
           and not any(codes) and time.time() < end):
        time.sleep(0.1)
    assert codes == [0] * 4, (out / 'said').read_text()[-5000:]
    return out


@pytest.mark.parametrize('name', that_hold('again'))
def test_ranks_resume_bit_for_bit(spawned, name):
    assert same_run(saved(spawned / name), saved(spawned / f'{name}_again'))


# of few bits; blocks of shards
ROUGH = {'gpt_half_shard': 1e-2, 'llama_lean': 1e-3, 'llama_leans_shard': 4e-3,
         'llama_int8': 2e-3, 'gpt_int8': 1e-4, 'llama_int8_shard': 2e-3, 'llama_nf4': 3e-3,
         'llama_nf4_shard': 3e-3}


@pytest.mark.parametrize('name', that_hold('two'))
def test_any_number_of_ranks_trains_the_same(root, runs, spawned, tmp_path, name):
    others, laws, base = [spawned / name], RUNS[name][1], name.removesuffix('_shard')
    if 'four' in laws:
        others.append(spawned / f'{name}_four')
    if 'wander' in laws:
        go_on(name, root, spawned / f'{name}_on', tmp_path / 'on', 8)  # one, two, one
        others.append(tmp_path / 'on')
    alone, tolerance = runs(base, 8), ROUGH.get(name, 1e-9)
    pairs = [(alone, other) for other in others]
    if '--dtype=float32' in RUNS[name][0]:
        # what is rounded otherwise grows hundredfold in four more steps: there losses are compared
        pairs = [(runs(base, 4), spawned / f'{name}_again')]
    for one, other in pairs:
        ours, theirs = saved(one), saved(other)
        assert ours['step'] == theirs['step']
        for key, value in theirs['model'].items():
            # of all of a layer's directions: any will do
            if 'leans' in name and key.endswith('basis'):
                continue
            whole = ours['model'][key]
            # where a sum of ranks is rounded otherwise it may be the next one
            if value.dtype == torch.int8:
                away = (value.int() - whole.int()).abs()
                assert away.max() <= 2 and away.float().mean() < 0.05, f'{other} {key}'
                continue
            torch.testing.assert_close(
                value, whole, rtol=0, atol=tolerance, msg=f'{other} {key}')
    for other in others:
        for key in ('val_loss', 'train_loss', 'test_loss', 'val_auc', 'test_auc'):
            wanted, got = logged(alone, key), logged(other, key)
            least = 2e-6 if key == 'train_loss' else 0  # is added up in float32
            assert {step: got[step] for step in wanted} == pytest.approx(
                wanted, abs=max(tolerance, least))


def test_a_checkpoint_of_shards_is_read_as_one_of_one_process(root, runs, spawned, tmp_path):
    idx, out = tokens_of(2, 8), spawned / 'gpt_galore_shard'
    alone = loaded(runs('gpt_galore', 8) / 'best.pt')[0](idx)
    close(loaded(out / 'best.pt')[0](idx), alone, 1e-9)
    words = ['--num_samples=1', '--max_new_tokens=9', '--device=cpu']
    texts = [start(sample, [f'--out_dir={one}', *words]) for one in (out, runs('gpt_galore', 8))]
    assert texts[0] == texts[1]
    start(export, [f'--out_dir={out}', f'--to={tmp_path}/hf', '--dtype=float64'])
    close(loaded(tmp_path / 'hf')[0](idx), alone, 1e-9)
    shape = dict(model=None, n_layer=None, n_embd=None, n_head=None, img_size=28, patch_size=14)
    ours, theirs = (hub.read_vit(f'{one}/best.pt', shape, ['normal', 'pneumonia'])[1]
                    for one in (spawned / 'vit_galore_shard', runs('vit_galore', 8)))
    for key, x in theirs.items():
        close(ours[key], x, 1e-9)


def test_a_fresh_run_removes_the_old_one_and_what_makes_it_ours_last(runs, tmp_path):
    out, removed = shutil.copytree(runs('gpt_full', 4), tmp_path / 'a'), []
    settings = {**saved(out)['settings'], 'init_from': 'scratch', 'out_dir': str(out)}
    with mock.patch.object(os, 'remove', lambda path: (removed.append(path), os.unlink(path))):
        start_run(settings, 0)  # a kill leaves a folder that is known as ours
    names = [os.path.basename(path) for path in removed if not path.endswith('.tmp')]
    assert names == ['ckpt.pt', 'best.pt', 'log.jsonl', 'config.json']


@pytest.mark.parametrize('script', SCRIPTS)
def test_shards_of_one_process_are_none(root, tmp_path, capsys, script):
    states = []
    for more in ((), ('--shard=True',)):
        mine, _ = built(script, root, tmp_path, *method('galolte'), *more)
        assert ('one process holds all: shard=True does nothing'
                in capsys.readouterr().out) == bool(more)
        states.append(mine.model.state_dict())
    assert same_state(*states)


@pytest.mark.parametrize('name', that_hold('written'))
def test_replicas_are_workers_as_they_are_written_down(root, plains, spawned, tmp_path, name):
    state, script, (which, *own) = saved(spawned / name), name.split('_')[0], RUNS[name][0].split()
    words = method(which, '--gradient_accumulation_steps=2', '--max_iters=8', *own)
    run, data = built(script, root, tmp_path, *words, ranks=2)
    run.optimizer.begin(0)  # draws bases
    forward, first, matrices, how = book_of(
        plains[script], run.model, run.optimizer, run.settings, ranks=2)
    batches = [seen(script, data, step, run.settings) for step in range(8)]
    joined = [tuple(map(torch.cat, zip(*batch))) for batch in batches]
    *_, (_, workers) = textbook.train(forward, first, joined, matrices, how)
    for worker, w in enumerate(workers):
        for key, Ws in state['replicas'].items():
            close(Ws[worker], w.W[key], 3e-3 if name == 'gpt_local_8' else 1e-9)
        for key in w.A:  # ours holds W of the last merge, and what it has of each head
            A, B, A_merged, B_merged = (state['model'][key[:-6] + name][worker]
                                        for name in ('A', 'B', 'A_merged', 'B_merged'))
            close(A, w.A[key][0], 1e-9)
            close(B, w.B[key][0], 1e-9)
            close(state['model'][key] - how['alpha'] / how['rank'] * B_merged @ A_merged,
                  w.W[key], 1e-9)


def test_no_byte_is_sent_in_silence(spawned):
    words = [f'--out_dir={spawned}/gpt_replicas', '--num_samples=1', '--max_new_tokens=3',
             '--device=cpu']
    assert len(start(sample, words)[0]) == 4
    # is what the log tells
    for name, put in json.loads((spawned / 'sent.json').read_text()).items():
        logs = logged(spawned / name, 'sync_bytes')
        for k in (2, 4):
            assert logs[k] == round(sum(put[k - 2:k]) / 2), name
    for name, share in (('gpt_full', 0.52), ('gpt_galore', 0.52)):
        held, whole = (logged(spawned / run, 'optimizer_state_bytes')[8]
                       for run in (f'{name}_shard', name))
        assert held < share * whole, (name, held, whole)
    # 2 heads of rank 3, without those of the last merge; 8 bytes a number
    weights = saved(spawned / 'gpt_full')['model']
    shapes = [W.shape for name, W in weights.items() if '.h.' in name and W.dim() > 1]
    others = sum(W.numel() for name, W in weights.items() if 'lm_' not in name)
    others -= sum(m * n for m, n in shapes)
    once = sum(8 * 2 * 3 * (m + n) for m, n in shapes)
    compared = 8 * 2 * len(shapes)  # a sum of each A and B, before the first merge
    assert logged(spawned / 'gpt_reset', 'sync_bytes')[4] == 8 * others + (once + compared) // 2
