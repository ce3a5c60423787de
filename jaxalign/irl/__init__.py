"""Learning rewards from behaviour."""

from jaxalign.irl.bayesian import (
    Prior,
    boltzmann_log_likelihood,
    boltzmann_policy,
    dirichlet_prior,
    gaussian_prior,
    laplace_prior,
    log_likelihood,
    log_posterior,
    policy_walk,
    policy_walk_chain,
    soft_policy,
    uniform_prior,
)
from jaxalign.irl.evaluation import expected_value_difference, policy_divergence
from jaxalign.irl.max_causal_entropy import (
    DualSolution,
    causal_entropy_dual,
    causal_entropy_nll,
    max_causal_entropy_irl,
    population_causal_entropy_nll,
    solve_causal_entropy_dual,
)
from jaxalign.irl.posterior_chains import chain_samples, posterior_chains
from jaxalign.irl.rewards import evaluate_reward, linear_reward
from jaxalign.irl.trajectories import (
    Trajectories,
    check_trajectories,
    feature_expectations,
    pad_trajectories,
    sample_trajectories,
    timed_visit_counts,
    visit_counts,
)

__all__ = [
    "DualSolution",
    "Prior",
    "Trajectories",
    "boltzmann_log_likelihood",
    "boltzmann_policy",
    "chain_samples",
    "dirichlet_prior",
    "gaussian_prior",
    "laplace_prior",
    "log_likelihood",
    "log_posterior",
    "policy_walk",
    "policy_walk_chain",
    "posterior_chains",
    "soft_policy",
    "uniform_prior",
    "causal_entropy_dual",
    "causal_entropy_nll",
    "check_trajectories",
    "evaluate_reward",
    "expected_value_difference",
    "feature_expectations",
    "linear_reward",
    "max_causal_entropy_irl",
    "pad_trajectories",
    "policy_divergence",
    "population_causal_entropy_nll",
    "sample_trajectories",
    "solve_causal_entropy_dual",
    "timed_visit_counts",
    "visit_counts",
]
