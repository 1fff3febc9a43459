"""
Multi-head LoRA: linear layers as a frozen weight plus H low-rank heads (Huh et al., "Training Neural Networks from
Scratch with Parallel Low-Rank Adapters", LTE, arXiv 2402.16828; Hu et al., LoRA, arXiv 2106.09685). Needs torch only.

Symbols: W (m, n) frozen; A (H, r, n), B (H, m, r) trained; s = alpha / r.

    head_input='shared':  y = W x + (s / H) sum_h B_h A_h x            every head sees every token (MHLoRA)
    head_input='split':   y = W x + s (B_h A_h - B_h' A_h') x          head h sees its own part of the batch (LTE)
    merge:                W <- W + (s / H) sum_h (B_h A_h - B_h' A_h') heads are averaged, primes: at the last merge
"""

import contextlib
import hashlib
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# the product

# Operations per token; R = H r (shared, stacked) or r (split), twice that where merged heads train on (their products
# are taken off again); `loop` is the plain loop over heads:
#
#                      forward            backward                 passes over a (tokens, m) or (tokens, n) array
#   dense, trained     2 m n              4 m n                    none besides its own output
#   loop               2 m n + 2 R(m+n)   2 m n + 4 R(m+n)         H more sums forward, H more backward
#   stacked            2 m n + 2 R(m+n)   2 m n + 4 R(m+n)         none: the low-rank products accumulate in place
#   folded W + s B A   2 m n + 2 R m n / tokens   4 m n + ...      needs dW (m, n) to get dA, dB
#
# Folding costs the dense layer's operations again, so heads are stacked. At rank 4 the products are bound by memory,
# not operations: what counts is that the big arrays are passed over as rarely as possible.


class _FrozenPlusHeads(torch.autograd.Function):
    """y = x W^T + b + scale * (x A^T) B^T for each group; see `frozen_plus_heads`."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, gain):
        groups, _, n = A.shape
        flat = x.reshape(-1, n)  # (tokens, n)
        y = F.linear(flat, weight.to(x.dtype), bias)  # (tokens, m)
        grouped = flat.view(groups, -1, n)  # (groups, tokens / groups, n)
        z = torch.bmm(grouped, A.mT)  # (groups, tokens / groups, r)
        y.view(groups, -1, y.shape[-1]).baddbmm_(z, B.mT, alpha=scale)
        ctx.save_for_backward(flat, weight, A, B, z)
        ctx.scale, ctx.gain = scale, gain
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        flat, weight, A, B, z = ctx.saved_tensors
        groups, r, n = A.shape
        dflat = dy.reshape(-1, dy.shape[-1])  # (tokens, m)
        dgrouped = dflat.view(groups, -1, dy.shape[-1])  # (groups, tokens / groups, m)
        dz = torch.bmm(dgrouped, B).mul_(ctx.scale)  # (groups, tokens / groups, r)
        dx = dA = dB = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dflat @ weight.to(dflat.dtype)  # (tokens, n)
            dx.view(groups, -1, n).baddbmm_(dz, A)
            dx = dx.view(*dy.shape[:-1], n)
        if ctx.needs_input_grad[2]:
            dbias = dflat.sum(0)
        if ctx.needs_input_grad[3]:
            dA = torch.bmm(dz.mT, flat.view(groups, -1, n))  # (groups, r, n)
            dA = dA.mul_(ctx.gain) if ctx.gain != 1 else dA
        if ctx.needs_input_grad[4]:
            dB = torch.bmm(z.mT, dgrouped).mul_(ctx.scale * ctx.gain).mT  # (groups, m, r), faster than dy^T z
        return dx, None, dbias, dA, dB, None, None


def frozen_plus_heads(x, weight, bias, A, B, scale, gain=1):
    """
    A frozen linear plus low-rank products that accumulate into its output, with no gradient for the weight.

    x (..., n); weight (m, n); bias (m,) or None; A (groups, r, n), B (groups, m, r): the leading dimension of x is
    cut into `groups` equal parts, one for each pair. scale multiplies B A; gain multiplies the gradients of A and B.
    Under autocast everything is computed in autocast's dtype. Returns (..., m).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, A, B, bias = x.to(dtype), A.to(dtype), B.to(dtype), bias if bias is None else bias.to(dtype)
    return _FrozenPlusHeads.apply(x, weight, bias, A, B, scale, gain)


