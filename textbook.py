"""
Low-rank training, written down: every method of config/methods in plain PyTorch, rule by rule.

Read it from top to bottom. `python textbook.py` trains a tiny language model by each method.
Nothing here saves time or memory. The fast code has to compute the same.
A number such as 2106.09685 is that of a paper on arxiv.org.

    W (m, n)  a weight, y = W x       A (r, n), B (m, r)  a head: B A, a change of W of rank r
    G (m, n)  its gradient dL/dW      Q (n, r)            a basis: r directions, orthonormal
    M, V      Adam's two averages     R (m, r)            G Q, the gradient in that basis

A rule is a function (G, state, s) -> move; a step is W <- W - learning_rate * move. `state` is what
a rule remembers of one weight until the next step: the memory that all of this is about. Steps t
count from 0. What stands in

    s         the settings of a method, see DEFAULTS in part 7; s.factors says what trains: '' W,
              'both' A and B, 'B' B alone, 'basis' W in a basis; and lists of names, see `plan`
    w         a worker, part 3: w.W, w.A, w.B {name: tensor}, w.state {('W', name): state}
"""

import functools
import math
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.func import grad_and_value, vmap

# 1. A layer, its gradient, and Adam ---------------------------------------------------------------
# A layer computes y = W x for each token. The chain rule gives G as the sum of all dL/dy x^T.

def gradients(forward, W, x, y):
    """The gradient of each sequence, {name: (sequences, m, n)}, and the loss. They are scaled so
    that their mean is G; only `sketch`, in part 4, wants them one by one."""
    share = len(y) / (y != -100).sum()  # targets of -100, those of prompts, do not count

    def loss_of(W, x, y):
        logits = forward(W, x[None]).flatten(0, -2)  # (time, words)
        return share * F.cross_entropy(logits, y.flatten(), reduction='sum')
    G, losses = vmap(grad_and_value(loss_of), in_dims=(None, 0, 0))(W, x, y)
    return G, losses.mean()

def average(state, key, x, beta):
    """A running average of x. It begins at zero."""
    old = state.get(key, 0)
    state[key] = beta * old + (1 - beta) * x
    return state[key]

def adam(G, state, s):
    """Adam (1412.6980, algorithm 1): the mean gradient, each number divided by its usual size."""
    state['t'] = t = state.get('t', 0) + 1
    M = average(state, 'M', G, s.beta1)
    V = average(state, 'V', G**2, s.beta2)
    M = M / (1 - s.beta1**t)  # the weights of t gradients add up to this
    V = V / (1 - s.beta2**t)
    eps = s.eps
    if 'Q' in state:  # part 4: GaLore's code adds 1e-6, before V is corrected
        eps = 1e-6 / math.sqrt(1 - s.beta2**t)
    return M / (V.sqrt() + eps)

# 2. Why low rank? LoRA ----------------------------------------------------------------------------
# Adam remembers 2 m n numbers of a weight of m n. Machines that share a batch each send the m n
# numbers of G in every step. But most of G lies in few directions: it is near to a matrix of rank
# r, which r (m + n) numbers give. For m = n = 4096 and r = 128 that is a sixteenth. There are two
# ways to use it: train a change of W that has rank r (LoRA), or look at r directions of G (GaLore).

def draw(rows, r, *what):
    """A random matrix (rows, r). `what` names it, for the tests, which draw as the fast code."""
    return torch.randn(rows, r)

def orthonormal(Y):
    """Orthonormal columns that span those of Y. The signs make them unique."""
    Q, triangle = torch.linalg.qr(Y)
    signs = 1 - 2 * (triangle.diagonal() < 0)
    return Q * signs

def lora(A, B, s):
    """LoRA (2106.09685, equation 3): the change alpha / r B A of a W that itself stays.
    Multi-head LoRA (2402.16828, section 3): the mean over H heads, A (H, r, n), B (H, m, r); LTE's
    code takes the sum: H times its alpha is the same."""
    return s.alpha / s.rank * (B @ A).mean(0)

