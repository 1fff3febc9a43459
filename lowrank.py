"""
Linear layers with low-rank weights: a frozen W, and beside it heads B_h A_h, or a basis of the
gradient of W.

W (m, n); H heads A (H, r, n), B (H, m, r); s = alpha / r.

    factors='both'   y = W x + s/H sum_h B_h A_h x      LoRA (arXiv 2106.09685), multi-head LoRA
    factors='B'      the same, A stays as it was drawn  LoRA-FA (arXiv 2308.03303)
    split            head h sees its own rows of the batch only (LTE, arXiv 2402.16828):
                     y = W x + s (B_h A_h - B_h' A_h') x; A_h', B_h': copies from the last merge
    merge            W <- W + s/H sum_h (B_h A_h - B_h' A_h'); no copies where heads are drawn anew

Inside a basis every matrix is seen as tall: tall(W) (long, short) is W, or W^T where W is wide.

    factors='basis'  tall(W) <- tall(W) + U Q^T         basis Q (short, r), factor U (long, r)
                     dL/dU = G Q = R                    G = dL/dtall(W): it is never formed

Merged every step it is GaLore (arXiv 2403.03507; the duality: Torroba-Hennigen et al. 2025): U is
always zero, takes no memory, and galore.py steps on W with R. Merged every T steps it is GaLoLTE.
"""

import contextlib
import functools
import math
import numbers
import warnings
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F

from ranks import (all_rows, average_replica, averaged_copy, coded_mean, error_of, first_here,
                   gather, gather_rows, in_global_order, is_sharded, local, mean, rank_and_world,
                   refuse_shards, rows_here, scatter_gradient)
from rules import WEIGHT_BLOCKS, code_, dense, new_codes, round_, sum_dtype


# -----------------------------------------------------------------------------
# the product


class LowRankProduct(torch.autograd.Function):
    """
    Computes y = x W^T + scale (x into) out^T + b in x's dtype; adds the low-rank product in place.

    x (..., n), W (m, n), b (m,) or None; into (groups, n, r), out (groups, m, r), B A = out into^T.
    A basis has no first dimension, and with groups=1 neither needs it. x is cut into equal parts,
    one for each group. is_zero: the factor is known to be zero; the low-rank product is not
    computed, only the factor's gradient. sketch (parts, short, r) or None: a leaf whose values are
    not read; backward adds `second_moment` to its .grad. scales: those of W if it holds codes (see
    rules.dense); W is unpacked for each pass, and the copy dropped. W gets no gradient, and there
    are no second derivatives (torch raises).

    Operations a token, forward and backward: 4 m n + 6 r (m + n) with both trained,
    4 m n + 2 r (m + n) where one is zero; a dense layer has 6 m n.
    """

    @staticmethod
    def forward(ctx, x, W, scales, b, into, out, sketch, groups, scale, is_zero):
        m, n = len(W), x.shape[-1]
        trains_into, trains_out = ctx.needs_input_grad[4:6]
        flat = x.reshape(x.shape[:-1].numel(), n)  # (tokens, n)
        tokens = len(flat) // groups  # of a group
        if b is not None:
            b = b.to(x.dtype)
        y = F.linear(flat, dense(W, scales, x.dtype), b)  # (tokens, m)
        z = None
        if trains_out or not is_zero:
            z = flat.view(groups, tokens, n) @ into.to(x.dtype)  # (groups, tokens / groups, r)
        if not is_zero:
            outT = out.to(x.dtype).mT.expand(groups, -1, -1)  # (groups, r, m)
            y.view(groups, tokens, m).baddbmm_(z, outT, alpha=scale)
        if not trains_into and sketch is None:
            flat = None  # where only `out` trains (LoRA-FA, a basis of a tall W) z is enough
        if not trains_out:
            z = None
        ctx.save_for_backward(flat, W, scales, into, out, z)
        ctx.n, ctx.groups, ctx.scale, ctx.is_zero = n, groups, scale, is_zero
        ctx.parts = 1 if sketch is None else len(sketch)
        # autograd must not take y for a view: what follows, such as a ReLU, may work in place
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], m))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, W, scales, into, out, z = ctx.saved_tensors
        needs_x, _, _, needs_b, trains_into, trains_out, needs_sketch, *_ = ctx.needs_input_grad
        m, n = len(W), ctx.n
        groups = ctx.groups
        d = dy.reshape(dy.shape[:-1].numel(), m)  # (tokens, m)
        tokens = len(d) // groups
        dx = db = d_into = d_out = d_sketch = dz = None
        if trains_into or not ctx.is_zero:
            dz = d.view(groups, tokens, m) @ out.to(dy.dtype)  # (groups, tokens / groups, r)
            if ctx.scale != 1:
                dz.mul_(ctx.scale)
        if needs_x:
            dx = d @ dense(W, scales, dy.dtype)  # (tokens, n)
            if not ctx.is_zero:
                intoT = into.to(dy.dtype).mT.expand(groups, -1, -1)  # (groups, r, n)
                dx.view(groups, tokens, n).baddbmm_(dz, intoT)
            dx = dx.view(*dy.shape[:-1], n)
        if needs_b:
            db = d.sum(0)
        if needs_sketch:
            # G = u^T v (long, short): the long side of a tall W is that of outputs
            u, v, vQ = (d, x, z) if trains_out else (x, d, dz)
            sequences = len(dy) if dy.dim() > 1 else 1
            vQ = vQ.flatten(0, 1)  # (tokens, r)
            d_sketch = second_moment(u, v, vQ, sequences, ctx.parts)
        # the loss is the mean over all groups: a head's gradient came out `groups` times too small
        if trains_into:
            if groups != 1:
                dz.mul_(groups)
            d_into = torch.bmm(x.view(groups, tokens, n).mT, dz).view(into.shape)
        if trains_out:
            factor = ctx.scale * groups
            if factor != 1:
                z = z * factor
            d_out = torch.bmm(d.view(groups, tokens, m).mT, z).view(out.shape)
        return dx, None, None, db, d_into, d_out, d_sketch, None, None, None


