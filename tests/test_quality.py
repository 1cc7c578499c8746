"""The metrics of tools/quality.py on sets whose scores are known."""

import functools
import json

import numpy as np
import pytest
import quality
import torch
from PIL import Image

import common


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_closed_forms():
    """Between N(m, s^2 I) and N(0, I) it is |m|^2 + d (s - 1)^2: exact when one set is a map of
    the other."""
    x = gaussian(2000, 4)
    # Its mean and covariance become exactly those of N(0, I).
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert quality.frechet_distance(x, x + shift) == pytest.approx(5.25, rel=1e-6)
    assert quality.frechet_distance(x, 3 * x) == pytest.approx(4 * (3 - 1) ** 2, rel=1e-6)
    a = gaussian(4, 4, 3)
    cov = a @ a.T  # tr(I + C - 2 C^(1/2)) for a linear map with covariance C
    expected = (torch.linalg.eigvalsh(cov).sqrt() - 1).square().sum()
    assert quality.frechet_distance(x, x @ a.T) == pytest.approx(expected.item(), rel=1e-6)


def test_classes():
    even, one = torch.arange(1000) % 10, torch.full((1000,), 3)
    assert quality.classes_covered(even, 10) == 10 and quality.classes_covered(one, 10) == 1
    # 0.9% is less than a tenth of an equal share.
    few = torch.cat([torch.zeros(991), torch.ones(9)]).long()
    assert quality.classes_covered(few, 10) == 1


def test_precision_and_recall():
    x = gaussian(300, 3)
    assert quality.precision_recall(x, x) == (1, 1)
    assert quality.precision_recall(x, x + 100) == (0, 0)
    both = torch.cat([x, x + 100])
    # One of two modes: all real, half of it covered.
    precision, recall = quality.precision_recall(both, x)
    assert precision == 1 and recall == pytest.approx(0.5, abs=0.01)
    precision, recall = quality.precision_recall(x, both)
    assert precision == pytest.approx(0.5, abs=0.01) and recall == 1
    collapsed = x[:1] + 1e-6 * gaussian(300, 3, 1)
    precision, recall = quality.precision_recall(x, collapsed)
    assert precision == 1 and recall < 0.05


def test_precision_reaches_to_the_kth_neighbour():
    """That of the ball at 0, which is k away: one fake lies inside it, and one outside."""
    real = torch.arange(10.0, dtype=torch.float64)[:, None]
    for k in (2, 5):
        fake = torch.tensor([[0.5 - k], [-0.5 - k]], dtype=torch.float64).repeat(3, 1)
        assert quality.precision_recall(real, fake, k)[0] == 0.5


@pytest.fixture(autouse=True)
def small_classifier(monkeypatch):
    monkeypatch.setattr(quality, "Classifier", functools.partial(quality.Classifier, width=8))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def scored(folder, data_dir, capsys, *flags):
    argv = f"digits {folder} --cache-dir {data_dir} --device cpu --classifier-steps 40".split()
    quality.main([*argv, *flags])
    out, err = capsys.readouterr()
    assert "of these look real, " in err.splitlines()[-1]
    return json.loads(out)


