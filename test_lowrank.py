"""
The laws of the repository, one section for each room: `pytest test_lowrank.py`. Equalities are checked in float64
against independent formulations; the scripts run for real, on tiny data.
"""

import copy
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile

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


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A byte-level data set 'tiny' of some tens of documents, made by the real writer."""
    root = tmp_path_factory.mktemp('data')
    lines = [json.dumps({'text': f'document {i}: ' + ' '.join(str(i * j % 97) for j in range(60))}) for i in range(120)]
    (root / 'tiny.jsonl').write_text('\n'.join(lines))
    prepare.main(['text', '--input', str(root / 'tiny.jsonl'), '--tokenizer', 'bytes', '--name', 'tiny',
                  '--root', str(root)])
    return str(root)


def tiny(data_dir, out_dir, *words):
    """The settings of a tiny run in float64."""
    return [f'--data_dir={data_dir}', f'--out_dir={out_dir}', '--dataset=tiny', '--block_size=16', '--n_layer=2',
            '--n_head=2', '--n_embd=16', '--batch_size=4', '--eval_iters=2', '--eval_interval=4',
            '--log_interval=2', '--warmup_iters=2', '--lr_decay_iters=20', '--learning_rate=0.01',
            '--param_dtype=float64', '--dtype=float64', '--device=cpu', '--max_iters=4', *words]


def train(data_dir, out_dir, *words):
    """Runs train_gpt.py's main on a tiny model and returns the checkpoint it ends with."""
    train_gpt.main(tiny(data_dir, out_dir, *words))
    return config.load_checkpoint(f'{out_dir}/ckpt.pt')


def refused(capsys, call, *needles):
    """The call ends with exit code 2 and one line on stderr that holds every needle."""
    with pytest.raises(SystemExit) as ended:
        call()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count('\n') == 1 and said.startswith('error: '), said
    for needle in needles:
        assert needle in said, said


def a_llama_resumes_bit_for_bit(data_dir, tmp_path, words):
    """Eight steps of train_llama.py are those of four and four more, and it learns."""
    def run(out, *more):
        train_llama.main(tiny(data_dir, tmp_path / out, *words, *more))
        return config.load_checkpoint(f'{tmp_path}/{out}/ckpt.pt')
    whole = run('a', '--max_iters=8')
    run('b')
    resumed = run('b', '--max_iters=8', '--init_from=resume')
    for key in ('model', 'optimizer', 'step', 'best_val_loss'):
        assert same_state(whole[key], resumed[key]), key
    log = [json.loads(line) for line in open(tmp_path / 'a' / 'log.jsonl')]
    assert log[-1]['val_loss'] < log[0]['val_loss']


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return models.GPT(models.GPTConfig(**{**dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16),
                                          **changes}))


# -----------------------------------------------------------------------------
# config


def test_settings_file_sees_the_defaults_and_the_command_line_wins(tmp_path):
    (tmp_path / 'a.py').write_text('import math\n_half = rate / 2\nrate = _half\nshape = (1, 2)\nflag = True\n'
                                   'name = "x"\n')
    known = dict(rate=1.0, shape=(3,), flag=False, name='', limit=None, count=1)
    space = {}
    got = config.load(space, known, ['--name=7', str(tmp_path / 'a.py'), '--count=3', '--limit=2'])
    assert got == dict(rate=0.5, shape=(1, 2), flag=True, name='7', limit=2, count=3)
    assert {key: space[key] for key in known} == got
    assert config.load(space, known, ['--rate=2', '--limit=None'])['rate'] == 2.0  # int for float; nothing left over
    (tmp_path / 'b.py').write_text('rates = [1, 2]\nrate = rates[1]\n')  # what else a file needs to compute with
    assert config.load({}, known, [str(tmp_path / 'b.py'), "--name='x y'"]) == {**known, 'rate': 2.0, 'name': 'x y'}
    assert space['name'] == ''


@pytest.mark.parametrize('word, needles', [
    ('--learning_rat=1', ['learning_rat', "'learning_rate'"]), ('--heads=many', ['heads', 'str', 'int']),
    ('--compile=1', ['compile', 'int', 'bool']), ('--heads=True', ['bool', 'int']), ('--rank', ['--rank=value']),
    ('--n_layer=None', ['NoneType', 'int']), ('--vocab_size=abc', ['str', 'int']),
    ('config/nowhere.py', ['nowhere.py'])])
def test_a_wrong_setting_is_one_sentence(capsys, word, needles):
    refused(capsys, lambda: config.load({}, train_gpt.defaults, [word]), *needles)


@pytest.mark.parametrize('text, needles', [
    ("lowrank = ['attn', 'mlp']", ['lowrank', 'list', 'str']),
    ('lerning_rate = 1.0', ['lerning_rate', "'learning_rate'"]),
    ("lowrank = 'attn", ['SyntaxError']), ('max_iters = many * 2', ['NameError', 'many'])])
def test_a_wrong_config_file_is_one_sentence(tmp_path, capsys, text, needles):
    (tmp_path / 'a.py').write_text(text)
    refused(capsys, lambda: config.load({}, train_gpt.defaults, [str(tmp_path / 'a.py')]), 'a.py', *needles)


def test_a_typo_answers_before_torch_is_imported():
    ran = subprocess.run([sys.executable, '-X', 'importtime', 'train_gpt.py', '--learning_rat=1'], cwd=HERE,
                         capture_output=True, text=True)
    lines = [line for line in ran.stderr.splitlines() if not line.startswith('import time:')]
    assert ran.returncode == 2 and len(lines) == 1 and 'learning_rate' in lines[0]
    assert 'torch' not in ran.stderr


def test_every_config_file_is_accepted_and_says_what_it_is():
    for name in sorted(os.listdir(f'{HERE}/config')):
        if name.endswith('.py') and name != '__init__.py':
            path = f'{HERE}/config/{name}'
            with open(path, encoding='utf-8') as file:
                head = [file.readline() for _ in range(3)]
            assert head[0].startswith('# ') and 'train_' in head[1] and ':' in head[2], name
            script = {'llama': train_llama, 'vit': train_vit}.get(name.split('_')[0], train_gpt)
            assert config.load({}, script.defaults, [path])['out_dir'] == f'out/{name[:-3]}'


def test_learning_rate_warms_up_decays_and_restarts():
    def at(step, *restart):
        return config.learning_rate_at(step, 1.0, 10, 110, 0.1, *restart)
    assert at(0) == pytest.approx(1 / 11) and at(10) == 1.0
    assert at(60) == pytest.approx(0.55) and at(110) == at(500) == pytest.approx(0.1)
    assert at(50, 50, 4) == pytest.approx(at(50) / 5) and at(54, 50, 4) == at(54) and at(49, 50, 4) == at(49)


def test_a_checkpoint_is_whole_or_refused(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    config.save_checkpoint(path, {'model': {'w': torch.ones(100)}, 'settings': {}, 'step': 1})
    old = open(path, 'rb').read()

    def crash(descriptor):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, 'fsync', crash)
    with pytest.raises(KeyboardInterrupt):
        config.save_checkpoint(path, {'model': {}, 'settings': {}, 'step': 2})
    assert open(path, 'rb').read() == old
    for bad in (old[:200], b'no', old[:-300]):
        (tmp_path / 'bad.pt').write_bytes(bad)
        with pytest.raises(ValueError, match='bad.pt'):
            config.load_checkpoint(str(tmp_path / 'bad.pt'))
    torch.save({'other': 1}, tmp_path / 'foreign.pt')
    with pytest.raises(ValueError, match='not a checkpoint of this project'):
        config.load_checkpoint(str(tmp_path / 'foreign.pt'))


# -----------------------------------------------------------------------------
# prepare


def write_text(path, lines=4000, seed=0):
    """A .txt of different lines of 9 to 40 bytes."""
    rng = np.random.default_rng(seed)
    path.write_text(''.join(f'{i:07d} ' + 'abcdefgh'[i % 8] * int(rng.integers(0, 32)) + '\n' for i in range(lines)))
    return path


def prepare_text(tmp_path, *options, name='mine', **kwargs):
    path = write_text(tmp_path / f'{name}.txt', **kwargs)
    command = ['text', '--input', str(path), '--name', name, '--root', str(tmp_path), '--tokenizer', 'bytes']
    prepare.main([*command, *options])
    return path


def all_tokens(root, name, split):
    return np.concatenate(prepare.Tokens(name, split, 1, root).shards)


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in ('.bin', '.json')}


def c4_folder(folder, documents=400):
    """The hub's layout of c4: two training files and one of validation."""
    (folder / 'en').mkdir(parents=True)
    for file in ('train.00000-of-01024', 'train.00001-of-01024', 'validation.00000-of-00008'):
        with gzip.open(folder / 'en' / f'c4-{file}.json.gz', 'wt') as out:
            for i in range(documents):
                row = {'text': f'{file} {i}\n' + 'word ' * (i % 40), 'timestamp': '2019-04-25T12:57:54Z', 'url': 'a'}
                out.write(json.dumps(row) + '\n')
    return folder


