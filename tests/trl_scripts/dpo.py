"""DPO with TRL: a LoRA adapter, several losses at once, an optimizer of one's own."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

set_seed(0)
model = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
ref_model = AutoModelForCausalLM.from_pretrained("tiny-sft", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("tiny")
dataset = load_dataset("json", data_files="pairs.jsonl", split="train")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

args = DPOConfig(
    output_dir="dpo",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    beta=0.3,
    loss_type=["sigmoid", "bco_pair", "sft"],
    loss_weights=[0.8, 0.2, 1.0],
    max_length=128,
    learning_rate=1e-2,
    max_steps=4,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    padding_free=False,
)
trainer = DPOTrainer(
    model=model,
    ref_model=ref_model,
    args=args,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
    processing_class=tokenizer,
    optimizers=(optimizer, None),
)
trainer.train()
metrics = trainer.evaluate()
