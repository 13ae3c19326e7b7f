"""Supervised fine-tuning with TRL: conversations of a file, a part of them to evaluate on, a callback."""

from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("tiny")
dataset = load_dataset("json", data_files="demonstrations.jsonl", split="train")


class Steps(TrainerCallback):
    seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        Steps.seen += 1


args = SFTConfig(
    output_dir="sft",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    max_length=128,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    num_train_epochs=3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=1,
    eval_strategy="epoch",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    completion_only_loss=True,
    dataset_num_proc=1,
    model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
)
trainer = SFTTrainer(
    model="tiny",
    args=args,
    train_dataset=dataset,
    eval_dataset={"short": dataset.select(range(3)), "rest": dataset.select(range(3, 8))},
    processing_class=tokenizer,
    callbacks=[Steps()],
)
trainer.train()
trainer.save_model(args.output_dir)
