import pathlib
import subprocess
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import analysis  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)  # tiny tensors hate threads
analysis.DPI, analysis.LAYOUT = 50, None  # figures in a third of the time


def printed(code):
    """The number that `code` prints in a process of its own, where peak() is its memory so far."""
    measuring = """
import resource, sys
sys.path.insert(0, sys.argv[1])
def peak():  # in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != 'darwin')
"""
    return float(subprocess.run([sys.executable, '-c', measuring + code,
                                 pathlib.Path(train.__file__).parent],
                                capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder with mnist5k.npz, parsed once."""
    folder = tmp_path_factory.mktemp('data')
    data.load('mnist5k', folder)
    return folder


@pytest.fixture
def tiny(data_dir):
    """Flags of a run of a second: train.main([*tiny, ...])."""
    return ['--data-dir', str(data_dir), '--width', '1', '--n-train', '256', '--n-eval', '50',
            '--epochs', '4', '--step-size', '0.1', '--n-iter', '2', '--lr', '1e-3',
            '--eps-sched', 'linear']


@pytest.fixture(scope='session')
def runs(data_dir, tmp_path_factory):
    """Two finished runs, 'single' and the periodic 'triple', in a folder."""
    folder = tmp_path_factory.mktemp('ckpts')
    flags = ['--data-dir', str(data_dir), '--width', '2', '--n-train', '1000', '--n-eval', '100',
             '--step-size', '0.1', '--n-iter', '2', '--lr', '3e-3', '--eps', '0.1', '--epochs', '4',
             '--batch-size', '50']
    train.main([*flags, '--out', str(folder / 'single')])
    train.main([*flags, '--out', str(folder / 'triple'), '--periodic', '--eps-sched', 'linear'])
    return folder
