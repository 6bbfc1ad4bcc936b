# %% [markdown]
# # Distil a small instruct model on chat data
# The teacher answers two questions in a row. The student, with half of its layers, learns from it on chats, by the
# Jensen–Shannon divergence on the student's own answers and on the given ones. With your own models, put two that share
# a tokenizer in the place of `small.fine_tuned(...)`: `AutoModelForCausalLM.from_pretrained("…-7B-Instruct")` and
# `"…-0.5B-Instruct"`, and `AutoTokenizer` in the place of `small.tokenizer()`.

# %%
import tempfile

import small
import torch
from datasets import Dataset

from fdistill_kernels.sequence.data import tokenize
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

words = small.tokenizer()
chats = Dataset.from_list(small.chats(400))
teacher = small.fine_tuned(small.llama(words, 2, seed=1), words, chats, steps=80)
student = small.fine_tuned(small.llama(words, 1, seed=2), words, chats, steps=40)

# %% [markdown]
# ## Rows
# A row of `messages` becomes a prompt and what follows it. `answers="each"` makes a row of every answer, after the
# turns before it as generation would see them; any chat template can render that. `"together"`, the default, keeps a
# conversation in one row.

# %%
rows = tokenize(chats, words, student.config, answers="each")
held_out = tokenize(Dataset.from_list(small.chats(40, seed=1)), words, student.config, answers="each")
print(len(chats), "chats,", len(rows), "answers; the first:")
print(repr(words.decode(rows[0]["prompt_ids"])), "→", repr(words.decode(rows[0]["labels"])))

# %% [markdown]
# ## Training
# `FDistillConfig` has all of `TrainingArguments`. Half of the objective is on what the student draws at each step, half
# on the given answers. Entropies, agreement with the teacher and the loss of each half are logged. The evaluation loss
# is the KL on held-out answers, whatever the objective.

# %%
out = tempfile.mkdtemp()
config = FDistillConfig(
    output_dir=out, divergence="js", shares={"student": 0.5, "gold": 0.5}, max_new_tokens=12, max_steps=60,
    per_device_train_batch_size=16, learning_rate=4e-3, warmup_steps=5, lr_scheduler_type="cosine", logging_steps=20,
    eval_strategy="steps", eval_steps=20, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = FDistillTrainer(student, teacher, config, train_dataset=rows, eval_dataset=held_out)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"KL to the teacher on held-out answers, nats a token: {before:.3f} → {after:.3f}")

# %% [markdown]
# ## The student answers
# One command does the same: `fdistill train --teacher … --student … --data chats.jsonl --answers each --divergence js
# --shares student=0.5,gold=0.5 --output_dir run`.

# %%
asked = words.apply_chat_template([{"role": "user", "content": "Count from 3 to 6."}], add_generation_prompt=True,
                                  return_tensors="pt", return_dict=True)  # fmt: skip
made = student.eval().generate(**asked.to(student.device), max_new_tokens=12, do_sample=False)
print(words.decode(made[0], skip_special_tokens=True))