def test_every_window_once_an_epoch_for_1_2_and_3_ranks(tmp_path):
    prepare_text(tmp_path, '--shard_tokens', '20_000')
    data = prepare.Tokens('mine', 'train', 64, tmp_path)
    assert len(data.shards) > 2
    starts = [shard[i * 64:i * 64 + 65] for shard in data.shards for i in range((len(shard) - 1) // 64)]
    windows = {window.tobytes() for window in starts}  # x and y, with the line numbers in them: all different
    assert len(windows) == data.num_windows == len(starts)
    for world_size in (1, 2, 3):
        for epoch in (0, 1):  # batches do not divide the epoch: what counts is the row of sequences
            rows, first = [], epoch * data.num_windows
            for step in range(first // 12, (first + data.num_windows) // 12 + 1):
                ranks = [data.batch(12, step, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
                for j in range(12):
                    x, y = (t[j // world_size] for t in ranks[j % world_size])
                    if first <= step * 12 + j < first + data.num_windows:
                        rows.append(torch.cat([x, y[-1:]]).numpy().astype('<u2').tobytes())
                        assert torch.equal(x[1:], y[:-1])
            assert len(rows) == data.num_windows and set(rows) == windows


def test_order_depends_on_seed_and_epoch_and_nothing_else(tmp_path):
    prepare_text(tmp_path)
    data, again = (prepare.Tokens('mine', 'train', 32, tmp_path) for _ in range(2))
    x, y = data.batch(8, 3, 1, accumulation=2, seed=1)
    assert x.dtype == y.dtype == torch.int64 and x.shape == (8, 32) and x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x, again.batch(8, 3, 1, accumulation=2, seed=1)[0])
    assert torch.equal(x, data.batch(8, 7, seed=1)[0])  # step 3, micro-batch 1 of 2 is the seventh micro-batch
    assert not torch.equal(x, data.batch(8, 3, 1, accumulation=2, seed=2)[0])
    for size in (1, 2, 3, 5, 64, 65, 1000, 4097):
        orders = [prepare.permute(np.arange(size), size, 0, epoch) for epoch in range(4)]
        assert all(np.array_equal(np.sort(order), np.arange(size)) for order in orders)
        assert size < 64 or abs(np.corrcoef(orders[0], np.arange(size))[0, 1]) < 0.35
        assert size < 64 or not np.array_equal(orders[0], orders[1])


def test_rows_of_the_ranks_interleave_to_the_batch_of_one_rank(tmp_path):
    prepare_text(tmp_path)
    data = prepare.Tokens('mine', 'train', 16, tmp_path)
    whole = data.batch(12, 4, seed=3)
    fixed = data.fixed_batch(1, 3, 12)
    for world_size in (2, 3):
        for rank in range(world_size):
            for part, full in ((data.batch(12, 4, seed=3, rank=rank, world_size=world_size), whole),
                               (data.fixed_batch(1, 3, 12, rank, world_size), fixed)):
                assert all(torch.equal(part[i], full[i][rank::world_size]) for i in (0, 1))


def test_row_j_goes_to_the_same_global_head_for_every_number_of_ranks(tmp_path):
    prepare_text(tmp_path)
    data = prepare.Tokens('mine', 'train', 16, tmp_path)
    whole = data.batch(24, 2)[0]
    for heads, world_size in ((4, 1), (2, 2), (1, 4)):
        for rank in range(world_size):
            x = data.batch(24, 2, rank=rank, world_size=world_size, heads=heads)[0].view(heads, -1, 16)
            for head in range(heads):
                assert torch.equal(x[head], whole[head * world_size + rank::4])


def test_fixed_batches_spread_over_the_whole_split_without_repetition(tmp_path):
    prepare_text(tmp_path)
    data = prepare.Tokens('mine', 'val', 32, tmp_path)
    count = data.num_windows // 4
    rows = [tuple(row.tolist()) for i in range(count) for row in data.fixed_batch(i, count, 4)[0]]
    assert len(set(rows)) == len(rows) == count * 4
    assert torch.equal(data.fixed_batch(0, 2, 4)[0][0], torch.from_numpy(data.shards[0][:32].astype(np.int64)))


@pytest.mark.parametrize('vocab_size, item', [(257, 2), (65536, 2), (65537, 4)])
def test_shards_round_trip(tmp_path, vocab_size, item):
    class Numbers:  # an encoding whose tokens are the numbers in the text
        n_vocab, eot_token = vocab_size, vocab_size - 1

        def encode_to_numpy(self, text, disallowed_special):
            return np.array(text.split(), np.uint32)

    rows = [np.random.default_rng(i).integers(0, vocab_size - 1, 100) for i in range(50)]
    meta = {'limit': None, 'shard_tokens': 1000, 'val_below': 0, 'lowest_hash': 0, 'consumed': 0, 'shards': [],
            'tokens': {'train': 0, 'val': 0}, 'documents': {'train': 0, 'val': 0}}
    prepare.write_shards(tmp_path, meta, lambda: (('train', ' '.join(map(str, row)), True) for row in rows), Numbers())
    shards = [prepare.open_shard(tmp_path / shard['file'], shard['tokens']) for shard in meta['shards']]
    assert len(shards) == 5 and shards[0].dtype == f'<u{item}'
    assert np.array_equal(np.concatenate(shards), np.concatenate([np.append(row, vocab_size - 1) for row in rows]))
    header = (tmp_path / 'train_000000.bin').read_bytes()[:32]
    assert header == b'nLRshard' + struct.pack('<IIQQ', 1, item, 1010, 0)


@pytest.mark.parametrize('place, byte', [(0, b'X'), (8, b'\7'), (12, b'\3'), (16, b'\0'), (23, b'\1')])
def test_damaged_header_is_refused(tmp_path, place, byte):
    prepare_text(tmp_path, lines=200)
    path = tmp_path / 'mine' / 'train_000000.bin'
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + byte + whole[place + 1:])
    with pytest.raises(ValueError, match='train_000000.bin.*--overwrite'):
        prepare.Tokens('mine', 'train', 8, tmp_path)


@pytest.mark.parametrize('size', [0, 5, 32, -1, +1])
def test_truncated_shard_is_refused(tmp_path, size):
    prepare_text(tmp_path, lines=200)
    path = tmp_path / 'mine' / 'train_000000.bin'
    whole = path.read_bytes()
    path.write_bytes(whole + b'x' if size == 1 else whole[:size])
    with pytest.raises(ValueError, match='train_000000.bin.*--overwrite'):
        prepare.Tokens('mine', 'train', 8, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match='train_000000.bin.*missing.*--overwrite'):
        prepare.Tokens('mine', 'train', 8, tmp_path)


def test_missing_data_and_long_blocks_name_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="'c4' is not there: run 'python prepare.py c4"):
        prepare.Tokens('c4', 'train', 8, tmp_path)
    with pytest.raises(ValueError, match="'foo' is not there: run 'python prepare.py text --input FILE --name foo'"):
        prepare.ensure('foo')
    prepare_text(tmp_path, lines=200)
    longest = len(all_tokens(tmp_path, 'mine', 'val')) - 1
    assert prepare.Tokens('mine', 'val', longest, tmp_path).num_windows == 1
    with pytest.raises(ValueError, match=f'block_size {longest + 1} is longer .* {longest} or less'):
        prepare.Tokens('mine', 'val', longest + 1, tmp_path)
    with pytest.raises(ValueError, match="no split 'test'"):
        prepare.Tokens('mine', 'test', 8, tmp_path)
    (tmp_path / 'mine' / 'meta.json').unlink()
    with pytest.raises(FileNotFoundError, match='mine'):
        prepare.Tokens('mine', 'val', 8, tmp_path)


def test_stdlib_is_prepared_when_it_is_missing(tmp_path):
    prepare.ensure('stdlib', tmp_path)
    data = prepare.Tokens('stdlib', 'val', 256, tmp_path)
    assert data.vocab_size == 257 and data.meta['eot'] == 256 and data.meta['documents']['val'] >= 10
    assert 0.01 < data.meta['tokens']['val'] / data.meta['tokens']['train'] < 0.1
    assert 'def ' in prepare.tokenizer('bytes').decode(data.shards[0].tolist())
    assert sum(data.shards[0] == 256) == data.meta['documents']['val']  # documents are separated
    assert not os.path.exists(tmp_path / 'stdlib' / 'progress.json') and not list((tmp_path / 'stdlib').glob('*.tmp'))


def test_validation_is_not_the_tail_and_nothing_is_lost(tmp_path):
    path = prepare_text(tmp_path)
    parts = {s: prepare.tokenizer('bytes').decode(all_tokens(tmp_path, 'mine', s).tolist()) for s in ('train', 'val')}
    lines = {split: [int(line.split()[0]) for line in text.replace('<|endoftext|>', '').splitlines()]
             for split, text in parts.items()}
    assert sorted(lines['train'] + lines['val']) == list(range(len(path.read_text().splitlines())))
    assert lines['train'][-1] > lines['val'][-1] or lines['val'][0] < lines['train'][len(lines['train']) // 2]
    assert parts['train'].endswith('<|endoftext|>') and parts['val'].endswith('<|endoftext|>')
    for text in parts['train'].split('<|endoftext|>')[:-1]:  # runs of lines that follow each other
        numbers = [int(line.split()[0]) for line in text.splitlines()]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    meta = prepare.Tokens('mine', 'train', 8, tmp_path).meta
    assert 0.005 < meta['tokens']['val'] / meta['tokens']['train'] < 0.15


def test_documents_are_separated_and_a_document_keeps_its_split(tmp_path):
    import pyarrow
    import pyarrow.parquet
    texts = [f'document {i} — ü' for i in range(300)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in texts[:150]) + '\n\n')
    pyarrow.parquet.write_table(pyarrow.table({'text': texts[150:] + [None]}), tmp_path / 'b.parquet')
    splits = []
    for order in (['a.jsonl', 'b.parquet'], ['b.parquet', 'a.jsonl']):
        files = [str(tmp_path / file) for file in order]
        prepare.main(['text', '--input', *files, '--tokenizer', 'bytes', '--overwrite', '--root', str(tmp_path)])
        splits.append([prepare.tokenizer('bytes').decode(all_tokens(tmp_path, 'text', split).tolist())
                       .split('<|endoftext|>')[:-1] for split in ('train', 'val')])
    (train, val), (train2, val2) = splits
    assert sorted(train + val) == sorted(texts) and 3 <= len(val) <= 40
    assert sorted(val) == sorted(val2) and train != train2


def test_a_handful_of_documents_still_gives_both_splits(tmp_path):
    for lines in (8, 20, 100):
        prepare_text(tmp_path, name=f'tiny{lines}', lines=lines)
        meta = prepare.Tokens(f'tiny{lines}', 'val', 8, tmp_path).meta
        assert 0 < meta['tokens']['val'] < meta['tokens']['train'] + 300
    (tmp_path / 'one.txt').write_text('one line\n')
    with pytest.raises(prepare.DataError, match='too little text'):
        prepare.main(['text', '--input', str(tmp_path / 'one.txt'), '--tokenizer', 'bytes', '--root', str(tmp_path)])


def test_bad_bytes_are_replaced_and_counted(tmp_path, capsys):
    good = ''.join(f'line {i} ä\n' for i in range(3000)).encode()
    at = good.index(b'\n', 1000)
    (tmp_path / 'a.txt').write_bytes(good[:at] + b'\xff\xfe\xe2' + good[at:])
    (tmp_path / 'b.jsonl').write_bytes(b'{"text": "caf\xe9 \\ud800 end"}\n')
    prepare.main(['text', '--input', str(tmp_path / 'a.txt'), str(tmp_path / 'b.jsonl'), '--tokenizer', 'bytes',
                  '--root', str(tmp_path)])
    meta = prepare.Tokens('text', 'train', 8, tmp_path).meta
    assert meta['replaced_bytes'] == 6 and '6 bytes that were not UTF-8' in capsys.readouterr().out
    both = b''.join(all_tokens(tmp_path, 'text', s)[all_tokens(tmp_path, 'text', s) < 256].astype(np.uint8).tobytes()
                    for s in ('train', 'val')).decode()
    assert both.count('\ufffd') == 5 and both.count('ä') == 3000


@pytest.mark.parametrize('file, content, message', [
    ('a.txt', b'', 'a.txt.*is empty'), ('a.txt', b' \n\n', 'a.txt.*is empty'), ('a.jsonl', b'\n', 'a.jsonl.*is empty'),
    ('a.txt', b'x' * 100_000 + b'\0', 'a.txt.*is binary'), ('a.jsonl', b'\0\1', 'a.jsonl.*is binary'),
    ('a.jsonl', b'{"text": "x"}\n{"txt": 1}\n', 'line 2 of.*a.jsonl'), ('a.jsonl', b'[1', 'line 1 of.*a.jsonl'),
    ('a.parquet', b'PAR2', 'a.parquet.*no parquet'), ('a.pdf', b'x', 'a.pdf.*no .txt')])
def test_empty_and_binary_files_are_refused_by_name(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(prepare.DataError, match=message):
        prepare.main(['text', '--input', str(tmp_path / file), '--tokenizer', 'bytes', '--root', str(tmp_path)])
    assert not list((tmp_path / 'text').glob('*.bin')) and not (tmp_path / 'text' / 'meta.json').exists()


def test_cnn_dailymail_comes_from_a_folder_in_the_layout_of_the_hub(tmp_path):
    import pyarrow
    import pyarrow.parquet
    (tmp_path / '3.0.0').mkdir()
    for split, file in (('train', 0), ('train', 1), ('validation', 0)):
        ids = [f'{split}{file}{i}' for i in range(5)]
        rows = {'article': [f'article {i}' for i in ids], 'highlights': [f'short {i}' for i in ids], 'id': ids}
        path = tmp_path / '3.0.0' / f'{split}-0000{file}-of-0000{1 + (split == "train")}.parquet'
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    prepare.main(['cnn_dailymail', '--path', str(tmp_path), '--tokenizer', 'bytes', '--root', str(tmp_path)])
    train, val = (prepare.tokenizer('bytes').decode(all_tokens(tmp_path, 'cnn_dailymail', split).tolist())
                  for split in ('train', 'val'))
    assert train == ''.join(f'article train{f}{i}\n\nshort train{f}{i}<|endoftext|>' for f in (0, 1) for i in range(5))
    assert val == ''.join(f'article validation0{i}\n\nshort validation0{i}<|endoftext|>' for i in range(5))


@pytest.mark.parametrize('renames', [0, 1, 2, 7, 8, 9, 10])  # shards and progress.json
def test_c4_goes_on_after_an_interruption_as_if_there_had_been_none(tmp_path, monkeypatch, renames):
    path = c4_folder(tmp_path / 'hub')
    command = ['c4', '--path', str(path), '--tokenizer', 'bytes', '--shard_tokens', '18_000', '--root']
    prepare.main([*command, str(tmp_path / 'whole')])
    whole, folder = shard_bytes(tmp_path / 'whole' / 'c4'), tmp_path / 'parts' / 'c4'
    assert len(whole) == 10
    with monkeypatch.context() as patch:
        done, replace = [], os.replace

        def stop(*paths):
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(replace(*paths))

        patch.setattr(os, 'replace', stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.main([*command, str(tmp_path / 'parts')])
    for name, content in shard_bytes(folder).items():
        assert name == 'progress.json' or content == whole[name]  # whatever has the name of a shard is whole
    begun = (folder / 'progress.json').exists()
    assert begun == (renames > 1)
    with pytest.raises(FileNotFoundError, match='only half prepared' if begun else 'not there'):
        prepare.Tokens('c4', 'train', 8, tmp_path / 'parts')
    if begun:
        progress = json.loads((folder / 'progress.json').read_text())['shards']
        kept = {shard['file']: (folder / shard['file']).stat().st_mtime_ns for shard in progress}
        with pytest.raises(prepare.DataError, match='limit None, not 7'):  # another command does not mix with it
            prepare.main([*command, str(tmp_path / 'parts'), '--tokens', '7'])
    prepare.main([*command, str(tmp_path / 'parts')])
    assert shard_bytes(folder) == whole
    if begun:  # the finished shards have not been written again
        assert kept == {name: (folder / name).stat().st_mtime_ns for name in kept}


def test_c4_keeps_its_own_validation_and_stops_at_the_tokens_asked_for(tmp_path):
    path = c4_folder(tmp_path / 'hub')
    command = ['c4', '--path', str(path), '--tokenizer', 'bytes', '--root', str(tmp_path)]
    prepare.main(command)
    files = {'train': ['train.00000-of-01024', 'train.00001-of-01024'], 'val': ['validation.00000-of-00008']}
    for split in files:
        text = prepare.tokenizer('bytes').decode(all_tokens(tmp_path, 'c4', split).tolist())
        assert [document.splitlines()[0] for document in text.split('<|endoftext|>')[:-1]] == [
            f'{file} {i}' for file in files[split] for i in range(400)]
    prepare.main([*command, '--tokens', '20_000', '--name', 'some'])
    tokens = prepare.Tokens('some', 'val', 8, tmp_path).meta['tokens']
    assert 20_000 <= tokens['train'] < 20_300


def test_a_kill_leaves_no_half_written_shard_and_the_rerun_equals_an_undisturbed_run(tmp_path):
    path = prepare_text(tmp_path, '--shard_tokens', '20_000', name='whole', lines=40_000)
    command = [sys.executable, prepare.__file__, 'text', '--input', str(path), '--name', 'killed', '--root',
               str(tmp_path), '--tokenizer', 'bytes', '--shard_tokens', '20_000']
    process = subprocess.Popen(command)
    folder = tmp_path / 'killed'
    while not (folder / 'train_000003.bin').exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for file in folder.glob('*.bin'):  # whatever has the name of a shard is one
        assert struct.unpack('<Q', file.read_bytes()[16:24])[0] == (file.stat().st_size - 32) // 2 > 0
    assert not (folder / 'meta.json').exists() and (folder / 'progress.json').exists()
    assert subprocess.run(command, check=True, capture_output=True).returncode == 0
    assert shard_bytes(folder) == shard_bytes(tmp_path / 'whole')


def test_a_prepared_data_set_is_only_overwritten_on_demand(tmp_path, capsys):
    prepare_text(tmp_path, lines=200)
    before = shard_bytes(tmp_path / 'mine')
    prepare_text(tmp_path, lines=200)
    assert 'already there' in capsys.readouterr().out
    with pytest.raises(prepare.DataError, match='holds a data set with source .* --overwrite'):
        prepare_text(tmp_path, lines=300)
    assert shard_bytes(tmp_path / 'mine') == before
    prepare_text(tmp_path, '--overwrite', lines=300)
    assert shard_bytes(tmp_path / 'mine') != before


def test_mistakes_in_the_command_are_one_sentence_and_exit_code_2(tmp_path):
    for command, message in (('stdlb', "did you mean 'stdlib'"), ('text', '--input'), ('c4', '--tokens'),
                             ('c4 --tokens 0', 'at least 1'), ('stdlib --tokns 3', '--tokns'),
                             (f'c4 --path {tmp_path}', 'en/c4-train'), ('stdlib --path x', '--path')):
        with pytest.raises(prepare.DataError, match=message):
            prepare.main([*command.split(), '--root', str(tmp_path / 'data')])
    run = subprocess.run([sys.executable, prepare.__file__, 'stdlb'], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == '' and run.stderr.count('\n') == 1 and 'Traceback' not in run.stderr
    assert not (tmp_path / 'data').exists()


def test_gpt2_tokens_round_trip(tmp_path):
    try:
        encoding = prepare.tokenizer('gpt2')
    except prepare.DataError as error:
        pytest.skip(str(error))
    path = write_text(tmp_path / 'a.txt', lines=500)
    prepare.main(['text', '--input', str(path), '--root', str(tmp_path)])
    data = prepare.Tokens('text', 'train', 8, tmp_path)
    assert data.vocab_size == 50257 and data.meta['eot'] == encoding.eot_token and data.shards[0].dtype == '<u2'
    text = ''.join(encoding.decode(all_tokens(tmp_path, 'text', s).tolist()) for s in ('train', 'val'))
    assert sorted(text.replace('<|endoftext|>', '').splitlines()) == sorted(path.read_text().splitlines())


# -----------------------------------------------------------------------------
# prepare: images

INFO = prepare.medmnist_info()
COUNTS = {'train': 1000, 'val': 30, 'test': 41}


def archive(folder, flag='pathmnist', size=28, compressed=False, counts=COUNTS, **changes):
    """An archive in MedMNIST's layout, of noise with every class in it; changes: other arrays."""
    rng, info = np.random.default_rng(0), INFO[flag]
    classes, arrays = len(info['label']), {}
    for split, count in counts.items():
        shape = (count, size, size, 3) if info['n_channels'] == 3 else (count, size, size)
        arrays[f'{split}_images'] = rng.integers(0, 256, shape, np.uint8)
        labels = rng.integers(0, 2, (count, classes)) if flag == 'chestmnist' else np.arange(count)[:, None] % classes
        arrays[f'{split}_labels'] = labels.astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{flag}{"" if size == 28 else f"_{size}"}.npz'
    (np.savez_compressed if compressed else np.savez)(path, **{**arrays, **changes})
    return path


def prepare_images(root, flag='pathmnist', *options):
    prepare.main([flag, '--path', str(root), '--root', str(root), '--shard_bytes', '1_000_000', *options])


@pytest.fixture(scope='module')
def image_root(tmp_path_factory):
    """A root with digits, digits_shifted and a tiny pathmnist in three training shards."""
    root = tmp_path_factory.mktemp('images')
    archive(root)
    prepare_images(root)
    for name in prepare.DIGITS:
        prepare.ensure(name, root)
    return root


@pytest.mark.parametrize('flag, size, compressed', [
    ('pathmnist', 28, False), ('pathmnist', 28, True), ('chestmnist', 28, True), ('pneumoniamnist', 28, False),
    ('retinamnist', 64, True)])
def test_images_are_those_of_medmnist_itself(tmp_path, flag, size, compressed):
    import medmnist
    archive(tmp_path, flag, size, compressed, {'train': 70, 'val': 30, 'test': 41})
    prepare_images(tmp_path, flag, '--size', str(size))
    name = flag if size == 28 else f'{flag}_{size}'
    for split in COUNTS:
        data = prepare.Images(name, split, tmp_path)
        x, y = data.fixed_batch(0, 100)
        theirs = getattr(medmnist, INFO[flag]['python_class'])(split, root=tmp_path, size=size)
        images, labels = zip(*(theirs[i] for i in range(len(data))))
        assert len(data) == theirs.imgs.shape[0] == data.meta['images'][split]
        assert x.dtype == torch.uint8 and x.is_contiguous() and x.shape[1:] == (data.channels, size, size)
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy().squeeze(), np.stack([np.array(image) for image in images]))
        multi = flag == 'chestmnist'
        assert y.dtype == (torch.float32 if multi else torch.int64) and y.ndim == 1 + multi
        assert np.array_equal(y.numpy().reshape(len(y), -1), np.stack(labels))
    assert data.meta['kind'] == 'images' and data.meta['flag'] == flag and data.task == INFO[flag]['task']
    assert data.classes == list(INFO[flag]['label'].values()) and data.num_classes == len(data.classes)
    assert data.channels == INFO[flag]['n_channels'] and data.size == size


def test_an_archive_that_medmnist_has_downloaded_is_not_downloaded_again(tmp_path):
    path = archive(tmp_path)
    info = {**INFO['pathmnist'], 'MD5': hashlib.md5(path.read_bytes()).hexdigest()}
    chunks = list(prepare.medmnist_images(path, 28, info, download=True))
    assert sum(len(labels) for _, labels, _ in chunks) == sum(COUNTS.values())


def test_image_shards_keep_the_contract(image_root):
    data = prepare.Images('pathmnist', 'train', image_root)
    assert [len(shard) for shard in data.shards] == [445, 445, 110]  # 1 MB read at a time
    for shard in data.meta['shards']:
        content = (image_root / 'pathmnist' / shard['file']).read_bytes()
        assert content[:32] == b'nLRshard' + struct.pack('<IIQQ', 1, 1 + 3 * 28 * 28, shard['images'], 0)
        assert hashlib.sha256(content).hexdigest() == shard['sha256']
    assert content[32] == data.fixed_batch(0, 1)[1].item() == 0  # the first image's label comes first
    assert not list((image_root / 'pathmnist').glob('*.tmp'))


def test_every_image_once_an_epoch_and_the_batch_depends_on_its_arguments_only(image_root):
    data, again = (prepare.Images('pathmnist', 'train', image_root) for _ in range(2))
    order = [torch.cat([data.batch(50, epoch * 20 + step, seed=1)[0] for step in range(20)]) for epoch in (0, 1)]
    everything = data.fixed_batch(0, 1000)[0]
    sums = [x.flatten(1).double() @ torch.arange(28. * 28 * 3).double() for x in (everything, *order)]
    assert len(set(sums[0].tolist())) == 1000
    assert all(torch.equal(s.sort()[0], sums[0].sort()[0]) for s in sums) and not torch.equal(*sums[1:])
    x, y = data.batch(48, 3, 1, accumulation=2, seed=1)
    for same in (again.batch(48, 3, 1, accumulation=2, seed=1), data.batch(48, 7, seed=1)):
        assert torch.equal(x, same[0]) and torch.equal(y, same[1])
    assert not torch.equal(x, data.batch(48, 7, seed=2)[0])


def test_rows_of_ranks_and_heads_unite_to_the_batch(image_root):
    data = prepare.Images('pathmnist', 'train', image_root)
    whole = data.batch(24, 2)
    for heads, world_size in ((1, 1), (4, 1), (2, 2), (1, 4)):
        for rank in range(world_size):
            x, y = data.batch(24, 2, rank=rank, world_size=world_size, heads=heads)
            for head in range(heads):
                mine = slice(head * world_size + rank, None, heads * world_size)
                assert torch.equal(x.view(heads, -1, 3, 28, 28)[head], whole[0][mine])
                assert torch.equal(y.view(heads, -1)[head], whole[1][mine])


def test_fixed_batches_hold_every_image_once(image_root):
    data = prepare.Images('pathmnist', 'test', image_root)
    whole = data.fixed_batch(0, 41)
    for world_size in (1, 2, 3):
        for batch_size in (6, 12, 39):  # the last of 39 has two rows: the third rank has none
            x, y = torch.empty_like(whole[0]), torch.full_like(whole[1], -1)
            for index in range(math.ceil(41 / batch_size)):
                for rank in range(world_size):
                    images, labels = data.fixed_batch(index, batch_size, rank, world_size)
                    mine = slice(index * batch_size + rank, (index + 1) * batch_size, world_size)
                    assert images.shape[1:] == (3, 28, 28) and (y[mine] == -1).all()
                    x[mine], y[mine] = images, labels
            assert torch.equal(x, whole[0]) and torch.equal(y, whole[1])


def test_shifted_digits_are_the_digits_under_another_look(image_root):
    counts = 0
    for split in COUNTS:
        digits, shifted = (prepare.Images(name, split, image_root) for name in prepare.DIGITS)
        (x, y), (x2, y2) = digits.fixed_batch(0, 2000), shifted.fixed_batch(0, 2000)
        assert torch.equal(y, y2) and y.bincount().min() > 25 and x.shape == x2.shape == (len(y), 3, 32, 32)
        assert torch.equal(x[:, 0], x[:, 1]) and (x2.amax(1) != x2.amin(1)).any((1, 2)).all()  # coloured
        assert (x.float().mean((1, 2, 3)) < x2.float().mean((1, 2, 3))).float().mean() > 0.9  # inverted
        counts += len(y)
    assert counts == 1797 and digits.task == 'multi-class' and digits.classes == list('0123456789')


def test_an_interrupted_command_begins_anew_and_an_archive_is_converted_once(tmp_path, monkeypatch, capsys):
    archive(tmp_path)
    with monkeypatch.context() as patch:
        done, replace = [], os.replace

        def stop(*paths):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(replace(*paths))

        patch.setattr(os, 'replace', stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_images(tmp_path)
    assert len(list((tmp_path / 'pathmnist').glob('*.bin'))) == 2
    with pytest.raises(FileNotFoundError, match="'pathmnist' is not there: run 'python prepare.py pathmnist --size 28"):
        prepare.Images('pathmnist', 'val', tmp_path)
    prepare_images(tmp_path)
    prepare_images(tmp_path, 'pathmnist', '--name', 'whole')
    parts, whole = shard_bytes(tmp_path / 'pathmnist'), shard_bytes(tmp_path / 'whole')
    assert parts == whole and len(whole) == 6
    prepare_images(tmp_path)
    assert 'already there' in capsys.readouterr().out
    with pytest.raises(prepare.DataError, match='holds a data set with shard_bytes 1000000, not 7: .*--overwrite'):
        prepare_images(tmp_path, 'pathmnist', '--shard_bytes', '7')
    assert shard_bytes(tmp_path / 'pathmnist') == whole


def test_broken_archives_are_refused_in_one_sentence(tmp_path):
    path = archive(tmp_path)
    whole = path.read_bytes()
    images = np.zeros((30, 28, 28, 3), np.uint8)
    at = whole.index(b'val_images.npy') + 5000  # inside the pixels
    for content, message in (
            (whole[:-50_000], 'damaged'), (whole[:100], 'damaged'), (b'', 'damaged'),
            (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], 'damaged'),  # only the checksum tells
            (dict(val_images=images[:, :14, :14]), r"val images of shape \(14, 14, 3\).*not \(28, 28, 3\).*--size"),
            (dict(val_images=images[..., 0]), r'val images of shape \(28, 28\)'),
            (dict(val_images=images / 255), 'val images .* .float64., not'),
            (dict(val_labels=np.full((30, 1), 9)), 'val labels .* to 9, not .* from 0 to 8, as there are 9 classes'),
            (dict(val_labels=np.zeros((29, 1), np.uint8)), r'val labels of shape \(29, 1\)'),
            (dict(val_labels=np.zeros((30, 1), object)), 'damaged')):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            archive(tmp_path, **content)
        with pytest.raises(prepare.DataError, match=f'pathmnist.npz.*{message}') as refusal:
            prepare_images(tmp_path)
        assert '\n' not in str(refusal.value) and not (tmp_path / 'pathmnist' / 'meta.json').exists()
    np.savez(path, train_images=images)
    with pytest.raises(prepare.DataError, match='pathmnist.npz.*no archive of MedMNIST'):
        prepare_images(tmp_path)


def test_mistakes_with_images_name_the_remedy(tmp_path, image_root):
    for command, message in (('pathmist', "did you mean 'pathmnist'"), ('PathMNIST', "did you mean 'pathmnist'"),
                             ('organmnist3d', 'volumes'), (f'octmnist --path {tmp_path}', 'octmnist.npz.*missing'),
                             (f'octmnist --size 64 --path {tmp_path}', 'octmnist_64.npz.*missing.*--path'),
                             ('pathmnist --size 32', '28'), ('digits --size 64', '--size'),
                             ('digits --path x', '--path'), ('digits --tokens 3', '--tokens'),
                             ('stdlib --shard_bytes 3', '--shard_bytes'), ('pathmnist --shard_bytes 0', 'at least 1')):
        with pytest.raises(prepare.DataError, match=message):
            prepare.main([*command.split(), '--root', str(tmp_path / 'data')])
    assert not (tmp_path / 'data').exists()
    with pytest.raises(FileNotFoundError, match="run 'python prepare.py bloodmnist --size 224 --root"):
        prepare.Images('bloodmnist_224', 'train', tmp_path)
    with pytest.raises(ValueError, match="'digits' holds images, not tokens"):
        prepare.Tokens('digits', 'train', 8, image_root)
    with pytest.raises(ValueError, match="no split 'valid': use one of train, val, test"):
        prepare.Images('digits', 'valid', image_root)


def test_memory_does_not_grow_with_the_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / 'pathmnist_224.npz', 'w') as file:
        for split, count in (('train', 400), ('val', 4), ('test', 4)):
            with file.open(f'{split}_images.npy', 'w') as out:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, 224, 224, 3)}
                np.lib.format.write_array_header_1_0(out, header)
                for _ in range(count):
                    out.write(os.urandom(224 * 224 * 3))
            with file.open(f'{split}_labels.npy', 'w') as out:
                np.lib.format.write_array(out, np.zeros((count, 1), np.uint8))
    assert os.path.getsize(tmp_path / 'pathmnist_224.npz') > 60e6
    if not os.path.exists('/proc/self/status'):
        pytest.skip('only Linux tells the peak of the resident size in /proc (that of getrusage survives exec)')
    code = ('import prepare, re, sys, tqdm, filelock\n'
            'peak = lambda: int(re.search("VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1])\n'
            'before = peak(); prepare.main(sys.argv[1:]); print(peak() - before)')
    command = ['pathmnist', '--size', '224', '--path', str(tmp_path), '--root', str(tmp_path)]
    run = subprocess.run([sys.executable, '-c', code, *command], cwd=HERE, capture_output=True, text=True, check=True)
    assert 0 < int(run.stdout.split()[-1]) * 1024 < 30e6, run.stdout


# -----------------------------------------------------------------------------
# model


def test_gpt_is_causal_and_starts_at_the_loss_of_guessing():
    gpt = tiny_gpt(vocab_size=97, n_embd=32).double()
    idx = torch.randint(97, (4, 16))
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = gpt(idx), gpt(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])
    assert abs(gpt(idx, torch.randint(97, (4, 16))).item() - math.log(97)) < 0.2


@pytest.mark.parametrize('one_piece', [0, 2**26])  # logits up to which there are no chunks
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_is_the_cross_entropy_of_what_counts(dtype, tolerance, one_piece, monkeypatch):
    monkeypatch.setattr(models, 'ONE_PIECE', one_piece)
    torch.manual_seed(0)
    head = nn.Linear(8, 40, bias=False).double()
    x, targets = torch.randn(3, 700, 8).double(), torch.randint(40, (3, 700))
    targets[0, :300] = -100
    x64 = x.clone().requires_grad_()
    exact = F.cross_entropy(head(x64).flatten(0, 1), targets.flatten())
    exact.backward()
    wanted, head.weight.grad = head.weight.grad, None
    head.to(dtype)
    y = x.to(dtype).requires_grad_()
    loss = models.language_loss(head, y, targets)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=min(tolerance, 1e-3))
    assert (head.weight.grad - wanted).norm() < tolerance * wanted.norm()
    assert (y.grad - x64.grad).norm() < tolerance * x64.grad.norm()


def test_a_replaced_output_layer_is_called_not_bypassed():
    gpt = tiny_gpt(vocab_size=40).double()
    lowrank.apply_mhlora(gpt, ('logit',), heads=2, rank=2)
    nn.init.normal_(gpt.lm_head.B)
    idx = torch.randint(40, (2, 8))
    assert gpt(idx, idx).item() == pytest.approx(F.cross_entropy(gpt(idx).flatten(0, 1), idx.flatten()).item(),
                                                 rel=1e-12)


def tiny_llama(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_mlp=24, n_kv_head=2)
    return models.Llama(models.LlamaConfig(**{**shape, **changes})).double()


def test_llama_is_causal_and_starts_at_the_loss_of_guessing():
    llama = tiny_llama(vocab_size=97)
    idx = torch.randint(97, (4, 16))
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = llama(idx), llama(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])
    assert abs(llama(idx, torch.randint(97, (4, 16))).item() - math.log(97)) < 0.1


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def product(i, j):
        a, b = (models.rotate(x, *models.rotary(torch.tensor([at]), 8, 10000.0)) for x, at in ((q, i), (k, j)))
        return (a * b).sum().item()
    assert product(3, 1) == pytest.approx(product(13, 11), abs=1e-5)  # angles are float32
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)
    assert product(5, 5) == pytest.approx((q * k).sum().item(), abs=1e-6)


