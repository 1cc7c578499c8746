"""Data in, pictures out: the loaders on small files in the real formats, minibatches, grids and
generated images."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    DEVICES,
    images_in,
    picture,
    picture_folder,
    same_images,
    write_cifar10,
    write_mnist,
)
from PIL import Image

import common


def load(dataset, image_size=32, **more):
    args = {"dataset": str(dataset), "data_dir": "data", "image_size": image_size, "seed": 0}
    args.update(device="cpu", generate=None, out_dir="run", **more)
    return common.load_data(SimpleNamespace(**args))


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_mnist_is_padded_not_resampled(dataset):
    images, labels = write_mnist("data", folder="MNIST" if dataset == "mnist" else "FashionMNIST")
    data = load(dataset)
    assert data.images.shape == (20, 1, 32, 32) and data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0, 2:30, 2:30], images)
    assert data.images.sum() == images.astype(int).sum(), "zeros around it"
    assert data.labels.tolist() == labels.tolist()
    assert (data.number, data.channels, len(data.classes)) == (20, 1, 10)


def test_cifar10(monkeypatch):
    images, labels = write_cifar10("data", monkeypatch)
    data = load("cifar10")
    assert np.array_equal(data.images, images)
    assert data.labels.tolist() == labels.tolist()
    assert (data.number, data.channels, len(data.classes)) == (50, 3, 10)


@pytest.mark.parametrize("image_size", [16, 64])
def test_other_sizes_keep_the_picture(image_size, monkeypatch):
    write_mnist("data")
    write_cifar10("data", monkeypatch)
    for dataset, channels in (("mnist", 1), ("cifar10", 3)):
        data, base = load(dataset, image_size), load(dataset)
        assert data.images.shape[1:] == (channels, image_size, image_size)
        small, large = sorted([data.images.float(), base.images.float()], key=torch.numel)
        halved = torch.nn.functional.avg_pool2d(large, 2)
        assert np.corrcoef(small.flatten(), halved.flatten())[0, 1] > 0.8
        if image_size == 16:  # antialiased: the mean over 4 pixels, not over the nearest two
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
    assert len({image.numpy().tobytes() for image in images}) > 495, "each is drawn differently"
    # The labels are right: most digits of one half are nearest to their class's mean of the other.
    x = images.flatten(1).float()
    means = torch.stack([x[:250][labels[:250] == c].mean(0) for c in range(10)])
    nearest = torch.cdist(x[250:], means).argmin(1)
    assert (nearest == labels[250:]).float().mean() > 0.3  # 0.1 by chance
    ink = images.float().mean() / 255
    assert 0.05 < ink < 0.4
    edge = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]])
    assert (edge > 128).float().mean() < 0.01, "digits stay inside"
    if size == 32:
        data = load("digits")
        assert data.images.shape == (20_000, 1, 32, 32) and data.classes == list("0123456789")


def save(path, image, **more):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **more)


def test_folder_modes():
    """Any format and mode that Pillow reads comes out as the same picture."""
    rgb = Image.fromarray(picture(0, 16))
    save("pictures/a.png", rgb)
    save("pictures/b.bmp", rgb)
    save("pictures/c.webp", rgb, lossless=True)
    save("pictures/d.png", rgb.convert("RGBA"))
    save("pictures/e.tiff", rgb.convert("CMYK"))
    save("pictures/f.png", rgb.quantize(256))
    save("pictures/g.gif", rgb, save_all=True, append_images=[Image.new("RGB", (16, 16))] * 2)
    save("pictures/h.JPG", rgb, quality=100, subsampling=0)
    data = load("pictures", 16)
    assert data.images.shape == (8, 3, 16, 16) and data.classes == []
    expected = picture(0, 16).transpose(2, 0, 1).astype(float)
    for image in data.images.numpy():
        assert np.abs(image - expected).mean() < 8


def test_grey_stays_grey():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save("grey/8bit.png", Image.fromarray(ramp))
    save("grey/alpha.png", Image.fromarray(ramp).convert("LA"))
    save("grey/rgb.png", Image.fromarray(ramp).convert("RGB"))
    data = load("grey", 16)
    assert data.images.shape == (3, 1, 16, 16) and data.channels == 1
    assert all(np.abs(image[0].astype(int) - ramp).max() <= 1 for image in data.images.numpy())
    save("grey/zcolour.png", Image.fromarray(picture(0)))
    data = load("grey", 16)
    assert data.images.shape == (4, 3, 16, 16)
    assert (data.images[0, 0] == data.images[0, 2]).all(), "grey among colours is grey"


def test_16_bits_are_divided_by_257_and_32_bits_and_floats_are_skipped(capsys):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    save("pictures/a.png", Image.fromarray(ramp))
    save("pictures/b.tif", Image.fromarray(ramp))
    Path("pictures/c.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    save("pictures/d.tif", Image.fromarray(ramp.astype(np.int32)))
    save("pictures/e.tif", Image.fromarray(ramp.astype(np.float32)))
    data = load("pictures", 16)
    assert data.number == 3
    for image in data.images[:, 0].numpy():
        assert np.abs(image.astype(int) - ramp // 257).max() <= 1
    said = capsys.readouterr().err
    reason = "(ValueError: its pixels are 32-bit or float, whose range is unknown)"
    assert f"warning: cannot read these images: d.tif {reason}, e.tif {reason}\n" in said


def test_rare_pixels(monkeypatch, capsys):
    """Transparent grey comes out white; what cannot be read is named with the reason."""
    folder = Path("pictures")
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    save(folder / "see-through.png", Image.fromarray(ramp * 257), transparency=7 * 257)
    (folder / "phone.heic").write_bytes(b"ftypheic")
    save(folder / "private.png", Image.fromarray(picture(0)))

    def no_permission(file, open=Image.open):
        if Path(file).name == "private.png":
            raise PermissionError(13, "Permission denied")
        return open(file)

    monkeypatch.setattr(Image, "open", no_permission)
    image = load(folder, 16).images[0, 0].numpy().astype(int)
    assert np.abs(image - np.where(ramp == 7, 255, ramp)).max() <= 1
    said = capsys.readouterr().err
    assert "cannot read these images: phone.heic (UnidentifiedImageError: " in said
    assert "private.png (PermissionError: [Errno 13] Permission denied)" in said


def test_values_of_12_bits_are_warned_about(capsys):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    save("dark/a.png", Image.fromarray(ramp))
    load("dark", 16)
    said = capsys.readouterr().err
    assert "warning: the brightest pixel of dark is 15 of 255: are these 12-bit images?" in said


def test_transparency_is_white_and_orientation_is_applied():
    save("pictures/clear.png", Image.new("RGBA", (20, 20), (10, 20, 30, 0)))
    upright = Image.fromarray(picture(1, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    turned = upright.rotate(90, expand=True)
    save("pictures/turned.jpg", turned, exif=exif, quality=98, subsampling=0)
    images = load("pictures", 32).images.numpy()
    assert (images[0] == 255).all()
    assert np.abs(images[1] - picture(1, 32).transpose(2, 0, 1).astype(float)).mean() < 12


def test_shorter_side_and_centre():
    """A wide picture loses its sides, and fine stripes are averaged instead of aliased."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    save("pictures/wide.png", Image.fromarray(wide))
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    save("pictures/stripes.png", Image.fromarray(stripes))
    stripes_out, wide_out = load("pictures", 16).images.numpy()
    assert np.abs(wide_out[:, :, 1:-1].astype(int) - 200).max() < 6
    assert np.abs(stripes_out.astype(int) - 127).max() < 8


