"""What studies a trained model: sharpness, divergences, dense matrices."""
