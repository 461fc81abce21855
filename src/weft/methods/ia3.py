"""IA3: a trained gain on every output channel, or on every input channel of a feed-forward layer."""

from dataclasses import dataclass

from weft.core import LINEAR, Method, option


@dataclass(frozen=True)
class IA3(Method):
    """y = l * (W x + b), or y = W (l * x) + b for a feed-forward layer.

    Liu et al. 2022, arXiv 2205.05638.
    """

    name = "ia3"
    paper = "2205.05638"
    kinds = LINEAR
    feedforward: bool = option(False, help="scale the input, as the paper does in feed-forward layers")

    def check(self, site):
        if self.feedforward and site.kind == "embedding":
            raise ValueError("an embedding's input is token ids, which cannot be scaled; use feedforward=False")

    def init(self, site, op):
        return {"gain": site.ones(site.in_features if self.feedforward else site.out_features)}

    def forward(self, c, x, op):
        return op(op.scale(x, c["gain"])) if self.feedforward else op.scale(op(x), c["gain"])
