import csv
import hashlib
import shutil

import pytest
import torch

import claims
import evaluate
import record
import report
import study
import train


def test_notation_is_the_papers():
    assert report.notation([.0769, .0858, .0947]) == '8.58(89)'
    assert report.notation([.0156]) == '1.56'


@pytest.fixture
def evaluated(runs, data_dir, tmp_path):
    shutil.copytree(runs, tmp_path / 'ckpts')
    for name in ('single', 'triple'):
        evaluate.main(['--data-dir', str(data_dir), str(tmp_path / 'ckpts' / name),
                       '--n-examples', '40', '--attacks', 'pgd'])
    return tmp_path / 'ckpts'


def test_the_table_holds_the_runs_side_by_side_and_says_how_small_it_is(
        evaluated, tmp_path, capsys):
    report.main([str(evaluated / 'single'), str(evaluated / 'triple'),
                 '--out', str(tmp_path / 'results')])
    text = (tmp_path / 'results/table1.md').read_text()
    for part in ('width 2', '1,000 images', '4 epochs', '2 steps of 0.1', '40 of 1,000 test images',
                 'ensemble of 3', 'missing'):
        assert part in text
    assert 'ensemble of 3' in capsys.readouterr().out and text.count('| schedule |') == 1
    rows = list(csv.DictReader((tmp_path / 'results/table1.csv').open()))
    error = record.load(evaluated / 'single/evaluate_n40.json')['columns']['pgd']['error']
    assert float(rows[0]['pgd']) == pytest.approx(100 * error) and rows[0]['schedule'] == 'constant'


def test_runs_of_other_sizes_are_not_mixed_in(evaluated, tmp_path):
    config = record.load(evaluated / 'triple/config.json')
    record.save(evaluated / 'triple/config.json', config | {'epochs': 5})
    report.main([str(evaluated / 'single'), str(evaluated / 'triple'),
                 '--out', str(tmp_path / 'results')])
    assert (tmp_path / 'results/table1.md').read_text().count('| schedule |') == 2


@pytest.mark.parametrize('change', [{'eps_max': .5}, {'eps_min': .05}, {'periods': [1, 1, 2]}])
def test_other_schedules_are_not_taken_for_seeds(evaluated, tmp_path, change):
    shutil.copytree(evaluated / 'triple', evaluated / 'other')
    config = record.load(evaluated / 'other/config.json')
    record.save(evaluated / 'other/config.json', config | change | {'seed': 1})
    report.main([str(evaluated / 'triple'), str(evaluated / 'other'),
                 '--out', str(tmp_path / 'results')])
    rows = list(csv.DictReader((tmp_path / 'results/table1.csv').open()))
    assert [row['runs'] for row in rows] == ['1', '1']
    assert rows[0]['schedule'] != rows[1]['schedule']


def test_other_attacks_are_not_mixed_in(evaluated, tmp_path, data_dir):
    shutil.copytree(evaluated / 'single', evaluated / 'other')
    config = record.load(evaluated / 'other/config.json')
    record.save(evaluated / 'other/config.json', config | {'seed': 1})
    evaluate.main(['--data-dir', str(data_dir), str(evaluated / 'other'), '--n-examples', '40',
                   '--attacks', 'pgd100'])
    report.main([str(evaluated / 'single'), str(evaluated / 'other'),
                 '--out', str(tmp_path / 'results')])
    assert (tmp_path / 'results/table1.md').read_text().count('| schedule |') == 2


def test_a_run_named_twice_is_not_two_seeds(evaluated, tmp_path):
    shutil.copytree(evaluated / 'single', evaluated / 'copy')
    with pytest.raises(ValueError, match='one and the same run, of seed 0'):
        report.main([str(evaluated / 'single'), str(evaluated / 'copy'),
                     '--out', str(tmp_path / 'results')])


def test_seeds_become_mean_and_deviation(evaluated, tmp_path):
    shutil.copytree(evaluated / 'single', evaluated / 'other')
    path = evaluated / 'other/evaluate_n40.json'
    result = record.load(path)
    first = result['columns']['clean']['error']
    result['columns']['clean']['error'] = first + .1
    record.save(path, result)
    config = record.load(evaluated / 'other/config.json')
    record.save(evaluated / 'other/config.json', config | {'seed': 1})
    report.main([str(evaluated / 'single'), str(evaluated / 'other'),
                 '--out', str(tmp_path / 'results')])
    text = (tmp_path / 'results/table1.md').read_text()
    assert f'| constant | {100 * (first + .05):.2f}(707) |' in text


