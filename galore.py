"""GaLore: Adam inside a low-rank subspace of the gradient.

    optimizer = GaLoreAdamW(param_groups(model, rank=128), lr=0.01)

GaLore (Zhao et al. 2024, arXiv 2403.03507) keeps the moments of Adam for the projected gradient only:

    R = P^T G Q,   W <- W - lr * scale * P rho(R) Q^T,   rho = Adam

with orthonormal P (m, r), Q (n, r) taken anew from the gradient every `update_proj_gap` steps. Usually one side only
(the identity for the other). Everything here works on one matrix (m, n) and on stacked ones (H, m, n) alike.

Optimizer state of a matrix, in numbers of the parameter's dtype: P m r and moments 2 n r if projected on the left, n r
and 2 m r on the right, (m + n) r and 2 r r on both sides ('full'); AdamW has 2 m n. Besides, two Python counters, and
one float32 for Fira. With state_bits=8 a number of the moments takes 1 + 4 / 256 bytes.

Lean training, in three steps that do not depend on each other:
    project_backward   linears whose backward forms P^T G directly; the gradient (m, n) exists at a refresh only
    per_layer          a parameter is updated as soon as its gradient is complete, which is then freed
    state_bits=8       moments in 8 bits, block by block
"""

import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

from lowrank import KINDS, average_over_ranks_, broadcast_from_rank_0_, head_layers

# What a group with `rank` may leave out. A script written for galore-torch gets galore-torch.
GALORE_DEFAULTS = dict(update_proj_gap=200, scale=0.25, proj_type='std', basis='svd', moments='keep', rule='galore',
                       stagger=False, state_bits=32)
CHOICES = dict(proj_type=('std', 'reverse_std', 'left', 'right', 'full'), basis=('svd', 'power', 'random', 'sketch'),
               moments=('keep', 'rotate', 'reset'), rule=('galore', 'fira'), state_bits=(32, 8))
FIRA_GROWTH = 1.01  # Fira, section 4.2: the norm of the rest may grow by this factor a step

# -----------------------------------------------------------------------------
# Bases: which subspace

def sides(shape, proj_type):
    """(left, right): which sides of a matrix (..., m, n) are projected. 'std' projects the smaller dimension (its
    moments are the smaller ones), a square matrix from the right; 'reverse_std' does the opposite."""
    tall = shape[-2] >= shape[-1]
    left = {'std': not tall, 'reverse_std': tall, 'left': True, 'right': False, 'full': True}[proj_type]
    return left, not left or proj_type == 'full'


def refresh_due(step, gap, index=0, count=1):
    """Whether matrix `index` of `count` takes a new basis in this step (from 0): in its first, and then once a period
    at its own offset, so that the refreshes of a model spread over the period and no single step is slow."""
    return step == 0 or (step - index * gap // count) % gap == 0


def orthonormal(Y):
    """Orthonormal columns that span those of Y (..., m, r), by QR in at least float32. The diagonal of the triangle is
    made positive: the factorisation is unique then, and a column of a basis that hardly changed keeps its sign, on
    which moments that are kept rely. What is not finite becomes zero before LAPACK sees it."""
    ok = torch.isfinite(Y).all(-1, keepdim=True).all(-2, keepdim=True)  # (..., 1, 1)
    Q, R = torch.linalg.qr(torch.where(ok, Y, 0).to(torch.promote_types(Y.dtype, torch.float32)))
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(Q.dtype)  # (..., r)
    return (Q * sign.unsqueeze(-2)).to(Y.dtype)


def power_iteration(G, P):
    """Two steps of subspace iteration towards the leading left singular vectors of G (..., m, n), from P (..., m, r):
    two products of 2 m n r operations and a thin QR each. The columns in between are scaled to length one, which leaves
    the span alone and keeps squared singular values inside the range of float16."""
    for _ in range(2):  # one is not enough at small ranks: 0.978 of the SVD's energy from a basis 200 steps old
        P = orthonormal(G @ F.normalize(G.mT @ P, dim=-2))
    return P


def take_bases(G, rank, left, right, basis='svd', old=(None, None), seed=0):
    """Orthonormal bases for the gradient G (..., m, n): P (..., m, rank) if `left`, Q (..., n, rank) if `right`, else
    None; `old` are the ones to start from or to fall back on.

    svd     the leading singular vectors (GaLore, algorithm 2).
    power   two steps of subspace iteration from the old bases; without any, from a random sketch of the range (Halko et
            al. 2011, algorithm 4.4): a few products instead of a decomposition.
    random  an orthonormalised Gaussian, drawn anew each time; does not look at the gradient.
    Random numbers come from `seed` alone, so that resuming is exact and all ranks agree. A gradient that is not finite
    never reaches a decomposition: the old bases stay (without any, some orthonormal ones come back). Nothing here waits
    for the device, but CUDA's SVD does."""
    m, n = G.shape[-2:]
    generator = None if basis == 'svd' else torch.Generator(G.device).manual_seed(seed)
    P = Q = None

    def gaussian(rows):  # (..., rows, rank)
        shape = *G.shape[:-2], rows, rank
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=G.device).to(G.dtype)

    ok = torch.linalg.vector_norm(G, ord=math.inf, dim=(-2, -1), keepdim=True).isfinite()  # (..., 1, 1), no temporary
    if basis == 'svd':
        safe = torch.where(ok, G, 0).to(torch.promote_types(G.dtype, torch.float32))
        U, _, Vh = torch.linalg.svd(safe, full_matrices=False)  # (..., m, k), (..., k, n), k = min(m, n)
        P, Q = U[..., :rank] if left else None, Vh[..., :rank, :].mT if right else None
    elif basis == 'power':
        if left:
            P = power_iteration(G, orthonormal(G @ gaussian(n)) if old[0] is None else old[0])
        if right:  # with both sides, the half step from P gives the other one
            Q = orthonormal(G.mT @ P) if left else \
                power_iteration(G.mT, orthonormal(G.mT @ gaussian(m)) if old[1] is None else old[1])
    else:
        P = orthonormal(gaussian(m)) if left else None
        Q = orthonormal(gaussian(n)) if right else None
    P, Q = (new if new is None or was is None else torch.where(ok, new, was.to(new.dtype))
            for new, was in zip((P, Q), old))
    return tuple(new if new is None else new.to(G.dtype).contiguous() for new in (P, Q))


