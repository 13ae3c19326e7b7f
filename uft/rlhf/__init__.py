"""Reward models, reinforcement learning against them, on-policy feedback, and guards against reward hacking."""
