"""Bayesian inverse reinforcement learning: priors over rewards, the likelihood of demonstrations, and PolicyWalk.

Everything here is a plain function of one reward, [S], [S, A] or [S, A, S]; `jax.vmap` it over thousands.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from jaxalign.irl.trajectories import Trajectories, visit_counts
from jaxalign.mdp import (
    TabularMDP,
    action_reward,
    bellman_q,
    dense_transition,
    discounted_sum,
    soft_value_iteration,
    value_iteration,
)
from jaxalign.types import Array, ArrayLike, Key

Shape = int | Sequence[int]
LogDensity = Callable[[Array], Array]  # reward [...] -> scalar, nats


class Prior(NamedTuple):
    """A distribution over rewards [...], with a smooth bijection from all of R^D to its support.

    log_prob: reward [...] -> scalar, normalised, nats; -inf outside the support
    sample: key -> reward [...]
    constrain: point [D] -> (reward [...], log |det d reward / d point|)
    unconstrain: reward [...] -> point [D], the inverse
    """

    log_prob: LogDensity
    sample: Callable[[Key], Array]
    constrain: Callable[[Array], tuple[Array, Array]]
    unconstrain: Callable[[Array], Array]


def gaussian_prior(shape: Shape, *, mean: ArrayLike = 0.0, scale: ArrayLike = 1.0) -> Prior:
    """Independent N(mean, scale^2) entries of a reward of this shape; mean and scale broadcast to it, as [...].

    Raises ValueError unless scale > 0. Points are standardised: reward = mean + scale * point.
    """
    return _location_scale(
        "gaussian_prior", shape, mean, scale, jax.random.normal, lambda z: -0.5 * (z**2 + jnp.log(2.0 * jnp.pi))
    )


def laplace_prior(shape: Shape, *, location: ArrayLike = 0.0, scale: ArrayLike = 1.0) -> Prior:
    """Independent entries with density exp(-|reward - location| / scale) / (2 scale), for sparse rewards [...].

    Raises ValueError unless scale > 0. Points are standardised: reward = location + scale * point.
    """
    return _location_scale(
        "laplace_prior", shape, location, scale, jax.random.laplace, lambda z: -jnp.abs(z) - jnp.log(2.0)
    )


def uniform_prior(shape: Shape, *, low: ArrayLike = -1.0, high: ArrayLike = 1.0) -> Prior:
    """Uniform on the box low <= reward <= high; the bounds broadcast to the reward's shape [...].

    reward = low + (high - low) sigmoid(point). Raises ValueError unless low < high.
    """
    shape = _shape(shape)
    low, high = (jnp.broadcast_to(jnp.asarray(x, float), shape) for x in (low, high))
    _require(low < high, "uniform_prior: low must be below high")

    def log_prob(reward: Array) -> Array:
        return jnp.where(jnp.all((reward >= low) & (reward <= high)), -jnp.sum(jnp.log(high - low)), -jnp.inf)

    def constrain(point: Array) -> tuple[Array, Array]:
        point = point.reshape(shape)
        slope = jnp.log(high - low) + jax.nn.log_sigmoid(point) + jax.nn.log_sigmoid(-point)
        return low + (high - low) * jax.nn.sigmoid(point), jnp.sum(slope)

    return Prior(
        log_prob,
        lambda key: low + (high - low) * jax.random.uniform(key, shape),
        constrain,
        lambda reward: jnp.ravel(jnp.log(reward - low) - jnp.log(high - reward)),
    )


def dirichlet_prior(shape: Shape, *, maximum: ArrayLike = 1.0, concentration: ArrayLike = 1.0) -> Prior:
    """Bounded rewards that share a budget: reward / maximum ~ Dirichlet(concentration) over all n entries [...].

    Entries are at least 0 and sum to `maximum`; concentration > 0 broadcasts to the shape. The density is with respect
    to the first n - 1 entries, as usual on a simplex. D is n - 1: reward = maximum * softmax([point, 0]).
    Raises ValueError unless maximum and concentration are positive and n > 1.
    """
    shape = _shape(shape)
    alpha = jnp.ravel(jnp.broadcast_to(jnp.asarray(concentration, float), shape))
    size = alpha.size
    _require(alpha > 0, "dirichlet_prior: concentration must be positive")
    _require(jnp.asarray(maximum) > 0, "dirichlet_prior: maximum must be positive")
    if size < 2:
        raise ValueError(f"dirichlet_prior: needs at least 2 entries to share, got shape {shape}")

    def log_prob(reward: Array) -> Array:
        share = jnp.ravel(reward) / maximum
        # A share that underflows to 0 must not turn the gradient into 0 / 0.
        log_share = jnp.log(jnp.maximum(share, jnp.finfo(share.dtype).tiny))
        density = jnp.sum((alpha - 1.0) * log_share) + gammaln(jnp.sum(alpha)) - jnp.sum(gammaln(alpha))
        inside = jnp.all(share >= 0.0) & (jnp.abs(jnp.sum(share) - 1.0) < 1e-4)
        return jnp.where(inside, density - (size - 1) * jnp.log(maximum), -jnp.inf)

    def constrain(point: Array) -> tuple[Array, Array]:
        log_share = jax.nn.log_softmax(jnp.append(point, 0.0))
        # The Jacobian of the first n - 1 shares is diag(p) - p p^T, whose determinant is the product of all n.
        log_jacobian = jnp.sum(log_share) + (size - 1) * jnp.log(maximum)
        return maximum * jnp.exp(log_share).reshape(shape), log_jacobian

    def unconstrain(reward: Array) -> Array:
        log_share = jnp.log(jnp.ravel(reward))
        return log_share[:-1] - log_share[-1]

    return Prior(
        log_prob, lambda key: maximum * jax.random.dirichlet(key, alpha).reshape(shape), constrain, unconstrain
    )


def boltzmann_policy(
    mdp: TabularMDP, reward: ArrayLike, *, beta: ArrayLike, tolerance: ArrayLike = 1e-6, max_iterations: int = 10_000
) -> Array:
    """log P(a | s) = log_softmax_a(beta Q*(s, a)), Q* by `value_iteration`; reward as everywhere -> log-probs [S, A].

    beta >= 0 per unit of reward: 0 acts at random, infinity optimally. Ramachandran & Amir 2007, section 3.
    """
    plan = value_iteration(mdp, reward, tolerance=tolerance, max_iterations=max_iterations)
    return jax.nn.log_softmax(beta * plan.q, axis=-1)


def direct_boltzmann_policy(mdp: TabularMDP, reward: ArrayLike, *, beta: ArrayLike, sweeps: int = 20) -> Array:
    """`boltzmann_policy` by policy iteration: reward [S], [S, A] or [S, A, S] -> log-probs [S, A].

    `sweeps` Bellman backups find a policy that is nearly right; exact values, V = r_policy + discount P_policy V, then
    improve it until it is. The gradient is one more such solve. Quicker than `value_iteration` for many rewards of some
    25 states; above 100 or so the solves cost more than they save. The discount must be below 1, for then every policy
    has a value. Howard 1960.
    """
    reward = action_reward(mdp, reward)
    fixed_mdp, fixed_reward = jax.lax.stop_gradient((mdp, reward))

    def chosen(values: Array, policy: Array) -> Array:
        return jnp.take_along_axis(values, policy.reshape(-1, *(1,) * (values.ndim - 1)), axis=1)[:, 0]

    def steps(mdp: TabularMDP, policy: Array) -> Array:
        between = chosen(dense_transition(mdp.transition), policy)
        return jnp.where(mdp.terminal[:, None], 0.0, mdp.discount * between)

    def improve(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        _, policy, _, _, count = carry
        value = discounted_sum(steps(fixed_mdp, policy), chosen(fixed_reward, policy))
        q = bellman_q(fixed_mdp, fixed_reward, value)
        # Gains within the rounding of the values are ties; taking them could go round in circles.
        better = jnp.max(q, axis=-1) - chosen(q, policy) > 1e-5 * jnp.max(jnp.abs(q))
        return policy, jnp.where(better, jnp.argmax(q, axis=-1), policy), value, jnp.any(better), count + 1

    value = jnp.zeros_like(fixed_reward[:, 0])
    sweep = lambda _, value: jnp.max(bellman_q(fixed_mdp, fixed_reward, value), axis=-1)  # noqa: E731
    start = jnp.argmax(bellman_q(fixed_mdp, fixed_reward, jax.lax.fori_loop(0, sweeps, sweep, value)), axis=-1)
    unfinished: Callable[[tuple[Array, ...]], Array] = lambda carry: carry[3] & (carry[4] < 100)  # noqa: E731
    carry = (start, start, value, jnp.bool_(True), jnp.int32(0))
    policy, _, value, _, _ = jax.lax.while_loop(unfinished, improve, carry)
    # The value is known: what is added to it is 0, and its derivative the implicit one, (I - M)^-1 d(r + M value).
    matrix = steps(mdp, policy)
    backup = chosen(reward, policy) + matrix @ value
    value = value + discounted_sum(matrix, backup - jax.lax.stop_gradient(backup))
    return jax.nn.log_softmax(beta * bellman_q(mdp, reward, value), axis=-1)


def soft_policy(
    mdp: TabularMDP, reward: ArrayLike, *, beta: ArrayLike, tolerance: ArrayLike = 1e-6, max_iterations: int = 10_000
) -> Array:
    """The maximum causal entropy policy at temperature 1 / beta, beta > 0; reward as everywhere -> log-probs [S, A].

    It plans for acting noisily itself where `boltzmann_policy` takes its own noise for no one's, and is smooth.
    """
    return soft_value_iteration(
        mdp, reward, temperature=1.0 / jnp.asarray(beta), tolerance=tolerance, max_iterations=max_iterations
    ).log_policy


def log_likelihood(
    mdp: TabularMDP, trajectories: Trajectories, *, beta: ArrayLike, policy: Callable[..., Array] = boltzmann_policy
) -> LogDensity:
    """The function reward -> sum_{s, a} n(s, a) log P(a | s), nats, n the demonstrated counts [S, A], counted once.

    policy: `(mdp, reward, *, beta) -> log-probs [S, A]`: `boltzmann_policy`, `direct_boltzmann_policy`, `soft_policy`.

    Padding and terminal states count nothing.
    Raises ValueError as `check_trajectories`.
    """
    counts = visit_counts(mdp, trajectories) * trajectories.states.shape[0]
    return lambda reward: jnp.sum(counts * policy(mdp, reward, beta=beta))


def boltzmann_log_likelihood(
    reward: ArrayLike,
    mdp: TabularMDP,
    trajectories: Trajectories,
    *,
    beta: ArrayLike,
    policy: Callable[..., Array] = boltzmann_policy,
) -> Array:
    """sum over the demonstrated (s, a) of log P(a | s), P(a | s) ~ exp(beta Q*(s, a)); a scalar, nats.

    reward [S], [S, A] or [S, A, S]; see `log_likelihood`, which counts the demonstrations once for many rewards.
    Gradients are those of the optimal policy's value (implicit). Ramachandran & Amir 2007, eq. 1-2.
    """
    return log_likelihood(mdp, trajectories, beta=beta, policy=policy)(jnp.asarray(reward))


def log_posterior(
    mdp: TabularMDP,
    trajectories: Trajectories,
    prior: Prior,
    *,
    beta: ArrayLike,
    policy: Callable[..., Array] = boltzmann_policy,
) -> LogDensity:
    """The function reward [...] -> log prior + log likelihood, nats: the log posterior up to the log evidence."""
    likelihood = log_likelihood(mdp, trajectories, beta=beta, policy=policy)
    return lambda reward: prior.log_prob(reward) + likelihood(reward)


def unconstrained(log_density: LogDensity, prior: Prior) -> LogDensity:
    """The same density over points [D]: log_density(reward) + log |det d reward / d point|, reward of `constrain`."""

    def over_points(point: Array) -> Array:
        reward, log_jacobian = prior.constrain(point)
        return log_density(reward) + log_jacobian

    return over_points


class Walk(NamedTuple):
    """A Markov chain. samples: [num_samples, ...]; log_posterior: of each, [num_samples]; acceptance_rate: of all moves
    after burn-in, a scalar."""

    samples: Array
    log_posterior: Array
    acceptance_rate: Array


def gaussian_move(
    key: Key, reward: Array, *, step_size: ArrayLike, bounds: tuple[ArrayLike, ArrayLike] | None
) -> Array:
    """reward + step_size * N(0, 1) in every entry [...], reflected at the bounds (low, high).

    Reflection folds a symmetric step into a symmetric step, so the walk needs no correction. Clipping would pile moves
    up on the bounds that never come back at the same rate: detailed balance would fail.
    """
    moved = reward + step_size * jax.random.normal(key, reward.shape, reward.dtype)
    if bounds is None:
        return moved
    low, width = bounds[0], jnp.asarray(bounds[1]) - bounds[0]
    return low + width - jnp.abs(jnp.mod(moved - low, 2.0 * width) - width)


def grid_move(key: Key, reward: Array, *, step_size: ArrayLike, bounds: tuple[ArrayLike, ArrayLike] | None) -> Array:
    """One entry of [...], drawn uniformly, goes up or down by step_size; a step over the bounds stays where it is.

    The walk of Ramachandran & Amir 2007 on the grid low + step_size * integers (0 + ... without bounds). Reflecting
    instead would leave a bound twice as often as it is entered.
    """
    low, high = (0.0, jnp.inf) if bounds is None else bounds
    entry_key, sign_key = jax.random.split(key)
    entry = jax.nn.one_hot(jax.random.randint(entry_key, (), 0, reward.size), reward.size, dtype=reward.dtype)
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    place = jnp.round((reward - low) / step_size)  # whole steps, so that rounding never drifts off the grid
    moved = place + sign * entry.reshape(reward.shape)
    inside = True if bounds is None else (moved >= 0.0) & (moved <= (jnp.asarray(high) - low) / step_size + 1e-3)
    return jnp.minimum(low + step_size * jnp.where(inside, moved, place), high).astype(reward.dtype)


def policy_walk_chain(
    key: Key,
    log_posterior: LogDensity,
    initial: ArrayLike,
    *,
    num_samples: int,
    step_size: ArrayLike,
    burn_in: int = 0,
    thinning: int = 1,
    bounds: tuple[ArrayLike, ArrayLike] | None = None,
    move: Callable[..., Array] = gaussian_move,
) -> Walk:
    """Metropolis-Hastings over rewards: move, then accept if log u < log_posterior(new) - log_posterior(old).

    Args:
        log_posterior: reward [...] -> scalar, up to a constant; -inf or NaN is never entered.
        initial: [...]. For many chains vmap over keys and initial rewards; all run as one program.
        step_size: of a move, in units of reward. About a quarter of `gaussian_move`s should be accepted.
        burn_in, thinning: moves before the first sample, and from one sample to the next.
        bounds: (low, high), each a number or [...], kept by the move; None: the whole space.
        move: `(key, reward, *, step_size, bounds) -> reward` with symmetric density: `gaussian_move` or `grid_move`.

    Returns Walk. Raises ValueError if, outside jit, `initial` is out of bounds; or if a count is below its least.
    Ramachandran & Amir 2007, figure 3 (PolicyWalk), whose warm-started policy iteration is left to `log_posterior`.
    """
    if num_samples < 1 or burn_in < 0 or thinning < 1:
        raise ValueError(f"policy_walk: needs {num_samples=} >= 1, {burn_in=} >= 0 and {thinning=} >= 1")
    initial = jnp.asarray(initial)
    initial = initial if jnp.issubdtype(initial.dtype, jnp.floating) else initial.astype(float)
    if bounds is not None:
        _require((initial >= bounds[0]) & (initial <= bounds[1]), "policy_walk: initial is out of bounds")

    def density(reward: Array) -> Array:
        value = log_posterior(reward)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def advance(carry: tuple[Array, Array, Array], time: Array) -> tuple[tuple[Array, Array, Array], None]:
        reward, current, accepted = carry
        move_key, accept_key = jax.random.split(jax.random.fold_in(key, time))
        proposed = move(move_key, reward, step_size=step_size, bounds=bounds)
        new = density(proposed)
        accept = -jax.random.exponential(accept_key, dtype=new.dtype) < new - current
        kept = (jnp.where(accept, proposed, reward), jnp.where(accept, new, current), accepted + accept)
        return kept, None

    def sample(carry: Any, time: Array) -> tuple[Any, tuple[Array, Array]]:
        times = time + jnp.arange(thinning, dtype=jnp.uint32)
        carry, _ = jax.lax.scan(advance, carry, times)
        return carry, carry[:2]

    carry = (initial, density(initial), jnp.int32(0))
    carry, _ = jax.lax.scan(advance, carry, jnp.arange(burn_in, dtype=jnp.uint32))
    times = burn_in + thinning * jnp.arange(num_samples, dtype=jnp.uint32)
    (_, _, accepted), (samples, values) = jax.lax.scan(sample, (*carry[:2], jnp.int32(0)), times)
    return Walk(samples, values, accepted / (num_samples * thinning))


def policy_walk(
    key: Key, log_posterior: LogDensity, initial: ArrayLike, *, num_samples: int, step_size: ArrayLike, **options: Any
) -> Array:
    """The samples [num_samples, ...] of `policy_walk_chain`, which see for `burn_in`, `thinning`, `bounds`, `move`."""
    return policy_walk_chain(
        key, log_posterior, initial, num_samples=num_samples, step_size=step_size, **options
    ).samples


def _location_scale(
    name: str, shape: Shape, location: ArrayLike, scale: ArrayLike, draw: Callable[..., Array], log_density: Any
) -> Prior:
    """Independent entries location + scale * z, z of log-density `log_density` drawn by `draw(key, shape)`."""
    shape = _shape(shape)
    location, scale = (jnp.broadcast_to(jnp.asarray(x, float), shape) for x in (location, scale))
    _require(scale > 0, f"{name}: scale must be positive")
    log_scale = jnp.sum(jnp.log(scale))
    return Prior(
        lambda reward: jnp.sum(log_density((reward - location) / scale)) - log_scale,
        lambda key: location + scale * draw(key, shape),
        lambda point: (location + scale * point.reshape(shape), log_scale),
        lambda reward: jnp.ravel((reward - location) / scale),
    )


def _shape(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _require(condition: Array, message: str) -> None:
    """Raise ValueError where a concrete `condition` fails anywhere; a traced one has no value to check."""
    if not isinstance(condition, jax.core.Tracer) and not bool(jnp.all(condition)):
        raise ValueError(message)