def test_without_any_run_all_that_the_paper_has_is_called_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report.main([])
    assert '41 not enough data (41 of these not measured at all), of 41' in capsys.readouterr().out
    text = (tmp_path / 'results/table1.md').read_text()
    assert text.count('missing / ') == 90 and '8.58(89)' in text
    assert 'holds if' in (tmp_path / 'results/claims.md').read_text()
    assert not list((tmp_path / 'results').glob('*.png'))


def test_a_run_that_is_only_trained_changes_no_number(runs, tmp_path):
    report.main([str(runs / 'single'), '--out', str(tmp_path / 'results')])
    assert 'Smaller runs' not in (tmp_path / 'results/table1.md').read_text()


def paper_run(folder, seed, sched, errors, n=10000, **change):
    """A finished run of Table 1, with the evaluation `errors` in percent, made up."""
    flags = ['--dataset', 'mnist', '--eps-sched', sched, '--seed', str(seed)]
    config = vars(train.settings(train.parse(flags))) | change
    folder.mkdir(parents=True)
    session = {'commit': 'abc', 'torch': '2', 'device': 'H100'}
    record.save(folder / 'config.json', config | {'sessions': [session]})
    record.save(folder / 'period1.pt', {'seed': torch.tensor(float(seed))})
    record.save(folder / 'log.jsonl', [{'loss': 1., 'seconds': 60., 'predicted_classes': 10}] * 3)
    columns = dict(zip(('clean', *claims.ATTACKS, 'worst'), errors))
    digests = [hashlib.sha256((folder / 'period1.pt').read_bytes()).hexdigest()]
    record.save(folder / 'evaluate.json', {
        'eps': config['eps'], 'dataset': 'mnist', 'digests': digests, 'n': n, 'n_test': 10000,
        'seed': 0,
        'sessions': [session], 'columns': {
            key: {'error': error / 100, 'settings': {'n_iter': 100, 'step_size': .01}}
            for key, error in columns.items()}})
    return str(folder)


def test_our_numbers_stand_beside_the_papers_with_the_difference_in_deviations(tmp_path):
    runs = [paper_run(tmp_path / str(seed), seed, 'constant', [1.56 + d, 8, 9, 10, 11, 12, 13])
            for seed, d in enumerate((-.1, .0, .4))]
    report.main([*runs, '--out', str(tmp_path / 'results')])
    text = (tmp_path / 'results/table1.md').read_text()
    # mean 1.66, deviation sqrt(.07) = .26; .1 / sqrt(.07 + .17 ** 2) = .32
    assert '| MNIST LeNet | no | constant | 1.66(26) / 1.56(17) / +0.3 | 8.00(0) / 8.58(89) / -0.7 '\
        in text
    assert '| 13.00(0) | 3 | 3.0 |' in text and text.count('missing / ') == 84
    assert 'trained: commit abc, torch 2, H100' in text
    rows = list(csv.DictReader((tmp_path / 'results/table1.csv').open()))
    assert len(rows) == 1 and float(rows[0]['clean_deviation']) == pytest.approx(.2646, abs=1e-4)


def test_a_single_run_is_measured_in_the_papers_deviations():
    assert report.beside([.0169], 1.5, .1) == '1.69 / 1.50(10) / +1.9'


@pytest.mark.parametrize('change', [{'epochs': 99, 'periods': [99]}, {'width': 8}, {'lr': 1e-3},
                                    {'n_train': 100}, {'n': 1000}])
def test_what_is_not_of_the_papers_size_does_not_enter_its_table(tmp_path, change):
    run = paper_run(tmp_path / 'run', 0, 'constant', [1, 8, 9, 10, 11, 12, 13], **change)
    report.main([run, '--out', str(tmp_path / 'results')])
    whole, = (part for part in (tmp_path / 'results/table1.md').read_text().split('## ')
              if 'paper\'s size' in part)
    assert whole.count('missing / ') == 90 and 'MNIST' in whole
    small = (tmp_path / 'results/table1.md').read_text().replace(whole, '')
    assert '| constant | 1.00 | 8.00 |' in small


