# LLaMA 130M with GaLore, rank 256, sizes and steps as in GaLore's table 2 (other tokens, so other perplexities).
# python prepare.py c4 --tokens 2_700_000_000 && torchrun --standalone --nproc_per_node=4 train_llama.py config/llama_130m_galore.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/llama_130m_galore'
dataset = 'c4'
size = '130m'
block_size, batch_size, gradient_accumulation_steps = 256, 128, 4
optimizer, galore_rank = 'galore', 256
max_iters, warmup_iters, eval_interval = 20000, 2000, 1000
learning_rate, min_lr = 0.01, 0.001
