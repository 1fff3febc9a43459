"""
Draws the pictures in this folder from the lines of *.jsonl, and renews the tables of both README.md.

$ python assets/figures.py
"""

import contextlib
import json
import statistics
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bench import kept, memory_cells
from measure import ADAPT, FINAL, TRAININGS, sending

# -----------------------------------------------------------------------------
# the picture of the first page

FROZEN, TRAINED, BASIS = '#c9ccd1', '#e08a3c', '#5b8fc7'


def box(axes, x, y, width, height, color, words, size=9):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor='black', linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, words, ha='center', va='center', size=size)


def draw_method():
    """W, its heads and their merge; a panel for each way, with the words inside each head's two factors."""
    one, two = [('B', 'A')], [('B₁', 'A₁'), ('B₂', 'A₂')]
    ways = (('LoRA: one head (or several, all at once)', one, TRAINED, 'merged at the end'),
            ('LTE: a head on each worker', two, TRAINED, 'merged every T steps: W ← W + mean B A'),
            ('GaLore (T = 1), GaLoLTE (T > 1)', [('P', 'A₁'), ('P', 'A₂')], BASIS,
             'merged every T steps; P: a basis of the gradient'))
    figure = Figure((11, 2.9), layout='constrained')
    for axes, (title, heads, left, merge) in zip(figure.subplots(1, 3), ways):
        axes.set(xlim=(0, 10), ylim=(0, 6.1), aspect='equal')
        axes.axis('off')
        axes.set_title(title, size=11)
        box(axes, 0.6, 1.7, 2.4, 2.4, FROZEN, 'W\n(m, n)', 11)
        axes.text(3.5, 2.9, '+', size=16, ha='center', va='center')
        for number, (first, second) in enumerate(heads):
            y = 2.9 + (len(heads) - 1) * 0.85 - number * 1.7 - 0.65
            box(axes, 4.2, y, 0.5, 1.4, left, first)
            box(axes, 4.85, y + 0.9, 1.4, 0.5, TRAINED, second)
            if len(heads) > 1:
                axes.text(6.5, y + 0.75, f'worker {number + 1}', size=8, va='center', color='#555555')
        axes.add_patch(FancyArrowPatch((5.2, 0.75), (1.8, 1.6), arrowstyle='-|>', mutation_scale=12,
                                       color='#444444', connectionstyle='arc3,rad=-0.25'))
        axes.text(4.1, 0.25, merge, size=9, ha='center', color='#444444')
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor='black')
               for color in (FROZEN, TRAINED, BASIS)]
    words = 'frozen between merges', 'trained by Adam', 'taken anew now and then, the same everywhere'
    figure.legend(handles, words, loc='outside lower center', ncols=3, frameon=False, fontsize=9)
    figure.savefig(f'{HERE}/method.png', dpi=110)


# -----------------------------------------------------------------------------
# what was measured


def label(cell):
    """A training's method and what it sets, in a few words."""
    forms = dict(heads='H = {}', rank='r = {}', alpha='alpha = {:g}', merge_every='T = {}', basis='{} bases',
                 basis_every='every {}', sync_moments='moments of their own', beta2='beta2 {:g}',
                 ranks='{} workers', learning_rate='lr {:g}')
    s = cell['settings']
    return ', '.join([cell['method'], *(form.format(s[key]) for key, form in forms.items() if key in s)])


def trained(name):
    """What is kept of a bench's trainings as it has them today."""
    return [cell for about, _ in TRAININGS[name] for cell in kept(name, **about)]


def losses(cells):
    return [cell['val_loss'] for cell in cells]


def groups(name):
    """{method: [its trainings that differ in their seed alone, ...]} of what did not diverge: the group with
    the most seeds comes first, of these the one with the least loss."""
    found = {}
    for cell in trained(name):
        if cell['val_loss'] is not None:
            others = found.setdefault(cell['method'], {})
            others.setdefault(json.dumps({**cell['settings'], 'seed': 0}, sort_keys=True), []).append(cell)

    def order(group):
        return -len(group), statistics.mean(losses(group))
    return {name: sorted(others.values(), key=order) for name, others in found.items()}


