"""Sparse autoencoders in SAELens' files: a folder with cfg.json and sae_weights.safetensors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.interpretability.sae_config import TRACKING, SAEConfig
from jaxalign.interpretability.sae_parameters import fold_decoder_norm, fold_input_scale
from jaxalign.types import Params

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.0.0"  # the first version of SAELens whose cfg.json is written this way
# Ours -> what SAELens loads for inference; it too turns what selects over a batch into jumprelu.
ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
TRAINED_AS = {"matryoshka": "matryoshka_batchtopk", "relu": "standard"}
SCALED = ("expected_average_only_in",)  # inputs times a constant, which SAELens folds in when training ends


def save_sae_lens(directory: str | pathlib.Path, params: Params, config: SAEConfig, **metadata: Any) -> None:
    """Write an SAE that `sae_lens.SAE.load_from_disk(directory)` reads: the same features, the same reconstructions.

    "batchtopk" and "matryoshka" become "jumprelu" with their tracked threshold in every place, as in SAELens; a
    transcoder becomes SAELens' "transcoder" ("relu") or "jumprelu_transcoder". Where features are in units of the
    decoder's norm, SAELens is told so ("topk"), or the norm is folded in, which changes neither features nor output.

    Args:
        directory: made if it is not there.
        params, config: as `sparse_autoencoder` trains them.
        metadata: what else SAELens should know: model_name="gpt2", hook_name="blocks.6.hook_resid_pre", ...

    Raises ValueError for a crosscoder, a "topk" or "gated" transcoder, which SAELens has not, and for params whose
    names, shapes or values (NaN) are not the config's.
    """
    directory = pathlib.Path(directory)
    if config.layers is not None:
        raise ValueError(f"{directory}: SAELens has no crosscoders (config.layers = {config.layers})")
    architecture = ARCHITECTURES[config.activation]
    if config.d_out is not None:
        if architecture not in TRANSCODERS:
            raise ValueError(f"{directory}: SAELens has no {config.activation!r} transcoders")
        architecture = TRANSCODERS[architecture]
    params = {name: np.asarray(leaf) for name, leaf in params.items()}
    check_params(str(directory), params, config)
    keeps_norm = config.activation == "topk" and config.rescale_by_decoder_norm
    if config.rescale_by_decoder_norm and not keeps_norm:
        params = fold_decoder_norm(params, config)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
    if "threshold" in arrays:
        arrays["threshold"] = np.broadcast_to(arrays["threshold"], (config.d_sae,))
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": bool(config.apply_b_dec_to_input),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT,
            "sae_lens_training_version": None,
            "training_architecture": TRAINED_AS.get(config.activation, config.activation),
            **metadata,
        },
    }
    if architecture == "topk":
        cfg |= {"k": int(np.asarray(config.k)), "rescale_acts_by_decoder_norm": bool(config.rescale_by_decoder_norm)}
    if config.d_out is not None:
        cfg["d_out"] = config.d_out
    directory.mkdir(parents=True, exist_ok=True)
    # Strided arrays (a transpose) would be written in the order of their memory, under the shape of the view.
    _safetensors().save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / WEIGHTS, {"format": "pt"}
    )
    (directory / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


def load_sae_lens(directory: str | pathlib.Path, *, input_scale: float | None = None) -> tuple[Params, SAEConfig]:
    """(params, config) of an SAE that SAELens saved, with the features SAELens computes; params in float32.

    Read are standard, topk, jumprelu, gated, transcoder and jumprelu_transcoder, those of SAELens before 6 too. What
    was trained as batchtopk or matryoshka is a "jumprelu" here as there. "hook_z" SAEs take [..., heads * d_head].

    Args:
        input_scale: for files whose activations are to be scaled by a constant that the file does not hold
            (normalize_activations "expected_average_only_in"): that constant, folded in; 1.0 leaves it to you.

    Raises FileNotFoundError, and ValueError naming file and entry: what is missing, unknown, of another shape, or
    asks for something that is not supported (other normalisations, scaling factors, skip connections).
    """
    directory = pathlib.Path(directory)
    cfg = read_json(directory / CONFIG)
    where = str(directory / CONFIG)
    architecture = entry(cfg, "architecture", where, str, "standard")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if function == "topk":  # before 6.0 a "standard" one with another activation
        architecture = "topk"
        cfg = cfg | {"k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    elif function not in ("relu", None):
        raise ValueError(f"{where}: activation_fn {function!r} is not supported; relu and topk are")
    transcoder = architecture in TRANSCODERS.values()
    base = {v: k for k, v in TRANSCODERS.items()}.get(architecture, architecture)
    if base not in ACTIVATIONS:
        known = (*ACTIVATIONS, *TRANSCODERS.values())
        raise ValueError(f"{where}: architecture {architecture!r} is not supported; there are {', '.join(known)}")
    if cfg.get("finetuning_scaling_factor"):
        raise ValueError(f"{where}: finetuning_scaling_factor is not supported")
    normalize = cfg.get("normalize_activations") or "none"
    if normalize not in ("none", *SCALED) or (normalize in SCALED and input_scale is None):
        hint = "; give input_scale, the constant the activations are multiplied by" if normalize in SCALED else ""
        raise ValueError(f"{where}: normalize_activations {normalize!r} is not supported{hint}")
    config = SAEConfig(
        d_in=entry(cfg, "d_in", where, int),
        d_sae=entry(cfg, "d_sae", where, int),
        activation=ACTIVATIONS[base],
        k=entry(cfg, "k", where, int) if base == "topk" else 32,
        d_out=entry(cfg, "d_out", where, int) if transcoder else None,
        apply_b_dec_to_input=entry(cfg, "apply_b_dec_to_input", where, bool, True) and not transcoder,
        rescale_by_decoder_norm=base == "topk" and entry(cfg, "rescale_acts_by_decoder_norm", where, bool, False),
    )
    params = {name: array.astype(np.float32) for name, array in read_tensors(directory / WEIGHTS).items()}
    if base == "jumprelu" and "log_threshold" in params:  # SAELens before 6.30
        params["threshold"] = np.exp(params.pop("log_threshold"))
    check_params(str(directory / WEIGHTS), params, config)
    loaded: Params = {name: jnp.asarray(array) for name, array in params.items()}
    return (loaded if input_scale is None else fold_input_scale(loaded, input_scale, config)), config


def sae_lens_metadata(directory: str | pathlib.Path) -> dict[str, Any]:
    """What cfg.json says beside the SAE itself (`metadata`: model_name, hook_name, ...), or {}."""
    return dict(read_json(pathlib.Path(directory) / CONFIG).get("metadata") or {})


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError, and ValueError if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def entry(cfg: Mapping[str, Any], name: str, where: str, kind: type, default: Any = None) -> Any:
    """cfg[name], a `kind`. Raises ValueError naming file and entry if it is missing (and has no default) or another."""
    value = cfg.get(name, default)
    if value is None and name not in cfg:
        raise ValueError(f"{where}: no entry {name!r}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {name} must be {kind.__name__}, got {value!r}")
    return value


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, 16-bit ones included. Raises FileNotFoundError, and ValueError if broken."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return _safetensors().load_file(path)
    except Exception as error:  # of a type of its own in each version
        raise ValueError(f"{path}: not a safetensors file, or cut short: {error}") from error


def expected_shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape, of an autoencoder or a transcoder."""
    features, out = config.d_sae, config.d_out or config.d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (config.d_in, features), "W_dec": (features, out), "b_dec": (out,)}
    biases = ("b_gate", "b_mag", "r_mag") if config.activation == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(biases, (features,))
    if config.activation == "jumprelu":
        shapes["threshold"] = (features,)
    if config.activation in TRACKING:
        shapes["threshold"] = ()
    return shapes


def check_params(where: str, params: Mapping[str, np.ndarray], config: SAEConfig) -> None:
    """Raises ValueError naming `where` and the array that is missing, unknown, of another shape or not finite."""
    expected = expected_shapes(config)
    if missing := sorted(expected.keys() - params.keys()):
        raise ValueError(f"{where}: no array {missing[0]!r}; a {config.activation} SAE has {', '.join(expected)}")
    if unknown := sorted(params.keys() - expected.keys()):
        raise ValueError(f"{where}: array {unknown[0]!r} is not of a {config.activation} SAE: {', '.join(expected)}")
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ValueError(f"{where}: {name} is {params[name].shape}, the configuration says {shape}")
        if not np.isfinite(params[name]).all():
            raise ValueError(f"{where}: {name} has entries that are not finite")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('SAE files need safetensors: pip install "jaxalign[lm]"') from error
    return safetensors.numpy
