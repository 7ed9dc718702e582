"""An update whose rows are spread over several devices is the update of one device."""

import dataclasses
import json

import pytest

from tests.helpers.devices import on_eight_devices

TRIED = {"ppo": (2, 4, 8), "grpo": (8,), "reinforce_pp": (8,), "dpo": (8,)}


@pytest.fixture(scope="module")
def differences():
    """Largest relative difference of each algorithm on each number of devices, of state and of metrics."""
    return on_eight_devices("from tests.algorithms.test_devices import main; main()")


@pytest.mark.parametrize(("name", "devices"), [(name, each) for name in TRIED for each in TRIED[name]])
def test_devices_do_not_matter(differences, name, devices):
    found = differences[f"{name} {devices}"]
    assert found["spread"] == devices
    assert found["moved"] > 1e-3
    assert found["state"] < 1e-5 and found["metrics"] < 1e-5


def main():
    import jax
    import numpy as np

    from tests.algorithms.bigram import (
        arrays,
        compiled,
        config_of,
        hparams_of,
        offline_batch,
        rollouts_of,
        state_of,
        tasks,
    )  # fmt: skip

    def largest(tree, expected):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
        return max(float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in pairs)

    out = {}
    for name in TRIED:
        if name == "dpo":
            batch, extra, config = offline_batch("dpo"), (), tasks()["dpo"].config()
            batch = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), batch)
            one, hparams = compiled(name, "step", config), tasks()[name].hparams(learning_rate=0.5)
        else:
            groups = {} if name == "ppo" else {"group_size": 4}
            config = config_of(name, epochs=2, minibatches=2, reward_normalization="running", **groups)
            batch, extra = rollouts_of(31, rows=8), (jax.random.key(3),)
            one, hparams = compiled(name, "update", config), hparams_of(name, target_kl=None)
        for devices in (1, *TRIED[name]):
            kinds = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((devices,), ("rows",), axis_types=kinds, devices=jax.devices()[:devices])
            over_rows, everywhere = (
                jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("rows",), ())
            )
            spread = jax.device_put(batch, over_rows)
            rest = jax.device_put((arrays(hparams), *extra), everywhere)
            state, metrics = jax.device_get(one(jax.device_put(state_of(), everywhere), spread, *rest))
            if devices == 1:
                expected = state, metrics
            out[f"{name} {devices}"] = {
                "spread": len({shard.device for shard in spread.mask_t.addressable_shards}),
                "state": largest(
                    dataclasses.replace(state, frozen=None), dataclasses.replace(expected[0], frozen=None)
                ),
                "metrics": largest(metrics, expected[1]),
                "moved": largest(state.trainable, jax.device_get(state_of().trainable)),
            }
    print(json.dumps(out))