def test_grouped_query_attention_equals_repeated_heads():
    grouped, full = tiny_llama(), tiny_llama(n_kv_head=4)
    state = grouped.state_dict()
    for name, value in state.items():
        if 'k_proj' in name or 'v_proj' in name:  # two heads of 8 rows, each serves two queries
            state[name] = value.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(state)
    idx = torch.randint(31, (2, 16))
    assert torch.allclose(grouped(idx), full(idx), atol=1e-12)


def test_activation_checkpointing_changes_nothing():
    idx = torch.randint(31, (2, 16))
    grads = []
    for checkpointing in (False, True):
        llama = tiny_llama(checkpointing=checkpointing)
        lowrank.apply_mhlora(llama, ('attn', 'mlp'), 2, 2)
        llama(idx, idx).backward()
        grads.append([p.grad for p in llama.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_seven_billion_parameters_have_galores_shape():
    width, depth, many, hidden = models.SIZES['7b']
    with torch.device('meta'):
        llama = models.Llama(models.LlamaConfig(256, 32000, width, depth, many, hidden, many))
    assert lowrank.count_parameters(llama)['total'] == 6_738_415_616


def test_gpt2_weights_load_from_the_hubs_layout(tmp_path):
    from safetensors.torch import save_file
    donor = tiny_gpt(n_head=1, n_embd=64)
    conv1d = {name: value.T.contiguous() if value.dim() == 2 and name[0] == 'h' else value.contiguous()
              for name, value in donor.transformer.state_dict().items()}
    save_file({**conv1d, 'h.0.attn.bias': torch.ones(1, 1, 16, 16)}, tmp_path / 'model.safetensors')
    loaded = models.GPT.from_pretrained(str(tmp_path / 'model.safetensors'), block_size=8)
    idx = torch.randint(31, (2, 8))
    assert torch.equal(loaded(idx), donor(idx))


# -----------------------------------------------------------------------------
# lowrank


def random_heads(layer):
    """Heads (and what was merged of them) that are not zero."""
    for name in ('A', 'B', 'A_merged', 'B_merged'):
        if hasattr(layer, name):
            getattr(layer, name).data.normal_(std=0.3)
    return layer


@pytest.mark.parametrize('head_compute', ['parallel', 'sequential'])
@pytest.mark.parametrize('merge_reset', [True, False])
def test_shared_heads_are_the_explicit_sum(head_compute, merge_reset):
    torch.manual_seed(0)
    heads, rank, alpha = 3, 4, 2.0  # alpha < rank: the scale is a true division
    layer = random_heads(lowrank.MHLoRALinear(nn.Linear(7, 5).double(), heads, rank, alpha, merge_every=3,
                                              merge_reset=merge_reset, head_compute=head_compute))
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad, layer.A.grad, layer.B.grad, layer.bias.grad]
    copies = [t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B, layer.bias)]
    u, A, B, bias = copies
    W = layer.weight + 0
    for h in range(heads):
        W = W + alpha / rank / heads * B[h] @ A[h]
        if not merge_reset:
            W = W - alpha / rank / heads * layer.B_merged[h] @ layer.A_merged[h]
    y = u @ W.T + bias
    y.square().sum().backward()
    assert torch.allclose(layer(x), y, atol=1e-12)
    for mine, explicit in zip(got, copies):
        assert torch.allclose(mine, explicit.grad, atol=1e-10)


def test_the_product_passes_gradcheck():
    torch.manual_seed(0)
    x, A, B = torch.randn(4, 3, 6), torch.randn(2, 3, 6), torch.randn(2, 5, 3)
    x, A, B, bias = (t.double().requires_grad_() for t in (x, A, B, torch.randn(5)))
    weight = torch.randn(5, 6).double()
    assert torch.autograd.gradcheck(lambda *t: lowrank.low_rank_product(t[0], weight, *t[1:], 0.7),
                                    (x, bias, A, B))


def test_parallel_equals_sequential_under_autocast_and_compile():
    torch.manual_seed(0)
    layer = random_heads(lowrank.MHLoRALinear(nn.Linear(32, 48), 4, 4, 4.0))
    x = torch.randn(64, 32)

    def run(function, autocast):
        layer.zero_grad()
        u = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = function(u)
        y.float().square().sum().backward()
        return y.float(), u.grad, layer.A.grad, layer.B.grad, layer.bias.grad
    layer.head_compute = 'sequential'
    wanted = run(layer, False)
    layer.head_compute = 'parallel'
    for function in (layer, torch.compile(layer)):
        for autocast, tolerance in ((False, 1e-5), (True, 2e-2)):
            got = run(function, autocast)
            assert not autocast or got[0].dtype == torch.float32
            for a, b in zip(got, wanted):
                assert (a - b).norm() < tolerance * b.norm()


def test_heads_leave_the_function_alone_at_first_and_both_factors_move_within_two_steps():
    gpt = tiny_gpt().double()
    idx = torch.randint(31, (4, 16))
    before = gpt(idx)
    lowrank.apply_mhlora(gpt, ('attn', 'mlp', 'logit'), heads=2, rank=3)
    assert torch.equal(gpt(idx), before)
    A = gpt.transformer.h[0].attn.c_attn.A
    assert torch.allclose(A @ A.mT, 16 / 3 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3))  # n / r
    start = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        gpt(idx, idx.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in gpt.named_parameters():
        assert p.requires_grad != torch.equal(p, start[name]), name  # what trains moves, what is frozen does not


@pytest.mark.parametrize('split', [False, True])
@pytest.mark.parametrize('merge_reset', [True, False])
def test_merge_keeps_the_function_and_eval_changes_no_weight(split, merge_reset):
    gpt = tiny_gpt().double()
    lowrank.apply_mhlora(gpt, ('attn', 'mlp', 'logit'), 2, 3, 4.0, split=split, merge_every=1,
                         merge_reset=merge_reset)
    for layer in lowrank.lowrank_layers(gpt):
        random_heads(layer)
    idx = torch.randint(31, (3, 16))
    state = {name: value.clone() for name, value in gpt.state_dict().items()}
    with lowrank.averaged_heads(gpt):
        before = gpt.eval()(idx)
    gpt.train().eval()
    assert all(torch.equal(value, state[name]) for name, value in gpt.state_dict().items())
    lowrank.merge(gpt)
    weights = [layer.weight.clone() for layer in lowrank.lowrank_layers(gpt)]
    with lowrank.averaged_heads(gpt):
        assert (gpt(idx) - before).abs().max() < 1e-12
    lowrank.merge(gpt)  # nothing is left to merge
    assert all(torch.allclose(layer.weight, w, rtol=0, atol=1e-14)
               for layer, w in zip(lowrank.lowrank_layers(gpt), weights))
    assert not any(torch.equal(state[n], v) for n, v in gpt.state_dict().items() if n.endswith('c_attn.weight'))


def test_heads_on_logit_untie_the_output_layer():
    gpt = tiny_gpt()
    full = lowrank.count_parameters(gpt)
    lowrank.apply_mhlora(gpt, ('logit',), heads=4, rank=2)
    counts = lowrank.count_parameters(gpt)
    head = gpt.lm_head
    assert counts['heads'] == 4 * 2 * (16 + 31) and counts['frozen'] == 16 * 31
    assert counts['trainable'] == full['trainable'] + counts['heads']  # the embedding still trains: the count rises
    assert gpt.transformer.wte.weight.requires_grad and head.weight is not gpt.transformer.wte.weight
    assert torch.equal(head.weight, gpt.transformer.wte.weight)
    nn.init.normal_(head.B)
    gpt(torch.randint(31, (2, 8)), torch.randint(31, (2, 8))).backward()
    assert all(g.abs().amax((1, 2)).gt(0).all() for g in (head.A.grad, head.B.grad))


def test_the_studys_parameter_count():
    with torch.device('meta'):
        gpt = models.GPT(models.GPTConfig(block_size=512))
        full = lowrank.count_parameters(gpt)['trainable']
        lowrank.apply_mhlora(gpt, ('attn',), heads=4, rank=4)
    assert full == 124_046_592
    assert 1 - lowrank.count_parameters(gpt)['trainable'] / full == pytest.approx(0.221, abs=5e-4)


def test_targets_that_match_nothing_name_what_there_is():
    with pytest.raises(ValueError, match='c_attn, c_fc, c_proj, lm_head'):
        lowrank.apply_mhlora(tiny_gpt(), ('q_proj',))
    with pytest.raises(ValueError, match='between 1 and 16'):
        lowrank.apply_mhlora(tiny_gpt(), ('attn',), rank=17)
    assert lowrank.apply_mhlora(tiny_gpt(), ('c_fc',)) == ['transformer.h.0.mlp.c_fc', 'transformer.h.1.mlp.c_fc']


# -----------------------------------------------------------------------------
# lowrank: split heads and merging


def linear_lora(layer, h):
    """Head h of a layer as a model of its own: x -> W x + b + s (B A - B' A') x with factors that are
    its parameters."""
    A, B = (nn.Parameter(factor[h].detach().clone()) for factor in (layer.A, layer.B))
    merged = layer.B_merged[h] @ layer.A_merged[h] if not layer.reset else 0.0
    return A, B, lambda x: F.linear(x, layer.weight + layer.scale * (B @ A - merged), layer.bias)


@pytest.mark.parametrize('merge_reset', [True, False])
def test_split_heads_are_separate_models_on_separate_shards(merge_reset):
    torch.manual_seed(0)
    heads = 3
    net = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)).double()
    lowrank.apply_mhlora(net, ('0', '2'), heads, 2, 3.0, split=True, merge_every=9, merge_reset=merge_reset)
    layers = [random_heads(layer) for layer in lowrank.lowrank_layers(net)]
    x, target = torch.randn(6, 4, 7).double(), torch.randn(6, 4, 5).double()  # two sequences a head
    alone = [[linear_lora(layer, h) for layer in layers] for h in range(heads)]
    together = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    optimizers = [torch.optim.AdamW([p for A, B, _ in parts for p in (A, B)], lr=0.1) for parts in alone]
    for _ in range(2):
        out = net(x)
        together.zero_grad()
        (out - target).square().mean().backward()
        for h, (parts, optimizer) in enumerate(zip(alone, optimizers)):
            shard = slice(2 * h, 2 * h + 2)
            y = parts[1][2](torch.tanh(parts[0][2](x[shard])))
            assert torch.allclose(out[shard], y, atol=1e-12)
            optimizer.zero_grad()
            (y - target[shard]).square().mean().backward()
            for layer, (A, B, _) in zip(layers, parts):
                assert torch.allclose(layer.A.grad[h], A.grad, atol=1e-12)
                assert torch.allclose(layer.B.grad[h], B.grad, atol=1e-12)
            optimizer.step()
        together.step()
        for h, parts in enumerate(alone):
            for layer, (A, B, _) in zip(layers, parts):
                assert torch.allclose(layer.A[h], A, atol=1e-12) and torch.allclose(layer.B[h], B, atol=1e-12)


def test_lte_merged_every_step_is_mhlora_on_the_replicated_batch():
    """Plain SGD: a head of LTE gets the gradient of its own mean loss, one of MHLoRA an H-th of it (LTE,
    section 3.1)."""
    heads, rate = 2, 0.1
    idx = torch.randint(31, (2, 16))
    lte, mhlora = tiny_gpt().double(), tiny_gpt().double()
    for gpt in (lte, mhlora):
        torch.manual_seed(1)
        lowrank.apply_mhlora(gpt, ('attn', 'mlp'), heads, 3, 5.0, split=gpt is lte,
                             merge_every=int(gpt is lte))
    for _ in range(3):
        for gpt, batch, gain in ((lte, idx.repeat(heads, 1), 1), (mhlora, idx, heads)):
            gpt.zero_grad()
            gpt(batch, batch.roll(-1, 1)).backward()
            with torch.no_grad():
                for name, p in gpt.named_parameters():
                    if p.requires_grad:
                        p -= rate * p.grad * (gain if name.endswith(('.A', '.B')) else 1)
        lowrank.merge(lte)
        with lowrank.averaged_heads(lte):
            assert torch.allclose(lte(idx), mhlora(idx), atol=1e-12)
    assert not torch.allclose(lte(idx), tiny_gpt().double()(idx), atol=1e-3)


def test_a_two_head_three_merge_trajectory_is_the_hand_written_one():
    torch.manual_seed(0)
    m, n, r, alpha, heads, rate = 5, 6, 2, 3.0, 2, 0.05
    layer = lowrank.MHLoRALinear(nn.Linear(n, m, bias=False).double(), heads, r, alpha, split=True,
                                 merge_every=3)
    W, A, B = layer.weight.clone(), [a.clone() for a in layer.A.detach()], [b.clone() for b in layer.B.detach()]
    A_, B_ = [torch.zeros_like(a) for a in A], [torch.zeros_like(b) for b in B]
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=rate)
    for step in range(1, 10):
        x, target = torch.randn(heads, 4, n).double(), torch.randn(heads, 4, m).double()
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        for h in range(heads):  # dL/dy of the mean over 4 m numbers of its own shard
            dy = 2 / (4 * m) * (x[h] @ (W + alpha / r * (B[h] @ A[h] - B_[h] @ A_[h])).T - target[h])
            dA, dB = alpha / r * (dy @ B[h]).T @ x[h], alpha / r * dy.T @ (x[h] @ A[h].T)
            A[h], B[h] = A[h] - rate * dA, B[h] - rate * dB
        if step % 3 == 0:
            lowrank.merge(layer)
            W = W + alpha / r / heads * sum(B[h] @ A[h] - B_[h] @ A_[h] for h in range(heads))
            A_, B_ = [a.clone() for a in A], [b.clone() for b in B]
        assert torch.allclose(layer.weight, W, atol=1e-12)
        assert torch.allclose(layer.A, torch.stack(A), atol=1e-12) and torch.allclose(layer.B, torch.stack(B),
                                                                                      atol=1e-12)


