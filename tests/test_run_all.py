import os
import pathlib
import subprocess
import sys

import pytest

import hessian
import landscape
import train

HERE = pathlib.Path(__file__).parents[1]


def run_all(*flags, **environment):
    return subprocess.run(['bash', str(HERE / 'run_all.sh'), *flags], env=os.environ | environment,
                          capture_output=True, text=True)


def test_a_missing_python_is_a_clear_error():
    done = run_all('--quick', PYTHON='/nowhere/python3')
    assert done.returncode == 1 and '/nowhere/python3 is not installed' in done.stderr


def test_a_python_that_is_too_old_is_a_clear_error(tmp_path):
    old = tmp_path / 'python3'
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.20\n[ -z "$2" ]\n')
    old.chmod(0o755)
    done = run_all('--test', PYTHON=str(old))
    assert done.returncode == 1 and 'Python 3.8.20 is too old' in done.stderr
    assert '3.10' in done.stderr


def test_a_python_that_does_not_run_is_a_clear_error(tmp_path):
    (tmp_path / 'python3').write_text('#!/bin/sh\nexit 127\n')
    (tmp_path / 'python3').chmod(0o755)
    done = run_all('--test', PYTHON=str(tmp_path / 'python3'))
    assert done.returncode == 1 and 'python3 does not run' in done.stderr


def test_an_unknown_word_is_named_with_the_usage():
    done = run_all('--fast')
    assert done.returncode == 1 and "'--fast'" in done.stderr and '--quick' in done.stdout


def test_the_full_table_is_not_begun_without_a_gpu_unasked():
    done = run_all(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 1 and '--quick' in done.stderr and '--cpu' in done.stderr


@pytest.mark.parametrize('seeds, runs, curves', [('0 1', 10 + 4 + 8, 2), ('3', 5 + 4 + 4, 0)])
def test_the_landscape_asks_the_scripts_only_for_what_they_know(tmp_path, seeds, runs, curves):
    stub = tmp_path / 'python3'
    stub.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "COMMAND $@"\n')
    stub.chmod(0o755)
    done = run_all('--landscape', PYTHON=str(stub), SEEDS=seeds, DATA_DIR='images')
    assert done.returncode == 0, done.stderr
    commands = [line.split()[1:] for line in done.stdout.splitlines() if line[:7] == 'COMMAND']
    for script, *flags in commands[:-1]:
        parse = {'train.py': train, 'hessian.py': hessian, 'landscape.py': landscape}[script].parse
        assert parse(flags).data_dir == 'images'
        if script == 'train.py':
            train.settings(train.parse(flags))
    assert [command[0] for command in commands].count('train.py') == runs
    assert [command[1] for command in commands].count('connect') == curves
    assert commands[-1][0] == 'report.py' and commands[-1][-1] == 'results/landscape'
