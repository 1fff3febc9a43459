# LLaMA 60M with GaLore, rank 128, sizes and steps as in GaLore's table 2 (other tokens, so other perplexities).
# python prepare.py c4 --tokens 1_400_000_000 && torchrun --standalone --nproc_per_node=4 train_llama.py config/llama_60m_galore.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/llama_60m_galore'
dataset = 'c4'
size = '60m'
block_size, batch_size, gradient_accumulation_steps = 256, 128, 4
optimizer, galore_rank = 'galore', 128
max_iters, warmup_iters, eval_interval = 10000, 1000, 1000
learning_rate, min_lr = 0.01, 0.001