def second_moment(u, v, vQ, sequences, parts=1):
    """
    Y = sum_i G_i^T (G_i Q) / |G_i Q| (parts, short, r); G_i = u_i^T v_i is sequence i's part of G.

    u (tokens, long), v (tokens, short), vQ = v Q (tokens, r): sequence after sequence. No G_i is
    formed. Y is one step of subspace iteration towards the directions of the G_i. It does not
    depend on how sequences are spread over micro-batches and ranks. An output layer gets x
    (tokens, n), so there each token counts as a sequence. parts: the batch is cut into this many
    parts, each scaled as if it were the whole batch. Y is zero if any number in it is not finite.
    """
    tokens, rank = len(vQ) // max(sequences, 1), vQ.shape[1]
    u = u.view(sequences, tokens, u.shape[1])
    vQ = vQ.view(sequences, tokens, rank)
    # each u_i is scaled to length one: in float16, too, its squares stay in the dtype's range
    size = torch.linalg.vector_norm(u.flatten(1), dim=1, dtype=sum_dtype(u))
    size = size.clamp(torch.finfo(u.dtype).tiny, torch.finfo(u.dtype).max)
    size = size[:, None, None]  # (sequences, 1, 1)
    unit = u / size.to(u.dtype)
    if tokens <= rank:  # w = u u^T (v Q), the cheaper order of the two products
        w = torch.bmm(unit, unit.mT)  # (sequences, tokens, tokens)
        w = torch.bmm(w, vQ)  # (sequences, tokens, r)
    else:
        w = torch.bmm(unit.mT, vQ)  # (sequences, long, r), G_i Q / size
        w = torch.bmm(unit, w)
    # |G_i Q|^2 = sum of (v Q) * (u u^T v Q): the first of the two orders does not form G_i Q
    square = (vQ.to(sum_dtype(u)) * w).sum((1, 2), keepdim=True)
    # exactly, |w| <= |G_i Q|; where sums in 16 bits cancel, `square` may come out too small
    least = torch.linalg.vector_norm(w, dim=(1, 2), keepdim=True, dtype=square.dtype)
    norm = square.clamp_min(1e-30).sqrt().maximum(least)
    w = w / norm * (size * parts)
    w = w.to(unit.dtype)
    Y = v.view(parts, -1, v.shape[1]).mT @ w.view(parts, -1, rank)  # (parts, short, r)
    return torch.where(Y.isfinite().all(), Y, 0)  # after an overflow this pass adds nothing


# -----------------------------------------------------------------------------
# the layer


class Zeros:
    """The buffer behind all factors of a model that are always zero. Such a factor is a parameter
    so that autograd, DDP and clipping see its .grad, R."""

    def __init__(self, room=0):
        self.room, self.flat = room, None

    def view(self, shape, like):
        """Zeros of that shape, in the dtype and on the device of `like`, without own memory."""
        size, flat = math.prod(shape), self.flat
        self.room = max(self.room, size)
        is_large = flat is not None and len(flat) >= self.room
        if not is_large or flat.dtype != like.dtype or flat.device != like.device:
            self.flat = torch.zeros(self.room, dtype=like.dtype, device=like.device)
        return self.flat[:size].view(shape)


def side_by_side(x):
    """Puts heads (H, n, r) side by side, as one of rank H r: (n, H r). An x of two dimensions, such
    as a basis, stays as it is."""
    if x.dim() == 2:
        return x
    if len(x) == 1:
        return x.squeeze(0)
    return x.permute(1, 0, 2).flatten(1)


def refuse_arguments(m, n, heads, rank, alpha, factors, split, merge_every, merge_reset, workers,
                     bits, dropout, name='a linear layer'):
    """ValueError: arguments of a MHLoRALinear (m, n) make no sense together."""
    if factors not in ('both', 'B', 'basis'):
        raise ValueError(f"{factors=} is not known: set 'both', 'B' or 'basis'")
    are_integers = all(isinstance(x, numbers.Integral) for x in (rank, heads, merge_every))
    if not are_integers or rank < 1 or heads < 1 or merge_every < 0:
        raise ValueError(f'{rank=}, {heads=} must be integers of at least 1, {merge_every=} '
                         'one of at least 0')
    if alpha is not None and not alpha > 0:
        raise ValueError(f'{alpha=} leaves heads without effect: set it above 0')
    if factors != 'basis' and rank > min(m, n):
        raise ValueError(f'rank={rank} does not fit {name} of {n} inputs and {m} outputs: set a '
                         f'rank between 1 and {min(m, n)}, or leave such layers out')
    if factors == 'basis' and (alpha is not None or merge_reset):
        raise ValueError(f'{alpha=}, {merge_reset=} are for heads, and in a basis a merge ends '
                         "with a zero factor: leave them out, or set factors='both' or 'B'")
    if factors == 'basis' and not merge_every:
        raise ValueError("factors='basis' trains a factor that merges into W: set "
                         'merge_every=1 (GaLore) or more')
    if factors == 'basis' and heads > 1 and (not split or merge_every == 1):
        raise ValueError(f'{heads=} in one basis that see the same tokens, or are merged '
                         'every step, are one head: set heads=1, or split=True and merge_every '
                         'above 1')
    if not 0 <= dropout < 1 or dropout and (split and heads > 1 or factors == 'basis'):
        raise ValueError(f'lora_dropout={dropout} has to be in [0, 1), and is for heads that see '
                         "all tokens: set lora_dropout=0, or split=False and factors='both'")
    if split and heads % workers:
        raise ValueError(f'{heads=} do not split over {workers} ranks: set a multiple')
    if bits == 4 and (merge_every or factors == 'basis'):
        raise ValueError(f'{merge_every=}, {factors=}, but weights in 4 bits stay as they are, and '
                         "merges would move them: set merge_every=0 and factors='both' or 'B' "
                         '(lora, mhlora, lora_fa), or frozen_bits=None')
    if bits == 8 and factors != 'basis':
        raise ValueError(f"weights in 8 bits train in a basis, and {factors=}: set factors='basis' "
                         '(galore), or param_bits=None')


