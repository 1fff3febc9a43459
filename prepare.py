"""
python prepare.py stdlib                                   the sources of Python's standard library, bytes (seconds)
python prepare.py text --input a.txt b.jsonl --name mine   local .txt, .jsonl (field text), .parquet (column text)
python prepare.py cnn_dailymail [--path FOLDER]            news; FOLDER: a copy of the hub's files, without the internet
python prepare.py c4 --tokens 1_000_000_000 [--path FOLDER]
python prepare.py digits                                   scikit-learn's digits at 32 x 32, three channels (seconds)
python prepare.py digits_shifted                           the same under another look: inverted, coloured, rotated
python prepare.py pathmnist --size 224 [--path FOLDER]     any 2D MedMNIST; FOLDER: the .npz, without the internet

Shards: their writer (this command line) and their readers (`Tokens`, `Images`, for the training scripts). data/NAME/
holds train_000000.bin ..., val_000000.bin ... (test_000000.bin ... for images) and meta.json, written last. A shard is
a header of 32 bytes (magic, version, bytes an item, number of items, zeros) and the items, little-endian. They are
tokens, where end-of-text ends every document, or images: the label, one byte (one a class where there are several
labels), and the pixels (channels, size, size). An interrupted command, given again, goes on at the last whole shard
(images: begins anew). What is there already is left alone (exit code 0 for the same command, 2 for another one) unless
--overwrite is given.
"""
import argparse
import codecs
import contextlib
import difflib
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import struct
import sys
import sysconfig
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

HEADER, MAGIC, VERSION = struct.Struct('<8sIIQ8x'), b'nLRshard', 1  # magic, version, bytes an item, items, padding
DTYPES = {2: np.dtype('<u2'), 4: np.dtype('<u4')}
TOKENIZERS = {'stdlib': 'bytes', 'text': 'gpt2', 'cnn_dailymail': 'gpt2', 'c4': 'gpt2'}  # the defaults
HUB = {  # repository, the columns that make a document, the files of each split
    'cnn_dailymail': ('abisee/cnn_dailymail', ['article', 'highlights'],
                      {'val': '3.0.0/validation-*.parquet', 'train': '3.0.0/train-*.parquet'}),
    'c4': ('allenai/c4', ['text'], {'val': 'en/c4-validation.*.json.gz', 'train': 'en/c4-train.*.json.gz'}),
}
DIGITS = ('digits', 'digits_shifted')


class DataError(ValueError):
    """A user's mistake or a broken file, in one sentence: what is wrong, the value seen, what to do."""


class MissingData(DataError, FileNotFoundError):
    """The data set, or a file of it, is not there."""


# -----------------------------------------------------------------------------
# tokenizers

