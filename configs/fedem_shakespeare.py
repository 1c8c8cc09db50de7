"""FedEM on Shakespeare: one client a speaking role, next-character prediction, 200 rounds.

    python -m experiments.run --config=configs/fedem_shakespeare.py \\
        --workdir=runs/fedem_shakespeare --config.data.path=100.txt

``path`` names Project Gutenberg's complete works in the layout of its 1994 edition (the file that
LEAF uses). Not run by us at this size. The paper's figures: section ``fedem_shakespeare`` of
``configs/README.md``.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    data, model = {"name": "shakespeare"}, {"name": "lstm"}
    if options.quick:
        data |= {"stride": 20, "max_windows": 20}
        model |= {"hidden": 16}
    return common.experiment(
        data=data,
        model=model,
        algorithm=common.baselines(learning_rate=0.1, fedem=0.316, decentralized_fedem=0.316),
        client=common.fedem_training(0.1),
        num_rounds=2 if options.quick else 200,
        eval_every=1 if options.quick else 10,
        seeds=(0,) if options.quick else (0, 1, 2),
        evaluation_batch_size=64,
    )
