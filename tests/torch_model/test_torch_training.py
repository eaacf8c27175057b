"""Trainer and PEFT train, evaluate and save, and their saved models load again."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from golden_torch import random_ids, tiny_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
    # Old names, which only 4.57 defines and PEFT still reads on version 5.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning"),
]


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = random_ids(1, 8, seed=index)[0]
        labels = ids.clone()
        labels[: index % 3 + 1] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def arguments(folder, **settings):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_trainer_trains_evaluates_and_saves(tmp_path, settings):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(model, arguments(tmp_path / "run", **settings), train_dataset=Tokens(), eval_dataset=Tokens())
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    predictions = trainer.predict(Tokens())
    assert predictions.predictions.shape == (8, 8, 61)
    assert 0 < predictions.metrics["test_loss"] < 10
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_gradients_do_not_depend_on_accumulation(tmp_path):
    """Trainer divides by the targets of the whole batch, so two halves are weighted by their numbers of targets."""
    updates = []
    for size, steps in ((4, 1), (2, 2)):
        model = tiny_model()
        run = arguments(tmp_path / str(size), gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0)
        run.per_device_train_batch_size, run.max_steps = size, 1
        trainer = Trainer(model, run, train_dataset=Tokens())
        trainer.train()
        updates.append(model.state_dict())
    for name, value in updates[0].items():
        torch.testing.assert_close(value, updates[1][name], rtol=1e-4, atol=1e-5)


def test_lora_trains_saves_and_loads(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "down_proj", "early_exit_gate"]
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    trainer = Trainer(model, arguments(tmp_path / "run"), train_dataset=Tokens())
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    ids = random_ids(2, 6)
    with torch.no_grad():
        expected, plain = model(ids), tiny_model()(ids)
        torch.testing.assert_close(loaded(ids).logits, expected.logits)
        torch.testing.assert_close(loaded(ids).gate_logits, expected.gate_logits)
        assert (expected.logits - plain.logits).abs().max() > 1e-4
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected.logits, rtol=1e-4, atol=1e-4)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    torch.testing.assert_close(model.generate(input_ids=ids, **settings), merged.generate(ids, **settings))
