"""
Draws the pictures in this folder from the lines of *.jsonl, and renews tables of both README.md; or
draws the confusion matrix of a run of train_vit.py into its folder:

$ python assets/figures.py
$ python assets/figures.py out/vit_quickstart
"""

import contextlib
import functools
import math
import re
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from measure import ADAPT, FRESH, PARAMETERS, TRAININGS, by_method, lasting, sending
from bench import kept, read_lines, title  # measure has put its folder on the path

HERE = Path(__file__).resolve().parent
matplotlib.rcParams.update({'font.size': 11, 'axes.titlesize': 12, 'legend.fontsize': 11})

# -----------------------------------------------------------------------------
# the picture of the first page

FROZEN, TRAINED, BASIS = '#c9ccd1', '#e08a3c', '#5b8fc7'


def box(axes, x, y, width, height, color, words):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor='black'))
    axes.text(x + width / 2, y + height / 2, words, ha='center', va='center')


def draw_method():
    """W, its heads and their merge; a panel for each way, with the words inside each head's two
    factors."""
    ways = (('LoRA: one head, or several', [('B', 'A')], TRAINED, 'merged at the end'),
            ('LTE: a head on each worker', [('B₁', 'A₁'), ('B₂', 'A₂')], TRAINED,
             'every T steps: W ← W + mean B A'),
            ('GaLore: a basis Q of the gradient', [('B', 'Qᵀ')], BASIS,
             'every step: W ← W + B Qᵀ'),
            ('GaLoLTE: one basis for all workers', [('B₁', 'Qᵀ'), ('B₂', 'Qᵀ')], BASIS,
             'every T steps: W ← W + mean B Qᵀ'))
    figure = Figure((14, 3), layout='constrained')
    for axes, (words, heads, color, merge) in zip(figure.subplots(1, 4), ways):
        axes.set(xlim=(0, 9), ylim=(0, 4.9), aspect='equal', title=words)
        axes.axis('off')
        box(axes, 0.6, 1.7, 2.4, 2.4, FROZEN, 'W\n(m, n)')
        axes.text(3.5, 2.9, '+', size=16, ha='center', va='center')
        for number, (first, second) in enumerate(heads):
            y = 1.4 + 0.85 * len(heads) - 1.7 * number
            box(axes, 4.2, y, 0.5, 1.4, TRAINED, first)
            box(axes, 4.85, y + 0.9, 1.4, 0.5, color, second)
            if len(heads) > 1:
                axes.text(6.5, y + 0.75, f'worker {number + 1}', va='center')
        axes.add_patch(FancyArrowPatch((5.2, 0.75), (1.8, 1.6), arrowstyle='-|>', mutation_scale=12,
                                       color='black', connectionstyle='arc3,rad=-0.25'))
        axes.text(4.1, 0.25, merge, ha='center')
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor='black')
               for color in (FROZEN, TRAINED, BASIS)]
    words = ('frozen between merges', 'trained by Adam',
             'taken anew now and then, the same everywhere')
    figure.legend(handles, words, loc='outside lower center', ncols=3, frameon=False)
    figure.savefig(f'{HERE}/method.png', dpi=110)


# -----------------------------------------------------------------------------
# what was measured

FIRST = 'full', 'galore', 'galore_muon', 'muon_lean', 'muon', 'galolte_2bit'  # those of quality.png
OTHERS = 'lte', 'galolte', 'galolte_2bit, merge_every=20', 'local_adamw', 'local_muon'


def dagger(cell):
    """A sign for trainings at 20 bytes a parameter in which Muon had q, k and v as one matrix."""
    return ' †' if 'qkv' in cell else ''


def label(cell, *hidden):
    """A training in words: its method and the settings that this has not, but for the seed."""
    settings = {key: x for key, x in cell['settings'].items() if key not in ('seed', *hidden)}
    words = title(dict(method=cell['method'], settings=settings))
    return words.replace('ranks=4', '4 workers') + dagger(cell)


def trained(name):
    """What is kept of a bench's trainings as it has them today."""
    return [cell for about, _ in TRAININGS[name] for cell in kept(name, **about)]


def losses(cells):
    return [cell['val_loss'] for cell in cells]


