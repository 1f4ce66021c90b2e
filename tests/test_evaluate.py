import dataclasses
import functools
import math
import os
import pathlib
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from test_train import killed_at

import attack
import data
import evaluate
from lib import record

FEW = ['--n-examples', '20', '--attacks', 'pgd']


@pytest.fixture
def copies(runs, tmp_path):
    """Copies of the two runs, to be evaluated and spoilt."""
    return shutil.copytree(runs, tmp_path / 'ckpts')


def result_of(folder, name='evaluate*'):
    (path,) = pathlib.Path(folder).glob(f'{name}.json')
    return record.load(path), record.load(path.with_suffix('.npz'))


@pytest.fixture
def short(monkeypatch):
    """A few steps of each attack; settings that differ in nothing but cost."""
    for table in attack.ATTACKS, attack.STANDARD:
        for key, run in table.items():
            counts = getattr(run, 'keywords', {}).items()
            few = {name: min(count, 5) for name, count in counts if name.startswith('n_')}
            monkeypatch.setitem(table, key, functools.partial(run, **few))


def test_every_attack_is_a_column_and_the_worst_case_is_that_of_all(copies, short):
    evaluate.main([str(copies / 'single'), '--n-examples', '20'])
    result, robust = result_of(copies / 'single')
    keys, columns = ['clean', *attack.ATTACKS], result['columns']
    assert set(columns) == {*keys, 'worst'} == set(robust) - {'index'}
    assert all(columns[key]['error'] == pytest.approx(1 - robust[key].mean()) for key in columns)
    assert np.array_equal(robust['worst'], np.logical_and.reduce([robust[key] for key in keys]))


def test_the_attacks_of_a_column_are_the_papers():
    run = {'dataset': 'cifar10', 'eps': 8 / 255, 'step_size': 3 / 255, 'n_iter': 4}
    apgd = {'n_iter': 100, 'n_restarts': 5}
    attacks = evaluate.attacks_of(attack.ATTACKS, run, 8 / 255)
    assert {key: settings for key, (_, settings) in [*attacks.items()][:5]} == {
        'pgd': {'step_size': 3 / 255, 'n_iter': 4},  # of training
        'pgd100': {'step_size': pytest.approx(1 / 255), 'n_iter': 100},
        'apgd100_ce': apgd | {'loss': 'ce'},
        'apgd100_dlr': apgd | {'loss': 'dlr'},
        'square5k': {'n_queries': 5000, 'p_init': 0.8},
    }


def test_a_file_that_gains_nothing_is_not_written(copies):
    argv = [str(copies / 'single'), *FEW]
    evaluate.main(argv)
    (path,) = (copies / 'single').glob('evaluate*.json')
    before = path.stat()
    evaluate.main(argv)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_search_in_tf32_is_judged_in_float32_and_keeps_to_a_file_of_its_own(copies, monkeypatch):
    seen, predict = [], evaluate.predict

    def searched(model, x, y, eps, **options):
        seen.append(torch.get_float32_matmul_precision())
        return x

    def judged(*args):
        seen.append(torch.get_float32_matmul_precision())
        return predict(*args)

    monkeypatch.setitem(attack.ATTACKS, 'pgd', searched)
    monkeypatch.setattr(evaluate, 'predict', judged)
    for precision in 'tf32', 'fp32':
        evaluate.main([str(copies / 'single'), *FEW, '--precision', precision])
    assert seen == ['highest', 'high', 'highest', *['highest'] * 3]
    assert result_of(copies / 'single', 'evaluate_tf32*')[0]['precision'] == 'tf32'
    assert 'precision' not in result_of(copies / 'single', 'evaluate_n*')[0]


