"""KTO with TRL: labels that are not balanced, the model given by path."""

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import KTOConfig, KTOTrainer

args = KTOConfig(
    output_dir="kto",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=True,
    beta=0.3,
    desirable_weight=1.3,
    undesirable_weight=0.6,
    max_length=None,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    max_steps=4,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = KTOTrainer(
    model="tiny",
    args=args,
    train_dataset=load_dataset("json", data_files="labels.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained("tiny"),
)
trainer.train()
