"""Activations made of known features: superposed, correlated, in hierarchies of exclusive siblings.

After Chanin & Garriga-Alonso 2026, "SynthSAEBench: Evaluating Sparse Autoencoders on Scalable Realistic Synthetic Data"
(arXiv:2602.14687). There the probabilities of children are corrected approximately; here they are exact, see
`synthetic_features`.
"""

import itertools
from types import MappingProxyType

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from jaxalign.types import Array, ArrayLike, Key

# The publication's model, for a GPU: about 35 of 16,384 features fire at a time.
SYNTH_SAE_BENCH_16K = MappingProxyType({"num_features": 16384, "dim": 768, "roots": 128, "branching": 4, "depth": 3})
# The same in small, for a CPU: about 4 of 256 features in 64 dimensions.
SYNTH_SAE_BENCH_SMALL = MappingProxyType(
    {"num_features": 256, "dim": 64, "roots": 6, "branching": 3, "depth": 3, "max_probability": 0.3,
     "min_probability": 2e-3, "rank": 8, "correlation": 0.15, "family_share": 0.8}
)  # fmt: skip


@flax.struct.dataclass
class SyntheticFeatures:
    """N features in R^D and how they fire. Feature order: roots, their children, their children..., loose features.

    dictionary: [N, D] unit rows
    bias: [D]
    parent: [N] int32, -1 for roots and loose features
    probability: [N], P(f_i > 0), exact
    mean, std: [N] of the magnitude before its relu
    factor [G, R], noise [G]: g = factor z + noise e of each root, family and loose feature; z, e, and so g, are N(0, 1)
    lower, upper: [N], a feature is chosen where lower < g <= upper, g that of its family
    roots, branching, depth: the shape of the forest (static)
    """

    dictionary: Array
    bias: Array
    parent: Array
    probability: Array
    mean: Array
    std: Array
    factor: Array
    noise: Array
    lower: Array
    upper: Array
    roots: int = flax.struct.field(pytree_node=False)
    branching: int = flax.struct.field(pytree_node=False)
    depth: int = flax.struct.field(pytree_node=False)

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(start, stop) of the features of each level of the forest, the roots first."""
        return _levels(self.roots, self.branching, self.depth)


def _levels(roots: int, branching: int, depth: int) -> list[tuple[int, int]]:
    sizes = [roots * branching**level for level in range(depth + 1)]
    stops = np.cumsum(sizes).tolist()
    return [(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]


def zipf_probabilities(
    num_features: int, *, exponent: ArrayLike = 0.5, maximum: ArrayLike = 0.4, minimum: ArrayLike = 5e-4
) -> Array:
    """[N], p_r = minimum + (maximum - minimum) (r^-e - N^-e) / (1 - N^-e) for ranks r = 1..N, e the exponent."""
    if num_features < 2:
        raise ValueError(f"zipf_probabilities: needs two features or more, got {num_features}")
    power = jnp.arange(1, num_features + 1, dtype=jnp.result_type(float)) ** -jnp.asarray(exponent)
    return minimum + (maximum - minimum) * (power - power[-1]) / (1.0 - power[-1])


def unit_directions(key: Key, num: int, dim: int, *, steps: int = 50) -> Array:
    """[N, D] unit vectors spread evenly: orthonormal if N <= D, else close to a tight frame.

    From random ones, `steps` times V <- V - (V V^T V min(1, D / N) - V) / 4 with rows scaled back to length 1, which
    lowers sum_ij (v_i . v_j)^2. steps=0 leaves them random.
    """

    def unit(v: Array) -> Array:
        return v / jnp.linalg.norm(v, axis=1, keepdims=True)

    def spread(_: int, v: Array) -> Array:
        return unit(v - 0.25 * (v @ (v.T @ v) * min(1.0, dim / num) - v))

    return jax.lax.fori_loop(0, steps, spread, unit(jax.random.normal(key, (num, dim))))


def synthetic_features(
    key: Key,
    *,
    num_features: int,
    dim: int,
    roots: int,
    branching: int,
    depth: int,
    rank: int = 25,
    correlation: ArrayLike = 0.1,
    exponent: ArrayLike = 0.5,
    max_probability: ArrayLike = 0.4,
    min_probability: ArrayLike = 5e-4,
    family_share: ArrayLike = 1.0,
    mean_magnitude: tuple[float, float] = (5.0, 4.0),
    std_magnitude: tuple[float, float] = (0.5, 0.5),
    bias_norm: ArrayLike = 1.0,
    spread_steps: int = 50,
) -> SyntheticFeatures:
    """Draw a world of N features: directions [N, D], magnitudes, hierarchy, correlations.

    Of a parent's children at most one fires, and none without it. One Gaussian g per family chooses: child c where g
    lies in the c-th of consecutive intervals, of probability q_c. Since g's row of `factor` is orthogonal to those of
    its ancestors' Gaussians, it is independent of whether the parent fires, so that exactly
    P(f_c > 0) = P(f_parent > 0) q_c P(magnitude_c > 0); between families Gaussians are correlated by factor factor^T.
    The wanted P are Zipf's by rank. Where a family's sum exceeds `family_share` of its parent's, its members are scaled
    down to that, so that `probability` can lie below `min_probability`.

    Args:
        num_features, dim: N and D.
        roots, branching, depth: a forest of `roots` trees, each feature above level `depth` with `branching` children;
            the features left over are loose. depth=0 has no hierarchy.
        rank, correlation: rows of `factor` are correlation * N(0, I_rank), shortened where longer than 0.99.
        exponent, max_probability, min_probability: of `zipf_probabilities`.
        family_share: the largest share of a parent's firings that have a child; at 1 such a parent never fires alone.
        mean_magnitude: of the most and the least frequent feature, linear in rank between.
        std_magnitude: (m, s), a feature's standard deviation is |N(m, s^2)|.
        bias_norm: length of `bias`.
        spread_steps: of `unit_directions`.

    The defaults are the publication's, but for `bias_norm` and `spread_steps`, which are ours.
    Raises ValueError if the forest has more than N features or `rank` is not above `depth`.
    """
    levels = _levels(roots, branching, depth)
    forest = levels[-1][1]
    if forest > num_features:
        raise ValueError(f"synthetic_features: {roots} trees have {forest} features, num_features is {num_features}")
    if rank <= depth:
        raise ValueError(f"synthetic_features: rank must exceed depth {depth}, got {rank}")
    direction_key, bias_key, factor_key, std_key = jax.random.split(key, 4)
    position = jnp.linspace(0.0, 1.0, num_features)
    mean = mean_magnitude[0] + (mean_magnitude[1] - mean_magnitude[0]) * position
    std = jnp.abs(std_magnitude[0] + std_magnitude[1] * jax.random.normal(std_key, (num_features,)))
    positive = jnp.where(std > 0, ndtr(mean / jnp.where(std > 0, std, 1.0)), 1.0 * (mean > 0))  # P(magnitude > 0)
    wanted = zipf_probabilities(num_features, exponent=exponent, maximum=max_probability, minimum=min_probability)
    share, first, probability = _shares(levels, branching, wanted, positive, family_share)
    parent = np.full(num_features, -1)
    for (above, middle), (start, stop) in itertools.pairwise(levels):
        parent[start:stop] = np.arange(above, middle).repeat(branching)
    factor = _copula_rows(factor_key, levels, num_features - forest, rank, correlation)
    bias = jax.random.normal(bias_key, (dim,))
    return SyntheticFeatures(
        dictionary=unit_directions(direction_key, num_features, dim, steps=spread_steps),
        bias=bias_norm * bias / jnp.linalg.norm(bias),
        parent=jnp.asarray(parent, jnp.int32),
        probability=probability,
        mean=mean,
        std=std,
        factor=factor,
        noise=jnp.sqrt(1.0 - jnp.sum(factor**2, axis=1)),
        # The upper tail, by -ndtri(p): ndtri(1 - p) would lose the digits of a small p.
        lower=-ndtri(jnp.minimum(first + share, 1.0)),
        upper=-ndtri(jnp.maximum(first, 0.0)),
        roots=roots,
        branching=branching,
        depth=depth,
    )


def _shares(
    levels: list[tuple[int, int]], branching: int, wanted: Array, positive: Array, family_share: ArrayLike
) -> tuple[Array, Array, Array]:
    """(P(chosen | parent fires), where its interval begins, P(f > 0)), [N] each."""
    share = jnp.minimum(wanted / positive, 1.0)
    first, probability = jnp.zeros_like(share), share * positive
    for (above, middle), (start, stop) in itertools.pairwise(levels):
        on = jnp.repeat(probability[above:middle], branching)
        q = (wanted / positive)[start:stop] / jnp.maximum(on, jnp.finfo(on.dtype).tiny)
        q = q.reshape(-1, branching)
        q = q / jnp.maximum(q.sum(axis=1, keepdims=True) / family_share, 1.0)
        first = first.at[start:stop].set((jnp.cumsum(q, axis=1) - q).ravel())
        share = share.at[start:stop].set(q.ravel())
        probability = probability.at[start:stop].set(q.ravel() * positive[start:stop] * on)
    return share, first, probability


def _copula_rows(key: Key, levels: list[tuple[int, int]], loose: int, rank: int, correlation: ArrayLike) -> Array:
    """[G, R] loadings: a row per root, per parent (for its family), per loose feature; families orthogonal to above."""
    families = [stop - start for start, stop in levels[:-1]]
    sizes = [levels[0][1], *families, loose]
    rows = list(jnp.split(correlation * jax.random.normal(key, (sum(sizes), rank)), np.cumsum(sizes)[:-1]))
    above = [rows[0]]
    for level, family in enumerate(rows[1:-1], start=1):
        # One family per feature of the level above, whose ancestors' rows are in `above`, mutually orthogonal.
        above = [jnp.repeat(row, len(family) // len(row), axis=0) for row in above]
        for row in above:
            length = jnp.sum(row**2, axis=1, keepdims=True)
            along = jnp.sum(family * row, axis=1, keepdims=True) / jnp.where(length > 0, length, 1.0)
            family = family - along * row
        rows[level] = family
        above.append(family)
    factor = jnp.concatenate(rows)
    length = jnp.linalg.norm(factor, axis=1, keepdims=True)
    return factor * jnp.minimum(1.0, 0.99 / jnp.where(length > 0, length, 1.0))


def sample_features(data: SyntheticFeatures, key: Key, batch: int) -> tuple[Array, Array]:
    """(x [B, D], f [B, N]): x = f @ dictionary + bias, f_i = relu(N(mean_i, std_i^2)) where feature i fires, else 0."""
    shared_key, own_key, magnitude_key = jax.random.split(key, 3)
    groups, rank = data.factor.shape
    shared = jax.random.normal(shared_key, (batch, rank))
    g = shared @ data.factor.T + jax.random.normal(own_key, (batch, groups)) * data.noise[None]
    levels, count = data.levels, len(data.mean)
    forest, first_loose = levels[-1][1], groups - (count - levels[-1][1])
    chosen_by = [g[:, : data.roots], jnp.repeat(g[:, data.roots : first_loose], data.branching, axis=1)]
    g = jnp.concatenate([*chosen_by, g[:, first_loose:]], axis=1)
    magnitude = jax.nn.relu(data.mean[None] + data.std[None] * jax.random.normal(magnitude_key, (batch, count)))
    f = jnp.where((g > data.lower[None]) & (g <= data.upper[None]), magnitude, 0.0)
    kept = [f[:, : data.roots]]
    for start, stop in levels[1:]:
        kept.append(jnp.where(jnp.repeat(kept[-1] > 0, data.branching, axis=1), f[:, start:stop], 0.0))
    f = jnp.concatenate([*kept, f[:, forest:]], axis=1)
    return f @ data.dictionary + data.bias[None], f
