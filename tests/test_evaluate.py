import functools
import os
import pathlib
import pickle
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from tqdm import tqdm

import attack
import data
import evaluate
import models
import record
from test_train import killed_at

FEW = ['--attacks', 'pgd', 'pgd100', '--n-examples', '20']


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copies(runs, tmp_path):
    """Copies of the two runs, to be evaluated and spoilt."""
    shutil.copytree(runs, tmp_path / 'ckpts')
    return tmp_path / 'ckpts'


@pytest.fixture
def here(data_dir):
    return ['--data-dir', str(data_dir)]


def result_of(folder):
    path, = folder.glob('evaluate*.json')
    with np.load(path.with_suffix('.npz')) as arrays:
        return record.load(path), dict(arrays)


def test_all_columns_of_table_1_and_the_worst_case(copies, here, capsys, monkeypatch):
    monkeypatch.setitem(
        attack.ATTACKS, 'square5k', lambda model, x, y, eps, n_queries=20, p_init=.8, **rest:
        attack.square(model, x, y, eps, n_queries, p_init, **rest))
    evaluate.main([*here, str(copies / 'single'), '--n-examples', '30'])
    result, right = result_of(copies / 'single')
    keys = ['clean', 'pgd', 'pgd100', 'apgd100_ce', 'apgd100_dlr', 'square5k']
    assert set(result['columns']) == {*keys, 'worst'} == set(right) - {'index'}
    for key, column in result['columns'].items():
        assert right[key].shape == (30,) and column['error'] == pytest.approx(1 - right[key].mean())
        low, high = column['interval']
        assert 0 <= low <= column['error'] <= high <= 1
    assert np.array_equal(right['worst'], np.logical_and.reduce([right[key] for key in keys]))
    # wrong when clean is not robust
    assert all((right[key] <= right['clean']).all() for key in keys)
    assert result['columns']['apgd100_ce']['settings'] \
        == {'n_iter': 100, 'n_restarts': 5, 'loss': 'ce', 'rho': .75}
    # those of training
    assert result['columns']['pgd']['settings'] == {'step_size': .1, 'n_iter': 2}
    assert (result['n'], result['n_test'], result['eps'], result['dataset']) \
        == (30, 1000, .1, 'mnist5k')
    text = capsys.readouterr().out
    for part in ('30 of 1000 test images', 'APGD100-DLR', 'Square5K', 'worst case', '95 %',
                 'n_restarts 5', 'n_queries 20'):
        assert part in text


def test_the_worst_case_alone_is_the_same_from_fewer_attacks(copies, here, monkeypatch):
    sizes = []

    def counted(run_attack):
        @functools.wraps(run_attack)
        def run(model, x, y, **rest):
            sizes.append(len(x))
            return run_attack(model, x, y, **rest)
        return run

    argv = [*here, str(copies / 'single'), '--attacks', 'pgd', 'pgd100', '--n-examples', '100']
    for key in 'pgd', 'pgd100':
        monkeypatch.setitem(attack.ATTACKS, key, counted(attack.ATTACKS[key]))
    evaluate.main(argv)
    evaluate.main([*argv, '--worst'])
    _, right = result_of(copies / 'single')
    result = record.load(copies / 'single/worst_n100.json')
    with np.load(copies / 'single/worst_n100.npz') as arrays:
        assert np.array_equal(arrays['worst'], right['worst'])
        assert np.array_equal(arrays['pgd100'], right['pgd'] & right['pgd100'])
    assert sizes == [right['clean'].sum()] * 3 + [right['pgd'].sum()] and sizes[3] < sizes[2]
    assert result['columns']['pgd100']['settings']['after'] == 'clean+pgd'
    evaluate.main([*argv, '--worst'])
    assert len(sizes) == 4  # kept


