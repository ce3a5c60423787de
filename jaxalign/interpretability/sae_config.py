"""What a sparse autoencoder is: its sizes, its activation and what keeps it sparse."""

import dataclasses

import jax
import numpy as np

from jaxalign.types import ArrayLike

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
SELECTING = ("topk", "batchtopk", "matryoshka")  # keep the k largest, and so need no sparsity term
TRACKING = ("batchtopk", "matryoshka")  # select over the batch, and so track a threshold for one row alone
L0_PENALTIES = ("step", "tanh", "quadratic")
DECODER_NORMS = ("free", "unit")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """A sparse autoencoder, transcoder or crosscoder. Sizes are static; k and the coefficients may be traced.

    d_in, d_sae: D and F
    activation: "relu", "topk", "batchtopk", "jumprelu", "gated" or "matryoshka"
    k: features kept per row by "topk", and per row on average by "batchtopk" and "matryoshka" (int(k B) of a batch).
        May be traced, so that one program serves every k.
    k_max: static bound of a traced k for "topk", with which it is as quick on a CPU as a k that is an int
    sparsity: lambda, the coefficient of the sparsity term of "relu", "jumprelu" and "gated"
    sparsity_warm_up: steps over which lambda rises from 0
    d_out: the width of a transcoder's output; None for an autoencoder
    layers: L of a crosscoder, which reads and writes [L, D]; None otherwise
    widths: of "matryoshka", increasing, the last one d_sae
    aux_coefficient, k_aux: AuxK (Gao et al., arXiv:2406.04093, section A.2) of the activations that select; k_aux is
        d_in / 2 unless given
    dead_after: tokens without firing after which a feature counts as dead
    bandwidth, initial_threshold: of "jumprelu"
    l0_penalty: of "jumprelu": "step" (Rajamanoharan et al., arXiv:2407.14435), "tanh", or "quadratic" around target_l0
    tanh_scale, target_l0: see `l0_penalty`
    apply_b_dec_to_input: encode x - b_dec; the default is yes, save for transcoders, whose b_dec is an output
    rescale_by_decoder_norm: features are z ||W_dec||, so that what is selected is what counts in the output; the
        default is yes where the activation selects
    decoder_norm: "free", or "unit" for rows of W_dec kept at norm 1, which is the default of "gated"
    initial_decoder_norm: of W_dec's rows, 0.1 unless given (1 where the norm is "unit")
    dtype: what matrices are multiplied in; sums, parameters and results are float32

    Raises ValueError naming the field that is wrong; values that are traced are not looked at.
    """

    d_in: int
    d_sae: int
    activation: str = "topk"
    k: ArrayLike = 32
    k_max: int | None = None
    sparsity: ArrayLike = 1.0
    sparsity_warm_up: int = 0
    d_out: int | None = None
    layers: int | None = None
    widths: tuple[int, ...] = ()
    aux_coefficient: ArrayLike = 1 / 32
    k_aux: int | None = None
    dead_after: int = 1_000_000
    bandwidth: ArrayLike = 0.05
    initial_threshold: float = 0.01
    l0_penalty: str = "step"
    tanh_scale: ArrayLike = 4.0
    target_l0: ArrayLike | None = None
    apply_b_dec_to_input: bool | None = None
    rescale_by_decoder_norm: bool | None = None
    decoder_norm: str | None = None
    initial_decoder_norm: float | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._default("decoder_norm", "unit" if self.activation == "gated" else "free")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("l0_penalty", L0_PENALTIES),
            ("decoder_norm", DECODER_NORMS),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"SAEConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("d_in", "d_sae", "d_out", "layers", "k_max", "k_aux", "dead_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"SAEConfig: {name} must be at least 1, got {value}")
        if self.k_max is not None and self.k_max > self.d_sae:
            raise ValueError(f"SAEConfig: k_max must be at most d_sae = {self.d_sae}, got {self.k_max}")
        self._check_selection()
        if self.d_out is not None and self.apply_b_dec_to_input:
            raise ValueError("SAEConfig: a transcoder's b_dec is an output, so apply_b_dec_to_input cannot be True")
        if self.d_out is not None and self.layers is not None:
            raise ValueError("SAEConfig: d_out is for transcoders and layers for crosscoders; give one of them")
        if self.rescale_by_decoder_norm and self.activation not in SELECTING:
            raise ValueError(f"SAEConfig: rescale_by_decoder_norm is for {SELECTING}, not for {self.activation!r}")
        if self.l0_penalty == "quadratic" and self.target_l0 is None:
            raise ValueError("SAEConfig: l0_penalty 'quadratic' needs target_l0")
        object.__setattr__(self, "widths", tuple(self.widths))
        if isinstance(self.k, np.integer):
            object.__setattr__(self, "k", int(self.k))
        unit = self.decoder_norm == "unit"
        self._default("k_aux", min(max(self.d_in // 2, 1), self.d_sae))
        self._default("apply_b_dec_to_input", self.d_out is None)
        self._default("rescale_by_decoder_norm", self.activation in SELECTING)
        self._default("initial_decoder_norm", 1.0 if unit else 0.1)

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_selection(self) -> None:
        if self.activation in SELECTING and not isinstance(self.k, jax.core.Tracer):
            k = np.asarray(self.k)
            if (k > self.d_sae).any() or (k <= 0).any():
                raise ValueError(f"SAEConfig: k must lie in 1..d_sae = {self.d_sae}, got {self.k}")
            if self.k_max is not None and (k > self.k_max).any():
                raise ValueError(f"SAEConfig: k must be at most k_max = {self.k_max}, got {self.k}")
        if self.activation == "matryoshka":
            steps = np.diff((0, *self.widths))
            if not self.widths or self.widths[-1] != self.d_sae or (steps <= 0).any():
                raise ValueError(f"SAEConfig: widths must increase to d_sae = {self.d_sae}, got {self.widths}")
        elif self.widths:
            raise ValueError(f"SAEConfig: widths are for 'matryoshka', the activation is {self.activation!r}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: (d_in,), or (layers, d_in) of a crosscoder."""
        return (self.d_in,) if self.layers is None else (self.layers, self.d_in)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one reconstruction: as the input, or (d_out,) of a transcoder."""
        return self.input_shape if self.d_out is None else (self.d_out,)
