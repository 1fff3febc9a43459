"""
Times a training step of GPT-2 124M with multi-head LoRA whose heads compute in parallel or one
after the other, beside full rank, as in the study's first figure:

$ python extras/time_heads.py --ranks=1,4 --heads=4
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from configurator import configure
from galore import LowRankOptimizer
from lowrank import MHLoRALinear, count_trained, replace_linears
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
target_modules = 'attn'
heads = 4
ranks = '1,4'  # of each head
batch_size = 2
block_size = 512
vocab_size = 50304
n_layer = 12
n_head = 12
n_embd = 768
rounds = 8  # the steps of each kind, which take turns
device = 'cuda' if torch.cuda.is_available() else 'cpu'
# -----------------------------------------------------------------------------
configure(globals())


class SequentialHeads(MHLoRALinear):
    """The same heads, which compute one after the other."""

    def forward(self, x):
        y = self.base(x)
        for A, B in zip(self.A, self.B):
            y = y + self.scale / self.heads * F.linear(F.linear(x, A), B)
        return y


def make(layer_class, rank):
    """A model and its optimizer, at full rank without a class of layers."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)).to(device)
    if layer_class:
        replace_linears(model, target_modules.split(','),
                        lambda linear: layer_class(linear, rank, rank, heads))
    return model, LowRankOptimizer(model)


def step(model, optimizer):
    """The seconds of a step on random tokens."""
    tokens = torch.randint(vocab_size, (batch_size, block_size), device=device)
    if device != 'cpu':
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    if device != 'cpu':
        torch.cuda.synchronize()
    return time.perf_counter() - start


full = make(None, 0)
step(*full)
trained_at_full_rank = count_trained(full[0])
print(f'full rank: {trained_at_full_rank:,} parameters are trained')
for rank in map(int, ranks.split(',')):
    kinds = {'full': full, 'parallel': make(MHLoRALinear, rank),
             'sequential': make(SequentialHeads, rank)}
    seconds = {name: [] for name in kinds}
    for i in range(rounds + 1):
        for name, model_and_optimizer in kinds.items():
            taken = step(*model_and_optimizer)
            if i:  # the first steps allocate memory
                seconds[name].append(taken)
    trained = count_trained(kinds['parallel'][0])
    for name in ('parallel', 'sequential'):
        ratios = [own / whole for own, whole in zip(seconds[name], seconds['full'])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f'rank {rank}, {heads} {name} heads: {middle:.2f} [{low:.2f}, {high:.2f}] of the '
              f'time of full rank, {trained / trained_at_full_rank:.2f} of its trained parameters')
