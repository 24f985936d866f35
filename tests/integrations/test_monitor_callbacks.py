"""SpectralMonitor in trainers: the same alphas under the same names in TensorBoard, whoever trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import esdtool
from esdtool.errors import AssignmentError
from esdtool.integrations.transformers import use_alpha_decay, use_spectral_monitor
from esdtool.optim import TensorBoardWriter

# PEFT, Lightning and TensorBoard warn of their own code.
FOREIGN = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS, EVERY, BATCH, RATE = 4, 2, 2, 3e-3
OPTIONS: dict[str, Any] = {"every": EVERY, "measures": ("alpha", "stable_rank")}


class Tokens(Dataset):  # type: ignore[type-arg]
    """Fixed sequences, of which half is the prompt that the loss leaves out."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 97, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].index_fill(0, torch.arange(6), -100)}


def make_model(*, lora: bool) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
    )
    if lora:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        return get_peft_model(model, config)
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE, weight_decay=0.0)


def read_board(folder: Path) -> dict[tuple[int, str], float]:
    """All scalars of alpha and stable rank by (step, name)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = {path.parent for path in folder.rglob("events.*")}
    events = EventAccumulator(str(file))
    events.Reload()
    return {
        (event.step, tag): event.value
        for tag in events.Tags()["scalars"]
        if "/alpha/" in tag or "/stable_rank/" in tag or "/weight_decay/" in tag
        for event in events.Scalars(tag)
    }


def plain_loop(folder: Path, *, lora: bool) -> dict[tuple[int, str], float]:
    model = make_model(lora=lora)
    optimizer = make_optimizer(model)
    monitor = esdtool.SpectralMonitor(model, **OPTIONS, writers=[TensorBoardWriter(folder)])
    for batch in DataLoader(Tokens(), batch_size=BATCH):
        model(**batch).loss.backward()
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    return read_board(folder)


class SequentialTrainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def hf_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, *, lora: bool, **arguments: Any) -> Trainer:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
    return SequentialTrainer(
        model=make_model(lora=lora),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **{"report_to": ["tensorboard"], "save_strategy": "no", **arguments},
        ),
        train_dataset=Tokens(),
    )


def lightning_fit(folder: Path, callbacks: list[Any], *, lora: bool) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    loggers = pytest.importorskip("lightning.pytorch.loggers")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model(lora=lora)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.inner(**batch).loss

        def configure_optimizers(self) -> Any:
            return make_optimizer(self)

        def train_dataloader(self) -> Any:
            return DataLoader(Tokens(), batch_size=BATCH)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=loggers.TensorBoardLogger(str(folder)),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(Module())


@pytest.mark.parametrize("lora", [False, True])
@FOREIGN
def test_trainers_log_the_same_alphas_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    from esdtool.integrations.lightning import SpectralMonitorCallback

    plain = plain_loop(tmp_path / "plain", lora=lora)
    assert {step for step, _ in plain} == {2, 4}
    name = "model.layers.1.self_attn.v_proj"
    assert {f"train/alpha/{what}" for what in ("mean", "role/v_proj", "layer/1", f"module/{name}")} <= {
        tag for _, tag in plain
    }

    trainer = hf_trainer(tmp_path / "hf", monkeypatch, lora=lora)
    callback = use_spectral_monitor(trainer, **OPTIONS)
    with pytest.raises(AssignmentError, match="SpectralMonitor already"):
        use_spectral_monitor(trainer)
    trainer.train()
    assert callback.monitor is not None
    assert callback.monitor.update_step == STEPS
    assert read_board(tmp_path / "hf") == pytest.approx(plain, rel=1e-5)

    lightning_fit(tmp_path / "lightning", [SpectralMonitorCallback(**OPTIONS)], lora=lora)
    found = read_board(tmp_path / "lightning")
    # A LightningModule holds the model under a name of its own.
    prefix = "inner.base_model.model." if lora else "inner."
    assert {(step, tag.replace(prefix, "")): value for (step, tag), value in found.items()} == pytest.approx(
        plain, rel=1e-5
    )


@FOREIGN
def test_schedules_log_their_alphas_and_decays_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esdtool.integrations.lightning import AlphaDecayCallback

    trainer = hf_trainer(tmp_path / "hf", monkeypatch, lora=False)
    callback = use_alpha_decay(trainer, weight_decay=0.1, interval=EVERY)
    monitor = use_spectral_monitor(trainer, **OPTIONS)
    trainer.train()
    assert monitor.monitor is not None
    assert monitor.monitor.last_alphas == {
        name.removesuffix(".weight"): alpha for name, alpha in callback.schedule.last_alphas.items()
    }
    found = read_board(tmp_path / "hf")
    decays = callback.schedule.last_decays
    name = "model.layers.1.mlp.up_proj"
    assert found[4, f"train/weight_decay/module/{name}"] == pytest.approx(decays[f"{name}.weight"], rel=1e-6)
    assert found[4, "train/weight_decay/mean"] == pytest.approx(sum(decays.values()) / len(decays), rel=1e-6)
    assert found[4, f"train/alpha/module/{name}"] == pytest.approx(callback.schedule.last_alphas[f"{name}.weight"])

    own = AlphaDecayCallback(weight_decay=0.1, interval=EVERY, log=("mean",))
    lightning_fit(tmp_path / "lightning", [own], lora=False)
    logged = read_board(tmp_path / "lightning")
    assert {tag for _, tag in logged} == {"train/alpha/mean", "train/weight_decay/mean"}
    assert logged[4, "train/alpha/mean"] == pytest.approx(found[4, "train/alpha/mean"], rel=1e-4)


@FOREIGN
def test_a_resumed_trainer_goes_on_where_the_monitor_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"report_to": [], "save_steps": 3, "max_steps": 4}
    whole = hf_trainer(tmp_path, monkeypatch, lora=False, save_strategy="steps", **options)
    use_spectral_monitor(whole, **OPTIONS)
    whole.train()
    resumed = hf_trainer(tmp_path / "again", monkeypatch, lora=False, **options)
    use_spectral_monitor(resumed, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    logs = [[line for line in trainer.state.log_history if "alpha/mean" in line] for trainer in (whole, resumed)]
    assert [line["step"] for line in logs[0]] == [2, 4]
    assert logs[1][-1] == pytest.approx(logs[0][-1])
