"""The plan for hosts whose network is measured."""

import json

import pytest

from tests import cluster
from tests.launch import BIN, ROOT
from tests.measure_network import MODEL

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(cluster.why_not("tc") is not None, reason=str(cluster.why_not("tc"))),
]


def test_a_plan_for_two_hosts_measures_what_is_between_them(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    with cluster.build_cluster(tmp_path / "hosts") as hosts:
        for name in hosts.names:
            hosts.limit(name, "100mbit")
        plan = [str(BIN / "dstrain"), "plan", "--config_name", str(tmp_path / "model.json"), "--block_size", "128"]
        plan += ["--hostfile", str(hosts.hostfile()), "--precision", "fp32", "--json"]
        plan += ["--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), "--set", "bf16.enabled=false"]
        plan += ["--set", "train_batch_size=4"]
        done = hosts.run("node1", plan, env={"OMP_NUM_THREADS": "1"}, timeout_s=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["hosts"], found["devices_per_host"]) == (2, 1)
    bucket = 2**18 / 0.25  # of `limit`: passes at once, in a measurement of a quarter of a second or more
    assert 5e6 < found["network"]["network"] < 12.5e6 + bucket
    sent = 1.5 * 4 * found["num_parameters"]
    assert found["prediction"]["step_time_s"] > sent / (12.5e6 + bucket)
