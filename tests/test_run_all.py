import os
import pathlib
import shlex
import subprocess
import time

import pytest

import evaluate
import hessian
import landscape
import report
import study
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


@pytest.mark.parametrize('first, second', [(0, 0), (1, 0), (0, 1)])
def test_all_tests_are_run_in_two_halves_and_either_may_fail(tmp_path, first, second):
    python = tmp_path / 'python3'
    python.write_text('#!/bin/sh\n[ "$2" = pytest ] || exit 0\necho "$@"\n'
                      f'case "$*" in *test_train*) exit {first};; *) exit {second};; esac\n')
    python.chmod(0o755)
    done = run_all('--test', PYTHON=str(python))
    assert done.returncode == (first or second)
    halves = [set(line.split()[3:]) for line in done.stdout.splitlines() if 'pytest' in line]
    files = {f'tests/{path.name}' for path in (HERE / 'tests').glob('test_*.py')}
    assert len(halves) == 2 and halves[0] | halves[1] == files and not halves[0] & halves[1]


def test_an_unknown_flag_is_named_with_the_way_out():
    done = run_all('--fast')
    assert done.returncode == 1 and "'--fast'" in done.stderr and '--help' in done.stderr
    assert '--quick' in run_all('--help').stdout


def test_the_full_table_is_not_begun_without_a_gpu_unasked(tmp_path):
    (tmp_path / 'python3').write_text('#!/bin/sh\ncase "$2" in *cuda*) exit 1 ;; esac\n')
    (tmp_path / 'python3').chmod(0o755)
    done = run_all(PYTHON=str(tmp_path / 'python3'))
    assert done.returncode == 1 and '--quick' in done.stderr and '--cpu' in done.stderr
    assert 'hours of one' in done.stderr


def jobs_of(*flags, **environment):
    """The jobs of --list as lists of commands, (script, flags), and their costs."""
    done = run_all('--list', *flags, **environment)
    assert done.returncode == 0, done.stderr
    jobs, costs = [], []
    for line in done.stdout.splitlines():
        line, cost = line.removeprefix('export OMP_NUM_THREADS=1; ').split(' # ')
        costs.append(int(cost.split()[0]))
        jobs.append([shlex.split(command)[1:] for command in line.split(' && ')])
    assert f'{len(jobs)} jobs, {sum(costs)} ' in done.stderr
    return jobs, costs


@pytest.mark.parametrize('table', [[], ['--small'], ['--quick']])
def test_the_list_asks_the_scripts_only_for_what_they_know(table, tmp_path):
    images = tmp_path / 'my images'
    images.mkdir()
    jobs, _ = jobs_of(*table, DATA_DIR=str(images))
    scripts = {'train.py': train, 'evaluate.py': evaluate, 'hessian.py': hessian,
               'landscape.py': landscape}
    trained = {}
    for job in jobs:
        for script, *flags in job:
            args = scripts[script].parse(flags)
            assert args.data_dir == str(images)
            if script == 'train.py':  # the same run has the same flags wherever it is named
                settings = vars(train.settings(args))
                assert trained.setdefault(args.out, settings) == settings
            else:
                named = {flag for flag in flags if flag.startswith('ckpts/')}
                assert named <= {train.parse(rest).out for name, *rest in job
                                 if name == 'train.py'}  # so no job waits for another
    kinds = {' '.join(command[:2]) for job in jobs for command in job if command[0] != 'train.py'}
    for part in ('landscape.py similarity', 'landscape.py surface', 'landscape.py connect',
                 'landscape.py dead', 'landscape.py theory'):
        assert part in kinds


def test_the_list_covers_the_papers_table():
    jobs, costs = jobs_of('table1')
    rows = {}
    for job in jobs:
        assert [command[0] for command in job] == ['train.py', 'evaluate.py'] and len(job[1]) <= 3
        config = vars(train.settings(train.parse(job[0][1:])))
        assert not study.departures(config)
        key = config['dataset'], config['model'], len(config['periods']) > 1, config['eps_sched']
        rows.setdefault(key, set()).add(config['seed'])
    wanted = {(*task, periodic, sched) for task, cells in report.paper().items()
              for periodic, sched, _ in cells}
    assert set(rows) == wanted and len(wanted) == 15 and min(costs) > 0
    assert all(seeds == {0, 1, 2} for seeds in rows.values())


