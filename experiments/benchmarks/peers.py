"""FedAvg rounds written with other tools, for the speed benchmark to compare with.

Every peer runs the same round on the same `Workload`: each client starts from the global model,
takes one epoch of minibatch SGD over its own samples in a fresh random order, and the new global
model is the average of the clients' models weighted by their sample counts.

Stock peers, what a user of the tool runs:

- `fedjax`: google/fedjax (PyPI `fedjax`) with its own `fedjax.algorithms.fed_avg`, the jit backend
  of `for_each_client`, which dispatches one compiled step per client and batch, a haiku model, and
  one `ClientDataset` per client. Like its client samplers, every round splits new client keys.
- `torch_loop`: the plain PyTorch loop over clients and batches: load the global state, then
  `torch.optim.SGD` with zero_grad, backward and step. The tensors are preloaded on the device.
- `torch_vmap`: PyTorch with the clients' parameters stacked, `torch.func.vmap` over the gradient
  of a functional call, and one batched step, `value - rate * gradient`, for many clients at a time.

Tuned peers, what the tool allows with more care:

- `torch_loop_tuned`: the same loop with `torch.autograd.grad`, fused updates of all parameters in
  place of an optimizer, and channels-last convolutions.
- `torch_vmap_tuned`: the same with the product and the difference of the step fused in one call.

The rounds cost the same only if the batch size divides the sample count: of a last, partial batch
the PyTorch peers take the samples there are, while fedjax fills it up. The initial weights are each
tool's own. The PyTorch peers use the first GPU if PyTorch sees one; the number of CPU threads is
left to the caller's settings. This module itself needs only numpy; a peer imports its packages when
it is built.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

RoundFn = Callable[[], None]

# Clients in one batched step of `torch.func.vmap` on a CPU; all of them for other models.
# Stacked convolutions run as grouped ones, which gain nothing there from a longer stack and need
# memory in proportion.
_CPU_VMAP_CHUNK = {"cnn": 2}


class Workload(NamedTuple):
    """One benchmark case: the data of all clients and how they train.

    Attributes:
        name: The model, "cnn", "mlp" or "linear".
        inputs: float32, [num_clients, samples, 28, 28, 1] for the cnn, else
            [num_clients, samples, 60].
        labels: int32 class numbers, [num_clients, samples].
        num_classes: Number of classes.
        cohort: Clients per round; equal to num_clients, so all take part in every round.
        batch_size: Samples per SGD step.
        learning_rate: Step size of the clients' plain SGD.
    """

    name: str
    inputs: np.ndarray
    labels: np.ndarray
    num_classes: int
    cohort: int
    batch_size: int
    learning_rate: float


def build_fedjax(workload: Workload) -> RoundFn:
    """Prepares the stock `fedjax` peer; the returned function runs one round."""
    import fedjax
    import jax
    from fedjax.algorithms import fed_avg

    # fedjax 0.0.17 calls jax.tree_map, which newer versions of jax have dropped.
    vars(jax).setdefault("tree_map", jax.tree_util.tree_map)

    model = _fedjax_model(workload)
    datasets = [
        fedjax.ClientDataset({"x": inputs, "y": labels})
        for inputs, labels in zip(workload.inputs, workload.labels, strict=True)
    ]
    with fedjax.for_each_client_backend("jit"):
        algorithm = fed_avg.federated_averaging(
            grad_fn=fedjax.model_grad(model),
            client_optimizer=fedjax.optimizers.sgd(workload.learning_rate),
            server_optimizer=fedjax.optimizers.sgd(1.0),
            client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
                batch_size=workload.batch_size, num_epochs=1
            ),
        )
    init_key, round_key = jax.random.split(jax.random.PRNGKey(0))
    server_state = algorithm.init(model.init(init_key))

    def run_round() -> None:
        nonlocal round_key, server_state
        round_key, clients_key = jax.random.split(round_key)
        client_keys = jax.random.split(clients_key, len(datasets))
        clients = [
            (number, dataset, key)
            for number, (dataset, key) in enumerate(zip(datasets, client_keys, strict=True))
        ]
        server_state, _ = algorithm.apply(server_state, clients)
        jax.block_until_ready(server_state.params)

    return run_round


def build_torch_loop(workload: Workload) -> RoundFn:
    """Prepares the stock `torch_loop` peer; the returned function runs one round."""
    import torch
    import torch.nn.functional as F

    inputs, labels = _torch_data(workload)
    model = _torch_model(workload).to(inputs.device)
    global_state = {name: value.clone() for name, value in model.state_dict().items()}
    weights = _client_weights(workload)

    def train_client(client_inputs: Any, client_labels: Any) -> None:
        model.load_state_dict(global_state)
        optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate)
        for batch_inputs, batch_labels in _client_batches(
            client_inputs, client_labels, workload.batch_size
        ):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch_inputs), batch_labels)
            loss.backward()
            optimizer.step()

    def run_round() -> None:
        nonlocal global_state
        averages = {name: torch.zeros_like(value) for name, value in global_state.items()}
        for client_inputs, client_labels, weight in zip(inputs, labels, weights, strict=True):
            train_client(client_inputs, client_labels)
            for name, value in model.state_dict().items():
                averages[name] += weight * value
        global_state = averages
        _torch_wait(inputs.device)

    return run_round


def build_torch_loop_tuned(workload: Workload) -> RoundFn:
    """Prepares the tuned `torch_loop_tuned` peer; the returned function runs one round."""
    import torch

    inputs, labels = _torch_data(workload)
    # The channels-last form is the quicker one for the convolutions, and touches nothing else.
    model = _torch_model(workload).to(inputs.device, memory_format=torch.channels_last)
    params = list(model.parameters())
    global_params = [param.detach().clone() for param in params]
    weights = _client_weights(workload)

    def train_client(client_inputs: Any, client_labels: Any) -> None:
        for batch_inputs, batch_labels in _client_batches(
            client_inputs, client_labels, workload.batch_size
        ):
            loss = torch.nn.functional.cross_entropy(model(batch_inputs), batch_labels)
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                torch._foreach_add_(params, grads, alpha=-workload.learning_rate)

    def run_round() -> None:
        averages = [torch.zeros_like(param) for param in global_params]
        for client_inputs, client_labels, weight in zip(inputs, labels, weights, strict=True):
            with torch.no_grad():
                torch._foreach_copy_(params, global_params)
            train_client(client_inputs, client_labels)
            with torch.no_grad():
                torch._foreach_add_(averages, params, alpha=weight)
        torch._foreach_copy_(global_params, averages)
        _torch_wait(inputs.device)

    return run_round


def build_torch_vmap(workload: Workload) -> RoundFn:
    """Prepares the stock `torch_vmap` peer; the returned function runs one round."""
    return _build_vmap(workload, lambda value, grad, rate: value - rate * grad)


def build_torch_vmap_tuned(workload: Workload) -> RoundFn:
    """Prepares the tuned `torch_vmap_tuned` peer; the returned function runs one round."""
    import torch

    return _build_vmap(workload, lambda value, grad, rate: torch.add(value, grad, alpha=-rate))


def _build_vmap(workload: Workload, descend: Callable[[Any, Any, float], Any]) -> RoundFn:
    """A round of stacked clients, each step `descend(value, gradient, rate)` of every parameter."""
    import torch

    inputs, labels = _torch_data(workload)
    model = _torch_model(workload).to(inputs.device)
    global_params = {name: param.detach() for name, param in model.named_parameters()}
    weights = torch.tensor(_client_weights(workload), device=inputs.device)
    chunk = workload.cohort
    if inputs.device.type == "cpu":
        chunk = _CPU_VMAP_CHUNK.get(workload.name, chunk)
    chunks = list(zip(inputs.split(chunk), labels.split(chunk), weights.split(chunk), strict=True))

    def loss(params, batch_inputs, batch_labels):
        logits = torch.func.functional_call(model, params, (batch_inputs,))
        return torch.nn.functional.cross_entropy(logits, batch_labels)

    gradients = torch.func.vmap(torch.func.grad(loss))

    def train_clients(chunk_inputs: Any, chunk_labels: Any) -> dict[str, Any]:
        count = len(chunk_labels)
        params = {name: value.expand(count, *value.shape) for name, value in global_params.items()}
        for batch in _shuffled_batches(chunk_inputs, chunk_labels, workload.batch_size):
            grads = gradients(params, *batch)
            params = {
                name: descend(value, grads[name], workload.learning_rate)
                for name, value in params.items()
            }
        return params

    @torch.no_grad()
    def run_round() -> None:
        nonlocal global_params
        averages = {name: torch.zeros_like(value) for name, value in global_params.items()}
        for chunk_inputs, chunk_labels, chunk_weights in chunks:
            params = train_clients(chunk_inputs, chunk_labels)
            for name, average in averages.items():
                average += torch.tensordot(chunk_weights, params[name], dims=1)
        global_params = averages
        _torch_wait(inputs.device)

    return run_round


def _fedjax_model(workload: Workload) -> Any:
    """The workload's model as a `fedjax.Model`, made from a haiku function."""
    import fedjax
    import haiku as hk
    import jax

    def layers() -> list[Callable[..., Any]]:
        if workload.name == "cnn":
            return [
                hk.Conv2D(32, 3, padding="VALID"),
                jax.nn.relu,
                hk.Conv2D(64, 3, padding="VALID"),
                jax.nn.relu,
                hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
                hk.Flatten(),
                hk.Linear(128),
                jax.nn.relu,
                hk.Linear(workload.num_classes),
            ]
        if workload.name == "mlp":
            return [hk.Linear(64), jax.nn.relu, hk.Linear(workload.num_classes)]
        return [hk.Linear(workload.num_classes)]

    return fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(lambda batch: hk.Sequential(layers())(batch["x"])),
        sample_batch={"x": workload.inputs[0, :1], "y": workload.labels[0, :1]},
        train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(
            batch["y"], logits
        ),
    )


