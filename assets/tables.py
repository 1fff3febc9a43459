"""
The tables of README.md and docs/results.md, from the lines in assets/*.jsonl:

$ python assets/tables.py           # writes them into the pages
$ python assets/tables.py --check   # lists what differs, and fails if anything does

A table is found in its page by its first line. FACTS lists sentences that are checked, too.

Methods are compared like this. A row is a method at the learning rate that is best on the tuning
seeds, trained with three or more fresh seeds. It shows the difference from the baseline on the same
seeds with a 95% interval: by pairs of seeds or by Welch's formula, whichever is wider. Holm's
correction is over the rows of a table. Verdicts:

    lower, higher   significant, and the mean difference is above 0.02 nats
    level           the 90% interval lies within 0.02
    open            anything else
    (empty)         a seed diverged
    †               the best rate, of the method or of the baseline, has no worse rate within a
                    factor of 2 on each side: no verdict
"""

import difflib
import math
import statistics
import sys

from scipy import stats

from measure import PARAMETERS, ROOT, kept, read_lines

TUNING = '1337', '1338'  # seeds
SMALL = 0.02  # nats: how much the choice of a rate within a factor of 2 changes a loss
NAMES = {
    'full': 'AdamW', 'muon': 'Muon', 'muon_lean': 'Muon without momentum',
    'muon_int8': 'Muon without momentum, 8-bit weights',
    'adamw_int8': 'AdamW, 8-bit weights and moments',
    'adafactor': 'Adafactor', 'adafactor_int8': 'Adafactor, 8-bit weights', 'galore': 'GaLore',
    'galore_svd': 'GaLore by SVD',
    'galore_muon': 'GaLore with Muon', 'galore_lean': 'GaLore, 8-bit moments',
    'galore_int8': 'GaLore, 8-bit weights', 'galolte': 'GaLoLTE, 4 workers',
    'galolte_2bit': 'GaLoLTE in 2 bits', 'lora': 'LoRA', 'mhlora': 'LoRA, 4 heads', 'lte': 'LTE',
    'relora': 'ReLoRA', 'local_adamw': 'AdamW, local SGD', 'local_muon': 'Muon, local SGD, 2 bits'}

# -----------------------------------------------------------------------------
# how methods are compared


def compared(mine: dict, others: dict) -> dict:
    """Returns how losses {seed: loss} differ from a baseline's: seeds, mean, half the widths of the
    95% and the 90% interval, and p. Of the two tests, the wider interval and larger p are taken."""
    seeds = sorted(mine.keys() & others.keys())
    a, b = ([losses[seed] for seed in seeds] for losses in (mine, others))
    n, differences = len(seeds), [x - y for x, y in zip(a, b)]
    mean = statistics.mean(differences)
    paired = statistics.stdev(differences) / math.sqrt(n)
    parts = [statistics.variance(losses) / n for losses in (a, b)]
    welch = math.sqrt(sum(parts))
    freedom = sum(parts)**2 / sum(part**2 / (n - 1) for part in parts)
    half = {level: max(stats.t.ppf((1 + level) / 2, n - 1) * paired,
                       stats.t.ppf((1 + level) / 2, freedom) * welch) for level in (0.95, 0.9)}
    p = max(2 * stats.t.sf(abs(mean) / paired, n - 1), 2 * stats.t.sf(abs(mean) / welch, freedom))
    return dict(seeds=n, mean=mean, half95=float(half[0.95]), half90=float(half[0.9]), p=float(p))