def mean_loss(cells):
    return statistics.mean(losses(cells))


def best(name):
    """What `best_of` chooses of a bench's trainings."""
    return best_of(trained(name))


def best_of(cells):
    """{method: its trainings with the most seeds, of these those with the least mean loss}."""
    groups, found = {}, {}
    for cell in cells:
        if cell['val_loss'] is not None:
            groups.setdefault(label(cell), []).append(cell)
    for cells in groups.values():
        method = cells[0]['method']
        found[method] = min(found.get(method, cells), cells,
                            key=lambda cells: (-len(cells), mean_loss(cells)))
    return found


def seconds_of_steps(name):
    """
    Returns {method: seconds of a step (of one process with the work of all workers, of each of 4)}.

    Seconds are the first method's, times the ratio to it. What Muon on whole matrices adds to the
    first method's time is not divided among workers: each does it all.
    """
    cells, found = kept(f'{name}_time'), {}
    settings = {about['method']: s for about, s in by_method(name)}
    full = cells[0]['seconds']
    for cell in cells:
        s, one = settings.get(cell['method'], {}), full * cell['to_full']
        own = one - full if s.get('optimizer') == 'muon' and not s['lowrank'] else 0
        found[cell['method']] = one + (s.get('ranks', 1) - 1) * own, (one - own) / 4 + own
    return found


def sent(model, cell):
    """What `measure.py costs` counted for a training on four workers, or {}."""
    return next(iter(kept('communication', **sending(model, cell))), {})


def all_state(model, cell):
    """Returns megabytes of optimizer state, bases included, of all workers. The log has only those
    of one process, and lacks the moments that a merge with a reset has just dropped."""
    s, state = cell['settings'], cell['optimizer_state_bytes'] / 1e6
    if s.get('merge_reset'):
        return 8 * cell['trainable_parameters'] / 1e6
    if 'ranks' in s:
        return 4 * state
    if s.get('split'):
        return state + 3 * sent(model, cell)['shared'] / 1e6
    return state


def all_trained(cell):
    """Millions of parameters that train, heads of all workers."""
    s = cell['settings']
    return cell['trainable_parameters'] / 1e6 * (4 if 'ranks' in s and s.get('split') else 1)


# -----------------------------------------------------------------------------
# pictures: each draws NAME.png from what is kept


@contextlib.contextmanager
def picture(name, size, shape=(1, 1), columns=3, **sharing):
    """The panels (rows, columns) of assets/NAME.png, with the last one's legend below unless
    columns is 0."""
    figure = Figure(size, layout='constrained')
    panels = figure.subplots(*shape, squeeze=False, **sharing)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    yield panels
    if columns:
        handles = panels.flat[-1].get_legend_handles_labels()
        figure.legend(*handles, loc='outside lower center', ncols=columns)
    figure.savefig(f'{HERE}/{name}.png', dpi=130)


def on_log(axis, *ticks):
    """Makes an axis of a panel logarithmic, with ticks at these numbers alone."""
    axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
    axis.set_ticks(ticks, list(map(str, ticks)))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def band(axes, x, curves, color, label=None):
    """The mean of curves, one a seed, within their range."""
    values = list(zip(*curves))  # a point: one a seed
    x = x[:len(values)]
    lowest, mean, highest = (list(map(of, values)) for of in (min, statistics.mean, max))
    axes.fill_between(x, lowest, highest, color=color, alpha=0.2, lw=0)
    axes.plot(x, mean, color=color, lw=2, label=label)


def bars(middles, ranges):
    """How far the least and the largest of each range are from its middle, as errorbar wants it."""
    pairs = list(zip(middles, ranges))
    return [[y - min(values) for y, values in pairs], [max(values) - y for y, values in pairs]]


