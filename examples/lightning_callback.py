"""Lightning: a callback that saves in the background and resumes, instead of Lightning's own checkpoints.

python examples/lightning_callback.py --steps 4
python examples/lightning_callback.py --steps 8                    # goes on
python examples/lightning_callback.py --steps 8 --devices 2        # DDP on 2 processes
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import giantstep as gs
from giantstep.optimizer import OptimizerState

WIDTH, BATCH = 32, 24


class Giantstep(lightning.Callback):
    """Saves every few steps, and goes on from the newest checkpoint.

    Args:
        folder: of all checkpoints.
        every: steps between two.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every, self.step = folder, every, 0

    def state(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, Any]:
        """What is saved. Lightning has made the optimizers when training starts."""
        optimizers = OptimizerState(list(trainer.optimizers), {"model": module})
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        return {"model": module, "optimizer": optimizers, "schedules": schedules, "step": self.step}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Load."""
        path = newest(self.folder)
        if path is not None:
            self.step = gs.load(self.state(trainer, module), path)["step"]
        if trainer.is_global_zero:
            print(f"{trainer.world_size} ranks, from step {self.step}", flush=True)
        trainer.should_stop = self.step >= trainer.max_steps

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        """Save: all ranks are here."""
        self.step += 1
        if self.step % self.every == 0:
            gs.async_save(self.state(trainer, module), self.folder / f"step_{self.step:08d}").guard(*trainer.optimizers)
        trainer.should_stop = self.step >= trainer.max_steps

    def on_train_end(self, *_: Any) -> None:
        """Wait for what is in flight."""
        gs.finish_saves()


class Regression(lightning.LightningModule):
    """Something to train. It knows nothing of checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.GELU(), torch.nn.Linear(64, WIDTH))

    def training_step(self, numbers: torch.Tensor, _: int) -> torch.Tensor:
        """The loss of one batch; every sample is made from its number."""
        inputs = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(n))) for n in numbers])
        loss = torch.nn.functional.mse_loss(self.layers(inputs), torch.roll(inputs, 1, dims=1).tanh())
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        if self.trainer.is_global_zero:
            step = self.trainer.callbacks[0].step + 1
            print(f"step {step} loss {float(mean):.6f} {float(mean).hex()}", flush=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule that changes every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Numbers(torch.utils.data.Sampler[int]):
    """Samples from where training stands, divided over all ranks."""

    def __init__(self, trainer_of: Any, step_of: Any) -> None:
        self.trainer_of, self.step_of = trainer_of, step_of

    def __iter__(self) -> Any:
        trainer = self.trainer_of()
        share = BATCH // trainer.world_size
        for step in range(self.step_of(), 1_000_000):
            first = step * BATCH + trainer.global_rank * share
            yield from range(first, first + share)

    def __len__(self) -> int:
        return 1_000_000


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is complete: whatever a save that was cut off has left is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            gs.open_checkpoint(path)
        except gs.errors.OpenError:
            continue
        return path
    return None


def main() -> None:
    """Train, from the newest checkpoint on if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="train until this step")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--dir", type=Path, default=Path("runs/lightning_callback"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    saving = Giantstep(arguments.dir, arguments.save_every)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        max_steps=arguments.steps,
        callbacks=[saving],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    sampler = Numbers(lambda: trainer, lambda: saving.step)
    loader = DataLoader(range(1_000_000_000), batch_size=BATCH // arguments.devices, sampler=sampler)
    trainer.fit(Regression(), loader)


if __name__ == "__main__":
    main()
