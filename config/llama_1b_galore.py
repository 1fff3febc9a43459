# LLaMA 1B with GaLore, rank 1024, weights in bfloat16: the study's run, against llama_1b_adam.py.
# python prepare.py c4 --tokens 1_000_000_000 && torchrun --standalone --nproc_per_node=4 train_llama.py config/llama_1b_galore.py
# Four GPUs of 16 GB: not yet run
out_dir = 'out/llama_1b_galore'
dataset = 'c4'
size, param_dtype, dtype = '1b', 'bfloat16', 'bfloat16'
block_size, batch_size, gradient_accumulation_steps = 256, 16, 32
checkpointing = True
optimizer, galore_rank = 'galore', 1024
max_iters, warmup_iters, eval_interval = 5000, 500, 500
learning_rate, min_lr = 0.01, 0.001