def test_a_reset_draws_new_heads_and_drops_their_moments():
    gpt = tiny_gpt().double()
    lowrank.apply_mhlora(gpt, ('attn',), 1, 2, merge_every=3, merge_reset=True)
    optimizer = galore.LowRankAdamW(gpt, lr=0.01)
    idx = torch.randint(31, (2, 16))

    def step():
        optimizer.zero_grad()
        gpt(idx, idx.roll(-1, 1)).backward()
        optimizer.step()
    for _ in range(3):
        step()
    layer = lowrank.lowrank_layers(gpt)[0]
    before = layer.A.detach().clone()
    lowrank.merge(gpt, torch.Generator().manual_seed(3))
    lowrank.drop_moments(gpt, optimizer)
    assert not torch.allclose(layer.A, before) and not layer.B.any()
    assert torch.allclose(layer.A @ layer.A.mT, 8 * torch.eye(2).double())
    step()
    state = optimizer.state[layer.B]  # as after the very first step: moments of this gradient alone
    assert state['step'] == 1 and torch.allclose(state['exp_avg'], 0.1 * layer.B.grad)
    assert optimizer.state[layer.bias]['step'] == 4


def test_two_hundred_merges_into_bfloat16_round_once_each():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False).bfloat16()
    layer = lowrank.MHLoRALinear(linear, 2, 4, 4.0, split=True, merge_every=1)
    start = layer.weight.double()
    rounded, changes, before = layer.weight.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for _ in range(200):
        for factor in (layer.A, layer.B):
            factor.data += 0.02 * torch.randn_like(factor)
        lowrank.merge(layer)
        now = 0.5 * (layer.B.double() @ layer.A.double()).sum(0)  # s / H = 1 / 2
        rounded = (rounded.double() + now - before).bfloat16()
        changes, before = now, now
    assert (layer.weight == rounded).float().mean() > 0.99  # the same, but for ties between float32 and float64
    drift = (layer.weight.double() - start - changes).norm() / layer.weight.double().norm()
    assert drift < 200 ** 0.5 * 2 ** -9  # a random walk of 200 roundings of at most half a unit in the last place


def test_clipping_gives_every_split_head_its_own_norm():
    gpt = tiny_gpt().double()
    lowrank.apply_mhlora(gpt, ('attn', 'mlp'), 2, 2, 2.0, split=True)
    for layer in lowrank.lowrank_layers(gpt):
        random_heads(layer)
    idx = torch.randint(31, (4, 16))
    gpt(idx, idx.roll(-1, 1)).backward()
    factors = [f for layer in lowrank.lowrank_layers(gpt) for f in (layer.A, layer.B)]
    own = {id(f) for f in factors}
    rest = [p for p in gpt.parameters() if p.requires_grad and id(p) not in own]

    def norms():
        return [sum(f.grad[h].square().sum() for f in factors).sqrt().item() for h in range(2)] + \
            [sum(p.grad.square().sum() for p in rest).sqrt().item()]
    before = norms()
    limit = sorted(before)[1]  # clips one of the three, leaves one alone
    assert lowrank.clip_gradients(gpt, limit).item() == pytest.approx(math.hypot(*before))
    assert norms() == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)
    alone = nn.Sequential(nn.Linear(6, 5, bias=False))
    lowrank.apply_mhlora(alone, ('0',), 2, 2, 2.0, split=True)
    alone(torch.randn(4, 6)).sum().backward()
    assert lowrank.clip_gradients(alone, 1.0) > 0  # with nothing but heads to clip
    moments = torch.randn(2, 3, 5, 4).mT  # as of a factor that is projected from the left
    assert torch.equal(lowrank.in_global_order(moments), moments.transpose(0, 1).flatten(0, 1))
    assert lowrank.in_global_order(moments).mT.is_contiguous()


# -----------------------------------------------------------------------------
# galore

TALL, WIDE, SQUARE = (12, 7), (7, 12), (8, 8)
PROJ_TYPES = ('std', 'reverse_std', 'left', 'right', 'full')


def gradients(shape, steps, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(steps)]


def follow(optimizer, params, grads, between=lambda step: None):
    """Step along given gradients: grads[step][i] for params[i]."""
    for step, gs in enumerate(grads):
        for p, g in zip(params, gs):
            p.grad = g.clone()
        optimizer.step()
        between(step)
    return [p.detach().clone() for p in params]


def galore_run(grads, W=None, lr=0.1, steps_of=None, kwargs=None, **group):
    """W after a run of one matrix along `grads`; the optimizer too."""
    W = nn.Parameter(torch.ones_like(grads[0]) if W is None else W.clone())
    optimizer = galore.GaLoreAdamW([{'params': [W], **group}], lr=lr, **(kwargs or {}))
    follow(optimizer, [W], [[g] for g in grads], steps_of or (lambda step: None))
    return W.detach(), optimizer


def textbook_galore(W, grads, rank, gap, scale, proj_type, lr, betas, eps, decay):
    """GaLore, algorithm 2, with the arithmetic of galore-torch, written with full matrices and for loops."""
    W, m, n = W.clone(), *W.shape
    one_sided = {'std': 'right' if m >= n else 'left', 'reverse_std': 'left' if m >= n else 'right'}
    kind = one_sided.get(proj_type, proj_type)
    M = V = None
    for t, G in enumerate(grads):
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = U[:, :rank] if kind in ('left', 'full') else torch.eye(m, dtype=G.dtype)
            Q = Vh[:rank].T if kind in ('right', 'full') else torch.eye(n, dtype=G.dtype)
        R = P.T @ G @ Q
        M = (1 - betas[0]) * R + (0 if M is None else betas[0] * M)
        V = (1 - betas[1]) * R ** 2 + (0 if V is None else betas[1] * V)
        step_size = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        W = W - step_size * scale * (P @ (M / (V.sqrt() + eps)) @ Q.T)
        W = W - lr * decay * W
    return W


def test_without_rank_it_is_torch_adamw():
    shapes = [(5, 4), (7,), (2, 3, 4)]
    grads = list(zip(*(gradients(shape, 6, seed=i) for i, shape in enumerate(shapes))))
    mine, fused, plain = ([nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes] for _ in range(3))
    hyper = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.3)
    a = follow(galore.GaLoreAdamW(mine, **hyper), mine, grads)
    b = follow(torch.optim.AdamW(fused, fused=True, **hyper), fused, grads)
    c = follow(torch.optim.AdamW(plain, **hyper), plain, grads)
    for x, y, z in zip(a, b, c):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('shape', [TALL, WIDE, SQUARE])
@pytest.mark.parametrize('proj_type', PROJ_TYPES)
def test_textbook_galore(shape, proj_type):
    grads = gradients(shape, 8)  # with a gap of 3: refreshes at steps 0, 3, 6
    W, hyper = gradients(shape, 1, seed=9)[0], dict(betas=(0.8, 0.95), eps=1e-2)
    expected = textbook_galore(W, grads, rank=3, gap=3, scale=0.5, proj_type=proj_type, lr=0.1, decay=0.2, **hyper)
    got, optimizer = galore_run(grads, W, kwargs=dict(weight_decay=0.2, **hyper), rank=3, update_proj_gap=3, scale=0.5,
                                proj_type=proj_type)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    left, right = galore.sides(shape, proj_type)
    (m, n), r, state = shape, 3, optimizer.state_dict()['state'][0]
    numbers = (m + n) * r + 2 * r * r if left and right else m * r + 2 * n * r if left else n * r + 2 * m * r
    assert optimizer.state_bytes() == numbers * 8
    assert ('P' in state, 'Q' in state) == (left, right)
    for basis in (state[key] for key in 'PQ' if key in state):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize('shape', [TALL, WIDE, SQUARE])
def test_it_is_galore_torch(shape):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            from galore_torch import GaLoreAdamW as Reference
    except Exception as error:  # it drags in transformers and bitsandbytes, which fail in their own ways
        pytest.skip(f'galore-torch cannot be imported here: {error}')
    for proj_type, correct_bias in itertools.product(PROJ_TYPES, (True, False)):
        # at a refresh, P^T G Q is diagonal: off it there is rounding alone, which a small eps would blow up differently
        eps = dict(eps=1e-3) if proj_type == 'full' else {}
        runs = []
        for cls in (Reference, galore.GaLoreAdamW):  # constructed alike, its own defaults included
            W = nn.Parameter(torch.ones(shape))
            group = dict(params=[W], rank=3, update_proj_gap=3, scale=0.25, proj_type=proj_type)
            optimizer = cls([group], lr=0.01, weight_decay=0.1, correct_bias=correct_bias,
                            no_deprecation_warning=True, **eps)
            runs += follow(optimizer, [W], [[g] for g in gradients(shape, 8, dtype=torch.float32)])
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', [TALL, WIDE, SQUARE])
@pytest.mark.parametrize('proj_type', PROJ_TYPES)
@pytest.mark.parametrize('basis', ['svd', 'power', 'random'])
def test_full_rank_and_identity_rho_is_gradient_descent(shape, proj_type, basis):
    """The study's identity: with r = min(m, n) and rho = 1, P P^T G = G (on both sides: P P^T G Q Q^T = G)."""
    if basis == 'random' and shape != SQUARE:
        proj_type = 'std'  # a random subspace of the larger side does not hold the gradient
    W = gradients(shape, 1, seed=3)[0]
    plain = W.clone()
    for step, G in enumerate(gradients(shape, 4)):  # a new basis in each step, for all but one of which one would do
        P, Q = galore.take_bases(G, min(shape), *galore.sides(shape, proj_type), basis, seed=step)
        galore.add_back_(W, galore.project(G, P, Q), P, Q, alpha=-0.1)
        plain -= 0.1 * G
        torch.testing.assert_close(W, plain, rtol=1e-10, atol=1e-10)


def test_full_rank_and_identity_rho_in_the_optimizer():
    """The same through GaLoreAdamW: betas of zero and an eps that dwarfs the gradient make rho(R) = R / eps."""
    for shape, proj_type in itertools.product((TALL, WIDE, SQUARE), ('std', 'reverse_std')):
        grads = gradients(shape, 1) * 6  # one basis fits all, so that refreshes matter as little as they should
        got, _ = galore_run(grads, lr=1e8, rank=min(shape), update_proj_gap=2, scale=0.5, proj_type=proj_type,
                            kwargs=dict(betas=(0.0, 0.0), eps=1e8))
        torch.testing.assert_close(got, 1 - 0.5 * sum(grads), rtol=1e-6, atol=1e-6)


def decaying(m, n, rank, seed=0, dtype=torch.float64):
    """A matrix with singular values 2^-i, and its leading left singular vectors."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, min(m, n), generator=g, dtype=torch.float64))[0] for k in (m, n))
    s = 0.5 ** torch.arange(min(m, n), dtype=torch.float64)
    return (U * s @ V.mT).to(dtype), U[:, :rank].to(dtype)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bases_are_orthonormal_and_deterministic(dtype):
    G = gradients((40, 30), 1)[0].to(dtype)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    before = torch.random.get_rng_state()
    for basis in ('svd', 'power', 'random'):
        bases = galore.take_bases(G, 8, True, True, basis, seed=5)
        for one, again in zip(bases, galore.take_bases(G, 8, True, True, basis, seed=5)):
            assert torch.equal(one, again) and one.dtype == dtype
            assert one.untyped_storage().nbytes() == one.nbytes, 'a view would keep all of U alive'
            eye = torch.eye(8, dtype=torch.float64)
            torch.testing.assert_close(one.mT.double() @ one.double(), eye, rtol=0, atol=tolerance)
        other = galore.take_bases(G, 8, True, True, basis, seed=6)
        assert torch.equal(bases[0], other[0]) == (basis == 'svd')
    assert torch.equal(before, torch.random.get_rng_state()), 'the global random numbers are not ours'


@pytest.mark.parametrize('shape', [(30, 50), (50, 30)])
def test_power_converges_to_the_svd(shape):
    G, U = decaying(*shape, rank=5)
    P, _ = galore.take_bases(G, 5, True, False, 'power')
    gaps = []
    for _ in range(12):
        gaps.append(torch.linalg.matrix_norm(U @ U.mT - P @ P.mT, 2).item())
        P, _ = galore.take_bases(G, 5, True, False, 'power', old=(P, None))
    assert gaps[-1] < 1e-6 and all(b < a for a, b in zip(gaps, gaps[1:]) if a > 1e-7), gaps
    for left, right in ((True, False), (False, True), (True, True)):  # cold, one call
        R = galore.project(G, *galore.take_bases(G, 5, left, right, 'power'))
        assert R.square().sum() >= 0.98 * (0.25 ** torch.arange(5)).sum()
    small = galore.take_bases((G * 1e-4).to(torch.float16), 5, True, False, 'power')[0].double()  # squares would vanish
    assert (small.mT @ G).square().sum() >= 0.98 * (0.25 ** torch.arange(5)).sum()


def test_a_kept_power_basis_does_not_flip():
    G, _ = decaying(30, 50, rank=5)
    P, _ = galore.take_bases(G, 5, True, False, 'power')
    for _ in range(10):
        old, (P, _) = P, galore.take_bases(G, 5, True, False, 'power', old=(P, None))
    assert ((old * P).sum(0) > 0.99).all()
    for Y in (P, -P):
        torch.testing.assert_close(galore.orthonormal(Y), Y, rtol=0, atol=1e-12)


def test_turned_moments_follow_a_basis_that_only_turned():
    """The columns of a new basis reordered and with other signs: Adam must go on as if nothing had happened. The first
    moment follows any turn."""
    for shape, left in itertools.product((TALL, WIDE, SQUARE), (True, False)):
        def both(basis):
            return (basis, None) if left else (None, basis)
        G, H = gradients(shape, 2)
        old = galore.take_bases(G, 4, left, not left)[0 if left else 1]
        turned = old[:, [2, 0, 3, 1]] * torch.tensor([1., -1., -1., 1.], dtype=torch.float64)
        ends = []
        for new in (old, turned):
            W, R = torch.zeros_like(G), galore.project(G, *both(old))
            M, V = torch.zeros_like(R), torch.zeros_like(R)
            galore.adam_(R, M, V, 1)
            M, V = galore.turn_moments(M, V, new.mT @ old, left)
            U = galore.adam_(galore.project(H, *both(new)), M.contiguous(), V.contiguous(), 2)
            galore.add_back_(W, U, *both(new), alpha=1.0)
            ends.append(W)
        torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)
        new = old @ torch.linalg.qr(gradients((4, 4), 1)[0])[0]
        M = galore.project(H, *both(old))
        M, _ = galore.turn_moments(M, torch.zeros_like(M), new.mT @ old, left)
        torch.testing.assert_close(M, galore.project(H, *both(new)), rtol=1e-10, atol=1e-12)


def test_refreshes_are_on_schedule_and_layers_take_turns():
    for basis in ('svd', 'power', 'random'):
        W = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
        seen, last = [], []
        optimizer = galore.GaLoreAdamW([dict(params=[W], rank=2, update_proj_gap=8, basis=basis)])

        def note(step):
            if not last or not torch.equal(optimizer.state[W]['P'], last[-1]):
                seen.append(step)
            last.append(optimizer.state[W]['P'].clone())
        follow(optimizer, [W], [[G] for G in gradients((6, 9), 17)], note)
        assert seen == [0, 8, 16]
    due = [[turn for turn in range(30) if galore.refresh_in(step, 50, turn, 30) == 0] for step in range(100)]
    assert due[:50] == due[50:] and sorted(sum(due[:50], [])) == list(range(30)) and max(map(len, due)) == 1
    for step, turn in itertools.product(range(50), range(30)):
        assert turn in due[step + galore.refresh_in(step, 50, turn, 30)]
        assert not any(turn in due[step + i] for i in range(galore.refresh_in(step, 50, turn, 30)))


def textbook_fira(W, grads, rank, gap, scale, lr, betas, eps, left):
    """Fira as in its authors' code (arXiv 2410.01623), on W for `left`, on W^T for the other side."""
    W, grads = (W.clone(), grads) if left else (W.T.clone(), [G.T for G in grads])
    M = V = last = None
    for t, G in enumerate(grads):
        if t % gap == 0:
            P = torch.linalg.svd(G if left else G.T, full_matrices=False)
            P = P[0][:, :rank] if left else P[2][:rank].T
        R = P.T @ G
        M = (1 - betas[0]) * R + (0 if M is None else betas[0] * M)
        V = (1 - betas[1]) * R ** 2 + (0 if V is None else betas[1] * V)
        N = M / (V.sqrt() + eps)
        rest = G - scale * P @ R
        for column in range(G.shape[1]):
            rest[:, column] *= N[:, column].norm() / (R[:, column].norm() + 1e-8)
        if last is not None:
            rest = rest / (max(rest.norm() / (last + 1e-8), 1.01) / 1.01)
        last = rest.norm()
        W = W - lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1)) * (scale * P @ N + rest)
    return W if left else W.T


def test_textbook_fira():
    for shape, proj_type in itertools.product((TALL, WIDE, SQUARE), PROJ_TYPES[:4]):
        grads = [G * 1.3 ** step for step, G in enumerate(gradients(shape, 8))]  # grows, so the limiter has work to do
        hyper = dict(betas=(0.8, 0.95), eps=1e-2)
        W = gradients(shape, 1, seed=9)[0]
        expected = textbook_fira(W, grads, 3, 3, 0.5, 0.1, **hyper, left=galore.sides(shape, proj_type)[0])
        got, _ = galore_run(grads, W, kwargs=hyper, rank=3, update_proj_gap=3, scale=0.5, proj_type=proj_type,
                            rule='fira')
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match='one-sided'):
        galore_run(grads, rank=3, rule='fira', proj_type='full')


SETTINGS = [dict(proj_type=proj_type, basis=basis, rule=rule)
            for proj_type, basis, rule in itertools.product(
                ('std', 'reverse_std', 'full'), ('svd', 'power', 'random'), ('galore', 'fira'))
            if (proj_type, rule) != ('full', 'fira')]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_optimizer_resumes_bit_for_bit(dtype):
    for setting in SETTINGS:
        shapes = [(6, 9), (9, 6), (8, 5), (4, 4), (5,)]

        def fresh():
            torch.manual_seed(0)  # another seed of the global generator must not matter: it is set again below
            params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
            return params, galore.GaLoreAdamW(
                [{'params': params[:3], 'rank': 2, 'update_proj_gap': 3, **setting},
                 {'params': params[3:]}], lr=0.01, weight_decay=0.1, seed=3)

        grads = list(zip(*(gradients(shape, 8, seed=i, dtype=dtype) for i, shape in enumerate(shapes))))
        params, optimizer = fresh()
        straight = follow(optimizer, params, grads)
        params, optimizer = fresh()
        halfway = follow(optimizer, params, grads[:4])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        params, optimizer = fresh()
        for p, w in zip(params, halfway):
            p.data.copy_(w)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        torch.manual_seed(99)
        for x, y in zip(straight, follow(optimizer, params, grads[4:])):
            assert torch.equal(x, y), setting
    values = [x for state in optimizer.state_dict()['state'].values() for x in state.values()]
    assert all(isinstance(x, (torch.Tensor, int, float)) for x in values)


