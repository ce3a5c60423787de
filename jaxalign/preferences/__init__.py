"""Preference learning: completion log-probabilities, Bradley-Terry rewards, and the losses of the DPO family.

Losses see arrays only, return one value per pair and are combined with the algorithms by their caller.
"""

from jaxalign.preferences.batch import PreferenceBatch
from jaxalign.preferences.bradley_terry import (
    bradley_terry_loss,
    centering_penalty,
    davidson_loss,
    plackett_luce_loss,
)
from jaxalign.preferences.calibration import (
    ReliabilityCurve,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from jaxalign.preferences.comparisons import Comparisons, Rankings
from jaxalign.preferences.direct import (
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    length_normalized_dpo_loss,
    log_ratios,
    robust_dpo_loss,
)
from jaxalign.preferences.direct_training import (
    PairLogProbs,
    completion_log_probs,
    cpo,
    dpo,
    orpo,
    pair_log_probs,
    simpo,
)
from jaxalign.preferences.evaluation import PairScores, score_pairs
from jaxalign.preferences.kto import batch_kl, kto_loss
from jaxalign.preferences.log_probs import (
    chunked_log_probs_and_entropy,
    chunked_sequence_log_probs,
    chunked_token_log_probs,
    sequence_entropy,
    sequence_log_probs,
    token_log_probs,
)
from jaxalign.preferences.modifiers import (
    alpha_score,
    jensen_shannon_score,
    length_desensitized_masks,
    mixture_loss,
    with_divergence,
    wpo_weights,
)
from jaxalign.preferences.optimal_transport import aot_loss, aot_unpaired_loss
from jaxalign.preferences.pointwise import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from jaxalign.preferences.reference_free import cpo_loss, orpo_loss, simpo_loss
from jaxalign.preferences.reward_ensemble import (
    EnsembleState,
    bootstrap_weights,
    ensemble_mean,
    ensemble_rewards,
    lower_confidence_bound,
    reward_ensemble,
    worst_case,
)
from jaxalign.preferences.reward_model import comparison_loss, pair_rewards, reward_model
from jaxalign.preferences.reward_networks import is_adapter_or_head, language_reward, trajectory_reward

__all__ = [
    "Comparisons",
    "EnsembleState",
    "PairLogProbs",
    "PairScores",
    "PreferenceBatch",
    "Rankings",
    "ReliabilityCurve",
    "alpha_score",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "batch_kl",
    "bco_pair_loss",
    "bootstrap_weights",
    "bradley_terry_loss",
    "brier_score",
    "centering_penalty",
    "chunked_log_probs_and_entropy",
    "chunked_sequence_log_probs",
    "chunked_token_log_probs",
    "comparison_loss",
    "completion_log_probs",
    "cpo",
    "cpo_loss",
    "davidson_loss",
    "discopop_loss",
    "dpo",
    "dpo_loss",
    "ensemble_mean",
    "ensemble_rewards",
    "exo_pair_loss",
    "expected_calibration_error",
    "hinge_loss",
    "ipo_loss",
    "is_adapter_or_head",
    "jensen_shannon_score",
    "kto_loss",
    "language_reward",
    "length_desensitized_masks",
    "length_normalized_dpo_loss",
    "log_ratios",
    "lower_confidence_bound",
    "mixture_loss",
    "nca_pair_loss",
    "orpo",
    "orpo_loss",
    "pair_log_probs",
    "pair_rewards",
    "plackett_luce_loss",
    "reliability_curve",
    "reward_ensemble",
    "reward_model",
    "robust_dpo_loss",
    "score_pairs",
    "sequence_entropy",
    "sequence_log_probs",
    "simpo",
    "simpo_loss",
    "sppo_hard_loss",
    "token_log_probs",
    "trajectory_reward",
    "with_divergence",
    "worst_case",
    "wpo_weights",
]
