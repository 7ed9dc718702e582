"""The loss of proximal policy optimisation: policy, value, entropy and KL terms with their statistics and gradients."""
