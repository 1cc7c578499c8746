"""ssgan.py: its losses in closed form, its networks, its data, and that it learns."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    checkpoint,
    class_folder,
    log_rows,
    open_script,
    picture,
    recorded,
    same,
    train,
    write_mnist,
)
from PIL import Image

import common
import ssgan


def test_labelled_loss():
    """-l_y + log sum_k exp(l_k): here l_y is 2, and the nine others are 0."""
    y = torch.arange(6)
    loss = ssgan.d_loss_labelled(2 * torch.eye(10)[y], y)
    assert loss.item() == pytest.approx(-2 + math.log(math.exp(2) + 9))


def test_unlabelled_loss():
    """Half of the cross entropies with an eleventh logit for "fake", fixed at 0: real images are
    in one of the first ten classes, whichever."""
    real, fake = torch.randn(6, 10), torch.randn(5, 10)
    eleven = [torch.cat([x, torch.zeros(len(x), 1)], 1).log_softmax(1) for x in (real, fake)]
    expected = -0.5 * eleven[0][:, :10].logsumexp(1).mean() - 0.5 * eleven[1][:, 10].mean()
    assert ssgan.d_loss_unlabelled(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    zeros = torch.zeros(3, 10)
    expected = 0.5 * math.log(11 / 10) + 0.5 * math.log(11)
    assert ssgan.d_loss_unlabelled(zeros, zeros).item() == pytest.approx(expected, rel=1e-5)


def test_large_logits_do_not_overflow():
    for sign in (1, -1):
        logits = torch.full((4, 10), 1000.0 * sign, requires_grad=True)
        loss = ssgan.d_loss_labelled(logits, torch.arange(4)) + ssgan.d_loss_unlabelled(
            logits, logits
        )
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()


def test_g_loss():
    f_real, f_fake = torch.randn(7, 5), torch.randn(4, 5)
    expected = sum((f_real[:, i].mean() - f_fake[:, i].mean()) ** 2 for i in range(5)) / 5
    assert ssgan.g_loss(f_real, f_fake).item() == pytest.approx(expected.item(), rel=1e-5)


def test_networks():
    torch.manual_seed(0)
    G, D = ssgan.Generator(6, 16, 3, 16), ssgan.Discriminator(16, 3, 16, 5)
    x = G(torch.rand(8, 6))
    assert x.shape == (8, 3, 16, 16) and -1 <= x.min() < 0 < x.max() <= 1
    assert D(x).shape == (8, 5) and D.features(x).shape == (8, 4)
    assert (D.features(x) >= 0).all(), "after ReLU"
    assert not torch.equal(D(x), D(x)), "noise while training"
    D.eval()
    assert torch.equal(D(x), D(x)), "and none afterwards"
    stds = [m.std for m in D.modules() if isinstance(m, ssgan.Noise)]
    assert stds == [0.3, 0.5, 0.5, 0.5, 0.5, 0.5]
    seen = []
    D.hidden[0].register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    D(x)
    assert torch.allclose(seen[0], (x + 1) / 2)
    scale = G.net[6].scale
    assert torch.equal(scale, torch.ones_like(scale)) and scale.requires_grad


def test_noise_before_the_last_layer():
    D = ssgan.Discriminator(16, 3, 16, 5)
    D.hidden.eval()
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(D.features(x), D.features(x)) and not torch.equal(D(x), D(x))


def test_noise_has_its_standard_deviation():
    x = torch.zeros(100, 100)
    assert ssgan.Noise(0.3)(x).std().item() == pytest.approx(0.3, rel=0.03)


def test_weight_norm():
    """Each row of the weights has the length of its scale."""
    layer = ssgan.WeightNormLinear(5, 3, learn_scale=True)
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        weight = layer(torch.eye(5)).T
    assert weight.norm(dim=1).tolist() == pytest.approx([1, 2, 3])
    assert torch.allclose(
        weight / weight.norm(dim=1, keepdim=True), layer.v / layer.v.norm(dim=1, keepdim=True)
    )


def test_only_the_last_scale_of_weight_norm_learns():
    run = open_script("ssgan", "--lr", 0.01)
    scales = [m.scale for m in run.D.hidden if isinstance(m, ssgan.WeightNormLinear)]
    before = [scale.clone() for scale in scales]
    last = run.D.last.scale.clone()
    for _ in range(3):
        run.update()
    assert len(scales) == 5 and same(before, scales)
    assert not torch.equal(last, run.D.last.scale)


def test_the_activations_start_normalised():
    D = ssgan.Discriminator(64, 1, 16, 5)
    for m in D.modules():
        if isinstance(m, ssgan.Noise):
            m.std = 0.0
    x = torch.rand(300, 1, 16, 16) * 2 - 1
    D.normalise(x)
    outputs = []
    for m in D.modules():
        if isinstance(m, ssgan.WeightNormLinear):
            m.register_forward_hook(lambda m, inputs, out: outputs.append(out))
    D(x)
    assert len(outputs) == 6
    for out in outputs:
        assert out.mean(0).abs().max() < 1e-4
        assert torch.allclose(out.std(0, correction=0), torch.ones(out.shape[1]), atol=1e-3)

    scale = open_script("ssgan").D.hidden[2].scale
    assert not torch.equal(scale, torch.ones_like(scale)), "main does it"


def test_labelled_images(monkeypatch):
    """Equally many of each class; other ones for another seed; all of them again and again."""
    labels = torch.randint(10, (1000,))
    data = common.Data(1000, 1, list("0123456789"), torch.zeros(1000, 1, 16, 16), labels)
    args = ssgan.parse_args(["--labels", "20"])
    chosen = ssgan.choose_labelled(args, data)
    assert labels[chosen].bincount().tolist() == [2] * 10 and len(chosen.unique()) == 20
    assert torch.equal(chosen, ssgan.choose_labelled(args, data))
    other = ssgan.choose_labelled(ssgan.parse_args(["--labels", "20", "--label-seed", "1"]), data)
    assert not torch.equal(chosen, other)

    run, seen = open_script("ssgan", "--batch-size", 9), []
    loss = ssgan.d_loss_labelled
    monkeypatch.setattr(
        ssgan, "d_loss_labelled", lambda logits, y: seen.append(y) or loss(logits, y)
    )
    run.update()
    assert seen[0].bincount().tolist() == [3, 3, 3]


def test_the_loss_of_D(monkeypatch):
    """loss_D is d_loss_labelled plus the weight times d_loss_unlabelled, of real images and fakes
    that are not exchanged."""
    run = open_script("ssgan", "--unlabelled-weight", 0.5)
    run.D.eval()  # without noise
    D, fakes = copy.deepcopy(run.D), []
    run.G.register_forward_hook(lambda m, inputs, out: fakes.append(out))
    real = recorded(monkeypatch, "sample_batch")
    labelled = recorded(monkeypatch, "d_loss_labelled", ssgan)
    values = {name: value.item() for name, value in run.update().items()}
    d_real, d_fake = D(real[0][0]), D(fakes[0])
    expected = labelled[0] + 0.5 * ssgan.d_loss_unlabelled(d_real, d_fake)
    assert values["loss_D"] == pytest.approx(expected.item(), rel=1e-4)
    assert values["d_real"] == pytest.approx(d_real.logsumexp(1).mean().item(), rel=1e-4)
    assert values["d_fake"] == pytest.approx(d_fake.logsumexp(1).mean().item(), rel=1e-4)


def test_the_average_is_tested_without_noise(monkeypatch):
    """An average that takes every image for class 0 is wrong about the other test images."""

    @torch.no_grad()
    def always_class_0(average, D, beta):
        for name, w in average.named_parameters():
            if name.endswith(("bias", "scale")):
                w.zero_()
        average.last.bias[0] = 1

    monkeypatch.setattr(ssgan, "move_average", always_class_0)
    held_out = recorded(monkeypatch, "hold_out_test", ssgan)
    train("ssgan", "run", "--steps", 5)
    wrong = (held_out[0][2] != 0).float().mean().item()
    assert log_rows("run")[-1]["test_error"] == pytest.approx(wrong)
    assert 0 < wrong < 1

    run = open_script("ssgan")
    assert run.D.training and not run.average.training


def test_the_rate_of_the_average(monkeypatch):
    betas = []
    monkeypatch.setattr(ssgan, "move_average", lambda average, D, beta: betas.append(beta))
    train("ssgan", "run", "--steps", 5)
    assert betas == pytest.approx([0, 1 / 11, 2 / 12, 3 / 13, 4 / 14])


def test_G_gets_unlabelled_images_of_its_own(monkeypatch):
    run = open_script("ssgan", "--n-critic", 2)
    real, seen = recorded(monkeypatch, "sample_batch"), []
    features = run.D.features
    run.D.features = lambda x: seen.append(x) or features(x)
    run.update()
    assert len(real) == 3
    assert seen[-2] is real[2][0], "those that G's features are compared with"
    assert seen[1] is real[0][0], "after the labelled ones"


def test_test_images_are_never_in_training(tmp_path):
    """A tenth of a folder is held out; a dataset of torchvision has test images of its own."""
    run = open_script("ssgan", "--labels", 2, dataset=class_folder(tmp_path / "images"))
    train_images = {image.numpy().tobytes() for image in run.data.images}
    assert run.data.number == len(run.data.images) == 36

    folder = str(tmp_path / "images")
    args = ssgan.parse_args(["--dataset", folder, "--image-size", "16", "--device", "cpu"])
    data, images, labels = ssgan.hold_out_test(args, common.load_data(args))
    assert len(images) == len(labels) == 4
    assert not train_images & {image.numpy().tobytes() for image in images}
    args.seed = 1
    assert torch.equal(images, ssgan.hold_out_test(args, common.load_data(args))[1]), (
        "whatever the seed"
    )

    write_mnist(tmp_path, n=20)
    write_mnist(tmp_path, n=20, folder="other", seed=1)
    test_images = "raw/t10k-images-idx3-ubyte"
    (tmp_path / "other" / test_images).replace(tmp_path / "MNIST" / test_images)
    args = ssgan.parse_args(["--data-dir", str(tmp_path), "--device", "cpu"])
    data, images, labels = ssgan.hold_out_test(args, common.load_data(args))
    assert data.number == 20 and len(images) == 20 and images.dtype == torch.uint8
    expected = common.load_torchvision("mnist", str(tmp_path), train=False)
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    assert not torch.equal(images, data.images)
    args.image_size = 16
    assert ssgan.hold_out_test(args, data)[1].shape == (20, 1, 16, 16)


@pytest.mark.parametrize(
    "labels, message",
    [
        (3, "--labels is 3, but must be a multiple of the 2 classes"),
        (100, "--labels needs 50 images of class"),
    ],
)
def test_labels_that_cannot_be_had(labels, message, tmp_path, capsys):
    data = class_folder(tmp_path / "images")
    with pytest.raises(SystemExit) as end:
        train("ssgan", "run", "--labels", labels, data=data)
    assert message in str(end.value)


def test_epsilon_of_adam():
    """1e-8 inside of the root in the authors' code: 1e-4 outside."""
    run = open_script("ssgan")
    assert [opt.param_groups[0]["eps"] for opt in (run.opt_G, run.opt_D)] == [1e-4, 1e-4]


def test_learns_two_classes_from_one_label_each(tmp_path, capsys):
    """It classifies the test images, by the average, and G draws pictures like the real ones: they
    correlate by 0.67 to 0.75 with the nearer one, with seven seeds, and by 0.1 untrained."""
    data = class_folder(tmp_path / "images")
    flags = ["--batch-size", 16, "--width", 64, "--steps", 400, "--save-every", 1000]
    train("ssgan", "run", *flags, data=data)
    assert "errors: 0 of 4 test images" in capsys.readouterr().err
    assert log_rows("run")[-1]["test_error"] == 0
    saved = checkpoint("run")["state"]
    assert not same(saved["average"], saved["D"])

    ssgan.main(["--out-dir", "run", "--device", "cpu", "--generate", "8"])
    drawn = [np.asarray(Image.open(file), float) for file in Path("run", "generated").iterdir()]
    pictures = [picture(k).ravel() for k in (0, 1)]
    likeness = np.array([[np.corrcoef(x.ravel(), p)[0, 1] for p in pictures] for x in drawn])
    assert likeness.max(1).mean() > 0.5, likeness
    assert set(likeness.argmax(1)) == {0, 1}, "both pictures"
