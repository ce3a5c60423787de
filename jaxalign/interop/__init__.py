"""Formats in and out: models, autoencoders, activations, preferences, demonstrations; each name loads on first use."""

import importlib
from typing import Any

_HOMES = {
    "ActivationStore": "activation_store",
    "ByteTokenizer": "byte_tokenizer",
    "FeedbackLog": "feedback_log",
    "Images": "images",
    "OnnxNetwork": "onnx_network",
    "PreferenceData": "preference_data",
    "PreferenceFileError": "preference_files",
    "PreferencePair": "preference_files",
    "Pretrained": "pretrained",
    "PretrainedUnavailable": "pretrained",
    "PromptData": "prompt_data",
    "PromptRow": "prompt_data",
    "RewardModel": "reward_models",
    "RowFileError": "row_files",
    "TextReward": "text_rewards",
    "Tokenizer": "tokenizer",
    "World": "demonstrations",
    "collect_activations": "activation_store",
    "embedded_preferences": "embedded_pairs",
    "from_gymnasium": "gymnasium_environments",
    "load_gemma_scope": "sae_files",
    "load_images": "images",
    "load_onnx": "onnx_network",
    "load_pretrained": "pretrained",
    "load_reward_model": "reward_models",
    "load_sae": "sae_files",
    "load_sae_lens": "sae_lens",
    "load_sparsify": "sae_files",
    "load_world": "demonstrations",
    "pack_tokens": "text_tokens",
    "read_demonstrations": "demonstrations",
    "read_documents": "text_tokens",
    "read_preferences": "preference_files",
    "read_prompts": "prompt_data",
    "read_vnnlib": "vnnlib",
    "save_pretrained": "pretrained",
    "save_reward_model": "reward_models",
    "save_sae_lens": "sae_lens",
    "save_world": "demonstrations",
    "split_pairs": "preference_files",
    "tokenize_pairs": "preference_data",
    "write_demonstrations": "demonstrations",
    "write_preferences": "preference_files",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
