# %% [markdown]
# # Coverage and likelihood risk
# Does a student say what its teacher would not say (mode averaging), or does it never say what the teacher would say
# (mode collapse)? Wen et al. (ACL 2023, section 4) measure both: the likelihood risk is −log p of the student's samples
# under the teacher, the coverage risk −log q of the teacher's samples under the student. KL is an average over what the
# teacher says, reverse KL over what the student says; the two risks show what each student is better at.

# %%
import tempfile

import small
import torch
from datasets import Dataset

from fdistill_kernels.sequence import Sampling
from fdistill_kernels.sequence.data import tokenize
from fdistill_kernels.sequence.metrics import measured
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

words = small.tokenizer()
chats = Dataset.from_list(small.chats(400))
teacher = small.fine_tuned(small.llama(words, 2, seed=1), words, chats, steps=60)
rows = tokenize(chats, words, teacher.config, answers="each")
held_out = tokenize(Dataset.from_list(small.chats(40, seed=1)), words, teacher.config, answers="each")

# %% [markdown]
# ## Two students
# The same student, too small for its teacher: once by KL on the teacher's samples, once by reverse KL on its own.

# %%
students = {}
for divergence, source in (("kl", "teacher"), ("rkl", "student")):
    student = small.fine_tuned(small.llama(words, 1, seed=2, width=48), words, chats, steps=80)
    config = FDistillConfig(
        output_dir=tempfile.mkdtemp(), divergence=divergence, shares={source: 1.0}, max_new_tokens=12, max_steps=60,
        per_device_train_batch_size=16, learning_rate=4e-3, logging_steps=40, save_strategy="no", report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    FDistillTrainer(student, teacher, config, train_dataset=rows).train()
    students[divergence] = student

# %% [markdown]
# ## Measured, sentence by sentence
# `measured` returns a table with a row for every held-out prompt (nats, tokens, outputs; a `pyarrow` table, for
# `to_pandas()` and Parquet), and a summary of it. The teacher's samples are the same for every student. `fdistill
# evaluate` prints the same summary.

# %%
prompts, gold = ([torch.tensor(ids) for ids in held_out[column]] for column in ("prompt_ids", "labels"))
found = {}
for name, student in students.items():
    table, found[name] = measured(student, teacher, prompts, prompts, gold, held_out["reference"][:], words,
                                  Sampling(12), seed=0, teacher_draws=2)  # fmt: skip
    shown = ("likelihood_risk", "coverage_risk", "kl", "rkl", "tvd", "perplexity", "looping")
    print(name, *(f"{key} {found[name][key]:.3f}" for key in shown))
