# A small LLaMA with GaLore at a quarter of its width, on Python's own sources, byte by byte.
# python train_llama.py config/llama_quickstart.py
# Two CPU cores: 2 minutes, validation loss about 1.7 nats a byte
out_dir = 'out/llama_quickstart'
dataset, vocab_size = 'stdlib', 257
block_size, batch_size, gradient_accumulation_steps = 256, 8, 1
n_embd, n_layer, n_head, n_mlp = 256, 4, 4, 704
optimizer, galore_rank, galore_gap = 'galore', 64, 50
max_iters, eval_interval, eval_iters, log_interval = 300, 100, 10, 10
learning_rate, min_lr, warmup_iters = 2e-2, 2e-3, 30
device, dtype = 'cpu', 'float32'
