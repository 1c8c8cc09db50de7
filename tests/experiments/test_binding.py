"""Settings by name: what a library function takes, what it is given, and what is refused."""

import functools
from typing import NamedTuple

import networkx as nx
import numpy as np
import optax
import pytest

from experiments import registry
from experiments.binding import Tables, bind, parameters_of, read_call
from fedjax_mtl.core import trees
from fedjax_mtl.core.batching import BatchPlan
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.relations import gossip


class Rates(NamedTuple):
    first: float = 0.5
    second: int | None = None


def system(
    model: object,
    *,
    num_clients: int,
    penalty: float,
    steps: int | None = None,
    hidden: tuple[int, ...] = (8,),
    kind: str | float = "median",
    rates: Rates = Rates(),  # noqa: B008
    personal: trees.PathPredicate = trees.nothing,
    mixing_matrix: np.ndarray | None = None,
    server: optax.GradientTransformation | None = None,
    hook: object = print,
) -> dict:
    return dict(locals())


TABLES = Tables(
    names={
        "mixing_matrix": {"metropolis": gossip.metropolis_weights},
        "server": {"sgd": optax.sgd, "clip": optax.clip},
    },
    annotations={
        "nx.Graph": {"erdos_renyi": gossip.erdos_renyi, "ring": gossip.ring},
        Rates: {"rates": Rates},
        trees.PathPredicate: {
            "nothing": lambda: trees.nothing,
            "everything": lambda: trees.everything,
        },
    },
    joins={"server": optax.chain},
    provided={"num_clients"},
)


def bound(**settings):
    return bind(system, settings, "config.system", provided={"model", "num_clients"}, tables=TABLES)


def called(**settings):
    return bound(**settings).call({"model": "it", "num_clients": 4}, {"num_clients": 4})


def test_what_is_not_said_is_provided_or_keeps_its_default():
    made = called(penalty=1)
    assert made["model"] == "it" and made["num_clients"] == 4
    assert made["penalty"] == 1.0 and isinstance(made["penalty"], float)
    assert made["steps"] is None and made["hidden"] == (8,) and made["hook"] is print
    assert made["personal"] is trees.nothing and made["rates"] == Rates()


def test_all_settings_are_shown_and_can_be_said_again():
    first = bound(
        penalty=2.0,
        mixing_matrix="metropolis(graph=ring)",
        server="clip(max_delta=1), sgd(learning_rate=0.5)",
    )
    assert first.settings["steps"] is None and first.settings["hidden"] == (8,)
    assert first.settings["personal"] == {"name": "nothing"}
    assert first.settings["rates"] == {"name": "rates", "first": 0.5, "second": None}
    assert first.settings["mixing_matrix"] == {"name": "metropolis", "graph": {"name": "ring"}}
    assert "hook" not in first.settings
    again = bound(**{k: v for k, v in first.settings.items() if v is not None})
    assert again.settings == first.settings


def test_names_become_objects():
    made = called(
        penalty=1.0,
        personal="everything",
        rates={"first": 1},
        mixing_matrix="metropolis(graph=erdos_renyi(probability=0.9, seed=3))",
        server=("clip(max_delta=0.1)", {"name": "sgd", "learning_rate": 2.0}),
    )
    assert made["personal"] is trees.everything and made["rates"] == Rates(1.0)
    graph = gossip.erdos_renyi(4, 0.9, 3)
    assert isinstance(graph, nx.Graph)
    np.testing.assert_array_equal(made["mixing_matrix"], gossip.metropolis_weights(graph))
    update, _ = made["server"].update(np.float32(5.0), made["server"].init(np.float32(0)))
    np.testing.assert_allclose(update, -0.2, rtol=1e-6)


