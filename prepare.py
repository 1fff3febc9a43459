"""
Writes data sets (this command line) and reads them (`Tokens`, `Images`, for training scripts).

python prepare.py stdlib                      the sources of Python's standard library, bytes
python prepare.py text --input a.txt b.jsonl  .txt, .jsonl (field text), .parquet (column text)
... --input answers.jsonl                     prompt, completion: only the latter is learned
... --input chats.jsonl --tokenizer MODEL     messages (role, content): the assistant's are learned
... --name mine --tokenizer ORGANISATION/MODEL    tokens of a model of the hub, or of a folder
python prepare.py cnn_dailymail               news; --path FOLDER: of a copy of the hub's files
python prepare.py c4 --tokens 1_000_000_000
python prepare.py fineweb_edu --tokens 1_000_000_000
python prepare.py digits                      scikit-learn's, 32 x 32, three channels
python prepare.py digits_shifted              the same inverted, coloured, rotated
python prepare.py pathmnist --size 224        any 2D MedMNIST; --path FOLDER: that of the .npz
python prepare.py images --input FOLDER       one's own pictures, FOLDER/class/*
python prepare.py verify mine                 whether the shards are as they were written

A data set that exists stays as it is: the same command ends with exit code 0, another one with 2.
With --overwrite it stays until the new one is complete. An interrupted command, given again, begins
anew. If two commands prepare the same name at once, the second one is refused.
"""

import argparse
import codecs
import contextlib
import difflib
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from platform import python_version

# imported where they are used, as not each command needs them: torch (which takes a second),
# datasets, huggingface_hub, Pillow, pyarrow, scikit-learn, scipy, tiktoken, tokenizers, tqdm
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from config import in_one_line, read_json, refusals, typed, write_json, written_beside

# -----------------------------------------------------------------------------
# what is written: data/NAME/ holds shards (train_000000.bin ..., val_000000.bin ..., and for
# images test_000000.bin ...) and meta.json, which says what is in them.
#
# A shard is a header and then items, all little-endian. An item of text is a token: end-of-text
# ends each document. In data with prompts the top bit marks tokens of prompts. There, and in data
# prepared with --documents, the next bit marks a document's first token. An item of images is its
# label, one byte (or one a class where images have several), and its pixels (channels, size, size).

HEADER = struct.Struct('<8sIIQ8x')  # magic, version, bytes an item, items, zeros
MAGIC, VERSION = b'nLRshard', 1
MARKER = '.data_of_nanolowrank'  # a file in every data set, see `written_beside`
SPLITS = {'tokens': ('train', 'val'), 'images': ('train', 'val', 'test')}
PROMPT = 2**31  # the top bit: this token is read, and not learned
FIRST = 2**30  # and this one begins a document
META = {  # what meta.json has to say of each kind
    'tokens': {'shards': list, 'vocab_size': int, 'tokens': dict},
    'images': {'shards': list, 'classes': list, 'task': str, 'channels': int, 'size': int,
               'images': dict}}
ANEW = 'prepare the data set again with --overwrite'


class DataError(ValueError):
    """A mistake, or a file that is broken or missing: what is wrong, the value, what to do."""


@contextlib.contextmanager
def reading(what, remedy):
    """Turns any exception into a DataError of one line: damaged bytes can raise any kind of it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # in one line, and not a page
        why = ' '.join((str(error) or type(error).__name__).split())
        why = re.sub(r' \([A-Z][\w -]* ID: [^)]*\)', '', why)  # the hub's, before its reason
        why = textwrap.shorten(why, 120, placeholder=' ...')
        raise DataError(f'{what} ({why}): {remedy}') from error


def hash_of(content):
    """Returns a 64-bit hash of these bytes alone: splits by it do not depend on an order."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little')


def groups(items):
    """Yields lists of up to 16 items a core: all cores have work, and memory stays constant."""
    items = iter(items)
    # an executor's map would read all items before the first result is asked for
    while group := [*itertools.islice(items, 16 * os.cpu_count())]:
        yield group


def kind_of(meta):
    return meta.get('kind', 'tokens')  # data sets of text do not say it


def item_type(meta):
    """The dtype of an item: a token, or the label and the pixels of an image."""
    if kind_of(meta) == 'tokens':
        has_bits = meta.get('prompts') or meta.get('starts')
        short = meta['vocab_size'] <= 2**16 and not has_bits  # two bytes are enough
        return np.dtype('<u2' if short else '<u4')
    labels = len(meta['classes']) if meta['task'].startswith('multi-label') else 1
    pixels = meta['channels'], meta['size'], meta['size']
    return np.dtype([('label', 'u1', (labels,)), ('image', 'u1', pixels)])


def header_of(dtype, count):
    return HEADER.pack(MAGIC, VERSION, dtype.itemsize, count)


def read_meta(path):
    """What meta.json of a data set says. ValueError: it is damaged, or another program wrote it."""
    def need(found, wanted):
        typed(found, wanted, path)
        for key in wanted:
            if not found.get(key):
                raise DataError(f"'{path}' is not of prepare.py (it has no {key}): move it away "
                                'and prepare the data set again')

    meta = read_json(path, {'kind': str, 'bytes': dict, 'prompts': bool, 'starts': bool,
                            'tokenizer': str})
    kind = kind_of(meta)
    need(meta, META.get(kind, META['tokens']))
    for entry in meta['shards']:
        need(entry, {'file': str, 'split': str, 'sha256': str, kind: int})
    return meta


def checksum(file):
    return hashlib.file_digest(file, 'sha256').hexdigest()


def open_shards(folder, meta, entries, verify=False):
    """Returns the items (count,), memory-mapped, of each shard in `entries` (of meta['shards']).
    DataError: a shard is missing, too short, has another header or, if verify, another checksum."""
    dtype, shards = item_type(meta), []
    for entry in entries:
        path, count = folder / entry['file'], entry[kind_of(meta)]
        with reading(f"'{path}' is missing or damaged", ANEW), open(path, 'rb') as file:
            if file.read(HEADER.size) != header_of(dtype, count):
                raise ValueError(f'it does not begin as a shard of {count} items does')
            shard = np.memmap(file, dtype, 'r', HEADER.size, (count,))
            file.seek(0)
            if verify and checksum(file) != entry['sha256']:
                raise ValueError('its checksum is not that of meta.json')
        shards.append(np.asarray(shard))  # arrays slice faster
    return shards


# -----------------------------------------------------------------------------
# sources of text
#
# To add one, write a generator that yields a Document for each text, and a row of SOURCES, which
# stands at the end of this part. Then `python prepare.py NAME` knows it. An example:
#
#     def notes(args):
#         for path in sorted(Path(args.path).rglob('*.md')):
#             yield from read_txt(path, 2**12)  # in pieces, a share of which is for validation
#
#     def describe_notes(args):
#         paths = Path(args.path).rglob('*.md') if args.path else ()
#         sizes = [path.stat().st_size for path in paths]
#         if not sizes:
#             raise DataError(f"no .md files in '{args.path}': give --path FOLDER")
#         return f'{len(sizes)} notes of {args.path}, {sum(sizes)} bytes', 0.05
#
#     'notes': Source(notes, describe_notes, ('--path FOLDER',))
#
# For a data set of the hub whose texts stand in columns the generator is there: see `hub`.

@dataclass(slots=True)
class Document:
    """A text, or a piece of one that is too long for memory."""
    text: str
    prompt: str | None = None  # stands before the text; it is read, and not learned
    split: str | None = None  # 'train' or 'val'; None: a hash of the prompt, or the text, decides
    ends: bool = True  # False: the next Document goes on with this text
    turns: tuple = ()  # the further (prompt, text) of a chat
    is_chat: bool = False  # the template has put in the tokens that begin and end its texts


@dataclass
class Source:
    """A row of SOURCES. args: the command line, such as args.path; args.data: the row's name."""
    documents: Callable  # (args) -> Documents; called again if none of them came to validation
    # (args) -> (a description of the data set for meta.json, which a later command has to repeat;
    # the share of the documents that is for validation). Raises DataError where args are wrong
    describe: Callable
    options: tuple = ()  # of OPTIONS, beside those of all text
    tokenizer: str = 'gpt2'  # unless the command says another one


REPLACE = 'replace_and_count'  # errors= of files that may hold something else than UTF-8
replaced = {'bytes': 0}


def replace_and_count(error):
    """Does what errors='replace' does, and counts the bytes."""
    replaced['bytes'] += error.end - error.start
    return '\ufffd', error.end


codecs.register_error(REPLACE, replace_and_count)


def stdlib_documents(args):
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - skip)  # where os.walk goes next
        for file in sorted(files):
            if file.endswith('.py'):
                yield Document(Path(folder, file).read_text('utf-8', REPLACE))