def tokenizer(name):
    """tiktoken.Encoding 'gpt2' (50,257 tokens) or 'bytes' (256 bytes and <|endoftext|> = 256)."""
    import requests
    import tiktoken
    if name == 'bytes':  # there are no merges: the pattern only says how much is looked at in one go
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]{1,64}', mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={'<|endoftext|>': 256}, explicit_n_vocab=257)
    if name != 'gpt2':
        raise DataError(f"there is no tokenizer '{name}': use 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding('gpt2')
    except requests.exceptions.RequestException:
        raise DataError("tiktoken cannot download its 'gpt2' vocabulary: connect to the internet once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or take --tokenizer bytes") from None


def chunks(items, size, length=len):
    """Lists of successive items whose lengths add up to `size` or more."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += length(item)
        if total >= size:
            yield chunk
            chunk, total = [], 0
    yield chunk


def tokenise(pieces, encoding, val_below):
    """(split or None, text, ends) -> (split, tokens, ends, hash), in order, on all cores, in constant memory."""
    def encode(group):
        out = []
        for split, text, ends in group:  # hash: of the text alone, so the order is free and duplicates share a split
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')
            # in slices, because the regular expression runs out of stack on a million spaces
            tokens = [encoding.encode_to_numpy(text[i:i + 2**18], disallowed_special=())
                      for i in range(0, len(text) or 1, 2**18)]
            out.append((split or ('val' if number < val_below else 'train'), np.concatenate(tokens), ends, number))
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken works outside the interpreter's lock
        waiting = deque()  # the groups read ahead
        for group in chunks(pieces, 2**18, lambda piece: len(piece[1]) + 64):
            waiting.append(pool.submit(encode, group))
            if len(waiting) > 2 * os.cpu_count():
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


# -----------------------------------------------------------------------------
# sources: they yield (split, text, ends); split None: the hash decides; ends: the document ends here

def stdlib_documents():
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - skip)
        for file in sorted(files):
            if file.endswith('.py'):
                yield None, Path(folder, file).read_text('utf-8', 'replace_and_count'), True


def text_documents(paths, size):
    """Local files, streamed. A .txt is one document, in pieces of about `size` characters, each with its own hash."""
    for path in paths:
        read = {'.txt': read_txt(path, size), '.jsonl': read_jsonl(path), '.parquet': read_parquet(path)}
        empty = True
        for text, ends in read[Path(path).suffix.lower()]:
            empty = empty and not text.strip()
            yield None, text, ends
        if empty:
            raise DataError(f"'{path}' is empty: leave it out of --input")


def read_lines(path, size=-1):
    """Lines, or `size` characters of a longer one. Bad bytes are replaced and counted, line ends stay as they are."""
    with open(path, encoding='utf-8-sig', errors='replace_and_count', newline='\n') as file:
        while line := file.readline(size):
            if '\0' in line:
                raise DataError(f"'{path}' is binary (it holds NUL bytes): give text in UTF-8")
            yield line


def read_txt(path, size):
    for lines in chunks(read_lines(path, size), size):
        yield ''.join(lines), False
    yield '', True


def read_jsonl(path):
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:  # UTF-16, because JSON can spell half a surrogate pair
                text = json.loads(line)['text'].encode('utf-16', 'surrogatepass').decode('utf-16', 'replace_and_count')
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(f"line {number} of '{path}' has no string 'text': one JSON object a line") from None
            yield text, True


def read_parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(256, columns=['text']):
                kind = batch['text'].type
                kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    raise KeyError
                yield from ((text or '', True) for text in batch['text'].to_pylist())
    except (pyarrow.ArrowException, KeyError):
        raise DataError(f"'{path}' is no parquet file with a column 'text' of strings: convert it or rename the "
                        'column') from None


def hub_documents(name, path, limit):
    """Streamed from the hub, or from the folder `path` with the hub's files. limit: training tokens or None."""
    import huggingface_hub
    import pyarrow
    import requests
    from datasets import load_dataset
    repository, columns, files = HUB[name]
    try:
        if path:
            files = {split: pattern for split, pattern in files.items() if glob.glob(os.path.join(path, pattern))}
        else:  # datasets itself tries for half a minute
            requests.head(huggingface_hub.constants.ENDPOINT, timeout=10)
        for split in files:
            rows = load_dataset(path or repository, data_files=files, split=split, streaming=True)
            if name == 'c4' and split == 'val':  # has 170M tokens; GaLore evaluates on 10M: 20,000 documents
                rows = rows.take(min(20_000, max(100, limit // 10_000)) if limit else 20_000)
            own = split if 'val' in files else None  # a copy without the validation files: the hash decides
            yield from ((own, '\n\n'.join(row[column] for column in columns), True)
                        for row in rows.select_columns(columns))
    except (ConnectionError, requests.exceptions.RequestException, huggingface_hub.errors.HfHubHTTPError):
        raise DataError(f"{huggingface_hub.constants.ENDPOINT} cannot be reached: connect and run it again, "
                        f"or use --path FOLDER with the files {files['train']} of {repository}") from None
    except (ValueError, TypeError, EOFError, pyarrow.ArrowException) as error:
        raise DataError(f"the files of '{path or repository}' are damaged or lack text in the columns {columns} "
                        f'({(str(error).splitlines() or [""])[0][:80]}): fetch them again') from error


# -----------------------------------------------------------------------------
# sources of images: they yield (split, labels (n, 1 or classes), images (n, channels, size, size)) in chunks

def digit_images(shifted):
    """scikit-learn's digits, 8 x 8, enlarged; the order, and with it the splits, is fixed."""
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits
    data = load_digits()
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    enlarge = np.maximum(0, 1 - abs(at[:, None] - np.arange(8)))  # (32, 8), bilinear
    ink = (enlarge @ (data.images / 16) @ enlarge.T)[:, None]  # (n, 1, 32, 32)
    images, count = ink.repeat(3, 1), len(ink)
    order = permute(np.arange(count), count, 0)
    if shifted:  # dark on a light ground of its own hue
        ink = rotate(ink, 30, (3, 2), reshape=False, order=1)
        hue = order[:, None, None, None] / count + np.arange(3)[:, None, None] / 3  # (n, 3, 1, 1)
        images = (1 - ink) * (0.7 + 0.3 * np.cos(2 * np.pi * hue))
    images = (255 * images).round().astype(np.uint8)
    for split, rows in zip(('train', 'val', 'test'), np.split(order, [count * 3 // 5, count * 4 // 5])):
        yield split, data.target[rows, None], images[rows]


def medmnist_info():
    """medmnist.INFO, read from its file: the package itself imports torch and scikit-learn, which takes seconds."""
    return runpy.run_path(str(Path(importlib.util.find_spec('medmnist').origin).with_name('info.py')))['INFO']


def medmnist_images(path, size, info, download):
    """Streamed out of MedMNIST's archive `path`; info: its entry of medmnist.INFO. The headers and all labels first."""
    shape = (size, size, 3) if info['n_channels'] == 3 else (size, size)
    classes = len(info['label'])
    width, limit = (classes, 2) if info['task'].startswith('multi-label') else (1, classes)
    if download:
        import medmnist
        data = object.__new__(getattr(medmnist, info['python_class']))  # its constructor would read a split into memory
        data.root, data.info, data.size_flag = str(path.parent), info, '' if size == 28 else f'_{size}'
        try:
            data.download()
        except RuntimeError:
            raise DataError(f"{info['url' + data.size_flag]} cannot be downloaded: connect and run it again, or use "
                            f"--path FOLDER with {path.name} in it") from None

    def open_images(split):  # the file behind its header, and what that says
        file = archive.open(f'{split}_images.npy')
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return file, *read(file)

    labels = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for split in ('train', 'val', 'test'):
                labels[split] = found = np.load(io.BytesIO(archive.read(f'{split}_labels.npy')))
                _, (count, *image), fortran, dtype = open_images(split)
                if (*image,) != shape or dtype != np.uint8 or fortran:
                    raise DataError(f"'{path}' has {split} images of shape {(*image,)} ({dtype}), not {shape} (uint8): "
                                    "correct --size or get the archive of this size")
                if not count or found.shape != (count, width) or found.min() < 0 or found.max() >= limit:
                    raise DataError(f"'{path}' has {split} labels of shape {found.shape} from {found.min(initial=0)} "
                                    f"to {found.max(initial=0)}, not {(count, width)} from 0 to {limit - 1}, as there "
                                    f"are {classes} classes: get the archive of this flag")
            rows = max(1, 2**20 // math.prod(shape))
            for split, found in labels.items():
                with open_images(split)[0] as file:
                    for chunk in np.split(found, range(rows, len(found), rows)):
                        pixels = np.frombuffer(file.read(len(chunk) * math.prod(shape)), np.uint8)
                        yield split, chunk, np.moveaxis(pixels.reshape(len(chunk), size, size, -1), 3, 1)
                    if file.read(1):  # asking for more also compares the checksum
                        raise EOFError
    except DataError:
        raise
    except (OSError, EOFError, KeyError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        why = ' '.join(f'{type(error).__name__} {error}'.split())[:80]
        raise DataError(f"'{path}' is damaged or no archive of MedMNIST ({why}): get it again") from error


# -----------------------------------------------------------------------------
# writer

def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(temporary, path):
    """Give a finished file its name: whole or not at all, also after a power cut."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path, value):
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=1) + '\n')
    publish(temporary, path)


def publish_shard(file, split, number, kind, count, item):
    """Give a written shard (header of zeros, `count` items of `item` bytes) its header and name. Its entry in meta."""
    file.seek(0)
    file.write(HEADER.pack(MAGIC, VERSION, item, count))
    file.close()
    with open(file.name, 'rb') as whole:
        digest = hashlib.file_digest(whole, 'sha256').hexdigest()
    path = Path(file.name).with_name(f'{split}_{number:06d}.bin')
    publish(file.name, path)
    return {'file': path.name, 'split': split, kind: count, 'sha256': digest}


def write_shards(folder, meta, documents, encoding):
    """documents() after its first meta['consumed'] pieces, into shards. Keeps `meta` and progress.json up to date."""
    from tqdm import tqdm
    dtype = DTYPES[2 if encoding.n_vocab <= 2**16 else 4]
    files, last = {}, {}  # the open shard and its last token

    def replace(error):  # errors='replace', counted
        meta['replaced_bytes'] += error.end - error.start
        return '\ufffd', error.end

    def open_shards():
        for split in meta['tokens']:
            files[split], last[split] = open(folder / f'{split}.tmp', 'wb'), encoding.eot_token
            files[split].write(bytes(HEADER.size))

    def write(split, tokens):
        files[split].write(tokens.astype(dtype))
        meta['tokens'][split] += len(tokens)
        last[split] = tokens[-1]

    def close_shards():  # of both splits together, so that going on needs to know nothing but the number of pieces
        for split, file in files.items():
            shards = [shard for shard in meta['shards'] if shard['split'] == split]
            count = meta['tokens'][split] - sum(shard['tokens'] for shard in shards)
            if count:
                meta['shards'].append(publish_shard(file, split, len(shards), 'tokens', count, dtype.itemsize))
            file.close()
        write_json(folder / 'progress.json', meta)

    codecs.register_error('replace_and_count', replace)
    for path in [*folder.glob('*.bin'), *folder.glob('*.tmp')]:
        if path.name not in [shard['file'] for shard in meta['shards']]:
            path.unlink()  # left by a crash, or overwritten
    meta['replaced_bytes'] = 0  # what is skipped is read again
    limit = meta['limit'] or float('inf')
    pieces = itertools.islice(documents(), meta['consumed'], None) if meta['tokens']['train'] < limit else ()
    open_shards()
    with tqdm(total=meta['limit'], initial=meta['tokens']['train'], unit='tok', unit_scale=True, disable=None) as bar:
        for split, tokens, ends, number in tokenise(pieces, encoding, meta['val_below']):
            meta['consumed'] += 1
            if len(tokens):
                write(split, tokens)
                meta['documents'][split] += 1
                meta['lowest_hash'] = min(meta['lowest_hash'], number)
            for end in ('val', 'train') if ends or split == 'val' else ():  # a piece for validation leaves a seam
                if last[end] != encoding.eot_token:
                    write(end, np.array([encoding.eot_token]))
            bar.update(len(tokens))
            if max(file.tell() for file in files.values()) >= HEADER.size + dtype.itemsize * meta['shard_tokens']:
                close_shards()
                open_shards()
            if meta['tokens']['train'] >= limit:
                break
    close_shards()


def read_meta(path):
    """meta.json or progress.json."""
    try:
        meta = json.loads(path.read_text())
        meta['shards']
    except (ValueError, KeyError, TypeError):
        raise DataError(f"'{path}' is damaged: prepare the data set again with --overwrite") from None
    return meta


@contextlib.contextmanager
def claim(folder, settings, overwrite):
    """Locks the data set `folder`: yields its progress.json, {} for a new one, None if it is there already."""
    from filelock import FileLock
    folder.mkdir(parents=True, exist_ok=True)
    complete, progress = folder / 'meta.json', folder / 'progress.json'
    with FileLock(folder / '.lock'):  # of two trainings started side by side one prepares, the other waits
        if overwrite:
            complete.unlink(missing_ok=True)
            progress.unlink(missing_ok=True)
        found = next((read_meta(path) for path in (complete, progress) if path.exists()), {})
        for key, value in settings.items() if found else ():
            if found.get(key) != value:
                raise DataError(f"'{folder}' holds a data set with {key} {found.get(key)!r}, not {value!r}: choose "
                                "another --name, or --overwrite it")
        if complete.exists():
            open_shards(folder, found)
            print(f"'{folder}' is already there: nothing to do (--overwrite prepares it anew)")
            found = None
        yield found


def finish(folder, meta):
    write_json(folder / 'meta.json', meta)
    for path in folder.glob('*.tmp'):
        path.unlink()
    (folder / 'progress.json').unlink(missing_ok=True)


def write_data(folder, documents, settings, fraction, overwrite):
    """The data set `folder` from documents(), unless it is there. settings: source, tokenizer, shard_tokens, limit.

    Where the source has no validation split, `fraction` of the documents is validation, by their hash; if that is none,
    as happens with a handful of documents, the one with the lowest hash is."""
    encoding = tokenizer(settings['tokenizer'])

    def fresh(val_below):  # documents: pieces, where a .txt is cut
        return {**settings, 'vocab_size': encoding.n_vocab, 'eot': encoding.eot_token, 'val_below': val_below,
                'lowest_hash': 2**64, 'replaced_bytes': 0, 'consumed': 0, 'tokens': {'train': 0, 'val': 0},
                'documents': {'train': 0, 'val': 0}, 'shards': []}

    with claim(folder, settings, overwrite) as meta:
        if meta is None:
            return
        meta = meta or fresh(int(fraction * 2**64))
        write_shards(folder, meta, documents, encoding)
        if not meta['tokens']['val']:
            meta = fresh(meta['lowest_hash'] + 1)
            write_shards(folder, meta, documents, encoding)
        if not all(meta['tokens'].values()):
            (folder / 'progress.json').unlink()
            raise DataError(f"'{folder}' has too little text to train and to validate on ({meta['tokens']}): add some")
        del meta['consumed'], meta['lowest_hash']
        finish(folder, meta)
    print(f"'{folder}': {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} validation tokens "
          f"({meta['tokenizer']}), {meta['replaced_bytes']:,} bytes that were not UTF-8 replaced")


def write_images(folder, chunks, settings, overwrite):
    """The image data set `folder` from chunks(), unless it is there. settings: source, kind 'images', size, channels,
    classes (names), task and flag (medmnist's), shard_bytes."""
    from tqdm import tqdm
    with claim(folder, settings, overwrite) as meta:
        if meta is None:
            return
        for path in [*folder.glob('*.bin'), *folder.glob('*.tmp')]:
            path.unlink()  # left by a crash, or overwritten
        meta = {**settings, 'images': {}, 'shards': []}
        (bytes_an_item, item), = item_types(meta).items()

        def shard_of(chunk):
            split, labels, _ = chunk
            before = meta['images'].get(split, 0)
            meta['images'][split] = before + len(labels)
            return split, before * bytes_an_item // settings['shard_bytes']

        with tqdm(unit='img', unit_scale=True, disable=None) as bar:
            for (split, _), group in itertools.groupby(chunks(), shard_of):
                with open(folder / f'{split}.tmp', 'wb') as file:
                    file.write(bytes(HEADER.size))
                    for _, labels, images in group:
                        records = np.empty(len(images), item)
                        records['label'], records['image'] = labels, images
                        file.write(records)
                        bar.update(len(records))
                    count = (file.tell() - HEADER.size) // bytes_an_item
                    number = sum(shard['split'] == split for shard in meta['shards'])
                    meta['shards'].append(publish_shard(file, split, number, 'images', count, bytes_an_item))
        finish(folder, meta)
    counts = ', '.join(f'{count:,} {split}' for split, count in meta['images'].items())
    print(f"'{folder}': {counts} images of {meta['size']} x {meta['size']} in {meta['channels']} channels, "
          f"{len(meta['classes'])} classes ({meta['task']})")


# -----------------------------------------------------------------------------
# reader

def item_types(meta):
    """{bytes: type} of what an item of the shards may be."""
    if meta.get('kind') != 'images':
        return DTYPES
    labels = len(meta['classes']) if meta['task'].startswith('multi-label') else 1
    item = np.dtype([('label', 'u1', (labels,)), ('image', 'u1', (meta['channels'], meta['size'], meta['size']))])
    return {item.itemsize: item}


def open_shard(path, items, types=DTYPES):
    """Memory-mapped items (count,) of a shard: tokens, uint16 or uint32. DataError for anything but a whole one."""
    remedy = 'prepare the data set again with --overwrite'
    if not path.exists():
        raise MissingData(f"'{path}' is missing: {remedy}")
    with open(path, 'rb') as file:
        magic, version, item, count = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b'\0'))
    if (magic, version) != (MAGIC, VERSION) or item not in types:
        raise DataError(f"'{path}' is no shard of version {VERSION} (it begins with {magic!r}, version {version}, "
                        f"{item} bytes an item): {remedy}")
    if path.stat().st_size != HEADER.size + item * count or count != items:
        raise DataError(f"'{path}' is damaged ({path.stat().st_size} bytes; its header says {count} items of {item}, "
                        f"meta.json {items}): {remedy}")
    return np.asarray(np.memmap(path, types[item], 'r', HEADER.size, (count,)))  # a plain array is cheaper to slice


def open_shards(folder, meta, split=None):
    """The shards of a split, or all."""
    kind, types = meta.get('kind', 'tokens'), item_types(meta)
    return [open_shard(folder / shard['file'], shard[kind], types) for shard in meta['shards']
            if split in (None, shard['split'])]


def ensure(name, data_dir='data'):
    """Prepare an embedded data set (stdlib, digits, digits_shifted) when it is missing; MissingData (a
    FileNotFoundError) for any other."""
    if Path(data_dir, name, 'meta.json').exists():
        return
    if name not in ('stdlib', *DIGITS):
        state = 'only half prepared' if Path(data_dir, name, 'progress.json').exists() else 'not there'
        arguments = name if name in {*TOKENIZERS} - {'text'} else f'text --input FILE --name {name}'
        if flag := re.fullmatch('([a-z]+mnist)(?:_(64|128|224))?', name):
            arguments = f'{flag[1]} --size {flag[2] or 28}'
        arguments += '' if str(data_dir) == 'data' else f' --data_dir {data_dir}'
        raise MissingData(f"data set '{name}' is {state}: run 'python prepare.py {arguments}'")
    main([name, '--data_dir', str(data_dir)])


def permute(index, size, *key):
    """A keyed permutation of range(size) at `index` (int array), in O(1) memory.

    A Feistel network permutes the numbers of an even number of bits; what falls outside goes through it again (cycle
    walking: the cycle comes back inside; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = np.asarray(index).astype(np.uint64)
    walking = np.ones(len(out), bool)
    while walking.any():
        left, right = out[walking] >> half, out[walking] & mask
        for round_key in np.random.SeedSequence(key).generate_state(6, np.uint64):
            mixed = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as is meant
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[walking] = left << half | right
        walking = out >= size
    return out.astype(np.int64)


def rows_of(batch_size, rank, world_size, heads):
    """Which rows of a micro-batch a rank takes, in its own order: see Split.batch."""
    assert batch_size % (world_size * heads) == 0, (batch_size, world_size, heads)
    return np.arange(rank, batch_size, world_size).reshape(-1, heads).T.ravel()


class Split:
    """One split of a data set, in batches. Tokens and Images have `items(index)`, which reads items, and `first`, the
    number of the first item of each shard, with their total at the end."""

    def __init__(self, name, split, kind, data_dir):
        ensure(name, data_dir)
        folder = Path(data_dir, name)
        self.meta = read_meta(folder / 'meta.json')
        held = self.meta.get('kind', 'tokens')
        if held != kind:
            raise DataError(f"data set '{name}' holds {held}, not {kind}: choose one of {kind}")
        self.shards = open_shards(folder, self.meta, split)
        if not self.shards:
            raise DataError(f"data set '{name}' has no split '{split}': use one of {', '.join(self.meta[kind])}")

    def locate(self, index):
        """(row, shard, place in the shard) of every item of `index` (rows,)."""
        shards = np.searchsorted(self.first, index, 'right') - 1
        for row, (item, shard) in enumerate(zip(index.tolist(), shards.tolist())):
            yield row, self.shards[shard], item - int(self.first[shard])

    def batch(self, batch_size, step, micro_step=0, accumulation=1, seed=0, rank=0, world_size=1, heads=1):
        """Items rank::world_size of one micro-batch: x, y of batch_size / world_size rows.

        A pure function of its arguments. Every epoch shows every item once, in an order keyed by (seed, epoch). Row j
        of the micro-batch belongs to head j % (heads * world_size) of all ranks; the rows of this rank's `heads` come
        head by head, so that x.view(heads, -1, *x.shape[1:]) is one shard a head."""
        rows = rows_of(batch_size, rank, world_size, heads)
        sequence = (step * accumulation + micro_step) * batch_size + rows
        count = int(self.first[-1])
        epochs, index = np.divmod(sequence, count)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            index[here] = permute(index[here], count, seed, epoch)
        return self.items(index)


class Tokens(Split):
    """The windows of one split: runs of `block_size` tokens that do not overlap, each inside one shard.

    `meta` is meta.json, `vocab_size` its vocabulary, `num_windows` their number. `batch` gives inputs and targets
    (rows, block_size), int64. DataError (a ValueError) for a broken file or a block_size longer than the data,
    MissingData (a FileNotFoundError too) where something is missing."""

    def __init__(self, name, split, block_size, data_dir='data'):
        super().__init__(name, split, 'tokens', data_dir)
        self.vocab_size, self.block_size = self.meta['vocab_size'], block_size
        self.first = np.cumsum([0] + [(len(shard) - 1) // block_size for shard in self.shards])  # window of each shard
        self.num_windows = int(self.first[-1])
        if not self.num_windows:
            raise DataError(f"block_size {block_size} is longer than the '{split}' data of '{name}': "
                            f"set block_size to {max(map(len, self.shards)) - 1} or less")

    def items(self, index):
        data = np.empty((2, len(index), self.block_size), np.int64)
        for row, tokens, window in self.locate(index):
            start = window * self.block_size
            data[0, row] = tokens[start:start + self.block_size]
            data[1, row] = tokens[start + 1:start + 1 + self.block_size]
        import torch
        x, y = torch.from_numpy(data)
        return x, y

    def fixed_batch(self, index, count, batch_size, rank=0, world_size=1):
        """For evaluation: rows rank::world_size of batch `index` of `count`, windows spread evenly over the split."""
        assert batch_size % world_size == 0, (batch_size, world_size)
        rows = index * batch_size + np.arange(rank, batch_size, world_size)
        return self.items(rows * self.num_windows // (count * batch_size))


class Images(Split):
    """The images of one split, 'train', 'val' or 'test'; len() is their number.

    `meta` is meta.json (see write_images), `classes` the names of the `num_classes` classes, `task` medmnist's word for
    the task, `size` the pixels of a side, `channels` 1 or 3. `batch` gives images (rows, channels, size, size), uint8,
    and labels: int64 (rows,), or float32 (rows, num_classes) where an image has several. Errors as for Tokens."""

    def __init__(self, name, split, data_dir='data'):
        super().__init__(name, split, 'images', data_dir)
        self.classes, self.task, self.size, self.channels = (
            self.meta[key] for key in ('classes', 'task', 'size', 'channels'))
        self.num_classes = len(self.classes)
        self.first = np.cumsum([0, *map(len, self.shards)])

    def __len__(self):
        return int(self.first[-1])

    def items(self, index):
        item = self.shards[0].dtype
        images, labels = (np.empty((len(index), *item[key].shape), np.uint8) for key in ('image', 'label'))
        for row, shard, place in self.locate(index):
            images[row], labels[row] = shard['image'][place], shard['label'][place]
        import torch
        labels = torch.from_numpy(labels)
        return torch.from_numpy(images), labels.float() if labels.shape[1] > 1 else labels[:, 0].long()

    def fixed_batch(self, index, batch_size, rank=0, world_size=1):
        """For evaluation: rows rank::world_size of batch `index`, in the order of the split, as `batch` gives them.

        Over all ranks, batches 0 to ceil(len / batch_size) - 1 hold every image once. The last one is short where
        batch_size does not divide len, so that a rank may have one row less than another there, or none."""
        return self.items(np.arange(index * batch_size + rank, min((index + 1) * batch_size, len(self)), world_size))


# -----------------------------------------------------------------------------
# command line

def prepare_images(args, info):
    """args: those of the command line; info: the data set's entry of medmnist.INFO, None for digits."""
    if info:
        name = args.data + f'_{args.size}' * (args.size != 28)  # as MedMNIST names its files
        path = Path(args.path or args.data_dir, f'{name}.npz')
        if args.path and not path.is_file():
            raise MissingData(f"'{path}' is missing: --path is a folder with MedMNIST's archives")
        source = f'{path.name} ({path.stat().st_size} bytes)' if args.path else info[f'url{name[len(args.data):]}']
        chunks = partial(medmnist_images, path, args.size, info, not args.path)
        about = {'size': args.size, 'channels': info['n_channels'], 'classes': [*info['label'].values()],
                 'task': info['task'], 'flag': args.data}
    else:
        name, source = args.data, f'load_digits of scikit-learn, as {args.data}'
        chunks = partial(digit_images, name == 'digits_shifted')
        about = {'size': 32, 'channels': 3, 'classes': [*'0123456789'], 'task': 'multi-class', 'flag': None}
    settings = {'source': source, 'kind': 'images', **about, 'shard_bytes': args.shard_bytes}
    write_images(Path(args.data_dir, args.name or name), chunks, settings, args.overwrite)


def main(argv):
    """Prepare one data set. DataError for a user's mistake. A data set that is there already is left alone."""
    def refuse(message):
        raise DataError(f'{message} (python prepare.py --help)')

    parser = argparse.ArgumentParser('prepare.py', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument('data', help=' | '.join([*TOKENIZERS, *DIGITS, 'a flag of MedMNIST']))
    parser.add_argument('--input', nargs='+', metavar='FILE', help='text: the .txt, .jsonl and .parquet files')
    parser.add_argument('--path', help="a folder with the hub's or MedMNIST's files, instead of the internet")
    parser.add_argument('--tokens', type=int, help='stop after the document in which the training split gets this long')
    parser.add_argument('--tokenizer', choices=['gpt2', 'bytes'], help='bytes for stdlib, else gpt2')
    parser.add_argument('--shard_tokens', type=int, default=100_000_000, help='tokens of a shard')
    parser.add_argument('--size', type=int, choices=[28, 64, 128, 224], default=28, help='MedMNIST: pixels of a side')
    parser.add_argument('--shard_bytes', type=int, default=10**9, help='of a shard of images')
    parser.add_argument('--name', help='of the folder in data_dir; default: that of the data, with _SIZE unless 28')
    parser.add_argument('--data_dir', default='data')
    parser.add_argument('--overwrite', action='store_true', help='prepare anew what is there already')
    args = parser.parse_args(argv)
    info = {} if args.data in (*TOKENIZERS, *DIGITS) else medmnist_info()
    known = [*TOKENIZERS, *DIGITS, *(flag for flag in info if not flag.endswith('3d'))]
    if args.data in info and args.data not in known:
        refuse(f"'{args.data}' holds volumes: choose a MedMNIST of images, such as pathmnist")
    if args.data not in known:
        nearest = difflib.get_close_matches(args.data.lower(), known, 1, 0)[0]
        refuse(f"unknown data set '{args.data}': did you mean '{nearest}'?")
    for option in ['shard_bytes'] if args.data in TOKENIZERS else ['tokens', 'tokenizer', 'shard_tokens']:
        if getattr(args, option) != parser.get_default(option):
            refuse(f"--{option} is not for '{args.data}': leave it out")
    if min(args.shard_tokens, args.shard_bytes) < 1 or args.tokens is not None and args.tokens < 1:
        refuse(f'--tokens {args.tokens}, --shard_tokens {args.shard_tokens}, --shard_bytes {args.shard_bytes}: give at '
               'least 1')
    if bool(args.input) != (args.data == 'text'):
        refuse("'text' needs --input FILE..., and nothing else takes it")
    if args.path and args.data not in (*HUB, *info):
        refuse(f"--path is for {', '.join(HUB)} and MedMNIST, not for '{args.data}'")
    if args.size != 28 and not info:
        refuse(f"--size is for MedMNIST, not for '{args.data}'")
    if args.data not in TOKENIZERS:
        prepare_images(args, info.get(args.data))
        return
    fraction = 0.05
    if args.data == 'stdlib':
        source, documents = f'standard library of Python {sys.version.split()[0]}', stdlib_documents
    elif args.data == 'text':
        for path in args.input:
            if not Path(path).is_file():
                refuse(f"'{path}' is not there: correct --input")
            if Path(path).suffix.lower() not in ('.txt', '.jsonl', '.parquet'):
                refuse(f"'{path}' is no .txt, .jsonl or .parquet file: correct --input")
        sizes = [os.path.getsize(path) for path in args.input]
        source = ', '.join(f'{Path(path).name} ({size} bytes)' for path, size in zip(args.input, sizes))
        fraction = min(0.05, max(0.005, 5e6 / max(1, sum(sizes))))  # about 5 MB for validation
        # small files are cut into small pieces, so that the hash has something to choose from
        documents = partial(text_documents, args.input, min(2**16, max(2**6, sum(sizes) // 200)))
    else:
        source, _, files = HUB[args.data]
        if args.path and not glob.glob(os.path.join(args.path, files['train'])):
            refuse(f"'{args.path}' holds no {files['train']}: --path is a folder with the hub's files")
        if args.data == 'c4' and not args.tokens and not args.path:
            refuse('c4 has 156 billion tokens: say how many you want, as in --tokens 1_000_000_000')
        source += f' in {args.path}' if args.path else ''
        documents = partial(hub_documents, args.data, args.path, args.tokens)
    settings = {'source': source, 'tokenizer': args.tokenizer or TOKENIZERS[args.data],
                'shard_tokens': args.shard_tokens, 'limit': args.tokens}
    write_data(Path(args.data_dir, args.name or args.data), documents, settings, fraction, args.overwrite)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
