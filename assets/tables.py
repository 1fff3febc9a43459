"""
The tables of README.md, docs/results.md and docs/appendix.md, from the records in assets/*.jsonl
(and sentences of docs/study.md):

$ python assets/tables.py           # writes them into the pages
$ python assets/tables.py --check   # lists what differs, and fails if anything does

FACTS lists sentences that are checked, too. "How to read the tables" in docs/results.md explains
how methods are compared, and what the verdicts mean.
"""

import difflib
import math
import sys
from statistics import fmean

from scipy import stats

from measure import BENCHES, PARAMETERS, ROOT, kept, read_lines

TUNING = '1337'  # a seed
SMALL = 0.02  # nats: about what a better learning rate could still change at 80 bytes
NAMES = {
    'adamw': 'AdamW', 'muon': 'Muon', 'muon_lean': 'Muon without momentum',
    'muon_int8': 'Muon without momentum, 8-bit weights',
    'adamw_int8': 'AdamW, 8-bit weights and moments',
    'adafactor': 'Adafactor', 'adafactor_int8': 'Adafactor, 8-bit weights', 'galore': 'GaLore',
    'galore_muon': 'GaLore with Muon', 'galore_lean': 'GaLore, 8-bit moments',
    'galore_int8': 'GaLore, 8-bit weights', 'galolte': 'GaLoLTE, 4 workers',
    'galolte_2bit': 'GaLoLTE in 2 bits', 'lora': 'LoRA', 'mhlora': 'LoRA, 4 heads', 'lte': 'LTE',
    'relora': 'ReLoRA', 'local_adamw': 'AdamW, local SGD', 'local_muon': 'Muon, local SGD, 2 bits'}

# -----------------------------------------------------------------------------
# runs: records as flat dicts, which hold settings (strings) and results


def flat(record):
    """Returns a record with the settings of its cell beside its results."""
    if record.get('loss', 0.0) is None:
        record['loss'] = math.inf  # the training diverged
    return {**record, **record['cell']}


def pick(wanted):
    """
    Returns the runs of a file with some settings.

    wanted: such as 'twenty n_embd=96 rank=' for the runs of twenty.jsonl with a width of 96 and
    without a rank. The runs of a bench of measure.py are in the order of its grid.
    """
    name, *pairs = wanted.split()
    records = kept(name) if name in BENCHES else read_lines(ROOT / f'assets/{name}.jsonl')
    pairs = [pair.split('=') for pair in pairs]
    return [run for run in map(flat, records)
            if all(run.get(key, '') == value for key, value in pairs)]


def key_of(run):
    """Returns the settings of a run except for its seed and rate."""
    return {key: value for key, value in run['cell'].items()
            if key not in ('seed', 'learning_rate')}


def groups_of(runs):
    """Returns lists of the runs that differ only in seed and rate."""
    found = {}
    for run in runs:
        found.setdefault(str(sorted(key_of(run).items())), []).append(run)
    return [*found.values()]


def by_seed(runs):
    return {run['seed']: run['loss'] for run in runs}


def tuned(runs):
    """Returns the run with the lowest loss of the tuning seed, and {seed: loss} at its learning
    rate."""
    best = min((run for run in runs if run['seed'] == TUNING), key=lambda run: run['loss'])
    return best, by_seed(run for run in runs if run['learning_rate'] == best['learning_rate'])


# -----------------------------------------------------------------------------
# how methods are compared


def compared(mine: dict, others: dict) -> dict:
    """Returns how losses {seed: loss} differ from a baseline's: mean, half the widths of the 95%
    and the 90% interval, and p. Of the two tests, the wider interval and larger p are taken. With
    one common seed there is a mean, and the rest is NaN."""
    seeds = sorted(mine.keys() & others.keys())
    a, b = ([losses[seed] for seed in seeds] for losses in (mine, others))
    mean = fmean(x - y for x, y in zip(a, b))
    if len(seeds) == 1:
        return dict(mean=mean, half95=math.nan, half90=math.nan, p=math.nan)
    tests = stats.ttest_rel(a, b), stats.ttest_ind(a, b, equal_var=False)

    def half(level):
        intervals = [test.confidence_interval(level) for test in tests]
        return max(float(high - low) / 2 for low, high in intervals)
    p = max(test.pvalue for test in tests)
    return dict(mean=mean, half95=half(0.95), half90=half(0.9), p=p)


