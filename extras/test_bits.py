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
from test_lowrank import (close, data, double, forked, in_processes, interrupted, method_file,
                          normal, parametrize, same, saved, tiny_llama, train)


def linear(m, n, dtype=double):
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    layer.weight.data = 0.1 * normal(m, n, seed=1).to(dtype)
    return layer


def levels(layer):
    """The distance (m, n) between the levels of an int8 weight."""
    blocks = layer.weight.unflatten(1, (layer.scales.shape[1], -1))
    return layer.scales.expand_as(blocks).flatten(1)


# -----------------------------------------------------------------------------
# rounding


@parametrize('compiles', [False, True])  # compiling takes half a minute on a slow CPU
def test_rounding_is_unbiased_and_off_by_one_level_at_most(compiles, monkeypatch):
    if compiles:
        monkeypatch.setattr(bits, 'compiled', lambda f, device: torch.compile(f, dynamic=True))
    torch.manual_seed(0)
    layer, update = Int8Linear(linear(3, 256, torch.float32)), normal(3, 256, seed=2).float()
    start, codes, scales = layer.merged_weight(), layer.weight.clone(), layer.scales.clone()
    level = levels(layer).clone()

    def change_codes():
        layer.weight.copy_(codes)
        layer.scales.copy_(scales)
        layer.change(lambda rows: update[rows], 1e-4, 0.99)
        return layer.merged_weight()

    def change_plain():
        W = start.bfloat16()
        change_(W, update, 1e-4, 0.99)
        return W.float()
    of_plain = start.bfloat16().float() * 0.99 - 1e-4 * update
    for change, exact, level in ((change_codes, start * 0.99 - 1e-4 * update, level),
                                 (change_plain, of_plain, of_plain.abs() / 128 + 1e-9)):
        results = torch.stack([change() for _ in range(400)])
        assert ((results - exact).abs() <= 1.01 * level).all()
        # a standard error is half a level / 20 at most
        assert ((results.mean(0) - exact) / level).abs().max() < 0.13


def test_bfloat16_keeps_what_is_not_finite():
    """A sum that overflows would turn NaN into a zero, and a diverged run would be saved."""
    W = torch.tensor([[0.0, torch.inf, -torch.inf, 0.0, 1.5]], dtype=torch.bfloat16)
    update = torch.zeros(1, 5)
    update.view(torch.int32)[0, 0] = 0x7fffffff  # a GPU's NaN
    for _ in range(20):
        change_(W, update, 1.0)
        assert W[0, 0].isnan() and W[0, 1:].tolist() == [torch.inf, -torch.inf, 0.0, 1.5]


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
    layer, dy = Int8Linear(linear(m, n), weight_decay=20.0), normal(5, m, seed=3)
    layer.lr, W, x = 0.01, layer.merged_weight(), normal(5, n).requires_grad_()
    assert (W - linear(m, n).weight).abs().div(levels(layer)).max() <= 0.5 + 1e-9
    y = layer(x)
    y.backward(dy)
    close(y, x @ W.T)
    close(x.grad, dy @ W)  # of W before the step
    update, = adafactor([dy.T @ x.detach()], [{}])
    off = layer.merged_weight() - (0.8 * W - 0.01 * update)
    assert off.abs().div(levels(layer)).max() < 1.0001 and off.mean().abs() < 1e-4


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
        each.apply_update(each.B.grad, 1e-2, 0.99)
    for a, b in zip(*grads):
        close(a, b)
    off = layer.merged_weight() - plain.weight
    assert off.abs().div(levels(layer)).max() < 1.0001 and off.mean().abs() < 1e-4


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
    model = tiny_llama().float()
    if kind == 'int8':
        model.bfloat16()
        replace_linears(model, ['attn', 'mlp'], Int8Linear)
        model.rest = InBackward(model, adam8bit, dict(betas=(0.9, 0.999)))
        return model, LowRankOptimizer(model)
    replace_linears(model, ['attn', 'mlp'], lambda linear: Int8ProjectedLinear(linear, 8))
    return model, LowRankOptimizer(model, 1e-2, rule='adam8bit', update_proj_gap=6)


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


def test_script_with_8bit_moments_resumes_bit_for_bit(data, tmp_path):
    pytest.importorskip('bitsandbytes')
    argv = method_file('galore', '--rule=adam8bit')
    in_processes(1, train, 'llama', data, tmp_path / 'a', *argv)
    with forked(1, interrupted, 'ctrl-c', 'llama', data, tmp_path / 'b', *argv):
        pass
    in_processes(1, train, 'llama', data, tmp_path / 'b', *argv, '--init_from=resume')
    a, b = (saved(tmp_path / out) for out in 'ab')
    assert same(a['model'], b['model']) and a['step'] == b['step'] == 8