class FrozenLinear(nn.Module):
    """
    A linear layer whose weight gets no gradient, as it is or in codes of 4 or 8 bits (rules.dense).

    linear: the nn.Linear to replace; its weight is not copied, its bias stays trainable. bits:
    None; 4: weight is codes (m, n / 2), scales is (m, n / 64); 8: weight is codes (m, n), scales is
    (m, n / 128). Codes are unpacked for a pass. ValueError, with bits: n is no multiple of 64 (4)
    or 128 (8), or the weight is in float64.
    """

    def __init__(self, linear, bits=None):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bits = bits
        self.dtype_before = linear.weight.dtype
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.register_parameter('scales', None)
        if not bits:
            return
        W = linear.weight.detach()
        if W.dtype == torch.float64:
            raise ValueError(f'weights in float64 are not coded in {bits} bits: train in float32 '
                             'or bfloat16')
        codes, scales = new_codes(W, bits)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        if not W.is_meta:
            code_(codes, scales, W)

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return LowRankProduct.apply(x, self.weight, self.scales, self.bias, None, None, None, 1,
                                    1.0, True)  # without heads

    @property
    def dtype(self):
        """The dtype that W has, or had before it was coded: that of merged_state_dict, too."""
        return self.dtype_before if self.bits else self.weight.dtype

    @property
    def scales_here(self):
        """The scales of this rank's rows of the weight, or None."""
        return None if self.scales is None else local(self.scales)

    def merged_weight(self):
        """W in float32 or wider; if W is sharded, this rank's rows of it."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return dense(local(self.weight), self.scales_here, dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        W, errors = state_dict.get(f'{prefix}weight'), args[-1]  # torch raises them in one
        if torch.is_tensor(W) and W.is_floating_point() == bool(self.bits):  # codes, or numbers
            errors.append(f'{prefix}weight is of {W.dtype}, and here of {self.weight.dtype}: give '
                          'apply_mhlora the same bits, or load numbers before it')
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def write_weight(self, x, key=None):
        """W <- x, rounded with a key (rules.round_); if W is sharded, x is this rank's rows."""
        W, first = local(self.weight), first_here(self.weight)
        if self.scales is None:
            round_(W, x, key, first)
        else:
            code_(W, self.scales_here, x, key, first)