def text_documents(args):
    """Documents of the files args.input, streamed."""
    # small files are read in small pieces, so that the hash has something to choose from
    size = sum(map(os.path.getsize, args.input)) // 200
    size = min(2**16, max(2**6, size))
    for path in args.input:
        empty = True
        for document in FORMATS[Path(path).suffix.lower()](path, size, args.tokenizer):
            empty = empty and not f'{document.prompt or ""}{document.text}'.strip()
            yield document
        if empty:
            raise DataError(f"'{path}' is empty: leave it out of --input")


def describe_text(args):
    files, total = [], 0
    for path in map(Path, args.input):
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"'{path}' is none of {', '.join(FORMATS)}: convert or rename it")
        size = path.stat().st_size
        files.append(f'{path.name} ({size} bytes)')
        total += size
    # for validation about 5 MB: of small files a 20th, of large ones at least a 200th
    share = 5e6 / max(1, total)
    return ', '.join(files), min(0.05, max(0.005, share))


def read_lines(path, size=-1):
    """Yields lines, or `size` characters of a longer one. Line ends stay as they are."""
    # utf-8-sig: without the mark that programs of Windows begin a file with
    with open(path, encoding='utf-8-sig', errors=REPLACE, newline='\n') as file:
        while line := file.readline(size):
            if '\0' in line:
                raise DataError(f"'{path}' is binary (it holds NUL bytes): give text in UTF-8")
            yield line


def read_txt(path, size, tokenizer=None):
    """Yields one document, in pieces of about `size` characters, up to a line more. A long line is
    cut before a space, if it has one, so that its words keep their tokens."""
    piece = ''
    for line in read_lines(path, size):
        piece += line
        if len(piece) >= size:
            end = len(piece)
            if not piece.endswith('\n'):
                end = max(piece.rfind(' '), 0) or end
            yield Document(piece[:end], ends=False)
            piece = piece[end:]
    yield Document(piece)


def whole_characters(text):
    """Replaces each half of a surrogate pair, which a text in JSON can hold alone, by U+FFFD."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', REPLACE)


# fields beside messages or a prompt: these are part of the question, and would not be read
CONTEXT = ('system', 'tools', 'functions', 'images', 'image', 'videos', 'audio',
           'chat_template_kwargs')
# these may be, or may be what the prompt was made of
PERHAPS = 'instruction', 'input', 'context'


def read_jsonl(path, size, tokenizer=None):
    """Yields a document a line: its field 'text', or 'prompt' and 'completion', or 'messages',
    spelled by the template of a tokenizer's folder."""
    template, last_alone, beside = None, 0, set()
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():  # as the last one often is
            continue
        with reading(f"line {number} of '{path}' has no string 'text', nor 'prompt' and "
                     "'completion', nor 'messages'", 'give one JSON object a line'):
            found = json.loads(line)
            is_chat = any(isinstance(found.get(key), list) for key in ('messages', 'prompt'))
            kinds = [key for key in ('text', 'completion', 'prompt', 'messages')
                     if found.get(key) is not None]
            if isinstance(found.get('messages'), list):
                beside.update(kinds[:-1])  # as chats of the hub have a prompt, too
            elif len(kinds) > 1 and kinds != ['completion', 'prompt']:
                raise DataError(f"line {number} of '{path}' has {' and '.join(kinds)}, which do "
                                'not go together: leave out what is not to be learned')
            keys = ['text'] if kinds == ['text'] else ['completion', 'prompt']
            if kinds and kinds != ['text']:
                more = [key for key in CONTEXT if found.get(key)]
                beside.update(key for key in PERHAPS if found.get(key))
                if more:
                    raise DataError(f"line {number} of '{path}' has {more[0]} beside {kinds[-1]}, "
                                    'where it would not be read: put it into a message or the '
                                    'prompt, or leave it out')
            if not is_chat:
                document = Document(*[whole_characters(found[key]) for key in keys])
        if is_chat:
            template = template or Template(tokenizer)
            with reading(f"line {number} of '{path}' is no chat that can be learned",
                         'correct it, or leave it out'):
                if len(line) > LONGEST:
                    raise ValueError(f'it has {len(line)} characters')
                if '\ufffd' in line:
                    raise ValueError('it holds U+FFFD, which stands for what is not in UTF-8')
                turns, are_all = template.turns(*messages_of(found))
            (prompt, text), *more = turns
            document = Document(text, prompt, turns=tuple(more), is_chat=True)
            last_alone += not are_all
        yield document
    if last_alone:
        print(f'{last_alone} chats of which the last answer alone is learned: the template spells '
              'earlier ones otherwise')
    if beside:
        print(f"'{path}': {', '.join(sorted(beside))} passed over, beside messages or prompts")


def read_parquet(path, size, tokenizer=None):
    """Yields a document a row: its column 'text'."""
    import pyarrow.parquet
    with reading(f"'{path}' is damaged or no parquet file with a column 'text' of strings",
                 'convert it or rename the column'), pyarrow.parquet.ParquetFile(path) as file:
        # some rows at a time: a file may be larger than memory
        for batch in file.iter_batches(256, columns=['text']):
            for text in batch['text'].to_pylist():
                if not isinstance(text, str | None):
                    raise ValueError(f'it holds {type(text).__name__}')
                yield Document(text or '')


# readers: (path, characters of a piece, the name of a tokenizer or None) -> Documents
FORMATS = {'.txt': read_txt, '.jsonl': read_jsonl, '.parquet': read_parquet}