def test_the_list_covers_the_papers_studies():
    def settings(*parts):
        found = [vars(train.settings(train.parse(command[1:]))) for job in jobs_of(*parts)[0]
                 for command in job if command[0] == 'train.py']
        return [config for config in found if config['seed'] == 0]

    budgets = {(c['model'], round(c['eps'] * 255, 3) if c['dataset'] == 'cifar10' else c['eps'])
               for c in settings('fig2', 'fig8') if c['trace'] == 2000}
    assert budgets == {('resnet18', eps) for eps in (0, 2, 4, 8)} | {
        ('lenet', eps) for eps in (0, .1, .2, .3, .4)}
    rates = {(c['lr'], c['eps_sched'], c['lr_warmup']) for c in settings('fig5', 'c23')}
    lrs = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert rates == {(lr, sched, 0) for lr in lrs for sched in ('constant', 'linear', 'cosine')} | {
        (lr, 'constant', .5) for lr in lrs}
    assert len({c['width'] for c in settings('c24')}) == 4
    assert {c['eps'] for c in settings('c25')} == {0, .4, 8 / 255}


def test_parts_and_seeds_and_flags_choose_the_jobs():
    whole, _ = jobs_of()
    assert len(jobs_of('fig1')[0]) == 1 and len(jobs_of('appendix')[0]) < len(whole)
    assert {seed for job in jobs_of('table1', SEEDS='7')[0] for command in job
            for flag, seed in zip(command, command[1:]) if flag == '--seed'} == {'7'}
    assert len(jobs_of('table1', SEEDS='7')[0]) == 15
    for job in jobs_of('table1', '--', '--precision', 'bf16')[0]:
        assert '--precision bf16' in ' '.join(job[0]) and '--precision' not in job[1]
    assert "no part 'fig7'" in run_all('fig7', '--list').stderr


def test_shards_are_all_jobs_and_each_once():
    whole = [str(job) for job in jobs_of('--quick')[0]]
    shards = [str(job) for i in (1, 2, 3) for job in jobs_of('--quick', '--shard', f'{i}/3')[0]]
    assert sorted(shards) == sorted(whole) and shards != whole


@pytest.mark.parametrize('shard', ['0/2', '3/2', 'two', '1/0'])
def test_a_shard_that_is_none_is_a_clear_error(shard):
    done = run_all('--quick', '--list', '--shard', shard)
    assert done.returncode == 1 and f"'{shard}'" in done.stderr and 'I/N' in done.stderr


@pytest.fixture
def bench(tmp_path):
    """A copy of run_all.sh in a folder of its own, and a python3 that only takes notes.

    It keeps what it is given in `commands`, waits while `hold` is there at a run named slow, and
    fails where a run is named bad.
    """
    (tmp_path / 'run_all.sh').write_text((HERE / 'run_all.sh').read_text())
    stub = tmp_path / 'python3'
    stub.write_text('''#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >> commands
case "$*" in *hold*) touch held; while [ -e hold ]; do sleep .05; done ;; esac
case "$*" in *bad*) echo it broke; exit 3 ;; esac
[ "$1" != train.py ] || { mkdir -p $3; touch $3/config.json $3/period1.pt; }
''')
    stub.chmod(0o755)
    table = """quick() {
    run table1,fig2 5 one --epochs 1
    also table1 5 evaluate.py $run
    run table1 5 bad_run --epochs 1
    also table1 5 evaluate.py $run
    run table1 5 hold_run --epochs 1
    run table1 5 last
}
paper() {"""
    text = (tmp_path / 'run_all.sh').read_text().replace('quick() {', 'unused() {')
    (tmp_path / 'run_all.sh').write_text(text.replace('paper() {', table))
    return tmp_path


