"""From ``config.data`` to federated splits and a task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.settings import call
from fedjax_mtl import Federation, Splits, Task, data, make_federation, tasks
from fedjax_mtl.algorithms.mocha import check_tasks
from fedjax_mtl.data import features, instruction_families, instructions, markov_chains, task_tables
from fedjax_mtl.data.instructions import Tokenizer
from fedjax_mtl.federation import check_labels


class Generation(NamedTuple):
    """Prompts to answer when a run is over.

    Attributes:
        federation: each client's test prompts; examples are ``prompts`` int32 ``[n, capacity]`` and ``lengths`` int32 ``[n]``.
        references: the right answers, by row. tokenizer: turns tokens into text. max_new_tokens: of an answer.
    """

    federation: Federation
    references: list[str]
    tokenizer: Tokenizer
    max_new_tokens: int


class Problem(NamedTuple):
    """What a run learns: the clients' data, the task, and the shapes a model must have.

    Attributes:
        splits, task, input_shape, num_outputs: always.
        groups: ``[clients]``, which clients are alike, where the data know.
        dual_loss: of problems for methods in the dual.
        pretraining: examples that a base model is trained on before adapters are.
        generation: prompts to answer, of instruction data.
    """

    splits: Splits
    task: Task
    input_shape: tuple[int, ...]
    num_outputs: int
    groups: np.ndarray | None = None
    dual_loss: tasks.dual.DualLoss | None = None
    pretraining: dict[str, np.ndarray] | None = None
    generation: Generation | None = None


class PopulationProblem(NamedTuple):
    """What a run on a heterogeneous population learns; everything by group.

    Attributes:
        splits: the groups' data.
        tasks: what each group is trained and judged on.
        input_shape: of one input, the same in all groups.
        outputs: output channels by task name, for each group.
    """

    splits: data.PopulationSplits
    tasks: dict[str, Task]
    input_shape: tuple[int, ...]
    outputs: dict[str, dict[str, int]]


def _mixture_of_digits(
    partition: str,
    num_clients: int,
    num_components: int,
    alpha: float,
    train_size: int,
    test_size: int,
    unseen_fraction: float,
    rng: np.random.Generator,
) -> Splits:
    """Clients that draw from a few distributions of digits; training and test images come from different pools."""
    source = data.load_digits()
    order = rng.permutation(len(source["labels"]))
    cut = int(0.7 * len(order))
    drawn = {
        "train": data.draw_clients(order[:cut], num_clients, train_size, rng),
        "test": data.draw_clients(order[cut:], num_clients, test_size, rng),
    }
    owned = np.split(np.arange(num_clients * (train_size + test_size)), num_clients)
    images = np.concatenate([np.concatenate(pair) for pair in zip(*drawn.values(), strict=True)])
    inputs, labels = source["inputs"][images], source["labels"][images]
    held = int(round(unseen_fraction * num_clients))
    mixtures = data.hold_out_evenly(data.draw_mixtures(num_clients, num_components, alpha, rng), held)
    components = data.draw_components(owned, mixtures, len(labels), rng)
    if partition == "label_permuted":
        permutations = data.label_permutations(num_components, 10, rng)
        labels = data.permute_labels(labels, components, permutations)
    else:
        angles = [m * 360 / num_components for m in range(num_components)]
        inputs = data.rotate_images(inputs, components, angles)
    train = make_federation({"inputs": inputs, "labels": labels}, [own[:train_size] for own in owned[held:]])

    def of(rows):
        return make_federation(train.examples, rows) if rows else None

    return Splits(
        train,
        of([own[train_size:] for own in owned[held:]]),
        of([own[:train_size] for own in owned[:held]]),
        of([own[train_size:] for own in owned[:held]]),
    )


def digits(
    *,
    partition: str,
    num_clients: int,
    num_components: int,
    alpha: float,
    train_size: int,
    test_size: int,
    unseen_fraction: float,
    seed: int,
) -> Problem:
    """The digits of scikit-learn: a ``label_permuted`` or ``rotated`` mixture, or a ``dirichlet`` split by label.

    In the mixtures every client has ``train_size`` and ``test_size`` images; in the split they have what the draw gives them, and
    the two say only in what proportion it is cut.
    """
    if not 0 <= unseen_fraction < 1:
        raise ValueError(f"config.data.unseen_fraction is {unseen_fraction}; give a share in [0, 1)")
    rng = np.random.default_rng(seed)
    if partition in ("label_permuted", "rotated"):
        splits = _mixture_of_digits(
            partition, num_clients, num_components, alpha, train_size, test_size, unseen_fraction, rng
        )
    elif partition == "dirichlet":
        examples = data.load_digits()
        rows = data.dirichlet_labels(examples["labels"], num_clients, alpha, rng)
        fraction = test_size / (train_size + test_size)
        splits = data.split_clients(
            examples, rows, rng, test_fraction=fraction, unseen_fraction=unseen_fraction
        )
    else:
        raise ValueError(
            f"unknown config.data.partition {partition!r}; expected label_permuted, rotated or dirichlet"
        )
    return Problem(splits, tasks.classification(), (8, 8, 1), 10)


def synthetic(
    *,
    num_clients: int,
    num_components: int,
    dimension: int,
    num_test: int,
    alpha: float,
    noise_level: float,
    unseen_fraction: float,
    seed: int,
    fidelity: str,
) -> Problem:
    """FedEM's synthetic mixture of linear classifiers."""
    made = data.synthetic_mixture(
        num_clients=num_clients,
        num_components=num_components,
        dimension=dimension,
        num_test=num_test,
        alpha=alpha,
        noise_level=noise_level,
        unseen_fraction=unseen_fraction,
        seed=seed,
        fidelity=fidelity,
    )
    return Problem(made.splits, tasks.binary_classification(), (dimension,), 1)