def draw_heads():
    """Time of a step, full rank = 1, with the range of its repeats, and trainable parameters,
    against the rank; a panel for each number of heads."""
    cells = kept('heads', device='cpu', dtype='bfloat16', sequences=2, targets='attn')
    cells.sort(key=lambda cell: cell['rank'])
    with picture('heads', (9.5, 4), (1, 3), 4, sharey=True) as panels:
        for axes, heads in zip(panels[0], (1, 4, 16)):
            for name, style in (('parallel', 'o-'), ('sequential', 's--')):
                mine = [cell for cell in cells if (cell['method'], cell['heads']) == (name, heads)]
                ranks, times, ratios, parameters = (
                    [cell[key] for cell in mine]
                    for key in ('rank', 'to_full', 'ratios', 'trainable_to_full'))
                axes.errorbar(ranks, times, bars(times, ratios), fmt=style, capsize=3, label=name)
            axes.plot(ranks, parameters, '^:', color='grey', label='trained parameters')
            axes.axhline(1.0, color='black', lw=1, label='full rank')
            on_log(axes.xaxis, *ranks)
            axes.set(title=f'heads: {heads}', xlabel='rank of each head')
        panels[0, 0].set(ylabel='time, parameters; full rank = 1', ylim=(0, None))


def draw_memory(name, panels):
    """Peak memory by category and method, stacked; black is what was measured. panels: {title: what
    its lines have}."""
    categories = {'weights': '#4c72b0', 'state': '#dd8452', 'gradients': '#c44e52',
                  'activations': '#8c8c8c'}
    with picture(name, (10.5, 7.5), (1, len(panels)), 5, sharey=True) as (row,):
        for axes, (words, about) in zip(row, panels.items()):
            cells = kept('memory', **about)
            names = [cell['method'].replace(', ', ',\n') for cell in cells]
            left = [0.0] * len(cells)
            for category, color in categories.items():
                values = [cell.get(category, 0) / 1e9 for cell in cells]
                axes.barh(names, values, left=left, color=color,
                          label=category if any(values) else None)
                left = [a + b for a, b in zip(left, values)]
            measured = [cell.get('measured', math.nan) / 1e9 for cell in cells]
            axes.plot(measured, names, '|', ms=30, mew=2, color='black')
            axes.set(title=words, xlabel='GB')
        axes.invert_yaxis()  # of all, as they share it


def draw_losses(name, bench, methods, shape, *panels):
    """
    Draws a bench's trainings, a color for each method, into assets/NAME.png.

    A panel: what x is; a function that gives x of a training at its end, or of a step of its curve;
    the key of that curve, or None; ticks of a logarithmic x, or None.
    """
    found, colors = best(bench), matplotlib.colormaps['tab20'].colors
    with picture(name, (10.5, 1 + 4 * shape[0]), shape, 3, sharey='row') as grid:
        for axes, (words, x_of, key, ticks) in zip(grid.flat, panels):
            for number, method in enumerate(methods):
                mine, color = found[method], colors[2 * number % 19]
                x = x_of(mine[0])
                if key:
                    steps = [x * step for step in mine[0]['curve']['step'][1:]]
                    curves = [cell['curve'][key][1:] for cell in mine]
                    band(axes, steps, curves, color, method)
                else:
                    y = mean_loss(mine)
                    axes.errorbar(x, y, bars([y], [losses(mine)]), fmt='os^vDP*Xphd'[number], ms=8,
                                  capsize=3, color=color, label=method)
            axes.set(xlabel=words)
            if ticks:
                on_log(axes.xaxis, *ticks)
        for axes, what in zip(grid[:, 0], ('loss, nats', 'accuracy')):
            axes.set(ylabel=f'validation {what}')


def draw_trainings():
    """Loss of the finalists against steps, time and bytes of optimizer state; against bytes sent,
    and time where these go over a link of so many Mbit a second. How a ViT adapts."""
    times, epoch = seconds_of_steps('quality'), 1078 / ADAPT['batch_size']  # steps

    def sent_in(cell):
        return sent('quality', cell)['wire'] / 1e6

    def linked(speed):
        return lambda cell: times[cell['method']][1] + 8 * sent_in(cell) / speed
    draw_losses(
        'quality', 'quality', FIRST, (1, 3), ('step', lambda cell: 1, 'val_loss', None),
        ('seconds of one CPU thread', lambda cell: times[cell['method']][0], 'val_loss', None),
        ('MB of optimizer state, all workers', functools.partial(all_state, 'quality'), None,
         (0.5, 2, 10, 50)))
    draw_losses(
        'links', 'quality', (*FIRST, *OTHERS), (1, 3),
        ('MB that each of four sends a step', sent_in, None, (0.1, 1, 10, 100)),
        ('seconds, links of 1 Gbit/s', linked(1000), 'val_loss', (30, 100, 300, 600)),
        ('seconds, links of 100 Mbit/s', linked(100), 'val_loss', (30, 100, 300, 1000, 3000)))
    seconds = seconds_of_steps('convergence')
    draw_losses(
        'convergence', 'convergence', best('convergence'), (2, 2),
        *((words, x_of, key, None) for key in ('val_loss', 'val_acc') for words, x_of in (
            ('epochs', lambda cell: 1 / epoch),
            ('seconds of one CPU thread', lambda cell: seconds[cell['method']][0]))))


