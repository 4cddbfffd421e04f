"""Fisher information: likelihoods, the loss that knows its model, estimators."""
