"""The optimisers that PyTorch keeps, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from weft.core import option
from weft.errors import WeftError
from weft.optim.choice import Choice, Groups, Setting

__all__: list[str] = []

EPS = "added to the denominator"


@dataclass(frozen=True)
class _Torch(Choice):
    """What all of them share."""

    source, per_tensor = "torch", True


@dataclass(frozen=True)
class AdamW(_Torch):
    """Loshchilov and Hutter 2017, arXiv 1711.05101."""

    name = "adamw"
    what = "averages of the gradient and its square, decoupled weight decay"
    paper = "1711.05101"
    eps: float = option(1e-8, help=EPS, above=0)
    amsgrad: bool = option(False, help="divide by the largest average so far")

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        # fused: one call for all tensors of an adapter, which are many and small
        return torch.optim.AdamW(groups, lr=setting.rate, betas=setting.betas, fused=True, **asdict(self))


@dataclass(frozen=True)
class Adam(_Torch):
    """Kingma and Ba 2014, arXiv 1412.6980."""

    name = "adam"
    what = "AdamW with weight decay in the gradient"
    paper = "1412.6980"
    eps: float = option(1e-8, help=EPS, above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=setting.rate, betas=setting.betas, fused=True, eps=self.eps)


@dataclass(frozen=True)
class SGD(_Torch):
    """Gradient descent with momentum."""

    name = "sgd"
    what = "gradient descent; train.betas[0] is the momentum"
    nesterov: bool = option(False, help="look ahead along the momentum")

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        if self.nesterov and not setting.betas[0]:
            raise WeftError("train.optimizer: sgd with nesterov needs momentum; train.betas[0] is 0")
        return torch.optim.SGD(groups, lr=setting.rate, momentum=setting.betas[0], nesterov=self.nesterov)


@dataclass(frozen=True)
class Adafactor(_Torch):
    """Shazeer and Stern 2018, arXiv 1804.04235."""

    name = "adafactor"
    what = "the average of squares as one row and one column"
    paper, takes_betas = "1804.04235", False
    beta2_decay: float = option(-0.8, help="exponent of the step in the average's weight", maximum=0)
    d: float = option(1.0, help="largest root mean square of an update", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, lr=setting.rate, **asdict(self))

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        found = 0
        for p in (p for group in groups for p in group["params"]):
            rows = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()
            found += rows * p.element_size() + 4  # and a count of steps
        return found


@dataclass(frozen=True)
class Adagrad(_Torch):
    """Duchi et al. 2011."""

    name = "adagrad"
    what = "divides by the root of all squared gradients so far"
    takes_betas = False
    lr_decay: float = option(0.0, help="how fast the rate falls with the steps", minimum=0)
    eps: float = option(1e-10, help=EPS, above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(groups, lr=setting.rate, **asdict(self))


@dataclass(frozen=True)
class Adamax(_Torch):
    """Kingma and Ba 2014, arXiv 1412.6980."""

    name = "adamax"
    what = "Adam with the largest gradient instead of the average of squares"
    paper = "1412.6980"
    eps: float = option(1e-8, help=EPS, above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.Adamax(groups, lr=setting.rate, betas=setting.betas, eps=self.eps)


@dataclass(frozen=True)
class NAdam(_Torch):
    """Dozat 2016."""

    name = "nadam"
    what = "AdamW with Nesterov's momentum"
    momentum_decay: float = option(4e-3, help="how fast the momentum's weight changes", minimum=0)
    eps: float = option(1e-8, help=EPS, above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        own = asdict(self)
        return torch.optim.NAdam(groups, lr=setting.rate, betas=setting.betas, decoupled_weight_decay=True, **own)


@dataclass(frozen=True)
class RAdam(_Torch):
    """Liu et al. 2019, arXiv 1908.03265."""

    name = "radam"
    what = "AdamW whose first steps are rectified, so that it needs no warm-up"
    paper = "1908.03265"
    eps: float = option(1e-8, help=EPS, above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        own = asdict(self)
        return torch.optim.RAdam(groups, lr=setting.rate, betas=setting.betas, decoupled_weight_decay=True, **own)


@dataclass(frozen=True)
class RMSprop(_Torch):
    """Tieleman and Hinton 2012."""

    name = "rmsprop"
    what = "divides by the root of the average of squares"
    takes_betas = False
    alpha: float = option(0.99, help="weight of the past in the average", minimum=0, maximum=1)
    momentum: float = option(0.0, help="momentum", minimum=0, maximum=1)
    eps: float = option(1e-8, help=EPS, above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=setting.rate, **asdict(self))


@dataclass(frozen=True)
class Muon(_Torch):
    """Jordan et al. 2024; the rate as in AdamW: Liu et al. 2025, arXiv 2502.16982."""

    name = "muon"
    what = "momentum made orthogonal; for matrices only, with AdamW's learning rates"
    paper, takes_betas = "2502.16982", False
    momentum: float = option(0.95, help="momentum", minimum=0, maximum=1)
    nesterov: bool = option(True, help="look ahead along the momentum")
    ns_steps: int = option(5, help="iterations of Newton and Schulz", minimum=1)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        other = next((t for t in setting.trained if t.parameter.ndim != 2), None)
        if other is not None:
            shape = list(other.parameter.shape)
            raise WeftError(
                f"train.optimizer: muon trains matrices, and {other.name} is {shape}; choose another optimizer, "
                "or a method whose tensors are all matrices, such as lora"
            )
        return torch.optim.Muon(groups, lr=setting.rate, adjust_lr_fn="match_rms_adamw", **asdict(self))