# -----------------------------------------------------------------------------
# the layer


class MHLoRALinear(nn.Module):
    """
    A linear layer with a frozen weight and H low-rank heads.

    linear: the nn.Linear to replace; its weight is frozen (and not copied), its bias stays trainable.
    heads, rank, alpha: H, r, and alpha of s = alpha / r. head_input, head_compute: see `apply_mhlora`.
    merge_reset: whether `merge` draws A anew and zeroes B, or lets them train on (LTE's default) and remembers their
    values A_merged, B_merged, which are then subtracted.
    thirds: () for all outputs, or which thirds of them (0, 1, 2: q, k, v of a fused projection) have heads, each its own:
    A is then (H, thirds r, n) and B (H, thirds m / 3, r), as if q, k and v were layers of their own.
    Attributes: weight (m, n), bias (m,) or None, A (H, r, n), B (H, m, r).
    """

    def __init__(self, linear, heads, rank, alpha, head_input='shared', head_compute='parallel', merge_reset=True,
                 thirds=()):
        super().__init__()
        m, n = linear.weight.shape
        parts, rows = (len(thirds), m // 3) if thirds else (1, m)
        if not 1 <= rank <= min(rows, n):
            raise ValueError(f'rank={rank} does not fit a linear layer of {n} inputs and {rows} outputs: '
                             f'set a rank between 1 and {min(rows, n)}')
        self.in_features, self.out_features, self.thirds = n, m, tuple(thirds)
        self.heads, self.rank, self.scale = heads, rank, alpha / rank
        self.head_input, self.head_compute, self.merge_reset = head_input, head_compute, merge_reset
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias
        self.A = nn.Parameter(self.weight.new_empty(heads, parts * rank, n))
        self.B = nn.Parameter(self.weight.new_empty(heads, parts * rows, rank))
        self.reset_heads()
        if not merge_reset:
            self.register_buffer('A_merged', torch.zeros_like(self.A))
            self.register_buffer('B_merged', torch.zeros_like(self.B))

    def extra_repr(self):
        return (f'{self.in_features} -> {self.out_features}, heads={self.heads}, rank={self.rank}, '
                f'scale={self.scale:g}, {self.head_input}, {self.head_compute}')

    @torch.no_grad()
    def reset_heads(self, generator=None):
        """LTE's initialisation: A orthogonal times sqrt(n / r), B zero, so that the heads add nothing at first."""
        for A in self.A.view(-1, self.rank, self.in_features):  # in float32: there is no QR of 16 bits
            drawn = torch.empty(A.shape, dtype=torch.promote_types(A.dtype, torch.float32))
            nn.init.orthogonal_(drawn, gain=math.sqrt(self.in_features / self.rank), generator=generator)
            A.copy_(drawn)
        self.B.zero_()

    def on_all_rows(self, B):
        """B (H, thirds m / 3, r) as a matrix (H, m, thirds r): each third in its rows and next to its A, zeros around.

        The products then are those of any other layer; the zeros cost operations, but r of them are few."""
        if not self.thirds:
            return B
        rows = self.out_features // 3
        return torch.cat([F.pad(part, (0, 0, third * rows, (2 - third) * rows))  # (H, m, r)
                          for third, part in zip(self.thirds, B.split(rows, 1))], 2)

    def pairs(self):
        """A, B with the heads' own products, and with what the last merges already put into W taken off again."""
        B = self.on_all_rows(self.B)
        if self.merge_reset:
            return self.A, B
        merged = self.on_all_rows(self.B_merged)
        return torch.cat([self.A, self.A_merged], 1), torch.cat([B, -merged], 2)  # (H, 2 r, n), (H, m, 2 r)

    def stacked(self):
        """All heads as one pair of rank R = H r: A (1, R, n), B (1, m, R)."""
        A, B = self.pairs()
        return A.flatten(0, 1)[None], B.permute(1, 0, 2).flatten(1)[None]

    def forward(self, x):
        if self.head_input == 'split':
            if x.shape[0] % self.heads:
                raise ValueError(f'a batch of {x.shape[0]} does not split over {self.heads} heads: '
                                 'set batch_size to a multiple of heads times the number of ranks')
            # the loss is a mean over the whole batch, a head's gradient that of the mean over its own part: H times
            return frozen_plus_heads(x, self.weight, self.bias, *self.pairs(), self.scale, gain=self.heads)
        if self.head_compute == 'parallel':
            return frozen_plus_heads(x, self.weight, self.bias, *self.stacked(), self.scale / self.heads)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not once a head
        y = F.linear(x, self.weight, self.bias)  # the textbook form: one head after the other
        for A, B in zip(*self.pairs()):
            y = y + F.linear(self.scale / self.heads * F.linear(x, A), B)
        return y

    @torch.no_grad()
    def merge(self, generator=None):
        """W <- W + (s / H) sum_h (B_h A_h - B_h' A_h'), in float32 or wider; then reset, or remember A and B."""
        (A,), (B,) = self.stacked()
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        merged = torch.addmm(self.weight.to(wide), B.to(wide), A.to(wide), alpha=self.scale / self.heads)  # (m, n)
        self.weight.copy_(merged)
        if self.merge_reset:
            self.reset_heads(generator)
        else:
            self.A_merged.copy_(self.A)
            self.B_merged.copy_(self.B)


# -----------------------------------------------------------------------------
# ranks

traffic = {'bytes': 0}  # what this process has put into collectives of its own so far; DDP's are not in it


def average_over_ranks_(x, world_size):
    """The average of a tensor over all ranks, in place; with one rank, the tensor itself."""
    if world_size > 1:
        traffic['bytes'] += x.numel() * x.element_size()
        torch.distributed.all_reduce(x)  # gloo has no average
        x.div_(world_size)
    return x


# -----------------------------------------------------------------------------
# models

# What a kind of layer is called in GPT-2, LLaMA and timm's ViT; any other target is a module's own name, as in PEFT.
KINDS = {'attn': ('attn', 'self_attn'), 'mlp': ('mlp',), 'logit': ('lm_head', 'head')}
FUSED = ('qkv', 'c_attn')  # timm's and GPT-2's linear layers that compute q, k and v at once, a third of the outputs each


def apply_mhlora(model, targets=('attn',), heads=4, rank=4, alpha=4.0, head_input='shared', head_compute='parallel',
                 merge_reset=True):
    """
    Replaces linear layers of a model by MHLoRALinear, in place; the model's function stays the same.

    targets: kinds ('attn', 'mlp', 'logit') or names of modules ('c_attn'); every nn.Linear with one of them in its
    dotted name is replaced. 'q', 'k', 'v' are also the thirds of a fused projection. heads, rank, alpha: H, r, alpha.
    head_input: 'shared', every head sees every token, or 'split', head h sees the h-th part of the batch.
    head_compute: 'parallel', all heads in one pair of products, or 'sequential', a loop (the same result, slower).
    merge_reset: what `merge` does with the heads, see MHLoRALinear.
    Where the output layer is replaced and its weight is tied to an embedding, the layer gets its own frozen copy and
    the embedding stays trainable: the count of parameters rises.
    Returns the names of the replaced layers. ValueError: a target that matches nothing, or what another one covers.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    uses = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    replaced = {}  # names, and which thirds of their outputs get heads: [None] for all
    for target in targets:
        wanted = KINDS.get(target, (target,))
        matched = {name: None for name in linears if any(part in wanted for part in name.split('.'))}
        if target in ('q', 'k', 'v'):
            matched |= {name: 'qkv'.index(target) for name in linears if name.split('.')[-1] in FUSED}
        if not matched:
            there = sorted({name.split('.')[-1] for name in linears})
            raise ValueError(f"no linear layer matches lowrank='{target}': set 'attn', 'mlp', 'logit' or one of "
                             f"{', '.join(there)}")
        for name, third in matched.items():
            thirds = replaced.setdefault(name, [])
            thirds += [third] * (third not in thirds)
            if None in thirds and len(thirds) > 1:
                raise ValueError(f"lowrank='{','.join(targets)}' puts heads on {name} and again on a part of it: leave "
                                 'one of the two out')
    for name, thirds in replaced.items():
        linear = linears[name]
        if uses.count(id(linear.weight)) > 1:  # tied: freezing it would freeze the embedding
            linear.weight = nn.Parameter(linear.weight.detach().clone())
        model.set_submodule(name, MHLoRALinear(linear, heads, rank, alpha, head_input, head_compute, merge_reset,
                                               () if None in thirds else sorted(thirds)))
    return list(replaced)


def check_settings(settings, world_size):
    """Refuses (ValueError) settings of heads that make no sense together; world_size: the number of ranks."""
    s = settings
    for key, allowed in dict(head_input=('shared', 'split'), head_compute=('parallel', 'sequential')).items():
        if s[key] not in allowed:
            raise ValueError(f"{key}={s[key]!r} is not known: set one of {', '.join(map(repr, allowed))}")
    if s['batch_size'] % world_size:
        raise ValueError(f"batch_size={s['batch_size']} does not split over {world_size} ranks: set a multiple")
    if s['merge_every'] < 0:
        raise ValueError(f"merge_every={s['merge_every']} makes no sense: set 0 (never) or a number of steps")
    if s['merge_every'] and not s['lowrank']:
        raise ValueError(f"merge_every={s['merge_every']} has no heads to merge: set lowrank='attn' or merge_every=0")
    if s['merge_reset'] and not s['merge_every']:
        raise ValueError('merge_reset=True without merges does nothing: set merge_every, or merge_reset=False')
    if s['rewarm_iters'] and not s['merge_reset']:
        raise ValueError(f"rewarm_iters={s['rewarm_iters']} is for merges that reset: set merge_reset=True, or 0")
    if s['merge_reset'] and s['optimizer'] == 'galore':
        raise ValueError("merge_reset=True would drop GaLore's bases at every merge: set optimizer='adamw' or "
                         'merge_reset=False')
    if not s['lowrank']:
        return
    if s['head_input'] == 'split':
        if s['head_compute'] == 'sequential':
            raise ValueError("split heads have no sequential form: set head_compute='parallel'")
        if s['optimizer'] == 'galore' and s['grad_clip']:
            raise ValueError("grad_clip with optimizer='galore' knows no norm of each split head: set grad_clip=0.0")
        if s['batch_size'] % s['heads']:
            raise ValueError(f"batch_size={s['batch_size']} does not split over heads={s['heads']}: set a multiple")
        if world_size > 1:
            raise ValueError(f"head_input='split' runs in one process, not {world_size}: start it without torchrun")
    elif s['merge_every'] and not s['merge_reset']:
        raise ValueError("merging shared heads without reset changes nothing: set merge_reset=True (ReLoRA) or "
                         "head_input='split' (LTE)")


def head_layers(model):
    """The MHLoRALinear layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MHLoRALinear)]


