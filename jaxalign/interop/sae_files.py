"""Sparse autoencoders in the files of others: EleutherAI's sparsify, Gemma Scope, and whichever a path holds."""

import pathlib
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.interop.sae_lens import CONFIG, WEIGHTS, check_params, entry, load_sae_lens, read_json, read_tensors
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.types import Params

SPARSIFY_WEIGHTS, GEMMA_SCOPE = "sae.safetensors", "params.npz"
SPARSIFY_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
GEMMA_SCOPE_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def load_sae(path: str | pathlib.Path) -> tuple[Params, SAEConfig]:
    """(params, config) from a SAELens or sparsify folder, or a Gemma Scope file or folder, told by the files there.

    Raises FileNotFoundError saying what was looked for, and what `load_sae_lens`, `load_sparsify` and
    `load_gemma_scope` raise.
    """
    path = pathlib.Path(path)
    if path.is_file() or (path / GEMMA_SCOPE).is_file():
        return load_gemma_scope(path)
    if (path / WEIGHTS).is_file():
        return load_sae_lens(path)
    if (path / SPARSIFY_WEIGHTS).is_file():
        return load_sparsify(path)
    raise FileNotFoundError(
        f"{path}: no SAE here; looked for {WEIGHTS} (SAELens), {SPARSIFY_WEIGHTS} (sparsify) and {GEMMA_SCOPE} (Gemma "
        "Scope)"
    )


def load_sparsify(directory: str | pathlib.Path) -> tuple[Params, SAEConfig]:
    """(params, config) of a "topk" SAE or transcoder by EleutherAI's sparsify: cfg.json and sae.safetensors.

    encoder.weight [F, D], encoder.bias [F], W_dec [F, D_out], b_dec [D_out]; it encodes x - b_dec, a transcoder x.
    Raises FileNotFoundError, and ValueError naming file and entry, also for a skip connection or another activation.
    """
    directory = pathlib.Path(directory)
    cfg, where = read_json(directory / CONFIG), str(directory / CONFIG)
    if cfg.get("activation", "topk") != "topk":
        raise ValueError(f"{where}: activation {cfg['activation']!r} is not supported; topk is")
    if cfg.get("signed"):
        raise ValueError(f"{where}: signed features are not supported")
    file = directory / SPARSIFY_WEIGHTS
    tensors = read_tensors(file)
    if unknown := sorted(tensors.keys() - SPARSIFY_NAMES.keys()):
        raise ValueError(f"{file}: array {unknown[0]!r} is not supported; there are {', '.join(SPARSIFY_NAMES)}")
    params = {SPARSIFY_NAMES[name]: array.astype(np.float32) for name, array in tensors.items()}
    if "W_enc" in params:
        params["W_enc"] = params["W_enc"].T
    d_in, transcoder = entry(cfg, "d_in", where, int), entry(cfg, "transcode", where, bool, False)
    features = cfg.get("num_latents") or d_in * entry(cfg, "expansion_factor", where, int)
    config = SAEConfig(
        d_in=d_in,
        d_sae=features,
        k=entry(cfg, "k", where, int),
        d_out=_columns(params, d_in) if transcoder else None,
        rescale_by_decoder_norm=False,
    )
    return _checked(str(file), params, config)


def load_gemma_scope(path: str | pathlib.Path) -> tuple[Params, SAEConfig]:
    """(params, config) of a "jumprelu" SAE or transcoder of Gemma Scope (arXiv:2408.05147): params.npz, or its folder.

    W_enc [D, F], b_enc [F], W_dec [F, D_out], b_dec [D_out], threshold [F]; x is encoded as it is, not x - b_dec.
    Raises FileNotFoundError, and ValueError naming file and array.
    """
    path = pathlib.Path(path)
    file = path / GEMMA_SCOPE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            params = {name: arrays[name].astype(np.float32) for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: not an .npz file of arrays ({error})") from error
    if missing := [name for name in GEMMA_SCOPE_NAMES if name not in params]:
        raise ValueError(f"{file}: no array {missing[0]!r}; Gemma Scope has {', '.join(GEMMA_SCOPE_NAMES)}")
    if params["W_enc"].ndim != 2:
        raise ValueError(f"{file}: W_enc is {params['W_enc'].shape}, needs [D, F]")
    d_in, features = params["W_enc"].shape
    d_out = _columns(params, d_in)
    config = SAEConfig(
        d_in=d_in,
        d_sae=features,
        activation="jumprelu",
        d_out=None if d_out == d_in else d_out,
        apply_b_dec_to_input=False,
    )
    return _checked(str(file), params, config)


def _columns(params: dict[str, np.ndarray], default: int) -> int:
    """D_out by W_dec [F, D_out]; one that is missing or of another rank is for `check_params` to name."""
    w_dec = params.get("W_dec")
    return default if w_dec is None or w_dec.ndim != 2 else w_dec.shape[1]


def _checked(where: str, params: dict[str, np.ndarray], config: SAEConfig) -> tuple[Any, SAEConfig]:
    check_params(where, params, config)
    return {name: jnp.asarray(array) for name, array in params.items()}, config