def holm(ps: list[float]) -> list[float]:
    """Returns p values that are corrected for their number by Holm's method."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(ps) - rank) * ps[i])
        adjusted[i] = min(largest, 1.0)
    return adjusted


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


def mean_of(losses) -> float:
    return sum(losses) / len(losses)  # statistics.mean takes no inf


def grouped(pairs) -> dict:
    """Returns {settings without rate and seed: {rate: {seed: loss}}}. A training that diverged has
    an infinite loss."""
    found = {}
    for cell, line in pairs:
        loss = math.inf if line['loss'] is None else line['loss']
        settings = tuple(sorted((key, value) for key, value in cell.items()
                                if key not in ('seed', 'learning_rate')))
        seeds = found.setdefault(settings, {}).setdefault(cell['learning_rate'], {})
        seeds[cell['seed']] = loss
    return found


def rows_of(pairs, baseline: dict) -> list[dict]:
    """Returns the rows of a table, the baseline's first. baseline: settings that only the
    baseline's cells have. If the rate of a method was not tuned, the rate with most fresh seeds is
    taken."""
    rows = []
    for settings, rates in grouped(pairs).items():
        tuned = {float(rate): mean_of(tuning) for rate, losses in rates.items()
                 if (tuning := [losses[seed] for seed in TUNING if seed in losses])}
        fresh = {rate: {seed: loss for seed, loss in losses.items() if seed not in TUNING}
                 for rate, losses in rates.items()}
        rate = max(fresh, key=lambda rate: len(fresh[rate]))
        is_inside = False
        if tuned:
            best = min(tuned, key=tuned.get)
            rate = next(rate for rate in rates if float(rate) == best)
            is_inside = is_inside_grid(tuned)
        if len(fresh[rate]) >= 3:
            rows.append(dict(cell=dict(settings), rate=rate, losses=fresh[rate],
                             tried=len(tuned), is_inside=is_inside))
    first = next(row for row in rows if baseline.items() <= row['cell'].items())
    others = [row for row in rows if row['cell']['method'] != first['cell']['method']
              and len(row['losses'].keys() & first['losses'].keys()) > 2]
    compare = [row for row in others if math.inf not in row['losses'].values()]
    for row in compare:
        row.update(compared(row['losses'], first['losses']))
    for row, p in zip(compare, holm([row['p'] for row in compare])):
        row['verdict'] = verdict(row, p) if row['is_inside'] and first['is_inside'] else '†'
    return [first, *others]


# -----------------------------------------------------------------------------
# lines, numbers and names


def pick(bench, settings=''):
    """Returns the pairs (cell, line) of a bench whose cells have these settings, written as in
    measure.py; `key=` means that a cell does not have the key."""
    wanted = dict(pair.split('=') for pair in settings.split())
    return [(cell, line) for cell, line in kept(bench)
            if all(cell.get(key, '') == value for key, value in wanted.items())]


def by_seed(pairs):
    return {cell['seed']: line['loss'] for cell, line in pairs}


def shown(loss):
    return 'diverged' if loss is None or loss == math.inf else f'{loss:.3f}'


def rate_of(rate):
    """0.016 as 1.6e-2."""
    digits, power = f'{float(rate):.2e}'.split('e')
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def interval(row):
    low, high = row['mean'] - row['half95'], row['mean'] + row['half95']
    return f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def spread(losses):
    """The mean of losses and their range."""
    if len(losses) == 1:
        return shown(*losses)
    return f'{mean_of(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})'


def name_of(cell, keys=('rank',)):
    """A method in prose, with its settings of these keys."""
    texts = {'rank': 'rank {}', 'optim_bits': '{}-bit moments', 'merge_every': 'T = {}',
             'galore_scale': 'scale {}'}
    found = [NAMES[cell['method']]]
    found += [texts[key].format(cell[key].removesuffix('.0')) for key in keys
              if key in texts and key in cell]
    if 'weight_decay' in keys and cell.get('weight_decay') == '0.0':
        found.append('no decay')
    if 'load_in_4bit' in cell:
        found.append('4-bit weights')
    if cell.get('param_dtype') == 'float32':
        found.append('float32 weights')
    return ', '.join(found)


def rates_of(pairs):
    """The losses of one seed by learning rate, the best in bold."""
    losses = {float(cell['learning_rate']): line['loss'] for cell, line in pairs}
    best = min(losses, key=lambda rate: losses[rate] or math.inf)
    cells = [f'{rate_of(rate)}: {shown(losses[rate])}' for rate in sorted(losses)]
    return '; '.join(f'**{cell}**' if rate == best else cell
                     for rate, cell in zip(sorted(losses), cells))


def grid_place(pairs, rate):
    """How many rates were tried, and whether the best one is the last on a side."""
    tried = sorted({float(cell['learning_rate']) for cell, _ in pairs})
    place = {tried[0]: 'lowest of ', tried[-1]: 'highest of '}.get(float(rate), '')
    return f"{rate_of(rate)} ({place if len(tried) > 1 else ''}{len(tried)})"


def tuned(pairs):
    """Returns the cell and the line with the lowest loss of the tuning seeds, and {seed: loss} at
    that learning rate."""
    cell, line = min((pair for pair in pairs if pair[0]['seed'] in TUNING and pair[1]['loss']),
                     key=lambda pair: pair[1]['loss'])  # no loss: the training diverged
    at_rate = [pair for pair in pairs if pair[0]['learning_rate'] == cell['learning_rate']]
    return cell, line, by_seed(at_rate)


def key_of(cell, ignored=('seed', 'learning_rate')):
    """The settings of a cell except for the ignored ones."""
    return tuple(sorted((key, value) for key, value in cell.items() if key not in ignored))


def groups_of(pairs, ignored=('seed', 'learning_rate')):
    """Returns lists of the pairs whose cells differ only in the ignored keys."""
    found = {}
    for cell, line in pairs:
        found.setdefault(key_of(cell, ignored), []).append((cell, line))
    return [*found.values()]


# -----------------------------------------------------------------------------
# the tables: each function yields the cells of a table's rows


def rows_at(times):
    """Returns the rows of table 1 (20 bytes per parameter) or 2 (80), see rows_of. Each row also
    has its pairs, of all rates and seeds."""
    pairs, baseline = pick('eighty', 'param_dtype='), {'method': 'full'}
    if times == 20:
        pairs = pick('twenty', 'n_embd=96 times=20')
        baseline['weight_decay'] = '0.0'
    rows = rows_of(pairs, baseline)
    for row in rows:
        row['pairs'] = [(cell, line) for cell, line in pairs if row['cell'].items() <= cell.items()
                        and row['cell'].get('optim_bits') == cell.get('optim_bits')]
    return rows


def by_method(times):
    """Returns {method: row}, see rows_at."""
    return {row['cell']['method']: row for row in rows_at(times)
            if 'optim_bits' not in row['cell']}


def state_of(row):
    """Returns the bytes of optimizer state, with today's code."""
    own = {key: row['cell'].get(key, '') for key in ('n_embd', 'method', 'rank', 'optim_bits')}
    (_, line), = pick('state', ' '.join(map('='.join, own.items())))
    return line['optimizer_state_bytes']