def seconds_of_steps(name):
    """{method: (of one process that does the work of all workers, of each of four workers)}, seconds of a
    step: those of the first method times the ratio to it. What Muon of whole matrices adds to the first is
    each worker's own work."""
    cells, found = kept(f'{name}_time'), {}
    settings = {about['method']: s for about, s in reversed(TRAININGS[name])}
    for cell in cells:
        s, one = settings.get(cell['method'], {}), cells[0]['seconds'] * cell['to_full']
        each = one - cells[0]['seconds'] if s.get('optimizer') == 'muon' and not s.get('lowrank') else 0
        found[cell['method']] = one + (s.get('ranks', 1) - 1) * each, (one - each) / 4 + each
    return found


def sent(model, cell):
    """What `measure.py costs` counted for a training on four workers, or {}."""
    return next(iter(kept('communication', **sending(model, cell['method'], cell['settings']))), {})


def all_state(model, cell):
    """Bytes of a training's optimizer state, bases included, of all workers; the log has those of one
    process, and not those that a merge with a reset has just dropped."""
    s = cell['settings']
    if s.get('merge_reset'):
        return 8 * cell['trainable_parameters']
    if 'ranks' in s:
        return 4 * cell['optimizer_state_bytes']
    return cell['optimizer_state_bytes'] + (3 * sent(model, cell)['shared'] if s.get('split') else 0)


def all_trained(cell):
    """Millions of parameters that train, heads of all workers."""
    s = cell['settings']
    return cell['trainable_parameters'] / 1e6 * (4 if 'ranks' in s and s.get('split') else 1)


# -----------------------------------------------------------------------------
# pictures: each draws NAME.png from what is kept


@contextlib.contextmanager
def picture(name, size, shape=(1, 1), columns=3, grid=True, **sharing):
    """The panels (rows, columns) of assets/NAME.png, with the last one's legend below unless columns is 0."""
    figure = Figure(size, layout='constrained')
    panels = figure.subplots(*shape, squeeze=False, **sharing)
    yield panels
    for axes in panels.flat if grid else ():
        axes.grid(alpha=0.3)
    if columns:
        handles = panels.flat[-1].get_legend_handles_labels()
        figure.legend(*handles, loc='outside lower center', ncols=columns, fontsize=8)
    figure.savefig(f'{HERE}/{name}.png', dpi=130)


def band(axes, x, curves, color, label=None):
    """The mean of curves, one a seed, within their range."""
    values = list(zip(*curves))  # a point: one a seed
    x = x[:len(values)]
    axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2, lw=0)
    axes.plot(x, list(map(statistics.mean, values)), color=color, lw=1.5, label=label)


def look(number):
    """The color and the marker of a method; of 19 and 15, so that their pairs differ."""
    return colormaps['tab20'].colors[2 * number % 19], 'os^vDP*Xph<>dH8'[number % 15]


def bars(middle, values):
    """How far the least and the largest of values are from the middle, as errorbar wants them."""
    return [[middle - min(values)], [max(values) - middle]]


def draw_heads():
    """Time of a step, full rank = 1, with the range of its repeats, and trainable parameters, against the
    rank; a panel for each number of heads."""
    cells = sorted(kept('heads', device='cpu', dtype='bfloat16', sequences=2, targets='attn'),
                   key=lambda cell: cell['rank'])
    with picture('heads', (9.3, 3.4), (1, 3), 4, sharey=True) as panels:
        for axes, count in zip(panels[0], (1, 4, 16)):
            for name, style, color in (('parallel', 'o-', 'C0'), ('sequential', 's--', 'C1')):
                mine = [cell for cell in cells if (cell['method'], cell['heads']) == (name, count)]
                ranks = [cell['rank'] for cell in mine]
                axes.plot(ranks, [cell['to_full'] for cell in mine], style, color=color, label=name)
                for cell in mine:
                    axes.errorbar(cell['rank'], cell['to_full'], bars(cell['to_full'], cell['ratios']),
                                  color=color, capsize=3)
            axes.plot(ranks, [cell['trainable_to_full'] for cell in mine], '^:', color='grey',
                      label='trained parameters')
            axes.axhline(1.0, color='black', lw=1, label='full rank')
            axes.set_xscale('log', base=2)
            axes.set_xticks(ranks, ranks)
            axes.set(title=f"{count} head{'s' * (count > 1)}", xlabel='rank of each head')
        panels[0, 0].set(ylabel='time, parameters; full rank = 1', ylim=(0, None))