def hub(repository, columns, files, val_share=0.05, val_rows=None, tokens=None):
    """Returns the Source of a repository of the hub, in which each row is a document.

    columns: those of strings; an empty line joins them. files: {split: pattern}; without files for
    val, `val_share` of train is taken. val_rows: the most rows of val; with --tokens N also at most
    N / 10,000, or 100 if that is more. tokens: its number of tokens, in words; then the command
    needs --tokens or --path. No revision is pinned: it is what the hub serves that day."""

    def lies_in(folder, pattern):
        return any(Path(folder).glob(pattern))

    def documents(args):
        import huggingface_hub
        from datasets import load_dataset
        origin, found = args.path or repository, files
        if args.path:
            found = {split: name for split, name in files.items() if lies_in(args.path, name)}
        with reading(f"the files of '{origin}' cannot be reached, are damaged or lack {columns}",
                     f'connect, or, as this begins anew, get files of {repository} by hf download, '
                     'and use --path FOLDER'):
            if not args.path:  # fails at once, where datasets tries for half a minute
                huggingface_hub.dataset_info(repository, timeout=10, expand=['sha'])
            for split in sorted(found, reverse=True):  # val first, as --tokens ends with train
                rows = load_dataset(origin, data_files=found, split=split, streaming=True)
                if split == 'val' and val_rows:
                    wanted = args.tokens or 10_000 * val_rows
                    rows = rows.take(min(val_rows, max(100, wanted // 10_000)))
                for row in rows.select_columns(columns):
                    text = '\n\n'.join(row[column] for column in columns)
                    yield Document(text, split=split if 'val' in found else None)

    def describe(args):
        if args.path and not lies_in(args.path, files['train']):
            raise DataError(f"'{args.path}' holds no {files['train']}: give a folder with the "
                            "hub's files")
        if tokens and not args.tokens and not args.path:
            raise DataError(f'{args.data} has {tokens} tokens: say how many you want, as in '
                            '--tokens 1_000_000_000')
        return f'{repository} in {args.path}' if args.path else repository, val_share

    return Source(documents, describe, ('--path FOLDER',))


# what `python prepare.py NAME` knows of text
SOURCES = {
    'stdlib': Source(
        stdlib_documents, lambda args: (f'standard library of Python {python_version()}', 0.05),
        tokenizer='bytes'),
    'text': Source(text_documents, describe_text, ('--input FILE',)),
    'cnn_dailymail': hub(
        'abisee/cnn_dailymail', columns=['article', 'highlights'],
        files={'val': '3.0.0/validation-*.parquet', 'train': '3.0.0/train-*.parquet'}),
    'c4': hub(
        'allenai/c4', columns=['text'], tokens='156 billion',
        files={'val': 'en/c4-validation.*.json.gz', 'train': 'en/c4-train.*.json.gz'},
        val_rows=20_000),  # of its 170M tokens the 10M that GaLore was evaluated on
    'fineweb_edu': hub(
        'HuggingFaceFW/fineweb-edu', columns=['text'], tokens='10 billion (its sample)',
        files={'train': 'sample/10BT/*.parquet'}, val_share=0.005)}


# -----------------------------------------------------------------------------
# chats, spelled by the template of a model. A template is a program of strangers: jinja2 runs it in
# its sandbox, in a process of its own with limits of time, memory and length

ROLES = 'system', 'user', 'assistant'
LONGEST = 10**7  # characters of a line with a chat, and of what a template makes of it
SECONDS, MEMORY = 10, 2**30  # that a template may take for a chat


def about_tokens(folder):
    """Returns {key: value} of the files about a folder's tokenizer; special tokens are strings."""
    about = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
        if Path(folder, name).is_file():
            found = read_json(Path(folder, name))
            about |= {key: x for key, x in found.items() if x is not None}
    # older files have a dict for a token: its 'content' is the string
    return {key: x.get('content') if isinstance(x, dict) else x for key, x in about.items()}


def chat_template(folder):
    """The text of a folder's chat template, or None."""
    path, template = Path(folder, 'chat_template.jinja'), about_tokens(folder).get('chat_template')
    if isinstance(template, list):  # several, by name
        by_name = {entry['name']: entry['template'] for entry in template}
        template = by_name.get('default')
    if path.is_file():
        template = path.read_text('utf-8')
    return template if isinstance(template, str) else None


def read_template(folder):
    """(the text of a folder's chat template, {name: special token} for it). DataError: it has
    none."""
    template = chat_template(folder)
    if template is None:
        raise DataError(f"'{folder}' has no chat_template, and messages want one: give --tokenizer "
                        'a model that was trained on chats')
    tokens = {name: token for name, token in about_tokens(folder).items()
              if name.endswith('_token') and isinstance(token, str)}
    return template, tokens


def serve_template(seconds, memory):
    """Runs in the process of a `Template`. It reads JSON lines: the first is [template, special
    tokens], each other one [messages, add_generation_prompt]. It answers each line by [text, None]
    or [None, error]. seconds, memory (bytes): what an answer may take."""
    import resource
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Writes what is inside {% generation %}, by which some templates mark answers."""
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(['*', '**'])

        def call_binop(self, context, operator, left, right):
            sizes = [len(x) if hasattr(x, '__len__') else abs(x) for x in (left, right)]
            is_power = operator == '**'
            if is_power and max(sizes) > 64 or not is_power and math.prod(sizes) > LONGEST:
                raise TemplateError(f'{operator} of too much')
            return super().call_binop(context, operator, left, right)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # jinja2's own escapes HTML

    def render(messages, add_generation_prompt):
        text, size = [], 0
        for piece in template.generate(messages=messages, tools=None, documents=None,
                                       add_generation_prompt=add_generation_prompt, **tokens):
            size += len(piece)
            if size > LONGEST:
                raise TemplateError(f'it writes more than {LONGEST} characters')
            text.append(piece)
        return ''.join(text)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    # the same options, filter and functions as in transformers
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True,
                      extensions=['jinja2.ext.loopcontrols', Generation])
    sandbox.filters['tojson'] = tojson
    sandbox.globals.update(raise_exception=raise_exception,
                           strftime_now=lambda form: datetime.now().strftime(form))
    if os.path.exists('/proc/self/statm'):  # other systems do not keep to such a limit
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    template = None
    for line in sys.stdin:
        signal.alarm(seconds)  # ends this process
        first, second = json.loads(line)
        try:
            if template is None:
                tokens = second
                template = sandbox.from_string(first)
                answer = '', None
            else:
                answer = render(first, second), None
        except Exception as error:  # of a program of strangers
            answer = None, f'{type(error).__name__}: {error}'[:200]
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


class Template:
    """The chat template of a folder, or of a name on the hub, with its special tokens. It runs in a
    process of its own. DataError: there is none, or it does not compile."""

    def __init__(self, source):
        if source in (None, 'gpt2', 'bytes'):
            raise DataError("messages are spelled by a model's chat template: give --tokenizer the "
                            'folder, or the name on the hub, of a model that was trained on chats')
        folder = hub_folder(source, *TOKENIZER)
        template, tokens = read_template(folder)
        code = ('import sys; sys.path.insert(0, sys.argv[1]); '
                f'import prepare; prepare.serve_template({SECONDS}, {MEMORY})')
        here = os.path.dirname(os.path.abspath(__file__))
        self.process = subprocess.Popen([sys.executable, '-c', code, here], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, encoding='utf-8',
                                        start_new_session=True)
        with reading(f"the chat template of '{folder}' is none", 'give another model'):
            self.ask(template, tokens)

    def ask(self, *question):
        try:
            self.process.stdin.write(json.dumps(question) + '\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        if not line and self.process.wait() == -signal.SIGALRM:
            raise ValueError(f'its template wants more than {SECONDS} s')
        if not line:
            raise ValueError('the process that renders it has ended: is jinja2 installed?')
        text, why = json.loads(line)
        if text is None:
            raise ValueError(f'its template says {why}')
        return text

    def render(self, messages, add_generation_prompt=False):
        """The text of messages, [{role, content}]; add_generation_prompt: an answer is to follow.
        ValueError: the template fails, takes too long, or writes too much."""
        return self.ask(messages, add_generation_prompt)

    def turns(self, messages, learned):
        """Returns ([(prompt, answer)] of answers, whether all are there); learned: their indices.
        Joined, they are the text up to the last answer. A prompt ends where the template asks for
        an answer. If it changes earlier turns later (some drop thoughts), there is only the last
        pair. ValueError: the text does not begin with the last prompt."""
        texts = ['']  # up to a question, up to its answer, ...: each has to begin as the one before
        for i in learned:
            texts.append(self.render(messages[:i], True))
            texts.append(self.render(messages[:i + 1]))
        prompt, whole = texts[-2:]
        if not whole.startswith(prompt):
            raise ValueError('its template asks for an answer otherwise than it spells one')
        if not all(after.startswith(before) for before, after in itertools.pairwise(texts)):
            return [(prompt, whole[len(prompt):])], False
        pieces = [after[len(before):] for before, after in itertools.pairwise(texts)]
        return list(zip(pieces[::2], pieces[1::2])), True


def messages_of(found):
    """Returns (messages, the indices of answers to learn) of a line of .jsonl, which has messages,
    or lists of them as prompt and completion; answers of weight 0 are only read. ValueError: it is
    not supported."""
    messages, first = found.get('messages'), 0
    if not isinstance(messages, list):
        if not isinstance(found.get('completion'), list):
            raise ValueError('prompt is a list of messages, and completion is not')
        messages, first = found['prompt'] + found['completion'], len(found['prompt'])
    plain, learned = [], []
    for i, message in enumerate(messages):
        role, content = message.get('role'), message.get('content')
        if role not in ROLES:
            raise ValueError(f'a role is {role!r}, and not one of {", ".join(ROLES)}')
        for key in message.keys() - {'role', 'content'}:
            if message[key] and key not in ('name', 'id', 'weight', 'timestamp'):
                raise ValueError(f'a message has {key}')
        if isinstance(content, list):  # OpenAI's parts
            kinds = {part.get('type') for part in content} - {'text'}
            if kinds:
                raise ValueError(f"it has content of type {', '.join(map(str, kinds))}")
            content = ''.join(part['text'] for part in content)
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f'the {role} says nothing')
        if message.get('weight') not in (None, 0, 1):
            raise ValueError(f"a message has weight={message['weight']!r}, and not 0 or 1")
        if role == 'assistant' and i >= first and message.get('weight') != 0:
            learned.append(i)
        plain.append({'role': role, 'content': whole_characters(content)})
    if not learned:
        raise ValueError('no assistant answers, or each answer has weight 0')
    return plain, learned


# -----------------------------------------------------------------------------
# sources of images: generators of (split, labels (n, 1 or classes), images (n, channels, size,
# size)). To add one, write such a generator and a branch of `from_images` and of `options_of`

DIGITS = ('digits', 'digits_shifted')
PICTURES = '.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp'
MOST_PIXELS = 2**26  # of a picture that is read: 0.3 GB where it is transparent


def digit_images(shifted):
    """scikit-learn's digits, 8 x 8, enlarged; the order, and with it the splits, is fixed."""
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits
    data = load_digits()
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)  # where pixels lie on the small image
    enlarge = np.maximum(0, 1 - abs(at[:, None] - np.arange(8)))  # (32, 8), bilinear
    ink = enlarge @ data.images[:, None] @ enlarge.T / 16  # (n, 1, 32, 32), from 0 to 1
    images, count = ink.repeat(3, axis=1), len(ink)
    order = order_of(count, seed=0)
    if shifted:  # dark on a light ground, each of another hue
        ink = rotate(ink, 30, (3, 2), reshape=False, order=1)
        hue = order[:, None, None, None] / count + np.arange(3)[:, None, None] / 3  # (n, 3, 1, 1)
        images = (1 - ink) * (0.7 + 0.3 * np.cos(2 * np.pi * hue))
    images = (255 * images).round().astype(np.uint8)
    splits = np.split(order, [count * 3 // 5, count * 4 // 5])
    for split, rows in zip(SPLITS['images'], splits):
        yield split, data.target[rows, None], images[rows]


SPLIT_FOLDERS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val',
                 'validation': 'val', 'dev': 'val', 'test': 'test', 'testing': 'test'}


def split_folders(folder):
    """Returns {folder: split} of FOLDER/{train,val,test}, or {FOLDER: None}: its folders are those
    of classes. DataError: there are both."""
    if not os.path.isdir(folder):
        raise DataError(f"'{folder}' is no folder: check --input")
    inside = sorted(Path(folder).glob('[!.]*/'))
    found = {path: SPLIT_FOLDERS.get(path.name.lower()) for path in inside}
    splits = {*found.values()} - {None}
    if 'train' not in splits or len(splits) == 1:
        return {Path(folder): None}
    if None in found.values():
        others = ', '.join(path.name for path, split in found.items() if split is None)
        raise DataError(f"'{folder}' holds folders of splits, and {others} beside them: move these "
                        'away')
    return found


def pictures_of(folder):
    """Returns {class: [(split, path, inside)]} of the pictures in FOLDER/class/ (split: None) or
    FOLDER/{train,val,test}/class/, sorted. inside: the folder in that of the class which holds the
    picture, such as a patient's, or None. Prints what is passed over."""
    found, others, loose, links = {}, set(), 0, []
    for root, split in split_folders(folder).items():
        loose += sum(path.is_file() for path in root.glob('[!.]*'))
        for parent in sorted(root.glob('[!.]*/')):
            name = parent.name
            with reading(f'the name of a class, {name!r}, is not in UTF-8', 'rename its folder'):
                name.encode()
            seen = [path for path in sorted(parent.rglob('*'))
                    if '/.' not in str(path.relative_to(root))]  # not hidden
            files = [path for path in seen if path.is_file()]
            links += [path for path in seen if path.is_symlink() and not path.is_file()]
            taken = [path for path in files if path.suffix.lower() in PICTURES]
            for path in taken:
                *folders, _ = path.relative_to(parent).parts
                found.setdefault(name, []).append((split, path, folders[0] if folders else None))
            found.setdefault(name, [])
            others |= {path.suffix or 'no ending' for path in {*files} - {*taken}}
    found = dict(sorted(found.items()))
    if links:
        print(f"{len(links)} links inside folders of classes, to folders or to nothing, are passed "
              f"over, such as '{links[0]}'")
    if others:
        print(f"files that end in {', '.join(sorted(others))} are passed over")
    if loose:
        print(f'{loose} files beside the folders of classes are passed over')
    if not 2 <= len(found) <= 256:
        raise DataError(f"'{folder}' has {len(found)} folders of classes, and 2 to 256 are needed: "
                        'put pictures into FOLDER/class/')
    for name, paths in found.items():
        if not paths:
            raise DataError(f"'{folder}' has a class, and in {name} are no pictures: put some "
                            f"({', '.join(PICTURES)}) there, or remove it")
    return found


def drawn_split(content):
    """'val' or 'test' for a tenth of these bytes each, by their hash, or 'train'."""
    return {0: 'val', 1: 'test'}.get(hash_of(content) % 10, 'train')


def splits_of_folders(found, lacking):
    """Returns {path: split} of the pictures of `pictures_of` that are to be split and lie in a
    folder inside that of their class: by a hash of its name, but each split of `lacking` gets at
    least one folder. {} if there are fewer than ten."""
    inside_of = {path: inside for entries in found.values()
                 for split, path, inside in entries if inside and split in (None, 'train')}
    drawn = {name: drawn_split(name.encode()) for name in sorted({*inside_of.values()})}
    if splits := [name for name in drawn if name.lower() in SPLIT_FOLDERS]:
        raise DataError(f"folders of classes hold '{splits[0]}', and would be split anew: put "
                        f'splits outside, FOLDER/{splits[0]}/class/')
    count = len(drawn)
    if count >= 10:
        print(f'{count} folders inside those of classes: the pictures of one stay in one split')
        for split in lacking:
            if split not in drawn.values():
                name = next(name for name in drawn if drawn[name] == 'train')
                drawn[name] = split
        return {path: drawn[inside] for path, inside in inside_of.items()}
    if count:
        print(f'{count} folders inside those of classes, too few to split by: pictures are split '
              'one by one')
    return {}


def picture_images(found, size):
    """The pictures of `pictures_of`, their shorter side resized to `size` pixels and the middle
    kept. Of a split that no folder has a tenth of the others is taken, by a hash of the file, or by
    `splits_of_folders`. DataError: pictures cannot be read; the first are named."""
    from PIL import Image, ImageOps
    given = {split for entries in found.values() for split, *_ in entries} - {None}
    lacking = [split for split in ('val', 'test') if split not in given]
    drawn_by_path = splits_of_folders(found, lacking) if lacking else {}

    def read(entry):
        label, split, path, _ = entry
        content = path.read_bytes()
        with reading(f"'{path}' is damaged or no picture", 'remove it'):
            picture = Image.open(io.BytesIO(content))
            if picture.width * picture.height > MOST_PIXELS:  # before they are decoded
                raise DataError(f"'{path}' has {picture.width} x {picture.height} pixels: make it "
                                f'smaller, {MOST_PIXELS:,} at most are read')
            # Pillow would clip them, keep the upper 8 bits, or read noise
            bits = getattr(picture, 'tag_v2', {}).get(258, (8,))  # of a TIFF's channels
            if picture.mode[0] in 'IF' or ';16' in str(picture.tile) or max(bits) > 8:
                raise DataError(f"'{path}' has more than 8 bits a channel: convert it")
            frames = getattr(picture, 'n_frames', 1)
            if frames > 1 and picture.format != 'MPO':  # MPO: a photograph with its preview
                raise DataError(f"'{path}' has {frames} frames: keep one")
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:  # on white, as browsers show it
                ground = Image.new('RGBA', picture.size, 'white')
                picture = Image.alpha_composite(ground, picture.convert('RGBA'))
            picture = picture.convert('RGB')
        # resized and cropped
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)  # (size, size, 3)
        drawn = drawn_by_path.get(path) or drawn_split(content)
        if split in (None, 'train') and drawn not in given:
            split = drawn
        return split, np.array([[label]], np.uint8), np.moveaxis(pixels, 2, 0)[None]

    def read_or_error(entry):
        try:
            return read(entry)
        except DataError as error:  # raised below, with the others
            return error

    entries = ((label, *entry) for label, name in enumerate(found) for entry in found[name])
    errors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside the interpreter's lock
        for group in groups(entries):
            for item in pool.map(read_or_error, group):
                if isinstance(item, DataError):
                    errors.append(str(item))
                else:
                    yield item
    if errors:
        more = [f'and so on, {len(errors)} in all'] if len(errors) > 5 else []
        raise DataError('; '.join([*errors[:5], *more]))


def medmnist_info():
    """medmnist.INFO, out of its file: to import the package takes two seconds, for torch."""
    package = Path(importlib.util.find_spec('medmnist').origin)
    return runpy.run_path(str(package.with_name('info.py')))['INFO']


def medmnist_images(path, size, info):
    """The images of MedMNIST's archive `path`, which may be larger than memory. info: its entry of
    medmnist.INFO."""
    shape = size, size, info['n_channels']
    step = max(1, 2**20 // math.prod(shape))  # so many images are about a megabyte
    # where images have several labels each of them is 0 or 1
    limit = 2 if info['task'].startswith('multi-label') else len(info['label'])
    if not path.exists():
        from torchvision.datasets.utils import download_url
        suffix = '' if size == 28 else f'_{size}'
        url, md5 = info[f'url{suffix}'], info[f'MD5{suffix}']
        with reading(f'{url} cannot be downloaded',
                     f'connect and run it again, or use --path FOLDER with {path.name} in it'):
            download_url(url, path.parent, f'{path.name}.part', md5)
            os.replace(f'{path}.part', path)  # whole, or not there
    with reading(f"'{path}' is damaged or no archive of MedMNIST of this size",
                 'move it away and get it again'), np.load(path) as archive:
        for split in SPLITS['images']:
            labels = archive[f'{split}_labels']
            if not np.isin(labels, range(limit)).all():
                raise ValueError(f'{split} labels up to {labels.max()}, not below {limit}')
            with archive.zip.open(f'{split}_images.npy') as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)  # from here on there are pixels
                for i in range(0, len(labels), step):
                    chunk = labels[i:i + step]
                    pixels = file.read(len(chunk) * math.prod(shape))
                    pixels = np.frombuffer(pixels, np.uint8).reshape(len(chunk), *shape)
                    yield split, chunk, np.moveaxis(pixels, 3, 1)
                if file.read(1):  # reading to the end compares the checksum
                    raise ValueError(f'{split} images are larger')


# -----------------------------------------------------------------------------
# tokenizers: tiktoken's, or a tokenizer.json. What both have: name, n_vocab, eot_token, folder,
# begin, puts_space, encode_many(texts), encode_ordinary(text), decode(tokens)

TOKENIZER = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
             'chat_template.jinja', 'generation_config.json')  # what travels with tokens
GPT2_TOKENS = '140f02bb05c0d82c'  # the checksum in `HubTokenizer.name` that GPT-2's would have


def hub_folder(source, *patterns):
    """Returns the folder `source`, or a copy of the hub's repository of that name with the files
    that match. 'gpt2' and its sizes are openai-community's. DataError: why there is neither."""
    import huggingface_hub
    if os.path.isdir(source):
        return source
    name = source
    if re.fullmatch('gpt2(-medium|-large|-xl)?', source):
        name = f'openai-community/{source}'
    copies = ['*/*', 'consolidated*']  # of the weights, for other programs
    with reading(f"there is no folder '{source}', and the hub's of that name is not cached and "
                 'cannot be reached',
                 "check it, connect (cached: HF_HUB_OFFLINE=1), log in by 'hf auth login', ask for "
                 'access on its page, or give a folder'):
        return huggingface_hub.snapshot_download(
            name, allow_patterns=[*patterns], ignore_patterns=copies)


class TiktokenTokenizer:
    """A tiktoken.Encoding. Its tokens need no files, and it puts nothing before a text."""
    folder, begin, puts_space = None, (), False

    def __init__(self, encoding):
        self.name, self.n_vocab = encoding.name, encoding.n_vocab
        self.eot_token = encoding.eot_token
        self.encode_ordinary, self.decode = encoding.encode_ordinary, encoding.decode
        self.encode = partial(encoding.encode_to_numpy, disallowed_special=())
        self.pool = ThreadPoolExecutor(os.cpu_count())  # it works outside the interpreter's lock

    def encode_many(self, texts):
        """The tokens of each text, (n,) uint32, on all cores."""
        return self.pool.map(self.encode_in_slices, texts)

    def encode_in_slices(self, text, size=2**18):
        # of a million spaces at once its regular expression runs out of stack
        slices = [text[i:i + size] for i in range(0, len(text) or 1, size)]
        return np.concatenate([*map(self.encode, slices)])


class HubTokenizer:
    """The tokenizer.json of a folder. DataError: it is damaged or there is none.

    n_vocab: its highest number plus 1; eot_token: its eos_token, which ends documents; begin: the
    numbers that it puts before a text, such as that of <s>; name: 'tokenizer.json' and a checksum
    of all strings with their numbers (the rest may change if transformers saves the file anew)."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        self.folder, path = folder, os.path.join(folder, 'tokenizer.json')
        with reading(f"'{path}' is missing, damaged or of another version of tokenizers",
                     "fetch it, or save it by transformers' AutoTokenizer"):
            self.inner = Tokenizer.from_file(path)
        self.inner.no_truncation()
        self.inner.no_padding()
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        # (string, number), sorted by number
        vocabulary = sorted(vocabulary.items(), key=lambda entry: entry[::-1])
        self.n_vocab = vocabulary[-1][1] + 1
        if self.n_vocab > 2**24:  # as many rows would an embedding have
            raise DataError(f"'{path}' has the number {self.n_vocab - 1} for "
                            f'{vocabulary[-1][0]!r}: '
                            'give a tokenizer with numbers below 2^24')
        digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        self.name = f'tokenizer.json {digest}'
        if digest == GPT2_TOKENS:
            self.name = 'gpt2'

    @cached_property
    def begin(self):
        return [token for token in self.inner.encode('').ids if token != self.eot_token]

    @cached_property
    def eot_token(self):
        # the hub's GPT-2 does not say it
        usual = '<|endoftext|>' if self.name == 'gpt2' else None
        token = about_tokens(self.folder).get('eos_token') or usual
        if isinstance(token, str) and self.inner.token_to_id(token) is not None:
            return self.inner.token_to_id(token)
        raise DataError(f"'{self.folder}' does not say which token ends a text: add an eos_token "
                        'that its vocabulary has to its tokenizer_config.json')

    @property
    def puts_space(self):
        """Whether it puts a space before every text, as LLaMA 2's does."""
        spelled = ''.join(self.inner.encode('a', add_special_tokens=False).tokens)
        return spelled.startswith(('\u2581', '\u0120'))  # SentencePiece's space, and GPT-2's

    def encode_many(self, texts):
        """The tokens of each text, (n,) uint32, on all cores, without `begin`."""
        found = self.inner.encode_batch_fast(texts, add_special_tokens=False)  # has its own threads
        return [np.array(text.ids, np.uint32) for text in found]

    def encode_with_ends(self, texts):
        """Yields for each text its tokens (n,) uint32, and for each token the index in the text at
        which it ends (n,): that of the first character after it."""
        for text in self.inner.encode_batch(texts, add_special_tokens=False):
            yield np.array(text.ids, np.uint32), np.array([end for _, end in text.offsets])

    def encode_ordinary(self, text):
        return self.begin + self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        return self.inner.decode(tokens)


def tokenizer(name, folder=None):
    """Returns tiktoken's 'gpt2' (50,257 tokens) or 'bytes' (256, and <|endoftext|> = 256), or the
    HubTokenizer of `name`, a folder or a name on the hub. folder: if the HubTokenizer of this
    folder has that name, it is returned instead."""
    if folder and Path(folder, 'tokenizer.json').exists():
        found = HubTokenizer(folder)
        if found.name == name:
            return found
    if name.startswith('tokenizer.json '):
        raise DataError(f"'{folder}' does not hold the tokenizer.json of these tokens ({name}): "
                        'copy it there from the folder that they were prepared with')
    import tiktoken
    if name == 'bytes':  # no merges: the pattern only says how much is looked at in one go
        return TiktokenTokenizer(tiktoken.Encoding(
            'bytes', pat_str=r'[\s\S]{1,64}', explicit_n_vocab=257,
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={'<|endoftext|>': 256}))
    if name == 'gpt2':
        with reading("tiktoken cannot download its 'gpt2' vocabulary",
                     'connect once, or set TIKTOKEN_CACHE_DIR to a copy of the folder '
                     'data-gym-cache of a machine that has it, or take --tokenizer '
                     'openai-community/gpt2 or bytes'):
            return TiktokenTokenizer(tiktoken.get_encoding('gpt2'))
    return HubTokenizer(hub_folder(name, *TOKENIZER))


def carry(sources, target, names=TOKENIZER):
    """Copies files of these names into a folder that is being written, each from the first of the
    folders `sources` that has it."""
    for name in names:
        found = [path for path in (Path(source, name) for source in sources) if path.is_file()]
        if found:
            target.mkdir(exist_ok=True)
            (target / name).write_bytes(found[0].read_bytes())


# -----------------------------------------------------------------------------
# writing

class Writer:
    """The shards of a data set, and meta.json, which `publish` writes last. bar: tqdm's."""

    def __init__(self, folder, settings, bar):
        self.folder, self.meta, self.bar, self.files = folder, dict(settings), bar, {}

    def begin(self):
        """Begins, with the settings that meta has now."""
        self.close()
        for path in self.folder.glob('*.bin'):  # it begins anew, see `write_tokens`
            path.unlink()
        self.files = {}  # the open shard of each split
        self.kind, self.dtype = kind_of(self.meta), item_type(self.meta)
        self.full = self.meta.get('shard_tokens') or self.meta['shard_bytes'] / self.dtype.itemsize
        self.meta |= {self.kind: dict.fromkeys(SPLITS[self.kind], 0), 'shards': []}
        self.bar.reset()

    def append(self, split, items):
        if split not in self.files:
            number = sum(entry['split'] == split for entry in self.meta['shards'])
            self.files[split] = open(self.folder / f'{split}_{number:06d}.bin', 'x+b')
            self.files[split].write(header_of(self.dtype, 0))  # how many there will be is not known
        self.files[split].write(items.astype(self.dtype, copy=False))
        self.meta[self.kind][split] += len(items)
        self.bar.update(len(items))

    def end_shards(self, least):
        """Ends the shards of at least so many items."""
        for split, file in [*self.files.items()]:
            count = (file.tell() - HEADER.size) // self.dtype.itemsize
            if count < least:
                continue
            file.seek(0)
            file.write(header_of(self.dtype, count))
            file.seek(0)  # the checksum is of all bytes, the header's too
            self.meta['shards'].append({'file': os.path.basename(file.name), 'split': split,
                                        self.kind: count, 'sha256': checksum(file)})
            os.fsync(file.fileno())  # a power cut after `write` leaves it complete
            self.files.pop(split).close()

    def close(self):
        for file in self.files.values():
            file.close()

    def publish(self):
        self.end_shards(least=1)
        write_json(self.folder / 'meta.json', self.meta)


def write_tokens(writer, documents, encoding, val_share):
    """Writes documents(). One that names no split is for validation if its hash is in the lowest
    `val_share`. If none is, all are written anew, and the one with the lowest hash is."""
    lowest = append_documents(writer, documents(), encoding, int(val_share * 2**64))
    if not writer.meta['tokens']['val']:
        append_documents(writer, documents(), encoding, lowest + 1)
    counts = writer.meta['tokens']
    if not all(counts.values()):
        raise DataError(f'there is too little text to train and to validate on ({counts}): add '
                        'documents with other prompts (or, without prompts, other texts), as equal '
                        'ones go into one split')
    if encoding.folder:  # a model that is trained on these tokens needs it
        carry([encoding.folder], writer.folder / 'tokenizer')


def append_documents(writer, documents, encoding, val_below):
    """Writes Documents, for validation those whose hash is below `val_below`. Returns the lowest
    hash."""
    replaced['bytes'] = 0
    meta, limit = writer.meta, writer.meta['limit'] or math.inf
    documents = iter(documents)
    first = [*itertools.islice(documents, 1)]
    if first and first[0].prompt is not None:
        meta['prompts'] = meta['starts'] = True  # tokens have bits for that
    documents = itertools.chain(iter(first), documents)
    del first  # its text may be long
    writer.begin()
    meta |= {'val_below': val_below, 'replaced_bytes': 0,
             'documents': dict.fromkeys(SPLITS['tokens'], 0),  # of a .txt these are pieces
             'bytes': dict.fromkeys(SPLITS['tokens'], 0)}
    begin = np.array(encoding.begin, np.uint32)
    # a long text comes in pieces, of which each may go into another split. inside: the splits whose
    # last document has not ended
    lowest, inside = 2**64, set()
    for document, tokens in tokenised(documents, encoding):
        # all answers to a prompt are in one split
        number = hash_of((document.prompt or document.text).encode())
        split = document.split
        if split is None:
            split = 'val' if number < val_below else 'train'
        if len(tokens):
            prompt = tokens[0] & PROMPT  # its top bit
            if prompt and not meta.get('prompts'):
                raise DataError('a line has a prompt, and the first one of --input has none: put '
                                'a file with prompts first')
            if split not in inside:
                if not document.is_chat:
                    tokens = np.concatenate([begin | prompt, tokens])
                if meta.get('starts'):
                    tokens[0] |= FIRST
            writer.append(split, tokens)
            meta['documents'][split] += 1
            meta['bytes'][split] += sum(len(text.encode()) for text in texts_of(document)[1::2])
            lowest = min(lowest, number)
            inside.add(split)
        # a piece for validation ends the document in all splits: the text around it is not joined
        if document.ends or split == 'val':
            for ended in inside if not document.is_chat else ():
                writer.append(ended, np.array([encoding.eot_token]))
            inside.clear()
        writer.end_shards(writer.full)
        if meta['tokens']['train'] >= limit:
            break
    meta['replaced_bytes'] = replaced['bytes']
    return lowest


def texts_of(document):
    """The texts of a Document: a prompt and what follows it, in turn."""
    pairs = [(document.prompt or '', document.text), *document.turns]
    return [text for pair in pairs for text in pair]


def tokenised(documents, encoding):
    """Yields (Document, tokens (n,) uint32), on all cores. Tokens of a prompt have the top bit."""
    for group in groups(documents):
        chats = [''.join(texts_of(document)) for document in group if document.is_chat]
        spelled = iter(encoding.encode_with_ends(chats) if chats else ())
        texts = [text for document in group if not document.is_chat
                 for text in (document.prompt or '', document.text)]
        found = iter(encoding.encode_many(texts))
        for document in group:
            if document.is_chat:  # as a whole, as it will be read
                tokens, ends = next(spelled)
                borders = np.cumsum([len(text) for text in texts_of(document)])
                part = np.searchsorted(borders, ends - 1, 'right')  # where a token's end lies
                yield document, np.where(part % 2, tokens, tokens | PROMPT)
            else:
                yield document, np.concatenate([next(found) | PROMPT, next(found)])


def write_images(writer, images):
    """Writes images (split, labels, pixels) from a generator, see "sources of images" above."""
    writer.begin()
    counts, seen = writer.meta['images'], {split: set() for split in SPLITS['images']}
    for split, labels, pixels in images:
        items = np.empty(len(labels), writer.dtype)
        items['label'], items['image'] = labels, pixels
        writer.append(split, items)
        writer.end_shards(writer.full)
        if labels.shape[1] == 1:  # of several labels any may be lacking
            seen[split] |= {*labels[:, 0].tolist()}
    if not all(counts.values()):
        raise DataError(f'there are too few images for three splits ({counts}): add some')
    for split in seen:  # such a class cannot be learned, or not be measured
        lacking = [name for i, name in enumerate(writer.meta['classes']) if i not in seen[split]]
        if lacking and seen[split]:
            print(f"warning: no {split} images of {', '.join(lacking)}", file=sys.stderr)


def write(folder, settings, fill, overwrite):
    """Writes the data set `folder`: fill(writer) appends its items. Without overwrite, one that is
    there stays as it is. DataError: it has other settings."""
    if (folder / 'meta.json').exists() and not overwrite:
        found = read_meta(folder / 'meta.json')
        for key in settings:  # is it what this command would write?
            if found.get(key) != settings[key]:
                raise DataError(f"'{folder}' holds a data set with {key} {found.get(key)!r}, not "
                                f'{settings[key]!r}: choose another --name, or --overwrite it')
        open_shards(folder, found, found['shards'])
        print(f"'{folder}' is already there, of sources with these names and sizes: nothing to do "
              '(--overwrite prepares it anew)')
        return
    from tqdm import tqdm
    kind = kind_of(settings)
    look = dict(total=settings.get('limit'), unit=f' {kind}', unit_scale=True, disable=None)
    with written_beside(folder, MARKER) as beside, tqdm(**look) as bar, \
            contextlib.closing(Writer(beside, settings, bar)) as writer:
        fill(writer)
        writer.publish()
    counts = ', '.join(f'{count:,} {split}' for split, count in writer.meta[kind].items())
    print(f"'{folder}': {counts} {kind}")
    if writer.meta.get('replaced_bytes'):
        print(f"{writer.meta['replaced_bytes']:,} bytes that were not UTF-8 were replaced")


# -----------------------------------------------------------------------------
# reading

def ensure(name, data_dir='data', kind='tokens'):
    """Prepares a missing data set, if it is stdlib, digits or digits_shifted; DataError: another is
    missing (kind: what it should hold). On each machine the first process of a run does it, and the
    others wait."""
    path = Path(data_dir, name, 'meta.json')
    if path.exists():
        return
    if name not in ('stdlib', *DIGITS):
        arguments = f'text --input FILE --name {name}'
        if kind == 'images':
            arguments = f'images --input FOLDER --name {name}'
        if name in SOURCES:
            arguments = name
        # as `from_images` names them
        if flag := re.fullmatch('([a-z]+mnist)(?:_(64|128|224))?', name):
            arguments = f'{flag[1]} --size {flag[2] or 28}'
        raise DataError(f"data set '{name}' is not there: run 'python prepare.py {arguments} "
                        f"--data_dir {data_dir}'")
    if os.environ.get('LOCAL_RANK', '0') == '0':
        main([name, '--data_dir', str(data_dir)])
    while not path.exists():  # torchrun ends this process if the first one fails
        time.sleep(0.1)


@lru_cache(maxsize=2)  # a batch may end an epoch and begin the next one
def order_of(count, seed, epoch=0):
    """Returns a permutation of range(count), int64, which (seed, epoch) determine. It is made of
    raw bits: NumPy promises that these stay the same, but not what its `permutation` returns."""
    bits = np.random.Philox(key=seed + (epoch << 64)).random_raw(count)
    return np.argsort(bits, kind='stable')


class Split:
    """One split of a data set, in batches. Its subclasses have `items(index)`, which reads items,
    and `first`: the index of the first item of each shard, and at the end the number of all."""
    learned = None  # (num_windows,), targets in each window, where not all tokens are targets

    def __init__(self, name, split, kind, data_dir):
        ensure(name, data_dir, kind)
        self.folder = Path(data_dir, name)
        self.meta = read_meta(self.folder / 'meta.json')
        if kind_of(self.meta) != kind:
            raise DataError(f"data set '{name}' holds {kind_of(self.meta)}, not {kind}: choose one "
                            f'of {kind}')
        # of all splits, and of what their numbers mean
        known = [[entry['split'], entry['sha256']] for entry in self.meta['shards']]
        known += [self.meta.get(key) for key in ('classes', 'task', 'tokenizer', 'vocab_size')]
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        entries = [entry for entry in self.meta['shards'] if entry['split'] == split]
        if not entries:
            raise DataError(f"data set '{name}' has no split '{split}': use one of "
                            f"{', '.join(self.meta[kind])}")
        self.shards = open_shards(self.folder, self.meta, entries)

    def __len__(self):
        return int(self.first[-1])

    def gather(self, shards, index):
        """The items `index` (rows,) of arrays, one for each shard."""
        shard = np.searchsorted(self.first, index, 'right') - 1  # the last one that begins before
        number = index - self.first[shard]  # in its shard
        found = np.empty((len(index), *shards[0].shape[1:]), shards[0].dtype)
        for row, (i, j) in enumerate(zip(shard.tolist(), number.tolist())):
            found[row] = shards[i][j]
        return found

    def need_below(self, limit, numbers, what):
        """OSError where a number that was read cannot be: a shard is damaged."""
        # embeddings and losses would say less, and on a GPU later
        most = int(numbers.max(initial=0))
        if most >= limit:
            sentence = f'it holds {what} {most}, and there are {limit}: {ANEW}'
            raise OSError(errno.EIO, sentence, str(self.folder))

    def index(self, batch_size, step, micro_step=0, accumulation=1, seed=0):
        """The items of a micro-batch, (batch_size,) int64: a function of its arguments alone. An
        epoch shows each item once, in an order of (seed, epoch)."""
        first = (step * accumulation + micro_step) * batch_size
        epochs, index = np.divmod(np.arange(first, first + batch_size), len(self))
        for epoch in np.unique(epochs).tolist():  # two, where one ends inside the batch
            rows = epochs == epoch
            index[rows] = order_of(len(self), seed, epoch)[index[rows]]
        return index

    def batch(self, batch_size, step, micro_step=0, accumulation=1, seed=0, rows=None, heads=1):
        """Returns x, y of a micro-batch of batch_size rows, or of its rows `rows` (integers).

        With prompts or documents apart, it also returns weights (rows,); with documents apart, the
        document of each token, too. The mean of weighted losses over micro-batches and ranks is the
        mean over heads of a head's mean loss over all its targets in the step, wherever they lie.
        heads: the number of split heads; row j belongs to head j % heads."""
        index = self.index(batch_size, step, micro_step, accumulation, seed)
        if rows is None:
            rows = np.arange(batch_size)
        x, y, *documents = self.items(index[rows])
        if self.learned is None:
            return x, y
        import torch
        # of each row, over the micro-batches of the step, (batch_size,)
        targets = sum(self.learned[self.index(batch_size, step, i, accumulation, seed)]
                      for i in range(accumulation))
        of_heads = targets.reshape(-1, heads).sum(0).clip(min=1)
        of_rows = of_heads[np.asarray(rows) % heads]  # row j is of head j % heads
        targets = torch.from_numpy(len(rows) * heads * of_rows).double()
        return x, y, accumulation * batch_size / targets, *documents


def packed(lengths, block_size):
    """Packs documents in order into rows, as many as fit into each. Returns each row's first
    document, then the number of documents, (rows + 1,). lengths (documents,): <= block_size."""
    ends = np.cumsum(lengths)
    begins, filled = [0], 0
    while begins[-1] < len(lengths):
        last = int(np.searchsorted(ends, filled + block_size, 'right'))
        begins.append(last)
        filled = int(ends[last - 1])
    return np.array(begins)


class Tokens(Split):
    """The windows of one split: runs of `block_size` tokens that do not overlap, each in one shard.

    `meta` is meta.json, `vocab_size` its vocabulary, `num_windows` the number of windows. Batches
    are inputs and targets (rows, block_size), int64. Targets in prompts are -100, and batches then
    have weights (rows,) for model.language_loss, too. documents=True: windows hold whole documents
    in order, which do not see each other; batches have weights and, last, the document of each
    token. None: True where there are prompts. DataError: a file is broken or missing, or block_size
    is longer than the data."""

    def __init__(self, name, split, block_size, data_dir='data', documents=None):
        super().__init__(name, split, 'tokens', data_dir)
        self.split, self.vocab_size, self.block_size = split, self.meta['vocab_size'], block_size
        has_starts, prompts = self.meta.get('starts', False), self.meta.get('prompts', False)
        self.documents = has_starts and prompts if documents is None else documents
        if self.documents and not has_starts:
            raise DataError(f"documents=True, but data set '{name}' does not say where its "
                            'documents begin: prepare it with --documents')
        if self.documents:
            self.pack()
            return
        longest = max(map(len, self.shards)) - 1
        if block_size > longest:
            raise DataError(f"block_size {block_size} is longer than the '{split}' data of "
                            f"'{name}': set block_size to {longest} or less")
        # views (windows, block_size + 1): a window ends with the first token of the next one
        self.windows = [sliding_window_view(shard, block_size + 1)[::block_size]
                        for shard in self.shards if len(shard) > block_size]
        self.first = np.cumsum([0, *map(len, self.windows)])
        self.num_windows = len(self)
        if prompts:
            targets = [(shard[:, 1:] < PROMPT).sum(1) for shard in self.windows]
            self.learned = np.concatenate(targets)

    def pack(self):
        """Makes windows of whole documents. A document that is too long is cut at its end if it has
        a prompt; otherwise it is split, and each part is a document of its own."""
        self.windows, self.first, learned, cut, lost = [], [0], [], 0, 0
        for shard in self.shards:
            begins = np.flatnonzero(shard & FIRST)
            begins = np.union1d(begins, [0])  # a long text may go on from another shard
            ends = np.append(begins[1:], len(shard))
            is_cut = (shard[begins] & PROMPT > 0) & (ends - begins > self.block_size + 1)
            cut += int(is_cut.sum())
            ends = np.where(is_cut, begins + self.block_size + 1, ends)
            parts = [np.arange(a, b - 1, self.block_size) for a, b in zip(begins, ends)]
            last = np.repeat(ends, [*map(len, parts)])
            begins = np.concatenate([*parts, []]).astype(np.int64)
            ends = np.minimum(last, begins + self.block_size + 1)
            before = np.zeros(len(shard) + 1, np.uint32)  # how many targets lie before a token
            np.cumsum(shard < PROMPT, out=before[1:])
            targets = before[ends] - before[np.minimum(begins + 1, ends)].astype(np.int64)
            lost += int((targets == 0).sum())
            begins, ends, targets = (x[targets > 0] for x in (begins, ends, targets))
            rows = packed(ends - begins - 1, self.block_size)
            self.windows.append((begins, ends, rows))
            self.first.append(self.first[-1] + len(rows) - 1)
            learned.append(np.add.reduceat(targets, rows[:-1]) if len(targets) else targets)
        self.first = np.array(self.first)
        self.learned, self.num_windows = np.concatenate(learned), len(self)
        if not self.num_windows:
            raise DataError(f"the '{self.split}' data of '{self.folder.name}' have no document "
                            f'with a target among its first {self.block_size + 1} tokens: raise '
                            'block_size, or set documents=False')
        filled = sum(int((ends - begins - 1).sum()) for begins, ends, _ in self.windows)
        padding = 1 - filled / (self.num_windows * self.block_size)
        kept = self.learned.sum() / sum(int((shard < PROMPT).sum()) for shard in self.shards)
        documents = sum(len(begins) for begins, _, _ in self.windows)
        if os.environ.get('LOCAL_RANK', '0') != '0':
            return
        print(f'{self.split}: {documents:,} documents in {self.num_windows:,} rows of '
              f'{self.block_size}, {padding:.0%} padding, {cut:,} cut, of {lost:,} no target is '
              f'left: {kept:.0%} of what is to be learned')

    def rows_of_documents(self, index):
        """Tokens (rows, 2, block_size), inputs and targets with their bits, and the document of
        each token (rows, block_size)."""
        tokens = np.full((len(index), 2, self.block_size), PROMPT, np.int64)  # padding: no target
        documents = np.full((len(index), self.block_size), -1)
        shards = np.searchsorted(self.first, index, 'right') - 1
        for row, (i, j) in enumerate(zip(shards.tolist(), (index - self.first[shards]).tolist())):
            begins, ends, rows = self.windows[i]
            place = 0
            for document in range(rows[j], rows[j + 1]):
                text = self.shards[i][begins[document]:ends[document]]
                here = slice(place, place + len(text) - 1)
                tokens[row, 0, here], tokens[row, 1, here] = text[:-1], text[1:]
                documents[row, here] = document - rows[j]
                place = here.stop
        return tokens, documents

    @cached_property
    def tokens_per_byte(self):
        """The number of tokens outside prompts for each byte of their text."""
        tokens = self.meta['tokens'][self.split]
        if self.learned is not None:
            tokens = sum(int((shard < PROMPT).sum()) for shard in self.shards)
        return tokens / max(1, self.meta.get('bytes', {}).get(self.split, 0))

    def items(self, index):
        import torch
        documents = ()
        if self.documents:
            tokens, of_tokens = self.rows_of_documents(index)
            x, y = tokens[:, 0].copy(), tokens[:, 1].copy()
            documents = torch.from_numpy(of_tokens),
        else:
            tokens = self.gather(self.windows, index)  # (rows, block_size + 1)
            x, y = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        if tokens.dtype.itemsize > 2:
            x &= FIRST - 1
            y = np.where(y < PROMPT, y & FIRST - 1, -100)
        self.need_below(self.vocab_size, np.maximum(x, y), 'token')
        return torch.from_numpy(x), torch.from_numpy(y), *documents

    def fixed_batch(self, index, count, batch_size, rank=0, world_size=1):
        """Returns rows rank::world_size of batch `index` of `count` for evaluation; the batches are
        spread evenly over the split. If there are weights (see `batch`), the mean of the weighted
        losses over batches and ranks is the mean over all targets of these batches."""
        import torch
        assert batch_size % world_size == 0, (batch_size, world_size)
        # of all batches
        windows = np.arange(count * batch_size) * self.num_windows // (count * batch_size)
        x, y, *documents = self.items(windows.reshape(count, batch_size)[index, rank::world_size])
        if self.learned is None:
            return x, y
        targets = torch.tensor(self.learned[windows].sum().clip(min=1)).double()
        return x, y, (count * world_size / targets).expand(len(y)), *documents


class Images(Split):
    """The images of one split, 'train', 'val' or 'test'; len() is their number.

    `meta` is meta.json, `classes` the names of the `num_classes` classes, `task` medmnist's word
    for it, `size` the pixels of a side, `channels` 1 or 3. Batches are images (rows, channels,
    size, size), uint8, and labels, int64 (rows,), or float32 (rows, num_classes) if images have
    several. Errors as for Tokens."""

    def __init__(self, name, split, data_dir='data'):
        super().__init__(name, split, 'images', data_dir)
        keys = 'classes', 'task', 'size', 'channels'
        self.classes, self.task, self.size, self.channels = map(self.meta.get, keys)
        self.num_classes = len(self.classes)
        self.first = np.cumsum([0, *map(len, self.shards)])

    def items(self, index):
        import torch
        images = self.gather([shard['image'] for shard in self.shards], index)
        labels = self.gather([shard['label'] for shard in self.shards], index)
        several = labels.shape[1] > 1
        self.need_below(2 if several else self.num_classes, labels, 'label')
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
        return images, labels.float() if several else labels[:, 0].long()

    def fixed_batch(self, index, batch_size, rank=0, world_size=1):
        """For evaluation: rows rank::world_size of batch `index`, in the order of the split.

        Batches 0 to ceil(len / batch_size) - 1 hold each image once, over all ranks. The last one
        may be short: a rank may have one row less than another there, or none."""
        end = min((index + 1) * batch_size, len(self))
        return self.items(np.arange(index * batch_size + rank, end, world_size))


# -----------------------------------------------------------------------------
# command line

class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one sentence, without the usage
        raise DataError(f'{message} (python {self.prog} --help)')


def number(word):
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f'give at least 1, not {word}')
    return int(word)


