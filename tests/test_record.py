import io
import os
import pathlib
import shutil
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch

import data
import evaluate
import hessian
import models
import train
from lib import cli, record

CONTENTS = {
    'a.json': {'eps': 0.4, 'periods': [2, 1]},
    'a.npz': {'robust': np.arange(50) % 2 == 0},
    'a.pt': {'weight': torch.arange(60.0).view(3, 20), 'bias': torch.ones(2)},
}


def equal(one, other):
    return str(one) == str(other)  # arrays of a few numbers are printed whole


@pytest.mark.parametrize('name', CONTENTS)
def test_a_file_cut_anywhere_is_one_clear_error_that_names_it(name, tmp_path):
    record.save(name, CONTENTS[name])
    whole = (tmp_path / name).read_bytes()
    assert equal(record.load(name), CONTENTS[name])
    for length in {*range(0, len(whole), len(whole) // 12 + 1), len(whole) - 1}:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f'^{name} (cannot be read|is refused): [^\n]+$'):
            record.load(name)


def test_a_flipped_bit_of_a_checkpoint_is_seen_or_changes_nothing(tmp_path):
    record.save('a.pt', CONTENTS['a.pt'])
    whole = (tmp_path / 'a.pt').read_bytes()
    seen = 0
    for position in range(0, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (tmp_path / 'a.pt').write_bytes(flipped)
        try:
            assert equal(record.load('a.pt'), CONTENTS['a.pt'])  # it was of the padding, or a date
        except ValueError as error:
            seen += 'a.pt' in str(error)
    assert seen > 5


class Evil:
    def __reduce__(self):
        return os.system, ('touch owned',)


def test_a_checkpoint_runs_no_code():
    torch.save({'model': Evil()}, 'evil.pt')
    with pytest.raises(ValueError, match='evil.pt is refused'):
        record.load('evil.pt')
    assert not pathlib.Path('owned').exists()


def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / 'log.jsonl').write_text('old')
    monkeypatch.setattr(os, 'fsync', mock.Mock(side_effect=OSError('disk full')))
    with pytest.raises(OSError, match='log.jsonl could not be written .*disk full'):
        record.save('log.jsonl', [])
    assert (tmp_path / 'log.jsonl').read_text() == 'old'


def test_two_processes_never_write_into_one_run(tiny, tmp_path):
    os.mkfifo('said')
    with record.lock('run'):
        if not (child := os.fork()):
            try:
                sys.stdout = open('said', 'w', buffering=1)
                train.main([*tiny, '--out', 'run'])
            finally:
                os._exit(0)
        said = open('said')
        assert any('run is in use by another process' in line for line in said)
        time.sleep(0.2)  # in which a process that only says so would write
        assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']
    os.waitpid(child, 0)
    assert record.finished('run')


@pytest.mark.parametrize('name', models.MODELS)
def test_a_released_checkpoint_is_recognised_by_its_parameters(name):
    dataset = 'mnist' if name == 'lenet' else 'cifar10'
    model = models.build(name, data.DATASETS[dataset], models.MODELS[name].default_width)
    record.save('released.ckpt.pt', model.state_dict())
    found, of = record.load_model('released.ckpt.pt')
    assert of['dataset'] == dataset and equal(found, model)
    assert all(map(torch.equal, found.state_dict().values(), model.state_dict().values()))


def test_a_wrapped_checkpoint_is_unwrapped_also_beside_a_foreign_config(runs):
    state = record.load(runs / 'single/period1.pt')
    record.save('config.json', {'architectures': ['ViT']})
    for content in (
        {'epoch': 3, 'model': state, 'optimizer': {'state': {0: state}}},
        {'state_dict': {f'module._orig_mod.{key}': state[key] for key in state}},
        {'n_averaged': torch.tensor(5)} | {f'module.{key}': state[key] for key in state},
    ):
        record.save('wrapped.pt', content)
        model, _ = record.load_model('wrapped.pt')
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('config', [None, {'dataset': 'mnist', 'model': 'lenet', 'width': 2}])
def test_parameters_that_do_not_fit_are_refused_by_name(config):
    if config:
        record.save('config.json', config | {'periods': [1]})
    lenet = models.build('lenet', data.DATASETS['mnist'], 2).state_dict()
    for content, reason in (
        (torch.nn.Linear(3, 3).state_dict(), ''),
        ({}, ''),
        ([1.0], 'it is a list'),
        ({'net': lenet, 'ema': lenet}, 'several models, net, ema'),
        ({'mean': torch.zeros(3), **lenet}, '"mean"'),
    ):
        record.save('foreign.pt', content)
        with pytest.raises(ValueError, match=f'(?s)foreign.pt does not fit: .*{reason}'):
            record.load_model('foreign.pt')


def test_a_dataset_that_is_not_the_runs_is_refused(runs):
    with pytest.raises(ValueError, match='its run is on mnist5k, not on cifar10'):
        record.load_model(runs / 'single/period1.pt', 'cifar10')


# A run in its folder


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize('sessions, lost', [(4, 'period1.pt'), (3, 'period2.pt'), (1, 'last.pt')])
def test_a_run_that_lost_a_file_is_refused_with_the_way_to_start_over(
    tiny, tmp_path, sessions, lost
):
    argv = [*tiny, '--periodic', '--minutes', '0', '--out', 'run']
    for _ in range(sessions):
        train.main(argv)
    (tmp_path / 'run' / lost).unlink()
    before = contents(tmp_path / 'run')
    with pytest.raises(ValueError, match=f'run has lost {lost}: .* delete all to start over'):
        train.main(argv)
    assert before == contents(tmp_path / 'run')


def test_changed_flags_of_a_begun_run_are_named_as_typed_and_change_nothing(tmp_path):
    begun, now = (train.config_of(['--dataset', 'cifar10', '--eps', e]) for e in ('8/255', '4/255'))
    record.save('run/config.json', begun)
    record.save('run/log.jsonl', [{'epoch': 1}])
    before = contents(tmp_path / 'run')
    message = '--eps 8/255 .*--step-size 2/255, not --eps 4/255 .*--step-size 1/255; .*--out'
    with pytest.raises(ValueError, match=f'run was begun with {message}'):
        record.start(tmp_path / 'run', now, begun, 'cpu')
    assert before == contents(tmp_path / 'run')


def test_a_setting_that_an_older_config_lacks_counts_as_its_default(tiny, tmp_path):
    train.main([*tiny, '--minutes', '0', '--out', 'run'])
    config = record.load_config('run')
    older = {key: config[key] for key in config if key not in ('precision', 'provenance')}
    record.save('run/config.json', older)
    with pytest.raises(ValueError, match='begun with --precision fp32, not --precision tf32'):
        train.main([*tiny, '--precision', 'tf32', '--out', 'run'])
    train.main([*tiny, '--out', 'run'])
    assert record.finished('run')


def test_a_flag_that_failed_before_the_first_epoch_can_be_corrected(tiny):
    with pytest.raises(ValueError, match='--n-train 5000 .* there are 4000'):
        train.main([*tiny, '--n-train', '5000', '--out', 'run'])
    train.main([*tiny, '--out', 'run'])
    assert record.load_config('run')['n_train'] == 256


def test_a_run_is_neither_analysed_nor_resumed_on_other_images(runs, tmp_path):
    run = shutil.copytree(runs / 'single', tmp_path / 'run')
    record.save(run / 'config.json', record.load_config(run) | {'data': 'other'})
    with pytest.raises(ValueError, match='run was trained on other images'):
        hessian.main([str(run)])
    with pytest.raises(ValueError, match='run was begun on other images'):
        record.start(run, record.load_config(run) | {'data': 'new'}, {}, 'cpu')


# The command line


def command(monkeypatch, script, *argv):
    """What `python script.py argv...` does, but for the stamp of finished work."""
    monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *argv])
    cli.run(script.main)


