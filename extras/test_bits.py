"""
The tests of bits.py: rounding, rules, layers, resuming.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks

from extras import bits
from extras.bits import (InBackward, Int8Linear, Int8ProjectedLinear, Moment8, NF4LoRALinear,
                         adafactor, adam8bit, change_, muon_without_momentum)
from galore import LowRankOptimizer, adam, gather_state, load_state, orthogonal
from lowrank import MHLoRALinear, ProjectedLinear, merged_state_dict, replace_linears
from test_lowrank import close, double, normal, parametrize, same, tiny_llama


def linear(m, n, dtype=double):
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    layer.weight.data = 0.1 * normal(m, n, seed=1).to(dtype)
    return layer


# -----------------------------------------------------------------------------
# rounding


@parametrize('compiles', [False, True])  # compiling takes half a minute on a slow CPU
def test_rounding_is_unbiased_and_off_by_one_level_at_most(compiles, monkeypatch):
    """Two thirds of a level are lost, or a whole one is added, if rounding is to nearest."""
    if compiles:
        monkeypatch.setattr(bits, 'compiled', lambda f, device: torch.compile(f, dynamic=True))
    torch.manual_seed(0)
    layer, update = Int8Linear(linear(3, 256, torch.float32)), normal(3, 256, seed=2).float()
    plain = layer.merged_weight()
    codes, scales = layer.weight.clone(), layer.scales.clone()
    exact, total = plain * 0.99 - 1e-4 * update, torch.zeros_like(plain)
    level = scales.expand(3, 2, 128).reshape(3, 256)
    for _ in range(400):
        layer.weight.copy_(codes)
        layer.scales.copy_(scales)
        layer.change(lambda rows: update[rows], 1e-4, 0.99)
        assert ((layer.merged_weight() - exact).abs() <= 1.01 * level).all()
        total += layer.merged_weight() / 400
    # the standard error is at most half a level / 20
    assert ((total - exact) / level).abs().max() < 0.13

    W, total = plain.bfloat16(), torch.zeros_like(plain)
    exact = W.float() - 1e-4 * update
    level = exact.abs() / 128
    for _ in range(400):
        new = W.clone()
        change_(new, update, 1e-4)
        assert ((new.float() - exact).abs() <= 1.01 * level + 1e-7).all()
        total += new.float() / 400
    assert ((total - exact) / (level + 1e-6)).abs().max() < 0.13


def test_bfloat16_keeps_what_is_not_finite():
    """A sum that overflows would turn NaN into a zero, and a diverged run would be saved."""
    nan = torch.tensor([0x7fffffff], dtype=torch.int32).view(torch.float32).item()
    W = torch.tensor([[nan, torch.inf, -torch.inf, float('nan'), 0.0, 1.5]], dtype=torch.bfloat16)
    W.view(torch.int16)[0, 0] = 0x7fff
    kept = W.clone()
    for _ in range(20):
        change_(W, torch.zeros_like(W), 1.0)
        assert torch.equal(W.isnan(), kept.isnan()) and torch.equal(W[0, 1:3], kept[0, 1:3])
        assert torch.equal(W[0, 4:], kept[0, 4:])


def test_large_matrices_are_changed_in_slices(monkeypatch):
    assert sum(len(range(7)[rows]) for rows in bits.slices_of_rows(torch.zeros(7, 2**17))) == 7
    assert len([*bits.slices_of_rows(torch.zeros(7, 2**17))]) == 4


# -----------------------------------------------------------------------------
# rules


@parametrize('shape', [(6, 8), (8,)])
def test_adafactor_is_that_of_the_paper(shape):
    state, V = {}, torch.zeros(shape, dtype=double)
    rows, columns = torch.zeros(6, dtype=double), torch.zeros(8, dtype=double)
    for step in range(1, 6):
        G = normal(*shape, seed=step) * step
        beta = 1 - step**-0.8
        if len(shape) == 2:  # algorithm 4, with sums in place of means
            rows = beta * rows + (1 - beta) * G.square().sum(1)
            columns = beta * columns + (1 - beta) * G.square().sum(0)
            V = torch.outer(rows, columns) / rows.sum()
        else:
            V = beta * V + (1 - beta) * G.square()
        U = G / V.sqrt()
        close(adafactor([G.clone()], [state])[0], U / max(1, U.square().mean().sqrt()))


def test_muon_without_momentum_takes_stacked_matrices_apart():
    G = normal(12, 8)
    update, = muon_without_momentum([G.clone()], [{'stacked': 3}])
    close(update, torch.cat([orthogonal(part[None])[0] for part in G.split(4)]))


def test_adam8bit_is_adam_and_turns_with_the_projection(tmp_path):
    pytest.importorskip('bitsandbytes')
    group, state, exact = dict(betas=(0.9, 0.999)), {}, {}
    turn = torch.linalg.qr(normal(16, 16)).Q.float()
    for step in range(30):
        G = normal(64, 16, seed=step).float()
        update, = adam8bit([G], [state], group)
        expected, = adam([G], [exact], group)
        assert (update - expected).norm() < 0.04 * expected.norm()
        if step == 10:
            for key, C in (('exp_avg', turn), ('exp_avg_sq', turn**2)):
                state[key], exact[key] = state[key] @ C, exact[key] @ C
        if step == 20:
            torch.save(state, tmp_path / 'state.pt')
            state = torch.load(tmp_path / 'state.pt')  # with weights_only=True
    assert isinstance(state['exp_avg'], Moment8)
    sizes = [x.nbytes for key in ('exp_avg', 'exp_avg_sq') for x in vars(state[key]).values()
             if torch.is_tensor(x)]
    assert sum(sizes) == 2 * (1024 + 4 * 4)  # bytes


# -----------------------------------------------------------------------------
# layers


@parametrize('m,n', [(96, 64), (64, 96)])
def test_int8_linear_steps_like_a_plain_one(m, n):
    layer, x, dy = Int8Linear(linear(m, n), weight_decay=0.1), normal(5, n), normal(5, m, seed=3)
    layer.lr, W = 0.01, layer.merged_weight()
    level = layer.scales.expand(m, -1, n // layer.scales.shape[1]).reshape(m, n)
    assert (W - linear(m, n).weight).abs().div(level).max() <= 0.5 + 1e-9
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    close(y, x @ W.T)
    close(x.grad, dy @ W)  # of W before the step
    update, = adafactor([dy.T @ x.detach()], [{}])
    moved = layer.merged_weight() - (W * (1 - 0.01 * 0.1) - 0.01 * update)
    assert moved.abs().div(layer.scales.expand_as(W.unflatten(1, layer.scales.shape[1:2] + (-1,)))
                           .reshape(m, n)).max() < 1.0001
    assert layer.states['weight']['step'] == 1 and moved.abs().max() < 0.02


@parametrize('m,n', [(96, 64), (64, 96)])
def test_int8_galore_has_the_gradients_of_galore(m, n):
    layer, plain = Int8ProjectedLinear(linear(m, n), 8), ProjectedLinear(linear(m, n), 8)
    plain.weight.data = layer.merged_weight()
    x, dy, grads = normal(5, n), normal(5, m, seed=3), []
    for each in (layer, plain):
        each.Q.copy_(torch.linalg.qr(normal(64, 8, seed=4)).Q)
        each.watch(normal(96, 8, seed=5))
        inputs = x.clone().requires_grad_()
        y = each(inputs)
        y.backward(dy)
        grads.append([y, inputs.grad, each.B.grad, each.Z.grad])
        each.apply_update(each.B.grad, 1e-3, 0.99)
    for a, b in zip(*grads):
        close(a, b)
    off = layer.merged_weight() - plain.weight
    assert off.abs().max() <= 1.0001 * layer.scales.max() and off.mean().abs() < 3e-5


def test_nf4_is_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip('bitsandbytes')
    layer, plain = (kind(linear(96, 64, torch.float32), 4, 8.0, 2)
                    for kind in (NF4LoRALinear, MHLoRALinear))
    theirs = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type='nf4')
    theirs.weight = bitsandbytes.nn.Params4bit(linear(96, 64, torch.float32).weight.data,
                                               False, compress_statistics=False,
                                               quant_type='nf4')
    x = normal(5, 64).float()
    theirs.to('cpu')  # quantizes
    W = bitsandbytes.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
    close(layer(x), x @ W.T, 1e-5)  # B is zero
    plain.weight.data = layer.weight_in(torch.float32)
    plain.B.data = layer.B.data = normal(2, 96, 4).float()
    plain.A.data = layer.A.data
    for each in (layer, plain):
        each(x).square().sum().backward()
    close(layer.A.grad, plain.A.grad, 1e-3)
    close(layer.merged_weight(), plain.merged_weight(), 1e-5)
    assert layer.weight.nbytes + layer.absmax.nbytes == 96 * 64 * (0.5 + 4 / 64)


@parametrize('make', [Int8Linear, Int8ProjectedLinear, NF4LoRALinear])
def test_no_weight_in_floating_point_is_saved(make):
    if make is NF4LoRALinear:
        pytest.importorskip('bitsandbytes')
    layer, sizes = make(linear(96, 64, torch.float32), 4) if make is not Int8Linear else \
        make(linear(96, 64, torch.float32)), []
    with saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        layer(normal(2, 64).float().requires_grad_())
    assert max(sizes) < 96 * 64


# -----------------------------------------------------------------------------
# models


def make(kind):
    torch.manual_seed(0)
    model = tiny_llama().float()
    targets = ['attn', 'mlp']
    if kind == 'int8':
        model.bfloat16()
        replace_linears(model, targets, Int8Linear)
        model.rest = InBackward(model, adam8bit, dict(betas=(0.9, 0.999)))
    else:
        replace_linears(model, targets, lambda linear: Int8ProjectedLinear(linear, 8))
    return model, LowRankOptimizer(model, 1e-2, rule='adam8bit' if kind == 'galore' else 'adam',
                                   update_proj_gap=6)


def weights_of(model):
    return {name: x.clone() for name, x in merged_state_dict(model).items() if torch.is_tensor(x)}


@parametrize('kind', ['int8', 'galore'])
def test_training_learns_and_resumes_bit_for_bit(kind, tmp_path):
    pytest.importorskip('bitsandbytes')
    model, optimizer = make(kind)
    batch, losses = torch.arange(8 * 8).view(8, 8) % 31, []
    for step in range(30):
        if step == 15:
            torch.save(gather_state(model, optimizer), tmp_path / 'ckpt.pt')
        if step == 22:
            kept = weights_of(model)
            model, optimizer = make(kind)
            load_state(model, optimizer, torch.load(tmp_path / 'ckpt.pt', map_location='cpu'))
        if step == 29:
            assert same(weights_of(model), kept)
        torch.manual_seed(step if step < 22 else step - 7)
        for module in model.modules():
            if hasattr(module, 'lr'):
                module.lr = 1e-2
        loss = model(batch, (batch + 1) % 31)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
