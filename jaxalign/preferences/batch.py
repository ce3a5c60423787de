"""The batch that every pairwise preference algorithm takes."""

from typing import NamedTuple

from jaxalign.types import Array


class PreferenceBatch(NamedTuple):
    """B preference pairs, right-padded to T tokens.

    chosen_tokens, rejected_tokens: [B, T] int32, prompt and completion
    chosen_mask, rejected_mask: [B, T], 1 on completion tokens, 0 on prompt and padding
    reference_chosen_logps, reference_rejected_logps: [B] summed completion log-probabilities (nats) under the
        reference policy, or None if the algorithm is to compute them
    valid: [B], 0 on rows that only fill up the batch, or None if all are real
    """

    chosen_tokens: Array
    chosen_mask: Array
    rejected_tokens: Array
    rejected_mask: Array
    reference_chosen_logps: Array | None = None
    reference_rejected_logps: Array | None = None
    valid: Array | None = None
