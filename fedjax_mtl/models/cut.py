"""Models in three parts, of which the middle one can be a server's, and the same models whole."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_mtl.core.checks import InputError, check_choice
from fedjax_mtl.core.model import Model, Part
from fedjax_mtl.models.split_parts import conv_trunk, patch_embedding, task_adaptation, vit_trunk

PyTree = Any


def composed(lower: Part, trunk: Part, upper: Part) -> Callable[[PyTree, PyTree], PyTree]:
    """The uncut model, ``(params {"lower", "trunk", "upper"}, inputs) -> outputs``."""

    def apply(params: PyTree, inputs: PyTree) -> PyTree:
        features = trunk.apply(params["trunk"], lower.apply(params["lower"], inputs))
        return upper.apply(params["upper"], features)

    return apply


def init_parts(
    lower: Part, trunk: Part, upper: Part, example: PyTree, keys: tuple[jax.Array, ...]
) -> dict[str, PyTree]:
    """The parameters of all three parts.

    Args:
        lower: from inputs to embeddings.
        trunk: from embeddings to features.
        upper: from features to outputs.
        example: a batch of inputs, arrays or shapes, which sizes the parameters.
        keys: one for each part.
    """
    lower_params = lower.init(keys[0], example)
    embeddings = jax.eval_shape(lower.apply, lower_params, example)
    trunk_params = trunk.init(keys[1], embeddings)
    features = jax.eval_shape(trunk.apply, trunk_params, embeddings)
    return {"lower": lower_params, "trunk": trunk_params, "upper": upper.init(keys[2], features)}


class CutModel(NamedTuple):
    """A model in three parts for groups of clients with tasks of their own.

    Attributes:
        lower: the clients' embedding, of one architecture everywhere.
        trunk: what all share.
        uppers: each group's part from features to outputs.
        example: the shape of a batch of inputs, which sizes the parameters.
        models: each group's whole model, whose parameters are ``lower``, ``trunk`` and
            ``uppers/<group>``.
    """

    lower: Part
    trunk: Part
    uppers: dict[str, Part]
    example: jax.ShapeDtypeStruct
    models: dict[str, Model]


def cut_model(
    input_shape: tuple[int, ...],
    outputs_by_group: Mapping[str, Mapping[str, int]],
    *,
    trunk: str = "vit",
    patch: int = 4,
    width: int = 48,
    depth: int = 3,
    heads: int = 4,
    adaptation_width: int = 32,
    head_width: int = 16,
) -> CutModel:
    """Returns patch embedding, trunk, and a task adaptation for each group's one task.

    Args:
        input_shape: height, width and channels of an image.
        outputs_by_group: the output channels of each group's one task, by its name.
        trunk: ``vit``, blocks of attention; or ``conv``, stages of convolutions, each of half the
            resolution and twice the width.
        patch: height and width of a patch.
        width: of the embedding.
        depth: how many blocks or stages the trunk has.
        heads: of all attention.
        adaptation_width: channels of the task adaptation.
        head_width: channels of the head.

    Raises:
        InputError: an unknown trunk, or a group with several tasks.
    """
    check_choice("config.model.trunk", trunk, ("vit", "conv"))
    image_size = input_shape[0], input_shape[1]
    lower = patch_embedding(patch, width)
    body = (
        vit_trunk(depth, heads)
        if trunk == "vit"
        else conv_trunk([width * 2**stage for stage in range(depth)])
    )
    uppers = {}
    for name, own in outputs_by_group.items():
        if len(own) != 1:
            raise InputError(
                f"a cut model is for clients with one task, but group {name!r} has "
                f"{', '.join(own)}; use --config.data.single_task=True"
            )
        ((task, channels),) = own.items()
        adaptation = task_adaptation(
            adaptation_width, channels, image_size, heads=heads, head_width=head_width
        )
        uppers[name] = _named(adaptation, task)
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    whole = {
        name: _whole(lower, body, upper, name, number, example)
        for number, (name, upper) in enumerate(sorted(uppers.items()))
    }
    return CutModel(lower, body, uppers, example, whole)


def _named(part: Part, task: str) -> Part:
    """A part whose outputs are called by their task."""
    return Part(part.init, lambda params, features: {task: part.apply(params, features)})


def _whole(
    lower: Part, trunk: Part, upper: Part, name: str, number: int, example: jax.ShapeDtypeStruct
) -> Model:
    whole = composed(lower, trunk, upper)

    def init(key: jax.Array) -> PyTree:
        trunk_key, lower_key, upper_key = jax.random.split(key, 3)
        keys = (lower_key, trunk_key, jax.random.fold_in(upper_key, number))
        made = init_parts(lower, trunk, upper, example, keys)
        return {"lower": made["lower"], "trunk": made["trunk"], "uppers": {name: made["upper"]}}

    def apply(params: PyTree, inputs: PyTree, key: jax.Array | None = None) -> PyTree:
        del key
        own = {"lower": params["lower"], "trunk": params["trunk"], "upper": params["uppers"][name]}
        return whole(own, inputs)

    return Model(init, apply)
