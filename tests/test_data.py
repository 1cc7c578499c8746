"""The loaders on small files in the real formats, and minibatches."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from helpers import DEVICES, picture, picture_folder, write_cifar10, write_mnist
from PIL import Image


def load(dataset, data_dir, image_size=32, seed=0, **more):
    args = {"dataset": str(dataset), "data_dir": str(data_dir), "image_size": image_size, "seed": seed}
    args = SimpleNamespace(**args, device="cpu", generate=None, run=SimpleNamespace(data=None))
    args.__dict__.update(more)
    data = common.load_data(args)
    data.classes, data.fingerprint = args.run.data["classes"], args.run.data["fingerprint"]
    return data


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_mnist_is_padded_not_resampled(dataset, tmp_path):
    images, labels = write_mnist(tmp_path, folder="MNIST" if dataset == "mnist" else "FashionMNIST")
    data = load(dataset, tmp_path)
    assert data.images.shape == (20, 1, 32, 32) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0, 2:30, 2:30], images)
    assert data.images.sum() == images.astype(int).sum(), "zeros around it"
    assert data.labels.tolist() == labels.tolist() and len(data.classes) == 10


def test_cifar10(tmp_path, monkeypatch):
    images, labels = write_cifar10(tmp_path, monkeypatch)
    data = load("cifar10", tmp_path)
    assert np.array_equal(data.images, images)
    assert data.labels.tolist() == labels.tolist() and len(data.classes) == 10


@pytest.mark.parametrize("image_size", [16, 64])
def test_other_sizes_keep_the_picture(image_size, tmp_path, monkeypatch):
    write_mnist(tmp_path)
    write_cifar10(tmp_path, monkeypatch)
    for dataset, channels in (("mnist", 1), ("cifar10", 3)):
        data, base = load(dataset, tmp_path, image_size), load(dataset, tmp_path)
        assert data.images.shape[1:] == (channels, image_size, image_size)
        assert abs(data.images.float().mean() - base.images.float().mean()) < 2
        if image_size == 16:  # antialiased: the mean over a triangle 4 pixels wide, not over the nearest two
            inner, whole = (d.images[:, :, 4:-4, 4:-4].float().std() for d in (data, base))
            assert inner < 0.42 * whole


@pytest.mark.parametrize("size", [16, 32, 64])
def test_digits(size):
    images, labels = common.draw_digits(500, size, seed=0)
    again, labels_again = common.draw_digits(500, size, seed=0)
    other, _ = common.draw_digits(500, size, seed=1)
    assert images.shape == (500, 1, size, size) and images.dtype == torch.uint8
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, other)
    assert set(labels.tolist()) == set(range(10))
    assert len({image.numpy().tobytes() for image in images}) > 495, "every digit is drawn differently"
    # The labels are right: with class means from one half, most of the other half is nearest to its own.
    x = images.flatten(1).float()
    means = torch.stack([x[:250][labels[:250] == c].mean(0) for c in range(10)])
    nearest = torch.cdist(x[250:], means).argmin(1)
    assert (nearest == labels[250:]).float().mean() > 0.3  # 0.1 by chance
    ink = images.float().mean() / 255
    assert 0.05 < ink < 0.4
    edge = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]])
    assert (edge > 128).float().mean() < 0.01, "digits stay inside"
    if size == 32:
        data = load("digits", "unused", seed=3)
        assert data.images.shape == (20_000, 1, 32, 32) and data.classes == list("0123456789")


def save(path, image, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **more)


def test_folder_modes(tmp_path):
    """Any format and mode that Pillow reads comes out as the same picture."""
    folder, rgb = tmp_path / "pictures", Image.fromarray(picture(0, 16))
    save(folder / "a.png", rgb)
    save(folder / "b.bmp", rgb)
    save(folder / "c.webp", rgb, lossless=True)
    save(folder / "d.png", rgb.convert("RGBA"))
    save(folder / "e.tiff", rgb.convert("CMYK"))
    save(folder / "f.png", rgb.quantize(256))
    save(folder / "g.gif", rgb, save_all=True, append_images=[Image.new("RGB", (16, 16))] * 2)
    save(folder / "h.JPG", rgb, quality=100, subsampling=0)
    data = load(folder, tmp_path / "data", 16)
    assert data.images.shape == (8, 3, 16, 16) and data.classes == []
    expected = picture(0, 16).transpose(2, 0, 1).astype(float)
    for image in data.images.numpy():
        assert np.abs(image - expected).mean() < 8


def test_grey_stays_grey(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    folder = tmp_path / "grey"
    save(folder / "8bit.png", Image.fromarray(ramp))
    save(folder / "16bit.png", Image.fromarray(ramp.astype(np.uint16) * 257))
    save(folder / "alpha.png", Image.fromarray(ramp).convert("LA"))
    save(folder / "rgb.png", Image.fromarray(ramp).convert("RGB"))
    data = load(folder, tmp_path / "data", 16)
    assert data.images.shape == (4, 1, 16, 16)
    assert all(np.abs(image[0].astype(int) - ramp).max() <= 1 for image in data.images.numpy())
    save(folder / "colour.png", Image.fromarray(picture(0)))
    save(folder / "dark.png", Image.fromarray(np.full((16, 16), 250, np.uint16)))  # of 65,535
    data = load(folder, tmp_path / "data", 16)
    assert data.images.shape == (6, 3, 16, 16) and data.images[4].max() <= 1
    assert (data.images[0, 0] == data.images[0, 2]).all(), "grey among colours has three equal channels"


def test_transparency_is_white_and_orientation_is_applied(tmp_path):
    folder = tmp_path / "pictures"
    save(folder / "clear.png", Image.new("RGBA", (20, 20), (10, 20, 30, 0)))
    upright = Image.fromarray(picture(1, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    save(folder / "turned.jpg", upright.rotate(90, expand=True), exif=exif, quality=98, subsampling=0)
    images = load(folder, tmp_path / "data", 32).images.numpy()
    assert (images[0] == 255).all()
    assert np.abs(images[1] - picture(1, 32).transpose(2, 0, 1).astype(float)).mean() < 12


def test_shorter_side_and_centre(tmp_path):
    """A wide picture loses its sides, and fine stripes are averaged instead of aliased."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    save(tmp_path / "pictures" / "wide.png", Image.fromarray(wide))
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "pictures" / "stripes.png", Image.fromarray(stripes))
    stripes_out, wide_out = load(tmp_path / "pictures", tmp_path / "data", 16).images.numpy()
    assert np.abs(wide_out[:, :, 1:-1].astype(int) - 200).max() < 6
    assert np.abs(stripes_out.astype(int) - 127).max() < 8


