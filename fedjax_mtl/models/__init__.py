"""Models: pairs of pure functions, with flax behind them."""

from fedjax_mtl.models.base import Model, from_flax
from fedjax_mtl.models.convolution import PatchConv
from fedjax_mtl.models.networks import MLP, CharLSTM, Linear, TwoLayerCNN, cnn, linear, lstm, mlp

__all__ = [
    "CharLSTM",
    "Linear",
    "MLP",
    "Model",
    "PatchConv",
    "TwoLayerCNN",
    "cnn",
    "from_flax",
    "linear",
    "lstm",
    "mlp",
]