def lora_gradients(G, A, B, s):
    """dA and dB: what the chain rule makes of G, the gradient of W + lora(A, B)."""
    scale = s.alpha / s.rank / len(A)
    return scale * B.mT @ G, scale * G @ A.mT

def new_heads(w, name, t, s):
    """Gives a worker w (part 3) new heads of a weight. B is zero: nothing changes yet. A is
    orthogonal, as in LTE's code: its numbers are about 1 / sqrt(r); PEFT's and ReLoRA's are
    about 1 / sqrt(3 n), so that the same rate moves W less there."""
    m, n = w.W[name].shape
    drawn = [s.draw(n, s.rank, name, t, head) for head in w.heads]
    Q = torch.stack([orthonormal(Y) for Y in drawn])  # (H, n, r)
    size = math.sqrt(n / s.rank)
    w.A[name] = size * Q.mT
    w.B[name] = Q.new_zeros(len(Q), m, s.rank)
    w.state['A', name], w.state['B', name] = {}, {}

# 3. Workers: LTE ----------------------------------------------------------------------------------
# LTE (2402.16828, section 3) gives each head to a worker, which trains T steps alone, on its part
# of the batch. Then all go on from the mean of their weights. A worker sends r (m + n) numbers in
# T steps where it sent T m n. Local SGD (1805.09767) does so with whole weights.

def full(w, s):
    """{name: W + lora(A, B)}: the weights that a worker computes with."""
    weights = dict(w.W)
    for name in w.A:
        weights[name] = weights[name] + lora(w.A[name], w.B[name], s)
    return weights

def mean(tensors):
    return sum(tensors) / len(tensors)

def merge(workers, t, s):
    """All workers go on from the mean of what they compute with. ReLoRA (2307.05695) is one worker
    that goes on with new heads (merge_reset), so that ranks add up. Here Adam begins anew with
    them; in the paper it keeps a little, and W trains at full rank before the first heads."""
    weights = [full(w, s) for w in workers]
    for name in s.apart:  # the weights of which each worker has its own
        W = mean([each[name] for each in weights])
        for w in workers:
            w.W[name] = W
            if s.merge_reset:
                new_heads(w, name, t, s)
            elif name in w.A:  # a head trains on, and W gives up what it adds (the fast code adds
                # and subtracts B' A' instead, the heads at the last merge: the same)
                w.W[name] = W - lora(w.A[name], w.B[name], s)
    for name in s.shared:  # those whose M is averaged, too: GaLoLTE, part 5
        states = [w.state['W', name] for w in workers]
        M = mean([state['M'] for state in states])
        for state in states:
            state['M'] = M

# 4. GaLore ----------------------------------------------------------------------------------------
# All of W trains, but Adam sees r directions of G only: it remembers 2 m r numbers, and Q. A basis
# is on the smaller side of W. From here on that is n; of other matrices `train` hands over the
# transpose. (In GaLore's paper all is transposed: P^T G in place of G Q.)

def galore(G, state, s, stacked=1):
    """GaLore (2403.03507, algorithm 2): project, Adam inside the basis, project back."""
    Q = state['Q']
    R = G @ Q  # (m, r)
    inside = adam
    if s.factors == 'basis' and s.optimizer == 'muon':  # of part 6: that it stands here is ours
        inside = functools.partial(muon, stacked=stacked)
    N = inside(R, state, s)
    return s.scale * N @ Q.T

def sketch(G, Q):
    """A product with G^T G turns Q to the directions in which G is large. A sketch sums one such
    product for each sequence's G, divided by |G Q|, so that all count alike. It is ours: thin
    products of dL/dy and x are enough, so the fast code never forms a G."""
    R = G @ Q  # (sequences, m, r)
    size = R.norm(dim=(1, 2), keepdim=True).clamp(1e-30)  # without targets it is 0
    return (G.mT @ R / size).sum(0)  # (n, r)