def test_the_errors_are_those_of_the_model_on_those_images(copies, here, data_dir):
    evaluate.main([*here, str(copies / 'single'), *FEW])
    result, right = result_of(copies / 'single')
    model = models.build('lenet', 'mnist5k', 2)
    model.load_state_dict(record.load(copies / 'single/period1.pt'))
    _, _, x, y = data.load('mnist5k', data_dir)
    index = torch.from_numpy(right['index'])
    clean = model(x[index]).argmax(1) == y[index]
    assert np.array_equal(right['clean'], clean.numpy())
    attacked = attack.pgd(model, x[index], y[index], .1, .1, 2, index=index)
    assert np.array_equal(right['pgd'], (clean & (model(attacked).argmax(1) == y[index])).numpy())


def test_a_periodic_run_is_evaluated_as_the_ensemble_of_its_periods(copies, here):
    evaluate.main([*here, str(copies / 'triple'), *FEW])
    periods = [str(copies / f'triple/period{i}.pt') for i in (1, 2, 3)]
    evaluate.main([*here, '--ensemble', *periods, *FEW])
    folder, = (pathlib.Path('evals')).iterdir()
    assert folder.name.startswith('ensemble_')
    one, other = result_of(copies / 'triple'), result_of(folder)
    assert one[0]['digests'] == other[0]['digests'] and len(one[0]['digests']) == 3
    assert all(np.array_equal(one[1][key], other[1][key]) for key in one[1])
    evaluate.main([*here, '--ensemble', str(copies / 'triple/period3.pt'), *FEW])
    single = next(path for path in pathlib.Path('evals').iterdir()
                  if path.name.startswith('checkpoint_'))
    assert not np.array_equal(result_of(single)[1]['pgd'], one[1]['pgd'])


def test_an_ensemble_takes_runs_and_checkpoints_alike(copies, here):
    members = [str(copies / name) for name in ('single', 'triple', 'triple/period1.pt')]
    evaluate.main([*here, '--ensemble', *members, *FEW])
    result, _ = result_of(next(pathlib.Path('evals').iterdir()))
    assert [pathlib.Path(name).name for name in result['members']] == [
        'period1.pt', 'period1.pt', 'period2.pt', 'period3.pt', 'period1.pt']


def test_an_ensemble_of_equals_gives_the_row_of_the_model(copies, here):
    path = str(copies / 'single/period1.pt')
    evaluate.main([*here, '--ensemble', path, path, path, *FEW])
    evaluate.main([*here, str(copies / 'single'), *FEW])
    one = result_of(next(pathlib.Path('evals').iterdir()))[1]
    other = result_of(copies / 'single')[1]
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_a_released_checkpoint_without_a_run_needs_nothing_but_itself(
        copies, here, monkeypatch, data_dir):
    bare = pathlib.Path('lenet_16_eps0.4_100.ckpt')
    shutil.copy(copies / 'single/period1.pt', bare)
    evaluate.main([*here, str(bare), '--dataset', 'mnist5k', *FEW])
    result, right = result_of(next(pathlib.Path('evals').iterdir()))
    assert result['eps'] == .4  # the paper's for MNIST
    assert result['columns']['pgd']['settings'] == {'step_size': .01, 'n_iter': 50}


def test_another_budget_is_kept_apart(copies, here):
    for flags in ([], ['--eps', '0.05'], ['--eps', '0']):
        evaluate.main([*here, str(copies / 'single'), *FEW, *flags])
    found = {path.name: record.load(path) for path in (copies / 'single').glob('evaluate*.json')}
    assert set(found) == {'evaluate_n20.json', 'evaluate_n20_eps0.05.json',
                          'evaluate_n20_eps0.json'}
    pgd = {name: result['columns']['pgd'] for name, result in found.items()}
    # at a budget that is not the run's, PGD is the paper's: steps of 0.01, eps / 0.01 + 10 of them
    assert pgd['evaluate_n20_eps0.05.json']['settings'] == {'step_size': .01, 'n_iter': 15}
    columns = found['evaluate_n20_eps0.json']['columns']
    assert columns['pgd']['error'] == columns['clean']['error'] < pgd['evaluate_n20.json']['error']


