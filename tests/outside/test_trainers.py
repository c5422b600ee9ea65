"""The Trainers of Hugging Face and Lightning, with the usual wrappers: the losses stay the same, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from openmythos_kernels import accelerate
from tests.outside.installed import need
from tests.outside.works import PACKAGES, make

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


class Pairs(torch.utils.data.Dataset):
    """Sequences of ten tokens."""

    def __init__(self):
        self.ids = torch.randint(37, (2 * STEPS, 10), generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.ids[i, :-1], "labels": self.ids[i, 1:]}


def loss_of(model, input_ids, labels):
    return nn.functional.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten())


class ForTrainer(nn.Module):
    """Returns a loss, as the Trainer requires."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels=None):
        return {"loss": loss_of(self.model, input_ids, labels)}


def by_hugging_face(model, folder) -> list[float]:
    transformers = need("transformers")
    need("accelerate")
    losses = []

    class Noting(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = model(**inputs)["loss"]
            losses.append(float(loss.detach()))
            return loss

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        seed=5,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    Noting(model=ForTrainer(model), args=arguments, train_dataset=Pairs()).train()
    return losses


def by_lightning(model, folder) -> list[float]:
    lightning = need("lightning")
    losses = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            loss = loss_of(self.model, **batch)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Pairs(), batch_size=2))
    return losses


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("fit", [by_hugging_face, by_lightning])
def test_losses_are_the_same(tmp_path, package, fit):
    plain = make(package)
    fast = accelerate(copy.deepcopy(plain))
    expected = fit(plain, tmp_path / "plain")
    found = fit(fast, tmp_path / "fast")
    assert len(expected) == STEPS
    assert found == pytest.approx(
        expected, rel=1e-3
    )  # AdamW's first steps follow the signs of gradients, which amplifies rounding
