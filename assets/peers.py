"""
Times a training step of our code and of other libraries, in turns, on this machine's CPU:

$ pip install transformers peft galore-torch
$ python assets/peers.py            # about 15 minutes

It appends a line to peers.jsonl for each comparison. Ratios are our time divided by theirs. Models
have random weights and the shapes of a 25M LLaMA and of SmolLM2-135M. Steps train on 4 sequences of
256 tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import keep_freed_memory
from galore import GaLoreAdamW, LowRankOptimizer
from lowrank import apply_galore, apply_mhlora, freeze_rest
from model import Llama, LlamaConfig
from measure import ROOT, commit, processor
from optim import is_fast_in_bfloat16

SIZES = {'25m': dict(n_embd=384, n_layer=8, n_head=6, intermediate_size=1024, vocab_size=32000),
         '135m': dict(n_embd=576, n_layer=30, n_head=9, n_kv_head=3, intermediate_size=1536,
                      vocab_size=49152, tied=True)}
LINEARS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
RANK = {'lora': 16, 'galore': 128}
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
    inside = [p for name, p in model.named_parameters() if name.split('.')[-2] in LINEARS]
    return inside, [p for p in model.parameters() if not any(p is q for q in inside)]


def stepper(model, loss_of, optimizers, dtype):
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


def our_loss(model, x, y):
    return model(x, y)


def their_loss(model, x, y):
    logits = model(x).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(trained, lr=1e-4, fused=True)]


def full_rank(size, dtype):
    """Compares with transformers and torch's fused AdamW."""
    ours, theirs = our_model(size), their_model(size)
    return (stepper(ours, our_loss, [LowRankOptimizer(ours, lr=1e-4)], dtype),
            stepper(theirs, their_loss, adamw(theirs), dtype))


def lora(size, dtype):
    """Compares with PEFT on transformers and torch's fused AdamW."""
    from peft import LoraConfig, get_peft_model
    ours, theirs = our_model(size), their_model(size)
    apply_mhlora(ours, ('attn', 'mlp'), rank=RANK['lora'], alpha=32.0)
    freeze_rest(ours)
    theirs = get_peft_model(theirs, LoraConfig(
        r=RANK['lora'], lora_alpha=32, target_modules=LINEARS, lora_dropout=0.0))
    return (stepper(ours, our_loss, [LowRankOptimizer(ours, lr=1e-4)], dtype),
            stepper(theirs, their_loss, adamw(theirs), dtype))


def galore_groups(model):
    inside, others = matrices(model)
    return [dict(params=others), dict(params=inside, rank=RANK['galore'], update_proj_gap=10**9,
                                      scale=0.25, proj_type='std')]


def galore_layers(size, dtype):
    """Compares our layers with galore-torch on our model, without new projections."""
    from galore_torch import GaLoreAdamW as TheirGaLore
    ours, theirs = our_model(size), our_model(size)
    apply_galore(ours, ('attn', 'mlp'), rank=RANK['galore'])
    return (stepper(ours, our_loss, [LowRankOptimizer(ours, update_proj_gap=10**9)], dtype),
            stepper(theirs, our_loss, [TheirGaLore(galore_groups(theirs))], dtype))


def galore_drop_in(size, dtype):
    """Compares our drop-in with galore-torch on our model, without new projections."""
    from galore_torch import GaLoreAdamW as TheirGaLore
    ours, theirs = our_model(size), our_model(size)
    return (stepper(ours, our_loss, [GaLoreAdamW(galore_groups(ours))], dtype),
            stepper(theirs, our_loss, [TheirGaLore(galore_groups(theirs))], dtype))


def muon(size, dtype):
    """Compares with torch.optim.Muon and fused AdamW on our model."""
    ours, theirs = our_model(size), our_model(size)
    inside, others = matrices(theirs)
    optimizers = [torch.optim.Muon(inside, lr=1e-3),
                  torch.optim.AdamW(others, lr=1e-3, fused=True)]
    return (stepper(ours, our_loss, [LowRankOptimizer(ours, rule='muon')], dtype),
            stepper(theirs, our_loss, optimizers, dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--sizes', default='25m,135m')
    options = parser.parse_args()
    keep_freed_memory()
    dtypes = [torch.float32]
    if is_fast_in_bfloat16(torch.device('cpu')):
        dtypes.append(torch.bfloat16)
    for size in options.sizes.split(','):
        for compare in (full_rank, lora, galore_layers, galore_drop_in, muon):
            for dtype in dtypes:
                seconds = [], []
                steps = compare(size, dtype)
                for i in range(options.rounds + 2):  # the first two rounds warm up
                    for step, found in zip(steps, seconds):
                        start = time.perf_counter()
                        step()
                        found.append(time.perf_counter() - start)
                ratios = [a / b for a, b in zip(*(found[2:] for found in seconds))]
                medians = [statistics.median(found[2:]) for found in seconds]
                line = dict(
                    cell=dict(size=size, compare=compare.__name__, dtype=str(dtype)[6:]),
                    seconds=medians, ratio=[min(ratios), statistics.median(ratios), max(ratios)],
                    machine=processor(), commit=commit(), date=time.strftime('%Y-%m-%d'))
                print(line, flush=True)
                with open(ROOT / 'assets/peers.jsonl', 'a', encoding='utf-8') as file:
                    file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    main()