class MHLoRALinear(FrozenLinear):
    """
    A linear layer with a frozen weight, and with H low-rank heads, or a basis and a factor in it.

    linear, bits: see FrozenLinear; 4 bits are for heads that are never merged, 8 for weights that
    train in a basis. heads, rank: H, r. alpha: s = alpha / r (None: s = 1). factors, split: see the
    top of this file. merge_every: T; the training loop calls lowrank.merge every T steps (0: never,
    or at the end; GaLore, 1 in a basis, needs no call). merge_reset: a merge draws A anew and sets
    B to zero; merge_every=0 implies it. Else heads train on (LTE), and the layer subtracts the part
    of them that W already has. workers: how many ranks share split heads; worker: this rank, which
    holds the heads worker::workers. zeros: the model's `Zeros`; None for a layer alone.

    Attributes: weight (m, n), bias (m,) or None; A (H / workers, r, n), B (H / workers, m, r); or
    basis (short, r), factor (H / workers, long, r). In GaLore factor is (long, r) and always zero:
    it takes no memory and is in no state dict; its .grad is R, with which galore.LowRankAdamW steps
    on W. Raises ValueError for arguments that make no sense together.
    """

    def __init__(self, linear, heads=1, rank=4, alpha=None, factors='both', split=False,
                 merge_every=0, merge_reset=False, worker=0, workers=1, zeros=None, bits=None,
                 dropout=0.0):
        m, n = linear.weight.shape
        refuse_arguments(m, n, heads, rank, alpha, factors, split, merge_every, merge_reset,
                         workers, bits, dropout)
        if factors == 'basis' and not linear.weight.requires_grad:
            raise ValueError('the weight is frozen, and in a basis it would train: unfreeze it, or '
                             'leave the layer as it is')
        super().__init__(linear, bits)
        new = linear.weight.new_empty
        self.heads, self.rank, self.factors = heads, min(rank, m, n), factors
        self.dropout = dropout
        self.split = split and heads > 1  # one head sees all of the batch
        self.scale = 1.0  # s
        if alpha is not None:
            self.scale = float(alpha) / rank
        self.merge_every = merge_every
        self.worker, self.workers = 0, 1
        if self.split:  # other heads are the same on all ranks
            self.worker, self.workers = worker, workers
        self.heads_here = heads // self.workers
        # whether a merge ends with new heads, or a zero factor: W has no part of them yet
        self.resets = merge_reset or not merge_every or factors == 'basis'
        self.moves_weight = factors == 'basis' and merge_every == 1  # GaLore
        self.sketch = None  # a leaf, see LowRankProduct; galore.py asks for it
        self.factor_rows = None  # another leaf, see `shard_gradient`
        self.merged_pair = None  # the result of `pair_of_all` while `averaged_heads` lasts
        self.merges = 0  # how often it was merged
        if factors == 'basis':
            shape = max(m, n), self.rank  # (long, r)
            self.register_buffer('basis', new(min(m, n), self.rank))
            if self.moves_weight:
                self.zeros = zeros or Zeros()
                self.factor = nn.Parameter(self.zeros.view(shape, self.basis))
            else:
                self.factor = nn.Parameter(new(self.heads_here, *shape))
        else:
            self.A = nn.Parameter(new(self.heads_here, self.rank, n))
            self.A.requires_grad_(factors == 'both')
            self.B = nn.Parameter(new(self.heads_here, m, self.rank))
            # the function of A and B depends on alpha: the state dict holds it beside them
            alpha = torch.tensor(self.scale * self.rank, device=self.weight.device)
            self.register_buffer('alpha', alpha)
        if not self.resets:
            self.register_buffer('A_merged', torch.empty_like(self.A))
            self.register_buffer('B_merged', torch.empty_like(self.B))
        if not self.weight.is_meta:
            self.start()

    def extra_repr(self):
        return (f'{self.in_features} -> {self.out_features}, heads={self.heads}, rank={self.rank}, '
                f'scale={self.scale:g}, factors={self.factors}, split={self.split}, '
                f'merge_every={self.merge_every}')

    @torch.no_grad()
    def start(self):
        """Sets the first values: heads as drawn; basis and factor zero. A layer on the meta device
        needs this call after `to_empty`."""
        if self.factors == 'basis':
            local(self.basis).zero_()
            if not self.moves_weight:
                local(self.factor).zero_()
            return
        self.alpha.fill_(self.scale * self.rank)
        self.draw_heads()
        if not self.resets:  # B' is zero, so any A' will do; A is close to the copies of merges
            self.A_merged.copy_(self.A)
            self.B_merged.zero_()

    @torch.no_grad()
    def draw_heads(self, generator=None):
        """LTE's initialisation: A orthogonal times sqrt(n / r), B zero, so that heads add
        nothing."""
        A = local(self.A)  # (heads here, r, n); if A is sharded, this rank's part of these heads
        here = range(self.worker, self.heads, self.workers)[rows_here(self.A)]  # their numbers
        gain = math.sqrt(self.in_features / self.rank)
        for head in range(self.heads):  # every rank draws all: the same on any number of ranks
            drawn = torch.empty(A.shape[1:], dtype=sum_dtype(A), device='cpu')  # QR needs it
            nn.init.orthogonal_(drawn, gain, generator=generator)
            if head in here:
                A[here.index(head)].copy_(drawn)
        local(self.B).zero_()

    def per_head(self):
        """{name: tensor}: what each head has for itself: A, B and their copies, or the factor."""
        names = 'A', 'B', 'A_merged', 'B_merged', 'factor'
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def pair(self, factor=None):
        """(into, out), (heads here, n, r) and (heads here, m, r), or 2 r where heads train on over
        merges: out into^T is added to W. In a basis one of the two is the basis, for all heads.
        factor: is used instead of self.factor."""
        if self.factors == 'basis':
            factor = self.factor if factor is None else factor
            is_tall = self.out_features >= self.in_features
            return (self.basis, factor) if is_tall else (factor, self.basis)
        if self.resets:
            return self.A.mT, self.B
        # B A - B' A' is one product of rank 2 r
        A = torch.cat([self.A, self.A_merged], 1)  # (heads here, 2 r, n)
        B = torch.cat([self.B, -self.B_merged], 2)  # (heads here, m, 2 r)
        return A.mT, B

    @property
    def merged_scale(self):
        """The scale of a merge: s / H; in a basis s, as the factors are averaged before."""
        if self.factors == 'basis':
            return self.scale
        return self.scale / self.heads

    def forward(self, x):
        if self.moves_weight and not torch.is_grad_enabled():  # U is zero, and no R is wanted
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        groups, scale = 1, self.merged_scale
        if self.dropout and self.training:
            into, out = map(side_by_side, self.pair())
            z = F.dropout(x, self.dropout) @ into.to(x.dtype)  # (..., H r)
            return super().forward(x) + scale * (z @ out.mT.to(x.dtype))
        if self.merged_pair is not None:  # an evaluation of split heads
            into, out = self.merged_pair
        elif not self.split:  # every head sees every token: one pair of rank H r
            into, out = map(side_by_side, self.pair())
        else:  # each head its own part of the batch
            into, out = self.pair()
            groups, scale = self.heads_here, self.scale
            if not self.training:
                raise ValueError('split heads have no function of their own in eval mode: evaluate '
                                 'inside lowrank.averaged_heads(model), or merge them')
            if x.shape[0] % groups:
                raise ValueError(f'a batch of {x.shape[0]} does not split over {groups} heads: set '
                                 'batch_size to a multiple of heads times the number of ranks')
        sketch = self.sketch
        if sketch is not None and not self.factor.requires_grad:  # frozen since it was asked for
            sketch = None
        return LowRankProduct.apply(x, self.weight, self.scales, self.bias, into, out, sketch,
                                    groups, scale, self.moves_weight)

    @torch.no_grad()
    def pair_of_all(self, factor=None):
        """(into, out), (n, k) and (m, k): all ranks' heads side by side; in a basis k = r, with the
        average of all factors or a given one. All ranks take part, and get the same bits.
        ValueError: there are more or fewer ranks than workers."""
        world = rank_and_world()[1]
        if self.workers not in (1, world):
            raise ValueError(f'split heads are dealt to {self.workers} workers, and the number of '
                             f'ranks is {world}: give apply_mhlora workers={world}')
        if self.factors == 'basis':
            if factor is None:
                factor = all_rows(self.factor.detach())  # (heads here, long, r)
                factor = mean(factor.to(sum_dtype(factor)).mean(0), self.workers)
            return self.pair(factor)
        pair = map(all_rows, self.pair())
        if self.workers > 1:  # one order on any number of ranks, as sums are rounded
            pair = (in_global_order(gather(x)) for x in pair)
        return tuple(map(side_by_side, pair))

    @torch.no_grad()
    def merged_weight(self, factor=None):
        """What W becomes in a merge, in float32 or wider; of a sharded W this rank's rows. All
        ranks take part. factor: see `pair_of_all`."""
        W = super().merged_weight()
        if self.moves_weight:
            return W
        into, out = self.pair_of_all(factor)
        out = out[rows_here(self.weight)].to(W.dtype)
        return torch.addmm(W, out, into.to(W.dtype).mT, alpha=self.merged_scale)

    @torch.no_grad()
    def merge(self, generator, key, bits=32, state=None):
        """W <- `merged_weight`, rounded with a key (see `round_`); then heads begin anew, or keep
        copies A', B' of what W now has. bits, state: see lowrank.merge."""
        self.merges += 1
        if self.moves_weight:
            return
        if self.bits == 4:
            raise ValueError('weights in 4 bits stay as they are: take merged_state_dict(model) '
                             'for those of a model without heads')
        is_coded = bits < 32 and self.split
        if is_coded and self.factors != 'basis':
            raise ValueError(f"{bits=} are for merges of heads in a basis (factors='basis') and of "
                             'whole weights: set 32')
        factor = None  # the average as it is
        if is_coded and self.factor.requires_grad:  # a frozen one has no state for what is left
            error = error_of(self.factor, state[self.factor])
            # (heads here, r, long): blocks of 64 numbers are of one direction
            factor = coded_mean(self.factor.mT, bits, self.workers, error.mT).mT
        self.write_weight(self.merged_weight(factor), key)
        if self.factors == 'basis':
            local(self.factor).zero_()
        elif self.resets:
            self.draw_heads(generator)
        else:  # LTE: they train on
            self.A_merged.copy_(self.A)
            self.B_merged.copy_(self.B)

    def ask_sketch(self, parts=1, sums=None):
        """Until `sketch` is None again, backward passes add `second_moment` to sketch.grad (parts,
        short, r). It begins at zero, or at `sums`. parts: 1, or one for each head here."""
        zero = local(self.basis).new_zeros((), dtype=sum_dtype(self.basis))
        leaf = zero.expand(parts, *self.basis.shape)  # of no memory, as nobody reads it
        self.sketch = leaf.requires_grad_()
        self.sketch.grad = torch.zeros_like(leaf) if sums is None else sums.to(zero.dtype)

    def shard_gradient(self):
        """To be called when FSDP2 has sharded W: from now on R goes to factor_rows.grad, a
        DTensor."""
        with self._without_zero():
            pass  # the weight may be on another device now
        if self.factor.requires_grad:
            self.factor_rows = scatter_gradient(self.factor, self.weight.device_mesh)

    @property
    def leaf(self):
        """What an optimizer steps on in a basis: its .grad is R."""
        if self.factor_rows is not None:
            return self.factor_rows
        return self.factor

    # The zero factor is taken out before torch copies or saves parameters, and put back afterwards:
    # otherwise it would take memory, or appear in a state dict

    @contextlib.contextmanager
    def _without_zero(self):
        factor = self._parameters.pop('factor') if self.moves_weight else None
        try:
            yield
        finally:
            if self.moves_weight:
                view = self.zeros.view(factor.shape, self.basis)
                if factor.is_meta == view.is_meta:
                    factor.data = view
                else:  # as torch does: a new parameter
                    factor = nn.Parameter(view, factor.requires_grad)
                self._parameters['factor'] = factor

    def _apply(self, *args, **kwargs):
        with self._without_zero():
            return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs):
        with self._without_zero():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.factors != 'basis':
            alpha, key = self.scale * self.rank, f'{prefix}alpha'
            theirs = state_dict.get(key)  # older ones have none
            if torch.is_tensor(theirs) and not theirs.is_meta:
                # it may have been rounded to bfloat16, or averaged
                is_same = theirs.numel() == 1 and abs(theirs.item() / alpha - 1) < 0.01
                found = ', '.join(f'{x:g}' for x in theirs.flatten().tolist())
                errors = args[-1]  # torch raises them in one
                if not is_same:
                    errors.append(f'{key} is {found} in the state dict, and here {alpha:g}: give '
                                  'apply_mhlora the alpha that it was trained with')
            state_dict[key] = self.alpha.new_tensor(alpha)
        with self._without_zero():
            super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state):  # deepcopy
        super().__setstate__(state)
        with self._without_zero():
            pass