def test_classes_are_the_subfolders_and_what_is_left_out_is_named(capsys):
    folder = picture_folder(Path("pictures"), (0, 1), classes=True)
    save(folder / "class1/deeper/a.png", Image.fromarray(picture(0)))
    save(folder / "class2/deeper/a.png", Image.fromarray(picture(1)))
    save(folder / "loose.png", Image.fromarray(picture(0)))
    save(folder / ".hidden/b.png", Image.fromarray(picture(0)))
    (folder / "class0" / "text.png").write_text("not an image")
    (folder / "class0" / "notes.txt").touch()
    (folder / "class0" / "readme").touch()
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.png").write_bytes((folder / "loose.png").read_bytes()[:60])
    (folder / "empty").mkdir()
    data = load("pictures", 16)
    assert data.labels.tolist() == [0, 1, 1, 2] and data.classes == ["class0", "class1", "class2"]
    for image, kind in zip(data.images, (0, 0, 1, 1), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), picture(kind))
    *warnings, last = capsys.readouterr().err.splitlines()
    assert last.startswith("run on cpu: ")
    assert last.endswith("4 images of 3x16x16 from pictures, classes: class0, class1, class2")
    assert warnings[:3] == [
        "warning: ignored files that are not images: class0/notes.txt, class0/readme",
        "warning: ignored images beside the class folders: loose.png",
        "warning: each of these is one class, with all that is below it: class1, class2",
    ]
    assert warnings[3].startswith(
        "warning: cannot read these images: broken/cut.png (OSError: image f"
    )
    assert "class0/text.png (UnidentifiedImageError: " in warnings[3]
    assert warnings[4:] == ["warning: no readable image in these subfolders: broken"]