def comparison(times):
    """Methods beside AdamW and beside Muon without momentum."""
    rows = rows_at(times)
    lean = next(row for row in rows if row['cell']['method'] == 'muon_lean')
    for row in sorted(rows, key=lambda row: mean_of(row['losses'].values())):
        losses = row['losses']
        yield [name_of(row['cell'], ('optim_bits',)), f'{state_of(row) / state_of(rows[0]):.0%}',
               grid_place(row['pairs'], row['rate']), len(losses), spread(losses.values()),
               interval(row) if 'mean' in row else '',
               '' if row is lean else interval(compared(losses, lean['losses'])),
               row.get('verdict', '')]


def overview():
    """The README's table."""
    rows = {times: by_method(times) for times in (20, 80)}
    totals = {(cell['method'] + cell.get('optim_bits', ''), cell['size']):
              f"{line['total'] / 1e9:.1f} GB" + '*' * ('gradient_checkpointing' in cell)
              for cell, line in pick('memory', 'batch_size=')}

    def loss(method, times):
        row = rows[times].get(method)
        if row is None:
            return '–'
        if 'mean' not in row:
            return f"0 ({shown(mean_of(row['losses'].values()))})"
        return f"{row['mean']:+.2f}" + ' (unclear)' * (abs(row['mean']) < row['half95'])

    for method in ('full', 'full8', 'muon', 'muon_lean', 'muon_int8', 'galore', 'galore_muon',
                   'galore_int8', 'galolte', 'mhlora', 'lora'):
        row, whole = rows[20].get(method), rows[20]['full']
        state = f'{state_of(row) / state_of(whole):.0%}' if row else '–'
        name, config = NAMES.get(method, 'AdamW, 8-bit moments'), f'`{method}`'
        yield [name, config if method in NAMES else '–', loss(method, 20), loss(method, 80), state,
               totals.get((method, '1b'), '–'), totals.get((method, '7b'), '–')]


def rates():
    keys = 'rank', 'optim_bits', 'weight_decay', 'galore_scale', 'merge_every'
    groups = groups_of(pick('twenty', 'n_embd=96 times=20 seed=1337'))
    order = [*NAMES]
    for pairs in sorted(groups, key=lambda pairs: (order.index(pairs[0][0]['method']),
                                                   int(pairs[0][0].get('rank', 0)))):
        yield [name_of(pairs[0][0], keys), rates_of(pairs)]


