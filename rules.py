"""
This file turns gradients into steps of weights, and stores numbers in few bits. Its functions take
tensors; they know nothing of layers or ranks.

    step_               AdamW, on weights and moments of any dtype
    PROJECTED           rules that see a gradient and its part in a basis: Fira, APOLLO
    FULL, INSIDE        rules that see a gradient alone: SCALE, Muon; inside a basis: Adam, Muon
    round_              rounds float32 to bfloat16, up or down at random
    code_, dense        write and read weights in 4 bits (they stay) or in 8 bits (they train)
    encode, decode      write and read moments in 8 bits
    pack, unpack        write and read what ranks send, in 2 to 8 bits

A rule gives a move: W <- keep W - lr move, keep = 1 - lr decay (see textbook.py). `state`: the
optimizer's state of a parameter; its `step` counts this gradient already. `group`: the settings.
"""

import functools
import hashlib
import importlib.util
import logging
import math
import os
import shutil
import sysconfig

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor
from torch.optim.adamw import adamw


def sum_dtype(x):
    """A tensor's dtype, or float32, whichever is wider: what sums are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


CHUNK, CHUNK_OF_A_CPU = 2**22, 2**18  # numbers
MOST = 2**24  # where steps are compiled


def at_a_time(x):
    """How many numbers of x plain steps take at a time: on a CPU as many as fit its cache."""
    return CHUNK_OF_A_CPU if x.device.type == 'cpu' else CHUNK


# -----------------------------------------------------------------------------
# pieces and compiled functions

# A step is written once, as a function that writes into rows of its tensors. A CPU runs it as it
# is, on pieces that fit its cache. A GPU runs it compiled, on 16M numbers at once: one or a few
# kernels read and write each number once, and no temporary is as large as a large weight.


def is_compiled(compile, device):
    """Whether steps are compiled on a device; compile: True, False, or None: on GPUs that can.
    Below capability 8.0 torch compiles no bfloat16."""
    if compile is None:
        can = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
        return can and has_compilers()
    return compile


@functools.cache
def has_compilers():
    """Whether torch.compile has triton, a C compiler and Python's headers, as GPUs want it; prints
    once what is missing."""
    missing = [] if importlib.util.find_spec('triton') else ['triton']
    if not any(map(shutil.which, (os.environ.get('CC', 'gcc'), 'gcc', 'clang'))):
        missing.append('a C compiler')
    if not os.path.isfile(os.path.join(sysconfig.get_path('include'), 'Python.h')):
        missing.append('Python.h (of python3-dev)')
    if missing and os.environ.get('RANK', '0') == '0':
        print('steps in 16 and 8 bits are slow here: to compile them torch wants '
              + ' and '.join(missing))
    return not missing


@functools.cache
def compiled(function):
    """Returns a function that is compiled for any number of rows. torch compiles it again for each
    length of rows and combination of dtypes: there may be more of these than the 8 it allows."""
    function = torch.compile(function, fullgraph=True, dynamic=True)
    # made once: each one leaves a variable in its thread's context for ever
    limits = torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024)

    def call(*args):
        with limits:
            function(*args)
    return call


@functools.lru_cache(maxsize=16)  # the matrices of a group have the same ones
def on_device(numbers, device):
    """Numbers as a tensor, by a copy that the host does not wait for."""
    numbers = torch.tensor(numbers, dtype=torch.float64, device='cpu')
    if device.type == 'cuda':
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def in_pieces(function, tensors, numbers=(), key=0, first=0, compile=False, flags=()):
    """
    Calls function(*tensors, numbers, start, *flags) on one piece of rows after the other.

    function writes into some of the tensors; these have equally many rows, or are None. numbers:
    floats that differ from step to step; flags: compiled in; start: for `random_bits`, from key and
    the index of a piece's first number in the whole tensor. Compiled or not, the bits are the same.
    """
    x = tensors[0]
    if not x.numel():  # of a shard
        return
    n = x[0].numel()  # of a row
    if isinstance(x, FakeTensor):  # one row stands for all: a compiled function has no temporaries
        tensors = [None if x is None else x[:1] for x in tensors]
        count, compile = 1, False
    elif compile:
        function, numbers = compiled(function), on_device(tuple(numbers), x.device)
        count = max(MOST // n, 1)
    else:
        count = max(at_a_time(x) // n, 1)
    for i in range(0, len(tensors[0]), count):
        some = [None if x is None else x[i:i + count] for x in tensors]
        start = start_of(key, first + i * n)
        if compile:
            some = [None if x is None else alone(x) for x in some]
            start = torch.full((), start, dtype=torch.int32, device=x.device)  # a number: 64 bits
        function(*some, numbers, start, *flags)


def alone(x):
    """Detaches x for torch.compile. That looks at the tensor behind a view, and allows no two views
    of one tensor. For rows of another length it compiles another function."""
    x = x.detach()
    if x.dim() > 1:
        torch._dynamo.mark_static(x, 1)
    return x


# -----------------------------------------------------------------------------
# sixteen bits

# bfloat16 keeps 8 bits of a number: what is smaller than 1 / 512 of it is lost when it is added. So
# weights and moments are rounded up or down at random, right on average (stochastic rounding, Gupta
# et al., arXiv 1502.02551). The random bits of a number depend on a key and its index alone, so
# that ranks, shards of a tensor and resumed runs agree.
GOLDEN = -0x61c88647  # 2^32 over the golden ratio, as 32 bits with a sign


def square_root(x):
    """The square root of x with the bits of compiled functions; a CPU's own sqrt has others."""
    return x.rsqrt().reciprocal_()


