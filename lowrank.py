"""
Linear layers with low-rank weights: a frozen W beside H heads B_h A_h. Needs torch only.

W (m, n) frozen; A (H, r, n), B (H, m, r); s = alpha / r; G = dL/dW (m, n); P (m, r), Q (n, r) orthonormal.

    factors='both'    y = W x + (s / H) sum_h B_h A_h x    LoRA (Hu et al., arXiv 2106.09685), multi-head LoRA
    factors='B'       the same, A stays as it was drawn    LoRA-FA (Zhang et al., arXiv 2308.03303)
    factors='basis'   the factor on W's smaller side is a basis of the gradient, one for all heads, and s = 1:
                      B = P where m < n, A = Q^T elsewhere. Merged every step it is GaLore (Zhao et al., arXiv
                      2403.03507; the duality: Torroba-Hennigen et al., 2025), merged every T steps GaLoLTE.
                      galore.py takes the bases.
    split             head h sees the h-th part of the batch only, y = W x + s (B_h A_h - B_h' A_h') x (LTE,
                      Huh et al., arXiv 2402.16828); primes: what the last merge has sent of them
    merge             W <- W + (s / H) sum_h (B_h A_h - B_h' A_h')
"""

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

FORMAT = 4  # of checkpoints

# -----------------------------------------------------------------------------
# sixteen bits

# bfloat16 keeps 8 bits of a number: what is smaller than 1 / 512 of it is lost when it is added. So weights
# and moments are rounded up or down at random, right on average (stochastic rounding, Gupta et al., arXiv
# 1502.02551). The random bits of an element depend on a key and its place alone, so that ranks, shards of a
# tensor and resumed runs agree. They are read from a table, at an offset for each key and block.
BLOCK_OF_BITS = 2**20  # numbers
_tables = {}  # by device


def _random_bits(device):
    """16 random bits each, (2 BLOCK_OF_BITS,), int32."""
    if device in _tables:
        return _tables[device]
    generator = torch.Generator().manual_seed(16)
    table = torch.randint(2**16, (2 * BLOCK_OF_BITS,), generator=generator, dtype=torch.int32).to(device)
    if type(table) is torch.Tensor:  # and not a fake one, of a planner
        _tables[device] = table
    return table