def test_a_diverged_run_is_a_result_that_each_command_says_in_one_line(tiny, monkeypatch, capsys):
    argv = [*tiny, '--optimizer', 'sgd', '--lr', '1e9', '--out', 'run']
    command(monkeypatch, train, *argv)
    monkeypatch.setattr(train, 'train', None)  # would raise if it were called
    command(monkeypatch, train, *argv)
    command(monkeypatch, evaluate, 'run')
    assert [line for line in capsys.readouterr().out.splitlines() if 'diverged' in line] == [
        *['run diverged in epoch 1, which is its result; try a smaller --lr'] * 2,
        'left out: run diverged in epoch 1',
    ]


@pytest.mark.parametrize('allocate', [lambda: torch.empty(2**50), lambda: np.empty(2**50)])
def test_memory_that_runs_out_ends_in_one_line(allocate):
    with pytest.raises(SystemExit, match='^error: memory ran out [^\n]* --batch-size'):
        cli.run(allocate)


def test_a_missing_compiler_is_one_line_and_missing_git_none(monkeypatch):
    monkeypatch.setenv('PATH', '')
    record.add_provenance(made := {}, 'cpu')
    assert made['provenance'][0]['commit'] == 'unknown'
    failed = type('InductorError', (RuntimeError,), {'__module__': 'torch._inductor.exc'})
    with pytest.raises(SystemExit, match='^error: --compile failed .no g.... leave it out[^\n]*$'):
        cli.run(mock.Mock(side_effect=failed('no g++\n\nSet TORCHDYNAMO_VERBOSE=1')))


def test_a_terminal_of_few_characters_fails_nothing(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'ascii'))
    cli.run(lambda: print('pgd — 3.00'))
    sys.stdout.seek(0)
    assert sys.stdout.read() == 'pgd ? 3.00\n'


def test_bad_input_ends_in_one_line_and_an_error_of_ours_does_not():
    with pytest.raises(SystemExit, match='^error: [^\n]* got 3$'):
        cli.run(lambda: train.main(['--periodic', '--epochs', '3']))
    with pytest.raises(RuntimeError, match='ours'):
        cli.run(mock.Mock(side_effect=RuntimeError('ours')))


def test_in_a_file_progress_is_lines(capsys):
    with cli.bar(' images', 100) as bar:
        bar.mininterval = bar.delay = 0
        for _ in range(2):
            bar.update(50)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:4] for line in lines] == ['50%|', '100%']
