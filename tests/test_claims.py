import shutil
import statistics

import pytest
import torch

import analysis
import claims
import figures
import record
import report
import study
import train
from test_report import analysed_run, paper_run


@pytest.mark.parametrize('n', [2, 3, 6])
def test_the_interval_holds_the_truth_19_times_of_20(n):
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(0)).tolist()
    inside = [low < 0 < high for _, low, high in map(claims.interval, draws)]
    assert statistics.mean(inside) == pytest.approx(.95, abs=.015)


@pytest.mark.parametrize('values, verdict', [
    ([], 'not enough data'), ([5.], 'not enough data'), ([5., 5.1], 'holds'),
    ([-5., -5.1], 'does not'), ([5., -5.], 'not enough data'), ([5., 5.], 'not enough data'),
    ([1., 2., 3.], 'not enough data'), ([2., 2.5, 3.], 'holds')])
def test_the_verdict_follows_the_rule(values, verdict):
    assert claims.row('', '', '', values).verdict == verdict


def test_the_papers_own_table_says_what_the_paper_claims():
    rows = [row for cells in report.paper().values() for row in claims.of_table([], cells)
            if row.of_paper]
    assert len(rows) == 4 + 8 + 3 + 8 + 3
    assert all(float(row.of_paper) > 0 for row in rows)


def checked(*folders, theory=()):
    return claims.check(study.find(folders), dict(theory), report.paper())


def smaller(found):
    """The tables of what is not of the paper's size."""
    return [(name, rows) for name, rows in found.items()
            if name not in (claims.WHOLE, 'Section 3, in numbers')]


def row(rows, claim, where=''):
    found, = (row for row in rows if claim in row.claim and where in row.where)
    return found


def table(folder, **change):
    """Runs of three seeds: constant eps is 2 points worse than linear when clean, 5 attacked."""
    return [paper_run(folder / f'{sched}{seed}', seed, sched, [
        1 + seed + 2 * (sched == 'constant') + .1 * seed * (sched == 'linear')]
        + [10 + seed + 5 * (sched == 'constant') + .1 * seed * (sched == 'linear')] * 6, **change)
        for sched in ('constant', 'linear') for seed in (0, 1, 2)]


def test_schedules_are_compared_seed_by_seed(tmp_path):
    found = checked(*table(tmp_path))
    rows = found["At the paper's size"]
    clean = row(rows, 'linear eps beats a constant eps, clean', 'MNIST')
    assert clean.values == pytest.approx([2, 1.9, 1.8]) and clean.of_paper == '0.50'
    assert clean.n == '3 seeds, 10,000 test images' and clean.verdict == 'holds'
    assert 'interval is above 0' in clean.rule
    assert row(rows, 'linear eps beats a constant eps, robust', 'MNIST').values \
        == pytest.approx([5, 4.9, 4.8])
    assert row(rows, 'cosine eps beats a constant eps, clean', 'MNIST').verdict == 'not enough data'
    assert len(rows) == 41 and len(found) == 2


def test_smaller_runs_prove_nothing_at_the_papers_size(tmp_path):
    found = checked(*table(tmp_path, n_train=100))
    assert all(row.verdict == 'not enough data' for row in found.pop("At the paper's size"))
    (heading, rows), = smaller(found)
    assert '100 images of mnist' in heading and [row.verdict for row in rows] == ['holds'] * 2


def test_runs_evaluated_on_fewer_images_are_not_compared_with_whole_ones(tmp_path):
    runs = table(tmp_path)[:3] + table(tmp_path / 'few', n=1000)[3:]
    found = checked(*runs)
    assert all(row.verdict == 'not enough data' for rows in found.values() for row in rows)


def test_an_ensemble_is_compared_with_the_last_model_of_its_schedule(tmp_path):
    runs = [paper_run(tmp_path / f'{len(periods)}{seed}', seed, 'linear',
                      [1] + [10 - 3 * (len(periods) > 1)] * 6, n_train=100, periods=periods)
            for periods in ([100], [50, 25, 25]) for seed in (0, 1)]
    for folder in tmp_path.glob('3*'):
        result = record.load(folder / 'evaluate.json')
        for name in 'period2.pt', 'period3.pt':
            shutil.copy(folder / 'period1.pt', folder / name)
        record.save(folder / 'evaluate.json', result | {'digests': 3 * result['digests']})
    (_, rows), = smaller(checked(*runs))
    assert row(rows, 'ensemble').values == pytest.approx([3, 3])