# -----------------------------------------------------------------------------
# putting it into a model

# what a kind of layer is called in GPT-2, LLaMA, timm's ViT; other targets are names of modules
KINDS = {'attn': ('attn', 'self_attn'), 'mlp': ('mlp',), 'logit': ('lm_head', 'head', 'head_dist')}
# They may read their linear layers' weights and not call the layers (the first: in eval mode)
BYPASS = ('torch.nn.modules.transformer.TransformerEncoderLayer', 'timm.models.beit.Attention',
          'timm.models.eva.EvaAttention', 'timm.models.swin_transformer_v2.WindowAttention',
          'torchvision.models.swin_transformer.ShiftedWindowAttention',
          'torchvision.models.video.swin_transformer.ShiftedWindowAttention3d')


def is_wanted(name, targets):
    """Whether one of the targets covers the layer of that dotted name."""
    parts = {*name.split('.')}
    return any(not parts.isdisjoint(KINDS.get(target, (target,))) for target in targets)


def refuse_what_bypasses(model, targets):
    """ValueError: a PEFT module, a target inside a module of BYPASS, or a target that is Conv1D."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        kinds = {f'{c.__module__}.{c.__qualname__}' for c in type(module).__mro__}
        if type(module).__module__.startswith('peft.'):
            raise ValueError(f"'{name}' is PEFT's {kind}: give the model without PEFT's adapters")
        inside = [f'{name}.{part}' for part, child in module.named_modules()
                  if isinstance(child, nn.Linear)]
        if not kinds.isdisjoint(BYPASS) and any(is_wanted(part, targets) for part in inside):
            raise ValueError(f"'{name}' ({kind}) reads its linear layers' weights itself, and "
                             'passes heads over in silence: leave it out of targets, or write its '
                             'forward pass with calls')
        if kind == 'Conv1D' and is_wanted(name, targets):
            raise ValueError(f"'{name}' is transformers' Conv1D, no nn.Linear: load the weights "
                             'into model.GPT')


def find_linears(model, targets, also=()):
    """({name: linear} that targets name, {name: linear} that only `also` names, number of all
    linears). ValueError: a target matches nothing, or a layer that is low-rank already; or a
    low-rank layer in the place of a linear would not do the same."""
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if type(module) is nn.Linear}
    for target in targets:
        for name in named_layers(model):
            if is_wanted(name, [target]):
                raise ValueError(f"'{name}' has low-rank weights already: build the model anew, or "
                                 'give all targets in one call')
        if not any(is_wanted(name, [target]) for name in linears):
            words = [[part for part in name.split('.') if not part.isdigit()] for name in linears]
            there = ', '.join(sorted({parts[-1] for parts in words if parts}))
            raise ValueError(f"no linear layer matches '{target}': give 'attn', 'mlp' or 'logit', "
                             f'if the model has such, or one of {there}')
    chosen = {name: linear for target in targets for name, linear in linears.items()
              if is_wanted(name, [target])}  # heads are drawn in this order
    more = {name: linear for name, linear in linears.items()
            if is_wanted(name, also) and name not in chosen}
    others = {linear: name for name, linear in linears.items() if name not in chosen}
    biases = {}  # by weight
    for name, linear in {**chosen, **more}.items():
        if linear in others and name in chosen:
            raise ValueError(f"'{name}' is called '{others[linear]}', too, where it would stay "
                             'without heads: give targets that name both')
        attributes = vars(linear)
        hooks = [attributes[key] for key in attributes if key.endswith('_hooks')]
        if 'forward' in attributes or any(hooks):
            raise ValueError(f"'{name}' has hooks, or a forward of its own, that a low-rank layer "
                             'in its place would not call: take them off, and put them on '
                             'afterwards')
        if biases.setdefault(linear.weight, linear.bias) is not linear.bias:
            raise ValueError(f"'{name}' shares its weight with another layer, but not its bias: "
                             'give both one bias, or none')
    return chosen, more, len(linears)


def bits_of(name, linear, frozen_bits, param_bits):
    """Into how many bits the weight of a linear layer goes, None: it stays as it is."""
    bits = param_bits
    if frozen_bits and not is_wanted(name, ['logit']):
        bits = frozen_bits
    if bits and linear.in_features % WEIGHT_BLOCKS[bits]:
        return None
    return bits


def apply_mhlora(model, targets=('attn', 'mlp'), heads=1, rank=4, alpha=None, factors='both',
                 split=False, merge_every=0, merge_reset=False, worker=0, workers=1,
                 frozen_bits=None, param_bits=None, lora_dropout=0.0):
    """
    Replaces linear layers of a model by MHLoRALinear, in place; the model's function stays the
    same.

    targets: kinds ('attn', 'mlp', 'logit') or names of modules ('c_attn'); every nn.Linear with one
    of them in its dotted name is replaced. Others: see MHLoRALinear; in a basis a rank above a
    layer's smaller side is clamped, and a frozen weight, which a basis would train, stays as it is
    and frozen. Linears that share their weight share one layer. An output layer whose weight is
    tied to an embedding gets its own frozen copy, and the embedding stays trainable: the count of
    parameters rises.

    frozen_bits=4: the weights of all linears of attention and MLP, with heads or without
    (FrozenLinear), and of all other targets except output layers, become codes; this changes the
    function a little. param_bits=8: so do the weights of the targets, and they train in a basis.
    A weight stays as it is if its n is no multiple of a block (rules.WEIGHT_BLOCKS). lora_dropout:
    this share of the heads' input is dropped in training, as in PEFT.

    Returns the names of the low-rank layers. Prints how many of all linears they are, what was
    passed over, and what is coded. ValueError: see `find_linears`, `refuse_what_bypasses`.
    """
    if frozen_bits not in (None, 4) or param_bits not in (None, 8) or frozen_bits and param_bits:
        raise ValueError(f'{frozen_bits=} has to be None or 4, {param_bits=} None or 8, and one of '
                         'them None')
    if isinstance(targets, str):
        raise ValueError(f"targets={targets!r} is a string: give a tuple of names, such as "
                         "('attn', 'mlp')")
    also = ('attn', 'mlp') if frozen_bits else ()
    refuse_what_bypasses(model, [*targets, *also])
    chosen, plain, how_many = find_linears(model, targets, also)
    frozen = []  # in a basis they would train
    if factors == 'basis':
        frozen = [name for name, linear in chosen.items() if not linear.weight.requires_grad]
        chosen = {name: linear for name, linear in chosen.items() if name not in frozen}
        if not chosen:
            raise ValueError(f"all weights of {', '.join(targets)} are frozen, and in a basis they "
                             'would train: unfreeze them before')
    elsewhere = {p for module in model.modules() if module not in {*chosen.values()}
                 for p in module.parameters(recurse=False)}
    for name, linear in chosen.items():  # before any is replaced
        refuse_arguments(*linear.weight.shape, heads, rank, alpha, factors, split, merge_every,
                         merge_reset, workers, bits_of(name, linear, frozen_bits, param_bits),
                         lora_dropout, f"'{name}'")
    shapes = [linear.weight.shape for linear in chosen.values()]
    zeros = Zeros(max(min(rank, *shape) * max(shape) for shape in shapes))
    layers = {}  # by weight
    for name, linear in chosen.items():
        W = linear.weight
        if W not in layers:
            if W in elsewhere:  # tied: freezing it would freeze the embedding, or another layer
                linear.weight = nn.Parameter(W.detach().clone())
            bits = bits_of(name, linear, frozen_bits, param_bits)
            layers[W] = MHLoRALinear(linear, heads, rank, alpha, factors, split, merge_every,
                                     merge_reset, worker, workers, zeros,
                                     bits, lora_dropout).train(linear.training)
        model.set_submodule(name, layers[W])
    for name, linear in plain.items():  # without heads
        W = linear.weight
        if W not in layers and bits_of(name, linear, frozen_bits, None):
            layers[W] = FrozenLinear(linear, frozen_bits)
        if W in layers:
            model.set_submodule(name, layers[W])
    said = f'low-rank weights on {len(chosen)} of {how_many} linear layers'
    if frozen_bits or param_bits:
        said += what_is_coded(model, {**chosen, **plain}, frozen_bits or param_bits)
    if rank_and_world()[0] == 0:
        clamped = [name for name in chosen if model.get_submodule(name).rank < rank]
        if clamped:
            said += f'; rank {rank} is clamped to the smaller side of {len(clamped)}, such as '
            said += clamped[0]
        passed = [name for name, module in model.named_modules()
                  if isinstance(module, nn.Linear) and type(module) is not nn.Linear
                  and is_wanted(name, targets)]
        if frozen:
            said += f'; {len(frozen)} stay as they are, being frozen, such as {frozen[0]}'
        if passed:
            said += f"; passed over, being subclasses of nn.Linear: {', '.join(passed[:3])}"
        time_first = [name for name, module in model.named_modules()
                      if getattr(module, 'batch_first', True) is False]
        if split and heads > 1 and time_first:
            said += f"; '{time_first[0]}' has batch_first=False, and split heads cut the first "
            said += 'dimension, which is to be the batch'
        print(said)
    return list(chosen)


def what_is_coded(model, names, bits):
    """Says in words how many of the layers of these names have weights in few bits. ValueError:
    none has."""
    found = {name: model.get_submodule(name) for name in names}
    whole = [name for name, layer in found.items() if getattr(layer, 'bits', None) is None]
    if len(whole) == len(found):
        raise ValueError(f'no weight goes into {bits} bits, such as that of {whole[0]}: an output '
                         f'layer, or a width that {WEIGHT_BLOCKS[bits]} does not divide')
    said = f'; {len(found) - len(whole)} weights in {bits} bits'
    if whole:
        said += (f', not {len(whole)}, such as {whole[0]}: an output layer, or a width that '
                 f'{WEIGHT_BLOCKS[bits]} does not divide')
    return said


def named_layers(model):
    """{name: layer} of the MHLoRALinear layers of a model, in order, each once."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, MHLoRALinear)}