def draw_memory():
    """Peak memory by category and method, stacked, and what was measured as a line: LLaMA, and ViT."""
    categories = {'weights': ('#4c72b0', 'weights'), 'state': ('#dd8452', 'optimizer state'),
                  'gradients': ('#c44e52', 'gradients'),
                  'activations': ('#8c8c8c', 'activations and buffers')}
    panels = {}
    for about, _ in memory_cells():
        name = f"{about['size']}, 32 images" if 'images' in about else f"LLaMA {about['size'].upper()}"
        if about.get('images') != 4:
            panels.setdefault(name, []).extend(kept('memory', **about))
    for name, titles in (('memory', list(panels)[:-2]), ('vit', list(panels)[-2:])):
        rows = len(panels[titles[0]])
        size = 3.1 * len(titles), 1 + 0.5 * rows
        with picture(name, size, (1, len(titles)), 5, False, sharey=True) as all_axes:
            for axes, title in zip(all_axes[0], titles):
                cells, left = panels[title], [0.0] * rows
                names = [cell['method'].replace(', ', ',\n').replace('the same', 'all that')
                         for cell in cells]
                for key, (color, category) in categories.items():
                    values = [cell.get(key, 0) / 1e9 for cell in cells]
                    axes.barh(names, values, left=left, color=color, label=category if any(values) else None)
                    left = [a + b for a, b in zip(left, values)]
                measured = [(cell['measured'] / 1e9, i - 0.4, i + 0.4) for i, cell in enumerate(cells)
                            if 'measured' in cell]
                if measured:
                    axes.vlines(*zip(*measured), color='black', lw=2, label='measured')
                axes.set(title=title, xlabel='peak memory, GB')
                axes.tick_params('y', labelsize=7)
            axes.invert_yaxis()  # of all, as they share it


def draw_quality():
    """Validation loss of the finalists against steps, time and the optimizer's bytes."""
    found, times = groups('quality'), seconds_of_steps('quality')
    with picture('quality', (11, 4.4), (1, 3), 4, sharey=True) as ((by_step, by_time, by_bytes),):
        for number, (name, (mine, *_)) in enumerate(found.items()):
            (color, marker), steps = look(number), mine[0]['curve']['step']
            curves = [cell['curve']['val_loss'] for cell in mine]
            band(by_step, steps, curves, color)
            if name in times:
                band(by_time, [step * times[name][0] for step in steps], curves, color)
            mean = statistics.mean(losses(mine))
            by_bytes.errorbar(all_state('quality', mine[0]) / 1e6, mean, bars(mean, losses(mine)),
                              color=color, fmt=marker, capsize=3,
                              label=f"{name} ({len(mine)} seed{'s' * (len(mine) > 1)})")
        shown = [loss for mine, *_ in found.values() for cell in mine
                 for step, loss in zip(cell['curve']['step'], cell['curve']['val_loss']) if step >= 400]
        by_step.set(xlabel='step', ylabel='validation loss (nats a byte)', xlim=(400, FINAL['max_iters']),
                    ylim=(min(shown) - 0.02, max(shown) + 0.02))
        by_time.set(xlabel='training, s (one CPU thread)',
                    xlim=(400 * min(times.values(), default=[0])[0], None))
        by_bytes.set(xlabel="optimizer state, MB (all workers')", xscale='log')
        by_bytes.set_xticks(ticks := [0.5, 2, 10, 50, 400], list(map(str, ticks)))
        by_bytes.minorticks_off()