def rates_at_80():
    """The losses of the tuning seed after 80 bytes per parameter."""
    for pairs in groups_of(pick('eighty', 'seed=1337')):
        yield [name_of(pairs[0][0]), rates_of(pairs)]


def sizes():
    methods = 'full', 'muon', 'muon_lean', 'galore', 'galore_muon'
    for (width, _), count in PARAMETERS.items():
        row = [f'{count / 1e6:.1f}M', f'{20 * count // 8192:,}']
        for method in methods:
            rank = str(int(width) // 2) if method.startswith('galore') else ''
            pairs = pick('twenty', f'n_embd={width} times=20 method={method} rank={rank} '
                         'weight_decay=0.1 optim_bits=')
            losses = [*tuned(pairs)[2].values()] if pairs else []
            row.append(', '.join(map(shown, losses[:1] if width == '96' else losses)))
        if any(row[2:]):
            yield row


def splits():
    """Cells that were trained on two splits of the same text."""
    new = {cell['method']: line['loss'] for line in read_lines(ROOT / 'assets/bridge.jsonl')
           for cell in [line['cell']] if line['commit'] == 'a4b1c7a' and cell.get('seed') == '1'}
    found = {}
    for method in ('full', 'muon', 'muon_lean', 'galore'):
        own = 'learning_rate=0.008 weight_decay=0.0' if method == 'full' else 'optim_bits='
        (_, line), = pick('twenty', f'n_embd=96 times=20 seed=1 method={method} {own}')
        found[method] = line['loss'], new[method]
        differences = [f'{a - b:+.3f}' for a, b in zip(found[method], found['full'])]
        yield [NAMES[method], *map(shown, found[method]),
               *(differences if method != 'full' else ['', ''])]


def variants():
    """Trainings with one change, beside those without it on the same seeds and data."""
    bridge = [(line['cell'], line) for line in read_lines(ROOT / 'assets/bridge.jsonl')
              if 'times' in line['cell']]

    def early(commit):
        return [(cell, line) for cell, line in bridge if line['commit'] == commit]
    muon = [(cell, line) for cell, line in bridge if cell['method'] == 'muon']
    full = pick('variants', 'method=full embedding_lr_ratio=')
    lean = pick('variants', 'method=muon_lean muon_rows=')
    galore, lte = pick('svd', 'method=galore'), pick('ranks', 'method=lte')
    changes = [
        *((full, f'embeddings at {n} times the rate', pick('variants', f'embedding_lr_ratio={n}'))
          for n in (4, 10)),
        (lean, 'blocks of 24 rows', pick('variants', 'muon_rows=24')),
        *((base, 'batches of 2,048 bytes', pairs) for base in (full, muon, lean)
          for pairs in groups_of(pick('steps', f"method={base[0][0]['method']}"), ('seed',))),
        (galore, 'SVD, as published', pick('svd', 'method=galore_svd')),
        (galore, 'first projections from one step', early('3dbdcbb')),
        (galore, 'first projections from five steps', early('48a3eca')),
        *((lte, text, pairs) for text, pairs in lte_variants())]
    for base, change, pairs in changes:
        if not pairs:
            continue
        old, new = by_seed(base), by_seed(pairs)
        seeds = sorted(old.keys() & new.keys())
        row = compared(new, old) if len(seeds) > 2 else None
        difference = interval(row) if row else f'{new[seeds[0]] - old[seeds[0]]:+.3f}'
        yield [NAMES[base[0][0]['method']], change, rate_of(pairs[0][0]['learning_rate']),
               ', '.join(shown(old[seed]) for seed in seeds),
               ', '.join(shown(new[seed]) for seed in sorted(new)),
               difference]


def lte_variants():
    """Yields (text, pairs) of LTE with another alpha, rate or T."""
    for pairs in groups_of(pick('variants', 'method=lte'), ('seed',)):
        cell = pairs[0][0]
        alpha = float(cell['alpha']) / float(cell['rank'])
        times = '' if alpha == 1 else f'{alpha:g} '
        yield f"alpha = {times}r, T = {cell.get('merge_every', 10)}", pairs


def ranks():
    """Effective ranks after 101 steps, halfway and at the end."""
    for cell, line in pick('ranks'):
        records = line['ranks']
        looks = records[0], records[(len(records) - 1) // 2], records[-1]
        yield [name_of(cell), shown(line['loss']),
               *(', '.join(f'{record[key][kind][0]:.0f}' for record in looks)
                 for key in ('W', 'change') for kind in ('attn', 'mlp'))]


def sent_and_losses():
    """Yields (cell, line of `wire` with bytes of state, {seed: loss at the best rate})."""
    for sent, line in pick('wire', 'n_embd=96'):
        T = sent.get('merge_every', '').replace('10', '')  # T = 10 is not written in `twenty`
        decay = '0.0' if sent['method'] == 'full' else '0.1'  # as in table 1
        pairs = pick('twenty', f"n_embd=96 times=20 method={sent['method']} optim_bits= "
                     f"rank={sent.get('rank', '')} merge_every={T} weight_decay={decay}")
        _, best, losses = tuned(pairs)
        yield sent, dict(line, state=best['optimizer_state_bytes']), losses


def wire():
    """Bytes that a worker sends, and the loss of each seed at the best rate of the tuning seed."""
    (_, whole, _), *_ = rows = [*sent_and_losses()]
    for sent, line, losses in sorted(rows, key=lambda row: -row[1]['wire']):
        yield [name_of(sent, ('rank', 'merge_every')), f"{line['state'] / whole['state']:.0%}",
               f"{line['wire']:,.0f}", f"1/{whole['wire'] / line['wire']:.3g}",
               *(shown(losses[seed]) if seed in losses else '' for seed in ('1337', '1'))]


def memory():
    """Predicted memory of LLaMA-1B and 7B."""
    groups = groups_of(pick('memory', 'batch_size='), ('size', 'rank'))
    wholes = [line['total'] for _, line in groups[0]]  # AdamW's
    for pairs in sorted(groups, key=lambda pairs: -pairs[1][1]['total']):
        (cell, _), (other, _) = pairs  # 1B and 7B
        name = name_of(cell, ('rank', 'optim_bits'))
        if cell.get('rank') != other.get('rank'):
            name += f", {other['rank']}"
        row = [name + '*' * ('gradient_checkpointing' in cell)]
        for (sizes, line), whole in zip(pairs, wholes):
            size = sizes['size']
            parts = ('weights', 'state', 'gradients', 'activations')[:4 if size == '1b' else 3]
            row += [f'{line[part] / 1e9:.2f}' for part in parts]
            row.append(f"**{line['total'] / 1e9:.2f}** ({line['total'] / whole:.0%})")
        yield row


def vit_memory():
    for size in ('base', 'large'):
        totals = [(cell.get('rank'), cell['method'], line['total'] / 1e9)
                  for cell, line in pick('vit_memory', f'model=vit_{size}_patch16_224')]
        whole = totals[0][2]
        yield [f'ViT-{size[0].upper()}/16', f'{whole:.2f}', *(f'{total:.2f} ({total / whole:.0%})'
               for rank, method, total in totals[1:]
               if rank in (('4', '16', '64') if method == 'lora' else ('64',)))]


def int8():
    """Losses of one rule on weights in 8, 32 and 16 bits."""
    for bench, exact, coarse in (('int8', 'muon_lean', 'muon_int8'),
                                 ('int8', 'adafactor', 'adafactor_int8'),
                                 ('eighty', 'muon_lean', 'muon_int8')):
        eight = pick(bench, f'method={coarse}')
        (cell, _), *_ = eight
        at = f"method={exact} learning_rate={cell['learning_rate']}"
        others = [[(cell, line) for cell, line in pick(bench, at)
                   if cell.get('param_dtype', 'float32') == dtype and cell['seed'] not in TUNING]
                  for dtype in ('float32', 'bfloat16')]
        losses = [by_seed(pairs) for pairs in (eight, *others)]
        is_compared = len(losses[0].keys() & losses[1].keys()) > 2
        yield [NAMES[exact], cell['times'], rate_of(cell['learning_rate']),
               *(', '.join(map(shown, found.values())) for found in losses),
               interval(compared(*losses[:2])) if is_compared else '']


def rounding():
    for cell, line in pick('rounding'):
        yield [rate_of(cell['learning_rate']), f"{100 * line['changed']:.2g}%",
               f"{line['error_1']:.2g}", f"{line['error_60']:.2g}"]


def finetune():
    """Fine-tuning, the method with the lowest loss of the tuning seed first."""
    grids = {key_of(pairs[0][0]): pairs for pairs in groups_of(pick('finetune_rates'))}
    groups = groups_of(pick('finetune'))
    for pairs in sorted(groups, key=lambda pairs: tuned(pairs)[1]['loss']):
        cell, line, losses = tuned(pairs)
        grid, predicted = grids.get(key_of(cell)), line['predicted']
        yield [name_of(cell), f"{line['trainable_parameters'] / 1e6:.1f}M",
               rates_of(grid) if grid else rate_of(cell['learning_rate']),
               ', '.join(map(shown, losses.values())), f"{predicted['total'] / 1e9:.2f}",
               f"{(predicted['total'] - predicted['activations']) / 1e9:.2f}"]


def layers():
    names = {'attn': 'attention', 'mlp': 'MLP', 'logit': 'output layer'}
    rows = rows_of(pick('layers'), {'method': 'full'})
    for row in sorted(rows, key=lambda row: mean_of(row['losses'].values())):
        modules = row['cell'].get('target_modules')
        line = next(line for cell, line in pick('layers') if row['cell'].items() <= cell.items()
                    and cell.get('target_modules') == modules)
        yield [', '.join(names[module] for module in modules.split(',')) if modules
               else 'none (full rank)', f"{line['trainable_parameters'] / 1e6:.2f}M",
               rate_of(row['rate']), spread(row['losses'].values()),
               interval(row) if 'mean' in row else '', row.get('verdict', '')]


def vit_runs():
    """Yields, for each way to adapt a ViT, its name, its pairs of the tuning seed, and its pairs of
    other seeds at the learning rate that was best."""
    for pairs in groups_of(pick('vit')):
        rate = tuned(pairs)[0]['learning_rate']
        tuning = [pair for pair in pairs if pair[0]['seed'] in TUNING]
        cell, where = pairs[0][0], ''
        if cell['method'] == 'lora':
            where = ' on q and v' if 'target_modules' in cell else ' on attention and MLP'
        name = name_of(cell) + where
        yield name, tuning, [pair for pair in pairs if pair not in tuning
                             and pair[0]['learning_rate'] == rate]


def vit():
    for name, tuning, fresh in vit_runs():
        _, line = tuning[0]
        accuracies = [line['test_acc'] for _, line in fresh]
        yield [name, f"{line['trainable_parameters'] / 1e3:.0f}k", rates_of(tuning),
               spread(accuracies)]


def peers():
    """Ratios of times to other libraries', by size and dtype."""
    names = {'full_rank': 'full rank vs transformers', 'lora': 'LoRA vs PEFT',
             'galore_layers': 'our GaLore layers vs galore-torch', 'galore_drop_in':
             'our drop-in vs galore-torch', 'muon': 'Muon vs `torch.optim.Muon`'}
    found = {tuple(line['cell'].values()): line['ratio']
             for line in read_lines(ROOT / 'assets/peers.jsonl')}
    for compare, name in names.items():
        ratios = [found[size, compare, dtype] for size in ('25m', '135m')
                  for dtype in ('float32', 'bfloat16')]
        yield [name, *(f'{middle:.2f} [{low:.2f}, {high:.2f}]' for low, middle, high in ratios)]


def times():
    for cell, line in sorted(pick('times'), key=lambda pair: pair[1]['time'][1]):
        low, middle, high = line['time']
        yield [name_of(cell), f'{middle:.2f} [{low:.2f}, {high:.2f}]']


def galore_muon_at_80():
    """Returns by how much GaLore with Muon ends above AdamW after 80 bytes, on each seed."""
    mine, other = (by_seed(pick('eighty', f'method={method} learning_rate={rate}'))
                   for method, rate in (('galore_muon', '0.032'), ('full', '0.016')))
    return [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]


def readme_facts():
    """Yields sentences that README.md must have."""
    rows = {times: by_method(times) for times in (20, 80)}
    galore, muon = (rows[20][method]['losses'] for method in ('galore', 'galore_muon'))
    late = ' and '.join(f'{difference:.2f}' for difference in galore_muon_at_80())
    yield (f"{compared(galore, muon)['mean']:.2f} below `galore` at 20 bytes; {late} above AdamW "
           'at 80 (two seeds)')
    for method in ('muon', 'muon_lean'):
        early, late = (-rows[times][method]['mean'] for times in rows)
        yield f'| {early:.2f} below AdamW at 20 bytes, {late:.2f} at 80'
    mine, other = (by_seed(pick('int8', f'method={own}')) for own in (
        'muon_int8', 'muon_lean param_dtype=float32'))
    late, exact = (by_seed(pick('eighty', f'seed=1 method={method} param_dtype='))['1']
                   for method in ('muon_int8', 'muon_lean'))
    yield (f"| {compared(mine, other)['mean']:.2f} (unclear) above `muon_lean` at 20 bytes, "
           f'{late - exact:.2f} at 80 (one seed)')
    leads = []
    for width in (96, 144, 256):
        adamw, muon = (tuned(pick('twenty', f'n_embd={width} times=20 method={method} optim_bits= '
                                  'weight_decay=0.1'))[1]['loss'] for method in ('full', 'muon'))
        leads.append(f'{adamw - muon:.2f}')
    yield '{}, {} and {} at 0.5M, 1.1M and 3.3M'.format(*leads)
    (_, ddp, _), *_ = rows = [*sent_and_losses()]
    for sent, line, losses in rows:
        if sent['method'] == 'local_muon' or sent.get('merge_every') == '10':
            ratio = ddp['wire'] / line['wire']
            yield f"1/{ratio:.0f} of DDP's bytes, loss {mean_of(losses.values()):.2f}"
            yield f"{line['state'] / ddp['state']:.0%} of AdamW's state per worker"
    found = {name: mean_of([line['test_acc'] for _, line in fresh])
             for name, _, fresh in vit_runs()}
    yield 'accuracy {:.2f} (AdamW {:.2f}; LoRA on q and v only: {:.2f})'.format(
        found['LoRA, rank 32 on attention and MLP'], found['AdamW'],
        found['LoRA, rank 32 on q and v'])
    _, whole, losses = tuned(pick('finetune', 'method=full param_dtype=bfloat16'))
    adamw = f'(AdamW {mean_of(losses.values()):.2f})'
    for text, own in ((f'SmolLM2: {{:.2f}} {adamw} in {{:.0%}} of', 'method=adafactor_int8'),
                      ('SmolLM2: {:.2f} in {:.0%} (rank', 'method=lora rank=64 load_in_4bit='),
                      ('(rank 8, one seed: {:.2f} in {:.0%})', 'method=lora rank=8 load_in_4bit='),
                      ('SmolLM2: {:.2f} in {:.0%} (one seed)', 'load_in_4bit=True')):
        _, line, losses = tuned(pick('finetune', own))
        share = line['predicted']['total'] / whole['predicted']['total']
        yield text.format(mean_of(losses.values()), share)


def results_facts():
    """Yields sentences that docs/results.md must have."""
    losses = {method: row['losses'] for method, row in by_method(20).items()}
    losses |= {row['cell'].get('target_modules', 'none'): row['losses']
               for row in rows_of(pick('layers'), {'method': 'full'})}
    for name, other, text in (
            ('mhlora', 'galore', 'LoRA with four heads ends {} above GaLore'),
            ('galolte', 'galore', 'GaLoLTE {} above it'),
            ('galolte', 'full', '`galolte` ends {} above AdamW'),
            ('attn', 'logit', 'lower than attention\'s by {}'),
            ('mlp', 'attn', 'parameters and ends {} above attention'),
            ('attn,mlp', 'attn', 'Attention and MLP end {} above attention')):
        difference = interval(compared(losses[name], losses[other]))
        yield text.format(difference.replace('+', ''))
    _, _, whole = tuned(pick('finetune', 'method=full param_dtype=bfloat16'))
    for own, sign, text in (
            ('method=adafactor_int8', -1, 'on 8-bit weights ends {} to {} below AdamW'),
            ('method=lora rank=64 load_in_4bit=', 1, 'LoRA of rank 64 ends {} to {} above AdamW')):
        _, _, losses = tuned(pick('finetune', own))
        found = sorted(f'{sign * (losses[seed] - whole[seed]):.3f}' for seed in losses)
        yield text.format(found[0], found[-1])
    (_, line, _), (_, full, _) = (tuned(pick('finetune', f'method={method} param_dtype=bfloat16'))
                                  for method in ('adafactor_int8', 'full'))
    share = line['predicted']['total'] / full['predicted']['total']
    yield f"reaches AdamW's loss with {share:.0%} of its predicted memory"
    (_, large), = pick('memory', 'batch_size=32')
    yield f"256 tokens per step, or {large['total'] / 1e9:.1f} GB at 8,192"
    late = ' and '.join(f'{difference:.3f}' for difference in galore_muon_at_80())
    yield f'GaLore with Muon ends {late} above AdamW (seeds 1 and 1337)'
    rows = by_method(80)
    muon, lean, galore = (interval(rows[method]) for method in ('muon', 'muon_lean', 'galore'))
    yield (f'Muon ends at {muon} relative to AdamW, Muon without momentum at {lean}, and GaLore '
           f'at {galore}')
    slower = [line['sequential'][1] / line['parallel'][1] - 1 for _, line in pick('heads')]
    yield '{:.0f} and {:.0%} more at ranks 1 and 4'.format(100 * slower[0], slower[1])
    for cell, line in pick('heads'):
        low, middle, high = line['parallel']
        yield (f"Rank {cell['rank']}: {middle:.2f} [{low:.2f}, {high:.2f}] of the time with "
               f"{1 - line['trained']:.0%} fewer")
    more = [(line['peak_memory_bytes'] - line['predicted']['total']) / 1e9
            for _, line in pick('finetune')]
    yield f'needs {min(more):.2f} to {max(more):.2f} GB more'


FACTS = {'README.md': readme_facts, 'docs/results.md': results_facts}
TABLES = {
    'README.md': {
        '| Method | Config | Loss vs AdamW, 20 bytes | 80 bytes | State | Memory, 1B | 7B |':
            overview},
    'docs/results.md': {
        '| method, 20 bytes | state | learning rate (tried) | seeds | loss, mean (range) '
        '| minus AdamW | minus Muon without momentum | verdict |': lambda: comparison(20),
        '| method, 80 bytes | state | learning rate (tried) | seeds | loss, mean (range) '
        '| minus AdamW | minus Muon without momentum | verdict |': lambda: comparison(80),
        '| method, 80 bytes | learning rate: loss, seed 1337 |': rates_at_80,
        '| method | learning rate: loss |': rates,
        '| parameters | steps | AdamW | Muon | Muon without momentum | GaLore | GaLore with Muon |':
            sizes,
        '| method | loss before | loss now | minus AdamW before | minus AdamW now |': splits,
        '| method | change | learning rate | baseline | changed | difference |': variants,
        '| method | loss | W, attention | W, MLP | W - W₀, attention | W - W₀, MLP |': ranks,
        '| method | state | bytes per step | relative to DDP | loss, seed 1337 | loss, seed 1 |':
            wire,
        '| method | 1B: weights | state | gradients | activations and temporaries | total '
        '| 7B: weights | state | gradients | total |': memory,
        '| model | full rank | LoRA, rank 4 | LoRA, rank 16 | LoRA, rank 64 | GaLore, rank 64 |':
            vit_memory,
        '| optimizer | text, bytes/parameter | learning rate | 8-bit weights | float32 weights '
        '| bfloat16 weights | 8-bit minus float32 |': int8,
        '| learning rate | share of int8 values that a step changes | error of one step '
        '| error after 60 equal steps |': rounding,
        '| method | trained | learning rate: loss when tuned | loss, seeds 1337, 1, 2 | memory, GB '
        '| of which weights, state and gradients, GB |': finetune,
        '| layers with adapters | trained parameters | learning rate | loss, mean (range) '
        '| minus full rank | verdict |': layers,
        '| method | trained parameters | learning rate: validation loss, seed 1337 '
        '| test accuracy, seeds 1 to 5 |': vit,
        '| compared | 25M, float32 | 25M, bfloat16 | 135M, float32 | 135M, bfloat16 |': peers,
        "| method | time of a step relative to AdamW's |": times}}


def with_tables(page: str, tables: dict) -> str:
    """Returns the text of a page with its tables as the lines give them. Raises ValueError if a
    table's first line is not in the page."""
    lines = page.split('\n')
    for header, rows in tables.items():
        start = lines.index(header) + 2
        end = start
        while lines[end].startswith('|'):
            end += 1
        lines[start:end] = ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows()]
    return '\n'.join(lines)


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