def start(bench, *flags, **environment):
    environment = os.environ | {'PYTHON': str(bench / 'python3'), 'JOBS': '1'} | environment
    return subprocess.Popen(['bash', str(bench / 'run_all.sh'), '--quick', *flags],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def commands(bench):
    """What the stub was given since the last look, but for reports."""
    path = bench / 'commands'
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [' '.join(line.split()[:3]) for line in lines if not line.startswith('report.py')]


def test_a_failed_job_is_named_at_the_end_with_its_log_and_stops_no_other(bench):
    process = start(bench)
    out, _ = process.communicate()
    assert process.returncode == 1 and '1 of 4 jobs failed or stopped' in out
    assert out.rstrip().endswith('logs/bad_run.log') and 'bad_run FAILED: it broke' in out
    assert (bench / 'logs/bad_run.log').read_text() == 'it broke\n'
    done = commands(bench)
    assert 'train.py --out ckpts/last' in done and 'evaluate.py ckpts/one --device' in done
    assert 'evaluate.py ckpts/bad_run --device' not in done


def test_finished_jobs_are_not_looked_at_again_unless_files_of_them_are_lost(bench):
    start(bench).communicate()
    commands(bench)
    out, _ = start(bench).communicate()
    assert '3 of 4 jobs are finished' in out and commands(bench) == ['train.py --out ckpts/bad_run']
    (bench / 'ckpts/last/period1.pt').unlink()
    start(bench).communicate()
    assert commands(bench) == ['train.py --out ckpts/bad_run', 'train.py --out ckpts/last']
    start(bench, '--', '--lr', '1').communicate()  # other flags, other jobs
    assert 'train.py --out ckpts/one' in commands(bench)


def test_on_another_machine_finished_jobs_stay_finished(bench):
    start(bench).communicate()
    (bench / 'python3').rename(bench / 'python3.12')
    out, _ = start(bench, PYTHON=str(bench / 'python3.12'), DATA_DIR='/').communicate()
    assert '3 of 4 jobs are finished' in out


def test_when_all_is_done_the_exit_code_says_so(bench):
    start(bench).communicate()
    (bench / 'python3').write_text((bench / 'python3').read_text().replace('*bad*', '*none*'))
    process = start(bench)
    process.communicate()
    assert process.returncode == 0


def test_killed_by_force_it_begins_no_further_job_and_goes_on_when_started_again(bench):
    (bench / 'hold').touch()
    process = start(bench)
    while not (bench / 'held').exists():
        time.sleep(.05)
    process.kill()  # it stays a zombie until it is waited for
    (bench / 'hold').unlink()
    process.communicate()  # until what it left has ended, too
    assert 'train.py --out ckpts/last' not in commands(bench)
    start(bench).communicate()
    assert commands(bench) == ['train.py --out ckpts/bad_run', 'train.py --out ckpts/last']


def test_jobs_run_side_by_side(bench):
    (bench / 'hold').touch()
    process = start(bench, JOBS='2')
    while not (bench / 'ckpts/last/period1.pt').exists():  # while hold_run is held
        time.sleep(.05)
    (bench / 'hold').unlink()
    process.communicate()
    assert 'train.py --out ckpts/hold_run' in commands(bench)


def test_an_existing_scheduler_can_run_the_list(bench):
    lines, _ = start(bench, '--list').communicate()
    lines = [line for line in lines.splitlines() if 'jobs,' not in line]
    subprocess.run(['xargs', '-d', '\n', '-P', '2', '-I', '{}', 'bash', '-c', '{}'],
                   input='\n'.join(lines), text=True, cwd=bench, capture_output=True)
    assert sorted(commands(bench)) == sorted(
        [f'train.py --out ckpts/{name}' for name in ('one', 'bad_run', 'hold_run', 'last')]
        + ['evaluate.py ckpts/one --device'])


def test_without_room_on_the_disk_nothing_begins(bench):
    df = bench / 'df'
    df.write_text('#!/bin/sh\necho Filesystem 1M Used Available\necho my disk 100 90 10 90% /\n')
    df.chmod(0o755)
    out, _ = start(bench, PATH=f'{bench}:{os.environ["PATH"]}').communicate()
    assert 'the disk is too small' in out and 'of the 10 MB free' in out
    assert commands(bench) == []


# what reviewers found

def test_a_run_that_stopped_early_is_not_done(bench):
    stub = (bench / 'python3').read_text()
    (bench / 'python3').write_text(stub.replace('$3/period1.pt', '$3/last.pt'))
    process = start(bench)
    out, _ = process.communicate()
    assert process.returncode == 1 and 'last: stopped' in out and '4 of 4 jobs failed or st' in out


def test_without_a_log_a_job_is_not_taken_for_done(bench):
    (bench / 'logs/one.log').mkdir(parents=True)
    process = start(bench)
    out, _ = process.communicate()
    assert process.returncode == 1 and 'logs/one.log cannot be written' in out
    assert 'train.py --out ckpts/one' not in commands(bench)


def test_what_is_lost_is_missed_also_after_a_part_was_made_again(bench):
    start(bench).communicate()
    (bench / 'ckpts/one/evaluate.json').write_text('{}')
    (bench / 'logs/one.done').open('a').write('ckpts/one/evaluate.json\n')
    (bench / 'ckpts/one/evaluate.json').unlink()
    start(bench, 'fig2').communicate()  # trains only
    commands(bench)
    start(bench).communicate()
    assert 'evaluate.py ckpts/one --device' in commands(bench)


def test_paths_may_hold_spaces(bench):
    place = bench / 'my folder'
    place.mkdir()
    for name in 'python3', 'run_all.sh':
        (bench / name).rename(place / name)
    images = bench / 'my images'
    images.mkdir()
    for _ in range(2):
        out, _ = start(place, DATA_DIR=str(images)).communicate()
    assert '3 of 4 jobs are finished' in out
    images.rename(bench / 'other')
    out, _ = start(place, DATA_DIR=str(bench / 'other')).communicate()
    assert '3 of 4 jobs are finished' in out


@pytest.mark.parametrize('flags', [['--seed', '7'], ['--out', 'x'], ['--seed=7'], ['--wait'],
                                   ['--data-dir', 'x']])
def test_flags_that_the_table_needs_are_refused(bench, flags):
    process = start(bench, '--', *flags)
    assert 'SEEDS and DATA_DIR' in process.communicate()[0] and process.returncode == 1
    assert commands(bench) == []


def test_flags_are_no_shell_code(bench):
    start(bench, '--', '--lr', '1e-3; touch pwned #').communicate()
    assert not (bench / 'pwned').exists()


@pytest.mark.parametrize('environment', [
    {'JOBS': '0'}, {'JOBS': 'many'}, {'SEEDS': '0 0'}, {'SEEDS': '0,1'}, {'SEEDS': ' '},
    {'DATA_DIR': '/nowhere'}])
def test_what_is_no_number_or_folder_is_a_clear_error(bench, environment):
    process = start(bench, **environment)
    (name, value), = environment.items()
    assert f'{name}={value} is no' in process.communicate()[0] and process.returncode == 1
    assert commands(bench) == []


def test_an_empty_part_is_not_all(bench):
    assert start(bench, '').wait() == 1 and commands(bench) == []


def test_a_report_that_fails_does_not_hide_the_jobs_that_failed(bench):
    stub = (bench / 'python3').read_text()
    (bench / 'python3').write_text(stub + '\n[ "$1" != report.py ] || exit 4\n')
    out, _ = start(bench).communicate()
    assert out.rstrip().endswith('logs/bad_run.log')


def test_reports_are_of_the_runs_of_the_table_only(bench):
    (bench / 'ckpts/mine').mkdir(parents=True)
    (bench / 'ckpts/mine/config.json').touch()
    start(bench, 'fig2').communicate()
    report, = [line for line in (bench / 'commands').read_text().splitlines() if 'report' in line]
    assert 'mine' not in report and 'ckpts/one' in report