def new_basis(G, Q, Y, name, t, s):
    """The next Q (n, r) of G (m, n). Q: the old one, or None; Y (n, r): sketches."""
    m, n = G.shape
    if s.optimizer == 'apollo':
        return s.draw(n, s.rank, name, t) / math.sqrt(s.rank)  # Q Q^T is 1 on average
    if s.basis == 'svd':  # GaLore's paper: the best one for this G
        _, _, V = torch.linalg.svd(G, full_matrices=False)
        return V[:s.rank].T
    if s.basis == 'power':  # subspace iteration (0909.4061, algorithm 4.4): nearly as good
        if Q is None:
            Q = orthonormal(G.T @ s.draw(m, s.rank, name, t))
        for _ in range(2):
            Q = orthonormal(G.T @ G @ Q)
        return Q
    if s.basis == 'sketch' and Q is not None:
        return orthonormal(Y)
    return orthonormal(s.draw(n, s.rank, name, t))  # 'random', and where 'sketch' begins

def turn(state, C):
    """Turns the averages (m, r) into the new basis (ours): C = old^T new. V is turned as if
    directions were uncorrelated."""
    if 'M' in state:
        state['M'] = state['M'] @ C
    if 'V' in state:
        state['V'] = state['V'] @ C**2

def refresh(states, G, name, t, s):
    """Takes a new basis every basis_every steps, the same for all workers. The first comes at once,
    the second at the weight's own turn, so that not all weights get theirs in one step. states: of
    one weight, one for each worker; G (sequences, m, n); t: the step, counted from that turn."""
    first = states[0]
    old = first.get('Q')
    since = t % s.basis_every
    if old is None or since == 0:
        Q = new_basis(G.mean(0), old, first.get('Y'), name, t, s)
        for state in states:
            state.update(Q=Q, Y=0)
            if old is not None and s.factors == 'basis':  # galore-torch leaves them
                turn(state, old.T @ Q)
    if s.basis == 'sketch' and since >= s.basis_every - 5:  # the five steps before a new basis
        first['Y'] += sketch(G, first['Q'])

# 5. GaLore is LoRA; GaLoLTE -----------------------------------------------------------------------
# Take a head with A = Q^T and B = 0, and train B alone. After every step add B Q^T to W, and set B
# to 0 again. The gradient of B is G Q, so Adam does what it does in GaLore (2502.13811): `duality`
# runs both.
# So GaLore is LTE with one worker, A = Q^T and T = 1. GaLoLTE (ours) is that with H workers and
# T > 1: each steps by `galore` on its own part of the batch, all in one basis. A merge averages W
# and M, so that workers drift apart less. In T steps each sends two matrices (m, r), which are
# (change of W) Q and M, and now and then a sketch.

def duality(m=8, n=6, r=4):
    """GaLore's move is that of the head which is described above."""
    s = SimpleNamespace(**DEFAULTS)
    s.rank = s.alpha = r
    G = torch.randn(m, n)
    Q = orthonormal(torch.randn(n, r))
    A = Q.T[None]  # (1, r, n)
    B = torch.zeros(1, m, r)
    _, dB = lora_gradients(G, A, B, s)
    move = adam(dB, {'Q': Q}, s)  # of B, with GaLore's eps
    torch.testing.assert_close(lora(A, move, s), galore(G, {'Q': Q}, s))

# 6. Rules for full gradients ----------------------------------------------------------------------

def muon(G, state, s, stacked=1):
    """Muon (Jordan et al. 2024): the mean gradient, with all its singular values near 1, times what
    makes it as large as Adam's move (2502.16982, section 2.2). In practice it runs in 16 bits.
    stacked: G holds so many matrices, one above the other, as GPT's c_attn: q, k and v."""
    X = G
    if s.momentum:
        M = average(state, 'M', G, s.momentum)
        X = s.momentum * M + (1 - s.momentum) * G  # Nesterov's: it looks ahead
    return torch.cat([orthogonal(part) for part in X.chunk(stacked)])

def orthogonal(X):
    """X with all singular values near 1, times Muon's size."""
    size = 0.2 * math.sqrt(max(X.shape))
    X = X / X.norm().clamp(1e-7)
    for _ in range(5):  # Newton-Schulz: of X = U S V^T an odd polynomial takes S near 1
        K = X.T @ X
        P = 2.0315 * K @ K - 4.7750 * K
        X = 3.4445 * X + X @ P
    return size * X

