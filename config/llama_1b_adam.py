# LLaMA 1B at full rank with AdamW, weights in bfloat16: what llama_1b_galore.py is compared with.
# python prepare.py c4 --tokens 1_000_000_000 && torchrun --standalone --nproc_per_node=4 train_llama.py config/llama_1b_adam.py
# Four GPUs of 16 GB: not yet run
out_dir = 'out/llama_1b_adam'
dataset = 'c4'
size, param_dtype, dtype = '1b', 'bfloat16', 'bfloat16'
block_size, batch_size, gradient_accumulation_steps = 256, 16, 32
checkpointing = True
optimizer = 'adamw'
max_iters, warmup_iters, eval_interval = 5000, 500, 500
learning_rate, min_lr = 5e-4, 5e-5