def test_a_gradient_that_is_not_finite_leaves_the_basis_alone():
    for basis, bad in itertools.product(('svd', 'power', 'random'), (math.nan, math.inf)):
        first, spoilt = gradients(WIDE, 2)
        spoilt[3, 4] = bad
        old = galore.take_bases(first, 3, True, True, basis)
        kept, cold = (galore.take_bases(spoilt, 3, True, True, basis, was) for was in (old, (None, None)))
        for was, now, new in zip(old, kept, cold):
            assert torch.equal(now, was)
            torch.testing.assert_close(new.mT @ new, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize('max_norm', [0.0, 0.05])
def test_clipping_uses_the_norm_of_what_is_stepped_on(max_norm):
    plain, net = one_block_llama(), one_block_llama()
    layers = galore_layers(net)
    optimizer, idx = galore.LowRankAdamW(net, basis='random'), torch.randint(31, (2, 8))
    optimizer.begin(0)
    for model in (plain, net):
        model(idx, idx.roll(-1, 1)).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for name, layer in layers.items():
        G = wanted.pop(f'{name}.weight')
        wanted[name] = layer.basis.T @ G if layer.left else G @ layer.basis
    norm = math.sqrt(sum(g.square().sum().item() for g in wanted.values()))
    assert lowrank.clip_gradients(net, max_norm).item() == pytest.approx(norm, rel=1e-12)
    shrink = max_norm / norm if max_norm else 1.0
    for name, g in wanted.items():
        mine = layers[name].trained.grad[0] if name in layers else net.get_parameter(name).grad
        torch.testing.assert_close(mine, shrink * g, rtol=1e-4, atol=1e-12)


def test_rank_is_clamped_and_nonsense_refused():
    W = nn.Parameter(torch.zeros(6, 9))
    with pytest.warns(UserWarning, match=r'rank 99 .* h.0.mlp.weight \(6, 9\)'):
        optimizer = galore.GaLoreAdamW([{'params': [W], 'param_names': ['h.0.mlp.weight'], 'rank': 99}])
    W.grad = torch.ones_like(W)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # said once
        optimizer.step()
    assert optimizer.state[W]['P'].shape == (6, 6)
    for basis in ('svd', 'power', 'random'):
        with pytest.warns(UserWarning, match=r'parameter 0 \(9, 6\)'):
            state = galore_run(gradients((9, 6), 1), rank=8, basis=basis, proj_type='left')[1].state_dict()['state'][0]
        assert state['P'].shape == (9, 6)
    nonsense = dict(rank=0, update_proj_gap=0, proj_type='both', basis='qr', rule='adam', state_bits=4)
    for key, value in nonsense.items():
        with pytest.raises(ValueError, match=f'{key}={value!r}'):
            galore.GaLoreAdamW([{'params': [W], 'rank': 2, key: value}])
    with pytest.raises(ValueError, match='is no matrix'):
        galore.GaLoreAdamW([{'params': [nn.Parameter(torch.zeros(6))], 'rank': 2}])


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight  # tied
        self.attn, self.mlp, self.norm = nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 32), nn.GELU()), nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.logit = nn.ParameterDict(dict(A=torch.zeros(2, 3, 8), B=torch.zeros(2, 11, 3)))


def test_param_groups_partition_the_model():
    plain = galore.param_groups(Toy(), weight_decay=0.1)
    assert [(g['param_names'], g['weight_decay']) for g in plain] == [
        (['wte.weight', 'attn.weight', 'mlp.0.weight', 'logit.A', 'logit.B'], 0.1),
        (['attn.bias', 'mlp.0.bias', 'norm.weight', 'norm.bias'], 0.0)]
    torch.optim.AdamW(plain)
    model = Toy()
    groups = galore.param_groups(model, weight_decay=0.1, rank=2, gap=7, scale=2.0, basis='power',
                                 rule='fira', proj_type='reverse_std')
    assert [g['param_names'] for g in groups] == [
        ['attn.weight', 'mlp.0.weight'], ['wte.weight', 'logit.A', 'logit.B'],
        ['attn.bias', 'mlp.0.bias', 'norm.weight', 'norm.bias']]
    keys = ('rank', 'update_proj_gap', 'scale', 'basis', 'rule', 'proj_type', 'weight_decay')
    assert [groups[0][key] for key in keys] == [2, 7, 2.0, 'power', 'fira', 'reverse_std', 0.1]
    ours = {id(p) for g in groups for p in g['params']}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match='rank=4'):
        galore.param_groups(nn.Linear(3, 3), rank=4)
    optimizer = galore.GaLoreAdamW(groups)
    model.head(model.attn(model.norm(model.wte.weight))[:, :8]).sum().backward()
    optimizer.step()


def test_a_step_runs_on_fake_tensors():
    """No step, refresh included, waits for a value on the device: memory can be planned without any."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    for setting in SETTINGS:
        with FakeTensorMode():
            W, b = nn.Parameter(torch.zeros(6, 9)), nn.Parameter(torch.zeros(6))
            optimizer = galore.GaLoreAdamW([{'params': [W], 'rank': 2, 'update_proj_gap': 1, **setting},
                                            {'params': [b]}])
            follow(optimizer, [W, b], [[torch.ones(6, 9), torch.ones(6)]] * 2)
            assert optimizer.state_bytes() > 0


# -----------------------------------------------------------------------------
# galore in layers: the formula, per layer, 8 bits


def one_block_llama(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_mlp=24, n_kv_head=1)
    return models.Llama(models.LlamaConfig(**{**shape, **changes})).double()


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
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(31, (rows, 9), generator=generator).chunk(micro_batches) for _ in range(steps)]


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
    taken from the mean gradient, moments turn with them, weights and first moments are averaged every
    `merge_every` steps. The other parameters follow AdamW on averaged gradients. Returns the losses; nets[0]
    ends up with averaged weights."""
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
            P, new_moments = bases[name], []
            for W, G, (M, V) in zip(Ws, Gs, moments.get(name, [(0, 0)] * len(nets))):
                R = P.T @ G
                if t % every == 0 and t > 0:
                    C = P.T @ old
                    M, V = C @ M, C ** 2 @ V
                M, V = betas[0] * M + (1 - betas[0]) * R, betas[1] * V + (1 - betas[1]) * R ** 2
                rate = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
                U = P @ (M / (V.sqrt() + eps))
                W.data = W.data - rate * scale * (U if wide else U.T)
                W.data = W.data - lr * decay * W.data
                new_moments.append((M, V))
            if (t + 1) % merge_every == 0:
                for W, mean in zip(Ws, [average([W.data for W in Ws])] * len(Ws)):
                    W.data = mean.clone()
                new_moments = [(average([M for M, _ in new_moments]), V) for _, V in new_moments]
            moments[name] = new_moments
        for net in nets:
            net.zero_grad()
    for name in inside:
        nets[0].get_parameter(name).data = average([net.get_parameter(name).data for net in nets])
    return losses


