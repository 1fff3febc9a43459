"""
Trains a GPT by GUM (arXiv 2510.17802), which has no fast code but is written down in textbook.py.

$ python assets/gum.py config/quickstart.py --optimizer=gum --learning_rate=0.008

The rank is half the smaller side of each matrix. Every 50 steps a matrix takes a new projection,
from the SVD of its gradient, and is chosen for steps at full rank with probability 1/4.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import textbook
import train_gpt
from common import lock_folder
from optim import RULES

GAP, FULL_SHARE = 50, 0.25


def gum(gradients, states, group, targets):
    """The rule, see optim.py."""
    updates = []
    for G, state, target in zip(gradients, states, targets):
        is_wide = G.shape[0] < G.shape[1]
        s = textbook.plan({'W': G}, ['W'], dict(
            optimizer='gum', proj_method='svd', rank=min(G.shape) // 2, update_proj_gap=GAP,
            full_share=FULL_SHARE, momentum=group['momentum']))
        G = G.mT if is_wide else G  # (long, short)
        with torch.random.fork_rng():  # a resumed run makes the same choices
            torch.manual_seed(target.seed())
            textbook.refresh([state], G[None], 'W', state['step'] - 1, s)
        if not is_wide:  # queries, keys and values are three matrices
            state['stacked'] = len(target.weight_splits or [1])
        update = textbook.gum(G, state, s)
        updates.append(update.mT if is_wide else update)
    return updates


if __name__ == '__main__':
    RULES['gum'] = gum
    settings = config.load(vars(train_gpt), train_gpt.defaults, sys.argv[1:])
    with lock_folder(settings.out_dir):
        train_gpt.main(settings)