def start_of(key, first):
    """Makes `start` for `random_bits` from a key (an integer) and the index of the first number."""
    digest = hashlib.blake2b(str(key).encode(), digest_size=4).digest()
    start = int.from_bytes(digest) + first
    return (start + 2**31) % 2**32 - 2**31  # its last 32 bits, with a sign


def random_bits(x, start):
    """32 random bits for each number of x, int32: a hash of start and the number's index. It mixes
    and multiplies twice, much as murmur3 ends. As far as tests see, the upper 16 are uniform and
    independent; the lower 16 are a little less so, and second moments use them."""
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    # start is added first: torch.compile would multiply GOLDEN by the length of a row, and Triton
    # has no such constant in 32 bits
    bits.add_(start).mul_(GOLDEN)
    bits.bitwise_xor_(bits >> 15).mul_(-0x7a143595)
    bits.bitwise_xor_(bits >> 13).mul_(-0x3d4d51cb)
    return bits


def upper(bits):
    """16 random bits of 32, as a number."""
    return (bits >> 16).bitwise_and_(2**16 - 1)


def lower(bits):
    """The other 16."""
    return bits & 2**16 - 1


def put(out, x, bits=None, half=upper):
    """out <- x; x may be overwritten. float32 is rounded to bfloat16: up or down by 16 of the 32
    random bits (half: which 16), or to the nearest if bits is None."""
    if out.dtype != torch.bfloat16 or x.dtype != torch.float32 or bits is None:
        out.copy_(x)
        return
    # inf and NaN stay. The clamp is for a GPU's NaN: all bits but the sign are set, and one more
    # would change it (a NaN with all 32 bits set, which no arithmetic makes, becomes 0)
    number = x.view(torch.int32).clamp_(max=0x7fff0000)
    number.add_(half(bits)).bitwise_and_(-2**16)
    out.copy_(x)


def put_rows(out, x, numbers, start):
    """out <- x, rounded at random."""
    put(out, x.clone(), random_bits(x, start))


def round_(out, x, key, first=0):
    """
    out <- x, in place. If x is float32 and out bfloat16, a number goes at random to the bfloat16
    number above or below it, right on average. What bfloat16 can hold stays, inf and NaN too.

    out, x: of one shape; key: an integer, a different one for each tensor and each time; first: the
    index of out's first element in the whole tensor.
    """
    if out.dtype != torch.bfloat16 or x.dtype != torch.float32:
        out.copy_(x)
        return
    flat = out.reshape(-1)
    in_pieces(put_rows, [flat, x.reshape(-1)], key=key, first=first)
    if not out.is_contiguous():  # flat may be a copy
        out.copy_(flat.view(out.shape))


# -----------------------------------------------------------------------------
# weights in 4 bits, which stay, and in 8 bits, which train

# A block is a part of one row. Its numbers share a float32, the scale. FSDP2 cuts between rows, so
# it cuts no block.
#
#   4 bits   NF4 (QLoRA, Dettmers et al., arXiv 2305.14314): a number is the scale times one of 16
#            levels, quantiles of a normal distribution; codes (m, n / 2) uint8, the first of two
#            numbers in the upper half of a byte; the scale is the block's largest magnitude
#   8 bits   a number is the scale times an integer from -127 to 127; codes (m, n) int8. A step that
#            changes the block rounds them at random: to the nearest, small steps would be lost
WEIGHT_BLOCKS = {4: 64, 8: 128}  # numbers of a block
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)


kernels = None  # bitsandbytes' functions, once `load_kernels` has found them


