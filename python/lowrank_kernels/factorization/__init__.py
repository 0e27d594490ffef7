"""Deep matrix factorization as the paper studies it: models, gradient descent, the theory's quantities, a recorder.

    X = W_L s(W_{L-1} ... s(W_1)),    W_l(0) = eps_l Q_l,    W_l <- (1 - eta lam) W_l - eta dl/dW_l

``model`` holds the full-width, narrow and compressed forms, ``losses`` the losses of the product, ``training`` gradient
descent and other optimizers, ``projected`` GaLore's and ReLoRA's descent, ``theory`` what Theorem 2.1 and Lemma E.2 predict,
``recorder`` what really happened.

Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 2 and appendix E.
"""

from .losses import SquaredLoss, layer_gradients, product_gradient
from .model import DeepFactorization
from .projected import galore_descent, relora_descent
from .recorder import Recorder, Recording
from .theory import (
    RateBounds,
    invariant_frames,
    lemma_bounds,
    principal_angles,
    rate_bounds,
    repeated_singular_value,
    rho_trajectory,
)
from .training import Descent, TrainingResult, gradient_spectra, gradients, train

__all__ = [
    "DeepFactorization",
    "Descent",
    "RateBounds",
    "Recorder",
    "Recording",
    "SquaredLoss",
    "TrainingResult",
    "galore_descent",
    "gradient_spectra",
    "gradients",
    "invariant_frames",
    "layer_gradients",
    "lemma_bounds",
    "principal_angles",
    "product_gradient",
    "rate_bounds",
    "relora_descent",
    "repeated_singular_value",
    "rho_trajectory",
    "train",
]
