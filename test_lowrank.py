"""
The laws of the repository, one section for each room: `pytest test_lowrank.py`. Equalities are checked in float64
against independent formulations; the scripts run for real, on tiny data.
"""

import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import lowrank
import model as models
import prepare
import sample
import train_gpt

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


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return models.GPT(models.GPTConfig(**{**dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16), **changes}))


# -----------------------------------------------------------------------------
# config


def test_settings_file_sees_the_defaults_and_the_command_line_wins(tmp_path):
    (tmp_path / 'a.py').write_text('import math\n_half = rate / 2\nrate = _half\nshape = (1, 2)\nflag = True\nname = "x"\n')
    known = dict(rate=1.0, shape=(3,), flag=False, name='', limit=None, count=1)
    space = {}
    got = config.load(space, known, ['--name=7', str(tmp_path / 'a.py'), '--count=3', '--limit=2.5'])
    assert got == dict(rate=0.5, shape=(1, 2), flag=True, name='7', limit=2.5, count=3)
    assert {key: space[key] for key in known} == got
    assert config.load(space, known, ['--rate=2', '--limit=None'])['rate'] == 2.0  # int for float; nothing left over
    assert space['name'] == ''


@pytest.mark.parametrize('word, needles', [
    ('--learning_rat=1', ['learning_rat', "'learning_rate'"]), ('--heads=many', ['heads', 'str', 'int']),
    ('--compile=1', ['compile', 'int', 'bool']), ('--heads=True', ['bool', 'int']), ('--rank', ['--rank=value']),
    ('--n_layer=None', ['NoneType', 'int']), ('config/nowhere.py', ['nowhere.py'])])
def test_a_wrong_setting_is_one_sentence(capsys, word, needles):
    refused(capsys, lambda: config.load({}, train_gpt.defaults, [word]), *needles)


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
            script = {'gpt2': train_gpt, 'quic': train_gpt}[name[:4]]
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
# prepare.py


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
# model


def test_gpt_is_causal_and_starts_at_the_loss_of_guessing():
    gpt = tiny_gpt(vocab_size=97, n_embd=32).double()
    idx = torch.randint(97, (4, 16))
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = gpt(idx), gpt(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])
    assert abs(gpt(idx, torch.randint(97, (4, 16))).item() - math.log(97)) < 0.2


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunked_loss_is_the_cross_entropy(dtype, tolerance):
    torch.manual_seed(0)
    head = nn.Linear(8, 40, bias=False).double()
    x, targets = torch.randn(3, 700, 8).double(), torch.randint(40, (3, 700))
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
    assert gpt(idx, idx).item() == pytest.approx(F.cross_entropy(gpt(idx).flatten(0, 1), idx.flatten()).item(), rel=1e-12)


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
    layer = random_heads(lowrank.MHLoRALinear(nn.Linear(7, 5).double(), heads, rank, alpha, 'shared', head_compute, merge_reset))
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
    assert torch.autograd.gradcheck(lambda *t: lowrank.frozen_plus_heads(t[0], weight, *t[1:], 0.7), (x, bias, A, B))


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


@pytest.mark.parametrize('head_input', ['shared', 'split'])
@pytest.mark.parametrize('merge_reset', [True, False])
def test_merge_keeps_the_function_and_eval_changes_no_weight(head_input, merge_reset):
    gpt = tiny_gpt().double()
    lowrank.apply_mhlora(gpt, ('attn', 'mlp', 'logit'), 2, 3, 4.0, head_input, merge_reset=merge_reset)
    for layer in lowrank.head_layers(gpt):
        random_heads(layer)
    idx = torch.randint(31, (3, 16))
    state = {name: value.clone() for name, value in gpt.state_dict().items()}
    with lowrank.averaged_heads(gpt):
        before = gpt.eval()(idx)
    gpt.train().eval()
    assert all(torch.equal(value, state[name]) for name, value in gpt.state_dict().items())
    lowrank.merge(gpt)
    weights = [layer.weight.clone() for layer in lowrank.head_layers(gpt)]
    with lowrank.averaged_heads(gpt):
        assert (gpt(idx) - before).abs().max() < 1e-12
    lowrank.merge(gpt)  # nothing is left to merge
    assert all(torch.allclose(layer.weight, w, rtol=0, atol=1e-14) for layer, w in zip(lowrank.head_layers(gpt), weights))
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
    """Head h of a layer as a model of its own: x -> W x + b + s (B A - B' A') x with factors that are its parameters."""
    A, B = (nn.Parameter(factor[h].detach().clone()) for factor in (layer.A, layer.B))
    merged = layer.B_merged[h] @ layer.A_merged[h] if not layer.merge_reset else 0.0
    return A, B, lambda x: F.linear(x, layer.weight + layer.scale * (B @ A - merged), layer.bias)


