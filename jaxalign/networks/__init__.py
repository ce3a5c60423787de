"""Networks in Flax Linen: the only package that imports a module system."""

from jaxalign.networks.convolution import convolve
from jaxalign.networks.convolutional import ConvNet
from jaxalign.networks.dense import Dense, matmul
from jaxalign.networks.discriminator import Discriminator
from jaxalign.networks.generator import Generator, ImageToImage
from jaxalign.networks.group_sort import group_sort
from jaxalign.networks.initializers import orthogonal
from jaxalign.networks.lora import is_adapter, merge_lora
from jaxalign.networks.mlp import MLP
from jaxalign.networks.orthogonal_dense import LipschitzMLP, OrthogonalDense
from jaxalign.networks.recurrent import GRU
from jaxalign.networks.sites import site
from jaxalign.networks.spectral_norm import spectral_norm, spectral_normalized
from jaxalign.networks.transformer import (
    Cache,
    RopeScaling,
    Transformer,
    TransformerConfig,
    apply_rope,
    rope_frequencies,
    transformer,
)

__all__ = [
    "GRU",
    "MLP",
    "Cache",
    "ConvNet",
    "Dense",
    "Discriminator",
    "Generator",
    "ImageToImage",
    "LipschitzMLP",
    "OrthogonalDense",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "apply_rope",
    "convolve",
    "group_sort",
    "is_adapter",
    "matmul",
    "merge_lora",
    "orthogonal",
    "rope_frequencies",
    "site",
    "spectral_norm",
    "spectral_normalized",
    "transformer",
]
