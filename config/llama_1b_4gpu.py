# LLaMA 1B on four cards of 12 GB, in shards: GaLore of rank 512, or Muon, against full rank.
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \
#   train_llama.py config/llama_1b_4gpu.py config/methods/galore.py
# Four GPUs of 12 GB: not yet run. Rank 0's host gathers 6.5 GB to save (galore.py; muon.py: 8.6)
out_dir = 'out/llama_1b_4gpu'
dataset = 'c4'
size = '1b'
shard = True
param_dtype, dtype, checkpointing = 'bfloat16', 'bfloat16', True
block_size, batch_size, gradient_accumulation_steps = 256, 64, 8
max_iters, warmup_iters, eval_interval = 5000, 500, 500
rank = {'galore': 512, 'galore_muon': 512}
state_bits = {'galore': 8, 'galore_muon': 8, 'muon': 8, 'full': None}
# those of galore_muon and muon were not searched
learning_rate = {'full': 5e-4, 'galore': 0.01, 'galore_muon': 2e-3, 'muon': 1e-3}
