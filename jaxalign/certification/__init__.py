"""Bounds that hold for every input in a box: interval, CROWN, Lipschitz and smoothing certificates, and training."""

from jaxalign.certification.bounds import Bounds, input_box
from jaxalign.certification.branch_and_bound import Verdict, verify_property
from jaxalign.certification.certified_training import certified_training, worst_case_cross_entropy
from jaxalign.certification.clopper_pearson import clopper_pearson_lower, clopper_pearson_upper, fair_coin_p_value
from jaxalign.certification.crown import alpha_crown_bounds, crown_bounds
from jaxalign.certification.interpreter import UnsupportedPrimitive
from jaxalign.certification.interval import interval_bounds
from jaxalign.certification.lipschitz import lipschitz_radius, lipschitz_upper_bound, local_lipschitz_bound
from jaxalign.certification.margins import certified_accuracy_curve, certified_radius, margin_lower_bounds, margin_rows
from jaxalign.certification.properties import Property, UnsafeCase, misclassification
from jaxalign.certification.relaxations import Elementwise, Lines
from jaxalign.certification.self_check import contradictions
from jaxalign.certification.smoothing import (
    CertifiedAccuracy,
    SmoothingCertificate,
    smoothed_accuracy_curve,
    smoothed_certify,
    smoothed_counts,
    smoothed_predict,
)
from jaxalign.certification.spectral_bounds import spectral_norm_upper_bound

__all__ = [
    "Bounds",
    "CertifiedAccuracy",
    "Elementwise",
    "Lines",
    "Property",
    "SmoothingCertificate",
    "UnsafeCase",
    "UnsupportedPrimitive",
    "Verdict",
    "alpha_crown_bounds",
    "certified_accuracy_curve",
    "certified_radius",
    "certified_training",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "contradictions",
    "crown_bounds",
    "fair_coin_p_value",
    "input_box",
    "interval_bounds",
    "lipschitz_radius",
    "lipschitz_upper_bound",
    "local_lipschitz_bound",
    "margin_lower_bounds",
    "margin_rows",
    "misclassification",
    "smoothed_accuracy_curve",
    "smoothed_certify",
    "smoothed_counts",
    "smoothed_predict",
    "spectral_norm_upper_bound",
    "verify_property",
    "worst_case_cross_entropy",
]
