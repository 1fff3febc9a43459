# LLaMA 1B with weights in bfloat16: the study's run, GaLore of rank 1024 against full rank.
# python prepare.py c4 --tokens 1_000_000_000
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \
#   train_llama.py config/llama_1b.py config/methods/galore.py
# Four GPUs of 16 GB (galore_lean.py: 8 GB): not yet run
out_dir = 'out/llama_1b'
dataset = 'c4'
size = '1b'
param_dtype, dtype, checkpointing = 'bfloat16', 'bfloat16', True
block_size, batch_size, gradient_accumulation_steps = 256, 16, 32
max_iters, warmup_iters, eval_interval = 5000, 500, 500
rank = {'galore': 1024, 'galore_lean': 512, 'galore_int8': 512}
learning_rate = {'full': 5e-4, 'galore': 0.01, 'galore_lean': 0.01, 'galore_int8': 0.01}