def verdict(row: dict, p: float) -> str:
    """Returns what may be said of a comparison. p: its corrected p value."""
    if p < 0.05 and abs(row['mean']) > SMALL:
        return 'lower' if row['mean'] < 0 else 'higher'
    if abs(row['mean']) + row['half90'] < SMALL:
        return 'level'
    return 'open'


def is_inside_grid(losses: dict) -> bool:
    """Whether the best learning rate of {rate: loss} has a worse neighbour on both sides, at most a
    factor of 2 away."""
    best = min(losses, key=losses.get)
    above = [rate for rate in losses if best < rate < 2.01 * best]
    below = [rate for rate in losses if best / 2.01 < rate < best]
    return bool(above and below)


def rows_of(runs, baseline: dict) -> list[dict]:
    """Returns the rows of a table, the baseline's first. baseline: settings that only the
    baseline's runs have. Methods without a run of the tuning seed are left out."""
    rows = []
    for group in groups_of(runs):
        tried = {float(run['learning_rate']): run['loss'] for run in group
                 if run['seed'] == TUNING}
        if tried:
            best, losses = tuned(group)
            del losses[TUNING]
            if len(losses) >= 3:
                rows.append(dict(best, losses=losses, tried=tried, difference='', verdict=''))
    first = next(row for row in rows if baseline.items() <= row.items())
    others = [row for row in rows if row['method'] != first['method']]
    compare = [row for row in others if math.inf not in row['losses'].values()]
    for row in compare:
        row.update(compared(row['losses'], first['losses']))
    largest = 0.0  # of p so far, corrected by Holm's method
    for i, row in enumerate(sorted(compare, key=lambda row: row['p'])):
        largest = max(largest, (len(compare) - i) * row['p'])
        is_inside = is_inside_grid(row['tried']) and is_inside_grid(first['tried'])
        row.update(difference=interval(row), verdict=verdict(row, largest) if is_inside else '†')
    return [first, *others]


def by_loss(rows):
    return sorted(rows, key=lambda row: fmean(row['losses'].values()))


# -----------------------------------------------------------------------------
# numbers and names


def shown(*losses):
    return ', '.join(f'{loss:.3f}' for loss in losses)


def rate_of(rate):
    """0.016 as 1.6e-2."""
    digits, power = f'{float(rate):.2e}'.split('e')
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def interval(row):
    low, high = row['mean'] - row['half95'], row['mean'] + row['half95']
    return f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def difference(mine, others):
    """The mean difference of losses {seed: loss}, with an interval from three common seeds on."""
    seeds = sorted(mine.keys() & others.keys())
    if len(seeds) > 2:
        return interval(compared(mine, others))
    return f'{fmean(mine[seed] - others[seed] for seed in seeds):+.3f}'


def spread(values):
    """The mean of several values and their range."""
    return f'{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})'


def bracketed(low, middle, high):
    return f'{middle:.2f} [{low:.2f}, {high:.2f}]'


def name_of(run, with_rank=True):
    """A method in prose, with the settings that its name does not imply."""
    texts = {'rank': 'rank {}', 'optim_bits': '{}-bit moments', 'galore_scale': 'scale {}',
             'merge_every': 'T = {}', 'load_in_4bit': '4-bit weights'}
    found = [text.format(run[key].removesuffix('.0')) for key, text in texts.items()
             if key in run and (with_rank or key != 'rank')]
    return ', '.join([NAMES[run['method']], *found])


def rates_of(runs):
    """The losses of one seed by learning rate, the best in bold."""
    best = min(runs, key=lambda run: run['loss'])
    cells = []
    for run in sorted(runs, key=lambda run: float(run['learning_rate'])):
        cell = f"{rate_of(run['learning_rate'])}: {shown(run['loss'])}"
        cells.append(f'**{cell}**' if run is best else cell)
    return '; '.join(cells)


# -----------------------------------------------------------------------------
# the tables: each function yields the cells of a table's rows


def rows_at(times):
    """Returns the rows of table 1 (20 bytes per parameter) or 2 (80), see rows_of."""
    if times == 20:
        runs = pick('twenty n_embd=96 times=20')
        return rows_of(runs, {'method': 'adamw', 'weight_decay': '0.0'})
    return rows_of(pick('eighty param_dtype='), {'method': 'adamw'})


def by_method(times):
    """Returns {method: row}, see rows_at."""
    return {row['method']: row for row in rows_at(times) if 'optim_bits' not in row}


