"""
Several processes (ranks): what they send each other, and which part of a model each rank holds.

    each step    DDP            averages gradients (of GaLore R (long, r)), not those of split heads
                 mean_rows      averages R of a sharded layer; each rank gets its rows of the mean
    a refresh    mean, same     averages a sketch (short, r); rank 0 sends its new basis to all
    a merge      mean           averages factors in a basis, their first moments, whole replicas
                 gather         collects the heads of LTE
                 coded_mean     averages in 2 to 8 bits a number, sends rounding errors next time
    a save       gather_at      sends tensor by tensor to rank 0, which writes one file

Heads are dealt like cards: rank k of `world` ranks has the heads k, k + world, k + 2 world, ...
`traffic` counts the bytes that this process sends in these calls, as in a ring, but not DDP's.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from rules import in_blocks, orthogonalised, pack, sum_dtype, unpack

FORMAT = 8  # of checkpoints

traffic = {'bytes': 0}


def rank_and_world():
    """(rank, number of ranks) of this process; alone (0, 1)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def cards_are_alike():
    """Whether all ranks have the same kind of GPU. Every rank has to ask."""
    world = rank_and_world()[1]
    return world == 1 or len(names_of_cards(world)) == 1


@functools.cache
def names_of_cards(world):
    names = [None] * world
    dist.all_gather_object(names, torch.cuda.get_device_name())
    return set(names)


def where_to_draw(device):
    """The device on which all ranks draw the same random numbers: `device`, or the CPU where they
    have several kinds of GPU. Every rank has to ask."""
    device = torch.device(device)
    if device.type == 'cuda' and not cards_are_alike():
        return torch.device('cpu')
    return device


# -----------------------------------------------------------------------------
# collectives; nccl takes contiguous tensors only


def mean(x, world=None):
    """The average of a tensor over all ranks, in place. With world=1, where no other rank has it,
    and in one process: the tensor itself."""
    if world is None:
        world = rank_and_world()[1]
    if world > 1:
        traffic['bytes'] += 2 * x.nbytes * (world - 1) / world
        whole = x.contiguous()  # x itself, unless it is transposed
        dist.all_reduce(whole)  # gloo has no average
        whole.div_(world)
        x.copy_(whole)
    return x


def gather(x):
    """The tensors x of all ranks, (world, *x.shape)."""
    world = rank_and_world()[1]
    part = x.detach()[None]  # gloo wants as many dimensions as the whole has
    if world == 1:
        return part
    part = part.contiguous()
    traffic['bytes'] += part.nbytes * (world - 1)
    gathered = part.new_empty(world, *x.shape)
    # its name from torch 2.13 on, and before
    all_gather = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)
    all_gather(gathered, part)
    return gathered


def gather_at(target, x):
    """The tensors x of all ranks, (world, *x.shape), at one of them; None at others."""
    rank, world = rank_and_world()
    if world == 1:
        return x[None]
    x = x.contiguous()
    traffic['bytes'] += x.nbytes * (world - 1) / world  # on average: the target sends none
    if rank != target:
        dist.gather(x, dst=target)
        return None
    gathered = x.new_empty(world, *x.shape)
    dist.gather(x, list(gathered), target)
    return gathered


def same(x, source=0):
    """The tensor of one rank on all ranks, in place, to the last bit; alone the tensor itself."""
    if rank_and_world()[1] > 1:
        traffic['bytes'] += x.nbytes
        dist.broadcast(x, source)
    return x


def exchanged(x):
    """Sends part k of x (world, ...) to rank k; returns what all ranks sent here, (world, ...)."""
    traffic['bytes'] += x.nbytes * (len(x) - 1) / len(x)
    received = x.new_empty(x.shape)
    dist.all_to_all_single(received, x.contiguous())
    return received


def averaged_copy(p):
    """A copy of a parameter, averaged over ranks, in float32 or wider."""
    return mean(p.detach().to(sum_dtype(p), copy=True))


def in_global_order(x):
    """(world, heads of one, ...) -> (heads, ...): the l-th head of rank k is head l * world + k."""
    return x.transpose(0, 1).flatten(0, 1)


def rows_of(batch_size, heads=1, rank=0, world=1):
    """The rows of a micro-batch that a rank trains on: first those of its first head, and so on.
    Row j belongs to head j % heads, numbered as in `in_global_order`; without split heads (1) ranks
    share rows as if each had one. ValueError: heads are no multiple of the ranks, or do not divide
    batch_size."""
    if heads == 1:
        heads = world
    if heads % world:
        raise ValueError(f'{heads=} do not split over {world} ranks: set a multiple')
    if batch_size % heads:
        raise ValueError(f'{batch_size=} does not split over {heads // world} heads on each of '
                         f'{world} ranks: set a multiple of {heads}')
    return [row for first in range(rank, heads, world)
            for row in range(first, batch_size, heads)]


