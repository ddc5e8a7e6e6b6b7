"""generation/adversarial.py: the losses of the published game, and an optimizer's step."""

import pytest
import torch

from build_nas_dataset.random_cells import random_pool
from generation.adversarial import discriminator_loss, update
from genotypes import NAG_SPACE
from models.graph import CellBatch, LabelledCells


def test_the_discriminator_wants_1_for_real_and_0_for_generated():
    def labels_as_scores(cells, labels):
        assert [batch.num_nodes.tolist() for batch in cells] == both
        return labels

    pool = random_pool(5, seed=2)
    cells = tuple(CellBatch.encode([genotype[name] for genotype in pool]) for name in NAG_SPACE.cells)
    both = [batch.num_nodes.tolist() for batch in cells]
    real, fake = (tuple(batch[part] for batch in cells) for part in (slice(2), slice(2, 5)))
    scores = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [0.3], [0.9]])
    real, fake = LabelledCells(real, scores[0]), LabelledCells(fake, scores[1])
    loss, values = discriminator_loss(labels_as_scores, real, fake)
    assert loss.item() == pytest.approx(((0.5**2) / 2 + (0.3**2 + 0.9**2) / 3) / 2)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {"d_loss": loss.item(), "real_score": 0.75, "fake_score": 0.4}
    )


@pytest.mark.parametrize(("clip_value", "length"), [(0, 5.0), (10, 5.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_a_norm_or_not_at_all(clip_value, length):
    weight, gradient = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1)
    for steps in (1, 2):
        update(optimizer, (weight * gradient).sum(), clip_value)
        torch.testing.assert_close(weight.detach(), -steps * length * gradient / 5)