def test_usable_learning_rates_are_counted_for_each_seed(tmp_path):
    pgd = {('constant', 0): [90, 10, 90], ('linear', 0): [40, 10, 20], ('warm', 0): [90, 30, 90],
           ('constant', 1): [90, 90, 90], ('linear', 1): [40, 10, 90], ('warm', 1): [90, 90, 90]}
    runs = [paper_run(tmp_path / f'{sched}{seed}{lr}', seed, sched.replace('warm', 'constant'),
                      [1, error], lr=lr, lr_warmup=.5 * (sched == 'warm'))
            for (sched, seed), errors in pgd.items()
            for lr, error in zip((1e-4, 1e-3, 1e-2), errors)]
    rows = checked(*runs)["At the paper's size"]
    wider = row(rows, 'widens', 'linear')
    assert wider.values == [2, 2] and wider.n == '2 seeds, 3 rates' and wider.ours == '2, 2'
    assert wider.verdict == 'not enough data' and '3 seeds or more' in wider.rule
    replaced = row(rows, 'does not replace', 'linear')
    assert replaced.values == pytest.approx([(50 + 20 + 70) / 3, (50 + 80 + 0) / 3])
    assert row(rows, 'widens', 'cosine').verdict == 'not enough data'


def test_what_grows_with_eps_is_fitted_in_decades(tmp_path):
    for seed in 0, 1:
        for eps in 0, .1, .2:
            analysed_run(tmp_path / f'{eps}{seed}', eps, seed, 10 ** (1 + 5 * eps + seed), [
                10 ** ((-20 + seed) * eps), 1, 1, 10 ** ((10 + seed) * eps)])
    (_, rows), = smaller(checked(*map(str, tmp_path.iterdir())))
    at_first, end = row(rows, 'at first'), row(rows, 'in the end')
    assert at_first.values == pytest.approx([4, 3.8]) and at_first.verdict == 'holds'
    assert end.verdict == 'holds' and end.n == '2 seeds, 3 budgets to 0.2, 2 updates'
    assert row(rows, 'sharper').values == pytest.approx([1, 1])
    assert row(rows, 'less similar').values == pytest.approx([.4, .4])


def test_constant_classifiers_are_no_minima(tmp_path):
    for eps in 0, .1, .2:
        folder = tmp_path / str(eps)
        analysed_run(folder, eps, 0, 10 ** (1 + 5 * eps), [1, 1, 1, 10 ** (10 * eps)])
        if eps == .2:
            record.save(folder / 'log.jsonl', [
                {'predicted_classes': 1, 'seconds': 1, 'loss': 2.3}])
    (_, rows), = smaller(checked(*map(str, tmp_path.iterdir())))
    assert row(rows, 'sharper').n == ('1 seed, 2 budgets to 0.1, 50 images, constant classifiers '
                                      'left out: 1')
    assert row(rows, 'at first').n == '1 seed, 3 budgets to 0.2, 2 updates'


def test_seeds_are_compared_over_the_budgets_that_all_have(tmp_path):
    for seed, budgets in enumerate([(0, .1, .2), (0, .1)]):
        for eps in budgets:
            analysed_run(tmp_path / f'{eps}{seed}', eps, seed, 10 ** (10 * eps), [1, 1, 1, 1])
    (_, rows), = smaller(checked(*map(str, tmp_path.iterdir())))
    sharper = row(rows, 'sharper')
    assert sharper.values == pytest.approx([1, 1])
    assert sharper.n == '2 seeds, 2 budgets to 0.1, 50 images'