def per_rank_tensors(layers):
    """The set of parameters and buffers of split heads, where each rank has heads of its own."""
    return {x for layer in layers if layer.workers > 1 for x in layer.per_head().values()}


def keep_out_of_ddp(net, tensors):
    """Tells DistributedDataParallel, before it wraps `net`, which tensors to leave alone."""
    tensors = set(tensors)
    named = (*net.named_parameters(remove_duplicate=False),  # DDP goes by all names of a tied one
             *net.named_buffers(remove_duplicate=False))
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(  # it has no public name
        net, [name for name, x in named if x in tensors])


# -----------------------------------------------------------------------------
# averages in few bits

#   x of each head                 cut into as many slices as there are heads
#   -> pack, exchange              the rank of head h gets slice h of every head
#   -> average, pack, gather       every rank gets every averaged slice
#
# so no more numbers travel than in a ring, and all ranks end with the same bits, whatever their
# number.


@torch.no_grad()
def coded_mean(x, bits, world=1, error=None):
    """
    The average (...) of x (heads here, ...) over the heads of `world` ranks, sent in `bits` bits a
    number.

    error, like x: earlier rounding errors, which are added to x and replaced by the new ones (error
    feedback, Seide et al., 2014). A rank also keeps the error of the average that it has rounded.
    """
    heads_here, numbers, dtype = len(x), x[0].numel(), sum_dtype(x)
    heads = heads_here * world
    value = x.to(dtype)
    if error is not None:
        value = value + error
    value = in_blocks(value.reshape(heads_here, numbers), heads)  # (heads here, slices, blocks, 64)
    codes = pack(value, bits)
    received = codes
    if world > 1:
        parts = codes.unflatten(1, (heads_here, world))
        parts = parts.permute(2, 0, 1, 3, 4)  # (world, heads here, slices there, blocks, bytes)
        received = in_global_order(exchanged(parts))  # (heads, slices here, blocks, bytes)
    average = sum(unpack(part, dtype) for part in received).div_(heads)  # in one order everywhere
    codes_of_average = pack(average, bits)
    if error is not None:
        left = value.sub_(unpack(codes, dtype))
        left_of_average = average.sub_(unpack(codes_of_average, dtype))
        first = rank_and_world()[0] if world > 1 else 0
        for i in range(heads_here):  # times heads: the next average divides it by heads
            left[i, i * world + first].add_(left_of_average[i], alpha=heads)
        error.copy_(left.view(heads_here, -1)[:, :numbers].view(error.shape))
    if world > 1:
        codes_of_average = in_global_order(gather(codes_of_average))
    return unpack(codes_of_average, dtype).flatten()[:numbers].view(x.shape[1:])


@torch.no_grad()
def mean_at(target, x, world):
    """The average (...) of x (heads here, ...) over the heads of `world` ranks, on rank `target`;
    on others the result means nothing. A number takes 6 bits, and its rounding error 6 more: with 6
    alone large directions of a sketch would hide others."""
    numbers, dtype = x[0].numel(), sum_dtype(x)
    value = in_blocks(x.reshape(len(x), numbers).to(dtype))  # (heads here, 1, blocks, 64)
    codes = pack(value, 6)
    codes_of_left = pack(value - unpack(codes, dtype), 6)
    codes = torch.stack([codes, codes_of_left], 1)  # (heads here, 2, 1, blocks, bytes)
    if world > 1:
        of_ranks = gather_at(target, codes)
        if of_ranks is not None:
            codes = in_global_order(of_ranks)
    average = sum(unpack(part, dtype).sum(0) for part in codes).div_(len(codes))
    return average.flatten()[:numbers].view(x.shape[1:])


def coded_same(source, x, bits):
    """Sends x of rank `source` to all ranks in `bits` bits a number; all return the decoded x."""
    codes = same(pack(in_blocks(x.flatten()), bits), source)
    return unpack(codes, x.dtype).flatten()[:x.numel()].view(x.shape)


def error_of(p, state):
    """The rounding error of a parameter's averages in few bits, from its state; zeros at first."""
    if 'error' not in state:
        state['error'] = torch.zeros_like(p, dtype=sum_dtype(p))
    return state['error']