# -----------------------------------------------------------------------------
# Arithmetic inside the subspace

def project(G, P, Q):
    """R = P^T G Q (..., r, n), (..., m, r) or (..., r, r); a side whose basis is None stays as it is, and G too.
    P^T G is computed as the transposed view of G^T P: rows of r numbers, which are aligned where the n = 5461 of
    LLaMA-1B are not, take a third less time on a CPU."""
    if P is None:
        return G if Q is None else G @ Q
    if Q is None:
        return (G.mT @ P).mT
    return P.mT @ (G @ Q) if G.shape[-2] <= G.shape[-1] else (G.mT @ P).mT @ Q  # the smaller intermediate


def add_back_(W, U, P, Q, alpha, beta=1.0):
    """W <- beta W + alpha P U Q^T, in place: the product is accumulated straight into W, so that the update never
    exists as a matrix of its own, nor is rounded before it is added."""
    if P is not None and Q is not None:
        P, U, Q = (P @ U, Q.mT, None) if W.shape[-2] <= W.shape[-1] else (P, U @ Q.mT, None)
    X, Y = (U, Q.mT) if P is None else (P, U)
    if W.device.type == 'cpu' and W.dtype.itemsize >= 4 and W.stride(-2) * W.element_size() % 64:
        # MKL adds to rows that are not aligned so slowly that blocks of columns by way of a buffer are 1.3 times faster
        for w, y in zip(W.split(1024, -1), Y.split(1024, -1)):
            w.mul_(beta).add_(X @ y, alpha=alpha)
        return W
    return (W.addmm_ if W.dim() == 2 else W.baddbmm_)(X, Y, beta=beta, alpha=alpha)


def adam_(R, M, V, age, betas=(0.9, 0.999), eps=1e-6, correct_bias=True):
    """Adam's moments M, V take in R, in place; returns minus the normalised direction in R's own memory, where

        rho = sqrt(1 - beta2^age) / (1 - beta1^age) * M / (sqrt(V) + eps)

    has eps before the bias correction as in galore-torch (torch divides by the correction first, so its eps is divided
    too). `age` counts from 1, this gradient included.
    It is torch's fused kernel, one pass over memory: at lr 1 and decay 1 the "parameter" is wiped out before the update
    is taken from it, so the gradient's own memory can be the parameter."""
    if correct_bias:
        eps = eps / math.sqrt(1 - betas[1] ** age)
    else:
        age = math.inf  # has no bias left to correct
    if R.stride() != M.stride():  # the kernel reads raw memory
        R = torch.empty_like(M).copy_(R)
    before = torch.full((), age - 1, dtype=torch.float32, device=R.device)
    adamw([R], [R], [M], [V], [], [before], fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1],
          lr=1.0, weight_decay=1.0, eps=eps)
    return R


def rotate_moments(M, V, old, new):
    """Moments of the coordinates under the old bases (P, Q) as seen from the new ones: with C = P_new^T P_old the first
    moment becomes C M, the second (C * C) V (its exact value if the coordinates are uncorrelated), and so for Q."""
    if new[0] is not None:
        C = new[0].mT @ old[0]  # (..., r, r)
        M, V = C @ M, C.square() @ V
    if new[1] is not None:
        C = new[1].mT @ old[1]  # (..., r, r)
        M, V = M @ C.mT, V @ C.square().mT
    return M, V


def fira_scale(G, R, N, dim, last_norm):
    """Fira (Chen et al. 2024, arXiv 2410.01623): what the projection drops, S = G - P P^T G, takes part too, each
    column scaled as Adam scaled the projected one, phi = |N_col| / |R_col|, and the norm of all of it limited to 1.01
    times the last one. Returns (phi (..., 1, n), norm (..., 1, 1)); for a basis on the right, rows take the place of
    columns. `dim` is the one that was projected. S is never formed: by Pythagoras |S_col|^2 = |G_col|^2 - |R_col|^2."""
    g, r, d = (torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=last_norm.dtype) for x in (G, R, N))
    phi = d / (r + 1e-8)
    norm = ((g.square() - r.square()).clamp_min(0) * phi.square()).sum((-2, -1), keepdim=True).sqrt()
    limited = torch.where(last_norm > 0, torch.minimum(norm, FIRA_GROWTH * last_norm), norm)  # nothing yet: no limit
    return phi * (limited / norm.clamp_min(torch.finfo(norm.dtype).tiny)), limited


# -----------------------------------------------------------------------------
# Moments in 8 bits

