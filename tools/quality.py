"""Scores images made by `--generate` against a real dataset, in the features of a small classifier.

    python tools/quality.py mnist runs/dcgan-mnist/generated
    python tools/quality.py path/to/images runs/dcgan-images/generated

The classifier is trained here, once, on the dataset's training images at 32 px, and kept under
`--cache-dir`. A folder of your own images needs a subfolder per class; a random half of it is for
training and the other half for the test. The features are not Inception's: the numbers compare runs
with each other and with the floor, which is the same score of real training against real test
images, and not with published FIDs.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import runs

# metrics ------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """Fréchet distance of two sets of features (N, d), each taken as a Gaussian: |m_a - m_b|^2 +
    tr(C_a + C_b - 2 (C_a C_b)^(1/2)). Heusel et al. 2017 (arXiv 1706.08500), eq. 6; 0 for equal
    sets, and biased upwards for small ones, so that only equal sample sizes compare."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b has the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2).
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def classes_covered(predicted, n_classes):
    """How many classes get at least a tenth of an equal share of the images: predicted int64
    (N,)."""
    shares = torch.bincount(predicted, minlength=n_classes) / len(predicted)
    return int((shares >= 0.1 / n_classes).sum())


def precision_recall(real, fake, k=5):
    """(precision, recall) of Kynkäänniemi et al. 2019 (arXiv 1904.06991), eqs. 1 and 2, with
    features (N, d): the share of fakes inside the real manifold, and of real images inside that
    of the fakes, where a manifold is the union of balls that reach from each point to its k-th
    nearest neighbour. Their k is 3."""

    def share_inside(points, manifold):
        radii = torch.cat(
            [torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(1000)]
        )
        inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


# classifier ---------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (N, C, 32, 32) in [-1, 1] -> logits (N, n_classes); `features` is the layer before,
    (N, 128)."""

    def __init__(self, channels, n_classes, width=32):
        super().__init__()
        layers, c_in = [], channels
        for c in (width, width * 2, width * 4):
            layers += [
                nn.Conv2d(c_in, c, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c),
                nn.ReLU(),
            ]
            c_in = c
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(width * 4 * 16, 128), nn.ReLU()
        )
        self.head = nn.Linear(128, n_classes)

    def forward(self, x):
        return self.head(self.features(x))


def real_images(dataset, data_dir):
    """The training and the test images of a dataset, each as uint8 (N, C, 32, 32) and labels (N,),
    and the names of the classes. Exits with an error if a folder has no classes."""
    if dataset == "digits":
        train, test = common.draw_digits(20_000, 32, seed=0), common.draw_digits(20_000, 32, seed=1)
        return train, test, list("0123456789")
    if dataset in common.TORCHVISION_DATASETS:
        *train, classes = common.load_torchvision(dataset, Path(data_dir))
        *test, _ = common.load_torchvision(dataset, Path(data_dir), train=False)
        return train, test, classes

    images, labels, classes = common.load_folder(dataset, 32)
    if len(classes) < 2:
        common.fail(
            f"{dataset} has no subfolder per class, which the classifier needs: "
            "docs/results.md shows how to compute FID for any folder"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order.tensor_split(2)
    return (images[train], labels[train]), (images[test], labels[test]), classes


def trained_classifier(dataset, images, labels, n_classes, cache_dir, device, steps):
    """The classifier of a dataset's training images, from its cache or trained with Adam for
    `steps` batches of 128."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    path = Path(cache_dir, f"{Path(dataset).name}-{steps}-{digest.hexdigest()[:8]}.pt")

    torch.manual_seed(0)
    net = Classifier(images.shape[1], n_classes).to(device)
    if path.exists():
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return net.eval()

    path.parent.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    args = SimpleNamespace(batch_size=128, device=device)
    data = common.Data(len(images), images.shape[1], [], images.to(device), labels.to(device))
    for _ in tqdm(range(steps), "training the classifier"):
        x, y = common.sample_batch(args, data)
        loss = nn.functional.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    with runs.atomic_write(path) as f:
        torch.save(net.state_dict(), f)
    return net.eval()


@torch.no_grad()
def describe(net, images):
    """Features (N, 128) and predicted classes (N,) of uint8 images."""
    device = next(net.parameters()).device
    features = [net.features(common.scaled(part.to(device))) for part in images.split(500)]
    features = torch.cat(features)
    return features.cpu(), net.head(features).argmax(1).cpu()