def images(
    *,
    source: str,
    data_dir: str,
    fraction: float,
    partition: str,
    num_clients: int,
    num_groups: int,
    alpha: float,
    beta: float,
    test_fraction: float,
    unseen_fraction: float,
    seed: int,
) -> Problem:
    """EMNIST, CIFAR-10 or CIFAR-100 through TFDS, split by ``dirichlet`` label groups (0: every label its own) or ``pachinko``."""
    from fedjax_mtl.data import tfds_sets

    examples = tfds_sets.load_tfds(source, data_dir or None)
    rng = np.random.default_rng(seed)
    if not 0 < fraction <= 1:
        raise ValueError(f"config.data.fraction is {fraction}; give a share in (0, 1]")
    count = len(examples["labels"])
    chosen = rng.permutation(count)[: int(round(fraction * count))]
    examples = {name: values[chosen] for name, values in examples.items()}
    labels = examples["labels"]
    num_classes = tfds_sets.NUM_CLASSES[source]
    check_labels(labels, num_classes)
    if partition == "dirichlet":
        rows = data.dirichlet_labels(labels, num_clients, alpha, rng, num_groups or None)
    elif partition == "pachinko" and "coarse_labels" not in examples:
        raise ValueError(
            f"config.data.partition pachinko needs coarse labels, which {source} does not have; use dirichlet"
        )
    elif partition == "pachinko":
        rows = data.pachinko(labels, examples["coarse_labels"], num_clients, rng, alpha=alpha, beta=beta)
    else:
        raise ValueError(f"unknown config.data.partition {partition!r}; expected dirichlet or pachinko")
    constants = tfds_sets.NORMALISE[source]
    inputs = (examples["inputs"] / np.float32(255) - np.float32(constants["mean"])) / np.float32(
        constants["std"]
    )
    splits = data.split_clients(
        {"inputs": inputs, "labels": labels},
        rows,
        rng,
        test_fraction=test_fraction,
        unseen_fraction=unseen_fraction,
    )
    return Problem(splits, tasks.classification(), inputs.shape[1:], num_classes)