def test_what_was_loaded_is_said_in_one_line(tmp_path, capsys):
    """Classes by name; and by name what was skipped or ignored, also when the images come from the cache."""
    folder = picture_folder(tmp_path / "pictures", (0, 1), classes=True)
    save(folder / "class1" / "deeper" / "a.png", Image.fromarray(picture(0)))
    save(folder / "loose.png", Image.fromarray(picture(0)))
    save(folder / ".hidden" / "b.png", Image.fromarray(picture(0)))
    (folder / "class0" / "text.png").write_text("not an image")
    (folder / "class0" / "loop.png").symlink_to(folder / "class0" / "loop.png")
    (folder / "class1" / "bad\nname.txt").touch()
    for _ in range(2):
        data = load(folder, tmp_path / "data", 16)
        said = capsys.readouterr().err
        assert said.splitlines()[-1].endswith(
            "pictures: 2 images of 3x16x16, 2 classes (class0, class1); "
            "1 unreadable, skipped: class0/text.png; "
            "4 ignored: class0/loop.png, class1/bad\\nname.txt, class1/deeper, loose.png"
        )
    assert data.labels.tolist() == [0, 1] and data.classes == ["class0", "class1"]
    assert np.array_equal(data.images[1].permute(1, 2, 0), picture(1))
    for k in range(3):
        save(folder / f"loose{k}.png", Image.fromarray(picture(0)))
    data = load(folder, tmp_path / "data", 16)
    assert len(data.images) == 4 and data.classes == [], "flat, as more of the images are"
    assert "class0/picture.png, " in capsys.readouterr().err
    write_mnist(tmp_path)
    load("mnist", tmp_path)
    assert capsys.readouterr().err == "mnist: 20 images of 1x32x32, 10 classes\n"


def test_links_to_folders(tmp_path):
    """A class may be a link; a link back up is no class."""
    folder = tmp_path / "pictures"
    picture_folder(tmp_path / "elsewhere")
    folder.mkdir()
    (folder / "cats").symlink_to(tmp_path / "elsewhere")
    assert load(folder, tmp_path / "data", 16).classes == ["cats"]
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere", tmp_path / "data", 16).classes == []