def test_barriers_and_dead_layers_are_compared_at_the_largest_eps(tmp_path):
    for width in 1, 4:
        for seed in 0, 1:
            for eps in 0, .1, .3:
                folder = tmp_path / f'{width}{seed}{eps}'
                analysed_run(folder, eps, seed, 10, [1, 1, 1, 1])
                record.save(folder / 'config.json', record.load(folder / 'config.json')
                            | {'width': width})
                dead = record.load(folder / 'dead_n50.json')
                dead['layers'][0]['all'] = (width, eps) == (1, .3)
                record.save(folder / 'dead_n50.json', dead)
                if seed:
                    other = record.load(tmp_path / f'{width}0{eps}/dead_n50.json')['digest']
                    record.save(folder / 'connect_x.json', dead | {
                        'curve': 'bezier', 'barriers': {'line': 9., 'bezier': eps + seed},
                        'n_control': 5, 'epochs': 1, 'points': [], 'other': other})
    found = checked(*map(str, tmp_path.iterdir()))
    rows = [row for rows in found.values() for row in rows if row.values]
    dead = row(rows, 'dead layers')
    assert dead.values == [1, 1] and 'width 1 - width 4, eps 0.3' in dead.measured
    assert dead.verdict == 'not enough data'  # of two seeds
    connected = [row for row in rows if 'less connected' in row.claim]
    assert [row.values for row in connected] == [pytest.approx([.3])] * 2
    assert connected[0].n == '1 pair'


def test_pairs_with_a_run_in_common_are_not_two(tmp_path):
    digest = {}
    for eps in 0, .1:
        for seed in range(4):
            analysed_run(tmp_path / f'{eps}{seed}', eps, seed, 10, [1, 1, 1, 1])
            digest[eps, seed] = record.load(tmp_path / f'{eps}{seed}/dead_n50.json')['digest']
        for i, (one, other) in enumerate([(0, 1), (1, 2), (2, 3)]):
            record.save(tmp_path / f'{eps}{one}/connect_{other}.json', {
                'eps': eps, 'n': 50, 'digest': digest[eps, one], 'other': digest[eps, other],
                'curve': 'bezier', 'n_control': 5, 'epochs': 1, 'points': [], 'sessions': [],
                'barriers': {'line': 9., 'bezier': eps * (i + 1)}})
    (_, rows), = smaller(checked(*map(str, tmp_path.iterdir())))
    assert row(rows, 'less connected').values == pytest.approx([.1, .3])  # 0-1 and 2-3


def test_section_3_holds_if_every_value_does():
    case = {'points': [{'bound': .5, 'share': .1}, {'bound': .2, 'share': .1}]}
    worse = {'points': [{'bound': .5, 'share': .6}]}
    for cases, verdict in ([case], 'holds'), ([case, worse], 'does not'), ([], 'not enough data'):
        assert next(claims.of_theory({'theorem_2': cases})).verdict == verdict


# which runs may be compared

@pytest.mark.parametrize('flags', [
    '--dataset mnist', '--dataset mnist --eps-sched cosine', '--dataset cifar10',
    '--dataset cifar10 --model vgg --eps-sched linear --periodic',
    '--dataset cifar10 --eps-sched cosine --trace 2000 --seed 7 --n-eval 10'])
def test_the_default_settings_depart_in_nothing_from_the_paper(flags):
    config = vars(train.settings(train.parse(flags.split())))
    assert study.departures(config) == set()
    for change in ({'lr': .5}, {'epochs': 3, 'periods': [3]}, {'n_train': 10}, {'width': 2},
                   {'start': 'eps'}, {'clock': 'batch'}, {'eps': .2}, {'augment': None},
                   {'lr_warmup': .5}, {'precision': 'bf16'}):
        assert study.departures(config | change)


def test_a_run_of_eps_0_belongs_to_every_family_it_fits(tmp_path):
    for name, eps, change in (('0', 0, {}), ('1', .1, {}), ('2', .2, {}),
                              ('3', .1, {'n_iter': 3}), ('4', .2, {'n_iter': 3, 'step_size': .02})):
        analysed_run(tmp_path / name, eps, 0, 10, [1, 1, 1, 1])
        record.save(tmp_path / name / 'config.json',
                    record.load(tmp_path / name / 'config.json') | change)
    runs = study.find(sorted(map(str, tmp_path.iterdir())))
    families = [{run.name for run in group} for group in study.alike(runs, 'eps')]
    assert sorted(map(sorted, families)) == [['0', '1', '2'], ['0', '3', '4']]


# figures

