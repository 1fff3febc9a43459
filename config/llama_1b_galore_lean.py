# LLaMA 1B with GaLore, rank 512, as lean as it goes: projected backward, per layer, 8-bit moments, checkpointing.
# python prepare.py c4 --tokens 1_000_000_000 && torchrun --standalone --nproc_per_node=4 train_llama.py config/llama_1b_galore_lean.py
# Four GPUs of 8 GB: not yet run; the peak of 1 x 256 tokens is 4.3 GB, measured on a CPU (first edition, power bases)
out_dir = 'out/llama_1b_galore_lean'
dataset = 'c4'
size, param_dtype, dtype = '1b', 'bfloat16', 'bfloat16'
block_size, batch_size, gradient_accumulation_steps = 256, 16, 32
checkpointing = True
optimizer, galore_rank = 'galore', 512
galore_backward, galore_basis, per_layer, state_bits = 'projected', 'sketch', True, 8
max_iters, warmup_iters, eval_interval = 5000, 500, 500
learning_rate, min_lr = 0.01, 0.001
