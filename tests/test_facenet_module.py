import itertools
import os
from collections.abc import Iterator
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import built, processes
from jsonargparse import ArgumentParser
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from datamodules import Glyphs
from datamodules.options import Preprocessing
from modules import FaceNetModule, Optimization
from modules.facenet import CosFaceLoss, HardMiner, ProgressiveMiner, SemiHardMiner, TripletLoss
from modules.facenet import metrics as p
from modules.facenet.mining import mean_distances, triplet_hinge, within_class_whitening
from modules.processes import gathered
from modules.spec import Backbone, DataSpec


def circle(*degrees: float) -> Tensor:
    """Embeddings on a circle; the squared distance of two is 2 - 2 cos of the angle between them."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def batch(people: int = 5, pictures: int = 4, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embedding = F.normalize(torch.randn(people * pictures, size, generator=generator, dtype=torch.float64))
    return embedding, torch.arange(people).repeat_interleave(pictures)


def every_triplet(identity: Tensor) -> Iterator[tuple[int, int, int]]:
    for a, b, n in itertools.product(range(len(identity)), repeat=3):
        if a != b and identity[a] == identity[b] != identity[n]:
            yield a, b, n


def test_triplet_loss_is_that_of_the_lectures():
    # d(a, p)² = 2 - 2 cos 60° = 1; d(a, n)² = 2 - 2 cos 90° = 2 for one stranger, 2 - 2 cos 50° for the other
    embedding, identity = circle(0, 60, 90, -50), torch.tensor([0, 0, 1, 2])
    triplets = tuple(torch.tensor(row) for row in ([0, 0], [1, 1], [2, 3]))
    near = 2 - 2 * np.cos(np.deg2rad(50))
    assert float(TripletLoss(0.2)(embedding, identity, triplets)) == pytest.approx(1 - near + 0.2, abs=1e-5)
    satisfied = tuple(row[:1] for row in triplets)
    assert float(TripletLoss(0.2)(embedding, identity, satisfied)) == 0
    assert float(TripletLoss(1.2)(embedding, identity, satisfied)) == pytest.approx(0.2, abs=1e-5)


def test_loss_and_monitors_equal_those_over_every_triplet():
    embedding, identity = batch()
    distance = torch.cdist(embedding, embedding).square()
    hinge = torch.stack([distance[a, b] - distance[a, n] + 0.2 for a, b, n in every_triplet(identity)]).relu()
    mean, active = triplet_hinge(embedding, identity, 0.2)
    assert float(mean) == pytest.approx(float(hinge.mean()), rel=1e-6)
    assert float(active) == pytest.approx(float((hinge > 0).double().mean()), rel=1e-6)
    assert float(TripletLoss()(embedding, identity)) == pytest.approx(float(hinge[hinge > 0].mean()), rel=1e-6)
    same = identity[:, None] == identity
    assert float(mean_distances(embedding, identity)[1]) == pytest.approx(float(distance[~same].mean()))
    same.fill_diagonal_(False)
    assert float(mean_distances(embedding, identity)[0]) == pytest.approx(float(distance[same].mean()))


def test_miners_find_what_a_search_through_all_triplets_finds():
    embedding, identity = batch(seed=1)
    distance = torch.cdist(embedding, embedding).square()
    nearest: dict[tuple[int, int], tuple[float, int]] = {}
    hardest: dict[tuple[int, int], tuple[float, int]] = {}
    for a, b, n in every_triplet(identity):
        if distance[a, b] < distance[a, n] < distance[a, b] + 0.2:
            nearest[a, b] = min(nearest.get((a, b), (9, 9)), (float(distance[a, n]), n))
        hardest[a, b] = min(hardest.get((a, b), (9, 9)), (float(distance[a, n]), n))
    found = set(zip(*(row.tolist() for row in SemiHardMiner(0.2)(embedding, identity)), strict=True))
    assert found == {(a, b, n) for (a, b), (_, n) in nearest.items()}
    every = miners.TripletMarginMiner(0.2, "semihard", distance=LpDistance(power=2))(embedding, identity)
    assert found < set(zip(*(row.tolist() for row in every), strict=True))
    found = set(zip(*(row.tolist() for row in HardMiner()(embedding, identity)), strict=True))
    assert found == {(a, b, n) for (a, b), (_, n) in hardest.items()}


def test_a_batch_without_triplets_costs_nothing():
    alone, identity = batch(people=1)
    for miner in (SemiHardMiner(), HardMiner(), ProgressiveMiner()):
        alone.requires_grad_()
        loss = TripletLoss()(alone, identity, miner(alone, identity))
        loss.backward()
        assert loss.item() == 0
        assert not alone.grad.any()


def test_mining_turns_hard_when_few_triplets_are_active_and_strangers_lie_apart_and_back_when_they_meet():
    identity = torch.arange(4).repeat_interleave(2)
    apart, close = circle(0, 1, 90, 91, 180, 181, 270, 271), circle(0, 1, 2, 3, 4, 5, 6, 7)
    miner = ProgressiveMiner()
    for _ in range(30):
        miner(close, identity)
    assert not miner.state  # few triplets, if any, are satisfied
    steps = next(step for step in range(100) if (miner(apart, identity), bool(miner.state))[1])
    assert 10 < steps < 60, "one batch is not enough"
    triplets, hard = miner(apart, identity), HardMiner()(apart, identity)
    assert all(torch.equal(*rows) for rows in zip(triplets, hard, strict=True))
    restored = ProgressiveMiner()
    restored.load_state_dict(miner.state_dict())
    assert restored.state
    for _ in range(60):
        restored(close, identity)
    assert not restored.state
    lone = ProgressiveMiner()
    lone(torch.ones(4, 2), torch.zeros(4))  # nothing to compare
    assert lone.averages.isfinite().all()


def faces(**options) -> FaceNetModule:
    torch.manual_seed(0)
    return built(FaceNetModule, in_chans=1, image_size=32, embedding_size=16, **options)


def test_embeddings_have_length_one_and_stay_float32_under_autocast():
    image = torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8)
    module = faces().eval()
    with torch.autocast("cpu", torch.bfloat16):
        embedding = module(image)
    assert embedding.dtype == torch.float32
    assert torch.allclose(embedding.norm(dim=1), torch.ones(4), atol=1e-6)


def test_features_of_deeper_levels_are_pooled_and_of_length_one_each():
    image = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    module = FaceNetModule(DataSpec(in_chans=1, image_size=32), Backbone("resnet18", options={"channels": [8, 16, 24, 32]}), levels=2).eval()  # fmt: skip
    with torch.no_grad():
        features = module.features(image)
        maps = module.backbone(module.normalize(image))
    assert features.shape == (2, 24 + 32)
    assert torch.allclose(features[:, :24], F.normalize(maps[-2].mean((2, 3))), atol=1e-6)
    assert torch.allclose(features[:, 24:].norm(dim=1), torch.ones(2), atol=1e-6)
    again = FaceNetModule.from_architecture(module.architecture).eval()
    again.load_state_dict(module.state_dict())
    assert again.predict({"image": image}) == module.predict({"image": image})


def test_a_mirrored_picture_has_the_same_embedding_where_that_is_asked_for():
    image = torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8)
    module = faces(mirror=True).eval()
    with torch.no_grad():
        assert torch.allclose(module(image), module(image.flip(3)), atol=1e-6)
        assert torch.allclose(module(image).norm(dim=1), torch.ones(4), atol=1e-6)
        module.train()
        assert not torch.allclose(module(image), module(image.flip(3)), atol=1e-3)


def test_a_published_embedding_is_given_as_it_is_until_the_last_layer_learns():
    module = FaceNetModule(DataSpec(in_chans=1, image_size=32), embedding_size=0).eval()
    image = torch.randint(256, (3, 1, 32, 32), dtype=torch.uint8)
    assert torch.allclose(module(image), F.normalize(module.features(image)), atol=1e-6)
    assert module.head.out_features == module.backbone.head_hidden_size


def test_whitening_makes_people_vary_alike_in_all_directions():
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(40).repeat_interleave(10)
    stretch = torch.logspace(0, -1, 6)
    apart = torch.randn(400, 6, generator=generator) * stretch
    features = 3 * torch.randn(40, 6, generator=generator)[identity] + apart + 5
    weight, bias = within_class_whitening(features, identity, 6, shrinkage=0)
    embedding = features @ weight.T + bias
    assert torch.allclose(embedding.mean(0), torch.zeros(6), atol=1e-5)
    centred = embedding - torch.stack([embedding[identity == i].mean(0) for i in range(40)])[identity]
    within = centred.T @ centred
    assert torch.allclose(within / within[0, 0], torch.eye(6), atol=1e-3)
    assert float(embedding.var(0, correction=1).sum()) == pytest.approx(1, abs=1e-4)
    assert within_class_whitening(features, identity, 9)[0].shape == (9, 6)


def test_a_training_can_start_whitened():
    data = Glyphs(people=60, batch_size=16, num_workers=0, augmentation="none")
    torch.manual_seed(0)
    module = FaceNetModule(DataSpec(in_chans=1, image_size=32), whiten=True, optimization=Optimization(lr=1e-9))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
                        limit_train_batches=1, enable_progress_bar=False, use_distributed_sampler=False)  # fmt: skip
    before = module.head.weight.clone()
    trainer.fit(module, data)
    assert not torch.allclose(before, module.head.weight)
    source, module = data.sources["train"], module.eval()
    image = torch.from_numpy(source.images[:200].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        whitened = triplet_hinge(module(image), torch.from_numpy(source.labels[:200]))[1]
        module.head.weight.copy_(before)
        untouched = triplet_hinge(module(image), torch.from_numpy(source.labels[:200]))[1]
    assert whitened < 0.5 * untouched


def test_losses_with_weights_of_the_people_train_in_float32_and_stay_out_of_the_registered_model(tmp_path):
    from pipelines.serving.store import load_model, save_model

    module = faces(num_classes=7, loss=losses.ArcFaceLoss, threshold=0.5)
    assert module.loss.W.shape == (16, 7)
    rows = {"image": torch.randint(256, (8, 1, 32, 32), dtype=torch.uint8), "identity": torch.arange(8) % 7}
    with torch.autocast("cpu", torch.bfloat16):
        module.losses(rows).total.backward()
    assert module.loss.W.dtype == torch.float32
    assert module.loss.W.grad.abs().sum() > 0
    save_model(tmp_path / "model", module, Preprocessing(32, 1, crop_pct=1.0), "facenet")
    loaded, _ = load_model(tmp_path / "model")
    assert loaded.threshold == 0.5
    module.eval()
    assert loaded.predict(rows) == module.predict(rows)


def test_triplets_are_active_by_the_margin_of_the_loss():
    rows = {"image": torch.randint(256, (8, 1, 32, 32), dtype=torch.uint8), "identity": torch.arange(8) // 2}
    shares = []
    for loss in (TripletLoss(0), TripletLoss(4), losses.ArcFaceLoss):
        module = faces(num_classes=4, loss=loss)
        shares.append(float(module.losses(rows).figures["active_triplets"]))
    embedding = module(rows["image"]).detach()
    assert shares == [float(triplet_hinge(embedding, rows["identity"], margin)[1]) for margin in (0, 4, 0.2)]
    assert shares[0] < shares[1] == 1


@pytest.mark.parametrize("name", ["pytorch_metric_learning.losses.ArcFaceLoss", "modules.facenet.CosFaceLoss"])
def test_losses_are_named_on_the_command_line_and_told_the_number_of_people(name):
    parser = ArgumentParser()
    parser.add_class_arguments(FaceNetModule, "model")
    small = ["--model.data.num_classes", "7", "--model.data.in_chans", "1", "--model.data.image_size", "32"]
    given = parser.parse_args([*small, "--model.loss", name, "--model.loss.margin", "0.2", "--model.loss.scale", "30"])
    loss = parser.instantiate(given).model.loss
    embedding, identity = batch(size=128)
    embedding = embedding.float()
    cosine = (embedding @ F.normalize(loss.W, dim=0)).detach()
    own = identity[:, None] == torch.arange(7)
    moved = (cosine.acos() + np.radians(0.2)).cos() if name.endswith("ArcFaceLoss") else cosine - 0.2
    expected = F.cross_entropy(30 * torch.where(own, moved, cosine), identity)
    assert float(loss(embedding, identity)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", [losses.ArcFaceLoss, losses.SubCenterArcFaceLoss, CosFaceLoss])
def test_losses_with_class_weights_get_sizes_that_a_recipe_leaves_open(kind):
    loss = faces(num_classes=7, loss=partial(kind, num_classes=None, embedding_size=None)).loss
    assert loss.W.shape[0] == 16
    assert loss.W.shape[1] % 7 == 0


def gradient(module: FaceNetModule, image: Tensor, identity: Tensor) -> list[Tensor]:
    triplets = module.miner(*(pair := (gathered(module(image)), gathered(identity))))
    loss = module.loss(*pair, triplets)
    loss.backward()
    return [loss.detach(), *pair[0].detach()[:, None].unbind(), *(p.grad for p in module.parameters())]


def rank(number: int, port: int, image: Tensor, identity: Tensor, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": "2",
                   "LOCAL_RANK": str(number)}  # fmt: skip
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.strategy.setup_environment()
    module = faces(miner=SemiHardMiner())
    module._trainer = trainer
    values = gradient(module, image[number::2], identity[number::2])
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    if number == 0:
        queue.put([value.numpy() for value in values])
    dist.barrier()


def test_two_processes_mine_the_joined_batch_gradients_included():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    image = torch.randint(256, (16, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    identity = torch.arange(4).repeat_interleave(4)
    queue = processes.Queue()
    started = [processes.Process(target=rank, args=(r, port, image, identity, queue)) for r in range(2)]
    for process in started:
        process.start()
    joined = queue.get(timeout=120)
    for process in started:
        process.join(60)
    alone = gradient(faces(miner=SemiHardMiner()), image, identity)
    assert float(alone[0]) > 0
    assert len(joined) == len(alone)
    for one, two in zip(alone, joined, strict=True):
        assert np.allclose(one.numpy(), two, rtol=1e-4, atol=1e-6)


def scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    same = generator.random(500) < 0.3
    return same, (generator.normal(1.0, 0.4, 500) - 0.5 * same).clip(0, 4).astype(np.float32)


def test_auc_eer_and_tar_equal_those_of_scikit_learn():
    same, distance = scores()
    roc = p.Roc.of(same, distance)
    assert roc.area == pytest.approx(roc_auc_score(same, -distance))
    false, true, _ = roc_curve(same, -distance, drop_intermediate=False)
    grid = np.linspace(0, 1, 200_001)
    crossing = grid[np.argmin(np.abs(grid - (1 - np.interp(grid, false, true))))]
    assert roc.equal_error_rate == pytest.approx(crossing, abs=1e-4)
    tar, far, threshold = roc.at(0.01)
    assert far <= 0.01 < far + 1 / (~same).sum() + 1e-9
    assert (tar, far) == ((distance[same] <= threshold).mean(), (distance[~same] <= threshold).mean())


def test_equal_error_rate_of_perfect_useless_and_reversed_distances():
    same = np.array([True, True, False, False])
    for distance, rate in (([0, 1, 2, 3], 0), ([1, 1, 1, 1], 0.5), ([2, 3, 0, 1], 1)):
        assert p.Roc.of(same, np.array(distance, np.float32)).equal_error_rate == pytest.approx(rate)


def test_ten_folds_choose_the_threshold_on_the_other_nine():
    # In nine folds mates are at 0.495 and strangers at 0.695; in the last one, at 0.595 and 0.645.
    fold = np.arange(10).repeat(4)
    same = np.tile([True, True, False, False], 10)
    distance = np.where(same, 0.495, 0.695).astype(np.float32)
    distance[-4:] = [0.595, 0.595, 0.645, 0.645]
    result = p.ten_fold(p.Pairs(fold, fold, same, fold), distance, far=0.1)
    # Without the last fold 0.50 is the smallest best threshold, and refuses all of its pairs: half are right.
    assert result.accuracy.tolist() == [1.0] * 9 + [0.5]
    assert result.threshold[-1] == 0.5
    assert result.threshold[0] == pytest.approx(0.6)
    assert result.accuracy.mean() == pytest.approx(0.95)
    assert result.standard_error == pytest.approx(0.05)
    assert result.accepted[-1] == 0  # at 0.495, where the others accept no stranger


def test_drawn_pairs_are_half_of_each_kind_and_their_folds_share_nobody():
    identity = np.arange(40).repeat(5)
    pairs = p.drawn_pairs(identity, most=20)
    assert np.array_equal(pairs.same, identity[pairs.first] == identity[pairs.second])
    assert (pairs.first != pairs.second).all()
    for fold in range(10):
        inside = pairs.fold == fold
        assert pairs.same[inside].sum() == (~pairs.same[inside]).sum() == 20
        here = set(identity[np.append(pairs.first[inside], pairs.second[inside])])
        there = set(identity[np.append(pairs.first[~inside], pairs.second[~inside])])
        assert not here & there
    few = p.drawn_pairs(np.arange(3).repeat(5))
    assert np.bincount(few.fold).tolist() == [6] * 10


def test_pairs_are_all_pairs_or_all_mates_and_a_draw_of_strangers(monkeypatch):
    identity = np.array([2, 0, 1, 0, 2, 2])
    pairs = p.all_pairs(identity)
    found = sorted(map(tuple, np.sort(np.stack([pairs.first, pairs.second], 1))))
    assert found == list(itertools.combinations(range(6), 2))
    assert np.array_equal(pairs.same, identity[pairs.first] == identity[pairs.second])
    monkeypatch.setattr(p, "PAIRS", 5)
    drawn = p.all_pairs(identity)
    assert drawn.same.sum() == 4
    assert (identity[drawn.first] == identity[drawn.second]).tolist() == drawn.same.tolist()


def test_retrieval_equals_a_search_by_hand():
    generator = np.random.default_rng(0)
    embedding = F.normalize(torch.from_numpy(generator.normal(size=(60, 4)))).numpy().astype(np.float32)
    identity = generator.integers(8, size=60)
    identity[0] = 99  # has no mate
    found = p.retrieval(embedding, identity)
    order = np.argsort(-(embedding @ embedding.T) + 9 * np.eye(60), 1)[:, :-1]
    hits = identity[order] == identity[:, None]
    mates = hits.sum(1)
    asked = mates > 0
    assert found["recall_at_1"] == pytest.approx(hits[asked, 0].mean())
    assert found["recall_at_5"] == pytest.approx(hits[asked, :5].any(1).mean())
    precision = hits.cumsum(1) / np.arange(1, 60)
    at_r = [(precision[i] * hits[i])[: mates[i]].sum() / mates[i] for i in np.flatnonzero(asked)]
    assert found["map_at_r"] == pytest.approx(np.mean(at_r), rel=1e-5)


def test_rank_one_among_distractors_of_other_people():
    # Twenty people on a circle, 18° from each other, their two pictures 2° apart: nobody is ever confused.
    identity = np.arange(20).repeat(2)
    embedding = circle(*(18 * i + d for i in range(20) for d in (0, 2))).numpy()
    assert p.rank_one(embedding, identity) == {10: 1.0, 20: 1.0}
    # With the pictures 160° apart, among all distractors somebody always is nearer.
    embedding = circle(*(18 * i + d for i in range(20) for d in (0, 160))).numpy()
    assert p.rank_one(embedding, identity)[20] == 0
    assert p.rank_one(embedding[:2], identity[:2]) == {}


def test_clusters_at_the_threshold_and_their_scores():
    embedding = circle(0, 5, 10, 120, 125, 240).numpy()
    identity = np.array([0, 0, 0, 1, 1, 2])
    for method in ("agglomerative", "dbscan"):
        scores = p.clustering_scores(identity, p.connected_people(embedding, 0.1, method))
        assert scores == {"pair_f1": 1, "bcubed_f1": 1}
    assert len(set(p.connected_people(embedding, 1e-6))) == 6
    # One cluster of three with a stranger, and a mate left alone: pairs 1 of 3 right, 1 of 3 found.
    scores = p.clustering_scores(np.array([0, 0, 0, 1]), np.array([0, 0, -1, 0]))
    assert scores["pair_f1"] == pytest.approx(1 / 3)
    precision, recall = (2 / 3 + 2 / 3 + 1 + 1 / 3) / 4, (2 / 3 + 2 / 3 + 1 / 3 + 1) / 4
    assert scores["bcubed_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_collapse_is_said(recwarn):
    class Stuck(FaceNetModule):
        def forward(self, image: Tensor) -> Tensor:
            flat = torch.zeros(len(image), self.embedding_size)
            flat[:, 0] = 1
            return F.normalize(flat + 1e-3 * self.head.weight.sum(1))

    torch.manual_seed(0)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
                        limit_train_batches=2, limit_val_batches=0, enable_progress_bar=False, use_distributed_sampler=False)  # fmt: skip
    trainer.fit(Stuck(DataSpec(1, 32), embedding_size=8), Glyphs(people=60, batch_size=16, num_workers=0))
    assert any("embeddings collapse" in str(warning.message) for warning in recwarn)
    assert trainer.callback_metrics["train/active_triplets"] == 1
    assert float(trainer.callback_metrics["train/stranger_distance"]) < 0.05
