"""
Full rank on 8-bit weights: the weights of target layers are trained as int8 codes with a scale for
each block of 128 elements (or 64 or 32, if 128 does not divide the length of a row).

    y = W x + b,    G = dL/dW (m, n),    W <- round(decay W - lr (the rule's update of G))

The rounding is stochastic and unbiased (quant.update_), so that updates smaller than a level add
up. torch gives integers no gradient: G is the gradient of a zero factor beside W, whose values
nobody reads (lowrank.ZeroFactorLinear). There is no projection, and only the layer that computes
has a float copy of its W. With LowRankOptimizer(model, per_layer=True) G is freed as soon as W is
updated; besides the weights, only the optimizer's state remains.

LOMO and AdaLomo (arXiv 2306.09782, 2310.10195) also update in the backward pass, on 16-bit weights.
Q-GaLore (arXiv 2407.08296) trains int8 weights inside a projection. torchao trains int8 weights
with whole gradients and AdamW's moments.
"""

from collections.abc import Iterable

import torch.nn as nn
from torch import Tensor

from galore import UPDATERS, WEIGHT, Updater
from lowrank import ZeroFactorLinear, Zeros, replace_linears
from quant import update_


class Int8Linear(ZeroFactorLinear):
    """
    A linear layer whose weight is trained at full rank in 8 bits.

    linear, bits: see FrozenLinear. With bits=None the weight keeps its dtype and trains likewise.
    zeros: shared by the layers of a model, see lowrank.Zeros.
    """

    def __init__(self, linear: nn.Linear, bits: int | None = 8, zeros: Zeros | None = None):
        super().__init__(linear, min(linear.weight.shape), bits=bits)
        self.add_factor(linear.weight.shape, linear.weight, zeros)

    def reset_parameters(self) -> None:
        """Does nothing: there is nothing beside W."""

    def forward_with_factors(self, x: Tensor) -> Tensor:
        self.check_optimizer()
        return self.product(x, None, self.factor, is_zero=True)


class Int8Updater(Updater):
    """The weight of an Int8Linear. p.grad is G (m, n)."""

    def apply_update(self, update: Tensor, lr: float, decay: float) -> None:
        """W <- decay W - lr update, rounded stochastically."""
        update_(self.layer.weight, update, lr, decay, self.seed(WEIGHT), self.layer.scales)


UPDATERS[Int8Linear] = Int8Updater


def apply_int8(model: nn.Module, targets: Iterable[str] = ('attn', 'mlp'),
               bits: int | None = 8) -> list[str]:
    """Replaces linear layers of a model by Int8Linear, in place, as lowrank.apply_galore does;
    train them with galore.LowRankOptimizer. Returns the names of these layers. Output layers, and
    (with a warning) weights whose n is not a multiple of 32, keep their dtype and are trained
    likewise."""
    zeros = Zeros()
    return replace_linears(model, targets, lambda linear, own: Int8Linear(linear, own, zeros),
                           bits, trains_weight=True)
