"""
What holds in this repository: `pytest test_lowrank.py`. Laws are checked in float64, on tiny shapes, against
formulations of their own; the scripts run for real, on tiny data. SLOW=1 compiles for real.
"""

import contextlib
import copy
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import bench
import config
import galore
import lowrank
import model as models
import prepare
import sample
import train_gpt
import train_llama
import train_vit

torch.set_num_threads(1)  # tiny shapes: threads would only wait for each other
HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = {'gpt': train_gpt, 'llama': train_llama, 'vit': train_vit}
FILES = {name[:-3]: f'{HERE}/config/methods/{name}' for name in sorted(os.listdir(f'{HERE}/config/methods'))
         if name.endswith('.py')}
SMALL = {'rank': 3, 'merge_every': 3, 'basis_every': 6, 'rewarm_iters': 2}  # for runs of eight steps
double = torch.float64


def settings_of(script, *words, ranks=1):
    """What a script makes of a command line on so many ranks."""
    with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks)):
        return config.load(vars(script), script.defaults, [*map(str, words)])


def start(script, words):
    """Runs a script with a command line; returns what its main does."""
    return script.main(config.load(vars(script), script.defaults, [*map(str, words)]))


METHODS = {name: settings_of(train_gpt, path, ranks=2) for name, path in FILES.items()}
ALONE = [name for name, settings in METHODS.items() if settings['sync'] == 'step']  # need no other rank


def method(name, *more):
    """The words that give a method to a tiny run."""
    own = runpy.run_path(FILES[name])
    small = [f'--{key}={value}' for key, value in SMALL.items() if own.get(key, 0) > 1]
    return [FILES[name], *small, *['--grad_clip=0.2'] * ('grad_clip' not in own), *more]


TEXT = '--dataset=tiny --block_size=16 --eval_iters=2 --learning_rate=0.01 --min_lr=0.01 '
OWN = {'gpt': TEXT, 'llama': TEXT + '--n_mlp=24 --n_kv_head=1 --vocab_size=257',
       'vit': '--dataset=xrays --init_from=scratch --model=vit_tiny_patch16_224 --img_size=28 '
              '--patch_size=14 --learning_rate=0.001 --min_lr=0.001'}
ALL = ('--n_layer=2 --n_head=2 --n_embd=16 --batch_size=8 --max_iters=4 --eval_interval=4 --log_interval=2 '
       '--warmup_iters=2 --param_dtype=float64 --dtype=float64 --device=cpu ')


def tiny(script, root, out, *words):
    """The command line of a tiny run in float64."""
    return [f'--data_dir={root}', f'--out_dir={out}', *(ALL + OWN[script]).split(), *words]


def saved(out, name='ckpt.pt'):
    return config.load_checkpoint(f'{out}/{name}')


def train(script, root, out, *words):
    """Runs a script's main on a tiny model and returns the checkpoint that it ends with."""
    start(SCRIPTS[script], tiny(script, root, out, *words))
    return saved(out)


def built(script, root, out, *words, checkpoint=None):
    """A tiny run that is set up and has not begun, and its training data."""
    settings = settings_of(SCRIPTS[script], *tiny(script, root, out, *words))
    if script == 'vit':
        data = prepare.Images('xrays', 'train', root)
        about = data.classes
    else:
        data = prepare.Tokens('tiny', 'train', 16, root)
        about = data.vocab_size
    return SCRIPTS[script].build(settings, config.join(settings), about, checkpoint), data


def records(out):
    with open(f'{out}/log.jsonl', encoding='utf-8') as file:
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
    return torch.randn(shape, generator=g, dtype=double).to(dtype)


def tokens_of(*shape, high=31, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-12):
    """Equal to rounding, relative to nothing."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
    return models.GPT(models.GPTConfig(**{**shape, **changes})).double()


def tiny_llama(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_mlp=24, n_kv_head=2)
    return models.Llama(models.LlamaConfig(**{**shape, **changes})).double()


def one_block_llama(**changes):
    shape = dict(block_size=8, n_embd=16, n_layer=1, n_head=2, n_mlp=24, n_kv_head=1)
    return tiny_llama(**{**shape, **changes})


def tiny_vit():
    torch.manual_seed(0)
    shape = dict(model='vit_tiny_patch16_224', img_size=28, patch_size=14, n_layer=2, n_head=2, n_embd=16)
    return train_vit.create(shape, 9).double()


def of_the_hub(gpt):
    """GPT-2's weights in the layout of the hub."""
    return {name: value.T.contiguous() if value.dim() == 2 and name[0] == 'h' else value.contiguous()
            for name, value in gpt.transformer.state_dict().items()}


def backward(net, idx):
    """A loss that is not zero: of the token before."""
    net.zero_grad()
    net(idx, idx.roll(-1, 1)).backward()


@pytest.fixture(scope='session')
def root(tmp_path_factory):
    """A folder of data sets, made by the real writers."""
    root = tmp_path_factory.mktemp('data')
    texts = [f'document {i}: ' + ' '.join(str(i * j % 97) for j in range(60)) for i in range(120)]
    (root / 'tiny.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    prepare_text(root, root / 'tiny.jsonl', '--name', 'tiny')
    prepare_text(root, numbered(root / 'mine.txt'), '--name', 'mine', '--shard_tokens', 20_000)
    archive(root)
    prepare_images(root)
    ill = np.arange(64)[:, None, None] % 2  # who is ill is lighter
    images = (np.random.default_rng(0).integers(0, 128, (64, 28, 28)) + 100 * ill).astype(np.uint8)
    archive(root, 'pneumoniamnist', counts={'train': 64, 'val': 12, 'test': 13}, train_images=images,
            val_images=images[:12], test_images=images[:13])
    prepare_images(root, 'pneumoniamnist', '--name', 'xrays')
    for name in prepare.DIGITS:
        prepare.ensure(name, root)
    return root


# -----------------------------------------------------------------------------
# settings


def write_files(folder, **texts):
    """Config files; those whose name begins with m_ are methods. Returns the paths by name."""
    (folder / 'methods').mkdir()
    paths = {name: folder / 'methods' / f'{name[2:]}.py' if name[:2] == 'm_' else folder / f'{name}.py'
             for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name] + '\n')
    return {name: str(path) for name, path in paths.items()}


def test_files_see_the_defaults_compose_in_any_order_and_the_command_line_wins(tmp_path):
    paths = write_files(
        tmp_path, a='import math\n_half = rate / 2\nrate = _half\nshape = 1, 2\nname = "x"',
        b='rates = [1, 2]\nrate = rates[1]',  # what else it takes to compute
        m_galore="lowrank, factors, merge_every, rank = 'attn', 'basis', 1, 64\nbeta2 = 0.9",
        run="batch_size = 8\nlearning_rate = {'full': 1e-3, 'galore': n_layer * 1e-3}\nrank = {'galore': 4}\n"
            "beta1, alpha, lowrank, scale = {'lte': 0.5}, {'lte': 3.0}, {'lte': 'mlp'}, {'galore': 1}",
        more='batch_size = 8\nbeta1 = 0.8')
    known = dict(rate=1.0, shape=(3,), flag=False, name='', limit=None, count=1)
    got = config.load({}, known, ['--name=7', paths['a'], '--count=3', '--limit=2', '--flag=True'])
    assert got == dict(rate=0.5, shape=(1, 2), flag=True, name='7', limit=2, count=3)
    got = config.load({}, known, [paths['b'], "--name='x y'", '--limit=None'])
    assert got == {**known, 'rate': 2.0, 'name': 'x y'}  # int for float; nothing is left over

    run, more, galore_file = paths['run'], paths['more'], paths['m_galore']
    first, *others = [settings_of(train_gpt, *words)
                      for words in itertools.permutations([run, more, galore_file, '--seed=3'])]
    assert all(other == first for other in others)
    changed = {key: value for key, value in first.items() if value != train_gpt.defaults[key]}
    assert changed == dict(lowrank='attn', factors='basis', merge_every=1, rank=4, batch_size=8, seed=3,
                           scale=1.0, beta1=0.8, beta2=0.9, learning_rate=0.012,
                           min_lr=0.012 / 10)  # tables win
    assert isinstance(first['scale'], float)  # entries of tables have the types of settings, too
    full = settings_of(train_gpt, run, more, '--min_lr=0.0')
    assert (full['learning_rate'], full['rank'], full['min_lr']) == (1e-3, 8, 0.0)  # no rank is missed
    assert settings_of(train_gpt, run, more, galore_file, '--learning_rate=1')['learning_rate'] == 1.0


SCRIPT_OF = {key: name for name, script in SCRIPTS.items() for key in script.defaults}
BASIS = '--lowrank=attn --factors=basis '
SPLIT = '--lowrank=attn --split=True '
MISTAKES = [  # script, words, ranks, what is said
    ('gpt', '--learning_rat=1', 1, "learning_rat' on the command line: did you mean 'learning_rate'"),
    ('gpt', '--heads=many', 1, 'type str, but int'), ('gpt', '--compile=1', 1, 'type int, but bool'),
    ('gpt', '--heads=True', 1, 'type bool, but int'), ('gpt', '--rank', 1, '--rank=value'),
    ('gpt', '--n_layer=None', 1, 'NoneType, but int'), ('gpt', '--vocab_size=abc', 1, 'type str, but int'),
    ('gpt', 'config/nowhere.py', 1, 'nowhere.py'),
    *((SCRIPT_OF[key], f'--{key}={least - 1}', 1, f'set at least {least}')
      for key, least in config.LEAST.items() if key in SCRIPT_OF),
    *((SCRIPT_OF[key], f"--{key}={'nonsense' if key != 'state_bits' else 12}", 1, 'is not known: set one of')
      for key in config.CHOICES),
    # what has no effect
    ('gpt', '--heads=4', 1, 'heads=4 on the command line has no effect: there are no low-rank layers'),
    ('llama', '--rank=4', 1, 'rank=4 on the command line has no effect'),
    ('gpt', '--alpha=4', 1, 'alpha=4.0'), ('gpt', f'{BASIS}--merge_every=1 --alpha=4', 1, 'not a basis'),
    ('gpt', '--merge_reset=True', 1, 'merge_reset=True'), ('gpt', '--merge_every=5', 1, 'no heads to merge'),
    ('gpt', '--lowrank=attn --rewarm_iters=2', 1, 'merges that reset'),
    ('gpt', '--lowrank=attn --alpha=0', 1, 'above 0'), ('gpt', '--beta2=1', 1, 'below 1'),
    ('gpt', '--lowrank=attn --split=True --merge_every=2', 1, 'changes nothing'),
    ('gpt', FILES['local_adamw'], 1, 'start it with torchrun'),
    ('gpt', 'config/quickstart.py --lowrank=attn --rank=4 --alpha=4', 1,
     'learning_rate in config/quickstart.py is that'),
    ('gpt', '--basis=svd', 1, "basis='svd' on the command line has no effect: no basis is taken"),
    ('vit', '--lowrank=attn --basis_every=5', 1, 'no basis'),
    ('vit', '--epochs=2 --max_iters=9', 1, 'max_iters=9 on the command line has no effect: epochs'),
    ('gpt', '--init_from=gpt2 --n_layer=3', 1, 'loaded weights have a shape'),
    # what makes no sense together
    ('gpt', '--dropout=1.5', 1, 'dropout=1.5'), ('gpt', '--batch_size=3', 2, 'batch_size=3 does not split'),
    ('gpt', '--dtype=float16 --param_dtype=bfloat16', 1, 'param_dtype'),
    ('gpt', '--lowrank=attn --optimizer=galore --basis=svd', 1, "optimizer='adamw'"),
    ('gpt', '--lowrank=attn --merge_reset=True', 1, 'without merges'),
    ('gpt', '--lowrank=attn --merge_reset=True --merge_every=2 --rewarm_iters=2', 1, 'never end'),
    ('gpt', BASIS, 1, 'merge_every=1'), ('gpt', f'{BASIS}--merge_every=1 --heads=2', 1, 'are one head'),
    ('gpt', f'{BASIS}--merge_every=3 --basis_every=10', 1, 'basis_every=10 is no multiple of merge_every=3'),
    ('gpt', f'{SPLIT}--heads=5 --merge_every=2', 1, 'over heads=5'),
    ('gpt', f'{SPLIT}--heads=3 --merge_every=2', 2, 'heads=3 do not split over 2 ranks'),
    ('gpt', f'{SPLIT}--heads=2', 1, 'never meet'),
    ('gpt', f'{SPLIT}--heads=2 --merge_every=2 --state_bits=8', 2, 'state_bits=None'),
    ('gpt', '--lowrank=attn --merge_every=5', 1, 'merge_reset=True'),
    ('gpt', '--sync=merge --merge_every=5', 1, 'torchrun'), ('gpt', '--sync=merge', 2, 'set merge_every'),
    ('gpt', '--lowrank=attn --sync=merge --merge_every=2 --merge_reset=True', 2, 'split=True'),
    ('gpt', '--sync=merge --merge_every=5 --optimizer=galore --basis=svd', 2, 'other bases'),
    ('gpt', '--train=classifier', 1, 'for images'), ('gpt', '--train=factors', 1, 'nothing to train'),
    ('gpt', f'{BASIS}--merge_every=1 --train=factors', 1, 'nothing to train'),
    ('vit', f'{SPLIT}--heads=2 --merge_every=2 --adapter=a', 1, 'an adapter'),
    ('gpt', '--optimizer=fira', 1, "basis='power'"), ('gpt', '--per_layer=True', 1, 'grad_clip=0.0'),
    ('gpt', '--per_layer=True --grad_clip=0 --dtype=float16', 1, 'GradScaler'),
    ('gpt', '--per_layer=True --grad_clip=0 --sync=merge --merge_every=2', 2, 'leave one of them out'),
    ('gpt', '--eval_only=True --wandb_log=True', 1, 'wandb_log=False'),
    # files
    ('gpt', 'config/methods/lte.py config/methods/galore.py', 1, 'lte and galore are two methods'),
    ('gpt', 'config/llama_60m.py', 1, "'config/llama_60m.py' is one of train_llama.py"),
    ('llama', 'config/vit_quickstart.py', 1, 'is one of train_vit.py'),
    ('llama', 'config/llama_60m.py config/methods/lte.py', 1,
     "learning_rate in config/llama_60m.py is given for full, galore, galore_lean, fira, lora, relora, "
     "and not for the method 'lte'"),
    ('gpt', '{run} {other}', 1, 'set batch_size to two values, 8 and 4'),
    ('gpt', '{run} {m_mine}', 1,
     "set seed to two values, 3 and 4: leave one out, or let the file of the run say seed = {'mine': ...}"),
    ('gpt', '{tables}', 1, 'rank=4.5 for lte in {tables} is of type float, but int'),
    ('gpt', '{list}', 1, 'type list, but str'),
    ('gpt', '{typo}', 1, "did you mean 'learning_rate'"), ('gpt', '{syntax}', 1, 'SyntaxError'),
    ('gpt', '{name}', 1, "name 'many' is not defined")]


