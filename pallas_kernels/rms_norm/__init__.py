"""Root-mean-square normalisation, with the addition to the residual stream before it."""