def test_every_figure_is_drawn_where_its_numbers_are(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, 'LAYOUT', 'constrained')
    grid = [{'a': a, 'b': b, 'loss': a * a + b, 'robust_error': .5}
            for a in (0., .5, 1.) for b in (0., .5)]
    for width in 1, 2:
        for eps in 0, .1:
            for seed in 0, 1:
                folder = tmp_path / 'runs' / f'{width}{eps}{seed}'
                analysed_run(folder, eps, seed, 10, [1, 2, 3, 4])
                config = record.load(folder / 'config.json') | {'width': width}
                record.save(folder / 'config.json', config)
                record.save(folder / 'log.jsonl', [
                    {'loss': 1 / (i + 1), 'predicted_classes': 10, 'seconds': 1} for i in range(3)])
                head = record.load(folder / 'dead_n50.json')
                other = record.load((tmp_path / 'runs' / f'{width}{eps}0') / 'dead_n50.json')
                if width == 2:  # of which only C.2.4 is drawn
                    for name in ('hessian_n50.json', 'similarity_n50.json', 'trace.jsonl',
                                 'log.jsonl'):
                        (folder / name).unlink()
                    continue
                record.save(folder / 'surface.json', head | {'points': grid})
                record.save(folder / 'connect_x.json', head | {'other': other['digest'],
                    'curve': 'bezier', 'barriers': {'line': 1, 'bezier': 1}, 'n_control': 5,
                    'epochs': 1, 'points': [
                        {'path': path, 't': t, 'loss': t, 'robust_error': t}
                        for path in ('line', 'bezier') for t in (0, .5, 1)]})
    for sched in 'constant', 'linear', 'warm':
        for lr in 1e-4, 1e-3:
            paper_run(tmp_path / 'runs' / f'{sched}{lr}', 0, sched.replace('warm', 'constant'),
                      [1, 50], lr=lr, lr_warmup=.5 * (sched == 'warm'))
    theory = {'figure_1': {'theta': [-1, 0, 1], 'curves': {key: [1, 0, 1] for key in
                                                           ('0', '0.6', '1.2')}}}
    (tmp_path / 'out').mkdir()
    figures.draw(study.find(sorted(map(str, (tmp_path / 'runs').iterdir()))), theory,
                 tmp_path / 'out')
    drawn = {path.name for path in (tmp_path / 'out').iterdir() if path.stat().st_size > 5000}
    assert drawn == {'fig1.png', 'fig5_mnist.png', 'c23_mnist.png', 'c24_mnist5k.png'} | {
        f'{name}_mnist5k_lenet_1_constant.png'
        for name in ('fig8', 'fig3', 'fig4', 'fig11', 'fig12', 'c25')}


# what reviewers found

def test_runs_of_one_name_in_two_folders_keep_their_own_numbers(tmp_path):
    for place, lr, error in (('x', 1e-3, 10), ('y', 3e-3, 90)):
        paper_run(tmp_path / place / 'run', 0, 'constant', [1, *[error] * 6], lr=lr)
    report.main([str(tmp_path / 'x/run'), str(tmp_path / 'y/run'), '--out', str(tmp_path / 'out')])
    text = (tmp_path / 'out/table1.md').read_text()
    assert '| constant, lr 0.001 | 1.00 | 10.00 |' in text
    assert '| constant, lr 0.003 | 1.00 | 90.00 |' in text


@pytest.mark.parametrize('change', [{'eps_max': .41}, {'eps_min': .3}])
def test_a_schedule_of_ones_own_is_no_evidence_at_the_papers_size(tmp_path, change):
    runs = [paper_run(tmp_path / f'{sched}{seed}', seed, sched, [
        5 * (sched == 'constant'), *[20 * (sched == 'constant')] * 6],
        **(change if sched == 'linear' else {}))
        for sched in ('constant', 'linear') for seed in (0, 1, 2)]
    assert all(row.verdict == 'not enough data' for row in checked(*runs)["At the paper's size"])


def test_a_diverged_run_errs_at_its_learning_rate(tmp_path):
    for seed in 0, 1, 2:
        for sched in 'constant', 'linear':
            for lr in 1e-3, 1e-2:
                folder = tmp_path / f'{sched}{seed}{lr}'
                paper_run(folder, seed, sched, [1, 10], lr=lr)
                if (sched, lr) == ('constant', 1e-2):
                    (folder / 'period1.pt').unlink()
                    (folder / 'evaluate.json').unlink()
                    record.save(folder / 'diverged.json', {'epoch': 3})
    found = checked(*map(str, tmp_path.iterdir()))["At the paper's size"]
    wider = row(found, 'widens', 'linear')
    assert wider.values == [1, 1, 1] and wider.verdict == 'holds'


