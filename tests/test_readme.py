"""The README's code runs, and its test command is the one CI runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_example_runs_and_learns(capsys):
    example, _ = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 18
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    losses = names["run"].metrics["loss"]
    assert losses.shape == (3, 50)
    assert losses[:, -1].mean() < 0.5 * losses[:, 0].mean()


def test_the_server_that_no_paper_has_runs_and_learns():
    _, example = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    losses = names["run"].metrics["loss"]
    assert losses.shape == (2, 60)
    assert losses[:, -1].mean() < 0.5 * losses[:, 0].mean()


def test_commands_of_the_readme_are_those_of_ci():
    script = (ROOT / ".ci" / "run").read_text()
    commands = "\n".join(blocks("sh"))
    for command in ('pip install -e ".[test]"', "python -m pytest"):
        assert command in commands
    assert "python -m pytest" in script and '".[test]"' in script


def test_every_system_of_the_table_has_its_files():
    for path in set(re.findall(r"`((?:fedjax_mtl|configs|experiments)/[\w/]+\.py)`", README)):
        assert (ROOT / path).exists(), path