def folder_name(word):
    if word in ('', '.', '..') or Path(word).name != word:
        raise argparse.ArgumentTypeError(f"give the name of a folder in --data_dir, not '{word}'")
    return word


OPTIONS = {  # {option and what it takes: keywords of argparse's add_argument}
    '--input FILE': dict(nargs='+', required=True, help='.txt (one document), .jsonl (one a line), '
                                                        '.parquet (one a row)'),
    '--input FOLDER': dict(required=True, help='with a folder for each class'),
    '--path FOLDER': dict(help='with the files; those of the hub are then not downloaded'),
    '--size N': dict(type=number, default=224, help='pixels of a side (224)'),
    '--size OF_MEDMNIST': dict(type=int, choices=[28, 64, 128, 224], default=28,
                               help='pixels of a side: 28, 64, 128 or 224 (28)'),
    '--tokenizer WHICH': dict(help='gpt2, bytes, or a folder or a name of the hub with a '
                                   'tokenizer.json (gpt2, of stdlib bytes)'),
    '--documents': dict(action='store_true', help='mark where documents begin, for documents=True '
                                                  '(prompts and chats have it anyway)'),
    '--tokens N': dict(type=number, help='end when the training split has so many'),
    '--shard_tokens N': dict(type=number, default=10**8, help='of a shard (100_000_000)'),
    '--shard_bytes N': dict(type=number, default=10**9, help='of a shard (1_000_000_000)'),
    '--name NAME': dict(type=folder_name, help='of the folder (the same, with _SIZE unless 28)'),
    '--data_dir FOLDER': dict(default='data', help='of all data sets (data)')}


