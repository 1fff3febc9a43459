# LLaMA 7B on one card of 24 GB: lean GaLore, rank and rate of the paper's run (which took 512
# sequences a step, 150,000 steps, bases for 500 of them).
# python prepare.py c4 --tokens 1_000_000_000
# python train_llama.py config/llama_7b.py config/methods/galore_lean.py
# One GPU of 24 GB (muon_lean.py --batch_size=8: 16 GB): not yet run. More micro-batches a step
# would keep r n numbers of every matrix, 3 GB (muon_lean.py: all of them, 13 GB)
out_dir = 'out/llama_7b'
dataset = 'c4'
size = '7b'
param_dtype, dtype, checkpointing = 'bfloat16', 'bfloat16', True
block_size, batch_size, gradient_accumulation_steps = 256, 16, 1
max_iters, warmup_iters, eval_interval = 10000, 1000, 1000
rank = {'galore_lean': 1024, 'galore_int8': 512}
learning_rate = {'galore_lean': 0.005, 'galore_int8': 0.005, 'muon_lean': 1e-3}
