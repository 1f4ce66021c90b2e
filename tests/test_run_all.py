import argparse
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from unittest import mock

import pytest

import train

HERE = pathlib.Path(__file__).parents[1]
SCHEDS = 'constant', 'cosine', 'linear'


def run_all(*flags, folder=HERE, **environment):
    """The started process of run_all.sh; its stderr is in its stdout unless it lists."""
    environment = os.environ | {'PYTHON': sys.executable} | environment
    err = subprocess.PIPE if '--list' in flags else subprocess.STDOUT
    command = ['bash', str(folder / 'run_all.sh'), *flags]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=err, text=True)


def listed(*flags, **environment):
    """The jobs of --list as lists of commands [script, *flags], and the command of the report."""
    out, err = run_all('--list', *flags, **environment).communicate()
    jobs = [[shlex.split(line) for line in job.split(' && ')] for job in out.splitlines()]
    jobs = [[line[line.index(sys.executable) + 1 :] for line in job] for job in jobs]
    return jobs, shlex.split(err.splitlines()[-1].split(f'{sys.executable} ')[1])


def parsed(command):
    """The flags that the main of a script gets from the command [script, *flags]."""
    parse_args = argparse.ArgumentParser.parse_args
    stop = mock.patch('argparse.ArgumentParser.parse_args', lambda *a: sys.exit(parse_args(*a)))
    with stop, pytest.raises(SystemExit) as end:
        importlib.import_module(command[0].removesuffix('.py')).main(command[1:])
    return end.value.code


def settings(*flags, **environment):
    """The settings of all runs that are trained: of equal runs, and of no others, once."""
    configs, commands = {}, sum(listed(*flags, **environment)[0], [])
    for args in (parsed(command) for command in commands if command[0] == 'train.py'):
        config = vars(train.settings(args))
        assert configs.setdefault(args.out, config) == config
    assert len({str(config) for config in configs.values()}) == len(configs)
    return configs.values()


@pytest.mark.parametrize('size', ['paper', 'small', 'quick'])
def test_the_list_asks_the_scripts_once_for_what_they_know(size, tmp_path):
    (tmp_path / 'my images').mkdir()
    flags = [] if size == 'paper' else [f'--{size}']
    jobs, last = listed(*flags, DATA_DIR=str(tmp_path / 'my images'))
    measurements = []
    for job in jobs:
        trained = {command[2] for command in job if command[0] == 'train.py'}
        assert all(folder.startswith(f'ckpts/{size}/') for folder in trained)
        for command in (command for command in job if command[0] != 'train.py'):
            args = parsed(command)
            assert command[0] == 'theory.py' or args.data_dir == str(tmp_path / 'my images')
            assert trained >= {word for word in command if word.startswith('ckpts/')}  # no waiting
            measurements.append(' '.join(command))
    assert len(set(measurements)) == len(measurements)
    assert not [line for line in measurements if 'similarity' in line and '_eps0_' in line]
    scripts = {re.split(r' ckpts/| --ens', line)[0] for line in measurements}
    scripts = {script.removeprefix('landscape.py ') for script in scripts}
    assert scripts == {*'evaluate.py hessian.py theory.py similarity surface connect dead'.split()}
    assert parsed(last).folders == [f'ckpts/{size}']
    assert pathlib.Path(parsed(last).out) == pathlib.Path('results', *flags and [size])


def test_small_has_five_seeds_but_three_of_mnist_at_04_and_three_pairs():
    seeds = {}  # of each measurement, in the order of its jobs
    for command in (' '.join(c) for c in sum(listed('--small')[0], []) if c[0] != 'train.py'):
        cell = re.sub(r'_s\d+ ', '_s ', command)
        seeds[cell] = seeds.get(cell, '') + ''.join(re.findall(r'_s(\d) ', command))
    fixed = {'landscape.py connect': '012345', 'landscape.py surface': '0', 'theory.py': ''}
    for cell in seeds:
        usual = '012' if re.search('mnist_.*_eps0.4_', cell) else '01234'
        assert seeds[cell] == fixed.get(cell.split(' ckpts/')[0], usual)
    assert sum(cell.startswith('evaluate.py') for cell in seeds) == 2 * (19 + 3) + 12 + 34