@pytest.mark.parametrize('merge_reset', [True, False])
def test_split_heads_are_separate_models_on_separate_shards(merge_reset):
    torch.manual_seed(0)
    heads = 3
    net = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)).double()
    lowrank.apply_mhlora(net, ('0', '2'), heads, 2, 3.0, 'split', merge_reset=merge_reset)
    layers = [random_heads(layer) for layer in lowrank.head_layers(net)]
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
    """Plain SGD: a head of LTE gets the gradient of its own mean loss, one of MHLoRA an H-th of it (LTE, section 3.1)."""
    heads, rate = 2, 0.1
    idx = torch.randint(31, (2, 16))
    lte, mhlora = tiny_gpt().double(), tiny_gpt().double()
    for gpt, head_input in ((lte, 'split'), (mhlora, 'shared')):
        torch.manual_seed(1)
        lowrank.apply_mhlora(gpt, ('attn', 'mlp'), heads, 3, 5.0, head_input, merge_reset=head_input == 'shared')
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
    layer = lowrank.MHLoRALinear(nn.Linear(n, m, bias=False).double(), heads, r, alpha, 'split', merge_reset=False)
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
        assert torch.allclose(layer.A, torch.stack(A), atol=1e-12) and torch.allclose(layer.B, torch.stack(B), atol=1e-12)


def test_a_reset_draws_new_heads_and_drops_their_moments():
    gpt = tiny_gpt().double()
    lowrank.apply_mhlora(gpt, ('attn',), 1, 2)
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=0.01, fused=True)
    idx = torch.randint(31, (2, 16))

    def step():
        optimizer.zero_grad()
        gpt(idx, idx.roll(-1, 1)).backward()
        optimizer.step()
    for _ in range(3):
        step()
    layer = lowrank.head_layers(gpt)[0]
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
    layer = lowrank.MHLoRALinear(linear, 2, 4, 4.0, 'split', merge_reset=False)
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
    lowrank.apply_mhlora(gpt, ('attn', 'mlp'), 2, 2, 2.0, 'split')
    for layer in lowrank.head_layers(gpt):
        random_heads(layer)
    idx = torch.randint(31, (4, 16))
    gpt(idx, idx.roll(-1, 1)).backward()
    factors = [f for layer in lowrank.head_layers(gpt) for f in (layer.A, layer.B)]
    own = {id(f) for f in factors}
    rest = [p for p in gpt.parameters() if p.requires_grad and id(p) not in own]

    def norms():
        return [sum(f.grad[h].square().sum() for f in factors).sqrt().item() for h in range(2)] + \
            [sum(p.grad.square().sum() for p in rest).sqrt().item()]
    before = norms()
    limit = sorted(before)[1]  # clips one of the three, leaves one alone
    assert lowrank.clip_gradients(gpt, limit).item() == pytest.approx(math.hypot(*before))
    assert norms() == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)


# -----------------------------------------------------------------------------
# the scripts