def draw_frontier():
    """Validation loss of the screening against bytes on the wire, of methods that send at merges: the best
    training by T and bits, first seed. Lines for some that send after every step."""
    best, found = {}, groups('screening')
    for cell in trained('screening'):
        s, wire = cell['settings'], sent('screening', cell).get('wire')
        if wire and cell['val_loss'] and 'seed' not in s and s.get('merge_every', 0) > 1:
            series = cell['method'].removesuffix(', 2 bits'), s.get('sync_bits', 32)
            point = cell['val_loss'], wire / 1e6
            mine = best.setdefault(series, {})
            mine[s['merge_every']] = min(mine.get(s['merge_every'], point), point)
    with picture('frontier', (8.5, 5.2)) as ((axes,),):
        colors = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(name for name, _ in best))}
        for name, color in colors.items():
            axes.plot([], color=color, label=name)
        for (name, bits), points in best.items():
            color, (ys, xs) = colors[name], zip(*sorted(points.values(), reverse=True))
            axes.plot(xs, ys, {32: 'o-', 4: 's-', 2: '^-'}[bits], lw=0.8, color=color)
            for T, (y, x) in points.items():
                axes.annotate(T, (x, y), (4, 4), textcoords='offset points', fontsize=7, color=color)
        for name in ('full rank', 'GaLore', 'GaLore, Muon', 'Muon'):
            mine = found[name][0]
            wire, loss = sent('screening', mine[0]).get('wire', 0), statistics.mean(losses(mine))
            axes.axhline(loss, color='grey', lw=0.8, ls=':')
            axes.annotate(f'{name}: {wire / 1e6:.0f} MB after every step', (0, loss), (4, 3),
                          xycoords=('axes fraction', 'data'), textcoords='offset points', fontsize=7,
                          color='grey')
        axes.set_xscale('log')
        axes.set_xticks(ticks := [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5], list(map(str, ticks)))
        axes.minorticks_off()
        axes.set(xlabel='MB that each of four workers sends a step (ring)',
                 ylabel='validation loss (nats a byte)',
                 title='numbers: T; circles: 32 bits a number, squares: 4, triangles: 2')


def draw_links():
    """Validation loss of the finalists against what each of four workers sends, and against time, where what
    is sent after a step goes over a link of so many bits a second."""
    found, times = groups('quality'), seconds_of_steps('quality')
    with picture('links', (11, 4.4), (1, 3), 4, sharey=True) as ((by_bytes, *by_link),):
        for number, (name, (mine, *_)) in enumerate(found.items()):
            wire, (color, marker), ends = sent('quality', mine[0]).get('wire'), look(number), losses(mine)
            if not wire or name not in times:
                continue
            middle, curves = statistics.mean(ends), [cell['curve']['val_loss'][1:] for cell in mine]
            by_bytes.errorbar(wire / 1e6, middle, bars(middle, ends), color=color, fmt=marker, capsize=3)
            for axes, link in zip(by_link, (1e9, 1e8)):
                seconds = times[name][1] + 8 * wire / link
                band(axes, [step * seconds for step in mine[0]['curve']['step'][1:]], curves, color, name)
        by_bytes.set(xlabel='MB that each of four workers sends a step (ring)',
                     ylabel='validation loss (nats a byte)', ylim=(1.3, 2.4))
        for axes, title in zip(by_link, ('links of 1 Gbit/s', 'links of 100 Mbit/s')):
            axes.set(title=title, xlabel='computed and sent, s')
        for axes, ticks in ((by_bytes, [0.1, 1, 10, 100]), (by_link[0], [30, 100, 300, 600]),
                            (by_link[1], [30, 100, 300, 1000, 3000])):
            axes.set_xscale('log')
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.minorticks_off()


