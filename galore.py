"""GaLore: Adam inside a low-rank subspace of the gradient.

    optimizer = GaLoreAdamW(param_groups(model, rank=128), lr=0.01)

GaLore (Zhao et al. 2024, arXiv 2403.03507) keeps the moments of Adam for the projected gradient only:

    R = P^T G Q,   W <- W - lr * scale * P rho(R) Q^T,   rho = Adam

with orthonormal P (m, r), Q (n, r) taken anew from the gradient every `update_proj_gap` steps. Usually one side only
(the identity for the other). Everything here works on one matrix (m, n) and on stacked ones (H, m, n) alike.

Optimizer state of a matrix, in numbers of the parameter's dtype: P m r and moments 2 n r if projected on the left, n r
and 2 m r on the right, (m + n) r and 2 r r on both sides ('full'); AdamW has 2 m n. Besides, two Python counters, and
one float32 for Fira.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

# What a group with `rank` may leave out. A script written for galore-torch gets galore-torch.
GALORE_DEFAULTS = dict(update_proj_gap=200, scale=0.25, proj_type='std', basis='svd', moments='keep', rule='galore',
                       stagger=False)
CHOICES = dict(proj_type=('std', 'reverse_std', 'left', 'right', 'full'), basis=('svd', 'power', 'random'),
               moments=('keep', 'rotate', 'reset'), rule=('galore', 'fira'))
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
    for the device."""
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
    """R = P^T G Q (..., r, n), (..., m, r) or (..., r, r); a side whose basis is None stays as it is.
    P^T G is computed as the transposed view of G^T P: rows of r numbers, which are aligned where the n = 5461 of
    LLaMA-1B are not, take a third less time on a CPU."""
    if P is None:
        return G @ Q
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
# One matrix, one step

def refresh_(state, G, group, seed):
    """Take new bases for one matrix from its full gradient G and carry its moments over to them."""
    old, rank = (state.get('P'), state.get('Q')), min(group['rank'], *G.shape[-2:])
    new = take_bases(G, rank, *sides(G.shape, group['proj_type']), group['basis'], old, seed)
    state.update({name: basis for name, basis in zip('PQ', new) if basis is not None})
    if 'exp_avg' in state and group['moments'] == 'rotate':
        M, V = rotate_moments(state['exp_avg'], state['exp_avg_sq'], old, new)
        state['exp_avg'].copy_(M), state['exp_avg_sq'].copy_(V)  # in place, so that their layout stays
    elif 'exp_avg' in state and group['moments'] == 'reset':
        state['exp_avg'].zero_(), state['exp_avg_sq'].zero_()
        state['age'] = 0  # the bias correction starts again with the moments


def update_(W, R, state, group, G=None):
    """W <- (1 - lr decay) (W - lr scale (P rho(R) Q^T [+ Fira's rest of G])), moments and W in place. Uses R up.
    Decay comes after the update as in galore-torch; it rides on the product as its beta."""
    P, Q = state.get('P'), state.get('Q')
    if 'exp_avg' not in state:
        state['exp_avg'], state['exp_avg_sq'] = torch.zeros_like(R), torch.zeros_like(R)
    state['step'] += 1
    state['age'] += 1
    keep, fira = 1.0 - group['lr'] * group['weight_decay'], group['rule'] == 'fira'
    alpha = group['lr'] * group['scale'] * keep
    R_in = R.clone() if fira else None
    U = adam_(R, state['exp_avg'], state['exp_avg_sq'], state['age'], group['betas'], group['eps'],
              group['correct_bias'])
    if fira:  # -(P N + phi (G - P R)) = P (U + phi R) - phi G: no third product, no S
        last = state.get('rest_norm')
        if last is None:
            last = W.new_zeros((*W.shape[:-2], 1, 1), dtype=torch.promote_types(W.dtype, torch.float32))
        phi, state['rest_norm'] = fira_scale(G, R_in, U, -2 if Q is None else -1, last)
        phi = phi.to(W.dtype)
        U.addcmul_(R_in, phi)
    add_back_(W, U, P, Q, alpha, keep)
    if fira:
        W.addcmul_(G, phi, value=-alpha)