def same_state(a, b):
    """Two checkpoints hold the same tensors and numbers, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
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


def test_sampled_text_is_the_same_with_heads_applied_or_merged(data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / 'a', '--lowrank=attn,logit', '--heads=2', '--rank=2', '--head_input=split', '--merge_every=3')
    words = [f'--out_dir={tmp_path}/a', '--num_samples=2', '--max_new_tokens=20', '--prompt=doc', '--device=cpu']
    merged = sample.main(words)
    assert capsys.readouterr().out.count('doc') == 2
    assert sample.main([*words, '--merged=False']) == merged
    assert sample.main([*words, '--seed=7']) != merged
    assert [len(text) for text in merged] == [23, 23]


def test_a_signal_saves_and_ends_with_zero(data_dir, tmp_path):
    run = subprocess.Popen([sys.executable, 'train_gpt.py', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/a',
                            '--dataset=tiny', '--block_size=16', '--n_layer=1', '--n_head=1', '--n_embd=8', '--batch_size=2',
                            '--max_iters=1000000', '--eval_interval=1000000', '--eval_iters=1', '--log_interval=1',
                            '--device=cpu'], cwd=HERE, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if '| train' in line:
            run.send_signal(signal.SIGTERM)
            break
    run.stdout.read()
    assert run.wait(20) == 0
    assert config.load_checkpoint(f'{tmp_path}/a/ckpt.pt')['step'] >= 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(data_dir, tmp_path):
    train(data_dir, tmp_path / 'a')
    good = (tmp_path / 'a' / 'ckpt.pt').read_bytes()
    with pytest.raises(SystemExit, match='ckpt.pt of step 4'):
        train(data_dir, tmp_path / 'a', '--init_from=resume', '--max_iters=40', '--learning_rate=1e300', '--min_lr=1e300')
    assert (tmp_path / 'a' / 'ckpt.pt').read_bytes() == good


def test_bad_input_is_one_sentence_and_loses_nothing(data_dir, tmp_path, capsys):
    out = tmp_path / 'a'
    train(data_dir, out)
    held = (out / 'ckpt.pt').read_bytes()
    capsys.readouterr()
    for word, *needles in [
            ('--dataset=c4', 'c4', 'prepare.py'),
            ('--vocab_size=100', '257', 'vocab_size=257'),
            ('--block_size=100000', 'block_size', '100000'),
            ('--n_layer=2', 'already holds a run', '--init_from=resume', '--overwrite=True'),
            ('--n_embd=17', 'n_head'),
            ('--lowrank=nowhere', 'c_attn'),
            ('--merge_every=5', 'lowrank'),
            ('--head_input=both', "'split'"),
            ('--init_from=nothing.safetensors', 'nothing.safetensors')]:
        refused(capsys, lambda: train(data_dir, out, word), *needles)
    refused(capsys, lambda: train(data_dir, out, '--lowrank=attn', '--head_input=split', '--heads=3'), 'heads=3')
    refused(capsys, lambda: train(data_dir, out, '--lowrank=attn', '--merge_every=5'), 'merge_reset=True')
    refused(capsys, lambda: train(data_dir, out, '--init_from=resume', '--n_layer=3'), 'n_layer=2', '3')
    refused(capsys, lambda: train(data_dir, tmp_path / 'none', '--init_from=resume'), 'ckpt.pt')
    if not torch.cuda.is_available():
        refused(capsys, lambda: train(data_dir, out, '--device=cuda'), '--device=cpu')
    assert (out / 'ckpt.pt').read_bytes() == held
    (out / 'ckpt.pt').write_bytes(held[:1000])
    refused(capsys, lambda: train(data_dir, out, '--init_from=resume'), 'damaged')


# -----------------------------------------------------------------------------
# two ranks: one spawn for all distributed laws

RANKS = {'full': ['--gradient_accumulation_steps=2'], 'mhlora': ['--lowrank=attn,logit', '--heads=2', '--rank=2']}


def two_ranks(data_dir, out):
    """What each rank runs: every case, in one process group."""
    torch.set_num_threads(1)
    real = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None  # the cases share the group that the first one joins
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *a: None if torch.distributed.is_initialized() else join(*a)
    for name, words in RANKS.items():
        train_gpt.main(tiny(data_dir, f'{out}/{name}', *words))
    real()


def test_two_ranks_train_the_same_as_one(data_dir, tmp_path):
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no_python',
                    sys.executable, '-c', f'import test_lowrank as t; t.two_ranks({data_dir!r}, {str(tmp_path)!r})'],
                   cwd=HERE, check=True, timeout=100)
    for name, words in RANKS.items():
        one = train(data_dir, tmp_path / 'one' / name, *words)
        two = config.load_checkpoint(f'{tmp_path}/{name}/ckpt.pt')
        for key, value in one['model'].items():
            assert torch.allclose(value, two['model'][key], rtol=0, atol=1e-12), (name, key)
        assert one['best_val_loss'] == pytest.approx(two['best_val_loss'], abs=1e-12)
