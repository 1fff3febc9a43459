"""
Weights and moments in few bits. The layers take an nn.Linear, like the layers of lowrank.py:

    Int8Linear           W in int8, trained at full rank in the backward pass       1.03 bytes of W
    Int8ProjectedLinear  GaLore on a W in int8                                      per element
    NF4LoRALinear        LoRA on a frozen W in NF4, by bitsandbytes                 0.56 bytes
    InBackward           trains plain parameters in the backward pass, such as a bfloat16 embedding

The rules are adafactor, muon_without_momentum and adam8bit, whose moments bitsandbytes stores in 8
bits. For AdamW at full rank with all moments in 8 bits, bitsandbytes.optim.AdamW8bit is enough.

Most steps change a weight by less than int8 or bfloat16 can tell apart, and rounding to the nearest
value would lose them. So rounding is stochastic: up with the probability that makes its mean exact.
It draws from torch's global generator. A script seeds that in every step, so that a resumed run
rounds alike: torch.manual_seed(seed + step).
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from galore import RULES, adam, orthogonal
from lowrank import LowRankLinear, MHLoRALinear, ProjectedLinear, add_product, mean_over_processes

TINY = 1e-30  # instead of a zero that would divide


def wide(dtype):
    """The dtype to compute in."""
    return torch.promote_types(dtype, torch.float32)


# -----------------------------------------------------------------------------
# stochastic rounding: W <- decay W - lr update, some rows at a time


@functools.cache
def compiled(function, device):
    """On GPUs since Ampere a compiled function reads and writes each element once."""
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.compile(function, dynamic=True)
    return function


def slices_of_rows(W):
    """Slices of rows that keep temporary tensors small, and on a CPU in its cache."""
    most = 2**18 if W.device.type == 'cpu' else 2**22  # elements
    count = max(most // W[0].numel(), 1)
    return (slice(i, i + count) for i in range(0, len(W), count))


def change_int8(codes, scales, update, lr, decay):
    """New codes (m, blocks, size) and scales (m, blocks, 1) of decay W - lr update."""
    W = codes * (decay * scales) - lr * update.to(scales.dtype)
    scales = W.abs().amax(-1, keepdim=True) / 127
    levels = W / scales.clamp_min(TINY) + torch.rand_like(W)
    return levels.floor().clamp(-127, 127).to(torch.int8), scales


def change_bfloat16(W, update, lr, decay):
    """decay W - lr update in bfloat16, which is the upper 16 bits of a float32."""
    x = W.float() * decay - lr * update.float()
    # a GPU's NaN is 0x7fffffff: without the clamp the sum would overflow and become zero
    bits = x.view(torch.int32).clamp(max=0x7fff0000)
    bits = bits + torch.randint_like(bits, 2**16)
    return (bits & -2**16).view(torch.float32).bfloat16()


def change_(W, update, lr, decay=1.0):
    """W <- decay W - lr update, in place, for a plain weight."""
    if W.dtype != torch.bfloat16:
        W.mul_(decay).sub_(update, alpha=lr)
        return
    for rows in slices_of_rows(W):
        new = compiled(change_bfloat16, W.device)(W[rows], update[rows], lr, decay)
        W[rows] = new


# -----------------------------------------------------------------------------
# rules: (gradients, states, group) -> updates, as in galore.py. They may overwrite gradients.


def adafactor(gradients, states, group=None):
    """
    G, divided by the root of its second moment (Shazeer and Stern 2018, arXiv 1804.04235, algorithm
    4). The moment is a matrix of rank one, so the state is a row and a column; of a vector it is
    whole. It reaches back further with every step. An update whose root mean square is above 1 is
    scaled down to 1.
    """
    for gradient, state in zip(gradients, states):
        G, dtype = gradient.view(-1, gradient.shape[-1]), wide(gradient.dtype)
        state['step'] = state.get('step', 0) + 1
        for name, dim in (('rows', 1), ('columns', 0)):
            # a norm needs no copy of G in float32
            norm = torch.linalg.vector_norm(G, dim=dim, keepdim=True, dtype=dtype)
            mean = norm.square() / G.shape[dim]
            state[name] = torch.lerp(state.get(name, mean), mean, state['step']**-0.8)
        G.mul_((state['rows'].mean() / state['rows'].clamp_min(TINY)).sqrt())
        G.mul_(state['columns'].clamp_min(TINY).rsqrt())
        G.div_((torch.linalg.vector_norm(G, dtype=dtype) / G.numel()**0.5).clamp_min(1))
    return gradients


def muon_without_momentum(gradients, states, group=None):
    """G with all its singular values near 1, which needs no state. SWAN (arXiv 2412.13148) is close
    to it."""
    return [orthogonal(G.unflatten(0, (state['stacked'], -1))).flatten(0, 1)
            for G, state in zip(gradients, states)]


class Moment8:
    """A moment in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), with an absmax for each 256
    elements. Q's refresh rotates it by `@`, like a tensor."""

    def __init__(self, x, signed):
        self.signed = signed
        self.codes, self.absmax = torch.ops.bitsandbytes.quantize_blockwise(
            x.contiguous(), levels_of_moments(signed, x.device), 256)

    def to_float(self, device):
        levels = levels_of_moments(self.signed, device)
        return torch.ops.bitsandbytes.dequantize_blockwise(
            self.codes.to(device), self.absmax.to(device), levels, 256, torch.float32)

    def __matmul__(self, C):
        return Moment8(self.to_float(C.device) @ C.float(), self.signed)


