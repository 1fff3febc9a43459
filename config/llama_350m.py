# LLaMA 350M, sizes and steps as in GaLore's table 2 (other tokens, so other perplexities).
# python prepare.py c4 --tokens 8_000_000_000
# (about 15 GB to download, 16 on disk; a c4 of more tokens serves, too)
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \
#   train_llama.py config/llama_350m.py config/methods/galore.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/llama_350m'
dataset = 'c4'
size = '350m'
block_size, batch_size, gradient_accumulation_steps = 256, 64, 8
max_iters, warmup_iters, eval_interval = 60000, 6000, 1000
rank = dict.fromkeys(('galore', 'galore_lean', 'galore_int8', 'galore_muon', 'fira', 'apollo',
                      'lora', 'relora'), 256)
alpha = dict.fromkeys(('lora', 'relora'), 256.0)
merge_every = {'relora': 1000}
rewarm_iters = {'relora': 50}
# those of galore, fira, apollo, apollo_mini and scale are their authors', the others were not
# searched here
learning_rate = {'full': 1e-3, 'galore': 0.01, 'galore_lean': 0.01, 'galore_int8': 0.01,
                 'galore_muon': 4e-3, 'fira': 0.01, 'lora': 1e-3, 'relora': 1e-3, 'muon': 2e-3,
                 'muon_lean': 4e-3, 'apollo': 0.01, 'apollo_mini': 0.01, 'scale': 1e-3}
