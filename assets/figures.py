"""
Draws assets/method.png, the picture of the first page.

$ python assets/figures.py
"""

import os

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = os.path.dirname(os.path.abspath(__file__))
FROZEN, TRAINED, BASIS = '#c9ccd1', '#e08a3c', '#5b8fc7'


def box(axes, x, y, width, height, color, words, size=11):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor='black', linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, words, ha='center', va='center', size=size)


def arrow(axes, start, end, bend=0.0, color='black'):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=12, color=color,
                                   connectionstyle=f'arc3,rad={bend}'))


def layer(axes, title, parts, left, right, merge):
    """One layer: W and its heads; parts: words inside each head's (left factor, right factor), and their colours."""
    axes.set(xlim=(0, 10), ylim=(0, 6.1), aspect='equal')
    axes.axis('off')
    axes.set_title(title, size=11)
    box(axes, 0.6, 1.7, 2.4, 2.4, FROZEN, 'W\n(m, n)')
    axes.text(3.5, 2.9, '+', size=16, ha='center', va='center')
    for number, (first, second) in enumerate(parts):
        y = 2.9 + (len(parts) - 1) * 0.85 - number * 1.7 - 0.65
        box(axes, 4.2, y, 0.5, 1.4, left, first, 9)
        box(axes, 4.85, y + 0.9, 1.4, 0.5, right, second, 9)
        axes.text(6.5, y + 0.75, f'worker {number + 1}' if len(parts) > 1 else '', size=8, va='center', color='#555555')
    arrow(axes, (5.2, 0.75), (1.8, 1.6), -0.25, '#444444')
    axes.text(4.1, 0.25, merge, size=9, ha='center', color='#444444')


def method():
    figure = Figure((11, 2.9), layout='constrained')
    axes = figure.subplots(1, 3)
    layer(axes[0], 'LoRA: one head (or several, all at once)', [('B', 'A')], TRAINED, TRAINED, 'merged at the end')
    layer(axes[1], 'LTE: a head on each worker', [('B₁', 'A₁'), ('B₂', 'A₂')], TRAINED, TRAINED,
          'merged every T steps: W ← W + mean B A')
    layer(axes[2], 'GaLore (T = 1), GaLoLTE (T > 1)', [('P', 'A₁'), ('P', 'A₂')], BASIS, TRAINED,
          'merged every T steps; P: a basis of the gradient')
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor='black') for color in (FROZEN, TRAINED, BASIS)]
    figure.legend(handles, ['frozen between merges', 'trained by Adam', 'taken anew now and then, the same everywhere'],
                  loc='outside lower center', ncols=3, frameon=False, fontsize=9)
    figure.savefig(f'{HERE}/method.png', dpi=110)


if __name__ == '__main__':
    method()
