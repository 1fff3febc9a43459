"""
Compares runs by their logs, as a table and a picture:

$ python extras/compare.py out/adamw out/galore out/lte --to=out/compare.png

Each folder holds the log.jsonl of a run and names it. The picture shows the loss against steps and
seconds of training, and against bytes sent where runs log them (train_local.py). Solid lines are
validation losses, thin lines training losses.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c564b', '#7f7f7f']
NAMES = dict(adamw='AdamW', galolte='GaLoLTE', galore='GaLore', galore_muon='GaLore with Muon',
             galore_svd='GaLore with SVD', lora='LoRA', lte='LTE', mhlora='Multi-head LoRA',
             muon='Muon', relora='ReLoRA')
AXES = {'step': 'Steps', 'seconds': 'Time (s)', 'sent_mb': 'Sent by each process (MB)'}


def read(folder):
    """The records of a run. Each has the seconds of training and the MB sent up to its step."""
    records, step, seconds, ms, sent_mb = [], 0, 0.0, 0.0, None
    for line in Path(folder, 'log.jsonl').read_text().splitlines():
        record = json.loads(line)
        ms = record.get('ms', ms)
        sent_mb = record['bytes'] / 1e6 if 'bytes' in record else sent_mb
        # a resumed run may repeat some steps, and an evaluation takes no time here
        seconds += ms * max(record['step'] - step, 0) / 1000
        step = record['step']
        records.append({**record, 'seconds': seconds, 'sent_mb': sent_mb})
    return records


def column(records, *keys):
    """The values of some keys in all records that have them, one list for each key."""
    rows = [[record[key] for key in keys] for record in records
            if all(record.get(key) is not None for key in keys)]
    return [*zip(*rows)] or [()] * len(keys)


def print_table(runs):
    width = max(map(len, runs))
    print(f'{"run":{width}}  {"steps":>6}  final loss  best loss  ms per step  '
          'memory (GB)  sent (MB)')
    for name, records in runs.items():
        losses, = column(records, 'val_loss')
        ms = sorted(*column(records, 'ms'))
        cells = [losses[-1] if losses else None, min(losses, default=None),
                 ms[len(ms) // 2] if ms else None, max(*column(records, 'gb'), default=None),
                 records[-1]['sent_mb']]
        widths, digits = (10, 9, 11, 11, 9), (4, 4, 1, 2, 1)
        print(f"{name:{width}}  {records[-1]['step']:6}", *(
            f'{"" if cell is None else format(cell, f".{digit}f"):>{size}}'
            for cell, size, digit in zip(cells, widths, digits)), sep='  ')


def draw(runs, path):
    axes = [key for key in AXES if any(column(records, key, 'val_loss')[0]
                                       for records in runs.values())]
    figure, plots = plt.subplots(1, len(axes), figsize=(4.6 * len(axes), 3.8), sharey=True,
                                 squeeze=False, layout='constrained')
    colours, shown = iter(COLOURS * len(runs)), []
    for name, records in runs.items():
        colour = 'black' if 'adamw' in name else next(colours)
        for plot, key in zip(plots[0], axes):
            plot.plot(*column(records, key, 'train_loss'), color=colour, linewidth=0.7, alpha=0.35)
            plot.plot(*column(records, key, 'val_loss'), color=colour, linewidth=1.8,
                      label=NAMES.get(name, name))
        shown += [loss for record in records if record['step'] >= records[-1]['step'] / 10
                  for key, loss in record.items() if key in ('val_loss', 'train_loss')]
    for plot, key in zip(plots[0], axes):
        plot.set_xlabel(AXES[key])
        plot.grid(alpha=0.25, linewidth=0.5)
        plot.spines[['top', 'right']].set_visible(False)
    is_vit = any(column(records, 'val_acc')[0] for records in runs.values())
    plots[0, 0].set_ylabel(f'Loss (nats per {"image" if is_vit else "token"})')
    margin = 0.05 * (max(shown) - min(shown))  # the loss of random weights would flatten the rest
    plots[0, 0].set_ylim(min(shown) - margin, max(shown) + margin)
    plots[0, 0].legend(frameon=False)
    figure.suptitle('Validation loss (thin lines: training loss)', fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    print(f'{path} shows them')


def main(argv):
    folders = [argument for argument in argv if not argument.startswith('--to=')]
    to = [argument[5:] for argument in argv if argument.startswith('--to=')] or ['out/compare.png']
    if not folders:
        sys.exit(__doc__.strip())
    runs = {Path(folder).name: read(folder) for folder in folders}
    print_table(runs)
    draw(runs, to[-1])


if __name__ == '__main__':
    main(sys.argv[1:])