def shakespeare(*, path: str, stride: int, max_windows: int, unseen_fraction: float, seed: int) -> Problem:
    """Shakespeare by speaking role, from a text file the user names; next-character prediction."""
    from fedjax_mtl.data.shakespeare import WINDOW, character_weights, load_shakespeare

    if not path:
        raise ValueError(
            "config.data.path is empty; name the text of the complete works, e.g. --config.data.path=100.txt"
        )
    if not 0 <= unseen_fraction < 1:
        raise ValueError(f"config.data.unseen_fraction is {unseen_fraction}; give a share in [0, 1)")
    windows = load_shakespeare(path, stride=stride, max_windows_per_client=max_windows or None)
    examples = {"inputs": windows.inputs, "labels": windows.labels}
    train, test = [], []
    for client in range(len(windows.names)):
        own = np.nonzero(windows.client == client)[0]
        is_test = windows.is_test[own]
        if is_test.any() and not is_test.all():
            train.append(own[~is_test])
            test.append(own[is_test])
    if not train:
        raise ValueError(
            f"no role in {path} has windows of {WINDOW} characters both to train and to test on; "
            "lower config.data.stride or name a longer text"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    num_unseen = int(round(unseen_fraction * len(order)))
    held, seen = order[:num_unseen], order[num_unseen:]
    first = make_federation(examples, [train[c] for c in seen])

    def of(parts, clients):
        return make_federation(first.examples, [parts[c] for c in clients]) if len(clients) else None

    splits = Splits(first, of(test, seen), of(train, held), of(test, held))
    task = tasks.sequence_classification(class_weights=character_weights())
    return Problem(splits, task, (WINDOW,), 100)


def scaled_tasks(
    *, scales: tuple[float, ...], num_clusters: int, num_train: int, last_train: int, num_test: int, seed: int
) -> Problem:
    """Related regressions whose labels differ in scale; the last task has ``last_train`` examples (0: as many as the others)."""
    sizes = [num_train] * (len(scales) - 1) + [last_train or num_train]
    splits = data.scaled_tasks(
        scales, num_clusters=num_clusters, num_train=sizes, num_test=num_test, seed=seed
    )
    return Problem(splits, tasks.mean_squared_error(), (32,), 8)


def conflicting_tasks(
    *, num_tasks: int, num_train: int, num_test: int, overlap: float, seed: int
) -> PopulationProblem:
    """Regressions and classifications that partly conflict, for one unified model with a head a task."""
    splits = data.conflicting_tasks(
        num_tasks=num_tasks, num_train=num_train, num_test=num_test, overlap=overlap, seed=seed
    )
    kinds = {"regression": tasks.mean_squared_error(), "classification": tasks.classification()}
    return PopulationProblem(splits, kinds, (32,), {name: {"heads": num_tasks} for name in kinds})


def _dense_task(name: str, domain: str, edge_weight: float) -> tuple[Task, int]:
    """A task of the rendered scenes and its output channels."""
    from fedjax_mtl.data import rendered

    if name not in rendered.TASKS[domain]:
        known = ", ".join(rendered.TASKS[domain])
        raise ValueError(
            f"unknown task {name!r} in config.data.tasks_{domain.lower()}; expected one of {known}"
        )

    dense = tasks.dense
    return {
        "semseg": lambda: (
            dense.segmentation("semseg", rendered.NUM_SEMSEG[domain]),
            rendered.NUM_SEMSEG[domain],
        ),
        "human_parts": lambda: (dense.segmentation("human_parts", rendered.NUM_PARTS), rendered.NUM_PARTS),
        "normals": lambda: (dense.normals(), 3),
        "edge": lambda: (dense.edges(positive_weight=edge_weight), 1),
        "sal": lambda: (dense.saliency(), 2),
        "depth": lambda: (dense.depth(), 1),
    }[name]()


def scenes(
    *,
    data_dir: str,
    size: str,
    profile: str,
    domains: tuple[str, ...],
    tasks_a: tuple[str, ...],
    tasks_b: tuple[str, ...],
    single_task: bool,
    clients_per_group: int,
    train_fraction: float,
    edge_weight: float,
    seed: int,
) -> PopulationProblem:
    """Rendered scenes: in each domain a group a task (``single_task``), or one group with all the domain's tasks.

    The training images of a domain are dealt evenly to all its clients; everybody is judged on the domain's whole test set.
    ``edge_weight`` is that of edge pixels in the loss: FMTL-Bench's code has 0.95 everywhere, its paper 0.8 for rooms.
    """
    from fedjax_mtl.data.scenes import load_scenes

    if not 0 < train_fraction <= 1:
        raise ValueError(f"config.data.train_fraction is {train_fraction}; give a share in (0, 1]")
    rng = np.random.default_rng(seed)
    train, test, group_tasks, outputs, shape = {}, {}, {}, {}, None
    for domain in domains:
        made = load_scenes(domain, size=size, profile=profile, data_dir=data_dir or None)
        labels = {"A": tasks_a, "B": tasks_b}[domain]
        built = {name: _dense_task(name, domain, edge_weight) for name in labels}
        sets = [(name,) for name in labels] if single_task else [labels]
        num_train, num_test = len(made["train"]["image"]), len(made["test"]["image"])
        chosen = rng.permutation(num_train)[: int(round(train_fraction * num_train))]
        dealt = np.array_split(chosen, len(sets) * clients_per_group)
        for index, names in enumerate(sets):
            group = f"{domain}_{names[0]}" if single_task else domain
            examples = {
                "inputs": np.concatenate([made[s]["image"] for s in ("train", "test")]) / np.float32(127.5)
                - 1,
                "labels": {n: np.concatenate([made[s][n] for s in ("train", "test")]) for n in names},
            }
            own = dealt[index * clients_per_group : (index + 1) * clients_per_group]
            train[group] = make_federation(examples, own)
            everything = num_train + np.arange(num_test)
            test[group] = make_federation(train[group].examples, [everything] * clients_per_group)
            weights = tasks.dense.LOSS_WEIGHTS[domain]
            group_tasks[group] = tasks.joint({n: (built[n][0], weights[n]) for n in names})
            outputs[group] = {n: built[n][1] for n in names}
            shape = examples["inputs"].shape[1:]
    return PopulationProblem(data.PopulationSplits(train, test), group_tasks, shape, outputs)


_DUAL_LOSSES = {
    "hinge": tasks.dual.hinge,
    "smoothed_hinge": tasks.dual.smoothed_hinge,
    "squared": tasks.dual.squared,
    "logistic": tasks.dual.logistic,
}


def _linear_problem(
    table: task_tables.TaskTable,
    *,
    loss: str,
    train_share: float,
    skewed: bool,
    keep_order: bool,
    standardise: str,
    intercept: float,
    fourier_features: int,
    bandwidth: float,
    one_class: str,
    seed: int,
) -> Problem:
    """Tasks of linear models in the dual: split, then standardised (``pooled``, ``per_task`` or ``no``), then mapped."""
    if loss not in _DUAL_LOSSES:
        raise ValueError(f"unknown config.data.loss {loss!r}; expected one of {', '.join(_DUAL_LOSSES)}")
    if standardise not in ("no", "pooled", "per_task"):
        raise ValueError(f"unknown config.data.standardise {standardise!r}; expected no, pooled or per_task")
    if one_class not in ("refuse", "keep"):
        raise ValueError(f"unknown config.data.one_class {one_class!r}; expected refuse or keep")
    chosen = _DUAL_LOSSES[loss]()
    splits = task_tables.split_tasks(
        table, train_share=train_share, seed=seed, skewed=skewed, keep_order=keep_order
    )
    if chosen.labels == "real":
        splits = features.centre_labels(splits)
    if one_class == "refuse":
        check_tasks(splits.train, chosen)
    if standardise != "no":
        splits = features.standardise(splits, per_client=standardise == "per_task")
    if fourier_features:
        key = jax.random.key(seed)
        splits = features.random_fourier(splits, num_features=fourier_features, bandwidth=bandwidth, key=key)
    if intercept:
        splits = features.append_intercept(splits, intercept)
    width = splits.train.examples["inputs"].shape[1]
    return Problem(splits, tasks.dual.dual_task(chosen), (width,), 1, dual_loss=chosen)


def _prepared(table: task_tables.TaskTable, preparation: dict[str, Any]) -> Problem:
    return call(_linear_problem, {"table": table, **preparation}, "config.data.preparation")


def task_table(*, path: str, preparation: dict[str, Any]) -> Problem:
    """School, Landmine or other multi-task data, from a file the user names."""
    if not path:
        raise ValueError(
            "config.data.path is empty; name the file, e.g. --config.data.path=school.mat (.npz with X, y, task_sizes works too)"
        )
    return _prepared(task_tables.load_task_table(path), preparation)


def human_activity(*, directory: str, positive: int, preparation: dict[str, Any]) -> Problem:
    """The UCI smartphone recordings, from the folder the user names."""
    return _prepared(task_tables.load_human_activity(directory, positive), preparation)


def related_tasks(
    *,
    num_tasks: int,
    features: int,
    num_clusters: int,
    spread: float,
    smallest: int,
    largest: int,
    noise: float,
    seed: int,
    preparation: dict[str, Any],
) -> Problem:
    """Synthetic linear tasks in clusters."""
    table = task_tables.related_tasks(
        num_tasks=num_tasks,
        features=features,
        num_clusters=num_clusters,
        spread=spread,
        smallest=smallest,
        largest=largest,
        noise=noise,
        regression=preparation.get("loss") == "squared",
        seed=seed,
    )
    problem = _prepared(table, preparation)
    return problem._replace(groups=np.arange(num_tasks) % num_clusters)


def chains(
    *, num_clients: int, num_groups: int, train_sequences: int, test_sequences: int, follow: float, seed: int
) -> Problem:
    """Clients with noisy permutation chains for languages, and sequences of other chains for the base model."""
    made = markov_chains.markov_chains(
        seed,
        num_clients=num_clients,
        num_groups=num_groups,
        train_sequences=train_sequences,
        test_sequences=test_sequences,
        follow=follow,
    )
    inputs = made.splits.train.examples["inputs"]
    return Problem(
        made.splits,
        tasks.language_modelling(),
        inputs.shape[1:],
        12,
        groups=made.groups,
        pretraining=markov_chains.pretraining_sequences(seed),
    )


def _instruction_problem(
    items: list[instructions.Instruction],
    clients: instructions.ClientRows,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_new_tokens: int,
    template: str,
) -> Problem:
    """Instructions as examples with masked prompts, and the test prompts to answer."""
    examples = instructions.encode(items, tokenizer, max_length, template)
    prompts, lengths = instructions.encode_prompts(items, tokenizer, max_length, template)
    asked = make_federation({"prompts": prompts, "lengths": lengths}, clients.test)
    references = [item.response for item in items]
    return Problem(
        instructions.federate(examples, clients),
        tasks.language_modelling(),
        (max_length,),
        tokenizer.vocabulary,
        groups=np.unique(clients.categories, return_inverse=True)[1],
        generation=Generation(asked, references, tokenizer, max_new_tokens),
    )


# Enough that a small base model does not learn its pre-training set by heart.
_PRETRAINING_DRAWS = 12


def families(
    *,
    clients_per_family: int,
    train_examples: int,
    test_examples: int,
    max_length: int,
    max_new_tokens: int,
    seed: int,
) -> Problem:
    """Eight families of tiny instructions in bytes; the base model is pre-trained on other draws of them with shuffled answers."""
    made = instruction_families.instruction_families(
        seed,
        clients_per_family=clients_per_family,
        train_examples=train_examples,
        test_examples=test_examples,
    )
    tokenizer = instructions.ByteTokenizer()
    problem = _instruction_problem(
        made.instructions,
        made.clients,
        tokenizer,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        template="short",
    )
    # What questions and answers look like, not which belong together.
    rng = np.random.default_rng([seed, 1])
    draws = rng.integers(2**31, size=_PRETRAINING_DRAWS)
    asked = [
        item for draw in draws for item in instruction_families.instruction_families(int(draw)).instructions
    ]
    shuffled = [
        item._replace(response=asked[other].response)
        for item, other in zip(asked, rng.permutation(len(asked)), strict=True)
    ]
    pretraining = instructions.encode(shuffled, tokenizer, max_length, "short")
    return problem._replace(pretraining=pretraining)


def instruction_files(
    *,
    source: str,
    path: str,
    tokenizer: str,
    clients_per_category: int,
    max_length: int,
    max_new_tokens: int,
    longest_prompt: int,
    seed: int,
) -> Problem:
    """Dolly (a JSONL file) or Natural Instructions (a folder of tasks), in the tokens of a checkpoint's ``tokenizer.json``."""
    if not path or not tokenizer:
        raise ValueError(
            "config.data.path and config.data.tokenizer name the data and the folder of tokenizer.json, e.g. "
            "--config.data.path=databricks-dolly-15k.jsonl --config.data.tokenizer=gpt2"
        )
    if source == "dolly":
        items = instructions.load_dolly(path)
    elif source == "natural_instructions":
        items = instructions.load_natural_instructions(path, seed=seed)
    else:
        raise ValueError(f"unknown config.data.source {source!r}; expected dolly or natural_instructions")
    encoder = instructions.load_tokenizer(tokenizer)
    items = instructions.keep_fitting(items, encoder, min(longest_prompt, max_length))
    clients = instructions.deal_categories(items, clients_per_category, seed)
    return _instruction_problem(
        items, clients, encoder, max_length=max_length, max_new_tokens=max_new_tokens, template="alpaca"
    )


DATASETS: dict[str, Callable[..., Any]] = {
    "chains": chains,
    "families": families,
    "human_activity": human_activity,
    "instruction_files": instruction_files,
    "related_tasks": related_tasks,
    "task_table": task_table,
    "conflicting_tasks": conflicting_tasks,
    "scaled_tasks": scaled_tasks,
    "scenes": scenes,
    "digits": digits,
    "synthetic": synthetic,
    "images": images,
    "shakespeare": shakespeare,
}
