"""
GaLore (Zhao et al. 2024, arXiv 2403.03507): Adam inside a low-rank subspace of a weight's gradient G (m, n).

    R = P^T G,   W <- W - lr * scale * P rho(R)        where m < n
    R = G Q,     W <- W - lr * scale * rho(R) Q^T      elsewhere

with orthonormal P (m, r) or Q (n, r) taken anew from gradients now and then; rho is Adam, whose moments
are those of R alone.

    LowRankAdamW(model)    for models with layers of lowrank.py; G never exists
    GaLoreAdamW(groups)    for ordinary weights: galore-torch's class, and rules that need G: Fira, APOLLO,
                           SCALE, Muon
"""

import math
import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

from lowrank import (BLOCK_OF_BITS, KINDS, coded_mean, coded_same, finish_sum, first_here, is_sharded,
                     local, lowrank_layers, mean, mean_at, named_layers, own_heads, place, round_, rows_here,
                     same, stepped, whole, whole_of, wide)

WINDOW = 5  # steps before a refresh in which its sketch is added up

# -----------------------------------------------------------------------------
# Bases: which subspace


def is_left(shape, proj_type):
    """Whether a matrix is projected from the left (P), or from the right (Q). 'std': on the side of
    the smaller dimension, where moments are smaller, of a square matrix the right one; 'reverse_std':
    the opposite."""
    tall = shape[0] >= shape[1]
    return {'std': not tall, 'reverse_std': tall, 'left': True, 'right': False}[proj_type]


def orthonormal(Y):
    """Orthonormal columns that span those of Y (m, r), by QR in at least float32. The triangle's diagonal is
    made positive, so that they are unique. LAPACK sees nothing that is not finite."""
    Y = torch.where(torch.isfinite(Y).all(), Y, 0)
    Q, R = torch.linalg.qr(Y.to(wide(Y)))
    return (Q * torch.where(R.diagonal() < 0, -1, 1)).to(Y.dtype)


def gaussian(rows, rank, like, seed):
    """A random matrix (rows, rank), standard normal, that depends on `seed` alone: all ranks agree."""
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.randn(rows, rank, generator=generator, dtype=torch.float32, device=like.device)
    return drawn.to(like.dtype)


def basis_of(G, rank, left, basis='svd', old=None, seed=0):
    """
    An orthonormal basis for the gradient G (m, n): P (m, rank) if `left`, else Q (n, rank).

    svd     the leading singular vectors (GaLore, algorithm 2), with the raw signs of the decomposition.
    power   two steps of subspace iteration from the old basis, or from a random sketch of the range
            (Halko et al. 2011, algorithm 4.4): two products of 2 m n rank operations and a thin QR each.
    random  an orthonormalised Gaussian, drawn anew each time; does not look at the gradient.
    Where G is not finite the old basis stays; without any, some orthonormal one comes back. Nothing
    here waits for the device, but CUDA's SVD does.
    """
    ok = torch.linalg.vector_norm(G, ord=math.inf).isfinite()  # no temporary
    if basis == 'svd':
        U, _, Vh = torch.linalg.svd(torch.where(ok, G, 0).to(wide(G)), full_matrices=False)
        new = U[:, :rank] if left else Vh[:rank].mT
    elif basis == 'power':
        G = G if left else G.mT
        new = orthonormal(G @ gaussian(G.shape[1], rank, G, seed)) if old is None else old
        for _ in range(2):  # one has 0.978 of the SVD's energy, from a basis 200 steps old
            # columns have length one in between: their squares stay in the range of float16
            new = orthonormal(G @ F.normalize(G.mT @ new, dim=0))
    else:
        rows, seed = (G.shape[0], seed) if left else (G.shape[1], seed + 1)
        new = orthonormal(gaussian(rows, rank, G, seed))
    if old is not None:
        new = torch.where(ok, new, old.to(new.dtype))
    return new.to(G.dtype).contiguous()


# -----------------------------------------------------------------------------
# Arithmetic inside the subspace


def project(G, basis, left):
    """R = P^T G (r, n), or G Q (m, r), of G (m, n). P^T G is the transposed view of G^T P: rows of r
    numbers, aligned where the n = 5461 of LLaMA-1B are not, take a third less time on a CPU."""
    return (G.mT @ basis).mT if left else G @ basis