def test_a_folder_is_flat_unless_its_subfolders_hold_more(capsys):
    folder = picture_folder(Path("pictures"), (0, 1), classes=True)
    for k in range(2):
        save(folder / f"loose{k}.png", Image.fromarray(picture(0)))
    data = load("pictures", 16)
    assert data.number == 2 and data.classes == []
    message = "ignored images in subfolders: class0/picture.png, class1/picture.png"
    assert message in capsys.readouterr().err


def test_classes_are_in_the_order_of_their_names(capsys):
    """Not of their paths, and numbers in theirs. A number means the class of that name."""
    for name in ("a-b", "a", "b c"):
        save(f"names/{name}/1.png", Image.fromarray(picture(0)))
    assert load("names", 16).classes == ["a", "a-b", "b c"]
    for name in range(1, 13):
        save(f"numbers/{name}/1.png", Image.fromarray(picture(0)))
    classes = load("numbers", 16).classes
    assert classes == [str(name) for name in range(1, 13)]
    assert common.class_number("1", classes) == 0 and common.class_number("12", classes) == 11
    with pytest.raises(
        SystemExit, match=r"--label is 0: the classes are 1, .*, 10, \.\.\. \(12 in"
    ):
        common.class_number("0", classes)
    assert common.class_number("1", ["a", "b"]) == 1


def test_what_is_no_data_is_left_out(capsys):
    """A run among the images, and folders that systems make, at any depth."""
    folder = picture_folder(Path("pictures"), (0, 1), classes=True)
    save(folder / "run/samples/000000.png", Image.fromarray(picture(0)))
    (folder / "run/args.json").write_text("{}")
    for name in ("@eaDir", "class0/@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found"):
        save(folder / name / "a.png", Image.fromarray(picture(0)))
    data = load("pictures", 16)
    assert data.number == 2 and data.classes == ["class0", "class1"]
    assert "warning" not in capsys.readouterr().err


def test_a_subfolder_without_permission_is_warned_about(capsys, monkeypatch):
    folder = picture_folder(Path("pictures"), (0, 1), classes=True)
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "class1":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert load("pictures", 16).classes == ["class0"]
    message = f"warning: {folder / 'class1'} cannot be read: Permission denied"
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_links_to_folders_are_followed_in_the_first_level(capsys):
    """A file whose link leads nowhere is named."""
    folder = picture_folder(Path("pictures"), (0, 1), classes=True)
    picture_folder(Path("elsewhere"))
    (folder / "class2").symlink_to(Path("elsewhere").absolute())
    (folder / "class0" / "up").symlink_to("..")
    (folder / "class0" / "lost.png").symlink_to("nowhere")
    assert load("pictures", 16).classes == ["class0", "class1", "class2"]
    said = capsys.readouterr().err
    assert "cannot read these images: class0/lost.png (FileNotFoundError: " in said
    save("flat/a.png", Image.fromarray(picture(0)))
    Path("flat/me").symlink_to(".")
    Path("flat/lost.png").symlink_to("nowhere")
    assert load("flat", 16).number == 1
    assert "cannot read these images: lost.png (FileNotFoundError: " in capsys.readouterr().err


def test_names_are_printed_without_control_characters(capsys):
    picture_folder(Path("pictures/red\x1b[31m\nline"))
    load("pictures", 16)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and r", classes: red\x1b[31m\nline" in line


