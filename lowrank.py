"""
Multi-head LoRA: linear layers as a frozen weight plus H low-rank heads (Huh et al., "Training Neural Networks from
Scratch with Parallel Low-Rank Adapters", LTE, arXiv 2402.16828; Hu et al., LoRA, arXiv 2106.09685). Needs torch only.

Symbols: W (m, n) frozen; A (H, r, n), B (H, m, r) trained; s = alpha / r.

    head_input='shared':  y = W x + (s / H) sum_h B_h A_h x            every head sees every token (MHLoRA)
    head_input='split':   y = W x + s (B_h A_h - B_h' A_h') x          head h sees its own part of the batch (LTE)
    merge:                W <- W + (s / H) sum_h (B_h A_h - B_h' A_h') heads are averaged, primes: at the last merge

With head_basis='gradient' (GaLoLTE) one factor of each split head is not trained but a basis of the head's gradient,
as in GaLore: B = P for wide matrices (A trained), A = Q^T for tall ones (B trained). Then s = 1, and a merge zeroes
what is trained, moments surviving. galore.py takes the bases.
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
    def forward(ctx, x, weight, bias, A, B, scale, gain, layer):
        groups, _, n = A.shape
        flat = x.reshape(-1, n)  # (tokens, n)
        y = F.linear(flat, weight.to(x.dtype), bias)  # (tokens, m)
        grouped = flat.view(groups, -1, n)  # (groups, tokens / groups, n)
        z = torch.bmm(grouped, A.mT)  # (groups, tokens / groups, r)
        y.view(groups, -1, y.shape[-1]).baddbmm_(z, B.mT, alpha=scale)
        ctx.save_for_backward(flat, weight, A, B, z)
        ctx.scale, ctx.gain, ctx.layer = scale, gain, layer
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        flat, weight, A, B, z = ctx.saved_tensors
        groups, r, n = A.shape
        dflat = dy.reshape(-1, dy.shape[-1])  # (tokens, m)
        dgrouped = dflat.view(groups, -1, dy.shape[-1])  # (groups, tokens / groups, m)
        whole, taken = False, None  # whether the gradient of what is trained comes once for all micro-batches
        if ctx.layer is not None and ctx.layer.take_basis is not None:  # GaLoLTE: a new basis, from this very gradient
            taken = ctx.layer.take_basis(dgrouped, flat.view(groups, -1, n))
            whole = taken is not None or ctx.layer.take_basis is not None
            A, B = ctx.layer.pairs()
            A, B = A.to(flat.dtype), B.to(flat.dtype)
            z = torch.bmm(flat.view(groups, -1, n), A.mT)
        dz = torch.bmm(dgrouped, B).mul_(ctx.scale)  # (groups, tokens / groups, r)
        dx = dA = dB = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dflat @ weight.to(dflat.dtype)  # (tokens, n)
            dx.view(groups, -1, n).baddbmm_(dz, A)
            dx = dx.view(*dy.shape[:-1], n)
        if ctx.needs_input_grad[2]:
            dbias = dflat.sum(0)
        if ctx.needs_input_grad[3] and not whole:
            dA = torch.bmm(dz.mT, flat.view(groups, -1, n))  # (groups, r, n)
            dA = dA.mul_(ctx.gain) if ctx.gain != 1 else dA
        if ctx.needs_input_grad[4] and not whole:
            dB = torch.bmm(z.mT, dgrouped).mul_(ctx.scale * ctx.gain).mT  # (groups, m, r), faster than dy^T z
        if taken is not None:
            taken.mul_(ctx.gain)
            dA, dB = (taken, None) if ctx.layer.left else (None, taken)
        if ctx.layer is not None and ctx.layer.watch is not None:
            ctx.layer.watch(dgrouped, flat.view(groups, -1, n), dA if dB is None else dB)
        return dx, None, dbias, dA, dB, None, None, None


def frozen_plus_heads(x, weight, bias, A, B, scale, gain=1, layer=None):
    """
    A frozen linear plus low-rank products that accumulate into its output, with no gradient for the weight.

    x (..., n); weight (m, n); bias (m,) or None; A (groups, r, n), B (groups, m, r): the leading dimension of x is
    cut into `groups` equal parts, one for each pair. scale multiplies B A; gain multiplies the gradients of A and B.
    layer: an MHLoRALinear whose basis may be due, see `take_basis` there.
    Under autocast everything is computed in autocast's dtype. Returns (..., m).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, A, B, bias = x.to(dtype), A.to(dtype), B.to(dtype), bias if bias is None else bias.to(dtype)
    return _FrozenPlusHeads.apply(x, weight, bias, A, B, scale, gain, layer)