def round_(out, x, key, first=0):
    """
    out <- x, in place. Where x is float32 and out bfloat16, a number between two of bfloat16's becomes the
    upper one as often as it is near to it; those that are numbers of bfloat16 stay, infinities and NaN too.

    out, x: of one shape; key: an integer, another for every tensor and time; first: the place of out's first
    element in the whole tensor. 6 passes over memory.
    """
    if out.dtype != torch.bfloat16 or x.dtype != torch.float32:
        out.copy_(x)
        return
    flat, x, table = out.reshape(-1), x.reshape(-1), _random_bits(out.device)
    piece = 2**18 if out.device.type == 'cpu' else BLOCK_OF_BITS  # on a CPU what stays in its cache
    begin, end = first, first + len(flat)
    while begin < end:
        stop = min(end, (begin // piece + 1) * piece)
        offset = hash((key, begin // BLOCK_OF_BITS)) % BLOCK_OF_BITS + begin % BLOCK_OF_BITS
        # a copy; and CUDA's NaN has all bits set: one more would make it zero
        part = x[begin - first:stop - first].nan_to_num(math.nan, math.inf, -math.inf)
        part.view(torch.int32).add_(table[offset:offset + stop - begin]).bitwise_and_(-2**16)
        flat[begin - first:stop - first] = part
        begin = stop
    if not out.is_contiguous():  # flat may be a copy
        out.copy_(flat.view(out.shape))


def wide(x):
    """A tensor's dtype, or float32, whichever is wider."""
    return torch.promote_types(x.dtype, torch.float32)


# -----------------------------------------------------------------------------
# the product


class LowRankProduct(torch.autograd.Function):
    """
    y = x W^T + b + scale (x A^T) B^T, in x's dtype: the product accumulates into the frozen linear's output.

    x (..., n), W (m, n), b (m,) or None; A (groups, r, n), B (groups, m, r), one of which may be a basis,
    without groups. The leading dimension of x is cut into `groups` equal parts, one for each pair.
    gain multiplies the gradients of A, B: the mean loss has 1 / groups of that of each part's mean.
    zero: A or B is known to be zero, so the product is skipped and only its gradient is computed.
    sketch (parts, m, r) or (parts, n, r): a leaf that is not read; its .grad becomes the `second_moment` of
    the gradients of sequences, with the basis B where A is trained, and of their transposes, with A^T, where
    B is.
    W gets no gradient, and there are no second derivatives (torch raises).

    Operations per token, forward and backward, R = groups r: 4 m n + 6 R (m + n) with both factors trained,
    4 m n + 2 R (m + n) with `zero`; a dense layer has 6 m n.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, sketch, scale, gain, zero):
        groups, n = len(A if A.dim() == 3 else B), x.shape[-1]
        _, _, _, trains_A, trains_B, *_ = ctx.needs_input_grad
        flat = x.reshape(x.shape[:-1].numel(), n)  # (tokens, n)
        y = F.linear(flat, W.to(x.dtype), None if b is None else b.to(x.dtype))  # (tokens, m)
        z, time = None, len(flat) // groups
        if not zero or trains_B:
            z = flat.view(groups, time, n) @ A.to(x.dtype).mT  # (groups, tokens / groups, r)
        if not zero:
            y.view(groups, time, len(W)).baddbmm_(z, B.to(x.dtype).mT.expand(groups, -1, -1), alpha=scale)
        # with A frozen (LoRA-FA, a basis on the right) z is enough, and x need not stay
        keeps_x = trains_A or sketch is not None
        ctx.save_for_backward(flat if keeps_x else None, W, A, B, z if trains_B else None)
        ctx.groups, ctx.scale, ctx.gain, ctx.zero = groups, scale, gain, zero
        ctx.parts = 1 if sketch is None else len(sketch)
        # no view for autograd, as which it could not be changed in place by what follows, such as a ReLU
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(W)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, W, A, B, z = ctx.saved_tensors
        needs_x, _, needs_b, needs_A, needs_B, needs_sketch, *_ = ctx.needs_input_grad
        groups, (m, n) = ctx.groups, W.shape
        dflat = dy.reshape(dy.shape[:-1].numel(), m)  # (tokens, m)
        time = len(dflat) // groups
        d = dflat.view(groups, time, m)  # (groups, tokens / groups, m)
        dx = db = dA = dB = dsketch = dz = None
        if needs_A or not ctx.zero:
            dz = d @ B.to(dy.dtype)  # (groups, tokens / groups, r)
            dz = dz.mul_(ctx.scale) if ctx.scale != 1 else dz
        if needs_x:
            dx = dflat @ W.to(dy.dtype)  # (tokens, n)
            if not ctx.zero:
                dx.view(groups, time, n).baddbmm_(dz, A.to(dy.dtype).expand(groups, -1, -1))
            dx = dx.view(*dy.shape[:-1], n)
        if needs_b:
            db = dflat.sum(0)
        sequences = len(dy) if dy.dim() > 1 else 1
        if needs_sketch and needs_A:
            dsketch = second_moment(dflat, x, dz.flatten(0, 1), sequences, ctx.parts)  # (parts, m, r)
        elif needs_sketch:
            dsketch = second_moment(x, dflat, z.flatten(0, 1), sequences, ctx.parts)  # (parts, n, r)
        if needs_A:
            dz = dz.mul_(ctx.gain) if ctx.gain != 1 else dz  # smaller than what it is multiplied into
            dA = torch.bmm(dz.mT, x.view(groups, time, n))  # (groups, r, n)
        if needs_B:
            z = z * (ctx.scale * ctx.gain) if ctx.scale * ctx.gain != 1 else z
            dB = torch.bmm(z.mT, d).mT  # (groups, m, r)
        return dx, None, db, dA, dB, dsketch, None, None, None


def second_moment(a, b, z, sequences, parts=1):
    """
    The sum over sequences of G_s G_s^T P / |G_s^T P|, where G_s = a_s^T b_s is what each adds to a gradient.

    a (tokens, m); b (tokens, n); z = a P (tokens, r), with orthonormal P (m, r); tokens are those of one
    sequence after the other. It is one step of subspace iteration towards the directions in which the
    gradients of single sequences lie, and the same however sequences are spread over micro-batches and ranks.
    An output layer gets all tokens in one row, each as a sequence. No G_s is formed. Returns (parts, m, r),
    of so many parts of the batch, each as if its mean loss were the loss; zeros where it is not finite.
    """
    time, rank = len(z) // max(sequences, 1), z.shape[1]
    b, z = b.view(sequences, time, b.shape[1]), z.view(sequences, time, rank)
    norm = torch.linalg.vector_norm(b.flatten(1), dim=1, dtype=wide(b))[:, None, None]
    norm = norm.clamp(torch.finfo(b.dtype).tiny, torch.finfo(b.dtype).max)
    unit = b / norm.to(b.dtype)  # its squares stay inside the range of float16
    if time <= rank:  # the cheaper order of the two products
        v = torch.bmm(torch.bmm(unit, unit.mT), z)  # (sequences, time, r)
    else:
        v = torch.bmm(unit, torch.bmm(unit.mT, z))
    size = (z.to(wide(b)) * v).sum((1, 2), keepdim=True).clamp_min(1e-30).sqrt()  # |G_s^T P| / norm
    v = (v / size * (norm * parts)).to(v.dtype).view(parts, -1, rank)
    Y = a.view(parts, -1, a.shape[1]).mT @ v
    return torch.where(Y.isfinite().all(), Y, 0)  # an overflow of float16 costs its own part alone


# -----------------------------------------------------------------------------
# the layer


class Zeros:
    """The buffer behind all factors of a model that are always zero. Such a factor is a parameter so that
    autograd, DDP and clipping see its .grad, the projected gradient."""

    def __init__(self, room=0):
        self.room, self.flat = room, None

    def view(self, shape, like):
        """Zeros of that shape, in the dtype and on the device of `like`, without memory of their own."""
        size, flat = math.prod(shape), self.flat
        self.room = max(self.room, size)
        if flat is None or len(flat) < self.room or flat.dtype != like.dtype or flat.device != like.device:
            self.flat = torch.zeros(self.room, dtype=like.dtype, device=like.device)
        return self.flat[:size].view(shape)


def side_by_side(A, B):
    """Heads (H, r, n), (H, m, r) as one pair (H r, n), (m, H r), whose product is the sum of theirs."""
    return A.flatten(0, 1), B.permute(1, 0, 2).flatten(1)


@contextlib.contextmanager
def holding(tensors, others):
    """While this lasts, the tensors of a list have the memory of others."""
    own = [x.data for x in tensors]
    try:
        for x, other in zip(tensors, others):
            x.data = other
        yield
    finally:
        for x, data in zip(tensors, own):
            x.data = data


class MHLoRALinear(nn.Module):
    """
    A linear layer with a frozen weight and H low-rank heads, or one basis and what is trained inside it.

    linear: the nn.Linear to replace; its weight is frozen (and not copied), its bias stays trainable.
    heads, rank, alpha: H, r, and alpha of s = alpha / r (None: r). factors, split: see the top of this file.
    merge_every: T, steps between merges; the training loop calls `merge` for T > 1. 0: never, or at the end.
    merge_reset: a merge draws A anew and zeroes B, as it does where merge_every is 0; else they train on
    (LTE), less A_merged and B_merged.
    worker, workers: of several ranks that share split heads, this one holds the heads worker::workers.
    zeros: the model's `Zeros`, None for a layer alone.
    Attributes: weight (m, n), bias (m,) or None, A (H / workers, r, n), B (H / workers, m, r). With
    factors='basis' one of A, B is None and `basis` is P (m, r) or Q (n, r); with merge_every=1 the other is
    always zero, takes no memory, is in no state dict, and its .grad is the projected gradient R:
    galore.LowRankAdamW steps with it on W.
    Raises ValueError for arguments that make no sense together.
    """

    def __init__(self, linear, heads=1, rank=4, alpha=None, factors='both', split=False, merge_every=0,
                 merge_reset=False, worker=0, workers=1, zeros=None):
        super().__init__()
        m, n = linear.weight.shape
        if factors not in ('both', 'B', 'basis'):
            raise ValueError(f"{factors=} is not known: set 'both', 'B' or 'basis'")
        if rank < 1 or heads < 1 or merge_every < 0:
            raise ValueError(f'{rank=}, {heads=} must be at least 1, {merge_every=} at least 0')
        if factors != 'basis' and alpha is not None and not alpha > 0:
            raise ValueError(f'{alpha=} leaves heads without effect: set it above 0')
        if factors != 'basis' and rank > min(m, n):
            raise ValueError(f'rank={rank} does not fit a linear layer of {n} inputs and {m} outputs: '
                             f'set a rank between 1 and {min(m, n)}')
        if factors == 'basis' and not merge_every:
            raise ValueError("factors='basis' trains a factor that merges into W: set merge_every=1 (GaLore) "
                             'or more')
        if factors == 'basis' and heads > 1 and (not split or merge_every == 1):
            raise ValueError(f'{heads=} in one basis that see the same tokens, or are merged every step, are '
                             'one head: set heads=1, or split=True and merge_every above 1')
        if split and heads % workers:
            raise ValueError(f'{heads=} do not split over {workers} ranks: set a multiple')
        self.in_features, self.out_features = n, m
        self.heads, self.rank, self.factors, self.split = heads, min(rank, m, n), factors, split and heads > 1
        self.scale = 1.0 if factors == 'basis' else (rank if alpha is None else alpha) / rank
        self.merge_every = merge_every
        self.worker, self.workers = (worker, workers) if self.split else (0, 1)
        self.reset = merge_reset or not merge_every or factors == 'basis'  # merges leave nothing to subtract
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.left = m < n  # a basis is on W's smaller side; of a square matrix on the right, as in GaLore
        self.zero = None  # the name of the factor that is always zero
        self.sketch = None  # a leaf, see LowRankProduct; galore.py asks for it
        self.mine = None  # another one, see `shard`
        self.evaluating = False
        shape_A, shape_B = (heads // self.workers, self.rank, n), (heads // self.workers, m, self.rank)
        if factors == 'basis':
            self.register_buffer('basis', self.weight.new_empty(min(m, n), self.rank))
            name, shape, other = ('A', shape_A, 'B') if self.left else ('B', shape_B, 'A')
            if merge_every == 1:
                self.zero, self.zeros = name, zeros or Zeros()
            factor = self.zeros.view(shape, self.weight) if self.zero else self.weight.new_empty(shape)
            self.register_parameter(name, nn.Parameter(factor))
            self.register_parameter(other, None)
        else:
            self.A = nn.Parameter(self.weight.new_empty(shape_A), requires_grad=factors == 'both')
            self.B = nn.Parameter(self.weight.new_empty(shape_B))
        if not self.reset:
            self.register_buffer('A_merged', torch.empty_like(self.A))
            self.register_buffer('B_merged', torch.empty_like(self.B))
        self.merges = 0  # how often it was merged
        if not self.weight.is_meta:
            self.start()

    def extra_repr(self):
        return (f'{self.in_features} -> {self.out_features}, heads={self.heads}, rank={self.rank}, '
                f'scale={self.scale:g}, factors={self.factors}, split={self.split}, '
                f'merge_every={self.merge_every}')

    # In each of these torch makes a view dense, or wants it in a state dict: the zero factor steps aside

    @contextlib.contextmanager
    def _without_zero(self):
        factor = self._parameters.pop(self.zero) if self.zero else None
        try:
            yield
        finally:
            if self.zero:
                view = self.zeros.view(factor.shape, self.weight)
                if factor.is_meta == view.is_meta:
                    factor.data = view
                else:  # as torch does: a new parameter
                    factor = nn.Parameter(view, factor.requires_grad)
                self._parameters[self.zero] = factor

    def _apply(self, *args, **kwargs):
        with self._without_zero():
            return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs):
        with self._without_zero():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        with self._without_zero():
            super()._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state):  # deepcopy
        super().__setstate__(state)
        with self._without_zero():
            pass

    @torch.no_grad()
    def start(self):
        """What a layer begins with: heads as drawn, all else zero. Of one on the meta device, after
        `to_empty`."""
        if self.factors == 'basis':
            local(self.basis).zero_()
            if not self.zero:
                local(self.trained).zero_()
        else:
            self.reset_heads()
            if not self.reset:  # where B' is zero A' may be anything: from A on changes are small
                self.A_merged.copy_(self.A)
                self.B_merged.zero_()

    @torch.no_grad()
    def reset_heads(self, generator=None):
        """LTE's initialisation: A orthogonal times sqrt(n / r), B zero, so that the heads add nothing."""
        A = local(self.A)
        here = range(self.worker, self.heads, self.workers)[rows_here(self.A)]
        for head in range(self.heads):  # every rank draws all: they are the same on any number of ranks
            drawn = torch.empty(A.shape[1:], dtype=wide(A))  # QR needs it
            nn.init.orthogonal_(drawn, gain=math.sqrt(self.in_features / self.rank), generator=generator)
            if head in here:
                A[here.index(head)].copy_(drawn)
        local(self.B).zero_()

    @property
    def trained(self):
        """With factors='basis': the factor that is trained, A of a wide matrix, B of a tall or square one."""
        return self.A if self.left else self.B

    def by_direction(self, x):
        """What is like the trained factor as rows, one for each direction of the basis (..., r, n or m), or
        back."""
        return x if self.left else x.mT

    def of_heads(self):
        """{name: tensor} of what each head has of its own: A and B, and their values at the last merge."""
        named = {name: getattr(self, name, None) for name in ('A', 'B', 'A_merged', 'B_merged')}
        return {name: x for name, x in named.items() if x is not None}

    @property
    def stepped(self):
        """The leaf whose .grad an optimizer takes: the trained factor, or of a sharded layer `mine`."""
        return self.trained if self.mine is None else self.mine

    def shard(self):
        """To be called when FSDP2 has sharded W. From now on a backward pass adds this rank's rows of the
        mean projected gradient to mine.grad, a DTensor: of R^T (n, r), or of R (m, r) those it holds of W.
        They are there when the pass has ended."""
        with self._without_zero():
            pass  # the weight may be on another device now
        if not self.trained.requires_grad:
            return
        long = max(self.trained.shape[1:])
        rows = rows_here(range(long), dist.get_world_size())
        zeros = self.zeros.view((rows.stop - rows.start, self.rank), self.basis)
        self.mine = shard_of(zeros, (long, self.rank), self.weight.device_mesh).requires_grad_()
        self.trained.register_post_accumulate_grad_hook(self._scatter)

    def _scatter(self, factor):
        rows = mean_slice(self.by_direction(factor.grad[0]).mT)
        factor.grad = None
        finish_sum()  # that of the layer before; this one runs while the next layer computes
        _running.append((self, rows))
        # at the end of the pass, for its last layer: FSDP ends its own sums so, too
        torch.autograd.Variable._execution_engine.queue_callback(finish_sum)

    def _take(self, rows):
        if self.mine.grad is None:
            self.mine.grad = shard_of(rows, self.mine.shape, self.mine.device_mesh)
        else:
            local(self.mine.grad).add_(rows)

    def pairs(self):
        """A (heads, r, n), B (heads, m, r) of this rank's heads; 2 r instead of r where what merges put into
        W is taken off again. A basis is one for all, (r, n) or (m, r)."""
        if self.factors == 'basis':
            return (self.A, self.basis) if self.left else (self.basis.mT, self.B)
        if self.reset:
            return self.A, self.B
        return torch.cat([self.A, self.A_merged], 1), torch.cat([self.B, -self.B_merged], 2)  # B A - B' A'

    def forward(self, x):
        if self.zero and not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        A, B = self.pairs()
        scale, gain = self.scale, 1
        if self.split and not self.evaluating:
            if not self.training:
                raise ValueError('split heads have no function of their own in eval mode: evaluate inside '
                                 'lowrank.averaged_heads(model), or merge them')
            gain = self.heads // self.workers
            if x.shape[0] % gain:
                raise ValueError(f'a batch of {x.shape[0]} does not split over {gain} heads: '
                                 'set batch_size to a multiple of heads times the number of ranks')
        elif self.factors != 'basis':  # every head sees every token: as one pair of rank H r
            A, B = (factor[None] for factor in side_by_side(A, B))
            scale = self.scale / self.heads
        return LowRankProduct.apply(x, self.weight, self.bias, A, B, self.sketch, scale, gain,
                                    self.zero is not None)

    def ask_sketch(self, parts=1):
        """Until `sketch` is None again backward passes add up the `second_moment` of gradients in sketch.grad
        (parts, m, r), or (parts, n, r): in all, or of each of this rank's heads."""
        zero = local(self.basis).new_zeros((), dtype=wide(self.basis))
        self.sketch = zero.expand(parts, *self.basis.shape).requires_grad_()

    @contextlib.contextmanager
    def averaged(self):
        """While this lasts, split heads act on every token, averaged: the function of `merged_weight`. Every
        rank takes part, and holds all heads, in global order; in a basis their mean."""
        if not self.split or self.evaluating:  # or they are averaged already
            yield
            return
        factors = list(self.of_heads().values())
        averaged = [x.detach() for x in factors]
        if self.factors == 'basis':
            averaged = [mean(averaged[0].mean(0), self.workers)[None]]
        elif self.workers > 1:
            flat = gather(torch.cat([x.flatten() for x in averaged]))  # (ranks, numbers of one): one message
            parts = flat.split([x.numel() for x in averaged], 1)
            averaged = [in_global_order(part.view(self.workers, *x.shape)) for x, part in zip(factors, parts)]
        self.evaluating = True
        try:
            with holding(factors, averaged):
                yield
        finally:
            self.evaluating = False

    @torch.no_grad()
    def merged_weight(self, factor=None):
        """W + (s / H) sum_h (B_h A_h - B_h' A_h') over the heads of all ranks (m, n), in float32 or wider;
        of a sharded W this rank's rows. Every rank takes part, and gets the same bits. factor: in a basis
        the mean of what trains, where few bits have brought it."""
        dtype, rows = wide(self.weight), rows_here(self.weight)
        weight = local(self.weight).to(dtype)
        if self.zero:
            return weight
        if self.factors == 'basis':
            if factor is None:
                factor = mean(whole(self.trained).to(dtype).mean(0), self.workers)
            basis = self.basis.to(dtype)
            B, A = (basis, factor) if self.left else (factor, basis.mT)
            return torch.addmm(weight, B[rows], A)
        with self.averaged():
            A, B = side_by_side(*map(whole, self.pairs()))
            return torch.addmm(weight, B[rows].to(dtype), A.to(dtype), alpha=self.scale / self.heads)

    @torch.no_grad()
    def merge(self, generator, key, bits=32, state=None):
        """W <- `merged_weight`, rounded with a key (see `round_`); then reset, or remember A and B. bits,
        state: see lowrank.merge."""
        self.merges += 1
        if self.zero:
            return
        mean_factor = None
        if bits < 32 and self.split and self.factors == 'basis':
            factor, error = map(self.by_direction, (self.trained, error_of(self.trained, state)))
            mean_factor = self.by_direction(coded_mean(factor, bits, self.workers, error))
        elif bits < 32 and self.split:
            raise ValueError(f"{bits=} are for merges of heads in a basis (factors='basis') and of whole "
                             'weights: set 32')
        round_(local(self.weight), self.merged_weight(mean_factor), key, first_here(self.weight))
        if self.factors == 'basis':
            local(self.trained).zero_()
        elif self.reset:
            self.reset_heads(generator)
        else:
            self.A_merged.copy_(self.A)
            self.B_merged.copy_(self.B)


# -----------------------------------------------------------------------------
# ranks: the collectives of ours; nccl takes contiguous tensors only

traffic = {'bytes': 0}  # what this process has sent in them so far, by a ring; DDP's are not in it


def place():
    """(rank, ranks) of this process; alone (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean(x, workers=None):
    """The average of a tensor over ranks (workers, None: all), in place; alone, the tensor itself."""
    workers = place()[1] if workers is None else workers
    if workers > 1:
        traffic['bytes'] += 2 * x.nbytes * (workers - 1) / workers
        dist.all_reduce(x)  # gloo has no average
        x.div_(workers)
    return x


def gather(x):
    """The tensors x of all ranks, (ranks, *x.shape)."""
    ranks = place()[1]
    if ranks == 1:
        return x.detach()[None]
    x = x.detach().contiguous()
    traffic['bytes'] += x.nbytes * (ranks - 1)
    gathered = x.new_empty(ranks, *x.shape)
    dist.all_gather(list(gathered), x)
    return gathered


def mean_slice(x):
    """Begins the average of x (rows, columns) over ranks. Returns a function that waits for it, and gives
    this rank's rows of it, see `rows_here`."""
    ranks, size = dist.get_world_size(), -(-len(x) // dist.get_world_size())
    padded = F.pad(x, (0, 0, 0, size * ranks - len(x))).contiguous()
    traffic['bytes'] += padded.nbytes * (ranks - 1) / ranks
    part, here = padded.new_empty(size, *padded.shape[1:]), rows_here(x, ranks)
    # its name from torch 2.13 on, and before
    begin = getattr(dist, 'reduce_scatter_single', dist.reduce_scatter_tensor)
    work = begin(part, padded, async_op=True)

    def rows():
        work.wait()
        return part[:here.stop - here.start].div_(ranks)
    return rows


_running = []  # of a backward pass: the layer whose sum runs, and what waits for its rows; one at most


def finish_sum(drop=False):
    """Waits for the sum that runs, if one does, and gives its layer the rows, or drops them: where a pass has
    failed they are left from it."""
    while _running:
        layer, rows = _running.pop()
        rows() if drop else layer._take(rows())


def gather_at(owner, x):
    """The tensors x of all ranks, (ranks, *x.shape), at one of them; None at others."""
    rank, ranks = place()
    if ranks == 1:
        return x[None]
    gathered, x = None, x.contiguous()
    if rank == owner:
        gathered = x.new_empty(ranks, *x.shape)
    dist.gather(x, None if gathered is None else list(gathered), owner)
    traffic['bytes'] += x.nbytes * (ranks - 1) / ranks  # owners take turns
    return gathered


def padded_rows(part, rows):
    """This rank's rows of a tensor (rows, ...), with zeros after them: all ranks have as many."""
    size = -(-rows // dist.get_world_size())
    return torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])


def whole_of(part, rows):
    """The tensor (rows, ...) of which each rank holds `part`, its rows."""
    return gather(padded_rows(part, rows)).flatten(0, 1)[:rows]


def same(x, owner=0):
    """The tensor of one rank on all ranks, in place, to the last bit; alone, the tensor itself."""
    if place()[1] > 1:
        traffic['bytes'] += x.nbytes
        dist.broadcast(x, owner)
    return x


def exchanged(x):
    """Of x (ranks, ...) rank k gets the k-th part: what came from all of them, (ranks, ...)."""
    traffic['bytes'] += x.nbytes * (len(x) - 1) / len(x)
    parts = x.new_empty(x.shape)
    dist.all_to_all_single(parts, x.contiguous())
    return parts


def in_global_order(x):
    """(ranks, heads of one, ...) -> (H, ...): the l-th head of rank k is head l * ranks + k."""
    return x.transpose(0, 1).flatten(0, 1)


def rows_of(batch_size, heads=1, rank=0, ranks=1):
    """The rows of a micro-batch that a rank trains on, those of each of its `heads` together. Row j is one of
    head j % (heads ranks), see `in_global_order`. ValueError where they do not divide the batch."""
    if batch_size % (heads * ranks):
        raise ValueError(f'{batch_size=} does not split over {heads} heads on each of {ranks} ranks: set a '
                         'multiple')
    return [row for head in range(heads) for row in range(head * ranks + rank, batch_size, heads * ranks)]


def own_heads(model):
    """The set of parameters and buffers of split heads where ranks share them: they differ by rank."""
    return {x for layer in lowrank_layers(model) if layer.workers > 1 for x in layer.of_heads().values()}


def keep_out_of_ddp(net, outside_ddp):
    """Tells DistributedDataParallel, before it wraps `net`, which parameters and buffers to leave alone."""
    named = (*net.named_parameters(), *net.named_buffers())
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # no public name so far
        net, [name for name, x in named if x in outside_ddp])


def replica_parameters(model):
    """{name: parameter} of what trains without heads: with sync='merge' each rank has its own (LTE)."""
    heads = heads_of(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p not in heads}


def averaged_copy(p):
    """A copy of a parameter, averaged over ranks, in float32 or wider."""
    return mean(p.detach().to(wide(p), copy=True))


# -----------------------------------------------------------------------------
# few bits

PACK = 64  # numbers that share a step, of 16 bits


def pack(x, bits):
    """
    x (..., 64) in 2 to 8 bits a number: (..., 8 bits + 2) bytes, the last two of which are the step. A number
    is one of 2^bits odd multiples of half a step, and the step is that of least squares: what is left is
    orthogonal to what is sent, and smaller than x. A block with inf or NaN becomes NaN.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f'{bits=} does not fit a byte: set 2 to 8, or 32 to send numbers as they are')
    half, tiny = 2 ** (bits - 1), torch.finfo(x.dtype).tiny
    if bits == 2:  # nearly the best one for Gaussian numbers; with more bits the largest decides
        step = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / 8
    else:
        step = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True) / half
    level = (x / step.clamp_min_(tiny)).floor_().clamp_(-half, half - 1).add_(0.5)
    step = (x * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
    words = level.add_(half - 0.5).long().unflatten(-1, (8, 8))  # eight numbers take `bits` bytes
    words <<= bits * torch.arange(8, device=x.device)
    packed = words.sum(-1, keepdim=True).view(torch.uint8)[..., :bits]  # (..., 8, bits)
    return torch.cat([packed.flatten(-2), step.to(torch.bfloat16).view(torch.uint8)], -1)


def unpack(codes, dtype):
    """The numbers (..., 64) that `pack` made into codes."""
    bits = codes.shape[-1] // 8
    packed, step = codes.split([8 * bits, 2], -1)
    words = F.pad(packed.reshape(-1, bits), (0, 8 - bits)).view(torch.int64)  # (8 blocks, 1)
    level = words >> bits * torch.arange(8, device=codes.device) & 2**bits - 1  # (8 blocks, 8)
    level = level.view(*codes.shape[:-1], PACK).to(dtype).sub_(2 ** (bits - 1) - 0.5)
    return level.mul_(step.contiguous().view(torch.bfloat16))


def in_blocks(x, slices=1):
    """The numbers of x (..., numbers), with zeros after them, (..., slices, blocks, 64)."""
    return F.pad(x, (0, -x.shape[-1] % (PACK * slices))).unflatten(-1, (slices, -1, PACK))


@torch.no_grad()
def coded_mean(x, bits, workers=1, error=None):
    """
    The average (...) of x (heads, ...) over the heads of so many ranks, sent in `bits` bits a number. The
    rank of the h-th head averages the h-th slice, so that no more numbers travel than in a ring. All ranks
    get the same bits, whatever the number of ranks; NaN where there is one.

    error (heads, ...): what was left of each head's earlier numbers is sent with these, and replaced by what
    is left now (error feedback, Seide et al., 2014). The owner of a slice adds what is left of its average.
    """
    mine, numbers, dtype = len(x), x[0].numel(), wide(x)
    heads, rank = mine * workers, place()[0] if workers > 1 else 0
    value = x.to(dtype) if error is None else x + error
    value = in_blocks(value.reshape(mine, numbers), heads)  # (mine, heads, blocks, 64)
    codes = sent = pack(value, bits)
    if workers > 1:
        sent = sent.unflatten(1, (mine, workers)).permute(2, 0, 1, 3, 4)  # (ranks, heads, slices of it, ...)
        sent = in_global_order(exchanged(sent))  # (all heads, my slices, blocks, bytes)
    average = sum(unpack(part, dtype) for part in sent).div_(heads)  # always in the same order
    codes_of_mean = pack(average, bits)
    if error is not None:
        value -= unpack(codes, dtype)
        average -= unpack(codes_of_mean, dtype)
        for i, left in enumerate(average):
            value[i, i * workers + rank].add_(left, alpha=heads)
        error.copy_(value.view(mine, -1)[:, :numbers].view(error.shape))
    if workers > 1:
        codes_of_mean = in_global_order(gather(codes_of_mean))
    return unpack(codes_of_mean, dtype).flatten()[:numbers].view(x.shape[1:])


@torch.no_grad()
def mean_at(owner, x, workers):
    """The average (...) of x (heads, ...) over the heads of so many ranks at one of them; elsewhere it means
    nothing. Rounded to 6 bits, and what is left to 6 more: large directions of a sketch would hide others."""
    mine, numbers, dtype = len(x), x[0].numel(), wide(x)
    value = in_blocks(x.reshape(mine, numbers).to(dtype))  # (mine, 1, blocks, 64)
    codes = pack(value, 6)
    codes = torch.stack([codes, pack(value - unpack(codes, dtype), 6)], 1)  # (mine, 2, 1, blocks, bytes)
    if workers > 1:
        parts = gather_at(owner, codes)
        codes = codes if parts is None else in_global_order(parts)
    average = sum(unpack(part, dtype).sum(0) for part in codes).div_(len(codes))
    return average.flatten()[:numbers].view(x.shape[1:])


def coded_same(owner, x, bits):
    """The tensor x of one rank on all ranks, as its codes say, to the last bit."""
    codes = same(pack(in_blocks(x.flatten()), bits), owner)
    return unpack(codes, x.dtype).flatten()[:x.numel()].view(x.shape)


def error_of(p, state):
    """What few bits have left of a parameter's averages, in an optimizer's state; zeros at first."""
    if 'error' not in state[p]:
        state[p]['error'] = torch.zeros_like(p, dtype=wide(p))
    return state[p]['error']


# -----------------------------------------------------------------------------
# shards: FSDP2 cuts parameters into rows, an equal number for each rank, the last ones fewer


def is_sharded(x):
    """Whether a tensor is a DTensor, as `shard` makes them; torch's module of them takes 0.7 s to import."""
    return hasattr(x, 'to_local')


def local(x):
    """This rank's rows of a sharded tensor; any other as it is."""
    return x.to_local() if is_sharded(x) else x


def whole(x):
    """All rows of a sharded tensor; any other as it is. Every rank takes part."""
    return whole_of(x.to_local(), len(x)) if is_sharded(x) else x


def rows_here(x, ranks=None):
    """The slice of the rows of x that this rank holds, if x is sharded, or to be over `ranks`; else all."""
    ranks = x.device_mesh.size() if is_sharded(x) else ranks
    if ranks is None:
        return slice(None)
    size = -(-len(x) // ranks)
    return slice(min(dist.get_rank() * size, len(x)), min((dist.get_rank() + 1) * size, len(x)))


def first_here(x):
    """The place of this rank's first element in the whole tensor, see `round_`."""
    return (rows_here(x).start or 0) * x.shape[1:].numel()


def shard_of(rows, shape, mesh):
    """The DTensor of that shape of which this rank holds `rows`."""
    from torch.distributed.tensor import DTensor, Shard
    shape = torch.Size(shape)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape,
                              stride=torch.empty(shape, device='meta').stride())


def shard(model, device):
    """
    Shards a model, of which model.blocks are the blocks, over all ranks by torch's FSDP2, and moves it from
    the CPU to this rank's device; parameters of a block are there in whole while it computes. To be called
    before an optimizer is built. Alone it only moves the model. One on the meta device gets memory for this
    rank's rows alone, whose values are then to be set: see `write`, MHLoRALinear.start.

    W is frozen: it is gathered, and its gradient never formed. What is reduced is the projected gradient, and
    each rank steps on its own rows of W. GaLore's bases are gathered with W; GaLoLTE's, and heads that
    differ by rank, stay whole. ValueError: a weight is shared by two blocks, or by one and the rest.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    layers, move = lowrank_layers(model), model.to_empty if next(model.parameters()).is_meta else model.to
    if place()[1] == 1:
        print('one process holds all: shard=True does nothing')
        move(device=device)
        return
    left_alone = own_heads(model) | {layer.trained for layer in layers if layer.zero}
    blocks = list(dict.fromkeys(model.blocks))
    inside = {module for block in blocks for module in block.modules()}
    rest = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    parts = [rest, *(set(block.parameters()) for block in blocks)]
    for name, p in model.named_parameters():
        if sum(p in part for part in parts) > 1:
            raise ValueError(f'{name} is shared by two blocks, or by a block and the rest, which are sharded '
                             'one by one: set shard=False, or untie it')
    for layer in layers:
        if layer.zero:  # its basis is gathered with W
            basis = layer._buffers.pop('basis')
            layer.register_parameter('basis', nn.Parameter(basis, requires_grad=False))
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=left_alone, reshard_after_forward=True)
    move(device=device)
    for layer in layers:
        if layer.zero:
            layer.shard()


@torch.no_grad()
def write(model, name, x):
    """Writes the parameter of that name, of shards this rank's rows."""
    p = model.get_parameter(name)
    local(p).copy_(x[rows_here(p)])


# -----------------------------------------------------------------------------
# checkpoints: one file, whatever the number of ranks


@torch.no_grad()
def gather_state(model, optimizer=None, replicas=None):
    """
    What a checkpoint holds, for rank 0, which writes it. Every rank takes part, tensor by tensor, and
    what travels is None on the others.

    model: the state dict, of heads those of all ranks in global order, of replicas the average: what
    is evaluated. With an optimizer of galore.py also optimizer: {name of a parameter: its state}, of
    heads in the same order, of replicas (ranks, ...), of shards as if there were none, with moments of
    8 bits as float32; replicas: {name: (ranks, ...)}; sketches: {name of a layer that is at one: (parts
    of all ranks, ...), or None before its first gradient}.
    """
    replicas, heads = replicas or {}, own_heads(model)
    own = set(replicas.values())

    def collect(x, p):
        """x, of the parameter or buffer p, of all ranks."""
        if is_sharded(p):
            x = padded_rows(local(x), len(p))
        elif p not in heads | own:
            return x  # all ranks have the same
        x = gather_at(0, x)
        if x is None:
            return None
        if p in own:
            return x.cpu()
        if p in heads:
            return in_global_order(x).cpu()
        rows = x.flatten(0, 1).cpu()
        if len(rows) > len(p):  # torch would write what is behind a view, too
            rows = rows[:len(p)].clone()
        return rows

    def average(p):
        x = averaged_copy(p).to(p.dtype)
        return x.cpu() if place()[0] == 0 else None

    found, once = {'format': FORMAT, 'model': {}}, {}  # tied weights have two names
    for name, p in model.state_dict(keep_vars=True).items():
        if p not in once:
            once[p] = average(p) if p in own else collect(p.detach(), p)
        found['model'][name] = once[p]
    if optimizer is None:
        return found
    found.update(optimizer={}, replicas={}, sketches={})
    names = stepped(model)
    sharded = {layer.mine: layer for layer in lowrank_layers(model) if layer.mine is not None}
    for p, state in optimizer.state.items():
        saved = found['optimizer'][names[p]] = {}
        for key, x in state.items():
            if is_sharded(p) and key.endswith('_top'):
                continue
            if is_sharded(p):
                x = optimizer.decoded(state, key)
            if torch.is_tensor(x) and x.dim():
                x = collect(x, p)
            if p in sharded and torch.is_tensor(x):  # (n, r) or (m, r), as R is without shards
                x = sharded[p].by_direction(x.mT)[None].contiguous()
            saved[key] = x
    for name, p in replicas.items():
        found['replicas'][name] = collect(p.detach(), p)
    for name, layer in named_layers(model).items():
        if layer.sketch is not None:
            sums = layer.sketch.grad
            sums = None if sums is None else gather_at(0, sums)
            found['sketches'][name] = None if sums is None else in_global_order(sums).cpu()
    return found


def stepped(model):
    """{what an optimizer steps on: its name}: parameters, but of sharded layers of GaLore their `mine`."""
    names = {p: name for name, p in model.named_parameters()}
    for layer in lowrank_layers(model):
        if layer.mine is not None:
            names[layer.mine] = names.pop(layer.trained)
    return names


def take(x, p, heads, replicas=()):
    """What this rank has of x, a tensor of a checkpoint. p: the parameter or buffer that it is of;
    heads: those that differ by rank; replicas: parameters of which each rank has its own."""
    rank, ranks = place()
    if is_sharded(p):
        return x[rows_here(p)]
    if p in heads:
        return x[rank::ranks]
    return x[rank] if p in replicas else x


@torch.no_grad()
def load_weights(model, weights):
    """Loads the 'model' of a checkpoint, each rank its part. ValueError: it is of another model."""
    own, heads, ranks = model.state_dict(keep_vars=True), own_heads(model), place()[1]
    shapes = {name: (len(p) * ranks, *p.shape[1:]) if p in heads else (*p.shape,)
              for name, p in own.items()}
    saved = {name: (*x.shape,) for name, x in weights.items()}
    if odd := dict(shapes.items() ^ saved.items()):
        raise ValueError(f'the checkpoint is that of another model: {min(odd)} is missing in one of '
                         'the two, or has two shapes')
    for name, p in own.items():
        local(p).copy_(take(weights[name], p, heads))


@torch.no_grad()
def load_state(model, optimizer, checkpoint, replicas=None):
    """Loads a checkpoint, each rank its part, and leaves it as it is. Heads and shards may come from
    another number of ranks; replicas may not, as each rank has its own (ValueError)."""
    replicas, heads, (rank, ranks) = replicas or {}, own_heads(model), place()
    load_weights(model, checkpoint['model'])
    for name, p in replicas.items():
        saved = checkpoint['replicas'].get(name, ())
        if len(saved) != ranks:
            raise ValueError(f"with sync='merge' each of {max(len(saved), 1)} ranks saved its own "
                             f'parameters, and here are {ranks}: resume on as many as before')
        p.copy_(saved[rank])
    named, own = {name: p for p, name in stepped(model).items()}, set(replicas.values())
    sharded = {layer.mine: layer for layer in lowrank_layers(model) if layer.mine is not None}
    for name, state in checkpoint['optimizer'].items():
        p = named[name]
        for key, x in state.items():
            if is_sharded(p) and key.endswith('_top'):
                continue
            if is_sharded(p):
                x = optimizer.decoded(state, key)
            if p in sharded and torch.is_tensor(x):  # see `gather_state`
                x = sharded[p].by_direction(x[0]).mT.contiguous()
            if torch.is_tensor(x):
                x = take(x, p, heads, own) if x.dim() else x
                x = x.to(p.device, copy=True)  # the file is mapped, and may be replaced
            optimizer.state[p][key] = x
        optimizer.encode_(p)
    for name, sums in checkpoint['sketches'].items():
        layer = model.get_submodule(name)
        layer.ask_sketch(parts=optimizer.parts(layer))
        if sums is not None:  # of other parts each takes the average: a sketch is a sum
            same_parts = len(sums) == ranks * len(layer.sketch)
            part = sums[rank::ranks] if same_parts else sums.mean(0).expand_as(layer.sketch)
            layer.sketch.grad = part.to(layer.sketch, copy=True)


# -----------------------------------------------------------------------------
# models

# What a kind of layer is called in GPT-2, LLaMA and timm's ViT; other targets are modules' own names
KINDS = {'attn': ('attn', 'self_attn'), 'mlp': ('mlp',), 'logit': ('lm_head', 'head')}
# They compute with the weights of their linears instead of calling them (the first one in eval mode)
BYPASS = ('torch.nn.modules.transformer.TransformerEncoderLayer', 'timm.models.beit.Attention',
          'timm.models.eva.EvaAttention')


def _wanted(name, target):
    """Whether a target covers the layer of that name."""
    return not set(KINDS.get(target, (target,))).isdisjoint(name.split('.'))


def _refuse_what_bypasses(model, targets):
    """ValueError where heads would be put beside layers whose weights are read by others."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        kinds = {f'{c.__module__}.{c.__qualname__}' for c in type(module).__mro__}
        if type(module).__module__.startswith('peft.'):
            raise ValueError(f"'{name}' is PEFT's {kind}: give the model without PEFT's adapters")
        inside = [f'{name}.{part}' for part, child in module.named_modules() if isinstance(child, nn.Linear)]
        if not kinds.isdisjoint(BYPASS) and any(_wanted(part, target) for part in inside
                                                for target in targets):
            raise ValueError(f"'{name}' ({kind}) reads its linear layers' weights itself, and passes heads "
                             'over in silence: leave it out of targets, or write its forward pass with calls')
        if kind == 'Conv1D' and any(_wanted(name, target) for target in targets):
            raise ValueError(f"'{name}' is transformers' Conv1D, no nn.Linear: load the weights into "
                             'model.GPT')


def apply_mhlora(model, targets=('attn', 'mlp'), heads=1, rank=4, alpha=None, factors='both', split=False,
                 merge_every=0, merge_reset=False, worker=0, workers=1):
    """
    Replaces linear layers of a model by MHLoRALinear, in place; the model's function stays the same.

    targets: kinds ('attn', 'mlp', 'logit') or names of modules ('c_attn'); every nn.Linear with one of
    them in its dotted name is replaced. Other arguments: see MHLoRALinear; in a basis a rank above a
    layer's smaller side is clamped. Linears that share their weight share one layer. An output layer
    whose weight is tied to an embedding gets its own frozen copy, and the embedding stays trainable: the
    count of parameters rises. Returns the names of the replaced layers and says how many of how many
    they are, and what it passed over. ValueError: a target that matches nothing; layers that would pass
    heads over; linears with hooks, or a forward of their own.
    """
    if isinstance(targets, str):
        raise ValueError(f"targets={targets!r} is a string: give a tuple of names, such as ('attn', 'mlp')")
    _refuse_what_bypasses(model, targets)
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if type(module) is nn.Linear}
    chosen = {}
    for target in targets:
        matched = [name for name in linears if _wanted(name, target)]
        if not matched:
            there = sorted({name.split('.')[-1] for name in linears})
            raise ValueError(f"no linear layer matches lowrank='{target}': set 'attn', 'mlp', 'logit' or one "
                             f"of {', '.join(there)}")
        chosen.update({name: linears[name] for name in matched})
    others = {linear: name for name, linear in linears.items() if name not in chosen}
    for name, linear in chosen.items():
        if linear in others:
            raise ValueError(f"'{name}' is called '{others[linear]}', too, where it would stay without "
                             'heads: give targets that name both')
        own = vars(linear)
        if 'forward' in own or any(own[key] for key in own if key.endswith('_hooks')):
            raise ValueError(f"'{name}' has hooks, or a forward of its own, that a low-rank layer in its "
                             'place would not call: take them off, and put them on afterwards')
    replaced = set(chosen.values())
    elsewhere = {p for module in model.modules() if module not in replaced
                 for p in module.parameters(recurse=False)}
    zeros = Zeros(rank * max(max(linear.weight.shape) for linear in replaced))
    made, clamped = {}, []
    for name, linear in chosen.items():
        W = linear.weight
        if W in made and linear.bias is not made[W].bias:
            raise ValueError(f"'{name}' shares its weight with another layer, but not its bias: give both "
                             'one bias, or none')
        if W not in made:
            if W in elsewhere:  # tied: freezing it would freeze the embedding, or another layer
                linear.weight = nn.Parameter(W.detach().clone())
            made[W] = MHLoRALinear(linear, heads, rank, alpha, factors, split, merge_every, merge_reset,
                                   worker, workers, zeros).train(linear.training)
            if made[W].rank < rank:
                clamped.append(name)
        model.set_submodule(name, made[W])
    passed = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and type(module) is not nn.Linear
              and any(_wanted(name, target) for target in targets)]
    if place()[0] == 0:
        print(f'low-rank weights on {len(chosen)} of {len(linears)} linear layers'
              + f'; rank {rank} is clamped to the smaller side of {len(clamped)}, such as {clamped[:1]}'
              * bool(clamped)
              + f"; passed over, being subclasses of nn.Linear: {', '.join(passed[:3])}" * bool(passed))
    return list(chosen)


def put_layers(model, settings, worker=0, workers=1):
    """Puts the low-rank layers that a script's settings ask for into a model, see `apply_mhlora`, and returns
    them, each once, in the order in which their heads are drawn."""
    if not settings['lowrank']:
        return []
    keys = 'heads', 'rank', 'alpha', 'factors', 'split', 'merge_every', 'merge_reset'
    names = apply_mhlora(model, settings['lowrank'].split(','), **{key: settings[key] for key in keys},
                         worker=worker, workers=workers)
    return list(dict.fromkeys(map(model.get_submodule, names)))


def named_layers(model):
    """{name: layer} of the MHLoRALinear layers of a model, in order, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MHLoRALinear)}


def lowrank_layers(model):
    """The layers of `named_layers`."""
    return list(named_layers(model).values())


def heads_of(model):
    """The set of A and B of all layers. Of GaLore's, which train whole weights, none."""
    return {factor for layer in lowrank_layers(model) if not layer.zero for factor in (layer.A, layer.B)
            if factor is not None}


@torch.no_grad()
def merge(model, generator=None, replicas=None, bits=32, state=None):
    """
    Merges the heads of every layer into its weight (LTE, section 3), one layer at a time, and averages
    `replicas` ({name: parameter}) over ranks. generator: of new heads, the same on all ranks (None: of how
    often the model was merged; after a resume give one, such as of the step); its seed is also that of
    rounding.

    bits: of a number that split heads in a basis or replicas send (see `coded_mean`). Below 32 `state`, an
    optimizer's, has what they leave, and of replicas the values that all ranks have in `common`, those of
    the merge before; where it has none a replica is sent in full.
    """
    layers = lowrank_layers(model)
    generator = generator or torch.Generator().manual_seed(layers[0].merges if layers else 0)
    seed = generator.initial_seed()
    if bits == 32:  # what a run with few bits left is old when it comes back to them
        for kept in (state or {}).values():
            kept.pop('error', None), kept.pop('common', None)
    for i, layer in enumerate(layers):
        layer.merge(generator, hash((seed, i)), bits, state)
    for i, p in enumerate((replicas or {}).values()):
        if bits < 32 and 'common' in state[p]:
            change, error = p.to(wide(p)) - state[p]['common'], error_of(p, state)
            new = coded_mean(change[None], bits, place()[1], error[None]).add_(state[p]['common'])
        else:
            new = averaged_copy(p)
        round_(p, new, hash((seed, -1, i)))
        if bits < 32:
            state[p]['common'] = p.detach().clone()


@contextlib.contextmanager
def averaged_heads(model, replicas=None):
    """While this lasts, split heads act on every token, averaged: the function of the merged weights, for
    evaluation. On several ranks all take part, and hold the heads of all and the average of `replicas`."""
    own = list((replicas or {}).values())
    with contextlib.ExitStack() as stack:
        for layer in lowrank_layers(model):
            stack.enter_context(layer.averaged())
        stack.enter_context(holding(own, [averaged_copy(p).to(p.dtype) for p in own]))
        yield


@torch.no_grad()
def merged_state_dict(model, replicas=None, dtype=None):
    """The state dict of the same model without heads: what is evaluated, merged into plain nn.Linear weights
    (in `dtype`, or their own). The model stays as it is; all ranks take part. A weight that was tied is there
    twice, see `apply_mhlora`."""
    with averaged_heads(model, replicas):
        state = model.state_dict()
    for i, (name, module) in enumerate(model.named_modules(remove_duplicate=False)):
        if isinstance(module, MHLoRALinear):
            merged = module.merged_weight()
            if is_sharded(module.weight):
                merged = whole_of(merged, module.out_features)
            state[f'{name}.weight'] = torch.empty_like(merged, dtype=dtype or module.weight.dtype)
            round_(state[f'{name}.weight'], merged, i)
            for key in (*module.of_heads(), 'basis'):
                state.pop(f'{name}.{key}', None)
    return state


def drop_moments(model, optimizer):
    """Drops the optimizer's state of every A and B: after a reset it is that of other factors."""
    for factor in heads_of(model):
        optimizer.state.pop(factor, None)


@torch.no_grad()
def clip_gradients(model, max_norm):
    """
    Clips gradients to the norm max_norm (0: only measures), in place. Split heads are models of their own, so
    each has a norm of its own; of a layer in a basis it is that of the projected gradient. Computed in the
    gradients' precision or float32, whichever is wider. Returns the norm of all before clipping, a tensor.
    """
    heads = [factor for layer in lowrank_layers(model) if layer.split for factor in (layer.A, layer.B)
             if factor is not None and factor.grad is not None]
    own = set(heads)
    rest = [local(p.grad) for p in stepped(model) if p not in own and p.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=wide(grad)) for grad in rest]
    norms = torch.stack(norms or [torch.zeros(())]).norm()[None]
    if any(map(is_sharded, model.parameters())):
        norms = mean(norms.square()).mul_(dist.get_world_size()).sqrt()
    if heads:
        of_heads = [torch.linalg.vector_norm(p.grad, dim=(1, 2), dtype=wide(p.grad)) for p in heads]
        of_heads = torch.stack(of_heads).norm(dim=0)  # (heads,)
        norms = torch.cat([norms.to(of_heads), of_heads])  # (1 + heads,)
    if max_norm:
        keep = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if rest:
            torch._foreach_mul_(rest, keep[0])
        for factor in heads:
            factor.grad.mul_(keep[1:, None, None])
    return torch.linalg.vector_norm(norms)