def test_other_labels_need_another_classifier(tmp_path):
    """Own images that are sorted into other folders are not scored by the classifier of before."""
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    for labels in ([0, 0, 1, 1], [0, 1, 1, 1]):
        quality.trained_classifier("own", images, torch.tensor(labels), 2, tmp_path, "cpu", 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_program(tmp_path, data_dir, capsys, monkeypatch):
    """Real digits score like the floor, a collapsed set badly; the same twice; the classifier is
    kept."""
    draw = common.draw_digits

    def fewer_by_class(n, size, seed):
        images, labels = draw(300, size, seed)
        return images[labels.argsort()], labels.sort().values

    monkeypatch.setattr(common, "draw_digits", fewer_by_class)
    images, labels = draw(200, 32, seed=7)
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{i:06d}_class{label}.png"
        Image.fromarray(image[0].numpy()).save(tmp_path / "good" / name)
        Image.fromarray(images[0, 0].numpy()).save(tmp_path / "bad" / name)
    good = scored(tmp_path / "good", data_dir, capsys)
    assert good["classes"] == 10 and good["label_accuracy"] > 0.6
    assert good["distance"] < 3 * good["floor"]["distance"]
    assert good["floor"]["classes"] == 10, (
        "of a random part of the test images, which may come sorted"
    )
    assert good["floor"]["label_accuracy"] > 0.6, "and of their own labels"
    assert [p.name[:10] for p in data_dir.iterdir()] == ["digits-40-"]
    bad = scored(tmp_path / "bad", data_dir, capsys)
    assert bad["classes"] == 1 and bad["label_accuracy"] < 0.3
    assert bad["distance"] > 10 * good["distance"] and bad["recall"] < 0.1
    assert scored(tmp_path / "good", data_dir, capsys) == good
    (tmp_path / "copies").mkdir()
    for i, image in enumerate(fewer_by_class(0, 32, 0)[0][::30]):
        Image.fromarray(image[0].numpy()).save(tmp_path / "copies" / f"{i}.png")
    scored(tmp_path / "copies", data_dir, capsys, "--neighbours", str(data_dir / "pairs.png"))
    pairs = np.asarray(Image.open(data_dir / "pairs.png"))
    assert pairs.shape[:2] == (70, 342) and np.array_equal(pairs[:36], pairs[34:]), (
        "copies are found out"
    )
    with pytest.raises(SystemExit, match="holds 0 PNG images, which is too few"):
        scored(tmp_path, tmp_path / "cache", capsys)
    assert not (tmp_path / "cache").exists(), "no classifier is trained for a wrong folder"
    Image.new("L", (64, 64)).save(tmp_path / "good" / "walk.png")
    with pytest.raises(SystemExit, match="images of several sizes"):
        scored(tmp_path / "good", data_dir, capsys)


def test_own_images(tmp_path, capsys):
    """A folder of classes is cut in halves; generated images may have another size; a class that is
    a number stands in their names, not its index."""
    images, labels = common.draw_digits(1000, 32, seed=7)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        image = Image.fromarray(image[0].numpy())
        for digit in (3, 8):
            if label == digit:
                real = tmp_path / "real" / f"{digit:02}" / f"{i}.png"
                fake = tmp_path / "fake" / f"{i:06d}_class{digit:02}.png"
                for file in (real, fake):
                    file.parent.mkdir(parents=True, exist_ok=True)
                image.save(real)
                image.resize((64, 64)).save(fake)

    flags = ["--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--classifier-steps", "30"]
    folders = [str(tmp_path / "real"), str(tmp_path / "fake")]
    pairs = tmp_path / "pairs.png"
    quality.main([*folders, *flags, "--neighbours", str(pairs)])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert f"{result['images']} images are too few" in err
    assert result["classes"] == 2 and result["label_accuracy"] > 0.9
    assert result["distance"] < 3 * result["floor"]["distance"] and result["floor"]["distance"] > 0
    nearest = np.asarray(Image.open(pairs))[36:68, :, 0]
    first = images[(labels == 3) | (labels == 8)][:10, 0]
    for k in range(10):
        assert np.array_equal(nearest[:, 34 * k + 2 : 34 * k + 34], first[k]), "of both halves"
    before = pairs.read_bytes()
    with pytest.raises(SystemExit):
        quality.main([*folders, *flags, "--neighbours", str(pairs)])
    assert "exists: choose another --neighbours" in capsys.readouterr().err
    assert pairs.read_bytes() == before
    with pytest.raises(SystemExit, match="is not a folder"):
        quality.main(["cifar", str(tmp_path / "fake"), *flags])
    with pytest.raises(SystemExit, match="has no subfolder per class"):
        quality.main([str(tmp_path / "real" / "03"), str(tmp_path / "fake"), *flags])
