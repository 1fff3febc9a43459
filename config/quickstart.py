# A small GPT on Python's own sources, byte by byte: the first thing to run.
# python train_gpt.py config/quickstart.py config/methods/mhlora.py
# Two CPU cores: three minutes, validation loss 1.68 nats a byte. A CPU with units for it takes 0.6
# of the time with --dtype=bfloat16: 1.69 to 1.73, by threads and Python's version
out_dir = 'out/quickstart'
dataset = 'stdlib'
block_size, batch_size = 256, 8
n_layer, n_head, n_embd = 4, 2, 128
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 1500, 500, 20, 20, 20
lowrank = {'mhlora': 'attn'}  # the MLP stays at full rank
rank = dict.fromkeys(('lora', 'lora_fa', 'relora', 'galore', 'galore_lean', 'galore_int8',
                      'galore_muon', 'galolte', 'galolte_2bit', 'fira', 'apollo'), 32)
rank |= {'mhlora': 8, 'lte': 8}
alpha = {'mhlora': 32.0, 'lte': 8.0, 'lora': 32.0, 'lora_fa': 32.0, 'relora': 32.0}
basis_every = dict.fromkeys(('galore', 'galore_lean', 'galore_int8', 'galore_muon', 'galolte',
                             'fira', 'apollo', 'apollo_mini'), 50) | {'galolte_2bit': 100}
# rates and beta2 but mhlora's are those of 3.3M parameters (lora's: relora's), not searched here
learning_rate = {'full': 2e-3, 'local_adamw': 2e-3, 'lora': 4e-3, 'lora_fa': 4e-3, 'mhlora': 2e-3,
                 'lte': 4e-3, 'relora': 4e-3, 'galore': 2e-2, 'galore_lean': 2e-2,
                 'galore_int8': 2e-2, 'galolte': 2e-2, 'galolte_2bit': 8e-3, 'fira': 1e-2,
                 'muon': 8e-3, 'local_muon': 8e-3, 'muon_lean': 3.2e-2, 'galore_muon': 8e-3,
                 'apollo': 2e-2, 'apollo_mini': 5e-3, 'scale': 5e-4}
beta2 = dict.fromkeys(learning_rate, 0.99) | dict.fromkeys(basis_every, 0.999)
device, dtype = 'cpu', 'float32'