def add_back_(W, U, basis, left, alpha, beta=1.0, key=0, first=0):
    """W <- beta W + alpha P U, or beta W + alpha U Q^T, the product accumulated straight into W. In
    bfloat16 it exists for some rows at a time, and the sum is rounded at random (`lowrank.round_`: key,
    first)."""
    X, Y = (basis, U) if left else (U, basis.mT)
    if W.dtype == torch.bfloat16:
        rows = max(BLOCK_OF_BITS // W.shape[1], 1)
        for i in range(0, len(W), rows):
            part = W[i:i + rows]
            round_(part, (X[i:i + rows] @ Y).float().mul_(alpha).add_(part, alpha=beta), key,
                   first + i * W.shape[1])
    elif W.device.type == 'cpu' and W.dtype.itemsize >= 4 and W.stride(0) * W.element_size() % 64:
        # MKL adds to rows that are not aligned slowly: columns by way of a buffer are 1.3 times faster
        for w, y in zip(W.split(1024, 1), Y.split(1024, 1)):
            w.mul_(beta).add_(X @ y, alpha=alpha)
    else:
        W.addmm_(X, Y, beta=beta, alpha=alpha)


def fused_adam_(params, grads, M, V, age, lr, betas, eps, decay):
    """torch's fused AdamW kernel on lists of tensors of one dtype; `age` counts these gradients too."""
    before = torch.full((len(params),), age - 1, dtype=torch.float32, device=params[0].device)
    adamw(params, grads, M, V, [], list(before.unbind()), fused=True, amsgrad=False, maximize=False,
          beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=decay, eps=eps)


def turn_moments(moments, C, left):
    """Moments M, V, or M alone, in the old basis as seen from the new one, C = new^T old (r, r): C M and
    (C * C) V, exact if coordinates are uncorrelated. They are (r, n), or (m, r) if not `left`, or stacked."""
    return [turn @ x if left else x @ turn.mT for x, turn in zip(moments, (C, C.square()))]


# -----------------------------------------------------------------------------
# Moments: in any dtype, or in 8 bits

# Blocks of 256 numbers share a float32, their largest magnitude `top` (Dettmers et al., 8-bit optimizers,
# arXiv 2110.02861). Up to it, level l stands for top (l / levels)^power: fine steps where numbers are small.
BLOCK = 256
EIGHT_BITS = {'exp_avg': (127, 2, torch.int8),  # levels, power, dtype; this one has a sign
              'exp_avg_sq': (255, 4, torch.uint8)}  # of this one the root counts, over many magnitudes
EVERY = slice(0, 2**62)  # numbers
CHUNK, CHUNK_OF_A_CPU = 2**22, 2**18  # numbers that are float32 at a time; a CPU has a cache to stay in


def by_block(x):
    """Numbers (numbers,), with zeros after them, (blocks, BLOCK)."""
    return (F.pad(x, (0, -len(x) % BLOCK)) if len(x) % BLOCK else x).view(-1, BLOCK)


def encode(x, age, levels, power, dtype):
    """Codes (numbers,) of `dtype` and tops (blocks,) of x (numbers,), float32. Off by less than one level,
    top ((l + 1)^power - l^power) / levels^power, and right on average: x goes up or down by a threshold that
    runs through (0, 1) with `age`. To the nearest level a second moment would not decay, by 0.1% a step. Its
    codes are at least 1: the update divides by the root."""
    blocks = by_block(x)
    size = blocks.abs()
    top = size.amax(1, keepdim=True)  # (blocks, 1)
    size.div_(top.clamp_min(torch.finfo(x.dtype).tiny)).mul_(levels**power)  # that of level l is l^power
    shift = age * 0.7548776662 % 1.0  # not random
    threshold = (torch.arange(BLOCK, device=x.device) * 0.6180339887 + shift) % 1.0
    low = (size.sqrt() if power == 2 else size.sqrt().sqrt_()).floor_().clamp_(max=levels - 1)
    if power == 2:  # what lies between l^power and (l + 1)^power, times the threshold: 2 l + 1,
        root, part = low, torch.addcmul(threshold, low, 2 * threshold)
    else:  # or (2 l + 1) (2 l^2 + 2 l + 1)
        root, part = low.square(), (2 * low).add_(1)
        part.mul_(torch.add(part, root, alpha=2)).mul_(threshold)
    code = low.add_(size.addcmul_(root, root, value=-1).gt_(part))
    code = code.copysign_(blocks) if dtype == torch.int8 else code.clamp_(min=1)
    return code.to(dtype).flatten()[:len(x)], top.flatten()


def decode(code, top, levels, power):
    """The numbers (numbers,), float32, that `encode` made into code (numbers,) and top (blocks,)."""
    part = by_block(code.float().div_(levels))
    part = part.mul_(part.abs()) if power == 2 else part.square_().square_()
    return part.mul_(top[:, None]).flatten()[:len(code)]


def new_moments(state, like, bits, whole=None, keys=tuple(EIGHT_BITS)):
    """Moments of zero for numbers like `like`, a shard of `whole`, or all of it. bits: None (its dtype), 32,
    16, or 8 (of a whole below 16 blocks 32). keys: both moments, or the first alone."""
    for key in keys:
        dtype = EIGHT_BITS[key][2]
        if bits == 8 and (like if whole is None else whole).numel() >= 16 * BLOCK:
            state[key] = torch.zeros(like.shape, dtype=dtype, device=like.device)
            state[key + '_top'] = torch.zeros(-(-like.numel() // BLOCK), device=like.device)
        else:
            kind = {None: like.dtype, 16: torch.bfloat16}.get(bits, wide(like))
            fused = kind == like.dtype != torch.bfloat16  # see `step_`; the layout has to be the same
            state[key] = torch.zeros_like(like) if fused else like.new_zeros(like.shape, dtype=kind)


def read_moments(state, numbers=EVERY):
    """First and second moment, if there is one, flat, in float32 or wider, or a chunk of them that starts
    with a block."""
    keys = [key for key in EIGHT_BITS if key in state]
    if 'exp_avg_top' not in state:
        return [state[key].view(-1)[numbers].to(wide(state[key])) for key in keys]
    blocks = slice(numbers.start // BLOCK, -(-numbers.stop // BLOCK))
    return [decode(state[key].view(-1)[numbers], state[key + '_top'][blocks], *EIGHT_BITS[key][:2])
            for key in keys]


def write_moments(state, moments, key, numbers=EVERY, first=0):
    """Writes what `read_moments` reads; bfloat16 is rounded at random (`lowrank.round_`: key, first)."""
    blocks = slice(numbers.start // BLOCK, -(-numbers.stop // BLOCK))
    for x, (name, kind) in zip(moments, EIGHT_BITS.items()):
        x = x.flatten()
        if 'exp_avg_top' in state:
            state[name].view(-1)[numbers], state[name + '_top'][blocks] = encode(x, state['step'], *kind)
        else:
            round_(state[name].view(-1)[numbers], x, hash((key, name == 'exp_avg')), first + numbers.start)


def is_fused(p, state):
    """Whether torch's kernel can step on p and the moments themselves."""
    return 'exp_avg_top' not in state and state['exp_avg'].dtype == p.dtype != torch.bfloat16


def step_(p, grad, state, lr, keep, betas, eps, key=0, first=0):
    """
    p <- keep p - lr rho, in place; the moments of `state`, whose `step` counts grad already, take it in.

        rho = sqrt(1 - beta2^age) / (1 - beta1^age) * M / (sqrt(V) + eps)

    has eps before the bias correction, as in galore-torch (after it in torch's kernel, which computes this).
    p may be grad itself: with lr=1, keep=0 minus rho replaces it. Returns p, or that in another layout. One
    pass over memory; where p or moments are in 16 or 8 bits, all is computed in float32, chunk by chunk, and
    rounded at random (`lowrank.round_`, key).
    """
    age = state['step']
    eps = eps / math.sqrt(1 - betas[1] ** age)
    decay = (1 - keep) / lr if lr else 0.0
    M, V = state['exp_avg'], state['exp_avg_sq']
    if p is not grad and 'exp_avg_top' not in state and p.stride() != M.stride():
        state['exp_avg'], state['exp_avg_sq'] = M.contiguous(), V.contiguous()
    elif is_fused(p, state):
        if grad.stride() != M.stride():  # the kernel reads raw memory
            own, grad = p is grad, torch.empty_like(M).copy_(grad)
            p = grad if own else p
        fused_adam_([p], [grad], [M], [V], age, lr, betas, eps, decay)
        return p
    flat, flat_grad = p.reshape(-1), grad.reshape(-1)  # views, where they can be
    chunk = CHUNK_OF_A_CPU if p.device.type == 'cpu' else CHUNK
    for i in range(0, len(flat), chunk):
        where = slice(i, min(i + chunk, len(flat)))
        moments = read_moments(state, where)
        dtype = torch.promote_types(p.dtype, moments[0].dtype)
        part, g, *moments = (x.to(dtype) for x in (flat[where], flat_grad[where], *moments))
        fused_adam_([part], [g], *([x] for x in moments), age, lr, betas, eps, decay)
        round_(flat[where], part, key, first + i)
        write_moments(state, moments, key, where, first)
    return p if p.is_contiguous() else p.copy_(flat.view(p.shape))


# -----------------------------------------------------------------------------
# Rules that need the whole gradient


def adaptive_rate(R, U, state, group, dim):
    """(|N| / |R| over `dim`, the bias correction c) of N = M / (sqrt(V) + eps), Adam's step -U without c."""
    beta1, beta2 = group['betas']
    c = math.sqrt(1 - beta2 ** state['step']) / (1 - beta1 ** state['step'])
    r, u = (torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x)) for x in (R, U))
    return u / c / (r + 1e-8), c


def limited(phi, norm, state):
    """phi, lowered so that `norm`, of phi times what it scales, grows by a factor of at most 1.01 a step. A
    norm of zero is passed over: from 0 the authors' code takes 2,000 steps to grow."""
    if 'rest_norm' in state:
        old = state['rest_norm']
        limiter = torch.where(old > 0, (norm / (old + 1e-8)).clamp_min(1.01) / 1.01, 1)
        phi, norm = phi / limiter, torch.where(norm > 0, norm / limiter, old)
    state['rest_norm'] = norm
    return phi


def fira(G, R, U, state, group):
    """
    Fira (Chen et al. 2024, arXiv 2410.01623, and its authors' code): what the projection drops takes part
    too. With N = M / (sqrt(V) + eps) and the group's scale alpha, W moves along

        alpha P N + phi (G - alpha P R),   phi = |N_col| / |R_col|,

    times lr and the bias correction; the norm of the second term may grow by a factor of 1.01 a step. For a
    basis on the right it is rows. G (m, n); R and U, minus the corrected N: (r, n) or (m, r). Returns minus
    the move (m, n). By Pythagoras |(G - alpha P R)_col|^2 = |G_col|^2 - (2 alpha - alpha^2) |R_col|^2.
    """
    left, alpha = 'P' in state, group['scale']
    dim = 0 if left else 1
    phi, c = adaptive_rate(R, U, state, group, dim)  # (1, n) or (m, 1)
    g, r = (torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(G)) for x in (G, R))
    rest = (g.square() - (2 * alpha - alpha**2) * r.square()).clamp_min(0)
    phi = (limited(phi, (rest * phi.square()).sum().sqrt(), state) * c).to(G.dtype)
    inside = torch.addcmul(U, R, phi)  # -(alpha P N + phi (G - alpha P R)) = alpha P (U + phi R) - phi G
    factors = (state['P'], inside) if left else (inside, state['Q'].mT)
    return torch.addmm(G * phi, *factors, beta=-1, alpha=alpha)


def apollo(G, R, U, state, group):
    """
    APOLLO (Zhu et al. 2024, arXiv 2412.05270, and its authors' code): R, of a random projection, only says
    by how much Adam would scale G. W moves along scale phi G, phi = |N_col| / |R_col|, limited as in `fira`;
    with rank 1 one phi is that of all of W (APOLLO-Mini). Their scale is the square of this one. Returns
    minus the move.
    """
    dim = None if group['rank'] == 1 else 0 if is_left(G.shape, group['proj_type']) else 1
    phi, c = adaptive_rate(R, U, state, group, dim)
    norms = torch.linalg.vector_norm(G, dim=dim, keepdim=True, dtype=wide(G))
    phi = limited(phi, torch.linalg.vector_norm(norms * phi), state)
    return G * (phi * (-c * group['scale'])).to(G.dtype)


def average_of(G, state, group):
    """The average of gradients that a rule keeps, zero at first, like what is here of G, in float32 or
    wider."""
    here = local(G)
    if 'exp_avg' not in state:  # flat views are taken of it
        new_moments(state, here.contiguous(), group['state_bits'], G, keys=('exp_avg',))
    return read_moments(state)[0].view(here.shape).to(wide(here))


def column_normalised(G, state, group, key):
    """
    SCALE (Glentis et al. 2025, arXiv 2506.16659): the gradient, each output's numbers with a mean square of
    1; of an embedding (the group's `dim` is 0) each coordinate's. Without state, but for the output layer,
    where the group's `momentum` averages gradients first. Returns minus the move.
    """
    if group['momentum']:
        G = average_of(G, state, group).lerp_(G.to(wide(G)), 1 - group['momentum'])
        write_moments(state, [G], key)
    size = torch.linalg.vector_norm(G, dim=group['dim'], keepdim=True, dtype=wide(G))
    return G / -(size / math.sqrt(G.shape[group['dim']])).clamp_min(1e-8).to(G.dtype)


def orthogonalised(G, state, group, key):
    """
    Muon (Jordan et al. 2024) with the rate of Moonlight (Liu et al. 2025, arXiv 2502.16982), by torch: the
    averaged gradient with all singular values near 1, times 0.2 sqrt(max(m, n)), so that AdamW's learning
    rates go. The group's momentum, not its betas, averages; without one no state is kept (as in SWAN, Ma et
    al. 2025, arXiv 2412.13148, which scales rows first). G (m, n), or (heads, m, n), each on its own. Returns
    minus the move; of a sharded G the move of all its rows.
    """
    momentum, grad = group['momentum'], local(G).to(wide(G))
    if momentum:
        M = average_of(G, state, group).lerp_(grad, 1 - momentum)
        write_moments(state, [M], key, first=first_here(G))
        grad = grad.lerp(M, momentum)  # Nesterov's
    else:  # a run may have had one before it was resumed
        for name in ('exp_avg', 'exp_avg_top'):
            state.pop(name, None)
    if is_sharded(G):  # torch's iterations are in bfloat16, too
        grad = whole_of(grad.bfloat16(), len(G)).to(grad.dtype)
    move = torch.zeros_like(grad)
    moves = [nn.Parameter(x) for x in move.view(-1, *G.shape[-2:])]
    optimizer = torch.optim.Muon(moves, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False,
                                 adjust_lr_fn='match_rms_adamw')
    for p, grad in zip(moves, grad.view(-1, *G.shape[-2:])):
        p.grad = optimizer.state[p]['momentum_buffer'] = grad
    optimizer.step()
    return move


# (G, R, U, state, group) -> minus the move; None: R is enough
RULES = {'galore': None, 'fira': fira, 'apollo': apollo}  # of groups with a rank
# (G, state, group, key) -> minus the move; state: of this G, see `average_of`; key: of rounding
WHOLE = {'scale': column_normalised, 'muon': orthogonalised}  # of groups without a rank
INSIDE = {'galore': None, 'muon': orthogonalised}  # of layers, G is R (heads, r, n) or (heads, m, r); None: Adam


# -----------------------------------------------------------------------------
# The drop-in optimizer


class GaLoreAdamW(torch.optim.Optimizer):
    """
    AdamW, inside the gradient's leading subspace for the groups that have a `rank`.

    Drop-in for the class of that name in galore-torch 1.0, with its arithmetic: eps before the bias
    correction, decay after the update, moments kept over a refresh. Keys of such a group, as there: `rank`,
    `update_proj_gap` (steps between refreshes), `scale` (multiplies lr), `proj_type` (see `is_left`); our
    own, all optional: `basis` (see `basis_of`), `rule` (a key of RULES). Groups without `rank` follow
    torch.optim.AdamW, or a `rule` of WHOLE, with `momentum`; 0 keeps no moment. Any group: `state_bits` (see
    `new_moments`).

    per_layer: the backward pass updates a parameter as soon as its gradient is complete, averaged over ranks
    (but for those in `own`, which differ by rank), and frees the gradient. The parameters stay out of DDP
    (`outside_ddp`), and `begin` says which backward pass of a step is the last. No other optimizer of this
    class takes them after that.
    seed: of random bases and of rounding. no_deprecation_warning is accepted and means nothing.
    Raises ValueError for a setting that makes no sense or is not supported (correct_bias=False,
    proj_type='full'); a rank above the smaller side of a matrix is clamped, with a warning.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
                 no_deprecation_warning=False, seed=0, per_layer=False, own=()):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f'{lr=}, {eps=} and {weight_decay=} must be at least 0, {betas=} in [0, 1)')
        self.seed, self.per_layer, self.last, self.own = seed, per_layer, True, set(own)
        self.order, self.group_of = {}, {}  # the place of a parameter among all, and that of its group
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias))

    @property
    def outside_ddp(self):
        """The parameters whose gradients are averaged over ranks here and not by DDP."""
        return set(self.order) if self.per_layer else set()

    def add_param_group(self, group):
        super().add_param_group(group)
        group = self.param_groups[-1]
        names = group.get('param_names') or [f'parameter {i}' for i in range(len(group['params']))]
        self._check_group(group, names)
        for name, p in zip(names, group['params']):
            self.order[p], self.group_of[p] = len(self.order), len(self.param_groups) - 1
            hooks = p._post_accumulate_grad_hooks or {}  # it has no public name
            if any(isinstance(getattr(hook, '__self__', None), GaLoreAdamW) for hook in hooks.values()):
                raise ValueError(f'{name} is stepped in the backward pass by an earlier optimizer '
                                 '(per_layer=True), which would go on: build the model anew')
            if self.per_layer:
                p.register_post_accumulate_grad_hook(self._complete)

    def _check_group(self, group, names):
        """Fills in what a group leaves out. ValueError: a setting makes no sense."""
        if not group['correct_bias']:
            raise ValueError('correct_bias=False is not supported: leave it out, or take '
                             "galore-torch's class")
        if group.setdefault('state_bits', None) not in (None, 32, 16, 8):
            raise ValueError(f"state_bits={group['state_bits']!r} is not one of None, 32, 16, 8")
        if group['state_bits'] == 8 and not self.own.isdisjoint(group['params']):
            raise ValueError('blocks of 8 bits cannot be saved head by head: set state_bits=None, 32 '
                             'or 16')
        if not 0 <= group.get('momentum', 0) < 1:
            raise ValueError(f"momentum={group['momentum']!r} must be in [0, 1)")
        for name, p in zip(names, group['params']):
            if p.dim() != 2 and {'rank', 'rule'} & group.keys():
                raise ValueError(f'{name} of shape {tuple(p.shape)} is no matrix: put it into a group '
                                 'without rank and rule')
        if 'rank' not in group:
            if 'rule' in group:
                group.setdefault('dim', 1)
                group.setdefault('momentum', 0.95 if group['rule'] == 'muon' else 0.0)
                if group['rule'] not in WHOLE:
                    raise ValueError(f"rule={group['rule']!r} without a rank is not one of "
                                     f"{', '.join(map(repr, WHOLE))}")
            return
        galore_torch = dict(update_proj_gap=200, scale=0.25, proj_type='std')
        own = dict(basis='random' if group.get('rule') == 'apollo' else 'svd', rule='galore')
        for key, value in (galore_torch | own).items():
            group.setdefault(key, value)
        if group['rule'] == 'apollo' and group['basis'] != 'random':
            raise ValueError(f"basis={group['basis']!r}, but rule='apollo' draws its bases: set "
                             "basis='random'")
        if group['proj_type'] == 'full':
            raise ValueError("proj_type='full' projects both sides, which is not supported: set 'std', "
                             "or take galore-torch's class")
        for key, allowed in dict(proj_type=('std', 'reverse_std', 'left', 'right'),
                                 basis=('svd', 'power', 'random'), rule=tuple(RULES)).items():
            if group[key] not in allowed:
                raise ValueError(f"{key}={group[key]!r} is not known here: set one of "
                                 f"{', '.join(map(repr, allowed))}")
        for key in ('rank', 'update_proj_gap'):
            if not (isinstance(group[key], int) and group[key] >= 1):
                raise ValueError(f'{key}={group[key]!r} must be an integer of at least 1')
        clamped = [f'{name} {tuple(p.shape)}' for name, p in zip(names, group['params'])
                   if group['rank'] > min(p.shape)]
        if clamped:
            more = f' and {len(clamped) - 1} more' * (len(clamped) > 1)
            warnings.warn(f"galore: rank {group['rank']} is clamped to the smaller side of {clamped[0]}"
                          f'{more}')

    def begin(self, step, micro_step=0, micro_steps=1):
        """To be called before each forward pass of a step: which backward pass follows. Counted from 0."""
        self.last = micro_step == micro_steps - 1

    def _seed(self, p, *counts):
        return hash((self.seed, self.order[p], *counts)) % 2**32  # torch uses 32 bits of a seed

    @torch.no_grad()
    def _complete(self, p):
        """per_layer: one parameter's update, when the last micro-batch has brought its gradient."""
        if self.last and p.grad is not None:  # the hook runs without one too
            if p not in self.own:
                mean(p.grad)
            self._update([p], self.param_groups[self.group_of[p]])
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, or None. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params, group):
        """One step on parameters of a group."""
        if not {'rank', 'rule'} & group.keys():
            return self._plain(params, group)
        for p in params:
            (self._galore if 'rank' in group else self._whole)(p, self.state[p], group)

    def _plain(self, params, group):
        """torch.optim.AdamW: eps after the bias correction, decay before the update."""
        lr, betas, eps, decay = (group[key] for key in ('lr', 'betas', 'eps', 'weight_decay'))
        fused = {}  # dtype and age: fused kernels take lists of one dtype
        for given in params:
            state, p, grad = self.state[given], local(given), local(given.grad)
            if 'step' not in state:
                new_moments(state, p, group['state_bits'], given)
                state['step'] = 0
            state['step'] += 1
            if is_fused(p, state) and grad.stride() == p.stride() == state['exp_avg'].stride():
                tensors = p, grad, state['exp_avg'], state['exp_avg_sq']
                fused.setdefault((p.dtype, state['step']), []).append(tensors)
            else:
                root = math.sqrt(1 - betas[1] ** state['step'])
                step_(p, grad, state, lr, 1 - lr * decay, betas, eps * root,
                      self._seed(given, state['step'], 0), first_here(given))
        for (_, age), tensors in fused.items():
            fused_adam_(*map(list, zip(*tensors)), age, lr, betas, eps, decay)

    def _basis(self, W, state, group, left):
        """The basis of a step, P or Q, a new one where it is due."""
        rank, (period, since) = min(group['rank'], *W.shape), divmod(state['step'], group['update_proj_gap'])
        if group['rule'] == 'apollo':  # drawn again in each step: it takes no memory
            drawn = gaussian(W.shape[0 if left else 1], rank, W, self._seed(W, period))
            return drawn.div_(math.sqrt(rank))
        name = 'P' if left else 'Q'
        if since == 0:
            state[name] = basis_of(W.grad, rank, left, group['basis'], state.get(name),
                                   self._seed(W, state['step']))
        return state[name]

    def _galore(self, W, state, group):
        """W <- (1 - lr decay) (W - lr scale P rho(P^T G)), or as the group's rule says, in place."""
        state.setdefault('step', 0)
        G, rule, left = W.grad, RULES[group['rule']], is_left(W.shape, group['proj_type'])
        basis = self._basis(W, state, group, left)
        R = project(G, basis, left)
        if 'exp_avg' not in state:
            new_moments(state, R, group['state_bits'])
        state['step'] += 1
        keep = 1.0 - group['lr'] * group['weight_decay']
        U = R.clone() if rule else R
        key = self._seed(W, state['step'], 0)
        U = step_(U, U, state, 1.0, 0.0, group['betas'], group['eps'], key)
        if rule:
            self._move(W, rule(G, R, U, state, group), group['lr'] * keep, keep, key + 1)
        else:
            add_back_(W, U, basis, left, group['lr'] * group['scale'] * keep, keep, key + 1)

    def _whole(self, W, state, group):
        """W <- (1 - lr decay) W - lr times what a rule of WHOLE makes of the gradient, in place."""
        state['step'] = state.get('step', 0) + 1
        key = self._seed(W, state['step'], 0)
        move = WHOLE[group['rule']](W.grad, state, group, key)[rows_here(W)]
        self._move(W, move, group['lr'], 1.0 - group['lr'] * group['weight_decay'], key + 1)

    def _move(self, W, move, alpha, keep, key):
        """W <- keep W + alpha move, of the rows (m, n) that are here; the move is used up."""
        here = local(W)
        round_(here, move.to(wide(W)).mul_(alpha).add_(here, alpha=keep), key, first_here(W))

    def state_bytes(self):
        """Bytes of all tensors in the state, bases included."""
        return sum(x.nbytes for state in self.state.values() for x in state.values() if torch.is_tensor(x))

    @staticmethod
    def decoded(state, key):
        """An entry of a state, moments of 8 bits in float32: shards have blocks of their own."""
        if f'{key}_top' not in state:
            return state[key]
        codes, tops = state[key], state[f'{key}_top']
        return decode(codes.flatten(), tops, *EIGHT_BITS[key][:2]).view(codes.shape)

    def encode_(self, p):
        """Moments of a parameter that `decoded` gave, in 8 bits again where its group has them."""
        state = self.state[p]
        coded = self.param_groups[self.group_of[p]]['state_bits'] == 8
        plain = 'exp_avg' in state and 'exp_avg_top' not in state
        if not coded or not plain or state['exp_avg'].shape != local(p).shape:  # of R: the drop-in's
            return
        moments = {key: state.pop(key).flatten() for key in EIGHT_BITS if key in state}
        new_moments(state, local(p), 8, p, tuple(moments))
        for i in range(0, local(p).numel(), CHUNK):
            where = slice(i, i + CHUNK)
            write_moments(state, [x[where] for x in moments.values()], 0, where)

    def load_state_dict(self, state_dict):
        """As in torch, but state keeps the dtype that it has."""
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict['param_groups'] for i in group['params'])
        for i, p in zip(ids, (p for group in self.param_groups for p in group['params'])):
            self.state[p].update({key: x.to(p.device) for key, x in state_dict['state'].get(i, {}).items()
                                  if torch.is_tensor(x)})


