"""Models: pairs of pure functions, with flax behind them."""

from fedjax_mtl.core.model import Model
from fedjax_mtl.models import adapters
from fedjax_mtl.models.convolution import PatchConv
from fedjax_mtl.models.dense_prediction import multi_decoder, task_conditioned
from fedjax_mtl.models.linen import from_flax
from fedjax_mtl.models.low_rank import lora
from fedjax_mtl.models.multitask import body_and_head, many_heads
from fedjax_mtl.models.networks import MLP, CharLSTM, Linear, TwoLayerCNN, cnn, linear, lstm, mlp
from fedjax_mtl.models.pretrained import from_hugging_face_config
from fedjax_mtl.models.prompts import prompt_tuning
from fedjax_mtl.models.split_parts import conv_trunk, patch_embedding, task_adaptation, vit_trunk
from fedjax_mtl.models.transformer import (
    LanguageModel,
    TransformerConfig,
    data_juicer,
    gpt2,
    language_model,
    llama,
    tiny_transformer,
)

__all__ = [
    "CharLSTM",
    "LanguageModel",
    "Linear",
    "MLP",
    "Model",
    "PatchConv",
    "TransformerConfig",
    "TwoLayerCNN",
    "adapters",
    "body_and_head",
    "cnn",
    "conv_trunk",
    "data_juicer",
    "from_flax",
    "from_hugging_face_config",
    "gpt2",
    "language_model",
    "linear",
    "llama",
    "lora",
    "lstm",
    "many_heads",
    "mlp",
    "multi_decoder",
    "patch_embedding",
    "prompt_tuning",
    "task_adaptation",
    "task_conditioned",
    "tiny_transformer",
    "vit_trunk",
]
