"""
GaLore by several projections on linear regressions, for docs/results.md (two minutes on one core):

$ python assets/regression.py      writes assets/regression.jsonl and assets/regression.png

y = W x has to learn a random W* (64 x 64) from 256 new inputs in each of 400 steps, by Adam in a
projection of rank 16, which changes every 20 steps. The inputs are isotropic, or
ill-conditioned: their variances fall from 1 to 1/1000. Every line has the best of four learning
rates on another seed, and the mean of three seeds.
"""
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import textbook

SIZE, RANK, ROWS, STEPS, GAP, WINDOW = 64, 16, 256, 400, 20, textbook.WINDOW
RATES = 0.01, 0.03, 0.1, 0.3
SEEDS = 1, 2, 3
INPUTS = 'isotropic', 'ill-conditioned'
# sequences x tokens: only the sketch of single sequences depends on them
SHAPES = (256, 1), (16, 16), (4, 64), (1, 256)
SETTINGS = SimpleNamespace(**{**textbook.DEFAULTS, 'optimizer': 'adamw', 'beta2': 0.999})


def orthonormal(Y):
    return torch.linalg.qr(Y).Q


def single_sequences(u, v, sequences, Q):
    """The sketch of the fifth edition: the sum of G_i^T G_i Q / |G_i Q| over sequences i."""
    G = u.view(sequences, -1, SIZE).mT @ v.view(sequences, -1, SIZE)  # (sequences, m, n)
    R = G @ Q
    return (G.mT @ R / R.norm(dim=(1, 2), keepdim=True)).sum(0)  # (n, r)


def train(method, inputs, sequences, rate, seed):
    """The last loss, as a share of the first, and all losses."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    target, W = normal(SIZE, SIZE), torch.zeros(SIZE, SIZE, dtype=torch.float64)
    scales = torch.ones(SIZE, dtype=torch.float64)
    if inputs == 'ill-conditioned':
        scales = torch.logspace(0, -1.5, SIZE, dtype=torch.float64)
    state, Y, losses = {}, 0, []
    for t in range(STEPS):
        x = normal(ROWS, SIZE) * scales
        error = x @ (W - target).T
        losses.append(error.square().mean().item())
        u, v = 2 * error / error.numel(), x
        G = u.T @ v
        lr = rate * (0.5 + 0.5 * math.cos(math.pi * t / STEPS))
        if method == 'adamw':
            W = W - lr * textbook.adam(G, state, SETTINGS)
            continue
        if t % GAP == 0:
            old = state.get('Q')
            if method == 'svd':
                state['Q'] = torch.linalg.svd(G).Vh[:RANK].T
            else:
                state['Q'] = orthonormal(normal(SIZE, RANK) if old is None else Y)
                if old is not None and method != 'single sequences':
                    state['Q'] = torch.linalg.svd(Y, full_matrices=False).U
                if old is not None:
                    textbook.rotate(state, old.T @ state['Q'])
            Y, Omega = 0, normal(SIZE, RANK)
            if t and method in ('moment', 'both'):
                M = state['M']
                Omega = M / M.norm() + (Omega / Omega.norm() if method == 'both' else 0)
        if t % GAP >= GAP - WINDOW:
            if method == 'single sequences':
                Y = Y + single_sequences(u, v, sequences, state['Q'])
            else:
                Y = Y + textbook.sketch(G, Omega)
        W = W - lr * textbook.galore(G, state, SETTINGS)
    return losses[-1] / losses[0], losses


def main():
    records = []
    methods = [('adamw', 1), ('svd', 1), ('random', 1), ('moment', 1), ('both', 1)]
    methods += [('single sequences', sequences) for sequences, _ in SHAPES]
    for inputs, (method, sequences) in itertools.product(INPUTS, methods):
        rate = min(RATES, key=lambda rate: train(method, inputs, sequences, rate, 0)[0])
        runs = [train(method, inputs, sequences, rate, seed) for seed in SEEDS]
        curve = [sum(losses) / len(losses) for losses in zip(*(losses for _, losses in runs))]
        records.append(dict(inputs=inputs, method=method, sequences=sequences, rate=rate,
                            last=[last for last, _ in runs], curve=curve[::5]))
        print(inputs, method, sequences, f'rate {rate}', *(f'{last:.2g}' for last, _ in runs))
    with open(HERE / 'regression.jsonl', 'w') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)
    draw(records)


def draw(records):
    import matplotlib.pyplot as plt
    styles = {('adamw', 1): ('AdamW, full rank', 'black', '-'),
              ('svd', 1): ('GaLore, SVD', 'tab:blue', '-'),
              ('random', 1): ('GaLore, linear sketch', 'tab:orange', '-'),
              ('single sequences', 256): ('GaLore, old sketch, 256 sequences', 'tab:red', '-'),
              ('single sequences', 16): ('GaLore, old sketch, 16 sequences', 'tab:red', '--'),
              ('single sequences', 4): ('GaLore, old sketch, 4 sequences', 'tab:red', '-.'),
              ('single sequences', 1): ('GaLore, old sketch, 1 sequence', 'tab:red', ':')}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout='constrained')
    for ax, inputs in zip(axes, INPUTS):
        for record in records:
            key = record['method'], record['sequences']
            if record['inputs'] == inputs and key in styles:
                label, color, line = styles[key]
                losses = [loss / record['curve'][0] for loss in record['curve']]
                ax.plot(range(0, STEPS, 5), losses, line, color=color, label=label)
        ax.set(title=f'{inputs.capitalize()} inputs', xlabel='step', yscale='log', ylim=(1e-6, 2))
    axes[0].set_ylabel('loss, relative to the first')
    axes[1].legend(fontsize='small', loc='lower right')
    figure.suptitle('Linear regression: GaLore with linear sketches converges as with an SVD')
    figure.savefig(HERE / 'regression.png', dpi=150)


if __name__ == '__main__':
    main()
