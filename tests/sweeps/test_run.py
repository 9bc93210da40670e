"""What a trial takes of a cluster. The sweep itself is run by tests/system/test_sweep.py."""

from sweeps.run import TrialResources


def test_num_devices_counts_gpus_or_the_cpus_of_all_workers():
    assert TrialResources(use_gpu=True, cpus_per_worker=7, num_workers=3).num_devices == 3
    assert TrialResources(use_gpu=False, cpus_per_worker=7, num_workers=3).num_devices == 21