def options_of(data):
    """Those of OPTIONS that go with a data set. Others are refused."""
    if data in SOURCES:
        return (*SOURCES[data].options, '--tokenizer WHICH', '--documents', '--tokens N',
                '--shard_tokens N')
    if data in DIGITS:
        return '--shard_bytes N',
    if data == 'images':
        return '--input FOLDER', '--size N', '--shard_bytes N'
    return '--path FOLDER', '--size OF_MEDMNIST', '--shard_bytes N'


def arguments(argv):
    """The command line, parsed; `data` is its first word. DataError: a mistake in it."""
    data, *words = argv or ['--help']
    names = [*SOURCES, *DIGITS, 'images', 'verify']
    if data not in names:  # only then, because it reads a file
        names += [flag for flag in medmnist_info() if not flag.endswith('3d')]
    if data in ('-h', '--help'):
        print(f"{__doc__}\nDATA: {', '.join(names)}; `prepare.py DATA --help` shows its options")
        raise SystemExit(0)
    if data not in names:
        nearest = difflib.get_close_matches(data.lower(), names, 1, 0)[0]
        raise DataError(f"'{data}' is no data set: did you mean '{nearest}'? (python prepare.py "
                        '--help)')
    # a parser for this data set alone, so that `prepare.py c4 --help` shows what goes with c4
    parser = Parser(f'prepare.py {data}', allow_abbrev=False)
    options = '--data_dir FOLDER',
    if data == 'verify':
        parser.add_argument('folder', type=folder_name, help='in --data_dir')
    else:
        parser.add_argument('--overwrite', action='store_true', help='what is there already')
        options = *options_of(data), '--name NAME', *options
    for option in options:
        flag, *metavar = option.split()
        takes = {'metavar': metavar[0]} if metavar else {}
        parser.add_argument(flag, **takes, **OPTIONS[option])
    return parser.parse_args(words, argparse.Namespace(data=data))


