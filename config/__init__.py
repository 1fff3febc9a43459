"""
Reads and checks settings; prints mistakes in one sentence; writes small files. Nothing here imports
torch, so that a mistake is answered at once.

Settings are the plain global names at the top of a script. `python train_x.py config/y.py
config/methods/z.py --key=value` runs the files, which see the script's defaults; a value on the
command line wins.
"""

import ast
import builtins
import contextlib
import difflib
import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock, Timeout

BOOLS = 'True', 'False'
PLAIN = type(None), bool, int, float, str, tuple  # what a setting may be
METHODS = Path(__file__).parent / 'methods'
LINE = '# ' + '-' * 77 + '\n'  # above and below the settings of a script

# -----------------------------------------------------------------------------
# mistakes: one sentence, exit code 2


def fail(sentence):
    """Prints what is wrong and what to do, and ends the process with exit code 2. Other ranks of a
    machine wait a second first: if the first rank failed, too, torchrun ends them in that time, and
    the sentence is printed only once."""
    who = ''
    if os.environ.get('LOCAL_RANK', '0') != '0':
        who = f" (rank {os.environ['RANK']})"
        time.sleep(1)
    print(f'error{who}: {sentence}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def said(error):
    """What an error says, or its kind if it says nothing, in a line of bounded length."""
    words = ' '.join(str(error).split()) or type(error).__name__
    return words if len(words) <= 160 else f'{words[:157]}...'


def in_one_line(kind, error, trace):
    """Prints Ctrl-C, full memory, errors of the disk and a lost rank in one line; it is for
    sys.excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    elif issubclass(kind, OSError) and error.filename:
        print(f"error: '{error.filename}' cannot be read or written ({error.strerror}): what was "
              'saved before stands', file=sys.stderr)
    elif kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(error):
        print('error: memory is full. What fits, without a GPU: python bench.py memory with '
              f'config files ({said(error)})', file=sys.stderr)
    elif 'gloo' in str(error) and 'by peer' in str(error):  # closed or reset
        print('error: another rank has ended: see what it said', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def refusals():
    """Calls `fail` if a function (by `raise ValueError`) or the disk (OSError) refuses something
    while a run is set up. A ValueError that no function raises is a mistake in code, and keeps its
    traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        if isinstance(error, (OSError, UnicodeError)) or (line or '').startswith('raise'):
            fail(str(error))
        raise


# -----------------------------------------------------------------------------
# settings


def defaults(namespace):
    """The settings of a script: every plain global defined so far."""
    return {key: value for key, value in namespace.items()
            if not key.startswith('_') and isinstance(value, PLAIN)}


def load(namespace, known, argv):
    """
    Resolves the settings of a script, checks them and returns them as a dict.

    namespace: its globals(); known: its `defaults`; argv: config files and --key=value, in any
    order. A file in a folder called methods is a method ('full' without one). A value that is a
    dict is a table by method, such as learning_rate = {'full': 1e-3, 'galore': 1e-2}; two of one
    key are merged. Files run in their order, and each sees the plain values of those before it. Who
    wins, the strongest first: the command line, tables, plain values (the last file's), defaults.
    """
    sys.excepthook = in_one_line
    if not {'-h', '--help'}.isdisjoint(argv):
        show_help(namespace)
        raise SystemExit(0)
    argv, words = [], argv
    for word, following in zip(words, [*words[1:], '']):
        if word[:2] == '--' and type_of(known, word[2:]) is bool and following not in BOOLS:
            word = f'{word}=True'
        argv.append(word)
    for word, following in zip(argv, [*argv[1:], '']):
        if word.startswith('--') and '=' not in word:
            value = 'value'
            if following and not following.startswith('--') and not following.endswith('.py'):
                value = following
            fail(f"'{word}' has no value: write {word}={value}")
    paths = [word for word in argv if not word.startswith('--')]
    methods = [Path(path).stem for path in paths if Path(path).absolute().parent.name == 'methods']
    if len(methods) > 1:
        fail(f"{' and '.join(methods)} are two methods: give one file of config/methods")
    method = (methods or ['full'])[0]
    plain, tables = read_files(paths, known, namespace, method)
    chosen = {key: table[method] for key, table in tables.items() if method in table}
    typed_in = read_words([word for word in argv if word.startswith('--')], known)

    found = {**plain, **chosen, **typed_in}  # {key: (value, where it stands)}
    settings = {**known, **{key: value for key, (value, _) in found.items()}}
    is_first = os.environ.get('LOCAL_RANK', '0') == '0'
    from_tables = [f'{key}={value!r}' for key, (value, _) in chosen.items() if key not in typed_in]
    if from_tables and is_first:
        print(f"of the tables for {method}: {', '.join(from_tables)}")
    s = check(settings, known, {key: where for key, (_, where) in found.items()})
    # a method that says nothing of lowrank has none
    lacking = [key for key in tables
               if key not in found and key != 'lowrank' and not without_effect(key, s)]
    if lacking:
        given = {}  # keys by what is said of them
        for key in lacking:
            *_, (_, where) = tables[key].values()
            given.setdefault(f"{where} for {', '.join(tables[key])}", []).append(key)
        said = '; '.join(f"{', '.join(keys)} {words}" for words, keys in given.items())
        fail(f'there are values of {said}, and not for the method {method!r}: add them there, or '
             f"set --{'=, --'.join(lacking)}=")
    if method == 'full' and 'learning_rate' in chosen and 'learning_rate' not in typed_in \
            and (settings['lowrank'] or settings['optimizer'] != 'adamw'):
        fail(f"learning_rate {chosen['learning_rate'][1]} is that of full rank, and this run is "
             'not: give a file of a folder called methods, or set --learning_rate=')
    trains = 'learning_rate' in known and not settings.get('eval_only')
    if method != 'full' and trains and 'learning_rate' not in found and is_first:
        print(f"learning_rate={settings['learning_rate']:g} is the script's own, for full rank: "
              f'set one for {method}')
    if settings.get('min_lr', 0) is None:
        settings['min_lr'] = settings['learning_rate'] / 10
    return settings


def read_files(paths, known, namespace, method):
    """What config files set: plain values {key: (value, where)}, and tables {key: {method: (value,
    where)}}."""
    plain, tables = {}, {}
    for path in paths:
        seen = {**known, **{key: value for key, (value, _) in plain.items()}}
        for key, value in run_file(path, seen, namespace).items():
            where = f'in {path}'
            if not isinstance(value, dict):
                value = checked(known, key, value, where)
                say_if_replaced(key, plain.get(key), value, path)
                plain[key] = value, where
                continue
            if not value:
                fail(f'{key} {where} is a table by method without an entry: add one')
            table = tables.setdefault(key, {})
            for name, entry in value.items():
                if name not in (*method_names(), method):
                    near = nearest(str(name), method_names())
                    fail(f"{key} in {path} is given for '{name}', no file of config/methods: did "
                         f"you mean '{near}'?")
                entry = checked(known, key, entry, f'for {name} in {path}')
                if name == method:
                    say_if_replaced(key, table.get(name), entry, path)
                table[name] = entry, where
    return plain, tables


def read_words(words, known):
    """What a command line sets by --key=value: {key: (value, where)}."""
    found = {}
    for word in words:
        key, _, text = word[2:].partition('=')
        value = text  # where it is no Python literal
        if isinstance(known.get(key), str):
            quoted = re.fullmatch(r"""(['"])([^'"\\]*)\1""", text)
            value = quoted[2] if quoted else text
        else:
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                value = ast.literal_eval(text)
        where = 'on the command line'
        found[key] = checked(known, key, value, where), where
    return found


def say_if_replaced(key, old, value, path):
    """Tells once a machine that a file sets a key to another value than one before it."""
    if old is not None and old[0] != value and os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{key}={value!r} in {path} takes the place of {old[0]!r} {old[1]}')


def run_file(path, seen, namespace):
    """What a config file sets, {key: value}. It can compute with the settings that it sees."""
    if not os.path.isfile(path):
        near = nearest(path, ['config/quickstart.py', *map(str, Path(path).parent.glob('*.py'))])
        fail(f"config file '{path}' is not there: did you mean '{near}', or --key=value with a "
             "'='?")
    if not path.endswith('.py'):
        fail(f"'{path}' is no config file (.py): give one of config, or --key=value")
    scope = {'__builtins__': {**vars(builtins), **seen}}  # beside these it holds what the file sets
    try:
        text = Path(path).read_text('utf-8')
        exec(compile(text, path, 'exec'), scope)
    except (Exception, SystemExit) as error:  # it is the user's program, and may fail in any way
        fail(f"config file '{path}' does not run ({type(error).__name__}: {error}): correct it")
    header = ''.join(line for line in text.splitlines(True) if line.startswith('#'))
    scripts = re.findall(r'\btrain_\w+\.py', header)
    script = os.path.basename(namespace.get('__file__', ''))
    if scripts and script.startswith('train_') and script not in scripts:
        fail(f"config file '{path}' is one of {scripts[0]}: run that, or give a file of {script}")
    # functions, modules and lists only help to compute, and so does what starts with an underscore
    return {key: value for key, value in scope.items() if not key.startswith('_')
            and (key in seen or isinstance(value, PLAIN) or isinstance(value, dict) and value)}


def type_of(known, key):
    """Returns the type of a setting: that of its default, or, where the default is None (the value
    is worked out later), the one named here."""
    if known.get(key, '') is None:
        return {'min_lr': float, 'documents': bool, 'compile': bool}.get(key, int)
    return type(known.get(key))


def checked(known, key, value, where):
    """A value for a key, whose type is that of its default (an integer may stand for a float)."""
    if key not in known:
        fail(f"unknown setting '{key}' {where}: did you mean '{nearest(key, known)}'?")
    wanted, seen = type_of(known, key), type(value)
    if known[key] is None and value is None:
        return None
    if wanted is float and seen is int:
        value, seen = float(str(value)), float  # inf, and not an error, where it is too large
    if wanted is not seen:
        example = wanted(1) if known[key] is None else known[key]
        fail(f'setting {key}={repr(value)[:80]} {where} is of type {seen.__name__}, but '
             f'{wanted.__name__} is needed, such as {example!r}')
    if seen is float and not math.isfinite(value):
        fail(f'setting {key}={value} {where} is no number to compute with')
    return value


def method_names():
    return sorted(path.stem for path in METHODS.glob('*.py'))


def nearest(word, words):
    return difflib.get_close_matches(word, words, n=1, cutoff=0)[0]


def show_help(namespace):
    """Prints a script's docstring, the methods, and its settings with their comments."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head
    block = Path(namespace['__file__']).read_text('utf-8').split(LINE)[1]
    words = f"Methods: config/methods/NAME.py, NAME one of {', '.join(method_names())}"
    print(namespace['__doc__'].strip(), words, block.strip(), sep='\n\n')


# -----------------------------------------------------------------------------
# checks of settings: tables. s: the settings by name, with those of other scripts, and
# s.ranks, s.vit, s.uses: see `check`

LEAST = dict.fromkeys((
    'eval_interval', 'eval_iters', 'log_interval', 'batch_size', 'gradient_accumulation_steps',
    'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_mlp', 'vocab_size', 'img_size',
    'patch_size', 'heads', 'rank', 'basis_every', 'num_samples', 'max_new_tokens'), 1)
LEAST |= dict.fromkeys((
    'seed', 'dropout', 'lora_dropout', 'learning_rate', 'min_lr', 'max_iters', 'epochs',
    'warmup_iters', 'rewarm_iters', 'merge_every', 'scale', 'momentum', 'weight_decay', 'beta1',
    'beta2', 'grad_clip', 'top_k', 'temperature'), 0)

# which settings act on an optimizer: 'rank', as it projects full gradients; 'basis', as it steps in
# that of a layer; 'momentum', the setting of this name; set(): none. A new rule is a new row
USES = {
    'adamw': {'basis'}, 'galore': {'rank'}, 'fira': {'rank'}, 'apollo': {'rank'}, 'scale': set(),
    'muon': {'basis', 'momentum'}}

CHOICES = dict(
    optimizer=tuple(USES),
    factors=('both', 'B', 'basis'), train=('auto', 'all', 'factors', 'classifier'),
    sync=('step', 'merge'), basis=('sketch', 'power', 'svd', 'random'),
    frozen_bits=(None, 4), param_bits=(None, 8), state_bits=(None, 32, 16, 8),
    sync_bits=(32, 8, 4, 2),
    dtype=('auto', 'float32', 'bfloat16', 'float16', 'float64'),
    param_dtype=('float32', 'bfloat16', 'float64'),
    augment=('', 'flip', 'crop', 'flip,crop', 'crop,flip'))

# A setting that does nothing beside the others is refused: (settings, when they do something, why
# they do not and what to set)
EFFECT = (
    ('heads factors split frozen_bits param_bits', lambda s: s.lowrank,
     "there are no low-rank layers: set lowrank='attn,mlp'"),
    ('alpha merge_reset lora_dropout', lambda s: s.lowrank and s.factors != 'basis',
     "it is for heads whose factors are not a basis: set lowrank, and factors='both' or 'B'"),
    ('rank', lambda s: s.lowrank or 'rank' in s.uses,
     "nothing has a low rank: set lowrank='attn,mlp'"),
    ('merge_every', lambda s: s.lowrank or s.sync == 'merge',
     "there are no heads to merge: set lowrank='attn,mlp', or sync='merge' to average whole "
     'weights'),
    ('rewarm_iters', lambda s: s.merge_reset,
     'it is for merges that reset: set merge_reset=True'),
    ('sync_moments', lambda s: s.lowrank and s.factors == 'basis' and s.merge_every > 1
     and s.heads > 1 and ('momentum' not in s.uses or s.momentum),
     "no heads have moments to average: set factors='basis', several heads, merge_every above 1, "
     'and for Muon a momentum'),
    ('sync_bits', lambda s: s.sync == 'merge' or s.split and s.heads > 1,
     "merges average nothing: take config/methods/galolte.py, or set sync='merge'"),
    ('basis basis_every scale', lambda s: s.lowrank and s.factors == 'basis' or 'rank' in s.uses,
     "no basis is taken: set lowrank and factors='basis', as config/methods/galore.py does"),
    ('momentum', lambda s: 'momentum' in s.uses,
     "it is Muon's: set optimizer='muon'"),
    ('max_iters', lambda s: not s.epochs,
     'epochs says how many steps there are: set epochs=0'),
    ('size n_layer n_head n_embd n_mlp n_kv_head bias vocab_size',
     lambda s: s.vit or s.init_from in ('auto', 'scratch', 'resume'),
     "loaded weights have a shape of their own: set init_from='scratch'"),
    ('n_layer n_head n_embd', lambda s: not s.vit or s.init_from != 'pretrained',
     "timm's weights have a shape of their own: set init_from='scratch'"))

# Settings that make no sense together: (test, sentence). EFFECT is checked before: where factors,
# split or merge_reset are set there are low-rank layers. What a layer, an optimizer or
# ranks.rows_of refuses itself is not checked here again
CHECKS = (
    (lambda s: s.dropout >= 1, 'dropout={dropout} has to be below 1: lower it'),
    (lambda s: s.seed >= 2**62, 'seed={seed} is too large: set one below 2**62'),
    (lambda s: s.dtype not in ('auto', s.param_dtype)
     and not (s.param_dtype == 'float32' and s.dtype in ('bfloat16', 'float16')),
     'dtype={dtype!r} does not go with param_dtype={param_dtype!r}: set the same, or 16 bits '
     'beside float32'),
    # heads
    (lambda s: s.lowrank and s.optimizer != 'adamw'
     and (s.factors != 'basis' or 'basis' not in s.uses),
     "optimizer={optimizer!r} is for full-rank weights: set lowrank='', or optimizer='adamw' (in a "
     "basis 'muon', too)"),
    (lambda s: s.merge_reset and s.rewarm_iters >= s.merge_every,
     'merge_reset=True needs merges, and rewarm_iters={rewarm_iters} an end before the next one: '
     'set merge_every={merge_every} above that, or merge_reset=False'),
    (lambda s: s.split and s.heads > 1 and not s.merge_every,
     'split heads that never merge train models that never meet: set merge_every, or split=False'),
    (lambda s: s.lowrank and s.factors != 'basis' and s.merge_every and not s.merge_reset
     and not (s.split and s.heads > 1),
     'merging one head, or heads that see the same tokens, changes nothing: set merge_reset=True '
     '(ReLoRA), or split=True and several heads (LTE)'),
    (lambda s: s.sync == 'merge' and s.ranks == 1,
     "sync='merge' averages what several ranks train, and here is one: start it with torchrun "
     '--nproc_per_node=2, or more'),
    (lambda s: s.sync == 'merge' and not ((s.split or not s.lowrank) and s.merge_every),
     "sync='merge' averages at merges, beside split heads or without any: set merge_every, and "
     "with lowrank split=True, or set sync='step'"),
    (lambda s: s.sync == 'merge' and 'rank' in s.uses and s.basis != 'random',
     "sync='merge' averages weights, and each rank would have other bases: set another optimizer "
     "than {optimizer!r}, such as 'adamw', or basis='random'"),
    (lambda s: s.sync_bits < 32 and s.lowrank and s.factors != 'basis',
     'sync_bits={sync_bits} is for heads in a basis and for whole weights: set sync_bits=32, or '
     'take config/methods/galolte_2bit.py or local_muon.py'),
    # what trains
    (lambda s: s.frozen_bits and (s.init_from in ('scratch', 'auto') or s.train == 'all'),
     "frozen_bits={frozen_bits} is for loaded weights that stay, init_from={init_from!r} and "
     "train={train!r}: set init_from to a model, and train='auto', or frozen_bits=None"),
    (lambda s: s.train == 'classifier' and not s.vit,
     "train='classifier' is for images: set 'auto', 'all' or 'factors'"),
    # the log
    (lambda s: s.wandb_log and s.eval_only,
     'eval_only=True writes no run to wandb: set wandb_log=False'),
    (lambda s: s.wandb_log and not is_installed('wandb'),
     'wandb_log=True needs wandb: pip install wandb, or set wandb_log=False'),
    # the optimizer
    (lambda s: (s.min_lr or 0) > s.learning_rate,
     'the learning rate would rise from {learning_rate} to min_lr={min_lr}: set a min_lr below it'),
    (lambda s: s.per_layer and s.grad_clip,
     'per_layer=True steps before there is a norm of all gradients: set grad_clip=0.0, not '
     '{grad_clip}'),
    (lambda s: s.per_layer and s.dtype == 'float16',
     'per_layer=True steps before a GradScaler has seen all gradients: set another dtype than '
     "'float16'"),
    (lambda s: s.per_layer and s.sync == 'merge',
     "per_layer=True averages each gradient over ranks, and sync='merge' none: set sync='step'"),
    (lambda s: s.shard and (s.sync == 'merge' or s.per_layer),
     "shard=True gives ranks parts of common weights, on which all step at once: set sync='step' "
     'and per_layer=False, or shard=False'),
    (lambda s: s.shard and s.ranks > 1 and ('rank' in s.uses or s.optimizer == 'scale'),
     'optimizer={optimizer!r} wants columns of whole gradients, of which shards hold rows: take '
     'config/methods/galore.py or muon.py, or set shard=False'),
    (lambda s: s.shard and s.split and s.ranks > 1 and s.dtype == 'float16',
     "a GradScaler takes either shards or whole heads: set another dtype than 'float16', or "
     'shard=False'))


def is_installed(package):
    """Whether a package is there; a folder of that name, as wandb leaves one, is none."""
    return getattr(importlib.util.find_spec(package), 'origin', None) is not None


def check(settings, known, given):
    """
    Ends the process where settings make no sense, alone or together.

    given: {key: where it was set}. Returns the settings as attributes, with dropout and epochs if a
    script has none, vit (whether it is for images), uses (of USES), ranks (of torchrun).
    """
    for key, least in LEAST.items():
        if settings.get(key) is not None and not settings[key] >= least:  # nor nan
            fail(f'{key}={settings[key]} makes no sense: set at least {least}')
    for key in ('out_dir', 'data_dir', 'dataset'):
        if settings.get(key) == '':
            fail(f"{key}='' names nothing: set --{key}={known[key]}")
    for key, allowed in CHOICES.items():
        if key in settings and settings[key] not in allowed:
            fail(f'{key}={repr(settings[key])[:80]} is not known: set one of '
                 f"{', '.join(map(repr, allowed))}")
    uses = USES.get(settings.get('optimizer'), ())
    s = SimpleNamespace(**{'dropout': 0.0, 'epochs': 0, **settings}, vit='epochs' in settings,
                        uses=uses, ranks=int(os.environ.get('WORLD_SIZE', 1)))
    if 'lowrank' not in settings:  # sample.py, export.py
        return s
    for key, where in given.items():
        if settings[key] != known[key] and (words := without_effect(key, s)):
            fail(f'{key}={settings[key]!r} {where} has no effect: {words}, or leave {key} out')
    for wrong, sentence in CHECKS:
        if wrong(s):
            fail(sentence.format(**vars(s)))
    return s


def without_effect(key, s):
    """Why a setting does nothing beside the others, or None."""
    for keys, acts, words in EFFECT:
        if key in keys.split() and not acts(s):
            return words


# -----------------------------------------------------------------------------
# small files


@contextlib.contextmanager
def replacing(path):
    """Yields a new file to write bytes to, which replaces `path` when all is written. A crash or a
    power cut leaves the old file or the new one, whole. OSError: the disk refuses, and the old file
    stays."""
    temporary = f'{path}.{os.urandom(4).hex()}.tmp'
    try:
        with open(temporary, 'xb') as file:  # a new one: never somebody's, nor through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError):
            error.filename = error.filename or path
        raise
    sync_folder(os.path.dirname(path) or '.')


def sync_folder(path):
    """Waits until the names in a folder, which renames change, are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def locked(path):
    """The lock of a file, until it is released or this process ends; None: another one has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"warning: the disk of '{path}' knows no locks: start no second command there",
              file=sys.stderr)
    return lock


@contextlib.contextmanager
def written_beside(folder, marker):
    """
    Yields a new folder (Path) to write into, which replaces `folder` when all is written.

    Until then it lies beside `folder` under a random name. Its file `marker` lists in the end all
    that was written; a lock file keeps a second command out. After a kill the old folder or the new
    one is whole: the next command removes the rest, or, if the kill came between the two renames,
    says which ones are whole. Without a marker nothing is removed or replaced. ValueError: another
    command is writing, a kill left no `folder`, or it has files that no marker lists.
    """
    folder = Path(os.path.realpath(folder))
    drawn = f'{folder.name}.{os.urandom(4).hex()}'
    writing, whole, old = (folder.with_name(f'{drawn}.{state}')
                           for state in ('writing', 'whole', 'old'))
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(folder.with_name(f'.{folder.name}.lock'))
    if lock is None:
        raise ValueError(f"another command is writing '{folder}': wait for it")
    try:
        refuse_foreign(folder, marker)
        remove_leftovers(folder, marker)
        writing.mkdir()
        (writing / marker).touch()
        yield writing
        (writing / marker).write_text('\n'.join(sorted(os.listdir(writing))), 'utf-8')
        sync_folder(writing)
        os.rename(writing, whole)
        if folder.exists():
            os.rename(folder, old)
        os.rename(whole, folder)
        sync_folder(folder.parent)
        if old.exists():
            remove_marked(old, marker)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        lock.release()


def refuse_foreign(folder, marker):
    """ValueError: a folder that is not empty has no marker, or files that the marker lacks."""
    names = set(os.listdir(folder)) if folder.exists() else set()
    if not names:
        return
    if marker not in names:
        raise ValueError(f"'{folder}' is there, and was not written by this command (it has no "
                         f'{marker}; older versions wrote none): choose another name, or remove it')
    ours = {*(folder / marker).read_text('utf-8').splitlines(), marker}
    if others := names - ours:
        raise ValueError(f"'{folder}' holds {min(others)}, which this command did not write, and "
                         'would remove: move it away')


def remove_leftovers(folder, marker):
    """Removes what killed commands have left beside a folder. ValueError: one of it is whole, and
    the folder itself is not there."""
    pattern = re.compile(re.escape(folder.name) + r'\.[0-9a-f]{8}\.(writing|whole|old)')
    left = [path for path in sorted(folder.parent.iterdir())
            if pattern.fullmatch(path.name) and (path / marker).is_file()]
    ages = {'.whole': 'new', '.old': 'old'}
    ready = [f'{path.name} is the {ages[path.suffix]} one' for path in left if path.suffix in ages]
    if ready and not folder.exists():
        raise ValueError(f"a command was killed while it replaced '{folder}'; whole beside it lie: "
                         f"{', '.join(ready)}. Rename the one you want to '{folder.name}', and "
                         'remove any other')
    for path in left:
        remove_marked(path, marker)


def remove_marked(path, marker):
    """Removes a folder, the marker last: a kill leaves something that is known as ours."""
    gone = path.with_suffix('.writing')  # from now on it is not whole
    os.rename(path, gone)
    for entry in gone.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != marker:
            entry.unlink()
    shutil.rmtree(gone)


def write_json(path, value):
    """Writes plain values as JSON, see `replacing`."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def typed(found, wanted, path):
    """Checks and returns a dict `found`, which others wrote into the file at `path`. wanted: {key:
    type} of the values that are used; a key may be missing, or its value None. ValueError: it is no
    dict, or a value has another type."""
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' is damaged, or something else than is wanted: restore it, or "
                         'fetch it again')
    for key, kind in wanted.items():
        value = found.get(key)
        right = isinstance(value, (int, float) if kind is float else kind)
        if value is not None and (not right or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"'{path}' says {key}={repr(value)[:80]}, which is no "
                             f'{kind.__name__}: restore it, or fetch it again')
    return found


def read_json(path, wanted=()):
    """The object in a JSON file, see `typed`. ValueError: it is damaged or something else."""
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
    except (ValueError, RecursionError):
        found = None
    return typed(found, dict(wanted), path)
