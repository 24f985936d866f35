"""One model, trained by different trainers with AlphaDecay: the same decays at each refresh, and exact resumes."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import esdtool
from esdtool.errors import AssignmentError
from esdtool.integrations.transformers import (
    AlphaDecayCallback,
    use_alpha_decay,
    use_assignment,
    use_layerwise_lr,
)

STEPS, INTERVAL, BATCH = 50, 10, 2
OPTIONS = {"weight_decay": 0.1, "interval": INTERVAL}


class Tokens(Dataset):
    """Fixed random sequences of 16 tokens."""

    def __init__(self, steps: int = STEPS) -> None:
        self.ids = torch.randint(0, 97, (steps * BATCH, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
    )


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


@pytest.fixture(scope="module")
def plain() -> tuple[list[dict[str, float]], list[float], dict[str, torch.Tensor]]:
    """Decays in force at each update, losses, and final weights of a plain PyTorch loop."""
    model = make_model()
    optimizer = make_optimizer(model)
    schedule = esdtool.AlphaDecay(model, optimizer, **OPTIONS)
    decays, losses = [], []
    for batch in DataLoader(Tokens(), batch_size=BATCH):
        loss = model(**batch).loss
        loss.backward()
        schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        decays.append(schedule.last_decays)
        losses.append(float(loss.detach()))
    return decays, losses, {name: value.clone() for name, value in model.state_dict().items()}


class SequentialTrainer(Trainer):
    """The order of the dataset, and AdamW on all parameters alike, as the plain loop has it."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]


class Recorder(TrainerCallback):
    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.decays: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.decays.append(self.callback.schedule.last_decays)


def hf_trainer(folder: Path, **arguments: Any) -> tuple[SequentialTrainer, Recorder]:
    trainer = SequentialTrainer(
        model=make_model(),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=3e-3,
            weight_decay=0.1,
            max_grad_norm=0.0,
            optim="adamw_torch",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=0,
            **{"save_strategy": "no", "lr_scheduler_type": "constant", **arguments},
        ),
        train_dataset=Tokens(),
    )
    recorder = Recorder(use_alpha_decay(trainer, **OPTIONS))
    trainer.add_callback(recorder)
    return trainer, recorder


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hugging_face_trainer(plain, tmp_path: Path) -> None:
    decays, _, weights = plain
    trainer, recorder = hf_trainer(tmp_path)
    trainer.train()
    assert len(recorder.decays) == STEPS
    for ours, theirs in zip(decays, recorder.decays, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("restore_callbacks", "delay"), [(False, 0), (True, 0), (False, 7)])
def test_hugging_face_resume_is_exact(
    tmp_path: Path, restore_callbacks: bool, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIONS, "delay", delay)
    whole, all_decays = hf_trainer(tmp_path / "whole", save_strategy="steps", save_steps=25)
    whole.train()
    resumed, decays = hf_trainer(tmp_path / "resumed", restore_callback_states_from_checkpoint=restore_callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-25"))
    assert decays.decays == all_decays.decays[25:]
    assert losses_of(resumed)[-25:] == losses_of(whole)[-25:]
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])


RATES = {"interval": 3, "glide": 4, "fraction": 0.5}


class RatesRecorder(TrainerCallback):
    """What each parameter steps with, as the optimizer has it inside its step, and the decays."""

    def __init__(self, trainer: Trainer) -> None:
        self.seen: list[Any] = []
        self.decay = use_alpha_decay(trainer, weight_decay=0.1, interval=6)
        self.rates = use_layerwise_lr(trainer, **RATES)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        names = {id(parameter): name for name, parameter in kwargs["model"].named_parameters()}

        def record(inner: Any, *arguments: Any) -> None:
            now = {names[id(each)]: float(group["lr"]) for group in inner.param_groups for each in group["params"]}
            self.seen.append((now, self.decay.schedule.last_decays, self.rates.schedule.last_ratios))

        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(record)


def rates_trainer(folder: Path, **arguments: Any) -> tuple[Trainer, RatesRecorder]:
    trainer, recorder = hf_trainer(folder, max_steps=12, lr_scheduler_type="cosine", **arguments)
    trainer.callback_handler.callbacks = [
        item for item in trainer.callback_handler.callbacks if not isinstance(item, (AlphaDecayCallback, Recorder))
    ]
    del trainer.create_optimizer
    recorder = RatesRecorder(trainer)
    trainer.add_callback(recorder)
    return trainer, recorder


def test_hugging_face_learning_rates(tmp_path: Path) -> None:
    """The ratio times the cosine, beside AlphaDecay; spectra are shared; a resumed run is the same run."""
    whole, all_rates = rates_trainer(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    schedule = all_rates.rates.schedule
    assert schedule.num_updates == 12
    assert schedule.measurements is all_rates.decay.schedule.measurements
    for step, (now, _, ratios) in enumerate(all_rates.seen):
        base = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / 12))
        assert now == pytest.approx({name: base * ratios.get(name, 1.0) for name in now})
    assert all_rates.seen[-1][2] == schedule.target_ratios  # looked at 3 and 6, the last line ended at 9
    assert all_rates.seen[-1][2]["lm_head.weight"] == 5.0
    resumed, rates = rates_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert rates.seen == all_rates.seen[5:]
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])