def check_training(model, *optimizers):
    """ValueError for what would train wrongly in silence: a trainable parameter that no optimizer holds, or a
    layer with a basis that no galore.LowRankAdamW does."""
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group['params']}
    lost = [name for p, name in stepped(model).items() if p.requires_grad and p not in held]
    if lost:
        more = f' and {len(lost) - 1} more' * (len(lost) > 1)
        raise ValueError(f'no optimizer steps on {lost[0]}{more}, which wants a gradient: build the '
                         'optimizer after apply_mhlora, or freeze it')
    for name, layer in named_layers(model).items():
        if layer.factors == 'basis' and layer.trained.requires_grad and not any(
                layer.stepped in getattr(optimizer, 'layers', ()) for optimizer in optimizers):
            raise ValueError(f"no galore.LowRankAdamW holds '{name}', which has factors='basis': another "
                             'optimizer takes no bases, and nothing there would train')


@torch.no_grad()
def not_finite(model, optimizer=None):
    """What of a model, and of its optimizer's state, holds inf or nan on any rank, in words; None: nothing.
    Every rank takes part. Waits for the device."""
    found = dict([*model.named_parameters(), *model.named_buffers()])
    if optimizer:
        found |= {f'{key} of {name}': x for p, name in stepped(model).items()
                  for key, x in optimizer.state.get(p, {}).items()}
        found |= {f'the sketch of {name}': layer.sketch.grad for name, layer in named_layers(model).items()
                  if layer.sketch is not None}
    found = {name: x for name, x in found.items() if torch.is_tensor(x) and x.is_floating_point()}
    # of one rank a shard may be empty
    largest = torch.stack([torch.linalg.vector_norm(x, math.inf).to(torch.float64) if x.numel() else
                           x.new_zeros((), dtype=torch.float64) for x in map(local, found.values())])
    bad = mean((~largest.isfinite()).to(torch.float32)).tolist()
    return next((name for name, share in zip(found, bad) if share), None)


