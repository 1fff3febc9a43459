# LLaMA 350M with GaLore, rank 256, sizes and steps as in GaLore's table 2 (other tokens, so other perplexities).
# python prepare.py c4 --tokens 8_000_000_000 && torchrun --standalone --nproc_per_node=4 train_llama.py config/llama_350m_galore.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/llama_350m_galore'
dataset = 'c4'
size = '350m'
block_size, batch_size, gradient_accumulation_steps = 256, 64, 8
optimizer, galore_rank = 'galore', 256
max_iters, warmup_iters, eval_interval = 60000, 6000, 1000
learning_rate, min_lr = 0.01, 0.001