# Blocks of 256 numbers share a float32, their largest magnitude `top` (Dettmers et al., 8-bit optimizers, arXiv
# 2110.02861). Between zero and it, level l stands for top (l / levels)^power: fine steps where the numbers are small.
BLOCK = 256
EIGHT_BITS = {'exp_avg': (127, 2, torch.int8),  # levels, power, dtype; this one has a sign
              'exp_avg_sq': (255, 4, torch.uint8)}  # of this one the root is what counts, over many magnitudes
CHUNK = 2**22  # numbers that are float32 at a time


def raised(x, power):
    return x.square() if power == 2 else x.square().square_()


def encode(x, age, levels, power, dtype):
    """Codes (numbers,) of `dtype` and tops (blocks,) of x (numbers,), float32. Off by less than one level, which is
    top ((l + 1)^power - l^power) / levels^power, and right on average: x goes up or down by a threshold that runs
    through (0, 1) with `age`. Rounded to the nearest level a second moment would never decay, 0.1% a step being less
    than half a level. Unsigned codes are at least 1: the update divides by the root of the second moment."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    top = torch.linalg.vector_norm(blocks, ord=math.inf, dim=1, keepdim=True)  # (blocks, 1)
    part = blocks.abs().div_(top.clamp_min(torch.finfo(x.dtype).tiny))  # in [0, 1]
    low = (part.sqrt() if power == 2 else part.sqrt().sqrt_()).mul_(levels).floor_().clamp_(max=levels - 1)
    below, above = raised(low / levels, power), raised((low + 1).div_(levels), power)
    threshold = (torch.arange(BLOCK, device=x.device) * 0.6180339887 + age * 0.7548776662) % 1.0  # nothing random
    code = low.add_(part.sub_(below) > above.sub_(below).mul_(threshold))
    code = code.mul_(blocks.sign()) if dtype == torch.int8 else code.clamp_(min=1)
    return code.to(dtype).flatten()[:len(x)], top.flatten()


def decode(code, top, levels, power):
    """The numbers (numbers,), float32, that `encode` made into code (numbers,) and top (blocks,)."""
    part = F.pad(code.float(), (0, -len(code) % BLOCK)).view(-1, BLOCK) / levels
    part = part * part.abs() if power == 2 else raised(part, power)
    return part.mul_(top[:, None]).flatten()[:len(code)]


def new_moments(state, like, bits):
    """Moments of zero for numbers like `like`: in its dtype, or in 8 bits if it has at least 16 blocks."""
    for key, (_, _, dtype) in EIGHT_BITS.items():
        if bits == 8 and like.numel() >= 16 * BLOCK:
            state[key] = torch.zeros(like.shape, dtype=dtype, device=like.device)
            state[key + '_top'] = torch.zeros(-(-like.numel() // BLOCK), device=like.device)
        else:
            state[key] = torch.zeros_like(like)


def read_moments(state, numbers=slice(None), blocks=slice(None)):
    """First and second moment in float32 out of 8 bits, flat, or a chunk of them."""
    return [decode(state[key].view(-1)[numbers], state[key + '_top'][blocks], levels, power)
            for key, (levels, power, _) in EIGHT_BITS.items()]


def write_moments(state, moments, numbers=slice(None), blocks=slice(None)):
    """What `read_moments` reads."""
    for x, (key, kind) in zip(moments, EIGHT_BITS.items()):
        state[key].view(-1)[numbers], state[key + '_top'][blocks] = encode(x, state['age'], *kind)


def adam_step_(R, state, betas, eps, correct_bias):
    """`adam_` with the moments of a state, whose age counts this gradient already. Uses R up and returns the direction.
    8-bit moments are float32 in chunks only."""
    if 'exp_avg_top' not in state:
        return adam_(R, state['exp_avg'], state['exp_avg_sq'], state['age'], betas, eps, correct_bias)
    R = R.contiguous()
    flat = R.view(-1)
    for i in range(0, len(flat), CHUNK):
        where = slice(i, i + CHUNK), slice(i // BLOCK, (i + CHUNK) // BLOCK)
        moments = read_moments(state, *where)
        flat[where[0]] = adam_(flat[where[0]].float(), *moments, state['age'], betas, eps, correct_bias)
        write_moments(state, moments, *where)
    return R


# -----------------------------------------------------------------------------
# One matrix, one step

def refresh_(state, G, group, seed):
    """Take new bases for one matrix from its full gradient G and carry its moments over to them."""
    old, rank = (state.get('P'), state.get('Q')), min(group['rank'], *G.shape[-2:])
    new = take_bases(G, rank, *sides(G.shape, group['proj_type']), group['basis'], old, seed)
    state.update({name: basis for name, basis in zip('PQ', new) if basis is not None})
    carry_moments_(state, group, old, new)


def carry_moments_(state, group, old, new):
    """What `moments` says about the moments of one matrix when new bases (P, Q) take the place of old ones."""
    if 'exp_avg' in state and group['moments'] == 'rotate':
        if 'exp_avg_top' in state:
            M, V = (x.view(state['exp_avg'].shape) for x in read_moments(state))
            old, new = ([basis if basis is None else basis.float() for basis in bases] for bases in (old, new))
            write_moments(state, [x.flatten() for x in rotate_moments(M, V, old, new)])
        else:
            M, V = rotate_moments(state['exp_avg'], state['exp_avg_sq'], old, new)
            state['exp_avg'].copy_(M), state['exp_avg_sq'].copy_(V)  # in place, so that their layout stays
    elif 'exp_avg' in state and group['moments'] == 'reset':
        for key in ('exp_avg', 'exp_avg_sq', 'exp_avg_top', 'exp_avg_sq_top'):
            if key in state:
                state[key].zero_()
        state['age'] = 0  # the bias correction starts again with the moments


def update_(W, R, state, group, G=None):
    """W <- (1 - lr decay) (W - lr scale (P rho(R) Q^T [+ Fira's rest of G])), moments and W in place. Uses R up.
    Decay comes after the update as in galore-torch; it rides on the product as its beta."""
    P, Q = state.get('P'), state.get('Q')
    if 'exp_avg' not in state:
        new_moments(state, R, group['state_bits'])
    state['step'] += 1
    state['age'] += 1
    keep, fira = 1.0 - group['lr'] * group['weight_decay'], group['rule'] == 'fira'
    alpha = group['lr'] * group['scale'] * keep
    R_in = R.clone() if fira else None
    U = adam_step_(R, state, group['betas'], group['eps'], group['correct_bias'])
    if fira:  # -(P N + phi (G - P R)) = P (U + phi R) - phi G: no third product, no S
        last = state.get('rest_norm')
        if last is None:
            last = W.new_zeros((*W.shape[:-2], 1, 1), dtype=torch.promote_types(W.dtype, torch.float32))
        phi, state['rest_norm'] = fira_scale(G, R_in, U, -2 if Q is None else -1, last)
        phi = phi.to(W.dtype)
        U.addcmul_(R_in, phi)
    if P is None and Q is None:  # a head's factor
        W.mul_(keep).add_(U, alpha=alpha)
    else:
        add_back_(W, U, P, Q, alpha, keep)
    if fira:
        W.addcmul_(G, phi, value=-alpha)


def plain_step_(params, states, group):
    """torch.optim.AdamW, fused, for the parameters without a rank: eps after the bias correction, decay before the
    update. State as there; with state_bits=8, matrices have theirs as GaLore's."""
    fused = []
    for p, state in zip(params, states):
        if not state:
            new_moments(state, p, group.get('state_bits', 32))
            age = 0.0 if group['correct_bias'] else math.inf
            state.update({'age': 0} if 'exp_avg_top' in state else
                         {'step': torch.full((), age, dtype=torch.float32, device=p.device)})
        if 'exp_avg_top' in state:
            state['age'] += 1
            eps = group['eps'] * (math.sqrt(1 - group['betas'][1] ** state['age']) if group['correct_bias'] else 1.0)
            direction = adam_step_(p.grad, state, group['betas'], eps, group['correct_bias'])
            p.mul_(1 - group['lr'] * group['weight_decay']).add_(direction, alpha=group['lr'])
        else:
            fused.append((p, p.grad, state['exp_avg'], state['exp_avg_sq'], state['step']))
    if fused:
        params, grads, M, V, ages = map(list, zip(*fused))
        adamw(params, grads, M, V, [], ages, fused=True, amsgrad=False, maximize=False, beta1=group['betas'][0],
              beta2=group['betas'][1], lr=group['lr'], weight_decay=group['weight_decay'], eps=group['eps'])


# -----------------------------------------------------------------------------
# The optimizer

class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW, inside the gradient's leading subspace for the groups that have a `rank`.

    Drop-in for the class of that name in galore-torch 1.0. Keys of such a group, as there: `rank`, `update_proj_gap`
    (steps between refreshes), `scale` (multiplies lr), `proj_type` ('std', 'reverse_std', 'left', 'right', 'full'); our
    own, all optional: `basis` ('svd' | 'power' | 'random'), `moments` ('keep' | 'rotate' | 'reset' at a refresh),
    `rule` ('galore' | 'fira'), `stagger` (spread the refreshes over the period), `state_bits` (32: moments in the
    parameter's dtype, or 8; also for groups without rank). Arithmetic as in galore-torch: eps before the bias
    correction, decay after the update. Groups without `rank` follow torch.optim.AdamW. Matrices are (m, n) or stacked
    (H, m, n), each of the H with its own basis.

    per_layer: a parameter is updated during the backward pass, as soon as its gradient is complete, and the gradient
    is freed; `step` has nothing left to do. With gradient accumulation the loop sets `last_micro_batch` before each
    backward pass. There is no DDP then: `world_size` ranks average each gradient here, when it is complete.
    max_norm: clips what is stepped on to this norm, that of all projected and plain gradients together, or, per layer,
    of each one; 0: no clipping. seed is for the random bases. `no_deprecation_warning` is accepted and means nothing.

    `gradient_norm` is the norm of what the last step stepped on, before clipping, a tensor. State is tensors and
    numbers, so it loads with weights_only=True and resumes bit for bit. `step` never waits for the device (CUDA's SVD
    does). Raises ValueError for a setting that makes no sense. A rank above the smaller side of a matrix is clamped,
    with a warning.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
                 no_deprecation_warning=False, seed=0, max_norm=0.0, per_layer=False, world_size=1):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f'{lr=}, {eps=} and {weight_decay=} must be at least 0, {betas=} in [0, 1)')
        self.order = {}  # matrix: (its group's number, its own number among all matrices)
        self.received = {}  # matrix: P^T G so far, from the projected backward
        self.frozen = {}  # factor of a head: the weight that it moves, which decays with it (GaLoLTE)
        self.apart = set()  # parameters whose gradients DDP does not see, so that we average them
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias, seed=seed))
        self.max_norm, self.per_layer, self.world_size, self.last_micro_batch = max_norm, per_layer, world_size, True
        self.norms, self.gradient_norm = [], torch.zeros(())
        if per_layer:
            for number, group in enumerate(self.param_groups):
                for p in group['params']:
                    self.apart.add(p)
                    p.register_post_accumulate_grad_hook(lambda p, number=number: self._complete(p, number))

    def add_param_group(self, group):
        super().add_param_group(group)
        group = self.param_groups[-1]
        for key, value in GALORE_DEFAULTS.items() if 'rank' in group else ():
            group.setdefault(key, value)
        for key, allowed in CHOICES.items():
            if key in group and (group[key] not in allowed or group[key] == 'sketch' and not group.get('factor')):
                raise ValueError(f"{key}={group[key]!r} is not one of {', '.join(map(repr, allowed))}")
        if 'rank' not in group:
            return
        for key in ('rank', 'update_proj_gap'):
            if not (isinstance(group[key], int) and group[key] >= 1):
                raise ValueError(f'{key}={group[key]!r} must be an integer of at least 1')
        if group['rule'] == 'fira' and group['proj_type'] == 'full':
            raise ValueError("rule='fira' needs a one-sided projection, proj_type='full' has two: set 'std'")
        names = group.get('param_names') or [f'parameter {i}' for i in range(len(group['params']))]
        clamped = []
        number = len(self.param_groups) - 1
        for name, p in zip(names, group['params']):
            if p.dim() not in (2, 3):
                raise ValueError(f'{name} of shape {tuple(p.shape)} is no matrix: put it into a group without rank')
            if group['rank'] > min(p.shape[-2:]):
                clamped.append(f'{name} {tuple(p.shape)}')
            self.order[p] = number, len(self.order)
        if clamped:
            more = f' and {len(clamped) - 1} more' * (len(clamped) > 1)
            warnings.warn(f"galore: rank {group['rank']} is clamped to the smaller side of {clamped[0]}{more}")

    def _matrix(self, p):
        """(state, group, seed, whether new bases are due) of a matrix. It needs bases when it has none, and then once a
        period."""
        number, index = self.order[p]
        state, group = self.state[p], self.param_groups[number]
        if not state:
            state.update(step=0, age=0)  # of the run; of the moments
        due = refresh_due(state['step'], group['update_proj_gap'], index if group['stagger'] else 0, len(self.order))
        due = not group.get('factor') and (due and state['step'] > 0 or not ('P' in state or 'Q' in state))
        return state, group, hash((group['seed'], index, state['step'])) % 2**32, due  # torch uses 32 bits of a seed

    def _take(self, p):
        """The projected gradient R of a matrix, complete; new bases first, where they are due."""
        state, group, seed, due = self._matrix(p)
        R = self.received.pop(p, None)
        if p in self.apart:
            average_over_ranks_(p.grad if R is None else R, self.world_size)
        if R is None:
            if due:
                refresh_(state, p.grad, group, seed)
            R = project(p.grad, state.get('P'), state.get('Q'))
        return R, state, group

    def _shrink(self, gradients, scaled):
        """Notes the norm of the gradients and clips what is `scaled` to it."""
        norm = nn.utils.get_total_norm(gradients)
        self.norms.append(norm.float())
        if self.max_norm:
            for g in scaled:
                g.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0).to(g.dtype))

    @torch.no_grad()
    def _complete(self, p, number):
        """per_layer: one parameter's update, when the last micro-batch has brought its gradient."""
        if not self.last_micro_batch or p.grad is None and p not in self.received:  # the hook runs without one too
            return
        if p in self.order:
            R, state, group = self._take(p)
            self._shrink([R], [R, p.grad] if group['rule'] == 'fira' else [R])
            update_(p, R, state, group, p.grad)
        else:
            average_over_ranks_(p.grad, self.world_size)
            self._shrink([p.grad], [p.grad])
            plain_step_([p], [self.state[p]], self.param_groups[number])
        p.grad = None

    @torch.no_grad()
    def receive(self, p, dy, x):
        """A matrix's part of the projected backward: takes in G = dy^T x from dy (tokens, m), x (tokens, n).

        R = P^T G = (dy P)^T x adds up over micro-batches. Where new bases are due the full gradient does, in p.grad,
        but not at the very start, when all matrices would hold one: the first bases are those of the first micro-batch,
        averaged over ranks, one matrix after the other."""
        state, group, seed, due = self._matrix(p)
        P, Q = state.get('P'), state.get('Q')
        if due and P is None and Q is None:
            G = average_over_ranks_((dy.mT @ x).to(p.dtype), self.world_size)
            refresh_(state, G, group, seed)
            self.received[p] = project(G, state.get('P'), state.get('Q'))
        elif due:
            p.grad = (dy.mT @ x).to(p.dtype) if p.grad is None else p.grad.add_(dy.mT @ x)
        else:  # the small product first: 2 r (m + n) operations a token instead of 2 m n
            R = ((x.mT @ (dy @ P.to(dy.dtype))).mT if Q is None else dy.mT @ (x @ Q.to(x.dtype))).to(p.dtype)
            self.received[p] = self.received[p].add_(R) if p in self.received else R
        if self.per_layer:
            self._complete(p, self.order[p][0])

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is one. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [p for p in self.order if p.grad is not None or p in self.received]
        plain = [([p for p in group['params'] if p.grad is not None], group)
                 for group in self.param_groups if 'rank' not in group]
        rest = [p.grad for params, _ in plain for p in params]
        if self.max_norm and (matrices or rest):  # the norm is one of all gradients, so all projected ones are held
            held = [self._take(p) for p in matrices]
            self._shrink([R for R, _, _ in held] + rest, [R for R, _, _ in held] + rest +
                         [p.grad for p, (_, _, group) in zip(matrices, held) if group['rule'] == 'fira'])
        for i, p in enumerate(matrices):
            if self.max_norm:
                taken = held[i]
            else:
                taken = self._take(p)
                self._shrink([taken[0]], [])
            update_(p, *taken, p.grad)
            if p in self.frozen and taken[2]['weight_decay']:
                self.frozen[p].mul_(1.0 - taken[2]['lr'] * taken[2]['weight_decay'])
            if p in self.apart:
                p.grad = None
        if rest and not self.max_norm:
            self._shrink(rest, [])
        for params, group in plain:
            plain_step_(params, [self.state[p] for p in params], group)
        self.gradient_norm = torch.stack(self.norms).norm() if self.norms else torch.zeros(())
        self.norms.clear()
        return loss

    def zero_grad(self, set_to_none=True):
        """As in torch, the projected gradients too."""
        super().zero_grad(set_to_none)
        self.received.clear()

    def load_state_dict(self, state_dict):
        """As in torch, which casts state to the dtype of its parameter: right for moments and bases, not for these."""
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict['param_groups'] for i in group['params'])
        for i, p in zip(ids, (p for group in self.param_groups for p in group['params'])):
            saved = state_dict['state'].get(i, {})
            for key, value in saved.items():
                if torch.is_tensor(value) and ('exp_avg_top' in saved or key in ('step', 'rest_norm')) \
                        and key not in 'PQ':
                    self.state[p][key] = value.to(p.device)