@pytest.mark.parametrize('make, heads, merge_every, accumulation, checkpointing, per_layer', [
    *((one_block_llama, 1, 1, *rest) for rest in itertools.product((1, 3), (False, True), (False, True))),
    *((Reused, 1, 1, 2, False, per_layer) for per_layer in (False, True)),
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
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12)
    lowrank.check_training(net, optimizer)
    assert all(p.grad is None for p in net.parameters())
    for layer in layers.values():
        assert layer.whole is None
        assert optimizer.state[layer.trained]['exp_avg'].shape == (heads, *layer.trained.shape[1:])
    counts = lowrank.count_parameters(net)
    linear = sum(p.numel() for p in {layer.weight for layer in layers.values()})
    numbers = heads * sum(3 * max(layer.weight.shape) for layer in layers.values())
    plain = sum(p.numel() for p in nets[0].parameters())
    assert counts['trainable'] == (plain if merge_every == 1 else plain - linear + numbers)


@pytest.mark.parametrize('rule', ['galore', 'fira'])
@pytest.mark.parametrize('accumulation', [1, 2])
def test_per_layer_is_the_same_run(rule, accumulation):
    ends = []
    for per_layer in (False, True):
        net = one_block_llama()
        optimizer = galore.GaLoreAdamW(galore.param_groups(net, 0.1, rank=3, gap=3, rule=rule), lr=0.05,
                                       per_layer=per_layer)
        ends.append(in_layers(net, batches_of(7, 2 * accumulation, accumulation), optimizer))
        assert optimizer.apart == (set(net.parameters()) if per_layer else set())
        loss_of(net, batches_of(1, 2)[0][0]).backward()
        assert all((p.grad is None) == per_layer for p in net.parameters())
    assert np.allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize('per_layer', [False, True])
def test_nothing_but_the_model_says_on_which_device_it_runs(per_layer, monkeypatch):
    """On the meta device, as on a GPU, a tensor of the CPU's does not go with the others."""
    monkeypatch.setattr(galore, 'adamw', lambda *a, **k: None)  # has no kernel there
    with torch.device('meta'):
        net = Toy()
    optimizer = galore.GaLoreAdamW(galore.param_groups(net, rank=3, basis='svd'), per_layer=per_layer)
    for _ in range(2):
        net.mlp(net.norm(net.attn(torch.ones(5, 8, device='meta'))[:, :8])).sum().backward()
        assert lowrank.clip_gradients(net, 1.0).device.type == ('cpu' if per_layer else 'meta')
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize('shape', [TALL, WIDE, SQUARE])
def test_gradients_of_a_layer_in_a_basis(shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(shape[1], shape[0]).double(), torch.randn(2, 3, shape[1]).double().requires_grad_()
    layer = lowrank.MHLoRALinear(copy.deepcopy(linear), rank=2, factors='basis', merge_every=1)
    basis, _ = torch.linalg.qr(torch.randn_like(layer.basis))
    layer.basis.copy_(basis)
    layer.ask_whole()
    got, wanted = ([], [])
    for module, grads in ((linear, wanted), (layer, got)):
        module(x).square().mean().backward()
        grads += [x.grad, module.bias.grad]
        x.grad = None
    G = linear.weight.grad
    wanted += [G[None], (basis.T @ G if shape == WIDE else G @ basis)[None]]
    for mine, theirs in zip([*got, layer.whole.grad, layer.trained.grad], wanted):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    assert layer.weight.grad is None
    with torch.no_grad():  # and no gradient is formed where none is wanted
        assert torch.equal(layer(x), linear(x))
    dx, = torch.autograd.grad(layer(x).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        dx.sum().backward()


@pytest.mark.parametrize('key', ['exp_avg', 'exp_avg_sq'])
def test_8_bits_are_off_by_less_than_a_level(key):
    levels, power, dtype = galore.EIGHT_BITS[key]
    x = torch.randn(5003, generator=torch.Generator().manual_seed(0)) ** 3 * 1e-4
    x[700:1200] = 0
    if dtype == torch.uint8:
        x = x.abs()
    total = torch.zeros_like(x)
    for age in range(400):
        code, top = galore.encode(x, age, levels, power, dtype)
        y = galore.decode(code, top, levels, power)
        size = F.pad(x.abs(), (0, -len(x) % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:len(x)]
        level = (x.abs() / size.clamp_min(1e-30)) ** (1 / power) * levels
        bound = size * ((level.floor() + 1) ** power - level.floor() ** power) / levels ** power
        assert ((y - x).abs() <= bound * (1 + 1e-5) + 1e-7 * size).all()
        total += y
    off = (total / 400 - x).abs() / bound.clamp_min(1e-30)
    assert off[x != 0].max() < 0.01 if dtype == torch.int8 else off[level >= 1].max() < 0.01  # right on average
    assert code.dtype == dtype and code.numel() == x.numel() and top.shape == (20,)


def test_an_8_bit_second_moment_decays():
    state = {'step': 0}
    R = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    galore.new_moments(state, R, 8)
    for step in range(600):
        state['step'] += 1
        galore.adam_step_(R.clone() if step == 0 else torch.zeros(64, 64), state, (0.9, 0.999), 1e-8, True)
    M, V = galore.read_moments(state)
    exact = 0.001 * R.square().flatten() * 0.999 ** 599
    large = exact > 0.01 * exact.max()
    assert (V / exact)[large].log().abs().median() < 0.05 and M.abs().max() < 1e-6


def test_8_bit_training_follows_32_bits():
    def run(bits, lean=()):
        torch.manual_seed(0)
        net = models.Llama(models.LlamaConfig(block_size=16, vocab_size=97, n_embd=64, n_layer=2, n_head=2,
                                              n_mlp=96, n_kv_head=2))
        groups = galore.param_groups(net, rank=64, gap=20, state_bits=bits)
        optimizer = galore.GaLoreAdamW(groups, lr=0.01, per_layer='per_layer' in lean)
        generator, losses = torch.Generator().manual_seed(2), []
        for _ in range(60):
            start = torch.randint(97, (16, 1), generator=generator)
            tokens = (start * 5 ** torch.arange(17) % 97)
            loss = net(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return np.mean(losses[-10:]), optimizer.state_bytes(), optimizer
    (a, wide, _), (b, narrow, optimizer) = run(32), run(8)
    assert a < 1.0 and abs(a - b) < 0.1 * a, (a, b)
    assert narrow < 0.75 * wide  # the bases stay as they are
    (c, _, other) = run(8, ['per_layer'])
    assert c == b
    bytes_of = sum(2 * p.numel() + 2 * 4 * -(-p.numel() // 256) for g in optimizer.param_groups if 'rank' not in g
                   for p in g['params'] if p.numel() >= 4096)
    assert bytes_of == sum(x.numel() * x.element_size() for g in optimizer.param_groups if 'rank' not in g
                           for p in g['params'] if p.numel() >= 4096
                           for x in optimizer.state[p].values() if torch.is_tensor(x))
    fresh = galore.GaLoreAdamW(optimizer.param_groups, lr=0.01)
    fresh.load_state_dict(optimizer.state_dict())
    assert same_state(fresh.state_dict()['state'], optimizer.state_dict()['state'])


LEAN = {'projected': ['--galore_backward=projected', '--grad_clip=0.5'],
        'per_layer': ['--per_layer=True', '--galore_rule=fira'],
        'lean': ['--galore_backward=projected', '--per_layer=True', '--state_bits=8', '--checkpointing=True',
                 '--n_embd=64', '--n_mlp=96', '--galore_basis=sketch']}


@pytest.mark.parametrize('name', LEAN)
def test_lean_runs_resume_bit_for_bit(data_dir, tmp_path, name):
    words = [*LEAN[name], '--galore_rank=64', '--galore_gap=3', '--vocab_size=257', '--n_mlp=80', '--batch_size=4',
             '--gradient_accumulation_steps=2', '--param_dtype=bfloat16', '--dtype=bfloat16', '--n_layer=1',
             '--n_embd=64']

    a_llama_resumes_bit_for_bit(data_dir, tmp_path, words)


@pytest.mark.skipif(not os.environ.get('SLOW'), reason='inductor takes nine seconds: SLOW=1')
def test_a_projected_model_compiles(data_dir, tmp_path):
    words = ['--optimizer=galore', '--galore_backward=projected', '--galore_rank=3', '--galore_gap=2', '--n_layer=1',
             '--param_dtype=float32', '--dtype=float32']
    plain = train(data_dir, tmp_path / 'a', *words)['best_val_loss']
    assert train(data_dir, tmp_path / 'b', *words, '--compile=True')['best_val_loss'] == pytest.approx(plain, abs=1e-3)


# -----------------------------------------------------------------------------
# layers in a basis: the sketch, the leaf without memory, compiling, what is refused


@pytest.mark.parametrize('shape', [TALL, WIDE])
@pytest.mark.parametrize('basis', ['svd', 'power'])
def test_a_later_basis_is_that_of_all_micro_batches_and_heads(shape, basis):
    (m, n), heads = shape, 2
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n, m, bias=False)).double()
    lowrank.apply_mhlora(net, ('0',), heads, 3, factors='basis', split=True, merge_every=2)
    optimizer, layer = galore.LowRankAdamW(net, lr=0.05, basis=basis, basis_every=2, seed=3), net[0]
    for step in range(3):
        old = layer.basis.clone()
        G = torch.zeros(heads, m, n, dtype=torch.float64)
        for micro_step in range(3):
            optimizer.begin(step, micro_step, 3)
            x, dy = (torch.randn(heads, 5, width, dtype=torch.float64) for width in (n, m))
            net(x).backward(dy)
            G += heads * dy.mT @ x  # of a head's own mean loss
        optimizer.take_bases()
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
        if step % 2 == 1:
            lowrank.merge(net)
    olds = (old, None) if layer.left else (None, old)
    new = galore.take_bases(G.mean(0), 3, layer.left, not layer.left, basis, olds)[0 if layer.left else 1]
    R = layer.basis.T @ G if layer.left else G @ layer.basis
    assert torch.allclose(layer.basis @ layer.basis.T, new @ new.T, atol=1e-12)
    assert (layer.basis * old).sum(0).min() > 0 or basis != 'svd'  # raw signs would flip moments for nothing
    assert torch.allclose(layer.trained.grad, R, atol=1e-12)


@pytest.mark.parametrize('heads, merge_every, every, window', [(1, 1, 16, 10), (2, 4, 24, 12), (1, 1, 4, 4)])
def test_a_sketch_times_omega_gives_the_next_basis(heads, merge_every, every, window):
    net, ordinary, sums = one_block_llama(), one_block_llama(), {}
    layers = galore_layers(net, heads, merge_every)
    optimizer = galore.LowRankAdamW(net, lr=0.02, basis_every=every)
    for step, (tokens,) in enumerate(batches_of(2 * every + 2, 2 * heads)):
        optimizer.begin(step)
        inside = step % every >= every - window and step >= every - window
        assert all((layer.sketch is not None) == inside for layer in layers.values())
        ordinary.zero_grad()
        for h, part in enumerate(tokens.chunk(heads)):  # the gradient: each head as an ordinary model
            state = {key: net.state_dict()[key] for key in ordinary.state_dict()}
            for name, layer in layers.items():
                U, basis = layer.trained[h].detach(), layer.basis
                state[f'{name}.weight'] = layer.weight + (basis @ U if layer.left else U @ basis.T)
            ordinary.load_state_dict(state)
            (loss_of(ordinary, part) / heads).backward()
        loss_of(net, tokens).backward()
        for name, layer in layers.items():
            if step % every == 0 and step:
                Y = sums[name]
                cosines = (torch.linalg.svd(Y, full_matrices=False)[0] * layer.basis).sum(0).abs()
                torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
            if inside and step % every == every - window:
                sums[name] = 0
                if step:
                    M = optimizer.state[layer.trained]['exp_avg'].mean(0)
                    torch.testing.assert_close(layer.Omega, (M.T if layer.left else M) / M.norm(), rtol=0, atol=1e-14)
            if inside:
                G = ordinary.get_submodule(name).weight.grad
                sums[name] = sums[name] + (G if layer.left else G.T) @ layer.Omega
                torch.testing.assert_close(layer.sketch.grad, sums[name], rtol=0, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % merge_every == 0:
            lowrank.merge(net)
    assert all(layer.whole is None for layer in layers.values())


@pytest.mark.parametrize('per_layer', [False, True])
def test_sketches_add_up_over_micro_batches(per_layer):
    ends = []
    for parts in (1, 4):
        net = one_block_llama()
        galore_layers(net)
        optimizer = galore.LowRankAdamW(net, lr=0.02, weight_decay=0.1, basis_every=12, per_layer=per_layer)
        losses = in_layers(net, batches_of(26, 8, parts), optimizer)
        ends.append((losses, lowrank.merged_state_dict(net)))
    assert np.allclose(ends[0][0], ends[1][0], rtol=0, atol=1e-12)
    for a, b in zip(*(state.values() for _, state in ends)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sketches_find_what_gradients_have_in_common_without_ever_forming_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20, bias=False)).double()
    lowrank.apply_mhlora(net, ('0',), 1, 3, factors='basis', merge_every=10)
    optimizer = galore.LowRankAdamW(net, lr=0.0, basis_every=20)
    U, V = (torch.linalg.qr(torch.randn(k, 3, dtype=torch.float64))[0] for k in (20, 30))
    shares = []
    for step in range(41):  # their mean is U diag(3, 2, 1) V^T, and all of them have full rank
        optimizer.begin(step)
        x = torch.randn(50, 30, dtype=torch.float64)
        dy = x @ V @ torch.diag(torch.tensor([3., 2., 1.]).double()) @ U.T + torch.randn(50, 20).double()
        net(x).backward(dy / 50)
        optimizer.step()
        optimizer.zero_grad()
        shares.append((U.T @ net[0].basis).square().sum().item() / 3)
        if (step + 1) % 10 == 0:
            lowrank.merge(net)
    assert shares[0] < 0.5 and shares[20] > 0.8 and shares[40] > 0.95
    assert torch.allclose(net[0].basis.T @ net[0].basis, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize('basis', ['sketch', 'power', 'svd', 'random'])
@pytest.mark.parametrize('heads, merge_every', [(1, 1), (2, 4)])
@pytest.mark.parametrize('stop', [3, 8, 12])  # of 12: inside a window, at a merge, right before a refresh
def test_layers_resume_bit_for_bit_at_any_step(basis, heads, merge_every, stop):
    def fresh():
        net = one_block_llama()
        galore_layers(net, heads, merge_every)
        return net, galore.LowRankAdamW(net, lr=0.02, basis=basis, basis_every=12, seed=3)

    def go_on(net, optimizer, first, last):
        for step in range(first, last):
            optimizer.begin(step)
            loss_of(net, data[step][0]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % merge_every == 0:
                lowrank.merge(net)
    data, (whole, optimizer), file = batches_of(15, 2 * heads), fresh(), io.BytesIO()
    go_on(whole, optimizer, 0, stop)
    torch.save(lowrank.gather_state(whole, optimizer), file)
    go_on(whole, optimizer, stop, 15)
    file.seek(0)
    resumed, optimizer = fresh()
    lowrank.load_state(resumed, optimizer, torch.load(file, weights_only=True))
    go_on(resumed, optimizer, stop, 15)
    assert same_state(whole.state_dict(), resumed.state_dict())


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
    plain = bytes_held(net)
    layers = galore_layers(net)
    held, state = bytes_held(net), net.state_dict()
    bases = sum(layer.basis.nbytes for layer in layers.values())
    assert held == plain + bases + 4 * 3 * 24  # and one buffer, as large as the largest factor
    assert set(state) == {*one_block_llama(n_layer=2).state_dict(), *(f'{name}.basis' for name in layers)}

    def loaded(assign):
        other = copy.deepcopy(net)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        return other
    for other, size in ((net.to(torch.float32), held), (copy.deepcopy(net), held), (loaded(False), held),
                        (loaded(True), held), (copy.deepcopy(net).to('meta').to_empty(device='cpu'), held),
                        (copy.deepcopy(net).to(torch.bfloat16), held // 2)):
        assert bytes_held(other) == size
        flats = {layer.trained.untyped_storage().data_ptr() for layer in lowrank.lowrank_layers(other)}
        assert len(flats) == 1 and not any(layer.trained.any() for layer in lowrank.lowrank_layers(other))
        optimizer = galore.LowRankAdamW(other)  # the layers still have their leaves
        optimizer.begin(0)
        if other.lm_head.weight.isfinite().all():
            loss_of(other, batches_of(1, 2)[0][0]).backward()
            assert all(layer.trained.grad.any() for layer in lowrank.lowrank_layers(other))
    with pytest.raises(RuntimeError, match='Unexpected key.*proj.B'):
        net.load_state_dict({**state, 'model.layers.0.mlp.gate_proj.B': torch.zeros(1, 24, 3)})
    with pytest.raises(ValueError, match='LowRankAdamW'):
        galore.param_groups(net)
    net.zero_grad()
    foreign, optimizer = torch.optim.AdamW(net.parameters(), fused=True), galore.LowRankAdamW(net)
    optimizer.begin(0)
    lowrank.check_training(net, foreign)
    loss_of(net, batches_of(1, 2)[0][0]).backward()
    foreign.step()
    with pytest.raises(ValueError, match='always zero'):
        lowrank.check_training(net, foreign)


@pytest.mark.parametrize('kind', [
    dict(factors='basis', merge_every=1), dict(factors='basis', heads=2, split=True, merge_every=2),
    dict(heads=2, split=True, merge_every=2), dict(heads=2), dict(factors='B')],
    ids=['galore', 'galolte', 'lte', 'mhlora', 'fa'])
def test_ten_compiled_blocks_share_two_graphs(kind):
    """Torch gives up after eight graphs of one function, silently but for the time."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    nets, losses = [one_block_llama(n_layer=10) for _ in range(2)], []
    counter = CompileCounterWithBackend('aot_eager')
    for net in nets:
        torch.manual_seed(0)
        lowrank.apply_mhlora(net, ('mlp',), rank=3, **kind)
    for block in nets[1].model.layers:
        block.compile(fullgraph=True, backend=counter)
    steps = 25 if kind.get('factors') == 'basis' else 4  # two periods of refreshes, or merges
    for net in nets:
        losses.append(in_layers(net, batches_of(steps, 2), galore.LowRankAdamW(net, basis_every=12),
                                kind.get('merge_every') or 99))
    assert np.allclose(*losses, rtol=0, atol=1e-10) and 1 <= counter.frame_count <= 2


@pytest.mark.parametrize('bits', [None, 32, 16, 8])
@pytest.mark.parametrize('kind', [
    None, dict(heads=2), dict(heads=2, split=True, factors='basis', merge_every=2),
    dict(factors='basis', merge_every=1)], ids=['full', 'heads', 'galolte', 'galore'])
def test_moments_are_as_wide_as_asked_for(kind, bits):
    net = one_block_llama(n_embd=64, n_mlp=128).bfloat16()
    if kind:
        lowrank.apply_mhlora(net, rank=32, **kind)
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
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))
    bases = sum(x.nbytes for name, x in net.named_buffers() if name.endswith('.basis'))
    assert optimizer.state_bytes() == held + bases  # no sketch in step 0


class Sub(nn.Linear):
    pass


class SubLayer(nn.TransformerEncoderLayer):
    pass


def linears(**modules):
    return nn.ModuleDict({'attn': nn.Linear(8, 16), **modules})


def put(net, targets=('attn',), **settings):
    return lowrank.apply_mhlora(net, targets, **settings)


def beit_attention():
    return timm.models.beit.Attention(16, 2, qkv_bias=True)


def eva_attention():
    return timm.models.eva.EvaAttention(16, 2, scale_norm=False)


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def shared_weight_but_not_bias():
    net = linears(mlp=nn.Linear(8, 16))
    net['mlp'].weight = net['attn'].weight
    return net


def split_heads():
    net = linears()
    put(net, heads=2, split=True, merge_every=2)
    return net['attn']


def stepped_without_begin():
    net = linears()
    put(net, rank=2, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(net)
    net['attn'](torch.ones(2, 8)).sum().backward()
    optimizer.step()


def in_basis(**settings):
    net = linears()
    put(net, heads=2, rank=2, factors='basis', split=True, merge_every=4)
    return galore.LowRankAdamW(net, **settings)


@pytest.mark.parametrize('call, message', [
    (lambda: put(linears(), 'attn'), "targets='attn' is a string"),
    (lambda: put(linears(attn=encoder_layer()), ('linear1',)), 'TransformerEncoderLayer'),
    (lambda: put(nn.TransformerEncoder(encoder_layer(), 2)), 'TransformerEncoderLayer'),
    (lambda: put(linears(attn=SubLayer(8, 2, 16, batch_first=True)), ('linear1',)), 'SubLayer'),
    (lambda: put(linears(attn=beit_attention())), r"'attn' \(Attention\) reads"),
    (lambda: put(linears(attn=eva_attention())), r"'attn' \(EvaAttention\) reads"),
    (lambda: put(linears(attn=eva_attention()), ('q', 'v')), r"'attn' \(EvaAttention\) reads"),
    (lambda: put(shared_weight_but_not_bias(), ('attn', 'mlp')), 'but not its bias'),
    (lambda: put(linears(), factors='A'), "factors='A' is not known"),
    (lambda: put(linears(), head_compute='vector'), "head_compute='vector' is not known"),
    (lambda: put(linears(), rank=9), 'between 1 and 8'),
    (lambda: put(linears(), rank=0), 'rank=0'),
    (lambda: put(linears(), factors='basis'), 'merge_every=1'),
    (lambda: put(linears(), heads=2, factors='basis', merge_every=4), 'split=True'),
    (lambda: put(linears(), heads=3, split=True, merge_every=4, workers=2), 'over 2 ranks'),
    (lambda: split_heads().eval()(torch.ones(2, 8)), 'averaged_heads'),
    (lambda: split_heads()(torch.ones(3, 8)), 'does not split over 2 heads'),
    (lambda: lowrank.check_training(linears(), torch.optim.SGD([nn.Parameter(torch.ones(1))])),
     'attn.weight and 1 more'),
    (lambda: in_basis(basis='qr'), "basis='qr'"),
    (lambda: in_basis(basis_every=6), 'no multiple of merge_every=4'),
    (lambda: in_basis(state_bits=4), 'state_bits=4'),
    (stepped_without_begin, 'begin')])
def test_what_would_go_wrong_in_silence_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert '\n' not in str(refusal.value)


def test_what_is_passed_over_or_clamped_is_named(capsys):
    net = linears(mlp=nn.Sequential(nn.Linear(16, 8), Sub(8, 8)))
    put(net, ('attn', 'mlp'), rank=12, factors='basis', merge_every=1)
    said = capsys.readouterr().out
    assert '2 of 2 linear layers' in said and 'subclasses of nn.Linear: mlp.1' in said
    assert "rank 12 is clamped to the smaller side of 2, such as ['attn']" in said


@pytest.mark.parametrize('basis', ['power', 'sketch'])
def test_galolte_resumes_bit_for_bit(data_dir, tmp_path, basis):
    words = ['--lowrank=attn,mlp', '--heads=2', '--rank=3', '--head_input=split', '--head_basis=gradient',
             '--merge_every=3', '--galore_gap=6', f'--galore_basis={basis}',
             '--gradient_accumulation_steps=2']
    whole = train(data_dir, tmp_path / 'a', *words, '--max_iters=8')
    for stop in (3, 4):  # at a merge, where bases are due, and between two
        train(data_dir, tmp_path / str(stop), *words, f'--max_iters={stop}')
        resumed = train(data_dir, tmp_path / str(stop), *words, '--max_iters=8', '--init_from=resume')
        for key in ('model', 'optimizer', 'sketches', 'step'):
            assert same_state(whole[key], resumed[key]), key
    sample.main([f'--out_dir={tmp_path}/a', '--num_samples=1', '--max_new_tokens=3', '--device=cpu'])
    bases = [Q for key, Q in whole['model'].items() if key.endswith('.basis')]
    assert len(bases) == 8 and all(torch.allclose(Q.mT @ Q, torch.eye(3).double(), atol=1e-9) for Q in bases)
    assert len(whole['sketches']) == (8 if basis == 'sketch' else 0)  # saved in the middle of a window


# -----------------------------------------------------------------------------
# the scripts


def same_state(a, b):
    """Two checkpoints hold the same tensors and numbers, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize('words', [
    ['--gradient_accumulation_steps=2', '--dropout=0.1'],
    ['--lowrank=attn,mlp', '--heads=2', '--rank=2', '--param_dtype=float32', '--dtype=bfloat16'],
    ['--lowrank=attn', '--heads=2', '--rank=2', '--head_input=split', '--merge_every=3'],
    ['--lowrank=attn', '--rank=2', '--merge_every=3', '--merge_reset=True', '--rewarm_iters=2'],
], ids=['full', 'mhlora', 'lte', 'relora'])
def test_resume_is_bit_for_bit(data_dir, tmp_path, words):
    whole = train(data_dir, tmp_path / 'a', *words, '--max_iters=8')
    train(data_dir, tmp_path / 'b', *words)
    resumed = train(data_dir, tmp_path / 'b', *words, '--max_iters=8', '--init_from=resume')
    for key in ('model', 'optimizer', 'step', 'best_val_loss'):
        assert same_state(whole[key], resumed[key]), key
    assert whole['step'] == 8
    log = [json.loads(line) for line in open(tmp_path / 'a' / 'log.jsonl')]
    assert [record['step'] for record in log if 'val_loss' in record] == [0, 4, 8]
    assert log[-1]['val_loss'] < log[0]['val_loss']
    assert {'train_loss', 'lr', 'dt_ms', 'tokens_per_s', 'peak_memory_bytes', 'trainable_parameters',
            'optimizer_state_bytes', 'sync_bytes'} <= log[1].keys()


@pytest.mark.parametrize('words', [
    ['--optimizer=galore', '--galore_basis=power', '--checkpointing=True'],
    ['--optimizer=galore', '--galore_basis=svd', '--galore_rule=fira', '--param_dtype=bfloat16', '--dtype=bfloat16'],
    ['--optimizer=galore', '--galore_backward=projected', '--galore_basis=sketch', '--galore_gap=5', '--state_bits=16'],
], ids=['power', 'fira', 'sketch'])
def test_llama_with_galore_resumes_bit_for_bit(data_dir, tmp_path, words):
    words = ['--galore_rank=3', '--galore_gap=3', *words, '--vocab_size=257', '--n_mlp=24',
             '--gradient_accumulation_steps=2']

    a_llama_resumes_bit_for_bit(data_dir, tmp_path, words)
    assert len(sample.main([f'--out_dir={tmp_path}/a', '--num_samples=1', '--max_new_tokens=3',
                            '--device=cpu'])[0]) == 4


def test_a_resumed_run_steps_as_its_own_settings_say(data_dir, tmp_path):
    train(data_dir, tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    name = 'transformer.h.0.mlp.c_fc.weight'  # one step of AdamW apart: W (1 - lr decay) against W, and the same update
    start = config.load_checkpoint(f'{tmp_path}/a/ckpt.pt')['model'][name].clone()
    states = [train(data_dir, tmp_path / out, '--init_from=resume', '--max_iters=5', '--dropout=0.2', *words)
              for out, words in (('a', ['--weight_decay=0.5']), ('b', ['--weight_decay=0.0']))]
    lr = config.learning_rate_at(4, 0.01, 2, 20, 6e-5)
    assert torch.allclose(states[1]['model'][name] - states[0]['model'][name], 0.5 * lr * start, atol=1e-12)
    assert states[0]['model_config']['dropout'] == 0.2


def test_a_vocabulary_above_the_tokenizers_still_gives_text(data_dir, tmp_path):
    train(data_dir, tmp_path / 'a', '--vocab_size=4000', '--max_iters=1')
    text = sample.main([f'--out_dir={tmp_path}/a', '--num_samples=2', '--max_new_tokens=30', '--top_k=0',
                        '--device=cpu'])
    assert max(map(max, text)) < 257


def test_compiled_and_float16_runs_train_the_same(data_dir, tmp_path):
    words = ['--lowrank=attn,logit', '--heads=2', '--rank=2', '--head_input=split', '--merge_every=2',
             '--param_dtype=float32', '--dtype=float32']
    plain = train(data_dir, tmp_path / 'a', *words)['best_val_loss']
    assert train(data_dir, tmp_path / 'b', *words, '--compile=True')['best_val_loss'] == pytest.approx(plain, abs=1e-3)
    # its scaler skips the first steps
    half = train(data_dir, tmp_path / 'c', *words, '--dtype=float16', '--max_iters=12')
    assert half['scaler']['scale'] < 65536 and half['best_val_loss'] < 5.3


def test_sampled_text_is_the_same_with_heads_applied_or_merged(data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / 'a', '--lowrank=attn,logit', '--heads=2', '--rank=2', '--head_input=split',
          '--merge_every=3')
    words = [f'--out_dir={tmp_path}/a', '--num_samples=2', '--max_new_tokens=20', '--prompt=doc', '--device=cpu']
    merged = sample.main(words)
    assert capsys.readouterr().out.count('doc') == 2
    assert sample.main([*words, '--merged=False']) == merged
    assert sample.main([*words, '--seed=7']) != merged
    assert [len(text) for text in merged] == [23, 23]


def test_a_signal_saves_and_ends_with_zero(data_dir, tmp_path):
    run = subprocess.Popen([sys.executable, 'train_gpt.py', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/a',
                            '--dataset=tiny', '--block_size=16', '--n_layer=1', '--n_head=1', '--n_embd=8',
                            '--batch_size=2', '--max_iters=1000000', '--eval_interval=1000000', '--eval_iters=1',
                            '--log_interval=1', '--device=cpu'], cwd=HERE, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if '| train' in line:
            run.send_signal(signal.SIGTERM)
            break
    run.stdout.read()
    assert run.wait(20) == 0
    assert config.load_checkpoint(f'{tmp_path}/a/ckpt.pt')['step'] >= 1


def test_a_run_that_is_stopped_where_it_evaluates_makes_up_for_it(data_dir, tmp_path, monkeypatch):
    whole = train(data_dir, tmp_path / 'a', '--max_iters=8')
    for stop in (4, 8):
        steps = itertools.count(1)
        with monkeypatch.context() as patch:
            patch.setattr(config, 'stop_requested', lambda world_size: next(steps) == stop)
            train(data_dir, tmp_path / str(stop), '--max_iters=8')
        (tmp_path / str(stop) / 'log.jsonl').open('a').write('\n{"step": 9, "val_loss": 0}\n{"step":')  # of a crash
        resumed = train(data_dir, tmp_path / str(stop), '--max_iters=8', '--init_from=resume')
        assert resumed['step'] == 8 and same_state(whole['model'], resumed['model'])
        assert logged(tmp_path / str(stop), 'val_loss') == logged(tmp_path / 'a', 'val_loss')
        best = [config.load_checkpoint(f'{tmp_path}/{run}/best.pt') for run in ('a', stop)]
        assert best[0]['step'] == best[1]['step'] and best[0]['best_val_loss'] == best[1]['best_val_loss']


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(data_dir, tmp_path):
    train(data_dir, tmp_path / 'a')
    good = (tmp_path / 'a' / 'ckpt.pt').read_bytes()
    with pytest.raises(SystemExit, match='ckpt.pt of step 4'):
        train(data_dir, tmp_path / 'a', '--init_from=resume', '--max_iters=40', '--learning_rate=1e300',
              '--min_lr=1e300')
    assert (tmp_path / 'a' / 'ckpt.pt').read_bytes() == good


def test_bad_input_is_one_sentence_and_loses_nothing(data_dir, tmp_path, capsys):
    from safetensors.torch import save_file
    out = tmp_path / 'a'
    train(data_dir, out)
    held = (out / 'ckpt.pt').read_bytes()
    capsys.readouterr()
    save_file({'x': torch.ones(1)}, tmp_path / 'no.safetensors')
    (tmp_path / 'bad.safetensors').write_bytes(b'no')
    for word, *needles in [
            ('--dataset=c4', 'c4', 'prepare.py'),
            ('--vocab_size=100', '257', 'vocab_size=257'),
            ('--block_size=100000', 'block_size', '100000'),
            ('--n_layer=2', 'already holds a run', '--init_from=resume', '--overwrite=True'),
            ('--n_embd=17', 'n_head'),
            ('--lowrank=nowhere', 'c_attn'),
            ('--merge_every=5', 'lowrank'),
            ('--head_input=both', "'split'"), ('--heads=0', 'heads=0'), ('--eval_interval=0', 'eval_interval'),
            ('--galore_rank=0', 'galore_rank'), ('--per_layer=True', 'grad_clip=0.0'),
            ('--state_bits=12', '16, 8'), ('--merge_every=-5', 'merge_every'), ('--optimizer=sgd', "'adamw'"),
            ('--seed=-1', 'seed=-1'), ('--grad_clip=-1', 'grad_clip'), ('--dropout=1.5', 'dropout=1.5'),
            ('--galore_rule=fira', "optimizer='galore'"), (f'--init_from={tmp_path}/no.safetensors', 'wte'),
            (f'--init_from={tmp_path}/bad.safetensors', 'damaged'),
            ('--dtype=float16', 'param_dtype'), ('--param_dtype=foo', 'param_dtype'), ('--device=foo', "'cuda:N'"),
            ('--init_from=nothing.safetensors', 'nothing.safetensors')]:
        refused(capsys, lambda: train(data_dir, out, word), *needles)
    refused(capsys, lambda: train(data_dir, out, '--lowrank=attn', '--head_input=split', '--heads=3'), 'heads=3')
    refused(capsys, lambda: train(data_dir, out, '--lowrank=attn', '--merge_every=5'), 'merge_reset=True')
    refused(capsys, lambda: train(data_dir, out, '--init_from=resume', '--n_layer=3'), 'n_layer=2', '3')
    refused(capsys, lambda: train(data_dir, tmp_path / 'none', '--init_from=resume'), 'ckpt.pt')
    refused(capsys, lambda: train_llama.main(tiny(data_dir, out, '--init_from=resume')), 'another script')
    os.mkdir(tmp_path / 'best')
    (tmp_path / 'best' / 'ckpt.pt').write_bytes((out / 'best.pt').read_bytes())
    refused(capsys, lambda: train(data_dir, tmp_path / 'best', '--init_from=resume'), 'weights alone')
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', '--lowrank=attn', '--head_input=split',
                                  '--head_compute=sequential'), "'parallel'")
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', '--merge_reset=True'), 'merge_every')
    galolte = ['--lowrank=attn', '--head_input=split', '--head_basis=gradient', '--merge_every=3']
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', *galolte, '--galore_gap=10'),
            'galore_gap=10', 'merge_every=3')
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', *galolte, '--optimizer=galore'), "optimizer='adamw'")
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', '--galore_basis=sketch'), "galore_basis='power'")
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', *galolte, '--galore_gap=3', '--galore_rule=fira'),
            "galore_rule='fira'")
    refused(capsys, lambda: train(data_dir, tmp_path / 'x', '--lowrank=attn', '--merge_every=5', '--merge_reset=True',
                                  '--optimizer=galore', '--galore_rank=2'), "'adamw'")
    assert not (tmp_path / 'x').exists()
    split = {**train_gpt.defaults, 'lowrank': 'attn', 'heads': 4, 'head_input': 'split', 'merge_every': 2}
    for changes, count, said in [({}, 3, 'heads=4'), ({'sync': 'always'}, 2, "'step'"),
                                 ({'state_bits': 8}, 2, 'state_bits=None'),
                                 ({'sync': 'merge', 'merge_every': 0}, 2, 'merge_every'),
                                 ({'merge_every': 0}, 2, 'meet'),
                                 ({'sync': 'merge', 'optimizer': 'galore', 'grad_clip': 0.0}, 2, 'other bases'),
                                 ({'merge_reset': True, 'rewarm_iters': 2}, 1, 'never end'),
                                 ({'sync': 'merge', 'merge_every': 2}, 1, 'torchrun'),
                                 ({'sync': 'merge', 'merge_every': 2, 'lowrank': '', 'optimizer': 'galore'},
                                  2, "'adamw'"),
                                 ({'sync': 'merge', 'merge_every': 2, 'lowrank': '', 'merge_reset': True},
                                  2, 'nothing to reset'),
                                 ({'merge_every': 2, 'lowrank': ''}, 2, "sync='merge'")]:
        with pytest.raises(ValueError, match=said):
            lowrank.check_settings({**split, **changes}, count)
    lowrank.check_settings({**split, 'sync': 'merge', 'merge_every': 2}, 2)
    if not torch.cuda.is_available():
        refused(capsys, lambda: train(data_dir, out, '--device=cuda'), '--device=cpu')
    assert (out / 'ckpt.pt').read_bytes() == held
    (out / 'ckpt.pt').write_bytes(held[:1000])
    refused(capsys, lambda: train(data_dir, out, '--init_from=resume'), 'damaged')


# -----------------------------------------------------------------------------
# vit


def tiny_vit(root, out_dir, *words):
    """The settings of a tiny run in float64: a ViT of two layers from scratch on the tiny pathmnist."""
    return [f'--data_dir={root}', f'--out_dir={out_dir}', '--dataset=pathmnist', '--init_from=scratch', '--n_layer=2',
            '--model=vit_tiny_patch16_224', '--img_size=28', '--patch_size=14', '--n_head=2', '--n_embd=16',
            '--batch_size=4', '--eval_interval=2', '--log_interval=2', '--warmup_iters=2', '--learning_rate=0.01',
            '--param_dtype=float64', '--dtype=float64', '--device=cpu', '--max_iters=2', *words]


def see(root, out_dir, *words):
    """Runs train_vit.py's main on a tiny model: (the checkpoint it ends with, the records of its log)."""
    train_vit.main(tiny_vit(root, out_dir, *words))
    with open(f'{out_dir}/log.jsonl', encoding='utf-8') as file:
        log = [json.loads(line) for line in file]
    return os.path.exists(f'{out_dir}/ckpt.pt') and config.load_checkpoint(f'{out_dir}/ckpt.pt'), log


def drawn_vit():
    torch.manual_seed(0)
    shape = dict(model='vit_tiny_patch16_224', img_size=28, patch_size=14, n_layer=2, n_head=2, n_embd=16)
    return train_vit.create(shape, 9).double()


def move_heads(model):
    with torch.no_grad():
        for layer in lowrank.lowrank_layers(model):
            layer.B.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(layer.B.numel())) / 50)


@pytest.mark.parametrize('targets', ['attn', 'q,v', 'k', 'mlp', 'logit', 'attn,mlp,logit'])
@pytest.mark.parametrize('split', [False, True])
def test_heads_on_a_vit_keep_its_outputs_and_merge(targets, split):
    vit, x = drawn_vit(), torch.randn(4, 3, 28, 28, dtype=torch.float64)
    plain = vit(x)
    names = lowrank.apply_mhlora(vit, targets.split(','), 2, 3, 6.0, split=split, merge_every=2)
    assert len(names) == {'k': 2, 'logit': 1, 'attn,mlp,logit': 9}.get(targets, 4)
    assert torch.allclose(vit(x), plain, atol=1e-12)
    for _ in range(2):  # the second time earlier values are taken off
        move_heads(vit)
        with lowrank.averaged_heads(vit):
            before = vit(x)
            assert not torch.allclose(before, plain, atol=1e-5)
            lowrank.merge(vit)
            assert torch.allclose(vit(x), before, atol=1e-12)
        for layer in lowrank.lowrank_layers(vit):
            layer.A.data.mul_(-1.5)
    merged = drawn_vit()
    merged.load_state_dict(lowrank.merged_state_dict(vit))  # thirds of a fused projection are one again
    with lowrank.averaged_heads(vit):
        assert torch.allclose(vit(x), merged(x), atol=1e-12)


def test_melo_trains_so_many_parameters():
    with torch.device('meta'):
        vit = timm.create_model('vit_base_patch16_224', num_classes=9)
    lowrank.apply_mhlora(vit, ['q', 'v'], heads=1, rank=4)
    lowrank.freeze_rest(vit, ('logit',))
    counts = lowrank.count_parameters(vit)
    assert counts['heads'] == 147_456 and counts['trainable'] == 147_456 + 769 * 9 == 147_456 + counts['logit']


def test_targets_that_cover_each_other_or_nothing_are_refused():
    for targets, message in ((['attn', 'q'], "'attn,q' puts heads on blocks.0.attn.qkv"), (['v', 'qkv'], 'leave one'),
                             (['c_attn'], 'no linear layer')):
        with pytest.raises(ValueError, match=message):
            lowrank.apply_mhlora(drawn_vit(), targets)
    assert lowrank.apply_mhlora(tiny_gpt(), ['q', 'v'], rank=2) == [
        f'transformer.h.{i}.attn.c_attn.{part}' for i in range(2) for part in 'qv']


def auc_by_hand(positive, score):
    """The share of pairs of a positive and a negative in which the positive scores higher; equal ones count half."""
    pairs = [(a > b) + 0.5 * (a == b) for a, p in zip(score, positive) for b, q in zip(score, positive) if p and not q]
    return sum(pairs) / len(pairs)


def test_metrics_agree_with_a_hand_computation():
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=1)
    y = torch.arange(30) % 3
    for task in ('multi-class', 'ordinal-regression'):
        accuracy, auc, by_class, matrix = train_vit.measure(logits, y, task)
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        right = [max(range(3), key=row.__getitem__) == label for row, label in zip(logits.tolist(), y.tolist())]
        assert accuracy == pytest.approx(sum(right) / 30) and matrix.sum() == 30
        assert by_class == pytest.approx([sum(right[c::3]) / 10 for c in range(3)])
        assert auc == pytest.approx(sum(auc_by_hand(y == c, p[:, c]) for c in range(3)) / 3)
    accuracy, auc, _, matrix = train_vit.measure(logits[:, :2], y % 2, 'binary-class')
    assert auc == pytest.approx(auc_by_hand(y % 2 == 1, (logits[:, 1] - logits[:, 0]).sigmoid()))
    assert accuracy == pytest.approx(matrix.diagonal().sum() / 30)
    several = torch.stack([y == 0, y < 2, torch.arange(30) < 9], 1).float()
    accuracy, auc, by_class, matrix = train_vit.measure(logits, several, 'multi-label, binary-class')
    assert matrix is None and by_class == pytest.approx(((logits > 0) == (several > 0)).double().mean(0).tolist())
    assert accuracy == pytest.approx(sum(by_class) / 3)
    assert auc == pytest.approx(sum(auc_by_hand(several[:, c] > 0, logits[:, c]) for c in range(3)) / 3)
    p = logits.sigmoid()
    by_hand = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    assert train_vit.criterion(logits, several).item() == pytest.approx(by_hand.item())


def test_augmentation_is_a_function_of_its_key_and_of_the_row():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    both = train_vit.augmented(images, 'flip,crop', (1, 2, 0), 8, np.arange(8))
    assert torch.equal(both, train_vit.augmented(images, 'flip,crop', (1, 2, 0), 8, np.arange(8)))
    assert torch.equal(both[1::2], train_vit.augmented(images[1::2], 'flip,crop', (1, 2, 0), 8, np.arange(1, 8, 2)))
    assert not torch.equal(both, train_vit.augmented(images, 'flip,crop', (1, 3, 0), 8, np.arange(8)))
    flipped = train_vit.augmented(images, 'flip', (0,), 8, np.arange(8))
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, images)]
    assert 0 < sum(turned) < 8 and all(t or torch.equal(a, b) for t, a, b in zip(turned, flipped, images))
    wide = F.pad(images.float(), (2, 2, 2, 2), mode='replicate').byte()
    for a, b in zip(train_vit.augmented(images, 'crop', (0,), 8, np.arange(8)), wide):
        assert any(torch.equal(a, b[:, i:i + 16, j:j + 16]) for i in range(5) for j in range(5))


def test_images_are_normalised_as_timm_has_it():
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    x = train_vit.normalised(grey, 28, mean, std, torch.float32)
    assert torch.allclose(x * std + mean, (grey / 255).expand(2, 3, 28, 28), atol=1e-6)
    from torchvision.transforms.functional import InterpolationMode, resize
    theirs = resize(grey, [56, 56], InterpolationMode.BICUBIC, antialias=True)
    ours = train_vit.normalised(grey, 56, 0, 1, torch.float32) * 255
    assert (ours[:, :1] - theirs).abs().max() < 1


@pytest.mark.parametrize('words', [
    ['--augment=flip,crop', '--gradient_accumulation_steps=2'],
    ['--lowrank=q,v,mlp', '--rank=2', '--heads=2', '--param_dtype=float32', '--dtype=bfloat16'],
    ['--lowrank=attn', '--rank=2', '--heads=2', '--head_input=split', '--merge_every=3', '--train=all',
     '--augment=flip'],
    ['--optimizer=galore', '--galore_rank=3', '--galore_gap=2', '--galore_backward=projected', '--state_bits=8',
     '--grad_clip=0'],
    ['--lowrank=attn', '--rank=2', '--heads=2', '--head_input=split', '--head_basis=gradient', '--merge_every=2',
     '--galore_gap=4', '--galore_basis=sketch', '--checkpointing=True'],
    ['--train=classifier', '--param_dtype=float32', '--dtype=float16'],
], ids=['full', 'lora', 'lte', 'galore', 'galolte', 'probe'])
def test_a_vit_resumes_bit_for_bit(image_root, tmp_path, words):
    whole, log = see(image_root, tmp_path / 'a', *words, '--max_iters=4', '--lr_decay_iters=20')
    see(image_root, tmp_path / 'b', *words, '--lr_decay_iters=20')
    resumed, again = see(image_root, tmp_path / 'b', *words, '--max_iters=4', '--lr_decay_iters=20',
                         '--init_from=resume')
    for key in ('model', 'optimizer', 'sketches', 'step', 'best_val_auc'):
        assert same_state(whole[key], resumed[key]), key
    best = max(record['val_auc'] for record in log if record.get('val_auc') and record['step'])
    assert whole['step'] == 4 and whole['best_val_auc'] == best
    assert [record['step'] for record in log if 'val_loss' in record] == [0, 2, 4]
    test, = (record for record in log if 'test_loss' in record)
    assert test['test_auc'] == again[-1]['test_auc'] and len(test['test_acc_by_class']) == 9
    assert {'train_loss', 'images_per_s', 'peak_memory_bytes', 'trainable_parameters'} <= log[1].keys()
    assert (tmp_path / 'a' / 'confusion.png').stat().st_size > 1000


def test_epochs_are_passes_over_the_images_and_a_run_learns(tmp_path):
    archive(tmp_path, 'pneumoniamnist', counts=dict(train=64, val=30, test=30))
    x = np.random.default_rng(0).integers(0, 128, (64, 28, 28)).astype(np.uint8)
    x += 100 * (np.arange(64) % 2)[:, None, None].astype(np.uint8)  # grey; ill ones are lighter
    archive(tmp_path, 'pneumoniamnist', counts=dict(train=64, val=30, test=30), train_images=x,
            val_images=x[:30], test_images=x[:30])
    prepare_images(tmp_path, 'pneumoniamnist')
    state, log = see(tmp_path, tmp_path / 'a', '--dataset=pneumoniamnist', '--epochs=3', '--batch_size=8',
                     '--eval_interval=9')
    assert state['step'] == 24 and log[-1]['test_auc'] > 0.95


def test_a_vit_writes_no_text(image_root, tmp_path, capsys):
    see(image_root, tmp_path / 'a')
    refused(capsys, lambda: sample.main([f'--out_dir={tmp_path}/a', '--device=cpu']), 'holds a ViT')
    decayed, spared = (group['param_names'] for group in galore.param_groups(drawn_vit(), 0.1))
    assert {'pos_embed', 'cls_token'} <= set(spared) and 'patch_embed.proj.weight' in decayed


def test_several_labels_an_image_train_and_evaluate(tmp_path):
    archive(tmp_path, 'chestmnist', counts=dict(train=20, val=30, test=30))
    prepare_images(tmp_path, 'chestmnist')
    state, log = see(tmp_path, tmp_path / 'a', '--dataset=chestmnist')
    assert len(log[-1]['test_acc_by_class']) == 14 and not (tmp_path / 'a' / 'confusion.png').exists()
    assert log[-1]['test_acc'] == pytest.approx(np.mean(log[-1]['test_acc_by_class']))


def test_weights_of_timm_and_checkpoints_of_ours_are_gone_on_from(image_root, tmp_path, capsys):
    from safetensors.torch import save_file
    torch.manual_seed(3)
    names = dict(img_size=28, patch_size=14, depth=2, num_heads=2, embed_dim=16)
    theirs = timm.create_model('vit_tiny_patch16_224', num_classes=9, **names)
    save_file(theirs.state_dict(), tmp_path / 'theirs.safetensors')
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pt')
    asked = [f'--init_from={tmp_path}/theirs.safetensors', '--eval_only=True']
    _, log = see(image_root, tmp_path / 'a', *asked)
    x, y = prepare.Images('pathmnist', 'val', image_root).fixed_batch(0, 30)
    loss = F.cross_entropy(theirs.double()((x.double() / 255 - 0.5) / 0.5), y).item()
    assert log[0]['val_loss'] == pytest.approx(loss, abs=1e-6) and 'test_acc' in log[1]
    assert see(image_root, tmp_path / 'b', f'--init_from={tmp_path}/theirs.pt', '--eval_only=True')[1] == log
    # the embedding of places resized
    see(image_root, tmp_path / 'c', f'--init_from={tmp_path}/theirs.pt', '--img_size=42')
    # ours: split heads that merge, then full fine-tuning from what they made of it, with another classifier
    see(image_root, tmp_path / 'lte', '--lowrank=attn', '--heads=2', '--rank=2', '--head_input=split',
        '--merge_every=2')
    first, = (record for record in see(image_root, tmp_path / 'd', f'--init_from={tmp_path}/lte/best.pt',
                                       '--eval_only=True', '--n_layer=None')[1] if 'val_loss' in record)
    record = json.loads((tmp_path / 'lte' / 'log.jsonl').read_text().splitlines()[2])
    assert record['step'] == 2 and first['val_loss'] == pytest.approx(record['val_loss'], abs=1e-6)
    other, _ = see(image_root, tmp_path / 'e', f'--init_from={tmp_path}/lte/best.pt', '--dataset=digits',
                   '--n_layer=None')
    assert other['model']['head.weight'].shape == (10, 16) and other['model_config']['n_layer'] == 2
    refused(capsys, lambda: see(image_root, tmp_path / 'f', f'--init_from={tmp_path}/lte/best.pt', '--dataset=digits',
                                '--eval_only=True'), '9 classes', "10 of data set 'digits'")
    refused(capsys, lambda: see(image_root, tmp_path / 'f', f'--init_from={tmp_path}/theirs.pt', '--n_layer=3'),
            'theirs.pt', 'n_layer')
    refused(capsys, lambda: see(image_root, tmp_path / 'f', f'--init_from={tmp_path}/lte/best.pt', '--n_head=4'),
            'n_head=2', '4')


def test_an_adapter_alone_is_saved_loaded_and_refused_by_another_base(image_root, tmp_path, capsys):
    base = f'{tmp_path}/base/best.pt'
    see(image_root, tmp_path / 'base')
    words = [f'--init_from={base}', '--lowrank=q,v,logit', '--rank=2', '--alpha=8']
    state, log = see(image_root, tmp_path / 'a', *words, '--learning_rate=0.1')
    path = tmp_path / 'a' / 'adapter.safetensors'
    assert path.stat().st_size < (tmp_path / 'a' / 'best.pt').stat().st_size / 2
    again = [*words, f'--adapter={path}', '--eval_only=True']
    loaded = see(image_root, tmp_path / 'b', *again)[1]
    wanted = {**log[-1], 'step': 0}
    assert loaded[-1] == wanted and loaded[0]['val_auc'] == state['best_val_auc']
    see(image_root, tmp_path / 'other', '--seed=7')
    with safetensors.safe_open(path, 'pt') as file:
        parts = {name: file.get_tensor(name) for name in sorted(file.keys())[1:]}
        safetensors.torch.save_file(parts, tmp_path / 'part.safetensors', file.metadata())
    for more, needle in (([f'--init_from={tmp_path}/other/best.pt'], 'base='), (['--alpha=4'], 'alpha=8.0, not 4.0'),
                         (['--lowrank=q,k'], 'lowrank='), ([f'--adapter={base}'], 'best.pt'),
                         ([f'--adapter={tmp_path}/part.safetensors'], 'lacks')):
        refused(capsys, lambda: see(image_root, tmp_path / 'c', *again, *more), needle)
    see(image_root, tmp_path / 'lte', '--lowrank=attn', '--rank=2', '--train=all')
    assert not (tmp_path / 'lte' / 'adapter.safetensors').exists()  # the rest trained too


def test_mistakes_with_a_vit_are_one_sentence(image_root, tmp_path, capsys):
    see(image_root, tmp_path / 'a')
    (tmp_path / 'bad.safetensors').write_bytes(b'no')
    for word, *needles in [
            ('--model=vit_tiny_patch16_244', "did you mean 'vit_tiny_patch16_224'"),
            ('--dataset=bloodmnist', 'prepare.py'), ('--n_head=3', 'num_heads', 'n_embd'),
            ('--augment=flop', "'flip'"), ('--train=some', "'classifier'"),
            ('--init_from=nowhere.pt', 'nowhere.pt'), (f'--init_from={tmp_path}/bad.safetensors', 'bad.safetensors'),
            ('--lowrank=attn,q', 'qkv'), ('--batch_size=0', 'batch_size'),
            ('--max_iters=9', 'already holds a run')]:
        refused(capsys, lambda: see(image_root, tmp_path / 'a', word), *needles)
    refused(capsys, lambda: see(image_root, tmp_path / 'a', '--init_from=resume', '--model=vit_small_patch16_224'),
            'model=')
    refused(capsys, lambda: see(image_root, tmp_path / 'a', '--init_from=resume', '--dataset=digits'),
            '9 classes', "10 of")


# -----------------------------------------------------------------------------
# two ranks: one spawn for all distributed laws

GALORE = ['--optimizer=galore', '--galore_rank=3', '--galore_gap=3', '--gradient_accumulation_steps=2', '--max_iters=8']
RANKS = {'full': ['--gradient_accumulation_steps=2'],
         'relora': ['--lowrank=attn,logit', '--rank=2', '--merge_every=2', '--merge_reset=True'],
         'mhlora': ['--lowrank=attn,logit', '--heads=2', '--rank=2', '--max_iters=8'],
         'galore': GALORE, 'fira': [*GALORE, '--galore_rule=fira'],
         'projected': [*GALORE, '--galore_backward=projected', '--grad_clip=0.2'],
         'sketch': [*GALORE, '--galore_backward=projected', '--galore_basis=sketch'],
         'per_layer': [*GALORE, '--galore_backward=projected', '--per_layer=True', '--grad_clip=0', '--n_embd=32']}
# evaluated and saved at steps 4 and 8, both between two merges
LTE = ['--lowrank=attn,mlp', '--heads=4', '--rank=2', '--head_input=split', '--merge_every=3', '--max_iters=8']
SPLIT = {'lte': LTE, 'reset': [*LTE, '--merge_reset=True']}
SPLIT['galolte'] = [*LTE, '--head_basis=gradient', '--galore_basis=svd', '--galore_gap=6']
SPLIT['galolte_sketch'] = [*SPLIT['galolte'], '--galore_basis=sketch', '--state_bits=32']
REPLICAS = [*LTE, '--sync=merge', '--grad_clip=0.0', '--weight_decay=0.0']
LOCAL = ['--sync=merge', '--merge_every=3', '--max_iters=8', '--grad_clip=0.0', '--weight_decay=0.0']  # no heads at all


VIT = {'vit': ['--lowrank=q,v', '--heads=2', '--rank=2', '--augment=flip,crop', '--gradient_accumulation_steps=2'],
       'vit_lte': ['--lowrank=q,mlp', '--heads=4', '--rank=2', '--head_input=split', '--merge_every=2', '--train=all',
                   '--augment=crop', '--max_iters=3']}


def share_one_group():
    """The runs of train_gpt.main share the process group that the first one joins; returns what ends it."""
    torch.set_num_threads(1)
    join, end = torch.distributed.init_process_group, torch.distributed.destroy_process_group
    torch.distributed.init_process_group = lambda *a: None if torch.distributed.is_initialized() else join(*a)
    torch.distributed.destroy_process_group = torch.distributed.barrier  # rank 0's files are written when a run ends
    return end


def two_ranks(data_dir, out, image_root):
    """What each of two ranks of torchrun runs."""
    end = share_one_group()
    for name, words in VIT.items():
        train_vit.main(tiny_vit(image_root, f'{out}/{name}', *words))
    for name, words in {**RANKS, **SPLIT, 'replicas': REPLICAS, 'local': LOCAL}.items():
        train_gpt.main(tiny(data_dir, f'{out}/{name}', *words))
    for name, words in {**SPLIT, 'replicas': REPLICAS, 'local': LOCAL}.items():  # stopped in the middle of a period
        train_gpt.main(tiny(data_dir, f'{out}/{name}_half', *words, '--max_iters=4'))
        if torch.distributed.get_rank() == 0:
            shutil.copytree(f'{out}/{name}_half', f'{out}/{name}_on')
        torch.distributed.barrier()
        train_gpt.main(tiny(data_dir, f'{out}/{name}_on', *words, '--init_from=resume'))
    # a run of one process goes on with two
    for name, words in (('mhlora', RANKS['mhlora']), ('lte', LTE)):
        train_gpt.main(tiny(data_dir, f'{out}/{name}_joined', *words, '--init_from=resume'))
    merged_weights_have_the_same_bits_on_every_rank()
    all_ranks_skip_a_step_that_overflows_on_one()
    end()


def four_ranks(rank, store, data_dir, out):
    """What each of four ranks runs; they are forked, so that torch is imported once."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='4')
    torch.distributed.init_process_group('gloo', f'file://{store}', rank=rank, world_size=4)
    end = share_one_group()
    for name in ('lte', 'reset'):
        train_gpt.main(tiny(data_dir, f'{out}/{name}_four', *SPLIT[name]))
    with pytest.raises(SystemExit):  # says: as many as before
        train_gpt.main(tiny(data_dir, f'{out}/replicas_half', *REPLICAS, '--init_from=resume'))
    with pytest.raises(SystemExit):
        train_gpt.main(tiny(data_dir, f'{out}/local_half', *LOCAL, '--init_from=resume'))
    end()


def merged_weights_have_the_same_bits_on_every_rank():
    rank = torch.distributed.get_rank()
    for dtype, merge_reset, heads_rank in ((torch.float32, False, 2), (torch.bfloat16, True, 2),
                                           (torch.float32, False, 8), (torch.bfloat16, True, 16)):
        gpt = tiny_gpt().to(dtype)
        lowrank.apply_mhlora(gpt, ('attn', 'mlp'), 4, heads_rank, 3.0, split=True, merge_every=5,
                             merge_reset=merge_reset, worker=rank, workers=2)
        assert {layer.sends_products for layer in lowrank.lowrank_layers(gpt)} == {heads_rank > 2}  # or factors
        replicas = lowrank.replica_parameters(gpt)
        torch.manual_seed(rank)
        for _ in range(2):
            with torch.no_grad():
                for p in gpt.parameters():
                    p.add_(0.1 * torch.randn_like(p) if p.requires_grad else 0)
            plain, idx = tiny_gpt().to(dtype), torch.arange(16)[None]
            plain.load_state_dict(lowrank.merged_state_dict(gpt, replicas))
            with lowrank.averaged_heads(gpt, replicas):
                assert torch.allclose(gpt(idx)[0], plain(idx)[0], atol=1e-5 if dtype == torch.float32 else 0.1)
            lowrank.merge(gpt, torch.Generator().manual_seed(5), replicas)
            for name, layer in gpt.named_modules():
                if isinstance(layer, lowrank.MHLoRALinear):  # taken from all heads, gathered
                    assert torch.allclose(layer.weight, plain.get_submodule(name).weight,
                                          atol=0.02 if merge_reset else 1e-5)
            for p in plain.load_state_dict(gpt.state_dict(), strict=False) and gpt.parameters():
                if p not in lowrank.own_heads(gpt):
                    assert torch.equal(*lowrank.gather(p))


def all_ranks_skip_a_step_that_overflows_on_one():
    p, scaler = nn.Parameter(torch.ones(3)), torch.amp.GradScaler('cpu')
    optimizer = torch.optim.AdamW([p], fused=True)
    for overflows in ((0,), (0, 1)):  # on which ranks
        optimizer.zero_grad()
        scaler.scale(p.sum() * (math.inf if torch.distributed.get_rank() in overflows else 1.0)).backward()
        scaler.unscale_(optimizer)
        config.share_overflow(scaler, optimizer, 2)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(p, torch.ones(3)) and scaler.get_scale() == 2**14
    # the same with GaLore's leaf under plain DDP, which averages it, and a sketch that the infinities poison
    gpt, idx, scaler = tiny_gpt(), torch.arange(16)[None], torch.amp.GradScaler('cpu')
    lowrank.apply_mhlora(gpt, rank=3, factors='basis', merge_every=1)
    optimizer = galore.LowRankAdamW(gpt, lr=0.01, basis_every=4)
    net, start = nn.parallel.DistributedDataParallel(gpt), lowrank.merged_state_dict(copy.deepcopy(gpt))
    for step, overflows in enumerate(((0,), (0, 1), (), (), (), ())):
        optimizer.begin(step)
        loss = net(idx, idx) * (math.inf if torch.distributed.get_rank() in overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        config.share_overflow(scaler, optimizer, 2)
        lowrank.clip_gradients(gpt, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(x, start[name]) for name, x in lowrank.merged_state_dict(gpt).items()]
        assert all(moved) if step > 1 else not any(moved), step
    for layer in lowrank.lowrank_layers(gpt):  # the second gradient was lost, the sketch was not
        assert optimizer.state[layer.trained]['bases'] == 2
    assert scaler.get_scale() == 2**14 and all(torch.equal(*lowrank.gather(x)) for x in gpt.state_dict().values())
    assert all(x.isfinite().all() for x in gpt.state_dict().values())


def logged(out, key):
    """{step: value} of a key in log.jsonl."""
    with open(f'{out}/log.jsonl') as file:
        return {record['step']: record[key] for record in map(json.loads, file) if key in record}


def by_hand(data_dir, steps, each):
    """sync='merge' written down for two workers of so many heads each: their models after so many steps."""
    torch.manual_seed(train_gpt.defaults['seed'])
    whole = models.GPT(models.GPTConfig(16, 257, 2, 2, 16)).double()
    workers = [copy.deepcopy(whole) for _ in range(2)]
    for gpt, heads in ((whole, 2 * each), (workers[0], each), (workers[1], each)) if each else ():
        lowrank.apply_mhlora(gpt, ('attn', 'mlp'), heads, 2, 4.0, split=True, merge_every=3)
    for k, gpt in enumerate(workers):  # worker k has the heads k and k + 2
        gpt.load_state_dict({name: x[k::2] if name.split('.')[-1][:1] in 'AB' else x
                             for name, x in whole.state_dict().items()})
    optimizers = [torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], betas=(0.9, 0.95),
                                    weight_decay=0.0) for gpt in workers]
    data = prepare.Tokens('tiny', 'train', 16, data_dir)
    for step in range(steps):
        for k, (gpt, optimizer) in enumerate(zip(workers, optimizers)):
            optimizer.param_groups[0]['lr'] = config.learning_rate_at(step, 0.01, 2, 20, 6e-5)
            optimizer.zero_grad()
            gpt(*data.batch(4, step, seed=train_gpt.defaults['seed'], rank=k, world_size=2, heads=each or 1)).backward()
            optimizer.step()
        if step % 3 == 2:
            with torch.no_grad():
                for layers in zip(*map(lowrank.lowrank_layers, workers)):
                    change = sum(layer.B @ layer.A - layer.B_merged @ layer.A_merged for layer in layers).sum(0)
                    for layer in layers:
                        layer.weight += 4.0 / 2 / 4 * change  # s / H
                        layer.A_merged.copy_(layer.A), layer.B_merged.copy_(layer.B)
                for one, two in zip(*(gpt.parameters() for gpt in workers)):
                    if one.requires_grad and one.dim() < 3:
                        one.copy_((one + two) / 2), two.copy_(one)
    return workers


def test_any_number_of_ranks_trains_the_same(data_dir, image_root, tmp_path):
    for name, words in (('mhlora', RANKS['mhlora']), ('lte', LTE)):
        train(data_dir, tmp_path / f'{name}_joined', *words, '--max_iters=4')
    python, where = [sys.executable, '-c'], (data_dir, str(tmp_path))
    for command in ([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no_python',
                     *python, f'import test_lowrank as t; t.two_ranks(*{where}, {str(image_root)!r})'],
                    [*python, 'import test_lowrank as t; t.torch.multiprocessing.start_processes('
                     f't.four_ranks, {(f"{tmp_path}/store", *where)}, 4, start_method="fork")']):
        subprocess.run(command, cwd=HERE, check=True, timeout=100)

    def saved(name):
        return config.load_checkpoint(f'{tmp_path}/{name}/ckpt.pt')
    for name in SPLIT:  # two ranks began, one goes on
        train(data_dir, tmp_path / f'{name}_half', *SPLIT[name], '--init_from=resume')
    for name, words in {**RANKS, **SPLIT}.items():
        one = train(data_dir, tmp_path / 'one' / name, *words)
        for other in (name, f'{name}_half', f'{name}_on', f'{name}_joined', f'{name}_four'):
            if (tmp_path / other).exists():
                for key, value in one['model'].items():
                    assert torch.allclose(value, saved(other)['model'][key], rtol=0, atol=1e-10), (other, key)
                for key, tolerance in (('val_loss', 1e-10), ('train_loss', 2e-6)):  # the latter is added up in float32
                    assert logged(tmp_path / other, key) == pytest.approx(logged(tmp_path / 'one' / name, key),
                                                                          abs=tolerance)
    for name in (*SPLIT, 'replicas', 'local'):  # bit for bit at the same number of ranks
        for key in ('model', 'optimizer', 'sketches', 'replicas', 'step', 'best_val_loss'):
            assert same_state(saved(name)[key], saved(f'{name}_on')[key]), (name, key)
    assert len(sample.main([f'--out_dir={tmp_path}/replicas', '--num_samples=1', '--max_new_tokens=3',
                            '--device=cpu'])[0]) == 4

    for name, words in VIT.items():
        one, log = see(image_root, tmp_path / 'one' / name, *words)
        for key, value in one['model'].items():
            assert torch.allclose(value, saved(name)['model'][key], rtol=0, atol=1e-10), (name, key)
        for key in ('val_loss', 'test_loss', 'test_auc'):  # the ranks share a split
            assert logged(tmp_path / name, key) == pytest.approx(logged(tmp_path / 'one' / name, key), abs=1e-10)

    for run, each in (('local', 0), ('replicas', 2)):
        workers, state = by_hand(data_dir, 8, each), saved(run)
        for k, gpt in enumerate(workers):
            for name, x in gpt.state_dict().items():
                held = state['model'][name][k::2] if name.split('.')[-1][:1] in 'AB' else \
                    state['replicas'][name][k] if name in state['replicas'] else state['model'][name]
                assert name == 'lm_head.weight' or torch.allclose(x, held, atol=1e-10), (run, name)

    # bytes: 2 heads of rank 2 a rank, m + n = 256 a block, twice that where primes go along; 8 bytes a number
    shapes = [tuple(layer.weight.shape) for layer in lowrank.lowrank_layers(workers[0])]
    others = sum(p.numel() for p in workers[0].parameters() if p.requires_grad and p.dim() < 3)
    # GaLoLTE of rank 2: a factor and its first moment after steps 3 and 6; first bases from rank 0, one refresh of each
    # layer within the eight steps, a sketch that is averaged and a basis from rank 0
    factors, bases = (16 * sum(side(shape) for shape in shapes) for side in (max, min))
    sent = sum(logged(tmp_path / 'galolte_sketch', 'sync_bytes').values()) * 2
    assert sent == 8 * 8 * others + 4 * factors + 3 * bases
    step, gathered, merge, refresh = bench.sent_bytes(shapes, others, 'local AdamW', 2, 2, 2, 8)
    assert sum(logged(tmp_path / 'local', 'sync_bytes').values()) * 2 == 8 * step + 2 * merge and not gathered + refresh
    heads, step = 2 * 2 * 2 * 256 * 8, 8 * sum(p.numel() for p in workers[0].parameters()
                                               if p.requires_grad and p.dim() < 3)
    for name, gather, each_step, at_merge in (('lte', 2 * heads, step, 0), ('reset', heads, step, 0),
                                              ('replicas', 2 * heads, 0, step)):
        if name != 'reset':
            said = bench.sent_bytes(shapes, others, "LTE, sync='merge'" if name == 'replicas' else 'LTE', 2, 2, 2, 8)
            assert said == (each_step, gather, at_merge, 0)
        merging = each_step + (gather + at_merge) // 2  # merges after steps 3 and 6, a line every two steps
        assert logged(tmp_path / name, 'sync_bytes') == {2: each_step, 4: merging, 6: merging, 8: each_step}, name


def test_the_planner_takes_a_config_and_counts_every_byte(tmp_path, capsys):
    path = tmp_path / 'tiny.py'
    path.write_text("# tiny\n# python train_gpt.py tiny.py\n"
                    "block_size, n_layer, n_head, n_embd, vocab_size = 16, 2, 2, 32, 64\n"
                    "lowrank, heads, rank, head_input, merge_every, galore_rank = 'attn', 2, 3, 'split', 5, 4\n")
    bench.memory(['--config', str(path), '--budget', '1e-6GB'])  # where nothing fits there is less to plan
    rows = [line for line in capsys.readouterr().out.splitlines() if 'float' in line]
    methods = ('full rank', 'GaLore', 'GaLore, projected', 'LTE, 2 heads of rank 3')
    assert [row[:34].strip() for row in rows] == [name for name in methods for _ in range(2)]
    assert all(row[34:].split()[1] == 'none' for row in rows)
    for script, tiny_shape in ((train_llama, dict(n_layer=2, n_embd=32, n_head=2, n_mlp=48, vocab_size=64,
                                                  block_size=16)),
                               (train_vit, dict(n_layer=2, n_embd=32, n_head=2, img_size=32, patch_size=16))):
        said = bench.planned({**script.defaults, **tiny_shape, 'optimizer': 'adamw', 'dtype': 'float32'}, None, 4)
        assert said['state'] - 2 * said['weights'] in range(-8192, 4096)  # two moments; counters; buffers have none
        # in the optimizer's step, and not much more
        assert 4 * said['weights'] - 16384 < said['total'] < 9 * said['weights']
    for words, said in ((['--budget', '12'], 'no number with a unit'), (['--budget', 'xGB'], 'no number with'),
                        (['--config', str(tmp_path / 'no.py')], 'is not there')):
        with pytest.raises(SystemExit):
            bench.memory(['--config', str(path), *words])
        assert said in capsys.readouterr().err
    path.write_text('n_layer = 2\n')
    with pytest.raises(SystemExit):
        bench.memory(['--config', str(path)])
    assert 'does not say whose it is' in capsys.readouterr().err
