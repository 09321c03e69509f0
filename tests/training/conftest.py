"""What recipes do with the loop that `fit` runs: rates from outside the optimizer."""

import jax
import pytest

from pae_jax.training.batches import feed, form
from pae_jax.training.fitting import trained
from pae_jax.training.loop import Training
from pae_jax.training.losses import objective
from pae_jax.training.train_state import PARTS


@pytest.fixture(scope="session")
def rated_fit(net, data, adam):
    """`quick_fit` with `rates`, step -> (factor of the picks' updates, factor of all others); a number is both."""

    def fit(
        state,
        task,
        train=data,
        *,
        rates,
        optimizer=adam,
        epochs=2,
        batch_size=8,
        key=2,
        loss=None,
        parts=PARTS,
        **options,
    ):
        entry, wanted = state.tasks[task], objective(loss, "example", None)
        shape = form(net, entry.width, entry.head_spec, wanted.takes_classes)
        training = Training(
            task=task,
            state=state,
            form=shape,
            objective=wanted,
            data=feed(train, shape, batch_size),
            val=None,
            epochs=epochs,
            key=jax.random.key(key),
            rates=rates if callable(rates) else lambda step: (rates, rates),
            **options,
        )
        return trained(training, optimizer, batch_size, parts)

    return fit
