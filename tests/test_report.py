import csv
import shutil

import pytest

import evaluate
import record
import report


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
    assert text in capsys.readouterr().out and text.count('| schedule |') == 1
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


def test_without_any_evaluation_the_way_out_is_told(runs, tmp_path):
    with pytest.raises(ValueError, match='evaluate.py'):
        report.main([str(runs / 'single'), '--out', str(tmp_path / 'results')])
    assert not (tmp_path / 'results').exists()