# -----------------------------------------------------------------------------
# The projected backward

class _ProjectedBackward(torch.autograd.Function):
    """y = x W^T + b, whose backward hands dy and x to the optimizer and returns no gradient for W."""

    @staticmethod
    def forward(ctx, x, weight, bias, optimizer):
        ctx.save_for_backward(x)
        ctx.weight, ctx.optimizer = weight, optimizer  # the parameter itself: checkpointing would hand back a copy
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        (x,), weight = ctx.saved_tensors, ctx.weight
        m, n = weight.shape
        dy = dy.reshape(-1, m)  # (tokens, m)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.to(dy.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        ctx.optimizer.receive(weight, dy, x.reshape(-1, n))  # last: it may update the weight
        return dx, None, dbias, None


class ProjectedLinear(nn.Linear):
    """A linear layer whose backward forms the projected gradient (see GaLoreAdamW.receive) instead of the full one.

    GaLore is one LoRA head whose B = P is frozen (Torroba-Hennigen et al., "On the Duality between Gradient
    Transformations and Adapters", 2025): per token 4 m n + 2 r (m + n) operations instead of 6 m n."""

    def __init__(self, linear, optimizer):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        self.weight, self.bias, self.optimizer = linear.weight, linear.bias, optimizer

    @torch.compiler.disable  # it talks to the optimizer, so torch.compile breaks its graph here
    def forward(self, x):
        bias = self.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = bias if bias is None else bias.to(x.dtype)
        return _ProjectedBackward.apply(x, self.weight, bias, self.optimizer)