def draw_convergence():
    """Loss and accuracy of the adaptation, each method at its best rate, against epochs and time."""
    times, epoch = seconds_of_steps('convergence'), 1078 / ADAPT['batch_size']
    found = groups('convergence')
    with picture('convergence', (8.5, 6.2), (2, 2), 2, sharex='col', sharey='row') as plots:
        for (name, (mine, *_)), color in zip(found.items(), ('#333333', '#4c72b0', '#dd8452', '#55a868')):
            steps, trained = mine[0]['curve']['step'], mine[0]['trainable_parameters'] / 1e3
            rate = mine[0]['settings']['learning_rate']
            for row, key in zip(plots, ('val_loss', 'val_acc')):
                curves = [cell['curve'][key] for cell in mine]
                for axes, unit in zip(row, (1 / epoch, times[name][0])):
                    band(axes, [step * unit for step in steps], curves, color,
                         f'{name} ({trained:.0f}k trainable, learning rate {rate:g})')
        plots[0, 0].set(ylabel='validation loss (nats)', yscale='log')
        plots[0, 0].set_yticks([0.2, 0.5, 1, 2, 5], ['0.2', '0.5', '1', '2', '5'])
        plots[0, 0].minorticks_off()
        plots[1, 0].set(ylabel='validation accuracy', ylim=(0.5, 1), xlabel='epochs', xlim=(0, 20))
        plots[1, 1].set(xlabel='training, s (one CPU thread)', xlim=0)


def draw_layers():
    """Validation loss against trainable parameters; bars from the least to the largest of seeds."""
    with picture('layers', (6.4, 4.2), columns=0) as ((axes,),):
        for letters, (mine, *_) in groups('layers').items():
            trained, mean = mine[0]['trainable_parameters'] / 1e6, statistics.mean(losses(mine))
            axes.errorbar(trained, mean, bars(mean, losses(mine)), fmt='o', capsize=3,
                          color='black' if letters == 'none' else '#4c72b0')
            right = 'L' in letters  # heads on the output layer move a point only a little to the right
            axes.annotate(letters, (trained, mean), (6 if right else -6, 5), textcoords='offset points',
                          ha='left' if right else 'right')
        axes.margins(0.1)
        axes.set(xlabel='trainable parameters, millions', ylabel='validation loss, nats per byte',
                 title='four split heads on A(ttn), M(lp), L(ogit)')


# -----------------------------------------------------------------------------
# tables


def renew(page, mark, head, rows, end=''):
    """Renews the table between two markers in a page; head and rows: tuples of columns."""
    path = HERE / page
    lines = [f"| {' | '.join(row)} |" for row in (head, ['---'] * len(head), *rows)] + ['', end] * bool(end)
    before, there, rest = path.read_text('utf-8').partition(f'<!-- {mark} -->\n')
    if not there:
        raise ValueError(f'{page} has no line <!-- {mark} -->')
    after = rest.partition('<!-- end -->\n')[2]
    path.write_text('\n'.join([f'{before}<!-- {mark} -->', *lines, '<!-- end -->', after]), 'utf-8')


def method_rows():
    """What the first lines of config/methods say."""
    for path in sorted(HERE.parent.glob('config/methods/*.py')):
        first = path.read_text('utf-8').partition('\n')[0]
        yield f'[`{path.stem}`](config/methods/{path.name})', first.removeprefix('# ').strip()


def mean_and_range(found):
    spread = f'{min(found):.3f} to {max(found):.3f}; {len(found)}' if len(found) > 1 else 'one seed'
    return f'{statistics.mean(found):.3f} ({spread})'


def less_than(mine, others):
    """The mean loss of trainings less that of others with the same seed, and its standard error, in words."""
    theirs = {cell['settings'].get('seed', 1337): cell['val_loss'] for cell in others}
    pairs = [cell['val_loss'] - theirs[seed] for cell in mine
             if (seed := cell['settings'].get('seed', 1337)) in theirs]
    error = f' ({statistics.stdev(pairs) / len(pairs)**0.5:.3f})' if len(pairs) > 1 else ''
    return f'{statistics.mean(pairs):+.3f}{error}'


def quality_rows(names=None):
    """The finalists, or those of some names, each at its best rate, by their loss."""
    times, found = seconds_of_steps('quality'), groups('quality')
    for name in sorted(names or found, key=lambda name: statistics.mean(losses(found[name][0]))):
        mine = found[name][0]
        first, wire = mine[0], sent('quality', mine[0]).get('wire')
        yield (label(first), f'{all_trained(first):.1f}M',
               f"{all_state('quality', first) / 1e6:.3g} MB", f'{wire / 1e6:.3g} MB' if wire else '',
               f"{times[name][0] / times['full rank'][0]:.2f}" if name in times else '',
               mean_and_range(losses(mine)))