def plain_step_(params, states, group):
    """torch.optim.AdamW, fused, for the parameters without a rank: eps after the bias correction, decay before the
    update. State as there."""
    for p, state in zip(params, states):
        if not state:
            age = 0.0 if group['correct_bias'] else math.inf
            state.update(step=torch.full((), age, dtype=torch.float32, device=p.device),
                         exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    moments = ([state[key] for state in states] for key in ('exp_avg', 'exp_avg_sq'))
    adamw(params, [p.grad for p in params], *moments, [], [state['step'] for state in states], fused=True,
          amsgrad=False, maximize=False, beta1=group['betas'][0], beta2=group['betas'][1], lr=group['lr'],
          weight_decay=group['weight_decay'], eps=group['eps'])


# -----------------------------------------------------------------------------
# The optimizer

class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW, inside the gradient's leading subspace for the groups that have a `rank`.

    Drop-in for the class of that name in galore-torch 1.0. Keys of such a group, as there: `rank`, `update_proj_gap`
    (steps between refreshes), `scale` (multiplies lr), `proj_type` ('std', 'reverse_std', 'left', 'right', 'full'); our
    own, all optional: `basis` ('svd' | 'power' | 'random'), `moments` ('keep' | 'rotate' | 'reset' at a refresh),
    `rule` ('galore' | 'fira'), `stagger` (spread the refreshes over the period). Arithmetic as in galore-torch: eps
    before the bias correction, decay after the update. Groups without `rank` follow torch.optim.AdamW. Matrices are
    (m, n) or stacked (H, m, n), each of the H with its own basis.

    State is tensors and numbers, so it loads with weights_only=True and resumes bit for bit. `step` never waits for the
    device. `no_deprecation_warning` is accepted and means nothing. `seed` is for the random bases. `max_norm`
    clips what is stepped on: the norm of all projected and plain gradients together, 0: no clipping.
    Raises ValueError for a setting that makes no sense. A rank above the smaller side of a matrix is clamped, with a
    warning.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
                 no_deprecation_warning=False, seed=0, max_norm=0.0):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f'{lr=}, {eps=} and {weight_decay=} must be at least 0, {betas=} in [0, 1)')
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias, seed=seed))
        self.max_norm = max_norm

    def add_param_group(self, group):
        super().add_param_group(group)
        group = self.param_groups[-1]
        if 'rank' not in group:
            return
        for key, value in GALORE_DEFAULTS.items():
            group.setdefault(key, value)
        for key, allowed in CHOICES.items():
            if group[key] not in allowed:
                raise ValueError(f"{key}={group[key]!r} is not one of {', '.join(map(repr, allowed))}")
        for key in ('rank', 'update_proj_gap'):
            if not (isinstance(group[key], int) and group[key] >= 1):
                raise ValueError(f'{key}={group[key]!r} must be an integer of at least 1')
        if group['rule'] == 'fira' and group['proj_type'] == 'full':
            raise ValueError("rule='fira' needs a one-sided projection, proj_type='full' has two: set 'std'")
        names = group.get('param_names') or [f'parameter {i}' for i in range(len(group['params']))]
        clamped = []
        for name, p in zip(names, group['params']):
            if p.dim() not in (2, 3):
                raise ValueError(f'{name} of shape {tuple(p.shape)} is no matrix: put it into a group without rank')
            if group['rank'] > min(p.shape[-2:]):
                clamped.append(f'{name} {tuple(p.shape)}')
        if clamped:
            warnings.warn(f"galore: rank {group['rank']} is clamped to the smaller side of {', '.join(clamped)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, if there is one. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, plain = [], []  # (parameter, state, group); (parameters, group)
        count = sum(len(group['params']) for group in self.param_groups if 'rank' in group)
        index = -1  # of a matrix among all the projected ones
        for group in self.param_groups:
            if 'rank' not in group:
                plain.append(([p for p in group['params'] if p.grad is not None], group))
                continue
            for p in group['params']:
                index += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, age=0)  # of the run; of the moments
                seed = ((group['seed'] << 44) + (index << 28) + state['step']) % 2**63
                if refresh_due(state['step'], group['update_proj_gap'], index if group['stagger'] else 0, count):
                    refresh_(state, p.grad, group, seed)
                matrices.append((p, state, group))

        def projected(p, state):
            return project(p.grad, state.get('P'), state.get('Q'))
        if self.max_norm:  # the norm is one of all gradients, so all projected ones have to be held
            held = [projected(p, state) for p, state, _ in matrices]
            rest = [p.grad for params, _ in plain for p in params]
            shrink = (self.max_norm / (nn.utils.get_total_norm(held + rest) + 1e-6)).clamp(max=1.0)
            for g in (*held, *rest, *(p.grad for p, _, group in matrices if group['rule'] == 'fira')):
                g.mul_(shrink)
            held = iter(held)
        for p, state, group in matrices:
            update_(p, next(held) if self.max_norm else projected(p, state), state, group, p.grad)
        for params, group in plain:
            plain_step_(params, [self.state[p] for p in params], group)
        return loss

    def load_state_dict(self, state_dict):
        """As in torch, which casts state to the dtype of its parameter: right for moments and bases, not for these."""
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict['param_groups'] for i in group['params'])
        for i, p in zip(ids, (p for group in self.param_groups for p in group['params'])):
            for key, value in state_dict['state'].get(i, {}).items():
                if key in ('step', 'rest_norm') and torch.is_tensor(value):
                    self.state[p][key] = value.to(p.device)