def state_of(row):
    """Returns the bytes of optimizer state, with today's code."""
    keys = 'n_embd', 'method', 'rank', 'optim_bits'
    run, = [run for run in pick('state') if all(run.get(key) == row.get(key) for key in keys)]
    return run['optimizer_state_bytes']


def losses_of_short_runs():
    """Returns {method: {seed: loss}} of the model of table 2 after 20 bytes per parameter, each
    method at its best rate on the seeds that have all of its rates."""
    found = {'muon_lean': by_seed(pick('int8 method=muon_lean param_dtype=float32')),
             'muon_int8': by_seed(pick('int8 method=muon_int8'))}
    for runs in groups_of(pick('short')):
        by_rate = {}
        for run in runs:
            by_rate.setdefault(run['learning_rate'], {})[run['seed']] = run['loss']
        shared = set.intersection(*map(set, by_rate.values()))
        found[runs[0]['method']] = min(
            by_rate.values(), key=lambda losses: sum(losses[seed] for seed in shared))
    return found


def comparison(times):
    """Methods beside AdamW and beside Muon without momentum."""
    rows = rows_at(times)
    short = losses_of_short_runs() if times == 80 else None
    lean = next(row for row in rows if row['method'] == 'muon_lean')
    for row in by_loss(rows):
        losses = row['losses']
        yield [name_of(row, with_rank=False), f'{state_of(row) / state_of(rows[0]):.0%}',
               f"{rate_of(row['learning_rate'])} ({len(row['tried'])})", len(losses),
               spread(losses.values()), row['difference'],
               '' if row is lean else interval(compared(losses, lean['losses'])),
               row['verdict'], *at_length(row['method'], short)]


def at_length(method, short):
    """The cell of table 2 about shorter runs of the same model; none in table 1."""
    if not short:
        return []
    if method == 'adamw':
        return [spread(short['adamw'].values())]
    return [difference(short[method], short['adamw']) if method in short else '']


def overview():
    """The README's table: the model of table 2, with memory from table 6."""
    rows, early = by_method(80), losses_of_short_runs()
    for method in ('adamw', 'muon', 'muon_lean', 'muon_int8', 'galore_muon', 'galore'):
        row = rows[method]
        cells = [shown(fmean(losses.values())) for losses in (early[method], row['losses'])]
        cells.append(f"{state_of(row) / state_of(rows['adamw']):.0%}")
        small, large = pick(f'memory method={method} batch_size= optim_bits=')
        cells += [f"{run['total'] / 1e9:.1f} GB" for run in (small, large)]
        is_lean = '*' * ('gradient_checkpointing' in small)
        yield [NAMES[method] + is_lean, f'`{method}`', *cells]
    for method in ('muon', 'adamw'):
        runs = pick(f'memory method={method} optim_bits=8')
        yield [f'{NAMES[method]}, 8-bit moments*', f'`{method}`, see table 6', '–', '–', '–',
               *(f"{run['total'] / 1e9:.1f} GB" for run in runs)]


def rates(where):
    """The losses of the tuning seed by learning rate."""
    order = [*NAMES]
    for runs in sorted(groups_of(pick(f'{where} seed={TUNING}')), key=lambda runs: (
            order.index(runs[0]['method']), int(runs[0].get('rank', 0)))):
        no_decay = ', no decay' * (runs[0]['weight_decay'] == '0.0')
        yield [name_of(runs[0]) + no_decay, rates_of(runs)]


def losses_at(width, method):
    """Returns the losses of a GPT of this width after 20 bytes per parameter."""
    rank = int(width) // 2 if method.startswith('galore') else ''
    runs = pick(f'twenty n_embd={width} times=20 method={method} rank={rank} weight_decay=0.1 '
                'optim_bits=')
    return [*tuned(runs)[1].values()] if runs else []


def sizes():
    for (width, layers), count in PARAMETERS.items():
        if layers == '4':
            row = [f'{count / 1e6:.1f}M', f'{20 * count // 8192:,}']
            for method in ('adamw', 'muon', 'muon_lean', 'muon_int8', 'galore', 'galore_muon'):
                losses = losses_at(width, method)
                row.append(shown(*losses[:1] if width == '96' else losses))
            yield row


def splits():
    """Runs that were trained on two splits of the same text."""
    found = {}
    for method in ('adamw', 'muon', 'muon_lean', 'galore'):
        new, = pick(f'bridge method={method} commit=a4b1c7a seed=1')
        old, = [run for run in pick('twenty') if run['cell'] == new['cell']]
        found[method] = old['loss'], new['loss']
        differences = [f'{a - b:+.3f}' for a, b in zip(found[method], found['adamw'])]
        yield [NAMES[method], *map(shown, found[method]),
               *(differences if method != 'adamw' else ['', ''])]