def test_finished_attacks_are_not_run_again_and_others_are_added(copies, here, monkeypatch):
    ran = []
    for key, run in list(attack.ATTACKS.items()):
        def spy(model, x, y, eps, n_iter=1, step_size=1., key=key, **rest):
            ran.append(key)
            return x
        monkeypatch.setitem(attack.ATTACKS, key, spy)
    argv = [*here, str(copies / 'single'), '--n-examples', '20', '--attacks']
    for keys in (['pgd'], ['pgd', 'square5k'], ['pgd', 'square5k', 'pgd100'], ['square5k']):
        evaluate.main([*argv, *keys])
    assert ran == ['pgd', 'square5k', 'pgd100']


@pytest.fixture(scope='module')
def uninterrupted(runs, data_dir, tmp_path_factory):
    """What an evaluation that nothing disturbs finds."""
    folder = tmp_path_factory.mktemp('uninterrupted') / 'single'
    shutil.copytree(runs / 'single', folder)
    evaluate.main(['--data-dir', str(data_dir), str(folder), *FEW, '--device', 'cpu'])
    return result_of(folder)


@pytest.mark.parametrize('moment, after', [(i, False) for i in range(6)] + [(5, True)])
def test_an_evaluation_killed_at_any_file_it_writes_ends_as_an_uninterrupted_one(
        copies, here, uninterrupted, moment, after):
    argv = [*here, str(copies / 'single'), *FEW, '--device', 'cpu']
    assert killed_at(moment, after, evaluate.main, argv) == signal.SIGKILL
    evaluate.main(argv)
    (result, right), (whole, expected) = result_of(copies / 'single'), uninterrupted
    assert all(np.array_equal(right[key], expected[key]) for key in expected)
    assert {key: column['error'] for key, column in result['columns'].items()} \
        == {key: column['error'] for key, column in whole['columns'].items()}


def test_results_of_a_checkpoint_that_changed_are_not_taken_over(copies, here, capsys):
    evaluate.main([*here, str(copies / 'single'), *FEW])
    before = result_of(copies / 'single')[1]
    shutil.copy(copies / 'triple/period1.pt', copies / 'single/period1.pt')
    capsys.readouterr()
    evaluate.main([*here, str(copies / 'single'), *FEW])
    assert 'other checkpoints' in capsys.readouterr().out
    assert not np.array_equal(before['pgd'], result_of(copies / 'single')[1]['pgd'])


class Evil:
    def __reduce__(self):
        return os.system, ('touch owned',)


@pytest.mark.parametrize('spoil, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), 'truncated'),
    (lambda path: path.write_bytes(b''), 'truncated'),
    (lambda path: path.write_bytes(b'not a checkpoint'), 'refused'),
    (lambda path: path.write_bytes(pickle.dumps(Evil(), protocol=2)), 'refused'),
    (lambda path: torch.save({'model': Evil()}, path), 'refused'),
    (lambda path: torch.save({'model': {'fc1.weight': torch.zeros(2)}, 'epoch': 3}, path),
     'no plain state_dict'),
    (lambda path: torch.save([1, 2], path), 'no plain state_dict'),
    (lambda path: torch.save(models.build('lenet', 'mnist', 3).state_dict(), path), 'does not fit'),
    (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), 'does not fit'),
    (lambda path: torch.save({key: value * float('nan') for key, value in
                              models.build('lenet', 'mnist', 2).state_dict().items()}, path),
     'not finite'),
    (lambda path: path.unlink(), 'not finished|does not exist')])
@pytest.mark.parametrize('how', ['run', 'ensemble'])
def test_a_bad_checkpoint_is_refused_by_name_and_runs_no_code(copies, here, spoil, message, how):
    path = copies / 'single/period1.pt'
    spoil(path)
    target = [str(copies / 'single')] if how == 'run' \
        else ['--ensemble', str(copies / 'triple'), str(path)]
    with pytest.raises(ValueError, match=f'single.*({message})'):
        evaluate.main([*here, *target, *FEW])
    assert not pathlib.Path('owned').exists() and not list(copies.glob('*/evaluate*'))
    assert not pathlib.Path('evals').exists()


