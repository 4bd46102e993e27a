"""Loading is exact: a function of (seed, epoch, index)."""

import torch

from datamodules import Digits8x8


def batches(loader):
    return [(batch["image"].clone(), batch["label"].clone()) for batch in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(i, j) for (x, i), (y, j) in zip(a, b, strict=True)
    )


def test_batches_do_not_depend_on_the_number_of_workers():
    alone, helped = (Digits8x8(batch_size=300, num_workers=n).train_dataloader() for n in (0, 2))
    assert same(batches(alone), batches(helped))


def test_another_epoch_and_another_seed_give_other_batches():
    loader = Digits8x8(batch_size=300, num_workers=0).train_dataloader()
    first = batches(loader)
    assert same(first, batches(loader))
    loader.set_epoch(1)
    assert not same(first, batches(loader))
    assert not same(first, batches(Digits8x8(batch_size=300, num_workers=0, seed=1).train_dataloader()))


def test_a_loader_goes_on_in_mid_epoch_where_its_state_was_taken():
    loader = Digits8x8(batch_size=100, num_workers=0).train_dataloader()
    loader.set_epoch(3)
    whole = batches(loader)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    resumed = Digits8x8(batch_size=100, num_workers=2).train_dataloader()
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert same(batches(resumed), whole[5:])
    resumed.set_epoch(4)
    assert len(batches(resumed)) == len(whole)