def analysed_run(folder, eps, seed, top, gradients):
    """A finished run with what the analyses leave, made up."""
    folder.mkdir(parents=True)
    config = dict(dataset='mnist5k', model='lenet', width=1, eps=eps, eps_sched='constant',
                  periods=[1], epochs=1, step_size=.01, seed=seed, n_train=100,
                  n_iter=round(eps / .01) + 10, eps_max=eps, lr_sched='constant',
                  batch_size=25, optimizer='adam', lr=1e-3, trace=2, sessions=[])
    record.save(folder / 'config.json', config)
    record.save(folder / 'period1.pt', {'name': torch.tensor(list(str(folder).encode()))})
    record.save(folder / 'trace.jsonl', [
        {'step': step, 'grad_norm': norm, 'robust_error': .5, 'distance': 10. + step}
        for step, norm in enumerate(gradients)])
    digest = hashlib.sha256((folder / 'period1.pt').read_bytes()).hexdigest()
    head = {'eps': eps, 'n': 50, 'digest': digest, 'sessions': [
        {'commit': 'abc', 'torch': '2', 'device': 'cpu'}]}
    record.save(folder / 'hessian_n50.json', head | {
        'loss': .25, 'robust_error': .125, 'scale': {'mean': 2.},
        'eigen': {'values': [top, -1.], 'residuals': [0, 0], 'converged': [True, True]}})
    record.save(folder / 'hessian_n20.json', head | {'n': 20, 'loss': 9., 'robust_error': 1.})
    record.save(folder / 'similarity_n50.json', head | {'points': [
        {'direction': direction, 'a': a, 'cosine': cosine, 'variance': 0, 'robust_error': .5}
        for direction, cosine in (('eigenvector', .4), ('random', .8)) for a in (0, .1)]})
    record.save(folder / 'dead_n50.json', head | {'predicted_classes': 10, 'layers': [
        {'layer': 'conv1', 'units': 4, 'dead': 1, 'share': .25, 'all': False}]})
    return str(folder)


def test_runs_of_several_budgets_are_one_table_with_means_over_seeds(tmp_path):
    runs = [analysed_run(tmp_path / f'{eps}_{seed}', eps, seed, 10 + eps + 2 * seed, [4, 2, 1, 3])
            for eps in (.2, 0, .1) for seed in (0, 1)]
    report.main([*runs, '--out', str(tmp_path / 'results')])
    text = (tmp_path / 'results/landscape.md').read_text()
    assert 'hessian: commit abc, torch 2, cpu' in text
    assert '100 images of mnist5k' in text and '50 for hessian' in text
    head, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]]
                      for line in text.splitlines() if line.startswith('|')]
    assert [row[0] for row in rows] == ['0', '0.1', '0.2']
    found = dict(zip(head, rows[2]))
    expected = {'seeds': '2', 'L_eps': '0.25 ± 0', 'robust error': '0.125 ± 0',
                'top eigenvalue': '11.2 ± 1.4', 'normalised': '5.6 ± 0.71',
                'cosine, top, a = 0.1': '0.4 ± 0',
                'cosine, random, a = 0.1': '0.8 ± 0', 'gradient, first tenth': '4 ± 0',
                'gradient, last': '2 ± 0', 'distance': '11 ± 0', 'constant': '0 ± 0',
                'dead conv1': '0.25 ± 0'}
    assert {name: found[name] for name in expected} == expected
    for figure in 'fig8', 'fig3', 'fig4':
        size = (tmp_path / f'results/{figure}_mnist5k_lenet_1_constant.png').stat().st_size
        assert size > 5000


def test_barriers_between_runs_are_a_table(tmp_path):
    run = analysed_run(tmp_path / 'run', .1, 0, 10, [1, 1, 1, 1])
    other = analysed_run(tmp_path / 'other', .1, 1, 10, [1, 1, 1, 1])
    digests = [record.load(tmp_path / name / 'dead_n50.json')['digest']
               for name in ('run', 'other')]
    record.save(tmp_path / 'run/connect_other.json', {
        'digest': digests[0], 'other': digests[1], 'eps': .1, 'n': 50, 'curve': 'polygon',
        'n_control': 3, 'epochs': 7,
        'barriers': {'line': 2., 'polygon': .5},
        'points': [{'path': path, 't': t, 'loss': t * (1 - t) * 4 * high, 'robust_error': t / 2}
                   for path, high in (('line', 3), ('polygon', 1.5)) for t in (0, .5, 1)]})
    report.main([run, other, '--out', str(tmp_path / 'results')])
    assert ('| 0.1 | run | 50 | polygon, 3 points, 7 epochs | 3 | 2 | 50.0% | 1.5 | 0.5 | 50.0% |'
            in (tmp_path / 'results/landscape.md').read_text())


def test_a_run_that_is_partly_analysed_has_empty_cells(tmp_path):
    runs = [analysed_run(tmp_path / str(eps), eps, 0, 10, [1, 1, 1, 1]) for eps in (0, .1)]
    for name in 'hessian_n50.json', 'trace.jsonl', 'similarity_n50.json':
        (tmp_path / '0.1' / name).unlink()
    report.main([*runs, '--out', str(tmp_path / 'results')])
    row, = (line for line in (tmp_path / 'results/landscape.md').read_text().splitlines()
            if line.startswith('| 0.1'))
    assert row.startswith('| 0.1 | 1 |  |  |') and '| 0.25 |' in row