# -----------------------------------------------------------------------------
# The optimizer of models with low-rank layers


def refresh_in(step, every, merge_every, turn, turns):
    """Steps from this one (from 0) to the next in which the layers of a turn, of so many, take new bases:
    after a merge, at turn / turns of a period of `every` steps, so that no step is slow or large."""
    return (turn * (every // merge_every) // turns * merge_every - step) % every


class LowRankAdamW(GaLoreAdamW):
    """
    AdamW for all that a model trains, and GaLore for its layers with factors='basis' (lowrank.MHLoRALinear).

    The leaf of such a layer brings the projected gradient R. Merged every step, Adam's step on it goes
    straight into W; merged every T steps (GaLoLTE), into the factor, and where sync_moments is set first
    moments are averaged over heads and ranks after a merge, so that heads drift apart less. With rule='muon'
    the step is Muon's (`orthogonalised`, with `momentum`); it is that of the whole matrix P R. Groups are
    those of `param_groups`; scale multiplies lr inside a basis, where eps is 1e-6, as in galore-torch;
    state_bits, per_layer: see GaLoreAdamW.
    sync_bits: where it is below 32, what is averaged of split heads is sent in few bits. momentum: of Muon
    alone, 0 keeps no moment. A basis is taken anew every basis_every steps, the blocks of a model in turns,
    and the moments turn with it:

    basis='sketch'  one step of subspace iteration on the second moment of the gradients of single sequences
                    (`lowrank.second_moment`), summed over the last WINDOW steps.
    basis='random'  drawn anew, as the first bases of 'sketch' are.

    The loop calls `begin` before each forward pass, and for T > 1 lowrank.merge every T steps: a new basis
    would turn what is not merged.
    Sketches are in no state dict of torch, but lowrank.gather_state and load_state resume within one.
    """

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=0.25,
                 basis='sketch', basis_every=200, rule='galore', state_bits=None, seed=0, per_layer=False,
                 sync_bits=32, sync_moments=True, momentum=0.95):
        if rule not in INSIDE:
            raise ValueError(f"{rule=} is not one of {', '.join(map(repr, INSIDE))}")
        if not basis_every >= 1:
            raise ValueError(f'{basis_every=} must be at least 1')
        found = {name: layer for name, layer in named_layers(model).items()
                 if layer.factors == 'basis' and layer.trained.requires_grad}
        block_of = {name: (re.match(r'(.*?\.\d+)\.', name) or [name, name])[1] for name in found}
        blocks = list(dict.fromkeys(block_of.values()))
        if basis not in ('sketch', 'random'):
            raise ValueError(f"{basis=} wants the gradient of W, which layers with factors='basis' never "
                             "form: set basis='sketch' or 'random', or train without such layers by "
                             "GaLoreAdamW (optimizer='galore')")
        self.layers, self.turns = {}, {}  # of a trained factor: its layer, its block's place among how many
        for name, layer in found.items():
            if basis_every % layer.merge_every:
                raise ValueError(f'{basis_every=} is no multiple of merge_every={layer.merge_every}: bases '
                                 'are taken at merges, set one')
            self.layers[layer.stepped] = layer
            self.turns[layer.stepped] = blocks.index(block_of[name]), len(blocks)
        self.basis, self.basis_every = basis, basis_every
        self.sync_bits, self.sync_moments, self.begun = sync_bits, sync_moments, False
        names = stepped(model)
        groups = param_groups(model, weight_decay, state_bits=state_bits,
                              leave={layer.trained for layer in self.layers.values()})
        if found:  # eps before the correction is larger than torch's 1e-8, as in galore-torch
            groups.append({'params': [*self.layers], 'param_names': [names[p] for p in self.layers],
                           'weight_decay': weight_decay, 'eps': 1e-6, 'scale': scale, 'inside': rule,
                           'state_bits': state_bits, 'momentum': momentum})
        super().__init__(groups, lr, betas, eps, weight_decay, seed=seed, per_layer=per_layer,
                         own=own_heads(model))

    @torch.no_grad()
    def begin(self, step, micro_step=0, micro_steps=1):
        """See GaLoreAdamW. Takes due bases from sketches, and starts sketches."""
        super().begin(step, micro_step, micro_steps)
        if micro_step:
            return
        finish_sum(drop=True)
        for p, layer in self.layers.items():
            state = self.state[p]
            if not state:
                state.update(step=0, bases=0)
            if not self.begun and state['bases'] and not local(layer.basis).any():
                raise ValueError("the optimizer's state was loaded, and not the bases that it is of: load "
                                 "the model's state_dict, not the merged one, or leave that of the optimizer")
            T = layer.merge_every
            left = refresh_in(step, self.basis_every, T, *self.turns[p])
            if self.sync_moments and T > 1 and step % T == 0 and 'exp_avg' in state:
                M = read_moments(state)[0].view(local(p).shape)
                rows = layer.by_direction(M)
                rows.copy_(self._mean_of_moments(layer, rows))
                write_moments(state, [M], self._seed(p, state['step'], 1))
            if not state['bases'] or self.basis == 'random' and left == 0:
                self._set_basis(p, orthonormal(
                    gaussian(*layer.basis.shape, layer.basis, self._seed(p, state['bases']))))
            elif left == 0 and layer.sketch is not None and layer.sketch.grad is not None:
                Y = layer.sketch.grad
                Y = mean_at(self._owner(p), Y.mT, layer.workers).mT if self._coded(layer) else mean(Y.mean(0))
                ok = Y.isfinite().all() & Y.any()
                self._set_basis(p, torch.where(ok, orthonormal(Y).to(layer.basis.dtype), whole(layer.basis)))
            inside = self.basis == 'sketch' and (left or self.basis_every) <= WINDOW
            if left == 0 or not inside:  # a resumed run may have another basis, or other windows
                layer.sketch = None
            if inside and layer.sketch is None:
                layer.ask_sketch(parts=self.parts(layer))
        self.begun = True

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.begun = False

    def _coded(self, layer):
        """Whether averages of a layer are sent in few bits."""
        return layer.split and self.sync_bits < 32

    def _owner(self, p):
        """The rank that takes the bases of a layer, where few bits are sent."""
        return self.order[p] % self.layers[p].workers

    def parts(self, layer):
        """Into how many parts the sketch of a layer is cut: what is rounded is that of single heads, to be
        the same on any number of ranks."""
        return len(layer.trained) if self._coded(layer) else 1

    def _mean_of_moments(self, layer, x):
        """The average of first moments x (heads, ...) over heads and ranks, in 3 bits or more."""
        if self._coded(layer):
            return coded_mean(x, max(self.sync_bits, 3), layer.workers)
        return mean(x.mean(0), layer.workers)

    def _set_basis(self, p, new):
        """The one refresh: a new basis (m, r) or (n, r) for a layer, and its moments as seen from there."""
        layer, state = self.layers[p], self.state[p]
        # one rank's, as devices may round differently and merges never send a basis
        new = coded_same(self._owner(p), new.mT, 8).mT if self._coded(layer) else same(new.contiguous())
        if {'exp_avg', 'error'} & state.keys():
            C = new.to(wide(new)).mT @ whole(layer.basis).to(wide(new))
        if 'exp_avg' in state:
            moments = [x.view(local(p).shape) for x in read_moments(state)]
            turned = turn_moments(moments, C.to(moments[0].dtype), layer.left and layer.mine is None)
            write_moments(state, turned, self._seed(p, state['step'], 2))
        if 'error' in state:  # of merges: it turns as the first moments do
            E = layer.by_direction(state['error'])
            E.copy_(C.to(E.dtype) @ E)
        local(layer.basis).copy_(new[rows_here(layer.basis)])
        state['bases'] += 1

    def _update(self, params, group):
        if 'inside' not in group:
            return super()._update(params, group)
        keep = 1.0 - group['lr'] * group['weight_decay']
        for p in params:
            layer, state = self.layers[p], self.state[p]
            W, first = local(layer.weight), first_here(layer.weight)
            if not state.get('bases'):
                raise ValueError('a layer has no basis yet: call optimizer.begin(step) before the forward '
                                 'pass; where it was called, the first gradient is not finite')
            rule = INSIDE[group['inside']]
            if 'exp_avg' not in state and not rule:
                new_moments(state, local(p), group['state_bits'], p)
            state['step'] += 1
            alpha, key = group['lr'] * group['scale'] * keep, self._seed(p, state['step'], 0)
            how = group['betas'], group['eps'], key
            U = None
            if rule:
                U = rule(p.grad, state, group, key)
            elif layer.zero:
                U = step_(local(p.grad), local(p.grad), state, 1.0, 0.0, *how, first_here(p))
            if layer.zero:
                basis = local(layer.basis) if layer.left else whole(layer.basis)
                U = U.to(p.dtype)
                if layer.mine is None:
                    U = U[0]
                elif layer.left:  # W and P have rows of the same ranks
                    U = (U if rule else whole_of(U, len(p))).mT.contiguous()
                elif rule:
                    U = U[rows_here(p)]
                add_back_(W, U, basis, layer.left, alpha, keep, key + 1, first)
            else:
                if keep != 1 and W.dtype == torch.bfloat16:
                    round_(W, W.float().mul_(keep), key + 1, first)
                elif keep != 1:
                    W.mul_(keep)
                if U is None:
                    step_(local(p), local(p.grad), state, alpha, keep, *how, first_here(p))
                else:
                    self._move(p, U[rows_here(p)], alpha, keep, key + 2)

    def state_bytes(self):
        """Bytes of all tensors in the state, bases and sketches included."""
        more = [x for layer in self.layers.values() for x in (layer.basis, layer.sketch) if x is not None]
        return super().state_bytes() + sum(local(x).nbytes for x in more)


# -----------------------------------------------------------------------------
# From a model and settings


def param_groups(model, weight_decay=0.0, rank=0, gap=200, scale=0.25, basis='svd', rule='galore',
                 proj_type='std', state_bits=None, momentum=0.95, leave=()):
    """
    The trainable parameters of a model as groups for GaLoreAdamW, or, with rank 0, for torch.optim.AdamW.

    With a rank, or rule='muon', the matrices of attention and MLP (weights of nn.Linear below a module of
    lowrank.KINDS) follow the rule, with rule='scale' those of the output and of embeddings, too; it says how
    many of how many. Others are plain; matrices get weight_decay, vectors and what the model's own
    no_weight_decay() names (timm) none. `param_names` goes along. leave: parameters to leave out.
    ValueError: an unknown rule; no matrix for it; factors that are always zero, on which only LowRankAdamW steps.
    """
    if rule not in RULES | WHOLE:
        raise ValueError(f"{rule=} is not one of {', '.join(map(repr, RULES | WHOLE))}")
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output = {p for name, p in linear.items() if not {*KINDS['logit']}.isdisjoint(name.split('.'))}
    linear, tables = ({*linear.values()},
                      {module.weight for module in model.modules() if isinstance(module, nn.Embedding)})
    zeros = {layer.trained for layer in lowrank_layers(model) if layer.zero and layer.trained.requires_grad}
    if not zeros <= {*leave}:
        raise ValueError("layers with factors='basis' that are merged every step are no ordinary parameters: "
                         'use galore.LowRankAdamW(model)')
    ruled, outputs, embeddings, matrices, vectors = [], [], [], [], []
    spared = getattr(model, 'no_weight_decay', set)()  # of a ViT: the embedding of places, the class token
    for name, p in model.named_parameters():  # lists tied parameters once
        if not p.requires_grad or p in leave:
            continue
        inside = p in linear and not {*KINDS['attn'], *KINDS['mlp']}.isdisjoint(name.split('.'))
        if inside and (rank > 0 or rule in WHOLE):
            part = ruled
        elif rule == 'scale' and p in output | tables:
            part = outputs if p in output else embeddings
        else:
            part = matrices if p.dim() >= 2 and name not in spared else vectors
        part.append((name, p))
    if (rank > 0 or rule in WHOLE) and not ruled:
        below = ', '.join(KINDS['attn'] + KINDS['mlp'])
        raise ValueError(f'{rule=} and {rank=}, but no trainable nn.Linear below {below}: take AdamW '
                         '(rank=0), or name your modules in lowrank.KINDS')
    if ruled and place()[0] == 0:
        found, others = len(ruled + outputs + embeddings), sum(p.dim() == 2 for _, p in matrices)
        print(f'{rule} on {found} of {found + others} matrices')
    if rule in WHOLE:
        keys = dict(rule=rule, momentum=0.0 if rule == 'scale' else momentum)
    else:
        keys = dict(rank=rank, update_proj_gap=gap, scale=scale, proj_type=proj_type, basis=basis, rule=rule)
    parts = ((ruled, weight_decay, keys), (outputs, weight_decay, dict(keys, momentum=0.9)),
             (embeddings, weight_decay, dict(keys, dim=0)), (matrices, weight_decay, {}), (vectors, 0.0, {}))
    return [{'params': [p for _, p in part], 'param_names': [name for name, _ in part], 'weight_decay': decay,
             'state_bits': state_bits, **keys} for part, decay, keys in parts if part]


def make_optimizer(model, settings):
    """The optimizer that a script's settings ask for, of a model that `lowrank.put_layers` has seen."""
    s = settings
    common = dict(lr=s['learning_rate'], betas=(s['beta1'], s['beta2']), seed=s['seed'],
                  per_layer=s['per_layer'])
    if s['optimizer'] == 'adamw' or s['lowrank']:
        return LowRankAdamW(model, weight_decay=s['weight_decay'], scale=s['scale'], basis=s['basis'],
                            basis_every=s['basis_every'], state_bits=s['state_bits'],
                            rule='galore' if s['optimizer'] == 'adamw' else s['optimizer'],
                            sync_bits=s['sync_bits'], sync_moments=s['sync_moments'],
                            momentum=s['momentum'], **common)
    groups = param_groups(model, s['weight_decay'], s['rank'], s['basis_every'], s['scale'], s['basis'],
                          rule=s['optimizer'], state_bits=s['state_bits'], momentum=s['momentum'])
    return GaLoreAdamW(groups, **common)