def stretched(X, R, N, state, s, dim=1):
    """Adam made R into N: row i of X times |N_i| / |R_i|; with dim=(0, 1) all of X times |N| / |R|.
    Fira's limiter: |X| grows by at most 1% a step (|X| without Adam's correction of the averages,
    as in its code)."""
    before = R.norm(dim=dim, keepdim=True)
    after = N.norm(dim=dim, keepdim=True)
    X = X * after / (before + 1e-8)
    t = state['t']
    correction = math.sqrt(1 - s.beta2**t) / (1 - s.beta1**t)
    size = X.norm() / correction
    old = state.get('size', size)
    growth = size / (old + 1e-8)
    shrink = max(growth, 1.01) / 1.01  # rules.py sets no limit after a size of 0
    state['size'] = size / shrink
    return X / shrink

def fira(G, state, s):
    """Fira (2410.01623): GaLore's move, plus the part of G that GaLore drops, `stretched`.
    (In the paper that part is G - R Q^T; in its code, and here, G - scale R Q^T.)"""
    Q = state['Q']
    R = G @ Q
    N = adam(R, state, s)
    rest = G - s.scale * R @ Q.T
    return s.scale * N @ Q.T + stretched(rest, R, N, state, s)

def apollo(G, state, s):
    """APOLLO (2412.05270, algorithm 1): all of G, `stretched`. APOLLO-Mini has r = 1."""
    R = G @ state['Q']
    N = adam(R, state, s)
    dim = 1
    if s.rank == 1:
        dim = (0, 1)
    return s.scale * stretched(G, R, N, state, s, dim)

def scale(G, state, s, momentum=0, dim=1):
    """SCALE (2506.16659, algorithm 1): rows, one for each output, get a mean square of 1 (as in its
    code). momentum: of the output layer; dim=0: of embeddings, whose rows are inputs."""
    if momentum:
        G = average(state, 'M', G, momentum)
    size = G.square().mean(dim, keepdim=True).sqrt()
    return G / size.clamp(1e-8)

# 7. Training --------------------------------------------------------------------------------------

RULES = dict(adamw=adam, muon=muon, fira=fira, apollo=apollo, scale=scale, galore=galore)
DEFAULTS = dict(  # as in the scripts; but factors='' is full rank, and workers are for sync='merge'
    factors='', heads=1, rank=4, alpha=4, split=False,
    merge_every=0, merge_reset=False, rewarm_iters=0, workers=1, sync='step', sync_moments=True,
    optimizer='adamw', momentum=0.95, scale=1, basis='sketch', basis_every=20,
    learning_rate=lambda t: 0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, grad_clip=1,
    draw=draw, no_decay=(), rules={}, due={})  # {name: rule}, {name: step of its second basis}

def plan(start, matrices, method):
    """The settings of a method, with DEFAULTS, and lists of names: which weights it treats how."""
    s = SimpleNamespace(**{**DEFAULTS, **method})
    rule = RULES[s.optimizer]
    s.low, s.shared = [], []
    if s.factors:  # these have heads, or move in a basis alone
        s.low = matrices
    if s.factors == 'basis':
        rule = galore
        averages = s.optimizer == 'adamw' or s.momentum
        if s.sync_moments and averages:  # first averages, shared at merges
            s.shared = matrices
    s.apart = s.low  # each worker steps along its own gradient
    if s.sync == 'merge':
        s.apart = list(start)
    s.bases, s.wide = [], []
    if rule in (galore, fira, apollo):
        s.bases = matrices
    for name in s.bases:
        m, n = start[name].shape
        if m < n:
            s.wide.append(name)
    s.rules = {**dict.fromkeys(matrices, rule), **s.rules}
    return s