def merge(model, generator=None):
    """Merges the heads of every layer into its weight, averaged over heads (LTE, section 3); see MHLoRALinear.merge."""
    for layer in head_layers(model):
        layer.merge(generator)


@contextlib.contextmanager
def averaged_heads(model):
    """While this lasts, split heads act on every token, averaged: the function of the merged weights, for evaluation."""
    split = [layer for layer in head_layers(model) if layer.head_input == 'split']
    for layer in split:
        layer.head_input = 'shared'
    try:
        yield
    finally:
        for layer in split:
            layer.head_input = 'split'


def drop_moments(model, optimizer):
    """Drops the optimizer's state of every A and B: after a reset, moments and step counts belong to other factors."""
    for layer in head_layers(model):
        for factor in (layer.A, layer.B):
            optimizer.state.pop(factor, None)


@torch.no_grad()
def clip_gradients(model, max_norm):
    """
    Clips gradients to the norm max_norm, in place; split heads are models of their own, so each has a norm of its own.

    max_norm: 0 only measures. Returns the norm of the whole gradient before clipping, as a tensor.
    """
    factors = [f for layer in head_layers(model) if layer.head_input == 'split' for f in (layer.A, layer.B)]
    own = {id(factor) for factor in factors}
    rest = [p for p in model.parameters() if id(p) not in own and p.grad is not None]
    norms = nn.utils.get_total_norm([p.grad for p in rest])[None]
    if factors:
        of_heads = sum(f.grad.float().square().sum((1, 2)) for f in factors).sqrt()  # (H,), each over all layers
        norms = torch.cat([norms, of_heads.to(norms)])  # (1 + H,)
    if max_norm:
        keep = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([p.grad for p in rest], keep[0])
        for factor in factors:
            factor.grad.mul_(keep[1:, None, None])
    return torch.linalg.vector_norm(norms)


