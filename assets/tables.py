"""
Compares methods by the lines of a bench, and prints a table:

$ python assets/tables.py twenty n_embd=96 times=20

A row has the losses of seeds that have tuned nothing, at the learning rate that is best on the
tuning seeds, and the difference from AdamW on the same seeds with a 95% interval: by pairs or by
Welch's formula, whichever is wider. Holm's correction is over the rows. A verdict is

    lower, higher   significant, and the mean difference is above 0.02 nats
    level           the 90% interval lies within 0.02
    open            anything else
    none (†)        the best rate has no worse neighbour, half and twice as large, on both sides
"""

import math
import statistics
import sys

from scipy import stats

from measure import BENCHES, kept

TUNING = '1337', '1338'  # seeds
SMALL = 0.02  # nats: what the choice of a rate within a factor of 2 moves


def compared(mine: dict, others: dict) -> dict:
    """Returns how losses {seed: loss} differ from those of a baseline: seeds, mean, the 95% and the
    90% interval (half their widths), and p of the paired t-test."""
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
    p = 2 * stats.t.sf(abs(mean) / paired, n - 1)
    return dict(seeds=n, mean=mean, half95=half[0.95], half90=half[0.9], p=float(p))


def holm(ps: list[float]) -> list[float]:
    """Returns p values that are corrected for their number by Holm's method."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(ps) - rank) * ps[i])
        adjusted[i] = min(largest, 1.0)
    return adjusted


def verdict(row: dict, p: float) -> str:
    """Returns what may be said of a comparison, whose corrected p is given."""
    if p < 0.05 and abs(row['mean']) > SMALL:
        return 'lower' if row['mean'] < 0 else 'higher'
    if abs(row['mean']) + row['half90'] < SMALL:
        return 'level'
    return 'open'


def is_closed(losses: dict) -> bool:
    """Whether the best learning rate of {rate: loss} has a worse neighbour on both sides, at most a
    factor of 2 away."""
    best = min(losses, key=losses.get)
    above = [rate for rate in losses if best < rate < 2.01 * best]
    below = [rate for rate in losses if best / 2.01 < rate < best]
    return bool(above and below)


def without(cell: dict, *keys) -> tuple:
    """Returns a cell without some keys, as a key."""
    return tuple(sorted((key, value) for key, value in cell.items() if key not in keys))


def losses_of(pairs) -> tuple[dict, dict]:
    """Returns {settings without a rate: {rate: mean loss of tuning seeds}} and {settings: {seed:
    loss}} of the other seeds. A training that diverged has an infinite loss."""
    tuned, judged = {}, {}
    for cell, line in pairs:
        loss = math.inf if line['loss'] is None else line['loss']
        if cell['seed'] in TUNING:
            rates = tuned.setdefault(without(cell, 'seed', 'learning_rate'), {})
            rates.setdefault(float(cell['learning_rate']), []).append(loss)
        else:
            judged.setdefault(without(cell, 'seed'), {})[cell['seed']] = loss
    means = {key: {rate: statistics.mean(found) for rate, found in rates.items()}
             for key, rates in tuned.items()}
    return means, judged


def rows_of(pairs, baseline: str = 'full') -> list[dict]:
    """Returns a row for each method that three judging seeds or more were trained by, at its best
    rate: its settings, losses, and the comparison with the baseline."""
    tuned, judged = losses_of(pairs)
    rows = []
    for settings, losses in judged.items():
        if len(losses) < 3:
            continue
        cell = dict(settings)
        rates = tuned.get(without(cell, 'learning_rate'), {})
        rate = float(cell['learning_rate'])
        is_best = bool(rates) and min(rates, key=rates.get) == rate
        rows.append(dict(cell=cell, losses=losses, tried=len(rates),
                         is_closed=is_best and is_closed(rates)))
    first = min((row for row in rows if row['cell']['method'] == baseline),
                key=lambda row: statistics.mean(row['losses'].values()))
    others = [row for row in rows if row is not first]
    for row in others:
        row.update(compared(row['losses'], first['losses']))
    for row, p in zip(others, holm([row['p'] for row in others])):
        row['verdict'] = verdict(row, p) if row['is_closed'] and first['is_closed'] else '†'
    return [first, *others]


def main():
    bench, *wanted = sys.argv[1:]
    wanted = dict(pair.split('=') for pair in wanted)
    pairs = [(cell, line) for cell, line in kept(bench) if wanted.items() <= cell.items()]
    print('| method | rate (tried) | seeds | loss, mean (min to max) | difference | verdict |')
    print('| --- | --- | --- | --- | --- | --- |')
    for row in rows_of(pairs):
        losses = row['losses'].values()
        difference = ''
        if 'mean' in row:
            low, high = row['mean'] - row['half95'], row['mean'] + row['half95']
            difference = f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"| {row['cell']['method']} | {row['cell']['learning_rate']} ({row['tried']}) "
              f"| {len(losses)} | {statistics.mean(losses):.3f} ({min(losses):.3f} to "
              f"{max(losses):.3f}) | {difference} | {row.get('verdict', '')} |")


if __name__ == '__main__':
    assert len(sys.argv) > 1 and sys.argv[1] in BENCHES, __doc__
    main()
