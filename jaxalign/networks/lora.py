"""Low-rank adapters: which leaves they are, and how they fold back into the kernels beside them.

The adapters themselves live in `Dense` (a Transformer has them when its config's `lora_rank` is positive), so that a
frozen kernel costs no weight gradient. Hu et al. 2021, arXiv 2106.09685.
"""

from jaxalign.types import Params

ADAPTER_LEAVES = ("lora_a", "lora_b")


def is_adapter(name: str) -> bool:
    """Whether a leaf name ("layers/attention/q/lora_a") is an adapter's: `gradient_algorithm(trainable=is_adapter)`."""
    return name.rsplit("/", 1)[-1] in ADAPTER_LEAVES


def merge_lora(params: Params, *, scale: float) -> Params:
    """Fold adapters into kernels: kernel[..., I, O] + scale * lora_a[..., I, R] @ lora_b[..., R, O], adapters dropped.

    `scale` is lora_alpha / lora_rank. The result fits the same network with lora_rank = 0 and gives the same outputs.
    """
    if not isinstance(params, dict):
        return params
    merged = {name: merge_lora(child, scale=scale) for name, child in params.items() if name not in ADAPTER_LEAVES}
    if "lora_a" in params:
        kernel, a, b = params["kernel"], params["lora_a"], params["lora_b"]
        merged["kernel"] = (kernel + scale * (a @ b)).astype(kernel.dtype)
    return merged
