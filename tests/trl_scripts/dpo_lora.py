"""DPO with TRL: robust to flipped labels, a LoRA adapter, log-probabilities of the reference computed beforehand."""

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

trainer = DPOTrainer(
    model="tiny",
    args=DPOConfig(
        output_dir="lora",
        use_cpu=True,
        bf16=False,
        loss_type="robust",
        label_smoothing=0.1,
        beta=0.5,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=4,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        max_steps=4,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=7,
    ),
    train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
