"""MIRA and what it is compared with, on language models with frozen weights."""

from collections.abc import Callable
from typing import Any

from experiments.factories.relations import make_graph
from experiments.parts import Parts
from fedjax_mtl import Algorithm, algorithms, models


def _training(parts: Parts, model: Any, learning_rate: float) -> dict[str, Any]:
    if not isinstance(parts.model, models.LanguageModel):
        raise ValueError(
            "MIRA and its kin tune a language model; use config.model.name transformer"
        )
    return parts.training(learning_rate) | {"model": parts.finish(model)}


def _adapted(
    parts: Parts,
    learning_rate: float,
    *,
    targets: tuple[str, ...],
    rank: int,
    alpha: float,
    dropout: float,
    deviation: float,
) -> dict[str, Any]:
    """Local training of LoRA's adapters; alpha 0 is scale 1, deviation 0 the default start."""
    model = models.lora(
        parts.model,
        targets=targets,
        rank=rank,
        alpha=alpha or None,
        dropout=dropout,
        deviation=deviation or None,
    )
    return _training(parts, model, learning_rate)


def _mira(
    parts: Parts,
    *,
    learning_rate: float,
    targets: tuple[str, ...],
    rank: int,
    alpha: float,
    graph: str,
    strength: float,
    dropout: float = 0.0,
    deviation: float = 0.0,
    graph_seed: int = 0,
    smoothness: float = 0.5,
    neighbours: str = "sampled",
) -> Algorithm:
    settings = _adapted(
        parts,
        learning_rate,
        targets=targets,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        deviation=deviation,
    )
    chosen = make_graph(parts, graph=graph, seed=graph_seed, smoothness=smoothness)
    return algorithms.mira(**settings, graph=chosen, strength=strength, neighbours=neighbours)


def _lora_baseline(factory: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
    def make(
        parts: Parts,
        *,
        learning_rate: float,
        targets: tuple[str, ...],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        deviation: float = 0.0,
    ) -> Algorithm:
        return factory(
            **_adapted(
                parts,
                learning_rate,
                targets=targets,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                deviation=deviation,
            )
        )

    return make


def _fedptuning(
    parts: Parts, *, learning_rate: float, num_tokens: int = 20, hidden: int = 128
) -> Algorithm:
    model = models.prompt_tuning(parts.model, num_tokens=num_tokens, hidden=hidden)
    return algorithms.fedit(**_training(parts, model, learning_rate))


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fedit": _lora_baseline(algorithms.fedit),
    "fedptuning": _fedptuning,
    "local_adapters": _lora_baseline(algorithms.local_adapters),
    "mira": _mira,
}