def test_the_list_covers_the_papers_table_and_studies():
    cifar = [f'cifar10 --model {m}{p}' for m in ('vgg', 'resnet18') for p in ('', ' --periodic')]
    rows = [f'--dataset {t} --eps-sched {s}' for t in ('mnist', *cifar) for s in SCHEDS]
    paper = [train.config_of(f'{row} --seed {seed}'.split()) for row in rows for seed in range(3)]
    ours = [config | {'trace': None} for config in settings('table1')]
    assert len(paper) == len(ours) == 45 and all(config in paper for config in ours)
    runs = settings('fig2', SEEDS='0')
    eps = [('resnet18', n / 255) for n in (0, 2, 4, 8)] + [('lenet', n / 10) for n in range(5)]
    assert {(c['model'], c['eps']) for c in runs if c['trace'] == 2000} == {*eps}
    rates = {(c['lr'], c['eps_sched'], c['lr_warmup']) for c in settings('fig5')}
    scheds = [('constant', 0.5), *((sched, 0) for sched in SCHEDS)]
    lrs = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert rates == {(lr, *sched) for lr in lrs for sched in scheds}
    widths = {(c['width'], c['eps']) for c in settings('c24')}
    assert widths == {(width, eps) for width in (1, 2, 4, 16) for eps in (0, 0.4)}
    assert {c['eps'] for c in settings('c25')} == {0, 0.4, 8 / 255}
    for size, n in ('--small', 8), ('--quick', 4):
        assert all(c['step_size'] in (c['eps'] / n, 2.5 / 255) for c in settings(size))


def test_parts_seeds_and_shards_choose_the_jobs_and_a_typo_in_the_flags_none():
    whole = listed('--quick')[0]
    parts = 'theory', 'rate', 'width', 'connect', 'budget', 'standard', 'table1'
    assert listed('--quick', *parts)[0] == whole
    assert listed('fig1')[0] == [[['theory.py']]]
    assert {c['seed'] for c in settings('table1', SEEDS='7')} == {7}
    shards = [job for i in (1, 2, 3) for job in listed('--quick', '--shard', f'{i}/3')[0]]
    assert sorted(shards) == sorted(whole)
    out, err = run_all('--quick', '--list', '--', '--lrr', '1').communicate()
    assert not out and err.count('unrecognized arguments: --lrr') == 1


STUB = """#!/bin/sh
case "$*" in
    -c*importlib*) [ -z "$BARE" ] || [ "${0%.venv*}" != "$0" ]; exit ;;
    -c*cuda*) exit 1 ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
echo "$@" >> "$COMMANDS"
case "$*" in *"${BAD:-none}"*) echo it broke; exit 3 ;; esac
case "$*" in *"${HOLD:-none}"*) while [ -e hold ]; do sleep .05; done ;; esac
case $1 in train.py) result=$3/config.json ;; theory.py) result=evals/theory.json ;; *) exit ;; esac
mkdir -p "${result%/*}" && touch "$result"
"""


@pytest.fixture
def start(tmp_path):
    """Starts run_all.sh in `folder`, with a python that notes its `commands`, fails at those with
    BAD, and waits at those with HOLD while the file `hold` exists."""
    folder, log = tmp_path / 'my folder', tmp_path / 'my folder/commands'
    for name in 'hold', 'commands', 'code.py', 'lib/code.py', 'paper/code.py':
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for name in 'run_all.sh', 'requirements.txt':
        (folder / name).write_bytes((HERE / name).read_bytes())
    (folder / 'python3').write_text(STUB)
    (folder / 'python3').chmod(0o755)
    stub = {'PYTHON': str(folder / 'python3'), 'COMMANDS': str(log), 'JOBS': '1', 'SEEDS': '0'}

    def go(*flags, **environment):
        return run_all(*flags, folder=folder, **stub | environment)

    def commands(*words):
        return [line for line in log.read_text().splitlines() if all(w in line for w in words)]

    go.folder, go.commands = folder, commands
    return go