def count_parameters(model):
    """Numbers of parameters: total, trainable, frozen, and trainable ones by kind (heads, attn, mlp, logit,
    other); of heads that are split over ranks this rank's. Weights that GaLore moves count as trainable."""
    counts = dict(total=0, trainable=0, frozen=0, heads=0, **dict.fromkeys(KINDS, 0), other=0)
    heads, galore = heads_of(model), [layer for layer in lowrank_layers(model) if layer.zero]
    moved = {layer.weight for layer in galore if layer.trained.requires_grad}
    skip = {x for layer in galore for x in (layer.trained, layer.basis)}  # in shards a basis is a parameter
    for name, p in model.named_parameters():  # a tied weight comes once, under its first name
        if p not in skip:
            trainable = p.requires_grad or p in moved
            counts['total'] += p.numel()
            counts['trainable' if trainable else 'frozen'] += p.numel()
            if trainable:
                kind = next((kind for kind in KINDS if _wanted(name, kind)), 'other')
                counts['heads' if p in heads else kind] += p.numel()
    return counts


def freeze_rest(model, kinds=()):
    """Freezes all but `heads_of` a model and some kinds of layers: PEFT's LoRA of classifiers: ('logit',)."""
    heads = heads_of(model)
    for name, p in model.named_parameters():
        if p not in heads and not any(_wanted(name, kind) for kind in kinds):
            p.requires_grad_(False)


def freeze_as_set(model, settings, new=()):
    """Freezes what settings['train'] leaves out, and writes there what 'auto' stands for: 'all', but for
    heads on loaded weights 'factors', or 'classifier' where `new`, kinds of layers, did not come with the
    weights."""
    if settings['train'] == 'auto':
        adapts = settings['lowrank'] and settings['factors'] != 'basis' and settings['init_from'] != 'scratch'
        settings['train'] = ('classifier' if new else 'factors') if adapts else 'all'
    if settings['train'] != 'all':
        freeze_rest(model, new if settings['train'] == 'classifier' else ())