def other_rates(name, best):
    """Mean losses of the trainings that differ from `best` in their rate alone, in words."""
    rates = {}
    for cell in trained(name):
        s, mine = ({**cell['settings'], 'seed': 0} for cell in (cell, best))
        if cell['method'] == best['method'] and s | {'learning_rate': 0} == mine | {'learning_rate': 0} \
                and s != mine:
            rates.setdefault(s['learning_rate'], []).append(cell['val_loss'])
    return ', '.join(f"{lr:g}: {'diverged' if None in those else f'{statistics.mean(those):.3f}'}"
                     for lr, those in sorted(rates.items()))


def rate_rows():
    """The finalists' other rates."""
    for name, (mine, *_) in groups('quality').items():
        if words := other_rates('quality', mine[0]):
            yield name, words


def rival_rows(name, costs=()):
    """Methods of one process in a bench, by their loss. costs: more columns, {method: words} each."""
    found = groups(name)
    full, *_ = found['full rank']
    found = [mine for mine, *_ in found.values() if 'ranks' not in mine[0]['settings']]
    for mine in sorted(found, key=lambda cells: statistics.mean(losses(cells))):
        yield (label(mine[0]), f'{all_state(name, mine[0]) / 1e6:.1f} MB',
               *(cost.get(mine[0]['method'], '') for cost in costs), mean_and_range(losses(mine)),
               less_than(mine, full) if mine is not full else '', other_rates(name, mine[0]))


def sixteen_rows():
    """Weights in bfloat16 against float32, of equal settings and seed."""
    for name, (mine, *_) in groups('sixteen').items():
        pairs = []
        for cell in mine:
            settings = {key: x for key, x in cell['settings'].items() if key != 'param_dtype'}
            pairs += [(cell['val_loss'], other['val_loss'])
                      for other in kept('quality', method=name, settings=settings)]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            continue
        less = [sixteen - full for sixteen, full in pairs]
        error = f'{statistics.stdev(less) / len(less)**0.5:.4f}' if len(less) > 1 else ''
        yield (name, *(', '.join(f'{x:.3f}' for x in those) for those in zip(*pairs)),
               f'{statistics.mean(less):+.4f}', error)


def renew_tables():
    renew('../README.md', 'methods', ('method', 'what it is, and learning rates that were good'),
          method_rows())
    cells = trained('quality')
    dates, machines, torches = (sorted({cell[key] for cell in cells}) for key in ('date', 'machine', 'torch'))
    head = ('method', 'trained', 'optimizer state', 'sent a step', 'time of a step',
            'validation loss: mean (range; seeds)')
    renew('README.md', 'quality', head, quality_rows())
    first = ('full rank', 'Muon', 'Muon, lean', 'GaLore', 'GaLore, Muon',
             'GaLoLTE, Muon, 2 bits, moments apart', 'LTE')
    renew('../README.md', 'quality', head, quality_rows(first),
          f"`python assets/measure.py quality`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
          f"{' and '.join(machines)}, torch {' and '.join(torches)}; then `python assets/figures.py`.")
    head = ('method', 'optimizer state', 'loss (range; seeds)', "less full rank's (its error)",
            'at other rates')
    costs = [{cell['method']: f'{cell[key] / unit:{form}}' for cell in kept(bench, of='screening')}
             for bench, key, unit, form in (('speed', 'to_full', 1, '.2f'), ('memory', 'total', 1e6, '.0f'))]
    renew('README.md', 'rivals', (*head[:2], 'time of a step', 'peak memory, MB', *head[2:]),
          rival_rows('screening', costs))
    for name in ('english', 'longer', 'smaller'):
        renew('README.md', name, head, rival_rows(name))
    renew('README.md', 'sixteen', ('method', 'weights in bfloat16', 'in float32', 'difference', 'its error'),
          sixteen_rows())
    renew('README.md', 'rates', ('method', 'validation loss at other learning rates'), rate_rows())


if __name__ == '__main__':
    for draw in (draw_method, draw_heads, draw_memory, draw_quality, draw_frontier, draw_links,
                 draw_convergence, draw_layers):
        draw()
    renew_tables()