def test_a_folder_whose_name_is_not_utf_8(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    picture_folder(folder)
    for _ in range(2):
        assert len(load(folder, tmp_path / os.fsdecode(b"data\xff"), 16).images) == 1
    assert "caf\\udce9: 1 images" in capsys.readouterr().err


def test_the_fingerprint_is_of_every_pixel_and_label(tmp_path):
    folder = picture_folder(tmp_path / "a", (0, 1), classes=True)
    same = picture_folder(tmp_path / "b", (0, 1), classes=True)
    first = load(folder, tmp_path / "data", 16).fingerprint
    assert load(same, tmp_path / "data", 16).fingerprint == first
    image = picture(1).copy()
    image[5, 5, 1] += 1
    Image.fromarray(image).save(same / "class1" / "picture.png")
    assert load(same, tmp_path / "data", 16).fingerprint != first
    (same / "class1" / "picture.png").unlink()
    Image.fromarray(picture(1)).save(same / "class0" / "second.png")
    assert load(same, tmp_path / "data", 16).fingerprint != first


def test_folder_is_decoded_once(tmp_path, monkeypatch):
    """The second start reads the cache; a file added, changed or removed makes it decode again."""
    folder = picture_folder(tmp_path / "pictures [1]", (0, 1))
    decoded, decode = [], common.decode_image
    monkeypatch.setattr(common, "decode_image", lambda path, size: decoded.append(path) or decode(path, size))
    first = load(folder, tmp_path / "data", 16).images.clone()
    assert set(decoded) == {folder / "picture0.png", folder / "picture1.png"}
    decoded.clear()
    assert torch.equal(load(folder, tmp_path / "data", 16).images, first)
    assert not decoded
    Image.fromarray(picture(1)).save(folder / "new.png")
    assert len(load(folder, tmp_path / "data", 16).images) == 3
    (folder / "new.png").unlink()
    assert len(load(folder, tmp_path / "data", 16).images) == 2
    Image.fromarray(picture(1)).save(folder / "picture0.png")
    os.utime(folder / "picture0.png", ns=(1, 1))
    changed = load(folder, tmp_path / "data", 16).images
    assert torch.equal(changed[0], changed[1])
    load(folder, tmp_path / "data", 32)
    load(folder, tmp_path / "data", 16)
    kept = list((tmp_path / "data" / "folders").glob("*.pt"))
    assert len(kept) == 2, "one file for each size, the stale ones replaced"


def test_two_runs_decode_at_once(tmp_path):
    folder, barrier = picture_folder(tmp_path / "pictures", (0, 1)), threading.Barrier(4)

    def start(_):
        barrier.wait()
        return load(folder, tmp_path / "data", 16).images.clone()

    results = list(ThreadPoolExecutor(4).map(start, range(4)))
    assert len(results) == 4 and all(torch.equal(r, results[0]) for r in results)
    assert len(list((tmp_path / "data" / "folders").glob("*.pt*"))) == 1


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_cache_is_mended(content, tmp_path):
    folder = picture_folder(tmp_path / "pictures")
    first = load(folder, tmp_path / "data", 16).images.clone()
    cache = next((tmp_path / "data" / "folders").glob("*.pt"))
    good = cache.read_bytes()
    cache.write_bytes(good[: len(good) // 2] if content is None else content)
    assert torch.equal(load(folder, tmp_path / "data", 16).images, first)
    assert len(cache.read_bytes()) == len(good)


def test_a_disk_too_full_for_the_decoded_images(tmp_path, monkeypatch):
    def no_space(content, f):
        f.write(b"a little")
        raise RuntimeError("unexpected pos 704 vs 598")  # what torch.save makes of it

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(SystemExit, match=r"cannot be written \(unexpected pos 704 vs 598\)"):
        load(picture_folder(tmp_path / "pictures"), tmp_path / "data", 16)
    assert [p.name for p in (tmp_path / "data" / "folders").iterdir()] == [".lock"]


def batch_args(**more):
    return SimpleNamespace(**{"batch_size": 100, "seed": 0, "device": "cpu", **more})


@pytest.mark.parametrize("device", DEVICES)
def test_batches(device):
    """Images in [-1, 1] with their own labels, drawn uniformly with replacement."""
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    data = SimpleNamespace(images=images.to(device), labels=torch.arange(256).to(device))
    batches = common.batches(batch_args(device=device), data)
    counts = torch.zeros(256)
    for _ in range(100):
        x, y = next(batches)
        assert x.shape == (100, 3, 2, 2) and x.dtype == torch.float32 and y.shape == (100,)
        assert torch.allclose(x, (y / 127.5 - 1)[:, None, None, None].expand_as(x), atol=1e-6)
        counts += torch.bincount(y.cpu(), minlength=256)
    assert counts.min() > 10 and counts.max() < 80  # Poisson with mean 39
    x, y = next(batches)
    assert len(set(y.tolist())) < 100, "with replacement"


def test_batches_depend_on_seed_and_number_alone():
    n = 100_000
    data = SimpleNamespace(images=torch.zeros(n, 1, 1, 1, dtype=torch.uint8), labels=torch.arange(n))

    def labels(first, n, **more):
        batches = common.batches(batch_args(**more), data, first)
        return [next(batches)[1].tolist() for _ in range(n)]

    whole = labels(0, 6)
    assert labels(3, 3) == whole[3:]
    assert labels(0, 6, seed=1) != whole
    drawn = [i for batch in whole for i in batch]
    assert len(set(drawn)) > 590, "no step sees the images of the one before"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_that_do_not_fit_on_the_device_stay_where_they_are(tmp_path, monkeypatch):
    """The batches are the same."""
    write_mnist(tmp_path)
    near = load("mnist", tmp_path, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * near.images.nbytes, 0))
    far = load("mnist", tmp_path, device="cuda")
    assert near.images.device.type == "cuda" and far.images.device.type == "cpu"
    a, b = (common.batches(batch_args(device="cuda"), data) for data in (near, far))
    for _ in range(5):
        (x, y), (x_far, y_far) = next(a), next(b)
        assert torch.equal(x, x_far) and torch.equal(y, y_far) and x_far.device.type == "cuda"