def score(net, real, fake, labels=None):
    """Every metric of uint8 images `fake` against `real`, by name; `labels` are the classes
    asked for."""
    (real_features, _), (fake_features, predicted) = describe(net, real), describe(net, fake)
    n = min(len(real), len(fake))
    # The pairwise distances of precision and recall are of 5,000 images at most.
    precision, recall = precision_recall(
        real_features[: min(n, 5000)], fake_features[: min(n, 5000)]
    )
    result = {
        "images": n,
        "distance": frechet_distance(real_features[:n], fake_features[:n]),
        "classes": classes_covered(predicted, net.head.out_features),
        "precision": precision,
        "recall": recall,
    }
    if labels is not None:
        result["label_accuracy"] = (predicted == labels).double().mean().item()
    return result


# program ------------------------------------------------------------------------------------------


def read_folder(folder):
    """uint8 (N, C, S, S) of a folder of generated PNGs, and the classes in their names, or None."""
    files = sorted(Path(folder).glob("*.png"))
    if len(files) < 6:
        common.fail(f"{folder} holds {len(files)} PNG images, which is too few: use --generate")

    images = [np.asarray(Image.open(f)) for f in files]
    if len({image.shape for image in images}) > 1:
        common.fail(f"{folder} holds images of several sizes: name a folder made by --generate")

    images = np.stack(images)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    classes = [re.search(r"_class(\d+)", f.name) for f in files]
    labels = torch.tensor([int(c[1]) for c in classes]) if all(classes) else None
    return torch.from_numpy(images.copy()), labels


def main(argv=None):
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("dataset", type=runs.dataset, help=common.DATASET_HELP)
    p.add_argument("folder", type=os.path.expanduser, help="of images made by --generate")
    p.add_argument(
        "--data-dir", type=os.path.expanduser, default="data", help="where the dataset is"
    )
    p.add_argument(
        "--cache-dir",
        type=os.path.expanduser,
        default="data/quality",
        help="where the classifier is kept",
    )
    p.add_argument("--device", type=runs.device, default=default, help="cpu, cuda, mps, ...")
    p.add_argument(
        "--classifier-steps", type=runs.positive_int, default=1500, help="batches to train it"
    )
    p.add_argument(
        "--neighbours",
        type=os.path.expanduser,
        metavar="FILE",
        help="write up to 10 images to FILE, each above its nearest training image",
    )
    args = p.parse_args(argv)
    if args.neighbours and os.path.exists(args.neighbours):
        p.error(f"{args.neighbours} exists: choose another --neighbours")

    # The images come first, so that a wrong folder is reported before the classifier is trained.
    fake, labels = read_folder(args.folder)
    (train, train_labels), (test, test_labels), classes = real_images(args.dataset, args.data_dir)
    if fake.shape[1] != train.shape[1]:
        ours, real = fake.shape[1], train.shape[1]
        common.fail(
            f"{args.folder} has {ours}-channel images, and {args.dataset} has {real}-channel ones"
        )
    fake = common.resize(fake, 32)
    if labels is not None and common.are_numbers(classes):
        # Names of files have the class's number, and labels its index; -1 is no class of these.
        index_of = {int(name): index for index, name in enumerate(classes)}
        labels = torch.tensor([index_of.get(number, -1) for number in labels.tolist()])

    if args.neighbours:
        # What G was trained on: of a folder, both halves.
        seen = train if args.dataset in common.DATASETS else torch.cat([train, test])
        first = fake[:10]
        nearest = torch.cdist(first.flatten(1).float(), seen.flatten(1).float()).argmin(1)
        pairs = torch.cat([first, seen[nearest]]) / 255
        try:
            save_image(pairs, args.neighbours, nrow=len(first))
        except (OSError, ValueError) as error:
            common.fail(f"{args.neighbours} cannot be written ({common.reason(error)})")

    net = trained_classifier(
        args.dataset,
        train,
        train_labels,
        len(classes),
        args.cache_dir,
        args.device,
        args.classifier_steps,
    )

    # Fixed random orders: files may be sorted by class or, as MNIST's test images, by difficulty.
    rng = torch.Generator().manual_seed(0)
    train = train[torch.randperm(len(train), generator=rng)[: len(test)]]
    order = torch.randperm(len(test), generator=rng)
    test, test_labels = test[order], test_labels[order]

    result = score(net, train, fake, labels)
    if result["images"] < 1000:
        common.warn(f"{result['images']} images are too few for a meaningful score")
    floor = score(net, train[: len(fake)], test[: len(fake)], test_labels[: len(fake)])
    print(json.dumps({"folder": str(args.folder), **result, "floor": floor}, indent=1))
    print(
        f"{result['precision']:.0%} of these look real, {result['recall']:.0%} of real ones are "
        f"like these; the distance is {result['distance']:.1f}, and {floor['distance']:.1f} for "
        "real test images",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
