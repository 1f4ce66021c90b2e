"""Jobs of several processes, forked as torchrun would start them, against the same jobs of one."""

import math
import os
import pathlib
import runpy
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from conftest import printed
from test_evaluate import short  # noqa: F401
from test_train import in_double  # noqa: F401

import evaluate
import hessian
import train
from lib import cli, distributed, record

FLAGS = '--width 2 --n-train 100 --n-eval 50 --batch-size 33 --epochs 4 --n-iter 2 --eps 0.1'
FLAGS += ' --step-size eps/2 --lr 0.02 --trace 2 --optimizer sgd --eps-sched linear'  # 33 33 33 1


def job(n, call):
    """The exit codes of n processes that each call a script's main."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(n):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(n), 'MASTER_PORT': port}
            os.environ['MASTER_ADDR'] = '127.0.0.1'
            distributed.RANK, distributed.SIZE = rank, n
            cli.run(call)
            code = 0
        except SystemExit as end:
            pathlib.Path(f'end{rank}').write_text(str(end))
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def parameters(folder):
    return list(record.load(f'{folder}/period1.pt').values())


def test_processes_learn_together_what_one_learns_and_others_may_go_on(in_double):  # noqa: F811
    argv = [*FLAGS.split(), '--out']
    train.main([*argv, 'one'])
    assert job(2, lambda: train.main([*argv, 'many', '--minutes', '0'])) == [0, 0]
    assert len(record.load('many/log.jsonl')) == 1
    assert job(3, lambda: train.main([*argv, 'many'])) == [0, 0, 0]  # of 1 image two have none
    for one, many in zip(parameters('one'), parameters('many')):
        assert torch.allclose(one, many, atol=1e-10)
    cost = {'seconds': 0, 'gib': 0, 'digest': 0}  # and what differs by rounding
    for name in 'log', 'trace':
        for one, many in zip(*(record.load(f'{run}/{name}.jsonl') for run in ('one', 'many'))):
            assert one | cost == pytest.approx(many | cost, rel=1e-9)
    configs = [record.load_config(run) | {'provenance': 0} for run in ('one', 'many')]
    assert configs[0] == configs[1]


def test_verdicts_and_eigenvalues_of_a_job_are_those_of_one_process(runs, in_double, short):  # noqa: F811
    def attack_all(run):
        evaluate.main([run, '--n-examples', '20'])
        evaluate.main([run, '--n-examples', '20', '--standard'])
        hessian.main([run, '--n-examples', '20', '--k', '1', '--trace', '1', '--draws', '1'])

    found = []
    for n in 1, 2, 3:
        shutil.copytree(runs / 'single', run := f'by{n}')
        assert job(n, lambda run=run: attack_all(run)) == [0] * n
        names = 'evaluate', 'evaluate_standard'
        columns = [record.load(f'{run}/{name}_n20.npz') for name in names]
        result = record.load(f'{run}/hessian_n20.json')
        numbers = [*result['eigen']['values'], *result['traces'], *result['random_losses']]
        found.append((columns, numbers))
        for one, many in zip(found[0][0], columns):
            assert all(np.array_equal(one[key], many[key]) for key in one) and len(one) > 5
        assert numbers == pytest.approx(found[0][1], rel=1e-8)


def test_if_one_process_is_killed_the_others_say_so_and_the_job_resumes(tiny):
    argv, update = [*tiny, '--n-train', '64', '--out', 'run'], train.format_epoch

    def killed(row, c):
        if row['epoch'] == 2 and distributed.RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(row, c)

    def main():
        train.format_epoch = killed
        return train.main(argv)

    codes = job(2, main)
    assert codes == [1, -signal.SIGKILL]
    assert 'another process of this job has ended' in pathlib.Path('end0').read_text()
    assert job(2, lambda: train.main(argv)) == [0, 0] and record.finished('run')


def test_if_the_loss_of_one_is_not_finite_the_run_of_all_has_diverged(tiny):
    def main():
        if distributed.RANK == 1:
            of = train.training_loss
            train.training_loss = lambda *args: (math.nan * of(*args)[0], of(*args)[1])
        return train.main([*tiny, '--out', 'run'])

    assert job(2, main) == [0, 0]
    assert pathlib.Path('run/diverged.json').exists()


def test_batch_norm_statistics_of_parts_are_those_of_a_run_that_is_resumed(tiny):
    flags = '--model resnet18 --width 2 --n-train 16 --batch-size 8 --n-eval 0 --n-iter 1'
    argv = [*tiny, *flags.split(), '--out']
    assert job(2, lambda: train.main([*argv, 'whole'])) == [0, 0]
    for _ in range(4):
        assert job(2, lambda: train.main([*argv, 'parts', '--minutes', '0'])) == [0, 0]
    assert all(map(torch.equal, parameters('whole'), parameters('parts')))


def test_processes_that_find_different_files_do_not_go_on(runs):
    argv = [str(runs / name) for name in ('single', 'triple')]
    codes = job(2, lambda: evaluate.main(argv[:: 1 - 2 * distributed.RANK]))
    assert codes == [1, 1]
    assert 'have found different files' in pathlib.Path('end0').read_text()


@pytest.mark.parametrize('variable, rank', [('WORLD_SIZE', 3), ('SOMETHING_ELSE', 0)])
def test_a_rank_counts_only_with_a_world_size(monkeypatch, variable, rank):
    monkeypatch.setenv('RANK', '3')
    monkeypatch.setenv(variable, '4')
    assert runpy.run_path(distributed.__file__)['RANK'] == rank


def test_no_thread_of_a_job_outlives_it():  # at the end of the interpreter one may abort it
    n_threads = """
import os, pathlib, torch
from lib import distributed
os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '0', 'RANK': '0', 'WORLD_SIZE': '1'}
distributed.SIZE = 2  # so that there is a group, of this process alone
with distributed.joined():
    torch.optim.SGD([torch.ones(1)])
print(sum('gloo' in p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')))
"""
    assert printed(n_threads) == 0
