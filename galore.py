"""
GaLore (Zhao et al. 2024, arXiv 2403.03507): Adam inside a low-rank subspace of a weight's gradient.

W and its gradient G are seen as tall, (long, short). With an orthonormal basis Q (short, r)

    R = G Q  (long, r),    W <- W - lr scale rho(R) Q^T,    rho: Adam, whose moments are those of R

and now and then a new basis from gradients. (The paper transposes all: its P is this Q.)

    LowRankAdamW(model)    for models with layers of lowrank.py; G never exists
    GaLoreAdamW(groups)    for ordinary weights: galore-torch's class, and rules that need G
"""

import math
import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

from lowrank import (KINDS, is_wanted, leaf_names, lowrank_layers, named_layers,
                     refuse_sharded_layers)
from ranks import (all_rows, coded_mean, coded_same, finish_sum, first_here, gather_rows,
                   is_sharded, local, mean, mean_at, orthogonalise_rows, per_rank_tensors,
                   rank_and_world, refuse_shards, rows_here, same, where_to_draw)
from rules import (FULL, INSIDE, MOST, ORTHOGONAL, PROJECTED, SHORTEST, adam, at_a_time,
                   fused_adam_, in_pieces, is_compiled, is_fused, move_rows, muon_size, new_moments,
                   orthogonalised, read_moments, rows_of_shape, step_, sum_dtype, write_moments)

WINDOW = 5  # steps before a refresh in which its sketch is added up
FUSED = 'c_attn.weight', 'qkv.weight'  # (3 n, n): q, k and v, which are three matrices to Muon

# -----------------------------------------------------------------------------
# bases


def is_transposed(shape, proj_type='std'):
    """Whether the transpose of a matrix W (m, n) is seen as (long, short), not W itself. 'std': if
    m < n, so that the basis is on the smaller side; 'reverse_std': if m >= n; 'left': always;
    'right': never."""
    tall = shape[0] >= shape[1]
    return {'std': not tall, 'reverse_std': tall, 'left': True, 'right': False}[proj_type]


def orthonormal(Y):
    """Returns orthonormal columns that span those of Y (short, r), by QR in at least float32. The
    triangle's diagonal is made positive, so that they are unique. If Y has inf or NaN, zeros take
    its place: LAPACK gets finite numbers only."""
    Y = torch.where(torch.isfinite(Y).all(), Y, 0)
    Q, triangle = torch.linalg.qr(Y.to(sum_dtype(Y)))
    signs = torch.where(triangle.diagonal() < 0, -1, 1)
    return (Q * signs).to(Y.dtype)


def gaussian(rows, rank, like, seed):
    """A random matrix (rows, rank), standard normal, drawn from `seed`: the same on all ranks."""
    device = where_to_draw(like.device)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(rows, rank, generator=generator, dtype=torch.float32, device=device)
    if device != like.device:
        drawn = drawn.pin_memory().to(like.device, non_blocking=True)
    return drawn.to(like.dtype)


def basis_of(G, rank, transposed, basis='svd', old=None, seed=0):
    """
    An orthonormal basis (short, rank) for the gradient G (m, n) of a weight, see `is_transposed`.
    Only GaLoreAdamW calls it, as it has G; low-rank layers get theirs in LowRankAdamW._refresh.

    svd     the leading singular vectors (GaLore, algorithm 2), with signs as LAPACK has them.
    power   two steps of subspace iteration from the old basis, or from a random sketch (Halko et
            al. 2011, algorithm 4.4): two products of 2 m n rank operations and a thin QR each.
    random  an orthonormalised Gaussian, drawn anew each time, whatever the gradient is.
    Where G is zero or not finite the old basis stays; without an old one, some orthonormal basis is
    returned. Only CUDA's SVD waits for the device.
    """
    largest = torch.linalg.vector_norm(G, ord=math.inf)  # no temporary
    finite = largest.isfinite()
    tall = G.mT if transposed else G  # (long, short)
    if basis == 'svd':  # of G itself, as in galore-torch: signs of its transpose may be others
        finite_G = torch.where(finite, G, 0).to(sum_dtype(G))
        U, _, Vh = torch.linalg.svd(finite_G, full_matrices=False)
        new = U[:, :rank] if transposed else Vh[:rank].mT
    elif basis == 'power':
        new = old
        if old is None:
            start = tall.mT @ gaussian(len(tall), rank, G, seed)
            new = orthonormal(start)
        for _ in range(2):  # one step from a basis 200 steps old has 0.978 of the SVD's energy
            R = tall @ new  # (long, r)
            R = F.normalize(R, dim=0)  # squares of its columns stay in the range of float16
            new = orthonormal(tall.mT @ R)
    else:
        new = orthonormal(gaussian(tall.shape[1], rank, G, seed))
    if old is not None:
        new = torch.where(finite & (largest > 0), new, old.to(new.dtype))
    return new.to(G.dtype).contiguous()


# -----------------------------------------------------------------------------
# updates of a weight, or of this rank's rows of it


