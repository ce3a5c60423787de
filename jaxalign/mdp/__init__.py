"""Finite Markov decision processes: dense, sparse and grid transitions; hard, soft and robust planning; builders."""

from jaxalign.mdp.discounted_sum import discounted_sum
from jaxalign.mdp.fixed_point import FixedPoint, fixed_point
from jaxalign.mdp.gridworlds import Objectworld, cliff, cliff_reward, gridworld, objectworld
from jaxalign.mdp.level_drawings import Outcome, SafetyGridworld, State, enumerate_states, read_level
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
from jaxalign.mdp.robust import robust_policy_evaluation, robust_value_iteration
from jaxalign.mdp.safety_gridworlds import (
    absent_supervisor,
    boat_race,
    distributional_shift,
    off_switch,
    side_effects,
)
from jaxalign.mdp.side_effect_worlds import belt_sushi, belt_vase, corner_box, crossing, omelette, shutdown
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
from jaxalign.mdp.worst_case import (
    Contamination,
    CVaR,
    KLBall,
    L1Ball,
    worst_case_contamination,
    worst_case_cvar,
    worst_case_kl,
    worst_case_l1,
)

__all__ = [
    "CVaR",
    "Contamination",
    "FixedPoint",
    "GridTransition",
    "KLBall",
    "L1Ball",
    "Objectworld",
    "Outcome",
    "Plan",
    "SafetyGridworld",
    "SoftPlan",
    "SparseTransition",
    "State",
    "TabularMDP",
    "absent_supervisor",
    "action_reward",
    "arrival_reward",
    "bellman_q",
    "belt_sushi",
    "belt_vase",
    "boat_race",
    "cliff",
    "cliff_reward",
    "corner_box",
    "crossing",
    "dense_transition",
    "discounted_sum",
    "distributional_shift",
    "enumerate_states",
    "expected_next",
    "expected_return",
    "fixed_point",
    "gridworld",
    "objectworld",
    "occupancy_measure",
    "off_switch",
    "omelette",
    "policy_evaluation",
    "push_forward",
    "random_mdp",
    "read_level",
    "robust_policy_evaluation",
    "robust_value_iteration",
    "sample_next",
    "shutdown",
    "side_effects",
    "soft_value_iteration",
    "sparse_transition",
    "value_iteration",
    "worst_case_contamination",
    "worst_case_cvar",
    "worst_case_kl",
    "worst_case_l1",
]
