import shutil
import types

import numpy as np
import pytest
import torch

import data


def test_mnist5k_is_real_digits_in_unit_range_split_evenly(data_dir):
    x, y, x_test, y_test = data.load('mnist5k', data_dir)
    assert x.shape == (4000, 1, 28, 28) and x_test.shape == (1000, 1, 28, 28)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert (x.min(), x.max()) == (0, 1)
    assert y.bincount().tolist() == [400] * 10 and y_test.bincount().tolist() == [100] * 10
    # no test image among the training ones
    assert len({image.numpy().tobytes() for image in torch.cat([x, x_test])}) == 5000
    zeros, ones = x[y == 0].mean(0)[0], x[y == 1].mean(0)[0]
    assert zeros[14, 14] < .1 < .5 < ones[14, 14]  # a nought is empty in the middle, a one is not


def test_the_second_start_reads_the_npz_and_gives_the_same(data_dir, monkeypatch):
    first = data.load('mnist5k', data_dir)
    monkeypatch.setattr(data, 'parse_mnist5k', None)
    assert all(torch.equal(a, b) for a, b in zip(first, data.load('mnist5k', data_dir)))


def rewrite(data_dir, tmp_path, **changes):
    """A copy of mnist5k.npz with some arrays replaced, or left out where None."""
    arrays = dict(np.load(data_dir / 'mnist5k.npz')) | changes
    kept = {key: value for key, value in arrays.items() if value is not None}
    np.savez(tmp_path / 'mnist5k.npz', **kept)
    return arrays


def test_the_order_of_the_images_does_not_matter_to_the_check(data_dir, tmp_path):
    arrays = dict(np.load(data_dir / 'mnist5k.npz'))
    order = np.random.default_rng(0).permutation(4000)
    rewrite(data_dir, tmp_path, x_train=arrays['x_train'][order], y_train=arrays['y_train'][order])
    x, _, _, _ = data.load('mnist5k', tmp_path)
    assert torch.equal(x[0, 0], torch.from_numpy(arrays['x_train'][order[0]]) / 255)


@pytest.mark.parametrize('change, message', [
    ({'y_test': None}, 'y_test .* is missing'),
    ({'x_train': np.zeros((4000, 28, 27), np.uint8)}, r'x_train .* \(4000, 28, 27\)'),
    ({'x_train': np.zeros((4000, 28, 28), np.float32)}, 'float32'),
    ({'y_test': np.full(1000, 10, np.uint8)}, 'up to 10'),
    ({'x_test': np.zeros((1000, 28, 28), np.uint8)}, 'test images and labels are not'),
    ({'y_train': np.zeros(4000, np.uint8)}, 'train images and labels are not')])
def test_a_wrong_file_is_refused_by_name(data_dir, tmp_path, change, message):
    rewrite(data_dir, tmp_path, **change)
    with pytest.raises(ValueError, match=f'mnist5k.npz is not mnist5k.*{message}'):
        data.load('mnist5k', tmp_path)


