"""The arms of Wang et al. 2024 on published models, evaluated with lm-eval, beside the published numbers."""
