"""The tests of memory.py and compare.py: `python -m pytest -q extras/test_memory.py`."""
import gc
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from extras import compare, memory

torch.set_num_threads(1)
SHAPE = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=8', '--rank=8', '--device=cpu',
         '--gradient_accumulation_steps=3', '--dtype=float32', '--compile=False']
TEXT = ['--block_size=64', '--vocab_size=300']
SCRIPTS = {'gpt': [*TEXT, '--dropout=0.1'], 'llama': [*TEXT, '--size=', '--intermediate_size=48'],
           'vit': ['--model_name=vit_tiny_patch16_224', '--img_size=32', '--patch_size=16']}


def arguments(script, method, *more):
    return [f'{HERE}/train_{script}.py', f'{HERE}/config/methods/{method}.py', *SHAPE,
            *SCRIPTS[script], *more]


def peak_of_a_run(argv, monkeypatch):
    """By the allocator of a CPU."""
    monkeypatch.setattr(sys, 'argv', argv)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        runpy.run_path(argv[0], run_name='__main__')
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == '[memory]' and abs(event.nbytes()) != 2**25 - 2**16]  # for glibc
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize('script,method,more', [
    ('gpt', 'adamw', []), ('gpt', 'galore', []), ('gpt', 'galore_svd', []), ('gpt', 'lte', []),
    ('llama', 'muon', []), ('llama', 'galolte', ['--outer_momentum=0.9']),
    ('llama', 'relora', ['--gradient_checkpointing=True']), ('llama', 'mhlora', []),
    ('vit', 'galore_muon', []), ('vit', 'lora', ['--freeze=True'])])
def test_prediction_is_what_a_real_run_takes(tmp_path, monkeypatch, script, method, more):
    """To the byte, over eleven steps of the script itself. But the allocator also sees what kernels
    take inside: mostly nothing, for convolutions much."""
    if script == 'vit':
        pytest.importorskip('timm')
    argv = arguments(script, method, '--update_proj_gap=10', *more)
    peaks, config = memory.predict(argv)
    memory.write_data(tmp_path, config)
    peak = peak_of_a_run([
        *argv, '--max_iters=11', '--eval_interval=11', '--init_from=scratch',
        f'--dataset={tmp_path}', f'--out_dir={tmp_path}/out',
        *(['--eval_iters=1'] if script != 'vit' else [])], monkeypatch)
    tolerance = {'vit': 0.5, 'llama': 0.004, 'gpt': 1e-5}[script]
    assert peak * (1 - tolerance) <= max(size for size, *_ in peaks) <= peak


@pytest.mark.parametrize('method', ['full', 'lora', 'galore'])
def test_prediction_for_fine_tuning(tmp_path, monkeypatch, method):
    pytest.importorskip('transformers')
    from extras.test_finetune import make_folder
    folder = make_folder(tmp_path / 'model')
    # read_model casts these, whereas float32 would stay in the mapped file
    weights = load_file(f'{folder}/model.safetensors')
    weights = {name: x.bfloat16() for name, x in weights.items()}
    save_file(weights, f'{folder}/model.safetensors', {'format': 'pt'})
    argv = [f'{HERE}/extras/finetune.py', f'--model={folder}', f'--data={HERE}/README.md',
            f'--method={method}', '--rank=8', '--block_size=64', '--batch_size=4',
            '--update_proj_gap=2', '--device=cpu', '--dtype=float32']
    peaks, _ = memory.predict(argv)
    peak = peak_of_a_run([*argv, '--max_iters=3', '--eval_interval=3', '--eval_iters=1',
                          f'--out_dir={tmp_path}/out'], monkeypatch)
    assert 0.999 * peak <= max(size for size, *_ in peaks) <= peak


@pytest.mark.parametrize('method', ['adamw', 'galore', 'galore_muon', 'muon'])
def test_each_process_of_fsdp_has_its_rows(method):
    argv = [f'{HERE}/extras/train_fsdp.py', *arguments('llama', method)[1:]]
    two, eight = (memory.predict(argv, world_size)[0][0][1] for world_size in (2, 8))
    assert eight['weights'] < 0.3 * two['weights']
    assert eight['optimizer state'] < 0.5 * two['optimizer state']  # projections are whole