def test_runs_that_differ_in_more_than_eps_and_seed_are_not_mixed(tmp_path):
    for seed, change in enumerate([{}, {'lr': .5}, {'lr_sched': 'step'}, {'n_iter': 7}]):
        for eps in .1, .2:
            folder = tmp_path / f'{eps}_{seed}'
            analysed_run(folder, eps, seed, 10, [1, 1, 1, 1])
            record.save(folder / 'config.json', record.load(folder / 'config.json')
                        | change | ({'step_size': eps / 4} if seed == 3 else {}))
    groups = study.alike(study.find(sorted(map(str, tmp_path.glob('*_*')))), 'eps')
    assert [[run.eps for run in group] for group in groups] == [[.1, .2]] * 4
    assert report.landscape([run for group in groups for run in group], .1).count(
        '| 1 | 0.25 |') == 8


def test_one_run_named_twice_counts_once_and_its_copy_is_refused(tmp_path):
    run = analysed_run(tmp_path / 'run', .1, 0, 10, [1, 1, 1, 1])
    report.main([run, run + '/', '--out', str(tmp_path / 'results')])
    assert '| 0.1 | 1 |' in (tmp_path / 'results/landscape.md').read_text()
    copy = analysed_run(tmp_path / 'copy', .1, 0, 10, [1, 1, 1, 1])
    with pytest.raises(ValueError, match='name it once'):
        report.main([run, copy, '--out', str(tmp_path / 'results')])


def test_what_has_not_converged_or_is_of_another_model_is_left_out(tmp_path):
    runs = [analysed_run(tmp_path / str(eps), eps, 0, 10, [1, 1, 1, 1]) for eps in (0, .1)]
    path = tmp_path / '0.1/hessian_n50.json'
    result = record.load(path)
    result['eigen']['converged'] = [False, True]
    record.save(path, result)
    (tmp_path / '0/similarity_n50.json').unlink()
    dead = record.load(tmp_path / '0/dead_n50.json') | {'digest': 'of another model'}
    record.save(tmp_path / '0/dead_n50.json', dead)
    report.main([*runs, '--out', str(tmp_path / 'results')])
    lines = (tmp_path / 'results/landscape.md').read_text().splitlines()
    head, one, two = ([cell.strip() for cell in lines[i].split('|')] for i in (2, 4, 5))
    assert two[head.index('top eigenvalue')] == ''
    assert two[head.index('eigenvalue 2, magnitude')] == '1'
    assert one[head.index('top eigenvalue')] == '10' and one[head.index('dead conv1')] == ''


def test_an_evaluation_of_an_earlier_training_is_left_out(tmp_path):
    run = paper_run(tmp_path / 'run', 0, 'constant', [1, 8, 9, 10, 11, 12, 13])
    record.save(tmp_path / 'run/period1.pt', {'trained': torch.tensor(2.)})
    report.main([run, '--out', str(tmp_path / 'results')])
    assert (tmp_path / 'results/table1.md').read_text().count('missing / ') == 90


@pytest.mark.parametrize('name, change', [
    ('evaluate.json', {'columns': {'clean': {}}}), ('evaluate.json', {'n_test': 0}),
    ('evaluate.json', {'columns': []}), ('log.jsonl', [{'epoch': 1}]), ('log.jsonl', [7])])
def test_a_damaged_result_is_a_clear_error(tmp_path, name, change):
    run = paper_run(tmp_path / 'run', 0, 'constant', [1, 8, 9, 10, 11, 12, 13])
    path = tmp_path / 'run' / name
    record.save(path, change if isinstance(change, list) else record.load(path) | change)
    with pytest.raises(ValueError, match='run is damaged or no result'):
        report.main([run, '--out', str(tmp_path / 'results')])


def test_a_damaged_analysis_is_a_clear_error(tmp_path):
    run = analysed_run(tmp_path / 'run', .1, 0, 10, [1, 1, 1, 1])
    for name, content in (('dead_n50.json', []), ('hessian_n50.json', {})):
        before = record.load(tmp_path / 'run' / name)
        record.save(tmp_path / 'run' / name, content)
        with pytest.raises(ValueError, match='is damaged or no result'):
            report.main([run, '--out', str(tmp_path / 'results')])
        record.save(tmp_path / 'run' / name, before)