@functools.cache
def levels_of_moments(signed, device):
    from bitsandbytes.functional import create_dynamic_map  # its import takes a second
    return create_dynamic_map(signed).to(device)


torch.serialization.add_safe_globals([Moment8])  # checkpoints are loaded with weights_only=True


def adam8bit(gradients, states, group):
    """Adam's update as in galore.py, with moments of 2.03 bytes per element in place of 8."""
    updates = []
    for G, state in zip(gradients, states):
        moments = {key: x.to_float(G.device) if isinstance(x, Moment8) else x
                   for key, x in state.items()}
        updates += [update.to(G.dtype) for update in adam([G.float()], [moments], group)]
        state.update(step=moments['step'], exp_avg=Moment8(moments['exp_avg'], True),
                     exp_avg_sq=Moment8(moments['exp_avg_sq'], False))
    return updates


RULES.update(adafactor=adafactor, adam8bit=adam8bit)


# -----------------------------------------------------------------------------
# layers


class QuantizedProduct(torch.autograd.Function):
    """y = x W^T for a layer that has W in few bits. Saved for the backward pass is no W in floating
    point, and x only where the layer trains W, after the gradient of x."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x if isinstance(layer, Int8Linear) else None)
        return F.linear(x, layer.weight_in(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = dy @ layer.weight_in(dy.dtype)
        if x is not None:
            layer.update(dy.flatten(0, -2).mT @ x.flatten(0, -2))
        return dx, None


class QuantizedLinear(LowRankLinear):
    """What the layers share: `weight` has codes, and `weight_in` gives W in a dtype."""

    def base(self, x):
        """W x + b"""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = QuantizedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Weight(QuantizedLinear):
    """W as codes (m, n) in int8 with a scale for each block of a row. Take the linear layer in its
    final dtype: a later cast of the model would leave the scales too few bits."""

    def quantize(self):
        W = self.weight.detach().to(wide(self.weight.dtype))
        m, n = W.shape
        block = next((size for size in (128, 64, 32) if n % size == 0), n)
        blocks = W.view(m, -1, block)
        scales = blocks.abs().amax(-1, keepdim=True) / 127
        codes = (blocks / scales.clamp_min(TINY)).round().to(torch.int8).flatten(1)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer('scales', scales)  # (m, blocks, 1)

    def weight_in(self, dtype):
        codes = self.weight.unflatten(1, (self.scales.shape[1], -1))
        W = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, self.scales, out=W).flatten(1)  # rounds once, and copies nothing

    @torch.no_grad()
    def merged_weight(self):
        return self.weight_in(self.scales.dtype)

    def change(self, update_of, lr, decay):
        """W <- decay W - lr update, where update_of(rows) are rows of the update."""
        change = compiled(change_int8, self.weight.device)
        codes = self.weight.unflatten(1, (self.scales.shape[1], -1))  # (m, blocks, size)
        for rows in slices_of_rows(self.weight):
            update = update_of(rows).view(codes[rows].shape)
            codes[rows], self.scales[rows] = change(
                codes[rows], self.scales[rows], update, lr, decay)


class HasRule:
    """A rule, and its states {name of a weight: state}, which are a part of the model's checkpoint.
    Set `lr` before each step."""
    lr = 0.0

    def set_rule(self, rule, group, weight_decay):
        self.rule, self.group, self.weight_decay, self.states = rule, group, weight_decay, {}

    def update_of(self, name, G, stacked=1):
        state = self.states.setdefault(name, {'stacked': stacked})
        for key, x in state.items():
            if torch.is_tensor(x):
                state[key] = x.to(G.device)  # a checkpoint is read on the CPU
        return self.rule([mean_over_processes(G)], [state], self.group)[0]

    def get_extra_state(self):
        return self.states

    def set_extra_state(self, states):
        self.states = states


class Int8Linear(HasRule, Int8Weight):
    """
    W trains at full rank, and its gradient G (m, n) lives only until W is updated, as in LOMO
    (arXiv 2306.09782). So gradients cannot be clipped, and a step has one micro-batch, in which a
    layer is used once. Inputs need a gradient: something before has to train, like the embedding.

    group   what the rule needs, such as dict(betas=(0.9, 0.999)) for adam8bit
    """

    def __init__(self, linear, rule=adafactor, group=None, weight_decay=0.0):
        super().__init__(linear, rank=0)
        self.stacked = getattr(linear, 'stacked', 1)
        self.set_rule(rule, group, weight_decay)
        self.quantize()

    def forward(self, x):
        assert x.requires_grad or not torch.is_grad_enabled(), 'nothing before this layer trains'
        return self.base(x)

    @torch.no_grad()
    def update(self, G):
        update = self.update_of('weight', G, self.stacked)
        self.change(lambda rows: update[rows], self.lr, 1 - self.lr * self.weight_decay)

    def merge(self, generator):
        """Does nothing: there is nothing beside W."""


class InBackward(HasRule, nn.Module):
    """
    Trains all parameters of a model that need a gradient, each as soon as it has one. Those in
    bfloat16 are rounded stochastically. Make it a part of the model, so that checkpoints have its
    states: `model.rest = InBackward(model)`.
    """

    def __init__(self, model, rule=adafactor, group=None, weight_decay=0.0):
        super().__init__()
        self.set_rule(rule, group, weight_decay)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(functools.partial(self.update, name))

    @torch.no_grad()
    def update(self, name, p):
        decay = 1 - self.lr * self.weight_decay if p.dim() > 1 else 1.0
        change_(p, self.update_of(name, p.grad), self.lr, decay)
        p.grad = None


class Int8ProjectedLinear(Int8Weight, ProjectedLinear):
    """GaLore with the sketch. The SVD would need the gradient of W, which int8 cannot have."""

    def __init__(self, linear, rank=128):
        super().__init__(linear, rank)
        self.quantize()

    def forward(self, x):
        y = self.base(x)
        if not torch.is_grad_enabled():
            return y
        x = x.detach()  # what follows adds zeros, only their factors have gradients
        if self.Z is not None:
            y = self.add(y, x, self.Omega, self.Z)
        return self.add(y, x, self.B, self.Q)

    def add(self, y, x, on_long, on_short):
        up, down = (on_long, on_short) if self.is_tall else (on_short, on_long)
        return add_product(y, x, down.mT[None], up[None])

    @torch.no_grad()
    def apply_update(self, update, lr, decay):
        """W <- decay (W - lr update Q^T), for update (long, r)"""
        left, right = (update, self.Q) if self.is_tall else (self.Q, update)
        self.change(lambda rows: left[rows] @ right.mT, lr * decay, decay)


class NF4LoRALinear(QuantizedLinear, MHLoRALinear):
    """LoRA on a frozen W in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), with an absmax
    for each 64 elements. Merges into W would lose most of what was learned, so there are none. The
    heads have the dtype of the linear layer."""

    def __init__(self, linear, rank=8, alpha=8.0, heads=1):
        from bitsandbytes.functional import quantize_4bit  # its import takes a second
        super().__init__(linear, rank, alpha, heads)
        self.shape = linear.weight.shape
        codes, state = quantize_4bit(self.weight.detach().float(), blocksize=64, quant_type='nf4')
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer('absmax', state.absmax)

    def weight_in(self, dtype):
        known = dtype if dtype.itemsize < 8 else torch.float32  # it has no kernel for float64
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, self.absmax, 64, 'nf4', self.shape, known).to(dtype)

    @torch.no_grad()
    def merged_weight(self):
        return self.weight_in(self.A.dtype) + self.mean_change()