@torch.no_grad()
def average_replica(p, bits, state):
    """The average over ranks of a parameter that differs by rank. In few bits ranks send only its
    change since the last average, which all ranks keep as `common` in its state."""
    if bits == 32 or 'common' not in state:
        return averaged_copy(p)
    change = p.to(sum_dtype(p)) - state['common']
    error = error_of(p, state)
    return coded_mean(change[None], bits, rank_and_world()[1], error[None]).add_(state['common'])


# -----------------------------------------------------------------------------
# shards: FSDP2 cuts a parameter into rows, an equal number for each rank, the last ones fewer


def is_sharded(x):
    """Whether a tensor is a DTensor, whose module takes 0.7 s to import."""
    return hasattr(x, 'to_local')


def local(x):
    """This rank's rows of a sharded tensor; any other as it is."""
    return x.to_local() if is_sharded(x) else x


def refuse_shards(named):
    """ValueError: one of {name: tensor} is in shards of another kind than rows over all ranks, of
    which alone the code here knows who has which."""
    world = rank_and_world()[1]
    for name, x in named.items():
        if is_sharded(x) and not (len(x.placements) == 1 and x.placements[0].is_shard(0)
                                  and x.device_mesh.size() == world):
            raise ValueError(f"'{name}' is in shards {x.placements} over {x.device_mesh.size()} of "
                             f'{world} ranks, and not in rows over all of them: shard the model by '
                             'ranks.shard')


def rows_each(size):
    """How many of `size` rows of a sharded tensor a rank holds; the last ranks may hold fewer."""
    return -(-size // rank_and_world()[1])


def slice_here(size):
    """The slice of `size` rows that this rank holds of a sharded tensor."""
    rank, each = rank_and_world()[0], rows_each(size)
    return slice(min(rank * each, size), min((rank + 1) * each, size))


def rows_here(x):
    """The slice of the rows of x that this rank holds: all of them, if x is not sharded."""
    if is_sharded(x):
        return slice_here(len(x))
    return slice(0, len(x)) if x.dim() else slice(0, 1)


def first_here(x):
    """The index of this rank's first number in a whole tensor, see rules.round_."""
    return rows_here(x).start * x.shape[1:].numel()


def padded_rows(rows, size):
    """This rank's rows of a tensor (size, ...), with zeros after them: all ranks have as many."""
    more = rows_each(size) - len(rows)
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])


def gather_rows(rows, size):
    """The tensor (size, ...) of which each rank holds its rows."""
    return gather(padded_rows(rows, size)).flatten(0, 1)[:size]


def all_rows(x):
    """All rows of a sharded tensor, on every rank; any other as it is."""
    return gather_rows(x.to_local(), len(x)) if is_sharded(x) else x


def from_rows(rows, shape, mesh):
    """The DTensor of that shape of which this rank holds `rows`."""
    from torch.distributed.tensor import DTensor, Shard
    stride = torch.empty(shape, device='meta').stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


# W is frozen: FSDP2 gathers it for a pass, and reduces no gradient of it. The gradient R (long, r)
# of a layer of GaLore is reduced here, so that each rank steps on its own rows alone:
#
#   backward of a layer      R of this rank's batch is in leaf.grad
#   -> mean_rows             rows of the mean R travel while the layer before it computes
#   -> finish_sum            they are added to rows.grad, at the next layer or the end of the pass

_running = []  # the sum that runs, at most one: (the DTensor of rows, `wait` of `mean_rows`)


def mean_rows(x):
    """Begins the average of x (size, columns) over ranks. Returns a function that waits for it, and
    gives this rank's rows."""
    world, here, each = dist.get_world_size(), slice_here(len(x)), rows_each(len(x))
    padded = F.pad(x, (0, 0, 0, each * world - len(x))).contiguous()
    traffic['bytes'] += padded.nbytes * (world - 1) / world
    part = padded.new_empty(each, x.shape[1])
    # its name from torch 2.13 on, and before
    begin = getattr(dist, 'reduce_scatter_single', dist.reduce_scatter_tensor)
    work = begin(part, padded, async_op=True)

    def wait():
        work.wait()
        return part[:here.stop - here.start].div_(world)
    return wait


def finish_sum(drop=False):
    """Waits for the sum that still runs, if there is one, and adds it to rows.grad. drop: does not
    add it, as it is left from a pass that has failed."""
    while _running:
        rows, wait = _running.pop()
        here = wait()
        if drop:
            continue
        if rows.grad is None:
            rows.grad = from_rows(here, rows.shape, rows.device_mesh)
        else:
            local(rows.grad).add_(here)