def test_learning_rates_follow_parameters_that_are_replaced(tmp_path: Path) -> None:
    trainer, recorder = rates_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    first = recorder.rates.schedule.target_ratios
    replace_parameters(trainer.model, optimizer)
    trainer.state.max_steps = 12
    for callback in (recorder.decay, recorder.rates):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer)
    assert recorder.rates.schedule.target_ratios == first
    recorder.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer)
    for callback in (recorder.decay, recorder.rates):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert recorder.seen[0][0]["lm_head.weight"] == pytest.approx(3e-3 * 2.0)  # 1 + (5 - 1) / 4


def test_hugging_face_trains_again_from_the_same_base(tmp_path: Path) -> None:
    """The Trainer keeps its optimizer; the decays in force must not become the base."""
    trainer, _ = hf_trainer(tmp_path, max_steps=3)
    callback = use_other_options(trainer, weight_decay=None, interval=2)
    for _ in range(2):
        trainer.train()
        assert max(callback.schedule.last_decays.values()) == pytest.approx(0.5)
        assert min(callback.schedule.last_decays.values()) == pytest.approx(0.067)
        assert callback.schedule.update_step == 3


def test_hugging_face_saves_with_options_that_json_cannot_hold(tmp_path: Path) -> None:
    trainer, _ = hf_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    use_other_options(trainer, device=torch.device("cpu"))
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["AlphaDecayCallback"]["attributes"]["saved"]["update_step"] == 2


def use_other_options(trainer: Trainer, **options: Any) -> Any:
    """`hf_trainer` without its own schedule."""
    trainer.callback_handler.callbacks = [
        item for item in trainer.callback_handler.callbacks if not isinstance(item, (AlphaDecayCallback, Recorder))
    ]
    del trainer.create_optimizer  # the class's own again
    return use_alpha_decay(trainer, **options)


