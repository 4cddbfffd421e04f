"""The ball: operators, geometries and the perturbation."""
