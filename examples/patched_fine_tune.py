# %% [markdown]
# # A fine-tune with a patched model
# One line before any Hugging Face training: `patch_model(model)`. The model's own loss is then computed without its
# logits, which take 4.2 GB in float32 for a vocabulary of 128k and a batch of 8,192 tokens. With your own model, put it
# and its tokenizer in the place of `small.llama(...)` and `small.tokenizer()`.

# %%
import tempfile

import small
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from fdistill_kernels.integrations.transformers import patch_model, undo_patch

words = small.tokenizer()
model = small.llama(words, 2, seed=1)


def encode(row):
    ids = words.apply_chat_template(row["messages"], return_dict=False)
    return {"input_ids": ids, "labels": ids}


data = Dataset.from_list(small.chats(400)).map(encode, remove_columns=["messages"])
collate = DataCollatorForSeq2Seq(words)

# %% [markdown]
# ## The same loss, without logits

# %%
batch = collate([data[i] for i in range(4)])
own = model(**batch)
patched = patch_model(model)(**batch)
print("own", own.loss.item(), "patched", patched.loss.item(), "logits", patched.logits)

# %% [markdown]
# ## Training
# This works with gradient accumulation, too: the loss gets the denominator that `Trainer` counts over all accumulated
# batches.

# %%
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=60, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=3e-3,
    logging_steps=20, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = Trainer(model, arguments, collate, train_dataset=data)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]

# %% [markdown]
# ## And back
# In evaluation the logits are there anyway; `undo_patch` removes the patch.

# %%
undo_patch(model)
print("loss", [round(float(x), 3) for x in losses], "logits again", tuple(model(**batch.to(model.device)).logits.shape))