def test_a_warm_up_of_both_is_no_warm_up_of_the_learning_rate_alone(tmp_path):
    for name, sched, warmup, error in (('a', 'constant', .5, 20), ('b', 'linear', 0, 30),
                                       ('c', 'linear', .5, 80)):
        for seed in 0, 1:
            paper_run(tmp_path / f'{name}{seed}', seed, sched, [1, error], lr_warmup=warmup)
    found = checked(*map(str, tmp_path.iterdir()))["At the paper's size"]
    assert row(found, 'does not replace', 'linear').values == pytest.approx([-10, -10])


def test_analyses_of_few_images_are_not_of_the_papers_size_nor_mixed_with_others(tmp_path):
    def family(n_of, **change):
        for seed in 0, 1:
            for eps in 0, .2, .4:
                folder = tmp_path / f'{seed}{eps}'
                config = vars(train.settings(train.parse([
                    '--dataset', 'mnist', '--eps', str(eps), '--seed', str(seed)])))
                analysed_run(folder, eps, seed, 10 ** (1 + (5 + .1 * seed) * eps), [1, 1, 1, 1])
                record.save(folder / 'config.json', config | {'sessions': [], 'trace': 2} | change)
                path = folder / 'hessian_n50.json'
                record.save(path, record.load(path) | {'n': n_of(eps)})
        found = checked(*map(str, tmp_path.iterdir()))
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        return found

    whole = row(family(lambda eps: 60000)["At the paper's size"], 'sharper', 'MNIST')
    assert whole.verdict == 'holds' and '60000 images' in whole.n
    few = row(family(lambda eps: 50)["At the paper's size"], 'sharper', 'MNIST')
    assert few.verdict == 'not enough data'
    (_, mixed), = smaller(family(lambda eps: 50 if eps else 40, n_train=100))
    assert '2 budgets to 0.4, 50 images' in row(mixed, 'sharper').n


def test_saddles_are_not_sharp_minima(tmp_path):
    for seed in 0, 1:
        for eps, top in ((0, 1.), (.1, 2.), (.2, -50.)):
            analysed_run(tmp_path / f'{eps}{seed}', eps, seed, top, [1, 1, 1, 1])
    (_, rows), = smaller(checked(*map(str, tmp_path.iterdir())))
    assert '2 budgets to 0.1' in row(rows, 'sharper').n


def test_worst_of_some_attacks_is_not_averaged_with_worst_of_all(tmp_path):
    runs = [paper_run(tmp_path / str(seed), seed, 'constant', [1, 10, 11, 12, 13, 14, 20])
            for seed in (0, 1)]
    path = tmp_path / '1/evaluate.json'
    result = record.load(path)
    for key in claims.ATTACKS[1:]:
        del result['columns'][key]
    record.save(path, result)
    report.main([*runs, '--out', str(tmp_path / 'out')])
    text, = (line for line in (tmp_path / 'out/table1.md').read_text().splitlines()
             if line.startswith('| MNIST LeNet | no | constant'))
    assert text.endswith('| 20.00 | 2, 1 with all attacks | 3.0 |') and '14.00 / 19.58' in text


def test_precisions_have_a_table_and_rows_each(tmp_path):
    runs = table(tmp_path) + table(tmp_path / 'bf16', precision='bf16')
    rows = [row for row in checked(*runs)["At the paper's size"] if row.values]
    assert [row.where for row in rows] == ['MNIST LeNet'] * 2 + ['MNIST LeNet, bf16'] * 2 \
        or [row.where for row in rows] == ['MNIST LeNet, bf16'] * 2 + ['MNIST LeNet'] * 2
    report.main([*runs, '--out', str(tmp_path / 'out')])
    text = (tmp_path / 'out/table1.md').read_text()
    assert text.count("at the paper's size\n") == 1 and text.count("size, trained in bf16\n") == 1
    assert text.count('| 3 | 3.0 |') == 4