def lowrank_layers(model):
    """The layers of `named_layers`."""
    return list(named_layers(model).values())


def heads_of(model):
    """The set of A, B and factors of all layers, without the factors of GaLore, which trains W."""
    return {p for layer in lowrank_layers(model) if not layer.moves_weight
            for name, p in layer.named_parameters(recurse=False) if name in ('A', 'B', 'factor')}


def replica_parameters(model):
    """{name: parameter} of what trains without heads: with sync='merge' each rank has its own."""
    heads = heads_of(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p not in heads}


def leaf_names(model):
    """{tensor that an optimizer steps on: its name}: parameters; in a sharded layer of GaLore,
    factor_rows in place of factor."""
    names = {p: name for name, p in model.named_parameters()}
    for layer in lowrank_layers(model):
        if layer.factor_rows is not None:
            names[layer.factor_rows] = names.pop(layer.factor)
    return names


# -----------------------------------------------------------------------------
# merging, evaluating


@torch.no_grad()
def merge(model, generator=None, replicas=None, bits=32, state=None):
    """
    Merges the heads of every layer into its weight (LTE, section 3), one layer at a time, and
    averages `replicas` ({name: parameter}) over ranks.

    generator: draws new heads, the same on all ranks; its seed also seeds rounding. None: one
    seeded with the count of merges; a resume sets that to 0: give one there, seeded with the step.
    bits: bits of a number that split heads in a basis and replicas send (ranks.coded_mean). Below
    32, `state` (an optimizer's) keeps the rest; a replica without a last average is sent in full.
    After a merge with merge_reset call `drop_moments`: those of the old heads are of no use.
    ValueError: bits without a state, or split heads that are equal on all ranks.
    """
    if bits < 32 and state is None:
        raise ValueError(f"{bits=} leaves rounding errors for later merges: give the optimizer's "
                         'state, merge(..., state=optimizer.state)')
    layers = lowrank_layers(model)
    merges = layers[0].merges if layers else 0
    if merges == 0:
        refuse_equal_heads(layers)
    if generator is None and not layers and replicas:
        raise ValueError('without low-rank layers nothing counts merges: give a generator, seeded '
                         'with the step')
    if generator is None:
        generator = torch.Generator().manual_seed(merges)
    seed = generator.initial_seed()
    if bits == 32:  # what earlier merges in few bits have kept is out of date now
        for kept in (state or {}).values():
            kept.pop('error', None)
            kept.pop('common', None)
    for i, layer in enumerate(layers):
        layer.merge(generator, hash((seed, i)), bits, state)
    for i, p in enumerate((replicas or {}).values()):
        kept = state[p] if bits < 32 else {}
        average = average_replica(p, bits, kept)
        round_(p, average, hash((seed, -1, i)))
        if bits < 32:
            kept['common'] = p.detach().clone()