def count_parameters(model):
    """Numbers of parameters: total, trainable, frozen, and trainable ones by kind (heads, attn, mlp, logit, other)."""
    counts = dict(total=0, trainable=0, frozen=0, heads=0, **dict.fromkeys(KINDS, 0), other=0)
    factors = {id(factor) for layer in head_layers(model) for factor in (layer.A, layer.B)}
    for name, parameter in model.named_parameters():  # a tied weight comes once, under its first name
        counts['total'] += parameter.numel()
        counts['trainable' if parameter.requires_grad else 'frozen'] += parameter.numel()
        if parameter.requires_grad:
            parts = name.split('.')
            kind = next((kind for kind, names in KINDS.items() if any(part in names for part in parts)), 'other')
            counts['heads' if id(parameter) in factors else kind] += parameter.numel()
    return counts


def freeze_rest(model, kinds=('logit',)):
    """Freezes all but the heads and the layers of the given kinds: LoRA as in PEFT, where biases and norms stay too."""
    factors = {id(factor) for layer in head_layers(model) for factor in (layer.A, layer.B)}
    names = {name for kind in kinds for name in KINDS[kind]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in factors and names.isdisjoint(name.split('.')):
            parameter.requires_grad_(False)


# -----------------------------------------------------------------------------
# adapters


def adapter_parts(model, about):
    """(tensors of an adapter: what trains, and the output layer; its metadata: `about` and a checksum of the rest)."""
    parts, base = {}, hashlib.sha256()
    for name, p in model.named_parameters():
        if p.requires_grad or not set(KINDS['logit']).isdisjoint(name.split('.')):
            parts[name] = p.detach()
        else:
            base.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return parts, {**{key: str(value) for key, value in about.items()}, 'base': base.hexdigest()[:16]}


def save_adapter(model, path, about):
    """Writes what is trained (heads, classifier) and nothing of the frozen base, as safetensors.

    about: what has to be the same when it is loaded, such as the model's name, rank and alpha; kept as metadata, with a
    checksum of the frozen weights."""
    from safetensors.torch import save_file
    parts, about = adapter_parts(model, about)
    save_file({name: part.cpu().contiguous() for name, part in parts.items()}, f'{path}.tmp', about)
    os.replace(f'{path}.tmp', path)


def load_adapter(model, path, about):
    """Loads what `save_adapter` wrote into a model with the same base and the same heads; ValueError for any other."""
    from safetensors import SafetensorError, safe_open
    parts, about = adapter_parts(model, about)
    try:
        with safe_open(path, 'pt') as file:
            theirs, saved = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or no safetensors file ({error}): check the path") from None
    for key, value in about.items():
        if theirs.get(key) != value:
            raise ValueError(f"adapter '{path}' goes with {key}={theirs.get(key)}, not {value}: load it onto the model "
                             'that it was trained on, with the same heads')
    for name, part in parts.items():
        part.copy_(saved[name])