# GaLoLTE's backward talks to the optimizer, so torch.compile breaks its graph here
uncompiled_heads = torch.compiler.disable(frozen_plus_heads)


# -----------------------------------------------------------------------------
# the layer


class MHLoRALinear(nn.Module):
    """
    A linear layer with a frozen weight and H low-rank heads.

    linear: the nn.Linear to replace; its weight is frozen (and not copied), its bias stays trainable.
    heads, rank, alpha: H, r, and alpha of s = alpha / r. head_input, head_compute: see `apply_mhlora`.
    merge_reset: whether `merge` draws A anew and zeroes B, or lets them train on (LTE's default) and remembers their
    values A_merged, B_merged, which are then subtracted.
    thirds: () for all outputs, or which thirds of them (0, 1, 2: q, k, v of a fused layer) have heads of their own:
    A is then (H, thirds r, n) and B (H, thirds m / 3, r), as if q, k and v were layers of their own.
    head_basis: 'trained', or 'gradient': GaLoLTE, one factor of each head is a basis of its gradient.
    worker, workers: of several ranks that share the split heads, this one holds the heads worker::workers.
    Attributes: weight (m, n), bias (m,) or None, A (H / workers, r, n), B (H / workers, m, r).
    """

    def __init__(self, linear, heads, rank, alpha, head_input='shared', head_compute='parallel', merge_reset=True,
                 worker=0, workers=1, head_basis='trained', thirds=()):
        super().__init__()
        m, n = linear.weight.shape
        parts, rows = (len(thirds), m // 3) if thirds else (1, m)
        if not 1 <= rank <= min(rows, n):
            raise ValueError(f'rank={rank} does not fit a linear layer of {n} inputs and {rows} outputs: '
                             f'set a rank between 1 and {min(rows, n)}')
        self.in_features, self.out_features, self.thirds = n, m, tuple(thirds)
        self.heads, self.rank, self.scale = heads, rank, alpha / rank
        self.head_input, self.head_compute, self.merge_reset = head_input, head_compute, merge_reset
        self.worker, self.workers = (worker, workers) if head_input == 'split' else (0, 1)
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias
        self.A = nn.Parameter(self.weight.new_empty(heads // self.workers, parts * rank, n))
        self.B = nn.Parameter(self.weight.new_empty(heads // self.workers, parts * rows, rank))
        self.head_basis, self.left, self.take_basis, self.watch = head_basis, m < n, None, None
        self.shared_basis = False  # set by galore.py: all heads have the same one
        if head_basis == 'gradient':  # take_basis(dy, x): set by galore.py while a basis is due, unsets itself
            self.scale, self.merge_reset, merge_reset = 1.0, True, True  # there is nothing to subtract after a merge
            (self.B if self.left else self.A).requires_grad_(False)
            nn.init.zeros_(self.A), nn.init.zeros_(self.B)
        else:
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
        for head in range(self.heads):  # every rank draws all of them, so that they are the same on any number of ranks
            drawn = torch.empty(self.A.shape[1:], dtype=torch.promote_types(self.A.dtype, torch.float32))  # QR needs it
            for A in drawn.split(self.rank):
                nn.init.orthogonal_(A, gain=math.sqrt(self.in_features / self.rank), generator=generator)
            if head % self.workers == self.worker:
                self.A[head // self.workers].copy_(drawn)
        self.B.zero_()

    def on_all_rows(self, B):
        """B (H, thirds m / 3, r) as a matrix (H, m, thirds r): each third in its rows and next to its A, zeros around.

        The products then are those of any other layer; the zeros cost operations, but r of them are few."""
        if not self.thirds:
            return B
        rows = self.out_features // 3
        return torch.cat([F.pad(part, (0, 0, third * rows, (2 - third) * rows))  # (H, m, r)
                          for third, part in zip(self.thirds, B.split(rows, 1))], 2)

    @contextlib.contextmanager
    def all_heads(self):
        """While this lasts, A and B (A_merged, B_merged too) are those of the heads of all ranks, in global order."""
        factors = [self.A, self.B] + ([] if self.merge_reset else [self.A_merged, self.B_merged])
        own = [factor.data for factor in factors]
        if len(self.A) < self.heads:
            flat = gather_over_ranks(torch.cat([x.flatten() for x in own]))  # one message: (ranks, numbers of one rank)
            for factor, x, part in zip(factors, own, flat.split([x.numel() for x in own], 1)):
                factor.data = in_global_order(part.view(self.workers, *x.shape))
        try:
            yield
        finally:
            for factor, x in zip(factors, own):
                factor.data = x

    @property
    def trained(self):
        """With head_basis='gradient': the factor that is trained, A of a wide matrix, B of a tall or square one."""
        return self.A if self.left else self.B

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
            if x.shape[0] % len(self.A):
                raise ValueError(f'a batch of {x.shape[0]} does not split over {len(self.A)} heads: '
                                 'set batch_size to a multiple of heads times the number of ranks')
            # the loss is a mean over the whole batch of this rank, a head's gradient that of the mean over its own part
            heads_of = frozen_plus_heads if self.head_basis == 'trained' else uncompiled_heads
            return heads_of(x, self.weight, self.bias, *self.pairs(), self.scale, len(self.A),
                            None if self.head_basis == 'trained' else self)
        if self.head_compute == 'parallel':
            return frozen_plus_heads(x, self.weight, self.bias, *self.stacked(), self.scale / self.heads)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not once a head
        y = F.linear(x, self.weight, self.bias)  # the textbook form: one head after the other
        for A, B in zip(*self.pairs()):
            y = y + F.linear(self.scale / self.heads * F.linear(x, A), B)
        return y

    @property
    def sends_products(self):
        """Whether a merge averages the products (m, n), which a ring sends twice, or gathers all heads' factors."""
        factors = (self.A, self.B) if self.merge_reset else (self.A, self.B, self.A_merged, self.B_merged)
        product = self.weight.numel() * max(4, self.weight.element_size())  # in float32 or wider
        gathered = self.workers * sum(x.numel() * x.element_size() for x in factors)
        return len(self.A) < self.heads and gathered > 2 * product

    @torch.no_grad()
    def merged_weight(self):
        """W + (s / H) sum_h (B_h A_h - B_h' A_h') over the heads of all ranks (m, n), in float32 or wider. Every rank
        takes part, and gets the same bits. What travels is whichever is least on the wire: heads with one basis average
        what they train, few heads gather their factors, many average their products."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(wide)
        if self.shared_basis:
            mean = average_over_ranks_(self.trained.to(wide).mean(0), self.workers)  # (r, n), or (m, r)
            B, A = (self.B[0], mean) if self.left else (mean, self.A[0])
            return torch.addmm(weight, B.to(wide), A.to(wide), alpha=self.scale)
        if self.sends_products:
            (A,), (B,) = self.stacked()
            product = average_over_ranks_(B.to(wide) @ A.to(wide), self.workers)
            return product.mul_(self.scale / len(self.A)).add_(weight)
        with self.all_heads():
            (A,), (B,) = self.stacked()
        return torch.addmm(weight, B.to(wide), A.to(wide), alpha=self.scale / self.heads)

    @torch.no_grad()
    def merge(self, generator=None):
        """W <- W + (s / H) sum_h (B_h A_h - B_h' A_h'); then reset, or remember A and B."""
        self.weight.copy_(self.merged_weight())
        if self.head_basis == 'gradient':
            self.trained.zero_()
        elif self.merge_reset:
            self.reset_heads(generator)
        else:
            self.A_merged.copy_(self.A)
            self.B_merged.copy_(self.B)


# -----------------------------------------------------------------------------
# ranks

traffic = {'bytes': 0}  # what this process has put into collectives of its own so far; DDP's are not in it


def broadcast_from_rank_0_(x, world_size):
    """The tensor of rank 0 on all ranks, in place."""
    if world_size > 1:
        traffic['bytes'] += x.numel() * x.element_size()
        torch.distributed.broadcast(x, 0)
    return x


def average_over_ranks_(x, world_size):
    """The average of a tensor over all ranks, in place; with one rank, the tensor itself."""
    if x.dim() > 1 and x.mT.is_contiguous() and not x.is_contiguous():
        average_over_ranks_(x.mT, world_size)  # the same memory: nccl takes contiguous tensors only
    elif world_size > 1:
        traffic['bytes'] += x.numel() * x.element_size()
        torch.distributed.all_reduce(x)  # gloo has no average
        x.div_(world_size)
    return x


def gather_over_ranks(x):
    """The tensors x of all ranks, (ranks, *x.shape), in x's own layout; nothing is added, so 16 bits do."""
    if x.dim() > 1 and x.mT.is_contiguous() and not x.is_contiguous():
        return gather_over_ranks(x.mT).mT
    x = x.detach().contiguous()
    traffic['bytes'] += x.numel() * x.element_size()
    gathered = x.new_empty(torch.distributed.get_world_size(), *x.shape)
    torch.distributed.all_gather(list(gathered), x)
    return gathered


def in_global_order(x):
    """(ranks, heads of one, ...) -> (H, ...): the l-th head of rank k is head l * ranks + k, see Tokens.batch."""
    if x.dim() > 2 and x.mT.is_contiguous() and not x.is_contiguous():  # the layout stays: products round by it
        return in_global_order(x.mT).mT
    return x.transpose(0, 1).flatten(0, 1)


def own_factors(model):
    """The set of what every rank holds for its own split heads, parameters and buffers: DDP must not touch it."""
    return {x for layer in head_layers(model) if layer.workers > 1
            for x in (layer.A, layer.B, *layer.buffers(recurse=False))}


def replica_parameters(model):
    """{name: parameter} of what is trained without heads: with sync='merge' each rank has its own (LTE's replicas)."""
    factors = {factor for layer in head_layers(model) for factor in (layer.A, layer.B)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p not in factors}


def _averaged(p):
    """A copy of a parameter, averaged over ranks in float32 or wider."""
    wide = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
    return average_over_ranks_(wide, torch.distributed.get_world_size()).to(p.dtype)


def _moments(model, optimizer, state, replicas, of_heads, of_replicas):
    """An optimizer's state dict with of_heads, of_replicas applied to the tensors that belong to heads, to replicas."""
    heads, others = own_factors(model), set(replicas.values())
    change = {i: of_heads if p in heads else of_replicas for i, p in enumerate(
        p for group in optimizer.param_groups for p in group['params']) if p in heads or p in others}
    return {**state, 'state': {i: {key: change[i](x) if i in change and torch.is_tensor(x) and x.dim() else x
                                   for key, x in values.items()} for i, values in state['state'].items()}}


@torch.no_grad()
def whole_state(model, optimizer=None, replicas={}):
    """
    What a checkpoint holds, as a dict; every rank takes part, and rank 0 gets all of it.

    'model': its state dict with the heads of all ranks in global order, A (H, r, n), and replicas averaged: what is
    evaluated. With an optimizer also 'optimizer', its state dict with the moments of all heads in the same order and
    those of replicas stacked (ranks, ...), and 'replicas', {name: (ranks, ...)}.
    """
    with averaged_heads(model, replicas):
        whole = {'model': model.state_dict()}
    if optimizer is not None:
        def kept(x):
            return x.cpu() if torch.distributed.get_rank() == 0 else None  # one tensor at a time is on the device
        whole['optimizer'] = _moments(model, optimizer, optimizer.state_dict(), replicas, lambda x: kept(
            in_global_order(gather_over_ranks(x))), lambda x: kept(gather_over_ranks(x)))
        whole['replicas'] = {name: kept(gather_over_ranks(p)) for name, p in replicas.items()}
    return whole


@torch.no_grad()
def load_whole_state(model, optimizer, checkpoint, replicas={}):
    """
    Loads the model of a checkpoint made by `whole_state`, and cuts checkpoint['optimizer'] down to this rank's part.

    Heads may come from another number of ranks; replicas may not, as each rank has its own (ValueError).
    """
    weights, workers = dict(checkpoint['model']), max([layer.workers for layer in head_layers(model)], default=1)
    if replicas:  # on ranks, with heads or without any
        workers = torch.distributed.get_world_size()
    for name, layer in model.named_modules():
        if isinstance(layer, MHLoRALinear):
            for key in {'A', 'B', 'A_merged', 'B_merged'} & layer.state_dict().keys():
                weights[f'{name}.{key}'] = weights[f'{name}.{key}'][layer.worker::layer.workers]
    model.load_state_dict(weights)
    for name, p in replicas.items():
        if len(checkpoint['replicas'][name]) != workers:
            raise ValueError(f"with sync='merge' each of {len(checkpoint['replicas'][name])} ranks saved its own "
                             f'parameters, and here are {workers}: resume on as many as before')
        p.copy_(checkpoint['replicas'][name][torch.distributed.get_rank()])
    rank = torch.distributed.get_rank() if workers > 1 else 0
    checkpoint['optimizer'] = _moments(model, optimizer, checkpoint['optimizer'], replicas,
                                       lambda x: x[rank::workers].clone(), lambda x: x[rank].clone())


# -----------------------------------------------------------------------------
# models

# What a kind of layer is called in GPT-2, LLaMA and timm's ViT; any other target is a module's own name, as in PEFT.
KINDS = {'attn': ('attn', 'self_attn'), 'mlp': ('mlp',), 'logit': ('lm_head', 'head')}
FUSED = ('qkv', 'c_attn')  # timm's and GPT-2's linear layers that compute q, k and v, each a third of the outputs


def apply_mhlora(model, targets=('attn',), heads=4, rank=4, alpha=4.0, head_input='shared', head_compute='parallel',
                 merge_reset=True, worker=0, workers=1, head_basis='trained'):
    """
    Replaces linear layers of a model by MHLoRALinear, in place; the model's function stays the same.

    targets: kinds ('attn', 'mlp', 'logit') or names of modules ('c_attn'); every nn.Linear with one of them in its
    dotted name is replaced. 'q', 'k', 'v' are also the thirds of a fused projection. heads, rank, alpha: H, r, alpha.
    head_input: 'shared', every head sees every token, or 'split', head h sees the h-th part of the batch.
    head_compute: 'parallel', all heads in one pair of products, or 'sequential', a loop (the same result, slower).
    merge_reset: what `merge` does with the heads, see MHLoRALinear.
    worker, workers: number of this rank and number of ranks, over which split heads are spread; heads must divide.
    head_basis: 'trained', or 'gradient' (needs split heads): see MHLoRALinear; galore.make_optimizer takes the bases.
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
    if head_basis == 'gradient' and any(None not in thirds for thirds in replaced.values()):
        raise ValueError("head_basis='gradient' takes the bases of whole layers, and lowrank="
                         f"'{','.join(targets)}' has a part of one: set 'attn' instead of q, k or v")
    for name, thirds in replaced.items():
        linear = linears[name]
        if uses.count(id(linear.weight)) > 1:  # tied: freezing it would freeze the embedding
            linear.weight = nn.Parameter(linear.weight.detach().clone())
        model.set_submodule(name, MHLoRALinear(linear, heads, rank, alpha, head_input, head_compute, merge_reset,
                                               worker, workers, head_basis, () if None in thirds else sorted(thirds)))
    return list(replaced)


def check_settings(settings, world_size):
    """Refuses (ValueError) settings of heads that make no sense together; world_size: the number of ranks."""
    s = settings
    for key, allowed in dict(head_input=('shared', 'split'), head_compute=('parallel', 'sequential'),
                             sync=('step', 'merge'), head_basis=('trained', 'gradient'),
                             basis_from=('own', 'shared')).items():
        if s[key] not in allowed:
            raise ValueError(f"{key}={s[key]!r} is not known: set one of {', '.join(map(repr, allowed))}")
    if s['batch_size'] % world_size:
        raise ValueError(f"batch_size={s['batch_size']} does not split over {world_size} ranks: set a multiple")
    if s['merge_every'] < 0:
        raise ValueError(f"merge_every={s['merge_every']} makes no sense: set 0 (never) or a number of steps")
    if s['merge_every'] and not s['lowrank'] and s['sync'] == 'step':
        raise ValueError(f"merge_every={s['merge_every']} has no heads to merge: set lowrank='attn' or merge_every=0, "
                         "or sync='merge' to average whole weights")
    if s['merge_reset'] and not s['merge_every']:
        raise ValueError('merge_reset=True without merges does nothing: set merge_every, or merge_reset=False')
    if s['merge_reset'] and s['rewarm_iters'] >= s['merge_every']:
        raise ValueError(f"rewarm_iters={s['rewarm_iters']} would never end before the next merge, every "
                         f"{s['merge_every']} steps: set fewer")
    if s['rewarm_iters'] and not s['merge_reset']:
        raise ValueError(f"rewarm_iters={s['rewarm_iters']} is for merges that reset: set merge_reset=True, or 0")
    if s['merge_reset'] and s['optimizer'] == 'galore':
        raise ValueError("merge_reset=True would drop GaLore's bases at every merge: set optimizer='adamw' or "
                         'merge_reset=False')
    split = s['lowrank'] and s['head_input'] == 'split'
    if s['sync'] == 'merge' and not ((split or not s['lowrank']) and s['merge_every'] and world_size > 1):
        raise ValueError("sync='merge' averages at merges what several ranks train, beside split heads or without any: "
                         "set merge_every, head_input='split' with lowrank, and start it with torchrun, or set "
                         "sync='step'")
    if s['sync'] == 'merge' and (s['optimizer'] == 'galore' or s['merge_reset'] and not s['lowrank']):
        raise ValueError("sync='merge' averages whole weights: GaLore is not supported with it, as each rank's would "
                         "have other bases, and without heads there is nothing to reset: set optimizer='adamw', or "
                         "merge_reset=False")
    if s['head_basis'] == 'gradient':
        if not split or not s['merge_every'] or s['merge_reset'] or s['optimizer'] != 'adamw':
            raise ValueError("head_basis='gradient' (GaLoLTE) needs lowrank, head_input='split', merge_every, "
                             "merge_reset=False and optimizer='adamw'")
        if s['galore_gap'] % s['merge_every']:
            raise ValueError(f"galore_gap={s['galore_gap']} is no multiple of merge_every={s['merge_every']}: bases "
                             'are taken at merges, set one')
    elif s['basis_from'] != 'own':
        raise ValueError("basis_from='shared' is for head_basis='gradient': set that, or basis_from='own'")
    if not s['lowrank']:
        return
    if s['head_input'] == 'split':
        if s['head_compute'] == 'sequential':
            raise ValueError("split heads have no sequential form: set head_compute='parallel'")
        if s['optimizer'] == 'galore' and s['grad_clip']:
            raise ValueError("grad_clip with optimizer='galore' knows no norm of each split head: set grad_clip=0.0")
        if s['batch_size'] % s['heads']:
            raise ValueError(f"batch_size={s['batch_size']} does not split over heads={s['heads']}: set a multiple")
        if s['heads'] % world_size:
            raise ValueError(f"heads={s['heads']} do not split over {world_size} ranks: set a multiple")
        if s['heads'] > 1 and not s['merge_every']:
            raise ValueError("split heads that never merge train models that never meet: set merge_every, or "
                             "head_input='shared'")
        if world_size > 1 and s['optimizer'] == 'galore' and s['galore_basis'] != 'svd':
            raise ValueError(f"galore_basis={s['galore_basis']!r} would draw other bases for split heads on every "
                             "number of ranks: set galore_basis='svd'")
        if world_size > 1 and (s['per_layer'] or s['state_bits'] == 8):
            raise ValueError("split heads on several ranks are not averaged, and saved head by head: set "
                             "per_layer=False and state_bits=32")
    elif s['merge_every'] and not s['merge_reset']:
        raise ValueError("merging shared heads without reset changes nothing: set merge_reset=True (ReLoRA) or "
                         "head_input='split' (LTE)")


def head_layers(model):
    """The MHLoRALinear layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MHLoRALinear)]


@torch.no_grad()
def merge(model, generator=None, replicas={}):
    """Merges the heads of every layer into its weight, averaged over heads (LTE, section 3; see MHLoRALinear.merge),
    and averages `replicas` ({name: parameter}) over ranks. One layer at a time holds the heads of all ranks."""
    for layer in head_layers(model):
        layer.merge(generator)
    for p in replicas.values():
        p.copy_(_averaged(p))


@contextlib.contextmanager
def averaged_heads(model, replicas={}):
    """While this lasts, split heads act on every token, averaged: the function of the merged weights, for evaluation.
    On several ranks all take part, and hold the heads of all ranks and the average of `replicas`."""
    split = [layer for layer in head_layers(model) if layer.head_input == 'split']
    own = [(p, p.data) for p in replicas.values()]
    with contextlib.ExitStack() as stack:
        try:
            for layer in split:
                layer.head_input = 'shared'
                stack.enter_context(layer.all_heads())
            for p, _ in own:
                p.data = _averaged(p)
            yield
        finally:
            for layer in split:
                layer.head_input = 'split'
            for p, x in own:
                p.data = x


@torch.no_grad()
def merged_state_dict(model, replicas={}):
    """The state dict of the same model without heads: what is evaluated, merged into plain nn.Linear weights; the model
    itself stays as it is. On several ranks all take part. A weight that was tied is there twice, see `apply_mhlora`."""
    with averaged_heads(model, replicas):
        state = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, MHLoRALinear):
                state[f'{name}.weight'] = layer.merged_weight().to(layer.weight.dtype)
                for key in ('A', 'B', 'A_merged', 'B_merged'):
                    state.pop(f'{name}.{key}', None)
    return state


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
    factors = [f for layer in head_layers(model) if layer.head_input == 'split' for f in (layer.A, layer.B)
               if f.requires_grad]
    own = {id(factor) for factor in factors}
    rest = [p for p in model.parameters() if id(p) not in own and p.grad is not None]
    norms = nn.utils.get_total_norm([p.grad for p in rest])[None]
    if factors:
        of_heads = sum(f.grad.float().square().sum((1, 2)) for f in factors).sqrt()  # (H,), each over all layers
        norms = torch.cat([norms.to(of_heads.device), of_heads.to(norms.dtype)])  # (1 + H,)
    if max_norm:
        keep = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if rest:
            torch._foreach_mul_([p.grad for p in rest], keep[0])
        for factor in factors:
            factor.grad.mul_(keep[1:, None, None])
    return torch.linalg.vector_norm(norms)


def count_parameters(model):
    """Numbers of parameters: total, trainable, frozen, and trainable ones by kind (heads, attn, mlp, logit, other);
    of heads that are split over ranks this rank's."""
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
    from safetensors.torch import save
    parts, about = adapter_parts(model, about)
    with open(f'{path}.tmp', 'wb') as file:
        file.write(save({name: part.cpu().contiguous() for name, part in parts.items()}, about))
        file.flush()
        os.fsync(file.fileno())
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
    if saved.keys() != parts.keys():
        lacking = ', '.join(sorted(parts.keys() - saved.keys())[:3]) or 'nothing'
        raise ValueError(f"adapter '{path}' lacks {lacking} or holds more than this model's heads and classifier: load "
                         'the one that the run wrote')
    for name, part in parts.items():
        part.copy_(saved[name])
