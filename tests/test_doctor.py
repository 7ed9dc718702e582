"""What `rapidfire doctor` says."""

import json

import jax
import pytest
from typer.testing import CliRunner

from pallas_kernels import hopper
from pallas_kernels.catalogue import CATALOGUE
from rapidfire_jax.cli import app
from rapidfire_jax.doctor import examine


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_json_names_every_operation_and_the_reason():
    found = json.loads(run("--json").stdout)
    assert {row["operation"] for row in found["kernels"]} == CATALOGUE.keys()
    assert found["devices"][0]["platform"] == "cpu" and "'cpu'" in found["against_kernels"][0]
    for row in found["kernels"]:
        assert row["implementation"] != "mosaic_gpu"
        assert found["against_kernels"][0] in row["against"]["mosaic_gpu"]


def test_tables_say_a_common_reason_once():
    out = run()
    assert out.exit_code == 0
    assert " ".join(out.stdout.split()).count("need a Hopper GPU") == 1
    assert all(name in out.stdout for name in CATALOGUE)


@pytest.mark.parametrize(("model", "refused"), [("8b", set()), ("135m", {"rms_norm"})])
def test_on_an_h100_kernels_run_unless_the_shape_forbids_it(model, refused):
    with jax.sharding.use_abstract_mesh(hopper.abstract_mesh()):
        found = examine(model)
    assert not found["against_kernels"]
    against = {row["operation"]: row["against"] for row in found["kernels"] if row["implementation"] != "mosaic_gpu"}
    assert against.keys() == refused
    assert all(reasons["mosaic_gpu"] for reasons in against.values())


def test_an_unknown_size_is_answered_with_those_that_are_known():
    out = run("--model", "9b")
    assert out.exit_code == 2 and "accepted: 135m, 1b, 8b, 70b" in out.output
