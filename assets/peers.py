"""
Times a training step of our code and of other libraries, in turns, on this machine's CPU:

$ pip install transformers peft galore-torch
$ python assets/peers.py            # about 15 minutes

It appends a line to peers.jsonl for each comparison. Ratios are our time divided by theirs. Models
have random weights and the shapes of a 25M LLaMA and of SmolLM2-135M. Steps train on 4 sequences of
256 tokens.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import in_turns
from common import keep_freed_memory
from galore import GaLoreAdamW, LowRankOptimizer
from lowrank import apply_galore, apply_mhlora, freeze_rest
from measure import commit, write_record
from model import Llama, LlamaConfig

SIZES = {'25m': dict(n_embd=384, n_layer=8, n_head=6, intermediate_size=1024, vocab_size=32000),
         '135m': dict(n_embd=576, n_layer=30, n_head=9, n_kv_head=3, intermediate_size=1536,
                      vocab_size=49152, tied=True)}
LINEARS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
BATCH, TIME = 4, 256


def our_model(size):
    torch.manual_seed(0)
    return Llama(LlamaConfig(TIME, **SIZES[size]))


def their_model(size):
    """Returns the same model by transformers."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM
    torch.manual_seed(0)
    s = SIZES[size]
    return LlamaForCausalLM(TheirConfig(
        hidden_size=s['n_embd'], num_hidden_layers=s['n_layer'], num_attention_heads=s['n_head'],
        num_key_value_heads=s.get('n_kv_head', s['n_head']), vocab_size=s['vocab_size'],
        intermediate_size=s['intermediate_size'], tie_word_embeddings=s.get('tied', False),
        max_position_embeddings=TIME, attn_implementation='sdpa', use_cache=False))


def matrices(model):
    """Returns (the weights of attention and MLP, all other parameters)."""
    inside = {name: p for name, p in model.named_parameters() if name.split('.')[-2] in LINEARS}
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [*inside.values()], others


def loss_of(model, x, y):
    if isinstance(model, Llama):
        return model(x, y)
    logits = model(x).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def stepper(dtype, model, *optimizers):
    """Returns a function that makes a training step."""
    tokens = torch.randint(1000, (BATCH, TIME + 1))

    def step():
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step


# -----------------------------------------------------------------------------
# the comparisons: each returns (model, optimizer) of ours and (model, *optimizers) of theirs


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def full_rank(size):
    """Compares with transformers and torch's fused AdamW."""
    ours, theirs = our_model(size), their_model(size)
    return (ours, LowRankOptimizer(ours, lr=1e-4)), (theirs, adamw(theirs))


def lora(size):
    """Compares with PEFT on transformers and torch's fused AdamW."""
    from peft import LoraConfig, get_peft_model
    ours = our_model(size)
    apply_mhlora(ours, ('attn', 'mlp'), rank=16, alpha=32.0)
    freeze_rest(ours)
    theirs = get_peft_model(their_model(size), LoraConfig(
        r=16, lora_alpha=32, target_modules=LINEARS, lora_dropout=0.0))
    return (ours, LowRankOptimizer(ours, lr=1e-4)), (theirs, adamw(theirs))


def galore_groups(model):
    inside, others = matrices(model)
    return [dict(params=others), dict(params=inside, rank=128, update_proj_gap=10**9, scale=0.25,
                                      proj_type='std')]


def galore_torch(size):
    """Returns our model with the optimizer of galore-torch, without new projections."""
    from galore_torch import GaLoreAdamW as TheirGaLore
    model = our_model(size)
    return model, TheirGaLore(galore_groups(model))


def galore_layers(size):
    ours = our_model(size)
    apply_galore(ours, ('attn', 'mlp'), rank=128)
    return (ours, LowRankOptimizer(ours, update_proj_gap=10**9)), galore_torch(size)


def galore_drop_in(size):
    ours = our_model(size)
    return (ours, GaLoreAdamW(galore_groups(ours))), galore_torch(size)


def muon(size):
    """Compares with torch.optim.Muon and fused AdamW on our model."""
    ours, theirs = our_model(size), our_model(size)
    inside, others = matrices(theirs)
    return (ours, LowRankOptimizer(ours, rule='muon')), (
        theirs, torch.optim.Muon(inside, lr=1e-3), torch.optim.AdamW(others, lr=1e-3, fused=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--sizes', default='25m,135m')
    options = parser.parse_args()
    keep_freed_memory()
    for size in options.sizes.split(','):
        for compare in (full_rank, lora, galore_layers, galore_drop_in, muon):
            for dtype in (torch.float32, torch.bfloat16):
                ours, theirs = (stepper(dtype, *side) for side in compare(size))
                seconds = in_turns({'ours': ours, 'theirs': theirs}, options.rounds)
                ratios = [a / b for a, b in zip(*seconds.values())]
                cell = dict(size=size, compare=compare.__name__, dtype=str(dtype)[6:])
                found = dict(seconds=[*map(statistics.median, seconds.values())],
                             ratio=[min(ratios), statistics.median(ratios), max(ratios)])
                write_record('peers', cell, found, commit())


if __name__ == '__main__':
    main()
