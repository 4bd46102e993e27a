"""Style transfer: its losses by hand, what it makes of pictures, and what it says of those that it cannot take."""

import os
import signal
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from datamodules.options import Preprocessing
from modules import Backbone, DataSpec, StylizationModule, stylization
from modules.measures.images import FixedFeatures
from modules.networks.translators import ResidualTranslator
from modules.pictures.sheets import from_address
from modules.style import StyleObjective, content_loss, gram, luminance, style_loss, stylize, total_variation
from pipelines import predict
from pipelines.engine.command import command
from pipelines.serving import store
from pipelines.serving.video import Drawing, Video
from pipelines.style import style
from pipelines.stylization import stylization as training

SMALL = ["--backbone", "test_resnet", "--pretrained", "false", "--size", "72"]


def pictures() -> tuple[str, str]:
    """A gradient with a square on it, and stripes, of other sizes and shapes."""
    y, x = np.mgrid[:60, :80]
    content = np.stack([60 + x, 90 + y, 120 + 0 * x], 2)
    content[20:40, 30:50] = 150, 100, 90
    stripes = np.where((np.mgrid[:50, :40].sum(0) // 4 % 2)[..., None], (140, 90, 70), (90, 120, 150))
    Image.fromarray(content.astype(np.uint8)).save("content.png")
    Image.fromarray(stripes.astype(np.uint8)).save("stripes.png")
    return "content.png", "stripes.png"


def test_gram_and_losses_are_what_one_works_out_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels of 1×2 places
    assert gram(maps).tolist() == [[[5 / 4, 11 / 4], [11 / 4, 25 / 4]]]
    assert torch.equal(gram(maps.repeat(1, 1, 1, 3)), gram(maps)), "it depends on the size of the picture"
    wanted = torch.tensor([[[[1.0, 0.0]], [[0.0, 4.0]]]])
    assert content_loss(maps, wanted).item() == 0.5 * (4 + 9)
    # Equation 4 as it stands: Gram matrices that are not divided, and 1 / (4 N² M²) with N = M = 2.
    undivided = (torch.tensor([[5.0, 11.0], [11.0, 25.0]]) - torch.tensor([[1.0, 0.0], [0.0, 16.0]])).square().sum()
    assert style_loss(gram(maps), gram(wanted)).item() == pytest.approx(undivided.item() / (4 * 2**2 * 2**2))
    assert total_variation(torch.tensor([[[[0.0, 1.0], [3.0, 1.0]]]])).item() == (9 + 0) / 2 + (1 + 4) / 2
    assert total_variation(torch.tensor([[[[0.0, 1.0]]]])).item() == 1, "one pixel high"
    assert luminance(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)).item() == pytest.approx(0.299 + 0.587 / 2)


def test_the_gradient_is_that_of_the_papers_equations():
    generator = torch.Generator().manual_seed(0)
    image, content, painting = torch.rand(3, 1, 3, 4, 5, generator=generator, dtype=torch.float64).unbind()
    features = torch.tensor([1.0, -2.0], dtype=torch.float64)

    class Toy(FixedFeatures):
        def named(self, image, layers):
            maps = torch.einsum("bchw,k->bkhw", image, features)
            return dict.fromkeys(layers, maps)

    objective = StyleObjective(Toy("vgg19"), content, painting, ["maps"], "maps", (2.0, 3.0, 0.0))
    image.requires_grad_()
    losses = objective(image)
    losses.total.backward()
    # Equation 2: F − P, and equation 6: Fᵀ(G − A) / (N² M²) with undivided Gram matrices; then through the convolution.
    f, p, s = (torch.einsum("bchw,k->bkhw", x.detach(), features)[0].flatten(1) for x in (image, content, painting))
    n, m = f.shape
    by_content = (f - p) / (0.5 * p.square().sum())
    a = s @ s.T
    by_style = (f @ f.T - a) @ f / (n * m) ** 2 / (0.25 * (a / (n * m)).square().sum())
    wanted = torch.einsum("kp,k->p", 2 * by_content + 3 * by_style, features).view(4, 5)
    assert torch.allclose(image.grad[0], wanted.expand(3, 4, 5), rtol=1e-9)
    at = 2 * losses.content + 3 * losses.style
    assert losses.total.item() == pytest.approx(at.item())
    assert torch.autograd.gradcheck(lambda x: objective(x).total, image)


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_the_loss_falls_and_a_seed_gives_the_same_picture(method):
    torch.manual_seed(0)
    content, painting = torch.rand(1, 3, 72, 80), torch.rand(1, 3, 96, 72) ** 3
    objective = StyleObjective(FixedFeatures("test_resnet"), content, painting)
    told = []
    ends = [
        stylize(objective, content, 8, method, lambda step, losses, x: told.append((step, losses))) for _ in range(2)
    ]
    assert torch.equal(*ends)
    told = told[: len(told) // 2]
    assert [step for step, _ in told[:8]] == [*range(1, 9)]
    assert told[0][1].content == 0, "it begins with the content"
    assert told[-1][1].total < 0.9 * told[0][1].total
    assert told[-1][1].style < told[0][1].style


def test_the_command_paints_films_and_tracks(capsys):
    content, painting = pictures()
    command(style, [content, painting, "--out", "new/made.png", "--steps", "6", "--start", "noise", *SMALL])
    made = np.asarray(Image.open("new/made.png"))
    assert made.shape == (54, 72, 3)
    film = [*Video("new/made.mp4")]
    assert len(film) >= 7
    assert np.abs(film[-1] - made.astype(float)).mean() < np.abs(film[0] - made.astype(float)).mean()
    run = mlflow.search_runs(experiment_names=["style"], output_format="list")[0]
    assert run.info.status == "FINISHED"
    assert run.info.run_id in capsys.readouterr().out
    assert run.data.params["optimizer"] == "lbfgs"
    assert run.data.params["seed"] == "0"
    client = mlflow.MlflowClient()
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"made.png", "made.mp4", "overview.png"}
    history = client.get_metric_history(run.info.run_id, "loss/style")
    assert history[-1].value < history[0].value
    command(style, [content, painting, "--out", "again.png", "--steps", "6", "--start", "noise", *SMALL])
    assert np.array_equal(np.asarray(Image.open("again.png")), made)


def test_a_signal_ends_the_command_and_its_run(monkeypatch):
    monkeypatch.setattr("modules.style.stylize", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        command(style, [*pictures(), "--out", "made.png", *SMALL])
    assert mlflow.search_runs(experiment_names=["style"], output_format="list")[0].info.status == "KILLED"
    assert mlflow.active_run() is None


def test_the_colour_of_the_content_stays_on_request():
    content, painting = pictures()
    command(style, [content, painting, "--out", "grey.png", "--keep_colour", "true", "--steps", "5", *SMALL])
    made = np.asarray(Image.open("grey.png")).astype(float)
    before = np.asarray(Image.open(content).resize((72, 54), Image.Resampling.LANCZOS)).astype(float)
    inside = ((made > 0) & (made < 255)).all(2)  # elsewhere colours end
    assert inside.mean() > 0.5
    for first, second in ((0, 1), (2, 1)):
        chroma = (made[..., first] - made[..., second]) - (before[..., first] - before[..., second])
        assert np.abs(chroma[inside]).max() <= 1  # both are rounded
    assert np.abs(made - before).mean() > 1, "nothing was changed"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nowhere.png", "stripes.png"], "nowhere.png"),
        (["content.png", "text.png"], "text.png is"),
        (["content.png", "stripes.png", "--backbone", "resnt18"], "There is no backbone 'resnt18'. Did you mean"),
        (["content.png", "stripes.png", "--backbone", "mixer_s32_224"], "mixer_s32_224"),
        (["content.png", "stripes.png", "--content_layer", "layer9"], "no layer 'layer9'; its stages are"),
        (["content.png", "stripes.png", "--style_layers", "[layer1, layer]"], "no layer 'layer'"),
        (["content.png", "stripes.png", "--out", "made.gone"], "--out made.gone must end in one of .jpg"),
        (["content.png", "stripes.png", "--out", "./stripes.png"], "--out ./stripes.png would replace the picture"),
        (["content.png", "stripes.png", "--steps", "0"], "--steps must be at least 1"),
        (["content.png", "stripes.png", "--style_weight", "nan"], "--style_weight must be"),
    ],
)
def test_what_cannot_be_is_told_in_a_paragraph(given, told, capsys):
    pictures()
    Path("text.png").write_text("no picture")
    with pytest.raises(SystemExit) as end:
        command(style, [given[0], given[1], *SMALL, *given[2:]])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert told in message
    assert message.count("\n") == 1
    assert not Path("style.png").exists()