MUON_LEAN = 'variants method=muon_lean muon_rows= embedding_lr_ratio='
# a baseline (its file and settings), what is changed, and the changed runs
CHANGES = (
    ('variants method=adamw embedding_lr_ratio=', 'embeddings at 4 times the rate',
     'variants embedding_lr_ratio=4'),
    ('variants method=adamw embedding_lr_ratio=', 'embeddings at 10 times the rate',
     'variants embedding_lr_ratio=10'),
    ('bridge method=muon', "embeddings at AdamW's rate", 'variants method=muon'),
    (MUON_LEAN, "embeddings at AdamW's rate",
     'variants method=muon_lean embedding_lr_ratio=0.125'),
    ('svd method=galore', "embeddings at AdamW's rate", 'variants embedding_lr_ratio=0.1'),
    (MUON_LEAN, 'blocks of 24 rows', 'variants muon_rows=24'),
    ('twenty n_embd=144 method=muon_lean', 'blocks of 36 rows (1.1M parameters, old split)',
     'variants muon_rows=36'),
    ('twenty n_embd=256 method=muon_lean', 'blocks of 64 rows (3.3M parameters, old split)',
     'variants muon_rows=64'),
    ('variants method=adamw embedding_lr_ratio=', 'batches of 2,048 bytes', 'steps method=adamw'),
    ('bridge method=muon', 'batches of 2,048 bytes', 'steps method=muon'),
    (MUON_LEAN, 'batches of 2,048 bytes', 'steps method=muon_lean'),
    ('svd method=galore', 'rank 96, the full width', 'variants method=galore rank=96'),
    ('svd method=galore', 'rank 72', 'variants method=galore rank=72'),
    ('svd method=galore', 'rank 24', 'variants method=galore rank=24'),
    ('svd method=galore', 'rank 12', 'variants method=galore rank=12'),
    ('svd method=galore', 'beta2 0.99', 'variants method=galore beta2=0.99'),
    ('svd method=galore', 'SVD, as published', 'svd method=galore_svd'),
    ('svd method=galore', 'first projections from one step', 'bridge commit=3dbdcbb'),
    ('svd method=galore', 'first projections from five steps', 'bridge commit=48a3eca'),
    ('ranks method=lte', 'alpha = r, T = 2', 'variants alpha=24.0 merge_every=2'),
    ('ranks method=lte', 'alpha = 4 r, T = 10', 'variants alpha=96.0 merge_every='),
    ('ranks method=lte', 'alpha = 4 r, T = 1', 'variants alpha=96.0 merge_every=1'),
    ('ranks method=lte', 'alpha = 4 r, T = 2', 'variants alpha=96.0 merge_every=2'),
    ('ranks method=lte', 'alpha = 16 r, T = 10', 'variants alpha=384.0'))


def variants():
    """Trainings with one change, beside those without it on the same seeds and data."""
    for base, change, changed in CHANGES:
        plain, runs = pick(base), pick(changed)
        old, new = by_seed(plain), by_seed(runs)
        yield [NAMES[plain[0]['method']], change, rate_of(runs[0]['learning_rate']),
               shown(*(old[seed] for seed in sorted(old.keys() & new.keys()))),
               shown(*(new[seed] for seed in sorted(new))), difference(new, old)]


