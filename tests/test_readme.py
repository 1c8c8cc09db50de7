"""The README's code runs, its commands are those of CI, and what the documents point at exists."""

import ast
import importlib.util
import inspect
import pathlib
import re
import shlex
import sys

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import registry, sweep
from experiments.plan import make_plan
from fedjax_mtl import algorithms

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "configs/README.md", "experiments/README.md")

# Parts of algorithms that users compose themselves; they are no systems.
PARTS = {"fedem_client", "mixed_clients"}


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands():
    """Every command line of the documents.

    Lines that continue on the next one are joined.
    """
    for document in DOCUMENTS:
        for block in blocks("sh", (ROOT / document).read_text()):
            yield from block.replace("\\\n", " ").splitlines()


def run_python(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_bytes()) <= 9216


@pytest.fixture(scope="module")
def first_example():
    block, _ = blocks("python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    return run_python(block)


def test_the_first_example_runs_and_learns(first_example):
    losses = first_example["run"].metrics["loss"]
    assert losses.shape == (3, 50)
    assert losses[:, -1].mean() < 0.5 * losses[:, 0].mean()


def test_the_published_system_beside_it_learns(first_example):
    (call,) = re.findall(r"`(algorithms\.fedem\([^`]*\))`", README)
    fedem = eval(call, {**first_example, "algorithms": algorithms})
    run = first_example["simulate"](fedem, first_example["clients"].train, num_rounds=30)
    losses = run.metrics["loss"][0]
    assert losses[-1] < 0.5 * losses[0]


def test_the_added_algorithm_keeps_its_head_and_learns(first_example):
    _, block = blocks("python")
    fedbabu = run_python(block)["fedbabu"]
    assert "fedbabu" not in algorithms.__all__
    train = first_example["clients"].train
    arguments = (first_example["model"], first_example["task"])
    algorithm = fedbabu(*arguments, num_clients=train.num_clients, solver=first_example["solver"])
    run = first_example["simulate"](algorithm, train, num_rounds=30)
    losses = run.metrics["loss"][0]
    assert losses[-1] < 0.8 * losses[0] and algorithm.tuned
    heads = jax.tree.leaves(run.state.clients.personal)
    assert heads and all((leaf == leaf[:, :1]).all() for leaf in heads)


def test_commands_of_the_readme_are_those_of_ci():
    script = (ROOT / ".ci" / "run").read_text()
    readme = "\n".join(blocks("sh"))
    for command in ('pip install -e ".[test]"', "python -m pytest", "python -m pytest -m claim"):
        assert command in readme
    assert '".[test]"' in script and "python -m pytest" in script and "-m claim" in script
    for check in ("ruff check .", "ruff format --check .", "mypy"):
        assert check in readme and check in script


def test_every_system_stands_in_the_table_and_has_its_file():
    table = re.search(r"\| system \|.*?\n\n", README, re.S).group()
    rows = [line.split("|") for line in table.splitlines()[2:]]
    named = [name for row in rows if len(row) > 4 for name in re.findall(r"`(\w+)`", row[3])]
    assert sorted(named) == sorted(set(algorithms.__all__) - PARTS)
    for name in named:
        path = pathlib.Path(inspect.getsourcefile(inspect.unwrap(getattr(algorithms, name))))
        assert path.parent.name == "algorithms" and path.name.startswith("_")


def test_every_file_that_a_document_names_exists():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        folder = (ROOT / document).parent
        for link in re.findall(r"(?:\]\(|^\[\w+\]: )([^)\s]+)", text, re.M):
            path, _, anchor = link.partition("#")
            target = folder / path if path else ROOT / document
            assert target.exists(), link
            if anchor:
                assert anchor in anchors(target.read_text()), link
        for path in re.findall(r"\b(?:fedjax_mtl|configs|experiments|tests)/[\w/]+\.py", text):
            assert (ROOT / path).exists() or path.endswith("_fedbabu.py"), path
    nouns = re.search(r"\| noun \|.*?\n\n", README, re.S).group()
    for path in re.findall(r"`([\w/]+(?:/|\.py))`", nouns.partition("\n")[2]):
        assert (ROOT / "fedjax_mtl" / path).exists(), path


def test_claims_that_a_document_names_exist():
    text = (ROOT / "configs" / "README.md").read_text()
    named = re.findall(r"-m claim (tests/[\w/]+\.py) -k (\w+)", text)
    assert named
    for path, word in named:
        assert re.search(rf"^def test_\w*{word}", (ROOT / path).read_text(), re.M), (path, word)


def anchors(text):
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_references_of_the_readme_are_defined():
    used = set(re.findall(r"\]\[(\w+)\]", README))
    defined = set(re.findall(r"^\[(\w+)\]: ", README, re.M))
    assert used == defined


def test_commands_name_modules_configs_and_tests_that_exist():
    for command in commands():
        for module in re.findall(r"python -m ([\w.]+)", command):
            assert importlib.util.find_spec(module) is not None, command
        for path in re.findall(r"--config=([\w/]+\.py)|\b(tests/[\w/]+\.py)", command):
            assert all((ROOT / one).exists() for one in path if one), command


def test_every_config_has_its_section():
    sections = anchors((ROOT / "configs" / "README.md").read_text())
    for path in (ROOT / "configs").glob("*.py"):
        if "get_config" in {getattr(n, "name", "") for n in ast.parse(path.read_text()).body}:
            assert path.stem in sections


# --- Commands that start runs, checked as the launcher checks them before any work.


def check_command(words, monkeypatch):
    """Checks every run of a command line with a config, as the launcher does."""
    monkeypatch.setattr(sys, "argv", ["launcher", *words])  # where config_flags looks for fields
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_multi_string("grid", [], "", flag_values=values)
    values(sys.argv)
    for config in sweep.combinations(values.config, values.grid).values():
        make_plan(config)


def test_commands_that_start_runs_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [shlex.split(command) for command in commands() if "--config=" in command]
    assert len(found) > 20
    for words in found:
        assert words[:2] == ["python", "-m"]
        check_command(words[3:], monkeypatch)


def sections_with_a_config():
    """Pairs of a config's name and a text with settings of it."""
    for section in re.split(r"^## ", (ROOT / "configs/README.md").read_text(), flags=re.M)[1:]:
        yield section.partition("\n")[0], section
    yield "fedem_digits", (ROOT / "experiments/README.md").read_text()


def test_settings_named_in_the_text_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = 0
    for name, text in sections_with_a_config():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for setting in re.findall(r'`("?--config\.[\w.]+=[^`]+)`', text):
            algorithm = re.search(r"config\.algorithm\.(\w+)\.", setting)
            chosen = [f"--config.algorithm.name={algorithm[1]}"] if algorithm else []
            words = [f"--config=configs/{name}.py", *shlex.split(setting), *chosen]
            check_command(words, monkeypatch)
            found += 1
    assert found > 15


def test_the_added_algorithm_needs_one_line_in_the_registry(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, block = blocks("python")
    monkeypatch.setitem(registry.ALGORITHMS, "fedbabu", run_python(block)["fedbabu"])
    (line,) = re.findall(r"`(--config\.algorithm\.name=fedbabu)`", README)
    check_command(["--config=configs/fedem_digits.py", line], monkeypatch)