def from_text(args):
    """Returns for text (the data set's usual name, its settings, the `fill` of `write`)."""
    source = SOURCES[args.data]
    what, val_share = source.describe(args)
    encoding = tokenizer(args.tokenizer or source.tokenizer)
    settings = {
        'source': what, 'tokenizer': encoding.name, 'shard_tokens': args.shard_tokens,
        'limit': args.tokens, 'vocab_size': encoding.n_vocab, 'eot': encoding.eot_token}
    if args.documents:
        settings['starts'] = True
    template = encoding.folder and chat_template(encoding.folder)
    may_be_chats = any(path.endswith('.jsonl') for path in getattr(args, 'input', None) or ())
    if template and may_be_chats:  # another one would spell them otherwise
        settings['template'] = f'{hash_of(template.encode()):016x}'
    if encoding.puts_space:
        print('these tokens put a space before every text: before completions, too, as when a '
              'model answers, and before the pieces in which a long .txt is read')
    documents = partial(source.documents, args)
    return args.data, settings, partial(write_tokens, documents=documents, encoding=encoding,
                                        val_share=val_share)


def from_images(args):
    """Returns the same as `from_text`, for images."""
    name, size = args.data, getattr(args, 'size', 32)
    channels, task = 3, 'multi-class'
    if name in DIGITS:
        source, classes = f'load_digits of scikit-learn, as {name}', [*'0123456789']
        images = digit_images(shifted=name == 'digits_shifted')
    elif name == 'images':
        found = pictures_of(args.input)
        classes, files = [*found], sum(found.values(), [])
        sizes = {str(path.relative_to(args.input)): path.stat().st_size for _, path, _ in files}
        names = hash_of(repr(sizes).encode())
        source = (f'{len(files)} pictures of {Path(args.input).resolve().name} '
                  f'({sum(sizes.values())} bytes, names {names:016x})')
        images = picture_images(found, size)
    else:
        info = medmnist_info()[name]
        channels, task, classes = info['n_channels'], info['task'], [*info['label'].values()]
        suffix = '' if size == 28 else f'_{size}'
        name, source = name + suffix, info[f'url{suffix}']  # as MedMNIST names its files
        path = Path(args.path or args.data_dir, f'{name}.npz')
        if args.path:
            with reading(f"'{path}' is missing", "--path is a folder with MedMNIST's archives"):
                source = f'{path.name} ({path.stat().st_size} bytes)'
        images = medmnist_images(path, size, info)
    settings = {
        'source': source, 'kind': 'images', 'size': size, 'channels': channels, 'classes': classes,
        'task': task, 'shard_bytes': args.shard_bytes}
    return name, settings, partial(write_images, images=images)


def verify(folder):
    """Compares each shard of a data set with its checksum. DataError: one differs."""
    if not (folder / 'meta.json').is_file():
        raise DataError(f"'{folder}' holds no data set: check its name, and --data_dir")
    meta = read_meta(folder / 'meta.json')
    open_shards(folder, meta, meta['shards'], verify=True)
    print(f"'{folder}': {len(meta['shards'])} shards are as they were written")


def main(argv):
    """Prepares a data set, see `write`, or verifies one. DataError: a mistake."""
    args = arguments(argv)
    if args.data == 'verify':
        return verify(Path(args.data_dir, args.folder))
    prepared = from_text if args.data in SOURCES else from_images
    name, settings, fill = prepared(args)
    write(Path(args.data_dir, args.name or name), settings, fill, args.overwrite)


if __name__ == '__main__':
    sys.excepthook = in_one_line  # of Ctrl-C
    with refusals():
        main(sys.argv[1:])