def painter(style: str | None = None, **options) -> StylizationModule:
    """A small stylizer whose weights are not those that it begins with."""
    torch.manual_seed(0)
    data, backbone = DataSpec(image_size=48), Backbone("test_resnet")
    module = StylizationModule(data, backbone, translator=ResidualTranslator(4, 2), style=style, **options).eval()
    for parameter in module.painter.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def test_a_stylizer_learns_from_the_losses_of_style_transfer():
    content, stripes = pictures()
    module = painter(stripes, style_size=48, content_weight=2.0, style_weight=3.0, variation_weight=5.0)
    image = torch.from_numpy(np.stack([np.asarray(Image.open(content))[:48, :48]] * 2)).permute(0, 3, 1, 2).clone()
    image[1] = 255 - image[1].flip(1)
    losses = module.losses({"image": image})
    small = Image.open(stripes).resize((38, 48), Image.Resampling.LANCZOS)
    wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    alone = []
    for one in image:  # each picture by itself, as pipelines.style has it
        features = FixedFeatures("test_resnet", network=module.backbone)
        objective = StyleObjective(features, one[None] / 255, wanted, weights=(2.0, 3.0, 5.0))
        alone.append(objective(module.paint(one[None])))
    for name, weight in (("content", 2.0), ("style", 3.0), ("variation", 5.0)):
        mean = weight * (getattr(alone[0], name) + getattr(alone[1], name)).item() / 2
        assert losses.terms[name].item() == pytest.approx(mean, rel=1e-4)
    assert losses.total.item() == pytest.approx((alone[0].total + alone[1].total).item() / 2, rel=1e-4)
    losses.total.backward()
    learning = {name.partition(".")[0] for name, p in module.named_parameters() if p.grad is not None}
    assert learning == {"painter"}


