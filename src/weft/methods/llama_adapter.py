"""LLaMA-Adapter: trained hidden states that the upper attentions read through a gate that starts closed."""

from dataclasses import dataclass

from weft.core import Method, option


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """y = attention(x) + W_o (g softmax(q (P W_k)^T / sqrt(d)) (P W_v)),  P [N, I] trained, g trained from 0.

    Zhang et al. 2023, arXiv 2303.16199, with one gate for all heads as HF PEFT has it.
    """

    name = "llama_adapter"
    paper = "2303.16199"
    kinds = frozenset({"attention"})
    default_targets = "self-attention"
    num_tokens: int = option(10, help="trained hidden states per layer", minimum=1)
    num_layers: int | None = option(None, help="how many of the last matched attentions; all when not given", minimum=1)

    def check(self, site):
        if not site.has_queries:
            raise ValueError(
                "its queries cannot be recomputed. LLaMA-Adapter reads attentions with q_proj, k_proj, v_proj, o_proj "
                "and rotary positions (Llama, Mistral, Qwen2) and GPT-2's c_attn; prefix tuning works for others"
            )

    def adapts(self, index, count):
        if self.num_layers is not None and self.num_layers > count:
            raise ValueError(f"num_layers={self.num_layers}: only {count} attentions match")
        return self.num_layers is None or index >= count - self.num_layers

    def init(self, site, op):
        return {"prompt": site.normal(self.num_tokens, site.in_features), "gate": site.zeros(1)}

    def forward(self, c, x, op):
        return op.attend(op(x), c["prompt"], c["gate"])
