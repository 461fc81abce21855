"""Prefix tuning: trained keys and values before those of every attention."""

from dataclasses import dataclass

from torch import tanh

from weft.core import Method, option


@dataclass(frozen=True)
class PrefixTuning(Method):
    """y = softmax(q [K'; K]^T / sqrt(d)) [V'; V] with trained K', V' [N, O]; projected: [K' V'] = tanh(E U + u) W + w.

    Li & Liang 2021, arXiv 2101.00190. E, U and u are shared by all layers.
    """

    name = "prefix"
    paper = "2101.00190"
    kinds = frozenset({"attention"})
    default_targets = "self-attention"
    num_tokens: int = option(8, help="virtual tokens before every attention's own", minimum=1)
    projection: bool = option(False, help="make the prefix with a small network, for stabler training")
    hidden_size: int | None = option(None, help="width of that network; the model's own when not given", minimum=1)

    def _hidden(self, site):
        return site.in_features if self.hidden_size is None else self.hidden_size

    def shared(self, sites):
        if not self.projection:
            return {}
        site, hidden = sites[0], self._hidden(sites[0])
        return {
            "E": site.normal(self.num_tokens, site.out_features),
            "U": site.uniform(site.out_features, hidden, bound=site.out_features**-0.5),
            "u": site.zeros(hidden),
        }

    def init(self, site, op):
        if self.projection:
            hidden = self._hidden(site)
            return {
                "W": site.uniform(hidden, 2 * site.out_features, bound=hidden**-0.5),
                "w": site.zeros(2 * site.out_features),
            }
        return {
            "keys": site.normal(self.num_tokens, site.out_features, salt="keys"),
            "values": site.normal(self.num_tokens, site.out_features, salt="values"),
        }

    def coefficients(self, t, op):
        if not self.projection:
            return t
        keys, values = (tanh(t["E"] @ t["U"] + t["u"]) @ t["W"] + t["w"]).chunk(2, dim=-1)
        return {"keys": keys, "values": values}

    def forward(self, c, x, op):
        return op.prepend(op(x), c["keys"], c["values"])