def state_bytes(optimizer):
    """Bytes of all tensors in an optimizer's state (any torch.optim.Optimizer)."""
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values()
               if torch.is_tensor(x))


def param_groups(model, weight_decay=0.0, rank=0, gap=200, scale=0.25, basis='power', moments='keep', rule='galore',
                 proj_type='std'):
    """The trainable parameters of a model as groups for GaLoreAdamW, or, with rank 0, for torch.optim.AdamW.

    With a rank, the matrices of attention and MLP (weights of nn.Linear below a module named attn, self_attn or mlp)
    and the head factors A (H, r, n), B (H, m, r) of lowrank.py are projected, their refreshes staggered. The others are
    plain; matrices get weight_decay, vectors none. `param_names` goes along, as torch's own optimizers have it.
    Raises ValueError if there is a rank but nothing to project."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    projected, matrices, vectors = [], [], []
    for name, p in model.named_parameters():  # lists tied parameters once
        if not p.requires_grad:
            continue
        path = name.split('.')
        inside = id(p) in linear and not {'attn', 'self_attn', 'mlp'}.isdisjoint(path)
        if rank > 0 and (inside and p.dim() == 2 or path[-1] in ('A', 'B') and p.dim() == 3):
            projected.append((name, p))
        else:
            (matrices if p.dim() >= 2 else vectors).append((name, p))
    if rank > 0 and not projected:
        raise ValueError(f'{rank=}, but no trainable nn.Linear below attn, self_attn or mlp, and no heads: set rank=0')
    galore = dict(rank=rank, update_proj_gap=gap, scale=scale, proj_type=proj_type, basis=basis, moments=moments,
                  rule=rule, stagger=True)
    parts = (projected, weight_decay, galore), (matrices, weight_decay, {}), (vectors, 0.0, {})
    groups = [{'params': [p for _, p in part], 'param_names': [name for name, _ in part], 'weight_decay': decay, **keys}
              for part, decay, keys in parts if part]
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters() if p.requires_grad}), \
        'the groups do not partition the trainable parameters'
    return groups
