"""Lightning: a callback that saves in the background and resumes, instead of Lightning's own checkpoints.

python examples/lightning_callback.py --steps 4
python examples/lightning_callback.py --steps 8                    # goes on
python examples/lightning_callback.py --steps 8 --devices 2        # DDP on 2 processes
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import giantstep as gs
from giantstep.optimizer import OptimizerState

WIDTH, BATCH, SAMPLES = 32, 24, 120


class Giantstep(lightning.Callback):
    """Saves every few steps, and goes on from the newest checkpoint.

    Args:
        folder: of all checkpoints.
        every: steps of the trainer (`trainer.global_step`) between two.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every, self.last = folder, every, 0

    def state(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, Any]:
        """What is saved."""
        return {
            "model": module,
            "optimizer": OptimizerState(list(trainer.optimizers), {"model": module}),
            "schedules": [config.scheduler for config in trainer.lr_scheduler_configs],
            # Lightning's counters: of epochs, batches and steps. `max_steps`, schedules and loggers go by them.
            "loops": trainer.fit_loop,
        }

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Load: the optimizers are made, and the loops have not begun. From here on they do as with `ckpt_path`."""
        path = newest(self.folder)
        if path is not None:
            gs.load(self.state(trainer, module), path)
        self.last = trainer.global_step
        if trainer.is_global_zero:
            print(f"{trainer.world_size} ranks, from step {self.last}", flush=True)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        """Save: all ranks are here. While gradients accumulate, several batches belong to one step."""
        step = trainer.global_step
        if step % self.every == 0 and step != self.last:
            gs.async_save(self.state(trainer, module), self.folder / f"step_{step:08d}").guard(*trainer.optimizers)
            self.last = step

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
            print(f"step {self.trainer.global_step + 1} loss {float(mean):.6f} {float(mean).hex()}", flush=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule that changes every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Numbers(torch.utils.data.Sampler[int]):
    """Numbers of samples from where training stands in the epoch, divided over all ranks.

    Lightning asks for an iterator after the loops were loaded; it skips nothing of what the iterator gives.
    """

    def __init__(self, trainer: lightning.Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        share = BATCH // self.trainer.world_size
        for batch in range(self.trainer.fit_loop.batch_idx + 1, SAMPLES // BATCH):
            first = batch * BATCH + self.trainer.global_rank * share
            yield from range(first, first + share)

    def __len__(self) -> int:
        return SAMPLES // self.trainer.world_size


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is complete: whatever a save that was cut off has left is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            gs.open_checkpoint(path)
        except (gs.errors.IncompleteError, gs.errors.NotACheckpointError):
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
    # Lightning finds few workers, and a loader that does not say that it resumes: the sampler does that here.
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        max_steps=arguments.steps,
        callbacks=[Giantstep(arguments.dir, arguments.save_every)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(range(SAMPLES), batch_size=BATCH // arguments.devices, sampler=Numbers(trainer))
    trainer.fit(Regression(), loader)
    if trainer.is_global_zero:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        print(f"ended in epoch {trainer.current_epoch} at global step {trainer.global_step}, learning rate {rate.hex()}")


if __name__ == "__main__":
    main()