def refuse_equal_heads(layers):
    """Raises ValueError if split heads are equal on all ranks, as plain DDP makes them: they should
    differ. Ranks compare the sums of their heads."""
    heads = [x for layer in layers if layer.workers > 1 for x in layer.per_head().values()]
    if not heads:
        return
    sums = torch.stack([local(x.detach()).sum(dtype=torch.float64) for x in heads])
    of_ranks = gather(sums)  # (world, tensors)
    are_zero = ~sums.any()  # nothing has trained yet
    if not (are_zero | (of_ranks != of_ranks[0]).any()):
        raise ValueError('split heads are equal on all ranks: call ranks.keep_out_of_ddp(model, '
                         'ranks.per_rank_tensors(lowrank_layers(model))) before '
                         'DistributedDataParallel wraps the model, and give each rank its own rows')


@contextlib.contextmanager
def averaged_heads(model, replicas=None):
    """While this lasts, the model is the one that is evaluated: split heads act on every token, and
    they and `replicas` are averaged. All ranks take part."""
    split = {layer: layer.merged_pair for layer in lowrank_layers(model) if layer.split}
    values = {p: p.data for p in (replicas or {}).values()}
    try:
        for layer in split:
            layer.merged_pair = layer.pair_of_all()
        for p in values:
            p.data = averaged_copy(p).to(p.dtype)
        yield
    finally:
        for layer, pair in split.items():
            layer.merged_pair = pair
        for p, value in values.items():
            p.data = value


@torch.no_grad()
def merged_state_dict(model, dtype=None):
    """Returns the state dict of the evaluated model without heads: they are merged into plain
    nn.Linear weights (in `dtype`, or each weight's own). The model stays as it is; all ranks take
    part. A weight that was tied is there twice, see `apply_mhlora`."""
    state, keys = model.state_dict(), {}
    for i, (name, layer) in enumerate(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, FrozenLinear):
            continue
        merged = layer.merged_weight()
        if is_sharded(layer.weight):
            merged = gather_rows(merged, layer.out_features)
        state[f'{name}.weight'] = torch.empty_like(merged, dtype=dtype or layer.dtype)
        if layer.bits:  # as it is unpacked for a pass: to the nearest
            state[f'{name}.weight'].copy_(merged)
        else:
            round_(state[f'{name}.weight'], merged, keys.setdefault(layer, i))
        for key in ('A', 'B', 'A_merged', 'B_merged', 'factor', 'basis', 'alpha', 'scales'):
            state.pop(f'{name}.{key}', None)
    return state


def drop_moments(model, optimizer):
    """Drops the optimizer's state of every head: after a reset it is that of other heads."""
    for factor in heads_of(model):
        optimizer.state.pop(factor, None)


# -----------------------------------------------------------------------------
# clipping, checking, counting


@torch.no_grad()
def clip_gradients(model, max_norm):
    """
    Clips gradients to the norm max_norm (0: only measures), in place.

    Each split head is a model of its own, with one norm over all layers. All other gradients share
    one norm; a layer of GaLore counts there with R. Norms are in the gradients' precision or
    float32, whichever is wider. Returns the norm of all before clipping, a tensor; of split heads
    those of this rank count.
    """
    heads = [p for layer in lowrank_layers(model) if layer.split
             for p in layer.per_head().values() if p.grad is not None]
    per_head = set(heads)
    rest = [local(p.grad) for p in leaf_names(model) if p not in per_head and p.grad is not None]
    norms = [torch.zeros((), device=next(model.parameters()).device)]
    if rest:  # not all has stepped in the backward pass
        widest = functools.reduce(torch.promote_types, (grad.dtype for grad in rest), torch.float32)
        norms = torch._foreach_norm(rest, dtype=widest)  # a few launches; torch clips by it, too
    norms = torch.stack(norms).norm()[None]  # (1,)
    if sharded := {name: p for name, p in model.named_parameters() if is_sharded(p)}:
        refuse_shards(sharded)  # each rank has seen its rows
        squares = mean(norms.square()).mul_(rank_and_world()[1])
        norms = squares.sqrt()
    if heads:
        of_heads = [torch.linalg.vector_norm(p.grad, dim=(1, 2), dtype=sum_dtype(p.grad))
                    for p in heads]
        if len({*map(len, of_heads)}) > 1:
            raise ValueError('layers have different numbers of split heads, and each head is '
                             'clipped over all layers: give all as many')
        of_heads = torch.stack(of_heads).norm(dim=0)  # (heads here,)
        norms = torch.cat([norms.to(of_heads), of_heads])  # (1 + heads here,)
    if max_norm:
        keep = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if rest:
            torch._foreach_mul_(rest, keep[0])
        for p in heads:
            p.grad.mul_(keep[1:, None, None])
    return torch.linalg.vector_norm(norms)


