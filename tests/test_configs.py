"""Every config builds and runs in its quick variant, and a wrong one says clearly what is wrong."""

import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from data.test_shakespeare import TEXT

from configs import common
from experiments import run
from experiments.figures import round_times
from experiments.plan import make_plan
from fedjax_mtl.core.checks import InputError
from fedjax_mtl.data import tfds_sets
from fedjax_mtl.data.task_tables import related_tasks

GOLDEN = pathlib.Path(__file__).parent / "golden"

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem != "common"
)


def get(name, **changes):
    config = importlib.import_module(f"configs.{name}").get_config("quick")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """Small stand-ins for the sets that are not shipped.

    They are random images, and a text of two plays.
    """

    def load(name, data_dir=None):
        del data_dir
        rng = np.random.default_rng(0)
        side, channels, classes = (
            (28, 1, 62) if name == "emnist" else (32, 3, 100 if name == "cifar100" else 10)
        )
        labels = np.tile(np.arange(classes, dtype=np.int32), 20000 // classes)
        images = rng.integers(0, 255, (len(labels), side, side, channels)).astype(np.uint8)
        found = {"inputs": images, "labels": labels}
        return found | (
            {"coarse_labels": tfds_sets.CIFAR100_COARSE[labels]} if name == "cifar100" else {}
        )

    monkeypatch.setattr(tfds_sets, "load_tfds", load)
    text = tmp_path / "plays.txt"
    # Roles of twenty lines, so that their last fifth is longer than a window.
    line = "    Whether 'tis nobler in the mind to suffer the slings\n"
    text.write_text(
        TEXT.replace(
            "  Ber. Who's there?\n", f"  Ber. Who's there?\n{line * 20}  MAR. Holla!\n{line * 20}"
        )
    )
    return text


def write_task_table(path, regression):
    table = related_tasks(num_tasks=5, features=4, smallest=12, largest=20, regression=regression)
    sizes = [len(rows) for rows in table.rows]
    np.savez(path, X=table.inputs, y=table.labels, task_sizes=sizes)
    return str(path)


def write_instructions(directory):
    """A few questions of two categories, and a tokenizer of their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    lines = [
        {"instruction": f"say {word}", "context": "", "response": word, "category": category}
        for category, words in (("short", "a b c d e f"), ("long", "one two three four five six"))
        for word in words.split()
    ]
    path = directory / "dolly.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    words = {
        word: i for i, word in enumerate(["<unk>", "</s>", "say", *"abcdef", "one", "two", "three"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(path)


def small_files(config, prepared, tmp_path):
    """Points a config at the files that a user would name."""
    if config.data.name == "shakespeare":
        config.data.path = str(prepared)
        config.data.stride = 1
        config.data.unseen_fraction = 0.0
    if config.data.name == "scenes":
        config.data.data_dir = str(tmp_path / "tfds")
    if config.data.name == "task_table":
        regression = config.data.preparation.loss == "squared"
        config.data.path = write_task_table(tmp_path / "table.npz", regression)
    if config.data.name == "instruction_files":
        config.data.path, config.data.tokenizer = write_instructions(tmp_path), str(tmp_path)
        config.model.directory = str(GOLDEN / "tiny_gpt2")
        config.data.update(max_length=26, longest_prompt=26, max_new_tokens=4)


def slow(*values):
    """Marks a parameter of the long runs."""
    return pytest.param(*values, marks=pytest.mark.claim)


# These compile for long, or compute much; they are prepared by default, and run with the claims.
SLOW = ("fedbone_scenes", "fedem_cifar10", "fedem_cifar100", "mira_dolly_gpt2", "mira_instructions")


@pytest.mark.parametrize("name", SLOW)
def test_slow_quick_variants_are_prepared(name, prepared, tmp_path):
    """Everything is built, and one round is traced."""
    config = get(name)
    small_files(config, prepared, tmp_path)
    assert run.prepare(make_plan(config), run.Made()).problem.num_clients


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in CONFIGS])
def test_quick_variants_run(name, prepared, tmp_path):
    config = get(name)
    config.seeds = (0,)
    config.num_rounds, config.eval_every, config.checkpoint_every = 1, 1, 1
    small_files(config, prepared, tmp_path)
    summary = run.run(config, tmp_path / name)
    final = summary["metrics"]["train_clients"]
    assert all(np.isfinite(entry["final_mean"]) for entry in final.values())
    expected = {
        "scenes": {"A_depth/depth/rmse", "B_semseg/semseg/miou", "A_depth/loss"},
        "conflicting_tasks": {"regression/rmse", "classification/accuracy", "regression/loss"},
        "scaled_tasks": {"normalised_error", "normalised_error_worst_tenth", "loss"},
        "chains": {"accuracy", "token_loss", "perplexity"},
        "families": {"rouge_l", "rouge_l_bottom_decile", "accuracy"},
        "instruction_files": {"rouge_l", "loss"},
    }
    if config.data.name == "task_table" and config.data.preparation.loss == "squared":
        expected["task_table"] = {"rmse", "loss"}
    assert expected.get(config.data.name, {"accuracy", "accuracy_bottom_decile", "loss"}) <= set(
        final
    )
    assert (tmp_path / name / "curves.png").stat().st_size > 1000


def test_full_variants_carry_the_papers_settings():
    settings = {name: importlib.import_module(f"configs.{name}").get_config() for name in CONFIGS}
    clients = {name: c.data.get("num_clients") for name, c in settings.items()}
    assert clients["fedem_synthetic"] == 300 and clients["fedem_emnist"] == 100
    assert clients["fedem_cifar10"] == 80 and clients["fedem_cifar100"] == 100
    for name in {name for name in CONFIGS if name.startswith("fedem")} - {"fedem_digits"}:
        assert settings[name].num_rounds == 200
        assert settings[name].client.batch_size == 128 and settings[name].client.momentum == 0.9
        assert settings[name].algorithm.fedem.num_components == 3


BAD = {
    "algorithm": (
        {"algorithm.name": "fedsgd"},
        "unknown config.algorithm.name 'fedsgd'; expected one of agnostic, apfl",
    ),
    "data set": (
        {"data.name": "mnist"},
        "unknown config.data.name 'mnist'; expected one of chains, conflicting_tasks, digits",
    ),
    "model": ({"model.name": "resnet"}, "unknown config.model.name 'resnet'"),
    "partition": (
        {"data.partition": "iid"},
        "unknown config.data.partition 'iid'; expected one of label_permuted, rotated",
    ),
    "optimiser": ({"client.name": "adagrad"}, "unknown optimizer 'adagrad'"),
    "schedule": ({"client.schedule": "step"}, "unknown config.client.schedule 'step'"),
    "cohort": ({"cohort_size": 100}, r"config.cohort_size is 100 but 6 clients train"),
    "epochs and steps": (
        {"client.epochs": 1, "client.steps": 3},
        "has epochs=1 and steps=3; give one of them",
    ),
    "no epoch": ({"client.epochs": 0}, "the client has epochs=0; give at least 1"),
    "length": ({"client.max_norm": 0.0}, "max_norm is 0.0; give a positive length, or None"),
    "momentum of Adam": (
        {"client.name": "adam", "client.momentum": 0.9},
        "momentum is 0.9, but adam has its own",
    ),
    "rounds": ({"num_rounds": 0}, "config.num_rounds is 0; give at least 1"),
    "checkpoints": ({"checkpoint_every": 3}, "no multiple of config.eval_every"),
    "seeds": ({"seeds": (1, 1)}, r"config.seeds is \(1, 1\); give at least one, all different"),
    "execution": ({"execution.mode": "pmap"}, "unknown execution mode 'pmap'"),
    "chunk": ({"execution.mode": "chunk"}, "needs a chunk of at least 1"),
    "chunk of auto": (
        {"execution.chunk": 4},
        "config.execution.chunk is 4, which goes with config.execution.mode chunk",
    ),
    "shares": ({"systems.high": 2.0}, "shares of the planned work between 1.0 and 2.0"),
    "smallest": (
        {"systems.low": 0.5, "systems.of_smallest": True},
        "of_smallest is for methods in the dual",
    ),
    "nobody": ({"cohort_size": 0}, r"config.cohort_size is 0 but 6 clients train; give 1..6, or"),
    "pretraining": (
        {"pretraining.steps": 5},
        "gives weights to the frozen model under adapters, and fedem has none",
    ),
    "devices": ({"execution.num_devices": 64}, "64 devices asked for but there are 4"),
    "components": ({"algorithm.fedem.num_components": 0}, "num_components is 0"),
    "alpha": ({"data.alpha": 0.0}, "alpha is 0.0"),
    "unseen": ({"data.unseen_fraction": 1.0}, "unseen_fraction is 1.0"),
    "batch": ({"client.batch_size": -4}, "batch_size is -4"),
    "train size": (
        {"data.train_size": 5000},
        "cannot draw 5000 different examples from a pool of 1257",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_configs_are_refused_before_anything_is_written(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        run.run(get("fedem_digits", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


DUAL_ALGORITHMS = ("cocoa", "global_model", "local_models", "minibatch_sdca", "minibatch_sgd")
ADAPTER_ALGORITHMS = ("fedit", "fedptuning", "local_adapters")
RELATIONS = (
    "independent",
    "mean(coupling=1.0, ridge=0.1)",
    "learned(ridge=0.1)",
    "clustered(num_clusters=2)",
    "sparse(sparsity=0.1, ridge=0.1)",
)
POPULATION_ALGORITHMS = ("fedadam", "fedavg", "fedper", "fedprox", "fedrep", "local")
GRADNORM_ALGORITHMS = ("equal_weights", "fedper", "fedrep", "local")


@pytest.mark.parametrize(
    "config_name, algorithm",
    [("feddea_conflicting", a) for a in POPULATION_ALGORITHMS]
    + [("fedgradnorm_tasks", a) for a in GRADNORM_ALGORITHMS]
    + [("hota_fedgradnorm", "hota_equal_weights")]
    + [("mocha_stragglers", a) for a in DUAL_ALGORITHMS]
    + [slow("mira_chains", a) for a in ADAPTER_ALGORITHMS],
)
def test_baselines_run_beside_their_system(config_name, algorithm, tmp_path):
    config = get(config_name)
    config.algorithm.name = algorithm
    config.num_rounds, config.eval_every, config.checkpoint_every = 1, 1, 1
    summary = run.run(config, tmp_path / "run")
    assert all(np.isfinite(e["final_mean"]) for e in summary["metrics"]["train_clients"].values())
    assert (summary["bytes_up_per_round"] == 0) == (algorithm == "local")


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_of_mocha(relation, tmp_path):
    config = get("mocha_synthetic", **{"algorithm.mocha.relationship": relation})
    fixed = relation.startswith(("independent", "mean"))
    config.algorithm.mocha.relationship_every = None if fixed else 2
    config.num_rounds, config.eval_every, config.checkpoint_every = 4, 4, 4
    summary = run.run(config, tmp_path / "run")
    assert summary["metrics"]["server"]["gap"]["final_mean"] >= 0
    assert not jax.config.jax_enable_x64


def test_round_times_of_finished_runs(tmp_path, capsys):
    directories = []
    for algorithm in ("mocha", "cocoa"):
        config = get("mocha_stragglers", **{"algorithm.name": algorithm, "num_rounds": 10})
        directories.append(tmp_path / algorithm)
        run.run(config, directories[-1])
    round_times.main([*map(str, directories), f"--output={tmp_path / 'times'}"])
    printed = capsys.readouterr().out
    assert "wifi" in printed and "cocoa" in printed
    assert (tmp_path / "times.png").stat().st_size > 1000
    times = round_times.elapsed(round_times.read_course(directories[0]), "3g")
    assert times[-1] > 10 * 1000 and (np.diff(times) > 0).all()
    table = round_times.times_to([round_times.read_course(d) for d in directories], -1e9, "wifi")
    assert table == {"mocha": [None] * 3, "cocoa": [None] * 3}


BAD_RELATED = {
    "momentum": (
        "mocha_synthetic",
        {"client.momentum": 0.9},
        "config.client.momentum is 0.9, but mocha does not take it; leave it at 0.0",
    ),
    "loss": (
        "mocha_synthetic",
        {"data.preparation.loss": "cubic"},
        "unknown config.data.preparation.loss 'cubic'",
    ),
    "preparation": (
        "mocha_synthetic",
        {"data.preparation.whiten": True},
        "unknown field config.data.preparation.whiten",
    ),
    "relation": (
        "mocha_synthetic",
        {"algorithm.mocha.relationship": "sorted"},
        "unknown config.algorithm.mocha.relationship 'sorted'; expected one of clustered",
    ),
    "precision": (
        "mocha_synthetic",
        {"execution.precision": "half"},
        "unknown config.execution.precision",
    ),
    "drops": (
        "mocha_synthetic",
        {"systems.drop_probability": 1.5},
        "drop probability 1.5 is outside 0..1",
    ),
    "smallest": ("mocha_synthetic", {"systems.of_smallest": True}, "set low and high below 1 too"),
    "budgets": ("mocha_synthetic", {"systems.low": 2.0}, "budgets between 2.0 and 1.0"),
    "no file": ("mocha_school", {}, "config.data.path is empty"),
    "not a dual problem": (
        "fedem_digits",
        {
            "algorithm.name": "mocha",
            "algorithm.mocha": {"penalty": 1.0, "relationship": "learned"},
            "client": {},
        },
        "config.algorithm.mocha needs data with a dual loss",
    ),
    "pattern": (
        "mira_chains",
        {"model.adapters.lora.targets": ("*/attention/w_q",)},
        "matches no dense layer of the model",
    ),
    "no adapters": (
        "mira_chains",
        {"algorithm.name": "fedavg"},
        "gives weights to the frozen model under adapters, and fedavg has none; use one of fedit",
    ),
    "graph": (
        "mira_chains",
        {"algorithm.mira.graph": "tree"},
        "unknown config.algorithm.mira.graph 'tree'; expected one of complete",
    ),
    "alike": (
        "relational_digits",
        {"algorithm.fedu.graph": "group"},
        "config.algorithm.fedu.graph needs data that know which clients are alike",
    ),
    "no language model": (
        "mira_chains",
        {"model": {"name": "mlp", "adapters": {"lora": {"targets": ("*",), "rank": 1}}}},
        "tunes a language model; use config.model.name transformer",
    ),
    "checkpoint": (
        "mira_dolly_gpt2",
        {"data.path": "x", "data.tokenizer": "y"},
        "There is no file x",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_RELATED))
def test_bad_configs_of_related_models(name, tmp_path):
    config_name, changes, message = BAD_RELATED[name]
    config = importlib.import_module(f"configs.{config_name}").get_config("quick")
    with config.unlocked():
        for field, value in changes.items():
            *parents, last = field.split(".")
            owner = config
            for parent in parents:
                owner = owner[parent]
            owner[last] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_answers_that_do_not_fit_are_found_before_training(tmp_path):
    config = get("mira_instructions", **{"data.max_length": 60})
    with pytest.raises(ValueError, match="68 tokens exceed the model's max_length of 64"):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


BAD_POPULATIONS = {
    "cut": (
        {"algorithm.name": "fedbone"},
        "'fedbone' needs a model that can be cut; use --config.model.name=cut",
    ),
    "cohort": ({"cohort_size": 5}, "config.cohort_size is 5 but 4 clients of group"),
    "keep": ({"algorithm.feddea.keep": 0.0}, r"keep is 0.0; give a share in \(0, 1\]"),
    "shared": (
        {"algorithm.feddea.personal": "encoders"},
        "unknown config.algorithm.feddea.personal 'encoders'; expected one of body",
    ),
    "entries": (
        {"algorithm.feddea.personal": "entries(names=encoders)"},
        "no entry 'encoders'; expected some of encoder, heads",
    ),
    "tasks": ({"data.num_tasks": 1}, "num_tasks is 1; give at least 2"),
    "model": (
        {"model.name": "mlp"},
        "need a model with a head for each of them; use --config.model.name=many_heads",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_POPULATIONS))
def test_bad_configs_of_populations(name, tmp_path):
    changes, message = BAD_POPULATIONS[name]
    with pytest.raises(ValueError, match=message):
        run.run(get("feddea_conflicting", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "field, value", [("schedule", "sqrt"), ("momentum", 0.9), ("keep_optimizer", True)]
)
def test_fedgradnorm_ignores_no_setting_of_its_clients(field, value, tmp_path):
    with pytest.raises(
        ValueError, match=f"config.client.{field} is {value!r}, but fedgradnorm does not take it"
    ):
        run.run(get("fedgradnorm_tasks", **{f"client.{field}": value}), tmp_path / "run")


BAD_ALGORITHMS = {
    "apfl": ({"alpha": 1.5}, "alpha is 1.5; it is a share"),
    "l2sgd": ({"probability": 1.0}, "the coin needs 0 < p < 1"),
    "decentralized_fedem": (
        {"mixing_matrix": "fastest(graph=star)"},
        "unknown config.algorithm.decentralized_fedem.mixing_matrix.graph 'star'",
    ),
    "pfedme": ({"fidelity": "official"}, "fidelity must be 'paper' or 'released'"),
}


@pytest.mark.parametrize("name", sorted(BAD_ALGORITHMS))
def test_bad_settings_of_algorithms(name, tmp_path):
    changes, message = BAD_ALGORITHMS[name]
    config = get("fedem_digits")
    config.algorithm.name = name
    config.algorithm[name].update(changes)
    with pytest.raises(ValueError, match=message):
        run.run(config, tmp_path / "run")


def test_what_only_a_round_can_show_is_found_before_anything_is_written(tmp_path):
    config = get("fedem_digits", cohort_size=3)
    config.algorithm.name = "clustered"
    with pytest.raises(ValueError, match="needs all 6 clients in every round, the cohort has 3"):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fields_that_nobody_reads_are_refused(tmp_path):
    config = get("fedem_digits")
    with config.unlocked():
        config.cohort_sizes = 3
    with pytest.raises(
        ValueError, match="unknown field config.cohort_sizes; known fields: algorithm"
    ):
        run.run(config, tmp_path / "run")
    config = get("fedem_digits")
    with config.unlocked():
        config.execution.chunks = 3
    with pytest.raises(
        ValueError,
        match="unknown field config.execution.chunks; known fields: chunk, mode, num_devices",
    ):
        run.run(config, tmp_path / "run")


def test_pachinko_needs_coarse_labels(prepared, tmp_path):
    with pytest.raises(
        ValueError, match="pachinko needs coarse labels, which cifar10 does not have"
    ):
        run.run(get("fedem_cifar10", **{"data.partition": "pachinko"}), tmp_path / "run")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_shows_everything_and_can_be_read_again(name):
    """``config.json`` is a config whose fields all have a value or are None."""
    plan = make_plan(importlib.import_module(f"configs.{name}").get_config())
    again = make_plan(json.loads(json.dumps(plan.settings)))
    assert json.dumps(again.settings) == json.dumps(plan.settings)
    assert set(plan.settings["client"]) >= {"batch_size", "epochs", "steps", "max_norm"}
    assert set(plan.settings["algorithm"]) == {"name", plan.name}


def test_an_algorithm_may_change_its_clients_settings():
    config = get("fedem_synthetic")
    assert make_plan(config).client["momentum"] == 0.9
    config.algorithm.name = "fedprox"
    assert make_plan(config).client["momentum"] == 0.0
    config.algorithm.name = "pfedme"
    plan = make_plan(config)
    assert plan.client["learning_rate"] == 0.05 and plan.client["momentum"] == 0.0
    assert plan.algorithm.values["learning_rate"] == 0.1
    with config.unlocked():
        config.algorithm.fedem.momentun = 0.5
    config.algorithm.name = "fedem"
    with pytest.raises(InputError, match="unknown field config.algorithm.fedem.momentun"):
        make_plan(config)


def test_a_missing_learning_rate_is_named():
    config = get("hota_fedgradnorm", **{"algorithm.name": "fedavg"})
    with pytest.raises(InputError, match="missing field config.algorithm.fedavg.learning_rate"):
        make_plan(config)


def test_clients_in_groups_can_be_sampled_drop_out_and_do_less(tmp_path):
    changes = {"cohort_size": 2, "systems.drop_probability": 0.2, "systems.low": 0.5}
    config = get("feddea_conflicting", **changes, num_rounds=1, eval_every=1, checkpoint_every=1)
    config.seeds, config.client.keep_optimizer = (0,), True
    config.algorithm.name = "fedavg"
    summary = run.run(config, tmp_path / "run")
    assert summary["metrics"]["server"]["participants"]["final_mean"] <= 4


def test_variants():
    assert common.parse_variant("quick,seed=3", quick=False, seed=0).to_dict() == {
        "quick": True,
        "seed": 3,
    }
    with pytest.raises(ValueError, match="unknown variant 'fast'; known: quick"):
        common.parse_variant("fast", quick=False)


def test_sets_that_are_not_there_say_how_to_get_them(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"python -m fedjax_mtl.data.tfds_sets emnist --data_dir="
    ):
        run.run(get("fedem_emnist", **{"data.data_dir": str(tmp_path)}), tmp_path / "run")
    with pytest.raises(ValueError, match="config.data.path is empty; name the text"):
        run.run(get("fedem_shakespeare"), tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        run.run(
            get("fedem_shakespeare", **{"data.path": str(tmp_path / "none.txt")}), tmp_path / "run"
        )


def test_a_work_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; name a directory"):
        run.run(get("fedem_digits"), tmp_path / "file")