def ranks():
    """Effective ranks after 101 steps, halfway and at the end."""
    for run in pick('ranks'):
        records = run['ranks']
        looks = records[0], records[(len(records) - 1) // 2], records[-1]
        yield [name_of(run), shown(run['loss']),
               *(', '.join(f'{record[key][kind][0]:.0f}' for record in looks)
                 for key in ('W', 'change') for kind in ('attn', 'mlp'))]


def sent_and_losses():
    """Yields the runs of `wire` with the bytes of state, and {seed: loss at the best rate}."""
    for run in pick('wire n_embd=96'):
        T = run.get('merge_every', '').replace('10', '')  # T = 10 is not written in `twenty`
        decay = '0.0' if run['method'] == 'adamw' else '0.1'  # as in table 1
        best, losses = tuned(pick(
            f"twenty n_embd=96 times=20 method={run['method']} rank={run.get('rank', '')} "
            f'merge_every={T} weight_decay={decay} optim_bits='))
        yield dict(run, state=best['optimizer_state_bytes'], losses=losses)


def wire():
    """Bytes that a worker sends, and the loss of each seed at the best rate of the tuning seed."""
    whole, *_ = runs = [*sent_and_losses()]
    for run in sorted(runs, key=lambda run: -run['wire']):
        yield [name_of(run), f"{run['state'] / whole['state']:.0%}", f"{run['wire']:,.0f}",
               f"1/{whole['wire'] / run['wire']:.3g}",
               *(shown(run['losses'][seed]) if seed in run['losses'] else ''
                 for seed in ('1337', '1', '2'))]


def memory():
    """Predicted memory of LLaMA-1B and 7B."""
    pairs = [*zip(pick('memory size=1b'), pick('memory size=7b batch_size='), strict=True)]
    wholes = [run['total'] for run in pairs[0]]  # AdamW's
    parts = 'weights', 'state', 'gradients'
    for small, large in sorted(pairs, key=lambda pair: -pair[1]['total']):
        name = name_of(small)
        if small.get('rank') != large.get('rank'):
            name += f", {large['rank']}"
        row = [name + '*' * ('gradient_checkpointing' in small)]
        for run, own, whole in zip((small, large), ((*parts, 'activations'), parts), wholes):
            row += [f'{run[part] / 1e9:.2f}' for part in own]
            row.append(f"**{run['total'] / 1e9:.2f}** ({run['total'] / whole:.0%})")
        yield row


def vit_memory():
    for size in ('base', 'large'):
        whole, *others = pick(f'vit_memory model=vit_{size}_patch16_224')
        row = [f'ViT-{size[0].upper()}/16', f"{whole['total'] / 1e9:.2f}"]
        row += [f"{run['total'] / 1e9:.2f} ({run['total'] / whole['total']:.0%})"
                for run in others if run['rank'] not in ('8', '32')]
        yield row


def int8():
    """Losses of one rule on weights in 8, 32 and 16 bits."""
    for exact, coarse, where in (
            ('muon_lean', 'int8 method=muon_int8', 'param_dtype=float32'),
            ('adafactor', 'int8 method=adafactor_int8', 'param_dtype=float32'),
            ('muon_lean', 'eighty method=muon_int8 learning_rate=0.032', 'param_dtype='),
            ('adafactor', 'eighty method=adafactor_int8 learning_rate=0.008',
             'param_dtype=float32')):
        runs = pick(coarse)
        at = f"{coarse.split()[0]} method={exact} learning_rate={runs[0]['learning_rate']}"
        eight, *others = losses = [
            by_seed(run for run in found if run['seed'] != TUNING)
            for found in (runs, pick(f'{at} {where}'), pick(f'{at} param_dtype=bfloat16'))]
        yield [NAMES[exact], runs[0]['times'], rate_of(runs[0]['learning_rate']),
               *(shown(*found.values()) for found in losses),
               difference(eight, others[0]) if len(eight) > 2 else '']


def rounding():
    for run in pick('rounding'):
        yield [rate_of(run['learning_rate']), f"{100 * run['changed']:.2g}%",
               f"{run['error_1']:.2g}", f"{run['error_60']:.2g}"]


def finetune():
    """Fine-tuning, the method with the lowest loss of the tuning seed first."""
    found = [tuned(runs) for runs in groups_of(pick('finetune'))]
    for best, losses in sorted(found, key=lambda pair: pair[0]['loss']):
        grid = [run for run in pick('finetune_rates') if key_of(run) == key_of(best)]
        predicted = best['predicted']
        yield [name_of(best), f"{best['trainable_parameters'] / 1e6:.1f}M",
               rates_of(grid) if grid else rate_of(best['learning_rate']),
               shown(*losses.values()), f"{predicted['total'] / 1e9:.2f}",
               f"{(predicted['total'] - predicted['activations']) / 1e9:.2f}"]


def layers():
    names = {'attn': 'attention', 'mlp': 'MLP', 'logit': 'output layer', '': 'none (full rank)'}
    for row in by_loss(rows_of(pick('layers'), {'method': 'adamw'})):
        modules = row.get('target_modules', '').split(',')
        yield [', '.join(names[module] for module in modules),
               f"{row['trainable_parameters'] / 1e6:.2f}M", rate_of(row['learning_rate']),
               spread(row['losses'].values()), row['difference'], row['verdict']]


def vit_runs():
    """Yields, for each way to adapt a ViT, its name, its runs of the tuning seed, and its runs of
    other seeds at the learning rate that was best."""
    for runs in groups_of(pick('vit')):
        best, _ = tuned(runs)
        name = name_of(best)
        if best['method'] == 'lora':
            name += ' on q and v' if 'target_modules' in best else ' on attention and MLP'
        yield name, [run for run in runs if run['seed'] == TUNING], [
            run for run in runs if run['seed'] != TUNING
            and run['learning_rate'] == best['learning_rate']]


def vit():
    for name, tuning, fresh in vit_runs():
        yield [name, f"{tuning[0]['trainable_parameters'] / 1e3:.0f}k", rates_of(tuning),
               spread([run['test_acc'] for run in fresh])]


def peers():
    """Ratios of times to other libraries', by size and dtype."""
    names = {'full_rank': 'full rank vs transformers', 'lora': 'LoRA vs PEFT',
             'galore_layers': 'our GaLore layers vs galore-torch', 'galore_drop_in':
             'our drop-in vs galore-torch', 'muon': 'Muon vs `torch.optim.Muon`'}
    for compare, name in names.items():
        yield [name, *(bracketed(*run['ratio']) for run in pick(f'peers compare={compare}'))]


def times():
    for run in sorted(pick('times'), key=lambda run: run['time'][1]):
        yield [name_of(run), bracketed(*run['time'])]


# -----------------------------------------------------------------------------
# sentences


def finetuned(settings):
    """Returns the losses of a fine-tuning by seed, and its memory relative to AdamW's."""
    (best, losses), (whole, _) = (tuned(pick(f'finetune {own}'))
                                  for own in (settings, 'method=adamw optim_bits='))
    return losses, best['predicted']['total'] / whole['predicted']['total']


def readme_facts():
    """Yields sentences that README.md must have."""
    late, short = by_method(80), losses_of_short_runs()
    for method in ('muon', 'muon_lean', 'muon_int8'):
        lead = compared(short['adamw'], short[method])['mean']
        yield f"| {lead:.2f} below AdamW at 20 bytes, {-late[method]['mean']:.2f} at 80"
    yield f"| {state_of(late['muon']) / state_of(late['adamw']):.0%} of AdamW's state |"
    coarse, exact = (losses_at('256', method)[0] for method in ('muon_int8', 'muon_lean'))
    yield f'at 3.3M {coarse - exact:.2f} above `muon_lean`'
    large, = pick('memory method=muon_int8 size=7b batch_size=')
    longer, = pick('memory batch_size=32')
    yield ('all parameters of LLaMA-7B in {:.1f} GB at 256 tokens per step, or {:.1f} GB at 8,192 '
           '(predicted)').format(*(run['total'] / 1e9 for run in (large, longer)))
    quantized, = (row for row in rows_at(20) if row.get('optim_bits'))
    lost = compared(quantized['losses'], by_method(20)['muon']['losses'])
    yield f"as Muon at 20 bytes ({lost['mean']:+.3f} ± {lost['half95']:.3f})"
    leads = [losses_at(width, 'adamw')[0] - losses_at(width, 'muon')[0] for width in (96, 144, 256)]
    yield ('from {:.2f} at 0.5M (table 3) to {:.2f} at 1.1M and {:.2f} at '
           '3.3M').format(*leads)
    for name, state, _, share, *losses in wire():
        if name in ('Muon, local SGD, 2 bits', 'GaLoLTE in 2 bits, rank 48, T = 10'):
            yield f'| {fmean(map(float, losses)):.2f}, mean of three seeds'
            yield f"{share} of DDP's bytes, {state} of AdamW's state per worker"
    accuracy = {name: fmean(run['test_acc'] for run in fresh) for name, _, fresh in vit_runs()}
    yield 'accuracy {:.2f} (AdamW {:.2f}; LoRA on q and v only: {:.2f})'.format(
        accuracy['LoRA, rank 32 on attention and MLP'], accuracy['AdamW'],
        accuracy['LoRA, rank 32 on q and v'])
    adamw = fmean(finetuned('method=adamw optim_bits=')[0].values())
    for text, settings in ((f'SmolLM2: {{:.2f}} (AdamW {adamw:.2f}) | {{:.0%}} of',
                            'method=adafactor_int8'),
                           ('--learning_rate=1e-3`: {:.2f} in {:.0%}', 'rank=8 load_in_4bit='),
                           ('is worse here: {:.2f} |', 'method=muon_int8')):
        losses, share = finetuned(settings)
        yield text.format(fmean(losses.values()), share)
    (plain, share), (exact, less) = (finetuned(f'rank=64 load_in_4bit={bits}')
                                     for bits in ('', True))
    yield (f'SmolLM2: {fmean(plain.values()):.2f}; with `--load_in_4bit=True` '
           f"{fmean(exact.values()):.2f} | {share:.0%} of AdamW's memory; in 4 bits {less:.0%} |")


def results_facts():
    """Yields sentences that docs/results.md must have."""
    losses = {method: row['losses'] for method, row in by_method(20).items()}
    for name, other, text in (
            ('mhlora', 'galore', 'LoRA with four heads ends {} above GaLore'),
            ('galolte', 'galore', 'GaLoLTE {} above it')):
        yield text.format(difference(losses[name], losses[other]).replace('+', ''))
    late = by_method(80)
    yield ("Muon's loss minus AdamW's is {}; without momentum it is {}; GaLore's is {}").format(
        *(interval(late[method]) for method in ('muon', 'muon_lean', 'galore')))
    whole, mine = (by_seed(pick(f'twenty n_embd=96 times=80 method={method} learning_rate=0.016 '
                                'weight_decay=0.1')) for method in ('adamw', 'muon'))
    judged = {seed: loss for seed, loss in mine.items() if seed != TUNING}
    yield f"In the model of table 1, Muon's is only {interval(compared(judged, whole))}"
    short = losses_of_short_runs()
    lead = compared(short['adamw'], short['muon'])['mean']
    yield f"from {lead:.3f} after 20 bytes to {-late['muon']['mean']:.3f} after 80, in one model"
    large, = pick('memory batch_size=32')
    yield f"256 tokens per step, or {large['total'] / 1e9:.1f} GB at 8,192"
    rerun, = pick('bridge method=muon_lean commit=86c3ce5')
    old, = pick('twenty method=muon_lean n_embd=96 times=20 seed=1')
    yield f"from {old['loss']:.3f} to {rerun['loss']:.3f}"
    coarse, exact = (losses_at('256', method)[0] for method in ('muon_int8', 'muon_lean'))
    yield f'At 3.3M the 8-bit weights end {coarse - exact:.2f} above'
    coarse, exact = (by_seed(pick(f'eighty method={method}'))
                     for method in ('adafactor_int8 learning_rate=0.008',
                                   'adafactor param_dtype=float32'))
    for fact in ('the 8 bits add {} at 80 bytes'.format(difference(coarse, exact)),
                 'it ends {} above AdamW (table 2)'.format(
                     difference(coarse, late['adamw']['losses']))):
        yield fact.replace('+', '')
    lost = compared(coarse, late['muon_int8']['losses'])['mean']
    yield f'it ends {lost:.3f} above `muon_int8` after 80 bytes'
    adamw, *slowed = (pick(f'variants embedding_lr_ratio={ratio}')[0]['loss']
                      for ratio in ('', 0.25, 0.125, 0.1))
    yield ('Muon still ends {:.3f} below AdamW, Muon without momentum {:.3f} and GaLore '
           '{:.3f}').format(*(adamw - loss for loss in slowed))
    costs = [float(row[-1]) for name, text, *row in variants() if text.startswith('blocks')]
    yield ('a quarter of the width cost {:.3f} at 0.5M parameters, {:.3f} at 1.1M and {:.3f} at '
           '3.3M').format(*costs)
    whole, _ = finetuned('method=adamw optim_bits=')
    for settings, sign, text in (
            ('method=adafactor_int8', -1, 'on 8-bit weights ends {:.3f} to {:.3f} below AdamW'),
            ('rank=64 load_in_4bit=', 1, 'LoRA of rank 64 ends {:.3f} to {:.3f} above AdamW'),
            ('rank=8', 1, 'of rank 8 {:.3f} to {:.3f} above it'),
            ('load_in_4bit=True', 1, 'on 4-bit weights {:.3f} to {:.3f} above it')):
        losses, share = finetuned(settings)
        found = sorted(sign * (losses[seed] - whole[seed]) for seed in losses)
        yield text.format(found[0], found[-1])
    yield f"{finetuned('method=adafactor_int8')[1]:.0%} of its predicted memory"
    losses, share = finetuned('method=adamw optim_bits=8')
    most = max(abs(losses[seed] - whole[seed]) for seed in losses)
    yield f'ends within {most:.3f} of AdamW, in {share:.0%} of its predicted memory'
    more = [(run['peak_memory_bytes'] - run['predicted']['total']) / 1e9
            for run in pick('finetune')]
    yield f'needs {min(more):.2f} to {max(more):.2f} GB more'


def study_facts():
    """Yields sentences that docs/study.md must have."""
    losses = {method: row['losses'] for method, row in by_method(20).items()}
    losses |= {row.get('target_modules', 'none'): row['losses']
               for row in rows_of(pick('layers'), {'method': 'adamw'})}
    for name, other, text in (
            ('galolte', 'adamw', '`galolte` ends {} above AdamW'),
            ('attn', 'logit', 'lower than attention\'s by {}'),
            ('mlp', 'attn', 'parameters and ends {} above attention'),
            ('attn,mlp', 'attn', 'Attention and MLP end {} above attention')):
        yield text.format(difference(losses[name], losses[other]).replace('+', ''))
    slower = [run['sequential'][1] / run['parallel'][1] - 1 for run in pick('heads')]
    yield '{:.0f} and {:.0%} more at ranks 1 and 4'.format(100 * slower[0], slower[1])
    for run in pick('heads'):
        yield (f"Rank {run['rank']}: {bracketed(*run['parallel'])} of the time with "
               f"{1 - run['trained']:.0%} fewer")


def appendix_facts():
    """Yields sentences that docs/appendix.md must have."""
    galore, = pick('twenty method=galore rank=96')
    adamw = {run['learning_rate']: run['loss'] for run in pick(
        f'twenty method=adamw n_embd=96 times=20 seed={TUNING} weight_decay=0.1')}
    yield f"its loss ({galore['loss']:.3f}) is below AdamW's ({adamw['0.016']:.3f})"
    yield f"At twice this rate AdamW ends at {adamw['0.032']:.3f}"
    changed, = (row[-1] for _, text, *row in variants() if text == 'beta2 0.99')
    yield f'lowering beta2 from 0.999 to 0.99 changes the loss by {changed}'
    change = {name: float(row[-1]) for name, text, *row in variants() if '2,048' in text}
    yield ("raise the loss of AdamW and Muon by {AdamW:.2f} and that of Muon without momentum by "
           '{Muon without momentum:.2f}').format(**change)


FACTS = {'README.md': readme_facts, 'docs/results.md': results_facts,
         'docs/appendix.md': appendix_facts, 'docs/study.md': study_facts}
NUMBERED = {1: lambda: comparison(20), 2: lambda: comparison(80), 3: sizes, 4: int8, 5: wire,
            6: memory, 7: vit_memory, 8: finetune, 9: vit,
            10: lambda: rates('twenty n_embd=96 times=20'), 11: lambda: rates('eighty'),
            12: variants, 13: ranks, 14: rounding, 15: layers, 16: peers, 17: times, 18: splits}
# {page: {the text that a table follows: function of its rows}}
TABLES = {'README.md': {'| Method | Config |': overview}, 'docs/study.md': {}} | {
    page: {f'**Table {n}. ': NUMBERED[n] for n in numbers}
    for page, numbers in (('docs/results.md', range(1, 10)), ('docs/appendix.md', range(10, 19)))}


def with_tables(page: str, tables: dict) -> str:
    """Returns the text of a page with its tables as the records give them. Raises ValueError if a
    table is not in the page."""
    for before, rows in tables.items():
        rule = '--- |\n'  # the end of the line below a table's header
        start = page.index(rule, page.index(before)) + len(rule)
        end = page.index('\n\n', start)
        lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows()]
        page = page[:start] + '\n'.join(lines) + page[end:]
    return page


def differences(name: str, page: str) -> list[str]:
    """Returns the lines of tables and the sentences of FACTS in which the text of the page `name`
    differs from assets/*.jsonl."""
    new = with_tables(page, TABLES[name])
    lines = difflib.unified_diff(page.split('\n'), new.split('\n'), name, 'assets/*.jsonl', n=0)
    text = ' '.join(page.split())
    return [*lines, *(f'{name} should say: {fact}' for fact in FACTS[name]() if fact not in text)]


def main():
    found = []
    for name, tables in TABLES.items():
        path = ROOT / name
        if '--check' not in sys.argv:
            path.write_text(with_tables(path.read_text('utf-8'), tables), 'utf-8')
        found += differences(name, path.read_text('utf-8'))
    print(*found, sep='\n')
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