def test_members_of_different_datasets_are_refused_by_name(copies, here):
    torch.save(models.build('resnet18', 'cifar10', 1).state_dict(), 'color.ckpt')
    with pytest.raises(ValueError, match='color.ckpt of cifar10, .*single.* of mnist5k'):
        evaluate.main([*here, '--ensemble', str(copies / 'single'), 'color.ckpt', *FEW])
    shutil.copy(copies / 'triple/period1.pt', 'bare.ckpt')  # by its shape alone it could be MNIST's
    with pytest.raises(ValueError, match='bare.ckpt of mnist, .* of mnist5k'):
        evaluate.main([*here, '--ensemble', str(copies / 'single'), 'bare.ckpt', *FEW])
    argv = [*here, '--ensemble', str(copies / 'single'), 'bare.ckpt', *FEW]
    evaluate.main([*argv, '--dataset', 'mnist5k'])
    with pytest.raises(ValueError, match='color.ckpt .* not of mnist5k'):
        evaluate.main([*here, 'color.ckpt', '--dataset', 'mnist5k', *FEW])


def test_members_of_different_budgets_need_a_word(copies, here):
    config = record.load(copies / 'triple/config.json')
    record.save(copies / 'triple/config.json', config | {'eps': .2})
    argv = [*here, '--ensemble', str(copies / 'single'), str(copies / 'triple'), *FEW]
    with pytest.raises(ValueError, match='--eps'):
        evaluate.main(argv)
    evaluate.main([*argv, '--eps', '0.1'])
    record.save(copies / 'triple/config.json', config | {'n_iter': 3})
    with pytest.raises(ValueError, match='different n_iter: 2, 3'):
        evaluate.main(argv)


@pytest.mark.parametrize('path, message', [
    ('nowhere', 'nowhere does not exist'), ('empty', 'empty is no run')])
def test_a_path_that_is_no_run_is_refused_by_name(here, path, message):
    pathlib.Path('empty').mkdir()
    with pytest.raises(ValueError, match=message):
        evaluate.main([*here, path])


def test_an_unfinished_run_is_refused_with_the_way_out(copies, here):
    shutil.copy(copies / 'triple/period3.pt', copies / 'triple/last.pt')
    with pytest.raises(ValueError, match='triple is not finished; continue it'):
        evaluate.main([*here, str(copies / 'triple')])


@pytest.mark.parametrize('flags, message', [
    ([], 'name either'), (['--n-examples', '0', 'x'], '0'), (['--attacks', 'fgsm', 'x'], 'fgsm'),
    (['x', '--ensemble', 'y'], 'name either'), (['x', '--eps', '8'], '8/255'),
    (['x', '--batch-size', '0'], '0')])
