import pathlib
import re
from unittest import mock

import numpy as np
import pytest
import torch

import attack
import data
import evaluate
import hessian
import models
import report
import schedule
import train
from lib import record

PAGE = pathlib.Path(train.__file__).parent / 'docs/extending.md'
FLAGS = '--dataset cifar100 --model mlp --eps-sched sqrt --beta 6 --width 1 --epochs 4 --n-iter 2'
FLAGS += ' --n-eval 20 --batch-size 50 --out ckpts/mine'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder where each script has run with all that docs/extending.md adds, as it stands."""
    folder = tmp_path_factory.mktemp('extended')
    x = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    arrays = {'x_train': x, 'x_test': 255 - x}
    arrays |= dict.fromkeys(['y_train', 'y_test'], np.arange(100, dtype=np.uint8))
    record.save(folder / 'data/cifar100.npz', arrays)
    *additions, loss, flag = re.findall('```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    tables = {schedule: 'EPS_SCHEDS', models: 'MODELS', data: 'DATASETS', attack: 'ATTACKS'}
    names, parser = dict(vars(train)), train.parser

    def parser_with_flag():
        p = parser()
        p.conflict_handler = 'resolve'  # train.py may have gained this very flag
        exec(flag, {'add': p.add_argument})
        return p

    with pytest.MonkeyPatch.context() as patch:
        for (module, table), addition in zip(tables.items(), additions):
            patch.setattr(module, table, dict(getattr(module, table)))
            exec(addition, dict(vars(module)))
        exec(loss, names)
        patch.setattr(train, 'training_loss', names['training_loss'])
        patch.setattr(train, 'parser', parser_with_flag)
        patch.chdir(folder)
        train.main(FLAGS.split())
        evaluate.main(['ckpts/mine', '--attacks', 'pgd', 'fgsm'])
        hessian.main(['ckpts/mine', '--k', '2', '--n-examples', '20', '--draws', '1'])
        report.main(['ckpts/mine'])
        yield folder


def test_a_schedule_is_a_ramp(folder):
    log = record.load(folder / 'ckpts/mine/log.jsonl')
    assert [255 * row['eps'] for row in log] == pytest.approx([0, 8, 8, 8])  # 16 sqrt(t), cut


def test_a_model_of_a_dataset_of_100_classes_is_recognised(folder):
    model, config = record.load_model(folder / 'ckpts/mine/period1.pt')
    assert config['dataset'] == 'cifar100' and config['model'] == 'mlp'
    assert len(model.fc2.bias) == 100


def test_an_attack_is_a_column(folder):
    columns = record.load(folder / 'ckpts/mine/evaluate.json')['columns']
    assert columns['clean']['error'] <= columns['fgsm']['error'] <= columns['worst']['error']


def test_a_loss_is_a_function_and_a_setting(folder):
    x, x_adv, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    p, q = x.softmax(1), x_adv.softmax(1)
    expected = -p[range(5), y].log().mean() + 6 * (p * (p / q).log()).sum(1).mean()  # TRADES
    loss, logits = train.training_loss(torch.nn.Identity(), x_adv, x, y, mock.Mock(beta=6))
    assert torch.allclose(loss, expected) and torch.equal(logits, x_adv)
    assert record.load_config(folder / 'ckpts/mine')['beta'] == 6


def test_a_report_shows_all_of_it_and_does_not_take_the_run_for_the_papers(folder):
    page = (folder / 'results/README.md').read_text()
    paper, _, other = page.partition('## Other runs')
    assert '| cifar100' not in paper
    for part in 'mlp on cifar100', '--beta 6', '| FGSM |':
        assert part in other