def project_backward(model, optimizer):
    """Replaces, in place, every nn.Linear of the model whose weight a GaLoreAdamW projects by a ProjectedLinear.

    The same weights as with the full gradient, to rounding, but that the first bases come from the first micro-batch.
    Linears with heads are left alone. ValueError where the projection has two sides or the rule is 'fira', which need
    the full gradient."""
    for group in optimizer.param_groups:
        if 'rank' in group and (group['proj_type'] == 'full' or group['rule'] == 'fira'):
            raise ValueError("the projected backward never sees the full gradient, which rule='fira' and "
                             "proj_type='full' need: set galore_backward='full', or rule='galore' and one side")
    linears = [(name, module) for name, module in model.named_modules()
               if type(module) is nn.Linear and module.weight in optimizer.order]
    for name, linear in linears:
        model.set_submodule(name, ProjectedLinear(linear, optimizer))
        optimizer.apart.add(linear.weight)


# -----------------------------------------------------------------------------
# GaLoLTE: heads of LTE (lowrank.py) whose one factor is a basis of the head's own gradient

SKETCH_DECAY = 0.9  # of a step


@torch.no_grad()
def renew_bases(model, optimizer, step, merge_every):
    """GaLoLTE: lets the layers whose turn it is take new bases from the gradient of this step, from 0. To be called
    before the forward pass, when heads have just merged (so that what is trained is zero). The layers take turns within
    `update_proj_gap` steps; the first bases are taken at once. Where all heads and ranks share one basis, it is that of
    the averaged gradient or sketch, and the first moments are averaged too: they are of the same coordinates then, and
    with momentum of their own the workers drift apart."""
    layers = head_layers(model)
    for index, layer in enumerate(layers):
        p = layer.trained
        state, group, seed, _ = optimizer._matrix(p)
        if layer.shared_basis and 'exp_avg' in state:
            M = state['exp_avg']  # (heads, r, n), or (heads, m, r)
            M.copy_(average_over_ranks_(M.mean(0), optimizer.world_size).expand_as(M))
        if refresh_due(step // merge_every, group['update_proj_gap'] // merge_every, index, len(layers)):
            if group['basis'] == 'sketch' and 'sketch' in state:
                Y = state['sketch']  # (heads, m, r), or (heads, n, r)
                if layer.shared_basis:
                    Y = average_over_ranks_(Y.mean(0), optimizer.world_size)
                set_basis(layer, state, group, orthonormal(Y), optimizer.world_size)
            else:
                layer.take_basis = partial(take_head_bases, layer, optimizer, state, group, seed, [])


def take_head_bases(layer, optimizer, state, group, seed, held, dy, x):
    """New bases for the heads of a layer from dy (heads, tokens, m), x (heads, tokens, n), one head after the other.

    A basis is that of the whole step's gradient: until its last micro-batch the gradients of the heads are `held`. Only
    the first bases are those of the first micro-batch, so that no step holds the gradients of all layers. Returns the
    step's gradient of what is trained, (heads, r, n) or (heads, m, r), or None where it is yet to come, or the caller's
    to form."""
    old, dtype = layer.B if layer.left else layer.A.mT, layer.weight.dtype  # (heads, m, r) or (heads, n, r)
    kind = 'power' if group['basis'] == 'sketch' else group['basis']
    first = state['step'] == 0

    def bases(G, head, mine=0):  # mine: the head's number among those of all ranks
        was = None if first else old[head]
        was = (was, None) if layer.left else (None, was)
        P, Q = take_bases(G, layer.rank, layer.left, not layer.left, kind, was, (seed + mine) % 2**32)
        return P if layer.left else Q

    def gradient(head):
        G = (dy[head].mT @ x[head]).to(dtype)
        return held[head].add_(G) if held else G
    heads = range(len(dy))
    if not first and (held or not optimizer.last_micro_batch):
        held[:] = [gradient(head) for head in heads]
        if not optimizer.last_micro_batch:
            return None
    if layer.shared_basis:
        new = bases(average_over_ranks_(sum(held or map(gradient, heads)), optimizer.world_size), 0)
    else:
        new = torch.stack([bases(held[head] if held else gradient(head), head, head * layer.workers + layer.worker)
                           for head in heads])
    set_basis(layer, state, group, new, optimizer.world_size)
    layer.take_basis = None
    if not held:
        return None
    return torch.stack([project(G, *((P, None) if layer.left else (None, P)))
                        for G, P in zip(held, layer.B if layer.left else layer.A.mT)])


def set_basis(layer, state, group, new, world_size):
    """Puts new bases (heads, m, r), or (heads, n, r), into a layer, or one for all; the moments go along."""
    old = layer.B if layer.left else layer.A.mT
    if layer.shared_basis:  # to the last bit: merges leave it out, and another device may round otherwise
        new = broadcast_from_rank_0_(new.contiguous(), world_size).expand(old.shape)
    if layer.left:
        carry_moments_(state, group, (old, None), (new, None))
        layer.B.copy_(new)
    else:
        carry_moments_(state, group, (None, old), (None, new))
        layer.A.copy_(new.mT)


@torch.no_grad()
def watch(layer, optimizer, dy, x, R):
    """Takes G G^T P = G R^T of each head into a running average (heads, m, r), or G^T G Q = G^T R for a basis on the
    right: one step of subspace iteration on the averaged G G^T, for 2 r (m + n) operations a token, without G. G is the
    gradient of a micro-batch; those of a step weigh the same."""
    Y = torch.bmm(dy.mT, torch.bmm(x, R.mT)) if layer.left else torch.bmm(x.mT, torch.bmm(dy, R))
    Y, state = Y.to(layer.weight.dtype).mul_(len(dy)), optimizer.state[layer.trained]  # dy: of the mean over all heads
    state['sketch'] = Y if 'sketch' not in state else state['sketch'].add_(Y)
    if optimizer.last_micro_batch:
        state['sketch'].mul_(SKETCH_DECAY)  # only its span counts


# -----------------------------------------------------------------------------
# From settings

def state_bytes(optimizer):
    """Bytes of all tensors in an optimizer's state (any torch.optim.Optimizer)."""
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values()
               if torch.is_tensor(x))