def refuse_sharded_layers(model):
    """ValueError: a layer that merges is in shards of another kind, see `ranks.refuse_shards`, or
    split heads are in shards, of which each rank has its own."""
    for name, layer in named_layers(model).items():
        if layer.workers > 1 and any(map(is_sharded, layer.per_head().values())):
            raise ValueError(f"'{name}' has heads that differ by rank, and they are in shards: "
                             'shard the model by ranks.shard, which leaves them whole')
        if layer.merge_every:
            refuse_shards({f'{name}.{key}': p
                           for key, p in layer.named_parameters(recurse=False)})


def check_training(model, *optimizers):
    """Raises ValueError for what would train wrongly in silence: a trainable parameter that no
    optimizer holds, a layer whose weight was unfrozen, one with a basis that no galore.LowRankAdamW
    holds, or shards that merges do not know. Hooks warn of what shows only later: layers without
    gradients (not with per_layer), or that are not merged. Call it before the first step."""
    refuse_sharded_layers(model)
    held = {p for optimizer in optimizers for group in optimizer.param_groups
            for p in group['params']}
    lost = [name for p, name in leaf_names(model).items() if p.requires_grad and p not in held]
    if lost:
        what = lost[0] if len(lost) == 1 else f'{lost[0]} and {len(lost) - 1} more'
        raise ValueError(f'no optimizer steps on {what}, which wants a gradient: build the '
                         'optimizer after apply_mhlora, or freeze it')
    in_basis = {p for optimizer in optimizers for p in getattr(optimizer, 'layers', ())}
    for name, layer in named_layers(model).items():
        if layer.weight.requires_grad:
            raise ValueError(f"the weight of '{name}' is to stay frozen, as it gets no gradient: "
                             'set its requires_grad to False again')
        if layer.factors == 'basis' and layer.factor.requires_grad and layer.leaf not in in_basis:
            raise ValueError(f"no galore.LowRankAdamW holds '{name}', which has factors='basis': "
                             'another optimizer takes no bases, and nothing there would train')
    layers = [layer for layer in lowrank_layers(model)
              if layer.merge_every and not layer.moves_weight]
    if optimizers and _watched.isdisjoint(optimizers):
        _watched.add(optimizers[0])
        first = getattr(optimizers[0], 'optimizer', optimizers[0])  # accelerate wraps it
        if not any(getattr(optimizer, 'per_layer', False) for optimizer in optimizers):
            first.register_step_post_hook(gradient_watch(model))
        if layers:
            first.register_step_post_hook(merge_watch(layers[0]))


_watched = weakref.WeakSet()  # optimizers whose steps are counted


def gradient_watch(model):
    """Returns a hook for an optimizer's steps. At the first one it warns of layers without a
    gradient."""
    leaves = heads_of(model)
    leaves |= {layer.leaf for layer in lowrank_layers(model) if layer.factors == 'basis'}
    waiting = {name: p for p, name in leaf_names(model).items() if p in leaves}

    def hook(*_):
        silent = [name for name, p in waiting.items() if p.requires_grad and p.grad is None]
        waiting.clear()  # only the first step tells
        if silent:
            warnings.warn(f'{min(silent)} (of {len(silent)}) got no gradient in the first step: '
                          "where a module reads its linear layers' weights and does not call the "
                          'layers, low-rank weights act and train nowhere')
    return hook


def merge_watch(layer):
    """Returns a hook for an optimizer's steps. It warns if the layer is not merged for more than
    ten times merge_every steps."""
    steps, merges = 0, layer.merges

    def hook(*_):
        nonlocal steps, merges
        if layer.merges != merges:
            steps, merges = 0, layer.merges
        steps += 1
        if steps == 10 * layer.merge_every + 1:
            warnings.warn(f'merge_every={layer.merge_every}, and {steps - 1} steps without a '
                          'merge: call lowrank.merge(model) after every step that it divides')
    return hook


def count_parameters(model):
    """Counts parameters: total, trainable, and those of heads that train. If heads are split over
    ranks, it counts this rank's heads. Weights that GaLore moves count as trainable."""
    counts = dict(total=0, trainable=0, heads=0)
    galore = [layer for layer in lowrank_layers(model) if layer.moves_weight]
    moved = {layer.weight for layer in galore if layer.factor.requires_grad}
    # in shards a basis is a parameter
    skip = {x for layer in galore for x in (layer.factor, layer.basis)}
    skip |= {layer.scales for layer in model.modules() if isinstance(layer, FrozenLinear)}
    heads = heads_of(model)
    for p in {*model.parameters()} - skip:  # a tied weight comes once
        numbers = p.numel()
        if p.dtype == torch.uint8:  # in 4 bits
            numbers = 2 * numbers
        counts['total'] += numbers
        if p.requires_grad or p in moved:
            counts['trainable'] += numbers
            counts['heads'] += numbers * (p in heads)
    return counts


def freeze_rest(model, kinds=()):
    """Freezes all but `heads_of` a model and some kinds of layers, such as ('logit',). ValueError:
    it would freeze what GaLore trains, or kinds is a word."""
    if isinstance(kinds, str):
        raise ValueError(f"{kinds=} is one word: give several, such as ('logit',)")
    heads = heads_of(model)
    # a tied weight is kept under any of its names
    kept = heads | {p for name, p in model.named_parameters(remove_duplicate=False)
                    if is_wanted(name, kinds)}
    for name, layer in named_layers(model).items():
        trains = layer.moves_weight and layer.factor.requires_grad
        if trains and not is_wanted(name, kinds):
            raise ValueError(f"'{name}' trains its weight in a basis, and freeze_rest would freeze "
                             'that: freeze other parameters one by one, by requires_grad_(False)')
    for p in model.parameters():
        if p not in kept:
            p.requires_grad_(False)