@pytest.mark.parametrize('damage', [
    lambda whole: whole[:len(whole) // 2], lambda whole: b'', lambda whole: b'no npz at all',
    lambda whole: whole[:5000] + b'\0' * 200 + whole[5200:]])
def test_a_truncated_or_damaged_file_is_refused_by_name(data_dir, tmp_path, damage):
    path = tmp_path / 'mnist5k.npz'
    path.write_bytes(damage((data_dir / 'mnist5k.npz').read_bytes()))
    with pytest.raises(ValueError, match='mnist5k.npz is (truncated|not mnist5k)'):
        data.load('mnist5k', tmp_path)
    assert path.exists()


def test_without_file_and_network_the_error_says_what_was_looked_for_and_the_ways_out(
        tmp_path, monkeypatch):
    from torchvision import datasets

    def no_network(*args, **kwargs):
        raise OSError('name resolution failed')

    monkeypatch.setattr(datasets, 'CIFAR10', no_network)
    with pytest.raises(FileNotFoundError) as error:
        data.load('cifar10', tmp_path)
    for part in (str(tmp_path / 'cifar10.npz'), 'name resolution failed', '--data-dir', 'network',
                 'mnist5k'):
        assert part in str(error.value)


def test_a_download_is_kept_as_npz(data_dir, tmp_path, monkeypatch):
    from torchvision import datasets
    arrays = dict(np.load(data_dir / 'mnist5k.npz'))

    def source(root, train, download):
        split = 'train' if train else 'test'
        assert download
        return types.SimpleNamespace(data=torch.from_numpy(arrays[f'x_{split}']),
                                     targets=arrays[f'y_{split}'].tolist())

    monkeypatch.setattr(datasets, 'MNIST', source)
    monkeypatch.setitem(data.SPLITS, 'mnist', data.SPLITS['mnist5k'])
    first = data.load('mnist', tmp_path / 'new')
    shutil.copy(tmp_path / 'new/mnist.npz', tmp_path / 'mnist.npz')
    monkeypatch.setattr(datasets, 'MNIST', None)
    assert all(torch.equal(a, b) for a, b in zip(first, data.load('mnist', tmp_path)))


def test_unknown_datasets_are_named():
    with pytest.raises(ValueError, match='svhn'):
        data.load('svhn')


def test_color_images_come_with_channels_first(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    arrays = {'x_train': random.integers(0, 256, (20, 32, 32, 3), np.uint8),
              'y_train': np.arange(20, dtype=np.uint8) % 10,
              'x_test': random.integers(0, 256, (5, 32, 32, 3), np.uint8),
              'y_test': np.arange(5, dtype=np.uint8)}
    np.savez(tmp_path / 'cifar10.npz', **arrays)
    monkeypatch.setitem(data.SPLITS, 'cifar10', {
        split: (n, (32, 32, 3), data.crc(arrays[f'x_{split}'], arrays[f'y_{split}']))
        for split, n in (('train', 20), ('test', 5))})
    x, y, x_test, _ = data.load('cifar10', tmp_path)
    assert x.shape == (20, 3, 32, 32) and x_test.shape == (5, 3, 32, 32)
    assert x[7, 2, 5, 9] == pytest.approx(arrays['x_train'][7, 5, 9, 2] / 255)


def test_subsets_are_fixed_and_nested():
    assert torch.equal(data.subset(1000, 200), data.subset(1000, 200))
    some, more = (set(data.subset(1000, k).tolist()) for k in (200, 300))
    assert some < more < set(range(1000))
    assert data.subset(10).tolist() == data.subset(10, 10).tolist() == list(range(10))
    for k in (11, -1):
        with pytest.raises(ValueError, match=str(k)):
            data.subset(10, k)


def test_batches_hold_every_example_once_the_last_one_ragged():
    x, y = torch.arange(10.)[:, None, None, None], torch.arange(10)
    found = list(data.batches(x, y, 4, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in found] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in found]).tolist()) == list(range(10))
    assert all(torch.equal(images.flatten(), labels.float()) for images, labels in found)
    again = data.batches(x, y, 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([labels for _, labels in found]),
                       torch.cat([labels for _, labels in again]))


def test_crop_and_flip_takes_each_shift_of_the_padded_image_straight_and_mirrored():
    image = torch.arange(1., 2 * 5 * 5 + 1).view(1, 2, 5, 5)
    padded = torch.zeros(2, 9, 9)
    padded[:, 2:7, 2:7] = image
    possible = {}
    for down in range(5):
        for right in range(5):
            crop = padded[:, down:down + 5, right:right + 5]
            possible |= {crop.numpy().tobytes(): 0, crop.flip(2).numpy().tobytes(): 0}
    generator = torch.Generator().manual_seed(0)
    crops = data.crops(20000, generator, padding=2)
    for crop in data.crop_and_flip(image.expand(20000, -1, -1, -1), crops, padding=2):
        possible[crop.contiguous().numpy().tobytes()] += 1  # KeyError for a crop that is none
    assert len(possible) == 50 and all(300 <= count <= 500 for count in possible.values())


def test_augmentation_is_decided_by_its_generator():
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    one, same, other = (
        [images for images, _ in data.batches(x, y, 3, torch.Generator().manual_seed(seed), True)]
        for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not torch.equal(one[0], other[0]) and [len(a) for a in one] == [3, 3, 2]
    assert torch.cat(one).shape == x.shape


def test_each_image_of_a_batch_is_cropped_by_its_own_draw():
    x = torch.rand(4, 1, 6, 6)
    crops = torch.tensor([[4, 4, 0], [4, 4, 1], [5, 4, 0], [4, 3, 0]])  # padding 4: 4 is no shift
    found = data.crop_and_flip(x, crops)
    assert torch.equal(found[0], x[0]) and torch.equal(found[1], x[1].flip(2))
    assert torch.equal(found[2][:, :5], x[2][:, 1:]) and found[2][:, 5].eq(0).all()
    assert torch.equal(found[3][:, :, 1:], x[3][:, :, :5]) and found[3][:, :, 0].eq(0).all()


def test_the_papers_settings_follow_the_budget():
    mnist, cifar10 = data.paper('mnist'), data.paper('cifar10')
    assert (mnist['eps'], mnist['step_size'], mnist['n_iter'], mnist['pgd100_step_size']) \
        == (.4, .01, 50, .01)
    assert mnist['eps_max'] == pytest.approx({'linear': .8, 'cosine': .6})
    assert [255 * cifar10[key] for key in ('eps', 'step_size', 'pgd100_step_size')] \
        == pytest.approx([8, 2, 1])
    assert data.paper('mnist', .1)['n_iter'] == 20
    assert data.paper('cifar10', 4 / 255)['n_iter'] == 10