@pytest.mark.parametrize('name, n_periods', [('single', 1), ('triple', 3)])
def test_a_run_is_the_mean_of_its_periods_and_robust_only_where_right_when_clean(
    copies, name, n_periods
):
    evaluate.main([str(copies / name), '--n-examples', '100', '--attacks', 'pgd'])
    robust = result_of(copies / name)[1]
    files = [copies / name / f'period{i + 1}.pt' for i in range(n_periods)]
    members = [record.load_model(file)[0] for file in files]

    def mean(x):
        return sum(member(x).softmax(1) for member in members).log()  # but for a constant

    index = torch.from_numpy(robust['index'])
    x, y = (tensor[index] for tensor in data.load('mnist5k')[2:])
    x_adv = attack.pgd(mean, x, y, 0.1, 0.1, 2, index=index)
    clean, attacked = mean(x).argmax(1) == y, mean(x_adv).argmax(1) == y
    assert np.array_equal(robust['clean'], clean) and not clean.all()
    assert np.array_equal(robust['pgd'], clean & attacked)


def test_one_ensemble_of_each_dataset_and_budget_at_any_depth(copies, capsys):
    for name, change in ('a/b/eps', {'eps': 0.2}), ('a/mnist', {'dataset': 'mnist'}):
        shutil.copytree(copies / 'single', copies / name)
        record.save(copies / name / 'config.json', record.load_config(copies / name) | change)
    shutil.copytree(copies / 'triple', copies / 'c/unfinished')
    (copies / 'c/unfinished/last.pt').touch()
    shutil.copytree(copies / 'triple', copies / 'c/diverged')
    record.save(copies / 'c/diverged/diverged.json', {'epoch': 3})
    shutil.copy(pathlib.Path(data.__file__).with_name('mnist5k.npz'), 'mnist.npz')
    pathlib.Path('link').symlink_to(copies / 'triple')
    (copies / 'loop').symlink_to(copies)
    record.save(copies / 'config.json', {'architectures': ['ViT']})  # of another library
    assert len(record.find_runs([copies, 'link'])) == 6  # each once
    again = ['link', 'link/period1.pt', str(copies / 'triple/period1.pt')]  # count once
    evaluate.main(['--ensemble', str(copies), *again, *FEW, '--data-dir', '.'])
    found = [record.load(path) for path in pathlib.Path('evals').rglob('*.json')]
    found = {(result['dataset'], result['eps'], len(result['members'])) for result in found}
    assert found == {('mnist5k', 0.1, 4), ('mnist5k', 0.2, 1), ('mnist', 0.1, 1)}
    text = capsys.readouterr().out
    assert f'left out: {copies}/c/unfinished is not finished' in text
    assert f'left out: {copies}/c/diverged diverged in epoch 3' in text
    assert f'.json: {copies}/a/b/eps/period1.pt\n' in text


def test_other_weights_and_single_members_are_results_of_their_own(copies):
    run = copies / 'triple'
    for i in range(3):
        shutil.copy(run / f'period{3 - i}.pt', run / f'best{i + 1}.pt')
    evaluate.main([str(run), *FEW, '--weights', 'best', '--member', '1'])
    evaluate.main([str(run), *FEW, '--member', '3'])
    names = 'evaluate_best_member1_n20', 'evaluate_member3_n20'
    best, last = (result_of(run, name)[0] for name in names)
    assert best['digests'] == last['digests'] == [record.digest(run / 'period3.pt')]
    assert (best['weights'], best['member'], last['member']) == ('best', 1, 3)
    assert 'weights' not in last


