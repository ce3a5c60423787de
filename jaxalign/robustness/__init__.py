"""Attacks on any function, training against them, and what happens when the data shifts."""

from jaxalign.robustness.pgd import fgsm, pgd
from jaxalign.robustness.carlini_wagner import carlini_wagner
from jaxalign.robustness.threat_model import random_in_ball
from jaxalign.robustness.adversarial_training import adversarial_training
