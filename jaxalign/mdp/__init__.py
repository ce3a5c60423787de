"""Finite Markov decision processes: dense, sparse and grid transitions; hard, soft and robust planning; builders."""

from jaxalign.mdp.fixed_point import FixedPoint, fixed_point
from jaxalign.mdp.gridworlds import Objectworld, cliff, cliff_reward, gridworld, objectworld
from jaxalign.mdp.planning import (
    Plan,
    SoftPlan,
    bellman_q,
    expected_return,
    occupancy_measure,
    policy_evaluation,
    soft_value_iteration,
    value_iteration,
)
from jaxalign.mdp.tabular import TabularMDP, action_reward, arrival_reward, random_mdp
from jaxalign.mdp.transitions import (
    GridTransition,
    SparseTransition,
    dense_transition,
    expected_next,
    push_forward,
    sample_next,
    sparse_transition,
)

__all__ = [
    "FixedPoint",
    "GridTransition",
    "Objectworld",
    "Plan",
    "SoftPlan",
    "SparseTransition",
    "TabularMDP",
    "action_reward",
    "arrival_reward",
    "bellman_q",
    "cliff",
    "cliff_reward",
    "dense_transition",
    "expected_next",
    "expected_return",
    "fixed_point",
    "gridworld",
    "objectworld",
    "occupancy_measure",
    "policy_evaluation",
    "push_forward",
    "random_mdp",
    "sample_next",
    "soft_value_iteration",
    "sparse_transition",
    "value_iteration",
]
