"""
Prints the effective and the stable ranks of a run's weights W and of their change W - W_0, means
over the matrices of a kind:

$ python assets/ranks.py out/quickstart

It reads all .pt files of a finished or running run. It initializes W_0 again with the seed of the
earliest file, so it needs the kind of machine that the run began on.
"""

import contextlib
import importlib
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lowrank
from checkpoint import load_checkpoint, load_weights
from common import init_distributed
from quant import wide_dtype


def effective_and_stable_rank(W: torch.Tensor) -> tuple[float, float]:
    """Returns the effective rank of a matrix, the exponential of the entropy of its normalized
    singular values (Roy and Vetterli 2007), and its stable rank |W|_F^2 / |W|_2^2. Both are r for r
    equal singular values, and 0 for a zero matrix."""
    S = torch.linalg.svdvals(W.to(wide_dtype(W)))
    if S[0] == 0:
        return 0.0, 0.0
    entropy = torch.special.entr(S / S.sum()).sum()
    return entropy.exp().item(), (S / S[0]).square().sum().item()


def mean_ranks(weights: dict) -> dict:
    """Returns {kind of layer: (effective rank, stable rank)}, means over its matrices."""
    found = {}
    for kind in lowrank.KINDS:
        ranks = [effective_and_stable_rank(W) for name, W in weights.items()
                 if W.dim() == 2 and lowrank.is_target(name, [kind])]
        if ranks:
            found[kind] = tuple(map(statistics.mean, zip(*ranks)))
    return found


def ranks_of_run(folder) -> list[dict]:
    """Returns a record for each .pt file of a run, in order of their steps: 'step', and mean_ranks
    of 'W', the merged weights, and of 'change', W - W_0."""
    found = {}
    for path in Path(folder).glob('*.pt'):
        checkpoint = load_checkpoint(path)
        found[checkpoint['step']] = checkpoint
    checkpoint = found[min(found)]  # a resumed run may have another seed
    settings = checkpoint['settings']
    name = 'train_vit' if 'img_size' in settings else (
        'train_llama' if 'size' in settings else 'train_gpt')
    script = importlib.import_module(name)
    s = SimpleNamespace(**{**script.defaults, **settings})
    size = checkpoint['data'].get('classes') or checkpoint['model_config']['vocab_size']
    with contextlib.redirect_stdout(None):
        run = script.build_run(s, init_distributed(s), size)
    wide = torch.promote_types(torch.float32, getattr(torch, s.param_dtype))
    first = {key: W.clone() for key, W in lowrank.merged_state_dict(run.model, wide).items()}
    records = []
    for step, checkpoint in sorted(found.items()):
        load_weights(run.model, checkpoint['model'])
        weights = lowrank.merged_state_dict(run.model, wide)  # 16 bits would round the change
        change = {key: W - first[key] for key, W in weights.items()}
        records.append(dict(step=step, W=mean_ranks(weights), change=mean_ranks(change)))
    return records


if __name__ == '__main__':
    for record in ranks_of_run(sys.argv[1]):
        for key, name in (('W', 'W'), ('change', 'W - W_0')):
            ranks = ', '.join(f'{kind} {effective:.1f} ({stable:.1f})'
                              for kind, (effective, stable) in record[key].items())
            print(f"step {record['step']:6} {name:8}{ranks}")
