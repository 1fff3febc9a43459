# A small LLaMA on Python's own sources, byte by byte.
# python train_llama.py config/llama_quickstart.py config/methods/galore.py
# Two CPU cores: 2 minutes, validation loss 1.76 nats a byte (with galore)
out_dir = 'out/llama_quickstart'
dataset, vocab_size = 'stdlib', 257
block_size, batch_size, gradient_accumulation_steps = 256, 8, 1
n_embd, n_layer, n_head, n_mlp = 256, 4, 4, 704
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 300, 100, 10, 10, 30
rank = dict.fromkeys(('galore', 'galore_lean', 'galore_int8', 'galore_muon', 'fira', 'apollo'), 64)
basis_every = dict.fromkeys([*rank, 'apollo_mini'], 50)
# rates are those of a GPT of 3.3M parameters (lora's: relora's; muon_lean's: a LLaMA's on English)
learning_rate = {'full': 2e-3, 'local_adamw': 2e-3, 'lora': 4e-3, 'lora_fa': 4e-3, 'mhlora': 2e-3,
                 'lte': 4e-3, 'relora': 4e-3, 'galore': 2e-2, 'galore_lean': 2e-2,
                 'galore_int8': 2e-2, 'galolte': 2e-2, 'fira': 1e-2, 'muon': 8e-3,
                 'local_muon': 8e-3, 'muon_lean': 1.6e-2, 'galore_muon': 8e-3, 'apollo': 2e-2,
                 'apollo_mini': 5e-3, 'scale': 5e-4}
device, dtype = 'cpu', 'float32'