def scatter_gradient(leaf, mesh):
    """Returns a DTensor of no memory for a leaf (size, columns) that every rank has. From now on a
    backward pass adds this rank's rows of the mean of leaf.grad to the DTensor's gradient."""
    here = slice_here(len(leaf))
    zeros = leaf.detach().new_zeros(()).expand(here.stop - here.start, leaf.shape[1])
    rows = from_rows(zeros, leaf.shape, mesh).requires_grad_()

    def scatter(leaf):
        finish_sum()  # that of the layer after this one
        _running.append((rows, mean_rows(leaf.grad)))
        leaf.grad = None
        # at the end of the pass, for its last layer: FSDP ends its own sums so, too
        torch.autograd.Variable._execution_engine.queue_callback(finish_sum)
    leaf.register_post_accumulate_grad_hook(scatter)
    return rows


def shard(model, layers, device):
    """
    Shards a model over all ranks by torch's FSDP2, block by block (model.blocks), and moves it from
    the CPU to this rank's device. While a block computes, each rank has all of it.

    Call it before an optimizer is built. layers: the model's low-rank layers. One process alone
    only moves the model. A model on the meta device gets memory for this rank's rows alone; the
    caller then sets their values, see `write`, MHLoRALinear.start. GaLore's bases are gathered with
    W; GaLoLTE's bases, and heads that differ by rank, stay whole. ValueError: two blocks share a
    weight, or a block and the rest do; weights are in few bits, and torch is too old for that.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    is_meta = next(model.parameters()).is_meta  # as drawn elsewhere, or without memory
    move = model.to_empty if is_meta else model.to
    if rank_and_world()[1] == 1:
        print('one process holds all: shard=True does nothing')
        move(device=device)
        return
    blocks = list(dict.fromkeys(model.blocks))
    inside = {module for block in blocks for module in block.modules()}
    rest = {p for module in model.modules() if module not in inside
            for p in module.parameters(recurse=False)}
    parts = [rest, *(set(block.parameters()) for block in blocks)]
    for name, p in model.named_parameters():
        if sum(p in part for part in parts) > 1:
            raise ValueError(f'{name} is shared by two blocks, or by a block and the rest, which '
                             'are sharded one by one: set shard=False, or untie it')
    galore = [layer for layer in layers if layer.moves_weight]
    for layer in galore:  # its basis is gathered with W
        basis = layer._buffers.pop('basis')
        layer.register_parameter('basis', nn.Parameter(basis, requires_grad=False))
    left_alone = per_rank_tensors(layers) | {layer.factor for layer in galore}
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    try:
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, ignored_params=left_alone, reshard_after_forward=True)
    except RuntimeError as error:
        is_coded = not all(p.is_floating_point() for p in model.parameters())
        if not is_coded or torch.__version__ >= (2, 13):
            raise
        raise ValueError(f'torch {torch.__version__} does not shard weights in few bits: take 2.13 '
                         'or newer, or set shard=False') from error
    move(device=device)
    for layer in galore:
        layer.shard_gradient()


def orthogonalise_rows(moves, size, stacked):
    """Orthogonalises the `stacked` matrices, one above the other, that each weight (size, n) holds.
    moves (weights, rows, n): this rank's rows of them. Each rank gets one whole weight at a time,
    and sends every rank its rows of the result."""
    world, each = dist.get_world_size(), rows_each(size)
    _, here, n = moves.shape
    done = []
    for some in moves.split(world):
        parts = F.pad(some, (0, 0, 0, each - here, 0, world - len(some)))  # (world, each, n)
        X = exchanged(parts).flatten(0, 1)[:size]  # of one weight, (size, n)
        X = orthogonalised(X.view(stacked, -1, n)).reshape(size, n)
        X = F.pad(X, (0, 0, 0, each * world - size))
        rows = exchanged(X.view(world, each, n))  # of each matrix
        done.append(rows[:len(some), :here])
    return torch.cat(done)


@torch.no_grad()
def write(model, name, x):
    """Writes x into the parameter of that name; if it is sharded, only this rank's rows of x."""
    p = model.get_parameter(name)
    part = x[rows_here(p)].to(local(p).device)
    if p.is_floating_point():
        local(p).copy_(part)
    else:  # codes, see lowrank.FrozenLinear
        model.get_submodule(name.removesuffix('.weight')).write_weight(part)


# -----------------------------------------------------------------------------
# checkpoints: one file, whatever the number of ranks


