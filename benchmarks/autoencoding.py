"""What autoencoders are worth on Fashion-MNIST, where a recipe alone does not say it.

``filters``: a denoising autoencoder against filters of scikit-image (``pip install scikit-image PyWavelets``), on the
same noisy test images. The settings of each filter are those with the best PSNR on validation images; each is tried on
the noisy image as it is and cut to [0, 1]. PSNR is averaged over images whose values are cut to [0, 1].

``pretraining``: the same network with a few labels a class, started from an autoencoder's encoder and from scratch, each
with the training plan that is best on 1,000 validation images for the first seed.

``sparsity``: the sparse autoencoder of the recipe with several numbers of units that it may keep, all trained equally long:
what share of its units is active, and with what error. All 512 of 512 are the ReLU alone.

    python -m benchmarks.autoencoding filters models:/fashion-mnist-denoiser/1
    python -m benchmarks.autoencoding sparsity --epochs 2 --picture docs/sparsity.png
    python -m benchmarks.gan --data FashionMNIST --models models:/fashion-mnist-vae/1   # its samples
    python -m benchmarks.autoencoding pretraining models:/fashion-mnist-pretrained/1
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray

from datamodules import FashionMNIST
from modules import AutoencodingModule, ClassificationModule, Optimization
from modules.autoencoding import Plain, TopK
from modules.networks.decoders import Dense
from modules.networks.parts import Draws
from modules.pictures.charts import rasterize
from modules.spec import Backbone, DataSpec
from pipelines.engine.terminal import quieten
from pipelines.serving import registry

Pixels = NDArray[np.float32]
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                         "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}  # fmt: skip


def pictures(data: FashionMNIST, split: str, count: int) -> torch.Tensor:
    """uint8 N×1×28×28 from all over a split."""
    images = data.sources[split].images  # type: ignore[attr-defined]
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    return torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).contiguous()


def psnr(made: Pixels, clean: Pixels) -> float:
    error = ((made.clip(0, 1) - clean) ** 2).reshape(len(clean), -1).mean(1)
    return float((-10 * np.log10(np.maximum(error, 1e-10))).mean())


def filters(data: FashionMNIST, address: str, count: int) -> None:
    from skimage import filters as f
    from skimage import restoration as r
    from skimage.morphology import disk

    module = registry.load(address).module
    assert isinstance(module, AutoencodingModule)
    assert module.noise is not None

    def noisy(split: str, number: int) -> tuple[Pixels, Pixels, torch.Tensor]:
        image = pictures(data, split, number)
        clean = image.float() / 255
        seen = module.noise(clean, Draws(image, False))  # type: ignore[misc]
        return clean[:, 0].numpy(), seen[:, 0].numpy(), seen

    methods: dict[str, tuple[Callable[..., Pixels], dict[str, list[Any]]]] = {
        "Gaussian": (lambda x, sigma: f.gaussian(x, sigma=sigma), {"sigma": [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2]}),
        "median": (lambda x, radius: f.median(x, disk(radius)), {"radius": [1, 2, 3]}),
        "bilateral": (
            lambda x, color, space: r.denoise_bilateral(x.clip(0, None), sigma_color=color, sigma_spatial=space),
            {"color": [0.1, 0.2, 0.4, 0.6, 0.8, 1.2], "space": [0.7, 1, 1.5, 2]},
        ),
        "non-local means": (
            lambda x, h, patch, far, sigma: r.denoise_nl_means(
                x, patch_size=patch, patch_distance=far, h=h, sigma=sigma, fast_mode=False
            ),
            {"h": [0.2, 0.25, 0.3, 0.4, 0.5], "patch": [3, 5], "far": [6, 10], "sigma": [0.0, 0.3]},
        ),
        "total variation": (
            lambda x, weight: r.denoise_tv_chambolle(x, weight=weight),
            {"weight": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4]},
        ),
        "wavelets": (
            lambda x, wavelet, method, mode: r.denoise_wavelet(
                x, sigma=0.3, wavelet=wavelet, method=method, mode=mode, rescale_sigma=False
            ),
            {"wavelet": ["haar", "db2", "sym4"], "method": ["BayesShrink", "VisuShrink"], "mode": ["soft", "hard"]},
        ),
    }
    clean, seen, _ = noisy("val", 60)
    test_clean, test_seen, given = noisy("test", count)
    rows = [("noisy, cut to [0, 1]", "", psnr(test_seen, test_clean))]
    for name, (method, grid) in methods.items():
        tried = []
        for cut, *values in itertools.product([False, True], *grid.values()):
            options = dict(zip(grid, values, strict=True))
            made = np.stack([method(x.clip(0, 1) if cut else x, **options) for x in seen])
            tried.append((psnr(made, clean), cut, options))
        _, cut, options = max(tried, key=lambda t: t[0])
        made = np.stack([method(x.clip(0, 1) if cut else x, **options) for x in test_seen])
        rows.append((name, f"{options}{', cut first' if cut else ''}", psnr(made, test_clean)))
    with torch.inference_mode():
        codes = [module.bottleneck(module.features(module.normalize(part * 255)), Draws(part, True), 1.0).value
                 for part in given.split(500)]  # fmt: skip
        made = torch.cat([module.decode(code) for code in codes])[:, 0].numpy()
    rows.append((address, "", psnr(made, test_clean)))
    print(f"PSNR in dB over {len(test_clean)} test images")
    for name, setting, value in rows:
        print(f"  {name:40} {value:6.2f}  {setting}")


def sparsity(data: FashionMNIST, active: list[int], seeds: int, epochs: int, norm: bool, picture: str | None) -> None:
    image = pictures(data, "test", 10_000)

    def measure(count: int, seed: int) -> tuple[float, float, int]:
        """Share of the units that are active, MSE, and the number of units that are active for no test image."""
        L.seed_everything(seed, verbose=False)
        module = AutoencodingModule(
            DataSpec(in_chans=1, image_size=28),
            bottleneck=Plain(512, activation=TopK(count), norm=norm),
            decoder=Dense(),
            optimization=Optimization(lr=0.003),
            pca=False,
        )
        L.Trainer(max_epochs=epochs, limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(module, data)
        with torch.inference_mode():
            codes = torch.cat([module.eval().encode(part).value for part in image.split(500)])
            made = torch.cat([module.decode(code) for code in codes.split(500)])
        on = codes > 0
        return float(on.float().mean()), float(F.mse_loss(made, image / 255)), int((~on.any(0)).sum())

    print("| kept of 512 | active | MSE, each seed | units never active |\n|---|---|---|---|")
    points = []
    for count in active:
        shares, errors, silent = zip(*(measure(count, seed) for seed in range(seeds)), strict=True)
        points.append((100 * np.mean(shares), np.mean(errors)))
        print(f"| {count} | {np.mean(shares):.1%} | {', '.join(f'{e:.5f}' for e in errors)} | "
              f"{np.mean(silent):.0f} |", flush=True)  # fmt: skip
    figure = Figure((5, 3.5), dpi=100)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set(xlabel="active units, % of 512", ylabel="MSE of the test images", ylim=0)
    figure.tight_layout()
    if picture:
        PIL.Image.fromarray(rasterize(figure)).save(picture)


def pretraining(data: FashionMNIST, addresses: list[str], shots: list[int], seeds: int, steps: int) -> None:
    kind = registry.load(addresses[0]).module.backbone.recipe
    plans = [(0.001, 1.0), (0.001, 0.1)]

    def measure(start: str, shot: int, seed: int, lr: float, scale: float, stage: str) -> float:
        L.seed_everything(seed, verbose=False)
        few = FashionMNIST(
            data.root, augmentation="light", batch_size=50, num_workers=0, seed=seed, train_per_class=shot
        )
        plan = Optimization(lr=lr, backbone_lr_scale=scale)
        options = kind["backbone_options"] if start == kind["backbone"] else None
        module = ClassificationModule(
            DataSpec(num_classes=10, in_chans=1, image_size=28), Backbone(start, options=options), optimization=plan
        )
        trainer = L.Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, num_sanity_val_steps=0, **QUIET)
        trainer.fit(module, few)
        measured = L.Trainer(limit_val_batches=20, **QUIET)  # 1,000 images
        (figures,) = getattr(measured, "test" if stage == "test" else "validate")(module, datamodule=few, verbose=False)
        return float(figures[f"{stage}/accuracy"])

    def starts() -> Iterator[str]:
        yield kind["backbone"]
        yield from addresses

    print(f"Test accuracy after {steps} steps, {seeds} draws of the labels: mean ± standard deviation")
    for shot in shots:
        for start in starts():
            tried = {plan: measure(start, shot, 0, *plan, "val") for plan in plans}
            plan = max(tried, key=lambda p: tried[p])
            values = np.array([measure(start, shot, seed, *plan, "test") for seed in range(seeds)])
            name = "from scratch" if start == kind["backbone"] else start
            each = " ".join(f"{value:.4f}" for value in values)
            print(f"  {shot:3} labels a class  {name:40} {values.mean():.4f} ± {values.std(ddof=1):.4f}  ({each}; "
                  f"lr {plan[0]}, of the backbone × {plan[1]})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["filters", "pretraining", "sparsity"])
    parser.add_argument("models", nargs="*", help="models:/name/version; one for filters, several for pretraining")
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--count", type=int, default=10_000, help="test images for filters")
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--active", type=int, nargs="+", default=[19, 38, 76, 154, 307, 512], help="units to keep for sparsity"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of each training for sparsity")
    parser.add_argument("--norm", action="store_true", help="normalise the code before the largest are kept")
    parser.add_argument("--picture", help="a file for the curve of sparsity")
    given = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    begin, spent = time.perf_counter(), time.process_time()
    data = FashionMNIST(given.root, augmentation="none", num_workers=0)
    if given.what == "filters":
        filters(data, given.models[0], given.count)
    elif given.what == "sparsity":
        sparsity(data, given.active, given.seeds, given.epochs, given.norm, given.picture)
    else:
        pretraining(data, given.models, given.shots, given.seeds, given.steps)
    print(f"{time.perf_counter() - begin:.0f} s, {time.process_time() - spent:.0f} s of processor time")


if __name__ == "__main__":
    main()
