"""The tests of train_fsdp.py: `python -m pytest -q extras/test_fsdp.py`."""
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import galore
from galore import LowRankOptimizer, orthogonal
from test_lowrank import arguments, close, data, double, in_processes, parametrize, run, same

METHODS = ['adamw', 'muon', 'galore', 'galore_muon']
# sizes that four processes cannot share evenly: 257 tokens, 50 inner features, rank 7
UNEVEN = ['--intermediate_size=50', '--rank=7', '--gradient_accumulation_steps=2',
          '--update_proj_gap=6', '--weight_decay=0.1', '--grad_clip=0.5']


def train(data, out, name, *more, script='extras/train_fsdp'):
    """Trains in float64 for eight steps, and returns the script's globals."""
    torch.set_default_dtype(double)
    try:
        return run(script, *arguments('llama', data, out), f'config/methods/{name}.py', *UNEVEN,
                   *more)
    finally:
        torch.set_default_dtype(torch.float32)


def saved(out, name='ckpt.pt'):
    found = torch.load(Path(out, name))
    return {key: x for key, x in found.items() if key != 'config'}


def logged(out, key):
    records = [json.loads(line) for line in open(Path(out, 'log.jsonl'))]
    return [record[key] for record in records if key in record]


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """{(method, processes): folder}; 0 processes: train_llama.py."""
    folders = {}

    def folder(name, world):
        if (name, world) not in folders:
            folders[name, world] = out = tmp_path_factory.mktemp(f'{name}_{world}')
            if world:
                in_processes(world, train, data, out, name)
            else:
                train(data, out, name, script='train_llama')
        return folders[name, world]
    return folder


# The steps have two micro-batches, clipping and decay; GaLore takes new projections in them.
@parametrize('world', [2, 4])
@parametrize('name', METHODS)
def test_shards_train_as_train_llama(trained, name, world):
    one, several = trained(name, 0), trained(name, world)
    for key in ('val_loss', 'grad_norm'):
        assert logged(several, key) == pytest.approx(logged(one, key), abs=1e-9)
    assert len(logged(several, 'val_loss')) == 3
    best, others = saved(one, 'best.pt')['model'], saved(several, 'best.pt')['model']
    close(others, best, 1e-8)
    states = [saved(out)['optimizer']['state'] for out in (one, several)]
    assert [*states[0]] == [*states[1]]
    for i, state in states[0].items():
        close(states[1][i]['exp_avg'], state['exp_avg'], 1e-8)


def interrupted(how, *args):
    """Trains, but process 1 gets SIGINT in the third step, or process 0 dies when it would save for
    the second time."""
    step, replace = LowRankOptimizer.step, os.replace

    def step_and_interrupt(optimizer):
        step(optimizer)
        if optimizer.steps == 3 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGINT)

    def replace_or_die(source, target):
        if str(target).endswith('ckpt.pt') and os.path.exists(target):
            os._exit(0)
        replace(source, target)
    if how == 'kill':  # in this process only
        os.replace = replace_or_die
    else:
        LowRankOptimizer.step = step_and_interrupt
    train(*args)


# Steps 3 and 4 are inside the windows of sketches, of which each process has its own.
@parametrize('name, how, world', [
    ('adamw', 'ctrl-c', 2), ('muon', 'kill', 2), ('galore', 'ctrl-c', 4), ('galore', 'kill', 2),
    ('galore_muon', 'ctrl-c', 1)])
def test_interrupted_run_resumes_bit_for_bit(data, trained, tmp_path, name, how, world):
    in_processes(world, interrupted, how, data, tmp_path, name)
    assert saved(tmp_path)['step'] == (4 if how == 'kill' else 3)
    in_processes(world, train, data, tmp_path, name, '--init_from=resume')
    assert same(saved(trained(name, world)), saved(tmp_path))


# Without open sketches, the checkpoint of two processes is one for any number of them.
def test_other_number_of_processes_resumes(data, trained, tmp_path):
    in_processes(2, interrupted, 'ctrl-c', data, tmp_path, 'muon')
    in_processes(4, train, data, tmp_path, 'muon', '--init_from=resume')
    a, b = (saved(out, 'best.pt')['model'] for out in (trained('muon', 0), tmp_path))
    close(a, b, 1e-8)


# Each process holds its part of the weights and moments, and one element of GaLore's zeros. Muon's
# iterations are on whole matrices, of which each process has its part.
@parametrize('name', ['muon', 'galore'])
def test_what_a_process_holds(data, tmp_path, name):
    def check():
        matrices = []

        def spy(X):
            matrices.append(len(X.to_local()))
            return orthogonal(X)
        with patch.object(dist, 'destroy_process_group'), patch.object(galore, 'orthogonal', spy):
            script = train(data, tmp_path, name, '--n_embd=64', '--intermediate_size=96',
                           '--rank=8', '--vocab_size=320', '--max_iters=2')
        # two steps, 8 matrices of attention, 4 and 2 of MLP; process 0 and 1 get those two
        assert sum(matrices) == (2 * (2 + 1 + (dist.get_rank() < 2)) if name == 'muon' else 0)
        optimizer, model = script['optimizer'], script['model']
        sizes = {p: p.to_local().untyped_storage().nbytes() for p in model.parameters()}
        for layer in optimizer.projected.values():
            assert sizes.pop(layer.B) == 8
        tensors = [x for p, state in optimizer.state.items() for x in tree_leaves(state)
                   if torch.is_tensor(x) and x.numel() > 1]
        assert all(isinstance(x, DTensor) for x in tensors)
        assert sum(sizes.values()) == sum(p.nbytes for p in sizes) / 4
        for x in tensors:
            assert x.to_local().untyped_storage().nbytes() == x.numel() * 8 / 4
        time.sleep(0.1)
        dist.destroy_process_group()
    in_processes(4, check)


def test_learns_and_sample_reads_it(data, tmp_path, capsys):
    argv = ['--max_iters=60', '--eval_interval=60', '--rank=16', '--gradient_checkpointing=True']
    in_processes(2, train, data, tmp_path, 'galore', *argv)
    losses = logged(tmp_path, 'val_loss')
    assert losses[0] > 5 and losses[-1] < 3.6
    capsys.readouterr()
    run('sample', f'--out_dir={tmp_path}', '--prompt=00001 ', '--num_samples=2',
        '--max_new_tokens=5', '--device=cpu')
    assert capsys.readouterr().out.count('00001 ') == 2


def test_bfloat16_trains(data, tmp_path):
    def check():
        run('extras/train_fsdp', *arguments('llama', data, tmp_path), *UNEVEN,
            'config/methods/galore.py', '--dtype=bfloat16')
    in_processes(2, check)
    assert logged(tmp_path, 'val_loss')[-1] < logged(tmp_path, 'val_loss')[0] < 5.8


def test_mistakes_are_named(data, tmp_path):
    with pytest.raises(AssertionError, match='torchrun'):
        train(data, tmp_path, 'adamw')
    with pytest.raises(SystemExit):
        train(data, tmp_path, 'galore_svd')
