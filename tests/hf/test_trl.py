"""TRL's trainers run on the bundled model as they are: one step each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import hymba
from hymba.hf import HymbaForCausalLM

TINY = str(Path(hymba.__file__).parent / "assets/tiny")
TEXTS = ["Who made it so?", "The old man and his dog went home.", "It was late.", "Nobody was in the street."] * 2
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def rows(**columns: Callable[[str, int], object]) -> Dataset:
    return Dataset.from_list([{name: make(text, i) for name, make in columns.items()} for i, text in enumerate(TEXTS)])


PAIRS = {"prompt": lambda text, i: text, "chosen": lambda text, i: " Yes.", "rejected": lambda text, i: " No, never."}
LORA = {"r": 2, "target_modules": ["in_proj", "out_proj", "x_proj.0", "dt_proj.0"]}


def model() -> HymbaForCausalLM:
    return HymbaForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def assert_trains(trainer: Any) -> None:
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    result = trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert result.training_loss == result.training_loss  # not NaN
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert not trainer.aux_loss_enabled if hasattr(trainer, "aux_loss_enabled") else True


@pytest.mark.parametrize("extra", [{}, {"packing": True, "max_length": 32}], ids=["rows", "packed"])
def test_sft(options: dict[str, Any], extra: dict[str, Any]) -> None:
    data = rows(text=lambda text, i: text)
    assert_trains(SFTTrainer(TINY, args=SFTConfig(**options, **extra), train_dataset=data))


def test_dpo_with_an_adapter(options: dict[str, Any]) -> None:
    arguments = DPOConfig(max_length=64, **options)
    data, adapter = rows(**PAIRS), LoraConfig(**LORA)
    assert_trains(
        DPOTrainer(model(), args=arguments, train_dataset=data, processing_class=tokenizer(), peft_config=adapter)
    )


def test_dpo_with_a_reference(options: dict[str, Any]) -> None:
    assert_trains(DPOTrainer(TINY, args=DPOConfig(max_length=64, **options), train_dataset=rows(**PAIRS)))


def test_kto(options: dict[str, Any]) -> None:
    data = rows(prompt=lambda text, i: text, completion=lambda text, i: " Yes.", label=lambda text, i: i % 2 == 0)
    trainer = KTOTrainer(
        model(), args=KTOConfig(max_length=64, **options), train_dataset=data, processing_class=tokenizer()
    )
    assert_trains(trainer)


def test_grpo(options: dict[str, Any]) -> None:
    arguments = GRPOConfig(num_generations=2, max_completion_length=4, beta=0.1, temperature=2.0, **options)
    trainer = GRPOTrainer(
        model(),
        args=arguments,
        reward_funcs=lambda completions, **_: [float(i) for i, _ in enumerate(completions)],
        train_dataset=rows(prompt=lambda text, i: text),
        processing_class=tokenizer(),
    )
    assert_trains(trainer)


def test_reward_model(options: dict[str, Any]) -> None:
    reward = AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=1, dtype=torch.float32)
    arguments = RewardConfig(max_length=64, **options)
    trainer = RewardTrainer(reward, args=arguments, train_dataset=rows(**PAIRS), processing_class=tokenizer())
    assert_trains(trainer)