def load_kernels():
    """Imports bitsandbytes, which takes two seconds, where it is installed. Without it 4 bits are
    unpacked in plain torch: the same numbers in 11 to 17 times as long (on a CPU)."""
    global kernels
    if kernels is None and importlib.util.find_spec('bitsandbytes'):
        # a hint about a kernel of inference, which is not used here
        logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)
        kernels = importlib.import_module('bitsandbytes.functional')


def new_codes(W, bits):
    """(codes, scales) for a matrix like W (m, n), empty. ValueError: its rows are no blocks."""
    m, n = W.shape
    numbers = WEIGHT_BLOCKS[bits]
    if n % numbers:
        raise ValueError(f'rows of {n} numbers are not cut into blocks of {numbers}')
    scales = W.new_empty(m, n // numbers, dtype=torch.float32)
    if bits == 4:
        load_kernels()  # not in the middle of a step
        return W.new_empty(m, n // 2, dtype=torch.uint8), scales
    return W.new_empty(m, n, dtype=torch.int8), scales


def code_(codes, scales, x, key=None, first=0):
    """
    codes, scales <- x (rows, n), in place.

    In 8 bits with a key, each number goes to the level above or below it at random, right on
    average (key, first: see `round_`). In 8 bits without a key, and in 4 bits, it goes to the
    nearest level. ValueError: 4 bits need bitsandbytes, and it is not installed.
    """
    if codes.dtype == torch.uint8:
        code_4_bits(codes, scales, x)
    elif key is None:
        in_pieces(code_rows, [codes, scales, x], flags=[True])
    else:
        in_pieces(code_rows, [codes, scales, x], key=key, first=first)


def code_4_bits(codes, scales, x):
    if isinstance(x, FakeTensor):
        return
    if kernels is None:
        raise ValueError('weights go into 4 bits by bitsandbytes: pip install bitsandbytes')
    count = max(at_a_time(x) // x.shape[1], 1)  # it takes 30 bytes a number on a CPU
    for i in range(0, len(x), count):
        rows = slice(i, i + count)
        part = x[rows].float().contiguous()
        found, about = kernels.quantize_4bit(part, blocksize=WEIGHT_BLOCKS[4], quant_type='nf4')
        codes[rows] = found.view(codes[rows].shape)
        scales[rows] = about.absmax.view(scales[rows].shape)


def code_rows(codes, scales, x, numbers, start, to_nearest=False):
    """codes, scales <- x (rows, n) in 8 bits."""
    blocks = x.float().unflatten(1, (-1, WEIGHT_BLOCKS[8]))  # (rows, blocks, 128)
    size = blocks.abs().amax(-1).div_(127)
    scales.copy_(size)
    tiny = torch.finfo(torch.float32).tiny
    levels = blocks / size[..., None].clamp_min(tiny)
    threshold = 0.5
    if not to_nearest:
        random = upper(random_bits(levels, start))
        threshold = random.float().mul_(2.0**-16)
    levels.add_(threshold).floor_().clamp_(-127, 127)
    codes.copy_(levels.flatten(1))


def dense(W, scales, dtype):
    """A weight (m, n) in a dtype: unpacked from codes of `code_`, or W if scales is None."""
    if scales is None:
        return W.to(dtype)
    if scales.dtype != torch.float32:
        raise ValueError(f'scales of coded weights are in {scales.dtype}: choose the dtype of a '
                         'model before its weights are coded')
    m, blocks = scales.shape
    is_nf4 = W.dtype == torch.uint8
    numbers = WEIGHT_BLOCKS[4 if is_nf4 else 8]
    n = blocks * numbers
    is_fake = isinstance(W, FakeTensor)
    if is_nf4 and kernels and not is_fake:
        codes = W.reshape(-1, 1)
        tops = scales.reshape(-1)
        return torch.ops.bitsandbytes.dequantize_4bit(codes, tops, numbers, 'nf4', (m, n), dtype)
    out = scales.new_empty(m, n, dtype=dtype)
    if is_fake:
        return out
    count = max(at_a_time(out) // n, 1)
    for i in range(0, m, count):
        rows = slice(i, i + count)
        levels = W[rows]
        if is_nf4:
            levels = pairs_of_levels(W.device)[levels.int()].flatten(1)  # (rows, n)
        levels = levels.view(-1, blocks, numbers)
        torch.mul(levels, scales[rows, :, None], out=out[rows].view(levels.shape))
    return out


@functools.cache
def pairs_of_levels(device):
    """The two levels of NF4 that each byte stands for, (256, 2)."""
    byte = torch.arange(256)
    levels = torch.tensor(NF4)
    return torch.stack([levels[byte // 16], levels[byte % 16]], 1).to(device)


def move_rows(W, scales, move, numbers, start):
    """W <- keep W - lr move, rounded at random; of codes, if scales are given."""
    lr, keep = numbers
    x = W
    if scales is not None:  # (rows, blocks, 128)
        x = W.unflatten(1, (-1, WEIGHT_BLOCKS[8])) * scales[..., None]
        x = x.flatten(1)
    new = x.float() * keep
    if move is not None:
        new.sub_(move.float() * lr)
    if scales is None:
        put(W, new, random_bits(W, start))
    else:
        code_rows(W, scales, new, (), start)


# -----------------------------------------------------------------------------
# eight bits, of moments

# A block, up to 256 numbers of one row, shares a float32, its largest magnitude `top` (Dettmers et
# al., 8-bit optimizers, arXiv 2110.02861). Level l stands for top (l / levels)^power: levels are
# fine where numbers are small. FSDP2 cuts between rows, so it cuts no block; each is in one head.
BLOCK, SHORTEST = 256, 16  # numbers; of a row that is coded
EIGHT_BITS = {'exp_avg': (127, 2, torch.int8),  # levels, power, dtype; this one has a sign
              'exp_avg_sq': (255, 4, torch.uint8)}  # power 4, as the update divides by its root


def rows_of_shape(shape):
    """(the dimensions before a row, how many numbers a row has). A row is the last dimension;
    of three or more dimensions with a last one below SHORTEST it is all but the first."""
    leading = shape[:-1]
    if len(shape) > 2 and shape[-1] < SHORTEST:
        leading = shape[:1]
    return leading, math.prod(shape[len(leading):])


def as_rows(x):
    """x as (rows, n), see `rows_of_shape`. If all blocks of a row have one size, each block becomes
    a row: compiled functions take fewer passes then."""
    leading, n = rows_of_shape(x.shape)
    blocks = -(-n // BLOCK)
    if n and n % blocks == 0:
        return x.reshape(leading.numel() * blocks, n // blocks)
    return x.reshape(leading.numel(), n)


def by_block(x):
    """x (rows, n) in blocks of one size, (rows, blocks, numbers), with zeros after a row if need
    be."""
    n = x.shape[1]
    blocks = -(-n // BLOCK)
    if n % blocks:
        x = F.pad(x, (0, -n % blocks))
    return x.unflatten(1, (blocks, -1))


def shift_of(age):
    """By how much the thresholds of `encode` are moved at an age, in [0, 1)."""
    return age * 0.7548776662 % 1.0


def encode(x, shift, levels, power, dtype):
    """
    Returns codes (rows, n) of `dtype` and tops (rows, blocks) of x (rows, n), float32.

    A number goes to the level above or below it, right on average: the threshold runs through
    (0, 1) with the moment's age, see `shift_of`. Rounded to the nearest, a second moment would not
    decay by 0.1% a step. Its codes are at least 1, as the update divides by its root.
    """
    blocks = by_block(x)  # (rows, blocks, numbers)
    size = blocks.abs()
    top = size.amax(-1, keepdim=True)  # (rows, blocks, 1)
    tiny = torch.finfo(x.dtype).tiny
    size.div_(top.clamp_min(tiny))
    size.mul_(levels**power)  # level l is at l^power

    # thresholds are spread evenly, over a block and over ages; they are not random
    index = torch.arange(blocks.shape[-1], dtype=x.dtype, device=x.device)
    threshold = (index * 0.6180339887 + shift) % 1.0  # (numbers,)

    # level: the level below a number; distance: from that level to the number; needed: if distance
    # is larger, the number goes to the next level
    if power == 2:  # the next level is 2 l + 1 away
        level = square_root(size).floor_()
        level.clamp_(max=levels - 1)
        root = level
        needed = torch.addcmul(threshold, level, 2 * threshold)
    else:  # (2 l + 1) (2 l^2 + 2 l + 1)
        level = square_root(square_root(size)).floor_()
        level.clamp_(max=levels - 1)
        root = level.square()
        needed = (2 * level).add_(1)
        needed.mul_(torch.add(needed, root, alpha=2))
        needed.mul_(threshold)
    distance = size.addcmul_(root, root, value=-1)
    goes_up = distance.gt_(needed)
    level.add_(goes_up)
    if dtype == torch.int8:
        level.copysign_(blocks)
    else:
        level.clamp_(min=1)
    code = level.to(dtype).flatten(1)
    return code[:, :x.shape[1]], top.squeeze(-1)


def decode(code, top, levels, power):
    """The numbers (rows, n), float32, that the codes and tops of `encode` stand for."""
    x = code.float().div_(levels)
    x = by_block(x)  # (rows, blocks, numbers)
    if power == 2:  # it has a sign
        x.mul_(x.abs())
    else:
        x.square_().square_()
    x.mul_(top[..., None])
    return x.flatten(1)[:, :code.shape[1]]


def new_moments(state, like, bits, names=tuple(EIGHT_BITS)):
    """Puts zero moments for a tensor like `like` into state. bits: None (its dtype; 32 for float16,
    which has no numbers as small as second moments), 32, 16 or 8; with 8, vectors and matrices with
    short rows get 32. names: both moments, or the first alone."""
    leading, n = rows_of_shape(like.shape)
    is_coded = bits == 8 and like.dim() > 1 and n >= SHORTEST
    dtype = torch.bfloat16 if bits == 16 else sum_dtype(like)
    if bits is None and like.dtype != torch.float16:
        dtype = like.dtype
    for name in names:
        if is_coded:
            tops = *leading, -(-n // BLOCK)
            state[name] = like.new_zeros(like.shape, dtype=EIGHT_BITS[name][2])
            state[f'{name}_top'] = like.new_zeros(tops, dtype=torch.float32)
        elif dtype == like.dtype != torch.bfloat16:  # see `is_fused`: the layout has to be the same
            state[name] = torch.zeros_like(like)
        else:
            state[name] = like.new_zeros(like.shape, dtype=dtype)


def read(x, top, dtype=torch.float32):
    """The numbers of a moment (rows, n), or of its codes and tops, in a dtype or wider; a moment
    that has it already is returned itself."""
    if top is None:
        return x.to(torch.promote_types(x.dtype, dtype))
    levels, power, _ = EIGHT_BITS['exp_avg' if x.dtype == torch.int8 else 'exp_avg_sq']
    return decode(x, top, levels, power).to(dtype)


def write(out, top, x, shift, bits=None, half=upper):
    """Writes x into a moment (out, top) as `read` reads it; x may be overwritten. shift: for codes,
    see `encode`; bits, half: for bfloat16, see `put`."""
    if top is not None:
        kind = EIGHT_BITS['exp_avg' if out.dtype == torch.int8 else 'exp_avg_sq']
        code, new_top = encode(x, shift, *kind)
        out.copy_(code)
        top.copy_(new_top)
    else:
        put(out, x, bits, half)


def rows_like_moments(x, state):
    """x as rows, see `as_rows`, if the moments of a state are coded, else flat."""
    return as_rows(x) if 'exp_avg_top' in state else x.reshape(-1)


def rows_of_moment(state, name):
    """A coded moment as rows, and their tops (rows, blocks of a row); any other flat, and None."""
    state[name] = state[name].contiguous()  # rows are views of it
    rows = rows_like_moments(state[name], state)
    top = state.get(f'{name}_top')
    if top is not None:
        top = top.view(len(rows), -(-rows.shape[1] // BLOCK))
    return rows, top


def read_moments(state):
    """First and second moment, those that there are, in float32 or wider, flat or as rows
    (`rows_of_moment`; of a gradient: `rows_like_moments`). They may be the state itself: write
    nothing into them."""
    return [read(*rows_of_moment(state, name)) for name in EIGHT_BITS if name in state]


def write_moments(state, moments, key, first=0):
    """Writes what `read_moments` reads; bfloat16 is rounded at random (`round_`: key, first)."""
    for x, name, half in zip(moments, EIGHT_BITS, (upper, lower)):
        out, top = rows_of_moment(state, name)
        bits = random_bits(out, start_of(key, first))
        x = x.reshape(out.shape).clone()
        write(out, top, x, shift_of(state['step']), bits, half)


# -----------------------------------------------------------------------------
# Adam


def fused_adam_(params, grads, M, V, age, lr, betas, eps, decay):
    """torch's fused AdamW kernel on lists of tensors of one dtype; `age` counts these gradients."""
    before = torch.full((len(params),), age - 1, dtype=torch.float32, device=params[0].device)
    ages = list(before.unbind())  # the kernel adds one to each
    adamw(params, grads, M, V, [], ages, fused=True, amsgrad=False, maximize=False,
          beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=decay, eps=eps)


def is_fused(p, state):
    """Whether torch's kernel can step on p and the moments themselves."""
    return 'exp_avg_top' not in state and state['exp_avg'].dtype == p.dtype != torch.bfloat16


def adam_rows(p, grad, M, M_top, V, V_top, numbers, start, to_nearest):
    """p <- keep p - lr M / (sqrt(V) + eps), after the moments have taken in grad (None: p is also
    the gradient). to_nearest: a bfloat16 M is rounded to the nearest, not at random."""
    lr, keep, beta1, rest1, beta2, rest2, eps, shift = numbers  # rest1: 1 - beta1
    bits = random_bits(p, start)
    m, v = read(M, M_top, sum_dtype(p)), read(V, V_top, sum_dtype(p))
    g = (p if grad is None else grad).to(v.dtype)
    m.mul_(beta1).add_(g * rest1)
    v.mul_(beta2).add_((g * g).mul_(rest2))
    rho = m / square_root(v).add_(eps)
    new = p.to(v.dtype, copy=True).mul_(keep)
    put(p, new.sub_(rho.mul_(lr)), bits)
    write(M, M_top, m, shift, None if to_nearest else bits)
    write(V, V_top, v, shift, bits, lower)


def is_nearest(beta):
    """Whether a running average in bfloat16 is rounded to the nearest: its beta is so small that a
    step changes it by more than its last bit. Rounding to the nearest makes less noise."""
    return beta <= 0.95


def as_laid_out(x, like):
    """x, or a copy in the layout of `like`: torch's kernel reads raw memory."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def step_(p, grad, state, lr, keep, betas, eps, key=0, first=0, compile=False):
    """
    p <- keep p - lr rho, in place, after the moments of `state` have taken in grad.

        rho = sqrt(1 - beta2^age) / (1 - beta1^age) * M / (sqrt(V) + eps)

    Here eps is added before the bias correction, as in galore-torch. torch's kernel adds it after,
    so it gets another eps, for the same rho. p may be grad itself. Returns p, or, if p is grad, a
    copy in another layout if need be. If p or moments are in 16 or 8 bits, all is computed in
    float32, see `in_pieces`, and rounded at random (`round_`: key, first).
    """
    age = state['step']
    correction = math.sqrt(1 - betas[1] ** age)
    M, V = state['exp_avg'], state['exp_avg_sq']
    if is_fused(p, state):
        eps = eps / correction  # as torch has it
        decay = (1 - keep) / lr if lr else 0.0
        g = as_laid_out(grad, M)
        x = g if p is grad else as_laid_out(p, M)
        fused_adam_([x], [g], [M], [V], age, lr, betas, eps, decay)
        if p is grad:
            return x
        return p.copy_(x)
    rows = rows_like_moments(p, state)  # views, where they can be
    grad_rows = None if p is grad else rows_like_moments(grad, state)
    moments = [*rows_of_moment(state, 'exp_avg'), *rows_of_moment(state, 'exp_avg_sq')]
    beta1, beta2 = betas
    lr = lr * correction / (1 - beta1**age)
    numbers = lr, keep, beta1, 1 - beta1, beta2, 1 - beta2, eps, shift_of(age)
    in_pieces(adam_rows, [rows, grad_rows, *moments], numbers, key, first, compile,
              flags=[is_nearest(beta1)])
    if not p.is_contiguous():  # its rows are a copy
        p.copy_(rows.view(p.shape))
    return p


def adam(G, state, group, key=0, first=0):
    """Adam's move, rho of `step_`, in the place of G."""
    if 'exp_avg' not in state:
        new_moments(state, G, group['state_bits'])
    betas, eps = group['betas'], group['eps']
    return step_(G, G, state, -1.0, 0.0, betas, eps, key, first, group['compile'])  # 0 G + rho


# -----------------------------------------------------------------------------
# rules that see a gradient G (long, short) and R = G Q (long, r); N (long, r) is Adam's move of R


def norm(x, dim):
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=sum_dtype(x))


def adam_rate(R, N, state, group, dim):
    """(|N| / |R| over `dim`, c): c is Adam's bias correction; N is divided by it here."""
    beta1, beta2 = group['betas']
    age = state['step']
    c = math.sqrt(1 - beta2**age) / (1 - beta1**age)
    rate = norm(N, dim) / c
    return rate / (norm(R, dim) + 1e-8), c


def limited(phi, size, state):
    """Lowers phi so that `size`, the norm of phi times what phi scales, grows by at most 1% a step.
    A size of zero sets no limit: from 0 the authors' code takes 2,000 steps to grow."""
    size = size.reshape(1)  # ranks.gather_state gathers what has a dimension
    if 'rest_norm' in state:
        old = state['rest_norm']
        growth = size / (old + 1e-8)
        limiter = growth.clamp_min(1.01) / 1.01
        limiter = torch.where(old > 0, limiter, 1)
        phi = phi / limiter
        size = torch.where(size > 0, size / limiter, old)
    state['rest_norm'] = size
    return phi


def fira(G, R, N, Q, state, group):
    """
    Fira (Chen et al. 2024, arXiv 2410.01623, and its authors' code): what R drops takes part, too:

        alpha N Q^T + phi (G - alpha R Q^T),   phi = |N| / |R|, row by row; alpha: the group's scale

    and the second term grows by at most 1% a step. By Pythagoras a row of G - alpha R Q^T has
    |G|^2 - (2 alpha - alpha^2) |R|^2.
    """
    alpha = group['scale']
    phi, c = adam_rate(R, N, state, group, 1)  # (long, 1)
    inside = norm(R, 1).square()
    rest = norm(G, 1).square() - (2 * alpha - alpha**2) * inside
    squares = rest.clamp_min(0) * phi.square()
    phi = limited(phi, squares.sum().sqrt(), state)
    phi = (phi * c).to(G.dtype)
    # alpha (N - phi R) Q^T + phi G
    left = torch.addcmul(N, R, phi, value=-1)  # (long, r)
    return torch.addmm(phi * G, left, Q.mT, alpha=alpha)


def apollo(G, R, N, Q, state, group):
    """APOLLO (Zhu et al. 2024, arXiv 2412.05270, and its authors' code): R, of a random Q, only
    says by how much Adam would scale each row of G: phi, as in `fira`. With rank 1 all rows have
    one phi (APOLLO-Mini). The authors' scale is the square of this one."""
    dim = None if group['rank'] == 1 else 1
    phi, c = adam_rate(R, N, state, group, dim)  # (long, 1), or (1, 1)
    size = torch.linalg.vector_norm(norm(G, dim) * phi)
    phi = limited(phi, size, state)
    phi = phi * (c * group['scale'])
    return G * phi.to(G.dtype)


# -----------------------------------------------------------------------------
# rules that see a gradient alone; if it is sharded, this rank's rows of it


def average_rows(out, G, M, M_top, numbers, start, to_nearest, ahead):
    """M <- momentum M + (1 - momentum) G, and out <- M, or what the next average would be if G came
    again (Nesterov)."""
    momentum, rest, shift = numbers  # rest: 1 - momentum
    bits = None if to_nearest else random_bits(M, start)
    m = read(M, M_top, sum_dtype(G))
    new = G.to(m.dtype) * rest
    m.mul_(momentum).add_(new)
    out.copy_(m.mul(momentum).add_(new) if ahead else m)
    write(M, M_top, m, shift, bits)


def averaged(G, state, group, key=0, first=0, ahead=False):
    """
    The running average of G by the group's momentum, in float32 or wider. ahead: the next average,
    see `average_rows`, in the dtype of Muon's products. With momentum 0 it is G, and there is no
    state.
    """
    momentum, dtype = group['momentum'], dtype_of_muon(G) if ahead else sum_dtype(G)
    if not momentum:  # a run may have had one before it was resumed
        state.pop('exp_avg', None)
        state.pop('exp_avg_top', None)
        return G.to(dtype)
    out = torch.empty(G.shape, dtype=dtype, device=G.device)
    if 'exp_avg' not in state:
        new_moments(state, G, group['state_bits'], names=('exp_avg',))
    numbers = momentum, 1 - momentum, shift_of(state['step'])
    tensors = [rows_like_moments(out, state), rows_like_moments(G, state),
               *rows_of_moment(state, 'exp_avg')]
    in_pieces(average_rows, tensors, numbers, key, first, group['compile'],
              flags=[is_nearest(momentum), ahead])
    return out


def normalised(G, state, group, key=0, first=0):
    """SCALE (Glentis et al. 2025, arXiv 2506.16659): rows of G, or columns (the group's `dim`), get
    a mean square of 1. The output layer has a momentum."""
    G, dim = averaged(G, state, group, key, first), group['dim']
    root = norm(G, dim) / math.sqrt(G.shape[dim])
    root = root.clamp_min(1e-8)
    return G / root


def nesterov(G, state, group, key=0, first=0):
    """What Muon makes orthogonal: the averaged gradient, a step ahead (Nesterov). Without momentum
    it is G (as in SWAN, Ma et al. 2025, arXiv 2412.13148, which scales rows first)."""
    return averaged(G, state, group, key, first, ahead=True)


def dtype_of_muon(x):
    """The dtype of Muon's products: bfloat16, but of float64, in which laws are checked."""
    return torch.float64 if x.dtype == torch.float64 else torch.bfloat16


def orthogonalised(X):
    """X (..., m, n) with all singular values near 1, each matrix on its own, by five Newton-Schulz
    iterations (Muon, Jordan et al. 2024), in `dtype_of_muon`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    shape = X.shape
    X = X.to(dtype_of_muon(X))
    X = X.reshape(shape[:-2].numel(), *shape[-2:])  # (matrices, m, n)
    is_tall = shape[-2] > shape[-1]
    if is_tall:  # K is on the smaller side
        X = X.mT
    size = torch.linalg.matrix_norm(X, keepdim=True)
    X = X / size.clamp_min(1e-7)
    add_product = torch.baddbmm
    if len(X) == 1:  # a fifth faster
        X, add_product = X[0], torch.addmm
    for _ in range(5):  # X <- a X + (b K + c K K) X
        K = X @ X.mT
        K = add_product(K, K, K, beta=b, alpha=c)
        X = add_product(X, K, X, beta=a)
    if is_tall:
        X = X.mT
    return X.view(shape)


def muon_size(shape):
    """What an orthogonalised matrix is multiplied by, so that AdamW's learning rates go (Moonlight,
    Liu et al. 2025, arXiv 2502.16982)."""
    return 0.2 * math.sqrt(max(shape[-2:]))


# (G, R, N, Q, state, group) -> move; None: alpha N Q^T
PROJECTED = {'galore': None, 'fira': fira, 'apollo': apollo}  # of groups with a rank
# (G, state, group, key, first) -> move of the rows that are here; key, first: of `round_`
FULL = {'scale': normalised, 'muon': nesterov}  # of groups without a rank
INSIDE = {'galore': adam, 'muon': nesterov}  # of layers with a basis, where G is R (long, r)
ORTHOGONAL = 'muon',  # rules whose move is then orthogonalised


# -----------------------------------------------------------------------------
# two to eight bits, for the wire

PACK = 64  # numbers that share a step, of 16 bits


def in_blocks(x, slices=1):
    """The numbers of x (..., numbers), with zeros after them, (..., slices, blocks, 64)."""
    missing = -x.shape[-1] % (PACK * slices)
    x = F.pad(x, (0, missing))
    return x.unflatten(-1, (slices, -1, PACK))


def pack(x, bits):
    """
    Packs x (..., 64) into 2 to 8 bits a number; returns (..., 8 bits + 2) bytes. The last two hold
    the step.

    Each number becomes one of 2^bits odd multiples of half a step. Least squares gives the step: so
    the rounding error is orthogonal to what is sent. A block with inf or NaN becomes NaN.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f'{bits=} does not fit a byte: set 2 to 8, or 32 to send them as they are')
    half = 2 ** (bits - 1)
    if bits == 2:  # nearly the best one for Gaussian numbers; with more bits the largest decides
        step = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / 8
    else:
        step = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True) / half
    step = step.clamp_min(torch.finfo(x.dtype).tiny)
    level = (x / step).floor_()
    level.clamp_(-half, half - 1).add_(0.5)
    # the step of least squares for these levels, (..., 1)
    step = (x * level).sum(-1, keepdim=True)
    step = step / level.square().sum(-1, keepdim=True)
    # eight numbers become one of 64 bits, of which `bits` bytes are used
    words = level.add_(half - 0.5).long()
    words = words.unflatten(-1, (8, 8))
    shifts = bits * torch.arange(8, device=x.device)
    words <<= shifts
    words = words.sum(-1, keepdim=True)  # (..., 8, 1)
    packed = words.view(torch.uint8)[..., :bits]  # (..., 8, bits)
    packed = packed.flatten(-2)
    step = step.to(torch.bfloat16).view(torch.uint8)  # (..., 2)
    return torch.cat([packed, step], -1)


def unpack(codes, dtype):
    """The numbers (..., 64) that the codes of `pack` stand for."""
    bits = codes.shape[-1] // 8
    packed, step = codes.split([8 * bits, 2], -1)
    words = packed.reshape(-1, bits)
    words = F.pad(words, (0, 8 - bits))
    words = words.view(torch.int64)  # (8 blocks, 1)
    shifts = bits * torch.arange(8, device=codes.device)
    words = words >> shifts  # (8 blocks, 8)
    level = words & 2**bits - 1
    level = level.view(*codes.shape[:-1], PACK)
    level = level.to(dtype)
    level.sub_(2 ** (bits - 1) - 0.5)
    step = step.contiguous().view(torch.bfloat16)  # (..., 1)
    return level.mul_(step)
