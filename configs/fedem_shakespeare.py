"""FedEM on Shakespeare: one client a speaking role, next-character prediction with a two-layer LSTM, 200 rounds.

    python -m experiments.run --config=configs/fedem_shakespeare.py --workdir=runs/fedem_shakespeare --config.data.path=100.txt

``path`` names Project Gutenberg's complete works in the layout of its 1994 edition (the file that LEAF uses). Published: FedEM 46.7 / bottom decile 43.0, FedAvg 46.7 / 42.8,
local 32.0 / 16.6. The paper takes every window of 80 characters (``stride`` 1). Not run by us at this size.
"""

from configs import common


def get_config(variant: str | None = None):
    options = common.parse_variant(variant, quick=False)
    data = {
        "name": "shakespeare",
        "path": "",
        "stride": 1,
        "max_windows": 0,  # 0: all
        "unseen_fraction": 0.2,
        "seed": 1234,
    }
    model = {"name": "lstm", "embedding": 8, "hidden": 256, "layers": 2}
    if options.quick:
        data |= {"stride": 20, "max_windows": 20}
        model |= {"hidden": 16}
    return common.experiment(
        data=data,
        model=model,
        algorithm=common.baselines(default=0.1, fedem=0.316, decentralized_fedem=0.316),
        client=common.fedem_training(),
        num_rounds=2 if options.quick else 200,
        eval_every=1 if options.quick else 10,
        seeds=(0,) if options.quick else (0, 1, 2),
        evaluation_batch_size=64,
    )
