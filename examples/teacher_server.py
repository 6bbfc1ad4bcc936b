# %% [markdown]
# # A teacher behind a server
# The teacher's weights stay on another machine, which is asked for each token's largest log-probabilities. Any vLLM
# server will do (`vllm serve TEACHER --max-logprobs 64`), or this package's own small server, `fdistill teacher serve`,
# which this example starts itself. With your own server, `url` is its address.

# %%
import tempfile
import threading

import small
import torch
from datasets import Dataset

from fdistill_kernels.sequence.data import tokenize
from fdistill_kernels.sequence.serve import server
from fdistill_kernels.sequence.teachers import Served
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer
from fdistill_kernels.teachers import Endpoint

words = small.tokenizer()
chats = Dataset.from_list(small.chats(400))
teacher = small.fine_tuned(small.llama(words, 2, seed=1), words, chats, steps=80)
folder = tempfile.mkdtemp()
teacher.save_pretrained(folder)
words.save_pretrained(folder)
served = server(folder, port=0)  # its own machine: fdistill teacher serve --teacher FOLDER
threading.Thread(target=served.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{served.server_address[1]}"

# %% [markdown]
# ## What a server gives
# For each token of a sequence, the server gives the k largest log-probabilities and their ids. What is not in the list
# is the tail, and only its mass is known: `tail="bucket"` compares it as one more entry. The replies are kept in a
# store, so that each sequence is asked for once.

# %%
kept = tempfile.mkdtemp()
endpoint = Endpoint(url, vocabulary=len(words), k=16, store=kept)
student = small.llama(words, 1, seed=2)
rows = tokenize(chats, words, student.config)
held_out = tokenize(Dataset.from_list(small.chats(20, seed=1)), words, student.config)

# %% [markdown]
# ## Training
# Only the teacher is another one.

# %%
config = FDistillConfig(
    output_dir=tempfile.mkdtemp(), divergence="kl", shares={"gold": 1.0}, max_steps=60, per_device_train_batch_size=16,
    learning_rate=5e-3, logging_steps=20, eval_strategy="no", save_strategy="no", report_to=[],
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = FDistillTrainer(student, Served(endpoint, "bucket"), config, train_dataset=rows, eval_dataset=held_out)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
served.shutdown()
print(f"KL to the server's teacher on held-out answers, nats a token: {before:.3f} → {after:.3f}")