def replace_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As accelerate does for FSDP2: other parameter objects, in the model and in the optimizer."""
    new = {parameter: torch.nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[parameter])
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]


def test_the_schedule_follows_parameters_that_are_replaced(tmp_path: Path) -> None:
    trainer, _ = hf_trainer(tmp_path)
    callback = use_other_options(trainer, weight_decay=None, interval=1)
    optimizer = trainer.create_optimizer()
    first = callback.schedule.last_decays
    replace_parameters(trainer.model, optimizer)
    arguments = (trainer.args, trainer.state, trainer.control)
    callback.on_train_begin(*arguments, model=trainer.model, optimizer=optimizer)
    assert callback.schedule.last_decays == first

    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(trainer.model.named_parameters())[name]
    with torch.no_grad():
        weight *= torch.logspace(0, -3, 64)
    callback.on_pre_optimizer_step(*arguments)
    (decay,) = [g["weight_decay"] for g in optimizer.param_groups if any(p is weight for p in g["params"])]
    assert decay == callback.schedule.last_decays[name] == pytest.approx(0.067)
    assert first[name] > 0.08

    for group in optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(torch.zeros(8))]
    with pytest.raises(AssignmentError, match=r"static wd\.json"):
        callback.on_train_begin(*arguments, model=trainer.model, optimizer=optimizer)


def test_a_static_assignment_survives_flattened_groups(tmp_path: Path) -> None:
    """As DeepSpeed's ZeRO does it: one flat parameter a group, the group's options kept."""
    trainer, _ = hf_trainer(tmp_path)
    plain_trainer = SequentialTrainer(model=trainer.model, args=trainer.args, train_dataset=Tokens())
    use_assignment(plain_trainer, esdtool.assign(esdtool.analyze(trainer.model)))
    optimizer = plain_trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(torch.zeros(8))]
    plain_trainer.callback_handler.optimizer = optimizer
    arguments = (plain_trainer.args, plain_trainer.state, plain_trainer.control)
    plain_trainer.callback_handler.on_train_begin(*arguments)
    optimizer.param_groups[0]["weight_decay"] = 7.0
    with pytest.raises(AssignmentError, match="replaced the optimizer's parameters"):
        plain_trainer.callback_handler.on_train_begin(*arguments)


def test_a_second_schedule_is_refused(tmp_path: Path) -> None:
    trainer, _ = hf_trainer(tmp_path)
    with pytest.raises(AssignmentError, match="schedule already"):
        use_alpha_decay(trainer, **OPTIONS)


def test_hugging_face_static_assignment(tmp_path: Path) -> None:
    assignment = esdtool.assign(esdtool.analyze(make_model()))
    trainer, _ = hf_trainer(tmp_path, max_steps=2)
    plain_trainer = SequentialTrainer(model=trainer.model, args=trainer.args, train_dataset=Tokens())
    use_assignment(plain_trainer, assignment)
    plain_trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {
        names[id(parameter)]: group["weight_decay"]
        for group in plain_trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, entry in assignment.parameters.items():
        assert found[name] == entry.weight_decay
    assert found["model.embed_tokens.weight"] == 0.1


def test_an_existing_optimizer_is_refused(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(AssignmentError, match="optimizer already"):
        use_alpha_decay(trainer, **OPTIONS)


def test_deepspeed_with_an_optimizer_block_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(model=make_model(), args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    trainer.args.hf_deepspeed_config = type("Config", (), {"config": {"optimizer": {"type": "AdamW"}}})()
    with pytest.raises(AssignmentError, match="'optimizer' block"):
        use_alpha_decay(trainer, **OPTIONS)


lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")


class LightningLlama(lightning.LightningModule):
    def __init__(self, *, own_schedule: bool, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.model = make_model()
        self.own_schedule = own_schedule
        self.decays: list[dict[str, float]] = []
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self)
        if not self.own_schedule:
            return optimizer
        self.alpha_decay = esdtool.AlphaDecay(self, optimizer, **OPTIONS)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Tokens(STEPS // self.epochs), batch_size=BATCH)


def fit(
    folder: Path, *, own_schedule: bool = False, epochs: int = 1, last: int | None = None, ckpt: Path | None = None
) -> LightningLlama:
    """Train `epochs` epochs of `STEPS` updates together, stopping after the `last` one."""
    from esdtool.integrations.lightning import AlphaDecayCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback = AlphaDecayCallback(**({} if own_schedule else OPTIONS))

    class Record(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            module.decays.append(callback.schedule.last_decays)

    module = LightningLlama(own_schedule=own_schedule, epochs=epochs)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=last or epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, Record()],
    )
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("own_schedule", [False, True])
def test_lightning(plain, tmp_path: Path, own_schedule: bool) -> None:
    decays, losses, _ = plain
    module = fit(tmp_path, own_schedule=own_schedule)
    assert module.losses == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(decays, module.decays, strict=True):
        assert {name.removeprefix("model."): value for name, value in theirs.items()} == pytest.approx(ours, rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_resume_is_exact(tmp_path: Path) -> None:
    whole = fit(tmp_path, epochs=2)
    (tmp_path / "half").mkdir()
    fit(tmp_path / "half", epochs=2, last=1)
    resumed = fit(tmp_path, epochs=2, ckpt=tmp_path / "half" / "last.ckpt")
    assert len(resumed.losses) == STEPS // 2
    assert resumed.losses == whole.losses[25:]
    assert resumed.decays == whole.decays[25:]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("own_schedule", [False, True])
def test_lightning_learning_rates(tmp_path: Path, own_schedule: bool) -> None:
    """Both schedules, built by the callbacks or by the module before a recursive scheduler, as in a plain loop."""
    from esdtool.integrations.lightning import AlphaDecayCallback, LayerwiseLRCallback

    def both(model: torch.nn.Module, optimizer: Any) -> list[Any]:
        decay = esdtool.AlphaDecay(model, optimizer, weight_decay=0.1, interval=6)
        return [decay, esdtool.LayerwiseLR(model, optimizer, 8, **RATES, share=decay)]

    class Module(LightningLlama):
        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self)
            if not own_schedule:
                return optimizer
            self.alpha_decay, self.layerwise_lr = both(self, optimizer)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}
            ]

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = [{}, {}] if own_schedule else [{"weight_decay": 0.1, "interval": 6}, RATES]
    callbacks = [AlphaDecayCallback(**options[0]), LayerwiseLRCallback(**options[1])]
    module = Module(own_schedule=own_schedule, epochs=1)
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(module)
    assert callbacks[1].schedule.measurements is callbacks[0].schedule.measurements

    model = make_model()
    optimizer = make_optimizer(model)
    schedules = both(model, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9 if own_schedule else 1.0)
    losses = []
    for _, batch in zip(range(8), DataLoader(Tokens(), batch_size=BATCH), strict=False):
        loss = model(**batch).loss
        loss.backward()
        for schedule in schedules:
            schedule.step()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert module.losses == pytest.approx(losses, rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_learning_rates_resume_exactly(tmp_path: Path) -> None:
    """A checkpoint in the middle of a line from old ratios to new ones: the same losses, ratios and rates after it."""
    from esdtool.integrations.lightning import LayerwiseLRCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def train(epochs: int, ckpt: Path | None = None) -> tuple[LightningLlama, list[Any]]:
        seen: list[Any] = []
        callback = LayerwiseLRCallback(interval=3, glide=4, fraction=1.0)

        class Record(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                seen.append((callback.schedule.last_ratios, callback.schedule.last_rates))

        class Short(LightningLlama):
            def train_dataloader(self) -> DataLoader:
                return DataLoader(Tokens(4), batch_size=BATCH)

        module = Short(own_schedule=False, epochs=2)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, Record()],
        )
        trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, seen

    whole, expected = train(2)
    train(1)
    resumed, seen = train(2, tmp_path / "1.ckpt")
    assert (resumed.losses, seen) == (whole.losses[4:], expected[4:])
    assert seen[0][0] != seen[1][0]  # on the way
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