def test_a_failed_job_is_named_with_its_log_and_stops_no_other(start):
    process = start('--quick', BAD='lenet_linear_eps0.4_lr1e-3')
    out, _ = process.communicate()
    log = 'logs/quick/mnist5k_lenet_linear_eps0.4_lr1e-3_w4_s0_rate.log'
    assert process.returncode == 1 and out.endswith(f'\n{log}: it broke\n')
    assert (start.folder / log).read_text() == 'it broke\n' and start.commands('landscape.py dead')
    assert start.commands()[-1] == 'report.py ckpts/quick --out results/quick'
    assert start('--quick').wait() == 0  # and all is well


def test_killed_by_force_it_begins_no_further_job_and_resumes_when_run_again(start):
    process = start('--quick', 'table1', HOLD='cosine')
    while not start.commands('cosine'):
        time.sleep(0.05)
    process.kill()
    process.wait()
    (start.folder / 'hold').unlink()
    process.communicate()  # until what it left has ended, too
    assert not start.commands('linear')
    assert start('--quick', 'table1').wait() == 0 and start.commands('linear')


def test_a_job_is_run_again_only_if_its_command_its_files_or_the_code_have_changed(start):
    def jobs(*flags):
        before = len(start.commands())
        assert start('--quick', 'table1', 'theory', *flags).wait() == 0
        return sum(line.startswith(('train', 'theory')) for line in start.commands()[before:])

    assert [jobs(), jobs(), jobs('--', '--lr', '1'), jobs(), jobs()] == [5, 0, 4, 4, 0]
    config = next(start.folder.glob('ckpts/quick/*cosine*/config.json'))
    config.with_name('hessian.json').touch()  # by another part
    assert jobs() == 0
    for lost in config, start.folder / 'evals/theory.json':
        lost.unlink()
        assert jobs() == 1 and jobs() == 0
    next(start.folder.glob('logs/quick/*_table1.done')).write_text('')  # by a crash
    assert jobs() == 1 and jobs() == 0
    (start.folder / 'lib/code.py').write_text('pass')
    assert jobs() == 5


def test_jobs_run_side_by_side_and_so_do_two_runners(start):
    processes = [start('--quick', 'table1', HOLD='cosine', JOBS='2') for _ in range(2)]
    while not start.commands('train.py', 'linear_periodic'):  # while a job of each is held
        time.sleep(0.05)
    (start.folder / 'hold').unlink()
    assert [process.wait() for process in processes] == [0, 0]


def test_a_scheduler_can_run_the_list_and_flags_are_no_shell_code(start):
    lines, _ = start('--quick', '--list', '--', '--lr', '1; touch pwned #').communicate()
    xargs, stub = r"xargs -d '\n' -P 2 -I{} bash -c '{}'", os.environ | {'COMMANDS': 'commands'}
    subprocess.run(xargs, shell=True, input=lines, text=True, cwd=start.folder, env=stub)
    assert len(start.commands('.py')) == lines.count('.py') > 30
    assert not (start.folder / 'pwned').exists()


def test_only_what_trains_asks_for_a_gpu(start):
    assert '--cpu' in start('table1').communicate()[0] and not start.commands()
    assert start('fig1').wait() == 0 and not start.commands('train.py')
    assert start('table1', '--cpu').wait() == 0 and start.commands('train.py', '--device cpu')


@pytest.mark.parametrize('bad', ['none', 'ruff check', 'ruff format', 'pytest'])
def test_ruff_and_pytest_may_each_fail_the_tests(start, bad):
    assert (start('--test', BAD=bad).wait() == 0) == (bad == 'none')


def test_without_packages_two_workers_make_one_environment(start):
    processes = [start('--quick', 'fig1', BARE='1') for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert start.commands('-m pip install') and not (start.folder / '.venv.lock').exists()


FLAGS = 'fig7', '--shard', '--shard 0/2', '--shard 3/2', '-- --seed', '-- --out', '-- --data-dir'
ENVIRONMENT = 'SEEDS=0,1', 'DATA_DIR=/nowhere', 'PYTHON=/nowhere/python3'


@pytest.mark.parametrize('words', [*FLAGS, *ENVIRONMENT])
def test_what_cannot_be_done_is_said_before_the_first_job(start, words):
    flags = words.split() if words in FLAGS else []
    process = start('--quick', *flags, **dict([words.split('=')] if '=' in words else []))
    assert re.split('[ =]', words)[-1] in process.communicate()[0]
    assert process.returncode == 1 and not start.commands()
