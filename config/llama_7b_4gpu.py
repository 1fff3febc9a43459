# LLaMA 7B on four cards of 12 GB: GaLore of rank 1024, or Muon, all in shards.
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \
#   train_llama.py config/llama_7b_4gpu.py config/methods/galore.py
# Four GPUs of 12 GB: not yet run. Planned: 9.6 GB a card with these 16 sequences each, 7.7 with 1,
# 11.8 with 33 (muon.py wants --batch_size=32: 11.7). Rank 0's host gathers 19 GB to save, with
# muon.py 21
out_dir = 'out/llama_7b_4gpu'
dataset = 'c4'
size = '7b'
shard = True
param_dtype, dtype, checkpointing = 'bfloat16', 'bfloat16', True
block_size, batch_size, gradient_accumulation_steps = 256, 64, 8
max_iters, warmup_iters, eval_interval = 10000, 1000, 1000
rank = {'galore': 1024, 'galore_muon': 1024}
state_bits = {'galore': 8, 'galore_muon': 8, 'muon': 8, 'full': None}
# those of galore_muon and muon were not searched
learning_rate = {'full': 5e-4, 'galore': 0.005, 'galore_muon': 2e-3, 'muon': 1e-3}
