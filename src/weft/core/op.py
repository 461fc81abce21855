"""The verbs: all that a method may do to the map it adapts, and what they mean on data.

Shape letters used everywhere: B batch, T tokens, I in, O out, R rank, N blocks, E experts, K stacked adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core.entries import scattered
from weft.core.given import spread
from weft.core.penalty import penalised
from weft.core.positions import Positions
from weft.core.rotations import join_blocks
from weft.core.site import Site


class Op(ABC):
    """A frozen map W with its bias. One method body, read with different ops, trains, merges, batches and counts.

    Values are tensors for ops on data and `Affine` maps for `weft.core.affine.WeightOp`.
    """

    site: Site

    @abstractmethod
    def __call__(self, x: Any) -> Any:
        """The frozen map itself: W x + bias."""

    @abstractmethod
    def weight(self) -> Tensor:
        """W as a dense matrix, [O, I, *kernel]. Dequantised, and merged where the map is itself an adapted one."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """What W x is shifted by, [O], or None."""

    @abstractmethod
    def project(self, x: Any, a: Tensor) -> Any:
        """a x: the map with weight `a` [R, I, *kernel] in place of W, in this operator's own geometry."""

    @abstractmethod
    def expand(self, h: Any, b: Tensor, onto: Any = None) -> Any:
        """b h: mix the channels of h pointwise with `b` [O, R]; added to `onto` where given (one fused operation)."""

    @abstractmethod
    def scale(self, y: Any, g: Tensor) -> Any:
        """diag(g) y: one gain per channel."""

    @abstractmethod
    def shift(self, y: Any, b: Tensor) -> Any:
        """y + b: one offset per channel."""

    @abstractmethod
    def rotate(self, x: Any, q: Tensor) -> Any:
        """blockdiag(q) x: one small matrix per block of channels, q [N, block out, block in], square or not."""

    def with_delta(self, x: Any, delta: Tensor) -> Any:
        """(W + delta) x + bias, delta [O, I, *kernel]: for updates that have no cheaper form than a dense matrix."""
        return self(x) + self.project(x, delta)

    def with_entries(self, x: Any, values: Tensor, places: Tensor) -> Any:
        """(W + S) x + bias, S zero but for `values` [K] at `places` [K], counted row after row."""
        return self.with_delta(x, scattered(values, places, self.site.shape))

    def kron(self, x: Any, a: Tensor, b: Tensor) -> Any:
        """(a (x) b) x, the Kronecker product of a [O / P, I / Q] and b [P, Q]: it is never built."""
        (rows, columns), height = a.shape, b.shape[0]
        sizes = (columns, height), (height, rows)
        across, back = (torch.arange(m * n, device=a.device).view(m, n).mT.flatten() for m, n in sizes)
        h = self.permute(self.rotate(x, b.expand(columns, -1, -1)), across)  # blocks of x, then entries across blocks
        return self.permute(self.rotate(h, a.expand(height, -1, -1)), back)

    def prepend(self, y: Any, *rows: Tensor) -> Any:
        """y with virtual rows [N, C] before what it reads: tokens of an input, keys and values of an attention."""
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: no virtual tokens can come before its input")

    def attend(self, y: Any, hidden: Tensor, gate: Tensor) -> Any:
        """y + gate * what this attention's queries read from `hidden` [N, I], in a softmax of its own."""
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: only an attention can attend")

    def positions(self, x: Any) -> Positions:
        """Where the tokens of x [B, T, C] stand in the prompts of their rows."""
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: only tokens at a block have positions")

    def num_seen(self) -> int:
        """How many tokens of their rows came before those of this call: a generation goes on behind its cache."""
        return 0

    def hidden(self) -> list[Tensor]:
        """What the layers before this place gave, [B, T, C] each, without a graph: the embeddings come first.

        That is at the end of a backbone. Elsewhere it is what the last layer gave in a pass of the base alone, before
        this one, for methods that survey.
        """
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: only the end of a backbone knows its layers")

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, [B, T, H, D], of a side network's heads [B, H, T, D]: each token sees what the
        model lets it see, earlier ones of a generation too."""
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: only the end of a backbone has a mask")

    def invoked(self, x: Any, tokens: tuple[int, ...]) -> Tensor:
        """Which tokens of x stand in the last `tokens` of their text or behind them: [..., 1], and none in a text that
        has no such tokens."""
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: nothing says which text it reads")

    def given(self, x: Any, name: str, count: int) -> Tensor:
        """What is given under a name for the rows of x (its task, say), 0 to count - 1; one dimension less than x."""
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: nothing is given for its rows")

    def with_gains(self, b: Tensor, left: Tensor, right: Tensor) -> Any:
        """diag(left) b diag(right), b [O, R], among coefficients: one matrix, or three where many adapters share b."""
        return left.unsqueeze(-1) * b * right

    @abstractmethod
    def permute(self, x: Any, order: Tensor) -> Any:
        """The channels of x in another order: channel j of the result is channel order[j] of x."""

    @abstractmethod
    def take(self, x: Any, indices: Tensor) -> Any:
        """Some channels of x, in any order and as often as asked: channel j of the result is channel indices[j]."""

    @abstractmethod
    def place(self, h: Any, indices: Tensor, size: int, onto: Any = None) -> Any:
        """The channels of h among `size` channels, the transpose of `take`: channel j is added to channel indices[j] of
        zeros, or of `onto` where given."""

    @abstractmethod
    def drop(self, x: Any, p: float) -> Any:
        """Dropout while the module trains; the identity otherwise and in every other reading."""

    def chance(self, *size: int) -> Tensor | None:
        """Uniform draws in [0, 1) while the module trains; None otherwise and in every other reading."""
        return None

    def penalise(self, y: Any, loss: Tensor) -> Any:
        """y, with `loss` [] added to what training minimises: for losses that depend on the data (load balance)."""
        return y


def _cast(a: Tensor, x: Tensor) -> Tensor:
    """The one place where dtypes meet: coefficients follow the data (a no-op when they already agree)."""
    return a if a.dtype == x.dtype or _autocast(x) else a.to(x.dtype)


def _autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class Source(Protocol):
    """What an op on data needs of the module it reads."""

    def call(self, x: Tensor) -> Tensor:
        """The module's own forward: W x + bias."""

    def weight(self) -> Tensor:
        """[O, I, *kernel], dequantised."""

    def bias(self) -> Tensor | None:
        """[O] or None."""

    def training(self) -> bool:
        """Whether the module is in training mode."""

    def linear(self) -> bool:
        """Whether `call` is exactly x W^T + bias with W and bias frozen: then its gradient is dy W."""

    def held_in(self) -> Mapping[str, Tensor | None]:
        """The module's own parameters by name: coefficients that were made from them notice a change."""

    def given(self, name: str, count: int) -> Tensor:
        """What is given for the rows of the batch: [], [B], or [1, N] for the tokens of packed rows."""

    def invoked(self, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """Which tokens of x stand in the last `tokens` of their text or behind them, one channel each."""

    def hidden(self) -> list[Tensor]:
        """What the last layer gave in a pass of the base alone, for the whole batch."""

    def positions(self, x: Tensor) -> Positions:
        """Where the tokens of x [B, T, C], the whole batch, stand in the prompts of their rows."""

    def num_seen(self) -> int:
        """How many tokens of their rows came before those of this call."""


class DataOp(Op):
    """A module's map on activations whose channels are the last dimension."""

    channel = -1

    def __init__(self, site: Site, source: Source):
        self.site, self.source = site, source

    def __call__(self, x: Tensor) -> Tensor:
        return self.source.call(x)

    def weight(self) -> Tensor:
        return self.source.weight()

    def bias(self) -> Tensor | None:
        return self.source.bias()

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, _cast(a, x))

    def expand(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        y = F.linear(h, _cast(b, h))
        if onto is None:
            return y
        return y.add_(onto) if y.dtype == onto.dtype else onto + y  # y is fresh: no second tensor of this size

    def scale(self, y: Tensor, g: Tensor) -> Tensor:
        return y * self._on_channels(_cast(g, y))

    def shift(self, y: Tensor, b: Tensor) -> Tensor:
        return y + self._on_channels(_cast(b, y))

    def rotate(self, x: Tensor, q: Tensor) -> Tensor:
        q = merge_blocks(q)
        n, _, block = q.shape
        x = x.movedim(self.channel, -1)
        # blocks lead so that the product is one batched matmul: [N, ..., block] @ [N, block, block]
        parts = x.unflatten(-1, (n, block)).movedim(-2, 0)  # [N, ..., block]
        y = (parts.unsqueeze(-2).flatten(1, -2) @ _cast(q, x).mT).view(*parts.shape[:-1], q.shape[1])
        return y.movedim(0, -2).flatten(-2).movedim(-1, self.channel)

    def permute(self, x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(x.ndim + self.channel, order)

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.index_select(x.ndim + self.channel, indices)

    def place(self, h: Tensor, indices: Tensor, size: int, onto: Tensor | None = None) -> Tensor:
        dim = h.ndim + self.channel
        if onto is None:
            onto = h.new_zeros(*h.shape[:dim], size, *h.shape[dim + 1 :])
        return onto.index_add(dim, indices, h.to(onto.dtype))

    def kron(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.channel != -1:
            return super().kron(x, a, b)
        return (_cast(a, x) @ F.linear(x.unflatten(-1, (a.shape[1], -1)), _cast(b, x))).flatten(-2)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p, training=True) if p and self.source.training() else x

    def chance(self, *size: int) -> Tensor | None:
        return torch.rand(size, device=self.site.device) if self.source.training() else None

    def given(self, x: Tensor, name: str, count: int) -> Tensor:
        # channels that come last are the one dimension that rows and tokens do not fill
        return spread(self.source.given(name, count), x, x.ndim - 1 if self.channel == -1 else 1, name)

    def hidden(self) -> list[Tensor]:
        return self.source.hidden()

    def positions(self, x: Tensor) -> Positions:
        return self.source.positions(x)

    def num_seen(self) -> int:
        return self.source.num_seen()

    def invoked(self, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        return self.source.invoked(x, tokens)

    def penalise(self, y: Tensor, loss: Tensor) -> Tensor:
        return penalised(y, loss) if self.source.training() else y

    def _on_channels(self, v: Tensor) -> Tensor:
        return v if self.channel == -1 else v.reshape(*v.shape, *[1] * (-1 - self.channel))


def merge_blocks(q: Tensor) -> Tensor:
    """The same block-diagonal matrix in blocks of about 32 rows: many tiny matmuls cost more than their zeros save."""
    n, rows, columns = q.shape
    together = next((k for k in range(min(n, 32 // max(rows, columns)), 1, -1) if n % k == 0), 1)
    if together == 1:
        return q
    return join_blocks(q, together)


class ConvSource(Source, Protocol):
    """A convolution module, which can also run its own geometry with another kernel."""

    def conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The module's stride, padding and dilation with `kernel` in place of its weight, without bias."""


class ConvOp(DataOp):
    """A convolution: channels come before the spatial dimensions, `project` keeps stride, padding and dilation."""

    def __init__(self, site: Site, source: ConvSource):
        super().__init__(site, source)
        self.conv = source.conv
        self.channel = -1 - len(site.kernel_size)
        self.pointwise = (F.conv1d, F.conv2d, F.conv3d)[len(site.kernel_size) - 1]

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return self.conv(x, _cast(a, x))

    def expand(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        b = _cast(b, h).reshape(*b.shape, *[1] * len(self.site.kernel_size))
        y = self.pointwise(h, b, groups=self.site.groups)
        return y if onto is None else onto + y


class LookupOp(DataOp):
    """An embedding: the input is a token id, so `project` looks rows up and the input has no channels to move."""

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        # ids have no dtype for the result to follow: it follows the table's
        return F.embedding(x, a.mT).to(self.source.weight().dtype)

    def scale(self, y: Tensor, g: Tensor) -> Tensor:
        self._refuse(y, "scaled")
        return super().scale(y, g)

    def rotate(self, x: Tensor, q: Tensor) -> Tensor:
        self._refuse(x, "rotated")
        return super().rotate(x, q)

    def kron(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        self._refuse(x, "multiplied")
        return super().kron(x, a, b)

    def permute(self, x: Tensor, order: Tensor) -> Tensor:
        self._refuse(x, "permuted")
        return super().permute(x, order)

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        self._refuse(x, "taken apart")
        return super().take(x, indices)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x if not x.is_floating_point() else super().drop(x, p)

    def given(self, x: Tensor, name: str, count: int) -> Tensor:
        return spread(self.source.given(name, count), x, x.ndim if not x.is_floating_point() else x.ndim - 1, name)

    def _refuse(self, x: Tensor, done: str) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{self.site.address} is an embedding: its input is token ids, which cannot be {done}")