def draw_frontier():
    """Validation loss of the screening against bytes on the wire, of methods that send at merges:
    the best training by T and bits, first seed. Lines for some that send after every step."""
    series, colors = {}, {}
    for cell in trained('screening'):
        s, wire = cell['settings'], sent('screening', cell).get('wire')
        if wire and cell['val_loss'] and 'seed' not in s and s.get('merge_every', 0) > 1:
            method = cell['method'].removesuffix(', sync_bits=2')
            colors.setdefault(method, f'C{len(colors)}')
            points = series.setdefault((method, s.get('sync_bits', 32)), {})
            point = cell['val_loss'], wire / 1e6
            points[s['merge_every']] = min(points.get(s['merge_every'], point), point)
    with picture('frontier', (10, 6)) as ((axes,),):
        for (method, bits), points in series.items():
            color, (ys, xs) = colors[method], zip(*sorted(points.values(), reverse=True))
            axes.plot(xs, ys, {32: 'o-', 4: 's-', 2: '^-'}[bits], lw=1, color=color)
            for T, (y, x) in points.items():
                axes.annotate(T, (x, y), (4, 4), textcoords='offset points', color=color)
        for method, color in colors.items():
            axes.plot([], color=color, label=method)
        for method in ('full', 'galore', 'galore_muon', 'muon'):
            mine = best('screening')[method]
            loss, wire = mean_loss(mine), sent('screening', mine[0])['wire'] / 1e6
            axes.axhline(loss, color='grey', lw=1, ls=':')
            axes.text(0.01, loss + 0.005, f'{method}: {wire:.0f} MB after every step', color='grey',
                      transform=axes.get_yaxis_transform())
        on_log(axes.xaxis, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
        axes.set(xlabel='MB that each of four workers sends a step (ring)',
                 ylabel='validation loss (nats a byte)',
                 title='numbers: T; circles: 32 bits a number, squares: 4, triangles: 2')


def draw_layers():
    """Validation loss against trainable parameters; bars from the least to the largest of seeds."""
    with picture('layers', (8, 5), columns=0) as ((axes,),):
        for method, mine in best('layers').items():
            layers, mean = method.partition('lowrank=')[2], mean_loss(mine)
            trained = mine[0]['trainable_parameters'] / 1e6
            axes.errorbar(trained, mean, bars([mean], [losses(mine)]), fmt='o', capsize=3,
                          color='C0' if layers else 'black')
            to_right = 'logit' in layers  # these move a point only a little to the right
            axes.annotate(layers or 'none', (trained, mean), (6 if to_right else -6, 5),
                          textcoords='offset points', ha='left' if to_right else 'right')
        axes.margins(0.15)
        axes.set(xlabel='trainable parameters, millions', ylabel='validation loss, nats a byte',
                 title='four split heads on these layers')


def draw_length():
    """Draws the loss at the end of a training against its length, those of the longest apart; and,
    against optimizer state, the bytes that AdamW needs for a method's loss at 20 bytes a parameter,
    divided by these bytes."""
    found, means = judges(), curves()
    longest = max(FRESH)
    colors = matplotlib.colormaps['tab10'].colors
    with picture('length', (10.5, 5), (1, 2)) as ((left, right),):
        inset = left.inset_axes([0.5, 0.48, 0.47, 0.42])
        for number, (name, cells) in enumerate(found[20].items()):
            mine, look = means[name], dict(marker='os^vDP'[number], color=colors[number])
            ranges = [losses(found[times][name]) for times in mine]
            left.errorbar([*mine], [*mine.values()], bars(mine.values(), ranges), capsize=3, lw=1,
                          **look)
            if longest in mine:
                last = mine[longest]
                inset.errorbar([number], [last], bars([last], ranges[-1:]), capsize=3, **look)
            sign, theirs = bytes_for(mine[20], means['full'])
            state = cells[0]['optimizer_state_bytes'] / 1e6
            shown = 'AdamW (full)' if name == 'full' else name
            right.plot(state, theirs / 20, ms=9, ls='', label=shown, **look)
            if sign:
                right.annotate(sign, (state, theirs / 20), (-14, -4), textcoords='offset points')
        on_log(left.xaxis, *FRESH)
        on_log(right.xaxis, 0.1, 0.2, 0.5, 1, 2, 4)
        inset.set(xticks=[], title=f'after {longest}')
        left.set(xlabel='bytes a parameter', ylabel='validation loss, nats a byte')
        right.set(xlabel='MB of optimizer state', ylim=(0, None),
                  ylabel="AdamW's bytes for the same loss, over its own")


# -----------------------------------------------------------------------------
# tables


def renew(page, mark, head, rows, end=''):
    """Renews the table between two markers in a page; head and rows: tuples of columns."""
    path = HERE / page
    lines = [f"| {' | '.join(row)} |" for row in (head, ['---'] * len(head), *rows)]
    if end:
        lines += ['', end]
    before, there, rest = path.read_text('utf-8').partition(f'<!-- {mark} -->\n')
    if not there:
        raise ValueError(f'{page} has no line <!-- {mark} -->')
    after = rest.partition('<!-- end -->\n')[2]
    path.write_text('\n'.join([before + there.strip(), *lines, '<!-- end -->', after]), 'utf-8')


def method_rows():
    """What the first lines of config/methods say, and what a method brought at 20 bytes a
    parameter, with no setting but the rank in its name."""
    judged, tuned = judges()[20], best_of(tuning())
    by_file = {name.split(', ')[0]: mine for name, mine in {**tuned, **judged}.items()
               if re.fullmatch(r'\w+(, rank=\d+)?', name)}
    state = tuned['full'][0]['optimizer_state_bytes']
    for path in sorted(HERE.parent.glob('config/methods/*.py')):
        first = path.read_text('utf-8').partition('\n')[0]
        less = share = ''
        if mine := by_file.get(path.stem):
            theirs = (judged if 'seed' in mine[0]['run'] else tuned)['full']
            seeds = 'one seed' if len(mine) == 1 else f'{len(mine)} seeds'
            rank = mine[0]['settings'].get('rank', 1)
            about = seeds if rank == 1 else f'{seeds}, rank {rank}'
            less = f'{less_than(mine, theirs)[0]} ({about}){dagger(mine[0])}'
            of_one = not mine[0]['settings'].get('split') or 'ranks' in mine[0]['settings']
            if of_one:  # else one process held the heads of all workers
                share = f"{mine[0]['optimizer_state_bytes'] / state:.0%}"
        if path.stem == 'full':
            less = f'{mean_loss(mine):.3f} nats a byte ({seeds})'
        words = first.removeprefix('# ').strip()
        yield f'[`{path.stem}`](config/methods/{path.name})', words, less, share


def mean_and_range(found):
    spread = 'one seed'
    if len(found) > 1:
        spread = f'{min(found):.3f} to {max(found):.3f}; {len(found)}'
    return f'{statistics.mean(found):.3f} ({spread})'


def less_than(mine, others, digits=3):
    """The mean loss of trainings less that of others with the same seed, and its standard error, in
    words; '' of one pair."""
    theirs = {cell['settings'].get('seed', 1337): cell['val_loss'] for cell in others}
    seeds = [cell['settings'].get('seed', 1337) for cell in mine]
    pairs = [cell['val_loss'] - theirs[seed] for cell, seed in zip(mine, seeds) if seed in theirs]
    error = ''
    if len(pairs) > 1:
        error = f'{statistics.stdev(pairs) / len(pairs)**0.5:.{digits}f}'
    return f'{statistics.mean(pairs):+.{digits}f}', error


def quality_rows():
    """The finalists, each at its best rate, by their loss."""
    times = seconds_of_steps('quality')
    for mine in sorted(best('quality').values(), key=mean_loss):
        first, wire = mine[0], sent('quality', mine[0]).get('wire')
        time = times.get(first['method'])
        yield (label(first), f'{all_trained(first):.1f}M', f"{all_state('quality', first):.3g} MB",
               f'{wire / 1e6:.3g} MB' if wire else '',
               f"{time[0] / times['full'][0]:.2f}" if time else '',
               mean_and_range(losses(mine)))


def other_rates(name, mine):
    """Mean losses of the trainings that differ in their rate alone, in words."""
    rates = {}
    for cell in trained(name):
        alike = label(cell, 'learning_rate') == label(mine[0], 'learning_rate')
        if alike and label(cell) != label(mine[0]):
            rates.setdefault(cell['settings']['learning_rate'], []).append(cell['val_loss'])
    means = {rate: 'diverged' if None in found else f'{statistics.mean(found):.3f}'
             for rate, found in sorted(rates.items())}
    return ', '.join(f'{rate:g}: {mean}' for rate, mean in means.items())


def rate_rows():
    """The finalists' other rates."""
    for mine in sorted(best('quality').values(), key=mean_loss):
        if words := other_rates('quality', mine):
            yield mine[0]['method'], words


def rival_rows(name, *costs):
    """Methods of one process in a bench, by their loss. costs: more columns, {method: words}."""
    found = best(name)
    for mine in sorted(found.values(), key=mean_loss):
        if 'ranks' not in mine[0]['settings']:
            less, error = less_than(mine, found['full'])
            if error:
                less += f' ({error})'
            yield (label(mine[0]), f'{all_state(name, mine[0]):.1f} MB',
                   *(cost.get(mine[0]['method'], '') for cost in costs),
                   mean_and_range(losses(mine)), '' if mine is found['full'] else less,
                   other_rates(name, mine))


def sixteen_rows():
    """Weights in few bits against float32, of equal settings and seed."""
    wide = best('quality')
    for method, mine in best('sixteen').items():
        theirs = wide[method.split(',')[0]]
        both = [', '.join(f'{x:.3f}' for x in losses(cells)) for cells in (mine, theirs)]
        weights = '8 bits' if 'param_bits' in method else 'bfloat16'
        yield method.split(',')[0], weights, *both, *less_than(mine, theirs, 4)


def eight_rows():
    """Weights of 32, 16 and 8 bits at two rates, of equal seeds."""
    for rate in (0.02, 0.002):
        cells = [cell for cell in trained('eight') if cell['settings']['learning_rate'] == rate]
        for method in ('galore', 'galore, param_dtype=bfloat16', 'galore, param_bits=8'):
            mine = [cell for cell in cells if cell['method'] == method]
            theirs = [cell for cell in cells if cell['method'] == 'galore']
            less = less_than(mine, theirs) if method != 'galore' else ('', '')
            yield f'{rate:g}', method, ', '.join(f'{x:.3f}' for x in losses(mine)), *less


def tuning():
    """Trainings at 20 bytes a parameter, of the usual batch, that tune; none in a basis of all
    directions."""
    usual = lasting(20)
    return [cell for cell in trained('twenty') if 'seed' not in cell['run']
            and {**cell['run'], **usual} == cell['run']
            and cell['settings'].get('rank') != usual['n_embd']]


def twenty_rows():
    """All trainings of the bench that tune, those of a method, length, batch and decay in a row;
    inf: it diverged."""
    rows = {}
    for cell in trained('twenty'):
        run = cell['run']
        if 'seed' in run:
            continue
        name = label(cell, 'learning_rate', 'weight_decay', *lasting(20))
        batch = run['batch_size'] * run['block_size']
        times = round(run['max_iters'] * batch / PARAMETERS[run['n_embd']])
        row = name, times, f'{batch:,}', f"{cell['settings']['weight_decay']:g}"
        loss = math.inf if cell['val_loss'] is None else cell['val_loss']
        rows.setdefault(row, []).append((run['learning_rate'], loss))
    for row, found in rows.items():
        least = min(loss for _, loss in found)
        yield (*map(str, row), f'{least:.3f}',
               ', '.join(f'{rate:g}: {loss:.3f}' for rate, loss in sorted(found)))


def judges():
    """{bytes a parameter: {method: its trainings whose seeds have tuned nothing}}; where there are
    several rates, as of AdamW, and of Muon and muon_lean at 80, at the best one."""
    cells = [cell for cell in trained('twenty') if 'seed' in cell['run']]
    return {times: best_of(cell for cell in cells
                           if cell['run']['max_iters'] == lasting(times)['max_iters'])
            for times in FRESH}


def curves():
    """{method: {bytes a parameter: mean loss of the seeds that judge}}."""
    found = {}
    for times, methods in judges().items():
        for name, cells in methods.items():
            found.setdefault(name, {})[times] = mean_loss(cells)
    return found


def bytes_for(loss, curve):
    """Returns ('', the bytes a parameter at which a curve reaches a loss): between two lengths the
    loss is linear in their logarithm. Outside: ('<', the first length) or ('>', the last one)."""
    points = sorted(curve.items())
    if loss > points[0][1]:
        return '<', points[0][0]
    for (less, above), (more, below) in zip(points, points[1:]):
        if loss >= below:
            part = (above - loss) / (above - below)
            return '', less * (more / less) ** part
    return '>', points[-1][0]


def judged_rows():
    """Methods by their loss at 20 bytes a parameter: what the fresh seeds say."""
    found, means = judges(), curves()
    times = {cell['method']: cell['to_full'] for cell in kept('speed', of='twenty')}
    peaks = {cell['method']: cell['total'] / 1e6 for cell in kept('memory', of='twenty')}
    for name, mine in sorted(found[20].items(), key=lambda pair: mean_loss(pair[1])):
        less, more = [], []
        for length in (5, 20, 80):
            words, cells = '', found[length]
            if name not in cells:
                more.append('?')
            elif name != 'full':
                difference, error = less_than(cells[name], cells['full'])
                words = f"{difference} ({error or 'one seed'}){dagger(cells[name][0])}"
                sign, theirs = bytes_for(means[name][length], means['full'])
                more.append(f'{sign}{theirs / length:.2f}')
            less.append(words)
        sign, own = bytes_for(means['full'][20], means[name])
        yield (label(mine[0], *lasting(20)), mean_and_range(losses(mine)), *less,
               ', '.join(more), f'{sign}{own / 20 * times[name]:.2f}',
               f"{mine[0]['optimizer_state_bytes'] / 1e6:.2f} MB",
               f"{sent('twenty', mine[0])['wire'] / 1e6:.2f} MB", f'{peaks[name]:.0f} MB')


def card_rows():
    """What `bench.py card` has kept of steps; of what failed the error."""
    for cell in kept('card', what='step'):
        compiled = ', compiled' if cell['compile'] else ''
        row = cell['model'], cell['method'], cell['dtype'] + compiled
        if 'error' in cell:
            yield *row, cell['error'], '', '', '', ''
            continue
        mfu = f"{100 * cell['mfu']:.1f}%" if 'mfu' in cell else ''
        yield (*row, f"{1000 * cell['seconds']:.1f}", f"{cell['items_per_s']:,.0f}", mfu,
               str(cell['launches']), f"{cell['measured'] / 1e9:.2f} ({cell['planned'] / 1e9:.2f})")


def renew_tables():
    head = ('method', 'what it is, and learning rates that were good',
            "loss minus AdamW's (20 bytes of text a parameter)",
            "state of one worker, of AdamW's")
    renew('../README.md', 'methods', head, method_rows())
    dates, machines, torches = (sorted({cell[key] for cell in trained('quality')})
                                for key in ('date', 'machine', 'torch'))
    head = ('method', 'trained', 'optimizer state', 'sent a step', 'time of a step',
            'validation loss: mean (range; seeds)')
    renew('README.md', 'quality', head, quality_rows(),
          f"`python assets/measure.py quality`, {dates[0]} to {dates[-1]}, "
          f"{' and '.join(machines)}, torch {' and '.join(torches)}; then "
          '`python assets/figures.py`.')
    renew('README.md', 'rates', ('method', 'validation loss at other learning rates'), rate_rows())
    head = ('method', 'optimizer state', 'loss (range; seeds)', "less full rank's (its error)",
            'at other rates')
    times = {cell['method']: f"{cell['to_full']:.2f}" for cell in kept('speed', of='screening')}
    peaks = {cell['method']: f"{cell['total'] / 1e6:.0f}"
             for cell in kept('memory', of='screening')}
    renew('README.md', 'rivals', (*head[:2], 'time of a step', 'peak memory, MB', *head[2:]),
          rival_rows('screening', times, peaks))
    for name in ('english', 'longer', 'smaller', 'larger', 'largest'):
        renew('README.md', name, head, rival_rows(name))
    head = 'method', 'weights', 'losses', 'in float32', 'difference', 'its error'
    renew('README.md', 'sixteen', head, sixteen_rows())
    head = 'rate', 'method', 'losses of three seeds', "less float32's", 'its error'
    renew('README.md', 'eight', head, eight_rows())
    head = ('method', 'bytes a parameter', 'a step', 'decay', 'least loss',
            'losses at learning rates')
    renew('README.md', 'twenty', head, twenty_rows())
    head = ('method', 'loss (range; seeds)', "less AdamW's at 5", 'at 20', 'at 80',
            "AdamW's bytes for its loss at 5, 20, 80", "its time to AdamW's", 'optimizer state',
            'sent a step', 'peak (planned)')
    renew('README.md', 'judged', head, judged_rows())
    if cells := kept('card'):
        head = ('model', 'method', 'computed in', 'ms a step', 'tokens or images a second', 'MFU',
                'kernels a step', 'peak, GB (planned)')
        renew('README.md', 'card', head, card_rows(),
              f"{cells[0]['machine']}, torch {cells[0]['torch']}, {cells[0]['date']}.")


# -----------------------------------------------------------------------------
# a run's own


def draw_confusion(out_dir):
    """Draws out_dir/confusion.png of the last test in a log: counts (of up to 40 classes), and as
    color the share of each true class."""
    records = [record for name in ('eval.jsonl', 'log.jsonl')  # what a run itself has tested counts
               for record in read_lines(f'{out_dir}/{name}') if 'test_confusion' in record]
    if not records:
        raise SystemExit(f"'{out_dir}' has no log of a test with a confusion matrix (images with "
                         'several labels have none): give the '
                         'out_dir of a run of train_vit.py that has ended')
    matrix, classes = np.array(records[-1]['test_confusion']), records[-1]['classes']
    few = len(classes) <= 40
    size = 2.5 + 0.45 * min(len(classes), 40)
    figure = Figure((size, size), layout='constrained')
    axes = figure.subplots()
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for (true, said), count in np.ndenumerate(matrix) if few else ():
        color = 'white' if share[true, said] > 0.5 else 'black'
        axes.text(said, true, count, ha='center', va='center', size=8, color=color)
    names = [name if len(name) < 25 else f'{name[:23]}..' for name in classes]
    look = dict(parse_math=False, size=10 if few else 400 / len(classes))
    axes.set_xticks(range(len(names)), names, rotation=90, **look)
    axes.set_yticks(range(len(names)), names, **look)
    axes.set(xlabel='predicted', ylabel='true')
    figure.savefig(f'{out_dir}/confusion.png', dpi=120)
    print(f'{out_dir}/confusion.png shows how often each class was taken for each')


if __name__ == '__main__' and sys.argv[1:]:
    draw_confusion(sys.argv[1])
elif __name__ == '__main__':
    draw_method()
    draw_heads()
    draw_memory('memory', {f'LLaMA {size.upper()}': dict(size=size)
                           for size in ('60m', '350m', '1b', '7b')})
    draw_memory('vit', {f'{size}, 32 images': dict(size=size, images=32)
                        for size in ('ViT-B', 'ViT-L')})
    draw_trainings()
    draw_frontier()
    draw_layers()
    draw_length()
    renew_tables()
    print('the pictures of assets/ are drawn, and the tables of both README.md are renewed')