def test_models_that_a_run_never_kept_are_refused_by_flag(runs):
    for flags, message in (
        ('--weights best', 'triple has no best1.pt: .* best ones with --n-val'),
        ('--weights ema', 'triple has no ema1.pt: .* averages with --ema'),
        ('--member 4', '--member 4: .*triple has periods 1 .. 3'),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main([str(runs / 'triple'), *flags.split()])


def test_a_checkpoint_outside_of_a_run_has_the_papers_settings(copies):
    shutil.copy(copies / 'single/period1.pt', 'lenet_16_eps0.4_100.pt')
    evaluate.main(['lenet_16_eps0.4_100.pt', '--dataset', 'mnist5k', *FEW])
    result, _ = result_of('evals', 'checkpoint*/evaluate*')
    assert result['eps'] == 0.4
    assert result['columns']['pgd']['settings'] == {'step_size': 0.01, 'n_iter': 50}


def test_another_budget_is_kept_apart_and_attacked_with_the_papers_steps(copies):
    for flags in [], ['--eps', '0.05'], ['--eps', '0']:
        evaluate.main([str(copies / 'single'), *FEW, *flags])
    names = 'evaluate_n20', 'evaluate_n20_eps0.05', 'evaluate_n20_eps0'
    own, other, zero = (result_of(copies / 'single', name)[0]['columns'] for name in names)
    assert other['pgd']['settings'] == {'step_size': 0.01, 'n_iter': 15}
    assert zero['pgd']['error'] == zero['clean']['error'] < own['pgd']['error']


@pytest.fixture
def ran(monkeypatch):
    """Grows by (name, seed) of each attack that runs; none changes an image."""
    noted = []
    for key in attack.ATTACKS:

        def spy(model, x, y, eps, n_iter=1, *, seed, key=key, **options):
            noted.append((key, seed))
            return x

        monkeypatch.setitem(attack.ATTACKS, key, spy)
    return noted


def test_finished_attacks_are_not_run_again_unless_lost_and_others_are_added(copies, ran):
    for keys in 'pgd', 'pgd square5k', 'pgd square5k pgd100', 'square5k':
        evaluate.main([str(copies / 'single'), '--n-examples', '20', '--attacks', *keys.split()])
    (copies / 'single/evaluate_n20.npz').unlink()
    evaluate.main([str(copies / 'single'), *FEW])
    assert ran == [('pgd', 0), ('square5k', 0), ('pgd100', 0), ('pgd', 0)]


def test_a_flag_that_states_the_default_names_the_same_file_and_any_other_its_own(copies, ran):
    defaults = ['--eps', '0.1', '--seed', '0', '--n-examples', '1000', '--member', '1']
    for flags in [], ['--seed', '3'], defaults:
        evaluate.main([str(copies / 'single'), '--attacks', 'pgd', *flags])
    assert ran == [('pgd', 0), ('pgd', 3)]
    assert {path.name for path in copies.glob('*/*.npz')} == {'evaluate.npz', 'evaluate_seed3.npz'}


def test_results_of_other_images_or_weights_are_replaced_and_said_so(copies, ran, capsys):
    arrays = dict(np.load(pathlib.Path(data.__file__).with_name('mnist5k.npz')))
    record.save('a/mnist5k.npz', arrays)
    record.save('b/mnist5k.npz', arrays | {'y_test': 9 - arrays['y_test']})
    for folder, weights, other in ('a', 1, ''), ('b', 1, 'data'), ('b', 2, 'digests'):
        shutil.copy(copies / f'triple/period{weights}.pt', copies / 'single/period1.pt')
        evaluate.main([str(copies / 'single'), *FEW, '--data-dir', folder])
        said = capsys.readouterr().out
        assert (f'is of other {other}; it is replaced' if other else '') in said
        result, _ = result_of(copies / 'single')
        assert (result['columns']['clean']['error'] > 0.8) == (folder == 'b')
    assert result['digests'] == [record.digest(copies / 'triple/period2.pt')]
    (path,) = (copies / 'single').glob('evaluate*.json')
    record.save(path, {key: result[key] for key in result if key != 'data'})  # an older one
    evaluate.main([str(copies / 'single'), *FEW])
    assert len(ran) == 3


def test_a_changed_attack_is_run_again_with_all_that_came_after_it(copies, ran, monkeypatch):
    argv = [str(copies / 'single'), '--n-examples', '20', '--standard']
    pgd, pgd100, square = (attack.ATTACKS[key] for key in ('pgd', 'pgd100', 'square5k'))
    changed = functools.partial(pgd100, n_iter=2)
    for table in (
        {'a': pgd, 'b': pgd100, 'c': square},
        {'a': pgd, 'b': changed, 'c': square},
        {'a': pgd, 'c': square},
        {'a': pgd},
    ):
        monkeypatch.setattr(attack, 'STANDARD', table)
        evaluate.main(argv)
    assert [key for key, _ in ran] == 'pgd pgd100 square5k pgd100 square5k square5k'.split()
    worst = result_of(copies / 'single')[0]['columns']['worst']
    assert worst['settings'] == {'of': 'clean+a'}


def test_an_attack_whose_defaults_have_changed_is_run_again(copies, monkeypatch):
    calls = []
    for shift in 0.1, 0.1, 0.2:

        def brighter(model, x, y, eps, shift=shift, *, seed=0, index=None, batch_size=250):
            calls.append(shift)
            return (x + min(shift, eps)).clamp(max=1)

        monkeypatch.setitem(attack.ATTACKS, 'brighter', brighter)
        evaluate.main([str(copies / 'single'), '--n-examples', '20', '--attacks', 'brighter'])
    assert calls == [0.1, 0.2]
    assert result_of(copies / 'single')[0]['columns']['brighter']['settings'] == {'shift': 0.2}


def test_the_classes_that_a_model_and_each_member_predict_are_counted(copies):
    state = record.load(copies / 'triple/period2.pt')
    record.save(copies / 'triple/period2.pt', {key: 0 * value for key, value in state.items()})
    evaluate.main([str(copies / 'triple'), *FEW])
    result, robust = result_of(copies / 'triple')
    x = data.load('mnist5k')[2][torch.from_numpy(robust['index'])]
    members = [record.load_model(copies / f'triple/period{i}.pt')[0] for i in (1, 2, 3)]
    first, second, third = (len(set(member(x).argmax(1).tolist())) for member in members)
    assert result['members_predicted_classes'] == [first, second, third]
    assert second == 1 < result['predicted_classes']


def test_a_run_that_is_read_only_is_evaluated_into_evals(copies, monkeypatch, capsys):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    evaluate.main([str(copies / 'single'), *FEW])
    assert 'single is read-only; results go to evals/single_' in capsys.readouterr().out
    assert result_of('evals', 'single_*/evaluate*') and not list(copies.glob('*/evaluate*'))


DLR = [('ATTACKS', 2, 'apgd100_dlr'), ('STANDARD', 3, 'apgd_t')]


@pytest.mark.parametrize('table, n, key', DLR)
def test_dlr_is_left_out_where_there_are_too_few_classes(table, n, key, monkeypatch, capsys):
    few = dataclasses.replace(data.DATASETS['mnist'], n_classes=n)
    monkeypatch.setitem(data.DATASETS, 'few', few)
    run = {'dataset': 'few', 'eps': 0.1, 'step_size': 0.1, 'n_iter': 2}
    attacks = evaluate.attacks_of(vars(attack)[table], run, 0.1)
    assert attacks.keys() == vars(attack)[table].keys() - {key}
    assert f'left out: {attack.title(key)}, which needs {n + 1}' in capsys.readouterr().out


def test_a_progress_bar_that_redraws_changes_no_logits(copies, monkeypatch):
    bar = mock.MagicMock()
    bar.__enter__().update.return_value = True
    monkeypatch.setattr(evaluate.cli, 'bar', lambda unit: bar)
    evaluate.main([str(copies / 'single'), *FEW])


def test_the_standard_evaluation_is_that_of_autoattack():
    apgd_ce, apgd_t, fab_t, square = attack.STANDARD.values()
    assert list(attack.STANDARD) == ['apgd_ce', 'apgd_t', 'fab_t', 'square']
    assert apgd_ce.keywords == {'n_iter': 100}
    assert apgd_t.keywords == {'n_iter': 100, 'loss': 'dlr', 'n_targets': 9}
    assert fab_t.keywords == {'n_iter': 100, 'n_targets': 9}
    assert square.keywords == {'n_queries': 5000, 'p_init': 0.8}


def test_each_attack_of_the_standard_evaluation_gets_what_those_before_it_left(
    copies, short, capsys
):
    evaluate.main([str(copies / 'single'), '--standard', '--n-examples', '20', '--eps', '0.2'])
    result, robust = result_of(copies / 'single')
    attacked = [result['columns'][key]['settings']['attacked'] for key in attack.STANDARD]
    left = [robust[key].sum() for key in ('clean', *attack.STANDARD)]
    assert attacked == left[:-1]
    text = f"AutoAttack's robust accuracy: {5 * left[-1]:.2f} %"  # of 20 images
    assert text in capsys.readouterr().out
    assert result['standard'] is True  # what report.py knows it by


PGD, STANDARD = ['--attacks', 'pgd', 'pgd100'], ['--standard']


@pytest.mark.parametrize(
    'flags, moment', [*((PGD, i) for i in range(7)), *((STANDARD, i) for i in range(0, 11, 2))]
)
def test_an_evaluation_killed_at_any_file_ends_as_one_in_one_go(copies, short, flags, moment):
    one, other = copies / 'single', shutil.copytree(copies / 'single', 'killed')
    evaluate.main([str(one), '--n-examples', '20', *flags])
    argv = [str(other), '--n-examples', '20', *flags]
    assert killed_at(moment, False, evaluate.main, argv) == signal.SIGKILL
    evaluate.main(argv)
    (whole, robust), (again, found) = result_of(one), result_of(other)
    assert all(np.array_equal(found[key], robust[key]) for key in robust)
    errors = [{k: c['error'] for k, c in r['columns'].items()} for r in (whole, again)]
    assert errors[0] == errors[1] and whole['warnings'] == again['warnings']


def test_an_attack_of_autoattacks_may_be_a_column_of_its_own(copies, short):
    evaluate.main([str(copies / 'single'), '--n-examples', '20', '--attacks', 'apgd_ce', 'apgd_t'])
    columns = result_of(copies / 'single')[0]['columns']
    assert set(columns) == {'clean', 'apgd_ce', 'apgd_t', 'worst'}
    assert 'after' not in columns['apgd_t']['settings']  # not cumulative


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), 'period1.pt cannot be read'),
        (lambda path: path.unlink(), 'single is not finished; resume it'),
        (lambda path: path.with_name('last.pt').touch(), 'single is not finished; resume it'),
        (lambda path: shutil.rmtree(path.parent), 'single cannot be read: .*No such file'),
        (lambda path: path.with_name('config.json').unlink(), 'single: no run is below'),
    ],
)
def test_what_is_no_finished_run_is_refused_by_name(copies, spoil, message):
    spoil(copies / 'single/period1.pt')
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(copies / 'single'), *FEW])
    assert not list(copies.glob('*/evaluate*'))


@pytest.mark.parametrize(
    'flags, message',
    [
        ('', 'name either runs or --ensemble'),
        ('x --n-examples 0', "--n-examples: '0'"),
        ('x --standard --attacks apgd_t', 'its attacks in their order: apgd_ce apgd_t'),
        (f'x --seed {2**63}', f"--seed: '{2**63}'"),
    ],
)
def test_bad_flags_are_refused_with_their_value(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('k, n', [(0, 100), (1, 10), (37, 1000), (100, 100)])
def test_the_interval_is_wilsons(k, n):
    column = evaluate.summary(np.arange(n) >= k)
    assert column['error'] == k / n
    for end in column['interval']:  # both ends are 1.96 of their own deviations away
        deviation = math.sqrt(end * (1 - end) / n)
        assert abs(k / n - end) == pytest.approx(1.959964 * deviation, abs=1e-6)


@pytest.mark.parametrize('dataset, typed', [('cifar10', '2/255'), ('mnist', '0.007843')])
def test_budgets_are_printed_as_they_are_typed(dataset, typed):
    column = {'error': 0.5, 'interval': [0.4, 0.6], 'settings': {'step_size': 2 / 255}}
    assert evaluate.format_row('pgd', column, dataset).endswith(f'step_size {typed}')