def test_a_large_picture_is_painted_in_pieces_as_in_one_piece(monkeypatch):
    module = painter()
    y, x = torch.meshgrid(torch.arange(150), torch.arange(210), indexing="ij")
    image = torch.stack([x, y + 60, (x * y) % 256]).byte()[None]  # its statistics differ from place to place
    assert module.stylize(image).shape == image.shape
    image = image[..., :148, :208]  # what four divides is not extended
    whole = module.stylize(image)
    assert ((whole > 0) & (whole < 255)).float().mean() > 0.5
    monkeypatch.setattr(stylization, "VALUES", 0)
    monkeypatch.setattr(stylization, "TILE", 64)
    apart = (module.stylize(image).int() - whole).abs()
    assert apart.max() <= 1  # both are rounded
    assert apart.float().mean() < 255e-3 / 10
    module.reach = 8
    assert (module.stylize(image).int() - whole).abs().max() > 1, "this picture shows no seams"


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (9, 50), (50, 37)])
def test_a_picture_of_any_size_is_painted_at_its_size(size):
    made = painter().predict({"image": torch.randint(256, (1, 3, *size), dtype=torch.uint8)})
    assert from_address(made[0]["pictures"]["stylized"]).shape == (*size, 3)


def test_the_extractor_of_a_stylizer_never_is_in_training_mode():
    module = StylizationModule(DataSpec(image_size=48), Backbone("test_resnet"))
    assert not any(part.training for part in module.backbone.modules())  # a trainer leaves modes as they are
    assert module.train().painter.training
    assert not any(part.training for part in module.backbone.modules())


def test_a_film_is_painted_frame_by_frame():
    module = painter()
    store.save_model(Path("model"), module, Preprocessing(48, 3, "native"), "stylization")
    y, x = np.mgrid[:64, :96]
    frames = [np.stack([x + 20 * k, 2 * y, 255 - x - y], 2).clip(0, 255).astype(np.uint8) for k in range(3)]
    film = Drawing("film.mp4", 10)
    for k, frame in enumerate(frames):
        film.write(frame, k / 10)
    film.close()
    assert predict.predict("model", ["film.mp4"], "out") == 0
    drawn = [*Video("out/film.mp4")]
    assert len(drawn) == len(frames)
    for frame, made in zip(frames, drawn, strict=True):
        wanted = module.stylize(torch.from_numpy(frame).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
        assert made.shape == frame.shape
        plain, *others = (cv2.blur(image.astype(np.float32), (5, 5)) for image in (made, wanted, frame))
        far, unpainted = (np.abs(plain - other).mean() for other in others)
        assert far < unpainted / 2, "but for the codec it is the painted one"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--model.style FILE"),
        (["--model.style", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--model.style", "text.png"], "text.png: it cannot be read as a picture"),
        (["--model.style", "stripes.png", "--model.content_layer", "layer9"], "no layer 'layer9'; its stages are"),
        (
            ["--model.style", "stripes.png", "--model.backbone.transfer", "finetune"],
            "--model.backbone.transfer finetune",
        ),
    ],
)
def test_what_a_stylizer_cannot_learn_is_told_in_a_paragraph(given, told, capsys):
    pictures()
    Path("text.png").write_text("no picture")
    small = ["--data", "Digits8x8", "--data.image_size", "16", "--model.backbone", "test_resnet",
             "--model.backbone.pretrained", "false"]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        training(["fit", *small, *given, "--output", "out"])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert told in message
    assert "Traceback" not in message
