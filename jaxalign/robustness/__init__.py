"""Attacks on any function, training against them, generators, and what happens when the data shifts."""

from jaxalign.robustness.adversarial_training import adversarial_training
from jaxalign.robustness.apgd import apgd, apgd_targeted
from jaxalign.robustness.attack_losses import cross_entropy, dlr_loss, margins, targeted_dlr_loss
from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.auto_attack import auto_attack
from jaxalign.robustness.carlini_wagner import carlini_wagner
from jaxalign.robustness.continual import (
    ContinualMetrics,
    ContinualRun,
    continual_learning_metrics,
    sequential_training,
)
from jaxalign.robustness.distributional import (
    GroupState,
    chi_square_risk,
    conditional_value_at_risk,
    cvar_training,
    group_dro,
    kl_risk,
)
from jaxalign.robustness.elastic_weight_consolidation import (
    ConsolidatedState,
    consolidate,
    diagonal_fisher,
    elastic_weight_consolidation,
)
from jaxalign.robustness.evaluation import (
    RobustnessEvaluation,
    SeedIntervals,
    intervals_over_seeds,
    robust_curve,
    robustness_evaluation,
)
from jaxalign.robustness.fab import fab
from jaxalign.robustness.fast_adversarial_training import (
    FreeState,
    fast_adversarial_training,
    free_adversarial_training,
)
from jaxalign.robustness.fault_injection import (
    degradation_curve,
    flip_bits,
    gaussian_noise,
    majority_vote,
    median_logits,
    stuck_at_zero,
)
from jaxalign.robustness.gan import GanState, gan, sample_generator
from jaxalign.robustness.gan_losses import (
    HINGE,
    NON_SATURATING,
    WASSERSTEIN,
    GanObjective,
    gradient_penalty,
    hinge_discriminator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)
from jaxalign.robustness.gan_quality import (
    ClassCoverage,
    JackknifeEstimate,
    PrecisionRecall,
    class_coverage,
    classifier_score,
    frechet_distance,
    jackknife,
    precision_and_recall,
)
from jaxalign.robustness.gradient_masking import GradientMaskingReport, MaskingSigns, gradient_masking, noise_search
from jaxalign.robustness.labelled_batch import LabelledBatch, as_labelled
from jaxalign.robustness.ood import (
    MahalanobisModel,
    energy_score,
    fit_mahalanobis,
    knn_score,
    mahalanobis_score,
    max_logit_score,
    max_softmax_score,
    relative_mahalanobis_score,
)
from jaxalign.robustness.ood_metrics import auroc, detection_interval, false_positive_rate_at
from jaxalign.robustness.perturbation_generator import (
    adversarial_generator_training,
    generated_attack,
    perturbation_generator,
)
from jaxalign.robustness.pgd import fgsm, pgd
from jaxalign.robustness.replay import (
    ReplayState,
    Reservoir,
    add_to_reservoir,
    draw_from_reservoir,
    empty_reservoir,
    replay,
)
from jaxalign.robustness.smooth_adversarial_training import gaussian_augmentation, smooth_adversarial_training
from jaxalign.robustness.square import square
from jaxalign.robustness.threat_model import (
    clip_to_box,
    norms,
    project,
    project_l1_in_box,
    project_onto,
    random_in_ball,
    steepest_direction,
)
from jaxalign.robustness.trades import prediction_divergence, trades, trades_loss
from jaxalign.robustness.two_sample import (
    TwoSampleTest,
    biased_mmd_squared,
    classifier_two_sample_test,
    kolmogorov_smirnov_test,
    median_bandwidth,
    mmd_squared,
    mmd_test,
)

__all__ = [
    "HINGE",
    "NON_SATURATING",
    "WASSERSTEIN",
    "AttackResult",
    "ClassCoverage",
    "ConsolidatedState",
    "ContinualMetrics",
    "ContinualRun",
    "FreeState",
    "GanObjective",
    "GanState",
    "GradientMaskingReport",
    "GroupState",
    "JackknifeEstimate",
    "LabelledBatch",
    "MahalanobisModel",
    "MaskingSigns",
    "PrecisionRecall",
    "ReplayState",
    "Reservoir",
    "RobustnessEvaluation",
    "SeedIntervals",
    "TwoSampleTest",
    "add_to_reservoir",
    "adversarial_generator_training",
    "adversarial_training",
    "apgd",
    "apgd_targeted",
    "as_labelled",
    "attack_program",
    "auroc",
    "auto_attack",
    "biased_mmd_squared",
    "carlini_wagner",
    "checked_result",
    "chi_square_risk",
    "class_coverage",
    "classifier_score",
    "classifier_two_sample_test",
    "clip_to_box",
    "conditional_value_at_risk",
    "consolidate",
    "continual_learning_metrics",
    "cross_entropy",
    "cvar_training",
    "degradation_curve",
    "detection_interval",
    "diagonal_fisher",
    "dlr_loss",
    "draw_from_reservoir",
    "elastic_weight_consolidation",
    "empty_reservoir",
    "energy_score",
    "fab",
    "false_positive_rate_at",
    "fast_adversarial_training",
    "fgsm",
    "fit_mahalanobis",
    "flip_bits",
    "frechet_distance",
    "free_adversarial_training",
    "gan",
    "gaussian_augmentation",
    "gaussian_noise",
    "generated_attack",
    "gradient_masking",
    "gradient_penalty",
    "group_dro",
    "hinge_discriminator_loss",
    "intervals_over_seeds",
    "jackknife",
    "kl_risk",
    "knn_score",
    "kolmogorov_smirnov_test",
    "mahalanobis_score",
    "majority_vote",
    "margins",
    "max_logit_score",
    "max_softmax_score",
    "median_bandwidth",
    "median_logits",
    "mmd_squared",
    "mmd_test",
    "noise_search",
    "non_saturating_discriminator_loss",
    "non_saturating_generator_loss",
    "norms",
    "perturbation_generator",
    "pgd",
    "precision_and_recall",
    "prediction_divergence",
    "project",
    "project_l1_in_box",
    "project_onto",
    "r1_penalty",
    "random_in_ball",
    "relative_mahalanobis_score",
    "replay",
    "robust_curve",
    "robustness_evaluation",
    "sample_generator",
    "sequential_training",
    "smooth_adversarial_training",
    "square",
    "steepest_direction",
    "stuck_at_zero",
    "targeted_dlr_loss",
    "trades",
    "trades_loss",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]
