"""
Averages over processes in 2 bits per element, for networks that are much slower than the GPUs:

    two_bit_mean(x, error)   the mean of x over all processes, from messages of 2.25 bits
    TwoBitGaLoLTELinear      GaLoLTE, whose workers send their updates that way

What rounding loses is not gone: each process keeps it in `error` and adds it to what it sends next
(error feedback, Seide et al. 2014). So the sum of all averages stays exact but for one message.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lowrank import GaLoLTELinear, rank_and_world

BLOCK = 64  # elements that share a step


def pack(x):
    """Bytes (..., 18) for x (..., 64): a code of 2 bits for each element, which stands for -3, -1,
    1 or 3 half steps, and the step in bfloat16."""
    step = x.norm(dim=-1, keepdim=True) / 8  # near the best one for Gaussian elements
    level = (x / step.clamp_min(torch.finfo(x.dtype).tiny)).floor_().clamp_(-2, 1) + 0.5
    # the step of least squares: a larger error than x itself would make error feedback diverge
    step = (x * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
    codes = (level + 1.5).to(torch.uint8).unflatten(-1, (16, 4))
    codes = (codes << bit_offsets(x)).sum(-1, dtype=torch.uint8)  # (..., 16)
    return torch.cat([codes, step.bfloat16().view(torch.uint8)], -1)


def unpack(message, dtype):
    """The elements (..., 64) that the bytes (..., 18) of `pack` stand for."""
    codes, step = message.split([16, 2], -1)
    level = (codes[..., None] >> bit_offsets(codes) & 3).flatten(-2)
    return (level.to(dtype) - 1.5) * step.contiguous().view(torch.bfloat16)


def bit_offsets(x):
    return torch.arange(0, 8, 2, dtype=torch.uint8, device=x.device)


@torch.no_grad()
def two_bit_mean(x, error):
    """
    The mean of x over all processes, with the same bits in each of them. error, of x's shape: what
    earlier messages of this process have lost. It is added to x, and replaced by the new loss.

    Process k averages slice k of all tensors and sends the mean to all others, so that as many
    elements travel as in the ring of an all_reduce.
    """
    process, world = rank_and_world()
    if world == 1:
        return x
    size = x.numel()
    value = F.pad((x + error).flatten(), (0, -size % (world * BLOCK))).view(world, -1, BLOCK)
    message = pack(value)  # (world, blocks, 18)
    received = torch.empty_like(message)  # slice `process` of all processes
    dist.all_to_all_single(received, message)
    mean = unpack(received, x.dtype).mean(0)  # (blocks, 64)
    answer = pack(mean)
    lost = value - unpack(message, x.dtype)
    # times world, because the next mean divides by it, and only this process keeps this loss
    lost[process] += world * (mean - unpack(answer, x.dtype))
    error.copy_(lost.flatten()[:size].view(x.shape))
    answers = answer.new_empty(world, *answer.shape)
    dist.all_gather([*answers], answer)
    return unpack(answers, x.dtype).flatten()[:size].view(x.shape)


class TwoBitGaLoLTELinear(GaLoLTELinear):
    """GaLoLTE with one head in each process. Merges send B in 2 bits, and each worker keeps its own
    moments. Evaluate right after merges, when B is zero."""

    def __init__(self, linear, rank, heads, merge_every, outer_lr=1.0, outer_momentum=0.0):
        super().__init__(linear, rank, heads, merge_every, outer_lr, outer_momentum)
        self.register_buffer('error', self.Q.new_zeros(self.long, self.rank))

    def mean_of_heads(self, x):
        if x is not self.B:  # moments
            return x[0]
        # transposed, because columns differ in size: a block has elements of one column
        return two_bit_mean(x[0].mT, self.error.mT).mT

    def merged_weight(self):
        return self.weight

    def rotate(self, C):
        super().rotate(C)
        self.error.copy_(self.error @ C)