def new_workers(start, s):
    """Workers that begin with the weights `start`."""
    heads = [range(s.heads)] * s.workers  # of each
    if s.split:
        heads = [[head] for head in range(s.heads)]
    workers = []
    for mine in heads:
        w = SimpleNamespace(W=dict(start), A={}, B={}, state=defaultdict(dict), heads=mine)
        workers.append(w)
        if s.factors in ('both', 'B'):
            for name in s.low:
                new_heads(w, name, 0, s)
    return workers

def seen(w, name, G, s):
    """What a worker steps along of a weight with the gradient G: {('A', name): dA, ...}."""
    if name in w.A:
        dA, dB = lora_gradients(G, w.A[name], w.B[name], s)
        if s.factors == 'B':  # LoRA-FA (2308.03303): A stays as it was drawn
            return {('B', name): dB}
        return {('A', name): dA, ('B', name): dB}
    if name in s.low:
        Q = w.state['W', name]['Q']
        G = G @ Q @ Q.T  # all that GaLore sees: clipping measures |R|
    return {('W', name): G}

def clipped(found, s):
    """Gradients {key: g}, shortened so that the norm of all together is at most grad_clip."""
    norm = sum(g.square().sum() for g in found.values()) ** 0.5
    most = s.grad_clip or math.inf
    factor = min(1, most / (norm + 1e-6))
    return {key: factor * g for key, g in found.items()}

def update(w, key, g, lr, s):
    """One step of a worker. Matrices decay as in AdamW (1711.05101) by any rule; vectors do not."""
    kind, name = key
    tensors = vars(w)[kind]  # w.W, w.A or w.B
    rule = s.rules.get(name, adam) if kind == 'W' else adam
    move = rule(g, w.state[key], s)
    if name in s.wide:
        move = move.T
    keep = 1
    if g.dim() > 1 and name not in s.no_decay:
        keep = 1 - lr * s.weight_decay
    if name in s.bases:
        lr = lr * keep  # GaLore's code decays after the step
    tensors[name] = keep * tensors[name] - lr * move

def step(workers, t, lr, s):
    """All workers step along the gradients w.G, each along its own, or all along the mean."""
    for name in s.bases:
        G = torch.cat([w.G[name] for w in workers])
        states = [w.state['W', name] for w in workers]
        refresh(states, G, name, t - s.due.get(name, 0), s)
    for w in workers:
        w.low, w.rest = {}, {}
        for name in w.W:
            G = w.G[name].mean(0)
            if name not in s.apart:
                G = mean([other.G[name].mean(0) for other in workers])
            part = w.low if name in s.low else w.rest
            part.update(seen(w, name, G, s))
        # of several workers each clips its low-rank part alone: it is a model of its own
        parts = [w.low, w.rest] if len(workers) > 1 else [w.low | w.rest]
        for part in parts:
            for key, g in clipped(part, s).items():
                update(w, key, g, lr, s)

def train(forward, start, batches, matrices, method):
    """
    Trains the weights `start`, {name: W}, and yields the loss and the workers after each step.

    forward(W, x): logits. batches: (x, y); worker k of K has the rows k, k + K, ... matrices: names
    of the weights that the method is for. AdamW trains the others.
    """
    s = plan(start, matrices, method)
    workers = new_workers(start, s)
    K, T = len(workers), s.merge_every
    for t, (x, y) in enumerate(batches):
        lr = s.learning_rate(t)
        if s.merge_reset and t >= T:  # ReLoRA: new heads begin with small steps
            part = (t % T + 1) / (s.rewarm_iters + 1)
            lr = lr * min(part, 1)
        for k, w in enumerate(workers):
            mine = x[k::K], y[k::K]
            w.G, w.loss = gradients(forward, full(w, s), *mine)
            for name in s.wide:
                w.G[name] = w.G[name].mT
        step(workers, t, lr, s)
        if T and (t + 1) % T == 0:
            merge(workers, t + 1, s)
        yield mean([w.loss for w in workers]), workers

# 8. All methods on a toy --------------------------------------------------------------------------

SPLIT = dict(heads=4, split=True, merge_every=10)  # a head, or in a basis nothing, for each worker
LOCAL = dict(workers=4, sync='merge', merge_every=10)
OF_SCALE = {'output': functools.partial(scale, momentum=0.9),
            'embed': functools.partial(scale, dim=0)}
