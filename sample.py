"""
Text from a checkpoint of train_gpt.py or train_llama.py:

$ python sample.py --out_dir=out/quickstart --prompt='def ' --num_samples=2
"""

import sys
from types import SimpleNamespace

import config

# -----------------------------------------------------------------------------
out_dir = 'out/gpt2'  # the folder of a run
checkpoint = 'best.pt'  # 'best.pt' or 'ckpt.pt'
prompt = '\n'
num_samples = 3
max_new_tokens = 200
temperature = 0.8  # 0: always the most likely token
top_k = 200  # sample among so many, 0: among all
seed = 1337
merged = True  # False: compute with the heads applied instead of merged into the weights (the same text)
device = 'auto'
# -----------------------------------------------------------------------------
defaults = config.defaults(globals())
if __name__ == '__main__':
    settings = config.load(globals(), defaults, sys.argv[1:])

import torch

import prepare
from lowrank import averaged_heads, load_weights, merge, put_layers
from model import GPT, GPTConfig, Llama, LlamaConfig, generate


def main(settings):
    s = SimpleNamespace(**settings)
    where = config.join({'device': s.device, 'dtype': 'auto', 'param_dtype': 'float32'})
    with config.refusals():
        path = f'{s.out_dir}/{s.checkpoint}'
        state = config.load_checkpoint(path)
        if 'tokenizer' not in state:
            raise ValueError(f"'{s.out_dir}' holds a ViT, which writes no text: set --out_dir to a GPT's or a LLaMA's")
        tokens = prepare.tokenizer(state['tokenizer'])
        shape = state['model_config']
        with config.built_from(path):
            model = Llama(LlamaConfig(**shape)) if 'n_mlp' in shape else GPT(GPTConfig(**shape))
            model.to(getattr(torch, state['settings']['param_dtype']))
            put_layers(model, state['settings'])
            load_weights(model, state['model'])
    model.to(where.device).eval()
    if s.merged:
        merge(model)

    generator = torch.Generator(where.device).manual_seed(s.seed)
    start = tokens.encode_ordinary(s.prompt) or [tokens.eot_token]
    start = torch.tensor([start] * s.num_samples, device=where.device)  # (num_samples, time)
    with averaged_heads(model):
        texts = generate(model, start, s.max_new_tokens, s.temperature, s.top_k, generator, tokens.n_vocab).tolist()
    for text in texts:
        print(tokens.decode(text))
        print('-' * 40)
    return texts


if __name__ == '__main__':
    main(settings)
