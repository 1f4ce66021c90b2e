import pathlib
import subprocess
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import train  # noqa: E402

torch.set_num_threads(1)  # tiny tensors hate threads


def printed(code):
    """The number that `code` prints in a process of its own, where peak() is its memory so far."""
    measuring = """
import re, sys
sys.path.insert(0, sys.argv[1])
def peak():  # in bytes; getrusage's would be that of the process which started this one
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
"""
    command = [sys.executable, '-c', measuring + code, pathlib.Path(train.__file__).parent]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny():
    """Flags of a run of a second: train.main([*tiny, ...])."""
    flags = '--width 1 --n-train 256 --n-eval 50 --epochs 4 --step-size 0.1 --n-iter 2 --lr 1e-3'
    return [*flags.split(), '--eps-sched', 'linear']


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """Two finished runs, 'single' and the periodic 'triple', in a folder."""
    folder = tmp_path_factory.mktemp('ckpts')
    flags = '--width 2 --n-train 1000 --n-eval 100 --step-size 0.1 --n-iter 2 --lr 3e-3 --eps 0.1'
    flags = [*flags.split(), '--epochs', '4', '--batch-size', '50']
    train.main([*flags, '--out', str(folder / 'single')])
    train.main([*flags, '--out', str(folder / 'triple'), '--periodic', '--eps-sched', 'linear'])
    return folder