@pytest.mark.parametrize('script, words, ranks, said', MISTAKES, ids=[f'{m[0]} {m[1]}' for m in MISTAKES])
def test_a_mistake_is_one_sentence(tmp_path, capsys, monkeypatch, script, words, ranks, said):
    monkeypatch.chdir(HERE)
    paths = write_files(
        tmp_path, run='batch_size, seed = 8, 3', other='batch_size = 4', m_mine='seed = 4',
        tables="rank = {'lte': 4.5}", list="lowrank = ['attn']", typo="lerning_rate = {'full': 1.0}",
        syntax="lowrank = 'attn", name='max_iters = many * 2')
    for name, path in paths.items():
        words, said = words.replace(f'{{{name}}}', path), said.replace(f'{{{name}}}', path)
    refused(capsys, lambda: settings_of(SCRIPTS[script], *words.split(), ranks=ranks), said)


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
                assert end.code == (0 if line.endswith(('-h', '--help')) else 2), (line, said.getvalue())
            if line.endswith('--help'):
                print(said.getvalue())
        assert not {'torch', 'numpy', 'timm'} & set(sys.modules)'''
    asked = ['train_vit.py config/vit_quickstart.py --help', 'train_gpt.py -h']
    command = [sys.executable, '-c', code, *lines, *asked]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith('Trains a vision transformer') and '\n# optimizer\n' in ran.stdout
    assert "\nfactors = 'both'  # 'both' are trained; 'B' alone (LoRA-FA)" in ran.stdout
    assert ran.stdout.rstrip().endswith('wandb_log = False  # needs the package wandb')


def test_every_config_file_goes_with_every_method_it_has_a_rate_for():
    count = 0
    for name in sorted({*os.listdir(f'{HERE}/config')} - {'__init__.py', 'methods', '__pycache__'}):
        path = f'{HERE}/config/{name}'
        with open(path, encoding='utf-8') as file:
            head = [file.readline() for _ in range(3)]
        assert all(line.startswith('# ') for line in head) and 'train_' in head[1] and ':' in head[2], name
        script = SCRIPTS.get(name.split('_')[0], train_gpt)
        rates = runpy.run_path(path, init_globals=script.defaults)['learning_rate']
        for other in rates if isinstance(rates, dict) else METHODS:
            settings = settings_of(script, path, FILES[other], ranks=1 if other in ALONE else 4)
            assert settings['out_dir'] == f'out/{name[:-3]}'
            assert settings['learning_rate'] == (rates[other] if isinstance(rates, dict) else rates)
            count += 1
    assert count > 40


def test_learning_rate_warms_up_decays_and_restarts():
    def at(step, *restart):
        return config.learning_rate_at(step, 1.0, 10, 110, 0.1, *restart)
    assert at(0) == pytest.approx(1 / 11) and at(10) == 1.0
    assert at(60) == pytest.approx(0.55) and at(110) == at(500) == pytest.approx(0.1)
    assert at(50, 50, 4) == pytest.approx(at(50) / 5) and at(54, 50, 4) == at(54) and at(49, 50, 4) == at(49)


def test_what_may_not_change_has_to_be_the_same_on_resume():
    checkpoint = {'settings': {**train_gpt.defaults, 'train': 'all'}, 'optimizer': {}}
    assert config.MAY_CHANGE <= {*train_gpt.defaults, *train_vit.defaults}
    for key in train_gpt.defaults:
        settings = {**train_gpt.defaults, key: 'something else'}
        if key in config.MAY_CHANGE:
            config.need_same(settings, checkpoint)
            assert settings['train'] == 'all'  # 'auto' is what the run made of it
        else:
            with pytest.raises(ValueError, match=f"trained with {key}=.*this run says 'something else'"):
                config.need_same(settings, checkpoint)
    with pytest.raises(ValueError, match='another script .*n_mlp'):
        config.need_same({**train_gpt.defaults, 'n_mlp': None}, checkpoint)


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
        rows, first = [], epoch * count  # batches do not divide the epoch: what counts is the row of items
        for step in range(first // 12, (first + count) // 12 + 1):
            ranks = [rows_of(data.batch(12, step, seed=5, rows=lowrank.rows_of(12, 1, rank, world_size)))
                     for rank in range(world_size)]
            rows += [ranks[j % world_size][j // world_size] for j in range(12)]
        order = rows[first % 12:][:count]
        assert sorted(order) == sorted(everything) and order == orders.setdefault(epoch, order)
    assert orders[0] != orders[1] != everything


def test_a_batch_depends_on_its_arguments_alone(data):
    first = rows_of(data.batch(8, 3, 1, accumulation=2, seed=1))
    assert first == rows_of(data.batch(8, 3, 1, accumulation=2, seed=1))
    assert first == rows_of(data.batch(8, 7, seed=1)) != rows_of(data.batch(8, 7, seed=2))  # the seventh
    whole = rows_of(data.batch(24, 2, seed=3))
    for heads, world_size in ((1, 1), (1, 2), (1, 3), (4, 1), (2, 2), (1, 4)):
        for rank in range(world_size):  # a row goes to the same of all heads, whatever the number of ranks
            rows = rows_of(data.batch(24, 2, seed=3, rows=lowrank.rows_of(24, heads, rank, world_size)))
            parts = [whole[head * world_size + rank::heads * world_size] for head in range(heads)]
            assert rows == sum(parts, [])


def test_a_permutation_is_one_of_any_size():
    for size in (1, 2, 3, 5, 64, 65, 1000, 4097):
        orders = [prepare.permute(np.arange(size), size, 0, epoch) for epoch in range(4)]
        assert all(np.array_equal(np.sort(order), np.arange(size)) for order in orders)
        assert size < 64 or abs(np.corrcoef(orders[0], np.arange(size))[0, 1]) < 0.35
        assert size < 64 or not np.array_equal(orders[0], orders[1])


def test_fixed_batches_spread_over_all_windows_and_hold_every_image_once(root):
    text, images = prepare.Tokens('mine', 'train', 64, root), prepare.Images('pathmnist', 'test', root)
    x, y = text.items(np.arange(text.num_windows))
    windows = [shard[i * 64:i * 64 + 65] for shard in text.shards for i in range((len(shard) - 1) // 64)]
    assert x.dtype == y.dtype == torch.int64 and len(windows) == text.num_windows
    assert np.array_equal(torch.cat([x, y[:, -1:]], 1), windows) and torch.equal(x[:, 1:], y[:, :-1])
    place, everything = {row: i for i, row in enumerate(rows_of((x, y)))}, rows_of(images.fixed_batch(0, 41))
    for world_size, size in itertools.product((1, 2, 3), (6, 12, 39)):  # of 39: the third rank has none
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
def test_shards_round_trip(tmp_path, vocab_size, item):
    encoding = mock.Mock(n_vocab=vocab_size, eot_token=vocab_size - 1)  # its tokens: the numbers in the text
    encoding.encode_to_numpy = lambda text, disallowed_special: np.array(text.split(), np.uint32)
    rows = [np.random.default_rng(i).integers(0, vocab_size - 1, 100) for i in range(50)]
    documents = [(split, ' '.join(map(str, row)), True) for split in ('train', 'val') for row in rows]
    settings = {'limit': None, 'shard_tokens': 1000, 'vocab_size': vocab_size}
    fill = functools.partial(prepare.write_tokens, documents=lambda: iter(documents), encoding=encoding,
                             val_below=0)
    prepare.write(tmp_path, settings, fill, overwrite=False)
    for split in ('train', 'val'):
        data = prepare.Tokens(tmp_path.name, split, 8, tmp_path.parent)
        assert len(data.shards) == 5 and data.shards[0].dtype == f'<u{item}'
        assert np.array_equal(np.concatenate(data.shards), sum([[*row, vocab_size - 1] for row in rows], []))
        assert data.meta['bytes'][split] == sum(len(text) for _, text, _ in documents[:50])
    header = (tmp_path / 'train_000000.bin').read_bytes()[:32]
    assert header == b'nLRshard' + struct.pack('<IIQQ', 1, item, 1010, 0)


def test_shifted_digits_are_the_digits_under_another_look(root):
    counts = 0
    for split in COUNTS:
        digits, shifted = (prepare.Images(name, split, root) for name in prepare.DIGITS)
        (x, y), (x2, y2) = digits.fixed_batch(0, 2000), shifted.fixed_batch(0, 2000)
        assert torch.equal(y, y2) and y.bincount().min() > 25 and x.shape == x2.shape == (len(y), 3, 32, 32)
        assert torch.equal(x[:, 0], x[:, 1]) and (x2.amax(1) != x2.amin(1)).any((1, 2)).all()  # coloured
        assert (x.float().mean((1, 2, 3)) < x2.float().mean((1, 2, 3))).float().mean() > 0.9  # inverted
        counts += len(y)
    assert counts == 1797 and digits.task == 'multi-class' and digits.classes == list('0123456789')


@pytest.mark.parametrize('name, words, said', [
    ('c4', '', "'c4' is not there: run '.* prepare.py c4"),
    ('foo', '', "run 'python prepare.py text --input FILE --name foo"),
    ('tiny', 'train 10000000', 'block_size 10000000 is longer .* or less'),
    ('tiny', 'test', "no split 'test'"),
    ('digits', 'train 8', "'digits' holds images, not tokens"),
    ('bloodmnist_224', '', "run 'python prepare.py bloodmnist --size 224 --"),
    ('digits', 'valid', "no split 'valid': use one of train, val")])
def test_data_that_is_not_there_is_named_with_the_remedy(root, name, words, said):
    split, *size = words.split() or ['train']
    images = name.startswith('bloodmnist') or name == 'digits' and not size
    with pytest.raises(prepare.DataError, match=said):
        if images:
            prepare.Images(name, split, root)
        else:
            prepare.Tokens(name, split, int((size or [8])[0]), root)


def cut(begin, end):
    return lambda whole: whole[begin:end]


def changed(place, byte):
    return lambda whole: whole[:place] + byte + whole[place + 1:]


def empty(whole):
    return b''


@pytest.fixture(scope='session')
def files(root, tmp_path_factory):
    """Whole files of every kind that is read, and {name: its reader}."""
    folder = tmp_path_factory.mktemp('files')
    shutil.copytree(root / 'tiny', folder / 'tiny')
    config.save_checkpoint(f'{folder}/ckpt.pt', {'edition': lowrank.EDITION, 'model': {'w': torch.ones(100)},
                                                 'settings': {}, 'step': 1, 'model_config': {}})
    safetensors.torch.save_file(of_the_hub(tiny_gpt(n_head=1, n_embd=64)), folder / 'gpt.safetensors')
    safetensors.torch.save_file(tiny_vit().state_dict(), folder / 'vit.safetensors')
    config.save_adapter(tiny_vit(), f'{folder}/adapter.safetensors', {})
    return folder, {
        'ckpt.pt': config.load_checkpoint,
        'gpt.safetensors': lambda path: models.GPT.from_pretrained(path, block_size=8),
        'vit.safetensors': lambda path: train_vit.read_weights(path, {}, 'ab', 'xrays', False),
        'adapter.safetensors': lambda path: config.load_adapter(tiny_vit(), path, {}),
        'tiny/meta.json': lambda path: prepare.Tokens('tiny', 'train', 8, folder),
        'tiny/train_000000.bin': lambda path: prepare.Tokens('tiny', 'train', 8, folder)}


SHARD = 'tiny/train_000000.bin'


@pytest.mark.parametrize('name, damage, said', [
    *(('ckpt.pt', damage, 'is damaged') for damage in (cut(0, 200), cut(0, -300), empty, lambda _: b'no')),
    ('ckpt.pt', {'other': 1}, 'not a checkpoint of this project'),
    ('ckpt.pt', {'edition': 1}, 'first edition'),
    ('ckpt.pt', {'model': nn.Linear(1, 1)}, 'is damaged'),  # nothing is unpickled
    ('ckpt.pt', None, 'train first'),
    *((name, damage, 'is damaged') for name in ('gpt.safetensors', 'vit.safetensors', 'adapter.safetensors')
      for damage in (cut(0, 200), empty)),
    *((SHARD, damage, '--overwrite') for damage in (  # magic, version, item, count; lengths
        changed(0, b'X'), changed(8, b'\7'), changed(12, b'\3'), changed(16, b'\0'), changed(23, b'\1'),
        empty, cut(0, 5), cut(0, 32), cut(0, -1), lambda whole: whole + b'x')),
    (SHARD, None, 'is missing.*--overwrite'), ('tiny/meta.json', cut(0, 30), 'is damaged.*move it away'),
    ('tiny/meta.json', lambda _: b'[]', 'is damaged.*move it away')])
def test_a_damaged_file_is_refused_by_name(files, name, damage, said):
    folder, readers = files
    path = folder / name
    readers[name](str(path))
    whole = path.read_bytes()
    try:
        if callable(damage):
            path.write_bytes(damage(whole))
        elif damage is None:
            path.unlink()
        else:  # other things in a file that is whole
            keep = {} if 'other' in damage else torch.load(path, weights_only=True)
            torch.save({**keep, **damage}, path)
        with pytest.raises((ValueError, FileNotFoundError), match=f'{path.name}.*{said}') as refusal:
            readers[name](str(path))
        assert '\n' not in str(refusal.value)
    finally:
        path.write_bytes(whole)


def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_old_one(tmp_path):
    class Interrupts:
        def __reduce__(self):
            raise KeyboardInterrupt
    path = f'{tmp_path}/ckpt.pt'
    config.save_checkpoint(path, {'step': 1})
    with pytest.raises(KeyboardInterrupt):
        config.save_checkpoint(path, {'step': 2, 'weights': torch.ones(9), 'more': Interrupts()})
    assert torch.load(path) == {'step': 1}
    with pytest.raises(FileNotFoundError, match='take --checkpoint=ckpt.pt'):
        config.load_checkpoint(f'{tmp_path}/best.pt')


# -----------------------------------------------------------------------------
# models


def attended(q, k, v):
    """Causal attention of one head on one sequence, (time, size) each."""
    time, size = q.shape
    return torch.stack([(k[:t + 1] @ q[t] / math.sqrt(size)).softmax(0) @ v[:t + 1] for t in range(time)])


def parts(x, count):
    return x.chunk(count, -1)


def gpt_by_hand(W, idx):
    """Logits of one sequence, from a state dict, with two layers of two heads."""
    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * W[name + '.weight'] + W[name + '.bias']

    def linear(x, name):
        return x @ W[name + '.weight'].T + W[name + '.bias']
    x = W['transformer.wte.weight'][idx] + W['transformer.wpe.weight'][:len(idx)]
    for block in ('transformer.h.0', 'transformer.h.1'):
        qkv = parts(linear(norm(x, f'{block}.ln_1'), f'{block}.attn.c_attn'), 3)
        heads = zip(*(parts(z, 2) for z in qkv))
        x = x + linear(torch.cat([attended(*head) for head in heads], -1), f'{block}.attn.c_proj')
        a = linear(norm(x, f'{block}.ln_2'), f'{block}.mlp.c_fc')
        a = a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3))) / 2
        x = x + linear(a, f'{block}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ W['transformer.wte.weight'].T


def llama_by_hand(W, idx):
    """The same with four heads of size 8, of which two share a key and a value, turned as complex numbers."""
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * W[name + '.weight']
    angles = torch.arange(len(idx))[:, None] * 1e4 ** (-torch.arange(4, dtype=double) / 4)  # (time, pairs)

    def turned(x):
        return torch.view_as_real(torch.complex(*parts(x, 2)) * torch.exp(1j * angles)).flatten(1)
    x = W['model.embed_tokens.weight'][idx]
    for i in range(2):
        w = {name.split('.')[-2]: value for name, value in W.items() if name.startswith(f'model.layers.{i}.')}
        y = norm(x, f'model.layers.{i}.input_layernorm')
        q, k, v = (parts(y @ w[f'{name}_proj'].T, count) for name, count in (('q', 4), ('k', 2), ('v', 2)))
        heads = [attended(turned(q[h]), turned(k[h // 2]), v[h // 2]) for h in range(4)]
        x = x + torch.cat(heads, -1) @ w['o_proj'].T
        y = norm(x, f'model.layers.{i}.post_attention_layernorm')
        gate = y @ w['gate_proj'].T
        x = x + (gate / (1 + torch.exp(-gate)) * (y @ w['up_proj'].T)) @ w['down_proj'].T
    return norm(x, 'model.norm') @ W['lm_head.weight'].T


@pytest.mark.parametrize('make, by_hand', [(tiny_gpt, gpt_by_hand), (tiny_llama, llama_by_hand)])
def test_a_model_is_what_its_paper_says_and_may_recompute(make, by_hand):
    net, idx = make(), tokens_of(2, 16)
    for i, p in enumerate(net.parameters()):  # far from the start, where attention is almost even
        p.data = p.data + 0.3 * normal(*p.shape, seed=i)
    wanted = torch.stack([by_hand(net.state_dict(), row) for row in idx])
    close(net(idx), wanted, 1e-5)  # LLaMA's angles are float32
    close(net(idx, idx), F.cross_entropy(wanted.flatten(0, 1), idx.flatten()), 1e-5)
    nets, kept = [make(checkpointing=checkpointing) for checkpointing in (False, True)], [0, 0]
    for i, net in enumerate(nets):
        torch.manual_seed(1)
        lowrank.apply_mhlora(net, ('attn', 'mlp'), 2, 2)

        def count(x):
            kept[i] += 1
            return x
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            net(idx, idx)
        backward(net, idx)
    assert kept[1] < kept[0] / 2
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a.grad, b.grad) if a.requires_grad else b.grad is None


@pytest.mark.parametrize('make', [tiny_gpt, tiny_llama])
def test_a_model_starts_at_the_loss_of_guessing_with_the_papers_deviations(make):
    net = make(vocab_size=97, n_embd=64, n_layer=8)
    assert abs(net(tokens_of(4, 16, high=97), tokens_of(4, 16, high=97, seed=2)).item() - math.log(97)) < 0.2
    for name, p in net.named_parameters():
        if p.dim() == 2:  # GPT-2: the residual stream sums 2 L projections
            std = 0.02 / (4 if name.endswith('c_proj.weight') else 1)
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (p == float(not name.endswith('bias'))).all(), name


@pytest.mark.parametrize('tokens, words', [(2100, 40), (1100, 61100)])  # above 2^26 logits in chunks
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_is_the_cross_entropy_of_what_counts(tokens, words, dtype, tolerance):
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
    loss = models.language_loss(heads[1], inputs[1], targets)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=min(tolerance, 1e-3))
    for wanted, got in (inputs, (head.weight for head in heads)):
        assert (got.grad - wanted.grad).norm() < tolerance * wanted.grad.norm()


def test_shapes_have_the_papers_numbers_of_parameters():
    width, depth, many, hidden = models.SIZES['7b']
    with torch.device('meta'):
        llama = models.Llama(models.LlamaConfig(256, 32000, width, depth, many, hidden, many))
        gpt = models.GPT(models.GPTConfig(block_size=512))
    vit = timm.create_model('vit_base_patch16_224', num_classes=9)
    full = lowrank.count_parameters(gpt)['trainable']
    lowrank.apply_mhlora(gpt, ('attn',), heads=4, rank=4)  # of the study
    assert (lowrank.count_parameters(llama)['total'], full) == (6_738_415_616, 124_046_592)
    assert 1 - lowrank.count_parameters(gpt)['trainable'] / full == pytest.approx(0.221, abs=5e-4)
    lowrank.apply_mhlora(vit, ['q', 'v'], heads=1, rank=4)  # of MeLo
    lowrank.freeze_rest(vit, ('logit',))
    counts = lowrank.count_parameters(vit)
    assert (counts['heads'], counts['logit'], counts['trainable']) == (147_456, 769 * 9, 147_456 + 769 * 9)


def test_text_continues_inside_the_block_the_vocabulary_and_the_k_most_likely():
    net, idx = tiny_gpt(), tokens_of(2, 14)
    for p in net.parameters():
        p.data.mul_(5)
    best = models.generate(net, idx, 5, temperature=0)
    for t in range(14, 19):  # the last 16 tokens are what it sees
        assert torch.equal(best[:, t], net(best[:, max(0, t - 16):t])[:, -1].argmax(-1))

    def drawn(**options):
        return models.generate(net, idx, 5, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(drawn(top_k=1), best) and torch.equal(drawn(temperature=1e-6), best)
    few = drawn(vocab_size=7, temperature=9.0)
    assert torch.equal(few[:, :14], idx) and few[:, 14:].max() < 7 and not torch.equal(drawn(), best)


# -----------------------------------------------------------------------------
# low-rank layers


def random_heads(layer):
    """Heads (and what was merged of them) that are not zero."""
    for name in ('A', 'B', 'A_merged', 'B_merged'):
        if hasattr(layer, name):
            getattr(layer, name).data.normal_(std=0.3)
    return layer


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('head_compute', ['parallel', 'sequential'])
@pytest.mark.parametrize('merge_reset', [True, False])
def test_shared_heads_are_the_explicit_sum(head_compute, merge_reset, autocast):
    torch.manual_seed(0)
    heads, rank, alpha = 3, 4, 2.0  # alpha < rank: the scale is a true division
    layer = random_heads(lowrank.MHLoRALinear(nn.Linear(7, 5).double(), heads, rank, alpha, merge_every=3,
                                              merge_reset=merge_reset, head_compute=head_compute))
    mine = [normal(2, 6, 7).requires_grad_(), layer.A, layer.B, layer.bias]
    x, A, B, bias = explicit = [t.detach().clone().requires_grad_() for t in mine]
    change = sum(B[h] @ A[h] for h in range(heads))
    if not merge_reset:
        change = change - sum(layer.B_merged[h] @ layer.A_merged[h] for h in range(heads))
    y = x @ (layer.weight + alpha / rank / heads * change).T + bias
    y.square().sum().backward()
    if autocast:  # passes float64 over
        layer.float()
        mine = [x.detach().float().requires_grad_(), layer.A, layer.B, layer.bias]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        got = layer(mine[0])
    got.double().square().sum().backward()
    for a, b in [(got, y), *((a.grad, b.grad) for a, b in zip(mine, explicit))]:
        assert (a - b).norm() < (2e-2 if autocast else 1e-13) * b.norm()


KEEPS = [dict(split=split, merge_reset=reset) for split in (False, True) for reset in (False, True)]


@pytest.mark.parametrize('make, targets, layers, settings', [
    *((make, 'attn,mlp,logit', layers, settings) for settings in KEEPS
      for make, layers in ((tiny_gpt, 9), (tiny_llama, 15), (tiny_vit, 9))),
    *((tiny_vit, targets, layers, KEEPS[2]) for targets, layers in (('q,v', 4), ('k', 2), ('logit', 1))),
    (tiny_gpt, 'k,c_fc', 4, {}), (tiny_vit, 'qkv', 2, {}),
    (tiny_llama, 'attn', 8, dict(factors='basis', split=True))])
def test_a_merge_keeps_the_function_and_evaluation_changes_no_weight(make, targets, layers, settings):
    net, plain = make(), make()
    x = normal(4, 3, 28, 28) if make is tiny_vit else tokens_of(4, 16)
    names = lowrank.apply_mhlora(net, targets.split(','), 2, 3, 6.0, merge_every=2, **settings)
    assert len(names) == len(lowrank.lowrank_layers(net)) == layers
    close(net(x), plain(x))
    for layer in lowrank.lowrank_layers(net) if 'factors' not in settings else ():
        close(layer.A @ layer.A.mT * 3 / layer.in_features, torch.eye(3, dtype=double).expand(2, 3, 3))
    for step in range(2):  # the second time earlier values are taken off
        for layer in lowrank.lowrank_layers(net):
            if layer.factors == 'basis':
                layer.basis.copy_(torch.linalg.qr(normal(*layer.basis.shape, seed=step))[0])
            for factor in (layer.A, layer.B):
                if factor is not None:
                    factor.data = factor.data * -1.5 + 0.02 * normal(*factor.shape, seed=step)
        state = copy.deepcopy(net.state_dict())
        plain.load_state_dict(lowrank.merged_state_dict(net))
        with lowrank.averaged_heads(net):
            before = net.eval()(x)
        net.train()
        assert same_state(dict(net.state_dict()), dict(state))
        assert not torch.allclose(before, make()(x), atol=1e-5)
        lowrank.merge(net)
        weights = [layer.weight.clone() for layer in lowrank.lowrank_layers(net)]
        with lowrank.averaged_heads(net):
            close(net(x), before)
        if make is not tiny_gpt or 'logit' not in targets:  # an output of its own goes into no tied model
            close(plain(x), before)
        lowrank.merge(net)  # nothing is left to merge
        for layer, weight in zip(lowrank.lowrank_layers(net), weights):
            close(layer.weight, weight, 1e-14)


def test_heads_on_logit_untie_the_output_layer_and_are_called():
    gpt, idx = tiny_gpt(), tokens_of(2, 8)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    full = lowrank.count_parameters(gpt)
    lowrank.apply_mhlora(gpt, ('logit',), heads=4, rank=2)
    counts, head, embedding = lowrank.count_parameters(gpt), gpt.lm_head, gpt.transformer.wte.weight
    assert counts['heads'] == 4 * 2 * (16 + 31) and counts['frozen'] == 16 * 31
    assert counts['trainable'] == full['trainable'] + counts['heads']  # the embedding still trains
    assert embedding.requires_grad and head.weight is not embedding and torch.equal(head.weight, embedding)
    nn.init.normal_(head.B)
    loss = gpt(idx, idx)
    loss.backward()
    assert all(g.abs().amax((1, 2)).gt(0).all() for g in (head.A.grad, head.B.grad))
    close(loss, F.cross_entropy(gpt(idx).flatten(0, 1), idx.flatten()))


def test_with_one_factor_trained_the_other_stays_and_inputs_are_not_kept():
    """LoRA-FA: the gradient of B as with both, and only x A^T is saved for it."""
    gradients = []
    for factors in ('both', 'B'):
        torch.manual_seed(0)
        layer, kept = random_heads(lowrank.MHLoRALinear(nn.Linear(64, 6).double(), 2, 3, factors=factors)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            layer(normal(50, 64)).square().sum().backward()
        gradients.append(layer.B.grad)
        assert ((50, 64) in kept) == layer.A.requires_grad == (factors == 'both')
    assert torch.equal(*gradients)


@pytest.mark.parametrize('merge_reset', [True, False])
def test_split_heads_are_separate_models_on_separate_shards_that_are_merged(merge_reset):
    """Each head beside a model of its own, x -> (W + s (B A - B' A')) x, with AdamW; seven steps, two merges,
    W <- W + (s / H) sum_h (B A - B' A')."""
    torch.manual_seed(0)
    net, heads, s = nn.Sequential(nn.Linear(7, 9, False), nn.Tanh(), nn.Linear(9, 5, False)).double(), 3, 1.5
    lowrank.apply_mhlora(net, ('0', '2'), heads, 2, 3.0, split=True, merge_every=3, merge_reset=merge_reset)
    layers = lowrank.lowrank_layers(net)
    W = [layer.weight.clone() for layer in layers]
    alone = [[[nn.Parameter(f[h].clone()) for f in (layer.A, layer.B)] for layer in layers]
             for h in range(heads)]
    merged = [[0.0, 0.0] for _ in range(heads)]
    factors = [f for layer in layers for f in (layer.A, layer.B)]
    optimizers = [torch.optim.AdamW(params, lr=0.1) for params in (factors, *(sum(own, []) for own in alone))]
    for step in range(7):
        x, target = normal(6, 4, 7, seed=step), normal(6, 4, 5, seed=step + 9)  # two sequences a head
        out = net(x)
        (out - target).square().mean().backward()
        for h, shard in enumerate(zip(x.chunk(heads), target.chunk(heads), out.chunk(heads))):
            first, second = (W[i] + s * (B @ A - merged[h][i]) for i, (A, B) in enumerate(alone[h]))
            y = torch.tanh(shard[0] @ first.T) @ second.T
            close(shard[2], y)
            (y - shard[1]).square().mean().backward()
        for layer, *own in zip(layers, *alone):
            close(layer.A.grad, torch.stack([A.grad for A, _ in own]))
            close(layer.B.grad, torch.stack([B.grad for _, B in own]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 3 == 2:
            with torch.no_grad():
                now = [[B @ A for A, B in own] for own in alone]
                W = [W[i] + s / heads * sum(now[h][i] - merged[h][i] for h in range(heads)) for i in range(2)]
            lowrank.merge(net, torch.Generator().manual_seed(step))
            merged = [[0.0, 0.0] for _ in range(heads)] if merge_reset else now
            for layer, *own in zip(layers, *alone) if merge_reset else ():  # as they are drawn
                for h, (A, B) in enumerate(own):
                    A.data, B.data = layer.A[h].detach().clone(), layer.B[h].detach().clone()
        for layer, weight in zip(layers, W):
            close(layer.weight, weight)


def test_two_hundred_merges_into_bfloat16_round_once_each():
    torch.manual_seed(0)
    layer = lowrank.MHLoRALinear(nn.Linear(64, 64, False).bfloat16(), 2, 4, 4.0, split=True, merge_every=1)
    start, rounded, before = layer.weight.double(), layer.weight.clone(), 0.0
    for _ in range(200):
        for factor in (layer.A, layer.B):
            factor.data += 0.02 * torch.randn_like(factor)
        lowrank.merge(layer)
        now = 0.5 * (layer.B.double() @ layer.A.double()).sum(0)  # s / H = 1 / 2
        rounded, before = (rounded.double() + now - before).bfloat16(), now
    assert (layer.weight == rounded).float().mean() > 0.99  # all but ties between float32 and float64
    drift = (layer.weight.double() - start - now).norm() / layer.weight.double().norm()
    assert drift < 200 ** 0.5 * 2 ** -9  # a random walk of 200 roundings of half a unit in the last place


LAYERS = {'full': None, 'mhlora': dict(heads=2), 'lora_fa': dict(factors='B'),
          'galore': dict(factors='basis', merge_every=1), 'lte': dict(heads=2, split=True, merge_every=2),
          'galolte': dict(factors='basis', heads=2, split=True, merge_every=2)}


@pytest.mark.parametrize('kind', ['mhlora', 'lte', 'galore', 'galolte'])
def test_clipping_uses_the_norm_of_what_is_stepped_on_and_every_split_head_has_its_own(kind):
    net = one_block_llama()
    lowrank.apply_mhlora(net, rank=3, **LAYERS[kind])
    layers = lowrank.lowrank_layers(net)
    for layer in layers if kind in ('mhlora', 'lte') else ():
        random_heads(layer)
    galore.LowRankAdamW(net, basis='random').begin(0)
    loss_of(net, batches_of(1, 4)[0][0]).backward()
    own = [f for layer in layers for f in (layer.A, layer.B) if layer.split and f is not None]
    rest = [p for p in net.parameters() if p.requires_grad and not any(p is f for f in own)]

    def norms():  # of each head, and of all the rest: of a layer in a basis the projected gradient
        groups = [[f.grad[h] for f in own] for h in range(2 * bool(own))] + [[p.grad for p in rest]]
        return [math.sqrt(sum(g.square().sum().item() for g in group if g is not None)) for group in groups]
    before = norms()
    assert min(before) > 0 and lowrank.clip_gradients(net, 0.0).item() == pytest.approx(math.hypot(*before))
    assert norms() == before  # only measured
    limit = sorted(before)[1] if own else before[0] / 2  # clips one of three, leaves one alone
    assert lowrank.clip_gradients(net, limit).item() == pytest.approx(math.hypot(*before))
    assert norms() == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)
    for p in rest:
        p.grad = None
    assert not own or lowrank.clip_gradients(net, 0.0).item() == pytest.approx(math.hypot(*norms()))


# -----------------------------------------------------------------------------
# GaLore: bases and arithmetic, the drop-in

TALL, WIDE, SQUARE = SHAPES = (12, 7), (7, 12), (8, 8)
PROJ_TYPES = ('std', 'reverse_std', 'left', 'right', 'full')
BASES = ('svd', 'power', 'random')
RULES = [dict(proj_type=proj_type, basis=basis, rule=rule) for proj_type, basis, rule in itertools.product(
    ('std', 'reverse_std', 'full'), BASES, ('galore', 'fira')) if (proj_type, rule) != ('full', 'fira')]


def follow(optimizer, params, grads):
    """Steps along given gradients: grads[step][i] for params[i]."""
    for gs in grads:
        for p, g in zip(params, gs):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def galore_run(grads, W=None, lr=0.1, hyper={}, **group):
    """A run of one matrix along `grads`: W at its end, and its state."""
    W = nn.Parameter(torch.ones_like(grads[0]) if W is None else W.clone())
    optimizer = galore.GaLoreAdamW([{'params': [W], **group}], lr=lr, **hyper)
    follow(optimizer, [W], [[g] for g in grads])
    return W.detach(), optimizer.state[W]


def textbook(W, grads, rank, gap, scale, left, right, lr, betas, eps, decay=0.0, fira=False):
    """GaLore's algorithm 2 with galore-torch's arithmetic, and Fira as its authors have it: full matrices,
    loops over columns, or over rows where the right side is projected."""
    M = V = last = None
    for t, G in enumerate(grads):
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = U[:, :rank] if left else torch.eye(len(G), dtype=G.dtype)
            Q = Vh[:rank].T if right else torch.eye(G.shape[1], dtype=G.dtype)
        R = P.T @ G @ Q
        M = (1 - betas[0]) * R + (0 if M is None else betas[0] * M)
        V = (1 - betas[1]) * R ** 2 + (0 if V is None else betas[1] * V)
        N = M / (V.sqrt() + eps)
        move = scale * P @ N @ Q.T
        if fira:
            rest, lines = G - scale * P @ R @ Q.T, int(left)
            for i in range(G.shape[lines]):
                rest.select(lines, i).mul_(N.select(lines, i).norm() / (R.select(lines, i).norm() + 1e-8))
            if last is not None:
                rest = rest / (max(rest.norm() / (last + 1e-8), 1.01) / 1.01)
            last = rest.norm()
            move = move + rest
        W = W - lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1)) * move
        W = W - lr * decay * W
    return W


@pytest.mark.parametrize('bits, steps', [(None, 6), (16, 1), (8, 1)])  # narrow moments are exact at first
def test_without_rank_it_is_torch_adamw(bits, steps):
    dtype = torch.float32 if bits else double
    grads = [[normal(*shape, seed=step, dtype=dtype) for shape in ((64, 64), (7,), (2, 3, 4))]
             for step in range(steps)]
    hyper, ends = dict(lr=0.1, betas=(0.8, 0.95), eps=0.5, weight_decay=0.3), []
    for make, more in ((galore.GaLoreAdamW, dict(state_bits=bits)),
                       (functools.partial(torch.optim.AdamW, fused=True), {}), (torch.optim.AdamW, {})):
        params = [nn.Parameter(torch.ones_like(g)) for g in grads[0]]
        ends.append(follow(make([dict(params=params, **more)], **hyper), params, grads))
    for mine, fused, plain in zip(*ends):
        assert bits or torch.equal(mine, fused)
        close(mine, plain, 1e-6 if bits else 1e-12)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('rule, proj_type', [('galore', kind) for kind in PROJ_TYPES]
                         + [('fira', kind) for kind in PROJ_TYPES if kind != 'full'])
def test_textbook(shape, rule, proj_type):
    left, right = {'std': (shape[0] < shape[1], shape[0] >= shape[1]), 'left': (True, False),
                   'reverse_std': (shape[0] >= shape[1], shape[0] < shape[1]), 'right': (False, True),
                   'full': (True, True)}[proj_type]  # as in galore-torch
    grads = [G * 1.3 ** step for step, G in enumerate(normal(8, *shape))]  # grows, so that Fira limits it
    W, hyper, decay = normal(*shape, seed=9), dict(betas=(0.8, 0.95), eps=1e-2), 0.2 * (rule == 'galore')
    expected = textbook(W, grads, 3, 3, 0.5, left, right, 0.1, **hyper, decay=decay, fira=rule == 'fira')
    got, state = galore_run(grads, W, hyper=dict(weight_decay=decay, **hyper), rank=3, update_proj_gap=3,
                            scale=0.5, proj_type=proj_type, rule=rule)  # refreshes at steps 0, 3, 6
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    (m, n), r = shape, 3
    numbers = (m + n) * r + 2 * r * r if left and right else m * r + 2 * n * r if left else n * r + 2 * m * r
    assert sum(x.numel() for x in state.values() if torch.is_tensor(x) and x.dim()) == numbers
    assert ('P' in state, 'Q' in state) == (left, right)


@pytest.mark.parametrize('shape', SHAPES)
def test_it_is_galore_torch(shape):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            from galore_torch import GaLoreAdamW as Reference
    except Exception as error:  # it drags in transformers and bitsandbytes, which fail in their own ways
        pytest.skip(f'galore-torch cannot be imported here: {error}')
    for proj_type, correct_bias in itertools.product(PROJ_TYPES, (True, False)):
        # at a refresh P^T G Q is diagonal: off it there is rounding alone, which a small eps would blow up
        eps = dict(eps=1e-3) if proj_type == 'full' else {}
        runs = []
        for cls in (Reference, galore.GaLoreAdamW):  # constructed alike, its own defaults included
            W = nn.Parameter(torch.ones(shape))
            group = dict(params=[W], rank=3, update_proj_gap=3, scale=0.25, proj_type=proj_type)
            optimizer = cls([group], lr=0.01, weight_decay=0.1, correct_bias=correct_bias,
                            no_deprecation_warning=True, **eps)
            runs += follow(optimizer, [W], normal(8, 1, *shape, dtype=torch.float32))
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('basis', BASES)
def test_full_rank_and_identity_rho_is_gradient_descent(shape, basis):
    """The study's identity: with r = min(m, n) and rho = 1, P P^T G = G, on both sides P P^T G Q Q^T = G."""
    # a random subspace of the larger side does not hold the gradient
    for proj_type in PROJ_TYPES if basis != 'random' or shape == SQUARE else ['std']:
        W, plain = normal(*shape, seed=3), normal(*shape, seed=3)
        for step, G in enumerate(normal(4, *shape)):
            P, Q = galore.bases_of(G, min(shape), *galore.sides(shape, proj_type), basis, seed=step)
            galore.add_back_(W, galore.project(G, P, Q), P, Q, alpha=-0.1)
            plain -= 0.1 * G
            close(W, plain, 1e-10)


@pytest.mark.parametrize('dtype, tolerance', [(double, 1e-13), (torch.float32, 1e-5),
                                              (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_bases_are_orthonormal_deterministic_and_survive_a_gradient_that_is_not_finite(dtype, tolerance):
    G, before = normal(40, 30).to(dtype), torch.random.get_rng_state()
    eye = torch.eye(8, dtype=double)
    for basis in BASES:
        bases, again, other = (galore.bases_of(G, 8, True, True, basis, seed=seed) for seed in (5, 5, 6))
        assert torch.equal(bases[0], other[0]) == (basis == 'svd') and same_state(bases, again)
        for one in bases:
            assert one.dtype == dtype
            assert one.untyped_storage().nbytes() == one.nbytes, 'a view would keep all of U alive'
            close(one.mT.double() @ one.double(), eye, tolerance)
        for bad in (math.nan, math.inf):
            spoilt = G.clone()
            spoilt[3, 4] = bad
            assert same_state(galore.bases_of(spoilt, 8, True, True, basis, bases), bases)
            for one in galore.bases_of(spoilt, 8, True, True, basis):  # without any
                close(one.mT.double() @ one.double(), eye, tolerance)
    assert torch.equal(before, torch.random.get_rng_state()), 'the global random numbers are not ours'


@pytest.mark.parametrize('m, n', [(30, 50), (50, 30)])
def test_power_converges_to_the_svd_and_does_not_flip(m, n):
    U, V = (torch.linalg.qr(normal(k, 30, seed=k))[0] for k in (m, n))
    G, U, energy = U * 0.5 ** torch.arange(30.) @ V.mT, U[:, :5], 0.98 * (0.25 ** torch.arange(5)).sum()
    P, gaps = galore.bases_of(G, 5, True, False, 'power')[0], []
    for _ in range(12):
        gaps.append(torch.linalg.matrix_norm(U @ U.mT - P @ P.mT, 2).item())
        old, P = P, galore.bases_of(G, 5, True, False, 'power', old=(P, None))[0]
    assert gaps[-1] < 1e-6 and all(b < a for a, b in zip(gaps, gaps[1:]) if a > 1e-7), gaps
    assert ((old * P).sum(0) > 0.99).all()
    for Y in (P, -P):
        close(galore.orthonormal(Y), Y)
    for left, right in ((True, False), (False, True), (True, True)):  # cold, one call
        assert galore.project(G, *galore.bases_of(G, 5, left, right, 'power')).square().sum() >= energy
    small = galore.bases_of((G * 1e-4).half(), 5, True, False, 'power')[0].double()  # squares would vanish
    assert (small.mT @ G).square().sum() >= energy


@pytest.mark.parametrize('left', [True, False])
def test_moments_turn_with_their_basis(left):
    """The first follows any turn. The second does for uncorrelated ones: the mean over all their signs."""
    G, old = normal(7, 9), torch.linalg.qr(normal(7 if left else 9, 4, seed=1))[0]
    new = old @ torch.linalg.qr(normal(4, 4, seed=2))[0]
    before, after = (P.T @ G if left else G @ P for P in (old, new))
    M, V = galore.turn_moments(before, before ** 2, new.T @ old, left)
    close(M, after)
    signs = torch.tensor([*itertools.product((1., -1.), repeat=4)], dtype=double)  # (16, 4)
    each = [new.T @ old @ (sign[:, None] * before) if left else before * sign @ old.T @ new for sign in signs]
    close(V, torch.stack(each).square().mean(0))


def test_layers_take_turns_at_their_refreshes():
    for T in (1, 5, 10):  # at merges, every turn at its own
        due = [[turn for turn in range(5) if galore.refresh_in(step, 50, T, turn, 5) == 0] for step in range(100)]
        assert due[:50] == due[50:] and sorted(sum(due[:50], [])) == list(range(5)) and max(map(len, due)) == 1
        assert not any(turns for step, turns in enumerate(due) if step % T)
    due = [[turn for turn in range(30) if galore.refresh_in(step, 50, 1, turn, 30) == 0] for step in range(100)]
    assert due[:50] == due[50:] and sorted(sum(due[:50], [])) == list(range(30)) and max(map(len, due)) == 1
    for step, turn in itertools.product(range(50), range(30)):
        steps = galore.refresh_in(step, 50, 1, turn, 30)
        assert [turn in due[step + i] for i in range(steps + 1)] == [False] * steps + [True]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('setting', RULES, ids=lambda rule: ' '.join(rule.values()))
def test_the_optimizer_refreshes_on_schedule_and_resumes_bit_for_bit(setting, dtype):
    shapes = (6, 9), (9, 6), (8, 5), (4, 4), (5,), (64, 64)  # the last one's moments are of 8 bits
    grads = [[normal(*shape, seed=step, dtype=dtype) for shape in shapes] for step in range(8)]

    def fresh(weights):
        params = [nn.Parameter(x.clone()) for x in weights]
        groups = [dict(params=params[:3], rank=2, update_proj_gap=3, **setting), dict(params=params[3:5]),
                  dict(params=params[5:], state_bits=8)]
        return params, galore.GaLoreAdamW(groups, lr=0.01, weight_decay=0.1, seed=3)
    params, optimizer = fresh(grads[0])
    straight, seen = [], []
    for gs in grads:
        straight = follow(optimizer, params, [gs])
        state = optimizer.state[params[0]]
        seen.append([state[key].clone() for key in 'PQ' if key in state])
    assert [i for i in range(1, 8) if not same_state(seen[i], seen[i - 1])] == [3, 6]
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
    assert optimizer.state[params[5]]['exp_avg'].dtype == torch.int8


def test_a_rank_is_clamped_and_said_once():
    W = nn.Parameter(torch.zeros(6, 9))
    with pytest.warns(UserWarning, match=r'rank 99 .* h.0.mlp.weight \(6, 9\)'):
        optimizer = galore.GaLoreAdamW([{'params': [W], 'param_names': ['h.0.mlp.weight'], 'rank': 99}])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        follow(optimizer, [W], torch.ones(1, 1, 6, 9))
    assert optimizer.state[W]['P'].shape == (6, 6)
    for basis in BASES:
        with pytest.warns(UserWarning, match=r'parameter 0 \(9, 6\)'):
            _, state = galore_run(normal(1, 9, 6), rank=8, basis=basis, proj_type='left')
        assert state['P'].shape == (9, 6)


@pytest.mark.parametrize('make', [tiny_gpt, tiny_llama, tiny_vit])
def test_param_groups_partition_the_model(make):
    model, groups = make(), []
    next(p for p in model.parameters() if p.dim() == 1).requires_grad_(False)
    kwargs = dict(scale=2.0, basis='power', rule='fira', proj_type='reverse_std', weight_decay=0.1)
    for rank in (0, 2):
        groups = galore.param_groups(model, gap=7, rank=rank, **kwargs)
        place = {name: group for group in groups for name, p in zip(group['param_names'], group['params'])}
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}  # a tied one once
        assert place.keys() == wanted.keys() and sum(len(group['params']) for group in groups) == len(place)
        for name, p in wanted.items():
            matrix = p.dim() > 1 and name not in ('pos_embed', 'cls_token')
            assert place[name]['weight_decay'] == 0.1 * matrix and any(p is q for q in place[name]['params'])
            inside = rank > 0 and matrix and ('attn' in name or 'mlp' in name)
            assert ('rank' in place[name]) == inside, name
            assert not inside or {**kwargs, 'rank': 2, 'update_proj_gap': 7}.items() <= place[name].items()
    torch.optim.AdamW(galore.param_groups(model, 0.1))


def test_a_step_needs_no_value_of_the_device_and_no_other_device():
    """Refreshes included: memory can be planned on fake tensors. On the meta device, as on a GPU, a tensor of
    the CPU's does not go with the others."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    for setting in RULES:
        with FakeTensorMode():
            W, b = nn.Parameter(torch.zeros(6, 9)), nn.Parameter(torch.zeros(6))
            group = {'params': [W], 'rank': 2, 'update_proj_gap': 1, **setting}
            optimizer = galore.GaLoreAdamW([group, {'params': [b]}])
            follow(optimizer, [W, b], [[torch.ones(6, 9), torch.ones(6)]] * 2)
            assert optimizer.state_bytes() > 0
    group = dict(scale=0.5, betas=(0.9, 0.99), correct_bias=True)
    for shape, left in itertools.product(SHAPES, (True, False)):  # all but torch's fused Adam
        G = torch.ones(shape, device='meta')
        P, Q = galore.bases_of(G, 3, left, not left)
        R, C = galore.project(G, P, Q), torch.ones(3, 3, device='meta')
        M, V = galore.turn_moments(R, R.square(), C, left)
        galore.add_back_(G, M, P, Q, 0.1)
        state = dict(step=1, rest_norm=M.norm(), **({'P': P} if left else {'Q': Q}))
        assert galore.fira(G, R, V, state, group).shape == shape
        assert galore.decode(*galore.encode(M.flatten(), 1, 127, 2, torch.int8), 127, 2).device.type == 'meta'
    net = nn.Linear(3, 3, device='meta')
    net.weight.grad = torch.ones(3, 3, device='meta')
    assert lowrank.clip_gradients(net, 1.0).device.type == 'meta'


@pytest.mark.parametrize('key', ['exp_avg', 'exp_avg_sq'])
def test_8_bits_are_off_by_less_than_a_level(key):
    levels, power, dtype = galore.EIGHT_BITS[key]
    x = normal(5003, dtype=torch.float32) ** 3 * 1e-4
    x[700:1200] = 0
    if dtype == torch.uint8:
        x = x.abs()
    size = F.pad(x.abs(), (0, -len(x) % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:len(x)]
    level = (x.abs() / size.clamp_min(1e-30)) ** (1 / power) * levels
    bound = size * ((level.floor() + 1) ** power - level.floor() ** power) / levels ** power
    total = torch.zeros_like(x)
    for age in range(400):
        code, top = galore.encode(x, age, levels, power, dtype)
        y = galore.decode(code, top, levels, power)
        assert ((y - x).abs() <= bound * (1 + 1e-5) + 1e-7 * size).all()
        total += y
    off = (total / 400 - x).abs() / bound.clamp_min(1e-30)
    assert off[x != 0 if dtype == torch.int8 else level >= 1].max() < 0.01  # right on average
    assert code.dtype == dtype and code.numel() == x.numel() and top.shape == (20,)


def test_an_8_bit_second_moment_decays_beside_one_that_does_not():
    state, R, spike = {'step': 0}, normal(64, 64, dtype=torch.float32), torch.zeros(16, 256)
    spike[:, 0] = 3.0  # in every block of 256
    galore.new_moments(state, R, 8)
    for step in range(600):
        state['step'] += 1
        galore.adam_step_(R * (step == 0) + spike.view(64, 64), state, (0.9, 0.999), 1e-8, True)
    V, exact = galore.read_moments(state)[1].view(16, 256)[:, 1:], 0.001 * R.square() * 0.999 ** 599
    exact = exact.view(16, 256)[:, 1:]
    large = exact > 0.01 * exact.max()
    assert (V[large].sum() / exact[large].sum()).item() == pytest.approx(1, abs=0.2)


# -----------------------------------------------------------------------------
# GaLore and GaLoLTE in layers


class Reused(nn.Module):
    """A wide layer that is called twice, and two tall ones that share their weight."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(31, 16), nn.Linear(24, 31, bias=False)
        tied = nn.ModuleList(nn.Linear(12, 24, bias=False) for _ in range(2))
        tied[1].weight = tied[0].weight
        self.h = nn.ModuleList([nn.ModuleDict(dict(attn=nn.Linear(16, 12), mlp=tied))])
        self.double()

    def forward(self, idx, targets):
        x, attn, (first, second) = self.wte(idx), self.h[0]['attn'], self.h[0]['mlp']
        x = torch.tanh(attn(x)) + attn(torch.sin(x))
        logits = self.head(torch.tanh(first(x)) + second(x.square()))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def galore_layers(net, heads=1, merge_every=1):
    """{name: layer} of a model whose matrices of attention and MLP got a basis of rank 3 each."""
    names = lowrank.apply_mhlora(net, ('attn', 'mlp'), heads, 3, factors='basis', split=heads > 1,
                                 merge_every=merge_every)
    return {name: net.get_submodule(name) for name in names}


def batches_of(steps, rows, micro_batches=1):
    return [tokens.chunk(micro_batches) for tokens in tokens_of(steps, rows, 9)]


def loss_of(net, tokens):
    return net(tokens[:, :-1], tokens[:, 1:])


def in_layers(net, batches, optimizer, merge_every=1):
    """The losses of the loop of the scripts."""
    losses = []
    for step, micro_batches in enumerate(batches):
        losses.append(0.0)
        for micro_step, tokens in enumerate(micro_batches):
            optimizer.begin(step, micro_step, len(micro_batches))
            loss = loss_of(net, tokens) / len(micro_batches)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.take_bases()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % merge_every == 0:
            lowrank.merge(net)
    return losses


def textbook_workers(nets, batches, every, merge_every=1, lr=0.05, decay=0.1, scale=0.25, betas=(0.9, 0.999),
                     eps=1e-6):
    """GaLore's algorithm 2 by one worker or several, each an ordinary model on rows of its own. Bases are
    of the mean gradient, moments turn with them. Weights and first moments are averaged every `merge_every`
    steps, the gradients of the others, for AdamW, in each. Returns the losses; nets[0] ends up averaged."""
    inside = [name for name, p in nets[0].named_parameters()
              if p.dim() == 2 and ('attn' in name or 'mlp' in name)]
    rest = [[p for name, p in net.named_parameters() if name not in inside] for net in nets]
    plain = [torch.optim.AdamW([dict(params=[p], weight_decay=decay * (p.dim() == 2)) for p in ps], lr=lr)
             for ps in rest]
    bases, moments, losses = {}, {}, []

    def average(xs):
        return sum(xs) / len(xs)
    for t, micro_batches in enumerate(batches):
        each = [loss_of(net, part) / len(micro_batches) for tokens in micro_batches
                for net, part in zip(nets, tokens.chunk(len(nets)))]
        sum(each).backward()
        losses.append(sum(loss.item() for loss in each) / len(nets))
        for ps in zip(*rest):
            g = average([p.grad for p in ps])
            for p in ps:
                p.grad = g.clone()
        for optimizer in plain:
            optimizer.step()
        for name in inside:
            Ws = [net.get_parameter(name) for net in nets]
            wide = Ws[0].shape[0] < Ws[0].shape[1]
            Gs = [W.grad if wide else W.grad.T for W in Ws]
            old = bases.get(name)
            if t % every == 0:
                bases[name] = torch.linalg.svd(average(Gs))[0][:, :3]
            P, new = bases[name], []
            for W, G, (M, V) in zip(Ws, Gs, moments.get(name, [(0, 0)] * len(nets))):
                R = P.T @ G
                if t % every == 0 and t > 0:
                    M, V = P.T @ old @ M, (P.T @ old) ** 2 @ V
                M, V = betas[0] * M + (1 - betas[0]) * R, betas[1] * V + (1 - betas[1]) * R ** 2
                rate = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
                U = P @ (M / (V.sqrt() + eps))
                W.data = W.data - rate * scale * (U if wide else U.T)
                W.data = W.data - lr * decay * W.data
                new.append((M, V))
            if (t + 1) % merge_every == 0:
                mean = average([W.data for W in Ws])
                for W in Ws:
                    W.data = mean.clone()
                new = [(average([M for M, _ in new]), V) for _, V in new]
            moments[name] = new
        for net in nets:
            net.zero_grad()
    for name in inside:
        nets[0].get_parameter(name).data = average([net.get_parameter(name).data for net in nets])
    return losses


@pytest.mark.parametrize('make, heads, merge_every, accumulation, checkpointing, per_layer', [
    (one_block_llama, 1, 1, 1, False, False), (one_block_llama, 1, 1, 3, True, False),
    (one_block_llama, 1, 1, 3, False, True), (one_block_llama, 1, 1, 1, True, True),
    (Reused, 1, 1, 2, False, False), (Reused, 1, 1, 2, False, True),
    (one_block_llama, 1, 2, 1, False, False), (one_block_llama, 2, 2, 2, True, False),
    (one_block_llama, 3, 4, 1, False, True)])
def test_a_layer_is_galore_and_its_heads_are_workers_that_are_averaged(make, heads, merge_every, accumulation,
                                                                       checkpointing, per_layer):
    """One head merged every step is GaLore, as it is merged less often; several are workers (GaLoLTE)."""
    every, steps = (3, 10) if merge_every == 1 else (4, 13)  # three refreshes; it ends between two merges
    net = make(checkpointing=True) if checkpointing else make()
    nets, data = [make() for _ in range(heads)], batches_of(steps, 2 * heads * accumulation, accumulation)
    layers = galore_layers(net, heads, merge_every)
    optimizer = galore.LowRankAdamW(net, lr=0.05, weight_decay=0.1, basis='svd', basis_every=every,
                                    per_layer=per_layer)
    wanted = textbook_workers(nets, data, every, merge_every)
    assert np.allclose(in_layers(net, data, optimizer, merge_every), wanted, rtol=0, atol=1e-12)
    got = lowrank.merged_state_dict(net)
    assert got.keys() == nets[0].state_dict().keys()
    for name, value in nets[0].state_dict().items():
        close(got[name], value)
    lowrank.check_training(net, optimizer)
    assert all(p.grad is None for p in net.parameters())
    for layer in layers.values():
        assert layer.whole is None
        assert optimizer.state[layer.trained]['exp_avg'].shape == (heads, *layer.trained.shape[1:])
    linear = sum(p.numel() for p in {layer.weight for layer in layers.values()})
    numbers = heads * sum(3 * max(layer.weight.shape) for layer in layers.values())
    plain = sum(p.numel() for p in nets[0].parameters())
    assert lowrank.count_parameters(net)['trainable'] == plain + (merge_every > 1) * (numbers - linear)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('basis', ['svd', 'power'])
def test_a_later_basis_is_that_of_all_micro_batches_and_heads(shape, basis):
    (m, n), heads = shape, 2
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    lowrank.apply_mhlora(net, ('0',), heads, 3, factors='basis', split=True, merge_every=2)
    optimizer, layer = galore.LowRankAdamW(net, lr=0.05, basis=basis, basis_every=2, seed=3), net[0]
    assert layer.left == (m < n)  # of a square matrix on the right, as in GaLore
    for step in range(3):
        old, G = layer.basis.clone(), torch.zeros(heads, m, n, dtype=double)
        for micro_step in range(3):
            optimizer.begin(step, micro_step, 3)
            x, dy = (torch.randn(heads, 5, width, dtype=double) for width in (n, m))
            net(x).backward(dy)
            G += heads * dy.mT @ x  # of a head's own mean loss
        optimizer.take_bases()
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            lowrank.merge(net)
    olds = (old, None) if layer.left else (None, old)
    new = galore.bases_of(G.mean(0), 3, layer.left, not layer.left, basis, olds)[0 if layer.left else 1]
    close(layer.basis @ layer.basis.T, new @ new.T)
    assert (layer.basis * old).sum(0).min() > 0 or basis != 'svd'  # raw signs would flip moments for nothing
    close(layer.trained.grad, layer.basis.T @ G if layer.left else G @ layer.basis)
    dx, = torch.autograd.grad(net(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        dx.sum().backward()


def test_random_bases_are_others_for_each_seed_layer_and_refresh():
    drawn = []
    for seed in (0, 1):
        net = one_block_llama()
        layers = galore_layers(net).values()
        optimizer = galore.LowRankAdamW(net, basis='random', basis_every=2, seed=seed)
        for step in range(4):
            optimizer.begin(step)
            drawn += [layer.basis.sum().item() for layer in layers if step % 2 == 0]
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 7


@pytest.mark.parametrize('heads, merge_every, every, window, per_layer', [
    (1, 1, 16, 5, True), (2, 4, 24, 5, False), (1, 1, 4, 4, False)])
def test_a_sketch_sums_over_sequences_and_gives_the_next_basis(heads, merge_every, every, window, per_layer):
    """Over those of all heads and micro-batches, each of which is a model and a batch of its own here."""
    net, ordinary, sums = one_block_llama(), one_block_llama(), {}
    layers = galore_layers(net, heads, merge_every)
    optimizer = galore.LowRankAdamW(net, lr=0.02, basis_every=every, per_layer=per_layer)
    for step, tokens in enumerate(tokens_of(2 * every + 2, 4 * heads, 9)):
        inside = step % every >= every - window and step >= every - window
        sizes = [heads, 3 * heads]  # sequences of a micro-batch; the loss is the mean of all
        for micro_step, micro_batch in enumerate(tokens.split(sizes)):
            optimizer.begin(step, micro_step, 2)
            assert all((layer.sketch is not None) == inside for layer in layers.values())
            if step % every == 0 and step and micro_step == 0:
                for name, layer in layers.items():
                    close(layer.basis, galore.orthonormal(sums[name]))
            if not inside or step % every == every - window and micro_step == 0:
                sums = dict.fromkeys(layers, 0)
            for h, part in enumerate(micro_batch.chunk(heads) if inside else ()):
                state = {key: net.state_dict()[key] for key in ordinary.state_dict()}
                for name, layer in layers.items():
                    U, basis = layer.trained[h].detach(), layer.basis
                    state[f'{name}.weight'] = layer.weight + (basis @ U if layer.left else U @ basis.T)
                ordinary.load_state_dict(state)
                for sequence in part:
                    ordinary.zero_grad()
                    (loss_of(ordinary, sequence[None]) / len(tokens)).backward()
                    for name, layer in layers.items():
                        G = ordinary.get_submodule(name).weight.grad
                        G = G if layer.left else G.T
                        sums[name] = sums[name] + G @ (G.T @ layer.basis) / (G.T @ layer.basis).norm()
            (loss_of(net, micro_batch) * len(micro_batch) / len(tokens)).backward()
            for name, layer in layers.items():
                assert layer.whole is None
                if inside:
                    close(layer.sketch.grad, sums[name])
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % merge_every == 0:
            lowrank.merge(net)


@pytest.mark.parametrize('time', [2, 7])  # shorter and longer than the rank, 3: two orders of the products
@pytest.mark.parametrize('dtype', [double, torch.float16])
def test_the_second_moment_in_either_order_of_products(time, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(5, time, 8), torch.randn(5, time, 6)
    a[1], b[2] = 0, 0  # sequences that count for nothing
    P = torch.linalg.qr(torch.randn(8, 3).double())[0]
    wanted = 0
    for x, y in zip(a.double(), b.double()):
        R = (x.T @ y).T @ P
        wanted = wanted + x.T @ y @ R / R.norm().clamp_min(1e-9)
    size = 1 if dtype == double else 1e-4  # squares of which float16 does not know
    a, b = a.to(dtype).flatten(0, 1), (b * size).to(dtype).flatten(0, 1)
    Y = lowrank.second_moment(a, b, (a.double() @ P).to(dtype), 5).double() / size
    assert (Y - wanted).norm() / wanted.norm() < (1e-6 if dtype == double else 2e-2)


def test_a_layer_whose_factor_is_frozen_stays_as_it_is():
    net = one_block_llama()
    first, second, *_ = galore_layers(net).values()
    before = [layer.weight.clone() for layer in (first, second)]
    first.trained.requires_grad_(False)
    optimizer = galore.LowRankAdamW(net, basis_every=3)
    in_layers(net, batches_of(4, 2), optimizer)
    lowrank.check_training(net, optimizer)
    assert torch.equal(first.weight, before[0]) and not torch.equal(second.weight, before[1])


def bytes_held(net):
    """Of the distinct memory behind parameters and buffers."""
    storages = [x.untyped_storage() for x in (*net.parameters(), *net.buffers())]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def test_what_is_always_zero_takes_no_memory_whatever_torch_does():
    net = one_block_llama(n_layer=2).float()
    plain, names = bytes_held(net), net.state_dict().keys()
    layers = galore_layers(net)
    held, state, batch = bytes_held(net), net.state_dict(), batches_of(1, 2)[0][0]
    bases = sum(layer.basis.nbytes for layer in layers.values())
    assert held == plain + bases + 4 * 3 * 24  # and one buffer, as large as the largest factor
    assert set(state) == {*names, *(f'{name}.basis' for name in layers)}

    def loaded(assign):
        other = copy.deepcopy(net)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        return other
    for other, size in ((net.to(torch.float32), held), (copy.deepcopy(net), held), (loaded(False), held),
                        (loaded(True), held), (copy.deepcopy(net).to('meta').to_empty(device='cpu'), held),
                        (copy.deepcopy(net).to(torch.bfloat16), held // 2)):
        leaves = [layer.trained for layer in lowrank.lowrank_layers(other)]
        assert bytes_held(other) == size and not any(leaf.any() for leaf in leaves)
        assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == 1
        galore.LowRankAdamW(other).begin(0)  # the layers still have their leaves
        if other.lm_head.weight.isfinite().all():
            loss_of(other, batch).backward()
            assert all(leaf.grad.any() for leaf in leaves)
    with pytest.raises(RuntimeError, match='Unexpected key.*proj.B'):
        net.load_state_dict({**state, 'model.layers.0.mlp.gate_proj.B': torch.zeros(1, 24, 3)})
    with pytest.raises(ValueError, match='LowRankAdamW'):
        galore.param_groups(net)
    net.zero_grad()
    foreign = torch.optim.AdamW(net.parameters(), fused=True)
    galore.LowRankAdamW(net).begin(0)
    lowrank.check_training(net, foreign)
    loss_of(net, batch).backward()
    foreign.step()
    with pytest.raises(ValueError, match='always zero'):
        lowrank.check_training(net, foreign)


@pytest.mark.parametrize('bits', [None, 32, 16, 8])
@pytest.mark.parametrize('kind', ['full', 'mhlora', 'galolte', 'galore'])
def test_moments_are_as_wide_as_asked_for(kind, bits):
    net = one_block_llama(n_embd=64, n_mlp=128).bfloat16()
    if kind != 'full':
        lowrank.apply_mhlora(net, rank=32, **LAYERS[kind])
    optimizer = galore.LowRankAdamW(net, state_bits=bits)
    in_layers(net, batches_of(1, 2), optimizer)
    wide, seen = {None: torch.bfloat16, 16: torch.bfloat16}.get(bits, torch.float32), set()
    for p, state in optimizer.state.items():
        codes = bits == 8 and p.numel() >= 4096
        seen.add(codes)
        assert state['exp_avg'].dtype == (torch.int8 if codes else wide) and type(state['step']) is int
        assert state['exp_avg_sq'].dtype == (torch.uint8 if codes else wide)
        assert ('exp_avg_top' in state) == codes
    assert len(optimizer.state) == sum(p.requires_grad for p in net.parameters())
    assert seen == {False, bits == 8}
    held = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    held += [x for name, x in net.named_buffers() if name.endswith('.basis')]  # no sketch in step 0
    assert optimizer.state_bytes() == sum(x.nbytes for x in held)


@pytest.fixture
def backend():
    """What torch.compile compiles with: in SLOW runs the real one."""
    torch._dynamo.reset()
    if not hasattr(torch.compiler, 'set_default_backend'):  # an older torch: the real one, always
        yield
        return
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend('inductor' if os.environ.get('SLOW') else 'aot_eager')
    yield
    torch.compiler.set_default_backend(before)


@pytest.mark.parametrize('kind', [kind for kind in LAYERS if kind != 'full'])
def test_ten_compiled_blocks_share_two_graphs(kind):
    """Torch gives up after eight graphs of one function, silently but for the time."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    nets, losses = [one_block_llama(n_layer=10) for _ in range(2)], []
    counter, settings = CompileCounterWithBackend('aot_eager'), LAYERS[kind]
    for net in nets:
        torch.manual_seed(0)
        lowrank.apply_mhlora(net, ('mlp',), rank=3, **settings)
    for block in nets[1].model.layers:
        block.compile(fullgraph=True, backend=counter)
    steps = 14 if settings.get('factors') == 'basis' else 4  # with and without sketches, or two merges
    for net in nets:
        losses.append(in_layers(net, batches_of(steps, 2), galore.LowRankAdamW(net, basis_every=12),
                                settings.get('merge_every', 99)))
    assert np.allclose(*losses, rtol=0, atol=1e-10) and 1 <= counter.frame_count <= 2


def linears(**modules):
    return nn.ModuleDict({'attn': nn.Linear(8, 16), **modules})


def put(net, targets=('attn',), **settings):
    lowrank.apply_mhlora(net, targets, **settings)
    return net


def encoder_layer(kind=nn.TransformerEncoderLayer):
    return kind(8, 2, 16, batch_first=True)


def shared_weight_but_not_bias():
    net = linears(mlp=nn.Linear(8, 16))
    net['mlp'].weight = net['attn'].weight
    return net


def split_heads(rows):
    return put(linears(), heads=2, split=True, merge_every=2)['attn'].train(rows != 2)(torch.ones(rows, 8))


def in_basis(heads=1, merge_every=1, **settings):
    net = put(linears(), heads=heads, rank=2, factors='basis', split=heads > 1, merge_every=merge_every)
    optimizer = galore.LowRankAdamW(net, **settings)
    net['attn'](torch.ones(2, 8)).sum().backward()
    optimizer.step()


def dropin(**group):
    return galore.GaLoreAdamW([{'params': [nn.Parameter(torch.zeros(6, 9))], 'rank': 2, **group}])


@pytest.mark.parametrize('call, message', [
    (lambda: put(tiny_gpt(), ('q_proj',)), 'c_attn, c_fc, c_proj, lm_head'),
    (lambda: put(tiny_gpt(), rank=17), 'between 1 and 16'),
    (lambda: put(tiny_vit(), ['attn', 'q']), "'attn,q' puts heads on blocks.0.attn.qkv"),
    (lambda: put(tiny_vit(), ['v', 'qkv']), 'leave one'), (lambda: put(tiny_vit(), ['q_proj']), 'qkv'),
    (lambda: put(linears(), 'attn'), "targets='attn' is a string"),
    (lambda: put(linears(attn=encoder_layer()), ('linear1',)), 'TransformerEncoderLayer'),
    (lambda: put(nn.TransformerEncoder(encoder_layer(), 2)), 'TransformerEncoderLayer'),
    (lambda: put(linears(attn=encoder_layer(type('Sub', (nn.TransformerEncoderLayer,), {})))), 'Sub'),
    (lambda: put(linears(attn=timm.models.beit.Attention(16, 2))), r"'attn' \(Attention\) reads"),
    (lambda: put(linears(attn=timm.models.eva.EvaAttention(16, 2, scale_norm=False)), ('q', 'v')),
     r"'attn' \(EvaAttention\) reads"),
    (lambda: put(shared_weight_but_not_bias(), ('attn', 'mlp')), 'but not its bias'),
    (lambda: put(linears(), factors='A'), "factors='A' is not known"),
    (lambda: put(linears(), head_compute='vector'), "head_compute='vector' is not known"),
    (lambda: put(linears(), factors='basis', merge_every=1, head_compute='sequential'), "'parallel'"),
    (lambda: put(linears(), rank=0), 'rank=0'), (lambda: put(linears(), factors='basis'), 'merge_every=1'),
    (lambda: put(linears(), heads=2, factors='basis', merge_every=4), 'split=True'),
    (lambda: put(linears(), heads=3, split=True, merge_every=4, workers=2), 'over 2 ranks'),
    (lambda: split_heads(2), 'averaged_heads'), (lambda: split_heads(3), 'does not split over 2 heads'),
    (lambda: lowrank.check_training(linears(), torch.optim.SGD([nn.Parameter(torch.ones(1))])),
     'attn.weight and 1 more'),
    (lambda: in_basis(basis='qr'), "basis='qr'"), (lambda: in_basis(state_bits=4), 'state_bits=4'),
    (lambda: in_basis(2, 4, basis_every=6), 'no multiple of merge_every=4'), (in_basis, 'begin'),
    *((lambda group=group: dropin(**group), said) for group, said in (
        (dict(rank=0), 'rank=0'), (dict(update_proj_gap=0), 'update_proj_gap=0'),
        (dict(rule='adam'), "rule='adam'"), (dict(proj_type='both'), "proj_type='both'"),
        (dict(basis='qr'), "basis='qr'"),
        (dict(params=[nn.Parameter(torch.zeros(6))]), 'is no matrix'), (dict(state_bits=4), 'state_bits=4'),
        (dict(rule='fira', proj_type='full'), 'one-sided'))),
    (lambda: galore.param_groups(nn.Linear(3, 3), rank=4), 'rank=4')])
def test_what_would_go_wrong_in_silence_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert '\n' not in str(refusal.value)


def test_what_is_replaced_passed_over_or_clamped_is_named(capsys):
    blocks = [f'transformer.h.{i}' for i in range(2)]
    assert lowrank.apply_mhlora(tiny_gpt(), ('c_fc',)) == [f'{block}.mlp.c_fc' for block in blocks]
    thirds = [f'{block}.attn.c_attn.{part}' for block in blocks for part in 'qv']
    assert lowrank.apply_mhlora(tiny_gpt(), ['q', 'v'], rank=2) == thirds
    capsys.readouterr()
    other = type('Sub', (nn.Linear,), {})(8, 8)
    put(linears(mlp=nn.Sequential(nn.Linear(16, 8), other)), ('attn', 'mlp'), rank=12, factors='basis',
        merge_every=1)
    said = capsys.readouterr().out
    assert '2 of 2 linear layers' in said and 'subclasses of nn.Linear: mlp.1' in said
    assert "rank 12 is clamped to the smaller side of 2, such as ['attn']" in said


# -----------------------------------------------------------------------------
# images


def auc_by_hand(positive, score):
    """The share of pairs in which the positive one scores higher than the negative; equal ones count half."""
    higher = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    return sum(higher) / len(higher)


def test_metrics_agree_with_a_hand_computation():
    logits = normal(30, 3, seed=1).round(decimals=1)
    y, p = torch.arange(30) % 3, logits.exp() / logits.exp().sum(1, keepdim=True)
    right = logits.argmax(1) == y
    for task in ('multi-class', 'ordinal-regression'):
        accuracy, auc, by_class, matrix = train_vit.measure(logits, y, task)
        assert accuracy == pytest.approx(right.double().mean().item())
        assert by_class == pytest.approx([right[c::3].double().mean().item() for c in range(3)])
        assert auc == pytest.approx(sum(auc_by_hand(y == c, p[:, c]) for c in range(3)) / 3)
        for true, said in itertools.product(range(3), range(3)):
            assert matrix[true, said] == (logits[true::3].argmax(1) == said).sum()
    accuracy, auc, _, matrix = train_vit.measure(logits[:, :2], y % 2, 'binary-class')
    assert auc == pytest.approx(auc_by_hand(y % 2 == 1, (logits[:, 1] - logits[:, 0]).sigmoid()))
    assert accuracy == pytest.approx(matrix.diagonal().sum() / 30)
    several = torch.stack([y == 0, y < 2, torch.arange(30) < 9], 1).float()
    accuracy, auc, by_class, matrix = train_vit.measure(logits, several, 'multi-label, binary-class')
    assert by_class == pytest.approx(((logits > 0) == (several > 0)).double().mean(0).tolist())
    assert accuracy == pytest.approx(sum(by_class) / 3) and matrix is None
    assert auc == pytest.approx(sum(auc_by_hand(several[:, c] > 0, logits[:, c]) for c in range(3)) / 3)
    p = logits.sigmoid()
    by_hand = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    assert train_vit.criterion(logits, several).item() == pytest.approx(by_hand.item())


def test_augmentation_is_a_function_of_key_and_row_and_images_are_normalised_as_timm_has_it():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)

    def augmented(kind, key, rows=slice(None)):
        return train_vit.augmented(images[rows], kind, key, 8, np.arange(8)[rows])
    both, flipped = augmented('flip,crop', (1, 2, 0)), augmented('flip', (0,))
    assert torch.equal(both, augmented('flip,crop', (1, 2, 0)))
    assert torch.equal(both[1::2], augmented('flip,crop', (1, 2, 0), slice(1, None, 2)))
    assert not torch.equal(both, augmented('flip,crop', (1, 3, 0)))
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, images)]
    assert 0 < sum(turned) < 8 and all(t or torch.equal(a, b) for t, a, b in zip(turned, flipped, images))
    wide = F.pad(images.float(), (2, 2, 2, 2), mode='replicate').byte()
    for a, b in zip(augmented('crop', (0,)), wide):
        assert any(torch.equal(a, b[:, i:i + 16, j:j + 16]) for i in range(5) for j in range(5))
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    x = train_vit.normalised(grey, 28, mean, std, torch.float32)
    close(x * std + mean, (grey / 255).expand(2, 3, 28, 28), 1e-6)
    from torchvision.transforms.functional import InterpolationMode, resize
    theirs = resize(grey, [56, 56], InterpolationMode.BICUBIC, antialias=True)
    ours = train_vit.normalised(grey, 56, 0, 1, torch.float32) * 255
    assert (ours[:, :1] - theirs).abs().max() < 1


def test_epochs_are_passes_over_the_images_and_images_may_have_several_labels(root, tmp_path):
    words = [word for word in tiny('vit', root, tmp_path / 'a') if not word.startswith('--max_iters')]
    start(train_vit, [*words, '--epochs=3', '--batch_size=7', '--eval_interval=9', '--learning_rate=0.01'])
    assert saved(tmp_path / 'a')['step'] == 28 and records(tmp_path / 'a')[-1]['test_auc'] > 0.95
    archive(tmp_path, 'chestmnist', counts=dict(train=20, val=30, test=30))
    prepare_images(tmp_path, 'chestmnist')
    train('vit', tmp_path, tmp_path / 'b', '--dataset=chestmnist')
    last = records(tmp_path / 'b')[-1]
    assert len(last['test_acc_by_class']) == 14 and not (tmp_path / 'b' / 'confusion.png').exists()
    assert last['test_acc'] == pytest.approx(np.mean(last['test_acc_by_class']))


def test_weights_of_timm_and_checkpoints_of_ours_are_gone_on_from(root, tmp_path, capsys):
    def see(out, weights, *words):
        words = tiny('vit', root, tmp_path / out, f'--init_from={weights}', '--max_iters=2', *words)
        start(train_vit, [*words, '--eval_interval=2'])
        return records(tmp_path / out)
    torch.manual_seed(3)
    shape = dict(img_size=28, patch_size=14, depth=2, num_heads=2, embed_dim=16)
    theirs, path = timm.create_model('vit_tiny_patch16_224', num_classes=9, **shape), f'{tmp_path}/theirs'
    safetensors.torch.save_file(theirs.state_dict(), f'{path}.safetensors')
    torch.save(theirs.state_dict(), f'{path}.pt')
    asked = ['--dataset=pathmnist', '--eval_only=True']
    log = see('a', f'{path}.safetensors', *asked)
    x, y = prepare.Images('pathmnist', 'val', root).fixed_batch(0, 30)
    loss = F.cross_entropy(theirs.double()((x.double() / 255 - 0.5) / 0.5), y).item()
    assert log[0]['val_loss'] == pytest.approx(loss, abs=1e-6) and 'test_acc' in log[1]
    assert see('b', f'{path}.pt', *asked) == log
    see('c', f'{path}.pt', '--dataset=pathmnist', '--img_size=42')  # the embedding of places resized
    # ours: split heads that merge, then full fine-tuning from what they made of it, with another classifier
    lte = see('lte', 'scratch', '--lowrank=attn', '--heads=2', '--rank=2', '--split=True', '--merge_every=2')
    best = f'{tmp_path}/lte/best.pt'
    again = see('d', best, '--eval_only=True', '--n_layer=None')
    assert again[0]['val_loss'] == pytest.approx(lte[2]['val_loss'], abs=1e-6) and lte[2]['step'] == 2
    see('e', best, '--dataset=digits', '--n_layer=None')
    other = saved(tmp_path / 'e')
    assert other['model']['head.weight'].shape == (10, 16) and other['model_config']['n_layer'] == 2
    refused(capsys, lambda: see('f', best, '--dataset=digits', '--eval_only=True'), '2 classes',
            "10 of data set 'digits'")
    refused(capsys, lambda: see('f', f'{path}.pt', '--n_layer=3'), 'theirs.pt', 'n_layer')
    refused(capsys, lambda: see('f', best, '--n_head=4'), 'n_head=2', '4')


def test_an_adapter_alone_is_saved_loaded_and_refused_by_another_base(root, runs, tmp_path, capsys):
    base, other = (f'{runs(name, 4)}/best.pt' for name in ('vit_full', 'vit_fira'))
    words = [f'--init_from={base}', '--lowrank=q,v,logit', '--rank=2', '--alpha=4', '--learning_rate=0.1']
    state, log = train('vit', root, tmp_path / 'a', *words), records(tmp_path / 'a')
    assert state['settings']['train'] == 'classifier'  # 'auto', on loaded weights
    path = tmp_path / 'a' / 'adapter.safetensors'
    assert path.stat().st_size < (tmp_path / 'a' / 'best.pt').stat().st_size / 2
    again = [*words, f'--adapter={path}', '--eval_only=True']
    start(train_vit, tiny('vit', root, tmp_path / 'b', *again))
    loaded = records(tmp_path / 'b')
    assert loaded[-1] == {**log[-1], 'step': 0} and loaded[0]['val_auc'] == state['best_val_auc']
    with safetensors.safe_open(path, 'pt') as file:
        parts = {name: file.get_tensor(name) for name in sorted(file.keys())[1:]}
        safetensors.torch.save_file(parts, tmp_path / 'part.safetensors', file.metadata())
    for more, needle in ((f'--init_from={other}', 'base='), ('--alpha=6', 'alpha=4.0, not 6.0'),
                         ('--lowrank=q,k', 'lowrank='), (f'--adapter={base}', 'best.pt'),
                         (f'--adapter={tmp_path}/part.safetensors', 'lacks')):
        refused(capsys, lambda: train('vit', root, tmp_path / 'c', *again, more), needle)
    train('vit', root, tmp_path / 'all', *words, '--train=all')
    assert not (tmp_path / 'all' / 'adapter.safetensors').exists()  # the rest trained too


# -----------------------------------------------------------------------------
# the scripts: every method, on one process and on several

RUNS = {f'{script}_{name}': name for script in SCRIPTS for name in METHODS}
BARE = '--gradient_accumulation_steps=1 --grad_clip=0.0 --weight_decay=0.0'  # see by_hand
REPLICAS = {name: words for name, words in RUNS.items() if words not in ALONE} | {
    'gpt_local': f'local_adamw {BARE}', 'gpt_replicas': f'lte --sync=merge {BARE}'}
MORE = {  # methods with other settings
    'gpt_reset': 'lte --merge_reset=True', 'gpt_power': 'galolte --basis=power --state_bits=32',
    'gpt_logit': 'mhlora --lowrank=attn,logit', 'gpt_relogit': 'relora --lowrank=attn,logit',
    'llama_power': 'galore --basis=power', 'llama_lean': 'galore_lean --rank=64 --n_embd=64 --n_mlp=96',
    'vit_melo': 'lora --lowrank=q,v --train=classifier'}
ONE_PROCESS = {
    'gpt_dropout': 'full --dropout=0.1', 'gpt_autocast': 'mhlora --param_dtype=float32 --dtype=bfloat16',
    'gpt_float16': 'lte --param_dtype=float32 --dtype=float16 --lowrank=attn,logit',
    'llama_bfloat16': 'fira --basis=svd --param_dtype=bfloat16 --dtype=bfloat16',
    'llama_leaner': f"{MORE['llama_lean']} --param_dtype=bfloat16 --dtype=bfloat16 --checkpointing=True",
    'llama_checkpointing': 'galore --basis=svd --checkpointing=True',
    'llama_16': 'galore --basis=random --state_bits=16',
    'llama_dropin': 'full --optimizer=galore --basis=svd --rank=3 --basis_every=3 '
                    '--per_layer=True --grad_clip=0',
    'vit_autocast': 'lora --param_dtype=float32 --dtype=bfloat16', 'vit_8': 'galore --state_bits=8',
    'vit_checkpointing': 'galolte --basis=sketch --checkpointing=True',
    'vit_probe': 'full --param_dtype=float32 --dtype=float16 --train=classifier'}
RUNS |= MORE | REPLICAS | ONE_PROCESS
SEVERAL = [name for name in RUNS if name not in ONE_PROCESS]  # on two ranks, too
FOUR = ['gpt_lte', 'gpt_reset', 'gpt_galolte']  # and on four
RESUMED = [*REPLICAS, *FOUR, 'gpt_power']  # where two stop and go on, too


def run(name, root, out, *words):
    """The checkpoint that a run of RUNS ends with."""
    script, (which, *own) = name.split('_')[0], RUNS[name].split()
    own = ['--augment=flip,crop'] * (script == 'vit') + ['--gradient_accumulation_steps=2'] + own
    return train(script, root, out, *method(which), *own, *words)


@pytest.fixture(scope='session')
def runs(root, tmp_path_factory):
    """A function: the folder of a run of one process after so many steps. Each is trained once."""
    folder = tmp_path_factory.mktemp('runs')

    @functools.cache
    def trained(name, steps):
        run(name, root, folder / f'{name}_{steps}', f'--max_iters={steps}')
        return folder / f'{name}_{steps}'
    return trained


def go_on(name, root, begun, out, steps):
    """The checkpoint of a run that goes on from the folder `begun`, and leaves it as it is."""
    shutil.copytree(begun, out)
    return run(name, root, out, '--init_from=resume', f'--max_iters={steps}')


def same_run(a, b):
    return same_state({**a, 'settings': 0}, {**b, 'settings': 0})


def logits_by_hand(model, x):
    if x.dim() == 4:  # images in [0, 255], as timm normalises them for this model
        return model((x.double() / 255 - 0.5).expand(-1, 3, -1, -1) / 0.5)
    return model(x).flatten(0, 1)


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_steps_and_evaluates_as_it_is_written_down_here(root, tmp_path, script):
    """The gradient of the mean over micro-batches, clipped as one; AdamW, with decay on matrices alone."""
    words = ('--gradient_accumulation_steps=3 --grad_clip=0.1 --weight_decay=0.3 --beta1=0.8 --beta2=0.9 '
             '--max_iters=6 --learning_rate=0.01 --min_lr=0.004' + ' --augment=flip,crop' * (script == 'vit'))
    run, data = built(script, root, tmp_path, *words.split())
    plain, module = copy.deepcopy(run.model), SCRIPTS[script]
    for key, value in vars(run.model.config).items() if script != 'vit' else ():
        assert run.settings.get(key) in (None, value), key
    M, V = ({name: 0.0 for name, _ in plain.named_parameters()} for _ in range(2))
    for step, rate in enumerate((0.01 / 3, 0.02 / 3, 0.01, 0.004 + 0.003 * (1 + math.cos(math.pi / 4)))):
        assert config.set_learning_rate(run.optimizer, run.settings, step) == pytest.approx(rate)
        batches = [data.batch(8, step, i, 3, seed=1) for i in range(3)]
        got_loss, got_norm = module.train_step(run, step, batches.__getitem__)
        if script == 'vit':
            batches = [(train_vit.augmented(x, 'flip,crop', (1337, step, i), 8, np.arange(8)), y)
                       for i, (x, y) in enumerate(batches)]
        x, y = (torch.cat(parts) for parts in zip(*batches))
        loss = F.cross_entropy(logits_by_hand(plain, x), y.flatten())
        gradients = torch.autograd.grad(loss, [*plain.parameters()])
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert norm > 0.1 and (got_loss.item(), got_norm.item()) == pytest.approx((loss.item(), norm))
        for (name, p), g in zip(plain.named_parameters(), gradients):
            g = g * 0.1 / norm
            M[name], V[name] = 0.8 * M[name] + 0.2 * g, 0.9 * V[name] + 0.1 * g ** 2
            if p.dim() > 1 and name not in ('pos_embed', 'cls_token'):
                p.data = p.data * (1 - rate * 0.3)
            root_of_V = (V[name] / (1 - 0.9 ** (step + 1))).sqrt()
            p.data = p.data - rate * M[name] / (1 - 0.8 ** (step + 1)) / (root_of_V + 1e-8)
        for mine, p in zip(run.model.parameters(), plain.parameters()):
            close(mine, p, 1e-5 * rate)  # clipping adds 1e-6 to the norm
    if script == 'vit':
        val = prepare.Images('xrays', 'val', root)
        x, y = val.fixed_batch(0, 12)  # the last batch of eight is short
        record, matrix = module.evaluate(run, val, data.classes, 'val')
        right = logits_by_hand(plain, x).argmax(1) == y
        assert record['val_acc'] == right.double().mean() and matrix.sum() == 12
        got = record['val_loss']
    else:
        val = prepare.Tokens('tiny', 'val', 16, root)
        x, y = map(torch.cat, zip(*(val.fixed_batch(i, 2, 8) for i in range(2))))
        got = module.evaluate(run, val)
    wanted = F.cross_entropy(logits_by_hand(plain, x), y.flatten()).item()
    assert got == pytest.approx(wanted, abs=1e-6) and run.model.training


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_merges_every_T_steps_and_each_reset_is_a_new_draw_without_moments(root, tmp_path, script):
    run, data = built(script, root, tmp_path, *method('relora', '--merge_every=2', '--rewarm_iters=1'))
    layers, drawn, merged = lowrank.lowrank_layers(run.model), [], []
    for step, share in enumerate((1 / 3, 2 / 3, 1 / 2, 1)):  # warm-up, then again after a merge
        rate = config.set_learning_rate(run.optimizer, run.settings, step)
        assert rate == pytest.approx(share * run.settings['learning_rate'])
        before = [layer.weight.clone() for layer in layers]
        SCRIPTS[script].train_step(run, step, lambda _: data.batch(8, step))
        merged.append({torch.equal(layer.weight, W) for layer, W in zip(layers, before)} == {False})
        for layer in layers:
            assert merged[-1] != ({layer.A, layer.B} <= run.optimizer.state.keys())
            assert merged[-1] != layer.B.any() and (layer.bias is None or layer.bias in run.optimizer.state)
            if merged[-1]:
                close(layer.A[0] @ layer.A[0].T * 3 / layer.in_features, torch.eye(3, dtype=double))
                drawn.append(layer.A.sum().item())
    assert merged == [False, True, False, True] and len(set(drawn)) == 2 * len(layers)


@pytest.mark.parametrize('name', ['galore', 'fira'])
def test_settings_reach_the_optimizer(root, tmp_path, name):
    words = ('--scale=0.5 --weight_decay=0.2 --beta1=0.7 --beta2=0.8 --state_bits=16 --basis=power --basis_every=9 '
             '--per_layer=True --grad_clip=0 --seed=5')
    optimizer = built('gpt', root, tmp_path, *method(name, *words.split()))[0].optimizer
    inside, = (group for group in optimizer.param_groups if 'scale' in group)
    assert (inside['scale'], inside['weight_decay'], optimizer.seed, optimizer.per_layer) == (0.5, 0.2, 5, True)
    assert {(group['state_bits'], group['betas']) for group in optimizer.param_groups} == {(16, (0.7, 0.8))}
    basis = (optimizer.basis, optimizer.basis_every) if name == 'galore' else \
        (inside['basis'], inside['update_proj_gap'])
    assert basis == ('power', 9) and (name == 'galore' or inside['rank'] == 3)


@pytest.mark.parametrize('name', ['galore', 'fira'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_micro_batches_and_steps_during_the_backward_pass_change_nothing(root, tmp_path, script, name):
    ends = []
    for size, count, per_layer in ((16, 1, False), (8, 2, False), (8, 2, True)):
        words = (f'--batch_size={size} --gradient_accumulation_steps={count} --per_layer={per_layer} '
                 '--grad_clip=0')
        out = tmp_path / f'{len(ends)}'
        state = train(script, root, out, *method(name), '--max_iters=7', *words.split())
        ends.append((state['model'], logged(out, 'train_loss')))
    for model, losses in ends[1:]:
        assert losses == pytest.approx(ends[0][1], abs=2e-6)  # added up in float32
        for key, value in model.items():
            close(value, ends[0][0][key], 1e-8)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_scale_of_float16_goes_on_and_is_taken_off(root, tmp_path, script):
    words = '--param_dtype=float32', '--dtype=float16'
    run, data = built(script, root, tmp_path, *words)
    assert run.scaler.get_scale() == 65536
    config.save(run, 'ckpt.pt', dict(step=0, classes=getattr(data, 'classes', None)), resumable=True)
    checkpoint = saved(tmp_path)
    checkpoint['scaler']['scale'] = 8.0
    again, _ = built(script, root, tmp_path, *words, '--init_from=resume', checkpoint=checkpoint)
    assert again.scaler.get_scale() == 8.0
    plain, _ = built(script, root, tmp_path, words[0], '--dtype=float32')
    norms = [SCRIPTS[script].train_step(one, 0, lambda _: data.batch(8, 0))[1].item()
             for one in (again, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] != norms[1]  # unscaled, and rounded


@pytest.mark.parametrize('name, stop', [
    *((name, 4) for name in RUNS if name not in REPLICAS),  # inside a period of merges, and of a sketch
    ('gpt_power', 3), ('llama_power', 3), ('gpt_galolte', 6), ('llama_galore', 6)])  # where bases are due
def test_a_run_resumes_bit_for_bit(root, runs, tmp_path, name, stop):
    half, whole, vit = runs(name, stop), saved(runs(name, 8)), name.startswith('vit')
    assert same_run(whole, go_on(name, root, half, tmp_path / 'on', 8)) and whole['step'] == 8
    bases = [Q for key, Q in whole['model'].items() if key.endswith('.basis')]
    if bases:  # they are renewed before and after
        before, after = (sum(state.get('bases', 0) for state in saved(out)['optimizer'].values())
                         for out in (half, runs(name, 8)))
        assert len(bases) + (stop > 3) <= before < after
        assert len(whole['sketches']) == len(bases) * (whole['settings']['basis'] == 'sketch')
        for Q in bases if bases[0].dtype == double else ():
            close(Q.mT @ Q, torch.eye(Q.shape[1], dtype=double), 1e-9)
    now, before, how = whole['model'], saved(half)['model'], whole['settings']
    assert how['train'] == ('classifier' if name in ('vit_melo', 'vit_probe') else 'all')
    if how['train'] == 'all' and stop == 4:  # what trains moves, and that alone; at step 6 heads were merged
        still = {key for key in now if f'{key[:-6]}A' in now and not how['merge_every']
                 or key.endswith('.A') and how['factors'] == 'B'}
        assert still == {key for key in now if torch.equal(now[key], before[key]) and key[-6:] != '.basis'}
    assert name != 'gpt_float16' or 0 < whole['scaler']['scale'] < 65536  # it skips the first steps
    log = records(runs(name, 8))
    lines, others = ([(record['step'], 'val_loss' in record) for record in some if 'test_loss' not in record]
                     for some in (log, records(tmp_path / 'on')))
    assert lines == others or stop != 4  # nothing twice
    losses = [record['val_loss'] for record in log if 'val_loss' in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    # no dropout where it is evaluated, and the same start
    assert name != 'gpt_dropout' or losses[0] == logged(runs('gpt_full', 8), 'val_loss')[0]
    assert {'train_loss', 'lr', 'dt_ms', 'images_per_s' if vit else 'tokens_per_s', 'peak_memory_bytes',
            'trainable_parameters', 'optimizer_state_bytes', 'sync_bytes'} <= log[1].keys()
    if vit:
        assert log[-1] == records(tmp_path / 'on')[-1] and len(log[-1]['test_acc_by_class']) == 2
        assert (runs(name, 8) / 'confusion.png').stat().st_size > 1000
    elif name in ('llama_galore', 'gpt_galolte'):
        words = [f'--out_dir={tmp_path}/on', '--num_samples=1', '--max_new_tokens=3', '--device=cpu']
        assert len(start(sample, words)[0]) == 4


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_best_weights_stay_where_a_run_gets_worse_and_are_those_tested(root, runs, tmp_path, script):
    out = shutil.copytree(runs(f'{script}_full', 8), tmp_path / 'a')
    for steps in (10, 12):
        more = f'--init_from=resume --max_iters={steps} --eval_interval=2 --learning_rate=30 --min_lr=30'
        run(f'{script}_full', root, out, *more.split())
    word, best = ('val_auc', max) if script == 'vit' else ('val_loss', min)
    values = {step: value for step, value in logged(out, word).items() if step > 0}
    held, last = saved(out, 'best.pt'), saved(out)
    assert held['step'] < last['step'] == 12 and values[held['step']] == best(values.values()) != values[12]
    assert held[f'best_{word}'] == last[f'best_{word}'] == best(values.values())
    rates, usual = logged(out, 'lr'), 0.001 if script == 'vit' else 0.01
    assert (rates[2], rates[8], rates[12]) == pytest.approx((usual * 2 / 3, usual, 30))
    # what is logged is of the splits that it is said to be of
    begun, data = built(script, root, tmp_path / 'b')
    if script == 'vit':
        ended, _ = built('vit', root, tmp_path / 'b', f'--init_from={out}/best.pt')
        val, test = (prepare.Images('xrays', split, root) for split in ('val', 'test'))
        got = [train_vit.evaluate(one, split, data.classes, 'its')[0]['its_loss']
               for one, split in ((begun, val), (ended, test))]
        wanted = [logged(out, 'val_loss')[0], logged(out, 'test_loss')[12]]
    else:
        got = SCRIPTS[script].evaluate(begun, prepare.Tokens('tiny', 'val', 16, root))
        wanted = logged(out, 'val_loss')[0]
    assert got == pytest.approx(wanted, abs=1e-6)  # timm reads weights as float32


def test_heads_on_loaded_weights_train_alone(root, tmp_path):
    donor, path = tiny_gpt(vocab_size=257, n_head=1, n_embd=64), tmp_path / 'model.safetensors'
    safetensors.torch.save_file({**of_the_hub(donor), 'h.0.attn.bias': torch.ones(1, 1, 16, 16)}, path)
    loaded, idx = models.GPT.from_pretrained(str(path), block_size=8), tokens_of(2, 8)
    close(loaded(idx), donor.float()(idx), 1e-6)
    for name, trains in (('lora', 'factors'), ('lora_fa', 'factors'), ('galore', 'all'), ('full', 'all')):
        words = loading(tiny('gpt', root, tmp_path / name, *method(name), f'--init_from={path}'))
        for more in ([], ['--init_from=resume', '--max_iters=6']):  # 'auto' stays what it was
            start(train_gpt, [*words, *more])
            state = saved(tmp_path / name)
            assert state['settings']['train'] == trains and state['step'] in (4, 6)
            for key, value in donor.double().state_dict().items():
                assert torch.equal(state['model'][key], value) == (trains == 'factors'), key


def loading(words):
    """Without the shape, which loaded weights have of their own."""
    return [word for word in words if not word.startswith('--n_')]


def test_a_resumed_run_steps_as_its_own_settings_say(root, runs, tmp_path):
    name, ends = 'transformer.h.0.mlp.c_fc.weight', []
    start = saved(runs('gpt_full', 4))['model'][name]
    for decay in (0.5, 0.0):  # one step of AdamW apart: W (1 - lr decay) against W, and the same update
        shutil.copytree(runs('gpt_full', 4), tmp_path / f'{decay}')
        ends.append(train('gpt', root, tmp_path / f'{decay}', '--init_from=resume', '--max_iters=5',
                          '--dropout=0.2', f'--weight_decay={decay}'))
    close(ends[1]['model'][name] - ends[0]['model'][name], 0.5 * 0.01 * start)
    assert ends[0]['model_config']['dropout'] == 0.2


def test_text_is_of_the_tokenizer_and_the_same_with_heads_applied_or_merged(root, tmp_path, capsys):
    train('gpt', root, tmp_path, *method('lte', '--lowrank=attn,logit'), '--vocab_size=4000')
    capsys.readouterr()
    words = [f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=20', '--prompt=doc', '--top_k=0',
             '--device=cpu']
    merged = start(sample, words)
    assert capsys.readouterr().out.count('doc') == 2
    assert start(sample, [*words, '--merged=False']) == merged != start(sample, [*words, '--seed=7'])
    assert [len(text) for text in merged] == [23, 23] and max(map(max, merged)) < 257


@pytest.mark.parametrize('script, name, words', [
    ('gpt', 'lte', ['--lowrank=attn,logit', '--merge_every=2']),
    ('gpt', 'galore', ['--basis_every=2', '--n_layer=1']),
    ('llama', 'galolte', ['--n_layer=1']), ('vit', 'lora_fa', ['--n_layer=1'])])
def test_compiled_runs_train_the_same(root, tmp_path, backend, script, name, words):
    words = [*method(name, *words), '--param_dtype=float32', '--dtype=float32']
    for on in (False, True):
        train(script, root, tmp_path / f'{on}', *words, f'--compile={on}')
    plain, compiled = (logged(tmp_path / f'{on}', 'val_loss') for on in (False, True))
    assert len(plain) > 1 and compiled == pytest.approx(plain, abs=1e-3)


def test_a_signal_saves_and_ends_with_zero(root, tmp_path):
    words = tiny('gpt', root, tmp_path, '--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1')
    command = [sys.executable, 'train_gpt.py', *words]
    ran = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    for line in ran.stdout:
        if '| train' in line:
            ran.send_signal(signal.SIGTERM)
            break
    ran.stdout.read()
    assert ran.wait(20) == 0 and saved(tmp_path)['step'] >= 1


class Stops(io.StringIO):
    """Where a log goes that sends a signal when it tells of a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def write(self, text):
        if f'step {self.step:>6} | train' in text:
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def test_a_run_that_is_stopped_where_it_evaluates_makes_up_for_it(root, tmp_path):
    whole = train('gpt', root, tmp_path / 'a', '--max_iters=8')
    for stop in (4, 8):
        out = tmp_path / f'{stop}'
        with contextlib.redirect_stdout(Stops(stop - 1)):
            assert train('gpt', root, out, '--max_iters=8', '--log_interval=1')['step'] == stop
        assert stop not in logged(out, 'val_loss')  # it wants to be saved soon
        with open(out / 'log.jsonl', 'a') as file:
            file.write('\n{"step": 9, "val_loss": 0}\n{"step":')  # of a crash
        resumed = train('gpt', root, out, '--max_iters=8', '--init_from=resume')
        assert resumed['step'] == 8 and same_state(whole['model'], resumed['model'])
        assert logged(out, 'val_loss') == logged(tmp_path / 'a', 'val_loss')
        best = [saved(folder, 'best.pt') for folder in (tmp_path / 'a', out)]
        assert best[0]['step'] == best[1]['step'] and best[0]['best_val_loss'] == best[1]['best_val_loss']
    with contextlib.redirect_stdout(Stops(1)):
        train('gpt', root, out, '--overwrite=True', '--log_interval=1')
    assert not (out / 'best.pt').exists() and [*logged(out, 'step')] == [0, 1, 2]  # all of the old is gone


def test_bad_input_is_one_sentence_and_loses_nothing(root, runs, tmp_path, capsys):
    held = {}
    for name in (*SCRIPTS, 'best', 'damaged'):
        held[name] = shutil.copytree(runs(f'{name if name in SCRIPTS else "gpt"}_full', 4), tmp_path / name)
    before = {script: (held[script] / 'ckpt.pt').read_bytes() for script in SCRIPTS}
    os.replace(held['best'] / 'best.pt', held['best'] / 'ckpt.pt')
    (held['damaged'] / 'ckpt.pt').write_bytes(before['gpt'][:1000])
    safetensors.torch.save_file({'x': torch.ones(1)}, tmp_path / 'no.safetensors')
    resume = '--init_from=resume'
    for script, words, *needles in [
            ('gpt', '--dataset=c4', 'c4', 'prepare.py'), ('gpt', '--vocab_size=100', '257', 'vocab_size=257'),
            ('gpt', '--block_size=100000', 'block_size', '100000'), ('gpt', '--n_embd=17', 'n_head'),
            ('gpt', '--n_layer=2', 'already holds a run', resume, '--overwrite=True'),
            ('gpt', '--lowrank=nowhere', 'c_attn'), ('gpt', '--device=foo', "'cuda:N'"),
            ('gpt', f'{resume} --n_layer=3', 'n_layer=2', '3'), ('llama', '--size=3b', '60m'),
            ('llama', f'{resume} --out_dir={held["gpt"]}', 'script'),
            ('gpt', f'{resume} --out_dir={tmp_path}/none', 'ckpt.pt'),
            ('gpt', f'{resume} --out_dir={held["best"]}', 'weights alone'),
            ('gpt', f'{resume} --out_dir={held["damaged"]}', 'damaged'),
            ('vit', '--lowrank=attn,q', 'qkv'),
            ('vit', '--model=vit_tiny_patch16_244', "did you mean 'vit_tiny_patch16_224'"),
            ('vit', '--dataset=bloodmnist', 'prepare.py'), ('vit', '--n_head=3', 'num_heads', 'n_embd'),
            ('vit', '--init_from=nowhere.pt', 'nowhere.pt'), ('vit', '--max_iters=9', 'already holds a run'),
            ('vit', f'{resume} --augment=flip', "augment='flip,crop'"),
            ('vit', f'{resume} --dataset=digits', "dataset='xrays'", "'digits'")]:
        words = words.split() + ['--overwrite=True'] * (resume not in words and 'already holds a run' not in needles)
        refused(capsys, lambda: train(script, root, held[script], *words), *needles)
    for script, weights, needle in (('llama', 'gpt2', "'resume'"), ('gpt', 'none.safetensors', 'none.'),
                                    ('gpt', tmp_path / 'no.safetensors', 'wte')):
        words = loading(tiny(script, root, held[script], f'--init_from={weights}', '--vocab_size=None',
                             '--overwrite=True'))
        refused(capsys, lambda: start(SCRIPTS[script], words), needle)
    if not torch.cuda.is_available():
        refused(capsys, lambda: train('gpt', root, held['gpt'], '--device=cuda', '--overwrite=True'), '--device=cpu')
    refused(capsys, lambda: start(sample, [f'--out_dir={held["vit"]}', '--device=cpu']), 'holds a ViT')
    with pytest.raises(SystemExit, match='ckpt.pt of step 4'):  # a loss that is not finite
        train('gpt', root, held['gpt'], resume, '--max_iters=40', '--learning_rate=1e300', '--min_lr=1e300')
    train('gpt', root, held['gpt'], '--eval_only=True', '--overwrite=True')
    assert before == {script: (held[script] / 'ckpt.pt').read_bytes() for script in SCRIPTS}


# -----------------------------------------------------------------------------
# several ranks: one spawn for all


def several_ranks(root, out):
    """What each of two processes of torchrun runs. At first each forks another one, and four train."""
    torch.set_num_threads(1)
    dist, me, env = torch.distributed, int(os.environ['RANK']), dict(os.environ)
    forked = os.fork() == 0
    os.environ.update(RANK=str(me + 2 * forked), LOCAL_RANK=str(me + 2 * forked), WORLD_SIZE='4')
    join, end = dist.init_process_group, dist.destroy_process_group
    join('gloo', f'file://{out}/store', rank=me + 2 * forked, world_size=4)
    dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)  # all runs share a group,
    dist.destroy_process_group = lambda: dist.barrier()  # and rank 0's files are written when one ends
    for name in (*FOUR, 'gpt_local', 'gpt_replicas'):
        run(name, root, f'{out}/{name}_four', f'--max_iters={8 if name in FOUR else 1}')
    time.sleep(0.1)
    end()
    if forked:
        os._exit(0)
    assert os.wait()[1] == 0

    for key in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):  # one process each
        del os.environ[key]
    for name in [name for name in SEVERAL if name not in REPLICAS][me::2]:
        run(name, root, f'{out}/{name}_on', '--max_iters=4')

    os.environ.update(env)
    for name in SEVERAL:
        run(name, root, f'{out}/{name}', '--max_iters=8')
        if name not in REPLICAS:  # begun by one process
            run(name, root, f'{out}/{name}_on', '--init_from=resume', '--max_iters=6')
        if name in RESUMED:
            run(name, root, f'{out}/{name}_again', '--max_iters=4')
            run(name, root, f'{out}/{name}_again', '--max_iters=8', '--init_from=resume')
    for name in ('gpt_local', 'gpt_replicas'):
        with pytest.raises(SystemExit):  # says: as many as before
            run(name, root, f'{out}/{name}_four', '--init_from=resume')
    with contextlib.redirect_stdout(Stops(3)):  # a signal to rank 0, which alone writes a log: both end
        run('gpt_full', root, f'{out}/stopped', '--max_iters=8', '--log_interval=1')
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        run('gpt_full', root, f'{out}/differ', f'--seed={me}')
    assert 'rank 0 has seed=0 and rank 1 1: start all ranks with the same' in said.getvalue()
    merged_weights_have_the_same_bits_on_every_rank()
    all_ranks_skip_a_step_that_overflows_on_one()
    end()


def merged_weights_have_the_same_bits_on_every_rank():
    for dtype, merge_reset, heads_rank in ((torch.float32, False, 2), (torch.bfloat16, True, 2),
                                           (torch.float32, False, 8), (torch.bfloat16, True, 16)):
        gpt, plain, idx = tiny_gpt().to(dtype), tiny_gpt().to(dtype), torch.arange(16)[None]
        lowrank.apply_mhlora(gpt, ('attn', 'mlp'), 4, heads_rank, 3.0, split=True, merge_every=5,
                             merge_reset=merge_reset, worker=torch.distributed.get_rank(), workers=2)
        layers, replicas = lowrank.lowrank_layers(gpt), lowrank.replica_parameters(gpt)
        assert {layer.sends_products for layer in layers} == {heads_rank > 2}  # or factors
        torch.manual_seed(torch.distributed.get_rank())
        for _ in range(2):
            for p in gpt.parameters():
                p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0
            plain.load_state_dict(lowrank.merged_state_dict(gpt, replicas))
            with lowrank.averaged_heads(gpt, replicas):
                close(gpt(idx)[0], plain(idx)[0], 1e-5 if dtype == torch.float32 else 0.1)
            lowrank.merge(gpt, torch.Generator().manual_seed(5), replicas)
            for name, layer in gpt.named_modules():
                if layer in layers:  # taken from all heads, gathered
                    close(layer.weight, plain.get_submodule(name).weight, 0.02 if merge_reset else 1e-5)
            for p in gpt.parameters():
                assert p in lowrank.own_heads(gpt) or torch.equal(*lowrank.gather(p))


def all_ranks_skip_a_step_that_overflows_on_one():
    """GaLore's leaf under plain DDP, which averages it, and its poisoned sketch; and AdamW beside it."""
    gpt, idx, alone = tiny_gpt().float(), torch.arange(16)[None], nn.Parameter(torch.ones(3))
    lowrank.apply_mhlora(gpt, rank=3, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(gpt, lr=0.01, basis_every=4)
    fused, net = torch.optim.AdamW([alone], fused=True), nn.parallel.DistributedDataParallel(gpt)
    scalers = [torch.amp.GradScaler('cpu') for _ in range(2)]
    start = lowrank.merged_state_dict(copy.deepcopy(gpt))
    for step, overflows in enumerate(((0,), (0, 1), (), (), (), ())):  # on which ranks
        much = math.inf if torch.distributed.get_rank() in overflows else 1.0
        optimizer.begin(step)
        for loss, scaler, stepping in zip((net(idx, idx), alone.sum()), scalers, (optimizer, fused)):
            scaler.scale(loss * much).backward()
            config.unscale(scaler, stepping)
            lowrank.clip_gradients(gpt, 1.0)
            scaler.step(stepping)
            scaler.update()
            stepping.zero_grad()
        moved = [not torch.equal(x, start[name]) for name, x in lowrank.merged_state_dict(gpt).items()]
        assert {*moved, not torch.equal(alone, torch.ones(3))} == {step > 1}, step
    for layer in lowrank.lowrank_layers(gpt):  # the second gradient was lost, the sketch was not
        assert optimizer.state[layer.trained]['bases'] == 2
    assert all(scaler.get_scale() == 2**14 for scaler in scalers)
    assert all(torch.equal(*lowrank.gather(x)) and x.isfinite().all() for x in gpt.state_dict().values())


def by_hand(root, steps, each):
    """sync='merge' written down for two workers of so many heads each: their models after so many steps."""
    seed = train_gpt.defaults['seed']
    torch.manual_seed(seed)
    whole = models.GPT(models.GPTConfig(16, 257, 2, 2, 16)).double()
    workers = [copy.deepcopy(whole) for _ in range(2)]
    for gpt, heads in ((whole, 2 * each), (workers[0], each), (workers[1], each)) if each else ():
        lowrank.apply_mhlora(gpt, ('attn', 'mlp'), heads, 3, 16.0, split=True, merge_every=3)
    for k, gpt in enumerate(workers):  # worker k has the heads k and k + 2
        gpt.load_state_dict({name: x[k::2] if name.split('.')[-1][:1] in 'AB' else x
                             for name, x in whole.state_dict().items()})
    optimizers = [torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], betas=(0.9, 0.95),
                                    weight_decay=0.0) for gpt in workers]
    data = prepare.Tokens('tiny', 'train', 16, root)
    for step in range(steps):
        for k, (gpt, optimizer) in enumerate(zip(workers, optimizers)):
            optimizer.param_groups[0]['lr'] = 0.01 * min((step + 1) / 3, 1)
            optimizer.zero_grad()
            gpt(*data.batch(8, step, seed=seed, rows=lowrank.rows_of(8, each or 1, k, 2))).backward()
            optimizer.step()
        if step % 3 == 2:
            with torch.no_grad():
                for layers in zip(*map(lowrank.lowrank_layers, workers)):
                    change = sum(layer.B @ layer.A - layer.B_merged @ layer.A_merged for layer in layers)
                    for layer in layers:
                        layer.weight += 16.0 / 3 / 4 * change.sum(0)  # s / H
                        layer.A_merged.copy_(layer.A), layer.B_merged.copy_(layer.B)
                for one, two in zip(*(gpt.parameters() for gpt in workers)):
                    if one.requires_grad and one.dim() < 3:
                        one.copy_((one + two) / 2), two.copy_(one)
    return workers


@pytest.fixture(scope='session', autouse=True)
def spawn(request, root, tmp_path_factory):
    """The ranks, started beside the other tests if one asks for them: the process, and its folder."""
    if not any('spawned' in item.fixturenames for item in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp('ranks')
    code = f'import test_lowrank as t; t.several_ranks({str(root)!r}, {str(out)!r})'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--no_python', sys.executable, '-c', code]
    with open(out / 'said', 'w') as said:
        process = subprocess.Popen(command, cwd=HERE, stdout=said, stderr=said)
    yield process, out
    process.terminate()  # if it is there still
    process.wait()


@pytest.fixture(scope='session')
def spawned(spawn):
    """The folder of the runs of `several_ranks`, when they are done."""
    process, out = spawn
    assert process.wait(300) == 0, (out / 'said').read_text()[-5000:]
    return out


@pytest.mark.parametrize('name', SEVERAL)
def test_any_number_of_ranks_trains_the_same(root, runs, spawned, tmp_path, name):
    if name in RESUMED:  # bit for bit at the same number of ranks
        assert same_run(saved(spawned / name), saved(spawned / f'{name}_again'))
    if name in REPLICAS:
        return
    go_on(name, root, spawned / f'{name}_on', tmp_path / 'on', 8)  # one, two, one
    whole, tolerance = saved(runs(name, 8))['model'], 1e-3 if 'lean' in name else 1e-9
    for other in (spawned / name, tmp_path / 'on', *[spawned / f'{name}_four'] * (name in FOUR)):
        for key, value in saved(other)['model'].items():
            torch.testing.assert_close(value, whole[key], rtol=0, atol=tolerance, msg=f'{other} {key}')
        for key in ('val_loss', 'train_loss', 'test_loss', 'val_auc', 'test_auc'):
            wanted, got = logged(runs(name, 8), key), logged(other, key)
            least = 2e-6 if key == 'train_loss' else 0  # is added up in float32
            assert {step: got[step] for step in wanted} == pytest.approx(wanted, abs=max(tolerance, least))


def test_replicas_are_two_workers_and_no_byte_is_sent_in_silence(root, spawned):
    assert saved(spawned / 'stopped')['step'] == 4
    for name, each in (('gpt_local', 0), ('gpt_replicas', 2)):
        workers, state = by_hand(root, 8, each), saved(spawned / name)
        for k, gpt in enumerate(workers):
            for key, x in gpt.state_dict().items():
                held = state['model'][key][k::2] if key.split('.')[-1][:1] in 'AB' else \
                    state['replicas'][key][k] if key in state['replicas'] else state['model'][key]
                assert key == 'lm_head.weight' or torch.allclose(x, held, atol=1e-10), (name, key)
    assert len(start(sample, [f'--out_dir={spawned}/gpt_replicas', '--num_samples=1', '--max_new_tokens=3',
                            '--device=cpu'])[0]) == 4
    shapes = [tuple(layer.weight.shape) for layer in lowrank.lowrank_layers(workers[0])]
    others = sum(p.numel() for p in workers[0].parameters() if p.requires_grad and p.dim() < 3)
    # what torch's collectives get is what the log tells; older fake tensors know no collectives
    for name in ('lte', 'replicas', 'local', 'galolte') if torch.__version__ >= (2, 13) else ():
        put, _ = bench.sent(saved(spawned / f'gpt_{name}')['settings'], 2, 8)
        put = [sum(step.values()) for step in put]
        assert logged(spawned / f'gpt_{name}', 'sync_bytes') == {k: sum(put[k - 2:k]) // 2 for k in (2, 4, 6, 8)}, name
    # 2 heads of rank 3 without those of the last merge, or the product where that is less; 8 bytes a number
    once = sum(8 * min(2 * 3 * (m + n), m * n) for m, n in shapes)
    assert logged(spawned / 'gpt_reset', 'sync_bytes')[4] == 8 * others + once // 2


# -----------------------------------------------------------------------------
# prepare: its command line


def numbered(path, lines=4000):
    """A .txt of different lines of 9 to 40 bytes."""
    tails = np.random.default_rng(0).integers(0, 32, lines)
    path.write_text(''.join(f'{i:07d} ' + 'abcdefgh'[i % 8] * tail + '\n' for i, tail in enumerate(tails)))
    return path


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def prepare_text(root, *words):
    prepare.main(['text', '--tokenizer', 'bytes', '--data_dir', str(root), '--input', *map(str, words)])


def all_tokens(root, name, split):
    return np.concatenate(prepare.Tokens(name, split, 1, root).shards)


def texts_of(root, name):
    """The documents of the training split and those of validation."""
    texts = [prepare.tokenizer('bytes').decode(all_tokens(root, name, split).tolist())
             for split in ('train', 'val')]
    assert all(text.endswith('<|endoftext|>') for text in texts)
    return [text.split('<|endoftext|>')[:-1] for text in texts]


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob('*.*')) if path.suffix not in ('.lock', '.verified')}


@contextlib.contextmanager
def interrupted_after(renames):
    """Ctrl-C where a file would be renamed for the next time."""
    done, replace = [], os.replace

    def stop(*paths):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(replace(*paths))
    with mock.patch('os.replace', stop), pytest.raises(KeyboardInterrupt):
        yield


def test_stdlib_is_prepared_when_it_is_missing(tmp_path):
    data = prepare.Tokens('stdlib', 'val', 256, tmp_path)
    assert data.vocab_size == 257 and data.meta['eot'] == 256 and data.meta['documents']['val'] >= 10
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
        assert sum(held.values()) == (tmp_path / 'few.txt').stat().st_size and held['val'] < tokens[1]
    (tmp_path / 'one.txt').write_text('one line\n')
    with pytest.raises(prepare.DataError, match='too little text'):
        prepare_text(tmp_path, tmp_path / 'one.txt')


def test_a_document_keeps_its_split_and_bad_bytes_are_replaced_and_counted(tmp_path, capsys):
    texts, splits = [f'document {i} — ü' for i in range(300)], []
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts[:150]) + '\n\n')
    parquet(tmp_path / 'b.parquet', text=texts[150:] + [None])
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


@pytest.mark.parametrize('file, content, message', [
    ('a.txt', b'', 'is empty'), ('a.txt', b' \n\n', 'is empty'), ('a.jsonl', b'\n', 'is empty'),
    ('a.txt', b'x' * 100_000 + b'\0', 'is binary'), ('a.jsonl', b'\0\1', 'is binary'), ('a.pdf', b'', '.txt'),
    ('a.jsonl', b'{"text": "x"}\n{"txt": 1}\n', 'line 2 of'), ('a.jsonl', b'[1', 'line 1 of'),
    ('a.parquet', b'PAR2', 'no parquet')])
def test_empty_and_binary_files_are_refused_by_name(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(prepare.DataError, match=message) as refusal:
        prepare_text(tmp_path, tmp_path / file)
    assert file in str(refusal.value)
    assert not {'meta.json', 'train_000000.bin'} & set(files_of(tmp_path / 'text'))


def test_cnn_dailymail_comes_from_a_folder_in_the_layout_of_the_hub(tmp_path):
    (tmp_path / '3.0.0').mkdir()
    wanted = {'train': [], 'validation': []}
    for split, file in (('train', 0), ('train', 1), ('validation', 0)):
        ids = [f'{split}{file}{i}' for i in range(5)]
        name = f'{split}-0000{file}-of-0000{1 + (split == "train")}.parquet'
        parquet(tmp_path / '3.0.0' / name, article=ids, highlights=[f'short {i}' for i in ids], id=ids)
        wanted[split] += [f'{i}\n\nshort {i}' for i in ids]
    prepare.main(['cnn_dailymail', '--path', str(tmp_path), '--tokenizer', 'bytes',
                  '--data_dir', str(tmp_path)])
    assert texts_of(tmp_path, 'cnn_dailymail') == list(wanted.values())


def test_c4_keeps_its_validation_stops_where_asked_and_begins_anew_after_an_interruption(tmp_path):
    (tmp_path / 'hub' / 'en').mkdir(parents=True)  # the hub's layout
    files = ['train.00000-of-01024', 'train.00001-of-01024', 'validation.00000-of-00008']
    for file in files:
        rows = [{'text': f'{file} {i}\n' + 'word ' * (i % 40), 'url': 'a'} for i in range(400)]
        with gzip.open(tmp_path / 'hub' / 'en' / f'c4-{file}.json.gz', 'wt') as out:
            out.write('\n'.join(map(json.dumps, rows)))

    def c4(root, *words):
        prepare.main(['c4', '--path', str(tmp_path / 'hub'), '--tokenizer', 'bytes', '--data_dir', str(root),
                      '--shard_tokens', '18_000', *words])
    c4(tmp_path)
    train, val = ([document.splitlines()[0] for document in split] for split in texts_of(tmp_path, 'c4'))
    assert train == [f'{file} {i}' for file in files[:2] for i in range(400)]
    assert val == [f'{files[2]} {i}' for i in range(400)]
    c4(tmp_path, '--tokens', '20_000', '--name', 'some')
    assert 20_000 <= len(all_tokens(tmp_path, 'some', 'train')) < 20_300
    whole = files_of(tmp_path / 'c4')
    assert len(whole) == 10
    for renames in range(10):  # of shards and meta.json
        folder = tmp_path / f'{renames}' / 'c4'
        with interrupted_after(renames):
            c4(folder.parent)
        assert not files_of(folder)
        with pytest.raises(FileNotFoundError, match='not there'):
            prepare.Tokens('c4', 'train', 8, folder.parent)
        c4(folder.parent, '--tokens', '20_000')  # the same command or another
        with interrupted_after(renames):
            c4(folder.parent, '--overwrite')
        assert files_of(folder) == files_of(tmp_path / 'some')  # stays until the new one is whole
        c4(folder.parent, '--overwrite')
        assert texts_of(folder.parent, 'c4') == texts_of(tmp_path, 'c4')
        assert len(files_of(folder)) == 10


def test_a_kill_leaves_no_half_written_shard_and_what_is_prepared_is_overwritten_on_demand(tmp_path, capsys):
    path, more = numbered(tmp_path / 'a.txt', 40_000), ['--shard_tokens', '20_000']
    prepare_text(tmp_path, path, '--name', 'whole', *more)
    command = [sys.executable, prepare.__file__, 'text', '--input', str(path), '--name', 'killed',
               '--data_dir', str(tmp_path), '--tokenizer', 'bytes', *more]
    process, folder = subprocess.Popen(command), tmp_path / 'killed'
    while not (folder / 'train_000003.bin').exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    whole, killed = files_of(tmp_path / 'whole'), files_of(folder)
    assert all(whole[name] == x for name, x in killed.items() if name.endswith('.bin'))
    assert 'meta.json' not in killed and 'train_000003.bin' in killed
    subprocess.run(command, check=True, capture_output=True)
    assert files_of(folder) == whole
    prepare_text(tmp_path, path, '--name', 'whole', *more)
    assert 'already there' in capsys.readouterr().out
    with pytest.raises(prepare.DataError, match='holds a data set with source .* --overwrite'):
        prepare_text(tmp_path, numbered(path, 300), '--name', 'whole', *more)
    assert files_of(tmp_path / 'whole') == whole
    prepare_text(tmp_path, path, '--name', 'whole', '--overwrite', *more)
    assert files_of(tmp_path / 'whole').keys() & whole.keys() == {'meta.json'}  # the old shards are gone


def test_files_of_others_stay(root, tmp_path):
    folder, path = tmp_path / 'mine', numbered(tmp_path / 'a.txt', 300)
    folder.mkdir()
    others = {'train_000000.bin': b'theirs', 'val.bin': prepare.MAGIC, 'notes.tmp': b'', 'a.json': b'{}'}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    for words in ([], ['--overwrite']):
        prepare_text(tmp_path, path, '--name', 'mine', *words)
        assert others.items() <= files_of(folder).items() and len(files_of(folder)) == 7
        assert sum(len(all_tokens(tmp_path, 'mine', split)) for split in ('train', 'val')) > 7000
    for content in ('{"name": "a web page"}', '[]', 'hello'):
        (folder / 'meta.json').write_text(content)
        held = files_of(folder)
        with pytest.raises(prepare.DataError, match='meta.json.* move it away'):
            prepare_text(tmp_path, path, '--name', 'mine', '--overwrite')
        assert files_of(folder) == held


def test_gpt2_tokens_round_trip(tmp_path):
    try:
        encoding = prepare.tokenizer('gpt2')
    except prepare.DataError as error:
        assert 'TIKTOKEN_CACHE_DIR' not in os.environ, error  # where it is said to be it has to be
        pytest.skip(str(error))
    path = numbered(tmp_path / 'a.txt', 500)
    prepare.main(['text', '--input', str(path), '--data_dir', str(tmp_path)])
    data = prepare.Tokens('text', 'train', 8, tmp_path)
    assert (data.vocab_size, data.meta['eot'], data.shards[0].dtype) == (50257, encoding.eot_token, '<u2')
    text = ''.join(encoding.decode(all_tokens(tmp_path, 'text', part).tolist()) for part in ('train', 'val'))
    assert sorted(text.replace('<|endoftext|>', '').splitlines()) == sorted(path.read_text().splitlines())


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
    prepare.main([flag, '--path', str(root), '--data_dir', str(root), '--shard_bytes', '1_000_000', *words])


@pytest.mark.parametrize('flag, size, compressed', [
    ('pathmnist', 28, False), ('pathmnist', 28, True), ('chestmnist', 28, True),
    ('pneumoniamnist', 28, False), ('retinamnist', 64, True)])
def test_images_are_those_of_medmnist_itself(tmp_path, flag, size, compressed):
    import medmnist
    path = archive(tmp_path, flag, size, compressed, {'train': 70, 'val': 30, 'test': 41})
    prepare_images(tmp_path, flag, '--size', str(size))
    info, multi = INFO[flag], flag == 'chestmnist'
    for split in COUNTS:
        data = prepare.Images(path.stem, split, tmp_path)
        x, y = data.fixed_batch(0, 100)
        theirs = getattr(medmnist, info['python_class'])(split, root=tmp_path, size=size)
        images, labels = zip(*(theirs[i] for i in range(len(data))))
        assert len(data) == theirs.imgs.shape[0] == data.meta['images'][split]
        assert x.dtype == torch.uint8 and x.is_contiguous() and x.shape[1:] == (data.channels, size, size)
        assert np.array_equal(x.permute(0, 2, 3, 1).squeeze(), np.stack([np.array(i) for i in images]))
        assert y.dtype == (torch.float32 if multi else torch.int64) and y.ndim == 1 + multi
        assert np.array_equal(y.numpy().reshape(len(y), -1), np.stack(labels))
    assert (data.meta['kind'], data.meta['flag'], data.task) == ('images', flag, info['task'])
    assert data.classes == list(info['label'].values()) and data.num_classes == len(data.classes)
    assert (data.channels, data.size) == (info['n_channels'], size)
    chunks = prepare.medmnist_images(path, size, info, download=True)  # what is there is not downloaded again
    assert sum(len(labels) for _, labels, _ in chunks) == 141


def test_shards_of_images_keep_the_contract_and_an_interrupted_command_begins_anew(root, tmp_path, capsys):
    data, whole = prepare.Images('pathmnist', 'train', root), files_of(root / 'pathmnist')
    assert [len(shard) for shard in data.shards] == [445, 445, 110] and len(whole) == 6  # 1 MB read at a time
    for shard in data.meta['shards']:
        content = whole[shard['file']]
        assert content[:32] == b'nLRshard' + struct.pack('<IIQQ', 1, 1 + 3 * 28 * 28, shard['images'], 0)
        assert hashlib.sha256(content).hexdigest() == shard['sha256']
    assert content[32] == data.fixed_batch(0, 1)[1].item() == 0  # the first image's label comes first
    archive(tmp_path)
    with interrupted_after(2):
        prepare_images(tmp_path)
    assert not files_of(tmp_path / 'pathmnist')
    with pytest.raises(FileNotFoundError, match="'pathmnist' is not there: run '.* pathmnist --size 28"):
        prepare.Images('pathmnist', 'val', tmp_path)
    for said in ('1,000 train, 30 val, 41 test images', 'already there'):
        prepare_images(tmp_path)
        assert files_of(tmp_path / 'pathmnist') == whole and said in capsys.readouterr().out
    with pytest.raises(prepare.DataError, match='data set with shard_bytes 1000000, not 7: .*--overwrite'):
        prepare_images(tmp_path, 'pathmnist', '--shard_bytes', '7')
    assert files_of(tmp_path / 'pathmnist') == whole


def test_broken_archives_are_refused_in_one_sentence(tmp_path):
    path = archive(tmp_path)
    whole, images = path.read_bytes(), np.zeros((30, 28, 28, 3), np.uint8)
    at = whole.index(b'val_images.npy') + 5000  # inside the pixels
    for content, message in (
            (whole[:-50_000], 'damaged'), (whole[:100], 'damaged'), (b'', 'damaged'),
            (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], 'damaged'),  # only the checksum tells
            (dict(val_images=images[:, :14, :14]), r'val images of shape \(14, 14, 3\).*not \(28, 28, 3\)'),
            (dict(val_images=images[..., 0]), r'val images of shape \(28, 28\)'),
            (dict(val_images=images / 255), 'val images .* .float64., not'),
            (dict(val_labels=np.full((30, 1), 9)), 'val labels .* to 9, not .* from 0 to 8, .* 9 classes'),
            (dict(val_labels=np.zeros((29, 1), np.uint8)), r'val labels of shape \(29, 1\)'),
            (dict(val_labels=np.zeros((30, 1), object)), 'damaged'),
            (dict(train_images=None), 'no archive of MedMNIST')):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            archive(tmp_path, **content)
        with pytest.raises(prepare.DataError, match=f'pathmnist.npz.*{message}') as refusal:
            prepare_images(tmp_path)
        assert '\n' not in str(refusal.value) and 'meta.json' not in files_of(tmp_path / 'pathmnist')


def test_mistakes_in_the_command_are_one_sentence_and_exit_code_2(tmp_path):
    for command, message in (
            ('stdlb', "did you mean 'stdlib'"), ('text', '--input'), ('c4', '--tokens'),
            ('c4 --tokens 0', 'at least 1'), ('stdlib --tokns 3', '--tokns'),
            (f'c4 --path {tmp_path}', 'en/c4-train'), ('stdlib --path x', '--path'),
            ('pathmist', "did you mean 'pathmnist'"), ('PathMNIST', "did you mean 'pathmnist'"),
            ('organmnist3d', 'volumes'), (f'octmnist --path {tmp_path}', 'octmnist.npz.*missing'),
            (f'octmnist --size 64 --path {tmp_path}', 'octmnist_64.npz.*missing.*--path'),
            ('pathmnist --size 32', '28'), ('digits --size 64', '--size'), ('digits --path x', '--path'),
            ('digits --tokens 3', '--tokens'), ('stdlib --shard_bytes 3', '--shard_bytes'),
            ('pathmnist --shard_bytes 0', 'at least 1'), ('stdlib --name ../x', r"not '\.\./x'"),
            ('stdlib --name /x', "not '/x'"), ('stdlib --name ..', 'name of a folder'),
            ('--overwrite stdlib', 'did you')):
        with pytest.raises(prepare.DataError, match=message):
            prepare.main([*command.split(), '--data_dir', str(tmp_path / 'data')])
    run = subprocess.run([sys.executable, prepare.__file__, 'stdlb'], capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout and run.stderr.count('\n') == 1
    assert 'Traceback' not in run.stderr and not (tmp_path / 'data').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere the peak is also that of the process that started this')
def test_memory_does_not_grow_with_the_archive(tmp_path):
    path = archive(tmp_path, size=224, counts={'train': 400, 'val': 9, 'test': 9})
    assert path.stat().st_size > 60e6
    code = ('import config, prepare, sys, tqdm, filelock\n'
            "before = config.peak_memory_bytes('cpu'); prepare.main(sys.argv[1:])\n"
            "print(config.peak_memory_bytes('cpu') - before)")
    command = ['pathmnist', '--size', '224', '--path', str(tmp_path), '--data_dir', str(tmp_path)]
    run = subprocess.run([sys.executable, '-c', code, *command], cwd=HERE, capture_output=True, check=True)
    assert 0 < int(run.stdout.split()[-1]) < 30e6, run.stdout


# -----------------------------------------------------------------------------
# bench


def test_the_planner_takes_a_run_and_methods_and_counts_every_byte(tmp_path, capsys):
    path, bare = tmp_path / 'tiny.py', tmp_path / 'bare.py'
    path.write_text("# tiny\n# python train_gpt.py tiny.py\nrank = {'galore': 3, 'lte': 3}\n"
                    'block_size, n_layer, n_head, n_embd, vocab_size = 16, 2, 2, 32, 64\n')
    bare.write_text('n_layer = 2\n')
    methods = ['full', 'galore', 'lte']
    bench.plan([str(path), *(FILES[name] for name in methods)], '1e-6GB')  # where nothing fits
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if 'float' in line]
    assert rows == [[name, dtype, 'none'] for name in methods for dtype in ('float32', 'bfloat16')]
    shape = dict(n_layer=2, n_embd=32, n_head=2, dtype='float32')
    for script, more in ((train_llama, dict(n_mlp=48, vocab_size=64, block_size=16)),
                         (train_vit, dict(img_size=32, patch_size=16))):
        said = bench.planned({**script.defaults, **shape, **more, 'batch_size': 4})
        assert said['state'] - 2 * said['weights'] in range(-8192, 4096)  # two moments; buffers have none
        # the peak is in the optimizer's step, or not much more
        assert 4 * said['weights'] - 16384 < said['total'] < 9 * said['weights']
    for word, budget, needle in ((path, '12', 'no number with a unit'), (path, 'xGB', 'unit'),
                                 (tmp_path / 'no.py', '12GB', 'is not there'), (bare, '12GB', 'does not say whose it is')):
        refused(capsys, lambda: bench.plan([str(word)], budget), needle)
    refused(capsys, lambda: bench.chosen(['qualty']), "did you mean 'quality'?")


# -----------------------------------------------------------------------------
# a run's folder: nothing of others is lost, nothing damaged is used


def test_a_run_takes_no_folder_that_is_not_its_own(root, tmp_path, capsys):
    def run(*words):
        return lambda: train('gpt', root, tmp_path, '--max_iters=1', *words)
    for name in ('adapter.safetensors', 'log.jsonl'):  # of somebody else: no config.json of ours
        (tmp_path / name).write_text('precious')
        for words in ((), ('--overwrite=True',)):
            refused(capsys, run(*words), name, 'no config.json of a run of ours')
        assert (tmp_path / name).read_text() == 'precious'
        (tmp_path / name).unlink()
    (tmp_path / 'ckpt.pt.tmp').mkdir()
    refused(capsys, run(), 'ckpt.pt.tmp', 'is a folder')
    (tmp_path / 'ckpt.pt.tmp').rmdir()
    config.unlock()  # as the end of a process does
    with open(tmp_path / '.lock', 'w') as lock:  # another process trains there
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused(capsys, run(), 'another run')
    run()()
    refused(capsys, run(), 'already holds a run', '--overwrite=True')
    run('--overwrite=True')()


def test_evaluating_makes_no_folder_ours_and_a_run_without_a_checkpoint_begins_again(root, tmp_path, capsys):
    for script, (name, content) in itertools.product(SCRIPTS, (('foreign', b'theirs'), ('fresh', None))):
        out = tmp_path / script / name
        out.mkdir(parents=True)
        if content:
            (out / 'ckpt.pt').write_bytes(content)
        start(SCRIPTS[script], tiny(script, root, out, '--eval_only=True', '--max_iters=1'))
        if content:
            refused(capsys, lambda: train(script, root, out, '--max_iters=1', '--overwrite=True'), 'ckpt.pt', 'ours')
            assert (out / 'ckpt.pt').read_bytes() == content
        else:
            train(script, root, out, '--max_iters=1')


def test_a_run_killed_between_its_two_files_goes_on(root, tmp_path):
    for script, best in (('gpt', 'best_val_loss'), ('llama', 'best_val_loss'), ('vit', 'best_val_auc')):
        out = tmp_path / script
        train(script, root, out, '--max_iters=2', '--eval_interval=2')
        before = saved(out, 'best.pt')
        (out / 'best.pt').unlink()  # ckpt.pt is written first
        again = train(script, root, out, '--max_iters=2', '--init_from=resume', '--eval_interval=2')
        assert same_state(saved(out, 'best.pt')['model'], before['model'])
        assert again[best] == before[best]
        lines = [line for line in records(out) if 'val_loss' in line or 'test_loss' in line]
        steps = [(line['step'], *(key for key in ('val_loss', 'test_loss') if key in line)) for line in lines]
        assert len(steps) == len(set(steps))  # nothing twice


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = {argv}
exec(compile(open('{script}').read(), '{script}', 'exec'))
"""


def test_a_full_disk_ends_a_run_in_one_sentence_and_costs_no_checkpoint(root, tmp_path):
    train('gpt', root, tmp_path, '--max_iters=2')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    words = tiny('gpt', root, tmp_path, '--init_from=resume', '--eval_interval=4')
    program = FULL_DISK.format(limit=len(before) // 2, argv=['train_gpt.py', *map(str, words)],
                               script=f'{HERE}/train_gpt.py')
    ran = subprocess.run([sys.executable, '-c', program], cwd=HERE, capture_output=True, text=True)
    said = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1 and 'ckpt.pt' in said and 'File too large' in said, ran.stderr
    assert 'Traceback' not in ran.stderr
    assert (tmp_path / 'ckpt.pt').read_bytes() == before and not list(tmp_path.glob('*.tmp'))


def test_checksums_tell_of_a_single_byte(root, tmp_path, capsys):
    train('vit', root, tmp_path / 'base', '--max_iters=1', '--eval_interval=1')
    words = [f'--init_from={tmp_path / "base" / "best.pt"}', *method('lora')]
    train('vit', root, tmp_path / 'a', *words)
    rng = np.random.default_rng(0)
    for name in ('ckpt.pt', 'adapter.safetensors'):
        path = tmp_path / 'a' / name
        whole = path.read_bytes()
        for place in rng.integers(len(whole) // 4, len(whole) * 3 // 4, 10).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
            if name == 'ckpt.pt':
                with pytest.raises(ValueError, match='damaged'):
                    saved(tmp_path / 'a')
            else:
                again = tiny('vit', root, tmp_path / 'b', *words, f'--adapter={path}', '--eval_only=True')
                refused(capsys, lambda: start(train_vit, again), 'adapter.safetensors')
        path.write_bytes(whole)


def test_a_shard_whose_bytes_changed_is_named(root, tmp_path):
    shutil.copytree(root / 'tiny', tmp_path / 'tiny', ignore=shutil.ignore_patterns('*.verified'))
    notes, shard = tmp_path / 'tiny' / 'meta.json.verified', tmp_path / SHARD

    def batch_in_time(split='train'):
        data, end = prepare.Tokens('tiny', split, 8, tmp_path), time.time() + 20
        while time.time() < end and not data.unsound and not notes.exists():
            time.sleep(0.01)
        return data.batch(4, 0)
    batch_in_time()
    assert len(notes.read_text().splitlines()) == 1
    whole = shard.read_bytes()
    shard.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    notes.unlink()
    with pytest.raises(OSError, match='checksum.*--overwrite.*train_000000.bin'):
        batch_in_time()
    batch_in_time('val')


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


# -----------------------------------------------------------------------------
# runs that something goes wrong in


@pytest.mark.parametrize('name', ALONE)
def test_what_is_not_finite_is_never_saved_over_what_is(root, tmp_path, name):
    run, data = built('llama', root, tmp_path, *method(name))
    for step in range(4):
        train_llama.train_step(run, step, lambda micro_step: data.batch(8, step, rows=run.rows))
    config.save(run, 'ckpt.pt', dict(step=4), resumable=True)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [x for state in run.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    tensors += [layer.sketch.grad for layer in lowrank.lowrank_layers(run.model) if layer.sketch is not None]
    for x, value in zip((x for x in tensors if x.is_floating_point()), itertools.cycle((math.nan, math.inf))):
        last = x.detach()[(-1,) * x.dim()]
        kept = last.clone()
        last.fill_(value)
        with pytest.raises(SystemExit, match='at step 5 is not finite.*ckpt.pt of step 4'):
            config.save(run, 'ckpt.pt', dict(step=5), resumable=True)
        last.copy_(kept)
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    config.save(run, 'ckpt.pt', dict(step=5), resumable=True)  # all of it is whole again


def test_a_float16_run_counts_the_steps_it_skips_and_ends_if_it_skips_them_all(root, tmp_path):
    run, data = built('gpt', root, tmp_path, '--param_dtype=float32', '--dtype=float16')
    meter = config.Meter(run, 0, 128, 'tokens')
    next(run.model.parameters()).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(SystemExit, match='every gradient at step 40 is not finite.*no checkpoint'):
        for step in range(40):
            meter.add(*train_gpt.train_step(run, step, lambda micro_step: data.batch(8, step)))
            if step in (3, 39):
                meter.line(step + 1, 0.1)
    assert [(line['step'], line['skipped_steps'], line['loss_scale']) for line in records(tmp_path)] == [(4, 4, 4096)]


@pytest.mark.parametrize('script', SCRIPTS)
def test_auto_begins_or_goes_on_and_names_what_changed(root, tmp_path, capsys, script):
    train(script, root, tmp_path, '--init_from=auto')
    assert 'resumed' not in capsys.readouterr().out
    assert train(script, root, tmp_path, '--init_from=auto', '--max_iters=8', '--beta1=0.8')['step'] == 8
    assert 'resumed with other settings than before: max_iters 4 -> 8, beta1 0.9 -> 0.8\n' in capsys.readouterr().out


def test_a_run_goes_on_with_the_data_it_began_with(root, tmp_path, capsys):
    train('gpt', root, tmp_path / 'run')
    prepare_text(tmp_path, numbered(tmp_path / 'other.txt'), '--name', 'tiny')
    words = tiny('gpt', tmp_path, tmp_path / 'run', '--init_from=resume', '--max_iters=8')
    refused(capsys, lambda: start(train_gpt, words), "'tiny' is not the one that this run began with")


class Signals(Stops):
    """One that sends the signal a moment later, when the evaluation of the step has begun."""

    def write(self, text):
        if f'step {self.step:>6} | train' in text:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return io.StringIO.write(self, text)


def test_a_signal_ends_an_evaluation(root, tmp_path):
    train('gpt', root, tmp_path, '--max_iters=3')
    with contextlib.redirect_stdout(Signals(4)):
        stopped = train('gpt', root, tmp_path, '--init_from=resume', '--max_iters=8', '--eval_iters=1000000000')
    assert stopped['step'] == 4 and 4 not in logged(tmp_path, 'val_loss')


# -----------------------------------------------------------------------------
# damaged files and kills: SLOW=1 makes thousands of damages, and 120 kills

DAMAGES = 1000 if os.environ.get('SLOW') else 12  # of each kind of file
NUMBERS = b'9' * 5000, b'-1', b'1e999', b'null', b'"x"', b'[]'


def damaged(whole, rng):
    """A file with one to three damages, half of them near an end."""
    whole = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        size = len(whole) + 1
        near = rng.integers(min(size, 300))
        at, to = rng.choice([rng.integers(size), rng.integers(size), near, size - 1 - near], 2).tolist()
        many = int(rng.choice([1, 8, 1 + size // 4]))
        number = re.compile(rb'\d+').search(bytes(whole), at)
        kind = rng.integers(7)
        if kind == 0:
            whole[at:at + 1] = bytes(byte ^ 1 << rng.integers(8) for byte in whole[at:at + 1])
        elif kind == 1:
            del whole[at:]
        elif kind == 2:
            whole[at:at] = rng.bytes(many % 17)
        elif kind == 3:
            whole[at:at + many] = bytes(len(whole[at:at + many]))
        elif kind == 4:
            del whole[at:at + many]
        elif kind == 5:  # two fields change places
            whole[at:at + many], whole[to:to + many] = whole[to:to + many], whole[at:at + many]
        elif number:
            whole[slice(*number.span())] = NUMBERS[rng.integers(len(NUMBERS))]
    return bytes(whole)


@pytest.fixture(scope='module')
def readers(root, tmp_path_factory):
    """{name: (file, what reads it and gives what was read, whether a checksum can know)}"""
    folder = tmp_path_factory.mktemp('readers')
    words = method('galolte', '--n_layer=1')
    train('gpt', root, folder / 'gpt', *words)
    train('vit', root, folder / 'vit', '--n_layer=1')
    shutil.copytree(root / 'tiny', folder / 'tiny', ignore=shutil.ignore_patterns('*.verified'))
    torch.save(saved(folder / 'vit', 'best.pt')['model'], folder / 'timm.pt')
    config.save_adapter(tiny_vit(), f'{folder}/adapter.safetensors', {})
    safetensors.torch.save_file(tiny_vit().state_dict(), folder / 'vit.safetensors')
    counts = dict.fromkeys(('train', 'val', 'test'), 9)
    archive(folder, counts=counts)
    numbered(folder / 'a.txt', 300)
    (folder / 'a.jsonl').write_text(''.join(f'{{"text": "line {i}", "n": {i}}}\n' for i in range(99)))
    parquet(folder / 'a.parquet', text=[f'text {i}' for i in range(99)])

    def resumed(path):
        run, _ = built('gpt', root, folder / 'gpt', *words, checkpoint=config.load_checkpoint(path))
        return lowrank.gather_state(run.model, run.optimizer)

    def adapted(path):
        vit = tiny_vit()
        config.load_adapter(vit, path, {})
        return dict(vit.state_dict())

    def weights(path):
        shape = dict(model=None, n_layer=None, n_embd=None, n_head=None, img_size=28, patch_size=14)
        return train_vit.read_weights(path, shape, ['normal', 'pneumonia'], 'xrays', False)[1]

    def tokens(path):
        data, unsound = prepare.Tokens('tiny', 'train', 8, folder), []
        x = data.batch(4, 0)
        prepare.verify(folder / 'tiny', data.meta['shards'], unsound)
        for error in unsound:
            raise error
        return list(x)

    def lines(path):
        config.start_run({**saved(folder / 'gpt')['settings'], 'init_from': 'resume'}, 4)
        return [record['step'] for record in records(folder / 'gpt')]

    def prepared(*words):
        def read(path):
            shutil.rmtree(folder / 'out', ignore_errors=True)
            prepare.main([*words, '--data_dir', str(folder), '--name', 'out'])
            return files_of(folder / 'out')
        return read
    text = {name: prepared('text', '--tokenizer', 'bytes', '--input', str(folder / name))
            for name in ('a.txt', 'a.jsonl', 'a.parquet')}
    return {name: (folder / name, read, name in KNOWN) for name, read in {
        'gpt/ckpt.pt': resumed, 'vit/best.pt': weights, 'timm.pt': weights, 'vit.safetensors': weights,
        'adapter.safetensors': adapted, 'tiny/train_000000.bin': tokens, 'tiny/meta.json': tokens,
        'tiny/meta.json.verified': tokens, 'gpt/log.jsonl': lines,
        'pathmnist.npz': prepared('pathmnist', '--path', str(folder)), **text}.items()}


KNOWN = ('gpt/ckpt.pt', 'vit/best.pt', 'timm.pt', 'adapter.safetensors', 'tiny/train_000000.bin',
         'tiny/meta.json.verified', 'pathmnist.npz')


@pytest.mark.parametrize('name', [*KNOWN, 'vit.safetensors', 'tiny/meta.json', 'gpt/log.jsonl', 'a.txt', 'a.jsonl',
                                  'a.parquet'])
def test_any_damage_is_one_sentence_or_without_effect_where_a_checksum_can_know(readers, name):
    path, read, known = readers[name]
    wanted, whole = read(str(path)), path.read_bytes()
    try:
        for seed in range(DAMAGES):
            path.write_bytes(damaged(whole, np.random.default_rng(seed)))
            try:
                assert same_state(read(str(path)), wanted) or not known, seed
            except (ValueError, OSError) as error:
                said = str(error)
                assert (path.name in said or path.parent.name in said) and '\n' not in said, (seed, said)
    finally:
        path.write_bytes(whole)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('kind', ['zip', 'old', 'pickle', 'safetensors'])
def test_no_code_of_a_file_runs(readers, tmp_path, kind):
    path, ran = f'{tmp_path}/weights.{kind}', tmp_path / 'ran'
    if kind in ('zip', 'old'):
        torch.save({'head.bias': RunsCode(ran)}, path, _use_new_zipfile_serialization=kind == 'zip')
    else:
        with open(path, 'wb') as file:
            pickle.dump(RunsCode(ran), file)
    for read in (readers['vit.safetensors'][1], config.load_checkpoint):
        with pytest.raises(ValueError, match=f"weights.{kind}' is damaged or"):
            read(path)
        assert not ran.exists()
    with open(path, 'rb') as file, contextlib.suppress(Exception):  # it would have
        (torch.load(file, weights_only=False) if kind in ('zip', 'old') else pickle.load(file))
    assert ran.exists()


def test_what_is_whole_and_wrong_is_one_sentence(root, readers, tmp_path, capsys):
    def says(path, content, message, read):
        whole = path.read_bytes()
        path.write_bytes(content(whole) if callable(content) else content)
        with pytest.raises((ValueError, OSError), match=message) as refusal:
            read(str(path))
        assert '\n' not in str(refusal.value)
        path.write_bytes(whole)
    path, read, _ = readers['gpt/ckpt.pt']
    says(path, lambda whole: whole[:-99], 'ckpt.pt.* is truncated', read)
    path, read, _ = readers['adapter.safetensors']
    says(path, lambda whole: whole.replace(b'"F64"', b'"I64"'), 'damaged: its .* is torch.int64', read)
    path, read, _ = readers['pathmnist.npz']
    encrypted = lambda whole: re.sub(rb'(?s)(PK\x01\x02....)\0', rb'\1\1', whole)
    for content in (encrypted, lambda whole: whole.replace(b"{'descr", b'{((((((')):  # which numpy cannot parse
        says(path, content, 'pathmnist.npz.*damaged', read)
    path, read, _ = readers['a.jsonl']
    says(path, b'{"text": ' + b'1' * 5000 + b'}', "line 1 of '.*a.jsonl' has no string", read)
    says(path, b'\0' * 9, 'a.jsonl.*NUL', read)
    path, read, _ = readers['a.parquet']
    parquet(tmp_path / 'b.parquet', text=[1, 2])
    says(path, (tmp_path / 'b.parquet').read_bytes(), "a.parquet.*'text' of strings .it holds int", read)
    path, read, _ = readers['tiny/train_000000.bin']
    says(path, lambda whole: whole[:-50] + b'\xff' * 50, 'train_000000.bin', read)
    data = prepare.Tokens('tiny', 'train', 8, root)
    data.shards = [np.full_like(shard, 300) for shard in data.shards]
    with pytest.raises(OSError, match='token 300, and there are 257.*--overwrite.*tiny'):  # verify is not yet there
        data.batch(4, 0)
    # weights that are not finite, before anything trains; a data set with code
    state = tiny_vit().state_dict()
    state['norm.bias'][3] = math.nan
    safetensors.torch.save_file(state, tmp_path / 'nan.safetensors')
    refused(capsys, lambda: train('vit', root, tmp_path / 'a', f'--init_from={tmp_path}/nan.safetensors'),
            'norm.bias is not finite', 'nan.safetensors')
    hub = tmp_path / 'hub'
    (hub / '3.0.0').mkdir(parents=True)
    parquet(hub / '3.0.0' / 'train-0.parquet', article=['a'], highlights=['b'])
    (hub / 'hub.py').write_text(f'import os\nos.mkdir({str(tmp_path / "ran")!r})')
    with pytest.raises(prepare.DataError, match='hub'):
        prepare.main(['cnn_dailymail', '--path', str(hub), '--data_dir', str(tmp_path), '--tokenizer', 'bytes'])
    assert not (tmp_path / 'ran').exists()


KILLED = [f'{script}_{name}' for name in 'full mhlora lora_fa relora lte galore galore_lean galolte'.split()
          for script in SCRIPTS]


@pytest.mark.skipif('SLOW' not in os.environ, reason='SLOW=1 kills each of 24 runs five times')
@pytest.mark.parametrize('name', KILLED)
def test_a_run_that_is_killed_goes_on_bit_for_bit(root, tmp_path, name):
    (script, which), rng = name.split('_', 1), np.random.default_rng(KILLED.index(name))

    def words(out):
        return tiny(script, root, out, *method(which), '--max_iters=40', '--log_interval=1', '--init_from=auto')
    start(SCRIPTS[script], words(tmp_path / 'a'))
    command, kills = [sys.executable, f'{HERE}/train_{script}.py', *map(str, words(tmp_path / 'b'))], 0
    while kills < 5:
        ran, lines = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), int(rng.integers(2, 16))
        if len([*itertools.islice(ran.stdout, lines)]) == lines:  # a checkpoint follows on the fifth, tenth, ...
            time.sleep(rng.uniform(0, 0.02))
            ran.kill()
            kills += 1
        ran.communicate()
    subprocess.run(command, check=True, capture_output=True)
    for part in ('ckpt.pt', 'best.pt'):
        assert same_run(saved(tmp_path / 'a', part), saved(tmp_path / 'b', part))
    for key in ('val_loss', 'train_loss', 'test_loss'):
        assert logged(tmp_path / 'a', key) == logged(tmp_path / 'b', key)