def test_bad_flags_are_refused_with_their_value(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert message in capsys.readouterr().err


def test_more_examples_than_there_are_is_refused(copies, here):
    with pytest.raises(ValueError, match='1001 of 1000'):
        evaluate.main([*here, str(copies / 'single'), '--n-examples', '1001'])


def test_the_interval_is_wilsons():
    # worked by hand for 1 of 10: (0.1 + 0.19207 +- 1.96 * sqrt(0.009 + 0.009604)) / 1.38415
    assert evaluate.wilson(1, 10) == pytest.approx([.01788, .40416], abs=2e-4)
    low, high = evaluate.wilson(0, 100)
    assert low == 0 and .03 < high < .04
    assert evaluate.wilson(100, 100)[1] == 1


def test_evaluation_computes_in_float32(copies, here, monkeypatch):
    seen = []
    monkeypatch.setitem(attack.ATTACKS, 'pgd', lambda model, x, y, eps, step_size, n_iter, **rest:
                        seen.append((torch.get_float32_matmul_precision(),
                                     torch.backends.cudnn.allow_tf32, model(x).dtype)) or x)
    evaluate.main([*here, str(copies / 'single'), '--attacks', 'pgd', '--n-examples', '10'])
    assert seen == [('highest', False, torch.float32)]


def test_a_progress_bar_counts_images_and_changes_nothing(copies, here, monkeypatch, capsys):
    plain = [*here, str(copies / 'single'), *FEW]
    evaluate.main(plain)
    one = result_of(copies / 'single')[1]
    (copies / 'single/evaluate_n20.json').unlink()
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(evaluate, 'tqdm', functools.partial(tqdm, mininterval=0))
    capsys.readouterr()
    evaluate.main(plain)
    assert 'PGD100, at most' in capsys.readouterr().err  # the bar was shown, at each pass
    other = result_of(copies / 'single')[1]
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_the_seed_reaches_the_attacks_and_the_name_of_the_result(copies, here, monkeypatch):
    seen = []
    monkeypatch.setitem(attack.ATTACKS, 'pgd', lambda model, x, y, eps, step_size, n_iter, **rest:
                        seen.append(rest['seed']) or x)
    for seed in '03':
        evaluate.main([*here, str(copies / 'single'), '--attacks', 'pgd', '--seed', seed])
    assert seen == [0, 3]
    assert sorted(path.name for path in (copies / 'single').glob('*.npz')) \
        == ['evaluate.npz', 'evaluate_seed3.npz']


def test_pgd_starts_as_it_did_in_training(copies, here):
    config = record.load(copies / 'single/config.json')
    record.save(copies / 'single/config.json', config | {'start': 'eps'})
    evaluate.main([*here, str(copies / 'single'), *FEW])
    columns = result_of(copies / 'single')[0]['columns']
    assert columns['pgd']['settings'] == {'step_size': .1, 'n_iter': 2, 'start': .1}
    assert columns['pgd100']['settings'] == {'step_size': .01, 'n_iter': 100}


def test_a_checkpoint_cut_anywhere_is_refused_by_name(copies):
    whole = (copies / 'single/period1.pt').read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        pathlib.Path('cut.pt').write_bytes(whole[:length])
        with pytest.raises(ValueError, match='cut.pt is (truncated|refused)'):
            record.rebuild('cut.pt')


def spoil_npz(folder):
    with np.load(folder / 'evaluate_n20.npz') as arrays:
        changed = dict(arrays) | {'pgd': np.ones(20, bool)}
    np.savez(folder / 'evaluate_n20.npz', **changed)


@pytest.mark.parametrize('spoil', [
    lambda folder: (folder / 'evaluate_n20.json').write_text('{}'),
    lambda folder: (folder / 'evaluate_n20.json').write_text('[1'),
    lambda folder: (folder / 'evaluate_n20.npz').write_bytes(b''),
    lambda folder: (folder / 'evaluate_n20.npz').write_bytes(b'PK'),
    lambda folder: (folder / 'evaluate_n20.npz').unlink(), spoil_npz])
def test_a_damaged_result_is_refused_by_name_with_the_way_out(copies, here, spoil):
    evaluate.main([*here, str(copies / 'single'), *FEW])
    spoil(copies / 'single')
    with pytest.raises(ValueError, match='single/evaluate_n20.json .*damaged'):
        evaluate.main([*here, str(copies / 'single'), *FEW])
    for path in (copies / 'single').glob('evaluate*'):
        path.unlink()
    evaluate.main([*here, str(copies / 'single'), *FEW])


@pytest.mark.filterwarnings('ignore:Validating sparse')
@pytest.mark.parametrize('change', [
    {'fc1.weight': torch.zeros(3)}, {'conv1.weight': torch.zeros(4, 2, 5, 5)},
    {'conv1.weight': torch.zeros(0)}, {'fc2.bias': torch.zeros(10, dtype=torch.complex64)},
    {'fc2.bias': torch.zeros(10, dtype=torch.int64)}, {'fc2.bias': torch.zeros(10, device='meta')},
    {'fc2.bias': torch.zeros(10).to_sparse()}, {3: torch.zeros(1)}])
def test_strange_tensors_are_refused_by_name(copies, here, change):
    torch.save(record.load(copies / 'single/period1.pt') | change, 'strange.pt')
    with pytest.raises(ValueError, match='strange.pt|takes images'):
        evaluate.main([*here, 'strange.pt', '--dataset', 'mnist5k', *FEW])