@torch.no_grad()
def gather_state(model, layers, optimizer=None, replicas=None):
    """
    Returns what a checkpoint holds, for rank 0, which writes it. Every rank takes part; a tensor
    that is gathered at rank 0 is None on the others. layers: {name: low-rank layer}.

    'model': the state dict that is evaluated: all ranks' heads in global order, averaged replicas,
    whole tensors for shards. With an optimizer of galore.py also 'optimizer': {name of what it
    steps on: its state}, where heads and shards are as in 'model', replicas (ranks, ...), sketches
    the parts of all ranks; and 'replicas': {name: (ranks, ...)}.
    """
    replicas, heads = replicas or {}, per_rank_tensors(layers.values())
    replicated = set(replicas.values())

    def collect(x, p):
        """Gathers x, if ranks differ in it. x is the parameter or buffer p, or state of it."""
        if is_sharded(p):
            x = padded_rows(local(x), len(p))
        elif p not in heads | replicated:
            return x  # all ranks have the same
        x = gather_at(0, x)
        if x is None:
            return None
        if p in replicated:
            return x.cpu()
        if p in heads:
            return in_global_order(x).cpu()
        rows = x.flatten(0, 1).cpu()
        if len(rows) > len(p):  # torch would write what is behind a view, too
            rows = rows[:len(p)].clone()
        return rows

    found, once = {'format': FORMAT, 'model': {}}, {}  # tied weights have two names
    for name, p in model.state_dict(keep_vars=True).items():
        if p not in once and p in replicated:
            once[p] = averaged_copy(p).to(p.dtype).cpu()
        elif p not in once:
            once[p] = collect(p.detach(), p)
        found['model'][name] = once[p]
    if optimizer is None:
        return found
    found.update(optimizer={}, replicas={})
    for p, state in optimizer.state.items():
        saved = found['optimizer'][optimizer.names[p]] = {}
        for key, x in state.items():
            if key == 'sketch':  # ranks have others
                x = gather_at(0, x)
                if x is not None:
                    x = in_global_order(x).cpu()
            elif torch.is_tensor(x) and x.dim():
                x = collect(x, p)
            saved[key] = x
    for name, p in replicas.items():
        found['replicas'][name] = collect(p.detach(), p)
    return found


def take(x, p, heads, replicas=()):
    """This rank's part of x, a tensor of a checkpoint. p: the parameter or buffer that x belongs
    to; heads: tensors that differ by rank; replicas: parameters of which each rank has its own."""
    rank, world = rank_and_world()
    if is_sharded(p):
        return x[rows_here(p)]
    if p in heads:
        return x[rank::world]
    if p in replicas:
        return x[rank]
    return x


@torch.no_grad()
def load_weights(model, layers, weights):
    """Loads the 'model' of a checkpoint, each rank its part. ValueError: it is of another model."""
    tensors, world = model.state_dict(keep_vars=True), rank_and_world()[1]
    heads = per_rank_tensors(layers.values())
    shapes = {name: (*p.shape,) for name, p in tensors.items()}
    for name, p in tensors.items():
        if p in heads:
            shapes[name] = len(p) * world, *p.shape[1:]
    saved = {name: (*x.shape,) for name, x in weights.items()}
    if odd := dict(shapes.items() ^ saved.items()):
        raise ValueError(f'the checkpoint is that of another model: {min(odd)} is missing in one '
                         'of the two, or has two shapes')
    for name, p in tensors.items():
        local(p).copy_(take(weights[name], p, heads))


@torch.no_grad()
def load_state(model, layers, optimizer, checkpoint, replicas=None):
    """Loads a checkpoint, each rank its part, and leaves it as it is. Heads and shards may come
    from another number of ranks; replicas may not, as each rank has its own (ValueError)."""
    rank, world = rank_and_world()
    replicas, heads = replicas or {}, per_rank_tensors(layers.values())
    load_weights(model, layers, checkpoint['model'])
    for name, p in replicas.items():
        saved = checkpoint['replicas'].get(name, ())
        if len(saved) != world:
            raise ValueError(f"with sync='merge' each of {max(len(saved), 1)} ranks saved its own "
                             f'parameters, and here are {world}: resume on as many as before')
        p.copy_(saved[rank])
    named = {name: p for p, name in optimizer.names.items()}
    replicated = set(replicas.values())
    for name, state in checkpoint['optimizer'].items():
        p = named[name]
        for key, x in state.items():
            if key == 'sketch':
                parts = optimizer.sketch_parts(optimizer.layers[p])
                if len(x) == world * parts:
                    x = x[rank::world]
                else:  # other parts were saved: each takes their average, as a sketch is a sum
                    x = x.mean(0).expand(parts, *x.shape[1:])
            elif torch.is_tensor(x) and x.dim():
                x = take(x, p, heads, replicated)
            if torch.is_tensor(x):
                x = x.to(p.device, copy=True)  # the file is mapped, and may be replaced
            optimizer.state[p][key] = x
    optimizer.state_is_loaded()