@pytest.mark.parametrize('more', [['--sync_bits=2'], ['--lowrank=galolte', '--sync_bits=2'],
                                  ['--lowrank=galolte']])
def test_local_sgd(more):
    argv = [f'{HERE}/extras/train_local.py', *SHAPE, *TEXT, '--merge_every=5', *more]
    (peak, parts, _), _ = memory.predict(argv, 4)[0]
    weights = 4 * (2 * 12 * 32**2 + 300 * 32)  # and some vectors
    assert weights < parts['weights'] < 2 * weights
    assert peak > 2 * weights


def test_edits_of_a_script_count(tmp_path):
    source = Path(HERE, 'train_gpt.py').read_text()
    edited = tmp_path / 'train_mine.py'
    edited.write_text(source.replace('# training\n', 'mine = torch.zeros(2**20, device=device)\n'))
    argv = arguments('gpt', 'adamw')
    before, after = (memory.predict(changed)[0] for changed in (argv, [str(edited), *argv[1:]]))
    assert [peak for peak, *_ in after] == [peak + 4 * 2**20 for peak, *_ in before]


def test_ddp_has_a_copy_of_the_gradients():
    """But not of LTE's heads, of which each process has its own."""
    def gradients(method, world_size):
        (_, parts, _), _ = memory.predict(arguments('llama', method), world_size)[0]
        return parts['gradients']

    rest = 4 * (2 * 300 * 32 + 5 * 32)  # of embeddings and norms
    assert gradients('adamw', 2) == 2 * gradients('adamw', 1)
    assert gradients('lte', 2) == (gradients('lte', 1) - rest) / 2 + 2 * rest


@pytest.mark.skipif(not shutil.which('g++'), reason='needs g++')
def test_command_on_fake_cuda_tensors():
    argv = [argument for argument in arguments('llama', 'adamw')
            if not argument.startswith(('--device', '--dtype', '--compile'))]
    result = subprocess.run(
        [sys.executable, f'{HERE}/extras/memory.py', *argv, '--budget=1.1GB', '--n_embd=512'],
        capture_output=True, text=True, check=True, cwd=HERE)
    sizes = dict(re.findall(r'^([a-z ]+?) +([\d.]+) GB', result.stdout, re.M))
    parameters = 2 * (512 * (4 * 512 + 3 * 48 + 2)) + 512 + 2 * 300 * 512
    for kind, size in (('weights', 4), ('optimizer state', 8), ('gradients', 4)):
        assert float(sizes[kind]) == pytest.approx(size * parameters / 1e9, abs=1e-3)
    assert 'dtype=bfloat16' in result.stdout and 'loss.backward()' in result.stdout
    assert 'fits into 1.1GB' in result.stdout
    assert int(re.search(r'largest batch_size: (\d+)', result.stdout)[1]) > 8


def test_compare(tmp_path, capsys):
    logs = {'adamw': [dict(step=0, val_loss=3.0), dict(step=10, train_loss=2.5, ms=300.0),
                      dict(step=20, train_loss=2.2, ms=100.0), dict(step=20, val_loss=2.1)],
            'lte': [dict(step=0, val_loss=3.0),
                    dict(step=10, train_loss=2.0, ms=50.0, bytes=1.5e6, gb=0.07),
                    dict(step=15, val_loss=1.75), dict(step=20, val_loss=1.9)],
            'young': [dict(step=0, val_loss=3.0)]}
    for name, records in logs.items():
        (tmp_path / name).mkdir()
        text = ''.join(json.dumps(record) + '\n' for record in records)
        (tmp_path / name / 'log.jsonl').write_text(text)
    assert [r['seconds'] for r in compare.read(tmp_path / 'adamw')] == [0, 3, 4, 4]
    assert [r['seconds'] for r in compare.read(tmp_path / 'lte')] == [0, 0.5, 0.75, 1]
    compare.main([*(str(tmp_path / name) for name in logs), f'--to={tmp_path}/new/picture.png'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:4] == [['adamw', '20', '2.1000', '2.1000', '300.0'],
                         ['lte', '20', '1.9000', '1.7500', '50.0', '0.07', '1.5'],
                         ['young', '0', '3.0000', '3.0000']]
    assert (tmp_path / 'new/picture.png').stat().st_size > 10000
