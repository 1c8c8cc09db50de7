"""Models: pairs of pure functions, with flax behind them."""

from fedjax_mtl.models.base import Model, from_flax
from fedjax_mtl.models.convolution import PatchConv
from fedjax_mtl.models.dense_prediction import multi_decoder, task_conditioned
from fedjax_mtl.models.multitask import body_and_head, many_heads
from fedjax_mtl.models.networks import MLP, CharLSTM, Linear, TwoLayerCNN, cnn, linear, lstm, mlp
from fedjax_mtl.models.split_parts import conv_trunk, patch_embedding, task_adaptation, vit_trunk

__all__ = [
    "CharLSTM",
    "Linear",
    "MLP",
    "Model",
    "PatchConv",
    "TwoLayerCNN",
    "body_and_head",
    "cnn",
    "conv_trunk",
    "from_flax",
    "linear",
    "lstm",
    "many_heads",
    "mlp",
    "multi_decoder",
    "patch_embedding",
    "task_adaptation",
    "task_conditioned",
    "vit_trunk",
]