def param_groups(model, weight_decay=0.0, rank=0, gap=200, scale=0.25, basis='power', moments='keep', rule='galore',
                 proj_type='std', state_bits=32):
    """The trainable parameters of a model as groups for GaLoreAdamW, or, with rank 0, for torch.optim.AdamW.

    With a rank, the matrices of attention and MLP (weights of nn.Linear below a module named attn, self_attn or mlp)
    and the head factors A (H, r, n), B (H, m, r) of lowrank.py are projected, their refreshes staggered. The others are
    plain; matrices get weight_decay, vectors and what the model's own no_weight_decay() names (timm) none.
    `param_names` goes along, as torch's own optimizers have it.
    Raises ValueError if there is a rank but nothing to project."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    projected, matrices, vectors = [], [], []
    spared = getattr(model, 'no_weight_decay', set)()  # of a ViT: the embedding of places, the class token
    for name, p in model.named_parameters():  # lists tied parameters once
        if not p.requires_grad:
            continue
        path = name.split('.')
        inside = id(p) in linear and not {*KINDS['attn'], *KINDS['mlp']}.isdisjoint(path)
        if rank > 0 and (inside and p.dim() == 2 or path[-1] in ('A', 'B') and p.dim() == 3):
            projected.append((name, p))
        else:
            (matrices if p.dim() >= 2 and name not in spared else vectors).append((name, p))
    if rank > 0 and not projected:
        raise ValueError(f"{rank=}, but no trainable nn.Linear below {', '.join(KINDS['attn'] + KINDS['mlp'])}, and no "
                         "heads: set rank=0 (in the scripts optimizer='adamw'), or name your modules in lowrank.KINDS")
    galore = dict(rank=rank, update_proj_gap=gap, scale=scale, proj_type=proj_type, basis=basis, moments=moments,
                  rule=rule, stagger=True)
    bits = dict(state_bits=state_bits) if rank > 0 else {}
    parts = (projected, weight_decay, {**galore, **bits}), (matrices, weight_decay, bits), (vectors, 0.0, bits)
    groups = [{'params': [p for _, p in part], 'param_names': [name for name, _ in part], 'weight_decay': decay, **keys}
              for part, decay, keys in parts if part]
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters() if p.requires_grad}), \
        'the groups do not partition the trainable parameters'
    return groups


def check_optimizer(settings, compute):
    """Refuses (ValueError) settings of the optimizer that make no sense together. compute: the dtype computed in."""
    s = settings
    for key, allowed in dict(optimizer=('adamw', 'galore'), galore_backward=('full', 'projected'),
                             galore_basis=CHOICES['basis'], galore_moments=CHOICES['moments'],
                             galore_rule=CHOICES['rule'], state_bits=CHOICES['state_bits']).items():
        if s[key] not in allowed:
            raise ValueError(f"{key}={s[key]!r} is not known: set one of {', '.join(map(repr, allowed))}")
    if s['head_basis'] == 'gradient' and compute == 'float16':
        raise ValueError("head_basis='gradient' takes bases from gradients before a GradScaler has seen them: compute "
                         "in another dtype than 'float16'")
    if s['head_basis'] == 'gradient' and s['galore_rule'] != 'galore':
        raise ValueError(f"galore_rule={s['galore_rule']!r} needs the full gradient, and GaLoLTE's heads form none: "
                         "set galore_rule='galore'")
    if s['galore_basis'] == 'sketch' and s['head_basis'] != 'gradient':
        raise ValueError("galore_basis='sketch' is made of the parts that GaLoLTE's heads compute: set "
                         "head_basis='gradient', or galore_basis='power'")
    if s['galore_rule'] != 'galore' and s['optimizer'] == 'adamw':
        raise ValueError(f"galore_rule={s['galore_rule']!r} is for optimizer='galore': set that, or "
                         "galore_rule='galore'")
    lean = [key for key, usual in (('galore_backward', 'full'), ('per_layer', False), ('state_bits', 32))
            if s[key] != usual]
    if lean and s['optimizer'] == 'adamw':
        raise ValueError(f"{lean[0]}={s[lean[0]]!r} is for optimizer='galore': set that, or leave {lean[0]} alone")
    if compute == 'float16' and lean and lean != ['state_bits']:
        raise ValueError(f'{lean[0]}={s[lean[0]]!r} steps on gradients before a GradScaler has seen them: compute in '
                         "another dtype than 'float16'")
    if s['galore_backward'] == 'projected' and s['lowrank']:
        raise ValueError("galore_backward='projected' is for full-rank weights, and heads have small gradients anyway: "
                         "set galore_backward='full' or lowrank=''")


def make_optimizer(model, settings, world_size=1):
    """torch.optim.AdamW or GaLoreAdamW as a script's settings say; with galore_backward='projected' the model's linears
    are replaced."""
    s = settings
    if s['optimizer'] == 'adamw' and s['head_basis'] == 'gradient':
        layers = head_layers(model)
        factors = {layer.trained: layer.weight for layer in layers}
        groups = []
        for group in param_groups(model, s['weight_decay']):  # the factors step as GaLore does inside its bases
            for inside in (False, True):
                pairs = [(p, name) for p, name in zip(group['params'], group['param_names'])
                         if (p in factors) == inside]
                more = dict(rank=s['rank'], factor=True, update_proj_gap=s['galore_gap'], scale=s['galore_scale'],
                            basis=s['galore_basis'], moments=s['galore_moments']) if inside else {}
                if pairs:
                    groups.append({'params': [p for p, _ in pairs], 'param_names': [name for _, name in pairs],
                                   'weight_decay': group['weight_decay'], **more})
        optimizer = GaLoreAdamW(groups, lr=s['learning_rate'], betas=(s['beta1'], s['beta2']), seed=s['seed'],
                                world_size=world_size)
        optimizer.frozen = factors
        for layer in layers:
            layer.shared_basis = s['basis_from'] == 'shared'
            layer.watch = partial(watch, layer, optimizer) if s['galore_basis'] == 'sketch' else None
        return optimizer
    if s['optimizer'] == 'adamw':
        return torch.optim.AdamW(param_groups(model, s['weight_decay']), lr=s['learning_rate'],
                                 betas=(s['beta1'], s['beta2']), fused=True)
    groups = param_groups(model, s['weight_decay'], s['galore_rank'], s['galore_gap'], s['galore_scale'],
                          s['galore_basis'], s['galore_moments'], s['galore_rule'], state_bits=s['state_bits'])
    optimizer = GaLoreAdamW(groups, lr=s['learning_rate'], betas=(s['beta1'], s['beta2']), seed=s['seed'],
                            max_norm=s['grad_clip'], per_layer=s['per_layer'], world_size=world_size)
    if s['galore_backward'] == 'projected':
        project_backward(model, optimizer)
    return optimizer
