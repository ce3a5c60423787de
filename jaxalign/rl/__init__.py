"""Reinforcement learning: advantages, PPO, shaping, curiosity, faults, risk and side effects."""