REFUSED = {
    "unknown": (
        {"penalti": 1.0},
        "unknown field config.system.penalti; known fields: hidden, kind, mixing_matrix, penalty",
    ),
    "missing": ({}, "missing field config.system.penalty"),
    "provided": ({"penalty": 1.0, "num_clients": 3}, "unknown field config.system.num_clients"),
    "not sayable": ({"penalty": 1.0, "hook": "print"}, "unknown field config.system.hook"),
    "type": ({"penalty": "much"}, "config.system.penalty is 'much'; expected float"),
    "whole": ({"penalty": 1.0, "steps": 1.5}, "config.system.steps is 1.5; expected int"),
    "tuple": ({"penalty": 1.0, "hidden": 3}, r"config.system.hidden is 3; expected tuple"),
    "name": (
        {"penalty": 1.0, "personal": "head"},
        "unknown config.system.personal 'head'; expected one of everything, nothing",
    ),
    "number": ({"penalty": 1.0, "personal": 3}, "config.system.personal is 3; expected one of"),
    "nested": (
        {"penalty": 1.0, "mixing_matrix": "metropolis(graph=ring(seed=1))"},
        "unknown field config.system.mixing_matrix.graph.seed; known fields: none",
    ),
    "nested missing": (
        {"penalty": 1.0, "mixing_matrix": "metropolis"},
        "missing field config.system.mixing_matrix.graph",
    ),
    "no call": ({"penalty": 1.0, "mixing_matrix": "a b"}, "is 'a b'; give a name, or name"),
    "positional": ({"penalty": 1.0, "personal": "nothing(3)"}, "give a name, or name"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_fit_is_refused_by_name(name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        bound(**settings)


def test_none_is_a_value_where_the_parameter_may_be_none():
    def solver(*, batch_size: int | None = 128, penalty: float = 1.0) -> tuple:
        return batch_size, penalty

    said = bind(solver, {"batch_size": None, "penalty": None}, "config.client")
    assert said.settings == {"batch_size": None, "penalty": 1.0} and said.call({}) == (None, 1.0)
    assert bind(solver, {}, "config.client").call({}) == (128, 1.0)


def test_a_name_or_a_number():
    assert called(penalty=1.0, kind="largest")["kind"] == "largest"
    assert called(penalty=1.0, kind="0.25")["kind"] == 0.25  # as the command line gives it


def test_what_the_run_cannot_provide_is_named():
    tables = TABLES._replace(needs={"model": "data with a model"})
    waiting = bind(
        system, {"penalty": 1.0}, "config.system", provided={"model", "num_clients"}, tables=tables
    )
    with pytest.raises(InputError, match="config.system needs data with a model"):
        waiting.call({"num_clients": 4})


def test_a_variant_does_not_offer_what_makes_it_one():
    variant = functools.partial(system, penalty=3.0)
    assert "penalty" not in parameters_of(variant)
    made = bind(variant, {}, "config.system", provided={"model", "num_clients"}, tables=TABLES)
    assert made.call({"model": 0, "num_clients": 1})["penalty"] == 3.0
    with pytest.raises(InputError, match="unknown field config.system.penalty"):
        bind(
            variant,
            {"penalty": 1.0},
            "config.system",
            provided={"model", "num_clients"},
            tables=TABLES,
        )


def test_calls_are_read_as_settings():
    assert read_call("ring", "x") == {"name": "ring"}
    assert read_call("a(b=1, c=d, e=(1, 2), f=g(h='i'))", "x") == {
        "name": "a",
        "b": 1,
        "c": "d",
        "e": (1, 2),
        "f": {"name": "g", "h": "i"},
    }
    assert read_call("a, b(c=-1.5)", "x") == ({"name": "a"}, {"name": "b", "c": -1.5})


@pytest.mark.parametrize(
    "table",
    ["DATA", "MODELS", "ADAPTERS", "ALGORITHMS", "RELATIONSHIPS", "TASK_GRAPHS", "SERVER_STEPS"],
)
def test_every_parameter_of_a_registered_function_says_what_it_takes(table):
    for name, function in getattr(registry, table).items():
        for parameter in parameters_of(function).values():
            assert parameter.choices, f"{table}: {name} has {parameter.name} without an annotation"


def test_plans_take_the_clients_batch_size_unless_they_say_another():
    def algorithm(*, adaptation: BatchPlan | None = None) -> BatchPlan | None:
        return adaptation

    def of(text):
        made = bind(algorithm, {"adaptation": text}, "config.a", tables=registry.TABLES)
        return made.call({}, {"batch_size": 16})

    assert of("plan(epochs=2)")[:3] == (16, 2, None)
    assert of("plan(steps=3, batch_size=4)")[:3] == (4, None, 3)