METHODS = {  # galore_lean, galore_int8, galolte_2bit differ from others in bits: 32 here
    'full': {}, 'scale': dict(optimizer='scale', rules=OF_SCALE),
    'muon': dict(optimizer='muon'), 'muon_lean': dict(optimizer='muon', momentum=0),
    'fira': dict(optimizer='fira', basis='power', scale=0.25),
    'apollo': dict(optimizer='apollo', basis='random'),
    'apollo_mini': dict(optimizer='apollo', basis='random', rank=1, scale=2),
    'lora': dict(factors='both'), 'lora_fa': dict(factors='B'),
    'mhlora': dict(factors='both', heads=4, alpha=16),
    'relora': dict(factors='both', merge_every=20, merge_reset=True, rewarm_iters=5),
    'lte': dict(factors='both', **SPLIT),
    'galore': dict(factors='basis'), 'galore_lean': dict(factors='basis'),
    'galore_int8': dict(factors='basis'),
    'galore_muon': dict(factors='basis', optimizer='muon'),
    'galolte': dict(factors='basis', **SPLIT),
    'galolte_2bit': dict(
        factors='basis', optimizer='muon', sync='merge', sync_moments=False, **SPLIT),
    'local_adamw': LOCAL, 'local_muon': dict(optimizer='muon', **LOCAL)}

def toy(words=32, width=24, rows=8, time=16, steps=45):
    """A model of one layer, {name: W}, and batches of sentences in which one of two words follows a
    word: [(x, y)], (rows, time) each."""
    follow = torch.randint(words, (words, 2))
    sentences = [torch.randint(words, (steps * rows,))]
    for _ in range(time):
        which = torch.randint(2, (steps * rows,))
        sentences.append(follow[sentences[-1], which])
    batches = torch.stack(sentences, 1).split(rows)
    shapes = dict(embed=(words, width), up=(64, width), down=(width, 64), output=(words, width))
    start = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    return start, [(batch[:, :-1], batch[:, 1:]) for batch in batches]

def forward(W, x):
    """The toy's logits (rows, time, words) of words x (rows, time)."""
    hidden = F.gelu(W['embed'][x] @ W['up'].T)
    return hidden @ W['down'].T @ W['output'].T

def count(tensors):
    return sum(x.numel() for x in tensors if torch.is_tensor(x))

def numbers_sent(w, K, s):
    """Numbers that one of K workers sends a step, but for sketches. What is one worker here may be
    many machines that share the batch: each sends what it steps along."""
    low, rest = count(w.low.values()), count(w.rest.values())
    if s.factors == 'basis':
        low = sum(s.rank * max(g.shape) for g in w.low.values())  # R, or (change of W) Q
    if K > 1:
        low = low / s.merge_every
        if s.shared:
            low = 2 * low  # and M
    if s.sync == 'merge':
        rest = rest / s.merge_every
    return low + rest

def main():
    torch.manual_seed(0)
    duality()
    start, batches = toy()
    matrices = ['up', 'down']
    print('method        trained   state  bytes sent a step  first loss    last')  # of a worker
    for name, method in METHODS.items():
        torch.manual_seed(1)
        losses = []
        for loss, workers in train(forward, start, batches, matrices, method):
            losses.append(loss)
        w = workers[0]
        trained = kept = 0
        for key in [*w.low, *w.rest]:
            kind, weight = key
            trained += vars(w)[kind][weight].numel()
            kept += count(w.state[key].values())
        sent = 4 * numbers_sent(w, len(workers), plan(start, matrices, method))
        print(f'{name:13}{trained:8}{kept:8}{sent:19.0f}', end='')
        print(f'{losses[0]:12.3f}{mean(losses[-10:]):8.3f}')
    print('These losses rank nothing: it is a toy.', end=' ')
    print('The fast code stands in lowrank.py (heads, workers), galore.py (bases) and rules.py.')

if __name__ == '__main__':
    main()