def test_the_first_line_names_the_folder_the_device_and_the_data(capsys):
    write_mnist("data")
    load("mnist")
    data = "20 images of 1x32x32 from mnist, classes: 0 - zero, 1 - one"
    assert capsys.readouterr().err.startswith(f"run on cpu: {data}")


def test_images_that_do_not_fit_on_the_gpu_stay_in_host_memory(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 20_000 * 16 * 16, 0))
    args = SimpleNamespace(dataset="digits", image_size=16, seed=0, generate=None, out_dir="run")
    args.device = "cuda"
    assert common.load_data(args).images.device.type == "cpu"
    message = "warning: digits takes 5 MiB, over half of the GPU's free memory"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_minibatches(device):
    """Images in [-1, 1] with their own labels, drawn uniformly with replacement, anew each time."""
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    data = common.Data(256, 3, [], images.to(device), torch.arange(256).to(device))
    args = SimpleNamespace(batch_size=100, device=device)
    torch.manual_seed(0)
    counts = torch.zeros(256)
    for _ in range(100):
        x, y = common.sample_batch(args, data)
        assert x.shape == (100, 3, 2, 2) and x.dtype == torch.float32 and y.shape == (100,)
        assert x.device.type == y.device.type == device
        assert torch.allclose(x, (y / 127.5 - 1)[:, None, None, None].expand_as(x), atol=1e-6)
        counts += torch.bincount(y.cpu(), minlength=256)
    assert counts.min() > 10 and counts.max() < 80  # Poisson with mean 39
    assert len(set(y.tolist())) < 100, "with replacement"
    torch.manual_seed(0)
    first = common.sample_batch(args, data)[1]
    torch.manual_seed(0)
    assert torch.equal(first, common.sample_batch(args, data)[1]), (
        "from torch's random numbers alone"
    )


def test_generated_images_do_not_reuse_the_numbers_of_the_weights():
    """The first layers of stylegan2 and progan begin as rows of torch.randn(..., z_dim)."""
    args, drawn = SimpleNamespace(out_dir="run", generate=3, seed=0), []
    Path("run").mkdir()
    torch.manual_seed(args.seed)
    weights = torch.randn(3, 6)
    common.generate(args, lambda n: drawn.append(torch.randn(n, 6)) or torch.zeros(n, 3, 4, 4))
    assert not torch.isin(drawn[0], weights).any()


def test_generated_images_are_clamped_and_never_overwritten(capsys):
    args = SimpleNamespace(out_dir="run", generate=3, seed=0)
    Path("run").mkdir()
    values = torch.tensor([-1.5, 0.0, 1.5])[:, None, None, None].expand(3, 3, 4, 4)
    common.generate(args, lambda n: values)
    images = images_in("run/generated")
    assert [int(image[0, 0, 0]) for image in images.values()] == [0, 128, 255]
    common.generate(args, lambda n: -values)
    common.generate(args, lambda n: -values)
    assert same_images(images, images_in("run/generated"))
    again = images_in("run/generated-3")
    assert [int(image[0, 0, 0]) for image in again.values()] == [255, 128, 0]
    assert capsys.readouterr().err.endswith(str(Path("run", "generated-3")) + "\n")


@pytest.mark.parametrize("image_size, number", [(32, 64), (128, 64), (256, 16), (1024, 4)])
def test_grids_of_large_images_have_fewer(image_size, number):
    args = SimpleNamespace(out_dir="run", tensorboard=False, image_size=image_size)
    assert common.grid_size(args) == number
    common.save_grid(args, 3, torch.zeros(number, 1, image_size, image_size))
    width, height = Image.open("run/samples/000003.png").size
    assert width == height and 512 <= width <= 2054


def test_grids_map_minus_one_to_black_and_one_to_white():
    args = SimpleNamespace(out_dir="run", tensorboard=False)
    values = torch.tensor([-0.5, 0.0, 1.0])  # not all of the range, which decides in spite of it
    common.save_grid(args, 3, values[:, None, None, None].expand(3, 3, 4, 4), columns=3)
    grid = np.asarray(Image.open("run/samples/000003.png"))
    assert grid.shape == (26 * 8, 26 * 20, 3), "enlarged by a whole factor to at least 512"
    shown = [int(grid[26 * 3, 26 * x, 0]) for x in (3, 9, 15)]
    assert shown == pytest.approx([64, 128, 255], abs=1)