def add_(W, U, basis, transposed, lr, keep=1.0, key=0, first=0, scales=None, compile=False):
    """
    W <- keep W - lr U basis^T, in place; if transposed, W <- keep W - lr basis U^T. The product is
    added to W directly.

    In bfloat16 and in 8 bits (scales, see rules.dense) the product is formed for some rows at a
    time, and the sum is rounded at random (key, first: see rules.round_).
    """
    X, Y = (basis, U.mT) if transposed else (U, basis.mT)  # in W's own layout
    if W.dtype not in (torch.bfloat16, torch.int8):
        W.addmm_(X, Y, beta=keep, alpha=-lr)
        return
    n = W.shape[1]
    numbers = MOST if compile or isinstance(W, FakeTensor) else at_a_time(W)
    count = max(numbers // n, 1)
    for i in range(0, len(W), count):
        rows = slice(i, i + count)
        some = None if scales is None else scales[rows]
        move_(W[rows], X[rows] @ Y, lr, keep, key, first + i * n, some, compile)


def move_(W, move, lr, keep, key=0, first=0, scales=None, compile=False):
    """W <- keep W - lr move, in place; move: like W, or None; scales: see rules.dense."""
    if W.dtype in (torch.bfloat16, torch.int8) and (scales is None or move is not None):
        if scales is None and W.is_contiguous():  # flat: one compiled function for all shapes
            W, move = W.view(-1), None if move is None else move.reshape(-1)
        in_pieces(move_rows, [W, scales, move], (lr, keep), key, first, compile)
        return
    if keep != 1:
        (W if scales is None else scales).mul_(keep)
    if move is not None:
        W.add_(move, alpha=-lr)


def alike(params, rule):
    """Lists of parameters that a rule takes at once: one each; for Muon several of one shape, up to
    `most` numbers together, or, if they are sharded and this is more, one for each rank."""
    if rule not in ORTHOGONAL:
        return [[p] for p in params]
    most = 2**21 if params[0].device.type == 'cpu' else 2**24  # a CPU works in its cache
    lists = {}  # by shape
    for p in params:
        number = max(most // p.numel(), 1)
        if is_sharded(p):
            number = max(number, rank_and_world()[1])
        lists_of_shape = lists.setdefault(p.shape, [[]])
        if len(lists_of_shape[-1]) == number:
            lists_of_shape.append([])
        lists_of_shape[-1].append(p)
    return sum(lists.values(), [])


def holds_qkv(name, W):
    """Whether the weight of that name holds q, k and v, see FUSED."""
    return name.endswith(FUSED) and len(W) == 3 * W.shape[1]


def size_of_move(rule, shape, stacked):
    """What a rule's moves are multiplied by, of weights of a shape that hold `stacked` matrices."""
    m, n = shape[-2:]
    return muon_size((m // stacked, n)) if rule in ORTHOGONAL else 1.0


# -----------------------------------------------------------------------------
# the drop-in optimizer


def fill_in(group):
    """Sets what a group of parameters leaves out."""
    rule = group.get('rule')
    defaults = dict(state_bits=None)
    if 'rank' in group:
        defaults.update(rule='galore', basis='svd', proj_type='std', update_proj_gap=200,
                        scale=0.25)  # as in galore-torch
    elif rule in FULL:
        defaults.update(dim=1, momentum=0.0, stacked=1)
    if rule == 'apollo':
        defaults['basis'] = 'random'
    if rule == 'muon':
        defaults['momentum'] = 0.95
    for key, value in defaults.items():
        group.setdefault(key, value)


def refuse_values(group):
    """ValueError: a setting of a group makes no sense."""
    known = dict(state_bits=(None, 32, 16, 8), rule=('adamw', *FULL))
    if 'rank' in group:
        known.update(rule=tuple(PROJECTED), basis=('svd', 'power', 'random'),
                     proj_type=('std', 'reverse_std', 'left', 'right'))
    if group.get('rule') == 'apollo' and group['basis'] != 'random':
        raise ValueError(f"basis={group['basis']!r}, but rule='apollo' draws its bases: set "
                         "basis='random'")
    for key in known.keys() & group.keys():
        if group[key] not in known[key]:
            rank, words = group.get('rank'), ', '.join(map(repr, known[key]))
            raise ValueError(f'{key}={group[key]!r} is not known, with {rank=}: set one of {words}')
    lr, betas, eps, weight_decay = (group[key] for key in ('lr', 'betas', 'eps', 'weight_decay'))
    if not all(x >= 0 for x in (lr, eps, weight_decay, *betas)) or max(betas) >= 1:
        raise ValueError(f'{lr=}, {eps=}, {weight_decay=} must be at least 0, {betas=} below 1')
    if not group['correct_bias']:
        raise ValueError('correct_bias=False is not supported: leave it out, or take '
                         "galore-torch's class")
    if not 0 <= group.get('momentum', 0) < 1:
        raise ValueError(f"momentum={group['momentum']!r} must be in [0, 1)")
    for key in {'rank', 'update_proj_gap'} & group.keys():
        if not (isinstance(group[key], int) and group[key] >= 1):
            raise ValueError(f'{key}={group[key]!r} must be an integer of at least 1')


def refuse_shapes(group, names):
    """ValueError: a parameter is no matrix where its rule wants one, is sharded where dim=0 or a
    rank is given, or is in shards of another kind."""
    refuse_shards(dict(zip(names, group['params'])))
    wants_matrices = 'rank' in group or group.get('rule') in FULL
    for name, p in zip(names, group['params']):
        if is_sharded(p) and ('rank' in group or group.get('dim') == 0):
            raise ValueError(f'{name}: columns of a gradient are wanted, of which ranks hold rows: '
                             "take rule='adamw' or 'muon' and no rank")
        if wants_matrices and p.dim() != 2:
            raise ValueError(f'{name} of shape {tuple(p.shape)} is no matrix: put it into a group '
                             'without rank and rule')
        if wants_matrices and len(p) % group.get('stacked', 1):
            raise ValueError(f"{name} of shape {tuple(p.shape)} does not hold stacked="
                             f"{group['stacked']} matrices, one above the other")


def say_what_differs(group, names):
    """Says which matrices have a smaller rank than was asked for, or moments of 32 bits instead of
    8."""
    clamped, short = [], []
    for name, p in zip(names, group['params']):
        if group.get('rank', 0) > min(p.shape, default=1):
            clamped.append(f'{name} {tuple(p.shape)}')
        row = group.get('rank') or rows_of_shape(p.shape)[1]  # numbers of a row of a moment
        if p.dim() > 1 and row < SHORTEST:
            short.append(name)
    if clamped:
        what = clamped[0] if len(clamped) == 1 else f'{clamped[0]} and {len(clamped) - 1} more'
        warnings.warn(f"galore: rank {group['rank']} is clamped to the smaller side of {what}")
    has_moments = group.get('momentum', 1) > 0
    if short and group['state_bits'] == 8 and has_moments and rank_and_world()[0] == 0:
        print(f'moments of {len(short)} matrices, such as {short[0]}, stay in 32 bits: their rows '
              f'have fewer than {SHORTEST} numbers')


class GaLoreAdamW(torch.optim.Optimizer):
    """
    AdamW, inside the gradient's leading subspace for the groups that have a `rank`.

    Drop-in for the class of that name in galore-torch 1.0, with its arithmetic: eps before the bias
    correction, decay after the update, moments kept over a refresh. A group with `rank` also takes
    the keys `update_proj_gap` (steps between refreshes), `scale` (multiplies lr) and `proj_type`
    (see `is_transposed`), as there, and our own `basis` (see `basis_of`) and `rule` (one of
    rules.PROJECTED), all optional. A group without `rank` follows AdamW with the same arithmetic;
    with rule='adamw', AdamW as in torch; with a `rule` of rules.FULL, that rule and its `momentum`
    (0 keeps no moment); rule='muon' takes each weight as `stacked` matrices, one above the other.
    Any group: `state_bits` (see rules.new_moments).

    per_layer: when a parameter's gradient is complete, the backward pass averages it over ranks
    (not for parameters in `per_rank`), updates the parameter, and frees the gradient. The
    parameters stay out of DDP (`outside_ddp`), and `begin` says which backward pass of a step is
    the last. No later optimizer of this class accepts them. per_rank: parameters of which each rank
    has its own, such as replicas: each rounds them with random bits of its own. seed: for random
    bases and rounding. compile: whether steps in 16 and 8 bits are compiled, see rules.in_pieces;
    None: on GPUs that can. no_deprecation_warning has no effect. Raises ValueError for a setting
    that makes no sense or is not supported (correct_bias=False, proj_type='full'); a rank above the
    smaller side of a matrix is clamped, with a warning.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0,
                 correct_bias=True, no_deprecation_warning=False, seed=0, per_layer=False,
                 per_rank=(), compile=None):
        self.seed, self.per_layer, self.per_rank = seed, per_layer, set(per_rank)
        self.compile = compile
        self.is_last = True  # whether this is the last micro-batch of a step, see `begin`
        self.begun = None  # the step that `begin` was called with
        self.is_fresh = False  # `begin` was called since the last step
        self.completed = set()  # per_layer: what stepped since `begin`, or, without it, `step`
        self.again = None  # per_layer: a parameter that got a second gradient in one step
        self.most = 0  # per_layer: the largest number of parameters that stepped in one step
        self.kept_bases = 0  # the number of refreshes that kept the old basis, on the device
        self.names = {}  # {parameter: its name}
        self.index = {}  # {parameter: how many were added before it}: it seeds its bases
        self.group_of = {}  # {parameter: the number of its group}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias))

    @property
    def outside_ddp(self):
        """The parameters whose gradients are averaged over ranks here and not by DDP."""
        if not self.per_layer:
            return set()
        return set(self.index)

    @property
    def _step_supports_amp_scaling(self):
        """torch's name: a GradScaler then leaves its work to `step`, which refuses it."""
        return self.per_layer

    def add_param_group(self, group):
        super().add_param_group(group)
        group = self.param_groups[-1]
        first = len(self.index)
        numbered = [f'parameter {first + i}' for i in range(len(group['params']))]
        names = group.get('param_names') or numbered
        fill_in(group)
        self._choose_compile(group)
        refuse_values(group)
        refuse_shapes(group, names)
        say_what_differs(group, names)
        for name, p in zip(names, group['params']):
            self.names[p], self.index[p] = name, len(self.index)
            self.group_of[p] = len(self.param_groups) - 1
            hooks = p._post_accumulate_grad_hooks or {}  # it has no public name
            owners = [getattr(hook, '__self__', None) for hook in hooks.values()]
            if any(isinstance(owner, GaLoreAdamW) for owner in owners):
                raise ValueError(f'{name} is stepped in the backward pass by an earlier optimizer '
                                 '(per_layer=True), which would go on: build the model anew')
            if self.per_layer and not p.requires_grad:
                raise ValueError(f'{name} is frozen, and per_layer=True steps when a gradient '
                                 'comes: leave it out')
            if self.per_layer:
                p.register_post_accumulate_grad_hook(self._complete)

    def _choose_compile(self, group):
        """Sets group['compile'] for this machine; the value in a checkpoint is not used."""
        for p in group['params'][:1]:  # a group may be empty
            group['compile'] = is_compiled(self.compile, p.device)

    def begin(self, step, micro_step=0, micro_steps=1):
        """To be called before each forward pass: which micro-batch of which step, from 0.
        ValueError: per_layer, and the step has been made already."""
        self._refuse_twice()
        # a pass that has failed may be made again
        if step == self.begun and len(self.completed) >= (self.most or len(self.index)):
            raise ValueError(f'begin({step}) again, and per_layer=True has made that step: say '
                             'which backward pass is the last one, by begin(step, micro_step, '
                             'micro_steps)')
        self.is_last = micro_step == micro_steps - 1
        self.begun = step
        self.is_fresh = True
        self.most = max(self.most, len(self.completed))
        self.completed.clear()

    def _seed(self, p, *counts):
        return hash((self.seed, self.index[p], *counts)) % 2**32  # torch uses 32 bits of a seed

    def _first(self, p):
        """The index of this rank's first number of p, see rules.round_. Where each rank has its own
        p, numbers are counted rank after rank: with the same random bits ranks would make the same
        rounding errors, and an average over ranks would keep them."""
        if p in self.per_rank:
            return rank_and_world()[0] * p.numel()
        return first_here(p)

    @torch.no_grad()
    def _complete(self, p):
        """per_layer: one parameter's update, when the last micro-batch has brought its gradient."""
        if not self.is_last or p.grad is None:  # the hook runs without one too
            return
        if p in self.completed and self.begun is not None:  # galore-torch's loops have no `begin`
            self.again = p  # an error here would end DDP's process without a word
            return
        if p not in self.per_rank:
            mean(p.grad)
        self._update([p], self.param_groups[self.group_of[p]])
        p.grad = None
        self.completed.add(p)

    def _refuse_twice(self):
        late = [p for p in self.completed if p.grad is not None]  # DDP sets them after the hooks
        if late or self.again is not None:
            name = self.names[late[0] if late else self.again]
            raise ValueError(f'{name} got two gradients in one step, and '
                             'per_layer=True has stepped on the first: call begin before each '
                             'backward pass, and ranks.keep_out_of_ddp(model, '
                             'optimizer.outside_ddp) before DistributedDataParallel wraps the '
                             'model, or leave DDP out if nothing else trains')

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss, or None. Parameters without a gradient are left
        alone."""
        self._refuse_twice()
        if getattr(self, 'grad_scale', None) is not None:  # set by a GradScaler
            raise ValueError('per_layer=True steps in the backward pass, before a GradScaler has '
                             'unscaled gradients: train in bfloat16 or float32 without one')
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if self.per_layer:  # its last micro-batch did not come: it is not averaged yet
                for p in params:
                    if p not in self.per_rank:
                        mean(p.grad)
            if params:
                self._update(params, group)
        self.is_fresh = False
        if self.begun is None:
            self.completed.clear()
        return loss

    def _update(self, params, group):
        """One step on parameters of a group."""
        if 'rank' in group:
            for W in params:
                self._projected(W, self.state[W], group)
        elif group.get('rule') in FULL:
            for some in alike(params, group['rule']):
                self._full(some, group)
        else:
            self._adamw(params, group)

    def _adamw(self, params, group):
        """AdamW. By rule='adamw' as in torch: eps after the bias correction, decay before the
        update. Else as in galore-torch: eps before the bias correction, decay after the update."""
        lr, betas, eps, decay = (group[key] for key in ('lr', 'betas', 'eps', 'weight_decay'))
        keep = 1.0 - lr * decay
        as_torch = 'rule' in group
        if not as_torch and lr * keep:  # keep (W - lr rho)
            lr = lr * keep
            decay = (1.0 - keep) / lr
        fused = {}  # lists of tensors of one dtype and age, as torch's kernel takes them
        for param in params:
            state, p, grad = self.state[param], local(param), local(param.grad)
            if 'step' not in state:
                new_moments(state, p, group['state_bits'])
                state['step'] = 0
            state['step'] += 1
            age = state['step']
            correction = math.sqrt(1 - betas[1] ** age)
            strides = {grad.stride(), p.stride(), state['exp_avg'].stride()}
            if is_fused(p, state) and len(strides) == 1:
                after = eps if as_torch else eps / correction
                lists = fused.setdefault((p.dtype, age, after), ([], [], [], []))
                for x, some in zip((p, grad, state['exp_avg'], state['exp_avg_sq']), lists):
                    some.append(x)
            else:
                before = eps * correction if as_torch else eps
                key = self._seed(param, age, 0)
                step_(p, grad, state, lr, keep, betas, before, key, self._first(param),
                      group['compile'])
        for (_, age, after), lists in fused.items():
            fused_adam_(*lists, age, lr, betas, after, decay)

    def _basis(self, W, state, group, transposed):
        """The basis (short, r) of a step, a new one where it is due."""
        rank = min(group['rank'], *W.shape)
        period, since = divmod(state['step'], group['update_proj_gap'])
        if 'basis' in state:  # it may be that of a model in another dtype
            state['basis'] = state['basis'].to(W.grad.dtype)
        if group['rule'] == 'apollo':  # drawn again in each step: it takes no memory
            short = W.shape[0] if transposed else W.shape[1]
            drawn = gaussian(short, rank, W, self._seed(W, period))
            return drawn.div_(math.sqrt(rank))
        if since == 0:
            state['basis'] = basis_of(W.grad, rank, transposed, group['basis'], state.get('basis'),
                                      self._seed(W, state['step']))
        return state['basis']

    def _projected(self, W, state, group):
        """W <- (1 - lr decay) (W - lr scale rho(R) Q^T), or as the group's rule says, in place."""
        state.setdefault('step', 0)
        transposed = is_transposed(W.shape, group['proj_type'])
        basis = self._basis(W, state, group, transposed)
        G = W.grad.mT if transposed else W.grad  # (long, short)
        R = G @ basis  # (long, r)
        state['step'] += 1
        key = self._seed(W, state['step'], 0)
        keep = 1.0 - group['lr'] * group['weight_decay']
        lr = group['lr'] * keep  # as galore-torch decays after the update
        first, compile = self._first(W), group['compile']
        rule = PROJECTED[group['rule']]
        if rule is None:
            N = adam(R, state, group, key, first)  # (long, r), in the place of R
            add_(W, N, basis, transposed, lr * group['scale'], keep, key + 1, first,
                 compile=compile)
            return
        N = adam(R.clone(), state, group, key, first)
        move = rule(G, R, N, basis, state, group)  # (long, short)
        move = move.mT if transposed else move
        move_(W, move, lr, keep, key + 1, first, compile=compile)

    def _full(self, params, group):
        """W <- (1 - lr decay) W - lr times what a rule of FULL makes of the gradient, in place."""
        keep = 1.0 - group['lr'] * group['weight_decay']
        lr = group['lr'] * size_of_move(group['rule'], params[0].shape, group['stacked'])
        for W, move in zip(params, self._moves(FULL, group['rule'], params, group)):
            key = self._seed(W, self.state[W]['step'], 0)
            move_(local(W), move, lr, keep, key + 1, self._first(W), None, group['compile'])

    def _moves(self, rules, name, params, group):
        """The moves of parameters of one shape by rules[name]; if they are sharded, this rank's
        rows of the moves. The caller multiplies them by `size_of_move`."""
        moves = []
        for p in params:
            state = self.state[p]
            state['step'] = state.get('step', 0) + 1
            key = self._seed(p, state['step'], 0)
            moves.append(rules[name](local(p.grad), state, group, key, self._first(p)))
        if name not in ORTHOGONAL:
            return moves
        # all at once: small products would wait for their launches
        p = params[0]
        moves = torch.stack(moves)  # (matrices, rows here, columns)
        if is_sharded(p) and p.dim() == 2:
            return orthogonalise_rows(moves, len(p), group['stacked'])
        # of a sharded factor ranks have whole heads
        moves = moves.unflatten(-2, (group['stacked'], -1))  # (matrices, stacked, rows, columns)
        return orthogonalised(moves).flatten(-3, -2)

    def state_bytes(self):
        """Bytes of all tensors in the state, bases included."""
        return sum(x.nbytes for state in self.state.values() for x in state.values()
                   if torch.is_tensor(x))

    def load_state_dict(self, state_dict):
        """Loads as torch does, but tensors of the state keep the dtype that they were saved in.
        ValueError: it is the state of galore-torch's class, which keeps objects for bases, or of
        groups with another rank or rule."""
        if any('projector' in state for state in state_dict['state'].values()):
            raise ValueError("this is the state of galore-torch's class, which keeps its bases in "
                             'objects of its own: begin with a new state')
        for group, theirs in zip(self.param_groups, state_dict['param_groups']):
            for key in ('rank', 'rule', 'inside'):  # torch would put theirs in place of ours
                if group.get(key) != theirs.get(key):
                    raise ValueError(f'the state is of a group with {key}={theirs.get(key)!r}, and '
                                     f'here it is {group.get(key)!r}: build the optimizer as it '
                                     'was, or begin with a new state')
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group['params']]
        for group in self.param_groups:
            self._choose_compile(group)
        numbers = [i for group in state_dict['param_groups'] for i in group['params']]
        for p, i in zip(params, numbers):
            for key, x in state_dict['state'].get(i, {}).items():
                if torch.is_tensor(x):
                    self.state[p][key] = x.to(p.device)
        self.state_is_loaded()

    def state_is_loaded(self):
        """To be called where the state has come from outside."""
        self.completed.clear()
        self.begun = self.again = None


# -----------------------------------------------------------------------------
# the optimizer of models with low-rank layers


def steps_to_refresh(step, every, merge_every, block, blocks):
    """The number of steps from `step` (from 0) until block number `block` of `blocks` takes new
    bases; 0: it takes them in this step. Blocks take turns in a period of `every` steps, so that
    the work is spread; a basis changes only after a merge."""
    first = block * (every // merge_every) // blocks * merge_every
    return (first - step) % every


def numbers_of_blocks(names):
    """({name of a layer: the number of its block}, how many blocks there are). 'h.3.attn.c_proj' is
    of block 'h.3'; a name without a number is a block of its own."""
    block_of = {}
    for name in names:
        found = re.match(r'(.*?\.\d+)\.', name)
        block_of[name] = found[1] if found else name
    blocks = list(dict.fromkeys(block_of.values()))
    return {name: blocks.index(block) for name, block in block_of.items()}, len(blocks)


class LowRankAdamW(GaLoreAdamW):
    """
    AdamW for all that a model trains, and GaLore for its layers with factors='basis'.

    The .grad of such a layer's leaf is the projected gradient R. With a merge every step, Adam's
    move of R goes straight into W; with a merge every T steps (GaLoLTE) it goes into the factor,
    and sync_moments averages first moments over heads and ranks after a merge, so that heads drift
    apart less. rule: one of rules.INSIDE, 'galore' (Adam) or 'muon', with `momentum` (0 keeps no
    moment), to which FUSED weights are three matrices. Groups: see `param_groups`. scale multiplies
    lr inside a basis (None: 0.25, for Muon 1); eps is 1e-6 there, as in galore-torch. state_bits,
    per_layer: see GaLoreAdamW. sync_bits: below 32, sketches and first moments of split heads are
    averaged in few bits; for merges in few bits see lowrank.merge. replicas: parameters of which
    each rank trains its own copy (lowrank.replica_parameters). A layer takes a new basis every
    basis_every steps, one block of the model after the other, and its moments are rotated to it:

    basis='sketch'  one step of subspace iteration on the second moment of the gradients of single
                    sequences (`lowrank.second_moment`), summed over the last WINDOW steps.
    basis='random'  drawn anew, as the first bases of 'sketch' are.

    The loop calls `begin` before each forward pass, and for T > 1 lowrank.merge every T steps: a
    new basis would rotate what is not merged. After a step .grad of a layer's leaf holds Adam's
    move: measure gradients before it.
    """

    def __init__(self, model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=None,
                 basis='sketch', basis_every=200, rule='galore', state_bits=None, seed=0,
                 per_layer=False, sync_bits=32, sync_moments=True, momentum=0.95, replicas=(),
                 compile=None):
        if rule not in INSIDE:
            raise ValueError(f"{rule=} is not one of {', '.join(map(repr, INSIDE))}")
        if not basis_every >= 1:
            raise ValueError(f'{basis_every=} must be at least 1')
        if basis not in ('sketch', 'random'):
            raise ValueError(f"{basis=} wants the gradient of W, which layers with factors='basis' "
                             "never form: set basis='sketch' or 'random', or train without such "
                             "layers by GaLoreAdamW (optimizer='galore')")
        refuse_sharded_layers(model)
        in_basis = {name: layer for name, layer in named_layers(model).items()
                    if layer.factors == 'basis'}
        if rule != 'galore' and not in_basis:
            raise ValueError(f"{rule=} is for layers with factors='basis', and the model has none: "
                             'call apply_mhlora before')
        if scale is None:
            scale = 1.0 if rule in ORTHOGONAL else 0.25
        found = {name: layer for name, layer in in_basis.items() if layer.factor.requires_grad}
        for name, layer in found.items():
            if layer.moves_weight and is_sharded(layer.weight) and layer.factor_rows is None:
                raise ValueError(f"'{name}' is in shards, and its basis is not: shard the model by "
                                 'ranks.shard')
            if basis_every % layer.merge_every:
                raise ValueError(f'{basis_every=} is no multiple of merge_every='
                                 f'{layer.merge_every}: bases are taken at merges, set one')
        self.layers = {layer.leaf: layer for layer in found.values()}  # by what is stepped on
        numbers, self.blocks = numbers_of_blocks(found)
        self.block_of = {layer.leaf: numbers[name] for name, layer in found.items()}
        self.basis, self.basis_every = basis, basis_every
        self.sync_bits, self.sync_moments = sync_bits, sync_moments
        self.is_loaded = True  # the state is new or loaded, and no step has begun since
        self.is_warned = False
        self.unmerged = {}  # {parameter: how often its layer was merged before its last step}
        names = leaf_names(model)
        groups = param_groups(model, weight_decay, state_bits=state_bits,
                              leave={layer.factor for layer in found.values()})
        leaves = {}  # by how many matrices their weights hold
        for name, layer in found.items():
            is_fused_qkv = rule in ORTHOGONAL and holds_qkv(f'{name}.weight', layer.weight)
            leaves.setdefault(3 if is_fused_qkv else 1, []).append(layer.leaf)
        for stacked, params in leaves.items():
            # eps before the correction is larger than torch's 1e-8, as in galore-torch
            groups.append({'params': params, 'param_names': [names[p] for p in params],
                           'weight_decay': weight_decay, 'eps': 1e-6, 'scale': scale,
                           'inside': rule, 'stacked': stacked, 'state_bits': state_bits,
                           'momentum': momentum})
        if not groups:
            raise ValueError('nothing is to train: all parameters are frozen')
        super().__init__(groups, lr, betas, eps, weight_decay, seed=seed, per_layer=per_layer,
                         per_rank=per_rank_tensors(lowrank_layers(model)) | {*replicas},
                         compile=compile)

    @torch.no_grad()
    def begin(self, step, micro_step=0, micro_steps=1):
        """
        See GaLoreAdamW. In micro-batch 0 it drops a sum that a failed pass left running, averages
        first moments after a merge, takes due bases, and opens or closes windows.

        ValueError: the number of the step is below that of the last call, or that step was made; or
        a new basis is due and a layer was not merged since its last step.
        """
        is_again = step == self.begun
        is_late = is_again and not (self.is_fresh or self.per_layer)  # see GaLoreAdamW.begin
        if self.layers and self.begun is not None and (step < self.begun or is_late):
            raise ValueError(f'begin({step}) comes after step {self.begun}: new bases are due by '
                             'the number of the step, so count steps over all epochs')
        super().begin(step, micro_step, micro_steps)
        if micro_step:
            return
        finish_sum(drop=True)
        for p, layer in self.layers.items():
            state = self.state[p]
            self._open_state(layer, state)
            T = layer.merge_every
            if self.sync_moments and T > 1 and step % T == 0 and 'exp_avg' in state:
                self._average_moments(p, layer, state)
            wait = steps_to_refresh(step, self.basis_every, T, self.block_of[p], self.blocks)
            if (wait == 0 and not is_again) or not state['bases']:
                if self.unmerged.get(p) == layer.merges:
                    raise ValueError(f'begin({step}) takes new bases, and a layer was not merged '
                                     'since its last step: call lowrank.merge after every step '
                                     f'whose number plus 1 is a multiple of merge_every={T}')
                self._refresh(p, layer, state)
            self._open_window(layer, state, wait)
        self.is_loaded = False

    def _open_state(self, layer, state):
        """Makes a layer's state, or takes over what backward passes have left in its sketch.
        ValueError: the state was loaded, and its bases were not."""
        if not state:
            state.update(step=0, bases=0)  # bases: how many were taken
        if layer.sketch is not None:
            state['sketch'] = layer.sketch.grad
        basis = local(layer.basis)
        # only once: `any` waits for the device
        if self.is_loaded and state['bases'] and basis.numel() and not basis.any():
            raise ValueError("the optimizer's state was loaded, and not the bases that it is of: "
                             "load the model's state_dict, not the merged one, or leave that of "
                             'the optimizer')

    def _refresh(self, p, layer, state):
        """A new basis (short, r) for a layer, the same bits on all ranks; moments are rotated to
        it."""
        old = all_rows(layer.basis)  # (short, r)
        if self.basis == 'random' or not state['bases']:  # nothing is known of gradients yet
            seed = self._seed(p, state['bases'])
            new = orthonormal(gaussian(*old.shape, layer.basis, seed))
        elif 'sketch' in state:
            # one step of subspace iteration: backward passes have multiplied by the old basis, see
            # lowrank.second_moment
            Y = self._average_sketch(p, layer, state['sketch'])
            new = orthonormal(Y).to(old.dtype)
            is_good = Y.isfinite().all() & Y.any()
            new = torch.where(is_good, new, old)  # without waiting
            self.kept_bases = self.kept_bases + ~is_good
        else:  # no sketch, as a resumed run had other windows: the old basis stays
            return
        # devices may round differently, and merges never send a basis: all take that of one rank
        if self._is_coded(layer):
            new = coded_same(self._owner(p), new.mT, 8).mT
        else:
            new = same(new.contiguous())
        self._rotate_moments(p, state, old, new)
        local(layer.basis).copy_(new[rows_here(layer.basis)])  # of shards this rank's rows
        state['bases'] += 1

    def _average_sketch(self, p, layer, Y):
        """Averages sketches Y (parts, short, r) over their parts and over ranks: (short, r). If
        few bits are sent, only the rank `_owner` gets the average."""
        if self._is_coded(layer):  # each direction has blocks of its own
            return mean_at(self._owner(p), Y.mT, layer.workers).mT
        return mean(Y.mean(0))

    def _rotate_moments(self, p, state, old, new):
        """Rotates moments from the old basis to the new one: M C and V (C * C), C = old^T new
        (r, r). V (C * C) assumes that coordinates are uncorrelated."""
        C = old.mT.to(sum_dtype(old)) @ new.to(sum_dtype(old))  # (r, r)
        if 'exp_avg' in state:
            moments = [x.view(local(p).shape) for x in read_moments(state)]  # (long, r)
            # of Muon there is the first one alone
            moments = [x @ factor.to(x.dtype) for x, factor in zip(moments, (C, C.square()))]
            write_moments(state, moments, self._seed(p, state['step'], 2), self._first(p))
        if 'error' in state:  # what merges have left: it is rotated as first moments are
            E = state['error']
            E.copy_(E @ C.to(E.dtype))

    def _open_window(self, layer, state, wait):
        """Sketches are added up in the last WINDOW steps before a refresh: backward passes add to a
        tensor of the optimizer's state."""
        is_inside = self.basis == 'sketch' and (wait or self.basis_every) <= WINDOW
        if wait == 0 or not is_inside:  # a resumed run may have another basis, or other windows
            layer.sketch = None
            state.pop('sketch', None)
        if is_inside and layer.sketch is None:
            layer.ask_sketch(self.sketch_parts(layer))
            state['sketch'] = layer.sketch.grad  # torch's state_dict has it, too

    def sketch_parts(self, layer):
        """The number of parts of a layer's sketch: 1, or, if it is sent in few bits, one for each
        head here, so that rounding is the same on any number of ranks."""
        if self._is_coded(layer):
            return layer.heads_here
        return 1

    def _average_moments(self, p, layer, state):
        """First moments after a merge: averaged over heads and ranks, in 3 bits or more."""
        M = read_moments(state)[0].view(local(p).shape)  # (heads here, long, r)
        if self._is_coded(layer):
            average = coded_mean(M.mT, max(self.sync_bits, 3), layer.workers).mT
        else:
            average = mean(M.mean(0), layer.workers)
        write_moments(state, [average.expand_as(M)], self._seed(p, state['step'], 1),
                      self._first(p))

    def _is_coded(self, layer):
        """Whether averages of a layer are sent in few bits."""
        return layer.split and self.sync_bits < 32

    def _owner(self, p):
        """The rank whose new basis of a layer all ranks take, if few bits are sent."""
        return self.index[p] % self.layers[p].workers

    def state_is_loaded(self):
        """Windows that were open go on."""
        super().state_is_loaded()
        self.is_loaded = True
        self.unmerged.clear()
        for p, layer in self.layers.items():
            layer.sketch = None
            if 'sketch' in self.state[p]:
                sums = self.state[p]['sketch']
                layer.ask_sketch(len(sums), sums)
                self.state[p]['sketch'] = layer.sketch.grad

    def _update(self, params, group):
        if 'inside' not in group:
            return super()._update(params, group)
        for p in params:
            if not self.state[p].get('bases'):
                raise ValueError('a layer has no basis yet: call optimizer.begin(step) before the '
                                 'forward pass')
        if not (self.is_fresh or self.per_layer or self.is_warned):
            warnings.warn('LowRankAdamW.step without begin(step) before it: bases, and moments '
                          'after merges, stay as they are')
            self.is_warned = True
        keep, compile = 1.0 - group['lr'] * group['weight_decay'], group['compile']
        lr = group['lr'] * group['scale'] * keep  # as in GaLoreAdamW: decay after the update
        for some in alike(params, group['inside']):
            size = size_of_move(group['inside'], some[0].shape, group['stacked'])
            for p, move in zip(some, self._moves(INSIDE, group['inside'], some, group)):
                layer = self.layers[p]
                key = self._seed(p, self.state[p]['step'], 0)
                if layer.moves_weight:  # GaLore
                    self._apply(layer, move.to(p.dtype), lr * size, keep, key + 1, compile)
                else:  # GaLoLTE: a merge puts the factor into W
                    if keep != 1:
                        move_(local(layer.weight), None, 0.0, keep, key + 1,
                              first_here(layer.weight), layer.scales_here, compile)
                    move_(local(p), move, lr * size, keep, key + 2, self._first(p), None, compile)
                    self.unmerged[p] = layer.merges

    def _apply(self, layer, U, lr, keep, key, compile):
        """W <- keep W - lr U Q^T, for this rank's rows of W, from its rows of U."""
        W, transposed = layer.weight, is_transposed(layer.weight.shape)
        basis = local(layer.basis) if transposed else all_rows(layer.basis)
        if is_sharded(W) and transposed:  # rows of W are rows of the basis, not of U
            U = gather_rows(U, W.shape[1])
        add_(local(W), U, basis, transposed, lr, keep, key, first_here(W), layer.scales_here,
             compile)

    def state_bytes(self):
        """Bytes of all tensors in the state, and of the layers' bases."""
        bases = [local(layer.basis) for layer in self.layers.values()]
        return super().state_bytes() + sum(basis.nbytes for basis in bases)


# -----------------------------------------------------------------------------
# from a model


def param_groups(model, weight_decay=0.0, rank=0, gap=200, scale=0.25, basis='svd', rule='galore',
                 state_bits=None, momentum=0.95, leave=()):
    """
    The trainable parameters of a model as groups for GaLoreAdamW, or, with rank 0, torch's AdamW.

    With a rank, or a rule of rules.FULL, the matrices of attention and MLP (weights of nn.Linear
    below a module of lowrank.KINDS) follow the rule; with rule='scale' the output layer and
    embeddings do, too. It prints how many of all matrices follow it. Others follow AdamW: matrices
    get weight_decay; vectors, and names in the model's own no_weight_decay() (timm), get none. Each
    group has `param_names`; one with a rank has the eps of galore-torch, 1e-6; by rule='muon' that
    of FUSED weights has stacked=3. A tied embedding is an output layer. leave: parameters to leave
    out. ValueError: the rule is unknown or has no matrix, or no rank, or a rank that it does not
    use; or factors are always zero, on which only LowRankAdamW steps.
    """
    leave = set(leave)  # `in` would compare the numbers of tensors in a list
    if rule not in PROJECTED | FULL:
        raise ValueError(f"{rule=} is not one of {', '.join(map(repr, PROJECTED | FULL))}")
    if rule in FULL and rank:
        raise ValueError(f'{rule=} is for whole gradients, and {rank=}: leave the rank out')
    if rule in PROJECTED and rule != 'galore' and not rank:
        raise ValueError(f'{rule=} is for gradients in a basis: set its rank')
    zeros = {layer.factor for layer in lowrank_layers(model) if layer.moves_weight}
    if any(p.requires_grad and p not in leave for p in zeros):
        raise ValueError("layers with factors='basis' that are merged every step are no ordinary "
                         'parameters: use galore.LowRankAdamW(model)')
    named = dict(model.named_modules())
    linears = {name: module.weight for name, module in named.items()
               if isinstance(module, nn.Linear)}
    output = {p for name, p in linears.items() if is_wanted(name, ['logit'])}
    linears = {*linears.values()}
    embeddings = {module.weight for module in named.values()
                  if isinstance(module, nn.Embedding)}
    # of a ViT, whatever wraps it: of places, and the class token
    spared = {f'{inside}.{name}'.lstrip('.') for inside, module in named.items()
              if callable(getattr(module, 'no_weight_decay', None))
              for name in module.no_weight_decay()}
    ruled = rank > 0 or rule in FULL

    def part_of(name, p):
        if ruled and p in linears and is_wanted(name, ['attn', 'mlp']):
            return 'fused' if rule in ORTHOGONAL and holds_qkv(name, p) else 'ruled'
        if rule == 'scale' and p in output:
            return 'output'
        if rule == 'scale' and p in embeddings:
            return 'embeddings'
        if p.dim() >= 2 and name not in spared:
            return 'matrices'
        return 'vectors'

    kinds = 'ruled', 'fused', 'output', 'embeddings', 'matrices', 'vectors'
    parts = {part: {} for part in kinds}
    for name, p in model.named_parameters():  # lists tied parameters once
        if p.requires_grad and p not in leave:
            parts[part_of(name, p)][name] = p
    if ruled and not parts['ruled'] | parts['fused']:
        if any(type(module).__name__ == 'Conv1D' for module in named.values()):
            raise ValueError(f"{rule=} and {rank=}, but transformers' Conv1D is no nn.Linear: load "
                             'the weights into model.GPT')
        below = ', '.join(KINDS['attn'] + KINDS['mlp'])
        raise ValueError(f'{rule=} and {rank=}, but no trainable nn.Linear below {below}: take '
                         'AdamW (rank=0), or name your modules in lowrank.KINDS')
    if ruled and rank_and_world()[0] == 0:
        found = sum(len(parts[part]) for part in ('ruled', 'fused', 'output', 'embeddings'))
        others = sum(p.dim() == 2 for p in parts['matrices'].values())
        print(f'{rule} on {found} of {found + others} matrices')
    if rule in FULL:
        keys = dict(rule=rule, momentum=0.0 if rule == 'scale' else momentum)
    else:
        keys = dict(rank=rank, update_proj_gap=gap, scale=scale, basis=basis, rule=rule, eps=1e-6)
    keys_of = dict(ruled=keys, fused=dict(keys, stacked=3), output=dict(keys, momentum=0.9),
                   embeddings=dict(keys, dim=0), matrices=dict(rule='adamw'),
                   vectors=dict(rule='adamw', weight_decay=0.0))
    groups = []
    for part, params in parts.items():
        group = dict(weight_decay=weight_decay, state_bits=state_bits)
        group.update(keys_of[part], params=[*params.values()], param_names=[*params])
        if params:
            groups.append(group)
    return groups
