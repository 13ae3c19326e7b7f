"""Real text, instructions and preferences: a model pretrained from scratch, tuned in several ways, and measured."""
