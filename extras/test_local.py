"""The tests of train_local.py and two_bits.py: `python -m pytest -q extras/test_local.py`."""
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
import torch.distributed as dist

from extras import two_bits
from galore import LowRankOptimizer, generator_of
from model import GPT
from test_lowrank import (Textbook, arguments, close, data, double, forked, in_processes, normal,
                          parametrize, run, same)

# what a run of eight steps adds to the settings of train_gpt.py's tests
CASES = {'adam': '--outer_lr=0.7 --outer_momentum=0.8', 'mean': '', 'two bits': '--sync_bits=2',
         'muon': '--rule=muon --learning_rate=0.01 --gradient_accumulation_steps=2',
         'galolte': '--lowrank=galolte --outer_lr=0.7 --outer_momentum=0.8',
         'galolte muon two bits':
         '--lowrank=galolte --rule=muon --sync_bits=2 --outer_momentum=0.5'}


def train(data, out, case, *more):
    """Trains in float64 for eight steps, and returns the script's globals."""
    torch.set_default_dtype(double)
    try:
        return run('extras/train_local', *arguments('gpt', data, out, '--merge_every=2', *more,
                                                    *CASES[case].split()))
    finally:
        torch.set_default_dtype(torch.float32)


def saved(out, process=0, step=8):
    found = torch.load(Path(out, f'ckpt_{process}_{step}.pt'))
    return {key: x for key, x in found.items() if key != 'config'}


def logged(out, key):
    records = [json.loads(line) for line in open(Path(out, 'log.jsonl'))]
    return [record[key] for record in records if key in record]


@parametrize('world', [1, 2, 4])
@parametrize('case', ['adam', 'mean', 'muon', 'galolte'])
def test_workers_equal_the_textbook(data, tmp_path, case, world):
    in_processes(world, train, data, tmp_path / 'out', case, '--dropout=0')
    script = train(data, tmp_path / 'start', case, '--dropout=0', '--max_iters=0')
    model, optimizer, s = script['model'], script['optimizer'], SimpleNamespace(**script['config'])
    script['get_lr'].__globals__['max_iters'] = 8
    s.heads, s.projection = world, 'sketch'
    book = Textbook(model, optimizer, s, lambda: GPT(model.config).double())

    def draw(rows, rank, name, t, what=None):
        i = [*book.layers].index(name)
        if what is None:
            return book.layers[name].Q
        remaining = s.update_proj_gap - (t - optimizer.turns[i]) % s.update_proj_gap
        generator = generator_of(s.seed, i, t + remaining)
        return torch.randn(rows, rank, generator=generator, dtype=double)
    book.method.update(local_sgd=True, workers=world, split_batch=bool(s.lowrank), draw=draw,
                       get_lr=script['get_lr'])
    batches = []
    for step in range(8):
        last = script['windows']['train'][-1]
        starts = [np.random.default_rng((s.seed, step, micro)).integers(last, size=8)
                  for micro in range(s.gradient_accumulation_steps)]
        batches.append(script['get_batch']('train', np.concatenate(starts)))
    losses, (*_, workers) = zip(*book.train(batches))
    exact, found = book.evaluated(workers), saved(tmp_path / 'out')['model']
    close({name: found[name] for name in exact}, exact, 1e-8)
    pairs = [sum(losses[i:i + 2]).item() / 2 for i in range(0, 8, 2)]
    assert logged(tmp_path / 'out', 'train_loss') == pytest.approx(pairs, abs=1e-8)


def interrupted(how, *args):
    """Trains, but a process gets SIGINT in its third step, or process 1 dies when it would save for
    the second time, after the others."""
    step, replace = LowRankOptimizer.step, os.replace

    def step_and_interrupt(optimizer):
        step(optimizer)
        if optimizer.steps == 3 and os.environ.get('RANK') != '1':
            os.kill(os.getpid(), signal.SIGINT)

    def replace_or_die(source, target):
        if how == 'kill' and str(target).endswith('ckpt_1_8.pt'):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = replace_or_die  # in this process only
    LowRankOptimizer.step = step if how == 'kill' else step_and_interrupt
    train(*args)


# Step 4 is inside the windows of sketches. Moments, errors and B are different in each process.
@parametrize('case, how, world', [
    ('adam', 'ctrl-c', 1), ('muon', 'ctrl-c', 2), ('two bits', 'ctrl-c', 4),
    ('two bits', 'kill', 2), ('galolte', 'ctrl-c', 2), ('galolte muon two bits', 'ctrl-c', 4)])
def test_interrupted_run_resumes_bit_for_bit(data, tmp_path, case, how, world):
    in_processes(world, train, data, tmp_path / 'a', case)
    if how == 'kill':
        with forked(world, interrupted, how, data, tmp_path / 'b', case) as processes:
            processes[1].join(60)
            processes[0].kill()
        left = {path.name for path in (tmp_path / 'b').glob('ckpt*.pt')}
        assert left == {'ckpt_0_4.pt', 'ckpt_0_8.pt', 'ckpt_1_4.pt'}
    else:
        in_processes(world, interrupted, how, data, tmp_path / 'b', case)
        assert (tmp_path / 'b/ckpt_0_4.pt').exists()
    in_processes(world, train, data, tmp_path / 'b', case, '--init_from=resume')
    states = [saved(tmp_path / 'a', process) for process in range(world)]
    assert same(states, [saved(tmp_path / 'b', process) for process in range(world)])
    for state in states:  # all workers have the same weights
        close(*({name: x for name, x in each['model'].items() if 'error' not in name}
                for each in (state, states[0])), 0)
    assert logged(tmp_path / 'a', 'train_loss')[-2:] == logged(tmp_path / 'b', 'train_loss')[-2:]


