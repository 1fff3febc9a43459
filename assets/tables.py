"""
Compares methods by the lines of a bench, and prints a table:

$ python assets/tables.py twenty n_embd=96 times=20 baseline=full,weight_decay=0.0

A row is a method at the learning rate that is best on the tuning seeds, trained by three or more
fresh seeds. It has the difference from the baseline on the same seeds with a 95% interval: by pairs
of seeds or by Welch's formula, whichever is wider. Holm's correction is over the rows. Verdicts:

    lower, higher   significant, and the mean difference is above 0.02 nats
    level           the 90% interval lies within 0.02
    open            anything else
    diverged        a seed did not end
    †               the best rate is not between two worse ones, half and twice as large: no verdict
"""

import math
import statistics
import sys

from scipy import stats

from measure import BENCHES, kept

TUNING = '1337', '1338'  # seeds
SMALL = 0.02  # nats: what the choice of a rate within a factor of 2 moves


def compared(mine: dict, others: dict) -> dict:
    """Returns how losses {seed: loss} differ from a baseline's: seeds, mean, the 95% and the 90%
    interval (half their widths), and p, of the test whose interval is wider."""
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
    """Returns the rows of the table, that of the baseline first. baseline: settings that only its
    cells have. Of a method whose rate was not tuned, the rate with most fresh seeds is taken."""
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


def main():
    bench, *wanted = sys.argv[1:]
    wanted = dict(pair.split('=', 1) for pair in wanted)
    method, *settings = wanted.pop('baseline', 'full').split(',')
    baseline = {'method': method, **dict(pair.split('=') for pair in settings)}
    pairs = [(cell, line) for cell, line in kept(bench) if wanted.items() <= cell.items()]
    print('| method | rate (tried) | seeds | loss, mean (min to max) | difference | verdict |')
    print('| --- | --- | --- | --- | --- | --- |')
    for row in rows_of(pairs, baseline):
        cell, losses, difference = row['cell'], row['losses'].values(), ''
        if 'mean' in row:
            low, high = row['mean'] - row['half95'], row['mean'] + row['half95']
            difference = f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        last = 'diverged' if math.inf in losses else row.get('verdict', '')
        shown = 'target_modules', 'optim_bits', 'muon_rows'
        own = {key: cell[key] for key in shown if key in cell}
        name = ', '.join([cell['method'], *(f'{key}={value}' for key, value in own.items())])
        print(f"| {name} | {row['rate']} ({row['tried']}) | {len(losses)} | "
              f"{mean_of(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | "
              f"{difference} | {last} |")


if __name__ == '__main__':
    trainings = [name for name, (_, _, grid) in BENCHES.items() if 'learning_rate' in grid]
    assert len(sys.argv) > 1 and sys.argv[1] in trainings, __doc__
    main()