def _torch_model(workload: Workload) -> Any:
    """The workload's model as a `torch.nn.Sequential`."""
    from torch import nn

    if workload.name == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 12 * 12, 128),
            nn.ReLU(),
            nn.Linear(128, workload.num_classes),
        )
    if workload.name == "mlp":
        return nn.Sequential(nn.Linear(60, 64), nn.ReLU(), nn.Linear(64, workload.num_classes))
    return nn.Sequential(nn.Linear(60, workload.num_classes))


def _torch_data(workload: Workload) -> tuple[Any, Any]:
    """The inputs (images with the channel before the height) and int64 labels, on the device."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = torch.tensor(workload.inputs, device=device)
    if workload.name == "cnn":
        inputs = inputs.permute(0, 1, 4, 2, 3).contiguous()
    return inputs, torch.tensor(workload.labels, device=device, dtype=torch.int64)


def _client_batches(inputs: Any, labels: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """One epoch of one client's batches [batch_size, ...], in a random order."""
    import torch

    order = torch.randperm(len(labels), device=labels.device)
    return zip(inputs[order].split(batch_size), labels[order].split(batch_size), strict=True)


def _shuffled_batches(inputs: Any, labels: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    """One epoch of batches [clients, batch_size, ...], each client in a random order of its own."""
    import torch

    clients, samples = labels.shape
    order = torch.rand(clients, samples, device=labels.device).argsort(dim=1)
    rows = torch.arange(clients, device=labels.device)[:, None]
    return zip(
        inputs[rows, order].split(batch_size, dim=1),
        labels[rows, order].split(batch_size, dim=1),
        strict=True,
    )


def _torch_wait(device: Any) -> None:
    """Blocks until the device has finished what was sent to it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _client_weights(workload: Workload) -> list[float]:
    """Each client's share of all samples."""
    counts = np.full(workload.cohort, workload.labels.shape[1], np.float64)
    return (counts / counts.sum()).tolist()


PEERS: dict[str, Callable[[Workload], RoundFn]] = {
    "fedjax": build_fedjax,
    "torch_loop": build_torch_loop,
    "torch_loop_tuned": build_torch_loop_tuned,
    "torch_vmap": build_torch_vmap,
    "torch_vmap_tuned": build_torch_vmap_tuned,
}