# The log counts the bytes of the tensors in all calls of torch.distributed.
@parametrize('case, world', [('mean', 2), ('mean', 4), ('two bits', 4), ('galolte', 4),
                             ('galolte muon two bits', 2)])
def test_counted_bytes_are_what_is_sent(data, tmp_path, case, world):
    def count():
        sent, part = [], (world - 1) / world
        times = {'all_reduce': (0, 2 * part), 'broadcast': (0, part),
                 'all_to_all_single': (1, part), 'all_gather': (1, world - 1)}

        def counting(function, index, factor):
            def call(*args):
                if args[index].numel() > 2:  # not the loss, and not whether to stop
                    sent.append(factor * args[index].nbytes)
                return function(*args)
            return call
        for name, (index, factor) in times.items():
            setattr(dist, name, counting(getattr(dist, name), index, factor))
        train(data, tmp_path, case, '--eval_interval=40', '--max_iters=40', '--log_interval=20')
        if dist.get_rank() == 0:
            torch.save(sent, tmp_path / 'sent.pt')
    with patch.object(dist, 'destroy_process_group'):
        in_processes(world, count)
    sent, counted = sum(torch.load(tmp_path / 'sent.pt')), logged(tmp_path, 'bytes')
    size = sum(x.nbytes for name, x in saved(tmp_path, step=40)['model'].items()
               if name.endswith(('weight', 'bias')) and name != 'lm_head.weight')
    if case == 'galolte':  # best.pt is not training: its mean of all B, which are zero
        B = [x for name, x in saved(tmp_path, step=40)['model'].items() if name.endswith('.B')]
        sent -= 2 * sum(x.nbytes for x in B) * (world - 1) / world
    assert counted[-1] == pytest.approx(sent, rel=1e-12)
    if case == 'mean':  # 20 merges of all weights
        assert sent == 20 * 2 * size * (world - 1) / world
    if case == 'two bits':
        assert sent == pytest.approx(20 * 2 * size / 64 * 2.25 * (world - 1) / world, rel=0.01)


def test_two_bit_messages_keep_what_they_lose():
    def check():
        dist.init_process_group('gloo')
        error, sent, exact = torch.zeros(7, 33, dtype=double), 0, 0
        for step in range(20):
            xs = normal(4, 7, 33, seed=step)
            mean = two_bits.two_bit_mean(xs[dist.get_rank()], error)
            means, errors = ([torch.empty_like(x) for _ in range(4)] for x in (mean, error))
            dist.all_gather(means, mean)
            dist.all_gather(errors, error)
            assert all(torch.equal(mean, other) for other in means)
            sent, exact = sent + mean, exact + xs.mean(0)
            close(sent + sum(errors) / 4, exact, 1e-9)
        time.sleep(0.1)
        dist.destroy_process_group()
    in_processes(4, check)


# With an error larger than x, error feedback would diverge. What is not finite must stay so.
def test_error_of_two_bits_is_below_one():
    x = normal(2000, 64)
    for rows, most in ((x, 0.35), (x**9, 0.96), (torch.eye(64, dtype=double), 0.96), (0 * x, 0.96)):
        error = rows - two_bits.unpack(two_bits.pack(rows), double)
        assert error.norm() <= most * rows.norm()
    x[3, 5] = math.inf
    assert two_bits.unpack(two_bits.pack(x), double)[3].isnan().all()


# Errors of GaLoLTE are inside of the projection, and turn with it.
def test_errors_rotate_with_the_projection():
    layer = two_bits.TwoBitGaLoLTELinear(torch.nn.Linear(8, 12).double(), 3, 1, 2)
    layer.Q.copy_(torch.linalg.qr(normal(8, 3)).Q)
    layer.error.copy_(normal(12, 3, seed=1))
    before, Q = layer.error @ layer.Q.mT, torch.linalg.qr(normal(8, 3, seed=2)).Q
    layer.rotate(layer.Q.mT @ Q)
    close(layer.error @ Q.mT, before @ Q @ Q.mT)


# best.pt is what was evaluated.
@parametrize('case', ['two bits', 'galolte muon two bits'])
def test_quickstart_learns(data, tmp_path, case):
    argv = ['--block_size=32', '--dropout=0', '--rank=16', '--eval_interval=60']
    in_processes(2, train, data, tmp_path, case, *argv, '--max_iters=60')
    losses = logged(tmp_path, 'val_loss')
    assert losses[0] > 5 and losses[-1] < 4
    script = train(data, tmp_path / 'again', 'mean', *argv, '--max_iters=0')
    script['model'].load_state_dict(torch.load(tmp_path / 'best.pt')['model'])
    assert script['estimate_loss']() == pytest.approx(losses[-1], abs=1e-9)
